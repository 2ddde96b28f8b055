"""The sampling direction of a whole block in Triton: one step of five launches a layer and one for the head.

The kernels are in triton_step.py and triton_head.py, what is kept and how often steps run in engine.py.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton

from ..engine import Sessions, Shape, bucket, sample
from ..memory import cache_bytes
from ..packing import Remembered
from ..spec import BlockSpec
from ..triton_rotary import half_tile
from ..triton_runtime import interpreted, refuse_tensors
from . import triton_head, triton_step

# Of tokens by bytes of a weight: the head of wider ones spills on some chip.
WIDEST_TOKEN, WIDEST_HEAD = {2: 256, 4: 128}, 256
# Rows and outputs of a tile, keys of a split of attention and of a step in it: the same for every batch, so that bits
# are too.
BLOCK_M, BLOCK_N, SPLIT, BLOCK_S = 16, 32, 256, 32
# Rows of text that pass the network at a time.
TEXT_ROWS = 1024
_sessions = Sessions()


def config(kernel: str, width: int, D: int) -> dict[str, int]:
    """Tiles for weights of so many bytes a value and tokens of D values: the largest that do not spill."""
    if kernel == "embed":
        return {"num_warps": 4}
    if kernel == "head" and tile(D) >= 64:
        return {"BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    long = width == 2 and kernel != "project"
    return {"BLOCK_K": 64 if long else 32, "num_warps": 4, "num_stages": 3 if width == 2 else 2}


def tile(n: int) -> int:
    """Padded size of a token or a head."""
    return max(16, triton.next_power_of_2(n))


class Model:
    """Weights as the kernels read them: rotary pairs half a head apart, the position table in the block's own order."""

    def __init__(self, spec: BlockSpec, weights: list[torch.Tensor]):
        self.spec, self.dtype = spec, weights[0].dtype
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


packed = Remembered(Model)


def _text_tokens(spec: BlockSpec, shape: Shape) -> int:
    """Tokens of text a row in one pass."""
    return max(1, min(shape.prefix, TEXT_ROWS // (shape.samples * shape.copies)))


def buffers(spec: BlockSpec, dtype: torch.dtype, shape: Shape) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every buffer of a session."""
    rows, slots, wide = shape.samples * shape.copies, shape.prefix + shape.tokens, torch.float32
    tokens, splits = rows * _text_tokens(spec, shape), -(-slots // SPLIT)
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
        "position": ((2,), torch.int32),
    }  # fmt: skip


def session_bytes(spec: BlockSpec, dtype: torch.dtype, shape: Shape) -> int:
    """Bytes of all buffers of a session."""
    return sum(math.prod(size) * kind.itemsize for size, kind in buffers(spec, dtype, shape).values())


class TritonSession:
    """Buffers of one bucket and the launches of a step; the weights stay with the model, whose sessions end with it."""

    def __init__(self, model: Model, shape: Shape, device: torch.device):
        self.spec, self.shape, self.device = model.spec, shape, device
        self.rows = shape.samples * shape.copies
        for name, (size, dtype) in buffers(model.spec, model.dtype, shape).items():
            setattr(self, name, torch.zeros(size, dtype=dtype, device=device))
        self.splits = self.part.shape[2]
        self.graph = None

    def _grid(self, rows: int, columns: int) -> tuple[int]:
        """Programs that read the same weights stand side by side."""
        return (triton.cdiv(rows, BLOCK_M) * columns,)

    def _tiles(self, kernel: str) -> dict[str, int]:
        return {"BLOCK_M": BLOCK_M, **config(kernel, self.hidden.element_size(), self.spec.token_dim)}

    def _norm(self, w: dict, name: str) -> tuple:
        return w.get(f"{name}.weight"), w.get(f"{name}.bias")

    def layers(self, w: dict, n: int = 1) -> torch.Tensor:
        """n tokens of every row through the network, from `entry`; the state, whose last update may not be normed."""
        spec, rows, h, other = self.spec, self.rows * n, self.h, self.other
        C, H, KV, d, width = spec.channels, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp_dim
        pairs = half_tile(d) if spec.qk_norm else 16
        post = None
        for i in range(spec.layers):
            layer, first = f"layers.{i}", i == 0
            state, total = (self.entry, h) if first else (h, other)
            triton_step.qkv_kernel[self._grid(rows, (H + 2 * KV) * triton.cdiv(d - d // 2, pairs))](
                state, total, self.update, post, *self._norm(w, f"{layer}.attn_norm"), *self._norm(w, f"{layer}.qkv"),
                w.get(f"{layer}.head_norms"), self.cos, self.sin, self.scale, self.position, self.q, self.k_cache[i],
                self.v_cache[i], rows, n, C, self.k_cache.shape[3], H=H, KV=KV, HEAD=d, POST=post is not None,
                QK_NORM=spec.qk_norm, ROTARY=spec.rotary != "none", FIRST=first, PAIRS=pairs,
                NORM=spec.norm, BIAS=spec.bias, **self._tiles("qkv"),
            )  # fmt: skip
            if post is not None:
                h, other = other, h
            triton_step.attend_kernel[(rows * H * self.splits,)](
                self.q, self.k_cache[i], self.v_cache[i], self.position, self.part, self.peak, self.mass, n,
                self.k_cache.shape[3], self.splits, H=H, KV=KV, HEAD=d, BLOCK_D=tile(d), BLOCK_S=BLOCK_S, SPLIT=SPLIT,
                num_warps=4,
            )  # fmt: skip
            triton_step.project_kernel[self._grid(rows, triton.cdiv(C, BLOCK_N))](
                self.part, self.peak, self.mass, self.position, *self._norm(w, f"{layer}.proj"), h, self.update, rows,
                n, C, self.splits, H=H, HEAD=d, BIAS=spec.bias, POST=spec.post_norm, SPLIT=SPLIT, BLOCK_N=BLOCK_N,
                **self._tiles("project"),
            )  # fmt: skip
            post = w.get(f"{layer}.attn_post_norm.weight")
            triton_step.up_kernel[self._grid(rows, triton.cdiv(width, BLOCK_N))](
                h, other, self.update, post, *self._norm(w, f"{layer}.mlp_norm"), *self._norm(w, f"{layer}.up"),
                *self._norm(w, f"{layer}.gate"), self.hidden, rows, C, width, POST=post is not None,
                GATED=spec.mlp == "swiglu", NORM=spec.norm, BIAS=spec.bias, BLOCK_N=BLOCK_N, **self._tiles("up"),
            )  # fmt: skip
            if post is not None:
                h, other = other, h
            triton_step.down_kernel[self._grid(rows, triton.cdiv(C, BLOCK_N))](
                self.hidden, *self._norm(w, f"{layer}.down"), h, self.update, rows, C, width,
                BIAS=spec.bias, POST=spec.post_norm, BLOCK_N=BLOCK_N, **self._tiles("down"),
            )  # fmt: skip
            post = w.get(f"{layer}.mlp_post_norm.weight")
        return h

    def _entrance(self, w: dict) -> tuple:
        """What the projection of a token takes."""
        return *self._norm(w, "proj_in"), w.get("pos_embed"), self.cond if self.shape.cond else None

    def _options(self) -> dict:
        options = {"COPIES": self.shape.copies, "TABLE": self.spec.positions > 0, "COND": self.shape.cond}
        return {**options, "BLOCK_N": BLOCK_N, "BLOCK_D": tile(self.spec.token_dim)}

    def launch(self, w: dict) -> None:
        """The launches of a step."""
        spec, shape, h = self.spec, self.shape, self.layers(w)
        triton_head.head_kernel[self._grid(shape.samples, triton.cdiv(spec.channels, BLOCK_N))](
            h, self.update, w.get(f"layers.{spec.layers - 1}.mlp_post_norm.weight"), w.get("final_norm.weight"),
            *self._norm(w, "proj_out"), self.z, self.guidance, self.x, self.entry, *self._entrance(w), self.position,
            shape.samples, shape.tokens, shape.prefix, spec.channels, spec.token_dim, spec.affine.soft_clip,
            SCALE=spec.affine.scale, CLIPPED=spec.affine.soft_clip > 0, POST=spec.post_norm, RULE=shape.rule,
            NORM="rms_norm" if spec.final_norm else "none", START=spec.start, **self._options(),
            **self._tiles("head"),
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

    def begin(self, w: dict, prefix: torch.Tensor | None) -> None:
        """Text into the cache, then the first token of every sample."""
        spec, shape, n = self.spec, self.shape, _text_tokens(self.spec, self.shape)
        if prefix is not None:
            text = prefix.new_zeros(shape.copies, shape.samples, *prefix.shape[2:])
            text[:, : prefix.shape[1]] = prefix
            for first in range(0, shape.prefix, n):
                given = text[:, :, first : first + n].flatten(0, 1).contiguous()
                rows = self.rows * given.shape[1]
                triton_step.down_kernel[self._grid(rows, triton.cdiv(spec.channels, BLOCK_N))](
                    given, *self._norm(w, "proj_text"), self.entry, self.entry, rows, spec.channels, spec.text_dim,
                    BIAS=True, POST=True, BLOCK_N=BLOCK_N, **self._tiles("down"),
                )  # fmt: skip
                self.position.fill_(first)
                self.layers(w, given.shape[1])
        self.position.fill_(shape.prefix)
        tokens, stride = (w["start"], 0) if spec.start else (self.x, shape.tokens * spec.token_dim)
        triton_head.embed_kernel[self._grid(shape.samples, triton.cdiv(spec.channels, BLOCK_N))](
            tokens, *self._entrance(w), self.entry, shape.samples, stride, spec.channels, spec.token_dim,
            **self._options(), **self._tiles("embed"),
        )  # fmt: skip

    def capture(self, w: dict) -> None:
        """The step as a CUDA graph; one that is thrown away compiles the kernels first."""
        self.launch(w)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch(w)


class _Running:
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


def block_inverse(z, weights, cond, prefix, cos, sin, guidance, text: str, rule: str, temperature: float):
    """Data of noise, token after token over the cache; a batch whose session passes the budget goes in parts."""
    spec, model, (B, T, _) = BlockSpec.from_json(text), packed(text, weights), z.shape
    shape = Shape(B, T, 0 if prefix is None else prefix.shape[1], 1 if guidance is None else 2, cond is not None, rule)
    if not B:
        return z.clone()
    budget = _budget(z.device)

    def session(of: Shape) -> _Running:
        size = session_bytes(spec, model.dtype, of)
        key = of, z.device.index
        return _Running(_sessions.get(model, key, size, budget, lambda: TritonSession(model, of, z.device)), model)

    def size(of: Shape) -> int:
        return session_bytes(spec, model.dtype, of._replace(samples=bucket(of.samples)))

    # One call at a time uses a session's buffers, and streams other than this one wait for it.
    with _sessions.lock, contextlib.nullcontext() if interpreted() else _alone(z.device):
        x = sample(
            z.flip(1) if spec.flip else z, (cond, prefix, cos, sin, guidance), shape, T if spec.start else T - 1,
            temperature, size, budget, session, lambda: None if interpreted() else torch.cuda.synchronize(z.device),
        )  # fmt: skip
    return x.flip(1) if spec.flip else x


_ends: dict[torch.device, torch.cuda.Event] = {}


@contextlib.contextmanager
def _alone(device: torch.device):
    """Order on the device after the last call, whatever its stream."""
    if device in _ends:
        torch.cuda.current_stream(device).wait_event(_ends[device])
    try:
        yield
    finally:
        _ends[device] = torch.cuda.current_stream(device).record_event()
