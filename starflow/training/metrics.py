"""Metrics of training beside the loss: terms of the loss by block, speed and memory; and where they are logged."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ConfigError
from ..io.digests import digest
from ..io.files import writing

try:
    import resource
except ImportError:
    # Windows has no such module.
    resource = None

PROJECT = "starflow"
# Metrics that a clock or the system gives, so that they differ between equal runs.
MEASURED = ("images_per_second", "tokens_per_second", "flop_utilisation", "peak_memory_gb")
NEEDED = "--{0} needs the package {0}: pip install 'starflow-kernels[logging]'"


class BlockTerms:
    """Terms of a flow's loss, which its blocks give in each forward pass of training.

    Args:
        blocks: blocks of the flow, whose outputs are tokens (B, T, D) and log-determinants (B,).
        values: values of an image, over which the terms are means.
    """

    def __init__(self, blocks: Iterable[nn.Module], values: int):
        self.values, self.passes = values, 0
        self.sums: dict[str, torch.Tensor] = {}
        self.names = [f"logdet_{i}" for i, _ in enumerate(blocks)]
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda _module, _inputs, output, i=i: self._add(i, *output))

    @torch.no_grad()
    def _add(self, block: int, tokens: torch.Tensor, logdet: torch.Tensor) -> None:
        terms = {self.names[block]: logdet.detach().mean() / self.values}
        if block == len(self.names) - 1:
            terms["prior"] = 0.5 * tokens.detach().square().mean()
            self.passes += 1
        for name, term in terms.items():
            self.sums[name] = self.sums[name] + term if name in self.sums else term

    def read(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Return the terms of the passes since the last call, in nats per dimension: loss = prior - sum of logdets.

        Args:
            mean: function that returns the mean of a tensor over all processes.
        """
        names = ["prior", *self.names]
        values = mean(torch.stack([self.sums[name] for name in names])) / self.passes
        self.sums, self.passes = {}, 0
        return dict(zip(names, values.tolist()))


class Meter:
    """Meter of speed and memory.

    Args:
        device: torch device of this process.
        devices: number of devices that train together.
        tokens: tokens per image; 0 if the model has none.
        flops: operations of a training step per image; 0 if unknown.

    Attributes:
        tflops: peak of a device in 1e12 operations per second; 0 if unknown.
    """

    def __init__(self, device: str, devices: int = 1, tokens: int = 0, flops: float = 0.0):
        self.device, self.devices, self.tokens, self.flops = torch.device(device), devices, tokens, flops
        self.tflops = self._seconds = 0.0
        self._images = 0
        self.start()

    def start(self) -> None:
        """Let the time of a step begin."""
        self._begin = time.perf_counter()

    def stop(self, images: int) -> None:
        """Let the time of a step end.

        Args:
            images: images of the step, on all devices.
        """
        self._seconds += time.perf_counter() - self._begin
        self._images += images

    def read(self) -> dict[str, float]:
        """Return speed, utilisation of the peak and largest memory in GB since the last call."""
        rate = self._images / max(self._seconds, 1e-9)
        found = {"images_per_second": rate, "peak_memory_gb": self._memory() / 1e9}
        if self.tokens:
            found["tokens_per_second"] = rate * self.tokens
        if self.flops and self.tflops:
            found["flop_utilisation"] = rate * self.flops / (self.devices * self.tflops * 1e12)
        self._seconds, self._images = 0.0, 0
        return found

    def _memory(self) -> int:
        """Return the largest bytes that this process has had on the GPU, or in memory."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return 0
        # macOS counts bytes, other systems count units of 1024 bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Logger(Protocol):
    """Place where metrics are shown while a run goes on."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add the metrics of a step."""

    def close(self) -> None:
        """Write what is not written yet."""


class _TensorBoard:
    """Logger to files for TensorBoard, which a thread writes. Its errors are raised by the next call."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(NEEDED.format("tensorboard")) from None
        self.folder = folder / "tensorboard"
        self.others = threading.excepthook
        threading.excepthook = self._keep
        with writing(self.folder):
            self.writer = SummaryWriter(str(self.folder))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        with writing(self.folder):
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        try:
            with writing(self.folder):
                self.writer.close()
        finally:
            threading.excepthook = self.others

    def _keep(self, error: threading.ExceptHookArgs) -> None:
        """Print an error of a thread, but not that the disk is full or the like."""
        if not issubclass(error.exc_type, OSError):
            self.others(error)


class _Wandb:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ConfigError(NEEDED.format("wandb")) from None
        # The same folder is the same run, so that a resumed run continues its curves.
        key = digest(str(folder.resolve()).encode())[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project=PROJECT, name=folder.name, id=key, resume="allow", dir=str(folder), config=dict(settings)
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, Callable[[Path, Mapping[str, Any]], Logger]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


def open_loggers(names: Collection[str], folder: Path, settings: Mapping[str, Any]) -> list[Logger]:
    """Return loggers.

    Args:
        names: names of LOGGERS.
        folder: folder of the run.
        settings: settings of the run.

    Raises:
        ConfigError: a package is missing.
    """
    return [LOGGERS[name](folder, settings) for name in names]
