"""What a sample cannot show: rare losses, items that are there several times, more confidence than
few clusters carry; and arguments that are no numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

import curvprune as cp
from curvprune import report
from curvprune.certificate import (
    Verdict,
    certify_accuracy,
    certify_loss,
    certify_values,
    confidence_text,
    design_effect,
    fewest_clusters,
    fewest_without_spread,
    items_needed,
    judge,
    probability_of_certifying,
)
from curvprune.model import ItemResults, Split
from curvprune.planning import Budget
from tests.records import language_model

ALPHA = 0.05


def most_wrong(runs: int) -> float:
    """5 % and three standard errors of the simulation."""
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


def losing(loss: NDArray, **asked: Any) -> Verdict:
    """The verdict on a score of 1 that falls by so much."""
    return certify_values(np.ones(loss.size), 1 - loss, **asked)


# ------------------------------------------------------------------------------------ rare losses


@pytest.mark.parametrize("items", [10, 22, 40, 59, 120])
@pytest.mark.parametrize("bounds", [None, (0, 1)])
def test_rare_losses_are_not_certified_by_samples_without_them(
    items: int, bounds: tuple[int, int] | None
) -> None:
    """One item in twenty loses 0.9; of 22 items none does in 32 % of the draws."""
    rng = np.random.default_rng(items)
    statuses = {}
    hits = rng.binomial(items, 0.05, 2000)
    for hit in set(hits.tolist()):
        loss = np.where(np.arange(items) < hit, 0.9, 0.0)
        statuses[hit] = losing(loss, max_drop=0.045, bounds=bounds).status == "CERTIFIED"
    assert np.mean([statuses[hit] for hit in hits.tolist()]) <= most_wrong(2000)


@pytest.mark.parametrize("gain", [0.0, 0.3])
def test_mostly_equal_items_are_no_scale_for_what_was_not_seen(gain: float) -> None:
    """Neither zeros, nor zeros with a few gains."""
    loss = np.zeros(40)
    loss[:3] = -gain
    verdict = losing(loss, max_drop=0.05)
    assert verdict.status == "INCONCLUSIVE" and "takes 59 items" in verdict.note
    assert verdict.needed is not None and verdict.needed >= 59


def test_what_may_be_hidden_is_said_where_it_is_not_rare() -> None:
    for items, said in ((22, True), (58, True), (59, False), (200, False)):
        half = 0.1 * np.random.default_rng(0).normal(size=items // 2)
        loss = np.concatenate([half, -half, np.full(items % 2, 0.01)])
        verdict = losing(loss, max_drop=0.2)
        share = 1 - 0.05 ** (1 / items)
        assert verdict.status == "CERTIFIED" and verdict.unseen == pytest.approx(share)
        assert ("would not have been seen" in verdict.note) == said
        assert "would not have been seen" in str(verdict)
        # Such a loss is in none of the items with the probability that is risked.
        assert stats.binom.pmf(0, items, share) == pytest.approx(0.05)
    assert (
        "fewer than 13 % of items"
        in losing(0.1 * np.random.default_rng(0).normal(size=22), max_drop=1.0).note
    )


def test_no_difference_at_all() -> None:
    """Nothing shows how large a loss could be that none of the items has: the share that would have
    been seen must be large, and a budget of 0 needs a model that is better."""
    for items, budget, confidence, status in (
        (2, 0.0, 0.999999, "INCONCLUSIVE"),
        (2, 0.01, 0.95, "INCONCLUSIVE"),
        (58, 0.01, 0.95, "INCONCLUSIVE"),
        (59, 0.01, 0.95, "CERTIFIED"),
        (269, 0.01, 0.999999, "INCONCLUSIVE"),
        (270, 0.01, 0.999999, "CERTIFIED"),
        (5000, 0.0, 0.95, "INCONCLUSIVE"),
    ):
        asked = {"max_drop": budget, "confidence": confidence}
        for scores in (np.zeros(items), np.full(items, 2.5)):
            verdict = certify_values(scores, scores, **asked)
            assert verdict.status == status and verdict.bound > 0
            assert (verdict.bound <= budget) == (status == "CERTIFIED")
            if status == "INCONCLUSIVE" and budget > 0:
                assert verdict.needed == (59 if confidence == 0.95 else 270)
            elif budget == 0:
                assert verdict.needed is None


def test_constant_differences_need_as_many_items() -> None:
    count = np.arange(1.0, 81.0)
    for items, max_drop, status in (
        (4, 0.29, "INCONCLUSIVE"),
        (5, 0.29, "VIOLATED"),
        (58, 0.31, "INCONCLUSIVE"),
        (59, 0.31, "CERTIFIED"),
    ):
        some = count[:items]
        verdict = certify_loss(2.1 * some, 2.4 * some, some, max_drop=max_drop)
        assert (verdict.status, verdict.stderr) == (status, 0.0)


def test_the_bound_adds_the_largest_loss_in_the_share_that_is_not_seen() -> None:
    """One item loses 5, one gains as much: the t bound is below what three in a hundred such losses
    would make."""
    loss = np.zeros(101)
    loss[:49], loss[49:98] = 0.01, -0.01
    loss[99], loss[100] = 5.0, -5.0
    verdict = losing(loss, max_drop=1.0)
    share = 1 - 0.05 ** (1 / 101)
    assert verdict.drop == pytest.approx(0)
    assert verdict.bound == pytest.approx(share * 5.0)
    assert verdict.bound > stats.t.ppf(0.95, 100) * verdict.stderr
    tight = losing(loss, max_drop=0.1)
    assert tight.status == "INCONCLUSIVE" and tight.needed is not None
    again = np.tile(loss, math.ceil(tight.needed / 101))
    assert losing(again + 1e-6 * np.arange(again.size) % 7e-6, max_drop=0.1).bound < 0.1


# ----------------------------------------------------------------------------- high confidence


@pytest.mark.parametrize(
    ("confidence", "fewest", "without_spread"),
    [(0.75, 2, 28), (0.95, 5, 59), (0.99, 7, 90), (0.999999, 20, 270)],
)
def test_the_fewest_clusters_that_a_confidence_takes(
    confidence: float, fewest: int, without_spread: int
) -> None:
    """As many as a sign test needs, whose smallest p-value is 2^-N."""
    alpha = 1 - confidence
    assert fewest_clusters(alpha) == fewest
    assert stats.binomtest(fewest, fewest, alternative="greater").pvalue <= alpha * (1 + 1e-6)
    assert fewest_without_spread(alpha) == without_spread
    assert 0.95**without_spread <= alpha < 0.95 ** (without_spread - 1)


def test_nine_documents_carry_no_confidence_of_six_nines() -> None:
    rng = np.random.default_rng(0)
    for items, status in ((19, "INCONCLUSIVE"), (20, "CERTIFIED")):
        half = rng.normal(size=10)
        loss = np.concatenate([half, -half])[:items]
        verdict = losing(loss, max_drop=1e6, confidence=0.999999)
        assert verdict.status == status
    assert (
        "19 items cannot carry 99.9999 % confidence"
        in losing(loss[:19], max_drop=1e6, confidence=0.999999).note
    )
    over = losing(1e6 + loss[:9], max_drop=0.1, confidence=0.999999)
    assert over.status == "INCONCLUSIVE" and over.needed is not None and over.needed >= 20
    # Answers in documents too, whose bound over documents is a t bound.
    base = np.ones(900, dtype=bool)
    documents = np.repeat(np.arange(9), 100)
    for clusters, expected in ((documents, "INCONCLUSIVE"), (None, "CERTIFIED")):
        asked = {"clusters": clusters, "max_drop": 0.5, "confidence": 0.999999}
        verdict = certify_accuracy(base, base, **asked)
        assert verdict.status == expected
        scores = np.linspace(0.1, 0.9, 900)
        assert certify_values(scores, scores, bounds=(0, 1), **asked).status == expected


@pytest.mark.parametrize("confidence", [0.95, 0.9999, 0.9999999])
def test_answers_at_high_confidence_can_be_certified_at_all(confidence: float) -> None:
    """What the p-value adds for its nuisance parameter must not be more than the level."""
    right = np.ones(1000)
    verdict = certify_accuracy(right, right, max_drop=0.05, confidence=confidence)
    assert verdict.status == "CERTIFIED"
    assert 1 - (1 - confidence) ** (1 / 1000) <= verdict.bound < 0.05
    # Fewer than a binomial takes are never enough.
    few = right[: math.floor(math.log(1 - confidence) / math.log(0.95))]
    verdict = certify_accuracy(few, few, max_drop=0.05, confidence=confidence)
    assert verdict.status == "INCONCLUSIVE"


@pytest.mark.parametrize(
    "confidence", [0.95, 0.999999, 0.9999999999, 1 - 1e-13, math.nextafter(1, 0)]
)
def test_confidence_is_never_written_as_100_percent(confidence: float) -> None:
    half = np.random.default_rng(0).normal(size=40)
    verdict = losing(np.concatenate([half, -half]), max_drop=1e3, confidence=confidence)
    small = replace(language_model(blocks=1), verdict=replace(verdict, metric="loss"))
    texts = (confidence_text(confidence), str(verdict), report.summary(small), report.build(small))
    for text in texts:
        plain = text.replace("\N{NO-BREAK SPACE}", " ")
        assert "100 % confidence" not in plain and "100 % bound" not in plain
    written = Decimal(confidence_text(confidence).removesuffix(" %"))
    assert written < 100 and float(written) / 100 == pytest.approx(confidence, abs=2e-16)
    assert json.loads(json.dumps(verdict.to_dict()))["confidence"] == confidence


def test_a_report_says_why_a_split_decides_nothing() -> None:
    """Not that a bound, which is within the budget or is none, leaves it open."""
    few = losing(np.zeros(9), max_drop=0.1)
    normal = losing(np.random.default_rng(0).normal(size=9), max_drop=1e3, confidence=0.999999)
    for verdict, why in ((few, "most of the 9 items differ"), (normal, "9 items cannot carry")):
        record = replace(language_model(blocks=1), verdict=replace(verdict, metric="loss"))
        text = report.summary(record)
        assert f"cannot decide at {confidence_text(verdict.confidence)}" in text.replace(
            "\N{NO-BREAK SPACE}", " "
        )
        assert why in text and "neither hold" not in text
        assert "unseen losses" in report.build(record)


# ---------------------------------------------------------------------- items several times


@pytest.mark.parametrize("bounds", [None, (-2, 3)])
@pytest.mark.parametrize("way", [np.repeat, np.tile])
def test_items_several_times_say_no_more_than_once(bounds: Any, way: Any) -> None:
    rng = np.random.default_rng(1)
    before, loss = rng.random(30), 0.02 + 0.05 * rng.normal(size=30)
    asked = {"max_drop": 0.05, "bounds": bounds}
    once = certify_values(before, before - loss, **asked)
    several = certify_values(way(before, 10), way(before - loss, 10), **asked)
    assert (several.items, several.clusters) == (300, 30)
    assert several.drop == pytest.approx(once.drop)
    assert several.bound >= once.bound * (1 - 1e-9)
    assert "270 of the 300 items have the very results of others" in several.note
    if bounds is None:
        assert several.bound == pytest.approx(once.bound)


@pytest.mark.parametrize("bounds", [None, (-2, 3)])
def test_wrong_certificates_of_ten_items_ten_times(bounds: Any) -> None:
    rng = np.random.default_rng(2)
    runs = 400 if bounds else 2000
    certified = 0
    for _ in range(runs):
        before = np.repeat(rng.random(10), 10)
        loss = np.repeat(0.02 + 0.05 * rng.normal(size=10), 10)
        certified += (
            certify_values(before, before - loss, max_drop=0.02, bounds=bounds).status
            == "CERTIFIED"
        )
    assert certified / runs <= most_wrong(runs)


@pytest.mark.parametrize("bounds", [None, (0, 2)])
def test_one_item_thirty_times_is_one_item(bounds: Any) -> None:
    verdict = certify_values([1.23456] * 30, [1.22456] * 30, max_drop=0.5, bounds=bounds)
    assert (verdict.status, verdict.clusters) == ("INCONCLUSIVE", 1)
    assert verdict.needed is not None and verdict.needed > 30


def test_scores_in_steps_are_equal_by_chance_and_stay_independent() -> None:
    rng = np.random.default_rng(3)
    for kind in (np.float32, np.float64):
        hits, of = rng.integers(0, 6, 400), rng.integers(5, 8, 400)
        before = (2 * hits / (hits + of)).astype(kind)
        after = before + np.where(rng.random(400) < 0.1, 0.25, 0).astype(kind)
        verdict = certify_values(before, after, max_drop=0.1)
        assert verdict.clusters is None and verdict.note == ""
    saturated = np.float32(2.0**-23) * rng.integers(0, 9, 400).astype(np.float32)
    losses = certify_loss(saturated, saturated[::-1], np.ones(400), max_drop=0.1)
    assert losses.clusters is None


def test_copies_of_answers_count_once() -> None:
    """Twenty items five times, no disagreement: the bound of twenty."""
    right, copies = np.ones(100), np.repeat(np.arange(20), 5)
    once = certify_accuracy(np.ones(20), np.ones(20), max_drop=0.1)
    for verdict in (
        certify_accuracy(right, right, copies=copies, max_drop=0.1),
        certify_values(right, right, copies=copies, max_drop=0.1, bounds=(0, 1)),
    ):
        assert verdict.clusters == 20 and verdict.bound == pytest.approx(once.bound, rel=1e-6)
    assert design_effect(np.arange(20).repeat(5), copies) == 5
    assert design_effect(np.arange(4).repeat(25), copies) == pytest.approx(5 + 0.1 * 20)
    assert design_effect(np.arange(100), np.arange(100)) == 1


def results_of(loss: NDArray) -> ItemResults:
    ones = torch.ones(loss.size, dtype=torch.float64)
    return ItemResults(loss=torch.tensor(loss), count=ones, correct=ones)


def tokens(*numbers: int) -> tuple[dict[str, torch.Tensor], ...]:
    return tuple({"input_ids": torch.tensor([[number]])} for number in numbers)


def test_equal_items_are_one_cluster_with_their_documents() -> None:
    """Of seven documents two share an item and a third repeats it behind a mask of ones."""
    items = list(tokens(1, 2, 2, 3, 4, 5, 6, 7))
    items[2] = {**items[2], "attention_mask": torch.ones(1, 1)}
    split = Split(items=tuple(items), documents=("a", "a", "b", "c", "d", "e", "f", "g"))
    before, after = np.zeros(8), 0.1 * np.random.default_rng(0).normal(size=8)
    after[2] = after[1]
    budget = Budget("loss", max_drop=1.0)
    verdict = judge(results_of(before), results_of(after), split, budget, measure="nats")
    joined = certify_loss(
        before, after, np.ones(8), clusters=[0, 0, 0, 1, 2, 3, 4, 5], max_drop=1.0
    )
    assert (verdict.clusters, verdict.bound) == (6, joined.bound)
    many = Split(items=tokens(*[1] * 30), documents=tuple(map(str, range(30))))
    same = results_of(np.zeros(30))
    for metric in ("loss", "accuracy"):
        with pytest.raises(ValueError, match=r"30 items .* one cluster .*at least 2 independent"):
            judge(same, same, many, Budget(metric, max_drop=0.1), measure="nats")


class Lookup(torch.nn.Module):
    """Logits of two classes that the number of an item decides."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(size, 2, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x[:, 0].long()]


def test_certify_counts_an_item_once_for_every_metric() -> None:
    before, after = Lookup(40, 0), Lookup(40, 1)
    x, y = torch.arange(40)[:, None], torch.arange(40) % 2
    once, several = [(x, y)], [(x.int(), y), (x, y), (x, y.int())]
    score = cp.Metric(of=lambda out, batch: out.softmax(-1)[:, 0], bounds=(0, 1))
    for budget, metric in (
        (cp.Budget("loss", max_drop=0.5), None),
        (cp.Budget("accuracy", max_drop=0.5), None),
        (cp.Budget("loss", max_drop=0.5), score),
        (cp.Budget("loss", max_drop=0.5), score.of),
    ):
        one = cp.certify(before, after, once, budget, metric=metric)
        three = cp.certify(before, after, several, budget, metric=metric)
        assert (one.clusters, three.clusters, three.items) == (None, 40, 120)
        assert three.bound >= one.bound - 1e-6 and three.drop == pytest.approx(one.drop)
    with pytest.raises(ValueError, match="at least 2 independent items"):
        cp.certify(before, after, [(x[:1], y[:1])] * 30, cp.Budget("loss", max_drop=0.5))


# ------------------------------------------------------------------------------- bare errors

BAD_LIMITS: list[dict[str, Any]] = [
    {"confidence": "0.95"},
    {"confidence": None},
    {"confidence": [0.95]},
    {"confidence": 1},
    {"confidence": 1j},
    {"max_drop": "0.1"},
    {"max_drop": None},
    {"max_drop": True},
    {"max_drop": (0.1,)},
    {"max_drop": math.inf},
]


@pytest.mark.parametrize("bad", BAD_LIMITS)
def test_limits_that_are_no_numbers_are_named(bad: dict[str, Any], tmp_path) -> None:
    asked = {"max_drop": 0.1, **bad}
    (name,) = bad
    scores = [0.5, 0.25, 1.0]
    lines = "\n".join(json.dumps({"doc_id": i, "metrics": ["acc"], "acc": 1.0}) for i in range(9))
    path = tmp_path / "samples.jsonl"
    path.write_text(lines)
    calls = [
        lambda: certify_values(scores, scores, **asked),
        lambda: certify_values(scores, scores, bounds=(0, 1), **asked),
        lambda: certify_loss(scores, scores, [1, 1, 1], **asked),
        lambda: certify_accuracy([1, 0], [1, 0], **asked),
        lambda: cp.certify_lm_eval(path, path, **asked),
        lambda: items_needed(0.1, **asked),
        lambda: probability_of_certifying(0.0, 0.1, 0.1, **asked),
    ]
    if bad.get("max_drop", 0.1) is not None:
        calls.append(lambda: cp.Budget("loss", **asked))
    for call in calls:
        with pytest.raises(ValueError, match=f"{name}=.*expected a"):
            call()


@pytest.mark.parametrize(
    "bad", [None, "0.5 0.25 1", ["0.5", "0.25", "1"], [0.5, None, 1], [[0.5], [1, 2]], [1j, 0, 1]]
)
def test_results_that_are_no_numbers_are_named(bad: Any) -> None:
    good = [0.5, 0.25, 1.0]
    for call in (
        lambda: certify_values(bad, good, max_drop=0.1),
        lambda: certify_loss(bad, good, [1, 1, 1], max_drop=0.1),
        lambda: certify_accuracy(bad, [1, 0, 1], max_drop=0.1),
    ):
        with pytest.raises(ValueError, match=r"baseline.*(expected one number|not finite)"):
            call()


def test_documents_of_lm_eval_that_are_there_several_times_count_once(tmp_path) -> None:
    rng = np.random.default_rng(4)
    for name in ("before", "after"):
        lines = []
        scores = rng.random(12)
        for i in range(60):
            hashes = dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), str(i % 12))
            score, count = round(scores[i % 12], 2), [-3.0 * (1 + scores[i % 12]), 7]
            lines.append(json.dumps({"doc_id": i, "f1": score, "word_perplexity": count, **hashes}))
        (tmp_path / name).write_text("\n".join(lines))
    files = tmp_path / "before", tmp_path / "after"
    for metric in ("f1", "word_perplexity"):
        verdict = cp.certify_lm_eval(*files, metric=metric, max_drop=0.1)
        assert (verdict.items, verdict.clusters) == (60, 12)
    for bad in (None, 5, [None]):
        with pytest.raises(ValueError, match=r"baseline=.*expected a samples_"):
            cp.certify_lm_eval(bad, files[0], max_drop=0.1)


@pytest.mark.parametrize("bounds", [5, (0, 1, 2), ("0", "1"), (None, 1), (0, math.inf), "01"])
def test_bounds_that_are_none_are_named(bounds: Any) -> None:
    with pytest.raises(ValueError, match=r"bounds=.*the lowest and the highest"):
        certify_values([0.5, 0.25], [0.5, 0.25], max_drop=0.1, bounds=bounds)


@pytest.mark.parametrize("clusters", [5, "ab", [[1], [2]], {"a": 1}.get])
def test_clusters_that_are_none_are_named(clusters: Any) -> None:
    with pytest.raises(ValueError, match=r"clusters.*one document id"):
        certify_values([0.5, 0.25], [0.5, 0.25], max_drop=0.1, clusters=clusters)


def test_tensors_and_numbers_of_libraries_are_numbers() -> None:
    scores = torch.randn(80, dtype=torch.bfloat16, requires_grad=True)
    verdict = certify_values(
        scores, scores + 0.01, max_drop=torch.tensor(0.5), confidence=np.float32(0.95)
    )
    assert type(verdict.max_drop) is float and type(verdict.confidence) is float
    clusters = torch.arange(80) // 4
    assert certify_values(scores, scores, max_drop=1.0, clusters=clusters).clusters == 20


def test_certify_names_what_is_no_model_and_no_budget() -> None:
    model, data = Lookup(4, 0), [(torch.arange(4)[:, None], torch.zeros(4, dtype=torch.long))]
    budget = cp.Budget("loss", max_drop=0.1)
    for arguments, message in (
        ((model, None, data, budget), "compressed is a NoneType"),
        (
            (
                model,
                cp.quantize(torch.nn.Linear(2, 2), [(torch.ones(2, 2), torch.zeros(2).long())]),
                data,
                budget,
            ),
            "compressed is a Result.*pass its .model",
        ),
        ((model, model, data, None), "budget=None: expected a Budget"),
        ((model, model, data, 0.1), "budget=0.1: expected a Budget"),
    ):
        with pytest.raises(ValueError, match=message):
            cp.certify(*arguments)
    for size in (0, -1, 1.5, None, True):
        with pytest.raises(ValueError, match="batch_size="):
            cp.certify(model, model, data, budget, batch_size=size)
