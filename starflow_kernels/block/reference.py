"""A whole flow block, both directions: the specification in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..affine_flow.reference import accumulation_dtype
from ..affine_flow_inverse.reference import affine_flow_inverse
from ..cached_attention.reference import cached_attention
from ..causal_attention.reference import causal_attention
from ..flow_head.reference import flow_head, rms_norm
from ..spec import BlockSpec
from .progress import report

Weights = dict[str, torch.Tensor]


def project(x: torch.Tensor, w: Weights, name: str, linear: Callable = F.linear) -> torch.Tensor:
    return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(x: torch.Tensor, w: Weights, name: str, spec: BlockSpec) -> torch.Tensor:
    if spec.norm == "none":
        return x
    if spec.norm == "rms_norm":
        return rms_norm(x, w[f"{name}.weight"])
    wide = accumulation_dtype(x.dtype)
    weight, bias = w[f"{name}.weight"].to(wide), w[f"{name}.bias"].to(wide)
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias).to(x.dtype)


def add_norm(
    h: torch.Tensor, update: torch.Tensor | None, w: Weights, name: str, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """h with the update of the layer before, and its norm."""
    h = h if update is None else h + update
    return h, norm(h, w, name, spec)


def up_gelu(x: torch.Tensor, w: Weights, name: str, linear: Callable) -> torch.Tensor:
    return F.gelu(project(x, w, name, linear))


class Glue(NamedTuple):
    """What stands between the products of a layer."""

    add_norm: Callable = add_norm
    up_gelu: Callable = up_gelu


def mlp(
    x: torch.Tensor, w: Weights, layer: str, spec: BlockSpec, linear: Callable, up_gelu: Callable = up_gelu
) -> torch.Tensor:
    if spec.mlp == "gelu":
        hidden = up_gelu(x, w, f"{layer}.up", linear)
    else:
        hidden = project(x, w, f"{layer}.up", linear)
        hidden = F.gelu(project(x, w, f"{layer}.gate", linear), approximate="tanh") * hidden
    return project(hidden, w, f"{layer}.down", linear)


def embed(
    tokens: torch.Tensor,
    w: Weights,
    cond: torch.Tensor | None,
    position: torch.Tensor | None,
    linear: Callable = F.linear,
) -> torch.Tensor:
    """Input projection, learned positions, and the condition added to every token."""
    h = project(tokens.to(w["proj_in.weight"].dtype), w, "proj_in", linear)
    if position is not None:
        h = h + position
    return h if cond is None else h + cond.to(h.dtype).unsqueeze(1)


def positions(w: Weights, spec: BlockSpec) -> torch.Tensor | None:
    """The learned position table in the block's own order."""
    if not spec.positions:
        return None
    return w["pos_embed"].flip(0) if spec.flip else w["pos_embed"]


def network(
    h: torch.Tensor,
    w: Weights,
    spec: BlockSpec,
    attention: Callable,
    linear: Callable = F.linear,
    dropout: float = 0.0,
    glue: Glue = Glue(),
) -> torch.Tensor:
    """The causal transformer on (B, n, C); attention(layer, q, k, v) decides what the n tokens see.

    dropout: probability with which elements of a residual branch vanish in training.
    """
    groups, y = [spec.heads, spec.kv_heads, spec.kv_heads], None
    for i in range(spec.layers):
        layer = f"layers.{i}"
        h, normed = glue.add_norm(h, y, w, f"{layer}.attn_norm", spec)
        qkv = project(normed, w, f"{layer}.qkv", linear)
        q, k, v = qkv.unflatten(-1, (sum(groups), spec.head_dim)).split(groups, dim=-2)
        if spec.qk_norm:
            q, k = rms_norm(q, w[f"{layer}.q_norm.weight"]), rms_norm(k, w[f"{layer}.k_norm.weight"])
        y = project(attention(i, q, k, v).flatten(-2), w, f"{layer}.proj", linear)
        y = rms_norm(y, w[f"{layer}.attn_post_norm.weight"]) if spec.post_norm else y
        y = F.dropout(y, dropout) if dropout else y
        h, normed = glue.add_norm(h, y, w, f"{layer}.mlp_norm", spec)
        y = mlp(normed, w, layer, spec, linear, glue.up_gelu)
        y = rms_norm(y, w[f"{layer}.mlp_post_norm.weight"]) if spec.post_norm else y
        y = F.dropout(y, dropout) if dropout else y
    return h + y


def compose(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    spec: BlockSpec,
    logdet: str,
    *,
    attention: Callable = causal_attention,
    head: Callable = flow_head,
    linear: Callable = F.linear,
    dropout: float = 0.0,
    glue: Glue = Glue(),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and log-determinant of data, all tokens at once, from the parts of a network."""
    w = dict(zip(spec.weight_shapes, weights))
    tokens = x.flip(1) if spec.flip else x
    if spec.start:
        first = w["start"].to(x.dtype).expand(x.shape[0], 1, -1)
        tokens = torch.cat([first, tokens[:, :-1]], dim=1)
    h = embed(tokens, w, cond, positions(w, spec), linear)
    if prefix is not None:
        text = project(prefix.to(w["proj_text.weight"].dtype), w, "proj_text", linear)
        h = torch.cat([text, h], dim=1)

    def attend(i, q, k, v):
        return attention(q, k, v, cos, sin, spec.rotary, 0, 1.0)[0]

    h = network(h, w, spec, attend, linear, dropout, glue)
    return head(
        x,
        h[:, h.shape[1] - x.shape[1] :],
        w["proj_out.weight"],
        w["proj_out.bias"],
        w.get("final_norm.weight"),
        spec.affine.scale,
        spec.affine.soft_clip,
        not spec.start,
        spec.flip,
        logdet,
    )


def block_forward(x, weights, cond, prefix, cos, sin, spec: str, logdet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as an op, whose spec is text."""
    return compose(x, weights, cond, prefix, cos, sin, BlockSpec.from_json(spec), logdet)


class CachedNetwork:
    """The network of the sampling direction over a preallocated KV cache; guided rows are one batch of 2B."""

    def __init__(self, z, weights, cond, prefix, cos, sin, guidance, spec: str, temperature: float):
        self.spec = BlockSpec.from_json(spec)
        self.w = dict(zip(self.spec.weight_shapes, weights))
        self.B, T, _ = z.shape
        self.copies = 1 if guidance is None else 2
        self.cond, self.cos, self.sin = cond, cos, sin
        self.rows, self.L = self.B * self.copies, 0 if prefix is None else prefix.shape[1]
        cache_shape = (self.spec.layers, self.rows, self.L + T, self.spec.kv_heads, self.spec.head_dim)
        self.k_cache, self.v_cache = self.w["proj_in.weight"].new_zeros((2, *cache_shape))
        # Dividing the queries divides the scores: only the rows without a condition are tempered.
        self.tempering = torch.ones(self.rows, 1, 1, 1, dtype=self.k_cache.dtype, device=z.device)
        self.tempering[self.B :] /= temperature
        self.positions = positions(self.w, self.spec)
        if prefix is not None:
            self._step(project(prefix.to(self.w["proj_text.weight"].dtype), self.w, "proj_text"), 0)

    def _step(self, h: torch.Tensor, start: int) -> torch.Tensor:
        lengths = torch.full((self.rows,), start, dtype=torch.int32, device=h.device)

        def attention(i, q, k, v):
            cache = self.k_cache[i], self.v_cache[i], lengths, self.cos, self.sin
            return cached_attention(q * self.tempering, k, v, *cache, self.spec.rotary, 0, 1.0)

        return network(h, self.w, self.spec, attention)

    def params(self, x: torch.Tensor, first: int, count: int = 1) -> torch.Tensor:
        """Raw parameters (copies B, count, P) of the tokens from `first` on, in the block's own order; x (B, T, D) are
        its tokens so far. Keys and values of all tokens before those that these see must be in the cache."""
        slot = first if self.spec.start else first - 1
        tokens = x[:, max(first - 1, 0) : first + count - 1]
        if first == 0:
            tokens = torch.cat([self.w["start"].to(x.dtype).expand(self.B, 1, -1), tokens], dim=1)
        position = None if self.positions is None else self.positions[slot : slot + count]
        h = self._step(embed(tokens.repeat(self.copies, 1, 1), self.w, self.cond, position), self.L + slot)
        if self.spec.final_norm:
            h = rms_norm(h, self.w["final_norm.weight"])
        return project(h, self.w, "proj_out")


def block_inverse(
    z: torch.Tensor,
    weights: list[torch.Tensor],
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    guidance: torch.Tensor | None,
    spec: str,
    rule: str,
    temperature: float,
) -> torch.Tensor:
    """Data of noise, token after token."""
    network = CachedNetwork(z, weights, cond, prefix, cos, sin, guidance, spec, temperature)
    spec, (B, T, _) = network.spec, z.shape
    x = z.flip(1) if spec.flip else z.clone()
    for t in range(0 if spec.start else 1, T):
        x[:, t : t + 1] = affine_flow_inverse(
            x[:, t : t + 1],
            network.params(x, t),
            None if guidance is None else guidance[:, t : t + 1],
            spec.affine.scale,
            spec.affine.soft_clip,
            rule,
        )
        report(B * (t + 1), B * T)
    return x.flip(1) if spec.flip else x
