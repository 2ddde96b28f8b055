"""Flows of zuko made fast by one call."""

import copy
import io
import pickle

import pytest
import torch
from support.backends import needs_native

from starflow_kernels import accelerate, restore
from starflow_kernels.accelerate import columns
from starflow_kernels.accelerate.zuko import FastTransform

zuko = pytest.importorskip("zuko")
D, C = 7, 3

FLOWS = {
    "maf": lambda: zuko.flows.MAF(D, C, transforms=3, randperm=True),
    "maf of residual networks": lambda: zuko.flows.MAF(D, C, transforms=2, residual=True),
    "nsf": lambda: zuko.flows.NSF(D, C, transforms=3),
    "sums of squares": lambda: zuko.flows.SOSPF(D, C, transforms=2),
    "circular splines": lambda: zuko.flows.NCSF(D, C, transforms=2),
    "monotonic networks": lambda: zuko.flows.NAF(D, C, transforms=2),
    "bernstein": lambda: zuko.flows.BPF(D, C, transforms=2),
    "graph": lambda: zuko.flows.Flow(
        [zuko.flows.MaskedAutoregressiveTransform(D, C, adjacency=chains())],
        zuko.flows.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(D), torch.ones(D), buffer=True),
    ),
}
SMOOTH = ["maf", "maf of residual networks", "nsf", "graph"]


def chains():
    """A graph in which each value depends on the one two places after it."""
    return torch.eye(D, dtype=torch.bool) | torch.diag(torch.ones(D - 2, dtype=torch.bool), 2)


def make(name, dtype=torch.float64):
    torch.manual_seed(0)
    flow = FLOWS[name]().to(dtype)
    for p in flow.parameters():
        # Residual networks grow with their weights.
        p.data.mul_(1.0 if "residual" in name else 2.0)
    return flow


def pair(name, dtype=torch.float64):
    """A flow, and its accelerated copy."""
    flow = make(name, dtype)
    fast = copy.deepcopy(flow)
    report = accelerate(fast)
    assert report.accelerated and report.accelerated == report.parts
    return flow, fast


def inputs(dtype=torch.float64, rows=5):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(rows, size, generator=generator).to(dtype) for size in (D, C))


@pytest.mark.parametrize("name", FLOWS)
def test_the_inverse_is_that_of_the_library(name):
    flow, fast = pair(name)
    z, c = inputs()
    torch.testing.assert_close(fast(c).transform.inv(z), flow(c).transform.inv(z), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("name", FLOWS)
def test_float32(name):
    flow, fast = pair(name, torch.float32)
    z, c = inputs(torch.float32)
    torch.testing.assert_close(fast(c).transform.inv(z), flow(c).transform.inv(z), rtol=1e-4, atol=1e-4)


def test_fewer_passes_than_values():
    passes = []
    torch.manual_seed(0)
    flow = zuko.flows.MaskedAutoregressiveTransform(32, activation=torch.nn.Mish)
    flow.hyper.register_forward_hook(lambda *_: passes.append(1))
    assert "Jacobi" in str(accelerate(flow))
    passes.clear()
    flow().inv(torch.randn(10, 32))
    assert 2 <= len(passes) < 16


@needs_native
@pytest.mark.parametrize("name", SMOOTH)
def test_no_pass_of_known_networks(name, monkeypatch):
    flow, fast = pair(name)
    z, c = inputs()
    expected = flow(c).transform.inv(z)
    monkeypatch.setattr(zuko.nn.MaskedMLP, "forward", None)
    with torch.no_grad():
        torch.testing.assert_close(fast(c).transform.inv(z), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMOOTH)
def test_without_the_compiled_kernel(name, monkeypatch):
    monkeypatch.setattr(columns, "native_unavailable", lambda: "not here")
    flow, fast = pair(name)
    z, c = inputs()
    torch.testing.assert_close(fast(c).transform.inv(z), flow(c).transform.inv(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(fast, z, c), gradients(flow, z, c), rtol=1e-8, atol=1e-8)


def test_inference_mode_comes_first():
    flow, fast = pair("maf")
    z, c = inputs()
    with torch.inference_mode():
        fast(c).transform.inv(z)
    torch.testing.assert_close(gradients(fast, z, c), gradients(flow, z, c), rtol=1e-8, atol=1e-8)


def test_hooks_of_a_network_run():
    z, c = inputs()
    results = []
    for flow in pair("maf"):
        flow.transform.transforms[1].hyper[0].register_forward_hook(lambda module, inputs, output: output + 1)
        results.append(flow(c).transform.inv(z))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_mask_that_changes_later():
    flow, fast = pair("maf")
    z, c = inputs()
    for each in (flow, fast):
        for layer in each.transform.transforms[0].hyper:
            if hasattr(layer, "mask"):
                layer.mask.fill_(True)
                layer.weight.data.mul_(0.1)
    torch.testing.assert_close(fast(c).transform.inv(z), flow(c).transform.inv(z))


@pytest.mark.parametrize("batches", [((), (C,)), ((4, 2, D), (C,)), ((D,), (4, C)), ((3, 1, D), (1, 2, C))])
def test_batch_dimensions_broadcast(batches):
    flow, fast = pair("maf")
    generator = torch.Generator().manual_seed(1)
    z_shape = batches[0] or (D,)
    z, c = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (z_shape, batches[1]))
    torch.testing.assert_close(fast(c).transform.inv(z), flow(c).transform.inv(z), rtol=1e-9, atol=1e-9)


def test_without_a_context():
    torch.manual_seed(0)
    flow = zuko.flows.MAF(D, transforms=2).double()
    z = torch.randn(4, D, dtype=torch.float64)
    expected = flow().transform.inv.call_and_ladj(z)
    assert accelerate(flow).accelerated
    torch.testing.assert_close(flow().transform.inv.call_and_ladj(z), expected)


def test_no_rows():
    _, fast = pair("maf")
    z, c = inputs()
    assert fast(c[:0]).transform.inv(z[:0]).shape == fast(c[:0]).transform.inv(z[0]).shape == (0, D)


@pytest.mark.parametrize("name", FLOWS)
def test_samples_and_their_log_density(name):
    flow, fast = pair(name)
    _, c = inputs()
    results = []
    for each in (flow, fast):
        torch.manual_seed(3)
        results.append(each(c).rsample_and_log_prob((4,)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@needs_native
def test_log_density_of_samples_without_a_gradient(monkeypatch):
    results = []
    for flow in pair("nsf"):
        _, c = inputs()
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(flow(c).rsample_and_log_prob((4,)))
        monkeypatch.setattr(zuko.nn.MaskedMLP, "forward", None)
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("changed", ["weights", "context"])
@torch.no_grad()
def test_log_determinants_after_a_change(changed):
    results = []
    for flow in pair("maf"):
        z, c = inputs()
        transform = flow.transform.transforms[0](c)
        x = transform.inv(z)
        for tensor in [weight.data for weight in flow.parameters()] if changed == "weights" else [c]:
            tensor.mul_(1.5)
        results.append(transform.log_abs_det_jacobian(x, z))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_log_determinants_of_other_values():
    flow, fast = pair("maf")
    z, c = inputs()
    transform = fast.transform.transforms[0](c)
    with torch.no_grad():
        x = transform.inv(z)
        x += 1
        expected = flow.transform.transforms[0](c).log_abs_det_jacobian(x, z)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, z), expected)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x.clone(), z), expected)


def gradients(flow, z, c):
    z, c = z.clone().requires_grad_(), c.clone().requires_grad_()
    x, ladj = flow(c).transform.inv.call_and_ladj(z)
    weights = torch.arange(1, D + 1, dtype=z.dtype)
    loss = (x * weights).sin().sum() + (ladj * torch.arange(len(z))).sum()
    return torch.autograd.grad(loss, [z, c, *flow.parameters()])


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_the_library(name):
    flow, fast = pair(name)
    torch.testing.assert_close(gradients(fast, *inputs()), gradients(flow, *inputs()), rtol=1e-8, atol=1e-8)


def test_gradients_through_a_bisection():
    # Zuko's bisection stops at 1e-6.
    flow, fast = pair("sums of squares")
    torch.testing.assert_close(gradients(fast, *inputs()), gradients(flow, *inputs()), rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients_are_those_of_the_library():
    results = []
    for flow in pair("maf"):
        z, c = (t.requires_grad_() for t in inputs())
        x = flow(c).transform.inv(z)
        (first,) = torch.autograd.grad(x.square().sum(), z, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [z, c, *flow.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_jacobians_by_one_batch_of_gradients():
    results = []
    for flow in pair("maf"):
        z, c = inputs(rows=1)
        z.requires_grad_()
        x = flow(c).transform.inv(z)
        results.append(torch.autograd.grad(x, z, torch.eye(D, dtype=z.dtype)[:, None], is_grads_batched=True)[0])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_transforms_of_torch_func():
    results = []
    for flow in pair("maf"):
        z, c = inputs()
        results.append(torch.func.vmap(torch.func.jacrev(lambda z, c, f=flow: f(c).transform.inv(z)))(z, c))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_weights_of_a_functional_call():
    results = []
    for flow in pair("maf"):
        z, c = inputs()
        scale = torch.tensor(0.5, dtype=z.dtype, requires_grad=True)
        weights = {name: p.detach() * scale for name, p in flow.named_parameters()}

        class Inverse(torch.nn.Module):
            def __init__(self, flow):
                super().__init__()
                self.flow = flow

            def forward(self, z, c):
                return self.flow(c).transform.inv(z)

        weights = {f"flow.{name}": p for name, p in weights.items()}
        x = torch.func.functional_call(Inverse(flow), weights, (z, c))
        results.append(torch.autograd.grad(x.square().sum(), scale))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_training_changes_the_result():
    flow, fast = pair("maf")
    z, c = inputs()
    for each in (flow, fast):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (-each(c).log_prob(z).mean()).backward()
            optimizer.step()
    torch.testing.assert_close(fast(c).transform.inv(z), flow(c).transform.inv(z), rtol=1e-8, atol=1e-8)


def test_accelerate_twice_and_restore():
    flow = make("maf")
    classes = [type(module) for module in flow.modules()]
    first = accelerate(flow)
    fast = [type(module) for module in flow.modules()]
    assert fast != classes and accelerate(flow) == first and [type(module) for module in flow.modules()] == fast
    restore(flow)
    assert [type(module) for module in flow.modules()] == classes


def test_accelerate_again_leaves_modules_fast_for_other_threads(monkeypatch):
    _, fast = pair("maf")
    first = fast.transform.transforms[0]
    kinds, kind = [], type(first)
    monkeypatch.setattr(FastTransform, "check", classmethod(lambda cls, module: kinds.append(type(first))))
    accelerate(fast)
    assert set(kinds) == {kind} and type(first) is kind


def test_a_module_that_is_no_longer_known_is_restored():
    _, fast = pair("maf")
    first = fast.transform.transforms[0]
    first.passes = 2
    accelerate(fast)
    assert type(first) is zuko.flows.MaskedAutoregressiveTransform


def test_accelerate_in_inference_mode():
    flow = make("maf")
    with torch.inference_mode():
        report = accelerate(flow)
    assert report.accelerated == report.parts


def saved(flow):
    file = io.BytesIO()
    torch.save(flow, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_are_fast_and_have_weights_of_their_own(copied):
    flow, fast = pair("maf")
    other = copied(fast)
    fast.transform.transforms[0].hyper[0].weight.data.zero_()
    z, c = inputs()
    torch.testing.assert_close(other(c).transform.inv(z), flow(c).transform.inv(z))
    assert [type(module) for module in other.modules()] == [type(module) for module in fast.modules()]


def test_weight_files_are_those_of_the_library():
    flow, fast = pair("maf")
    assert list(fast.state_dict()) == list(flow.state_dict())
    other = make("maf")
    for p in other.parameters():
        p.data.mul_(0.5)
    fast.load_state_dict(other.state_dict())
    z, c = inputs()
    torch.testing.assert_close(fast(c).transform.inv(z), other(c).transform.inv(z))


def test_other_dtypes_after_the_call():
    flow, fast = pair("maf", torch.float32)
    flow, fast = flow.double(), fast.double()
    z, c = inputs()
    torch.testing.assert_close(fast(c).transform.inv(z), flow(c).transform.inv(z), rtol=1e-9, atol=1e-9)


def test_a_compiled_model_around_it():
    flow, fast = pair("maf")
    z, c = inputs()
    found = torch.compile(lambda z, c: 2 * fast(c).transform.inv(z + 1), backend="eager")(z, c)
    torch.testing.assert_close(found, 2 * flow(c).transform.inv(z + 1))


def test_a_module_in_two_places_is_one_part():
    transform = make("maf").transform.transforms[0]
    report = accelerate(torch.nn.ModuleList([transform, transform]))
    assert [part.name for part in report.parts] == ["0"]


def test_couplings_are_left_alone():
    model = torch.nn.ModuleList(
        [make("maf"), zuko.flows.NICE(D), zuko.flows.MaskedAutoregressiveTransform(D, passes=2)]
    )
    report = accelerate(model)
    (left,) = set(report.parts) - set(report.accelerated)
    assert left.name == "2" and "2 passes" in left.reason and left.reason in str(report)


def test_a_mask_that_is_none_is_left_alone():
    flow = make("maf").transform.transforms[0]
    for layer in flow.hyper:
        if hasattr(layer, "mask"):
            layer.mask.fill_(True)
    (part,) = accelerate(flow).parts
    assert part.method is None and "depends on value" in part.reason


def test_a_class_with_another_forward_is_left_alone():
    class Other(zuko.flows.MaskedAutoregressiveTransform):
        def forward(self, c=None):
            return torch.distributions.transforms.identity_transform

    (part,) = accelerate(Other(D)).parts
    assert part.method is None and "forward" in part.reason


def test_random_numbers_and_modes_stay():
    flow = make("maf").train()
    state = torch.get_rng_state()
    accelerate(flow)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in flow.modules())


def test_autocast_takes_the_original_loop():
    flow, fast = pair("maf", torch.float32)
    z, c = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(c).transform.inv(z), flow(c).transform.inv(z))


def test_tol_is_kept_by_copies():
    passes = []
    flow = make("sums of squares")
    z, c = inputs()
    counts = []
    for tol in (1e-1, 0.0):
        accelerate(flow, tol=tol)
        fast = copy.deepcopy(flow)
        for transform in fast.transform.transforms[::2]:
            transform.hyper.register_forward_hook(lambda *_: passes.append(1))
        fast(c).transform.inv(z)
        counts.append(len(passes))
        passes.clear()
    assert counts[0] < counts[1]


@pytest.mark.parametrize("tol", [-1.0, float("nan"), "small"])
def test_a_wrong_tol_is_refused(tol):
    with pytest.raises((TypeError, ValueError), match="tol"):
        accelerate(make("maf"), tol=tol)


def test_no_module_is_refused():
    with pytest.raises(TypeError, match="Module"):
        accelerate(make("maf")().transform)


class OwnMeta(zuko.flows.MaskedAutoregressiveTransform):
    """Transform whose parameters are those of other values."""

    def meta(self, c, x):
        return super().meta(c, x.clamp(-1, 1))


def test_a_class_with_its_own_parameters_is_left_alone():
    (part,) = accelerate(OwnMeta(D)).parts
    assert part.method is None and "meta of its own" in part.reason


def test_a_context_of_another_dtype():
    flow, fast = pair("maf", torch.float32)
    y, _ = inputs(torch.float32)
    c = torch.nn.functional.one_hot(torch.arange(5) % C, C)
    torch.testing.assert_close(fast(c).transform.inv(y), flow(c).transform.inv(y), rtol=1e-4, atol=1e-4)


def test_samples_may_be_changed_in_place():
    _, fast = pair("maf")
    y, c = inputs()
    x = fast(c).transform.inv(y)
    x *= 2.0
    x.sum().backward()
    assert all(p.grad is not None for p in fast.parameters())


def test_a_network_may_be_wrapped_and_its_activation_exchanged():
    flow, fast = pair("maf")
    y, c = inputs()
    for change in (
        lambda hyper: torch.nn.utils.parametrizations.weight_norm(hyper[0]),
        lambda hyper: hyper.__setitem__(1, torch.nn.Tanh()),
    ):
        with torch.no_grad():
            fast(c).transform.inv(y)
        change(flow.transform.transforms[0].hyper), change(fast.transform.transforms[0].hyper)
        torch.testing.assert_close(fast(c).transform.inv(y), flow(c).transform.inv(y), rtol=1e-8, atol=1e-8)
    for each in (flow, fast):
        first = each.transform.transforms[0]
        first.hyper = torch.nn.Sequential(first.hyper)
    torch.testing.assert_close(fast(c).transform.inv(y), flow(c).transform.inv(y), rtol=1e-8, atol=1e-8)


def test_a_distribution_outlives_restore():
    flow, fast = pair("maf")
    y, c = inputs()
    transform = fast(c).transform
    restore(fast)
    torch.testing.assert_close(transform.inv(y), flow(c).transform.inv(y))


def test_values_of_a_small_scale():
    """The tolerance of the iteration is relative for such, too."""
    scale = 1e-7
    torch.manual_seed(0)
    flow = zuko.flows.MAF(D, transforms=1, hidden_features=(16,), activation=torch.nn.Mish)
    hyper = flow.transform.transforms[0].hyper
    with torch.no_grad():
        hyper[0].weight.mul_(2 / scale)
        hyper[-1].weight.view(D, 2, -1)[:, 0].mul_(scale)
        hyper[-1].bias.view(D, 2)[:, 0].mul_(scale)
    fast = copy.deepcopy(flow)
    accelerate(fast)
    y = scale * torch.randn(5, D)
    torch.testing.assert_close(fast.transform().inv(y) / scale, flow.transform().inv(y) / scale, rtol=1e-5, atol=1e-5)
