"""Released files to convert."""

from __future__ import annotations

import pytest
import torch
import yaml
from support.released import FLOWS, STARFLOW, make, released_state, settings


@pytest.fixture
def tarflow(tmp_path):
    """A released TarFlow file, its state, and a folder beside it that does not exist."""
    name = "imagenet_model_4_64_3_1_0.15"
    state = released_state(make(FLOWS[name]))
    path = tmp_path / "in" / f"{name}.pth"
    path.parent.mkdir()
    torch.save(state, path)
    return path, state, tmp_path / "out"


@pytest.fixture
def starflow(tmp_path):
    flow = make(STARFLOW)
    path, config = tmp_path / "in" / "starflow.pth", tmp_path / "in" / "starflow.yaml"
    path.parent.mkdir()
    torch.save(released_state(flow), path)
    config.write_text(yaml.safe_dump(settings(flow)))
    return path, config, tmp_path / "out"
