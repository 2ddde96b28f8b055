"""Fenced blocks and commands of the pages of the documentation."""

from __future__ import annotations

import re
from pathlib import Path

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str, section: str = "") -> list[tuple[int, str]]:
    """Line number and text of each fenced block of a language in a page, or in one of its sections."""
    text = page.read_text(encoding="utf-8")
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else text
    return [(text[: m.start()].count("\n") + 2, m[2]) for m in FENCE.finditer(text) if m[1] == language]


def commands(page: Path, section: str = "") -> list[str]:
    """Command lines of a page, or of one of its sections, continuation lines joined."""
    text = "\n".join(text for _, text in blocks(page, "bash", section))
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]
