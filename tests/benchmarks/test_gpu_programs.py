"""The programs of benchmarks.gpu: rows that outlive a run, limits of cases, continued runs, the pack, the page."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import page, programs
from benchmarks.gpu.pack import relocate
from benchmarks.gpu.runner import Case, Clock, Rows, Skip, run

ROOT = Path(__file__).parents[2]
# A process that serves the cases below; `{out}` is its folder.
SERVER = """
import sys, time, os
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from benchmarks.gpu.runner import Case, Rows, Skip, serve

def hangs(clock, rows):
    yield {"value": 1}
    time.sleep(60)

def refuses(clock, rows):
    raise Skip("no such chip")
    yield

def fails(clock, rows):
    yield {"value": 2}
    raise ValueError("wrong")

def dies(clock, rows):
    yield {"value": 3}
    os.abort()

def reads(clock, rows):
    yield {"value": rows.cases()["refuses"][0]["skipped"]}

cases = [Case(f.__name__, 60, f) for f in (hangs, refuses, fails, dies, reads)]
serve(cases, Rows(Path(sys.argv[1])))
"""


@pytest.fixture
def rows(tmp_path):
    return Rows(tmp_path / "bench.jsonl")


@pytest.fixture
def command(rows):
    return [sys.executable, "-c", SERVER, str(rows.path), str(ROOT)]


def cases(*names: str, seconds: float = 60) -> list[Case]:
    return [Case(name, seconds, lambda clock, rows: iter(())) for name in names]


def values(rows: Rows) -> dict[str, list]:
    return {case: [row for row in found if "state" not in row] for case, found in rows.cases().items()}


def test_a_case_that_refuses_fails_or_dies_leaves_its_rows_and_the_next_one_runs(rows, command, capfd):
    assert run(cases("refuses", "fails", "dies", "reads"), rows, command, 100) == []
    assert values(rows) == {
        "refuses": [{"case": "refuses", "skipped": "no such chip"}],
        "fails": [{"case": "fails", "value": 2}, {"case": "fails", "failed": "ValueError: wrong"}],
        "dies": [{"case": "dies", "value": 3}],
        "reads": [{"case": "reads", "value": "no such chip"}],
    }
    assert rows.ended() == {
        "refuses": "done", "fails": "done", "dies": "its process ended with status -6", "reads": "done"
    }  # fmt: skip
    assert {"case": "dies", "failed": "its process ended with status -6"} in rows.results()


def test_a_case_that_hangs_ends_after_its_limit(rows, command, capfd):
    start = time.perf_counter()
    run(cases("hangs", seconds=3), rows, command, 100)
    assert rows.ended() == {"hangs": "stopped after 3 s"} and time.perf_counter() - start < 20
    assert values(rows)["hangs"] == [{"case": "hangs", "value": 1}]


def test_a_later_run_continues_with_the_cases_that_have_no_end(rows, command, capfd):
    for row in ({"state": "begun"}, {"value": "old"}, {"state": "done"}):
        rows.add("fails", **row)
    for row in ({"state": "begun"}, {"value": "of a run that was killed"}):
        rows.add("refuses", **row)
    with rows.path.open("a") as file:
        file.write('{"case": "refuses", "val')
    again = Rows(rows.path)
    run(cases("fails", "refuses"), again, command, 100)
    assert values(again)["fails"] == [{"case": "fails", "value": "old"}]
    assert values(again)["refuses"] == [{"case": "refuses", "skipped": "no such chip"}]
    assert "of a run that was killed" in rows.path.read_text()


def test_a_case_starts_only_if_its_whole_limit_is_left(rows, command, capfd):
    assert run([*cases("fails", seconds=200), *cases("refuses")], rows, command, 100) == ["fails"]
    assert rows.ended() == {"refuses": "done"}


def test_the_process_of_a_case_ends_with_its_parent(rows, command):
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    process.stdin.write(b"hangs\n")
    process.stdin.flush()
    while "value" not in rows.path.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.stdin.close()
    assert process.wait(10) == -9


@pytest.mark.parametrize("name", ["smoke", "bench"])
def test_a_program_names_each_case_once_and_its_first_ones_fit(name):
    args = argparse.Namespace(dry=False, checkpoint="digits", peer=None, compiled=False, pack=Path("pack"))
    found = programs.PROGRAMS[name](args)
    assert len({case.name for case in found}) == len(found)
    assert all("\n" not in case.name and case.seconds <= programs.SECONDS[name] / 2 for case in found)
    if name == "bench":
        order = [case.name.split(":")[0] for case in found[2:]]
        assert list(dict.fromkeys(order)) == ["sampling", "op", "attention table", "checks"]


def test_ceilings_that_were_not_measured_are_a_reason_to_skip(rows):
    with pytest.raises(Skip, match="not measured"):
        programs._ceilings(rows)
    rows.add("machine", state="begun")
    rows.add("machine", ceilings={"bytes_a_second": 1.0})
    assert programs._ceilings(rows) == {"bytes_a_second": 1.0}


def test_the_page_tells_what_was_found_and_what_was_not(rows):
    for case in ("machine", "a", "b", "c"):
        rows.add(case, state="begun")
        if case == "machine":
            rows.add(case, machine={"device": "a GPU", "triton": "3"}, ceilings={"bytes_a_second": 4e12})
        elif case == "a":
            row = {"kind": "check", "op": "x", "shape": [1, 2], "dtype": "float16"}
            rows.add(case, **row, check="determinism", result="passed", note="a | b")
            rows.add(case, kind="constant", constant="graph node", value=1.25, unit="us")
        elif case == "b":
            row = {"kind": "time", "op": "y", "shape": [3], "pass": "forward", "code": "ours", "dtype": "bfloat16"}
            rows.add(case, **row, seconds=2e-6, floor_seconds=1e-6, peak_bytes=2**20, error="")
            rows.add(case, **row | {"code": "eager"}, floor_seconds=1e-6, failed="OutOfMemory", error="")
        else:
            rows.add(case, skipped="it needs | a GPU")
        rows.add(case, state="stopped after 3 s" if case == "b" else "done")
    found = page.markdown(rows).splitlines()
    for line in (
        "# GPU kernels on a GPU",
        "- triton: 3",
        "- bytes_a_second: 4.000e+12",
        "- graph node: 1.25 us",
        "| b | failed: stopped after 3 s |",
        "| c | skipped: it needs / a GPU |",
        "| x | [1, 2] | float16 | determinism | passed | a / b |",
        "| y | [3] | forward | ours | 2.0 | 1.0 | 50% | 1 |",
        "| y | [3] | forward | eager | failed | | | |",
    ):
        assert line in found


def test_attention_times_become_a_table(rows, tmp_path):
    rows.add("machine", state="begun")
    rows.add("machine", machine={"device": "a CPU", "torch": "2"})
    rows.add("t", state="begun")
    row = {"kind": "attention", "shape": (1, 256, 2, 2, 64, None), "dtype": "bfloat16", "pass": "forward"}
    rows.add("t", **row, backend="triton", verdict="", seconds=2e-3)
    rows.add("t", **row, backend="sdpa", verdict="", seconds=1e-3)
    page.write_table(rows, tmp_path / "table.json")
    assert [entry["backend"] for entry in json.loads((tmp_path / "table.json").read_text())] == ["sdpa"]


def test_a_cache_of_triton_is_used_where_it_lies_now(tmp_path):
    folder = tmp_path / "KEY"
    folder.mkdir()
    (folder / "k.cubin").write_text("code")
    group = folder / "__grp__k.json"
    group.write_text(
        json.dumps({"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin", "k.ptx": "/elsewhere/KEY/k.ptx"}})
    )
    relocate(tmp_path)
    assert json.loads(group.read_text()) == {"child_paths": {"k.cubin": str(folder / "k.cubin")}}


def test_a_dry_program_runs_a_case_and_writes_its_page(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "smoke", "--dry", "--only", "constants", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| constants of the chip | skipped: it needs a GPU |" in (tmp_path / "smoke.md").read_text()


def test_a_clock_counts_down():
    assert 4 < Clock(5).left() <= 5 and Clock(-1).left() < 0
