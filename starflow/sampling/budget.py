"""Estimates of the memory of a batch, and the largest batch that fits into a budget."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import ConfigError
from ..inversion.request import Inversion
from ..models.flow import Flow
from ..models.guidance import Guidance

# Larger batches are no faster, and an interruption loses more samples.
MOST = 1024
# Copies of noise, tokens and result that exist at once.
STATE_COPIES = 5
# Copies of the pixels on their way into a file.
PIXEL_COPIES = 4
# Floats per token in a sweep besides the MLP, in multiples of the network's width.
SWEEP_WIDTHS = 16
# Measured bytes that an image of any size takes in addition to the above.
ANY_IMAGE = 4096
# Measured bytes that a batch of any size takes.
ANY_BATCH = 12 * 2**20
# Measured floats that the backward pass of denoising keeps per layer, token and channel.
FLOATS_PER_UNIT = 25


def image_bytes(
    flow: Flow,
    guidance: Guidance,
    inversion: Inversion,
    grid: tuple[int, int] | None = None,
    certify: bool = False,
    pixels: int = 0,
) -> int:
    """Bytes that one more image in a batch takes, at the most expensive block.

    They hold the KV cache and the activations of the tokens evaluated together, both twice under guidance, and copies
    of the tokens, the text states and the finished image. The reference backend takes more: it keeps matrices of
    attention weights.

    Args:
        flow: the flow.
        guidance: guidance of the samples.
        inversion: how the flow is inverted.
        grid: rows and columns of tokens, by default the ones of training.
        certify: whether samples are certified.
        pixels: values of the finished image.
    """
    config = flow.config
    rows, columns = grid or config.grid
    tokens, rounds = rows * columns, 2 if guidance.weight else 1
    sequential = inversion.method == "sequential" or (inversion.method == "auto" and not flow.calibration)
    # auto may take sweeps over all tokens. The certificate takes all tokens together, on the CPU a few at a time.
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
    """Bytes that the backward pass of denoising takes per image of `tokens` tokens."""
    widths = sum(flow.config.block_channels(i) * layers for i, layers in enumerate(flow.config.layers))
    return 4 * FLOATS_PER_UNIT * widths * (tokens + flow.config.text_len)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of modules."""
    return sum(part.numel() * part.element_size() for each in modules for part in (*each.parameters(), *each.buffers()))


def fitting_batch(budget: int, fixed: int, each: int) -> int:
    """Number of images, at most MOST, that fit into a budget.

    Args:
        budget: bytes in all.
        fixed: bytes that are taken already.
        each: bytes per image.

    Raises:
        ConfigError: not even one image fits.
    """
    fixed += ANY_BATCH
    if budget < fixed + each:
        raise ConfigError(f"--memory: {budget} bytes do not hold {fixed} of weights and work and {each} of an image")
    return min(MOST, (budget - fixed) // each)
