"""YAML to dataclasses, and one message for each mistake in it."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_NAMES |= {type(None): "nothing", dict: "a mapping", list: "a list"}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: 1e-5 is a number, and no key may come twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} comes twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: no such file, not YAML (with the line), or no mapping.
    """
    try:
        found = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {describe(found)}")
    return found


def describe(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 80 else text[:77] + "..."


def unknown(prefix: str, key: Any, known: Iterable[str]) -> NoReturn:
    """Refuse a key that nothing reads."""
    names = sorted(known)
    close = difflib.get_close_matches(str(key), names, 1)
    hint = f"did you mean {close[0]!r}?" if close else "expected one of " + ", ".join(names)
    raise ValueError(f"{prefix}{key}: unknown key; {hint}")


def name_of(kind: Any) -> str:
    """A type hint in words."""
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [each for each in get_args(kind) if each is not type(None)]
        return " or ".join(dict.fromkeys(map(name_of, kinds)))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return _NAMES.get(get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of a type hint."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind  # True is no whole number


def checked(prefix: str, values: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping whose keys are known and whose values have the types of these hints.

    Args:
        prefix: file and section, for messages: a key follows.
        values: what YAML had.
        hints: types by key.

    Raises:
        ValueError: with the key, what was expected and what came.
    """
    if not isinstance(values, dict):
        section = prefix.rstrip(": .")
        raise ValueError(f"{section}: expected a mapping, got {describe(values)}")
    for key, value in values.items():
        if key not in hints:
            unknown(prefix, key, hints)
        if not fits(value, hints[key]):
            expected = name_of(hints[key])
            raise ValueError(f"{prefix}{key}: expected {expected}, got {describe(value)}")
    return values


def build(kind: type[T], prefix: str, values: Any) -> T:
    """A dataclass from a mapping; fields that are dataclasses are made from mappings of theirs.

    Args:
        kind: the dataclass; what its ``__post_init__`` raises begins with a field's name.
        prefix: file and section, for messages: a key follows.
        values: what YAML had.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type or range.
    """
    hints = get_type_hints(kind)
    sections: dict[str, Any] = {
        name: each
        for name, hint in hints.items()
        for each in get_args(hint)
        if dataclasses.is_dataclass(each)
    }
    values = checked(prefix, values, {n: Any if n in sections else h for n, h in hints.items()})
    given = {
        name: build(sections[name], f"{prefix}{name}.", value) if name in sections else value
        for name, value in values.items()
    }
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and field.name not in given:
            raise ValueError(
                f"{prefix}{field.name}: expected {name_of(hints[field.name])}, got none"
            )
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{prefix}{error}") from None
