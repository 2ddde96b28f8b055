"""bias_gelu, forward and backward: bound by memory."""

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import bias_gelu


def eager(x, bias):
    return (F.gelu(x + bias),)


RUNS = {"ours": lambda x, bias: (bias_gelu(x, bias),), "eager": eager, "compiled": torch.compile(eager)}


@pytest.mark.parametrize("shape", [(8, 16, 64), (16, 256, 512), (2, 1024, 3072)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_bias_gelu(name, shape, gradient, timed):
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in (shape, shape[2:])]

    def outputs(function, tensors):
        if not gradient:
            with torch.no_grad():
                return function(*tensors)
        tensors = [t.requires_grad_() for t in tensors]
        found = function(*tensors)
        return torch.autograd.grad(found, tensors, [torch.ones_like(t) for t in found])

    timed(
        lambda: outputs(RUNS[name], tensors),
        outputs(eager, [t.double() for t in tensors]),
        outputs(eager, [t.clone() for t in tensors]),
        bytes=4 * tensors[0].numel() * (5 if gradient else 2),
        own=name == "ours",
    )
