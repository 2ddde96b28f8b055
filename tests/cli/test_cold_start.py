"""What the command line imports to draw, and how it keeps the garbage collector out of the way."""

import gc
import os
import subprocess
import sys

import pytest
from support.imports import ROOT

from starflow import CheckpointError, open_model

# Draws, then prints which modules of the first argument were imported, and at the end how many objects are frozen.
DRAW = """
import atexit, gc, sys
atexit.register(lambda: print("frozen", gc.get_freeze_count()))
from starflow.cli import main
assert main(["sample", "--device", "cpu", "--num", "1", *sys.argv[2:]]) == 0
print("imported", *[name for name in sys.argv[1].split(",") if name in sys.modules])
"""


def draw(modules: str, *arguments: str) -> list[str]:
    """Return the lines that DRAW prints."""
    done = subprocess.run(
        [sys.executable, "-c", DRAW, modules, *arguments], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout.splitlines()


def test_a_flow_is_drawn_from_without_the_packages_of_pipelines():
    heavy = "diffusers,transformers,tokenizers,accelerate,scipy,sklearn,gradio,torch._dynamo,torch.distributed.tensor"
    assert draw(heavy, "--checkpoint", "digits")[1] == "imported"


def test_a_prompt_is_drawn_without_packages_of_training_and_of_the_page(tmp_path):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from support import components

    folder = str(components.save_bundled(tmp_path, "red heart"))
    lines = draw("sklearn,gradio,tensorboard,pandas", "--checkpoint", folder, "--prompt", "red heart")
    assert lines[1] == "imported"


def test_nothing_is_collected_at_the_end_of_a_command():
    _, _, frozen = draw("", "--checkpoint", "digits")
    assert int(frozen.split()[1]) > 100_000


@pytest.mark.parametrize("enabled", [True, False])
def test_opening_a_pipeline_leaves_the_collector_as_it_was(enabled, tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(CheckpointError, match="DiTPipeline"):
            open_model(tmp_path)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
