"""What a run remembers between processes: atomic files, and a log of its stages with progress and
time left.

Every file is written under a temporary name, flushed to disk and renamed. A process that is killed
at any moment leaves the old file or the new one, never half of it.
"""

from __future__ import annotations

import json
import os
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
from safetensors.torch import load_file, save_file
from torch import Tensor


def as_umask_says_(path: Path) -> None:
    """Give a file the mode that other new files have: safetensors makes its own readable to nobody
    but their owner."""
    # Only a new file tells the umask without setting it, for a moment, in all threads.
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)


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
        return self.path(name).read_text(encoding="utf-8")

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

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.path(name)
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same three steps as in `write_text`, and the mode that safetensors does not set.
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary)
        as_umask_says_(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path(name))


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
