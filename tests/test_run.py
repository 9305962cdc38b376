"""Whole runs of a small recipe: results, budgets, reuse, and their reports."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import curvprune as cp
from curvprune import run as runs
from curvprune.artifact import WEIGHTS, tensor_names
from curvprune.cli import app
from curvprune.run import RecipeError, load_recipe
from tests import tiny
from tests.tiny import contents


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> runs.RunResult:
    return runs.run(recipe, tmp_path_factory.mktemp("run") / "out", progress=False)


def task_of(path: Path) -> runs.Task:
    return runs.prepare(load_recipe(path), None, progress=False).task


def test_a_run_leaves_its_files_and_a_certified_smaller_model(finished):
    folder, record = finished.folder, finished.record
    assert finished.exit_code == 0 and record.verdict.status == "CERTIFIED"
    assert record.verdict.bound <= 0.2
    for name in (
        "recipe.lock.yaml",
        "ledger.json",
        "plan.json",
        "verdict.json",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    # Traces and diagonals come of quadratic prices alone.
    assert not (folder / "analysis.json").exists() and record.ledger.prices == "shares"
    on_disk = (folder / "model" / WEIGHTS).stat().st_size
    assert record.size.after_bytes == on_disk < record.size.before_bytes
    intermediate = [f for f in (folder / "state").rglob("*") if f.is_file()]
    assert 0 < record.state_bytes <= sum(f.stat().st_size for f in intermediate)
    plan = json.loads((folder / "plan.json").read_text())
    stored = sum(size for _, size in tensor_names(folder / "model").values())
    assert plan["bytes"] == stored
    assert {entry["name"] for entry in plan["layers"]} == set(plan["choices"])
    assert all(entry["reason"] for entry in plan["layers"])
    kinds = {trial.kind for trial in record.trials}
    assert kinds == {"plan", "control", "applied"}
    assert "<script" not in record.title and "CERTIFIED" in finished.summary


def test_the_verdict_is_the_loss_of_the_saved_model(recipe, finished):
    """Both losses again, with transformers' own loss on the certify split, weighted by tokens."""
    from transformers import AutoModelForCausalLM

    task = task_of(recipe)
    verdict = json.loads((finished.folder / "verdict.json").read_text())
    for source, key in (
        (finished.folder / "model", "compressed"),
        (recipe.parent / "tiny", "baseline"),
    ):
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        total = count = 0.0
        for item in task.splits.certify.items:
            with torch.no_grad():
                loss = model(input_ids=item["input_ids"], labels=item["input_ids"]).loss
            total += float(loss) * (item["input_ids"].shape[1] - 1)
            count += item["input_ids"].shape[1] - 1
        assert verdict[key] == pytest.approx(total / count, abs=1e-5)


def test_the_items_on_record_are_those_of_the_verdict(recipe, finished):
    """Their weighted mean is the verdict's drop, and each is transformers' own loss of that
    item."""
    from transformers import AutoModelForCausalLM

    verdict = finished.record.verdict
    items = json.loads((finished.folder / "report.json").read_text())["items"]
    columns = list(zip(*(items[k] for k in ("count", "before", "after")), strict=True))
    tokens = sum(count for count, _, _ in columns)
    drop = sum(count * (after - before) for count, before, after in columns) / tokens
    assert drop == pytest.approx(verdict.drop, abs=1e-8)
    assert len(columns) == verdict.items and items["right_before"] is None
    certify = task_of(recipe).splits.certify
    assert [items["documents"][k] for k in items["document"]] == list(certify.documents)
    assert items["index"] == list(range(len(certify.items)))
    assert len(set(items["documents"])) == len(items["documents"])
    for source, key in ((finished.folder / "model", "after"), (recipe.parent / "tiny", "before")):
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        for item, count, found in zip(certify.items, items["count"], items[key], strict=True):
            with torch.no_grad():
                expected = float(model(input_ids=item["input_ids"], labels=item["input_ids"]).loss)
            assert count == item["input_ids"].shape[1] - 1
            assert found == pytest.approx(expected, abs=1e-5)
    assert "Items that changed" in (finished.folder / "report.html").read_text()


def test_a_record_written_by_another_version_is_refused_in_one_sentence(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "out", ignore=shutil.ignore_patterns("state"))
    path = tmp_path / "out" / "report.json"
    record = json.loads(path.read_text())
    for text, message in (
        (json.dumps({"title": "Tiny"}), "was written by another version of curvprune"),
        (json.dumps(record | {"size": None}), "size"),
        ("{", "is damaged"),
    ):
        path.write_text(text)
        result = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
        output = " ".join(result.output.split())
        assert result.exit_code == 2 and message in output and "Traceback" not in output


def test_max_bytes_gives_the_best_model_of_that_size(recipe, tmp_path):
    text = recipe.read_text().replace(
        "budget: {metric: loss, max_drop: 0.2}", "budget: {max_bytes: 45000}"
    )
    path = tmp_path / "bytes.yaml"
    path.write_text(text)
    result = runs.run(path, tmp_path / "out", progress=False)
    assert result.exit_code == 0 and result.record.verdict is None
    assert (tmp_path / "out" / "model" / WEIGHTS).stat().st_size <= 45_000
    assert result.record.measured.compressed > 0


@pytest.mark.parametrize("budget", ["max_drop: 0.01", "max_bytes: 45000"])
def test_layers_that_serving_engines_fuse_get_the_same_option_everywhere(recipe, tmp_path, budget):
    path = tmp_path / "fused.yaml"
    path.write_text(recipe.read_text().replace("max_drop: 0.2", budget) + "same_option: fused\n")
    result = runs.run(path, tmp_path / "out", progress=False)
    shipped = json.loads((tmp_path / "out" / "plan.json").read_text())
    plans = [*(trial.choices for trial in result.record.trials), shipped["choices"]]
    blocks = [f"model.layers.{i}." for i in range(2)]
    groups = [[f"{b}self_attn.{x}_proj" for x in "qkv"] for b in blocks]
    groups += [[f"{b}mlp.{x}_proj" for x in ("gate", "up")] for b in blocks]
    assert len(plans) >= 4
    for choices in plans:
        assert all(len({choices[name] for name in group}) == 1 for group in groups), choices
    assert any(len(set(choices.values())) > 2 for choices in plans), (
        "uniform plans would share by themselves"
    )
    reasons = {entry["name"]: entry["reason"] for entry in shipped["layers"]}
    assert reasons[groups[0][0]].startswith("shared with k_proj, v_proj, together: int")
    assert "shared" not in reasons["model.layers.0.mlp.down_proj"]
    ledger = cp.Ledger.from_dict(json.loads((tmp_path / "out" / "ledger.json").read_text()))
    q, k, v = (ledger.layer_rows(name) for name in groups[0])
    own = shipped["choices"][groups[0][0]]
    other = next(word for word in reasons[groups[0][0]].split() if word.startswith("int"))
    difference = abs(sum(rows[own].bytes - rows[other].bytes for rows in (q, k, v)))
    assert f"{difference:,} bytes" in reasons[groups[0][0]]
    assert result.record.frontier


def test_another_budget_reuses_what_was_solved(recipe, finished, tmp_path):
    before = contents(finished.folder)
    other = tmp_path / "other.yaml"
    other.write_text(
        recipe.read_text()
        .replace("max_drop: 0.2", "max_drop: 0.05")
        .replace("title: Tiny", "title: Other")
    )
    fresh = runs.run(other, tmp_path / "fresh", progress=False)
    asked = ["--out", str(tmp_path / "out"), "--reuse", str(finished.folder), "--quiet"]
    result = CliRunner().invoke(app, ["run", str(other), *asked])
    assert result.exit_code == fresh.exit_code, result.output
    assert contents(tmp_path / "out") == contents(fresh.folder), "as if nothing had been reused"
    # The very files: what was measured is not measured again, nor is a round of prices.
    taken = 0
    for folder in ("rounds", "select"):
        for file in (finished.folder / "state" / folder).iterdir():
            assert file.samefile(tmp_path / "out" / "state" / folder / file.name)
            taken += 1
    assert taken > 4
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    stages = {stage["name"] for stage in record["stages"]}
    known = [trial.choices for trial in finished.record.trials]
    again = [t for t in record["trials"] if t["kind"] != "applied" and t["choices"] in known]
    assert again and not [t for t in again if f"solve {t['name']}" in stages]
    shutil.rmtree(tmp_path / "fresh")
    # Where no run beside it has asked another budget of the same items, of which it would tell.
    third = tmp_path / "elsewhere" / "third"
    again = runs.run(recipe, third, progress=False, reuse=tmp_path / "out")
    assert contents(again.folder) == before == contents(finished.folder), (
        "also from a run that has reused"
    )


@pytest.mark.parametrize("reused", [False, True])
def test_results_that_nothing_says_whose_they_are_are_not_taken(recipe, finished, tmp_path, reused):
    out = tmp_path / "out"
    shutil.copytree(finished.folder / "state", out / "state")
    (out / "state" / "inputs.json").unlink()
    with pytest.raises(RecipeError, match="results of an unknown run; delete it"):
        runs.run(recipe, out, progress=False, reuse=finished.folder if reused else None)
    shutil.rmtree(out / "state")
    (out / "state").mkdir()
    (out / "state" / ".inputs.json.tmp").write_text("{")  # killed before anything was written
    runs.run(recipe, out, progress=False, reuse=finished.folder if reused else None)
    assert contents(out) == contents(finished.folder)


def test_a_budget_with_limits_of_its_own_reuses_too(recipe, finished, tmp_path):
    task = task_of(recipe)
    table = {n: {o.key: 1.0 for o in options} for n, options in task.options.items()}
    (tmp_path / "table.json").write_text(json.dumps(table))
    limits = f"limits: [{{name: ms, most: 1000, table: {tmp_path / 'table.json'}}}]"
    path = tmp_path / "limited.yaml"
    path.write_text(recipe.read_text().replace("max_drop: 0.2}", f"max_drop: 0.2, {limits}}}"))
    result = runs.run(path, tmp_path / "out", progress=False, reuse=finished.folder)
    # A limit that binds nothing asks for the same plans: none is solved but what ships.
    names = {stage.name for stage in result.record.stages}
    assert not [name for name in names if name.startswith(("round ", "solve "))]
    runs.run(recipe, tmp_path / "back", progress=False, reuse=tmp_path / "out")
    assert contents(tmp_path / "back") == contents(finished.folder)


@pytest.mark.parametrize("texts", [16, 48])
def test_a_select_split_of_few_documents_is_told(recipe, tmp_path, texts):
    files = ", ".join(map(str, tiny.write_texts(tmp_path / "texts", texts)))
    path = tmp_path / "recipe.yaml"
    path.write_text(re.sub(r"files: \[.*\]", f"files: [{files}]", recipe.read_text()))
    task = task_of(path)
    documents = len(set(task.splits.select.documents))
    assert (documents < 8) == (texts == 16)
    told = [
        n
        for n in task.notes
        if n.startswith(f"the select split has items of {documents} documents only")
    ]
    assert len(told) == (texts == 16)


def test_items_set_aside_for_no_recovery_are_told(recipe, tmp_path):
    path = tmp_path / "aside.yaml"
    path.write_text(recipe.read_text().replace("  certify: 16\n", "  certify: 16\n  recover: 6\n"))
    task = task_of(path)
    assert task.splits.recover is not None and (items := len(task.splits.recover.items)) >= 6
    assert [n for n in task.notes if "set aside" in n] == [
        f"data: recover: {items} items are set aside and nothing trains on them: there is no "
        "recover section"
    ]


def test_a_run_that_does_not_fit_is_not_reused(recipe, finished, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="holds no run that has solved options"):
        runs.run(recipe, out, progress=False, reuse=tmp_path)
    for old, new, key in (
        ("bits: 2", "bits: 4", "compress"),
        ("price: 6", "price: 5", "data"),
        ("seed: 0", "seed: 1", "seed"),
    ):
        path = tmp_path / "changed.yaml"
        path.write_text(recipe.read_text().replace(old, new))
        with pytest.raises(
            RecipeError, match=f"{key} is not that of the run in .* may differ"
        ) as caught:
            runs.run(path, out, progress=False, reuse=finished.folder)
        assert caught.value.line == 1 + [
            line.split(":")[0] for line in path.read_text().splitlines()
        ].index(key)
    assert not out.exists()


def test_a_run_of_another_model_in_the_same_place_is_not_reused(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    first = runs.run(recipe, tmp_path / "first", progress=False)
    tiny.llama(seed=1).save_pretrained(tmp_path / "tiny")
    with pytest.raises(RecipeError, match="another model_sha256, whose results would not fit"):
        runs.run(recipe, tmp_path / "out", progress=False, reuse=first.folder)
    with pytest.raises(RecipeError, match="holds a run with another model_sha256"):
        shutil.rmtree(first.folder / "model")
        runs.run(recipe, first.folder, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_uniform_recipe_needs_no_budget(recipe, tmp_path):
    lines = [
        line
        for line in recipe.read_text().splitlines()
        if "bits: 2" not in line and "bits: 3" not in line
    ]
    path = tmp_path / "uniform.yaml"
    path.write_text("\n".join(line for line in lines if not line.startswith("budget")))
    result = runs.run(path, tmp_path / "out", progress=False)
    assert result.exit_code == 0 and result.record.ledger is None
    assert {layer.option for layer in result.record.layers} == {"int8-pc-sym", "float16"}
    assert abs(result.record.measured.drop) < 0.05


def test_a_violated_budget_exits_with_one(recipe, tmp_path):
    text = (
        recipe.read_text().replace("max_drop: 0.2", "max_drop: 1.0e-7") + "objective: label-free\n"
    )
    text = text.replace("      - quantize: {bits: 8}\n", "")
    path = tmp_path / "strict.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 1, result.output
    verdict = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert verdict["status"] == "VIOLATED" and verdict["bound"] > 1e-7 and verdict["baseline"] == 0
    assert (tmp_path / "out" / "model" / WEIGHTS).exists()


def test_the_report_can_be_rebuilt(finished):
    path = finished.folder / "report.html"
    before = path.read_text()
    path.unlink()
    result = CliRunner().invoke(app, ["report", str(finished.folder)])
    assert result.exit_code == 0 and path.read_text() == before
    missing = CliRunner().invoke(app, ["report", str(finished.folder / "nowhere")])
    assert missing.exit_code == 2 and "report.json" in missing.output


def test_two_runs_are_compared_on_their_items(recipe, finished, tmp_path):
    """The paired difference is that of the two verdicts, and its error that of the whole documents'
    differences."""
    other = tmp_path / "bytes.yaml"
    other.write_text(
        recipe.read_text().replace(
            "budget: {metric: loss, max_drop: 0.2}", "budget: {max_bytes: 45000}"
        )
    )
    there = runs.run(other, tmp_path / "there", progress=False).record
    here = tmp_path / "here"
    here.mkdir()
    shutil.copy(finished.folder / "report.json", here)
    text = runs.rebuild_report(here, against=tmp_path / "there").read_text()
    table = text.partition('id="t-paired"')[2].partition("</table>")[0]
    numbers = [float(v) for v in re.findall(r'data-v="([^"]+)"', table)]
    gap = finished.record.verdict.compressed - there.measured.compressed
    assert numbers[2] == pytest.approx(gap, abs=1e-7) and abs(gap) > 1e-4
    ours, theirs = finished.record.items, there.items
    count, document = np.array(ours.count, dtype=float), np.array(ours.document)
    difference = (np.array(ours.after) - np.array(theirs.after)) * count
    left_out = [  # the difference without each document
        difference[document != k].sum() / count[document != k].sum()
        for k in range(len(ours.documents))
    ]
    m = len(left_out)
    assert 1 < m < len(document) == 16
    error = np.sqrt((m - 1) / m * np.sum((np.array(left_out) - numbers[2]) ** 2))
    assert numbers[3] == pytest.approx(numbers[2] / error, rel=1e-5) and numbers[4:] == [16, m]


def test_a_run_never_overwrites_the_model_it_reads(recipe):
    source = recipe.parent / "tiny"
    before = {f.name: f.read_bytes() for f in source.iterdir()}
    for out in (source, recipe.parent):
        with pytest.raises(
            RecipeError, match=r"recipe\.yaml:2: model\.path: .*lies inside the run folder"
        ):
            runs.run(recipe, out, progress=False)
    assert {f.name: f.read_bytes() for f in source.iterdir()} == before


def test_models_that_must_not_be_compressed_are_refused(recipe, finished, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (recipe.parent / "tiny").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    cases = (
        (broken, "lacks 'model.layers.1.mlp.up_proj.weight'"),
        (finished.folder / "model", "already quantized"),
    )
    for source, message in cases:
        path = tmp_path / f"{source.name}.yaml"
        path.write_text(recipe.read_text().replace(str(recipe.parent / "tiny"), str(source)))
        result = CliRunner().invoke(
            app, ["run", str(path), "--out", str(tmp_path / "out"), "--quiet"]
        )
        assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_an_out_that_is_a_file_is_bad_input(recipe, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    result = CliRunner().invoke(
        app, ["run", str(recipe), "--out", str(tmp_path / "file"), "--quiet"]
    )
    assert result.exit_code == 2 and "error:" in result.output and "Traceback" not in result.output
