"""Inception network of torch-fidelity, whose features FID, KID, inception score, precision and recall compare."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ..convert.pickles import read_pickle
from ..errors import CheckpointError, ConfigError, DataError
from ..io.digests import digest
from ..io.files import located

# Weights that torch-fidelity converted from the network of the first FIDs. The name holds the start of the digest.
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WEIGHTS_DIGEST = "6726825d"
WEIGHTS_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
# Number of features of each layer that torch-fidelity names.
LAYERS = (64, 192, 768, 2048)
POOL = 2048
# A state of torchmetrics' FrechetInceptionDistance that a file holds whole has the network under this name.
STATE_PREFIX = "inception."


class Inception:
    """Inception network, which maps uint8 images (N, 3, H, W) to features.

    Images are scaled to 299x299 pixels by torch-fidelity, in the way of the TensorFlow network of the first FIDs.

    Args:
        path: weight file, or a state of torchmetrics' FrechetInceptionDistance that holds the network, such as
            *_fid_stats.pth of the TarFlow code. None for torch's cache of downloads.
        layer: number of features, one of LAYERS.
        device: device of the network.

    Raises:
        ConfigError: torch-fidelity is installed but cannot be imported, or there is no such layer.
        DataError: the file is missing, damaged, or holds another network.
        ModuleNotFoundError: torch-fidelity is not installed.
    """

    def __init__(self, path: Path | None = None, layer: int = POOL, device: str | torch.device = "cpu"):
        if layer not in LAYERS:
            raise ConfigError(f"layer={layer}: expected one of {', '.join(map(str, LAYERS))}")
        extractor = _extractor()
        self.layer = layer
        self.path = path or Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
        if not self.path.is_file():
            raise DataError(
                f"no weights of the Inception network at {located(self.path)}: put {WEIGHTS_URL} there, or name the "
                "file with --inception"
            )
        weights, self._is_nested = self._weights()
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        buffer.seek(0)
        names = [str(layer), *(["logits_unbiased"] if layer == POOL else [])]
        try:
            # The constructor reads pickles of any kind: it gets tensors that have been checked.
            with torch.device("cpu"):
                network = extractor("inception-v3-compat", names, feature_extractor_weights_path=buffer)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path}: not the weights of torch-fidelity's Inception network: {reason}") from None
        self._network = network.to(device)
        self.device = torch.device(device)
        self.digest = digest(self.path)

    @property
    def is_published(self) -> bool | None:
        """Whether the weight file is that of the published scores, by its digest; None for a state with other parts."""
        return None if self._is_nested else self.digest.startswith(WEIGHTS_DIGEST)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features (N, layer), and the logits (N, 1008) without bias for the layer 2048; float32, on the CPU."""
        # TF32 would change the third digit of features.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, *logits = self._network(images.to(self.device))
        return features.cpu(), logits[0].cpu() if logits else None

    def _weights(self) -> tuple[dict[str, torch.Tensor], bool]:
        """Return the weights of the network, and whether they are a part of the file."""
        try:
            state, _ = read_pickle(self.path, contiguous=False)
        except CheckpointError as error:
            raise DataError(str(error)) from None
        nested = {
            name.removeprefix(STATE_PREFIX): tensor for name, tensor in state.items() if name.startswith(STATE_PREFIX)
        }
        return nested or state, bool(nested)


def _extractor() -> type[Any]:
    """Return torch-fidelity's class of the network."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError:
        raise
    # A torchvision that was built for another torch raises a RuntimeError.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"torch-fidelity cannot be imported: {reason}; do torch and torchvision fit?") from None
    return FeatureExtractorInceptionV3
