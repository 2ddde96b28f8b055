"""flow_head in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_flow_head_triton.py."""

from __future__ import annotations

import pytest
import torch
from support.backends import require_interpreter
from support.contract import assert_within_contract, compiled, strided, with_gradients

from starflow_kernels import AffineSpec, flow_head

require_interpreter()
SPECS = [AffineSpec("exp"), AffineSpec("softplus"), AffineSpec("softplus", 1.5), AffineSpec("unit", 1.5)]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=[f"{s.scale}{'-clip' if s.soft_clip else ''}" for s in SPECS])
every_backend = pytest.mark.parametrize("backend", ["triton", "composed"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# bias, norm, shift, flip
PARTS = [
    (True, True, False, False),
    (False, True, True, False),
    (True, False, True, True),
    (False, True, False, True),
    (True, True, False, True),
    (True, False, True, False),
]


def inputs(spec, B, T, D, C, bias=True, norm=True, dtype=torch.float32) -> dict[str, torch.Tensor]:
    P = spec.params_dim(D)
    shapes = {"x": (B, T, D), "h": (B, T, C), "weight": (P, C)}
    shapes.update({"bias": (P,)} if bias else {}, **({"norm_weight": (C,)} if norm else {}))
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["weight"] *= 0.5 * C**-0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


@every_spec
@every_dtype
@every_backend
@pytest.mark.parametrize("T, D, C", [(65, 3, 65), (33, 48, 33), (17, 70, 80), (9, 200, 17)])
@pytest.mark.usefixtures("poisoned_memory")
def test_error_contract_around_the_blocks(T, D, C, backend, dtype, spec):
    """The error of one sum over tokens is a single draw, for torch too: the draws of all parts count together."""
    B, results = 3, {}
    for part, (bias, norm, shift, flip) in enumerate(PARTS):
        logdet = ("sum", "none", "mean")[part % 3]
        tensors = inputs(spec, B, T, D, C, bias, norm, dtype)
        names, tensors = list(tensors), [strided(t) for t in tensors.values()]
        seeds = torch.randn(B, T, D, dtype=dtype), torch.randn((B, T, D) if logdet == "none" else B)

        def run(tensors, backend):
            options = {"spec": spec, "shift": shift, "flip": flip, "logdet": logdet, "backend": backend}  # noqa: B023
            return with_gradients(lambda *t: flow_head(**dict(zip(names, t)), **options), tensors, seeds)  # noqa: B023

        exact = run([t.double() for t in tensors], "reference")
        for name, *values in zip(["z", logdet, *names], run(tensors, backend), run(tensors, "reference"), exact):
            results.setdefault(name, []).append([value.flatten() for value in values])
    for draws in results.values():
        assert_within_contract(*(torch.cat(values) for values in zip(*draws)))


def test_the_norm_takes_large_and_small_float16_states():
    spec = AffineSpec("unit")
    tensors = inputs(spec, 2, 5, 3, 40, dtype=torch.float16)
    for factor in (3e-5, 1e4):
        tensors["h"] = (factor * torch.randn(2, 5, 40)).to(torch.float16)
        exact = flow_head(**{name: t.double() for name, t in tensors.items()}, spec=spec, backend="reference")
        found, plain = (flow_head(**tensors, spec=spec, backend=name) for name in ("triton", "reference"))
        assert_within_contract(found[0], plain[0], exact[0])


@pytest.mark.parametrize("network", [torch.float32, torch.float16], ids=str)
def test_a_row_has_the_same_bits_alone(network):
    spec, B = AffineSpec("softplus", 4.0), 4
    tensors, seeds = list(inputs(spec, B, 70, 3, 40).values()), (torch.randn(B, 70, 3), torch.randn(B))
    tensors[1:] = [t.to(network) for t in tensors[1:]]

    def run(rows):
        given = [t[rows] for t in tensors[:2]] + tensors[2:]
        options = {"shift": True, "backend": "triton"}
        return with_gradients(lambda *t: flow_head(*t, spec, **options), given, [s[rows] for s in seeds])

    for row in (slice(0, 1), slice(3, 4)):
        for alone, batched in zip(run(row)[:4], run(slice(None))):
            assert torch.equal(alone, batched[row])


@every_backend
def test_no_rows(backend):
    tensors, seeds = list(inputs(AffineSpec(), 0, 5, 3, 7).values()), (torch.zeros(0, 5, 3), torch.zeros(0))
    results = with_gradients(lambda *t: flow_head(*t, backend=backend), tensors, seeds)
    assert [r.shape for r in results] == [(0, 5, 3), (0,), *(t.shape for t in tensors)]
    assert not any(r.any() for r in results)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"D": 257}, "tokens of 257 values"),
        ({"dtype": torch.float64}, "float32 and narrower"),
        ({"dtype": torch.bfloat16}, "no bfloat16"),
    ],
)
def test_refuses_with_the_reason(change, why):
    tensors = inputs(AffineSpec(), **{"B": 1, "T": 2, "D": 3, "C": 4, **change})
    with pytest.raises(ValueError, match=f"backend='triton' cannot run flow_head: .*{why}"):
        flow_head(**tensors, backend="triton")


def test_opcheck_and_compile():
    tensors = [t.requires_grad_() for t in inputs(AffineSpec(), 2, 5, 3, 7).values()]
    args = (*tensors, "softplus", 4.0, True, True, "mean")
    torch.library.opcheck(torch.ops.starflow.flow_head.default, args, {"backend": "triton"})

    def head(*tensors):
        return flow_head(*tensors, shift=True, backend="triton")

    seeds = torch.randn(2, 5, 3), torch.randn(2)
    eager, graph = (with_gradients(f, tensors, seeds) for f in (head, compiled(head)))
    assert all(torch.equal(*values) for values in zip(eager, graph))
