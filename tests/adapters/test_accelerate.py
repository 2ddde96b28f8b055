"""Mechanism of `accelerate`, and the iteration that it puts in place of slow inverses."""

import copy

import pytest
import torch
from torch import nn

from starflow_kernels import accelerate, restore
from starflow_kernels.accelerate.autoregressive import Autoregressive
from starflow_kernels.accelerate.networks import places
from starflow_kernels.accelerate.swap import Accelerated, disagreement, fast_class

ROWS, D = 9, 12


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return 2 * x * self.weight


class FastTwice(Accelerated):
    description = "a shift"

    def forward(self, x):
        return x * self.weight + x * self.weight


def coupled(sizes):
    """A step in which each value depends on the one before it, by the strength that is its context."""

    def step(x, y, context):
        sizes.append(len(x))
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return y + context * before.sin()

    return step


class Solved(Autoregressive):
    tol = None

    def __init__(self, sizes):
        self.step = coupled(sizes)

    def network(self):
        return nn.Identity()

    def places(self):
        return torch.arange(D)

    def loop(self, y, context):
        x = torch.zeros_like(y)
        for _ in range(D):
            x = self.step(x, y, context)
        return x


def run(context, y, sizes=None):
    """What the iteration finds, and the result of a plain loop."""
    solved = Solved([] if sizes is None else sizes)
    return solved.solve(y, context)[0], solved.loop(y, context)


def test_samples_that_are_done_leave_the_batch():
    sizes = []
    y, context = torch.ones(ROWS, D).double(), torch.zeros(ROWS, 1).double()
    context[4] = 1.0
    found, expected = run(context, y, sizes)
    assert torch.equal(found, expected)
    assert sizes[:D] == [ROWS] * 2 + [1] * (D - 2)


def test_not_a_number_stays_in_its_row():
    y = torch.ones(ROWS, D).double()
    y[3, 5] = torch.nan
    found, expected = run(torch.full((ROWS, 1), 0.5).double(), y)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[3].isnan().any() and found[:3].isfinite().all() and found[4:].isfinite().all()


def test_steep_steps_take_all_passes():
    sizes = []
    y, context = torch.linspace(-2, 2, ROWS * D).reshape(ROWS, D).double(), torch.full((ROWS, 1), 50.0).double()
    found, expected = run(context, y, sizes)
    assert torch.equal(found, expected) and len(sizes) == 2 * D


def test_gradients_of_steep_steps():
    y = torch.linspace(-2, 2, ROWS * D).reshape(ROWS, D).double().requires_grad_()
    context = torch.full((ROWS, 1), 5.0).double().requires_grad_()
    found, expected = (torch.autograd.grad(x.square().sum(), [y, context]) for x in run(context, y))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_places_follow_the_longest_chain():
    depends = torch.zeros(4, 4, dtype=torch.bool)
    depends[0, 3] = depends[2, 0] = depends[2, 3] = True
    assert places(depends).tolist() == [1, 0, 2, 0]


def test_a_model_without_a_known_module():
    report = accelerate(nn.Linear(2, 2))
    assert not report.parts and "no module" in str(report)


def test_classes_in_front_of_others_are_made_once():
    assert fast_class(FastTwice, Twice, None) is fast_class(FastTwice, Twice, None)


def test_an_exchanged_class_is_copied_and_restored():
    module = Twice()
    module.__class__ = fast_class(FastTwice, Twice, None)
    assert isinstance(module, Twice) and type(copy.deepcopy(module)) is type(module)
    restore(nn.Sequential(module))
    assert type(module) is Twice


def test_a_difference_is_reported():
    module = Twice()
    x = torch.ones(2, 3)
    assert disagreement(module, lambda m: (m(x.double()), m(x.double()))) is None
    assert "differs" in disagreement(module, lambda m: (m(x.double()), m(x.double()) + 1e-6))
    assert "nan" in disagreement(module, lambda m: (m(x.double()), m(x.double()) * torch.nan))


def test_modules_that_do_not_compute_in_float64_are_compared_in_their_dtype():
    x = torch.ones(2, 3)

    def compare(module):
        if module.weight.dtype == torch.float64:
            raise RuntimeError("no float64")
        return module(x), module(x) + 1e-6

    assert disagreement(Twice(), compare) is None


def test_a_comparison_changes_no_module():
    module = Twice().train()
    disagreement(module, lambda m: (m(torch.ones(3)), m(torch.ones(3))))
    assert module.training and module.weight.dtype == torch.float32


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_every_protocol_of_pickle(protocol):
    module = Twice()
    module.__class__ = fast_class(FastTwice, Twice, None)
    build, arguments, *_ = module.__reduce_ex__(protocol)
    assert type(build(*arguments)) is type(module)
