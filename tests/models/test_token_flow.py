"""Flows on tokens and vectors: densities, samples, orders, lengths, conditions, known tokens and gradients."""

import json
import re

import pytest
import torch

from starflow import CheckpointError, ConfigError, Flow, InverseError, TokenFlow, TokenFlowConfig, open_model
from starflow.cli import main
from starflow_kernels import Solver

SMALL = {"channels": 16, "layers": (1, 2, 1), "head_dim": 8}
ORDERS = ((3, 1, 0, 2, 4), (0, 1, 2, 3, 4), (4, 2, 0, 1, 3))
VARIANTS = {
    "vector": {"features": 5},
    "tokens": {"tokens": 5, "token_dim": 2},
    "one-token": {"features": 4, "token_dim": 4},
    "class": {"features": 5, "condition": "class", "num_classes": 3},
    "condition": {"features": 10, "token_dim": 2, "condition": "vector", "condition_dim": 3},
    "condition-per-token": {"tokens": 5, "token_dim": 2, "condition": "token", "condition_dim": 3},
    "orders": {"tokens": 5, "token_dim": 2, "orders": ORDERS},
    "no-positions": {"tokens": 5, "positions": False, "norm": "rms_norm", "mlp": "swiglu"},
    "volume-preserving": {"features": 5, "scale": "unit"},
}
ROWS = 4


def make(name: str = "vector", **changes) -> TokenFlow:
    """Return a flow in float64 that is nowhere the identity; its heads stay tame."""
    torch.manual_seed(0)
    flow = TokenFlow(TokenFlowConfig(**{**SMALL, "soft_clip": 2.0, **VARIANTS[name], **changes})).double()
    for parameter_name, parameter in flow.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.04 if "proj_out" in parameter_name else 0.15)
    for moment_name, moment in flow.named_buffers():
        moment.uniform_(0.5, 2.0) if "s" in moment_name else None
    return flow


def inputs(flow: TokenFlow, rows: int = ROWS):
    """Return data and the condition that the flow takes."""
    config, (tokens, token_dim) = flow.config, flow.config.token_shape
    x = torch.randn(rows, tokens, token_dim, dtype=torch.float64)
    per_row = {"vector": (rows,), "token": (rows, tokens)}.get(config.condition)
    condition = torch.arange(rows) % 4 - 1 if config.condition == "class" else None
    if per_row:
        condition = torch.randn(*per_row, config.condition_dim, dtype=torch.float64)
    return (x.flatten(1) if config.features else x), condition


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
    z = torch.randn(ROWS, 5, 2, generator=seeded(5)).double().flatten(1)
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


def seeded(seed: int) -> torch.Generator:
    """Return the generator of a seed of `TokenFlow.sample`."""
    from starflow.seeds import generator

    return generator(seed)


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
    assert torch.equal(drawn, flow.sample(6, seed=0)) and torch.equal(drawn, flow.sample(6, seed=seeded(0)))
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
    with pytest.raises(ValueError, match=r"^x: 2 of 2 values are not finite"):
        flow.standardize(x * torch.inf)
    with pytest.raises(ValueError, match=r"^condition: takes no values with condition='none'"):
        make("tokens").standardize(x, condition)


def test_checkpoints(tmp_path):
    flow = make("orders").float()
    flow.notice = "mine"
    flow.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "TokenFlow"
    for again in (TokenFlow.from_pretrained(tmp_path), open_model(tmp_path)):
        assert (
            type(again) is TokenFlow and again.config == flow.config and again.notice == "mine" and not again.training
        )
        assert torch.equal(again.sample(3), flow.sample(3))
    assert open_model(tmp_path, dtype=torch.float64).sample(3).dtype == torch.float64
    with pytest.raises(CheckpointError, match=r"a flow on vectors or tokens, a TokenFlow: starflow.open_model opens"):
        Flow.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a flow on images, a Flow: starflow.open_model opens"):
        TokenFlow.from_pretrained("digits")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        TokenFlow.from_pretrained(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"_class_name": "TokenFlow", "features": 3}')
    with pytest.raises(CheckpointError, match="missing model settings channels, layers"):
        TokenFlow.from_pretrained(tmp_path)


def test_commands_describe_a_token_flow_and_draw_no_images_of_it(tmp_path, capsys):
    make("tokens").float().save_pretrained(tmp_path)
    assert main(["info", "--checkpoint", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^  kind +TokenFlow$", printed, re.MULTILINE)
    assert re.search(r"^  tokens +5 of 2 values$", printed, re.MULTILINE)
    for command in ("sample", "calibrate", "eval", "demo"):
        assert main([command, "--checkpoint", str(tmp_path)]) == 2
        error = capsys.readouterr().err.strip()
        assert "flow on vectors or tokens" in error and "\n" not in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features=0, tokens=0: exactly one of them must be given"),
        ({"tokens": 3}, "features=5, tokens=3: exactly one"),
        ({"token_dim": 2}, "token_dim=2 does not divide features=5"),
        ({"token_dim": 0}, "token_dim=0: expected a number of at least 1"),
        ({"features": -5}, "features=-5: expected a number of at least 0"),
        ({"features": 2.5}, "features=2.5: expected an integer"),
        ({"condition": "text"}, "condition='text': expected one of none, class, vector, token"),
        ({"condition": "class"}, "num_classes=0: expected a number of at least 1 for condition='class'"),
        ({"condition": "token"}, "condition_dim=0: expected a number of at least 1 for condition='token'"),
        ({"condition_dim": 2}, "condition_dim=2: expected 0 for condition='none'"),
        ({"num_classes": 2}, "num_classes=2: expected 0 for condition='none'"),
        ({"orders": ((0, 1, 2, 3, 4),)}, "orders: 1 of them for 3 blocks"),
        ({"orders": ((0, 1, 2, 3, 3),) * 3}, "orders: expected a permutation of 0 .. 4 for block 0"),
        ({"orders": 3}, "orders=3: expected a list"),
        ({"channels": 12}, "head_dim=8 does not divide the 12 channels of block 0"),
        ({"layers": ()}, "layers=(): expected a list"),
        ({"layers": (1, 0)}, "layers=0: expected at least 1"),
        ({"scale": "sigmoid"}, "scale='sigmoid': expected one of"),
    ],
    ids=repr,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        TokenFlowConfig(**{"features": 5, **SMALL, **settings})


@pytest.mark.parametrize(
    ("name", "call", "error", "message"),
    [
        ("vector", lambda f, x, c: f.log_prob(x[:, :3]), ValueError, "x: expected shape (B, 5), got (4, 3)"),
        ("tokens", lambda f, x, c: f.log_prob(x[:, :3]), ValueError, "x: expected shape (B, 5, 2), got (4, 3, 2)"),
        ("vector", lambda f, x, c: f.log_prob(x.int()), TypeError, "x: dtype torch.int32 is not one of"),
        ("vector", lambda f, x, c: f.inverse([1.0]), TypeError, "z: expected a tensor of shape (B, 5), got list"),
        ("vector", lambda f, x, c: f.log_prob(x, x), ValueError, "condition: takes no values with condition='none'"),
        ("condition", lambda f, x, c: f.log_prob(x), TypeError, "condition: expected a tensor of shape (4, 3), got"),
        ("condition", lambda f, x, c: f.log_prob(x, c[:2]), ValueError, "condition: expected shape (4, 3), got (2, 3)"),
        ("condition", lambda f, x, c: f.sample(9, c), ValueError, "condition: expected shape (9, 3), got (4, 3)"),
        ("class", lambda f, x, c: f.log_prob(x, c + 2), ValueError, "condition: expected -1 (no class) .. 2, got "),
        ("class", lambda f, x, c: f.log_prob(x, c[:2]), ValueError, "condition: expected integers of shape (4,), got "),
        ("vector", lambda f, x, c: f.log_prob(x, lengths=torch.full((4,), 6)), ValueError, "lengths: expected numbers"),
        ("vector", lambda f, x, c: f.sample(4, lengths=[1] * 4), TypeError, "lengths: expected an integer tensor"),
        ("vector", lambda f, x, c: f.log_prob(x, order=torch.zeros(5).long()), ValueError, "order: expected a permut"),
        ("orders", lambda f, x, c: f.log_prob(x, order=torch.arange(4)), ValueError, "order: expected shape (5,)"),
        ("vector", lambda f, x, c: f.inverse(x, data=x), ValueError, "data, known: one is given without the other"),
        ("vector", lambda f, x, c: f.sample(4, known=torch.ones(4).int()), ValueError, "data, known: one is given"),
        ("vector", lambda f, x, c: f.log_prob(x, known=torch.ones(3).int()), ValueError, "known: expected shape (4,)"),
        ("vector", lambda f, x, c: f.sample(-1), ConfigError, "count=-1: expected an integer of at least 0"),
        ("vector", lambda f, x, c: f.sample(1, seed=-1), ConfigError, "seed=-1: expected an integer from 0"),
        ("vector", lambda f, x, c: f.inverse(x, solvers=[]), ValueError, "solvers: 0 of them for 3 blocks"),
        ("vector", lambda f, x, c: f.inverse(x, backend="nonsense"), ValueError, "backend='nonsense'"),
        ("vector", lambda f, x, c: f.inverse(x * torch.nan), InverseError, "block 2: z: 20 of 20 values are not"),
        ("vector", lambda f, x, c: f.preset("image"), ConfigError, "preset 'image': expected one of vector, molecule"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(name, call, error, message):
    flow = make(name)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call(flow, *inputs(flow))


@pytest.mark.parametrize("name", VARIANTS)
def test_no_rows(name):
    flow = make(name)
    x, condition = inputs(flow, 0)
    assert flow.log_prob(x, condition).shape == (0,) and flow.sample(0, condition).shape == x.shape
    drawn = flow.rsample(0, condition, lengths=torch.zeros(0, dtype=torch.int64))
    assert drawn.x.shape == x.shape and drawn.log_prob.shape == (0,)


@pytest.mark.parametrize("name", ["condition-per-token", "orders", "class"])
def test_defaults_of_torch_do_not_matter(name):
    flow = make(name).float()
    x, condition = inputs(flow)
    x, lengths, order = x.float(), torch.tensor([0, 2, 5, 1]), torch.randperm(5)
    condition = condition.float() if flow.config.condition_dim else condition
    arguments = condition, lengths, order

    def results():
        drawn = flow.rsample(ROWS, condition, lengths=lengths, order=order, seed=1)
        return drawn.x, drawn.log_prob, flow.log_prob(x, *arguments)

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(found, expected))
    with torch.inference_mode():
        inside = TokenFlow(flow.config)
    inside.log_prob(x, *arguments).sum().backward()


@pytest.mark.parametrize("name", ["condition-per-token", "orders"])
def test_graphs(name):
    flow = make(name)
    x, condition = inputs(flow)
    lengths, order = torch.tensor([0, 2, 5, 1]), torch.randperm(5)
    compiled = torch.compile(flow.log_prob, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, condition, lengths, order), flow.log_prob(x, condition, lengths, order))
    with torch.no_grad():
        inverse = torch.compile(lambda z, c: flow.inverse(z, c, lengths, order).x, backend="eager", fullgraph=True)
        assert torch.equal(inverse(x, condition), flow.inverse(x, condition, lengths, order).x)


@pytest.mark.parametrize(("name", "size"), [("vector", {"features": 10}), ("molecule", {"tokens": 13})])
def test_presets(name, size):
    flow = TokenFlow.preset(name, **size)
    x = flow.sample(2)
    assert x.shape == ((2, 10) if name == "vector" else (2, 13, 3))
    assert TokenFlow.preset(name, **size, channels=32, head_dim=8).config.channels == 32
    with pytest.raises(ConfigError, match="exactly one of them must be given"):
        TokenFlow.preset(name)
