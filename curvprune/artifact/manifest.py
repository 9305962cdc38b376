"""The manifest of an artifact, ``curvprune.json``: which option each layer has, in which form it
lies on disk, and the hash of every file beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from curvprune.artifact.bytes_on_disk import Portable
from curvprune.files import State, sha256_of_file
from curvprune.model import DIGEST_BYTES, ShapeChange
from curvprune.options import Form
from curvprune.schema import decode, encode

MANIFEST = "curvprune.json"
VERSION = 2  # of the manifest
CARD = "README.md"
SEAL = "<!-- as curvprune wrote it, sha256 of what stands above: "


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLayer:
    """A compressed layer: the key of its option, and how it lies on disk."""

    option: str
    form: Form


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What an artifact's weights are.

    Attributes:
        portable: who can read the folder; see `curvprune.artifact.bytes_on_disk.reader_of`.
        layers: those that were compressed.
        plan: what chose them, as the one who wrote it had it.
        changes: how the shapes differ from those of the model's architecture.
        seen: hashes of the items that it was made from and chosen by, one after the other in hex.
        files: name → sha256 of every other file that was written with it.
        dtypes: tensor → its type, where that is not the type that the config names.
        shared: tensor that shares the memory of another one, under whose name it is stored.
        unread: why transformers does not read the folder, where it was to be ``portable``.
    """

    format: str = "pack-quantized"
    version: int = VERSION
    portable: Portable = True
    layers: dict[str, StoredLayer]
    plan: dict[str, object]
    changes: tuple[ShapeChange, ...] = ()
    seen: str = ""
    files: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    unread: str = ""

    def digests(self) -> frozenset[bytes]:
        """``seen``, hash by hash."""
        content = bytes.fromhex(self.seen)
        starts = range(0, len(content), DIGEST_BYTES)
        return frozenset(content[start : start + DIGEST_BYTES] for start in starts)

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        record: dict[str, object] = encode(self)
        record["changes"] = [change.to_json() for change in self.changes]
        # Most models have their architecture's shapes, and their manifests say nothing of them.
        if not self.changes:
            del record["changes"]
        for key in ("seen", "dtypes", "shared", "unread"):
            if not getattr(self, key):
                del record[key]
        # Last: what all of the above must hash to.
        record["sha256"] = _digest(record)
        return record


def _digest(record: dict[str, object]) -> str:
    """Hash of a manifest's entries, however they are spaced and ordered."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """An artifact's manifest. Raises ``ValueError`` naming the file if that does not hold one of
    this version, or was changed."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a folder that curvprune saved")
    value = State(folder).read_json(MANIFEST)
    written = value.get("version") if isinstance(value, dict) else None
    if written != VERSION:
        raise ValueError(
            f"{path} was written by another version of curvprune (manifest {written}, this one "
            f"reads {VERSION}); compress the model again"
        )
    said = value.pop("sha256", None)
    manifest: Manifest = decode(Manifest, value, source=str(path))
    if said != _digest(value):
        raise ValueError(f"{path} is not what was written: it was edited or is damaged; {MEND}")
    return manifest


# What to do about a folder that is not as it was saved.
MEND = "save the model again, or fetch another copy of the folder"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``curvprune.json``, with the hashes of all files that are there."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = sha256_of_file(path)
    State(folder).write_json(MANIFEST, replace(manifest, files=files).to_json())


def verify(folder: Path, manifest: Manifest | None = None, *, hashes: bool = True) -> None:
    """See that every file of an artifact is there and is what was written.

    Files that were added later are nobody's business. Cost: 1 to 3 s/GB; without
    ``hashes`` nothing is read.

    Raises ``ValueError`` naming the file.
    """
    for name, sha256 in (manifest or read_manifest(folder)).files.items():
        path = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{folder / MANIFEST}: {name!r} leads out of the folder")
        if not path.is_file():
            raise ValueError(f"{path} is missing: {MANIFEST} beside it lists it; {MEND}")
        if hashes and sha256_of_file(path) != sha256:
            raise ValueError(
                f"{path} is not what was written ({MANIFEST} has another sha256): it is damaged or "
                f"was changed; {MEND}"
            )


def sealed_card(text: str) -> str:
    """A model card with the hash of its text at the end, which tells it from one that was
    edited."""
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_own_card(path: Path) -> bool:
    """Whether a file is a model card as it was written, or what a kill has left of one."""
    if path.name == f".{CARD}.tmp":
        return True
    if path.name != CARD or path.is_symlink():
        return False
    text, seal, _ = path.read_text(encoding="utf-8", errors="replace").rpartition(SEAL)
    return bool(seal) and sealed_card(text) == path.read_text(encoding="utf-8", errors="replace")


def write_card(folder: Path, text: str) -> None:
    """Write the model card of an artifact, unless somebody else has written one."""
    path = folder / CARD
    if not path.exists() or is_own_card(path):
        State(folder).write_text(CARD, sealed_card(text))


def not_written(folder: Path, *, but: Collection[str] = ()) -> list[str]:
    """Files below an artifact's folder that were not written with it, or have changed since:
    writing over the folder would lose them."""
    listed, found = read_manifest(folder).files, []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or name in but or (path.is_dir() and not path.is_symlink()):
            continue
        if is_own_card(path):
            continue
        if name not in listed or path.is_symlink() or sha256_of_file(path) != listed[name]:
            found.append(name)
    return found
