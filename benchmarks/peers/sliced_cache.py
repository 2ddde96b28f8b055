"""A flow block over a preallocated KV cache in plain PyTorch on the CPU: what a careful user without kernels writes.

Each step reads only the filled part of the cache, so that no mask is needed, and torch does the products, the norms and
the attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from starflow_kernels import BlockSpec
from starflow_kernels.affine_flow_inverse.reference import affine_flow_inverse
from starflow_kernels.block.network import FusedOps, embed, layers, position_table, raw_params

from .static_cache import add_norm


def step(
    token: torch.Tensor,
    z: torch.Tensor,
    position: torch.Tensor,
    cache: torch.Tensor,
    w: dict[str, torch.Tensor],
    spec: BlockSpec,
    cond: torch.Tensor | None,
) -> torch.Tensor:
    """Return the token after `token` (B, 1, D); keys and values of `token` go into the last slot of the cache.

    Args:
        token: (B, 1, D) data.
        z: (B, 1, D) noise of the next token.
        position: (1, C) learned position.
        cache: (2, layers, B, heads, slots so far, head_dim) keys and values.
        w: weights by name.
        spec: the block.
        cond: (B, C) condition.
    """

    def attend(i, q, k, v):
        cache[0, i, :, :, -1], cache[1, i, :, :, -1] = k[:, 0], v[:, 0]
        return F.scaled_dot_product_attention(q.transpose(1, 2), cache[0, i], cache[1, i]).transpose(1, 2)

    h = layers(
        embed(token, w, cond, position),
        w,
        spec,
        None,
        lambda i: functools.partial(attend, i),
        fused=FusedOps(add_norm=add_norm),
    )
    return affine_flow_inverse(z, raw_params(h, w, spec), None, spec.affine.scale, spec.affine.soft_clip, "tarflow")


@torch.no_grad()
def sliced_inverse(
    z: torch.Tensor,
    w: dict[str, torch.Tensor],
    spec: BlockSpec,
    cond: torch.Tensor | None = None,
    step: Callable = step,
) -> torch.Tensor:
    """Return the data x (B, T, D) of noise z for a TarFlow block without a learned first token."""
    x = (z.flip(1) if spec.flip else z).clone()
    B, T, _ = x.shape
    cache = w["proj_in.weight"].new_empty(2, spec.layers, B, spec.kv_heads, T, spec.head_dim)
    table, own_order = position_table(w, spec), dataclasses.replace(spec, flip=False)
    for t in range(T - 1):
        tokens = x[:, t : t + 1], x[:, t + 1 : t + 2]
        x[:, t + 1 : t + 2] = step(*tokens, table[t : t + 1], cache[..., : t + 1, :], w, own_order, cond)
    return x.flip(1) if spec.flip else x


def compiled_inverse() -> Callable:
    """Return `sliced_inverse` with its step under torch.compile, with compiled code of its own."""
    compiled = torch.compile(step)

    def contiguous_step(token, z, position, *rest):
        # Slices at other offsets would be compiled again.
        return compiled(token.clone(), z.clone(), position.clone(), *rest)

    return functools.partial(sliced_inverse, step=contiguous_step)
