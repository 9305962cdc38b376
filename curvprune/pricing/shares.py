"""Prices as shares of the loss: what a layer's rounding costs with the answers of later layers.

A plan is applied in one sequential pass, in which every layer makes up for the drift that earlier
ones have caused. Let D be the divergence of its outputs from those of the uncompressed model. Let
V be the layer's target at its point of the pass, W_P what the plan made of it, and Δ = W_P − V.

    L(l) = ⟨∇D, Δ⟩,    C(l, o) = ½ L(l) · E(l, o) / E(l, P),    E = tr(B Δ A Δᵀ) / tr A,

with A the second moment of the layer's inputs there, and B diagonal: how much the loss bends along
each of the layer's outputs.

Why: D is close to ½ eᵀFe, with e all that the roundings and the answers to them change. So the sum
of all L is eᵀFe, twice the divergence (Euler). To first order a change of the answers costs
nothing, because they are near their best. Products of different layers' roundings average out.
Hence ½ L(l) is the layer's own part. Half the sum of the shares beside D, which is measured, is the
audit of all this (`Audit`). Shares are then stretched by one factor, so that the last plan costs
what was measured of it.

Several passes (rounds) of different plans are averaged in units of the same error. A layer's share
is noisy, and is moved towards what its error lets expect, for its kind and depth, by as much as it
is noise (`shrunk_shares`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float

from curvprune.curvature import Estimate, ratio_estimate
from curvprune.planning import MeasuredPlan
from curvprune.pricing.ledger import Audit, Ledger, Row

KEPT_APART = 4  # layers of a kind and depth that make a group of their own
DEPTHS = 3  # parts of the model's depth
LEAST = 0.1  # of its group's mean that a layer costs, whatever was measured of it
MOST_SCALED = 4.0  # by no more are shares stretched to what was measured; beyond they are noise
CLEAR = 3.0  # standard errors
KEPT_OR_CAST = ("keep", "float16", "bfloat16")  # keys of options that neither round nor prune
LABELS_MAY_DIFFER = 0.5  # of a divergence, by which the loss may rise more or less
LEAST_OF_KIND = 0.2  # of its kind's mean that a group's is at least; of all layers', a kind's


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One sequential pass under a plan, and the slope of its divergence.

    Attributes:
        choices: layer → option key of the plan.
        count: positions of each item.
        divergence: from the uncompressed model, summed over the positions of each item.
        rises: of the loss, by its labels where it has any, likewise.
        shares: layer → ``⟨∇D, W_P − V⟩`` of each item.
        answers: layer → ``⟨∇D, V − W⟩`` of each item: near zero where answers are at their best.
        errors: layer → option key → ``tr(B Δ A Δᵀ)``; the plan's own option is among them.
        strangers: layer → option key → ``⟨∇D, W_o − V⟩`` per position of options that are not in
            the plan, so that the divergence knows nothing of their errors.
    """

    choices: dict[str, str]
    count: list[float]
    divergence: list[float]
    rises: list[float]
    shares: dict[str, list[float]]
    answers: dict[str, list[float]]
    errors: dict[str, dict[str, float]]
    strangers: dict[str, dict[str, float]] = field(default_factory=dict)

    def audit(self) -> Audit:
        """Half the sum of the shares, and what was measured."""
        halves = 0.5 * np.sum(list(self.shares.values()), axis=0)
        answers = 0.5 * np.sum(list(self.answers.values()), axis=0)
        # Casts and layers that stay do not make a uniform plan a mixed one.
        named = [key for key in self.choices.values() if key not in KEPT_OR_CAST]
        named = named or list(self.choices.values())
        most = max(sorted(set(named)), key=named.count)
        uniform = len(set(named)) == 1
        summed = _mean(halves, self.count)
        measured = _mean(np.array(self.divergence), self.count)
        return Audit(
            plan=most if uniform else f"mixed, mostly {most}",
            shares=summed.value,
            shares_stderr=summed.stderr,
            answers=_mean(answers, self.count).value,
            divergence=measured.value,
            divergence_stderr=measured.stderr,
        )


def measured_loss(one: Round) -> MeasuredPlan:
    """What the plan of a round loses, as `curvprune.planning.corrections` takes it.

    The loss rises by the divergence where the uncompressed model is right about the labels. Where
    it is not, it rises by less or by more: SmolLM2-135M-Instruct loses .6 of its divergence on
    plain text. So the divergence, give or take `LABELS_MAY_DIFFER` of it, is expected before the
    labels are looked at. Their rise is weighed against it by the two errors (a normal prior).
    """
    expected = _mean(np.array(one.divergence), one.count)
    seen = _mean(np.array(one.rises), one.count)
    if len(one.count) == 1 or expected.value <= 0:
        return MeasuredPlan(one.choices, expected.value, expected.stderr)
    loose = 1 / (LABELS_MAY_DIFFER * expected.value) ** 2
    if seen.stderr == 0:
        return MeasuredPlan(one.choices, seen.value, 0.0)
    tight = 1 / seen.stderr**2
    value = (tight * seen.value + loose * expected.value) / (tight + loose)
    return MeasuredPlan(one.choices, value, (tight + loose) ** -0.5)


def share_ledger(
    rounds: Sequence[Round], sizes: Mapping[str, Mapping[str, int]], *, measure: str
) -> Ledger:
    """The ledger of some rounds over the same items.

    Args:
        rounds: the first has the errors of every option.
        sizes: layer → option key → bytes on disk.

    Options without an error, such as ``keep``, cost nothing. No passes over data.
    """
    first = rounds[0]
    count = np.array(first.count)
    # 1. Every layer's share at its option of the first plan, from all rounds.
    layers = list(sizes)
    found = np.stack([0.5 * _at_first_option(rounds, layer) for layer in layers])
    shrunk = shrunk_shares(
        layers,
        found,
        count,
        errors=np.array([_own_error(first, layer) for layer in layers]),
        noise=np.array([_noise(rounds, layer) for layer in layers]),
    )
    # 2. Other options cost as much more as their error is larger.
    factors: dict[tuple[str, str], float] = {}
    for layer in layers:
        errors = first.errors.get(layer, {})
        own = _own_error(first, layer)
        for key in sizes[layer]:
            factors[layer, key] = errors.get(key, 0.0) / own if own > 0 else 0.0
    # 3. The plan of the last round whose divergence stands out costs what was measured of it.
    clear = [one for one in rounds if _stands_out(one)]
    scale = _to_measured(
        (clear or rounds)[-1], dict(zip(layers, shrunk.sums, strict=True)), factors
    )
    rows, columns = [], []
    for place, layer in enumerate(layers):
        for key, size in sizes[layer].items():
            factor = scale * factors[layer, key]
            sums = factor * shrunk.sums[place]
            estimate = _mean(sums, first.count)
            model = factor * float(shrunk.spread[place])
            stderr = math.hypot(estimate.stderr, model) if factor else 0.0
            rows.append(
                Row(
                    layer=layer,
                    option=key,
                    bytes=size,
                    price=estimate.value,
                    stderr=stderr,
                    model_stderr=model,
                )
            )
            columns.append(sums)
    return Ledger(
        rows=tuple(rows),
        sums=np.stack(columns, axis=1),
        count=count,
        measure=measure,
        labels=0,
        curvature="shares of the loss in a sequential pass",
        prices="shares",
        audits=tuple(one.audit() for one in rounds),
    )


def _stands_out(one: Round) -> bool:
    measured = _mean(np.array(one.divergence), one.count)
    return measured.value > CLEAR * measured.stderr or len(one.count) == 1


def _to_measured(
    last: Round,
    sums: Mapping[str, Float[np.ndarray, " items"]],
    factors: Mapping[tuple[str, str], float],
) -> float:
    """What prices are multiplied by, so that a plan is predicted to diverge as it was measured
    to."""
    predicted = 0.0
    for layer, own in sums.items():
        predicted += factors[layer, last.choices[layer]] * float(own.sum())
    if predicted <= 0:
        return 1.0
    return float(np.clip(sum(last.divergence) / predicted, 1 / MOST_SCALED, MOST_SCALED))


def _own_error(one: Round, layer: str) -> float:
    """The error of a layer under the round's plan; 0 where nothing changes it."""
    return one.errors.get(layer, {}).get(one.choices[layer], 0.0)


def _at_first_option(rounds: Sequence[Round], layer: str) -> Float[np.ndarray, " items"]:
    """A layer's share in units of its option's error in the first round, over all rounds: the sum
    of what they cost, over the sum of their errors."""
    total, error = np.zeros(len(rounds[0].count)), 0.0
    for one in rounds:
        own = _own_error(one, layer)
        if own > 0:
            total += np.array(one.shares[layer])
            error += own
    first = _own_error(rounds[0], layer)
    return total * (first / error) if error > 0 else total


def _noise(rounds: Sequence[Round], layer: str) -> float:
    """The variance of half of `_at_first_option` per position: that of the items, and products of
    the layer's error with those of others, which average out over roundings and not in one.

    The slope along an option that is not in the plan has nothing but noise, as large as its error;
    0 where there is none.
    """
    first = rounds[0]
    own = _own_error(first, layer)
    squares = []
    for key, slope in first.strangers.get(layer, {}).items():
        error = first.errors[layer][key]
        if error > 0:
            squares.append((0.5 * slope) ** 2 * own / error)
    if not squares:
        return 0.0
    # Over several rounds the sum of products grows with the root of the sum of errors.
    total = sum(_own_error(one, layer) for one in rounds)
    return float(np.mean(squares)) * own / total if total > 0 else 0.0


def _mean(sums: np.ndarray, count: Sequence[float]) -> Estimate:
    return ratio_estimate(torch.from_numpy(np.asarray(sums)), torch.tensor(count).double())


# ----------------------------------------------------------------------------------- shrinking


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrunk:
    """Shares moved towards the mean of their group.

    Attributes:
        sums: each item's part of each layer's, ``(layers, items)``.
        spread: the standard error that is not the items', ``(layers,)``.
    """

    sums: Float[np.ndarray, "layers items"]
    spread: Float[np.ndarray, " layers"]


def shrunk_shares(
    layers: Sequence[str],
    sums: Float[np.ndarray, "layers items"],
    count: Float[np.ndarray, " items"],
    *,
    errors: Float[np.ndarray, " layers"],
    noise: Float[np.ndarray, " layers"],
) -> Shrunk:
    """Empirical Bayes: what is known of a layer besides its share is its error E, the price of its
    rounding if nothing answered. The rate ρ, share over error, says how much is left of that; it
    depends on the kind of layer and its depth. So a share is moved towards ρ E of its group, by as
    much as it is noise, and a group's ρ likewise towards that of its kind (`_towards_rate`).

    Groups are layers of one kind (the name without its numbers) in one third of the depth; kinds of
    few layers stay whole, and all kinds that are too small make one group. No layer costs less than
    `LEAST` of ρ E, with a ρ that is positive.

    Args:
        sums: half the slope of each item along each layer's error.
        errors: ``tr(B Δ A Δᵀ)`` of the same.
        noise: the variance of each share per position, 0 where only the items tell.

    Source: Efron and Morris 1973, "Stein's estimation rule and its competitors".
    """
    number = float(count.sum())
    found, spread = sums.copy(), np.zeros(len(layers))
    overall = max(_rate(sums, errors) / number, 0.0)
    for kind in _kinds(layers):
        groups = _by_depth(kind)
        of_kind = max(_rate(sums[kind], errors[kind]) / number, LEAST_OF_KIND * overall)
        # 1. The groups, whose sums average noise out.
        wholes = np.stack([sums[group].sum(0) for group in groups])
        scales = np.array([errors[group].sum() for group in groups])
        noises = np.array([noise[group].sum() for group in groups])
        wholes, above = _towards_rate(wholes, scales, noises, count, least=2)
        for group, whole, scale, apart in zip(groups, wholes, scales, above, strict=True):
            if scale == 0:
                continue
            # 2. The layers of each, around its rate.
            part = errors[group] / scale
            own, tau = _towards_rate(
                sums[group], errors[group], noise[group], count, least=KEPT_APART
            )
            shrunk = own + part[:, None] * (whole - own.sum(0))
            # 3. None is free: where a rate is lost in noise, the kind's stands in for it.
            rate = max(float(whole.sum()) / number / scale, LEAST_OF_KIND * of_kind)
            value = shrunk.sum(1) / number
            raised = np.maximum(value, LEAST * rate * errors[group])
            found[group] = shrunk + (raised - value)[:, None] * count
            spread[group] = np.hypot(tau, part * apart)
    return Shrunk(sums=found, spread=spread)


def _rate(sums: Float[np.ndarray, "n items"], errors: Float[np.ndarray, " n"]) -> float:
    whole = float(errors.sum())
    return float(sums.sum()) / whole if whole > 0 else 0.0


def _towards_rate(
    values: Float[np.ndarray, "n items"],
    errors: Float[np.ndarray, " n"],
    noise: Float[np.ndarray, " n"],
    count: Float[np.ndarray, " items"],
    *,
    least: int,
) -> tuple[Float[np.ndarray, "n items"], Float[np.ndarray, " n"]]:
    """Values moved towards their common rate times their errors,

        θ = ρ E + w (x − ρ E),    w = τ² E / (τ² E + s²).

    Rates scatter by τ about ρ. The variance of a value is s² E, because products of one layer's
    error with others' grow with its root. It is the ``noise``, the items' included, or at least
    theirs. Returns values and the error that is left besides the items': ``(1 − w) τ E`` and the
    rest of the noise. Fewer than ``least`` stay as they are.
    """
    n, number, whole = len(values), float(count.sum()), float(errors.sum())
    if n < least or len(count) < 2 or whole == 0:
        return values, np.zeros(n)
    # 1. Distances from the common rate, and how well they are known.
    middle = errors[:, None] / whole * values.sum(0)
    apart = values - middle
    of_items = np.array([_mean(one, count.tolist()).stderr ** 2 for one in apart])
    scatter = max(float(noise.sum()), float(of_items.sum()))
    # 2. What is left of their variance.
    distances = apart.sum(1) / number
    left = float((distances**2).sum()) * n / (n - 1) - scatter
    tau2 = max(0.0, left) / float((errors**2).sum())
    s2 = scatter / whole
    if tau2 == 0 and s2 == 0:
        return values, np.zeros(n)
    w = tau2 * errors / (tau2 * errors + s2)
    besides = np.maximum(noise - of_items, 0.0)
    spread = np.hypot((1 - w) * tau2**0.5 * errors, w * np.sqrt(besides))
    return middle + w[:, None] * apart, spread


def _kinds(layers: Sequence[str]) -> list[list[int]]:
    """Places of the layers of each kind: those whose names differ in whole numbers alone. Kinds of
    fewer than `KEPT_APART` layers are one."""
    places: dict[str, list[int]] = {}
    for place, name in enumerate(layers):
        parts = ["*" if part.isdigit() else part for part in name.split(".")]
        places.setdefault(".".join(parts), []).append(place)
    kinds = [kind for kind in places.values() if len(kind) >= KEPT_APART]
    rest = [place for kind in places.values() if len(kind) < KEPT_APART for place in kind]
    return [*kinds, rest] if rest else kinds


def _by_depth(kind: Sequence[int]) -> list[list[int]]:
    """A kind's layers in `DEPTHS` parts, in the order of the model; fewer where a part would have
    fewer than `KEPT_APART`."""
    parts = min(DEPTHS, max(1, len(kind) // KEPT_APART))
    bounds = [round(part * len(kind) / parts) for part in range(parts + 1)]
    return [list(kind[a:b]) for a, b in pairwise(bounds)]
