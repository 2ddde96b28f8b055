"""A flow block over a preallocated KV cache in plain PyTorch on the CPU: the strongest peer of the sampling kernels.

A careful user without kernels of their own writes this: each step reads only the filled part of the cache, so that no
mask is needed, and torch does the products, the norms and the attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from starflow_kernels import BlockSpec
from starflow_kernels.affine_flow_inverse.reference import affine_flow_inverse
from starflow_kernels.block.network import FusedOps, embed, layers, position_table, raw_params

from .static_cache import add_norm


@torch.no_grad()
def sliced_inverse(
    z: torch.Tensor, w: dict[str, torch.Tensor], spec: BlockSpec, cond: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the data x (B, T, D) of noise z for a TarFlow block without a learned first token."""
    x = (z.flip(1) if spec.flip else z).clone()
    B, T, _ = x.shape
    k_cache, v_cache = w["proj_in.weight"].new_empty(2, spec.layers, B, spec.kv_heads, T, spec.head_dim)
    table = position_table(w, spec)
    for t in range(T - 1):

        def attend(i, q, k, v, t=t):
            k_cache[i, :, :, t], v_cache[i, :, :, t] = k[:, 0], v[:, 0]
            keys, values = k_cache[i, :, :, : t + 1], v_cache[i, :, :, : t + 1]
            return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)

        h = embed(x[:, t : t + 1], w, cond, table[t : t + 1])
        params = raw_params(layers(h, w, spec, None, attend, fused=FusedOps(add_norm=add_norm)), w, spec)
        z_next = x[:, t + 1 : t + 2]
        x[:, t + 1 : t + 2] = affine_flow_inverse(
            z_next, params, None, spec.affine.scale, spec.affine.soft_clip, "tarflow"
        )
    return x.flip(1) if spec.flip else x
