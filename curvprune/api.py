"""The verbs: `analyze`, `price`, `frontier`, `quantize`, `prune`, `compress`, `recover`, `certify`,
`load`, on any model and data.

``data`` is a re-iterable of batches (dicts of tensors as transformers models take them, or
``(inputs, targets)``), or `Splits` where a budget needs its three parts under your control. The
input model is untouched unless ``inplace=True``.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn

from curvprune import artifact, curvature
from curvprune.artifact import describe, load_artifact, write_model
from curvprune.certificate import Verdict, certify_values, compare
from curvprune.compression import Diverged, Recovery, Solved, Training, dequantize, recover_
from curvprune.curvature import (
    QUANTITIES,
    Analysis,
    AnalysisSettings,
    Estimate,
    analyze_curvature,
)
from curvprune.files import StageLog, State
from curvprune.model import (
    PURPOSES,
    Batch,
    Layer,
    Metric,
    Objective,
    Split,
    Splits,
    as_split,
    check_items,
    evaluate,
    find_groups,
    find_layers,
    left_over,
    make_objective,
    read_request,
    score_items,
    split_items,
    to_device,
)
from curvprune.options import (
    ENGINE_ASYMMETRIC_BITS,
    ENGINE_BITS,
    Cast,
    Keep,
    Option,
    Prune,
    PruneCast,
    Quantize,
    check_fits,
    quantizer_of,
)
from curvprune.planning import Budget, Plan
from curvprune.planning import frontier as nested_plans
from curvprune.pricing import Ledger, limits_of
from curvprune.run import (
    Job,
    Settings,
    apply_plan,
    certify_plans,
    count_work,
    limit_plans,
    price_options,
    select_plans,
    solve_options,
    spread_zeros,
    unpriced_plan,
)
from curvprune.structured import Structured, prune_units

Data = Iterable[Batch] | Split | Splits

ALLOCATED = (-0.2, -0.1, 0.0, 0.1, 0.2)  # shares around the common one that a layer may get


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a verb returns.

    Attributes:
        model: the compressed model (weights rounded or pruned in place, in their own dtype).
        plan: the option of every layer.
        verdict: the certificate, where a budget with ``max_drop`` was given.
        ledger: the prices, where a budget was given or zeros were allocated.
        analysis: per-layer curvature from the same pass.
        trials: the plans measured on the select split, with predicted and measured loss.
        recovery: the training of `recover`, where there was one; prices and ``plan.predicted`` are
            those before it.
        seen: hashes of the items that it was made from and chosen by, which certify nothing.
    """

    model: nn.Module
    plan: Plan
    verdict: Verdict | None
    ledger: Ledger | None
    analysis: Analysis | None
    trials: tuple[dict[str, Any], ...]
    solved: dict[str, Solved]
    portable: artifact.Portable = True
    recovery: Recovery | None = None
    seen: frozenset[bytes] = field(default=frozenset(), repr=False)

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the packed artifact, which `load` reads (and transformers, for its own models,
        unless ``Settings(portable=False)``, which packs embeddings and every other kind of layer
        too; ``"engines"`` keeps to what serving engines have kernels for). Returns the folder.

        Raises ``ValueError`` if a compressed layer of ``model`` is not what it was compressed to:
        codes and scales are stored, and those of a weight that was trained since are not known.
        """
        path = Path(folder)
        _check_unchanged(self.model, self.solved)
        write_model(
            path,
            self.model,
            self.solved,
            self.plan.to_dict(),
            tokenizer=tokenizer,
            portable=self.portable,
        )
        return path


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredResult:
    """What `prune` returns where whole units were removed.

    Attributes:
        model: the smaller model; the input model is untouched.
        cuts: cut → (units left, units before).
        macs, parameters: (after, before); multiply-adds of one item.
        latency: (after, before) in seconds, measured in turn, where a share of it was asked for.
        predicted: rise of the loss in nats from the prices, where there were widths to choose
            among.
        verdict: the certificate, where a budget with ``max_drop`` was given.
        ledger: the price of every width of every cut, where there was a choice.
        notes: which dimensions cannot be cut, and why; why the result is not ``portable``, if so.
        portable: whether a plain config describes the result, so that transformers'
            ``from_pretrained`` loads it.
        recovery: the training of `recover`, where there was one; ``predicted`` is from before it.
        seen: hashes of the items that it was made from and chosen by, which certify nothing.
    """

    model: nn.Module
    cuts: dict[str, tuple[int, int]]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    predicted: Estimate | None
    verdict: Verdict | None
    ledger: Ledger | None
    notes: tuple[str, ...]
    portable: bool
    latency: tuple[float, float] | None = None
    recovery: Recovery | None = None
    seen: frozenset[bytes] = field(default=frozenset(), repr=False)

    def save(self, folder: str | Path, *, tokenizer: Any = None) -> Path:
        """Write the artifact, which `load` reads (and transformers, where ``portable``). Returns
        the folder."""
        path = Path(folder)
        plan = {"cuts": {n: {"left": left, "of": of} for n, (left, of) in self.cuts.items()}}
        write_model(path, self.model, {}, plan, tokenizer=tokenizer)
        return path


def analyze(
    model: nn.Module,
    data: Data,
    *,
    matrix: str = "hessian",
    quantities: Sequence[str] = QUANTITIES,
    objective: str | Objective = "auto",
    layers: str | Sequence[str] = "*",
    rtol: float = 0.05,
    max_products: int = 32,
    labels: int = 1,
    which: Literal["BE", "LM", "LA", "SA"] = "BE",
    vector_bytes: int = 4 << 30,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Analysis:
    """Curvature of the loss, per layer and for the whole model, labelled with the matrix it is of.

    Args:
        data: batches are kept as they are; each is one mini-batch of every pass.
        matrix: ``"hessian"``, ``"ggn"`` (generalised Gauss–Newton; for these losses the true
            Fisher), ``"fisher"`` (from labels drawn from the model) or ``"empirical-fisher"``; the
            last two give trace and diagonal.
        quantities: some of ``"trace"``, ``"diagonal"``, ``"eigenvalues"`` (of each layer) and
            ``"density"`` (spectrum of the whole model, with the diagnosis), ``"layer-densities"``
            (spectrum of each layer; 90 products each).
        rtol: relative standard error asked of every probed trace.
        max_products: most products for one layer's trace, and for one eigenvalue problem; results
            that needed more say so in ``converged``.
        labels: draws per position for the Fisher.
        vector_bytes: memory for vectors: layers are probed together in groups whose vectors fit,
            and the whole model's spectrum is left out, with a note, if eight Lanczos vectors do
            not.
        which: ends of each layer's spectrum: ``"BE"`` both, ``"LM"`` the largest in magnitude,
            ``"LA"`` the largest, ``"SA"`` the smallest. Exact blocks give both all the same.

    Exact without probes: Gauss–Newton blocks where an item has one prediction of up to 129 classes,
    and Hessian blocks of layers whose path to the loss is piecewise linear (ReLU, pooling,
    BatchNorm in evaluation mode); of an output layer (lm_head, not tied) trace and diagonal for any
    number of positions and classes.

    Cost: exact blocks about 0.8 gradients per class; a joint probe two gradients for all layers, a
    restricted one about 0.7 for one layer; Fisher about 1.2 gradients per label. Memory: the graph
    of one mini-batch, twice; eight vectors of a group of layers; for ``"density"`` up to 40 vectors
    of the model.

    Raises ``ValueError`` for a glob that matches no layer, an objective that cannot be told, an
    unknown matrix or quantity, a model that is not deterministic (naming the module), a layer that
    is not on the way to the loss.
    """
    batches = list(
        data.calibrate.items
        if isinstance(data, Splits)
        else data.items
        if isinstance(data, Split)
        else data
    )
    if not batches:
        raise ValueError("analyze: the data is empty; pass at least one batch")
    if device is not None:
        model = copy.deepcopy(model).to(device)
    home = next(model.parameters()).device
    batches = [to_device(batch, home) for batch in batches]
    loss = make_objective(objective, model, batches[0])
    log = StageLog(show=progress)
    with log.steps() as advance:
        return analyze_curvature(
            model,
            loss,
            batches,
            find_layers(model, layers),
            AnalysisSettings(
                matrix=matrix,
                quantities=quantities,
                rtol=rtol,
                max_products=max_products,
                labels=labels,
                seed=seed,
                which=which,
                vector_bytes=vector_bytes,
            ),
            advance=advance,
        )


def hessian(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    objective: str | Objective = "auto",
    **arguments: Any,
) -> Any:
    """The Hessian of the mean loss as an operator; see `curvprune.curvature.products.hessian` for
    the arguments."""
    return _operator(curvature.hessian, model, data, objective, arguments)


def gauss_newton(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    objective: str | Objective = "auto",
    **arguments: Any,
) -> Any:
    """The generalised Gauss–Newton matrix as an operator; see
    `curvprune.curvature.products.gauss_newton`."""
    return _operator(curvature.gauss_newton, model, data, objective, arguments)


def fisher(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    objective: str | Objective = "auto",
    **arguments: Any,
) -> Any:
    """The sampled true Fisher as an operator; see `curvprune.curvature.products.fisher`."""
    return _operator(curvature.fisher, model, data, objective, arguments)


def empirical_fisher(
    model: nn.Module,
    data: Iterable[Batch],
    *,
    objective: str | Objective = "auto",
    **arguments: Any,
) -> Any:
    """The empirical Fisher as an operator; see `curvprune.curvature.products.empirical_fisher`."""
    return _operator(curvature.empirical_fisher, model, data, objective, arguments)


def _operator(
    build: Any, model: nn.Module, data: Iterable[Batch], objective: str | Objective, arguments: Any
) -> Any:
    home = next(model.parameters()).device
    batches = [to_device(batch, home) for batch in data]
    if not batches:
        raise ValueError("the data is empty; pass at least one batch")
    return build(model, batches, make_objective(objective, model, batches[0]), **arguments)


def price(
    model: nn.Module,
    data: Data,
    *,
    options: Sequence[Option],
    objective: str | Objective = "auto",
    layers: str | Sequence[str] = "*",
    labels: int = 2,
    curvature: str = "fisher",
    measure_above: float | None = 0.005,
    portable: artifact.Portable = True,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Ledger:
    """Bytes and predicted loss increase (nats, ± standard error) of every option of every layer.

    Every option is solved (one forward pass over the data), then priced along its own change (one
    forward and ``labels`` backward passes per item). ``curvature``: ``"fisher"`` along the change,
    ``"diagonal"`` of the Fisher, ``"kfac"``, ``"hessian"`` along the change (on the data's labels;
    two gradients per item and change) or ``"input"`` (error of the layer's outputs, no unit of
    loss). The highest prices are measured instead, four at a time (five forward passes per item),
    until they agree with the quadratic ones, at most 64 and none below ``measure_above`` nats (see
    `curvprune.pricing.single_changes.divergences`). ``portable``: of which artifact the bytes are, as
    in `Settings`. Raises ``ValueError`` naming the layer that an option does not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = _job(
            model, data, options, None, Path(folder), objective=objective, layers=layers, labels=labels, device=device,
            seed=seed, progress=progress, priced=True,
            settings=Settings(portable=portable, curvature=curvature, measure_above=measure_above),
        )  # fmt: skip
        count_work(job)
        price_options(job, solve_options(job))
        assert job.ledger is not None
        return job.ledger


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
    options: dict[str, list[str]] = {}
    for row in ledger.rows:
        options.setdefault(row.layer, []).append(row.option)
    groups = find_groups(read_request(same_option), options)
    limits = () if budget is None else limits_of(budget, ledger.rows, ledger.work)
    every = len(ledger.rows) + 2
    found = [
        point
        for point in nested_plans(
            ledger.rows, points=points if budget is None else every, same_option=groups.layers
        )
        if all(limit.used(point.choices) <= limit.most for limit in limits)
        and (budget is None or budget.max_bytes is None or point.bytes <= budget.max_bytes)
    ]
    if not found:
        raise ValueError(
            "frontier: none of its plans keeps to the budget; compress(budget=...) plans for its "
            "limits"
        )
    kept = np.unique(np.linspace(0, len(found) - 1, min(points, len(found))).round().astype(int))
    plans = []
    for point in (found[k] for k in kept):
        predicted = ledger.predict(point.choices)
        plans.append(
            Plan(
                choices=point.choices,
                bytes=point.bytes,
                predicted=predicted.value,
                predicted_stderr=predicted.stderr,
                notes=groups.notes,
                uses={limit.name: limit.used(point.choices) for limit in limits},
            )
        )
    return plans


def compress(
    model: nn.Module,
    data: Data,
    *,
    options: Sequence[Option],
    budget: Budget | None = None,
    objective: str | Objective = "auto",
    layers: str | Sequence[str] = "*",
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

    Args:
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
    offered = (
        list(options) if budget is None else [*options, *([] if Keep() in options else [Keep()])]
    )
    with tempfile.TemporaryDirectory() as folder:
        job = _job(
            model, data, offered, budget, Path(folder), objective=objective, layers=layers, device=device,
            settings=settings, progress=progress, same_option=same_option,
        )  # fmt: skip
        trials: tuple[dict[str, Any], ...] = ()
        if budget is None:
            choices = {n: offered[0].key for n in job.layers}
            own_copy = inplace or device is not None
            compressed, job.solved = apply_plan(
                job, choices, "applied/1", "apply", inplace=own_copy
            )
            job.plan = unpriced_plan(job, choices)
        else:
            candidates = solve_options(job)
            price_options(job, candidates)
            bench, best = select_plans(job, candidates)
            compressed = job.reload(certify_plans(job, bench, best))
            trials = tuple(bench.trials)
        return _finished(job, compressed, model, inplace=inplace, trials=trials)


def _check_unchanged(model: nn.Module, solved: Mapping[str, Solved]) -> None:
    layers = find_layers(model)
    for name, one in solved.items():
        layer, expected = (
            layers[name],
            one.weight,
        )  # which may be the model's own memory, but for a grid
        weight = layer.as_matrix(layer.weight.detach())
        if (
            (quantize := quantizer_of(one.option)) is not None
            and one.codes is not None
            and one.scale is not None
        ):
            wide = torch.promote_types(weight.dtype, torch.float32)
            expected = dequantize(one.codes, one.scale, one.zero, quantize.group_size, dtype=wide)
        if not torch.equal(weight.cpu(), expected.cpu().to(weight.dtype)):
            raise ValueError(
                f"save: layer {name} of the result's model is not what was compressed: its "
                "weight has changed since. To train a compressed model use curvprune.recover; "
                "for any other change, compress the model again"
            )


def _finished(
    job: Job,
    compressed: nn.Module,
    model: nn.Module,
    *,
    inplace: bool,
    trials: tuple[dict[str, Any], ...] = (),
) -> Result:
    assert job.plan is not None
    for module, original in zip(compressed.modules(), model.modules(), strict=True):
        module.training = original.training
    if inplace and compressed is not model:
        own = find_layers(model)
        for name, layer in find_layers(compressed).items():
            own[name].write_(layer.as_matrix(layer.weight.detach()))
        compressed = model
    return Result(
        model=compressed,
        plan=job.plan,
        verdict=job.verdict,
        ledger=job.ledger,
        analysis=job.analysis,
        trials=trials,
        solved=job.solved,
        portable=job.settings.portable,
        seen=job.splits.seen(),
    )


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
    the widths offered, by default 2, 3, 4, 5, 6 and 8, or those that serving engines have kernels
    for with ``Settings(portable="engines")``).

    Args:
        group_size: inputs that share a scale; ``None`` for one scale per output channel.
        arguments: passed on to `compress`.
    """
    if bits is None:
        settings: Settings | None = arguments.get("settings")
        if budget is None:
            bits = 4
        elif settings is not None and settings.portable == "engines":
            bits = ENGINE_BITS if symmetric else ENGINE_ASYMMETRIC_BITS
        else:
            bits = (2, 3, 4, 5, 6, 8)
    widths = list(bits) if isinstance(bits, Iterable) else [bits]
    options = [Quantize(bits=b, group_size=group_size, symmetric=symmetric) for b in widths]
    return compress(model, data, options=options, budget=budget, **arguments)


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
    transformers' own, and with ``Settings(portable=False)``, the file holds a bitmask and the kept
    weights alone, where that is smaller; transformers needs the zeros. ``arguments`` are passed on
    to `compress`.

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
            ``objective``, ``settings`` and ``device``, and the fields of `Structured`.
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
        return _prune_structured(
            model, data, structured, uniform=uniform, budget=budget, **arguments
        )
    if allocate:
        if not isinstance(sparsity, float) or pattern is not None or budget is not None:
            raise ValueError(
                "prune: allocate=True spreads one share, for example sparsity=0.5, without "
                "pattern; with a budget list the shares to choose from, for example "
                "sparsity=[0.3, 0.5, 0.7]"
            )
        return _prune_allocated(model, data, sparsity, dtype=dtype, **arguments)
    shares = (
        []
        if sparsity is None
        else [sparsity]
        if isinstance(sparsity, (int, float))
        else list(sparsity)
    )
    prunings = [Prune(sparsity=s) for s in shares]
    if pattern is not None:
        prunings.append(Prune(pattern=pattern))
    options = _stored(prunings, dtype)
    if not options:
        raise ValueError(
            'prune: pass sparsity (for example 0.5), pattern ("2:4") or structured (for example 0.3)'
        )
    return compress(model, data, options=options, budget=budget, **arguments)


def _stored(prunings: Sequence[Prune], dtype: str | None) -> list[Option]:
    return [p if dtype is None else PruneCast(prune=p, cast=Cast(dtype=dtype)) for p in prunings]


def _prune_allocated(
    model: nn.Module,
    data: Data,
    sparsity: float,
    *,
    dtype: str | None = None,
    objective: str | Objective = "auto",
    layers: str | Sequence[str] = "*",
    same_option: str | Sequence[str | Sequence[str]] = (),
    settings: Settings | None = None,
    device: str | torch.device | None = None,
    inplace: bool = False,
    progress: bool = False,
) -> Result:
    asked = Prune(sparsity=sparsity).sparsity  # refuses what is not a share
    assert asked is not None
    shares = [round(asked + step, 6) for step in ALLOCATED]
    options = _stored([Prune(sparsity=share) for share in shares if 0 < share < 1], dtype)
    with tempfile.TemporaryDirectory() as folder:
        job = _job(
            model, data, options, None, Path(folder), objective=objective, layers=layers, device=device,
            settings=settings, progress=progress, same_option=same_option, priced=True,
        )  # fmt: skip
        price_options(job, solve_options(job))
        assert job.ledger is not None
        choices = spread_zeros(job, asked)
        predicted = job.ledger.predict(choices)
        if not isinstance(data, Splits):  # prices are taken: all items serve to solve
            job.splits = replace(job.splits, calibrate=as_split(data))
        compressed, job.solved = apply_plan(
            job, choices, "applied/1", "apply", inplace=inplace or device is not None
        )
        job.plan = replace(
            unpriced_plan(job, choices),
            predicted=predicted.value,
            predicted_stderr=predicted.stderr,
        )
        return _finished(job, compressed, model, inplace=inplace)


def _prune_structured(
    model: nn.Module,
    data: Data,
    structured: float | Mapping[str, float] | Structured,
    *,
    uniform: bool,
    budget: Budget | None,
    objective: str | Objective = "auto",
    settings: Settings | None = None,
    device: str | torch.device | None = None,
    **arguments: Any,
) -> StructuredResult:
    known = {f.name for f in fields(Structured)} - {"share", "uniform"}
    if unknown := sorted(set(arguments) - known):
        raise ValueError(
            f"prune(structured=...): unknown argument {unknown[0]!r}; expected some of "
            f"{sorted(known)}"
        )
    if isinstance(structured, Structured):
        asked = replace(structured, **arguments)
        asked = replace(asked, uniform=True) if uniform else asked
    else:
        asked = Structured(share=structured, uniform=uniform, **arguments)
    if budget is not None and (budget.max_drop is None or budget.limited):
        raise ValueError(
            "prune(structured=...): a budget certifies here: it needs max_drop, nothing else; "
            "sizes are asked by share"
        )
    settings = settings or Settings()
    if isinstance(data, Splits):
        splits = data
    elif budget is None:
        splits = _without_budget(as_split(data), priced=True)
    else:
        splits = split_items(data, seed=settings.seed)
    if budget is not None and (leak := splits.leak()) is not None:
        warnings.warn(leak, UserWarning, stacklevel=4)
    if device is not None:
        model = copy.deepcopy(model).to(device)
    home = next(model.parameters()).device
    loss = make_objective(objective, model, to_device(splits.calibrate.items[0], home))
    if budget is not None and budget.metric == "accuracy" and loss.measure == "nats/token":
        raise ValueError(
            "metric 'accuracy' needs one prediction per item; for language models use metric 'loss'"
        )
    pruned = prune_units(
        model, loss, splits, asked, seed=settings.seed, batch_size=settings.batch_size
    )
    why = describe(model, pruned.model, pruned.uniform_widths(), pruned.dropped)
    verdict = None
    if budget is not None:
        results = [
            evaluate(m, splits.certify.batches(settings.batch_size), loss)
            for m in (model, pruned.model)
        ]
        verdict = compare(results[0], results[1], splits.certify, budget, measure=loss.measure)
    return StructuredResult(
        model=pruned.model,
        cuts={n: (left, pruned.units[n]) for n, left in pruned.left.items()},
        macs=(pruned.macs[1], pruned.macs[0]),
        parameters=(pruned.parameters[1], pruned.parameters[0]),
        predicted=pruned.predicted,
        verdict=verdict,
        ledger=pruned.ledger,
        notes=(*pruned.notes, *([why] if why is not None else [])),
        portable=why is None,
        latency=None if pruned.latency is None else (pruned.latency[1], pruned.latency[0]),
        seen=splits.seen(),
    )


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
def recover(
    compressed: Result | StructuredResult | nn.Module,
    baseline: nn.Module,
    data: Data,
    *,
    select: Iterable[Batch] | Split | None = None,
    budget: Budget | None = None,
    objective: str | Objective = "auto",
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
        training: fields of `curvprune.compression.recovery.Training`: ``loss`` (``"distill"``, KL from
            ``baseline``, or ``"task"``, the objective with the data's labels), ``steps`` (200) or
            ``seconds``, ``lr``, ``batch_size``, ``every``, ``patience``, ``clip``, ``codes``,
            ``seed``. Results of a number of steps repeat exactly, those of a time do not.

    Returns:
        A new result of the same kind, with ``recovery``; for a plain module the `Recovery` itself.

    Raises:
        ValueError: nothing to train, outputs that do not fit the baseline's, labels that are
            lacking, too little data, data dealt out here whose part to certify the compression has
            seen; `curvprune.compression.recovery.Diverged` where the loss stops being finite:
            ``error.recovery`` has the best state.

    Cost: a step is a forward pass of both models and a backward one on ``batch_size`` items; a
    measurement (ten of them) a forward pass over the select items. Memory: see
    `curvprune.compression.recovery.recover_`.
    """
    known = {f.name for f in fields(Training)}
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
    certifies = dealt = None
    if isinstance(data, Splits):
        train, choose, certifies = data.training, data.select, data.certify
    elif budget is not None:
        if isinstance(data, Split):
            raise ValueError(
                "a budget needs four splits: pass Splits(calibrate=, price=, select=, certify=)"
            )
        dealt = split_items(data, seed=how.seed)
        train, choose, certifies = dealt.calibrate, dealt.select, dealt.certify
    else:
        train = choose = as_split(data)
        if select is None:
            train, choose = _every_fourth(train)
    choose = choose if select is None else as_split(select)
    seen = frozenset([*train.digests(), *choose.digests()])
    if not isinstance(compressed, nn.Module):
        seen |= compressed.seen
    if certifies is not None and (leak := certifies.leak(seen)) is not None:
        if dealt is not None and leak != dealt.leak():  # more than what the data repeats
            raise ValueError(
                f"recover: {leak}: compress with a budget, the same data and the same seed, "
                "which sets them aside, or pass Splits with a certify split of its own"
            )
        warnings.warn(leak, UserWarning, stacklevel=2)
    own = compressed if isinstance(compressed, nn.Module) else compressed.model
    if own is baseline:
        raise ValueError(
            "recover: the compressed model is the baseline itself (inplace=True?); pass the model "
            "as it was before"
        )
    model = copy.deepcopy(own)
    if device is not None:
        model, baseline = model.to(device), copy.deepcopy(baseline).to(device)
    first = to_device(train.items[0], next(baseline.parameters()).device)
    measured = make_objective(objective, baseline, first)
    if budget is not None and budget.metric == "accuracy" and measured.measure == "nats/token":
        raise ValueError(
            "metric 'accuracy' needs one prediction per item; for language models use metric 'loss'"
        )
    solved: dict[str, Solved] | None = {} if isinstance(compressed, StructuredResult) else None
    if isinstance(compressed, Result):
        solved = compressed.solved
    log = StageLog(show=progress)
    with log.stage("recover", how.steps or 1) as advance:
        recovery = recover_(model, solved, baseline, measured, train, choose, how, advance=advance)
    if isinstance(compressed, nn.Module):
        return recovery
    verdict = None
    if budget is not None:
        assert certifies is not None
        results = [
            evaluate(m, certifies.batches(how.batch_size), measured) for m in (baseline, model)
        ]
        verdict = compare(results[0], results[1], certifies, budget, measure=measured.measure)
    made = replace(compressed, model=model, verdict=verdict, recovery=recovery, seen=seen)
    return replace(made, solved=recovery.solved) if isinstance(made, Result) else made


def _every_fourth(split: Split) -> tuple[Split, Split]:
    """Three quarters to train on and one to choose by."""
    if len(split.items) < 2:
        raise ValueError(
            "recover: at least two items are needed, to train on and to choose by; or pass select="
        )
    pairs = list(zip(split.items, split.documents, strict=True))
    chosen = set(range(min(3, len(pairs) - 1), len(pairs), 4))
    parts = [
        [p for i, p in enumerate(pairs) if (i in chosen) is select] for select in (False, True)
    ]
    train, select = (
        Split(items=tuple(i for i, _ in p), documents=tuple(d for _, d in p)) for p in parts
    )
    return train, select


def certify(
    baseline: nn.Module,
    compressed: nn.Module,
    data: Iterable[Batch] | Split,
    budget: Budget,
    *,
    objective: str | Objective = "auto",
    metric: Metric | Callable[[Any, Batch], Tensor] | None = None,
    batch_size: int = 8,
) -> Verdict:
    """Whether ``compressed`` is within ``budget.max_drop`` of ``baseline``, paired on the items of
    ``data``.

    The items must not have been used to make or choose the compressed model. Items of one document
    of a `Split` are a cluster. Other limits of the budget, on size and speed, are not looked at:
    data cannot decide them. Cost: one forward pass of each model. `curvprune.certificate.paired_tests` has the
    tests, for results that are already there; `curvprune.certify_lm_eval` reads those of lm-eval.

    Args:
        metric: what is compared instead of ``budget.metric``: a function of (what the model
            returned, batch) to one number per item, higher is better, or a `Metric` with bounds,
            direction, name and unit. ``max_drop`` is then in its unit.

    Raises ``ValueError`` for a budget without ``max_drop`` or a metric that does not return one
    number per item.
    """
    if budget.max_drop is None:
        raise ValueError(
            "certify needs Budget(metric, max_drop=...): a size cannot be certified from data"
        )
    split = as_split(data)
    if metric is not None:
        if not isinstance(metric, Metric):
            metric = Metric(of=metric, name=getattr(metric, "__name__", "metric"))
        values = [
            score_items(m, split.batches(batch_size), metric).numpy()
            for m in (baseline, compressed)
        ]
        documents = np.array(split.documents)
        return certify_values(
            values[0],
            values[1],
            clusters=documents if len(set(split.documents)) < len(documents) else None,
            max_drop=budget.max_drop,
            confidence=budget.confidence,
            bounds=metric.bounds,
            higher_is_better=metric.higher_is_better,
            metric=metric.name,
            measure=metric.measure,
        )
    loss = make_objective(
        objective, baseline, to_device(split.items[0], next(baseline.parameters()).device)
    )
    check_items(baseline, loss, split.items, "certify")
    results = [evaluate(m, split.batches(batch_size), loss) for m in (baseline, compressed)]
    return compare(results[0], results[1], split, budget, measure=loss.measure)


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    packed: bool = False,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a saved artifact in evaluation mode.

    Args:
        packed: keep rounded weights packed in memory (half a byte a weight up to 4 bits, else one)
            and unpack each when its module runs: the same outputs in a fraction of the memory,
            slower where few tokens pass at a time. The model is for inference: it has no dense
            weights to train or to save.
        model: the uncompressed architecture, for models that transformers cannot rebuild from a
            config; it is filled in place.

    Raises ``ValueError`` for a folder without an artifact, or if ``model`` is needed or does not
    fit.
    """
    path = Path(folder)
    if (path / artifact.MANIFEST).is_file() and model is None and (path / "config.json").is_file():
        return load_artifact(path, packed=packed, device=device)
    if model is None:
        missing = (
            ""
            if (path / artifact.MANIFEST).is_file()
            else f" and {path} has no {artifact.MANIFEST}"
        )
        raise ValueError(
            f"load({str(folder)!r}): not a transformers model{missing}; pass model=, an instance "
            "of its architecture"
        )
    return artifact.load_into(path, model, packed=packed).to(device).eval()


def _job(
    model: nn.Module,
    data: Data,
    options: Sequence[Option],
    budget: Budget | None,
    folder: Path,
    *,
    objective: str | Objective,
    layers: str | Sequence[str],
    device: str | torch.device | None,
    progress: bool,
    labels: int | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    priced: bool = False,
    same_option: str | Sequence[str | Sequence[str]] = (),
) -> Job:
    settings = settings or Settings()
    settings = replace(
        settings,
        seed=settings.seed if seed is None else seed,
        labels=settings.labels if labels is None else labels,
    )
    found = find_layers(model, layers)
    if not found:
        raise ValueError("layers is empty: expected names or globs, such as 'model.layers.*'")
    if not options:
        raise ValueError("options is empty: expected at least one, such as Quantize(bits=4)")
    readers = {
        n: artifact.reader_of(model, layer, portable=settings.portable)
        for n, layer in found.items()
    }
    for name, layer in found.items():
        for option in options:
            check_fits(option, name, layer.shape, reader=readers[name])
    keys = [option.key for option in options]
    groups = find_groups(
        read_request(same_option),
        {n: keys if n in found else [Keep().key] for n in find_layers(model)},
    )
    if isinstance(data, Splits):
        splits = data
    elif budget is not None:
        splits = split_items(data, seed=settings.seed)
    else:
        splits = _without_budget(as_split(data), priced=priced)
    if budget is not None and (leak := splits.leak()) is not None:
        warnings.warn(leak, UserWarning, stacklevel=4)
    if device is not None:
        model = copy.deepcopy(model).to(device)
        found = {n: layer for n, layer in find_layers(model).items() if n in found}
    if empty := [p for p in PURPOSES if not getattr(splits, p).items]:
        raise ValueError(f"the {empty[0]} split has no items; every split needs some")
    if budget is not None and (few := splits.too_few()) is not None:
        raise ValueError(few)
    first = to_device(splits.calibrate.items[0], next(model.parameters()).device)
    measured = make_objective(objective, model, first)
    for purpose in PURPOSES:
        check_items(model, measured, getattr(splits, purpose).items, purpose)
    job = Job(
        model=model,
        objective=measured,
        layers=found,
        options={n: list(options) for n in found},
        same_option=groups.layers,
        notes=list(groups.notes),
        splits=splits,
        budget=budget,
        settings=settings,
        state=State(folder / "state"),
        stages=StageLog(show=progress),
        reload=lambda path: artifact.load_into(path, copy.deepcopy(model)).eval(),
        write_model=lambda path, written, solved, plan: artifact.save(
            path, written, find_layers(written), solved, plan, portable=settings.portable
        ),
    )
    if budget is not None and budget.metric == "accuracy" and job.objective.measure == "nats/token":
        raise ValueError(
            "metric 'accuracy' needs one prediction per item; for language models use metric 'loss'"
        )
    limit_plans(job)
    if (message := left_over(model)) is not None:
        warnings.warn(message, UserWarning, stacklevel=4)
    return job


def _without_budget(split: Split, *, priced: bool) -> Splits:
    """Every third item prices what the others solve; where nothing is priced, or there is one item,
    all serve both."""
    calibrate = price = split
    if priced and len(split.items) > 2:
        pairs = list(zip(split.items, split.documents, strict=True))
        parts = [p for i, p in enumerate(pairs) if i % 3 != 2], pairs[2::3]
        calibrate, price = (
            Split(items=tuple(i for i, _ in p), documents=tuple(d for _, d in p)) for p in parts
        )
    return Splits(calibrate=calibrate, price=price, select=split, certify=split)


__all__ = [
    "Diverged",
    "Layer",
    "Recovery",
    "Result",
    "StructuredResult",
    "analyze",
    "certify",
    "compress",
    "empirical_fisher",
    "fisher",
    "frontier",
    "gauss_newton",
    "hessian",
    "load",
    "price",
    "prune",
    "quantize",
    "recover",
]
