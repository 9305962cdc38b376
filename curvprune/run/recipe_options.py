"""How a recipe writes options: `read_option` and its inverse, `option_yaml`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

from pydantic import ConfigDict, TypeAdapter, ValidationError

from curvprune.options import (
    BITS,
    OPTIONS,
    Cast,
    Keep,
    Option,
    PruneCast,
    PruneQuantize,
    parse_option,
)
from curvprune.run.recipe_errors import Complaint, KeyPath, any_of, nearest_of, retyped, shown

_STRICT = ConfigDict(strict=True)
_EXPECTED = {  # what each argument of an option accepts, in words
    "bits": f"one of {', '.join(map(str, BITS))}",
    "group_size": "a positive whole number, or null for one scale per channel",
    "symmetric": "true or false",
    "sparsity": "a number strictly between 0 and 1, for example 0.5",
    "pattern": '"N:M" in quotes, for example "2:4"',
}


def option_yaml(option: Option) -> str | dict[str, object]:
    """The YAML form of an option, arguments at their default included."""
    if isinstance(option, Keep):
        return "keep"
    if isinstance(option, Cast):
        return {"cast": option.dtype}
    if isinstance(option, PruneCast):
        return {"prune": _arguments(option.prune), "cast": option.cast.dtype}
    if isinstance(option, PruneQuantize):
        return {"prune": _arguments(option.prune), "quantize": _arguments(option.quantize)}
    # What is left has one word of its own.
    words = {kind: word for word, kind in OPTIONS.items()}
    return {words[type(option)]: _arguments(option)}


def _arguments(option: Option) -> dict[str, object]:
    # Exactly one of sparsity and pattern may be written; a null group_size says "per channel".
    return {
        name: value
        for name, value in dataclasses.asdict(option).items()
        if value is not None or name == "group_size"
    }


def read_option(value: object) -> Option:
    """`parse_option`, after a look at the types, so that a complaint names the argument and not
    only the option."""
    if isinstance(value, (Keep, Cast, PruneQuantize, PruneCast, *OPTIONS.values())):
        return typing.cast(Option, value)
    if isinstance(value, str) and value != "keep":
        near = nearest_of(value, OPTIONS)
        raise Complaint((), f"unknown option {value!r}; expected one of {any_of(OPTIONS)}{near}")
    if isinstance(value, Mapping):
        _check_words(value)
    try:
        return parse_option(value)
    except ValueError as error:
        raise Complaint(_argument_named(value, str(error)), str(error)) from error


def _check_words(value: Mapping[object, object]) -> None:
    for word, arguments in value.items():
        if word not in OPTIONS:
            near = nearest_of(word, OPTIONS)
            raise Complaint(
                (str(word),), f"unknown option; expected one of {any_of(OPTIONS)}{near}"
            )
        if word in ("quantize", "prune"):
            _check_arguments(str(word), arguments)
    cast = value.get("cast", "")
    if not isinstance(cast, str):
        raise Complaint(
            ("cast",), f"{shown(cast)} is not a float type; expected float16 or bfloat16"
        )


def _check_arguments(word: str, arguments: object) -> None:
    # 1. Arguments at all.
    fields = {field.name: field for field in dataclasses.fields(OPTIONS[word])}
    if not isinstance(arguments, Mapping):
        raise Complaint(
            (word,), f"{shown(arguments)} is not a mapping; expected keys from {any_of(fields)}"
        )
    # 2. The arguments that are given, by name and type; their range is `parse_option`'s business.
    hints = typing.get_type_hints(OPTIONS[word])
    for name, value in arguments.items():
        if name not in fields:
            near = nearest_of(name, fields)
            raise Complaint((word, name), f"unknown key; expected one of {any_of(fields)}{near}")
        try:
            TypeAdapter(hints[name], config=_STRICT).validate_python(value)
        except ValidationError as error:
            near = retyped(value, hints[name])
            raise Complaint(
                (word, name), f"{shown(value)} is not valid; expected {_EXPECTED[name]}{near}"
            ) from error
    # 3. What must be given.
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in arguments:
            raise Complaint(
                (word,),
                f"{name} is missing; expected {_EXPECTED[name]}; for example {word}: {{{name}: 4}}",
            )


def _argument_named(value: object, message: str) -> KeyPath:
    """The argument that an option's own complaint is about, to find its line."""
    if not isinstance(value, Mapping):
        return ()
    for word, arguments in value.items():
        if not isinstance(arguments, Mapping):
            if message.startswith(word):
                return (word,)
            continue
        for name in arguments:
            if f"{word}: {name}=" in message:
                return (word, name)
    return ()
