"""Benchmark of sampling on a GPU, run without one: its problems, its gates, its page."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks.cpu import parallel
from benchmarks.gpu import sampling
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.runner import Clock, Skip
from benchmarks.gpu.sampling import Code, markdown, ours, plain, time_problem, trained
from benchmarks.gpu.sampling_cases import CASES, GUIDED, WEIGHTS, Block, Problem, make, starflow, tarflow
from benchmarks.gpu.sampling_checks import rows_of
from starflow import Flow, FlowConfig
from starflow_kernels import Solver, block_inverse

F32 = torch.float32
CEILINGS = {"bytes_a_second": 1e9, "operations_a_second": 1e12, "float32_operations_a_second": 1e10}


@pytest.fixture
def bench():
    return Bench(dry=True)


def solve(problem: Problem) -> torch.Tensor:
    return problem.solve(lambda block, z: block_inverse(z, block.weights, block.spec, **block.context).x)


def test_blocks_are_those_of_the_models():
    config = FlowConfig(image_size=32, image_channels=3, patch_size=8, channels=128, layers=(2,) * 4)
    specs = [block.spec for block in Flow(config).blocks]
    assert [dataclasses.replace(spec, positions=1) for spec in specs] == tarflow(192, 128, 2, 4)
    config = FlowConfig(
        image_size=4, image_channels=4, patch_size=1, channels=128, layers=(1, 1, 3), scale="softplus", soft_clip=4.0,
        start=True, rotary="interleaved", sequence_order="L2R", text_dim=6, text_len=3, condition_blocks="last",
        final_norm=True, patch_order="hwc",
    )  # fmt: skip
    assert [block.spec for block in Flow(config).blocks] == starflow(128, (1, 1, 3), 6)


@pytest.mark.parametrize("case, parameters", [(CASES[0], 3.86e9), (CASES[1], 0.46e9)], ids=["STARFlow 3B", "AFHQ-256"])
def test_models_have_their_published_size(case, parameters):
    specs = [dataclasses.replace(s, positions=case.tokens if s.positions else 0) for s in case.specs]
    assert sum(math.prod(shape) for s in specs for shape in s.weight_shapes.values()) == pytest.approx(parameters, 0.01)


def test_guidance_and_text_reach_the_block_that_has_text():
    first, last = make(starflow(64, (1, 1), 6), 2, 5, F32, "cpu", text=3, **GUIDED).blocks
    assert "guidance" not in first.context and (first.prefix, first.copies) == (0, 1)
    assert last.context["prefix"].shape == (4, 3, 6) and (last.prefix, last.copies) == (3, 2)


@pytest.mark.parametrize(
    "specs, options", [(tarflow(3, 64, 1), {"cond": True}), (starflow(64, (1, 1), 6), {"text": 3})]
)
def test_a_short_problem_is_the_start_of_the_last_block(specs, options):
    problem = make(specs, 2, 6, F32, "cpu", **options)
    whole = solve(problem.last())
    if not specs[-1].flip:
        torch.testing.assert_close(solve(problem.short(4)), whole[:, :4])
    assert solve(problem.short(4)).shape == (2, 4, specs[0].token_dim)


def test_rows_of_a_guided_problem_keep_their_condition():
    problem = make(starflow(64, (1,), 6), 3, 4, F32, "cpu", text=2, **GUIDED)
    torch.testing.assert_close(solve(rows_of(problem, slice(1, 3))), solve(problem)[1:])


def test_a_code_that_is_wrong_has_no_time_and_one_that_refuses_a_reason(bench):
    problem = make(tarflow(3, 64, 1, 2), 2, 4, F32, "cpu")
    right = plain("fused")
    timed = {
        "right": right,
        "off": Code(lambda problem: lambda: right.start(problem)() + 0.01),
        "off, but allowed": Code(lambda problem: lambda: right.start(problem)() + 0.01, slack=0.02),
        "not finite": Code(lambda problem: lambda: problem.z / 0),
        "reference": ours("reference", WEIGHTS["float32"], lambda layers: math.inf),
        "cuda": ours("cuda", WEIGHTS["float32"], None),
        "Jacobi": ours("reference", WEIGHTS["float32"], None, solver=Solver("jacobi")),
    }
    rows = list(time_problem("a problem", "float32", problem, timed, None, bench, CEILINGS, Clock(60)))
    found = {row["code"]: row for row in rows}
    for name in ("right", "off, but allowed", "reference", "Jacobi"):
        assert found[name]["seconds"] > 0 and "failed" not in found[name]
    assert found["reference"]["error"] < 1e-5 and found["reference"]["floor_seconds"] > 0
    assert 2 <= found["Jacobi"]["passes"] <= 8 and found["Jacobi"]["floor_seconds"] is None
    for name, why in (("off", "allowed is"), ("not finite", "not finite")):
        assert why in found[name]["failed"] and "seconds" not in found[name]
    assert "CUDA" in found["cuda"]["skipped"] and "--peer" in found["released loop"]["skipped"]


def test_more_launches_than_allowed_are_a_failure(bench, monkeypatch):
    monkeypatch.setattr(sampling, "launches_a_step", lambda *args: 12.0)
    problem = make(tarflow(3, 64, 2), 1, 3, F32, "cpu")
    for most, failed in ((11, True), (12, False)):
        code = {"ours": Code(plain("fused").start, most=lambda layers, most=most: most)}
        (row, _) = time_problem("a problem", "float32", problem, code, None, bench, CEILINGS, Clock(60))
        assert ("12 kernels per token of 2 layers" in row.get("failed", "")) == failed


def test_what_the_clock_has_no_time_for_is_skipped(bench):
    timing = sampling.Timing(
        "a problem", "float32", make(tarflow(3, 64, 1), 1, 3, F32, "cpu"), bench, CEILINGS, Clock(5), False
    )
    timing.afford(1.0)
    with pytest.raises(Skip, match=r"it takes 6\.0 s at least, [345]\.\d s are left"):
        timing.afford(3.0)


def test_weights_keep_their_values_in_other_dtypes():
    block = make(starflow(64, (1,), 6), 1, 3, torch.bfloat16, "cpu", text=2).blocks[0]
    wide = block.to(F32)
    assert all(torch.equal(wide.weights[name].bfloat16(), w) for name, w in block.weights.items())
    assert wide.context["prefix"].dtype == F32 and isinstance(wide, Block)


def test_a_trained_flow_is_timed_with_its_parallel_inverses(bench, monkeypatch):
    flow = Flow(FlowConfig(image_size=8, image_channels=1, patch_size=2, channels=32, head_dim=16, layers=(1, 1)))
    for block in flow.requires_grad_(False).blocks:
        block.weights()["proj_out.weight"].normal_(std=0.05)
    monkeypatch.setattr(parallel, "load", lambda *args: ("photos", flow))
    monkeypatch.setattr(sampling, "codes", lambda weights: {"plain decoder": plain("fused")})
    rows = list(trained("photos", 1, bench, CEILINGS, None, Clock(60)))
    assert {row["problem"] for row in rows} == {"photos, batch 1"}
    names = [row["code"] for row in rows if "seconds" in row]
    assert "plain decoder" in names and "quasi-Newton, window 32, reference" in names
    assert not [row for row in rows if "failed" in row]
    assert all(row["error"] < 1e-3 and row.get("passes", 2) < 30 for row in rows if "seconds" in row)


def test_page():
    row = {"problem": "c", "weights": "bfloat16", "steps": 100, "floor_seconds": 0.5, "error": 1e-3, "repeats": 3}
    more = {"peak_bytes": 2**21, "launches": 11.0, "first_seconds": 2.0}
    rows = [
        {**row, "code": "ours, triton", "seconds": 1.0, **more},
        {**row, "code": "plain decoder, fused attention", "seconds": 2.0, **more},
        {**row, "code": "plain decoder, products", "seconds": 1.5, **more},
        {**row, "code": "released loop", "seconds": 10.0, "note": "from some steps"},
        {**row, "code": "Jacobi", "seconds": 0.5, "floor_seconds": None, "passes": 7, **more},
        {"problem": "c", "weights": "bfloat16", "code": "ours, cuda", "skipped": "no | room"},
        {"problem": "c", "weights": "bfloat16", "code": "wrong", "failed": "error 1"},
    ]
    page = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(rows).splitlines() if "|" in line]
    assert len({len(line) for line in page}) == 1
    ours, _, _, released, jacobi, cuda, wrong = page[2:]
    assert ours[3:] == ["1.0000", "10000.0", "5000.0", "50%", "10.00x", "1.50x", "1.0e-03", "2", "11", "2.000", "3"]
    assert released[5:] == ["5000.0", "5%", "1.00x", "0.15x", "1.0e-03", "", "", "", "3 from some steps"]
    assert jacobi[5:9] == ["", "", "20.00x", "3.00x"] and jacobi[-1] == "3 7 passes"
    assert cuda[3:] == [""] * 10 + ["skipped: no / room"] and wrong[-1] == "failed: error 1"
