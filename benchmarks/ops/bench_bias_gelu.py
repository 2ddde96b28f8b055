"""bias_gelu, forward and backward: bound by memory."""

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import bias_gelu

from .outputs import outputs


def eager(x, bias):
    return F.gelu(x + bias)


RUNS = {"ours": bias_gelu, "eager": eager, "compiled": torch.compile(eager)}


@pytest.mark.parametrize("shape", [(8, 16, 64), (16, 256, 512), (2, 1024, 3072)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_bias_gelu(name, shape, gradient, timed):
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in (shape, shape[2:])]

    timed(
        lambda: outputs(RUNS[name], tensors, gradient),
        outputs(eager, [t.double() for t in tensors], gradient),
        outputs(eager, [t.clone() for t in tensors], gradient),
        bytes=4 * tensors[0].numel() * (5 if gradient else 2),
        own=name == "ours",
    )
