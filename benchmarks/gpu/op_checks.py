"""Checks of every op with a Triton backend on a GPU: error contract, bits, graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from .bench import Bench, attempt, refusals_skipped
from .op_cases import MAKE, Case
from .runner import Skip


def passes(function: Callable, tensors: list[torch.Tensor], grads: list | None = None) -> list[torch.Tensor]:
    """Return the outputs of function(tensors) and the gradients of all tensors.

    Args:
        function: takes the tensors, returns a sequence of outputs.
        tensors: inputs.
        grads: gradients of the outputs; None draws them from a fixed seed.
    """
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = function(tensors)
    if grads is None:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, tensors, grads)]


def ours(case: Case) -> Callable:
    """Return the op on the Triton backend as a function of its tensors; it raises Skip if the backend refuses them."""

    def run(tensors):
        with refusals_skipped():
            return case.run(tensors, "triton")

    return run


def plain(case: Case) -> Callable:
    """Return the op in plain PyTorch, the specification."""
    return lambda tensors: case.run(tensors, "reference")


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Raise AssertionError unless all results have the same bits."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(a, b):
            raise AssertionError(f"result {i}: largest difference {(a.double() - b.double()).abs().max().item():.2e}")


def contract(case: Case, bench: Bench, wide: torch.dtype = torch.float64) -> str:
    """Compare outputs and gradients with the specification in a wider dtype."""
    found = passes(ours(case), case.tensors)
    usual = passes(plain(case), case.tensors)
    exact = [t.double() for t in passes(plain(case), [t.to(wide) for t in case.tensors])]
    worst = 0.0
    for i, (value, plain_value, right) in enumerate(zip(found, usual, exact, strict=True)):
        if not torch.isfinite(value).all():
            raise AssertionError(f"result {i} is not finite")
        error, allowed = ((t.double() - right).abs().max().item() for t in (value, plain_value))
        bound = 2 * (allowed + torch.finfo(value.dtype).eps * right.abs().max().item())
        worst = max(worst, error / bound)
    if worst > 1:
        raise AssertionError(f"{worst:.2f} of the error that the contract allows")
    return f"{worst:.2f} of the allowed error"


def deterministic(case: Case, bench: Bench) -> None:
    """Require the same bits from two runs."""
    equal(passes(ours(case), case.tensors), passes(ours(case), case.tensors))


def batch_invariant(case: Case, bench: Bench) -> None:
    """Require the same bits for a row alone and in the batch."""
    if case.shape[0] == 1:
        raise Skip("one row")

    def rows(results: list[torch.Tensor], outputs: int) -> list[torch.Tensor]:
        return results[: outputs + case.batched]

    outputs = len(ours(case)(case.tensors))
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in ours(case)(case.tensors)]
    batch = rows(passes(ours(case), case.tensors, grads), outputs)
    alone = [t[-1:] if i < case.batched else t for i, t in enumerate(case.tensors)]
    equal(rows(passes(ours(case), alone, [g[-1:] for g in grads]), outputs), [t[-1:] for t in batch])


def compiles(case: Case, bench: Bench) -> None:
    """Compile the op as one graph and require the same bits; in one dtype, since it takes long."""
    if case.tensors[0].dtype != bench.timed_dtype:
        raise Skip(f"it is checked in {bench.timed_dtype}")
    torch.compiler.reset()
    graph = torch.compile(ours(case), fullgraph=True, backend=bench.compiler)
    equal(passes(graph, case.tensors), passes(ours(case), case.tensors))


def checkpoints(case: Case, bench: Bench) -> None:
    """Require the same bits under activation checkpointing."""
    again = lambda tensors: checkpoint(ours(case), tensors, use_reentrant=False)  # noqa: E731
    equal(passes(again, case.tensors), passes(ours(case), case.tensors))


def autocasts(case: Case, bench: Bench) -> None:
    """Require that autocast leaves the op in the dtypes of its inputs."""
    with torch.autocast(bench.device, torch.bfloat16 if case.tensors[0].dtype == torch.float16 else torch.float16):
        inside = ours(case)(case.tensors)
    equal(list(inside), list(ours(case)(case.tensors)))


def captures(case: Case, bench: Bench) -> None:
    """Capture the op in a CUDA graph and replay it on new inputs."""
    if bench.dry:
        raise Skip("it needs a GPU")
    static = [t.clone().zero_() for t in case.tensors]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        ours(case)(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        outputs = ours(case)(static)
    for t, value in zip(static, case.tensors):
        t.copy_(value)
    graph.replay()
    equal(list(outputs), list(ours(case)(case.tensors)))


CHECKS = {
    "error contract": contract,
    "determinism": deterministic,
    "batch invariance": batch_invariant,
    "fullgraph compile": compiles,
    "checkpointing": checkpoints,
    "autocast": autocasts,
    "CUDA graph": captures,
}


def check(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, bench: Bench, names: Iterable[str] = CHECKS
) -> Iterator[dict]:
    """Run the named checks on an op at one shape; yield a row per check."""
    row = {"op": op, "shape": shape, "dtype": str(dtype)[6:]}
    for name in names:
        result, note = attempt(lambda name=name: CHECKS[name](MAKE[op](shape, dtype, bench.device), bench))
        yield {**row, "check": name, "result": result, "note": note}
        if result == "skipped" and name == "error contract":
            return
