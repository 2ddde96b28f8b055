"""Processes that wait for others say so, stop at once when asked to, and give up in time."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
from support import workers

from starflow import ConfigError, StarflowError
from starflow.sampling import processes
from starflow.sampling.processes import Processes


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of torchrun for one of two processes, and free its port at the end."""

    def set_all(rank: int, **changes: str) -> int:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        given = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in {**given, "STARFLOW_JOIN_SECONDS": "1", **changes}.items():
            monkeypatch.setenv(name, value)
        return port

    return set_all


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_without_the_others_says_what_it_waits_for_and_gives_up(rank, environment, monkeypatch, capfd):
    port = environment(rank)
    monkeypatch.setattr(processes, "SILENT_SECONDS", 0.1)
    run, start = f"the 2 processes of this run at 127.0.0.1:{port}, as rank {rank}", time.monotonic()
    with pytest.raises(StarflowError, match=f"could not join {run}, within 1 s") as error:
        Processes().join()
    assert time.monotonic() - start < 10 and "\n" not in str(error.value)
    assert capfd.readouterr().err == f"waiting for {run}, up to 1 s\n"


def test_the_limit_is_a_minute_unless_the_environment_says_otherwise(environment):
    assert processes.JOIN_SECONDS == 60
    environment(1, STARFLOW_JOIN_SECONDS="soon")
    with pytest.raises(ConfigError, match="STARFLOW_JOIN_SECONDS='soon': expected a number of at least 0"):
        Processes().join()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_waiting_process_stops_at_once(rank, number, code, tmp_path):
    arguments = ["sample", "--count", "4", "--out", str(tmp_path / "out")]
    (process,) = workers.start(tmp_path, 2, *arguments, missing=1 - rank)
    while process.is_alive() and not (tmp_path / f"{rank}.txt").exists():
        time.sleep(0.01)
    time.sleep(2)
    os.kill(process.pid, number)
    process.join(120)
    # A process that went on waiting would end with status 2.
    assert process.exitcode == code
    assert not (tmp_path / "out").exists()


def test_world_size_alone_is_refused_with_what_is_missing(environment, monkeypatch):
    environment(0)
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set, but RANK, MASTER_PORT are not: start with torchrun"):
        Processes()


@pytest.mark.parametrize("value", ["two", "-1", "1.5"])
def test_a_world_size_that_is_no_number_is_refused(value, environment):
    environment(0, WORLD_SIZE=value)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE='{value}': expected a number of at least 0"):
        Processes()


@pytest.mark.parametrize("count", ["", "0", "1"])
def test_a_single_process_waits_for_nobody_and_is_the_first_whatever_its_rank(count, environment):
    environment(3, WORLD_SIZE=count)
    alone = Processes()
    assert alone.rank == 0
    alone.join()
    assert alone.gather(3) == [3] and alone.first(lambda: 4) == 4 and alone.collect(5) == [5]
