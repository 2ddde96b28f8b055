"""Opening of a model that is either a flow or a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .models.checkpoint import PIPELINE_INDEX
from .models.flow import Flow

if TYPE_CHECKING:
    from .pipelines import FlowPipeline


def is_pipeline(path: str | Path) -> bool:
    """Return whether a folder holds a pipeline."""
    return (Path(path) / PIPELINE_INDEX).exists()


def open_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Flow | FlowPipeline:
    """Open a flow or a pipeline.

    An autoencoder of the pipeline decodes one image at a time, so that an image does not depend on its batch.

    Args:
        path: folder of a flow or a pipeline, or the name of a bundled flow such as "digits".
        device: device of the weights.
        dtype: dtype of the weights.
        variant: variant of a pipeline's weight files such as "fp16".

    Returns:
        A `Flow` in eval mode, or a `FlowPipeline`.

    Raises:
        CheckpointError: there is no model, or a file is damaged.
        ConfigError: the pipeline needs a package that is not installed.
    """
    if not is_pipeline(path):
        return Flow.from_pretrained(path, device, dtype)
    from .pipelines import FlowPipeline, without_loading_bars

    with without_loading_bars():
        pipe = FlowPipeline.from_pretrained(path, dtype=dtype, variant=variant).to(device)
    if "vae" in pipe.components:
        pipe.vae.enable_slicing()
    return pipe
