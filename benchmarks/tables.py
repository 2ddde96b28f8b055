"""The tables of pages that show results: written between two comments from the files in results/."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .cpu.sampling import strongest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / page for page in ("README.md", "docs/benchmarks/index.md", "starflow_kernels/accelerate/README.md")]
# A page names the table that it wants: <!-- speed --> ... <!-- end -->.
PLACE = re.compile(r"<!-- (\w+) -->\n.*?<!-- end -->", re.DOTALL)
PEER_NAMES = {"released": "released", "plain": "plain", "compiled": "compiled", "onnxruntime": "ONNX Runtime"}


def results(name: str) -> dict:
    """Return a results file."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}_cpu.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a table."""
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in [header, *rows])
    return first + "|---" * len(header) + "|\n" + "".join(others)


def line(machine: dict) -> str:
    """Return a machine, with its ceilings if its run measured them."""
    text = f"{machine['date']}, {machine['cpu']}, {machine['threads']} threads"
    if "float32_gflops" not in machine:
        return text
    return f"{text}, {machine['float32_gflops']:.0f} GFLOP/s, {machine['read_gb_per_second']:.0f} GB/s from memory"


def runs(found: dict) -> str:
    """Return a line per run: its machine, and its cases if there are more runs."""
    cases: dict[str, list[str]] = {}
    for row in found["rows"]:
        cases.setdefault(line(row.get("machine", found["machine"])), []).append(row["case"])
    if len(cases) == 1:
        return f"Measured {next(iter(cases))}.\n\n"
    return "".join(f"- Measured {run}: {'; '.join(names)}.\n" for run, names in cases.items()) + "\n"


def number(error: float) -> str:
    """Format an error."""
    return f"{error:.1e}".replace("e-0", "e-")


def times(row: dict, name: str) -> str:
    """Return how many times longer a peer takes, or that it does not run."""
    return (
        f"{row['microseconds'][name] / row['microseconds']['ours']:.1f}x" if name in row["microseconds"] else "not run"
    )


def error(row: dict, name: str) -> str:
    """Return a largest error."""
    return number(row["error"][name]) if name in row["error"] else "not compared"


def speed() -> str:
    """Return the table of README.md: the strongest peer of each case that has more than one."""
    found = results("sampling")
    header = ["case", "ours, µs per step", "strongest peer / ours", "strongest peer", "our largest error"]
    shown = [row for row in found["rows"] if "plain" in row["microseconds"]]
    rows = [
        [
            row["case"],
            f"{row['microseconds']['ours']:.1f}",
            times(row, strongest(row)),
            PEER_NAMES[strongest(row)],
            error(row, "ours"),
        ]
        for row in shown
    ]
    return runs({**found, "rows": shown}) + table(header, rows)


def sampling() -> str:
    """Return all peers of all cases."""
    found = results("sampling")
    header = ["case", "ours, µs per step", "floor, µs", "bound of the floor", "strongest peer / ours"]
    header += [f"{name} / ours" for name in PEER_NAMES.values()]
    rows = [
        [
            row["case"],
            f"{row['microseconds']['ours']:.1f}",
            f"{row['floor_microseconds']:.1f}",
            row["floor"].removeprefix("bytes at "),
            times(row, strongest(row)),
            *(times(row, name) for name in PEER_NAMES),
        ]
        for row in found["rows"]
    ]
    return runs(found) + table(header, rows)


def errors() -> str:
    """Return the largest errors of sampling against float64."""
    ways = {"ours": "ours", **PEER_NAMES}
    rows = [[row["case"], *(error(row, name) for name in ways)] for row in results("sampling")["rows"]]
    return table(["case", *ways.values()], rows)


def contention() -> str:
    """Return the times of calls beside busy processes, and their ratios to one thread under the same load."""
    found = results("contention")
    threads = sorted({row["threads"] for row in found["rows"]})
    header = ["case", "cores", "busy processes", "1 thread, µs per step"]
    header += [f"{n} threads / 1, median (mean)" for n in threads[1:]]
    cases: dict[tuple, dict[int, dict]] = {}
    for row in found["rows"]:
        cases.setdefault((row["case"], row["cores"], row["busy_processes"]), {})[row["threads"]] = row
    rows = [
        [
            *map(str, case),
            f"{by_threads[1]['microseconds']['median']:.1f}",
            *("{median:.2f} ({mean:.2f})".format(**by_threads[n]["to_one_thread"]) for n in threads[1:]),
        ]
        for case, by_threads in cases.items()
    ]
    return f"Measured {line(found['machine'])}.\n\n" + table(header, rows)


def long() -> str:
    """Return the times of tokens at the end of long sequences."""
    found = results("long")
    header = ["block", "tokens", "MB per token", "µs per token", "floor, µs", "share of the floor"]
    rows = [
        [
            row["block"],
            f"{row['tokens']:,}",
            f"{row['megabytes_per_token']:.0f}",
            f"{row['microseconds']:,.0f}",
            f"{row['floor_microseconds']:,.0f}",
            f"{100 * row['of_floor']:.0f} %",
        ]
        for row in found["rows"]
    ]
    return runs(found) + table(header, rows)


def bfloat16() -> str:
    """Return the times and differences of sampling with products of bfloat16 values."""
    found = results("bfloat16_products")
    header = ["case", "float32, µs per step", "bfloat16 weights", "bfloat16 products"]
    header += ["mean (largest) difference of weights", "of products", "standard deviation of samples"]
    rows = [
        [
            row["case"],
            f"{row['microseconds']['float32']:.1f}",
            *(f"{row['microseconds'][way]:.1f}" for way in ("bfloat16 weights", "bfloat16 products")),
            *("{mean:.4f} ({max:.3f})".format(**each) for each in row["difference"].values()),
            f"{row['deviation']:.2f}",
        ]
        for row in found["rows"]
    ]
    return f"Measured {line(found['machine'])}.\n\n" + table(header, rows)


def density() -> str:
    """Return the times and the peak memory of the density pass and of a training step."""
    found = results("density")
    header = [
        "pass", "ours, ms", "released, ms", "released / ours", "share of the multiply-add peak", "ours, MB",
        "released, MB",
    ]  # fmt: skip
    rows = [
        [
            row["case"],
            *(f"{row['milliseconds'][name]:.0f}" for name in ("ours", "released")),
            f"{row['ratio_released']:.1f}x",
            f"{100 * row['of_floor']:.0f} %",
            *(f"{row['megabytes'][name]:,.0f}" for name in ("ours", "released")),
        ]
        for row in found["rows"]
    ]
    return runs(found) + table(header, rows)


def prose() -> str:
    """Return the times of Prose and ours."""
    found = results("prose")
    header = ["batch"]
    for name in ("sampling", "density"):
        header += [f"{name}, s", "Prose, s", "Prose / ours"]
    rows = []
    for row in found["rows"]:
        cells = [str(row["batch"])]
        for own in (row["sampler"], row["density"]):
            cells += [f"{own['seconds']:.2f}", f"{own['upstream_seconds']:.2f}", f"{own['ratio']:.1f}x"]
        rows.append(cells)
    return f"Measured {line(found['machine'])}.\n\n" + table(header, rows)


def gradient() -> str:
    """Return the times and the peak memory of gradients of samples."""
    found = results("inverse_gradient")
    header = ["tokens", "ours, ms", "plain loop, ms", "plain / ours", "memory, ours, MB", "memory, plain loop, MB"]
    rows = [
        [
            f"{row['tokens']:,}",
            *(f"{1e3 * sum(row[way]['seconds'].values()):,.0f}" for way in ("ours", "plain loop")),
            f"{row['ratio']:.1f}x",
            *(f"{row[way]['bytes'] / 1e6:,.0f}" for way in ("ours", "plain loop")),
        ]
        for row in found["rows"]
    ]
    return f"Measured {line(found['machine'])}.\n\n" + table(header, rows)


def image_density() -> str:
    """Return the bits per dimension of images by flows and codecs."""
    found = results("image_density")
    header = ["images", "model", "bits per dimension", "bound of all draws", "parameters", "training, CPU time, s"]
    rows = []
    for row in found["rows"]:
        bound = f"{row['bound_of_all_draws']:.3f}" if "bound_of_all_draws" in row else ""
        trained = [f"{row['parameters']:,}", f"{row['cpu_seconds']:,.0f}"] if "steps" in row else ["", ""]
        rows.append([*row["case"].split(", "), f"{row['bits_per_dim']:.3f} ± {row['error']:.3f}", bound, *trained])
    # A density has no ceiling of the machine.
    return "Measured {date}, {cpu}.\n\n".format(**found["machine"]) + table(header, rows)


def accelerate() -> str:
    """Return the times of flows of other packages before and after `accelerate`."""
    found = results("accelerate")
    rows = [
        [
            row["case"],
            *(f"{row['milliseconds'][name]:.3g} ms" for name in ("library", "accelerated")),
            f"{row['ratio']:.1f}x",
            f"{row.get('difference_float64', row.get('difference')):.0e}",
        ]
        for row in found["rows"]
    ]
    return runs(found) + table(["case", "before", "accelerated", "ratio", "difference"], rows)


TABLES = {
    each.__name__: each
    for each in (
        speed,
        sampling,
        errors,
        bfloat16,
        contention,
        long,
        density,
        prose,
        gradient,
        image_density,
        accelerate,
    )
}


def filled(page: str) -> str:
    """Return the text of a page with its tables."""
    return PLACE.sub(lambda place: f"<!-- {place[1]} -->\n{TABLES[place[1]]()}<!-- end -->", page)
