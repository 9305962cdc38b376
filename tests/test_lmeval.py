"""Certificates from lm-eval's per-sample logs. `samples/` was written by lm-eval 0.4.13 with its
dummy model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curvprune import certify_lm_eval
from curvprune.certificate import certify_accuracy, certify_loss, certify_values

SAMPLES = Path(__file__).parent / "samples"
Sample = dict[str, object]


def write(
    path: Path,
    source: str,
    items: int,
    change: Callable[[Sample, int], None] = lambda sample, i: None,
) -> Path:
    """A log of `items` samples, made from those of `source`; hashes are those of the document's
    number."""
    samples = [json.loads(line) for line in (SAMPLES / source).read_text().splitlines()]
    lines = []
    for i in range(items):
        sample = {
            **samples[i % len(samples)],
            "doc_id": i,
            "doc_hash": f"{i:064x}",
            "prompt_hash": f"{i:064x}",
        }
        change(sample, i)
        lines.append(json.dumps(sample, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_logs_as_lm_eval_wrote_them():
    verdict = certify_lm_eval(
        SAMPLES / "tiny_mc.jsonl", SAMPLES / "tiny_mc.jsonl", metric="acc", max_drop=0.01
    )
    assert (verdict.metric, verdict.items, verdict.baseline, verdict.drop) == ("acc", 4, 0.75, 0.0)
    assert verdict.status == "INCONCLUSIVE" and verdict.needed is not None and verdict.needed > 299
    loss = certify_lm_eval(
        SAMPLES / "tiny_ppl.jsonl",
        SAMPLES / "tiny_ppl.jsonl",
        metric="word_perplexity",
        max_drop=0.1,
    )
    assert math.exp(loss.baseline) == pytest.approx(1.0875, abs=1e-4), (
        "lm-eval's own word_perplexity of this run"
    )
    bits = certify_lm_eval(
        SAMPLES / "tiny_ppl.jsonl", SAMPLES / "tiny_ppl.jsonl", metric="bits_per_byte", max_drop=0.1
    )
    assert bits.baseline == pytest.approx(0.0259, abs=1e-4) and bits.measure == "bits/byte"


def test_accuracy_is_paired_by_document_whatever_the_order(tmp_path):
    base = [i % 3 != 0 for i in range(200)]
    comp = [right and i % 40 != 1 for i, right in enumerate(base)]
    ours = write(
        tmp_path / "a.jsonl", "tiny_mc.jsonl", 200, lambda s, i: s.update(acc=float(base[i]))
    )
    theirs = write(
        tmp_path / "b.jsonl", "tiny_mc.jsonl", 200, lambda s, i: s.update(acc=float(comp[i]))
    )
    theirs.write_text("\n".join(reversed(theirs.read_text().splitlines())))
    verdict = certify_lm_eval(ours, theirs, metric="acc", max_drop=0.05)
    expected = certify_accuracy(base, comp, max_drop=0.05)
    assert (verdict.bound, verdict.status, verdict.method) == (
        expected.bound,
        expected.status,
        expected.method,
    )
    clustered = certify_lm_eval(ours, theirs, metric="acc", max_drop=0.05, cluster="passage")
    assert clustered.clusters == 2


def test_perplexity_is_the_loss_behind_it(tmp_path):
    rng = np.random.default_rng(0)
    words, change = rng.integers(5, 50, 60), rng.normal(0.01, 0.1, 60)
    ours, theirs = (
        write(
            tmp_path / f"{k}.jsonl",
            "tiny_ppl.jsonl",
            60,
            lambda s, i, k=k: s.update(
                word_perplexity=[-2.0 * words[i] - k * change[i] * words[i], int(words[i])]
            ),
        )
        for k in (0, 1)
    )
    verdict = certify_lm_eval(ours, theirs, metric="word_perplexity", max_drop=0.1)
    expected = certify_loss(2.0 * words, 2.0 * words + change * words, words, max_drop=0.1)
    assert verdict.bound == pytest.approx(expected.bound) and verdict.measure == "nats/word"


def test_other_metrics_several_files_and_directions(tmp_path):
    rng = np.random.default_rng(1)
    scores = rng.uniform(0.2, 0.8, (2, 40))
    files: tuple[list[Path], list[Path]] = ([], [])
    for model in (0, 1):
        for part in (0, 1):
            of_part = scores[model, 20 * part : 20 * part + 20]

            def score(sample: Sample, i: int, of_part=of_part) -> None:
                sample.update(f1=of_part[i], metrics=["f1"])

            path = tmp_path / f"{model}{part}.jsonl"
            files[model].append(write(path, "tiny_mc.jsonl", 20, score))
    verdict = certify_lm_eval(*files, max_drop=0.3, bounds=(0, 1))
    assert verdict.bound == certify_values(*scores, max_drop=0.3, bounds=(0, 1)).bound
    assert verdict.items == 40
    lower = certify_lm_eval(*files, max_drop=0.3, higher_is_better=False)
    assert lower.drop == pytest.approx(-verdict.drop) and "t bound" in lower.method


def test_logs_that_do_not_fit(tmp_path):
    good = write(tmp_path / "good.jsonl", "tiny_mc.jsonl", 6)

    def refused(message: str, other: Path, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            certify_lm_eval(good, other, **{"metric": "acc", "max_drop": 0.1, **options})

    refused(
        "4 stand in one only, such as \\[6, 7, 8, 9\\]",
        write(tmp_path / "1.jsonl", "tiny_mc.jsonl", 10),
    )
    changed = write(
        tmp_path / "2.jsonl",
        "tiny_mc.jsonl",
        6,
        lambda s, i: s.update(prompt_hash="x" if i == 4 else s["prompt_hash"]),
    )
    refused("2.jsonl:5: document 4 has another prompt", changed)
    refused("no metric 'f1', only \\['acc', 'acc_norm'\\]", good, metric="f1")
    refused("holds the metrics \\['acc', 'acc_norm'\\]; pass metric=", good, metric=None)
    twice = tmp_path / "3.jsonl"
    twice.write_text(good.read_text() * 2)
    refused("3.jsonl:7: document 0 stands already at .*3.jsonl:1", twice)
    two = tmp_path / "4.jsonl"
    two.write_text(good.read_text() + good.read_text().replace('"none"', '"strict"'))
    refused("filters \\['none', 'strict'\\]; pass filter=", two)
    assert certify_lm_eval(good, two, metric="acc", max_drop=0.1, filter="none").items == 6
    refused("no samples of filter 'flexible'", two, filter="flexible")
    pair = write(tmp_path / "5.jsonl", "tiny_mc.jsonl", 6, lambda s, i: s.update(acc=[1, 0]))
    refused("acc is \\[1, 0\\], not one number", pair)
    refused("cluster='title' is no field of the document", good, cluster="title")
    broken = tmp_path / "6.jsonl"
    broken.write_text('{"doc_id": 0}\nnonsense\n')
    refused("6.jsonl:2: not a sample of lm-eval", broken)
    refused("expected a samples_", tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="1 file\\(s\\) of the baseline, 2 of the compressed"):
        certify_lm_eval(good, [good, good], metric="acc", max_drop=0.1)
