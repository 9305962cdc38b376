"""How often one verdict about several tasks errs: shares of simulated runs.

    python benchmarks/several_tasks.py [--runs 4000] [--only certified]

* *certified*: one task is exactly at its budget, the others lose nothing: the joint verdict must
  not be CERTIFIED in more than 5 % of the runs.
* *violated*: every task is exactly at its budget: VIOLATED must not be said in more than 5 %.
* *power*: no task loses anything.
* *quantile*: the 99 % quantile over documents is exactly the budget.

Each prints a Markdown table in percent. A wrong decision above 5 % + 3 standard errors of the
simulation is in bold. Tasks are lm-eval's kind (0 or 1 an item) and losses of documents in turn.
Correlated tasks share most of what makes an item hard: one normal number for each run's item.
"""

from __future__ import annotations

import argparse
import functools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

import curvprune as cp
from curvprune.certificate import certify_accuracy, certify_loss, certify_quantile

ALPHA = 0.05
DISAGREEMENT = 0.10  # share of items on which two models of a task of answers differ
ANSWER_BUDGET, LOSS_BUDGET = 0.04, 0.3  # fractions; standard deviations of a document's loss


def normals(rng: np.random.Generator, tasks: int, items: int, correlation: float) -> NDArray:
    """Standard normal numbers (tasks, items) with this correlation between tasks."""
    common, own = rng.standard_normal(items), rng.standard_normal((tasks, items))
    return math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own


def answers(hardness: NDArray, drop: float) -> cp.Claim:
    """A task of answers: the hardest items are lost, the easiest are gained."""
    lost = stats.norm.isf((DISAGREEMENT + drop) / 2)
    gained = stats.norm.ppf((DISAGREEMENT - drop) / 2)
    losses, gains = int(np.sum(hardness >= lost)), int(np.sum(hardness <= gained))
    return cp.Claim(judge=lambda level: judged(losses, gains, hardness.size, round(level, 9)))


@functools.cache
def judged(losses: int, gains: int, items: int, confidence: float) -> cp.Verdict:
    """The exact test knows counts only, so that runs share its results."""
    before, after = np.ones(items), np.ones(items)
    before[:gains] = after[gains : gains + losses] = 0
    return certify_accuracy(before, after, max_drop=ANSWER_BUDGET, confidence=confidence)


def losses(hardness: NDArray, drop: float) -> cp.Claim:
    """A task of losses: a document's rise is skewed towards large ones."""
    rise = np.exp(0.5 * hardness)
    mean, spread = math.exp(0.125), math.sqrt((math.exp(0.25) - 1) * math.exp(0.25))
    rise = (rise - mean) / spread + drop
    zeros, ones = np.zeros(len(rise)), np.ones(len(rise))

    def judge(confidence: float) -> cp.Verdict:
        return certify_loss(zeros, rise, ones, max_drop=LOSS_BUDGET, confidence=confidence)

    return cp.Claim(judge=judge)


def claims_of(
    rng: np.random.Generator, drops: list[float], items: int, correlation: float
) -> dict[str, cp.Claim]:
    """Tasks that lose so many times their budgets: answers and losses in turn."""
    hardness = normals(rng, len(drops), items, correlation)
    claims = {}
    for i, drop in enumerate(drops):
        if i % 2:
            claims[f"task {i}"] = losses(hardness[i], drop * LOSS_BUDGET)
        else:
            claims[f"task {i}"] = answers(hardness[i], drop * ANSWER_BUDGET)
    return claims


def shares(drops: list[float], items: int, correlation: float, runs: int) -> dict[str, float]:
    """How often each status is said."""
    rng = np.random.default_rng(abs(hash((len(drops), items, round(100 * correlation)))) % 2**32)
    counts = dict.fromkeys(("CERTIFIED", "VIOLATED", "INCONCLUSIVE"), 0)
    for _ in range(runs):
        counts[cp.certify_all(claims_of(rng, drops, items, correlation)).status] += 1
    return {status: number / runs for status, number in counts.items()}


def written(share: float, runs: int, *, wrong: bool) -> str:
    text = f"{100 * share:.1f}"
    beyond = share > ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)
    return f"**{text}**" if wrong and beyond else text


# Name of a table: the drops of so many tasks, in budgets, and which status would be wrong.
CASES = {
    "certified": (lambda tasks, at: [1.0 if i == at else 0.0 for i in range(tasks)], "CERTIFIED"),
    "violated": (lambda tasks, at: [1.0] * tasks, "VIOLATED"),
    "power": (lambda tasks, at: [0.0] * tasks, None),
}


def print_case(name: str, runs: int) -> None:
    drops_of, wrong = CASES[name]
    print(f"\n### {name} ({runs} runs, percent)\n")
    print("| tasks | items | correlation | at the budget | CERTIFIED | VIOLATED |")
    print("|---|---|---|---|---|---|")
    for tasks in (2, 5):
        for items in (200, 600):
            for correlation in (0.0, 0.9):
                # The first task is one of answers, the second one of losses.
                for at in (0, 1) if name == "certified" else (0,):
                    found = shares(drops_of(tasks, at), items, correlation, runs)
                    cells = []
                    for status in ("CERTIFIED", "VIOLATED"):
                        cells.append(written(found[status], runs, wrong=status == wrong))
                    where = {"certified": ("answers", "losses")[at], "violated": "all"}
                    row = [tasks, items, correlation, where.get(name, "none"), *cells]
                    print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_quantile(runs: int) -> None:
    print(f"\n### quantile ({runs} runs, percent)\n")
    print("| documents | quantile | CERTIFIED at the budget | VIOLATED | CERTIFIED at half of it |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for documents, quantile in ((50, 0.9), (200, 0.9), (299, 0.99), (473, 0.99), (2000, 0.99)):
        budget = math.exp(stats.norm.ppf(quantile))
        counts = np.zeros(3)
        for _ in range(runs):
            values = rng.lognormal(0, 1, documents)
            at = certify_quantile(values, quantile=quantile, max_drop=budget).status
            half = certify_quantile(values / 2, quantile=quantile, max_drop=budget).status
            counts += [at == "CERTIFIED", at == "VIOLATED", half == "CERTIFIED"]
        certified, violated, power = counts / runs
        cells = [
            written(certified, runs, wrong=True),
            written(violated, runs, wrong=True),
            written(power, runs, wrong=False),
        ]
        print(f"| {documents} | {quantile} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--only", choices=[*CASES, "quantile"])
    asked = parser.parse_args()
    for name in CASES:
        if asked.only in (None, name):
            print_case(name, asked.runs)
    if asked.only in (None, "quantile"):
        print_quantile(asked.runs)


if __name__ == "__main__":
    main()
