"""Every public op is one graph of torch.compile, in float32 with trainable tensors; checks of values stay in it."""

from __future__ import annotations

import math

import pytest
import torch
from support.contract import compiled, with_gradients
from support.naive import angles

from starflow_kernels import (
    AffineSpec,
    BlockSpec,
    Solver,
    affine_flow,
    affine_flow_inverse,
    attention_flow,
    bias_gelu,
    block_forward,
    block_inverse,
    block_params,
    cached_attention,
    causal_attention,
    flow_head,
    linear,
    residual_norm,
    solve_inverse,
)

B, T, D, H, HEAD = 2, 9, 3, 2, 8
SIZES = {"token_dim": D, "channels": 16, "layers": 1, "heads": H, "head_dim": HEAD, "kv_heads": H, "mlp_dim": 32}
SPECS = {
    "tarflow": BlockSpec(**SIZES, positions=T, flip=True),
    "starflow": BlockSpec(**SIZES, affine=AffineSpec("softplus", 4.0), rotary="half", start=True, final_norm=True),
}
SOLVERS = {
    "sequential": Solver(),
    "jacobi": Solver("jacobi"),
    "neighbours": Solver("jacobi", window=4, neighbours=(1, 3), guess="zero"),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
sizes = pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])


def random(*shape: int) -> torch.Tensor:
    """Return small float32 values, which keep an inverse finite."""
    return 0.2 * torch.randn(shape)


def block(spec: BlockSpec, rows: int = B):
    """Return data or noise, trainable weights, and the context of a block."""
    weights = {name: torch.nn.Parameter(random(*shape)) for name, shape in spec.weight_shapes.items()}
    context = {"cond": random(rows, spec.channels)}
    if spec.rotary != "none":
        context |= angles(T, HEAD, torch.float32)
    return random(B, T, D), weights, context


def conditioner(x: torch.Tensor) -> torch.Tensor:
    """Return raw parameters that depend on the token before."""
    return 0.1 * torch.nn.functional.pad(torch.cat([x, x], 2), (0, 0, 1, 0))[:, :-1]


ROTARY = {**angles(T, HEAD, torch.float32), "rotary": "half"}
OPS = {
    "affine_flow": (lambda x, p: affine_flow(x, p), [(B, T, D), (B, T, 2 * D)]),
    "affine_flow_inverse": (lambda z, p: [affine_flow_inverse(z, p, guidance=1.5)], [(B, T, D), (2 * B, T, 2 * D)]),
    "flow_head": (
        lambda x, h, w, b, n: flow_head(x, h, w, b, n, AffineSpec("softplus", 4.0)),
        [(B, T, D), (B, T, 8), (2 * D, 8), (2 * D,), (8,)],
    ),
    "causal_attention": (lambda q, k, v: [causal_attention(q, k, v, **ROTARY)], [(B, T, H, HEAD)] * 3),
    "attention_flow": (
        lambda x, q, k, v, w, b: attention_flow(x, q, k, v, w, b),
        [(B, T, D), *[(B, T, H, HEAD)] * 3, (2 * D, H * HEAD), (2 * D,)],
    ),
    "linear": (lambda x, w, b: [linear(x, w, b)], [(B, T, 8), (5, 8), (5,)]),
    "bias_gelu": (lambda x, b: [bias_gelu(x, b)], [(B, T, 8), (8,)]),
    "residual_norm": (lambda x, r, w: residual_norm(x, r, w), [(B, T, 8), (B, T, 8), (8,)]),
}


@pytest.mark.parametrize(("function", "shapes"), OPS.values(), ids=OPS.keys())
@sizes
def test_a_differentiable_op_is_one_graph(function, shapes, dynamic):
    tensors = [random(*shape) for shape in shapes]
    seeds = [torch.randn_like(output) for output in function(*tensors)]
    graph = with_gradients(compiled(function, dynamic=dynamic), tensors, seeds)
    for found, expected in zip(graph, with_gradients(function, tensors, seeds), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "autocast", "dynamic"),
    [("tarflow", False, None), ("starflow", False, None), ("starflow", True, None), ("tarflow", False, True)],
)
def test_a_block_in_training_is_one_graph(name, autocast, dynamic):
    x, weights, context = block(SPECS[name])
    x.requires_grad_()

    def flow(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return block_forward(x, weights, SPECS[name], **context)

    def gradients(flow):
        z, logdet = flow(x)
        return z, logdet, *torch.autograd.grad(z.square().sum() - logdet.sum(), [x, *weights.values()])

    for found, expected in zip(gradients(compiled(flow, dynamic=dynamic)), gradients(flow), strict=True):
        torch.testing.assert_close(found, expected)


@every_solver
@pytest.mark.parametrize(
    ("name", "quantize", "dynamic"), [("tarflow", "none", None), ("starflow", "int8", None), ("starflow", "none", True)]
)
def test_the_inverse_of_a_block_is_one_graph(solver, name, quantize, dynamic):
    z, weights, context = block(SPECS[name])

    def inverse(z):
        return block_inverse(z, weights, SPECS[name], **context, solver=solver, quantize=quantize).x

    assert torch.equal(compiled(inverse, dynamic=dynamic)(z), inverse(z))


@sizes
def test_the_parameters_of_a_block_are_one_graph(dynamic):
    x, weights, context = block(SPECS["tarflow"])
    params = torch.no_grad()(lambda x: block_params(x, weights, SPECS["tarflow"], **context))
    assert torch.equal(compiled(params, dynamic=dynamic)(x), params(x))


@sizes
def test_a_step_over_a_cache_is_one_graph(dynamic):
    q = random(B, 1, H, HEAD)

    def step(q, length):
        caches = q.new_zeros(2, B, T, H, HEAD).unbind()
        return cached_attention(q, q, q, *caches, length, **ROTARY), *caches

    for length in (2, torch.tensor([0, 2], dtype=torch.int32)):
        for found, expected in zip(compiled(step, dynamic=dynamic)(q, length), step(q, length), strict=True):
            assert torch.equal(found, expected)


@every_solver
@pytest.mark.parametrize("name", ["z", "cond"])
def test_a_graph_refuses_inputs_that_are_not_finite(solver, name):
    spec = SPECS["starflow"]
    z, weights, context = block(spec)
    given = {"z": z, **context}
    inverse = compiled(lambda z, **context: block_inverse(z, weights, spec, **context, solver=solver).x)
    inverse(**given)
    with pytest.raises(ValueError, match=f"^{name}: 1 of {given[name].numel()} values are not finite"):
        inverse(**{**given, name: given[name].flatten().index_fill(0, torch.tensor(3), math.nan).view_as(given[name])})
    assert torch.is_grad_enabled()


def test_a_graph_refuses_a_guess_and_a_result_that_are_not_finite():
    spec = SPECS["tarflow"]
    z, weights, context = block(spec)
    inverse = compiled(
        lambda z, guess: block_inverse(z, weights, spec, **context, solver=SOLVERS["jacobi"], guess=guess).x
    )
    with pytest.raises(ValueError, match=r"^guess: 54 of 54 values are not finite"):
        inverse(z, torch.full_like(z, math.inf))
    with pytest.raises(ValueError, match=r"^x, the result: values are not finite at token 1 of sample 0"):
        weights["proj_out.bias"].data.fill_(1e3)
        inverse(z, z)


@every_solver
def test_progress_leaves_the_graph(solver):
    spec = SPECS["starflow"]
    z, weights, context = block(spec)

    def inverse(z):
        return block_inverse(z, weights, spec, **context, solver=solver, progress=lambda done, total: None).x + 1

    torch._dynamo.reset()
    assert torch.equal(torch.compile(inverse, backend="aot_eager")(z), inverse(z))
    with pytest.raises(RuntimeError, match="`progress` of block_inverse needs values outside"):
        compiled(inverse)(z)


@every_solver
def test_solve_inverse_runs_between_graphs(solver):
    if solver.window:
        solver = Solver("jacobi", neighbours=solver.neighbours)
    z = random(B, T, D)

    def inverse(z):
        return solve_inverse(conditioner, 2 * z, solver=solver).x + 1

    torch._dynamo.reset()
    assert torch.equal(torch.compile(inverse, backend="aot_eager")(z), inverse(z))
    with pytest.raises(RuntimeError, match="the values of each pass decide whether solve_inverse is done"):
        compiled(inverse)(z)
