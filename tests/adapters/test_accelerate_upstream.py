"""Flows structured as the released TarFlow, STARFlow and iTARFlow code, made fast by one call."""

import copy
import pickle

import pytest
import torch
from support import released_flows as released
from torch import nn

from starflow_kernels import accelerate
from starflow_kernels.accelerate.upstream import calls, checked

D, C, T, B, CLASSES, TEXT = 3, 16, 20, 4, 5, 6
GEMMA = {"kv_heads": 1, "norm": released.RMSNorm, "extras": True, "half": True}


def tarflow(kind=released.TarFlowBlock, **options):
    return released.TarFlow([kind(D, C, T, flip=flip, layers=2, **options) for flip in (False, True)])


def starflow(**options):
    texts = 0, TEXT
    return released.StarFlow([released.StarFlowBlock(D, C, not t, layers=2, txt_dim=t, **options) for t in texts])


def shared():
    return tarflow(released.ITarFlowBlock, shared_backbone=nn.ModuleList([released.Layer(C)]))


MODELS = {
    "tarflow": tarflow,
    "tarflow of classes": lambda: tarflow(classes=CLASSES),
    "tarflow that keeps volume": lambda: tarflow(nvp=False),
    "itarflow": lambda: tarflow(released.ITarFlowBlock, classes=CLASSES),
    "itarflow with shared layers": shared,
    "starflow": starflow,
    "starflow as in Gemma": lambda: starflow(**GEMMA),
}
TARFLOWS = [name for name in MODELS if name.startswith("tarflow")]
STARFLOWS = [name for name in MODELS if name.startswith("starflow")]


def tame(model):
    """Give a model a head with which samples stay small, and norms that are not plain."""
    with torch.no_grad():
        for block in model.blocks:
            block.proj_out.weight.mul_(0.3)
            for norm in block.modules():
                if isinstance(norm, (nn.LayerNorm, released.RMSNorm)):
                    norm.weight.add_(0.1 * torch.randn_like(norm.weight))
    return model.eval()


def make(name):
    torch.manual_seed(0)
    return tame(MODELS[name]())


def pair(name):
    """A model, and its accelerated copy."""
    model = make(name)
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    assert report.accelerated and report.accelerated == report.parts, str(report)
    return model, fast


def data(name, rows=B):
    """Tokens and the condition of a model."""
    generator = torch.Generator().manual_seed(1)
    grid = (4, 5) if name in STARFLOWS else (T,)
    x = torch.randn(rows, *grid, D, generator=generator)
    if name in STARFLOWS:
        return x, (torch.randn(rows, 2, TEXT, generator=generator),)
    y = torch.arange(rows) % CLASSES if MODELS[name]().blocks[0].class_embed is not None else None
    return x, (y, torch.rand(rows, 1, generator=generator)) if name.startswith("i") else (y,)


def sample(model, name, rows=B, **options):
    x, context = data(name, rows)
    if name.startswith("i"):
        options["t"] = context[1]
        context = context[:1]
    return model.reverse(x, *context, **options)


def guidance(name):
    """Options of a guided inverse."""
    return {"guidance": 1.5} if name in STARFLOWS else {"guidance": 1.5, "attn_temp": 0.8, "annealed_guidance": True}


def originals_are_unused(monkeypatch):
    """Let the original inverses fail."""

    def fail(*args, **options):
        raise AssertionError("the original method ran")

    for kind in (released.TarFlowBlock, released.ITarFlowBlock, released.StarFlowBlock):
        monkeypatch.setattr(kind, "params", fail)


@pytest.fixture
def dense(monkeypatch):
    """Let the ops compute the density of small blocks too."""
    monkeypatch.setattr(calls, "DENSITY_FROM", 0)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_inverse_is_the_original_one(name, monkeypatch):
    model, fast = pair(name)
    expected = sample(model, name)
    originals_are_unused(monkeypatch)
    torch.testing.assert_close(sample(fast, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_guided_inverse_is_the_original_one(name, monkeypatch):
    model, fast = pair(name)
    options = guidance(name)
    if name in STARFLOWS:
        x, (text,) = data(name)
        text = torch.cat([text, torch.zeros_like(text)])
        blocks = model.blocks[-1], fast.blocks[-1]
        run = lambda block: block.reverse(x, text, **options, rope=model.rope, keep_cache=False)  # noqa: E731
    else:
        blocks = model, fast
        run = lambda model: sample(model, name, **options)  # noqa: E731
    expected = run(blocks[0])
    originals_are_unused(monkeypatch)
    torch.testing.assert_close(run(blocks[1]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("grad", [False, True])
def test_noise_and_log_determinant_are_the_original_ones(name, grad, dense):
    model, fast = pair(name)
    x, context = data(name)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(fast(x, *context), model(x, *context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_original_ones(name, dense):
    gradients = []
    for model in pair(name):
        x, context = data(name)
        z, *_, logdet = model.train()(x.requires_grad_(), *context)
        loss = z.square().mean() - sum(value.mean() for value in logdet)
        gradients.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_dropped_classes_are_those_of_the_original(dense):
    model, fast = pair("tarflow of classes")
    x, _ = data("tarflow")
    y = torch.tensor([0, -1, 3, -1])
    torch.testing.assert_close(fast(x, y), model(x, y), rtol=1e-5, atol=1e-5)


def test_the_noise_is_kept():
    _, fast = pair("tarflow")
    z, _ = data("tarflow")
    given = z.clone()
    fast.reverse(z)
    assert torch.equal(z, given)


@torch.no_grad()
def test_the_first_tokens_alone_are_those_of_the_original():
    model, fast = pair("tarflow")
    z = data("tarflow")[0][:, :7]
    for block, original in zip(fast.blocks, model.blocks):
        torch.testing.assert_close(block.reverse(z), original.reverse(z), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"guide_what": "a"}, {"guide_what": "b"}, {"guide_what": ""}])
def test_guidance_of_one_parameter_is_that_of_the_original(options):
    model, fast = pair("tarflow of classes")
    found, expected = (sample(each, "tarflow of classes", guidance=1.5, **options) for each in (fast, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, B])
def test_guidance_of_itarflow_in_the_style_of_starflow(rows):
    model, fast = pair("itarflow")
    found, expected = (sample(each, "itarflow", rows, guidance=1.5, lerp_style="starflow") for each in (fast, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_noise_that_is_not_finite_gives_what_the_original_gives():
    model, fast = pair("tarflow")
    z, _ = data("tarflow")
    z[0, 3] = torch.nan
    found, expected = fast.reverse(z), model.reverse(z)
    assert expected.isnan().any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["tarflow of classes", "starflow"])
@torch.no_grad()
def test_samples_follow_the_weights(name):
    model, fast = pair(name)
    sample(fast, name)
    for each in (model, fast):
        for p in each.parameters():
            p.mul_(1.01)
    torch.testing.assert_close(sample(fast, name), sample(model, name), rtol=1e-5, atol=1e-5)


def test_samples_have_gradients():
    model, fast = pair("tarflow")
    z, _ = data("tarflow")
    x = fast.reverse(z)
    (gradient,) = torch.autograd.grad(x.square().sum(), fast.blocks[0].proj_in.weight)
    weight, direction = model.blocks[0].proj_in.weight, torch.randn(C, D)
    losses = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            weight.add_(step * direction)
            losses.append(model.reverse(z).double().square().sum())
    assert (gradient * direction).sum().item() == pytest.approx((losses[0] - losses[1]).item() / 2e-3, rel=1e-2)


@torch.no_grad()
def test_a_cache_of_the_caller_is_filled():
    _, fast = pair("starflow")
    caches = [released.Cache() for _ in fast.blocks]
    sample(fast, "starflow", kv_caches=caches)
    assert all(cache.filled == T for cache in caches)


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
@torch.no_grad()
def test_float64_is_computed_by_the_original(name):
    model, fast = (each.double() for each in pair(name))
    x, context = data(name)
    context = tuple(value if value is None else value.double() for value in context)
    assert torch.equal(fast.reverse(x.double(), *context), model.reverse(x.double(), *context))


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
@torch.no_grad()
def test_autocast_has_the_error_of_its_dtype(name, dense):
    model, fast = pair(name)
    x, context = data(name)
    with torch.autocast("cpu", torch.bfloat16):
        found, noise = sample(fast, name), fast(x, *context)[0]
    assert found.dtype == noise.dtype == torch.float32
    torch.testing.assert_close(found, sample(model, name), rtol=0.1, atol=0.1)
    torch.testing.assert_close(noise, model(x, *context)[0], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_hooks_on_the_parts_of_a_block_run(dense):
    _, fast = pair("tarflow")
    ran = []
    fast.blocks[0].attn_blocks[0].mlp.register_forward_hook(lambda *args: ran.append("mlp"))
    fast(*data("tarflow")[:1])
    assert ran == ["mlp"]


@torch.no_grad()
def test_a_layer_that_is_replaced_later_takes_part(dense):
    models = pair("tarflow")
    for model in models:
        layer = model.blocks[0].attn_blocks[0].attention.qkv
        model.blocks[0].attn_blocks[0].attention.qkv = adapted = Adapted(layer.in_features, layer.out_features)
        adapted.load_state_dict(layer.state_dict())
    x, _ = data("tarflow")
    expected, found = ((model(x)[0], model.reverse(x)) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class HalfAttention(released.Attention):
    def forward(self, *arguments):
        return 0.5 * super().forward(*arguments)


@torch.no_grad()
def test_an_attention_that_is_exchanged_in_a_single_layer_takes_part(dense):
    model = tame(released.TarFlow([released.TarFlowBlock(D, C, T, flip=False)]))
    fast = copy.deepcopy(model)
    accelerate(fast)
    for each in (model, fast):
        each.blocks[0].attn_blocks[0].attention.__class__ = HalfAttention
    x, _ = data("tarflow")
    expected, found = ((each(x)[0], each.reverse(x)) for each in (model, fast))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_loaded_block_is_fast_without_another_call(monkeypatch):
    _, fast = pair("tarflow")
    monkeypatch.setattr(checked, "_agreed", set())
    loaded = pickle.loads(pickle.dumps(fast))
    x, _ = data("tarflow")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loaded.reverse(x)
        originals_are_unused(monkeypatch)
        loaded.reverse(x)


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
def test_noise_may_be_changed_in_place_before_the_gradient(name, dense):
    x, context = data(name)
    results = []
    for model in pair(name):
        noise, *_, logdet = model(x, *context)
        noise *= 2
        loss = noise.square().sum() + sum(part.sum() for part in logdet)
        results.append(torch.autograd.grad(loss, model.blocks[0].proj_in.weight))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
def test_the_surrounding_model_compiles(name, dense):
    model, fast = pair(name)
    x, context = data(name)
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *context), model(x, *context), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tarflow", "starflow"])
@torch.no_grad()
def test_a_compiled_model_calls_the_inverse_between_graphs(name, monkeypatch):
    model, fast = pair(name)
    expected = 2 * sample(model, name)
    originals_are_unused(monkeypatch)
    compiled = torch.compile(lambda: 2 * sample(fast, name), backend="eager")
    torch.testing.assert_close(compiled(), expected, rtol=1e-5, atol=1e-5)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OtherGELU(released.MLP):
    def forward(self, x):
        up, _, down = self.main
        return down(nn.functional.gelu(up(self.norm(x)), approximate="tanh"))


class Doubled(released.TarFlowBlock):
    def guide(self, *arguments):
        a, b = super().guide(*arguments)
        return a, 2 * b


class Plain(released.TarFlowBlock):
    """Block without guidance, with an option of its own."""

    def forward(self, x):
        return super().forward(x)

    def reverse(self, x, scale=1.0):
        return scale * super().reverse(x)


@torch.no_grad()
def test_a_block_may_have_other_options():
    fast = tame(tarflow(Plain))
    model = copy.deepcopy(fast)
    assert accelerate(fast).accelerated
    z, _ = data("tarflow")
    torch.testing.assert_close(fast.reverse(z), model.reverse(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast.reverse(z, scale=2.0), model.reverse(z, scale=2.0), rtol=1e-5, atol=1e-5)


def with_part(name, part):
    """A TarFlow with another part in one layer."""
    model = make("tarflow")
    owner, _, leaf = name.rpartition(".")
    setattr(model.blocks[1].attn_blocks[1].get_submodule(owner), leaf, part)
    return model


def with_formula():
    """A TarFlow with another MLP in all layers of a block."""
    model = make("tarflow")
    for layer in model.blocks[1].attn_blocks:
        layer.mlp = OtherGELU(C)
    return model


LEFT_ALONE = {
    "another activation": (lambda: with_part("mlp.main.1", nn.ReLU()), "another activation"),
    "another formula": (with_formula, "differs from the original"),
    "another formula of a layer": (lambda: with_part("mlp", OtherGELU(C)), "its layers differ"),
    "another rule of guidance": (lambda: tarflow(Doubled, classes=CLASSES), "guided inverse differs"),
    "another linear layer": (lambda: with_part("attention.proj", Adapted(C, C)), "proj is no torch.nn.Linear"),
    "a linear layer without bias": (lambda: with_part("mlp.main.2", nn.Linear(4 * C, C, bias=False)), "has no bias"),
    "attention of another scale": (lambda: with_part("attention.sqrt_scale", 1.0), "scaled in another way"),
    "another norm": (lambda: with_part("mlp.norm", nn.LayerNorm(C, eps=1e-3)), "mlp.norm is no norm"),
    "a layer with more weights": (lambda: with_part("extra", nn.Linear(C, C)), "extra has parameters"),
    "a dropout": (lambda: with_part("mlp.main.3", nn.Dropout(0.1)), "drops values"),
    "attention that is not causal": (lambda: with_part("attention.non_causal", True), "not causal"),
    "layers that differ": (lambda: with_part("attention", released.Attention(C, 4)), "layers differ"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_a_block_of_another_structure_is_left_alone(case):
    make_model, reason = LEFT_ALONE[case]
    model = make_model()
    part = accelerate(model).parts[1]
    assert part.method is None and reason in part.reason
    assert type(model.blocks[1]) in (released.TarFlowBlock, Doubled)


def test_a_head_of_zeros_hides_no_difference():
    model = with_formula()
    nn.init.zeros_(model.blocks[1].proj_out.weight)
    assert "differs from the original" in accelerate(model).parts[1].reason
