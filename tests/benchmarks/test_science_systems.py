"""Energies, partition functions and reference simulations of the many-particle systems of the benchmarks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.science.reference import mbar, simulate, split_r_hat
from benchmarks.science.systems import CLOSEST, Chain, LennardJones

F64 = torch.float64
COUPLINGS = [0.0, 0.3, 1.0]
every_system = pytest.mark.parametrize("system", [Chain(), LennardJones()], ids=["chain", "lennard-jones"])


def generator():
    return torch.Generator().manual_seed(3)


def positions(system, count=1):
    """Positions near the points of a grid, so that no two particles of a cluster overlap."""
    axis = torch.arange(-1.0, 2.0, dtype=F64) * 1.1
    grid = torch.cartesian_prod(axis, axis, axis)[: system.particles, : system.dim].view(system.particles, -1)
    return grid + 0.1 * torch.randn(count, *grid.shape, generator=generator(), dtype=F64)


def chain(x, coupling):
    """Energy of lists of positions, by loops."""
    total = 0.0
    for (a,), (b,) in itertools.pairwise(x):
        total += (a - b) ** 2 / 2
    return total + sum(coupling * 2 * (a * a - 1) ** 2 + (1 - coupling) * a * a / 2 for (a,) in x)


def lennard_jones(x, coupling):
    """Energy of lists of positions, by loops."""
    total = sum(c * c for a in x for c in a) / 2
    for i, a in enumerate(x):
        for b in x[:i]:
            core = math.dist(a, b) ** 6 + (1 - coupling) / 2
            total += coupling * (core**-2 - 2 / core)
    return total


@every_system
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_energy_is_that_of_loops(system, coupling):
    x = positions(system, 3)
    loop = chain if isinstance(system, Chain) else lennard_jones
    expected = torch.tensor([loop(each, coupling) for each in x.tolist()], dtype=F64)
    torch.testing.assert_close(system.energy(x, coupling), expected, rtol=1e-12, atol=1e-12)


@every_system
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradient_is_that_of_differences(system, coupling):
    x = positions(system, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: system.energy(x, coupling), x, eps=1e-7, rtol=1e-4)


@every_system
def test_each_coupling_of_a_batch_is_its_own(system):
    x, couplings = positions(system, 3), torch.tensor(COUPLINGS, dtype=F64)
    together = system.energy(x[None].expand(3, -1, -1, -1), couplings[:, None])
    torch.testing.assert_close(together, torch.stack([system.energy(x, c) for c in COUPLINGS]))


@every_system
def test_equivalent_positions_have_the_same_energy(system):
    x = positions(system).expand(20, -1, -1)
    found = system.equivalent(x.float(), generator())
    torch.testing.assert_close(system.energy(found), system.energy(x.float()), rtol=1e-4, atol=1e-4)
    assert len(found.flatten(1).mul(100).round().unique(dim=0)) >= 4  # and they are not all the same


@every_system
def test_coordinates_are_a_change_of_variables(system):
    x = positions(system).double()
    y = system.coordinates(x)
    again, volume = system.positions(y)
    torch.testing.assert_close(system.energy(again), system.energy(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(system.coordinates(again), y)
    names = math.lgamma(14) if system.dim == 3 else 0
    for row, log_volume in zip(y, volume):
        jacobian = torch.autograd.functional.jacobian(lambda row: system.positions(row[None])[0].flatten(), row)
        assert log_volume == pytest.approx(torch.linalg.slogdet(jacobian)[1].item() + names, abs=1e-9)


def test_coordinates_do_not_depend_on_names():
    x = positions(LennardJones())
    torch.testing.assert_close(LennardJones().coordinates(x[:, torch.randperm(13)]), LennardJones().coordinates(x))


@every_system
def test_path_starts_at_a_gaussian_of_known_volume(system):
    n = system.particles * system.dim
    flat = positions(system).flatten()
    hessian = torch.autograd.functional.hessian(lambda x: system.energy(x.view(1, -1, system.dim), 0.0).sum(), flat)
    expected = n / 2 * math.log(2 * math.pi) - torch.linalg.slogdet(hessian)[1].item() / 2
    assert system.start_log_z == pytest.approx(expected, abs=1e-10)


def test_particles_on_top_of_each_other_have_a_finite_energy():
    x = torch.zeros(1, 13, 3, requires_grad=True)
    energy = LennardJones().energy(x)
    assert energy.isfinite() and energy > CLOSEST**-11
    assert torch.autograd.grad(energy.sum(), x)[0].isfinite().all()


def test_quadrature_of_a_chain_without_wells_is_a_gaussian_integral():
    """With height 0 and springs of strength 1 to the origin, log_z is that of coupling 0."""

    class Springs(Chain):
        def well(self, x):
            return x.square() / 2

    assert Springs().log_z(reach=12.0) == pytest.approx(Chain().start_log_z, abs=1e-9)


def test_quadrature_has_converged():
    assert Chain().log_z(100) == pytest.approx(Chain().log_z(), abs=1e-9)


def test_mbar_of_gaussians():
    """Free energies of widths s are -log s, to four standard errors of this many samples."""
    widths, random = torch.tensor([1.0, 0.7, 0.5], dtype=F64), torch.Generator().manual_seed(0)
    samples = widths[:, None] * torch.randn(3, 20_000, generator=random, dtype=F64)
    energies = samples.square() / (2 * widths.square()[:, None, None])
    torch.testing.assert_close(mbar(energies), -widths.log(), rtol=0, atol=0.02)


def test_simulation_of_double_wells_agrees_with_quadrature():
    found = simulate(Chain(), couplings=6, chains=32, steps=300, warmup=100)
    assert found.error < 0.05
    assert found.log_z == pytest.approx(Chain().log_z(), abs=4 * found.error)
    assert found.exchanges > 0.2
    assert max(found.r_hat.values()) < 1.05


def test_r_hat_sees_chains_that_disagree():
    values = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert split_r_hat(values) < 1.01
    assert split_r_hat(values + torch.arange(8) % 2) > 1.1
