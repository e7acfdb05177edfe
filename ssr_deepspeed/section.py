"""Configurations read strictly from JSON objects: the base of every one here.

An unknown key, a wrong type or a value out of range is a `ValueError` that names the key by its path,
the value, the values allowed and the nearest key.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from typing import Any, Literal, Self


class Section:
    """A frozen dataclass read strictly from a JSON object: the base of every configuration here."""

    @classmethod
    def from_dict(cls, block: Any, path: str = "ssr") -> Self:
        """Build the section from parsed JSON.

        Args:
            block: the JSON object.
            path: where it stands in the configuration, for messages.

        Raises:
            ValueError: unknown key, wrong type, value out of range, or `"auto"`.
        """
        if not isinstance(block, dict):
            raise ValueError(f"{path} must be a JSON object, got {block!r}")
        kinds = typing.get_type_hints(cls)
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = {}
        for key, value in block.items():
            if key not in names:
                raise ValueError(
                    f"unknown key {join(path, key)} = {value!r}{nearest(key, names)}; allowed keys: {names}"
                )
            values[key] = _convert(value, kinds[key], join(path, key))
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _has_no_default(f)]  # type: ignore[arg-type]
        if missing:
            raise ValueError(f"{path or 'the configuration'} lacks the required keys {missing}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(join(path, str(error))) from None

    def to_dict(self) -> dict[str, Any]:
        """The section as plain JSON values; `from_dict` reads it back."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def _has_no_default(spec: dataclasses.Field) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _convert(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind`, which is a field's annotation: a scalar, a Literal, a section or a union."""
    if value == "auto":
        raise ValueError(f'{path} = "auto" is not allowed: give the value itself')
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    sections = [o for o in options if isinstance(o, type) and issubclass(o, Section)]
    if sections and isinstance(value, dict):
        # Of several, the one that knows most of the keys, or of keys like them.
        known = [sum(bool(nearest(key, list(typing.get_type_hints(o)))) for key in value) for o in sections]
        return sections[known.index(max(known))].from_dict(value, path)
    literals = [choice for o in options if typing.get_origin(o) is Literal for choice in typing.get_args(o)]
    if literals and not (value is None and type(None) in options):
        if value not in literals:
            raise ValueError(f"{path} = {value!r}; allowed: {literals}{nearest(value, literals)}")
        return value
    for option in options:
        option = typing.get_origin(option) or option
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:
                raise ValueError(f"{path} = {value!r}; allowed: finite numbers")
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
    wanted = " or ".join(_type_name(option) for option in options)
    raise ValueError(f"{path} = {value!r} has the wrong type; allowed: {wanted}")


def _type_name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and issubclass(kind, Section | dict):
        return "a JSON object"
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}.get(kind, str(kind))


def join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Both objects in one; where both have a key, `top`'s value, and of two objects again both in one."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def nearest(key: Any, names: list[str]) -> str:
    near = difflib.get_close_matches(str(key), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def require(holds: bool, name: str, value: Any, allowed: str) -> None:
    """Raise the `ValueError` of a field whose value is not allowed."""
    if not holds:
        fail(name, value, allowed)


def require_choice(value: Any, name: str, literal: Any) -> None:
    """Raise the `ValueError` of a field whose value is none of a Literal's."""
    choices = list(typing.get_args(literal))
    if value not in choices:
        fail(name, value, f"one of {choices}{nearest(value, choices)}")


def fail(name: str, value: Any, allowed: str) -> typing.NoReturn:
    raise ValueError(f"{name} = {value!r}; allowed: {allowed}")
