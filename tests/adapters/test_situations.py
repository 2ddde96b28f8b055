"""Situations of public threads in which flow libraries failed their users."""

import pytest
import torch
from support.token_flows import inputs, make
from torch.distributions import TransformedDistribution

from starflow import TokenFlow
from starflow.errors import InverseError
from starflow_kernels.adapters.distributions import FlowTransform

ROWS, FEATURES, CONTEXT = 5, 4, 2


@pytest.fixture
def flow():
    """Flow on vectors, whose layers all act."""
    torch.manual_seed(0)
    size = {"channels": 16, "layers": (1, 1), "head_dim": 8}
    flow = TokenFlow.preset("vector", features=FEATURES, condition="vector", condition_dim=CONTEXT, **size)
    for weight in flow.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return flow


@pytest.fixture
def context():
    return torch.randn(ROWS, CONTEXT, generator=torch.Generator().manual_seed(1))


def noise(scale=1.0):
    return scale * torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(2))


def test_sampling_follows_the_device_of_the_weights(flow, context):
    """apple/ml-starflow #5 and PR #4: devices were written into the code."""
    with torch.device("meta"):
        x, log_prob = flow.distribution(context).rsample_and_log_prob()
    assert x.device.type == log_prob.device.type == "cpu" and x.isfinite().all()


def test_values_on_two_devices_are_named(flow, context):
    """sbi-dev/sbi PR #331, bayesiains/nflows PR #20: tensors of two devices met while sampling."""
    with pytest.raises(ValueError, match=r"condition: on meta, expected cpu"):
        flow.distribution(context.to("meta")).sample()
    with pytest.raises(ValueError, match=r"condition: on cpu, expected meta"):
        FlowTransform(flow, context)(noise().to("meta"))


def test_a_condition_of_each_token_acts_in_both_directions():
    """alan-turing-institute/autocast PR #434: a port of TarFlow was written for a condition per token."""
    flow = make("condition-per-token")
    z, condition = inputs(flow)
    changed = condition.clone()
    changed[:, 2] += 1
    densities = [flow.distribution(each).log_prob(z) for each in (condition, changed)]
    assert not torch.equal(*densities)
    assert not torch.equal(flow.inverse(z, condition).x, flow.inverse(z, changed).x)


def test_a_sample_takes_one_solve_and_no_density_pass(flow, context):
    """alan-turing-institute/autocast PR #446: a flow of D values sampled in D passes of the whole network."""
    calls = []
    flow.register_forward_hook(lambda *_: calls.append("density"))
    x, log_prob = flow.distribution(context).rsample_and_log_prob((3,))
    assert calls == []
    torch.testing.assert_close(log_prob, flow.distribution(context).log_prob(x), rtol=1e-4, atol=1e-4)


def test_a_condition_that_is_not_finite_ends_sampling_with_its_name(flow):
    """sbi-dev/sbi #1569: rejection sampling never ended when the network gave NaN."""
    with pytest.raises(InverseError, match=r"cond: \d+ of \d+ values are not finite"):
        flow.distribution(torch.full((CONTEXT,), torch.nan)).sample((3,))


def test_weights_that_are_not_finite_end_sampling_with_block_and_token(flow, context, tmp_path):
    """madminer-tool/madminer #451: a loaded network gave NaN."""
    with torch.no_grad():
        flow.blocks[0].proj_out.weight.fill_(torch.nan)
    flow.save_pretrained(tmp_path)
    with pytest.raises(InverseError, match=r"block 0: .* token \d of sample 0"):
        TokenFlow.from_pretrained(tmp_path).distribution(context).sample()


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_there_is_no_domain_to_leave(flow, context, scale):
    """sbi-dev/sbi #373, bayesiains/nflows #87, #62, #23: splines leave their domain, or all values are in the tails."""
    x, transform = noise(scale), FlowTransform(flow, context)
    z, ladj = transform.call_and_ladj(x)
    assert z.isfinite().all() and ladj.isfinite().all()
    torch.testing.assert_close(transform.inv(z), x, rtol=1e-4, atol=1e-4 * scale)


def test_gradients_of_an_inverse_are_finite_far_from_the_data(flow, context):
    """danielward27/flowjax #239, bayesflow-org/bayesflow #721: gradients of an inverse were NaN."""
    z = noise(1e3).requires_grad_()
    x, ladj = FlowTransform(flow, context).inv.call_and_ladj(z)
    (x.sum() + ladj.sum()).backward()
    assert all(grad.isfinite().all() for grad in (z.grad, *(weight.grad for weight in flow.parameters())))


def test_an_inverse_needs_no_forward_call_before(flow, context):
    """pyro-ppl/pyro #2718: the inverse of an autoregressive transform existed in its cache alone."""
    z = noise()
    x = FlowTransform(flow, context).inv(z)
    torch.testing.assert_close(FlowTransform(flow, context)(x), z, rtol=1e-4, atol=1e-4)


def test_an_inverse_is_right_beyond_an_interval(flow, context):
    """pyro-ppl/pyro #3139: a spline was wrong outside of an interval."""
    transform = FlowTransform(flow, context)
    for scale in (1.0, 5.0, 50.0):
        z = noise(scale)
        torch.testing.assert_close(transform(transform.inv(z)), z, rtol=1e-4, atol=1e-4 * scale)


def test_both_directions_give_their_log_determinant(flow, context):
    """pyro-ppl/pyro PR #3302, deeprob-org/deeprob-kit PR #34: call_and_ladj and rsample were added by hand."""
    transform, z = FlowTransform(flow, context), noise()
    x, back = transform.inv.call_and_ladj(z)
    torch.testing.assert_close(transform.call_and_ladj(x)[1], -back, rtol=1e-4, atol=1e-4)
    assert TransformedDistribution(flow.prior(), [transform.inv]).rsample().requires_grad


def test_every_flow_of_a_model_takes_the_context(context):
    """VincentStimper/normalizing-flows #45: only one layer took the context; #41, #21: no way back from noise."""
    normflows = pytest.importorskip("normflows")
    from starflow_kernels.adapters.normflows import TarFlow

    size = {"channels": 16, "layers": (1,), "head_dim": 8}
    flows = [
        TokenFlow.preset("vector", features=FEATURES, condition="vector", condition_dim=CONTEXT, **size)
        for _ in range(2)
    ]
    for weight in (weight for flow in flows for weight in flow.parameters()):
        torch.nn.init.normal_(weight, std=0.3)
    base = normflows.distributions.DiagGaussian(FEATURES, trainable=False)
    model = normflows.ConditionalNormalizingFlow(base, [TarFlow(flow) for flow in flows])
    context = context.requires_grad_()
    x, _ = model.forward_and_log_det(noise(), context=context)
    torch.testing.assert_close(model.inverse_and_log_det(x, context=context)[0], noise(), rtol=1e-3, atol=1e-3)
    for flow in flows:
        z = flow(noise(), context)[0]
        assert torch.autograd.grad(z.sum(), context)[0].abs().min() > 0


def test_a_density_of_data_with_gaps_is_learned_under_a_condition():
    """tensorflow/probability #849, #1203, facebookincubator/flowtorch #81: conditional MAF was missing, or gave NaN."""
    torch.manual_seed(0)
    flow = TokenFlow.preset("vector", features=2, condition="vector", condition_dim=1, channels=16, layers=(1, 1))
    optimizer, losses = torch.optim.Adam(flow.parameters(), 3e-3), []
    for _ in range(100):
        c = torch.randint(2, (256, 1)) * 2.0 - 1
        loss = -flow.distribution(c).log_prob(3 * c + 0.1 * torch.randn(256, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 4 < losses[0]
    assert (flow.distribution(torch.ones(1)).sample((100,)).mean(0) - 3).abs().max() < 0.5


def test_many_samples_take_bounded_memory(flow, context, monkeypatch):
    """kazewong/flowMC PR #36: memory grew with the number of samples."""
    from starflow_kernels.block import native

    parts = []
    plan = native.plan_sampling

    def small(*arguments):
        parts.append(plan(*arguments[:-1], 2**20))
        return parts[-1]

    monkeypatch.setattr(native, "plan_sampling", small)
    x = flow.distribution(context).sample((2000,))
    assert x.shape == (2000, ROWS, FEATURES) and all(part.cache * 4 <= 2**20 for part in parts)
