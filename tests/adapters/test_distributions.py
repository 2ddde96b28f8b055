"""Flows as transforms and distributions of torch."""

import copy
import math
import pickle
import re

import pytest
import torch
from support import blocks
from support.token_flows import ROWS, VARIANTS, inputs, make
from torch.autograd.functional import jacobian
from torch.distributions import (
    AffineTransform,
    Categorical,
    ComposeTransform,
    MixtureSameFamily,
    TransformedDistribution,
)

from starflow import Flow
from starflow_kernels import Solver, block_forward, block_inverse
from starflow_kernels.adapters.distributions import BlockFlow, FlowTransform, distribution


class Counting:
    """Flow that counts the calls of both directions."""

    def __init__(self, flow):
        self.flow, self.passes, self.solves = flow, 0, 0
        self.event_shape, self.condition_ndims, self.prior = flow.event_shape, flow.condition_ndims, flow.prior

    def __call__(self, *arguments):
        self.passes += 1
        return self.flow(*arguments)

    def inverse(self, *arguments, **options):
        self.solves += 1
        return self.flow.inverse(*arguments, **options)


def close(found, expected, tol=1e-10):
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", VARIANTS)
def test_log_prob_is_that_of_the_flow(name):
    flow = make(name)
    x, condition = inputs(flow)
    found = flow.distribution(condition)
    assert found.event_shape == x.shape[1:] and found.batch_shape == (() if condition is None else (ROWS,))
    close(found.log_prob(x), flow.log_prob(x, condition))


@pytest.mark.parametrize("name", VARIANTS)
def test_samples_come_with_their_log_density(name):
    flow = make(name)
    found = flow.distribution(inputs(flow)[1])
    x, log_prob = found.rsample_and_log_prob((3,))
    assert x.shape == (3, *found.batch_shape, *found.event_shape) and x.requires_grad
    close(found.log_prob(x), log_prob)
    assert found.has_rsample and found.rsample((2,)).requires_grad and not found.sample((2,)).requires_grad


def test_samples_have_the_prior_of_a_volume_preserving_flow():
    flow = make("volume-preserving")
    z = flow.distribution().transforms[0].inv(flow.distribution().sample((4000,)))
    close(z.var(0), flow.prior_variance.flatten(), 0.1)


def test_directions_are_inverse_and_so_are_their_jacobians():
    flow = make("condition")
    x, condition = inputs(flow)
    transform = FlowTransform(flow, condition[0])
    z, logdet = transform.call_and_ladj(x[0])
    back, inverse_logdet = transform.inv.call_and_ladj(z)
    close(back, x[0])
    close(inverse_logdet, -logdet)
    close(transform.inv.log_abs_det_jacobian(z, x[0]), -logdet)
    forward, inverse = jacobian(transform, x[0]), jacobian(transform.inv, z.detach())
    close(forward @ inverse, torch.eye(10, dtype=torch.float64), 1e-8)
    close(forward.slogdet()[1], logdet)


def test_both_directions_have_gradients_of_condition_and_weights():
    flow = make("condition")
    x, condition = inputs(flow)
    condition.requires_grad_()

    def gradients(value):
        return torch.autograd.grad(value.sum(), [condition, *flow.blocks[0].parameters()])

    transform = FlowTransform(flow, condition)
    z = transform(x).detach()
    found = gradients(transform.inv.call_and_ladj(z)[1])
    assert all(gradient.abs().max() > 0 for gradient in found)
    close(found, gradients(-transform.call_and_ladj(transform.inv(z))[1]), 1e-8)


def test_batch_dimensions_broadcast():
    flow = make("condition-per-token")
    x, condition = inputs(flow, 6)
    x, condition = x[:2].unsqueeze(1), condition.unflatten(0, (2, 3))
    z, logdet = FlowTransform(flow, condition).call_and_ladj(x)
    assert z.shape == (2, 3, 5, 2) and logdet.shape == (2, 3)
    alone, one = FlowTransform(flow, condition[1, 2]).call_and_ladj(x[1, 0])
    close(z[1, 2], alone)
    close(logdet[1, 2], one)
    assert FlowTransform(flow, condition[:0]).inv(z[:0]).shape == (0, 3, 5, 2)


def test_transforms_of_torch_compose_with_a_flow():
    flow = make("condition")
    x, condition = inputs(flow)
    scaled = ComposeTransform([AffineTransform(0.5, 2.0, event_dim=1), FlowTransform(flow, condition)], cache_size=1)
    found = TransformedDistribution(flow.prior(), [scaled.inv])
    assert found.batch_shape == (ROWS,) and found.sample((2,)).shape == (2, *x.shape)
    close(found.log_prob(x), flow.log_prob(0.5 + 2 * x, condition) + 10 * math.log(2))


def test_a_mixture_over_classes():
    flow = make("class")
    x, _ = inputs(flow)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mixture = MixtureSameFamily(Categorical(weights), flow.distribution(torch.arange(3)))
    each = torch.stack([flow.log_prob(x, k) for k in range(3)], 1)
    close(mixture.log_prob(x), (each + weights.log()).logsumexp(1))


def test_expanded_distributions():
    found = make("class").distribution(torch.arange(3)).expand((2, 3))
    x, log_prob = found.rsample_and_log_prob((4,))
    assert found.batch_shape == (2, 3) and x.shape == (4, 2, 3, 5)
    close(found.log_prob(x), log_prob)


def test_a_cache_saves_the_density_pass_of_a_sample():
    flow = make("vector")
    for cache_size, passes in ((0, 1), (1, 0)):
        counted = Counting(flow)
        found = distribution(counted, cache_size=cache_size)
        x = found.rsample((3,))
        log_prob = found.log_prob(x)
        assert (counted.passes, counted.solves) == (passes, 1)
        close(log_prob, flow.log_prob(x))


def test_a_cache_does_not_lose_gradients():
    flow = make("vector")
    found = flow.distribution(cache_size=1)
    x = found.sample((3,))
    with torch.no_grad():
        found.log_prob(x)
    expected = torch.autograd.grad(flow.log_prob(x).sum(), flow.blocks[0].weights()["proj_in.weight"])
    close(torch.autograd.grad(found.log_prob(x).sum(), flow.blocks[0].weights()["proj_in.weight"]), expected)


def test_a_cache_keeps_gradients_of_samples_that_were_scored_without():
    flow = make("vector")
    weight = flow.blocks[0].weights()["proj_in.weight"]
    gradients = []
    for scored in (False, True):
        torch.manual_seed(0)
        found = flow.distribution(cache_size=1)
        x = found.rsample((3,))
        if scored:
            with torch.no_grad():
                found.log_prob(x)
        gradients.append(torch.autograd.grad(found.log_prob(x).sum(), weight)[0])
    close(*gradients)
    assert gradients[0].abs().max() > 0


def test_a_cleared_cache_sees_new_weights():
    flow = make("vector")
    transform = FlowTransform(flow, cache_size=1)
    x, _ = inputs(flow)
    transform(x)
    flow.shift.add_(1.0)
    transform.clear_cache()
    close(transform(x), flow(x).z)


def test_graphs():
    flow = make("condition")
    x, condition = inputs(flow)
    both = {"backend": "eager", "fullgraph": True}
    compiled = torch.compile(lambda x, c: FlowTransform(flow, c).call_and_ladj(x), **both)
    assert all(map(torch.equal, compiled(x, condition), FlowTransform(flow, condition).call_and_ladj(x)))
    with torch.no_grad():
        compiled = torch.compile(lambda z, c: FlowTransform(flow, c).inv.call_and_ladj(z), **both)
        assert all(map(torch.equal, compiled(x, condition), FlowTransform(flow, condition).inv.call_and_ladj(x)))


def test_copies():
    flow = make("class")
    transform = FlowTransform(flow, torch.tensor(1), cache_size=1)
    x, _ = inputs(flow)
    z = transform(x)
    assert transform.inv.inv is transform and transform.inv is transform.inv
    for again in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), transform.with_cache(0)):
        close(again(x), z)
        close(again.inv(z), x)


def test_images():
    flow = Flow.from_pretrained("digits")
    labels = torch.tensor([3, 1])
    found = flow.distribution(labels, solvers=Solver("jacobi"))
    x = found.sample((2,))
    assert x.shape == (2, 2, 1, 8, 8)
    close(found.log_prob(x)[1], flow.log_prob(x[1], labels), 1e-5)
    z, logdet = FlowTransform(flow, labels).call_and_ladj(x)
    back, inverse_logdet = FlowTransform(flow, labels).inv.call_and_ladj(z)
    close(back, x, 1e-4)
    close(inverse_logdet, -logdet, 1e-4)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_block(per_token):
    x, weights, spec, _ = blocks.block(blocks.BLOCKS["tarflow-unit"], B=4)
    cond = torch.randn(4, *x.shape[1:2] * per_token, spec.channels, dtype=x.dtype)
    flow = BlockFlow(weights, spec, blocks.T, per_token=per_token)
    z, logdet = FlowTransform(flow, cond).call_and_ladj(x)
    expected = block_forward(x, weights, spec, cond=cond)
    assert torch.equal(z, expected[0]) and torch.equal(logdet, expected[1])
    assert torch.equal(FlowTransform(flow, cond).inv(z), block_inverse(z, weights, spec, cond=cond).x)
    assert distribution(flow, cond).sample((3,)).shape == (3, *x.shape)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x, c: f.distribution(), TypeError, "condition: expected a tensor of shape (4, 3), got NoneType"),
        (lambda f, x, c: f.distribution([1.0]), TypeError, "condition: expected a tensor, got list"),
        (lambda f, x, c: f.distribution(c, c), TypeError, "condition: 2 of them, the flow takes 1"),
        (
            lambda f, x, c: f.distribution(c[0, 0]),
            ValueError,
            "condition: expected at least 1 dimensions, got shape ()",
        ),
        (lambda f, x, c: f.distribution(c[:, :2]), ValueError, "condition: expected shape (4, 3), got (4, 2)"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    flow = make("condition")
    x, condition = inputs(flow)
    with pytest.raises(error, match=re.escape(message)):
        call(flow, x, condition).log_prob(x)


def test_wrong_data_is_named():
    flow = make("vector")
    transform = FlowTransform(flow)
    with pytest.raises(ValueError, match=re.escape("x: expected shape (B, 5), got (4, 3)")):
        transform(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=re.escape("batch dimensions (4,), (3,) of values and conditions do not")):
        FlowTransform(make("class"), torch.arange(3))(torch.zeros(4, 5))
    with pytest.raises(ValueError, match=re.escape("expected values of shape (..., 5), got ()")):
        transform.inv(torch.tensor(1.0))
