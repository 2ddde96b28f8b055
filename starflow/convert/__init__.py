"""Checkpoints of the released TarFlow and STARFlow code to ours, and back."""

from .convert import convert
from .release import release
from .report import Report

__all__ = ["Report", "convert", "release"]
