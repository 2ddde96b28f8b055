"""Blocks with an order, lengths and a condition per token, computed sample by sample in plain torch."""

from __future__ import annotations

import dataclasses
import random

import torch

from support.blocks import BLOCKS, T, block
from support.naive_block import naive_forward, naive_inverse


def own_tokens(spec, order, lengths, b) -> list[int]:
    """Return the numbers of the tokens of sample b in the block's own order, without those beyond its length."""
    count = T if lengths is None else int(lengths[b])
    numbers = range(T - 1, -1, -1) if spec.flip else range(T)
    if order is not None:
        numbers = (order if order.ndim == 1 else order[b]).tolist()
    return [t for t in numbers if t < count]


def one_sample(w, spec, context, tokens, b):
    """Return weights, spec and context of the sample b alone, whose tokens are in order."""
    plain, L = dataclasses.replace(spec, flip=False), len(context["cos"]) - T if "cos" in context else 0
    w = {**w, "pos_embed": w["pos_embed"][tokens]} if spec.positions else w
    found = {}
    for name, value in context.items():
        if name in ("cos", "sin"):
            found[name] = value[: L + len(tokens)]
        else:
            both = value[b::B]
            found[name] = both[:, tokens] if name == "cond" and value.ndim == 3 else both
    return w, plain, found


def expected_forward(x, w, spec, context, order, lengths):
    """Return z and -log sigma (B, T, D)."""
    z, minus_log_sigma = x.clone(), torch.zeros_like(x)
    for b in range(len(x)):
        if tokens := own_tokens(spec, order, lengths, b):
            weights, plain, given = one_sample(w, spec, context, tokens, b)
            z[b, tokens], minus_log_sigma[b, tokens] = (
                values[0] for values in naive_forward(x[b : b + 1, tokens], weights, plain, **given)
            )
    return z, minus_log_sigma


def expected_inverse(z, w, spec, context, order, lengths, guidance, rule, data=None, known=None):
    """Return x (B, T, D), one token after the other."""
    x = z.clone()
    for b in range(len(z)):
        if tokens := own_tokens(spec, order, lengths, b):
            weights, plain, given = one_sample(w, spec, context, tokens, b)
            weight = None if guidance is None else guidance[b : b + 1, : len(tokens)]
            count = 0 if known is None else int(known[b])
            if data is not None:
                x[b, tokens[:count]] = data[b, tokens[:count]]
            x[b, tokens] = naive_inverse(x[b : b + 1, tokens], weights, plain, given, weight, rule, known=count)[0]
    return x


# Samples of a drawn call.
B = 3


def drawn_call(seed: int, dtype=torch.float64, blocks=BLOCKS):
    """Return x, weights, spec, context and further arguments of a random call of one of the blocks.

    The latter are `order` and `lengths`, and those of the inverse alone: `guidance`, `rule`, `data` and `known`.
    """
    choose = random.Random(seed)
    torch.manual_seed(seed)
    overrides, _, L = blocks[choose.choice(list(blocks))]
    adaptive = overrides.get("adaptive", False)
    order = choose.choice([None, torch.randperm(T), torch.stack([torch.randperm(T) for _ in range(B)])])
    lengths = choose.choice([None, torch.randint(0, T + 1, (B,)), torch.full((B,), T)])
    copies = choose.choice([1, 2])
    changes = {"flip": False} if order is not None else {}
    x, w, spec, context = block((overrides, adaptive, L), B=B, copies=copies, dtype=dtype, **changes)
    shapes = [(copies * B, spec.cond_dim), (copies * B, T, spec.cond_dim)]
    shape = choose.choice(shapes if adaptive else [None, *shapes])
    if shape:
        context["cond"] = torch.randn(shape, dtype=torch.float64).to(dtype)
    guidance = 2 * torch.rand(B, T, dtype=torch.float64) if copies == 2 else None
    data, known = choose.choice([(None, None), (torch.randn_like(x), torch.randint(0, T + 1, (B,)))])
    inverse = {"guidance": guidance, "rule": choose.choice(["tarflow", "starflow"]), "data": data, "known": known}
    return x, w, spec, context, {"order": order, "lengths": lengths}, inverse


def of_first_branch(context):
    """Return the context of the rows with the condition."""
    return {name: value if name in ("cos", "sin") else value[:B] for name, value in context.items()}
