"""Published parallel inverses that need no training, on the blocks of a flow.

GS-Jacobi (arXiv 2505.12849), SeJD (arXiv 2505.24791) and the released STARFlow code (arXiv 2506.06276) are one loop
with different settings. Modules of tokens follow each other over a KV cache. Within a module, Jacobi sweeps go on
until the change of the whole batch is small. As in the released code, the cache keeps what the last sweep of a module
saw, and finished samples stay in the batch. All of it is eager PyTorch. The cache has a static size, where the
released code concatenates.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from starflow_kernels import BlockSpec
from starflow_kernels._core.numerics import apply_rotary
from starflow_kernels.affine_flow.reference import raw_outputs, sigma_of
from starflow_kernels.block.network import Weights, embed, layers, position_table, raw_params


class EagerBlock:
    """A flow block over a KV cache of static size, tokens in its own order.

    Attributes:
        first: the first token that is transformed; 1 where token 0 passes unchanged.
        passes: calls of the network.
        tokens: tokens that were evaluated in these calls, over all rows.
    """

    def __init__(self, weights: Weights, spec: BlockSpec, rows: int, tokens: int, cond=None, cos=None, sin=None):
        self.weights, self.spec, self.cond, self.cos, self.sin = weights, spec, cond, cos, sin
        self.size, self.first = tokens, 0 if spec.start else 1
        shape = (2, spec.layers, rows, spec.kv_heads, tokens, spec.head_dim)
        self.keys, self.values = weights["proj_in.weight"].new_empty(shape)
        self.position = position_table(weights, spec)
        self.passes = self.tokens = 0

    def moments(self, x: torch.Tensor, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mu and log sigma of the tokens begin .. end - 1, from the token before each of them and the cache."""
        spec, w = self.spec, self.weights
        inputs = x[:, max(begin - 1, 0) : end - 1]
        if begin == 0:
            inputs = torch.cat([w["start"].to(x.dtype).expand(len(x), 1, -1), inputs], dim=1)
        slots = slice(begin - self.first, end - self.first)
        row = None if self.position is None else self.position[slots]
        h = layers(embed(inputs, w, self.cond, row), w, spec, None, self._attention(slots))
        a, mu = raw_outputs(raw_params(h, w, spec), spec.affine.scale, spec.affine.soft_clip)
        self.passes, self.tokens = self.passes + 1, self.tokens + len(x) * (end - begin)
        return mu.to(x.dtype), sigma_of(a, mu, spec.affine.scale)[1].to(x.dtype)

    def _attention(self, slots: slice) -> Callable:
        count, used = slots.stop - slots.start, slots.stop
        mask = (
            None if count == 1 else torch.ones(count, used, dtype=torch.bool, device=self.keys.device).tril(slots.start)
        )

        def attention(layer, q, k, v):
            if self.cos is not None:
                cos, sin = self.cos[slots], self.sin[slots]
                q, k = apply_rotary(q, cos, sin, self.spec.rotary), apply_rotary(k, cos, sin, self.spec.rotary)
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, slots], values[:, :, slots] = k.transpose(1, 2), v.transpose(1, 2)
            seen = (cache[:, :, :used] for cache in (keys, values))
            grouped = self.spec.heads != self.spec.kv_heads
            return F.scaled_dot_product_attention(q.transpose(1, 2), *seen, mask, enable_gqa=grouped).transpose(1, 2)

        return lambda layer: functools.partial(attention, layer)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Settings of the loop that solves a block.

    Attributes:
        modules: number of modules that the tokens are cut into, unless `size` is given.
        size: tokens per module.
        limit: largest number of sweeps of a module.
        change: how the change of a sweep over all samples is measured.
        bound: sweeps end once the change is at most this.
        guess: first values of the tokens.
        clamp: bound on the values after every sweep.
    """

    modules: int = 1
    size: int = 0
    limit: int = 32
    change: Literal["norm", "largest", "relative"] = "largest"
    bound: float = 0.0
    guess: Literal["noise", "zero"] = "noise"
    clamp: float = math.inf

    def spans(self, first: int, tokens: int) -> list[tuple[int, int]]:
        """Return begin and end of every module."""
        size = self.size or tokens // self.modules
        return [(begin, min(begin + size, tokens)) for begin in range(first, tokens, size)]

    def measured(self, new: torch.Tensor, old: torch.Tensor) -> float:
        """Return the change of a sweep."""
        difference = new - old
        if self.change == "norm":
            return (difference.norm() / (len(new) * new.shape[-1])).item()
        if self.change == "largest":
            return difference.abs().max().item()
        return (difference.square().mean() / new.square().mean()).item()


SEQUENTIAL = Rule(size=1, limit=1)
SEJD = Rule(limit=10**6, change="largest", bound=0.5, guess="zero")
STARFLOW = Rule(size=16, limit=32, change="relative", bound=1e-3)
GS_JACOBI = Rule(change="norm", bound=1e-6, clamp=3.0)


@torch.no_grad()
def solve(
    block: EagerBlock, z: torch.Tensor, rule: Rule, watch: Callable[[torch.Tensor], None] = lambda x: None
) -> torch.Tensor:
    """Return x for noise z, both (B, T, D) in the data's order; watch gets x in the block's order after a sweep."""
    z = z.flip(1) if block.spec.flip else z
    x, spans = z.clone(), rule.spans(block.first, block.size)
    if rule.guess == "zero":
        x[:, block.first :] = 0
    for begin, end in spans:
        for _ in range(rule.limit):
            mu, log_sigma = block.moments(x, begin, end)
            new = (mu + log_sigma.exp() * z[:, begin:end]).clamp(-rule.clamp, rule.clamp)
            change = rule.measured(new, x[:, begin:end])
            x[:, begin:end] = new
            if len(spans) == 1:  # the released GS-Jacobi also clamps the token that passes unchanged
                x[:, :begin].clamp_(-rule.clamp, rule.clamp)
            watch(x)
            if change <= rule.bound:
                break
    return x.flip(1) if block.spec.flip else x


def sejd_rules(count: int) -> list[Rule]:
    """Return the rules of SeJD: the last block, which is sampled first, token by token, the others by sweeps."""
    return [SEJD] * (count - 1) + [SEQUENTIAL]


@torch.no_grad()
def gs_jacobi_rules(
    blocks: list[EagerBlock], z: list[torch.Tensor], x: list[torch.Tensor], rest: int, share: float = 0.3
) -> list[Rule]:
    """Return the rules of GS-Jacobi's strategy [tough-8-32-rest], by the paper's two metrics.

    A block is tough if its convergence ranking metric is at least `share` of the sum over all blocks (the published
    strategies pick blocks of 33 % and more); the block with the largest metric always is. Tough blocks get 8 modules
    of at most 32 sweeps, the others one module of at most `rest` sweeps. A block starts from noise or from zero,
    whichever leaves the smaller residual by the initial guessing metric. z and x are noise and data of each block, on
    which the metrics are computed.
    """
    metrics, guesses = [], []
    for block, noise, data in zip(blocks, z, x):
        if block.spec.flip:
            noise, data = noise.flip(1), data.flip(1)
        rank, residuals = _metrics(block, noise, data)
        metrics.append(rank)
        guesses.append(min(residuals, key=residuals.get))
    bound = min(share * sum(metrics), max(metrics))
    tough = [metric >= bound for metric in metrics]
    settings = [{"modules": 8, "limit": 32} if hard else {"limit": rest} for hard in tough]
    return [dataclasses.replace(GS_JACOBI, guess=guess, **changes) for guess, changes in zip(guesses, settings)]


def _metrics(block: EagerBlock, z: torch.Tensor, x: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Return the convergence ranking metric, and the residual of one sweep from each first guess, by spectral norms."""

    def spectral(matrix: torch.Tensor) -> float:
        return torch.linalg.matrix_norm(matrix.float(), ord=2).item()

    first, size = block.first, block.size
    _, log_sigma = block.moments(x, first, size)
    scaled = F.pad((-log_sigma).exp(), (0, 0, first, 0), value=1.0) * x
    head = block.weights["proj_out.weight"].chunk(2) if block.spec.affine.scale != "unit" else None
    shift = block.weights["proj_out.weight"] if head is None else head[1]
    rank = spectral(scaled.mean(0)) * (0.0 if head is None else spectral(head[0])) + spectral(shift)
    residuals = {}
    for guess in ("noise", "zero"):
        start = torch.cat([z[:, :first], z[:, first:] if guess == "noise" else torch.zeros_like(z[:, first:])], dim=1)
        mu, log_sigma = block.moments(start, first, size)
        residuals[guess] = spectral((mu + log_sigma.exp() * z[:, first:] - x[:, first:]).mean(0))
    return rank, residuals
