"""The on-chip inverse of csrc/cuda, with its threads executed on the CPU, in order and in reverse order.

See csrc/emulation/fibers.h. STARFLOW_SANITIZE=address builds it with a sanitizer, whose library must be preloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil

import pytest
import torch
from support.bindings import Recorded, assert_checked
from support.blocks import tame_block
from support.contract import assert_within_contract, strided
from support.emulated import load

from starflow_kernels import AffineSpec, BlockSpec, block_inverse
from starflow_kernels._core import compiled
from starflow_kernels.block import cuda, reference
from starflow_kernels.block.packing import spec_fields

HOPPER = cuda.Device(limit=232448, processors=132, cluster=8)
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="it needs g++")

SIZES = {"token_dim": 5, "channels": 24, "layers": 2, "heads": 2, "head_dim": 12, "kv_heads": 2, "mlp_dim": 50}
STARFLOW = {"affine": AffineSpec("softplus", 4.0), "rotary": "interleaved", "start": True, "final_norm": True}
EVERYTHING = {"qk_norm": True, "post_norm": True, "norm": "rms_norm", "mlp": "swiglu", "kv_heads": 1, "bias": False}
SPECS = {
    "tarflow": BlockSpec(**SIZES, flip=True),
    "starflow": BlockSpec(**SIZES, **STARFLOW),
    "everything": BlockSpec(**{**SIZES, **STARFLOW, **EVERYTHING, "rotary": "half", "flip": True}),
    "unit": BlockSpec(**{**SIZES, "channels": 13, "token_dim": 1, "norm": "none", "affine": AffineSpec("unit", 2.0)}),
    "wide": BlockSpec(**{**SIZES, "layers": 1, "channels": 51, "token_dim": 12, "head_dim": 36}),
    "post": BlockSpec(**SIZES, norm="none", post_norm=True, start=True),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def emulated(monkeypatch):
    """Run cuda.block_inverse on the CPU: emulated(reverse, sizes of the device, changes to its plans)."""
    planner = cuda.plan

    def choose(reverse=False, sizes=HOPPER, **changes):
        monkeypatch.setattr(cuda, "stream", lambda device: contextlib.nullcontext(int(reverse)))
        monkeypatch.setattr(cuda, "device_sizes", lambda device: sizes)
        monkeypatch.setattr(cuda, "plan", lambda *of: planner(*of)._replace(**changes) if changes else planner(*of))

    monkeypatch.setattr(cuda, "OPS", load("onchip"))
    planner.cache_clear()
    choose()
    yield choose
    planner.cache_clear()


def cluster_of(size, processors, **changes):
    """Return arguments of `emulated`: a device without memory, which plans its largest clusters, and changes."""
    return {"sizes": cuda.Device(0, processors, size), "on_chip": True, **changes}


def fields(spec, dtype=torch.float32):
    return tuple(spec_fields(spec, dtype))


def cached(spec, dtype, slots, cluster=1):
    """Return the values of KV cache per row and thread block: keys in vectors of 16 bytes, then values."""
    vector = 16 // dtype.itemsize
    keys = -(-slots // cluster) * -(-spec.head_dim // vector)
    values = -(-slots * -(-spec.head_dim // cluster) // vector)
    return spec.layers * spec.kv_heads * (keys + values) * vector


def run(z, w, spec, context, guidance=None, rule="tarflow", temperature=1.0, quantize="none", known=None):
    """Run the kernel on the CPU."""
    given = [context.get(name) for name in ("cond", "prefix", "cos", "sin")]
    assert cuda.refuse_block(z, list(w.values()), None, guidance, spec.to_json(), cuda.device_sizes(z.device)) is None
    given = list(w.values()), *given, guidance, spec.to_json(), rule, temperature, quantize, known
    x, log_sigma = cuda.block_inverse(z, *given)
    torch.testing.assert_close(log_sigma, reference.block_inverse(z, *given)[1], rtol=1e-3, atol=3e-2)
    return x


def assert_contract(x, z, w, spec, context, **options):
    w64, context64 = ({n: t.double() for n, t in given.items()} for given in (w, context))
    wide = {**options, "data": options["data"].double()} if "data" in options else options
    exact = block_inverse(z.double(), w64, spec, **context64, **wide, backend="reference").x
    assert_within_contract(x, block_inverse(z, w, spec, **context, **options, backend="reference").x, exact)


@every_spec
@dtypes
@pytest.mark.parametrize("positions, T", [(False, 1), (False, 2), (True, 2), (True, 17)])
def test_error_contract(spec, dtype, T, positions, emulated):
    spec = dataclasses.replace(spec, positions=T if positions else 0)
    z, w, context = tame_block(spec, 3, T, dtype=dtype)
    before = z.clone()
    x = run(z, w, spec, context)
    assert torch.equal(z, before)
    assert_contract(x, z, w, spec, context)
    emulated(reverse=True)
    assert torch.equal(run(z, w, spec, context), x)


@pytest.mark.parametrize("name", ["starflow", "unit", "wide"])
@pytest.mark.parametrize("copies", [1, 2])
def test_condition_per_token_and_given_tokens(name, copies, emulated):
    spec, T = SPECS[name], 9
    z, w, context = tame_block(spec, 3, T, copies=copies)
    context["cond"] = torch.randn(copies * 3, T, spec.channels)
    guidance = torch.rand(3, T) if copies == 2 else None
    known = torch.tensor([0, 4, 9])
    x = run(z, w, spec, context, guidance, known=known)
    assert_contract(x, z, w, spec, context, guidance=guidance, data=z, known=known)
    given = torch.arange(T) < known[:, None]
    assert torch.equal(x[given], z[given])


@pytest.mark.parametrize("D", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("C", [4, 16, 30])
def test_token_sizes(D, C, emulated):
    spec = dataclasses.replace(SPECS["starflow"], token_dim=D, channels=C)
    z, w, context = tame_block(spec, 2, 6)
    assert_contract(run(z, w, spec, context), z, w, spec, context)


@pytest.mark.parametrize("reverse", [False, True])
def test_more_tokens_than_a_warp_has_lanes(reverse, emulated):
    emulated(reverse)
    z, w, context = tame_block(SPECS["everything"], 2, 64)
    assert_contract(run(z, w, SPECS["everything"], context), z, w, SPECS["everything"], context)


@pytest.mark.parametrize("name", ["tarflow", "starflow", "unit"])
@pytest.mark.parametrize("rule", ["tarflow", "starflow", "itarflow"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_guided_inverse(name, rule, temperature, emulated):
    spec = SPECS[name]
    z, w, context = tame_block(spec, 5, 9, copies=2)
    guidance = torch.rand(5, 9) * 2
    emulated(sizes=HOPPER._replace(processors=2))
    x = run(z, w, spec, context, guidance, rule, temperature)
    assert_contract(x, z, w, spec, context, guidance=guidance, rule=rule, temperature=temperature)
    emulated(True, sizes=HOPPER._replace(processors=2))
    assert torch.equal(run(z, w, spec, context, guidance, rule, temperature), x)


@dtypes
def test_a_row_has_the_same_bits_in_any_batch_and_group(dtype, emulated):
    spec = dataclasses.replace(SPECS["everything"], mlp_dim=80)
    z, w, context = tame_block(spec, 67, 3, dtype=dtype)
    # A group of 64 rows takes them 32 at a time in bfloat16, 8 at a time in float32.
    emulated(sizes=HOPPER._replace(processors=1), group=64)
    x = run(z, w, spec, context)
    assert_contract(x, z, w, spec, context)
    for which in (slice(5, 6), slice(60, 67)):
        part = {n: t if n in ("cos", "sin") else t[which] for n, t in context.items()}
        assert torch.equal(run(z[which], w, spec, part), x[which])
    for processors in (4, 20):
        emulated(sizes=HOPPER._replace(processors=processors))
        assert torch.equal(run(z, w, spec, context), x)


@pytest.mark.parametrize("name", ["tarflow", "everything"])
@dtypes
def test_a_cache_in_device_memory_gives_the_same_bits(name, dtype, emulated):
    z, w, context = tame_block(SPECS[name], 7, 5, dtype=dtype, copies=2)
    guidance = torch.rand(7, 5)
    one = cuda.plan(fields(SPECS[name], dtype), 5, 2, 7, *HOPPER)
    x = run(z, w, SPECS[name], context, guidance)
    for processors, reverse in ((2, False), (7, True)):
        emulated(reverse, sizes=cuda.Device(one.one - 1, processors, 1))
        assert not cuda.plan(fields(SPECS[name], dtype), 5, 2, 7, one.one - 1, processors, 1).on_chip
        assert torch.equal(run(z, w, SPECS[name], context, guidance), x)


@pytest.mark.parametrize("which", ["tarflow-2", "starflow-4", "everything-8", "unit-8", "wide-4", "post-2"])
@dtypes
def test_a_cluster_gives_the_bits_of_one_thread_block(which, dtype, emulated):
    name, size = which.split("-")
    spec, size = SPECS[name], int(size)
    z, w, context = tame_block(spec, 3, 3, dtype=dtype)
    x = run(z, w, spec, context)
    assert_contract(x, z, w, spec, context)
    for reverse in (False, True):
        emulated(reverse, **cluster_of(size, size, group=2))
        assert torch.equal(run(z, w, spec, context), x)


@pytest.mark.parametrize("name, size, group", [("tarflow", 4, 1), ("starflow", 2, 3), ("unit", 8, 2)])
@pytest.mark.parametrize("rule, on_chip", [("tarflow", False), ("starflow", True)])
def test_guided_inverse_by_clusters(name, size, group, rule, on_chip, emulated):
    spec = SPECS[name]
    z, w, context = tame_block(spec, 4, 3, copies=2)
    guidance = torch.rand(4, 3) * 2
    emulated(on_chip, **cluster_of(size, 2 * size + 1, group=group, on_chip=on_chip))
    x = run(z, w, spec, context, guidance, rule, 0.7)
    assert_contract(x, z, w, spec, context, guidance=guidance, rule=rule, temperature=0.7)
    emulated()
    assert torch.equal(run(z, w, spec, context, guidance, rule, 0.7), x)


@dtypes
def test_clusters_take_large_groups_many_tokens_and_one(dtype, emulated):
    spec = dataclasses.replace(SPECS["unit"], layers=1)
    for B, T, size in ((40, 2, 2), (1, 67, 2), (2, 11, 8), (2, 1, 4)):
        z, w, context = tame_block(spec, B, T, dtype=dtype)
        x = run(z, w, spec, context)
        emulated(**cluster_of(size, size, group=B))
        assert torch.equal(run(z, w, spec, context), x)
        emulated()


def test_weights_that_fill_the_memory_of_a_cluster(emulated):
    spec = BlockSpec(token_dim=4, channels=128, layers=4, heads=2, head_dim=64, kv_heads=2, mlp_dim=512)
    z, w, context = tame_block(spec, 2, 3, dtype=torch.bfloat16)
    assert cuda.plan(fields(spec, torch.bfloat16), 3, 1, 2, *HOPPER).cluster == 8
    assert_contract(run(z, w, spec, context), z, w, spec, context)


def test_strided_inputs(emulated):
    spec = SPECS["everything"]
    z, w, context = tame_block(spec, 2, 5)
    x = run(z, w, spec, context)
    w, context = ({n: strided(t) for n, t in given.items()} for given in (w, context))
    assert torch.equal(run(strided(z), w, spec, context), x)


@dtypes
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_changed_weight_gives_the_new_result(dtype, quantize, emulated):
    spec = SPECS["everything"]
    z, w, context = tame_block(spec, 2, 5, dtype=dtype)
    before = run(z, w, spec, context, quantize=quantize)
    w["layers.0.up.weight"].data[3] *= 2
    found = run(z, w, spec, context, quantize=quantize)
    copies = {name: weight.clone() for name, weight in w.items()}
    assert torch.equal(found, run(z, copies, spec, context, quantize=quantize)) and not torch.equal(found, before)


def test_an_empty_batch(emulated):
    z, w, context = tame_block(SPECS["tarflow"], 0, 4)
    assert run(z, w, SPECS["tarflow"], context).shape == (0, 4, 5)


@every_spec
@dtypes
def test_a_plan_takes_what_fits(spec, dtype, emulated):
    packed = cuda.pack(spec, [torch.zeros(shape, dtype=dtype) for shape in spec.weight_shapes.values()])
    for T, copies in ((1, 1), (40, 1), (40, 2)):
        one = cuda.plan(fields(spec, dtype), T, copies, 1, *HOPPER)
        assert one.group == 1 and one.on_chip and one.weights == 4 * len(packed.buffer)
        slots = T if spec.start else T - 1
        values = cached(spec, dtype, slots) * copies
        assert one.cache == values
        assert cuda.plan(fields(spec, dtype), T, copies, 1, one.one, 1, 1).on_chip
        less = cuda.plan(fields(spec, dtype), T, copies, 1, one.one - 1, 1, 1)
        assert not less.on_chip and less.group == (1 if values else 0)
        assert less.one == one.one - -(-values * dtype.itemsize // 16) * 16
        assert cuda.plan(fields(spec, dtype), T, copies, 1, less.one, 1, 1).group == 1
        assert cuda.plan(fields(spec, dtype), T, copies, 1, less.one - 1, 1, 1).group == 0
        # The number of processors, 64 rows and the memory each bound the size of a group.
        assert cuda.plan(fields(spec, dtype), T, copies, 7, 2**29, 3, 1).group == 3
        assert cuda.plan(fields(spec, dtype), T, copies, 64 // copies, 2**29, 1, 1).group == 64 // copies
        limited = cuda.plan(fields(spec, dtype), T, copies, 1000, one.one + 30000, 1, 1).group
        assert 1 <= limited <= 64 // copies


@every_spec
@dtypes
def test_clusters_share_the_weights_and_the_cache(spec, dtype, emulated):
    weights = [torch.zeros(shape, dtype=dtype) for shape in spec.weight_shapes.values()]
    slots = 40 if spec.start else 39
    for size in (2, 4, 8):
        least = cuda.plan(fields(spec, dtype), 40, 1, 1, 1, size, size)
        assert (least.cluster, least.group) == (size, 0)
        assert 4 * len(cuda.pack(spec, weights, size).buffer) == size * least.weights
        assert least.cache == cached(spec, dtype, slots, size)
        whole = least.one + -(-least.cache * dtype.itemsize // 16) * 16
        for limit, group, on_chip in ((least.one - 1, 0, 0), (least.one, 1, 0), (whole - 1, 1, 0), (whole, 1, 1)):
            found = cuda.plan(fields(spec, dtype), 40, 1, 1, limit, size, size)
            # A smaller cluster that takes a sample is preferred.
            assert found[:3] == (size, group, on_chip) or (found.cluster < size and found.group)
        for processors in range(1, size):
            assert cuda.plan(fields(spec, dtype), 40, 1, 1, 1, processors, 8).cluster <= processors


def square(C, layers, d=64):
    """Return a block with heads of d values, that fill its channels."""
    return BlockSpec(token_dim=4, channels=C, layers=layers, heads=C // d, head_dim=d, kv_heads=C // d, mlp_dim=4 * C)


def planned(spec, dtype, T, B, copies=1, **changes):
    """Return the plan of a Hopper, the samples that it computes at once, and the estimated time of all, per step."""
    device = HOPPER._replace(**changes)
    plan = cuda.plan(fields(spec, dtype), T, copies, B, *device)
    at_once = max(1, plan.group * (device.processors // plan.cluster))
    return plan, at_once, -(-B // at_once) * plan.step


@pytest.mark.parametrize(
    "C, layers, dtype, T, cluster, least",
    [
        (64, 2, torch.bfloat16, 16, 1, 8),
        (64, 2, torch.bfloat16, 256, 1, 7),
        (64, 4, torch.bfloat16, 256, 2, 8),
        (128, 2, torch.bfloat16, 256, 4, 4),
        (128, 4, torch.bfloat16, 256, 8, 3),
        (128, 2, torch.float32, 256, 8, 4),
    ],
)
def test_clusters_of_a_hopper(C, layers, dtype, T, cluster, least, emulated):
    spec = square(C, layers)
    plan, _, _ = planned(spec, dtype, T, 10000)
    assert plan.cluster == cluster and plan.group >= least and plan.one <= HOPPER.limit
    # With fewer samples than clusters, each cluster has one.
    assert cuda.plan(fields(spec, dtype), T, 1, HOPPER.processors // 8, *HOPPER).group == 1


@pytest.mark.parametrize("C, layers, T, copies", [(64, 2, 16, 1), (64, 2, 16, 2), (128, 2, 16, 1), (64, 4, 256, 1)])
@pytest.mark.parametrize("B", [1, 64, 264, 1000, 10000])
@dtypes
def test_the_plan_has_the_shortest_estimated_time(C, layers, T, copies, B, dtype, emulated):
    """No plan for smaller clusters, less memory or another number of samples is faster, by the same estimate."""
    spec = square(C, layers)
    plan, _, time = planned(spec, dtype, T, B, copies)
    for changes in ({"cluster": 1}, {"cluster": 2}, {"cluster": 4}, {"limit": HOPPER.limit - 20000}):
        other, _, estimate = planned(spec, dtype, T, B, copies, **changes)
        assert not other.group or time <= estimate
    for samples in (1, 8, 100, 1000):
        other, at_once, _ = planned(spec, dtype, T, samples, copies)
        assert not plan.group or time <= -(-B // at_once) * other.step


def test_many_samples_take_more_rows_than_the_memory_holds_with_their_cache(emulated):
    """Rows in flight per time: a cache in device memory, or a cluster, where the weights leave room for few samples."""
    for C in (64, 128):
        spec = square(C, 2)
        few, at_once, _ = planned(spec, torch.bfloat16, 16, HOPPER.processors // 4)
        many, all_at_once, _ = planned(spec, torch.bfloat16, 16, 10000)
        assert few.on_chip and all_at_once / many.step > 2 * at_once / few.step


def test_a_step_takes_longer_with_more_layers_and_more_rows(emulated):
    steps = [planned(square(64, layers), torch.bfloat16, 16, 1)[0].step for layers in (1, 2, 4)]
    assert steps[0] < steps[1] < steps[2]
    one, many = (cuda.plan(fields(square(64, 1)), 16, 1, B, HOPPER.limit, 1, 1) for B in (1, 64))
    assert one.group == 1 < many.group and one.step < many.step < many.group * one.step


def test_what_does_not_fit_is_refused_with_the_bytes(emulated):
    spec = BlockSpec(token_dim=4, channels=128, layers=4, heads=2, head_dim=64, kv_heads=2, mlp_dim=512)
    for most, tried in ((1, "1"), (8, "1, 2, 4, 8")):
        one = cuda.plan(fields(spec), 16, 1, 8, HOPPER.limit, 132, most)
        reason = cuda.does_not_fit(one, HOPPER.limit)
        needs = f"one sample needs {one.one} of each without its KV cache: {one.weights} of weights"
        assert f"in a cluster of {most} (tried: {tried}) {needs}" in reason
    huge = dataclasses.replace(spec, channels=2**16, mlp_dim=2**18, layers=100)
    assert cuda.plan(fields(huge), 2**20, 1, 8, *HOPPER).group == 0


def test_what_it_does_not_take_is_refused_with_the_reason(emulated):
    spec = SPECS["tarflow"]
    z, w, _ = tame_block(spec, 2, 4)

    def reason(z=z, dtype=torch.float32, prefix=None):
        weights = [t.to(dtype) for t in w.values()]
        return cuda.refuse_block(z, weights, prefix, None, spec.to_json(), HOPPER)

    assert reason() is None
    assert "tokens are torch.float64" in reason(z=z.double())
    assert "weights are torch.float16" in reason(dtype=torch.float16)
    assert "it takes no prefix" in reason(prefix=torch.zeros(2, 1, 3))
    mixed = [t.bfloat16() if i else t for i, t in enumerate(w.values())]
    adaptive = dataclasses.replace(spec, adaptive=True).to_json()
    assert "it takes no adaptive block" in cuda.refuse_block(z, list(w.values()), None, None, adaptive, HOPPER)
    assert "different dtypes" in cuda.refuse_block(z, mixed, None, None, spec.to_json(), HOPPER)


@dtypes
@pytest.mark.parametrize("on_chip", [False, True])
def test_every_argument_of_a_call_is_checked(dtype, on_chip, emulated, monkeypatch):
    ops = Recorded(load("onchip"))
    monkeypatch.setattr(cuda, "OPS", ops)
    spec = dataclasses.replace(SPECS["starflow"], positions=6)
    z, w, context = tame_block(spec, 4, 6, dtype=dtype, copies=2)
    emulated(**cluster_of(2, 2, group=2, on_chip=on_chip))
    run(z, w, spec, context, torch.rand(4, 6))
    assert_checked(*ops.calls["onchip_inverse"])


@pytest.mark.parametrize(
    "cluster, group, blocks", [(0, 1, 1), (3, 1, 3), (16, 1, 16), (1, 0, 1), (1, 65, 1), (2, 1, 1)]
)
def test_a_plan_that_no_device_takes_is_refused(cluster, group, blocks, emulated, monkeypatch):
    ops = Recorded(load("onchip"))
    monkeypatch.setattr(cuda, "OPS", ops)
    z, w, context = tame_block(SPECS["tarflow"], 2, 4)
    run(z, w, SPECS["tarflow"], context)
    op, args = ops.calls["onchip_inverse"]
    with pytest.raises(RuntimeError, match="the plan does not fit the call"):
        op(*args[:-1], [cluster, group, blocks, 0])


def test_tokens_on_the_cpu_are_refused():
    z, w, _ = tame_block(SPECS["tarflow"], 2, 4)
    with pytest.raises(ValueError, match="backend='cuda' cannot run block_inverse"):
        block_inverse(z, w, SPECS["tarflow"], backend="cuda")
    assert cuda.refuse(z, *[None] * 9) == "it runs on a GPU, tokens are on cpu"


def test_the_built_library_loads_without_a_gpu():
    if reason := compiled.cuda_load_error():
        pytest.skip(reason)
    spec = SPECS["tarflow"]
    assert cuda.Plan(*torch.ops.starflow_cuda.onchip_plan(fields(spec), 16, 1, 8, *HOPPER)).group == 1
