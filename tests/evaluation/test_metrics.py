"""Evaluation against densities that are known."""

import math

import pytest
import torch

from starflow import DataError, Flow, FlowConfig, FlowInverse
from starflow.data.datasets import ImageSet
from starflow.evaluation import metrics
from starflow.evaluation.metrics import Scores, logdet_error, round_trips, score

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


EVEN = torch.tensor([0.5, 0.5])


def test_defaults_of_torch_do_not_change_the_metrics(hostile):
    flow, data = constant_flow(0.5, 0.3), images()
    expected, trips = score(flow, data, 2, 16, prior=EVEN), round_trips(flow, data, 8)
    hostile()
    found = score(flow, data, 2, 16, prior=EVEN)
    assert torch.equal(found.log_probs, expected.log_probs) and torch.equal(found.correct, expected.correct)
    assert found.uniform() == expected.uniform() and found.importance_weighted() == expected.importance_weighted()
    assert round_trips(flow, data, 8) == trips


def test_the_likelihood_of_a_gaussian_is_the_known_one():
    flow = constant_flow(mu=0.5, sigma=0.3)
    # Dequantized values are uniform on [-1, 0] or [0, 1]: mean square distance 1/12 from the mean at +-0.5.
    nats = 0.5 * math.log(2 * math.pi) + math.log(0.3) + 0.5 / 12 / 0.3**2
    found = score(flow, images(), draws=200).uniform()
    assert found.bits_per_dim == pytest.approx(nats / math.log(2) + math.log2(4 / 2), abs=5e-3)
    assert found.images == 40 and found.draws == 200 and 0 < found.standard_error < 0.1


def single_pixels() -> tuple[Flow, ImageSet]:
    """Return a flow on images of one pixel, and images of both levels."""
    settings = {**CONFIG, "image_size": 1, "patch_size": 1, "levels": 2, "num_classes": 0}
    flow = Flow(FlowConfig(**settings, norm="none")).double()
    for name, parameter in flow.named_parameters():
        parameter.data.zero_()
        if name.endswith("proj_out.bias"):
            parameter.data[:1] = math.log(0.4)
    pixels = torch.arange(40).remainder(2).to(torch.uint8).view(40, 1, 1, 1)
    return flow, ImageSet(pixels.__getitem__, torch.zeros(40, dtype=torch.int64), 2, ("all",), lambda index: ())


def test_the_importance_weighted_bound_tends_to_the_probability_of_the_level():
    flow, data = single_pixels()
    # Either level has the probability that a Gaussian of standard deviation 0.4 has on [-1, 0] or [0, 1].
    exact = -math.log2(math.erf(1 / 0.4 / math.sqrt(2)) / 2)
    bounds = [score(flow, data, draws).importance_weighted().bits_per_dim for draws in (1, 8, 4000)]
    assert bounds[0] > bounds[1] > bounds[2] and bounds[2] == pytest.approx(exact, abs=5e-3)
    assert bounds[0] - exact > 0.1
    single = score(flow, data, 1)
    assert single.importance_weighted().bits_per_dim == pytest.approx(single.uniform().bits_per_dim, abs=1e-12)


def test_bayes_accuracy_follows_density_and_prior():
    data = images()
    assert score(constant_flow(0.5, 0.3), data, draws=2, prior=EVEN).accuracy() == 1
    assert score(constant_flow(-0.5, 0.3), data, draws=2, prior=EVEN).accuracy() == 0
    assert score(constant_flow(0.0, 0.3), data, draws=2, prior=torch.tensor([0.9, 0.1])).accuracy() == 0.5


def test_the_classes_of_the_prior_do_not_change_the_likelihood():
    flow, data = constant_flow(0.5, 0.3), images()
    assert torch.equal(score(flow, data, 3, prior=EVEN).log_probs, score(flow, data, 3).log_probs)


def test_accuracy_without_a_prior_is_refused():
    with pytest.raises(ValueError, match="prior: the images were scored without one"):
        score(constant_flow(0.5, 0.3), images(), 1).accuracy()


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_noise_of_an_image_does_not_depend_on_its_batch(batch_size):
    flow, data = constant_flow(0.5, 0.3), images()
    expected = score(flow, data, 2, batch_size=16).log_probs
    assert torch.allclose(score(flow, data, 2, batch_size=batch_size).log_probs, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_processes_score_each_image_once_and_all_get_the_bits_of_one(count, monkeypatch):
    flow, data = constant_flow(0.5, 0.3), images()
    expected, parts = score(flow, data, 2, 6, prior=EVEN), []

    class Stopped(Exception):
        pass

    class Simulated:
        """Process that leaves its part to the next one; the last one gets the parts of all."""

        def __init__(self):
            self.count, self.rank = count, len(parts)

        def gather(self, value):
            parts.append(value)
            if len(parts) < count:
                raise Stopped
            return parts

    monkeypatch.setattr(metrics, "Processes", Simulated)
    for _ in range(count - 1):
        with pytest.raises(Stopped):
            score(flow, data, 2, 6, prior=EVEN)
    found = score(flow, data, 2, 6, prior=EVEN)
    assert torch.equal(found.log_probs, expected.log_probs) and torch.equal(found.correct, expected.correct)
    assert sum(len(batch[0]) for part in parts for batch in part) == 40


def test_one_image_has_no_standard_error():
    found = Scores(torch.zeros(1, 3, dtype=torch.float64), None, 4, 256).uniform()
    assert found.images == 1 and found.standard_error is None


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


def test_no_images_are_refused():
    empty = ImageSet([].__getitem__, torch.empty(0, dtype=torch.int64), 4, ("dark", "bright"), lambda index: ())
    with pytest.raises(DataError, match="images: none to evaluate on"):
        score(constant_flow(0.0, 1.0), empty)


@pytest.mark.parametrize("option", ["draws", "batch_size"])
def test_counts_are_at_least_one(option):
    with pytest.raises(ValueError, match=f"{option}=0: expected at least 1"):
        score(constant_flow(0.0, 1.0), images(), **{option: 0})


def test_a_round_trip_needs_images():
    with pytest.raises(ValueError, match="count=0: expected at least 1"):
        round_trips(constant_flow(0.0, 1.0), images(), count=0)
