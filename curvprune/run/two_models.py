"""`compare_folders`: any two models that can be loaded, on the certify split of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from curvprune import artifact, report
from curvprune.artifact import load_artifact
from curvprune.certificate import ModelComparison, compare_models
from curvprune.files import StageLog, State
from curvprune.model import Split, to_device
from curvprune.run import models
from curvprune.run.folder import MODEL, REPORT_JSON
from curvprune.run.prepare import device_of, load_model_of, load_splits, loss_of
from curvprune.run.published import as_text, check_own, publish_texts
from curvprune.run.recipe import Recipe, load_recipe
from curvprune.run.uses import FOLDER, UsesInFolder

COMPARISON_JSON, COMPARISON_HTML = "comparison.json", "comparison.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedModels:
    """A comparison, and how it is shown."""

    record: ModelComparison

    @property
    def title(self) -> str:
        return report.comparison_title(self.record)

    @property
    def evidence(self) -> str:
        return report.comparison_evidence(self.record)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Figure, value with its error, measure."""
        table = report.comparison_table(self.record)
        return [tuple(str(cell.text) for cell in row) for row in table.rows]


def compare_folders(
    dense: str | Path,
    other: str | Path,
    recipe_path: str | Path,
    *,
    out: str | Path | None = None,
    progress: bool = True,
) -> ComparedModels:
    """Compare two models on the certify split of a recipe; see `curvprune.compare`.

    Args:
        dense, other: folders or hub names: an artifact, or what transformers loads, quantized or
            not; or a recipe, which stands for its model. ``dense`` is the reference.
        recipe_path: its data, its objective and device, tokenizer and task of its model; that model
            itself is not loaded.
        out: a folder for ``comparison.json`` and ``comparison.html``. The comparison then counts as
            a use of the certify split for runs whose folders lie beside it.

    Raises ``ValueError`` for what cannot be loaded, models with different outputs, a recipe that is
    wrong.
    """
    # 1. The recipe and both models, before anything long.
    recipe = load_recipe(recipe_path)
    if out is not None:
        check_own(State(Path(out)), (COMPARISON_JSON, COMPARISON_HTML))
    device = device_of(recipe)
    pair = tuple(_load(source, recipe).to(device) for source in (dense, other))
    split = certify_split(recipe)

    # 2. The figures.
    loss = loss_of(recipe, pair[0], to_device(split.first(), device))
    with StageLog(show=progress).stage("compare", len(split.items)) as advance:
        found = compare_models(
            (pair[0], pair[1]),
            split,
            loss,
            names=(str(dense), str(other)),
            seed=recipe.seed,
            advance=advance,
        )

    # 3. Their files.
    if out is not None:
        UsesInFolder(Path(out).resolve().parent / FOLDER).enter(split, found.use())
        root = State(Path(out))
        page = report.comparison_page(found)
        publish_texts(root, {COMPARISON_JSON: as_text(found.to_dict()), COMPARISON_HTML: page})
    return ComparedModels(record=found)


def certify_split(recipe: Recipe) -> Split:
    """The certify split of a recipe, opened for a look outside its run."""
    return load_splits(recipe).certify


def _load(source: str | Path, recipe: Recipe) -> nn.Module:
    """A model by folder or name: an artifact of curvprune, or what transformers loads; of a recipe
    its model."""
    folder = Path(source)
    if folder.suffix in (".yaml", ".yml"):
        return load_model_of(load_recipe(folder))
    if (folder / artifact.MANIFEST).is_file():
        return load_artifact(folder)
    if (folder / REPORT_JSON).is_file() and (folder / MODEL).is_dir():
        raise ValueError(f"{source} is a run folder; its model is {folder / MODEL}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{source} is no model: it has neither {artifact.MANIFEST} (as artifacts have) nor "
            "config.json (as folders of transformers have)"
        )
    # No hub has names that are absolute, relative or nested.
    is_path = str(source).startswith((".", "/", "~")) or len(folder.parts) > 2
    if is_path and not folder.is_dir():
        raise ValueError(
            f"{source} is no folder; expected a model's folder, such as runs/quickstart/model, or "
            "the name of a model on the hub"
        )
    section = recipe.model
    return models.load_model(
        source,
        task=section.task,
        dtype=section.dtype,
        trust_remote_code=section.trust_remote_code,
        original=False,
    )
