"""Recipes that remove hidden units first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import curvprune as cp
from curvprune import run as runs
from curvprune.artifact import tensor_names
from curvprune.cli import app
from curvprune.model import evaluate
from curvprune.run import RecipeError, load_recipe
from tests import tiny
from tests.tiny import contents


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return tiny.write_recipe(tmp_path_factory.mktemp("tiny"))


def task_of(path: Path) -> runs.Task:
    return runs.prepare(load_recipe(path), None, progress=False).task


def with_structured(recipe: Path, folder: Path, section: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe.read_text() + f"structured: {section}\n")
    return path


@pytest.fixture(scope="module")
def smaller(recipe, tmp_path_factory) -> tuple[Path, runs.RunResult]:
    pytest.importorskip("torch_pruning")
    folder = tmp_path_factory.mktemp("smaller")
    path = with_structured(recipe, folder, "{share: {mlp: 0.34}, uniform: true, round_to: 16}")
    path.write_text(path.read_text().replace("max_drop: 0.2", "max_drop: 0.6"))
    return path, runs.run(path, folder / "out", progress=False)


def test_units_are_removed_first_and_the_verdict_is_against_the_original(smaller, recipe):
    from transformers import AutoModelForCausalLM

    path, result = smaller
    record, folder = result.record, result.folder
    theirs = AutoModelForCausalLM.from_pretrained(
        folder / "model"
    ).eval()  # one width: a plain config describes it
    assert (
        theirs.config.intermediate_size == 32
        and theirs.model.layers[0].mlp.up_proj.out_features == 32
    )
    assert {cut.left for cut in record.structured.cuts.values()} == {32}
    before, after = record.structured.parameters
    assert before - after == 2 * 3 * 16 * 32 and before == record.size.parameters
    # The drop, computed here from the two models and the certify split.
    task = task_of(path)
    losses = [
        sum(
            float(r.loss.sum())
            for r in [evaluate(m, task.splits.certify.batches(4), task.objective)]
        )
        for m in (task.model, theirs)
    ]
    count = float(evaluate(theirs, task.splits.certify.batches(4), task.objective).count.sum())
    assert record.verdict.drop == pytest.approx((losses[1] - losses[0]) / count, abs=1e-5)
    # What the units alone cost on select, and that a trial counts it too.
    smaller_model, select = (
        cp.load(folder / "state" / "structured" / "model"),
        task.splits.select.batches,
    )
    first, second = (evaluate(m, select(4), task.objective) for m in (task.model, smaller_model))
    alone = float((second.loss.sum() - first.loss.sum()) / first.count.sum())
    (note,) = (note for note in record.notes if "the removed units alone cost" in note)
    assert float(note.split("alone cost ")[1].split(" ")[0]) == pytest.approx(alone, rel=1e-3)
    for trial in record.trials:
        assert trial.drop == pytest.approx(trial.loss + alone, abs=1e-6)
    assert any("units of 2 cuts were removed first" in note for note in record.notes)
    # Prices are of the smaller model, and so are bytes.
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["bytes"] == sum(size for _, size in tensor_names(folder / "model").values())
    shapes = {entry["name"]: entry["shape"] for entry in plan["layers"]}
    assert shapes["model.layers.1.mlp.down_proj"] == [32, 32]


def test_a_killed_run_reads_the_smaller_model_again(smaller, tmp_path):
    path, result = smaller
    out = tmp_path / "out"
    for name in ("recipe.lock.yaml", "state/inputs.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(result.folder / name, out / name)
    shutil.copytree(result.folder / "state" / "structured", out / "state" / "structured")
    kept = sorted(f for f in (out / "state" / "structured").rglob("*") if f.is_file())
    before = [file.stat().st_mtime_ns for file in kept]
    again = runs.run(path, out, progress=False)
    assert [file.stat().st_mtime_ns for file in kept] == before, "removed a second time"
    assert contents(again.folder) == contents(result.folder)


def test_shapes_that_no_config_describes_are_stored_for_our_loader(recipe, tmp_path):
    """Without ``uniform``: the folder is not portable, whatever the recipe says, and the bytes are
    those on disk."""
    pytest.importorskip("torch_pruning")
    path = with_structured(recipe, tmp_path, "{share: 0.15, kinds: mlp, of: parameters}")
    text = path.read_text().replace(
        "budget: {metric: loss, max_drop: 0.2}", "budget: {max_bytes: 40000}"
    )
    path.write_text(text)
    result = runs.run(path, tmp_path / "out", progress=False)
    model = cp.load(result.folder / "model")
    widths = {m.mlp.up_proj.out_features for m in model.model.layers}
    plan = json.loads((result.folder / "plan.json").read_text())
    on_disk = tensor_names(result.folder / "model")
    assert widths != {48} and plan["bytes"] == sum(size for _, size in on_disk.values())
    foreign = (result.folder / "model" / "packed.safetensors").is_file()
    assert foreign == any(
        "from_pretrained does not: LlamaConfig" in note for note in result.record.notes
    )
    assert foreign or len(widths) == 1
    before, after = result.record.structured.parameters
    assert after <= 0.85 * before and sum(p.numel() for p in model.parameters()) == after


def test_units_for_a_latency_are_stored_with_what_was_measured(recipe, tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")

    def by_size(runs, enough):
        """A clock by which a parameter takes a microsecond."""
        return [1e-6 * sum(p.numel() for p in run.module.parameters()) for run in runs]

    monkeypatch.setattr("curvprune.structured.latency.seconds", by_size)
    path = with_structured(recipe, tmp_path, "{share: 0.15, kinds: mlp, of: latency, batch: 2}")
    text = path.read_text()
    path.write_text(text.replace("{metric: loss, max_drop: 0.2}", "{max_bytes: 40000}"))
    out = tmp_path / "out"
    result = runs.run(path, out, progress=False)
    removed = result.record.structured
    before, after = removed.latency_seconds
    assert (before, after) == pytest.approx([1e-6 * size for size in removed.parameters])
    assert after <= 0.85 * before
    assert any("latency of a batch of 2" in note for note in result.record.notes)
    # Started again with what was written, nothing is timed a second time: the true clock would say
    # something else.
    monkeypatch.undo()
    kept = tmp_path / "kept"
    for name in ("recipe.lock.yaml", "state/inputs.json"):
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).rename(kept / name)
    (out / "state" / "structured").rename(kept / "state" / "structured")
    shutil.rmtree(out)
    kept.rename(out)
    assert runs.run(path, out, progress=False).record.structured == removed


def test_without_labels_the_divergence_is_from_the_original(recipe, tmp_path):
    pytest.importorskip("torch_pruning")
    path = with_structured(recipe, tmp_path, "{share: {mlp: 0.34}, uniform: true, round_to: 16}")
    path.write_text(path.read_text() + "objective: label-free\n")
    verdict = runs.run(path, tmp_path / "out", progress=False).record.verdict
    assert verdict.baseline == pytest.approx(0, abs=1e-6) and verdict.drop > 1e-3


def test_units_are_removed_in_steps_that_the_offered_patterns_and_groups_fit(recipe, tmp_path):
    """The recipe offers groups of 16 inputs: without ``round_to`` widths are multiples of 16."""
    pytest.importorskip("torch_pruning")
    path = with_structured(recipe, tmp_path, "{share: 0.2, kinds: [mlp]}")
    assert "group_size: 16" in path.read_text()
    offered = runs.prepare(load_recipe(path), None, progress=False).offered
    assert {width % 16 for cut in offered.values() for width in cut.widths} == {0}


def test_check_lists_what_can_be_removed(recipe, tmp_path):
    pytest.importorskip("torch_pruning")
    path = with_structured(recipe, tmp_path, "{share: 0.2, kinds: [mlp]}")
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert (
        "units that can be removed first, mlp: 2 × 48 to 16 units" in output
        and "remove units" in output
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            "{share: 1.5}",
            r"recipe.yaml:\d+: structured.share: 1.5 is not valid; expected a number strictly",
        ),
        ("{share: {mlp: yes}}", r"recipe.yaml:\d+: structured.share.mlp: true is not valid"),
        (
            "{share: {mpl: 0.3}}",
            r"recipe.yaml:\d+: structured: structured: kinds \('mpl',\): expected some of",
        ),
        (
            "{share: 0.3, kinds: [channels]}",
            r"recipe.yaml:\d+: structured: no prunable channels in LlamaForCausalLM",
        ),
        (
            "{share: 0.99}",
            r"recipe.yaml:\d+: structured: structured=0.99: at most 0\.\d+ of the macs can be",
        ),
        (
            "{share: {mlp: 0.3}, of: latency}",
            r"recipe.yaml:\d+: structured: .* of='latency' needs one, such as 0.2",
        ),
        (
            "{share: 0.3, of: latency, batch: 0}",
            r"recipe.yaml:\d+: structured.batch: 0 is not valid; .*nearest: 1",
        ),
        (
            "{share: 0.3, kind: mlp}",
            r"recipe.yaml:\d+: structured.kind: unknown key; .*nearest: kinds",
        ),
        (
            "{share: {mlp: 0.3}, kinds: mlp}",
            r"recipe.yaml:\d+: structured.kinds: share names the kinds already",
        ),
        (
            "{kinds: mlp}",
            r"recipe.yaml:\d+: structured: share is missing; expected share: the share of the work",
        ),
        (
            "{share: 0.3, kinds: 3}",
            r"recipe.yaml:\d+: structured.kinds: 3 is not valid; expected some of mlp",
        ),
        (
            "{share: 0.3, round_to: 0}",
            r"recipe.yaml:\d+: structured.round_to: 0 is not valid; .*nearest: 1",
        ),
    ],
)
def test_bad_sections_are_refused_with_their_line(recipe, tmp_path, section, message):
    pytest.importorskip("torch_pruning")
    with pytest.raises(RecipeError, match=message):
        runs.check(with_structured(recipe, tmp_path, section))
