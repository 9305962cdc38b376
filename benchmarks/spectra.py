"""Whether what is said of a spectrum holds the truth within two stated errors, and what watching a
training costs.

    python benchmarks/spectra.py coverage
    python benchmarks/spectra.py monitor

``coverage``: three networks on scikit-learn's digits, at the start, after 100 and after 2,000 steps
of training, 12 draws of 256 of the 1,797 images each, against the eigenvalues of dense Hessians by
torch.func in float64. *These items*: the error of probes, starts and quadrature, against the
Hessian of the same 256. *Population*: that and the error over items, against the Hessian of all
1,797. Two of the networks are too large for all their eigenvalues to be computed.

``monitor``: CPU seconds of a training with `curvprune.CurvatureMonitor` at every 100th step beside
the same training without, in turn; λ_max beside a dense Hessian.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import curvprune as cp

STAGES, SEEDS, ITEMS = (0, 100, 2000), 12, 256


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16 - 0.3).view(-1, 1, 8, 8), torch.tensor(y)


def small() -> nn.Module:
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 18), nn.Tanh(), nn.Linear(18, 10)
    )


def deep() -> nn.Module:
    layers = [nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def conv() -> nn.Module:
    layers = [nn.Conv2d(1, 6, 3), nn.GELU(), nn.Conv2d(6, 12, 3, stride=2), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"tanh": small, "ReLU": deep, "conv": conv}


def train(
    model: nn.Module, steps: int, seed: int, see: Callable[[int], object] = lambda step: None
) -> None:
    x, y = digits()
    x = x.to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        see(step)


def dense(model: nn.Module, x: Tensor, y: Tensor, piece: int = 128) -> Tensor:
    own = dict(model.named_parameters())
    sizes = [p.numel() for p in own.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in own.values()])
    total = torch.zeros(len(flat), len(flat), dtype=flat.dtype)
    for some, labels in zip(x.split(piece), y.split(piece), strict=True):

        def loss(v: Tensor, some: Tensor = some, labels: Tensor = labels) -> Tensor:
            parts = zip(own.items(), v.split(sizes), strict=True)
            values = {name: part.view_as(p) for (name, p), part in parts}
            outputs = torch.func.functional_call(model, values, (some,))
            return F.cross_entropy(outputs, labels, reduction="sum")

        total += torch.func.hessian(loss)(flat).detach()
    return total / len(x)


def truths(values: Tensor, near: float) -> dict[str, float]:
    size = float(values.abs().sum())
    return {
        "negative share": float((values < -near).double().mean()),
        "near-zero share": float((values.abs() <= near).double().mean()),
        "effective rank": size**2 / float((values**2).sum()),
        "λmax": float(values[-1]),
        "λmin": float(values[0]),
        "trace": float(values.sum()),
    }


def told(analysis: cp.Analysis) -> dict[str, tuple[float, float, float | None]]:
    """Value, error on these items, error over items."""
    found, whole = analysis.diagnosis, analysis.model
    assert found is not None and whole is not None and whole.trace is not None
    assert found.negative_share is not None and found.near_zero_share is not None
    assert found.effective_rank is not None and found.effective_rank_stderr is not None
    assert whole.eigenpairs is not None and whole.highest is not None and whole.lowest is not None
    high, low = whole.eigenpairs.errors.tolist()
    assert found.lambda_max is not None and found.lambda_min is not None
    negative, near = found.negative_share, found.near_zero_share
    return {
        "negative share": (negative.value, negative.stderr, None),
        "near-zero share": (near.value, near.stderr, None),
        "effective rank": (found.effective_rank, found.effective_rank_stderr, None),
        "λmax": (found.lambda_max, high, whole.highest.over_items),
        "λmin": (found.lambda_min, low, whole.lowest.over_items),
        "trace": (whole.trace.value, whole.trace.stderr, whole.trace.over_items),
    }


def inside(value: float, error: float, truth: float) -> bool:
    return abs(value - truth) <= 2 * error + 1e-9 * max(1.0, abs(truth))


def coverage(nets: Sequence[str] = tuple(NETS)) -> None:
    x, y = digits()
    sums: dict[str, list[int]] = defaultdict(list)
    print("| net (parameters) | steps | quantity | truth | told | these items | population |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in nets:
        torch.manual_seed(0)
        model, done = NETS[name]().double(), 0
        for stage in STAGES:
            train(model, stage - done, seed=stage)
            done = stage
            everybody = torch.linalg.eigvalsh(dense(model, x, y))
            # Draws of items and of probes that no other row has.
            first = 10_000 * list(NETS).index(name) + stage
            rows = one_stage(model, x, y, everybody, first)
            for quantity, (truth, value, error, hits, wider) in rows.items():
                sums[quantity].append(hits)
                population = ""
                if wider is not None:
                    sums[f"{quantity}, population"].append(wider)
                    population = f"{wider} of {SEEDS}"
                print(
                    f"| {name} ({len(everybody)}) | {stage} | {quantity} | {truth:.3g} | "
                    f"{value:.3g} ± {error:.2g} | {hits} of {SEEDS} | {population} |",
                    flush=True,
                )
    for quantity, hits in sums.items():
        print(f"{quantity}: {sum(hits)} of {SEEDS * len(hits)} ({sum(hits) / 12 / len(hits):.0%})")


def one_stage(
    model: nn.Module, x: Tensor, y: Tensor, everybody: Tensor, first: int
) -> dict[str, tuple[float, float, float, int, int | None]]:
    """Quantity → mean truth, mean value, mean error, hits on these items and of the population."""
    table: dict[str, list[tuple[float, float, float, bool, bool | None]]] = defaultdict(list)
    for seed in range(first, first + SEEDS):
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:ITEMS]
        data = [(x[chosen], y[chosen])]
        analysis = cp.analyze(model, data, quantities=["density"], seed=seed)
        assert analysis.diagnosis is not None and analysis.diagnosis.near_zero_below is not None
        near = analysis.diagnosis.near_zero_below
        truth = truths(torch.linalg.eigvalsh(dense(model, *data[0])), near)
        whole = truths(everybody, near)
        for quantity, (value, error, over_items) in told(analysis).items():
            hit, wide = inside(value, error, truth[quantity]), None
            if over_items is not None:
                wide = inside(value, math.hypot(error, over_items), whole[quantity])
            table[quantity].append((truth[quantity], value, error, hit, wide))
    rows = {}
    for quantity, found in table.items():
        columns = list(zip(*found, strict=True))
        means = [sum(column) / len(found) for column in columns[:3]]
        wider = None if columns[4][0] is None else sum(columns[4])
        rows[quantity] = (*means, sum(columns[3]), wider)
    return rows


def monitor(steps: int = 2000, turns: int = 5) -> None:
    x, y = digits()
    x = x.float()
    print(
        "| net | items of the probe | seconds without | with | more | the monitor's own | products "
        "a look | λmax off |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    nets = {**NETS, "wide": wide}
    for name, size in [*((name, 64) for name in nets), ("wide", ITEMS)]:
        build, probe = nets[name], (x[:size], y[:size])
        seconds: dict[bool, float] = {False: 0.0, True: 0.0}
        costs, products, off = [], [], 0.0
        for turn in range(turns):
            for watched in (False, True):
                torch.manual_seed(turn)
                model = build()
                watch = cp.CurvatureMonitor(model, probe, every=100)

                def see(step: int, watch: cp.CurvatureMonitor = watch) -> None:
                    watch.step(step, learning_rate=0.1, momentum=0.9)

                start = time.process_time()
                train(model, steps, turn, see if watched else lambda step: None)
                seconds[watched] += time.process_time() - start
            costs.append(watch.cost or 0.0)
            products += [look.num_products for look in watch.looks]
            last = watch.look(steps)
            if sum(p.numel() for p in model.parameters()) < 2000:
                top = torch.linalg.eigvalsh(dense(model.double(), probe[0].double(), probe[1]))[-1]
                off = max(off, abs(last.lambda_max / float(top) - 1))
        print(
            f"| {name} | {size} | {seconds[False] / turns:.2f} | {seconds[True] / turns:.2f} | "
            f"{seconds[True] / seconds[False] - 1:.1%} | {sum(costs) / turns:.1%} | "
            f"{sum(products) / len(products):.1f} | {off:.1e} |",
            flush=True,
        )


def wide() -> nn.Module:
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["coverage", "monitor"])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    asked = parser.parse_args()
    if asked.what == "coverage":
        coverage(asked.nets)
    else:
        monitor()
