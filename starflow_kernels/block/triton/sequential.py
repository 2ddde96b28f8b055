"""Sequential sampling through a whole block in Triton, one step per token.

A step has five launches per layer and one for the head. The kernels are in step_kernels.py and head_kernels.py;
sessions.py keeps sessions and replays their steps.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..._triton.rotary import half_tile
from ..._triton.runtime import refuse_tensors
from ...spec import BlockSpec
from ..cache_budget import cache_bytes
from ..packing import refuse_rounding, refuse_spec
from . import head_kernels, sizes, step_kernels
from .sessions import Sessions, Shape, bucket, captured, current_stream, lend, loaded, sample
from .weights import Model, models

WIDEST_HEAD = 256
kept_sessions = Sessions()


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's dtype for a dtype of torch."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def pdl(device: torch.device) -> bool:
    """Return whether to use programmatic dependent launch: Triton has it, sm_90 or newer, and not STARFLOW_PDL=0."""
    asked = os.environ.get("STARFLOW_PDL") != "0" and hasattr(tl.extra.cuda, "gdc_wait")
    asked = asked and device.type == "cuda" and torch.version.cuda is not None
    return asked and torch.cuda.get_device_capability(device) >= (9, 0)


class TritonSession:
    """Buffers for one batch bucket, and the launches of a step.

    A session holds no weights. They belong to the model, and the sessions of a model end with it.

    Args:
        model: gives the spec and how weights are stored.
        shape: sizes of the part of a batch that the session takes.
        device: device of all tensors.
        buffers: shape and dtype of each buffer, see `buffers`.
        n: tokens of each sequence per step.
    """

    buffers = staticmethod(sizes.buffers)

    def __init__(self, model: Model, shape: Shape, device: torch.device, buffers: sizes.Buffers, n: int = 1):
        self.spec, self.one_byte, self.shape, self.device = model.spec, model.one_byte, shape, device
        self.rows, self.n = shape.samples * shape.branches, n
        self.stream, self.names = current_stream(device), [*buffers]
        for name, (size, dtype) in buffers.items():
            setattr(self, name, torch.zeros(size, dtype=dtype, device=device))
        self.splits, self.pdl = self.split_out.shape[2], {"PDL": True, "launch_pdl": True} if pdl(device) else {}
        self.graph = None
        # Tiles per iteration over the statistics of a row.
        self.tiles = min(sizes.TILES, triton.next_power_of_2(self.statistics.shape[1]))

    def _grid(self, rows: int, columns: int) -> tuple[int]:
        """Return the grid; programs that read the same weights are neighbours."""
        return (triton.cdiv(rows, sizes.BLOCK_M) * columns,)

    def _tiles(self, kernel: str) -> dict[str, int]:
        widths = self.hidden.element_size(), self.spec.token_dim, self.spec.head_dim
        return {"BLOCK_M": sizes.BLOCK_M, **sizes.config(kernel, *widths, self.one_byte), **self.pdl}

    def _pair(self, w: dict, name: str) -> tuple:
        """Return the weight and bias under a name, None for one that does not exist."""
        return w.get(f"{name}.weight"), w.get(f"{name}.bias")

    def attend(self, i: int, n: int, stop: torch.Tensor | None) -> None:
        """Launch the attention of layer i over n tokens of each sequence; stop: see `layers`."""
        spec = self.spec
        step_kernels.block_attend_kernel[(self.rows * n * spec.heads * self.splits,)](
            self.q, self.k_cache[i], self.v_cache[i], self.position, self.split_out, self.split_max, self.split_sum,
            self.tickets, self.attended, n, self.k_cache.shape[3], self.splits, H=spec.heads, KV=spec.kv_heads,
            HEAD=spec.head_dim, BLOCK_D=sizes.tile(spec.head_dim), SPLIT=sizes.SPLIT,
            **sizes.config("attend", self.hidden.element_size(), spec.token_dim, spec.head_dim), **self.pdl,
        )  # fmt: skip

    def product(self, w: dict, name: str, x: torch.Tensor, h: torch.Tensor, n: int, stop=None, text=False) -> None:
        """Launch the product of x with a weight, and add it to h or store it as residual.

        Args:
            w: the model's weights.
            name: of the weight.
            x: (rows, width), rows are n tokens of every sequence.
            h: (rows, C), state.
            n: tokens of each sequence.
            stop: see `layers`.
            text: store the product in h.
        """
        spec, rows, (C, width) = self.spec, self.rows * n, w[f"{name}.weight"].shape
        parts = sizes.product_parts(width, C, self.hidden.element_size(), 1 if stop is None else n)
        step_kernels.block_product_kernel[self._grid(rows, triton.cdiv(C, sizes.BLOCK_N) * parts)](
            x, *self._pair(w, name), h, h if text else self.residual, self.statistics, self.partial, self.tickets,
            w.get(f"{name}.weight.scale"), self.position, stop, rows, n, C, width, PARTS=parts, BIAS=spec.bias or text,
            POST=spec.post_norm or text, DTYPE=triton_dtype(self.hidden.dtype), **self._tiles("product"),
        )  # fmt: skip

    def layers(self, w: dict, n: int = 1, stop: torch.Tensor | None = None) -> torch.Tensor:
        """Launch the layers on n tokens of every row, from `h_in`, and return the state.

        With post-norms, the last residual is not yet normed and added.

        Args:
            w: the model's weights.
            n: tokens of each sequence.
            stop: in sweeps, the slot before which the tokens of each row end; each row then has its own position.
        """
        spec, rows, h, h_next = self.spec, self.rows * n, self.h, self.h_next
        C, H, KV, d, width = spec.channels, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp_dim
        pairs = half_tile(d) if spec.qk_norm else 16
        post, stored = None, triton_dtype(self.hidden.dtype)
        for i in range(spec.layers):
            layer, first = f"layers.{i}", i == 0
            before, after = (self.h_in, h) if first else (h, h_next)
            step_kernels.block_qkv_kernel[self._grid(rows, (H + 2 * KV) * triton.cdiv(d - d // 2, pairs))](
                before, after, self.residual, post, self.statistics, *self._pair(w, f"{layer}.attn_norm"),
                *self._pair(w, f"{layer}.qkv"), w.get(f"{layer}.head_norms"), self.cos, self.sin, self.scale,
                self.position, self.q, self.k_cache[i], self.v_cache[i], w.get(f"{layer}.qkv.weight.scale"), stop,
                rows, n, C, self.k_cache.shape[3], H=H, KV=KV, HEAD=d, POST=post is not None,
                QK_NORM=spec.qk_norm, ROTARY=spec.rotary != "none", FIRST=first, PAIRS=pairs, NORM=spec.norm,
                TILES=0 if first else self.tiles, BIAS=spec.bias, DTYPE=stored, **self._tiles("qkv"),
            )  # fmt: skip
            if post is not None:
                h, h_next = h_next, h
            self.attend(i, n, stop)
            self.product(w, f"{layer}.proj", self.attended, h, n, stop)
            post = w.get(f"{layer}.attn_post_norm.weight")
            step_kernels.block_up_kernel[self._grid(rows, triton.cdiv(width, sizes.BLOCK_N))](
                h, h_next, self.residual, post, self.statistics, *self._pair(w, f"{layer}.mlp_norm"),
                *self._pair(w, f"{layer}.up"), *self._pair(w, f"{layer}.gate"), self.hidden,
                w.get(f"{layer}.up.weight.scale"), w.get(f"{layer}.gate.weight.scale"), self.position, stop, rows, n,
                C, width, POST=post is not None, NORM=spec.norm, TILES=self.tiles, GATED=spec.mlp == "swiglu",
                BIAS=spec.bias, DTYPE=stored, **self._tiles("up"),
            )  # fmt: skip
            if post is not None:
                h, h_next = h_next, h
            self.product(w, f"{layer}.down", self.hidden, h, n, stop)
            post = w.get(f"{layer}.mlp_post_norm.weight")
        return h

    def _embed_weights(self, w: dict) -> tuple:
        """Return the weights that the projection of a token reads."""
        cond = self.cond if self.shape.cond else None
        return *self._pair(w, "proj_in"), w.get("pos_embed"), cond, self.shape.cond * self.spec.channels

    def _embed_options(self) -> dict:
        options = {"BRANCHES": self.shape.branches, "TABLE": self.spec.positions > 0, "COND": self.shape.cond > 0}
        return {**options, "BLOCK_D": sizes.token_part(self.spec.token_dim)}

    def launch(self, w: dict) -> None:
        """Launch one step."""
        spec, shape, h, tiles = self.spec, self.shape, self.layers(w), self._tiles("head")
        head_kernels.block_head_kernel[self._grid(shape.samples, triton.cdiv(spec.channels, tiles["BLOCK_N"]))](
            h, self.residual, w.get(f"layers.{spec.layers - 1}.mlp_post_norm.weight"), self.statistics,
            w.get("final_norm.weight"), *self._pair(w, "proj_out"), self.z, self.guidance, self.known, self.x,
            self.log_scales, self.h_in, *self._embed_weights(w), self.position, shape.samples, shape.tokens,
            shape.prefix, spec.channels, spec.token_dim, spec.affine.soft_clip, SCALE=spec.affine.scale,
            CLIPPED=spec.affine.soft_clip > 0, POST=spec.post_norm, TILES=self.tiles, RULE=shape.rule,
            NORM="rms_norm" if spec.final_norm else "none", START=spec.start, WHOLE=spec.token_dim <= sizes.WHOLE_TOKEN,
            **self._embed_options(), **tiles,
        )  # fmt: skip

    def fill(self, z: torch.Tensor, context: tuple, temperature: float) -> None:
        """Copy a part of a batch into the buffers.

        Args:
            z: (samples, T, D), noise.
            context: cond, prefix, cos, sin, guidance and known of the part.
            temperature: divides the scores of the unconditional branch.
        """
        (cond, _, cos, sin, guidance, known), n = context, len(z)
        self.z[:n] = z
        self.x[:n] = z
        self.known.zero_()
        self.log_scales.zero_()
        if known is not None:
            self.known[:n] = known
        self.scale.fill_(self.spec.head_dim**-0.5)
        if guidance is not None:
            self.guidance[:n] = guidance
            self.scale[self.shape.samples :] /= temperature
        if cond is not None:
            slots = self.shape.branches, -1, self.shape.cond, self.spec.channels
            self.cond.view(slots)[:, :n] = cond.reshape(slots)
        if cos is not None:
            self.cos.copy_(cos)
            self.sin.copy_(sin)

    def read(self, w: dict, prefix: torch.Tensor | None) -> None:
        """Fill the cache with the text `prefix`."""
        shape, n = self.shape, sizes.pass_tokens(self.shape)
        if prefix is not None:
            text = prefix.new_zeros(shape.branches, shape.samples, *prefix.shape[2:])
            text[:, : prefix.shape[1]] = prefix
            for first in range(0, shape.prefix, n):
                given = text[:, :, first : first + n].flatten(0, 1).contiguous()
                self.product(w, "proj_text", given, self.h_in, given.shape[1], text=True)
                self.position.fill_(first)
                self.layers(w, given.shape[1])

    def read_given(self, w: dict, filled: int) -> None:
        """Fill the first `filled` slots of the cache; their input tokens are in x."""
        for first in range(0, filled, n := sizes.pass_tokens(self.shape)):
            count = min(n, filled - first)
            self.h_in[: self.rows * count] = self._embedded(w, first, count)
            self.position.fill_(self.shape.prefix + first)
            self.layers(w, count)

    def _embedded(self, w: dict, first: int, count: int) -> torch.Tensor:
        """Return the hidden states (rows * count, C) of slots whose input tokens are in x."""
        spec, start = self.spec, first - 1 if self.spec.start else first
        tokens = self.x[:, max(start, 0) : start + count]
        if start < 0:
            tokens = torch.cat([w["start"].float().expand(len(tokens), 1, -1), tokens], 1)
        weight, bias = self._pair(w, "proj_in")
        h = torch.nn.functional.linear(tokens, weight.float(), bias.float())
        if spec.positions:
            h = h + w["pos_embed"][first : first + count].float()
        h = h.repeat(self.shape.branches, 1, 1)
        if self.shape.cond:
            h = h + (self.cond if self.shape.cond == 1 else self.cond[:, first : first + count])
        return h.flatten(0, 1)

    def begin(self, w: dict, prefix: torch.Tensor | None, filled: int = 0) -> None:
        """Fill the cache with text and the first `filled` slots, then project the next token of every sample."""
        spec, shape = self.spec, self.shape
        self.read(w, prefix)
        self.read_given(w, filled)
        self.position.fill_(shape.prefix + filled)
        if filled:
            if filled < shape.tokens - (not spec.start):
                self.h_in[: self.rows] = self._embedded(w, filled, 1)
            return
        tokens, stride = (w["start"], 0) if spec.start else (self.x, shape.tokens * spec.token_dim)
        head_kernels.block_embed_kernel[self._grid(shape.samples, triton.cdiv(spec.channels, sizes.BLOCK_N))](
            tokens, *self._embed_weights(w), self.h_in, shape.samples, stride, spec.channels, spec.token_dim,
            **self._embed_options(), **self._tiles("embed"),
        )  # fmt: skip

    def capture(self, w: dict) -> None:
        """Capture a step as a CUDA graph, after one step that compiles the kernels."""
        self.launch(w)
        self.graph = captured(functools.partial(self.launch, w), self.device)


class Running:
    """Session together with weights, for one call.

    Args:
        session: holds the buffers.
        w: weights by name, see `Model.read`.
        filled: slots whose input tokens are given.
    """

    def __init__(self, session: TritonSession, w: dict[str, torch.Tensor], filled: int):
        self.session, self.w, self.filled = session, w, filled
        self.step = functools.partial(session.launch, w)

    def load(self, z: torch.Tensor, context: tuple, temperature: float) -> None:
        """Copy a part of a batch into the session and start its first token; capture the graph if there is none."""
        session = self.session
        lend([getattr(session, name) for name in session.names], session.stream, session.device)
        session.fill(z, context, temperature)
        if session.device.type == "cuda":
            if session.graph is None:
                session.begin(self.w, None)
                session.capture(self.w)
                session.fill(z, context, temperature)
            self.step = session.graph.replay
        session.begin(self.w, context[1], self.filled)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x and log sigma (samples, T, D) of all rows of the session."""
        return self.session.x, self.session.log_scales


def refuse(z, weights, cond, prefix, cos, sin, guidance, spec_json, *others) -> str | None:
    """Return why the kernels cannot sample from a block, or None."""
    spec = BlockSpec.from_json(spec_json)
    if z.dtype != torch.float32:
        return f"tokens are {z.dtype}, it takes float32"
    if reason := refuse_rounding(*others) or refuse_spec(spec) or refuse_tensors(*weights):
        return reason
    return None if spec.head_dim <= WIDEST_HEAD else f"heads of {spec.head_dim} values, it takes up to {WIDEST_HEAD}"


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return cache_bytes()
    return cache_bytes(torch.cuda.get_device_properties(device).total_memory)


def loaded_sessions(
    model: Model,
    weights,
    z,
    context: tuple,
    rule: str,
    temperature,
    kind: type,
    filled: int,
    n: int = 1,
    options: tuple = (),
) -> Iterator[tuple[slice, Running]]:
    """Load the parts of a batch into their sessions, one after the other; yield the rows and session of each.

    Args:
        model: model of the weights.
        weights: tensors in the order of spec.weight_shapes.
        z: (B, T, D), noise.
        context: cond, prefix, cos, sin, guidance and known.
        rule: rule of guidance, "tarflow" or "starflow".
        temperature: divides the scores of the unconditional branch.
        kind: class of the sessions.
        filled: slots that the cache is filled with before the first step, since their input tokens are given.
        n: tokens of each sequence per step.
        options: further arguments of the class; each combination of them has its own sessions.
    """
    spec, (cond, prefix, _, _, guidance, _), (B, T, _) = model.spec, context, z.shape
    slots = 0 if cond is None else T if cond.ndim == 3 else 1
    shape = Shape(B, T, 0 if prefix is None else prefix.shape[1], 1 if guidance is None else 2, slots, rule, filled > 0)
    budget, w = _budget(z.device), model.read(weights)

    def needed(part: Shape) -> sizes.Buffers:
        return kind.buffers(spec, model.dtype, part, n, *options)

    def session(part: Shape) -> Running:
        key, layout = (kind, part, n, *options, z.device.index, pdl(z.device)), needed(part)

        def opened():
            return kind(model, part, z.device, layout, n, *options)

        return Running(kept_sessions.get(model, key, sizes.size_of(layout), budget, opened), w, filled)

    def size(part: Shape) -> int:
        return sizes.size_of(needed(part._replace(samples=bucket(part.samples))))

    return loaded(z.flip(1) if spec.flip else z, context, shape, temperature, size, budget, session)


def block_inverse(
    z, weights, cond, prefix, cos, sin, guidance, spec_json: str, rule: str, temperature, quantize="none", known=None
):
    """Map noise to data token by token over the cache; a batch that is too large for the memory budget is split."""
    if not len(z):
        return z.clone(), torch.zeros_like(z)
    with exclusive(z.device):
        model = models(spec_json, weights, quantize, quantize != "none")
        spec, slots = model.spec, z.shape[1] - (not model.spec.start)
        filled = 0 if known is None else max(0, int(known.min()) - (not spec.start))
        context = cond, prefix, cos, sin, guidance, known
        parts = loaded_sessions(model, weights, z, context, rule, temperature, TritonSession, filled)
        found = sample(z, slots - filled, functools.partial(wait, z.device), parts)
    return tuple(value.flip(1) for value in found) if spec.flip else found


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Device -> event at the end of the last call that used the buffers of its sessions.
_ends: dict[torch.device, torch.cuda.Event] = {}


@contextlib.contextmanager
def exclusive(device: torch.device):
    """Reserve the buffers of all sessions for one call; the device runs it after the previous call, on any stream."""
    with kept_sessions.reserved():
        if device in _ends:
            torch.cuda.current_stream(device).wait_event(_ends[device])
        try:
            yield
        finally:
            if device.type == "cuda":
                _ends[device] = torch.cuda.current_stream(device).record_event()
