"""residual_norm with a LayerNorm, forward and backward: bound by memory."""

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import residual_norm

from .outputs import outputs


def eager(x, update, weight, bias):
    return x + update, F.layer_norm(x + update, x.shape[2:], weight, bias)


RUNS = {"ours": residual_norm, "eager": eager, "compiled": torch.compile(eager)}


@pytest.mark.parametrize("shape", [(8, 16, 64), (16, 256, 512), (2, 1024, 3072)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_residual_norm(name, shape, gradient, timed):
    torch.manual_seed(0)
    tensors = [torch.randn(s) for s in (shape, shape, shape[2:], shape[2:])]

    timed(
        lambda: outputs(RUNS[name], tensors, gradient),
        outputs(eager, [t.double() for t in tensors], gradient),
        outputs(eager, [t.clone() for t in tensors], gradient),
        bytes=4 * tensors[0].numel() * (8 if gradient else 4),
        own=name == "ours",
    )
