"""Results of a saved model as an engine runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from curvprune.artifact import weights_file
from curvprune.model import ItemResults
from curvprune.run.evaluation import are_of, read_results, results_on
from curvprune.run.folder import VIEW
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.schema import decode, encode
from curvprune.targets import open_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """An engine, and the bytes of the file that it ran."""

    name: str
    version: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What an engine computed for every item of the certify split."""

    name: str
    version: str
    bytes: int
    results: ItemResults


def view_of(task: Task, folder: Path) -> Path:
    """The file that an engine reads, beside the artifact that it is a view of; made once."""
    path = folder.parent / VIEW
    if not path.exists():
        assert task.storage.view is not None
        task.storage.view(folder, path)
    return path


def results_in_engine(task: Task, space: Workspace, folder: Path, file: str, *, of: str) -> Served:
    """Evaluate a saved model in the engine of the task, or read what an earlier process has.

    Args:
        file: of the results in torch; the engine's lie beside it.
        of: which saved model it is; see `curvprune.run.evaluation.are_of`.
    """
    name = task.settings.engine
    assert name is not None
    stem = file.removesuffix(".json")
    kept, about = f"{stem}-{name}.json", f"{stem}-{name}-engine.json"
    state, split = space.state, task.splits.certify
    if not (are_of(space, kept, of) and state.has(about)):
        state.path(kept).unlink(missing_ok=True)
        path = folder if name == "vllm" else view_of(task, folder)
        length = 1
        for item in split.items:
            assert isinstance(item, Mapping)
            length = max(length, item["input_ids"].shape[-1])
        with open_engine(path, engine=name, length=length) as model:
            results_on(task, space, kept, model, split, of=of)
            engine = Engine(
                name=name,
                version=model.runner.version,
                bytes=(weights_file(folder) if name == "vllm" else path).stat().st_size,
            )
            state.write_json(about, encode(engine))
    engine = decode(Engine, state.read_json(about), source=str(state.path(about)))
    return Served(
        name=engine.name,
        version=engine.version,
        bytes=engine.bytes,
        results=read_results(space, kept),
    )
