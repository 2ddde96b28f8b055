"""Sampling on the CPU against a plain KV cache and the released TarFlow loop: same weights, same noise, one process.

    python -m benchmarks.cpu.sampling --peer DIR --json benchmarks/results/sampling_cpu.json

`DIR` holds transformer_flow.py of github.com/apple/ml-tarflow, which is not part of this repository. Every time stands
beside its floor, the larger of bytes / read bandwidth of that working set and operations / peak, measured in the same
run, and beside the error against float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path

import torch

from starflow_kernels import Inverse, block_inverse
from starflow_kernels.accelerate.upstream.structure import read

from ..machine import description, peak_flops, read_bandwidth
from ..peers.released import load_peer, median_seconds, timed
from ..peers.sliced_cache import sliced_inverse


@dataclasses.dataclass(frozen=True)
class Case:
    """Blocks of `layers` layers of width `channels` on a square image, `batch` samples, guided or not.

    `checked` is the number of tokens that are compared with float64, 0 for all. For one block a part is enough, since
    it is causal; the reference takes many minutes there and is not timed.
    """

    name: str
    image: tuple[int, int]
    patch: int
    channels: int
    blocks: int
    layers: int
    batch: int
    guidance: float = 0.0
    dtype: torch.dtype = torch.float32
    repeats: int = 7
    checked: int = 0

    @property
    def rows(self) -> int:
        return self.batch * (2 if self.guidance else 1)


SMALL = {"image": (1, 8), "patch": 2, "channels": 64, "blocks": 4, "layers": 2}
RGB32 = {"image": (3, 32), "patch": 2, "channels": 128, "blocks": 4, "layers": 4}
AFHQ = {"image": (3, 256), "patch": 8, "channels": 768, "blocks": 1, "layers": 8, "repeats": 1}
CASES = [
    *(Case(f"8x8 images, 4 x 2 layers, batch {batch}", batch=batch, **SMALL) for batch in (1, 100, 1000)),
    *(Case(f"32x32 images, 4 x 4 layers, batch {batch}", batch=batch, **RGB32) for batch in (1, 16)),
    Case("AFHQ-256 block, batch 1", batch=1, **AFHQ),
    Case("AFHQ-256 block, batch 1, bfloat16 weights", batch=1, dtype=torch.bfloat16, **AFHQ),
    Case("AFHQ-256 block, batch 8, guidance", batch=8, guidance=1.5, checked=96, **AFHQ),
]


def make_peer(peer, case: Case):
    """Return the released model with random weights; guidance needs classes."""
    torch.manual_seed(0)
    channels, size = case.image
    classes = 10 if case.guidance else 0
    model = peer.Model(channels, size, case.patch, case.channels, case.blocks, case.layers, num_classes=classes).eval()
    for block in model.blocks:  # with larger parameters, guidance overflows
        torch.nn.init.normal_(block.proj_out.weight, std=0.002 if case.guidance else 0.02)
    return model


def ours(
    model, z: torch.Tensor, labels, case: Case, dtype: torch.dtype, backend: str | None = None, inverse=block_inverse
):
    """Return a function that inverts all blocks with our op, or with another `inverse` of the same arguments."""
    blocks = []
    for index, block in enumerate(model.blocks):
        spec, weights = read(block, flip=index % 2 == 1)
        spec = dataclasses.replace(spec, positions=z.shape[1])
        weights["pos_embed"] = weights["pos_embed"][: z.shape[1]]
        options = {"backend": backend} if backend else {}
        if case.guidance:
            embed = block.class_embed.detach().squeeze(1)
            options["cond"] = torch.cat([embed[labels], embed.mean(0).expand(len(labels), -1)]).to(z.dtype)
            options["guidance"] = case.guidance
        # Rounded to the dtype of the case first, so that the error is of the arithmetic alone.
        blocks.append(
            ({name: weight.detach().to(case.dtype).to(dtype) for name, weight in weights.items()}, spec, options)
        )

    def run() -> torch.Tensor:
        x = z
        for weights, spec, options in reversed(blocks):
            found = inverse(x, weights, spec, **options)
            x = found.x if isinstance(found, Inverse) else found
        return x

    return run


def floor_seconds(model, case: Case) -> tuple[float, str]:
    """Return the floor of a token step, which reads all weights and on average half of the KV cache."""
    spec, _ = read(model.blocks[0])
    shapes = [shape for shape in spec.weight_shapes.values() if len(shape) == 2 and shape[0] != spec.positions]
    products = sum(a * b for a, b in shapes)
    weight_bytes = products * torch.finfo(case.dtype).bits // 8
    cache_bytes = 2 * case.layers * case.rows * spec.positions * case.channels * 4 / 2
    bandwidth = read_bandwidth(int(weight_bytes + cache_bytes))
    by_bytes = (weight_bytes + cache_bytes) / bandwidth
    by_flops = 2 * case.rows * products / peak_flops()
    return max((by_bytes, f"bytes at {bandwidth / 1e9:.0f} GB/s"), (by_flops, f"{peak_flops() / 1e9:.0f} GFLOP/s"))


def compiled_peer(model, z, labels, case: Case) -> float | str:
    """Return the seconds of the released loop with its step under torch.compile, or the reason why that fails."""
    try:
        for block in model.blocks:
            block.reverse_step = torch.compile(block.reverse_step, dynamic=True)
        run = lambda: model.reverse(z.clone(), labels, guidance=case.guidance)  # noqa: E731
        run()
        return median_seconds(run, case.repeats)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"


@torch.no_grad()
def measure(peer, case: Case, compile_peer: bool) -> dict:
    """Return one row of the table, with times per token step."""
    model = make_peer(peer, case)
    z = torch.randn(case.batch, model.num_patches, case.image[0] * case.patch**2)
    labels = torch.arange(case.batch) % 10 if case.guidance else None
    checked = case.checked or model.num_patches
    exact = ours(model, z[:, :checked].double(), labels, case, torch.float64, "reference")()
    own, reference = ours(model, z, labels, case, case.dtype), ours(model, z, labels, case, case.dtype, "reference")
    plain = ours(model, z, labels, case, case.dtype, inverse=sliced_inverse)

    def released() -> torch.Tensor:
        return model.patchify(model.reverse(z.clone(), labels, guidance=case.guidance))

    def floor_of_case() -> tuple[float, str]:
        return floor_seconds(model, case)

    steps = case.blocks * (model.num_patches - 1)
    runs = {"ours": own, "released": released} | ({} if case.checked else {"plain": plain, "reference": reference})
    found, times = {"ours": own()}, {name: [] for name in runs}
    # The speed of a shared machine moves within seconds, so methods take turns, each long enough to be warm, and the
    # better of two floors counts.
    before = floor_of_case()
    for _ in range(case.repeats):
        for name, run in runs.items():
            end = time.perf_counter() + 0.2
            for i in itertools.count():
                found[name], spent = timed(run)
                times[name].append(spent)
                if time.perf_counter() > end and i >= 2 * (name == "ours"):
                    break
    floor, bound = min(before, floor_of_case())
    seconds = {name: statistics.median(values) / steps for name, values in times.items()}
    if case.dtype != torch.float32:
        del found["released"]  # it runs other weights
    errors = {name: (result[:, :checked] - exact).abs().max().item() for name, result in found.items()}
    row = {
        "case": case.name,
        "microseconds": {name: 1e6 * value for name, value in seconds.items()},
        "floor_microseconds": 1e6 * floor,
        "floor": bound,
        "of_floor": floor / seconds["ours"],
        **{f"ratio_{name}": value / seconds["ours"] for name, value in seconds.items() if name != "ours"},
        "error": errors,
    }
    if compile_peer:
        found = compiled_peer(model, z, labels, case)
        row["ratio_compiled"] = found if isinstance(found, str) else found / steps / seconds["ours"]
    return row


def markdown(rows: list[dict]) -> str:
    """Format the rows as a table."""
    lines = [
        "| case | ours, us per step | floor, us (bound) | plain / ours | released / ours | our reference / ours "
        "| error (plain, released) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = [f"{row['error'][name]:.1e}" for name in ("plain", "released") if name in row["error"]]
        plain, reference = (
            f"{row[f'ratio_{name}']:.1f}x" if f"ratio_{name}" in row else "not timed" for name in ("plain", "reference")
        )
        lines.append(
            f"| {row['case']} | {row['microseconds']['ours']:.1f} | {row['floor_microseconds']:.1f} ({row['floor']}) "
            f"| {plain} | {row['ratio_released']:.1f}x | {reference} | {row['error']['ours']:.1e} "
            f"({', '.join(errors)}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="folder with the released transformer_flow.py")
    parser.add_argument("--cases", default="", help="only cases whose name contains one of these, by '|'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", default="none", help="cases to try the released step under torch.compile in, too")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peer, rows = load_peer(args.peer), []
    for case in CASES:
        wanted, compiled = (any(p in case.name for p in names.split("|")) for names in (args.cases, args.compile))
        if wanted:
            rows.append(measure(peer, case, compiled))
            print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": description(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
