"""Conditions of adaptive blocks and of atoms, as in Prose (arXiv 2508.18175)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from starflow_kernels import BlockSpec, linear
from starflow_kernels._core import compiled
from starflow_kernels._core.implicit import needs_gradient
from starflow_kernels._core.registration import are_plain
from starflow_kernels._core.token_order import own_order, take
from starflow_kernels._core.torch_private import is_intercepted
from starflow_kernels.linear import native

from .conditions import integers

# sigmoid(GATE) is the initial gate of each branch.
GATE = -2.0
# Kinds of atoms and of residues, and the largest wave length of a residue's position over 2 pi.
ATOMS, RESIDUES, WAVE = 128, 64, 1000.0


class AdaptiveCondition(nn.Module):
    """Map features of a condition to the condition of an adaptive block.

    Each branch of each layer has a LayerNorm of its own before the linear layer of scale and shift, and a gate.

    Args:
        spec: the block.
        features: features per token.
        tokens: rows of a learned table of positions, which are counted in the block's own order; 0 for no table.
        lookahead: whether a token also sees the features of the next token in the block's own order, which is the one
            that its hidden state determines without a start token.
    """

    def __init__(self, spec: BlockSpec, features: int, tokens: int, lookahead: bool):
        super().__init__()
        C, branches = spec.channels, spec.layers * spec.branches
        self.flip, self.lookahead = spec.flip, lookahead
        default = nn.Parameter()
        wide = [nn.Linear(2 * features, C), nn.GELU(), nn.Linear(C, C)]
        self.project = nn.Sequential(*(wide if lookahead else [nn.Linear(features, C)]))
        self.positions = nn.Parameter(1e-2 * default.new_empty(tokens, C).normal_()) if tokens else None
        self.norm_weight = nn.Parameter(default.new_ones(branches, C))
        self.norm_bias = nn.Parameter(default.new_zeros(branches, C))
        # Outputs are [scale | shift].
        self.weight = nn.Parameter(default.new_empty(branches, 2 * C, C).uniform_(-(C**-0.5), C**-0.5))
        self.bias = nn.Parameter(default.new_zeros(branches, 2 * C))
        self.gate = nn.Linear(C, branches * C)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, GATE)

    def forward(self, features: torch.Tensor, order: torch.Tensor | None, lengths: torch.Tensor | None) -> torch.Tensor:
        """Return the condition (B, T, cond_dim) of a block in its own order.

        Args:
            features: (B, T, F) features, zero beyond the lengths.
            order: as in `starflow_kernels.block_forward`.
            lengths: as in `starflow_kernels.block_forward`.
        """
        B, T, _ = features.shape
        index, _ = own_order(order, lengths, B, T, features.device, self.flip and order is None)
        features = take(features.to(self.weight.dtype), index)
        if self.lookahead:
            features = torch.cat([features, F.pad(features[:, 1:], (0, 0, 0, 1))], -1)
        x = self.project(features)
        added = torch.zeros_like(x) if self.positions is None else self.positions.expand_as(x)
        cpu = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if cpu and self._writes(x):
            return self._written(x, added)
        scales, shifts, gates = self._modulations(x, cpu)
        return torch.cat([added, *(scale.sigmoid() for scale in scales), *shifts, gates.sigmoid()], -1)

    def _branches(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Iterate over inputs, weight and bias of the scales and shifts of each branch, for x (B, T, C)."""
        normed = F.layer_norm(x, x.shape[-1:])
        for scale, shift, weight, bias in zip(self.norm_weight, self.norm_bias, self.weight, self.bias):
            yield torch.addcmul(shift, normed, scale), weight, bias

    def _writes(self, x: torch.Tensor) -> bool:
        """Return whether products of states on the CPU may be written without an op that torch knows of."""
        weights = self.weight, self.bias, self.gate.weight, self.gate.bias
        if is_intercepted() or needs_gradient(x, self.norm_weight, self.norm_bias, *weights):
            return False
        return are_plain([x, *weights]) and not (compiled.native_unavailable() or native.refuse(x, *weights[:2]))

    def _written(self, x: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Return the condition, whose parts the products write without copies.

        Args:
            x: (B, T, C) hidden states.
            added: (B, T, C) values that are added to the embedded tokens.
        """
        C, branches = x.shape[-1], len(self.weight)
        condition = compiled.empty(*x.shape[:2], (1 + 3 * branches) * C)
        first, scales, shifts, gates = condition.split([C, *(3 * [branches * C])], -1)
        first.copy_(added)
        parts = zip(self._branches(x), scales.split(C, -1), shifts.split(C, -1))
        for (inputs, weight, bias), scale, shift in parts:
            native.linear_into(scale, inputs, weight[:C], bias[:C], sigmoid=True)
            native.linear_into(shift, inputs, weight[C:], bias[C:])
        native.linear_into(gates, x, self.gate.weight, self.gate.bias, sigmoid=True)
        return condition

    def _modulations(self, x: torch.Tensor, cpu: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Return the scales of all branches before the sigmoid, their shifts, and their gates before the sigmoid.

        Scales and shifts are in one piece or in several.

        Args:
            x: (B, T, C) hidden states.
            cpu: whether to use the op `linear`, which is faster there than torch's product of a batch. On a GPU one
                call is faster than many.
        """
        B, T, C = x.shape
        if cpu:
            outputs = [linear(inputs, weight, bias) for inputs, weight, bias in self._branches(x)]
            gates = linear(x, self.gate.weight, self.gate.bias)
            return [output[..., :C] for output in outputs], [output[..., C:] for output in outputs], gates
        normed = F.layer_norm(x, (C,)).view(B * T, C) * self.norm_weight[:, None] + self.norm_bias[:, None]
        scale, shift = (
            torch.baddbmm(self.bias[:, None, part], normed, self.weight[:, part].mT).transpose(0, 1).flatten(1)
            for part in (slice(C), slice(C, 2 * C))
        )
        return [scale.unflatten(0, (B, T))], [shift.unflatten(0, (B, T))], self.gate(x)


class AtomFeatures(nn.Module):
    """Map atoms of a peptide to features: learned vectors of atom and residue, waves of position and chain length.

    Args:
        width: values of each of the four parts of the features.
    """

    def __init__(self, width: int):
        super().__init__()
        self.atom, self.residue = nn.Embedding(ATOMS, width), nn.Embedding(RESIDUES, width)

    def forward(self, atoms: torch.Tensor) -> torch.Tensor:
        """Return features (B, T, 4 width).

        Args:
            atoms: (B, T, 4) integers: kind of the atom, kind of its residue, position of the residue in the chain
                from 1, and number of residues.
        """
        atom, residue, position, length = atoms.unbind(-1)
        weight = self.atom.weight
        pairs = torch.arange(0, weight.shape[1], 2, dtype=torch.float32, device=weight.device)
        waves = (pairs * (-math.log(WAVE) / weight.shape[1])).exp()
        angles = torch.stack([position, length], -1)[..., None] * waves
        waves = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)  # (B, T, 2, width)
        return torch.cat([self.atom(atom), self.residue(residue), waves.flatten(-2).to(weight.dtype)], -1)


def check_atoms(value: object, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the integers of `AtomFeatures` as int64.

    Args:
        value: expected integers.
        shape: expected shape.
        device: device of the result.

    Raises:
        ValueError: something else.
    """
    atoms = integers(value) if isinstance(value, torch.Tensor) else None
    if atoms is None or atoms.shape != shape:
        given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"condition: expected integers of shape {shape}, got {given}")
    return atoms.to(device)


def check_kinds(atoms: torch.Tensor) -> None:
    """Raise ValueError unless the kinds of atoms and residues (B, T, 4) are rows of their tables.

    Args:
        atoms: integers, 0 at the padding.
    """
    if is_intercepted() or atoms.is_meta or not atoms.numel():
        return
    for name, kinds, count in zip(("atoms", "residues"), atoms.unbind(-1), (ATOMS, RESIDUES)):
        if kinds.min() < 0 or kinds.max() >= count:
            raise ValueError(f"condition: expected kinds of {name} from 0 to {count - 1}")
