"""block_forward, block_inverse and block_params: a whole flow block."""

from __future__ import annotations

import pytest
import torch
from support.backends import cpu_backends, on_backends
from support.blocks import BLOCKS, F64, T, block, every_block, of_tensors
from support.contract import assert_same_row, assert_within_contract, compiled, strided, with_gradients
from support.naive import reduced
from support.naive_block import naive_forward, naive_inverse, naive_params

from starflow_kernels import affine_flow, block_forward, block_inverse, block_params

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def takes(backend, dtype=F64):
    """Whether a backend takes weights of this dtype; tokens are float32 or wider."""
    return backend != "native" or dtype in (F32, BF16)


@pytest.fixture(params=cpu_backends("block_forward", takes))
def forward(request):
    """Backends that take float64."""
    return request.param


@pytest.fixture(params=cpu_backends("block_inverse", takes))
def inverse(request):
    """Backends that take float64."""
    return request.param


@every_block
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_matches_naive_network(case, forward):
    x, w, spec, context = block(case)
    expected, minus_log_sigma = naive_forward(x, w, spec, **context)
    for logdet in ("sum", "mean", "none"):
        z, ld = block_forward(x, w, spec, **context, logdet=logdet, backend=forward)
        torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ld, reduced(minus_log_sigma, logdet), rtol=1e-10, atol=1e-10)


@every_block
def test_forward_with_gradients_is_the_same(case, forward):
    """A block with gradients is composed of smaller ops: same values, gradients of the naive network."""
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
    back = block_inverse(z, w, spec, **context, backend=inverse).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)
    other = block_inverse(x, w, spec, **context, backend=inverse).x
    torch.testing.assert_close(block_forward(other, w, spec, **context, backend=forward)[0], x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text"])
@pytest.mark.parametrize("tokens", [1, 2, 63, 111])
def test_round_trip_of_sizes(name, tokens, forward, inverse):
    x, w, spec, context = block(BLOCKS[name], tokens=tokens, layers=1)
    z, _ = block_forward(x, w, spec, **context, backend=forward)
    torch.testing.assert_close(z, naive_forward(x, w, spec, **context)[0], rtol=1e-10, atol=1e-10)
    back = block_inverse(z, w, spec, **context, backend=inverse).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("D, head_dim", [(1, 8), (3, 24), (192, 80)])
def test_round_trip_of_widths(D, head_dim, forward, inverse):
    x, w, spec, context = block(BLOCKS["starflow-grouped"], token_dim=D, head_dim=head_dim)
    z, _ = block_forward(x, w, spec, **context, backend=forward)
    torch.testing.assert_close(z, naive_forward(x, w, spec, **context)[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block_inverse(z, w, spec, **context, backend=inverse).x, x, rtol=0, atol=1e-9)


@every_block
@pytest.mark.parametrize("rule", ["tarflow", "starflow", "itarflow"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_guided_inverse_matches_two_passes(case, rule, temperature, inverse):
    z, w, spec, context = block(case, copies=2)
    g = torch.rand(2, T, dtype=F64) * 2
    x = block_inverse(z, w, spec, **context, guidance=g, rule=rule, temperature=temperature, backend=inverse).x
    expected = naive_inverse(z, w, spec, context, g, rule, temperature)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["tarflow", "starflow", "itarflow"])
def test_guidance_is_by_token_of_the_blocks_own_order(rule, inverse):
    z, w, spec, context = block(BLOCKS["tarflow-flip"], copies=2)
    g = torch.tensor([0.0, 0.0, 0.0, 1.5, 0.0], dtype=F64)
    unguided = {"cond": context["cond"][:2]}
    plain = block_inverse(z, w, spec, **unguided, backend=inverse).x.flip(1)
    guided = block_inverse(z, w, spec, **context, guidance=g, rule=rule, backend=inverse).x.flip(1)
    torch.testing.assert_close(guided[:, :3], plain[:, :3], rtol=1e-10, atol=1e-10)
    assert (guided[:, 3] - plain[:, 3]).abs().min() > 1e-6


def test_temperature_tells_the_branches_apart_without_a_condition(inverse):
    z, w, spec, context = block(BLOCKS["starflow"])
    plain = block_inverse(z, w, spec, **context, backend=inverse).x
    same = block_inverse(z, w, spec, **context, guidance=1.0, backend=inverse).x
    torch.testing.assert_close(same, plain, rtol=1e-10, atol=1e-10)
    tempered = block_inverse(z, w, spec, **context, guidance=1.0, temperature=0.5, backend=inverse).x
    expected = naive_inverse(z, w, spec, context, torch.ones(2, T, dtype=F64), "tarflow", 0.5)
    torch.testing.assert_close(tempered, expected, rtol=1e-10, atol=1e-10)
    assert (tempered - plain).abs().max() > 1e-3


CONTRACT = ["tarflow-flip", "tarflow-swiglu", "starflow-text", "starflow-all-norms"]
WIDE = {"token_dim": 8, "channels": 48, "mlp_dim": 96}  # enough values that the largest errors are typical


def in_double(x, w, context):
    """Return the values in float64."""
    return x.double(), {n: t.double() for n, t in w.items()}, {n: t.double() for n, t in context.items()}


@on_backends("block_forward", takes, dtype=[F32, BF16, F16])
@pytest.mark.parametrize("name", CONTRACT)
def test_forward_error_contract(dtype, name, backend):
    x, w, spec, context = block(BLOCKS[name], B=8, tokens=17, dtype=dtype, **WIDE)
    x64, w64, context64 = in_double(x, w, context)
    z, ld = block_forward(x, w, spec, **context, logdet="none", backend=backend)
    assert (z.dtype, ld.dtype) == (F32, F32)
    plain, exact = naive_forward(x, w, spec, **context), naive_forward(x64, w64, spec, **context64)
    assert_within_contract(z, plain[0], exact[0])
    assert_within_contract(ld, plain[1], exact[1])


@on_backends("block_inverse", takes, dtype=[F32, BF16, F16])
@pytest.mark.parametrize("name", CONTRACT)
def test_inverse_error_contract(dtype, name, backend):
    z, w, spec, context = block(BLOCKS[name], B=8, tokens=17, dtype=dtype, **WIDE)
    z64, w64, context64 = in_double(z, w, context)
    x = block_inverse(z, w, spec, **context, backend=backend).x
    assert x.dtype == F32
    assert_within_contract(x, naive_inverse(z, w, spec, context), naive_inverse(z64, w64, spec, context64))


@on_backends("block_inverse", takes, dtype=[F32, BF16, F16])
@pytest.mark.parametrize("rule", ["tarflow", "starflow", "itarflow"])
def test_guided_error_contract(dtype, rule, backend):
    z, w, spec, context = block(BLOCKS["starflow-text"], B=8, tokens=17, copies=2, dtype=dtype, **WIDE)
    z64, w64, context64 = in_double(z, w, context)
    g = torch.full((8, 17), 1.5)
    x = block_inverse(z, w, spec, **context, guidance=g, rule=rule, temperature=0.7, backend=backend).x
    plain = naive_inverse(z, w, spec, context, g, rule, 0.7)
    exact = naive_inverse(z64, w64, spec, context64, g.double(), rule, 0.7)
    assert_within_contract(x, plain, exact)


@pytest.fixture(params=cpu_backends("block_params", takes))
def backend(request):
    """Backends of block_params that take float64."""
    return request.param


@every_block
@pytest.mark.usefixtures("poisoned_memory")
def test_params_match_naive_network(case, backend):
    x, w, spec, context = block(case)
    params = block_params(x, w, spec, **context, backend=backend)
    torch.testing.assert_close(params, naive_params(x, w, spec, **context), rtol=1e-10, atol=1e-10)


@on_backends("block_params", takes, dtype=[F32, BF16, F16])
@pytest.mark.parametrize("name", ["tarflow-flip", "tarflow-swiglu", "starflow-text", "starflow-all-norms"])
def test_params_error_contract(dtype, name, backend):
    wide = {"token_dim": 8, "channels": 48, "mlp_dim": 96}
    x, w, spec, context = block(BLOCKS[name], B=8, tokens=17, dtype=dtype, **wide)
    params = block_params(x, w, spec, **context, backend=backend)
    plain = naive_params(x, w, spec, **context)
    wide_weights, wide_context = ({n: t.double() for n, t in d.items()} for d in (w, context))
    assert params.dtype == x.dtype
    assert_within_contract(params, plain, naive_params(x.double(), wide_weights, spec, **wide_context))


@on_backends("block_params", takes, dtype=[F32])
@pytest.mark.parametrize("name", ["tarflow-start-flip", "tarflow-unit", "starflow-text", "starflow-identity-first"])
def test_params_are_those_of_the_affine_flow(name, dtype, backend):
    x, w, spec, context = block(BLOCKS[name], dtype=dtype)
    params = block_params(x, w, spec, **context, backend=backend)
    expected = block_forward(x, w, spec, **context, backend=backend)
    torch.testing.assert_close(affine_flow(x, params, spec.affine), expected, rtol=1e-5, atol=1e-5)


@on_backends("block_params", takes, dtype=[F32, F64])
def test_params_of_both_branches_are_those_of_each(dtype, backend):
    """The rows of guidance are a batch like any other."""
    x, w, spec, context = block(BLOCKS["starflow-text-flip-cond"], copies=2, dtype=dtype)
    both = block_params(x.repeat(2, 1, 1), w, spec, **context, backend=backend)
    for rows in (slice(2), slice(2, 4)):
        branch = {n: t if n in ("cos", "sin") else t[rows] for n, t in context.items()}
        assert_same_row(backend, block_params(x, w, spec, **branch, backend=backend), both[rows])


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
        block_inverse(*copies, **context_copies, backend=inverse).x,
        block_inverse(x, w, spec, **context, backend=inverse).x,
        rtol=1e-11,
        atol=1e-11,
    )
    assert torch.equal(copies[0], x) and all(torch.equal(copies[1][n], w[n]) for n in w)
    assert all(torch.equal(context_copies[n], context[n]) for n in context)


@on_backends("block_forward", takes, dtype=[F32, F64])
def test_forward_batch_invariance(dtype, backend):
    x, w, spec, context = block(BLOCKS["tarflow-flip"], B=4, dtype=dtype)
    batch = block_forward(x, w, spec, **context, backend=backend)
    for i in range(4):
        row = block_forward(x[i : i + 1], w, spec, cond=context["cond"][i : i + 1], backend=backend)
        for alone, batched in zip(row, batch):
            assert_same_row(backend, alone, batched[i : i + 1])


@on_backends("block_inverse", takes, dtype=[F32, F64])
def test_inverse_batch_invariance(dtype, backend):
    z, w, spec, context = block(BLOCKS["tarflow-flip"], B=4, copies=2, dtype=dtype)
    batch = block_inverse(z, w, spec, **context, guidance=0.5, backend=backend).x
    for i in range(4):
        cond = context["cond"][[i, i + 4]]
        alone = block_inverse(z[i : i + 1], w, spec, cond=cond, guidance=0.5, backend=backend).x
        assert_same_row(backend, alone, batch[i : i + 1])


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text"])
def test_opcheck(name):
    x, w, spec, context = block(BLOCKS[name])
    given = [context.get(n) for n in ("cond", "prefix", "cos", "sin")]
    torch.library.opcheck(
        torch.ops.starflow.block_forward.default, (x, list(w.values()), *given, spec.to_json(), "mean")
    )
    torch.library.opcheck(torch.ops.starflow.block_params.default, (x, list(w.values()), *given, spec.to_json()))
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
        return *block_forward(x, w, spec, **one), block_inverse(x, w, spec, **context, guidance=1.0, temperature=0.7).x

    torch.testing.assert_close(compiled(both, compiler)(x), both(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text"])
def test_compiles_with_gradients(name):
    x, w, spec, context = block(BLOCKS[name])
    flow, tensors = of_tensors(block_forward, x, w, spec, context)
    seeds = torch.randn_like(x), torch.randn(2)
    eager, graph = (with_gradients(f, tensors, seeds) for f in (flow, compiled(flow)))
    torch.testing.assert_close(graph, eager, rtol=1e-10, atol=1e-10)


@every_block
def test_layers_that_a_caller_runs_are_the_same(case):
    x, w, spec, context = block(case)
    outer = {name: weight for name, weight in w.items() if not name.startswith("layers.")}
    numbers = []

    def run_layer(number, layer, *states):
        numbers.append(number)
        start = f"layers.{number}."
        return layer({n.removeprefix(start): weight for n, weight in w.items() if n.startswith(start)}, *states)

    for tensor in w.values():
        tensor.requires_grad_()
    found = block_forward(x, outer, spec, **context, run_layer=run_layer)
    assert numbers == list(range(spec.layers))
    torch.testing.assert_close(found, block_forward(x, w, spec, **context), rtol=0, atol=0)
    gradients = torch.autograd.grad(found[1].sum(), list(w.values()), allow_unused=True)
    expected = torch.autograd.grad(block_forward(x, w, spec, **context)[1].sum(), list(w.values()), allow_unused=True)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"unknown \['layers.0"):
        block_forward(x, w, spec, **context, run_layer=run_layer)
    with pytest.raises(TypeError, match="run_layer: expected a function"):
        block_forward(x, outer, spec, **context, run_layer=1)
