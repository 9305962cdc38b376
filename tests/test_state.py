"""Files are written whole or not at all, for all to read, and stay inside their folder."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError

from curvprune.files import StageLog, StageTime, State


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    state = State(tmp_path)
    state.write_json("deep/a.json", {"x": 1})
    state.write_tensors("t.safetensors", {"w": torch.arange(3)})
    writes: list[Callable[[], None]] = [
        lambda: state.write_json("deep/a.json", {"x": "2" * 100_000}),
        lambda: state.write_tensors("t.safetensors", {"w": torch.zeros(100_000)}),
    ]
    for write in writes:
        with files_of_at_most(10_000), pytest.raises((OSError, SafetensorError)):
            write()
    assert state.read_json("deep/a.json") == {"x": 1}
    assert torch.equal(state.read_tensors("t.safetensors")["w"], torch.arange(3))
    for write in writes:  # what is left of the failures is in nobody's way
        write()
    assert state.read_json("deep/a.json") == {"x": "2" * 100_000}
    assert torch.equal(state.read_tensors("t.safetensors")["w"], torch.zeros(100_000))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(tmp_path, mask, mode):
    state = State(tmp_path)
    before = os.umask(mask)
    try:
        state.write_text("a.txt", "a")
        state.write_tensors("t.safetensors", {"w": torch.arange(3)})
    finally:
        os.umask(before)
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == {"a.txt": mode, "t.safetensors": mode}


def test_of_several_processes_one_writes(tmp_path):
    other = State(tmp_path, writes=False)
    other.write_json("a.json", {"x": 1})
    other.write_tensors("t.safetensors", {"w": torch.arange(3)})
    assert not list(tmp_path.iterdir())


def test_names_cannot_leave_the_folder_and_nan_is_refused(tmp_path):
    state = State(tmp_path / "run")
    for name in ("../outside.json", "/etc/passwd", "a/../../b"):
        with pytest.raises(ValueError, match="leads out of the run folder"):
            state.write_text(name, "x")
    with pytest.raises(ValueError, match="not JSON compliant"):
        state.write_json("a.json", {"x": float("nan")})
    assert not state.has("a.json")


def test_a_damaged_file_is_named(tmp_path):
    state = State(tmp_path)
    state.write_text("a.json", "{")
    with pytest.raises(ValueError, match=r"a\.json is damaged .*delete it and run again"):
        state.read_json("a.json")


def test_the_log_knows_what_was_resumed():
    log = StageLog(show=False)
    with log.stage("first", 3) as advance:
        advance(3)
    with log.stage("second", 3, done=2):
        pass
    assert all(isinstance(entry, StageTime) and entry.seconds >= 0 for entry in log.log)
    assert [(entry.name, entry.resumed) for entry in log.log] == [
        ("first", False),
        ("second", True),
    ]
