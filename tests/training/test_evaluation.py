"""Evaluation against densities that are known."""

import math

import pytest
import torch

from starflow import DataError, Flow, FlowConfig, FlowInverse
from starflow.data.datasets import ImageSet
from starflow.evaluation.metrics import bayes_accuracy, likelihood, logdet_error, round_trips

CONFIG = {
    "image_size": 4, "image_channels": 1, "patch_size": 2, "channels": 16, "layers": (1,), "head_dim": 8, "start": True,
    "num_classes": 2, "levels": 4,
}  # fmt: skip


def constant_flow(mu: float, sigma: float) -> Flow:
    """x = +-mu + sigma z in every dimension; the sign is that of the class through the class embedding."""
    flow = Flow(FlowConfig(**CONFIG, norm="none")).double()
    for name, parameter in flow.named_parameters():
        parameter.data.zero_()
        if name.endswith("proj_out.bias"):
            parameter.data[:4] = math.log(sigma)
        if name.endswith("class_embed"):
            parameter.data[:, 0] = torch.tensor([-1.0, 1.0])
        if name.endswith("proj_out.weight"):
            parameter.data[4:, 0] = mu
    return flow


def images() -> ImageSet:
    """Class 0 is dark, class 1 bright."""
    pixels = torch.randint(0, 2, (40, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(40) % 2
    pixels[labels == 1] += 2
    return ImageSet(pixels.__getitem__, labels, 4, ("dark", "bright"), lambda index: ())


def test_defaults_of_torch_do_not_change_the_metrics(hostile):
    flow, data, even = constant_flow(0.5, 0.3), images(), torch.tensor([0.5, 0.5])
    expected = likelihood(flow, data, 2, 16), bayes_accuracy(flow, data, even, 2, 16), round_trips(flow, data, 8)
    hostile()
    assert likelihood(flow, data, 2, 16) == expected[0]
    assert bayes_accuracy(flow, data, even, 2, 16) == expected[1]
    assert round_trips(flow, data, 8) == expected[2]


def test_the_likelihood_of_a_gaussian_is_the_known_one():
    flow = constant_flow(mu=0.5, sigma=0.3)
    # Dequantized values are uniform on [-1, 0] or [0, 1]: mean square distance 1/12 from the mean at +-0.5.
    nats = 0.5 * math.log(2 * math.pi) + math.log(0.3) + 0.5 / 12 / 0.3**2
    found = likelihood(flow, images(), draws=200)
    assert found.bits_per_dim == pytest.approx(nats / math.log(2) + math.log2(4 / 2), abs=5e-3)
    assert found.images == 40 and 0 < found.standard_error < 0.1


def test_defaults_of_torch_do_not_change_the_likelihood(hostile):
    flow, data = constant_flow(mu=0.5, sigma=0.3), images()
    expected = likelihood(flow, data, draws=2)
    hostile()
    assert likelihood(flow, data, draws=2) == expected


def test_bayes_accuracy_follows_density_and_prior():
    data, even = images(), torch.tensor([0.5, 0.5])
    assert bayes_accuracy(constant_flow(0.5, 0.3), data, even, draws=2) == 1
    assert bayes_accuracy(constant_flow(-0.5, 0.3), data, even, draws=2) == 0
    assert bayes_accuracy(constant_flow(0.0, 0.3), data, torch.tensor([0.9, 0.1]), draws=2) == 0.5


def test_round_trips_count_what_is_off():
    flow = constant_flow(0.5, 0.3)
    trips = round_trips(flow, images())
    assert trips["inverse_of_forward"].max < 1e-12 and trips["forward_of_inverse"].above_1e3 == 0
    assert trips["inverse_of_forward"].values == 640
    inverse = flow.inverse
    flow.inverse = lambda z, labels: FlowInverse(inverse(z, labels).x + 5e-3, [])
    broken = round_trips(flow, images())["inverse_of_forward"]
    assert (broken.above_1e3, broken.above_1e2) == (640, 0) and broken.mean == pytest.approx(5e-3)


def test_logdet_error_is_found_in_inference_mode():
    flow = constant_flow(0.5, 0.3)
    with torch.inference_mode():
        assert logdet_error(flow, torch.rand(1, 4, 4, dtype=torch.float64) * 2 - 1, 0) < 1e-9


def test_logdet_error_sees_a_wrong_volume():
    flow = constant_flow(0.5, 0.3)
    x = torch.randn(1, 4, 4, dtype=torch.float64)
    assert logdet_error(flow, x, 1, chunk=7) < 1e-12
    forward = flow.forward
    flow.forward = lambda x, labels: forward(x, labels)._replace(logdet=forward(x, labels).logdet + 0.25)
    assert logdet_error(flow, x, 1) == pytest.approx(0.25)


def measures(flow: Flow, images: ImageSet, **options) -> dict:
    """Return each measure as a function."""
    prior = torch.full((2,), 0.5)
    return {
        "likelihood": lambda: likelihood(flow, images, **options),
        "bayes_accuracy": lambda: bayes_accuracy(flow, images, prior, **options),
    }


@pytest.mark.parametrize("name", ["likelihood", "bayes_accuracy"])
def test_no_images_are_refused(name):
    empty = ImageSet([].__getitem__, torch.empty(0, dtype=torch.int64), 4, ("dark", "bright"), lambda index: ())
    with pytest.raises(DataError, match="images: none to evaluate on"):
        measures(constant_flow(0.0, 1.0), empty)[name]()


@pytest.mark.parametrize("option", ["draws", "batch_size"])
@pytest.mark.parametrize("name", ["likelihood", "bayes_accuracy"])
def test_counts_of_a_measure_are_at_least_one(name, option):
    with pytest.raises(ValueError, match=f"{option}=0: expected at least 1"):
        measures(constant_flow(0.0, 1.0), images(), **{option: 0})[name]()


def test_a_round_trip_needs_images():
    with pytest.raises(ValueError, match="count=0: expected at least 1"):
        round_trips(constant_flow(0.0, 1.0), images(), count=0)
