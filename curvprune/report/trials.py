"""Plans measured on the select split against their prediction, and what recoveries did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from curvprune.record import RunRecord, Trial, Verdict
from curvprune.report import charts
from curvprune.report.figures import (
    MISSING,
    PLUS_MINUS,
    THIN,
    duration,
    finite,
    fixed,
    plus_minus,
    sig,
)
from curvprune.report.tables import (
    Cell,
    Column,
    Table,
    bytes_cell,
    count_cell,
    error_cell,
    number_cell,
    yes_no,
)
from curvprune.report.verdict import SHARES, judged

# How a trial is drawn: shape, class of the style sheet, words of the legend.
_DRAWN = {
    "plan": ("circle", "plan", "plan"),
    "applied": ("star", "applied", "applied model"),
    "uniform": ("square", "uniform", "control: uniform"),
    "reversed": ("diamond", "reversed", "control: reversed order"),
    "control": ("triangle", "control", "control: static rule, or one kind alone"),
}


def _look(trial: Trial) -> str:
    """The key of `_DRAWN`."""
    name = trial.name.lower()
    if trial.kind != "control":
        return trial.kind if trial.kind in _DRAWN else "control"
    if "uniform" in name:
        return "uniform"
    return "reversed" if "revers" in name else "control"


def _shipped(record: RunRecord) -> int | None:
    """Index of the attempt whose model ships: the last certified one of the sequence, else the
    first."""
    if not record.attempts:
        return None
    # Testing stops at the first failure, so later attempts cannot count.
    certified = 0
    for attempt in record.attempts:
        if attempt.verdict.status != "CERTIFIED":
            break
        certified += 1
    return max(0, certified - 1)


def _chosen(record: RunRecord) -> int | None:
    """Index of the trial of the model that ships: the applied one that the shipped attempt names.
    Applied models that were not worth an attempt come after the others."""
    # 1. The applied plan that was tested and shipped.
    trials, shipped = record.trials, _shipped(record)
    applied = [k for k, trial in enumerate(trials) if trial.kind == "applied"]
    if shipped is not None:
        named = [k for k in applied if trials[k].name == record.attempts[shipped].plan]
        if named:
            return named[0]
        if shipped < len(applied):
            return applied[shipped]
    # 2. Nothing was tested: the last one applied, else the last one that select accepted.
    if applied:
        return applied[-1]
    accepted = [k for k, t in enumerate(trials) if t.accepted and t.kind != "control"]
    return accepted[-1] if accepted else None


def trial_points(record: RunRecord) -> list[charts.Point]:
    """Every trial as a mark of the charts."""
    chosen = _chosen(record)
    points = []
    for k, trial in enumerate(record.trials):
        shape, class_, _ = _DRAWN[_look(trial)]
        points.append(
            charts.Point(
                number=k + 1,
                name=trial.name,
                shape=shape,
                class_=class_,
                bytes=trial.bytes,
                predicted=finite(trial.predicted),
                predicted_stderr=finite(trial.predicted_stderr),
                measured=finite(trial.loss),
                measured_stderr=finite(trial.loss_stderr),
                chosen=k == chosen,
            )
        )
    return points


def chosen_point(record: RunRecord) -> charts.Point | None:
    """The trial of the model that ships."""
    return next((point for point in trial_points(record) if point.chosen), None)


def trials_legend(record: RunRecord) -> Markup:
    """The marks that occur, explained."""
    looks = Counter(_look(trial) for trial in record.trials)
    return charts.legend([_DRAWN[look] for look in _DRAWN if looks[look]])


@dataclass(frozen=True, slots=True)
class _Difference:
    """Measured minus predicted loss; errors in quadrature, because the splits differ."""

    gap: float | None
    spread: float | None
    ratio: float | None

    @classmethod
    def of(cls, trial: Trial) -> _Difference:
        predicted, measured = finite(trial.predicted), finite(trial.loss)
        errors = finite(trial.predicted_stderr), finite(trial.loss_stderr)
        spread = None
        if errors[0] is not None and errors[1] is not None:
            spread = math.hypot(errors[0], errors[1])
        if predicted is None or measured is None:
            return cls(None, spread, None)
        return cls(measured - predicted, spread, measured / predicted if predicted > 0 else None)

    @property
    def z(self) -> float | None:
        return self.gap / self.spread if self.gap is not None and self.spread else None


# The table of trials, a column after the other


@dataclass(frozen=True, slots=True)
class _TrialColumn:
    """A column of the table of trials."""

    head: Column
    cell: Callable[[Trial], Cell]


def _difference_cell(trial: Trial) -> Cell:
    found = _Difference.of(trial)
    return number_cell(found.gap, plus_minus(found.gap, found.spread))


def _z_cell(trial: Trial) -> Cell:
    # Beyond three standard errors a prediction has failed, and is shown so.
    z = _Difference.of(trial).z
    return number_cell(z, fixed(z, 1), "n alert" if z is not None and abs(z) > 3 else "n")


def _ratio_cell(trial: Trial) -> Cell:
    ratio = _Difference.of(trial).ratio
    return number_cell(ratio, sig(ratio))


def _accuracy_cell(trial: Trial) -> Cell:
    drop = finite(trial.drop)
    text = MISSING if drop is None else f"{fixed(100 * drop, 2)}{THIN}pp"
    return number_cell(trial.drop, text)


def _accepted_cell(trial: Trial) -> Cell:
    return Cell(MISSING if trial.accepted is None else yes_no(trial.accepted))


_PREDICTED = (
    _TrialColumn(
        Column(
            "kind",
            "plan: from the integer program; control: for comparison; applied: the packed model "
            "itself",
        ),
        lambda trial: Cell(trial.kind),
    ),
    _TrialColumn(
        Column("bytes", "weights on disk", "n"),
        lambda trial: bytes_cell(trial.bytes),
    ),
    _TrialColumn(
        Column(f"predicted {PLUS_MINUS} se", "loss increase from the ledger", "n"),
        lambda trial: error_cell(trial.predicted, trial.predicted_stderr),
    ),
)
_EXPECTED = _TrialColumn(
    Column("expected", "sum of the prices, corrected by earlier trials; without pairs", "n"),
    lambda trial: number_cell(trial.expected, sig(trial.expected)),
)
_MEASURED = (
    _TrialColumn(
        Column(f"measured {PLUS_MINUS} se", "loss increase on the select split, paired", "n"),
        lambda trial: error_cell(trial.loss, trial.loss_stderr),
    ),
    _TrialColumn(
        Column(
            f"difference {PLUS_MINUS} se",
            "measured minus predicted; errors in quadrature (different splits)",
            "n",
        ),
        _difference_cell,
    ),
    _TrialColumn(Column("z", "difference divided by its standard error", "n"), _z_cell),
    _TrialColumn(Column("ratio", "measured divided by predicted", "n"), _ratio_cell),
    _TrialColumn(
        Column("items", "paired items of the select split", "n"),
        lambda trial: count_cell(trial.items),
    ),
)


def _drop_column(verdict: Verdict) -> _TrialColumn | None:
    """What the budget counts, where that is not the loss."""
    if verdict.metric in SHARES:
        head = Column(
            f"{verdict.metric} drop", f"fall of the {verdict.metric} on the select split", "n"
        )
        return _TrialColumn(head, _accuracy_cell)
    if verdict.metric in ("loss", "kl"):
        return None
    head = Column(verdict.metric, "as expected from the select split", "n")
    return _TrialColumn(head, lambda trial: error_cell(trial.drop, trial.drop_stderr))


_CHANCE = _TrialColumn(
    Column("chance", "estimated probability that certification succeeds", "n"),
    lambda trial: number_cell(trial.chance, fixed(trial.chance, 2)),
)
_JUDGED = (
    _TrialColumn(
        Column(
            "accepted",
            "whether the measurement on the select split lets the plan go on to certification",
        ),
        _accepted_cell,
    ),
    _TrialColumn(Column("note"), lambda trial: Cell(trial.note)),
)


def _trial_columns(record: RunRecord) -> list[_TrialColumn]:
    """The columns that have something to say in this run."""
    verdict = judged(record)
    shown = [*_PREDICTED]
    if record.corrections:
        shown.append(_EXPECTED)
    shown += _MEASURED
    of_budget = None if verdict is None else _drop_column(verdict)
    if of_budget is not None:
        shown.append(of_budget)
    if any(trial.chance is not None for trial in record.trials):
        shown.append(_CHANCE)
    return [*shown, *_JUDGED]


def trials_table(record: RunRecord) -> Table | None:
    """Every plan measured, predicted against measured; ``None`` if none was."""
    if not record.trials:
        return None
    chosen, shown = _chosen(record), _trial_columns(record)
    columns = [Column("#", "number in the charts", "n"), Column("plan")]
    columns += [column.head for column in shown]
    rows = []
    for k, trial in enumerate(record.trials):
        name = Cell(trial.name, class_="nowrap")
        if k == chosen:
            name = Cell(f"{trial.name} (chosen)", class_="nowrap strong")
        cells = [column.cell(trial) for column in shown]
        rows.append([number_cell(k + 1, str(k + 1)), name, *cells])
    return Table("trials", columns, rows)


# In words


def trials_reading(record: RunRecord) -> str:
    """How well the prediction held, in one sentence."""
    # A trial without errors, or with errors of zero, cannot be judged.
    good = total = 0
    for trial in record.trials:
        found = _Difference.of(trial)
        if found.gap is None or not found.spread:
            continue
        total += 1
        good += abs(found.gap) <= 2 * found.spread
    if not total:
        return "No trial has both a prediction and a measurement with standard errors."
    beaten = [trial.name for trial in record.trials if trial.beats_plan]
    end = f" A control, {beaten[0]}, beats the plan and was used." if beaten else ""
    return (
        f"{good} of {total} trials were measured within two standard errors of the prediction.{end}"
    )


def recoveries_table(record: RunRecord) -> Table | None:
    """What the recovery of each plan did; ``None`` where there was none."""
    if not record.recoveries:
        return None
    columns = [
        Column("plan"),
        Column("before", "mean loss on the select split as compressed", "n"),
        Column("after", "mean loss on the select split of the state that was kept", "n"),
        Column("gain", "before minus after", "n"),
        Column("steps", "steps done", "n"),
        Column("kept", "the step whose state was kept; 0: as compressed", "n"),
        Column("numbers", "how many numbers were free", "n"),
        Column("codes moved", "how many rounded weights have another code than before", "n"),
        Column("time", "", "n"),
    ]
    rows = []
    for found in record.recoveries:
        # The best state on select is kept, the one before the training included.
        gain = found.loss_before - found.loss_after
        rows.append(
            [
                Cell(found.plan),
                number_cell(found.loss_before, sig(found.loss_before, 4)),
                number_cell(found.loss_after, sig(found.loss_after, 4)),
                number_cell(gain, sig(gain)),
                count_cell(found.steps),
                count_cell(found.best_step),
                count_cell(found.trained),
                count_cell(found.flipped),
                number_cell(found.seconds, duration(found.seconds)),
            ]
        )
    return Table("recoveries", columns, rows)
