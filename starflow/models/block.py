"""One flow block as a module: its parameters come from its BlockSpec, the computation from starflow_kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from starflow_kernels import BlockSpec, Inverse, block_forward, block_inverse, block_params

from .adaptive import AdaptiveCondition
from .hooks import has_hooks, has_replaced_forward, runs_methods, views, with_forward_hooks

# Cosine and sine of rotary angles, or Nones.
Rotary = tuple[torch.Tensor | None, torch.Tensor | None]


class LayerWeights(nn.Module):
    """Parameters of one layer, or of a part of it.

    Hooks of its `forward` load them: those of accelerate, diffusers and FSDP.
    """

    # Whether the backward pass computes the layer again instead of keeping its inner values.
    recomputes = False

    def forward(self, layer: Callable[..., Any] | None = None, *states: Any) -> Any:
        """Return the parameters by name, see `views`; or run a layer with them.

        Args:
            layer: maps parameters and states to the next states.
            states: see `starflow_kernels.block_forward`, run_layer.
        """
        if layer is None:
            return views(dict(self.named_parameters()))

        def run(*states: Any) -> Any:
            # Read here, since FSDP brings the parameters back before they are used again.
            return layer(dict(self.named_parameters()), *states)

        return checkpoint(run, *states, use_reentrant=False) if self.recomputes else run(*states)


class FlowBlock(nn.Module):
    """Weights of a flow block, its embedding of a condition, and both directions.

    With the attribute `by_layers`, `forward` calls the modules of `layer_modules`. FSDP may then shard each, the
    backward pass recompute it (`recomputes`), or torch compile it. The other methods need unsharded layers.

    Args:
        spec: the block.
        num_classes: rows of the class embedding, 0 for none.
        features: features of a condition other than a class, 0 for none.
        adaptive: further arguments of the `AdaptiveCondition` of an adaptive block.
    """

    def __init__(self, spec: BlockSpec, num_classes: int = 0, features: int = 0, adaptive: Sequence[Any] = ()):
        super().__init__()
        self.spec = spec
        self.by_layers = False
        # The block with an order of its call in place of its own.
        self._unflipped = dataclasses.replace(spec, flip=False) if spec.flip else spec
        # Name -> path of the module and name of the parameter; and the paths, each with that of its parent.
        self._slots: dict[str, tuple[str, str]] = {}
        self._paths: dict[str, tuple[str, str]] = {}
        # An empty parameter has the default dtype and device of torch, which new weights follow like every module.
        default = nn.Parameter()
        for name, shape in spec.weight_shapes.items():
            owner: nn.Module = self
            path = ""
            *parts, leaf = name.split(".")
            for part in parts:
                parent, path = path, f"{path}.{part}".lstrip(".")
                if path not in self._paths:
                    owner.add_module(part, LayerWeights())
                    self._paths[path] = parent, part
                owner = owner.get_submodule(part)
            owner.register_parameter(leaf, nn.Parameter(default.new_empty(shape)))
            self._slots[name] = path, leaf
        self.class_embed = nn.Parameter(default.new_empty(num_classes, spec.channels)) if num_classes else None
        embeds = features and not spec.adaptive
        self.feature_embed = nn.Parameter(default.new_empty(features, spec.channels)) if embeds else None
        self.adaptive = AdaptiveCondition(spec, features, *adaptive) if spec.adaptive else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize to the identity transform: the head is zero, everything else is as in the upstream code."""
        weights = self.weights()
        if weights["proj_in.weight"].is_meta:
            return  # there is nothing to initialize, and torch would import its compiler for it
        for name, weight in weights.items():
            if name == "start":
                nn.init.normal_(weight)
            elif name == "pos_embed":
                nn.init.normal_(weight, std=1e-2)
            elif weight.ndim == 2 and not name.startswith("proj_out"):
                nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
            elif name.endswith(self._layer_norms()):
                nn.init.ones_(weight)
            else:
                nn.init.zeros_(weight)
        if self.class_embed is not None:
            nn.init.normal_(self.class_embed, std=1e-2)
        if self.feature_embed is not None:
            nn.init.uniform_(self.feature_embed, -(len(self.feature_embed) ** -0.5), len(self.feature_embed) ** -0.5)

    def _layer_norms(self) -> tuple[str, ...]:
        """Return the endings of the names of scales of LayerNorms, which begin at 1."""
        names = ("attn_norm.weight", "mlp_norm.weight") if self.spec.norm == "layer_norm" else ()
        return (*names, "q_norm.weight", "k_norm.weight") if self.spec.qk_layer_norm else names

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the parameters by name, in the order of `spec.weight_shapes`."""
        modules = self._parts()
        own = {path: module._parameters for path, module in modules.items()}  # noqa: SLF001
        # A parameter that a caller has replaced by a tensor is only an attribute.
        weights: dict[str, Any] = {
            name: own[path][leaf] if leaf in own[path] else getattr(modules[path], leaf)
            for name, (path, leaf) in self._slots.items()
        }
        for path, module in modules.items():
            if "forward" in module.__dict__ and isinstance(module, LayerWeights):
                loaded = module()
                weights |= {n: loaded[leaf] for n, (owner, leaf) in self._slots.items() if owner == path}
        return views(weights) if has_replaced_forward(self) else weights

    def _parts(self) -> dict[str, nn.Module]:
        """Return the modules that own the weights by their paths."""
        # Modules are looked up by each call, since a caller may replace or share them. Dictionaries are read where they
        # can be: getattr takes most of the time of a small block.
        modules: dict[str, nn.Module] = {"": self}
        for path, (parent, part) in self._paths.items():
            modules[path] = modules[parent]._modules.get(part) or getattr(modules[parent], part)  # noqa: SLF001
        return modules

    def has_hooks(self) -> bool:
        """Return whether hooks run before the weights are read."""
        return any(map(has_hooks, self._parts().values()))

    def inverts_by_itself(self) -> bool:
        """Return whether `inverse` must be called, since hooks load the weights or the method is another one."""
        return self.has_hooks() or "inverse" in vars(self) or type(self).inverse is not FlowBlock.inverse

    @runs_methods
    def forward(
        self,
        x: torch.Tensor,
        classes: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        rotary: Rotary = (None, None),
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map data to noise, see `starflow_kernels.block_forward`.

        Args:
            x: (B, T, D) tokens.
            classes: see `context`.
            text: see `context`.
            rotary: see `context`.
            options: further arguments of `starflow_kernels.block_forward`.
        """
        context = self.context(classes, text, rotary, options)
        if self.by_layers:
            outer = {name: weight for name, weight in self.weights().items() if not name.startswith("layers.")}
            return block_forward(x, outer, self._ordered(options), **context, **options, run_layer=self._run_layer)
        return block_forward(x, self.weights(), self._ordered(options), **context, **options)

    def layer_modules(self) -> list[LayerWeights]:
        """Return the modules with the weights of the layers."""
        return [cast("LayerWeights", self.get_submodule(f"layers.{i}")) for i in range(self.spec.layers)]

    def _run_layer(self, number: int, layer: Callable[..., Any], *states: Any) -> Any:
        """Call the module of a layer, see `starflow_kernels.block_forward`."""
        return self.get_submodule(f"layers.{number}")(layer, *states)

    @with_forward_hooks
    def params(
        self,
        x: torch.Tensor,
        classes: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        rotary: Rotary = (None, None),
    ) -> torch.Tensor:
        """Compute the raw parameters of all tokens of data, see `starflow_kernels.block_params`.

        Args:
            x: (B, T, D) tokens.
            classes: see `context`.
            text: see `context`.
            rotary: see `context`.
        """
        return block_params(x, self.weights(), self.spec, **self.context(classes, text, rotary, {}))

    @with_forward_hooks
    def inverse(
        self,
        z: torch.Tensor,
        classes: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        rotary: Rotary = (None, None),
        **options: Any,
    ) -> Inverse:
        """Map noise to data, see `starflow_kernels.block_inverse`. Under guidance, classes and text have 2B rows.

        Args:
            z: (B, T, D) tokens.
            classes: see `context`.
            text: see `context`.
            rotary: see `context`.
            options: further arguments of `starflow_kernels.block_inverse`.
        """
        weights, spec, options = self.inverse_arguments(classes, text, rotary, options)
        return block_inverse(z, weights, spec, **options)

    def inverse_arguments(
        self, classes: torch.Tensor | None, text: torch.Tensor | None, rotary: Rotary, options: dict[str, Any]
    ) -> tuple[dict[str, torch.Tensor], BlockSpec, dict[str, Any]]:
        """Return the arguments of `starflow_kernels.block_inverse` beside the noise, see `inverse`."""
        context = self.context(classes, text, rotary, options)
        return self.weights(), self._ordered(options), {**context, **options}

    def _ordered(self, options: dict[str, Any]) -> BlockSpec:
        """Return the block, without its own order if the options have one."""
        return self.spec if options.get("order") is None else self._unflipped

    def context(
        self, classes: torch.Tensor | None, text: torch.Tensor | None, rotary: Rotary, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of the block ops beside tokens and weights.

        Args:
            classes: (B, num_classes) weights of the class embeddings; a row of a class has a one and zeros. Or features
                of another condition, (B, features) or (B, T, features).
            text: (B, L, text_dim) text states in front of the tokens.
            rotary: cosine and sine of the rotary angles, or (None, None).
            options: further arguments, of which an adaptive block reads `order` and `lengths`.
        """
        embed = self.class_embed if self.feature_embed is None else self.feature_embed
        cond = None if classes is None or embed is None else classes.to(embed.dtype) @ embed
        if self.adaptive is not None:
            cond = self.adaptive(classes, options.get("order"), options.get("lengths"))
        context = {"cond": cond, "prefix": text, "cos": rotary[0], "sin": rotary[1]}
        return context if self.adaptive is None else {**context, "cond_in_order": True}
