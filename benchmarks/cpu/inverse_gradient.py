"""Gradient of a loss of samples, on the CPU: block_inverse against autograd through a plain loop over tokens.

    python -m benchmarks.cpu.inverse_gradient --json benchmarks/results/inverse_gradient_cpu.json

The loop samples over a KV cache that grows by concatenation, with scaled_dot_product_attention, and autograd keeps what
each step needs. Every case runs in a process of its own, so that its peak memory counts nothing else. A case that takes
more than `--limit` bytes of memory is recorded as such. A result counts only where the gradients agree.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from starflow_kernels import BlockSpec, block_inverse

from ..command import benchmark, in_fresh_process
from ..machine import peak_bytes, reset_peak

SPEC = BlockSpec(token_dim=8, channels=128, layers=4, heads=4, head_dim=32, kv_heads=4, mlp_dim=512, start=True)
BATCH = 4
AGREEMENT = 1e-3


def plain_loop(z: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return x (B, T, D) by one step per token, which autograd differentiates."""
    (B, T, _), d = z.shape, SPEC.head_dim
    keys, values = ([None] * SPEC.layers for _ in range(2))
    token, tokens = w["start"].expand(B, 1, -1), []
    for t in range(T):
        h = F.linear(token, w["proj_in.weight"], w["proj_in.bias"])
        for i in range(SPEC.layers):

            def layer(name, x, i=i):
                return F.linear(x, w[f"layers.{i}.{name}.weight"], w[f"layers.{i}.{name}.bias"])

            def norm(name, x, i=i):
                return F.layer_norm(x, x.shape[-1:], w[f"layers.{i}.{name}.weight"], w[f"layers.{i}.{name}.bias"])

            q, k, v = layer("qkv", norm("attn_norm", h)).view(B, 1, 3, -1, d).permute(2, 0, 3, 1, 4)
            keys[i] = k if keys[i] is None else torch.cat([keys[i], k], 2)
            values[i] = v if values[i] is None else torch.cat([values[i], v], 2)
            attended = F.scaled_dot_product_attention(q, keys[i], values[i])
            h = h + layer("proj", attended.transpose(1, 2).flatten(2))
            h = h + layer("down", F.gelu(layer("up", norm("mlp_norm", h))))
        a, mu = F.linear(h, w["proj_out.weight"], w["proj_out.bias"]).chunk(2, -1)
        token = mu + a.exp() * z[:, t : t + 1]
        tokens.append(token)
    return torch.cat(tokens, 1)


WAYS = {"ours": lambda z, w: block_inverse(z, w, SPEC).x, "plain loop": plain_loop}


def inputs(tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return noise and weights with gradients; tokens depend on each other, and samples neither vanish nor explode."""
    torch.manual_seed(0)
    weights = {}
    for name, shape in SPEC.weight_shapes.items():
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        weights[name] = torch.randn(shape) * scale * (0.1 if name == "proj_out.weight" else 1)
        if name.endswith("norm.weight"):
            weights[name] += 1
    z = torch.randn(BATCH, tokens, SPEC.token_dim)
    return z.requires_grad_(), {name: weight.requires_grad_() for name, weight in weights.items()}


def measure(way: str, tokens: int, repeats: int, limit: int, threads: int) -> dict:
    """Return median seconds of both passes, peak memory beyond that at the start, and a digest of the gradients."""
    torch.set_num_threads(threads)
    z, w = inputs(tokens)
    WAYS[way](*inputs(2)).sum().backward()
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, seconds = reset_peak(), {"forward": [], "backward": []}
    for _ in range(repeats):
        start = time.perf_counter()
        x = WAYS[way](z, w)
        middle = time.perf_counter()
        gradients = torch.autograd.grad(x.square().sum(), [z, *w.values()])
        seconds["forward"].append(middle - start)
        seconds["backward"].append(time.perf_counter() - middle)
    digest = [g.double().norm().item() for g in gradients]
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "bytes": peak_bytes() - before,
        "bytes_of_tensors": sum(4 * t.numel() for t in (z, x, *gradients)),
        "norms": digest,
    }


def run(way: str, tokens: int, args: argparse.Namespace) -> dict:
    """Return the result of a case, measured in a process of its own."""
    try:
        return in_fresh_process(measure, way, tokens, args.repeats, args.limit, args.threads)
    except (MemoryError, RuntimeError) as error:
        return {"failed": str(error).splitlines()[0]}


def compare(tokens: int, args: argparse.Namespace) -> dict:
    """Return the row of a table."""
    found = {way: run(way, tokens, args) for way in WAYS}
    row = {"tokens": tokens, "batch": BATCH, **found}
    if not any("failed" in each for each in found.values()):
        ours, plain = (found[way].pop("norms") for way in WAYS)
        row["difference_of_norms"] = max(abs(a - b) / b for a, b in zip(ours, plain))
        assert row["difference_of_norms"] < AGREEMENT, f"gradients differ: {row['difference_of_norms']}"
        total = {way: sum(found[way]["seconds"].values()) for way in WAYS}
        row["ratio"] = total["plain loop"] / total["ours"]
    return row


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=int, default=16 * 2**30, help="bytes of address space per case")


def results(args: argparse.Namespace) -> dict:
    return {"rows": [compare(tokens, args) for tokens in args.tokens]}


main = benchmark(__doc__, results, options)


if __name__ == "__main__":
    main()
