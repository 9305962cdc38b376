"""`clean`: give back the disk that a run's intermediate results take."""

from __future__ import annotations

import shutil
from pathlib import Path

INPUTS, LOCK = "state/inputs.json", "recipe.lock.yaml"  # either one tells that a folder is a run


def clean(folder: str | Path) -> int:
    """Remove ``state/`` of a run: solved layers, gradients, plans that did not ship.

    Model, report, plan and verdict stay. A run that is cleaned cannot be reused or resumed: to run
    its recipe into the folder again starts from the beginning.

    Returns:
        Bytes that were freed. Files that another run shares, because it reuses this one, take
        their room as before and do not count.

    Raises:
        ValueError: the folder is not that of a run, or ``state/`` holds a file that no run wrote.
            Nothing is removed.
    """
    root = Path(folder)
    if not ((root / INPUTS).is_file() or (root / LOCK).is_file()):
        raise ValueError(
            f"{folder} is not the folder of a run (it has neither {INPUTS} nor {LOCK}); expected "
            "one that `curvprune run` wrote, such as runs/quickstart"
        )
    state = root / "state"
    if state.is_symlink():
        raise ValueError(f"{state} is a link to another folder; remove that one yourself")
    if not state.exists():
        return 0
    if (foreign := _foreign(state)) is not None:
        raise ValueError(f"{foreign} was not written by a run; move it elsewhere, then clean again")
    freed = 0
    for path in state.rglob("*"):
        found = path.lstat()
        if not path.is_dir() and found.st_nlink == 1:
            freed += found.st_size
    shutil.rmtree(state)
    return freed


def _foreign(state: Path) -> Path | None:
    """A file that no run writes: results are JSON or safetensors, and a model's folder is ours as a
    whole."""
    for path in sorted(state.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        in_model = any(_is_model(part) for part in path.relative_to(state).parts[:-1])
        ours = path.suffix in (".json", ".safetensors", ".tmp")
        if path.is_symlink() or not (ours or in_model):
            return path
    return None


def _is_model(name: str) -> bool:
    """Whether a folder of this name is that of a model, or of one that was being written."""
    return name == "model" or name.startswith(".model.")
