"""Solve of J^T u = g on the CPU, J the Jacobian of a block, by the kernel in csrc/cpu/transposed.cpp.

A density pass stores what the gradient of each token needs. Then u is computed token by token, from the last one of the
block's own order to the first, as sampling computes x from the first to the last.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._core.compiled import empty
from ..spec import BlockSpec
from . import native
from .cache_budget import cache_bytes
from .native import (
    DENSITY_TOKENS,
    Packed,
    call_tokens,
    fingerprint,
    float32,
    join,
    packed,
    sampling_group,
    tiles,
    useful_threads,
    vector,
)
from .packing import WeightCache, refuse_spec


def refuse(x, g, weights, cond, prefix, cos, sin, spec_json: str, *others) -> str | None:
    """Return why the kernel cannot solve for a block, or None."""
    return refuse_spec(BlockSpec.from_json(spec_json)) or native.refuse(x, weights)


def pack_transposed(spec: BlockSpec, weights: list[torch.Tensor]) -> Packed:
    """Pack the transposed matrices that act on tokens, each with zeros as bias."""
    pieces = []
    for name, weight in zip(spec.weight_shapes, weights):
        if weight.ndim == 2 and name not in ("pos_embed", "proj_text.weight"):
            weight = weight.detach().T
            pieces += [tiles(weight), vector(weight.new_zeros(len(weight)))]
    return join(pieces, native.fields(spec, weights[0].dtype, "none"))


packed_transposed = WeightCache(pack_transposed, fingerprint)


def _spans(first: int, last: int, step: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + step, last)) for at in range(first, last, step))


def block_inverse_backward(x, g, weights, cond, prefix, cos, sin, spec_json: str, known=None) -> torch.Tensor:
    """See reference.block_inverse_backward."""
    spec = BlockSpec.from_json(spec_json)
    (B, T, _), L = x.shape, 0 if prefix is None else prefix.shape[1]
    slots = T if spec.start else T - 1
    if not slots:
        return g.clone()
    model, back = packed(spec_json, weights, "none"), packed_transposed(spec_json, weights)
    x, g, cond, prefix, cos, sin = map(float32, (x, g, cond, prefix, cos, sin))
    sizes, floats = torch.ops.starflow_native.transposed_sizes, model.buffer.numel()
    cache = 2 * torch.ops.starflow_native.block_sizes(model.fields, 1, L + T)[0]
    kept, heads, _ = sizes(model.fields, T, L, 1, 1)
    params = T * spec.affine.params_dim(spec.token_dim)
    part = max(1, min(B, cache_bytes() // (4 * (cache + kept + heads + params))))
    threads = torch.get_num_threads()
    group = sampling_group(part, 1, 4 * floats, threads)
    chunk = max(1, DENSITY_TOKENS // group)
    threads = useful_threads(threads, -(-part // group), floats, group)
    step = call_tokens(floats + cache, part)
    chunks = -(-step // chunk) * chunk
    u = torch.zeros_like(x)
    workspace = empty(threads * sizes(model.fields, T, L, group, chunk)[2])
    memory = [empty(part * size) for size in (params, cache, kept, heads)]
    for b in range(0, B, part):
        rows = slice(b, min(b + part, B))
        own_params, *own = (t[: (rows.stop - b) * (len(t) // part)] for t in memory)
        arguments = (
            *(x[rows], g[rows], u[rows], own_params, model.buffer, model.offsets, back.buffer, back.offsets),
            *(model.fields, spec.affine.soft_clip, *(None if t is None else t[rows] for t in (cond, prefix))),
            *(cos, sin, None if known is None else known[rows], *own, workspace),
        )
        for first, last in (*_spans(-L, 0, chunks), *_spans(0, slots, chunks)):
            torch.ops.starflow_native.block_transposed(*arguments, [first, last, group, chunk, threads, 0])
        for first, last in reversed([*_spans(0, slots, step)]):
            torch.ops.starflow_native.block_transposed(*arguments, [first, last, group, chunk, threads, 1])
    return u
