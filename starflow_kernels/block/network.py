"""The causal transformer of TarFlow (arXiv 2412.06329) and STARFlow (arXiv 2506.06276) in plain PyTorch.

The functions come in the order in which they run: `embed` maps tokens to hidden states, `layers` applies the
transformer layers, and the head `raw_params` maps each hidden state to the raw parameters [a | b] of a token. At the
end are two ways to run the network. `hidden_states` and `compose` run it on all tokens at once, with gradients.
`CachedNetwork` runs it on the next tokens over a KV cache. Operations are arguments, so that the same code runs on
torch or on the ops of this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .._core.numerics import layer_norm, rms_norm
from ..cached_attention.reference import cached_attention
from ..causal_attention.reference import causal_attention
from ..flow_head.reference import flow_head
from ..spec import BlockSpec

Weights = dict[str, torch.Tensor]


def project(x: torch.Tensor, w: Weights, name: str, linear: Callable = F.linear) -> torch.Tensor:
    """Apply the linear layer `name`."""
    return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(x: torch.Tensor, w: Weights, name: str, spec: BlockSpec) -> torch.Tensor:
    """Apply the norm `name`."""
    if spec.norm == "none":
        return x
    if spec.norm == "rms_norm":
        return rms_norm(x, w[f"{name}.weight"])
    return layer_norm(x, w[f"{name}.weight"], w[f"{name}.bias"])


def add_norm(
    h: torch.Tensor, residual: torch.Tensor | None, w: Weights, name: str, spec: BlockSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h + residual and the norm `name` of the sum."""
    h = h if residual is None else h + residual
    return h, norm(h, w, name, spec)


def up_gelu(x: torch.Tensor, w: Weights, name: str, linear: Callable) -> torch.Tensor:
    """Apply the linear layer `name` and the exact GELU."""
    return F.gelu(project(x, w, name, linear))


def unchanged(x: torch.Tensor) -> torch.Tensor:
    """Return x."""
    return x


class FusedOps(NamedTuple):
    """Operations that a backend may fuse: those between the matrix products of a layer, or all layers.

    layers: layers(h, w, spec, cos, sin, dropout, run_layer) in place of `layers`, or None.
    """

    add_norm: Callable = add_norm
    up_gelu: Callable = up_gelu
    layers: Callable | None = None


def position_table(w: Weights, spec: BlockSpec) -> torch.Tensor | None:
    """Return the learned positions (T, C) in the block's own order, or None."""
    if not spec.positions:
        return None
    return w["pos_embed"].flip(0) if spec.flip else w["pos_embed"]


def embed(
    tokens: torch.Tensor,
    w: Weights,
    cond: torch.Tensor | None,
    position: torch.Tensor | None,
    linear: Callable = F.linear,
) -> torch.Tensor:
    """Map tokens (B, n, D) to hidden states (B, n, C), adding positions and the condition (B, C) or (B, n, C)."""
    h = project(tokens.to(w["proj_in.weight"].dtype), w, "proj_in", linear)
    if position is not None:
        h = h + position
    if cond is None:
        return h
    # The further channels of an adaptive block's condition are modulations.
    cond = cond[..., : h.shape[-1]]
    return h + (cond if cond.ndim == 3 else cond.unsqueeze(1)).to(h.dtype)


def embed_text(prefix: torch.Tensor, w: Weights, linear: Callable = F.linear) -> torch.Tensor:
    """Map text states (B, L, text_dim) to hidden states (B, L, C)."""
    return project(prefix.to(w["proj_text.weight"].dtype), w, "proj_text", linear)


def mlp(x: torch.Tensor, w: Weights, prefix: str, spec: BlockSpec, linear: Callable, up_gelu: Callable) -> torch.Tensor:
    """Apply the MLP of a layer: GELU, or the gated "swiglu" with the tanh approximation of GELU."""
    if spec.mlp == "gelu":
        hidden = up_gelu(x, w, f"{prefix}up", linear)
    else:
        hidden = project(x, w, f"{prefix}up", linear)
        hidden = F.gelu(project(x, w, f"{prefix}gate", linear), approximate="tanh") * hidden
    return project(hidden, w, f"{prefix}down", linear)


class RunLayer(Protocol):
    """Call of a layer in place of layer(weights, *states), for instance within a module that holds its weights.

    Args:
        number: number of the layer in its block.
        layer: maps the weights of the layer, by names such as qkv.weight, and states to the next states.
        states: hidden states (B, n, C), and the residual (B, n, C) that is still to be added, or None.
    """

    def __call__(self, number: int, layer: Callable[..., Any], *states: Any) -> Any:
        """Return the next states."""


def layers(
    h: torch.Tensor,
    w: Weights,
    spec: BlockSpec,
    cond: torch.Tensor | None,
    attention: Callable,
    linear: Callable = F.linear,
    drop: Callable = unchanged,
    fused: FusedOps = FusedOps(),
    run_layer: RunLayer | None = None,
) -> torch.Tensor:
    """Apply the transformer layers to hidden states (B, n, C).

    Args:
        h: hidden states.
        w: weights by name.
        spec: the block.
        cond: condition (B, cond_dim) or (B, n, cond_dim), whose modulations an adaptive block uses.
        attention: attention(i) maps (q, k, v) of layer i, each (B, n, heads, head_dim), to (B, n, heads, head_dim).
        linear: linear layer (x, weight, bias).
        drop: dropout of a residual branch.
        fused: operations between the matrix products.
        run_layer: calls each layer with its weights, which `w` then lacks.
    """
    residual = None
    modulations = adaptive_branches(cond, h, spec)
    for i in range(spec.layers):
        modulation = modulations[i] if spec.adaptive else None
        layer = functools.partial(
            _layer, spec=spec, modulation=modulation, attention=attention(i), linear=linear, drop=drop, fused=fused
        )
        h, residual = layer(w, h, residual, f"layers.{i}.") if run_layer is None else run_layer(i, layer, h, residual)
    return h + residual


def _layer(
    w: Weights,
    h: torch.Tensor,
    residual: torch.Tensor | None,
    prefix: str = "",
    *,
    spec: BlockSpec,
    modulation: torch.Tensor | None,
    attention: Callable,
    linear: Callable,
    drop: Callable,
    fused: FusedOps,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a layer, whose names in `w` begin with the prefix, to h + residual; return hidden states and a residual."""
    groups, outer = [spec.heads, spec.kv_heads, spec.kv_heads], h
    if modulation is not None:
        outer = h if residual is None else h + residual
        h, residual = modulate(outer, modulation[0]), None
    h, normed = fused.add_norm(h, residual, w, f"{prefix}attn_norm", spec)
    qkv = project(normed, w, f"{prefix}qkv", linear)
    q, k, v = qkv.unflatten(-1, (sum(groups), spec.head_dim)).split(groups, dim=-2)
    if spec.qk_norm:
        q, k = rms_norm(q, w[f"{prefix}q_norm.weight"]), rms_norm(k, w[f"{prefix}k_norm.weight"])
    if spec.qk_layer_norm:
        q, k = all_heads_norm(q, w, f"{prefix}q_norm"), all_heads_norm(k, w, f"{prefix}k_norm")
    residual = project(attention(q, k, v).flatten(-2), w, f"{prefix}proj", linear)
    residual = rms_norm(residual, w[f"{prefix}attn_post_norm.weight"]) if spec.post_norm else residual
    residual = drop(residual)
    h, normed = fused.add_norm(h, residual, w, f"{prefix}mlp_norm", spec)
    residual = mlp(normed, w, prefix, spec, linear, fused.up_gelu)
    residual = rms_norm(residual, w[f"{prefix}mlp_post_norm.weight"]) if spec.post_norm else residual
    residual = drop(residual)
    if modulation is not None:
        h, residual = outer, modulation[0, 2] * (h + residual)
    if spec.transition_dim:
        h = h + residual
        x = modulate(h, modulation[1])
        hidden = F.silu(project(x, w, f"{prefix}transition.gate", linear))
        hidden = hidden * project(x, w, f"{prefix}transition.up", linear)
        residual = modulation[1, 2] * project(hidden, w, f"{prefix}transition.down", linear)
    return h, residual


def adaptive_branches(cond: torch.Tensor | None, h: torch.Tensor, spec: BlockSpec) -> torch.Tensor:
    """Return scale, shift and gate of each branch (layers, branches, 3, B, n or 1, C); empty without branches."""
    if cond is None or not spec.adaptive:
        return h.new_empty(0)
    cond = (cond if cond.ndim == 3 else cond.unsqueeze(1))[..., spec.channels :].to(h.dtype)
    return cond.unflatten(-1, (3, spec.layers, spec.branches, spec.channels)).permute(3, 4, 2, 0, 1, 5)


def modulate(h: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
    """Return the LayerNorm of h (B, n, C) times the scale, plus the shift."""
    scale, shift, _ = modulation
    one, zero = h.new_ones(h.shape[-1]), h.new_zeros(h.shape[-1])
    return layer_norm(h, one, zero) * scale + shift


def all_heads_norm(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """Apply a LayerNorm to all heads of x (B, n, heads, head_dim) together."""
    return layer_norm(x.flatten(-2), w[f"{name}.weight"], w[f"{name}.bias"]).view_as(x)


def raw_params(h: torch.Tensor, w: Weights, spec: BlockSpec, linear: Callable = F.linear) -> torch.Tensor:
    """Map hidden states (B, n, C) to raw parameters (B, n, P): final norm and output projection."""
    return project(rms_norm(h, w["final_norm.weight"]) if spec.final_norm else h, w, "proj_out", linear)


def hidden_states(
    x: torch.Tensor,
    w: Weights,
    spec: BlockSpec,
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    *,
    attention: Callable = causal_attention,
    linear: Callable = F.linear,
    dropout: float = 0.0,
    fused: FusedOps = FusedOps(),
    run_layer: RunLayer | None = None,
) -> torch.Tensor:
    """Run the transformer on all tokens of data x (B, T, D); return states (B, T, C) in the block's own order.

    State t depends on the tokens before t if spec.start, else on the tokens up to t.
    """
    tokens = x.flip(1) if spec.flip else x
    if spec.start:
        first = w["start"].to(x.dtype).expand(x.shape[0], 1, -1)
        tokens = torch.cat([first, tokens[:, :-1]], dim=1)
    h = embed(tokens, w, cond, position_table(w, spec), linear)
    if prefix is not None:
        h = torch.cat([embed_text(prefix, w, linear), h], dim=1)

    def attend(q, k, v):
        return attention(q, k, v, cos, sin, spec.rotary, 0, 1.0)[0]

    if fused.layers:
        h = fused.layers(h, w, spec, cos, sin, dropout, run_layer)
    else:
        drop = functools.partial(F.dropout, p=dropout) if dropout else unchanged
        h = layers(h, w, spec, cond, lambda i: attend, linear, drop, fused, run_layer)
    return h[:, h.shape[1] - x.shape[1] :]


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
    head: Callable = flow_head,
    **operations,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise and log-determinant of data; `operations` are the keyword arguments of `hidden_states`."""
    w = dict(zip(spec.weight_shapes, weights))
    return head(
        x,
        hidden_states(x, w, spec, cond, prefix, cos, sin, **operations),
        w["proj_out.weight"],
        w["proj_out.bias"],
        w.get("final_norm.weight"),
        spec.affine.scale,
        spec.affine.soft_clip,
        not spec.start,
        spec.flip,
        logdet,
    )


class CachedNetwork:
    """The transformer over a preallocated KV cache; under guidance both branches run as one batch of 2B rows."""

    def __init__(
        self, z, weights, cond, prefix, cos, sin, guidance, spec_json: str, temperature: float,
        linear: Callable = F.linear,
    ):  # fmt: skip
        self.spec, self.linear = BlockSpec.from_json(spec_json), linear
        self.w = dict(zip(self.spec.weight_shapes, weights))
        self.B, T, _ = z.shape
        self.branches = 1 if guidance is None else 2
        self.cond, self.cos, self.sin = cond, cos, sin
        self.rows, self.L = self.B * self.branches, 0 if prefix is None else prefix.shape[1]
        cache_shape = (self.spec.layers, self.rows, self.L + T, self.spec.kv_heads, self.spec.head_dim)
        self.k_cache, self.v_cache = self.w["proj_in.weight"].new_zeros((2, *cache_shape))
        # Dividing the queries divides the scores. The temperature acts only on the rows without a condition.
        self.query_scale = torch.ones(self.rows, 1, 1, 1, dtype=self.k_cache.dtype, device=z.device)
        self.query_scale[self.B :] /= temperature
        self.positions = position_table(self.w, self.spec)
        if prefix is not None:
            self._step(embed_text(prefix, self.w, linear), 0, None)

    def _step(self, h: torch.Tensor, start: int, cond: torch.Tensor | None) -> torch.Tensor:
        lengths = torch.full((self.rows,), start, dtype=torch.int32, device=h.device)

        def attention(i, q, k, v):
            cache = self.k_cache[i], self.v_cache[i], lengths, self.cos, self.sin
            return cached_attention(q * self.query_scale, k, v, *cache, self.spec.rotary, 0, 1.0)

        return layers(h, self.w, self.spec, cond, lambda i: functools.partial(attention, i), self.linear)

    def params(self, x: torch.Tensor, first: int, count: int = 1) -> torch.Tensor:
        """Return the raw parameters (branches B, count, P) of the tokens from `first` on, in the block's own order.

        x (B, T, D) holds the tokens known so far. The cache must hold all tokens before the ones that this call reads.
        """
        return raw_params(self._read(x, first, count), self.w, self.spec, self.linear)

    def fill(self, x: torch.Tensor, count: int) -> None:
        """Fill the cache so that `params` can begin with the token `count`; x (B, T, D) holds those before it."""
        first = 0 if self.spec.start else 1
        if count > first:
            self._read(x, first, count - first)

    def _read(self, x: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Return the states (branches B, count, C) that determine the tokens from `first` on."""
        slot = first if self.spec.start else first - 1
        tokens = x[:, max(first - 1, 0) : first + count - 1]
        if first == 0:
            tokens = torch.cat([self.w["start"].to(x.dtype).expand(self.B, 1, -1), tokens], dim=1)
        position = None if self.positions is None else self.positions[slot : slot + count]
        per_token = self.cond is not None and self.cond.ndim == 3
        cond = self.cond[:, slot : slot + count] if per_token else self.cond
        h = embed(tokens.repeat(self.branches, 1, 1), self.w, cond, position, self.linear)
        return self._step(h, self.L + slot, cond)
