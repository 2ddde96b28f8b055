"""affine_flow: density direction of the affine transform."""

from __future__ import annotations

import pytest
import torch
from support.affine import every_logdet, every_order, every_spec
from support.backends import cpu_backends, needs_native, on_backends
from support.contract import assert_same_row, assert_within_contract, compiled, strided, with_gradients
from support.naive import naive_affine, reduced

from starflow_kernels import AffineSpec, affine_flow

F32, F64 = torch.float32, torch.float64


def takes(backend, dtype=F64):
    """Whether a backend takes tensors of this dtype."""
    return backend != "native" or dtype != F64


in_float64 = on_backends("affine_flow", takes)
# For bounds that are measured by the reference itself.
except_reference = on_backends("affine_flow", lambda backend: backend != "reference")


@pytest.fixture(params=cpu_backends("affine_flow"))
def backend(request):
    return request.param


def inputs(spec, B=2, T=5, D=3, dtype=F64):
    return torch.randn(B, T, D, dtype=dtype), torch.randn(B, T, spec.params_dim(D), dtype=dtype)


@every_spec
@every_order
@every_logdet
@in_float64
def test_matches_loops(spec, shift, flip, logdet, backend):
    x, params = inputs(spec)
    z, ld = affine_flow(x, params, spec, shift=shift, flip=flip, logdet=logdet, backend=backend)
    expected, minus_log_sigma = naive_affine(x, params, spec, shift, flip)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ld, reduced(minus_log_sigma, logdet), rtol=1e-12, atol=1e-12)


@every_spec
@every_order
@in_float64
def test_logdet_is_that_of_the_jacobian(spec, shift, flip, backend):
    T, D = 4, 3
    mix = torch.randn(T, T, dtype=F64).tril(0 if shift else -1)
    head = torch.randn(D, spec.params_dim(D), dtype=F64)

    def flow(x):
        own = x.flip(1) if flip else x
        params = torch.einsum("ts,bsd,dp->btp", mix, own.tanh(), head)
        return affine_flow(x, params, spec, shift=shift, flip=flip, backend=backend)

    x = torch.randn(1, T, D, dtype=F64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x).reshape(T * D, T * D)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, flow(x)[1][0], rtol=0, atol=1e-9)


@every_spec
@every_order
@every_logdet
@in_float64
def test_gradcheck(spec, shift, flip, logdet, backend):
    x, params = (t.requires_grad_() for t in inputs(spec, T=3, D=2))
    options = {"shift": shift, "flip": flip, "logdet": logdet, "backend": backend}
    assert torch.autograd.gradcheck(lambda x, p: affine_flow(x, p, spec, **options), (x, params))


@pytest.mark.parametrize("T", [1, 63, 111])
@pytest.mark.parametrize("D", [1, 3, 192])
@pytest.mark.usefixtures("poisoned_memory")
@in_float64
def test_sizes(T, D, backend):
    spec = AffineSpec("softplus", 4.0)
    x, params = inputs(spec, T=T, D=D)
    z, ld = affine_flow(x, params, spec, shift=True, flip=True, backend=backend)
    expected, minus_log_sigma = naive_affine(x, params, spec, True, True)
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ld, minus_log_sigma.sum((1, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_spec
def test_error_contract(dtype, spec, backend):
    tensors = inputs(spec, T=63, D=5, dtype=dtype)
    seeds = torch.randn(2, 63, 5, dtype=dtype), torch.randn(2)

    def naive(x, params):
        z, minus_log_sigma = naive_affine(x, params, spec, shift=True)
        return z, minus_log_sigma.sum((1, 2))

    actual = with_gradients(lambda x, p: affine_flow(x, p, spec, shift=True, backend=backend), tensors, seeds)
    plain = with_gradients(naive, tensors, seeds)
    exact = with_gradients(naive, [t.double() for t in tensors], seeds)
    assert [t.dtype for t in actual] == [dtype, torch.float32, dtype, dtype]
    for values in zip(actual, plain, exact):
        assert_within_contract(*values)


@except_reference
@every_spec
@every_order
@pytest.mark.parametrize("D", [1, 3, 16, 48, 192])
@pytest.mark.parametrize("T", [1, 63, 111])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_over_sizes(T, D, spec, shift, flip, backend):
    B = max(2, 512 // (T * D))  # enough values for plain PyTorch to show its usual error
    tensors = [strided(t) for t in inputs(spec, B, T, D, torch.float32)]
    for logdet in ("sum", "mean", "none"):
        seeds = torch.randn(B, T, D), torch.randn((B, T, D) if logdet == "none" else B)

        def run(tensors, backend):
            options = {"shift": shift, "flip": flip, "logdet": logdet, "backend": backend}  # noqa: B023
            return with_gradients(lambda *t: affine_flow(*t, spec, **options), tensors, seeds)  # noqa: B023

        exact = run([t.double() for t in tensors], "reference")
        for values in zip(run(tensors, backend), run(tensors, "reference"), exact):
            assert_within_contract(*values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", ["exp", "softplus", "unit"])
@pytest.mark.parametrize("clip", [0.0, 40.0])
def test_values_that_overflow_pass_through(scale, clip, dtype, backend):
    """Infinities and NaN come out where plain PyTorch gives them; small and large scales keep their digits."""
    ends = torch.tensor([-30.0, -18.0, -16.0, -1e-6, 0.0, 10.0, 30.0, 88.0, torch.nan, torch.inf])
    params = torch.stack([ends, torch.zeros(10)] if scale != "unit" else [ends], -1).unsqueeze(0).to(dtype)
    x = torch.tensor([1.0, -1e-6, 3e-8, 70000.0, torch.nan, torch.inf, 1.0, 1.0, 1.0, 2.0]).view(1, 10, 1).to(dtype)
    spec = AffineSpec(scale, clip)
    found = affine_flow(x, params, spec, logdet="none", backend=backend)
    exact = affine_flow(x.double(), params.double(), spec, logdet="none", backend="reference")
    for actual, expected in zip(found, exact):
        rtol = 4 * torch.finfo(actual.dtype).eps * (40 if clip else 1)
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=1e-6, equal_nan=True)
    assert affine_flow(x, params, spec, backend=backend)[1].isnan().all() or scale == "unit"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_narrow_value_passes_unchanged(dtype, backend):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1, 16)
    z, _ = affine_flow(x, torch.zeros_like(x), AffineSpec("unit"), backend=backend)
    torch.testing.assert_close(z, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_results_are_rounded_to_nearest_even(dtype, backend):
    x = (torch.rand(1, 4096, 16) * torch.logspace(-9, 5, 4096)[:, None]).to(dtype)
    mean = (torch.rand(1, 4096, 16) * torch.logspace(-9, 5, 4096)[:, None]).requires_grad_()
    z, _ = affine_flow(x, mean, AffineSpec("unit"), backend=backend)
    assert torch.equal(z, (x.float() - mean).to(dtype))


@pytest.mark.parametrize("x_dtype, params_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes(x_dtype, params_dtype, backend):
    x, params = inputs(AffineSpec())
    x, params = x.to(x_dtype).requires_grad_(), params.to(params_dtype).requires_grad_()
    z, ld = affine_flow(x, params, backend=backend)
    expected, minus_log_sigma = naive_affine(x.double(), params.double(), AffineSpec())
    torch.testing.assert_close(z, expected.to(x_dtype), rtol=1e-2 if x_dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    torch.testing.assert_close(ld, minus_log_sigma.sum((1, 2)).float(), rtol=1e-6, atol=1e-6)
    (z.sum() + ld.sum()).backward()
    assert (x.grad.dtype, params.grad.dtype) == (x_dtype, params_dtype)


@every_order
@pytest.mark.usefixtures("poisoned_memory")
@in_float64
def test_strided_inputs_are_read_and_left(shift, flip, backend):
    spec = AffineSpec("softplus", 4.0)
    x, params = inputs(spec)
    z, ld = affine_flow(x, params, spec, shift=shift, flip=flip, backend=backend)
    copies = strided(x).requires_grad_(), strided(params).requires_grad_()
    z_strided, ld_strided = affine_flow(*copies, spec, shift=shift, flip=flip, backend=backend)
    torch.testing.assert_close((z_strided, ld_strided), (z, ld), rtol=1e-14, atol=1e-14)
    grads = torch.autograd.grad((z_strided * strided(z)).sum(), copies)
    assert all(g.is_contiguous() and g.isfinite().all() for g in grads)
    assert torch.equal(copies[0], x) and torch.equal(copies[1], params)


@pytest.mark.parametrize("D", [3, 5, 48])
@on_backends("affine_flow", takes, dtype=[F32, torch.bfloat16, F64])
def test_a_row_has_the_same_bits_at_any_batch_and_thread_count(D, dtype, backend):
    spec = AffineSpec("softplus", 4.0)
    tensors = inputs(spec, B=70, T=63, D=D, dtype=dtype)
    seeds = torch.randn(70, 63, D), torch.randn(70)

    def run(rows):
        given = [t[rows] for t in tensors]
        return with_gradients(
            lambda *t: affine_flow(*t, spec, shift=True, backend=backend), given, [seed[rows] for seed in seeds]
        )

    batch = run(slice(None))
    for rows in (slice(0, 1), slice(1, 2), slice(40, 45)):
        for alone, batched in zip(run(rows), batch):
            assert_same_row(backend, alone, batched[rows])
    if backend != "reference":
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again = run(slice(None))
            torch.set_num_threads(1)
            assert all(torch.equal(*values) for values in zip(again, batch))


def test_no_rows(backend):
    x, params = inputs(AffineSpec(), B=0, dtype=torch.float32)
    results = with_gradients(
        lambda *t: affine_flow(*t, backend=backend), [x, params], (torch.zeros_like(x), torch.zeros(0))
    )
    assert [r.shape for r in results] == [(0, 5, 3), (0,), x.shape, params.shape]


@in_float64
def test_zero_parameters_are_the_identity(backend):
    x = torch.randn(2, 5, 3, dtype=F64)
    for scale in ("exp", "softplus"):
        z, ld = affine_flow(x, torch.zeros(2, 5, 6, dtype=F64), AffineSpec(scale), backend=backend)
        torch.testing.assert_close(z, x, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(ld, torch.zeros_like(ld), rtol=0, atol=1e-14)


@every_spec
def test_opcheck(spec):
    x, params = (t.requires_grad_() for t in inputs(spec))
    args = (x, params, spec.scale, spec.soft_clip, True, True, "mean")
    torch.library.opcheck(torch.ops.starflow.affine_flow.default, args)


@pytest.mark.parametrize("logdet", ["sum", "none"])
def test_opcheck_backward(logdet):
    x, params = inputs(AffineSpec())
    options = ("exp", 1.5, True, True, logdet)
    z, ld = torch.ops.starflow.affine_flow(x, params, *options)
    for grads in ([torch.randn_like(z), torch.randn_like(ld)], [None, torch.randn_like(ld)]):
        torch.library.opcheck(torch.ops.starflow.affine_flow_backward.default, (grads, [z, ld], x, params, *options))


@pytest.mark.parametrize("compiler, scale", [("aot_eager", "exp"), ("aot_eager", "unit"), ("inductor", "softplus")])
def test_compiles_as_one_graph(compiler, scale):
    spec = AffineSpec(scale)
    tensors, seeds = inputs(spec), (torch.randn(2, 5, 3), torch.randn(2))

    def flow(x, params):
        return affine_flow(x, params, spec, shift=True, flip=True, logdet="mean")

    eager, graph = (with_gradients(f, tensors, seeds) for f in (flow, compiled(flow, compiler)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor of shape"),
        ({"x": torch.zeros(2, 3, 2, dtype=torch.int64)}, TypeError, "x: dtype torch.int64"),
        ({"x": torch.zeros(2, 3)}, ValueError, r"x: expected shape \(B, T, D\), got \(2, 3\)"),
        ({"params": torch.zeros(2, 3, 2)}, ValueError, r"params: expected shape \(2, 3, 4\), got \(2, 3, 2\)"),
        ({"params": torch.zeros(1, 3, 4)}, ValueError, "params: expected shape"),
        ({"params": torch.zeros(2, 3, 4, device="meta")}, ValueError, "params: on meta, expected cpu"),
        ({"spec": AffineSpec("unit")}, ValueError, r"params: expected shape \(2, 3, 2\)"),
        ({"logdet": "total"}, ValueError, "logdet='total': expected one of 'sum', 'mean', 'none'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 2), "params": torch.zeros(2, 3, 4)}
    with pytest.raises(error, match=message):
        affine_flow(**{**arguments, **change})


@needs_native
@pytest.mark.parametrize(
    "D, dtype, reason",
    [
        (2, F64, "x is torch.float64, it takes float32, bfloat16 and float16"),
        (8193, F32, "tokens of 8193 values, it takes up to 8192"),
    ],
    ids=str,
)
def test_native_refuses_with_the_reason(D, dtype, reason):
    with pytest.raises(ValueError, match=f"backend='native' cannot run affine_flow: {reason}"):
        affine_flow(*inputs(AffineSpec(), D=D, dtype=dtype), backend="native")
