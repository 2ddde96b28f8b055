"""Flows inside normflows."""

import pytest
import torch
from support.token_flows import ROWS, inputs, make

normflows = pytest.importorskip("normflows")
from starflow_kernels.adapters.normflows import TarFlow  # noqa: E402


def close(found, expected):
    # normflows adds log-determinants in float32.
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vector", "tokens"])
def test_log_prob_and_samples_are_those_of_the_flow(name):
    flow = make(name).float()
    x = inputs(flow)[0].float()
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(tuple(x.shape[1:])), [TarFlow(flow)])
    close(model.log_prob(x), flow.log_prob(x))
    drawn, log_prob = model.sample(6)
    close(flow.log_prob(drawn), log_prob)
    torch.testing.assert_close(model.forward_kld(x), -flow.log_prob(x).mean())


@pytest.mark.parametrize("name", ["condition", "class"])
def test_conditions(name):
    flow = make(name).float()
    x, condition = inputs(flow)
    x, condition = x.float(), condition if name == "class" else condition.float()
    base = normflows.distributions.DiagGaussian(tuple(x.shape[1:]))
    model = normflows.ConditionalNormalizingFlow(base, [TarFlow(flow)])
    close(model.log_prob(x, condition), flow.log_prob(x, condition))
    drawn, log_prob = model.sample(ROWS, condition)
    close(flow.log_prob(drawn, condition), log_prob)


def test_reverse_divergence_trains_the_flow():
    flow = make("vector").float()
    target = normflows.distributions.DiagGaussian(5, trainable=False)
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(5, trainable=False), [TarFlow(flow)], target)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        torch.manual_seed(0)
        losses.append(model.reverse_kld(64))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert 0 < losses[-1] < 0.8 * losses[0]
