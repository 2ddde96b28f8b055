"""Names and shapes of weights, in this package and in the upstream code."""

from __future__ import annotations

import math
from typing import Literal

import torch

from starflow_kernels.accelerate.upstream.names import upstream_name

from ..models.config import FlowConfig
from ..models.flow import Flow

Family = Literal["tarflow", "starflow"]


def family(config: FlowConfig) -> Family:
    """Return which upstream code computes a flow: STARFlow's if it has rotary positions or text, else TarFlow's.

    Args:
        config: settings of the flow.
    """
    return "starflow" if config.rotary != "none" or config.text_dim else "tarflow"


def weight_shapes(config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by name.

    Args:
        config: settings of the flow.
    """
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Flow(config).state_dict().items()}


def upstream_names(config: FlowConfig) -> dict[str, str]:
    """Return the upstream name of each weight by name.

    Args:
        config: settings of the flow.
    """
    return {name: _upstream_name(name, config) for name in weight_shapes(config)}


def _upstream_name(name: str, config: FlowConfig) -> str:
    if name == "prior_variance":
        return "var"
    block, _, weight = name.removeprefix("blocks.").partition(".")
    return f"blocks.{block}.{upstream_name(weight, config.mlp)}"


def upstream_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the upstream shape of a weight.

    Args:
        name: name of the weight in this package.
        shape: shape of the weight in this package.
    """
    if name.endswith(".start"):
        return (1, 1, *shape)
    if name.endswith(".class_embed"):
        return (shape[0], 1, shape[1])
    return shape


def positions(config: FlowConfig) -> int:
    """Return the number of tokens per side that determines the size of the upstream buffers.

    Args:
        config: settings of the flow.
    """
    return config.rotary_size or config.grid[0]


def dead_buffers(config: FlowConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape, by upstream name, of the dead buffers: no upstream output depends on them.

    Args:
        config: settings of the flow.
    """
    tokens = positions(config) ** 2
    length = tokens + config.text_len
    buffers = {f"blocks.{i}.attn_mask": (length, length) for i in range(len(config.layers))}
    if config.scale != "unit":
        buffers["var"] = (tokens, config.token_dim)
    if config.rotary != "none":
        buffers |= {f"feat_rope.freqs_{function}": (length, config.head_dim) for function in ("cos", "sin")}
    return buffers


def make_buffer(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a dead buffer with the initial values of the upstream code.

    Args:
        name: upstream name.
        shape: shape of the buffer.
    """
    if name.endswith("attn_mask"):
        return torch.ones(shape, dtype=torch.float32, device="cpu").tril()
    return torch.full(shape, float(name == "var"), dtype=torch.float32, device="cpu")


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the number of parameters.

    Args:
        shapes: shapes of the weights by name.
    """
    return sum(math.prod(shape) for name, shape in shapes.items() if name != "prior_variance")
