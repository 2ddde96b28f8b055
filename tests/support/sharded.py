"""Two processes that share the weights of one flow by FSDP."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from starflow import Guidance
from starflow.models.certificate import certificate

from .flows import make
from .workers import CONTEXT

# Modules with shards of their own.
UNITS = ("flow", "blocks", "both")


def run(folder: Path) -> list[int]:
    """Compare sharded flows with a whole one in two processes; return their exit codes."""
    found = [CONTEXT.Process(target=work, args=(rank, str(folder / "store"))) for rank in range(2)]
    for process in found:
        process.start()
    for process in found:
        process.join(120)
    return [process.exitcode for process in found]


def work(rank: int, store: str) -> None:
    """Compare in one of the processes, which meet through the file `store`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for units in UNITS:
        compare(units)
    dist.destroy_process_group()


def compare(units: str) -> None:
    """Compare results before and after steps of training."""
    flow, whole = make(), make()
    if units != "flow":
        for block in flow.blocks:
            fully_shard(block)
    if units != "blocks":
        fully_shard(flow)
    trained = [(model, torch.optim.AdamW(model.parameters(), 1e-3)) for model in (flow, whole)]
    labels, z = torch.arange(4), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        x = whole.inverse(z, labels).x.detach()
        close(flow.inverse(z, labels).x, x)
        close(flow.log_prob(x, labels), whole.log_prob(x, labels))
        close(flow.denoise(x, labels), whole.denoise(x, labels))
        with torch.inference_mode():
            close(flow.inverse(z, labels, guidance=Guidance(1.0)).x, whole.inverse(z, labels, guidance=Guidance(1.0)).x)
        assert certificate(flow, x, z, labels).max < 1e-4
        assert flow.sample(4, labels, certify=True).report.certificate < 1e-4
        assert flow.inverse(z[:0], []).x.shape == (0, 3, 8, 8)
        for model, optimizer in trained:
            model.loss(model(x, labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (whole.inverse(z, labels).x - x).abs().max() > 1e-2


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that results are equal up to the order of sums over the processes."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
