"""The kernel that solves J^T u = g, which is the gradient of block_inverse on the CPU, against its reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.arranged import drawn_call, of_first_branch
from support.backends import needs_native
from support.blocks import BLOCKS, WIDE_SPECS, block, rows, tame_block
from support.contract import assert_within_contract, strided

from starflow_kernels import block_forward, block_inverse
from starflow_kernels._core import dispatch
from starflow_kernels.block import native_transposed

pytestmark = needs_native
OTHERS = {"qk_norm": True, "post_norm": True, "final_norm": True, "start": True, "bias": False}
SPECS = {
    **WIDE_SPECS,
    "layer-norms": dataclasses.replace(WIDE_SPECS["tarflow"], **OTHERS),
    "tanh-gelu": dataclasses.replace(WIDE_SPECS["odd"], mlp="swiglu", norm="rms_norm", flip=True),
}


def solve(x, g, w, spec, context, known=None, backend="native"):
    context = [context.get(name) for name in ("cond", "prefix", "cos", "sin")]
    return dispatch.run("block_inverse_backward", backend, x, g, list(w.values()), *context, spec.to_json(), known)


def double(values):
    return {name: value.double() for name, value in values.items()}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("tokens", [1, 2, 17, 40])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_over_sizes_and_given_tokens(spec, tokens):
    x, w, context = tame_block(spec, 3, tokens, 5)
    g = torch.randn_like(x)
    for known in (None, torch.tensor([0, tokens // 2, tokens])):
        exact = solve(x.double(), g.double(), double(w), spec, double(context), known, "reference")
        plain = solve(x, g, w, spec, context, known, "reference")
        for threads in (2, 1):
            torch.set_num_threads(threads)
            assert_within_contract(solve(x, g, w, spec, context, known), plain, exact)


@pytest.mark.parametrize("part", range(10))
def test_gradients_of_drawn_calls_are_close_to_float64(part):
    """Over specs, orders, lengths, conditions, prefixes and given tokens."""
    for seed in range(part, 100, 10):
        z, w, spec, context, layout, inverse = drawn_call(seed)
        context, seeds, gradients = of_first_branch(context), torch.randn_like(z), []
        for dtype in (torch.float32, torch.float64):
            noise, data = (None if t is None else t.to(dtype).requires_grad_() for t in (z, inverse["data"]))
            weights, given = ({name: value.to(dtype) for name, value in values.items()} for values in (w, context))
            found = block_inverse(noise, weights, spec, **given, **layout, data=data, known=inverse["known"])
            leaves = [t for t in (noise, data) if t is not None]
            gradients.append([t.double() for t in torch.autograd.grad((found.x * seeds).sum(), leaves)])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_the_residual_is_that_of_rounding_errors(spec):
    x, w, context = tame_block(spec, 3, 60, 5)
    g = torch.randn_like(x)
    u = solve(x, g, w, spec, context)
    leaf = x.double().requires_grad_()
    z, _ = block_forward(leaf, double(w), spec, **double(context))
    (pulled,) = torch.autograd.grad(z, leaf, u.double())
    assert (pulled - g).abs().max() < 100 * torch.finfo(torch.float32).eps * g.abs().max()


@pytest.mark.parametrize("per_token", [False, True])
def test_a_row_has_the_same_bits_in_every_batch_and_for_every_number_of_threads(per_token):
    for spec in SPECS.values():
        x, w, context = tame_block(spec, 5, 35, 3)
        if per_token:
            context["cond"] = torch.randn(5, 35, spec.channels)
        g, known = torch.randn_like(x), torch.tensor([0, 3, 35, 17, 1])
        whole = solve(x, g, w, spec, context, known)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for which in (slice(0, 1), slice(1, 4), slice(4, 5)):
                alone = solve(x[which], g[which], w, spec, rows(context, which), known[which])
                assert torch.equal(alone, whole[which])


@pytest.mark.parametrize("change", ["memory", "calls"])
def test_parts_and_calls_have_the_same_bits(change, monkeypatch):
    spec = WIDE_SPECS["starflow-text"]
    x, w, context = tame_block(spec, 7, 40, 3)
    g = torch.randn_like(x)
    whole = solve(x, g, w, spec, context)
    if change == "memory":
        monkeypatch.setenv("STARFLOW_CACHE_GB", "1e-9")
    else:
        monkeypatch.setattr(native_transposed, "call_tokens", lambda floats, rows: 3)
    assert torch.equal(solve(x, g, w, spec, context), whole)


@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs_are_read_and_left():
    spec = WIDE_SPECS["everything"]
    x, w, context = tame_block(spec, 2, 7)
    g = torch.randn_like(x)
    copies = strided(x), strided(g), {name: strided(t) for name, t in w.items()}
    found = solve(*copies, spec, {name: strided(t) for name, t in context.items()})
    assert torch.equal(found, solve(x, g, w, spec, context))
    assert torch.equal(copies[0], x) and torch.equal(copies[1], g)


def test_no_rows():
    x, w, context = tame_block(WIDE_SPECS["tarflow"], 0, 5)
    assert solve(x, x, w, WIDE_SPECS["tarflow"], context).shape == x.shape


def test_weights_in_bfloat16():
    """The kernel computes in float32 with the rounded weights."""
    for spec in SPECS.values():
        x, w, context = tame_block(spec, 2, 20, 3)
        w, g = {name: weight.bfloat16() for name, weight in w.items()}, torch.randn_like(x)
        exact = solve(x.double(), g.double(), double(w), spec, double(context), backend="reference")
        torch.testing.assert_close(solve(x, g, w, spec, context).double(), exact, rtol=1e-4, atol=1e-5)


def test_changed_weights_are_read_anew():
    z, w, spec, context = block(BLOCKS["tarflow"], dtype=torch.float32)
    for _ in range(2):
        found, expected = (solve(z, z, w, spec, context, backend=name) for name in ("native", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        w["layers.1.up.weight"].data += 0.5


def test_a_token_without_gradient_adds_nothing_even_if_its_scale_is_infinite():
    spec = dataclasses.replace(WIDE_SPECS["tarflow"], flip=False)
    x, w, context = tame_block(spec, 1, 4)
    w["proj_out.bias"][: spec.token_dim] = 200
    u = solve(x, torch.zeros_like(x), w, spec, context)
    assert (u == 0).all()


@pytest.mark.parametrize(
    "tokens, weights, reason",
    [
        (torch.float32, torch.float16, "weight is torch.float16, it takes float32 and bfloat16"),
        (torch.float64, torch.float64, "x is torch.float64, it takes float32"),
    ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(tokens, weights, reason):
    x, w, context = tame_block(WIDE_SPECS["tarflow"], 1, 5, dtype=weights)
    with pytest.raises(ValueError, match=f"backend='native' cannot run block_inverse_backward: {reason}"):
        solve(x.to(tokens), x.to(tokens), w, WIDE_SPECS["tarflow"], context)
