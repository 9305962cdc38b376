"""Plans by shares of the loss on small models, as they ship, beside uniform widths, a static rule
and plans by quadratic prices, at equal bytes.

    python benchmarks/shares.py [vit] [resnet] [minilm] [menu]      # all unless some are named

vit, resnet: Fashion-MNIST, the models that ``pruning.py`` trains into ``.cache/pruning`` (minutes);
400 images to calibrate and 300 for prices, none of which trained the model; 6,000 others measured.
minilm: all-MiniLM-L6-v2 (a folder in ``BENCH_MINILM``), similarities to the calibration sentences
as in ``embeddings.py``; 128 passages of 64 tokens to calibrate and 96 for prices, from eight plays
(``BENCH_TEXTS``); 600 halves of passages of three others measured.

``DRAWS`` draws (3). Offered are 2 to 5 bits with zero points, in groups of 64 (vit, minilm) or per
channel (resnet). Sizes: the bytes of 3 bits, and half-way to those of 2 and of 4. Every plan is
applied in one sequential pass, as it ships, and measured: KL divergence from the uncompressed model
in nats, and points: of accuracy, or for minilm of queries that find another document first.
Differences are paired by item with uniform 3 bits or, at the sizes between widths, the static rule;
their errors are those of the mean over draws, from the scatter of draws and of items together.

menu: at half the bytes of uniform 8 bits, widths alone (2 to 8 bits), half the weights gone with
the same widths for what is left, and both in one menu. Zeros are stored small
(``Settings(portable=False)``).

Prints Markdown tables. One thread.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvprune as cp
from curvprune.model import Loss, Splits, as_split
from curvprune.planning import cheapest
from curvprune.pricing import Ledger
from curvprune.run import (
    Arguments,
    Settings,
    Task,
    Workspace,
    applied_in,
    apply_plan,
    controls,
    solve_and_price,
    task_from,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import embeddings, pruning
from benchmarks.curvature import ResNet20, fashion_mnist, normalise
from benchmarks.quantization import PLAYS

Option = cp.Quantize | cp.Prune | cp.PruneQuantize
WIDTHS, SIZES = (2, 3, 4, 5), (2.5, 3.0, 3.5)
MENU_WIDTHS = (2, 3, 4, 5, 6, 8)
PRICED = 96  # passages for prices


@dataclass
class Draw:
    """Items of one draw, and what a model is measured by."""

    splits: Splits
    objective: Loss | str
    logits: Callable[[nn.Module], Tensor]
    hits: Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Case:
    name: str
    model: nn.Module
    layers: str
    grid: Mapping[str, int | bool | None]
    draw: Callable[[int], Draw]

    def width(self, bits: int) -> cp.Quantize:
        return cp.Quantize(bits=bits, **self.grid)  # type: ignore[arg-type]


@dataclass
class Measured:
    """Of every item its divergence in nats, and whether it was a hit, in per cent."""

    nats: Tensor
    points: Tensor


@dataclass
class Plan:
    """A plan of one draw: what it was predicted to cost, and what was measured."""

    choices: dict[str, str]
    size: int
    measured: Measured
    predicted: float = float("nan")


@dataclass
class Bench:
    """One draw of a case: its task with a folder, and what was measured of the plans so far."""

    case: Case
    draw: Draw
    task: Task
    space: Workspace
    dense: Tensor
    known: dict[str, Measured] = field(default_factory=dict)

    def sized(self, size: int, *, rounds: int = 1, prices: str = "shares") -> Task:
        """The task with a limit on the bytes of its tensors."""
        told = replace(self.task.settings, rounds=rounds, prices=prices)
        budget = cp.Budget(max_bytes=size + self.task.header_bytes)
        return replace(self.task, budget=budget, settings=told)

    def uniform(self, bits: int) -> dict[str, str]:
        return dict.fromkeys(self.task.layers, self.case.width(bits).key)

    def size(self, bits: float) -> int:
        """Tensor bytes of a uniform width, or half-way between two."""
        low, high = self.uniform(int(bits)), self.uniform(int(bits + 0.5))
        return (self.task.bytes_of(low) + self.task.bytes_of(high)) // 2

    def plan(self, choices: dict[str, str], ledger: Ledger | None = None) -> Plan:
        """A plan applied as it ships, and measured on the held-out items."""
        folder = applied_in(choices)
        if folder not in self.known:
            model, _ = apply_plan(self.task, self.space, choices, folder)
            self.known[folder] = measure(self.draw, self.dense, model)
        found = Plan(choices, self.task.bytes_of(choices), self.known[folder])
        if ledger is not None:
            found.predicted = ledger.predict(choices).value
        return found

    def best(self, size: int, *, rounds: int = 1, prices: str = "shares") -> tuple[Plan, Ledger]:
        """The plan of the least price within so many bytes."""
        task = self.sized(size, rounds=rounds, prices=prices)
        ledger = solve_and_price(task, self.space).prices.ledger
        return self.plan(cheapest(ledger.rows, task.within), ledger), ledger

    def static_rule(self, size: int, ledger: Ledger) -> Plan:
        task = self.task

        def nothing(rows: object, size: int) -> dict[str, str]:
            return self.uniform(3)

        most = size - task.fixed_bytes
        found = controls(ledger.rows, task.layers, task.groups, size=most, plan=nothing)
        return self.plan(next(one.choices for one in found if one.name.startswith("static")))


@torch.no_grad()
def measure(draw: Draw, dense: Tensor, model: nn.Module) -> Measured:
    logits = draw.logits(model)
    before, after = dense.double().log_softmax(1), logits.double().log_softmax(1)
    nats = F.kl_div(after, before, log_target=True, reduction="none").sum(1)
    return Measured(nats, 100 * draw.hits(model, logits).double())


# --------------------------------------------------------------------------------------- models


def images(name: str) -> Case:
    """A model of ``pruning.py``, with the images that it was not trained on."""
    resnet = name == "resnet"
    if resnet:
        model = pruning.trained("resnet20", ResNet20, steps=900, rate=0.1)
    else:
        model = pruning.trained("vit", pruning.ImageLogits, steps=1500, rate=2e-3)
    x, y = fashion_mnist("t10k")
    x, y = normalise(x[-pruning.TEST :]), y[-pruning.TEST :]

    @torch.no_grad()
    def logits(net: nn.Module) -> Tensor:
        return torch.cat([net(part) for part in x.split(500)])

    def draw(number: int) -> Draw:
        hits = lambda net, found: found.argmax(1) == y  # noqa: E731
        return Draw(pruning.splits(number), "classification", logits, hits)

    title = "ResNet-20" if resnet else "ViT"
    grid = {"group_size": None if resnet else 64, "symmetric": False}
    return Case(title, model, "*", grid, draw)


def minilm() -> Case:
    from transformers import AutoModel, AutoTokenizer

    source = os.environ["BENCH_MINILM"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    length, count = embeddings.LENGTH, embeddings.TEST
    whole = embeddings.passages(tokenizer, embeddings.OTHERS, count, length=length, offset=0)
    queries = [text[: len(text) // 2] for text in whole]
    documents = [text[len(text) // 2 :] for text in whole]
    test = [*embeddings.batches(tokenizer, queries, 50)]
    test += embeddings.batches(tokenizer, documents, 50)

    def first(net: nn.Module) -> Tensor:
        found = embeddings.embed(net, test)
        return (found[:count] @ found[count:].T).argmax(1)

    reference = first(model)

    def draw(number: int) -> Draw:
        def passages(count: int, offset: float) -> list[dict[str, Tensor]]:
            texts = embeddings.passages(tokenizer, PLAYS, count, length=length, offset=offset)
            return embeddings.batches(tokenizer, texts, 1)

        calibrate = passages(embeddings.CALIBRATE, number / 3)
        price = as_split(passages(PRICED, number / 3 + 1 / 6))
        anchors = embeddings.embed(model, calibrate)

        def similar(out: object, batch: dict[str, Tensor]) -> Tensor:
            return embeddings.pooled(out, batch) @ anchors.T / embeddings.TEMPERATURE

        @torch.no_grad()
        def logits(net: nn.Module) -> Tensor:
            return embeddings.embed(net, test) @ anchors.T / embeddings.TEMPERATURE

        parts = Splits(calibrate=as_split(calibrate), price=price, select=price, certify=price)
        objective = cp.LabelFree(model, of=similar)
        return Draw(parts, objective, logits, lambda net, _: first(net) == reference)

    grid = {"group_size": 64, "symmetric": False}
    return Case("MiniLM", model, "encoder.*", grid, draw)


def opened(case: Case, number: int, options: Sequence[Option], folder: str) -> Bench:
    draw = case.draw(number)
    settings = Settings(portable=False)
    told = Arguments(loss=draw.objective, layers=case.layers, settings=settings)
    model, budget = copy.deepcopy(case.model), cp.Budget(max_bytes=10**12)
    task, space = task_from(model, draw.splits, list(options), budget, Path(folder), told)
    return Bench(case, draw, task, space, draw.logits(case.model))


# --------------------------------------------------------------------------------------- tables


def mean_error(draws: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over draws and items, and its standard error from both."""
    table = torch.stack(list(draws))
    items = table.mean(0)
    error = float(items.var()) / len(items)
    if len(table) > 1:
        error += float(table.mean(1).var()) / len(table)
    return float(items.mean()), error**0.5


def show(values: Sequence[Tensor], digits: int) -> str:
    mean, error = mean_error(values)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def line(name: str, found: Sequence[Plan], beside: Sequence[Plan]) -> str:
    """A plan of every draw, and its difference from another."""
    pairs = list(zip(found, beside, strict=True))
    nats = sum(float(p.measured.nats.mean()) for p in found) / len(found)
    points = sum(float(p.measured.points.mean()) for p in found) / len(found)
    size = sum(p.size for p in found) / len(found)
    more = show([p.measured.nats - q.measured.nats for p, q in pairs], 4)
    gained = show([p.measured.points - q.measured.points for p, q in pairs], 2)
    ratio = sum(p.predicted for p in found) / len(found) / nats
    told = f"{ratio:.2f}" if ratio == ratio else "–"
    return f"| {name} | {size / 1e3:.1f} | {nats:.4f} | {more} | {points:.2f} | {gained} | {told} |"


HEAD = (
    "| plan | kB | nats | difference | points | difference | predicted / measured |\n"
    "|---|---|---|---|---|---|---|"
)


def widths(case: Case, draws: int) -> None:
    """The table of a model, and the audits of its uniform plans."""
    rows: dict[tuple[float, str], list[Plan]] = {}
    audits: dict[str, list[float]] = {}
    for number in range(draws):
        with tempfile.TemporaryDirectory() as folder:
            bench = opened(case, number, [case.width(b) for b in WIDTHS], folder)
            for size in SIZES:
                for name, plan in plans_of(bench, size, audits).items():
                    rows.setdefault((size, name), []).append(plan)
    for size in SIZES:
        beside = rows[size, "uniform" if size == 3 else "static rule"]
        print(f"\n{case.name}, the bytes of {size:g} bits\n\n{HEAD}")
        for (own, name), found in rows.items():
            if own == size:
                print(line(name, found, beside))
    print("\nHalf the sum of the shares over what was measured of the same plan:\n")
    for plan, ratios in audits.items():
        print(f"* {plan}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    sys.stdout.flush()


def plans_of(bench: Bench, size: float, audits: dict[str, list[float]]) -> dict[str, Plan]:
    """All plans of one size; adds to the audits, by plan."""
    most = bench.size(size)
    found = {}
    one, ledger = bench.best(most)
    two, last = bench.best(most, rounds=2)
    found["shares, one round"], found["shares, two rounds"] = one, two
    found["quadratic prices"], _ = bench.best(most, prices="quadratic")
    found["static rule"] = bench.static_rule(most, ledger)
    if size == int(size):
        found["uniform"] = bench.plan(bench.uniform(int(size)), ledger)
    else:
        for bits in (int(size), int(size) + 1):
            found[f"uniform {bits} bits"] = bench.plan(bench.uniform(bits), ledger)
    for audit in last.audits:
        ratios = audits.setdefault(f"{audit.plan} ({size:g} bits)", [])
        ratios.append(audit.shares / audit.divergence)
    return found


def menu(case: Case, draws: int) -> None:
    """Zeros and widths in one menu beside each alone."""
    alone = [case.width(bits) for bits in MENU_WIDTHS]
    half = cp.Prune(sparsity=0.5)
    zeros = [half, *(cp.PruneQuantize(prune=half, quantize=width) for width in alone)]
    menus = {"both": [*alone, *zeros], "widths alone": alone, "zeros with widths": zeros}
    rows: dict[str, list[Plan]] = {}
    for number in range(draws):
        for name, options in menus.items():
            with tempfile.TemporaryDirectory() as folder:
                bench = opened(case, number, options, folder)
                fixed = bench.task.fixed_bytes
                most = fixed + (bench.size(8) - fixed) // 2
                plan, _ = bench.best(most, rounds=2)
                rows.setdefault(name, []).append(plan)
    print(f"\n{case.name}, zeros and widths at half the bytes of 8 bits\n\n{HEAD}")
    for name, found in rows.items():
        print(line(name, found, rows["both"]))
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    named = sys.argv[1:] or ["vit", "resnet", "minilm", "menu"]
    draws = int(os.environ.get("DRAWS", "3"))
    models = [name for name in named if name != "menu"] or ["vit", "resnet", "minilm"]
    for name in models:
        case = minilm() if name == "minilm" else images(name)
        if named != ["menu"]:
            widths(case, draws)
        if "menu" in named:
            menu(case, draws)


if __name__ == "__main__":
    main()
