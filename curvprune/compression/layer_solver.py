"""A layer's options solved: a grouped convolution group by group, stacked experts one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from curvprune.compression.moments import Moments
from curvprune.compression.solver import Solved, solve
from curvprune.model import Layer
from curvprune.options import Cast, Keep, Option


@contextmanager
def _one_thread(layer: Layer) -> Iterator[None]:
    """The column sweep makes many small calls. Below a few thousand inputs a second CPU thread
    gains nothing and, on a busy machine, waits at every one of them (measured: 6 times slower)."""
    threads = torch.get_num_threads()
    if layer.weight.device.type == "cpu" and layer.shape[1] < 4096:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def solve_layer(layer: Layer, options: list[Option], moments: Moments | None) -> list[Solved]:
    """Solve a layer's options; a grouped convolution is solved group by group, stacked experts one
    by one."""
    with _one_thread(layer):
        return _solve_layer(layer, options, moments)


def _solve_layer(layer: Layer, options: list[Option], moments: Moments | None) -> list[Solved]:
    weight = layer.as_matrix(layer.weight.detach())
    if moments is None:
        return solve(weight, options, layer=layer.name)
    height = layer.shape[0] // layer.groups
    parts = [
        solve(
            weight[g * height : (g + 1) * height],
            options,
            moments.second[g],
            layer=layer.name,
            drift=None if moments.drift is None else moments.drift[g],
        )
        for g in range(layer.groups)
    ]
    stacked = (
        parts[0]
        if len(parts) == 1
        else [_stack([part[k] for part in parts]) for k in range(len(options))]
    )
    if not moments.notes:
        return stacked
    return [
        s if isinstance(s.option, (Keep, Cast)) else replace(s, notes=(*moments.notes, *s.notes))
        for s in stacked
    ]


def _stack(parts: list[Solved]) -> Solved:
    def rows(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    weight = rows("weight")
    assert weight is not None
    return Solved(
        option=parts[0].option,
        weight=weight,
        codes=rows("codes"),
        scale=rows("scale"),
        zero=rows("zero"),
        damping=max(p.damping for p in parts),
        notes=tuple(dict.fromkeys(note for p in parts for note in p.notes)),
    )
