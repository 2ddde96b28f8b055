"""Prose (arXiv 2508.18175) as a TokenFlow beside its own cached sampler and density pass, with the same weights.

    git clone https://github.com/transferable-samplers/transferable-samplers
    pip install einops
    python -m benchmarks.cpu.prose --upstream transferable-samplers/src --json benchmarks/results/prose_cpu.json

The weights are random, so that every layer acts; the sizes are those of the released model. A result counts only where
noise, samples and log-determinants agree.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from starflow.convert.prose import read_prose

from ..command import benchmark
from ..peers.released import timed

AGREEMENT = 1e-5


def upstream(folder: Path, args: argparse.Namespace) -> tuple[nn.Module, list[str]]:
    """Return the released module with random weights, and the names of its permutations."""
    sys.path.insert(0, str(folder))
    tarflow = importlib.import_module("transferable_samplers.nn.tarflow.tarflow")
    embedder = importlib.import_module("transferable_samplers.nn.embedder")
    torch.manual_seed(0)
    keys, C = [f"order {i}" for i in range(args.blocks)], args.channels
    model = tarflow.TarFlow(
        input_dimension=3,
        max_num_tokens=args.atoms,
        channels=C,
        num_blocks=args.blocks,
        layers_per_block=args.layers,
        use_adapt_ln=True,
        use_transition=True,
        use_qkln=True,
        lookahead_conditioning=True,
        pos_embed_type="sinusoidal",
        permutation_keys=keys,
        cond_embed=embedder.ConditionalEmbedder(C, C, sinusoid_div_value=1000),
    )
    for name, weight in model.named_parameters():
        if name.endswith("proj_out.weight"):
            nn.init.normal_(weight, std=0.1 * C**-0.5)
        elif "to_adaln_zero_gamma" in name and weight.ndim == 2:
            nn.init.normal_(weight, std=C**-0.5)
    return model.eval(), keys


@torch.no_grad()
def compare(batch: int, args: argparse.Namespace) -> dict:
    """Return a row: seconds of both samplers and density passes, and the largest differences."""
    model, keys = upstream(args.upstream, args)
    flow = read_prose(model.state_dict())
    T = args.atoms
    atoms = torch.stack([torch.randint(1, high, (batch, T)) for high in (100, 21, 9)], -1)
    atoms = torch.cat([atoms, torch.full((batch, T, 1), 8)], -1)
    encodings = dict(zip(("atom_type", "aa_type", "aa_pos"), atoms.unbind(-1)), seq_len=atoms[:, :1, 3])
    orders = [torch.stack([torch.randperm(T) for _ in range(batch)]) for _ in keys]
    permutations, mask = dict(zip(keys, orders)), torch.ones(batch, T)
    z = torch.randn(batch, T, 3)
    ways = {
        "sampler": (
            lambda: flow.inverse(z, atoms, order=orders),
            lambda: model.reverse(z, permutations, encodings),
        ),
        "density": (
            lambda: flow(z, atoms, order=orders),
            lambda: model(z, permutations, encodings, mask=mask),
        ),
    }
    row = {"batch": batch, "atoms": T, "channels": args.channels, "blocks": args.blocks, "layers": args.layers}
    for name, (ours, theirs) in ways.items():
        found, (tokens, logdet) = ours(), theirs()
        values = found.x if name == "sampler" else found.z
        errors = (values - tokens).abs().max().item(), ((found.logdet - logdet).abs() / T).max().item()
        assert max(errors) < AGREEMENT * max(1.0, tokens.abs().max().item()), f"{name}: results differ by {errors}"
        seconds = [min(timed(way)[1] for _ in range(args.repeats)) for way in (ours, theirs)]
        row[name] = {"seconds": seconds[0], "upstream_seconds": seconds[1], "ratio": seconds[1] / seconds[0]}
        row[name] |= {"difference": errors[0], "logdet_difference_per_token": errors[1]}
    return row


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upstream", type=Path, required=True, help="folder src of transferable-samplers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--atoms", type=int, default=64)
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)


def results(args: argparse.Namespace) -> dict:
    return {"rows": [compare(batch, args) for batch in args.batch]}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
