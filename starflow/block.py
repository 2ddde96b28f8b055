"""One flow block as a module: parameters by name and shape from its BlockSpec, the maths from starflow_kernels."""

from __future__ import annotations

import torch
from torch import nn

from starflow_kernels import BlockSpec, block_forward, block_inverse


class FlowBlock(nn.Module):
    """Weights of a flow block, its class embedding, and both directions.

    spec: the block. num_classes: rows of the class embedding, 0 for none.
    """

    def __init__(self, spec: BlockSpec, num_classes: int = 0):
        super().__init__()
        self.spec = spec
        self._slots: dict[str, tuple[nn.Module, str]] = {}
        for name, shape in spec.weight_shapes.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(leaf, nn.Parameter(torch.empty(shape)))
            self._slots[name] = owner, leaf
        self.class_embed = nn.Parameter(torch.empty(num_classes, spec.channels)) if num_classes else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Identity transform at the start: the head is zero, everything else as in the released code."""
        for name, weight in self.weights().items():
            if name == "start":
                nn.init.normal_(weight)
            elif name == "pos_embed":
                nn.init.normal_(weight, std=1e-2)
            elif weight.ndim == 2 and not name.startswith("proj_out"):
                nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
            elif self.spec.norm == "layer_norm" and name.endswith(("attn_norm.weight", "mlp_norm.weight")):
                nn.init.ones_(weight)
            else:
                nn.init.zeros_(weight)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed, std=1e-2)

    def weights(self) -> dict[str, torch.Tensor]:
        """Name -> parameter in the order of `spec.weight_shapes`."""
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self._slots.items()}

    def condition(self, labels: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        """(rows, C) class embedding of int labels (rows,); -1, or None for all, is the mean over the classes."""
        if self.class_embed is None:
            return None
        mean = self.class_embed.mean(dim=0, keepdim=True)
        if labels is None:
            return mean.expand(rows, -1)
        return torch.where(labels.unsqueeze(1) < 0, mean, self.class_embed[labels.clamp(min=0)])

    def forward(self, x, labels=None, text=None, rotary=(None, None), **options):
        """Data to noise, see `starflow_kernels.block_forward`; text (B, L, text_dim) stands in front of x (B, T, D)."""
        cos, sin = rotary
        cond = self.condition(labels, x.shape[0])
        return block_forward(x, self.weights(), self.spec, cond=cond, prefix=text, cos=cos, sin=sin, **options)

    def inverse(self, z, labels=None, text=None, rotary=(None, None), **guidance):
        """Noise to data, see `starflow_kernels.block_inverse`; under guidance labels and text have 2B rows."""
        cos, sin = rotary
        cond = self.condition(labels, len(z) if labels is None else len(labels))
        if cond is not None and guidance.get("guidance") is not None and labels is None:
            cond = cond.repeat(2, 1)
        return block_inverse(z, self.weights(), self.spec, cond=cond, prefix=text, cos=cos, sin=sin, **guidance)
