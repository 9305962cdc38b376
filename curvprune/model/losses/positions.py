"""Losses that are a sum over positions, each with a family of its own: closed forms for all that
`Loss` has by differentiation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from curvprune.model.forward import TARGETS, Batch
from curvprune.model.losses.families import Family, Softmax, random_signs
from curvprune.model.losses.loss import MAX_COLUMNS, ItemResults, Loss
from curvprune.model.losses.output_hessian import MAX_WIDTH

_CHUNK = 512  # positions per log-softmax: bounds memory at vocabularies of 10^5
WEIGHTS = TARGETS[-1]  # the entry of a batch that says what each item counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """The positions of a batch that count.

    Attributes:
        logits: outputs of each, the parameters of the loss's family.
        labels: what each is compared with: a class ``(n,)``, or one number for each output ``(n,
            k)``; ``None`` where there are none.
        item: which item each belongs to.
        items: how many items the batch has.
        weights: what each position's loss is multiplied by, and counts; ``None``: one.
    """

    logits: Shaped[Tensor, "n k"]
    labels: Tensor | None
    item: Int[Tensor, " n"]
    items: int
    weights: Float[Tensor, " n"] | None = None

    def summed(self, values: Float[Tensor, " n"]) -> Float[Tensor, " items"]:
        """Sums over the positions of each item."""
        return values.new_zeros(self.items).index_add(0, self.item, values)

    def numbers(self) -> Int[Tensor, " n"]:
        """Which of its item's positions each is: 0, 1, 2, …"""
        order = self.item.argsort(stable=True)
        counts = torch.bincount(self.item, minlength=self.items)
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(order), device=order.device)
        numbers = torch.empty_like(order)
        numbers[order] = places - starts[self.item[order]]
        return numbers


class PositionLoss(Loss):
    """A loss of the positions that `positions` picks, each judged by ``family``.

    A subclass that overwrites `loss_of`, `item_losses` or `loss` has another loss than its family:
    its curvature comes by differentiation then.
    """

    curvature = "closed form"
    family: Family

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        own = cls.__dict__
        if "curvature" in own:
            return
        if "loss_of" in own or "item_losses" in own:
            cls.curvature = "differentiation"
        elif "loss" in own:
            cls.curvature = "none"

    @property
    def _closed(self) -> bool:
        return self.curvature == "closed form"

    def positions(self, outputs: Tensor, batch: Batch) -> Positions:
        """Pick the positions that count. Raises ``ValueError`` for outputs or labels of a shape
        that the loss cannot read."""
        raise NotImplementedError

    def places(self, outputs: Tensor, batch: Batch) -> Positions:
        """The positions that count where nothing is compared with labels."""
        return self.positions(outputs, unlabelled(batch))

    @property
    def classes_by_label(self) -> bool:
        """Labels are indices of the classes of a softmax."""
        return self.labelled and self._closed and isinstance(self.family, Softmax)

    @property
    def has_accuracy(self) -> bool:  # type: ignore[override]
        return self._closed and self.family.has_accuracy

    @property
    def distribution(self) -> bool:  # type: ignore[override]
        return self._closed and self.family.distribution

    # ---------------------------------------------------------------------------- what it costs

    def loss_of(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, float]:
        positions = self.positions(outputs, batch)
        return self.compare(positions, batch).sum(), self._count(positions)

    def item_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        if type(self).loss_of is not PositionLoss.loss_of and not self._closed:
            return super().item_losses(outputs, batch)
        positions = self.positions(outputs, batch)
        return positions.summed(self.compare(positions, batch))

    def place_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        if type(self).loss_of is not PositionLoss.loss_of and not self._closed:
            return super().place_losses(outputs, batch)
        return self.compare(self.positions(outputs, batch), batch)

    def counts(self, outputs: Tensor, batch: Batch) -> Tensor:
        if type(self).loss_of is not PositionLoss.loss_of and not self._closed:
            return super().counts(outputs, batch)
        positions = self.positions(outputs, batch)
        return positions.summed(self.shares(positions))

    @torch.no_grad()
    def item_results(self, model: nn.Module, batch: Batch) -> ItemResults:
        if not self._closed:
            return super().item_results(model, batch)
        positions = self.positions(self.outputs(model, batch), batch)
        # Sums over thousands of positions in float32 would depend on their order.
        losses = self.compare(positions, batch).double()
        right = self._right(positions, batch)
        if right is None:
            correct = losses.new_full((positions.items,), torch.nan)
        else:
            correct = positions.summed(right.double())
        return ItemResults(
            loss=positions.summed(losses),
            count=positions.summed(self.shares(positions)),
            correct=correct,
        )

    def compare(self, positions: Positions, batch: Batch) -> Float[Tensor, " n"]:
        """Loss of every position."""
        self.family.check(positions.logits)
        targets = self._targets(positions, batch)
        # Part by part: each is widened to float32 and has a log-softmax of its own size.
        parts = zip(positions.logits.split(_CHUNK), targets.split(_CHUNK), strict=True)
        losses = torch.cat([self.family.losses(wide(rows), given) for rows, given in parts])
        return losses if positions.weights is None else losses * positions.weights

    def _targets(self, positions: Positions, batch: Batch) -> Tensor:
        if positions.labels is None:
            raise ValueError(
                f"loss {self.name}: the batch has no labels; pass them or use "
                "objective='label-free'"
            )
        return positions.labels

    def _right(self, positions: Positions, batch: Batch) -> Tensor | None:
        """Which positions are predicted right."""
        return self.family.right(positions.logits, self._targets(positions, batch))

    def shares(self, positions: Positions) -> Float[Tensor, " n"]:
        """What each position counts in the mean."""
        shares = self.family.counts(positions.logits, positions.labels)
        if shares is None:
            shares = torch.ones(len(positions.item), device=positions.item.device)
        shares = shares.to(torch.float64)
        return shares if positions.weights is None else shares * positions.weights

    def _count(self, positions: Positions) -> float:
        return float(self.shares(positions).sum())

    # ------------------------------------------------------------------ curvature at the outputs

    def draw(self, outputs: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        if not self._closed:
            return super().draw(outputs, batch, generator)
        return self._vectors(outputs, batch, self.family.draws, generator)

    def scores(self, outputs: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        if not self._closed:
            return super().scores(outputs, batch, generator)
        return self._vectors(outputs, batch, self.family.scores, generator)

    def _vectors(
        self, outputs: Tensor, batch: Batch, sample: Any, generator: torch.Generator
    ) -> Float[Tensor, " items"]:
        """The sum of ⟨outputs, v⟩ over the positions of each item, for sampled vectors v."""
        positions = self.positions(outputs, batch)
        self.family.check(positions.logits)
        scales = self._scales(positions)
        values = []
        start = 0
        for part in positions.logits.split(_CHUNK):
            rows = wide(part)
            with torch.no_grad():
                vectors = sample(rows, generator)
                if scales is not None:
                    scale = scales[start : start + len(rows)].to(rows.dtype)
                    vectors = vectors * scale.sqrt()
            # Linear in the outputs, so that v is its gradient. An output of −∞ has no part in v,
            # and −∞ · 0 would be nan.
            values.append((torch.where(vectors != 0, rows, 0.0) * vectors).sum(-1))
            start += len(rows)
        return positions.summed(torch.cat(values))

    def _scales(
        self, positions: Positions
    ) -> (
        Float[
            Tensor,
            (
                n  # k
            ),
        ]
        | None
    ):
        """s with the Hessian of a position ``√s ∘ family's ∘ √s``; ``None``: one."""
        scales = None if positions.labels is None else self.family.scales(positions.labels)
        if positions.weights is None:
            return scales
        weights = positions.weights.unsqueeze(-1)
        return weights if scales is None else scales * weights

    def item_hessians(self, outputs: Tensor, batch: Batch) -> Tensor:
        if not self._closed:
            return super().item_hessians(outputs, batch)
        # 1. The block of every position that counts.
        positions = self.positions(outputs, batch)
        blocks = self.family.hessians(positions.logits)
        scales = self._scales(positions)
        if scales is not None:
            root = scales.double().sqrt().expand(positions.logits.shape)
            blocks = root.unsqueeze(-1) * blocks * root.unsqueeze(-2)
        # 2. Where its outputs lie in the item.
        width = outputs[0].numel()
        where = self.where(outputs, batch) % width
        # 3. Into the item's block.
        whole = blocks.new_zeros(len(outputs), width, width)
        rows, columns = where.unsqueeze(-1), where.unsqueeze(-2)
        whole.index_put_((positions.item.view(-1, 1, 1), rows, columns), blocks, accumulate=True)
        return whole

    def root_columns(
        self, outputs: Tensor, batch: Batch, generator: torch.Generator
    ) -> Iterator[Tensor]:
        if not self._closed:
            yield from super().root_columns(outputs, batch, generator)
            return
        positions = self.positions(outputs.detach(), batch)
        self.family.check(positions.logits)
        columns = positions.logits.shape[-1]
        if columns > MAX_COLUMNS:
            raise ValueError(
                f"loss {self.name}: {columns} outputs a position would need as many backward "
                f"passes, and at most {MAX_COLUMNS} are made; take fisher='mc' instead"
            )
        # 1. One position of each item at a time, where that is not too often.
        numbers = positions.numbers()
        most = int(numbers.max()) + 1 if len(numbers) else 0
        alone = most == 1 or most * columns <= MAX_WIDTH
        signs = None if alone else 2.0 * random_signs(positions.item, generator) - 1
        # 2. Every column, at the places of its positions' outputs.
        where, scales = self.where(outputs.detach(), batch), self._scales(positions)
        for number in range(most if alone else 1):
            chosen = numbers == number if alone else numbers >= 0
            for column in self.family.root_columns(wide(positions.logits[chosen])):
                if scales is not None:
                    column = column * scales[chosen].to(column.dtype).sqrt()
                if signs is not None:
                    column = column * signs.to(column.dtype).unsqueeze(-1)
                whole = column.new_zeros(outputs.numel())
                whole[where[chosen].flatten()] = column.flatten()
                yield whole.view_as(outputs).to(outputs.dtype)

    def where(self, outputs: Tensor, batch: Batch) -> Int[Tensor, "n k"]:
        """Where the outputs of each position lie among all, flattened."""
        # Numbers that go the same way as the outputs.
        numbers = torch.arange(outputs.numel(), dtype=torch.int32, device=outputs.device)
        return self.positions(numbers.view(outputs.shape), batch).logits.long()

    def diagonals(self, positions: Positions, part: slice) -> Float[Tensor, "n k"]:
        """The diagonal of the Hessian at some positions."""
        diagonal = self.family.diagonals(wide(positions.logits[part]))
        scales = self._scales(positions)
        return diagonal if scales is None else diagonal * scales[part].to(diagonal.dtype)

    def rises(self, before: Tensor, after: Tensor, batch: Batch) -> Tensor:
        if not self._closed:
            return super().rises(before, after, batch)
        ours, theirs = self.positions(after, batch), self.positions(before, batch)
        values = divergences(self.family, theirs.logits, ours.logits)
        scales = self._scales(ours)
        if scales is not None:
            if scales.shape[-1] > 1:
                return super().rises(before, after, batch)
            values = values * scales.squeeze(-1)
        return ours.summed(values.double())


class Objective(PositionLoss):
    """A `PositionLoss` over classes, to be subclassed: `positions` says which positions count and
    what they are compared with. `logits` is another name of `outputs`."""

    family = Softmax()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.logits(model, batch)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model (one forward pass) and return its logits."""
        return super().outputs(model, batch)


def wide(rows: Tensor) -> Tensor:
    """Half-precision outputs lose nats in a log-softmax; float64 stays."""
    return rows if rows.dtype == torch.float64 else rows.float()


def divergences(
    family: Family, before: Float[Tensor, "n k"], after: Float[Tensor, "n k"]
) -> Float[Tensor, " n"]:
    """Divergence of every position, part by part."""
    values = []
    for theirs, ours in zip(before.split(_CHUNK), after.split(_CHUNK), strict=True):
        values.append(family.divergences(wide(theirs), wide(ours)))
    return torch.cat(values)


def picked(
    outputs: Shaped[Tensor, "*places k"],
    labels: Tensor | None,
    keep: Tensor,
    weights: Float[Tensor, " items"] | None = None,
) -> Positions:
    """The positions where ``keep``, of the outputs' shape without the last, is set; items one
    after another."""
    item = torch.arange(len(outputs), device=outputs.device)
    item = item.view(-1, *[1] * (keep.ndim - 1)).expand_as(keep)[keep]
    # Where all are kept, no copy is made: logits are the largest tensor there is.
    rows = outputs.flatten(0, -2) if bool(keep.all()) else outputs[keep]
    return Positions(
        logits=rows,
        labels=None if labels is None else labels[keep],
        item=item,
        items=len(outputs),
        weights=None if weights is None else weights[item],
    )


def unlabelled(batch: Batch) -> Batch:
    """A batch without what models are not given."""
    if not isinstance(batch, Mapping):
        return {}
    return {name: value for name, value in batch.items() if name not in TARGETS[:-1]}


def sample_weights(batch: Batch) -> Float[Tensor, " items"] | None:
    """What each item counts, if the batch says so. Raises ``ValueError`` for weights that are
    negative or not one per item."""
    if not isinstance(batch, Mapping) or WEIGHTS not in batch:
        return None
    weights = batch[WEIGHTS]
    if weights.ndim != 1 or bool((weights < 0).any()):
        raise ValueError(
            f"{WEIGHTS} of shape {tuple(weights.shape)}: expected one number ≥ 0 for each item"
        )
    return weights.double()
