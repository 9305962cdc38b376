"""The verbs that compress: `price`, `frontier`, `compress`, `quantize`, `prune`, `recover`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn

from curvprune.artifact import Portable
from curvprune.compression import Recovery, Training
from curvprune.model import (
    Batch,
    LossLike,
    Split,
    find_groups,
    named_loss,
    read_request,
    takes_models,
)
from curvprune.options import (
    Cast,
    Keep,
    Option,
    Prune,
    PruneCast,
    Quantize,
)
from curvprune.planning import Budget, FrontierPlan, Limit, Plan
from curvprune.planning import frontier as nested_plans
from curvprune.pricing import Ledger, limits_of
from curvprune.run import (
    Arguments,
    Data,
    Result,
    Settings,
    StructuredResult,
    allocate_zeros,
    compress_model,
    price_model,
    recover_model,
    recovery_splits,
    remove_units,
)
from curvprune.structured import Structured
from curvprune.targets import vllm_bits

ALLOCATED = (-0.2, -0.1, 0.0, 0.1, 0.2)  # shares around the common one that a layer may get


@named_loss
@takes_models("model")
def price(
    model: nn.Module,
    data: Data,
    *,
    options: Sequence[Option],
    loss: LossLike = "auto",
    layers: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    labels: int = 2,
    curvature: Literal["fisher", "diagonal", "kfac", "hessian", "input", "empirical"] = "fisher",
    measure_above: float | None = 0.005,
    portable: Portable = True,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Ledger:
    """Bytes and predicted loss increase (nats, ± standard error) of every option of every layer.

    Every option is solved (one forward pass over the data), then priced along its own change (one
    forward and ``labels`` backward passes per item). ``curvature``: ``"fisher"`` along the change,
    ``"diagonal"`` of the Fisher, ``"kfac"``, ``"hessian"`` along the change (on the data's labels;
    two gradients per item and change), ``"input"`` (error of the layer's outputs, no unit of
    loss) or ``"empirical"``: of the Fisher from the data's own labels, a stand-in for losses that
    are not known at outputs. The highest prices are measured instead, four at a time (five
    forward passes per item),
    until they agree with the quadratic ones, at most 16 and none below ``measure_above`` nats (see
    `curvprune.pricing.divergences`). ``portable``: of which artifact the bytes are, as in
    `Settings`. ``exclude``: globs of layers to leave out. Layers that the loss does not depend on
    have no price; a warning names them. Raises ``ValueError`` naming the layer that an option does
    not fit.
    """
    settings = Settings(
        portable=portable,
        curvature=curvature,
        measure_above=measure_above,
        labels=labels,
        seed=seed,
    )
    told = Arguments(
        loss=loss,
        layers=layers,
        exclude=exclude,
        settings=settings,
        device=device,
        progress=progress,
    )
    return price_model(model, data, options, told)


def frontier(
    ledger: Ledger,
    *,
    points: int = 33,
    budget: Budget | None = None,
    same_option: str | Sequence[str | Sequence[str]] = (),
) -> list[Plan]:
    """Plans for every budget at once, from the smallest model to the one with the lowest predicted
    loss: nested, so that from one to the next layers only move to larger options. ``bytes`` are
    those of the priced layers.

    Args:
        points: the most plans to return; both ends are among them.
        budget: limits on size and speed. Plans beyond them are left out, and ``uses`` says how much
            each takes of them. ``max_bytes`` counts the priced layers, as ``bytes`` does.
        same_option: as for `compress`.

    Cost: no forward pass and no integer program. Raises ``ValueError`` for fewer than two points,
    groups that cannot be, a budget with ``max_drop``, or one that none of these plans keeps to
    (`compress` may still find one that does: it plans for the limits, where the frontier trades
    bytes against loss alone).
    """
    if budget is not None and budget.max_drop is not None:
        raise ValueError("frontier: its plans are for every drop; pass a budget without max_drop")
    # 1. Groups and limits.
    options: dict[str, list[str]] = {}
    for row in ledger.rows:
        options.setdefault(row.layer, []).append(row.option)
    groups = find_groups(read_request(same_option), options)
    limits = () if budget is None else limits_of(budget, ledger.rows, ledger.work)

    # 2. The plans within them: of all that there are, where some will be left out.
    most = points if budget is None else len(ledger.rows) + 2
    nested = nested_plans(ledger.rows, points=most, same_option=groups.layers)
    found = [plan for plan in nested if _keeps_within(plan, budget, limits)]
    if not found:
        raise ValueError(
            "frontier: none of its plans keeps to the budget; compress(budget=...) plans for its "
            "limits"
        )
    places = np.linspace(0, len(found) - 1, min(points, len(found))).round().astype(int)

    # 3. What they are predicted to lose.
    plans = []
    for place in np.unique(places):
        plan = found[place]
        predicted = ledger.predict(plan.choices)
        plans.append(
            Plan(
                choices=plan.choices,
                bytes=plan.bytes,
                predicted=predicted.value,
                predicted_stderr=predicted.stderr,
                notes=groups.notes,
                uses={limit.name: limit.used(plan.choices) for limit in limits},
            )
        )
    return plans


def _keeps_within(plan: FrontierPlan, budget: Budget | None, limits: Sequence[Limit]) -> bool:
    """Whether a plan keeps to a budget's limits on size and speed."""
    if budget is None:
        return True
    if budget.max_bytes is not None and plan.bytes > budget.max_bytes:
        return False
    return all(limit.used(plan.choices) <= limit.most for limit in limits)


@named_loss
@takes_models("model", rewritten=True)
def compress(
    model: nn.Module,
    data: Data,
    *,
    options: Sequence[Option],
    budget: Budget | None = None,
    loss: LossLike = "auto",
    layers: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    same_option: str | Sequence[str | Sequence[str]] = (),
    settings: Settings | None = None,
    device: str | torch.device | None = None,
    inplace: bool = False,
    progress: bool = False,
) -> Result:
    """Give every layer one of ``options`` so that the model is as small as the budget allows
    (without ``max_drop``: as good as its limits on size and speed allow), and certify it.

    Without a budget there must be exactly one option, which every layer gets. With one, `Keep` is
    always among the options. With ``Budget(max_drop=...)`` the data are split (or pass `Splits`),
    plans are measured on the select split and the verdict comes from the certify split.

    A layer stays as it is, with a note that says how many bytes that takes, where it could not be
    solved or priced: the forward pass never uses its weight, or hands it to a function whose input
    is not known; with a budget, the loss does not depend on it. Without a budget a layer that is
    asked for by its full name and never used is rounded to nearest, or pruned by magnitude.

    Args:
        layers: globs on names of layers; ``exclude``: those of layers to leave as they are.
        same_option: layers that must get the same option, because a serving engine runs them as
            one: lists of globs, each of which makes a group of its layers in every parent module,
            for example ``[["*.gate_proj", "*.up_proj"]]``; ``"fused"`` stands for query, key and
            value, and for gate and up, under their usual names (`curvprune.model.groups.FUSED`).
        inplace: overwrite the input model, which without a budget saves the memory of a copy (on
            the CPU all but a half of the changed weights). If the call is interrupted, the layers
            visited by then stay compressed.

    Raises:
        ValueError: an option that does not fit a layer, a budget that the options cannot reach, too
            little data; a glob that matches nothing, a layer in two groups, layers of a group that
            are offered different options (one of them left out by ``layers``).
    """
    if not options:
        raise ValueError("compress: no options given; pass for example options=[Quantize(bits=4)]")
    if budget is None and len(options) != 1:
        raise ValueError(
            f"compress: without a budget pass exactly one option, got {len(options)}; or pass "
            "budget="
        )
    offered = list(options)
    if budget is not None and Keep() not in offered:
        offered.append(Keep())
    told = Arguments(
        loss=loss,
        layers=layers,
        exclude=exclude,
        same_option=same_option,
        settings=settings,
        device=device,
        progress=progress,
    )
    return compress_model(model, data, offered, budget, told, inplace=inplace)


def quantize(
    model: nn.Module,
    data: Data,
    *,
    bits: int | Sequence[int] | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    budget: Budget | None = None,
    **arguments: Any,
) -> Result:
    """Round every layer to ``bits`` bits, or, with a budget, each layer to its own width (``bits``:
    the widths offered, by default 2, 3, 4, 5, 6 and 8, or those that vLLM runs with
    ``Settings(target="vllm")``).

    Args:
        group_size: inputs that share a scale; ``None`` for one scale per output channel.
        arguments: passed on to `compress`.
    """
    if bits is None:
        bits = _widths_offered(budget, arguments.get("settings"))
    widths = list(bits) if isinstance(bits, Iterable) else [bits]
    options = [Quantize(bits=b, group_size=group_size, symmetric=symmetric) for b in widths]
    return compress(model, data, options=options, budget=budget, **arguments)


def _widths_offered(budget: Budget | None, settings: Settings | None) -> int | Sequence[int]:
    """The widths of `quantize` where none are given."""
    if budget is None:
        return 4
    if settings is not None and settings.target == "vllm":
        return vllm_bits()
    return (2, 3, 4, 5, 6, 8)


@named_loss
@takes_models("model", rewritten=True)
def prune(
    model: nn.Module,
    data: Data,
    *,
    sparsity: float | Sequence[float] | None = None,
    pattern: str | None = None,
    allocate: bool = False,
    dtype: str | None = None,
    structured: float | Mapping[str, float] | Structured | None = None,
    uniform: bool = False,
    budget: Budget | None = None,
    **arguments: Any,
) -> Result | StructuredResult:
    """Set weights to zero with the survivors refitted (ALPS): a share of each layer, or N:M with
    ``pattern="2:4"``. Or, with ``structured``, remove whole hidden units: the model becomes smaller
    and faster.

    With a budget, ``sparsity`` lists the shares offered to the planner. Of a model that is not
    transformers' own, and with ``Settings(target="curvprune")``, the file holds a bitmask and the
    kept weights alone, where that is smaller; transformers needs the zeros. ``arguments`` are
    passed on to `compress`.

    Args:
        allocate: prune most where it costs least. ``sparsity`` is then the share of all layers
            together; each gets its own, at most 0.2 away, from an exact plan on prices (`price`) of
            five shares. Costs five solves and the pricing pass more.
        dtype: ``"float16"`` or ``"bfloat16"``: the type in which the file holds what is kept;
            ``None`` for the model's.
        structured: the share of multiply-adds to remove, from MLP widths, key-value heads with
            their query heads, and channels, wherever it costs least; of ``of="latency"`` or
            ``of="parameters"`` instead, if that is given; ``{"mlp": 0.25}`` for a share of the
            units of a kind; or a `Structured` with every choice there is. What stays is
            compensated. A ``budget`` with ``max_drop`` then certifies the result. ``arguments``:
            ``loss``, ``settings`` and ``device``, and the fields of `Structured`.
        uniform: one width per kind, so that a plain transformers config describes the result.
    """
    if structured is not None:
        if sparsity is not None or pattern is not None or dtype is not None:
            raise ValueError(
                "prune: structured goes without sparsity, pattern and dtype; prune the result "
                "again for both"
            )
        if allocate:
            raise ValueError(
                "prune: structured always goes where it costs least; leave allocate out"
            )
        return _prune_structured(model, data, structured, uniform, budget, arguments)
    if uniform:
        raise ValueError(
            "prune: uniform goes with structured, one width per kind; a sparsity without allocate "
            "is the same for every layer as it is: leave uniform out"
        )
    if allocate:
        if not isinstance(sparsity, float) or pattern is not None or budget is not None:
            raise ValueError(
                "prune: allocate=True spreads one share, for example sparsity=0.5, without "
                "pattern; with a budget list the shares to choose from, for example "
                "sparsity=[0.3, 0.5, 0.7]"
            )
        return _prune_allocated(model, data, sparsity, dtype, arguments)
    shares: list[float] = []
    if isinstance(sparsity, (int, float)):
        shares = [sparsity]
    elif sparsity is not None:
        shares = list(sparsity)
    prunings = [Prune(sparsity=share) for share in shares]
    if pattern is not None:
        prunings.append(Prune(pattern=pattern))
    options = _stored(prunings, dtype)
    if not options:
        raise ValueError(
            'prune: pass sparsity (for example 0.5), pattern ("2:4") or structured (for example '
            "0.3)"
        )
    return compress(model, data, options=options, budget=budget, **arguments)


def _stored(prunings: Sequence[Prune], dtype: str | None) -> list[Option]:
    """The options that store what is kept as ``dtype``."""
    if dtype is None:
        return list(prunings)
    return [PruneCast(prune=prune, cast=Cast(dtype=dtype)) for prune in prunings]


def _prune_allocated(
    model: nn.Module, data: Data, sparsity: float, dtype: str | None, arguments: dict[str, Any]
) -> Result:
    asked = Prune(sparsity=sparsity).sparsity  # refuses what is not a share
    assert asked is not None
    shares = [round(asked + step, 6) for step in ALLOCATED]
    prunings = [Prune(sparsity=share) for share in shares if 0 < share < 1]
    inplace = arguments.pop("inplace", False)
    told = _told("prune(allocate=True)", arguments, {f.name for f in fields(Arguments)})
    return allocate_zeros(model, data, _stored(prunings, dtype), asked, told, inplace=inplace)


def _prune_structured(
    model: nn.Module,
    data: Data,
    structured: float | Mapping[str, float] | Structured,
    uniform: bool,
    budget: Budget | None,
    arguments: dict[str, Any],
) -> StructuredResult:
    # 1. What is about the units, and what about everything else.
    about_units = {field.name for field in fields(Structured)} - {"share", "uniform"}
    choices = {name: value for name, value in arguments.items() if name in about_units}
    others = {name: value for name, value in arguments.items() if name not in about_units}
    known = {"loss", "settings", "device"}
    if unknown := sorted(set(others) - known):
        raise ValueError(
            f"prune(structured=...): unknown argument {unknown[0]!r}; expected some of "
            f"{sorted(about_units)}"
        )
    # 2. Every choice there is.
    if isinstance(structured, Structured):
        asked = replace(structured, **choices)
        if uniform:
            asked = replace(asked, uniform=True)
    else:
        asked = Structured(share=structured, uniform=uniform, **choices)
    return remove_units(model, data, asked, budget, Arguments(**others))


def _told(verb: str, arguments: dict[str, Any], known: set[str]) -> Arguments:
    """Arguments passed on, or an error that names one that is not known."""
    if unknown := sorted(set(arguments) - known):
        raise TypeError(
            f"{verb}: unknown argument {unknown[0]!r}; expected some of {sorted(known)}"
        )
    return Arguments(**arguments)


@overload
def recover(compressed: Result, baseline: nn.Module, data: Data, **arguments: Any) -> Result: ...
@overload
def recover(
    compressed: StructuredResult, baseline: nn.Module, data: Data, **arguments: Any
) -> StructuredResult: ...
@overload
def recover(
    compressed: nn.Module, baseline: nn.Module, data: Data, **arguments: Any
) -> Recovery: ...
@takes_models("compressed", "baseline", rewritten=True)
def recover(
    compressed: Result | StructuredResult | nn.Module,
    baseline: nn.Module,
    data: Data,
    *,
    select: Iterable[Batch] | Split | None = None,
    budget: Budget | None = None,
    objective: LossLike = "auto",
    device: str | torch.device | None = None,
    progress: bool = False,
    **training: Any,
) -> Result | StructuredResult | Recovery:
    """Train what the compressed form leaves free, for a short time, towards the uncompressed
    model's outputs: weights that were not pruned, scales of rounded ones (with ``codes=True`` their
    codes), and all that is stored as floats. Zeros stay, so the size does not change. The state
    with the lowest loss on the select items is kept, the one before training included.

    Args:
        compressed: what `quantize`, `prune` or `compress` returned; it is left as it is. Of a plain
            module nothing is known: zeros of its layers' weights stay zero, everything else is
            trained, also off the grid of a rounded weight.
        baseline: the uncompressed model.
        data: what to train on: the recover split of `Splits` (its calibrate split where there is
            none), whose select split chooses; otherwise every fourth item chooses, unless
            ``select`` is given. No labels are needed with ``loss="distill"``.
        select: the items that choose.
        budget: with ``max_drop``: judge the recovered model on the certify split (as `compress`,
            ``data`` are split, or pass `Splits`). Without it the result has no verdict: an earlier
            one was about another model.
        objective: what the loss on the select items is; as for the other verbs.
        training: fields of `curvprune.compression.Training`: ``loss`` (``"distill"``, KL from
            ``baseline``, or ``"task"``, the objective with the data's labels), ``steps`` (200)
            or ``seconds``, ``lr``, ``batch_size``, ``every``, ``patience``, ``clip``, ``codes``,
            ``seed``. Results of a number of steps repeat exactly, those of a time do not.

    Returns:
        A new result of the same kind, with ``recovery``; for a plain module the `Recovery` itself.

    Raises:
        ValueError: nothing to train, outputs that do not fit the baseline's, labels that are
            lacking, too little data, data dealt out here whose part to certify the compression has
            seen; `curvprune.compression.Diverged` where the loss stops being finite:
            ``error.recovery`` has the best state.

    Cost: a step is a forward pass of both models and a backward one on ``batch_size`` items; a
    measurement (ten of them) a forward pass over the select items. Memory: see
    `curvprune.compression.recover_`.
    """
    known = {field.name for field in fields(Training)}
    if unknown := sorted(set(training) - known):
        raise ValueError(
            f"recover: unknown argument {unknown[0]!r}; expected some of {sorted(known)}"
        )
    how = Training(**training)
    if budget is not None and budget.max_drop is None:
        raise ValueError(
            "recover: a budget certifies here and needs max_drop; a recovery does not change the "
            "size"
        )
    if budget is not None and isinstance(compressed, nn.Module):
        raise ValueError(
            "recover: a plain module has no place for a verdict; call certify on what comes back"
        )
    splits = recovery_splits(data, select=select, budget=budget, seed=how.seed)
    told = Arguments(loss=objective, device=device, progress=progress)
    return recover_model(compressed, baseline, splits, how, budget, told)
