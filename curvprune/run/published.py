"""The files that a folder holds for its reader, and the list of them, ``files.json``: what is not
on it was written by somebody else, and what has another hash was changed since.

A name is put on the list before its file is written, so that a process killed at any moment knows
its own files again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from curvprune.artifact import is_own_card
from curvprune.files import State, sha256_of_file
from curvprune.run.recipe_errors import RecipeError
from curvprune.schema import decode, encode

LIST = "files.json"
WRITER = "curvprune"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """The list.

    Attributes:
        files: name → sha256 of what has been written.
        coming: the same of what is being written; a kill may leave either.
        sha256: of all of this.
    """

    written_by: str = WRITER
    files: dict[str, str] = field(default_factory=dict)
    coming: dict[str, str] = field(default_factory=dict)
    sha256: str = ""

    def sealed(self) -> Listed:
        return replace(self, sha256=self._digest())

    def whole(self) -> bool:
        return self.sha256 == self._digest()

    def _digest(self) -> str:
        content = encode(replace(self, sha256=""))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def has(self, name: str, sha256: str) -> bool:
        return sha256 in (self.files.get(name), self.coming.get(name))


def read_list(root: State) -> Listed | None:
    """The list of a folder, if it has one. Raises ``ValueError`` for one that is not ours, or was
    changed."""
    path = root.folder / LIST
    if not path.exists() and not path.is_symlink():
        return None
    found = root.read_json(LIST)
    if not isinstance(found, dict) or found.get("written_by") != WRITER:
        raise RecipeError(f"{path} was not written by curvprune; use another folder")
    listed: Listed = decode(Listed, found, source=str(path))
    if not listed.whole():
        raise RecipeError(
            f"{path} is not what curvprune wrote: it was edited or is damaged; use a new folder"
        )
    return listed


def start_list(root: State) -> None:
    """From now on the folder is ours."""
    if read_list(root) is None:
        _write(root, Listed())


def publish_texts(root: State, texts: Mapping[str, str]) -> None:
    """Write files and put them on the list."""
    hashes = {}
    for name, text in texts.items():
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    announce(root, hashes)
    for name, text in texts.items():
        root.write_text(name, text)
    settle(root, hashes)


def as_text(value: object) -> str:
    """JSON as it is written. Raises ``ValueError`` for NaN and infinity, which JSON does not
    have."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def announce(root: State, hashes: Mapping[str, str]) -> None:
    """Put on the list what is about to be written."""
    listed = read_list(root) or Listed()
    _write(root, replace(listed, coming={**listed.coming, **hashes}))


def settle(root: State, hashes: Mapping[str, str], *, instead_of: str | None = None) -> None:
    """What was announced has been written.

    Args:
        instead_of: a folder of which the list then has these files only.
    """
    listed = read_list(root) or Listed()
    files, coming = dict(listed.files), dict(listed.coming)
    if instead_of is not None:
        files = {name: h for name, h in files.items() if not _below(name, instead_of)}
        coming = {name: h for name, h in coming.items() if not _below(name, instead_of)}
    for name in hashes:
        coming.pop(name, None)
    _write(root, replace(listed, files={**files, **hashes}, coming=coming))


def _below(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/")


def _write(root: State, listed: Listed) -> None:
    ordered = replace(
        listed, files=dict(sorted(listed.files.items())), coming=dict(sorted(listed.coming.items()))
    )
    root.write_json(LIST, encode(ordered.sealed()))


# ------------------------------------------------------------------------------------ the checks


def check_own(root: State, names: Collection[str], *, beside: Collection[str] = ()) -> None:
    """Refuse, before anything is written, to write over what is not ours or has been changed.

    Args:
        names: files, and folders with all that is in them.
        beside: names among these that the folder may have without a list.
    """
    listed = read_list(root)
    for name, path in _files(root, names):
        if listed is None and name in beside:
            continue
        if path.is_symlink():
            raise RecipeError(f"{path} is a link; remove it, or give a new folder")
        if listed is None or (name not in listed.files and name not in listed.coming):
            raise RecipeError(
                f"{path} is in the way: curvprune would write over it and did not write it (it is "
                f"not in {root.folder / LIST}); move it elsewhere, or give a new folder"
            )
        if not listed.has(name, sha256_of_file(path)):
            raise RecipeError(
                f"{path} is not what was written there ({LIST} has another sha256): it was edited "
                "or is damaged; move it elsewhere, or delete it and run again"
            )


def _files(root: State, names: Collection[str]) -> Iterator[tuple[str, Path]]:
    """The files that there are, by their names in the list."""
    for name in names:
        path = root.folder / name
        found = [path]
        if path.is_dir() and not path.is_symlink():
            found = [one for one in sorted(path.rglob("*")) if one.is_symlink() or not one.is_dir()]
        for one in found:
            # A model card that nobody has edited may be written again.
            if (one.exists() or one.is_symlink()) and not is_own_card(one):
                yield one.relative_to(root.folder).as_posix(), one


def check_listed(root: State, *, but: Collection[str] = ()) -> bool:
    """Whether all files on the list are there.

    Raises ``ValueError`` naming a file that is not what was written. Cost: 1 to 3 s/GB.
    """
    listed = read_list(root)
    if listed is None:
        return False
    whole = not listed.coming
    for name in sorted({**listed.files, **listed.coming}):
        path = root.folder / name
        if name in but:
            continue
        if not path.is_file():
            whole = False
        elif not listed.has(name, sha256_of_file(path)):
            raise RecipeError(
                f"{path} is not what was written there ({LIST} has another sha256): it was edited "
                "or is damaged; delete it and run again"
            )
    return whole
