"""What a run remembers between processes: atomic files, and a log of its stages with progress and
time left.

Every file is written under a temporary name, flushed to disk and renamed, so a process killed at
any moment leaves either the old file or the new one, never half of it.
"""

from __future__ import annotations

import json
import os
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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class State:
    """A folder of JSON and safetensors files, each written atomically; names are paths inside the
    folder. Of several processes one writes; to the others ``writes`` is False and writing does
    nothing."""

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
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def read_text(self, name: str) -> str:
        return self.path(name).read_text(encoding="utf-8")

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
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
        temporary = path.with_name(f".{path.name}.tmp")
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path(name))


@dataclass(slots=True)
class StageLog:
    """Times the stages of a run and shows a bar with time left for each, on the terminal, if
    ``show``."""

    show: bool = True
    log: list[dict[str, Any]] = field(default_factory=list)

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
        with Progress(
            *columns, console=console, disable=not self.show or done >= total
        ) as progress:
            task = progress.add_task(name, total=total, completed=done)
            yield lambda finished: progress.update(task, completed=finished)
        seconds = time.monotonic() - start
        if self.show and not console.is_terminal:
            console.print(f"{name}: {'resumed, ' if done else ''}{total} done in {seconds:.0f} s")
        self.log.append({"name": name, "seconds": round(seconds, 2), "resumed": done > 0})

    @contextmanager
    def steps(self) -> Iterator[Callable[[str, int, int], None]]:
        """Yields a function to call with (step, done, total), each step with a bar of its own."""
        columns = (
            TextColumn("{task.description:<30}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        tasks: dict[str, Any] = {}
        with Progress(*columns, console=Console(stderr=True), disable=not self.show) as progress:

            def advance(step: str, done: int, total: int) -> None:
                if step not in tasks:
                    tasks[step] = progress.add_task(step, total=total)
                progress.update(tasks[step], completed=done, total=total)

            yield advance
