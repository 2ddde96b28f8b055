"""Files are written whole or not at all; links, FIFOs and devices stay what they are."""

from __future__ import annotations

import os
import re
import shutil
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from starflow import Flow, StarflowError
from starflow.cli import main
from starflow.io.files import write_folder, write_text


def test_a_symbolic_link_is_kept_and_its_target_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "real.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(Path("data") / "real.txt")
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "link.txt", "real.txt"]


def test_a_link_to_a_file_that_is_not_there_yet_is_kept(tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "new" / "real.txt")
    write_text(link, "text")
    assert link.is_symlink() and (tmp_path / "new" / "real.txt").read_text() == "text"


def test_a_link_to_itself_is_refused_and_kept(tmp_path):
    link = tmp_path / "loop"
    link.symlink_to(link)
    with pytest.raises(StarflowError, match="cannot write"):
        write_text(link, "text")
    assert link.is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="it needs FIFOs")
def test_a_fifo_gets_the_report_of_a_command(tmp_path):
    fifo, found = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: found.append(fifo.read_text()), daemon=True)
    reader.start()
    assert main(["info", "--json", str(fifo)]) == 0
    reader.join(30)
    assert fifo.is_fifo() and '"command": "info"' in found[0]
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_device_gets_the_bytes():
    write_text(Path(os.devnull), "text")
    assert Path(os.devnull).is_char_device()


def test_weights_and_settings_follow_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "model" / name).symlink_to(tmp_path / "disk" / name)
    Flow.from_pretrained("digits").save_pretrained(tmp_path / "model")
    assert all((tmp_path / "model" / name).is_symlink() for name in ("model.safetensors", "config.json"))
    assert (tmp_path / "disk" / "model.safetensors").is_file()


def test_a_failed_write_in_a_folder_names_the_file_as_the_user_knows_it(tmp_path):
    with (
        pytest.raises(StarflowError, match=f"^cannot write {tmp_path / 'out' / 'file' / 'inner'}: "),
        write_folder(tmp_path / "out") as folder,
    ):
        (folder / "file").touch()
        write_text(folder / "file" / "inner", "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("Error while serializing"), "Error while serializing"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "[Errno 28] No space left on device"),
    ],
)
def test_a_refusal_by_any_library_is_one_clear_error(error, reason, tmp_path):
    with (
        pytest.raises(StarflowError, match=f"^cannot write {tmp_path / 'out'}: {re.escape(reason)}$"),
        write_folder(tmp_path / "out"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_is_kept_when_the_folder_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with write_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["new"]
