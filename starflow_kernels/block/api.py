"""Ops of a flow block: from data to noise, from noise to data, and its raw parameters."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._core import compiled, dispatch
from .._core.checks import check_tensor
from .._core.dispatch import disable_autocast, mark_loop, prefer, register, wrap
from .._core.implicit import Equation, Unchanged, needs_gradient, with_gradient
from .._core.numerics import accumulation_dtype
from .._core.registration import call, define, refuse_transforms
from .._triton import runtime
from ..affine_flow.api import empty_logdet
from ..solver import Inverse, Solver, sum_log_sigma
from ..spec import BlockSpec, GuidanceRule, Logdet, Quantize, check_choice
from . import composed, cuda, jacobi, native, native_transposed, network, persistent, phases, reference
from .checks import check_block, check_inverse, check_kinds, checked_inverse, checked_jacobi
from .layout import arrange
from .progress import observed
from .reports import solve_report

INSTEAD = (
    "use the gradient that the public function has outside of torch.func, or differentiate block_forward at the "
    "result, whose Jacobian is the inverse matrix; pass a batch as rows"
)
CONTEXT = "Tensor? cond, Tensor? prefix, Tensor? cos, Tensor? sin"


def _empty_params(x: torch.Tensor, *args: Any) -> torch.Tensor:
    spec = BlockSpec.from_json(args[-1])
    return x.new_empty(*x.shape[:2], spec.affine.params_dim(spec.token_dim))


define(
    "block_forward",
    f"Tensor x, Tensor[] weights, {CONTEXT}, str spec, str logdet",
    "(Tensor, Tensor)",
    fake=lambda x, *args: (x.new_empty(x.shape), empty_logdet(x, args[-1])),
    reference=reference.block_forward,
)
define(
    "block_params",
    f"Tensor x, Tensor[] weights, {CONTEXT}, str spec",
    "Tensor",
    fake=_empty_params,
    reference=reference.block_params,
)
define(
    "block_inverse",
    f"Tensor z, Tensor[] weights, {CONTEXT}, Tensor? guidance, str spec, str rule, float temperature, "
    'str quantize="none", Tensor? known=None',
    "(Tensor, Tensor)",
    fake=lambda z, *args: (z.new_empty(z.shape), z.new_empty(z.shape, dtype=accumulation_dtype(z.dtype))),
    reference=reference.block_inverse,
    instead=INSTEAD,
)
define(
    "block_jacobi",
    f"Tensor z, Tensor guess, Tensor[] weights, {CONTEXT}, Tensor? guidance, int[] neighbours, "
    "str spec, str rule, float temperature, int window, bool slide, float tol, "
    'str quantize="none", Tensor? known=None',
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda z, *args: (
        z.new_empty(z.shape),
        z.new_empty(z.shape, dtype=accumulation_dtype(z.dtype)),
        z.new_empty(z.shape[:2], dtype=torch.int32),
        z.new_empty(z.shape[0], 3, dtype=torch.int64),
        z.new_empty(z.shape[0]),
    ),
    reference=jacobi.block_jacobi,
    instead=INSTEAD,
)
for _op in ("block_forward", "block_params", "block_inverse", "block_jacobi"):
    compiled.register(_op, native, backward=False)
register("block_forward", "composed", composed.block_forward_without_gradient, composed.refuse, composed.unavailable)
register("block_params", "composed", composed.block_params, composed.refuse, composed.unavailable)
runtime.register("block_inverse", "block.triton.sequential", backward=False)
for _name, _module in (("persistent", persistent), ("cuda", cuda)):
    register("block_inverse", _name, _module.block_inverse, _module.refuse, compiled.cuda_unavailable)
prefer("block_inverse", phases.preferred, phases.here)
runtime.register("block_jacobi", "block.triton.sweeps", backward=False)
# Not ops of torch.library, since two of them differentiate by autograd, which does not act inside of an op.
register("block_inverse_backward", "reference", reference.block_inverse_backward)
register("block_inverse_backward", "composed", composed.block_inverse_backward)
compiled.register("block_inverse_backward", native_transposed, backward=False)
wrap("block_inverse", checked_inverse)
wrap("block_jacobi", checked_jacobi)
mark_loop("block_inverse")
mark_loop("block_jacobi")


def block_forward(
    x: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    spec: BlockSpec,
    *,
    cond: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cond_in_order: bool = False,
    logdet: Logdet = "sum",
    dropout: float = 0.0,
    backend: str | None = None,
    run_layer: network.RunLayer | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform data to noise through one flow block, all tokens at once.

    See TarFlow (arXiv 2412.06329), eq. 3, and STARFlow (arXiv 2506.06276), section 3.

    If a gradient is needed, the block is composed of differentiable ops on `backend`: `causal_attention` and
    `flow_head`, and on a GPU also `residual_norm` and `bias_gelu`. Linear layers are then torch's, so autocast acts on
    them. Without a gradient, the network computes in the dtype of the weights, on a GPU by the same ops.

    Args:
        x: (B, T, D) tokens in the order of the data, float32 or float64.
        weights: name -> tensor, as listed by `spec.weight_shapes`, all of one floating dtype and device.
        spec: the block.
        cond: (B, C) vectors that are added to the hidden states of every token, such as class embeddings; or
            (B, T, C), a vector per token in the order of the data. The states to which the vector of token t is added
            determine the parameters of t if spec.start, else of the token after t.
        prefix: (B, L, text_dim) text states that precede the tokens; attention over both is causal.
        cos: (L + T, head_dim / 2) cosines of the rotary angles, in the block's own order, float32 or wider.
        sin: (L + T, head_dim / 2) sines, as cos.
        order: integers (T,) or (B, T), the numbers of the tokens in the block's own order; takes spec.flip=False. The
            position table moves along.
        lengths: integers (B,). Only the first tokens of a sample, that many, belong to it. The others pass unchanged,
            add nothing to the log-determinant and come last in the block's own order, also with spec.flip.
        cond_in_order: whether a condition per token is in the block's own order already, which saves a copy.
        logdet: "sum", "mean" or "none", as in `affine_flow`.
        dropout: probability of zeroing an element of the residual branches; it acts only if a gradient is needed.
        backend: name of a backend; None takes the first that can run.
        run_layer: called as run_layer(i, layer, *states) for each transformer layer i; it returns
            layer(weights, *states) with the weights of the layer by names such as qkv.weight, which `weights` then
            lacks. So a module may shard, recompute or compile each layer. The block is composed of smaller ops.

    Returns:
        z (B, T, D) in the dtype of x, and log|det dz/dx|, (B,) or (B, T, D), float32 (float64 for float64 x). With
        lengths, "mean" is the mean over the tokens of the sample.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Equivalent to:
        ```python
        params = block_params(x, weights, spec)
        z, logdet = affine_flow(x, params, spec.affine)
        ```
    """
    check_choice("logdet", logdet, Logdet)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: expected a probability of at least 0 and below 1")
    check_kinds(weights, spec)
    check_tensor("x", x, ("B", "T", spec.token_dim))
    if run_layer is not None and not callable(run_layer):
        raise TypeError(f"run_layer: expected a function, got {type(run_layer).__name__}")
    tensors = check_block(x, weights, spec, cond, prefix, cos, sin, rows=x.shape[0], layers=run_layer is None)
    layout = arrange(x, tensors, spec, cond, order, lengths, cond_in_order=cond_in_order)
    x_own, options = layout.enter(x), (layout.cond, prefix, layout.angles(cos), layout.angles(sin))
    per_value = "none" if layout.moves else logdet
    needed = needs_gradient(x, *layout.weights, layout.cond, prefix)
    if needed or run_layer is not None:
        z, values = composed.block_forward(
            x_own, layout.weights, *options, layout.spec, per_value,
            dropout=dropout if needed else 0.0, backend=backend, run_layer=run_layer,
        )  # fmt: skip
    else:
        given = x_own, layout.weights, *options, layout.spec.to_json(), per_value
        z, values = call("block_forward", *given, backend=backend)
    if not layout.moves:
        return z, values
    values = layout.leave(values, values.new_zeros(x.shape))
    return layout.leave(z, x), values if logdet == "none" else layout.reduce(values, logdet)


def block_params(
    x: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    spec: BlockSpec,
    *,
    cond: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cond_in_order: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute the raw parameters of all tokens of data in one parallel pass of a block's network.

    They determine the affine transform in TarFlow (arXiv 2412.06329), eq. 3, and are returned before soft clip and
    guidance.

    Args:
        x: as in `block_forward`.
        weights: as in `block_forward`.
        spec: as in `block_forward`.
        cond: as in `block_forward`.
        prefix: as in `block_forward`.
        cos: as in `block_forward`.
        sin: as in `block_forward`.
        order: as in `block_forward`.
        lengths: as in `block_forward`.
        cond_in_order: as in `block_forward`.
        backend: name of a backend; None takes the first that can run.

    Returns:
        (B, T, P) raw outputs [a | b] in the order and dtype of x, with P = spec.affine.params_dim(D). A token that
        passes unchanged gets zeros, the identity. Differentiable; if a derivative is needed, plain PyTorch computes
        them.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value.

    Equivalent to:
        ```python
        h = transformer(x, weights)  # token t sees the tokens before it
        params = torch.nn.functional.linear(h, weights["proj_out.weight"], weights["proj_out.bias"])
        ```
    """
    check_kinds(weights, spec)
    check_tensor("x", x, ("B", "T", spec.token_dim))
    tensors = check_block(x, weights, spec, cond, prefix, cos, sin, rows=x.shape[0])
    layout = arrange(x, tensors, spec, cond, order, lengths, cond_in_order=cond_in_order)
    context = layout.cond, prefix, layout.angles(cos), layout.angles(sin)
    params = call("block_params", layout.enter(x), layout.weights, *context, layout.spec.to_json(), backend=backend)
    return layout.leave(params, params.new_zeros(*x.shape[:2], params.shape[-1])) if layout.moves else params


def block_inverse(
    z: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    spec: BlockSpec,
    *,
    cond: torch.Tensor | None = None,
    prefix: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    cond_in_order: bool = False,
    guidance: float | torch.Tensor | None = None,
    rule: GuidanceRule = "tarflow",
    temperature: float = 1.0,
    solver: Solver = Solver(),
    guess: torch.Tensor | None = None,
    data: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    quantize: Quantize = "none",
    progress: Callable[[int, int], None] | None = None,
    backend: str | None = None,
) -> Inverse:
    """Transform noise to data through one flow block, by T steps over a KV cache or by fewer passes over many tokens.

    This inverts TarFlow (arXiv 2412.06329), eq. 3. Guidance follows section 2.6 there, or STARFlow (arXiv 2506.06276),
    section 3.4. Jacobi iteration follows arXiv 2505.12849.

    Args:
        z: (B, T, D) finite noise in the order of the data, float32 or float64.
        weights: as in `block_forward`.
        spec: as in `block_forward`.
        cond: as in `block_forward`. With guidance, 2B rows: first the B rows with the condition, then the rows without
            it. Both branches run as one batch.
        prefix: as in `block_forward`; with guidance, 2B rows, as cond.
        cos: as in `block_forward`.
        sin: as in `block_forward`.
        order: as in `block_forward`.
        lengths: as in `block_forward`. There are as many steps as the longest sample has tokens.
        cond_in_order: as in `block_forward`.
        guidance: weight, a number or a tensor that broadcasts to (B, T), with token t in the block's own order; None
            for no guidance.
        rule: "tarflow", "starflow" or "itarflow", as in `affine_flow_inverse`.
        temperature: attention temperature of the branch without a condition.
        solver: sequential, or Jacobi sweeps over windows of tokens; each sample then takes its own number of passes.
        guess: (B, T, D) finite initial values of Jacobi in the order of the data, in place of the solver's.
        data: (B, T, D) tokens, of which the first ones, `known` in number, are finite and part of the result.
        known: integers (B,), how many tokens of `data` are given, counted in the block's own order. Noise is not needed
            for them. One pass over all of them fills the KV cache.
        quantize: "int8" or "fp8" (torch.float8_e4m3fn) rounds the matrices of the layers to one byte per value, with a
            float32 scale per output channel; all other weights are kept. "bfloat16" rounds the matrices and inputs of
            all products but those of attention; sums stay in float32. The op's README lists the errors.
        progress: called from time to time as progress(done, B T) with the number of finished tokens. An exception from
            it ends the call. torch.compile without fullgraph supports it.
        backend: name of a backend; None takes the first that can run.

    Returns:
        An `Inverse`: x (B, T, D) in the dtype of z, with block_forward(x) = z; logdet (B,), log|det dx/dz| of the
        tokens that are neither given nor beyond the lengths; and the report of the solve. x and logdet have gradients
        with respect to z, weights, cond, prefix and data, by the implicit function theorem: the backward pass runs
        block_forward at x and solves a triangular system, on the CPU in float32 token by token, else by sweeps of
        vector-Jacobian products. The inverse stores nothing for it. Under guidance, with quantization and in a
        compiled graph there are no gradients.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: an argument of the wrong shape, device or value; z, cond or prefix not finite; with Jacobi, a result
            that is not finite, with its sample and token; z, data, cond or prefix needs a gradient that there is none.

    Equivalent to:
        ```python
        x = z.clone()
        for t in range(z.shape[1]):
            params = block_params(x, weights, spec)
            x[:, t] = affine_flow_inverse(z, params, spec.affine)[:, t]
        ```
    """
    check_kinds(weights, spec)
    refuse_transforms("block_inverse", INSTEAD, z, guess, list(weights.values()), cond, prefix, cos, sin, guidance)
    guidance, rows = check_inverse(z, spec, guidance, rule, temperature, solver, quantize)
    tensors = check_block(z, weights, spec, cond, prefix, cos, sin, rows)
    (B, T, _), branches = z.shape, 1 if guidance is None else 2
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    inputs = (cond, prefix, *tensors)
    # Samplers are called with weights that have gradients, and do not ask for them.
    plain = guidance is None and quantize == "none" and not traced
    if not plain and needs_gradient(z, data, cond, prefix):
        where = "in a graph" if traced else "under guidance" if quantize == "none" else f"with quantize={quantize!r}"
        raise ValueError(f"z, data, cond, prefix: the inverse has no gradient {where}; detach them")
    if traced:
        # A graph may be called with gradients enabled, whatever the mode in which it was made.
        tensors = [weight.detach() for weight in tensors]
        cond, prefix, cos, sin, guidance, guess = (
            None if value is None else value.detach() for value in (cond, prefix, cos, sin, guidance, guess)
        )
        z = z.detach()
    # An error inside of a graph's torch.no_grad() would leave gradients disabled.
    with contextlib.nullcontext() if traced else torch.no_grad():
        layout = arrange(z, tensors, spec, cond, order, lengths, branches, cond_in_order)
        noise, known = layout.begin(layout.enter(z), data, known)
        if guidance is not None and layout.slots < T:
            guidance = guidance[:, : layout.slots]
        context = layout.weights, layout.cond, prefix, layout.angles(cos), layout.angles(sin), guidance
        own = layout.spec.to_json()
        if solver.method == "jacobi":
            if guess is None:
                guess = noise if solver.guess == "noise" else torch.zeros_like(noise)
            else:
                check_tensor("guess", guess, tuple(z.shape), like=z)
                guess = layout.enter(guess.to(z.dtype))
            window = min(solver.window or layout.slots, layout.slots)
            run = functools.partial(
                call, "block_jacobi", noise, guess, *context, list(solver.neighbours), own, rule,
                temperature, window, solver.slide, solver.tol, quantize, known, backend=backend,
            )  # fmt: skip
        elif guess is not None:
            raise ValueError("guess: given, but the sequential solver takes none")
        else:
            options = own, rule, temperature, quantize, known
            run = functools.partial(call, "block_inverse", noise, *context, *options, backend=backend)
        start = 0.0 if traced else time.perf_counter()
        x, log_sigma, *counters = observed(run, progress) if progress else run()
        seconds = 0.0 if traced else time.perf_counter() - start
        if layout.moves:
            x, log_sigma = layout.leave(x, z), layout.leave(log_sigma, torch.zeros_like(z, dtype=log_sigma.dtype))
    # The report must not keep the condition, which may be large.
    report = functools.partial(solve_report, layout._replace(cond=None), known, seconds, B, *counters)
    if not (plain and needs_gradient(z, data, *inputs)):
        return Inverse(x, functools.partial(sum_log_sigma, log_sigma), report)
    given = layout.given(known)
    inputs = cond, prefix, cos, sin, *tensors
    equation = _equation(spec, order, lengths, cond_in_order, known, given, backend)
    x = with_gradient(x, equation, z, data, inputs)
    unchanged = Unchanged((x, *inputs))

    def logdet() -> torch.Tensor:
        unchanged.check()
        with torch.inference_mode(False), torch.enable_grad():
            values = -equation.density(x, *inputs)[1]
            return sum_log_sigma(values if given is None else values.masked_fill(given[..., None], 0))

    return Inverse(x, logdet, report)


def _equation(
    spec: BlockSpec,
    order: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cond_in_order: bool,
    known: torch.Tensor | None,
    given: torch.Tensor | None,
    backend: str | None,
) -> Equation:
    """Return the equation of an inverse, as a function of x, cond, prefix, cos, sin and the weights."""
    # They may change before the backward pass; other inputs are saved for it, which checks that.
    order, lengths = (None if numbers is None else numbers.clone() for numbers in (order, lengths))
    backend = backend if backend == "reference" else None

    def density(x: torch.Tensor, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        context: dict[str, Any] = dict(zip(("cond", "prefix", "cos", "sin"), inputs), order=order, lengths=lengths)
        context["cond_in_order"] = cond_in_order
        named = dict(zip(spec.weight_shapes, inputs[4:]))
        with disable_autocast():
            return block_forward(x, named, spec, logdet="none", backend=backend, **context)  # type: ignore[arg-type]

    def solve(g: torch.Tensor, x: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
        cond, prefix, cos, sin, *weights = inputs
        layout = arrange(x, weights, spec, cond, order, lengths, 1, cond_in_order)  # type: ignore[arg-type]
        context = layout.weights, layout.cond, prefix, layout.angles(cos), layout.angles(sin), layout.spec.to_json()
        u = dispatch.run("block_inverse_backward", backend, layout.enter(x), layout.enter(g), *context, known)
        return layout.leave(u, g) if layout.moves else u

    return Equation(density, solve, given)
