"""Sections of a recipe that are made from the arguments they fill.

What an argument accepts is said once, in the field of its dataclass: type, bounds, default, and the
words for a message. `section_from` makes a section of such fields, `field_from` one key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, cast, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Some keys of a recipe: no others, no value of another type, and no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def section_from(
    kind: type, *, only: Collection[str] = (), leave_out: Collection[str] = ()
) -> Any:  # a class to derive from, which type checkers cannot know
    """A section with a dataclass's fields as keys: same order, types, bounds, defaults and words.

    A class that derives from it replaces what differs in a recipe, by a field of the same name.

    Args:
        kind: a dataclass.
        only: the fields to take; by default all.
        leave_out: fields that a recipe does not give there.
    """
    # 1. The fields that are asked for, in the dataclass's order, which messages and locks follow.
    taken = [field for field in dataclasses.fields(kind) if field.name not in leave_out]
    if only:
        taken = [field for field in taken if field.name in only]
    # 2. Each as a key: (annotation, default).
    keys: dict[str, tuple[Any, Any]] = {}
    for field in taken:
        keys[field.name] = (_annotation(kind, field.name), _default(field))
    return create_model(f"{kind.__name__}Keys", __base__=Section, **cast(Any, keys))


def field_from(kind: type, name: str) -> Any:
    """A key of a section like one field of a dataclass: bounds, default and words.

    The section declares the type.
    """
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    return FieldInfo.from_annotated_attribute(_annotation(kind, name), _default(field))


def _annotation(kind: type, name: str) -> Any:
    return get_type_hints(kind, include_extras=True)[name]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ...  # pydantic's word for a key that must be given
