"""Derivatives of every mode and order, vmap, and torch.func through every op: right, or refused in our words."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.blocks import BLOCKS, block, of_tensors
from support.contract import compiled
from support.naive import angles
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import starflow_kernels as kernels
from starflow_kernels import AffineSpec, Solver, solve_inverse

F64 = torch.float64
OPS = torch.ops.starflow
B, T, D, C = 2, 3, 2, 4
SPEC = AffineSpec("softplus", 2.0)
FLOW = {"spec": SPEC, "shift": True, "flip": True, "logdet": "none"}
OPTIONS = "exp", 0.0, True, False, "mean"
HEADS = (B, T, 2, C), (B, T, 1, C), (B, T, 1, C)


def attend(*tensors):
    return kernels.causal_attention(*tensors, **angles(T, C), rotary="half", window=2, return_lse=True)


def attend_and_transform(*tensors):
    return kernels.attention_flow(*tensors, **angles(T, C), rotary="interleaved", **FLOW)


def of_block(flow, case: str, op: bool):
    """Return a function of block `case`, by Python function or registered op, and the shapes of its tensors."""
    x, w, spec, context = block(BLOCKS[case], tokens=T, layers=1)
    if not op:
        function, tensors = of_tensors(flow, x, w, spec, context)
    else:
        tensors = [x, *w.values()]

        def function(x, *weights):
            options = [spec.to_json(), *(["sum"] if flow is kernels.block_forward else [])]
            run = getattr(OPS, flow.__name__)
            return run(x, list(weights), None, None, context.get("cos"), context.get("sin"), *options)

    return function, [tuple(t.shape) for t in tensors]


# name -> (function, shapes of its tensors)
CASES = {
    "affine_flow": (lambda *t: kernels.affine_flow(*t, **FLOW), [(B, T, D), (B, T, 2 * D)]),
    "affine_flow-op": (lambda *t: OPS.affine_flow(*t, *OPTIONS), [(B, T, D), (B, T, 2 * D)]),
    "affine_flow_inverse": (
        lambda z, params, w: kernels.affine_flow_inverse(z, params, SPEC, guidance=w.square(), rule="starflow"),
        [(B, T, D), (2 * B, T, 2 * D), (B, T)],
    ),
    "affine_flow_inverse-op": (
        lambda *t: OPS.affine_flow_inverse(*t, None, "exp", 2.0, "tarflow"),
        [(B, T, D), (B, T, 2 * D)],
    ),
    "flow_head": (lambda *t: kernels.flow_head(*t, **FLOW), [(B, T, D), (B, T, C), (2 * D, C), (2 * D,), (C,)]),
    "flow_head-op": (lambda *t: OPS.flow_head(*t, None, None, *OPTIONS), [(B, T, D), (B, T, C), (2 * D, C)]),
    "causal_attention": (attend, HEADS),
    "causal_attention-op": (lambda *t: OPS.causal_attention(*t, None, None, "none", 0, 0.7), HEADS),
    "attention_flow": (attend_and_transform, [(B, T, D), *HEADS, (2 * D, 2 * C), (2 * D,)]),
    "attention_flow-op": (
        lambda *t: OPS.attention_flow(*t, None, None, None, "none", 2, 1.0, *OPTIONS),
        [(B, T, D), *HEADS, (2 * D, 2 * C)],
    ),
    "residual_norm": (lambda *t: kernels.residual_norm(*t), [(B, T, C), (B, T, C), (C,), (C,)]),
    "residual_norm-op": (lambda *t: OPS.residual_norm(*t, None, None, "rms_norm", 1e-6), [(B, T, C), (B, T, C)]),
    "bias_gelu": (kernels.bias_gelu, [(B, T, C), (C,)]),
    "bias_gelu-op": (lambda x: OPS.bias_gelu(x, None), [(B, T, C)]),
    "linear": (kernels.linear, [(B, T, D), (C, D), (C,)]),
    "linear-op": (lambda *t: OPS.linear(*t, None), [(B, T, D), (C, D)]),
    "block_forward": of_block(kernels.block_forward, "tarflow-text", op=False),
    "block_forward-op": of_block(kernels.block_forward, "starflow-flip", op=True),
    "block_params": of_block(kernels.block_params, "tarflow-text", op=False),
    "block_params-op": of_block(kernels.block_params, "starflow-flip", op=True),
}


@pytest.fixture(params=CASES)
def case(request):
    """A function with one result, the squares of all its outputs, and its float64 tensors."""
    run, shapes = CASES[request.param]

    def function(*tensors):
        outputs = run(*tensors)
        return torch.cat(
            [output.flatten() for output in ((outputs,) if isinstance(outputs, torch.Tensor) else outputs)]
        )

    return function, [0.3 * torch.randn(shape, dtype=F64) for shape in shapes]


def alike(tensors):
    """Return other values for each tensor."""
    return tuple(0.3 * torch.randn_like(t) for t in tensors)


def flat(jacobians):
    return torch.cat([jacobian.flatten(1) for jacobian in jacobians], dim=1)


def test_derivatives_of_both_modes_are_finite_differences(case):
    function, tensors = case
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)


def test_second_derivatives_are_finite_differences(case):
    function, tensors = case
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True, fast_mode=True)


def test_second_derivatives_of_kernels_in_float32(case):
    function, tensors = case
    found = []
    for dtype in (torch.float32, F64):
        own = [t.to(dtype).requires_grad_() for t in tensors]
        first = torch.autograd.grad(function(*own).square().sum(), own, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), own, materialize_grads=True)
        found.append(torch.cat([g.flatten().double() for g in second]))
    narrow, exact = found
    assert (narrow - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("gradients", [True, False])
def test_dual_numbers_and_jvp_agree(case, gradients):
    function, tensors = case
    directions = alike(tensors)
    with torch.set_grad_enabled(gradients), forward_ad.dual_level():
        out = forward_ad.unpack_dual(function(*map(forward_ad.make_dual, tensors, directions))).tangent
    torch.testing.assert_close(out, jvp(function, tuple(tensors), directions)[1], rtol=1e-12, atol=1e-12)


def test_jacobians_of_both_modes_agree(case):
    function, tensors = case
    arguments = tuple(range(len(tensors)))
    by_rows, by_columns = (flat(transform(function, arguments)(*tensors)) for transform in (jacrev, jacfwd))
    torch.testing.assert_close(by_columns, by_rows, rtol=1e-11, atol=1e-11)


def test_transforms_in_float32_are_close_to_float64(case):
    """The kernels for float32 take no part, and lose no tangent."""
    function, tensors = case
    directions = alike(tensors)
    narrow = [tuple(t.float() for t in group) for group in (tensors, directions)]
    exact = jvp(function, tuple(tensors), directions)[1]
    torch.testing.assert_close(jvp(function, *narrow)[1].double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max())


def test_vmap_is_a_loop(case):
    function, tensors = case
    stacks = [torch.stack(rows) for rows in zip(tensors, alike(tensors), alike(tensors))]
    torch.testing.assert_close(vmap(function)(*stacks), torch.stack([function(*rows) for rows in zip(*stacks)]))


def test_vmap_of_the_first_tensor_shares_the_others(case):
    function, (first, *others) = case
    stack = torch.stack([first, *alike([first])], dim=1)
    out = vmap(lambda t: function(t, *others), in_dims=1)(stack)
    torch.testing.assert_close(out, torch.stack([function(t, *others) for t in stack.unbind(1)]))


def test_gradients_per_sample_are_those_of_each(case):
    function, tensors = case
    gradient = grad(lambda *t: function(*t).square().sum(), tuple(range(len(tensors))))
    stacks = [torch.stack(rows) for rows in zip(tensors, alike(tensors))]
    alone = zip(*(gradient(*rows) for rows in zip(*stacks)))
    torch.testing.assert_close(vmap(gradient)(*stacks), tuple(map(torch.stack, alone)), rtol=1e-10, atol=1e-10)


def test_nested_transforms_agree_with_autograd_twice(case):
    function, (first, *others) = case
    loss = lambda t: function(t, *others).square().sum()  # noqa: E731
    once = torch.autograd.functional.hessian(loss, first)
    for twice in (hessian(loss), jacrev(jacrev(loss)), jacfwd(jacfwd(loss))):
        torch.testing.assert_close(twice(first), once, rtol=1e-9, atol=1e-9)


def test_functionalize_changes_nothing(case):
    function, tensors = case
    torch.testing.assert_close(functionalize(function)(*tensors), function(*tensors))


def test_a_named_kernel_is_refused_with_the_reason():
    x, params = torch.randn(B, T, D), torch.randn(B, T, 2 * D)
    with pytest.raises(ValueError, match="'native' cannot run affine_flow: this derivative"):
        vmap(lambda *t: kernels.affine_flow(*t, backend="native"))(x[:, None], params[:, None])
    vmap(lambda *t: kernels.affine_flow(*t, backend="reference"))(x[:, None], params[:, None])


def cached(q):
    q = q.unflatten(-1, (1, D))
    return kernels.cached_attention(q, q, q, q.new_zeros(B, T, 1, D), q.new_zeros(B, T, 1, D), 0)


def cached_op(q):
    q, lengths = q.unflatten(-1, (1, D)), torch.zeros(B, dtype=torch.int32)
    caches = torch.zeros(B, T, 1, D, dtype=q.dtype), torch.zeros(B, T, 1, D, dtype=q.dtype)
    return OPS.cached_attention(q, q, q, *caches, lengths, None, None, "none", 0, 1.0)


def into(params):
    return kernels.affine_flow_inverse(
        torch.zeros(B, T, 1, dtype=params.dtype), params, out=torch.empty(B, T, 1, dtype=params.dtype)
    )


def inverse(solver, op=False):
    _, w, spec, _ = block(BLOCKS["tarflow"], tokens=T, token_dim=D)
    if not op:
        return lambda z: kernels.block_inverse(z, w, spec, solver=solver, quantize="int8").x
    weights, context = list(w.values()), [None] * 5
    if solver.method == "jacobi":
        options = [], spec.to_json(), "tarflow", 1.0, T, False, 0.0
        return lambda z: OPS.block_jacobi(z, z, weights, *context, *options)[0]
    return lambda z: OPS.block_inverse(z, weights, *context, spec.to_json(), "tarflow", 1.0)[0]


def inverse_by_weights(z, w, spec):
    return lambda t: kernels.block_inverse(z, {**w, "pos_embed": t.flatten(1).repeat(2, 2)[:T, :8]}, spec).x


JACOBI = Solver("jacobi")
# name -> function of a tensor (B, T, D)
REFUSED = {
    "cached_attention": cached,
    "cached_attention-op": cached_op,
    "affine_flow_inverse-out": into,
    "block_inverse": inverse(Solver()),
    "block_inverse-op": inverse(Solver(), op=True),
    "block_inverse-jacobi": inverse(JACOBI),
    "block_jacobi-op": inverse(JACOBI, op=True),
    "block_inverse-weights": inverse_by_weights(*block(BLOCKS["tarflow"], tokens=T)[:3]),
    "solve_inverse": lambda z: solve_inverse(lambda x: x.new_zeros(B, T, 2 * D), z).x,
    "solve_inverse-conditioner": lambda p: solve_inverse(lambda x: p, torch.zeros(B, T, 1, dtype=F64)).x,
    "solve_inverse-guess": lambda g: solve_inverse(lambda x: x.new_zeros(B, T, 2 * D), g.new_zeros(B, T, D), guess=g).x,
}


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


MODES = {
    "dual": dual,
    "jvp": lambda f, x: jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: vjp(f, x),
    "vmap": lambda f, x: vmap(f)(x[None]),
    "functionalize": lambda f, x: functionalize(f)(x),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_samplers_refuse_and_say_what_to_do(function, mode):
    with pytest.raises(NotImplementedError, match="has no derivative of this kind: call it under torch"):
        mode(function, torch.randn(B, T, D, dtype=F64))


@pytest.mark.parametrize("name", ["block_inverse", "block_inverse-op", "block_inverse-jacobi", "block_jacobi-op"])
def test_samplers_run_where_others_are_transformed(name):
    x, inside = torch.randn(B, T, D, dtype=F64), []
    for mode in (dual, MODES["grad"], MODES["vmap"]):
        mode(lambda t: inside.append(REFUSED[name](x)) or t, x)
        torch.testing.assert_close(inside.pop(), REFUSED[name](x))


def test_batched_gradients_of_autograd_are_refused():
    x = torch.randn(B, T, D, dtype=F64)
    with pytest.raises(NotImplementedError, match="bias_gelu has no batched gradients"):
        torch.autograd.functional.jacobian(lambda x: kernels.bias_gelu(x), x, vectorize=True)


def test_a_tangent_reaches_the_gradient():
    """Forward over reverse: the gradient of a dual number, with a graph recorded without it."""
    x, v = torch.randn(2, B, T, D)
    x.requires_grad_()
    z = kernels.bias_gelu(x)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(z, x, forward_ad.make_dual(torch.zeros_like(z), v))
        tangent = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(tangent, torch.autograd.grad(kernels.bias_gelu(x), x, v)[0])


def test_transforms_compile():
    x, params = torch.randn(B, T, D), torch.randn(B, T, 2 * D)
    score = vmap(grad(lambda x, p: kernels.affine_flow(x[None], p[None])[0].square().sum()))
    torch.testing.assert_close(compiled(score)(x, params), score(x, params))
