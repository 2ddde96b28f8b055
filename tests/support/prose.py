"""Prose (arXiv 2508.18175) in plain torch on weights with the names of its code; it shares no code with the library."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

T, D, C, HEAD, LAYERS, BLOCKS = 7, 3, 8, 4, 2, 3


def weights(transition=True, lookahead=True, learned_positions=False) -> dict[str, torch.Tensor]:
    """Return random weights by upstream name, float64."""
    shapes = {"cond_embed.atom_embed.weight": (128, C), "cond_embed.residue_embed.weight": (64, C)}

    def linear(name, out, inp, bias=True):
        shapes[f"{name}.weight"] = (out, inp)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (C,)

    linear("cond_embed.mlp.0", C, 4 * C)
    linear("cond_embed.mlp.2", C, C)
    for i in range(BLOCKS):
        block = f"blocks.{i}"
        linear(f"{block}.proj_in", C, D)
        linear(f"{block}.proj_out", 2 * D, C)
        if lookahead:
            linear(f"{block}.proj_cond.0", C, 2 * C)
            linear(f"{block}.proj_cond.2", C, C)
        else:
            linear(f"{block}.proj_cond", C, C)
        shapes[f"{block}.pos_embed" if learned_positions else f"{block}.pos_embed_scale"] = (
            (T, C) if learned_positions else (1,)
        )
        for k in range(LAYERS):
            layer = f"{block}.attn_blocks.{k}"
            for part in ("mha", "transition")[: 1 + transition]:
                norm(f"{layer}.{part}.adaln.norm_cond")
                linear(f"{layer}.{part}.adaln.to_gamma.0", C, C)
                linear(f"{layer}.{part}.adaln.to_beta", C, C, False)
                linear(f"{layer}.{part}.scale_output.to_adaln_zero_gamma.0", C, C)
            for name in ("attention.norm", "attention.q_layer_norm", "attention.k_layer_norm", "mlp.norm"):
                norm(f"{layer}.mha.mha.{name}")
            linear(f"{layer}.mha.mha.attention.qkv", 3 * C, C)
            linear(f"{layer}.mha.mha.attention.proj", C, C)
            linear(f"{layer}.mha.mha.mlp.main.0", 2 * C, C)
            linear(f"{layer}.mha.mha.mlp.main.2", C, 2 * C)
            if transition:
                linear(f"{layer}.transition.transition.swish_linear.0", 6 * C, C, False)
                linear(f"{layer}.transition.transition.linear_out", C, 3 * C, False)
    # Wild scales, exponentials of what the tokens determine, would explode.
    sizes = {name: 0.05 if "proj_out" in name else 0.4 for name in shapes}
    found = {name: torch.randn(shape, dtype=torch.float64) * sizes[name] for name, shape in shapes.items()}
    found |= {f"blocks.{i}.attn_mask": torch.ones(T, T, dtype=torch.float64).tril() for i in range(BLOCKS)}
    return found


def waves(position, wave):
    rates = torch.exp(-math.log(wave) / C * torch.arange(0, C, 2, dtype=torch.float64))
    angles = position.double()[..., None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def density(w, x, atoms, orders):
    """Return noise and log-determinant of one molecule, x (n, D) and atoms (n, 4); orders (n,) for each block."""

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def adaptive(x, cond, name):
        seen = norm(cond, f"{name}.adaln.norm_cond")
        scale = torch.sigmoid(linear(seen, f"{name}.adaln.to_gamma.0"))
        return F.layer_norm(x, (C,)) * scale + linear(seen, f"{name}.adaln.to_beta")

    def gate(cond, name):
        return torch.sigmoid(linear(cond, f"{name}.scale_output.to_adaln_zero_gamma.0"))

    def attention(x, name):
        q, k, v = linear(norm(x, f"{name}.norm"), f"{name}.qkv").chunk(3, -1)
        q, k = norm(q, f"{name}.q_layer_norm"), norm(k, f"{name}.k_layer_norm")
        q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(0, 1) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(y.transpose(0, 1).flatten(1), f"{name}.proj")

    tables = [w["cond_embed.atom_embed.weight"][atoms[:, 0]], w["cond_embed.residue_embed.weight"][atoms[:, 1]]]
    features = torch.cat([*tables, waves(atoms[:, 2], 1000.0), waves(atoms[:, 3], 1000.0)], -1)
    features = linear(F.gelu(linear(features, "cond_embed.mlp.0")), "cond_embed.mlp.2")
    logdet = 0.0
    for i, order in enumerate(orders):
        block = f"blocks.{i}"
        own, cond = x[order], features[order]
        if f"{block}.proj_cond.0.weight" in w:
            cond = torch.cat([cond, torch.cat([cond[1:], torch.zeros_like(cond[:1])])], -1)
            cond = linear(F.gelu(linear(cond, f"{block}.proj_cond.0")), f"{block}.proj_cond.2")
        else:
            cond = linear(cond, f"{block}.proj_cond")
        table = w.get(f"{block}.pos_embed")
        if table is None:
            table = waves(torch.arange(len(x)), 10000.0) * w[f"{block}.pos_embed_scale"]
        h = linear(own, f"{block}.proj_in") + table[: len(x)]
        for k in range(LAYERS):
            layer = f"{block}.attn_blocks.{k}"
            y = adaptive(h, cond, f"{layer}.mha")
            y = y + attention(y, f"{layer}.mha.mha.attention")
            mlp = f"{layer}.mha.mha.mlp"
            y = y + linear(F.gelu(linear(norm(y, f"{mlp}.norm"), f"{mlp}.main.0")), f"{mlp}.main.2")
            h = h + gate(cond, f"{layer}.mha") * y
            if f"{layer}.transition.adaln.norm_cond.weight" in w:
                y = adaptive(h, cond, f"{layer}.transition")
                up, g = linear(y, f"{layer}.transition.transition.swish_linear.0").chunk(2, -1)
                y = linear(F.silu(g) * up, f"{layer}.transition.transition.linear_out")
                h = h + gate(cond, f"{layer}.transition") * y
        a, b = linear(h, f"{block}.proj_out").roll(1, 0).chunk(2, -1)
        a, b = (torch.cat([torch.zeros_like(t[:1]), t[1:]]) for t in (a, b))
        z = torch.empty_like(x)
        z[order] = (own - b) * torch.exp(-a)
        x, logdet = z, logdet - a.sum()
    return x, logdet
