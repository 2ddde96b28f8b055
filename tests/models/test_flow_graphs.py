"""A flow is one graph of torch.compile and torch.export, in training, density and sampling."""

from __future__ import annotations

import math

import pytest
import torch
from support.contract import compiled
from torch._subclasses.fake_tensor import FakeTensorMode

from starflow import Flow, FlowConfig, Guidance
from starflow.models.tokens import rotary_table
from starflow_kernels import Solver

SMALL = {"image_size": 4, "image_channels": 2, "patch_size": 2, "channels": 16, "layers": (1, 1), "head_dim": 8}
VARIANTS = {
    "tarflow": {"num_classes": 3},
    "volume-preserving": {"num_classes": 3, "scale": "unit"},
    "starflow": {"num_classes": 3, "scale": "softplus", "start": True, "rotary": "half", "final_norm": True},
    "starflow-text": {"text_dim": 5, "text_len": 3, "scale": "softplus", "start": True, "rotary": "interleaved"},
}
SAMPLING = {
    "sequential": {},
    "jacobi": {"solvers": Solver("jacobi", window=3, neighbours=(1,))},
    "int8": {"solvers": Solver("jacobi"), "quantize": "int8"},
    "guided": {"guidance": Guidance(1.5, annealed=True)},
    "reference": {"backend": "reference"},
}
every_way = pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())


def make(name: str = "tarflow", **changes) -> Flow:
    """Return a flow in training whose heads are not zero."""
    flow = Flow(FlowConfig(**{**SMALL, **VARIANTS[name], **changes}))
    for parameter in flow.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return flow


def inputs(flow: Flow, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor | None, ...]:
    """Return images or noise, labels and text."""
    config = flow.config
    x = torch.randn(batch, config.image_channels, config.image_size, config.image_size, dtype=dtype)
    labels = torch.arange(batch) % 4 - 1 if config.num_classes else None
    return x, labels, torch.randn(batch, config.text_len, config.text_dim, dtype=dtype) if config.text_dim else None


def gradients(objective, flow: Flow, *args):
    """Return the value of an objective and its gradients of all parameters."""
    value = objective(*args)
    return [value, *torch.autograd.grad(value, list(flow.parameters()), materialize_grads=True)]


@pytest.mark.parametrize(
    "name, dtype", [*((name, torch.float32) for name in VARIANTS), ("starflow-text", torch.float64)], ids=str
)
def test_training_is_one_graph(name, dtype):
    flow = make(name).to(dtype)
    given = inputs(flow, dtype=dtype)

    def objective(*args):
        return flow.loss(flow(*args), latent_penalty=0.1) - flow.log_prob(*args).mean()

    found, expected = (gradients(f, flow, *given) for f in (compiled(objective), objective))
    torch.testing.assert_close(found, expected)


def test_training_is_one_graph_for_all_batch_sizes():
    flow, graphs = make("starflow"), []

    def backend(module, example):
        graphs.append(module)
        return module

    def objective(x, labels):
        return flow.loss(flow(x, labels))

    graph = compiled(objective, backend, dynamic=True)
    # torch takes sizes that are equal at first for the same size, and there are two channels.
    for batch in (3, 5):
        x, labels, _ = inputs(flow, batch)
        torch.testing.assert_close(gradients(graph, flow, x, labels), gradients(objective, flow, x, labels))
    assert len(graphs) == 1


def test_density_and_sampling_compile_to_machine_code():
    flow = make("tarflow", layers=(1,)).requires_grad_(False)
    x, labels, _ = inputs(flow)

    def both(x, labels):
        return flow.log_prob(x, labels), flow.inverse(x, labels).x

    torch.testing.assert_close(compiled(both, "inductor")(x, labels), both(x, labels))


@pytest.mark.parametrize("name", ["tarflow", "starflow-text"])
@every_way
def test_sampling_is_one_graph(name, options):
    flow = make(name)
    z, labels, text = inputs(flow)
    if text is not None:
        options = {**options, "empty_text": torch.zeros_like(text[:1])}
    graph = compiled(lambda *args: flow.inverse(*args, **options).x)
    assert torch.equal(graph(z, labels, text), flow.inverse(z, labels, text, **options).x)


@pytest.mark.parametrize("labels", [[0, 2], (1, -1), range(2)], ids=str)
def test_a_graph_takes_labels_as_a_sequence(labels):
    flow = make()
    x, _, _ = inputs(flow)
    graph = compiled(lambda x: flow.log_prob(x, labels))
    torch.testing.assert_close(graph(x), flow.log_prob(x, labels))


class Method(torch.nn.Module):
    """A method of a flow as the forward pass of a module, for torch.export."""

    def __init__(self, flow: Flow, name: str, **options):
        super().__init__()
        self.flow, self.name, self.options = flow, name, options

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = getattr(self.flow, self.name)(x, labels, **self.options)
        return found.x if self.name == "inverse" else found


def exported(module: Method, *args: torch.Tensor) -> torch.nn.Module:
    """Export a module for every batch size, write it to a file and read it."""
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, args, dynamic_shapes=tuple({0: batch} for _ in args))
    torch.export.save(program, "flow.pt2")
    return torch.export.load("flow.pt2").module()


@every_way
@pytest.mark.parametrize("name", ["tarflow", "starflow"])
def test_an_exported_inverse_takes_other_batch_sizes(name, options):
    flow = make(name)
    graph = exported(Method(flow, "inverse", **options), *inputs(flow)[:2])
    for batch in (1, 2, 5):
        z, labels, _ = inputs(flow, batch)
        assert torch.equal(graph(z, labels), flow.inverse(z, labels, **options).x)


def test_an_inverse_exported_without_gradients_runs_where_they_are_enabled():
    flow = make()
    z, labels, _ = inputs(flow)
    with torch.no_grad():
        graph = exported(Method(flow, "inverse"), z, labels)
    assert torch.equal(graph(z, labels), flow.inverse(z, labels).x)


@pytest.mark.parametrize("name", ["tarflow", "volume-preserving", "starflow"])
@pytest.mark.parametrize("trainable", [True, False])
def test_an_exported_density_takes_other_batch_sizes(name, trainable):
    flow = make(name).requires_grad_(trainable)
    graph = exported(Method(flow, "log_prob"), *inputs(flow)[:2])
    for batch in (1, 2, 5):
        x, labels, _ = inputs(flow, batch)
        torch.testing.assert_close(graph(x, labels), flow.log_prob(x, labels))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_ops():
    flow = make()
    z, labels, _ = inputs(flow)
    trace = torch.jit.trace(Method(flow, "inverse"), (z, labels))
    assert torch.equal(trace(z.flip(0), labels), flow.inverse(z.flip(0), labels).x)


def test_an_exported_inverse_refuses_noise_that_is_not_finite():
    flow = make()
    z, labels, _ = inputs(flow)
    graph = exported(Method(flow, "inverse"), z, labels)
    # torch leaves gradients disabled after an error in a graph with a part under torch.no_grad().
    with torch.enable_grad(), pytest.raises(ValueError, match=r"^z: 32 of 32 values are not finite"):
        graph(z[:1] * math.nan, labels[:1])


def test_fake_tensors_leave_nothing_behind():
    # No other test uses this size, so that no table of it is in the cache yet.
    flow = make("starflow", image_size=26)
    x, labels, _ = inputs(flow)
    with FakeTensorMode() as mode:
        fake = make("starflow", image_size=26)
        found = fake.log_prob(mode.from_tensor(x), mode.from_tensor(labels))
        drawn = fake.inverse(mode.from_tensor(x), mode.from_tensor(labels), solvers=Solver("jacobi")).x
    assert found.shape == (2,) and drawn.shape == x.shape
    assert flow.log_prob(x, labels).isfinite().all()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.functionalize])
def test_transforms_leave_no_rotary_table_behind(transform):
    # No other test uses these sizes.
    arguments = ((5, 7 + len(transform.__name__)), 8, 5), torch.float32, torch.device("cpu")
    transform(lambda x: (x * rotary_table(*arguments)[0].sum()).sum())(torch.ones(3))
    # A tensor of a transform has no memory of its own.
    assert all(table.data_ptr() for table in rotary_table(*arguments))
