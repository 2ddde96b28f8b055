"""Memory limit of KV caches."""

from __future__ import annotations

import functools
import os


@functools.cache
def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_bytes(memory: int | None = None) -> int:
    """Return how many bytes the KV cache of a call may take: STARFLOW_CACHE_GB, or a quarter of `memory`.

    memory: bytes of memory of the device; None takes the memory of this machine.
    """
    gigabytes = float(os.environ.get("STARFLOW_CACHE_GB", 0))
    return int(gigabytes * 2**30) or (memory or _machine_bytes()) // 4
