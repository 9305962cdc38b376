"""What is wrong with a recipe, in one sentence.

Every message reads ``file:line: key.path: what was wrong; what was expected; the nearest valid
value``. `explain` makes one from an entry of pydantic's list.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from curvprune.failures import one_line

KeyPath = tuple[str | int, ...]

MOST_SHOWN = 60  # characters of a value that a message repeats


class RecipeError(ValueError):
    """A recipe cannot be used.

    ``str(error)`` is the whole message; ``path``, ``line`` and ``key`` say where.
    """

    def __init__(
        self, message: str, *, path: str | None = None, line: int | None = None, key: KeyPath = ()
    ) -> None:
        self.path, self.line, self.key = path, line, key
        where = ""
        if path is not None:
            where = f"{path}: " if line is None else f"{path}:{line}: "
        if key:
            where += f"{_dotted(key)}: "
        super().__init__(where + one_line(message))


class Complaint(ValueError):
    """What a section's validator raises, about one key below that section."""

    def __init__(self, key: KeyPath, message: str) -> None:
        self.key, self.message = key, message
        super().__init__(message)


# ------------------------------------------------------------ one of pydantic's errors in our words


def explain(error: ErrorDetails, recipe: type[BaseModel]) -> tuple[KeyPath, str]:
    """Where and what, from one entry of the list of errors that validating ``recipe`` gave."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    location: KeyPath = tuple(error["loc"])

    # 1. A complaint of our own says everything itself.
    complaint = context.get("error")
    if isinstance(complaint, Complaint):
        return location + complaint.key, complaint.message

    # 2. A key that its section does not have.
    if kind == "extra_forbidden":
        names = list(_section_at(recipe, location[:-1]).model_fields)
        return location, (
            f"unknown key; expected one of {any_of(names)}{nearest_of(location[-1], names)}"
        )

    # 3. Everything else is said in the words of the field.
    key = _without_alternative(recipe, location)
    field = None
    if isinstance(key[-1], str):
        field = _section_at(recipe, key[:-1]).model_fields[key[-1]]
    kinds = [str] if field is None else _alternatives(field.annotation)
    expected = "text" if field is None else _expected(kinds, field.description)
    if kind == "missing":
        return key[:-1], f"{key[-1]} is missing; expected {key[-1]}: {expected}"
    if kind == "literal_error" and len(kinds) == 1:
        choices = typing.get_args(kinds[0])
        problem = f"{shown(value)} is not offered; expected {any_of(choices)}"
        return key, problem + nearest_of(value, choices)
    said = "nothing is written here" if value is None else f"{shown(value)} is not valid"
    return key, f"{said}; expected {expected}{_nearest_valid(error, field, kinds)}"


def _nearest_valid(error: ErrorDetails, field: FieldInfo | None, kinds: list[Any]) -> str:
    """``; nearest: …`` for a value out of bounds or of the wrong type."""
    context = error.get("ctx", {})
    for bound in ("ge", "le"):
        if bound in context:
            return f"; nearest: {context[bound]:g}"
    # An open end is not valid itself: of an interval with two ends the default lies inside.
    if error["type"] in ("greater_than", "less_than") and field is not None and _two_ends(field):
        return f"; nearest: {field.default}"
    near = retyped(error["input"], kinds[0])
    return near if field is None or _within(near, field) else ""


def _within(near: str, field: FieldInfo) -> bool:
    """Whether a number that is named as the nearest keeps to the bounds of its key."""
    try:
        number = float(near.rpartition(" ")[2])
    except ValueError:
        return True
    # A bound of one kind has the attribute of that name.
    compare = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}
    for bound in field.metadata:
        for name, holds in compare.items():
            if hasattr(bound, name) and not holds(number, getattr(bound, name)):
                return False
    return True


def _two_ends(field: FieldInfo) -> bool:
    below = any(hasattr(bound, "gt") or hasattr(bound, "ge") for bound in field.metadata)
    above = any(hasattr(bound, "lt") or hasattr(bound, "le") for bound in field.metadata)
    return below and above


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a key of this type opens, be it one or a list of them."""
    kind = _alternatives(annotation)[0]
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section_at(recipe: type[BaseModel], key: KeyPath) -> type[BaseModel]:
    """The section whose keys stand below ``key``."""
    section = recipe
    for part in key:
        if isinstance(part, str):
            inner = _section_in(section.model_fields[part].annotation)
            assert inner is not None, f"{_dotted(key)} is no section"
            section = inner
    return section


def _without_alternative(recipe: type[BaseModel], location: KeyPath) -> KeyPath:
    """pydantic's path up to the last key of ours: where a key has alternatives of different types,
    the path goes on with the name of one."""
    section: type[BaseModel] | None = recipe
    for place, part in enumerate(location):
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return location[:place]
        section = _section_in(section.model_fields[part].annotation)
    return location


def _alternatives(annotation: Any) -> list[Any]:
    """The types that a key may have, without bounds and null."""
    kinds = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    bare = []
    for kind in kinds:
        bounded = typing.get_origin(kind) is Annotated
        bare.append(typing.get_args(kind)[0] if bounded else kind)
    return bare


def _expected(kinds: list[Any], description: str | None) -> str:
    kind = kinds[0]
    if description is not None:
        return description
    if typing.get_origin(kind) is Literal:
        return any_of(typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys from {any_of(kind.model_fields)}"
    return "true or false" if kind is bool else "text"


# ------------------------------------------------------------ words


def retyped(value: object, annotation: Any) -> str:
    """``; nearest: …`` when the value only has the wrong type: text for a number, a number for
    text, 4.0 for 4."""
    kinds = _alternatives(annotation)
    # YAML also writes true for 1, but a switch is no number.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    written = str(value).lower()
    if str in kinds and (is_number or isinstance(value, datetime.date)):
        return f'; nearest: "{shown(value)}"'
    if str in kinds and isinstance(value, bool):
        return "; yes, no, on and off mean true and false: put text in quotes"
    if bool in kinds and written in ("true", "false", "0", "1"):
        return "; nearest: true" if written in ("true", "1") else "; nearest: false"
    if (int in kinds or float in kinds) and isinstance(value, (str, float)):
        try:
            number = float(value)
        except ValueError:
            return ""
        if not math.isfinite(number) or number < 0:
            return ""  # no key takes one
        return f"; nearest: {round(number)}" if int in kinds else f"; nearest: {number!r}"
    return ""


def shown(value: object) -> str:
    """The value as YAML would write it, cut to a readable length."""
    # JSON writes these as YAML does.
    if isinstance(value, str):
        text = json.dumps(value[: 2 * MOST_SHOWN], ensure_ascii=False)
    elif value is None or isinstance(value, bool):
        text = json.dumps(value)
    elif isinstance(value, int) and abs(value) >= 10**MOST_SHOWN:
        text = f"{'-' if value < 0 else ''}a whole number of {value.bit_length()} bits"
    else:
        text = str(value)
    return cut(text)


def cut(text: str) -> str:
    """A text of a readable length: a value may have megabytes."""
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def any_of(names: Iterable[str]) -> str:
    """``a, b or c``."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last


def nearest_of(value: object, names: Iterable[str]) -> str:
    """``; nearest: …`` where one of the names is spelt much like the value."""
    if len(str(value)) > MOST_SHOWN:
        return ""  # like no name, and long to compare
    close = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.5)
    return f"; nearest: {close[0]}" if close else ""


def _dotted(key: KeyPath) -> str:
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{cut(part)}" if text else cut(part)
    return text
