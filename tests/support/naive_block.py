"""A block in plain torch, both directions; it shares no code with the library."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from starflow_kernels import AffineSpec
from support.naive import naive_affine, naive_attention, naive_raw, naive_rotate, naive_visible


def naive_network(x, w, spec, cond=None, prefix=None, cos=None, sin=None, temperature=1.0, dropout=0.0):
    """Return raw parameters (B, T, P) in the block's own order, in the dtype of the weights."""

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def rms(x, name):
        return F.rms_norm(x, x.shape[-1:], 1 + w[f"{name}.weight"], eps=1e-6)

    def norm(x, name):
        if spec.norm == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
        return rms(x, name) if spec.norm == "rms_norm" else x

    def mlp(x, layer):
        if spec.mlp == "gelu":
            u = linear(x, f"{layer}.up")
            return linear(u * 0.5 * (1 + torch.erf(u / math.sqrt(2))), f"{layer}.down")
        g = linear(x, f"{layer}.gate")
        gate = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        return linear(gate * linear(x, f"{layer}.up"), f"{layer}.down")

    dtype, tokens = w["proj_in.weight"].dtype, x.flip(1) if spec.flip else x
    if spec.start:
        tokens = torch.cat([w["start"].to(x.dtype).repeat(len(x), 1, 1), tokens], 1)[:, :-1]
    h = linear(tokens.to(dtype), "proj_in")
    if spec.positions:
        h = h + (w["pos_embed"].flip(0) if spec.flip else w["pos_embed"])
    if cond is not None:
        cond = cond if cond.ndim == 3 else cond[:, None]
        h = h + cond[..., : spec.channels]
    if prefix is not None:
        h = torch.cat([linear(prefix, "proj_text"), h], 1)
    d, q_end, k_end = spec.head_dim, spec.heads * spec.head_dim, (spec.heads + spec.kv_heads) * spec.head_dim
    visible = naive_visible(range(h.shape[1]), h.shape[1], None)
    # The condition has all scales, then all shifts, then all gates; here they are in the order in which they run.
    third = spec.channels * spec.layers * spec.branches
    parts = () if cond is None else cond[..., spec.channels :].split([third] * 3, -1)
    modulations = (part for branch in zip(*(part.split(spec.channels, -1) for part in parts)) for part in branch)
    for i in range(spec.layers):
        layer, outer = f"layers.{i}", h
        if spec.adaptive:
            h = F.layer_norm(outer, outer.shape[-1:]) * next(modulations) + next(modulations)
        qkv = linear(norm(h, f"{layer}.attn_norm"), f"{layer}.qkv")
        q, k, v = (t.unflatten(-1, (-1, d)) for t in (qkv[..., :q_end], qkv[..., q_end:k_end], qkv[..., k_end:]))
        if spec.qk_norm:
            q, k = rms(q, f"{layer}.q_norm"), rms(k, f"{layer}.k_norm")
        if spec.qk_layer_norm:
            wide = {"q": q.flatten(-2), "k": k.flatten(-2)}
            q, k = (
                F.layer_norm(t, t.shape[-1:], w[f"{layer}.{n}_norm.weight"], w[f"{layer}.{n}_norm.bias"])
                for n, t in wide.items()
            )
            q, k = q.unflatten(-1, (-1, d)), k.unflatten(-1, (-1, d))
        q, k = (naive_rotate(t, cos, sin, spec.rotary) for t in (q, k))
        y = linear(naive_attention(q, k, v, visible, temperature).flatten(-2), f"{layer}.proj")
        h = h + F.dropout(rms(y, f"{layer}.attn_post_norm") if spec.post_norm else y, dropout)
        y = mlp(norm(h, f"{layer}.mlp_norm"), layer)
        h = h + F.dropout(rms(y, f"{layer}.mlp_post_norm") if spec.post_norm else y, dropout)
        if spec.adaptive:
            h = outer + next(modulations) * h
        if spec.transition_dim:
            x = F.layer_norm(h, h.shape[-1:]) * next(modulations) + next(modulations)
            g = linear(x, f"{layer}.transition.gate")
            x = linear(g * torch.sigmoid(g) * linear(x, f"{layer}.transition.up"), f"{layer}.transition.down")
            h = h + next(modulations) * x
    h = h[:, -x.shape[1] :]
    return linear(rms(h, "final_norm") if spec.final_norm else h, "proj_out")


def naive_forward(x, w, spec, **context):
    """Return z and -log sigma, (B, T, D) each."""
    raw = naive_network(x, w, spec, **context).to(x.dtype)
    return naive_affine(x, raw, spec.affine, shift=not spec.start, flip=spec.flip)


def naive_params(x, w, spec, **context):
    """Return the raw parameters of every token in the order of x, zeros for the token that passes unchanged."""
    raw, T = naive_network(x, w, spec, **context).to(x.dtype), x.shape[1]
    slots = [(T - 1 - t if spec.flip else t) - (not spec.start) for t in range(T)]
    return torch.stack([raw[:, slot] if slot >= 0 else torch.zeros_like(raw[:, 0]) for slot in slots], 1)


def naive_inverse(z, w, spec, context, guidance=None, rule="tarflow", temperature=1.0, known=0):
    """Sample token by token; each token takes one pass of the whole network, two with guidance.

    The first `known` tokens of z in the block's own order are data.
    """
    x, B = (z.flip(1) if spec.flip else z).clone(), len(z)
    branch = [
        {n: c if n in ("cos", "sin") else c[half] for n, c in context.items()} for half in (slice(B), slice(B, None))
    ]

    def parameters(t, half, temperature=1.0):
        data = x.flip(1) if spec.flip else x
        return naive_network(data, w, spec, **branch[half], temperature=temperature)[:, t if spec.start else t - 1].to(
            x.dtype
        )

    for t in range(max(known, 0 if spec.start else 1), x.shape[1]):
        c = parameters(t, 0)
        mu, sigma = naive_raw(c, spec.affine)
        if guidance is not None:
            u, g = parameters(t, 1, temperature), guidance[:, t, None]
            if rule == "tarflow":
                clip = spec.affine.soft_clip
                c, u = (clip * torch.tanh(r / clip) if clip else r for r in (c, u))
                mu, sigma = naive_raw(c + g * (c - u), AffineSpec(spec.affine.scale))
            elif rule == "itarflow":
                mu_u, sigma_u = naive_raw(u, spec.affine)
                mu, sigma = mu + g * (mu - mu_u), sigma + g * (sigma - sigma_u)
            else:
                mu_u, sigma_u = naive_raw(u, spec.affine)
                s = torch.clamp(sigma / sigma_u, max=1) ** 2
                mu, sigma = ((1 + g) * mu - g * s * mu_u) / (1 + g - g * s), sigma / torch.sqrt(1 + g - g * s)
        x[:, t] = mu + sigma * z[:, x.shape[1] - 1 - t if spec.flip else t]
    return x.flip(1) if spec.flip else x
