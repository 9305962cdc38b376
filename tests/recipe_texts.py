"""Parts that make a whole recipe, for tests that change one of them."""

from __future__ import annotations

from pathlib import Path

MODEL = """\
model:
  path: some/folder
  task: causal-lm
"""
DATA = """\
data:
  source: python-docs
"""
COMPRESS = """\
compress:
  - layers: "model.layers.*"
    options:
      - quantize: {bits: 4, group_size: 64}
      - keep
"""
BUDGET = """\
budget: {max_drop: 0.05}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def marked_line(text: str) -> int:
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.endswith("#!")]
    assert len(lines) == 1, "exactly one line of the case must carry the marker"
    return lines[0]
