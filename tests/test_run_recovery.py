"""Runs of a recipe that recover: what is certified, reused, resumed, and left out."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curvprune import run as runs
from curvprune.compression import RecoveryItems, Training, recover_
from curvprune.files import State
from curvprune.model import Split, find_layers
from curvprune.planning import cheapest
from curvprune.record import RunRecord, Trial
from curvprune.run import RecipeError, RecoverSection, load_recipe
from tests import tiny
from tests.to_recover import files, times, weights

RECOVER = "recover: {steps: 20, lr: 0.01, every: 5, codes: true}\n"
ONE = ("attempts: 2", "attempts: 1")
LABEL_FREE = "objective: label-free\n"  # a divergence: what a plan loses is never below zero
REUSED = "1 plan(s) recovered by the reused run were considered for this budget too"


def variant(source: Path, path: Path, *changes: tuple[str, str]) -> Path:
    """Another recipe on the same model and texts, every change of which finds its words."""
    text = source.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run(recipe: Path, out: Path, reuse: Path | None = None) -> runs.RunResult:
    return runs.run(recipe, out, progress=False, reuse=reuse)


def task_of(recipe: Path) -> runs.Task:
    return runs.prepare(load_recipe(recipe), None, progress=False).task


def named(record: RunRecord | runs.Shipped) -> dict[str, Trial]:
    trials = record.applied if isinstance(record, runs.Shipped) else record.trials
    return {trial.name: trial for trial in trials}


def recovered_in(record: RunRecord) -> list[str]:
    return [trial.name for trial in record.trials if trial.name.endswith(", recovered")]


def recovered_folders(folder: Path) -> set[str]:
    return {path.parent.name for path in (folder / "state" / "applied").glob("*/recovered.json")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tiny.write_recipe(tmp_path_factory.mktemp("tiny"))
    path.write_text(path.read_text() + RECOVER)
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> runs.RunResult:
    """One plan, recovered."""
    return run(recipe, tmp_path_factory.mktemp("run") / "out")


@pytest.fixture(scope="module")
def again(recipe, finished, tmp_path_factory) -> runs.RunResult:
    """A wider budget that has reused that run."""
    folder = tmp_path_factory.mktemp("again")
    wider = variant(recipe, folder / "wider.yaml", ("max_drop: 0.2", "max_drop: 0.9"))
    return run(wider, folder / "out", finished.folder)


@pytest.fixture(scope="module")
def label_free(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("label-free")
    return variant(recipe, folder / "recipe.yaml", (RECOVER, LABEL_FREE + RECOVER))


@pytest.fixture(scope="module")
def two(label_free) -> runs.RunResult:
    """Two plans, recovered."""
    return run(label_free, label_free.parent / "out")


# ------------------------------------------------------------------------------------- one run


def test_items_to_recover_on_are_trained_on(recipe, tmp_path):
    """The training losses on record are those of the same training on these items, and not of one
    on the calibration items."""
    path = variant(
        recipe,
        tmp_path / "recipe.yaml",
        ("  certify: 16\n", "  certify: 16\n  recover: 6\n"),
        ("budget: {metric: loss, max_drop: 0.2}", ""),
        ("      - quantize: {bits: 3, group_size: 16, symmetric: false}\n", ""),
        ("      - quantize: {bits: 8}\n", ""),
    )
    (found,) = run(path, tmp_path / "out").record.recoveries
    # The same model, not yet recovered.
    prepared = runs.prepare(load_recipe(path), State(tmp_path / "other"), progress=False)
    task, splits = prepared.task, prepared.task.splits
    choices = {name: options[0].key for name, options in task.options.items()}
    plain = runs.apply_and_measure(replace(task, recover=None), prepared.space, choices)
    assert splits.recover is not None and not plain.recoveries

    def training(split: Split) -> list[float]:
        items = RecoveryItems(train=split, select=splits.select)
        model = copy.deepcopy(task.model)
        for name, layer in find_layers(model).items():
            layer.write_(plain.solved[name].weight)
        done = recover_(model, plain.solved, task.model, task.objective, items, task.recover)
        return [moment["training"] for moment in done.to_dict()["history"][1:]]

    losses = [moment.training for moment in found.history[1:]]
    assert losses == pytest.approx(training(splits.recover), rel=1e-6)
    assert losses != pytest.approx(training(splits.calibrate), rel=0.1)


@pytest.mark.parametrize("which", ["finished", "two"])
def test_a_recovery_starts_from_the_trial_and_gains_what_it_says(which, request):
    record = request.getfixturevalue(which).record
    trials = named(record)
    assert len(record.recoveries) == (1 if which == "finished" else 2)
    for found in record.recoveries:
        assert found.loss_after <= found.loss_before and found.flipped > 0
        before, after = trials[f"{found.plan}, applied"], trials[f"{found.plan}, recovered"]
        assert after.loss < before.loss
        # What was measured as a trial is what is recovered.
        twins = [trial for trial in trials.values() if trial.choices == before.choices]
        assert {trial.loss for trial in twins if trial is not after} == {before.loss}
        gained = found.loss_before - found.loss_after
        assert before.loss - after.loss == pytest.approx(gained, abs=1e-6)
    assert record.attempts
    assert all(attempt.plan.endswith(", recovered") for attempt in record.attempts)


def test_a_run_recovers_before_it_certifies(recipe, finished):
    """The verdict is that of the folder, by transformers' own loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.folder / "model").eval()
    total = count = 0.0
    for item in task_of(recipe).splits.certify.items:
        with torch.no_grad():
            ids = item["input_ids"]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert finished.record.measured.compressed == pytest.approx(total / count, abs=1e-5)
    html = (finished.folder / "report.html").read_text()
    assert 'id="t-recoveries"' in html and "Recovery" in html


def test_a_recovery_that_diverges_keeps_its_best_state_and_the_run_goes_on(
    recipe, finished, tmp_path
):
    path = variant(
        recipe, tmp_path / "wild.yaml", ("steps: 20, lr: 0.01", "steps: 20, lr: 1.0e+30")
    )
    result = run(path, tmp_path / "out", finished.folder)
    (found,) = result.record.recoveries
    (note,) = found.notes
    assert re.fullmatch(
        r"recover: loss .*at step \d+; lower lr=1e\+30; the state of step 0 was kept", note
    )
    assert found.best_step == 0 and found.loss_after == found.loss_before
    assert note in result.record.notes and result.record.verdict.status == "CERTIFIED"
    # What is written of a diverged recovery is read back like any other.
    (result.folder / "report.json").unlink()
    assert run(path, result.folder).record.recoveries == (found,)


def test_a_recipe_without_a_budget_recovers_the_one_plan(recipe, tmp_path):
    path = variant(
        recipe,
        tmp_path / "plain.yaml",
        ("budget: {metric: loss, max_drop: 0.2}", ""),
        ("      - quantize: {bits: 3, group_size: 16, symmetric: false}\n", ""),
        ("      - quantize: {bits: 8}\n", ""),
    )
    result = run(path, tmp_path / "out")
    (found,) = result.record.recoveries
    assert found.plan == "the plan" and found.best_step > 0
    assert result.record.measured.items == 16


# --------------------------------------------------------------------------------- interrupted


def killed_at_recovery(number: int, recipe: Path, out: Path) -> None:
    """Run in a process that is killed when it would write what this recovery has made."""
    child = os.fork()
    if child == 0:
        write, seen = Path.replace, []

        def killed(path: Path, target: Path) -> Path:
            if target.name == "recovered.safetensors":
                seen.append(target)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, target)

        # Only the run itself may happen in the child; no test teardown.
        try:
            Path.replace = killed
            run(recipe, out)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_an_interrupted_recovery_starts_again_and_nothing_before_it_does(label_free, two, tmp_path):
    out = tmp_path / "out"
    killed_at_recovery(2, label_free, out)
    before = times(out / "state")
    record = run(label_free, out).record
    after = times(out / "state")
    # 1. The second recovery alone is made.
    assert len(before) > 60 and {name: after[name] for name in before} == before
    made = [name for name in after if name.endswith("/recovered.json")]
    assert len(made) == 2 and len(set(made) & set(before)) == 1
    # 2. It ends as if nothing had happened.
    assert files(out) == files(two.folder)
    assert record.verdict == two.record.verdict
    for found, expected in zip(record.recoveries, two.record.recoveries, strict=True):
        assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)
    # 3. Without its report it is told again, and nothing is trained.
    applied = times(out / "state" / "applied")
    (out / "report.json").unlink()
    assert run(label_free, out).record.recoveries == record.recoveries
    assert times(out / "state" / "applied") == applied
    assert files(out) == files(two.folder)


# -------------------------------------------------------------------------------------- reused


def test_another_budget_knows_what_was_recovered(finished, again):
    """Plans of the run that is reused are candidates again, as they were, and are not made
    again."""
    first = finished
    # 1. The very files: nothing was applied or trained again.
    (made,) = recovered_folders(first.folder)
    assert recovered_folders(again.folder) == {made}
    kept = sorted((first.folder / "state" / "applied" / made).glob("*.*"))
    assert {"recovered.json", "recovered.safetensors", "0000.json"} <= {f.name for f in kept}
    for file in kept:
        assert file.samefile(again.folder / "state" / "applied" / made / file.name)
    # 2. The same model, under another name.
    assert weights(again.folder) == weights(first.folder)
    assert [attempt.plan for attempt in again.record.attempts] == ["earlier plan 1, recovered"]
    assert again.record.verdict.drop == first.record.verdict.drop
    (before,), (after,) = first.record.recoveries, again.record.recoveries
    assert after == replace(before, plan="earlier plan 1")
    # 3. It is told, also in the artifact, which is written anew.
    assert REUSED in again.record.notes and REUSED not in first.record.notes
    manifest = json.loads((again.folder / "model" / "curvprune.json").read_text())
    assert REUSED in manifest["plan"]["notes"]


def test_a_run_that_has_reused_goes_on_and_can_be_reused(recipe, finished, again, tmp_path):
    """With the plans that it took over."""
    out = shutil.copytree(again.folder, tmp_path / "out")
    (out / "report.json").unlink()
    resumed = run(again.folder.parent / "wider.yaml", out).record
    assert resumed.attempts == again.record.attempts and REUSED in resumed.notes
    assert resumed.recoveries == again.record.recoveries
    third = run(recipe, tmp_path / "third", again.folder)
    assert weights(third.folder) == weights(finished.folder)
    assert recovered_in(third.record) == ["earlier plan 1, recovered"]


def stages(
    recipe: Path, out: Path, reuse: Path | None = None
) -> tuple[runs.Task, runs.Workspace, runs.Selection]:
    """A recipe's task, and what was selected."""
    reused = None if reuse is None else State(reuse)
    prepared = runs.prepare(load_recipe(recipe), State(out), progress=False, reused=reused)
    task, space = prepared.task, prepared.space
    priced = runs.solve_and_price(task, space)
    return task, space, runs.select_plans(task, space, priced.prices)


@pytest.mark.slow
def test_a_reused_plan_tells_how_far_the_next_may_go_by_what_was_recovered(label_free, tmp_path):
    """What a recovery has given back counts from what one sequential pass has lost, by the prices
    that this run has."""
    path = variant(label_free, tmp_path / "first.yaml", ONE)
    first = run(path, tmp_path / "first")
    wide = ("max_drop: 0.2", "max_drop: 0.25")
    other = variant(label_free, tmp_path / "other.yaml", ONE, wide)
    task, space, selection = stages(other, tmp_path / "out", first.folder)
    # A run for another budget may not have measured the same plans.
    shipped = runs.certify_plans(task, space, replace(selection, trials=()))
    trials = named(shipped)
    known, applied = trials["earlier plan 1, recovered"], trials["earlier plan 1, applied"]
    assert known.expected == selection.prices.expected(known.choices)
    nexts = []
    for before in (applied, replace(applied, drop=4 * applied.drop), None):
        nexts.append(runs.next_plan(task, selection.prices, [runs.Tried(known, before)]))
    bolder = trials[f"{selection.best.name}, bolder, applied"]
    assert bolder.choices == nexts[0] and nexts[0] not in nexts[1:]


def test_what_a_plan_lost_is_expected_by_the_prices_of_now(recipe, tmp_path):
    """Trials say what was expected when they were made; prices have been corrected since."""
    path = variant(
        recipe,
        tmp_path / "recipe.yaml",
        (RECOVER, ""),
        ("seed: 0", "seed: 1"),
        ("max_drop: 0.2", "max_drop: 0.05"),
    )
    task, space, selection = stages(path, tmp_path / "out")
    before = []
    for trial in selection.trials:
        before.append(replace(trial, expected=3 * trial.expected))
    doctored = replace(selection, trials=tuple(before))
    trials = named(runs.certify_plans(task, space, doctored))
    best, prices = selection.best, selection.prices
    nexts = []
    for expected in (prices.expected(best.choices), 3 * best.expected):
        start = runs.Tried(replace(best, expected=expected), None)
        nexts.append(runs.next_plan(task, prices, [start]))
    assert trials[f"{best.name}, bolder, applied"].choices == nexts[0] != nexts[1]


def test_an_earlier_plan_that_is_not_safe_is_followed_by_a_more_cautious_one(label_free, tmp_path):
    """The best plan, which the earlier run has recovered, is not applied a second time."""
    path = variant(
        label_free,
        tmp_path / "recipe.yaml",
        ("max_drop: 0.2", "max_drop: 0.225"),
        (RECOVER, "recover: {steps: 1, lr: 1.0e-9}\n"),
        ONE,
    )
    first = run(path, tmp_path / "first")
    task, space, selection = stages(path, tmp_path / "out", first.folder)
    trials = named(runs.certify_plans(task, space, selection))
    names = [name for name in trials if name.endswith(", recovered")]
    cautious = f"{selection.best.name}, more cautious"
    assert names == ["earlier plan 1, recovered", f"{cautious}, recovered"]
    known = trials[names[0]]
    assert known.choices == selection.best.choices and known.chance < 0.95
    expected = cheapest(selection.prices.rows, task.within, max_loss=0.6 * known.expected)
    assert trials[names[1]].choices == expected and trials[names[1]].bytes > known.bytes


def assert_nothing_is_taken(
    reused: runs.RunResult, fresh: runs.RunResult, first: runs.RunResult
) -> None:
    """The options that were solved for another recovery, and nothing that it made."""
    assert files(fresh.folder) != files(first.folder)
    assert files(reused.folder) == files(fresh.folder)
    assert not (reused.folder / "state" / "earlier.json").exists()
    assert recovered_in(reused.record) == recovered_in(fresh.record)
    assert not [note for note in reused.record.notes if "by the reused run" in note]
    for stage in reused.record.stages:
        assert not (stage.name.startswith("recover") and stage.resumed)


def test_what_another_recovery_made_is_not_taken(recipe, finished, again, tmp_path):
    """Also from a run that holds plans which it has taken over itself."""
    path = variant(recipe, tmp_path / "other.yaml", ("steps: 20", "steps: 10"))
    fresh = run(path, tmp_path / "fresh")
    assert (again.folder / "state" / "earlier.json").exists()
    assert_nothing_is_taken(run(path, tmp_path / "reused", again.folder), fresh, finished)


@pytest.mark.slow
def test_what_a_recovery_on_other_items_made_is_not_taken(tmp_path):
    path = tiny.write_recipe(tmp_path)
    text = path.read_text().replace("  certify: 16\n", "  certify: 16\n  recover: 6\n")
    path.write_text(text + "recover: {steps: 5, lr: 0.01}\n")
    first = run(path, tmp_path / "first")
    recover = task_of(path).splits.recover
    assert recover is not None
    for document in set(recover.documents):
        Path(document).write_text(Path(document).read_text().swapcase())
    fresh = run(path, tmp_path / "fresh")
    assert_nothing_is_taken(run(path, tmp_path / "reused", first.folder), fresh, first)


def test_a_run_without_a_recovery_takes_nothing_of_one(recipe, finished, tmp_path):
    path = variant(recipe, tmp_path / "plain.yaml", (RECOVER, ""))
    fresh = run(path, tmp_path / "fresh")
    reused = run(path, tmp_path / "reused", finished.folder)
    assert_nothing_is_taken(reused, fresh, finished)
    assert not reused.record.recoveries


def test_earlier_plans_that_do_not_fit_are_left_out(label_free, two, tmp_path):
    """The larger of two plans, then both."""
    task, trials = task_of(label_free), named(two.record)
    plans = [trials[name].choices for name in recovered_in(two.record)]
    larger, smaller = (task.bytes_of(plan) + task.header_bytes for plan in plans)
    assert larger > smaller > task.smallest_bytes()
    for number, limits, fitting in (
        (1, f"max_drop: 0.9, max_bytes: {smaller}}}", [plans[1]]),
        (2, f"max_drop: 0.9, max_bytes: {smaller - 1}}}", []),
    ):
        wide = variant(label_free, tmp_path / f"{number}.yaml", ONE, ("max_drop: 0.2}", limits))
        record = run(wide, tmp_path / f"{number}", two.folder).record
        names = [name for name in recovered_in(record) if name.startswith("earlier plan")]
        assert [named(record)[name].choices for name in names] == fitting
        assert (REUSED in record.notes) == bool(fitting)
        assert record.attempts[0].verdict.status == "CERTIFIED"


def test_an_earlier_plan_that_divides_a_group_is_left_out(label_free, tmp_path):
    """It gives two options to layers that are to share one; without the group it is taken."""
    path = variant(label_free, tmp_path / "recipe.yaml", ONE, ("max_drop: 0.2", "max_drop: 0.14"))
    record = run(path, tmp_path / "first").record
    (name,) = recovered_in(record)
    choices = named(record)[name].choices
    first, second = (f"model.layers.0.self_attn.{x}_proj" for x in "qk")
    assert choices[first] != choices[second]
    for number, group in enumerate(("", f"\nsame_option: [[{first}, {second}]]")):
        limits = f"max_drop: 0.9}}{group}"
        wide = variant(label_free, tmp_path / f"{number}.yaml", ONE, ("max_drop: 0.2}", limits))
        reused = run(wide, tmp_path / f"{number}", tmp_path / "first").record
        taken = [found for found in recovered_in(reused) if found.startswith("earlier plan")]
        assert len(taken) == (0 if group else 1)
        assert (REUSED in reused.notes) == (not group)


# -------------------------------------------------------------------------------- the section


def test_check_names_the_cost_and_the_section_agrees_with_the_code(recipe):
    assert runs.check(recipe).minutes["recover"] > 0
    assert Training(**RecoverSection().model_dump()) == Training()
    assert Training(**RecoverSection(seconds=5.0).model_dump()) == Training(seconds=5.0)


@pytest.mark.parametrize(
    ("line", "key", "message"),
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
def test_a_wrong_section_is_one_message_with_its_line(recipe, tmp_path, line, key, message):
    path = variant(recipe, tmp_path / "wrong.yaml", (RECOVER, f"{line}\n"))
    lines = path.read_text().splitlines()
    number = 1 + next(i for i, text in enumerate(lines) if text.startswith("recover:"))
    with pytest.raises(RecipeError, match=message) as caught:
        run(path, tmp_path / "out")
    assert str(caught.value).startswith(f"{path}:{number}: {key}")
    assert not (tmp_path / "out").exists()
