"""Curvature of a model's loss, per layer and for the whole: each quantity by the best method that
its structure allows.

    exact        Gauss–Newton blocks where every item has one prediction of few classes; Hessian blocks of layers whose
                 path to the loss is piecewise linear
    items        Fisher from labels drawn from the model, with standard errors over items
    probes       Hessian traces and diagonals from joint and restricted Hutchinson probes, standard errors over probes
    Lanczos      extreme eigenpairs with residuals; spectral density by stochastic Lanczos quadrature

Standard errors of probes are about these data; those over items are about the population that the
items come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from curvprune.curvature import factors
from curvprune.curvature.estimates import EigenPairs, Estimate
from curvprune.curvature.estimators import density, eigenpairs
from curvprune.curvature.factors import Moments, Structure, structure
from curvprune.curvature.lanczos import Lanczos
from curvprune.curvature.probes import probe_layers
from curvprune.curvature.products import MatrixFree, gauss_newton, hessian, loss_and_gradient
from curvprune.curvature.ritz import Which
from curvprune.curvature.sampled_fisher import fisher_pass, ratio_estimate
from curvprune.curvature.spectral_density import SpectralDensity
from curvprune.model import Batch, Layer, Objective

# Gives the value of a part of an analysis, by (key, compute, encode to JSON, decode from it):
# computes it, or finds it where an interrupted analysis left it.
Remember = Callable[[str, Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]], Any]


def compute_always(
    key: str, compute: Callable[[], Any], encode: Callable[[Any], Any], decode: Callable[[Any], Any]
) -> Any:
    return compute()


MATRICES = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton",
    "fisher": "Fisher (labels sampled from the model)",
    "empirical-fisher": "empirical Fisher (the data's own labels, per item)",
}
QUANTITIES = ("trace", "diagonal", "eigenvalues", "density")  # computed unless the user picks
ALL_QUANTITIES = (*QUANTITIES, "layer-densities")
# Asked of eigenvalues whose error shall be below 1e-2: r²/gap is optimistic where the spectrum is
# dense at its ends.
EIGEN_TOL = 2e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCurvature:
    """Curvature of one layer's block.

    Attributes:
        trace: in nats per position; ``stderr`` 0 where it is exact. ``None`` if it was not asked
            for.
        diagonal: shaped as the weight as a matrix, ``(out, in)``.
        method: how trace and diagonal were found: ``"exact"``, ``"items"``, ``"joint probes"`` or
            ``"layer probes"``.
        exact: the layer's path to the loss is piecewise linear, so that its Hessian block is its
            Gauss–Newton block.
        eigenpairs: extreme ones, both ends. Of an exact block, the null space has no vectors: they
            are nan.
        density: of the block.
        spectrum: of an exact block, all its eigenvalues but the null space's zeros, descending, in
            nats; computed with the eigenpairs.
        diagonal_error: relative standard error of the diagonal (2-norm); 0 where exact, nan where
            not estimated.
        gauss_newton_trace: of the same block, for comparison with the Hessian's.
        diagonal_summary: mean, max and quantiles; all that is left of a diagonal that was found on
            disk.
    """

    trace: Estimate | None
    diagonal: Tensor | None
    shape: tuple[int, int]
    method: str = "items"
    exact: bool = False
    eigenpairs: EigenPairs | None = None
    density: SpectralDensity | None = None
    diagonal_error: float = math.nan
    gauss_newton_trace: Estimate | None = None
    diagonal_summary: Mapping[str, float] | None = None
    spectrum: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCurvature:
    """The whole model: all its parameters, biases and norms included."""

    parameters: int
    loss: float
    gradient_norm: float
    trace: Estimate | None
    eigenpairs: EigenPairs | None
    density: SpectralDensity | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What the spectrum of the whole model says.

    Attributes:
        lambda_max, lambda_min: extreme eigenvalues (sharpness is ``lambda_max``).
        max_learning_rate: ``2/λmax``, above which plain gradient descent diverges along the top
            direction; None if λmax ≤ 0.
        negative_share, near_zero_share: shares of the eigenvalues below ``−near_zero_below`` and
            within it.
        near_zero_below: ``10⁻³ · max|λ|``.
        effective_rank: ``(Σ|λ|)² / Σλ²``.
        relative_gradient: ``‖∇L‖ / |λmax|``, the length of a Newton step along the top direction if
            the gradient lay there: a point is called stationary if it is below 0.05 times the
            parameters' norm.
        kind: ``"minimum"``, ``"saddle"`` or ``"not stationary"``.
        text: the same in sentences.
        disagreements: layers whose Hessian and Gauss–Newton traces differ by more than their errors
            and 20 %.
    """

    lambda_max: float | None
    lambda_min: float | None
    max_learning_rate: float | None
    negative_share: Estimate | None
    near_zero_share: Estimate | None
    near_zero_below: float | None
    effective_rank: float | None
    gradient_norm: float
    relative_gradient: float | None
    kind: str | None
    text: tuple[str, ...]
    disagreements: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Per-layer and whole-model curvature of the loss; ``matrix`` says of which matrix."""

    matrix: str
    layers: dict[str, LayerCurvature]
    measure: str = "nats"
    num_items: int = 0
    model: ModelCurvature | None = None
    diagnosis: Diagnosis | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON: summaries of the diagonals, eigenvalues without their vectors."""
        return {
            "matrix": self.matrix,
            "measure": self.measure,
            "num_items": self.num_items,
            "notes": list(self.notes),
            "layers": {n: _layer_record(c) for n, c in self.layers.items()},
            "model": None if self.model is None else _model_record(self.model),
            "diagnosis": None if self.diagnosis is None else _diagnosis_record(self.diagnosis),
        }


@dataclass(kw_only=True, slots=True)
class _Work:
    """What the steps of an analysis share."""

    model: nn.Module
    objective: Objective
    batches: Sequence[Batch]
    layers: Mapping[str, Layer]
    structure: Structure
    want: set[str]
    rtol: float
    max_products: int
    labels: int
    seed: int
    which: Which
    vector_bytes: int
    advance: Callable[[str, int, int], None]
    remember: Remember
    notes: list[str] = field(default_factory=list)

    def generator(self, stream: int) -> torch.Generator:
        """Every step has its own stream: what one step draws does not depend on the others."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + stream) % 2**63)

    def parameter(self, name: str) -> str:
        """The parameter's name in ``model.named_parameters()``, where a shared weight has the first
        of its names."""
        weight = self.layers[name].weight
        return next(n for n, p in self.model.named_parameters() if p is weight)


def analyze_curvature(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    layers: Mapping[str, Layer],
    *,
    matrix: str = "hessian",
    quantities: Sequence[str] = QUANTITIES,
    rtol: float = 0.05,
    max_products: int = 32,
    labels: int = 1,
    seed: int = 0,
    which: Which = "BE",
    retain: int = 1,
    vector_bytes: int = 4 << 30,
    advance: Callable[[str, int, int], None] = lambda step, done, total: None,
    remember: Remember = compute_always,
) -> Analysis:
    """See `curvprune.analyze`. ``advance`` is called with (step, done, total); ``remember`` with
    each part that an interrupted analysis should keep (exact blocks, traces of a group of layers,
    eigenvalues or density of a layer).

    Raises ``ValueError`` for an unknown matrix or quantity, a tolerance that is not positive, a
    model that is not deterministic, a layer that is not on the way to the loss.
    """
    if matrix not in MATRICES:
        raise ValueError(f"matrix={matrix!r}: expected one of {', '.join(MATRICES)}")
    if unknown := [q for q in quantities if q not in ALL_QUANTITIES]:
        raise ValueError(f"quantity {unknown[0]!r}: expected some of {', '.join(ALL_QUANTITIES)}")
    if which not in get_args(Which):
        raise ValueError(f"which={which!r}: expected one of {', '.join(get_args(Which))}")
    if not rtol > 0 or max_products < 8:
        raise ValueError(
            f"rtol must be positive and max_products at least 8, got {rtol} and {max_products}"
        )
    for name, layer in layers.items():
        if not bool(layer.weight.isfinite().all()):
            raise ValueError(
                f"layer {name}: its weight holds NaN or infinite values; repair the model or "
                "leave it out"
            )
    want = set(quantities)
    batches = list(batches)
    first_order = matrix in ("fisher", "empirical-fisher")
    if (
        first_order
        and want & {"eigenvalues", "density", "layer-densities"}
        and set(quantities) != set(QUANTITIES)
    ):
        raise ValueError(
            f"matrix={matrix!r} gives trace and diagonal; for its spectrum pass matrix='ggn' "
            "(for these losses the same as the true Fisher), or build the operator: "
            "curvprune.fisher(...), curvprune.empirical_fisher(...)"
        )
    taken = factors.capture(model, objective, batches[0], layers) if first_order else None
    found = structure(model, objective, batches[0], layers, taken)
    work = _Work(
        model=model, objective=objective, batches=batches, layers=layers, structure=found, want=want, rtol=rtol,
        max_products=max_products, labels=labels, seed=seed, which=which, vector_bytes=vector_bytes, advance=advance,
        remember=remember,
    )  # fmt: skip
    if first_order and want - {"trace", "diagonal"}:
        work.notes.append(
            f"matrix={matrix!r} gives trace and diagonal only; matrix='ggn' has the spectra as well"
        )
    items = sum(len(next(iter(b.values())) if isinstance(b, Mapping) else b[0]) for b in batches)
    whole: ModelCurvature | None = None
    if first_order:
        curvature = _from_items(work, matrix == "empirical-fisher", taken)
    else:
        operator = hessian if matrix == "hessian" else gauss_newton
        curvature = _second_order(work, matrix, operator, retain)
        if "density" in want:
            whole = _whole(work, operator, retain)
    return Analysis(
        matrix=MATRICES[matrix],
        layers=curvature,
        measure=objective.measure,
        num_items=items,
        model=whole,
        notes=tuple(work.notes),
        diagnosis=None
        if whole is None
        else diagnose(MATRICES[matrix], whole, curvature, _norm(model)),
    )


def _norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


# ------------------------------------------------------------------------------------------- layers


def _from_items(
    work: _Work, empirical: bool, taken: factors.Capture | None
) -> dict[str, LayerCurvature]:
    """Fisher trace and diagonal: batched where the factors hold, item by item for the others."""
    known = {n: work.layers[n] for n in work.structure.factored}
    others = {n: layer for n, layer in work.layers.items() if n not in known}
    result: dict[str, LayerCurvature] = {}
    if known:
        moments = factors.fisher_moments(
            work.model, work.objective, work.batches, known, labels=work.labels, seed=work.seed,
            diagonal="diagonal" in work.want, empirical=empirical, first=taken,
        )  # fmt: skip
        result |= _of_moments(work, moments, "items", stderr=True)
    if others:
        if empirical:
            raise ValueError(
                f"layer {next(iter(others))}: {work.structure.reasons[next(iter(others))]}; the "
                "empirical Fisher needs layers that are called once; leave it out"
            )
        singles = [b for batch in work.batches for b in _items(batch)]
        measured = fisher_pass(
            work.model, work.objective, singles, others, {}, labels=work.labels, seed=work.seed
        )
        for name in others:
            result[name] = LayerCurvature(
                trace=measured.trace(name),
                diagonal=measured.diagonal[name],
                shape=work.layers[name].shape,
            )
    return {n: result[n] for n in work.layers}


def _items(batch: Batch) -> list[Batch]:
    count = len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])
    if isinstance(batch, Mapping):
        return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(count)]
    return [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(count)]


def _of_moments(
    work: _Work, moments: Moments, method: str, *, stderr: bool
) -> dict[str, LayerCurvature]:
    total = float(moments.count.sum())
    result = {}
    for name, sums in moments.traces.items():
        estimate = ratio_estimate(sums, moments.count)
        if not stderr:
            estimate = Estimate(value=float(sums.sum()) / total, stderr=0.0, num_items=len(sums))
        result[name] = LayerCurvature(
            trace=estimate,
            diagonal=moments.diagonal.get(name),
            shape=work.layers[name].shape,
            method=method,
            exact=name in work.structure.piecewise_linear,
            diagonal_error=math.nan if stderr else 0.0,
        )
    return result


def _second_order(
    work: _Work, matrix: str, build: Callable[..., MatrixFree], retain: int
) -> dict[str, LayerCurvature]:
    """Blocks of the Hessian or the Gauss–Newton matrix: exact ones first, probes and Lanczos for
    the rest."""
    found = work.structure
    exact = (
        []
        if not found.exact
        else list(found.factored if matrix == "ggn" else found.piecewise_linear)
    )
    rest = [n for n in work.layers if n not in exact]
    result: dict[str, LayerCurvature] = {}
    per_layer = bool({"trace", "diagonal"} & work.want)
    if exact:
        work.advance("exact blocks", 0, 1)
        result.update(
            work.remember(
                "exact", partial(_exact, work, exact, per_layer), _layer_records, _layers_of
            )
        )
        work.advance("exact blocks", 1, 1)
    if per_layer and (heads := [n for n in rest if n in found.heads]):
        result.update(
            work.remember("heads", partial(_heads, work, heads), _layer_records, _layers_of)
        )
    if rest and (per_layer or "eigenvalues" in work.want):
        done = 0
        for number, group in enumerate(groups := _groups(work, rest)):
            # Built where it is first needed, and gone before the next group's: a graph is the
            # largest thing here.
            block = _Lazy(work, build, group, retain)
            probed = [n for n in group if n not in found.heads]
            if per_layer and probed:
                compute = partial(_probed, work, block, probed, number, (done, len(rest)))
                result.update(
                    work.remember(f"traces-{number}", compute, _layer_records, _layers_of)
                )
            if "eigenvalues" in work.want:
                for i, name in enumerate(group, done):
                    pairs = work.remember(
                        f"eigenvalues-{i}",
                        partial(_eigenpairs, work, block, name, i),
                        _pairs_record,
                        _pairs_of,
                    )
                    base = result.get(name) or LayerCurvature(
                        trace=None, diagonal=None, shape=work.layers[name].shape
                    )
                    result[name] = _with(base, eigenpairs=pairs)
                    work.advance("eigenvalues", i + 1, len(rest))
            done += len(group)
        if len(groups) > 1:
            work.notes.append(
                f"layers were probed in {len(groups)} groups, so that their vectors fit "
                "vector_bytes"
            )
        if slow := [
            n
            for n in rest
            if n in result and (t := result[n].trace) is not None and not t.converged
        ]:
            work.notes.append(
                f"{len(slow)} of {len(rest)} probed traces did not reach a standard error of "
                f"{work.rtol:.0%} with {work.max_products} probes each (first: {slow[0]}); raise "
                "max_products or rtol"
            )
        if matrix == "hessian" and "trace" in work.want:
            result |= _compare_with_gauss_newton(
                work, {n: result[n] for n in rest if n not in found.heads}
            )
    if "layer-densities" in work.want:
        result |= _layer_densities(work, build, result, retain)
    for name in work.layers:
        if name not in result:
            result[name] = LayerCurvature(trace=None, diagonal=None, shape=work.layers[name].shape)
    return {n: result[n] for n in work.layers}


class _Lazy:
    """The operator over a group of layers, built when it is first asked for."""

    def __init__(
        self, work: _Work, build: Callable[..., MatrixFree], group: Sequence[str], retain: int
    ) -> None:
        self.work, self.build, self.retain = work, build, retain
        self.names = {n: work.parameter(n) for n in group}
        self._operator: MatrixFree | None = None

    @property
    def operator(self) -> MatrixFree:
        if self._operator is None:
            self._operator = self.build(
                self.work.model, self.work.batches, self.work.objective,
                parameters=[_literal(p) for p in self.names.values()], retain=self.retain,
            )  # fmt: skip
        return self._operator


def _groups(work: _Work, names: Sequence[str]) -> list[list[str]]:
    """Neighbouring layers whose vectors fit into ``vector_bytes`` together; at least one layer
    each."""
    # probe, product, retained gradient, one to move them; two halves of the diagonal for each kind
    # of probe
    vectors = 8 if "diagonal" in work.want else 4
    groups: list[list[str]] = []
    room = 0
    for name in names:
        weight = work.layers[name].weight
        size = vectors * weight.numel() * (8 if weight.dtype == torch.float64 else 4)
        if not groups or size > room:
            groups.append([])
            room = work.vector_bytes
        groups[-1].append(name)
        room -= size
    return groups


def _exact(work: _Work, names: Sequence[str], per_layer: bool) -> dict[str, LayerCurvature]:
    blocks = factors.exact_gauss_newton(
        work.model, work.objective, work.batches, {n: work.layers[n] for n in names}, moments=per_layer,
        diagonal="diagonal" in work.want, eigenvalues=1 if "eigenvalues" in work.want else 0,
    )  # fmt: skip
    result = _of_moments(work, blocks.moments, "exact", stderr=False)
    for name in names:
        base = result.get(name) or LayerCurvature(
            trace=None, diagonal=None, shape=work.layers[name].shape, method="exact",
            exact=name in work.structure.piecewise_linear,
        )  # fmt: skip
        result[name] = _with(
            base, eigenpairs=blocks.eigenpairs.get(name), spectrum=blocks.spectra.get(name)
        )
    return result


def _heads(work: _Work, names: Sequence[str]) -> dict[str, LayerCurvature]:
    moments = factors.head_moments(
        work.model,
        work.objective,
        work.batches,
        {n: work.layers[n] for n in names},
        diagonal="diagonal" in work.want,
    )
    return _of_moments(work, moments, "exact", stderr=False)


def _probed(
    work: _Work, block: _Lazy, names: Sequence[str], number: int, progress: tuple[int, int]
) -> dict[str, LayerCurvature]:
    before, total = progress
    traces = probe_layers(
        block.operator, {n: block.names[n] for n in names}, rtol=work.rtol, max_products=work.max_products,
        diagonal="diagonal" in work.want, generator=work.generator(1 + 2_000_000 * number),
        advance=lambda done, _: work.advance("traces", before + done, total),
    )  # fmt: skip
    result = {}
    for name, t in traces.items():
        layer, diagonal = work.layers[name], None
        if t.diagonal is not None:
            diagonal = layer.as_matrix(t.diagonal.view(layer.weight.shape))
        result[name] = LayerCurvature(
            trace=t.trace,
            diagonal=diagonal,
            shape=layer.shape,
            method="layer probes" if t.restricted else "joint probes",
            diagonal_error=t.diagonal_error if diagonal is not None else math.nan,
        )
    return result


def _eigenpairs(work: _Work, block: _Lazy, name: str, number: int) -> EigenPairs:
    restricted = block.operator.restrict([block.names[name]])
    return eigenpairs(
        restricted, 1, which=work.which if restricted.space.dim > 1 else "LM", tol=EIGEN_TOL,
        max_products=max(work.max_products, 8), generator=work.generator(1000 + number),
    )  # fmt: skip


def _layer_densities(
    work: _Work, build: Callable[..., MatrixFree], known: Mapping[str, LayerCurvature], retain: int
) -> dict[str, LayerCurvature]:
    """Spectral density of every layer's block: 3 runs of 30 products restricted to the layer."""
    names = {n: work.parameter(n) for n in work.layers}
    operator = build(
        work.model,
        work.batches,
        work.objective,
        parameters=[_literal(p) for p in names.values()],
        retain=retain,
    )
    result = {}
    for i, (name, parameter) in enumerate(names.items()):
        spectrum = work.remember(
            f"density-{i}",
            partial(_layer_density, work, operator, parameter, i),
            _density_record,
            _density_of,
        )
        base = known.get(name) or LayerCurvature(
            trace=None, diagonal=None, shape=work.layers[name].shape
        )
        result[name] = _with(base, density=spectrum)
        work.advance("densities of the layers", i + 1, len(names))
    return result


def _layer_density(
    work: _Work, operator: MatrixFree, parameter: str, number: int
) -> SpectralDensity:
    block = operator.restrict([parameter])
    return density(block, runs=3, steps=30, points=256, generator=work.generator(500_000 + number))


def _compare_with_gauss_newton(
    work: _Work, layers: dict[str, LayerCurvature]
) -> dict[str, LayerCurvature]:
    """Add the Gauss–Newton trace: exact where that is possible, else from sampled labels. One
    gradient or a few."""
    known = {n: work.layers[n] for n in layers if n in work.structure.factored}
    if not known:
        return layers
    if work.structure.exact:
        moments = factors.exact_gauss_newton(
            work.model, work.objective, work.batches, known, diagonal=False
        ).moments
    else:
        moments = factors.fisher_moments(
            work.model,
            work.objective,
            work.batches,
            known,
            labels=work.labels,
            seed=work.seed,
            diagonal=False,
        )
    found = _of_moments(work, moments, "items", stderr=not work.structure.exact)
    return {
        n: _with(c, gauss_newton_trace=found[n].trace if n in found else None)
        for n, c in layers.items()
    }


def _with(base: LayerCurvature, **changes: Any) -> LayerCurvature:
    values = {name: getattr(base, name) for name in LayerCurvature.__dataclass_fields__}
    return LayerCurvature(**(values | changes))


def _literal(name: str) -> str:
    """A parameter name as a glob that matches itself only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


# -------------------------------------------------------------------------------------- whole model


def _whole(work: _Work, build: Callable[..., MatrixFree], retain: int) -> ModelCurvature:
    operator = build(work.model, work.batches, work.objective, retain=retain)
    start = loss_and_gradient(operator)
    n = operator.space.dim
    vector = n * torch.finfo(operator.dtype).bits // 8
    room = work.vector_bytes // vector
    pairs: EigenPairs | None = None
    spectrum: SpectralDensity | None = None
    if min(n, 8) <= room:
        pairs = work.remember(
            "model-eigenvalues",
            lambda: eigenpairs(
                operator, 1, which="BE" if n > 1 else "LM", tol=EIGEN_TOL, max_products=max(work.max_products, 8),
                method=Lanczos(max_basis=None if room >= work.max_products else max(5, int(room))), generator=work.generator(2),
            ),
            _pairs_record, _pairs_of,
        )  # fmt: skip
        work.advance("spectrum", 1, 2)
        steps = int(min(40, room, n))
        runs = 5
        spectrum = work.remember(
            "model-density", lambda: density(operator, runs=runs, steps=steps, generator=work.generator(3)),
            _density_record, _density_of,
        )  # fmt: skip
        work.advance("spectrum", 2, 2)
    else:
        work.notes.append(
            f"the whole model's spectrum was left out: Lanczos needs at least {min(n, 8)} "
            f"vectors of {vector / 1e9:.1f} GB, and vector_bytes is {work.vector_bytes / 1e9:.1f} "
            "GB; per-layer results are not affected"
        )
    return ModelCurvature(
        parameters=n,
        loss=start.loss,
        gradient_norm=start.gradient_norm,
        trace=None if spectrum is None else spectrum.trace(n),
        eigenpairs=pairs,
        density=spectrum,
    )


def diagnose(
    matrix: str, whole: ModelCurvature, layers: Mapping[str, LayerCurvature], parameter_norm: float
) -> Diagnosis:
    """Turn the whole model's spectrum and the layers' traces into what people want to know from
    them."""
    text: list[str] = []
    high = low = rate = relative = rank = below = None
    negative = zero = None
    kind = None
    if whole.eigenpairs is not None:
        values = [float(x) for x in whole.eigenpairs.values]
        high, low = max(values), min(values)
        size = max(abs(high), abs(low))
        if high > 0:
            rate = 2 / high
            text.append(
                f"The sharpest direction has curvature {high:.4g}: plain gradient descent is "
                f"stable up to a learning rate of 2/λmax = {rate:.3g}."
            )
        if size > 0:
            relative = whole.gradient_norm / size
            curved_down = low < -1e-3 * size
            stationary = relative <= 0.05 * parameter_norm
            kind = ("saddle" if curved_down else "minimum") if stationary else "not stationary"
            if low < 0:
                text.append(
                    f"The lowest eigenvalue is {low:.4g}, {abs(low) / size:.1%} of the largest "
                    f"in magnitude; the gradient norm is {whole.gradient_norm:.3g}."
                )
    if whole.density is not None:
        size = float(whole.density.nodes.abs().max())
        size = max(size, abs(high or 0.0), abs(low or 0.0))
        below = 1e-3 * size
        zero = whole.density.mass(-below, below)
        negative = whole.density.mass(-math.inf, math.nextafter(-below, -math.inf))
        rank = whole.density.effective_rank(whole.parameters).value
        text.append(
            f"{zero.value:.1%} of the eigenvalues are within {below:.2g} of zero and "
            f"{negative.value:.2%} below that; the curvature is carried by about {rank:.0f} of "
            f"{whole.parameters} directions."
        )
    pairs = [(n, c.trace, c.gauss_newton_trace) for n, c in layers.items()]
    disagreements = []
    for name, ours, theirs in pairs:
        if ours is None or theirs is None:
            continue
        gap, error = abs(ours.value - theirs.value), math.hypot(ours.stderr, theirs.stderr)
        if gap > 2 * error and gap > 0.2 * abs(theirs.value):
            ratio = ours.value / theirs.value if theirs.value else None
            disagreements.append(
                {"layer": name, "hessian": ours.value, "gauss_newton": theirs.value, "ratio": ratio}
            )
    if disagreements:
        text.append(
            f"In {len(disagreements)} of {len(layers)} layers the {matrix} and Gauss–Newton "
            "traces differ by more than 20 % and twice their error: there the second is no "
            "stand-in for the first."
        )
    return Diagnosis(
        lambda_max=high, lambda_min=low, max_learning_rate=rate, negative_share=negative, near_zero_share=zero,
        near_zero_below=below, effective_rank=rank, gradient_norm=whole.gradient_norm, relative_gradient=relative,
        kind=kind, text=tuple(text), disagreements=tuple(disagreements),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ records


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _estimate(e: Estimate | None) -> dict[str, Any] | None:
    return None if e is None else {"value": _finite(e.value), "stderr": _finite(e.stderr)}


def _pairs_record(pairs: EigenPairs | None) -> dict[str, Any] | None:
    if pairs is None:
        return None
    return {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "errors": pairs.errors.tolist(),
        "converged": pairs.converged,
        "num_products": pairs.num_products,
    }


def _layer_record(c: LayerCurvature) -> dict[str, Any]:
    trace = _estimate(c.trace)
    if trace is not None and c.trace is not None:
        trace |= {
            "num_products": c.trace.num_products,
            "converged": c.trace.converged,
            "method": c.method,
        }
    diagonal = None if c.diagonal_summary is None else dict(c.diagonal_summary)
    if c.diagonal is not None:
        flat = c.diagonal.reshape(-1)
        middle, high = (
            float(flat.kthvalue(max(1, int(q * flat.numel()))).values) for q in (0.5, 0.99)
        )
        diagonal = {
            "mean": float(flat.mean()),
            "max": float(flat.max()),
            "q50": middle,
            "q99": high,
        }
        if math.isfinite(c.diagonal_error):
            diagonal["error"] = c.diagonal_error
    return {
        "trace": trace,
        "parameters": int(np.prod(c.shape)),
        "shape": list(c.shape),
        "diagonal": diagonal,
        "exact": c.exact,
        "gauss_newton_trace": _estimate(c.gauss_newton_trace),
        "eigenvalues": _pairs_record(c.eigenpairs),
        "density": None if c.density is None else _density_record(c.density),
    }


def _layer_records(layers: dict[str, LayerCurvature]) -> dict[str, Any]:
    return {
        n: _layer_record(c)
        | {"method": c.method, "spectrum": None if c.spectrum is None else c.spectrum.tolist()}
        for n, c in layers.items()
    }


def _layers_of(records: Mapping[str, Any]) -> dict[str, LayerCurvature]:
    """What `_layer_records` wrote, without the diagonals."""
    return {
        n: LayerCurvature(
            trace=_estimate_of(r["trace"]),
            diagonal=None,
            shape=(r["shape"][0], r["shape"][1]),
            method=r["method"],
            exact=r["exact"],
            eigenpairs=None if r["eigenvalues"] is None else _pairs_of(r["eigenvalues"]),
            diagonal_summary=r["diagonal"],
            spectrum=None
            if r["spectrum"] is None
            else torch.tensor(r["spectrum"], dtype=torch.float64),
        )
        for n, r in records.items()
    }


def _estimate_of(r: Mapping[str, Any] | None) -> Estimate | None:
    if r is None:
        return None
    value, stderr = (math.nan if r[k] is None else r[k] for k in ("value", "stderr"))
    return Estimate(
        value=value, stderr=stderr, num_products=r["num_products"], converged=r["converged"]
    )


def _pairs_of(r: Mapping[str, Any]) -> EigenPairs:
    values, residuals, errors = (
        torch.tensor(r[k], dtype=torch.float64) for k in ("values", "residuals", "errors")
    )
    return EigenPairs(
        values=values, residuals=residuals, errors=errors, vectors=values.new_zeros(0, len(values)),
        num_products=r["num_products"], converged=r["converged"],
    )  # fmt: skip


def _density_of(r: Mapping[str, Any]) -> SpectralDensity:
    nodes, weights, grid, values = (
        torch.tensor(r[k], dtype=torch.float64) for k in ("nodes", "weights", "grid", "density")
    )
    return SpectralDensity(
        nodes=nodes, weights=weights, grid=grid, density=values, num_products=r["num_products"]
    )


def _density_record(d: SpectralDensity) -> dict[str, Any]:
    return {
        "grid": d.grid.tolist(),
        "density": d.density.tolist(),
        "nodes": d.nodes.tolist(),
        "weights": d.weights.tolist(),
        "num_products": d.num_products,
    }


def _model_record(m: ModelCurvature) -> dict[str, Any]:
    return {
        "parameters": m.parameters,
        "loss": m.loss,
        "gradient_norm": m.gradient_norm,
        "trace": _estimate(m.trace),
        "eigenvalues": _pairs_record(m.eigenpairs),
        "density": None if m.density is None else _density_record(m.density),
    }


def _diagnosis_record(d: Diagnosis) -> dict[str, Any]:
    return {
        "lambda_max": d.lambda_max,
        "lambda_min": d.lambda_min,
        "sharpness": d.lambda_max,
        "max_learning_rate": d.max_learning_rate,
        "negative_share": _estimate(d.negative_share),
        "near_zero_share": _estimate(d.near_zero_share),
        "near_zero_below": d.near_zero_below,
        "effective_rank": d.effective_rank,
        "gradient_norm": d.gradient_norm,
        "relative_gradient": d.relative_gradient,
        "kind": d.kind,
        "text": list(d.text),
        "disagreements": list(d.disagreements),
    }
