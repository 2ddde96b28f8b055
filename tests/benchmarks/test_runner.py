"""Runs of all benchmarks, their results files, and the comparison of two commits."""

from __future__ import annotations

import ast
import json
import string
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as runner
from benchmarks import compare, compare_cases
from benchmarks.command import benchmark, in_fresh_process
from benchmarks.cpu import long
from benchmarks.cpu.sampling import strongest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASES = ("small, batch 1", "small, batch 8", "large, batch 1")


def measure(args: Namespace) -> dict:
    return {"machine": {"library": "1.0"}, "rows": [{"case": case, "run": args.run} for case in args.cases]}


def options(parser) -> None:
    parser.add_argument("--run", default="first")


main = benchmark("A benchmark.", measure, options, threads=1, cases=CASES)


def test_all_benchmarks_of_the_cpu_are_run():
    # parallel_trace draws a picture.
    modules = {
        f"{path.parent.name}.{path.stem}"
        for path in [*BENCHMARKS.glob("cpu/*.py"), *BENCHMARKS.glob("science/*.py")]
        if "main = benchmark(" in path.read_text() and path.stem != "parallel_trace"
    }
    assert modules | {"ops"} == {command.split()[0] for command in {**runner.BENCHMARKS, **runner.SCIENCE}.values()}


def test_no_benchmark_has_a_main_of_its_own():
    for path in [*BENCHMARKS.glob("cpu/*.py"), *BENCHMARKS.glob("science/*.py")]:
        assert "ArgumentParser(" not in path.read_text(), path


def test_options_of_a_run_are_those_that_benchmarks_need():
    needed = {field for command in runner.BENCHMARKS.values() for _, field, _, _ in string.Formatter().parse(command)}
    assert needed - {None} <= vars(runner.parser().parse_args(["run"])).keys()


def test_results_name_the_processor_and_its_ceilings(tmp_path):
    main(["--json", str(tmp_path / "found.json")])
    machine = json.loads((tmp_path / "found.json").read_text())["machine"]
    assert machine["float32_gflops"] > 0 and machine["read_gb_per_second"] > 0
    assert machine["cpu"] and machine["threads"] == 1 and machine["library"] == "1.0"


def test_chosen_cases_replace_their_rows_alone(tmp_path):
    file = tmp_path / "found.json"
    main(["--json", str(file)])
    before = json.loads(file.read_text())["machine"]
    main(["--cases", "batch 8|large", "--run", "second", "--json", str(file)])
    first, *others = json.loads(file.read_text())["rows"]
    assert first == {"case": CASES[0], "run": "first", "machine": before}
    assert others == [{"case": case, "run": "second"} for case in CASES[1:]]


def test_all_cases_replace_the_whole_file(tmp_path):
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"machine": {}, "rows": [{"case": "of another time"}]}))
    main(["--json", str(file)])
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == list(CASES)


def test_results_are_printed_without_a_file(capsys):
    main([])
    assert [row["case"] for row in json.loads(capsys.readouterr().out)["rows"]] == list(CASES)


def test_a_fresh_process_has_settings_of_its_own():
    torch.set_num_threads(2)
    before = torch.get_num_threads()
    in_fresh_process(torch.set_num_threads, 1)
    assert torch.get_num_threads() == before == 2


@pytest.fixture
def commands(monkeypatch):
    """Commands that a run starts; those of `failing` modules fail."""
    started = []

    def run(command):
        started.append(command[2:])
        return Namespace(returncode=int(command[2] == "benchmarks.cpu.long"))

    monkeypatch.setattr(runner.subprocess, "run", run)
    return started


def test_a_run_gives_each_benchmark_its_options_and_file(commands, tmp_path):
    args = runner.parser().parse_args(["run", "--only", "density", "--peer", "a b", "--results", str(tmp_path)])
    assert runner.run(args) == 0
    assert commands == [["benchmarks.cpu.density", "--peer", "a b", "--json", str(tmp_path / "density_cpu.json")]]


def test_a_run_leaves_out_what_lacks_an_option(commands, tmp_path, capsys):
    args = runner.parser().parse_args(["run", "--only", "density", "fingerprint", "--results", str(tmp_path)])
    assert runner.run(args) == 0
    assert [command[0] for command in commands] == ["benchmarks.cpu.fingerprint"]
    assert "density: left out, it needs --peer" in capsys.readouterr().out


def test_a_run_goes_on_after_a_failure_and_reports_it(commands, tmp_path):
    args = runner.parser().parse_args(["run", "--only", "long", "fingerprint", "--results", str(tmp_path)])
    assert runner.run(args) == 1
    assert len(commands) == 2


def test_processes_of_two_commits_take_turns(monkeypatch):
    order = []

    def run(folder, cases, *options):
        order.append(folder)
        return {"seconds": {case: float(len(order)) for case in cases}}

    monkeypatch.setattr(compare, "run", run)
    assert compare.times(["a", "b"], ["case"], 3) == {"case": [[1.0, 4.0, 5.0], [2.0, 3.0, 6.0]]}
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_ratio_is_the_median_of_pairs():
    # The machine was ten times slower during the second pair.
    (row,) = compare.rows({"case": [[1.0, 10.0, 1.0], [2.0, 20.0, 3.0]]}, [{"case": 100}, {"case": 150}])
    assert row["ratio"] == 2.0 and row["instruction_ratio"] == 1.5
    assert "| case | 1000000.0 | 3000000.0 | 2.000 (2.000, 3.000) | 100 | 150 | 1.5000 |" in compare.markdown([row])


def test_times_are_shown_where_nothing_is_counted():
    assert "not counted" in compare.markdown(compare.rows({"case": [[1.0], [2.0]]}, []))


def test_instructions_of_a_profile_of_callgrind():
    assert compare.total("version: 1\nevents: Ir\n\nfn=(1) run\n3 20\n\ntotals: 1489189\n") == 1489189


def test_a_kept_build_is_not_built_again(tmp_path):
    head = compare._git("rev-parse", "--short=12", "HEAD").decode().strip()
    (tmp_path / head / "starflow_kernels").mkdir(parents=True)
    (tmp_path / head / "starflow_kernels" / "_native.so").touch()
    assert compare.build("HEAD", tmp_path) == tmp_path / head
    assert (tmp_path / head / "benchmarks" / "compare_cases.py").exists()
    assert not (tmp_path / head / "setup.py").exists()


@pytest.mark.parametrize("name", compare_cases.CASES)
def test_a_case_of_a_comparison_runs(name):
    assert compare_cases.timed([(name, compare_cases.CASES[name]())], 0.0)[name] > 0


def test_the_strongest_peer_is_the_fastest():
    row = {"microseconds": {"ours": 1.0, "released": 9.0, "plain": 5.0, "onnxruntime": 3.0, "reference": 2.0}}
    assert strongest(row) == "onnxruntime"


def test_long_sequences(monkeypatch):
    monkeypatch.setattr(long, "CASES", {"C 64, 2 layers, T 40": (64, 2, 40)})
    monkeypatch.setattr(long, "SAMPLED", 8)
    monkeypatch.setattr(long, "CALL", 2)
    monkeypatch.setattr(long, "SECONDS", 0.0)
    row = long.measure("C 64, 2 layers, T 40")
    assert row["block"] == "C 64, 2 layers" and row["error"] < long.AGREEMENT
    weights = 2 * 12 * 64 * 64 + 64 * 36
    assert row["megabytes_per_token"] > 4e-6 * (weights + 2 * 2 * 64 * 36)


@pytest.mark.parametrize("module", ["compare_cases", "training_step", "machine", "ops/bench_block"])
def test_cases_of_a_comparison_stand_on_public_names_that_older_commits_have(module):
    tree = ast.parse((BENCHMARKS / f"{module}.py").read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    imported += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    assert {name for name in imported if name.startswith("starflow")} <= {"starflow", "starflow_kernels"}
