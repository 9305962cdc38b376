"""The loss of a recovery: how far a compressed model's outputs are from the uncompressed model's.

``Σ p (log p − log q)`` over all outputs that count, with ``p`` what the uncompressed model says and
``q`` what the compressed one does. No labels are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvprune.compression.trainable import widened
from curvprune.model import Batch, LabelFree, Softmax, evaluating

_ROWS = 64  # rows of logits compared at a time: some megabytes at vocabularies of 10^5


class Distillation(LabelFree):
    """The divergence from ``reference`` in one pass over the logits, to be differentiated.

    Of a language model they are the largest tensors, and autograd would keep several as large.
    """

    def loss_of(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, float]:
        with torch.no_grad(), evaluating(self.reference):
            found = self.outputs(self.reference, batch)
        ours, theirs = self.positions(outputs, batch), self.positions(found, batch)
        count = float(ours.summed(self.shares(ours)).sum())
        if isinstance(self.family, Softmax) and ours.weights is None:
            return _Divergence.apply(ours.logits, theirs.logits), count
        return self.compare(ours, batch).sum(), count


class _Divergence(torch.autograd.Function):
    """``Σ p (log p − log q)`` over rows of logits, ``p`` of theirs and ``q`` of ours; its gradient
    is ``q − p``."""

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        gradient = torch.empty_like(ours)
        total = widened(ours[:0]).new_zeros(())
        for i in range(0, len(ours), _ROWS):
            rows = slice(i, i + _ROWS)
            log_q = widened(ours[rows]).log_softmax(-1)
            log_p = widened(theirs[rows]).log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[rows] = log_q.exp_().sub_(p)
        # The gradient is all that the backward pass needs: no distribution is kept.
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * upstream, None
