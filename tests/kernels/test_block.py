"""block_forward and block_inverse: a whole flow block, both directions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    angles,
    assert_same_row,
    assert_within_contract,
    compiled,
    cpu_backends,
    naive_affine,
    naive_attention,
    naive_raw,
    naive_rotate,
    naive_visible,
    reduced,
    strided,
    with_gradients,
)

from starflow_kernels import AffineSpec, BlockSpec, block_forward, block_inverse

F64 = torch.float64
T = 5
BASE = BlockSpec(token_dim=3, channels=8, layers=2, heads=2, head_dim=4, kv_heads=2, mlp_dim=12)
TARFLOW = {"positions": T}
STARFLOW = {"affine": AffineSpec("softplus", 4.0), "rotary": "interleaved", "start": True, "final_norm": True}

# (spec, whether a condition is added, length of the text in front)
BLOCKS = {
    "tarflow": (TARFLOW, False, 0),
    "tarflow-flip": ({**TARFLOW, "flip": True}, True, 0),
    "tarflow-unit": ({**TARFLOW, "affine": AffineSpec("unit")}, True, 0),
    "tarflow-start-flip": ({**TARFLOW, "start": True, "flip": True}, True, 0),
    "tarflow-rms-clip": ({**TARFLOW, "norm": "rms_norm", "affine": AffineSpec("exp", 2.0)}, False, 0),
    "tarflow-swiglu": ({**TARFLOW, "mlp": "swiglu", "post_norm": True, "flip": True}, True, 0),
    "tarflow-text": ({**TARFLOW, "text_dim": 6, "flip": True}, True, 4),
    "starflow": (STARFLOW, False, 0),
    "starflow-flip": ({**STARFLOW, "flip": True}, False, 0),
    "starflow-text": ({**STARFLOW, "text_dim": 6}, False, 4),
    "starflow-text-flip-cond": ({**STARFLOW, "text_dim": 6, "flip": True}, True, 1),
    "starflow-without-its-text": ({**STARFLOW, "text_dim": 6}, False, 0),
    "starflow-grouped": ({**STARFLOW, "kv_heads": 1, "rotary": "half", "bias": False}, True, 0),
    "starflow-identity-first": ({**STARFLOW, "start": False, "flip": True}, True, 0),
    "starflow-all-norms": ({**STARFLOW, "qk_norm": True, "post_norm": True, "norm": "rms_norm"}, False, 0),
    "starflow-unit": ({**STARFLOW, "affine": AffineSpec("unit", 4.0), "qk_norm": True}, False, 0),
    "no-norm-no-position": ({"norm": "none", "bias": False, "final_norm": True}, True, 0),
    "three-layers-swiglu": ({**STARFLOW, "layers": 3, "mlp": "swiglu", "kv_heads": 1, "bias": False}, False, 0),
}
every_block = pytest.mark.parametrize("case", BLOCKS.values(), ids=BLOCKS.keys())


@pytest.fixture(params=cpu_backends("block_forward"))
def forward(request):
    return request.param


@pytest.fixture(params=cpu_backends("block_inverse"))
def inverse(request):
    return request.param


def block(case, B=2, tokens=T, copies=1, dtype=F64, **changes):
    """Data, weights and spec of a case, and its context: `copies` of B rows, different ones."""
    overrides, conditional, L = case
    spec = dataclasses.replace(BASE, **{**overrides, **changes})
    if spec.positions:
        spec = dataclasses.replace(spec, positions=tokens)
    weights = {}
    for name, shape in spec.weight_shapes.items():
        scale = shape[1] ** -0.5 if len(shape) == 2 and name != "pos_embed" else 0.3
        if name == "proj_out.weight":
            scale *= 0.1  # TarFlow's sigma is exp of what is linear in the tokens: a wilder one explodes over T steps
        weights[name] = (torch.randn(shape, dtype=F64) * scale).to(dtype)
        if name.endswith("norm.weight") and spec.norm == "layer_norm":
            weights[name] += 1
    context = {}
    if conditional:
        context["cond"] = torch.randn(copies * B, spec.channels, dtype=F64).to(dtype)
    if L:
        context["prefix"] = torch.randn(copies * B, L, spec.text_dim, dtype=F64).to(dtype)
    if spec.rotary != "none":
        context |= angles(L + tokens, spec.head_dim, torch.promote_types(dtype, torch.float32))
    x = torch.randn(B, tokens, spec.token_dim, dtype=F64)
    return x.to(torch.promote_types(dtype, torch.float32)), weights, spec, context


def naive_network(x, w, spec, cond=None, prefix=None, cos=None, sin=None, temperature=1.0, dropout=0.0):
    """Raw parameters (B, T, P) in the block's own order, in the dtype of the weights."""

    def linear(x, name):
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def rms(x, name):
        return F.rms_norm(x, x.shape[-1:], 1 + w[f"{name}.weight"], eps=1e-6)

    def norm(x, name):
        if spec.norm == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
        return rms(x, name) if spec.norm == "rms_norm" else x

    def mlp(x, layer):
        if spec.mlp == "gelu":
            u = linear(x, f"{layer}.up")
            return linear(u * 0.5 * (1 + torch.erf(u / math.sqrt(2))), f"{layer}.down")
        g = linear(x, f"{layer}.gate")
        gate = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
        return linear(gate * linear(x, f"{layer}.up"), f"{layer}.down")

    dtype, tokens = w["proj_in.weight"].dtype, x.flip(1) if spec.flip else x
    if spec.start:
        tokens = torch.cat([w["start"].to(x.dtype).repeat(len(x), 1, 1), tokens], 1)[:, :-1]
    h = linear(tokens.to(dtype), "proj_in")
    if spec.positions:
        h = h + (w["pos_embed"].flip(0) if spec.flip else w["pos_embed"])
    if cond is not None:
        h = h + cond[:, None]
    if prefix is not None:
        h = torch.cat([linear(prefix, "proj_text"), h], 1)
    d, q_end, k_end = spec.head_dim, spec.heads * spec.head_dim, (spec.heads + spec.kv_heads) * spec.head_dim
    visible = naive_visible(range(h.shape[1]), h.shape[1], None)
    for i in range(spec.layers):
        layer = f"layers.{i}"
        qkv = linear(norm(h, f"{layer}.attn_norm"), f"{layer}.qkv")
        q, k, v = (t.unflatten(-1, (-1, d)) for t in (qkv[..., :q_end], qkv[..., q_end:k_end], qkv[..., k_end:]))
        if spec.qk_norm:
            q, k = rms(q, f"{layer}.q_norm"), rms(k, f"{layer}.k_norm")
        q, k = (naive_rotate(t, cos, sin, spec.rotary) for t in (q, k))
        y = linear(naive_attention(q, k, v, visible, temperature).flatten(-2), f"{layer}.proj")
        h = h + F.dropout(rms(y, f"{layer}.attn_post_norm") if spec.post_norm else y, dropout)
        y = mlp(norm(h, f"{layer}.mlp_norm"), layer)
        h = h + F.dropout(rms(y, f"{layer}.mlp_post_norm") if spec.post_norm else y, dropout)
    h = h[:, -x.shape[1] :]
    return linear(rms(h, "final_norm") if spec.final_norm else h, "proj_out")


def naive_forward(x, w, spec, **context):
    raw = naive_network(x, w, spec, **context).to(x.dtype)
    return naive_affine(x, raw, spec.affine, shift=not spec.start, flip=spec.flip)


def naive_inverse(z, w, spec, context, guidance=None, rule="tarflow", temperature=1.0):
    """Token after token; with guidance two passes of the parallel network over everything so far at each."""
    x, B = (z.flip(1) if spec.flip else z).clone(), len(z)
    branch = [
        {n: c if n in ("cos", "sin") else c[half] for n, c in context.items()} for half in (slice(B), slice(B, None))
    ]

    def parameters(t, half, temperature=1.0):
        data = x.flip(1) if spec.flip else x
        return naive_network(data, w, spec, **branch[half], temperature=temperature)[:, t if spec.start else t - 1].to(
            x.dtype
        )

    for t in range(0 if spec.start else 1, x.shape[1]):
        c = parameters(t, 0)
        mu, sigma = naive_raw(c, spec.affine)
        if guidance is not None:
            u, g = parameters(t, 1, temperature), guidance[:, t, None]
            if rule == "tarflow":
                clip = spec.affine.soft_clip
                c, u = (clip * torch.tanh(r / clip) if clip else r for r in (c, u))
                mu, sigma = naive_raw(c + g * (c - u), AffineSpec(spec.affine.scale))
            else:
                mu_u, sigma_u = naive_raw(u, spec.affine)
                s = torch.clamp(sigma / sigma_u, max=1) ** 2
                mu, sigma = ((1 + g) * mu - g * s * mu_u) / (1 + g - g * s), sigma / torch.sqrt(1 + g - g * s)
        x[:, t] = mu + sigma * z[:, x.shape[1] - 1 - t if spec.flip else t]
    return x.flip(1) if spec.flip else x


@every_block
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_matches_naive_network(case, forward):
    x, w, spec, context = block(case)
    expected, minus_log_sigma = naive_forward(x, w, spec, **context)
    for logdet in ("sum", "mean", "none"):
        z, ld = block_forward(x, w, spec, **context, logdet=logdet, backend=forward)
        torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ld, reduced(minus_log_sigma, logdet), rtol=1e-10, atol=1e-10)


def of_tensors(flow, x, w, spec, context):
    """flow(x, w, spec, **context) as a function of every tensor that carries a gradient, and these tensors."""
    inputs = [n for n in ("cond", "prefix") if n in context]

    def function(x, *values):
        weights, changed = dict(zip(w, values)), dict(zip(inputs, values[len(w) :]))
        return flow(x, weights, spec, **{**context, **changed})

    return function, [x, *w.values(), *(context[n] for n in inputs)]


@every_block
def test_forward_with_gradients_is_the_same(case, forward):
    """With a gradient the block is composed of smaller ops: same values, gradients of the naive network."""
    x, w, spec, context = block(case)
    seeds = torch.randn_like(x), torch.randn_like(x)
    composed, tensors = of_tensors(lambda *a, **c: block_forward(*a, **c, logdet="none"), x, w, spec, context)
    naive, _ = of_tensors(naive_forward, x, w, spec, context)
    actual, expected = (with_gradients(f, tensors, seeds) for f in (composed, naive))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    z, ld = block_forward(x, w, spec, **context, logdet="none", backend=forward)
    torch.testing.assert_close([z, ld], actual[:2], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-all-norms"])
def test_dropout_is_on_the_residual_branches_of_training(name, forward):
    x, w, spec, context = block(BLOCKS[name])
    plain = block_forward(x, w, spec, **context, backend=forward)
    assert torch.equal(block_forward(x, w, spec, **context, dropout=0.5, backend=forward)[0], plain[0])
    torch.manual_seed(7)
    expected, minus_log_sigma = naive_forward(x, w, spec, **context, dropout=0.5)
    torch.manual_seed(7)
    z, ld = block_forward(x.requires_grad_(), w, spec, **context, dropout=0.5)
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ld, minus_log_sigma.sum((1, 2)), rtol=1e-10, atol=1e-10)
    assert (z - plain[0]).abs().max() > 1e-3


@every_block
def test_gradcheck(case):
    flow, tensors = of_tensors(block_forward, *block(case, B=1, tokens=3))
    assert torch.autograd.gradcheck(flow, [t.requires_grad_() for t in tensors], fast_mode=True)


@every_block
def test_logdet_is_that_of_the_jacobian(case, forward):
    x, w, spec, context = block(case, B=1)
    jacobian = torch.autograd.functional.jacobian(lambda x: block_forward(x, w, spec, **context)[0], x)
    _, ld = block_forward(x, w, spec, **context, backend=forward)
    expected = torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel())).logabsdet
    torch.testing.assert_close(ld[0], expected, rtol=0, atol=1e-9)


@every_block
@pytest.mark.usefixtures("poisoned_memory")
def test_round_trip(case, forward, inverse):
    x, w, spec, context = block(case)
    z, _ = block_forward(x, w, spec, **context, backend=forward)
    back = block_inverse(z, w, spec, **context, backend=inverse)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    other = block_inverse(x, w, spec, **context, backend=inverse)
    torch.testing.assert_close(block_forward(other, w, spec, **context, backend=forward)[0], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text"])
@pytest.mark.parametrize("tokens", [1, 2, 63, 111])
def test_round_trip_of_sizes(name, tokens, forward, inverse):
    x, w, spec, context = block(BLOCKS[name], tokens=tokens, layers=1)
    z, _ = block_forward(x, w, spec, **context, backend=forward)
    torch.testing.assert_close(z, naive_forward(x, w, spec, **context)[0], rtol=1e-10, atol=1e-10)
    back = block_inverse(z, w, spec, **context, backend=inverse)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("D, head_dim", [(1, 8), (3, 24), (192, 80)])
def test_round_trip_of_widths(D, head_dim, forward, inverse):
    x, w, spec, context = block(BLOCKS["starflow-grouped"], token_dim=D, head_dim=head_dim)
    z, _ = block_forward(x, w, spec, **context, backend=forward)
    torch.testing.assert_close(z, naive_forward(x, w, spec, **context)[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block_inverse(z, w, spec, **context, backend=inverse), x, rtol=0, atol=1e-9)


@every_block
@pytest.mark.parametrize("rule", ["tarflow", "starflow"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_guided_inverse_matches_two_passes(case, rule, temperature, inverse):
    z, w, spec, context = block(case, copies=2)
    g = torch.rand(2, T, dtype=F64) * 2
    x = block_inverse(z, w, spec, **context, guidance=g, rule=rule, temperature=temperature, backend=inverse)
    expected = naive_inverse(z, w, spec, context, g, rule, temperature)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["tarflow", "starflow"])
def test_guidance_is_by_token_of_the_blocks_own_order(rule, inverse):
    z, w, spec, context = block(BLOCKS["tarflow-flip"], copies=2)
    g = torch.tensor([0.0, 0.0, 0.0, 1.5, 0.0], dtype=F64)
    unguided = {"cond": context["cond"][:2]}
    plain = block_inverse(z, w, spec, **unguided, backend=inverse).flip(1)
    guided = block_inverse(z, w, spec, **context, guidance=g, rule=rule, backend=inverse).flip(1)
    torch.testing.assert_close(guided[:, :3], plain[:, :3], rtol=1e-10, atol=1e-10)
    assert (guided[:, 3] - plain[:, 3]).abs().min() > 1e-6


def test_temperature_tells_the_branches_apart_without_a_condition(inverse):
    z, w, spec, context = block(BLOCKS["starflow"])
    plain = block_inverse(z, w, spec, **context, backend=inverse)
    same = block_inverse(z, w, spec, **context, guidance=1.0, backend=inverse)
    torch.testing.assert_close(same, plain, rtol=1e-10, atol=1e-10)
    tempered = block_inverse(z, w, spec, **context, guidance=1.0, temperature=0.5, backend=inverse)
    expected = naive_inverse(z, w, spec, context, torch.ones(2, T, dtype=F64), "tarflow", 0.5)
    torch.testing.assert_close(tempered, expected, rtol=1e-10, atol=1e-10)
    assert (tempered - plain).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tarflow-flip", "tarflow-swiglu", "starflow-text", "starflow-all-norms"])
def test_error_contract(dtype, name, forward, inverse):
    wide = {"token_dim": 8, "channels": 48, "mlp_dim": 96}  # enough values that the largest errors are typical
    x, w, spec, context = block(BLOCKS[name], B=8, tokens=17, dtype=dtype, **wide)
    doubled = {n: t.double() for n, t in w.items()}, spec
    context64 = {n: t.double() for n, t in context.items()}
    z, ld = block_forward(x, w, spec, **context, logdet="none", backend=forward)
    assert (z.dtype, ld.dtype) == (torch.float32, torch.float32)
    plain, exact = naive_forward(x, w, spec, **context), naive_forward(x.double(), *doubled, **context64)
    assert_within_contract(z, plain[0], exact[0])
    assert_within_contract(ld, plain[1], exact[1])
    back = block_inverse(x, w, spec, **context, backend=inverse)
    assert back.dtype == torch.float32
    plain, exact = naive_inverse(x, w, spec, context), naive_inverse(x.double(), *doubled, context64)
    assert_within_contract(back, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", ["tarflow", "starflow"])
def test_guided_error_contract(dtype, rule, inverse):
    wide = {"token_dim": 8, "channels": 48, "mlp_dim": 96}
    z, w, spec, context = block(BLOCKS["starflow-text"], B=8, tokens=17, copies=2, dtype=dtype, **wide)
    g = torch.full((8, 17), 1.5)
    x = block_inverse(z, w, spec, **context, guidance=g, rule=rule, temperature=0.7, backend=inverse)
    plain = naive_inverse(z, w, spec, context, g, rule, 0.7)
    wide_weights, wide_context = ({n: t.double() for n, t in d.items()} for d in (w, context))
    exact = naive_inverse(z.double(), wide_weights, spec, wide_context, g.double(), rule, 0.7)
    assert_within_contract(x, plain, exact)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text-flip-cond"])
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs_are_read_and_left(name, forward, inverse):
    x, w, spec, context = block(BLOCKS[name])
    copies = strided(x), {n: strided(t) for n, t in w.items()}, spec
    context_copies = {n: strided(t) for n, t in context.items()}
    torch.testing.assert_close(
        block_forward(*copies, **context_copies, backend=forward),
        block_forward(x, w, spec, **context, backend=forward),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        block_inverse(*copies, **context_copies, backend=inverse),
        block_inverse(x, w, spec, **context, backend=inverse),
        rtol=1e-11,
        atol=1e-11,
    )
    assert torch.equal(copies[0], x) and all(torch.equal(copies[1][n], w[n]) for n in w)
    assert all(torch.equal(context_copies[n], context[n]) for n in context)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_forward_batch_invariance(dtype, forward):
    x, w, spec, context = block(BLOCKS["tarflow-flip"], B=4, dtype=dtype)
    batch = block_forward(x, w, spec, **context, backend=forward)
    for i in range(4):
        row = block_forward(x[i : i + 1], w, spec, cond=context["cond"][i : i + 1], backend=forward)
        for alone, batched in zip(row, batch):
            assert_same_row(forward, alone, batched[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_inverse_batch_invariance(dtype, inverse):
    z, w, spec, context = block(BLOCKS["tarflow-flip"], B=4, copies=2, dtype=dtype)
    batch = block_inverse(z, w, spec, **context, guidance=0.5, backend=inverse)
    for i in range(4):
        cond = context["cond"][[i, i + 4]]
        alone = block_inverse(z[i : i + 1], w, spec, cond=cond, guidance=0.5, backend=inverse)
        assert_same_row(inverse, alone, batch[i : i + 1])


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text"])
def test_opcheck(name):
    x, w, spec, context = block(BLOCKS[name])
    given = [context.get(n) for n in ("cond", "prefix", "cos", "sin")]
    torch.library.opcheck(
        torch.ops.starflow.block_forward.default, (x, list(w.values()), *given, spec.to_json(), "mean")
    )
    torch.library.opcheck(
        torch.ops.starflow.block_inverse.default,
        (x, list(w.values()), *given, None, spec.to_json(), "tarflow", 1.0),
    )


def test_opcheck_guided():
    z, w, spec, context = block(BLOCKS["tarflow-flip"], copies=2)
    args = (z, list(w.values()), context["cond"], None, None, None, torch.rand(2, T, dtype=F64), spec.to_json())
    torch.library.opcheck(torch.ops.starflow.block_inverse.default, (*args, "starflow", 0.7))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(compiler):
    x, w, spec, context = block(BLOCKS["starflow-text-flip-cond"], copies=2)
    one = {n: t if n in ("cos", "sin") else t[:2] for n, t in context.items()}

    def both(x):
        return *block_forward(x, w, spec, **one), block_inverse(x, w, spec, **context, guidance=1.0, temperature=0.7)

    torch.testing.assert_close(compiled(both, compiler)(x), both(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text"])
def test_compiles_with_gradients(name):
    x, w, spec, context = block(BLOCKS[name])
    flow, tensors = of_tensors(block_forward, x, w, spec, context)
    seeds = torch.randn_like(x), torch.randn(2)
    eager, graph = (with_gradients(f, tensors, seeds) for f in (flow, compiled(flow)))
    torch.testing.assert_close(graph, eager, rtol=1e-10, atol=1e-10)


def test_second_derivative_is_refused():
    x, w, spec, _ = block(BLOCKS["tarflow"])
    x.requires_grad_()
    (grad,) = torch.autograd.grad(block_forward(x, w, spec)[0].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_inverse_is_not_differentiable(inverse):
    z, w, spec, context = block(BLOCKS["tarflow"])
    w = {n: t.requires_grad_() for n, t in w.items()}
    assert not block_inverse(z.requires_grad_(), w, spec, **context, backend=inverse).requires_grad
