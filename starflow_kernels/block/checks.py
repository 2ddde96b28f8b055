"""Checks of values in the inverse ops. They are part of the ops, and so of compiled and exported graphs."""

from __future__ import annotations

from collections.abc import Callable

from .._core.checks import NonFiniteError, check_finite


def checked_inverse(run: Callable, z, weights, cond, prefix, cos, sin, guidance, *options):
    """Return run(*arguments of block_inverse) of finite inputs."""
    check_finite(z=z, cond=cond, prefix=prefix, guidance=guidance)
    return run(z, weights, cond, prefix, cos, sin, guidance, *options)


def checked_jacobi(run: Callable, z, guess, weights, cond, prefix, cos, sin, guidance, *options):
    """Return run(*arguments of block_jacobi) of finite inputs; its result is finite."""
    check_finite(z=z, guess=guess, cond=cond, prefix=prefix, guidance=guidance)
    x, sweeps, counts, residual = run(z, guess, weights, cond, prefix, cos, sin, guidance, *options)
    failed = counts[:, 2]
    if failed.any():
        sample = int(failed.nonzero()[0])
        raise NonFiniteError(f"x, the result: values are not finite at token {failed[sample] - 1} of sample {sample}")
    return x, sweeps, counts, residual
