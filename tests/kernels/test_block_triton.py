"""Sampling of a block in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_block_triton.py."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.backends import require_interpreter
from support.blocks import BLOCKS, GPU_BLOCKS, block
from support.contract import assert_within_contract

from starflow_kernels import Solver, block_inverse

require_interpreter()
F32, F64 = torch.float32, torch.float64


def doubled(z, w, context):
    return z.double(), {n: t.double() for n, t in w.items()}, {n: t.double() for n, t in context.items()}


def assert_inverse(case, guided=False, rule="tarflow", quantize="none", **sizes):
    """Check the error contract of the whole inverse against the reference in float64."""
    z, w, spec, context = block(case, copies=2 if guided else 1, **sizes)
    options = {"guidance": torch.rand(z.shape[:2]) * 2, "rule": rule, "temperature": 0.7} if guided else {}
    options["quantize"] = quantize
    found, plain = (block_inverse(z, w, spec, **context, **options, backend=b).x for b in ("triton", "reference"))
    z, w, context = doubled(z, w, context)
    assert_within_contract(found, plain, block_inverse(z, w, spec, **context, **options, backend="reference").x)


@pytest.mark.parametrize("case", GPU_BLOCKS.values(), ids=GPU_BLOCKS.keys())
def test_every_block_at_odd_sizes(case):
    heads = {} if "kv_heads" in case[0] else {"heads": 1, "kv_heads": 1}
    assert_inverse(case, dtype=F32, B=3, tokens=2, **heads, token_dim=7, channels=35, mlp_dim=37)


@pytest.mark.parametrize("name", ["tarflow-flip", "tarflow-swiglu", "starflow-text", "starflow-all-norms"])
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_error_contract(name, dtype):
    assert_inverse(BLOCKS[name], dtype=dtype, B=2, tokens=3, token_dim=8, channels=48, mlp_dim=40)


@pytest.mark.parametrize("rule", ["tarflow", "starflow", "itarflow"])
@pytest.mark.parametrize("name", ["tarflow-unit", "tarflow-flip", "starflow-text"])
def test_guidance_and_temperature(name, rule):
    assert_inverse(BLOCKS[name], guided=True, rule=rule, dtype=F32, tokens=3, layers=1)


@pytest.mark.parametrize("name", ["tarflow", "starflow", "starflow-text-flip-cond"])
def test_one_token(name):
    assert_inverse(BLOCKS[name], dtype=F32, tokens=1)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text-flip-cond"])
@pytest.mark.parametrize("token_dim, dtype", [(192, torch.float16), (192, F32), (300, torch.float16)], ids=str)
def test_wide_tokens(name, token_dim, dtype):
    sizes = {"token_dim": token_dim, "layers": 1, "channels": 24, "mlp_dim": 24}
    assert_inverse(BLOCKS[name], guided=True, dtype=dtype, tokens=2, **sizes)


@pytest.mark.parametrize("name", ["starflow", "starflow-text"])
def test_more_keys_than_a_split(name, monkeypatch):
    from starflow_kernels.block.triton import sequential, sizes

    monkeypatch.setattr(sizes, "SPLIT", 4)
    monkeypatch.setattr(sizes, "BLOCK_S", 2)
    monkeypatch.setattr(sizes, "PASS_ROWS", 6)
    monkeypatch.setattr(sequential, "kept_sessions", sequential.Sessions())
    assert_inverse(BLOCKS[name], dtype=F32, tokens=9, layers=1)


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_products_in_parts(dtype):
    from starflow_kernels.block.triton import sizes

    assert sizes.product_parts(300, 35, dtype.itemsize) > 2
    assert_inverse(BLOCKS["starflow-text"], dtype=dtype, tokens=2, layers=1, channels=35, mlp_dim=300)


def test_parts_of_a_product_fill_a_large_gpu_and_none_is_empty():
    from starflow_kernels.block.triton.sizes import product_parts

    # Programs of both products into the state.
    assert [96 * product_parts(width, 3072, 2) for width in (3072, 12288)] == [384, 384]
    assert [24 * product_parts(width, 768, 2) for width in (768, 3072)] == [144, 288]
    for width in range(1, 5000, 37):
        blocks, parts = -(-width // 128), product_parts(width, 768, 2)
        assert (parts - 1) * -(-blocks // parts) < blocks


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-all-norms"])
@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi", window=3, tol=1e-6)], ids=["sequential", "jacobi"])
def test_programs_may_run_in_any_order(name, solver, monkeypatch):
    """The last program of a sum to arrive adds the parts, whichever it is."""
    from triton.runtime.interpreter import interpreter_builder

    from starflow_kernels.block.triton import sequential, sizes

    monkeypatch.setattr(sequential, "kept_sessions", sequential.Sessions())
    for size, value in {"SPLIT": 16, "BLOCK_S": 16}.items():
        monkeypatch.setattr(sizes, size, value)
    z, w, spec, context = block(BLOCKS[name], dtype=F32, tokens=18, layers=1, heads=1, kv_heads=1, mlp_dim=130)
    assert sizes.product_parts(130, spec.channels, 4) == 3

    def run():
        return block_inverse(z, w, spec, **context, solver=solver, backend="triton").x

    expected, place = run(), interpreter_builder.set_grid_idx
    for order in (lambda x, n: n - 1 - x, lambda x, n: (x + n // 2) % n):

        def shuffled(x, y, z, order=order):
            place(order(x, interpreter_builder.grid_dim[0]), y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("name", ["tarflow-flip", "tarflow-rms-clip", "tarflow-swiglu"])
def test_norms_of_states_far_from_zero(name, monkeypatch):
    from starflow_kernels.block.triton import sequential, sizes

    # A row has three tiles with statistics.
    monkeypatch.setattr(sequential, "kept_sessions", sequential.Sessions())
    monkeypatch.setattr(sizes, "TILES", 2)
    z, w, spec, context = block(BLOCKS[name], dtype=F32, tokens=2, layers=2, channels=70, heads=1, kv_heads=1)
    w["proj_in.bias"] += 30
    plain, found = (block_inverse(z, w, spec, **context, backend=b).x for b in ("reference", "triton"))
    z, w, context = doubled(z, w, context)
    assert_within_contract(found, plain, block_inverse(z, w, spec, **context, backend="reference").x)


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
@pytest.mark.parametrize(
    "name, dtype", [("tarflow-swiglu", F32), ("starflow-text", F32), ("starflow-all-norms", torch.float16)]
)
def test_weights_of_one_byte(name, dtype, quantize):
    assert_inverse(BLOCKS[name], quantize=quantize, dtype=dtype, tokens=2, channels=35, mlp_dim=37)


@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
def test_every_value_of_a_byte(dtype):
    """The product with an identity matrix gives the values that the bits of fp8 or int8 stand for."""
    from starflow_kernels.block.triton import sequential, sizes, step_kernels

    config = sizes.config("product", dtype.itemsize, 16, 16)
    for stored, kind in ((torch.uint8, torch.float8_e4m3fn), (torch.int8, torch.int8)):
        bits = torch.arange(256).to(torch.uint8)
        bits[bits.view(kind).float().isnan()] = 0
        bits = bits.view(16, 16)
        out = torch.zeros(16, 16)
        step_kernels.block_product_kernel[(1,)](
            torch.eye(16, dtype=dtype), bits.view(stored), None, out, None, torch.zeros(16, 2), None, None,
            torch.ones(16), None, None, 16, 1, 16, 16, PARTS=1, BIAS=False, POST=False,
            DTYPE=sequential.triton_dtype(dtype), BLOCK_M=16, **config,
        )  # fmt: skip
        known = bits.view(kind).float().T
        assert torch.equal(out * (256 if stored == torch.uint8 else 1), known)


@pytest.fixture
def matmul_by_rows(monkeypatch):
    """Multiply row by row: the bits of numpy's products, which the interpreter uses, depend on the place of a row."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: (a[:, :, None] * b[None]).sum(1, dtype=dtype))


@pytest.mark.parametrize("name, guided, T", [("tarflow-flip", True, 2), ("starflow-text", False, 1)])
@pytest.mark.usefixtures("matmul_by_rows")
def test_rows_have_the_same_bits_in_any_batch(name, guided, T, monkeypatch):
    B = 17
    sizes = {"layers": 1, "heads": 1, "kv_heads": 1, "mlp_dim": 130}
    z, w, spec, context = block(BLOCKS[name], B=B, copies=1 + guided, dtype=F32, tokens=T, **sizes)
    guidance = torch.rand(B, T) if guided else None

    def run(rows):
        given = {
            n: t if n in ("cos", "sin") else t.unflatten(0, (-1, B))[:, rows].flatten(0, 1) for n, t in context.items()
        }
        weight = {"guidance": guidance[rows]} if guided else {}
        return block_inverse(z[rows], w, spec, **given, **weight, backend="triton").x

    whole = run(slice(None))
    for rows in (slice(0, 1), slice(14, 17)):
        assert torch.equal(run(rows), whole[rows])
    monkeypatch.setenv("STARFLOW_CACHE_GB", "2e-4")
    assert torch.equal(run(slice(None)), whole)


def test_sessions_are_reused_and_end_with_their_model():
    from starflow_kernels.block.triton import sequential

    gc.collect()
    before = len(sequential.kept_sessions)
    z, w, spec, context = block(BLOCKS["tarflow-flip"], dtype=F32, B=4, tokens=3, layers=1)
    first = block_inverse(z, w, spec, **context, backend="triton").x
    cond = {"cond": context["cond"][:3]}
    assert torch.equal(block_inverse(z[:3], w, spec, **cond, backend="triton").x, first[:3])
    assert len(sequential.kept_sessions) == before + 1
    rounded = block_inverse(z, w, spec, **context, quantize="int8", backend="triton").x
    assert not torch.equal(rounded, first) and len(sequential.kept_sessions) == before + 2
    w["proj_in.weight"].mul_(2)
    assert not torch.equal(block_inverse(z, w, spec, **context, backend="triton").x, first)
    assert len(sequential.kept_sessions) == before + 2
    del w
    gc.collect()
    assert len(sequential.kept_sessions) == before


def test_progress():
    z, w, spec, context = block(BLOCKS["starflow"], dtype=F32, tokens=18, layers=1, heads=1, kv_heads=1)
    seen = []
    block_inverse(z, w, spec, **context, progress=lambda *at: seen.append(at), backend="triton")
    assert len(seen) <= 16 and seen == sorted(seen) and seen[-1] == (36, 36)


def test_a_progress_callback_may_sample_the_same_model():
    z, w, spec, context = block(BLOCKS["starflow"], dtype=F32, tokens=2, layers=1, heads=1, kv_heads=1)

    def run(noise, **options):
        return block_inverse(noise, w, spec, **context, **options, backend="triton").x

    expected = run(z)
    assert torch.equal(run(z, progress=lambda *at: run(2 * z)), expected)


def test_a_failed_capture_is_made_anew_by_the_next_call(monkeypatch):
    from starflow_kernels.block.triton import sequential

    session = sequential.TritonSession.__new__(sequential.TritonSession)
    session.device, session.graph, session.names, session.stream = torch.device("cuda"), None, [], None
    for name in ("launch", "fill", "begin"):
        setattr(session, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    attempts = []

    def captured(launch, device):
        attempts.append(device)
        if len(attempts) == 1:
            raise MemoryError
        return SimpleNamespace(replay="replay")

    monkeypatch.setattr(sequential, "captured", captured)
    running = sequential.Running(session, {}, 0)
    with pytest.raises(MemoryError):
        running.load(None, (None,) * 6, 1.0)
    running.load(None, (None,) * 6, 1.0)
    assert running.step == "replay" and len(attempts) == 2


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"head_dim": 264}, "heads of 264"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
    ],
)
def test_refuses_with_the_reason(changes, why):
    z, w, spec, context = block(BLOCKS["starflow"], **{"dtype": F32, **changes})
    with pytest.raises(ValueError, match=f"backend='triton' cannot run block_inverse: .*{why}"):
        block_inverse(z, w, spec, **context, backend="triton")


@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi")])
def test_refuses_an_adaptive_block(solver):
    z, w, spec, context = block(BLOCKS["adaptive"], dtype=F32)
    with pytest.raises(ValueError, match="it takes no adaptive block, and no LayerNorm of queries and keys"):
        block_inverse(z, w, spec, **context, solver=solver, backend="triton")


def test_dependent_launch_needs_sm_90_and_can_be_turned_off(monkeypatch):
    from starflow_kernels.block.triton import sequential

    chip, device = [(9, 0)], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip[0])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("STARFLOW_PDL", raising=False)
    assert sequential.pdl(device) and not sequential.pdl(torch.device("cpu"))
    monkeypatch.setenv("STARFLOW_PDL", "0")
    assert not sequential.pdl(device)
    monkeypatch.delenv("STARFLOW_PDL")
    chip[0] = 8, 6
    assert not sequential.pdl(device)
    chip[0] = 9, 0
    monkeypatch.delattr(sequential.tl.extra.cuda, "gdc_wait")
    assert not sequential.pdl(device)
