"""Interrupts: what a signal to all processes of a run, or a second one, leaves behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support import kills

from starflow.cli import main
from starflow.data import batches
from starflow.training.checkpoints import Checkpoints, latest
from starflow.training.flow import FlowTrainer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_with_workers_writes_a_checkpoint(number, tmp_path):
    run = tmp_path / "run"
    arguments = kills.write_settings(tmp_path / "run.yaml", steps=100000, workers=2, checkpoint_every=1)
    # A shell lets the processes that it starts in the background ignore SIGINT.
    code = (
        "import signal, sys; from starflow.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *arguments, "--out", str(run)]
    # torch warns of two workers on a machine with one core.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:This DataLoader"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    deadline = time.monotonic() + 120
    while latest(run) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, text = process.communicate(timeout=60)
    step = int(latest(run).name)
    assert text == f"stopped at step {step}; continue with: starflow train --resume {run}\n"
    assert process.returncode == 130


@pytest.mark.parametrize(("every", "kept"), [(0, None), (2, 2)])
def test_a_second_interrupt_names_the_checkpoint_that_there_is(every, kept, tmp_path, monkeypatch, capsys):
    run, step, save = tmp_path / "run", FlowTrainer.train_step, Checkpoints.save

    def interrupted(trainer, *batch):
        if trainer.step == 3:
            raise KeyboardInterrupt
        return step(trainer, *batch)

    def interrupted_again(checkpoints, number, *content):
        if number == 3:
            checkpoints.wait()
            raise KeyboardInterrupt
        save(checkpoints, number, *content)

    monkeypatch.setattr(FlowTrainer, "train_step", interrupted)
    monkeypatch.setattr(Checkpoints, "save", interrupted_again)
    arguments = kills.write_settings(tmp_path / "run.yaml", checkpoint_every=every)
    assert main([*arguments, "--out", str(run)]) == 130
    resume = f"the last checkpoint is of step {kept}; continue with: starflow train --resume {run}"
    assert capsys.readouterr().err == f"stopped at step 3; {resume if kept else 'no checkpoint was written'}\n"


def test_a_worker_reports_errors_other_than_the_end_of_the_process_that_trains(monkeypatch, capfd):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    batches._leave_ends_to_the_trainer(0)
    for error in (ConnectionResetError("reset"), EOFError("end"), ValueError("of a worker")):
        sys.excepthook(type(error), error, None)
    assert capfd.readouterr().err == "ValueError: of a worker\n"
