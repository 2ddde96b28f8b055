"""Inverse of a masked autoregressive transform on the CPU, by the kernel in csrc/cpu/masked_inverse.cpp."""

from __future__ import annotations

import torch

from .._core.compiled import empty, refuse_tensors
from ..spec import choice_index
from .network import Kind
from .plan import MaskedPlan

DTYPES = (torch.float32, torch.float64)


def refuse(y: torch.Tensor, *others) -> str | None:
    """Return why the kernel cannot run, or None."""
    return refuse_tensors(DTYPES, y=y)


def masked_inverse(y, layers, order, transform, interleaved, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.masked_inverse."""
    plan = plan or MaskedPlan(layers, order, transform, interleaved)
    x, logdet = empty(*y.shape, dtype=y.dtype), empty(len(y), dtype=y.dtype)
    per_sample = []
    for layer in layers:
        per_sample += [layer.offset] if layer.offset.ndim == 2 else []
        per_sample += [] if layer.scale is None else [layer.scale]
    samples = torch.cat(per_sample, 1) if per_sample else y.new_empty(len(y), 0)
    tensors = y.contiguous(), plan.numbers, plan.weights, plan.offsets, samples
    kind = choice_index(transform.kind, Kind)
    torch.ops.starflow_native.masked_inverse(*tensors, kind, transform.constants, x, logdet)
    return x, logdet
