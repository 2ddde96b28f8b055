"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Kernels of torch run on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same seed and leaves one thread to the next."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory():
    """Memory that torch allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
