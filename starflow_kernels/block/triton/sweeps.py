"""Parallel inverse of a block in Triton, by sweeps over windows that move along each sample independently.

A sweep is a fixed sequence of launches, and the device decides which tokens have converged. The host replays a few
sweeps at a time until all tokens are done. The kernels are in step_kernels.py, sweep_kernels.py and newton_kernels.py.
"""

from __future__ import annotations

import torch
import triton

from ..._core.numerics import DIVERGED
from ...spec import BlockSpec
from ..progress import report
from . import sequential, sizes, sweep_kernels
from .sessions import Shape, replay_until_done
from .weights import models

# Sweeps per CUDA graph. Sweeps after the last token has converged return at once.
SWEEPS = 4
# Largest number of inputs of a linear model in registers. The inputs are the moves of a token's neighbors.
MOST_INPUTS = 128
# Side of a tile of a larger model.
MODEL_TILE = 32
# Largest number of values of a token that a kernel without a linear model takes at a time.
WIDEST_TILE = 256
# Buffers of quasi-Newton steps, in the order of the kernel's parameters.
NEWTON = (
    "spread",
    "log_sigma",
    "learned",
    "moves",
    "outputs",
    "gram",
    "cross",
    "model",
    "system",
    "solution",
    "weights",
)


def buffers(spec: BlockSpec, dtype: torch.dtype, shape: Shape, n: int, window: int, slide: bool, neighbours: tuple):
    """Return shape and dtype of every buffer of a session, for steps of n tokens and for the state of the sweeps."""
    samples, T, D, wide = shape.samples, shape.tokens, spec.token_dim, torch.float32
    counters = ("done", "single", "passes", "fallbacks", "failed")
    layout = sizes.buffers(spec, dtype, shape, n) | dict.fromkeys(counters, ((samples,), torch.int32))
    layout |= {"stop": ((samples * shape.branches,), torch.int32), "sweeps": ((samples, T), torch.int32)}
    layout |= dict.fromkeys(("solve_residual", "bound"), ((samples,), wide)) | {"tol": ((1,), wide)}
    layout |= dict.fromkeys(("change", "move", "size"), ((samples * n,), wide))
    layout |= dict.fromkeys(("y", "spread", "log_sigma") if neighbours else ("y",), ((samples * n, D), wide))
    if neighbours:
        side, width = model_sizes(len(neighbours) * D, D)
        layout |= {
            "learned": ((samples, 2), torch.int32), "moves": ((samples, T, D), wide),
            "outputs": ((samples, T, 2 * D), wide), "gram": ((samples, side, side), wide),
        }  # fmt: skip
        layout |= dict.fromkeys(("cross", "model"), ((samples, 2, side, width), wide))
        if len(neighbours) * D > MOST_INPUTS:
            layout |= {"system": layout["gram"], "solution": layout["cross"], "weights": ((samples, n), wide)}
    return layout


def model_sizes(inputs: int, D: int) -> tuple[int, int]:
    """Return the padded numbers of inputs and of values per token of the linear model."""
    if inputs <= MOST_INPUTS:
        return sizes.tile(inputs), sizes.tile(D)
    return -(-inputs // MODEL_TILE) * MODEL_TILE, -(-D // MODEL_TILE) * MODEL_TILE


def model_options(inputs: int, D: int) -> dict[str, int]:
    """Return the launch options of the kernel that keeps a linear model."""
    side, width = model_sizes(inputs, D)
    wide = inputs > MOST_INPUTS
    return {
        "BLOCK_D": sizes.tile(D) if inputs else min(sizes.tile(D), WIDEST_TILE),
        "BLOCK_I": sizes.tile(inputs), "SIDE": side if wide else 0, "WIDTH": width if wide else 0,
        "TILE": MODEL_TILE if wide else 0, "num_warps": 8 if wide else settle_warps(inputs, D),
    }  # fmt: skip


class JacobiSession(sequential.TritonSession):
    """Buffers for one batch bucket, and the launches of a sweep.

    Args:
        model, shape, device, buffers, n: see `TritonSession`.
        window: tokens per window.
        slide: whether the window moves past each converged token, or by whole windows.
        neighbours: distances to the tokens whose moves are inputs of the linear model; () for plain Jacobi sweeps.
    """

    buffers = staticmethod(buffers)

    def __init__(self, model, shape, device, buffers, n, window: int, slide: bool, neighbours: tuple[int, ...]):
        super().__init__(model, shape, device, buffers, n)
        # The kernels of sweeps do not support programmatic dependent launch.
        self.window, self.slide, self.pdl = window, slide, {}
        self.sweeps_per_step = SWEEPS if device.type == "cuda" else 1
        self.offsets = torch.tensor(neighbours, dtype=torch.int32, device=device) if neighbours else None

    def attend(self, i: int, n: int, stop: torch.Tensor | None) -> None:
        """Launch the attention of layer i, by the kernel of a step if stop is None, else by the kernel of a sweep."""
        if stop is None:
            return super().attend(i, n, stop)
        spec = self.spec
        tiles = n // sizes.BLOCK_M
        sweep_kernels.block_sweep_attend_kernel[(self.rows * tiles * spec.heads * self.splits,)](
            self.q, self.k_cache[i], self.v_cache[i], self.position, stop, self.split_out, self.split_max,
            self.split_sum, self.tickets, self.attended, n, self.k_cache.shape[3], self.splits, H=spec.heads,
            KV=spec.kv_heads, HEAD=spec.head_dim, BLOCK_D=sizes.tile(spec.head_dim), SPLIT=sizes.SPLIT,
            **self._own("attend"),
        )  # fmt: skip

    def _own(self, kernel: str) -> dict[str, int]:
        """Return the tile sizes of a kernel that only sweeps use."""
        widths = self.hidden.element_size(), self.spec.token_dim, self.spec.head_dim
        return {"BLOCK_M": sizes.BLOCK_M, **config(kernel, *widths)}

    def launch(self, w: dict) -> None:
        """Launch the sweeps of one replay."""
        for _ in range(self.sweeps_per_step):
            self.sweep(w)

    def sweep(self, w: dict) -> None:
        """Launch one sweep."""
        spec, shape, n, C, D = self.spec, self.shape, self.n, self.spec.channels, self.spec.token_dim
        rows, tile = self.rows * n, sizes.tile(D)
        sweep_kernels.block_sweep_embed_kernel[self._grid(rows, triton.cdiv(C, sizes.BLOCK_N))](
            self.x, w.get("start"), *self._embed_weights(w), self.h_in, self.position, self.stop, shape.samples, rows,
            n, shape.tokens, shape.prefix, C, D, START=spec.start, BLOCK_D=min(tile, WIDEST_TILE),
            **self._own("embed"),
        )  # fmt: skip
        h = self.layers(w, n, self.stop)
        inputs = 0 if self.offsets is None else len(self.offsets) * D
        spread, log_sigma, *learned = (getattr(self, name, None) for name in NEWTON)
        sweep_kernels.block_sweep_head_kernel[(triton.cdiv(shape.samples * n, sizes.BLOCK_M),)](
            h, self.residual, w.get(f"layers.{spec.layers - 1}.mlp_post_norm.weight"), self.statistics,
            w.get("final_norm.weight"), *self._pair(w, "proj_out"), self.z, self.guidance, self.x, self.y,
            self.log_scales, spread, log_sigma, self.change, self.move, self.size, self.position, self.stop,
            shape.samples, n, shape.tokens, shape.prefix, C, D, spec.affine.soft_clip, SCALE=spec.affine.scale,
            CLIPPED=spec.affine.soft_clip > 0, POST=spec.post_norm, TILES=self.tiles, RULE=shape.rule,
            NORM="rms_norm" if spec.final_norm else "none", START=spec.start, BRANCHES=shape.branches,
            **self._own("head"),
        )  # fmt: skip
        sweep_kernels.block_sweep_settle_kernel[(shape.samples,)](
            self.x, self.y, spread, log_sigma, self.change, self.move, self.size, self.bound, self.tol, self.done,
            self.single, self.passes, self.fallbacks, self.failed, self.sweeps, self.solve_residual, self.position,
            self.stop, *learned, self.offsets, shape.samples, n, shape.tokens, shape.prefix, D, inputs,
            WINDOW=self.window, SLIDE=self.slide, START=spec.start, BRANCHES=shape.branches,
            BLOCK_W=triton.next_power_of_2(n), BLOCK_M=sizes.BLOCK_M, **model_options(inputs, D),
        )  # fmt: skip

    def begin(self, w: dict, prefix: torch.Tensor | None, filled: int = 0) -> None:
        """Fill the cache with text and the first `filled` slots, and set the first window of every sample."""
        self.read(w, prefix)
        self.read_given(w, filled)
        first = 0 if self.spec.start else 1
        for name in ("single", "passes", "fallbacks", "failed", "sweeps", "solve_residual"):
            getattr(self, name).zero_()
        for name in (name for name in NEWTON if name in self.names):
            getattr(self, name).zero_()
        T, window = self.shape.tokens, self.window
        self.done.copy_(self.known.clamp(min=first))
        # Without `slide`, windows begin at multiples of their size.
        end = self.done + window if self.slide else (self.done // window + 1) * window
        for slots, token in ((self.position[: self.rows], self.done), (self.stop, end.clamp(max=T))):
            slots.view(self.shape.branches, -1).copy_(self.shape.prefix + token - first)
        self.bound.copy_(DIVERGED * self.z.abs().flatten(1).amax(1).clamp(min=1))

    def guess(self, guess: torch.Tensor, tol: float) -> None:
        """Set the initial values of a part and its tolerance, and mark the rows that pad the bucket as done.

        Given tokens keep their values, and so does the first token unless the block has a start token.
        """
        n, numbers = len(guess), torch.arange(self.shape.tokens, dtype=torch.int32, device=self.device)
        self.x[:n] = torch.where((numbers < self.done[:n, None])[..., None], self.x[:n], guess)
        self.tol.fill_(tol)
        self.done[n:] = self.shape.tokens
        self.stop.view(self.shape.branches, -1)[:, n:] = 0

    def ask(self):
        """Start counting finished tokens on the device; return a function that waits for the count."""
        count = self.done.sum(dtype=torch.int64)
        if count.device.type != "cuda":
            return count.item
        host = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True).copy_(count, non_blocking=True)
        end = torch.cuda.current_stream(self.device).record_event()

        def answer() -> int:
            end.synchronize()
            return int(host)

        return answer


def config(kernel: str, width: int, D: int, d: int) -> dict[str, int]:
    """Return the tile sizes of a kernel of a sweep; the arguments are those of `sizes.config`."""
    if kernel == "attend":
        small = {"BLOCK_S": 16, "num_warps": 8, "num_stages": 2}
        return small if width == 4 else {"BLOCK_S": 32, "num_warps": 4, "num_stages": 2}
    if kernel == "head":
        tiles = {"BLOCK_D": min(sizes.tile(D), 64), "BLOCK_K": 16 if width == 4 else 32, "num_warps": 4}
        return {**tiles, "num_stages": 2 if width == 2 and D < 64 else 1}
    return sizes.config(kernel, width, D, d)


def settle_warps(inputs: int, D: int) -> int:
    """Return the number of warps of the kernel that keeps a linear model in registers."""
    return 4 if max(inputs, D) <= 32 else 16


def refuse(
    z, guess, weights, cond, prefix, cos, sin, guidance, neighbours, spec_json, rule, temperature, window, slide, tol,
    quantize="none", known=None,
) -> str | None:  # fmt: skip
    """Return why the kernels cannot sweep over a block, or None."""
    return sequential.refuse(z, weights, cond, prefix, cos, sin, guidance, spec_json, quantize)


def block_jacobi(
    z, guess, weights, cond, prefix, cos, sin, guidance, neighbours, spec_json, rule, temperature, window, slide, tol,
    quantize="none", known=None,
):  # fmt: skip
    """Map noise to data by sweeps over windows; return it with the counters of jacobi.py. Large batches are split."""
    # No kernel of a sweep reads one-byte weights.
    (B, T, _), spec = z.shape, BlockSpec.from_json(spec_json)
    x, log_sigma, residual = guess.clone(), torch.zeros_like(z), z.new_zeros(B)
    sweeps, counts = z.new_zeros(B, T, dtype=torch.int32), z.new_zeros(B, 3, dtype=torch.int64)
    if not B:
        return x, log_sigma, sweeps, counts, residual
    # Pad the window to whole tiles, since a tile holds tokens of one sample only.
    n, options = -(-window // sizes.BLOCK_M) * sizes.BLOCK_M, (window, slide, tuple(neighbours))
    guess = guess.flip(1) if spec.flip else guess
    first = 0 if spec.start else 1
    filled = 0 if known is None else max(0, min(int(known.max()), T) - first)
    with sequential.exclusive(z.device):
        model = models(spec_json, weights, quantize, False)
        context = cond, prefix, cos, sin, guidance, known
        for rows, running in sequential.loaded_sessions(
            model, weights, z, context, rule, temperature, JacobiSession, filled, n, options
        ):
            session, count = running.session, rows.stop - rows.start
            session.guess(guess[rows], tol)
            padding = (session.shape.samples - count) * T

            def done(tokens, rows=rows, padding=padding):
                report(rows.start * T + tokens - padding, B * T)

            # A sweep settles a token, or falls back to single tokens, which the next sweeps settle.
            most = -(-2 * T // session.sweeps_per_step) + 1
            replay_until_done(running.step, session.ask, session.shape.samples * T, most, done)
            x[rows], log_sigma[rows] = session.x[:count], session.log_scales[:count]
            sweeps[rows] = session.sweeps[:count]
            residual[rows] = session.solve_residual[:count]
            counts[rows] = torch.stack([session.passes, session.fallbacks, session.failed], 1)[:count].long()
    if spec.flip:
        x, log_sigma = x.flip(1), log_sigma.flip(1)
    return x, log_sigma, sweeps, counts, residual
