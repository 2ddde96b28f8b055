"""Flow blocks of the TarFlow, STARFlow and iTARFlow code that Apple released, and of code with their structure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..._core.checks import NonFiniteError
from ..._core.torch_private import outside_graphs
from ..swap import Accelerated, original_class
from .calls import density, grid_density, grid_inverse, inverse, stays_original
from .check import check_starflow, check_tarflow
from .checked import Checked
from .structure import Unfit, is_block, read

# Arguments of the inverse of TarFlow and iTARFlow that concern guidance.
GUIDANCE = ("guidance", "guide_what", "attn_temp", "annealed_guidance", "lerp_style")
OUTSIDE = "an accelerated inverse runs between two graphs"


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Accelerated] | str]]:
    """Return the parts of upstream flows in a model: name, module, and its fast class or why there is none.

    Args:
        model: any model.
    """
    for name, module in model.named_modules():
        if _passes_caches(module):
            yield name, module, StarFlow
        if not is_block(module):
            continue
        try:
            read(module)
        except Unfit as reason:
            yield name, module, str(reason)
        # Whatever code of another structure raises, the block is left alone.
        except Exception as error:
            yield name, module, f"{type(error).__name__}: {error}"
        else:
            yield name, module, TarFlowBlock if hasattr(module, "nvp") else StarFlowBlock


def _passes_caches(module: nn.Module) -> bool:
    """Return whether a module passes caches and any further options to the inverses of its blocks."""
    blocks = getattr(module, "blocks", None)
    if not (hasattr(module, "reverse_deep") and isinstance(blocks, nn.ModuleList)):
        return False
    kinds: list[Any] = [original_class(part) for part in (module, *blocks)]
    if not all(hasattr(kind, "reverse") for kind in kinds):
        return False
    signatures = [inspect.signature(kind.reverse).parameters for kind in kinds]
    any_option = inspect.Parameter.VAR_KEYWORD
    return all(any(p.kind is any_option for p in parameters.values()) for parameters in signatures)


class TarFlowBlock(Checked):
    """Block of apple/ml-tarflow (arXiv 2412.06329), or of apple/ml-itarflow (arXiv 2604.20041) with its noise level."""

    compare = staticmethod(check_tarflow)

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Map data to noise, as the original method does."""
        original = super().forward  # type: ignore[misc]
        if stays_original(self, x):
            return original(x, *arguments, **options)
        try:
            return density(self, x, **_named(original, ("y", "t"), x, *arguments, **options))
        except Unfit:
            return original(x, *arguments, **options)

    @outside_graphs(OUTSIDE)
    def reverse(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Map noise to data, as the original method does, and keep the noise."""
        original = super().reverse  # type: ignore[misc]
        try:
            return inverse(self, x, **_named(original, ("y", "t", *GUIDANCE), x, *arguments, **options))
        except (Unfit, NonFiniteError):
            return original(x, *arguments, **options)


def _named(method: Callable, known: tuple[str, ...], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, from the second on, and the defaults of those that are not given.

    Args:
        method: original method.
        known: names of the arguments that the ops know, of which the method takes some.
        arguments: positional arguments.
        options: keyword arguments.

    Raises:
        Unfit: an argument is not known.
    """
    signature = inspect.signature(method)
    _, *names = signature.parameters
    try:
        given = signature.bind(*arguments, **options).arguments
    except TypeError as error:
        raise Unfit(str(error)) from None
    if unknown := [name for name in names if name in given and name not in known]:
        raise Unfit(f"its argument {unknown[0]} is not known")
    return {name: given.get(name, signature.parameters[name].default) for name in names if name in known}


class StarFlowBlock(Checked):
    """Block of apple/ml-starflow (arXiv 2506.06276)."""

    compare = staticmethod(check_starflow)

    def forward(
        self: Any,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        rope: nn.Module | None = None,
        kv_cache: Any = None,
        guidance: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Map data to noise, as the original method does, which also returns the text states of a block with text."""
        try:
            if stays_original(self, x) or kv_cache is not None or self.txt_dim:
                raise Unfit("it is compiled or small, fills a cache, or returns text states")
            if guidance or (self.training and (self.use_checkpoint or self.use_checkpoint_mlp)):
                raise Unfit("it guides the density or computes values again in the backward pass")
            z, logdet = grid_density(self, x, None, rope)
        except Unfit:
            return super().forward(x, y, rope, kv_cache, guidance)
        return z, None, logdet

    @outside_graphs(OUTSIDE)
    def reverse(
        self: Any,
        z: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: float = 0,
        guide_what: str = "ab",
        attn_temp: float = 1.0,
        annealed_guidance: bool = False,
        rope: nn.Module | None = None,
        *rest: Any,
        keep_cache: bool = True,
        **options: Any,
    ) -> torch.Tensor:
        """Map noise to data, as the original method does. Without `keep_cache`, no cache needs to be filled."""
        try:
            if keep_cache or self.local_attn_window or attn_temp != 1 or (guidance > 0 and not guide_what):
                raise Unfit("it fills a cache, has a window, or a temperature in both branches")
            # Without text, both branches of guidance are the same.
            return grid_inverse(self, z, *((y, guidance) if self.txt_dim else (None, 0)), rope)
        except (Unfit, NonFiniteError):
            given = guidance, guide_what, attn_temp, annealed_guidance, rope
            return super().reverse(z, y, *given, *rest, **options)


class StarFlow(Accelerated):
    """Model of apple/ml-starflow, whose blocks fill a cache only for a caller that passes one."""

    description = "lets its blocks sample without a cache"

    def reverse(self: Any, *arguments: Any, **options: Any) -> Any:
        """Map noise to data, as the original method does."""
        given = dict(zip(inspect.signature(super().reverse).parameters, arguments)) | options
        if given.get("kv_caches") is None:
            options["keep_cache"] = False
        return super().reverse(*arguments, **options)

    @classmethod
    def check(cls, module: nn.Module) -> str | None:
        """Return None: it computes nothing itself."""
        return None
