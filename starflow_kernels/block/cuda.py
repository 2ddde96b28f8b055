"""Inverse of a small block on a GPU with all steps in one launch, by the kernel in csrc/cuda/onchip.h."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..spec import BlockSpec, GuidanceRule, choice_index
from .packing import refuse_rounding, refuse_spec, spec_fields
from .progress import report
from .quantize import fake_quantize

OPS = torch.ops.starflow_cuda


class Packed(NamedTuple):
    """Weights in the layout of csrc/cuda/plan.h, for one thread block of a cluster after the other.

    buffer: weights for the shared memory, as float32 bits. positions: position table, which stays in device memory.
    """

    buffer: torch.Tensor
    positions: torch.Tensor | None


def _matrix(index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a float32 matrix (N, K) as [K / 4][N][4], with K padded by zeros.

    A bfloat16 matrix becomes [N / 16][K / 16][32][8], the fragments of the lanes of a warp, see csrc/cuda/device.h.
    """
    N, K = index.shape
    if dtype == torch.float32:
        return torch.nn.functional.pad(index, (0, -K % 4)).view(N, -1, 4).transpose(0, 1)
    index = torch.nn.functional.pad(index, (0, -K % 16))
    tiles = index.view(N // 16, 2, 8, -(-K // 16), 2, 4, 2)
    return tiles.permute(0, 3, 2, 5, 4, 1, 6)


def _float32_bits(index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a vector as float32; the bits of a bfloat16 value are the upper half of those of the float32."""
    return index if dtype == torch.float32 else torch.stack([torch.zeros_like(index), index], -1)


@functools.lru_cache(maxsize=256)
def _layout(spec_json: str, dtype: torch.dtype, cluster: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the index of every packed value in all weights behind a zero, and the number of values in the buffer.

    Each thread block of a cluster gets a share of the rows of every matrix. The position table comes last.
    """
    spec, indices, pieces, first = BlockSpec.from_json(spec_json), {}, [], 1
    for name, shape in spec.weight_shapes.items():
        size = math.prod(shape)
        indices[name] = torch.arange(first, first + size, dtype=torch.int32, device="cpu").view(shape)
        first += size
    positions = indices.pop("pos_embed", None)
    unit = 16 if dtype == torch.bfloat16 else 1
    for rank in range(cluster):
        for name, index in indices.items():
            if name.startswith("proj_text"):
                continue
            matrix = indices[name.replace(".bias", ".weight")]
            if matrix.ndim == 2:
                share = -(-len(matrix) // (cluster * unit)) * unit
                index = index[rank * share :][:share]
                index = torch.nn.functional.pad(index, (0, 0) * (index.ndim - 1) + (0, share - len(index)))
            piece = (_matrix if index.ndim == 2 else _float32_bits)(index, dtype).flatten()
            pieces.append(torch.nn.functional.pad(piece, (0, -len(piece) % (16 // dtype.itemsize))))
    size = sum(map(len, pieces))
    if positions is not None:
        pieces.append(_float32_bits(positions.flip(0) if spec.flip else positions, dtype).flatten())
    return torch.cat(pieces).to(device), size


def pack(spec: BlockSpec, weights: list[torch.Tensor], cluster: int = 1) -> Packed:
    """Pack the weights for the kernel, in three launches: cheaper than to find out whether they have changed."""
    weights = [weight.detach().flatten() for weight in weights]
    index, size = _layout(spec.to_json(), weights[0].dtype, cluster, weights[0].device)
    values = torch.cat([weights[0].new_zeros(1), *weights]).index_select(0, index)
    positions = values[size:].view(torch.float32).view(-1, spec.channels) if spec.positions else None
    return Packed(values[:size].view(torch.float32), positions)


class Plan(NamedTuple):
    """Plan of a launch, in numbers.

    cluster: thread blocks per cluster. group: samples per cluster, 0 if not even one fits. on_chip: whether the KV
    cache lies in shared memory. weights: bytes of weights per thread block. cache: values of KV cache per sample and
    thread block. one: bytes of shared memory per thread block with one sample. step: estimated nanoseconds of a token
    step, by csrc/cuda/choice.h.
    """

    cluster: int
    group: int
    on_chip: bool
    weights: int
    cache: int
    one: int
    step: int


class Device(NamedTuple):
    """Sizes of a device that a plan depends on.

    limit: bytes of shared memory per thread block. processors: number of multiprocessors. cluster: largest number of
    thread blocks per cluster, 1 if the device has no clusters.
    """

    limit: int
    processors: int
    cluster: int


@functools.lru_cache(maxsize=256)
def plan(fields: tuple[int, ...], T: int, branches: int, B: int, limit: int, processors: int, cluster: int) -> Plan:
    """Return the plan for B samples of T tokens with 1 or 2 branches each; the last arguments describe a `Device`."""
    return Plan(*OPS.onchip_plan(fields, T, branches, B, limit, processors, cluster))


def does_not_fit(plan: Plan, limit: int) -> str | None:
    """Return why no sample fits into the shared memory of a cluster, or None."""
    if plan.group:
        return None
    tried = ", ".join(str(2**i) for i in range(plan.cluster.bit_length()))
    return (
        f"a thread block has {limit} bytes of shared memory; in a cluster of {plan.cluster} (tried: {tried}) one "
        f"sample needs {plan.one} of each without its KV cache: {plan.weights} of weights and "
        f"{plan.one - plan.weights} of activations"
    )


def device_sizes(device: torch.device) -> Device:
    """Return the sizes of a device; clusters need compute capability 9."""
    device = torch.cuda.get_device_properties(device)
    return Device(device.shared_memory_per_block_optin, device.multi_processor_count, 8 if device.major >= 9 else 1)


@contextlib.contextmanager
def stream(device: torch.device) -> Iterator[int]:
    """Make a device the current one and give the address of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def refuse(z, weights, cond, prefix, cos, sin, guidance, spec_json: str, *others) -> str | None:
    """Return why the kernel cannot run a block, or None."""
    if z.device.type != "cuda":
        return f"it runs on a GPU, tokens are on {z.device}"
    return refuse_rounding(*others) or refuse_block(z, weights, prefix, guidance, spec_json, device_sizes(z.device))


def refuse_tensors(z: torch.Tensor, weights: list[torch.Tensor]) -> str | None:
    """Return why the kernels of csrc/cuda cannot take tokens or weights of these dtypes, or None."""
    if z.dtype != torch.float32:
        return f"tokens are {z.dtype}, it takes float32"
    dtype = weights[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"weights are {dtype}, it takes float32 and bfloat16"
    return "weights are of different dtypes" if any(w.dtype != dtype for w in weights) else None


def refuse_block(z, weights, prefix, guidance, spec_json: str, device: Device) -> str | None:
    """Return why the kernel cannot run a block on a device of these sizes, or None."""
    if reason := refuse_tensors(z, weights):
        return reason
    if prefix is not None:
        return "it takes no prefix"
    if reason := refuse_spec(BlockSpec.from_json(spec_json)):
        return reason
    B, T, _ = z.shape
    fields = tuple(spec_fields(BlockSpec.from_json(spec_json), weights[0].dtype))
    return does_not_fit(plan(fields, T, 1 if guidance is None else 2, B, *device), device.limit)


def float32(value: torch.Tensor | None) -> torch.Tensor | None:
    """Return the values as a contiguous float32 tensor, the form that the kernels take."""
    return None if value is None else value.to(torch.float32).contiguous()


def block_inverse(
    z, weights, cond, prefix, cos, sin, guidance, spec_json: str, rule: str, temperature: float, quantize="none",
    known=None,
):  # fmt: skip
    """See reference.block_inverse."""
    spec, (B, T, _), device = BlockSpec.from_json(spec_json), z.shape, device_sizes(z.device)
    x, fields = z.clone(memory_format=torch.contiguous_format), tuple(spec_fields(spec, weights[0].dtype))
    log_sigma, launch = torch.zeros_like(x), plan(fields, T, 1 if guidance is None else 2, B, *device)
    if B and T:
        model = pack(spec, fake_quantize(spec, weights, quantize), launch.cluster)
        context = map(float32, (cond, cos, sin, guidance))
        options = choice_index(rule, GuidanceRule), temperature, known
        blocks = min(-(-B // launch.group), device.processors // launch.cluster) * launch.cluster
        cache = None
        if not launch.on_chip:
            cache = weights[0].new_empty(blocks * launch.group * launch.cache)
        given = model.buffer, fields, spec.affine.soft_clip, cache, model.positions
        with stream(z.device) as on:
            OPS.onchip_inverse(x, log_sigma, *given, *context, *options, [launch.cluster, launch.group, blocks, on])
    report(B * T, B * T)
    return x, log_sigma
