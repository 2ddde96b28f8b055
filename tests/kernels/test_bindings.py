"""The native ops check every tensor that they read or write, so that a wrong call cannot corrupt memory."""

from __future__ import annotations

import pytest
import torch
from support.backends import needs_native

from starflow_kernels._core import compiled

pytestmark = needs_native


def call(**changes) -> None:
    """Call the native op of a linear layer (4, 3) -> (4, 5) with other tensors."""
    compiled.native_unavailable()
    tensors = {"x": torch.ones(4, 3), "weight": torch.ones(5, 3), "bias": torch.ones(5), "y": torch.zeros(4, 5)}
    torch.ops.starflow_native.linear(*(tensors | changes).values())


@pytest.mark.parametrize("name, shape", [("x", (4, 3)), ("weight", (5, 3)), ("bias", (5,)), ("y", (4, 5))])
def test_every_tensor_of_a_call_is_checked(name, shape):
    call(**{name: torch.zeros(shape)})
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        with pytest.raises(RuntimeError, match="wrong dtype"):
            call(**{name: torch.zeros(shape, dtype=dtype)})
    with pytest.raises(RuntimeError, match="not contiguous"):
        call(**{name: torch.zeros(*shape, 2)[..., 0]})
    with pytest.raises(RuntimeError, match=r"meta|Meta"):
        call(**{name: torch.zeros(shape, device="meta")})
    if name != "x":
        with pytest.raises(RuntimeError, match="wrong size"):
            call(**{name: torch.zeros(shape[0] - 1, *shape[1:]) if name != "weight" else torch.zeros(5, 2)})
