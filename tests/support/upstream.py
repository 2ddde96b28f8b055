"""Flows at small sizes and their weights and settings in the upstream format."""

from __future__ import annotations

import torch

from starflow import Flow, FlowConfig
from starflow.convert import names
from starflow.convert.formats import write_arguments

TARFLOW = {"image_size": 8, "image_channels": 3, "patch_size": 2, "channels": 64, "layers": (1, 1)}
STARFLOW = {
    "image_size": 4, "image_channels": 4, "patch_size": 1, "channels": 64, "layers": (1, 1, 2), "soft_clip": 4.0,
    "scale": "softplus", "start": True, "rotary": "interleaved", "patch_order": "hwc", "sequence_order": "L2R",
    "text_dim": 6, "text_len": 3, "condition_blocks": "last", "final_norm": True, "noise_std": 0.3,
}  # fmt: skip
FLOWS = {
    "imagenet64_model_2_64_2_1_0.05": {**TARFLOW, "noise_std": 0.05},
    "imagenet64_model_2_64_2_1_uniform": TARFLOW,
    "imagenet_model_4_64_3_1_0.15": {**TARFLOW, "patch_size": 4, "layers": (1, 1, 1), "num_classes": 7,
        "noise_std": 0.15},
    "afhq_model_2_64_2_1_0.07": {**TARFLOW, "num_classes": 3, "scale": "unit", "noise_std": 0.07},
    "text": STARFLOW,
    "classes": {**STARFLOW, "text_dim": 11, "text_len": 1},
    "plain": {**STARFLOW, "condition_blocks": "all", "start": False, "scale": "exp", "soft_clip": 0.0,
              "sequence_order": "R2L", "final_norm": False},
    "gemma": {**STARFLOW, "heads": 2, "kv_heads": 1, "qk_norm": True, "post_norm": True, "bias": False,
              "mlp": "swiglu", "norm": "rms_norm"},
    "wide": {**STARFLOW, "last_channels": 128, "rotary_size": 3, "norm": "none", "patch_size": 2},
    "no text": {**STARFLOW, "text_dim": 0, "text_len": 0, "condition_blocks": "all", "layers": (1, 1)},
}  # fmt: skip
# Flags of the upstream text-to-image model that shape it.
THREE_BILLION = {
    "img_size": 256, "txt_size": 128, "channel_size": 4, "patch_size": 1, "channels": 3072, "blocks": 6,
    "layers_per_block": "2 2 2 2 2 24", "noise_std": 0.3, "nvp": 1, "rope": 1, "adaln": 0, "sos": 1,
    "seq_order": "L2R", "use_softplus": 1, "cond_top_only": 1, "use_final_norm": 1, "soft_clip": 4, "fsdp": 1,
    "vae": "stabilityai/sd-vae-ft-ema", "text": "google/flan-t5-xl", "cfg": 2.5,
}  # fmt: skip


def make(fields: dict) -> Flow:
    flow = Flow(FlowConfig(**fields))
    for tensor in flow.state_dict().values():
        tensor.normal_(std=0.05)
    return flow


def upstream_state(flow: Flow) -> dict[str, torch.Tensor]:
    """Return the state dict that the upstream code saves."""
    theirs, state = names.upstream_names(flow.config), flow.state_dict()
    upstream = {theirs[n]: t.reshape(names.upstream_shape(n, tuple(t.shape))).clone() for n, t in state.items()}
    return upstream | {n: names.make_buffer(n, s) for n, s in names.dead_buffers(flow.config).items()}


def settings(flow: Flow) -> dict:
    """Return the settings that the upstream code reads."""
    shapes = {name: tuple(tensor.shape) for name, tensor in upstream_state(flow).items()}
    arguments = write_arguments(flow.config, shapes)
    arguments["layers_per_block"] = " ".join(map(str, arguments["layers_per_block"]))
    return {"arguments": [{name: value} for name, value in arguments.items()]}
