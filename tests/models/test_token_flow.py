"""Flows on tokens and vectors: densities, samples, orders, lengths, conditions, known tokens and gradients."""

import pytest
import torch
from support.token_flows import ROWS, SMALL, VARIANTS, inputs, make

from starflow import TokenFlow, TokenFlowConfig
from starflow.seeds import generator
from starflow_kernels import Solver


def arrangements(flow: TokenFlow):
    """Return arguments with and without orders and lengths."""
    tokens = flow.config.token_shape[0]
    lengths = torch.tensor([0, 1, 3, tokens]).clamp(max=tokens)
    orders = torch.stack([torch.randperm(tokens) for _ in range(ROWS)])
    return [{}, {"lengths": lengths}, {"order": orders[0]}, {"order": orders, "lengths": lengths}]


def jacobian(run, x: torch.Tensor) -> torch.Tensor:
    """Return the Jacobian of each row of run(x), (B, N, N)."""
    full = torch.autograd.functional.jacobian(lambda v: run(v.view_as(x)).flatten(1), x.flatten(1))
    return torch.stack([full[i, :, i] for i in range(len(x))])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_density_is_that_of_the_change_of_variables(name):
    flow = make(name)
    x, condition = inputs(flow)
    with torch.no_grad():
        z, logdet, latents = flow(x, condition)
    volume = torch.linalg.slogdet(jacobian(lambda v: flow(v, condition).z, x)).logabsdet
    torch.testing.assert_close(logdet, volume, atol=1e-9, rtol=0)
    variance = torch.ones(()) if flow.prior_variance is None else flow.prior_variance.flatten()
    prior = torch.distributions.Normal(0, variance.double().sqrt()).log_prob(z.flatten(1)).sum(1)
    torch.testing.assert_close(flow.log_prob(x, condition), prior + volume, atol=1e-9, rtol=0)
    assert z.shape == x.shape and len(latents) == 3 and volume.abs().max() > 0.1


def test_torch_func_differentiates_the_flow():
    flow = make("condition")
    x, condition = inputs(flow)
    single = torch.func.jacrev(lambda row: flow(row[None], condition[0]).z[0])(x[0])
    torch.testing.assert_close(single, jacobian(lambda v: flow(v, condition).z, x)[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_inverse_gives_the_data_back(name):
    flow = make(name)
    x, condition = inputs(flow)
    tokens = flow.config.token_shape[0]
    known = torch.tensor([0, 1, 2, 4]).clamp(max=tokens)
    for arranged in arrangements(flow):
        for given in ({}, {"known": known}):
            data = {"data": x} if given else {}
            with torch.no_grad():
                z = flow(x, condition, **arranged, **given).z
                found = flow.inverse(z, condition, **arranged, **given, **data)
                torch.testing.assert_close(found.x, x, atol=1e-9, rtol=0)
                if not given:
                    expected = -flow(found.x, condition, **arranged).logdet
                    torch.testing.assert_close(found.logdet, expected, atol=1e-9, rtol=0)
                swept = flow.inverse(z, condition, **arranged, **given, **data, solvers=Solver("jacobi", tol=1e-12))
                torch.testing.assert_close(swept.x, x, atol=1e-9, rtol=0)
                assert [report.method for report in swept.reports] == ["jacobi"] * 3


@pytest.mark.parametrize("name", VARIANTS)
def test_samples_come_with_their_density(name):
    flow = make(name)
    x, condition = inputs(flow)
    known = torch.tensor([0, 1, 2, 4]).clamp(max=flow.config.token_shape[0])
    for arranged in arrangements(flow):
        for given in ({}, {"known": known, "data": x}):
            drawn = flow.rsample(ROWS, condition, seed=3, **arranged, **given)
            given.pop("data", None)
            expected = flow.log_prob(drawn.x, condition, **arranged, **given)
            torch.testing.assert_close(drawn.log_prob, expected, atol=1e-9, rtol=0)
            assert drawn.x.requires_grad and drawn.log_prob.requires_grad


def plain_sample(flow: TokenFlow, z: torch.Tensor, condition: torch.Tensor):
    """Return samples and their density by a loop over tokens that autograd follows."""
    config, (T, D) = flow.config, flow.config.token_shape
    x = z.view(-1, T, D)
    features = flow.embedding((condition - flow.condition_shift) / flow.condition_scale)
    density = torch.distributions.Normal(0, 1).log_prob(x).sum((1, 2)) - flow.scale.log().sum()
    for block in reversed(flow.blocks):
        noise, x = x, torch.zeros_like(x)
        for _ in range(T):
            raw = config.soft_clip * torch.tanh(block.params(x, features) / config.soft_clip)
            log_sigma, mu = raw.split(D, dim=-1)
            x = mu + log_sigma.exp() * noise
        density = density - log_sigma.sum((1, 2))
    return (x * flow.scale + flow.shift).flatten(1), density


def test_gradients_of_samples_are_those_of_a_plain_loop():
    flow = make("condition")
    condition = inputs(flow)[1].requires_grad_()
    targets = [condition, *flow.parameters()]
    drawn = flow.rsample(ROWS, condition, seed=5)
    z = torch.randn(ROWS, 5, 2, generator=generator(5)).double().flatten(1)
    x, density = plain_sample(flow, z, condition)
    torch.testing.assert_close(drawn.x, x, atol=1e-10, rtol=0)
    torch.testing.assert_close(drawn.log_prob, density, atol=1e-10, rtol=0)
    weight = torch.randn_like(x)
    found, expected = (
        torch.autograd.grad((a * weight).sum() + (b * b).sum(), targets)
        for a, b in ((drawn.x, drawn.log_prob), (x, density))
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ["condition-per-token", "class", "no-positions", "orders"])
def test_padding_changes_nothing(name):
    flow = make(name)
    x, condition = inputs(flow)
    lengths = torch.tensor([2, 5, 1, 3])
    padding = torch.arange(5) >= lengths[:, None]
    noisy = x.masked_fill(padding.view(ROWS, 5, *[1] * (x.ndim - 2)), torch.nan)
    spoiled = condition
    if flow.config.condition == "token":
        spoiled = condition.masked_fill(padding[..., None], torch.nan)
    noisy.requires_grad_()
    found = flow.log_prob(noisy, spoiled, lengths)
    found.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in flow.parameters())
    assert noisy.grad.isfinite().all() and not noisy.grad[padding].any()
    for i in range(ROWS):
        alone = flow.log_prob(x[i : i + 1], None if condition is None else condition[i : i + 1], lengths[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, atol=1e-10, rtol=0)
    samples = flow.sample(ROWS, spoiled, lengths=lengths)
    assert not samples[padding].any() and samples[~padding].all()


def test_padding_of_noise_comes_back_whatever_it_is():
    flow = make("condition-per-token")
    x, condition = inputs(flow)
    lengths = torch.tensor([2, 5, 0, 3])
    x = x.masked_fill((torch.arange(5) >= lengths[:, None])[..., None], torch.nan)
    z = flow(x, condition, lengths).z
    torch.testing.assert_close(flow.inverse(z, condition, lengths).x, x, atol=1e-9, rtol=0, equal_nan=True)


def test_a_padded_sample_is_one_of_a_shorter_flow():
    flow = make("no-positions")
    x, _ = inputs(flow)
    for n in range(1, 5):
        shorter = make("no-positions", tokens=n)
        shorter.load_state_dict(flow.state_dict())
        padded = flow.log_prob(x, lengths=torch.full((ROWS,), n))
        torch.testing.assert_close(padded, shorter.log_prob(x[:, :n]), atol=1e-10, rtol=0)


def test_an_order_is_that_of_permuted_data():
    flow = make("no-positions")
    x, _ = inputs(flow)
    order = torch.stack([torch.randperm(5) for _ in range(ROWS)])
    permuted = x.gather(1, order[..., None])
    torch.testing.assert_close(flow.log_prob(x, order=order), flow.log_prob(permuted), atol=1e-12, rtol=0)
    assert (flow.log_prob(x) - flow.log_prob(permuted)).abs().max() > 1e-3


def test_stored_orders_of_alternating_blocks_change_nothing():
    ascending, descending = tuple(range(5)), tuple(reversed(range(5)))
    flow, stored = make("tokens"), make("tokens", orders=(ascending, descending, ascending))
    stored.load_state_dict(flow.state_dict())
    x, _ = inputs(flow)
    torch.testing.assert_close(stored.log_prob(x), flow.log_prob(x), atol=1e-12, rtol=0)
    order = torch.randperm(5)
    torch.testing.assert_close(stored.log_prob(x, order=order), flow.log_prob(x, order=order), atol=1e-12, rtol=0)
    assert (make("orders").log_prob(x) - flow.log_prob(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["tokens", "orders", "condition-per-token"])
def test_known_tokens_are_a_condition_of_the_others(name):
    flow = make(name)
    x, condition = inputs(flow)
    k = 2

    def rest(values):
        return flow(torch.cat([x[:, :k], values], 1), condition, known=torch.full((ROWS,), k)).z[:, k:]

    volume = torch.linalg.slogdet(jacobian(rest, x[:, k:])).logabsdet
    expected = volume + torch.distributions.Normal(0, 1).log_prob(rest(x[:, k:])).sum((1, 2))
    found = flow.log_prob(x, condition, known=torch.full((ROWS,), k))
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    drawn = flow.sample(ROWS, condition, data=x, known=torch.full((ROWS,), k))
    assert torch.equal(drawn[:, :k], x[:, :k]) and (drawn[:, k:] - x[:, k:]).abs().min() > 1e-6


def test_known_tokens_far_out_spoil_no_density():
    flow = make("tokens").float()
    x, _ = inputs(flow)
    x, known = x.float(), torch.full((ROWS,), 4)
    x[:, 0] = 2e4
    exact = flow.double().log_prob(x.double(), known=known)
    torch.testing.assert_close(flow.float().log_prob(x, known=known).double(), exact, atol=1e-3, rtol=1e-3)
    assert not flow.log_prob(x, known=torch.full((ROWS,), 5)).any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_numbers_of_known_tokens_have_any_integer_dtype(dtype):
    flow = make("no-positions", tokens=130)
    x, _ = inputs(flow)
    lengths, known = torch.full((ROWS,), 130), torch.full((ROWS,), 100)
    expected = flow.log_prob(x, lengths=lengths, known=known)
    assert torch.equal(flow.log_prob(x, lengths=lengths, known=known.to(dtype)), expected)
    drawn = flow.sample(ROWS, lengths=lengths, data=x, known=known.to(dtype))
    assert torch.equal(drawn, flow.sample(ROWS, lengths=lengths, data=x, known=known))


def test_known_padding_is_still_padding():
    flow = make("condition-per-token")
    x, condition = inputs(flow)
    lengths, known = torch.tensor([2, 5, 1, 3]), torch.tensor([4, 2, 5, 3])
    x = x.masked_fill((torch.arange(5) >= lengths[:, None])[..., None], torch.nan)
    drawn = flow.rsample(ROWS, condition, lengths=lengths, data=x, known=known)
    assert torch.equal(drawn.x[[0, 2, 3]], x[[0, 2, 3]].nan_to_num()) and torch.equal(drawn.x[1, :2], x[1, :2])
    expected = flow.log_prob(drawn.x, condition, lengths, known=known)
    torch.testing.assert_close(drawn.log_prob, expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(expected[[0, 2, 3]], torch.zeros(3).double(), atol=1e-12, rtol=0)


def test_gradients_reach_known_data():
    flow = make("tokens")
    x, _ = inputs(flow)
    known, data = torch.full((ROWS,), 2), x.clone().requires_grad_()
    z = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(flow.inverse(z, data=data, known=known).x[:, 2:].sum(), data)
    step = 1e-6 * torch.randn_like(x)
    with torch.no_grad():
        up, down = (flow.inverse(z, data=x + s * step, known=known).x[:, 2:].sum() for s in (1, -1))
    torch.testing.assert_close((gradient * step).sum(), (up - down) / 2, rtol=1e-6, atol=1e-12)
    assert not gradient[:, 2:].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name):
    flow = make(name)
    x, condition = inputs(flow)
    for loss in (-flow.log_prob(x, condition).mean(), flow.rsample(ROWS, condition).x.square().mean()):
        flow.zero_grad()
        loss.backward()
        silent = [n for n, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == []


def test_one_condition_serves_all_samples():
    flow = make("class")
    assert torch.equal(flow.sample(ROWS, 2), flow.sample(ROWS, [2] * ROWS))
    for name in ("class", "condition", "condition-per-token"):
        flow = make(name)
        x, condition = inputs(flow)
        repeated = condition[:1].expand_as(condition)
        assert torch.equal(flow.log_prob(x, condition[0]), flow.log_prob(x, repeated))
        assert torch.equal(flow.sample(ROWS, condition[0]), flow.sample(ROWS, repeated))
        assert (flow.sample(ROWS, condition[0]) - flow.sample(ROWS, condition[1])).abs().max() > 1e-3


def test_samples_follow_from_the_seed():
    flow = make("vector")
    drawn = flow.sample(6)
    assert drawn.shape == (6, 5) and drawn.dtype == torch.float64 and not drawn.requires_grad
    assert torch.equal(drawn, flow.sample(6, seed=0)) and torch.equal(drawn, flow.sample(6, seed=generator(0)))
    assert not torch.equal(drawn, flow.sample(6, seed=1))
    assert not torch.equal(flow.rsample(6).x, flow.rsample(6).x)
    torch.manual_seed(7)
    first = flow.sample(6, seed=None)
    torch.manual_seed(7)
    assert torch.equal(first, flow.sample(6, seed=None))
    assert flow.float().sample(2).dtype == torch.float32


def test_standardized_data_have_mean_zero_and_variance_one():
    flow = TokenFlow(TokenFlowConfig(features=3, condition="vector", condition_dim=2, **SMALL)).double()
    x = torch.randn(400, 3).double() * torch.tensor([1e-3, 1.0, 0.0]) + torch.tensor([5.0, -1.0, 1.3])
    condition = 100 * torch.randn(400, 2).double()
    flow.standardize(x, condition)
    z = flow(x, condition).z
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-9, rtol=0)
    assert flow.scale[2] == 1 and (flow.condition_scale - 100).abs().max() < 20
    density = torch.distributions.Normal(flow.shift.flatten(), flow.scale.flatten()).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x, condition), density)


def test_tokens_of_one_kind_are_standardized_together():
    flow = make("condition-per-token")
    x, condition = inputs(flow, 50)
    lengths = torch.arange(50) % 6
    padding = (torch.arange(5) >= lengths[:, None])[..., None]
    flow.standardize(x.masked_fill(padding, torch.nan), condition.masked_fill(padding, torch.nan), lengths)
    torch.testing.assert_close(flow.shift, x[~padding[..., 0]].mean(0))
    torch.testing.assert_close(flow.condition_scale, condition[~padding[..., 0]].std(0, correction=0))
    with pytest.raises(ValueError, match=r"^mean of x: 2 of 2 values are not finite"):
        flow.standardize(x * torch.inf)
    with pytest.raises(ValueError, match=r"^condition: takes no values with condition='none'"):
        make("tokens").standardize(x, condition)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x, c: (x, c * torch.nan), "mean of condition: 3 of 3 values are not finite"),
        (lambda x, c: (x * 1e-60, c), "deviation of x: too small for torch.float32"),
        (lambda x, c: (x * 1e60, c), "mean of x: 10 of 10 values are not finite"),
    ],
)
def test_moments_that_are_refused_change_nothing(spoil, message):
    flow = make("condition").float()
    x, condition = inputs(flow)
    before = [moment.clone() for moment in flow.buffers()]
    with pytest.raises(ValueError, match=message):
        flow.standardize(*spoil(x, condition))
    assert all(map(torch.equal, before, flow.buffers()))
