"""A whole flow block from its weights, density and sampling direction."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

import torch

from .. import native
from ..affine_flow.api import empty_logdet
from ..checks import FLOATS, check_finite, check_guidance, check_range, check_tensor
from ..dispatch import register
from ..library import call, define
from ..progress import reporting_to
from ..spec import BlockSpec, GuidanceRule, Logdet, check_choice
from . import cpu, reference

CONTEXT = "Tensor? cond, Tensor? prefix, Tensor? cos, Tensor? sin"

define(
    "block_forward",
    f"Tensor x, Tensor[] weights, {CONTEXT}, str spec, str logdet",
    "(Tensor, Tensor)",
    fake=lambda x, *args: (x.new_empty(x.shape), empty_logdet(x, args[-1])),
    reference=reference.block_forward,
)
define(
    "block_inverse",
    f"Tensor z, Tensor[] weights, {CONTEXT}, Tensor? guidance, str spec, str rule, float temperature",
    "Tensor",
    fake=lambda z, *args: z.new_empty(z.shape),
    reference=reference.block_inverse,
)
register("block_forward", "native", cpu.block_forward, cpu.refuse, native.missing)
register("block_inverse", "native", cpu.block_inverse, cpu.refuse, native.missing)


def block_forward(
    x: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    spec: BlockSpec,
    *,
    cond: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    logdet: Logdet = "sum",
    dropout: float = 0.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data to noise through one flow block, all tokens at once (arXiv 2412.06329, eq. 3; 2506.06276, section 3).

    Args:
        x: (B, T, D) tokens in the order of the data; float32 (float64) is the dtype of a state.
        weights: name -> tensor, as `spec.weight_shapes` lists them, all of one dtype and device.
        spec: the block.
        cond: (B, C) added to every token, a class embedding say.
        prefix: (B, L, text_dim) states that stand in front of the tokens, causal with them.
        cos, sin: (L + T, head_dim / 2) of the rotary angles, in the block's own order.
        logdet: "sum", "mean" or "none", as in `affine_flow`.
        dropout: probability of dropout on the residual branches, where a gradient is asked for.
        backend: name of a backend; None takes the first that can.

    Returns:
        z (B, T, D) in the dtype of x and log|det dz/dx|, (B,) or (B, T, D). Where a gradient is asked for, the
        block is composed of `causal_attention` and `flow_head` on `backend`, which carry theirs, and of layers of
        torch, which autocast acts on; elsewhere the dtype of the weights is that of the network.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or value.
    """
    check_choice("logdet", logdet, Logdet)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: expected a probability of at least 0 and below 1")
    check_tensor("x", x, ("B", "T", spec.token_dim))
    tensors = _check_block(x, weights, spec, cond, prefix, cos, sin, rows=x.shape[0])
    context, inputs = (cond, prefix, cos, sin), (x, *tensors, cond, prefix)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return reference.compose(
            x,
            tensors,
            *context,
            spec,
            logdet,
            attention=functools.partial(call, "causal_attention", backend=backend),
            head=functools.partial(call, "flow_head", backend=backend),
            linear=_linear(tensors[0], backend),
            dropout=dropout,
        )
    return torch.ops.starflow.block_forward(x, tensors, *context, spec.to_json(), logdet, backend=backend)


def block_inverse(
    z: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    spec: BlockSpec,
    *,
    cond: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    guidance: float | torch.Tensor | None = None,
    rule: GuidanceRule = "tarflow",
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Noise to data through one flow block: T sequential steps over a KV cache.

    Args:
        z: (B, T, D) finite noise in the order of the data; float32 (float64) is the dtype of a sampled state.
        weights, spec, cos, sin, backend: as in `block_forward`.
        cond, prefix: as in `block_forward`; under guidance of 2B rows, first the B with the condition, then the same
            B without. Both kinds of row run as one batch.
        guidance: weight, a number or a tensor that broadcasts to (B, T), token t in the block's own order; None
            for no guidance.
        rule: "tarflow" or "starflow", as in `affine_flow_inverse`.
        temperature: attention temperature of the rows without a condition.
        progress: called as progress(done, B T) with the tokens that are done, now and then; what it raises ends the
            call.

    Returns:
        x (B, T, D) in the dtype of z: block_forward(x) = z. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or value; z, cond or prefix not finite.
    """
    check_choice("rule", rule, GuidanceRule)
    check_range("temperature", temperature, 0)
    check_tensor("z", z, ("B", "T", spec.token_dim))
    check_finite("z", z)
    B, T, _ = z.shape
    if guidance is not None:
        guidance = check_guidance(guidance, B, T, torch.float64, z.device)
    elif temperature != 1:
        raise ValueError(f"temperature={temperature} tempers the rows without a condition: it needs guidance")
    rows = B if guidance is None else 2 * B
    tensors = _check_block(z, weights, spec, cond, prefix, cos, sin, rows)
    for name, value in (("cond", cond), ("prefix", prefix)):
        if value is not None:
            check_finite(name, value)
    with torch.no_grad(), reporting_to(progress) if progress else contextlib.nullcontext():
        return torch.ops.starflow.block_inverse(
            z, tensors, cond, prefix, cos, sin, guidance, spec.to_json(), rule, temperature, backend=backend
        )


def _linear(weight: torch.Tensor, backend: str | None) -> Callable:
    """torch's linear layer, which autocast acts on, or ours where that is faster."""
    plain = backend is not None or weight.device.type != "cpu" or weight.dtype != torch.float32
    if plain or native.missing() or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear
    return functools.partial(call, "linear", backend=None)


def _check_block(x, weights, spec, cond, prefix, cos, sin, rows: int) -> list[torch.Tensor]:
    if weights.keys() != spec.weight_shapes.keys():
        missing, unknown = spec.weight_shapes.keys() - weights.keys(), weights.keys() - spec.weight_shapes.keys()
        raise ValueError(f"weights: missing {sorted(missing)}, unknown {sorted(unknown)}")
    tensors = [weights[name] for name in spec.weight_shapes]
    if not _alike(tensors, spec, x):
        for name, shape in spec.weight_shapes.items():
            check_tensor(f"weights[{name!r}]", weights[name], shape, like=x)
        raise TypeError(f"weights: expected one dtype, got {sorted({str(w.dtype) for w in tensors})}")
    T = x.shape[1]
    if spec.positions not in (0, T):
        raise ValueError(f"x or z: {T} tokens, but the learned position table has {spec.positions}")
    if cond is not None:
        check_tensor("cond", cond, (rows, spec.channels), like=x)
    if (prefix is not None) and not spec.text_dim:
        raise ValueError("prefix: given, but the block has text_dim=0")
    if prefix is not None:
        check_tensor("prefix", prefix, (rows, "L", spec.text_dim), like=x)
    if (spec.rotary != "none") != (cos is not None) or (cos is None) != (sin is None):
        raise ValueError(f"cos, sin: needed with rotary other than 'none', and only then; rotary={spec.rotary!r}")
    if cos is not None:
        angles = (T + (0 if prefix is None else prefix.shape[1]), spec.head_dim // 2)
        check_tensor("cos", cos, angles, like=x)
        check_tensor("sin", sin, angles, like=x)
        if cos.requires_grad or sin.requires_grad:
            raise ValueError("cos, sin: the rotary angles carry no gradient")
    return tensors


def _alike(tensors: list, spec: BlockSpec, x: torch.Tensor) -> bool:
    """Whether the weights are as they should be, all at once: a token of a small block takes a few microseconds."""
    if not all(isinstance(w, torch.Tensor) for w in tensors):
        return False
    dtype, device = tensors[0].dtype, x.device
    return (
        dtype in FLOATS
        and all(w.dtype == dtype and w.device == device for w in tensors)
        and [w.shape for w in tensors] == list(spec.weight_shapes.values())
    )
