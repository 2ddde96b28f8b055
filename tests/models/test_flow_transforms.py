"""A flow under torch.func, vmap and dual numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from starflow import Flow, FlowConfig
from starflow.models import tokens

F64 = torch.float64
BASE = {
    "image_size": 4,
    "image_channels": 1,
    "patch_size": 2,
    "channels": 16,
    "layers": (1, 2),
    "head_dim": 8,
    "num_classes": 3,
}
VARIANTS = {
    "tarflow": {},
    "starflow": {"scale": "softplus", "soft_clip": 4.0, "start": True, "rotary": "half", "norm": "rms_norm"},
}
LABELS = torch.tensor([0, 2, -1])


def make(name: str = "tarflow", seed: int = 0) -> Flow:
    """Return a flow in float64 whose heads are not zero."""
    torch.manual_seed(seed)
    flow = Flow(FlowConfig(**{**BASE, **VARIANTS[name]})).double()
    for parameter in flow.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return flow


@pytest.fixture(params=VARIANTS)
def flow(request):
    return make(request.param)


def images(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, 4, 4, dtype=F64)


def state(flow: Flow) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in flow.named_parameters()}


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_logdet_is_that_of_the_jacobian(flow, jacobian):
    x = images(1)
    matrix = jacobian(lambda x: flow(x, LABELS[:1]).z)(x).reshape(16, 16)
    torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, flow(x, LABELS[:1]).logdet[0])


def test_tangent_of_log_prob_is_its_gradient_along_it(flow):
    x, v = images(), images()
    score = grad(lambda x: flow.log_prob(x, LABELS).sum())(x)
    tangent = jvp(lambda x: flow.log_prob(x, LABELS), (x,), (v,))[1]
    torch.testing.assert_close(tangent, (score * v).sum((1, 2, 3)))


def test_score_is_that_of_autograd(flow):
    x = images().requires_grad_()
    (expected,) = torch.autograd.grad(flow.log_prob(x, LABELS).sum(), x)
    torch.testing.assert_close(grad(lambda x: flow.log_prob(x, LABELS).sum())(x.detach()), expected)


def test_hessian_is_that_of_autograd(flow):
    loss = lambda x: flow.log_prob(x, LABELS[:1])[0]  # noqa: E731
    x = images(1)
    torch.testing.assert_close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x))


def test_gradients_per_sample(flow):
    def loss(weights, x, label):
        return flow.loss(functional_call(flow, weights, (x[None], label[None])))

    x = images()
    found = vmap(grad(loss), in_dims=(None, 0, 0))(state(flow), x, LABELS)
    for i in range(3):
        expected = torch.autograd.grad(flow.loss(flow(x[i : i + 1], LABELS[i : i + 1])), list(flow.parameters()))
        torch.testing.assert_close([g[i] for g in found.values()], list(expected))


def test_log_prob_of_mapped_samples_and_labels(flow):
    x = images()
    found = vmap(lambda x, label: flow.log_prob(x[None], label[None])[0])(x, LABELS)
    torch.testing.assert_close(found, flow.log_prob(x, LABELS))


def test_ensemble():
    flows, x = [make(seed=seed) for seed in range(3)], images()
    weights, buffers = stack_module_state(flows)
    shell = copy.deepcopy(flows[0]).to("meta")
    found = vmap(lambda *state: functional_call(shell, state, (x, LABELS)).logdet)(weights, buffers)
    torch.testing.assert_close(found, torch.stack([flow(x, LABELS).logdet for flow in flows]))


def test_inverse_says_what_to_do(flow):
    z = images()
    for transform in (vmap(lambda z: flow.inverse(z[None], LABELS[:1]).x), jacfwd(lambda z: flow.inverse(z, LABELS).x)):
        with pytest.raises(NotImplementedError, match="block_inverse has no derivative"):
            transform(z)


def under_grad(flow, x):
    grad(lambda x: flow.log_prob(x, LABELS).sum())(x)


def under_fake_mode(flow, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        flow.log_prob(x, LABELS)


@pytest.mark.parametrize("first", [under_grad, under_fake_mode])
def test_first_call_in_a_mode_leaves_nothing_behind(first):
    tokens._cached_table.cache_clear()
    flow, x = make("starflow"), images()
    first(flow, x)
    loss = flow.log_prob(x, LABELS).sum()
    loss.backward()
    assert type(loss) is torch.Tensor and all(p.grad.isfinite().all() for p in flow.parameters())
