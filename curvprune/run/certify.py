"""Stage *certify*: a sequence of plans, fixed before the certify split is opened, is tested on it.

A plan is solved in one sequential pass, recovered if that was asked for, written to disk and read
again: what is certified is the saved model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from curvprune.artifact import MANIFEST
from curvprune.certificate import (
    ItemColumns,
    Verdict,
    counted,
    fixed_sequence,
    item_columns,
    judge,
)
from curvprune.compression import Solved
from curvprune.files import sha256_of_file
from curvprune.model import ItemResults, find_layers
from curvprune.planning import Budget, Plan
from curvprune.record import Attempt, EngineRecord, RecoveryRecord, Trial
from curvprune.run.apply import (
    applied_in,
    apply_plan,
    notes_on_storage,
    plan_key,
    recover_plan,
    unpriced_plan,
    write_artifact,
)
from curvprune.run.engine_results import results_in_engine
from curvprune.run.evaluation import are_of, results_on
from curvprune.run.folder import EARLIER
from curvprune.run.price import Prices
from curvprune.run.select import Selection, trial_file, trial_of
from curvprune.run.sequence import Tried, fix_sequence
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.schema import decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Shipped:
    """What a compression ends with.

    Attributes:
        folder: of the model to ship, in the workspace.
        verdict: of that model; ``None`` without ``max_drop``.
        measured: the same test, also where there is nothing to judge by.
        items: what happened to every item of the certify split.
        engine: what ran the model for the verdict, where it was not torch.
        attempts: the plans that were tested, in order.
        applied: trials of the plans that were applied, before and after a recovery.
        solved: the model's compressed layers.
    """

    folder: Path
    plan: Plan
    verdict: Verdict | None
    measured: Verdict
    items: ItemColumns
    solved: dict[str, Solved]
    engine: EngineRecord | None = None
    attempts: tuple[Attempt, ...] = ()
    applied: tuple[Trial, ...] = ()
    recoveries: tuple[RecoveryRecord, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """A plan solved, recovered if that was asked for, written to disk and measured on select.

    Attributes:
        trial: what it lost on select as it was written.
        before: the same before the recovery, if there was one.
        tried: what `next_plan` is to learn from it.
    """

    trial: Trial
    before: Trial | None
    tried: Tried
    folder: Path
    solved: dict[str, Solved]


def certify_plans(task: Task, space: Workspace, selection: Selection) -> Shipped:
    """Fix a sequence of plans, then test them, cautious first, up to the first that is not
    certified. What ships is the last certified one, or the first if there is none.

    Cost: one sequential pass per plan that is applied, and its recovery; one evaluation on the
    certify split per plan that is tested.
    """
    making = _Making(task, space, selection)
    # 1. The sequence, by what select says.
    sequence = making.sequence()
    # 2. The tests.
    judged = task.budget if task.max_drop is not None else None
    verdicts: list[Verdict] = []
    found: list[Judged] = []
    for one in sequence:
        file = f"certify/{plan_key(one.trial.choices)}.json"
        title = f"certify {one.trial.name}"
        tested = _verdict_of(task, space, one.folder, file, title=title, budget=judged)
        found.append(tested)
        verdicts.append(tested.verdict)
        if tested.verdict.status != "CERTIFIED":
            break
    # 3. What the split was used for before.
    verdicts = _counted(task, space, verdicts, judged=judged is not None)
    # 4. What ships.
    place = 0
    if judged is not None:
        place = fixed_sequence(verdicts) or 0
    shipped, verdict = sequence[place], verdicts[place]
    space.note(*notes_on_storage(task, shipped.trial.choices))
    plan = _plan_of(task, space, shipped.trial)
    attempts: list[Attempt] = []
    if judged is not None:
        if verdict.note:
            space.note(f"certificate: {verdict.note}")
        for one, said in zip(sequence, verdicts, strict=False):
            attempts.append(Attempt(plan=one.trial.name, verdict=said))
    return Shipped(
        folder=shipped.folder,
        plan=plan,
        verdict=verdict if judged is not None else None,
        measured=verdict,
        items=found[place].items,
        engine=found[place].engine,
        solved=shipped.solved,
        attempts=tuple(attempts),
        applied=tuple(making.trials()),
        recoveries=tuple(making.recoveries),
    )


def apply_and_measure(task: Task, space: Workspace, choices: Mapping[str, str]) -> Shipped:
    """Without a budget: apply the one plan there is and measure it, paired, on the certify
    split."""
    folder = "applied/1"
    model, solved = apply_plan(task, space, choices, folder)
    recoveries: tuple[RecoveryRecord, ...] = ()
    if task.recover is not None:
        solved, recovery = recover_plan(task, space, model, solved, folder)
        recoveries = (recovery,)
    plan = unpriced_plan(task, space, choices)
    space.note(*notes_on_storage(task, choices))
    path = write_artifact(task, space, folder, model, solved, plan)
    found = _verdict_of(task, space, path, "certify/1.json", title="measure", budget=None)
    (measured,) = _counted(task, space, [found.verdict], judged=False)
    return Shipped(
        folder=path,
        plan=plan,
        verdict=None,
        measured=measured,
        items=found.items,
        engine=found.engine,
        solved=solved,
        recoveries=recoveries,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A verdict, what happened to every item, and the engine where it is about one."""

    verdict: Verdict
    items: ItemColumns
    engine: EngineRecord | None = None


def _verdict_of(
    task: Task, space: Workspace, folder: Path, file: str, *, title: str, budget: Budget | None
) -> Judged:
    """Paired verdict of a saved and reloaded model on the certify split; without a budget the bound
    is not judged. Where an engine is asked for, it is about what that computes."""
    certify, engine = task.splits.certify, task.settings.engine
    with space.log.stage(title, 2 if engine is None else 3) as advance:
        uncompressed = task.uncompressed
        baseline = results_on(task, space, "certify/baseline.json", uncompressed, certify)
        advance(1)
        # Results are of this very model, or are measured.
        of, model = sha256_of_file(folder / MANIFEST), task.model
        if not are_of(space, file, of):
            space.state.path(file).unlink(missing_ok=True)
            model = task.storage.read(folder)
        results = results_on(task, space, file, model, certify, of=of)
        advance(2)
        served = None
        if engine is not None:
            served = results_in_engine(task, space, folder, file, of=of)
            advance(3)
    if budget is None:
        confidence = 0.95 if task.budget is None else task.budget.confidence
        budget = Budget("loss", max_drop=0.0, confidence=confidence)
    measure = task.objective.measure
    verdict = judge(baseline, results, certify, budget, measure=measure)
    if served is None:
        return Judged(verdict=verdict, items=item_columns(baseline, results, certify))
    # The weights alone, and what the engine loses beyond them.
    beyond = judge(results, served.results, certify, budget, measure=measure)
    return Judged(
        verdict=judge(baseline, served.results, certify, budget, measure=measure),
        items=item_columns(baseline, served.results, certify),
        engine=EngineRecord(
            name=served.name,
            version=served.version,
            bytes=served.bytes,
            weights=verdict.drop,
            weights_stderr=verdict.stderr,
            share=beyond.drop,
            share_stderr=beyond.stderr,
        ),
    )


def _counted(
    task: Task, space: Workspace, verdicts: list[Verdict], *, judged: bool
) -> list[Verdict]:
    """Verdicts with what makes the split unfit for them: what its items were used for before."""
    certify, leak = task.splits.certify, task.splits.leak()
    found = [verdict.noting(leak) for verdict in verdicts]
    if space.uses is None:
        return found
    try:
        return counted(found, certify, space.uses, judged=judged)
    except OSError as error:
        space.note(f"what the certify split is used for could not be kept: {error}")
        return found


def _plan_of(task: Task, space: Workspace, trial: Trial) -> Plan:
    """The plan that a trial measured, with everything noted so far."""
    unknown = float("nan")
    predicted, stderr = trial.predicted, trial.predicted_stderr
    return Plan(
        choices=dict(trial.choices),
        bytes=trial.bytes,
        predicted=unknown if predicted is None else predicted,
        predicted_stderr=unknown if stderr is None else stderr,
        notes=(*task.notes, *space.notes),
        uses=trial.uses,
    )


# ------------------------------------------------------------------------------- making the plans


class _Making:
    """Applies plans one after the other; which is next depends on how those before did."""

    def __init__(self, task: Task, space: Workspace, selection: Selection) -> None:
        assert task.budget is not None
        self.task, self.space = task, space
        self.selection = selection
        self.prices: Prices = selection.prices
        self.applied: list[Applied] = []
        self.recoveries: list[RecoveryRecord] = []

    def sequence(self) -> list[Applied]:
        """The plans to certify, cautious first, solved and written."""
        self._take_earlier()
        earlier = [one.tried for one in self.applied]
        best = self.selection.best
        order = fix_sequence(self.task, self.prices, best, self._apply, earlier)
        return [self.applied[i] for i in order]

    def trials(self) -> list[Trial]:
        found = []
        for one in self.applied:
            found += [trial for trial in (one.before, one.trial) if trial is not None]
        return found

    def _take_earlier(self) -> None:
        """Plans that a reused run has recovered and that fit this budget's limits: read again, not
        made."""
        task, state = self.task, self.space.state
        if task.max_drop is None or not state.has(EARLIER):
            return
        written = state.read_json(EARLIER)
        plans = decode(list[dict[str, str]], written, source=str(state.path(EARLIER)))
        fitting = [choices for choices in plans if self._fits(choices)]
        fitting.sort(key=task.bytes_of, reverse=True)
        if fitting:
            self.space.note(
                f"{len(fitting)} plan(s) recovered by the reused run were considered for this "
                "budget too"
            )
        for i, choices in enumerate(fitting, 1):
            self._apply(f"earlier plan {i}", choices)

    def _fits(self, choices: Mapping[str, str]) -> bool:
        """Whether a plan keeps to the limits and gives every group one option."""
        if not self.task.keeps_within(choices):
            return False
        return all(_one_option(choices, group) for group in self.task.groups)

    # ------------------------------------------------------------------------------- one plan

    def _apply(self, name: str, choices: Mapping[str, str]) -> Tried:
        """Apply a plan, recover it if that was asked for, and write its artifact."""
        task, space = self.task, self.space
        at = applied_in(choices)
        # 1. One sequential pass, unless it has been a trial.
        model, solved = apply_plan(task, space, choices, at, title=f"apply {name}")
        select = task.splits.select
        results = results_on(task, space, trial_file(choices), model, select)
        trial = self._trial(f"{name}, applied", choices, results)
        start = trial
        # 2. The recovery.
        before, tried = None, Tried(start, None)
        if task.recover is None:
            model = task.model  # what is not solved is the same there; the copy can go
        else:
            _write_solved_into(model, solved)
            solved, recovery = recover_plan(
                task, space, model, solved, at, name=name, before=results
            )
            self.recoveries.append(recovery)
            file = f"{at}/recovered-select.json"
            results = results_on(task, space, file, model, select)
            before, trial = trial, self._trial(f"{name}, recovered", choices, results)
            tried = Tried(trial, start)
        # 3. The artifact.
        plan = _plan_of(task, space, trial)
        folder = write_artifact(task, space, at, model, solved, plan)
        self.applied.append(
            Applied(
                trial=trial,
                before=before,
                tried=tried,
                folder=folder,
                solved=self._without_packed_weights(solved),
            )
        )
        return tried

    def _trial(self, name: str, choices: Mapping[str, str], results: ItemResults) -> Trial:
        yardstick = self.selection.yardstick
        return trial_of(
            self.task, yardstick, self.prices, results, name=name, kind="applied", choices=choices
        )

    def _without_packed_weights(self, solved: Mapping[str, Solved]) -> dict[str, Solved]:
        """What lies on disk packed need not be held in memory twice: codes and scales are enough
        for a later save."""
        light = {}
        for name, one in solved.items():
            packed = one.codes is not None and self.task.form_of(name, one.option) != "dense"
            light[name] = replace(one, weight=torch.empty(0)) if packed else one
        return light


def _one_option(choices: Mapping[str, str], group: Iterable[str]) -> bool:
    """Whether a plan gives all layers of a group the same option."""
    return len({choices[name] for name in group}) == 1


def _write_solved_into(model: nn.Module, solved: Mapping[str, Solved]) -> None:
    own = find_layers(model)
    for name, one in solved.items():
        own[name].write_(one.weight)
