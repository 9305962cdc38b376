"""Runs of a recipe that recover: what is certified, reused, resumed, and left out."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curvprune.compression import Training
from curvprune.run import RecipeError, RecoverSection
from curvprune.run import pipeline as pipeline
from curvprune.run import stages as stages
from tests import tiny


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tiny.write_recipe(tmp_path_factory.mktemp("tiny"))
    path.write_text(path.read_text() + "recover: {steps: 20, lr: 0.01, every: 5, codes: true}\n")
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> pipeline.RunResult:
    return pipeline.run(recipe, tmp_path_factory.mktemp("run") / "out", progress=False)


def files(folder: Path) -> dict[str, bytes]:
    names = [folder / "plan.json", folder / "verdict.json", *sorted((folder / "model").rglob("*"))]
    return {str(f.relative_to(folder)): f.read_bytes() for f in names}


def test_items_to_recover_on_are_trained_on(recipe, tmp_path, monkeypatch):
    def taken(_model, _solved, _baseline, _objective, items, *_arguments, **_named):
        raise InterruptedError(items.train.sha256())

    monkeypatch.setattr(stages, "recover_", taken)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.read_text().replace("  certify: 16\n", "  certify: 16\n  recover: 6\n"))
    job, _ = pipeline.prepare(pipeline.load_recipe(path), None, progress=False)
    with pytest.raises(InterruptedError, match=job.splits.recover.sha256()):
        pipeline.run(path, tmp_path / "out", progress=False)


def test_a_run_recovers_before_it_certifies(recipe, finished):
    record = finished.record
    recovered = record["recoveries"]
    assert recovered and all(
        r["loss_after"] <= r["loss_before"] and r["flipped"] > 0 for r in recovered
    )
    names = {t["name"]: t for t in record["trials"]}
    for entry in recovered:
        before, after = names[f"{entry['plan']}, applied"], names[f"{entry['plan']}, recovered"]
        assert after["measured"] < before["measured"]
        start = (
            names[entry["plan"]] if before["note"] else before
        )  # its candidates, where those did better
        gained = entry["loss_before"] - entry["loss_after"]
        assert start["measured"] - after["measured"] == pytest.approx(gained, abs=1e-6)
    assert record["attempts"][0]["plan"].endswith(", recovered")
    # The verdict is that of the folder, by transformers' own loss.
    from transformers import AutoModelForCausalLM

    job, _ = pipeline.prepare(pipeline.load_recipe(recipe), None, progress=False)
    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model").eval()
    total = count = 0.0
    for item in job.splits.certify.items:
        with torch.no_grad():
            ids = item["input_ids"]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert record["measured"]["compressed"] == pytest.approx(total / count, abs=1e-5)
    html = (finished.folder / "report.html").read_text()
    assert 'id="t-recoveries"' in html and "Recovery" in html


def test_an_interrupted_recovery_starts_again_and_nothing_before_it_does(
    recipe, finished, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def killed(*arguments, advance, **named):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            stages.recover_ = killed
            pipeline.run(recipe, out, progress=False)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    casts = "model.embed_tokens"  # stored as a rule: reading it is solving it
    first = len(list((out / "state").rglob("*.json")))
    real, again = stages.solve_layer, []
    monkeypatch.setattr(
        stages, "solve_layer", lambda layer, *a: again.append(layer.name) or real(layer, *a)
    )
    monkeypatch.setattr(stages, "fisher_pass", count_calls(stages.fisher_pass, passes := []))
    result = pipeline.run(recipe, out, progress=False)
    assert first > 20 and files(out) == files(finished.folder)
    assert result.record["verdict"] == finished.record["verdict"]
    plans = len(finished.record["recoveries"])
    assert len([n for n in again if n != casts]) <= 14 * (plans - 1), (
        "the first plan's layers were solved already"
    )
    assert len(passes) == 1  # read from the totals
    trained = []
    monkeypatch.setattr(stages, "recover_", lambda *a, **k: trained.append(1))
    (out / "report.json").unlink()
    assert (
        pipeline.run(recipe, out, progress=False).record["recoveries"]
        == result.record["recoveries"]
    )
    assert not trained and files(out) == files(finished.folder)


def weights(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (folder / "model").glob("*.safetensors")}


@pytest.mark.parametrize("candidates", [False, True])
def test_another_budget_knows_what_was_recovered(recipe, tmp_path, monkeypatch, candidates):
    """Plans of the run that is reused are candidates again, as they were, and are not made
    again."""
    select_plans, seen = pipeline.select_plans, []

    def selected(job, found):  # whether the candidates or the sequential pass are recovered
        bench, best = select_plans(job, found)
        for trial in bench.trials:
            trial["metric_drop"] += -1.0 if candidates else 1.0
            trial["expected"] *= 3  # as if prices had been corrected since
        if seen:  # a run for another budget may not have measured the same plans
            bench.trials.clear()
        return bench, best

    monkeypatch.setattr(pipeline, "select_plans", selected)
    monkeypatch.setattr(stages, "next_plan", lambda job, tried: seen.append(tried))
    text = recipe.read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    first = pipeline.run(recipe, tmp_path / "first", progress=False)
    assert (
        bool([t for t in first.record["trials"] if "candidates, which were kept" in t["note"]])
        == candidates
    )
    monkeypatch.setattr(stages, "recover_", None)  # would fail
    wider = tmp_path / "wider.yaml"
    wider.write_text(text.replace("max_drop: 0.2", "max_drop: 0.9"))
    again = pipeline.run(wider, tmp_path / "again", progress=False, reuse=first.folder)
    assert weights(again.folder) == weights(first.folder)
    assert [a["plan"] for a in again.record["attempts"]] == ["earlier plan 1, recovered"]
    assert again.record["verdict"]["drop"] == first.record["verdict"]["drop"]
    assert any(
        "recovered by the reused run were candidates" in note for note in again.record["notes"]
    )
    for tried in seen:
        assert tried[0].record["name"].endswith(", recovered")
        assert tried[0].before["name"].endswith(", applied") != candidates, "what was recovered"
        assert tried[0].before["expected"] == tried[0].record["expected"], "by the same prices"
    assert len(seen) == 2
    written = json.loads((again.folder / "model" / "curvprune.json").read_text())["plan"]
    assert any(
        "recovered by the reused run were candidates" in note for note in written["notes"]
    ), "written anew"
    third = pipeline.run(recipe, tmp_path / "third", progress=False, reuse=again.folder)
    assert weights(third.folder) == weights(first.folder), "also from a run that has reused"
    (again.folder / "report.json").unlink()
    assert (
        pipeline.run(wider, again.folder, progress=False).record["attempts"]
        == again.record["attempts"]
    )


def test_an_earlier_plan_that_is_not_safe_is_followed_by_a_more_cautious_one(
    recipe, finished, tmp_path, monkeypatch
):
    """The best plan, which the earlier run has recovered, is not applied a second time."""
    monkeypatch.setattr(stages, "SAFE", 1.1)
    asked: list[float] = []
    monkeypatch.setattr(stages, "_more_cautious", lambda job, record: asked.append(record["bytes"]))
    path = tmp_path / "again.yaml"
    path.write_text(recipe.read_text().replace("title: Tiny", "title: Again"))
    result = pipeline.run(path, tmp_path / "out", progress=False, reuse=finished.folder)
    applied = [t for t in result.record["trials"] if t["name"].endswith(", recovered")]
    assert [t["name"] for t in applied] == ["earlier plan 1, recovered"] and asked == [
        applied[0]["bytes"]
    ]


@pytest.mark.parametrize("other", ["steps", "items"])
def test_what_another_recovery_made_is_not_taken(recipe, finished, tmp_path, monkeypatch, other):
    path = recipe
    if other == "steps":
        path = tmp_path / "shorter.yaml"
        path.write_text(recipe.read_text().replace("steps: 20", "steps: 10"))
    else:
        dealt = pipeline._load_data
        monkeypatch.setattr(
            pipeline, "_load_data", lambda *a: replace(s := dealt(*a), recover=s.price)
        )
    fresh = pipeline.run(path, tmp_path / "fresh", progress=False)
    assert files(fresh.folder) != files(finished.folder)
    source = shutil.copytree(finished.folder, tmp_path / "source")
    plans = [{layer["name"]: layer["option"] for layer in finished.record["layers"]}]
    (source / "state" / stages.EARLIER).write_text(json.dumps(plans))  # as if it had reused one
    reused = pipeline.run(path, tmp_path / "reused", progress=False, reuse=source)
    assert (
        files(reused.folder) == files(fresh.folder)
        and not (reused.folder / "state" / stages.EARLIER).exists()
    )
    assert next(s for s in reused.record["stages"] if s["name"] == "solve options")["resumed"]


def test_earlier_plans_that_do_not_fit_are_left_out(recipe, tmp_path):
    tight, wide = tmp_path / "tight.yaml", tmp_path / "wide.yaml"
    tight.write_text(recipe.read_text().replace("max_drop: 0.2", "max_drop: 0.03"))
    first = pipeline.run(tight, tmp_path / "first", progress=False)
    job, _ = pipeline.prepare(pipeline.load_recipe(tight), None, progress=False)
    choices = {layer["name"]: layer["option"] for layer in first.record["layers"]}
    used = job.bytes_of(choices) + job.within["fixed_bytes"] - job.fixed_bytes  # with the header
    assert used > job.smallest_bytes()
    for limit, known in ((used, True), (used - 1, False)):
        wide.write_text(
            recipe.read_text().replace("max_drop: 0.2", f"max_drop: 0.9, max_bytes: {limit}")
        )
        result = pipeline.run(wide, tmp_path / f"{known}", progress=False, reuse=first.folder)
        assert (
            any(t["name"] == "earlier plan 1, recovered" for t in result.record["trials"]) == known
        )
        assert result.record["attempts"][0]["status"] == "CERTIFIED"


def count_calls(function, calls):
    def counted(*arguments, **named):
        calls.append(named.get("resume"))
        return function(*arguments, **named)

    return counted


def test_a_recipe_without_a_budget_recovers_the_one_plan(recipe, tmp_path):
    text = recipe.read_text().replace("budget: {metric: loss, max_drop: 0.2}", "")
    for one in ("bits: 3, group_size: 16, symmetric: false", "bits: 8"):
        text = text.replace(f"      - quantize: {{{one}}}\n", "")
    path = tmp_path / "plain.yaml"
    path.write_text(text)
    result = pipeline.run(path, tmp_path / "out", progress=False)
    (found,) = result.record["recoveries"]
    assert found["best_step"] > 0 and result.record["measured"]["items"] == 16


def test_check_names_the_cost_and_the_section_agrees_with_the_code(recipe):
    assert pipeline.check(recipe).minutes["recover"] > 0
    section = RecoverSection().model_dump()
    assert Training(**section) == Training()
    assert Training(**RecoverSection(seconds=5.0).model_dump()) == Training(seconds=5.0)


@pytest.mark.parametrize(
    "line, key, message",
    [
        (
            "recover: {steps: 0}",
            "recover.steps",
            "expected steps of the optimizer, a whole number of at least 1",
        ),
        ("recover: {rate: 0.1}", "recover.rate", "unknown key"),
        ("recover: {loss: kl}", "recover.loss", "not offered"),
        ("objective: label-free\nrecover: {loss: task}", "recover.loss", "write distill"),
    ],
)
def test_a_wrong_section_is_one_message_with_its_line(
    recipe, tmp_path, line, key, message, monkeypatch
):
    text = recipe.read_text()
    start = text.index("recover:")
    path = tmp_path / "wrong.yaml"
    path.write_text(text[:start] + line + "\n")
    number = path.read_text().count("\n", 0, path.read_text().index("recover:")) + 1
    with pytest.raises(RecipeError, match=message) as caught:
        pipeline.run(path, tmp_path / "out", progress=False)
    assert str(caught.value).startswith(f"{path}:{number}: {key}")
