"""`certify` two models, and `load` what was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvprune import artifact
from curvprune.artifact import load_artifact
from curvprune.certificate import Verdict, certify_values, compare
from curvprune.model import (
    Batch,
    Metric,
    Objective,
    Split,
    as_split,
    check_independent,
    check_items,
    evaluate,
    make_objective,
    score_items,
    to_device,
)
from curvprune.planning import Budget


def certify(
    baseline: nn.Module,
    compressed: nn.Module,
    data: Iterable[Batch] | Split,
    budget: Budget,
    *,
    objective: str | Objective = "auto",
    metric: Metric | Callable[[Any, Batch], Tensor] | None = None,
    batch_size: int = 8,
) -> Verdict:
    """Whether ``compressed`` is within ``budget.max_drop`` of ``baseline``, paired on the items of
    ``data``.

    The items must not have been used to make or choose the compressed model. Items of one document
    of a `Split` are a cluster. Other limits of the budget, on size and speed, are not looked at:
    data cannot decide them. Cost: one forward pass of each model. `curvprune.certify_values` takes
    results that are already there; `curvprune.certify_lm_eval` reads those of lm-eval.

    Args:
        metric: what is compared instead of ``budget.metric``: a function of (what the model
            returned, batch) to one number per item, higher is better, or a `Metric` with bounds,
            direction, name and unit. ``max_drop`` is then in its unit.

    Raises ``ValueError`` for a budget without ``max_drop`` or a metric that does not return one
    number per item.
    """
    if budget.max_drop is None:
        raise ValueError(
            "certify needs Budget(metric, max_drop=...): a size cannot be certified from data"
        )
    split = as_split(data)
    check_independent(baseline)
    check_independent(compressed)
    if metric is not None:
        return _certify_metric(baseline, compressed, split, budget, metric, batch_size)
    home = next(baseline.parameters()).device
    loss = make_objective(objective, baseline, to_device(split.items[0], home))
    check_items(baseline, loss, split.items, "certify")
    before = evaluate(baseline, split.batches(batch_size), loss)
    after = evaluate(compressed, split.batches(batch_size), loss)
    return compare(before, after, split, budget, measure=loss.measure)


def _certify_metric(
    baseline: nn.Module,
    compressed: nn.Module,
    split: Split,
    budget: Budget,
    metric: Metric | Callable[[Any, Batch], Tensor],
    batch_size: int,
) -> Verdict:
    """The same with a score of the user's own."""
    if not isinstance(metric, Metric):
        metric = Metric(of=metric, name=getattr(metric, "__name__", "metric"))
    assert budget.max_drop is not None
    before = score_items(baseline, split.batches(batch_size), metric).numpy()
    after = score_items(compressed, split.batches(batch_size), metric).numpy()
    documents = np.array(split.documents)
    several = len(set(split.documents)) < len(documents)
    return certify_values(
        before,
        after,
        clusters=documents if several else None,
        max_drop=budget.max_drop,
        confidence=budget.confidence,
        bounds=metric.bounds,
        higher_is_better=metric.higher_is_better,
        metric=metric.name,
        unit=metric.unit,
    )


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    packed: bool = False,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a saved artifact in evaluation mode.

    Args:
        packed: keep rounded weights packed in memory (half a byte a weight up to 4 bits, else one)
            and unpack each when its module runs: the same outputs in a fraction of the memory,
            slower where few tokens pass at a time. The model is for inference: it has no dense
            weights to train or to save.
        model: the uncompressed architecture, for models that transformers cannot rebuild from a
            config; it is filled in place.

    Raises ``ValueError`` for a folder without an artifact, or if ``model`` is needed or does not
    fit.
    """
    path = Path(folder)
    if (path / artifact.MANIFEST).is_file() and model is None and (path / "config.json").is_file():
        return load_artifact(path, packed=packed, device=device)
    if model is None:
        missing = (
            ""
            if (path / artifact.MANIFEST).is_file()
            else f" and {path} has no {artifact.MANIFEST}"
        )
        raise ValueError(
            f"load({str(folder)!r}): not a transformers model{missing}; pass model=, an instance "
            "of its architecture"
        )
    return artifact.load_into(path, model, packed=packed).to(device).eval()
