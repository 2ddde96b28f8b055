"""Choice of the backend of flow_head on a GPU by a model of bytes, without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from starflow_kernels._core import dispatch
from starflow_kernels.flow_head import traffic
from starflow_kernels.flow_head.tiles import config

BF16, F32 = torch.bfloat16, torch.float32
OPTIONS = "softplus", 4.0, True, False, "sum"


def sizes(D: int, C: int, width: int = 2, norm: bool = False) -> traffic.Sizes:
    return traffic.Sizes(D, C, 2 * D, 4, width, width, norm)


def arguments(B=2, T=3, D=3, C=64, dtype=BF16, device="cpu", norm=True) -> tuple:
    options = {"dtype": dtype, "device": device}
    h, weight, norm_weight = (torch.empty(*shape, **options) for shape in ((B, T, C), (2 * D, C), (C,)))
    return torch.empty(B, T, D, device=device), h, weight, None, norm_weight if norm else None, *OPTIONS


def test_a_step_takes_its_slowest_part():
    assert traffic.seconds([traffic.Step(traffic.MEMORY)], 2) == 1
    assert traffic.seconds([traffic.Step(1, 2 * traffic.L2, 3)], 2) == 2
    assert traffic.seconds([traffic.Step(1, 1, traffic.TENSOR)] * 2, 2) == 2
    assert traffic.seconds([traffic.Step(1, 1, 3 * traffic.FLOAT32)], 4) == 3


@pytest.mark.parametrize("norm", [False, True])
def test_the_steps_have_the_bytes_of_the_tensors(norm):
    """The Triton kernels move inputs and outputs once; the composed backend also moves what is between its ops."""
    B, T, D, C = 2, 3, 48, 64
    x, h, _, _, _, *_ = arguments(B, T, D, C)
    tokens, of = B * T, sizes(D, C, norm=norm)
    once, params = 2 * x.nbytes + h.nbytes, h.new_empty(B, T, 2 * D).nbytes
    assert tokens * sum(step.memory for step in traffic.fused(of, 16)) == once
    between = 2 * params + (2 * h.nbytes if norm else 0)
    assert tokens * sum(step.memory for step in traffic.composed(of)) == once + between


def test_weights_are_read_once_per_block_of_tokens():
    of = sizes(64, 3072)
    few, many = (traffic.fused(of, block)[0].cache - 2 * of.C for block in (16, 128))
    assert few == 8 * many == 2 * of.P * of.C / 16


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "D, C, dtype, expected",
    [
        (3, 64, BF16, "triton"),
        (12, 768, BF16, "triton"),
        (12, 768, F32, "triton"),
        (192, 768, BF16, "composed"),
        (192, 768, F32, "composed"),
        (257, 64, BF16, "composed"),
        (8192, 64, F32, "composed"),
    ],
)
def test_wide_tokens_take_the_products_of_torch(D, C, dtype, expected, backward):
    assert traffic.fastest(sizes(D, C, dtype.itemsize, norm=True), dtype, "sm_90", backward) == expected


def test_the_margin_decides(monkeypatch):
    of, block = sizes(48, 1024), config(48, BF16, "sm_90")["BLOCK_T"]
    times = [traffic.seconds(steps, 2) for steps in (traffic.fused(of, block), traffic.composed(of))]
    for factor, expected in ((0.99, "composed"), (1.01, "triton")):
        monkeypatch.setattr(traffic, "MARGIN", factor * times[0] / times[1])
        assert traffic.fastest(of, BF16, "sm_90") == expected


def test_the_choice_reads_widths_and_never_the_number_of_rows_or_tokens(monkeypatch):
    monkeypatch.setattr(traffic, "chip_of", lambda device: "sm_90")
    assert traffic.preferred(*arguments(D=192)) is None  # on the CPU
    with FakeTensorMode(allow_non_fake_inputs=True):
        for D, expected in ((12, "triton"), (192, "composed")):
            for B, T in ((1, 1), (7, 1), (64, 1024)):
                given = arguments(B, T, D, 768, device="cuda")
                assert traffic.preferred(*given) == traffic.preferred_backward([], [], *given) == expected


def test_the_preference_is_the_one_of_the_op(monkeypatch):
    given = arguments(dtype=F32)
    before = dispatch.choose("flow_head", *given)
    for op in ("flow_head", "flow_head_backward"):
        preference = dispatch._preferences[op]
        assert preference.here() == traffic.here()
        monkeypatch.setitem(dispatch._preferences, op, preference._replace(name=lambda *args: "composed"))
    assert dispatch.choose("flow_head", *given) == ("reference" if before == "reference" else "composed")
    assert dispatch.choose("flow_head", given[0].double(), *given[1:]) == "reference"
