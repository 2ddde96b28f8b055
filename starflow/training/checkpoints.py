"""Checkpoints of a run, written by torch.distributed.checkpoint while the training goes on.

A checkpoint is a folder with the tensors of all processes and a file of the progress. It is written under a hidden name
and gets its own once it is whole. Any number of processes can read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import typing
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..errors import CheckpointError, StarflowError
from ..io.digests import digest
from ..io.files import remove_leftovers, temporary_name, write_text
from ..models.checkpoint import RUN_CHECKPOINTS

FOLDER = RUN_CHECKPOINTS
PROGRESS = "run.json"
# Types of the entries of the progress.
ENTRIES = {
    "config": dict,
    "step": int,
    "metrics": list[dict],
    "guards": list[dict],
    "data": dict,
    "speeds": list[dict],
    "broken": list[int],
    "files": dict,
}


def whole(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = (path for path in (Path(run) / FOLDER).glob("*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))


def latest(run: Path) -> Path | None:
    """Return the last checkpoint of a run, or None."""
    found = whole(run)
    return found[-1] if found else None


def last_checkpoint(run: Path, purpose: str = "resume") -> Path:
    """Return the last checkpoint of a run.

    Args:
        run: folder of the run.
        purpose: what it is for, for the message.

    Raises:
        CheckpointError: there is none.
    """
    if (path := latest(run)) is None:
        raise CheckpointError(f"nothing to {purpose}: no checkpoint in {Path(run) / FOLDER}")
    return path


def hidden(path: Path) -> Path:
    """Return the path of a checkpoint while it is written or removed, the same in all processes."""
    return path.with_name(temporary_name(path.name, "0" * 8))


class Checkpoints:
    """Writer of the checkpoints of a run.

    Args:
        run: folder of the run.
        keep: number of checkpoints to keep.
        group: process group of the run for this purpose alone, or None for one process.
    """

    def __init__(self, run: Path, keep: int, group: dist.ProcessGroup | None = None):
        self.folder, self.keep, self.group = Path(run) / FOLDER, keep, group
        self.last: int | None = None
        self._pending: Future | None = None

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
        """Copy the tensors and begin to write a checkpoint; all processes call this together.

        Args:
            step: number of steps taken, which names the checkpoint. One that was saved last is not written again.
            tensors: tensors by name, which may be shards.
            progress: further content, in types of JSON.

        Raises:
            StarflowError: the previous checkpoint could not be written.
        """
        self.wait()
        if step == self.last:
            return
        if self.group is None:
            # Nothing is wrong with a single process.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        writer = _Writer(self.folder / f"{step:07d}", json.dumps(progress), self.keep)
        self._pending = dcp.async_save(
            dict(tensors), storage_writer=writer, process_group=self.group, no_dist=self.group is None
        )
        self.last = step

    def wait(self) -> None:
        """Wait until the checkpoint is whole.

        Raises:
            StarflowError: it could not be written; what was written of it is removed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            remove_leftovers(self.folder)
            raise StarflowError(f"cannot write a checkpoint into {self.folder}: {_reason(error)}") from None


class _Writer(dcp.FileSystemWriter):
    """Writer of a checkpoint that gets its name once every process has written its part."""

    def __init__(self, target: Path, progress: str, keep: int):
        super().__init__(hidden(target))
        self.target, self.progress, self.keep = target, progress, keep

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Complete and rename the folder, then remove older checkpoints; the first process alone calls this."""
        super().finish(metadata, results)
        part = Path(self.path)
        files = {path.name: digest(path) for path in sorted(part.iterdir())}
        write_text(part / PROGRESS, json.dumps({**json.loads(self.progress), "files": files}))
        os.rename(part, self.target)
        for old in whole(self.target.parents[1])[: -self.keep]:
            os.rename(old, hidden(old))
            shutil.rmtree(hidden(old))


def read_progress(path: Path) -> dict[str, Any]:
    """Return the progress that a checkpoint holds, with the types of ENTRIES.

    Raises:
        CheckpointError: the file is damaged, or lacks an entry, as one of another version may.
    """
    file = path / PROGRESS
    try:
        progress = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, _reason(error)) from None
    if not isinstance(progress, dict):
        raise damaged(file, "it holds no mapping")
    if missing := [name for name in ENTRIES if name not in progress]:
        raise CheckpointError(
            f"{path} lacks {missing[0]!r}: it is damaged, or of another version of this package; {_advice(path)}"
        )
    for name, kind in ENTRIES.items():
        if not _is_a(progress[name], kind):
            raise damaged(file, f"{name} is no {kind if typing.get_args(kind) else kind.__name__}")
    if progress["step"] != int(path.name):
        raise damaged(file, f"it is of step {progress['step']}")
    if len(progress["speeds"]) != len(progress["metrics"]):
        raise damaged(file, "its speeds are not those of its metrics")
    return progress


def damaged(file: Path, reason: str) -> CheckpointError:
    """Return the error that a checkpoint is damaged, which says how to go on.

    Args:
        file: the checkpoint, or a file in it.
        reason: what is wrong.
    """
    path = file if file.parent.name == FOLDER else file.parent
    return CheckpointError(f"{file} is damaged: {reason}; {_advice(path)}")


def _advice(path: Path) -> str:
    """Return how to go on without a checkpoint."""
    earlier = [int(other.name) for other in whole(path.parents[1]) if int(other.name) < int(path.name)]
    return f"remove {path} to continue at step {earlier[-1]}" if earlier else "begin a new run"


def _is_a(value: Any, kind: Any) -> bool:
    """Return whether a value from JSON has a type, such as dict or list[int]."""
    if items := typing.get_args(kind):
        return isinstance(value, list) and all(_is_a(item, items[0]) for item in value)
    return type(value) is kind


def check_files(path: Path, progress: Mapping[str, Any]) -> None:
    """Compare the files of a checkpoint with the digests that it holds.

    Args:
        path: the checkpoint.
        progress: what `read_progress` returned.

    Raises:
        CheckpointError: a file is missing, its content has changed, or there is no digest of it.
    """
    for file in (path / ".metadata", *sorted(path.glob("*.distcp"))):
        if file.name not in progress["files"]:
            raise damaged(file, f"{PROGRESS} holds no digest of it")
    for name, expected in progress["files"].items():
        with _reading(path / name):
            changed = digest(path / name) != expected
        if changed:
            raise damaged(path / name, f"its SHA-256 digest differs from that in {PROGRESS}")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    with _reading(path):
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        return {name: tuple(e.size) for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def load_tensors(path: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Read tensors in place, which may be shards; all processes call this together.

    Args:
        path: the checkpoint.
        tensors: tensors by their names in the checkpoint.
        group: process group, or None for one process.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    with _reading(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path), process_group=group, no_dist=group is None)


def flat_state(part: torch.nn.Module | torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the tensors of a module, or of an optimizer by number of the parameter and name."""
    if isinstance(part, torch.nn.Module):
        return part.state_dict()
    return {
        f"{i}.{name}": value
        for i, parameter in enumerate(_parameters(part))
        for name, value in part.state.get(parameter, {}).items()
    }


def make_state(optimizer: torch.optim.Optimizer, names: set[str]) -> None:
    """Make the tensors of an AdamW optimizer that `flat_state` is to return.

    Args:
        optimizer: optimizer that has taken no step.
        names: names of the tensors.
    """
    for i, parameter in enumerate(_parameters(optimizer)):
        if f"{i}.step" in names:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step, **moments}


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report the errors of a damaged checkpoint as a CheckpointError."""
    try:
        yield
    # Damaged bytes can make pickle raise any error.
    except (Exception, dcp.CheckpointException) as error:
        raise damaged(path, _reason(error)) from None


def _reason(error: BaseException) -> str:
    """Return the first line of an error, or of the first one that torch has collected from the processes."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return (getattr(first, "strerror", None) or str(first) or type(first).__name__).splitlines()[0]
