"""The persistent inverse of csrc/cuda, with its threads executed on the CPU in several orders.

See csrc/emulation/fibers.h. scripts/check_races.py looks for races and for barriers that no order needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil

import pytest
import torch
from support.bindings import Recorded, assert_checked
from support.blocks import tame_block
from support.contract import assert_within_contract
from support.emulated import load

from starflow_kernels import AffineSpec, BlockSpec, block_inverse
from starflow_kernels.block import cuda, persistent, phases, reference

HOPPER = cuda.Device(limit=232448, processors=132, cluster=8)
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="it needs g++")

SIZES = {"token_dim": 5, "channels": 24, "layers": 2, "heads": 2, "head_dim": 12, "kv_heads": 2, "mlp_dim": 50}
STARFLOW = {"affine": AffineSpec("softplus", 4.0), "rotary": "interleaved", "start": True, "final_norm": True}
EVERYTHING = {"qk_norm": True, "post_norm": True, "norm": "rms_norm", "mlp": "swiglu", "kv_heads": 1, "bias": False}
SPECS = {
    "tarflow": BlockSpec(**SIZES, flip=True, positions=3),
    "starflow": BlockSpec(**SIZES, **STARFLOW, text_dim=7),
    "everything": BlockSpec(**{**SIZES, **STARFLOW, **EVERYTHING, "rotary": "half", "flip": True, "text_dim": 7}),
    "unit": BlockSpec(**{**SIZES, "channels": 13, "token_dim": 1, "norm": "none", "affine": AffineSpec("unit", 2.0)}),
    "wide": BlockSpec(**{**SIZES, "layers": 1, "channels": 51, "token_dim": 12, "head_dim": 70, "mlp_dim": 301}),
    "post": BlockSpec(**SIZES, norm="none", post_norm=True, start=True),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def on(monkeypatch):
    """Run persistent.block_inverse on the CPU: on(thread blocks, order of threads, bytes of shared memory)."""
    monkeypatch.setattr(persistent, "OPS", load("persistent"))

    def choose(blocks, order=0, limit=HOPPER.limit):
        monkeypatch.setattr(cuda, "stream", lambda device: contextlib.nullcontext(order))
        monkeypatch.setattr(cuda, "device_sizes", lambda device: cuda.Device(limit, blocks, 1))

    persistent.plan.cache_clear()
    choose(2)
    yield choose
    persistent.plan.cache_clear()


def run(z, w, spec, context, guidance=None, rule="tarflow", temperature=1.0, known=None):
    """Run the kernel on the CPU."""
    weights, given = list(w.values()), [context.get(name) for name in ("cond", "prefix", "cos", "sin")]
    device = cuda.device_sizes(z.device)
    assert persistent.refuse_block(z, weights, given[1], guidance, spec.to_json(), device) is None
    given = weights, *given, guidance, spec.to_json(), rule, temperature, "none", known
    x, log_sigma = persistent.block_inverse(z, *given)
    torch.testing.assert_close(log_sigma, reference.block_inverse(z, *given)[1], rtol=1e-3, atol=3e-2)
    return x


def assert_contract(x, z, w, spec, context, **options):
    w64, context64 = ({n: t.double() for n, t in given.items()} for given in (w, context))
    wide = {**options, "data": options["data"].double()} if "data" in options else options
    exact = block_inverse(z.double(), w64, spec, **context64, **wide, backend="reference").x
    assert_within_contract(x, block_inverse(z, w, spec, **context, **options, backend="reference").x, exact)


@every_spec
@dtypes
def test_any_number_of_thread_blocks_in_any_order_gives_the_same_bits_within_the_contract(spec, dtype, on):
    z, w, context = tame_block(spec, 3, 3, text=2, dtype=dtype)
    x = run(z, w, spec, context)
    assert_contract(x, z, w, spec, context)
    for blocks, order in ((1, 1), (3, 5), (16, 2)):
        on(blocks, order)
        assert torch.equal(run(z, w, spec, context), x)


@pytest.mark.parametrize("name, rule", [("tarflow", "tarflow"), ("everything", "starflow"), ("unit", "starflow")])
@dtypes
def test_guided_inverse(name, rule, dtype, on):
    z, w, context = tame_block(SPECS[name], 5, 3, text=1, dtype=dtype, copies=2)
    guidance = torch.rand(5, 3) * 2
    x = run(z, w, SPECS[name], context, guidance, rule, 0.7)
    assert_contract(x, z, w, SPECS[name], context, guidance=guidance, rule=rule, temperature=0.7)
    on(5, 9)
    assert torch.equal(run(z, w, SPECS[name], context, guidance, rule, 0.7), x)


@dtypes
def test_a_row_has_the_same_bits_in_any_batch(dtype, on):
    spec = SPECS["everything"]
    z, w, context = tame_block(spec, 16, 2, dtype=dtype)
    x = run(z, w, spec, context)
    for which in (slice(3, 4), slice(11, 16)):
        part = {n: t if n in ("cos", "sin") else t[which] for n, t in context.items()}
        assert torch.equal(run(z[which], w, spec, part), x[which])


@dtypes
def test_splits_of_attention_are_joined_in_one_order(dtype, on):
    spec = dataclasses.replace(SPECS["everything"], layers=1, mlp_dim=8, channels=8)
    z, w, context = tame_block(spec, 1, 70, dtype=dtype)
    x = run(z, w, spec, context)
    assert_contract(x, z, w, spec, context)
    on(5, 3)
    assert torch.equal(run(z, w, spec, context), x)


@pytest.mark.parametrize("stages", [4, 5, 32])
def test_a_ring_of_any_length_gives_the_same_bits(stages, on, monkeypatch):
    monkeypatch.setattr(persistent, "STAGE_STEPS", 8)
    spec = dataclasses.replace(SPECS["everything"], mlp_dim=150, layers=1)
    z, w, context = tame_block(spec, 1, 3)
    x = run(z, w, spec, context)
    monkeypatch.setattr(persistent, "MOST_STAGES", stages)
    on(3, stages)
    assert torch.equal(run(z, w, spec, context), x)


def test_weights_that_fit_stay_on_chip(on):
    spec = SPECS["unit"]
    z, w, context = tame_block(spec, 1, 3)
    x = run(z, w, spec, context)
    on(20, 4)
    fields = tuple(persistent.spec_fields(spec, torch.float32))
    assert persistent.plan(fields, (1, 0, 3, HOPPER.limit, 20, 16, 32)).resident
    assert not persistent.plan(fields, (1, 0, 3, HOPPER.limit, 1, 16, 32)).resident
    assert torch.equal(run(z, w, spec, context), x)


def test_condition_per_token_and_given_tokens(on):
    spec = SPECS["starflow"]
    z, w, context = tame_block(spec, 3, 4)
    context["cond"], known = torch.randn(3, 4, spec.channels), torch.tensor([0, 2, 4])
    x = run(z, w, spec, context, known=known)
    assert_contract(x, z, w, spec, context, data=z, known=known)
    given = torch.arange(4) < known[:, None]
    assert torch.equal(x[given], z[given])


@pytest.mark.parametrize("B, T", [(0, 3), (2, 1)])
def test_no_samples_and_no_steps(B, T, on):
    spec = dataclasses.replace(SPECS["tarflow"], positions=0)
    z, w, context = tame_block(spec, B, T)
    assert torch.equal(run(z, w, spec, context), z)


def test_what_it_does_not_take_is_refused_with_the_reason(on):
    spec = dataclasses.replace(SPECS["tarflow"], positions=0)
    z, w, _ = tame_block(spec, 2, 4)

    def reason(z=z, dtype=torch.float32, guidance=None, spec=spec, limit=HOPPER.limit):
        weights = [t.to(dtype) for t in w.values()]
        return persistent.refuse_block(z, weights, None, guidance, spec.to_json(), HOPPER._replace(limit=limit))

    assert reason() is None
    assert "tokens are torch.float64" in reason(z=z.double())
    assert "weights are torch.float16" in reason(dtype=torch.float16)
    assert "it takes no adaptive block" in reason(spec=dataclasses.replace(spec, adaptive=True))
    nine = z[:1].expand(9, -1, -1)
    assert reason(z=nine) is None
    assert "there are 18 rows" in reason(z=nine, guidance=torch.ones(9, 4))
    assert "leave no room for weights in 4096 bytes" in reason(limit=4096)
    assert persistent.refuse(z, *[None] * 9) == "it runs on a GPU, tokens are on cpu"


@dtypes
def test_every_argument_of_a_call_is_checked(dtype, on, monkeypatch):
    ops = Recorded(load("persistent"))
    monkeypatch.setattr(persistent, "OPS", ops)
    spec = dataclasses.replace(SPECS["starflow"], positions=3, layers=1)
    z, w, context = tame_block(spec, 2, 3, text=2, dtype=dtype, copies=2)
    run(z, w, spec, context, torch.rand(2, 3))
    assert_checked(*ops.calls["persistent_inverse"])


def predicted(spec, rows=1, slots=512):
    steps = phases.phases(spec, rows, slots, 2)
    return steps, phases.floor_seconds(steps), phases.persistent_seconds(steps, 132)


def test_the_phases_have_the_bytes_of_the_packed_weights(on):
    spec = BlockSpec(token_dim=32, channels=64, layers=2, heads=2, head_dim=32, kv_heads=1, mlp_dim=96, mlp="swiglu")
    steps, _, _ = predicted(spec)
    assert len(steps) == 2 + 5 * spec.layers
    matrices = sum(step.bytes for step in steps if step.name != "attend")
    biases = sum(shape[0] for name, shape in spec.weight_shapes.items() if name.endswith("bias") and "norm" not in name)
    plan = persistent.plan(tuple(persistent.spec_fields(spec, torch.bfloat16)), (1, 0, 8, HOPPER.limit, 132, 16, 32))
    assert plan.weights == matrices + 4 * biases


def test_the_model_finds_large_blocks_bound_by_memory_and_small_ones_by_barriers():
    sizes = {"token_dim": 48, "head_dim": 64}
    large = BlockSpec(**sizes, channels=3072, layers=24, heads=48, kv_heads=48, mlp_dim=12288)
    small = BlockSpec(**sizes, channels=768, layers=8, heads=12, kv_heads=12, mlp_dim=3072)
    _, floor, seconds = predicted(large, rows=2)
    assert seconds == floor / phases.STREAM
    steps, floor, seconds = predicted(small)
    assert seconds > len(steps) * phases.PRODUCT_SECONDS > floor


def test_the_model_chooses_between_the_kernels_with_one_launch(on, monkeypatch):
    spec = dataclasses.replace(SPECS["tarflow"], positions=0)
    z, w, _ = tame_block(spec, 4, 4)

    def fastest(z=z, dtype=torch.float32):
        return phases.fastest(z, [t.to(dtype) for t in w.values()], None, None, spec.to_json(), HOPPER)

    monkeypatch.setattr(cuda, "plan", lambda *of: cuda.Plan(1, 0, True, 10, 10, 10, 1))
    assert fastest() == "persistent"
    monkeypatch.setattr(cuda, "plan", lambda *of: cuda.Plan(1, 1, True, 10, 10, 10, 10**6))
    assert fastest() == "persistent"
    monkeypatch.setattr(cuda, "plan", lambda *of: cuda.Plan(1, 1, True, 10, 10, 10, 1))
    assert fastest() == "cuda"
    assert fastest(z=z[:1].expand(17, -1, -1)) is fastest(dtype=torch.float16) is None
