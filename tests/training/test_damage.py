"""Damaged checkpoints are refused with the name of the file, and with what to do."""

import shutil

import pytest
from support import kills

from starflow import CheckpointError
from starflow.training.checkpoints import latest
from starflow.training.flow import FlowRunConfig, FlowTrainer, export


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
