"""Settings of a run in YAML, from presets, files, and assignments on the command line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


class _Loader(yaml.SafeLoader):
    """Loader that reads 1e-3 as a number, which YAML 1.1 reads as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def presets(kind: str = "") -> list[str]:
    """Return the names of the presets of a kind of run.

    Args:
        kind: folder of the presets: "autoencoder", "decoder", or "" for flows.
    """
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


def read_settings(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises ConfigError."""
    try:
        settings = yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return settings


def override(settings: dict[str, Any], assignments: list[str]) -> None:
    """Change settings in place.

    Args:
        settings: mapping of sections.
        assignments: texts "section.name=value" with values in YAML.

    Raises:
        ConfigError: an assignment has another form, or its section does not exist.
    """
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        section, dot, name = path.partition(".")
        if not equals or not dot or not name or not isinstance(settings.get(section), dict):
            raise ConfigError(f"override {assignment!r}: expected SECTION.NAME=VALUE, SECTION of {', '.join(settings)}")
        try:
            settings[section][name] = yaml.load(value, _Loader)
        except yaml.YAMLError:
            raise ConfigError(f"override {assignment!r}: the value is not YAML") from None


def section(kind: type) -> Callable[[dict[str, Any]], Any]:
    """Return a reader of a section. It raises a ConfigError that names unknown or missing settings.

    Args:
        kind: dataclass to read into.
    """

    def read(fields: dict[str, Any]) -> Any:
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(fields.keys() - known):
            raise ConfigError(
                f"unknown {kind.__name__} settings {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        try:
            return kind(**fields)
        except TypeError as error:
            raise ConfigError(f"{kind.__name__}: {error}") from None

    return read


def read_sections(settings: dict[str, Any], readers: dict[str, Callable[[dict[str, Any]], Any]]) -> dict[str, Any]:
    """Read each section.

    Args:
        settings: mapping of sections.
        readers: reader of each section.

    Raises:
        ConfigError: a section is missing or unknown, or a reader refuses it.
    """
    if not isinstance(settings, dict) or settings.keys() != readers.keys():
        raise ConfigError(f"settings need exactly the sections {', '.join(readers)}")
    for name, fields in settings.items():
        if not isinstance(fields, dict):
            raise ConfigError(f"settings: {name} is not a mapping")
    return {name: read(settings[name]) for name, read in readers.items()}
