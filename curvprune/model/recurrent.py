"""The inputs of every weight of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, as rows.

Of each level and direction ``weight_ih`` multiplies the inputs of the level, ``weight_hh`` the
states of the step before, and ``weight_hr`` (LSTM with ``proj_size``) the states before their
projection. No hook sees any but the first level's inputs, and none is needed: the states of a level
are its outputs, one step later.

Source: the formulas of torch's documentation of these modules; Hochreiter & Schmidhuber 1997; Cho
et al. 2014; Sak et al. 2014 (projections).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
_NAME = re.compile(r"weight_(ih|hh|hr)_l(\d+)(_reverse)?")


def recurrent_weights(module: nn.Module) -> list[str]:
    """Names of a recurrent module's weights, in the order in which it uses them."""
    assert isinstance(module, RECURRENT)
    parts = ["ih", "hh", "hr"] if module.proj_size else ["ih", "hh"]
    names = []
    for level in range(module.num_layers):
        for end in ("", "_reverse") if module.bidirectional else ("",):
            names += [f"weight_{part}_l{level}{end}" for part in parts]
    return names


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is torch's LSTM, GRU or RNN, and computes as those do."""
    plain = tuple(kind.forward for kind in RECURRENT)
    return isinstance(module, RECURRENT) and type(module).forward in plain


def steps_of(
    module: nn.Module, arguments: Sequence[Any], named: Mapping[str, object], mask: Tensor | None
) -> int:
    """Steps of all sequences of one call, which each weight is multiplied at: those of padding are
    left out, if ``mask`` says where it is."""
    steps = _Steps.of(module, _input(arguments, named))
    kept = steps.kept(module, mask)
    return len(steps.data) if kept is None else int(kept.sum())


@torch.no_grad()
def recurrent_rows(
    module: nn.Module,
    parameter: str,
    arguments: Sequence[Any],
    named: Mapping[str, object],
    mask: Tensor | None = None,
) -> Float[Tensor, "n in"]:
    """What one call of the module multiplies a weight with: a row for every step of every sequence,
    in order of time. A step of a packed sequence that is padding has none.

    Args:
        parameter: the weight's name, such as ``"weight_hh_l0_reverse"``.
        arguments, named: of the call.
        mask: ``(items, steps)``, where padding is zero, of inputs of that shape.

    Levels below run as they are now, so what was compressed there counts. Cost: those levels and
    the weight's own, once; dropout is off.
    """
    assert isinstance(module, RECURRENT)
    found = _NAME.fullmatch(parameter)
    assert found is not None
    part, level, backwards = found[1], int(found[2]), bool(found[3])
    # 1. Steps in order of time, in the weights' own type: kernels take no other here.
    x = _input(arguments, named)
    steps = _Steps.of(module, x)
    weight: Tensor = getattr(module, parameter)
    data = steps.data.to(weight.dtype)
    with (
        torch.autocast(data.device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=False),  # it would copy weights that are not contiguous
    ):
        state = _first_state(module, x, steps, named.get("hx", _second(arguments)), weight)
        # 2. Levels below.
        for below in range(level):
            data = _level(module, below, data, steps, state)
        # 3. What the weight sees.
        if part != "ih":
            outputs = _level(module, level, data, steps, state)
            if module.bidirectional:
                outputs = outputs.chunk(2, -1)[int(backwards)]
            place = level * (2 if module.bidirectional else 1) + int(backwards)
            before = _step_before(outputs, state[0][place], steps, backwards=backwards)
            if part == "hr":
                data = _unprojected(
                    module, f"l{level}{found[3] or ''}", data, before, state[1][place], steps
                )
            else:
                data = before
    kept = steps.kept(module, mask)
    return data if kept is None else data[kept]


def _input(arguments: Sequence[Any], named: Mapping[str, object]) -> Tensor | PackedSequence:
    found: Any = arguments[0] if arguments else named["input"]
    assert isinstance(found, (Tensor, PackedSequence))
    return found


def _second(arguments: Sequence[Any]) -> Any:
    return arguments[1] if len(arguments) > 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """Sequences as a `PackedSequence` holds them: step by step, the longest sequence first.

    Attributes:
        sizes: how many sequences have each step, ``(steps,)`` on the CPU.
    """

    data: Float[Tensor, "n in"]
    sizes: Int[Tensor, " steps"]
    packed: bool

    @staticmethod
    def of(module: nn.Module, x: Tensor | PackedSequence) -> _Steps:
        if isinstance(x, PackedSequence):
            return _Steps(data=x.data, sizes=x.batch_sizes, packed=True)
        x = x.unsqueeze(1) if x.ndim == 2 else x.transpose(0, 1) if module.batch_first else x
        sizes = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
        return _Steps(data=x.reshape(-1, x.shape[-1]), sizes=sizes, packed=False)

    def kept(self, module: nn.Module, mask: Tensor | None) -> Tensor | None:
        """Which rows are no padding; ``None`` for all of them, or where the mask is another's."""
        if mask is None or self.packed:
            return None
        shape = (int(self.sizes[0]), len(self.sizes)) if len(self.sizes) else (0, 0)
        if tuple(mask.shape) != shape:
            return None
        return mask.t().reshape(-1).bool()


def _first_state(
    module: nn.RNNBase, x: Tensor | PackedSequence, steps: _Steps, given: Any, like: Tensor
) -> tuple[Tensor, ...]:
    """States before the first step: ``h``, of an LSTM ``c`` too, each (levels · directions,
    sequences, size)."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size]
    if isinstance(module, nn.LSTM):
        widths.append(module.hidden_size)
    if given is None:
        many = int(steps.sizes[0])
        return tuple(like.new_zeros(count, many, width) for width in widths)
    state = given if isinstance(given, (tuple, list)) else (given,)
    state = tuple(part.unsqueeze(1) if part.ndim == 2 else part for part in state)
    # A packed sequence has its longest first, the state is in the caller's order.
    if isinstance(x, PackedSequence) and x.sorted_indices is not None:
        state = tuple(part.index_select(1, x.sorted_indices) for part in state)
    return tuple(part.to(like.dtype) for part in state)


def _level(
    module: nn.RNNBase, level: int, data: Tensor, steps: _Steps, state: tuple[Tensor, ...]
) -> Float[Tensor, "n out"]:
    """Outputs of one level, those of both directions side by side."""
    directions = 2 if module.bidirectional else 1
    # 1. The level's weights, in the order that the kernels take them in.
    ends = [f"l{level}", f"l{level}_reverse"][:directions]
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
    names += ["weight_hr"] if module.proj_size else []
    weights = [getattr(module, f"{name}_{end}") for end in ends for name in names]
    own = slice(level * directions, (level + 1) * directions)
    # 2. One level of it, without dropout.
    kernel: Any = getattr(torch, {"LSTM": "lstm", "GRU": "gru"}.get(module.mode, "rnn_tanh"))
    if module.mode == "RNN_RELU":
        kernel = torch.rnn_relu
    first: Any = tuple(part[own].contiguous() for part in state)
    if not isinstance(module, nn.LSTM):
        first = first[0]
    settings = (module.bias, 1, 0.0, False, module.bidirectional)
    found: Tensor = kernel(data, steps.sizes, first, weights, *settings)[0]
    return found


def _step_before(
    outputs: Float[Tensor, "n out"],
    first: Float[Tensor, "sequences out"],
    steps: _Steps,
    *,
    backwards: bool,
) -> Float[Tensor, "n out"]:
    """The state that each step starts from: the output of the step before, of the first one
    ``first``."""
    sizes = steps.sizes
    starts = sizes.cumsum(0) - sizes
    time = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    sequence = torch.arange(len(outputs)) - starts[time]
    # Rows of a table that holds the first states before all outputs.
    many = len(first)
    if backwards:
        later = (time + 1).clamp_max(len(sizes) - 1)
        last = (time + 1 == len(sizes)) | (sequence >= sizes[later])
        place = torch.where(last, sequence, many + starts[later] + sequence)
    else:
        earlier = (time - 1).clamp_min(0)
        place = torch.where(time == 0, sequence, many + starts[earlier] + sequence)
    return torch.cat([first, outputs])[place.to(outputs.device)]


def _unprojected(
    module: nn.RNNBase, end: str, data: Tensor, before: Tensor, cell: Tensor, steps: _Steps
) -> Float[Tensor, "n hidden"]:
    """An LSTM's states ``o · tanh(c)`` before their projection."""
    # 1. All gates at once: the states that they see are known.
    biases: list[Tensor | None] = [None, None]
    if module.bias:
        biases = [getattr(module, f"bias_{part}_{end}") for part in ("ih", "hh")]
    gates = F.linear(data, getattr(module, f"weight_ih_{end}"), biases[0])
    gates = gates + F.linear(before, getattr(module, f"weight_hh_{end}"), biases[1])
    enter, forget, new, leave = gates.chunk(4, -1)
    added = enter.sigmoid() * new.tanh()
    forget = forget.sigmoid()
    # 2. Cells step by step; the shorter sequences wait.
    cell, cells = cell.clone(), torch.empty_like(added)
    starts = (steps.sizes.cumsum(0) - steps.sizes).tolist()
    order = list(zip(starts, steps.sizes.tolist(), strict=True))
    for start, size in reversed(order) if end.endswith("_reverse") else order:
        rows = slice(start, start + size)
        cell[:size] = forget[rows] * cell[:size] + added[rows]
        cells[rows] = cell[:size]
    return leave.sigmoid() * cells.tanh()
