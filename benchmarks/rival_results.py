"""What ``rivals.py`` keeps of plans and of models made by them, and the tables it prints."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

AGAINST = ("uniform", "edges", "additive")  # plans that the others are held against


@dataclass(kw_only=True)
class Made:
    """A plan, and what its maker says of it.

    Attributes:
        choices: layer → option key.
        seconds: CPU seconds of making it.
        predicted: loss that it is predicted to add, ± ``predicted_stderr``.
        shipped: which of the plans that its maker tried it is.
        audits: of every pass that shares are from, half their sum beside the KL (`cp.Ledger`).
        trials: the plans that its maker tried.
        rounds: who rounds, where that is not curvprune's solver.
    """

    choices: dict[str, str]
    seconds: float = 0.0
    predicted: float | None = None
    predicted_stderr: float | None = None
    shipped: str = ""
    audits: list[dict] = field(default_factory=list)
    trials: list[dict] = field(default_factory=list)
    rounds: str = ""

    @property
    def key(self) -> str:
        """The same for plans that make the same model, whoever found them."""
        told = json.dumps([self.rounds, sorted(self.choices.items())])
        return hashlib.sha256(told.encode()).hexdigest()[:12]


@dataclass(kw_only=True)
class Applied:
    """A plan applied over one draw: CPU seconds of that, and for every window of a play nats per
    token and KL from the dense model."""

    plan: str
    size: float
    draw: int
    key: str
    bytes: int
    seconds: float
    nats: dict[str, list[float]] = field(default_factory=dict)
    kl: dict[str, list[float]] = field(default_factory=dict)


Plans = Mapping[tuple[str, float], Made]  # by name and size


class Results:
    """What has been measured, by the plan's key and the draw; a file that is only appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[tuple[str, int], Applied] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                self._take(Applied(**json.loads(line)))

    def _take(self, new: Applied) -> None:
        old = self.known.setdefault((new.key, new.draw), new)
        old.nats.update(new.nats)
        old.kl.update(new.kl)

    def lacking(self, made: Made, draw: int, plays: Sequence[str]) -> list[str]:
        """The plays on which a plan has not been measured."""
        known = self.known.get((made.key, draw))
        return [name for name in plays if known is None or name not in known.nats]

    def add(self, new: Applied) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(new)) + "\n")
        self._take(new)

    def draws(self, made: Made, plays: Sequence[str]) -> dict[int, Applied]:
        """The draws over which a plan has been measured on all of these plays."""
        found = {}
        for (key, draw), one in sorted(self.known.items()):
            if key == made.key and not self.lacking(made, draw, plays):
                found[draw] = one
        return found


# ---------------------------------------------------------------------------------------- tables


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def with_error(per_draw: Sequence[Sequence[float]]) -> str:
    """Mean over draws ± its standard error; with one draw that over windows."""
    means = [mean(values) for values in per_draw]
    spread = means if len(means) > 1 else list(per_draw[0])
    error = statistics.stdev(spread) / math.sqrt(len(spread)) if len(spread) > 1 else math.nan
    return f"{mean(means):+.4f} ± {error:.4f}"


def together(of_plays: Mapping[str, list[float]], plays: Sequence[str]) -> list[float]:
    """The windows of all plays, one play after the other."""
    return list(chain.from_iterable(of_plays[name] for name in plays))


def less(pairs: Sequence[tuple[Applied, Applied]], measure: str, plays: Sequence[str]) -> str:
    """By how much the first of each pair exceeds the second, window by window."""
    per_draw = []
    for one, other in pairs:
        left = together(getattr(one, measure), plays)
        right = together(getattr(other, measure), plays)
        per_draw.append([a - b for a, b in zip(left, right, strict=True)])
    return with_error(per_draw)


def head_of(columns: Sequence[str]) -> str:
    return f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def means(
    results: Results, plans: Plans, dense: Mapping[str, float], room: Callable[[float], int]
) -> str:
    """A row for each plan.

    Args:
        dense: play → nats per token of the dense model.
        room: the bytes of a size.
    """
    plays = list(dense)
    rest = ["nats lost", "KL", "predicted", "predicted / KL", "draws", "s to plan", "s to apply"]
    lines = [head_of(["bits", "plan", "bytes / limit", *plays, *rest])]
    for (name, size), made in plans.items():
        draws = list(results.draws(made, plays).values())
        if not draws:
            continue
        nats = {text: mean(mean(one.nats[text]) for one in draws) for text in plays}
        kl = mean(mean(together(one.kl, plays)) for one in draws)
        cells = [f"{size:g}", name, f"{draws[0].bytes / room(size):.4f}"]
        cells += [f"{math.exp(nats[text]):.2f}" for text in plays]
        cells += [f"{mean(nats.values()) - mean(dense.values()):+.4f}", f"{kl:.4f}"]
        if made.predicted is None:
            cells += ["–", "–"]
        else:
            cells.append(f"{made.predicted:.4f} ± {made.predicted_stderr:.4f}")
            cells.append(f"{made.predicted / kl:.2f}")
        seconds = mean(one.seconds for one in draws)
        cells += [str(len(draws)), f"{made.seconds:.0f}", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(results: Results, plans: Plans, plays: Sequence[str]) -> str:
    """A row for each plan and each of `AGAINST`, paired by draw and window."""
    lines = [head_of(["bits", "plan", "less", "nats", *plays, "KL", "draws"])]
    for (name, size), made in plans.items():
        own = results.draws(made, plays)
        for other in AGAINST:
            if other == name or (other, size) not in plans:
                continue
            reference = results.draws(plans[other, size], plays)
            pairs = [(own[draw], reference[draw]) for draw in sorted(own.keys() & reference.keys())]
            if not pairs:
                continue
            cells = [f"{size:g}", name, other, less(pairs, "nats", plays)]
            cells += [less(pairs, "nats", [text]) for text in plays]
            cells += [less(pairs, "kl", plays), str(len(pairs))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sayings(plans: Plans) -> str:
    """What the makers of plans say besides."""
    lines = [""]
    for (name, size), made in plans.items():
        if made.shipped:
            lines.append(f"{name} {size:g} is: {made.shipped}")
        for audit in made.audits:
            shares, divergence = audit["shares"], audit["divergence"]
            lines.append(
                f"{name} {size:g}, pass of {audit['plan']}: half the sum of shares {shares:.4f}, "
                f"measured KL {divergence:.4f}, ratio {shares / divergence:.2f}"
            )
    return "\n".join(lines)
