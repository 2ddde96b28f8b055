"""affine_flow, density direction and its gradient: memory-bound."""

import pytest
import torch

from starflow_kernels import AffineSpec, affine_flow
from starflow_kernels.affine_flow.reference import affine_flow as plain_affine_flow

from .outputs import outputs

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
    tensors = [torch.randn(B, T, D), torch.randn(B, T, 2 * D)]

    elements = (4 if not gradient else 4 + 3 + 1 + 3) * tensors[0].numel()
    timed(
        lambda: outputs(RUNS[name], tensors, gradient),
        outputs(eager, [t.double() for t in tensors], gradient),
        outputs(eager, [t.clone() for t in tensors], gradient),
        bytes=4 * elements,
        own=name == "ours",
    )
