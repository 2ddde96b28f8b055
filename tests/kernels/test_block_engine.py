"""The static engine on the CPU, with the reference step: buckets, parts, kept sessions, replays and reports."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch
from support.blocks import BLOCKS, T, block
from support.contract import assert_same_row

from starflow_kernels import block_inverse
from starflow_kernels.affine_flow_inverse.reference import affine_flow_inverse
from starflow_kernels.block.network import CachedNetwork
from starflow_kernels.block.progress import reporting_to
from starflow_kernels.block.triton import sessions
from starflow_kernels.block.triton.sessions import (
    Sessions,
    Shape,
    bucket,
    captured,
    largest,
    lend,
    loaded,
    parts,
    replay,
    replay_until_done,
    sample,
)


class Model:
    """Owner of sessions."""


class FakeGraph:
    """Session whose replays are counted steps of the reference."""

    def __init__(self, weights, spec, shape: Shape):
        self.weights, self.spec, self.shape, self.loads, self.steps = list(weights.values()), spec, shape, 0, 0

    def load(self, z, context, temperature):
        assert len(z) <= self.shape.samples
        self.loads += 1
        (cond, prefix, cos, sin, guidance), self.t = context, 0 if self.spec.start else 1
        flat = (None if value is None else value.flatten(0, 1) for value in (cond, prefix))
        self.guidance, self.x = guidance, z.clone()
        given = *flat, cos, sin, guidance, self.spec.to_json(), temperature
        self.network = CachedNetwork(z, self.weights, *given)

    def step(self):
        at = slice(self.t, self.t + 1)
        weight, affine = None if self.guidance is None else self.guidance[:, at], self.spec.affine
        params = self.network.params(self.x, self.t)
        self.x[:, at] = affine_flow_inverse(
            self.x[:, at], params, weight, affine.scale, affine.soft_clip, self.shape.rule
        )
        self.t, self.steps = self.t + 1, self.steps + 1

    def result(self):
        return self.x, torch.zeros_like(self.x)


@pytest.mark.parametrize("samples, expected", [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_buckets_are_powers_of_two(samples, expected):
    assert bucket(samples) == expected


@pytest.mark.parametrize("budget, most", [(10**9, 128), (1280, 128), (1279, 64), (45, 4), (1, 1)])
def test_the_largest_bucket_that_fits(budget, most):
    assert largest(100, lambda samples: 10 * samples, budget) == most


def test_parts_cover_the_batch_once():
    assert [list(range(10))[rows] for rows in parts(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_sessions_are_opened_once_per_key_and_the_least_recently_used_are_closed():
    sessions, model, opened = Sessions(), Model(), []

    def get(name, size=40, of=model):
        return sessions.get(of, (name,), size, 100, lambda: opened.append(name) or object())

    a, b = get("a"), get("b")
    assert get("a") is a and opened == ["a", "b"] and sessions.bytes == 80
    get("c")
    assert get("a") is a and len(sessions) == 2
    assert get("b") is not b and opened == ["a", "b", "c", "b"]
    other = Model()
    assert get("b", 20, other) is not get("b")
    get("larger than the budget", 500)
    assert len(sessions) == 1
    get("of the other", 1, other)
    del other
    gc.collect()
    assert all("of the other" not in key for key in sessions._kept)


def test_a_session_that_fails_to_open_is_not_kept():
    sessions, model = Sessions(), Model()
    with pytest.raises(MemoryError):
        sessions.get(model, ("a",), 1, 10, lambda: (_ for _ in ()).throw(MemoryError()))
    assert len(sessions) == 0 and sessions.get(model, ("a",), 1, 10, lambda: "opened") == "opened"


class Size(int):
    """Number of bytes; reading it ends a model, as the garbage collector may at any time."""

    models: list[Model]

    def __radd__(self, other):
        self.models.clear()
        return other + int(self)


@pytest.mark.filterwarnings("error")
def test_a_model_that_ends_while_the_kept_sessions_are_read():
    sessions, model, other = Sessions(), Model(), [Model()]
    size = Size(1)
    size.models = other
    sessions.get(model, ("first",), size, 100, object)
    sessions.get(other[0], ("of the other",), 1, 100, object)
    sessions.get(model, ("second",), 1, 100, object)
    assert not other and len(sessions) == 2


def test_a_call_within_a_call_has_sessions_of_its_own():
    sessions, model = Sessions(), Model()

    def get():
        return sessions.get(model, ("key",), 1, 100, object)

    with sessions.reserved():
        outer = get()
        with sessions.reserved():
            assert get() is not outer
        assert get() is outer


def test_a_graph_is_captured_on_its_device_while_other_threads_use_theirs(monkeypatch):
    """torch's default stream of captures belongs to the device of the first capture of the process."""
    seen = []

    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        seen.append((graph, stream, capture_error_mode))
        yield
        seen.append("ended")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    assert captured(lambda: seen.append("launched"), torch.device("cuda", 1)) == "graph"
    assert seen == [("graph", "stream of cuda:1", "thread_local"), "launched", "ended"]


@pytest.mark.parametrize("current, recorded", [("home", []), ("other", ["other"])])
def test_memory_that_another_stream_reads_is_recorded(current, recorded, monkeypatch):
    streams = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    lend([SimpleNamespace(record_stream=streams.append)], "home", torch.device("cuda"))
    assert streams == recorded
    lend([torch.zeros(1)], None, torch.device("cpu"))


@pytest.mark.parametrize("steps", [0, 1, 5, 16, 17, 1000])
def test_the_device_is_waited_for_only_where_there_are_reports(steps):
    made, waits, done = [], [], []
    replay(lambda: made.append(1), steps, lambda: waits.append(1), done.append)
    assert (len(made), waits, done) == (steps, [], [steps] if steps else [])
    made, done = [], []
    with reporting_to(lambda *at: None):
        replay(lambda: made.append(1), steps, lambda: waits.append(len(made)), done.append)
    assert len(made) == steps and waits == done and len(done) <= sessions.REPORTS and done[-1:] == [steps][: len(done)]


@pytest.mark.parametrize("tokens", [1, 4, 5, 8])
def test_sweeps_end_one_replay_after_all_are_done(tokens):
    """The device is asked after every replay; the answer is read when the next has been started."""
    events, seen = [], []

    def ask():
        count = min(tokens, 4 * events.count("replay"))
        events.append("ask")
        return lambda: events.append("wait") or count

    needed = -(-tokens // 4)
    replay_until_done(lambda: events.append("replay"), ask, tokens, needed, seen.append)
    assert events == ["replay", "ask", *["replay", "ask", "wait"] * needed]
    assert seen == [min(tokens, 4 * (i + 1)) for i in range(needed)]


def test_a_device_without_progress_is_noticed():
    replays = []
    with pytest.raises(RuntimeError, match="3 of 5 tokens are done after 7 replays"):
        replay_until_done(lambda: replays.append(1), lambda: lambda: 3, 5, 7, lambda count: None)
    assert len(replays) == 8


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text-flip-cond", "starflow-identity-first"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("budget", [10**9, 45, 1])
def test_parts_of_a_batch_are_the_whole(name, guided, budget):
    B, model, sessions, keys = 7, Model(), Sessions(), []
    z, w, spec, context = block(BLOCKS[name], B=B, copies=1 + guided)
    guidance = torch.rand(B, T, dtype=torch.float64) if guided else None
    options = {"guidance": guidance, "rule": "starflow", "temperature": 0.5} if guided else {}
    expected = block_inverse(z, w, spec, **context, **options, backend="reference").x
    given = *(context.get(of) for of in ("cond", "prefix", "cos", "sin")), guidance
    prefix = 0 if given[1] is None else given[1].shape[1]
    shape = Shape(B, T, prefix, 1 + guided, 0 if given[0] is None else 1, "starflow")
    steps, seen = T if spec.start else T - 1, []

    def size(of):
        return 10 * bucket(of.samples)

    def session(of):
        keys.append(of)
        return sessions.get(model, of, size(of), budget, lambda: FakeGraph(w, spec, of))

    given = z.flip(1) if spec.flip else z, given, shape, options.get("temperature", 1.0), size, budget, session
    with reporting_to(lambda *at: seen.append(at)):
        x, _ = sample(z, steps, lambda: None, loaded(*given))
    assert_same_row("reference", x.flip(1) if spec.flip else x, expected)
    most = {10**9: 8, 45: 4, 1: 1}[budget]
    assert [key.samples for key in keys] == {8: [8], 4: [4, 4], 1: [1] * 7}[most]
    assert sum(kept.loads for _, kept in sessions._kept.values()) == len(keys)
    assert seen == sorted(seen) and seen[-1] == (B * T, B * T)
