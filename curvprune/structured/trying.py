"""Whether cuts are what they seem: the model without some units must compute what it computes when
nothing reads them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from curvprune.failures import is_machine
from curvprune.model import Batch, Loss, evaluating, find_layers, to_device
from curvprune.structured.cuts import BLOCKS, Cut, Piece, Slot
from curvprune.structured.surgery import duplicate, remove_, silence_
from curvprune.structured.tracing import failed_at

# What attention modules call their numbers of heads and the width of all of them.
QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "attention_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
HEAD_WIDTHS = ("all_head_size", "inner_dim", "embed_dim", "split_size")
_NAMED = (*QUERY_HEADS, *KEY_HEADS, *HEAD_WIDTHS, "intermediate_size", "inner_size")

Removed = Mapping[str, Sequence[int]]


def tried(
    model: nn.Module, objective: Loss, batch: Batch, cuts: Mapping[str, Cut]
) -> tuple[dict[str, Cut], list[str]]:
    """The cuts that survive, and why others do not.

    All are tried at once, alike ones with different widths; only where that fails, one by one, with
    other numbers that their modules may keep of them. Cuts that fail alone but not together with
    those like them have one width: they become one cut.

    Whole blocks are removed alone, never with units inside of others, and tried so.

    Cost: three forward passes, and a few per cut where one fails.
    """
    blocks = {n: c for n, c in cuts.items() if c.kind == BLOCKS}
    inside = {n: c for n, c in cuts.items() if c.kind != BLOCKS and c.units > c.multiple}
    good, notes = _tried_together(model, objective, batch, inside)
    whole, more = _tried_together(model, objective, batch, blocks)
    return good | whole, [*notes, *more]


def _tried_together(
    model: nn.Module, objective: Loss, batch: Batch, cuts: Mapping[str, Cut]
) -> tuple[dict[str, Cut], list[str]]:
    if not cuts or all(
        complaint(model, objective, batch, cuts, part) is None for part in _parts(cuts)
    ):
        return dict(cuts), []
    # 1. One by one.
    good, bad = _one_by_one(model, objective, batch, cuts)
    # 2. Those that fail alone, together with those like them.
    for alike in _alike({n: cuts[n] for n in bad}).values():
        for variant in _merged(model, alike):
            own = {variant.name: variant}
            if complaint(model, objective, batch, own, _half(own)) is None:
                good[variant.name] = variant
                for name in alike:
                    del bad[name]
                break
    good = {n: good[n] for n in cuts if n in good}
    # 3. What passes alone must pass together.
    notes = [f"{name}: {reason}" for name, reason in bad.items()]
    return _together(model, objective, batch, good, notes)


def _one_by_one(
    model: nn.Module, objective: Loss, batch: Batch, cuts: Mapping[str, Cut]
) -> tuple[dict[str, Cut], dict[str, str]]:
    """The cuts that pass alone, with the numbers that their modules keep of them; and why others
    do not."""
    good: dict[str, Cut] = {}
    bad: dict[str, str] = {}
    # Of cuts that are alike, the first one tells with which numbers to begin, or that none do.
    leaders: dict[str, str] = {}
    for members in _alike(cuts).values():
        leaders.update(dict.fromkeys(members, next(iter(members))))
    begin: dict[str, int] = {}
    for name, cut in cuts.items():
        leader = leaders.get(name, name)
        if leader in bad:
            bad[name] = f"it fails as {leader} does"
            continue
        choices = list(_numbers(model, cut))[begin.get(leader, 0) :]
        reasons = []
        for k, numbers in enumerate(choices):
            own = {name: replace(cut, counts=numbers)}
            reason = complaint(model, objective, batch, own, _half(own))
            if reason is None:
                good.update(own)
                begin.setdefault(leader, k)
                break
            reasons.append(reason)
        if name not in good:
            bad[name] = reasons[0] if reasons else "its modules count it in a way of their own"
    return good, bad


def _together(
    model: nn.Module, objective: Loss, batch: Batch, good: dict[str, Cut], notes: list[str]
) -> tuple[dict[str, Cut], list[str]]:
    """The cuts that can have different widths at the same time; others like them become one."""
    for part in _parts(good):
        reason = complaint(model, objective, batch, good, part)
        if reason is None:
            continue
        for alike in _alike(good).values():
            own = [complaint(model, objective, batch, alike, p) for p in _parts(alike)]
            if len(alike) == 1 or not any(own):
                continue
            for name in alike:
                del good[name]
            merged = next(_merged(model, alike))
            if complaint(model, objective, batch, {"": merged}, _half({"": merged})) is None:
                good[merged.name] = merged
            else:
                notes.append(f"{', '.join(alike)}: {own[0] or own[1]}")
    if any(complaint(model, objective, batch, good, part) for part in _parts(good)):
        # Add them one after another, as long as all of them fit together.
        fitting: dict[str, Cut] = {}
        for name, cut in good.items():
            both = {**fitting, name: cut}
            reason = complaint(model, objective, batch, both, _half(both))
            if reason is None:
                fitting = both
            else:
                notes.append(f"{name}: {reason}")
        good = fitting
    return good, notes


# how many


def fitting(
    model: nn.Module, objective: Loss, batch: Batch, cuts: Mapping[str, Cut], removed: Removed
) -> dict[str, list[int]]:
    """What of ``removed`` can go together: cuts are added one after another."""
    kept: dict[str, list[int]] = {name: [] for name in removed}
    for name, units in removed.items():
        more = {**kept, name: list(units)}
        if units and complaint(model, objective, batch, cuts, more) is None:
            kept = more
    return kept


def _half(cuts: Mapping[str, Cut]) -> dict[str, list[int]]:
    """Half of the units, not one, which might happen to matter little; every other block."""
    removed = {}
    for n, c in cuts.items():
        left = -(-(c.units - c.units // 2) // c.multiple) * c.multiple
        removed[n] = list(range(min(left, c.units), c.units))
    for i, (n, c) in enumerate(cuts.items()):
        if c.kind == BLOCKS:
            removed[n] = [0] if i % 2 or len(cuts) == 1 else []
    return removed


def _parts(cuts: Mapping[str, Cut]) -> Iterator[dict[str, list[int]]]:
    """Half of the units of every other one of cuts that are alike, then those of the others."""
    half = _half(cuts)
    place: dict[tuple[str, int], int] = {}
    parity = {}
    for name, cut in cuts.items():
        key = cut.kind, cut.units
        place[key] = place.get(key, -1) + 1
        parity[name] = place[key] % 2
    if len(set(parity.values())) < 2:
        yield half
        return
    for turn in (0, 1):
        part = {n: u if parity[n] == turn else [] for n, u in half.items()}
        part.update({n: u for n, u in half.items() if cuts[n].kind == BLOCKS and turn})
        yield part


# what to count


def _numbers(model: nn.Module, cut: Cut) -> Iterator[dict[tuple[str, str], int]]:
    """What modules around a cut may count of its units: as found, names that are usual, all."""
    yield dict(cut.counts)
    if cut.kind == BLOCKS:
        return
    # Sizes that are said of the cut: its units, and the rows and columns that they have.
    indices = [slot.index for slot in (*cut.makes, *cut.reads)]
    indices += [piece.index for piece in cut.pieces]
    sizes = {cut.units, *(index.numel() for index in indices)}
    usual: dict[tuple[str, str], int] = {}
    every: dict[tuple[str, str], int] = {}
    for owner in _owners(cut):
        module = model.get_submodule(owner)
        if isinstance(module, nn.Linear):
            continue
        for key, value in vars(module).items():
            if type(value) is not int or value % cut.units or value <= 0:
                continue
            if key in _NAMED:
                usual[owner, key] = value // cut.units
            if value in sizes and "hidden" not in key and "layer" not in key:
                every[owner, key] = value // cut.units
    heads = {k: v for k, v in usual.items() if k[1] in (*QUERY_HEADS, *KEY_HEADS)}
    seen = [dict(cut.counts)]
    for numbers in (heads, usual, every, {**usual, **every}, {}):
        if numbers not in seen:
            seen.append(numbers)
            yield numbers


def _owners(cut: Cut) -> list[str]:
    """Modules that hold a reader of the cut, up to the one that also holds a producer."""
    owners: dict[str, None] = {}
    makers = [slot.module for slot in cut.makes] + [piece.module for piece in cut.pieces]
    for module in (*(slot.module for slot in cut.reads), *makers):
        parts = module.split(".")
        for depth in (1, 2):
            if len(parts) > depth:
                owners[".".join(parts[:-depth])] = None
    owners.update(dict.fromkeys(piece.module for piece in cut.pieces))
    return list(owners)


# one width


def _alike(cuts: Mapping[str, Cut]) -> dict[tuple[str, int, tuple[str, ...]], dict[str, Cut]]:
    """Cuts of one kind and size between layers of the same names."""
    found: dict[tuple[str, int, tuple[str, ...]], dict[str, Cut]] = defaultdict(dict)
    for name, cut in cuts.items():
        if cut.kind != BLOCKS:
            ends = tuple(slot.module.rpartition(".")[2] for slot in (*cut.makes, *cut.reads))
            owner = ".".join(p for p in name.split(".")[-1:] if not p.isdigit())
            found[cut.kind, cut.units, (*ends, owner)][name] = cut
    return found


def _merged(model: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[Cut]:
    """One cut whose unit i is unit i of all of these, with the numbers that each may have."""
    first = next(iter(cuts))
    choices = [list(_numbers(model, cut)) for cut in cuts.values()]
    makes: list[Slot] = []
    reads: list[Slot] = []
    pieces: list[Piece] = []
    for cut in cuts.values():
        makes += cut.makes
        reads += cut.reads
        pieces += [p for p in cut.pieces if _place(p) not in map(_place, pieces)]
    for k in range(max(map(len, choices))):
        counts: dict[tuple[str, str], int] = {}
        for numbers in choices:
            counts.update(numbers[min(k, len(numbers) - 1)])
        yield replace(
            cuts[first],
            makes=tuple(makes),
            reads=tuple(reads),
            pieces=tuple(pieces),
            counts=counts,
        )


def _place(piece: Piece) -> tuple[str, str, int]:
    return piece.module, piece.tensor, piece.dim


# the check


@torch.no_grad()
def without_effect(
    model: nn.Module,
    objective: Loss,
    batches: Iterable[Batch],
    cuts: Mapping[str, Cut],
    removed: Removed,
) -> bool:
    """Whether the outputs of no item change where nothing reads these units. Two forward passes of
    every batch."""
    quiet = duplicate(model)
    silence_(find_layers(quiet), cuts, removed)
    device = next(model.parameters()).device
    with evaluating(model), evaluating(quiet):
        for batch in batches:
            batch = to_device(batch, device)
            expected = objective.outputs(model, batch).double()
            found = objective.outputs(quiet, batch).double()
            # Other sums of the same numbers: a hundredth of what a removal may change.
            if not _agree(found, expected, 0.01 * _precision(model)):
                return False
    return True


def _precision(model: nn.Module) -> float:
    """How closely a smaller model's outputs must agree, relative to the largest."""
    known = {torch.float64: 1e-9, torch.float32: 1e-3}
    return known.get(next(model.parameters()).dtype, 0.05)


def _agree(found: Tensor, expected: Tensor, precision: float) -> bool:
    if found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= precision * expected.abs().max())


@torch.no_grad()
def complaint(
    model: nn.Module, objective: Loss, batch: Batch, cuts: Mapping[str, Cut], removed: Removed
) -> str | None:
    """Why these units cannot be removed, or ``None``: what the model computes when nothing reads
    them is what it computes without them."""
    smaller = duplicate(model)
    silence_(find_layers(smaller), cuts, removed)
    with evaluating(smaller):
        expected = objective.outputs(smaller, batch).double()
    return differs(smaller, objective, batch, cuts, removed, expected=expected)


@torch.no_grad()
def differs(
    smaller: nn.Module,
    objective: Loss,
    batch: Batch,
    cuts: Mapping[str, Cut],
    removed: Removed,
    *,
    expected: Tensor,
) -> str | None:
    """Remove units, in place, and say how the outputs differ from ``expected``, or ``None``."""
    # 1. What it computes without them.
    try:
        remove_(smaller, cuts, removed)
        with evaluating(smaller):
            found = objective.outputs(smaller, batch).double()
    except Exception as error:
        if is_machine(error):
            raise
        return f"with fewer units, the model fails at {failed_at(error)}"
    # 2. The two must agree as closely as the model's precision allows.
    if _agree(found, expected, _precision(smaller)):
        return None
    return (
        "with fewer units, the model computes something else: they are read in a way that the "
        "graph does not show"
    )
