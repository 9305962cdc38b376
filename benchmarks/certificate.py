"""How often the certificate errs: shares of simulated runs in which a model exactly at the budget
is certified, and in which an unchanged one is certified with the items that were said to be needed.

    python benchmarks/certificate.py [--runs 10000] [--only loss]

Prints Markdown tables in percent. A wrong acceptance above 5 % + 3 standard errors of the
simulation is in bold. Documents hold 10 items on average, between 1 and about 80, in proportions
drawn anew for every twentieth of the runs.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from curvprune.certificate import (
    CERTIFIED,
    INCONCLUSIVE,
    Verdict,
    certify_accuracy,
    certify_loss,
    certify_values,
    exact_p_value,
    fixed_sequence,
    items_needed,
    items_needed_for_accuracy,
)

ALPHA = 0.05
ITEMS = (200, 500, 1000, 2000, 5000)
CORRELATIONS = (0.01, 0.05, 0.1, 0.2)
MEAN_SIZE = 10
Draw = Callable[[np.random.Generator, tuple[int, ...]], NDArray]


def lognormal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    return (rng.lognormal(0, 1, shape) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def rare(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray:
    """Two in a hundred lose 1 or more, the others next to nothing: skewness 10."""
    share = 0.02
    values = (rng.random(shape) < share) * (
        1 + rng.standard_exponential(shape)
    ) + 0.05 * rng.standard_normal(shape)
    return (values - 2 * share) / math.sqrt(5 * share - 4 * share**2 + 0.0025)


# All with mean 0 and variance 1.
DIFFERENCES: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "exponential, skewness 2": lambda rng, shape: rng.standard_exponential(shape) - 1,
    "lognormal, skewness 6": lognormal,
    "heavy tails, t with 3 degrees": lambda rng, shape: rng.standard_t(3, shape) / math.sqrt(3),
    "2 % lose, the others do not": rare,
}


def sizes_of(rng: np.random.Generator, items: int) -> NDArray[np.int64]:
    """Unequal document sizes, `MEAN_SIZE` on average, that add up to `items`."""
    share = rng.lognormal(0, 0.7, max(2, items // MEAN_SIZE))
    sizes = 1 + np.floor(share / share.sum() * (items - share.size)).astype(np.int64)
    sizes[np.argsort(-share)[: items - sizes.sum()]] += 1
    return sizes


def documents(
    rng: np.random.Generator, draw: Draw, items: int, correlation: float, runs: int
) -> Iterator[tuple[NDArray, NDArray[np.int64]]]:
    """Per run the sum of every document's differences, and the documents' sizes."""
    for part in np.array_split(np.arange(runs), 20):
        sizes = sizes_of(rng, items)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        own = np.add.reduceat(draw(rng, (part.size, items)), starts, axis=1)
        shared = draw(rng, (part.size, sizes.size)) * sizes
        yield from (
            (row, sizes)
            for row in math.sqrt(1 - correlation) * own + math.sqrt(correlation) * shared
        )


def loss_certified(difference: NDArray, sizes: NDArray, budget: float) -> bool:
    """A document counts like one item of its size, so the documents' sums are all that the test
    looks at."""
    zeros = np.zeros(difference.size)
    return certify_loss(zeros, difference, sizes, max_drop=budget).status == CERTIFIED


def loss_size(draw: Draw, items: int, correlation: float, runs: int) -> float:
    rng = np.random.default_rng([1, items, round(1000 * correlation)])
    runs_of = documents(rng, draw, items, correlation, runs)
    return float(np.mean([loss_certified(total + sizes, sizes, 1.0) for total, sizes in runs_of]))


@functools.cache
def most_losses(gains: int, items: int, budget: float) -> int:
    """The largest number of lost items with which `certify_accuracy` certifies, -1 if there is
    none; the fewer are lost, the smaller its p-value."""

    def certified(lost: int) -> bool:
        is_less = lost - gains < items * budget
        return is_less and exact_p_value(lost, gains, items, budget) <= ALPHA

    # 1. A guess by the normal approximation, whose spread depends on what it says.
    z, most = NormalDist().inv_cdf(1 - ALPHA), gains
    for _ in range(4):
        most = max(0, round(gains + items * budget - z * math.sqrt(max(1, most + gains))))
    # 2. From there to the exact test's.
    while most >= 0 and not certified(most):
        most -= 1
    while most + gains < items and certified(most + 1):
        most += 1
    return most


def accuracy_share(items: int, budget: float, drop: float, disagreement: float, runs: int) -> float:
    rng = np.random.default_rng([2, items, round(1000 * disagreement)])
    shares = [(disagreement + drop) / 2, (disagreement - drop) / 2, 1 - disagreement]
    draws = rng.multinomial(items, shares, size=runs)
    return float(np.mean([lost <= most_losses(int(won), items, budget) for lost, won, _ in draws]))


def clustered_accuracy_size(
    items: int, correlation: float, runs: int, budget: float = 0.03
) -> float:
    """Per document, shares of lost, won and unchanged items are Dirichlet: any two of its items
    correlate."""
    rng = np.random.default_rng([3, items, round(1000 * correlation)])
    shares = np.array([0.05, 0.02, 0.93])
    accepted = 0
    for part in np.array_split(np.arange(runs), 20):
        sizes = sizes_of(rng, items)
        own = rng.dirichlet(shares * (1 / correlation - 1), (part.size, sizes.size))
        for row in rng.multinomial(sizes, np.clip(own, 0, 1)):
            lost, won = row[:, 0], row[:, 1]
            # `certify_accuracy` certifies if both of its tests do; most runs need only the cheap
            # one, which is that of losses.
            if loss_certified((lost - won).astype(float), sizes.astype(float), budget):
                verdict = accuracy_verdict(lost, won, sizes, budget)
                accepted += verdict.status == CERTIFIED
    return accepted / runs


def accuracy_verdict(lost: NDArray, won: NDArray, sizes: NDArray, budget: float) -> Verdict:
    """Of documents that gain their first items and lose the next ones."""
    documents_of = np.repeat(np.arange(sizes.size), sizes)
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    before = place >= won[documents_of]
    after = ~before | (place >= (won + lost)[documents_of])
    return certify_accuracy(before, after, clusters=documents_of, max_drop=budget)


def bounded_size(items: int, correlation: float, runs: int, budget: float = 0.02) -> float:
    """A score between 0 and 1 that falls from 1 to anything below for 4 % of the items; documents
    as above."""
    rng = np.random.default_rng([4, items, round(1000 * correlation)])
    accepted = 0
    for part in np.array_split(np.arange(runs), 20):
        sizes = sizes_of(rng, items)
        clusters = np.repeat(np.arange(sizes.size), sizes)
        for _ in part:
            if correlation:
                scale = 1 / correlation - 1
                share = rng.beta(2 * budget * scale, (1 - 2 * budget) * scale, sizes.size)[clusters]
            else:
                share = np.full(items, 2 * budget)
            difference = (rng.random(items) < share) * rng.random(items)
            verdict = certify_values(
                np.zeros(items),
                difference,
                max_drop=budget,
                bounds=(0, 1),
                higher_is_better=False,
                clusters=clusters if correlation else None,
            )
            accepted += verdict.status == CERTIFIED
    return accepted / runs


def sequence_size(items: int, drops: tuple[float, ...], correlation: float, runs: int) -> float:
    """Share of runs whose last certified plan is at the budget or above; all plans see the same
    documents, and half of the variance of their lognormal differences is common to them."""
    draws = [
        documents(
            np.random.default_rng([5, items]),
            lambda rng, shape, k=k: _plan_draw(rng, shape, k),
            items,
            correlation,
            runs,
        )
        for k in range(len(drops) + 1)
    ]
    wrong = 0
    for (common, sizes), *own in zip(*draws, strict=True):
        verdicts = []
        for drop, (total, _) in zip(drops, own, strict=True):
            difference = drop * sizes + (common + total) / math.sqrt(2)
            verdicts.append(certify_loss(np.zeros(sizes.size), difference, sizes, max_drop=1.0))
            if verdicts[-1].status != CERTIFIED:
                break
        last = fixed_sequence(verdicts)
        wrong += last is not None and drops[last] >= 1.0
    return wrong / runs


def _plan_draw(rng: np.random.Generator, shape: tuple[int, ...], plan: int) -> NDArray:
    """Every plan has draws of its own; `rng`, which also draws the documents' sizes, moves on by
    one number only."""
    return lognormal(np.random.default_rng([int(rng.integers(2**32)), plan]), shape)


def loss_power(draw: Draw, pilot: int, correlation: float, runs: int) -> tuple[float, float]:
    """An unchanged model is tested with `pilot` items; where that is inconclusive, again on as many
    new items as the verdict says are needed. Share certified then, and the median of the items
    needed over the pilot's."""
    rng = np.random.default_rng([6, pilot, round(1000 * correlation)])
    budget = 2 * math.sqrt(
        (1 + correlation * (1.6 * MEAN_SIZE - 1)) / pilot
    )  # about twice the standard error
    accepted, factors = [], []
    for total, sizes in documents(rng, draw, pilot, correlation, runs):
        first = certify_loss(np.zeros(sizes.size), total, sizes, max_drop=budget)
        if first.status != INCONCLUSIVE or first.needed is None or first.drop >= budget:
            continue
        # The pilot counts documents as items; a new document is as large as a random one of the
        # pilot's.
        again = rng.choice(sizes, min(first.needed, 100 * sizes.size))
        own = np.add.reduceat(
            draw(rng, (int(again.sum()),)), np.concatenate([[0], np.cumsum(again)[:-1]])
        )
        new = math.sqrt(1 - correlation) * own + math.sqrt(correlation) * again * draw(
            rng, (again.size,)
        )
        accepted.append(loss_certified(new, again, budget))
        factors.append(first.needed / sizes.size)
    return float(np.mean(accepted)), float(np.median(factors))


def accuracy_power(
    pilot: int, budget: float, disagreement: float, runs: int
) -> tuple[float, float]:
    rng = np.random.default_rng([7, pilot, round(1000 * disagreement)])
    shares = [disagreement / 2, disagreement / 2, 1 - disagreement]
    accepted, factors = [], []
    needed_for = functools.cache(lambda lost, won: _accuracy_needed(lost, won, pilot, budget))
    for lost, won, _ in rng.multinomial(pilot, shares, size=runs):
        needed = needed_for(int(lost), int(won))
        if needed is not None:
            again = rng.multinomial(min(needed, 20_000), shares)
            accepted.append(again[0] <= most_losses(int(again[1]), min(needed, 20_000), budget))
            factors.append(needed / pilot)
    return float(np.mean(accepted)), float(np.median(factors))


def _accuracy_needed(lost: int, won: int, items: int, budget: float) -> int | None:
    """What `certify_accuracy` says is needed of a model that it finds inconclusive and not over the
    budget."""
    base, comp = np.zeros(items), np.zeros(items)
    base[:lost], comp[lost : lost + won] = 1, 1
    verdict = certify_accuracy(base, comp, max_drop=budget)
    return verdict.needed if verdict.status == INCONCLUSIVE and verdict.drop < budget else None


def bounded_power(pilot: int, budget: float, runs: int) -> tuple[float, float]:
    rng = np.random.default_rng([8, pilot])

    def scores(items: int) -> tuple[NDArray, NDArray]:
        changed, up = rng.random(items) < 0.1, rng.random(items) < 0.5
        size = rng.random(items)
        return np.where(changed & ~up, size, 0.0), np.where(changed & up, size, 0.0)

    accepted, factors = [], []
    for _ in range(runs):
        first = certify_values(*scores(pilot), max_drop=budget, bounds=(0, 1))
        if first.status == INCONCLUSIVE and first.needed is not None and first.drop < budget:
            again = scores(min(first.needed, 50_000))
            accepted.append(
                certify_values(*again, max_drop=budget, bounds=(0, 1)).status == CERTIFIED
            )
            factors.append(first.needed / pilot)
    return float(np.mean(accepted)), float(np.median(factors))


def size(rate: float, of: int) -> str:
    """In percent; bold where it is above ALPHA by more than the simulation's noise."""
    text = f"{100 * rate:.2f}"
    return f"**{text}**" if rate > ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / of) else text


def table(title: str, rows: list[tuple[str, list[str]]], columns: list[str]) -> None:
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


BY_ITEMS = [f"{items:,}" for items in ITEMS]


def accuracy_tables(runs: int) -> None:
    rows = []
    for budget in (0.01, 0.02, 0.05):
        for disagreement in (0.01, 0.02, 0.05, 0.1, 0.2):
            if disagreement < budget:
                continue
            shares = [accuracy_share(n, budget, budget, disagreement, runs) for n in ITEMS]
            name = f"budget {budget:.0%}, {disagreement:.0%} disagree"
            rows.append((name, [size(share, runs) for share in shares]))
    title = "Accuracy, independent items: wrong acceptances at a true drop equal to the budget"
    table(title, rows, BY_ITEMS)
    rows = []
    for rho in CORRELATIONS:
        shares = [clustered_accuracy_size(items, rho, runs) for items in ITEMS]
        rows.append((f"ρ = {rho:g}", [size(share, runs) for share in shares]))
    table("Accuracy, documents of 10 items: budget 3 %, 7 % disagree", rows, BY_ITEMS)


def loss_tables(runs: int) -> None:
    for name, draw in DIFFERENCES.items():
        rows = []
        for rho in CORRELATIONS:
            shares = [loss_size(draw, items, rho, runs) for items in ITEMS]
            rows.append((f"ρ = {rho:g}", [size(share, runs) for share in shares]))
        table(f"Loss, documents of 10 items, differences {name}", rows, BY_ITEMS)


def bounded_table(runs: int) -> None:
    runs = max(20, runs // 10)
    rows = []
    for rho in (0.0, *CORRELATIONS):
        shares = [bounded_size(items, rho, runs) for items in ITEMS]
        name = f"ρ = {rho:g}" if rho else "independent"
        rows.append((name, [size(share, runs) for share in shares]))
    title = f"Score in [0, 1], 4 % of the items lose, budget 2 % ({runs} runs)"
    table(title, rows, BY_ITEMS)


def sequence_table(runs: int) -> None:
    sequences = {
        "one plan at the budget": ((1.0,), 0.2),
        "all five at the budget": ((1.0,) * 5, 0.2),
        "two within, three at the budget": ((0.8, 0.9, 1.0, 1.0, 1.0), 0.2),
        "one within, then at and above": ((0.0, 1.0, 1.1, 1.3), 0.2),
        "one plan at the budget, ρ = 1": ((1.0,), 1.0),
        "one within, then at and above, ρ = 1": ((0.0, 1.0, 1.1, 1.3), 1.0),
    }
    rows = []
    for name, case in sequences.items():
        shares = [sequence_size(items, *case, runs) for items in ITEMS[:4]]
        rows.append((name, [size(share, runs) for share in shares]))
    title = "Fixed sequence of plans on the same documents, lognormal, ρ = 0.2: "
    table(f"{title}the shipped plan is over the budget", rows, BY_ITEMS[:4])


def power_tables(runs: int) -> None:
    # 1. The spread of the differences is known beforehand.
    rows = []
    cases = ((0.01, 0.005), (0.01, 0.01), (0.01, 0.02), (0.02, 0.05), (0.02, 0.1), (0.05, 0.2))
    for budget, disagreement in cases:
        needed = items_needed_for_accuracy(disagreement, max_drop=budget)
        share = accuracy_share(needed, budget, 0.0, disagreement, runs)
        name = f"accuracy, budget {budget:.0%}, {disagreement:.1%} disagree"
        rows.append((name, [f"{needed:,}", f"{100 * share:.1f}"]))
    for items in (200, 1000):
        sd = math.sqrt(items) / 2.4865
        needed = items_needed(sd, max_drop=1.0)
        rng = np.random.default_rng(9)
        draws = (sd * rng.standard_normal(needed) for _ in range(runs))
        share = float(np.mean([loss_certified(draw, np.ones(needed), 1.0) for draw in draws]))
        rows.append((f"loss, normal, sd {sd:.1f} budgets", [f"{needed:,}", f"{100 * share:.1f}"]))
    title = "An unchanged model with the items needed, planned from a known spread"
    table(title, rows, ["items", "certified"])

    # 2. It is what a first, inconclusive test saw.
    few, found = max(20, runs // 10), {}
    for budget, disagreement in ((0.02, 0.02), (0.02, 0.05), (0.05, 0.1)):
        name = f"accuracy, 300 items, budget {budget:.0%}, {disagreement:.0%} disagree"
        found[name] = accuracy_power(300, budget, disagreement, few)
    found["score in [0, 1], 500 items, budget 2 %, 10 % change"] = bounded_power(
        500, 0.02, few // 4
    )
    for name, draw in DIFFERENCES.items():
        for pilot, rho in ((200, 0.1), (1000, 0.1)):
            title = f"loss, {pilot:,} items in documents, {name}"
            found[title] = loss_power(draw, pilot, rho, few)
    rows = []
    for name, (share, factor) in found.items():
        rows.append((name, [f"{factor:.1f}", f"{100 * share:.1f}"]))
    title = "An unchanged model, inconclusive at first, with as many new items as its verdict says"
    table(f"{title} are needed", rows, ["times the items", "certified"])


RARE = 0.05
CLUSTERS = (10, 22, 40, 58, 59, 100, 200)


def rare_losses(items: int, noise: float, runs: int, *, bounded: bool) -> tuple[float, float]:
    """One item in twenty loses 0.9, the others differ by as much noise; budget and true drop are
    both 0.045. Shares certified, and certified without a word of losses that would not be seen."""
    rng = np.random.default_rng([10, items, round(1000 * noise)])
    certified = silent = 0
    for _ in range(runs):
        loss = 0.9 * (rng.random(items) < RARE) + noise * rng.standard_normal(items)
        verdict = certify_values(
            np.full(items, 0.95),
            0.95 - loss,
            max_drop=0.9 * RARE,
            bounds=(0, 1) if bounded else None,
        )
        certified += verdict.status == CERTIFIED
        silent += verdict.status == CERTIFIED and "not have been seen" not in verdict.note
    return certified / runs, silent / runs


def repeated(items: int, times: int, runs: int, *, bounded: bool) -> float:
    """Scores with normal differences at the budget, every item ``times`` times."""
    rng = np.random.default_rng([11, items, times])
    certified = 0
    for _ in range(runs):
        before = np.repeat(rng.random(items), times)
        loss = np.repeat(0.02 + 0.05 * rng.standard_normal(items), times)
        bounds = (-2, 3) if bounded else None
        verdict = certify_values(before, before - loss, max_drop=0.02, bounds=bounds)
        certified += verdict.status == CERTIFIED
    return certified / runs


def confident(items: int, confidence: float, runs: int) -> tuple[float, float]:
    """Lognormal differences at the budget: share certified wrongly, and how often a model without
    loss is, with a budget of ten standard deviations."""
    rng = np.random.default_rng([12, items])
    wrong = right = 0
    for _ in range(runs):
        loss = lognormal(rng, (items,))
        asked = {"confidence": confidence, "higher_is_better": False}
        zeros = np.zeros(items)
        wrong += certify_values(zeros, 1 + loss, max_drop=1.0, **asked).status == CERTIFIED
        right += certify_values(zeros, loss, max_drop=10.0, **asked).status == CERTIFIED
    return wrong / runs, right / runs


def unseen_tables(runs: int) -> None:
    # 1. Losses that many samples do not hold.
    rows = []
    for name, noise, bounded in (
        ("the others do not change", 0.0, False),
        ("the others change by ± 0.01", 0.01, False),
        ("the others do not change, bounds (0, 1)", 0.0, True),
        ("the others change by ± 0.01, bounds (0, 1)", 0.01, True),
    ):
        found = [rare_losses(items, noise, runs, bounded=bounded) for items in CLUSTERS]
        rows.append((name, [size(share, runs) for share, _ in found]))
        rows.append((f"{name}; not said so", [size(share, runs) for _, share in found]))
    title = "One item in twenty loses 0.9, without a word where nothing is said of rare losses"
    table(title, rows, [str(items) for items in CLUSTERS])

    # 2. Items that are there several times.
    rows = []
    for name, bounded in (("no bounds", False), ("bounds (-2, 3)", True)):
        shares = [repeated(*case, runs, bounded=bounded) for case in ((10, 10), (20, 5), (60, 3))]
        rows.append((name, [size(share, runs) for share in shares]))
    columns = ["10 items ten times", "20 five times", "60 three times"]
    table("Items with normal differences at the budget, each several times", rows, columns)
    one = certify_values([1.23456] * 30, [1.22456] * 30, max_drop=0.5)
    print(f"\nOne item 30 times: {one.status}, needed {one.needed}", flush=True)

    # 3. No difference at all.
    rows = []
    for confidence in (0.95, 0.999999):
        for budget in (0.0, 0.01):
            cells = []
            for items in (2, 10, 58, 59, 270):
                zeros = np.zeros(items)
                asked = {"max_drop": budget, "confidence": confidence}
                cells.append(certify_values(zeros, zeros, **asked).status)
            rows.append((f"confidence {confidence}, budget {budget}", cells))
    table("No item differs", rows, ["2", "10", "58", "59", "270"])

    # 4. More confidence than few clusters carry.
    rows = []
    for items in (9, 20, 60):
        cells = []
        for confidence in (0.95, 0.999, 0.999999):
            wrong, right = confident(items, confidence, runs)
            cells.append(f"{size(wrong, runs)}, {100 * right:.1f}")
        rows.append((f"{items} items", cells))
    title = "Lognormal differences: wrong acceptances, and acceptances of an unchanged model"
    table(title, rows, ["95 %", "99.9 %", "99.9999 %"])


TABLES: dict[str, Callable[[int], None]] = {
    "accuracy": accuracy_tables,
    "loss": loss_tables,
    "bounded": bounded_table,
    "sequence": sequence_table,
    "power": power_tables,
    "unseen": unseen_tables,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000, help="simulated runs a cell")
    parser.add_argument("--only", choices=TABLES, default=None)
    asked = parser.parse_args()
    start = time.perf_counter()
    for name, print_tables in TABLES.items():
        if asked.only in (None, name):
            print_tables(asked.runs)
    print(f"\n{asked.runs} runs a cell, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
