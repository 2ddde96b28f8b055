"""Flow block on the CPU, by the kernel in csrc/cpu/block.cpp; this module plans memory and threads."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._core.compiled import empty, refuse_tensors
from ..affine_flow.native import affine_flow
from ..affine_flow.reference import by_token
from ..spec import BlockSpec, GuidanceRule, choice_index
from .cache_budget import cache_bytes
from .packing import WeightCache, refuse_rounding, spec_fields
from .progress import report
from .quantize import fake_quantize

# Rows in sampling, and tokens in the density direction, that a team of threads takes at a time. They are enough to
# reuse each weight, and few enough for the caches; fewer where the weights are in an inner cache anyway.
SAMPLING_ROWS = 64
SMALL_SAMPLING_ROWS = 32
DENSITY_TOKENS = 128
# Longest kernel call in seconds (Python handles Ctrl-C between calls), and the speed of a slow core in floating point
# operations and bytes of weights per second.
CALL_SECONDS = 0.3
SLOW_FLOPS = 2e10
SLOW_BYTES = 4e9
# Typical speed of a core, and the work in seconds per token step from which another thread is worth its barriers.
FLOPS = 2e11
BYTES = 1e11
MEMBER_SECONDS = 8e-6
# Bytes of weights that fit into the inner caches of a core, and into its share of the outer cache.
SMALL_CACHE = 2**20
LARGE_CACHE = 2**24
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


class Packed(NamedTuple):
    """Weights in the layout of csrc/cpu/product.h: a float32 buffer, the offset of each weight, and the spec."""

    buffer: torch.Tensor
    offsets: list[int]
    fields: tuple[int, ...]


def tiles(weight: torch.Tensor) -> torch.Tensor:
    """Return (N, K) as [N / 16][K][16], or in bfloat16 as [N / 64][K / 2][64][2], in float32 bits.

    Both are padded by zeros to a multiple of 16 rows, so that the last of the groups of 64 may be narrower.
    """
    N, K = weight.shape
    pair, group = (1, 16) if weight.dtype == torch.float32 else (2, 64)
    weight = torch.nn.functional.pad(weight, (0, -K % pair, 0, -N % 16))
    whole = len(weight) // group * group
    groups = (weight[:whole], group), (weight[whole:], max(1, len(weight) - whole))
    parts = [rows.unflatten(1, (-1, pair)).unflatten(0, (-1, n)).transpose(1, 2).flatten() for rows, n in groups]
    return torch.cat(parts).view(torch.float32)


def vector(weight: torch.Tensor) -> torch.Tensor:
    """Return rows padded to a multiple of 16 values, as a flat float32 tensor."""
    return torch.nn.functional.pad(weight.float(), (0, -weight.shape[-1] % 16)).flatten()


def pack(spec: BlockSpec, weights: list[torch.Tensor], quantize: str) -> Packed:
    """Pack the weights for the kernel; a product without bias gets zeros as bias."""
    pieces, rounded = [], quantize == "bfloat16"
    for name, weight in zip(spec.weight_shapes, fake_quantize(spec, weights, quantize)):
        weight = weight.detach()
        if name == "pos_embed":
            pieces.append(vector(weight.flip(0) if spec.flip else weight))
        elif weight.ndim == 1:
            pieces.append(vector(weight))
        else:
            pieces.append(tiles(weight.bfloat16() if rounded else weight))
            if f"{name.removesuffix('weight')}bias" not in spec.weight_shapes:
                pieces.append(vector(weight.new_zeros(len(weight))))
    return join(pieces, fields(spec, weights[0].dtype, quantize))


def fields(spec: BlockSpec, dtype: torch.dtype, quantize: str) -> tuple[int, ...]:
    """Return the spec of a block with weights of this dtype as numbers."""
    rounded = quantize == "bfloat16"
    return tuple(spec_fields(spec, torch.bfloat16 if rounded else dtype, rounded))


def join(pieces: list[torch.Tensor], fields: tuple[int, ...]) -> Packed:
    """Return packed weights in one buffer."""
    sizes = [-(-len(piece) // 16) * 16 for piece in pieces]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    buffer = empty(sum(sizes))
    for piece, offset in zip(pieces, offsets):
        buffer[offset : offset + len(piece)] = piece
    return Packed(buffer, offsets, fields)


@functools.lru_cache(maxsize=1024)
def _places(spec_json: str, dtype: torch.dtype, *addresses: int) -> torch.Tensor:
    """Return the address and the number of bytes of each weight, (weights, 2)."""
    shapes = BlockSpec.from_json(spec_json).weight_shapes.values()
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    return torch.tensor([*zip(addresses, sizes)], dtype=torch.int64, device="cpu")


def fingerprint(spec_json: str, weights: list[torch.Tensor]) -> int:
    """Return a digest of the values of all weights, see csrc/bindings/fingerprint.cpp."""
    if not all(map(torch.Tensor.is_contiguous, weights)):
        weights = [weight.contiguous() for weight in weights]
    places = _places(spec_json, weights[0].dtype, *map(torch.Tensor.data_ptr, weights))
    return torch.ops.starflow_native.fingerprint(places)


packed = WeightCache(pack, fingerprint)


def refuse(x, *others) -> str | None:
    """Return why the kernels cannot run a block, or None."""
    weights = next(arg for arg in others if isinstance(arg, list))
    dtype = weights[0].dtype
    if reason := refuse_tensors((torch.float32,), x=x) or refuse_tensors(WEIGHT_DTYPES, weight=weights[0]):
        return reason
    if not torch.ops.starflow_native.has_bf16_products() and (reason := refuse_rounding(*others)):
        return f"{reason} on this processor (it needs avx512_bf16)"
    return "weights are of different dtypes" if any(w.dtype != dtype for w in weights) else None


def float32(value: torch.Tensor | None) -> torch.Tensor | None:
    """Return the values as a contiguous float32 tensor, the form that the kernels take."""
    return None if value is None else value.to(torch.float32).contiguous()


def token_seconds(weight_floats: int, rows: int) -> float:
    """Return the seconds that a slow core takes for one token per row."""
    return max(4 * weight_floats / SLOW_BYTES, 2 * rows * weight_floats / SLOW_FLOPS, 1e-9)


def call_tokens(weight_floats: int, rows: int) -> int:
    """Return the number of tokens per row in one kernel call."""
    return max(1, int(CALL_SECONDS / token_seconds(weight_floats, rows)))


def sampling_group(B: int, branches: int, weight_bytes: int, threads: int) -> int:
    """Return the number of sequences that a team of threads takes at a time.

    Threads that share rows read the weights once, and wait for each other at barriers. Threads with rows of their own
    each read all weights, which is faster if the weights fit into the inner caches or if there are many rows.
    """
    small = weight_bytes <= SMALL_CACHE
    worth = 1 if small else 8 if weight_bytes <= LARGE_CACHE else SAMPLING_ROWS
    rows, most = B * branches, SMALL_SAMPLING_ROWS if small else SAMPLING_ROWS
    groups = max(1, min(rows // worth, threads))
    if rows > groups * most:
        groups = -(-rows // (most * threads)) * threads
    return max(1, -(-B // groups))


def useful_threads(threads: int, groups: int, weight_floats: int, rows: int) -> int:
    """Return the number of threads with enough work per token step to be worth their barriers."""
    seconds = 2 * rows * weight_floats / FLOPS + 4 * weight_floats / BYTES
    return min(threads, groups * max(1, int(seconds / MEMBER_SECONDS)))


def network_outputs(x, weights, cond, prefix, cos, sin, spec_json: str, tokens: int = DENSITY_TOKENS) -> torch.Tensor:
    """Return the network's outputs (B, T, P) for data x (B, T, D) in the block's own order; tokens: tokens per pass."""
    spec = BlockSpec.from_json(spec_json)
    model, threads = packed(spec_json, weights, "none"), torch.get_num_threads()
    (B, T, _), L = x.shape, 0 if prefix is None else prefix.shape[1]
    x, cond, prefix, cos, sin = map(float32, (x, cond, prefix, cos, sin))
    params = x.new_empty(B, T, spec.affine.params_dim(spec.token_dim))
    group = max(1, min(-(-B // threads), tokens // (L + T)))
    chunk = max(1, tokens // group)
    cache_floats, floats = torch.ops.starflow_native.block_sizes(model.fields, group * chunk, L + T)
    cache, workspace = empty(group * threads * cache_floats), empty(threads * floats)
    step = max(threads * group, call_tokens(model.buffer.numel(), T + L))
    for b in range(0, B, step):
        rows = slice(b, b + step)
        torch.ops.starflow_native.block_run(
            x[rows],
            params[rows],
            None,
            model.buffer,
            model.offsets,
            model.fields,
            spec.affine.soft_clip,
            None if cond is None else cond[rows],
            None if prefix is None else prefix[rows],
            cos,
            sin,
            None,
            0,
            1.0,
            None,
            cache,
            workspace,
            [-L, T, group, chunk, threads, 0],
        )
    return params


def block_params(x, weights, cond, prefix, cos, sin, spec_json: str) -> torch.Tensor:
    """See reference.block_params."""
    spec = BlockSpec.from_json(spec_json)
    return by_token(network_outputs(x, weights, cond, prefix, cos, sin, spec_json), not spec.start, spec.flip)


def block_forward(x, weights, cond, prefix, cos, sin, spec_json: str, logdet: str):
    """See reference.block_forward."""
    spec = BlockSpec.from_json(spec_json)
    params = network_outputs(x, weights, cond, prefix, cos, sin, spec_json)
    return affine_flow(x, params, spec.affine.scale, spec.affine.soft_clip, not spec.start, spec.flip, logdet)


class SamplingPlan(NamedTuple):
    """Plan of memory and threads for a batch.

    part: sequences per part. group: sequences per team. threads: number of threads. step: tokens per kernel call.
    chunk: prefix slots per pass. cache, workspace: floats of KV cache and of workspace per part.
    """

    part: int
    group: int
    threads: int
    step: int
    chunk: int
    cache: int
    workspace: int


@functools.lru_cache(maxsize=256)
def plan_sampling(
    fields: tuple[int, ...],
    weight_floats: int,
    B: int,
    branches: int,
    cached: int,
    prefix: int,
    threads: int,
    budget: int,
) -> SamplingPlan:
    """Plan memory and threads for B sequences with `cached` cache slots each."""
    row = branches * torch.ops.starflow_native.block_sizes(fields, 1, cached)[0]
    part = max(1, min(B, budget // (4 * row)))
    group = sampling_group(part, branches, 4 * weight_floats, threads)
    threads = useful_threads(threads, -(-part // group), weight_floats, group * branches)
    chunk = max(1, min(prefix, DENSITY_TOKENS // (group * branches)))
    _, workspace = torch.ops.starflow_native.block_sizes(fields, group * branches * chunk, cached)
    # Attention multiplies with each cached value once.
    step = call_tokens(weight_floats + row // branches, part * branches)
    return SamplingPlan(part, group, threads, step, chunk, part * row, threads * workspace)


class _Parts:
    """Batch of the sampling direction, in parts whose KV cache fits into `cache_bytes`."""

    def __init__(self, z, weights, cond, prefix, cos, sin, guidance, spec_json, rule, temperature, quantize, known):
        self.spec, self.model = BlockSpec.from_json(spec_json), packed(spec_json, weights, quantize)
        (self.B, self.T, _), self.L = z.shape, 0 if prefix is None else prefix.shape[1]
        self.branches = 1 if guidance is None else 2
        self.threads = torch.get_num_threads()
        self.first = 0 if self.spec.start else 1
        # Numbers of slots whose inputs are known: of all samples, and of the one with the most.
        self.filled = self.most_filled = 0
        if known is not None and self.B:
            self.filled, self.most_filled = (max(0, int(n) - self.first) for n in known.aminmax())
        cached = self.L + self.T
        floats = self.model.buffer.numel()
        self.plan = plan_sampling(
            self.model.fields,
            floats,
            self.B,
            self.branches,
            cached,
            max(self.L, self.most_filled),
            self.threads,
            cache_bytes(),
        )
        self.cache = empty(self.plan.cache)
        self._context = tuple(map(float32, (cond, prefix, cos, sin, guidance)))
        self._rule = choice_index(rule, GuidanceRule), temperature

    def __iter__(self) -> Iterator[slice]:
        """Iterate over the rows of each part."""
        return (slice(b, b + self.plan.part) for b in range(0, self.B, self.plan.part))

    def arguments(self, rows: slice) -> tuple:
        """Return model, context and rule of a part, in the order of the native ops."""
        model, (cond, prefix, cos, sin, guidance) = self.model, self._context
        given = (self._both_branches(cond, rows), self._both_branches(prefix, rows), cos, sin)
        weights = None if guidance is None else guidance[rows]
        return (model.buffer, model.offsets, model.fields, self.spec.affine.soft_clip, *given, weights, *self._rule)

    def _both_branches(self, value: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
        """Return these rows of both branches of a value (branches B, ...)."""
        if value is None or self.plan.part == self.B:
            return value
        return value.unflatten(0, (self.branches, self.B))[:, rows].flatten(0, 1).contiguous()


def block_inverse(
    z, weights, cond, prefix, cos, sin, guidance, spec_json: str, rule: str, temperature: float, quantize="none",
    known=None,
):  # fmt: skip
    """See reference.block_inverse."""
    parts = _Parts(z, weights, cond, prefix, cos, sin, guidance, spec_json, rule, temperature, quantize, known)
    plan, B, T = parts.plan, parts.B, parts.T
    x, log_sigma, workspace = empty(*z.shape), empty(*z.shape), empty(plan.workspace)
    torch.ops.starflow_native.start(z.contiguous(), x, log_sigma)
    last = T - parts.first
    for rows in parts:
        arguments = *parts.arguments(rows), None if known is None else known[rows]
        state, scales = (x, log_sigma) if plan.part >= B else (x[rows], log_sigma[rows])
        for first in range(-parts.L, last, plan.step):
            end = min(first + plan.step, last)
            steps = [first, end, plan.group, plan.chunk, plan.threads, parts.filled]
            torch.ops.starflow_native.block_run(state, None, scales, *arguments, parts.cache, workspace, steps)
            report(rows.start * T + max(0, end + T - last) * len(state), B * T)
    return x, log_sigma


def block_jacobi(
    z,
    guess,
    weights,
    cond,
    prefix,
    cos,
    sin,
    guidance,
    neighbours: list[int],
    spec_json: str,
    rule: str,
    temperature: float,
    window: int,
    slide: bool,
    tol: float,
    quantize: str = "none",
    known=None,
):
    """Solve by Jacobi sweeps, see jacobi.block_jacobi; every sequence takes its own number of sweeps."""
    parts = _Parts(z, weights, cond, prefix, cos, sin, guidance, spec_json, rule, temperature, quantize, known)
    plan, model, (B, T, D) = parts.plan, parts.model, z.shape
    places, sweeps = z.new_zeros(B, 7, dtype=torch.int64), z.new_zeros(B, T, dtype=torch.int32)
    residual = z.new_zeros(B)
    memory = z.new_zeros(B, torch.ops.starflow_native.jacobi_floats(T, D, len(neighbours)))
    places[:, 0] = parts.first if known is None else known.clamp(min=parts.first)
    final = torch.arange(T, dtype=torch.int64, device="cpu") < places[:, :1]
    z, x = z.contiguous(), torch.where((final.flip(1) if parts.spec.flip else final)[:, :, None], z, guess).contiguous()
    log_sigma, filled = torch.zeros_like(x), min(parts.most_filled, T - parts.first)
    evaluated = parts.branches * window
    threads = useful_threads(parts.threads, plan.part, model.buffer.numel(), evaluated)
    floats = threads * torch.ops.starflow_native.block_sizes(model.fields, evaluated, parts.L + T)[1]
    workspace = empty(max(floats, plan.workspace))
    for rows in parts:
        arguments, done, failed = parts.arguments(rows), places[rows, 0], places[rows, 4]
        if parts.L or filled:
            chunks = [-parts.L, filled, plan.group, plan.chunk, plan.threads, filled]
            torch.ops.starflow_native.block_run(
                x[rows], None, log_sigma[rows], *arguments, None, parts.cache, workspace, chunks
            )
        passes = call_tokens(model.buffer.numel(), evaluated * -(-len(done) // threads))
        while ((done < T) & (failed == 0)).any():
            torch.ops.starflow_native.block_jacobi(
                x[rows], log_sigma[rows], z[rows], *arguments, neighbours, tol, places[rows], sweeps[rows],
                residual[rows], memory[rows], parts.cache, workspace, [window, slide, passes, threads],
            )  # fmt: skip
            report(int(places[:, 0].sum()), B * T)
    return x, log_sigma, sweeps, places[:, 2:5].clone(), residual
