"""Seconds of a forward pass with fewer units, on this machine: parts of the model timed at the
widths that are asked about, the whole model timed where it is decided.

A *part* is a module whose time depends on a cut: the smallest one that holds all of the cut and
nothing of another (an attention or an MLP, with everything that it does between its layers), else
each layer of the cut by itself, at every pair of widths that is asked for. Parts that look alike
are timed once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Batch, Loss, evaluating, is_conv1d
from curvprune.structured.cuts import BLOCKS, Cut, Slot
from curvprune.structured.surgery import duplicate, remove_

ROUNDS = (7, 60)  # fewest and most
# Seconds for each model or part, after which no round more than the fewest begins.
WHOLE, PART = 0.5, 0.05


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Run:
    """Something to time, and the module that does it."""

    module: nn.Module
    call: Callable[[], Any]


# Seconds of each run, given how many seconds are enough for each.
Timer = Callable[[Sequence[Run], float], list[float]]


@torch.inference_mode()
def seconds(runs: Sequence[Run], enough: float) -> list[float]:
    """Seconds of each, all of them taken in turn after two rounds of warming up.

    The median of the first, and of the others the median of what they take of the first in the same
    round, which is steadier on a busy machine.

    On a CPU with one torch thread the clock is that thread's, which stops while others have the
    core; else it is the wall's, read when the device is done. Cost: `ROUNDS` of each, no more than
    the fewest once ``enough`` seconds are spent on each.
    """
    now = _clock(runs)
    # 1. Rounds in which each is timed once.
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
        if r >= 0:  # the first two only warm up
            rounds.append(taken)
            spent += math.fsum(taken)
    # 2. Medians.
    first = statistics.median(taken[0] for taken in rounds)
    times = []
    for i in range(len(runs)):
        times.append(first * statistics.median(taken[i] / taken[0] for taken in rounds))
    return times


def _clock(runs: Sequence[Run]) -> Callable[[], float]:
    device = _device(runs)
    if device.type == "cpu":
        return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def when_done() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return when_done


def _device(runs: Sequence[Run]) -> torch.device:
    for run in runs:
        for parameter in run.module.parameters():
            return parameter.device
    return torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """A module whose time depends on widths.

    Attributes:
        module: the module.
        cuts: those on whose widths it depends, their slots named from the module.
        calls: how often one pass calls it.
        looks: of the first call; parts that look the same take the same time.
    """

    module: nn.Module
    cuts: dict[str, Cut]
    calls: int
    looks: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Call:
    """A module and what it was called with."""

    module: nn.Module
    args: tuple[object, ...]
    named: Mapping[str, object]

    def run(self) -> Run:
        return Run(module=self.module, call=lambda: self.module(*self.args, **self.named))


class Latency:
    """Seconds of one forward pass over ``batch``, whatever the cuts' widths, as a sum over parts.

    Scaled so that it is what was measured of the whole model at full width and at the ``smallest``
    widths.

    Cost: two forward passes, then some tens of the whole model, of the smallest and of every part.
    A question about widths of a part that were not asked about before copies and times that part.
    Memory: two copies of the model less what is removed, while they are timed; the inputs of the
    parts.

    Args:
        timer: how models and parts are timed; `seconds` by default.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Loss,
        batch: Batch,
        cuts: Mapping[str, Cut],
        smallest: Mapping[str, int],
        *,
        timer: Timer | None = None,
    ) -> None:
        self.model, self.objective, self.batch, self.cuts = model, objective, batch, dict(cuts)
        self._timer = seconds if timer is None else timer
        self._given: dict[tuple[Any, ...], _Call] = {}  # looks → the first part that looks so
        self._kept: dict[tuple[Any, ...], float] = {}  # share of a part's time that is left
        self._parts = self._find_parts()
        # 1. The whole model, the smallest one and every part at full width.
        with evaluating(model), self._without(smallest) as small:
            runs = [self._forward(model), self._forward(small)]
            runs += [call.run() for call in self._given.values()]
            self.whole, least, *each = self._timer(runs, WHOLE)
        self._full = dict(zip(self._given, each, strict=True))
        # 2. What the parts' sum must be multiplied by to be right at the smallest widths.
        self._scale = 1.0
        predicted = self.whole - self(smallest)
        if predicted > 0 and least < self.whole:
            self._scale = (self.whole - least) / predicted

    def __call__(self, left: Mapping[str, int]) -> float:
        """With ``left[cut]`` units of each cut (all, where it is not named): predicted."""
        gone = []
        for part in self._parts:
            if any(left.get(n, cut.units) < cut.units for n, cut in part.cuts.items()):
                share = self._share(part, left)
                gone.append(part.calls * self._full[part.looks] * (1 - share))
        return self.whole - self._scale * math.fsum(gone)

    def beside(self, smaller: nn.Module) -> tuple[float, float]:
        """Of the whole model and of a smaller one, taken in turn: measured."""
        with evaluating(self.model), evaluating(smaller):
            runs = [self._forward(self.model), self._forward(smaller)]
            whole, less = self._timer(runs, WHOLE)
        return whole, less

    def measured(self, left: Mapping[str, int]) -> tuple[float, float]:
        """Of the whole model, and of the model with ``left[cut]`` units of each cut, whichever they
        are."""
        with self._without(left) as smaller:
            return self.beside(smaller)

    def _forward(self, model: nn.Module) -> Run:
        return Run(module=model, call=lambda: self.objective.outputs(model, self.batch))

    @contextmanager
    def _without(self, left: Mapping[str, int]) -> Iterator[nn.Module]:
        smaller = duplicate(self.model)
        remove_(smaller, self.cuts, _last(self.cuts, left))
        yield smaller.eval()

    def _share(self, part: _Part, left: Mapping[str, int]) -> float:
        """What is left of a part's time; measured once for parts and widths that are alike."""
        widths = tuple(left.get(n, cut.units) for n, cut in part.cuts.items())
        key = (part.looks, widths)
        if key not in self._kept:
            # A block that is gone takes no time: nothing to measure.
            if any(cut.kind == BLOCKS for cut in part.cuts.values()):
                self._kept[key] = 0.0
            else:
                self._kept[key] = self._measured_share(part, left)
        return self._kept[key]

    def _measured_share(self, part: _Part, left: Mapping[str, int]) -> float:
        full = self._given[part.looks]
        smaller = duplicate(full.module).eval()
        remove_(smaller, part.cuts, _last(part.cuts, left))
        fitting = tuple(_fitting(smaller, a) for a in full.args)
        with evaluating(full.module):
            small = _Call(module=smaller, args=fitting, named=full.named)
            whole, less = self._timer([full.run(), small.run()], PART)
        return less / whole

    # ---------------------------------------------------------------------------------------- parts

    def _find_parts(self) -> list[_Part]:
        # 1. How often each module is called.
        calls: dict[str, int] = {}

        def count(name: str, call: _Call) -> None:
            calls[name] = calls.get(name, 0) + 1

        self._hooked(dict(self.model.named_modules()), count)

        # 2. The modules whose time depends on each cut.
        inside: dict[str, dict[str, Cut]] = {}
        for n, cut in self.cuts.items():
            for home in self._homes(n, calls):
                inside.setdefault(home, {})[n] = _seen_from(home, cut)

        # 3. What they are called with.
        parts: list[_Part] = []

        def take(name: str, call: _Call) -> None:
            if any(part.module is call.module for part in parts):
                return
            looks = _looks(call, inside[name])
            self._given.setdefault(looks, call)
            parts.append(
                _Part(module=call.module, cuts=inside[name], calls=calls[name], looks=looks)
            )

        self._hooked({n: self.model.get_submodule(n) for n in inside}, take)
        return parts

    def _homes(self, name: str, calls: Mapping[str, int]) -> Iterable[str]:
        """The smallest module that holds all of a cut and nothing of another, else each of its
        layers."""
        cut = self.cuts[name]
        if cut.kind == BLOCKS:
            return [cut.name]
        home = _home(cut.modules, calls)
        if cut.pieces:
            return [home]  # tensors of no layer are not called by themselves
        for other, theirs in self.cuts.items():
            if other != name and any(_within(module, home) for module in theirs.modules):
                return cut.modules
        return [home]

    def _hooked(self, modules: Mapping[str, nn.Module], see: Callable[[str, _Call], None]) -> None:
        """A forward pass in which ``see(name, call)`` is called before every call of these
        modules."""

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, named: Any) -> None:
                see(name, _Call(module=module, args=args, named=named))

            return hook

        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(watch(name), with_kwargs=True))
        try:
            with evaluating(self.model), torch.inference_mode():
                self.objective.outputs(self.model, self.batch)
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
    pieces = [replace(p, module=_name(p.module)) for p in cut.pieces if _within(p.module, home)]
    return replace(
        cut,
        makes=there(cut.makes),
        reads=there(cut.reads),
        counts=counts,
        pieces=tuple(pieces),
    )


def _looks(call: _Call, cuts: Mapping[str, Cut]) -> tuple[Any, ...]:
    """What decides a part's time, as far as shapes do."""
    slots: list[tuple[Any, ...]] = []
    for cut in cuts.values():
        sides = [(s.module, s.side, tuple(s.index.shape)) for s in (*cut.makes, *cut.reads)]
        slots.append((cut.kind, cut.units, *sides))
    shapes = [(n, tuple(p.shape), p.dtype) for n, p in call.module.named_parameters()]
    given = [_shape(a) for a in call.args]
    given += [_shape(call.named[key]) for key in sorted(call.named)]
    return (repr(call.module), tuple(slots), tuple(shapes), tuple(given))


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_shape, value))
    return type(value).__name__


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
    # In the memory format that it came in.
    narrow = x.narrow(dim, 0, width)
    plain = x.is_contiguous()
    if x.ndim == 4 and not plain and x.is_contiguous(memory_format=torch.channels_last):
        return narrow.contiguous(memory_format=torch.channels_last)
    return narrow.contiguous()
