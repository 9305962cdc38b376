"""Traces and diagonals of the diagonal blocks of a matrix-free operator, for all layers at once.

A *joint* probe z over all layers costs one product, and ``z_l · (Hz)_l`` is unbiased for tr H_ll of
every layer: the blocks between layers only add variance. A *restricted* probe is zero outside its
layer and prunes the backward passes to it: about a third of the cost, without that variance, for
one layer. Start joint; from the spread of a few restricted probes work out which layers are cheaper
finished alone; spend each layer's budget accordingly.

Sources: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007 (diagonal). With Rademacher probes the
variance of a joint one is that of a restricted one plus ‖blocks between the layer and the
others‖²_F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from curvprune.curvature.estimates import Estimate, believable
from curvprune.curvature.operators import Operator
from curvprune.curvature.random_vectors import signs

PILOT = 8  # probes of a kind before its spread is believed
RESTRICTED = 1 / 3  # cost of a restricted probe in joint ones (measured: 0.25 to 0.4)


@dataclass(slots=True)
class _Kind:
    """Running moments of one kind of probe, and the sums of its diagonal samples in two halves."""

    samples: list[float] = field(default_factory=list)
    halves: list[Tensor] = field(default_factory=list)

    def add(self, sample: Tensor, keep: bool) -> None:
        self.samples.append(float(sample.sum(dtype=torch.float64)))
        if keep:
            half = (len(self.samples) - 1) % 2
            if len(self.halves) <= half:
                self.halves.append(sample.clone())
            else:
                self.halves[half] += sample

    @property
    def count(self) -> int:
        return len(self.samples)

    @property
    def mean(self) -> float:
        return sum(self.samples) / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """Of one sample."""
        if self.count < 2:
            return math.inf
        return sum((s - self.mean) ** 2 for s in self.samples) / (self.count - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTrace:
    """Trace of one layer's block and, if asked for, its diagonal (flat, like the parameter).

    Attributes:
        diagonal_error: ``‖standard error‖ / ‖diagonal‖``, from two halves of the probes.
        joint, restricted: probes of each kind behind it.
    """

    trace: Estimate
    diagonal: Float[Tensor, " n"] | None
    diagonal_error: float
    joint: int
    restricted: int


def probe_layers(
    op: Operator,
    names: Mapping[str, str],
    *,
    rtol: float = 0.05,
    max_products: int = 32,
    diagonal: bool = False,
    generator: torch.Generator,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LayerTrace]:
    """Hutchinson estimates of the blocks' traces (and diagonals) until each standard error is at
    most ``rtol·|trace|``.

    Args:
        op: over the parameters of the layers.
        names: layer → parameter of ``op.space``.
        max_products: probes that a layer may have, joint and restricted together; its flag is false
            if they did not do.
        advance: called with (layers finished, layers).

    Cost: one product per joint probe, about a third of one per restricted probe.
    """
    if not rtol > 0 or max_products < 2:
        raise ValueError(
            f"rtol must be positive and max_products at least 2, got {rtol} and {max_products}"
        )
    joint = {n: _Kind() for n in names}
    alone = {n: _Kind() for n in names}

    def probe_jointly(count: int) -> None:
        for _ in range(count):
            z = signs(op, 1, generator)[:, 0].to(device=op.device, dtype=op.dtype)
            parts, products = op.space.split(z), op.space.split(op @ z)
            for layer, parameter in names.items():
                joint[layer].add((parts[parameter] * products[parameter]).reshape(-1), diagonal)

    def probe_alone(layer: str, count: int) -> None:
        if len(names) == 1:  # there is nothing to leave out
            probe_jointly(count)
            return
        block = op.restrict([names[layer]])
        for _ in range(count):
            z = signs(block, 1, generator)[:, 0].to(device=op.device, dtype=op.dtype)
            alone[layer].add(z * (block @ z), diagonal)

    def met(layer: str) -> bool:
        value, stderr = _combined(joint[layer], alone[layer])
        probes = joint[layer].count + alone[layer].count
        return probes >= PILOT and believable(stderr, probes) <= rtol * abs(value)

    probe_jointly(min(PILOT, max_products))
    todo = [n for n in names if not met(n)]
    advance(len(names) - len(todo), len(names))
    if (
        todo and max_products < 2 * PILOT
    ):  # no room for a second kind whose spread could be believed
        probe_jointly(max_products - min(PILOT, max_products))
        todo = []
    elif len(names) > 1:
        for layer in todo:
            probe_alone(layer, min(PILOT, max_products - joint[layer].count))
        todo = [n for n in todo if not met(n)]
        more = min(
            _joint_probes_worth(todo, joint, alone, rtol, max_products), max_products - 2 * PILOT
        )
        while more > 0 and todo:
            probe_jointly(min(more, PILOT))
            more -= PILOT
            todo = [n for n in todo if not met(n)]
    for layer in todo:
        while (
            not met(layer) and (left := max_products - joint[layer].count - alone[layer].count) > 0
        ):
            value, stderr = _combined(joint[layer], alone[layer])
            have = alone[layer].count or joint[layer].count
            want = (
                have * (stderr / (rtol * abs(value))) ** 2
                if value and math.isfinite(stderr)
                else math.inf
            )
            probe_alone(layer, max(1, int(min(left, max(2, have), max(2.0, want - have)))))
        advance(len(names) - len(todo) + todo.index(layer) + 1, len(names))
    return {n: _result(joint[n], alone[n], rtol, met(n)) for n in names}


def _joint_probes_worth(
    todo: list[str],
    joint: Mapping[str, _Kind],
    alone: Mapping[str, _Kind],
    rtol: float,
    max_products: int,
) -> int:
    """How many more joint probes make the whole cheapest: those layers that they do not bring there
    go on alone."""

    def needed(kind: _Kind, layer: str) -> float:
        value, _ = _combined(joint[layer], alone[layer])
        target = (rtol * value) ** 2
        return kind.variance / target if target else math.inf

    def finish(layers: list[str]) -> float:
        return sum(RESTRICTED * min(needed(alone[n], n), float(max_products)) for n in layers)

    best, cost = 0, finish(todo)
    for layer in todo:
        count = needed(joint[layer], layer)
        if (
            count > max_products
        ):  # joint probes do not bring this layer there: they would be spent for nothing
            continue
        total = count + finish([n for n in todo if needed(joint[n], n) > count])
        if total < cost:
            best, cost = math.ceil(count), total
    return best


def _combined(joint: _Kind, alone: _Kind) -> tuple[float, float]:
    """Both kinds weighted by the precision of their means. The weights come from the same probes as
    the means; with `PILOT` of each kind that costs a little efficiency, not the centre, because
    sample and variance of symmetric estimates are nearly uncorrelated."""
    # The spread of two or three samples can be small by chance, and would then take all the weight.
    parts = [k for k in (joint, alone) if k.count >= PILOT]
    if not parts:
        kind = max(joint, alone, key=lambda k: k.count)
        return kind.mean, (kind.variance / kind.count) ** 0.5 if kind.count else math.inf
    precisions = [k.count / k.variance if k.variance > 0 else math.inf for k in parts]
    for kind, precision in zip(parts, precisions, strict=True):
        if math.isinf(precision):
            return kind.mean, 0.0
    value = sum(p * k.mean for p, k in zip(precisions, parts, strict=True)) / sum(precisions)
    return value, sum(precisions) ** -0.5


def _result(joint: _Kind, alone: _Kind, rtol: float, converged: bool) -> LayerTrace:
    value, stderr = _combined(joint, alone)
    count = joint.count + alone.count
    diagonal, error = None, math.inf
    kinds = [k for k in (joint, alone) if k.halves and k.count >= PILOT] or [
        k for k in (joint, alone) if k.halves
    ][:1]
    if kinds:
        total = torch.zeros_like(kinds[0].halves[0])
        difference = torch.zeros_like(total)
        weights = [k.count / max(k.variance, 1e-300) for k in kinds]
        for kind, weight in zip(kinds, weights, strict=True):
            share = weight / sum(weights)
            first = kind.halves[0]
            second = kind.halves[1] if len(kind.halves) > 1 else torch.zeros_like(first)
            total += (first + second) * (share / kind.count)
            difference += (first / ((kind.count + 1) // 2) - second / max(1, kind.count // 2)) * (
                share / 2
            )
        diagonal = total
        norm = float(torch.linalg.vector_norm(total))
        error = float(torch.linalg.vector_norm(difference)) / norm if norm else 0.0
    trace = Estimate(
        value=value, stderr=stderr, num_items=count, num_products=count, converged=converged
    )
    return LayerTrace(
        trace=trace,
        diagonal=diagonal,
        diagonal_error=error,
        joint=joint.count,
        restricted=alone.count,
    )
