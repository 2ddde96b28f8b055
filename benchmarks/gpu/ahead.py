"""Compile the Triton kernels of a program without launching them, on a machine with or without a GPU.

    TRITON_CACHE_DIR=DIR python -m benchmarks.gpu.ahead bench --capability 90 --jobs 12

The code that launches runs on tensors without values, and each launch compiles its kernel as it will be specialised.
Triton keeps the result in DIR, under a key of its own files, the source and the chip. --count compiles nothing and
prints how many kernels there are: one for each combination of dtypes, compile-time arguments, and sizes as Triton
specialises them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import inspect
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SHARED_LIMIT = 232448


class Kernel(NamedTuple):
    """A kernel as it is specialised: its identity, the name of its function, and bytes of shared memory if compiled."""

    identity: str
    name: str
    shared: int = 0


class Session(NamedTuple):
    """A session of the sampler: spec, weights, shape, and window, slide and neighbours of a parallel inverse."""

    spec: object
    weights: object
    shape: tuple
    solver: tuple = ()


def compile_all(
    program: str,
    checkpoint: str,
    cache: Path | None = None,
    capability: int | None = None,
    jobs: int | None = None,
    wheel: Path | None = None,
) -> dict:
    """Compile the kernels of a program in several processes that see no GPU; return what was compiled.

    Args:
        program: "smoke" or "bench".
        checkpoint: trained flow, a folder or a bundled name.
        cache: folder of Triton's cache; None takes that of this process.
        capability: of the chip, such as 90; None takes that of the GPU of this process.
        jobs: number of processes.
        wheel: folder with the package triton for whose users the cache is made; None for the installed one.
    """
    if capability is None:
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    if cache:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "benchmarks.gpu.ahead", program, "--capability", str(capability)]
    command += ["--checkpoint", checkpoint, "--jobs", str(jobs or os.cpu_count())]
    command += ["--wheel", str(wheel)] if wheel else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def pretend(capability: int, compiles: bool = True) -> list[Kernel]:
    """Let this process take its machine for one with a GPU, without tensors that have values.

    Args:
        capability: of the chip, such as 90.
        compiles: compile each kernel that is launched; otherwise a launch only adds it to the list.

    Returns:
        A list that gets each kernel that is launched.
    """
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from triton import knobs, runtime
    from triton.backends.compiler import GPUTarget
    from triton.runtime import jit

    from starflow_kernels._core import registration
    from starflow_kernels._triton import runtime as gate

    target = GPUTarget("cuda", capability, 32)

    class Driver:
        """Driver of a GPU that launches nothing."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))

    class Pointer(jit.MockTensor):
        """Tensor of which only the dtype and the alignment count."""

        def __init__(self, tensor: torch.Tensor):
            super().__init__(tensor.dtype)
            self.offset = tensor.storage_offset() * tensor.element_size()

        def data_ptr(self) -> int:
            return self.offset

    def mock(value):
        return Pointer(value) if isinstance(value, torch.Tensor) else value

    found, seen, launch = [], set(), jit.JITFunction.run

    def add(kernel: Kernel) -> bool:
        new = kernel.identity not in seen
        if new:
            seen.add(kernel.identity)
            found.append(kernel)
        return new

    def compiled(self, *args, grid, warmup, **options):
        options = {name: mock(value) for name, value in options.items()}
        kernel = launch(self, *map(mock, args), grid=grid, warmup=True, **options)
        if compiles and add(Kernel(kernel.hash, self.__name__, kernel.metadata.shared)):
            _compile_launcher(kernel)
        return kernel

    def counted(*, key, fn, **others) -> bool:
        add(Kernel(f"{fn.name} {key}", fn.jit_function.__name__))
        # Nothing is compiled.
        return True

    if not compiles:
        knobs.runtime.jit_cache_hook = counted
    runtime.driver.set_active(Driver())
    jit.JITFunction.run = compiled
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *args: divmod(capability, 10)
    torch.cuda.device = lambda *args: contextlib.nullcontext()
    # A torch without CUDA cannot index tensors on a GPU, so all are on the CPU.
    gate._refuse_devices = lambda args: None
    # The ops call their backends themselves instead of through torch's dispatcher.
    registration.is_intercepted = lambda: False
    registration.PLAIN_TYPES = frozenset((FakeTensor, torch.Tensor, torch.nn.Parameter))
    FakeTensorMode(allow_non_fake_inputs=True).__enter__()
    return found


def take_key(wheel: Path) -> None:
    """Store kernels under the key of another wheel of the same version of Triton, such as that of a newer Python."""
    from triton.runtime import cache

    there = {**vars(cache), "__file__": str(wheel / "triton" / "runtime" / "cache.py")}
    key = types.FunctionType(inspect.unwrap(cache.triton_key).__code__, there)()
    cache.triton_key = lambda: key


def _compile_launcher(kernel) -> None:
    """Compile the launcher of a kernel where Triton needs one and its driver's library is there."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with contextlib.suppress(AssertionError, OSError):
            driver.CudaLauncher(kernel.src, kernel.metadata)


def empty(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return tensors in place of those of op_cases.randn."""
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def op(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compile both passes of an op."""
    from . import op_cases
    from .op_checks import ours, passes

    op_cases.randn = empty
    case = op_cases.MAKE[name](shape, dtype, "cpu")
    outputs = ours(case)(case.tensors)
    passes(ours(case), case.tensors, [torch.empty_like(output) for output in outputs])


def attention(shape: tuple, dtype: torch.dtype) -> None:
    """Compile both passes of causal_attention."""
    from starflow_kernels._core import registration

    from . import choice, op_cases

    op_cases.randn = choice.randn = empty
    tensors = choice.draw(shape, dtype, "cpu")
    args = choice.arguments(tensors, shape[-1])
    outputs = registration.call("causal_attention", *args, backend="triton")
    registration.call("causal_attention_backward", [tensors["grad"], None], list(outputs), *args, backend="triton")


def session(given: Session) -> None:
    """Compile a step, or a sweep, and what comes before it."""
    from starflow_kernels.block.triton import sequential, sizes, sweeps
    from starflow_kernels.block.triton.sessions import Shape, bucket
    from starflow_kernels.block.triton.weights import Model

    spec, kind, shape = given.spec, given.weights, Shape(*given.shape)
    device, one_byte = torch.device("cpu"), "quantize" in kind.options
    spec = dataclasses.replace(spec, positions=shape.tokens if spec.positions else 0)
    weights = [torch.empty(size, dtype=kind.dtype, device=device) for size in spec.weight_shapes.values()]
    if sequential.refuse(torch.empty(1, device=device), weights, None, None, None, None, None, spec.to_json()):
        return
    model = Model(spec, weights, kind.options.get("quantize", "none"), one_byte)
    shape, window = shape._replace(samples=bucket(shape.samples)), given.solver[0] if given.solver else 1
    # As block_jacobi pads a window.
    n = -(-window // sizes.BLOCK_M) * sizes.BLOCK_M if given.solver else 1
    made = sweeps.JacobiSession if given.solver else sequential.TritonSession
    buffers = made.buffers(spec, kind.dtype, shape, n, *given.solver)
    of, w = made(model, shape, device, buffers, n, *given.solver), model.read(weights)
    text = (shape.branches, shape.samples, shape.prefix, spec.text_dim)
    of.begin(w, torch.empty(text, dtype=kind.dtype, device=device) if shape.prefix else None)
    of.launch(w)


def trained(checkpoint: str) -> Iterator[tuple[Callable, tuple]]:
    """Iterate over `session` with its arguments, for all that `sampling.trained` launches."""
    from starflow.inversion.request import neighbours

    from ..cpu.parallel import Case, load
    from .sampling import WINDOWS
    from .sampling_cases import WEIGHTS

    kind = WEIGHTS["bfloat16"]
    case = Case(*load(checkpoint, kind.dtype), batch=1)
    T, blocks = case.z.shape[1], {spec: context for _, spec, context in case.blocks}
    for (spec, context), batch in itertools.product(blocks.items(), (1, 256)):
        cond, sizes = context.get("cond"), (0, 1)
        slots = 0 if cond is None else T if cond.ndim == 3 else 1
        for tokens in {min(T, few) for few in (T, 8, 16)}:
            yield session, (Session(spec, kind, (batch, tokens, *sizes, slots, "tarflow")),)
        for window in WINDOWS:
            for near in ((), neighbours(case.flow.config.grid, window)):
                solver = min(window, T - (not spec.start)), True, tuple(near)
                yield session, (Session(spec, kind, (batch, T, *sizes, slots, "tarflow"), solver),)


def jobs(program: str, checkpoint: str) -> Iterator[tuple[Callable, tuple]]:
    """Iterate over the functions above with their arguments, for all that a program launches."""
    from . import choice
    from .op_cases import CHECKED, MAKE, TIMED
    from .sampling_cases import CASES, WEIGHTS, checked
    from .sampling_checks import SOLVERS

    whole, dtypes = program == "bench", (torch.bfloat16, torch.float32, torch.float16)
    for name in MAKE:
        yield from ((op, (name, shape, torch.bfloat16)) for shape in TIMED[name] if whole)
        yield from ((op, (name, shape, dtype)) for shape in CHECKED[name][: None if whole else 1] for dtype in dtypes)
    for shape in choice.SHAPES if whole else ():
        yield from ((attention, (shape, dtype)) for dtype in dtypes[::2])
    for block in checked(False).values():
        options, T = block.options, block.tokens
        sizes = options.get("text", 0), 2 if "guidance" in options else 1, int("cond" in options)
        rule = options.get("rule", "tarflow")
        for kind in block.weights:
            for B, tokens in {(block.samples, T), (block.samples, 1), (1, T), (block.samples, 8), (block.samples, 16)}:
                yield session, (Session(block.spec, WEIGHTS[kind], (B, tokens, *sizes, rule)),)
        for solver in SOLVERS.values() if block.thorough else ():
            options = solver.window, solver.slide, solver.neighbours
            yield session, (Session(block.spec, WEIGHTS[block.weights[0]], (block.samples, T, *sizes, rule), options),)
    if whole:
        yield from trained(checkpoint)
    for case in CASES if whole else ():
        for kind in case.weights:
            for spec in dict.fromkeys(case.specs):
                text = case.options.get("text", 0) if spec.text_dim else 0
                branches, rule = 2 if text and "guidance" in case.options else 1, case.options.get("rule", "tarflow")
                for tokens in (case.tokens, 8, 16):
                    shape = case.samples, tokens, text, branches, 0, rule
                    yield session, (Session(spec, WEIGHTS[kind], shape),)


# The jobs, and what `pretend` returned in this process of the pool.
_jobs: list[tuple[Callable, tuple]] = []
_found: list[Kernel] = []


def _begin(capability: int, compiles: bool) -> None:
    global _found
    _found = pretend(capability, compiles)


def _compiled(number: int) -> tuple[list[Kernel], list[str]]:
    """Return the kernels of a job that are new in this process, and what failed."""
    from .runner import Skip

    (function, args), before = _jobs[number], len(_found)
    try:
        # A combination that the kernels refuse launches nothing.
        with contextlib.suppress(Skip):
            function(*args)
    except Exception as error:
        traceback.print_exc()
        return [], [f"{function.__name__}{args}: {type(error).__name__}: {error}"[:300]]
    new = _found[before:]
    return new, [f"{name} needs {size} bytes of shared memory" for _, name, size in new if size > SHARED_LIMIT]


def main() -> int:
    """Compile in this process and its children, and print a line of JSON at the end; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("smoke", "bench"))
    parser.add_argument("--capability", type=int, default=90, help="of the chip")
    parser.add_argument("--checkpoint", default="digits", help="trained flow: a folder or a bundled name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--wheel", type=Path, help="folder with the package triton for which the cache is made")
    parser.add_argument("--count", action="store_true", help="count the kernels instead of compiling them")
    args = parser.parse_args()
    if args.wheel:
        take_key(args.wheel)
    start = time.perf_counter()
    _jobs.extend(jobs(args.program, args.checkpoint))
    with multiprocessing.get_context("fork").Pool(args.jobs, _begin, (args.capability, not args.count)) as pool:
        found = pool.map(_compiled, range(len(_jobs)), chunksize=1)
    failed = [line for _, lines in found for line in lines]
    # Several processes may compile the same kernel.
    kernels = {kernel.identity: kernel.name for new, _ in found for kernel in new}
    result = {"kernels": len(kernels), "seconds": round(time.perf_counter() - start, 1)}
    if args.count:
        result["functions"] = dict(collections.Counter(kernels.values()).most_common())
    print(json.dumps({**result, "failed": "; ".join(dict.fromkeys(failed))} if failed else result))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
