"""Defaults of torch and inference mode change no result, and inference mode leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.flows import make

from starflow import Flow, Guidance, Inversion
from starflow_kernels import (
    Solver,
    affine_flow,
    affine_flow_inverse,
    attention_flow,
    bias_gelu,
    cached_attention,
    causal_attention,
    flow_head,
    linear,
    residual_norm,
    solve_inverse,
)

LABELS = (0, 1, 2, 3)
SOLVERS = {"sequential": Solver(), "jacobi": Solver("jacobi"), "neighbours": Solver("jacobi", neighbours=(1, 4))}


def flow_results(flow: Flow, z: torch.Tensor, labels: torch.Tensor, text: torch.Tensor | None = None) -> list:
    """Return results of the public methods of a flow."""
    found = [flow.log_prob(z, labels, text), flow(z, labels, text).logdet, flow.denoise(z, labels, text)]
    guidance = Guidance(1.5, annealed=True, temperature=0.8 if text is None else 1.0)
    empty = None if text is None else torch.zeros_like(text[:1])
    for solver in SOLVERS.values():
        drawn = flow.inverse(z, labels, text, guidance, empty_text=empty, solvers=solver)
        found += [drawn.x, drawn.logdet, *(report.sweeps for report in drawn.reports)]
    found.append(flow.inverse(z, labels, text, quantize="int8").x)
    found.append(flow.inverse(z, labels, text, backend="reference").x)
    if text is None:
        for inversion in (Inversion(), Inversion("jacobi")):
            found.append(
                flow.sample(4, labels, seed=3, batch_size=3, denoise=1.0, certify=True, inversion=inversion).images
            )
    grads = torch.autograd.grad(flow.loss(flow(z, labels, text)), list(flow.parameters()), allow_unused=True)
    return [*found, *(grad for grad in grads if grad is not None)]


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """Return raw parameters that depend on the token before."""
    return 0.1 * torch.nn.functional.pad(torch.cat([x, x], 2), (0, 0, 1, 0))[:, :-1]


def op_results(x: torch.Tensor, q: torch.Tensor, params: torch.Tensor, backend: str | None) -> list:
    """Return results and gradients of the public ops for tokens x, queries q and raw parameters."""
    x, q, params = (t.detach().clone().requires_grad_() for t in (x, q, params))
    d = q.shape[3]
    h = q.flatten(2)
    weight = h[0, :1].detach().expand(params.shape[2], -1) / 8
    angles = torch.zeros_like(q[0, :, 0, : d // 2]).detach()
    options = {"backend": backend}
    found = [
        *affine_flow(x, params, **options),
        affine_flow_inverse(x.detach(), params.detach(), **options),
        causal_attention(q, q, q, cos=angles, sin=angles, rotary="half", **options),
        *flow_head(x, h, weight, **options),
        *attention_flow(x, q, q, q, weight, **options),
        linear(h, weight, **options),
        bias_gelu(h, h[0, 0], **options),
        residual_norm(h, h, h[0, 0], kind="rms_norm", **options)[1],
    ]
    sum(value.sum() for value in found if value.requires_grad).backward()
    cache = torch.zeros_like(q).detach().repeat(1, 2, 1, 1)
    lengths = torch.zeros_like(cache[:, 0, 0, 0], dtype=torch.int32)
    with torch.no_grad():
        found.append(cached_attention(q, q, q, cache, cache.clone(), lengths, **options))
        for solver in SOLVERS.values():
            solved = solve_inverse(_shifted, x, solver=solver)
            found += [solved.x, solved.logdet, solved.report.sweeps]
    return [value.detach() for value in found] + [t.grad for t in (x, q, params)]


def random(*shape: int) -> torch.Tensor:
    """Return float32 normal values."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(1))


@pytest.mark.parametrize("changes", [{}, {"rotary": "half"}, {"text_dim": 5, "text_len": 3, "rotary": "half"}], ids=str)
def test_defaults_of_torch_do_not_change_a_flow(changes, hostile):
    flow, z, labels = make(**changes), random(4, 3, 8, 8), torch.tensor(LABELS)
    text = random(4, 3, 5) if "text_dim" in changes else None
    expected = flow_results(flow, z, labels, text)
    hostile()
    found = flow_results(flow, z, labels, text)
    assert len(found) == len(expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_defaults_of_torch_do_not_change_an_op(backend, hostile):
    arguments = random(2, 6, 4), random(2, 6, 2, 8), random(2, 6, 8)
    expected = op_results(*arguments, backend)
    hostile()
    found = op_results(*arguments, backend)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected))


def test_a_bundled_flow_draws_the_same_images_under_other_defaults(hostile):
    expected = Flow.from_pretrained("digits").sample(10, range(10), seed=3).images
    hostile()
    assert torch.equal(Flow.from_pretrained("digits").sample(10, range(10), seed=3).images, expected)


@pytest.mark.parametrize("changes", [{}, {"rotary": "half"}], ids=str)
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_sampling_in_inference_mode_leaves_nothing_behind(changes, quantize):
    options = {"labels": LABELS, "denoise": 1.0, "certify": True, "inversion": Inversion(quantize=quantize)}
    # No other test uses these sizes, so that no table of theirs is in the cache yet.
    size = 12 if quantize == "none" else 16
    flow = make(image_size=size, **changes)
    with torch.inference_mode():
        first = flow.sample(4, **options).images
    assert torch.equal(flow.sample(4, **options).images, first)
    flow.loss(flow(random(4, 3, size, size), LABELS)).backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


def test_denoising_in_inference_mode_takes_text():
    flow, z, text = make(text_dim=5, text_len=3, rotary="half"), random(4, 3, 8, 8), random(4, 3, 5)
    expected = flow.denoise(z, LABELS, text)
    with torch.inference_mode():
        assert torch.equal(flow.denoise(z.clone(), torch.tensor(LABELS), text.clone()), expected)


@pytest.mark.parametrize(
    "new",
    [
        lambda: Flow.from_pretrained("digits"),
        lambda: Flow(Flow.from_pretrained("digits").config),
        lambda: Flow.from_pretrained("digits", dtype=torch.float64).to(torch.float32),
    ],
    ids=["read", "made", "converted"],
)
def test_a_flow_of_inference_mode_can_be_trained(new):
    with torch.inference_mode():
        flow = new()
    flow.loss(flow(random(2, 1, 8, 8), [0, 1])).backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


@pytest.mark.parametrize(
    "labels",
    [
        list(LABELS),
        LABELS,
        range(4),
        [np.int64(i) for i in LABELS],
        np.array(LABELS, dtype=np.int16),
        np.array(LABELS, dtype=">u8"),
        torch.tensor(LABELS, dtype=torch.uint8),
        torch.tensor(LABELS, dtype=torch.uint64),
        torch.tensor(LABELS, dtype=torch.int32),
    ],
    ids=lambda labels: f"{type(labels).__name__} {getattr(labels, 'dtype', '')}",
)
def test_labels_are_integers_of_any_kind(labels):
    flow, z = make(), random(4, 3, 8, 8)
    assert torch.equal(flow.log_prob(z, labels), flow.log_prob(z, torch.tensor(LABELS)))
    assert torch.equal(flow.inverse(z, labels).x, flow.inverse(z, torch.tensor(LABELS)).x)
    assert torch.equal(flow.sample(4, labels).images, flow.sample(4, torch.tensor(LABELS)).images)


@pytest.mark.parametrize(
    "labels",
    [
        [0.0] * 4,
        [True] * 4,
        [0, 1, 2, True],
        np.zeros(4),
        np.zeros(4, bool),
        torch.zeros(4),
        torch.zeros(4).bool(),
        "0123",
        3,
        {0},
    ],
    ids=str,
)
def test_labels_that_are_no_integers_are_refused(labels):
    with pytest.raises(ValueError, match=r"^labels: expected integers of shape \(4,\), got .*$"):
        make().log_prob(random(4, 3, 8, 8), labels)


@pytest.mark.parametrize("make_labels", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("label", [2**63, 2**64 - 1])
def test_labels_beyond_int64_are_out_of_range(label, make_labels):
    dtype = np.uint64 if make_labels is np.array else torch.uint64
    with pytest.raises(ValueError, match=r"^labels: expected -1 \(no class\) \.\. 3, got "):
        make().log_prob(random(4, 3, 8, 8), make_labels([0, 1, 2, label], dtype=dtype))


def test_a_flow_made_on_the_meta_device_has_rotary_positions():
    expected = make(rotary="half")
    with torch.device("meta"):
        flow = Flow(expected.config)
        flow = flow.to_empty(device="cpu").eval()
        flow.load_state_dict(expected.state_dict())
        z = torch.zeros(4, 3, 8, 8, device="cpu")
        assert torch.equal(flow.inverse(z, LABELS).x, expected.inverse(z, LABELS).x)
