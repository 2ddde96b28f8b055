"""Inverse affine transform with guidance, from noise to data."""

from __future__ import annotations

import torch

from .._core import compiled
from .._core.checks import check_guidance, check_tensor
from .._core.numerics import accumulation_dtype
from .._core.registration import call, define
from ..spec import AffineSpec, GuidanceRule, check_choice
from . import native, reference

ARGUMENTS = "Tensor z, Tensor params, Tensor? guidance, str scale, float soft_clip, str rule"

define(
    "affine_flow_inverse",
    ARGUMENTS,
    "Tensor",
    fake=lambda z, *args: z.new_empty(z.shape),
    reference=reference.affine_flow_inverse,
)
define(
    "affine_flow_inverse_out",
    f"{ARGUMENTS}, Tensor(a!) out",
    "()",
    fake=lambda *args: None,
    reference=reference.affine_flow_inverse_out,
    instead="pass no out",
)
compiled.register("affine_flow_inverse", native, backward=False)
compiled.register("affine_flow_inverse_out", native, backward=False)


def affine_flow_inverse(
    z: torch.Tensor,
    params: torch.Tensor,
    spec: AffineSpec = AffineSpec(),
    *,
    guidance: float | torch.Tensor | None = None,
    rule: GuidanceRule = "tarflow",
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Transform noise to data with known parameters: x_t = mu_t + sigma_t z_t.

    This inverts TarFlow (arXiv 2412.06329), eq. 3. Guidance follows section 2.6 there, or STARFlow (arXiv 2506.06276),
    section 3.4.

    Args:
        z: (B, n, D) noise tokens, any floating dtype; a sampled state is float32.
        params: (B, n, 2D) raw network outputs [a | b], or (B, n, D) if spec.scale is "unit". With guidance, 2B rows:
            first the B rows with the condition, then the same rows without it.
        spec: map from a and b to sigma and mu.
        guidance: weight w, a number or a tensor that broadcasts to (B, n); None for one set of parameters.
        rule: "tarflow" extrapolates the raw outputs after the soft clip, r_c + w (r_c - r_u). "starflow" takes the
            Gaussian of density p_c^(1 + w) / p_u^(w k) with k = min(sigma_u / sigma_c, 1)^2. "itarflow" extrapolates
            mu and sigma; its sigma may be negative.
        out: (B, n, D) tensor in the dtype of z to write into, which may be z itself. It takes no gradient.
        backend: name of a backend; None takes the first that can run.

    Returns:
        x (B, n, D) in the dtype of z: `out` if it is given, else a new tensor. Differentiable; if a derivative is
        needed, plain PyTorch computes x.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.
        NotImplementedError: a derivative is needed and `out` is given.

    Equivalent to:
        ```python
        a, mu = params.chunk(2, dim=-1)
        x = mu + torch.exp(a) * z
        ```
    """
    check_choice("rule", rule, GuidanceRule)
    check_tensor("z", z, ("B", "n", "D"))
    B, n, D = z.shape
    rows = B if guidance is None else 2 * B
    check_tensor("params", params, (rows, n, spec.params_dim(D)), like=z)
    if guidance is not None:
        guidance = check_guidance(guidance, B, n, accumulation_dtype(z.dtype), z.device)
    args = (z, params, guidance, spec.scale, spec.soft_clip, rule)
    if out is None:
        return call("affine_flow_inverse", *args, backend=backend)
    check_tensor("out", out, (B, n, D), like=z)
    if out.dtype != z.dtype:
        raise TypeError(f"out: dtype {out.dtype}, expected that of z, {z.dtype}")
    call("affine_flow_inverse_out", *args, out, backend=backend)
    return out
