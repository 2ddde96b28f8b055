"""Settings of a run in YAML, from presets, files, and assignments on the command line."""

from __future__ import annotations

import dataclasses
import numbers
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from starflow_kernels.spec import scalar

from .errors import ConfigError

PRESETS = Path(__file__).parent / "presets"
# Types of settings, as messages call them.
TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "text (a number in quotes)"}


class _Loader(yaml.SafeLoader):
    """Loader that reads 1e-3 as a number, which YAML 1.1 reads as text, and refuses integers beyond 64 bits."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**64:
            raise ValueError("an integer beyond 64 bits")
        return value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# PyYAML raises ValueError for a number or a date that does not exist, and RecursionError for deep nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def presets(kind: str = "") -> list[str]:
    """Return the names of the presets of a kind of run.

    Args:
        kind: folder of the presets: "pipeline", or "" for flows.
    """
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


def read_settings(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises ConfigError."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, *YAML_ERRORS) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return settings


def override(settings: dict[str, Any], assignments: list[str]) -> None:
    """Change settings in place.

    Args:
        settings: mapping of sections, which may have sections themselves.
        assignments: texts "section.name=value" with values in YAML.

    Raises:
        ConfigError: an assignment has another form, or its section does not exist.
    """
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        *sections, name = path.split(".")
        target: Any = settings
        for section in sections:
            target = target.get(section) if isinstance(target, dict) else None
        if not equals or not sections or not name or not isinstance(target, dict):
            raise ConfigError(
                f"override {assignment!r}: expected SECTION.NAME=VALUE, SECTION of {', '.join(map(str, settings))}"
            )
        try:
            target[name] = yaml.load(value, _Loader)
        except YAML_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"override {assignment!r:.200}: the value is not YAML ({reason})") from None


def section(kind: type) -> Callable[[dict[str, Any]], Any]:
    """Return a reader of a section. It raises a ConfigError that names unknown or missing settings.

    Args:
        kind: dataclass to read into.
    """

    def read(fields: dict[str, Any]) -> Any:
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(map(str, fields.keys() - known)):
            raise ConfigError(
                f"unknown {kind.__name__} settings {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        try:
            return kind(**fields)
        except TypeError as error:
            raise ConfigError(f"{kind.__name__}: {error}") from None

    return read


def check_types(config: Any) -> None:
    """Check that each setting has a value of its declared type; a list becomes a tuple.

    An integer is a number too, and so is a number of numpy or torch. True and false are neither, and text is no number.

    Args:
        config: instance of a dataclass.

    Raises:
        ConfigError: a value has another type. The message names the setting, the value and the type.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        given, kind = getattr(config, field.name), kinds[field.name]
        value = scalar(given)
        if not _fits(value, kind):
            shown = reprlib.repr(value) if isinstance(value, int) else repr(value)
            raise ConfigError(f"{field.name}={shown}: expected {_described(kind)}")
        if isinstance(value, list):
            value = tuple(value)
        if value is not given:
            object.__setattr__(config, field.name, value)


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return a count, also one of numpy or torch, as an int.

    Args:
        name: name of the argument, for the message.
        value: integer from `least` to 2^63 - 1; True and false are none.
        least: smallest count.

    Raises:
        ConfigError: `value` is something else.
    """
    count = scalar(value)
    if isinstance(count, bool) or not isinstance(count, int) or not least <= count < 2**63:
        raise ConfigError(f"{name}={reprlib.repr(count)}: expected an integer of at least {least}, below 2^63")
    return count


def _parts(kind: Any) -> tuple[str, tuple[Any, ...]]:
    """Return "choice", "union", "list" or "" for a type, and its arguments."""
    names = {typing.Literal: "choice", typing.Union: "union", types.UnionType: "union", tuple: "list"}
    return names.get(typing.get_origin(kind), ""), typing.get_args(kind)


def _fits(value: Any, kind: Any) -> bool:
    name, arguments = _parts(kind)
    if name == "choice":
        return isinstance(value, str) and value in arguments
    if name == "union":
        return any(_fits(value, argument) for argument in arguments)
    if name == "list":
        return isinstance(value, (list, tuple)) and all(_fits(entry, arguments[0]) for entry in value)
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        # An integer may be too large for a float.
        beyond = kind is float and isinstance(value, int) and abs(value) > sys.float_info.max
        return isinstance(value, number) and not isinstance(value, bool) and not beyond
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    name, arguments = _parts(kind)
    if name == "choice":
        return f"one of {', '.join(arguments)}"
    if name == "union":
        return " or ".join(map(_described, arguments))
    if name == "list":
        return f"a list, each entry {_described(arguments[0])}"
    return "none" if kind is type(None) else TYPES.get(kind, kind.__name__)


def read_section(name: str, read: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> Any:
    """Read a section.

    Args:
        name: name of the section.
        read: reader of the section.
        fields: settings of the section.

    Raises:
        ConfigError: the reader refuses it. The message begins with the name.
    """
    try:
        return read(fields)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


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
    return {name: read_section(name, read, settings[name]) for name, read in readers.items()}
