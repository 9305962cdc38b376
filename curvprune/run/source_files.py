"""The files on this disk that a recipe reads: its model's, its texts, its tables."""

from __future__ import annotations

from pathlib import Path

from curvprune.files import sha256_of_file
from curvprune.run.models import package_folder
from curvprune.run.recipe import Recipe, load_recipe

LOCK = "recipe.lock.yaml"
# Of a model's folder; what else lies there changes nothing.
_READ = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"),
    *(".json", ".model", ".txt", ".jinja", ".py", ".tiktoken"),
)


def source_files(recipe: Recipe) -> dict[str, str]:
    """Path → sha256 of every such file. Models and data from a hub have none.

    Cost: 1 to 3 s/GB.
    """
    section, paths = recipe.model, [Path(file) for file in recipe.data.files or ()]
    if section.path is not None or section.package is not None:
        paths += _model_files(recipe)
    if recipe.budget is not None:
        paths += [Path(limit.table) for limit in recipe.budget.limits]
    return {str(path): sha256_of_file(path) for path in paths if path.is_file()}


def _model_files(recipe: Recipe) -> list[Path]:
    section = recipe.model
    if section.path is not None:
        folder = Path(section.path)
    else:
        assert section.package is not None
        try:
            folder = package_folder(section.package)
        except ValueError:  # no longer installed
            return []
    if section.folder is not None:
        folder = folder / section.folder
    if section.file is not None:
        return [folder / section.file]
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.suffix in _READ]


def source_gguf(model: str | Path) -> Path | None:
    """The GGUF file that the model of a run was read from, if it is one and still there.

    The run's own recipe, ``recipe.lock.yaml`` beside ``model/``, names it. Of folders that lie
    elsewhere nothing is known.
    """
    lock = Path(model).resolve().parent / LOCK
    if not lock.is_file():
        return None
    recipe = load_recipe(lock)
    if recipe.model.file is None:
        return None
    files = [path for path in _model_files(recipe) if path.is_file()]
    return files[0] if files else None


def other_sources(before: dict[str, str], now: dict[str, str]) -> bool:
    """Whether a file has changed or is new. One that is gone contradicts nothing."""
    return any(before.get(path) != sha256 for path, sha256 in now.items())
