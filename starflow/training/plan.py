"""Plan of a training run before it starts: parameters, memory, work, time, and what to switch on when it does not fit.

The formulas count what autograd keeps for the backward pass, tensor by tensor. `c` is the bytes per value of the
products (2 with bf16, else 4), `s` that of the hidden states. For a layer of width C with Q query and K key channels,
H heads and an MLP of width M, a token keeps

| part | on a GPU | native kernels (CPU, float32) | torch (CPU) |
|---|---|---|---|
| each of two norms | s C (sum), s C (norm), c C (cast, if s != c) | 4 C | 4 C (input), c C (norm) |
| attention | c (Q + 2 K), c Q, 4 H | 4 (2 Q + 2 K + H) | c (Q + 2 K), c Q, 4 H |
| MLP | 2 c M, with a gate 4 c M | 4 M | 2 c M, with a gate 4 c M |

The work is that of `work.step_flops`; a checkpointed layer runs forward twice.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import torch

from starflow_kernels import BlockSpec

from ..errors import ConfigError
from ..models.block import FlowBlock
from ..models.config import FlowConfig
from ..models.flow import Flow
from .flow import FlowRunConfig, FlowTrainingConfig
from .parallel import Parallel, check_division
from .work import block_flops, layer_values, rows_per_image

Kernels = Literal["gpu", "native", "torch"]
FLOAT = 4
BFLOAT16 = 2
SECONDS_PER_DAY = 86400
# Fraction of a device's memory that tensors may take; the rest is for its context and for fragmentation.
USABLE = 0.92
# Images per device and pass below which products of large matrices become slow.
EFFICIENT_IMAGES = 4
# Largest number of a machine, far above any real one; the inverse is the smallest.
LARGEST = 1e9


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices to train on.

    Args:
        gpus: number of devices.
        memory_gb: memory per device in units of 1e9 bytes.
        tflops: peak of a device in units of 1e12 operations per second.
        utilisation: expected fraction of that peak.
    """

    gpus: int = 8
    memory_gb: float = 80.0
    tflops: float = 989.0
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 1 / LARGEST <= getattr(self, field.name) <= LARGEST:
                given = getattr(self, field.name)
                raise ConfigError(f"{field.name}={given}: expected a number from {1 / LARGEST:g} to {LARGEST:g}")
        if self.utilisation > 1:
            raise ConfigError(f"utilisation={self.utilisation}: expected at most 1")


@dataclasses.dataclass(frozen=True)
class Switches:
    """Settings that trade memory for time.

    Args:
        parallel: "data" keeps all weights on each device, and a copy during a step; "fsdp" keeps a part.
        reshard_after_forward: whether FSDP drops the gathered weights of a layer until its backward pass.
        accumulate: parts of a batch, whose gradients are added.
        checkpoint_layers: whether the backward pass computes each layer again in place of keeping its values.
        bf16: whether the networks run in bfloat16.
    """

    parallel: Parallel = "data"
    reshard_after_forward: bool = True
    accumulate: int = 1
    checkpoint_layers: bool = False
    bf16: bool = False

    def changes(self, other: Switches) -> str:
        """Return the settings in which `other` differs, as arguments of --set."""
        values = {f.name: getattr(other, f.name) for f in dataclasses.fields(self)}
        changed = {name: value for name, value in values.items() if value != getattr(self, name)}
        return " ".join(f"--set training.{name}={str(value).lower()}" for name, value in changed.items())


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Share of a flow block.

    Args:
        parameters: number of parameters.
        flops: operations of a forward pass of one image.
        activations: bytes that a device keeps for the backward pass.
        without_checkpoints: the same if no layer is computed again.
        rank_bytes: bytes of the weights that a device stores.
        gathered_bytes: bytes of the whole weights of a layer, which several devices gather.
    """

    parameters: int
    flops: int
    activations: int
    without_checkpoints: int
    rank_bytes: int
    gathered_bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan of a run.

    Args:
        parameters: number of parameters.
        switches: settings that the plan assumes.
        images: images per device and pass.
        blocks: share of each block.
        memory: bytes per device by part.
        peak: largest bytes per device. It is less than the sum of the parts that are never there together.
        flops: operations of a step on all devices.
        seconds: seconds per step.
        tokens_per_second: tokens of images per second on all devices.
        days: days of the run.
        fits: whether the peak fits into the usable memory of a device.
        advice: what to switch on, empty if the run fits.
    """

    parameters: int
    switches: Switches
    images: int
    blocks: tuple[BlockPlan, ...]
    memory: dict[str, int]
    peak: int
    flops: float
    seconds: float
    tokens_per_second: float
    days: float
    fits: bool
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return nested plain mappings."""
        return dataclasses.asdict(self)


def switches_of(training: FlowTrainingConfig) -> Switches:
    """Return the switches of the training settings."""
    return Switches(**{f.name: getattr(training, f.name) for f in dataclasses.fields(Switches)})


def plan(config: FlowRunConfig, machine: Machine, switches: Switches | None = None, kernels: Kernels = "gpu") -> Plan:
    """Return the plan of a run, with advice if it does not fit.

    Args:
        config: settings of the run.
        machine: devices to train on.
        switches: switches in place of those in the settings.
        kernels: implementation of the layers, see the table of the module.

    Raises:
        ConfigError: the devices cannot divide the batch evenly.
    """
    switches = switches_of(config.training) if switches is None else switches
    check_division(config.training.batch_size, machine.gpus, switches.accumulate)
    with torch.device("meta"):
        flow = Flow(config.model)
    found = _plan(flow, config, machine, switches, kernels)
    return found if found.fits else dataclasses.replace(found, advice=_advice(flow, config, machine, found, kernels))


def _plan(flow: Flow, config: FlowRunConfig, machine: Machine, switches: Switches, kernels: Kernels) -> Plan:
    model, training = config.model, config.training
    images = training.batch_size // (machine.gpus * switches.accumulate)
    sharded = switches.parallel == "fsdp" and machine.gpus > 1
    compute = BFLOAT16 if switches.bf16 else FLOAT
    # FSDP gathers the weights in the dtype of the products; elsewhere autocast copies them and keeps the copies.
    gathered_bytes = compute if sharded else FLOAT
    blocks, copies = [], []
    for i, block in enumerate(flow.blocks):
        count, layers = sum(p.numel() for p in block.parameters()), model.layers[i]
        kept, layer = _kept_bytes(model, i, images, compute, kernels, training.dropout)
        states = images * rows_per_image(model, i) * model.block_channels(i) * _state_bytes(model, i, compute)
        copies.append(BFLOAT16 * _cast_values(block) if switches.bf16 and not sharded else 0)
        blocks.append(
            BlockPlan(
                parameters=count,
                flops=sum(block_flops(model, i)),
                activations=kept - layers * (layer - states) if switches.checkpoint_layers else kept,
                without_checkpoints=kept,
                rank_bytes=FLOAT * -(-count // (machine.gpus if sharded else 1)),
                gathered_bytes=gathered_bytes * (layer_values(block.spec)[2] if layers else 0),
            )
        )
    weights = sum(b.rank_bytes for b in blocks)
    # FSDP gathers the next layer while one computes.
    gathered = 2 * max(b.gathered_bytes for b in blocks)
    if not sharded or not switches.reshard_after_forward:
        gathered = gathered_bytes * sum(b.parameters for b in blocks)
    again = max(_kept_bytes(model, i, images, compute, kernels, training.dropout)[1] for i in range(len(blocks)))
    working = max(_working_bytes(model, i, images, compute, kernels) for i in range(len(blocks)))
    tokens, token_dim = model.token_shape
    memory = {
        "weights": weights,
        "gradients": weights,
        "Adam moments": 2 * weights,
        "moving average": weights if training.ema else 0,
        "activations": sum(b.activations for b in blocks),
        "bfloat16 weights": sum(copies),
        "gathered weights": gathered if machine.gpus > 1 else 0,
        "working memory": working + (again if switches.checkpoint_layers else 0),
        "data": 2 * FLOAT * images * tokens * token_dim + FLOAT * images * model.text_len * model.text_dim,
    }
    forward, layers_only = sum(b.flops for b in blocks), sum(block_flops(model, i)[0] for i in range(len(blocks)))
    flops = float(training.batch_size * (3 * forward + (layers_only if switches.checkpoint_layers else 0)))
    seconds = flops / (machine.gpus * machine.tflops * 1e12 * machine.utilisation)
    kept_bytes = [block.activations + copy for block, copy in zip(blocks, copies)]
    peak = _peak(memory, [b.rank_bytes for b in blocks], kept_bytes, switches.accumulate > 1)
    return Plan(
        parameters=sum(b.parameters for b in blocks),
        switches=switches,
        images=images,
        blocks=tuple(blocks),
        memory=memory,
        peak=peak,
        flops=flops,
        seconds=seconds,
        tokens_per_second=training.batch_size * tokens / seconds,
        days=training.steps * seconds / SECONDS_PER_DAY,
        fits=peak <= USABLE * machine.memory_gb * 1e9,
    )


def _peak(memory: dict[str, int], gradients: list[int], kept: list[int], accumulated: bool) -> int:
    """Return the largest bytes of a step.

    The backward pass goes from the last block to the first. It frees what a block keeps and makes its gradients. The
    sum is largest before or after a block.

    Args:
        memory: bytes by part.
        gradients: bytes of the gradients of each block.
        kept: bytes that each block keeps for the backward pass.
        accumulated: whether the gradients of an earlier pass are there from the start.
    """
    constant = ("weights", "Adam moments", "moving average", "gathered weights", "working memory", "data")
    made = [sum(gradients) if accumulated else sum(gradients[i:]) for i in range(len(kept) + 1)]
    moments = [made[i] + sum(kept[:i]) for i in range(len(kept) + 1)]
    return sum(memory[name] for name in constant) + max(moments)


def _advice(flow: Flow, config: FlowRunConfig, machine: Machine, found: Plan, kernels: Kernels) -> str:
    """Return the switches with the least loss of speed under which a run fits."""
    given = found.switches
    # A likelihood is trained in float32.
    bf16 = given.bf16 or config.model.noise_std > 0 or not config.model.levels
    parallel: Parallel = "fsdp" if machine.gpus > 1 else given.parallel
    trials = [given, dataclasses.replace(given, bf16=bf16)]
    trials.append(dataclasses.replace(trials[-1], parallel=parallel))
    trials.append(dataclasses.replace(trials[-1], checkpoint_layers=True))
    share = config.training.batch_size // machine.gpus
    divisors = [parts for parts in range(given.accumulate, share + 1) if share % parts == 0]
    for images, trial in itertools.product((EFFICIENT_IMAGES, 1), dict.fromkeys(trials)):
        for accumulate in (parts for parts in divisors if images * parts <= share):
            switches = dataclasses.replace(trial, accumulate=accumulate)
            better = _plan(flow, config, machine, switches, kernels)
            if better.fits:
                return f"{given.changes(switches)} takes {better.peak / 1e9:.1f} GB per device"
    return "no switch makes it fit: use more devices, or devices with more memory"


def _state_bytes(config: FlowConfig, block: int, compute: int) -> int:
    """Return the bytes per value of the hidden states: learned positions are added in float32."""
    return FLOAT if config.block_spec(block).positions else compute


def _layer_bytes(spec: BlockSpec, state: int, compute: int, kernels: Kernels, dropout: float) -> int:
    """Return the bytes that a layer keeps per token, see the table of the module."""
    (q, kv, _), C, M = layer_values(spec), spec.channels, spec.mlp_dim
    if kernels == "native":
        return FLOAT * (2 * C + 2 * q + 2 * kv + M + spec.heads + (2 * C if dropout else 0))
    if kernels == "gpu":
        norm = 2 * state * C + (compute * C if state != compute else 0)
        drop = C if dropout else 0
    else:
        norm = FLOAT * C * (2 if spec.norm == "rms_norm" else 1) + compute * C
        drop = compute * C if dropout else 0
    norm = compute * C if spec.norm == "none" else norm
    attention = compute * (2 * q + 2 * kv) + FLOAT * spec.heads
    mlp = compute * M * (4 if spec.mlp == "swiglu" else 2)
    extra = (2 * FLOAT + (0 if compute == FLOAT else compute)) * (
        (q + kv if spec.qk_norm else 0) + (2 * C if spec.post_norm else 0)
    )
    return 2 * (norm + drop) + attention + mlp + extra


def _kept_bytes(
    config: FlowConfig, block: int, images: int, compute: int, kernels: Kernels, dropout: float
) -> tuple[int, int]:
    """Return the bytes that a block keeps for the backward pass, and those of each of its layers."""
    spec, rows, (tokens, token_dim) = (
        config.block_spec(block),
        images * rows_per_image(config, block),
        config.token_shape,
    )
    state = _state_bytes(config, block, compute)
    layer = rows * _layer_bytes(spec, state, compute, kernels, dropout)
    # Noise, and the tokens in the order and dtype of the input projection.
    ends = images * tokens * token_dim * (FLOAT + compute) + rows * state * spec.channels
    text = images * config.text_len * spec.text_dim * (compute if compute != FLOAT else 0)
    return spec.layers * layer + ends + text, layer


def _working_bytes(config: FlowConfig, block: int, images: int, compute: int, kernels: Kernels) -> int:
    """Return the bytes of the gradients inside a layer: two of the states and, outside of a kernel, two of the MLP."""
    spec = config.block_spec(block)
    inside = 0 if kernels == "native" else 2 * compute * spec.mlp_dim
    return images * rows_per_image(config, block) * (inside + 2 * FLOAT * spec.channels)


def _cast_values(block: FlowBlock) -> int:
    """Return the number of weights that autocast copies: all matrices but the head's, which runs in float32."""
    named = block.named_parameters()
    return sum(p.numel() for name, p in named if p.ndim == 2 and name.split(".")[0] not in ("proj_out", "pos_embed"))
