"""Checks of the arguments of the public functions, and of values in the inverse ops.

The latter are part of the ops, and so of compiled and exported graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from .._core.checks import FLOATS, NonFiniteError, check_finite, check_guidance, check_range, check_tensor
from .._core.torch_private import is_intercepted
from ..solver import Solver, check_solver
from ..spec import BlockSpec, GuidanceRule, Quantize, check_choice


def checked_inverse(run: Callable, z, weights, cond, prefix, cos, sin, guidance, *options):
    """Return run(*arguments of block_inverse) of finite inputs."""
    check_finite(z=z, cond=cond, prefix=prefix, guidance=guidance)
    return run(z, weights, cond, prefix, cos, sin, guidance, *options)


def checked_jacobi(run: Callable, z, guess, weights, cond, prefix, cos, sin, guidance, *options):
    """Return run(*arguments of block_jacobi) of finite inputs; its result is finite."""
    check_finite(z=z, guess=guess, cond=cond, prefix=prefix, guidance=guidance)
    x, log_sigma, sweeps, counts, residual = run(z, guess, weights, cond, prefix, cos, sin, guidance, *options)
    failed = counts[:, 2]
    if failed.any():
        sample = int(failed.nonzero()[0])
        raise NonFiniteError(f"x, the result: values are not finite at token {failed[sample] - 1} of sample {sample}")
    return x, log_sigma, sweeps, counts, residual


def check_kinds(weights: object, spec: object) -> None:
    """Raise TypeError unless these are weights by name and a spec."""
    if not isinstance(spec, BlockSpec):
        raise TypeError(f"spec: expected a BlockSpec, got {type(spec).__name__}")
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected tensors by name, got {type(weights).__name__}")


def check_block(
    x: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    spec: BlockSpec,
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: int,
    layers: bool = True,
) -> list[torch.Tensor]:
    """Check the arguments of a block op beside its tokens; return the weights in the order of the spec.

    Args:
        x: tokens.
        weights: weights by name.
        spec: the block.
        cond: condition.
        prefix: text states.
        cos: cosines.
        sin: sines.
        rows: expected rows of cond and prefix.
        layers: whether weights of the layers are among them; if not, they are None in the result.
    """
    shapes = spec.weight_shapes
    if not layers:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("layers.")}
    tensors = ordered(weights, shapes)
    if not _alike(tensors, shapes, x):
        for name, shape in shapes.items():
            check_tensor(f"weights[{name!r}]", weights[name], shape, like=x)
        raise TypeError(f"weights: expected one dtype, got {sorted({str(w.dtype) for w in tensors})}")
    check_context(x, spec, cond, prefix, cos, sin, rows)
    return tensors if layers else [weights.get(name) for name in spec.weight_shapes]


def ordered(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[torch.Tensor]:
    """Return the weights in the order of their shapes by name, or raise ValueError."""
    if weights.keys() != shapes.keys():
        missing, unknown = shapes.keys() - weights.keys(), weights.keys() - shapes.keys()
        raise ValueError(f"weights: missing {sorted(missing)}, unknown {sorted(unknown)}")
    return [weights[name] for name in shapes]


def check_context(
    x: torch.Tensor,
    spec: BlockSpec,
    cond: torch.Tensor | None,
    prefix: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    rows: int,
) -> None:
    """Check the arguments of `check_block` beside the weights."""
    T = x.shape[1]
    # Dynamo does not find a size without a fixed value in a tuple.
    if spec.positions and spec.positions != T:
        raise ValueError(f"x or z: {T} tokens, but the learned position table has {spec.positions}")
    if cond is not None:
        per_token = isinstance(cond, torch.Tensor) and cond.ndim == 3
        check_tensor("cond", cond, (rows, T, spec.cond_dim) if per_token else (rows, spec.cond_dim), like=x)
    elif spec.adaptive:
        raise ValueError("cond: an adaptive block needs a condition")
    if (prefix is not None) and not spec.text_dim:
        raise ValueError("prefix: given, but the block has text_dim=0")
    if prefix is not None:
        check_tensor("prefix", prefix, (rows, "L", spec.text_dim), like=x)
    if (spec.rotary != "none") != (cos is not None) or (cos is None) != (sin is None):
        raise ValueError(f"cos, sin: needed with rotary other than 'none', and only then; rotary={spec.rotary!r}")
    if cos is not None and sin is not None:
        angles = (T + (0 if prefix is None else prefix.shape[1]), spec.head_dim // 2)
        check_tensor("cos", cos, angles, like=x)
        check_tensor("sin", sin, angles, like=x)
        if cos.requires_grad or sin.requires_grad:
            raise ValueError("cos, sin: the rotary angles carry no gradient")


def _alike(tensors: list, shapes: Mapping[str, tuple[int, ...]], x: torch.Tensor) -> bool:
    """Return whether all weights have these shapes. Full checks of each take longer than one token of a small block."""
    if not all(isinstance(w, torch.Tensor) for w in tensors):
        return False
    dtype, device = tensors[0].dtype, x.device
    return (
        dtype in FLOATS
        and all(w.dtype == dtype and w.device == device for w in tensors)
        and [w.shape for w in tensors] == list(shapes.values())
    )


def check_inverse(
    z: torch.Tensor,
    spec: BlockSpec,
    guidance: float | torch.Tensor | None = None,
    rule: GuidanceRule = "tarflow",
    temperature: float = 1.0,
    solver: Solver = Solver(),
    quantize: Quantize = "none",
) -> tuple[torch.Tensor | None, int]:
    """Check arguments that only `block_inverse` has; return the guidance weights, and the rows of its condition."""
    check_choice("rule", rule, GuidanceRule)
    check_choice("quantize", quantize, Quantize)
    check_solver(solver)
    check_range("temperature", temperature, 0)
    check_tensor("z", z, ("B", "T", spec.token_dim))
    if z.is_meta and not is_intercepted():
        raise ValueError("z: on meta, a device without values")
    B, T, _ = z.shape
    if guidance is not None:
        return check_guidance(guidance, B, T, torch.float64, z.device), 2 * B
    if temperature != 1:
        raise ValueError(f"temperature={temperature} needs guidance: it acts on the branch without a condition")
    return None, B
