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
import typing
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
BLOCK = re.compile(
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$|^<!-- test-setup\n(?P<setup>.*?)^-->$", re.M | re.S
)
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


def blocks_of(page: str, name: str) -> list[Block]:
    found = []
    hidden = 0
    for match in BLOCK.finditer(page):
        part = "text" if match["setup"] is None else "setup"
        hidden += part == "setup"
        line = page.count("\n", 0, match.start(part)) + 1
        found.append(Block(match["language"] or "python", match[part], line))
    fences = len(re.findall(r"^\s*(```|~~~)", page, re.M))
    assert fences == 2 * (len(found) - hidden), f"{name}: a fence is indented or has no language"
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
        for block in blocks_of(page, self.name):
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
            pytest.fail(f"{place}: nothing runs a block of {block.language!r}")

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
    short = "analyze: {items: 1, max_products: 8, spectra: false}\n"
    recipe.write_text(made.read_text() + short)
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


# ------------------------------------------------------------------- what the reader above must see


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("```python\nraise RuntimeError\n```", id="a block that raises"),
        pytest.param("```python\nprint(1)\n```\n\n```text\none\n```", id="another output"),
        pytest.param("```text\n1\n```", id="output of nothing"),
        pytest.param("```sh\ncurvprune no-such-command\n```", id="an unknown command"),
        pytest.param("```sh\ncurvprune check missing.yaml\n```", id="a missing recipe"),
        pytest.param("```sh\nmake no-such-target\n```", id="an unknown target"),
        pytest.param("```sh\npip install somebody-elses\n```", id="an unknown package"),
        pytest.param("```sh\npip install '.[no-such-extra]'\n```", id="an unknown extra"),
        pytest.param("```sh\nls\n```", id="a line that nothing knows"),
        pytest.param("```sh\npython examples/missing.py\n```", id="a missing example"),
        pytest.param("```yaml\nbudget: {most: 1}\n```", id="an unknown key"),
        pytest.param("```json\n{\n```", id="broken JSON"),
        pytest.param("```toml\na = 1\n```", id="a language that nothing runs"),
        pytest.param("```\na\n```", id="no language"),
        pytest.param("- a\n\n  ```python\n  1 / 0\n  ```", id="an indented block"),
    ],
)
@pytest.mark.usefixtures("room")
def test_a_block_that_does_not_run_is_seen(page: str) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)):
        Reader("page").read(page)


@pytest.mark.usefixtures("room")
def test_a_page_is_read_in_order_in_one_namespace() -> None:
    page = """
<!-- test-setup
start = 2
-->

```python
x = start * 1.5
print("three is", x)
```

```text
three  is 3.25
```

```python
assert x == 3
```
"""
    reader = Reader("page")
    reader.read(page)
    assert reader.module.__dict__["x"] == 3


# --------------------------------------------------------------------------------------- links


def headings_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    anchors = set()
    for title in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M):
        anchors.add(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    return anchors


def links_of(page: Path) -> list[str]:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [target for target in LINK.findall(text) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in links_of(page):
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in headings_of(goal), f"{name_of(page)} links to {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links_of(page)]
    assert {*PAGES} <= reached


# --------------------------------------------------------------------------------- reference pages


def tables_of(page: str, heading: str) -> set[str]:
    """The first cells of the tables below a heading."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {*re.findall(r"^\| `([^`]+)`", section, re.M)}


def test_the_reference_names_every_key_of_a_recipe() -> None:
    page = (DOCS / "reference-recipe.md").read_text(encoding="utf-8")
    assert tables_of(page, "At the top") == {*Recipe.model_fields}
    for name, field in Recipe.model_fields.items():
        section = section_in(field.annotation)
        if section is not None:
            assert tables_of(page, f"`{name}`") >= {*section.model_fields}, name


def section_in(annotation: object) -> type[BaseModel] | None:
    """The section among what a key takes: itself, or an entry of its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [section_in(part) for part in typing.get_args(annotation)]
    return next((section for section in found if section is not None), None)


def test_the_reference_tells_the_defaults_of_a_recipe() -> None:
    page = (DOCS / "reference-recipe.md").read_text(encoding="utf-8")
    for name, field in Recipe.model_fields.items():
        section = section_in(field.annotation)
        for key, inner in ({} if section is None else section.model_fields).items():
            plain = inner.default
            if isinstance(plain, str | float | int) and not isinstance(plain, bool):
                part = page.split(f"\n## `{name}`\n")[1]
                row = re.search(rf"^\| `{key}` .*\| (.*) \|$", part, re.M)
                assert row is not None and str(plain) in row[1], f"{name}.{key}: {plain}"


def test_the_reference_names_every_command_and_option() -> None:
    page = (DOCS / "reference-cli.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        row = re.search(rf"^\| `{name} .*$", page, re.M)
        assert row is not None, name
        for parameter in command.params:
            for option in parameter.opts:
                assert not option.startswith("--") or option in row[0], f"{name} {option}"


def test_the_architecture_names_every_package() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    named = tables_of(page, "The house")
    assert {room for room in MAY_IMPORT if not room.startswith("__")} == named
    for file in re.findall(r"`(\w+/\w+\.py)`", page):
        assert (ROOT / "curvprune" / file).is_file(), file


def test_the_glossary_says_each_word_once() -> None:
    page = (DOCS / "glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^\| \*(\w+)\*", page, re.M)
    assert words == sorted(words) and len({*words}) == len(words)
    reserved = {"plan", "trial", "drop", "price", "unit", "measure", "group", "block", "item"}
    assert {*reserved, "document", "position"} <= {*words}
