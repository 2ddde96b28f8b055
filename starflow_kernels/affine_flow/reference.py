"""Affine flow transform: the specification in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._core.numerics import accumulation_dtype

# softplus(SOFTPLUS_ONE) = 1, so that network outputs of zero give the identity transform.
SOFTPLUS_ONE = 0.541324854612918
# Below this value, softplus equals the exponential, which may underflow.
SOFTPLUS_TINY = -40.0


def by_token(params: torch.Tensor, shift: bool, flip: bool) -> torch.Tensor:
    """Return raw parameters in the token order of x. A token that passes unchanged gets zeros, the identity."""
    if shift:
        params = F.pad(params[:, :-1], (0, 0, 1, 0))
    return params.flip(1) if flip else params


def raw_outputs(params: torch.Tensor, scale: str, soft_clip: float) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the soft-clipped (a, b) of raw parameters; a is None where sigma = 1."""
    params = params.to(accumulation_dtype(params.dtype))
    if soft_clip:
        params = soft_clip * torch.tanh(params / soft_clip)
    return (None, params) if scale == "unit" else params.chunk(2, dim=-1)


def sigma_of(a: torch.Tensor | None, b: torch.Tensor, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the standard deviation and its logarithm."""
    if scale == "unit":
        return torch.ones_like(b), torch.zeros_like(b)
    if scale == "exp":
        return a.exp(), a
    # F.softplus returns its argument above 20, with an error of 2e-9.
    shifted, zero = a + SOFTPLUS_ONE, a.new_zeros(())
    log_sigma = torch.logaddexp(shifted.clamp(min=SOFTPLUS_TINY), zero).log()
    return torch.logaddexp(shifted, zero), torch.where(shifted < SOFTPLUS_TINY, shifted, log_sigma)


def affine_flow(
    x: torch.Tensor, params: torch.Tensor, scale: str, soft_clip: float, shift: bool, flip: bool, logdet: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z_t = (x_t - mu_t) / sigma_t and the log-determinant, for all t at once."""
    a, mu = raw_outputs(by_token(params, shift, flip), scale, soft_clip)
    sigma, log_sigma = sigma_of(a, mu, scale)
    z = ((x - mu) / sigma).to(x.dtype)
    if logdet == "none":
        return z, -log_sigma.to(accumulation_dtype(x.dtype))
    reduce = torch.sum if logdet == "sum" else torch.mean
    return z, -reduce(log_sigma, dim=(1, 2)).to(accumulation_dtype(x.dtype))


def params_gradient(
    grads: list[torch.Tensor],
    z: torch.Tensor,
    x: torch.Tensor,
    params: torch.Tensor,
    scale: str,
    soft_clip: float,
    shift: bool,
    flip: bool,
    logdet: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients with respect to x and params, in the accumulation dtype.

    With l = -log sigma: dL/dmu = -dL/dz / sigma and dL/dlog sigma = -z dL/dz - dL/dl.
    """
    grad_z, grad_l = grads
    grad_z = torch.zeros_like(z) if grad_z is None else grad_z
    a, mu = raw_outputs(by_token(params, shift, flip), scale, soft_clip)
    sigma, _ = sigma_of(a, mu, scale)
    # A value of z that is not used contributes nothing, even if z or 1 / sigma is infinite.
    unused = grad_z == 0
    z = z.masked_fill(unused & ~z.isfinite(), 0)
    grad_x = (grad_z / sigma).masked_fill(unused & (sigma == 0), 0)
    if grad_l is None:
        grad_l = 0.0
    elif logdet != "none":
        grad_l = grad_l[:, None, None] / (1 if logdet == "sum" else x.shape[1] * x.shape[2])
    if scale == "unit":
        grad_params, raw = -grad_x, mu
    else:
        grad_a = -(grad_z * z + grad_l)
        if scale == "softplus":
            slope = torch.sigmoid(a + SOFTPLUS_ONE) / sigma
            grad_a = grad_a * slope.masked_fill(a < SOFTPLUS_TINY, 1)
        grad_params, raw = torch.cat([grad_a, -grad_x], dim=-1), torch.cat([a, mu], dim=-1)
    if soft_clip:
        grad_params = grad_params * (1 - (raw / soft_clip).square())
    if flip:
        grad_params = grad_params.flip(1)
    if shift:
        grad_params = F.pad(grad_params[:, 1:], (0, 0, 0, 1))
    return grad_x, grad_params


def affine_flow_backward(grads, outputs, x, params, *options) -> list[torch.Tensor]:
    """Return the gradients with respect to x and params."""
    grad_x, grad_params = params_gradient(grads, outputs[0], x, params, *options)
    return [grad_x.to(x.dtype), grad_params.to(params.dtype)]
