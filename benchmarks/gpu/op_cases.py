"""Inputs, peers, bytes and operations of each op with a Triton backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import starflow_kernels
from starflow_kernels import AffineSpec
from starflow_kernels._core.numerics import apply_rotary

from .runner import Skip

SPEC = AffineSpec("softplus", 4.0)


class Case(NamedTuple):
    """An op on one set of inputs.

    Args:
        op: name of the op.
        shape: sizes of the case.
        tensors: inputs, all of which have gradients.
        batched: number of leading inputs with a batch dimension.
        run: run(tensors, backend) returns the outputs.
        bytes: moved by the forward pass.
        flops: operations of the forward pass.
        backward_flops: operations of the backward pass, in units of the forward pass.
        peers: name -> function of the tensors.
        backward_bytes: bytes of the backward pass, in units of the forward pass.
    """

    op: str
    shape: tuple[int, ...]
    tensors: list[torch.Tensor]
    batched: int
    run: Callable
    bytes: int
    flops: int = 0
    backward_flops: float = 2.0
    peers: Mapping[str, Callable] = MappingProxyType({})
    backward_bytes: float = 2.0


def randn(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return tensors of normal numbers."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def _bytes(tensors: list[torch.Tensor], *outputs: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in (*tensors, *outputs))


def affine_flow(shape, dtype, device) -> Case:
    """Return the case of a shape B, T, D."""
    B, T, D = shape
    tensors = randn(dtype, device, shape, (B, T, 2 * D))

    def run(tensors, backend):
        return starflow_kernels.affine_flow(*tensors, SPEC, shift=True, backend=backend)

    return Case("affine_flow", shape, tensors, 2, run, _bytes(tensors, tensors[0]))


def flow_head(shape, dtype, device) -> Case:
    """Return the case of a shape B, T, D, C."""
    B, T, D, C = shape
    tensors = randn(dtype, device, (B, T, D), (B, T, C), (2 * D, C), (2 * D,), (C,))
    tensors[2] *= 0.5 * C**-0.5

    def run(tensors, backend):
        return starflow_kernels.flow_head(*tensors, SPEC, shift=True, backend=backend)

    peers = {"composed": lambda tensors: run(tensors, "composed")}
    return Case("flow_head", shape, tensors, 2, run, _bytes(tensors, tensors[0]), 4 * B * T * D * C, peers=peers)


def angles(T: int, d: int, dtype: torch.dtype, device: str) -> dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]]:
    """Return cos and sin (T, d / 2) per dtype of the op's tensors: float32 values, also as float64."""
    pair = torch.arange(d // 2, dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * 10000.0 ** (-2 * pair / d)
    cos, sin = angle.cos().to(device, torch.float32), angle.sin().to(device, torch.float32)
    return {dtype: (cos, sin), torch.float32: (cos, sin), torch.float64: (cos.double(), sin.double())}


def causal_attention(shape, dtype, device) -> Case:
    """Return the case of a shape B, T, H, H_kv, d."""
    B, T, H, groups, d = shape
    tensors = randn(dtype, device, (B, T, H, d), (B, T, groups, d), (B, T, groups, d))

    rotary = angles(T, d, dtype, device)

    def run(tensors, backend):
        cos, sin = rotary[tensors[0].dtype]
        options = {"cos": cos, "sin": sin, "rotary": "interleaved", "backend": backend}
        return (starflow_kernels.causal_attention(*tensors, **options),)

    cos, sin = rotary[dtype]

    def sdpa(tensors):
        q, k, v = (
            t.transpose(1, 2) for t in (*(apply_rotary(t, cos, sin, "interleaved") for t in tensors[:2]), tensors[2])
        )
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2),)

    def by_cudnn(tensors):
        if not tensors[0].is_cuda:
            raise Skip("cuDNN runs on CUDA")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(tensors)

    peers = {"torch's choice after rotary": sdpa, "cuDNN after rotary": by_cudnn}
    moved, operations = _bytes(tensors, tensors[0]), 2 * B * H * T * T * d
    return Case("causal_attention", shape, tensors, 3, run, moved, operations, 2.5, peers)


def attention_flow(shape, dtype, device) -> Case:
    """Return the case of a shape B, T, H, H_kv, d, D."""
    B, T, H, groups, d, D = shape
    tensors = randn(
        dtype, device, (B, T, D), (B, T, H, d), (B, T, groups, d), (B, T, groups, d), (2 * D, H * d), (2 * D,)
    )
    tensors[4] *= 0.5 * (H * d) ** -0.5

    rotary = angles(T, d, dtype, device)

    def run(tensors, backend):
        cos, sin = rotary[tensors[1].dtype]
        options = {"cos": cos, "sin": sin, "rotary": "interleaved", "shift": True, "backend": backend}
        return starflow_kernels.attention_flow(*tensors, SPEC, **options)

    operations = 2 * B * H * T * T * d + 4 * B * T * D * H * d
    return Case("attention_flow", shape, tensors, 4, run, _bytes(tensors, tensors[0]), operations, 2.5)


def residual_norm(shape, dtype, device) -> Case:
    """Return the case of a shape B, T, C."""
    tensors = randn(dtype, device, shape, shape, shape[2:], shape[2:])

    def run(tensors, backend):
        return starflow_kernels.residual_norm(*tensors, backend=backend)

    def separate(tensors):
        x, update, weight, bias = tensors
        return x + update, F.layer_norm(x + update, x.shape[2:], weight, bias)

    peers = {"torch's layer_norm": separate, "compiled torch's layer_norm": torch.compile(separate)}
    return Case("residual_norm", shape, tensors, 2, run, 2 * _bytes(tensors[:2]), peers=peers, backward_bytes=1.0)


def bias_gelu(shape, dtype, device) -> Case:
    """Return the case of a shape B, T, C."""
    tensors = randn(dtype, device, shape, shape[2:])

    def run(tensors, backend):
        return (starflow_kernels.bias_gelu(*tensors, backend=backend),)

    def separate(tensors):
        return (F.gelu(tensors[0] + tensors[1]),)

    peers = {"torch's gelu": separate, "compiled torch's gelu": torch.compile(separate)}
    return Case("bias_gelu", shape, tensors, 1, run, 2 * _bytes(tensors[:1]), peers=peers, backward_bytes=1.5)


MAKE = {
    "residual_norm": residual_norm,
    "bias_gelu": bias_gelu,
    "affine_flow": affine_flow,
    "flow_head": flow_head,
    "causal_attention": causal_attention,
    "attention_flow": attention_flow,
}
# Shapes of the checks.
CHECKED = {
    "residual_norm": [(3, 130, 65), (4, 256, 768)],
    "bias_gelu": [(3, 130, 65), (4, 256, 768)],
    "affine_flow": [(3, 130, 17), (4, 256, 48)],
    "flow_head": [(3, 130, 3, 65), (2, 256, 48, 256), (2, 65, 200, 96)],
    "causal_attention": [(2, 130, 4, 2, 64), (1, 257, 2, 2, 128)],
    "attention_flow": [(2, 130, 4, 2, 64, 12), (1, 257, 2, 2, 128, 48)],
}
# Shapes of the times.
TIMED = {
    "residual_norm": [(16, 256, 768), (64, 1024, 1024), (16, 1024, 3072)],
    "bias_gelu": [(16, 256, 3072), (64, 1024, 4096)],
    "affine_flow": [(16, 256, 12), (256, 1024, 48)],
    "flow_head": [(16, 256, 12, 768), (64, 1024, 48, 1024), (16, 1024, 64, 3072)],
    "causal_attention": [(16, 256, 12, 12, 64), (8, 1024, 16, 16, 64), (2, 4096, 24, 24, 128)],
    "attention_flow": [(16, 256, 12, 12, 64, 12), (8, 1024, 16, 16, 64, 64)],
}
# Shapes of both in a dry run.
DRY = {
    "residual_norm": [(2, 5, 20)],
    "bias_gelu": [(2, 5, 20)],
    "affine_flow": [(2, 5, 3)],
    "flow_head": [(2, 5, 3, 20)],
    "causal_attention": [(2, 5, 2, 1, 16)],
    "attention_flow": [(2, 5, 2, 1, 16, 3)],
}
