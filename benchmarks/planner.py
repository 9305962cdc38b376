"""How long a plan takes at 1,000 layers of 20 options, under one limit and under several.

    python benchmarks/planner.py

Layers like those of a network: their sizes differ by an order of magnitude, their sensitivities by
four, prices fall about fourfold per bit, and operations are bits times a number of uses that does
not follow the size. Prints a Markdown table: seconds, size and price of the plan, and whether it is
proven best or how much (as a share of what is minimised) a better one could gain at most.
"""

from __future__ import annotations

import random
import time
import warnings

from curvprune.planning import Choice, Limit, Within, cheapest, frontier


def problem(
    seed: int, layers: int = 1000, options: int = 20
) -> tuple[list[Choice], dict[tuple[str, str], float]]:
    rng = random.Random(seed)
    rows, operations = [], {}
    for layer in range(layers):
        weights, uses = rng.choice([1, 4, 11]) * 2**22, rng.choice([1, 16, 196])
        sensitivity = 10 ** rng.uniform(-6, -2)
        for option in range(options):
            bits = 1.5 + 0.35 * option
            row = Choice(
                layer=f"layer{layer}",
                option=f"option{option}",
                bytes=int(weights * bits / 8),
                price=sensitivity * 4**-bits * rng.uniform(0.5, 2),
            )
            rows.append(row)
            operations[row.layer, row.option] = float(round(weights * uses * bits))
    return rows, operations


def main() -> None:
    rows, operations = problem(0)
    path = frontier(rows, points=9)
    middle = path[4]
    spent = sum(operations[layer, option] for layer, option in middle.choices.items())
    fewer = Limit(name="operations", most=0.9 * spent, use=operations)
    other = Limit(
        name="latency",
        most=1.05 * 1e-12 * spent,
        use={k: 1e-12 * v + 1e-6 for k, v in operations.items()},
    )
    size, loss = middle.bytes - 1, 1.01 * middle.price
    cases: list[tuple[str, Within, float | None]] = [
        ("bytes", Within(max_bytes=size), None),
        ("loss", Within(), loss),
        ("operations", Within(limits=(fewer,)), None),
        ("bytes, operations", Within(max_bytes=size, limits=(fewer,)), None),
        ("loss, operations", Within(limits=(fewer,)), loss),
        ("loss, bytes, operations", Within(max_bytes=10**12, limits=(fewer,)), loss),
        ("bytes, operations, latency", Within(max_bytes=size, limits=(fewer, other)), None),
    ]
    print("| limits | seconds | bytes | price | proven |\n|---|---|---|---|---|")
    bytes_of = {(row.layer, row.option): row.bytes for row in rows}
    price_of = {(row.layer, row.option): row.price for row in rows}
    for name, within, max_loss in cases:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = cheapest(rows, within, max_loss=max_loss)
        seconds = time.perf_counter() - start
        total, cost = (sum(of[pair] for pair in plan.items()) for of in (bytes_of, price_of))
        proven = (
            f"no, {str(caught[0].message).split('at most ')[-1].split()[0]}" if caught else "yes"
        )
        print(f"| {name} | {seconds:.2f} | {total} | {cost:.8g} | {proven} |", flush=True)


if __name__ == "__main__":
    main()
