"""cached_attention: append new tokens to a KV cache and attend over it."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import cpu_backends, needs_native, on_backends
from support.contract import assert_same_row, assert_within_contract, compiled, strided
from support.naive import angles, naive_attention, naive_rotate, naive_visible

from starflow_kernels import cached_attention, causal_attention

F32, F64 = torch.float32, torch.float64
ROTARY = ["none", "interleaved", "half"]
every_rotary = pytest.mark.parametrize("rotary", ROTARY)
every_window = pytest.mark.parametrize("window", [None, 1, 3])


def takes(backend, dtype=F64):
    """Whether a backend takes tensors of this dtype."""
    return backend != "native" or dtype == F32


in_float64 = on_backends("cached_attention", takes)
every_dtype = on_backends("cached_attention", takes, dtype=[F32, F64])


@pytest.fixture(params=cpu_backends("cached_attention"))
def backend(request):
    return request.param


def new_tokens(B=3, n=2, H=4, H_kv=2, d=8, dtype=F64):
    return [torch.randn(B, n, heads, d, dtype=dtype) for heads in (H, H_kv, H_kv)]


def filled_caches(lengths: list[int], S=9, H_kv=2, d=8, dtype=F64):
    """Return caches with one prefix per row, and NaN behind it."""
    caches = [torch.full((len(lengths), S, H_kv, d), math.nan, dtype=dtype) for _ in range(2)]
    for cache in caches:
        for i, length in enumerate(lengths):
            cache[i, :length] = torch.randn(length, H_kv, d, dtype=dtype)
    return caches


def rotary_options(rotary, S=9, d=8, dtype=F64):
    return {"rotary": rotary, **(angles(S, d, dtype) if rotary != "none" else {})}


def int32(lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def naive(q, k, v, k_cache, v_cache, lengths, cos=None, sin=None, rotary="none", window=None, temperature=1.0):
    """Attend row by row over the prefix and the new tokens alone."""
    rows, n = [], q.shape[1]
    for i, length in enumerate(lengths):
        rotation = [None, None] if cos is None else [cos[length : length + n], sin[length : length + n]]
        keys = torch.cat([k_cache[i, :length], naive_rotate(k[i], *rotation, rotary)])
        values = torch.cat([v_cache[i, :length], v[i]])
        visible = naive_visible(range(length, length + n), length + n, window)
        query = naive_rotate(q[i], *rotation, rotary)
        rows.append(naive_attention(query[None], keys[None], values[None], visible, temperature)[0])
    return torch.stack(rows)


@every_rotary
@every_window
@pytest.mark.parametrize("lengths", [[0, 0, 0], [4, 4, 4], [7, 0, 3]], ids=["empty", "equal", "ragged"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@every_dtype
@pytest.mark.usefixtures("poisoned_memory")
def test_matches_sdpa_and_writes_only_the_new_slots(rotary, window, lengths, temperature, dtype, backend):
    q, k, v = new_tokens(dtype=dtype)
    caches, options = filled_caches(lengths, dtype=dtype), rotary_options(rotary, dtype=dtype)
    bound = 1e-12 if dtype == F64 else 2e-6
    k_cache, v_cache = (cache.clone() for cache in caches)
    out = cached_attention(
        q, k, v, k_cache, v_cache, int32(lengths), window=window, temperature=temperature, **options, backend=backend
    )
    expected = naive(q, k, v, *caches, lengths, **options, window=window, temperature=temperature)
    torch.testing.assert_close(out, expected, rtol=bound, atol=bound)
    for i, length in enumerate(lengths):
        rotation = [options[name][length : length + 2] if rotary != "none" else None for name in ("cos", "sin")]
        torch.testing.assert_close(
            k_cache[i, length : length + 2], naive_rotate(k[i], *rotation, rotary), rtol=bound, atol=bound
        )
        assert torch.equal(v_cache[i, length : length + 2], v[i])
        for cache, before in ((k_cache, caches[0]), (v_cache, caches[1])):
            assert torch.equal(cache[i, :length], before[i, :length])
            assert cache[i, length + 2 :].isnan().all()


@every_rotary
@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 2, 1]], ids=["at-once", "one-by-one", "chunks"])
@pytest.mark.parametrize("window", [None, 3])
@in_float64
def test_chunks_equal_the_parallel_pass(rotary, chunks, window, backend):
    q, k, v = new_tokens(B=2, n=7)
    options = {"window": window, **rotary_options(rotary, S=7)}
    k_cache, v_cache = torch.full((2, 2, 7, 2, 8), math.nan, dtype=F64)
    out, start = [], 0
    for n in chunks:
        new = (t[:, start : start + n] for t in (q, k, v))
        out.append(cached_attention(*new, k_cache, v_cache, start, **options, backend=backend))
        start += n
    torch.testing.assert_close(torch.cat(out, 1), causal_attention(q, k, v, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [8, 24, 80])
@pytest.mark.parametrize("T", [1, 2, 63, 111])
@pytest.mark.usefixtures("poisoned_memory")
@in_float64
def test_sizes(T, d, backend):
    """The last token fills a cache of T slots."""
    q, k, v = new_tokens(B=2, n=1, d=d)
    caches = filled_caches([T - 1] * 2, S=T, d=d)
    options = rotary_options("interleaved", T, d)
    expected = naive(q, k, v, *caches, [T - 1] * 2, **options)
    out = cached_attention(q, k, v, *caches, T - 1, **options, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


@on_backends("cached_attention", takes, dtype=[F32, torch.bfloat16, torch.float16])
@every_rotary
def test_error_contract(dtype, rotary, backend):
    q, k, v = new_tokens(d=24, dtype=dtype)
    lengths = [61, 0, 30]
    caches, options = filled_caches(lengths, S=63, d=24, dtype=dtype), rotary_options(rotary, 63, 24, torch.float32)
    plain = naive(q, k, v, *caches, lengths, **options)
    exact = naive(*(t.double() for t in (q, k, v, *caches)), lengths, **options)
    out = cached_attention(q, k, v, *caches, int32(lengths), **options, backend=backend)
    assert out.dtype == dtype
    assert_within_contract(out, plain, exact)


@pytest.mark.parametrize("T, d", [(3, 8), (63, 24), (111, 64), (64, 80), (193, 16)])
@pytest.mark.parametrize("n", [1, 3, 23])
@pytest.mark.parametrize("H, H_kv", [(3, 3), (6, 2)])
@pytest.mark.parametrize("window", [None, 1, 17])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_over_sizes(T, d, n, H, H_kv, window, backend):
    """Prefixes have different lengths, with NaN behind them."""
    lengths, S = [T, 0, T // 2], T + n
    tensors, caches = new_tokens(3, n, H, H_kv, d, torch.float32), filled_caches(lengths, S, H_kv, d, torch.float32)
    options = {"window": window, "temperature": 0.7, **rotary_options(ROTARY[T % 3], S, d, torch.float32)}
    plain = naive(*tensors, *caches, lengths, **options)
    exact = naive(*(t.double() for t in (*tensors, *caches)), lengths, **options)
    assert_within_contract(
        cached_attention(*tensors, *caches, int32(lengths), **options, backend=backend), plain, exact
    )


@needs_native
@pytest.mark.parametrize("d", [8, 24, 64])
@pytest.mark.parametrize("H, H_kv", [(3, 3), (6, 2)])
@pytest.mark.parametrize("window", [None, 1, 19])
def test_tokens_have_the_same_bits_one_by_one_and_at_once(d, H, H_kv, window):
    tensors, prefix = new_tokens(2, 40, H, H_kv, d, torch.float32), filled_caches([35, 35], 75, H_kv, d, torch.float32)
    options = {"window": window, **rotary_options("half", 75, d, torch.float32), "backend": "native"}
    found = []
    for chunks in ([40], [1] * 40, [3, 17, 1, 19]):
        caches, out, start = [cache.clone() for cache in prefix], [], 0
        for n in chunks:
            new = (t[:, start : start + n] for t in tensors)
            out.append(cached_attention(*new, *caches, 35 + start, **options))
            start += n
        found.append([torch.cat(out, 1), *caches])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@needs_native
@pytest.mark.parametrize("n", [1, 5])
def test_rows_have_the_same_bits_at_any_thread_count(n):
    lengths = torch.arange(9, dtype=torch.int32) * 130
    q, k, v = new_tokens(9, n, 10, 5, 16, torch.float32)
    caches = filled_caches(lengths.tolist(), 1100, 5, 16, torch.float32)
    options = {**rotary_options("interleaved", 1100, 16, torch.float32), "backend": "native"}
    expected = cached_attention(q, k, v, *caches, lengths, **options)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        found = cached_attention(q, k, v, *caches, lengths, **options)
        torch.set_num_threads(1)
        assert torch.equal(found, expected)


@every_dtype
def test_strided_inputs_are_read_and_left(dtype, backend):
    tensors, lengths = new_tokens(dtype=dtype), [7, 0, 3]
    caches, options = filled_caches(lengths, dtype=dtype), rotary_options("half", dtype=dtype)
    expected = naive(*tensors, *caches, lengths, **options)
    given, big = [strided(t) for t in tensors], torch.full((2, 3, 9, 2, 16), math.nan, dtype=dtype)
    k_cache, v_cache = big[..., 4:12]
    k_cache.copy_(caches[0]), v_cache.copy_(caches[1])
    rotation = {"cos": strided(options["cos"]), "sin": strided(options["sin"]), "rotary": "half"}
    out = cached_attention(*given, k_cache, v_cache, int32(lengths), **rotation, backend=backend)
    bound = 1e-12 if dtype == F64 else 1e-6
    torch.testing.assert_close(out, expected, rtol=bound, atol=bound)
    assert all(torch.equal(a, b) for a, b in zip(given, tensors))
    assert big[..., :4].isnan().all() and big[..., 12:].isnan().all()
    assert torch.equal(v_cache[1, :2], tensors[2][1])


@every_dtype
def test_batch_invariance(dtype, backend):
    """A row does not depend on its neighbours, nor on how long their prefixes are."""
    q, k, v = new_tokens(B=4, n=3, dtype=dtype)
    lengths = [60, 0, 17, 33]
    caches, options = filled_caches(lengths, S=64, dtype=dtype), rotary_options("half", 64, dtype=dtype)
    single = [[cache[i : i + 1].clone() for cache in caches] for i in range(4)]
    batch = cached_attention(q, k, v, *caches, int32(lengths), **options, backend=backend)
    for i, cache in enumerate(single):
        row = (t[i : i + 1] for t in (q, k, v))
        alone = cached_attention(*row, *cache, lengths[i], **options, backend=backend)
        assert_same_row(backend, alone, batch[i : i + 1])
        assert torch.equal(cache[0][0, : lengths[i] + 3], caches[0][i, : lengths[i] + 3])


def test_no_rows(backend):
    q, k, v = new_tokens(B=0, dtype=torch.float32)
    caches = filled_caches([], dtype=torch.float32)
    for lengths in (3, int32([])):
        assert cached_attention(q, k, v, *caches, lengths, backend=backend).shape == q.shape


@in_float64
def test_is_not_differentiable(backend):
    q, k, v = (t.requires_grad_() for t in new_tokens())
    caches = filled_caches([4, 4, 4])
    out = cached_attention(q, k, v, *caches, 4, backend=backend)
    assert not out.requires_grad and not any(cache.requires_grad for cache in caches)


@pytest.mark.parametrize("rotary, window", [("none", 0), ("interleaved", 3)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_opcheck(rotary, window, dtype):
    lengths = [7, 0, 3]
    options = rotary_options(rotary, dtype=dtype)
    args = (
        *new_tokens(dtype=dtype),
        *filled_caches(lengths, dtype=dtype),
        int32(lengths),
        options.get("cos"),
        options.get("sin"),
    )
    args = [t.nan_to_num() if isinstance(t, torch.Tensor) else t for t in args]
    torch.library.opcheck(torch.ops.starflow.cached_attention.default, (*args, rotary, window, 0.7))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lengths", [4, [7, 0, 3]], ids=["int", "tensor"])
def test_compiles_as_one_graph(compiler, lengths):
    q, k, v = new_tokens()
    prefix = [lengths] * 3 if isinstance(lengths, int) else lengths
    caches, options = filled_caches(prefix), rotary_options("half")
    given = lengths if isinstance(lengths, int) else int32(lengths)

    def attention(q, k, v, k_cache, v_cache):
        return cached_attention(q, k, v, k_cache, v_cache, given, **options)

    results = []
    for function in (attention, compiled(attention, compiler)):
        copies = [cache.clone() for cache in caches]
        results.append([function(q, k, v, *copies), *copies])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k_cache": 0}, TypeError, "k_cache: expected a tensor"),
        ({"k_cache": torch.zeros(2, 5, 4)}, ValueError, "k_cache: expected shape"),
        ({"k_cache": torch.zeros(1, 5, 1, 4)}, ValueError, r"k_cache: expected shape \(2, 5, 1, 4\)"),
        ({"v_cache": torch.zeros(2, 4, 1, 4)}, ValueError, r"v_cache: expected shape \(2, 5, 1, 4\)"),
        ({"v_cache": torch.zeros(2, 5, 1, 4, dtype=F64)}, TypeError, "v_cache: dtype torch.float64"),
        ({"v_cache": torch.zeros(2, 5, 1, 4, device="meta")}, ValueError, "v_cache: on meta"),
        ({"k": torch.zeros(2, 2, 1, 4)}, ValueError, r"k: expected shape \(2, 3, H_kv, 4\)"),
        ({"lengths": 3}, ValueError, "lengths: 3 .. 3 cached and 3 new tokens do not fit a cache of 5"),
        ({"lengths": -1}, ValueError, "lengths: -1"),
        ({"lengths": 1.0}, TypeError, "lengths: expected an int or an int32 tensor"),
        ({"lengths": int32([3, 0])}, ValueError, "lengths: 0 .. 3 cached"),
        ({"lengths": int32([-1, 0])}, ValueError, "lengths: -1 .. 0 cached"),
        ({"lengths": int32([0, 0, 0])}, ValueError, r"lengths: expected int32 \(2,\)"),
        ({"lengths": torch.zeros(2)}, ValueError, r"lengths: expected int32 \(2,\), got torch.float32"),
        ({"rotary": "half"}, ValueError, "cos, sin: both are needed"),
        ({"rotary": "half", "cos": torch.zeros(3, 2), "sin": torch.zeros(3, 2)}, ValueError, r"cos: .* \(5, 2\)"),
        ({"window": -2}, ValueError, "window=-2"),
        ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"q": torch.zeros(2, 3, 2, 4), "k": torch.zeros(2, 3, 1, 4), "v": torch.zeros(2, 3, 1, 4)}
    arguments |= {"k_cache": torch.zeros(2, 5, 1, 4), "v_cache": torch.zeros(2, 5, 1, 4), "lengths": 0}
    with pytest.raises(error, match=message):
        cached_attention(**{**arguments, **change})


@needs_native
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16, torch.float16], ids=str)
def test_native_takes_float32_alone(dtype):
    with pytest.raises(ValueError, match=f"cannot run cached_attention: q is {dtype}, it takes float32"):
        cached_attention(*new_tokens(dtype=dtype), *filled_caches([4, 4, 4], dtype=dtype), 4, backend="native")


@needs_native
def test_native_takes_caches_with_adjacent_values_alone():
    caches = [strided(cache) for cache in filled_caches([4, 4, 4], dtype=F32)]
    with pytest.raises(ValueError, match="cannot run cached_attention: the values of a head are not adjacent"):
        cached_attention(*new_tokens(dtype=F32), *caches, 4, backend="native")
