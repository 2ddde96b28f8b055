"""The inverse of a small block on a GPU, all steps in one launch: plans for the kernel of csrc/cuda/onchip.h."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..spec import BlockSpec
from .packing import Remembered, spec_fields
from .progress import report

OPS = torch.ops.starflow_cuda


class Packed(NamedTuple):
    """Weights as they lie in shared memory, see csrc/cuda/plan.h, one thread block of a cluster after the other, in one
    float32 buffer; the position table stays in device memory."""

    buffer: torch.Tensor
    positions: torch.Tensor | None


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) as [K / 4][N][4]; in bfloat16 as [N / 16][K / 16][32][8], the fragments of a warp's lanes, see
    csrc/cuda/device.h. K is padded with zeros."""
    N, K = weight.shape
    if weight.dtype == torch.float32:
        return torch.nn.functional.pad(weight, (0, -K % 4)).view(N, -1, 4).transpose(0, 1)
    weight = torch.nn.functional.pad(weight, (0, -K % 16))
    tiles = weight.view(N // 16, 2, 8, -(-K // 16), 2, 4, 2)
    return tiles.permute(0, 3, 2, 5, 4, 1, 6)


def _bits(piece: torch.Tensor) -> torch.Tensor:
    """Flat float32 bits, padded to 16 bytes."""
    piece = piece.flatten()
    return torch.nn.functional.pad(piece, (0, -len(piece) % (16 // piece.element_size()))).view(torch.float32)


def pack(spec: BlockSpec, weights: list[torch.Tensor], cluster: int = 1) -> Packed:
    """Copy of the weights for the kernel: each thread block of a cluster has its share of the rows of every matrix."""
    given, pieces = dict(zip(spec.weight_shapes, map(torch.Tensor.detach, weights))), []
    positions = given.pop("pos_embed", None)
    if positions is not None:
        positions = (positions.flip(0) if spec.flip else positions).float().contiguous()
    unit = 16 if weights[0].dtype == torch.bfloat16 else 1
    for rank in range(cluster):
        for name, weight in given.items():
            if name.startswith("proj_text"):
                continue
            matrix = given[name.replace(".bias", ".weight")]
            if matrix.ndim == 2:
                share = -(-len(matrix) // (cluster * unit)) * unit
                weight = weight[rank * share :][:share]
                weight = torch.nn.functional.pad(weight, (0, 0) * (weight.ndim - 1) + (0, share - len(weight)))
            pieces.append(_bits(_matrix(weight) if weight.ndim == 2 else weight.float()))
    return Packed(torch.cat(pieces), positions)


packed = {cluster: Remembered(functools.partial(pack, cluster=cluster)) for cluster in (1, 2, 4, 8)}
_dtype = operator.attrgetter("dtype")


class Plan(NamedTuple):
    """Thread blocks of a cluster, samples of it, 0 where none fits; whether their KV cache is on chip; and of a thread
    block: bytes of the weights, values of cache of a sample, bytes of shared memory with one sample."""

    cluster: int
    group: int
    on_chip: bool
    weights: int
    cache: int
    one: int


class Device(NamedTuple):
    """Bytes of shared memory that a thread block may have, the number of processors, and the most thread blocks of a
    cluster, 1 where there are none."""

    limit: int
    processors: int
    cluster: int


@functools.lru_cache(maxsize=256)
def plan(fields: tuple[int, ...], T: int, copies: int, B: int, limit: int, processors: int, cluster: int) -> Plan:
    """Plan for B samples of T tokens, of 1 or 2 rows each, on a `Device`."""
    return Plan(*OPS.onchip_plan(fields, T, copies, B, limit, processors, cluster))


def does_not_fit(plan: Plan, limit: int) -> str | None:
    """Why not one sample fits in the shared memory of a thread block, or of a cluster's, or None."""
    if plan.group:
        return None
    tried = ", ".join(str(2**i) for i in range(plan.cluster.bit_length()))
    return (
        f"a thread block has {limit} bytes of shared memory; in a cluster of {plan.cluster} (tried: {tried}) one "
        f"sample needs {plan.one} of each without its KV cache: {plan.weights} of weights and "
        f"{plan.one - plan.weights} of activations"
    )


def device_sizes(device: torch.device) -> Device:
    """What plans depend on. Clusters are of compute capability 9 and later."""
    found = torch.cuda.get_device_properties(device)
    return Device(found.shared_memory_per_block_optin, found.multi_processor_count, 8 if found.major >= 9 else 1)


@contextlib.contextmanager
def _stream(device: torch.device) -> Iterator[int]:
    with torch.cuda.device(device):
        yield torch.cuda.current_stream().cuda_stream


def refuse(z, weights, cond, prefix, cos, sin, guidance, text: str, rule: str, temperature: float) -> str | None:
    """Why the kernel cannot run a block, or None."""
    if z.device.type != "cuda":
        return f"it runs on a GPU, tokens are on {z.device}"
    return refuse_block(z, weights, prefix, guidance, text, device_sizes(z.device))


def refuse_block(z, weights, prefix, guidance, text: str, device: Device) -> str | None:
    """The same for a device of those sizes."""
    if z.dtype != torch.float32:
        return f"tokens are {z.dtype}, it takes float32"
    dtype = weights[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"weights are {dtype}, it takes float32 and bfloat16"
    if set(map(_dtype, weights)) != {dtype}:
        return "weights are of different dtypes"
    if prefix is not None:
        return "there are states in front of the tokens, it takes tokens alone"
    B, T, _ = z.shape
    fields, copies = tuple(spec_fields(BlockSpec.from_json(text), dtype)), 1 if guidance is None else 2
    return does_not_fit(plan(fields, T, copies, B, *device), device.limit)


def _plain(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.to(torch.float32).contiguous()


def block_inverse(z, weights, cond, prefix, cos, sin, guidance, text: str, rule: str, temperature: float):
    """Data of noise in one launch."""
    spec, (B, T, _), device = BlockSpec.from_json(text), z.shape, device_sizes(z.device)
    x, fields = z.clone(memory_format=torch.contiguous_format), tuple(spec_fields(spec, weights[0].dtype))
    chosen = plan(fields, T, 1 if guidance is None else 2, B, *device)
    if B and T:
        model = packed[chosen.cluster](text, weights)
        context = map(_plain, (cond, cos, sin, guidance))
        which = ("tarflow", "starflow").index(rule), temperature
        blocks = min(-(-B // chosen.group), device.processors // chosen.cluster) * chosen.cluster
        cache = None
        if not chosen.on_chip:
            cache = weights[0].new_empty(blocks * chosen.group * chosen.cache)
        given = model.buffer, fields, spec.affine.soft_clip, cache, model.positions
        with _stream(z.device) as stream:
            OPS.onchip_inverse(x, *given, *context, *which, [chosen.cluster, chosen.group, blocks, stream])
    report(B * T, B * T)
    return x
