"""Sampling problems of benchmarks.gpu: blocks to check, blocks to time, and their kinds of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from starflow_kernels import AffineSpec, BlockSpec

from ..floor import Work, block_work
from .op_cases import angles


class Weights(NamedTuple):
    """Kind of weights.

    Args:
        dtype: of the given weights, the network and the cache.
        bytes: per value in memory.
        options: further arguments of `block_inverse`.
        exact: the error contract holds; otherwise the error is only reported.
    """

    dtype: torch.dtype
    bytes: float
    options: Mapping = MappingProxyType({})
    exact: bool = True


WEIGHTS = {
    "float32": Weights(torch.float32, 4),
    "bfloat16": Weights(torch.bfloat16, 2),
    "float16": Weights(torch.float16, 2),
    "int8": Weights(torch.bfloat16, 1, MappingProxyType({"quantize": "int8"}), exact=False),
    "fp8": Weights(torch.bfloat16, 1, MappingProxyType({"quantize": "fp8"}), exact=False),
    "int8, float32": Weights(torch.float32, 1, MappingProxyType({"quantize": "int8"}), exact=False),
}


class Block(NamedTuple):
    """A block, and its arguments of `block_inverse` besides tokens, weights and spec."""

    weights: dict[str, torch.Tensor]
    spec: BlockSpec
    context: dict

    def to(self, dtype: torch.dtype) -> Block:
        """Return the same values in another dtype; rotary angles stay float32 or wider."""
        wide = torch.promote_types(dtype, torch.float32)
        kinds = {"cos": wide, "sin": wide, "cond": dtype, "prefix": dtype}
        context = {n: v.to(kinds[n]) if n in kinds and v is not None else v for n, v in self.context.items()}
        return Block({n: w.to(dtype) for n, w in self.weights.items()}, self.spec, context)

    @property
    def prefix(self) -> int:
        """Tokens of text before the first token."""
        text = self.context.get("prefix")
        return 0 if text is None else text.shape[1]

    @property
    def copies(self) -> int:
        """Rows per sample: 2 under guidance, else 1."""
        return 1 if self.context.get("guidance") is None else 2

    def first(self, tokens: int) -> Block:
        """Return the block for its first tokens."""
        weights, spec, context = dict(self.weights), self.spec, dict(self.context)
        if spec.positions:
            weights["pos_embed"] = weights["pos_embed"][:tokens].clone()
            spec = dataclasses.replace(spec, positions=tokens)
        for name in ("cos", "sin"):
            if context.get(name) is not None:
                context[name] = context[name][: self.prefix + tokens].contiguous()
        return Block(weights, spec, context)


class Problem(NamedTuple):
    """Blocks, which are sampled from the last to the first, and noise (B, T, D)."""

    blocks: list[Block]
    z: torch.Tensor

    def solve(self, inverse: Callable[[Block, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return the data by a function that inverts one block."""
        x = self.z
        for block in reversed(self.blocks):
            x = inverse(block, x)
        return x

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem with weights of another dtype."""
        return Problem([block.to(dtype) for block in self.blocks], self.z.to(torch.promote_types(dtype, torch.float32)))

    def last(self) -> Problem:
        """Return the problem of the block that is sampled first."""
        return Problem(self.blocks[-1:], self.z)

    def short(self, tokens: int) -> Problem:
        """Return the problem of the first tokens of the block that is sampled first."""
        return Problem([self.blocks[-1].first(tokens)], self.z[:, :tokens].contiguous())

    def work(self, weights: Weights, resident: bool = False) -> Work:
        """Return the work that the floor counts; resident: see benchmarks.floor."""
        B, T, _ = self.z.shape
        widths = {"weight_bytes": weights.bytes, "cache_bytes": weights.dtype.itemsize, "resident": resident}
        works = [
            block_work(block.spec, B, T, copies=block.copies, prefix=block.prefix, **widths) for block in self.blocks
        ]
        return sum(works[1:], works[0])


def make(
    specs: list[BlockSpec], samples: int, tokens: int, dtype, device: str, text: int = 0, seed: int = 0, **options
):
    """Return a problem of blocks with random weights that neither grow nor shrink tokens much.

    Args:
        specs: of the blocks.
        samples: number of rows.
        tokens: per sample.
        dtype: of the weights.
        device: of all tensors.
        text: tokens of text, for blocks that read text.
        seed: of the weights and the noise.
        options: arguments of `block_inverse`, for every block with text, or for all blocks if there is no text.
            cond=True adds a condition to every token.
    """
    draw, blocks = torch.Generator(device).manual_seed(seed), []
    like = {"generator": draw, "device": device, "dtype": dtype}
    options = dict(options)
    conditional = options.pop("cond", False)
    for spec in specs:
        spec = dataclasses.replace(spec, positions=tokens if spec.positions else 0)
        weights = {}
        for name, shape in spec.weight_shapes.items():
            scale = shape[1] ** -0.5 if len(shape) == 2 and name != "pos_embed" else 0.2
            weights[name] = torch.randn(shape, **like).mul_(scale * (0.1 if name == "proj_out.weight" else 1))
            if name.endswith("norm.weight") and spec.norm == "layer_norm":
                weights[name] += 1
        length = text if spec.text_dim else 0
        context = dict(options) if length or not text else {}
        rows = samples * (1 if context.get("guidance") is None else 2)
        if conditional:
            context["cond"] = torch.randn(rows, spec.channels, **like)
        if length:
            context["prefix"] = torch.randn(rows, length, spec.text_dim, **like)
        if spec.rotary != "none":
            context["cos"], context["sin"] = angles(length + tokens, spec.head_dim, dtype, device)[dtype]
        blocks.append(Block(weights, spec, context))
    return Problem(blocks, torch.randn(samples, tokens, specs[0].token_dim, generator=draw, device=device))


class Case(NamedTuple):
    """A problem whose sampling is timed.

    Args:
        name: in the table.
        specs: of the blocks.
        samples: number of rows.
        tokens: per sample.
        options: see `make`.
        weights: kinds of weights.
        released: time the released loop too.
        resident: see benchmarks.floor.
        seconds: limit for each kind of weights.
    """

    name: str
    specs: list[BlockSpec]
    samples: int
    tokens: int
    options: Mapping = MappingProxyType({})
    weights: tuple[str, ...] = ("bfloat16",)
    released: bool = True
    resident: bool = False
    seconds: float = 15

    def problem(self, dtype: torch.dtype, device: str) -> Problem:
        """Return the problem with random weights."""
        return make(self.specs, self.samples, self.tokens, dtype, device, **self.options)


def tarflow(D: int, channels: int, layers: int, blocks: int = 1, head_dim: int = 64) -> list[BlockSpec]:
    """Return the specs of TarFlow blocks; every second one is flipped."""
    heads = channels // head_dim
    sizes = dict(channels=channels, layers=layers, heads=heads, head_dim=head_dim, kv_heads=heads)
    spec = BlockSpec(token_dim=D, mlp_dim=4 * channels, positions=1, **sizes)
    return [dataclasses.replace(spec, flip=i % 2 == 1) for i in range(blocks)]


def starflow(channels: int, layers: tuple[int, ...], text_dim: int, head_dim: int = 64) -> list[BlockSpec]:
    """Return the specs of STARFlow blocks with tokens from left to right; the last one reads text."""
    heads, last = channels // head_dim, len(layers) - 1
    spec = BlockSpec(
        token_dim=4, channels=channels, layers=1, heads=heads, head_dim=head_dim, kv_heads=heads, mlp_dim=4 * channels,
        affine=AffineSpec("softplus", 4.0), rotary="interleaved", start=True, final_norm=True,
    )  # fmt: skip
    flips = [i % 2 == 0 if i < last else len(layers) % 2 == 1 for i in range(len(layers))]
    return [
        dataclasses.replace(spec, layers=n, flip=flip, text_dim=text_dim if i == last else 0)
        for i, (n, flip) in enumerate(zip(layers, flips))
    ]


GUIDED = {"guidance": 2.0, "rule": "starflow"}
CASES = [
    Case(
        "STARFlow 3B, batch 1, guidance, 6 blocks",
        starflow(3072, (2, 2, 2, 2, 2, 24), 2048),
        1,
        1024,
        {"text": 128, **GUIDED},
        released=False,
        seconds=60,
    ),
    Case("AFHQ-256, batch 1, 8 blocks", tarflow(192, 768, 8, 8), 1, 1024, seconds=35),
    Case("AFHQ-256, batch 16, 8 blocks", tarflow(192, 768, 8, 8), 16, 1024, seconds=35),
    Case("AFHQ-256, batch 256, 1 of 8 blocks", tarflow(192, 768, 8), 256, 1024, seconds=35),
    Case(
        "AFHQ-256, batch 1, 8 blocks",
        tarflow(192, 768, 8, 8),
        1,
        1024,
        weights=("int8", "fp8"),
        released=False,
        seconds=25,
    ),
    *(
        Case(f"C {C}, {layers} layers, T {T}, 10 000 samples", tarflow(4, C, layers), 10_000, T, resident=True)
        for C in (64, 128)
        for layers in (2, 4)
        for T in (16, 256)
    ),
]
DRY_CASES = [
    Case("STARFlow, dry", starflow(16, (1, 1), 5, 8), 1, 3, {"text": 2, **GUIDED}, ("float32",), released=False),
    Case("TarFlow, dry", tarflow(3, 64, 1), 2, 3, weights=("float32",), resident=True),
]


class Checked(NamedTuple):
    """A block to check.

    Args:
        spec: of the block.
        samples: number of rows.
        tokens: per sample.
        options: see `make`.
        weights: kinds of weights.
        thorough: run all checks, else only the first few.
    """

    spec: BlockSpec
    samples: int
    tokens: int
    options: Mapping
    weights: tuple[str, ...]
    thorough: bool = True


def checked(dry: bool) -> dict[str, Checked]:
    """Return blocks of odd sizes, one per kind of block and guidance: each costs a compilation of its kernels."""
    sizes = dict(token_dim=3, channels=20, layers=1, heads=2, head_dim=10, kv_heads=2, mlp_dim=24)
    if not dry:
        sizes |= dict(token_dim=7, channels=40, layers=2, head_dim=20, mlp_dim=90)
    T, narrow = (3, "float16") if dry else (21, "bfloat16")
    every = ("float32",) if dry else ("float32", "bfloat16", "float16")
    star = dict(affine=AffineSpec("softplus", 4.0), rotary="interleaved", start=True, final_norm=True)
    norms = dict(qk_norm=True, post_norm=True, norm="rms_norm", mlp="swiglu", bias=False, kv_heads=1, rotary="half")
    plain = BlockSpec(**sizes, positions=1, flip=True)
    blocks = {
        "TarFlow, flipped, condition": Checked(plain, 3, T, {"cond": True}, every),
        "TarFlow, condition, guidance": Checked(plain, 2, T, {"cond": True, "guidance": 1.5}, (narrow,), not dry),
        "STARFlow, text, guidance": Checked(
            BlockSpec(**sizes, **star, text_dim=6), 2, T, {"text": 2 if dry else 5, **GUIDED}, (narrow,), not dry
        ),
        "all norms, SwiGLU, grouped heads": Checked(
            BlockSpec(**{**sizes, **star, **norms}, flip=True), 2, T, {}, ("float32",), thorough=False
        ),
    }
    one_byte = ("int8, float32",) if dry else ("int8", "fp8")
    blocks["TarFlow, weights of one byte"] = Checked(plain, 2, T, {"cond": True}, one_byte, thorough=False)
    if not dry:
        blocks["STARFlow, 300 tokens"] = Checked(BlockSpec(**sizes, **star), 2, 300, {}, (narrow,), thorough=False)
    return blocks
