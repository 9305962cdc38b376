"""Curvature of a model's loss, per layer and for the whole: each quantity by the best method that its structure allows.

    exact        Gauss–Newton blocks where every item has one prediction of few classes; Hessian blocks of layers whose
                 path to the loss is piecewise linear
    items        Fisher from labels drawn from the model, with standard errors over items
    probes       Hessian traces and diagonals from joint and restricted Hutchinson probes, standard errors over probes
    Lanczos      extreme eigenpairs with residuals; spectral density by stochastic Lanczos quadrature

Standard errors of probes are about these data; those over items are about the population that the items come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvprune.curvature import factors
from curvprune.curvature.estimators import EigenPairs, Estimate, SpectralDensity, Which, density, eigenpairs
from curvprune.curvature.factors import Moments, Structure, structure
from curvprune.curvature.fisher import fisher_pass, ratio_estimate
from curvprune.curvature.layerwise import probe_layers
from curvprune.curvature.products import MatrixFree, gauss_newton, hessian, loss_and_gradient
from curvprune.layers import Layer
from curvprune.objective import Batch, Objective

MATRICES = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton",
    "fisher": "Fisher (labels sampled from the model)",
    "empirical-fisher": "empirical Fisher (the data's own labels, per item)",
}
QUANTITIES = ("trace", "diagonal", "eigenvalues", "density")  # computed unless the user picks
ALL_QUANTITIES = (*QUANTITIES, "layer-densities")
# Asked of eigenvalues whose error shall be below 1e-2: r²/gap is optimistic where the spectrum is dense at its ends.
EIGEN_TOL = 2e-3
BASIS_BYTES = 2 << 30  # Lanczos vectors of the whole model that fit without asking


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCurvature:
    """Curvature of one layer's block.

    Attributes:
        trace: in nats per position; ``stderr`` 0 where it is exact. ``None`` if it was not asked for.
        diagonal: shaped as the weight as a matrix, ``(out, in)``.
        method: how trace and diagonal were found: ``"exact"``, ``"items"``, ``"joint probes"`` or ``"layer probes"``.
        exact: the layer's path to the loss is piecewise linear, so that its Hessian block is its Gauss–Newton block.
        eigenpairs: extreme ones, both ends. Of an exact block, the null space has no vectors: they are nan.
        density: of the block.
        diagonal_error: relative standard error of the diagonal (2-norm); 0 where exact, nan where not estimated.
        gauss_newton_trace: of the same block, for comparison with the Hessian's.
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
        max_learning_rate: ``2/λmax``, above which plain gradient descent diverges along the top direction; None if
            λmax ≤ 0.
        negative_share, near_zero_share: shares of the eigenvalues below ``−near_zero_below`` and within it.
        near_zero_below: ``10⁻³ · max|λ|``.
        effective_rank: ``(Σ|λ|)² / Σλ²``.
        relative_gradient: ``‖∇L‖ / |λmax|``, the length of a Newton step along the top direction if the gradient lay
            there: a point is called stationary if it is below 0.05 times the parameters' norm.
        kind: ``"minimum"``, ``"saddle"`` or ``"not stationary"``.
        text: the same in sentences.
        disagreements: layers whose Hessian and Gauss–Newton traces differ by more than their errors and 20 %.
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
    unit: str = "nats"
    num_items: int = 0
    model: ModelCurvature | None = None
    diagnosis: Diagnosis | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON: summaries of the diagonals, eigenvalues without their vectors."""
        return {
            "matrix": self.matrix,
            "unit": self.unit,
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
    advance: Callable[[str, int, int], None]
    notes: list[str] = field(default_factory=list)

    def generator(self, stream: int) -> torch.Generator:
        """Every step has its own stream: what one step draws does not depend on the others."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + stream) % 2**63)

    def parameter(self, name: str) -> str:
        """The parameter's name in ``model.named_parameters()``, where a shared weight has the first of its names."""
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
    advance: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Analysis:
    """See `curvprune.analyze`. ``advance`` is called with (step, done, total).

    Raises ``ValueError`` for an unknown matrix or quantity, a tolerance that is not positive, a model that is not
    deterministic, a layer that is not on the way to the loss.
    """
    if matrix not in MATRICES:
        raise ValueError(f"matrix={matrix!r}: expected one of {', '.join(MATRICES)}")
    if unknown := [q for q in quantities if q not in ALL_QUANTITIES]:
        raise ValueError(f"quantity {unknown[0]!r}: expected some of {', '.join(ALL_QUANTITIES)}")
    if not rtol > 0 or max_products < 8:
        raise ValueError(f"rtol must be positive and max_products at least 8, got {rtol} and {max_products}")
    want = set(quantities)
    batches = list(batches)
    first_order = matrix in ("fisher", "empirical-fisher")
    if first_order and want & {"eigenvalues", "density", "layer-densities"} and set(quantities) != set(QUANTITIES):
        raise ValueError(
            f"matrix={matrix!r} gives trace and diagonal; for its spectrum pass matrix='ggn' (for these losses the "
            "same as the true Fisher), or build the operator: curvprune.fisher(...), curvprune.empirical_fisher(...)"
        )
    taken = factors.capture(model, objective, batches[0], layers) if first_order else None
    found = structure(model, objective, batches[0], layers, taken)
    work = _Work(
        model=model, objective=objective, batches=batches, layers=layers, structure=found, want=want, rtol=rtol,
        max_products=max_products, labels=labels, seed=seed, which=which, advance=advance,
    )  # fmt: skip
    if first_order and want - {"trace", "diagonal"}:
        work.notes.append(f"matrix={matrix!r} gives trace and diagonal only; matrix='ggn' has the spectra as well")
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
        unit=objective.unit,
        num_items=items,
        model=whole,
        notes=tuple(work.notes),
        diagnosis=None if whole is None else diagnose(MATRICES[matrix], whole, curvature, _norm(model)),
    )


def _norm(model: nn.Module) -> float:
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))


# -------------------------------------------------------------------------------------------------------- layers


def _from_items(work: _Work, empirical: bool, taken: factors.Capture | None) -> dict[str, LayerCurvature]:
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
                f"layer {next(iter(others))}: {work.structure.reasons[next(iter(others))]}; the empirical Fisher "
                "needs layers that are called once; leave it out"
            )
        singles = [b for batch in work.batches for b in _items(batch)]
        measured = fisher_pass(work.model, work.objective, singles, others, {}, labels=work.labels, seed=work.seed)
        for name in others:
            result[name] = LayerCurvature(
                trace=measured.trace(name), diagonal=measured.diagonal[name], shape=work.layers[name].shape
            )
    return {n: result[n] for n in work.layers}


def _items(batch: Batch) -> list[Batch]:
    count = len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])
    if isinstance(batch, Mapping):
        return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(count)]
    return [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(count)]


def _of_moments(work: _Work, moments: Moments, method: str, *, stderr: bool) -> dict[str, LayerCurvature]:
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


def _second_order(work: _Work, matrix: str, build: Callable[..., MatrixFree], retain: int) -> dict[str, LayerCurvature]:
    """Blocks of the Hessian or the Gauss–Newton matrix: exact ones first, probes and Lanczos for the rest."""
    found = work.structure
    exact_names = [] if not found.exact else list(found.factored if matrix == "ggn" else found.piecewise_linear)
    exact = {n: work.layers[n] for n in exact_names}
    rest = {n: layer for n, layer in work.layers.items() if n not in exact}
    result: dict[str, LayerCurvature] = {}
    per_layer = bool({"trace", "diagonal"} & work.want)
    if exact:
        work.advance("exact blocks", 0, 1)
        blocks = factors.exact_gauss_newton(
            work.model, work.objective, work.batches, exact, moments=per_layer, diagonal="diagonal" in work.want,
            eigenvalues=1 if "eigenvalues" in work.want else 0,
        )  # fmt: skip
        work.advance("exact blocks", 1, 1)
        result |= _of_moments(work, blocks.moments, "exact", stderr=False)
        for name in exact:
            base = result.get(name) or LayerCurvature(
                trace=None, diagonal=None, shape=work.layers[name].shape, method="exact",
                exact=name in found.piecewise_linear,
            )  # fmt: skip
            result[name] = _with(base, eigenpairs=blocks.eigenpairs.get(name))
    if rest and (per_layer or "eigenvalues" in work.want):
        names = {n: work.parameter(n) for n in rest}
        block = build(
            work.model, work.batches, work.objective, parameters=[_literal(p) for p in names.values()], retain=retain
        )
        if per_layer:
            traces = probe_layers(
                block, names, rtol=work.rtol, max_products=work.max_products, diagonal="diagonal" in work.want,
                generator=work.generator(1), advance=lambda done, total: work.advance("traces", done, total),
            )  # fmt: skip
            for name, t in traces.items():
                diagonal = None
                if t.diagonal is not None:
                    layer = rest[name]
                    diagonal = layer.as_matrix(t.diagonal.view(layer.weight.shape))
                result[name] = LayerCurvature(
                    trace=t.trace,
                    diagonal=diagonal,
                    shape=rest[name].shape,
                    method="layer probes" if t.restricted else "joint probes",
                    diagonal_error=t.diagonal_error if diagonal is not None else math.nan,
                )
            slow = [n for n, t in traces.items() if not t.trace.converged]
            if slow:
                work.notes.append(
                    f"{len(slow)} of {len(traces)} probed traces did not reach a standard error of {work.rtol:.0%} "
                    f"with {work.max_products} probes each (first: {slow[0]}); raise max_products or rtol"
                )
        if "eigenvalues" in work.want:
            for i, (name, parameter) in enumerate(names.items()):
                restricted = block.restrict([parameter])
                which: Which = work.which if restricted.space.dim > 1 else "LM"
                pairs = eigenpairs(
                    restricted, 1, which=which, tol=EIGEN_TOL, max_products=max(work.max_products, 8),
                    generator=work.generator(1000 + i),
                )  # fmt: skip
                base = result.get(name) or LayerCurvature(trace=None, diagonal=None, shape=rest[name].shape)
                result[name] = _with(base, eigenpairs=pairs)
                work.advance("eigenvalues", i + 1, len(names))
        if matrix == "hessian" and per_layer and "trace" in work.want:
            result |= _compare_with_gauss_newton(work, {n: result[n] for n in rest})
    if "layer-densities" in work.want:
        result |= _layer_densities(work, build, result, retain)
    for name in work.layers:
        if name not in result:
            result[name] = LayerCurvature(trace=None, diagonal=None, shape=work.layers[name].shape)
    return {n: result[n] for n in work.layers}


def _layer_densities(
    work: _Work, build: Callable[..., MatrixFree], known: Mapping[str, LayerCurvature], retain: int
) -> dict[str, LayerCurvature]:
    """Spectral density of every layer's block: 3 runs of 30 products restricted to the layer."""
    names = {n: work.parameter(n) for n in work.layers}
    operator = build(
        work.model, work.batches, work.objective, parameters=[_literal(p) for p in names.values()], retain=retain
    )
    result = {}
    for i, (name, parameter) in enumerate(names.items()):
        spectrum = density(
            operator.restrict([parameter]), runs=3, steps=30, points=256, generator=work.generator(500_000 + i)
        )
        base = known.get(name) or LayerCurvature(trace=None, diagonal=None, shape=work.layers[name].shape)
        result[name] = _with(base, density=spectrum)
        work.advance("densities of the layers", i + 1, len(names))
    return result


def _compare_with_gauss_newton(work: _Work, layers: dict[str, LayerCurvature]) -> dict[str, LayerCurvature]:
    """Add the Gauss–Newton trace: exact where that is possible, else from sampled labels. One gradient or a few."""
    known = {n: work.layers[n] for n in layers if n in work.structure.factored}
    if not known:
        return layers
    if work.structure.exact:
        moments = factors.exact_gauss_newton(work.model, work.objective, work.batches, known, diagonal=False).moments
    else:
        moments = factors.fisher_moments(
            work.model, work.objective, work.batches, known, labels=work.labels, seed=work.seed, diagonal=False
        )
    found = _of_moments(work, moments, "items", stderr=not work.structure.exact)
    return {n: _with(c, gauss_newton_trace=found[n].trace if n in found else None) for n, c in layers.items()}


def _with(base: LayerCurvature, **changes: Any) -> LayerCurvature:
    values = {name: getattr(base, name) for name in LayerCurvature.__dataclass_fields__}
    return LayerCurvature(**(values | changes))


def _literal(name: str) -> str:
    """A parameter name as a glob that matches itself only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


# ---------------------------------------------------------------------------------------------------- whole model


def _whole(work: _Work, build: Callable[..., MatrixFree], retain: int) -> ModelCurvature:
    operator = build(work.model, work.batches, work.objective, retain=retain)
    start = loss_and_gradient(operator)
    n = operator.space.dim
    vector = n * torch.finfo(operator.dtype).bits // 8
    room = BASIS_BYTES // vector
    pairs: EigenPairs | None = None
    spectrum: SpectralDensity | None = None
    if min(n, 8) <= room:
        pairs = eigenpairs(
            operator, 1, which="BE" if n > 1 else "LM", tol=EIGEN_TOL, max_products=max(work.max_products, 8),
            max_basis=None if room >= work.max_products else max(5, int(room)), generator=work.generator(2),
        )  # fmt: skip
        work.advance("spectrum", 1, 2)
        steps = int(min(40, room, n))
        runs = 5
        spectrum = density(operator, runs=runs, steps=steps, generator=work.generator(3))
        work.advance("spectrum", 2, 2)
    else:
        work.notes.append(
            f"the whole model's spectrum was left out: Lanczos needs at least {min(n, 8)} vectors of "
            f"{vector / 1e9:.1f} GB, and {BASIS_BYTES / 1e9:.1f} GB are set aside; per-layer results are not affected"
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
    """Turn the whole model's spectrum and the layers' traces into what people want to know from them."""
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
                f"The sharpest direction has curvature {high:.4g}: plain gradient descent is stable up to a learning "
                f"rate of 2/λmax = {rate:.3g}."
            )
        if size > 0:
            relative = whole.gradient_norm / size
            curved_down = low < -1e-3 * size
            stationary = relative <= 0.05 * parameter_norm
            kind = ("saddle" if curved_down else "minimum") if stationary else "not stationary"
            if low < 0:
                text.append(
                    f"The lowest eigenvalue is {low:.4g}, {abs(low) / size:.1%} of the largest in magnitude; the "
                    f"gradient norm is {whole.gradient_norm:.3g}."
                )
    if whole.density is not None:
        size = float(whole.density.nodes.abs().max())
        size = max(size, abs(high or 0.0), abs(low or 0.0))
        below = 1e-3 * size
        zero = whole.density.mass(-below, below)
        negative = whole.density.mass(-math.inf, math.nextafter(-below, -math.inf))
        rank = whole.density.effective_rank(whole.parameters).value
        text.append(
            f"{zero.value:.1%} of the eigenvalues are within {below:.2g} of zero and {negative.value:.2%} below that; "
            f"the curvature is carried by about {rank:.0f} of {whole.parameters} directions."
        )
    pairs = [(n, c.trace, c.gauss_newton_trace) for n, c in layers.items()]
    disagreements = []
    for name, ours, theirs in pairs:
        if ours is None or theirs is None:
            continue
        gap, error = abs(ours.value - theirs.value), math.hypot(ours.stderr, theirs.stderr)
        if gap > 2 * error and gap > 0.2 * abs(theirs.value):
            ratio = ours.value / theirs.value if theirs.value else None
            disagreements.append({"layer": name, "hessian": ours.value, "gauss_newton": theirs.value, "ratio": ratio})
    if disagreements:
        text.append(
            f"In {len(disagreements)} of {len(layers)} layers the {matrix} and Gauss–Newton traces differ by more than "
            "20 % and twice their error: there the second is no stand-in for the first."
        )
    return Diagnosis(
        lambda_max=high, lambda_min=low, max_learning_rate=rate, negative_share=negative, near_zero_share=zero,
        near_zero_below=below, effective_rank=rank, gradient_norm=whole.gradient_norm, relative_gradient=relative,
        kind=kind, text=tuple(text), disagreements=tuple(disagreements),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- records


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
        trace |= {"num_products": c.trace.num_products, "converged": c.trace.converged, "method": c.method}
    diagonal = None
    if c.diagonal is not None:
        flat = c.diagonal.reshape(-1)
        middle, high = (float(flat.kthvalue(max(1, int(q * flat.numel()))).values) for q in (0.5, 0.99))
        diagonal = {"mean": float(flat.mean()), "max": float(flat.max()), "q50": middle, "q99": high}
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
