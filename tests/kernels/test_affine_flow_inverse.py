"""affine_flow_inverse: sampling direction of the affine transform, with guidance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.affine import every_spec
from support.backends import cpu_backends, needs_native, on_backends
from support.contract import assert_same_row, assert_within_contract, compiled, strided
from support.naive import naive_raw, naive_sigma

from starflow_kernels import AffineSpec, affine_flow, affine_flow_inverse

F32, F64 = torch.float32, torch.float64


def takes(backend, dtype=F64):
    """Whether a backend takes tensors of this dtype."""
    return backend != "native" or dtype != F64


in_float64 = on_backends("affine_flow_inverse", takes)
RULES = ["tarflow", "starflow", "itarflow"]
every_rule = pytest.mark.parametrize("rule", RULES)
GUIDED = [None, *RULES]


@pytest.fixture(params=cpu_backends("affine_flow_inverse"))
def backend(request):
    return request.param


def inputs(spec, guided, B=2, T=5, D=3, dtype=F64):
    rows = 2 * B if guided else B
    return torch.randn(B, T, D, dtype=dtype), torch.randn(rows, T, spec.params_dim(D), dtype=dtype)


def naive(z, params, spec, guidance=None, rule=None):
    """Return x = mu + sigma z with the guidance rules as their papers and released code write them."""
    if guidance is None:
        mu, sigma = naive_raw(params, spec)
        return mu + sigma * z
    w = guidance.to(z.dtype).unsqueeze(-1)
    if rule == "tarflow":
        r = spec.soft_clip * torch.tanh(params / spec.soft_clip) if spec.soft_clip else params
        r_c, r_u = r.chunk(2)
        mu, sigma = naive_raw(r_c + w * (r_c - r_u), AffineSpec(spec.scale))
        return mu + sigma * z
    (mu_c, mu_u), (sigma_c, sigma_u) = (t.chunk(2) for t in naive_raw(params, spec))
    if rule == "itarflow":
        return mu_c + w * (mu_c - mu_u) + (sigma_c + w * (sigma_c - sigma_u)) * z
    s = torch.minimum(sigma_c / sigma_u, torch.ones_like(sigma_c)) ** 2
    D = 1 + w - w * s
    return ((1 + w) * mu_c - w * s * mu_u) / D + sigma_c / D.sqrt() * z


@every_spec
@pytest.mark.parametrize("rule", GUIDED)
@in_float64
def test_matches_formulas(spec, rule, backend):
    z, params = inputs(spec, rule)
    guidance = torch.rand(2, 5, dtype=F64) * 3 if rule else None
    x = affine_flow_inverse(z, params, spec, guidance=guidance, rule=rule or "tarflow", backend=backend)
    torch.testing.assert_close(x, naive(z, params, spec, guidance, rule), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("narrower", [True, False], ids=["sigma_c-smaller", "sigma_c-larger"])
@in_float64
def test_starflow_guidance_is_a_product_of_gaussians(narrower, backend):
    """The log-density is the parabola (1 + w) log p_c - w min(sigma_u / sigma_c, 1)^2 log p_u: three points give it."""
    w, sigma_c, sigma_u, mu_c, mu_u = 1.7, 0.6 if narrower else 1.4, 1.0, 0.3, -0.8
    k = 1.0 if narrower else (sigma_u / sigma_c) ** 2

    def log_density(x):
        return -(1 + w) * (x - mu_c) ** 2 / (2 * sigma_c**2) + w * k * (x - mu_u) ** 2 / (2 * sigma_u**2)

    precision = 2 * log_density(0) - log_density(1) - log_density(-1)
    mean = (log_density(1) - log_density(-1)) / 2 / precision
    params = torch.tensor([[[math.log(sigma_c), mu_c]], [[math.log(sigma_u), mu_u]]], dtype=F64)
    z = torch.tensor([[[0.9]]], dtype=F64)
    x = affine_flow_inverse(z, params, guidance=w, rule="starflow", backend=backend)
    assert x.item() == pytest.approx(mean + 0.9 / math.sqrt(precision), abs=1e-12)


@every_rule
@in_float64
def test_equal_branches_and_zero_weight_are_no_guidance(rule, backend):
    spec = AffineSpec("softplus", 4.0)
    z, params = inputs(spec, rule)
    condition, _ = params.chunk(2)
    plain = affine_flow_inverse(z, condition, spec, backend=backend)
    equal = affine_flow_inverse(z, condition.repeat(2, 1, 1), spec, guidance=2.5, rule=rule, backend=backend)
    zero = affine_flow_inverse(z, params, spec, guidance=0.0, rule=rule, backend=backend)
    torch.testing.assert_close((equal, zero), (plain, plain), rtol=1e-13, atol=1e-13)


@in_float64
def test_equal_sigmas_make_starflow_guidance_extrapolate_the_mean(backend):
    z, params = inputs(AffineSpec(), "starflow")
    params[2:, :, :3] = params[:2, :, :3]
    w = 1.3
    mu_c, mu_u = params[:2, :, 3:], params[2:, :, 3:]
    expected = mu_c + w * (mu_c - mu_u) + params[:2, :, :3].exp() * z
    x = affine_flow_inverse(z, params, guidance=w, rule="starflow", backend=backend)
    torch.testing.assert_close(x, expected, rtol=1e-13, atol=1e-13)


@every_rule
@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (2, 1), (2, 5)], ids=str)
@in_float64
def test_guidance_broadcasts(shape, rule, backend):
    z, params = inputs(AffineSpec(), rule)
    w = torch.rand(shape, dtype=F64)
    x = affine_flow_inverse(z, params, guidance=w, rule=rule, backend=backend)
    torch.testing.assert_close(x, naive(z, params, AffineSpec(), w.expand(2, 5), rule), rtol=1e-12, atol=1e-12)


@every_spec
@in_float64
def test_round_trip(spec, backend):
    x, params = inputs(spec, None)
    z, _ = affine_flow(x, params, spec)
    back = affine_flow_inverse(z, params, spec, backend=backend)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


@every_spec
@pytest.mark.parametrize("rule", GUIDED)
def test_gradcheck(spec, rule):
    tensors = [t.requires_grad_() for t in inputs(spec, rule, T=3, D=2)]
    tensors += [torch.rand(2, 3, dtype=F64, requires_grad=True)] if rule else []

    def inverse(z, params, guidance=None):
        return affine_flow_inverse(z, params, spec, guidance=guidance, rule=rule or "tarflow")

    assert torch.autograd.gradcheck(inverse, tensors)


@pytest.mark.parametrize("T", [1, 63, 111])
@pytest.mark.parametrize("D", [1, 3, 192])
@pytest.mark.parametrize("rule", GUIDED)
@pytest.mark.usefixtures("poisoned_memory")
@in_float64
def test_sizes(T, D, rule, backend):
    spec = AffineSpec("softplus", 4.0)
    z, params = inputs(spec, rule, T=T, D=D)
    guidance = torch.rand(2, T, dtype=F64) if rule else None
    x = affine_flow_inverse(z, params, spec, guidance=guidance, rule=rule or "tarflow", backend=backend)
    torch.testing.assert_close(x, naive(z, params, spec, guidance, rule), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_spec
@pytest.mark.parametrize("rule", GUIDED)
def test_error_contract(dtype, spec, rule, backend):
    z, params = inputs(spec, rule, T=63, D=5, dtype=dtype)
    w = torch.full((2, 63), 1.5) if rule else None
    x = affine_flow_inverse(z, params, spec, guidance=w, rule=rule or "tarflow", backend=backend)
    assert x.dtype == dtype
    assert_within_contract(x, naive(z, params, spec, w, rule), naive(z.double(), params.double(), spec, w, rule))


@every_spec
@pytest.mark.parametrize("rule", GUIDED)
@pytest.mark.parametrize("D", [1, 3, 16, 48, 192])
@pytest.mark.parametrize("T", [1, 63, 111])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_over_sizes(T, D, rule, spec, backend):
    B = max(2, 4096 // (T * D))  # enough values for plain PyTorch to show its usual error
    z, params = (strided(t) for t in inputs(spec, rule, B, T, D, torch.float32))
    options = {"guidance": strided(torch.rand(B, T) * 2) if rule else None, "rule": rule or "tarflow"}
    x = affine_flow_inverse(z, params, spec, **options, backend=backend)
    plain = affine_flow_inverse(z, params, spec, **options, backend="reference")
    assert_within_contract(x, plain, affine_flow_inverse(z.double(), params.double(), spec, **options))
    longer = z.new_full((B, T + 3, D), math.nan)
    for out in (longer[:, 1 : T + 1], strided(z)):
        affine_flow_inverse(z, params, spec, **options, out=out, backend=backend)
        assert torch.equal(out, x)
    assert longer[:, 0].isnan().all() and longer[:, T + 1 :].isnan().all()
    state = z.contiguous()
    assert torch.equal(affine_flow_inverse(state, params, spec, **options, out=state, backend=backend), x)


def test_state_stays_float32_on_a_narrow_network(backend):
    z, params = torch.randn(2, 5, 3), torch.randn(2, 5, 6, dtype=torch.bfloat16)
    x = affine_flow_inverse(z, params, backend=backend)
    expected = naive(z.double(), params.double(), AffineSpec())
    torch.testing.assert_close(x, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", GUIDED)
@in_float64
def test_out(rule, backend):
    z, params = inputs(AffineSpec(), rule)
    options = {"guidance": 1.5 if rule else None, "rule": rule or "tarflow", "backend": backend}
    expected = affine_flow_inverse(z, params, **options)
    poisoned = torch.full_like(z, math.nan)
    step = torch.full((2, 9, 3), math.nan, dtype=F64)
    for out in (poisoned, step[:, 2:7], strided(z), z):
        assert affine_flow_inverse(z, params, out=out, **options) is out
        torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    assert step[:, :2].isnan().all() and step[:, 7:].isnan().all()


@pytest.mark.parametrize("rule", GUIDED)
@in_float64
def test_strided_inputs_are_read_and_left(rule, backend):
    z, params = inputs(AffineSpec(), rule)
    options = {"guidance": torch.rand(2, 5, dtype=F64) if rule else None, "rule": rule or "tarflow"}
    x = affine_flow_inverse(z, params, backend=backend, **options)
    copies = strided(z), strided(params)
    if rule:
        options["guidance"] = strided(options["guidance"])
    torch.testing.assert_close(affine_flow_inverse(*copies, backend=backend, **options), x, rtol=1e-14, atol=1e-14)
    assert torch.equal(copies[0], z) and torch.equal(copies[1], params)


@on_backends("affine_flow_inverse", takes, dtype=[F32, torch.bfloat16, F64])
@every_rule
def test_a_row_has_the_same_bits_at_any_batch_and_thread_count(dtype, rule, backend):
    B = 130
    z, params = inputs(AffineSpec("softplus", 4.0), rule, B, T=63, dtype=dtype)
    w = torch.rand(B, 63)

    def run(i=slice(None)):
        given = z[i], torch.cat([params[:B][i], params[B:][i]])
        return affine_flow_inverse(*given, AffineSpec("softplus", 4.0), guidance=w[i], rule=rule, backend=backend)

    x = run()
    for rows in (slice(0, 1), slice(7, 8), slice(90, 95)):
        assert_same_row(backend, run(rows), x[rows])
    if backend != "reference":
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again = run()
            torch.set_num_threads(1)
            assert torch.equal(again, x)


@pytest.mark.parametrize("scale, rule", list(itertools.product(["softplus", "unit"], GUIDED)))
def test_opcheck(scale, rule):
    z, params = inputs(AffineSpec(scale), rule)
    args = (z, params, torch.rand(2, 5, dtype=F64) if rule else None, scale, 4.0, rule or "tarflow")
    torch.library.opcheck(torch.ops.starflow.affine_flow_inverse.default, args)
    torch.library.opcheck(torch.ops.starflow.affine_flow_inverse_out.default, (*args, torch.empty_like(z)))


@pytest.mark.parametrize("compiler, rule", [("aot_eager", None), ("aot_eager", "tarflow"), ("inductor", "starflow")])
def test_compiles_as_one_graph(compiler, rule):
    z, params = inputs(AffineSpec(), rule)
    w = torch.rand(5, dtype=F64) if rule else None

    def inverse(z, params, w):
        out = torch.empty_like(z)
        x = affine_flow_inverse(z, params, guidance=w, rule=rule or "tarflow")
        return x, affine_flow_inverse(z, params, guidance=w, rule=rule or "tarflow", out=out)

    eager, graph = (f(z, params, w) for f in (inverse, compiled(inverse, compiler)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


def test_compiles_with_gradients():
    z, params = (t.requires_grad_() for t in inputs(AffineSpec("softplus"), "starflow"))

    def loss(z, params):
        return affine_flow_inverse(z, params, AffineSpec("softplus"), guidance=1.5, rule="starflow").square().sum()

    eager, graph = (torch.autograd.grad(f(z, params), (z, params)) for f in (loss, compiled(loss)))
    torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-12)


@in_float64
def test_large_raw_outputs(backend):
    """softplus(a) is a for large a and exp(a) for small a: neither end overflows or is lost."""
    a = torch.tensor([-600.0, -40.0, 20.0, 900.0], dtype=F64)
    params = torch.stack([a, torch.zeros_like(a)], dim=-1).unsqueeze(0)
    x = affine_flow_inverse(torch.ones(1, 4, 1, dtype=F64), params, AffineSpec("softplus"), backend=backend)
    shifted = a + math.log(math.e - 1)
    expected = torch.stack([shifted[0].exp(), shifted[1].exp(), naive_sigma(a[2], "softplus"), shifted[3]])
    torch.testing.assert_close(x.flatten(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"z": 1.0}, TypeError, "z: expected a tensor"),
        ({"z": torch.zeros(3, 2)}, ValueError, "z: expected shape"),
        ({"params": torch.zeros(2, 3, 2)}, ValueError, r"params: expected shape \(2, 3, 4\)"),
        ({"guidance": 1.0}, ValueError, r"params: expected shape \(4, 3, 4\)"),
        ({"params": torch.zeros(4, 3, 4), "guidance": "strong"}, TypeError, "guidance: expected a number or a tensor"),
        ({"params": torch.zeros(4, 3, 4), "guidance": torch.zeros(2)}, ValueError, "guidance: shape"),
        ({"z": torch.zeros(2, 3, 2, requires_grad=True), "backend": "own"}, ValueError, "backend='own' cannot run"),
        ({"rule": "cfg"}, ValueError, "rule='cfg': expected one of 'tarflow', 'starflow', 'itarflow'"),
        ({"out": torch.zeros(2, 3, 1)}, ValueError, "out: expected shape"),
        ({"out": torch.zeros(2, 3, 2, dtype=F64)}, TypeError, "out: dtype torch.float64"),
        ({"params": torch.zeros(2, 3, 4, device="meta")}, ValueError, "params: on meta"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"z": torch.zeros(2, 3, 2), "params": torch.zeros(2, 3, 4)}
    with pytest.raises(error, match=message):
        affine_flow_inverse(**{**arguments, **change})


@needs_native
@pytest.mark.parametrize(
    "D, dtype, reason",
    [
        (2, F64, "z is torch.float64, it takes float32, bfloat16 and float16"),
        (8193, F32, "tokens of 8193 values, it takes up to 8192"),
    ],
    ids=str,
)
def test_native_refuses_with_the_reason(D, dtype, reason):
    with pytest.raises(ValueError, match=f"backend='native' cannot run affine_flow_inverse: {reason}"):
        affine_flow_inverse(*inputs(AffineSpec(), None, D=D, dtype=dtype), backend="native")
