"""Configuration of a flow on tokens or vectors."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from starflow_kernels import BlockSpec

from ..errors import ConfigError
from .config import StackConfig

Condition = Literal["none", "class", "vector", "token", "atoms"]
PRESETS: dict[str, dict[str, Any]] = {
    "vector": {"soft_clip": 3.0, "channels": 64, "layers": (2,) * 4, "head_dim": 16},
    "molecule": {"soft_clip": 3.0, "token_dim": 3, "channels": 128, "layers": (2,) * 6, "head_dim": 32},
    "prose": {
        **{"token_dim": 3, "channels": 384, "layers": (8,) * 8, "start": False, "condition": "atoms"},
        **{"qk_layer_norm": True, "adaptive": True, "transition": 4.0, "lookahead": True},
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlowConfig(StackConfig):
    """Settings of a flow on tokens (B, T, D) or vectors (B, F), in addition to `StackConfig`.

    Either `features` or `tokens` is given.

    Args:
        features: F, values per vector, which `token_dim` divides; 0 for data that is tokens.
        tokens: T, tokens per sample; 0 for data that is vectors. Shorter samples are padded, see `TokenFlow`.
        token_dim: D, values per token. The values of a token depend on earlier tokens, and within a block not on each
            other.
        condition: "none"; "class", one of `num_classes`; "vector", `condition_dim` values per sample; "token",
            `condition_dim` values per token; or "atoms", integers that `AtomFeatures` describes. Values pass a network
            of two layers before each block adds its own projection of them to its tokens.
        condition_dim: values of a condition, 0 for none.
        positions: whether each block has a learned table of positions. Without one, a block tells tokens apart by
            their values, their conditions and the tokens before them. The positions are those in the data; in an
            adaptive block those in its own order.
        orders: a permutation of 0 .. T - 1 per block, the order in which it takes the tokens; () for blocks that
            alternate between ascending and descending.
        start: whether each block has a learned start token. Without one, the first token of a block passes unchanged.
        qk_layer_norm: whether queries and keys have a LayerNorm over all heads.
        adaptive: whether blocks add no projection of a condition but modulate each layer by it, see `BlockSpec`.
        transition: width of a second branch of each layer of an adaptive block over that of the network, 0 for none.
        lookahead: whether adaptive blocks also show each token the condition of the next one in their order.

    Raises:
        ConfigError: a setting is out of range; the message names it.
    """

    features: int = 0
    tokens: int = 0
    token_dim: int = 1
    condition: Condition = "none"
    condition_dim: int = 0
    positions: bool = True
    orders: tuple[tuple[int, ...], ...] = ()
    start: bool = True
    qk_layer_norm: bool = False
    adaptive: bool = False
    transition: float = 0
    lookahead: bool = False

    LEAST: ClassVar[dict[str, int]] = {
        **StackConfig.LEAST,
        **dict.fromkeys(("features", "tokens", "condition_dim", "transition"), 0),
        "token_dim": 1,
    }

    @classmethod
    def preset(cls, name: str, **settings: Any) -> TokenFlowConfig:
        """Return the settings of a preset.

        Args:
            name: "vector" for tables and posteriors, "molecule" for particles in space, or "prose" for peptides of
                several kinds (arXiv 2508.18175).
            settings: further settings, which replace those of the preset; at least `features` or `tokens`.

        Raises:
            ConfigError: there is no such preset, or a setting is unknown or out of range.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **settings})

    def _check(self) -> None:
        if bool(self.features) == bool(self.tokens):
            raise ConfigError(f"features={self.features}, tokens={self.tokens}: exactly one of them must be given")
        if self.features % self.token_dim:
            raise ConfigError(f"token_dim={self.token_dim} does not divide features={self.features}")
        needed = {"none": "", "atoms": "", "class": "num_classes"}.get(self.condition, "condition_dim")
        for setting in ("num_classes", "condition_dim"):
            value = getattr(self, setting)
            if bool(value) != (setting == needed):
                expected = "a number of at least 1" if setting == needed else "0"
                raise ConfigError(f"{setting}={value}: expected {expected} for condition={self.condition!r}")
        if self.adaptive and self.condition not in ("token", "atoms"):
            raise ConfigError(f"adaptive: needs a condition per token, got condition={self.condition!r}")
        if self.lookahead and not self.adaptive:
            raise ConfigError("lookahead: needs an adaptive flow")
        object.__setattr__(self, "orders", tuple(map(tuple, self.orders)))
        if not self.orders:
            return
        if len(self.orders) != len(self.layers):
            raise ConfigError(f"orders: {len(self.orders)} of them for {len(self.layers)} blocks")
        tokens = self.token_shape[0]
        for i, order in enumerate(self.orders):
            if sorted(order) != list(range(tokens)):
                raise ConfigError(f"orders: expected a permutation of 0 .. {tokens - 1} for block {i}, got {order}")

    @property
    def token_shape(self) -> tuple[int, int]:
        """Number of tokens, and values per token."""
        return self.tokens or self.features // self.token_dim, self.token_dim

    def block_embeddings(self, block: int) -> tuple[int, int, tuple[int, bool]]:
        """Return the arguments of `FlowBlock` after the block."""
        tokens = self.token_shape[0] if self.positions else 0
        return self.num_classes, self.channels if self.embeds else 0, (tokens, self.lookahead)

    @property
    def embeds(self) -> int:
        """Values per sample or token that the network of a condition takes, 0 for no such network."""
        return 4 * self.channels if self.condition == "atoms" else self.condition_dim

    def block_spec(self, block: int) -> BlockSpec:
        """Return the description of a block for the kernels."""
        flip = not self.orders and block % 2 == 1
        return self._block_spec(
            block,
            positions=self.token_shape[0] if self.positions and not self.adaptive else 0,
            start=self.start,
            flip=flip,
            qk_layer_norm=self.qk_layer_norm,
            adaptive=self.adaptive,
            transition_dim=int(self.transition * self.block_channels(block)),
        )
