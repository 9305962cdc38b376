"""`certify` and `compare` two models, and `load` what was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvprune import artifact
from curvprune.artifact import load_artifact
from curvprune.certificate import (
    IN_THIS_PROCESS,
    Claim,
    ModelComparison,
    Verdict,
    certify_values,
    clusters_of,
    compare_models,
    counted,
    judge,
    loss_for,
)
from curvprune.files import StageLog, where_it_lies
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
    plain_model,
    score_items,
    seen_by,
    takes_models,
    to_device,
)
from curvprune.planning import Budget
from curvprune.run import warn_caller


@named_loss
@takes_models("baseline", "compressed")
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
    the budget, on size and speed, are not looked at: data cannot decide them.

    Metrics ``"kl"`` and ``"top1"`` compare the two models' outputs at the positions that count for
    ``loss``. Cost: one forward pass of each model, for these metrics two of ``baseline``.
    `curvprune.certify_values` takes results that are already there; `curvprune.certify_lm_eval`
    reads those of lm-eval. For several tasks at once see `claim`.

    Args:
        metric: what is compared instead of ``budget.metric``: a function of (what the model
            returned, batch) to one number per item, higher is better, or a `Metric` with bounds,
            direction, name and unit. ``max_drop`` is then in its unit.

    Raises ``ValueError`` for a budget without ``max_drop``, a metric that does not return one
    number per item, or items that are all one cluster.
    """
    asked = _Asked(baseline=baseline, compressed=compressed, data=data, budget=budget)
    verdict, _ = asked.judged(loss, metric, batch_size)
    return verdict


@named_loss
@takes_models("baseline", "compressed")
def claim(
    baseline: nn.Module,
    compressed: nn.Module,
    data: Iterable[Batch] | Split,
    budget: Budget,
    *,
    loss: LossLike = "auto",
    metric: Metric | Callable[[Any, Batch], Tensor] | None = None,
    batch_size: int = 8,
) -> Claim:
    """`certify` as one task of several, for `curvprune.certify_all`: the same arguments. Both
    models are run here; the verdict comes when all tasks are judged together.

    Raises ``ValueError`` as `certify` does.
    """
    asked = _Asked(baseline=baseline, compressed=compressed, data=data, budget=budget)
    first, test = asked.judged(loss, metric, batch_size)

    def judged(confidence: float) -> Verdict:
        # The same look at the items, however often it is judged.
        if confidence == budget.confidence:
            return first
        return replace(test(confidence), earlier=first.earlier)

    return Claim(judge=judged, confidence=budget.confidence)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """Two models, and the items and the budget that they are to be judged by."""

    baseline: nn.Module
    compressed: nn.Module
    data: Iterable[Batch] | Split
    budget: Budget

    def judged(
        self,
        loss: LossLike,
        metric: Metric | Callable[[Any, Batch], Tensor] | None,
        batch_size: int,
    ) -> tuple[Verdict, Callable[[float], Verdict]]:
        """The verdict, which is a use of the items, and the same test at any confidence."""
        # 1. What was passed.
        _check_arguments(self.baseline, self.compressed, self.budget, batch_size)
        split = as_split(self.data)
        leak = split.leak(seen_by(self.compressed))
        if leak is not None:
            warn_caller(leak)

        # 2. The verdict.
        models = (self.baseline, self.compressed)
        if metric is not None:
            test = _test_of_metric(models, split, self.budget, metric, batch_size)
        else:
            test = _test_of_budget(models, split, self.budget, loss, batch_size)
        verdict = test(self.budget.confidence).noting(leak)

        # 3. What the items were used for.
        return counted([verdict], split, IN_THIS_PROCESS)[0], test


def _check_arguments(
    baseline: object, compressed: object, budget: object, batch_size: object
) -> None:
    _check_models("certify", baseline=baseline, compressed=compressed)
    if not isinstance(budget, Budget):
        raise ValueError(
            f"certify: budget={budget!r}: expected a Budget, such as Budget('loss', max_drop=0.02)"
        )
    if budget.max_drop is None:
        raise ValueError(
            "certify needs Budget(metric, max_drop=...): a size cannot be certified from data"
        )
    _check_batch_size("certify", batch_size)


def _check_models(verb: str, **models: object) -> None:
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            held = "; pass its .model" if hasattr(model, "model") else ""
            raise ValueError(
                f"{verb}: {name} is a {type(model).__name__}, expected a torch.nn.Module{held}"
            )
        check_independent(model)


def _check_batch_size(verb: str, batch_size: object) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"{verb}: batch_size={batch_size!r}: expected a whole number of at least 1"
        )


def _test_of_budget(
    models: tuple[nn.Module, nn.Module],
    split: Split,
    budget: Budget,
    loss: LossLike,
    batch_size: int,
) -> Callable[[float], Verdict]:
    """The test of the budget's own metric. Both models are run once."""
    baseline, compressed = models
    home = next(baseline.parameters()).device
    told = make_loss(loss, baseline, to_device(split.first(), home))
    meant = loss_for(budget, told, baseline)
    check_items(baseline, meant, split.items, "certify")
    before = evaluate(baseline, split.batches(batch_size), meant)
    after = evaluate(compressed, split.batches(batch_size), meant)

    def test(confidence: float) -> Verdict:
        asked = replace(budget, confidence=confidence)
        return judge(before, after, split, asked, measure=meant.measure)

    return test


@named_loss
@takes_models("before", "after")
def compare(
    before: nn.Module,
    after: nn.Module,
    data: Iterable[Batch] | Split,
    *,
    loss: LossLike = "auto",
    names: tuple[str, str] = ("before", "after"),
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> ModelComparison:
    """How far two models are apart, in the figures that are quoted beside a compressed model.

    Mean, median, 99 % and 99.9 % quantile over positions of the KL divergence of ``after`` from
    ``before``; top-1 agreement; losses and their change; perplexities of causal language models;
    flips from right to wrong and back. Each has a standard error over documents: the jackknife's,
    and of quantiles the cluster bootstrap's (200 resamples of documents). These are estimates; for
    a decision see `certify` with ``Budget("kl", ...)`` and the like.

    Args:
        before, after: any two models with the same outputs; ``before`` is the reference.
        data: items of one document of a `Split` belong together.
        loss: which positions count, and what is right. Without labels there are divergences and
            agreement only.
        names: what the two are called in the result.
        seed: of the bootstrap.

    Cost: one forward pass of each model. Memory: the outputs of one batch of both, and four bytes a
    position.

    Raises ``ValueError`` for models with different outputs (such as two vocabularies), no data, no
    position that counts, a loss that cannot be told, NaN.

    Source: Dutta et al. 2024, "Accuracy is not all you need" (arXiv:2407.09141), for the flips;
    llama.cpp's ``--kl-divergence`` for the quantiles.

    Example:
        >>> import torch, curvprune as cp
        >>> model = torch.nn.Linear(6, 3)
        >>> data = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(4)]
        >>> found = cp.compare(model, model, data)
        >>> found.kl.value, found.top1_agreement.value, found.positions
        (0.0, 1.0, 32)
    """
    _check_models("compare", before=before, after=after)
    _check_batch_size("compare", batch_size)
    split = as_split(data)
    home = next(before.parameters()).device
    meant = make_loss(loss, before, to_device(split.first(), home))
    with StageLog(show=progress).stage("compare", len(split.items)) as advance:
        found = compare_models(
            (before, after),
            split,
            meant,
            names=names,
            batch_size=batch_size,
            seed=seed,
            advance=advance,
        )
    IN_THIS_PROCESS.enter(split, found.use())
    return found


def _test_of_metric(
    models: tuple[nn.Module, nn.Module],
    split: Split,
    budget: Budget,
    metric: Metric | Callable[[Any, Batch], Tensor],
    batch_size: int,
) -> Callable[[float], Verdict]:
    """The same with a score of the user's own."""
    scored = metric
    if not isinstance(scored, Metric):
        scored = Metric(of=scored, name=getattr(metric, "__name__", "metric"))
    max_drop = budget.max_drop
    assert max_drop is not None
    before, after = (
        score_items(model, split.batches(batch_size), scored).numpy() for model in models
    )
    clusters, copies = clusters_of(split)

    def test(confidence: float) -> Verdict:
        return certify_values(
            before,
            after,
            clusters=clusters,
            copies=copies,
            max_drop=max_drop,
            confidence=confidence,
            bounds=scored.bounds,
            higher_is_better=scored.higher_is_better,
            metric=scored.name,
            unit=scored.unit,
        )

    return test


def load(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    packed: bool = False,
    device: str | torch.device = "cpu",
    verify: bool = True,
    dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """Load a saved artifact in evaluation mode.

    Args:
        verify: compare the sha256 of every file with the one in ``curvprune.json``, at 1 to 3
            seconds per gigabyte. Without it tensors are still compared with the model, by name,
            shape and type.
        packed: keep rounded weights packed in memory (half a byte a weight up to 4 bits, else one)
            and unpack each when its module runs: the same outputs in a fraction of the memory,
            slower where few tokens pass at a time. On a CPU, Linear layers of up to 4 bits in
            bfloat16, and of 8 bits per channel, multiply few tokens without unpacking; a warning
            names those that cannot. The model is for inference: it has no dense weights to train
            or to save.
        dtype: the type of the model's floating-point numbers, such as ``"bfloat16"``; as it was
            saved without. In bfloat16, packed scales saved as float16 are rounded to bfloat16: by
            up to 2⁻⁹ of themselves, as a cast rounds dense weights.
        model: the uncompressed architecture, for models that transformers cannot rebuild from a
            config; it is filled in place.

    Raises ``ValueError`` for a folder without an artifact, for a file that is not what was written,
    or if ``model`` is needed or does not fit.
    """
    path = where_it_lies(Path(folder))
    kind = _float_type(dtype)
    if (path / artifact.MANIFEST).is_file() and model is None and (path / "config.json").is_file():
        return load_artifact(path, packed=packed, device=device, hashes=verify, dtype=kind)
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
    inner = plain_model(model, rewritten=True)
    filled = artifact.load_into(path, inner, packed=packed, hashes=verify, dtype=kind)
    return filled.to(device).eval()


def _float_type(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The type of that name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"dtype={dtype!r} is no floating-point type; write 'bfloat16' or 'float32'")
