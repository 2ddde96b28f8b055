"""Flows inside zuko."""

import copy
import io

import pytest
import torch
from support.token_flows import ROWS, VARIANTS, inputs, make
from torch.distributions import AffineTransform

zuko = pytest.importorskip("zuko")
from starflow_kernels.adapters.zuko import LazyFlowTransform, LazyPrior, TarFlow  # noqa: E402


@pytest.mark.parametrize("name", VARIANTS)
def test_log_prob_and_samples_are_those_of_the_flow(name):
    flow = make(name)
    x, condition = inputs(flow)
    found = TarFlow(flow)(condition)
    assert found.batch_shape == (() if condition is None else (ROWS,)) and found.event_shape == flow.event_shape
    torch.testing.assert_close(found.log_prob(x), flow.log_prob(x, condition))
    torch.manual_seed(0)
    drawn, log_prob = found.rsample_and_log_prob((3,))
    torch.manual_seed(0)
    expected, nats = flow.distribution(condition).rsample_and_log_prob((3,))
    torch.testing.assert_close((drawn, log_prob), (expected, nats))


def test_a_flow_among_transforms_of_zuko():
    flow = make("condition")
    x, condition = inputs(flow)
    shift, scale = torch.randn(10, dtype=torch.float64), torch.rand(10, dtype=torch.float64) + 0.5
    standardize = zuko.lazy.UnconditionalTransform(AffineTransform, shift, scale, buffer=True)
    found = zuko.lazy.Flow([standardize, LazyFlowTransform(flow)], LazyPrior(flow))(condition)
    assert found.event_shape == (10,) and found.batch_shape == (ROWS,)
    expected = flow.log_prob(x * scale + shift, condition) + scale.log().sum()
    torch.testing.assert_close(found.log_prob(x), expected, rtol=1e-5, atol=1e-5)
    drawn, log_prob = found.rsample_and_log_prob((2,))
    torch.testing.assert_close(found.log_prob(drawn), log_prob)


def test_a_lazy_transform_has_a_lazy_inverse():
    flow = make("condition")
    x, condition = inputs(flow)
    lazy = LazyFlowTransform(flow)
    torch.testing.assert_close(lazy.inv(condition)(lazy(condition)(x)), x)


def test_training_by_zuko():
    flow = TarFlow(make("condition"))
    x, condition = inputs(flow.transform.flow)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(-flow(condition).log_prob(x).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1


def test_weights_are_saved_once_and_flows_are_copied():
    flow = TarFlow(make("vector"))
    x, _ = inputs(flow.transform.flow)
    assert len(flow.state_dict()) == len(flow.transform.flow.state_dict())
    again = copy.deepcopy(flow)
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    expected = flow().log_prob(x)
    flow.transform.flow.shift.add_(1.0)
    for other in (again, torch.load(file, weights_only=False)):
        assert torch.equal(other().log_prob(x), expected)
