"""No way of changing a weight gives an old result in Triton: TRITON_INTERPRET=1 pytest <this file>."""

from __future__ import annotations

import functools

import pytest
import torch
from support.backends import require_interpreter
from support.blocks import BLOCKS, block
from support.contract import strided
from support.writes import WAYS, assert_new_results, inverse

from starflow_kernels import Solver, block_inverse
from starflow_kernels.block.quantize import quantize_matrix

require_interpreter()
ROUNDED = {
    "one byte": functools.partial(inverse, quantize="int8"),
    "jacobi": functools.partial(inverse, solver=Solver("jacobi"), quantize="fp8"),
}


def small(name):
    """Return a block and its spec; the kernels read some of its weights in another order."""
    x, w, spec, context = block(BLOCKS[name], B=1, tokens=2, dtype=torch.float32, layers=1)
    return (x, w, context), spec


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_changed_weight_gives_the_new_result(way):
    assert_new_results(way, *small("starflow-all-norms"), "triton", {"inverse": inverse})


@pytest.mark.parametrize("way", ["one value of data", "other data", "fused adamw"])
def test_rounded_weights_follow_the_weights(way):
    assert_new_results(WAYS[way], *small("starflow-all-norms"), "triton", ROUNDED)


@pytest.mark.parametrize(
    "name, weight",
    [
        *(("starflow-all-norms", f"layers.0.{weight}") for weight in ("qkv.weight", "qkv.bias", "q_norm.weight")),
        ("tarflow-flip", "pos_embed"),
    ],
)
def test_every_rearranged_weight_is_read_anew(name, weight):
    block, spec = small(name)

    def way(weights):
        weights[list(spec.weight_shapes).index(weight)].data.mul_(2)

    assert_new_results(way, block, spec, "triton", {"inverse": inverse})


def test_strided_weights_are_read_anew():
    (z, w, context), spec = small("tarflow-flip")
    w = {name: strided(weight) for name, weight in w.items()}
    before = block_inverse(z, w, spec, **context, backend="triton").x
    w["layers.0.up.weight"].data[3, 4] += 1
    copies = {name: weight.clone() for name, weight in w.items()}
    found = block_inverse(z, w, spec, **context, backend="triton").x
    assert torch.equal(found, block_inverse(z, copies, spec, **context, backend="triton").x)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_rounded_as_in_the_specification(dtype, kind):
    from starflow_kernels.block.triton.weights import quantize

    weight = torch.randn(7, 1500, dtype=torch.float32)
    weight[0], weight[1, 0], weight[2] = 0, 1e-30, weight[2] * 1e-3
    weight[4:6] = torch.linspace(-448, 448, 3000, dtype=torch.float32).view(2, -1)
    weight[3] = torch.linspace(-0.05, 0.05, 1500, dtype=torch.float32)
    weight[3, 0] = 448
    weight = weight.to(dtype)
    values, scales = quantize(weight, kind)
    expected, factors = quantize_matrix(weight, kind)
    assert torch.equal(values, expected.view(values.dtype))
    assert torch.equal(scales, factors * (256 if kind == "fp8" else 1))
