"""Conversion of checkpoints between Apple's TarFlow and STARFlow code, called upstream here, and this package."""

from .convert import convert
from .export import export_upstream
from .report import Report

__all__ = ["Report", "convert", "export_upstream"]
