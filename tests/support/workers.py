"""Processes of one run without torchrun: forked from a server that has imported the package, so they start fast."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")


def start(
    folder: Path, count: int, *arguments: str, failing: int = -1, missing: int = -1
) -> list[multiprocessing.Process]:
    """Start `count` processes of `starflow` with the environment of torchrun; they write to folder/RANK.txt.

    arguments: words of a command, or of several with ";" between them. failing: rank of a process whose flow gives
    values that are not finite. missing: rank of a process to leave out.
    """
    CONTEXT.set_forkserver_preload(["starflow.cli", "starflow.pipelines", "torch.distributed"])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    found = []
    for rank in sorted({*range(count)} - {missing}):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        given = {**variables, "MASTER_PORT": port}, list(arguments), str(folder / f"{rank}.txt"), rank == failing
        found.append(CONTEXT.Process(target=work, args=given))
        found[-1].start()
    return found


def run(folder: Path, count: int, *arguments: str, failing: int = -1) -> tuple[list[int], list[str]]:
    """Return the exit code and the output of each process."""
    processes = start(folder, count, *arguments, failing=failing)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes], [(folder / f"{i}.txt").read_text() for i in range(count)]


def work(variables: dict[str, object], arguments: list[str], output: str, fails: bool) -> None:
    """Run the command line in one process."""
    # A shell lets the processes that it starts in the background ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update({name: str(value) for name, value in variables.items()})
    from starflow.cli import main
    from starflow.errors import InverseError
    from starflow.models.flow import Flow

    def fail(*arguments, **options):
        raise InverseError("values are not finite")

    if fails:
        Flow.inverse = fail
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        words = [[]]
        for word in arguments:
            if word == ";":
                words.append([])
            else:
                words[-1].append(word)
        code = max(main(command) for command in words)
    sys.exit(code)
