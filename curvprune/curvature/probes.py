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
from collections.abc import Callable, Iterable, Mapping
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
            # Two halves, whose difference tells the error of the diagonal.
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
        mean = self.mean
        return sum((s - mean) ** 2 for s in self.samples) / (self.count - 1)


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
    probing = _Probing(op, names, rtol, max_products, diagonal, generator)
    total = len(names)

    # 1. A pilot of joint probes: often they are enough.
    pilot = min(PILOT, max_products)
    probing.jointly(pilot)
    todo = probing.unmet(names)
    advance(total - len(todo), total)

    if todo and max_products < 2 * PILOT:
        # No room for a second kind whose spread could be believed.
        probing.jointly(max_products - pilot)
        todo = []
    elif total > 1:
        # 2. A pilot of restricted probes for the layers that are not there yet.
        for layer in todo:
            probing.alone(layer, min(PILOT, probing.left(layer)))
        todo = probing.unmet(todo)
        # 3. As many more joint probes as make the whole cheapest.
        more = min(_joint_probes_worth(todo, probing), max_products - 2 * PILOT)
        while more > 0 and todo:
            probing.jointly(min(more, PILOT))
            more -= PILOT
            todo = probing.unmet(todo)

    # 4. Every other layer is finished by itself.
    for number, layer in enumerate(todo, start=1):
        probing.finish(layer)
        advance(total - len(todo) + number, total)
    return {n: probing.result(n) for n in names}


class _Probing:
    """The probes of all layers so far, of both kinds."""

    def __init__(
        self,
        op: Operator,
        names: Mapping[str, str],
        rtol: float,
        max_products: int,
        diagonal: bool,
        generator: torch.Generator,
    ) -> None:
        self.op, self.names = op, names
        self.rtol, self.max_products = rtol, max_products
        self.keep_diagonal, self.generator = diagonal, generator
        self.joint = {n: _Kind() for n in names}
        self.restricted = {n: _Kind() for n in names}

    def jointly(self, count: int) -> None:
        """Probe all layers at once."""
        space = self.op.space
        for _ in range(count):
            z = self._signs(self.op)
            parts, products = space.split(z), space.split(self.op @ z)
            for layer, parameter in self.names.items():
                sample = (parts[parameter] * products[parameter]).reshape(-1)
                self.joint[layer].add(sample, self.keep_diagonal)

    def alone(self, layer: str, count: int) -> None:
        """Probe one layer."""
        if len(self.names) == 1:  # there is nothing to leave out
            self.jointly(count)
            return
        block = self.op.restrict([self.names[layer]])
        for _ in range(count):
            z = self._signs(block)
            self.restricted[layer].add(z * (block @ z), self.keep_diagonal)

    def finish(self, layer: str) -> None:
        """Probe one layer until its trace is good enough or its products are spent."""
        while not self.met(layer) and self.left(layer) > 0:
            value, stderr = self.estimate(layer)
            have = self.restricted[layer].count or self.joint[layer].count
            # The error falls with the root of the number of probes.
            want = math.inf
            if value and math.isfinite(stderr):
                want = have * (stderr / (self.rtol * abs(value))) ** 2
            # Its estimate is rough: at most twice as many as there are, then look again.
            more = min(self.left(layer), max(2, have), max(2.0, want - have))
            self.alone(layer, max(1, int(more)))

    def left(self, layer: str) -> int:
        """Probes that the layer may still have."""
        return self.max_products - self.joint[layer].count - self.restricted[layer].count

    def estimate(self, layer: str) -> tuple[float, float]:
        """The trace so far and its standard error."""
        return _combined(self.joint[layer], self.restricted[layer])

    def met(self, layer: str) -> bool:
        """Whether the layer's trace is good enough."""
        value, stderr = self.estimate(layer)
        probes = self.joint[layer].count + self.restricted[layer].count
        return probes >= PILOT and believable(stderr, probes) <= self.rtol * abs(value)

    def unmet(self, layers: Iterable[str]) -> list[str]:
        return [n for n in layers if not self.met(n)]

    def result(self, layer: str) -> LayerTrace:
        value, stderr = self.estimate(layer)
        joint, restricted = self.joint[layer], self.restricted[layer]
        diagonal, error = _diagonal(joint, restricted)
        count = joint.count + restricted.count
        trace = Estimate(
            value=value,
            stderr=stderr,
            num_items=count,
            num_products=count,
            converged=self.met(layer),
        )
        return LayerTrace(
            trace=trace,
            diagonal=diagonal,
            diagonal_error=error,
            joint=joint.count,
            restricted=restricted.count,
        )

    def _signs(self, op: Operator) -> Float[Tensor, " n"]:
        return signs(op, 1, self.generator)[:, 0].to(device=self.op.device, dtype=self.op.dtype)


def _joint_probes_worth(todo: list[str], probing: _Probing) -> int:
    """How many more joint probes make the whole cheapest: those layers that they do not bring there
    go on alone."""
    most = probing.max_products

    def needed(kind: _Kind, layer: str) -> float:
        value, _ = probing.estimate(layer)
        target = (probing.rtol * value) ** 2
        return kind.variance / target if target else math.inf

    def cost_alone(layers: list[str]) -> float:
        probes = [min(needed(probing.restricted[n], n), float(most)) for n in layers]
        return sum(RESTRICTED * count for count in probes)

    # A candidate for each layer: exactly the joint probes that it needs.
    best, least = 0, cost_alone(todo)
    for layer in todo:
        count = needed(probing.joint[layer], layer)
        if count > most:
            # Joint probes do not bring this layer there: they would be spent for nothing.
            continue
        others = [n for n in todo if needed(probing.joint[n], n) > count]
        cost = count + cost_alone(others)
        if cost < least:
            best, least = math.ceil(count), cost
    return best


def _combined(joint: _Kind, alone: _Kind) -> tuple[float, float]:
    """Both kinds weighted by the precision of their means.

    The weights come from the same probes as the means. With `PILOT` of each kind that costs a
    little efficiency, not the centre: sample and variance of symmetric estimates are nearly
    uncorrelated.
    """
    # The spread of two or three samples can be small by chance, and would then take all the weight.
    parts = [k for k in (joint, alone) if k.count >= PILOT]
    if not parts:
        kind = max(joint, alone, key=lambda k: k.count)
        return kind.mean, (kind.variance / kind.count) ** 0.5 if kind.count else math.inf
    precisions = []
    for kind in parts:
        precision = kind.count / kind.variance if kind.variance > 0 else math.inf
        if math.isinf(precision):
            return kind.mean, 0.0
        precisions.append(precision)
    value = sum(p * k.mean for p, k in zip(precisions, parts, strict=True)) / sum(precisions)
    return value, sum(precisions) ** -0.5


def _diagonal(joint: _Kind, alone: _Kind) -> tuple[Tensor | None, float]:
    """The diagonal from both kinds, weighted by the precision of their traces, and its relative
    standard error from the difference of two halves of the probes."""
    kept = [k for k in (joint, alone) if k.halves]
    kinds = [k for k in kept if k.count >= PILOT] or kept[:1]
    if not kinds:
        return None, math.inf
    total = torch.zeros_like(kinds[0].halves[0])
    difference = torch.zeros_like(total)
    weights = [k.count / max(k.variance, 1e-300) for k in kinds]
    for kind, weight in zip(kinds, weights, strict=True):
        share = weight / sum(weights)
        first = kind.halves[0]
        second = kind.halves[1] if len(kind.halves) > 1 else torch.zeros_like(first)
        total += (first + second) * (share / kind.count)
        means = first / ((kind.count + 1) // 2) - second / max(1, kind.count // 2)
        difference += means * (share / 2)
    norm = float(torch.linalg.vector_norm(total))
    error = float(torch.linalg.vector_norm(difference)) / norm if norm else 0.0
    return total, error
