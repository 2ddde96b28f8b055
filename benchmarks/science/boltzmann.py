"""Boltzmann generators: flows that learn samples of a system first and its energy second, and then reweight to it.

    pip install 'starflow-kernels[adapters]'
    python -m benchmarks.science.boltzmann --json benchmarks/results/boltzmann_cpu.json

A flow is trained by likelihood on reference samples; or so for half of the CPU time, and then by the sum of that loss
and the reverse KL divergence (arXiv 1812.01729), the mean of log q(x) + energy(x) over its own samples, whose gradient
runs through the inverse. Samples of the flow with weights exp(-energy) / q estimate the free energy -log Z in kT. The
truth is a quadrature (double wells) or the estimate of the reference simulation (Lennard-Jones). CPU time, that of one
thread, does not depend on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import json

import torch
import zuko
from torch import nn

from ..command import benchmark
from .estimators import bridge_log_z, effective_sample_size, log_z, with_error
from .flows import Peer, fit, token_flow
from .reference import Reference, simulate
from .systems import Chain, LennardJones

BATCH = 256
# Energies beyond this one, above the mean, count by their logarithm in training, as in arXiv 1812.01729.
CUT = 20.0
RATES = {"likelihood": 2e-3, "both": 2e-4}
# Stages and their shares of the CPU time; a flow is judged after each.
PLANS = [("likelihood", 1.0)], [("likelihood", 0.5), ("both", 0.5)]
# Each with the number of couplings of its simulation, and settings of a TokenFlow that differ from those of the preset.
SYSTEMS = {
    "double wells": (Chain(), 8, {"channels": 32}),
    "Lennard-Jones": (LennardJones(), 16, {"layers": (2,) * 8}),
}


def build(kind: str, system, settings: dict) -> nn.Module:
    """Return an untrained flow on vectors of all coordinates."""
    features = system.particles * system.dim
    if kind == "TokenFlow":
        return token_flow(features, token_dim=system.dim, **settings)
    return Peer(kind, features)


class Problem:
    """A system in units in which coordinates have variance 1, with its reference samples.

    Args:
        system: the system.
        reference: its samples, of which the last fifth of the run is for tests.
        seed: seed of the choice of samples, and of the symmetries of the system that are applied to them.
    """

    def __init__(self, system, reference: Reference, seed: int = 0):
        self.system, self.random = system, torch.Generator().manual_seed(seed)
        border = len(reference.samples) * 4 // 5
        self.train, self.test = reference.samples[:border].flatten(0, 1), reference.samples[border:].flatten(0, 1)
        self.scale = self.train.std().item()
        self.cut = system.energy(self.train).mean().item() + CUT

    def draw(self, source: torch.Tensor, count: int) -> torch.Tensor:
        """Return random reference samples (count, F)."""
        x = source[torch.randint(len(source), (count,), generator=self.random)]
        return self.system.coordinates(self.system.equivalent(x, self.random) / self.scale)

    def energy(self, y: torch.Tensor) -> torch.Tensor:
        """Return the energy (n,) of coordinates (n, F), with the volume of the change to them."""
        x, volume = self.system.positions(y)
        return self.system.energy(x * self.scale) - volume - y.shape[1] * torch.tensor(self.scale).log()

    def losses(self, flow: nn.Module) -> dict:
        """Return the losses of both stages."""

        def likelihood() -> torch.Tensor:
            return -flow.log_prob(self.draw(self.train, BATCH)).mean()

        def reverse_kl() -> torch.Tensor:
            y, log_prob = flow.rsample(BATCH)
            energy = self.energy(y)
            beyond = (energy - self.cut).clamp_min(0)
            return (log_prob + energy - beyond + beyond.log1p()).mean()

        return {"likelihood": likelihood, "both": lambda: likelihood() + reverse_kl()}

    @torch.no_grad()
    def log_weights(self, flow: nn.Module, y: torch.Tensor) -> torch.Tensor:
        """Return exp(-energy) / density (n,) of samples, as logarithms; -inf where they are not finite."""
        parts = [-self.energy(part.double()) - flow.log_prob(part) for part in y.split(10_000)]
        return torch.cat(parts).nan_to_num(-torch.inf, -torch.inf, -torch.inf)

    def judge(self, flow: nn.Module, count: int, truth: float) -> dict:
        """Return the quality of a flow by `count` samples; truth: log partition function."""
        own = self.log_weights(flow, flow.sample(count))
        reference = self.log_weights(flow, self.draw(self.test, count))
        found = {"kl_from_system": reference.mean().item() - truth}
        for name, estimate, *samples in (
            ("ess", effective_sample_size, own),
            ("free_energy", lambda w: -log_z(w), own),
            ("free_energy_bridge", lambda *w: -bridge_log_z(*w), own, reference),
        ):
            value, error = with_error(estimate, *samples)
            found |= {name: value, f"{name}_error": error}
        return found


def rows(name: str, kinds: list[str], seconds: float, count: int, **simulation) -> tuple[list[dict], dict]:
    """Return the rows of a system, and its reference."""
    system, couplings, settings = SYSTEMS[name]
    reference = simulate(system, couplings, **simulation)
    simulated = {
        "free_energy": -reference.log_z, "error": reference.error, "halves": [-value for value in reference.halves],
        "r_hat": reference.r_hat, "exchanges": reference.exchanges, "moves": reference.moves,
        "samples": reference.samples[..., 0, 0].numel(),
    }  # fmt: skip
    truth = system.log_z() if hasattr(system, "log_z") else reference.log_z
    problem, found = Problem(system, reference), []
    for kind in kinds:
        for plan in PLANS:
            torch.manual_seed(0)
            flow, training, steps = build(kind, system, settings), [], []
            losses = problem.losses(flow)
            for stage, share in plan:
                steps.append(fit(flow, losses[stage], seconds * share, RATES[stage]))
                training.append(f"{stage} {seconds * share:g} s")
                head = {"case": f"{system.name}, {kind}, {' + '.join(training)}", "steps": steps.copy()}
                head["parameters"] = sum(p.numel() for p in flow.parameters())
                found.append(head | problem.judge(flow, count, truth))
                print(json.dumps(found[-1]), flush=True)
    return found, {"system": system.name, "free_energy": -truth, "simulation": simulated}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--flows", nargs="+", choices=("TokenFlow", "NSF"), default=["TokenFlow", "NSF"])
    parser.add_argument("--seconds", type=float, default=240, help="CPU time of the training of each flow")
    parser.add_argument("--count", type=int, default=20_000, help="samples that judge a flow")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the reference simulation")
    parser.add_argument("--warmup", type=int, default=500, help="steps before them")


def results(args: argparse.Namespace) -> dict:
    table, references = [], []
    for name in args.systems:
        found, reference = rows(name, args.flows, args.seconds, args.count, steps=args.steps, warmup=args.warmup)
        table += found
        references.append(reference)
    settings = {name: getattr(args, name) for name in ("seconds", "count", "steps", "warmup")}
    machine = {"zuko": zuko.__version__}
    return {"machine": machine, "settings": settings, "references": references, "rows": table}


main = benchmark(__doc__, results, options, threads=1)


if __name__ == "__main__":
    main()
