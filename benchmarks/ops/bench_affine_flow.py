"""affine_flow, density direction and its gradient: memory-bound."""

import pytest
import torch

from starflow_kernels import AffineSpec, affine_flow
from starflow_kernels.affine_flow.reference import affine_flow as plain_affine_flow

SPEC = AffineSpec("softplus", 4.0)
OPTIONS = (SPEC.scale, SPEC.soft_clip, True, True, "sum")
eager = lambda x, params: plain_affine_flow(x, params, *OPTIONS)  # noqa: E731
RUNS = {
    "ours": lambda x, params: affine_flow(x, params, SPEC, shift=True, flip=True),
    "eager": eager,
    "compiled": torch.compile(eager),
}


@pytest.mark.parametrize("shape", [(1, 16, 4), (64, 256, 12), (256, 1024, 48)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_affine_flow(name, shape, gradient, timed):
    torch.manual_seed(0)
    B, T, D = shape
    x, params = torch.randn(B, T, D), torch.randn(B, T, 2 * D)

    def outputs(function, x, params):
        if not gradient:
            with torch.no_grad():
                return function(x, params)
        x, params = x.requires_grad_(), params.requires_grad_()
        z, logdet = function(x, params)
        return torch.autograd.grad((z, logdet), (x, params), (torch.ones_like(z), torch.ones_like(logdet)))

    exact, plain = outputs(eager, x.double(), params.double()), outputs(eager, x.clone(), params.clone())
    elements = (4 if not gradient else 4 + 3 + 1 + 3) * x.numel()
    timed(lambda: outputs(RUNS[name], x, params), exact, plain, bytes=4 * elements, own=name == "ours")
