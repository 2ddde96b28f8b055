"""Elementary functions and the affine transform of one element, in float32, for use inside Triton kernels."""

import triton
import triton.language as tl

# e - 1 rounded to float32, and the rounding error.
E_MINUS_1 = tl.constexpr(1.718281865119934)
E_MINUS_1_REST = tl.constexpr(-3.666088899e-08)


@triton.jit
def tanh(x):
    """Return tanh to a few ulp: by a minimax polynomial up to |x| = 0.625, by the exponential above."""
    square = x * x
    small = -0.00566078071
    small = small * square + 0.020601999
    small = small * square - 0.0537292287
    small = small * square + 0.133313283
    small = small * square - 0.333332777
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) > 0.625, tl.where(x < 0, -large, large), x + x * square * small)


@triton.jit
def softplus_one(a):
    """Return softplus(a + log(e - 1)) = log(1 + (e - 1) e^a), corrected for the rounding of the sum."""
    u = tl.exp(-tl.abs(a))
    v = E_MINUS_1 * u
    w = tl.where(a < 0, 1 + v, E_MINUS_1 + u)
    lost = tl.where(a < 0, v - (w - 1) + E_MINUS_1_REST * u, u - (w - E_MINUS_1) + E_MINUS_1_REST)
    return tl.log(w) + tl.where(a < 0, lost / w, a + lost / w)


@triton.jit
def soft_clipped(r, clip, CLIPPED: tl.constexpr):
    """Return clip tanh(r / clip) if CLIPPED, else r."""
    if CLIPPED:
        return clip * tanh(r / clip)
    return r


@triton.jit
def sigma_of(a, SCALE: tl.constexpr):
    """Return sigma and log sigma of the clipped raw output a."""
    if SCALE == "exp":
        return tl.exp(a), a
    if SCALE == "softplus":
        sigma = softplus_one(a)
        return sigma, tl.where(a < -17, a + 0.541324855, tl.log(sigma))
    return tl.full(a.shape, 1.0, tl.float32), tl.zeros_like(a)


@triton.jit
def log_sigma_slope(a, sigma, SCALE: tl.constexpr):
    """Return d log sigma / d a."""
    if SCALE == "softplus":
        u = tl.exp(tl.minimum(a, 80.0))
        u = E_MINUS_1 * u + E_MINUS_1_REST * u
        return tl.where(a < -17, 1.0, u / ((1 + u) * sigma))
    return tl.full(a.shape, 1.0, tl.float32)
