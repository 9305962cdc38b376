"""The command line: its options, how layers are listed, what `clean` removes and refuses."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import curvprune
from curvprune.cli import app
from curvprune.run import LayerRow, clean, joined_names, layer_lines
from tests import tiny


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"curvprune {curvprune.__version__}\n"


def test_help_names_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "2 bad input" in shown
    for command in ("run", "analyze", "check", "report", "clean", "export"):
        assert f"│ {command} " in shown


# ------------------------------------------------------------ layers that are alike


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.0.q", "a.1.q", "a.2.q"], {"a.0–2.q": 3}),
        (["a.0.q", "a.2.q", "a.3.q", "a.5.q"], {"a.0, 2–3, 5.q": 4}),
        (["a.10.q", "a.9.q"], {"a.9–10.q": 2}),
        (["a.7.q"], {"a.7.q": 1}),
        (["a.0.q", "b.0.q", "a.1.q"], {"a.0–1.q": 2, "b.0.q": 1}),
        (["0", "1", "head"], {"0–1": 2, "head": 1}),
        (["a.q1", "a.q2"], {"a.q1": 1, "a.q2": 1}),
        (["a.0", "a.0.0"], {"a.0": 1, "a.0.0": 1}),
        # Experts, all of them in every block, and then one fewer in the second.
        (["h.0.e.0", "h.0.e.1", "h.1.e.0", "h.1.e.1"], {"h.0–1.e.0–1": 4}),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0"], {"h.0.e.0–1": 2, "h.1.e.0": 1}),
        ([], {}),
    ],
)
def test_names_that_differ_in_numbers_are_one(names: list[str], joined: dict[str, int]) -> None:
    found = joined_names(names)
    assert {text: len(members) for text, members in found.items()} == joined
    assert sorted(itertools.chain(*found.values())) == sorted(names)


def row(
    name: str, *options: str, shape: tuple[int, int] = (8, 8), kind: str = "linear"
) -> LayerRow:
    return LayerRow(name=name, kind=kind, shape=shape, options=options)


def test_a_line_holds_layers_of_one_shape_kind_and_choice() -> None:
    rows = [
        row("embed", "float16", kind="embedding"),
        *(row(f"h.{block}.q", "int4", "keep") for block in range(3)),
        *(row(f"h.{block}.up", "int4", "keep", shape=(16, 8)) for block in range(3)),
        row("h.3.q", "int8"),
        row("h.4.q", "int4", "keep"),
    ]
    lines = layer_lines(rows)
    assert [(line.names, line.count) for line in lines] == [
        ("embed", 1),
        ("h.0–2, 4.q", 4),
        ("h.0–2.up", 3),
        ("h.3.q", 1),
    ]
    assert lines[1].options == ("int4", "keep") and lines[2].shape == (16, 8)
    assert sum(line.count for line in lines) == len(rows)


def test_check_lists_layers_that_are_alike_once_and_cuts_no_name(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path)
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert result.exit_code == 0, result.output
    assert "15 layers to compress, 0 kept" in result.output
    # A name that is too wide for its column goes on below.
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    names = "".join(cells[1].strip() for cells in rows)
    for part in ("self_attn.q_proj", "mlp.down_proj", "mlp.gate_proj"):
        assert names.count(f"model.layers.0–1.{part}") == 1
    assert "…" not in result.output
    counts = [int(cells[2]) for cells in rows if cells[2].strip()]
    assert sorted(counts) == [1, 2, 2, 2, 2, 2, 2, 2]


def test_check_joins_the_names_of_what_is_kept(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path)
    text = recipe.read_text().replace('"model.layers.*"', '"*.mlp.*_proj"')
    recipe.write_text(text.replace("layers: model.embed_tokens", 'layers: "*.q_proj"'))
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert result.exit_code == 0, result.output
    kept = next(line for line in result.output.splitlines() if line.startswith("kept"))
    assert kept == (
        "kept as they are: model.embed_tokens; model.layers.0–1.self_attn.k_proj (2); "
        "model.layers.0–1.self_attn.v_proj (2); model.layers.0–1.self_attn.o_proj (2)"
    )


def test_analyze_lists_the_layers_that_matter_most(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "analyze: {matrix: ggn, items: 2, spectra: false}\n")
    arguments = ["analyze", str(recipe), "--out", str(tmp_path / "out"), "--quiet"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    title = "trace per layer, nats/token: the 15 largest per weight"
    assert title in " ".join(result.output.split())
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    values = [float(cells[4]) for cells in rows if cells[4].strip()]
    assert len(values) == 15 and values == sorted(values, reverse=True)
    assert all(math.isfinite(value) and value > 0 for value in values)


# ------------------------------------------------------------ clean


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """The folder of a run that has ended, as far as `clean` is concerned."""
    folder = tmp_path / "out"
    (folder / "state" / "solved").mkdir(parents=True)
    (folder / "state" / "inputs.json").write_text("{}")
    (folder / "state" / "solved" / "0.safetensors").write_bytes(b"x" * 5000)
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"y" * 300)
    (folder / "recipe.lock.yaml").write_text("title: x\n")
    (folder / "report.html").write_text("<html>")
    return folder


def test_clean_removes_the_state_alone_and_says_how_much_that_was(a_run: Path) -> None:
    result = CliRunner().invoke(app, ["clean", str(a_run)])
    assert result.exit_code == 0 and result.output == "5,002 bytes freed\n"
    left = sorted(path.relative_to(a_run).as_posix() for path in a_run.rglob("*"))
    assert left == ["model", "model/model.safetensors", "recipe.lock.yaml", "report.html"]
    assert clean(a_run) == 0


def test_clean_takes_a_run_that_has_begun(a_run: Path) -> None:
    (a_run / "recipe.lock.yaml").unlink()
    assert clean(a_run) == 5002


def test_files_that_another_run_shares_free_nothing(a_run: Path, tmp_path: Path) -> None:
    os.link(a_run / "state" / "solved" / "0.safetensors", tmp_path / "shared.safetensors")
    assert clean(a_run) == 2
    assert (tmp_path / "shared.safetensors").stat().st_size == 5000


def test_clean_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "precious.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "state", tmp_path / "nowhere"):
        result = CliRunner().invoke(app, ["clean", str(folder)])
        assert result.exit_code == 2
        assert "is not the folder of a run" in " ".join(result.output.split())
    assert (tmp_path / "state" / "precious.txt").read_text() == "mine"


def test_clean_follows_no_link(a_run: Path, tmp_path: Path) -> None:
    (a_run / "state").rename(tmp_path / "elsewhere")
    (a_run / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link to another folder"):
        clean(a_run)
    assert (tmp_path / "elsewhere" / "solved" / "0.safetensors").exists()
