"""Masked networks of other libraries as lists of layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starflow_kernels.accelerate.networks import activation_name, made_layers, pyro_layers, zuko_layers
from starflow_kernels.masked_inverse.reference import network as run

N, D, C = 5, 6, 3


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(N, size, generator=generator, dtype=torch.float64) for size in (D, C))


def spread(network):
    """The network with weights of some size, in float64."""
    torch.manual_seed(0)
    for p in network.double().parameters():
        p.data.add_(0.5 * torch.randn_like(p))
    return network.eval()


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"residual": True}, {"residual": True, "hidden_features": (16, 16, 20)}, {"activation": nn.Tanh}],
    ids=str,
)
def test_zuko(context, options):
    zuko = pytest.importorskip("zuko")
    x, c = inputs()
    transform = zuko.flows.MaskedAutoregressiveTransform(D, C if context else 0, **options)
    network = spread(transform.hyper)
    layers = zuko_layers(network, D, c if context else None)
    expected = network(torch.cat([x, c], 1) if context else x)
    torch.testing.assert_close(run(x, layers), expected, rtol=1e-12, atol=1e-12)


MADE = [
    {},
    {"num_blocks": 0},
    {"activation": torch.tanh},
    {"context_features": C},
    {"use_residual_blocks": False},
    {"use_residual_blocks": False, "num_blocks": 0},
    {"use_residual_blocks": False, "random_mask": True, "activation": F.elu},
]


@pytest.mark.parametrize("options", MADE)
@pytest.mark.parametrize("library", ["nflows.transforms.made", "normflows.nets.made"])
def test_made(library, options):
    made = pytest.importorskip(library).MADE
    x, c = inputs()
    network = spread(made(features=D, hidden_features=16, output_multiplier=2, **options))
    c = c if "context_features" in options else None
    torch.testing.assert_close(run(x, made_layers(network, c)), network(x, c), rtol=1e-12, atol=1e-12)


def test_feed_forward_blocks_of_nflows_under_a_context():
    made = pytest.importorskip("nflows.transforms.made").MADE
    x, c = inputs()
    network = spread(made(D, 16, context_features=C, output_multiplier=2, use_residual_blocks=False))
    torch.testing.assert_close(run(x, made_layers(network, c)), network(x, c), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [[2 * D], [2 * D, 3 * D]])
def test_pyro(hidden):
    networks = pytest.importorskip("pyro.nn")
    x, c = inputs()
    network = spread(networks.AutoRegressiveNN(D, hidden, nonlinearity=nn.ELU()))
    expected = torch.cat(network(x), 1)
    torch.testing.assert_close(run(x, pyro_layers(network, None)), expected, rtol=1e-12, atol=1e-12)
    network = spread(networks.ConditionalAutoRegressiveNN(D, C, hidden))
    expected = torch.cat(network(x, c), 1)
    torch.testing.assert_close(run(x, pyro_layers(network, c)), expected, rtol=1e-12, atol=1e-12)


def test_networks_with_other_layers_are_none():
    zuko, made = pytest.importorskip("zuko"), pytest.importorskip("nflows.transforms.made").MADE
    network = zuko.flows.MaskedAutoregressiveTransform(D, activation=nn.Mish).hyper
    assert zuko_layers(network, D, None) is None
    network[0] = nn.Linear(D, 64)
    assert zuko_layers(network, D, None) is None
    assert made_layers(made(D, 16, use_batch_norm=True), None) is None
    network = pytest.importorskip("pyro.nn").AutoRegressiveNN(D, [D], skip_connections=True)
    assert pyro_layers(network, None) is None


@pytest.mark.parametrize("function", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu])
def test_names_of_activations(function):
    assert activation_name(function) == "relu"


@pytest.mark.parametrize("function", [nn.ELU(2.0), nn.GELU("tanh"), nn.Mish(), torch.sin, lambda x: x])
def test_other_activations_have_no_name(function):
    assert activation_name(function) is None
