"""Files are written whole or not at all, and stay inside their folder."""

from __future__ import annotations

import pytest
import torch

from curvprune.files import StageLog, State


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    state = State(tmp_path)
    state.write_json("deep/a.json", {"x": 1})
    state.write_tensors("t.safetensors", {"w": torch.arange(3)})

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", crash)
    for write in (
        lambda: state.write_json("deep/a.json", {"x": 2}),
        lambda: state.write_tensors("t.safetensors", {"w": torch.zeros(9)}),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert state.read_json("deep/a.json") == {"x": 1}
    assert torch.equal(state.read_tensors("t.safetensors")["w"], torch.arange(3))


def test_names_cannot_leave_the_folder_and_nan_is_refused(tmp_path):
    state = State(tmp_path / "run")
    for name in ("../outside.json", "/etc/passwd", "a/../../b"):
        with pytest.raises(ValueError, match="leads out of the run folder"):
            state.write_text(name, "x")
    with pytest.raises(ValueError, match="not JSON compliant"):
        state.write_json("a.json", {"x": float("nan")})
    assert not state.has("a.json")


def test_the_log_knows_what_was_resumed():
    log = StageLog(show=False)
    with log.stage("first", 3) as advance:
        advance(3)
    with log.stage("second", 3, done=2):
        pass
    assert [(entry["name"], entry["resumed"]) for entry in log.log] == [
        ("first", False),
        ("second", True),
    ]
