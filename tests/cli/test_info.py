"""`starflow info`: what it prints for people and for programs."""

import json
import re

from starflow import Flow
from starflow.cli import main
from starflow.cli.info import unavailable
from starflow.settings import presets
from starflow_kernels import __version__, backends


def test_tables(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^  starflow +{re.escape(__version__)}$", printed, re.MULTILINE)
    assert re.search(r"^  affine_flow +.*\breference$", printed, re.MULTILINE)
    assert "block_jacobi" not in printed and "affine_flow_inverse_out" not in printed
    assert re.search(r"^  digits +\S", printed.split("Bundled checkpoints\n")[1], re.MULTILINE)
    assert all(re.search(rf"^  {name} +\S", printed, re.MULTILINE) for name in presets())
    assert "Checkpoint" not in printed and "\x1b" not in printed


def test_reasons_of_unavailable_backends(capsys):
    assert main(["info", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"]["backends"] == backends()
    for states in backends().values():
        for state in states.values():
            assert state.startswith("available") or state in captured.err
    listing = {"a": {"x": "available", "y": "no GPU"}, "b": {"y": "no GPU"}, "c": {"y": "old"}}
    assert unavailable(listing) == {"y": "no GPU (a, b); old (c)"}


def test_a_checkpoint(tmp_path, capsys):
    flow = Flow.from_pretrained("digits")
    flow.save_pretrained(tmp_path / "copy")
    assert main(["info", "--checkpoint", str(tmp_path / "copy")]) == 0
    printed = capsys.readouterr().out.split(f"Checkpoint {tmp_path / 'copy'}\n")[1]
    assert re.search(r"^  parameters +361,872$", printed, re.MULTILINE)
    assert re.search(r"^  config.channels +48$", printed, re.MULTILINE)
