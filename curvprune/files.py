"""What a run remembers between processes: atomic files, and a log of its stages with progress and
time left.

Every file is written under a temporary name, flushed to disk and renamed. A process that is killed
at any moment leaves the old file or the new one, never half of it.
"""

from __future__ import annotations

import errno
import json
import os
import platform
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from curvprune.failures import tensors_error


def as_umask_says_(path: Path) -> None:
    """Give a file the mode that other new files have: safetensors makes its own readable to nobody
    but their owner."""
    # Only a new file tells the umask without setting it, for a moment, in all threads.
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)


def check_regular(path: Path) -> None:
    """Refuse what is no ordinary file: a pipe would be waited for, a device read without end.

    Raises ``ValueError`` naming the path and what lies there, `OSError` where nothing does.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    kind = kinds.get(stat.S_IFMT(mode), "something else")
    raise ValueError(f"{path} is {kind}; expected an ordinary file")


def check_regular_below(folder: Path) -> None:
    """`check_regular` for every file of a model's folder, which libraries open without a look."""
    for path in sorted(folder.iterdir()):
        # Links to nothing are not opened either.
        if path.exists() and not path.is_dir():
            check_regular(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``ValueError`` naming a file that is damaged, and
    `OSError` or `MemoryError` for what the machine refuses."""
    check_regular(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise tensors_error(error, path) from error


# ------------------------------------------------------------ one process in a folder

RUNNING = ".curvprune.lock"


@contextmanager
def only_here(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder for as long as this one works in it.

    The system gives the lock back when the process ends, however it ends. Where a file system has
    no locks, there is none.

    Raises:
        ValueError: another process works there.
    """
    # 1. The file of the lock, in a folder that may be new.
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUNNING
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno == errno.EROFS:
            yield  # nothing can be written there, by nobody
            return
        raise
    # 2. The lock itself, and who has it.
    try:
        if not _lock(handle):
            owner = os.read(handle, 200).decode(errors="replace").strip()
            raise ValueError(
                f"another process{f' ({owner})' if owner else ''} is at work in {folder}; wait for "
                "it to end, or give --out another folder"
            )
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Take the lock of an open file without waiting; False if another process has it."""
    try:
        if os.name == "nt":  # pragma: no cover
            import msvcrt

            # Far behind the text: Windows lets nobody read what is locked.
            os.lseek(handle, 1 << 20, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
    return True


# ------------------------------------------------------------ files that are whole or not there


@dataclass(frozen=True, slots=True)
class State:
    """A folder of JSON and safetensors files, each written atomically; names are paths inside it.

    Of several processes one writes; to the others ``writes`` is False and writing does nothing.
    """

    folder: Path
    writes: bool = True

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
        path = self.path(name)
        check_regular(path)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is damaged (no UTF-8 text); delete it and run again"
            ) from error

    def write_json(self, name: str, value: object) -> None:
        """Raises ``ValueError`` for NaN and infinity, which JSON does not have."""
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Raises ``ValueError`` naming the file if it is not JSON."""
        try:
            return json.loads(self.read_text(name))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path(name)} is damaged ({error}); delete it and run again"
            ) from error
        except RecursionError:
            raise ValueError(
                f"{self.path(name)} is damaged (nested without end); delete it and run again"
            ) from None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.path(name)
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same three steps as in `write_text`, and the mode that safetensors does not set.
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary)
        except SafetensorError as error:
            raise tensors_error(error, path) from error
        as_umask_says_(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return read_tensors(self.path(name))


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
