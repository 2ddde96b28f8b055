"""Damaged checkpoints are refused with the name of the file, and with what to do."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from support import kills
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata

from starflow import CheckpointError, ConfigError, StarflowError
from starflow.io.digests import digest
from starflow.io.files import temporary_name, write_text
from starflow.training.checkpoints import ENTRIES, latest
from starflow.training.flow import FlowRunConfig, FlowTrainer, export

GUARD = {"skipped": 0, "in_a_row": 0, "taken": 4, "average": 1.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = FlowRunConfig.from_dict(kills.settings(steps=4, checkpoint_every=2, keep_checkpoints=2))
    FlowTrainer(config, folder).run(quiet=True)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """Copy of the run, to damage."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_changed_byte_is_found(name, run, tmp_path):
    file = latest(run) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for read in (lambda: FlowTrainer.resume(run), lambda: export(run, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=rf"{name} is damaged: its SHA-256 digest differs"):
            read()
    assert not (tmp_path / "out").exists()


def check_refused(run, message: str) -> None:
    """Check that the run is not resumed, and that the message ends with what to do."""
    with pytest.raises(CheckpointError, match=message) as found:
        FlowTrainer.resume(run)
    assert str(found.value).endswith(f"; remove {latest(run)} to continue at step 2")


@pytest.mark.parametrize(
    "change",
    [
        *({name: 5} for name in ("config", "metrics", "guards", "data", "speeds", "broken", "files")),
        *({"step": step} for step in ("4", 4.0, 9, -3, None)),
        *({"guards": guards} for guards in ([], [5], [{}], [{**GUARD, "average": "x"}], [{**GUARD, "taken": -1}])),
        {"metrics": [5]},
        {"speeds": []},
        {"broken": ["x"]},
    ],
)
def test_progress_of_another_shape_is_damaged(change, run):
    path = latest(run) / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    check_refused(run, r"run\.json is damaged: ")


@pytest.mark.parametrize("name", ENTRIES)
def test_a_checkpoint_that_lacks_an_entry_is_refused_with_its_name(name, run, tmp_path):
    path = latest(run) / "run.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    check_refused(run, f"0000004 lacks '{name}': it is damaged, or of another version of this package")
    with pytest.raises(CheckpointError, match=f"lacks '{name}'"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_file_without_a_digest_is_damaged(name, run):
    path = latest(run) / "run.json"
    progress = json.loads(path.read_text())
    del progress["files"][name]
    path.write_text(json.dumps(progress))
    check_refused(run, rf"{name} is damaged: run\.json holds no digest of it")


def test_settings_of_another_command_are_refused_with_their_file(run, tmp_path):
    path = latest(run) / "run.json"
    progress = json.loads(path.read_text())
    del progress["config"]["training"]
    path.write_text(json.dumps(progress))
    for read in (lambda: FlowTrainer.resume(run), lambda: export(run, tmp_path / "out")):
        with pytest.raises(ConfigError, match=r"run\.json: settings need exactly the sections model, data, training"):
            read()


@pytest.mark.parametrize("text", ["[]", "5", "null", "{", "[" * 100000])
def test_progress_that_is_no_mapping_is_damaged(text, run, tmp_path):
    (latest(run) / "run.json").write_text(text)
    check_refused(run, r"run\.json is damaged: ")
    with pytest.raises(CheckpointError, match="is damaged"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("error", [MemoryError, OverflowError, ModuleNotFoundError, AttributeError, IndexError])
def test_any_error_of_pickle_means_a_damaged_index(error, run, monkeypatch):
    def fail(*arguments):
        raise error("no such thing")

    monkeypatch.setattr("torch.distributed.checkpoint.FileSystemReader.read_metadata", fail)
    check_refused(run, "0000004 is damaged: no such thing")


def test_an_index_of_another_shape_is_damaged(run):
    progress = json.loads((latest(run) / "run.json").read_text())
    index = pickle.dumps(Metadata({"model.x": TensorStorageMetadata(TensorProperties(), 5, [])}))
    (latest(run) / ".metadata").write_bytes(index)
    progress["files"][".metadata"] = digest(index)
    (latest(run) / "run.json").write_text(json.dumps(progress))
    check_refused(run, "0000004 is damaged")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_is_no_checkpoint_is_refused_with_the_one_before_it(make, run, tmp_path):
    made = run / "checkpoints" / "9"
    make(made)
    for read in (lambda: FlowTrainer.resume(run), lambda: export(run, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"run\.json is damaged") as found:
            read()
        assert str(found.value).endswith(f"; remove {made} to continue at step 4")


def test_a_damaged_checkpoint_without_another_one_needs_a_new_run(run):
    shutil.rmtree(run / "checkpoints" / "0000002")
    (latest(run) / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged: .*; begin a new run$"):
        FlowTrainer.resume(run)


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(trained, tmp_path, monkeypatch):
    def fail(path, text):
        if path.parent.name.startswith(".0000004"):
            raise OSError(28, "No space left on device")
        write_text(path, text)

    monkeypatch.setattr("starflow.training.checkpoints.write_text", fail)
    config = FlowTrainer.resume(trained).config
    with pytest.raises(StarflowError, match=r"cannot write a checkpoint into \S+: No space left on device$"):
        FlowTrainer(config, tmp_path).run(quiet=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000002"]
    assert FlowTrainer.resume(tmp_path).step == 2


def test_a_run_removes_what_a_killed_process_left_and_no_other_file(run):
    left = [run / temporary_name("metrics.jsonl"), run / "samples" / temporary_name("0000004.png")]
    other = run / ".mine.part"
    (run / "samples").mkdir()
    for path in (*left, other):
        path.touch()
    FlowTrainer.resume(run).run(quiet=True)
    assert other.exists() and not any(path.exists() for path in left)
