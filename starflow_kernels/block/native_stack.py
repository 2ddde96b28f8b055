"""Blocks one after the other on the CPU, in one call of csrc/bindings/stack.cpp."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .._core.compiled import empty
from ..spec import BlockSpec, GuidanceRule, choice_index
from .cache_budget import cache_bytes
from .native import (
    CALL_SECONDS,
    DENSITY_TOKENS,
    fields,
    float32,
    packed,
    sampling_group,
    token_seconds,
    useful_threads,
)


class BlockCall(NamedTuple):
    """Arguments of the op `block_inverse` for one block, in its own order; state: the one of its weights."""

    weights: list[torch.Tensor]
    state: int
    context: tuple[torch.Tensor | None, ...]  # cond, prefix, cos, sin, guidance
    spec: BlockSpec
    rule: GuidanceRule
    temperature: float
    quantize: str


class BlockSize(NamedTuple):
    """Size of a block in a call: its spec, floats of weights, rows per sequence and slots of the prefix."""

    fields: tuple[int, ...]
    weights: int
    branches: int
    prefix: int


@functools.lru_cache(maxsize=256)
def _form(spec_json: str) -> torch.Tensor:
    """Return the number of dimensions and the sizes of each weight, one after the other."""
    shapes = BlockSpec.from_json(spec_json).weight_shapes.values()
    return torch.tensor([n for shape in shapes for n in (len(shape), *shape)], dtype=torch.int64, device="cpu")


def weight_states(weights: list[list[torch.Tensor]], specs: list[BlockSpec]) -> list[int] | None:
    """Return what `packed` knows each block's weights by; None if some do not fit their spec, or the kernels."""
    forms = [_form(spec.to_json()) for spec in specs]
    found = torch.ops.starflow_native.fingerprints.default([each for own in weights for each in own], forms)
    return found[1::2] if all(found[::2]) else None


@functools.lru_cache(maxsize=256)
def _size(spec_json: str, dtype: torch.dtype, quantize: str, branches: int, prefix: int) -> BlockSize:
    spec = BlockSpec.from_json(spec_json)
    values = sum(map(math.prod, spec.weight_shapes.values()))
    itemsize = 2 if quantize == "bfloat16" else dtype.itemsize
    return BlockSize(fields(spec, dtype, quantize), values * itemsize // 4, branches, prefix)


class StackPlan(NamedTuple):
    """Plan of memory and threads, as `SamplingPlan`. chunks: prefix slots per pass of each block."""

    group: int
    threads: int
    chunks: list[int]
    cache: int
    workspace: int


@functools.lru_cache(maxsize=256)
def plan_stack(blocks: tuple[BlockSize, ...], B: int, T: int, threads: int, budget: int) -> StackPlan | None:
    """Plan memory and threads for B sequences of T tokens; None if the call needs more time or memory than it may."""
    seconds = 0.0
    for size in blocks:
        slots = size.prefix + T
        # Attention multiplies with each cached value once; on average, half of them are there.
        attended = torch.ops.starflow_native.block_sizes(size.fields, 1, slots)[0] // 2
        seconds += slots * token_seconds(size.weights + attended, B * size.branches)
    if seconds > CALL_SECONDS:
        return None
    weights, branches = max(size.weights for size in blocks), max(size.branches for size in blocks)
    group = sampling_group(B, branches, 4 * weights, threads)
    threads = useful_threads(threads, -(-B // group), weights, group * branches)
    chunks = [max(1, min(size.prefix, DENSITY_TOKENS // (group * size.branches))) for size in blocks]
    passed = max(group * size.branches * chunk for size, chunk in zip(blocks, chunks))
    sizes = [torch.ops.starflow_native.block_sizes(size.fields, passed, size.prefix + T) for size in blocks]
    cache = threads * group * max(size.branches * row for size, (row, _) in zip(blocks, sizes))
    workspace = threads * max(floats for _, floats in sizes)
    return StackPlan(group, threads, chunks, cache, workspace) if 4 * cache <= budget else None


def stack_inverse(
    z: torch.Tensor, blocks: list[BlockCall]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]] | None:
    """Run the blocks, the last one first.

    Args:
        z: (B, T, D) noise.
        blocks: arguments of each of the K blocks.

    Returns:
        Results x and log sigma (B, T, D) and the seconds of each block; None if a call may not do all of it, or if an
        input or a result is not finite.
    """
    B, T, D = z.shape
    sizes = []
    for weights, _, (_, prefix, _, _, guidance), spec, _, _, quantize in blocks:
        branches, length = 1 if guidance is None else 2, 0 if prefix is None else prefix.shape[1]
        sizes.append(_size(spec.to_json(), weights[0].dtype, quantize, branches, length))
    # Planned before the weights are read, which takes long where the answer is no.
    plan = plan_stack(tuple(sizes), B, T, torch.get_num_threads(), cache_bytes())
    if plan is None:
        return None
    models = [packed(block.spec.to_json(), block.weights, block.quantize, state=block.state) for block in blocks]
    # Views of one tensor would share memory and a version counter, so that a change of one would affect the others.
    x, log_sigma = ([torch.empty(B, T, D, dtype=torch.float32, device="cpu") for _ in blocks] for _ in range(2))
    offsets, context, numbers, numbered = [], [], [], [plan.group, plan.threads]
    for model, block, chunk in zip(models, blocks, plan.chunks):
        offsets += model.offsets
        context += map(float32, block.context)
        numbers += block.spec.affine.soft_clip, block.temperature
        numbered += *model.fields, choice_index(block.rule, GuidanceRule), chunk, len(model.offsets)
    seconds = torch.ops.starflow_native.stack_run.default(
        z.contiguous(), x, log_sigma, [model.buffer for model in models], offsets, context, numbers,
        empty(plan.cache), empty(plan.workspace), numbered,
    )  # fmt: skip
    return (x, log_sigma, seconds) if seconds else None
