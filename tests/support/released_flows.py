"""Small flows with the submodules, attributes and methods of the code that Apple released, written anew and naively.

The inverses run the whole network once per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Order(nn.Module):
    """Order of the tokens of a block."""

    def __init__(self, flip: bool):
        super().__init__()
        self.flip = flip

    def forward(self, x, dim=1, inverse=False):
        return x.flip(dim) if self.flip else x


class GridOrder(Order):
    """Order of the tokens on a grid (B, h, w, D), which become a sequence."""

    def forward(self, x, dim=1, inverse=False):
        if not inverse:
            self.grid = x.shape[1:3]
        x = super().forward(x if inverse else x.flatten(1, 2), dim)
        return x.unflatten(1, self.grid) if inverse else x


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, width, heads, kv_heads=None, norm=nn.LayerNorm, extras=False, half=False):
        super().__init__()
        size = width // heads
        self.num_heads, self.num_kv_heads, self.head_channels = heads, kv_heads or heads, size
        self.sqrt_scale, self.hf_style_rope = size**-0.25, half
        self.norm = norm(width)
        self.qkv = nn.Linear(width, (heads + 2 * self.num_kv_heads) * size, bias=not extras)
        self.proj = nn.Linear(width, width, bias=not extras)
        self.query_norm, self.key_norm, self.post_norm = (RMSNorm(n) if extras else None for n in (size, size, width))

    def rotate(self, x, angles):
        cos, sin = angles[:, ::2].cos(), angles[:, ::2].sin()
        a, b = x.chunk(2, -1) if self.hf_style_rope else (x[..., ::2], x[..., 1::2])
        pair = a * cos - b * sin, b * cos + a * sin
        return torch.cat(pair, -1) if self.hf_style_rope else torch.stack(pair, -1).flatten(-2)

    def forward(self, x, temperature=1.0, angles=None):
        groups = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        qkv = self.qkv(self.norm(x)).unflatten(-1, (sum(groups), self.head_channels)).transpose(1, 2)
        q, k, v = qkv.split(groups, 1)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = self.rotate(q, angles), self.rotate(k, angles)
        scale = self.sqrt_scale**2 / temperature
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        x = self.proj(x.transpose(1, 2).flatten(2))
        return x if self.post_norm is None else self.post_norm(x)


class MLP(nn.Module):
    def __init__(self, width, norm=nn.LayerNorm, extras=False):
        super().__init__()
        self.norm = norm(width)
        if extras:
            self.gate_proj, self.up_proj = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(2 * width, width, bias=False)
            self.post_norm = RMSNorm(width)
        else:
            self.main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = self.norm(x)
        if hasattr(self, "main"):
            return self.main(x)
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        return self.post_norm(self.down_proj(gate * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, width, heads=2, **options):
        super().__init__()
        self.attention = Attention(width, heads, **options)
        self.mlp = MLP(width, **{name: value for name, value in options.items() if name in ("norm", "extras")})

    def forward(self, x, temperature=1.0, angles=None):
        x = x + self.attention(x, temperature, angles)
        return x + self.mlp(x)


class TarFlowBlock(nn.Module):
    """Block of TarFlow: learned positions, classes, and the identity for the first token."""

    layers = "attn_blocks"

    def __init__(self, dim, width, tokens, flip, layers=1, nvp=True, classes=0):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(dim, width), nn.Linear(width, 2 * dim if nvp else dim)
        self.pos_embed = nn.Parameter(torch.randn(tokens, width))
        self.class_embed = nn.Parameter(torch.randn(classes, 1, width)) if classes else None
        self.permutation, self.nvp = Order(flip), nvp
        setattr(self, self.layers, nn.ModuleList(Layer(width) for _ in range(layers)))

    def params(self, x, y, t=None, temperature=1.0):
        """Return log sigma and mu of the tokens, of which the first passes unchanged."""
        h = self.proj_in(x) + self.permutation(self.pos_embed, dim=0)[: x.shape[1]]
        h = h if t is None else h + self.time_embed(t)[:, None]
        if self.class_embed is not None:
            mean = self.class_embed.mean(0)
            h = h + (mean if y is None else torch.where((y < 0)[:, None, None], mean, self.class_embed[y]))
        for layer in (*(getattr(self, "shared_backbone", None) or ()), *getattr(self, self.layers)):
            h = layer(h, temperature)
        raw = F.pad(self.proj_out(h)[:, :-1], (0, 0, 1, 0))
        return raw.chunk(2, -1) if self.nvp else (torch.zeros_like(raw), raw)

    def forward(self, x, y=None, t=None):
        x = self.permutation(x)
        a, b = self.params(x, y, t)
        return self.permutation((x - b) * (-a).exp(), inverse=True), -a.mean(dim=[1, 2])

    def guide(self, conditional, other, weight, what, style):
        (a, b), (a_u, b_u) = conditional, other
        a = a + weight * (a - a_u) if "a" in what else a
        return a.exp(), b + weight * (b - b_u) if "b" in what else b

    def reverse(self, x, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False, t=None, style=""):
        z = self.permutation(x)
        x = z.clone()
        for i in range(1, x.shape[1]):
            a, b = self.params(x, y, t)
            sigma = a.exp()
            if guidance > 0 and guide_what:
                weight = guidance * i / (x.shape[1] - 1) if annealed_guidance else guidance
                other = self.params(x, None, t, attn_temp)
                sigma, b = self.guide((a, b), other, weight, guide_what, style)
            x[:, i] = z[:, i] * sigma[:, i] + b[:, i]
        return self.permutation(x, inverse=True)


class ITarFlowBlock(TarFlowBlock):
    """Block of iTARFlow: TarFlow's with a noise level."""

    layers = "head_blocks"

    def __init__(self, dim, width, *sizes, shared_backbone=None, **options):
        super().__init__(dim, width, *sizes, **options)
        self.shared_backbone = shared_backbone
        self.time_embed = nn.Sequential(nn.Linear(1, width), nn.GELU(), nn.Linear(width, width))

    def params(self, x, y, t=None, temperature=1.0):
        return super().params(x, y, t, temperature)

    def guide(self, conditional, other, weight, what, style):
        (a, b), (a_u, b_u) = conditional, other
        if style == "starflow":
            return starflow_guidance(a.exp(), b, a_u.exp(), b_u, weight)
        return a.exp() + weight * (a.exp() - a_u.exp()), b + weight * (b - b_u)

    def reverse(
        self, x, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False, t=None,
        lerp_style="tarflow",
    ):  # fmt: skip
        options = guidance, guide_what, attn_temp, annealed_guidance, t, lerp_style
        return super().reverse(x, y, *options)


def starflow_guidance(sigma, mu, sigma_u, mu_u, weight):
    ratio = (sigma / sigma_u).clamp(max=1) ** 2
    total = 1 + weight - weight * ratio
    return sigma / total.sqrt(), ((1 + weight) * mu - weight * ratio * mu_u) / total


class Cache:
    """Cache of keys and values, which only counts what is put into it."""

    filled = 0


class Rotary(nn.Module):
    """Rotary angles of positions (n, 2)."""

    is_1d, pt_seq_len = False, 4

    def __init__(self, head_dim):
        super().__init__()
        self.frequencies = torch.logspace(0, -2, head_dim // 2).repeat_interleave(2)

    def forward(self, positions):
        return (positions * torch.tensor([1.0, 3.0])).sum(1, keepdim=True) * self.frequencies


class StarFlowBlock(nn.Module):
    """Block of STARFlow: rotary positions, a learned first token, and text in front of the tokens."""

    use_sos, use_softplus, soft_clip, local_attn_window, pos_embed = True, True, 4.0, None, None
    use_checkpoint, use_checkpoint_mlp = False, None

    def __init__(self, dim, width, flip, layers=1, txt_dim=0, **options):
        super().__init__()
        self.proj_in, self.proj_out, self.txt_dim = nn.Linear(dim, width), nn.Linear(width, 2 * dim), txt_dim
        self.sos_embed = nn.Parameter(torch.randn(1, 1, dim))
        if txt_dim:
            self.proj_txt = nn.Linear(txt_dim, width)
        self.attn_blocks = nn.ModuleList(Layer(width, **options) for _ in range(layers))
        self.final_norm, self.permutation = RMSNorm(width), GridOrder(flip)

    def get_freqs_cis(self, x, y, rope):
        text = 0 if y is None or not self.txt_dim else y.shape[1]
        grid = torch.cartesian_prod(torch.arange(x.shape[-3]), torch.arange(x.shape[-2])) + text
        return rope(torch.cat([torch.arange(text)[:, None].expand(-1, 2), grid]).float())

    def params(self, x, y, angles):
        """Return sigma and mu of the tokens x (B, T, D), and the states of the text."""
        tokens = torch.cat([self.sos_embed.expand(len(x), -1, -1), x[:, :-1]], 1)
        h = self.proj_in(tokens)
        h = torch.cat([self.proj_txt(y), h], 1) if self.txt_dim else h
        for layer in self.attn_blocks:
            h = layer(h, 1.0, angles)
        h, length = self.final_norm(h), h.shape[1] - x.shape[1]
        raw = self.soft_clip * torch.tanh(self.proj_out(h[:, length:]) / self.soft_clip)
        a, b = raw.chunk(2, -1)
        return F.softplus(a + 0.541324854612918), b, h[:, :length] if self.txt_dim else None

    def forward(self, x, y=None, rope=None, kv_cache=None, guidance=None):
        angles = self.get_freqs_cis(x, y, rope)
        x = self.permutation(x)
        sigma, mu, text = self.params(x, y, angles)
        return self.permutation((x - mu) / sigma, inverse=True), text, -sigma.log()

    def reverse(
        self, z, y=None, guidance=0, guide_what="ab", attn_temp=1.0, annealed_guidance=False, rope=None, verbose=False,
        kv_cache=Cache(), **unused,
    ):  # fmt: skip
        angles = self.get_freqs_cis(z, y, rope)
        z = self.permutation(torch.cat([z, z]) if guidance > 0 else z)
        x = z.clone()
        for t in range(x.shape[1]):
            sigma, mu, _ = self.params(x, y, angles)
            if guidance > 0:
                (sigma, other), (mu, mu_other) = sigma.chunk(2), mu.chunk(2)
                sigma, mu = (v.repeat(2, 1, 1) for v in starflow_guidance(sigma, mu, other, mu_other, guidance))
            x[:, t] = z[:, t] * sigma[:, t] + mu[:, t]
            kv_cache.filled += 1
        x = x.chunk(2)[0] if guidance > 0 else x
        return self.permutation(x, inverse=True)


class TarFlow(nn.Module):
    """Stack of blocks of TarFlow or iTARFlow on tokens (B, T, D)."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, *context):
        logdets = 0.0
        for block in self.blocks:
            x, logdet = block(x, *context)
            logdets = logdets + logdet
        return x, logdets

    def reverse(self, x, *context, **options):
        for block in reversed(self.blocks):
            x = block.reverse(x, *context, **options)
        return x


class StarFlow(nn.Module):
    """Stack of blocks of STARFlow on a grid of tokens (B, h, w, D); only the last block has text."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.rope = Rotary(blocks[0].attn_blocks[0].attention.head_channels)

    def forward(self, x, y=None):
        logdets = []
        for block in self.blocks:
            x, text, logdet = block(x, y, self.rope)
            logdets.append(logdet)
        return x, text, logdets

    def reverse(self, x, y=None, guidance=0, kv_caches=None, **sampling_kwargs):
        caches = kv_caches or [Cache() for _ in self.blocks]
        x = self.reverse_deep(x, y, guidance, kv_caches=caches, **sampling_kwargs)
        for block, cache in zip(reversed(self.blocks[:-1]), caches[1:]):
            x = block.reverse(x, y, rope=self.rope, kv_cache=cache, **sampling_kwargs)
        return x

    def reverse_deep(self, x, y, guidance, kv_caches, **sampling_kwargs):
        return self.blocks[-1].reverse(x, y, guidance, rope=self.rope, kv_cache=kv_caches[0], **sampling_kwargs)
