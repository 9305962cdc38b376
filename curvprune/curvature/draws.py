"""Labels drawn from the model: how many, and from which seed."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What is back-propagated from every item in place of the data's own labels.

    Attributes:
        labels: draws per position.
        seed: of all draws.
        slopes: go back from the data's own labels as well, for the first-order term; only
            `fisher_pass` does.
        empirical: go back from the loss on the data's own labels instead of draws: the empirical
            Fisher, for a loss that cannot be drawn from; only `fisher_pass` does. ``labels`` is 1
            then.
    """

    labels: int = 2
    seed: int = 0
    slopes: bool = False
    empirical: bool = False

    def generator(self, number: int) -> torch.Generator:
        """The generator of one item, mini-batch or step: what it draws does not depend on the
        others, so that a resumed pass draws what an uninterrupted one would."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)


TWO_LABELS = Draws()
ONE_LABEL = Draws(labels=1)
