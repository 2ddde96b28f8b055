"""Loops of a compiled kernel that wait for global memory, and the bytes that its loops load in the background."""

from __future__ import annotations

import re
from typing import NamedTuple


class Loops(NamedTuple):
    """What the loops of a kernel load from global memory.

    Args:
        waiting: loops that load without a copy in the background, so that each iteration waits for memory.
        in_flight: bytes per thread block that the loop with the most copies has under way.
    """

    waiting: int = 0
    in_flight: int = 0


def loops(sass: str, warps: int, stages: int) -> Loops:
    """Return what the loops of a kernel load.

    Args:
        sass: text of triton.tools.disasm.get_sass.
        warps: per thread block.
        stages: of the pipelined loops; one of them is computed with, the others are under way.
    """
    labels, instructions, waiting, in_flight = {}, [], 0, 0
    for line in sass.splitlines():
        if label := re.match(r"LBB\d+", line):
            labels[label[0]] = len(instructions)
            continue
        instructions.append(line.split("\t")[-1])
        branch = re.search(r"\bBRA\b.*\b(LBB\d+)", line)
        begin = labels.get(branch[1]) if branch else None
        if begin is None or begin == len(instructions) - 1:
            continue
        body = "\n".join(instructions[begin:])
        copied = sum(int(bits or 32) // 8 for bits in re.findall(r"\bLDGSTS(?:\.[A-Z]\w*)*(?:\.(\d+))?", body))
        waiting += not copied and bool(re.search(r"\bLDG\.", body))
        in_flight = max(in_flight, 32 * warps * copied * (stages - 1))
    return Loops(waiting, in_flight)
