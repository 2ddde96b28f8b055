"""Conversion of Prose (arXiv 2508.18175), the flow of transferable-samplers, to a TokenFlow."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from ..errors import CheckpointError, ConfigError
from ..models.token_config import TokenFlowConfig
from ..models.token_flow import TokenFlow

# Module of an adaptive layer -> its name upstream.
MODULES = {
    "attn_norm": "mha.mha.attention.norm",
    "qkv": "mha.mha.attention.qkv",
    "q_norm": "mha.mha.attention.q_layer_norm",
    "k_norm": "mha.mha.attention.k_layer_norm",
    "proj": "mha.mha.attention.proj",
    "mlp_norm": "mha.mha.mlp.norm",
    "up": "mha.mha.mlp.main.0",
    "down": "mha.mha.mlp.main.2",
    "transition.down": "transition.transition.linear_out",
}
LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
EMBEDDING = {
    "atoms.atom": "atom_embed",
    "atoms.residue": "residue_embed",
    "embedding.0": "mlp.0",
    "embedding.2": "mlp.2",
}
# Number of positions of the upstream table of waves.
WAVES = 512


class _Read(dict):
    """Weights by name, and the names that have been read."""

    def __init__(self, state: Mapping[str, torch.Tensor]):
        super().__init__(state)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.seen.add(name)
        return super().__getitem__(name)

    def __missing__(self, name: str) -> torch.Tensor:
        raise CheckpointError(f"weights of Prose: {name} is missing")


def read_prose(state: Mapping[str, torch.Tensor], head_dim: int = 64) -> TokenFlow:
    """Return the flow of upstream weights of Prose, in eval mode.

    Args:
        state: weights by name of the upstream class `TarFlow` with adaptive layers, without a prefix such as "net.".
        head_dim: values per attention head, which the weights do not tell.

    Returns:
        A TokenFlow on as many tokens of 3 coordinates as the upstream model takes at most; pass `lengths` for smaller
        molecules. Its condition has the columns atom_type, aa_type, aa_pos and seq_len. Its `order` is a list with the
        permutation of each block; permutations of padded molecules put the padding last.

    Raises:
        CheckpointError: a weight is missing, left over or of the wrong shape.
        ConfigError: the weights are those of a model with parts that no flow of this package has.
    """
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"weights of Prose: {name} is no tensor of finite floating-point numbers")
    if any(".pair_proj." in name for name in state):
        raise ConfigError("weights of Prose: an attention bias of pairs of atoms is not supported")
    if state and not any(".mha.adaln." in name for name in state):
        raise ConfigError("weights of Prose: there are no adaptive layers; plain layers are not supported")
    read = _Read(state)
    try:
        flow, converted = _convert(read, head_dim)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, (CheckpointError, ConfigError)):
            raise
        raise CheckpointError(f"weights of Prose: their shapes do not fit each other: {error}") from None
    if left := sorted(name for name in state.keys() - read.seen if not name.endswith(".attn_mask")):
        raise CheckpointError(f"weights of Prose: {left[0]} is left over")
    for name, tensor in flow.state_dict().items():
        if name not in converted:
            raise CheckpointError(f"weights of Prose: nothing becomes {name}; the shapes do not fit each other")
        if converted[name].shape != tensor.shape:
            shapes = f"{tuple(converted[name].shape)}, expected {tuple(tensor.shape)}"
            raise CheckpointError(f"weights of Prose: {name} has the shape {shapes}")
    flow.load_state_dict(converted)
    return flow.eval()


def _convert(read: _Read, head_dim: int) -> tuple[TokenFlow, dict[str, torch.Tensor]]:
    """Return a flow with new weights, and the converted ones by name."""
    numbers = [int(match[1]) for name in read if (match := re.match(r"blocks\.(\d+)\.", name))]
    if not numbers:
        raise CheckpointError("weights of Prose: there are no blocks; are their names without a prefix?")
    flow = TokenFlow(_config(read, 1 + max(numbers), head_dim))
    converted = {name: tensor for name, tensor in flow.state_dict().items() if name in ("shift", "scale")}
    for i in range(len(flow.blocks)):
        converted |= {f"blocks.{i}.{name}": tensor for name, tensor in _block(read, flow, i).items()}
    for name, upstream in EMBEDDING.items():
        for leaf in ("weight", "bias") if name.startswith("embedding") else ("weight",):
            converted[f"{name}.{leaf}"] = read[f"cond_embed.{upstream}.{leaf}"]
    return flow, converted


def _config(state: _Read, blocks: int, head_dim: int) -> TokenFlowConfig:
    """Return the settings that the shapes of the weights tell."""
    layers = [
        len({match[1] for name in state if (match := re.match(rf"blocks\.{i}\.attn_blocks\.(\d+)\.", name))})
        for i in range(blocks)
    ]
    first = "blocks.0.attn_blocks.0"
    channels, token_dim = state["blocks.0.proj_in.weight"].shape
    transition = f"{first}.transition.transition.linear_out.weight"
    return TokenFlowConfig.preset(
        "prose",
        tokens=len(state["blocks.0.attn_mask"]),
        token_dim=token_dim,
        channels=channels,
        layers=layers,
        head_dim=head_dim,
        expansion=len(state[f"{first}.mha.mha.mlp.main.0.weight"]) / channels,
        transition=state[transition].shape[1] / channels if transition in state else 0,
        qk_layer_norm=f"{first}.mha.mha.attention.q_layer_norm.weight" in state,
        lookahead="blocks.0.proj_cond.0.weight" in state,
        scale="exp" if len(state["blocks.0.proj_out.weight"]) == 2 * token_dim else "unit",
    )


def _block(state: _Read, flow: TokenFlow, block: int) -> dict[str, torch.Tensor]:
    """Return the weights of a block by name."""
    spec, at = flow.blocks[block].spec, f"blocks.{block}"
    found = {}
    for name in spec.weight_shapes:
        if match := LAYER.fullmatch(name):
            layer, module, leaf = match.groups()
            inner = f"{at}.attn_blocks.{layer}"
            if module in ("transition.gate", "transition.up"):
                # Upstream has one matrix for [up | gate].
                both = state[f"{inner}.transition.transition.swish_linear.0.weight"]
                found[name] = both.chunk(2)[module.endswith("gate")]
            else:
                found[name] = state[f"{inner}.{MODULES[module]}.{leaf}"]
        else:
            found[name] = state[f"{at}.{name}"]
    found["adaptive.positions"] = _positions(state, at, flow.config.tokens)
    project = ("0", "2") if f"{at}.proj_cond.0.weight" in state else ("0",)
    for part in project:
        for leaf in ("weight", "bias"):
            upstream = f"{at}.proj_cond.{part}.{leaf}" if len(project) == 2 else f"{at}.proj_cond.{leaf}"
            found[f"adaptive.project.{part}.{leaf}"] = state[upstream]
    return found | {f"adaptive.{name}": tensor for name, tensor in _adaptive(state, at, spec.layers).items()}


def _adaptive(state: _Read, at: str, layers: int) -> dict[str, torch.Tensor]:
    """Return the weights of the modulations of a block by name."""
    parts = [part for part in ("mha", "transition") if f"{at}.attn_blocks.0.{part}.adaln.to_beta.weight" in state]
    branches = [f"{at}.attn_blocks.{layer}.{part}" for layer in range(layers) for part in parts]

    def each(name: str) -> list[torch.Tensor]:
        return [state[f"{branch}.{name}"] for branch in branches]

    scale, shift = each("adaln.to_gamma.0.weight"), each("adaln.to_beta.weight")
    biases = [torch.cat([bias, torch.zeros_like(bias)]) for bias in each("adaln.to_gamma.0.bias")]
    gate = "scale_output.to_adaln_zero_gamma.0"
    return {
        "norm_weight": torch.stack(each("adaln.norm_cond.weight")),
        "norm_bias": torch.stack(each("adaln.norm_cond.bias")),
        "weight": torch.stack([torch.cat(pair) for pair in zip(scale, shift)]),
        "bias": torch.stack(biases),
        "gate.weight": torch.cat(each(f"{gate}.weight")),
        "gate.bias": torch.cat(each(f"{gate}.bias")),
    }


def _positions(state: _Read, at: str, tokens: int) -> torch.Tensor:
    """Return the table of positions; upstream it is learned, or waves of a learned size."""
    if f"{at}.pos_embed" in state:
        return state[f"{at}.pos_embed"]
    width = len(state[f"{at}.proj_in.bias"])
    if tokens > WAVES:
        raise ConfigError(f"weights of Prose: {tokens} tokens, its table of positions has {WAVES}")
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device="cpu")
    angles = (
        torch.arange(tokens, dtype=torch.float32, device="cpu")[:, None] * (pairs * -(math.log(10000.0) / width)).exp()
    )
    waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return waves * state[f"{at}.pos_embed_scale"]
