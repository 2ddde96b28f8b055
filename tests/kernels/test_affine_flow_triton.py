"""affine_flow in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_affine_flow_triton.py."""

from __future__ import annotations

import pytest
import torch
from support.affine import every_spec
from support.backends import require_interpreter
from support.contract import assert_within_contract, compiled, strided, with_gradients

from starflow_kernels import AffineSpec, affine_flow

require_interpreter()
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
ORDERS = [(False, True), (True, False), (True, True)]  # shift, flip


def inputs(spec, B, T, D, dtype):
    return [torch.randn(B, T, D).to(dtype), torch.randn(B, T, spec.params_dim(D)).to(dtype)]


@every_spec
@every_dtype
@pytest.mark.parametrize("T, D", [(4, 12), (41, 25), (130, 17)])  # programs take 1024 values
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_around_the_blocks(T, D, dtype, spec):
    for logdet, (shift, flip) in zip(("sum", "mean", "none"), ORDERS):
        B, options = 3, {"shift": shift, "flip": flip, "logdet": logdet}
        tensors = [strided(t) for t in inputs(spec, B, T, D, dtype)]
        seeds = torch.randn(B, T, D, dtype=dtype), torch.randn((B, T, D) if logdet == "none" else B)

        def run(tensors, backend):
            return with_gradients(lambda *t: affine_flow(*t, spec, **options, backend=backend), tensors, seeds)  # noqa: B023

        exact = run([t.double() for t in tensors], "reference")
        for values in zip(run(tensors, "triton"), run(tensors, "reference"), exact):
            assert_within_contract(*values)


def test_sums_of_more_partial_sums_than_a_block():
    from starflow_kernels.affine_flow.triton import sum_rows

    partial = torch.randn(3, 2500)
    for logdet, factor in (("sum", 1), ("mean", 1 / 5000)):
        exact = -partial.double().sum(1) * factor
        assert_within_contract(sum_rows(partial, logdet, 5000), -partial.sum(1) * factor, exact)


def test_a_row_has_the_same_bits_alone():
    spec = AffineSpec("softplus", 4.0)
    tensors, seeds = inputs(spec, 4, 130, 17, torch.float32), (torch.randn(4, 130, 17), torch.randn(4))

    def run(rows):
        given = [t[rows] for t in tensors]
        options = {"shift": True, "backend": "triton"}
        return with_gradients(lambda *t: affine_flow(*t, spec, **options), given, [s[rows] for s in seeds])

    for row in (slice(0, 1), slice(3, 4)):
        for alone, batched in zip(run(row), run(slice(None))):
            assert torch.equal(alone, batched[row])


@pytest.mark.parametrize("scale", ["exp", "softplus", "unit"])
@pytest.mark.parametrize("clip", [0.0, 40.0])
@every_dtype
def test_values_that_overflow_pass_through(scale, clip, dtype):
    ends = torch.tensor([-30.0, -18.0, -16.0, -1e-6, 0.0, 10.0, 30.0, 88.0, torch.nan, torch.inf])
    params = torch.stack([ends, torch.zeros(10)] if scale != "unit" else [ends], -1).unsqueeze(0).to(dtype)
    x = torch.tensor([1.0, -1e-6, 3e-8, 70000.0, torch.nan, torch.inf, 1.0, 1.0, 1.0, 2.0]).view(1, 10, 1).to(dtype)
    found = affine_flow(x, params, AffineSpec(scale, clip), logdet="none", backend="triton")
    exact = affine_flow(x.double(), params.double(), AffineSpec(scale, clip), logdet="none", backend="reference")
    for actual, expected in zip(found, exact):
        rtol = 4 * torch.finfo(actual.dtype).eps * (40 if clip else 1)
        torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=1e-6, equal_nan=True)


def test_mixed_dtypes_and_no_rows():
    for x_dtype, params_dtype, B in ((torch.float32, torch.float16, 2), (torch.float16, torch.float32, 0)):
        x, params = inputs(AffineSpec(), B, 5, 3, torch.float32)
        x, params = x.to(x_dtype).requires_grad_(), params.to(params_dtype).requires_grad_()
        z, logdet = affine_flow(x, params, backend="triton")
        exact = affine_flow(x.double(), params.double(), backend="reference")
        torch.testing.assert_close((z, logdet), (exact[0].to(x_dtype), exact[1].float()), rtol=1e-5, atol=1e-5)
        (z.sum() + logdet.sum()).backward()
        assert (x.grad.dtype, params.grad.dtype) == (x_dtype, params_dtype)


@pytest.mark.parametrize("dtype, why", [(torch.float64, "float32 and narrower"), (torch.bfloat16, "no bfloat16")])
def test_refuses_with_the_reason(dtype, why):
    with pytest.raises(ValueError, match=f"backend='triton' cannot run affine_flow: .*{why}"):
        affine_flow(*inputs(AffineSpec(), 1, 2, 3, dtype), backend="triton")


def test_opcheck_and_compile():
    tensors = [t.requires_grad_() for t in inputs(AffineSpec(), 2, 5, 3, torch.float32)]
    args = (*tensors, "softplus", 4.0, True, True, "mean")
    torch.library.opcheck(torch.ops.starflow.affine_flow.default, args, {"backend": "triton"})

    def flow(x, params):
        return affine_flow(x, params, shift=True, backend="triton")

    seeds = torch.randn(2, 5, 3), torch.randn(2)
    eager, graph = (with_gradients(f, tensors, seeds) for f in (flow, compiled(flow)))
    assert all(torch.equal(*values) for values in zip(eager, graph))
