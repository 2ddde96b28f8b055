"""Reference of masked_inverse: one pass of the network per position of the order."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .network import MaskedLayer, Univariate

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
}


def network(x: torch.Tensor, layers: list[MaskedLayer]) -> torch.Tensor:
    """Return the outputs (B, out) of a masked network."""
    outputs: list[torch.Tensor] = []
    for layer in layers:
        x = ACTIVATIONS[layer.activation](x) @ layer.weight.T + layer.offset
        x = x if layer.scale is None else x * layer.scale
        x = x if layer.skip is None else x + outputs[layer.skip]
        outputs.append(x)
    return x


def inverse(y: torch.Tensor, params: torch.Tensor, transform: Univariate) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x (...) of y = f(x) and log|dx/dy| (...) from raw parameters (..., P)."""
    if transform.is_spline:
        return _inverse_spline(y, params, transform)
    m, a = params.unbind(-1)[:: -1 if transform.scale_first else 1]
    t = transform
    if t.kind == "affine_soft_clip":
        log_s = a / (1 + (a / math.log(t.slope)).abs())
    elif t.kind == "affine_softplus":
        log_s = (F.softplus(a) + t.epsilon).log()
    elif t.kind == "affine_sigmoid":
        log_s = (torch.sigmoid(a + t.bias) + t.epsilon).log()
    elif t.kind == "affine_clamp":
        log_s = a.clamp(t.low, t.high)
    else:
        log_s = F.logsigmoid(a + t.bias)
        m = m * torch.sigmoid(-a - t.bias)
    return (y - m) * (-log_s).exp(), -log_s


def _knots(raw: torch.Tensor, smallest: float, t: Univariate) -> torch.Tensor:
    """Return the knots (..., bins + 1) of raw widths or heights (..., bins)."""
    if t.kind == "spline_soft_clip":
        size = (raw / (1 + (2 * raw / math.log(t.slope)).abs())).softmax(-1)
    else:
        size = smallest + (1 - smallest * t.bins) * (raw / t.divisor).softmax(-1)
    return t.bound * (2 * F.pad(size.cumsum(-1), (1, 0)) - 1)


def _inverse_spline(y: torch.Tensor, params: torch.Tensor, t: Univariate) -> tuple[torch.Tensor, torch.Tensor]:
    widths, heights, slopes = params.split([t.bins, t.bins, t.bins - 1], -1)
    xs, ys = _knots(widths, t.min_width, t), _knots(heights, t.min_height, t)
    if t.kind == "spline_soft_clip":
        slopes = (slopes / (1 + (slopes / math.log(t.slope)).abs())).exp()
    else:
        slopes = F.softplus(slopes) + t.min_derivative
    slopes = F.pad(slopes, (1, 1), value=1.0)
    inside = (y > -t.bound) & (y < t.bound)
    k = ((ys < y[..., None]).sum(-1, keepdim=True) - 1).clamp(0, t.bins - 1)
    (x0, x1), (y0, y1), (d0, d1) = (
        (v.gather(-1, k).squeeze(-1), v.gather(-1, k + 1).squeeze(-1)) for v in (xs, ys, slopes)
    )
    s = (y1 - y0) / (x1 - x0)
    rise, bend = (y - y0).masked_fill(~inside, 0), d0 + d1 - 2 * s
    a, b, c = (y1 - y0) * (s - d0) + rise * bend, (y1 - y0) * d0 - rise * bend, -s * rise
    z = -2 * c / (b + (b * b - 4 * a * c).clamp(min=0).sqrt())
    slope = s * s * (d1 * z * z + 2 * s * z * (1 - z) + d0 * (1 - z) ** 2) / (s + bend * z * (1 - z)) ** 2
    return torch.where(inside, x0 + z * (x1 - x0), y), torch.where(inside, -slope.log(), torch.zeros_like(y))


def masked_inverse(y, layers, order, transform, interleaved, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute masked_inverse by one pass of the whole network per position; `plan` is not used."""
    (B, D), P = y.shape, transform.params
    x, logdet = torch.zeros_like(y), y.new_zeros(B)
    for position in order.unique():
        params = network(x, layers)
        params = params.view(B, D, P) if interleaved else params.view(B, P, D).mT
        now = order == position
        x[:, now], part = inverse(y[:, now], params[:, now], transform)
        logdet += part.sum(1)
    return x, logdet
