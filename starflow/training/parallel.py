"""Processes that train one model together, each on its share of every batch, by FSDP2 of PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, StarflowError
from ..sampling.processes import PATIENCE, Processes

Parallel = Literal["data", "fsdp"]


def check_division(size: int, processes: int, accumulate: int, images: int | None = None) -> None:
    """Raise ConfigError unless the rows of a batch can be divided evenly.

    Args:
        size: training.batch_size of the settings.
        processes: number of processes.
        accumulate: training.accumulate of the settings, parts into which each process divides its rows.
        images: images of the data, of which a larger batch takes all; None if they are not known.
    """
    rows = size if images is None else min(size, images)
    if rows % (processes * accumulate):
        cut = f", cut to the {images} images of the data" if rows < size else ""
        parts = f"{processes} process{'es' if processes > 1 else ''}"
        raise ConfigError(
            f"training.batch_size={size}{cut}: {parts} times training.accumulate={accumulate} do not divide it"
        )


class Team:
    """Processes of a run: those of torchrun, or this one alone.

    Attributes:
        count: number of processes.
        rank: number of this process.
        group: process group of the threads that write checkpoints, or None for one process.

    Args:
        device: torch device of this process.
    """

    def __init__(self, device: str = "cpu"):
        self.processes, self.device = Processes(), torch.device(device)
        self.count, self.rank, self.group = self.processes.count, self.processes.rank, None
        if self.count > 1:
            on_gpu = self.device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(self.device)
            self.processes.join("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def rows(self, size: int) -> slice:
        """Return the rows of a batch that this process takes.

        Args:
            size: rows of the batch, a multiple of the number of processes.
        """
        each = size // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a whole batch with the rows of this process, and zeros in place of the others.

        Args:
            rows: (B / count, ...) rows of this process.
        """
        if self.count == 1:
            return rows
        batch = rows.new_zeros((self.count * len(rows), *rows.shape[1:]))
        batch[self.rows(len(batch))] = rows
        return batch

    def own(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the rows of this process.

        Args:
            batch: (B, ...) whole batch.
        """
        return batch[self.rows(len(batch))]

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of a tensor over the processes."""
        if self.count == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.count

    def any(self, flag: bool) -> bool:
        """Return whether a flag is set in any process."""
        if self.count == 1:
            return flag
        value = torch.tensor(int(flag), dtype=torch.int64, device="cpu")
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def union(self, numbers: Iterable[int]) -> set[int]:
        """Return the numbers of at least 0 that any process has."""
        own = torch.tensor(sorted(numbers), dtype=torch.int64, device="cpu")
        if self.count == 1:
            return set(own.tolist())
        # The group of the threads that write checkpoints may be in use.
        length = torch.tensor(len(own), dtype=torch.int64, device="cpu")
        dist.all_reduce(length, dist.ReduceOp.MAX)
        padded = torch.full((int(length),), -1, dtype=torch.int64, device="cpu")
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(found, padded)
        return set(torch.cat(found).tolist()) - {-1}

    def shard(
        self,
        module: nn.Module,
        units: Iterable[nn.Module],
        parallel: Parallel,
        reshard_after_forward: bool,
        dtype: torch.dtype | None,
    ) -> None:
        """Divide the weights of a module, or copies of them, among the processes.

        Args:
            module: module whose `forward` is called.
            units: parts of the module whose weights are gathered together, inner ones first.
            parallel: "fsdp" shards the weights; "data" gives each process a copy, which is a mesh with shards of one.
            reshard_after_forward: whether the weights of a unit are gathered anew by the backward pass.
            dtype: dtype of the gathered weights; None keeps theirs.
        """
        if self.count == 1:
            return
        shape, names = ((self.count, 1), ("copy", "shard")) if parallel == "data" else ((self.count,), ("shard",))
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        # Nothing in a layer is changed in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        # Tokens and noise stay in float32.
        policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
        for unit in (*units, module):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)

    def gathered(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return whole tensors in the memory of the CPU of the first process, and nothing in the others.

        Args:
            tensors: tensors by name, which may be shards. One process gets them as they are.
        """
        if self.count == 1:
            return dict(tensors)
        whole = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                whole[name] = full.cpu()
        return whole


class LostProcessError(StarflowError):
    """Another process of a run has ended."""


def refuse_processes(command: str) -> None:
    """Raise ConfigError if torchrun has started several processes of a command that runs in one."""
    if Processes().count > 1:
        raise ConfigError(f"starflow {command} runs in one process: start it without torchrun")


def reduce_gradients(modules: Iterable[nn.Module], now: bool) -> None:
    """Let the next backward pass add the gradients of all processes, or leave that to a later one.

    Args:
        modules: modules, of which sharded ones are affected.
        now: whether to add them now.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(now)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def scalar(value: torch.Tensor) -> float:
    """Return the value of a tensor that may be spread over the processes."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).item()
