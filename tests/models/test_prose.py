"""Prose as a configuration of TokenFlow, and the conversion of its weights."""

from __future__ import annotations

import pytest
import torch
from support import prose

from starflow import ConfigError, TokenFlow, TokenFlowConfig
from starflow.convert.prose import read_prose
from starflow.errors import CheckpointError

LENGTHS = torch.tensor([7, 4, 1])


def molecules(lengths=LENGTHS):
    """Return coordinates, atoms, and the permutation of each block, which puts the padding last."""
    B, T = len(lengths), prose.T
    x = torch.randn(B, T, prose.D, dtype=torch.float64)
    atoms = torch.stack([torch.randint(1, high, (B, T)) for high in (128, 64, 9)], -1)
    atoms = torch.cat([atoms, torch.randint(2, 9, (B, 1, 1)).expand(B, T, 1)], -1)
    orders = [
        torch.stack([torch.cat([torch.randperm(n), torch.arange(n, T)]) for n in lengths.tolist()])
        for _ in range(prose.BLOCKS)
    ]
    return x, atoms, orders


@pytest.mark.parametrize("transition", [True, False])
@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("learned_positions", [True, False])
def test_converted_weights_give_the_density_and_samples_of_prose(transition, lookahead, learned_positions):
    w = prose.weights(transition, lookahead, learned_positions)
    flow = read_prose(w, prose.HEAD).double()
    x, atoms, orders = molecules()
    found = flow(x, atoms, LENGTHS, orders)
    back = flow.inverse(found.z, atoms, LENGTHS, orders)
    for b, n in enumerate(LENGTHS.tolist()):
        z, logdet = prose.density(w, x[b, :n], atoms[b, :n], [order[b, :n] for order in orders])
        torch.testing.assert_close(found.z[b, :n], z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.logdet[b], torch.as_tensor(logdet, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(back.x[b, :n], x[b, :n], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back.logdet, -found.logdet, rtol=1e-6, atol=1e-6)


def test_float32_is_close_to_float64():
    flow = read_prose(prose.weights(), prose.HEAD)
    x, atoms, orders = molecules()
    exact = flow.double()(x, atoms, LENGTHS, orders)
    found = flow.float()(x.float(), atoms, LENGTHS, orders)
    torch.testing.assert_close(found.z.double(), exact.z, rtol=1e-4, atol=1e-4)
    back = flow.inverse(found.z.detach(), atoms, LENGTHS, orders)
    torch.testing.assert_close(back.x.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learned_positions", [True, False])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_conditions_that_are_written_in_place_are_those_with_gradients(learned_positions, lengths):
    flow = read_prose(prose.weights(learned_positions=learned_positions), prose.HEAD).float()
    adaptive = flow.blocks[1].adaptive
    features, order = torch.randn(3, prose.T, prose.C), torch.stack([torch.randperm(prose.T) for _ in range(3)])
    with_gradients = adaptive(features, order, lengths)
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(adaptive(features, order, lengths), with_gradients, rtol=1e-5, atol=1e-6)


def test_bfloat16_autocast_is_close_to_float32():
    flow = read_prose(prose.weights(), prose.HEAD).float()
    x, atoms, orders = molecules()
    exact = flow(x.float(), atoms, LENGTHS, orders)
    with torch.autocast("cpu", torch.bfloat16):
        found = flow(x.float(), atoms, LENGTHS, orders)
    assert not torch.equal(found.z, exact.z)
    torch.testing.assert_close(found.z, exact.z, rtol=0.05, atol=0.05)


def test_a_converted_flow_is_saved_and_read(tmp_path):
    flow = read_prose(prose.weights(), prose.HEAD)
    flow.save_pretrained(tmp_path / "flow")
    read = TokenFlow.from_pretrained(tmp_path / "flow")
    x, atoms, orders = molecules()
    assert torch.equal(read(x.float(), atoms, LENGTHS, orders).z, flow(x.float(), atoms, LENGTHS, orders).z)


def test_the_preset_is_trainable():
    small = {"tokens": 5, "channels": 16, "layers": (1, 1), "head_dim": 8}
    flow = TokenFlow.preset("prose", **small)
    x, atoms = torch.randn(2, 5, 3), torch.randint(1, 9, (2, 5, 4))
    torch.testing.assert_close(flow(x, atoms).z, x)
    torch.nn.init.normal_(flow.blocks[0].proj_out.weight)
    torch.nn.init.normal_(flow.blocks[0].adaptive.gate.weight)
    flow.log_prob(x, atoms).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
    assert flow.blocks[0].adaptive.positions.grad.abs().sum() > 0 and flow.atoms.atom.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"condition": "none"}, "adaptive: needs a condition per token, got condition='none'"),
        ({"condition": "vector", "condition_dim": 2}, "adaptive: needs a condition per token, got condition='vector'"),
        ({"adaptive": False, "transition": 0}, "lookahead: needs an adaptive flow"),
        ({"adaptive": False, "lookahead": False}, "transition_dim=1536: expected 0, or a width in an adaptive block"),
        ({"condition_dim": 3}, "condition_dim=3: expected 0"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        TokenFlowConfig.preset("prose", **{"tokens": 5, **settings})


@pytest.mark.parametrize(
    "condition, message",
    [
        (None, r"condition: expected integers of shape \(2, 5, 4\), got NoneType"),
        (torch.zeros(2, 5, 4), r"got torch.float32 \(2, 5, 4\)"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), r"got torch.int64 \(2, 5, 3\)"),
        (torch.full((2, 5, 4), 128), "condition: expected kinds of atoms from 0 to 127"),
        (torch.full((2, 5, 4), 64), "condition: expected kinds of residues from 0 to 63"),
    ],
)
def test_atoms_that_are_something_else(condition, message):
    flow = TokenFlow.preset("prose", tokens=5, channels=16, layers=(1,), head_dim=8)
    with pytest.raises(ValueError, match=message):
        flow.log_prob(torch.zeros(2, 5, 3), condition)


def test_padding_of_atoms_is_any_integer():
    flow = TokenFlow.preset("prose", tokens=5, channels=16, layers=(1,), head_dim=8)
    x, atoms, lengths = torch.randn(2, 5, 3), torch.ones(2, 5, 4, dtype=torch.int64), torch.tensor([4, 5])
    spoiled = atoms.clone()
    spoiled[0, 4] = -1
    assert torch.equal(flow.log_prob(x, spoiled, lengths), flow.log_prob(x, atoms, lengths))
    assert flow.sample(0, torch.ones(0, 5, 4, dtype=torch.int64)).shape == (0, 5, 3)
    assert flow.to("meta").log_prob(x.to("meta"), atoms.to("meta")).shape == (2,)


def test_atoms_are_not_standardized():
    flow = TokenFlow.preset("prose", tokens=5, channels=16, layers=(1,), head_dim=8)
    flow.standardize(3 + 2 * torch.randn(64, 5, 3), torch.ones(64, 5, 4, dtype=torch.int64))
    torch.testing.assert_close(flow.shift, torch.full((3,), 3.0), atol=0.5, rtol=0)


def test_orders_are_one_per_block():
    flow = TokenFlow.preset("molecule", tokens=4, channels=16, layers=(1, 1), head_dim=8)
    with pytest.raises(ValueError, match="order: 3 of them for 2 blocks"):
        flow.log_prob(torch.zeros(2, 4, 3), order=[torch.arange(4)] * 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda w: w.pop("blocks.1.proj_in.bias"), CheckpointError, "blocks.1.proj_in.bias is missing"),
        (lambda w: w.update({"blocks.0.more": torch.zeros(1)}), CheckpointError, "blocks.0.more is left over"),
        (
            lambda w: w.update({"blocks.2.proj_in.bias": torch.zeros(9)}),
            CheckpointError,
            r"blocks.2.proj_in.bias has the shape \(9,\), expected \(8,\)",
        ),
        (
            lambda w: w.update({"blocks.0.attn_blocks.0.mha.adaln.norm_cond.weight": torch.ones(7)}),
            CheckpointError,
            "their shapes do not fit each other",
        ),
        (lambda w: w.update({"blocks.0.proj_out.weight": torch.zeros(7, 8)}), CheckpointError, "fit each other"),
        (lambda w: w.update({"blocks.0.proj_in.bias": torch.ones(8).int()}), CheckpointError, "is no tensor of finite"),
        (
            lambda w: w.update({"blocks.0.proj_in.bias": torch.full((8,), torch.nan)}),
            CheckpointError,
            "is no tensor of",
        ),
        (lambda w: w.clear(), CheckpointError, "there are no blocks"),
        (lambda w: w.update({"blocks.0.pair_proj.0.weight": torch.zeros(1)}), ConfigError, "bias of pairs of atoms"),
        (lambda w: [w.pop(name) for name in list(w) if ".adaln." in name], ConfigError, "there are no adaptive layers"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, error, message):
    w = prose.weights()
    change(w)
    with pytest.raises(error, match=message):
        read_prose(w, prose.HEAD)
