"""What an installation brings: extras that leave torch alone, one version everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import curvprune

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Packages that ask for torchvision or torchaudio. Their newest releases ask for the newest torch,
# so that an extra with one of them would replace the build that is installed.
MOVE_TORCH = {
    "torchvision",
    "torchaudio",
    "torchtext",
    "backpack-for-pytorch",
    "curvlinops-for-pytorch",
    "timm",
}


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_no_extra_moves_torch(extra):
    asked = PROJECT["optional-dependencies"][extra]
    names = {re.split(r"[\[<>=~! ;]", requirement)[0].lower() for requirement in asked}
    assert not names & MOVE_TORCH
    assert "torch" not in names, "only the library itself asks for torch"


def test_there_is_one_version():
    assert PROJECT["version"] == curvprune.__version__
