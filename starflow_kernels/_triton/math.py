"""Elementary functions and the affine transform of one element, in float32, for use inside Triton kernels.

On a GPU, the exp of Triton rounds x log2(e), so that its error grows with |x|; `/` is off by up to 2 ulp, sqrt by up
to 1. Where tensors are float32, the error contract needs EXACT, `tl.div_rn` and `tl.sqrt_rn`; for narrower ones the
functions of the chip are accurate enough, and faster.
"""

import triton
import triton.language as tl

# e - 1 rounded to float32, and the rounding error.
E_MINUS_1 = tl.constexpr(1.718281865119934)
E_MINUS_1_REST = tl.constexpr(-3.666088899e-08)
# log2(e).
LOG2_E = tl.constexpr(1.4426950216293335)
# Minus log(2) rounded to few digits, so that its product with a small integer is exact, and the rest.
MINUS_LN_2 = tl.constexpr(-0.693359375)
MINUS_LN_2_REST = tl.constexpr(2.12194440e-4)
# Added to and subtracted from a float32, it rounds to the nearest integer, and its last bits hold that integer.
ROUNDER = tl.constexpr(1.5 * 2**23)
ROUNDER_BITS = tl.constexpr(0x4B400000)


@triton.jit
def _power_of_2(n):
    """Return 2^n for an integer n from -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x, EXACT: tl.constexpr = True):
    """Return e^x = 2^n e^r to about 1 ulp, with n the integer next to x log2(e); without EXACT, as the chip does."""
    if not EXACT:
        return tl.exp(x)
    # Beyond these bounds, the result is 0 or infinite.
    x = tl.maximum(tl.minimum(x, 89.0, tl.PropagateNan.ALL), -105.0, tl.PropagateNan.ALL)
    shifted = tl.fma(x, LOG2_E, ROUNDER)
    n = shifted - ROUNDER
    r = tl.fma(n, MINUS_LN_2_REST, tl.fma(n, MINUS_LN_2, x))
    # The polynomial of Cephes' expf.
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = tl.fma(p, r * r, r) + 1
    # The power of 2 has two factors, since a float32 cannot hold 2^128 or 2^-150.
    exponent = shifted.to(tl.int32, bitcast=True) - ROUNDER_BITS
    half = exponent >> 1
    return p * _power_of_2(half) * _power_of_2(exponent - half)


@triton.jit
def divide(x, y, EXACT: tl.constexpr):
    """Return x / y, to the last bit if EXACT."""
    if EXACT:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def mean_of(total, count):
    """Return total / count, to the last bit."""
    return tl.div_rn(total, count * 1.0)


@triton.jit
def inverse_root(x):
    """Return 1 / sqrt(x), with each operation rounded to the last bit."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def tanh(x, EXACT: tl.constexpr = True):
    """Return tanh to a few ulp: by a minimax polynomial up to |x| = 0.625, by the exponential above."""
    square = x * x
    small = -0.00566078071
    small = small * square + 0.020601999
    small = small * square - 0.0537292287
    small = small * square + 0.133313283
    small = small * square - 0.333332777
    large = 1 - 2 / (exp(2 * tl.abs(x), EXACT) + 1)
    return tl.where(tl.abs(x) > 0.625, tl.where(x < 0, -large, large), x + x * square * small)


@triton.jit
def softplus_one(a, EXACT: tl.constexpr = True):
    """Return softplus(a + log(e - 1)) = log(1 + (e - 1) e^a), corrected for the rounding of the sum."""
    u = exp(-tl.abs(a), EXACT)
    v = E_MINUS_1 * u
    w = tl.where(a < 0, 1 + v, E_MINUS_1 + u)
    lost = tl.where(a < 0, v - (w - 1) + E_MINUS_1_REST * u, u - (w - E_MINUS_1) + E_MINUS_1_REST)
    return tl.log(w) + tl.where(a < 0, lost / w, a + lost / w)


@triton.jit
def soft_clipped(r, clip, CLIPPED: tl.constexpr, EXACT: tl.constexpr = True):
    """Return clip tanh(r / clip) if CLIPPED, else r."""
    if CLIPPED:
        return clip * tanh(r * tl.div_rn(1.0, clip), EXACT)
    return r


@triton.jit
def sigma_of(a, SCALE: tl.constexpr, EXACT: tl.constexpr = True):
    """Return sigma and log sigma of the clipped raw output a."""
    if SCALE == "exp":
        return exp(a, EXACT), a
    if SCALE == "softplus":
        sigma = softplus_one(a, EXACT)
        return sigma, tl.where(a < -17, a + 0.541324855, tl.log(sigma))
    return tl.full(a.shape, 1.0, tl.float32), tl.zeros_like(a)


@triton.jit
def log_sigma_slope(a, sigma, SCALE: tl.constexpr, EXACT: tl.constexpr = True):
    """Return d log sigma / d a."""
    if SCALE == "softplus":
        u = exp(tl.minimum(a, 80.0), EXACT)
        u = E_MINUS_1 * u + E_MINUS_1_REST * u
        return tl.where(a < -17, 1.0, u / ((1 + u) * sigma))
    return tl.full(a.shape, 1.0, tl.float32)
