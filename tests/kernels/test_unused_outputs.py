"""An output that is not used contributes nothing to a gradient, even if it is infinite."""

from __future__ import annotations

import pytest
import torch
from support.backends import cpu_backends

from starflow_kernels import AffineSpec, affine_flow, attention_flow, causal_attention, flow_head, residual_norm
from starflow_kernels._triton import runtime

F64 = torch.float64
B, T, D, C = 2, 3, 2, 4
# sigma = exp(-90): 1 / sigma and z exceed float32, and not float64.
SMALL = torch.tensor([-90.0, -90.0, 0.5, -0.5])
HEAD = {"weight": torch.randn(2 * D, C) * 0.1, "bias": SMALL}


# op -> (its function, its tensors)
FLOWS = {
    "affine_flow": (affine_flow, {"params": SMALL.expand(B, T, -1)}),
    "flow_head": (flow_head, {"h": torch.randn(B, T, C), **HEAD, "norm_weight": torch.randn(C)}),
    "attention_flow": (attention_flow, {**{name: torch.randn(B, T, 1, C) for name in "qkv"}, **HEAD}),
}


def every_backend(*ops: str) -> pytest.MarkDecorator:
    """Parametrize by op and backend, with Triton if its interpreter runs."""
    interpreted, rows = runtime.interpreted() and runtime.unavailable() is None, []
    for op in ops:
        triton = ["triton"] if interpreted and op != "attention_flow" else []
        rows += [pytest.param(op, *backend.values, marks=backend.marks) for backend in cpu_backends(op)]
        rows += [(op, backend) for backend in triton]
    return pytest.mark.parametrize(("op", "backend"), rows)


def gradients(function, tensors, seeds, **options):
    """Return the gradients of the outputs that have a seed."""
    tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    used = [(out, seed.to(out.dtype)) for out, seed in zip(function(**tensors, **options), seeds) if seed is not None]
    outputs, seeds = zip(*used)
    return torch.autograd.grad(outputs, list(tensors.values()), seeds, materialize_grads=True)


@every_backend(*FLOWS)
@pytest.mark.parametrize("scale", ["exp", "softplus"])
@pytest.mark.parametrize("zeros", [False, True], ids=["none", "zeros"])
def test_logdet_alone_where_z_overflows(op, backend, scale, zeros):
    function, tensors = FLOWS[op]
    tensors, spec = {"x": torch.randn(B, T, D), **tensors}, AffineSpec(scale)
    seeds = torch.zeros(B, T, D) if zeros else None, torch.tensor([1.0, -0.5])
    assert function(**tensors, spec=spec)[0].isinf().any()
    exact = gradients(function, {name: t.double() for name, t in tensors.items()}, seeds, spec=spec)
    for grad, expected in zip(gradients(function, tensors, seeds, spec=spec, backend=backend), exact):
        torch.testing.assert_close(grad, expected.float(), rtol=1e-3, atol=1e-4)


@every_backend("causal_attention")
def test_log_sum_exp_alone_where_values_are_infinite(op, backend):
    if backend == "sdpa":
        pytest.skip("it has no gradient of the log-sum-exp")
    tensors = {name: torch.randn(B, T, 1, C) for name in "qkv"}
    seeds, options = (None, torch.randn(B, 1, T)), {"return_lse": True, "backend": backend}
    expected = gradients(causal_attention, tensors, seeds, **options)
    infinite = {**tensors, "v": torch.full_like(tensors["v"], torch.inf)}
    torch.testing.assert_close(gradients(causal_attention, infinite, seeds, **options), expected)


@every_backend("residual_norm")
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_sum_alone_where_it_is_infinite(op, backend, kind):
    large, weight = torch.full((B, T, C), 3e38), torch.randn(C)
    tensors, seed = {"x": large, "residual": large, "weight": weight, "bias": weight}, torch.randn(B, T, C)
    found = gradients(residual_norm, tensors, (seed, None), kind=kind, backend=backend)
    torch.testing.assert_close(found, (seed, seed, torch.zeros(C), torch.zeros(C)))
