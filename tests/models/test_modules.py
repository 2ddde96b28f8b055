"""A block computes with the modules that it has when it is called."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.flows import make
from torch import nn

from starflow import ConfigError, Flow
from starflow.models.block import FlowBlock
from starflow_kernels import Inverse


def results(flow: Flow) -> list[torch.Tensor]:
    """Return log-determinants of images, and images of noise."""
    x = torch.linspace(-1, 1, 2 * 3 * 64, dtype=torch.float32).view(2, 3, 8, 8)
    with torch.no_grad():
        return [flow(x, [0, 1]).logdet, flow.inverse(x, [0, 1]).x]


def assert_follows(flow: Flow) -> None:
    """Check that a changed flow gives the results of a new one with its weights, and not those of before."""
    other = make()
    other.load_state_dict(flow.state_dict())
    for found, expected, before in zip(results(flow), results(other), results(make())):
        assert torch.equal(found, expected) and not torch.equal(found, before)


def test_a_replaced_module_is_used():
    flow = make()
    results(flow)
    old = flow.blocks[0].proj_out
    flow.blocks[0].proj_out = nn.Linear(old.weight.shape[1], old.weight.shape[0])
    assert_follows(flow)


def test_a_shared_module_is_used():
    flow = make(layers=(2, 2))
    flow.blocks[1].layers = flow.blocks[0].layers
    other = make(layers=(2, 2))
    other.load_state_dict(flow.state_dict())
    for found, expected in zip(results(flow), results(other)):
        assert torch.equal(found, expected)


def test_a_module_with_a_weight_that_it_computes_is_used():
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        weight = property(lambda self: 2 * self.inner.weight)
        bias = property(lambda self: self.inner.bias)

    flow, other = make(), make()
    flow.blocks[0].proj_out = Doubled(flow.blocks[0].proj_out)
    other.blocks[0].proj_out.weight.data.mul_(2)
    for found, expected in zip(results(flow), results(other)):
        assert torch.equal(found, expected)


def test_a_copied_block_has_its_own_modules():
    block = make().blocks[0]
    other = copy.copy(block)
    other._modules = {**block._modules, "proj_out": copy.deepcopy(block.proj_out)}
    assert other.weights()["proj_out.weight"] is other.proj_out.weight
    assert other.weights()["proj_out.weight"] is not block.weights()["proj_out.weight"]


def test_a_block_with_an_inverse_of_its_own_is_called():
    class Shifted(FlowBlock):
        def inverse(self, *arguments, **options):
            found = super().inverse(*arguments, **options)
            return Inverse(found.x + 1, lambda: found.logdet, lambda: found.report)

    flow = make()
    before = results(flow)[1]
    flow.blocks[0].__class__ = Shifted
    assert torch.equal(results(flow)[1], before + 1)


def test_a_missing_module_is_an_error():
    flow = make()
    del flow.blocks[0].proj_out
    with pytest.raises(AttributeError, match="proj_out"):
        results(flow)


def test_a_class_out_of_range_is_not_a_number_where_values_cannot_be_read():
    flow = make()
    x = torch.zeros(3, 3, 8, 8, dtype=torch.float32)
    labels = torch.tensor([99, 1, -5])
    found = torch.vmap(lambda x, label: flow.log_prob(x[None], label[None])[0])(x, labels)
    assert found.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["noise_std", "factor"])
def test_denoising_needs_finite_numbers(name, value):
    with pytest.raises(ConfigError, match=f"^{name}={value}: expected a finite number"):
        make().denoise(torch.zeros(1, 3, 8, 8, dtype=torch.float32), [0], **{name: value})
