"""The layers between the products of a block on a GPU: residual_norm and bias_gelu in place of torch's operations."""

from __future__ import annotations

import pytest
import torch
from support.blocks import BLOCKS, F64, block, every_block, of_tensors, passes
from support.contract import compiled, with_gradients
from support.naive_block import naive_forward

from starflow_kernels import block_forward
from starflow_kernels._core import dispatch
from starflow_kernels.block import composed


@pytest.fixture
def on_gpu(monkeypatch):
    """Compose the block of the ops that it uses on a GPU."""
    monkeypatch.setattr(composed, "_on_gpu", lambda x: True)


@pytest.fixture
def ran(on_gpu, monkeypatch):
    """Names of the ops that run."""
    names, run = [], dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda op, *args: names.append(op) or run(op, *args))
    return names


@every_block
def test_same_values_and_gradients(case, ran):
    x, w, spec, context = block(case)
    actual = passes(x, w, spec, context)
    norms = 2 * spec.layers if spec.norm != "none" else 0
    gelus = spec.layers if spec.mlp == "gelu" else 0
    assert [ran.count(op) for op in ("residual_norm", "residual_norm_backward")] == [norms] * 2
    assert [ran.count(op) for op in ("bias_gelu", "bias_gelu_backward")] == [gelus] * 2
    function, tensors = of_tensors(naive_forward, x, w, spec, context)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(shape, generator=generator, dtype=F64) for shape in (x.shape, x.shape[:1])]

    def summed(*tensors):
        z, minus_log_sigma = function(*tensors)
        return z, minus_log_sigma.sum((1, 2))

    torch.testing.assert_close(actual, with_gradients(summed, tensors, seeds), rtol=1e-9, atol=1e-9)


def test_the_cpu_keeps_torchs_operations(monkeypatch):
    names, run = [], dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda op, *args: names.append(op) or run(op, *args))
    passes(*block(BLOCKS["tarflow"]))
    assert "causal_attention" in names and not {"residual_norm", "bias_gelu"} & set(names)


@pytest.mark.usefixtures("on_gpu")
def test_compiles_as_one_graph():
    x, w, spec, context = block(BLOCKS["starflow-all-norms"])
    function, tensors = of_tensors(lambda *a, **c: block_forward(*a, **c), x, w, spec, context)
    seeds = torch.randn_like(x), torch.randn(len(x), dtype=F64)
    eager, graph = (with_gradients(f, tensors, seeds) for f in (function, compiled(function)))
    torch.testing.assert_close(graph, eager, rtol=1e-11, atol=1e-11)


def test_autocast_keeps_the_stream_in_float32(ran):
    """Under autocast residuals are bfloat16, states float32."""
    x, w, spec, context = block(BLOCKS["tarflow"], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = passes(x, w, spec, context)
    assert ran.count("residual_norm") == 2 * spec.layers
    for found, right in zip(narrow, passes(x, w, spec, context)):
        assert found.dtype == right.dtype
        assert (found - right).abs().max() <= 0.05 * right.abs().max() + 1e-3
