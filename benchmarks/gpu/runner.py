"""Run the cases of a program one after the other, each in a process of its own, and keep every row.

Rows are appended to a file as JSON lines, so that a run that is killed loses nothing. A later run with the same file
continues with the cases that have no end there. The process of the next case starts while a case runs: it imports what
it needs and waits. All output of the processes goes to a log beside the rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Parts of a row that `describe` leaves out.
QUIET = ("case", "kind", "machine", "backends")


class Skip(Exception):
    """Raised by a case or a check that cannot run here; the message gives the reason."""


class Clock:
    """Budget of seconds that starts now.

    Args:
        seconds: the whole budget.
    """

    def __init__(self, seconds: float):
        self.end = time.perf_counter() + seconds

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.perf_counter()


class Case(NamedTuple):
    """A part of a program.

    Args:
        name: identifies the case among those of the program.
        seconds: after which its process is ended; the case starts only if the program has as many left.
        run: run(clock, rows) yields rows; `rows` has those of the cases before.
    """

    name: str
    seconds: float
    run: Callable[[Clock, Rows], Iterator[dict]]


class Rows:
    """Rows in a file of JSON lines.

    Each has its "case". A row with "state" marks the begin of a case, or its end: "done", or why it ended before that.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:  # the last line of a run that was killed may be a part of one
            if file.tell() and not path.read_bytes().endswith(b"\n"):
                file.write(b"\n")

    def add(self, case: str, **row) -> None:
        """Append a row of a case."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, **row}) + "\n")

    def cases(self) -> dict[str, list[dict]]:
        """Return the rows of each case since it began for the last time; its end, if it has one, is the last."""
        found: dict[str, list[dict]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("state") == "begun":
                found[row["case"]] = []
            else:
                found[row["case"]].append(row)
        return found

    def ended(self) -> dict[str, str]:
        """Return the end of every case that has one."""
        return {case: rows[-1]["state"] for case, rows in self.cases().items() if rows and "state" in rows[-1]}

    def results(self) -> Iterator[dict]:
        """Iterate over the rows that are no marks; one for a case that did not end well tells why."""
        for case, rows in self.cases().items():
            yield from (row for row in rows if "state" not in row)
            if rows and rows[-1].get("state", "done") != "done":
                yield {"case": case, "failed": rows[-1]["state"]}


def guarded(rows: Callable[[], Iterator[dict]]) -> Iterator[dict]:
    """Yield rows until an error, which becomes the last row; a refusal is a skip with its reason."""
    try:
        yield from rows()
    except Skip as reason:
        yield {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        yield {"failed": f"{type(error).__name__}: {error}"[:500]}


def serve(cases: list[Case], rows: Rows) -> None:
    """Wait on standard input for the name of a case and run it; the process ends if its parent does."""
    name = sys.stdin.readline().strip()
    if not name:
        return

    def end_with_parent():
        sys.stdin.read()
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    case = next(case for case in cases if case.name == name)
    for row in guarded(lambda: case.run(Clock(case.seconds), rows)):
        rows.add(name, **row)
    sys.stdout.flush()
    # Leaves the device as it is: destructors may wait for one that hangs.
    os._exit(0)


class Worker:
    """Process that waits for a case.

    Args:
        command: starts a process that calls `serve`.
        log: file for its output.
    """

    def __init__(self, command: list[str], log: Path):
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )

    def run(self, case: Case) -> str:
        """Run a case; return how it ended."""
        try:
            self.process.stdin.write(f"{case.name}\n".encode())
            self.process.stdin.flush()
            status = self.process.wait(case.seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {case.seconds:g} s"
        except BrokenPipeError:
            status = self.process.wait()
        return f"its process ended with status {status}" if status else "done"

    def end(self) -> None:
        """End the process and those that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def run(cases: list[Case], rows: Rows, command: list[str], seconds: float) -> list[str]:
    """Run the cases that have no end in the file; return the names of those for which no time is left.

    Args:
        cases: in their order.
        rows: file of the rows.
        command: starts a process that calls `serve`.
        seconds: for all cases.
    """
    clock, ended, log = Clock(seconds), rows.ended(), rows.path.with_suffix(".log")
    waiting, left = [case for case in cases if case.name not in ended], []
    worker = Worker(command, log) if waiting else None
    try:
        for i, case in enumerate(waiting):
            if case.seconds > clock.left():
                left.append(case.name)
                continue
            begin, now = time.perf_counter(), worker
            worker = None
            rows.add(case.name, state="begun")
            try:
                if i + 1 < len(waiting):
                    worker = Worker(command, log)
                state = now.run(case)
            finally:
                now.end()
            spent = time.perf_counter() - begin
            rows.add(case.name, state=state, seconds=round(spent, 2))
            lines = [describe(row) for row in rows.cases()[case.name] if "state" not in row]
            print(f"{case.name}: {state}, {spent:.1f} s", *filter(None, lines), sep="\n    ", flush=True)
    finally:
        if worker:
            worker.end()
    return left


def describe(row: dict) -> str:
    """Return a row as one line."""
    values = {name: value for name, value in row.items() if name not in QUIET and value not in (None, "")}
    return ", ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in values.items())[:300]
