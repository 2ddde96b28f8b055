"""Gradients of block_inverse and solve_inverse with respect to noise, data, weights and conditions."""

from __future__ import annotations

import pytest
import torch
from support.arranged import B, drawn_call, of_first_branch, one_sample, own_tokens
from support.blocks import BLOCKS, F64, T, block
from support.naive import naive_affine, naive_raw
from support.naive_block import naive_network

from starflow_kernels import AffineSpec, Solver, affine_flow, block_forward, block_inverse, solve_inverse


def plain_loop(z, w, spec, context, order, lengths, data, known):
    """Return x (B, T, D) by a loop over samples and tokens that autograd differentiates."""
    x = []
    for b in range(B):
        rows, tokens = list(z[b].unbind()), own_tokens(spec, order, lengths, b)
        weights, plain, given = one_sample(w, spec, context, tokens, b)
        for place, t in enumerate(tokens):
            if known is not None and place < known[b]:
                rows[t] = data[b, t]
            elif spec.start or place:
                so_far = torch.stack([rows[s] for s in tokens])[None]
                slot = place if spec.start else place - 1
                mu, sigma = naive_raw(naive_network(so_far, weights, plain, **given)[:, slot], spec.affine)
                rows[t] = (mu + sigma * z[b, t])[0]
        x.append(torch.stack(rows))
    return torch.stack(x)


def with_leaves(values):
    return {n: v if n in ("cos", "sin") else v.detach().requires_grad_() for n, v in values.items()}


@pytest.mark.parametrize("part", range(20))
def test_gradients_are_those_of_a_plain_loop(part):
    """Also those of a loss that holds the log-determinant."""
    for seed in range(part, 100, 20):
        z, w, spec, context, layout, inverse = drawn_call(seed)
        z, w, context = z.requires_grad_(), with_leaves(w), with_leaves(of_first_branch(context))
        data = None if inverse["data"] is None else inverse["data"].requires_grad_()
        given = {"data": data, "known": inverse["known"]}
        leaves = [t for t in (z, data, *w.values(), *context.values()) if t is not None and t.requires_grad]
        seeds, gradients = torch.randn_like(z), []
        found, x = (
            block_inverse(z, w, spec, **context, **layout, **given),
            plain_loop(z, w, spec, context, **layout, **given),
        )
        _, values = block_forward(x, w, spec, **context, **layout, logdet="none")
        if inverse["known"] is not None:
            values = torch.where(found.x == data, 0, values)
        for data_found, logdet in ((found.x, found.logdet), (x, -values.sum((1, 2)))):
            loss = (data_found * seeds).sum() + 0.3 * logdet.square().sum()
            gradients.append(torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True))
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["tarflow-flip", "starflow-text", "tarflow-unit", "starflow-grouped"])
def test_gradcheck(name):
    z, w, spec, context = block(BLOCKS[name], B=2, tokens=3, layers=1)
    names = [n for n in context if n not in ("cos", "sin")]
    fixed = {n: v for n, v in context.items() if n not in names}

    def inverse(z, *values):
        weights, given = dict(zip(w, values)), dict(zip(names, values[len(w) :]))
        return block_inverse(z, weights, spec, **given, **fixed).x

    tensors = [t.requires_grad_() for t in (z, *w.values(), *(context[n] for n in names))]
    assert torch.autograd.gradcheck(inverse, tensors, fast_mode=True)


def test_a_second_derivative_is_refused():
    z, w, spec, context = block(BLOCKS["tarflow"])
    x = block_inverse(z.requires_grad_(), w, spec, **context).x
    with pytest.raises(NotImplementedError, match="the gradient of an inverse has no derivative"):
        torch.autograd.grad(x.square().sum(), z, create_graph=True)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_a_solution_that_diverges_on_the_way_is_exact(scale):
    """With strong dependences, plain sweeps grow by many orders of magnitude before they end."""
    spec = AffineSpec("unit")
    mix = torch.randn(30, 30, dtype=F64).tril(-1) * scale
    z = torch.randn(2, 30, 1, dtype=F64, requires_grad=True)
    conditioner = lambda x: torch.einsum("ts,bsd->btd", mix, x)  # noqa: E731
    x = solve_inverse(conditioner, z, spec).x
    g = torch.randn_like(x)
    (grad,) = torch.autograd.grad(x, z, g)
    jacobian = torch.eye(30, dtype=F64) - mix
    expected = torch.linalg.solve_triangular(jacobian.T, g[..., 0].T, upper=True).T[..., None]
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=0)


class Conditioner(torch.nn.Module):
    """Raw parameters from the mean of the earlier tokens and a condition."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 6, dtype=F64)

    def forward(self, x, cond):
        count = torch.arange(x.shape[1], dtype=F64).clamp(min=1)[:, None]
        before = torch.nn.functional.pad(x.cumsum(1)[:, :-1], (0, 0, 1, 0)) / count
        return self.linear(torch.cat([before, cond[:, None].expand(-1, x.shape[1], -1)], -1)).tanh()


@pytest.mark.parametrize("solver", [Solver(), Solver("jacobi", tol=1e-13)])
def test_gradients_of_any_conditioner(solver):
    conditioner, spec = Conditioner(), AffineSpec("softplus", 4.0)
    z, cond = torch.randn(2, 6, 3, dtype=F64, requires_grad=True), torch.randn(2, 2, dtype=F64, requires_grad=True)
    leaves, seeds, gradients = [z, cond, *conditioner.parameters()], torch.randn(2, 6, 3, dtype=F64), []
    rows = []
    for t in range(6):
        so_far = torch.stack([*rows, *[torch.zeros_like(z[:, 0])] * (6 - t)], 1)
        mu, sigma = naive_raw(conditioner(so_far, cond)[:, t], spec)
        rows.append(mu + sigma * z[:, t])
    for x in (solve_inverse(conditioner, z, spec, context=(cond,), solver=solver).x, torch.stack(rows, 1)):
        z_again, logdet = affine_flow(x, conditioner(x, cond), spec)
        loss = (x * seeds).sum() + logdet.square().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
        torch.testing.assert_close(z_again, z)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_float32_gradients_are_close_to_float64():
    z, w, spec, context = block(BLOCKS["starflow-grouped"], B=3)
    gradients = []
    for dtype in (torch.float32, F64):
        leaf, weights, given = (
            z.to(dtype).requires_grad_(),
            *({n: v.to(dtype) for n, v in d.items()} for d in (w, context)),
        )
        gradients.append(torch.autograd.grad(block_inverse(leaf, weights, spec, **given).x.square().sum(), leaf)[0])
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=1e-4)


def test_a_row_has_the_gradient_that_it_has_alone():
    z, w, spec, context = block(BLOCKS["tarflow-flip"], B=4)
    z = z.requires_grad_()
    (whole,) = torch.autograd.grad(block_inverse(z, w, spec, **context).x.square().sum(), z)
    for i in range(4):
        x = block_inverse(z[i : i + 1], w, spec, cond=context["cond"][i : i + 1]).x
        torch.testing.assert_close(torch.autograd.grad(x.square().sum(), z)[0][i], whole[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens, rows", [(1, 2), (T, 0)])
def test_one_token_and_no_rows(tokens, rows):
    z, w, spec, context = block(BLOCKS["starflow"], B=rows, tokens=tokens)
    x = block_inverse(z.requires_grad_(), w, spec, **context).x
    (grad,) = torch.autograd.grad(x.sum(), z)
    assert grad.shape == z.shape and grad.isfinite().all()


def test_no_gradient_where_none_is_asked_for():
    z, w, spec, context = block(BLOCKS["tarflow"])
    assert not block_inverse(z, w, spec, **context).x.requires_grad
    with torch.no_grad():
        assert not block_inverse(z.requires_grad_(), w, spec, **context).x.requires_grad
    x = block_inverse(z, w, spec, **context).x
    torch.testing.assert_close(naive_affine(x, naive_network(x, w, spec, **context), spec.affine, shift=True)[0], z)


@pytest.mark.parametrize(
    "options, where",
    [({"guidance": 1.0}, "under guidance"), ({"quantize": "int8"}, "with quantize='int8'")],
)
def test_a_gradient_that_does_not_exist_is_refused(options, where):
    z, w, spec, context = block(BLOCKS["starflow"])
    with pytest.raises(ValueError, match=f"z, data, cond, prefix: the inverse has no gradient {where}"):
        block_inverse(z.requires_grad_(), w, spec, **context, **options)
    w = {name: weight.requires_grad_() for name, weight in w.items()}
    assert not block_inverse(z.detach(), w, spec, **context, **options).x.requires_grad


def test_a_graph_has_no_gradient_of_the_noise():
    z, w, spec, context = block(BLOCKS["starflow"])
    inverse = torch.compile(lambda z: block_inverse(z, w, spec, **context).x, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="the inverse has no gradient in a graph; detach them"):
        inverse(z.requires_grad_())


@pytest.mark.parametrize("name", ["order", "lengths", "cos", "cond", "weights"])
def test_changes_before_the_backward_pass(name):
    """Numbers are copied; tensors are saved, and torch refuses a gradient from changed ones."""
    z, w, spec, context = block(BLOCKS["starflow-grouped"], B=B)
    given = {**context, "order": torch.randperm(T), "lengths": torch.tensor([3, 5, 2])}
    found, other = (block_inverse(z.requires_grad_(), w, spec, **given) for _ in range(2))
    (expected,) = torch.autograd.grad(found.x.sum() + found.logdet.sum(), z)
    changed = w["proj_out.bias"] if name == "weights" else given[name]
    changed.copy_(changed.flip(0) + (0 if name in ("order", "lengths") else 1))
    if name in ("order", "lengths"):
        torch.testing.assert_close(torch.autograd.grad(other.x.sum() + other.logdet.sum(), z)[0], expected)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other.x.sum(), z)
    with pytest.raises(RuntimeError, match="logdet: weights, conditions or x were modified in place"):
        other.logdet  # noqa: B018


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_gradient_that_is_nan_reaches_all_earlier_tokens(backend):
    z, w, spec, context = block(BLOCKS["starflow"], dtype=torch.float32)
    x = block_inverse(z.requires_grad_(), w, spec, **context, backend=backend).x
    gradient = torch.zeros_like(x)
    gradient[:, -1, 0] = torch.nan
    assert torch.autograd.grad(x, z, gradient)[0].isnan().any(-1).all()


def test_batched_gradients_are_refused():
    z, w, spec, context = block(BLOCKS["starflow"])
    x = block_inverse(z.requires_grad_(), w, spec, **context).x
    with pytest.raises(NotImplementedError, match="takes no batch of gradients"):
        torch.autograd.grad(x, z, torch.ones(2, *x.shape).double(), is_grads_batched=True)


def test_a_result_that_is_changed_before_the_backward_pass():
    z, w, spec, context = block(BLOCKS["starflow"])
    x = block_inverse(z.requires_grad_(), w, spec, **context).x
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_a_logdet_that_is_read_without_gradients_has_one():
    z, w, spec, context = block(BLOCKS["starflow"])
    found = block_inverse(z.requires_grad_(), w, spec, **context)
    with torch.inference_mode():
        value = found.logdet.sum().item()
    assert found.logdet.requires_grad and abs(found.logdet.sum().item() - value) < 1e-12


def test_a_function_that_uses_trainable_tensors_is_refused():
    layer, z = torch.nn.Linear(3, 6, dtype=F64), torch.randn(2, 4, 3, dtype=F64)

    def shifted(x):
        return layer(torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])

    assert not solve_inverse(shifted, z).x.requires_grad
    with pytest.raises(ValueError, match="conditioner: it uses tensors with gradients; make it an"):
        solve_inverse(shifted, z.requires_grad_())


def _gradient(z, w, spec, context, dtype):
    leaf = z.float().requires_grad_()
    weights = {name: value.to(torch.bfloat16).to(dtype) for name, value in w.items()}
    x = block_inverse(leaf, weights, spec, **{name: value.float() for name, value in context.items()}).x
    return torch.autograd.grad(x.square().sum(), leaf)[0]


def test_gradients_by_bfloat16_weights_are_close_to_those_in_float32():
    z, w, spec, context = block(BLOCKS["starflow-grouped"], B=3)
    wide, narrow = (_gradient(z, w, spec, context, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (narrow - wide).norm() < 0.03 * wide.norm()
