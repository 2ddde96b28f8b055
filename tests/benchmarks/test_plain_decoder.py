"""The decoders that benchmarks compare with, and the floor of sampling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.blocks import BLOCKS, GPU_BLOCKS, block

from benchmarks.floor import Work, block_work
from benchmarks.ops.bench_block import random_weights
from benchmarks.peers.sliced_cache import sliced_inverse
from benchmarks.peers.static_cache import PlainDecoder
from starflow_kernels import BlockSpec, block_inverse

B, T = 3, 6


@pytest.mark.parametrize("attention", ["fused", "products"])
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("case", GPU_BLOCKS.values(), ids=GPU_BLOCKS.keys())
def test_decoder_is_the_inverse_of_every_block(case, guided, attention):
    z, w, spec, context = block(case, B=B, tokens=T, copies=1 + guided)
    guidance = {"guidance": torch.rand(B, T, dtype=z.dtype)} if guided else {}
    prefix = context["prefix"].shape[1] if "prefix" in context else 0
    rule = "starflow" if spec.start else "tarflow"
    decoder = PlainDecoder(w, spec, B, T, prefix=prefix, copies=1 + guided, rule=rule, attention=attention)
    for noise in (z, -z):  # a second call over a cache that is full
        expected = block_inverse(noise, w, spec, **context, **guidance, rule=rule, backend="reference").x
        torch.testing.assert_close(decoder(noise, **context, **guidance), expected, rtol=0, atol=1e-11)


def test_decoder_in_bfloat16_is_as_near_as_the_reference():
    z, w, spec, context = block(BLOCKS["starflow-text"], B=B, tokens=T, dtype=torch.bfloat16, channels=32)
    z = z.float()
    found = PlainDecoder(w, spec, B, T, prefix=context["prefix"].shape[1])(z, **context)
    usual = block_inverse(z, w, spec, **context, backend="reference").x
    wide = {n: t.double() for n, t in w.items()}, spec
    exact = block_inverse(z.double(), *wide, **{n: t.double() for n, t in context.items()}, backend="reference").x
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2 * (usual - exact).abs().max() + torch.finfo(torch.bfloat16).eps


def onnx_inverse():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from benchmarks.peers.onnx_runtime import OnnxInverse

    return OnnxInverse()


@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
@pytest.mark.parametrize("make", [lambda: sliced_inverse, onnx_inverse], ids=["sliced cache", "ONNX Runtime"])
def test_peers_are_the_inverse_of_a_tarflow_block(make, flip):
    spec = BlockSpec(
        token_dim=4, channels=64, layers=2, heads=2, head_dim=32, kv_heads=2, mlp_dim=96, positions=T, flip=flip
    )
    weights, z, inverse = random_weights(spec), torch.randn(B, T, 4), make()
    for noise in (z, -z):  # a second call over a cache that is full
        expected = block_inverse(noise, weights, spec, backend="reference").x
        torch.testing.assert_close(inverse(noise, weights, spec), expected, rtol=0, atol=2e-6)


SPEC = BlockSpec(token_dim=2, channels=8, layers=3, heads=4, head_dim=2, kv_heads=2, mlp_dim=16, positions=5)
# Per layer qkv 16 x 8, proj 8 x 8, up and down 8 x 16; outside the layers in 8 x 2, out 4 x 8.
MATRICES = 3 * (16 * 8 + 8 * 8 + 2 * 8 * 16) + 16 + 32
# Per layer two norms with weights and biases, and four biases; outside the biases of in and out, one position.
VECTORS = 3 * (4 * 8 + 16 + 8 + 16 + 8) + 8 + 4 + 8


def test_floor_of_a_block_by_hand():
    work = block_work(SPEC, 2, 5, copies=2, prefix=10, weight_bytes=2, cache_bytes=4)
    seen = [10 + step + 1 for step in range(4)]
    keys = 3 * 2 * 4 * (2 * 2)  # layers, keys and values, rows, values of the KV heads
    cache = sum(keys * (slots + 1) for slots in seen)
    assert work.steps == 4
    assert work.bytes == 4 * 2 * (MATRICES + VECTORS) + 4 * cache + 4 * 4 * 2 * 2 * 2
    scores = sum(2 * 3 * 8 * slots for slots in seen)  # scores and sums over the keys, by head
    assert work.operations == 2 * 4 * (4 * MATRICES + scores)


def test_floor_with_a_first_token_of_its_own_and_a_chip_that_keeps_all():
    start = dataclasses.replace(SPEC, start=True, positions=0)
    assert block_work(start, 2, 5).steps == 5
    work = block_work(SPEC, 2, 5, weight_bytes=4, resident=True)
    assert work.bytes == 4 * (MATRICES + VECTORS) + 4 * 4 * 2 * 2 * 2


def test_floor_is_the_larger_of_two_times_at_the_peak_of_the_dtype():
    ceilings = {"bytes_a_second": 10.0, "operations_a_second": 100.0, "float32_operations_a_second": 1.0}
    work = Work(40, 50, 1) + Work(0, 50, 2)
    assert work.steps == 3
    assert work.seconds(ceilings, torch.bfloat16) == 4
    assert work.seconds(ceilings, torch.float32) == 100
