"""Hostile arguments and surroundings of the command line: an error in one line, and nothing left changed."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.commands import fails

from starflow import Flow
from starflow.cli import COMMANDS, main
from starflow.cli.common import MAX_THREADS
from starflow.seeds import MAX_SEED
from starflow_kernels import __version__

LONG = "9" * 400
TRAIN = ["train", "--preset", "digits", "--quiet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--seed", str(MAX_SEED + 1)], f"--seed: '{MAX_SEED + 1}' is larger than {MAX_SEED}"),
        (["sample", "--seed", LONG], "--seed"),
        ([*TRAIN, "--set", f"training.seed={MAX_SEED + 1}"], "an integer beyond 64 bits"),
        ([*TRAIN, "--set", "training.seed=-1"], "training: seed=-1"),
        ([*TRAIN, "--set", f"training.clip={'9' * 5000}"], "the value is not YAML"),
        ([*TRAIN, "--set", "data.path=2020-13-45"], "the value is not YAML (month must be in 1..12)"),
        ([*TRAIN, "--set", f"data.path={'[' * 3000}"], "the value is not YAML (maximum recursion depth exceeded"),
        ([*TRAIN, "--set", "training.workers=1025"], "training: workers=1025 is not in [0, 1025)"),
        ([*TRAIN, "--set", "data.seed=-1"], "data: seed=-1: expected an integer from 0 to 2^64 - 1"),
        (["sample", "--threads", str(MAX_THREADS + 1)], "--threads: '1025' is larger than 1024"),
        (["sample", "--threads", LONG], "--threads"),
        (["sample", "--memory", LONG], "--memory"),
        (["sample", "--memory", "9" * 5000], "--memory"),
        (["sample", "--memory", "0.2B"], "--memory"),
        (["sample", "--num", LONG], "--num"),
        (["sample", "--num", "10000001"], "--num: 10000001 images, a run draws at most 10000000"),
        (["sample", "--jacobi", "2"], "--jacobi"),
        (["sample", "--jacobi_th", "nan"], "--jacobi_th nan: expected a finite number"),
        (["sample", "--jacobi_th", "inf"], "--jacobi_th inf: expected a finite number"),
        (["sample", "--tol", "inf"], "tol=inf"),
        (["sample", "--attention-temperature", "nan"], "temperature=nan"),
        (["calibrate", "--out", "x", "--guidance", "nan"], "--guidance nan: expected a finite weight of at least 0"),
        (["sample", "--device", "meta"], "--device meta: expected cpu, cuda, cuda:1, mps or auto"),
        (["sample", "--device", "hpu"], "--device hpu"),
        (["sample", "--device", ""], "--device"),
        (["sample", "--label", "9" * 5000], "--label"),
        (["sample", "--out", ""], "--out: '' is not a name"),
        (["sample", "--out=--"], "--out: expected one argument"),
        (["sample", "--json", ""], "--json"),
        (["sample", "--checkpoint", "a\0b"], "--checkpoint"),
        (["sample", "--checkpoint", "a" * 5000], "File name too long"),
        (["sample", "--checkpoint", "a\nb"], "no checkpoint at a b "),
        (["calibrate", "--out", "x", "--batch-size", "1000000000000"], "not enough memory: "),
        (["calibrate", "--out", "x", "--batch-size", str(2**62)], "not enough memory: "),
    ],
)
def test_values_out_of_range(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there(capsys):
    assert "--device cuda: " in fails(capsys, "sample", "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--samples-per-file", "3"], "--samples-per-file: all images are in one grid"),
        (["sample", "--samples-per-file", "3", "--images"], "--samples-per-file: every image has a file of its own"),
        (["sample", "--guidance-rule", "starflow"], "--guidance-rule: there is no guidance"),
        (["sample", "--annealed", "--guidance", "0"], "--annealed: there is no guidance"),
        (["sample", "--attention-temperature", "2"], "--attention-temperature: there is no guidance"),
        (["sample", "--method", "sequential", "--tol", "1e-3"], "tol=0.001: for method='jacobi' or 'auto'"),
        (["sample", "--jacobi", "1", "--window", "4", "--jacobi_block_size", "4"], "--jacobi_block_size: --window"),
        (["sample", "--jacobi", "1", "--tol", "1e-3", "--jacobi_th", "1"], "--jacobi_th: --tol is given"),
        (["sample", "--variant", "fp16"], "variant='fp16': digits is no folder of a pipeline"),
        (["sample", "--height", "8"], "--height: digits is not the folder of a pipeline"),
        (["calibrate", "--out", "x", "--prompt", "a cat"], "--prompt: digits is not the folder of a text-to-image"),
        (["calibrate", "--out", "x", "--annealed"], "--annealed: there is no guidance"),
        (["eval", "--data", "x", "--split", "train"], "--split: all images of --data are used"),
        (["encode", "--vae", "x", "--out", "y", "--length", "3"], "--length: captions are encoded with --text alone"),
        (["encode", "--vae", "x", "--out", "y", "--text-dtype", "float32"], "--text-dtype: captions are encoded"),
    ],
)
def test_a_flag_without_effect_is_refused(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize("arguments", [["info", "--bogus"], ["info", "--check", "digits"], ["sample", "--see", "1"]])
def test_flags_are_not_abbreviated(arguments, capsys):
    assert f"unrecognized arguments: {' '.join(arguments[1:])}" in fails(capsys, *arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_version_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"starflow {__version__}\n"


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["info", "--json"], ["--version"]])
def test_a_full_standard_output_is_one_line(arguments):
    command = [sys.executable, "-m", "starflow", *arguments]
    with open("/dev/full", "w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 2 and last.startswith("starflow") and last.endswith("No space left on device")
    assert found.stderr.count("error: ") == 1 and "Traceback" not in found.stderr


def test_a_full_standard_error_keeps_the_exit_status():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "starflow", "sample", "--label", "x"]
        assert subprocess.run(command, stderr=full).returncode == 2


def test_a_thread_runs_a_command():
    status = []
    thread = threading.Thread(target=lambda: status.append(main(["sample", "--num", "4", "--images", "--out", "x"])))
    thread.start()
    thread.join()
    assert status == [0]


@pytest.mark.parametrize("arguments", [["--images"], ["--images", "--label", "x"]])
def test_handlers_and_threads_are_as_before(arguments):
    before = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    main(["sample", "--num", "4", "--out", "x", "--threads", str(before[1] + 1), *arguments])
    assert (signal.getsignal(signal.SIGTERM), torch.get_num_threads()) == before


def test_training_leaves_handlers_as_before():
    before = signal.getsignal(signal.SIGTERM)
    short = ["--set", "training.steps=1", "--set", "training.sample_every=0"]
    assert main([*TRAIN, *short, "--out", "x"]) == 0 and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--checkpoint", "nowhere"],
        ["train", "--preset", "photos", "--set", "data.source=folder", "--set", "data.path=nowhere"],
        ["train-autoencoder", "--config", "autoencoder.yaml"],
        ["train-decoder", "--config", "decoder.yaml", "--vae", "nowhere"],
        ["encode", "--vae", "nowhere"],
        ["calibrate"],
        ["convert", "nowhere.pth"],
        ["convert", "nowhere", "--to", "upstream"],
    ],
)
def test_out_is_checked_before_work(command, tmp_path, capsys):
    rest = "data: {source: folder, path: nowhere}\ntraining: {steps: 1, batch_size: 1}\n"
    for kind in ("autoencoder", "decoder"):
        Path(f"{kind}.yaml").write_text(f"{kind}: {{}}\n{rest}")
    (tmp_path / "file").touch()
    assert f"cannot write {tmp_path}/file" in fails(capsys, *command, "--out", str(tmp_path / "file" / "x"))


@pytest.mark.parametrize("file", ["file/x.json", "."])
def test_the_file_of_a_report_is_checked_before_work(file, tmp_path, capsys):
    (tmp_path / "file").touch()
    message = fails(capsys, "sample", "--checkpoint", "nowhere", "--json", str(tmp_path / file))
    assert "nowhere" not in message and str(tmp_path) in message


def test_a_folder_does_not_hide_a_bundled_checkpoint(tmp_path, capsys):
    os.mkdir("digits")
    assert main(["sample", "--num", "2", "--out", str(tmp_path)]) == 0
    assert repr(Flow.from_pretrained("digits"))
    assert "no checkpoint at ./digits" in fails(capsys, "sample", "--checkpoint", "./digits")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        short = ["--set", "training.steps=1", "--set", "training.sample_every=1"]
        assert main([*TRAIN, *short, "--out", str(tmp_path / "run")]) == 0
        for kind in ("png", "npz", "safetensors"):
            sample = ["sample", "--num", "2", "--format", kind, "--out", str(tmp_path / kind)]
            assert main([*sample, "--json", str(tmp_path / f"{kind}.json")]) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_names_that_are_no_text_are_escaped(capsys):
    assert main(["sample", "--num", "2", "--out", "\udcff", "--json", "report.json"]) == 0
    assert capsys.readouterr().out.startswith("\\udcff/grid.png: ")
    with open("report.json") as file:
        assert json.load(file)["arguments"]["out"] == "\udcff"
