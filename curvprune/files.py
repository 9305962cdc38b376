"""What a run remembers between processes: atomic files and folders, sealed by their hashes, and a
log of its stages with progress and time left.

Every file and folder is written under a temporary name, flushed to disk and renamed. A process that
is killed at any moment leaves the old one or the new one, never half of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from curvprune.failures import tensors_error
from curvprune.places import check_regular

# A sealed JSON file is one of two entries: the hash, and what it is of.
_SEAL = '{"sha256": "%s",\n"content": '
_LARGEST_HEADER = 100_000_000  # bytes; that of safetensors itself


def as_umask_says_(path: Path) -> None:
    """Give a file the mode that other new files have: safetensors makes its own readable to nobody
    but their owner."""
    # Only a new file tells the umask without setting it, for a moment, in all threads.
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes, 1 to 3 seconds per gigabyte."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str, source: Path) -> Any:
    """Raises ``ValueError`` naming the file if it is not JSON, or says one key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is damaged ({error}); delete it and run again") from error


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def read_tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ``ValueError`` naming the file if it is not whole,
    or holds two tensors of one name."""
    check_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        # The disk's or the memory's fault is not the file's.
        told = tensors_error(error, path)
        raise (_damaged(path, str(error)) if isinstance(told, ValueError) else told) from error


def check_header(path: Path) -> None:
    """Look at a safetensors file's header before anything takes memory for what it promises."""
    if not path.is_file():
        raise ValueError(f"{path} is not there, or is no file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise _damaged(path, f"{size} bytes, which a header of {length} does not fit into")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
        ends = [one["data_offsets"][1] for key, one in header.items() if key != "__metadata__"]
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _damaged(path, f"its header: {error}") from error
    if max(ends, default=0) != size - 8 - length:
        raise _damaged(path, f"{size} bytes, which is not what its header says")


def _damaged(path: Path, why: str) -> ValueError:
    first = why.splitlines()[0] if why else "cannot be read"
    return ValueError(f"{path} is damaged ({first[:200]}); write it again, or fetch another copy")


# --------------------------------------------------------------------------------- whole folders


@contextmanager
def written_beside(folder: Path, marker: str) -> Iterator[Path]:
    """Yields a new folder beside ``folder``, which takes its place at the end, or is removed after
    an exception.

    A kill between the two renames leaves ``.<name>.old``: `where_it_lies` finds it, and the next
    call here puts it back first.

    Args:
        marker: the file that tells a folder of ours; an old one without it is never removed.

    Raises ``ValueError`` where ``folder`` is a link, or something is in the way.
    """
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, which is not followed; give the folder itself")
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # 1. What processes left that were killed.
    _clear_leftovers(folder, marker)
    fresh = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    fresh.mkdir()
    try:
        # 2. The caller fills it; all of it is on the disk before it gets its name.
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                _flush(path)
        # 3. Two renames, then the old one goes.
        _take_place(fresh, folder, marker)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def where_it_lies(folder: Path) -> Path:
    """``folder``, or where a process that was killed while replacing it has left the old one."""
    if not folder.exists() and (old := _aside(folder)).is_dir():
        return old
    return folder


def _aside(folder: Path) -> Path:
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.old")


def _take_place(fresh: Path, folder: Path, marker: str) -> None:
    if not folder.exists():
        fresh.rename(folder)
    elif not any(folder.iterdir()):
        folder.rmdir()
        fresh.rename(folder)
    else:
        old = _aside(folder)
        folder.rename(old)
        fresh.rename(folder)
        _remove_marked(old, marker)


def _clear_leftovers(folder: Path, marker: str) -> None:
    old = _aside(folder)
    if old.is_dir():
        if not (old / marker).is_file():
            raise ValueError(
                f"{old} is in the way and holds no {marker}, as what curvprune leaves would; move "
                "it elsewhere"
            )
        if folder.exists():
            _remove_marked(old, marker)
        else:
            old.rename(folder)
    pattern = re.compile(re.escape(f".{folder.name}.new-") + r"(\d+)")
    for path in folder.parent.iterdir():
        found = pattern.fullmatch(path.name)
        if found and path.is_dir() and not path.is_symlink() and not _alive(int(found[1])):
            shutil.rmtree(path)


def _remove_marked(folder: Path, marker: str) -> None:
    """Remove a folder, the file that says whose it is last: a kill midway leaves it known."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != marker:
            path.unlink()
    (folder / marker).unlink()
    folder.rmdir()


def _alive(pid: int) -> bool:
    """Whether another process has this number. This one leaves nothing behind that it has not
    finished."""
    if pid == os.getpid():
        return False
    if os.name != "posix":
        return True  # to ask there is to end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------- single files


@dataclass(frozen=True, slots=True)
class State:
    """A folder of JSON and safetensors files, each written atomically; names are paths inside it.

    Of several processes one writes; to the others ``writes`` is False and writing does nothing.

    With a ``seal``, every file carries a hash of its content, its name and the seal. What was
    changed, renamed or brought from a folder with another seal is refused when it is read.
    """

    folder: Path
    writes: bool = True
    seal: str | None = None

    def path(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            raise ValueError(f"{name!r} leads out of the run folder {self.folder}")
        return path

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def write_text(self, name: str, text: str) -> None:
        path = self.path(name)
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # 1. Under another name, so that a reader never sees half a file.
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            # 2. On the disk before it takes the old one's place, or a power cut may lose both.
            file.flush()
            os.fsync(file.fileno())
        # 3. One step, in which the new file replaces the old one.
        temporary.replace(path)

    def read_text(self, name: str) -> str:
        """Raises ``ValueError`` naming the file if it is not UTF-8."""
        path = self.path(name)
        check_regular(path)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error

    def write_json(self, name: str, value: object) -> None:
        """Raises ``ValueError`` for NaN and infinity, which JSON does not have."""
        text = json.dumps(value, indent=1, allow_nan=False)
        whole = f"{text}\n" if self.seal is None else self._sealed(name, text)
        self.write_text(name, whole)

    def read_json(self, name: str) -> Any:
        """Raises ``ValueError`` naming the file if it is not JSON, or not as it was written."""
        text = self.read_text(name)
        if self.seal is not None:
            content = text[len(_SEAL % ("0" * 64)) : -2]
            if text != self._sealed(name, content):
                raise self._not_as_written(name)
            text = content
        return parse_json(text, self.path(name))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.path(name)
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same three steps as in `write_text`, and the mode that safetensors does not set.
        temporary = path.with_name(f".{path.name}.tmp")
        whole = {k: v.detach().contiguous() for k, v in tensors.items()}
        metadata = None
        if self.seal is not None:
            metadata = {"sha256": self._hash(name, *_parts_of(whole))}
        try:
            save_file(whole, temporary, metadata=metadata)
        except SafetensorError as error:
            raise tensors_error(error, path) from error
        as_umask_says_(temporary)
        _flush(temporary)
        temporary.replace(path)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Raises ``ValueError`` naming the file if it is not whole, or not as it was written."""
        path = self.path(name)
        tensors = read_tensors_of(path)
        if self.seal is not None:
            with safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get("sha256")
            if said != self._hash(name, *_parts_of(tensors)):
                raise self._not_as_written(name)
        return tensors

    def _sealed(self, name: str, content: str) -> str:
        return _SEAL % self._hash(name, content.encode()) + content + "}\n"

    def _hash(self, name: str, *parts: Any) -> str:
        """Of the seal, a file's name, and bytes or arrays."""
        found = hashlib.sha256(f"{self.seal}\n{name}\n".encode())
        for part in parts:
            found.update(part)
        return found.hexdigest()

    def _not_as_written(self, name: str) -> ValueError:
        return ValueError(
            f"{self.path(name)} is damaged: it is not what this run wrote under this name; run "
            "again, which makes it anew"
        )


def _parts_of(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """What there is to hash of tensors: name, type, shape and bytes of each."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name}{tuple(tensor.shape)}{tensor.dtype}\n".encode()
        # As bytes: NumPy has no bfloat16.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(uint8)
        yield raw.numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """How long a stage took; ``resumed``: part of it had been done by an earlier process."""

    name: str
    seconds: float
    resumed: bool


@dataclass(slots=True)
class StageLog:
    """Times the stages of a run and shows a bar with time left for each, on the terminal, if
    ``show``."""

    show: bool = True
    log: list[StageTime] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line among the stages."""
        if self.show:
            Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int, *, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Yields a function to call with the number of finished steps; ``done`` of them by an
        earlier run."""
        start = time.monotonic()
        columns = (
            TextColumn("{task.description:<30}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        hidden = not self.show or done >= total
        with Progress(*columns, console=console, disable=hidden) as progress:
            task = progress.add_task(name, total=total, completed=done)
            yield lambda finished: progress.update(task, completed=finished)
        seconds = time.monotonic() - start
        # A bar leaves no trace in a file of the output: one line does.
        if self.show and not console.is_terminal:
            resumed = "resumed, " if done else ""
            console.print(f"{name}: {resumed}{total} done in {seconds:.0f} s")
        self.log.append(StageTime(name=name, seconds=round(seconds, 2), resumed=done > 0))

    @contextmanager
    def steps(self) -> Iterator[Callable[[str, int, int], None]]:
        """Yields a function to call with (step, done, total), each step with a bar of its own."""
        columns = (
            TextColumn("{task.description:<30}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        tasks: dict[str, TaskID] = {}
        with Progress(*columns, console=Console(stderr=True), disable=not self.show) as progress:
            # Steps are not known beforehand: each gets its bar when it first reports.
            def advance(step: str, done: int, total: int) -> None:
                if step not in tasks:
                    tasks[step] = progress.add_task(step, total=total)
                progress.update(tasks[step], completed=done, total=total)

            yield advance
