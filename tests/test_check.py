"""What is said of a recipe before a run: estimates, power, and bad input."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from curvprune import run as runs
from curvprune.cli import app
from curvprune.run import RecipeError, load_recipe
from tests import tiny


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("tiny"))


def task_of(path: Path) -> runs.Task:
    return runs.prepare(load_recipe(path), None, progress=False).task


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seed: 0", "sead: 0", "sead", "seed"),
        ("model.layers.*", "model.layer.*", "model.layer.*", "model.layers.0"),
        ("group_size: 16}", "group_size: 20}", "group_size: 20", r"32 inputs"),
        ("certify: 16", "certify: 4000", None, "certify"),
        (
            "max_drop: 0.2",
            "max_bytes: 100",
            "max_bytes: 100",
            "budget.max_bytes: max_bytes: at least",
        ),
        (
            "seed: 0",
            'same_option: [["*.q_proj", "*.v_prj"]]',
            "same_option",
            "nearest layer: model.layers.1.self_attn.v_proj",
        ),
        ("device: cpu", "device: cuda:7", "device", "write auto or cpu"),
    ],
)
def test_bad_recipes_end_with_exit_code_two_and_a_line(recipe, tmp_path, old, new, line, message):
    text = recipe.read_text().replace(old, new)
    assert text != recipe.read_text()
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 2, result.output
    output = " ".join(result.output.split())
    assert message in output
    if line is not None:
        number = next(i for i, t in enumerate(text.splitlines(), 1) if line in t)
        assert f"bad.yaml:{number}:" in output
    assert not (tmp_path / "out" / "state" / "solved").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_text_that_the_model_cannot_read_is_bad_input(recipe, tmp_path, command):
    """Not a traceback with the exit code of a violated budget: the line of the data, before
    anything is computed."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    path, folder = tmp_path / "recipe.yaml", tmp_path / "model"
    source = re.search(r"path: ([^,}]+)", recipe.read_text())
    assert source is not None
    tokenizer = AutoTokenizer.from_pretrained(source[1])
    for words, positions, message in (
        (256, 16, "the model fails on an item of shape"),
        (40, 64, "has 40 rows"),
    ):
        config = GPT2Config(vocab_size=words, n_embd=16, n_head=2, n_layer=1, n_positions=positions)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        text = (
            recipe.read_text()
            .replace(source[1], str(folder))
            .replace("model.layers.*", "transformer.h.*")
        )
        text = text.replace("model.embed_tokens", "transformer.wte")
        path.write_text(text)
        arguments = [command, str(path)] + (
            ["--out", str(tmp_path / "out")] if command == "run" else []
        )
        result = CliRunner().invoke(app, arguments)
        line = 1 + text.splitlines().index("data:")
        assert result.exit_code == 2 and message in result.output.replace("\n", " ")
        assert f"{path.name}:{line}" in result.output.replace("\n", "")
        assert not (tmp_path / "out").exists()


def test_a_single_document_to_judge_by_is_bad_input(recipe, tmp_path):
    files = [tmp_path / f"{i}.txt" for i in range(4)]
    for i, file in enumerate(files):
        file.write_text(" ".join(f"Sentence {j} of {i} says {i * j % 97}." for j in range(100)))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        re.sub(r"files: \[.*\]", f"files: [{', '.join(map(str, files))}]", recipe.read_text())
    )
    with pytest.raises(RecipeError, match="split has items of 1 document only"):
        task_of(path)


def test_check_lists_layers_and_estimates(recipe):
    result = CliRunner().invoke(app, ["check", str(recipe)])
    assert result.exit_code == 0, result.output
    assert "15 layers to compress" in result.output and "estimated minutes" in result.output
    assert "estimated peak memory" in result.output


def test_check_tells_whether_the_certify_split_can_decide(recipe, tmp_path):
    enough = runs.check(recipe)
    assert (
        enough.power is not None
        and enough.power.items == 16
        and enough.power.chance > 0.8
        and not enough.warnings
    )
    assert enough.power.disagreement is None and enough.power.needed <= 16
    path = tmp_path / "strict.yaml"
    path.write_text(recipe.read_text().replace("max_drop: 0.2", "max_drop: 0.0005"))
    strict = runs.check(path)
    assert strict.power is not None and strict.power.chance < 0.5 and strict.power.needed > 16
    assert f"write certify: {strict.power.needed} or more" in strict.warnings[0]
    shown = CliRunner().invoke(app, ["check", str(path)])
    assert shown.exit_code == 0 and "is unlikely to decide max_drop: 0.0005" in shown.output
    path.write_text(
        recipe.read_text().replace("{metric: loss, max_drop: 0.2}", "{max_bytes: 100000000}")
    )
    assert runs.check(path).power is None


@pytest.mark.parametrize(
    ("portable", "group_size", "complaint"),
    [
        (
            "engines",
            32,
            "option int3-g32-asym: vLLM 0.32.0 runs 3 bits with zero points only on NVIDIA GPUs "
            "(Humming, which must be installed, compute capability 7.5 and later); target: vllm "
            "keeps to what runs on CPUs and GPUs: 4 bits; nearest: 4",
        ),
        (
            "true",
            24,
            "group_size=24 does not divide its 32 inputs, and transformers cannot read a shorter "
            "last group",
        ),
        ("false", 24, None),
    ],
)
def test_check_refuses_what_the_readers_of_the_artifact_cannot_read(
    recipe, tmp_path, portable, group_size, complaint
):
    path, text = (
        tmp_path / "recipe.yaml",
        recipe.read_text().replace("bits: 2, group_size: 16", "bits: 4"),
    )
    path.write_text(
        text.replace("group_size: 16", f"group_size: {group_size}") + f"portable: {portable}\n"
    )
    result = CliRunner().invoke(app, ["check", str(path)])
    output = " ".join(result.output.split())
    if complaint is None:
        assert result.exit_code == 0 and f"int3-g{group_size}-asym" in output
    else:
        where = "recipe.yaml:15: compress[0].options[1]: layer model.layers.0.self_attn.q_proj"
        assert result.exit_code == 2 and f"{where}: {complaint}" in output
