"""Batches of no images: empty results, gradients of zero, and one sentence where none can be drawn."""

from __future__ import annotations

import pytest
import torch
from support.flows import make

from starflow import ConfigError, DataError, Guidance, save_grid
from starflow.models.certificate import certificate
from starflow_kernels import Solver

X = torch.empty(0, 3, 8, 8)
LABELS = [None, [], range(0), torch.empty(0, dtype=torch.int64)]
ROTARY = ["none", "half"]


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: type(labels).__name__)
def test_density_of_no_images(rotary, labels):
    flow = make(rotary=rotary)
    output = flow(X, labels)
    assert output.z.shape == X.shape and output.latents[0].shape == (0, 16, 12)
    assert flow.log_prob(X, labels).shape == output.logdet.shape == (0,)
    assert flow.denoise(X, labels).shape == X.shape


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.0)], ids=["plain", "guided"])
@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi"), Solver("jacobi", 2, neighbours=(1,))], ids=str)
def test_inverse_of_no_noise(rotary, guidance, solver):
    flow = make(rotary=rotary)
    z = flow.noise(0, [])
    found = flow.inverse(z, [], guidance=guidance, solvers=solver)
    x, reports = found.x, found.reports
    assert x.shape == z.shape == X.shape and x.dtype == torch.float32
    assert [report.sweeps.shape for report in reports] == [(0, 16)] * 2
    assert certificate(flow, x, z, LABELS[-1], guidance=guidance) == (0, 0)


def test_no_images_have_gradients_of_zero():
    """A process of a parallel training may have no images in a step."""
    flow = make().train()
    flow.loss(flow(X, []), latent_penalty=0.1).backward()
    assert not any(parameter.grad.any() for parameter in flow.parameters())


def test_no_images_leave_the_prior_as_it_is():
    flow = make(scale="unit")
    before = flow.prior_variance.clone()
    flow.update_prior(torch.empty(0, 16, 12))
    assert torch.equal(flow.prior_variance, before)


@pytest.mark.parametrize("labels", [[0], torch.empty(0), torch.empty(0, 1, dtype=torch.int64)], ids=str)
def test_labels_of_no_images_are_checked(labels):
    with pytest.raises(ValueError, match=r"^labels: expected integers of shape \(0,\)"):
        make().log_prob(X, labels)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_number_of_samples_is_an_integer_of_at_least_one(count):
    with pytest.raises(ValueError, match=f"^count={count}: expected an integer of at least 1"):
        make().sample(count)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_calibration_needs_images(batch_size):
    with pytest.raises(ConfigError, match=f"^batch_size={batch_size}: expected an integer of at least 1"):
        make().calibrate(batch_size)


@pytest.mark.parametrize(("count", "columns"), [(0, 10), (1, 0)])
def test_a_grid_needs_images_and_columns(count, columns, tmp_path):
    with pytest.raises(DataError, match=f"a grid of {count} images in {columns} columns"):
        save_grid(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), tmp_path / "grid.png", columns)
