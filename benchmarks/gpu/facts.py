"""The machine of a run, and which compiled libraries load there; neither git nor a compiler is needed."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from starflow_kernels import backends
from starflow_kernels._core import compiled

from .bench import Bench

MANIFEST = "manifest.json"


def output(*command: str) -> str:
    """Return the first line that a command prints, or "unknown"."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
        return found.stdout.split("\n")[0].strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit(pack: Path) -> str:
    """Return the commit of the source: that of the pack, if there is one, or the one that git names."""
    manifest = pack / MANIFEST
    if manifest.exists():
        return json.loads(manifest.read_text())["commit"]
    return output("git", "rev-parse", "--short", "HEAD")


def facts(bench: Bench, pack: Path) -> dict[str, str]:
    """Return device, driver, versions, commit and date."""
    triton = importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "not installed"
    found = {
        "device": "CPU, Triton's interpreter: a dry run",
        "date": datetime.date.today().isoformat(),
        "commit": commit(pack),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }
    if not bench.dry:
        found |= {
            "device": torch.cuda.get_device_name(),
            "capability": "sm_{}{}".format(*torch.cuda.get_device_capability()),
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda or torch.version.hip or "unknown",
        }
    return found


def libraries() -> Iterator[dict]:
    """Yield the backends of every op, and a check for each compiled library: whether it loads."""
    yield {"backends": backends()}
    for name, error in (("native", compiled.native_unavailable), ("cuda", compiled.cuda_load_error)):
        reason = error()
        row = {"kind": "check", "op": f"library {name}", "shape": "", "dtype": "", "check": "load"}
        yield {**row, "result": "skipped" if reason else "passed", "note": reason or ""}
