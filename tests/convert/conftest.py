"""Upstream files to convert."""

from __future__ import annotations

import pytest
import torch
import yaml
from support.upstream import FLOWS, STARFLOW, make, settings, upstream_state


@pytest.fixture
def tarflow(tmp_path):
    """An upstream TarFlow file, its state, and a folder beside it that does not exist."""
    name = "imagenet_model_4_64_3_1_0.15"
    state = upstream_state(make(FLOWS[name]))
    path = tmp_path / "in" / f"{name}.pth"
    path.parent.mkdir()
    torch.save(state, path)
    return path, state, tmp_path / "out"


@pytest.fixture
def starflow(tmp_path):
    flow = make(STARFLOW)
    path, config = tmp_path / "in" / "starflow.pth", tmp_path / "in" / "starflow.yaml"
    path.parent.mkdir()
    torch.save(upstream_state(flow), path)
    config.write_text(yaml.safe_dump(settings(flow)))
    return path, config, tmp_path / "out"
