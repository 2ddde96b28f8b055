"""solve_inverse: the inverse of any causal conditioner."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import naive_affine, naive_raw, strided

from starflow_kernels import AffineSpec, SolveReport, affine_flow, solve_inverse

F64 = torch.float64
SPECS = [AffineSpec(scale, clip) for scale in ("exp", "softplus", "unit") for clip in (0.0, 1.5)]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[f"{s.scale}{'-clip' if s.soft_clip else ''}" for s in SPECS])
every_order = pytest.mark.parametrize("order", ["ascending", "descending", "random"])


def permutation(order: str, T: int) -> torch.Tensor | None:
    return {"ascending": None, "descending": torch.arange(T).flip(0), "random": torch.randperm(T)}[order]


class Conditioner:
    """Two masked layers in the manner of MADE: the parameters of a token see only the tokens before it in the order."""

    def __init__(self, T, D, P, order=None, hidden=6, dtype=F64):
        rank = torch.arange(T) if order is None else order.argsort()
        self.earlier = (rank[:, None] > rank[None, :]).to(dtype)
        self.same_or_earlier = (rank[:, None] >= rank[None, :]).to(dtype)
        self.mix = [torch.randn(T, T, dtype=F64).to(dtype) * 0.5 for _ in range(2)]
        self.heads = [(torch.randn(s, dtype=F64) * 0.5).to(dtype) for s in ((D, hidden), (hidden, P))]
        self.bias = (torch.randn(T, P, dtype=F64) * 0.5).to(dtype)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        h = torch.einsum("ts,bsd,dh->bth", self.mix[0] * self.earlier, x, self.heads[0]).tanh()
        return torch.einsum("ts,bsh,hp->btp", self.mix[1] * self.same_or_earlier, h, self.heads[1]) + self.bias


@every_spec
@every_order
@pytest.mark.parametrize("T, D", [(6, 3), (9, 1)], ids=["tokens", "scalars"])
def test_density_of_the_result_is_the_noise(spec, order, T, D):
    order = permutation(order, T)
    conditioner = Conditioner(T, D, spec.params_dim(D), order)
    z = torch.randn(4, T, D, dtype=F64)
    x, report = solve_inverse(conditioner, z, spec, order=order)
    torch.testing.assert_close(naive_affine(x, conditioner(x), spec)[0], z, rtol=0, atol=1e-9)
    assert (report.method, report.passes, report.tokens) == ("sequential", T, 4 * T * T)
    assert report.certificate is None and report.seconds > 0


@every_spec
def test_matches_a_loop_over_single_tokens(spec):
    """Rows one by one, tokens one by one, from what has been generated alone."""
    order = permutation("random", 6)
    conditioner, z = Conditioner(6, 3, spec.params_dim(3), order), torch.randn(2, 6, 3, dtype=F64)
    expected = torch.full_like(z, 1e6)
    for i in range(2):
        for t in order.tolist():
            mu, sigma = naive_raw(conditioner(expected[i : i + 1])[0, t], spec)
            expected[i, t] = mu + sigma * z[i, t]
    x, _ = solve_inverse(conditioner, z, spec, order=order)
    torch.testing.assert_close(x, expected, rtol=1e-11, atol=1e-11)


@every_order
def test_round_trip(order):
    spec, order = AffineSpec("softplus", 4.0), permutation(order, 6)
    conditioner, x = Conditioner(6, 3, 6, order), torch.randn(2, 6, 3, dtype=F64)
    z, _ = affine_flow(x, conditioner(x), spec)
    torch.testing.assert_close(solve_inverse(conditioner, z, spec, order=order)[0], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 63, 111])
def test_sizes(T):
    spec = AffineSpec("softplus", 4.0)
    conditioner, z = Conditioner(T, 2, 4), torch.randn(2, T, 2, dtype=F64)
    conditioner.mix = [mix / T**0.5 for mix in conditioner.mix]
    x, report = solve_inverse(conditioner, z, spec, certify=True)
    assert report.passes == T and conditioner.calls == T + 1
    torch.testing.assert_close(naive_affine(x, conditioner(x), spec)[0], z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_certificate_is_the_residual(dtype):
    conditioner, z = Conditioner(6, 3, 6, dtype=dtype), torch.randn(2, 6, 3, dtype=dtype)
    x, report = solve_inverse(conditioner, z, certify=True)
    residual = (naive_affine(x, conditioner(x), AffineSpec())[0] - z).abs().max().item()
    eps = torch.finfo(dtype).eps
    assert report.certificate == pytest.approx(residual, abs=64 * eps)
    assert 0 <= report.certificate < 1e4 * eps


def test_certificate_exposes_a_conditioner_that_is_not_causal():
    order = torch.arange(6)
    conditioner, z = Conditioner(6, 3, 6, order), torch.randn(2, 6, 3, dtype=F64)
    _, report = solve_inverse(conditioner, z, order=order.flip(0), certify=True)
    assert report.certificate > 1e-3


def test_module_with_gradients_and_inputs_are_left_alone():
    layer = torch.nn.Linear(3, 6, dtype=F64)
    z = strided(torch.randn(2, 4, 3, dtype=F64)).requires_grad_()
    before = z.detach().clone()
    x, report = solve_inverse(lambda x: layer(torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]), z, certify=True)
    assert not x.requires_grad and torch.equal(z, before)
    assert report.certificate < 1e-12 and isinstance(report, SolveReport)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"z": 0.0}, TypeError, "z: expected a tensor"),
        ({"z": torch.zeros(4, 2)}, ValueError, r"z: expected shape \(B, T, D\)"),
        ({"z": torch.full((1, 4, 2), math.nan)}, ValueError, "z: 8 of 8 values are not finite"),
        ({"z": torch.tensor([[[0.0, math.inf]]])}, ValueError, "z: 1 of 2 values are not finite"),
        ({"method": "newton"}, ValueError, "method='newton': expected"),
        ({"order": [0, 1, 2, 3]}, TypeError, "order: expected an integer tensor, got list"),
        ({"order": torch.arange(4.0)}, TypeError, "order: expected an integer tensor, got torch.float32"),
        (
            {"order": torch.tensor([0, 1, 1, 3])},
            ValueError,
            r"order: expected a permutation of 0 .. 3, got \[0, 1, 1, 3\]",
        ),
        ({"order": torch.arange(1, 5)}, ValueError, "order: expected a permutation"),
        ({"order": torch.arange(3)}, ValueError, "order: expected a permutation"),
        ({"conditioner": lambda x: x}, ValueError, r"output of the conditioner: expected shape \(1, 4, 4\)"),
        ({"conditioner": lambda x: None}, TypeError, "output of the conditioner: expected a tensor"),
        ({"spec": AffineSpec("unit")}, ValueError, r"output of the conditioner: expected shape \(1, 4, 2\)"),
        ({"conditioner": lambda x: x.repeat(1, 1, 2) + 1e3}, ValueError, "x, the result: .* values are not finite"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"conditioner": lambda x: torch.zeros(1, 4, 4), "z": torch.ones(1, 4, 2)}
    with pytest.raises(error, match=message):
        solve_inverse(**{**arguments, **change})
