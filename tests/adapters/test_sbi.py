"""Flows as density estimators of sbi."""

import math
import pickle

import pytest
import torch

pytest.importorskip("sbi")
from sbi.diagnostics import check_sbc, run_sbc
from sbi.inference import NLE, NPE
from torch.distributions import MultivariateNormal

from starflow import TokenFlow
from starflow_kernels.adapters.sbi import tarflow_builder

NOISE = 0.5


def small(features, context):
    """Return a small flow on vectors."""
    size = {"channels": 16, "layers": (1, 1), "head_dim": 8}
    return TokenFlow.preset("vector", features=features, condition="vector", condition_dim=context, **size)


def simulate(count):
    """Draw parameters from a standard normal prior, and observations: the parameters with noise, ten times as large."""
    theta = torch.randn(count, 2)
    return theta, 10 * (theta + NOISE * torch.randn(count, 2))


def trained(inference, rounds=25):
    """Train a density estimator by sbi."""
    return inference.append_simulations(*simulate(2000)).train(
        max_num_epochs=rounds, training_batch_size=100, learning_rate=3e-3
    )


def prior():
    return MultivariateNormal(torch.zeros(2), torch.eye(2))


@pytest.fixture(scope="module")
def posterior():
    """Posterior of a linear Gaussian model, with an embedding network."""
    torch.manual_seed(0)
    builder = tarflow_builder(small, embedding_net=torch.nn.Linear(2, 3))
    inference = NPE(prior(), density_estimator=builder, show_progress_bars=False)
    return inference.build_posterior(trained(inference))


def test_a_posterior_has_the_exact_mean_and_standard_deviation(posterior):
    observed = torch.tensor([[5.0, -10.0]])
    drawn = posterior.sample((2000,), x=observed, show_progress_bars=False)
    shrink = 1 / (1 + NOISE**2)
    torch.testing.assert_close(drawn.mean(0), shrink * observed[0] / 10, atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.std(0), torch.full((2,), NOISE * math.sqrt(shrink)), atol=0.08, rtol=0)


def test_posteriors_are_pickled(posterior):
    theta, x = simulate(5)
    again = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(again.log_prob(theta, x=x[:1]), posterior.log_prob(theta, x=x[:1]))


def test_the_calibration_check_of_sbi_passes(posterior):
    theta, x = simulate(100)
    ranks, from_posterior = run_sbc(theta, x, posterior, num_posterior_samples=200, show_progress_bar=False)
    checks = check_sbc(ranks, theta, from_posterior, num_posterior_samples=200)
    assert (checks["ks_pvals"] > 0.01).all() and (checks["c2st_ranks"] < 0.65).all()


def test_likelihoods():
    builder = tarflow_builder(small, "likelihood")
    inference = NLE(prior(), density_estimator=builder, show_progress_bars=False)
    estimator = trained(inference)
    theta, x = simulate(500)
    exact = MultivariateNormal(10 * theta, (10 * NOISE) ** 2 * torch.eye(2)).log_prob(x)
    found = estimator.log_prob(x[None], theta)[0]
    assert (found - exact).mean().abs() < 0.1
    posterior = inference.build_posterior(
        estimator, mcmc_method="slice_np_vectorized", mcmc_parameters={"num_chains": 20, "warmup_steps": 20, "thin": 1}
    )
    drawn = posterior.sample((200,), x=torch.tensor([5.0, -10.0]), show_progress_bars=False)
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.4, -0.8]), atol=0.25, rtol=0)


@pytest.mark.parametrize("z_score", ["independent", "structured", "none"])
def test_z_scoring_is_part_of_the_density(z_score):
    theta, x = simulate(100)
    estimator = tarflow_builder(small, z_score_input=z_score, z_score_condition=z_score)(3 + 2 * theta, x)
    found, log_prob = estimator.sample_and_log_prob(torch.Size((500,)), x[:1])
    torch.testing.assert_close(estimator.log_prob(found, x[:1]), log_prob)
    # A new flow is the identity, so that samples have the standardized distribution.
    mean = 0.0 if z_score == "none" else (3 + 2 * theta).mean().item()
    assert abs(found.mean().item() - mean) < 0.3


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="target='ratio': expected one of 'posterior', 'likelihood'"):
        tarflow_builder(small, "ratio")
    with pytest.raises(ValueError, match=r"likelihood: expected vectors \(B, F\), got shape \(4, 2, 2\)"):
        tarflow_builder(small, "likelihood")(torch.zeros(4, 2), torch.zeros(4, 2, 2))
