"""Description of the machine at the head of a result."""

from __future__ import annotations

import torch

from benchmarks import machine
from benchmarks.command import in_fresh_process


def test_a_machine_without_git_is_described(monkeypatch):
    for ceiling in ("peak_flops", "read_bandwidth"):  # they need a compiler
        monkeypatch.setattr(machine, ceiling, lambda *sizes: 1e9)
    monkeypatch.setenv("PATH", "")
    assert machine.description()["commit"] == "unknown"


def growth(megabytes: int) -> int:
    torch.ones(100 << 18, dtype=torch.float32, device="cpu")
    before = machine.reset_peak()
    torch.ones(megabytes << 18, dtype=torch.float32, device="cpu")
    return machine.peak_bytes() - before


def test_the_peak_of_a_fresh_process_is_its_own():
    # Memory that this process, or the new one, had used before must not hide what a call uses.
    torch.ones(400 << 18, dtype=torch.float32, device="cpu")
    assert 60e6 < in_fresh_process(growth, 64) < 80e6
