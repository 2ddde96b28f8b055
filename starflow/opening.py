"""Opening of a model that is either a flow or a pipeline."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .devices import check_device, check_dtype
from .errors import CheckpointError, ConfigError
from .models.checkpoint import PIPELINE_INDEX, is_pipeline, is_token_flow, locate
from .models.flow import Flow
from .models.token_flow import TokenFlow

if TYPE_CHECKING:
    from .pipelines import FlowPipeline


def open_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Flow | TokenFlow | FlowPipeline:
    """Open a flow or a pipeline.

    An autoencoder of the pipeline decodes one image at a time, so that an image does not depend on its batch.

    Args:
        path: folder of a flow or a pipeline, or the name of a bundled one such as "digits".
        device: device of the weights.
        dtype: dtype of the weights.
        variant: variant of a pipeline's weight files such as "fp16".

    Returns:
        A `Flow` or `TokenFlow` in eval mode, or a `FlowPipeline`.

    Raises:
        CheckpointError: there is no model, or a file is damaged.
        ConfigError: torch cannot use the device, weights cannot have the dtype, a variant is given for a flow, or the
            pipeline needs a package that is not installed.
    """
    check_device(device)
    check_dtype(dtype)
    if not is_pipeline(path):
        if variant is not None:
            raise ConfigError(f"variant={variant!r}: {path} is no folder of a pipeline, it has no {PIPELINE_INDEX}")
        return (TokenFlow if is_token_flow(locate(path)) else Flow).from_pretrained(path, device, dtype)
    with _without_collection():
        from .pipelines import FlowPipeline, without_loading_bars

        with without_loading_bars():
            try:
                pipe = FlowPipeline.from_pretrained(path, dtype=dtype, variant=variant).to(device)
            except IndexError:
                # diffusers looks for the variant in lists of files that may be empty.
                raise ConfigError(f"variant={variant!r}: {path} has no such weight files") from None
    if "vae" in pipe.components:
        pipe.vae.enable_slicing()
    return pipe


def open_image_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Flow | FlowPipeline:
    """Open a flow on images or a pipeline; arguments and errors are those of `open_model`.

    Raises:
        CheckpointError: the model is a flow on vectors or tokens.
    """
    model = open_model(path, device, dtype, variant)
    if isinstance(model, TokenFlow):
        raise CheckpointError(f"{path} is a flow on vectors or tokens, not on images: use it in Python, see TokenFlow")
    return model


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Suspend the garbage collector, which takes a fifth of the time while diffusers and transformers are imported."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
