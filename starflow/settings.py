"""YAML settings of a run: presets, files, and overrides from the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; this reads it as the number that it is."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_settings(path: Path) -> dict[str, Any]:
    """Mapping of a YAML file."""
    try:
        settings = yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return settings


def override(settings: dict[str, Any], assignments: list[str]) -> None:
    """Apply "section.name=value" assignments, values in YAML, in place."""
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        section, dot, name = path.partition(".")
        if not equals or not dot or not name or not isinstance(settings.get(section), dict):
            raise ConfigError(f"override {assignment!r}: expected SECTION.NAME=VALUE, SECTION of {', '.join(settings)}")
        try:
            settings[section][name] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise ConfigError(f"override {assignment!r}: the value is not YAML") from None
