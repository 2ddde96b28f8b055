"""The sampling direction of a whole block in Triton: one step of five launches a layer and one for the head.

The kernels are in triton_step.py and triton_head.py, what is kept and how often steps run in engine.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os

import torch
import triton
import triton.language as tl

from ..._triton.rotary import half_tile
from ..._triton.runtime import refuse_tensors
from ...spec import BlockSpec
from ..cache_budget import cache_bytes
from ..packing import WeightCache
from ..quantize import is_quantized, quantize_matrix
from . import head_kernels, step_kernels
from .sessions import Sessions, Shape, bucket, loaded, sample

# Of tokens by bytes of a weight: the head of wider ones spills on some chip.
WIDEST_TOKEN, WIDEST_HEAD = {2: 256, 4: 128}, 256
# Rows and outputs of a tile, keys of a split of attention and of a step in it: the same for every batch, so that bits
# are too.
BLOCK_M, BLOCK_N, SPLIT, BLOCK_S = 16, 32, 256, 32
# Rows of text that pass the network at a time.
TEXT_ROWS = 1024
_sessions = Sessions()


def config(kernel: str, width: int, D: int, d: int, one_byte: bool = False) -> dict[str, int]:
    """Tiles for a network of so many bytes a value, tokens of D and heads of d values; those checked do not spill."""
    narrow = width == 2
    tiles = {"BLOCK_N": BLOCK_N, "BLOCK_K": 64 if narrow else 32, "num_warps": 4, "num_stages": 3 if narrow else 2}
    if kernel == "project":
        tiles |= {"BLOCK_K": 32, "num_warps": 2} if narrow else {"BLOCK_K": 16}
    elif kernel == "qkv" and half_tile(d) > 64:
        tiles |= {"num_stages": 2}
    elif kernel == "qkv" and one_byte and narrow:
        tiles |= {"BLOCK_K": 32}
    elif kernel == "head" and tile(D) >= 64:
        tiles |= {"BLOCK_K": 16, "num_warps": 8 if narrow or D > 64 else 4, "num_stages": 2 if narrow else 1}
        tiles |= {} if narrow or D <= 64 else {"BLOCK_N": 16}
    unused = {"qkv": "BLOCK_N", "embed": "BLOCK_K"}.get(kernel)
    return {name: value for name, value in tiles.items() if name != unused}


def dtype_of(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def pdl(device: torch.device) -> bool:
    """Whether STARFLOW_PDL=1 asks for programmatic dependent launch, which begins with sm_90. Not measured yet."""
    asked = os.environ.get("STARFLOW_PDL") == "1" and device.type == "cuda" and torch.version.cuda is not None
    return asked and torch.cuda.get_device_capability(device) >= (9, 0)


def tile(n: int) -> int:
    """Padded size of a token or a head."""
    return max(16, triton.next_power_of_2(n))


class Model:
    """Weights as the kernels read them: rotary pairs half a head apart, the position table in the block's own order,
    one-byte values with their scales beside them."""

    def __init__(self, spec: BlockSpec, weights: list[torch.Tensor], quantize: str = "none"):
        self.spec, self.dtype, self.quantize = spec, weights[0].dtype, quantize
        self.w = {name: w.detach().contiguous() for name, w in zip(spec.weight_shapes, weights)}
        order = torch.arange(spec.head_dim, device=weights[0].device)
        if spec.rotary == "interleaved":
            order = order.view(-1, 2).T.flatten()
        turned = spec.heads + spec.kv_heads
        rows = torch.arange((turned + spec.kv_heads) * spec.head_dim, device=order.device).view(-1, spec.head_dim)
        rows = torch.cat([rows[:turned, order], rows[turned:]]).flatten()
        for i in range(spec.layers):
            layer = f"layers.{i}"
            if spec.rotary == "interleaved":
                for name in (f"{layer}.qkv.weight", f"{layer}.qkv.bias"):
                    if name in self.w:
                        self.w[name] = self.w[name][rows]
            if spec.qk_norm:
                norms = [self.w[f"{layer}.{of}_norm.weight"][order] for of in "qk"]
                self.w[f"{layer}.head_norms"] = torch.stack(norms)
        if spec.positions and spec.flip:
            self.w["pos_embed"] = self.w["pos_embed"].flip(0)
        for name, shape in spec.weight_shapes.items():
            if quantize != "none" and is_quantized(name, shape):
                values, scales = quantize_matrix(self.w[name], quantize)
                if quantize == "fp8":
                    # The kernels take the bits, and 1/256 of the values out of them.
                    values, scales = values.view(torch.uint8), scales * 256
                self.w[name], self.w[f"{name}.scale"] = values, scales


packed = WeightCache(Model)


def _text_tokens(spec: BlockSpec, shape: Shape) -> int:
    """Tokens of text a row in one pass."""
    return max(1, min(shape.prefix, TEXT_ROWS // (shape.samples * shape.copies)))


Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


def buffers(spec: BlockSpec, dtype: torch.dtype, shape: Shape, n: int = 1) -> Buffers:
    """Shape and dtype of every buffer of a session whose steps take n tokens of each sequence."""
    rows, slots, wide = shape.samples * shape.copies, shape.prefix + shape.tokens, torch.float32
    tokens, splits = rows * max(n, _text_tokens(spec, shape)), -(-slots // SPLIT)
    cache = ((spec.layers, rows, spec.kv_heads, slots, spec.head_dim), dtype)
    states = dict.fromkeys(("entry", "h", "other", "update"), ((tokens, spec.channels), wide))
    noise = dict.fromkeys(("z", "x"), ((shape.samples, shape.tokens, spec.token_dim), wide))
    angles = dict.fromkeys(("cos", "sin"), ((slots, spec.head_dim // 2), wide))
    scores = dict.fromkeys(("peak", "mass"), ((tokens, spec.heads, splits), wide))
    return {
        "k_cache": cache, "v_cache": cache, **states, **noise, **angles, **scores,
        "part": ((tokens, spec.heads, splits, spec.head_dim), wide),
        "q": ((tokens, spec.heads, spec.head_dim), wide),
        "hidden": ((tokens, spec.mlp_dim), dtype),
        "guidance": ((shape.samples, shape.tokens), wide),
        "cond": ((rows, spec.channels), wide),
        "scale": ((rows,), wide),
        "position": ((max(2, rows),), torch.int32),
    }  # fmt: skip


def size_of(buffers: Buffers) -> int:
    """Their bytes."""
    return sum(math.prod(size) * kind.itemsize for size, kind in buffers.values())


class TritonSession:
    """Buffers of one bucket and the launches of a step; the weights stay with the model, whose sessions end with it."""

    buffers = staticmethod(buffers)

    def __init__(self, model: Model, shape: Shape, device: torch.device, buffers: Buffers, n: int = 1):
        self.spec, self.quantize, self.shape, self.device = model.spec, model.quantize, shape, device
        self.rows, self.n = shape.samples * shape.copies, n
        for name, (size, dtype) in buffers.items():
            setattr(self, name, torch.zeros(size, dtype=dtype, device=device))
        self.splits, self.pdl = self.part.shape[2], {"PDL": True, "launch_pdl": True} if pdl(device) else {}
        self.graph = None

    def _grid(self, rows: int, columns: int) -> tuple[int]:
        """Programs that read the same weights stand side by side."""
        return (triton.cdiv(rows, BLOCK_M) * columns,)

    def _tiles(self, kernel: str) -> dict[str, int]:
        sizes = self.hidden.element_size(), self.spec.token_dim, self.spec.head_dim
        return {"BLOCK_M": BLOCK_M, **config(kernel, *sizes, self.quantize != "none"), **self.pdl}

    def _norm(self, w: dict, name: str) -> tuple:
        return w.get(f"{name}.weight"), w.get(f"{name}.bias")

    def attend(self, i: int, n: int, stop: torch.Tensor | None) -> None:
        """Attention of layer i."""
        spec = self.spec
        step_kernels.attend_kernel[(self.rows * n * spec.heads * self.splits,)](
            self.q, self.k_cache[i], self.v_cache[i], self.position, self.part, self.peak, self.mass, n,
            self.k_cache.shape[3], self.splits, H=spec.heads, KV=spec.kv_heads, HEAD=spec.head_dim,
            BLOCK_D=tile(spec.head_dim), BLOCK_S=BLOCK_S, SPLIT=SPLIT, num_warps=4, **self.pdl,
        )  # fmt: skip

    def layers(self, w: dict, n: int = 1, stop: torch.Tensor | None = None) -> torch.Tensor:
        """n tokens of every row through the network, from `entry`; the state, whose last update may not be normed.

        stop: in sweeps, a slot of each row where its tokens end; its position is then its own.
        """
        spec, rows, h, other = self.spec, self.rows * n, self.h, self.other
        C, H, KV, d, width = spec.channels, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp_dim
        pairs = half_tile(d) if spec.qk_norm else 16
        post, stored = None, dtype_of(self.hidden.dtype)
        for i in range(spec.layers):
            layer, first = f"layers.{i}", i == 0
            state, total = (self.entry, h) if first else (h, other)
            step_kernels.qkv_kernel[self._grid(rows, (H + 2 * KV) * triton.cdiv(d - d // 2, pairs))](
                state, total, self.update, post, *self._norm(w, f"{layer}.attn_norm"), *self._norm(w, f"{layer}.qkv"),
                w.get(f"{layer}.head_norms"), self.cos, self.sin, self.scale, self.position, self.q, self.k_cache[i],
                self.v_cache[i], w.get(f"{layer}.qkv.weight.scale"), stop, rows, n, C, self.k_cache.shape[3], H=H,
                KV=KV, HEAD=d, POST=post is not None, QK_NORM=spec.qk_norm, ROTARY=spec.rotary != "none", FIRST=first,
                PAIRS=pairs, NORM=spec.norm, BIAS=spec.bias, DTYPE=stored, **self._tiles("qkv"),
            )  # fmt: skip
            if post is not None:
                h, other = other, h
            self.attend(i, n, stop)
            step_kernels.project_kernel[self._grid(rows, triton.cdiv(C, BLOCK_N))](
                self.part, self.peak, self.mass, self.position, *self._norm(w, f"{layer}.proj"), h, self.update,
                w.get(f"{layer}.proj.weight.scale"), stop, rows, n, C, self.splits, H=H, HEAD=d, BIAS=spec.bias,
                POST=spec.post_norm, SPLIT=SPLIT, DTYPE=stored,
                **self._tiles("project"),
            )  # fmt: skip
            post = w.get(f"{layer}.attn_post_norm.weight")
            step_kernels.up_kernel[self._grid(rows, triton.cdiv(width, BLOCK_N))](
                h, other, self.update, post, *self._norm(w, f"{layer}.mlp_norm"), *self._norm(w, f"{layer}.up"),
                *self._norm(w, f"{layer}.gate"), self.hidden, w.get(f"{layer}.up.weight.scale"),
                w.get(f"{layer}.gate.weight.scale"), self.position, stop, rows, n, C, width, POST=post is not None,
                NORM=spec.norm,
                GATED=spec.mlp == "swiglu", BIAS=spec.bias, DTYPE=stored, **self._tiles("up"),
            )  # fmt: skip
            if post is not None:
                h, other = other, h
            step_kernels.down_kernel[self._grid(rows, triton.cdiv(C, BLOCK_N))](
                self.hidden, *self._norm(w, f"{layer}.down"), h, self.update, w.get(f"{layer}.down.weight.scale"),
                self.position, stop, rows, n, C, width, BIAS=spec.bias, POST=spec.post_norm, DTYPE=stored,
                **self._tiles("down"),
            )  # fmt: skip
            post = w.get(f"{layer}.mlp_post_norm.weight")
        return h

    def _entrance(self, w: dict) -> tuple:
        """What the projection of a token takes."""
        return *self._norm(w, "proj_in"), w.get("pos_embed"), self.cond if self.shape.cond else None

    def _options(self) -> dict:
        options = {"COPIES": self.shape.copies, "TABLE": self.spec.positions > 0, "COND": self.shape.cond}
        return {**options, "BLOCK_D": tile(self.spec.token_dim)}

    def launch(self, w: dict) -> None:
        """The launches of a step."""
        spec, shape, h, tiles = self.spec, self.shape, self.layers(w), self._tiles("head")
        head_kernels.head_kernel[self._grid(shape.samples, triton.cdiv(spec.channels, tiles["BLOCK_N"]))](
            h, self.update, w.get(f"layers.{spec.layers - 1}.mlp_post_norm.weight"), w.get("final_norm.weight"),
            *self._norm(w, "proj_out"), self.z, self.guidance, self.x, self.entry, *self._entrance(w), self.position,
            shape.samples, shape.tokens, shape.prefix, spec.channels, spec.token_dim, spec.affine.soft_clip,
            SCALE=spec.affine.scale, CLIPPED=spec.affine.soft_clip > 0, POST=spec.post_norm, RULE=shape.rule,
            NORM="rms_norm" if spec.final_norm else "none", START=spec.start, **self._options(), **tiles,
        )  # fmt: skip

    def fill(self, z: torch.Tensor, context: tuple, temperature: float) -> None:
        """Copy a part into the buffers."""
        (cond, _, cos, sin, guidance), n = context, len(z)
        self.z[:n] = z
        self.x[:n] = z
        self.scale.fill_(self.spec.head_dim**-0.5)
        if guidance is not None:
            self.guidance[:n] = guidance
            self.scale[self.shape.samples :] /= temperature
        if cond is not None:
            self.cond.view(self.shape.copies, -1, self.spec.channels)[:, :n] = cond
        if cos is not None:
            self.cos.copy_(cos)
            self.sin.copy_(sin)

    def read(self, w: dict, prefix: torch.Tensor | None) -> None:
        """Text into the cache."""
        spec, shape, n = self.spec, self.shape, _text_tokens(self.spec, self.shape)
        if prefix is not None:
            text = prefix.new_zeros(shape.copies, shape.samples, *prefix.shape[2:])
            text[:, : prefix.shape[1]] = prefix
            for first in range(0, shape.prefix, n):
                given = text[:, :, first : first + n].flatten(0, 1).contiguous()
                rows = self.rows * given.shape[1]
                step_kernels.down_kernel[self._grid(rows, triton.cdiv(spec.channels, BLOCK_N))](
                    given, *self._norm(w, "proj_text"), self.entry, self.entry, None, None, None, rows, 1,
                    spec.channels, spec.text_dim, BIAS=True, POST=True, DTYPE=None, **self._tiles("down"),
                )  # fmt: skip
                self.position.fill_(first)
                self.layers(w, given.shape[1])

    def begin(self, w: dict, prefix: torch.Tensor | None) -> None:
        """Text into the cache, then the first token of every sample."""
        spec, shape = self.spec, self.shape
        self.read(w, prefix)
        self.position.fill_(shape.prefix)
        tokens, stride = (w["start"], 0) if spec.start else (self.x, shape.tokens * spec.token_dim)
        head_kernels.embed_kernel[self._grid(shape.samples, triton.cdiv(spec.channels, BLOCK_N))](
            tokens, *self._entrance(w), self.entry, shape.samples, stride, spec.channels, spec.token_dim,
            **self._options(), **self._tiles("embed"),
        )  # fmt: skip

    def capture(self, w: dict) -> None:
        """The step as a CUDA graph; one that is thrown away compiles the kernels first."""
        self.launch(w)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch(w)


class Running:
    """A session with the weights of its model for the length of a call."""

    def __init__(self, session: TritonSession, model: Model):
        self.session, self.w = session, model.w
        self.step = functools.partial(session.launch, model.w)

    def load(self, z: torch.Tensor, context: tuple, temperature: float) -> None:
        session = self.session
        session.fill(z, context, temperature)
        if session.device.type == "cuda":
            if session.graph is None:
                session.begin(self.w, None)
                session.capture(self.w)
                session.fill(z, context, temperature)
            self.step = session.graph.replay
        session.begin(self.w, context[1])

    def result(self) -> torch.Tensor:
        return self.session.x


def refuse(z, weights, cond, prefix, cos, sin, guidance, text, *others) -> str | None:
    """Why the kernels cannot sample from a block, or None."""
    spec = BlockSpec.from_json(text)
    if z.dtype != torch.float32:
        return f"tokens are {z.dtype}, it takes float32"
    if reason := refuse_tensors(*weights):
        return reason
    widest = WIDEST_TOKEN[weights[0].element_size()]
    if spec.token_dim > widest or spec.head_dim > WIDEST_HEAD:
        sizes = f"tokens of {spec.token_dim} and heads of {spec.head_dim} values"
        return f"{sizes}, in {weights[0].dtype} it takes up to {widest} and {WIDEST_HEAD}"
    return None


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return cache_bytes()
    return cache_bytes(torch.cuda.get_device_properties(device).total_memory)


def running(
    model: Model, z, context: tuple, rule: str, temperature: float, kind: type, n: int = 1, options: tuple = ()
):
    """Parts of the batch in their sessions, which are of that kind, take n tokens of each sequence a step, and are kept
    for these options. context: cond, prefix, cos, sin and guidance."""
    spec, (cond, prefix, *_, guidance), (B, T, _) = model.spec, context, z.shape
    shape = Shape(B, T, 0 if prefix is None else prefix.shape[1], 1 if guidance is None else 2, cond is not None, rule)
    budget = _budget(z.device)

    def needed(of: Shape) -> Buffers:
        return kind.buffers(spec, model.dtype, of, n, *options)

    def session(of: Shape) -> Running:
        key, made = (kind, of, n, *options, z.device.index, pdl(z.device)), needed(of)

        def opened():
            return kind(model, of, z.device, made, n, *options)

        return Running(_sessions.get(model, key, size_of(made), budget, opened), model)

    def size(of: Shape) -> int:
        return size_of(needed(of._replace(samples=bucket(of.samples))))

    return loaded(z.flip(1) if spec.flip else z, context, shape, temperature, size, budget, session)


def block_inverse(z, weights, cond, prefix, cos, sin, guidance, text: str, rule: str, temperature, quantize="none"):
    """Data of noise, token after token over the cache; a batch whose session passes the budget goes in parts."""
    model = packed(text, weights, quantize)
    spec, T = model.spec, z.shape[1]
    if not len(z):
        return z.clone()
    with alone(z.device):
        parts = running(model, z, (cond, prefix, cos, sin, guidance), rule, temperature, TritonSession)
        x = sample(z, T if spec.start else T - 1, functools.partial(wait, z.device), parts)
    return x.flip(1) if spec.flip else x


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_ends: dict[torch.device, torch.cuda.Event] = {}


@contextlib.contextmanager
def alone(device: torch.device):
    """One call at a time uses a session's buffers; on the device it follows the last one, whatever its stream."""
    with _sessions.lock:
        if device in _ends:
            torch.cuda.current_stream(device).wait_event(_ends[device])
        try:
            yield
        finally:
            if device.type == "cuda":
                _ends[device] = torch.cuda.current_stream(device).record_event()
