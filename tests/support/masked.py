"""Random masked networks, and the maps of `masked_inverse` in the direction from x to y."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F

from starflow_kernels.masked_inverse.api import MaskedLayer, Univariate

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, torch.expm1(x)),
    "tanh": torch.tanh,
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "softplus": lambda x: (1 + x.exp()).log(),
}


def masked_layers(
    rank, transform, B=5, width=11, activation="relu", residual=False, per_sample=False, interleaved=True, dtype=None
) -> list[MaskedLayer]:
    """Return a network of four layers whose hidden units depend on random numbers of inputs of lower rank."""
    D, P = len(rank), transform.params
    inner = torch.randint(0, int(rank.max()) + 1, (2, width))
    outer = rank[:, None].expand(D, P) if interleaved else rank.expand(P, D)
    degrees = [rank + 1, inner[0], inner[1] if not residual else inner[0], inner[0], outer.reshape(-1)]
    layers = []
    for i, (before, after) in enumerate(itertools.pairwise(degrees)):
        mask = (after[:, None] >= before) & (torch.rand(len(after), len(before)) < 0.8)
        weight = torch.randn(mask.shape, dtype=torch.float64) * mask * 1.5 / math.sqrt(len(before))
        rows = (B,) if per_sample and i != 1 else ()
        offset = torch.randn(*rows, len(after), dtype=torch.float64)
        scale = torch.rand(B, len(after), dtype=torch.float64) if per_sample and i > 0 else None
        skip = 0 if residual and i == 2 else None
        tensors = [t if t is None else t.to(dtype or torch.float64) for t in (weight, offset, scale)]
        layers.append(MaskedLayer(tensors[0], tensors[1], "identity" if i == 0 else activation, tensors[2], skip))
    return layers


def naive_network(x: torch.Tensor, layers: list[MaskedLayer]) -> torch.Tensor:
    outputs = []
    for layer in layers:
        x = torch.einsum("bi,oi->bo", ACTIVATIONS[layer.activation](x), layer.weight) + layer.offset
        x = x * (1 if layer.scale is None else layer.scale) + (0 if layer.skip is None else outputs[layer.skip])
        outputs.append(x)
    return x


def naive_forward(x: torch.Tensor, params: torch.Tensor, t: Univariate) -> torch.Tensor:
    """Return y (B, D) of x (B, D) and raw parameters (B, D, P)."""
    if t.kind.startswith("spline"):
        return _spline(x, params, t)
    a, m = (params[..., i] for i in ((0, 1) if t.scale_first else (1, 0)))
    if t.kind == "affine_convex":
        s = 1 / (1 + (-a - t.bias).exp())
        return s * x + (1 - s) * m
    s = {
        "affine_soft_clip": lambda: (a / (1 + a.abs() / -math.log(t.slope))).exp(),
        "affine_softplus": lambda: (1 + a.exp()).log() + t.epsilon,
        "affine_sigmoid": lambda: 1 / (1 + (-a - t.bias).exp()) + t.epsilon,
        "affine_clamp": lambda: a.clamp(t.low, t.high).exp(),
    }[t.kind]()
    return s * x + m


def _spline(x, params, t):
    """Each value goes through the rational function of its own bin (arXiv 1906.04032, eq. 4)."""
    K, soft = t.bins, t.kind == "spline_soft_clip"
    y = x.clone()
    for place in (x.abs() < t.bound).nonzero().tolist():
        raw, value = params[tuple(place)], x[tuple(place)]
        sizes = []
        for part, least in ((raw[:K], t.min_width), (raw[K : 2 * K], t.min_height)):
            if soft:
                sizes.append(2 * t.bound * F.softmax(part / (1 + 2 * part.abs() / -math.log(t.slope)), 0))
            else:
                sizes.append(2 * t.bound * (least + (1 - K * least) * F.softmax(part / t.divisor, 0)))
        inner = raw[2 * K :]
        if soft:
            inner = (inner / (1 + inner.abs() / -math.log(t.slope))).exp()
        else:
            inner = (1 + inner.exp()).log() + t.min_derivative
        d = torch.cat([raw.new_ones(1), inner, raw.new_ones(1)])
        knots, heights = (torch.cat([raw.new_zeros(1), size.cumsum(0)]) - t.bound for size in sizes)
        k = max(k for k in range(K) if k == 0 or knots[k] < value)
        u, s = (value - knots[k]) / sizes[0][k], sizes[1][k] / sizes[0][k]
        top = sizes[1][k] * (s * u**2 + d[k] * u * (1 - u))
        y[tuple(place)] = heights[k] + top / (s + (d[k] + d[k + 1] - 2 * s) * u * (1 - u))
    return y
