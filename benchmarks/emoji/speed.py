"""Time from a prompt to the bytes of a PNG, by stage, of a text-to-image pipeline; its size, and its cold start.

    python -m benchmarks.emoji.speed --pipeline DIR --wheel FILE --json results.json

The same is timed with two loops over tokens in place of our inverse, both over a KV cache that they allocate once: the
reference in eager PyTorch, and the plain decoder, the strongest peer without kernels of its own. All draw from the same
noise, and take turns. A result counts only where all latents agree and the certificate is below 1e-3.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from starflow.models.block import FlowBlock
from starflow.models.flow import Flow
from starflow.pipelines import STARFlowPipeline
from starflow.seeds import generator
from starflow_kernels import Inverse, SolveReport

from ..machine import description
from ..peers.static_cache import PlainDecoder
from .judge import open_pipeline

PROMPTS = (
    "red heart", "pizza", "rocket", "woman firefighter medium-dark skin tone", "octopus", "France", "snowman",
    "waving hand light skin tone", "cat face", "birthday cake", "mechanic dark skin tone", "umbrella", "green apple",
    "soccer ball", "man cook medium skin tone", "sun with face",
)  # fmt: skip
SINGLE_REPEATS, BATCH_REPEATS, COLD_REPEATS = 20, 5, 5
AGREEMENT = 1e-3
# Packages whose imports are listed one by one.
SHOWN_PACKAGES = 6
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\w+)")


def reference(block: FlowBlock, z: torch.Tensor, *context, **options):
    """Invert a block by the reference."""
    return FlowBlock.inverse(block, z, *context, **{**options, "backend": "reference"})


class Plain:
    """Inverse of blocks by the plain decoder, allocated once per block and shape."""

    def __init__(self):
        self.decoders = {}

    def __call__(self, block: FlowBlock, z: torch.Tensor, *context, guidance=None, rule="tarflow", **_):
        start, (rows, tokens, _) = time.perf_counter(), z.shape
        inputs, copies = block.context(*context, {}), 1 if guidance is None else 2
        key = id(block), rows, tokens, copies
        if key not in self.decoders:
            prefix = 0 if inputs["prefix"] is None else inputs["prefix"].shape[1]
            self.decoders[key] = PlainDecoder(
                block.weights(), block.spec, rows, tokens, prefix=prefix, copies=copies, rule=rule
            )
        x = self.decoders[key](z, **inputs, guidance=guidance)
        seconds, sweeps = time.perf_counter() - start, torch.ones(rows, tokens, dtype=torch.int32)
        report = SolveReport("sequential", tokens, rows * tokens, seconds, sweeps)
        return Inverse(x, lambda: torch.zeros_like(x), lambda: report)


@contextlib.contextmanager
def inverted_by(flow: Flow, inverse: Callable | None) -> Iterator[None]:
    """Replace the inverse of all blocks; None keeps ours."""
    for block in flow.blocks if inverse else ():
        block.inverse = partial(inverse, block)
    try:
        yield
    finally:
        for block in flow.blocks if inverse else ():
            del block.inverse


def draw(pipe: STARFlowPipeline, prompts: list[str], **options):
    """Return the output of a call with fixed noise."""
    return pipe(prompts, generator=[generator(0, i) for i in range(len(prompts))], **options)


def png_bytes(images: list) -> int:
    """Return the number of bytes of images as PNG."""
    total = 0
    for image in images:
        image.save(buffer := io.BytesIO(), "PNG")
        total += buffer.tell()
    return total


def measure(pipe: STARFlowPipeline, batch: int, repeats: int) -> dict:
    """Return the medians of the seconds of a call, by loop and stage."""
    prompts, plain = list(PROMPTS[:batch]), Plain()
    loops = {"ours": None, "reference": reference, "plain decoder": plain}
    latents, times = {}, {name: [] for name in loops}
    for name, inverse in loops.items():
        with inverted_by(pipe.transformer, inverse):
            latents[name] = draw(pipe, prompts, output_type="latent").images
            draw(pipe, prompts)
    for _ in range(repeats):
        for name, inverse in loops.items():
            with inverted_by(pipe.transformer, inverse):
                start = time.perf_counter()
                found = draw(pipe, prompts)
                drawn = time.perf_counter()
                png_bytes(found.images)
                end = time.perf_counter()
            stages = {**found.report.stages, "png": end - drawn}
            times[name].append({"all": end - start, **stages, "other": end - start - sum(stages.values())})
    report = draw(pipe, prompts, output_type="latent", certify=True).report
    errors = {name: (found - latents["ours"]).abs().max().item() for name, found in latents.items()}
    assert max(*errors.values(), report.certificate) < AGREEMENT, f"not exact: {errors}, {report.certificate}"
    seconds = {
        name: {stage: statistics.median(row[stage] for row in rows) for stage in rows[0] if rows[0][stage]}
        for name, rows in times.items()
    }
    ours = seconds["ours"]
    parts = {stage: value for stage, value in ours.items() if stage != "all"}
    return {
        "batch": batch,
        "guidance": pipe.default_guidance.weight,
        "seconds": seconds,
        "share": {stage: value / sum(parts.values()) for stage, value in parts.items()},
        "images_per_second": {name: batch / value["all"] for name, value in seconds.items()},
        "ratio": {name: value["all"] / ours["all"] for name, value in seconds.items()},
        "certificate": report.certificate,
        "difference_of_latents": errors,
        "method": report.method,
    }


def cold_start(folder: Path, threads: int) -> dict:
    """Return the median seconds of `starflow sample --prompt` as a process, and what they are spent on.

    The imports are timed in a process of their own, which is slower by the time that Python takes to report them.
    """
    sample = ["-m", "starflow", "sample", "--checkpoint", str(folder), "--prompt", PROMPTS[0]]
    sample += ["--threads", str(threads)]

    def run(*arguments: str) -> tuple[float, str]:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
        return time.perf_counter() - start, done.stderr

    with tempfile.TemporaryDirectory() as out:
        whole, drawing = [], []
        for i in range(COLD_REPEATS):
            whole.append(run(*sample, "--out", f"{out}/{i}", "--json", f"{out}/report.json")[0])
            drawing.append(json.loads(Path(out, "report.json").read_text())["results"]["seconds"])
        lines = run("-X", "importtime", *sample, "--out", f"{out}/imports")[1].splitlines()
    imports = Counter()
    for line in lines:
        if found := IMPORT.match(line):
            imports[found[2]] += int(found[1]) / 1e6
    python = statistics.median(run("-c", "pass")[0] for _ in range(COLD_REPEATS))
    seconds = statistics.median(whole)
    parts = {"python": python, "imports": sum(imports.values()), "drawing": statistics.median(drawing)}
    return {
        "seconds": seconds,
        "parts": {**parts, "rest": seconds - sum(parts.values())},
        "imports": dict(imports.most_common(SHOWN_PACKAGES)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--wheel", type=Path, help="wheel of the package, for its size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results and the machine here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = open_pipeline(args.pipeline)
    files = [path for path in args.pipeline.rglob("*") if path.is_file()]
    results = {
        "machine": description(),
        "bytes": {
            "pipeline": sum(path.stat().st_size for path in files),
            "wheel": args.wheel and args.wheel.stat().st_size,
        },
        "warm": [measure(pipe, 1, SINGLE_REPEATS), measure(pipe, len(PROMPTS), BATCH_REPEATS)],
        "cold": cold_start(args.pipeline, args.threads),
    }
    print(json.dumps(results, indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
