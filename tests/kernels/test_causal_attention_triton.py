"""causal_attention in Triton's interpreter: sizes around its blocks, and promises of its kernels alone.

TRITON_INTERPRET=1 pytest tests/kernels/test_causal_attention_triton.py
"""

from __future__ import annotations

import pytest
import torch
from support.backends import require_interpreter
from support.causal_attention import inputs, naive, rotary_options
from support.contract import assert_within_contract, strided, with_gradients

from starflow_kernels import causal_attention

require_interpreter()

F32, F16 = torch.float32, torch.float16


def run(tensors, seeds, **options):
    return with_gradients(lambda *t: causal_attention(*t, **options, return_lse=True, backend="triton"), tensors, seeds)


@pytest.mark.parametrize(
    "T, d, H, H_kv, window, rotary, dtype",
    [
        (1, 16, 1, 1, None, "half", F32),
        (2, 24, 2, 1, None, "interleaved", F16),
        (2, 17, 1, 1, 1, "none", F32),
        (31, 1, 2, 2, 30, "none", F32),
        (63, 64, 1, 1, 32, "half", F16),
        (64, 80, 2, 1, None, "interleaved", F32),
        (65, 16, 2, 2, 64, "interleaved", F32),
        (65, 128, 1, 1, None, "half", F32),
        (66, 256, 1, 1, 33, "interleaved", F16),
        (97, 250, 1, 1, None, "half", F32),
        (111, 80, 2, 1, None, "half", F16),
        (111, 17, 3, 1, 1, "none", F32),
        (111, 64, 3, 3, 65, "interleaved", F32),
        (129, 24, 4, 2, 100, "half", F32),
        (150, 33, 2, 1, None, "none", F32),
        (150, 64, 2, 2, None, "interleaved", F16),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_around_blocks(T, d, H, H_kv, window, rotary, dtype):
    B = 2 if T < 65 else 1
    tensors, seeds = inputs(B, T, H, H_kv, d, dtype), (torch.randn(B, T, H, d, dtype=dtype), torch.randn(B, H, T))
    options = {"window": window, "temperature": 0.7, **rotary_options(rotary, T, d, F32)}
    plain = with_gradients(lambda *t: naive(*t, **options), tensors, seeds)
    exact = with_gradients(lambda *t: naive(*t, **options), [t.double() for t in tensors], seeds)
    for values in zip(run([strided(t) for t in tensors], seeds, **options), plain, exact):
        assert_within_contract(*values)


@pytest.mark.parametrize("rotary, window", [("interleaved", None), ("half", 40)])
def test_a_row_is_its_own(rotary, window):
    """A row has the same bits alone and in a batch, and without the tokens after it."""
    tensors, seeds = inputs(3, 111, 2, 1, 24, F32), (torch.randn(3, 111, 2, 24), torch.randn(3, 2, 111))
    options = {"window": window, **rotary_options(rotary, 111, 24, F32)}
    batch = run(tensors, seeds, **options)
    alone = run([t[1:2] for t in tensors], [t[1:2] for t in seeds], **options)
    assert all(torch.equal(one, many[1:2]) for one, many in zip(alone, batch))
    options = {"window": window, **rotary_options(rotary, 70, 24, F32)}
    out, lse = causal_attention(*(t[:, :70] for t in tensors), **options, return_lse=True, backend="triton")
    assert torch.equal(out, batch[0][:, :70]) and torch.equal(lse, batch[1][..., :70])


def test_later_and_earlier_tokens_stay_out():
    """A key's gradient does not depend on queries past its window or before it."""
    tensors, seeds = inputs(1, 111, 1, 1, 16, F32), [torch.randn(1, 111, 1, 16), torch.randn(1, 1, 111)]
    before = run(tensors, seeds, window=20)
    for t in (tensors[0], seeds[0]):
        t[:, 100:] *= 3
    after = run(tensors, seeds, window=20)
    # Keys up to 80 are seen by queries up to 99.
    for t, last in zip((0, 2, 3, 4), (100, 100, 81, 81)):
        assert torch.equal(before[t][:, :last], after[t][:, :last]), t
    assert not torch.equal(before[4][:, 81:], after[4][:, 81:])


def test_a_group_of_heads_is_heads_with_their_own_keys():
    (q, k, v), seeds = inputs(1, 70, 4, 2, 16, F32), (torch.randn(1, 70, 4, 16), torch.randn(1, 4, 70))
    grouped = run([q, k, v], seeds)
    alone = run([q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)], seeds)
    assert all(torch.equal(a, b) for a, b in zip(grouped[:3], alone))
    for a, b in zip(grouped[3:], alone[3:]):
        torch.testing.assert_close(a, b.unflatten(2, (2, 2)).sum(3), rtol=1e-6, atol=1e-6)


def test_gradient_of_the_log_sum_exp_alone():
    tensors, seed = inputs(1, 65, 2, 1, 16, F32), torch.randn(1, 2, 65)
    rotary = rotary_options("half", 65, 16)  # float64 angles

    def lse(*tensors):
        return [causal_attention(*tensors, **rotary, return_lse=True, backend="triton")[1]]

    exact = with_gradients(lambda *t: [naive(*t, **rotary)[1]], [t.double() for t in tensors], [seed])
    torch.testing.assert_close(with_gradients(lse, tensors, [seed]), [t.float() for t in exact], rtol=1e-5, atol=1e-6)


def test_a_window_as_long_as_the_row_is_none():
    tensors, seeds = inputs(1, 70, 1, 1, 16, F32), (torch.randn(1, 70, 1, 16), torch.randn(1, 1, 70))
    for window in (70, 2**40):
        assert all(torch.equal(a, b) for a, b in zip(run(tensors, seeds, window=window), run(tensors, seeds)))


def test_wide_heads_are_refused():
    q = torch.zeros(1, 2, 1, 257)
    with pytest.raises(ValueError, match="cannot run causal_attention: heads of 257 values, it takes up to 256"):
        causal_attention(q, q, q, backend="triton")
