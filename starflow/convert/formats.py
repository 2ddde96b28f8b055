"""Conversion of upstream settings, from the name of a file or from a YAML, to a FlowConfig and back."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..models.config import FlowConfig
from ..settings import read_settings
from .names import family

NAME = re.compile(r"(?P<dataset>.+)_model_(\d+)_(\d+)_(\d+)_(\d+)_(uniform|\d+\.\d+)\.pth")
# Image pixels per latent pixel along a side, for the autoencoders of Stable Diffusion.
DOWNSAMPLING = 8
# Image pixels per latent pixel along a side, for the autoencoder of Wan 2.2.
DOWNSAMPLING_WAN = 16
TEXT_DIMS = {"google/flan-t5-xl": 2048}


def integers(text: str) -> list[int]:
    """Return the integers of a text.

    Args:
        text: integers separated by spaces.
    """
    return [int(word) for word in text.split()]


# Upstream flags that determine the model or its training data.
FLAGS = {
    "img_size": int, "channel_size": int, "patch_size": int, "channels": int, "top_block_channels": int, "blocks": int,
    "layers_per_block": integers, "head_dim": int, "num_heads": int, "num_kv_heads": int, "nvp": int, "rope": int,
    "pt_seq_len": int, "sos": int, "seq_order": str, "use_softplus": int, "soft_clip": float, "use_final_norm": int,
    "use_swiglu": int, "use_qk_norm": int, "use_post_norm": int, "use_bias": int, "norm_type": str, "txt_size": int,
    "cond_top_only": int, "vae": str, "text": str, "use_pretrained_lm": str, "noise_std": float, "noise_type": str,
    "cfg": str, "mix_aspect": int,
}  # fmt: skip
# Upstream flags of STARFlow-V -> the part of the model that each turns on. No flow of this package has these parts.
VIDEO = {
    "vid_size": "frames of a video",
    "fps_cond": "prompts with the frame rate",
    "cond_noise_level": "prompts with the noise level",
    "learnable_self_denoiser": "the denoiser",
    "temporal_causal": "the order of frames",
    "shallow_block_local": "attention inside a frame",
    "local_attn_window": "a window of frames",
    "last_frame_cond": "a given last frame",
    "video_to_video": "a given video",
}
# Values that turn a flag off.
OFF = (None, 0, "", "0", "None", "none")
# First part of the names of weights -> the part of a later upstream model that they belong to.
LATER = {
    "learnable_self_denoiser.": "the denoiser of STARFlow-V",
    "time_embed.": "the noise levels of iTARFlow",
    "shared_backbone.": "the shared layers of iTARFlow",
}
# Upstream flags that affect neither the weights nor an image. `adaln` has no effect upstream.
_IGNORED = """
    acc adaln batch_size caption_column compile conditional_denoiser data dataset denoiser_window drop_image
    drop_label dry_run epoch_length epochs finetuned_vae fp8 fsdp fsdp_text_encoder grad_clip grad_skip
    gradient_checkpoint gradient_checkpoint_mlp latent_norm_regularization logdir loss_scaling lr min_lr no_flip
    noise_embed_denoiser num_samples resume resume_epoch resume_path sample_batch_size sample_freq save_every
    secondary_batch_size secondary_dataset secondary_img_size secondary_ratio secondary_vid_size train_seed
    use_8bit_adam use_mm_attn vae_decoder_factor wandb_name warmup_steps wds
"""
IGNORED = frozenset(_IGNORED.split())
NORMS = ("layer_norm", "rms_norm", "none")


def read_arguments(source: Path, config: Path | None) -> tuple[dict[str, Any], str]:
    """Return the upstream settings and their origin in words.

    Args:
        source: .pth file; for a TarFlow, its name gives the settings.
        config: upstream YAML, or None.

    Raises:
        ConfigError: the YAML has an unknown flag or a wrong structure, or the name does not give the settings.
    """
    if config is not None:
        return parse_arguments(read_settings(config), str(config)), config.name
    match = NAME.fullmatch(source.name)
    if not match:
        raise ConfigError(
            f"{source.name} is not DATASET_model_P_C_K_L_S.pth as TarFlow names its files: "
            "give --config with a YAML of the upstream code"
        )
    patch, channels, blocks, layers = (int(number) for number in match.groups()[1:5])
    sizes = {"patch_size": patch, "channels": channels, "blocks": blocks, "layers_per_block": [layers]}
    noise = match[6]
    return {
        **sizes,
        **({"noise_type": noise} if noise == "uniform" else {"noise_std": float(noise)}),
    }, "the file's name"


def parse_arguments(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the flags in the `arguments:` list of an upstream YAML, by name and with their types.

    Args:
        settings: content of the YAML.
        source: path of the YAML, for error messages.

    Raises:
        ConfigError: a flag is unknown, has a wrong value, or turns on a part of STARFlow-V.
    """
    entries = settings.get("arguments")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{source}: expected a list `arguments:` of flags, as in the upstream code")
    arguments, video = {}, []
    for name, value in ((name, value) for entry in entries for name, value in entry.items()):
        if name in IGNORED or (name in VIDEO and value in OFF):
            continue
        if name in VIDEO:
            video.append(f"{VIDEO[name]} ({name}={value})")
            continue
        if name not in FLAGS:
            raise ConfigError(f"{source}: unknown flag {name!r}")
        try:
            arguments[name] = FLAGS[name](str(int(value) if isinstance(value, bool) else value))
        except ValueError:
            raise ConfigError(f"{source}: {name}={value!r} is not a value of that flag") from None
    if video:
        raise ConfigError(f"{source} is of STARFlow-V, and no flow of this package has {', '.join(video)}")
    return arguments


def flow_config(arguments: dict[str, Any], shapes: dict[str, tuple[int, ...]], source: str) -> FlowConfig:
    """Return the FlowConfig of upstream settings.

    Args:
        arguments: upstream settings.
        shapes: shapes of the upstream weights by name, which give what the settings leave open.
        source: origin of the settings, for error messages.

    Raises:
        ConfigError: no flow of this package has such settings, or they contradict the weights.
        CheckpointError: the weights belong to another model.
    """
    for start, part in LATER.items():
        if any(name.startswith(start) for name in shapes):
            raise CheckpointError(f"the weights {start}* are {part}, which no flow of this package has")
    if arguments.get("rope") or arguments.get("txt_size"):
        return _starflow(arguments, shapes, source)
    return _tarflow(arguments, shapes, source)


def _noise(arguments: dict[str, Any], default: float) -> float:
    return 0.0 if arguments.get("noise_type") == "uniform" else arguments.get("noise_std", default)


def _starflow(arguments: dict[str, Any], shapes: dict[str, tuple[int, ...]], source: str) -> FlowConfig:
    get = arguments.get
    if lm := get("use_pretrained_lm"):
        raise ConfigError(f"{source}: use_pretrained_lm={lm}: a last block from a language model is not supported")
    if get("norm_type", "layer_norm") not in NORMS:
        raise ConfigError(f"{source}: norm_type={get('norm_type')}: expected one of {', '.join(NORMS)}")
    layers = get("layers_per_block", [8])
    layers = layers * get("blocks", 4) if len(layers) == 1 else layers
    vae, side = get("vae"), get("img_size", 32)
    factor = 1 if vae is None else DOWNSAMPLING_WAN if "Wan2.2" in vae else DOWNSAMPLING
    patch, text_len, channels = get("patch_size", 4), get("txt_size", 0), get("channels", 512)
    if patch < 1 or side % (factor * patch):
        raise ConfigError(f"{source}: img_size={side} is no multiple of {factor * patch}, the pixels of a token's side")
    text_dim = 0
    if text_len:
        widths = [shape[-1] for name, shape in shapes.items() if name.endswith(".proj_txt.weight") and shape]
        text_dim = TEXT_DIMS.get(get("text"), 0) or max(widths, default=0)
        if not text_dim:
            raise CheckpointError(f"txt_size is {text_len} in {source}, but there is no proj_txt in the weights")
    rotary_size = get("pt_seq_len") or 0
    return FlowConfig(
        image_size=side // factor,
        image_channels=get("channel_size", 3),
        patch_size=patch,
        channels=channels,
        layers=tuple(layers),
        last_channels=_unless(channels, get("top_block_channels")),
        head_dim=get("head_dim", 64),
        heads=get("num_heads") or 0,
        kv_heads=get("num_kv_heads") or 0,
        scale="softplus" if get("use_softplus") else "exp",
        soft_clip=get("soft_clip", 0.0),
        start=bool(get("sos")),
        rotary="interleaved" if get("rope") else "none",
        rotary_size=_unless(side // factor // patch, rotary_size) if get("rope") else 0,
        patch_order="hwc",
        sequence_order=get("seq_order", "R2L"),
        text_dim=text_dim,
        text_len=text_len,
        condition_blocks="last" if get("cond_top_only") else "all",
        norm=get("norm_type", "layer_norm"),
        mlp="swiglu" if get("use_swiglu") else "gelu",
        bias=bool(get("use_bias", 1)),
        qk_norm=bool(get("use_qk_norm")),
        post_norm=bool(get("use_post_norm")),
        final_norm=bool(get("use_final_norm")),
        noise_std=_noise(arguments, 0.3),
    )


def _unless(usual: int, value: int | None) -> int:
    """Return the value, or 0 if it is the usual one."""
    return 0 if value in (None, usual) else value


def _tarflow(arguments: dict[str, Any], shapes: dict[str, tuple[int, ...]], source: str) -> FlowConfig:
    try:
        channels, token_dim = shapes["blocks.0.proj_in.weight"]
        tokens, _ = shapes["blocks.0.pos_embed"]
        outputs = shapes["blocks.0.proj_out.bias"][0]
        classes = shapes.get("blocks.0.class_embed", (0,))[0]
    except (KeyError, ValueError, IndexError):
        hint = ": STARFlow's weights need its YAML, --config" if "blocks.0.sos_embed" in shapes else ""
        raise CheckpointError(f"these are not the weights of a TarFlow, as {source} says{hint}") from None
    if "patch_size" not in arguments or not {"noise_std", "noise_type"} & arguments.keys():
        raise ConfigError(f"{source}: patch_size and noise_std (or noise_type: uniform) are needed")
    patch, side = arguments["patch_size"], math.isqrt(tokens)
    if not patch or token_dim % patch**2 or side**2 != tokens or outputs not in (token_dim, 2 * token_dim):
        raise ConfigError(
            f"patches of {patch}x{patch} in {source} do not fit the weights: {tokens} tokens of {token_dim} features, "
            f"{outputs} outputs"
        )
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    layers = len({name.split(".")[3] for name in shapes if name.startswith("blocks.0.attn_blocks.")})
    from_weights = {
        "channels": channels,
        "blocks": blocks,
        "layers_per_block": [layers],
        "channel_size": token_dim // patch**2,
        "img_size": side * patch,
        "nvp": int(outputs == 2 * token_dim),
    }
    for name, value in from_weights.items():
        if arguments.get(name, value) != value:
            raise ConfigError(f"{name} is {arguments[name]} in {source} but {value} in the weights")
    return FlowConfig(
        image_size=side * patch,
        image_channels=token_dim // patch**2,
        patch_size=patch,
        channels=channels,
        layers=(layers,) * blocks,
        scale="exp" if from_weights["nvp"] else "unit",
        num_classes=classes,
        noise_std=_noise(arguments, 0.0),
    )


def write_arguments(config: FlowConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the upstream settings of a flow.

    Args:
        config: settings of the flow.
        shapes: shapes of the upstream weights by name.

    Raises:
        ConfigError: the upstream code has no setting for a part of the flow, which the message names.
    """
    noise = {"noise_std": config.noise_std} if config.noise_std else {"noise_type": "uniform"}
    arguments = {
        "img_size": config.image_size,
        "channel_size": config.image_channels,
        "patch_size": config.patch_size,
        "channels": config.channels,
        "blocks": len(config.layers),
        "layers_per_block": list(config.layers) if len(set(config.layers)) > 1 else [config.layers[0]],
        **noise,
    }
    if family(config) == "tarflow":
        arguments["nvp"] = int(config.scale != "unit")
    else:
        arguments |= {
            "rope": int(config.rotary != "none"),
            "sos": int(config.start),
            "seq_order": config.sequence_order,
            "use_softplus": int(config.scale == "softplus"),
            "soft_clip": config.soft_clip,
            "use_final_norm": int(config.final_norm),
            "use_swiglu": int(config.mlp == "swiglu"),
            "use_qk_norm": int(config.qk_norm),
            "use_post_norm": int(config.post_norm),
            "use_bias": int(config.bias),
            "norm_type": config.norm,
            "txt_size": config.text_len,
            "cond_top_only": int(config.condition_blocks == "last"),
            "head_dim": config.head_dim,
        }
        sizes = {
            "top_block_channels": config.last_channels,
            "num_heads": config.heads,
            "num_kv_heads": config.kv_heads,
            "pt_seq_len": config.rotary_size,
        }
        arguments |= {name: size for name, size in sizes.items() if size}
    try:
        restored = flow_config(arguments, shapes, "the upstream code")
    except ConfigError as error:
        raise ConfigError(f"the upstream code has no setting for this flow: {error}") from None
    wanted, got = _plain(config), _plain(restored)
    if differing := [name for name in wanted if wanted[name] != got[name]]:
        raise ConfigError(
            "the upstream code has no setting for " + ", ".join(f"{name}={wanted[name]!r}" for name in differing)
        )
    return arguments


def _plain(config: FlowConfig) -> dict[str, Any]:
    """Return the fields that have an effect, with 0 for values that equal a default computed from other fields."""
    usual = {config.block_channels(i) // config.head_dim for i in range(len(config.layers))}
    conditional = bool(config.num_classes or config.text_dim)
    changes = {
        "last_channels": _unless(config.channels, config.last_channels),
        "heads": 0 if usual == {config.heads} else config.heads,
        "kv_heads": 0 if {config.heads or config.kv_heads, *usual} == {config.kv_heads} else config.kv_heads,
        "rotary_size": 0 if config.rotary == "none" else _unless(config.grid[0], config.rotary_size),
        "condition_blocks": config.condition_blocks if conditional else "all",
    }
    return dataclasses.replace(config, **changes).to_dict()
