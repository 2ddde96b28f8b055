"""The command line that the benchmarks share, and the form of their results: the machine, then what was measured."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .machine import description


def benchmark(
    doc: str,
    measure: Callable[[argparse.Namespace], dict],
    options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    *,
    threads: int = 2,
    cases: Sequence[str] = (),
) -> Callable[[list[str] | None], dict]:
    """Return main(arguments), which measures and prints or saves; its result is the dictionary that it saves.

    Args:
        doc: help text.
        measure: returns the results, with "rows" among them, and possibly more about the "machine".
        options: adds the options of this benchmark.
        threads: default number of threads.
        cases: names of the cases, which become the "case" of a row. With `--cases`, `measure` finds the chosen ones in
            `args.cases`, and a file keeps its rows of the others.
    """

    def main(arguments: list[str] | None = None) -> dict:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        options(parser)
        parser.add_argument("--threads", type=int, default=threads)
        parser.add_argument("--json", type=Path, help="write the results and the machine here")
        if cases:
            parser.add_argument("--cases", default="", help="only cases whose name contains one of these, by '|'")
        args = parser.parse_args(arguments)
        if cases:
            args.cases = [case for case in cases if any(part in case for part in args.cases.split("|"))]
        torch.set_num_threads(args.threads)
        machine = description()
        found = measure(args)
        result = {"machine": machine | found.pop("machine", {}), **found}
        if args.json is None:
            print(json.dumps(result, indent=2))
            return result
        if cases and len(args.cases) < len(cases) and args.json.exists():
            result = merged(json.loads(args.json.read_text()), result)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        return result

    return main


def merged(old: dict, new: dict) -> dict:
    """Return new results with the old rows of other cases; an old row keeps the machine of its own run."""
    rows = {row["case"]: {"machine": old["machine"], **row} for row in old["rows"]}
    rows |= {row["case"]: row for row in new["rows"]}
    return {**new, "rows": list(rows.values())}


def in_fresh_process(function: Callable, *arguments: object) -> object:
    """Return function(*arguments) from a process of its own, since the peak memory of a process never falls."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
