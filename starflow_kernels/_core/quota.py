"""Cores that the control groups of Linux grant this process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

GROUPS, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def granted_cores(groups: Path = GROUPS, mount: Path = MOUNT) -> int | None:
    """Return the smallest CPU quota of the process's groups and of those above them, in whole cores, or None.

    Args:
        groups: file that lists the groups of the process.
        mount: folder in which the group file systems are mounted.
    """
    return min((max(1, math.ceil(quota)) for quota in _quotas(groups, mount)), default=None)


def _quotas(groups: Path, mount: Path) -> Iterator[float]:
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / "cpu" if controllers else mount
        # In a container, the path may be that of the host; the quota is then at the top.
        lowest = top / path.lstrip("/")
        for folder in (lowest, *lowest.parents):
            if folder.is_relative_to(top):
                yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Yield the quota of a group if it has one: cpu.max in version 2 of control groups, cpu.cfs_* in version 1."""
    try:
        if (both := folder / "cpu.max").exists():
            quota, period = both.read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8") for name in ("quota", "period")
            )
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return
