"""Configuration of a flow on images: all differences between TarFlow and STARFlow models are settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from starflow_kernels import AffineSpec, BlockSpec
from starflow_kernels.spec import Mlp, Norm, Rotary, Scale

from ..errors import ConfigError
from ..settings import check_types

PatchOrder = Literal["chw", "hwc"]
SequenceOrder = Literal["R2L", "L2R"]
ConditionBlocks = Literal["all", "last"]
C = TypeVar("C", bound="StackConfig")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Settings of a stack of flow blocks that flows on images and on tokens share.

    Args:
        channels: width of the network of each block.
        layers: number of layers of each block.
        last_channels: width of the network of the last block, 0 for `channels`.
        head_dim: width of an attention head.
        heads: attention heads, 0 for channels / head_dim.
        kv_heads: heads of keys and values, 0 for `heads`.
        expansion: width of an MLP over the width of the network.
        scale: scale function of the affine transform, see `AffineSpec`.
        soft_clip: soft clip of the affine transform, see `AffineSpec`.
        num_classes: number of classes, whose embedding is added to every token; 0 for none.
        norm: norm of the layers, see `BlockSpec`.
        mlp: MLP of the layers, see `BlockSpec`.
        bias: whether linear layers have biases.
        qk_norm: whether queries and keys are normalized.
        post_norm: whether the outputs of attention and MLP are normalized.
        final_norm: whether the output of the last layer is normalized.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """

    channels: int
    layers: tuple[int, ...]
    last_channels: int = 0
    head_dim: int = 64
    heads: int = 0
    kv_heads: int = 0
    expansion: float = 4
    scale: Scale = "exp"
    soft_clip: float = 0.0
    num_classes: int = 0
    norm: Norm = "layer_norm"
    mlp: Mlp = "gelu"
    bias: bool = True
    qk_norm: bool = False
    post_norm: bool = False
    final_norm: bool = False

    # Smallest value of each number.
    LEAST: ClassVar[dict[str, int]] = {
        **dict.fromkeys(("channels", "head_dim"), 1),
        **dict.fromkeys(("last_channels", "heads", "kv_heads", "num_classes", "expansion", "soft_clip"), 0),
    }

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in self.LEAST.items():
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ConfigError(f"{name}={value!r}: expected a number of at least {least}")
        if not self.layers:
            raise ConfigError("layers=(): expected a list with the number of layers of each block")
        self._check()
        for i in range(len(self.layers)):
            width = self.block_channels(i)
            if not self.heads and width % self.head_dim:
                raise ConfigError(f"head_dim={self.head_dim} does not divide the {width} channels of block {i}")
            try:
                self.block_spec(i)
            except (TypeError, ValueError) as error:
                raise ConfigError(str(error)) from None

    def _check(self) -> None:
        """Raise ConfigError unless the settings of a kind of flow fit each other."""
        raise NotImplementedError

    @property
    def token_shape(self) -> tuple[int, int]:
        """Number of tokens, and values per token."""
        raise NotImplementedError

    def block_channels(self, block: int) -> int:
        """Return the width of the network of a block."""
        return self.last_channels or self.channels if block == len(self.layers) - 1 else self.channels

    def block_spec(self, block: int) -> BlockSpec:
        """Return the description of a block for the kernels."""
        raise NotImplementedError

    def block_embeddings(self, block: int) -> tuple[int, int, tuple[int, bool]]:
        """Return the arguments of `FlowBlock` after the block."""
        raise NotImplementedError

    def _block_spec(self, block: int, **options: Any) -> BlockSpec:
        """Return the description of a block.

        Args:
            block: index of the block.
            options: arguments of `BlockSpec` that the settings of all flows do not determine.
        """
        channels = self.block_channels(block)
        heads = self.heads or channels // self.head_dim
        return BlockSpec(
            token_dim=self.token_shape[1],
            channels=channels,
            layers=self.layers[block],
            heads=heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads or heads,
            mlp_dim=int(channels * self.expansion),
            affine=AffineSpec(self.scale, self.soft_clip),
            mlp=self.mlp,
            norm=self.norm,
            bias=self.bias,
            qk_norm=self.qk_norm,
            post_norm=self.post_norm,
            final_norm=self.final_norm,
            **options,
        )

    @classmethod
    def from_dict(cls: type[C], fields: dict[str, Any]) -> C:
        """Read a mapping.

        Args:
            fields: settings by name.

        Raises:
            ConfigError: a setting is unknown, missing or out of range; the message names it.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, fields.keys() - known)):
            raise ConfigError(f"unknown model settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - fields.keys()):
            raise ConfigError(f"missing model settings {', '.join(missing)}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a mapping for JSON and YAML."""
        return {**dataclasses.asdict(self), "layers": list(self.layers)}

    @classmethod
    def load(cls: type[C], path: Path) -> C:
        """Read a JSON file. Names that begin with an underscore, which diffusers adds, are ignored.

        Args:
            path: the file.

        Raises:
            ConfigError: the file is not readable, or a setting is unknown, missing or out of range.
        """
        try:
            fields = json.loads(Path(path).read_bytes())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: expected a JSON object of model settings")
        return cls.from_dict({name: value for name, value in fields.items() if not name.startswith("_")})


@dataclasses.dataclass(frozen=True)
class FlowConfig(StackConfig):
    """Settings of a flow on image patches, in addition to `StackConfig`. The defaults are TarFlow's (arXiv 2412.06329).

    Args:
        image_size: side of a training image in pixels, or in latent pixels.
        image_channels: channels of an image.
        patch_size: side of a token in pixels. A token has patch_size^2 image_channels values.
        start: whether each block has a learned start token.
        rotary: layout of the rotated pairs; "none" gives each block a learned position table.
        rotary_size: side in tokens at which rotary positions are not scaled, 0 for the side of `image_size`.
        patch_order: order of the values of a token: "chw" (TarFlow) or "hwc" (STARFlow).
        sequence_order: "R2L" reverses the tokens of the blocks 1, 3, ...; "L2R" of the blocks 0, 2, ...
        text_dim: width of the text states in front of the tokens, 0 for none.
        text_len: number of text states.
        condition_blocks: blocks that class and text reach: "all" or "last".
        levels: gray levels of the data, 0 for latents.
        noise_std: standard deviation of the Gaussian noise of training, on the scale of [-1, 1] or of the latents. 0
            means uniform dequantization over `levels`, and no noise on latents.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """

    image_size: int
    image_channels: int
    patch_size: int
    start: bool = False
    rotary: Rotary = "none"
    rotary_size: int = 0
    patch_order: PatchOrder = "chw"
    sequence_order: SequenceOrder = "R2L"
    text_dim: int = 0
    text_len: int = 0
    condition_blocks: ConditionBlocks = "all"
    levels: int = 256
    noise_std: float = 0.0

    LEAST: ClassVar[dict[str, int]] = {
        **dict.fromkeys(("image_size", "image_channels", "patch_size"), 1),
        **StackConfig.LEAST,
        **dict.fromkeys(("rotary_size", "text_dim", "text_len", "levels", "noise_std"), 0),
    }

    def _check(self) -> None:
        if self.levels == 1:
            raise ConfigError("levels=1: expected at least 2 gray levels, or 0 for latents")
        if self.image_size % self.patch_size:
            raise ConfigError(f"patch_size={self.patch_size} does not divide image_size={self.image_size}")
        if bool(self.text_dim) != bool(self.text_len):
            raise ConfigError(f"text_dim={self.text_dim}, text_len={self.text_len}: both or neither must be 0")

    @property
    def token_dim(self) -> int:
        """Values per token."""
        return self.image_channels * self.patch_size**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of a training image."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def token_shape(self) -> tuple[int, int]:
        """Number of tokens of a training image, and values per token."""
        return self.grid[0] * self.grid[1], self.token_dim

    def conditioned(self, block: int) -> bool:
        """Return whether class and text reach a block."""
        return self.condition_blocks == "all" or block == len(self.layers) - 1

    def block_embeddings(self, block: int) -> tuple[int, int, tuple[int, bool]]:
        """Return the arguments of `FlowBlock` after the block."""
        return self.num_classes if self.conditioned(block) else 0, 0, (0, False)

    def block_spec(self, block: int) -> BlockSpec:
        """Return the description of a block for the kernels."""
        return self._block_spec(
            block,
            rotary=self.rotary,
            positions=0 if self.rotary != "none" else self.token_shape[0],
            text_dim=self.text_dim if self.conditioned(block) else 0,
            start=self.start,
            flip=block % 2 == (1 if self.sequence_order == "R2L" else 0),
        )
