"""Many samples by several processes, into files, in a bounded memory: same bits, resumed after a kill."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from PIL import Image
from safetensors.torch import load_file
from support import components, workers
from support.backends import needs_native

from starflow import Flow
from starflow.cli import main
from starflow.cli.common import byte_count
from starflow.errors import ConfigError
from starflow.inversion.request import Inversion
from starflow.models.config import FlowConfig
from starflow.models.guidance import Guidance
from starflow.pipelines import FlowModel, TarFlowPipeline
from starflow.sampling.budget import ANY_BATCH, MOST, fitting_batch, image_bytes
from starflow.sampling.jobs import Job, Layout
from starflow.sampling.many import generate
from starflow.sampling.sample import SampleOptions

ONE_THREAD = ["--threads", "1"]


def files(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("0*.*"))}


def listed(out) -> list[str]:
    return sorted(json.loads(line)["file"] for line in (out / "samples.jsonl").read_text().splitlines()[1:])


def draw(out, *arguments: str) -> None:
    assert main(["sample", *ONE_THREAD, "--out", str(out), *arguments]) == 0


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    return str(components.save(tmp_path_factory.mktemp("model")))


def test_two_processes_draw_the_bits_of_one(pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\nthe small dog\na blue piano\n")
    base = ["--checkpoint", pipeline, "--prompt-file", str(prompts), "--count", "3"]
    report = str(tmp_path / "report")
    two = ["--batch-size", "2", "--out", str(tmp_path / "two"), "--json", report, *ONE_THREAD]
    codes, texts = workers.run(tmp_path, 2, "sample", *base, *two)
    assert codes == [0, 0], texts
    assert "9 images in" in texts[0] and texts[1] == ""
    assert json.loads((tmp_path / "report").read_text())["results"]["count"] == 9
    draw(tmp_path / "one", *base, "--batch-size", "auto", "--memory", "1GB")
    assert len(files(tmp_path / "one")) == 9 and files(tmp_path / "one") == files(tmp_path / "two")
    assert listed(tmp_path / "two") == sorted(files(tmp_path / "two"))
    assert not list((tmp_path / "two").glob("samples.[0-9]*"))


def test_one_process_of_two_names_unknown_words(pipeline, tmp_path):
    arguments = ["--checkpoint", pipeline, "--prompt", "a café", "--count", "2", "--out", str(tmp_path / "out")]
    codes, texts = workers.run(tmp_path, 2, "sample", *arguments, *ONE_THREAD)
    assert codes == [0, 0] and "does not know 'café'" in texts[0] and texts[1] == ""


def test_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    base = ["--count", "40", "--format", "npz", "--samples-per-file", "7"]
    command = [*launcher, "-m", "starflow", "sample", *base, *ONE_THREAD, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("40 images in") == 1, done.stderr
    draw(tmp_path / "one", *base, "--batch-size", "3")
    assert len(files(tmp_path / "one")) == 6 and files(tmp_path / "one") == files(tmp_path / "two")


# A group of one process, in which rank 0 of two takes part; what is registered first runs last.
LEAVES = """
import atexit, os
import torch.distributed as dist
from starflow.sampling.processes import Processes
atexit.register(lambda: print(dist.is_initialized()))
processes = Processes()
os.environ["WORLD_SIZE"] = "1"
processes.first(lambda: None)
print(dist.is_initialized())
"""


def test_a_process_leaves_its_group_before_the_interpreter_ends():
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, env={**os.environ, **group})
    assert done.stdout.splitlines()[-2:] == ["True", "False"], done.stderr


@pytest.mark.parametrize(("form", "before", "after"), [("png", 2, 3), ("npz", 2, 1), ("safetensors", 1, 2)])
def test_killed_and_resumed_with_another_number_of_processes(tmp_path, capsys, form, before, after):
    out, whole = tmp_path / "out", tmp_path / "whole"
    per_file = [] if form == "png" else ["--samples-per-file", "8"]
    base = ["--guidance", "1", "--format", form, *per_file, *ONE_THREAD]
    endless = ["--batch-size", "2", "--count", "50000", "--out", str(out)]
    processes = workers.start(tmp_path, before, "sample", *base, *endless)
    names = ["samples.jsonl", *(f"samples.{rank}.jsonl" for rank in range(1, before))]
    deadline = time.monotonic() + 60
    while not all((out / name).exists() and _lines(out / name) > 2 for name in names) and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert all(process.exitcode < 0 for process in processes)
    kept, last = files(out), out / names[-1]
    last.write_text(last.read_text()[:-5])
    # A file of many samples without its line is drawn again, an image is known by its name.
    there = len(kept) if form == "png" else 8 * (sum(_lines(out / name) for name in names) - 1)
    # Whatever is there is among the samples asked for now, whichever process was faster.
    count = max(map(_last, kept)) + 40
    again = [*base, "--batch-size", "16", "--count", str(count), "--out", str(out)]
    if after > 1:
        codes, texts = workers.run(tmp_path, after, "sample", *again)
        assert codes == [0] * after, texts
    else:
        assert main(["sample", *again]) == 0
        texts = [capsys.readouterr().out]
    assert f"({there} were there)" in texts[0]
    draw(whole, *base, "--count", str(count), "--batch-size", "64")
    assert kept.items() <= files(whole).items() and files(out) == files(whole)
    assert listed(out) == sorted(files(out)) and not list(out.glob(".*")) and not list(out.glob("samples.[0-9]*"))


def _last(file: str) -> int:
    """Number of the samples up to the last of a file."""
    if file.endswith(".png"):
        label, copy = map(int, file.removesuffix(".png").split("-"))
        return 10 * copy + label + 1
    return 8 * (int(file.split(".")[0]) + 1)


def _lines(path) -> int:
    return path.read_bytes().count(b"\n")


def test_an_error_of_one_process_ends_all(tmp_path):
    base = ["--count", "40", "--format", "npz", "--out", str(tmp_path / "out"), *ONE_THREAD]
    codes, texts = workers.run(tmp_path, 2, "sample", *base, "--samples-per-file", "5", failing=1)
    assert codes == [2, 2]
    assert "starflow sample: error: process 1 of 2: " in texts[1] and "values are not finite" in texts[1]
    assert "another process of this run has ended" in texts[0]


def test_a_mistake_ends_all(tmp_path):
    base = ["--count", "4", "--images", "--out", str(tmp_path)]
    draw(tmp_path, *base)
    codes, texts = workers.run(tmp_path, 2, "sample", *base, "--seed", "1")
    assert codes == [2, 2] and all("begun with another seed" in text for text in texts)
    (tmp_path / "samples.3.jsonl").write_text("[]\n")
    codes, texts = workers.run(tmp_path, 2, "sample", *base)
    assert codes == [2, 2] and all("samples.3.jsonl: not the ledger of a run" in text for text in texts)


def test_a_flow_and_its_pipeline_draw_the_same_files(tmp_path):
    TarFlowPipeline(FlowModel.from_flow(Flow.from_pretrained("digits"))).save_pretrained(tmp_path / "model")
    base = ["--num", "23", "--guidance", "1", "--images", "--batch-size"]
    draw(tmp_path / "flow", *base, "7")
    draw(tmp_path / "pipeline", *base, "23", "--checkpoint", str(tmp_path / "model"))
    assert len(files(tmp_path / "flow")) == 23 and files(tmp_path / "flow") == files(tmp_path / "pipeline")
    assert (tmp_path / "flow" / "grid.png").read_bytes() == (tmp_path / "pipeline" / "grid.png").read_bytes()


def test_every_format_holds_the_same_samples(tmp_path):
    for form in ("png", "npz", "safetensors"):
        per_file = [] if form == "png" else ["--samples-per-file", "10"]
        draw(tmp_path / form, "--num", "23", "--format", form, *per_file)
    shards = [np.load(tmp_path / "npz" / f"00000{i}.npz") for i in range(3)]
    assert [shard["arr_0"].shape for shard in shards] == [(10, 8, 8, 1), (10, 8, 8, 1), (3, 8, 8, 1)]
    images, labels, copies = (np.concatenate([s[name] for s in shards]) for name in ("arr_0", "labels", "copies"))
    assert images.dtype == np.uint8 and (labels == np.arange(23) % 10).all() and (copies == np.arange(23) // 10).all()
    parts = [load_file(tmp_path / "safetensors" / f"00000{i}.safetensors") for i in range(3)]
    assert np.array_equal(torch.cat([part["pixels"] for part in parts]).permute(0, 2, 3, 1).numpy(), images)
    for image, label, copy in zip(images, labels, copies):
        alone = np.asarray(Image.open(tmp_path / "png" / f"{label:06d}-{copy:04d}.png"))
        assert np.array_equal(alone, image[..., 0])
    grids = {(tmp_path / form / "grid.png").read_bytes() for form in ("png", "npz", "safetensors")}
    assert len(grids) == 1


def test_latents(pipeline, tmp_path, capsys):
    base = ["--checkpoint", pipeline, "--prompt", "a red cat", "--num", "5", "--latents"]
    draw(tmp_path / "a", *base, "--format", "safetensors", "--samples-per-file", "3", "--batch-size", "2")
    parts = [load_file(tmp_path / "a" / f"00000{i}.safetensors") for i in range(2)]
    assert [part["latents"].shape for part in parts] == [(3, 4, 8, 8), (2, 4, 8, 8)]
    assert parts[0]["latents"].dtype == torch.float32 and parts[0]["copies"].tolist() == [0, 1, 2]
    assert main(["sample", *base, "--out", str(tmp_path / "b")]) == 2
    assert "written as safetensors, not as png" in capsys.readouterr().err
    draw(tmp_path / "c", "--num", "3", "--latents", "--format", "safetensors")
    assert load_file(tmp_path / "c" / "000000.safetensors")["latents"].shape == (3, 1, 8, 8)


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_a_damaged_file_is_drawn_again(tmp_path, form, capsys):
    base = ["--num", "30", "--format", form, "--samples-per-file", "10"]
    draw(tmp_path, *base)
    whole = files(tmp_path)
    assert len(whole) == 3
    cut, changed, gone = (tmp_path / name for name in whole)
    cut.write_bytes(whole[cut.name][:-1])
    changed.write_bytes(whole[changed.name][:-1] + bytes([whole[changed.name][-1] ^ 1]))
    gone.unlink()
    draw(tmp_path, *base)
    warned = [f"starflow: warning: {path} is damaged: it is drawn again" for path in (cut, changed)]
    assert capsys.readouterr().err.splitlines() == warned
    assert files(tmp_path) == whole
    before = {path: path.stat().st_mtime_ns for path in (cut, changed, gone)}
    draw(tmp_path, *base)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_more_samples_are_added_to_files(tmp_path, capsys):
    base = ["--format", "npz", "--samples-per-file", "10", "--num"]
    draw(tmp_path / "a", *base, "25")
    first = (tmp_path / "a" / "000000.npz").stat().st_mtime_ns
    draw(tmp_path / "a", *base, "32")
    assert "12 images (20 were there)" in capsys.readouterr().out
    draw(tmp_path / "b", *base, "32")
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 4
    assert (tmp_path / "a" / "000000.npz").stat().st_mtime_ns == first
    for change, message in (
        ([*base, "32", "--samples-per-file", "9"], "begun with another per_file"),
        (["--format", "png", "--num", "32"], "begun with another format"),
        ([*base, "32", "--label", "3"], "holds number 0 of condition 0, 0, where number 0 of condition 3, 3 is due"),
    ):
        assert main(["sample", "--out", str(tmp_path / "a"), *change]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="per_file=0"):
        Layout("npz", 0)


@pytest.mark.parametrize("layout", [Layout(), Layout("npz")], ids=["png", "npz"])
def test_a_run_of_no_samples_writes_the_ledger_alone(layout, tmp_path):
    report = generate(None, [], tmp_path, 0, 4, {}, device=torch.device("cpu"), layout=layout)
    assert report.count == report.kept == 0
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_batches_are_full_with_mixed_conditions(tmp_path):
    pipe = TarFlowPipeline(FlowModel.from_flow(Flow.from_pretrained("digits")))
    sizes = []

    def draw_jobs(batch, *more):
        sizes.append(len(batch))
        return pipe.draw_jobs(batch, *more, options=SampleOptions(), size=(8, 8))

    jobs = [Job(i, copy, None if i == 10 else i) for i in range(11) for copy in range(2)]
    for job in jobs[::3]:
        generate(draw_jobs, [job], tmp_path, 0, 1, {}, device=pipe.device)
    sizes.clear()
    report = generate(draw_jobs, jobs, tmp_path, 0, 4, {}, device=pipe.device)
    assert sizes == [4, 4, 4, 2] and (report.count, report.kept) == (14, 8)


def model(**changes) -> Flow:
    torch.manual_seed(0)
    fields = {"image_size": 64, "image_channels": 3, "patch_size": 4, "channels": 128, "layers": [2, 2], "head_dim": 32}
    return Flow(FlowConfig(**{**fields, "num_classes": 10, **changes})).eval()


GROWTH = """
import torch
from benchmarks.cpu.throughput import SHAPES, Guidance, Inversion, growth, model
torch.set_num_threads(1)
flow = model(next(iter(SHAPES)))
for method, window, weight in (("sequential", None, 0.0), ("sequential", None, 1.0), ("jacobi", 32, 0.0)):
    print(*growth(flow, Guidance(weight), Inversion(method, window), False, 32))
"""


@needs_native  # the reference backend takes more
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures resident memory")
def test_an_image_takes_no_more_than_the_model_says():
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        said, used = map(float, line.split())
        # Not less than is used, and not so much more that the budget is idle.
        assert 0.5 * said < used < said + ANY_BATCH / 32, done.stdout


def test_the_batch_of_a_budget():
    flow, plain = model(), Inversion("sequential")
    one, two = (image_bytes(flow, Guidance(weight), plain) for weight in (0.0, 1.0))
    assert 1.5 * one < two < 2 * one
    assert (
        image_bytes(flow, Guidance(), plain, certify=True) == one < image_bytes(flow, Guidance(), Inversion("jacobi"))
    )
    assert fitting_batch(ANY_BATCH + 10_000, 1000, 900) == 10 and fitting_batch(10**12, 0, 1) == MOST
    with pytest.raises(ConfigError, match="--memory"):
        fitting_batch(ANY_BATCH + 1000, 500, 501)
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


def test_a_plain_flow_in_a_bounded_memory(tmp_path):
    draw(tmp_path / "a", "--num", "30", "--images", "--memory", "20MB")
    draw(tmp_path / "b", "--num", "30", "--images", "--batch-size", "7")
    assert len(files(tmp_path / "a")) == 30 and files(tmp_path / "a") == files(tmp_path / "b")
