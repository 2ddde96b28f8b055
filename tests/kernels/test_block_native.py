"""Promises of the native block kernels beyond the ops: equal bits, packed weights, instruction sets."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import torch
from support.backends import needs_native
from support.blocks import SIZES, STARFLOW, WIDE_SPECS, every_wide_spec, rows, tame_block
from support.contract import assert_within_contract, strided

from starflow_kernels import BlockSpec, Solver, affine_flow_inverse, block_forward, block_inverse
from starflow_kernels.block import native
from starflow_kernels.block.packing import spec_fields

pytestmark = needs_native

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def params(x, weights, spec, context, tokens=native.DENSITY_TOKENS):
    given = (context.get(name) for name in ("cond", "prefix", "cos", "sin"))
    return native.network_outputs(x, list(weights.values()), *given, spec.to_json(), tokens)


@every_wide_spec
@dtypes
@pytest.mark.parametrize("T", [1, 2, 63, 290])
def test_a_cached_step_has_the_bits_of_the_parallel_pass(spec, dtype, T):
    x, w, context = tame_block(spec, 3, T, 9, dtype)
    torch.set_num_threads(2)
    parallel = params(x, w, spec, context)
    assert parallel.isfinite().all()
    for tokens in (1, 7, 16, 1000):
        assert torch.equal(params(x, w, spec, context, tokens), parallel)


@every_wide_spec
@dtypes
def test_rows_have_the_same_bits_at_any_batch_and_thread_count(spec, dtype):
    x, w, context = tame_block(spec, 37, 11, 3, dtype)
    torch.set_num_threads(1)
    z = block_forward(x, w, spec, **context, backend="native")[0]
    back = block_inverse(z, w, spec, **context, backend="native").x
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert torch.equal(block_inverse(z, w, spec, **context, backend="native").x, back)
        for which in (slice(None), slice(4, 5), slice(20, 33)):
            part = rows(context, which)
            assert torch.equal(block_forward(x[which], w, spec, **part, backend="native")[0], z[which])
            assert torch.equal(block_inverse(z[which], w, spec, **part, backend="native").x, back[which])


@every_wide_spec
@dtypes
def test_sampling_ends_where_the_density_pass_says(spec, dtype):
    """The sample equals mu + sigma z of the parallel parameters, but for the rounding of this formula."""
    z, w, context = tame_block(spec, 2, 150, 3, dtype)
    torch.set_num_threads(2)
    x = block_inverse(z, w, spec, **context, backend="native").x
    found = params(x, w, spec, context)
    if not spec.start:
        found = torch.cat([torch.zeros_like(found[:, :1]), found[:, :-1]], dim=1)
    found = found.flip(1) if spec.flip else found
    torch.testing.assert_close(affine_flow_inverse(z, found, spec.affine), x, rtol=4e-7, atol=4e-7)
    certificate = (block_forward(x, w, spec, **context, backend="native")[0] - z).abs().max()
    assert certificate < 16 * torch.finfo(torch.float32).eps * z.abs().max()


@pytest.mark.parametrize("D, heads, head_dim", [(1, 1, 8), (2, 3, 16), (7, 2, 24), (48, 1, 64), (192, 2, 80)])
@pytest.mark.parametrize("T", [1, 2, 63, 111])
@dtypes
def test_error_contract_over_sizes(D, heads, head_dim, T, dtype):
    sizes = {"token_dim": D, "channels": 40, "heads": heads, "head_dim": head_dim, "kv_heads": heads}
    spec = BlockSpec(**{**SIZES, **sizes, **STARFLOW})
    x, w, context = tame_block(spec, 2, T, dtype=dtype)
    x64, w64, context64 = x.double(), {n: t.double() for n, t in w.items()}, {n: t.double() for n, t in context.items()}
    outputs = [
        block_forward(*args, spec, **given, logdet="none", backend=backend)
        for args, given, backend in (
            ((x, w), context, "native"),
            ((x, w), context, "reference"),
            ((x64, w64), context64, "reference"),
        )
    ]
    for actual, plain, exact in zip(*outputs):
        assert_within_contract(actual, plain, exact)
    back = block_inverse(x, w, spec, **context, backend="native").x
    plain = block_inverse(x, w, spec, **context, backend="reference").x
    assert_within_contract(back, plain, block_inverse(x64, w64, spec, **context64, backend="reference").x)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_logdet_of_a_negative_sigma_is_that_of_its_size(backend):
    z, w, context = tame_block(WIDE_SPECS["starflow-text"], 5, 1, 4, copies=2)
    options = {**context, "guidance": 100.0, "rule": "itarflow", "backend": backend}
    first, second = (block_inverse(noise, w, WIDE_SPECS["starflow-text"], **options) for noise in (z, z + 1))
    sigma = second.x - first.x
    assert (sigma < 0).any()
    torch.testing.assert_close(first.logdet, sigma.abs().log().sum((1, 2)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rule", ["tarflow", "starflow", "itarflow"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.usefixtures("poisoned_memory")
def test_guided_inverse(rule, temperature):
    spec = WIDE_SPECS["starflow-text"]
    z, w, context = tame_block(spec, 5, 21, 4, copies=2)
    options = {"guidance": torch.rand(5, 21) * 2, "rule": rule, "temperature": temperature}
    w64, context64 = ({n: t.double() for n, t in given.items()} for given in (w, context))
    exact = block_inverse(z.double(), w64, spec, **context64, **options, backend="reference").x
    plain = block_inverse(z, w, spec, **context, **options, backend="reference").x
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_within_contract(block_inverse(z, w, spec, **context, **options, backend="native").x, plain, exact)


@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs_are_read_and_left():
    spec = WIDE_SPECS["starflow-text"]
    z, w, context = tame_block(spec, 2, 7, 3)
    expected = block_inverse(z, w, spec, **context, backend="native").x
    copies = strided(z), {n: strided(t) for n, t in w.items()}
    given = {n: strided(t) for n, t in context.items()}
    assert torch.equal(block_inverse(*copies, spec, **given, backend="native").x, expected)
    assert torch.equal(copies[0], z) and all(torch.equal(copies[1][n], w[n]) for n in w)


def test_packed_weights_are_those_of_a_spec():
    spec = WIDE_SPECS["tarflow"]
    x, w, context = tame_block(spec, 1, 5)
    for other in (spec, dataclasses.replace(spec, flip=not spec.flip), spec):
        found = block_forward(x, w, other, **context, backend="native")[0]
        expected = block_forward(x, w, other, **context, backend="reference")[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", [None, 0.8])
def test_batches_larger_than_the_memory_bound_are_split(guidance, monkeypatch):
    spec = WIDE_SPECS["starflow-text"]
    z, w, context = tame_block(spec, 7, 9, 3, copies=1 if guidance is None else 2)
    calls = []
    options = {"guidance": guidance, "progress": lambda done, total: calls.append((done, total))}
    whole = block_inverse(z, w, spec, **context, **options, backend="native").x
    assert calls == [(63, 63)]
    row = 4 * sum(torch.ops.starflow_native.block_sizes(spec_fields(spec, torch.float32), 1, 12)[:1])
    monkeypatch.setenv("STARFLOW_CACHE_GB", str((2 if guidance is None else 4) * row / 2**30 + 1e-9))
    assert torch.equal(block_inverse(z, w, spec, **context, **options, backend="native").x, whole)
    assert calls[1:] == [(18, 63), (36, 63), (54, 63), (63, 63)]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_the_progress_callback_raises_ends_the_call(backend):
    z, w, context = tame_block(WIDE_SPECS["tarflow"], 2, 5)
    seen = []

    def stop(done, total):
        seen.append((done, total))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        block_inverse(z, w, WIDE_SPECS["tarflow"], **context, progress=stop, backend=backend)
    assert seen == [(10 if backend == "native" else 4, 10)]


# Background jobs of a shell ignore SIGINT, and their children inherit it.
LONG_CALL = """
import signal
import torch
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
from starflow_kernels import BlockSpec, block_inverse
spec = BlockSpec(token_dim=8, channels=512, layers=8, heads=8, head_dim=64, kv_heads=8, mlp_dim=2048)
weights = {n: torch.randn(s) / 100 for n, s in spec.weight_shapes.items()}
z = torch.randn(8, 4096, 8)
block_inverse(z, weights, spec, backend="native", progress=lambda done, total: print(done, flush=True))
"""


def _cpu_seconds(pid):
    """Return the CPU time of a process, which does not grow while others use the machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_an_interrupt_stops_it_within_a_second():
    with subprocess.Popen([sys.executable, "-c", LONG_CALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.readline()
        start = _cpu_seconds(child.pid)
        child.send_signal(signal.SIGINT)
        while child.stdout.readline():
            pass
        assert b"KeyboardInterrupt" in child.stderr.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert _cpu_seconds(child.pid) - start < 1


def sample_by_jacobi(*args, **options):
    """Call block_inverse with the Jacobi solver."""
    return block_inverse(*args, **options, solver=Solver("jacobi")).x


@pytest.mark.parametrize(
    "op, call", [("block_forward", block_forward), ("block_inverse", block_inverse), ("block_jacobi", sample_by_jacobi)]
)
@pytest.mark.parametrize(
    "tokens, weights, reason",
    [
        (torch.float32, torch.float16, "weight is torch.float16, it takes float32 and bfloat16"),
        (torch.float64, torch.float32, "x is torch.float64, it takes float32"),
    ],
    ids=["weights", "tokens"],
)
def test_what_it_does_not_take_is_refused_with_the_reason(op, call, tokens, weights, reason):
    x, w, context = tame_block(WIDE_SPECS["tarflow"], 1, 5, dtype=weights)
    with pytest.raises(ValueError, match=f"backend='native' cannot run {op}: {reason}"):
        call(x.to(tokens), w, WIDE_SPECS["tarflow"], **context, backend="native")


ULPS = {"exp": 1.0, "log": 1.5, "log1p": 2.0, "tanh": 2.0, "softplus_one": 2.5}
RANGES = {"exp": (-86, 88), "log": (1e-3, 10), "log1p": (0, 1), "tanh": (-12, 12)}


@pytest.mark.parametrize("name", ULPS)
def test_elementary_functions(name):
    low, high = RANGES.get(name, (-20, 20))
    x = torch.linspace(low, high, 4001)
    functions = ["exp", "log", "log1p", "tanh", "gelu", "gelu_tanh", "softplus_one"]
    found = torch.empty_like(x)
    torch.ops.starflow_native.elementary(x, functions.index(name), found)

    def exact(value):
        value = mpmath.mpf(value)
        if name == "softplus_one":
            return mpmath.log(1 + (mpmath.e - 1) * mpmath.exp(value))
        return {"log1p": mpmath.log1p}.get(name, getattr(mpmath, name, None))(value)

    for value, actual in zip(x.tolist(), found):
        wanted = exact(value)
        rounded = torch.tensor(float(wanted), dtype=torch.float32)
        ulp = (torch.nextafter(rounded.abs(), torch.tensor(torch.inf)) - rounded.abs()).item()
        assert abs(mpmath.mpf(actual.item()) - wanted) <= ULPS[name] * ulp + 1e-45, value


@pytest.mark.parametrize("name, index", [("none", 4), ("tanh", 5)])
def test_gelu(name, index):
    x = torch.cat([torch.linspace(-9, 9, 40001), torch.tensor([-1e4, 1e4, 0.0])])
    found = torch.empty_like(x)
    torch.ops.starflow_native.elementary(x, index, found)
    exact = torch.nn.functional.gelu(x.double(), approximate=name)
    assert ((found - exact).abs() <= 2.5 * torch.finfo(torch.float32).eps * x.abs()).all()
    assert torch.equal(found[-3:], torch.tensor([0.0, 1e4, 0.0]))


def test_exp_at_the_ends():
    x = torch.tensor([-torch.inf, -104.0, 0.0, 88.8, torch.inf, torch.nan])
    found = torch.empty_like(x)
    torch.ops.starflow_native.elementary(x, 0, found)
    torch.testing.assert_close(found, torch.tensor([0, 0, 1, torch.inf, torch.inf, torch.nan]), equal_nan=True)


def test_the_narrower_isa_is_used():
    wanted = os.environ.get("STARFLOW_ISA")
    found = torch.ops.starflow_native.instruction_set()
    assert found == wanted if wanted else found in ("base", "avx2", "avx512")
