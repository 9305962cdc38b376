"""Typed records as JSON and back, and arguments whose types say what they accept.

JSON has no NaN and no infinity. A `Number` that is not finite is written as ``null`` and read back
as NaN; every other ``null`` is a ``None`` that the type allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import InitVar
from functools import cache
from typing import Annotated, Any, TypeAlias, TypeVar, cast, get_args, get_type_hints, overload

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

T = TypeVar("T")

Json: TypeAlias = "dict[str, Json] | list[Json] | str | float | int | bool | None"


def _number(value: object) -> object:
    return math.nan if value is None else value


# A float that may be NaN or infinite in memory.
Number = Annotated[float, BeforeValidator(_number)]


@cache
def _adapter(kind: Hashable) -> Any:
    return TypeAdapter(cast(Any, kind))


def encode(value: object, kind: Any = None) -> Any:
    """A record as plain JSON values: dicts, lists, texts, numbers, booleans and ``None``.

    Args:
        value: a dataclass, or a container of some.
        kind: its type, where that is not ``type(value)``, such as ``list[Trial]``.

    >>> encode((1.5, float("nan")), tuple[float, float])
    [1.5, None]
    """
    return json.loads(_adapter(cast(Hashable, kind or type(value))).dump_json(value))


@overload
def decode(kind: type[T], value: Any, *, source: str) -> T: ...
@overload
def decode(kind: object, value: Any, *, source: str) -> Any: ...
def decode(kind: Any, value: Any, *, source: str) -> Any:
    """The record that `encode` wrote.

    Args:
        kind: the type to read.
        value: plain JSON values.
        source: what is being read, for the message: a path.

    Raises:
        ValueError: one sentence naming ``source`` and the first key that does not fit.
    """
    try:
        return _adapter(cast(Hashable, kind)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(
            f"{source} does not hold a {getattr(kind, '__name__', kind)} of this version of "
            f"curvprune ({where}: {first['msg']}); delete it and run again"
        ) from None


def expected_of(kind: Any) -> str:
    """What an annotation accepts, in words: the ``description`` of its `pydantic.Field`."""
    found = [part for part in get_args(kind)[1:] if isinstance(part, FieldInfo)]
    descriptions = [info.description for info in found if info.description]
    return descriptions[0] if descriptions else f"a value of type {kind}"


def check_fields(value: object) -> None:
    """Check every field of a dataclass against its annotation.

    Arguments that a recipe can give are declared once, as dataclass fields: type, default, bounds
    and the words for the message stand in one `pydantic.Field`, which recipes read too.

    >>> @dataclass(frozen=True)
    ... class Asked:
    ...     steps: Annotated[int, Field(ge=1, description="a whole number of at least 1")] = 200
    ...     def __post_init__(self) -> None:
    ...         check_fields(self)

    Raises:
        ValueError: ``Asked: steps=0: expected a whole number of at least 1``.
    """
    kind = type(value)
    for name, annotation in _annotations(cast(Hashable, kind)).items():
        if isinstance(annotation, InitVar):  # no field: `__post_init__` has it
            continue
        given = getattr(value, name)
        try:
            _strict(annotation).validate_python(given, strict=True)
        except ValidationError:
            expected = expected_of(annotation)
            raise ValueError(f"{kind.__name__}: {name}={given!r}: expected {expected}") from None


@cache
def _annotations(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(cast(Any, kind), include_extras=True)


@cache
def _strict(annotation: Hashable) -> Any:
    return TypeAdapter(cast(Any, annotation), config=ConfigDict(arbitrary_types_allowed=True))
