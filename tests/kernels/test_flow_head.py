"""flow_head: final norm, projection and affine transform in one op."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.affine import every_order, every_spec
from support.backends import cpu_backends, needs_native, on_backends
from support.contract import assert_same_row, assert_within_contract, compiled, strided, with_gradients
from support.naive import naive_affine, reduced

from starflow_kernels import AffineSpec, flow_head

F32, F64 = torch.float32, torch.float64


def takes(backend, dtype=F64):
    """Whether a backend takes tensors of this dtype."""
    return backend == "reference" or dtype != F64


in_float64 = on_backends("flow_head", takes)
# For bounds that are measured by the reference itself.
except_reference = on_backends("flow_head", lambda backend: backend != "reference")
every_part = pytest.mark.parametrize(
    "bias, norm", list(itertools.product([False, True], repeat=2)), ids=["weight", "norm", "bias", "bias-norm"]
)


@pytest.fixture(params=cpu_backends("flow_head"))
def backend(request):
    return request.param


def inputs(spec, bias=True, norm=True, B=2, T=5, D=3, C=7, dtype=F64) -> dict[str, torch.Tensor]:
    P = spec.params_dim(D)
    shapes = {"x": (B, T, D), "h": (B, T, C), "weight": (P, C)}
    shapes.update({"bias": (P,)} if bias else {}, **({"norm_weight": (C,)} if norm else {}))
    tensors = {name: torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    tensors["weight"] *= 0.5 * C**-0.5  # float16 holds the gradients of plain torch too
    return {name: t.to(dtype) for name, t in tensors.items()}


def naive(spec, shift, flip, x, h, weight, bias=None, norm_weight=None):
    if norm_weight is not None:
        h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm_weight)
    params = h @ weight.T
    return naive_affine(x, params if bias is None else params + bias, spec, shift, flip)


@every_spec
@every_order
@every_part
@in_float64
def test_matches_loops(spec, shift, flip, bias, norm, backend):
    tensors = inputs(spec, bias, norm)
    expected, minus_log_sigma = naive(spec, shift, flip, **tensors)
    for logdet in ("sum", "mean", "none"):
        z, ld = flow_head(**tensors, spec=spec, shift=shift, flip=flip, logdet=logdet, backend=backend)
        torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ld, reduced(minus_log_sigma, logdet), rtol=1e-11, atol=1e-11)


@every_spec
@in_float64
def test_logdet_is_that_of_the_jacobian(spec, backend):
    tensors = inputs(spec, B=1, T=4)
    x = tensors.pop("x")
    mix = torch.randn(4, 4, dtype=F64).tril()
    tensors["h"] = torch.randn(3, 7, dtype=F64)

    def flow(x):
        h = torch.einsum("ts,bsd,dc->btc", mix, x.flip(1).tanh(), tensors["h"])
        return flow_head(x, **{**tensors, "h": h}, spec=spec, shift=True, flip=True, backend=backend)

    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x).reshape(12, 12)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, flow(x)[1][0], rtol=0, atol=1e-9)


@every_spec
@every_order
@pytest.mark.parametrize("logdet", ["sum", "mean", "none"])
@in_float64
def test_gradcheck(spec, shift, flip, logdet, backend):
    tensors = [t.requires_grad_() for t in inputs(spec, T=3, D=2, C=3).values()]
    options = {"shift": shift, "flip": flip, "logdet": logdet, "backend": backend}
    assert torch.autograd.gradcheck(lambda *t: flow_head(*t, spec, **options), tensors)


@every_part
@in_float64
def test_gradcheck_of_every_part(bias, norm, backend):
    tensors = {name: t.requires_grad_() for name, t in inputs(AffineSpec(), bias, norm, T=3, D=2, C=3).items()}
    names = list(tensors)

    def head(*values):
        return flow_head(**dict(zip(names, values)), shift=True, backend=backend)

    assert torch.autograd.gradcheck(head, list(tensors.values()))


@pytest.mark.parametrize("T", [1, 2, 63, 111])
@pytest.mark.parametrize("D, C", [(1, 5), (3, 24), (192, 80)])
@pytest.mark.usefixtures("poisoned_memory")
@in_float64
def test_sizes(T, D, C, backend):
    spec = AffineSpec("softplus", 4.0)
    tensors = inputs(spec, T=T, D=D, C=C)
    z, ld = flow_head(**tensors, spec=spec, shift=True, flip=True, backend=backend)
    expected, minus_log_sigma = naive(spec, True, True, **tensors)
    torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ld, minus_log_sigma.sum((1, 2)), rtol=1e-11, atol=1e-11)


@on_backends("flow_head", takes, dtype=[F32, torch.bfloat16, torch.float16])
@every_spec
def test_error_contract(dtype, spec, backend):
    tensors = list(inputs(spec, T=63, D=5, C=24, dtype=dtype).values())
    seeds = torch.randn(2, 63, 5, dtype=dtype), torch.randn(2)

    def plain_torch(*tensors):
        z, minus_log_sigma = naive(spec, True, False, *tensors)
        return z, minus_log_sigma.sum((1, 2))

    actual = with_gradients(lambda *t: flow_head(*t, spec, shift=True, backend=backend), tensors, seeds)
    plain = with_gradients(plain_torch, tensors, seeds)
    exact = with_gradients(plain_torch, [t.double() for t in tensors], seeds)
    assert [t.dtype for t in actual] == [dtype, torch.float32, *[dtype] * 5]
    for values in zip(actual, plain, exact):
        assert_within_contract(*values)


@except_reference
@every_spec
@every_order
@pytest.mark.parametrize("T, D, C", [(1, 1, 5), (2, 2, 16), (63, 3, 24), (111, 12, 65), (111, 16, 32), (63, 48, 80)])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_over_sizes(T, D, C, spec, shift, flip, backend):
    B, found = max(2, 512 // (T * D)), {}
    for part, logdet in enumerate(("sum", "mean", "none", "sum") * 2):
        tensors = inputs(spec, bool(part & 1), bool(part & 2), B, T, D, C, torch.float32)
        names, tensors = list(tensors), [strided(t) for t in tensors.values()]
        seeds = torch.randn(B, T, D), torch.randn((B, T, D) if logdet == "none" else B)

        def run(tensors, backend):
            options = {"spec": spec, "shift": shift, "flip": flip, "logdet": logdet, "backend": backend}  # noqa: B023
            return with_gradients(lambda *t: flow_head(**dict(zip(names, t)), **options), tensors, seeds)  # noqa: B023

        exact = run([t.double() for t in tensors], "reference")
        for name, *values in zip(["z", logdet, *names], run(tensors, backend), run(tensors, "reference"), exact):
            found.setdefault(name, []).append([value.flatten() for value in values])
    # One sum over tokens is a single draw of the error, for torch too, so that all parts are compared together.
    for draws in found.values():
        assert_within_contract(*(torch.cat(values) for values in zip(*draws)))


@except_reference
@pytest.mark.parametrize("D, C", [(192, 200), (8192, 20), (2, 70000)])
def test_wide_tokens_and_states(D, C, backend):
    tensors = list(inputs(AffineSpec("exp"), B=9, T=3, D=D, C=C, dtype=torch.float32).values())
    seeds = torch.randn(9, 3, D), torch.randn(9)

    def run(tensors, backend):
        return with_gradients(lambda *t: flow_head(*t, AffineSpec("exp"), shift=True, backend=backend), tensors, seeds)

    exact = run([t.double() for t in tensors], "reference")
    for values in zip(run(tensors, backend), run(tensors, "reference"), exact):
        assert_within_contract(*values)


def test_no_rows(backend):
    tensors = list(inputs(AffineSpec("exp"), B=0, dtype=torch.float32).values())
    results = with_gradients(
        lambda *t: flow_head(*t, AffineSpec("exp"), backend=backend), tensors, (torch.zeros(0, 5, 3), torch.zeros(0))
    )
    assert [r.shape for r in results] == [(0, 5, 3), (0,), *(t.shape for t in tensors)]
    assert not any(r.any() for r in results)


@on_backends("flow_head", takes, dtype=[torch.bfloat16, torch.float16])
def test_float32_tokens_on_a_narrow_network(dtype, backend):
    tensors = inputs(AffineSpec(), dtype=dtype)
    tensors["x"] = torch.randn(2, 5, 3)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    z, ld = flow_head(**tensors, backend=backend)
    assert (z.dtype, ld.dtype) == (torch.float32, torch.float32)
    plain = naive(AffineSpec(), False, False, **tensors)
    exact = naive(AffineSpec(), False, False, **{name: t.double() for name, t in tensors.items()})
    assert_within_contract(z, plain[0], exact[0])
    assert_within_contract(ld, plain[1].sum((1, 2)), exact[1].sum((1, 2)))
    (z.sum() + ld.sum()).backward()
    assert all(t.grad.dtype == t.dtype and t.grad.isfinite().all() for t in tensors.values())


@every_order
@pytest.mark.usefixtures("poisoned_memory")
@in_float64
def test_strided_inputs_are_read_and_left(shift, flip, backend):
    tensors, seeds = list(inputs(AffineSpec()).values()), (torch.randn(2, 5, 3), torch.randn(2))
    copies = [strided(t) for t in tensors]
    results = [
        with_gradients(lambda *t: flow_head(*t, shift=shift, flip=flip, backend=backend), given, seeds)
        for given in (tensors, copies)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(copy, t) for copy, t in zip(copies, tensors))


@on_backends("flow_head", takes, dtype=[F32, torch.bfloat16, F64])
def test_bits_at_any_batch_and_thread_count(dtype, backend):
    """A row has the same bits in any batch; sums over tokens have the same bits at any number of threads.

    The composed backend has torch's products, whose bits torch chooses by the number of tokens.
    """
    spec, B = AffineSpec("softplus", 4.0), 40
    tensors, seeds = list(inputs(spec, B=B, T=63, C=24, dtype=dtype).values()), (torch.randn(B, 63, 3), torch.randn(B))

    def run(i=slice(None)):
        given = [t[i] for t in tensors[:2]] + tensors[2:]
        return with_gradients(
            lambda *t: flow_head(*t, spec, shift=True, backend=backend), given, [seed[i] for seed in seeds]
        )

    batch = run()
    for rows in (slice(0, 1), slice(7, 8), slice(20, 25)):
        for alone, batched in zip(run(rows)[:4], batch):
            assert_same_row("reference" if backend == "composed" else backend, alone, batched[rows])
    if backend == "native":
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again = run()
            torch.set_num_threads(1)
            assert all(torch.equal(*values) for values in zip(again, batch))


@every_part
@needs_native
def test_opcheck_of_the_composed_backend(bias, norm):
    tensors = {name: t.requires_grad_() for name, t in inputs(AffineSpec(), bias, norm, dtype=F32).items()}
    optional = [tensors.get(name) for name in ("bias", "norm_weight")]
    args = (*(tensors[name] for name in ("x", "h", "weight")), *optional, "softplus", 4.0, True, True, "mean")
    torch.library.opcheck(torch.ops.starflow.flow_head.default, args, {"backend": "composed"})


@every_part
def test_opcheck(bias, norm):
    tensors = {name: t.requires_grad_() for name, t in inputs(AffineSpec(), bias, norm).items()}
    optional = [tensors.get(name) for name in ("bias", "norm_weight")]
    args = (*(tensors[name] for name in ("x", "h", "weight")), *optional, "softplus", 4.0, True, True, "mean")
    torch.library.opcheck(torch.ops.starflow.flow_head.default, args)


@every_part
def test_opcheck_backward(bias, norm):
    tensors = inputs(AffineSpec(), bias, norm)
    optional = [tensors.get(name) for name in ("bias", "norm_weight")]
    args = (*(tensors[name] for name in ("x", "h", "weight")), *optional, "softplus", 4.0, True, True, "none")
    outputs = list(torch.ops.starflow.flow_head(*args))
    grads = [torch.randn_like(t) for t in outputs]
    torch.library.opcheck(torch.ops.starflow.flow_head_backward.default, (grads, outputs, *args))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    tensors, seeds = list(inputs(AffineSpec()).values()), (torch.randn(2, 5, 3), torch.randn(2))

    def head(*tensors):
        return flow_head(*tensors, shift=True, flip=True)

    eager, graph = (with_gradients(f, tensors, seeds) for f in (head, compiled(head, compiler)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "x: expected a tensor"),
        ({"x": torch.zeros(3, 2)}, ValueError, "x: expected shape"),
        ({"h": torch.zeros(2, 4, 5)}, ValueError, r"h: expected shape \(2, 3, C\), got \(2, 4, 5\)"),
        ({"h": torch.zeros(2, 3, 5, dtype=torch.bool)}, TypeError, "h: dtype torch.bool"),
        ({"weight": torch.zeros(4, 6)}, ValueError, r"weight: expected shape \(4, 5\), got \(4, 6\)"),
        ({"weight": torch.zeros(4, 5, device="meta")}, ValueError, "weight: on meta, expected cpu"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \(4,\), got \(5,\)"),
        ({"norm_weight": torch.zeros(4)}, ValueError, r"norm_weight: expected shape \(5,\)"),
        ({"spec": AffineSpec("unit")}, ValueError, r"weight: expected shape \(2, 5\)"),
        ({"logdet": ""}, ValueError, "logdet='': expected one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 2), "h": torch.zeros(2, 3, 5), "weight": torch.zeros(4, 5)}
    with pytest.raises(error, match=message):
        flow_head(**{**arguments, **change})


def test_composed_refuses_with_the_reason():
    with pytest.raises(ValueError, match="cannot run flow_head: affine_flow has its reference alone"):
        flow_head(**inputs(AffineSpec()), backend="composed")


@needs_native
@pytest.mark.parametrize(
    "change, reason",
    [
        ({"x": torch.zeros(2, 5, 3, dtype=F64)}, "x is torch.float64, it takes float32"),
        ({"h": torch.zeros(2, 5, 7, dtype=F64)}, "h is torch.float64, it takes float32"),
        ({"weight": torch.zeros(6, 7, dtype=F64)}, "weight is torch.float64, it takes float32"),
        (inputs(AffineSpec(), D=8193, dtype=F32), "tokens of 8193 values, it takes up to 8192"),
    ],
    ids=["tokens", "states", "weights", "wide"],
)
def test_native_refuses_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=f"backend='native' cannot run flow_head: {reason}"):
        flow_head(**{**inputs(AffineSpec(), dtype=F32), **change}, backend="native")
