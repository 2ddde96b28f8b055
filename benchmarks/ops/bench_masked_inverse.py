"""masked_inverse of one transform of a masked flow with 64 features, bound by multiply-adds."""

import itertools

import pytest
import torch

from starflow_kernels import backends, masked_inverse
from starflow_kernels.masked_inverse.api import MaskedLayer, MaskedPlan, Univariate

D, WIDTH = 64, 64


def network(transform, dtype):
    order, degrees = torch.arange(D), torch.arange(WIDTH) % D
    ranks = [order + 1, degrees, degrees, order.repeat_interleave(transform.params)]
    layers = []
    for before, after in itertools.pairwise(ranks):
        mask = after[:, None] >= before
        weight = torch.randn(mask.shape) * mask / len(before) ** 0.5
        layers.append(
            MaskedLayer(weight.to(dtype), torch.zeros(len(after), dtype=dtype), "relu" if layers else "identity")
        )
    return layers, order


@pytest.mark.parametrize("kind", ["affine_soft_clip", "spline_soft_clip"])
@pytest.mark.parametrize("B", [1, 100, 1000])
@pytest.mark.parametrize("name", backends()["masked_inverse"])
def bench_masked_inverse(name, B, kind, timed):
    torch.manual_seed(0)
    transform = Univariate(kind)
    y, (layers, order) = torch.randn(B, D), network(transform, torch.float32)
    plan = MaskedPlan(layers, order, transform, True)
    wide = [layer._replace(weight=layer.weight.double(), offset=layer.offset.double()) for layer in layers]
    weights = sum(int((layer.weight != 0).sum()) for layer in layers)
    timed(
        lambda: masked_inverse(y, layers, order, transform, plan=plan, backend=name),
        masked_inverse(y.double(), wide, order, transform, backend="reference"),
        masked_inverse(y, layers, order, transform, backend="reference"),
        bytes=4 * (weights + 2 * y.numel()),
        flops=2 * B * weights,
        own=name != "reference",
    )
