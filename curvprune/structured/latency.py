"""Seconds of a forward pass with fewer units, on this machine: parts of the model timed at the
widths that are asked about, the whole model timed where it is decided.

A *part* is a module whose time depends on a cut: the smallest one that holds all of the cut and
nothing of another (an attention or an MLP, with everything that it does between its layers), else
each layer of the cut by itself, at every pair of widths that is asked for. Parts that look alike
are timed once.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Batch, Objective, evaluating, is_conv1d
from curvprune.structured.cuts import BLOCKS, Cut, Slot, remove_

ROUNDS = (7, 60)  # fewest and most
WHOLE, PART = (
    0.5,
    0.05,
)  # seconds for each model or part, after which no round more than the fewest begins


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run:
    """Something to time, and the module that does it."""

    module: nn.Module
    call: Callable[[], Any]


@torch.inference_mode()
def seconds(runs: Sequence[Run], enough: float) -> list[float]:
    """Seconds of each, all of them taken in turn after two rounds of warming up: the median of the
    first, and of the others the median of what they take of the first in the same round, which is
    steadier on a busy machine.

    On a CPU with one torch thread the clock is that thread's, which stops while others have the
    core; else it is the wall's, read when the device is done. Cost: `ROUNDS` of each, no more than
    the fewest once ``enough`` seconds are spent on each.
    """
    device = next((t.device for run in runs for t in run.module.parameters()), torch.device("cpu"))
    clock = (
        time.thread_time
        if device.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return clock()

    rounds: list[list[float]] = []
    spent = 0.0
    for r in range(-2, ROUNDS[1]):
        if r >= ROUNDS[0] and spent > enough * len(runs):
            break
        taken = []
        for run in runs:
            start = now()
            run.call()
            taken.append(now() - start)
        if r >= 0:
            rounds.append(taken)
            spent += math.fsum(taken)
    first = statistics.median(taken[0] for taken in rounds)
    return [
        first * statistics.median(taken[i] / taken[0] for taken in rounds) for i in range(len(runs))
    ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """A module whose time depends on the widths of ``cuts``, whose slots are named from it;
    ``calls`` in one pass, of which the first has the ``looks``: parts that have the same take the
    same time."""

    module: nn.Module
    cuts: dict[str, Cut]
    calls: int
    looks: tuple[Any, ...]


class Latency:
    """Seconds of one forward pass over ``batch``, whatever the cuts' widths, as a sum over parts;
    scaled so that it is what was measured of the whole model at full width and at the ``smallest``
    widths.

    Cost: two forward passes, then some tens of the whole model, of the smallest and of every part;
    a question about
    widths of a part that were not asked about before copies and times that part. Memory: two copies
    of the model less what is removed, while they are timed; the inputs of the parts.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batch: Batch,
        cuts: Mapping[str, Cut],
        smallest: Mapping[str, int],
    ) -> None:
        self.model, self.objective, self.batch, self.cuts = model, objective, batch, dict(cuts)
        self._given: dict[tuple[Any, ...], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}
        self._kept: dict[tuple[Any, ...], float] = {}  # share of a part's time that is left
        self._parts = self._find_parts()
        with evaluating(model), self._without(smallest) as small:
            full = [self._of_part(looks) for looks in self._given]
            self.whole, least, *each = seconds(
                [self._forward(model), self._forward(small), *full], WHOLE
            )
        self._full = dict(zip(self._given, each, strict=True))
        self._scale = 1.0
        predicted = self.whole - self(smallest)
        self._scale = (
            (self.whole - least) / predicted if predicted > 0 and least < self.whole else 1.0
        )

    def __call__(self, left: Mapping[str, int]) -> float:
        """With ``left[cut]`` units of each cut (all, where it is not named): predicted."""
        gone = (
            part.calls * self._full[part.looks] * (1 - self._share(part, left))
            for part in self._parts
            if any(left.get(n, cut.units) < cut.units for n, cut in part.cuts.items())
        )
        return self.whole - self._scale * math.fsum(gone)

    def beside(self, smaller: nn.Module) -> tuple[float, float]:
        """Of the whole model and of a smaller one, taken in turn: measured."""
        with evaluating(self.model), evaluating(smaller):
            whole, less = seconds([self._forward(self.model), self._forward(smaller)], WHOLE)
        return whole, less

    def measured(self, left: Mapping[str, int]) -> tuple[float, float]:
        """Of the whole model, and of the model with ``left[cut]`` units of each cut, whichever they
        are."""
        with self._without(left) as smaller:
            return self.beside(smaller)

    def _forward(self, model: nn.Module) -> Run:
        return Run(module=model, call=lambda: self.objective.logits(model, self.batch))

    @contextmanager
    def _without(self, left: Mapping[str, int]) -> Iterator[nn.Module]:
        smaller = copy.deepcopy(self.model)
        remove_(smaller, self.cuts, _last(self.cuts, left))
        yield smaller.eval()

    def _share(self, part: _Part, left: Mapping[str, int]) -> float:
        widths = tuple(left.get(n, cut.units) for n, cut in part.cuts.items())
        key = (part.looks, widths)
        if key not in self._kept:
            module, args, named = self._given[part.looks]
            if any(cut.kind == BLOCKS for cut in part.cuts.values()):
                self._kept[key] = 0.0
            else:
                smaller = copy.deepcopy(module).eval()
                remove_(smaller, part.cuts, _last(part.cuts, left))
                fitting = tuple(_fitting(smaller, a) for a in args)
                with evaluating(module):
                    small = Run(module=smaller, call=lambda: smaller(*fitting, **named))
                    whole, less = seconds([self._of_part(part.looks), small], PART)
                self._kept[key] = less / whole
        return self._kept[key]

    def _of_part(self, looks: tuple[Any, ...]) -> Run:
        module, args, named = self._given[looks]
        return Run(module=module, call=lambda: module(*args, **named))

    # ---------------------------------------------------------------------------------------- parts

    def _find_parts(self) -> list[_Part]:
        calls: dict[str, int] = {}

        def count(name: str, module: nn.Module, args: Any, named: Any) -> None:
            calls[name] = calls.get(name, 0) + 1

        self._hooked(dict(self.model.named_modules()), count)
        held = {n: {s.module for s in (*c.makes, *c.reads)} for n, c in self.cuts.items()}
        inside: dict[str, dict[str, Cut]] = {}
        for n, cut in self.cuts.items():
            home = cut.name if cut.kind == BLOCKS else _home(held[n], calls)
            others = (slot for m, slots in held.items() if m != n for slot in slots)
            if cut.kind == BLOCKS or not any(_within(slot, home) for slot in others):
                inside.setdefault(home, {})[n] = _seen_from(home, cut)
                continue
            for slot in held[n]:
                inside.setdefault(slot, {})[n] = _seen_from(slot, cut)
        parts: list[_Part] = []

        def take(name: str, module: nn.Module, args: Any, named: Any) -> None:
            if any(part.module is module for part in parts):
                return
            looks = _looks(module, inside[name], args, named)
            self._given.setdefault(looks, (module, args, named))
            parts.append(_Part(module=module, cuts=inside[name], calls=calls[name], looks=looks))

        self._hooked({n: self.model.get_submodule(n) for n in inside}, take)
        return parts

    def _hooked(
        self, modules: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Any, Any], None]
    ) -> None:
        """A forward pass in which ``see(name, module, args, named)`` is called before every call of
        these modules."""
        handles = [
            m.register_forward_pre_hook(
                lambda module, args, named, name=name: see(name, module, args, named),
                with_kwargs=True,
            )
            for name, m in modules.items()
        ]
        try:
            with evaluating(self.model), torch.inference_mode():
                self.objective.logits(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()


def _last(cuts: Mapping[str, Cut], left: Mapping[str, int]) -> dict[str, list[int]]:
    return {n: list(range(left.get(n, cut.units), cut.units)) for n, cut in cuts.items()}


def _within(module: str, home: str) -> bool:
    return not home or module == home or module.startswith(f"{home}.")


def _home(modules: set[str], calls: Mapping[str, int]) -> str:
    """The smallest module that holds all of these and that the forward pass calls."""
    home = next(iter(modules))
    while home and not (home in calls and all(_within(m, home) for m in modules)):
        home = home.rpartition(".")[0]
    return home


def _seen_from(home: str, cut: Cut) -> Cut:
    """What of a cut lies within a module, with names from there."""

    def there(slots: Sequence[Slot]) -> tuple[Slot, ...]:
        return tuple(replace(s, module=_name(s.module)) for s in slots if _within(s.module, home))

    def _name(module: str) -> str:
        return module[len(home) :].lstrip(".")

    counts = {(_name(m), a): part for (m, a), part in cut.counts.items() if _within(m, home)}
    return replace(cut, makes=there(cut.makes), reads=there(cut.reads), counts=counts)


def _looks(module: nn.Module, cuts: Mapping[str, Cut], args: Any, named: Any) -> tuple[Any, ...]:
    """What decides a part's time, as far as shapes do."""
    slots = [
        (c.kind, c.units, *((s.module, s.side, tuple(s.index.shape)) for s in (*c.makes, *c.reads)))
        for c in cuts.values()
    ]
    shapes = [(n, tuple(p.shape), p.dtype) for n, p in module.named_parameters()]
    given = [_shape(a) for a in (*args, *(named[k] for k in sorted(named)))]
    return (repr(module), tuple(slots), tuple(shapes), tuple(given))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return tuple(map(_shape, value)) if isinstance(value, (tuple, list)) else type(value).__name__


def _fitting(module: nn.Module, x: Any) -> Any:
    """The input of a layer, as narrow as the layer has become; other modules get what they got
    before."""
    if isinstance(module, nn.Linear):
        dim, width = -1, module.in_features
    elif is_conv1d(module):
        dim, width = -1, module.nx  # type: ignore[assignment]
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
        dim, width = 1, module.in_channels
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        dim, width = 1, module.num_features
    else:
        return x
    last = (
        x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    )
    return x.narrow(dim, 0, width).contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
