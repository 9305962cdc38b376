"""Stage *select*: plans by their price, and controls, measured on the select split; one is chosen.

A trial is the plan as it would ship: solved in one sequential pass. What is measured corrects the
prices, and the next plan is made with those.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from curvprune.certificate import Verdict, foreseen, judge
from curvprune.model import ItemResults, Split
from curvprune.options import Option, pruner_of, quantizer_of
from curvprune.planning import (
    SHARES,
    Budget,
    Infeasible,
    MeasuredPlan,
    Measurement,
    Within,
    cheapest,
    corrections,
    scaled,
    search_plans,
)
from curvprune.pricing import Row
from curvprune.record import Alternative, Trial
from curvprune.run.apply import applied_in, apply_plan, plan_key
from curvprune.run.baselines import Control, controls
from curvprune.run.evaluation import (
    ACCEPTABLE,
    AS_LOSS,
    CLEAR,
    allowed_drop,
    chance_at,
    divergences_on,
    first_drop,
    keep_results,
    read_results,
    results_on,
)
from curvprune.run.price import Prices
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace

TRIALS_BESIDES = 8  # the uncompressed model, at most six controls, and a plan after the first four
COMPARED = 64  # items of select on which two plans' divergences are compared, at most
LEVEL_BYTES = 0.97  # a control of this share of a plan's bytes, or more, is of its size
# Two plans whose bytes differ by less are one size: what they lost on select decides.
SAME_SIZE = 1.002
# What is held against a plan of both kinds: the part that its options have, and the one that they
# lack.
ALONE: dict[str, tuple[Callable[[Option], object], Callable[[Option], object]]] = {
    "rounding alone": (quantizer_of, pruner_of),
    "pruning alone": (pruner_of, quantizer_of),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Yardstick:
    """What plans are measured against on the select split: the uncompressed model, and the model
    that the prices are of, which is the same unless hidden units were removed."""

    baseline: ItemResults
    start: ItemResults


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What the stage makes.

    Attributes:
        trials: every plan that was measured, in order.
        best: the one to apply and certify.
        prices: with what all trials say about them.
        together: pruning and rounding together against each alone.
    """

    trials: tuple[Trial, ...]
    best: Trial
    prices: Prices
    yardstick: Yardstick
    together: tuple[Alternative, ...]


def select_plans(task: Task, space: Workspace, prices: Prices) -> Selection:
    """Measure plans and controls on the select split and choose.

    Cost: one sequential pass and one evaluation on the select split per trial; ``settings.trials``
    plans, at most six controls, and a few plans more by the corrected prices.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        found = _Search(task, space, prices).run()
    # Recorded to be noted, not to be hidden.
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    told = {str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)}
    space.note(*sorted(told))
    return found


# ---------------------------------------------------------------------------------------- trials


def trial_file(choices: Mapping[str, str]) -> str:
    """Where the results of a plan, as it ships, lie."""
    return f"select/{plan_key(choices)}.json"


def trial_of(
    task: Task,
    yardstick: Yardstick,
    prices: Prices,
    results: ItemResults,
    *,
    name: str,
    kind: str,
    choices: Mapping[str, str],
) -> Trial:
    """The record of a plan whose results on the select split are there."""
    select = task.splits.select
    as_loss = Budget("loss", max_drop=0.0)
    judged = task.budget if task.max_drop is not None else None
    budget = judged or as_loss

    # 1. The drop that the budget counts, and the rise of the loss that the prices foretell.
    drop = judge(yardstick.baseline, results, select, budget, measure=task.objective.measure)
    loss = drop
    if budget.quantile is not None:
        drop = _foreseen(task, results, drop, budget)
    if (budget.metric, budget.quantile) not in AS_LOSS or yardstick.start is not yardstick.baseline:
        loss = judge(yardstick.start, results, select, as_loss, measure=task.objective.measure)
    rise = float((results.loss.sum() - yardstick.start.loss.sum()) / yardstick.start.count.sum())
    # 2. Whether it would be certified.
    chance = None
    if judged is not None:
        chance = chance_at(task, drop.drop, drop.stderr, drop.bound)
    predicted = prices.ledger.predict(choices)
    return Trial(
        name=name,
        kind=kind,
        choices=dict(choices),
        bytes=task.bytes_of(choices),
        predicted=predicted.value,
        predicted_stderr=predicted.stderr,
        expected=prices.expected(choices),
        loss=rise,
        loss_stderr=loss.stderr,
        drop=drop.drop,
        drop_stderr=drop.stderr,
        bound=drop.bound,
        chance=chance,
        accepted=None if chance is None else chance >= ACCEPTABLE,
        uses=task.uses(choices),
        items=len(yardstick.baseline.loss),
    )


def _foreseen(task: Task, results: ItemResults, drop: Verdict, budget: Budget) -> Verdict:
    """The drop, its bound and its error as they are expected on the certify split: few documents
    have no high quantile of their own."""
    there = len(set(task.splits.certify.clusters().tolist()))
    seen = foreseen(results, task.splits.select, budget, there)
    return replace(drop, drop=seen.value, stderr=seen.stderr, bound=seen.bound)


def plan_results(
    task: Task, space: Workspace, choices: Mapping[str, str], *, name: str
) -> ItemResults:
    """Results of a plan as it ships on the select split, or those that were measured before.

    Cost: one sequential pass, unless the plan has been solved, and one evaluation.
    """
    file, model = trial_file(choices), task.model
    if not space.state.has(file):
        # What there is to say of the pass is said of what ships.
        quiet = replace(space, notes=[])
        model, _ = apply_plan(task, quiet, choices, applied_in(choices), title=f"solve {name}")
    with space.log.stage(f"measure {name}", 1) as advance:
        results = results_on(task, space, file, model, task.splits.select)
        advance(1)
    return results


def reach_of(trial: Trial) -> float:
    """From a trial's drop to its bound."""
    if math.isfinite(trial.bound):
        return trial.bound - trial.drop
    # Few documents that all lose the same have no bound; nor does a model that is broken.
    return 0.0 if trial.drop_stderr == 0 else math.inf


def finite_stderr(trial: Trial) -> float:
    """The standard error of a trial's loss, 0 where there is none."""
    return trial.loss_stderr if math.isfinite(trial.loss_stderr) else 0.0


def _lost(trial: Trial) -> float:
    return trial.loss if math.isfinite(trial.loss) else math.inf


def clearly_less(more: Verdict) -> bool:
    """Whether a plan lost less than another by more than chance: ``more`` is what it lost beyond
    that one, paired by item. Of several plans one always lost least."""
    return more.drop < -CLEAR * more.stderr


# ------------------------------------------------------------------------------------ the search


class _Search:
    """The steps of the stage and what they share: trials so far, and prices corrected by them."""

    def __init__(self, task: Task, space: Workspace, prices: Prices) -> None:
        assert task.budget is not None
        self.task, self.space, self.prices = task, space, prices
        self.budget = task.budget
        self.trials: list[Trial] = []
        self.yardstick: Yardstick

    def run(self) -> Selection:
        # 1. The uncompressed model, and what removed units alone cost.
        spent = self._measure_start()
        # 2. Plans along the frontier, until the smallest that passes is found.
        best = self._first_plans(spent)
        # 3. Controls near its size, and a plan by what they have said about the prices.
        for control in self._controls(best):
            self.measure(control.name, "control", control.choices)
        best = self._plan_again(best)
        # 4. Each kind of option alone, at the same limits.
        together = self._compare_kinds(best)
        # 5. The plan, or a control that beats it.
        best = self._best_measured(best)
        return Selection(
            trials=tuple(self.trials),
            best=best,
            prices=self.prices,
            yardstick=self.yardstick,
            together=together,
        )

    def measure(self, name: str, kind: str, choices: Mapping[str, str]) -> Trial:
        """Measure a plan as it ships; the trial is also added to those so far."""
        results = plan_results(self.task, self.space, choices, name=name)
        trial = trial_of(
            self.task, self.yardstick, self.prices, results, name=name, kind=kind, choices=choices
        )
        same = next((t.name for t in self.trials if t.choices == choices), None)
        if same is not None:
            trial = replace(trial, note=f"the same as {same}")
        self.trials.append(trial)
        return trial

    def beyond(self, trial: Trial, other: Trial) -> Verdict:
        """What a measured plan loses beyond another one, paired by item."""
        first = read_results(self.space, trial_file(other.choices))
        second = read_results(self.space, trial_file(trial.choices))
        return judge(
            first,
            second,
            self.task.splits.select,
            Budget("loss", max_drop=0.0),
            measure=self.task.objective.measure,
        )

    def diverges_more(self, trial: Trial, other: Trial) -> Verdict:
        """How much farther than another plan a measured one is from the uncompressed model, paired
        by item: without the noise of labels. Of a loss that is not known at outputs what it loses
        beyond that one."""
        task = self.task
        if task.objective.curvature == "none":
            return self.beyond(trial, other)
        return judge(
            self._divergence(other),
            self._divergence(trial),
            self._compared(),
            Budget("loss", max_drop=0.0),
            measure=task.objective.measure,
        )

    def _compared(self) -> Split:
        select = self.task.splits.select
        return select.some(range(min(COMPARED, len(select.items))))

    def _divergence(self, trial: Trial) -> ItemResults:
        """A plan's divergence from the model that prices are of, on the first select items."""
        task, space = self.task, self.space
        file = f"{trial_file(trial.choices).removesuffix('.json')}-divergence.json"
        if not space.state.has(file):
            choices, quiet = trial.choices, replace(space, notes=[])
            title = f"solve {trial.name}"
            model, _ = apply_plan(task, quiet, choices, applied_in(choices), title=title)
            batches = self._compared().batches(task.settings.batch_size)
            with space.log.stage(f"divergence of {trial.name}", 1) as advance:
                found = divergences_on((task.model, model), task.objective, batches)
                advance(1)
            keep_results(space, file, found.finite())
        return read_results(space, file)

    # --------------------------------------------------------------------------- 1. the start

    def _measure_start(self) -> float:
        """Results of the uncompressed model; returns what the removed units alone cost."""
        task, space, select = self.task, self.space, self.task.splits.select
        with space.log.stage("measure the uncompressed model", 1) as advance:
            baseline = results_on(task, space, "select/baseline.json", task.uncompressed, select)
            advance(1)
        self.yardstick = Yardstick(baseline=baseline, start=baseline)
        spent = 0.0
        if task.original is not None:
            start = results_on(task, space, "select/start.json", task.model, select)
            self.yardstick = Yardstick(baseline=baseline, start=start)
            spent = self._spent()
        return spent

    def _spent(self) -> float:
        """What the removed units cost on select, in the budget's metric; it is noted."""
        task = self.task
        budget = self.budget if task.max_drop is not None else Budget("loss", max_drop=0.0)
        verdict = judge(
            self.yardstick.baseline,
            self.yardstick.start,
            task.splits.select,
            budget,
            measure=task.objective.measure,
        )
        measure = f"of {budget.metric}" if budget.metric in SHARES else task.objective.measure
        self.space.note(
            f"the removed units alone cost {verdict.drop:.4g} ± {verdict.stderr:.2g} {measure} on "
            "the select split; prices, predictions and trials come on top of that, the verdict "
            "holds for both together"
        )
        if task.max_drop is not None and verdict.drop >= task.max_drop:
            self.space.note("that is more than the budget: remove fewer units")
        return verdict.drop

    # ---------------------------------------------------------------------- 2. along the frontier

    def _first_plans(self, spent: float) -> Trial:
        task, rows = self.task, self.prices.ledger.rows
        if task.max_drop is None:
            return self.measure("plan 1", "plan", cheapest(rows, task.within))

        def measured(choices: dict[str, str]) -> Measurement:
            trial = self.measure(f"plan {len(self.trials) + 1}", "plan", choices)
            assert trial.accepted is not None
            reach = reach_of(trial)
            allowed = allowed_drop(task, min(0.0, spent), trial.drop_stderr, reach)
            return Measurement(
                accepted=trial.accepted,
                drop=trial.drop - spent,
                loss=trial.loss,
                stderr=finite_stderr(trial),
                allowed=allowed - spent,
            )

        found = search_plans(
            rows,
            measured,
            start=max(0.0, first_drop(task, self.prices.measured, spent) - spent),
            known=self.prices.measured,
            max_trials=task.settings.trials,
            within=task.within,
        )
        self.prices = self.prices.with_factors(found.factors)
        steps = zip(self.trials, found.steps, strict=True)
        self.trials = [replace(trial, expected=step.expected) for trial, step in steps]
        # Where none was accepted, the most cautious plan goes to the certificate all the same.
        return max(self.trials, key=lambda t: (t.choices == found.best, t.chance or 0.0, t.bytes))

    # ------------------------------------------------------------------------------- 3. controls

    def _controls(self, best: Trial) -> list[Control]:
        """Controls near the size of the best plan."""
        task, rows = self.task, self.prices.ledger.rows

        def plan(rows: Sequence[Row], size: int) -> dict[str, str]:
            return cheapest(rows, Within(max_bytes=size, same_option=task.same_option))

        size = best.bytes - task.fixed_bytes
        return controls(rows, task.layers, task.groups, size=size, plan=plan)

    def _plan_again(self, best: Trial) -> Trial:
        """Plan by prices that everything measured so far, controls included, has corrected.

        With ``max_drop`` for the smallest plan expected to lose no more than the best one, else for
        the least loss; measured until there is none that is new. Where no plan was accepted the
        most cautious one stays: the search has tried the lowest price there is.
        """
        task = self.task
        most = 1 if task.max_drop is not None else task.settings.trials - 1
        self._correct_prices()
        if best.accepted is False:
            return best
        for _ in range(most):
            tried = [trial.choices for trial in self.trials]
            new = (plan for plan in self._proposals(best) if plan not in tried)
            choices = next(new, None)
            if choices is None:
                break
            plans = sum(trial.kind == "plan" for trial in self.trials)
            again = self.measure(f"plan {plans + 1}", "plan", choices)
            self._correct_prices()
            if task.max_drop is None:
                best = min(best, again, key=_lost)
            elif again.accepted and again.bytes < best.bytes:
                best = again
        return best

    def _proposals(self, best: Trial) -> Iterator[dict[str, str]]:
        """The next plans by corrected prices: with what pairs of layers do to each other, and
        without. Which is nearer to the truth depends on how far the quadratic model holds; both are
        worth a measurement."""
        task = self.task
        pairs, fixed_size = self.prices.ledger.quadratic(), task.max_drop is None
        if pairs is not None:
            corrected_pairs = scaled(pairs, self.prices.factors)
            try:
                with warnings.catch_warnings():
                    # About the steps on the way, which are no plans.
                    warnings.simplefilter("ignore", RuntimeWarning)
                    if fixed_size:
                        found = corrected_pairs.cheapest(task.within)
                    else:
                        found = corrected_pairs.smaller(best.choices, task.within)
            except RuntimeError:
                # The solver gave up on a step; the plan without pairs is still there.
                found = None
            if found is not None:
                yield found
        at_most = None if fixed_size else self.prices.expected(best.choices)
        yield cheapest(self.prices.rows, task.within, max_loss=at_most)

    def _correct_prices(self) -> None:
        """Let everything measured correct the prices; where that is lost in noise, what was known
        before stays."""
        trials = [MeasuredPlan(t.choices, t.loss, finite_stderr(t)) for t in self.trials]
        measured = [*self.prices.measured, *trials]
        factors = corrections(self.prices.ledger.rows, measured) or self.prices.factors
        self.prices = self.prices.with_factors(factors)

    # -------------------------------------------------------------------- 4. pruning and rounding

    def _compare_kinds(self, best: Trial) -> tuple[Alternative, ...]:
        """What pruning and rounding in one plan are worth: the best plan, and of each alone the
        best one by the same corrected prices within the same limits, measured as a control. Where
        ``max_drop`` decides the size, it may be no larger than the best plan."""
        task = self.task
        within = task.within
        if task.max_drop is not None:
            within = replace(within, max_bytes=best.bytes + task.header_bytes)
        found, rows = [], self.prices.rows
        for kind in _kinds_alone(task):
            options = _options_of(task, kind)
            own = [row for row in rows if row.option in options[row.layer]]
            try:
                choices = cheapest(own, within)
            except Infeasible as error:
                missed = tuple(shortfall.name for shortfall in error.shortfalls)
                least = task.smallest_of(options)
                found.append(
                    Alternative(name=kind, trial=None, missed=missed, smallest_bytes=least)
                )
                continue
            trial = self.measure(kind, "control", choices)
            found.append(self._alternative(kind, trial, best))
        if not found:
            return ()
        return (self._alternative("pruning and rounding", best, best), *found)

    def _alternative(self, kind: str, trial: Trial, best: Trial) -> Alternative:
        more = self.beyond(trial, best)
        return Alternative(
            name=kind,
            trial=trial.name,
            bytes=trial.bytes,
            predicted=trial.predicted,
            predicted_stderr=trial.predicted_stderr,
            loss=trial.loss,
            loss_stderr=trial.loss_stderr,
            more=more.drop,
            more_stderr=more.stderr,
        )

    # ------------------------------------------------------------------------------ 5. the best

    def _best_measured(self, plan: Trial) -> Trial:
        """The plan, or the control that beats it, always one that keeps to the other limits.

        With ``max_drop`` the smallest that was accepted is wanted, and of several of one size the
        one that lost least; else the one that lost least. To have lost less than the plan, a
        control must differ by 1.645 standard errors: of several, one always lost less.
        """
        task = self.task
        controls_ = [t for t in self.trials if t.kind == "control"]
        eligible = [plan, *(t for t in controls_ if task.keeps_within(t.choices))]
        # 1. Of those that pass, the ones of the smallest size.
        if task.max_drop is not None:
            passing = [trial for trial in eligible if trial.accepted]
            if not passing:
                self.space.note(
                    "no plan measured on select reached the wanted chance of being certified"
                    + self._leftover()
                )
            smallest = min(trial.bytes for trial in passing or [plan])
            most = SAME_SIZE * smallest
            eligible = [trial for trial in passing or eligible if trial.bytes <= most]
        # 2. Against the plan, only those that lost clearly less.
        if plan in eligible:
            others = [trial for trial in eligible if trial is not plan]
            eligible = [plan, *(t for t in others if clearly_less(self.diverges_more(t, plan)))]
            self._note_level(plan, others)
        best = min(eligible, key=_lost)
        if best is plan:
            return plan
        return self._instead_of(plan, best, one_size=plan in eligible)

    def _note_level(self, plan: Trial, others: Sequence[Trial]) -> None:
        """Say where a control of the plan's size is no worse than the plan."""
        for trial in others:
            if trial.choices == plan.choices or trial.bytes < LEVEL_BYTES * plan.bytes:
                continue
            more = self.diverges_more(trial, plan)
            if more.drop <= CLEAR * more.stderr:
                self.space.note(
                    f"{trial.name} is level with {plan.name} at {trial.bytes:,} against "
                    f"{plan.bytes:,} bytes: it diverges by {more.drop:+.2g} ± {more.stderr:.1g} "
                    f"{self.task.objective.measure} more"
                )

    def _instead_of(self, plan: Trial, best: Trial, *, one_size: bool) -> Trial:
        """The control that is used instead of the plan; why is noted."""
        if one_size:
            why = f"lost {best.loss:.4g} on select, {plan.name} {plan.loss:.4g}"
        elif plan.accepted:
            why = f"has {best.bytes:,} bytes, {plan.name} {plan.bytes:,}"
        else:
            why = f"has {best.bytes:,} bytes; no plan was accepted"
        told = replace(best, beats_plan=True, note=f"a control beats the plan: it {why}")
        self.trials[self.trials.index(best)] = told
        self.space.note(f"the control {best.name} beats the plan and was used instead: it {why}")
        return told

    def _leftover(self) -> str:
        """What the limits on size and speed leave possible, for a budget whose drop was missed."""
        task = self.task
        if not task.most:
            return ""
        lowest = self.prices.expected(cheapest(self.prices.rows, task.within))
        return (
            f"; the lowest loss expected within {', '.join(task.most)} is {lowest:.3g} "
            f"{task.objective.measure}"
        )


def _kinds_alone(task: Task) -> list[str]:
    """What of `ALONE` can be held against both together: nothing, where only one of the two is
    offered."""
    offered = task.offered
    both = any(map(pruner_of, offered)) and any(map(quantizer_of, offered))
    if not both:
        return []
    found = []
    for name, (own, other) in ALONE.items():
        if any(own(option) and other(option) is None for option in offered):
            found.append(name)
    return found


def _options_of(task: Task, kind: str) -> dict[str, set[str]]:
    """Layer → keys of the options that a kind of `ALONE` has for it: those without the other part,
    or all, where every one has it."""
    _, other = ALONE[kind]
    found = {}
    for name in task.layers:
        options = task.options[name]
        without = {option.key for option in options if other(option) is None}
        found[name] = without or {option.key for option in options}
    return found
