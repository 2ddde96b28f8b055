"""A flow block over a static KV cache in plain PyTorch, with one CUDA graph per step: the peer of the sampling kernels.

A careful user without kernels of their own writes this. Everything is allocated once, and the position is on the
device. A step has the same launches for every token. The mask hides the slots that are not written yet. Torch does
the products, the norms and the attention.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F

from starflow_kernels import BlockSpec
from starflow_kernels._core.numerics import apply_rotary
from starflow_kernels.affine_flow_inverse.reference import affine_flow_inverse
from starflow_kernels.block.network import FusedOps, embed, embed_text, layers, norm, position_table, raw_params

# Torch's fused attention with a mask, or two matrix products and a softmax; the faster one depends on the shape.
Attention = Literal["fused", "products"]


def add_norm(h: torch.Tensor, update: torch.Tensor | None, w: dict, name: str, spec: BlockSpec):
    """Return sum and norm. Torch's layer norm takes narrow dtypes and adds in float32."""
    h = h if update is None else h + update
    if spec.norm != "layer_norm":
        return h, norm(h, w, name, spec)
    return h, F.layer_norm(h, h.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


class PlainDecoder:
    """Decoder from noise z to data x, both (samples, tokens, D), with the arguments of `block_inverse`.

    `copies` is 2 under guidance, else 1.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        spec: BlockSpec,
        samples: int,
        tokens: int,
        *,
        prefix: int = 0,
        copies: int = 1,
        rule: str = "tarflow",
        attention: Attention = "fused",
    ):
        self.w, self.spec, self.prefix, self.copies, self.rule = weights, spec, prefix, copies, rule
        self.attention, self.samples, self.steps = attention, samples, tokens if spec.start else tokens - 1
        like, rows = weights["proj_in.weight"], samples * copies
        state = {"dtype": torch.float64 if like.dtype == torch.float64 else torch.float32}
        slots = prefix + tokens
        self.k_cache, self.v_cache = like.new_zeros(2, spec.layers, rows, spec.kv_heads, slots, spec.head_dim)
        self.z, self.x = like.new_zeros(2, samples, tokens, spec.token_dim, **state)
        self.token = like.new_zeros(samples, 1, spec.token_dim, **state)
        self.guidance = like.new_zeros(samples, tokens, **state)
        self.cos, self.sin = like.new_zeros(2, slots, spec.head_dim // 2, **state)
        self.cond = like.new_zeros(rows, spec.channels)
        self.slots = torch.arange(slots, device=like.device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.table = position_table(weights, spec)
        self.graph = None

    def _network(self, h: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Run the layers on tokens in the slots `at`."""
        spec, seen = self.spec, self.slots <= at.unsqueeze(1)
        turned = spec.rotary != "none"
        cos, sin = (angle.index_select(0, at) if turned else None for angle in (self.cos, self.sin))
        groups = spec.heads // spec.kv_heads

        def attend(i, q, k, v):
            q, k = (apply_rotary(t, cos, sin, spec.rotary) for t in (q, k))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            keys, values = self.k_cache[i].index_copy_(2, at, k), self.v_cache[i].index_copy_(2, at, v)
            if self.attention == "fused":
                out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=groups > 1)
                return out.transpose(1, 2)
            keys, values = (t.unsqueeze(2) if groups > 1 else t for t in (keys, values))
            q = q.unflatten(1, (-1, groups)) if groups > 1 else q
            scores = (q @ keys.transpose(-1, -2) * spec.head_dim**-0.5).masked_fill(~seen, float("-inf"))
            wide = torch.promote_types(q.dtype, torch.float32)
            out = scores.softmax(-1, dtype=wide).to(q.dtype) @ values
            return (out.flatten(1, 2) if groups > 1 else out).transpose(1, 2)

        return layers(h, self.w, spec, None, lambda i: functools.partial(attend, i), fused=FusedOps(add_norm=add_norm))

    def step(self) -> None:
        """Solve one token of every sample."""
        spec, w, t = self.spec, self.w, self.slot + (0 if self.spec.start else 1)
        row = None if self.table is None else self.table.index_select(0, self.slot)
        h = self._network(embed(self.token.repeat(self.copies, 1, 1), w, self.cond, row), self.slot + self.prefix)
        weight = self.guidance.index_select(1, t) if self.copies == 2 else None
        z, (scale, clip) = self.z.index_select(1, t), (spec.affine.scale, spec.affine.soft_clip)
        self.token.copy_(affine_flow_inverse(z, raw_params(h, w, spec), weight, scale, clip, self.rule))
        self.x.index_copy_(1, t, self.token)
        self.slot += 1

    def _begin(self) -> None:
        """Fill the first slot: a learned token, or token 0, which passes unchanged."""
        self.slot.zero_()
        self.token.copy_(self.w["start"].expand_as(self.token) if self.spec.start else self.x[:, :1])

    def _capture(self) -> None:
        """Capture the step as a CUDA graph, after a few steps on a side stream, as torch asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(min(3, self.steps)):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.slot.zero_()
        with torch.cuda.graph(self.graph):
            self.step()

    @torch.no_grad()
    def __call__(self, z, *, cond=None, prefix=None, cos=None, sin=None, guidance=None, steps=None) -> torch.Tensor:
        """Return the data. With `steps`, only that many token steps run, and later tokens stay noise."""
        z = z.flip(1) if self.spec.flip else z
        self.z.copy_(z)
        self.x.copy_(z)
        if cond is not None:
            self.cond.copy_(cond)
        if cos is not None:
            self.cos.copy_(cos)
            self.sin.copy_(sin)
        if guidance is not None:
            self.guidance.copy_(torch.as_tensor(guidance))
        if z.is_cuda and self.graph is None and self.steps:
            self._begin()
            self._capture()
        if prefix is not None:
            self._network(embed_text(prefix, self.w), self.slots[: self.prefix])
        self._begin()
        for _ in range(self.steps if steps is None else steps):
            self.graph.replay() if self.graph else self.step()
        return self.x.flip(1) if self.spec.flip else self.x.clone()
