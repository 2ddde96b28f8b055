"""The published parallel inverses that benchmarks compare with equal the inverse when run to the end."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from support.naive import angles

from benchmarks.peers.published import (
    GS_JACOBI,
    SEJD,
    SEQUENTIAL,
    STARFLOW,
    EagerBlock,
    gs_jacobi_rules,
    sejd_rules,
    solve,
)
from starflow_kernels import AffineSpec, BlockSpec, block_forward, block_inverse

F64 = torch.float64
B, T = 2, 18
BASE = BlockSpec(token_dim=3, channels=8, layers=2, heads=2, head_dim=4, kv_heads=2, mlp_dim=12)
SHAPES = {
    "tarflow": {"positions": T},
    "tarflow-flip": {"positions": T, "flip": True},
    "starflow": {"affine": AffineSpec("softplus", 4.0), "rotary": "interleaved", "start": True, "final_norm": True},
    "starflow-flip-grouped": {"rotary": "half", "start": True, "flip": True, "kv_heads": 1, "bias": False},
    "unit": {"affine": AffineSpec("unit"), "positions": T, "qk_norm": True, "norm": "rms_norm"},
}
RULES = {
    "sequential": SEQUENTIAL,
    "gs-jacobi": GS_JACOBI,
    "gs-jacobi-modules": dataclasses.replace(GS_JACOBI, modules=8),
    "sejd": SEJD,
    "starflow": STARFLOW,
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def block(shape, steep=0.2):
    """Return noise, arguments of the ops, and the block in eager torch; steep: influence of a token on later ones."""
    spec = dataclasses.replace(BASE, **shape)
    weights = {}
    for name, size in spec.weight_shapes.items():
        scale = size[1] ** -0.5 if len(size) == 2 and name != "pos_embed" else 0.3
        weights[name] = torch.randn(size, dtype=F64) * scale * (steep if name == "proj_out.weight" else 1)
    context = {"cond": torch.randn(B, spec.channels, dtype=F64)}
    if spec.rotary != "none":
        context |= angles(T, spec.head_dim)
    return torch.randn(B, T, 3, dtype=F64), (weights, spec, context), EagerBlock(weights, spec, B, T, **context)


def exactly(rule):
    """Return the rule without a clamp and without a bound that ends its sweeps early."""
    return dataclasses.replace(rule, bound=0.0, clamp=math.inf, limit=1 if rule is SEQUENTIAL else T)


@every_shape
@every_rule
def test_run_to_the_end_it_is_the_inverse(shape, rule):
    z, (weights, spec, context), eager = block(shape)
    expected = block_inverse(z, weights, spec, **context).x
    torch.testing.assert_close(solve(eager, z, exactly(rule)), expected, rtol=0, atol=1e-12)


@every_shape
@every_rule
def test_counts_passes_and_tokens(shape, rule):
    z, _, eager = block(shape)
    sweeps = []
    solve(eager, z, dataclasses.replace(exactly(rule), bound=-1.0, limit=3), lambda x: sweeps.append(x.clone()))
    spans = rule.spans(eager.first, T)
    assert spans[0][0] == (0 if eager.spec.start else 1) and spans[-1][1] == T
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert eager.passes == 3 * len(spans) == len(sweeps)
    assert eager.tokens == 3 * B * sum(end - begin for begin, end in spans) == 3 * B * (T - eager.first)


def test_modules_are_the_published_ones():
    """Sizes count inputs: where token 0 passes unchanged, the last module is one token shorter."""
    assert GS_JACOBI.spans(1, 16) == [(1, 17 - 1)]
    assert dataclasses.replace(GS_JACOBI, modules=8).spans(1, 16)[-2:] == [(13, 15), (15, 16)]
    assert STARFLOW.spans(0, 64) == [(0, 16), (16, 32), (32, 48), (48, 64)]


@every_shape
def test_first_tokens_are_exact_after_as_many_sweeps(shape):
    z, (weights, spec, context), eager = block(shape)
    expected = block_inverse(z, weights, spec, **context).x
    for sweeps in (1, 4):
        x = solve(eager, z, dataclasses.replace(SEJD, bound=-1.0, limit=sweeps))
        wrong = (x - expected).abs().amax((0, 2)) > 1e-12
        wrong = wrong.flip(0) if spec.flip else wrong
        assert wrong.tolist() == [False] * (eager.first + sweeps) + [True] * (T - eager.first - sweeps)


@every_shape
@pytest.mark.parametrize(
    "rule, zero", [(SEJD, True), (STARFLOW, False), (GS_JACOBI, False)], ids=["sejd", "star", "gs"]
)
def test_first_sweep_is_from_its_guess(shape, rule, zero):
    z, (weights, spec, context), eager = block(shape)
    guess = torch.zeros_like(z) if zero else z.clone()
    first = T - 1 if spec.flip else 0
    if not spec.start:
        guess[:, first] = z[:, first]
    noise, minus_log_sigma = block_forward(guess, weights, spec, **context, logdet="none")
    sigma = (-minus_log_sigma).exp()
    x = solve(eager, z, dataclasses.replace(rule, size=T, limit=1, clamp=math.inf))
    torch.testing.assert_close(x, guess + sigma * (z - noise), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "rule, bound", [(SEJD, 0.5), (STARFLOW, 1e-3), (GS_JACOBI, 1e-6)], ids=["sejd", "starflow", "gs"]
)
def test_stops_at_its_bound(rule, bound):
    """The last sweep of a module is the first whose change is within the bound."""
    z, _, eager = block(SHAPES["starflow"])
    x = z.clone() if rule.guess == "noise" else torch.zeros_like(z)
    seen = [x]
    solve(eager, z, dataclasses.replace(rule, size=T, clamp=math.inf), lambda x: seen.append(x.clone()))
    measures = []
    for old, new in itertools.pairwise(seen):
        change = new - old
        if rule is GS_JACOBI:
            measures.append(change.square().sum().sqrt() / (B * 3))
        else:
            measures.append(change.abs().max() if rule is SEJD else change.square().mean() / new.square().mean())
    assert rule.bound == bound and 1 < len(measures) < T
    assert measures[-1] <= bound < min(measures[:-1])


@pytest.mark.parametrize("modules", [1, 8])
def test_clamp_bounds_the_values_after_every_sweep(modules):
    """Token 0, which passes unchanged, is clamped only without modules, as in the released code."""
    z, _, eager = block(SHAPES["tarflow"])
    z, seen = 4 * z, []
    solve(eager, z, dataclasses.replace(GS_JACOBI, modules=modules), lambda x: seen.append(x.clone()))
    assert seen[-1][:, 1:].abs().max() == 3
    assert all(x[:, 1:3].abs().max() <= 3 for x in seen)
    assert torch.equal(seen[-1][:, 0], z[:, 0].clamp(-3, 3) if modules == 1 else z[:, 0])
    assert z[:, 0].abs().max() > 3


def test_strategies():
    """The block whose parameters depend most on the tokens is cut into modules; sequential is sampled first."""
    pairs = [block(SHAPES["tarflow"], steep) for steep in (0.01, 2.0, 0.01)]
    blocks = [eager for _, _, eager in pairs]
    x = [torch.randn(B, T, 3, dtype=F64) for _ in pairs]
    z = [block_forward(data, *args[:2], **args[2])[0] for data, (_, args, _) in zip(x, pairs)]
    rules = gs_jacobi_rules(blocks, z, x, rest=10)
    assert [(rule.modules, rule.limit) for rule in rules] == [(1, 10), (8, 32), (1, 10)]
    assert {(rule.bound, rule.clamp, rule.change) for rule in rules} == {(1e-6, 3.0, "norm")}
    assert sejd_rules(3) == [SEJD, SEJD, SEQUENTIAL]


def test_guess_is_the_one_that_a_sweep_brings_closer():
    z, (weights, spec, context), eager = block(SHAPES["tarflow"])
    zero = torch.zeros_like(z)
    (rule,) = gs_jacobi_rules([eager], [block_forward(zero, weights, spec, **context)[0]], [zero], rest=10)
    assert rule.guess == "zero"
    weights["proj_out.weight"] *= 1e-3  # nearly the same affine map of every token: data is close to its noise
    weights["proj_out.bias"] *= 1e-3
    (rule,) = gs_jacobi_rules([eager], [z], [block_inverse(z, weights, spec, **context).x], rest=10)
    assert rule.guess == "noise"
