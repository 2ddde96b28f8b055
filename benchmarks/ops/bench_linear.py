"""linear, forward and backward: the products of a flow block in training, bound by multiply-adds."""

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import backends, linear

from .outputs import outputs

RUNS = {
    "eager": F.linear,
    **{name: lambda x, w, b, backend=name: linear(x, w, b, backend=backend) for name in backends()["linear"]},
}


@pytest.mark.parametrize("shape", [(8, 16, 64, 256), (16, 256, 128, 512), (2, 1024, 768, 3072)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_linear(name, shape, gradient, timed):
    torch.manual_seed(0)
    B, T, inner, outer = shape
    tensors = [torch.randn(B, T, inner), torch.randn(outer, inner) * inner**-0.5, torch.randn(outer)]

    passes = 3 if gradient else 1
    timed(
        lambda: outputs(RUNS[name], tensors, gradient),
        outputs(F.linear, [t.double() for t in tensors], gradient),
        outputs(F.linear, [t.clone() for t in tensors], gradient),
        bytes=4 * passes * (sum(t.numel() for t in tensors) + B * T * outer),
        flops=passes * 2 * B * T * inner * outer,
        own=name != "eager",
    )
