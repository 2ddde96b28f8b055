"""Flows inside Pyro."""

import pytest
import torch
from support.token_flows import ROWS, VARIANTS, inputs, make

pyro = pytest.importorskip("pyro")
from pyro.distributions import (  # noqa: E402
    ConditionalTransformedDistribution,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)

from starflow_kernels.adapters.distributions import FlowTransform  # noqa: E402
from starflow_kernels.adapters.pyro import ConditionalTarFlow  # noqa: E402

CONDITIONAL = [name for name in VARIANTS if "condition" in VARIANTS[name]]


def standard_normal(x):
    return Normal(torch.zeros_like(x[0]), 1.0).to_event(x.ndim - 1)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_log_prob_and_samples_are_those_of_the_flow(name):
    flow = make(name)
    x, condition = inputs(flow)
    found = ConditionalTransformedDistribution(standard_normal(x), [ConditionalTarFlow(flow)]).condition(condition)
    assert found.batch_shape == (ROWS,)
    torch.testing.assert_close(found.log_prob(x), flow.log_prob(x, condition))
    drawn = found.rsample((2,))
    torch.testing.assert_close(found.log_prob(drawn)[1], flow.log_prob(drawn[1], condition))


def test_the_inverse_module_maps_data_to_noise():
    flow = make("condition")
    x, condition = inputs(flow)
    module = ConditionalTarFlow(flow)
    torch.testing.assert_close(module.inv.condition(condition)(x), flow(x, condition).z)
    assert len(list(module.inv.parameters())) == len(list(flow.parameters()))


def test_variational_inference_by_a_flow():
    """A guide draws from the flow, and its weights are trained by Pyro."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    flow = make("vector").float()
    flow.shift.zero_(), flow.scale.fill_(1.0)
    mean = torch.arange(5.0)

    def model():
        pyro.sample("x", MultivariateNormal(mean, 0.25 * torch.eye(5)))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("x", TransformedDistribution(standard_normal(mean[None]), [FlowTransform(flow, cache_size=1).inv]))

    loss = pyro.infer.Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), loss)
    losses = [svi.step() for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]
