"""Fixtures of all tests."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
import torch
from support.checkout import checkout_files

from starflow_kernels._core import compiled


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Kernels of torch run on one thread; the native ones use the threads that a test sets, whatever the cores."""
    torch.set_num_threads(1)
    if compiled.native_unavailable() is None:
        torch.ops.starflow_native.rehearse(0)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same seed and leaves one thread to the next."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def unchanged_checkout(tmp_path_factory):
    """Run outside the checkout, and check afterwards that no file in it was added or removed."""
    start, before = Path.cwd(), checkout_files()
    os.chdir(tmp_path_factory.mktemp("session"))
    yield
    os.chdir(start)
    assert checkout_files() == before


@pytest.fixture(autouse=True)
def working_directory():
    """Run each test in an empty working directory of its own."""
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        yield
        os.chdir(start)


@pytest.fixture
def poisoned_memory():
    """Memory that torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def hostile(request):
    """Return a function that changes a default of torch until the end of the test."""
    with contextlib.ExitStack() as stack:

        def change() -> None:
            if request.param == "meta":
                stack.enter_context(torch.device("meta"))
            else:
                torch.set_default_dtype(getattr(torch, request.param))

        yield change
    torch.set_default_dtype(torch.float32)
