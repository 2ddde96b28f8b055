"""float32 arithmetic of an NVIDIA GPU in Triton's interpreter, which computes exactly rounded functions by numpy.

Triton compiles exp to ex2.approx of the rounded product with log2 e, `/` to div.full, sqrt to sqrt.approx and rsqrt to
rsqrt.approx. Here each result is off by a share of the largest error that NVIDIA documents for the instruction; the
share is random, and the same for the same result. `div_rn` and `sqrt_rn` are exact on the chip too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LOG2_E = np.float32(1.4426950408889634)


def _share(values: np.ndarray) -> np.ndarray:
    """Return a number from -1 to 1 for each float32, a hash of its bits."""
    bits = values.view(np.uint32).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (bits >> np.uint64(40)).astype(np.float64) / 2**23 - 1


def off(exact: np.ndarray, relative: float = 0.0, ulps: float = 0.0) -> np.ndarray:
    """Return float64 values in float32, off by up to a relative error and a number of units in the last place."""
    with np.errstate(all="ignore"):
        value = exact.astype(np.float32)
        largest = relative * np.abs(exact) + ulps * np.spacing(np.abs(value)).astype(np.float64)
        moved = (exact + _share(value) * largest).astype(np.float32)
        return np.where(np.isfinite(value) & (value != 0), moved, value)


def exp(x: np.ndarray) -> np.ndarray:
    """Return e^x as the chip does: the product with log2 e is rounded first."""
    return exp2(x * LOG2_E)


def exp2(x: np.ndarray) -> np.ndarray:
    """Return 2^x by ex2.approx."""
    return off(np.exp2(x.astype(np.float64)), relative=2**-22.5)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x / y by div.full."""
    return off(x.astype(np.float64) / y.astype(np.float64), ulps=2)


def sqrt(x: np.ndarray) -> np.ndarray:
    """Return the square root by sqrt.approx."""
    return off(np.sqrt(x.astype(np.float64)), relative=2**-23)


def rsqrt(x: np.ndarray) -> np.ndarray:
    """Return 1 / sqrt(x) by rsqrt.approx."""
    return off(1 / np.sqrt(x.astype(np.float64)), relative=2**-22.9)


# Names of the interpreter's methods, private to Triton; seen in 3.6.0 and 3.9.0.
FUNCTIONS = {
    "create_exp": exp,
    "create_exp2": exp2,
    "create_fdiv": divide,
    "create_sqrt": sqrt,
    "create_rsqrt": rsqrt,
}


def install() -> None:
    """Make the interpreter compute with the chip's approximations."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def approximate(plain: Callable, function: Callable) -> Callable:
        def method(self, *args):
            if args[0].data.dtype != np.float32:
                return plain(self, *args)
            return TensorHandle(function(*(arg.data for arg in args)), args[0].dtype.scalar)

        return method

    for name, function in FUNCTIONS.items():
        setattr(InterpreterBuilder, name, approximate(getattr(InterpreterBuilder, name), function))
