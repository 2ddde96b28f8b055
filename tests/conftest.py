"""Shared helpers of the kernel tests. The naive computations here share no code with the library."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from starflow_kernels import backends
from starflow_kernels._triton import runtime

torch.set_num_threads(1)
interpreted = pytest.mark.skipif(
    not runtime.interpreted() or runtime.missing() is not None,
    reason="it needs TRITON_INTERPRET=1 and triton",
)


def cpu_backends(op: str) -> list[str]:
    """Backends of an op for tensors on the CPU; Triton's slow interpreter has test_*_triton.py to itself."""
    return [name for name in backends()[op] if name != "triton"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Memory that torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of a backend that refuses the arguments is skipped with the reason; the reference never refuses."""
    try:
        return (yield)
    except ValueError as error:
        named = [pyfuncitem.funcargs.get(name, "reference") for name in ("backend", "forward", "inverse")]
        if "cannot run" in str(error) and set(named) != {"reference"}:
            pytest.skip(str(error))
        raise


def run_on_isa(isa: str, file: str, tests: str) -> None:
    """Run the tests of `file` that the expression picks once more, on a narrower instruction set."""
    if os.environ.get("STARFLOW_ISA"):
        pytest.skip("already in one")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", tests]
    done = subprocess.run(command, env={**os.environ, "STARFLOW_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def strided(x: torch.Tensor) -> torch.Tensor:
    """The values of x in memory of which every second element is NaN."""
    return torch.stack([x.detach(), torch.full_like(x, math.nan)], dim=-1)[..., 0]


def compiled(function, backend: str = "aot_eager"):
    """The function compiled as one graph, from an empty compile cache."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def with_gradients(function, tensors, seeds) -> list[torch.Tensor]:
    """Outputs of function(*tensors), then the gradients of their inner product with `seeds`."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    inner = sum((output * seed.to(output.dtype)).sum() for output, seed in zip(outputs, seeds))
    return [*(output.detach() for output in outputs), *torch.autograd.grad(inner, tensors, materialize_grads=True)]


def assert_within_contract(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Finite, and max|actual - exact| <= 2 (max|plain - exact| + eps max|exact|); plain: torch in the same dtype."""
    assert torch.isfinite(actual).all()
    error, allowed = ((t.double() - exact).abs().max().item() for t in (actual, plain))
    eps = torch.finfo(actual.dtype).eps
    assert error <= 2 * (allowed + eps * exact.abs().max().item())


def assert_same_row(backend: str, alone: torch.Tensor, batched: torch.Tensor) -> None:
    """A row computed alone equals the same row of a batch: to the bit, except on the reference backend.

    There torch chooses vector tails, reduction splits and GEMM kernels by shape, which moves the last bits.
    """
    if backend == "reference":
        bound = 32 * torch.finfo(alone.dtype).eps * batched.abs().max().clamp(min=1)
        assert (alone - batched).abs().max() <= bound
    else:
        assert torch.equal(alone, batched)


def naive_sigma(a: torch.Tensor, scale: str) -> torch.Tensor:
    """Standard deviation of the raw output a."""
    return a.exp() if scale == "exp" else torch.log1p(torch.exp(a + math.log(math.e - 1)))


def naive_raw(params: torch.Tensor, spec) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and sigma of raw parameters."""
    r = spec.soft_clip * torch.tanh(params / spec.soft_clip) if spec.soft_clip else params
    if spec.scale == "unit":
        return r, torch.ones_like(r)
    half = r.shape[-1] // 2
    return r[..., half:], naive_sigma(r[..., :half], spec.scale)


def naive_affine(x, params, spec, shift=False, flip=False) -> tuple[torch.Tensor, torch.Tensor]:
    """z and -log sigma, (B, T, D) each, token after token in the dtype of the inputs."""
    T, z, minus_log_sigma = x.shape[1], [], []
    for t in range(T):
        source = (T - 1 - t if flip else t) - shift
        mu, sigma = naive_raw(params[:, source], spec)
        if source < 0:
            mu, sigma = torch.zeros_like(x[:, t]), torch.ones_like(x[:, t])
        z.append((x[:, t] - mu) / sigma)
        minus_log_sigma.append(-sigma.log())
    return torch.stack(z, 1), torch.stack(minus_log_sigma, 1)


def reduced(minus_log_sigma: torch.Tensor, logdet: str) -> torch.Tensor:
    """Log-determinant by its convention."""
    if logdet == "none":
        return minus_log_sigma
    return minus_log_sigma.sum((1, 2)) if logdet == "sum" else minus_log_sigma.mean((1, 2))


def naive_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: str) -> torch.Tensor:
    """Rotary positions of x (..., T, heads, d) as a product of complex numbers, in the dtype of x."""
    if rotary == "none":
        return x
    y = x if x.dtype == torch.float64 else x.float()
    half = x.shape[-1] // 2
    pairs = torch.stack([y[..., :half], y[..., half:]], -1) if rotary == "half" else y.unflatten(-1, (half, 2))
    turn = torch.complex(cos.to(y.dtype), sin.to(y.dtype)).unsqueeze(-2)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return (torch.cat([pairs[..., 0], pairs[..., 1]], -1) if rotary == "half" else pairs.flatten(-2)).to(x.dtype)


def naive_attention(q, k, v, visible: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """scaled_dot_product_attention on (B, n, H, d) queries, (B, S, H_kv, d) keys and an (n, S) mask."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 / temperature
    return F.scaled_dot_product_attention(*heads_first, visible, scale=scale, enable_gqa=True).transpose(1, 2)


def naive_visible(queries: range, keys: int, window: int | None) -> torch.Tensor:
    """(n, S) mask: which of the positions 0 .. keys - 1 a query position sees."""
    return torch.tensor([[s <= t and (window is None or s > t - window) for s in range(keys)] for t in queries])


def angles(positions: int, head_dim: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """cos and sin of (positions, head_dim / 2) rotary angles."""
    frequency = 10000.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angle = torch.arange(positions, dtype=torch.float64).unsqueeze(1) * frequency
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
