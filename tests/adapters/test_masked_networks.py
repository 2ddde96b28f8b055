"""masked_inverse gives the inverses of the masked autoregressive transforms of other libraries."""

from __future__ import annotations

import pytest
import torch

from starflow_kernels import masked_inverse
from starflow_kernels.masked_inverse.api import MaskedLayer, Univariate

F64 = torch.float64
D = 7


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def larger(module):
    """Return the module in float64 with parameters that make its transform far from the identity."""
    for parameter in module.to(F64).parameters():
        parameter.normal_(0, 0.5)
    return module


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def zuko_layers(network, c=None):
    layers, activation, width = [], "identity", D
    for module in network:
        if not hasattr(module, "mask"):
            activation = {"ReLU": "relu", "ELU": "elu", "SiLU": "silu"}[type(module).__name__]
            continue
        weight, offset = module.mask * module.weight, module.bias
        if not layers and c is not None:
            offset = offset + c @ weight[:, width:].T
        layers.append(MaskedLayer(weight[:, :width] if not layers else weight, offset, activation))
    return layers


@pytest.mark.parametrize("passes", [None, 2])
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("spline", [False, True])
def test_zuko(spline, context, passes):
    zuko = pytest.importorskip("zuko")
    kinds = {"passes": passes, "order": torch.randperm(D), "activation": torch.nn.ELU}
    if spline:
        kinds |= {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(8,), (8,), (7,)]}
    module = larger(zuko.flows.MaskedAutoregressiveTransform(D, context, **kinds))
    y, c = torch.randn(40, D, dtype=F64) * 3, torch.randn(40, context, dtype=F64) if context else None
    transform = Univariate("spline_soft_clip" if spline else "affine_soft_clip")
    found = masked_inverse(y, zuko_layers(module.hyper, c), module.order, transform)
    flow = module(c)
    x = flow.inv(y)
    assert_same(found, (x, -flow.log_abs_det_jacobian(x, y)))


def made_layers(made, context=None):
    """Return the layers of the MADE of nflows, which normflows shares."""

    def offset(linear, condition=None):
        return linear.bias if condition is None else linear.bias + condition

    first = made.initial_layer
    condition = None if context is None else torch.relu(made.context_layer(context))
    layers = [MaskedLayer(first.weight * first.mask, offset(first, condition))]
    for block in made.blocks:
        last = len(layers) - 1
        for linear, skip in zip(block.linear_layers, (None, last)):
            inner = block.context_layer(context) if context is not None and skip is None else None
            layers.append(MaskedLayer(linear.weight * linear.mask, offset(linear, inner), "relu", None, skip))
    final = made.final_layer
    return [*layers, MaskedLayer(final.weight * final.mask, final.bias)]


@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("spline", [False, True])
def test_nflows(spline, context):
    autoregressive = pytest.importorskip("nflows.transforms.autoregressive")
    if spline:
        kind, options = (
            "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
            {"tails": "linear", "tail_bound": 3.0},
        )
        transform = Univariate("spline_softmax", bins=10, bound=3.0)
    else:
        kind, options = "MaskedAffineAutoregressiveTransform", {}
        transform = Univariate("affine_softplus", scale_first=True)
    module = larger(getattr(autoregressive, kind)(D, 20, context_features=context, **options))
    y = torch.randn(40, D, dtype=F64)
    c = None if context is None else torch.randn(40, context, dtype=F64)
    layers = made_layers(module.autoregressive_net, c)
    assert_same(masked_inverse(y, layers, torch.arange(D), transform), tuple(module.inverse(y, c)))


@pytest.mark.parametrize("spline", [False, True])
def test_normflows(spline):
    flows = pytest.importorskip("normflows").flows
    if spline:
        module = larger(flows.AutoregressiveRationalQuadraticSpline(D, 2, 20, init_identity=False)).mprqat
        transform = Univariate("spline_softmax", bins=8, bound=3.0)
    else:
        module = larger(flows.MaskedAffineAutoregressive(D, 20))
        transform = Univariate("affine_sigmoid", scale_first=True)
    y = torch.randn(40, D, dtype=F64)
    layers = made_layers(module.autoregressive_net)
    x, logdet = masked_inverse(y, layers, torch.arange(D), transform)
    assert_same((x, logdet), module.inverse(y))


@pytest.mark.parametrize("stable", [False, True])
def test_pyro(stable):
    nn = pytest.importorskip("pyro.nn")
    from pyro.distributions.transforms import AffineAutoregressive

    network = larger(nn.AutoRegressiveNN(D, [20, 20], permutation=torch.randperm(D)))
    module = AffineAutoregressive(network, stable=stable)
    layers = [
        MaskedLayer(linear.weight * linear.mask, linear.bias, "relu" if i else "identity")
        for i, linear in enumerate(network.layers)
    ]
    order = torch.argsort(network.permutation)
    y = torch.randn(40, D, dtype=F64)
    transform = Univariate("affine_convex" if stable else "affine_clamp")
    x, logdet = masked_inverse(y, layers, order, transform, interleaved=False)
    again = module._call(x)
    assert_same((again, logdet), (y, -module._cached_log_scale.sum(-1)))
