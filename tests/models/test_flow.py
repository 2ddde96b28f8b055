"""The model: every variant inverts, counts its volume right, guides and denoises."""

import math
import re

import numpy as np
import pytest
import torch
from support.backends import needs_native

from starflow import ConfigError, Flow, FlowConfig, Guidance, InverseError, open_model
from starflow.evaluation.metrics import logdet_error
from starflow.models.certificate import certificate
from starflow.models.tokens import patchify, rotary_angles, unpatchify
from starflow_kernels import Solver
from starflow_kernels.block import native_stack

SMALL = {"image_size": 4, "image_channels": 2, "patch_size": 2, "channels": 16, "layers": (1, 2, 1), "head_dim": 8}
STARFLOW = {
    "scale": "softplus",
    "soft_clip": 4.0,
    "start": True,
    "rotary": "interleaved",
    "patch_order": "hwc",
    "final_norm": True,
    "sequence_order": "L2R",
    "condition_blocks": "last",
}
VARIANTS = {
    "tarflow": {},
    "tarflow-classes": {"num_classes": 3},
    "volume-preserving": {"scale": "unit", "num_classes": 3},
    "starflow": STARFLOW,
    "starflow-classes": {**STARFLOW, "num_classes": 3},
    "starflow-text": {**STARFLOW, "text_dim": 5, "text_len": 3, "last_channels": 32},
    "starflow-text-everywhere": {**STARFLOW, "text_dim": 5, "text_len": 3, "condition_blocks": "all"},
    "options": {
        **STARFLOW,
        "rotary": "half",
        "norm": "rms_norm",
        "mlp": "swiglu",
        "kv_heads": 1,
        "qk_norm": True,
        "post_norm": True,
        "bias": False,
    },
}


def make(name: str = "tarflow", **changes) -> Flow:
    """A flow in float64 with every weight random, so that no part of it is the identity; heads stay tame."""
    torch.manual_seed(0)
    flow = Flow(FlowConfig(**{**SMALL, **VARIANTS[name], **changes})).double()
    for name, parameter in flow.named_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.04 if "proj_out" in name else 0.15)
    return flow


def inputs(flow: Flow, batch: int = 3):
    """Images, labels and text that the flow takes."""
    config = flow.config
    x = torch.randn(batch, config.image_channels, config.image_size, config.image_size, dtype=torch.float64)
    labels = torch.arange(batch) % 4 - 1 if config.num_classes else None
    text = torch.randn(batch, config.text_len, config.text_dim, dtype=torch.float64) if config.text_dim else None
    return x, labels, text


@pytest.mark.parametrize("name", VARIANTS)
def test_inverse_and_log_determinant(name):
    flow = make(name)
    x, labels, text = inputs(flow)
    before = x.clone()
    with torch.no_grad():
        z, logdet, latents = flow(x, labels, text)
        assert (flow.inverse(z, labels, text).x - x).abs().max() < 1e-9
        noise = torch.randn_like(x)
        assert (flow(flow.inverse(noise, labels, text).x, labels, text).z - noise).abs().max() < 1e-9
    assert torch.equal(x, before) and len(latents) == len(flow.blocks)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, labels, text).z, x)
    for i in range(len(x)):
        own = jacobian[i, :, :, :, i].reshape(x[0].numel(), -1)
        assert abs(torch.linalg.slogdet(own).logabsdet - logdet[i]) < 1e-9
    if flow.config.scale == "unit":
        assert torch.equal(logdet, torch.zeros_like(logdet))
    else:
        assert logdet.abs().max() > 1e-2
    if text is None:
        label = None if labels is None else 1
        assert logdet_error(flow, x[0], label, chunk=5) < 1e-9


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name):
    flow = make(name)
    x, labels, text = inputs(flow)
    flow.loss(flow(x, labels, text), latent_penalty=1e-2).backward()
    silent = [n for n, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_identity_at_the_start():
    flow = Flow(FlowConfig(**{**SMALL, **STARFLOW}))
    x = torch.randn(2, 2, 4, 4)
    z, logdet, _ = flow(x)
    torch.testing.assert_close(z, x, atol=1e-6, rtol=0)
    torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-5, rtol=0)


def test_repr_names_the_size():
    flow = make("tarflow", layers=(1, 2), last_channels=32)
    text = repr(flow)
    assert text.startswith("Flow(2 blocks of 1, 2 layers, width 16, last 32, 4 tokens of 8 values, ")
    assert text.endswith(f"{sum(p.numel() for p in flow.parameters()):,} parameters)")
    assert repr(make("tarflow", layers=(1, 1))).startswith("Flow(2 blocks of 1 layer, width 16, ")
    assert repr(make("tarflow", layers=(2, 2))).startswith("Flow(2 blocks of 2 layers, width 16, ")


def test_loss_is_the_negative_log_likelihood():
    flow = make("starflow")
    x, _, _ = inputs(flow)
    output = flow(x)
    expected = -torch.distributions.Normal(0, 1).log_prob(output.z).sum((1, 2, 3)) - output.logdet
    torch.testing.assert_close(-flow.log_prob(x), expected)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(flow.loss(output), expected.mean() / x[0].numel() - constant)
    inner = sum(latent.square().mean() for latent in output.latents[:-1])
    torch.testing.assert_close(flow.loss(output, 0.5), flow.loss(output) + 0.5 * inner)


def test_volume_preserving_prior_follows_the_latents():
    flow = make("volume-preserving")
    z = 3 * torch.randn(500, 4, 8, dtype=torch.float64)
    for _ in range(60):
        flow.update_prior(z)
    torch.testing.assert_close(flow.prior_variance, z.square().mean(0), rtol=0.02, atol=0)
    assert flow.noise(4000).std() == pytest.approx(3, rel=0.05)
    x, labels, _ = inputs(flow)
    prior = torch.distributions.Normal(0, flow.prior_variance.sqrt())
    torch.testing.assert_close(flow.log_prob(x, labels), prior.log_prob(flow(x, labels).latents[-1]).sum((1, 2)))


@pytest.mark.parametrize("rule", ["tarflow", "starflow"])
@pytest.mark.parametrize("name", ["tarflow-classes", "starflow-classes", "starflow-text"])
def test_guidance(name, rule):
    flow = make(name)
    z, labels, text = inputs(flow)
    labels = None if labels is None else labels.clamp(min=0)
    empty = None if text is None else torch.zeros_like(text[:1])
    plain = flow.inverse(z, labels, text).x
    weak = flow.inverse(z, labels, text, Guidance(1e-9, rule), empty).x
    torch.testing.assert_close(weak, plain, atol=1e-6, rtol=0)
    strong = flow.inverse(z, labels, text, Guidance(2.0, rule), empty).x
    annealed = flow.inverse(z, labels, text, Guidance(2.0, rule, annealed=True), empty).x
    assert (strong - plain).abs().max() > 1e-2 and (strong - annealed).abs().max() > 1e-3
    if labels is not None:
        no_class = flow.inverse(z, torch.full_like(labels, -1), None).x
        torch.testing.assert_close(
            flow.inverse(z, torch.full_like(labels, -1), None, Guidance(2.0, rule)).x, no_class, atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("rule", ["tarflow", "starflow"])
@pytest.mark.parametrize("name", ["tarflow-classes", "volume-preserving", "starflow-classes", "starflow-text"])
def test_certificate_of_guided_samples(name, rule, annealed):
    flow = make(name)
    z, labels, text = inputs(flow)
    empty = None if text is None else torch.zeros_like(text[:1])
    for guidance in (Guidance(), Guidance(1.5, rule, annealed)):
        x = flow.inverse(z, labels, text, guidance, empty).x
        assert certificate(flow, x, z, labels, text, guidance, empty).max < 1e-9
        moved = x + 1e-3 * torch.eye(4, dtype=x.dtype)
        error = certificate(flow, moved, z, labels, text, guidance, empty)
        assert error.max > 1e-5 and 1e-6 < error.mean < error.max
    if name == "tarflow-classes":
        assert certificate(flow, x, z, labels, text, Guidance(1.5, rule, temperature=2.0)) is None


def test_progress_and_what_a_block_made():
    flow = make("tarflow-classes")
    z, labels, _ = inputs(flow)
    seen, blocks = [], []

    def watch(block, x):
        blocks.append(block)
        return x if block else torch.zeros_like(x)

    x = flow.inverse(z, labels, progress=lambda *counts: seen.append(counts), after_block=watch).x
    assert blocks == [2, 1, 0] and not x.any()
    assert seen == sorted(seen) and seen[-1] == (3 * 3 * 4, 3 * 3 * 4)


@pytest.mark.parametrize("name", ["tarflow", "volume-preserving", "starflow-text"])
def test_the_logdet_of_samples_is_that_of_their_density(name):
    flow = make(name)
    z, labels, text = inputs(flow)
    found = flow.inverse(z, labels, text)
    torch.testing.assert_close(found.logdet, -flow(found.x, labels, text).logdet, atol=1e-8, rtol=0)
    moved = found.to(torch.float32)
    assert moved.x.dtype == moved.logdet.dtype == torch.float32 and len(moved.reports) == len(flow.blocks)


@pytest.mark.parametrize("rule", ["none", "tarflow", "starflow"])
@pytest.mark.parametrize("name", ["tarflow", "volume-preserving", "starflow-classes", "starflow-text"])
def test_every_solver_gives_the_same_data(name, rule):
    flow = make(name)
    z, labels, text = inputs(flow)
    empty, tokens = None if text is None else torch.zeros_like(text[:1]), 4
    guidance = Guidance() if rule == "none" or name == "tarflow" else Guidance(1.5, rule, annealed=True)
    given = labels, text, guidance, empty
    found = flow.inverse(z, *given)
    expected, plain = found.x, found.reports
    mixed = [Solver(), Solver("jacobi", window=2, tol=1e-12), Solver("jacobi", tol=1e-12, neighbours=(1, 2))]
    for solvers in (Solver("jacobi", tol=0), Solver("jacobi", window=3, slide=False, guess="zero", tol=1e-12), mixed):
        seen = []
        found = flow.inverse(z, *given, solvers=solvers, progress=lambda *counts, seen=seen: seen.append(counts))
        x, reports = found.x, found.reports
        torch.testing.assert_close(x, expected, atol=1e-9, rtol=0)
        wanted = [solver.method for solver in mixed] if solvers is mixed else ["jacobi"] * 3
        assert [report.method for report in reports] == wanted
        assert seen == sorted(seen) and seen[-1] == (3 * 3 * tokens, 3 * 3 * tokens)
        for report, sequential in zip(reports, plain):
            # Relative to values above 1, of which blocks inside the flow may have larger ones than x.
            assert report.passes <= sequential.passes + 1 and report.tokens > 0 and report.fallbacks == 0
            assert report.sweeps.shape == (3, tokens) and report.residual <= 1e-11


def test_solvers_are_one_a_block():
    flow = make()
    with pytest.raises(ValueError, match="solvers: 2 of them for 3 blocks"):
        flow.inverse(inputs(flow)[0], solvers=[Solver()] * 2)
    for solvers in ("jacobi", [1] * 3, None):
        with pytest.raises(TypeError, match="solvers: expected a Solver, or one per block, got "):
            flow.inverse(inputs(flow)[0], solvers=solvers)


@needs_native
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_blocks_are_inverted_in_one_call_unless_something_happens_between_them(weight, monkeypatch):
    flow = make("starflow-classes").float().requires_grad_(False)
    z, labels = torch.randn(3, 2, 4, 4), torch.tensor([0, 2, -1])
    options, made, run = {"guidance": Guidance(weight)}, [], native_stack.stack_inverse
    monkeypatch.setattr(native_stack, "stack_inverse", lambda *given: made.append(run(*given)) or made[-1])
    found = flow.inverse(z, labels, **options)
    assert len(made) == 1
    for between in ({"progress": lambda done, total: None}, {"after_block": lambda block, x: x}):
        other = flow.inverse(z, labels, **options, **between)
        assert torch.equal(other.x, found.x)
        assert torch.equal(other.logdet, found.logdet)
    hook = flow.blocks[1].layers.register_forward_pre_hook(lambda module, given: None)
    assert torch.equal(flow.inverse(z, labels, **options).x, found.x)
    assert len(made) == 1
    hook.remove()
    flow.inverse(z, labels, **options)
    assert len(made) == 2


@pytest.mark.parametrize("option", [{"backend": "cuda9"}, {"quantize": "int4"}], ids=repr)
def test_a_wrong_option_of_a_block_is_no_fault_of_the_noise(option):
    flow = make()
    with pytest.raises(ValueError, match=f"^{next(iter(option))}=") as error:
        flow.inverse(inputs(flow)[0], **option)
    assert not isinstance(error.value, InverseError)


@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi", window=2)])
def test_data_that_are_not_finite_name_their_block(solver):
    flow = make(layers=(1, 1))
    z, _, _ = inputs(flow)
    for i, block in enumerate(flow.blocks):
        proj = block.weights()["proj_out.bias"]
        proj.data[:8] += 800
        with pytest.raises(InverseError, match=rf"^block {i}: .*not finite at token 1 of sample 0"):
            flow.inverse(z, solvers=solver)
        proj.data[:8] -= 800

    with pytest.raises(InverseError, match=r"^block 1: z: 32 of 32 values are not finite"):
        flow.inverse(z[:1] * float("nan"), solvers=solver)

    def stop(done, total):
        raise ConfigError("mine")

    with pytest.raises(ConfigError, match=r"^mine$"):
        make().inverse(z, solvers=solver, progress=stop)


@pytest.mark.parametrize("name", ["tarflow-classes", "volume-preserving", "starflow-text"])
def test_gradients_of_the_inverse(name):
    flow = make(name)
    z, labels, text = inputs(flow)
    targets = [z.requires_grad_(), flow.blocks[1].proj_in.weight]
    targets += [] if text is None else [text.requires_grad_()]

    def value():
        found = flow.inverse(z, labels, text)
        return found.x.square().sum() + (found.logdet**2).sum()

    for target, gradient in zip(targets, torch.autograd.grad(value(), targets)):
        step = 1e-6 * torch.randn_like(target)
        values = []
        with torch.no_grad():
            for distance in (1, -2):
                target.add_(step, alpha=distance)
                values.append(value())
            target.add_(step)
        torch.testing.assert_close((gradient * step).sum(), (values[0] - values[1]) / 2, rtol=1e-5, atol=1e-12)


def test_an_inverse_without_a_gradient_refuses_inputs_that_need_one():
    flow = make("tarflow-classes")
    z, labels, _ = inputs(flow)
    for options in ({"guidance": Guidance(1.0)}, {"quantize": "int8"}):
        assert not flow.inverse(z, labels, **options).x.requires_grad
        with pytest.raises(ValueError, match=r"^z, text, empty_text: the inverse has no gradient under guidance"):
            flow.inverse(z.clone().requires_grad_(), labels, **options)
    with torch.no_grad():
        assert not flow.inverse(z.clone().requires_grad_(), labels).x.requires_grad
    assert flow.inverse(z, labels).x.requires_grad


def test_annealed_weights_end_at_the_full_weight():
    device = torch.device("cpu")
    ramp = Guidance(3.0, annealed=True)
    assert ramp.weights(4, False, device).tolist() == [0, 1, 2, 3]
    assert ramp.weights(3, True, device).tolist() == [1, 2, 3]
    assert ramp.weights(1, False, device).tolist() == [0]


def test_guidance_without_a_condition_needs_a_temperature():
    flow = make("tarflow")
    z, _, _ = inputs(flow)
    with pytest.raises(ValueError, match="attention temperature"):
        flow.inverse(z, guidance=Guidance(1.0))
    guided = flow.inverse(z, guidance=Guidance(1.0, temperature=1.5)).x
    assert (guided - flow.inverse(z).x).abs().max() > 1e-4


def test_denoise_is_a_step_along_the_score():
    flow = make("tarflow-classes", noise_std=0.1)
    x, labels, _ = inputs(flow, batch=2)
    step = flow.denoise(x, labels, factor=1.0) - x
    direction = torch.randn_like(x)
    h = 1e-6
    slope = (flow.log_prob(x + h * direction, labels) - flow.log_prob(x - h * direction, labels)) / (2 * h)
    torch.testing.assert_close((step * direction).sum((1, 2, 3)), 0.01 * slope, rtol=1e-6, atol=1e-9)


def test_rotary_models_take_other_sizes():
    flow = make("starflow-text")
    x = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    text = torch.randn(2, 3, 5, dtype=torch.float64)
    assert (flow.inverse(flow(x, text=text).z, text=text).x - x).abs().max() < 1e-9


def test_bfloat16_weights_keep_a_float32_state():
    flow = make("starflow-classes").float()
    z = torch.randn(2, 2, 4, 4)
    labels = torch.tensor([0, 2])
    exact = flow.inverse(z, labels).x
    x = flow.bfloat16().inverse(z, labels).x
    assert x.dtype == torch.float32
    assert (x - exact).abs().max() < 0.1
    assert flow(z, labels).logdet.dtype == torch.float32


@pytest.mark.parametrize("order", ["chw", "hwc"])
def test_patch_order(order):
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = patchify(images, 2, order)
    patch = images[1, :, 2:4, 4:6]
    assert torch.equal(tokens[1, -1], (patch if order == "chw" else patch.permute(1, 2, 0)).flatten())
    assert torch.equal(unpatchify(tokens, (2, 3), 2, order), images)


def test_rotary_angles_of_the_released_text_model():
    angles = rotary_angles((4, 4), head_dim=64, size=4, text_len=5, text_axis=True)
    assert angles.shape == (21, 32)
    row, column, text = angles.split([12, 12, 8], dim=1)
    j = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(row[5 + 9], 2 * 10000 ** (-2 * j / 24))
    torch.testing.assert_close(column[5 + 9], 1 * 10000 ** (-2 * j / 24))
    torch.testing.assert_close(text[3], 3 * 4 / 5 * 10000 ** (-torch.arange(8, dtype=torch.float64) / 8))
    assert not row[:5].any() and not column[:5].any() and not text[5:].any()
    wide = rotary_angles((24, 40), head_dim=64, size=32)
    assert wide.shape == (960, 32) and wide[40 * 23, 0].item() == 23 * (32 / math.sqrt(960))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(1, 3, 4, 4)}, "images"),
        ({"x": torch.zeros(1, 2, 4, 6)}, "4x6"),
        ({"x": torch.zeros(1, 2, 4, 4), "labels": torch.tensor([3])}, "labels"),
        ({"x": torch.zeros(1, 2, 4, 4), "labels": torch.tensor([0, 0])}, r"labels: expected integers of shape \(1,\)"),
        ({"x": torch.zeros(1, 2, 4, 4), "labels": [0.5]}, r"labels: .* got list \[0.5\]"),
        ({"x": torch.zeros(1, 2, 4, 4), "labels": torch.zeros(1)}, r"labels: .* got torch.float32 \(1,\)"),
        ({"x": torch.zeros(1, 2, 4, 4), "labels": torch.zeros(1, 1).long()}, r"labels: .* got torch.int64 \(1, 1\)"),
        ({"x": torch.zeros(1, 2, 4, 4, dtype=torch.uint8)}, r"images: .* got torch.uint8; scale pixels to \[-1, 1\]"),
        ({"x": torch.zeros(1, 2, 4, 4), "text": torch.zeros(1, 3, 5)}, "text"),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Flow(FlowConfig(**SMALL, num_classes=3))(**arguments)


@pytest.mark.parametrize("method", ["log_prob", "inverse", "denoise"])
def test_inputs_that_are_no_batch_of_images_are_named(method):
    run = getattr(Flow(FlowConfig(**SMALL, num_classes=3)), method)
    for x in (torch.zeros(2, 4, 4), torch.zeros(1, 4), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"^images: expected shape \(B, 2, H, W\), got "):
            run(x, torch.tensor([0]))
    for x in (np.zeros((1, 2, 4, 4)), [0.0], None):
        with pytest.raises(TypeError, match=r"^images: expected a tensor, got "):
            run(x, torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [0, 1, True]}, r"labels: .* got list \[0, 1, True\]"),
        ({"labels": torch.tensor([0, 1])}, r"labels: expected integers of shape \(3,\), got torch.int64 \(2,\)"),
        ({"labels": torch.zeros(3)}, "labels: .* got torch.float32"),
        ({"labels": torch.tensor([0, 1, 3])}, "labels: expected -1 .no class. .. 2"),
        ({"denoise": 1.0}, "denoise=1.0: the model was not trained with Gaussian noise"),
        ({"count": 0}, "count=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"count": True}, "count=True"),
        ({"batch_size": np.bool_(True)}, "batch_size=True"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": 2**70}, r"batch_size=\d+: expected an integer of at least 1, below 2\^63"),
    ],
)
def test_wrong_arguments_of_sample_are_named(arguments, message):
    flow = Flow(FlowConfig(**{**SMALL, "image_channels": 1}, num_classes=3))
    with pytest.raises(ValueError, match=message):
        flow.sample(**{"count": 3, "batch_size": 2, **arguments})


@pytest.mark.parametrize("number", [np.int64, torch.tensor])
def test_counts_of_numpy_and_torch_are_counts(number):
    flow = Flow(FlowConfig(**{**SMALL, "image_channels": 1}))
    assert torch.equal(flow.sample(number(3), batch_size=number(2)).images, flow.sample(3, batch_size=2).images)


@pytest.mark.parametrize("arguments", [(-1,), (True,), (1, None, 4), (1, None, (0, 4)), (1, None, (2.0, 2))], ids=repr)
def test_wrong_arguments_of_noise_are_named(arguments):
    with pytest.raises(ConfigError, match=r"^(count|grid)"):
        Flow(FlowConfig(**SMALL)).noise(*arguments)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, "float32"], ids=str)
def test_weights_have_a_floating_dtype(dtype):
    for opened in (Flow.from_pretrained, open_model):
        with pytest.raises(ConfigError, match=r"^dtype=.*: expected one of torch\.float16"):
            opened("digits", dtype=dtype)


def test_a_report_prints_as_text():
    flow = Flow(FlowConfig(**{**SMALL, "image_channels": 1}))
    text = str(flow.sample(3, certify=True).report)
    assert re.fullmatch(r"3 images in \d+\.\d\d s \(\S+ per second\)\ncertificate: max .flow.* = \S+, mean \S+", text)


def test_non_finite_noise_is_refused():
    flow = make().float()
    with pytest.raises(ValueError, match="not finite"):
        flow.inverse(torch.full((1, 2, 4, 4), float("nan")))


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi")])
def test_an_exception_of_a_callback_comes_out_unchanged(backend, solver):
    flow, own = Flow.from_pretrained("digits"), ValueError("mine")

    def progress(done, total):
        raise own

    with pytest.raises(ValueError) as error:
        flow.inverse(flow.noise(4), torch.arange(4), backend=backend, solvers=solver, progress=progress)
    assert error.value is own


def test_a_callback_after_a_block_that_returns_nothing():
    flow = Flow.from_pretrained("digits")
    with pytest.raises(TypeError, match="after_block: expected it to return images, got NoneType"):
        flow.inverse(flow.noise(2), torch.arange(2), after_block=lambda block, x: None)
