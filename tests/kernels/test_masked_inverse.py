"""masked_inverse: the inverse of an autoregressive transform whose parameters a masked network computes."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import cpu_backends, needs_native
from support.contract import assert_within_contract, strided
from support.masked import ACTIVATIONS, masked_layers, naive_forward, naive_network

from starflow_kernels import masked_inverse
from starflow_kernels.masked_inverse.api import MaskedLayer, MaskedPlan, Univariate

F64 = torch.float64
TRANSFORMS = [
    Univariate("affine_soft_clip"),
    Univariate("affine_softplus", scale_first=True),
    Univariate("affine_sigmoid", scale_first=True, epsilon=0.01),
    Univariate("affine_clamp", low=-0.5, high=0.4),
    Univariate("affine_convex"),
    Univariate("spline_soft_clip", bound=3.0),
    Univariate("spline_softmax", bins=5, bound=2.0, divisor=1.5, min_width=0.02, min_height=0.01),
    Univariate("spline_softmax", bins=1, bound=2.0),
]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{t.kind}-{t.bins}")


@pytest.fixture(params=cpu_backends("masked_inverse"))
def backend(request):
    return request.param


def solve(transform, B=5, D=7, order=None, dtype=F64, **options):
    """Return y, layers and an order."""
    order = torch.randperm(D) if order is None else order
    return (
        torch.randn(B, D, dtype=F64).to(dtype) * 1.5,
        masked_layers(order, transform, B, dtype=dtype, **options),
        order,
    )


def assert_solved(y, layers, transform, found, interleaved=True):
    """Check that f(x) = y with one pass of the network at x, and the log-determinant with the derivatives of f."""
    x, logdet = found
    B, D = y.shape
    params = naive_network(x, layers)
    params = params.view(B, D, -1) if interleaved else params.view(B, -1, D).transpose(1, 2)
    leaf = x.clone().requires_grad_()
    again = naive_forward(leaf, params, transform)
    (slopes,) = torch.autograd.grad(again.sum(), leaf)
    torch.testing.assert_close(again.detach(), y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logdet, -slopes.log().sum(1), rtol=1e-9, atol=1e-9)


@every_transform
@pytest.mark.parametrize("B, D", [(5, 7), (1, 1), (37, 3), (2, 33)])
@pytest.mark.usefixtures("poisoned_memory")
def test_solves_the_equation(transform, B, D, backend):
    y, layers, order = solve(transform, B, D)
    assert_solved(y, layers, transform, masked_inverse(y, layers, order, transform, backend=backend))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, backend):
    y, layers, order = solve(TRANSFORMS[0], activation=activation)
    layers[0] = layers[0]._replace(activation=activation)
    assert_solved(y, layers, TRANSFORMS[0], masked_inverse(y, layers, order, TRANSFORMS[0], backend=backend))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("transform", [TRANSFORMS[0], TRANSFORMS[6]], ids=["affine", "spline"])
def test_residuals_values_per_sample_and_both_layouts(transform, residual, per_sample, interleaved, backend):
    y, layers, order = solve(
        transform, 35, residual=residual, per_sample=per_sample, interleaved=interleaved, activation="tanh"
    )
    found = masked_inverse(y, layers, order, transform, interleaved=interleaved, backend=backend)
    assert_solved(y, layers, transform, found, interleaved)


def test_features_at_equal_positions_are_solved_together(backend):
    order = torch.tensor([4, 1, 1, 4, 9, 1])
    rank = torch.tensor([1, 0, 0, 1, 2, 0])
    y, layers, _ = solve(TRANSFORMS[0], D=6, order=rank)
    assert_solved(y, layers, TRANSFORMS[0], masked_inverse(y, layers, order, TRANSFORMS[0], backend=backend))


def test_one_layer_and_units_that_nothing_reads(backend):
    transform = Univariate("affine_softplus")
    order = torch.tensor([2, 0, 1])
    weight = torch.randn(6, 3, dtype=F64) * (order[:, None] > order).repeat_interleave(2, 0)
    layers = [MaskedLayer(weight, torch.zeros(6, dtype=F64))]
    y = torch.randn(4, 3, dtype=F64)
    assert_solved(y, layers, transform, masked_inverse(y, layers, order, transform, backend=backend))
    unread = MaskedLayer(torch.randn(2, 3, dtype=F64), torch.zeros(2, dtype=F64))
    last = MaskedLayer(torch.zeros(6, 2, dtype=F64), torch.randn(6, dtype=F64))
    found = masked_inverse(y, [unread, last], order, transform, backend=backend)
    assert_solved(y, [unread, last], transform, found)


def test_a_spline_is_the_identity_outside_of_its_bound(backend):
    transform = Univariate("spline_soft_clip", bound=1.0)
    _, layers, order = solve(transform, 2)
    y = torch.tensor([[1.0, -1.0, 7.0, 1e6, -3.0, 2.0, -1e4]] * 2, dtype=F64)
    x, logdet = masked_inverse(y, layers, order, transform, backend=backend)
    assert torch.equal(x, y) and torch.equal(logdet, torch.zeros(2, dtype=F64))


def test_large_raw_parameters(backend):
    """Neither end of softplus and sigmoid overflows, and widths that underflow leave a finite spline."""
    order = torch.arange(2)
    for transform in TRANSFORMS:
        offset = torch.tensor([-60.0, 60.0], dtype=F64).repeat(transform.params)
        layers = [MaskedLayer(torch.zeros(2 * transform.params, 2, dtype=F64), offset)]
        y = torch.tensor([[0.3, -0.7]], dtype=F64)
        x, logdet = masked_inverse(y, layers, order, transform, backend=backend)
        expected, log = masked_inverse(y, layers, order, transform, backend="reference")
        assert x.isfinite().all() and logdet.isfinite().all()
        torch.testing.assert_close((x, logdet), (expected, log), rtol=1e-11, atol=1e-11)


@every_transform
def test_error_contract_in_float32(transform, backend):
    y, layers, order = solve(transform, 200, 12, dtype=torch.float32, width=24, residual=True)
    wide = [layer._replace(weight=layer.weight.double(), offset=layer.offset.double()) for layer in layers]
    exact = masked_inverse(y.double(), wide, order, transform, backend="reference")
    plain = masked_inverse(y, layers, order, transform, backend="reference")
    for a, p, e in zip(masked_inverse(y, layers, order, transform, backend=backend), plain, exact):
        assert a.dtype == torch.float32
        assert_within_contract(a, p, e)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("transform", [TRANSFORMS[1], TRANSFORMS[5]], ids=["affine", "spline"])
def test_a_row_has_the_same_bits_at_any_batch_and_thread_count(transform, dtype):
    # Wide enough for several threads.
    y, layers, order = solve(transform, 150, 9, dtype=dtype, per_sample=True, activation="elu", width=200)

    def run(i=slice(None)):
        given = [
            layer._replace(
                offset=layer.offset if layer.offset.ndim == 1 else layer.offset[i],
                scale=None if layer.scale is None else layer.scale[i],
            )
            for layer in layers
        ]
        return masked_inverse(y[i], given, order, transform, backend="native")

    found = run()
    for rows in (slice(0, 1), slice(7, 8), slice(90, 113)):
        for alone, batched in zip(run(rows), found):
            assert torch.equal(alone, batched[rows])
    threads = torch.get_num_threads()
    for count in (2, 3):
        torch.set_num_threads(count)
        again = run()
        torch.set_num_threads(threads)
        assert all(map(torch.equal, again, found))


def test_a_row_that_is_not_finite_leaves_the_others(backend):
    """NaN also stays in the memory that the next call takes as its workspace."""
    y, layers, order = solve(TRANSFORMS[0], 8)
    x, logdet = masked_inverse(y, layers, order, TRANSFORMS[0], backend=backend)
    bad = y.clone()
    bad[3] = math.nan
    found, _ = masked_inverse(bad, layers, order, TRANSFORMS[0], backend=backend)
    assert found[3].isnan().all()
    for row in (0, 2, 4):
        assert torch.equal(found[row], x[row])
    again = masked_inverse(y, layers, order, TRANSFORMS[0], backend=backend)
    assert torch.equal(again[0], x) and torch.equal(again[1], logdet)


def test_strided_inputs_are_read_and_left(backend):
    y, layers, order = solve(TRANSFORMS[6], per_sample=True)
    expected = masked_inverse(y, layers, order, TRANSFORMS[6], backend=backend)
    apart = [
        layer._replace(
            weight=strided(layer.weight),
            offset=strided(layer.offset),
            scale=None if layer.scale is None else strided(layer.scale),
        )
        for layer in layers
    ]
    copy = strided(y)
    found = masked_inverse(copy, apart, torch.stack([order, order], 1)[:, 0], TRANSFORMS[6], backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(copy, y) and torch.equal(apart[0].weight, layers[0].weight)


def test_no_rows(backend):
    y, layers, order = solve(TRANSFORMS[5], 0, per_sample=True)
    x, logdet = masked_inverse(y, layers, order, TRANSFORMS[5], backend=backend)
    assert x.shape == (0, 7) and logdet.shape == (0,)


def test_tensors_that_need_a_gradient_are_constants(backend):
    y, layers, order = solve(TRANSFORMS[0])
    expected = masked_inverse(y, layers, order, TRANSFORMS[0], backend=backend)
    layers = [layer._replace(weight=layer.weight.requires_grad_()) for layer in layers]
    found = masked_inverse(y.requires_grad_(), layers, order, TRANSFORMS[0], backend=backend)
    assert not any(t.requires_grad for t in found)
    assert all(map(torch.equal, found, expected))


@needs_native
def test_a_plan_gives_the_same_bits_with_other_values_per_sample():
    y, layers, order = solve(TRANSFORMS[5], per_sample=True)
    plan = MaskedPlan(layers, order, TRANSFORMS[5], True)
    other = [layer._replace(scale=None if layer.scale is None else layer.scale + 1) for layer in layers]
    for given in (layers, other):
        planned = masked_inverse(y, given, order, TRANSFORMS[5], plan=plan, backend="native")
        assert all(map(torch.equal, planned, masked_inverse(y, given, order, TRANSFORMS[5], backend="native")))


@pytest.mark.parametrize("change", [{"dtype": torch.float32}, {"per_sample": True}, {"residual": True}, {"width": 5}])
def test_a_plan_of_another_form_is_refused(change):
    y, layers, order = solve(TRANSFORMS[0])
    _, others, _ = solve(TRANSFORMS[0], order=order, **change)
    with pytest.raises(ValueError, match="plan: it was made for layers"):
        masked_inverse(y, layers, order, TRANSFORMS[0], plan=MaskedPlan(others, order, TRANSFORMS[0], True))


def test_defaults_of_torch_do_not_matter(hostile, backend):
    y, layers, order = solve(TRANSFORMS[5], per_sample=True)
    expected = masked_inverse(y, layers, order, TRANSFORMS[5], backend=backend)
    hostile()
    assert all(map(torch.equal, masked_inverse(y, layers, order, TRANSFORMS[5], backend=backend), expected))


@needs_native
def test_a_network_that_is_not_autoregressive_is_refused():
    y, layers, order = solve(TRANSFORMS[0])
    layers[-1] = layers[-1]._replace(weight=torch.ones_like(layers[-1].weight))
    with pytest.raises(ValueError, match=r"layers: the parameters of feature . depend on inputs that are solved later"):
        masked_inverse(y, layers, order, TRANSFORMS[0], backend="native")


@needs_native
def test_compiles_between_two_graphs():
    y, layers, order = solve(TRANSFORMS[0])
    run = torch.compile(lambda y: masked_inverse(2 * y, layers, order, TRANSFORMS[0])[0] + 1, backend="eager")
    assert torch.equal(run(y), masked_inverse(2 * y, layers, order, TRANSFORMS[0])[0] + 1)


def changed(layers, index, **values):
    return [layer._replace(**values) if i == index else layer for i, layer in enumerate(layers)]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda y, n, o: (y[0], n, o), ValueError, r"y: expected shape \(B, D\)"),
        (lambda y, n, o: (y.int(), n, o), TypeError, "y: dtype torch.int32"),
        (lambda y, n, o: (y, [], o), ValueError, "layers: expected at least one"),
        (lambda y, n, o: (y, n[:-1], o), ValueError, "layers: expected 7 x 2 outputs, got 11"),
        (lambda y, n, o: (y, n[1:], o), ValueError, r"layers\[0\].weight: expected shape \(out, 7\)"),
        (lambda y, n, o: (y, n, o[:3]), ValueError, "order: expected a tensor of 7 integers"),
        (lambda y, n, o: (y, n, o.double()), ValueError, "order: expected a tensor of 7 integers"),
        (lambda y, n, o: (y.float(), n, o), TypeError, r"layers\[0\].weight: dtype torch.float64"),
        (lambda y, n, o: (y, changed(n, 1, offset=n[0].weight), o), ValueError, r"layers\[1\].offset: expected shape"),
        (lambda y, n, o: (y, changed(n, 1, scale=y), o), ValueError, r"layers\[1\].scale: expected shape \(5, 11\)"),
        (lambda y, n, o: (y, changed(n, 1, skip=1), o), ValueError, r"layers\[1\].skip=1: expected the index"),
        (lambda y, n, o: (y, changed(n, 1, skip="a"), o), ValueError, r"layers\[1\].skip='a': expected the index"),
        (lambda y, n, o: (y, changed(n, 3, skip=0), o), ValueError, r"layers\[3\].skip=0: expected the index"),
        (lambda y, n, o: (y, changed(n, 1, activation="mish"), o), ValueError, r"layers\[1\].activation='mish'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        masked_inverse(*change(*solve(TRANSFORMS[0])), TRANSFORMS[0])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": torch.nn.Linear(7, 14)}, "layers: expected a sequence of MaskedLayer, got Linear"),
        ({"layers": MaskedLayer(torch.eye(7), torch.zeros(7))}, "layers: expected a sequence of MaskedLayer"),
        ({"layers": [torch.nn.Linear(7, 14)]}, r"layers\[0\]: expected a MaskedLayer, got Linear"),
        ({"transform": "affine_softplus"}, "transform: expected a Univariate, got str"),
        ({"plan": True}, "plan: expected a MaskedPlan, got bool"),
    ],
)
def test_arguments_of_another_kind(wrong, message):
    y, layers, order = solve(TRANSFORMS[0])
    given = {"layers": layers, "order": order, "transform": TRANSFORMS[0], **wrong}
    with pytest.raises(TypeError, match=message):
        masked_inverse(y, **given)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "affine"}, "kind='affine'"),
        ({"kind": "spline_softmax", "bins": 0}, "bins=0"),
        ({"slope": 1.0}, "slope"),
    ],
)
def test_a_map_that_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Univariate(**{"kind": "affine_soft_clip", **options})


@needs_native
def test_native_refuses_with_the_reason():
    y, layers, order = solve(TRANSFORMS[0], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"cannot run masked_inverse: y is torch\.float16, it takes"):
        masked_inverse(y, layers, order, TRANSFORMS[0], backend="native")
