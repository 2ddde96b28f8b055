"""Masked networks of other libraries as lists of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..masked_inverse.network import MaskedLayer
from .swap import loaded

_ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "softplus": nn.Softplus(),
}


def activation_name(function: Callable) -> str | None:
    """Return the name of an activation, a module or a function, None if it is another or has options of its own."""
    for name, module in _ACTIVATIONS.items():
        if function in (getattr(F, name, None), getattr(torch, name, None)):
            return name
        if type(function) is type(module) and _options(function) == _options(module):
            return name
    return None


def _options(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key[0] != "_" and key not in ("training", "inplace")}


def zuko_layers(network: nn.Module, features: int, context: torch.Tensor | None) -> list[MaskedLayer] | None:
    """Return the layers of a `zuko.nn.MaskedMLP`, or None if there are others in it.

    Args:
        network: the network, of inputs x (N, features) and context (N, C) side by side.
        features: D, number of values.
        context: (N, C), or None.
    """
    masked, residual = loaded("zuko.nn", "MaskedLinear"), loaded("zuko.nn", "Residual")
    layers: list[MaskedLayer] = []
    activation: str | None = "identity"
    for part in network if type(network) is loaded("zuko.nn", "MaskedMLP") else ():
        if activation is None:
            return None
        if type(part) is masked:
            given = slice(features, None) if context is not None and not layers else None
            layers.append(_masked(part, activation, context, given))
            activation = "identity"
        elif type(part) is residual and layers and activation == "identity":
            first, function, second = part
            layers.append(_masked(first, "identity"))
            layers.append(_masked(second, activation_name(function), skip=len(layers) - 2))
        else:
            activation = activation_name(part) if activation == "identity" else None
    return _known(layers)


def made_layers(network: nn.Module, context: torch.Tensor | None) -> list[MaskedLayer] | None:
    """Return the layers of a MADE of nflows, or of its copy in normflows, or None if there are others in it.

    Args:
        network: the network.
        context: (N, C), or None.
    """
    copied = type(network).__module__ == "normflows.nets.made"
    if (not copied and type(network).__module__ != "nflows.transforms.made") or not _is_original(network):
        return None
    blocks = list(network.blocks)
    residual = getattr(network, "use_residual_blocks", any(hasattr(block, "linear_layers") for block in blocks))
    normalized = any(isinstance(module, (nn.BatchNorm1d, nn.SyncBatchNorm)) for module in network.modules())
    if normalized or (copied and not isinstance(network.preprocessing, nn.Identity)):
        return None
    first = None if context is None else network.context_layer(context)
    if first is not None and not copied:
        first = network.activation(first)
    layers = [_masked(network.initial_layer, "identity", more=first)]
    # The activation of the first layer's output, if it is not in a residual block.
    activation = "identity" if residual or copied else activation_name(network.activation)
    for block in blocks:
        own = activation_name(block.activation)
        if not residual:
            layers.append(_masked(block.linear, activation))
            activation = own
            continue
        inner, outer = block.linear_layers
        added = None if context is None else block.context_layer(context)
        layers.append(_masked(inner, own, more=None if copied else added))
        gate = added.sigmoid() if copied and added is not None else None
        layers.append(_masked(outer, own, scale=gate, skip=len(layers) - 2))
    layers.append(_masked(network.final_layer, activation))
    return _known(layers)


def pyro_layers(network: nn.Module, context: torch.Tensor | None) -> list[MaskedLayer] | None:
    """Return the layers of a `pyro.nn.AutoRegressiveNN`, or None if it has a layer from input to output.

    Args:
        network: the network, of inputs context (N, C) and x (N, D) side by side.
        context: (N, C), or None.
    """
    if type(network).__module__ != "pyro.nn.auto_reg_nn" or not _is_original(network) or network.skip_layer is not None:
        return None
    first, *others = network.layers
    given = None if context is None else slice(0, network.context_dim)
    layers = [_masked(first, "identity", context, given)]
    layers += [_masked(layer, activation_name(network.f)) for layer in others]
    return _known(layers)


def _is_original(network: nn.Module) -> bool:
    """Return whether all parts of a network are of classes of its own library or of torch."""
    modules = (type(part).__module__ for part in network.modules())
    return all(module == type(network).__module__ or module.startswith("torch.nn.modules.") for module in modules)


def _masked(
    layer: Any,
    activation: str | None,
    context: torch.Tensor | None = None,
    given: slice | None = None,
    more: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    skip: int | None = None,
) -> MaskedLayer:
    """Return a masked linear layer.

    Args:
        layer: the layer, with `weight`, `mask` and `bias`.
        activation: of its input.
        context: (N, C) part of its input.
        given: columns of that part.
        more: (N, out) what is added to its output.
        scale: of the output.
        skip: of the output.
    """
    weight = layer.weight * layer.mask
    offset = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    if given is not None and context is not None:
        offset = F.linear(context, weight[:, given], offset)
        kept = slice(given.stop, None) if given.start == 0 else slice(0, given.start)
        weight = weight[:, kept]
    return MaskedLayer(weight, offset if more is None else offset + more, activation, scale, skip)  # type: ignore[arg-type]


def _known(layers: list[MaskedLayer]) -> list[MaskedLayer] | None:
    return layers if layers and all(layer.activation for layer in layers) else None


def masked_dependences(network: nn.Module, features: int) -> torch.Tensor:
    """Return (D, D) whether value i depends on value j by a chain of masked layers.

    Args:
        network: network whose masked layers have a buffer `mask` (out, in), in the order in which they are applied. The
            values are the first inputs, and the outputs are D groups, one per value.
        features: D.
    """
    first, *others = [layer.mask for layer in network.modules() if hasattr(layer, "mask")]
    reach = first[:, :features].float()
    for mask in others:
        reach = (mask.float() @ reach > 0).float()
    return reach.unflatten(0, (features, -1)).amax(1) > 0


def places(depends: torch.Tensor) -> torch.Tensor:
    """Return the place (D,) of each value in an order in which none depends on a later one, from depends (D, D)."""
    place = torch.zeros(len(depends), dtype=torch.int64, device=depends.device)
    for _ in range(len(depends)):
        place = torch.where(depends, place + 1, 0).amax(1)
    return place
