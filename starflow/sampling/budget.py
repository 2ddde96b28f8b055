"""How many images at a time fit into a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ConfigError
from ..inversion.solvers import Inversion

if TYPE_CHECKING:
    from ..models.flow import Flow, Guidance

# Larger batches are no faster, and an interruption loses more of them.
MOST = 1024
# Copies of noise, tokens and result that live at once, and of the pixels on their way into a file.
STATE_COPIES, PIXEL_COPIES = 5, 4
# Floats of a token in a sweep, in widths of the network, beside its MLP.
SWEEP_WIDTHS = 16
# What any image takes beside that, and a batch of any size, as measured.
ANY_IMAGE, ANY_BATCH = 4096, 12 * 2**20
# Floats that the backward pass of denoising keeps for each layer, token and channel, as measured.
FLOATS_A_UNIT = 25


def image_bytes(
    flow: Flow,
    guidance: Guidance,
    inversion: Inversion,
    grid: tuple[int, int] | None = None,
    certify: bool = False,
    pixels: int = 0,
) -> int:
    """Bytes that one more image in a batch takes, at the most expensive block.

    They are the KV cache, the activations of the positions evaluated together, both twice under guidance, and copies of
    the tokens, the text states and the finished image of `pixels` values. grid: (rows, columns) of tokens, by default
    those of training. Kernels keep no matrix of attention weights; the reference backend does, and takes more.
    """
    config = flow.config
    rows, columns = grid or config.grid
    tokens, rounds = rows * columns, 2 if guidance.weight else 1
    sequential = inversion.method == "sequential" or (inversion.method == "auto" and not flow.calibration)
    # Sweeps may be taken by auto, over all tokens; certify passes over all of them, on the CPU a few at a time.
    at_once = 1 if sequential else inversion.window or tokens
    if certify and flow.device.type != "cpu":
        at_once = tokens
    size = max(4, next(flow.parameters()).element_size())
    most = 0
    for block in flow.blocks:
        spec = block.spec
        prefix = config.text_len if spec.text_dim else 0
        cache = 2 * spec.layers * spec.kv_heads * spec.head_dim * (tokens + prefix)
        sweep = (min(at_once, tokens) + prefix) * (SWEEP_WIDTHS * spec.channels + 2 * spec.mlp_dim)
        most = max(most, cache + sweep)
    text = 3 * config.text_len * config.text_dim
    state = STATE_COPIES * tokens * config.token_dim
    return ANY_IMAGE + size * (rounds * (most + text) + state + PIXEL_COPIES * pixels)


def denoise_bytes(flow: Flow, tokens: int) -> int:
    """Bytes of the backward pass of denoising, of one image."""
    widths = sum(flow.config.block_channels(i) * layers for i, layers in enumerate(flow.config.layers))
    return 4 * FLOATS_A_UNIT * widths * (tokens + flow.config.text_len)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of modules."""
    return sum(part.numel() * part.element_size() for each in modules for part in (*each.parameters(), *each.buffers()))


def fitting_batch(budget: int, fixed: int, each: int) -> int:
    """Images, at most MOST, of `each` bytes in a budget of which `fixed` are taken. Raises ConfigError for none."""
    fixed += ANY_BATCH
    if budget < fixed + each:
        raise ConfigError(f"--memory: {budget} bytes do not hold {fixed} of weights and work and {each} of an image")
    return min(MOST, (budget - fixed) // each)
