"""Work of a training step in floating-point operations.

A product with an m x n matrix takes 2 m n operations per token, causal attention of Q query channels 2 Q (S + 1) per
token and layer for S tokens. The backward pass takes twice the forward pass.
"""

from __future__ import annotations

from starflow_kernels import BlockSpec

from ..models.config import FlowConfig


def step_flops(config: FlowConfig, images: int) -> float:
    """Return the operations of a training step without recomputation: three forward passes.

    Args:
        config: settings of the flow.
        images: images per step.
    """
    return 3.0 * images * sum(sum(block_flops(config, i)) for i in range(len(config.layers)))


def rows_per_image(config: FlowConfig, block: int) -> int:
    """Return the states per image in a block: tokens, and text in front of them.

    Args:
        config: settings of the flow.
        block: index of the block.
    """
    return config.token_shape[0] + (config.text_len if config.block_spec(block).text_dim else 0)


def layer_values(spec: BlockSpec) -> tuple[int, int, int]:
    """Return the channels of queries, those of keys, and the number of values of a layer's matrices.

    Args:
        spec: the block.
    """
    q, kv, C, M = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.channels, spec.mlp_dim
    return q, kv, C * (q + 2 * kv) + q * C + (3 if spec.mlp == "swiglu" else 2) * C * M


def block_flops(config: FlowConfig, block: int) -> tuple[int, int]:
    """Return the operations of a forward pass of one image: of the layers, and of the rest.

    Args:
        config: settings of the flow.
        block: index of the block.
    """
    spec, rows, (tokens, token_dim) = config.block_spec(block), rows_per_image(config, block), config.token_shape
    q, _, matrices = layer_values(spec)
    layers = spec.layers * (2 * matrices * rows + 2 * q * rows * (rows + 1))
    ends = 2 * spec.channels * tokens * (token_dim + spec.affine.params_dim(token_dim))
    return layers, ends + 2 * spec.channels * spec.text_dim * (rows - tokens)
