"""Inverse of a large block on a GPU with all steps in one launch, by the kernel in csrc/cuda/persistent.h."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..spec import BlockSpec, GuidanceRule, choice_index
from . import cuda
from .packing import refuse_rounding, refuse_spec, spec_fields
from .progress import report
from .quantize import fake_quantize

OPS = torch.ops.starflow_cuda
# Outputs per tile, rows, warp steps per stage of the ring, and stages, see csrc/cuda/schedule.h.
TILE = 8
MOST_ROWS = 16
STAGE_STEPS = 16
MOST_STAGES = 32
# A ring with fewer stages hides no latency.
LEAST_STAGES = 4


class Packed(NamedTuple):
    """Weights in the layout of csrc/cuda/schedule.h.

    buffer: tiles of the matrices with their biases, in the dtype of the weights. vectors: other vectors in float32.
    positions: position table in float32.
    """

    buffer: torch.Tensor
    vectors: torch.Tensor
    positions: torch.Tensor | None


def _tiles(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return a matrix (N, K) as (N / 8, steps, 32 lanes, 16 bytes), flat, with the eight biases behind each tile."""
    narrow = weight.dtype == torch.bfloat16
    weight = F.pad(weight, (0, -weight.shape[1] % (32 if narrow else 16), 0, -len(weight) % TILE))
    if narrow:
        # Two fragments B of mma.m16n8k16, see csrc/cuda/device.h.
        lanes = weight.view(-1, TILE, weight.shape[1] // 32, 2, 2, 4, 2).permute(0, 2, 1, 5, 3, 4, 6)
    else:
        lanes = weight.view(-1, TILE, weight.shape[1] // 16, 4, 4).permute(0, 2, 3, 1, 4)
    tiles = lanes.reshape(len(lanes), -1)
    biases = weight.new_zeros(len(weight), dtype=torch.float32)
    if bias is not None:
        biases[: len(bias)] = bias
    return torch.cat([tiles, biases.view(weight.dtype).view(len(tiles), -1)], 1).flatten()


def _pairs(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    """Return rows of two matrices or vectors by turns, four of each."""
    if a is None or b is None:
        return None
    a, b = (F.pad(w, (0, 0) * (w.ndim - 1) + (0, -len(w) % 4)).unflatten(0, (-1, 1, 4)) for w in (a, b))
    return torch.cat([a, b], 1).flatten(0, 2)


def pack(spec: BlockSpec, weights: list[torch.Tensor]) -> Packed:
    """Pack the weights for the kernel: cheaper than to find out whether they have changed."""
    w = {name: weight.detach() for name, weight in zip(spec.weight_shapes, weights)}

    def matrix(name: str, partner: str | None = None) -> torch.Tensor:
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        if partner:
            weight, bias = _pairs(weight, w[f"{partner}.weight"]), _pairs(bias, w.get(f"{partner}.bias"))
        return _tiles(weight, bias)

    matrices = [matrix("proj_text")] if spec.text_dim else []
    matrices.append(matrix("proj_in"))
    if spec.affine.scale == "unit":
        matrices.append(matrix("proj_out"))
    else:
        matrices.append(_tiles(*(_pairs(*w[f"proj_out.{part}"].chunk(2)) for part in ("weight", "bias"))))
    vectors = [w[name] for name in ("start", "final_norm.weight") if name in w]
    for i in range(spec.layers):
        layer = f"layers.{i}"
        matrices += [matrix(f"{layer}.qkv"), matrix(f"{layer}.proj")]
        matrices.append(matrix(f"{layer}.gate", f"{layer}.up") if spec.mlp == "swiglu" else matrix(f"{layer}.up"))
        matrices.append(matrix(f"{layer}.down"))
        vectors += [weight for name, weight in w.items() if name.startswith(f"{layer}.") and "norm" in name]
    vector = torch.cat([v.float() for v in (*vectors, weights[0].new_zeros(0))])
    positions = w["pos_embed"].flip(0) if spec.flip and spec.positions else w.get("pos_embed")
    return Packed(torch.cat(matrices), vector, None if positions is None else positions.float().contiguous())


class Plan(NamedTuple):
    """Sizes of a call.

    stages: stages of the ring in shared memory. shared: bytes of shared memory per thread block. resident: whether
    all weights stay on chip. weights: bytes. vectors: floats. cache: values. workspace: floats.
    """

    stages: int
    shared: int
    resident: bool
    weights: int
    vectors: int
    cache: int
    workspace: int


@functools.lru_cache(maxsize=256)
def plan(fields: tuple[int, ...], arguments: tuple[int, ...]) -> Plan:
    """Return the sizes of a call; arguments: as `plan` in csrc/bindings/persistent.cpp."""
    stages, shared, resident, *sizes = OPS.persistent_schedule(fields, arguments)
    return Plan(stages, shared, bool(resident), *sizes)


def _arguments(z, prefix, guidance, device: cuda.Device) -> tuple[int, ...]:
    rows, L = len(z) * (1 if guidance is None else 2), 0 if prefix is None else prefix.shape[1]
    return rows, L, z.shape[1], device.limit, device.processors, STAGE_STEPS, MOST_STAGES


def refuse(z, weights, cond, prefix, cos, sin, guidance, spec_json: str, *others) -> str | None:
    """Return why the kernel cannot run a block, or None."""
    if z.device.type != "cuda":
        return f"it runs on a GPU, tokens are on {z.device}"
    sizes = cuda.device_sizes(z.device)
    return refuse_rounding(*others) or refuse_block(z, weights, prefix, guidance, spec_json, sizes)


def refuse_block(z, weights, prefix, guidance, spec_json: str, device: cuda.Device) -> str | None:
    """Return why the kernel cannot run a block on a device of these sizes, or None."""
    if reason := cuda.refuse_tensors(z, weights) or refuse_spec(BlockSpec.from_json(spec_json)):
        return reason
    rows, *others = _arguments(z, prefix, guidance, device)
    if rows > MOST_ROWS:
        return f"there are {rows} rows, guided ones counted twice; it takes {MOST_ROWS}"
    if not z.numel():
        return None
    sizes = plan(tuple(spec_fields(BlockSpec.from_json(spec_json), weights[0].dtype)), (rows, *others))
    if sizes.stages < LEAST_STAGES:
        return f"the activations of {rows} rows leave no room for weights in {device.limit} bytes of shared memory"
    return None


def block_inverse(
    z, weights, cond, prefix, cos, sin, guidance, spec_json: str, rule: str, temperature: float, quantize="none",
    known=None,
):  # fmt: skip
    """See reference.block_inverse."""
    spec, (B, T, _) = BlockSpec.from_json(spec_json), z.shape
    x = z.clone(memory_format=torch.contiguous_format)
    log_sigma = torch.zeros_like(x)
    if B and T:
        fields = tuple(spec_fields(spec, weights[0].dtype))
        prefix = None if prefix is None or not prefix.shape[1] else prefix
        arguments = _arguments(z, prefix, guidance, cuda.device_sizes(z.device))
        sizes, model = plan(fields, arguments), pack(spec, fake_quantize(spec, weights, quantize))
        cache, workspace = weights[0].new_empty(sizes.cache), x.new_zeros(sizes.workspace)
        cond, prefix, cos, sin, guidance = map(cuda.float32, (cond, prefix, cos, sin, guidance))
        given = model.buffer, model.vectors, fields, spec.affine.soft_clip, cache, workspace, model.positions
        context = cond, prefix, cos, sin, guidance, choice_index(rule, GuidanceRule), temperature, known
        with cuda.stream(z.device) as stream:
            OPS.persistent_inverse(x, log_sigma, *given, *context, arguments, stream)
    report(B * T, B * T)
    return x, log_sigma
