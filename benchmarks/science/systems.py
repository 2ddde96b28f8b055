"""Many-particle systems: energies in units of kT, a path to a Gaussian, and what is known of the partition function.

Positions are (..., N, D).
"""

from __future__ import annotations

import dataclasses
import math

import torch

CLOSEST = 1e-2
CLOSEST_GAP = 1e-6


@dataclasses.dataclass(frozen=True)
class Chain:
    """A chain of particles, each in a double well, height (x^2 - 1)^2, with springs (x_i - x_j)^2 / 2 between them.

    The path scales the wells by the coupling, and springs x^2 / 2 by the rest.
    """

    particles: int = 8
    dim: int = 1
    height: float = 2.0
    name: str = "chain of 8 double wells"

    def well(self, x: torch.Tensor) -> torch.Tensor:
        """Return the energy of each particle in its well."""
        return self.height * (x.square() - 1).square()

    def energy(self, x: torch.Tensor, coupling: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Return the energy (...); coupling in [0, 1], 1 for the system itself and 0 for a Gaussian."""
        x = x.squeeze(-1)
        return (
            coupling * self.well(x).sum(-1)
            + ((1 - coupling) * x.square().sum(-1) + x.diff(dim=-1).square().sum(-1)) / 2
        )

    def equivalent(self, x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Return positions (n, N, 1) of the same energy: reflected and in reverse order at random."""
        sign, reverse = torch.randint(2, (2, len(x), 1, 1), generator=random)
        return torch.where(reverse == 1, x.flip(1), x) * (2 * sign - 1)

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a flow learns (n, F), for positions (n, N, 1): the positions."""
        return x.flatten(1)

    def positions(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions (n, N, 1) for coordinates (n, F), and the log volume (n,) of the map."""
        return y[..., None], y.new_zeros(len(y))

    @property
    def start_log_z(self) -> float:
        """Log partition function at coupling 0."""
        # Of identity + second differences, the determinant is that of a three-term recursion.
        before, now = 1.0, 2.0
        for _ in range(self.particles - 2):
            before, now = now, 3 * now - before
        return self.particles / 2 * math.log(2 * math.pi) - math.log(2 * now - before) / 2

    def log_z(self, points: int = 400, reach: float = 5.0) -> float:
        """Return the log partition function by quadrature, one particle after the other."""
        x = torch.linspace(-reach, reach, points, dtype=torch.float64)
        well = torch.exp(-self.well(x)) * 2 * reach / (points - 1)
        spring = torch.exp(-(x[:, None] - x).square() / 2)
        total = well
        for _ in range(self.particles - 1):
            total = well * (spring @ total)
        return total.sum().log().item()


@dataclasses.dataclass(frozen=True)
class LennardJones:
    """Lennard-Jones cluster: (1/d)^12 - 2 (1/d)^6 per pair, and |x|^2 / 2 per particle (LJ-13, arXiv 2006.02425).

    The tether of a particle to the origin is that to the center of mass and one of the center of mass itself, without
    which translations would make the partition function infinite. The path softens the core, d^6 becomes
    d^6 + (1 - coupling) / 2, and scales the pair energies by the coupling.
    """

    particles: int = 13
    dim: int = 3
    name: str = "13 Lennard-Jones particles"

    def energy(self, x: torch.Tensor, coupling: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Return the energy (...); coupling in [0, 1], 1 for the system itself and 0 for a Gaussian."""
        coupling = torch.as_tensor(coupling, dtype=x.dtype)
        inverse = 1 / (square_distances(x) ** 3 + (1 - coupling[..., None]) / 2)
        return coupling * (inverse.square() - 2 * inverse).sum(-1) + x.square().sum((-2, -1)) / 2

    def equivalent(self, x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        """Return positions (n, N, D) of the same energy: rotated and reflected at random."""
        n, _, dim = x.shape
        turn = torch.linalg.qr(torch.randn(n, dim, dim, generator=random))[0]
        mirror = torch.randint(2, (n, 1, dim), generator=random) * 2 - 1
        return x @ (turn * mirror)

    def coordinates(self, x: torch.Tensor) -> torch.Tensor:
        """Return what a flow learns (n, F), for positions (n, N, D): those of the particles in ascending order of x.

        So a flow need not learn the N! names that the particles can have. In place of x of a particle there is the
        inverse softplus of its difference to the one before, which keeps the order.
        """
        x = x.gather(1, x[..., :1].argsort(1).expand_as(x))
        gap = x[..., 0].diff(dim=1).clamp_min(CLOSEST_GAP)
        first = torch.cat([x[:, :1, 0], gap + (-torch.expm1(-gap)).log()], 1)
        return torch.cat([first[..., None], x[..., 1:]], -1).flatten(1)

    def positions(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions (n, N, D) for coordinates (n, F), and the log volume (n,) of the map, of all N! names."""
        y = y.unflatten(1, (self.particles, self.dim))
        gap = torch.nn.functional.softplus(y[:, 1:, 0])
        first = torch.cat([y[:, :1, 0], gap], 1).cumsum(1)
        volume = torch.nn.functional.logsigmoid(y[:, 1:, 0]).sum(1) + math.lgamma(self.particles + 1)
        return torch.cat([first[..., None], y[..., 1:]], -1), volume

    @property
    def start_log_z(self) -> float:
        """Log partition function at coupling 0."""
        return self.particles * self.dim / 2 * math.log(2 * math.pi)


def square_distances(x: torch.Tensor) -> torch.Tensor:
    """Return the squares of the distances of all pairs (..., N (N - 1) / 2), at least CLOSEST^2: no core overflows."""
    i, j = torch.triu_indices(x.shape[-2], x.shape[-2], 1, device=x.device)
    return (x[..., i, :] - x[..., j, :]).square().sum(-1).clamp_min(CLOSEST**2)
