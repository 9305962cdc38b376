"""The pages that readers see: every code block runs, every link leads somewhere, and the reference
pages name everything there is.

A page is read from top to bottom, in a folder of its own that holds ``recipes/`` and the finished
run ``runs/quickstart``, both tiny. Its ``python`` blocks share one namespace; ``<!-- test-setup``
opens a block that readers do not see. A ``text`` block is what the block before it printed, up to
numbers. A ``yaml`` block is a recipe, or a part that is put into the tiny one; if it begins with
``# name.yaml`` it is also written under that name, for the commands after it.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
import yaml
from pydantic import BaseModel
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from curvprune.cli import app
from curvprune.run import Recipe, load_recipe
from tests.test_architecture import MAY_IMPORT
from tests.tiny import write_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RUNNING = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [*RUNNING, ROOT / "CHANGELOG.md"]

# A fenced block, or one that only tests see.
BLOCK = re.compile(r"^```(?P<language>\S*)\n(?P<text>.*?)^```$|^<!-- test-setup\n(?P<setup>.*?)^-->$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,.]*(e[-+]?\d+)?")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------ code blocks


@dataclass(frozen=True)
class Block:
    """A code block; ``line`` is that of its first line of text in the page."""

    language: str
    text: str
    line: int


def blocks_of(page: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page):
        hidden = match["setup"] is not None
        text = match["setup"] if hidden else match["text"]
        line = page.count("\n", 0, match.start("setup" if hidden else "text")) + 1
        found.append(Block("python" if hidden else match["language"], text, line))
    return found


def without_numbers(text: str) -> str:
    lines = [" ".join(NUMBER.sub("#", line).split()) for line in text.strip().splitlines()]
    return "\n".join(lines)


class Reader:
    """Somebody who does what a page says, block by block, in the working directory."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.module = types.ModuleType("page")
        self.printed: str | None = None  # by the last block that ran

    def read(self, page: str) -> None:
        blocks = blocks_of(page)
        fences = len(re.findall(r"^\s*```", page, re.M))
        assert fences == 2 * sum("```" in line for line in page.splitlines()) / 2, self.name
        assert 2 * len([b for b in blocks if b.language]) <= fences
        for block in blocks:
            self.do(block)

    def do(self, block: Block) -> None:
        place = f"{self.name}:{block.line}"
        if block.language == "python":
            self.printed = self.run_python(block, place)
        elif block.language == "sh":
            self.printed = run_shell(block.text, place)
        elif block.language == "text":
            assert self.printed is not None, f"{place}: no block before it prints this"
            shown = without_numbers(block.text)
            assert shown == without_numbers(self.printed), place
            self.printed = None
        elif block.language == "yaml":
            read_yaml_block(block.text, place)
        elif block.language == "json":
            json.loads(block.text)
        else:
            pytest.fail(f"{place}: nothing runs a block of {block.language or 'no language'!r}")

    def run_python(self, block: Block, place: str) -> str:
        # Empty lines in front, so that a traceback names the page's own lines.
        code = compile("\n" * (block.line - 1) + block.text, place, "exec")
        printed = io.StringIO()
        with redirect_stdout(printed), torch.random.fork_rng(devices=[]):
            exec(code, self.module.__dict__)
        return printed.getvalue()


# ------------------------------------------------------------------------------- lines of a shell


def run_shell(text: str, place: str) -> str:
    printed = ""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            printed += run_words(words, f"{place}: {line}")
    return printed


def run_words(words: list[str], place: str) -> str:
    """Run a command if that is ours, else check that it could be run."""
    match words:
        case ["curvprune", *arguments]:
            return run_command(arguments, place)
        case ["torchrun", "--nproc-per-node", count, "-m", "curvprune", *arguments]:
            assert count.isdigit(), place
            return run_command(arguments, place)
        case ["make", *arguments]:
            made = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True)
            assert made.returncode == 0, f"{place}: {made.stderr.decode()}"
        case ["pip" | ".venv/bin/pip", "install", *what]:
            check_install([word for word in what if word != "-e"], place)
        case ["python" | ".venv/bin/python", script, *arguments]:
            run_script(script, arguments, place)
        case ["bash", script]:
            assert (ROOT / script).is_file(), place
        case [".venv/bin/pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").is_file(), place
        case _:
            pytest.fail(f"{place}: nothing here knows how to run this line")
    return ""


def run_command(arguments: list[str], place: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, f"{place}: {result.output}"
    return result.output


def check_install(what: list[str], place: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in what:
        match = re.fullmatch(r"(\.|curvprune)\[(.+)\]", word)
        if match is None:
            assert word in ("torch", "."), f"{place}: {word} is not known"
            continue
        assert {*match[2].split(",")} <= {*project["optional-dependencies"]}, place


def run_script(script: str, arguments: list[str], place: str) -> None:
    """An example runs, for one epoch; a benchmark takes too long, and must be there."""
    path = ROOT / script
    assert path.is_file(), place
    if path.parent.name == "benchmarks":
        for word in arguments:
            assert not word.startswith("--") or word in path.read_text(), f"{place}: {word}"
        return
    assert path.parent.name == "examples", place
    before = sys.argv
    sys.argv = [script, *arguments, "--epochs", "1"]
    try:
        with torch.random.fork_rng(devices=[]):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


# ---------------------------------------------------------------------------------------- recipes


def read_yaml_block(text: str, place: str) -> None:
    value = yaml.safe_load(text)
    assert isinstance(value, dict), f"{place}: a recipe is a mapping"
    named = re.match(r"# ([\w-]+\.yaml)\b", text)
    path = Path(named[1] if named else "block.yaml")
    if {"model", "compress"} <= {*value}:
        path.write_text(text)
    else:
        tiny = yaml.safe_load(Path("recipes/quickstart.yaml").read_text())
        path.write_text(yaml.safe_dump(tiny | value))
    load_recipe(path)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a tiny recipe and its finished run."""
    folder = tmp_path_factory.mktemp("house")
    made = write_recipe(tmp_path_factory.mktemp("model"), budget="budget: {max_drop: 0.3}")
    # A wider model than other tests need, so that groups of 64 divide its inputs.
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).eval().save_pretrained(made.parent / "tiny")
    (folder / "recipes").mkdir()
    recipe = folder / "recipes" / "quickstart.yaml"
    shutil.copy(made, recipe)
    out = str(folder / "runs" / "quickstart")
    result = CliRunner().invoke(app, ["run", str(recipe), "--out", out], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def room(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the house to work in, so that no page sees what another one did."""
    folder = tmp_path / "room"
    shutil.copytree(house, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.usefixtures("room")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_every_block_runs(page: Path) -> None:
    Reader(name_of(page)).read(page.read_text(encoding="utf-8"))
