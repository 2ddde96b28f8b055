"""Weights of a block as the Triton kernels read them.

Most are read where the caller keeps them, so every write to them counts, also in a captured graph. Those that the
kernels need in another order or in one byte per value are made anew by each call, which costs about one read of them:
less than to find out whether they have changed, for which the host would wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ...spec import BlockSpec
from ..packing import WeightCache
from ..quantize import KINDS, fake_quantize_matrix, is_quantized
from .sessions import current_stream, lend

# Values per iteration over a row, and warps per row.
BLOCK = 1024
WARPS = 4
# Added to and subtracted from a float32, it rounds to the nearest integer, ties to even.
ROUNDER = tl.constexpr(1.5 * 2**23)


@triton.jit
def encode_fp8(x):
    """Return the bits of float8_e4m3fn nearest to x, ties to even, for |x| <= 448. No target needs an instruction."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # A multiple of 2^-9 below 2^-6, else 3 bits of mantissa and the exponent with a bias of 7.
    subnormal = (tl.abs(x) * 512 + ROUNDER - ROUNDER).to(tl.int32)
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(tl.abs(x) < 2**-6, subnormal, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def block_quantize_kernel(
    weight, values, scales, K, LARGEST: tl.constexpr, FACTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Quantize one row of a weight (N, K) per program, with the bits of `quantize.quantize_matrix`.

    values (N, K) are int8, or uint8 with the bits of float8_e4m3fn; scales (N,) are multiplied by FACTOR.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(weight + row * K + k, k < K, 0).to(tl.float32)  # (BLOCK,)
        largest = tl.maximum(largest, tl.abs(w))
    scale = tl.div_rn(tl.max(largest, 0), LARGEST)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales + row, scale * FACTOR)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        w = tl.load(weight + row * K + k, k < K, 0).to(tl.float32)  # (BLOCK,)
        x = tl.div_rn(w, scale)
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
        x = encode_fp8(x) if values.dtype.element_ty == tl.uint8 else (x + ROUNDER - ROUNDER).to(tl.int8)
        tl.store(values + row * K + k, x, k < K)


def quantize(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one-byte values (N, K) and scales (N,) of a contiguous weight (N, K), as the kernels read them."""
    (N, K), (_, largest) = weight.shape, KINDS[kind]
    values = torch.empty(N, K, dtype=torch.uint8 if kind == "fp8" else torch.int8, device=weight.device)
    scales = torch.empty(N, dtype=torch.float32, device=weight.device)
    # The kernels decode the bits of fp8 to 1/256 of the values.
    factor = 256.0 if kind == "fp8" else 1.0
    block_quantize_kernel[(N,)](weight, values, scales, K, largest, factor, BLOCK, num_warps=WARPS)
    return values, scales


class Model:
    """Tensors made from the weights of a block, at addresses that stay the same.

    The values of a rotary pair lie half a head apart, and the position table is in the block's own order. The scales of
    a one-byte weight are under "<name>.scale".

    Args:
        spec: sizes and options of the block.
        weights: tensors in the order of spec.weight_shapes.
        quantize: rounding of the weights, "none", "int8" or "fp8".
        one_byte: whether the kernels read rounded weights in one byte per value.
    """

    def __init__(self, spec: BlockSpec, weights: list[torch.Tensor], quantize: str, one_byte: bool):
        self.spec, self.dtype, self.quantize, self.one_byte = spec, weights[0].dtype, quantize, one_byte
        self.made, self.device = {}, weights[0].device
        self.stream = current_stream(self.device)
        order = torch.arange(spec.head_dim, dtype=torch.int64, device=weights[0].device)
        if spec.rotary == "interleaved":
            order = order.view(-1, 2).T.flatten()
        rotated = spec.heads + spec.kv_heads
        rows = torch.arange((rotated + spec.kv_heads) * spec.head_dim, dtype=torch.int64, device=order.device)
        rows = rows.view(-1, spec.head_dim)
        self.order, self.rows = order, torch.cat([rows[:rotated, order], rows[rotated:]]).flatten()

    def read(self, weights: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return name -> tensor for the kernels, from the weights as they are now."""
        w = {name: weight.detach() for name, weight in zip(self.spec.weight_shapes, weights)}
        lend([self.order, self.rows, *self.made.values()], self.stream, self.device)
        # Buffers made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            for name, value in self._make(w):
                if name in self.made:
                    self.made[name].copy_(value)
                else:
                    self.made[name] = value
        return w | self.made

    def _make(self, w: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the tensors that differ from the weight of that name."""
        spec = self.spec
        for name, shape in spec.weight_shapes.items():
            value = w[name].contiguous()
            if spec.rotary == "interleaved" and name.endswith((".qkv.weight", ".qkv.bias")):
                value = value[self.rows]
            elif name == "pos_embed" and spec.flip:
                value = value.flip(0)
            if self.quantize != "none" and is_quantized(name, shape):
                if self.one_byte:
                    value, scales = quantize(value, self.quantize)
                    yield f"{name}.scale", scales
                else:
                    value = fake_quantize_matrix(value, self.quantize)
            if value is not w[name]:
                yield name, value
        if spec.qk_norm:
            for i in range(spec.layers):
                norms = [w[f"layers.{i}.{name}_norm.weight"][self.order] for name in "qk"]
                yield f"layers.{i}.head_norms", torch.stack(norms)


def _addresses(spec_json: str, weights: list[torch.Tensor]) -> tuple:
    """Return where the weights lie; captured graphs read them there."""
    strides = [*map(torch.Tensor.stride, weights)]
    return weights[0].dtype, [*map(torch.Tensor.data_ptr, weights)], strides


models = WeightCache(Model, _addresses)
