"""Independent computations of affine transform, rotary positions and attention; they share no code with the library."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def naive_sigma(a: torch.Tensor, scale: str) -> torch.Tensor:
    """Return the standard deviation of the raw output a."""
    return a.exp() if scale == "exp" else torch.log1p(torch.exp(a + math.log(math.e - 1)))


def naive_raw(params: torch.Tensor, spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mu and sigma of raw parameters."""
    r = spec.soft_clip * torch.tanh(params / spec.soft_clip) if spec.soft_clip else params
    if spec.scale == "unit":
        return r, torch.ones_like(r)
    half = r.shape[-1] // 2
    return r[..., half:], naive_sigma(r[..., :half], spec.scale)


def naive_affine(x, params, spec, shift=False, flip=False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z and -log sigma, (B, T, D) each, token by token in the dtype of the inputs."""
    T, z, minus_log_sigma = x.shape[1], [], []
    for t in range(T):
        source = (T - 1 - t if flip else t) - shift
        mu, sigma = naive_raw(params[:, source], spec)
        if source < 0:
            mu, sigma = torch.zeros_like(x[:, t]), torch.ones_like(x[:, t])
        z.append((x[:, t] - mu) / sigma)
        minus_log_sigma.append(-sigma.log())
    return torch.stack(z, 1), torch.stack(minus_log_sigma, 1)


def reduced(minus_log_sigma: torch.Tensor, logdet: str) -> torch.Tensor:
    """Return the log-determinant by its convention."""
    if logdet == "none":
        return minus_log_sigma
    return minus_log_sigma.sum((1, 2)) if logdet == "sum" else minus_log_sigma.mean((1, 2))


def naive_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: str) -> torch.Tensor:
    """Apply rotary positions to x (..., T, heads, d) as a product of complex numbers, in the dtype of x."""
    if rotary == "none":
        return x
    y = x if x.dtype == torch.float64 else x.float()
    half = x.shape[-1] // 2
    pairs = torch.stack([y[..., :half], y[..., half:]], -1) if rotary == "half" else y.unflatten(-1, (half, 2))
    rotation = torch.complex(cos.to(y.dtype), sin.to(y.dtype)).unsqueeze(-2)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation)
    return (torch.cat([pairs[..., 0], pairs[..., 1]], -1) if rotary == "half" else pairs.flatten(-2)).to(x.dtype)


def naive_attention(q, k, v, visible: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Attend with (B, n, H, d) queries over (B, S, H_kv, d) keys and an (n, S) mask."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 / temperature
    return F.scaled_dot_product_attention(*heads_first, visible, scale=scale, enable_gqa=True).transpose(1, 2)


def naive_visible(queries: range, keys: int, window: int | None) -> torch.Tensor:
    """Return the (n, S) mask: which of the positions 0 .. keys - 1 a query position sees."""
    return torch.tensor([[s <= t and (window is None or s > t - window) for s in range(keys)] for t in queries])


def angles(positions: int, head_dim: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Return cos and sin of (positions, head_dim / 2) rotary angles."""
    frequency = 10000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angle = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * frequency
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
