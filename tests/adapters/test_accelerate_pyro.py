"""Transforms of Pyro made fast by one call."""

import copy

import pytest
import torch

from starflow_kernels import accelerate, restore
from starflow_kernels._core.compiled import native_unavailable

pytest.importorskip("pyro")
from pyro.distributions import Normal, TransformedDistribution
from pyro.distributions.conditional import ConditionalTransformedDistribution
from pyro.distributions.transforms import (
    AffineAutoregressive,
    ComposeTransformModule,
    ConditionalAffineAutoregressive,
)
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN

D, C = 6, 3
OPTIONS = [
    pytest.param({}, id="affine"),
    pytest.param({"stable": True}, id="stable"),
    pytest.param({"log_scale_max_clip": 0.1, "log_scale_min_clip": -0.1}, id="clipped"),
]


@pytest.fixture(autouse=True)
def float64():
    # Pyro's inverse makes zeros of the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def pair(options):
    """A transform and its accelerated copy."""
    torch.manual_seed(0)
    transform = AffineAutoregressive(AutoRegressiveNN(D, [2 * D], skip_connections=True), **options)
    for p in transform.parameters():
        p.data.mul_(3)
    fast = copy.deepcopy(transform)
    (part,) = accelerate(fast).parts
    assert part.method, part.reason
    return transform, fast


def conditional_pair(options):
    torch.manual_seed(0)
    transform = ConditionalAffineAutoregressive(ConditionalAutoRegressiveNN(D, C, [2 * D]), **options)
    fast = copy.deepcopy(transform)
    (part,) = accelerate(fast).parts
    assert part.method, part.reason
    return transform, fast


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(D,), (4, D), (2, 3, D)])
def test_the_inverse_is_that_of_pyro(options, shape):
    y = torch.randn(shape)
    found, expected = ((t.inv(y), t.inv.log_abs_det_jacobian(y, t.inv(y))) for t in pair(options))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_transform_that_has_just_been_trained():
    """Pyro's transform remembers its last result, with its graph, which torch cannot copy."""
    transform = AffineAutoregressive(AutoRegressiveNN(D, [2 * D]))
    x = torch.randn(4, D)
    transform.log_abs_det_jacobian(x, transform(x)).sum().backward()
    (part,) = accelerate(transform).parts
    assert part.method, part.reason


def gradients(transform, parameters, inputs):
    y = inputs[0]
    x = transform.inv(y)
    ladj = transform.log_abs_det_jacobian(x, y)
    loss = (x * torch.arange(1, D + 1)).sin().sum() + ladj.square().sum()
    return torch.autograd.grad(loss, [*inputs, *parameters])


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_pyro(options):
    y = torch.randn(4, D).requires_grad_()
    found, expected = (gradients(t, t.parameters(), [y]) for t in pair(options))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_under_a_condition(options):
    y, context = torch.randn(4, D).requires_grad_(), torch.randn(4, C).requires_grad_()
    pairs = conditional_pair(options)
    found, expected = (gradients(t.condition(context), t.parameters(), [y, context]) for t in pairs)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_gradients_under_a_condition(options):
    results = []
    for transform in conditional_pair(options):
        y, context = torch.ones(4, D).requires_grad_(), torch.ones(4, C).requires_grad_()
        x = transform.condition(context).inv(y)
        (first,) = torch.autograd.grad(x.square().sum(), y, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [y, context]))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_one_condition_for_all_values():
    context, y = torch.randn(C), torch.randn(2, 4, D)
    found, expected = (t.condition(context).inv(y) for t in conditional_pair({}))
    torch.testing.assert_close(found, expected)


def test_log_density_under_a_condition():
    context, x = torch.randn(4, C), torch.randn(4, D)
    base = Normal(torch.zeros(D), torch.ones(D))
    found, expected = (
        ConditionalTransformedDistribution(base, [t]).condition(context).log_prob(x) for t in conditional_pair({})
    )
    torch.testing.assert_close(found, expected)


def test_a_composed_density_after_a_gradient_was_taken():
    torch.manual_seed(0)
    composed = ComposeTransformModule([AffineAutoregressive(AutoRegressiveNN(D, [2 * D])) for _ in range(3)])
    density = TransformedDistribution(Normal(torch.zeros(D), torch.ones(D)), [composed])
    x = torch.randn(4, D)
    expected = density.log_prob(x)
    density.log_prob(torch.randn(4, D)).sum().backward()
    assert len(accelerate(composed).accelerated) == 3
    torch.testing.assert_close(density.log_prob(x), expected)


def test_the_last_pair_is_remembered():
    _, fast = pair({})
    x = torch.randn(4, D)
    assert fast.inv(fast(x)) is x


def test_values_beyond_all_bounds_go_to_the_loop_of_pyro():
    transform, fast = pair({"log_scale_min_clip": -200.0})
    for each in (transform, fast):
        each.arn.layers[-1].weight.data.mul_(1e3)
    y = 1e3 * torch.randn(4, D)
    torch.testing.assert_close(fast.inv(y), transform.inv(y), equal_nan=True)


def test_a_network_of_ones_own_is_left_alone():
    model = AffineAutoregressive(torch.nn.Linear(D, D))
    (part,) = accelerate(model).parts
    assert part.method is None and "network" in part.reason


def test_restore():
    transform, fast = pair({})
    restore(fast)
    assert type(fast) is type(transform)


def test_known_networks_are_solved_by_columns():
    (part,) = accelerate(AffineAutoregressive(AutoRegressiveNN(D, [2 * D]))).parts
    assert part.method == "one pass by columns" or native_unavailable()
