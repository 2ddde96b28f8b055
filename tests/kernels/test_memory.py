"""Memory of large tensors of the native kernels, and its reuse."""

from __future__ import annotations

import torch
from support.backends import needs_native

from starflow_kernels._core.compiled import HUGE_PAGES_FROM, empty, reused_memory

pytestmark = needs_native
LARGE = HUGE_PAGES_FROM


def test_a_tensor_that_is_gone_leaves_its_memory_to_the_next_one():
    with reused_memory():
        first = empty(2, LARGE)
        address = first.data_ptr()
        part = first[1]
        del first
        other = empty(LARGE)
        assert other.data_ptr() != address, "a view still needs the memory"
        del part
        second = empty(LARGE, dtype=torch.float64)
        assert second.data_ptr() == address and second.shape == (LARGE,) and second.dtype == torch.float64


def test_memory_that_is_too_small_is_left():
    with reused_memory():
        del (first := [empty(LARGE)])[0]
        assert not first
        second = empty(4 * LARGE)
        second.fill_(1)
        assert second.shape == (4 * LARGE,)


def test_a_tensor_outlives_the_reuse():
    with reused_memory():
        kept = empty(LARGE).fill_(3)
    with reused_memory():
        other = empty(LARGE).fill_(4)
    assert (kept == 3).all() and (other == 4).all()


def test_memory_is_reused_nowhere_else():
    with reused_memory():
        kept = empty(LARGE)
    address = kept.data_ptr()
    with reused_memory():
        other = empty(LARGE)
        del kept
        assert empty(LARGE).data_ptr() != other.data_ptr()
    assert empty(10).shape == (10,) and isinstance(address, int)
