"""Quasi-Newton steps for x = mu(x) + sigma(x) z, with a linear model fitted to the last sweeps."""

from __future__ import annotations

import torch

# Factor by which the weight of a sweep falls in each later one.
FORGET = 0.7
# Ridge of the regression, relative to the mean square of the inputs.
RIDGE = 0.03
# Tokens whose neighbors moved less than this share of the largest move are left out: their moves are rounding errors.
SMALLEST_MOVE = 1e-3


class QuasiNewton:
    """Linear model per sample that predicts the change of (mu, log sigma) of token t from the moves of tokens t - k.

    k runs over `offsets`, and tokens are in the order in which they depend on each other. All tokens of a sample share
    the model. It is the ridge regression over the pairs (moves, changes) of consecutive sweeps, with decaying weights.
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
        """Return corrected values (R, n, D) of y = mu + spread, for the window `tokens` of the samples `rows` (R,).

        x: values from which y was computed. spread: sigma z.
        """
        outputs = torch.cat([y - spread, log_sigma], dim=2)
        learned = slice(tokens.start, min(tokens.stop, self.previous.stop))
        if learned.stop > learned.start:
            self._learn(rows, learned, outputs[:, : learned.stop - learned.start])
        new, moves, model = y.clone(), torch.zeros_like(y), self.model[rows]
        # The predictions of an unstable model grow from token to token; the largest change bounds them.
        most = (y - x).abs().flatten(1).amax(1, keepdim=True)
        for t in range(y.shape[1]):
            by_mu, by_log_sigma = (_before(moves, self.offsets, t) @ model)[:, 0].chunk(2, dim=1)
            new[:, t] += (by_mu + spread[:, t] * by_log_sigma).clamp(-most, most)
            moves[:, t] = new[:, t] - x[:, t]
        self.moves[rows] = 0
        self.moves[rows, tokens], self.outputs[rows, tokens], self.previous = moves, outputs, tokens
        return new

    def forget(self) -> None:
        """Do not learn from the next sweep, because it does not continue the last one."""
        self.previous = slice(0, 0)

    def _learn(self, rows: torch.Tensor, tokens: slice, outputs: torch.Tensor) -> None:
        moves = torch.cat([_before(self.moves[rows], self.offsets, t) for t in range(tokens.start, tokens.stop)], dim=1)
        size = moves.norm(dim=2, keepdim=True)
        used = (size > SMALLEST_MOVE * size.amax(1, keepdim=True)) & outputs.isfinite().all(2, keepdim=True)
        # Every token has the same weight, however far it is from its solution.
        weight = torch.where(used, 1 / size, torch.zeros_like(size))
        moves, changes = moves * weight, torch.where(used, (outputs - self.outputs[rows, tokens]) * weight, 0.0)
        self.gram[rows] = FORGET * self.gram[rows] + moves.mT @ moves
        self.cross[rows] = FORGET * self.cross[rows] + moves.mT @ changes
        gram = self.gram[rows]
        mean = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        ridge = torch.where(mean > 0, RIDGE * mean, torch.ones_like(mean))
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
        model = torch.cholesky_solve(self.cross[rows], factor)
        usable = (failed == 0) & model.isfinite().flatten(1).all(1)
        self.model[rows] = torch.where(usable[:, None, None], model, self.model[rows])


def _before(values: torch.Tensor, offsets: tuple[int, ...], t: int) -> torch.Tensor:
    """Return the values (B, T, D) at t - k, side by side in (B, 1, len(offsets) D); zero before the first token."""
    zero = torch.zeros_like(values[:, :1])
    return torch.cat([values[:, t - k : t - k + 1] if k <= t else zero for k in offsets], dim=2)
