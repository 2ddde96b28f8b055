"""Time of the fingerprint that shows whether weights have changed, per call of a block on the CPU.

    python -m benchmarks.cpu.fingerprint --json benchmarks/results/fingerprint_cpu.json

Every row has the times of the fingerprint and of a call with its weights, which includes it, and its share of the call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from starflow_kernels import BlockSpec, block_forward, block_inverse
from starflow_kernels.block import native

from ..command import benchmark

# Name -> values per token, channels, layers, heads, tokens, and batch sizes of the calls.
BLOCKS = {
    "8x8 images": (4, 64, 2, 1, 16, (1, 100)),
    "32x32 images": (12, 128, 4, 2, 256, (1, 16)),
    "AFHQ-256": (192, 768, 8, 12, 1024, (1,)),
}
SECONDS = 1.0


def fastest(run: Callable[[], object]) -> float:
    """Return the smallest time of a call within `SECONDS`, of at least three."""
    times, end = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def rows(name: str) -> list[dict]:
    """Return the rows of a block, one per call."""
    D, C, layers, heads, T, batches = BLOCKS[name]
    spec = BlockSpec(
        token_dim=D, channels=C, layers=layers, heads=heads, head_dim=C // heads, kv_heads=heads, mlp_dim=4 * C,
        positions=T,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    weights = {key: 0.02 * normal(*shape) for key, shape in spec.weight_shapes.items()}
    text, tensors, found = spec.to_json(), list(weights.values()), []
    for B in batches:
        z = normal(B, T, D)
        for call in (block_inverse, block_forward):
            whole = fastest(lambda call=call, z=z: call(z, weights, spec, backend="native"))
            part = fastest(lambda: native.fingerprint(text, tensors))
            row = {"case": name, "batch": B, "call": call.__name__, "megabytes": sum(w.nbytes for w in tensors) / 1e6}
            found.append({**row, "microseconds": 1e6 * whole, "fingerprint": 1e6 * part, "share": part / whole})
    return found


def markdown(found: list[dict]) -> str:
    """Format the rows as a table."""
    lines = ["| block | MB | call | batch | call, us | fingerprint, us | share |", "|---|---|---|---|---|---|---|"]
    for row in found:
        lines.append(
            f"| {row['case']} | {row['megabytes']:.1f} | {row['call']} | {row['batch']} | {row['microseconds']:.0f} "
            f"| {row['fingerprint']:.1f} | {row['share']:.2%} |"
        )
    return "\n".join(lines)


def results(args: argparse.Namespace) -> dict:
    found = [row for name in BLOCKS for row in rows(name)]
    print(markdown(found))
    return {"rows": found}


main = benchmark(__doc__, results)


if __name__ == "__main__":
    main()
