"""Times of every op with a Triton backend beside its floor, the plain op and its peers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .bench import Bench, attempt
from .op_cases import MAKE
from .op_checks import contract, ours, passes, plain


def time_op(
    op: str, shape: tuple[int, ...], bench: Bench, ceilings: dict[str, float], compiled: bool
) -> Iterator[dict]:
    """Time an op at one shape after the error contract holds; yield a row per pass and code.

    Args:
        op: name of the op.
        shape: sizes as the op's case takes them.
        bench: where everything runs.
        ceilings: measured rates of the device.
        compiled: time the peers that torch.compile makes too.
    """
    case = MAKE[op](shape, bench.timed_dtype, bench.device)
    error = contract(case, bench, torch.float64 if bench.timed_dtype == torch.float32 else torch.float32)
    ones = [torch.ones_like(output) for output in plain(case)(case.tensors)]
    codes = {"ours": ours(case), "eager reference": plain(case), **case.peers}
    if compiled:
        torch.compiler.reset()
        codes["compiled reference"] = torch.compile(plain(case), backend=bench.compiler)
    else:
        codes = {name: code for name, code in codes.items() if not name.startswith("compiled")}
    for gradient in (False, True):
        moved = case.bytes * (1 + case.backward_bytes if gradient else 1)
        operations = case.flops * (1 + case.backward_flops if gradient else 1)
        floor = max(moved / ceilings["bytes_a_second"], operations / ceilings["operations_a_second"])
        row = {"op": op, "shape": shape, "dtype": str(bench.timed_dtype)[6:], "pass": "both" if gradient else "forward"}
        row["error"] = error
        for name, function in codes.items():

            def run(function=function, gradient=gradient):
                if gradient:
                    return passes(function, case.tensors, ones)
                with torch.no_grad():
                    return function(case.tensors)

            def measure(run=run):
                run()
                return {"seconds": bench.seconds(run), "peak_bytes": bench.peak_memory(run)}

            result, value = attempt(measure)
            timings = value if result == "passed" else {result: value}
            yield {**row, "code": name, "floor_seconds": floor, **timings}
