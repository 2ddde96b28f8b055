"""A training run that is killed at random moments and resumed on other numbers of processes, and one that is not.

`python tests/support/kills.py COUNT` kills a run COUNT times and prints the largest difference of its losses.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml

from starflow.training.checkpoints import latest, whole
from support import workers

MODEL = {
    "image_size": 8, "image_channels": 1, "patch_size": 2, "channels": 16, "layers": [1, 2], "head_dim": 8,
    "start": True, "scale": "unit", "num_classes": 10, "levels": 17,
}  # fmt: skip
TRAINING = {
    "steps": 8, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 2, "ema": 0.9, "sample_every": 0,
    "checkpoint_every": 0, "log_every": 1,
}  # fmt: skip
COUNTS = (2, 4, 1)


def settings(**training) -> dict:
    """Settings of a small run on digits."""
    return {"model": MODEL, "data": {}, "training": {**TRAINING, **training}}


def write_settings(path: Path, **training) -> list[str]:
    """Write settings to a file; return the arguments that train with them."""
    path.write_text(yaml.safe_dump(settings(**training)))
    return ["train", "--config", str(path), "--quiet", "--threads", "1"]


def losses(run: Path) -> list[float]:
    """Losses of a run by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def difference(run: Path, other: Path) -> float:
    """Largest difference between the losses of two runs."""
    one, two = losses(run), losses(other)
    assert len(one) == len(two)
    return max(abs(a - b) for a, b in zip(one, two))


def killed(folder: Path, run: Path, kills: int, seed: int, arguments: list[str], patience: float) -> None:
    """Kill a run at random moments, resume it each time, and let it end; each checkpoint in between is whole.

    Args:
        folder: folder for what the processes print.
        run: folder of the run.
        kills: number of kills.
        seed: seed of the moments.
        arguments: arguments that begin the run.
        patience: seconds after the first new checkpoint until which a kill falls.
    """
    moments, before = random.Random(seed), -1
    for number in range(kills + 1):
        count = COUNTS[number % 3]
        given = ["train", "--resume", str(run), *arguments[3:]] if latest(run) else [*arguments, "--out", str(run)]
        processes = workers.start(folder, count, *given)
        if number < kills:
            deadline = time.monotonic() + 120
            while steps(run) <= before and time.monotonic() < deadline and all(p.exitcode is None for p in processes):
                time.sleep(0.01)
            time.sleep(moments.uniform(0, patience))
            # Some kills hit one process, whose loss ends the others; the rest hit all.
            hit = processes[-1:] if moments.random() < 0.3 else processes
            for process in hit:
                os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join(120)
            assert process.exitcode is not None
        assert number < kills or not any(process.exitcode for process in processes), texts(folder, count)
        assert steps(run) >= before
        before = steps(run)
        print(f"{number}: {count} processes, step {before}", flush=True)


def steps(run: Path) -> int:
    """Steps of the last checkpoint, which is whole, or -1."""
    found = whole(run)
    for path in found:
        assert (path / ".metadata").exists() and (path / "run.json").exists()
    return int(found[-1].name) if found else -1


def texts(folder: Path, count: int) -> list[str]:
    """What the processes have printed."""
    return [(folder / f"{rank}.txt").read_text() for rank in range(count)]


def main(kills: int, *kinds: str) -> None:
    """Compare a run that is killed with one that is not; kinds are "data" and "fsdp"."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for parallel in kinds or ("data", "fsdp"):
            given = write_settings(
                folder / "run.yaml", steps=8 * kills, checkpoint_every=2, parallel=parallel, keep_checkpoints=2
            )
            codes, printed = workers.run(folder, 1, *given, "--out", str(folder / parallel))
            assert codes == [0], printed
            killed(folder, folder / f"killed-{parallel}", kills, 0, given, 1.0)
            print(parallel, difference(folder / parallel, folder / f"killed-{parallel}"))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
