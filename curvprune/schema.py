"""Typed records as JSON and back: one encoder and one decoder for everything that is written.

JSON has no NaN and no infinity. A `Number` that is not finite is written as ``null`` and read back
as NaN; every other ``null`` is a ``None`` that the type allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from functools import cache
from typing import Annotated, Any, TypeAlias, TypeVar, cast

from pydantic import BeforeValidator, TypeAdapter, ValidationError

T = TypeVar("T")

Json: TypeAlias = "dict[str, Json] | list[Json] | str | float | int | bool | None"


def _number(value: object) -> object:
    return math.nan if value is None else value


# A float that may be NaN or infinite in memory.
Number = Annotated[float, BeforeValidator(_number)]


@cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
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


def decode(kind: type[T], value: Json, *, source: str) -> T:
    """The record that `encode` wrote.

    Args:
        kind: the type to read.
        value: plain JSON values.
        source: what is being read, for the message: a path.

    Raises:
        ValueError: one sentence naming ``source`` and the first key that does not fit.
    """
    try:
        found: T = _adapter(cast(Hashable, kind)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(
            f"{source} does not hold a {getattr(kind, '__name__', kind)} of this version of "
            f"curvprune ({where}: {first['msg']}); delete it and run again"
        ) from None
    return found
