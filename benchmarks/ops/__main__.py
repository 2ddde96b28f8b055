"""Single ops: ours, eager and compiled PyTorch, by the benchmarks of this folder.

python -m benchmarks.ops --json benchmarks/results/ops_cpu.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import pytest

from ..command import benchmark


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--select", default="", help="only benchmarks that `pytest -k` selects by this expression")


def results(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        status = pytest.main(["-q", "-k", args.select, f"--benchmark-json={found}", str(Path(__file__).parent)])
        if status:
            raise SystemExit(status)
        timed = json.loads(found.read_text())["benchmarks"]
    return {
        "rows": [
            {
                "case": each["name"].removeprefix("bench_"),
                "microseconds": 1e6 * each["stats"]["median"],
                **each["extra_info"],
            }
            for each in timed
        ]
    }


main = benchmark(__doc__, results, options)

if __name__ == "__main__":
    main()
