"""Reference samples and free energies: Hamiltonian Monte Carlo with replica exchange along a path, and MBAR."""

from __future__ import annotations

import dataclasses
import math

import torch

GROUPS = 8


def mbar(energies: torch.Tensor, tol: float = 1e-6, limit: int = 10_000) -> torch.Tensor:
    """Return the free energies (K,) of K states, relative to the first (arXiv 0801.1426, eq. 11).

    Args:
        energies: (K, K, n) energy in state k of sample n that was drawn in state l, at [k, l, n]. States that follow
            each other should overlap.
        tol: largest change of the last iteration.
        limit: most iterations.
    """
    K, _, n = energies.shape
    steps = [(energies[k + 1, k : k + 2] - energies[k, k : k + 2]).median() for k in range(K - 1)]
    free = torch.stack([torch.zeros_like(energies[0, 0, 0]), *steps]).cumsum(0)
    flat = energies.flatten(1)
    for _ in range(limit):
        mixture = (free[:, None] - flat).logsumexp(0) + math.log(n)
        new = -(-flat - mixture).logsumexp(1)
        new = new - new[0]
        change, free = (new - free).abs().max(), new
        if change < tol:
            break
    return free


def split_r_hat(values: torch.Tensor) -> float:
    """Return the split R-hat of chains (steps, chains), 1 where all halves of all chains agree."""
    n = len(values) // 2
    halves = torch.cat([values[:n], values[-n:]], 1)
    within = halves.var(0).mean()
    between = n * halves.mean(0).var()
    return math.sqrt(((n - 1) / n * within + between / n) / within)


@dataclasses.dataclass
class Reference:
    """Samples of a system and its log partition function.

    Args:
        samples: (steps, chains, N, D) at coupling 1, float32.
        log_z: log partition function by MBAR.
        error: its standard error, from GROUPS groups of chains.
        halves: log_z of the first and of the second half of the run.
        r_hat: split R-hat of energy and of the sum of squares.
        exchanges: smallest acceptance of exchanges between neighbours.
        moves: smallest acceptance of Monte Carlo moves.
    """

    samples: torch.Tensor
    log_z: float
    error: float
    halves: tuple[float, float]
    r_hat: dict[str, float]
    exchanges: float
    moves: float


def forces(system, x: torch.Tensor, coupling: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return energy (K, M) and its gradient."""
    x = x.detach().requires_grad_()
    energy = system.energy(x, coupling)
    return energy.detach(), torch.autograd.grad(energy.sum(), x)[0]


def hmc(system, x, coupling, step, leaps: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions (K, M, N, D) after one Monte Carlo move, and the acceptance of each coupling (K,)."""
    energy, gradient = forces(system, x, coupling)
    p = torch.randn(x.shape, generator=random, dtype=x.dtype)
    start = energy + p.square().sum((-2, -1)) / 2
    step, y = step[:, None, None, None], x
    for _ in range(leaps):
        p = p - step / 2 * gradient
        y = y + step * p
        new, gradient = forces(system, y, coupling)
        p = p - step / 2 * gradient
    chance = (start - new - p.square().sum((-2, -1)) / 2).exp().clamp(max=1).nan_to_num(0)
    accepted = torch.rand(chance.shape, generator=random, dtype=x.dtype) < chance
    return torch.where(accepted[..., None, None], y, x), chance.mean(1)


def exchange(system, x, coupling, odd: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions after an exchange between couplings k and k + 1, k = odd, odd + 2, ..., and the acceptance."""
    low = torch.arange(odd, len(x) - 1, 2)
    a, b, ca, cb = x[low], x[low + 1], coupling[low], coupling[low + 1]
    gain = system.energy(a, ca) + system.energy(b, cb) - system.energy(a, cb) - system.energy(b, ca)
    chance = gain.exp().clamp(max=1)
    accepted = (torch.rand(chance.shape, generator=random, dtype=x.dtype) < chance)[..., None, None]
    x = x.clone()
    x[low], x[low + 1] = torch.where(accepted, b, a), torch.where(accepted, a, b)
    return x, chance.mean(1)


def simulate(
    system,
    couplings: int = 16,
    chains: int = 64,
    steps: int = 2000,
    warmup: int = 500,
    leaps: int = 8,
    thin: int = 2,
    seed: int = 0,
) -> Reference:
    """Run chains at all couplings from Gaussian starts, and return the samples at coupling 1.

    Args:
        system: energy(x, coupling) and start_log_z.
        couplings: states from coupling 0 to 1; more of them where the core hardens.
        chains: independent chains per coupling, a multiple of GROUPS.
        steps: moves per chain after the warm-up, each followed by an exchange.
        warmup: moves during which step sizes adapt to an acceptance of 0.8.
        leaps: leapfrog steps per move.
        thin: every how many steps a sample is kept.
        seed: seed of all random numbers.
    """
    random = torch.Generator().manual_seed(seed)
    grid = 1 - (1 - torch.linspace(0, 1, couplings, dtype=torch.float64)) ** 2
    coupling = grid[:, None]
    x = torch.randn(couplings, chains, system.particles, system.dim, generator=random, dtype=torch.float64)
    step = torch.full((couplings,), 0.05, dtype=torch.float64)
    # Allocated first: small results between large temporaries would fragment the memory.
    count, moves, swaps = steps // thin, [], []
    samples = torch.empty(count, *x.shape[1:])
    energies = torch.empty(count, couplings, couplings, chains, dtype=torch.float64)
    for i in range(-warmup, count * thin):
        x, moved = hmc(system, x, coupling, step, leaps, random)
        x, swapped = exchange(system, x, coupling, i % 2, random)
        if i < 0:
            step = step * torch.exp(0.05 * (moved - 0.8))
            continue
        moves.append(moved)
        swaps.append(swapped.min())
        if i % thin == 0:
            samples[i // thin] = x[-1]
            energies[i // thin] = system.energy(x[None], coupling[:, None])
    energies = energies.permute(1, 2, 3, 0)

    def log_z(part: torch.Tensor) -> float:
        return system.start_log_z - mbar(part.flatten(2)[..., :: max(1, part[0, 0].numel() // 4000)])[-1].item()

    groups = torch.tensor([log_z(part) for part in energies.chunk(GROUPS, 2)], dtype=torch.float64)
    half = energies.shape[-1] // 2
    observed = {"energy": system.energy(samples), "squares": samples.square().sum((-2, -1))}
    return Reference(
        samples,
        groups.mean().item(),
        groups.std().item() / GROUPS**0.5,
        (log_z(energies[..., :half]), log_z(energies[..., half:])),
        {name: split_r_hat(values) for name, values in observed.items()},
        torch.stack(swaps).mean().item(),
        torch.stack(moves).mean(0).min().item(),
    )
