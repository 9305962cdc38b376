"""Certificates from what lm-eval wrote with ``--log_samples``: two runs' files in, a verdict out,
without lm-eval."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from curvprune.certificate.paired_tests import Verdict, certify_loss, certify_values

# (log-likelihood, how many): the metric of the corpus is a function of the ratio of the two sums.
_RATIOS = {
    "word_perplexity": ("nats/word", 1.0),
    "byte_perplexity": ("nats/byte", 1.0),
    "bits_per_byte": ("bits/byte", 1 / math.log(2)),
}
_LOWER = {"brier_score", "edit_distance", "ter", "wer", "cer"}

Files = str | Path | Sequence[str | Path]


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
    """Whether a compressed model is at most `max_drop` worse on a task of lm-eval, paired by
    document.

    `baseline`, `compressed`: the ``samples_<task>_<date>.jsonl`` of the two models, or lists of
    them in the same order (the subtasks of a group; every document counts once). `metric`,
    `filter`: which of the recorded ones, needed only where there are several.

    Metrics that are 0 or 1 throughout (acc, exact_match) are tested as accuracy.
    ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte`` are tested as the loss behind
    them: `max_drop` is in nats per word, nats per byte or bits per byte, and ``perplexity`` in nats
    per document. All others are means, in their own unit, as in `certify_values`: `bounds` are
    those of one document, `higher_is_better` as lm-eval's results file says (default: no for known
    error rates, yes otherwise). `cluster`: a field of the documents, such as the passage that
    several questions ask about, whose equal values belong together.

    Raises ValueError, naming file and line, for files that hold other documents, prompts or
    metrics, a document twice, or a metric that is not one number per document.
    """
    files = _files(baseline), _files(compressed)
    if len(files[0]) != len(files[1]):
        raise ValueError(
            f"{len(files[0])} file(s) of the baseline, {len(files[1])} of the compressed model; "
            "pair them"
        )
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for path, other in zip(*files, strict=True):
        samples = _read(path, filter)
        metric = metric or _only_metric(samples, path)
        pairs += _paired(samples, _read(other, filter), path, other)
    if metric is None:
        raise ValueError("no files: pass the samples_*.jsonl of both models")
    sides = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    clusters = None if cluster is None else [_field(sample, cluster) for sample in sides[0]]
    if metric in _RATIOS or metric == "perplexity":
        measure, factor = _RATIOS.get(metric, ("nats/document", 1.0))
        before, after = ([_sum_and_count(sample, metric) for sample in side] for side in sides)
        if [n for _, n in before] != [n for _, n in after]:
            raise ValueError(
                f"{metric}: the two runs count different words or bytes in the same documents"
            )
        verdict = certify_loss(
            [-factor * total for total, _ in before],
            [-factor * total for total, _ in after],
            [n for _, n in before],
            clusters=clusters,
            max_drop=max_drop,
            confidence=confidence,
            measure=measure,
        )
        return replace(verdict, metric=metric)
    ours, theirs = ([_number(sample, metric) for sample in side] for side in sides)
    if bounds is None and {*ours, *theirs} <= {0.0, 1.0}:
        bounds = (0, 1)
    return certify_values(
        ours,
        theirs,
        max_drop=max_drop,
        bounds=bounds,
        higher_is_better=metric not in _LOWER if higher_is_better is None else higher_is_better,
        clusters=clusters,
        confidence=confidence,
        metric=metric,
    )


def _files(given: Files) -> list[Path]:
    return [Path(given)] if isinstance(given, (str, Path)) else [Path(path) for path in given]


def _read(path: Path, wanted: str | None) -> dict[Any, dict[str, Any]]:
    """Samples of one filter by document number; each remembers where it stands."""
    found: dict[str, dict[Any, dict[str, Any]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: {error}; expected a samples_*.jsonl that lm-eval wrote with --log_samples"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        at = f"{path}:{number}"
        try:
            sample = json.loads(line)
            name, document = sample.get("filter", "none"), sample["doc_id"]
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{at}: not a sample of lm-eval ({error!r}); expected an object with doc_id"
            ) from error
        samples = found.setdefault(name, {})
        if document in samples:
            raise ValueError(
                f"{at}: document {document} stands already at {samples[document]['at']}; lm-eval "
                "appends to files, so this one may hold two runs"
            )
        samples[document] = {**sample, "at": at}
    if wanted is None and len(found) > 1:
        raise ValueError(f"{path} holds the filters {sorted(found)}; pass filter=")
    if not found or (wanted is not None and wanted not in found):
        raise ValueError(
            f"{path} has no samples"
            + (f" of filter {wanted!r}, only {sorted(found)}" if found else "")
        )
    return found[wanted if wanted is not None else next(iter(found))]


def _only_metric(samples: dict[Any, dict[str, Any]], path: Path) -> str:
    names = next(iter(samples.values())).get("metrics") or []
    if len(names) != 1:
        raise ValueError(f"{path} holds the metrics {names or '(not listed)'}; pass metric=")
    return str(names[0])


def _paired(
    ours: dict[Any, dict[str, Any]], theirs: dict[Any, dict[str, Any]], path: Path, other: Path
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    if missing := sorted(set(ours) ^ set(theirs), key=str):
        raise ValueError(
            f"{path} and {other} hold different documents: {len(missing)} stand in one only, "
            f"such as {missing[:5]}; run both models with the same --limit and --samples"
        )
    for document, sample in ours.items():
        for key, what in (
            ("doc_hash", "document"),
            ("prompt_hash", "prompt"),
            ("target_hash", "target"),
        ):
            mine, yours = sample.get(key), theirs[document].get(key)
            if mine is not None and yours is not None and mine != yours:
                raise ValueError(
                    f"{sample['at']} and {theirs[document]['at']}: document {document} has "
                    f"another {what}; run both models on the same version of the task, with the "
                    "same few-shot examples and chat template"
                )
    return [(sample, theirs[document]) for document, sample in ours.items()]


def _value(sample: dict[str, Any], metric: str) -> Any:
    if metric not in sample:
        known = sample.get("metrics")
        raise ValueError(
            f"{sample['at']}: no metric {metric!r}" + (f", only {known}" if known else "")
        )
    return sample[metric]


def _number(sample: dict[str, Any], metric: str) -> float:
    value = _value(sample, metric)
    if not isinstance(value, (int, float)):
        raise ValueError(
            f"{sample['at']}: {metric} is {json.dumps(value)[:60]}, not one number; only metrics "
            "that are means over documents (and perplexities) can be certified"
        )
    return float(value)


def _sum_and_count(sample: dict[str, Any], metric: str) -> tuple[float, float]:
    if metric == "perplexity":
        return _number(sample, metric), 1.0
    value = _value(sample, metric)
    if not (isinstance(value, list) and len(value) == 2):
        raise ValueError(
            f"{sample['at']}: {metric} is {json.dumps(value)[:60]}, expected [log-likelihood, "
            "count]"
        )
    return float(value[0]), float(value[1])


def _field(sample: dict[str, Any], name: str) -> str:
    document = sample.get("doc")
    if not isinstance(document, dict) or name not in document:
        known = sorted(document) if isinstance(document, dict) else []
        raise ValueError(
            f"{sample['at']}: cluster={name!r} is no field of the document; its fields are {known}"
        )
    return json.dumps(document[name], sort_keys=True)
