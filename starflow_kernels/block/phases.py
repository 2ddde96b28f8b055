"""Model of the time of a token step on a GPU: the phases of csrc/cuda/schedule.h with their bytes and operations.

It chooses between the kernels of `block_inverse` and gives the floor of a step. The time of the on-chip kernel is that
of its plan. The constants are estimates for an H200; no GPU has measured them yet.
"""

from __future__ import annotations

from typing import NamedTuple

from .._core import compiled
from .._core.rates import L2, MEMORY
from ..spec import BlockSpec
from . import cuda, persistent
from .packing import spec_fields

# Share of the bandwidth that a ring of stages reaches, since thread blocks do not finish their tiles together.
STREAM = 0.92
# Seconds of a phase without its bytes, for a product and for attention: grid barrier, inputs, sums, outputs.
PRODUCT_SECONDS = 1.9e-6
ATTENTION_SECONDS = 3.6e-6


class Phase(NamedTuple):
    """Work between two barriers of the grid.

    name: what it computes. bytes: weights and KV cache that it reads and writes. operations: in floating point.
    inputs: bytes of activations that every thread block reads.
    """

    name: str
    bytes: int
    operations: int
    inputs: int = 0


def phases(spec: BlockSpec, rows: int, slots: int, width: int) -> list[Phase]:
    """Return the phases of a token step in their order.

    Args:
        spec: the block.
        rows: rows of the batch, guided ones counted twice.
        slots: slots that attention reads, with the one of this step.
        width: bytes per value of weights and KV cache.
    """
    C, attended = spec.channels, spec.heads * spec.head_dim

    def product(name: str, out: int, inp: int, input_width: int) -> Phase:
        return Phase(name, out * inp * width, 2 * rows * out * inp, rows * inp * input_width)

    cached = 2 * rows * (slots + 1) * spec.kv_heads * spec.head_dim * width
    layer = [
        product("qkv", attended + 2 * spec.kv_heads * spec.head_dim, C, 4),
        Phase("attend", cached, 4 * rows * slots * attended),
        product("project", C, attended, width),
        product("up", spec.mlp_dim * (2 if spec.mlp == "swiglu" else 1), C, 4),
        product("down", C, spec.mlp_dim, width),
    ]
    head = product("head", spec.affine.params_dim(spec.token_dim), C, 4)
    return [product("embed", C, spec.token_dim, 4), *(layer * spec.layers), head]


def floor_seconds(steps: list[Phase]) -> float:
    """Return the least time of a step: its bytes at the bandwidth of the device memory."""
    return sum(phase.bytes for phase in steps) / MEMORY


def persistent_seconds(steps: list[Phase], blocks: int) -> float:
    """Return the predicted time of a step: weights stream during the barriers, so the longer of both counts."""
    waits = sum(ATTENTION_SECONDS if phase.name == "attend" else PRODUCT_SECONDS for phase in steps)
    return max(floor_seconds(steps) / STREAM, waits + blocks * sum(phase.inputs for phase in steps) / L2)


def fastest(z, weights, prefix, guidance, spec_json: str, device: cuda.Device) -> str | None:
    """Return the kernel of csrc/cuda that the model predicts to be the fastest, or None if a call has more rows.

    Up to MOST_ROWS rows, launches of a kernel per phase would take longer than the barriers of a grid, so that only the
    two kernels with one launch in all are compared.
    """
    arguments = z, weights, prefix, guidance, spec_json, device
    if not z.numel() or persistent.refuse_block(*arguments):
        return None
    if cuda.refuse_block(*arguments):
        return "persistent"
    spec, dtype, (B, T, _) = BlockSpec.from_json(spec_json), weights[0].dtype, z.shape
    branches = 1 if guidance is None else 2
    steps = phases(spec, B * branches, T, dtype.itemsize)
    launch = cuda.plan(tuple(spec_fields(spec, dtype)), T, branches, B, *device)
    groups = -(-B // (launch.group * (device.processors // launch.cluster)))
    on_chip = groups * launch.step * 1e-9
    return "persistent" if persistent_seconds(steps, device.processors) < on_chip else "cuda"


def preferred(z, weights, cond, prefix, cos, sin, guidance, spec_json: str, *others) -> str | None:
    """Return the backend of `block_inverse` to try first, or None."""
    if z.device.type != "cuda" or compiled.cuda_unavailable():
        return None
    return fastest(z, weights, prefix, guidance, spec_json, cuda.device_sizes(z.device))


def here() -> dict[str, str]:
    """Describe the choice on this machine."""
    if compiled.cuda_unavailable():
        return {}
    return {"persistent": f"up to {persistent.MOST_ROWS} rows, by a model that no GPU has confirmed yet"}
