"""Choice of the backend of causal_attention: flash-attn, torch's fused kernel, and the measured table."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from support.causal_attention import inputs, naive, rotary_options
from support.contract import compiled, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from starflow_kernels import backends, causal_attention
from starflow_kernels._core import dispatch
from starflow_kernels.causal_attention import api, flash, sdpa, timings


def clear():
    for function in (flash.flash_functions, flash.unavailable):
        function.cache_clear()


@pytest.fixture
def probe(monkeypatch):
    """Result of flash.unavailable() on a machine with a GPU and the given modules."""

    def with_modules(**modules):
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            monkeypatch.setitem(sys.modules, name, modules.get(name.rpartition(".")[2]))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        clear()
        found = flash.unavailable()
        monkeypatch.undo()
        return found

    yield with_modules
    clear()


def fake_interface(calls: list[str]) -> types.ModuleType:
    """Module with flash-attn's two functions, computed by the specification; calls collects their names."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def options(scale, window, q):
        return None, None, "none", 0 if window[0] < 0 else window[0] + 1, q.shape[-1] ** -0.5 / scale

    def flash_attn_func(q, k, v, *, softmax_scale, causal, window_size, return_attn_probs):
        assert causal and return_attn_probs and all(t.stride(-1) == 1 for t in (q, k, v))
        assert window_size[1] == (-1 if window_size[0] < 0 else 0)
        calls.append("forward")
        out, lse = api.reference.causal_attention(q, k, v, *options(softmax_scale, window_size, q))
        return out, lse, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert causal and deterministic and not dropout_p and not softcap and alibi_slopes is None
        assert all(t.stride(-1) == 1 for t in (dout, q, k, v, out))
        calls.append("backward")
        grads, window = [dout, torch.zeros_like(softmax_lse)], (window_size_left, window_size_right)
        found = api.reference.causal_attention_backward(
            grads, [out, softmax_lse], q, k, v, *options(softmax_scale, window, q)
        )
        for target, value in zip((dq, dk, dv), found):
            target.copy_(value)

    module.flash_attn_func, module._flash_attn_backward = flash_attn_func, backward
    return module


@pytest.fixture
def calls(probe, monkeypatch):
    """Names of the passes that a fake flash-attn, which takes tensors on the CPU, was called for."""
    names = []
    assert probe(flash_attn=types.ModuleType("flash_attn"), flash_attn_interface=fake_interface(names)) is None
    monkeypatch.setattr(flash, "refuse_heads", lambda q: None)
    return names


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Replace the package's table by entries for float64 heads of 8 on the CPU."""

    def write(*entries):
        path = tmp_path / "timings.json"
        common = {"chip": "cpu", "dtype": "float64", "head": 8, "window": False, "measured": "made up"}
        timings.write(path, [timings.Entry(**{**common, **entry}) for entry in entries])
        monkeypatch.setattr(api, "TABLE", timings.Table(path))

    return write


@pytest.mark.parametrize(
    "rotary, window, temperature", [("none", None, 1.0), ("half", 3, 0.7), ("interleaved", 1, 2.0)]
)
@pytest.mark.parametrize("H, H_kv", [(2, 2), (4, 2)])
def test_flash_attn_gives_the_op_and_its_gradient(calls, rotary, window, temperature, H, H_kv):
    packed = torch.cat(inputs(H=H, H_kv=H_kv), dim=2)
    tensors, seeds = packed.split((H, H_kv, H_kv), dim=2), (torch.randn(2, 7, H, 8),)
    options = {"window": window, "temperature": temperature, **rotary_options(rotary, 7, 8)}
    actual = with_gradients(lambda *t: [causal_attention(*t, **options, backend="flash")], tensors, seeds)
    expected = with_gradients(lambda *t: [naive(*t, **options)[0]], tensors, seeds)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert calls == ["forward", "backward"]
    _, lse = causal_attention(*tensors, **options, return_lse=True, backend="flash")
    torch.testing.assert_close(lse, naive(*tensors, **options)[1], rtol=1e-11, atol=1e-11)


def test_flash_attn_compiles_as_one_graph(calls):
    tensors, seeds = inputs(), (torch.randn(2, 7, 2, 8),)

    def attention(q, k, v):
        return [causal_attention(q, k, v, backend="flash")]

    eager, graph = (with_gradients(f, tensors, seeds) for f in (attention, compiled(attention)))
    torch.testing.assert_close(graph, eager, rtol=0, atol=0)


def test_the_gradient_of_the_log_sum_exp_goes_elsewhere(calls, table):
    table({"kind": "forward", "tokens": 1, "backend": "flash"}, {"kind": "backward", "tokens": 1, "backend": "flash"})
    tensors, seeds = inputs(), (torch.randn(2, 7, 2, 8), torch.randn(2, 2, 7))
    actual = with_gradients(lambda *t: causal_attention(*t, return_lse=True), tensors, seeds)
    torch.testing.assert_close(actual, with_gradients(naive, tensors, seeds), rtol=1e-11, atol=1e-11)
    assert calls == ["forward"]
    with pytest.raises(ValueError, match="'flash' cannot run causal_attention_backward: it has no gradient of the log"):
        with_gradients(lambda *t: causal_attention(*t, return_lse=True, backend="flash"), tensors, seeds)


def test_probes_the_symbol(probe):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("built for another torch")

    assert "ModuleNotFoundError" in probe()
    namespace = types.ModuleType("flash_attn")
    assert "ModuleNotFoundError" in probe(flash_attn=namespace)
    empty = types.ModuleType("flash_attn.flash_attn_interface")
    assert "no attribute 'flash_attn_func'" in probe(flash_attn=namespace, flash_attn_interface=empty)
    broken = Broken("flash_attn.flash_attn_interface")
    assert "RuntimeError: built for another torch" in probe(flash_attn=namespace, flash_attn_interface=broken)
    assert backends()["causal_attention"]["flash"].startswith("flash-attn cannot be used: RuntimeError")
    assert flash.unavailable() is flash.unavailable()


def test_flash_attn_takes_tensors_of_a_gpu():
    q = torch.zeros(1, 2, 1, 8)
    assert flash.refuse(q, q, q, None, None, "none", 0, 1.0) == "it runs on CUDA, not on cpu"


@pytest.mark.parametrize("rotary, window", [("none", 0), ("half", 3)])
def test_calls_the_fused_kernel_of_a_gpu_as_torch_declares_it(rotary, window, monkeypatch):
    """Shapes and types of arguments and results, on tensors without memory."""
    monkeypatch.setattr(
        importlib.import_module("starflow_kernels.causal_attention.external"), "_rotary_kernels", lambda x: None
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(2, 7, heads, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        turns = [None if rotary == "none" else torch.empty(7, 4, device="cuda") for _ in range(2)]
        args = q, k, v, *turns, rotary, window, 0.7
        out, lse = sdpa.causal_attention(*args)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 4, 7), torch.float32)
        found = sdpa.causal_attention_backward([out, None], [out, lse], *args)
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in (q, k, v)]


def test_what_the_kernels_of_a_gpu_refuse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    options = None, None, "none", 0, 1.0
    with FakeTensorMode():
        for refuse in (flash.refuse, sdpa.refuse):
            q = torch.empty(1, 2, 1, 16, dtype=torch.float16, device="cuda")
            assert refuse(q, q, q, *options) is None
            assert "q is torch.float32" in refuse(q.float(), q, q, *options)
            for d in (12, 264):
                wide = torch.empty(1, 2, 1, d, dtype=torch.float16, device="cuda")
                assert f"heads of {d} values" in refuse(wide, q, q, *options)
            none = torch.empty(0, 2, 1, 16, dtype=torch.float16, device="cuda")
            assert refuse(none, none, none, *options) == "there are no queries"
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
            assert refuse(q, q, q, *options) == "it needs sm_80 or newer"
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture
def choice(monkeypatch):
    """Function that returns the backend chosen for inputs of T tokens."""

    def choose(T, window=0, dtype=torch.float64, d=8):
        q = torch.zeros(1, T, 1, d, dtype=dtype)
        return dispatch.choose("causal_attention", q, q, q, None, None, "none", window, 1.0)

    return choose


def test_the_table_decides_from_a_number_of_tokens_on(choice, table):
    before = choice(5)
    other = "reference"
    assert before != other
    table(
        {"kind": "forward", "tokens": 10, "backend": other},
        {"kind": "forward", "tokens": 20, "backend": before},
        {"kind": "forward", "tokens": 30, "backend": other},
        {"kind": "forward", "tokens": 5, "window": True, "backend": other},
    )
    assert [choice(T) for T in (9, 10, 19, 20, 29, 30, 500)] == [before, *[other] * 2, *[before] * 2, *[other] * 2]
    # A window as long as the row is none.
    windowed = choice(9, window=9), choice(9, window=8)
    assert windowed == (choice(9, window=0) if before != "sdpa" else "reference", other)
    assert choice(10, dtype=torch.float32) == choice(10, dtype=torch.float32, d=16) != other


def test_each_pass_has_its_own_choice(calls, table):
    table(*({"kind": k, "tokens": 1, "backend": b} for k, b in (("forward", "reference"), ("backward", "flash"))))
    with_gradients(lambda *t: [causal_attention(*t)], inputs(), (torch.randn(2, 7, 2, 8),))
    assert calls == ["backward"]


def test_a_first_choice_that_cannot_run_leaves_it_to_the_others(choice, table):
    before = choice(5)
    table(*({"kind": "forward", "tokens": 1, "window": w, "backend": "flash"} for w in (False, True)))
    assert choice(5) == before
    table({"kind": "forward", "tokens": 1, "backend": "unknown"})
    assert choice(5) == before


def test_the_listing_tells_what_the_table_chooses_here(table):
    before = backends()["causal_attention"]
    table(
        {"kind": "forward", "tokens": 64, "backend": "sdpa"},
        {"kind": "backward", "tokens": 9, "backend": "sdpa", "window": True},
        {"kind": "forward", "tokens": 64, "chip": "sm_90", "backend": "native"},
        {"kind": "forward", "tokens": 9, "backend": "flash", "head": 16},
    )
    listing = backends()["causal_attention"]
    assert listing["sdpa"] == (
        "available; first choice forward on cpu for float64, heads of 8, from 64 tokens"
        "; first choice backward on cpu for float64, heads of 8 in a window, from 9 tokens"
    )
    assert {**listing, "sdpa": "available"} == before


def test_a_new_measurement_replaces_the_old_one(tmp_path):
    path, entry = tmp_path / "t.json", timings.Entry("sm_90", "forward", "bfloat16", 64, False, 256, "triton", "a")
    timings.write(path, [entry, entry._replace(tokens=128)])
    timings.write(path, [entry._replace(backend="flash"), entry._replace(chip="sm_80")])
    assert timings.Table(path).entries == [
        entry._replace(chip="sm_80"),
        entry._replace(tokens=128),
        entry._replace(backend="flash"),
    ]


def test_the_table_of_the_package_names_backends():
    path = Path(api.__file__).with_name("timings.json")
    assert {entry.backend for entry in timings.Table(path).entries} <= backends()["causal_attention"].keys()


@pytest.mark.parametrize(
    "settings, refused", [({"mode": False}, True), ({"mode": True, "warn_only": True}, True), ({"mode": True}, False)]
)
def test_torchs_gradient_on_a_gpu_has_a_fixed_order(settings, refused, monkeypatch):
    """Without the setting, torch adds the parts of dQ atomically; with warnings only, it does so too."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with FakeTensorMode():
        q = torch.empty(1, 4, 2, 8, dtype=torch.bfloat16, device="cuda")
        torch.use_deterministic_algorithms(**settings)
        try:
            why = sdpa.refuse_backward([q, None], [q, q], q, q, q, None, None, "none", 0, 1.0)
        finally:
            torch.use_deterministic_algorithms(False)
    assert ("no fixed order" in (why or "")) == refused


def test_benchmark_takes_the_fastest_whose_results_count():
    from benchmarks.gpu import choice

    times = {"triton": (3e-3, ""), "flash": (2e-3, ""), "sdpa": (1e-3, "not deterministic")}
    row = {"shape": (1, 256, 2, 2, 64, None), "dtype": "bfloat16", "pass": "backward"}
    rows = [{**row, "backend": name, "seconds": s, "verdict": why} for name, (s, why) in times.items()]
    rows.append({**row, "pass": "forward", "backend": "triton", "verdict": "RuntimeError"})
    found = choice.entries(rows, torch.device("cpu"), {"device": "a GPU", "torch": "2"})
    assert [entry[:7] for entry in found] == [("cpu", "backward", "bfloat16", 64, False, 256, "flash")]
    assert "triton 3000 us, flash 2000 us" in found[0].measured
