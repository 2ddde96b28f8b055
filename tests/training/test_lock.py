"""One process alone trains in the folder of a run."""

import signal
import subprocess
import sys

import pytest
from support import kills

from starflow import StarflowError
from starflow.cli import main
from starflow.training.flow import FlowRunConfig, FlowTrainer
from starflow.training.lock import LOCK, Lock

pytest.importorskip("fcntl")


@pytest.fixture
def held(tmp_path):
    """Folder of a run whose lock another process holds."""
    run = tmp_path / "run"
    FlowTrainer(FlowRunConfig.from_dict(kills.settings(steps=2)), run).run(quiet=True)
    code = (
        "import pathlib, sys; from starflow.training.lock import Lock\n"
        "lock = Lock(pathlib.Path(sys.argv[1])); lock.acquire(); print(flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "\n"
    yield run, process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_one_has_ended(held, capsys):
    run, process = held
    trainer = FlowTrainer(FlowRunConfig.from_dict(kills.settings(steps=2)), run)
    assert main(["train", "--resume", str(run), "--quiet"]) == 2
    assert f"{run}: another process trains this run" in capsys.readouterr().err
    with pytest.raises(StarflowError, match="another process trains this run"):
        trainer.run(quiet=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / LOCK).exists()
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert not (run / LOCK).exists()


def test_a_lock_whose_file_goes_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    first, second, take = Lock(tmp_path), Lock(tmp_path), Lock._lock

    def slowly(lock, descriptor, shared):
        first.release()
        take(lock, descriptor, shared)

    first.acquire()
    monkeypatch.setattr(Lock, "_lock", slowly)
    second.acquire()
    monkeypatch.undo()
    with pytest.raises(StarflowError, match="another process"):
        Lock(tmp_path).acquire()
    second.release()
    Lock(tmp_path).check()
