"""attention_flow, density direction and its gradient: attention, projection and transform in one op."""

import pytest
import torch

from starflow_kernels import AffineSpec, attention_flow
from starflow_kernels.attention_flow.reference import attention_flow as plain_attention_flow

from .outputs import outputs

SPEC = AffineSpec("softplus", 4.0)
OPTIONS = ("none", 0, 1.0, SPEC.scale, SPEC.soft_clip, True, False, "sum")
eager = lambda x, q, k, v, w, b: plain_attention_flow(x, q, k, v, w, b, None, None, *OPTIONS)[:2]  # noqa: E731
RUNS = {
    "ours": lambda x, q, k, v, w, b: attention_flow(x, q, k, v, w, b, SPEC, shift=True),
    "eager": eager,
    "compiled": torch.compile(eager),
}


@pytest.mark.parametrize("shape", [(64, 16, 4, 4, 16), (16, 256, 12, 2, 64), (2, 1024, 48, 12, 64)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_attention_flow(name, shape, gradient, timed):
    torch.manual_seed(0)
    B, T, D, H, d = shape
    tensors = [torch.randn(s) for s in ((B, T, D), *[(B, T, H, d)] * 3, (2 * D, H * d), (2 * D,))]
    tensors[4] *= 0.3 * (H * d) ** -0.5

    passes = 3 if gradient else 1
    timed(
        lambda: outputs(RUNS[name], tensors, gradient),
        outputs(eager, [t.double() for t in tensors], gradient),
        outputs(eager, [t.clone() for t in tensors], gradient),
        bytes=4 * passes * (sum(t.numel() for t in tensors) + tensors[0].numel()),
        flops=passes * B * T * H * d * (2 * T + 4 * D),
        own=name == "ours",
    )
