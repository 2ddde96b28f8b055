"""Time per token of long sequences on the CPU, where attention over the cache is most of the work.

    python -m benchmarks.cpu.long --json benchmarks/results/long_cpu.json

The last tokens of a sequence are sampled; those before are given as data, and one pass fills the cache with them,
which is not timed. The floor is weights and cache over the read bandwidth of that working set, or operations / peak.
The error is max |z - block_forward(x)| of the sampled tokens, by the kernel of the density direction.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from unittest import mock

import torch

from starflow_kernels import BlockSpec, block_forward, block_inverse
from starflow_kernels.block import native

from ..command import benchmark
from ..floor import block_work
from ..machine import peak_flops, read_bandwidth
from ..ops.bench_block import random_weights

# Channels -> layers. A wide block of 64k tokens would take minutes to fill, so it has fewer layers.
LAYERS = {128: 4, 768: 8}
TOKENS = (1024, 4096, 16384, 65536)
CASES = {
    f"C {C}, {layers} layer{'s' * (layers > 1)}, T {T}": (C, layers, T)
    for (C, deep), T in itertools.product(LAYERS.items(), TOKENS)
    for layers in [1 if C * T > 2**24 else deep]
}
SAMPLED, CALL = 256, 32
# Duration of a case; a case of long sequences takes as long as one call.
SECONDS = 3.0
AGREEMENT = 1e-3


def sample(z, data, weights, spec: BlockSpec) -> tuple[torch.Tensor, float]:
    """Return the sequence, and the median seconds of a sampled token."""
    given, ends = z.shape[1] - SAMPLED, []
    # Progress is reported after each call into the kernel.
    with mock.patch.object(native, "call_tokens", lambda *_: CALL):
        x = block_inverse(
            z, weights, spec, data=data, known=torch.tensor([given]), backend="native",
            progress=lambda done, total: ends.append((done, time.perf_counter())),
        ).x  # fmt: skip
    tokens = itertools.pairwise((done, end) for done, end in ends if done > given)
    return x, statistics.median((end - start) / (done - before) for (before, start), (done, end) in tokens)


@torch.no_grad()
def measure(name: str) -> dict:
    """Return one row of the table."""
    C, layers, T = CASES[name]
    torch.manual_seed(0)
    spec = BlockSpec(
        token_dim=12, channels=C, layers=layers, heads=C // 64, head_dim=64, kv_heads=C // 64, mlp_dim=4 * C,
        positions=T,
    )  # fmt: skip
    weights, z, data = random_weights(spec), torch.randn(1, T, 12), torch.randn(1, T, 12)
    work = block_work(spec, 1, SAMPLED + 1, prefix=T - SAMPLED - 1, weight_bytes=4, cache_bytes=4)
    bandwidths, times, end = [read_bandwidth(int(work.bytes / work.steps))], [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        x, per_token = sample(z, data, weights, spec)
        times.append(per_token)
    # The speed of a shared machine moves within seconds: the best counts, of the floor too.
    bandwidths.append(read_bandwidth(int(work.bytes / work.steps)))
    seconds, bandwidth = min(times), max(bandwidths)
    found = block_forward(x, weights, spec, backend="native")[0]
    error = (found - z)[:, T - SAMPLED :].abs().max().item()
    assert error < AGREEMENT, f"{name}: error {error}"
    ceilings = {"bytes_a_second": bandwidth, "float32_operations_a_second": peak_flops()}
    floor = work.seconds(ceilings, torch.float32) / work.steps
    return {
        "case": name,
        "block": name.rpartition(", ")[0],
        "tokens": T,
        "microseconds": 1e6 * seconds,
        "floor_microseconds": 1e6 * floor,
        "of_floor": floor / seconds,
        "megabytes_per_token": work.bytes / work.steps / 1e6,
        "read_gb_per_second": bandwidth / 1e9,
        "error": error,
    }


def results(args: argparse.Namespace) -> dict:
    rows = []
    for name in args.cases:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    return {"rows": rows}


main = benchmark(__doc__, results, cases=list(CASES))

if __name__ == "__main__":
    main()
