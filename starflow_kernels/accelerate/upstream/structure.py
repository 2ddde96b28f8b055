"""Structure of a flow block of the released TarFlow, STARFlow and iTARFlow code, read from its submodules."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn

from ..._core.numerics import NORM_EPS
from ...spec import AffineSpec, BlockSpec, Norm
from .names import upstream_name

Modules = dict[str, nn.Module]
# Lists of layers in the order in which a block applies them.
LISTS = ("shared_backbone", "attn_blocks", "head_blocks")
HOOKS = ("forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unfit(Exception):
    """Reason why the ops of this package do not compute a block."""


def is_block(module: nn.Module) -> bool:
    """Return whether a module has the outline of an upstream flow block."""
    parts = ("proj_in", "proj_out", "permutation")
    return callable(getattr(module, "reverse", None)) and all(hasattr(module, part) for part in parts)


def read(
    block: nn.Module, flip: bool = False, rotary: bool = False
) -> tuple[BlockSpec, dict[str, torch.Tensor], tuple[type, ...]]:
    """Return the spec of a block, its parameters by their names in the spec, and the classes of its parts.

    Args:
        block: upstream flow block.
        flip: whether its own order of the tokens is reversed.
        rotary: whether its call has rotary positions.

    Raises:
        Unfit: the block has another structure, or hooks on its parts.
    """
    modules = dict(block.named_modules())
    lists = [name for name in LISTS if isinstance(modules.get(name), nn.ModuleList)]
    prefixes = tuple(f"{name}.{i}" for name in lists for i in range(len(modules[name])))  # type: ignore[arg-type]
    layers = {_layer(modules, prefix) for prefix in prefixes}
    kinds = {tuple(type(modules.get(f"{prefix}{part}")) for part in ("", ".attention", ".mlp")) for prefix in prefixes}
    if len(layers) != 1 or len(kinds) != 1:
        raise Unfit("its layers differ" if layers else "it has no layers")
    proj_in, positions = _linear(modules, "proj_in"), getattr(block, "pos_embed", None)
    spec = _spec(
        proj_in.in_features,
        proj_in.out_features,
        len(prefixes),
        layers.pop(),
        "unit" if not getattr(block, "nvp", True) else "softplus" if getattr(block, "use_softplus", False) else "exp",
        float(getattr(block, "soft_clip", 0.0)),
        0 if positions is None else len(positions),
        _linear(modules, "proj_txt").in_features if getattr(block, "txt_dim", 0) else 0,
        bool(getattr(block, "use_sos", False)),
        _norm(modules, "final_norm") == "rms_norm" if "final_norm" in modules else False,
        flip,
        rotary,
    )
    slots, owners = _slots(spec, prefixes)
    _check_parts(modules, owners)
    weights = {}
    for name, path, leaf in slots:
        if len(spec.weight_shapes[name]) == 2 and path:
            _linear(modules, path)
        weight = getattr(modules.get(path), leaf, None)
        if weight is None:
            raise Unfit(f"{path or 'it'} has no {leaf}")
        weights[name] = weight.flatten() if name == "start" else weight
    return spec, weights, tuple(map(type, modules.values()))[1:]


def _linear(modules: Modules, name: str) -> nn.Linear:
    module = modules.get(name)
    if type(module) is not nn.Linear:
        raise Unfit(f"{name} is no torch.nn.Linear")
    return module


def _norm(modules: Modules, name: str) -> Norm:
    module = modules.get(name)
    if type(module) is nn.Identity:
        return "none"
    if type(module) is nn.LayerNorm and module.eps == NORM_EPS["layer_norm"] and module.bias is not None:
        return "layer_norm"
    leaves = [] if module is None else [leaf for leaf, _ in module.named_parameters()]
    if type(module) is not nn.RMSNorm and leaves == ["weight"] and getattr(module, "eps", 0) == NORM_EPS["rms_norm"]:
        return "rms_norm"
    raise Unfit(f"{name} is no norm of TarFlow or STARFlow")


def _layer(modules: Modules, prefix: str) -> tuple[tuple[str, Any], ...]:
    """Return the fields of the spec that a layer determines, but for its kind of rotary positions, a flag."""
    attention = modules.get(f"{prefix}.attention")
    if attention is None:
        raise Unfit(f"{prefix} has no attention")
    qkv = _linear(modules, f"{prefix}.attention.qkv")
    heads: Any = getattr(attention, "num_heads", 1)
    kv_heads: Any = getattr(attention, "num_kv_heads", heads)
    head_dim, scale = qkv.out_features // (heads + 2 * kv_heads), getattr(attention, "sqrt_scale", 0.0)
    if not math.isclose(scale, head_dim**-0.25) or getattr(attention, "non_causal", False):
        raise Unfit("its attention is scaled in another way, or not causal")
    norm = _norm(modules, f"{prefix}.attention.norm")
    if norm != _norm(modules, f"{prefix}.mlp.norm"):
        raise Unfit("its norms differ")
    gated = f"{prefix}.mlp.gate_proj" in modules
    up = _linear(modules, f"{prefix}.mlp.up_proj" if gated else f"{prefix}.mlp.main.0")
    gelu = modules.get(f"{prefix}.mlp.main.1")
    if not gated and not (type(gelu) is nn.GELU and gelu.approximate == "none"):
        raise Unfit("its MLP has another activation than the exact GELU")
    fields = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_dim": up.out_features,
        "mlp": "swiglu" if gated else "gelu",
        "norm": norm,
        "bias": qkv.bias is not None,
        "qk_norm": f"{prefix}.attention.query_norm" in modules,
        "post_norm": f"{prefix}.mlp.post_norm" in modules,
        "rotary": "half" if getattr(attention, "hf_style_rope", False) else "interleaved",
    }
    return tuple(fields.items())


@functools.lru_cache(maxsize=256)
def _spec(
    token_dim, channels, layers, layer, scale, soft_clip, positions, text_dim, start, final_norm, flip, rotary
) -> BlockSpec:
    fields = dict(layer) if rotary else {**dict(layer), "rotary": "none"}
    return BlockSpec(
        token_dim=token_dim, channels=channels, layers=layers, affine=AffineSpec(scale, soft_clip),
        positions=positions, text_dim=text_dim, start=start, final_norm=final_norm, flip=flip, **fields,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _slots(spec: BlockSpec, prefixes: tuple[str, ...]) -> tuple[list[tuple[str, str, str]], frozenset[str]]:
    """Return name in the spec, path of the module and name of the parameter of each weight; and the modules' paths."""
    slots = []
    for name in spec.weight_shapes:
        path, _, leaf = upstream_name(name, spec.mlp).rpartition(".")
        if path.startswith("attn_blocks."):
            _, layer, rest = path.split(".", 2)
            path = f"{prefixes[int(layer)]}.{rest}"
        slots.append((name, path, leaf))
    return slots, frozenset(path for _, path, _ in slots)


def _check_parts(modules: Modules, owners: frozenset[str]) -> None:
    """Raise Unfit if a part of a block has parameters or a dropout that the spec lacks, or hooks."""
    for path, module in modules.items():
        state = vars(module)
        if path and any(state.get(hook) for hook in HOOKS):
            raise Unfit(f"{path} has hooks")
        if path not in owners and path and state["_parameters"] and not path.startswith("time_embed."):
            raise Unfit(f"{path} has parameters that no flow block of this package has")
        if isinstance(module, nn.Dropout) and module.p:
            raise Unfit(f"{path} drops values")
