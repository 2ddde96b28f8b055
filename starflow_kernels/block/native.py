"""A whole flow block on the CPU: plans memory and threads for the kernel of csrc/cpu/block.cpp."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .._core.compiled import empty
from ..affine_flow.native import affine_flow
from ..spec import BlockSpec
from .cache_budget import cache_bytes
from .packing import Remembered, spec_fields
from .progress import report

# Rows that one team of threads takes at a time: enough to use each weight often, few enough for the caches.
SAMPLING_ROWS, DENSITY_TOKENS = 64, 128
# A call of the kernel should last about this long, in seconds at a tenth of the usual speed: Python handles Ctrl-C
# between calls.
CALL_SECONDS, SLOW_FLOPS, SLOW_BYTES = 0.3, 2e10, 4e9
# Rough speed of one core, and what a member of a team needs to do in a token step to be worth its barriers.
FLOPS, BYTES, MEMBER_SECONDS = 2e11, 1e11, 8e-6
SMALL_CACHE, LARGE_CACHE = 2**20, 2**24


class Packed(NamedTuple):
    """Weights in the layout of csrc/cpu/product.h, all in one float32 buffer."""

    buffer: torch.Tensor
    offsets: list[int]
    fields: tuple[int, ...]


def _tiles(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) as [N / 16][K][16], in bfloat16 as [N / 16][K / 2][16][2]; flat float32 bits, zeros where it is padded."""
    N, K = weight.shape
    pair = 1 if weight.dtype == torch.float32 else 2
    weight = torch.nn.functional.pad(weight, (0, -K % pair, 0, -N % 16))
    return weight.view(-(-N // 16), 16, -1, pair).transpose(1, 2).contiguous().view(torch.float32).flatten()


def _vector(weight: torch.Tensor) -> torch.Tensor:
    """Rows padded to 16 values, flat float32."""
    return torch.nn.functional.pad(weight.float(), (0, -weight.shape[-1] % 16)).flatten()


def pack(spec: BlockSpec, weights: list[torch.Tensor]) -> Packed:
    """Copy of the weights for the kernel. A product without bias gets zeros."""
    pieces = []
    for name, weight in zip(spec.weight_shapes, weights):
        weight = weight.detach()
        if name == "pos_embed":
            pieces.append(_vector(weight.flip(0) if spec.flip else weight))
        elif weight.ndim == 1:
            pieces.append(_vector(weight))
        else:
            pieces.append(_tiles(weight))
            if f"{name.removesuffix('weight')}bias" not in spec.weight_shapes:
                pieces.append(_vector(torch.zeros(len(weight))))
    sizes = [-(-len(piece) // 16) * 16 for piece in pieces]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    buffer = empty(sum(sizes))
    for piece, offset in zip(pieces, offsets):
        buffer[offset : offset + len(piece)] = piece
    return Packed(buffer, offsets, tuple(spec_fields(spec, weights[0].dtype)))


packed, _dtype = Remembered(pack), operator.attrgetter("dtype")


def refuse(x, weights, *others) -> str | None:
    """Why the kernels cannot run a block, or None."""
    if x.device.type != "cpu":
        return f"it runs on the CPU, tokens are on {x.device}"
    if x.dtype != torch.float32:
        return f"tokens are {x.dtype}, it takes float32"
    dtype = weights[0].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"weights are {dtype}, it takes float32 and bfloat16"
    if set(map(_dtype, weights)) != {dtype}:
        return "weights are of different dtypes"
    return None


def _plain(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.to(torch.float32).contiguous()


def _call_tokens(weight_floats: int, rows: int) -> int:
    """Tokens a row in one call of the kernel."""
    seconds = max(4 * weight_floats / SLOW_BYTES, 2 * rows * weight_floats / SLOW_FLOPS)
    return max(1, int(CALL_SECONDS / max(seconds, 1e-9)))


def _sampling_group(B: int, copies: int, weight_bytes: int, threads: int) -> int:
    """Sequences that a team takes at a time.

    Threads that share their rows read the weights once between them and meet at barriers; threads with rows of their
    own read all the weights each, which is better where those fit the inner caches or the rows are many.
    """
    worth = 1 if weight_bytes <= SMALL_CACHE else 8 if weight_bytes <= LARGE_CACHE else SAMPLING_ROWS
    rows = B * copies
    groups = max(1, min(rows // worth, threads))
    if rows > groups * SAMPLING_ROWS:
        groups = -(-rows // (SAMPLING_ROWS * threads)) * threads
    return max(1, -(-B // groups))


def _useful_threads(threads: int, groups: int, weight_floats: int, rows: int) -> int:
    """Threads that pay for their barriers: every one needs some microseconds of a token step to itself."""
    seconds = 2 * rows * weight_floats / FLOPS + 4 * weight_floats / BYTES
    return min(threads, groups * max(1, int(seconds / MEMBER_SECONDS)))


def block_params(x, weights, cond, prefix, cos, sin, text: str, tokens: int = DENSITY_TOKENS) -> torch.Tensor:
    """Raw parameters (B, T, P) in the block's own order of data x (B, T, D); `tokens` of them in one pass."""
    spec = BlockSpec.from_json(text)
    model, threads = packed(text, weights), torch.get_num_threads()
    (B, T, _), L = x.shape, 0 if prefix is None else prefix.shape[1]
    x, cond, prefix, cos, sin = map(_plain, (x, cond, prefix, cos, sin))
    params = x.new_empty(B, T, spec.affine.params_dim(spec.token_dim))
    group = max(1, min(-(-B // threads), tokens // (L + T)))
    chunk = max(1, tokens // group)
    cache_floats, floats = torch.ops.starflow_native.block_sizes(model.fields, group * chunk, L + T)
    cache, workspace = empty(group * threads * cache_floats), empty(threads * floats)
    step = max(threads * group, _call_tokens(model.buffer.numel(), T + L))
    for b in range(0, B, step):
        rows = slice(b, b + step)
        torch.ops.starflow_native.block_run(
            x[rows],
            params[rows],
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
            cache,
            workspace,
            [-L, T, group, chunk, threads],
        )
    return params


def block_forward(x, weights, cond, prefix, cos, sin, text: str, logdet: str):
    """Noise and log-determinant of data."""
    spec = BlockSpec.from_json(text)
    params = block_params(x, weights, cond, prefix, cos, sin, text)
    return affine_flow(x, params, spec.affine.scale, spec.affine.soft_clip, not spec.start, spec.flip, logdet)


class SamplingPlan(NamedTuple):
    """`part` sequences at a time, in groups of `group` on `threads`, `step` tokens a call, `chunk` prefix slots a pass;
    floats of KV cache and of workspace for a part."""

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
    copies: int,
    cached: int,
    prefix: int,
    threads: int,
    budget: int,
) -> SamplingPlan:
    """Memory and threads for B sequences of `cached` slots in all."""
    row = copies * torch.ops.starflow_native.block_sizes(fields, 1, cached)[0]
    part = max(1, min(B, budget // (4 * row)))
    group = _sampling_group(part, copies, 4 * weight_floats, threads)
    threads = _useful_threads(threads, -(-part // group), weight_floats, group * copies)
    chunk = max(1, min(prefix, DENSITY_TOKENS // (group * copies)))
    _, workspace = torch.ops.starflow_native.block_sizes(fields, group * copies * chunk, cached)
    step = _call_tokens(weight_floats, part * copies)
    return SamplingPlan(part, group, threads, step, chunk, part * row, threads * workspace)


class _Parts:
    """A batch of the sampling direction in parts whose cache fits `cache_bytes`."""

    def __init__(self, z, weights, cond, prefix, cos, sin, guidance, text: str, rule: str, temperature: float):
        self.spec, self.model = BlockSpec.from_json(text), packed(text, weights)
        (self.B, self.T, _), self.L = z.shape, 0 if prefix is None else prefix.shape[1]
        self.copies = 1 if guidance is None else 2
        self.threads = torch.get_num_threads()
        cached = self.L + self.T
        floats = self.model.buffer.numel()
        self.plan = plan_sampling(
            self.model.fields, floats, self.B, self.copies, cached, self.L, self.threads, cache_bytes()
        )
        self.cache = empty(self.plan.cache)
        self._context = tuple(map(_plain, (cond, prefix, cos, sin, guidance)))
        self._rule = ("tarflow", "starflow").index(rule), temperature

    def __iter__(self) -> Iterator[slice]:
        """The rows of each part."""
        return (slice(b, b + self.plan.part) for b in range(0, self.B, self.plan.part))

    def arguments(self, rows: slice) -> tuple:
        """Model, context and rule of a part, in the order of the native ops."""
        model, (cond, prefix, cos, sin, guidance) = self.model, self._context
        given = (self._both_kinds(cond, rows), self._both_kinds(prefix, rows), cos, sin)
        weights = None if guidance is None else guidance[rows]
        return (model.buffer, model.offsets, model.fields, self.spec.affine.soft_clip, *given, weights, *self._rule)

    def _both_kinds(self, value: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
        """Those rows of (copies B, ...), with and without the condition."""
        if value is None or self.plan.part == self.B:
            return value
        return value.unflatten(0, (self.copies, self.B))[:, rows].flatten(0, 1).contiguous()


def block_inverse(z, weights, cond, prefix, cos, sin, guidance, text: str, rule: str, temperature: float):
    """Data of noise, token after token over the cache; a batch whose cache passes `cache_bytes` goes in parts."""
    parts = _Parts(z, weights, cond, prefix, cos, sin, guidance, text, rule, temperature)
    plan, B, T = parts.plan, parts.B, parts.T
    x, workspace = z.clone(memory_format=torch.contiguous_format), empty(plan.workspace)
    last = T if parts.spec.start else T - 1
    for rows in parts:
        arguments = parts.arguments(rows)
        for first in range(-parts.L, last, plan.step):
            end = min(first + plan.step, last)
            steps = [first, end, plan.group, plan.chunk, plan.threads]
            torch.ops.starflow_native.block_run(x[rows], None, *arguments, parts.cache, workspace, steps)
            report(rows.start * T + max(0, end + T - last) * len(x[rows]), B * T)
    return x


def refuse_jacobi(z, guess, weights, *others) -> str | None:
    """Why the kernels cannot sample from a block by Jacobi, or None."""
    return refuse(z, weights)


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
    text: str,
    rule: str,
    temperature: float,
    window: int,
    slide: bool,
    tol: float,
):
    """Data of noise by sweeps over windows of tokens, see block/jacobi.py; every sequence by itself."""
    parts = _Parts(z, weights, cond, prefix, cos, sin, guidance, text, rule, temperature)
    plan, model, (B, T, D) = parts.plan, parts.model, z.shape
    z, x = z.contiguous(), guess.clone(memory_format=torch.contiguous_format)
    places, sweeps = torch.zeros(B, 7, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int32)
    residual = torch.zeros(B)
    memory = torch.zeros(B, torch.ops.starflow_native.jacobi_floats(T, D, len(neighbours)))
    if not parts.spec.start:
        first = T - 1 if parts.spec.flip else 0
        x[:, first], places[:, 0] = z[:, first], 1
    passed = parts.copies * window
    threads = _useful_threads(parts.threads, plan.part, model.buffer.numel(), passed)
    floats = threads * torch.ops.starflow_native.block_sizes(model.fields, passed, parts.L + T)[1]
    workspace = empty(max(floats, plan.workspace))
    for rows in parts:
        arguments, done, failed = parts.arguments(rows), places[rows, 0], places[rows, 4]
        if parts.L:
            chunks = [-parts.L, 0, plan.group, plan.chunk, plan.threads]
            torch.ops.starflow_native.block_run(x[rows], None, *arguments, parts.cache, workspace, chunks)
        passes = _call_tokens(model.buffer.numel(), passed * -(-len(done) // threads))
        while ((done < T) & (failed == 0)).any():
            torch.ops.starflow_native.block_jacobi(
                x[rows], z[rows], *arguments, neighbours, tol, places[rows], sweeps[rows], residual[rows], memory[rows],
                parts.cache, workspace, [window, slide, passes, threads],
            )  # fmt: skip
            report(int(places[:, 0].sum()), B * T)
    return x, sweeps, places[:, 2:5].clone(), residual
