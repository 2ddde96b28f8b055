"""The TarFlow code that Apple released: its module, and its weights under our names.

`transformer_flow.py` of github.com/apple/ml-tarflow is not part of this repository. A comparison is given its folder.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path

import torch

from starflow import Flow, FlowConfig
from starflow_kernels import BlockSpec
from starflow_kernels.accelerate.upstream.names import upstream_name


def load_peer(folder: Path):
    """Return the module transformer_flow of the released code."""
    spec = importlib.util.spec_from_file_location("transformer_flow", folder / "transformer_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def released_model(peer, flow: Flow):
    """Return the released model with the weights of a flow, or None where it has no such shape."""
    config = flow.config
    if config.channels % 64:
        return None
    shape = FlowConfig(
        image_size=config.image_size, image_channels=config.image_channels, patch_size=config.patch_size,
        channels=config.channels, layers=config.layers[:1] * len(config.layers), num_classes=config.num_classes,
        levels=config.levels, noise_std=config.noise_std,
    )  # fmt: skip
    if config != shape:
        return None
    model = peer.Model(
        config.image_channels, config.image_size, config.patch_size, config.channels, len(config.layers),
        config.layers[0], num_classes=config.num_classes,
    ).eval()  # fmt: skip
    for theirs, block in zip(model.blocks, flow.blocks, strict=True):
        _copy_weights(theirs, block.weights())
        if block.class_embed is not None:
            theirs.class_embed.copy_(block.class_embed[:, None])
    return model


@torch.no_grad()
def released_block(peer, weights: dict[str, torch.Tensor], spec: BlockSpec):
    """Return a block of the released code with our weights in float32, or None where it has no such block."""
    D, C, T = spec.token_dim, spec.channels, spec.positions
    if C % 64 or not T:
        return None
    heads = {"heads": C // 64, "kv_heads": C // 64, "head_dim": 64}
    shape = BlockSpec(
        token_dim=D, channels=C, layers=spec.layers, mlp_dim=4 * C, positions=T, flip=spec.flip, **heads
    )  # fmt: skip
    if spec != shape:
        return None
    order = peer.PermutationFlip(T) if spec.flip else peer.PermutationIdentity(T)
    device = weights["pos_embed"].device
    block = peer.MetaBlock(D, C, T, order, spec.layers).to(device).eval()
    _copy_weights(block, weights)
    return block


def _copy_weights(block, weights: dict[str, torch.Tensor]) -> None:
    """Give a released block weights with our names."""
    for name, weight in weights.items():
        block.get_parameter(upstream_name(name, "gelu")).copy_(weight)


@torch.no_grad()
def step_seconds(block, x: torch.Tensor, lengths: list[int], wall, repeats: int = 3) -> list[float]:
    """Return the median seconds of a step of the released loop at some lengths of its cache.

    Args:
        block: the released block.
        x: (B, T, D) tokens.
        lengths: lengths of the cache in tokens, ascending.
        wall: wall(run) returns the result of run() and its seconds.
        repeats: timed steps per length.
    """
    # The cache holds what the released loop puts there: one view into the projections per token.
    attentions = [layer.attention for layer in block.attn_blocks]
    like, found = block.attn_blocks[0].attention.qkv, []
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else like.weight.dtype
    table = block.permutation(block.pos_embed, dim=0)
    x = x.clone()

    def step(at: int) -> None:
        log_scale, shift = (raw[:, 0] for raw in block.reverse_step(x, table, at))
        x[:, at + 1] = x[:, at + 1] * log_scale.float().exp().to(log_scale.dtype) + shift

    block.set_sample_mode(True)
    for length in lengths:
        for attention in attentions:
            while len(attention.k_cache["cond"]) < length:
                qkv = torch.randn(len(x), 1, 3 * attention.num_heads, 64, dtype=dtype, device=x.device)
                _, k, v = qkv.transpose(1, 2).chunk(3, dim=1)
                attention.k_cache["cond"].append(k)
                attention.v_cache["cond"].append(v)
        times = [wall(lambda at=length: step(at))[1] for _ in range(repeats + 1)]
        found.append(statistics.median(times[1:]))
    block.set_sample_mode(False)
    return found


def timed(run) -> tuple[object, float]:
    """Return the result of run() and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def median_seconds(run, repeats: int) -> float:
    """Return the median seconds of run()."""
    return statistics.median(timed(run)[1] for _ in range(repeats))
