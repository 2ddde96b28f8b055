"""Flows inside nflows."""

import pytest
import torch
from support.token_flows import ROWS, VARIANTS, inputs, make

pytest.importorskip("nflows")
from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow
from nflows.transforms import CompositeTransform, PointwiseAffineTransform

from starflow_kernels.adapters.nflows import TarFlowTransform

NAMES = sorted(VARIANTS.keys() - {"volume-preserving"})


@pytest.mark.parametrize("name", NAMES)
def test_log_prob_is_that_of_the_flow(name):
    flow = make(name)
    x, condition = inputs(flow)
    found = Flow(TarFlowTransform(flow), StandardNormal(x.shape[1:])).log_prob(x, condition)
    torch.testing.assert_close(found, flow.log_prob(x, condition))


@pytest.mark.parametrize("name", ["condition", "tokens"])
def test_samples_come_with_their_log_density(name):
    flow = make(name).float()
    x, condition = inputs(flow)
    context = None if condition is None else condition.float()
    density = Flow(TarFlowTransform(flow), StandardNormal(x.shape[1:]))
    drawn, log_prob = density.sample_and_log_prob(3, context)
    batch = (ROWS, 3) if condition is not None else (3,)
    assert drawn.shape == (*batch, *x.shape[1:])
    repeated = None if context is None else context.repeat_interleave(3, 0)
    expected = flow.log_prob(drawn.reshape(-1, *x.shape[1:]), repeated).reshape(batch)
    torch.testing.assert_close(log_prob, expected, rtol=1e-5, atol=1e-5)


def test_a_flow_among_transforms_of_nflows():
    flow = make("condition")
    x, condition = inputs(flow)
    both = CompositeTransform([PointwiseAffineTransform(0.5, 2.0), TarFlowTransform(flow)])
    z, logdet = both(x, condition)
    back, inverse_logdet = both.inverse(z, condition)
    torch.testing.assert_close(z, flow(0.5 + 2 * x, condition).z)
    torch.testing.assert_close((back, inverse_logdet), (x, -logdet))
