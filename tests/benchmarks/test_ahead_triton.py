"""Number of Triton kernels that launches of different sizes need, on a GPU that is pretended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
# Kernels of each call, in a process that takes its machine for one with a GPU.
PROGRAM = """
import json, sys
import torch
from benchmarks.gpu import ahead
from benchmarks.gpu.sampling_cases import WEIGHTS, starflow, tarflow

found, counts = ahead.pretend(90, compiles=False), {}
for name, calls in json.loads(sys.argv[1]).items():
    first, counts[name] = len(found), []
    for arguments in calls:
        if "session" in name:
            spec = (starflow(64, (2,), 4, 8) if "text" in name else tarflow(12, 64, 2, 16))[0]
            ahead.session(ahead.Session(spec, WEIGHTS["bfloat16"], *map(tuple, arguments)))
        else:
            ahead.op(name, tuple(arguments), torch.bfloat16)
        counts[name].append(len(found) - first)
print(json.dumps(counts))
"""


def sessions(prefix: int = 0, branches: int = 1, *solver) -> list[tuple]:
    """Return shapes of sessions, with samples and tokens that are 1, a multiple of 16, or neither."""
    sizes = (3, 9), (1, 16), (16, 1), (256, 64)
    return [((samples, tokens, prefix, branches, 0, "tarflow"), *solver) for samples, tokens in sizes]


# Name -> sizes of each call, which differ in batch and tokens.
CALLS = {
    "residual_norm": [(3, 5, 64), (1, 1, 64), (16, 16, 64)],
    "bias_gelu": [(3, 5, 64), (1, 1, 64), (16, 16, 64)],
    "affine_flow": [(3, 16, 12), (1, 16, 12), (16, 32, 12)],
    # These need to know whether 16 divides the number of tokens.
    "flow_head": [(3, 5, 12, 64), (1, 7, 12, 64), (16, 5, 12, 64)],
    "causal_attention": [(3, 37, 4, 2, 16), (1, 5, 1, 1, 16), (16, 53, 16, 16, 16)],
    "attention_flow": [(3, 37, 4, 2, 16, 12), (1, 5, 4, 4, 16, 12), (16, 53, 4, 1, 16, 12)],
    "session": sessions(),
    "session with text": sessions(6, 2),
    "session of a parallel inverse": sessions(0, 1, (7, True, ())),
}


@pytest.fixture(scope="module")
def counts() -> dict[str, list[int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, json.dumps(CALLS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_any_batch_and_length_need_the_same_kernels(counts, name):
    first, *later = counts[name]
    assert first > 0 and later == [first] * (len(CALLS[name]) - 1)
