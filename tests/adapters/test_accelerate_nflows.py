"""Flows of nflows made fast by one call, and those of normflows, which are copies."""

import copy
import io

import pytest
import torch
from torch.nn.functional import elu

from starflow_kernels import accelerate, restore
from starflow_kernels._core.compiled import native_unavailable

D, C = 6, 3


def of_nflows(name, **options):
    def make():
        autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
        return getattr(autoregressive, f"Masked{name}AutoregressiveTransform")(
            features=D, hidden_features=16, **options
        )

    return make


def of_normflows(name, **options):
    def make():
        flows = pytest.importorskip("normflows").flows
        if name == "MaskedAffineAutoregressive":
            return flows.MaskedAffineAutoregressive(D, 16, **options)
        return getattr(flows, name)(D, 2, 16, init_identity=False, **options).mprqat

    return make


SPLINE = "PiecewiseRationalQuadratic"
TRANSFORMS = {
    "nflows, affine": of_nflows("Affine", context_features=C),
    "nflows, affine, feed-forward": of_nflows("Affine", use_residual_blocks=False, random_mask=True, activation=elu),
    "nflows, affine, batch norm": of_nflows("Affine", context_features=C, use_batch_norm=True),
    "nflows, spline": of_nflows(SPLINE, context_features=C, tails="linear", tail_bound=3.0),
    "nflows, spline on [0, 1]": of_nflows(SPLINE, context_features=C),
    "nflows, quadratic spline": of_nflows("PiecewiseQuadratic", tails="linear"),
    "nflows, linear spline": of_nflows("PiecewiseLinear", num_bins=5),
    "normflows, affine": of_normflows("MaskedAffineAutoregressive", context_features=C),
    "normflows, feed-forward": of_normflows("MaskedAffineAutoregressive", use_residual_blocks=False),
    "normflows, spline": of_normflows(
        "AutoregressiveRationalQuadraticSpline", num_context_channels=C, permute_mask=True
    ),
    "normflows, circular": of_normflows("CircularAutoregressiveRationalQuadraticSpline", ind_circ=[1, 2]),
}


def pair(name, dtype=torch.float64):
    """A transform with weights of some size, its accelerated copy, values and a context."""
    torch.manual_seed(0)
    transform = TRANSFORMS[name]().to(dtype).eval()
    for p in transform.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    fast = copy.deepcopy(transform)
    (part,) = accelerate(fast).parts
    assert part.method, part.reason
    y, context = torch.rand(5, D, dtype=dtype), torch.randn(5, C, dtype=dtype)
    takes_context = hasattr(transform.autoregressive_net, "context_layer")
    return transform, fast, y, context if takes_context else None


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_inverse_is_that_of_the_library(name):
    transform, fast, y, context = pair(name)
    torch.testing.assert_close(fast.inverse(y, context), transform.inverse(y, context), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_float32(name):
    transform, fast, y, context = pair(name, torch.float32)
    torch.testing.assert_close(fast.inverse(y, context), transform.inverse(y, context), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_are_those_of_the_library(name):
    results = []
    transform, fast, y, context = pair(name)
    for each in (transform, fast):
        inputs = [t.clone().requires_grad_() for t in (y, context) if t is not None]
        x, logdet = each.inverse(*inputs)
        loss = (x * torch.arange(1, D + 1)).sin().sum() + (logdet * torch.arange(5)).sum()
        used = torch.autograd.grad(loss, [*inputs, *each.parameters()], allow_unused=True)
        results.append([g for g in used if g is not None])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_fewer_passes_than_values():
    made = pytest.importorskip("nflows.transforms.autoregressive").MaskedAffineAutoregressiveTransform
    passes = []
    torch.manual_seed(0)
    transform = made(32, 16)
    transform.autoregressive_net.register_forward_hook(lambda *_: passes.append(1))
    accelerate(transform)
    passes.clear()
    transform.inverse(torch.randn(10, 32))
    assert 2 <= len(passes) < 16


def results(of_flow, flow, transforms):
    """Results of a function of a whole flow, before and after it is accelerated, with the same random numbers."""
    torch.manual_seed(1)
    expected = of_flow(flow)
    assert len(accelerate(flow).accelerated) == transforms
    torch.manual_seed(1)
    return of_flow(flow), expected


def test_samples_of_a_flow_of_nflows():
    pytest.importorskip("nflows")
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import CompositeTransform, RandomPermutation

    # The noise of nflows is float32.
    parts = [pair(name, torch.float32)[0] for name in ("nflows, affine", "nflows, spline")]
    flow = Flow(CompositeTransform([parts[0], RandomPermutation(D), parts[1]]), StandardNormal([D]))
    context = torch.randn(2, C)
    found, expected = results(lambda flow: flow.sample_and_log_prob(4, context), flow, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_density_of_a_flow_of_normflows():
    normflows = pytest.importorskip("normflows")
    parts = [pair(name)[0] for name in ("normflows, feed-forward", "normflows, circular")]
    flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D, trainable=False).double(), parts)
    x = torch.rand(4, D, dtype=torch.float64)
    torch.testing.assert_close(*results(lambda flow: flow.log_prob(x), flow, 2), rtol=1e-8, atol=1e-8)


def test_dropout_in_training_takes_the_original_loop():
    transform = of_nflows("Affine", dropout_probability=0.5)().train()
    y, results = torch.randn(4, D), []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(transform.inverse(y))
        accelerate(transform)
    assert all(map(torch.equal, *results))


def test_copies_files_and_restore():
    transform, fast, y, context = pair("nflows, affine")
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    expected = fast.inverse(y, context)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert type(other) is type(fast)
        torch.testing.assert_close(other.inverse(y, context), expected)
    assert list(fast.state_dict()) == list(transform.state_dict())
    restore(fast)
    assert type(fast) is type(transform)


def test_a_network_of_ones_own_is_left_alone():
    transform = of_nflows("Affine")()
    transform.autoregressive_net = torch.nn.Linear(D, 2 * D)
    (part,) = accelerate(transform).parts
    assert part.method is None and "MADE" in part.reason


def test_an_inverse_of_ones_own_is_left_alone():
    made = pytest.importorskip("nflows.transforms.autoregressive").MaskedAffineAutoregressiveTransform

    class Other(made):
        def inverse(self, inputs, context=None):
            return inputs, context

    (part,) = accelerate(Other(D, 16)).parts
    assert part.method is None and "inverse" in part.reason


@pytest.mark.skipif(native_unavailable() is not None, reason="the kernels are not compiled")
@pytest.mark.parametrize("name", ["nflows, affine", "nflows, spline", "normflows, affine", "normflows, spline"])
def test_known_networks_are_solved_by_columns(name):
    (part,) = accelerate(TRANSFORMS[name]()).parts
    assert part.method == "one pass by columns"


@pytest.mark.parametrize("shape", [(C,), (1, C)])
def test_one_context_of_all_rows(shape):
    """nflows adds such a context to each row."""
    transform, fast, y, _ = pair("nflows, affine")
    for seed in range(2):
        c = torch.randn(shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(fast.inverse(y, c), transform.inverse(y, c), rtol=1e-8, atol=1e-8)


def test_weights_that_are_no_parameters():
    transform, fast, y, c = pair("nflows, affine")
    for seed in range(2):
        for each in (transform, fast):
            layer = each.autoregressive_net.initial_layer
            weight = (layer.weight.detach() * (seed + 1)).requires_grad_()
            layer._parameters.pop("weight", None)
            layer.weight = weight
        torch.testing.assert_close(fast.inverse(y, c), transform.inverse(y, c), rtol=1e-8, atol=1e-8)
    assert fast.requires_grad_(False).inverse(y, c)[0].requires_grad


class Half(torch.nn.Module):
    """Layer that is part of no library."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)
    mask = property(lambda self: self.layer.mask)

    def forward(self, x):
        return 0.5 * self.layer(x)


def test_layers_that_are_exchanged_later():
    transform, fast, y, c = pair("nflows, affine")
    for each in (transform, fast):
        layers = each.autoregressive_net.blocks[0].linear_layers
        layers[0] = Half(layers[0])
    torch.testing.assert_close(fast.inverse(y, c), transform.inverse(y, c), rtol=1e-8, atol=1e-8)


def test_subclasses_that_other_tools_make():
    transform, fast, y, c = pair("nflows, affine")
    fast.__class__ = type("Sub", (type(fast),), {})
    torch.testing.assert_close(fast.inverse(y, c), transform.inverse(y, c), rtol=1e-8, atol=1e-8)
    restore(fast)
    assert type(fast) is type(transform)


def test_modules_of_pyro_are_made_of_accelerated_ones():
    transform, fast, y, c = pair("nflows, affine")
    pytest.importorskip("pyro.nn.module").to_pyro_module_(fast)
    torch.testing.assert_close(fast.inverse(y, c), transform.inverse(y, c), rtol=1e-8, atol=1e-8)


def test_shapes_on_the_meta_device():
    _, fast, y, c = pair("nflows, affine")
    assert fast.to("meta").inverse(y.to("meta"), c.to("meta"))[0].shape == y.shape
