"""The scripts in benchmarks/ are not run here, but what they import must be there."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import curvprune as cp
from tests.tiny import byte_tokenizer, llama

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def imports(tree: ast.Module, package: str) -> list[tuple[str, str]]:
    """(module, name) of every ``from package... import name``, also inside functions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def defined(tree: ast.Module) -> set[str]:
    """The names that other scripts can import from this one."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {n.id for target in node.targets for n in ast.walk(target) if is_name(n)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse((FOLDER / f"{name}.py").read_text()) for name in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_what_the_packages_offer(script, trees):
    for module, name in imports(trees[script], "curvprune"):
        parts = module.split(".")
        assert len(parts) <= 2, f"{script}.py imports {module}: a module inside a package"
        face = importlib.import_module(module)
        offered = getattr(face, "__all__", dir(face))
        assert name in offered and not name.startswith("_"), f"{script}.py: {module} has no {name}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_use_verbs_that_exist(script, trees):
    for node in ast.walk(trees[script]):
        if isinstance(node, ast.Attribute) and is_name(node.value) and node.value.id == "cp":
            known = node.attr in cp.__all__ or node.attr == "__file__"
            assert known, f"{script}.py: curvprune has no {node.attr}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_from_each_other_what_is_there(script, trees):
    for module, name in imports(trees[script], "benchmarks"):
        known = SCRIPTS if module == "benchmarks" else defined(trees[module.split(".")[1]])
        assert name in known, f"{script}.py: {module} has no {name}"


def test_the_zoo_examines_an_architecture():
    command = [sys.executable, str(FOLDER / "zoo.py"), "--one", "gpt2", "--operations"]
    done = subprocess.run(
        [*command, "quantize", "read back"],
        env={**os.environ, "ZOO_LIMIT": "600"},  # busy machines: no time is judged here
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| causal-lm/gpt2 | text | ok | ok | – | – | – | – | – |" in done.stdout


# ---------------------------------------------------------------------------------------- rivals

CALIBRATED_ON = (
    *("macbeth", "lear", "othello", "romeo_and_juliet", "julius_caesar", "midsummer_nights_dream"),
    *("much_ado_about_nothing", "tempest"),
)
WINDOW = 512


def made_up_play(name: str) -> str:
    draws = np.random.default_rng(len(name) * 1000 + ord(name[0])).integers(0, 97, 1600)
    return "ACT I\n" + " ".join(f"{name} {number}" for number in draws)


@pytest.fixture
def stage(tmp_path, monkeypatch, capsys):
    """What `rivals.py` needs: a model, texts and an empty cache. Returns how to run it."""
    from benchmarks import rivals

    model, texts = tmp_path / "model", tmp_path / "texts"
    llama(layers=4).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    texts.mkdir()
    for name in (*CALIBRATED_ON, "hamlet", "cymbeline"):
        (texts / f"{name}_gut.txt").write_text(made_up_play(name))
    monkeypatch.setenv("BENCH_SMOLLM2", str(model))
    monkeypatch.setenv("BENCH_TEXTS", str(texts))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    for name in ("MODELOPT_PYTHON", "DTYPE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> str:
        rivals.main([*arguments, "--grid", "channel", "--draws", "0"])
        return capsys.readouterr().out

    return run


def measured(tmp_path) -> list[dict]:
    (path,) = (tmp_path / "cache").glob("*/channel/results-float32.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_probabilities(model, windows):
    with torch.no_grad():
        return model(windows).logits[:, :-1].double().log_softmax(-1)


def test_rivals_measures_what_ships(stage, tmp_path):
    table = stage("uniform", "modelopt")
    assert "modelopt is left out: set MODELOPT_PYTHON" in table
    # The same model by hand: the beginning and the middle of each play, rounded, written and read.
    dense = llama(layers=4)
    halves = [(len(made_up_play(name)) - WINDOW) // 2 for name in CALIBRATED_ON]
    items = []
    for start in (0, 1):
        for name, half in zip(CALIBRATED_ON, halves, strict=True):
            text = made_up_play(name)[start * half :][:WINDOW]
            items.append({"input_ids": torch.tensor([byte_tokenizer()(text)["input_ids"]])})
    rounded = cp.quantize(dense, items, bits=4, layers="model.layers.*")
    read = cp.load(rounded.save(tmp_path / "rounded"))
    (found,) = measured(tmp_path)
    for name in ("hamlet", "cymbeline"):
        tokens = byte_tokenizer()(made_up_play(name)[:8192], return_tensors="pt")["input_ids"]
        windows = tokens.view(-1, WINDOW)
        before, after = (log_probabilities(model, windows) for model in (dense, read))
        nats = -after.gather(2, windows[:, 1:, None]).mean((1, 2))
        kl = (before.exp() * (before - after)).sum(2).mean(1)
        np.testing.assert_allclose(found["nats"][name], nats, atol=1e-5)
        np.testing.assert_allclose(found["kl"][name], kl, atol=1e-5)
        assert found["kl"][name][0] > 1e-4
    assert f"| {np.mean(list(found['kl'].values())):.4f} |" in table


def test_rivals_goes_on_where_it_stopped(stage, tmp_path):
    stage("uniform", "edges")
    first, second = measured(tmp_path)
    assert first["plan"] == "uniform" and second["plan"] == "edges"
    assert second["bytes"] <= first["bytes"]
    # The same plan under another name is not applied again; a new one is.
    layers = [name for name in llama(layers=4).state_dict() if "proj" in name]
    same = dict.fromkeys((name.removesuffix(".weight") for name in layers), "int4-pc-sym")
    wider = same | {"model.layers.0.mlp.down_proj": "int5-pc-sym"}
    (tmp_path / "plans.json").write_text(json.dumps({"same": same, "wider": wider}))
    table = stage("uniform", "--file", str(tmp_path / "plans.json"))
    *before, last = measured(tmp_path)
    assert before == [first, second] and last["plan"] == "wider"
    assert "| 4 | same | uniform | +0.0000 ± 0.0000 |" in table
    more = [np.subtract(last["kl"][name], first["kl"][name]) for name in ("hamlet", "cymbeline")]
    both = np.concatenate(more)
    error = both.std(ddof=1) / np.sqrt(len(both))
    assert f"| {both.mean():+.4f} ± {error:.4f} | 1 |" in table


def test_rivals_errors_are_those_over_draws():
    from benchmarks.rival_results import Applied, less

    def applied(draw, nats):
        of_plays = {"hamlet": nats[:2], "cymbeline": nats[2:]}
        told = {"plan": "", "size": 3, "key": "", "bytes": 1, "seconds": 0.0}
        return Applied(draw=draw, nats=of_plays, kl=of_plays, **told)

    base = [applied(draw, [3.0, 4.0, 5.0, 6.0]) for draw in (0, 1, 2)]
    own = [
        applied(0, [3.1, 4.0, 5.0, 6.1]),  # by 0.05 more
        applied(1, [3.0, 4.0, 5.1, 6.3]),  # by 0.10
        applied(2, [2.9, 4.1, 5.3, 6.3]),  # by 0.15
    ]
    pairs = list(zip(own, base, strict=True))
    # Differences of draws 0.05, 0.10, 0.15: mean 0.1, error 0.05 / √3.
    assert less(pairs, "nats", ["hamlet", "cymbeline"]) == "+0.1000 ± 0.0289"
    # One draw: windows 0.1, 0, 0, 0.1, error 0.0577 / √4.
    assert less(pairs[:1], "kl", ["hamlet", "cymbeline"]) == "+0.0500 ± 0.0289"
    assert less(pairs[:1], "nats", ["cymbeline"]) == "+0.0500 ± 0.0500"
