"""Many images by several processes and in a bounded memory: same bits, full batches, resumed after a kill."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
import components

from starflow import Flow, generation
from starflow.cli import main
from starflow.cli.common import byte_count
from starflow.config import FlowConfig
from starflow.errors import ConfigError
from starflow.flow import Guidance
from starflow.generation import Job, generate
from starflow.memory import MOST, fitting_batch, image_bytes
from starflow.pipelines import FlowModel, TarFlowPipeline
from starflow.solvers import Inversion

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed as on Unix")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits")
    TarFlowPipeline(FlowModel.from_flow(Flow.from_pretrained("digits"))).save_pretrained(path)
    return str(path)


def torchrun(count: int, *arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "-m", "starflow.cli", "sample", *arguments]


def run(count: int, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(torchrun(count, *arguments), capture_output=True, text=True, timeout=240)


def files(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("0*.png"))}


def listed(out) -> list[str]:
    return sorted(json.loads(line)["file"] for line in (out / "manifest.jsonl").read_text().splitlines()[1:])


def test_two_processes_draw_the_bits_of_one(tmp_path):
    folder = str(components.save(tmp_path / "model"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\nthe small dog\na blue piano\n")
    base = ["--checkpoint", folder, "--prompt-file", str(prompts), "--count", "3", "--threads", "1"]
    done = run(2, *base, "--batch-size", "2", "--out", str(tmp_path / "two"), "--json", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 images in") == 1
    assert json.loads((tmp_path / "report").read_text())["results"]["count"] == 9
    assert main(["sample", *base, "--batch-size", "auto", "--memory", "1GB", "--out", str(tmp_path / "one")]) == 0
    assert len(files(tmp_path / "one")) == 9 and files(tmp_path / "one") == files(tmp_path / "two")
    assert listed(tmp_path / "two") == sorted(files(tmp_path / "two"))
    assert not list((tmp_path / "two").glob("manifest.[0-9]*"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3)])
def test_killed_and_resumed_with_another_number_of_processes(digits, tmp_path, before, after):
    out, whole = tmp_path / "out", tmp_path / "whole"
    base = ["--checkpoint", digits, "--count", "400", "--guidance", "1", "--threads", "1"]
    process = subprocess.Popen(
        torchrun(before, *base, "--batch-size", "2", "--out", str(out)),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while not (len(files(out)) > 20 and (out / "manifest.1.jsonl").exists()) and time.monotonic() < deadline:
        time.sleep(0.01)
    # The launcher's workers have process groups of their own: each is killed by its id.
    children = _children(process.pid)
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    kept = files(out)
    assert 20 < len(kept) < 400 and len(children) == before
    part = out / "manifest.1.jsonl"
    part.write_text(part.read_text()[:-5])
    done = run(after, *base, "--batch-size", "16", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"({len(kept)} were there)" in done.stdout
    assert main(["sample", *base, "--batch-size", "64", "--out", str(whole)]) == 0
    assert len(files(whole)) == 400 and files(out) == files(whole)
    assert listed(out) == sorted(files(out)) and not list(out.glob(".*")) and not part.exists()


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(each) for each in found.split()]


FAILING = """
import os, sys
from starflow import generation
from starflow.cli import main
from starflow.errors import InverseError

def fail(*arguments):
    raise InverseError("values are not finite")

if os.environ["RANK"] == "1":
    generation._draw = fail
sys.exit(main(sys.argv[1:]))
"""


def test_an_error_of_one_process_ends_all(digits, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    out = tmp_path / "out"
    command = torchrun(2, "--checkpoint", digits, "--count", "200000", "--threads", "1", "--out", str(out))
    command[command.index("-m", 3) : command.index("sample")] = [str(tmp_path / "failing.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and len(files(out)) < 200000
    message = "starflow sample: error: process 1 of 2: "
    assert message in done.stderr and "values are not finite" in done.stderr


def test_a_mistake_ends_all(digits, tmp_path):
    base = ["--checkpoint", digits, "--count", "4", "--threads", "1", "--out", str(tmp_path)]
    assert main(["sample", *base]) == 0
    done = run(2, *base, "--seed", "1")
    assert done.returncode and "begun with another seed" in done.stderr
    (tmp_path / "manifest.3.jsonl").write_text("[]\n")
    done = run(2, *base)
    assert done.returncode and "manifest.3.jsonl: not the manifest of a run" in done.stderr


def test_batches_are_full_with_mixed_conditions(digits, tmp_path, monkeypatch):
    pipe = TarFlowPipeline.from_pretrained(digits)
    sizes, draw = [], generation._draw
    monkeypatch.setattr(
        generation, "_draw", lambda pipe, batch, *more: sizes.append(len(batch)) or draw(pipe, batch, *more)
    )
    jobs = [Job(i, copy, None if i == 10 else i) for i in range(11) for copy in range(2)]
    for job in jobs[::3]:
        generate(pipe, [job], tmp_path, 0, 1, {}, {})
    sizes.clear()
    report = generate(pipe, jobs, tmp_path, 0, 4, {}, {})
    assert sizes == [4, 4, 4, 2] and (report.count, report.kept) == (14, 8)


def model(**changes) -> Flow:
    torch.manual_seed(0)
    fields = {"image_size": 64, "image_channels": 3, "patch_size": 4, "channels": 128, "layers": [2, 2], "head_dim": 32}
    return Flow(FlowConfig(**{**fields, "num_classes": 10, **changes})).eval()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(weight: float, method: str, window: int | None) -> float:
    """Bytes of each image beyond the first that a batch takes at its peak."""
    flow, guidance, inversion = model(), Guidance(weight), Inversion(method, window)
    most = []
    for count in (1, 64):
        z = flow.noise(count)
        labels = torch.zeros(count, dtype=torch.long)
        flow.inverse(z, labels, guidance=guidance, solvers=inversion.solvers(flow, z, guidance))
        most.append(peak())
    return (most[1] - most[0]) / 63


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures resident memory")
@pytest.mark.parametrize(
    ("weight", "method", "window"), [(0.0, "sequential", None), (1.0, "sequential", None), (0.0, "jacobi", 32)]
)
def test_an_image_takes_no_more_than_the_model_says(weight, method, window):
    code = f"import test_throughput as t; print(t.growth({weight}, {method!r}, {window}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    said = image_bytes(model(), Guidance(weight), Inversion(method, window))
    # Not less than is used, but for pages that are not given back, and not so much more that half the budget is idle.
    assert 0.5 * said < float(done.stdout) < 1.05 * said


def test_the_batch_of_a_budget():
    flow, plain = model(), Inversion("sequential")
    one, two = (image_bytes(flow, Guidance(weight), plain) for weight in (0.0, 1.0))
    assert 1.5 * one < two < 2 * one
    assert image_bytes(flow, Guidance(), plain, certify=True) > one < image_bytes(flow, Guidance(), Inversion("jacobi"))
    assert fitting_batch(10_000, 1000, 900) == 10 and fitting_batch(10**12, 0, 1) == MOST
    with pytest.raises(ConfigError, match="--memory"):
        fitting_batch(1000, 500, 501)
    assert byte_count("8GB") == 8 * 10**9 and byte_count("1.5 GiB") == 3 * 2**29 and byte_count("512") == 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1KB"], "--memory: 1000 bytes do not hold"),
        (["--memory", "1GB", "--batch-size", "2"], "give one of them"),
        (["--memory", "much"], "'much' is not a size"),
        (["--batch-size", "most"], "'most' is not an integer"),
    ],
)
def test_errors(arguments, message, tmp_path, capsys):
    try:
        code = main(["sample", "--num", "2", "--out", str(tmp_path), *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and message in capsys.readouterr().err


def test_a_plain_flow_in_a_bounded_memory(tmp_path, monkeypatch, capsys):
    base = ["sample", "--num", "30", "--images", "--out"]
    assert main([*base, str(tmp_path / "a"), "--memory", "20MB"]) == 0
    assert main([*base, str(tmp_path / "b"), "--batch-size", "7"]) == 0
    assert len(files(tmp_path / "a")) == 30 and files(tmp_path / "a") == files(tmp_path / "b")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*base, str(tmp_path / "c")]) == 2
    assert "several processes draw from the folder of a pipeline" in capsys.readouterr().err
