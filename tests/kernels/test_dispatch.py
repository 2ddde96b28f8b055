"""Backend choice: automatic, by name, and refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import starflow_kernels
from starflow_kernels import affine_flow, causal_attention
from starflow_kernels._core import compiled, dispatch

OPS = {
    "affine_flow",
    "affine_flow_inverse",
    "affine_flow_inverse_out",
    "block_forward",
    "block_inverse",
    "block_params",
    "cached_attention",
    "causal_attention",
    "flow_head",
}


@pytest.fixture
def fake(monkeypatch):
    """Register a backend for affine_flow until the test ends; its log-determinant is `mark`."""
    monkeypatch.setattr(dispatch, "_kernels", dict(dispatch._kernels))

    def register(name, mark, refuse=lambda *args: None):
        def run(x, params, *options):
            return x.clone(), torch.full_like(x[:, 0, 0], mark)

        dispatch.register("affine_flow", name, run, refuse)

    return register


def inputs():
    return torch.randn(2, 3, 2), torch.randn(2, 3, 4)


def refuse_all(*args):
    return "it takes nothing"


def refuse_wide(x, *args):
    return "tokens wider than 2" if x.shape[-1] > 2 else None


def test_every_op_has_the_reference_as_its_last_resort():
    listing = starflow_kernels.backends()
    assert listing.keys() >= OPS
    assert all(list(names)[-1] == "reference" for names in listing.values())
    assert not [op for op in listing if op.endswith("_backward")]


def test_listing_is_in_the_order_of_preference_and_a_copy(fake):
    before = starflow_kernels.backends()["affine_flow"]
    fake("first", 1.0)
    fake("second", 2.0)
    assert list(starflow_kernels.backends()["affine_flow"]) == ["second", "first", *before]
    starflow_kernels.backends()["affine_flow"].clear()
    assert list(starflow_kernels.backends()["affine_flow"]) == ["second", "first", *before]


def test_automatic_choice_takes_the_first_that_can(fake):
    fake("any", 1.0)
    fake("narrow", 2.0, refuse_wide)
    fake("none", 3.0, refuse_all)
    assert affine_flow(*inputs())[1].tolist() == [2.0, 2.0]
    assert affine_flow(torch.randn(2, 3, 4), torch.randn(2, 3, 8))[1].tolist() == [1.0, 1.0]


def test_automatic_choice_passes_over_what_refuses(fake):
    x, params = inputs()
    expected, before = affine_flow(x, params, backend="reference"), affine_flow(x, params)
    fake("none", 3.0, refuse_all)
    torch.testing.assert_close(affine_flow(x, params), before, rtol=0, atol=0)
    torch.testing.assert_close(before, expected)


def test_named_backend_runs(fake):
    fake("first", 1.0)
    fake("second", 2.0)
    assert affine_flow(*inputs(), backend="first")[1].tolist() == [1.0, 1.0]
    assert affine_flow(*inputs(), backend="reference")[1].tolist() != [2.0, 2.0]


def test_named_backend_that_refuses_says_why(fake):
    fake("narrow", 2.0, refuse_wide)
    assert affine_flow(*inputs(), backend="narrow")[1].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="backend='narrow' cannot run affine_flow: tokens wider than 2"):
        affine_flow(torch.randn(2, 3, 4), torch.randn(2, 3, 8), backend="narrow")


@pytest.mark.parametrize("gradient", [False, True])
def test_unknown_backend_lists_the_known(gradient):
    x, params = inputs()
    with pytest.raises(ValueError, match=r"backend='cudnn': affine_flow has .*'reference'"):
        affine_flow(x.requires_grad_(gradient), params, backend="cudnn")
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"backend='': causal_attention has .*'reference'"):
        causal_attention(q, q, q, backend="")


def test_the_backend_that_is_named_computes_the_gradient(fake):
    fake("fake", 1.0)
    dispatch.register("affine_flow_backward", "fake", lambda grads, outputs, x, params, *options: [x + 5, params + 7])
    x, params = (t.requires_grad_() for t in inputs())
    z, _ = affine_flow(x, params, backend="fake")
    found = torch.autograd.grad(z.sum(), (x, params))
    torch.testing.assert_close(found, (x + 5, params + 7))


def test_a_gradient_without_its_kernel_on_the_named_backend_is_an_error(fake):
    fake("forward-only", 1.0)
    x, params = (t.requires_grad_() for t in inputs())
    z, _ = affine_flow(x, params, backend="forward-only")
    with pytest.raises(ValueError, match="backend='forward-only': affine_flow_backward has"):
        z.sum().backward()


def test_kernels_run_without_autocast(fake):
    def run(x, params, *options):
        assert not torch.is_autocast_enabled("cpu")
        return x.clone(), (params @ params.mT).sum((1, 2))

    fake("unused", 0.0)
    dispatch.register("affine_flow", "products", run)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert affine_flow(*inputs())[1].dtype == torch.float32


def test_the_reason_for_missing_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "package")
    compiled.FOLDER.mkdir()
    assert compiled.load_error("cuda", "CUDA") == "no CUDA kernels: the build did not set STARFLOW_CUDA=1"
    (tmp_path / "setup.py").touch()
    for name in ("native", "cuda"):
        reason = compiled.load_error(name, name)
        assert reason.startswith(
            f"no {name} kernels: no compiled library in {compiled.FOLDER}; this is a source tree: "
        )
    (compiled.FOLDER / "_native.txt").write_text("no compiler\n")
    assert compiled.load_error("native", "native") == "no native kernels: no compiler"
    assert compiled.load_error("cuda", "CUDA") == "no CUDA kernels: the build did not set STARFLOW_CUDA=1"


@pytest.mark.parametrize("op", ["block_inverse", "block_jacobi"])
def test_a_loop_in_plain_pytorch_on_a_gpu_is_no_surprise(op, monkeypatch):
    kernels = {
        "kernel": dispatch.Kernel(None, lambda z: f"tokens of {z.shape[-1]} values", lambda: None),
        "other": dispatch.Kernel(None, lambda z: None, lambda: "it is not installed"),
        "reference": dispatch.Kernel(lambda z: z, lambda z: None, lambda: None),
    }
    monkeypatch.setattr(dispatch, "_kernels", {op: kernels})
    monkeypatch.setattr(dispatch, "_preferences", {})
    monkeypatch.setattr(dispatch, "_wrappers", {})
    with FakeTensorMode():
        z = torch.empty(1, 4, 300, device="cuda")
        with pytest.warns(UserWarning, match="kernel: tokens of 300 values; other: it is not installed") as seen:
            for _ in range(2):
                dispatch.run(op, None, z)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.run(op, "reference", z)
        dispatch.run(op, None, torch.empty(1, 4, 301))
