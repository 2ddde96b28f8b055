"""Flows on tokens and vectors: checkpoints, commands, wrong arguments, defaults of torch, graphs and presets."""

import json
import re

import pytest
import torch
from support.token_flows import ROWS, SMALL, VARIANTS, inputs, make

from starflow import CheckpointError, ConfigError, Flow, InverseError, TokenFlow, TokenFlowConfig, open_model
from starflow.cli import main


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
