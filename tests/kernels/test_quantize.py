"""Weights of one byte: the rounding, the choice of weights, and block_inverse with them."""

from __future__ import annotations

import pytest
import torch
from support.backends import cpu_backends
from support.blocks import BLOCKS, T, block
from support.contract import assert_within_contract, compiled

from starflow_kernels import Solver, block_inverse
from starflow_kernels.block.quantize import KINDS, fake_quantize, is_quantized, quantize_matrix

kinds = pytest.mark.parametrize("kind", KINDS)
F32, F64 = torch.float32, torch.float64


@kinds
def test_values_are_the_nearest(kind):
    weight = torch.randn(5, 300) * torch.tensor([1e-30, 1e-3, 1.0, 50.0, 1e30])[:, None]
    values, scales = quantize_matrix(weight, kind)
    assert values.dtype == KINDS[kind][0] and values.shape == weight.shape and scales.shape == (5,)
    found, scaled = values.double(), weight.double() / scales[:, None].double()
    assert (found.abs().amax(1) == KINDS[kind][1]).all()
    # fp8 has three mantissa bits, down to 2^-9.
    step = 1 if kind == "int8" else torch.exp2(scaled.abs().log2().floor().clamp(min=-6) - 3)
    assert ((found - scaled).abs() <= 0.5 * step * (1 + 1e-5)).all()


@kinds
def test_a_channel_of_zeros_and_of_tiny_values(kind):
    values, scales = quantize_matrix(torch.tensor([[0.0, 0.0], [0.0, 1e-45]]), kind)
    assert (values.float() == 0).all() and (scales > 0).all()


@kinds
@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16], ids=str)
def test_the_matrices_of_the_layers_are_rounded(kind, dtype):
    _, w, spec, _ = block(BLOCKS["starflow-all-norms"], dtype=dtype)
    found = fake_quantize(spec, list(w.values()), kind)
    for (name, weight), other in zip(w.items(), found):
        assert other.dtype == dtype
        assert torch.equal(other, weight) != is_quantized(name, weight.shape)
    again = fake_quantize(spec, [t.to(F64) for t in w.values()], kind)
    for one, other in zip(found, again):
        torch.testing.assert_close(one.to(F64), other, rtol=torch.finfo(dtype).eps, atol=0)


def test_chosen_are_matrices_of_layers():
    _, _, spec, _ = block(({"mlp": "swiglu", "positions": T, "text_dim": 6, "start": True, "qk_norm": True}, False, 0))
    expected = {f"layers.{i}.{name}.weight" for i in range(2) for name in ("qkv", "proj", "gate", "up", "down")}
    assert {name for name, shape in spec.weight_shapes.items() if is_quantized(name, shape)} == expected


@kinds
@pytest.mark.parametrize("backend", cpu_backends("block_inverse"))
@pytest.mark.parametrize("name", ["tarflow-swiglu", "starflow-text"])
def test_samples_are_those_of_the_rounded_weights(name, backend, kind):
    z, w, spec, context = block(BLOCKS[name], dtype=F32, copies=2)
    by_hand = dict(zip(w, fake_quantize(spec, list(w.values()), kind)))
    for options in ({}, {"solver": Solver("jacobi", 3)}):
        options |= {**context, "guidance": 1.0, "backend": backend}
        found = block_inverse(z, w, spec, **options, quantize=kind).x
        assert torch.equal(found, block_inverse(z, by_hand, spec, **options).x)
        assert not torch.equal(found, block_inverse(z, w, spec, **options).x)


@kinds
def test_error_contract(kind):
    z, w, spec, context = block(BLOCKS["starflow-all-norms"], dtype=F32)
    found, plain = (block_inverse(z, w, spec, **context, quantize=kind, backend=b).x for b in (None, "reference"))
    w, context = ({n: t.double() for n, t in of.items()} for of in (w, context))
    assert_within_contract(found, plain, block_inverse(z.double(), w, spec, **context, quantize=kind).x)


@kinds
def test_opcheck(kind):
    z, w, spec, context = block(BLOCKS["tarflow-flip"])
    args = (z, list(w.values()), context["cond"], None, None, None, None, spec.to_json(), "tarflow", 1.0, kind)
    torch.library.opcheck(torch.ops.starflow.block_inverse.default, args)


@kinds
def test_compiles_as_one_graph(kind):
    z, w, spec, context = block(BLOCKS["tarflow-flip"])

    def sampled(z):
        return block_inverse(z, w, spec, **context, quantize=kind).x

    torch.testing.assert_close(compiled(sampled)(z), sampled(z), rtol=1e-11, atol=1e-11)
