"""Frozen specs of what the ops compute, and a Literal for every argument that accepts a set of names.

Specs hold no tensors. Registered ops take them as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
import sys
from typing import Any, ClassVar, Literal

Scale = Literal["exp", "softplus", "unit"]
Logdet = Literal["sum", "mean", "none"]
GuidanceRule = Literal["tarflow", "starflow", "itarflow"]
Rotary = Literal["none", "interleaved", "half"]
Norm = Literal["layer_norm", "rms_norm", "none"]
NormKind = Literal["layer_norm", "rms_norm"]
Mlp = Literal["gelu", "swiglu"]
Quantize = Literal["none", "int8", "fp8", "bfloat16"]
Method = Literal["sequential", "jacobi"]
Guess = Literal["noise", "zero"]


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless `value` is one of the strings of the Literal `choices`."""
    if value not in choices.__args__:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices.__args__))}")


def scalar(value: Any) -> Any:
    """Return a scalar of numpy or a tensor without dimensions as a number of Python, and anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_not_negative(name: str, value: object, note: str = "") -> float:
    """Return `value` as a float, or raise TypeError or ValueError unless it is a finite number >= 0."""
    number = scalar(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}={reprlib.repr(number)}: expected a number")
    # An integer may be finite and too large for a float.
    if not 0 <= number <= sys.float_info.max:
        raise ValueError(f"{name}={reprlib.repr(number)}: expected a finite number >= 0{note}")
    return float(number)


def choice_index(value: str, choices: Any) -> int:
    """Return the index of `value` in the Literal `choices`, which is its number in the compiled kernels."""
    return choices.__args__.index(value)


@dataclasses.dataclass(frozen=True)
class AffineSpec:
    """Map from raw network outputs to the mean and standard deviation of a token.

    Args:
        scale: "exp" (TarFlow): sigma = exp(a). "softplus" (STARFlow): sigma = softplus(a + 0.5413), which is 1 at
            a = 0. "unit": sigma = 1, the volume-preserving variant, whose only parameter is the mean.
        soft_clip: bound c > 0, which first maps every raw output r to c tanh(r / c); 0 turns this off.
    """

    scale: Scale = "exp"
    soft_clip: float = 0.0

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, Scale)
        soft_clip = check_not_negative("soft_clip", self.soft_clip, " (0 turns it off)")
        object.__setattr__(self, "soft_clip", soft_clip)

    def params_dim(self, token_dim: int) -> int:
        """Return the number of raw parameters of a token with `token_dim` values."""
        return token_dim if self.scale == "unit" else 2 * token_dim


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One flow block: a causal transformer over tokens and the affine transform whose parameters it computes.

    Args:
        token_dim: D, values per token.
        channels: C, width of the transformer.
        layers: number of layers.
        heads: H, number of query heads.
        head_dim: values per head.
        kv_heads: number of key and value heads; divides `heads`.
        mlp_dim: hidden width of the MLP.
        affine: map from raw outputs to mean and standard deviation.
        mlp: "gelu" or the gated "swiglu".
        norm: norm before attention and MLP.
        rotary: pairing of rotary positions, or "none".
        positions: rows of the learned position table, 0 for no table.
        text_dim: width of the text states that may precede the tokens, 0 for none.
        start: whether a learned token is the input at t = 0, so that token 0 is transformed too. Without it, the
            network's outputs shift right by one token, and token 0 passes unchanged.
        flip: whether the block's own token order is the reverse of the order of the data.
        bias: whether the linear layers inside the transformer layers have biases.
        qk_norm: whether queries and keys have an RMSNorm.
        post_norm: whether the outputs of attention and MLP have an RMSNorm.
        final_norm: whether there is an RMSNorm before the output projection.
        qk_layer_norm: whether queries and keys, each of all heads together, have a LayerNorm, as in Prose
            (arXiv 2508.18175).
        adaptive: whether the condition modulates every layer, as in Prose: h + gate * layer(LayerNorm(h) * scale +
            shift). The condition then has `cond_dim` channels: first those that are added to the hidden states, then
            the scales of all branches of all layers, their shifts, and their gates. Without a prefix alone.
        transition_dim: hidden width of a second branch after each layer of an adaptive block, an MLP gated by SiLU
            without biases; 0 for none.
    """

    token_dim: int
    channels: int
    layers: int
    heads: int
    head_dim: int
    kv_heads: int
    mlp_dim: int
    affine: AffineSpec = AffineSpec()
    mlp: Mlp = "gelu"
    norm: Norm = "layer_norm"
    rotary: Rotary = "none"
    positions: int = 0
    text_dim: int = 0
    start: bool = False
    flip: bool = False
    bias: bool = True
    qk_norm: bool = False
    post_norm: bool = False
    final_norm: bool = False
    qk_layer_norm: bool = False
    adaptive: bool = False
    transition_dim: int = 0
    # Set per instance. ClassVar keeps them out of the dataclass fields.
    _json: ClassVar[str]
    _weight_shapes: ClassVar[dict[str, tuple[int, ...]]]
    _own_order: ClassVar[BlockSpec]

    def __post_init__(self) -> None:
        check_choice("mlp", self.mlp, Mlp)
        check_choice("norm", self.norm, Norm)
        check_choice("rotary", self.rotary, Rotary)
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), {"int": int, "bool": bool}.get(str(field.type))
            if kind and type(value) is not kind:
                raise TypeError(f"{field.name}={value!r}: expected {kind.__name__}")
        for name in ("token_dim", "channels", "layers", "heads", "head_dim", "kv_heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.rotary != "none" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions need an even head size")
        if self.qk_norm and self.qk_layer_norm:
            raise ValueError("qk_norm, qk_layer_norm: queries and keys have one norm")
        if self.adaptive and self.text_dim:
            raise ValueError(f"text_dim={self.text_dim}: an adaptive block takes no text")
        if self.transition_dim < 0 or (self.transition_dim and not self.adaptive):
            raise ValueError(f"transition_dim={self.transition_dim}: expected 0, or a width in an adaptive block")
        # Computed here because torch.compile traces neither cached_property nor json.
        object.__setattr__(self, "_json", json.dumps(dataclasses.asdict(self)))
        object.__setattr__(self, "_weight_shapes", self._shapes())
        plain = self if not (self.flip or self.positions) else dataclasses.replace(self, flip=False, positions=0)
        object.__setattr__(self, "_own_order", plain)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by name, in the order of the block ops."""
        return self._weight_shapes

    @property
    def branches(self) -> int:
        """Branches per layer that the condition modulates."""
        return 0 if not self.adaptive else 2 if self.transition_dim else 1

    @property
    def cond_dim(self) -> int:
        """Channels of a condition."""
        return self.channels * (1 + 3 * self.branches * self.layers)

    @property
    def own_order(self) -> BlockSpec:
        """The block in its own order, without its position table."""
        return self._own_order

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        D, C = self.token_dim, self.channels
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, out: int, inp: int, bias: bool = True) -> None:
            shapes[f"{name}.weight"] = (out, inp)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        def norm(name: str) -> None:
            if self.norm != "none":
                shapes[f"{name}.weight"] = (C,)
            if self.norm == "layer_norm":
                shapes[f"{name}.bias"] = (C,)

        linear("proj_in", C, D)
        if self.positions:
            shapes["pos_embed"] = (self.positions, C)
        if self.start:
            shapes["start"] = (D,)
        if self.text_dim:
            linear("proj_text", C, self.text_dim)
        for i in range(self.layers):
            layer = f"layers.{i}"
            norm(f"{layer}.attn_norm")
            linear(f"{layer}.qkv", (self.heads + 2 * self.kv_heads) * self.head_dim, C, self.bias)
            if self.qk_norm:
                shapes[f"{layer}.q_norm.weight"] = shapes[f"{layer}.k_norm.weight"] = (self.head_dim,)
            if self.qk_layer_norm:
                for part, heads in (("q", self.heads), ("k", self.kv_heads)):
                    for kind in ("weight", "bias"):
                        shapes[f"{layer}.{part}_norm.{kind}"] = (heads * self.head_dim,)
            linear(f"{layer}.proj", C, self.heads * self.head_dim, self.bias)
            if self.post_norm:
                shapes[f"{layer}.attn_post_norm.weight"] = (C,)
            norm(f"{layer}.mlp_norm")
            if self.mlp == "swiglu":
                linear(f"{layer}.gate", self.mlp_dim, C, self.bias)
            linear(f"{layer}.up", self.mlp_dim, C, self.bias)
            linear(f"{layer}.down", C, self.mlp_dim, self.bias)
            if self.post_norm:
                shapes[f"{layer}.mlp_post_norm.weight"] = (C,)
            if self.transition_dim:
                linear(f"{layer}.transition.gate", self.transition_dim, C, False)
                linear(f"{layer}.transition.up", self.transition_dim, C, False)
                linear(f"{layer}.transition.down", C, self.transition_dim, False)
        if self.final_norm:
            shapes["final_norm.weight"] = (C,)
        linear("proj_out", self.affine.params_dim(D), C)
        return shapes

    def to_json(self) -> str:
        """Return the spec as JSON, which the registered block ops take as `spec`."""
        return self._json

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_json(spec_json: str) -> BlockSpec:
        """Return the spec from the JSON of `to_json`."""
        fields = json.loads(spec_json)
        return BlockSpec(**{**fields, "affine": AffineSpec(**fields["affine"])})
