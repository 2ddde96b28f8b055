"""No way of changing a weight gives an old result."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from support.backends import cpu_backends, needs_native
from support.blocks import WIDE_SPECS, tame_block
from support.contract import strided
from support.writes import WAYS, assert_new_results, inverse

from starflow_kernels import Solver, block_forward, block_params
from starflow_kernels.block import native
from starflow_kernels.block.packing import WeightCache

SPEC = WIDE_SPECS["starflow-text"]
CALLS = {
    "forward": lambda *of, **context: block_forward(*of, **context)[0],
    "params": block_params,
    "inverse": inverse,
    "one byte": functools.partial(inverse, quantize="int8"),
    "jacobi": functools.partial(inverse, solver=Solver("jacobi"), quantize="fp8"),
}


@pytest.mark.parametrize("backend", cpu_backends("block_inverse"))
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_changed_weight_gives_the_new_result(way, backend):
    assert_new_results(way, tame_block(SPEC, 2, 3, text=2), SPEC, backend, CALLS)


@pytest.mark.parametrize("way", ["one value of data", "negated data", "swapped values"])
@needs_native
def test_changes_of_bfloat16_weights(way):
    assert_new_results(WAYS[way], tame_block(SPEC, 2, 3, 2, torch.bfloat16), SPEC, "native", CALLS)


@needs_native
def test_strided_weights_are_read_anew():
    spec = WIDE_SPECS["tarflow"]
    x, w, context = tame_block(spec, 2, 3)
    strides = {name: strided(weight) for name, weight in w.items()}
    for _ in range(2):
        assert torch.equal(*(block_forward(x, v, spec, **context, backend="native")[0] for v in (strides, w)))
        for weights in (strides, w):
            weights["layers.1.up.weight"].data[3, 4] += 1


def digest(weights):
    places = [(w.data_ptr(), w.numel() * w.element_size()) for w in weights]
    return torch.ops.starflow_native.fingerprint(torch.tensor(places, dtype=torch.int64).view(-1, 2))


@needs_native
@pytest.mark.parametrize("sizes", [[1], [3, 1, 129], [4096, 5], [2**22 + 3, 2]], ids=str)
def test_every_bit_is_in_the_fingerprint(sizes):
    weights = [torch.randn(size, dtype=torch.float32) for size in sizes]
    seen = {digest(weights)}
    for w in weights:
        bits, n = w.view(torch.int32), len(w)
        for i in {0, n // 3, n // 2, n - 1}:
            for bit in (0, 15, 30, 31):
                bits[i] ^= -(2**31) if bit == 31 else 2**bit
                seen.add(digest(weights))
    assert len(seen) == 1 + 4 * sum(len({0, n // 3, n // 2, n - 1}) for n in sizes)


@needs_native
def test_the_fingerprint_follows_the_order_of_values():
    w = torch.randn(5000, dtype=torch.float32)
    found = {digest([w]), digest([w.flip(0)]), digest([w.roll(1)]), digest([w.roll(512)]), digest([-w])}
    found |= {digest([w[:2500], w[2500:]]), digest([w[2500:], w[:2500]]), digest([w, w]), digest([])}
    assert len(found) == 9


@needs_native
def test_the_fingerprint_does_not_depend_on_threads():
    w = torch.randn(2**22 + 1, dtype=torch.float32)
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(digest([w]))
    assert len(found) == 1


@needs_native
@pytest.mark.parametrize(
    "places", [torch.zeros(2, 2, dtype=torch.float32), torch.zeros(2, 3, dtype=torch.int64)], ids=lambda t: str(t.dtype)
)
def test_the_fingerprint_checks_its_argument(places):
    with pytest.raises(RuntimeError, match="compiled kernels: a tensor is of the wrong"):
        torch.ops.starflow_native.fingerprint(places)


def fingerprints(weights, *shapes):
    numbers = [n for shape in shapes for n in (len(shape), *shape)]
    return torch.ops.starflow_native.fingerprints(weights, [torch.tensor(numbers, dtype=torch.int64)])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fingerprint_of_fitting_weights_is_that_of_their_places(dtype):
    weights = [torch.randn(3, 5, dtype=torch.float32).to(dtype), torch.randn(7, dtype=torch.float32).to(dtype)]
    assert fingerprints(weights, (3, 5), (7,)) == [True, digest(weights)]


@needs_native
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.flatten(),
        lambda w: w.view(5, 3),
        lambda w: w.bfloat16(),
        lambda w: w.double(),
        lambda w: w.repeat(1, 2)[:, ::2],
        lambda w: w.to("meta"),
    ],
)
def test_weights_of_another_form_do_not_fit(change):
    weights = [torch.randn(7, dtype=torch.float32), change(torch.randn(3, 5, dtype=torch.float32))]
    assert fingerprints(weights, (7,), (3, 5)) == [False, 0]


@needs_native
@pytest.mark.parametrize("numbers", [[1, 7], [1, 7, 1, 7, 1, 7], [1, 7, 2, 7], [1, 7, -1, 7], []], ids=str)
def test_the_fingerprint_needs_a_form_for_each_weight(numbers):
    weights = [torch.randn(7, dtype=torch.float32)] * 2
    with pytest.raises(RuntimeError, match="native kernels: the weights do not fit their forms"):
        torch.ops.starflow_native.fingerprints(weights, [torch.tensor(numbers, dtype=torch.int64)])


@needs_native
def test_swapped_weights_and_dropped_memory():
    """The cache keeps no reference to a weight, so that torch.utils.swap_tensors accepts it."""
    text, (_, w, _) = WIDE_SPECS["tarflow"].to_json(), tame_block(WIDE_SPECS["tarflow"], 1, 5)
    gc.collect()
    before = len(native.packed.kept)
    weights = list(w.values())
    first = native.packed(text, weights, "none")
    assert native.packed(text, weights, "none") is first and native.packed(text, weights, "int8") is not first
    torch.utils.swap_tensors(weights[0], torch.zeros_like(weights[0]))
    assert native.packed(text, weights, "none") is not first
    del w, weights
    gc.collect()
    assert len(native.packed.kept) == before


@needs_native
def test_weights_of_inference_mode_are_packed_once():
    text, (_, w, _) = WIDE_SPECS["tarflow"].to_json(), tame_block(WIDE_SPECS["tarflow"], 1, 5)
    with torch.inference_mode():
        weights = [weight.clone() for weight in w.values()]
        first = native.packed(text, weights, "none")
        assert native.packed(text, weights, "none") is first and not first.buffer.is_inference()
        weights[3].mul_(2)
        assert native.packed(text, weights, "none") is not first


@needs_native
def test_weights_that_change_while_they_are_packed_are_packed_again():
    text, (_, w, _) = WIDE_SPECS["tarflow"].to_json(), tame_block(WIDE_SPECS["tarflow"], 1, 5)
    weights = list(w.values())
    expected = native.pack(WIDE_SPECS["tarflow"], weights, "none").buffer

    def pack(spec, weights, quantize):  # as if another thread swapped other weights in and out
        weights[3].mul_(2)
        packed = native.pack(spec, weights, quantize)
        weights[3].div_(2)
        return packed

    cache = WeightCache(pack, native.packed.state)
    cache(text, weights, "none")
    cache.make = native.pack
    assert torch.equal(cache(text, weights, "none").buffer, expected)
