"""Inverse of a block by Jacobi sweeps over windows of tokens: the specification in plain PyTorch."""

from __future__ import annotations

import torch

from .._core.numerics import DIVERGED, accumulation_dtype
from ..affine_flow_inverse.reference import gaussian
from ..solve_inverse.quasi_newton import QuasiNewton
from ..spec import BlockSpec
from .network import CachedNetwork
from .progress import report
from .quantize import fake_quantize, linear_of


def block_jacobi(
    z: torch.Tensor,
    guess: torch.Tensor,
    weights: list[torch.Tensor],
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    guidance: torch.Tensor | None,
    neighbours: list[int],
    spec_json: str,
    rule: str,
    temperature: float,
    window: int,
    slide: bool,
    tol: float,
    quantize: str = "none",
    known: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Solve for the data, sample by sample; return it with counters of the work.

    Of each row, z holds the data of the first `known` tokens.

    Returns:
        x (B, T, D). log_sigma (B, T, D): log sigma of every value that was computed, zero for the others. sweeps (B, T)
        int32: number of passes in which each token took part. counts (B, 3) int64: passes; windows that fell back to
        single tokens; 1 + the first token without a finite value, or 0. residual (B,): largest relative change of a
        token in the pass that accepted it.
    """
    (B, T, _), branches = z.shape, 1 if guidance is None else 2
    weights = fake_quantize(BlockSpec.from_json(spec_json), weights, quantize)
    x, log_sigma = guess.clone(), torch.zeros_like(z, dtype=accumulation_dtype(z.dtype))
    sweeps = torch.zeros(B, T, dtype=torch.int32, device=z.device)
    counts = torch.zeros(B, 3, dtype=torch.int64, device=z.device)
    residual = z.new_zeros(B)
    for b in range(B):
        context = (None if c is None else c.unflatten(0, (branches, B))[:, b] for c in (cond, prefix))
        weight = None if guidance is None else guidance[b : b + 1]
        rest = cos, sin, weight, spec_json, temperature, linear_of(quantize)
        network = CachedNetwork(z[b : b + 1], weights, *context, *rest)
        final = 0 if known is None else int(known[b])
        sample = Sample(network, z[b], x[b], weight, rule, neighbours, tol, final)
        while sample.done < T and not sample.failed:
            sample.sweep(window, slide)
            report(b * T + sample.done, B * T)
        found = sample.x, sample.log_sigma
        x[b], log_sigma[b] = (value.flip(0) for value in found) if network.spec.flip else found
        sweeps[b], residual[b] = sample.sweeps, sample.residual
        found = [sample.passes, sample.fallbacks, sample.failed]
        counts[b] = torch.tensor(found, dtype=torch.int64, device="cpu")
    return x, log_sigma, sweeps, counts, residual


class Sample:
    """State of one sample in the block's own order; its first `done` tokens are final."""

    def __init__(self, network: CachedNetwork, z, x, weight, rule, neighbours, tol, known: int):
        spec = network.spec
        self.network, self.rule, self.tol = network, rule, tol
        self.z, self.x = (t.flip(0) if spec.flip else t.clone() for t in (z, x))
        self.weight = weight
        self.model = QuasiNewton(tuple(neighbours), self.z[None]) if neighbours else None
        self.log_sigma = torch.zeros_like(self.x, dtype=accumulation_dtype(self.x.dtype))
        self.done, self.single = max(known, 0 if spec.start else 1), 0
        self.x[: self.done] = self.z[: self.done]
        network.fill(self.x[None], self.done)
        self.passes = self.fallbacks = self.failed = 0
        self.sweeps = torch.zeros(len(z), dtype=torch.int32, device="cpu")
        self.residual = 0.0
        self.bound = DIVERGED * max(1.0, z.abs().max().item())

    def sweep(self, window: int, slide: bool) -> None:
        """Run one pass of the network over a window."""
        first, T = self.done, len(self.x)
        # Without `slide`, windows begin at multiples of their size.
        end = first + window if slide else (first // window + 1) * window
        count = 1 if first < self.single else min(end, T) - first
        tokens, spec = slice(first, first + count), self.network.spec.affine
        params = self.network.params(self.x[None], first, count)
        weight = None if self.weight is None else self.weight[:, tokens]
        mu, sigma, log_sigma = gaussian(params, weight, spec.scale, spec.soft_clip, self.rule)
        y = (mu + sigma * self.z[tokens])[0].to(self.x.dtype)
        self.log_sigma[tokens] = log_sigma[0]
        self.passes += 1
        self.sweeps[tokens] += 1
        if not (y.abs() <= self.bound).all():
            if count == 1 and not y.isfinite().all():
                self.failed = first + 1
            if count > 1:
                self.single, self.fallbacks = first + count, self.fallbacks + 1
                if self.model:
                    self.model.forget()
                return
        change = ((y - self.x[tokens]).abs() / y.abs().clamp(min=1)).amax(1)
        # A token is final if all tokens before it have converged.
        accepted = min(count, 1 + int((change <= self.tol).long().cumprod(0).sum()))
        self.residual = max(self.residual, change[: accepted - 1].max().item() if accepted > 1 else 0.0)
        self.x[tokens] = y if self.model is None else self._newton(tokens, y, sigma, log_sigma)
        self.done += accepted

    def _newton(self, tokens: slice, y, sigma, log_sigma) -> torch.Tensor:
        spread, x = (sigma * self.z[tokens]).to(y.dtype), self.x[None, tokens]
        rows = torch.zeros(1, dtype=torch.int64, device="cpu")
        return self.model.step(rows, tokens, x, y[None], log_sigma.to(y.dtype), spread)[0]
