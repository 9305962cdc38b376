"""The manifest of an artifact, ``curvprune.json``: which option each layer has, and in which form
it lies on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from curvprune.artifact.bytes_on_disk import Portable
from curvprune.files import State
from curvprune.model import DIGEST_BYTES, ShapeChange
from curvprune.options import Form
from curvprune.schema import decode, encode

MANIFEST = "curvprune.json"
VERSION = 2  # of the manifest


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
        return record


def read_manifest(folder: Path) -> Manifest:
    """An artifact's manifest. Raises ``ValueError`` naming the file if that does not hold one of
    this version."""
    path = folder / MANIFEST
    value = State(folder).read_json(MANIFEST)
    written = value.get("version") if isinstance(value, dict) else None
    if written != VERSION:
        raise ValueError(
            f"{path} was written by another version of curvprune (manifest {written}, this one "
            f"reads {VERSION}); compress the model again"
        )
    return decode(Manifest, value, source=str(path))
