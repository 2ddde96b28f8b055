"""Paraphrases of the names of emoji: what people type in place of the name in the CLDR."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .emoji import Emoji

TONE = re.compile(r" ?\b((?:medium-)?(?:light|dark)|medium) skin tone\b")
GENDERS = {"woman": "female", "man": "male"}
# Forms of a skin tone, before and after the rest.
TONE_FORMS = (
    ("", "{} skin tone"),
    ("", "with {} skin tone"),
    ("", "with {} skin"),
    ("{} skin", ""),
    ("{} skinned", ""),
    ("{} skin tone", ""),
)
FLAG_FORMS = ("{}", "flag of {}", "{} flag")
# Probabilities of the changes.
ALIAS, PLURAL, ADJECTIVE, LEFT_OUT, REORDERED = 0.3, 0.15, 0.2, 0.3, 0.25


def paraphrase(one: Emoji, aliases: list[str], random: torch.Generator) -> str:
    """Return a paraphrase of the English name of an emoji, in lower case.

    An alias may take the place of the name. The name may be in the plural. The skin tone takes one of several forms,
    and "woman" may become "female". A word may be left out, and words may change their order.

    Args:
        one: the emoji.
        aliases: other names.
        random: source of the choices.
    """
    name, tones = TONE.sub("", one.name).lower(), TONE.findall(one.name)
    if aliases and not tones and _happens(ALIAS, random):
        name = _choice(aliases, random)
    if not tones and not one.is_flag and _happens(PLURAL, random):
        name = _plural(name)
    words = name.split()
    if _happens(ADJECTIVE, random):
        words = [GENDERS.get(word, word) for word in words]
    if len(words) > 2 and _happens(LEFT_OUT, random):
        del words[_below(len(words), random)]
    if _happens(REORDERED, random):
        order = torch.randperm(len(words), generator=random, dtype=torch.int64, device="cpu")
        words = [words[i] for i in order]
    if one.is_flag:
        words = [_choice(FLAG_FORMS, random).format(" ".join(words))]
    before, after = "", " ".join(f"{tone} skin tone" for tone in tones)
    if len(tones) == 1:
        before, after = (form.format(*tones) for form in _choice(TONE_FORMS, random))
    return " ".join(filter(None, (before, *words, after)))


def _plural(name: str) -> str:
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return f"{name[:-1]}ies"
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _below(limit: int, random: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=random, dtype=torch.int64, device="cpu"))


def _choice(values, random: torch.Generator):
    return values[_below(len(values), random)]


def _happens(probability: float, random: torch.Generator) -> bool:
    return float(torch.rand((), generator=random, dtype=torch.float32, device="cpu")) < probability
