"""Inverse of autoregressive transforms of any library, by Jacobi iteration instead of one network pass per value.

A library's own loop applies x <- step(x, y) as often as there are values, where value i of step(x, y) depends on y_i
and on the values of x before i. So does this one, but a sample leaves the loop as soon as it repeats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .._core.implicit import needs_gradient, sweep_transposed
from .._core.torch_private import apply_outside_transforms, is_batched, is_intercepted
from .columns import Recognized, attribute_tensors, can_run, solve_columns
from .swap import Accelerated, disagreement, seen_as

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
# Values are taken as repeated where they change by at most this many units in the last place.
REPEATED = 4
# Samples of the check.
ROWS = 8


class Autoregressive(Accelerated):
    """Base of the fast classes here: their check, and where they apply."""

    @property
    def description(self) -> str:
        """Name of the solver."""
        like, (_, size) = self.like(), self.sizes()
        by_columns = can_run(self.network(), like) and self.recognized(like.new_zeros(1, size) if size else None)
        return "one pass by columns" if by_columns else "Jacobi iteration"

    def sizes(self) -> tuple[int, int]:
        """Return the number of values and that of the context, 0 for none."""
        raise NotImplementedError

    def like(self) -> torch.Tensor:
        """Return a tensor with the dtype and the device of the weights."""
        return next(self.parameters())

    def on_unit_interval(self) -> bool:
        """Return whether values are from 0 to 1 instead of any."""
        return False

    def places(self) -> torch.Tensor:
        """Return the place (D,) of each value in the order in which they depend on each other."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """Return the network, with all weights that a step uses."""
        raise NotImplementedError

    def recognized(self, context: torch.Tensor | None) -> Recognized | None:
        """Return the arguments of `masked_inverse` under a context (N, C), or None if it has no such module."""
        return None

    def loop(self, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x (N, D) of y by the library's own loop."""
        raise NotImplementedError

    def step(self, x: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x (N, D) of y (N, D), by the parameters that belong to another x and a context (N, C)."""
        raise NotImplementedError

    @staticmethod
    def inverse_rows(module: nn.Module, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Return x (N, D) of y by the public methods of the library."""
        raise NotImplementedError

    def solve(self, y: torch.Tensor, context: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Solve x = step(x, y, context).

        Args:
            y: (N, D) values.
            context: (N, C), or None.

        Returns:
            x (N, D), with its gradient, and log|det dx/dy| (N,) where it is known and needs no gradient.
        """
        inputs = [t for t in (y, context, *self.network().parameters()) if t is not None and t.requires_grad]
        with torch.no_grad():
            place = self.places()
            x, logdet = solve_columns(self.network(), self.recognized, y, context, place)
            if x is None:
                x = iterate(self.step, y, context, int(place.max()) + 1, self.tol)
        if not needs_gradient(*inputs):
            return x, logdet
        leaf = x.detach().requires_grad_()
        # The last place is that of the last value, see `sweep_transposed`.
        place = place + (len(place) - 1 - place.max())
        solution = _Solution, self.step(leaf, y, context), leaf, place, lambda: self.loop(y, context), *inputs
        return apply_outside_transforms(*solution), None

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Return why the module cannot be accelerated, or None."""
        return disagreement(module, cls.compare)

    @classmethod
    def compare(cls, module: nn.Module, bound: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return results of the library's own inverse and of this one, for random values.

        Args:
            module: the module, of its original class.
            bound: context (ROWS, C) that already belongs to it, None for none.
        """
        fast = seen_as(cls, module)
        generator = torch.Generator(device="cpu").manual_seed(0)
        draw = torch.rand if fast.on_unit_interval() else torch.randn
        options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        drawn = (draw(ROWS, size, **options) for size in fast.sizes())
        y, context = (values.to(fast.like()) for values in drawn)
        context = context if context.shape[1] else bound
        _check_order(fast, y, context)
        return cls.inverse_rows(module, y, context), cls.inverse_rows(fast, y, context)


def _check_order(fast: Autoregressive, y: torch.Tensor, context: torch.Tensor | None) -> None:
    """Raise ValueError if a value depends on one that comes later."""
    place = fast.places()
    with torch.enable_grad():
        x = y.clone().requires_grad_()
        for i, value in enumerate(fast.step(x, y, context).unbind(1)):
            (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=True, allow_unused=True)
            if grad is not None and (later := grad.ne(0).any(0) & (place >= place[i])).any():
                raise ValueError(f"value {i} depends on value {int(later.nonzero()[0])}, which is no earlier one")


def applies(module: nn.Module, y: torch.Tensor, context: torch.Tensor | None) -> bool:
    """Return whether the iteration has the result of the library's own loop."""
    if y.is_meta or not y.numel() or (context is not None and not context.numel()):
        return False
    if torch.is_autocast_enabled(y.device.type) or is_intercepted():
        return False
    dtypes = {t.dtype for t in (y, context, next(module.parameters(), None)) if t is not None}
    if len(dtypes) > 1 or not y.is_floating_point():
        return False
    # The gradient of weights that are no parameters, as in replicas, goes through the library's own loop.
    if torch.is_grad_enabled() and any(t.requires_grad for t in attribute_tensors(module)):
        return False
    return not (module.training and any(map(_changes_in_training, module.modules())))


def _changes_in_training(module: nn.Module) -> bool:
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)):
        return module.p > 0
    return isinstance(module, (nn.BatchNorm1d, nn.SyncBatchNorm))


def iterate(step: Step, y: torch.Tensor, context: torch.Tensor | None, passes: int, tol: float | None) -> torch.Tensor:
    """Return the solution of x = step(x, y, context).

    Args:
        step: one pass on rows, step(x (N, D), y (N, D), context (N, C) or None), returns (N, D).
        y: (N, D) values.
        context: (N, C), or None.
        passes: number of passes after which x is the solution.
        tol: largest change of a value v that counts as none, relative to |v|, and at least to 1 or to
            the largest value of the sample if that is smaller; None for the rounding error.
    """
    tol = REPEATED * torch.finfo(y.dtype).eps if tol is None else tol
    found = x = torch.zeros_like(y)
    rows = None
    for _ in range(passes):
        new = step(x, y, context)
        # Not a number never repeats, so that such a sample takes all passes of the original.
        sizes = new.abs()
        sizes = torch.maximum(sizes, sizes.amax(1, keepdim=True).clamp(max=1))
        moves = ~((new - x).abs() <= tol * sizes).all(1)
        count, x = int(moves.sum()), new
        if 2 * count <= len(x):
            # The samples that are done leave.
            if rows is None:
                # A step may return y itself.
                found = x.clone()
            else:
                found[rows] = x
            kept = moves.nonzero()[:, 0]
            rows = kept if rows is None else rows[kept]
            x, y = x[kept], y[kept]
            context = None if context is None else context[kept]
            if not count:
                return found
    if rows is None:
        return x
    found[rows] = x
    return found


class _Solution(torch.autograd.Function):
    """Result of `step` at its fixed point, with the gradient of the fixed point by the implicit function theorem.

    With G the derivative of step by x, dx = G dx + (the derivatives by the other inputs). So the gradient g of the
    result becomes (1 - G)^-T g, the gradient of a step whose x is constant.
    """

    @staticmethod
    def forward(ctx, out, leaf, rank, original, *inputs):
        ctx.original, ctx.count = original, len(inputs)
        ctx.save_for_backward(out, leaf, rank, *inputs)
        # A caller may change the result in place.
        return out.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        out, leaf, rank, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):
            # The gradient is to be differentiated, or comes in a batch: by the loop itself.
            with torch.enable_grad():
                x = ctx.original()
            create = torch.is_grad_enabled()
            found = torch.autograd.grad(x, inputs, grad, create_graph=create, allow_unused=True)
            return None, None, None, None, *found

        def pull(u: torch.Tensor) -> torch.Tensor:
            (pulled,) = torch.autograd.grad(out, leaf, u[..., 0], retain_graph=True)
            return u - pulled[..., None]

        one = grad.new_ones(1, 1, 1)
        u = sweep_transposed(pull, grad[..., None], one, rank, grad.dtype)[..., 0]
        return u, None, None, None, *[None] * ctx.count
