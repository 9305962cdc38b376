"""`certify` two models, and `load` what was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvprune import artifact
from curvprune.artifact import load_artifact
from curvprune.certificate import (
    IN_THIS_PROCESS,
    Verdict,
    certify_values,
    clusters_of,
    compare,
    counted,
)
from curvprune.model import (
    Batch,
    LossLike,
    Metric,
    Split,
    as_split,
    check_independent,
    check_items,
    evaluate,
    make_loss,
    named_loss,
    score_items,
    seen_by,
    to_device,
)
from curvprune.planning import Budget
from curvprune.run import warn_caller


@named_loss
def certify(
    baseline: nn.Module,
    compressed: nn.Module,
    data: Iterable[Batch] | Split,
    budget: Budget,
    *,
    loss: LossLike = "auto",
    metric: Metric | Callable[[Any, Batch], Tensor] | None = None,
    batch_size: int = 8,
) -> Verdict:
    """Whether ``compressed`` is within ``budget.max_drop`` of ``baseline``, paired on the items of
    ``data``.

    The items must not have been used to make or choose the compressed model; a model that curvprune
    compressed carries the hashes of those that were, and a warning and the verdict's ``note`` say
    if they are among ``data``. Items of one document of a `Split` are a cluster, and so are items
    that hold the same, however they are written: with a mask of ones or none, padded or not. The
    verdict's ``earlier`` says what else the items were used for in this process. Other limits of
    the budget, on size and speed, are not looked at: data cannot decide them. Cost: one forward
    pass of each model. `curvprune.certify_values` takes results that are already there;
    `curvprune.certify_lm_eval` reads those of lm-eval.

    Args:
        metric: what is compared instead of ``budget.metric``: a function of (what the model
            returned, batch) to one number per item, higher is better, or a `Metric` with bounds,
            direction, name and unit. ``max_drop`` is then in its unit.

    Raises ``ValueError`` for a budget without ``max_drop``, a metric that does not return one
    number per item, or items that are all one cluster.
    """
    # 1. What was passed.
    _check_arguments(baseline, compressed, budget, batch_size)
    split = as_split(data)
    leak = split.leak(seen_by(compressed))
    if leak is not None:
        warn_caller(leak)

    # 2. The verdict.
    if metric is not None:
        verdict = _certify_metric(baseline, compressed, split, budget, metric, batch_size)
    else:
        verdict = _certify_budget(baseline, compressed, split, budget, loss, batch_size)

    # 3. What the items were used for.
    return counted([verdict.noting(leak)], split, IN_THIS_PROCESS)[0]


def _check_arguments(
    baseline: object, compressed: object, budget: object, batch_size: object
) -> None:
    for name, model in (("baseline", baseline), ("compressed", compressed)):
        if not isinstance(model, nn.Module):
            held = "; pass its .model" if hasattr(model, "model") else ""
            raise ValueError(
                f"certify: {name} is a {type(model).__name__}, expected a torch.nn.Module{held}"
            )
    if not isinstance(budget, Budget):
        raise ValueError(
            f"certify: budget={budget!r}: expected a Budget, such as Budget('loss', max_drop=0.02)"
        )
    if budget.max_drop is None:
        raise ValueError(
            "certify needs Budget(metric, max_drop=...): a size cannot be certified from data"
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"certify: batch_size={batch_size!r}: expected a whole number of at least 1"
        )
    for model in (baseline, compressed):
        assert isinstance(model, nn.Module)
        check_independent(model)


def _certify_budget(
    baseline: nn.Module,
    compressed: nn.Module,
    split: Split,
    budget: Budget,
    loss: LossLike,
    batch_size: int,
) -> Verdict:
    """The verdict on the budget's own metric."""
    home = next(baseline.parameters()).device
    meant = make_loss(loss, baseline, to_device(split.first(), home))
    check_items(baseline, meant, split.items, "certify")
    before = evaluate(baseline, split.batches(batch_size), meant)
    after = evaluate(compressed, split.batches(batch_size), meant)
    return compare(before, after, split, budget, measure=meant.measure)


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
    clusters, copies = clusters_of(split)
    return certify_values(
        before,
        after,
        clusters=clusters,
        copies=copies,
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
