"""Several tasks in one verdict: by hand, against Holm's procedure, with members of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import curvprune as cp
from curvprune.certificate import certify_loss


def of_p_values(holds: float, fails: float) -> cp.Claim:
    """A claim whose test has these p-values, for being within the budget and for being beyond."""

    def judge(confidence: float) -> cp.Verdict:
        alpha = 1 - confidence
        status = "INCONCLUSIVE"
        if holds <= alpha:
            status = "CERTIFIED"
        elif fails <= alpha:
            status = "VIOLATED"
        return verdict(status, confidence)

    return cp.Claim(judge=judge)


def verdict(status: str, confidence: float = 0.95) -> cp.Verdict:
    return cp.Verdict(
        status=status,
        metric="loss",
        measure="nats",
        baseline=0.0,
        compressed=0.0,
        drop=0.0,
        stderr=0.0,
        bound=0.0,
        max_drop=0.0,
        confidence=confidence,
        items=10,
        clusters=None,
        needed=None,
        method="",
    )


def by_holm(p_values: list[float], alpha: float) -> set[int]:
    rejected: set[int] = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        rejected.add(i)
    return rejected


def test_violations_are_those_of_holms_procedure() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        p_values = (rng.random(int(rng.integers(1, 6))) ** 4).tolist()
        claims = {f"task {i}": of_p_values(1.0, p) for i, p in enumerate(p_values)}
        found = cp.certify_all(claims)
        expected = by_holm(p_values, 0.05)
        assert found.violated == tuple(f"task {i}" for i in sorted(expected))
        assert found.status == ("VIOLATED" if expected else "INCONCLUSIVE")
        seen.add(len(expected))
    assert {0, 1, 2, 3} <= seen


@pytest.mark.parametrize(
    ("holds", "status"),
    [
        ([0.01, 0.04, 0.049], "CERTIFIED"),  # each at the full level, without a correction
        ([0.01, 0.04, 0.051], "INCONCLUSIVE"),
        ([0.051], "INCONCLUSIVE"),
    ],
)
def test_all_must_hold_each_at_the_full_level(holds: list[float], status: str) -> None:
    claims = {f"task {i}": of_p_values(p, 1.0) for i, p in enumerate(holds)}
    found = cp.certify_all(claims)
    assert found.status == status and found.violated == ()
    assert found.open == tuple(f"task {i}" for i, p in enumerate(holds) if p > 0.05)


def test_one_violated_is_not_hidden_by_others_that_hold() -> None:
    claims = {f"task {i}": of_p_values(0.001, 1.0) for i in range(4)}
    claims["bad"] = of_p_values(1.0, 0.009)
    assert cp.certify_all(claims).status == "VIOLATED"
    # Of five tasks one is at 4 % by chance: no decision, and no certificate.
    claims["bad"] = of_p_values(1.0, 0.04)
    found = cp.certify_all(claims)
    assert found.status == "INCONCLUSIVE" and found.members["bad"].status == "VIOLATED"
    assert found.open == ("bad",) and "bad" in str(found)


def write_log(path: Path, right: np.ndarray) -> Path:
    lines = []
    for i, value in enumerate(right):
        line = {"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": float(value)}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_models_logs_and_values_are_members_of_one_verdict(tmp_path: Path) -> None:
    torch.manual_seed(0)
    baseline = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    data = [(torch.randn(8, 16), torch.randint(0, 4, (8,))) for _ in range(60)]
    compressed = cp.quantize(baseline, data[:12], bits=8).model
    right = np.random.default_rng(0).random(400) < 0.8
    before, after = write_log(tmp_path / "a.jsonl", right), write_log(tmp_path / "b.jsonl", right)
    budget = cp.Budget("loss", max_drop=0.02)
    score = cp.Metric(of=lambda outputs, batch: outputs.softmax(-1)[:, 0], bounds=(0, 1))
    claims = {
        "loss": cp.claim(baseline, compressed, data[12:], budget),
        "divergence": cp.claim(baseline, compressed, data[12:], cp.Budget("kl", max_drop=0.01)),
        "score": cp.claim(baseline, compressed, data[12:], budget, metric=score),
        "arc": cp.claim_lm_eval(before, after, max_drop=0.02, metric="acc"),
        "own": cp.claim_values(right, right, max_drop=0.02, bounds=(0, 1)),
    }
    found = cp.certify_all(claims)
    assert found.status == "CERTIFIED" and list(found.members) == list(claims)
    # Each member is what its own verb says.
    assert found.members["loss"] == cp.certify(baseline, compressed, data[12:], budget)
    logs = cp.certify_lm_eval(before, after, max_drop=0.02, metric="acc")
    assert found.members["arc"] == logs
    assert cp.JointVerdict.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert str(found).startswith("CERTIFIED") and "arc: CERTIFIED, acc drop 0" in str(found)

    worse = write_log(tmp_path / "c.jsonl", right & (np.arange(400) % 3 > 0))
    claims["arc"] = cp.claim_lm_eval(before, worse, max_drop=0.02, metric="acc")
    found = cp.certify_all(claims)
    assert found.status == "VIOLATED" and found.violated == ("arc",)


def test_what_is_no_list_of_tasks() -> None:
    for nothing in ({}, []):
        with pytest.raises(ValueError, match="at least one task"):
            cp.certify_all(nothing)
    finished = certify_loss([0.0] * 30, [0.0] * 30, [1] * 30, max_drop=0.1)
    with pytest.raises(ValueError, match=r"'text' is a Verdict.*cp\.claim"):
        cp.certify_all({"text": finished})
    one = cp.claim_values([1.0] * 30, [1.0] * 30, max_drop=0.1)
    other = cp.claim_values([1.0] * 30, [1.0] * 30, max_drop=0.1, confidence=0.9)
    with pytest.raises(ValueError, match=r"different confidences, \[0\.9, 0\.95\]"):
        cp.certify_all({"one": one, "other": other})
    with pytest.raises(TypeError, match="unexpected keyword argument 'metrics'"):
        cp.claim_lm_eval("a.jsonl", "b.jsonl", max_drop=0.1, metrics="acc")
    with pytest.raises(ValueError, match="certify needs Budget"):
        model = nn.Linear(2, 2)
        cp.claim(model, model, [], cp.Budget(max_bytes=10))
