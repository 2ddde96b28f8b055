"""Samples per second of `starflow sample` beside those of its flow alone, and its memory beside the prediction.

    python -m benchmarks.cpu.throughput --json benchmarks/results/throughput_cpu.json

The floor is the flow with noise at hand: the sampler draws noise a sample, writes files and a manifest, and its
processes share the machine. A result counts only where both draw the same pixels. Memory is that of each image in a
batch, the peak of the resident set over what there was before, divided by the batch.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from starflow import Flow, Guidance
from starflow.inversion.request import Inversion
from starflow.models.certificate import certificate
from starflow.models.config import FlowConfig
from starflow.sampling.budget import denoise_bytes, image_bytes
from starflow.sampling.sample import pixels
from starflow.seeds import generator

from ..command import benchmark, in_fresh_process

IMAGE = {"image_channels": 3, "num_classes": 10, "layers": [2, 2]}
SHAPES = {
    "64 px, 256 tokens, 128 wide": {**IMAGE, "image_size": 64, "patch_size": 4, "channels": 128, "head_dim": 32},
    "32 px, 256 tokens, 64 wide": {**IMAGE, "image_size": 32, "patch_size": 2, "channels": 64, "head_dim": 32},
    "64 px, 64 tokens, 512 wide": {**IMAGE, "image_size": 64, "patch_size": 8, "channels": 512, "head_dim": 64},
    "16 px, 256 tokens, 128 wide, deep": {
        **IMAGE, "image_size": 16, "patch_size": 1, "channels": 128, "head_dim": 64, "layers": [1, 6],
    },
}  # fmt: skip
# Method, window, guidance weight, certified or not, denoised or not.
WAYS = {
    "sequential": ("sequential", None, 0.0, False, False),
    "sequential, guidance": ("sequential", None, 1.0, False, False),
    "jacobi, window 32": ("jacobi", 32, 0.0, False, False),
    "jacobi, all tokens": ("jacobi", None, 0.0, False, False),
    "sequential, certified": ("sequential", None, 0.0, True, False),
    "denoising": ("sequential", None, 0.0, False, True),
}
MEASURED_BYTES = 100_000_000


def _high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@torch.no_grad()
def growth(
    flow: Flow, guidance: Guidance, inversion: Inversion, certify: bool, count: int, denoise: bool = False
) -> tuple[int, float]:
    """Return bytes per image, predicted and measured in a batch of `count` (on Linux)."""
    tokens = flow.config.grid[0] * flow.config.grid[1]
    said = denoise_bytes(flow, tokens) if denoise else image_bytes(flow, guidance, inversion, certify=certify)

    def draw(rows: int) -> None:
        z, labels = flow.noise(rows), torch.zeros(rows, dtype=torch.long) if flow.config.num_classes else None
        if denoise:
            flow.denoise(z, labels, noise_std=0.1)
            return
        x = flow.inverse(z, labels, guidance=guidance, solvers=inversion.solvers(flow, z, guidance)).x
        if certify:
            certificate(flow, x, z, labels, guidance=guidance)

    draw(1)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    draw(count)
    return said, (_high_water() - before) / count


def model(name: str) -> Flow:
    """Return a flow: one of SHAPES with random weights, or a checkpoint."""
    if name not in SHAPES:
        return Flow.from_pretrained(name)
    torch.manual_seed(0)
    return Flow(FlowConfig(**SHAPES[name])).eval()


def memory(name: str, way: str) -> dict:
    """Return a row of the table of memory."""
    torch.set_num_threads(1)
    flow, (method, window, weight, certify, denoise) = model(name), WAYS[way]
    inversion, tokens = Inversion(method, window), flow.config.grid[0] * flow.config.grid[1]
    said = denoise_bytes(flow, tokens) if denoise else image_bytes(flow, Guidance(weight), inversion, certify=certify)
    count = max(4, min(1024, MEASURED_BYTES // said))
    said, used = growth(flow, Guidance(weight), inversion, certify, count, denoise)
    return {
        "shape": Path(name).name,
        "way": way,
        "batch": count,
        "predicted_bytes": said,
        "measured_bytes": round(used),
    }


@torch.no_grad()
def floor(flow: Flow, count: int, batch_size: int) -> tuple[float, torch.Tensor]:
    """Return images per second of the flow alone, and its images, with the labels of `starflow sample`."""
    classes = flow.config.num_classes
    keys = [(i % classes, i // classes) if classes else (0, i) for i in range(count)]
    z = flow.noise(count, [generator(0, *key) for key in keys])
    labels = torch.tensor([key[0] for key in keys]) if classes else None
    flow.inverse(z[:batch_size], labels[:batch_size] if classes else None)
    start, parts = time.perf_counter(), []
    for first in range(0, count, batch_size):
        rows = slice(first, first + batch_size)
        parts.append(flow.inverse(z[rows], labels[rows] if classes else None).x)
    return count / (time.perf_counter() - start), pixels(flow, torch.cat(parts))


def throughput(name: str, count: int, batch_size: int, processes: int, form: str) -> dict:
    """Return a row of the table of speed."""
    alone, images = floor(Flow.from_pretrained(name), count, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        command += ["starflow", "sample", "--checkpoint", name, "--count", str(count), "--format", form]
        command += ["--samples-per-file", str(max(1, count // 4)), "--batch-size", str(batch_size), "--threads", "1"]
        command += ["--method", "sequential", "--out", f"{folder}/out", "--json", f"{folder}/report.json"]
        subprocess.run(command, check=True, capture_output=True)
        results = json.loads(Path(folder, "report.json").read_text())["results"]
        if form == "npz":
            shards = [np.load(path)["arr_0"] for path in sorted(Path(folder, "out").glob("0*.npz"))]
            same = np.array_equal(np.concatenate(shards), images.permute(0, 2, 3, 1).numpy())
            assert same, "other pixels than those of the flow"
    return {
        "checkpoint": Path(name).name,
        "format": form,
        "batch_size": batch_size,
        "processes": processes,
        "count": count,
        "images_per_second": results["images_per_second"],
        "floor_images_per_second": alone,
        "seconds": results["seconds"],
        "flow_seconds": results["stages"]["flow"],
        "write_seconds": results["stages"]["write"],
    }


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--photos", help="folder of a flow on photographs, timed and measured too")
    parser.add_argument("--digits-count", type=int, default=4000)
    parser.add_argument("--photos-count", type=int, default=48)


def results(args: argparse.Namespace) -> dict:
    load, rows, used = os.getloadavg(), [], []
    cases = [("digits", args.digits_count, (10, 100, 1000), ("npz", "png"))]
    if args.photos:
        cases.append((args.photos, args.photos_count, (1, 8, 24), ("npz",)))
    for name, count, batches, forms in cases:
        for batch_size in batches:
            for processes in (1, 2):
                for form in forms if batch_size == max(batches) else forms[:1]:
                    rows.append(throughput(name, count, batch_size, processes, form))
                    print(rows[-1], flush=True)
    for name in (*SHAPES, "digits", *([args.photos] if args.photos else [])):
        for way in WAYS:
            used.append(in_fresh_process(memory, name, way))
            print(used[-1], flush=True)
    loads = {"load_average_before": load, "load_average_after": os.getloadavg()}
    return {"machine": loads, "rows": rows, "memory": used}


main = benchmark(__doc__, results, options, threads=1)


if __name__ == "__main__":
    main()
