"""Causal attention by cuDNN, whose kernels stand-ins replace."""

from __future__ import annotations

import pytest
import torch
from support.contract import assert_within_contract
from support.naive import angles
from torch._subclasses.fake_tensor import FakeTensorMode

from starflow_kernels import causal_attention
from starflow_kernels.causal_attention import cudnn, external, reference

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")


def heads_last(*tensors):
    return [t.transpose(1, 2) for t in tensors]


@pytest.fixture
def stand_in(monkeypatch):
    """Replace both functions of torch by the reference; return the list of their calls."""
    calls = []

    def forward(q, k, v, bias, with_lse, dropout, causal, *, scale):
        calls.append("forward")
        assert (bias, with_lse, dropout, causal) == (None, True, 0.0, True)
        temperature = q.shape[-1] ** -0.5 / scale
        out, lse = reference.causal_attention(*heads_last(q, k, v), None, None, "none", 0, temperature)
        return out.transpose(1, 2), lse[..., None], None, None, 7, 7, None, None, None

    def backward(grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, T, S, dropout, causal, *, scale):
        calls.append("backward")
        assert (bias, cum_q, cum_k, T, S, dropout, causal) == (None, None, None, q.shape[2], k.shape[2], 0.0, True)
        temperature, (grad, q, k, v, out) = q.shape[-1] ** -0.5 / scale, heads_last(grad, q, k, v, out)
        args = q, k, v, None, None, "none", 0, temperature
        return heads_last(*reference.causal_attention_backward([grad, None], [out, lse[..., 0]], *args))

    monkeypatch.setattr(cudnn, "cudnn_attention", forward)
    monkeypatch.setattr(cudnn, "cudnn_attention_backward", backward)
    return calls


@pytest.mark.parametrize("rotary", ["none", "interleaved", "half"])
def test_passes_and_takes_what_torch_declares(rotary, stand_in):
    q, k, v, grad = (torch.randn(2, 7, 3, 8, dtype=torch.float64) for _ in range(4))
    turns = (None, None) if rotary == "none" else tuple(angles(7, 8, torch.float64).values())
    args = q, k, v, *turns, rotary, 0, 0.7
    out, lse = cudnn.causal_attention(*args)
    found = out, lse, *cudnn.causal_attention_backward([grad, None], [out, lse], *args)
    right = reference.causal_attention(*args)
    right = *right, *reference.causal_attention_backward([grad, None], list(right), *args)
    assert stand_in == ["forward", "backward"] and out.is_contiguous()
    for value, expected in zip(found, right, strict=True):
        assert_within_contract(value, expected, expected)


def test_has_no_gradient_where_none_is_given(stand_in):
    q, k, v = (torch.randn(2, 7, 3, 8) for _ in range(3))
    args = q, k, v, None, None, "none", 0, 1.0
    outputs = list(cudnn.causal_attention(*args))
    assert not any(g.any() for g in cudnn.causal_attention_backward([None, None], outputs, *args))


def test_calls_torch_as_it_declares(monkeypatch):
    """Shapes and types of arguments and results, on tensors without memory."""
    monkeypatch.setattr(external, "_rotary_kernels", lambda x: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(2, 7, 4, 8, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        turns = [torch.empty(7, 4, device="cuda") for _ in range(2)]
        args = q, k, v, *turns, "half", 0, 0.7
        out, lse = cudnn.causal_attention(*args)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 4, 7), torch.float32)
        found = cudnn.causal_attention_backward([out, None], [out, lse], *args)
        assert [(t.shape, t.dtype) for t in found] == [(q.shape, q.dtype)] * 3


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, None),
        ({"window": 7}, None),
        ({"window": 3}, "it has no window"),
        ({"T": 1}, "it takes two tokens or more"),
        ({"d": 136}, "heads of 136 values, it takes up to 128"),
        ({"d": 12}, "heads of 12 values, it takes multiples of 8 up to 256"),
        ({"groups": 2}, "2 heads of keys, it takes as many as there are of queries"),
        ({"dtype": torch.float32}, "q is torch.float32, it takes bfloat16 and float16"),
        ({"device": "cpu"}, "it runs on CUDA, not on cpu"),
    ],
    ids=str,
)
def test_says_why_it_refuses(changes, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    sizes = {"T": 7, "d": 16, "groups": 4, "window": 0, "dtype": torch.float16, "device": "cuda", **changes}
    with FakeTensorMode():
        options = {"dtype": sizes["dtype"], "device": sizes["device"]}
        q = torch.empty(2, sizes["T"], 4, sizes["d"], **options)
        k = torch.empty(2, sizes["T"], sizes["groups"], sizes["d"], **options)
        assert cudnn.refuse(q, k, k, None, None, "none", sizes["window"], 1.0) == reason


def test_needs_a_fixed_order_for_its_gradient(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        q = torch.empty(1, 4, 2, 8, dtype=torch.bfloat16, device="cuda")
        args = q, q, q, None, None, "none", 0, 1.0
        assert "no fixed order" in cudnn.refuse_backward([q, None], [q, q], *args)
        assert cudnn.refuse_backward([q, q], [q, q], *args) == "it has no gradient of the log-sum-exp"
        torch.use_deterministic_algorithms(True)
        try:
            assert cudnn.refuse_backward([q, None], [q, q], *args) is None
        finally:
            torch.use_deterministic_algorithms(False)


@needs_no_gpu
def test_is_refused_on_a_machine_without_a_gpu():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="backend='cudnn' cannot run causal_attention: torch sees no GPU"):
        causal_attention(q, q, q, backend="cudnn")
