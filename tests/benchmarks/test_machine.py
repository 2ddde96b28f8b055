"""Description of the machine at the head of a result."""

from __future__ import annotations

from benchmarks import machine


def test_a_machine_without_git_is_described(monkeypatch):
    for ceiling in ("peak_flops", "read_bandwidth"):  # they need a compiler
        monkeypatch.setattr(machine, ceiling, lambda *sizes: 1e9)
    monkeypatch.setenv("PATH", "")
    assert machine.description()["commit"] == "unknown"
