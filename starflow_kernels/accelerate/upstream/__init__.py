"""Released TarFlow, STARFlow and iTARFlow code, and code with their structure."""

from .blocks import candidates

__all__ = ["candidates"]
