"""Every affine spec, token order and log-determinant, as parameters of tests."""

from __future__ import annotations

import itertools

import pytest

from starflow_kernels import AffineSpec

SPECS = [AffineSpec(scale, clip) for scale in ("exp", "softplus", "unit") for clip in (0.0, 1.5)]


def spec_id(spec: AffineSpec) -> str:
    """Return the name of a spec in the names of tests."""
    return f"{spec.scale}{'-clip' if spec.soft_clip else ''}"


every_spec = pytest.mark.parametrize("spec", SPECS, ids=spec_id)
every_order = pytest.mark.parametrize(
    "shift, flip", list(itertools.product([False, True], repeat=2)), ids=["plain", "flip", "shift", "shift-flip"]
)
every_logdet = pytest.mark.parametrize("logdet", ["sum", "mean", "none"])
