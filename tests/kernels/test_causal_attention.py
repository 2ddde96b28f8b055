"""causal_attention: rotary, causal and windowed attention of the density direction."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.backends import cpu_backends, needs_native, on_backends
from support.causal_attention import inputs, naive, rotary_options
from support.contract import assert_same_row, assert_within_contract, compiled, strided, with_gradients

from starflow_kernels import causal_attention

F32, F64 = torch.float32, torch.float64
NARROW = [F32, torch.bfloat16, torch.float16]
ROTARY = ["none", "interleaved", "half"]
every_rotary = pytest.mark.parametrize("rotary", ROTARY)
every_grouping = pytest.mark.parametrize("H, H_kv", [(2, 2), (4, 2), (3, 1)])


def takes(backend, dtype=F64, window=None, lse=False):
    """Whether a backend takes a call; lse: it gives the gradient of the log-sum-exp too."""
    if backend == "native":
        return dtype != F64
    return backend != "sdpa" or not (window or lse)


in_float64 = on_backends("causal_attention", takes)
every_dtype = on_backends("causal_attention", takes, dtype=[F32, F64])


@pytest.fixture(params=cpu_backends("causal_attention"))
def backend(request):
    return request.param


@every_rotary
@on_backends("causal_attention", takes, window=[None, 1, 3])
@every_grouping
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matches_sdpa(rotary, window, H, H_kv, temperature, backend):
    tensors = inputs(H=H, H_kv=H_kv)
    options = {"window": window, "temperature": temperature, **rotary_options(rotary, 7, 8)}
    actual = causal_attention(*tensors, **options, return_lse=True, backend=backend)
    torch.testing.assert_close(actual, naive(*tensors, **options), rtol=1e-12, atol=1e-12)
    assert torch.equal(causal_attention(*tensors, **options, backend=backend), actual[0])


@every_rotary
@on_backends("causal_attention", takes, window=[None, 1, 3], lse=[False, True])
@pytest.mark.parametrize("H, H_kv", [(2, 2), (2, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(rotary, window, H, H_kv, temperature, lse, backend):
    tensors = [t.requires_grad_() for t in inputs(B=1, T=4, H=H, H_kv=H_kv, d=4)]
    options = {"window": window, "temperature": temperature, **rotary_options(rotary, 4, 4)}

    def attention(q, k, v):
        return causal_attention(q, k, v, **options, return_lse=lse, backend=backend)

    assert torch.autograd.gradcheck(attention, tensors)


@pytest.mark.parametrize("d", [8, 24, 80])
@pytest.mark.parametrize("T", [1, 2, 63, 111])
@pytest.mark.usefixtures("poisoned_memory")
@in_float64
def test_sizes(T, d, backend):
    tensors = inputs(T=T, d=d, H_kv=1)
    options = rotary_options("interleaved", T, d)
    actual = causal_attention(*tensors, **options, return_lse=True, backend=backend)
    torch.testing.assert_close(actual, naive(*tensors, **options), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("d", [1, 3, 5])
@in_float64
def test_odd_head_sizes_without_rotary(d, backend):
    tensors = inputs(d=d)
    torch.testing.assert_close(
        causal_attention(*tensors, return_lse=True, backend=backend), naive(*tensors), rtol=1e-12, atol=1e-12
    )


@on_backends("causal_attention", takes, dtype=NARROW, window=[None, 9], lse=[False, True])
@every_rotary
def test_error_contract(dtype, rotary, window, lse, backend):
    tensors = inputs(T=63, H=4, H_kv=2, d=24, dtype=dtype)
    options = {"window": window, "temperature": 0.8, **rotary_options(rotary, 63, 24, torch.float32)}
    seeds = torch.randn(2, 63, 4, 24, dtype=dtype), torch.randn(2, 4, 63)

    def attention(q, k, v):
        return causal_attention(q, k, v, **options, return_lse=True, backend=backend)[: 1 + lse]

    def plain_torch(q, k, v):
        return naive(q, k, v, **options)[: 1 + lse]

    actual = with_gradients(attention, tensors, seeds)
    plain = with_gradients(plain_torch, tensors, seeds)
    exact = with_gradients(plain_torch, [t.double() for t in tensors], seeds)
    assert [t.dtype for t in actual] == [dtype, *[torch.float32] * lse, dtype, dtype, dtype]
    for values in zip(actual, plain, exact):
        assert_within_contract(*values)


def test_error_contract_of_sdpa_in_bfloat16_on_many_tokens():
    tensors, seeds = inputs(B=1, T=300, dtype=torch.bfloat16), [torch.randn(1, 300, 2, 8)]
    actual = with_gradients(lambda *t: [causal_attention(*t, backend="sdpa")], tensors, seeds)
    plain = with_gradients(lambda *t: naive(*t)[:1], tensors, seeds)
    exact = with_gradients(lambda *t: naive(*t)[:1], [t.double() for t in tensors], seeds)
    for values in zip(actual, plain, exact):
        assert_within_contract(*values)


@pytest.mark.parametrize("T, d", [(1, 8), (2, 16), (63, 24), (111, 64), (64, 80), (193, 16)])
@pytest.mark.parametrize("B, H, H_kv", [(1, 3, 3), (3, 6, 2)])
@on_backends("causal_attention", partial(takes, dtype=F32, lse=True), window=[None, 1, 17, 64, 100])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_over_sizes(T, d, B, H, H_kv, window, backend):
    tensors = inputs(B, T, H, H_kv, d, torch.float32)
    options = {"window": window, "temperature": 1.3, **rotary_options(ROTARY[T % 3], T, d, torch.float32)}
    seeds = torch.randn(B, T, H, d), torch.randn(B, H, T)

    def attention(q, k, v):
        return causal_attention(q, k, v, **options, return_lse=True, backend=backend)

    actual = with_gradients(attention, tensors, seeds)
    plain = with_gradients(lambda *t: naive(*t, **options), tensors, seeds)
    exact = with_gradients(lambda *t: naive(*t, **options), [t.double() for t in tensors], seeds)
    for values in zip(actual, plain, exact):
        assert_within_contract(*values)


@every_dtype
def test_large_scores_stay_finite(dtype, backend):
    q, k, v = (t * s for t, s in zip(inputs(dtype=dtype), (100.0, 100.0, 1.0)))
    actual = causal_attention(q, k, v, return_lse=True, backend=backend)
    # Scores of 3e4 leave few digits behind the point.
    bound = 3e4 * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, naive(q, k, v), rtol=bound, atol=bound)


@every_dtype
def test_later_tokens_do_not_reach_earlier_ones(dtype, backend):
    q, k, v = inputs(dtype=dtype)
    before = causal_attention(q, k, v, backend=backend)
    for t in (q, k, v):
        t[:, 4:] = 1e3
    after = causal_attention(q, k, v, backend=backend)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before[:, 4:], after[:, 4:])


@every_rotary
@every_dtype
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs_are_read_and_left(rotary, dtype, backend):
    tensors, options = inputs(H=4, H_kv=2, dtype=dtype), rotary_options(rotary, 7, 8, dtype)
    bound = 1e-12 if dtype == F64 else 3e-6
    packed, seeds = torch.cat(tensors, dim=2), (torch.randn(2, 7, 4, 8),)
    views = packed.split((4, 2, 2), dim=2)
    rotation = {name: strided(t) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    expected = with_gradients(lambda *t: [causal_attention(*t, **options)], tensors, seeds)
    for given in (views, [strided(t) for t in tensors]):
        actual = with_gradients(lambda *t: [causal_attention(*t, **rotation, backend=backend)], given, seeds)
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)
        assert all(torch.equal(a, b) for a, b in zip(given, tensors))


@on_backends("causal_attention", takes, dtype=[*NARROW, F64], window=[None, 9])
def test_a_row_has_the_same_bits_at_any_batch_and_thread_count(dtype, window, backend):
    tensors, seeds = inputs(B=4, T=63, H=4, H_kv=2, dtype=dtype), [torch.randn(4, 63, 4, 8), torch.randn(4, 4, 63)]
    options = {"window": window, **rotary_options("half", 63, 8, dtype), "return_lse": True, "backend": backend}
    seeds = seeds[: 1 if backend == "sdpa" else 2]

    def attention(*tensors):
        return causal_attention(*tensors, **options)

    batch = with_gradients(attention, tensors, seeds)
    for rows, threads in ((slice(1), 1), (slice(1, 2), 3), (slice(3, 4), 1), (slice(None), 2)):
        torch.set_num_threads(threads)
        found = with_gradients(attention, [t[rows] for t in tensors], [t[rows] for t in seeds])
        torch.set_num_threads(1)
        for alone, batched in zip(found, batch):
            assert_same_row(backend, alone, batched[rows])


@pytest.mark.parametrize("rotary, window", [("none", 0), ("interleaved", 3), ("half", 0)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_opcheck(rotary, window, dtype):
    tensors = inputs(H=4, H_kv=2, dtype=dtype)
    options = rotary_options(rotary, 7, 8, dtype)
    args = (options.get("cos"), options.get("sin"), rotary, window, 0.7)
    outputs = list(torch.ops.starflow.causal_attention(*tensors, *args))
    grads = [torch.randn_like(t) for t in outputs]
    backward = torch.ops.starflow.causal_attention_backward.default
    torch.library.opcheck(backward, (grads, outputs, *tensors, *args))
    torch.library.opcheck(torch.ops.starflow.causal_attention.default, (*(t.requires_grad_() for t in tensors), *args))


@pytest.mark.parametrize(
    "compiler, rotary", [("aot_eager", "none"), ("aot_eager", "half"), ("inductor", "interleaved")]
)
def test_compiles_as_one_graph(compiler, rotary):
    tensors, options = inputs(H=4, H_kv=2), rotary_options(rotary, 7, 8)
    seeds = torch.randn(2, 7, 4, 8), torch.randn(2, 4, 7)

    def attention(q, k, v):
        return causal_attention(q, k, v, **options, window=3, return_lse=True)

    eager, graph = (with_gradients(f, tensors, seeds) for f in (attention, compiled(attention, compiler)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


def heads(*shape, **options):
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": [0.0]}, TypeError, "q: expected a tensor"),
        ({"q": heads(2, 3, 4)}, ValueError, r"q: expected shape \(B, T, H, d\), got \(2, 3, 4\)"),
        ({"k": heads(2, 4, 2, 4)}, ValueError, r"k: expected shape \(2, 3, H_kv, 4\)"),
        ({"k": heads(2, 3, 2, 4, dtype=torch.int32)}, TypeError, "k: dtype torch.int32"),
        ({"v": heads(2, 3, 1, 4)}, ValueError, r"v: expected shape \(2, 3, 2, 4\)"),
        ({"v": heads(2, 3, 2, 4, device="meta")}, ValueError, "v: on meta, expected cpu"),
        ({"v": heads(2, 3, 2, 4, dtype=F64)}, TypeError, "q, k, v: dtypes torch.float32, torch.float32, torch.float64"),
        ({"q": heads(2, 3, 3, 4)}, ValueError, "k: 2 heads do not divide the 3 heads of q"),
        (
            {"k": heads(2, 3, 0, 4), "v": heads(2, 3, 0, 4)},
            ValueError,
            r"k: expected shape \(2, 3, H_kv, 4\), got \(2, 3, 0, 4\)",
        ),
        ({"rotary": "neox"}, ValueError, "rotary='neox': expected one of 'none', 'interleaved', 'half'"),
        ({"rotary": "half"}, ValueError, "cos, sin: both are needed with rotary='half'"),
        ({"rotary": "half", "cos": heads(3, 2)}, ValueError, "cos, sin: both are needed"),
        ({"cos": heads(3, 2), "sin": heads(3, 2)}, ValueError, "cos, sin: given, but rotary='none'"),
        ({"rotary": "half", "cos": heads(4, 2), "sin": heads(3, 2)}, ValueError, r"cos: expected shape \(3, 2\)"),
        ({"rotary": "half", "cos": heads(3, 2), "sin": heads(3, 1)}, ValueError, r"sin: expected shape \(3, 2\)"),
        (
            {"rotary": "half", "cos": heads(3, 2, requires_grad=True), "sin": heads(3, 2)},
            ValueError,
            "cos, sin: the rotary angles carry no gradient",
        ),
        ({"window": 0}, ValueError, "window=0: expected at least 1, or None"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0: expected a finite number > 0"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan"),
        ({"temperature": float("inf")}, ValueError, "temperature=inf"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {name: heads(2, 3, 2, 4) for name in "qkv"}
    with pytest.raises(error, match=message):
        causal_attention(**{**arguments, **change})


@needs_native
def test_native_takes_no_float64():
    q = heads(2, 3, 2, 4, dtype=F64)
    with pytest.raises(ValueError, match=r"q is torch.float64, it takes float32, bfloat16 and float16"):
        causal_attention(q, q, q, backend="native")


def test_sdpa_has_no_window_on_the_cpu():
    q = heads(2, 3, 2, 4)
    with pytest.raises(ValueError, match="backend='sdpa' cannot run causal_attention: it has no window on the CPU"):
        causal_attention(q, q, q, window=2, backend="sdpa")


def test_sdpa_has_no_gradient_of_the_log_sum_exp():
    q = heads(2, 3, 2, 4, requires_grad=True)
    _, lse = causal_attention(q, q, q, return_lse=True, backend="sdpa")
    reason = "backend='sdpa' cannot run causal_attention_backward: it has no gradient of the log-sum-exp"
    with pytest.raises(ValueError, match=reason):
        lse.sum().backward()


def test_an_empty_batch(backend):
    q = torch.zeros(0, 3, 2, 4)
    out, lse = causal_attention(q, q, q, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (0, 2, 3)


def test_odd_head_size_with_rotary_is_refused():
    q = heads(2, 3, 2, 5)
    with pytest.raises(ValueError, match="q: rotary positions need an even head size, got 5"):
        causal_attention(q, q, q, rotary="half", cos=heads(3, 2), sin=heads(3, 2))
