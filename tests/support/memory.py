"""Bytes of the tensors that live at the same time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Mode that counts the bytes of the storages of given tensors and of all results, and records their peak."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, value: object) -> None:
        if isinstance(value, torch.Tensor) and (key := (storage := value.untyped_storage())._cdata) not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            self.add(value)
        return results
