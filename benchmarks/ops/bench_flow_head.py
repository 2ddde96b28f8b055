"""flow_head, density direction and its gradient: reads the hidden states once."""

import pytest
import torch

from starflow_kernels import AffineSpec, flow_head
from starflow_kernels.flow_head.reference import flow_head as plain_flow_head

from .outputs import outputs

SPEC = AffineSpec("softplus", 4.0)
OPTIONS = (SPEC.scale, SPEC.soft_clip, True, False, "sum")
eager = lambda x, h, w, b, n: plain_flow_head(x, h, w, b, n, *OPTIONS)  # noqa: E731
RUNS = {
    "ours": lambda x, h, w, b, n: flow_head(x, h, w, b, n, SPEC, shift=True),
    "eager": eager,
    "compiled": torch.compile(eager),
}


@pytest.mark.parametrize(
    "shape", [(1, 16, 4, 64), (16, 256, 12, 128), (16, 1024, 4, 1024), (16, 1024, 48, 1024)], ids=str
)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_flow_head(name, shape, gradient, timed):
    torch.manual_seed(0)
    B, T, D, C = shape
    tensors = [torch.randn(s) for s in ((B, T, D), (B, T, C), (2 * D, C), (2 * D,), (C,))]
    tensors[2] *= 0.3 * C**-0.5

    exact = outputs(eager, [t.double() for t in tensors], gradient)
    plain = outputs(eager, [t.clone() for t in tensors], gradient)
    passes = 3 if gradient else 1
    elements = passes * sum(t.numel() for t in tensors) + tensors[0].numel()
    timed(
        lambda: outputs(RUNS[name], tensors, gradient),
        exact,
        plain,
        bytes=4 * elements,
        flops=passes * 4 * B * T * C * D,
        own=name == "ours",
    )
