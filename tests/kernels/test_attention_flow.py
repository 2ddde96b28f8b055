"""attention_flow: attention, projection and affine transform in one op."""

from __future__ import annotations

import pytest
import torch
from support.affine import every_logdet, every_order, every_spec
from support.backends import cpu_backends, on_backends
from support.contract import assert_same_row, assert_within_contract, compiled, strided, with_gradients
from support.naive import angles, naive_affine, naive_attention, naive_rotate, naive_visible, reduced

from starflow_kernels import AffineSpec, affine_flow, attention_flow, causal_attention

F32, F64 = torch.float32, torch.float64
every_rotary = pytest.mark.parametrize("rotary", ["none", "interleaved", "half"])
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "weight"])


def takes(backend, dtype=F64, D=3, d=4):
    """Whether a backend takes tokens of D values and heads of d on a network of this dtype."""
    if backend == "triton":  # in its interpreter
        return dtype == torch.float16 or (dtype == F32 and D <= 32 and d <= 64)
    return backend == "reference" or dtype != F64


in_float64 = on_backends("attention_flow", takes)


@pytest.fixture(params=cpu_backends("attention_flow"))
def backend(request):
    return request.param


def inputs(spec, bias=True, B=2, T=5, D=3, H=2, H_kv=1, d=4, dtype=F64) -> dict[str, torch.Tensor]:
    P = spec.params_dim(D)
    shapes = {"x": (B, T, D), "q": (B, T, H, d), "k": (B, T, H_kv, d), "v": (B, T, H_kv, d), "weight": (P, H * d)}
    tensors = {
        name: torch.randn(shape, dtype=F64) for name, shape in {**shapes, **({"bias": (P,)} if bias else {})}.items()
    }
    tensors["weight"] *= 0.5 * (H * d) ** -0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


def rotary_options(rotary, T, d, dtype=F64):
    return {"rotary": rotary, **(angles(T, d, dtype) if rotary != "none" else {})}


def naive(spec, x, q, k, v, weight, bias=None, *, cos=None, sin=None, rotary="none", window=None, temperature=1.0,
          shift=False, flip=False, logdet="sum"):  # fmt: skip
    T = q.shape[1]
    q, k = naive_rotate(q, cos, sin, rotary), naive_rotate(k, cos, sin, rotary)
    params = naive_attention(q, k, v, naive_visible(range(T), T, window), temperature).flatten(2) @ weight.T
    z, minus_log_sigma = naive_affine(x, params if bias is None else params + bias, spec, shift, flip)
    return z, reduced(minus_log_sigma, logdet)


def draws(B, T, D, logdet, dtype=torch.float32):
    return torch.randn(B, T, D, dtype=dtype), torch.randn((B, T, D) if logdet == "none" else B)


def run(tensors, seeds, spec=AffineSpec(), **options):
    names = list(tensors)
    return with_gradients(
        lambda *t: attention_flow(**dict(zip(names, t)), spec=spec, **options), list(tensors.values()), seeds
    )


@every_spec
@every_order
@every_rotary
@with_and_without_bias
@in_float64
def test_matches_its_parts(spec, shift, flip, rotary, bias, backend):
    tensors, rotation = inputs(spec, bias), rotary_options(rotary, 5, 4)
    for logdet, window in (("sum", None), ("mean", 2), ("none", 1)):
        options = {"window": window, "temperature": 0.7, "shift": shift, "flip": flip, "logdet": logdet, **rotation}
        actual = attention_flow(**tensors, spec=spec, **options, backend=backend)
        torch.testing.assert_close(actual, naive(spec, **tensors, **options), rtol=1e-11, atol=1e-11)


@in_float64
def test_matches_the_composition_of_references(backend):
    spec, rotation = AffineSpec("softplus", 4.0), rotary_options("half", 5, 4)
    x, q, k, v, weight, bias = inputs(spec).values()
    out = causal_attention(q, k, v, **rotation, window=3, backend="reference").flatten(2)
    expected = affine_flow(x, out @ weight.T + bias, spec, shift=True, backend="reference")
    actual = attention_flow(x, q, k, v, weight, bias, spec, **rotation, window=3, shift=True, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@every_spec
@every_order
@every_logdet
@in_float64
def test_gradcheck(spec, shift, flip, logdet, backend):
    tensors = [t.requires_grad_() for t in inputs(spec, T=3, D=2, d=2).values()]
    options = {**rotary_options("half", 3, 2), "shift": shift, "flip": flip, "logdet": logdet, "backend": backend}
    assert torch.autograd.gradcheck(lambda *t: attention_flow(*t, spec, **options), tensors)


@every_rotary
@with_and_without_bias
@pytest.mark.parametrize("window", [None, 2])
@in_float64
def test_gradcheck_of_attention(rotary, bias, window, backend):
    tensors = {name: t.requires_grad_() for name, t in inputs(AffineSpec(), bias, T=3, D=1, d=2).items()}
    options = {**rotary_options(rotary, 3, 2), "window": window, "temperature": 0.7, "backend": backend}
    names = list(tensors)

    def flow(*values):
        return attention_flow(**dict(zip(names, values)), **options)

    assert torch.autograd.gradcheck(flow, list(tensors.values()))


# T, D, H, H_kv, d, window, rotary, scale, dtype
SIZES = [
    (1, 1, 1, 1, 16, None, "half", "exp", torch.float32),
    (2, 5, 2, 1, 17, 1, "none", "softplus", torch.float32),
    (33, 3, 4, 2, 24, None, "interleaved", "softplus", torch.float32),
    (65, 12, 2, 1, 64, 20, "half", "exp", torch.float32),
    (70, 19, 1, 1, 50, None, "interleaved", "unit", torch.float32),
    (40, 64, 2, 2, 128, 33, "half", "softplus", torch.float32),
    (35, 32, 2, 1, 32, None, "interleaved", "exp", torch.float32),
    (63, 4, 2, 1, 24, None, "interleaved", "exp", torch.float16),
    (70, 20, 2, 2, 32, 9, "half", "softplus", torch.float16),
    (35, 64, 1, 1, 128, None, "none", "unit", torch.float16),
    (63, 4, 2, 1, 24, None, "half", "softplus", torch.bfloat16),
]


@on_backends("attention_flow", lambda backend, size: takes(backend, size[-1], size[1], size[4]), size=SIZES)
@with_and_without_bias
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract(size, bias, backend):
    T, D, H, H_kv, d, window, rotary, scale, dtype = size
    spec, logdet = AffineSpec(scale, 1.5 * bias), "sum" if bias else "none"
    B = 8 if T < 3 else 1  # one short log-determinant is a single draw of the error, for torch too
    tensors = inputs(spec, bias, B, T, D, H, H_kv, d, dtype)
    options = {"window": window, "temperature": 0.8, "shift": bias, "flip": T % 2 == 0, "logdet": logdet}
    options |= rotary_options(rotary, T, d, torch.float32)
    names, seeds = list(tensors), draws(B, T, D, logdet, dtype)

    def plain_torch(*values):
        return naive(spec, **dict(zip(names, values)), **options)

    actual = run({name: strided(t) for name, t in tensors.items()}, seeds, spec, **options, backend=backend)
    plain = with_gradients(plain_torch, list(tensors.values()), seeds)
    exact = with_gradients(plain_torch, [t.double() for t in tensors.values()], seeds)
    assert [t.dtype for t in actual] == [dtype, torch.float32, *[dtype] * len(tensors)]
    for values in zip(actual, plain, exact):
        assert_within_contract(*values)


@pytest.mark.parametrize("used", [0, 1], ids=["z", "logdet"])
@every_logdet
def test_one_output_alone(used, logdet, backend):
    tensors = inputs(AffineSpec(), dtype=torch.float32)
    seed = [draws(2, 5, 3, logdet)[used]]

    def gradients(tensors, backend):
        names = list(tensors)
        return with_gradients(
            lambda *t: [attention_flow(**dict(zip(names, t)), shift=True, logdet=logdet, backend=backend)[used]],
            list(tensors.values()),
            seed,
        )

    exact = gradients({name: t.double() for name, t in tensors.items()}, "reference")
    for a, b in zip(gradients(tensors, backend), exact):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


@on_backends("attention_flow", takes, dtype=[torch.bfloat16, torch.float16])
def test_float32_tokens_on_a_narrow_network(dtype, backend):
    tensors = inputs(AffineSpec(), dtype=dtype)
    tensors["x"] = torch.randn(2, 5, 3)
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    z, ld = attention_flow(**tensors, backend=backend)
    assert (z.dtype, ld.dtype) == (torch.float32, torch.float32)
    plain = naive(AffineSpec(), **tensors)
    exact = naive(AffineSpec(), **{name: t.double() for name, t in tensors.items()})
    assert_within_contract(z, plain[0], exact[0])
    assert_within_contract(ld, plain[1], exact[1])
    (z.sum() + ld.sum()).backward()
    assert all(t.grad.dtype == t.dtype and t.grad.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("rotary, window", [("half", None), ("interleaved", 9)])
def test_a_row_has_the_same_bits_in_any_batch(rotary, window, backend):
    spec = AffineSpec("softplus", 4.0)
    tensors, seeds = inputs(spec, B=2, T=35, H=2, H_kv=1, d=8, dtype=torch.float32), draws(2, 35, 3, "sum")
    options = {**rotary_options(rotary, 35, 8, torch.float32), "window": window, "shift": True, "backend": backend}
    batch = run(tensors, seeds, spec, **options)
    for rows in (slice(0, 1), slice(1, 2)):
        part = {name: t[rows] if t.ndim > 2 else t for name, t in tensors.items()}
        for alone, batched in zip(run(part, [s[rows] for s in seeds], spec, **options)[:6], batch):
            assert_same_row(backend, alone, batched[rows])
    if backend != "reference":
        assert all(torch.equal(*values) for values in zip(run(tensors, seeds, spec, **options), batch))


@every_order
@in_float64
def test_logdet_is_that_of_the_jacobian(shift, flip, backend):
    spec, tensors = AffineSpec("softplus", 4.0), inputs(AffineSpec(), B=1, T=4, d=2)
    x, mix = tensors["x"], torch.randn(3, 16, dtype=F64)

    def flow(x):
        own = (x.flip(1) if flip else x).tanh() @ mix
        if not shift:  # the parameters of token t depend on the tokens before it
            own = torch.nn.functional.pad(own[:, :-1], (0, 0, 1, 0))
        q, k, v, _ = own.unflatten(2, (4, 2, 2)).unbind(2)
        return attention_flow(
            x, q, k, v, tensors["weight"], tensors["bias"], spec, shift=shift, flip=flip, backend=backend
        )

    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x).reshape(12, 12)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, flow(x)[1][0], rtol=0, atol=1e-9)


def test_inputs_are_read_at_any_strides_and_left(backend):
    tensors, seeds = inputs(AffineSpec(), H=2, H_kv=2, dtype=torch.float32), draws(2, 5, 3, "sum")
    packed = torch.cat([tensors[name] for name in "qkv"], dim=2)
    views = {**tensors, **dict(zip("qkv", packed.split(2, dim=2)))}
    gaps = {name: strided(t) for name, t in tensors.items()}
    expected = run(tensors, seeds, backend=backend)
    for given in (views, gaps):
        copies = {name: t.clone() for name, t in given.items()}
        torch.testing.assert_close(run(given, seeds, backend=backend), expected, rtol=3e-6, atol=3e-6)
        assert all(torch.equal(copies[name], t) for name, t in given.items())


def test_no_rows(backend):
    tensors = inputs(AffineSpec(), B=0, dtype=torch.float32)
    results = run(tensors, (torch.zeros(0, 5, 3), torch.zeros(0)), backend=backend)
    assert [r.shape for r in results] == [(0, 5, 3), (0,), *(t.shape for t in tensors.values())]
    assert not any(r.any() for r in results)


@pytest.mark.parametrize("rotary, window, logdet", [("none", 0, "sum"), ("half", 3, "none")])
@with_and_without_bias
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_opcheck(rotary, window, logdet, bias, dtype):
    tensors, rotation = inputs(AffineSpec(), bias, dtype=dtype), rotary_options(rotary, 5, 4, dtype)
    options = (rotation.get("cos"), rotation.get("sin"), rotary, window, 0.7, "softplus", 4.0, True, True, logdet)
    args = (*(tensors.get(name) for name in ("x", "q", "k", "v", "weight", "bias")), *options)
    outputs = list(torch.ops.starflow.attention_flow(*args))
    grads = [torch.randn_like(t) for t in outputs]
    torch.library.opcheck(torch.ops.starflow.attention_flow_backward.default, (grads, outputs, *args))
    args = tuple(t.requires_grad_() if i < 6 and t is not None else t for i, t in enumerate(args))
    torch.library.opcheck(torch.ops.starflow.attention_flow.default, args)


@pytest.mark.parametrize("used", [(0, 2), (2,)], ids=["z-lse", "lse"])
def test_gradient_of_the_log_sum_exp(used, backend):
    """The registered op returns the log-sum-exp, and its gradient is right too."""
    tensors, rotation = inputs(AffineSpec(), dtype=torch.float32), angles(5, 4, torch.float32)
    seeds = [torch.randn(2, 5, 3), None, torch.randn(2, 2, 5)]

    def flow(*tensors, backend=backend):
        found = torch.ops.starflow.attention_flow(
            *tensors, *(rotation[n].to(tensors[0].dtype) for n in ("cos", "sin")), "half", 3, 0.7, "exp", 0.0,
            True, False, "sum", backend=backend,
        )  # fmt: skip
        return [found[i] for i in used]

    exact = with_gradients(
        lambda *t: flow(*t, backend="reference"), [t.double() for t in tensors.values()], [seeds[i] for i in used]
    )
    for a, b in zip(with_gradients(flow, list(tensors.values()), [seeds[i] for i in used]), exact):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiler, rotary", [("aot_eager", "half"), ("inductor", "none")])
def test_compiles_as_one_graph(compiler, rotary):
    tensors, rotation = list(inputs(AffineSpec()).values()), rotary_options(rotary, 5, 4)
    seeds = draws(2, 5, 3, "sum")

    def flow(*tensors):
        return attention_flow(*tensors, **rotation, window=3, shift=True, flip=True)

    eager, graph = (with_gradients(f, tensors, seeds) for f in (flow, compiled(flow, compiler)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


def test_composed_says_which_part_it_lacks():
    with pytest.raises(ValueError, match="cannot run attention_flow: flow_head has its reference alone"):
        attention_flow(**inputs(AffineSpec()), backend="composed")


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "x: expected a tensor"),
        ({"x": torch.zeros(3, 2)}, ValueError, "x: expected shape"),
        ({"q": torch.zeros(2, 4, 2, 4)}, ValueError, r"q: expected shape \(2, 3, H, d\), got \(2, 4, 2, 4\)"),
        ({"k": torch.zeros(2, 3, 3, 4)}, ValueError, r"v: expected shape \(2, 3, 3, 4\)"),
        ({"v": torch.zeros(2, 3, 1, 4).double()}, TypeError, "q, k, v: dtypes"),
        ({"weight": torch.zeros(4, 6)}, ValueError, r"weight: expected shape \(4, 8\), got \(4, 6\)"),
        ({"weight": torch.zeros(4, 8, device="meta")}, ValueError, "weight: on meta, expected cpu"),
        ({"weight": torch.zeros(4, 8).double()}, TypeError, r"weight: dtype torch.float64, expected that of q"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \(4,\), got \(5,\)"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias: dtype torch.float16, expected that of q, torch.float32"),
        ({"spec": AffineSpec("unit")}, ValueError, r"weight: expected shape \(2, 8\)"),
        ({"rotary": "half"}, ValueError, "cos, sin: both are needed with rotary='half'"),
        ({"window": 0}, ValueError, "window=0: expected at least 1, or None"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0: expected a finite number > 0"),
        ({"logdet": ""}, ValueError, "logdet='': expected one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    heads = torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1, 4)
    arguments = {"x": torch.zeros(2, 3, 2), **dict(zip("qkv", heads)), "weight": torch.zeros(4, 8)}
    with pytest.raises(error, match=message):
        attention_flow(**{**arguments, **change})
