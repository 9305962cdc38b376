"""Results of models on a split, kept in the workspace, and the chance that select sees."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import nn

from curvprune.certificate import (
    Verdict,
    fewest_clusters,
    fewest_without_spread,
    probability_of_certifying,
)
from curvprune.model import (
    BROKEN,
    Batch,
    ItemResults,
    Loss,
    Split,
    evaluate,
    evaluating,
    to_device,
)
from curvprune.planning import MeasuredPlan
from curvprune.run.task import Task
from curvprune.run.workspace import Workspace
from curvprune.schema import Number, decode, encode

ACCEPTABLE = 0.80  # predicted probability of being certified that a plan must have on select
# (metric, quantile) of budgets whose drop is the rise of the mean loss.
AS_LOSS = (("loss", None), ("kl", None))
LEAST_OF_BUDGET = 0.5  # the first plan is to spend as much of its budget at least
CLEAR = 1.645  # standard errors: one-sided 95 %


@dataclass(frozen=True, kw_only=True, slots=True)
class ResultsRecord:
    """`ItemResults` as a file; ``of`` is the hash of the saved model that they are of, if any."""

    loss: list[float]
    count: list[float]
    correct: list[Number]
    of: str = ""


def results_on(
    task: Task, space: Workspace, name: str, model: nn.Module, split: Split, *, of: str = ""
) -> ItemResults:
    """Evaluate a model on a split, or read what an earlier process measured. Results of another
    saved model than ``of`` (see `are_of`) must be gone.

    Items for which a compressed model returns no finite numbers count as `BROKEN`, and are noted.
    Raises ``ValueError`` where the uncompressed model returns none.
    """
    if not space.state.has(name):
        results = evaluate(model, split.batches(task.settings.batch_size), task.objective)
        if model is task.uncompressed:
            _check_finite(results)
        keep_results(space, name, results.finite(_worst(task, space, split)), of=of)
    results = read_results(space, name)
    worst = _worst(task, space, split)
    broken = int((results.loss >= worst * results.count.clamp_min(1)).sum())
    if broken and model is not task.uncompressed:
        space.note(
            f"for {broken} of {len(results.loss)} items a plan's outputs are no finite numbers: "
            f"they count as {worst:g} {task.objective.measure.split('/')[0]} for each position"
        )
    return results


@torch.no_grad()
def divergences_on(
    models: tuple[nn.Module, nn.Module], objective: Loss, batches: Iterable[Batch]
) -> ItemResults:
    """What the second of two models costs each item beyond the slope of the loss at the first: for
    a likelihood their divergence. Cost: a forward pass of both."""
    before, after = models
    device = next(after.parameters()).device
    losses, counts = [], []
    with evaluating(before), evaluating(after):
        for batch in batches:
            own = to_device(batch, device)
            first, second = objective.outputs(before, own), objective.outputs(after, own)
            losses.append(objective.rises(first, second, own).double().cpu())
            counts.append(objective.counts(first, own).double().cpu())
    loss = torch.cat(losses)
    return ItemResults(loss=loss, count=torch.cat(counts), correct=torch.full_like(loss, torch.nan))


def _worst(task: Task, space: Workspace, split: Split) -> float:
    """What a position counts for which a model returns no finite numbers: out of any budget's
    reach, also where the losses of the uncompressed model are large numbers."""
    purpose = "certify" if split is task.splits.certify else "select"
    name = f"{purpose}/baseline.json"
    if not space.state.has(name):
        return BROKEN
    baseline = read_results(space, name)
    largest = float((baseline.loss / baseline.count.clamp_min(1)).abs().max())
    return max(BROKEN, 10 * largest)


def _check_finite(results: ItemResults) -> None:
    bad = int((~results.loss.isfinite()).sum())
    if bad:
        raise ValueError(
            f"the uncompressed model's loss is no finite number for {bad} of "
            f"{len(results.loss)} items: nothing can be compared with it; look at the model's "
            "weights and at the data"
        )


def keep_results(space: Workspace, name: str, results: ItemResults, *, of: str = "") -> None:
    """Write what was measured where `results_on` reads it."""
    record = ResultsRecord(
        of=of,
        loss=results.loss.tolist(),
        count=results.count.tolist(),
        correct=results.correct.tolist(),
    )
    space.state.write_json(name, encode(record))


def are_of(space: Workspace, name: str, of: str) -> bool:
    """Whether there are results under this name, of the saved model with this hash."""
    return space.state.has(name) and _read(space, name).of == of


def _read(space: Workspace, name: str) -> ResultsRecord:
    source = str(space.state.path(name))
    return decode(ResultsRecord, space.state.read_json(name), source=source)


def read_results(space: Workspace, name: str) -> ItemResults:
    """What was measured under this name."""
    record = _read(space, name)
    return ItemResults(
        loss=torch.tensor(record.loss, dtype=torch.float64),
        count=torch.tensor(record.count, dtype=torch.float64),
        correct=torch.tensor(record.correct, dtype=torch.float64),
    )


# ------------------------------------------------------------------------------------ the chance


def chance_at(task: Task, drop: float, stderr: float, bound: float) -> float:
    """Predicted probability that a plan with this drop and error on select is certified.

    Args:
        drop, stderr: on the select split, in the budget's measure.
        bound: that of a test on select with this drop.

    Beyond what normal losses of so many documents make of ``stderr``, the bound lies further out
    where losses are skewed. On certify there are usually more documents. The first part falls with
    their root and has a smaller quantile; the second falls in proportion, as in the certificate's
    own ``needed``.
    """
    assert task.budget is not None and task.budget.max_drop is not None
    confidence = task.budget.confidence
    if task.budget.quantile is not None:
        # `foreseen` is of the certify split: its bound is that of the certificate.
        return probability_of_certifying(
            drop,
            stderr,
            0.0,
            max_drop=task.budget.max_drop,
            confidence=confidence,
            reach=max(bound - drop, 0.0),
        )
    # Infinite where all documents of select lose the same: what certify will say, its number says.
    if stderr == 0 and not math.isfinite(bound):
        bound = drop
    here = len(set(task.splits.select.documents))
    there = len(set(task.splits.certify.documents))
    if there < fewest_to_certify(confidence, stderr):
        return 0.0
    fewer = here / there
    t_here = float(stats.t.ppf(confidence, max(1, here - 1)))
    t_there = float(stats.t.ppf(confidence, max(1, there - 1)))
    straight = min(bound - drop, t_here * stderr)
    reach = straight * fewer**0.5 * t_there / t_here + (bound - drop - straight) * fewer
    return probability_of_certifying(
        drop,
        stderr,
        stderr * fewer**0.5,
        max_drop=task.budget.max_drop,
        confidence=confidence,
        reach=reach,
    )


def fewest_to_certify(confidence: float, stderr: float) -> int:
    """The fewest documents with which a certify split can certify: more where those at hand all
    lose the same (``stderr`` 0), which says nothing of those that are not at hand."""
    alpha = 1 - confidence
    return fewest_clusters(alpha) if stderr > 0 else fewest_without_spread(alpha)


def finite_reach(verdict: Verdict) -> float:
    """From drop to bound; 0 where all documents lose the same, and too few for a bound do."""
    reach = verdict.bound - verdict.drop
    return reach if math.isfinite(reach) else 0.0


def allowed_drop(task: Task, low: float, stderr: float, reach: float) -> float:
    """The drop from ``low`` to the budget at which a plan's chance falls to `ACCEPTABLE`, with this
    error on select and this distance from a drop to its bound."""
    assert task.max_drop is not None
    high = task.max_drop
    for _ in range(40):
        middle = (low + high) / 2
        if chance_at(task, middle, stderr, middle + reach) >= ACCEPTABLE:
            low = middle
        else:
            high = middle
    return low


def first_drop(task: Task, known: Sequence[MeasuredPlan], low: float) -> float:
    """The drop that the first plan is to have: the budget's, less the room that its error will need
    on the certify split, as far as plans ``known`` so far tell that error; no less than ``low``."""
    assert task.max_drop is not None and task.budget is not None
    last = known[-1] if known else None
    as_loss = (task.budget.metric, task.budget.quantile) in AS_LOSS
    if last is None or not as_loss or not (last.loss > 0 and math.isfinite(last.stderr)):
        return task.max_drop
    # Errors grow about as losses do, and fall with the root of the number of items.
    items, there = len(task.splits.price.items), len(task.splits.select.items)
    stderr = last.stderr * task.max_drop / last.loss * (items / there) ** 0.5
    allowed = allowed_drop(task, min(0.0, low), stderr, CLEAR * stderr)
    return max(allowed, LEAST_OF_BUDGET * task.max_drop)
