"""What the verbs of `curvprune.api` do with a task: compress, remove units, recover."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from curvprune.artifact import describe, unread_note, why_not_portable
from curvprune.certificate import IN_THIS_PROCESS, Verdict, counted, judge, loss_for
from curvprune.compression import Recovery, RecoveryItems, Solved, Training, recover_
from curvprune.files import StageLog
from curvprune.model import (
    Batch,
    Loss,
    Split,
    Splits,
    as_split,
    evaluate,
    find_layers,
    remember_seen_,
    seen_by,
    split_items,
)
from curvprune.options import Option
from curvprune.planning import Budget
from curvprune.pricing import Ledger
from curvprune.run.apply import apply_plan, unpriced_plan
from curvprune.run.arguments import (
    Arguments,
    Data,
    check_metric,
    objective_of,
    part_of,
    splits_from,
    task_from,
    warn_caller,
)
from curvprune.run.pipeline import choose_and_certify
from curvprune.run.price import alike, solve_and_price, spread_zeros
from curvprune.run.results import Result, StructuredResult
from curvprune.run.task import with_work
from curvprune.structured import Structured, prune_units

APPLIED = "applied/1"


def compress_model(
    model: nn.Module,
    data: Data,
    options: Sequence[Option],
    budget: Budget | None,
    told: Arguments,
    *,
    inplace: bool,
) -> Result:
    """One option of ``options`` for every layer: see `curvprune.compress`."""
    own_copy = inplace or told.device is not None
    with tempfile.TemporaryDirectory() as folder:
        task, space = task_from(model, data, options, budget, Path(folder), told)
        if budget is None:
            # 1. There is one plan; it is solved in one pass and measured by nobody.
            choices = {name: options[0].key for name in task.layers}
            compressed, solved = apply_plan(task, space, choices, APPLIED, inplace=own_copy)
            result = Result(
                model=compressed,
                plan=unpriced_plan(task, space, choices),
                verdict=None,
                ledger=None,
                analysis=None,
                trials=(),
                solved=solved,
                portable=task.target.portable,
                seen=task.splits.seen(),
            )
        else:
            # 2. The whole road, as a recipe goes it.
            priced = solve_and_price(task, space)
            selection, shipped = choose_and_certify(task, space, priced)
            result = Result(
                model=task.storage.read(shipped.folder),
                plan=shipped.plan,
                verdict=shipped.verdict,
                ledger=priced.prices.ledger,
                analysis=priced.analysis,
                trials=(*selection.trials, *shipped.applied),
                solved=shipped.solved,
                portable=task.target.portable,
                seen=task.splits.seen(),
            )
    return _handed_over(result, model, inplace=inplace)


def price_model(model: nn.Module, data: Data, options: Sequence[Option], told: Arguments) -> Ledger:
    """The ledger alone: see `curvprune.price`."""
    with tempfile.TemporaryDirectory() as folder:
        task, space = task_from(model, data, options, None, Path(folder), told, priced=True)
        task = with_work(task)
        return solve_and_price(task, space).prices.ledger


def allocate_zeros(
    model: nn.Module,
    data: Data,
    options: Sequence[Option],
    sparsity: float,
    told: Arguments,
    *,
    inplace: bool,
) -> Result:
    """A share of all layers' weights pruned where it costs least: see `curvprune.prune`."""
    # An iterator can be read once, and a loader that shuffles gives other items the second time.
    known = data if isinstance(data, Splits) else as_split(data)
    with tempfile.TemporaryDirectory() as folder:
        task, space = task_from(model, known, options, None, Path(folder), told, priced=True)
        priced = solve_and_price(
            task,
            space,
            chosen=True,
            reference=alike(task, sparsity),
            next_plan=lambda ledger: spread_zeros(task, ledger, sparsity),
        )
        ledger = priced.prices.ledger
        choices = spread_zeros(task, ledger, sparsity)
        predicted = ledger.predict(choices)
        if isinstance(known, Split):
            # Prices are taken: all items serve to solve.
            task = replace(task, splits=replace(task.splits, calibrate=known))
        own_copy = inplace or told.device is not None
        compressed, solved = apply_plan(task, space, choices, APPLIED, inplace=own_copy)
        plan = unpriced_plan(task, space, choices)
        plan = replace(plan, predicted=predicted.value, predicted_stderr=predicted.stderr)
        result = Result(
            model=compressed,
            plan=plan,
            verdict=None,
            ledger=ledger,
            analysis=priced.analysis,
            trials=(),
            solved=solved,
            portable=task.target.portable,
            seen=task.splits.seen(),
        )
    return _handed_over(result, model, inplace=inplace)


def _handed_over(result: Result, model: nn.Module, *, inplace: bool) -> Result:
    """The result with modules in the modes of the input model, whose weights are overwritten where
    that was asked for."""
    compressed = result.model
    remember_seen_(compressed, result.seen)
    for module, original in zip(compressed.modules(), model.modules(), strict=True):
        module.training = original.training
    if not inplace or compressed is model:
        return result
    own = find_layers(model)
    for name, layer in find_layers(compressed).items():
        own[name].write_(layer.as_matrix(layer.weight.detach()))
    remember_seen_(model, result.seen)
    return replace(result, model=model)


# ---------------------------------------------------------------------------------- hidden units


def remove_units(
    model: nn.Module, data: Data, asked: Structured, budget: Budget | None, told: Arguments
) -> StructuredResult:
    """Hidden units removed and what stays compensated: see `curvprune.prune`."""
    if budget is not None and (budget.max_drop is None or budget.limited):
        raise ValueError(
            "prune(structured=...): a budget certifies here: it needs max_drop, nothing else; "
            "sizes are asked by share"
        )
    # 1. The data and the loss.
    settings = told.knobs
    splits = splits_from(data, seed=settings.seed, budget=budget, priced=True)
    if budget is not None and (leak := splits.leak()) is not None:
        warn_caller(leak)
    seen = splits.seen()
    if told.device is not None:
        model = copy.deepcopy(model).to(told.device)
    objective = objective_of(told.loss, model, splits.calibrate, budget)
    check_metric(budget, objective)
    # 2. The units, and whether a config can say what is left.
    pruned = prune_units(
        model, objective, splits, asked, seed=settings.seed, batch_size=settings.batch_size
    )
    why = describe(model, pruned.model, pruned.uniform_widths(), pruned.dropped)
    unread = why_not_portable(pruned.model)
    if why is None and unread:
        why = unread_note(pruned.model, unread)
    notes = (*pruned.notes, *splits.calibrate.left_out())
    notes = notes if why is None else (*notes, why)
    # 3. The verdict.
    verdict = None
    if budget is not None:
        models = (model, pruned.model)
        size = settings.batch_size
        verdict = _judge(models, splits.certify, budget, objective, size, seen=seen)
    remember_seen_(pruned.model, seen)
    latency = None
    if pruned.latency is not None:
        latency = (pruned.latency[1], pruned.latency[0])
    return StructuredResult(
        model=pruned.model,
        cuts={name: (left, pruned.units[name]) for name, left in pruned.left.items()},
        macs=(pruned.macs[1], pruned.macs[0]),
        parameters=(pruned.parameters[1], pruned.parameters[0]),
        predicted=pruned.predicted,
        verdict=verdict,
        ledger=pruned.ledger,
        notes=notes,
        portable=why is None,
        latency=latency,
        seen=seen,
    )


def _judge(
    models: tuple[nn.Module, nn.Module],
    certify: Split,
    budget: Budget,
    objective: Loss,
    batch_size: int,
    *,
    seen: frozenset[bytes],
) -> Verdict:
    """The paired verdict of (uncompressed, compressed) on a split; of items that were ``seen``
    before it says so."""
    before, after = (evaluate(m, certify.batches(batch_size), objective) for m in models)
    verdict = judge(before, after, certify, budget, measure=objective.measure)
    return counted([verdict.noting(certify.leak(seen))], certify, IN_THIS_PROCESS)[0]


# -------------------------------------------------------------------------------------- recovery


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverySplits:
    """What a recovery trains on, what chooses its best state, and what may certify it; ``dealt``
    are the splits, where the data were dealt out here."""

    train: Split
    select: Split
    certify: Split | None = None
    dealt: Splits | None = None

    def seen(self) -> frozenset[bytes]:
        return self.train.digests() | self.select.digests()


def recover_model(
    compressed: Result | StructuredResult | nn.Module,
    baseline: nn.Module,
    splits: RecoverySplits,
    training: Training,
    budget: Budget | None,
    told: Arguments,
) -> Result | StructuredResult | Recovery:
    """A short training of what the compressed form leaves free: see `curvprune.recover`."""
    # 1. What must not be.
    own = compressed if isinstance(compressed, nn.Module) else compressed.model
    if own is baseline:
        raise ValueError(
            "recover: the compressed model is the baseline itself (inplace=True?); pass the model "
            "as it was before"
        )
    seen = splits.seen() | seen_by(own)
    if not isinstance(compressed, nn.Module):
        seen |= compressed.seen
    _check_leak(splits, seen)

    # 2. Copies, where they are to be worked on, and the loss.
    model = copy.deepcopy(own)
    if told.device is not None:
        model, baseline = model.to(told.device), copy.deepcopy(baseline).to(told.device)
    objective = objective_of(told.loss, baseline, splits.train)
    check_metric(budget, objective)
    judged = loss_for(budget, objective, baseline)

    # 3. The training. Of a plain module nothing is known; a smaller model has nothing rounded.
    solved: Mapping[str, Solved] | None = None
    if isinstance(compressed, Result):
        solved = compressed.solved
    elif isinstance(compressed, StructuredResult):
        solved = {}
    items = RecoveryItems(train=splits.train, select=splits.select)
    log = StageLog(show=told.progress)
    with log.stage("recover", training.steps or 1) as advance:
        recovery = recover_(model, solved, baseline, objective, items, training, advance=advance)
    remember_seen_(model, seen)
    if isinstance(compressed, nn.Module):
        return recovery

    # 4. A verdict of its own: an earlier one was about another model.
    verdict = None
    if budget is not None:
        assert splits.certify is not None
        models = (baseline, model)
        size = training.batch_size
        verdict = _judge(models, splits.certify, budget, judged, size, seen=seen)
    if isinstance(compressed, Result):
        return replace(
            compressed,
            model=model,
            verdict=verdict,
            recovery=recovery,
            seen=seen,
            solved=recovery.solved,
        )
    return replace(compressed, model=model, verdict=verdict, recovery=recovery, seen=seen)


def _check_leak(splits: RecoverySplits, seen: frozenset[bytes]) -> None:
    """Items that have made or chosen the model must not certify it: refused where the data were
    dealt out here, warned of where the caller dealt them."""
    if splits.certify is None:
        return
    leak = splits.certify.leak(seen)
    if leak is None:
        return
    # More than what the data itself repeats.
    if splits.dealt is not None and leak != splits.dealt.leak():
        raise ValueError(
            f"recover: {leak}: compress with a budget, the same data and the same seed, which sets "
            "them aside, or pass Splits with a certify split of its own"
        )
    warn_caller(leak)


def recovery_splits(
    data: Data, *, select: Iterable[Batch] | Split | None, budget: Budget | None, seed: int
) -> RecoverySplits:
    """The data of a recovery dealt to its purposes.

    Of `Splits` the recover (or calibrate), select and certify splits; with a budget the data are
    dealt out as `compress` does; else every fourth item chooses, unless ``select`` is given.
    """
    if isinstance(data, Splits):
        found = RecoverySplits(train=data.training, select=data.select, certify=data.certify)
    elif budget is not None:
        if isinstance(data, Split):
            raise ValueError(
                "a budget needs four splits: pass Splits(calibrate=, price=, select=, certify=)"
            )
        dealt = split_items(data, seed=seed)
        found = RecoverySplits(
            train=dealt.calibrate, select=dealt.select, certify=dealt.certify, dealt=dealt
        )
    else:
        split = as_split(data)
        found = RecoverySplits(train=split, select=split)
        if select is None:
            found = _every_fourth(split)
    if select is None:
        return found
    return replace(found, select=as_split(select))


def _every_fourth(split: Split) -> RecoverySplits:
    """Three quarters to train on and one to choose by."""
    count = len(split.items)
    if count < 2:
        raise ValueError(
            "recover: at least two items are needed, to train on and to choose by; or pass select="
        )
    chosen = set(range(min(3, count - 1), count, 4))
    rest = [i for i in range(count) if i not in chosen]
    return RecoverySplits(train=part_of(split, rest), select=part_of(split, sorted(chosen)))
