"""The result of a run as JSON and as a Markdown page, and the machine that it was measured on."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
from pathlib import Path

import torch

from ..machine import description
from . import choice, sampling
from .bench import Bench


def machine(bench: Bench) -> dict[str, str | int]:
    """Return device, driver, versions, commit and date."""
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "not installed"
    facts = {**description(), "triton": triton, "device": "CPU, Triton's interpreter: a dry run"}
    if not bench.dry:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
        facts |= {"device": torch.cuda.get_device_name(), "capability": capability, "driver": driver}
        facts |= {"cuda": torch.version.cuda or torch.version.hip or "unknown"}
    return facts


def markdown(result: dict) -> str:
    """Return the result as a page."""
    lines = ["# GPU kernels on " + result["machine"]["device"], ""]
    lines += [f"- {name}: {value}" for name, value in result["machine"].items()]
    lines += [f"- {name}: {value:.3e}" for name, value in result["ceilings"].items()]
    lines += ["", "| op | shape | dtype | check | result | note |", "|---|---|---|---|---|---|"]
    for r in result["checks"]:
        note = r["note"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {r['op']} | {r['shape']} | {r['dtype']} | {r['check']} | {r['result']} | {note} |")
    lines += [
        "",
        "| op | shape | pass | code | us | floor, us | of the floor | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in result["timings"]:
        where = f"| {r['op']} | {r['shape']} | {r['pass']} | {r['code']} "
        if "failed" in r:
            lines.append(f"{where}| failed | | | |")
            continue
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
        us, floor = 1e6 * r["seconds"], 1e6 * r["floor_seconds"]
        lines.append(f"{where}| {us:.1f} | {floor:.1f} | {floor / us:.0%} | {memory} |")
    page = "\n".join(lines) + "\n"
    if result["attention"]:
        page += choice.markdown(result["attention"])
    if result["sampling"]:
        page += sampling.markdown(result["sampling"])
    return page


def write(result: dict, path: Path) -> None:
    """Write the result as JSON and as a page."""
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
