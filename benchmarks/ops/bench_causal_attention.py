"""causal_attention with rotary positions, density direction and its gradient."""

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import backends, causal_attention
from starflow_kernels._core.numerics import apply_rotary

from .outputs import outputs


def separate(q, k, v, cos, sin):
    """Rotate, then run torch's fused attention."""
    q, k = (apply_rotary(t, cos, sin, "interleaved") for t in (q, k))
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def ours(backend):
    """Run our op on a backend."""
    return lambda q, k, v, cos, sin: causal_attention(q, k, v, cos=cos, sin=sin, rotary="interleaved", backend=backend)


RUNS = {
    "separate": separate,
    **{name: ours(name) for name, state in backends()["causal_attention"].items() if state == "available"},
}


@pytest.mark.parametrize("shape", [(64, 16, 4, 16), (16, 256, 2, 64), (2, 1152, 12, 64)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "forward+backward"])
def bench_causal_attention(name, shape, gradient, timed):
    torch.manual_seed(0)
    B, T, H, d = shape
    tensors, angle = [torch.randn(shape) for _ in range(3)], torch.randn(T, d // 2)

    def rotated(function):
        def run(*tensors):
            cos, sin = (t.to(tensors[0].dtype) for t in (angle.cos(), angle.sin()))
            return function(*tensors, cos, sin)

        return run

    exact = outputs(rotated(separate), [t.double() for t in tensors], gradient)
    plain = outputs(rotated(separate), [t.clone() for t in tensors], gradient)
    flops = 2 * B * H * T * T * d * (3.5 if gradient else 1)
    timed(
        lambda: outputs(rotated(RUNS[name]), tensors, gradient),
        exact,
        plain,
        bytes=4 * 4 * tensors[0].numel(),
        flops=int(flops),
        own=name != "separate",
    )
