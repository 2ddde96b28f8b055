"""Random weights of torch-fidelity's Inception network, its command line, and folders of images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def save_random_weights(path: Path) -> None:
    """Write weights of the network's shape whose features are of the order of 1."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    empty = path.with_suffix(".empty")
    torch.save({}, empty)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.nn.init.normal_(network.fc.weight)
    torch.save(network.state_dict(), path)


def save_images(folder: Path, count: int, seed: int, size: int = 16) -> Path:
    """Write PNG files of coarse random colors; the seed determines their brightness too."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        coarse = rng.normal(100 + 30 * seed, 60, (4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
        pixels = np.clip(coarse + rng.normal(0, 10, (size, size, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def fidelity(weights: Path, first: Path, second: Path, *arguments: str) -> dict[str, float]:
    """Return the scores that torch-fidelity's command line gives two folders."""
    command = [
        sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--json", "--silent", "--no-cache", "--save-cpu-ram",
        "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", str(weights),
        "--input1", str(first), "--input2", str(second), *arguments,
    ]  # fmt: skip
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
