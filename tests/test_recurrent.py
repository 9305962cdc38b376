"""LSTM, GRU and RNN: what each weight multiplies, against the formulas of torch's documentation run
step by step, and every verb on top of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from curvprune.model import find_layers


@dataclass
class ByHand:
    """A recurrent module computed one sequence and one step at a time.

    ``rows`` holds what each weight multiplied: name → (sequence, step) → row.
    """

    module: Any
    rows: dict[str, dict[tuple[int, int], Tensor]] = field(default_factory=dict)

    def product(self, name: str, x: Tensor, at: tuple[int, int]) -> Tensor:
        self.rows.setdefault(f"weight_{name}", {})[at] = x
        bias = getattr(self.module, f"bias_{name}", None)
        return F.linear(x, getattr(self.module, f"weight_{name}"), bias)

    def step(self, end: str, x: Tensor, h: Tensor, c: Tensor, at: tuple[int, int]) -> Any:
        new = self.product(f"ih_{end}", x, at)
        old = self.product(f"hh_{end}", h, at)
        if isinstance(self.module, nn.LSTM):
            i, f, g, o = (new + old).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (self.product(f"hr_{end}", h, at) if self.module.proj_size else h), c
        if isinstance(self.module, nn.GRU):
            (r, z, n), (hr, hz, hn) = new.chunk(3), old.chunk(3)
            z = (z + hz).sigmoid()
            return (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h, c
        both = new + old
        return (both.relu() if self.module.nonlinearity == "relu" else both.tanh()), c

    def run(self, sequences: list[Tensor], h0: Tensor, c0: Tensor) -> list[Tensor]:
        """Sequences (steps, in) → their outputs; states (levels · directions, sequences, size)."""
        ends = ["", "_reverse"][: 2 if self.module.bidirectional else 1]
        for level in range(self.module.num_layers):
            made = []
            for s, x in enumerate(sequences):
                sides = []
                for d, end in enumerate(ends):
                    h, c = h0[level * len(ends) + d, s], c0[level * len(ends) + d, s]
                    out: list[Any] = [None] * len(x)
                    for t in range(len(x))[:: -1 if end else 1]:
                        h, c = self.step(f"l{level}{end}", x[t], h, c, (s, t))
                        out[t] = h
                    sides.append(torch.stack(out))
                made.append(torch.cat(sides, -1))
            sequences = made
        return sequences


BUILDS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm, two levels, both ways, projected, dropout": lambda: nn.LSTM(
        3, 4, 2, bidirectional=True, proj_size=2, dropout=0.5
    ),
    "lstm, no bias": lambda: nn.LSTM(3, 4, 3, bias=False),
    "gru, two levels, both ways": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(3, 4, 2),
    "rnn, relu, both ways": lambda: nn.RNN(3, 4, 2, nonlinearity="relu", bidirectional=True),
}
LENGTHS = (5, 2, 4)  # of sequences, not sorted


def built(kind: str, *, batch_first: bool = True) -> Any:
    torch.manual_seed(0)
    module = BUILDS[kind]()
    module.batch_first = batch_first
    return module.double().eval()


def states(module: Any, sequences: int) -> tuple[Tensor, Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    width = getattr(module, "proj_size", 0) or module.hidden_size
    h = torch.randn(count, sequences, width, dtype=torch.float64)
    return h, torch.randn(count, sequences, module.hidden_size, dtype=torch.float64)


def in_time(rows: dict[tuple[int, int], Tensor], order: list[int]) -> Tensor:
    """Rows step by step, of each step the sequences in this order."""
    steps = range(1 + max(t for _, t in rows))
    places = [(s, t) for t, s in itertools.product(steps, order) if (s, t) in rows]
    return torch.stack([rows[place] for place in places])


@dataclass(frozen=True)
class Call:
    """Arguments of a call, its sequences, and their order in it."""

    arguments: tuple[Any, ...]
    sequences: list[Tensor]
    order: list[int]
    h: Tensor
    c: Tensor
    mask: Tensor | None = None


def calls_of(module: Any) -> Iterator[tuple[str, Call]]:
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    h, c = states(module, 3)
    zeros = (torch.zeros_like(h), torch.zeros_like(c))
    given = (h, c) if isinstance(module, nn.LSTM) else h
    laid = x if module.batch_first else x.transpose(0, 1)
    yield "no state", Call((laid,), list(x), [0, 1, 2], *zeros)
    yield "a state", Call((laid, given), list(x), [0, 1, 2], h, c)
    alone = tuple(s[:, 0] for s in (h, c))
    one = alone if isinstance(module, nn.LSTM) else alone[0]
    yield "no batch", Call((x[0], one), [x[0]], [0], h[:, :1], c[:, :1])
    # Padding to the left, where states pass through it; it is not counted.
    mask = torch.arange(5)[None] >= torch.tensor([0, 3, 1])[:, None]
    yield "a mask", Call((laid, given), list(x), [0, 1, 2], h, c, mask)
    packed = pack_padded_sequence(
        laid, torch.tensor(LENGTHS), batch_first=module.batch_first, enforce_sorted=False
    )
    short = [s[:n] for s, n in zip(x, LENGTHS, strict=True)]
    yield "packed", Call((packed, given), short, [0, 2, 1], h, c)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", BUILDS)
def test_the_rows_of_every_weight_are_what_the_formulas_multiply(kind, batch_first):
    module = built(kind, batch_first=batch_first)
    layers = find_layers(nn.ModuleDict({"rnn": module}))
    assert all(layer.kind == "recurrent" for layer in layers.values())
    weights = [n for n, p in module.named_parameters() if p.ndim == 2]
    assert sorted(layers) == sorted(f"rnn.{name}" for name in weights)
    for what, call in calls_of(module):
        hand = ByHand(module)
        outputs = hand.run(call.sequences, call.h, call.c)
        found = module(*call.arguments)[0]
        if what == "packed":
            found = pad_packed_sequence(found, batch_first=True)[0]
        elif what != "no batch" and not batch_first:
            found = found.transpose(0, 1)
        for own, theirs in zip(outputs, found if found.ndim == 3 else [found], strict=True):
            torch.testing.assert_close(own, theirs[: len(own)])
        for name, layer in layers.items():
            rows = hand.rows[layer.parameter]
            if call.mask is not None:
                rows = {(s, t): row for (s, t), row in rows.items() if call.mask[s, t]}
            mine = layer.recurrent_rows(module, call.arguments, {}, call.mask)
            torch.testing.assert_close(mine, in_time(rows, call.order), msg=f"{name}, {what}")
