"""A whole flow block from its weights, density and sampling direction."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping

import torch

from .._core import compiled, compiled_cuda
from .._core.checks import FLOATS, check_finite, check_guidance, check_range, check_tensor
from .._core.dispatch import register
from .._core.registration import call, define
from .._triton import runtime
from ..affine_flow.api import empty_logdet
from ..residual_norm.api import EPS
from ..solver import Solver, SolveReport
from ..spec import BlockSpec, GuidanceRule, Logdet, check_choice
from . import cuda, jacobi, native, reference
from .progress import reporting_to
from .quantize import Quantize, on_rounded, rounded

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
    f"Tensor z, Tensor[] weights, {CONTEXT}, Tensor? guidance, str spec, str rule, float temperature, "
    'str quantize="none"',
    "Tensor",
    fake=lambda z, *args: z.new_empty(z.shape),
    reference=on_rounded(reference.block_inverse),
)
define(
    "block_jacobi",
    f"Tensor z, Tensor guess, Tensor[] weights, {CONTEXT}, Tensor? guidance, int[] neighbours, "
    "str spec, str rule, float temperature, int window, bool slide, float tol",
    "(Tensor, Tensor, Tensor, Tensor)",
    fake=lambda z, *args: (
        z.new_empty(z.shape),
        z.new_empty(z.shape[:2], dtype=torch.int32),
        z.new_empty(len(z), 3, dtype=torch.int64),
        z.new_empty(len(z)),
    ),
    reference=jacobi.block_jacobi,
)
register("block_forward", "native", native.block_forward, native.refuse, compiled.missing)
register("block_inverse", "native", on_rounded(native.block_inverse), native.refuse, compiled.missing)
register("block_jacobi", "native", native.block_jacobi, native.refuse_jacobi, compiled.missing)
runtime.register("block_inverse", "block.triton.sequential", backward=False)
# Preferred where a block fits: one launch in place of some for every token.
register("block_inverse", "cuda", on_rounded(cuda.block_inverse), on_rounded(cuda.refuse), compiled_cuda.missing)
runtime.register("block_jacobi", "block.triton.sweeps", backward=False)


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
        block is composed of `causal_attention` and `flow_head` on `backend`, which carry theirs, on a GPU of
        `residual_norm` and `bias_gelu` too, and of layers of torch, which autocast acts on; elsewhere the dtype of the
        weights is that of the network.

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
            glue=_glue(x, backend),
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
    solver: Solver = Solver(),
    guess: torch.Tensor | None = None,
    quantize: Quantize = "none",
    return_report: bool = False,
    progress: Callable[[int, int], None] | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, SolveReport]:
    """Noise to data through one flow block over a KV cache: T sequential steps, or fewer passes over many tokens each.

    Args:
        z: (B, T, D) finite noise in the order of the data; float32 (float64) is the dtype of a sampled state.
        weights, spec, cos, sin, backend: as in `block_forward`.
        cond, prefix: as in `block_forward`; under guidance of 2B rows, first the B with the condition, then the same
            B without. Both kinds of row run as one batch.
        guidance: weight, a number or a tensor that broadcasts to (B, T), token t in the block's own order; None
            for no guidance.
        rule: "tarflow" or "starflow", as in `affine_flow_inverse`.
        temperature: attention temperature of the rows without a condition.
        solver: sequential, or Jacobi sweeps over windows of tokens, each sample in its own number of passes.
        guess: (B, T, D) finite first values of Jacobi in the order of the data, in place of the solver's.
        quantize: "int8" or "fp8" (torch.float8_e4m3fn) rounds the matrices of the layers to one byte a value, with a
            float32 scale for every output channel; norms, biases, position table, start token and the projections of
            tokens, text and head stay as they are. "none" for none. The README of this op has its error.
        return_report: return a SolveReport beside x.
        progress: called as progress(done, B T) with the tokens that are done, now and then; what it raises ends the
            call.

    Returns:
        x (B, T, D) in the dtype of z: block_forward(x) = z. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, device or value; z, cond or prefix not finite; by
            Jacobi a result that is not finite, with its sample and token.
    """
    check_choice("rule", rule, GuidanceRule)
    check_choice("quantize", quantize, Quantize)
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
    if guess is not None and solver.method != "jacobi":
        raise ValueError("guess: given, but the sequential solver needs none")
    context = cond, prefix, cos, sin, guidance
    with torch.no_grad(), reporting_to(progress) if progress else contextlib.nullcontext():
        if solver.method == "jacobi":
            # Its kernels have no values of one byte: they get weights that are rounded to them.
            tensors = rounded(spec.to_json(), tensors, quantize)
            x, report = _jacobi(z, guess, tensors, context, spec, rule, temperature, solver, backend)
            return (x, report) if return_report else x
        start = time.perf_counter() if return_report else 0.0
        x = torch.ops.starflow.block_inverse(
            z, tensors, *context, spec.to_json(), rule, temperature, quantize, backend=backend
        )
    if not return_report:
        return x
    steps = T if spec.start else T - 1
    sweeps = torch.ones(B, T, dtype=torch.int32)
    sweeps[:, : T - steps] = 0
    return x, SolveReport("sequential", steps, B * steps, time.perf_counter() - start, sweeps)


def _jacobi(z, guess, tensors, context, spec: BlockSpec, rule, temperature, solver: Solver, backend):
    start, (B, T, D) = time.perf_counter(), z.shape
    if guess is not None:
        check_tensor("guess", guess, (B, T, D), like=z)
        check_finite("guess", guess)
        guess = guess.to(z.dtype)
    else:
        guess = z if solver.guess == "noise" else torch.zeros_like(z)
    window = min(solver.window or T, T)
    x, sweeps, counts, residual = torch.ops.starflow.block_jacobi(
        z, guess, tensors, *context, list(solver.neighbours), spec.to_json(), rule, temperature,
        window, solver.slide, solver.tol, backend=backend,
    )  # fmt: skip
    passes, fallbacks, failed = counts.cpu().unbind(1)
    if failed.any():
        sample = int(failed.nonzero()[0])
        raise ValueError(f"x, the result: values are not finite at token {failed[sample] - 1} of sample {sample}")
    residual = residual.max().item() if B else 0.0
    passes = int(passes.max()) if B else 0
    seconds, fallbacks = time.perf_counter() - start, int((fallbacks > 0).sum())
    return x, SolveReport("jacobi", passes, int(sweeps.sum()), seconds, sweeps, residual, fallbacks)


def _linear(weight: torch.Tensor, backend: str | None) -> Callable:
    """torch's linear layer, which autocast acts on, or ours where that is faster."""
    plain = backend is not None or weight.device.type != "cpu" or weight.dtype != torch.float32
    if plain or compiled.missing() or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear
    return functools.partial(call, "linear", backend=None)


def _on_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda


def _glue(x: torch.Tensor, backend: str | None) -> reference.Glue:
    """Sums with their norms and GELU with its bias: torch's, or one op each on a GPU."""
    if not _on_gpu(x):
        return reference.Glue()

    def add_norm(h, update, w, name, spec):
        if spec.norm == "none" or (update is not None and torch.promote_types(h.dtype, update.dtype) != h.dtype):
            return reference.add_norm(h, update, w, name, spec)
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        total, normed = call("residual_norm", h, update, weight, bias, spec.norm, EPS[spec.norm], backend=backend)
        return h if update is None else total, normed

    def up_gelu(x, w, name, linear):
        return call("bias_gelu", linear(x, w[f"{name}.weight"], None), w.get(f"{name}.bias"), backend=backend)

    return reference.Glue(add_norm, up_gelu)


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
