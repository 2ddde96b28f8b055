"""cached_attention, a step of sampling: bound by reading the cache."""

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import backends, cached_attention
from starflow_kernels._core.numerics import apply_rotary


def separate(q, k, v, k_cache, v_cache, cos, sin):
    """Rotate and append, then run torch's attention over the cache, which the new token fills."""
    length = k_cache.shape[1] - 1
    q, k = (apply_rotary(t, cos[length:], sin[length:], "interleaved") for t in (q, k))
    k_cache[:, length:], v_cache[:, length:] = k, v
    heads_first = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


def ours(backend):
    """Run our op on a backend."""

    def run(q, k, v, k_cache, v_cache, cos, sin):
        length = k_cache.shape[1] - 1
        options = {"cos": cos, "sin": sin, "rotary": "interleaved", "backend": backend}
        return cached_attention(q, k, v, k_cache, v_cache, length, **options)

    return run


RUNS = {"separate": separate, **{name: ours(name) for name in backends()["cached_attention"]}}


@pytest.mark.parametrize(
    "shape", [(1, 256, 12, 12, 64), (64, 256, 4, 4, 16), (16, 1024, 12, 12, 64), (4, 4096, 16, 4, 64)], ids=str
)
@pytest.mark.parametrize("name", RUNS)
def bench_cached_attention(name, shape, timed):
    torch.manual_seed(0)
    B, S, H, H_kv, d = shape
    caches, angle = [torch.randn(B, S, H_kv, d) for _ in range(2)], torch.randn(S, d // 2)
    tensors = [torch.randn(B, 1, heads, d) for heads in (H, H_kv, H_kv)] + caches + [angle.cos(), angle.sin()]
    exact, plain = separate(*(t.double() for t in tensors)), separate(*tensors)
    timed(
        lambda: (RUNS[name](*tensors),),
        (exact,),
        (plain,),
        bytes=2 * 4 * caches[0].numel(),
        flops=4 * B * S * H * d,
        own=name != "separate",
    )
