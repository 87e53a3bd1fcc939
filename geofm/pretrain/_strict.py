"""Strict reading of a recipe: YAML to dataclasses, with errors that name the key."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from geofm.errors import GeofmError, MissingExtraError

__all__ = ["RecipeError", "build", "check_names", "merged", "near", "parse_yaml", "yaml_module"]


class RecipeError(GeofmError, ValueError):
    """A recipe has an unknown key, a value of the wrong kind, or values that exclude each other."""


def near(word: str, known: Sequence[str]) -> str:
    """Words on what may have been meant.

    Args:
        word: What was written.
        known: What there is.

    Returns:
        A clause that begins with a semicolon, or nothing.
    """
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def check_names(kind: Callable[..., Any], given: Iterable[str], key: str, taken: int = 0) -> None:
    """Refuse names of arguments that a class or function does not have.

    Args:
        kind: The class or function.
        given: Names.
        key: Dotted name of the place they stand at in the recipe.
        taken: How many of the first arguments are given otherwise.

    Raises:
        RecipeError: One is unknown; the message has near ones and all there are.
    """
    parameters = list(inspect.signature(kind).parameters.values())[taken:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in given:
        if name not in known:
            raise RecipeError(
                f"unknown key {key}.{name}{near(name, known)}; known are "
                f"{', '.join(f'{key}.{k}' for k in known) or 'none'}"
            )


def merged(base: Any, over: Any, depth: int = 1000) -> Any:
    """A mapping with the values of another put into it, mapping by mapping.

    Args:
        base: The mapping.
        over: What goes into it; anything but a mapping replaces what was there.
        depth: How many mappings deep; below, `over` replaces.

    Returns:
        A new mapping.
    """
    if depth == 0 or not isinstance(base, dict) or not isinstance(over, dict):
        return over
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(base[key], value, depth - 1) if key in base else value
    return out


def build(kind: Any, content: Any, origin: str, prefix: str) -> Any:
    """A dataclass from a mapping, checked key by key.

    Args:
        kind: The dataclass; its fields may be dataclasses.
        content: The mapping.
        origin: What to call it in messages.
        prefix: Dotted name of the place it is at, with a dot at the end.

    Returns:
        An instance of `kind`.

    Raises:
        RecipeError: A key is unknown or missing, or a value is of another kind.
    """
    if not isinstance(content, Mapping):
        raise RecipeError(f"{origin}: {prefix.rstrip('.')} must be a mapping, got {content!r}")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in content.items():
        if key not in hints:
            raise RecipeError(
                f"{origin}: unknown key {prefix}{key}{near(str(key), list(hints))}; "
                f"known are {', '.join(prefix + name for name in hints)}"
            )
        if is_dataclass(hints[key]):
            values[key] = build(hints[key], value, origin, f"{prefix}{key}.")
        else:
            values[key] = _checked(value, hints[key], origin, f"{prefix}{key}")
    try:
        return kind(**values)
    except TypeError as error:
        required = [f.name for f in fields(kind) if f.name not in values]
        raise RecipeError(
            f"{origin}: a key of {prefix.rstrip('.') or 'the recipe'} is missing; not given are "
            f"{', '.join(required)}"
        ) from error


def _checked(value: Any, hint: Any, origin: str, key: str) -> Any:
    choices = typing.get_args(hint) if _is_union(hint) else (hint,)
    for choice in choices:
        fits, converted = _fits(value, choice)
        if fits:
            return converted
    wanted = " or ".join(_words(choice) for choice in choices)
    raise RecipeError(f"{origin}: {key} must be {wanted}, got {value!r}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(value: Any, kind: Any) -> tuple[bool, Any]:
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        return value in typing.get_args(kind), value
    if origin is list:
        numbers = isinstance(value, list) and all(_fits(item, float)[0] for item in value)
        return numbers, [float(item) for item in value] if numbers else value
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value), value
    if isinstance(value, bool):
        return origin is bool, value
    if origin is float and isinstance(value, int | float):
        return abs(value) < float("inf"), float(value)
    return isinstance(value, origin), value


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    names = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    names |= {types.NoneType: "null", dict: "a mapping", list: "a list of numbers"}
    return names[typing.get_origin(kind) or kind]


# --- YAML ---------------------------------------------------------------------------------------


def yaml_module() -> Any:
    """The yaml module, imported late because geofm works without it.

    Returns:
        PyYAML.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module("yaml")
    except ImportError as error:
        raise MissingExtraError(
            "recipes need PyYAML, which is not installed: pip install 'geofm[train]'"
        ) from error


def parse_yaml(text: str, origin: str) -> Any:
    """Plain values from YAML.

    Args:
        text: The YAML.
        origin: What to call it in messages.

    Returns:
        The values.

    Raises:
        RecipeError: It is not valid, or asks for more than plain values.
    """
    yaml = yaml_module()
    try:
        return yaml.load(text, _loader(yaml))
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: not valid YAML: {error}") from error


def _loader(yaml: Any) -> Any:
    """PyYAML's safe loader, with 1e-4 a number (YAML 1.2) and no key given twice."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = sorted({str(key) for key in keys if keys.count(key) > 1})
            if twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{', '.join(twice)} is given twice", node.start_mark
                )
            out: dict[Any, Any] = super().construct_mapping(node, deep)
            return out

    number = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader
