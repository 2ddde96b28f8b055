"""affine_flow_inverse, with guidance and without: memory-bound."""

import pytest
import torch

from starflow_kernels import AffineSpec, affine_flow_inverse
from starflow_kernels.affine_flow_inverse.reference import affine_flow_inverse as plain_affine_flow_inverse

SPEC = AffineSpec("softplus", 4.0)


def eager(z, params, guidance):
    """Compute the op in plain torch."""
    return plain_affine_flow_inverse(z, params, guidance, SPEC.scale, SPEC.soft_clip, "starflow")


RUNS = {
    "ours": lambda z, params, guidance: affine_flow_inverse(z, params, SPEC, guidance=guidance, rule="starflow"),
    "eager": eager,
    "compiled": torch.compile(eager),
}


@pytest.mark.parametrize("shape", [(1, 1, 4), (64, 1, 48), (64, 256, 12), (128, 1024, 48)], ids=str)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guidance"])
def bench_affine_flow_inverse(name, shape, guided, timed):
    torch.manual_seed(0)
    B, n, D = shape
    z, params = torch.randn(B, n, D), torch.randn(B * (1 + guided), n, 2 * D)
    guidance = torch.full((B, 1), 1.5) if guided else None
    wide = (t if t is None else t.double() for t in (z, params, guidance))
    timed(
        lambda: (RUNS[name](z, params, guidance),),
        (eager(*wide),),
        (eager(z, params, guidance),),
        bytes=4 * (2 * z.numel() + params.numel()),
        own=name == "ours",
    )
