"""Certificates from what lm-eval wrote with ``--log_samples``: two runs' files in, a verdict out,
without lm-eval."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curvprune.certificate.loss import certify_loss
from curvprune.certificate.values import certify_values
from curvprune.certificate.verdict import Verdict
from curvprune.model import joined

# The metric of the corpus is a function of the ratio of two sums, log-likelihood and how many:
# metric → its measure, and how much of it a nat is.
_RATIOS = {
    "perplexity": ("nats/document", 1.0),
    "word_perplexity": ("nats/word", 1.0),
    "byte_perplexity": ("nats/byte", 1.0),
    "bits_per_byte": ("bits/byte", 1 / math.log(2)),
}
# Error rates: less is better.
_LOWER = {"brier_score", "edit_distance", "ter", "wer", "cer"}
# What two runs must agree on, document by document.
_HASHES = {"doc_hash": "document", "prompt_hash": "prompt", "target_hash": "target"}

Files = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """A line of a samples file: where it stands (path:line), and its JSON object."""

    at: str
    values: Mapping[str, object]


# One filter's samples by document number.
_Samples = dict[Hashable, _Sample]


def certify_lm_eval(
    baseline: Files,
    compressed: Files,
    *,
    max_drop: float,
    metric: str | None = None,
    filter: str | None = None,
    cluster: str | None = None,
    bounds: tuple[float, float] | None = None,
    higher_is_better: bool | None = None,
    confidence: float = 0.95,
) -> Verdict:
    """Whether a compressed model is at most ``max_drop`` worse on a task of lm-eval, paired by
    document.

    Metrics that are 0 or 1 throughout (acc, exact_match) are tested as accuracy.
    ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte`` are tested as the loss behind
    them: ``max_drop`` is in nats per word, nats per byte or bits per byte. For ``perplexity`` it is
    in nats per document. All others are means, in their own unit, as in `certify_values`.
    Documents with the same hashes of text, prompt and target are one cluster.

    Args:
        baseline, compressed: the ``samples_<task>_<date>.jsonl`` of the two models, or lists of
            them in the same order (the subtasks of a group; every document counts once).
        metric, filter: which of the recorded ones, needed only where there are several.
        cluster: a field of the documents, such as the passage that several questions ask about,
            whose equal values belong together.
        bounds: the lowest and the highest value of one document.
        higher_is_better: as lm-eval's results file says; by default no for known error rates, yes
            otherwise.

    Raises:
        ValueError: naming file and line, for files that hold other documents, prompts or metrics, a
            document twice, or a metric that is not one number per document.
    """
    # 1. Read the files, pair their documents.
    pairs, metric = _read_pairs(
        _paths(baseline, "baseline"), _paths(compressed, "compressed"), metric, filter
    )
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    clusters: Sequence[str] | NDArray[np.int_] | None = None
    if cluster is not None:
        clusters = [_field(sample, cluster) for sample in ours]

    copies = _copies(ours)

    # 2. Perplexities are judged by the loss behind them.
    if metric in _RATIOS:
        if copies is not None:
            clusters = joined(copies, copies if clusters is None else list(clusters))
        return _certify_ratio(
            ours, theirs, metric, clusters=clusters, max_drop=max_drop, confidence=confidence
        )

    # 3. All others are means.
    before = [_number(sample, metric) for sample in ours]
    after = [_number(sample, metric) for sample in theirs]
    if bounds is None and {*before, *after} <= {0.0, 1.0}:
        bounds = (0, 1)
    if higher_is_better is None:
        higher_is_better = metric not in _LOWER
    return certify_values(
        before,
        after,
        max_drop=max_drop,
        bounds=bounds,
        higher_is_better=higher_is_better,
        clusters=clusters,
        copies=None if copies is None else joined(copies),
        confidence=confidence,
        metric=metric,
    )


def _certify_ratio(
    ours: Sequence[_Sample],
    theirs: Sequence[_Sample],
    metric: str,
    *,
    clusters: Sequence[str] | NDArray[np.int_] | None,
    max_drop: float,
    confidence: float,
) -> Verdict:
    measure, factor = _RATIOS[metric]
    before = [_sum_and_count(sample, metric) for sample in ours]
    after = [_sum_and_count(sample, metric) for sample in theirs]
    counts = [count for _, count in before]
    if counts != [count for _, count in after]:
        raise ValueError(
            f"{metric}: the two runs count different words or bytes in the same documents"
        )
    verdict = certify_loss(
        [-factor * total for total, _ in before],
        [-factor * total for total, _ in after],
        counts,
        clusters=clusters,
        max_drop=max_drop,
        confidence=confidence,
        measure=measure,
    )
    return replace(verdict, metric=metric)


# -------------------------------------------------------------------------------------------- files


def _paths(given: Files, name: str) -> list[Path]:
    found = [given] if isinstance(given, (str, Path)) else given
    if not isinstance(found, (list, tuple)) or not all(isinstance(f, (str, Path)) for f in found):
        raise ValueError(
            f"{name}={given!r}: expected a samples_*.jsonl that lm-eval wrote, or a list of them"
        )
    return [Path(path) for path in found]


def _read_pairs(
    baseline: Sequence[Path], compressed: Sequence[Path], metric: str | None, filter: str | None
) -> tuple[list[tuple[_Sample, _Sample]], str]:
    """The two models' samples, document by document, and the metric to judge."""
    if len(baseline) != len(compressed):
        raise ValueError(
            f"{len(baseline)} file(s) of the baseline, {len(compressed)} of the compressed model; "
            "pair them"
        )
    pairs: list[tuple[_Sample, _Sample]] = []
    for path, other in zip(baseline, compressed, strict=True):
        samples = _read(path, filter)
        metric = metric or _only_metric(samples, path)
        pairs += _paired(samples, _read(other, filter), path, other)
    if metric is None:
        raise ValueError("no files: pass the samples_*.jsonl of both models")
    return pairs, metric


def _read(path: Path, wanted: str | None) -> _Samples:
    """Samples of one filter by document number; each remembers where it stands."""
    found: dict[str, _Samples] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        at = f"{path}:{number}"
        try:
            values = json.loads(line)
            name, document = values.get("filter", "none"), values["doc_id"]
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{at}: not a sample of lm-eval ({error!r}); expected an object with doc_id"
            ) from error
        samples = found.setdefault(name, {})
        if document in samples:
            raise ValueError(
                f"{at}: document {document} stands already at {samples[document].at}; lm-eval "
                "appends to files, so this one may hold two runs"
            )
        samples[document] = _Sample(at=at, values=values)
    return _of_filter(found, wanted, path)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: {error}; expected a samples_*.jsonl that lm-eval wrote with --log_samples"
        ) from error


def _of_filter(found: Mapping[str, _Samples], wanted: str | None, path: Path) -> _Samples:
    if wanted is None and len(found) > 1:
        raise ValueError(f"{path} holds the filters {sorted(found)}; pass filter=")
    if not found:
        raise ValueError(f"{path} has no samples")
    if wanted is None:
        return next(iter(found.values()))
    if wanted not in found:
        raise ValueError(f"{path} has no samples of filter {wanted!r}, only {sorted(found)}")
    return found[wanted]


def _only_metric(samples: _Samples, path: Path) -> str:
    names = next(iter(samples.values())).values.get("metrics") or []
    if not isinstance(names, list) or len(names) != 1:
        raise ValueError(f"{path} holds the metrics {names or '(not listed)'}; pass metric=")
    return str(names[0])


def _paired(
    ours: _Samples, theirs: _Samples, path: Path, other: Path
) -> list[tuple[_Sample, _Sample]]:
    missing = sorted(set(ours) ^ set(theirs), key=str)
    if missing:
        raise ValueError(
            f"{path} and {other} hold different documents: {len(missing)} stand in one only, "
            f"such as {missing[:5]}; run both models with the same --limit and --samples"
        )
    pairs = []
    for document, sample in ours.items():
        partner = theirs[document]
        for key, what in _HASHES.items():
            mine, yours = sample.values.get(key), partner.values.get(key)
            # Older logs have no hashes.
            if mine is not None and yours is not None and mine != yours:
                raise ValueError(
                    f"{sample.at} and {partner.at}: document {document} has "
                    f"another {what}; run both models on the same version of the task, with the "
                    "same few-shot examples and chat template"
                )
        pairs.append((sample, partner))
    return pairs


# ------------------------------------------------------------------------------------------- values


def _value(sample: _Sample, metric: str) -> object:
    if metric not in sample.values:
        known = sample.values.get("metrics")
        only = f", only {known}" if known else ""
        raise ValueError(f"{sample.at}: no metric {metric!r}{only}")
    return sample.values[metric]


def _number(sample: _Sample, metric: str) -> float:
    value = _value(sample, metric)
    if not isinstance(value, (int, float)):
        raise ValueError(
            f"{sample.at}: {metric} is {json.dumps(value)[:60]}, not one number; only metrics "
            "that are means over documents (and perplexities) can be certified"
        )
    return float(value)


def _sum_and_count(sample: _Sample, metric: str) -> tuple[float, float]:
    """Log-likelihood of a document, and the words or bytes in it."""
    if metric == "perplexity":
        return _number(sample, metric), 1.0
    value = _value(sample, metric)
    if not (isinstance(value, list) and len(value) == 2):
        raise ValueError(
            f"{sample.at}: {metric} is {json.dumps(value)[:60]}, expected [log-likelihood, count]"
        )
    return float(value[0]), float(value[1])


def _copies(samples: Sequence[_Sample]) -> list[Hashable] | None:
    """For every document a label that it shares with those of the same text, prompt and target;
    ``None`` if there are no two. Older logs have no hashes: then each is its own."""
    labels: list[Hashable] = []
    for sample in samples:
        hashes = tuple(sample.values.get(key) for key in _HASHES)
        known = all(isinstance(value, str) for value in hashes)
        # Of one file: subtasks may number their hashes alike.
        file = sample.at.rpartition(":")[0]
        labels.append((file, *hashes) if known else sample.at)
    return labels if len(set(labels)) < len(labels) else None


def _field(sample: _Sample, name: str) -> str:
    document = sample.values.get("doc")
    known = sorted(document) if isinstance(document, dict) else []
    if not isinstance(document, dict) or name not in document:
        raise ValueError(
            f"{sample.at}: cluster={name!r} is no field of the document; its fields are {known}"
        )
    return json.dumps(document[name], sort_keys=True)
