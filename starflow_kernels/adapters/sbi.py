"""Flows of this project as density estimators of sbi (pip install sbi)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from sbi.neural_nets.estimators import ZukoFlow
from sbi.utils.sbiutils import standardizing_net, standardizing_transform_zuko, z_score_parser
from zuko.lazy import Flow, LazyTransform

from ..spec import check_choice
from .distributions import InvertibleFlow
from .zuko import LazyFlowTransform, LazyPrior

Target = Literal["posterior", "likelihood"]
ZScore = Literal["independent", "structured", "none"]


def tarflow_builder(
    make_flow: Callable[[int, int], InvertibleFlow],
    target: Target = "posterior",
    *,
    embedding_net: torch.nn.Module | None = None,
    z_score_input: ZScore = "independent",
    z_score_condition: ZScore = "independent",
    **options: Any,
) -> Callable[[torch.Tensor, torch.Tensor], ZukoFlow]:
    """Return a builder of density estimators, which is the `density_estimator` of NPE and NLE.

    Args:
        make_flow: called as make_flow(features, context); returns a flow on vectors with as many features, under a
            condition with as many values.
        target: "posterior" for NPE, a density of parameters given observations; "likelihood" for NLE, the reverse.
        embedding_net: module that is applied to conditions; its parameters are trained along.
        z_score_input: how the variable of the density is standardized, as in `sbi.neural_nets.posterior_nn`.
        z_score_condition: how conditions are standardized, before the embedding.
        options: further arguments of `flow.inverse`, such as `solvers`.
    """
    check_choice("target", target, Target)
    check_choice("z_score_input", z_score_input, ZScore)
    check_choice("z_score_condition", z_score_condition, ZScore)

    def build(theta: torch.Tensor, x: torch.Tensor) -> ZukoFlow:
        values, condition = (theta, x) if target == "posterior" else (x, theta)
        if values.ndim != 2:
            raise ValueError(f"{target}: expected vectors (B, F), got shape {tuple(values.shape)}")
        embed = torch.nn.Identity() if embedding_net is None else embedding_net
        scored, structured = z_score_parser(z_score_condition)
        if scored:
            embed = torch.nn.Sequential(standardizing_net(condition, structured), embed)
        with torch.no_grad():
            context = embed.to(condition.device)(condition[:2]).shape[-1]
        flow = make_flow(values.shape[1], context)
        transforms: list[LazyTransform] = [LazyFlowTransform(flow, **options)]
        scored, structured = z_score_parser(z_score_input)
        if scored:
            transforms.insert(0, standardizing_transform_zuko(values, structured))
        density = Flow(transforms, LazyPrior(flow))
        return ZukoFlow(density, embed, input_shape=values.shape[1:], condition_shape=condition.shape[1:])

    return build
