"""Quasi-Newton steps for x = mu(x) + sigma(x) z, with a linear model that is fitted to what the last sweeps did."""

from __future__ import annotations

import torch

# What a sweep teaches weighs FORGET of it in the next; RIDGE: of the ridge, relative to the mean square of the inputs.
FORGET, RIDGE = 0.7, 0.03
# Tokens whose neighbours moved less than this share of the largest move teach nothing: it is rounding.
SMALLEST_MOVE = 1e-3


class QuasiNewton:
    """For each of B samples of T tokens in the order in which they depend on each other, a model that all tokens share:
    the changes of (mu, log sigma) of token t are a linear map of the moves of the tokens t - k, k in `offsets`.

    The map is that of decayed least squares over the pairs (moves, changes) of consecutive sweeps.
    """

    def __init__(self, offsets: tuple[int, ...], z: torch.Tensor):
        B, T, D = z.shape
        self.offsets, inputs = offsets, len(offsets) * D
        self.moves, self.outputs = z.new_zeros(B, T, D), z.new_zeros(B, T, 2 * D)
        self.gram, self.cross = z.new_zeros(B, inputs, inputs), z.new_zeros(B, inputs, 2 * D)
        self.model = z.new_zeros(B, inputs, 2 * D)
        self.previous = slice(0, 0)

    def step(
        self,
        rows: torch.Tensor,
        tokens: slice,
        x: torch.Tensor,
        y: torch.Tensor,
        log_sigma: torch.Tensor,
        spread: torch.Tensor,
    ) -> torch.Tensor:
        """Values (R, n, D) in place of y = mu + spread, for the window `tokens` of the samples `rows` (R,).

        x: what y was computed from; spread: sigma z.
        """
        outputs = torch.cat([y - spread, log_sigma], dim=2)
        known = slice(tokens.start, min(tokens.stop, self.previous.stop))
        if known.stop > known.start:
            self._learn(rows, known, outputs[:, : known.stop - known.start])
        new, moves, model = y.clone(), torch.zeros_like(y), self.model[rows]
        # Where the model is unstable its predictions grow from token to token: none may pass the largest change.
        most = (y - x).abs().flatten(1).amax(1, keepdim=True)
        for t in range(y.shape[1]):
            by_mu, by_log_sigma = (_before(moves, self.offsets, t) @ model)[:, 0].chunk(2, dim=1)
            new[:, t] += (by_mu + spread[:, t] * by_log_sigma).clamp(-most, most)
            moves[:, t] = new[:, t] - x[:, t]
        self.moves[rows] = 0
        self.moves[rows, tokens], self.outputs[rows, tokens], self.previous = moves, outputs, tokens
        return new

    def forget(self) -> None:
        """The next sweep does not follow from the last one."""
        self.previous = slice(0, 0)

    def _learn(self, rows: torch.Tensor, tokens: slice, outputs: torch.Tensor) -> None:
        moves = torch.cat([_before(self.moves[rows], self.offsets, t) for t in range(tokens.start, tokens.stop)], dim=1)
        size = moves.norm(dim=2, keepdim=True)
        teaches = (size > SMALLEST_MOVE * size.amax(1, keepdim=True)) & outputs.isfinite().all(2, keepdim=True)
        # Every token counts the same, however far it is from its solution.
        weight = torch.where(teaches, 1 / size, torch.zeros_like(size))
        moves, changes = moves * weight, torch.where(teaches, (outputs - self.outputs[rows, tokens]) * weight, 0.0)
        self.gram[rows] = FORGET * self.gram[rows] + moves.mT @ moves
        self.cross[rows] = FORGET * self.cross[rows] + moves.mT @ changes
        gram = self.gram[rows]
        mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(gram.shape[1]).to(gram))
        model = torch.cholesky_solve(self.cross[rows], factor)
        usable = (failed == 0) & model.isfinite().flatten(1).all(1)
        self.model[rows] = torch.where(usable[:, None, None], model, self.model[rows])


def _before(values: torch.Tensor, offsets: tuple[int, ...], t: int) -> torch.Tensor:
    """(B, 1, len(offsets) D): values (B, T, D) at t - k, side by side, zero in front of the first."""
    zero = torch.zeros_like(values[:, :1])
    return torch.cat([values[:, t - k : t - k + 1] if k <= t else zero for k in offsets], dim=2)
