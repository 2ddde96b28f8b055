"""The token step of a TarFlow block as an ONNX graph with a KV cache, run by ONNX Runtime; needs onnx and onnxruntime.

The attention is the operator GroupQueryAttention, which ONNX Runtime has for decoders: it writes keys and values into
one preallocated cache. All tensors are bound to memory once, so that nothing is copied between torch and the runtime.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from starflow_kernels import BlockSpec
from starflow_kernels.block.network import position_table

Weights = dict[str, torch.Tensor]


class _Graph:
    """Nodes and initial values of a graph."""

    def __init__(self, w: Weights) -> None:
        self.w, self.nodes, self.initializers = w, [], []

    def weight(self, name: str, transposed: bool = False) -> str:
        """Add a weight and return its name."""
        value = self.w[name].T.contiguous() if transposed else self.w[name]
        self.initializers.append(numpy_helper.from_array(value.numpy(), name))
        return name

    def node(self, op: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes) -> str:
        """Add a node and return the name of its first output."""
        outputs = outputs or (f"value{len(self.nodes)}",)
        self.nodes.append(helper.make_node(op, list(inputs), list(outputs), **attributes))
        return outputs[0]

    def linear(self, x: str, name: str) -> str:
        """Add the linear layer `name`."""
        product = self.node("MatMul", x, self.weight(f"{name}.weight", transposed=True))
        return self.node("Add", product, self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        """Add the LayerNorm `name`."""
        return self.node("LayerNormalization", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))


def _model(w: Weights, spec: BlockSpec, B: int, T: int) -> bytes:
    """Return the graph of a step; names of its inputs and outputs are those of `_Session`."""
    graph, C, D = _Graph(w), spec.channels, spec.token_dim
    h = graph.node("Add", graph.linear("token", "proj_in"), "position")
    ends = [("token", [B, 1, D]), ("z", [B, 1, D]), ("position", [1, 1, C])]
    caches = []
    for i in range(spec.layers):
        layer, past, present = f"layers.{i}", (f"k{i}", f"v{i}"), (f"k_out{i}", f"v_out{i}")
        qkv = graph.linear(graph.norm(h, f"{layer}.attn_norm"), f"{layer}.qkv")
        attended = graph.node(
            "GroupQueryAttention", qkv, "", "", *past, "last", "slots", outputs=(f"attended{i}", *present),
            domain="com.microsoft", num_heads=spec.heads, kv_num_heads=spec.kv_heads,
        )  # fmt: skip
        h = graph.node("Add", h, graph.linear(attended, f"{layer}.proj"))
        up = graph.linear(graph.norm(h, f"{layer}.mlp_norm"), f"{layer}.up")
        h = graph.node("Add", h, graph.linear(graph.node("Gelu", up, domain="com.microsoft"), f"{layer}.down"))
        caches += zip(past, present)
    graph.node("Split", graph.linear(h, "proj_out"), outputs=("a", "mu"), axis=-1, num_outputs=2)
    scaled = graph.node("Mul", graph.node("Exp", "a"), "z")
    graph.node("Add", "mu", scaled, outputs=("x",))
    shape = [B, spec.kv_heads, T, spec.head_dim]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends]
    inputs += [helper.make_tensor_value_info(past, TensorProto.FLOAT, shape) for past, _ in caches]
    inputs.append(helper.make_tensor_value_info("last", TensorProto.INT32, [B]))
    inputs.append(helper.make_tensor_value_info("slots", TensorProto.INT32, [1]))
    outputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [B, 1, D])]
    outputs += [helper.make_tensor_value_info(present, TensorProto.FLOAT, shape) for _, present in caches]
    made = helper.make_graph(graph.nodes, "step", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets)
    model.ir_version = min(model.ir_version, 10)
    return model.SerializeToString()


class _Session:
    """A session for blocks of one shape, with its cache and bound memory."""

    def __init__(self, w: Weights, spec: BlockSpec, B: int, T: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        self.session = onnxruntime.InferenceSession(_model(w, spec, B, T), options, ["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        # Tokens come first, so that those of a step are one piece of memory.
        self.z, self.x = torch.zeros(2, T, B, 1, spec.token_dim)
        self.positions = position_table(w, spec)[:T, None].contiguous()
        self.cache = torch.zeros(2, spec.layers, B, spec.kv_heads, T, spec.head_dim)
        self.last, self.slots = torch.zeros(B, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        for i in range(spec.layers):
            for name, memory in zip("kv", self.cache[:, i]):
                self._bind(f"{name}{i}", memory)
                self._bind(f"{name}_out{i}", memory, output=True)
        self._bind("last", self.last)
        self._bind("slots", self.slots)

    def _bind(self, name: str, memory: torch.Tensor, output: bool = False) -> None:
        bind = self.binding.bind_output if output else self.binding.bind_input
        kind = np.int32 if memory.dtype == torch.int32 else np.float32
        bind(name, "cpu", 0, kind, list(memory.shape), memory.data_ptr())

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Return the data (B, T, D) of noise in the block's own order."""
        self.z.copy_(z.transpose(0, 1).unsqueeze(2))
        self.x[0] = self.z[0]
        self.last.zero_()
        self.slots.fill_(1)
        for t in range(len(self.x) - 1):
            self._bind("token", self.x[t])
            self._bind("z", self.z[t + 1])
            self._bind("position", self.positions[t : t + 1])
            self._bind("x", self.x[t + 1], output=True)
            self.session.run_with_iobinding(self.binding)
            self.last += 1
            self.slots += 1
        return self.x.squeeze(2).transpose(0, 1)


class OnnxInverse:
    """Inverse of TarFlow blocks in float32, with the arguments of `sliced_inverse`; a block's session is made once."""

    def __init__(self) -> None:
        self._sessions: dict[int, _Session] = {}

    def __call__(self, z: torch.Tensor, w: Weights, spec: BlockSpec) -> torch.Tensor:
        if id(w) not in self._sessions:
            self._sessions[id(w)] = _Session(w, spec, *z.shape[:2])
        x = self._sessions[id(w)](z.flip(1) if spec.flip else z)
        return x.flip(1) if spec.flip else x.clone()
