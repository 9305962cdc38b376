"""Plans of equal bytes for SmolLM2-135M, ours beside those of other planners, as they ship.

    BENCH_SMOLLM2=... BENCH_TEXTS=... python benchmarks/rivals.py [PLAN ...]
        [--grid groups|channel] [--sizes BITS ...] [--draws DRAW ...] [--plays PLAY ...]
        [--file PLANS.json]

``BENCH_SMOLLM2``: the model as a folder of transformers. ``BENCH_TEXTS``: see ``quantization.py``.
``MODELOPT_PYTHON``, ``AUTOROUND_PYTHON``: interpreters with nvidia-modelopt and auto-round; without
them their plans are left out. ``DTYPE``: of the forward passes that measure, float32 or bfloat16.
``CACHE``: the folder where everything is kept (``.cache/rivals``); a plan that is there is not made
again, a draw that is there not measured again. One thread.

Grids: integers in groups of 64 with zero points, 2 to 5 bits (``groups``), or one symmetric scale
per channel, 3 to 6 bits (``channel``). A size is that of a width for all blocks' layers, or lies
between those of two widths. Plans (all but ``autoround`` unless some are named):

uniform    one width for all, at whole sizes
edges      the first and the last quarter of the blocks wider by one width, or two, than the others
static     the static rule that `curvprune.compress` holds its plan against
additive   `curvprune.compress` with ``prices="quadratic"``: prices of single layers added up
shares     `curvprune.compress` with ``prices="shares"``
modelopt   scores of ModelOpt's auto_quantize (gradient; q, k, v one width, gate and up another),
           and the plan with the least sum of them
autoscheme scores of AutoRound's AutoScheme, likewise, every layer its own width
autoscheme-own  the plan that AutoScheme makes of them, for its own count of bits
autoround  no plan: AutoRound's rounding (200 iterations) at whole sizes, about 25 minutes a draw

``--file`` names further plans: a JSON object, name → {layer: option key}, each compared at the size
that is nearest to its bytes.

Plans are made once, from the first calibration draw (``--draws`` without any: no more than that).
Each is then applied as it ships, in one sequential pass over every draw's 16 × 512 tokens of eight
plays, saved and read again. Planners see 12 × 512 other tokens of those plays, `curvprune.compress`
chooses by 8 × 512 more. Measured are the first 8,192 tokens of each of ``--plays`` (hamlet and
cymbeline) in windows of 512: nats per token, and the KL divergence from the dense model. Two
Markdown tables are printed: means over draws, and paired differences with errors (over draws; over
windows where there is one draw). Seconds to plan are CPU seconds of everything up to the plan; of
`curvprune.compress` the applied model is part of that.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import curvprune as cp
from curvprune.artifact import header_bytes, layer_bytes, other_bytes
from curvprune.model import find_layers
from curvprune.planning import Within, cheapest
from curvprune.pricing import Row
from curvprune.run import Arguments, apply_and_measure, controls, task_from

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.quantization import PLAYS, play
from benchmarks.rival_results import Applied, Made, Results, differences, mean, means, sayings

LAYERS = "model.layers.*"
LENGTH, CALIBRATE, PRICE, SELECT, EVALUATE = 512, 16, 12, 8, 8192
Choices = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The widths offered, and the sizes compared unless others are asked."""

    group_size: int | None
    symmetric: bool
    bits: tuple[int, ...]
    sizes: tuple[float, ...]

    def option(self, bits: int) -> cp.Quantize:
        return cp.Quantize(bits=bits, group_size=self.group_size, symmetric=self.symmetric)


GRIDS = {
    "groups": Grid(group_size=64, symmetric=False, bits=(2, 3, 4, 5), sizes=(2.5, 3, 3.5)),
    "channel": Grid(group_size=None, symmetric=True, bits=(3, 4, 5, 6), sizes=(4,)),
}


# ------------------------------------------------------------------------------------------ text


class Text:
    """Token windows for every purpose."""

    def __init__(self, folder: Path, tokenizer: Callable) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.known: dict[str, Tensor] = {}

    def tokens(self, name: str) -> Tensor:
        if name not in self.known:
            ids = self.tokenizer(play(self.folder, name), add_special_tokens=False)["input_ids"]
            self.known[name] = torch.tensor(ids)
        return self.known[name]

    def windows(self, sixths: int) -> Tensor:
        """Two windows of each play, half a play apart and so many sixths of that further on; the
        first windows of all plays come first."""
        rows = []
        per = CALIBRATE // len(PLAYS)
        for number in range(per):
            for name in PLAYS:
                ids = self.tokens(name)
                step = (len(ids) - LENGTH) // per
                start = number * step + sixths * step // 6
                rows.append(ids[start : start + LENGTH])
        return torch.stack(rows)

    def calibration(self, draw: int) -> Tensor:
        """Draws 0, 1 and 2 share no token."""
        if not 0 <= draw <= 2:
            raise SystemExit(f"draw {draw}: there are draws 0, 1 and 2")
        return self.windows(2 * draw)

    @property
    def price(self) -> Tensor:
        return self.windows(1)[:PRICE]

    def splits(self, draw: int) -> cp.Splits:
        rest = self.windows(3)
        parts = {
            "calibrate": self.calibration(draw),
            "price": self.price,
            "select": rest[:SELECT],
            "certify": rest[-2:],
        }
        return cp.Splits(
            **{name: [{"input_ids": ids} for ids in rows.split(1)] for name, rows in parts.items()}
        )

    def evaluation(self, name: str) -> Tensor:
        ids = self.tokens(name)[:EVALUATE]
        return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


# ----------------------------------------------------------------------------------------- bench


class Bench:
    """The dense model, its text and its grid, and the cache folder of these."""

    def __init__(self, grid: str) -> None:
        source = Path(os.environ["BENCH_SMOLLM2"])
        self.grid = GRIDS[grid]
        self.dtype = getattr(torch, os.environ.get("DTYPE", "float32"))
        self.source = source.resolve()
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.text = Text(Path(os.environ["BENCH_TEXTS"]), AutoTokenizer.from_pretrained(source))
        self.layers = find_layers(self.model, LAYERS)
        with (source / "model.safetensors").open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        cache = Path(os.environ.get("CACHE", ".cache/rivals")).resolve()
        self.of_model = cache / f"{source.name}-{weights}"
        self.folder = self.of_model / grid
        (self.folder / "plans").mkdir(parents=True, exist_ok=True)
        kind = str(self.dtype).removeprefix("torch.")
        self.results = self.folder / f"results-{kind}.jsonl"
        self._check_text()

    def _check_text(self) -> None:
        """Refuse a cache of other text: plans and results there are of its tokens."""
        tokens = torch.stack([self.text.windows(sixths) for sixths in range(5)])
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        known = self.folder / "text.sha256"
        if not known.exists():
            known.write_text(digest)
        if known.read_text() != digest:
            raise SystemExit(f"{self.folder} is of other text; set CACHE to another folder")

    # ------------------------------------------------------------------------------- bytes

    def bytes_of(self, choices: Mapping[str, str]) -> int:
        """Bytes of the layers under a plan."""
        return sum(self.table[name][key] for name, key in choices.items())

    @cached_property
    def table(self) -> dict[str, dict[str, int]]:
        """Layer → option key → bytes."""
        options = [cp.Keep(), *map(self.grid.option, self.grid.bits)]
        found = {}
        for name, layer in self.layers.items():
            found[name] = {o.key: layer_bytes(self.model, layer, o) for o in options}
        return found

    @property
    def fixed(self) -> int:
        return other_bytes(self.model, self.layers) + header_bytes(self.model, self.layers)

    def uniform(self, bits: int) -> Choices:
        return dict.fromkeys(self.layers, self.grid.option(bits).key)

    def room(self, size: float) -> int:
        """Bytes of the layers at a size, between those of two widths where it is no whole one."""
        below, above = (self.bytes_of(self.uniform(f(size))) for f in (math.floor, math.ceil))
        return below + int((above - below) * (size % 1))

    def cheapest(
        self, prices: Mapping[tuple[str, str], float], size: float, groups: Iterable = ()
    ) -> Choices:
        """The plan of a size with the least sum of prices."""
        rows = []
        for (name, key), price in prices.items():
            size_of = self.table[name][key]
            rows.append(Row(layer=name, option=key, bytes=size_of, price=price, stderr=0.0))
        within = Within(max_bytes=self.room(size), same_option=tuple(map(tuple, groups)))
        return cheapest(rows, within)

    # ---------------------------------------------------------------------------- measuring

    def log_probabilities(self, model: nn.Module, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return logits.float().log_softmax(-1)

    def dense(self, name: str) -> np.ndarray:
        """The dense model's log-probabilities of a play, ``(windows, positions, words)`` on disk in
        float32: what the KL is taken from must be more exact than the KL."""
        ids = self.text.evaluation(name)
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8]
        kind = str(self.dtype).removeprefix("torch.")
        path = self.of_model / f"dense-{name}-{digest}-{kind}.npy"
        if not path.exists():
            model = copy.deepcopy(self.model).to(self.dtype)
            part, shape = path.with_suffix(".part"), None
            for start, window in enumerate(ids.split(1)):
                found = self.log_probabilities(model, window).numpy()
                if shape is None:
                    shape = (len(ids), *found.shape[1:])
                    kept = np.lib.format.open_memmap(part, "w+", np.float32, shape)
                kept[start] = found[0]
            kept.flush()
            part.rename(path)
        return np.load(path, mmap_mode="r")

    def measure(self, model: nn.Module, name: str) -> tuple[list[float], list[float]]:
        """Nats per token and KL(dense ‖ model) per token of every window of a play."""
        model, reference = model.to(self.dtype), self.dense(name)
        nats, kl = [], []
        for place, ids in enumerate(self.text.evaluation(name).split(1)):
            own = self.log_probabilities(model, ids)[0]
            other = torch.from_numpy(np.array(reference[place]))
            nats.append(float(-own.gather(1, ids[0, 1:, None]).double().mean()))
            kl.append(float((other.exp() * (other - own)).sum(1).double().mean()))
        return nats, kl

    def dense_nats(self, name: str) -> float:
        """Nats per token of the dense model."""
        reference, nats = self.dense(name), []
        for place, ids in enumerate(self.text.evaluation(name)):
            nats.append(
                float(-np.take_along_axis(reference[place], ids[1:, None].numpy(), 1).mean())
            )
        return statistics.mean(nats)

    # --------------------------------------------------------------------------- other Pythons

    def child(self, variable: str, side: str, **told: object) -> dict:
        """What ``rival_plans.py`` finds in another environment; a file in the cache once found."""
        label = side if "bits" not in told else f"{side}-{told['bits']}-{told['draw']}"
        kept = self.folder / f"{label}.json"
        if not kept.exists():
            grid = self.grid
            calibrate = self.text.calibration(int(str(told.get("draw", 0))))
            asked = {
                "model": str(self.source),
                "layers": list(self.layers),
                "group_size": grid.group_size,
                "symmetric": grid.symmetric,
                "widths": grid.bits,
                "sizes": grid.sizes,
                "price": self.text.price.tolist(),
                "calibrate": calibrate.tolist(),
                **told,
            }
            question = self.folder / f"{label}-asked.json"
            question.write_text(json.dumps(asked))
            script = str(Path(__file__).with_name("rival_plans.py").resolve())
            command = [os.environ[variable], script, side, str(question), str(kept)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            environment.pop("PYTHONPATH", None)
            done = subprocess.run(
                command,
                env=environment,
                cwd=self.folder,
                capture_output=True,
                text=True,
                check=False,
            )
            question.unlink()
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
        return json.loads(kept.read_text())


# ----------------------------------------------------------------------------------------- plans


def uniform(bench: Bench, size: float) -> Made | None:
    if size != int(size):
        return None
    return Made(choices=bench.uniform(int(size)))


def autoround(bench: Bench, size: float) -> Made | None:
    made = uniform(bench, size)
    return made and replace(made, rounds="autoround")


def edges(bench: Bench, size: float) -> Made:
    """From the ends of the model inwards the wider width, as long as there is room."""
    narrow = math.ceil(size) - 1
    wide = math.floor(size) + 1
    blocks = {name: int(name.removeprefix(LAYERS[:-1]).split(".")[0]) for name in bench.layers}
    last = max(blocks.values())
    choices, room = bench.uniform(narrow), bench.room(size)
    for name in sorted(blocks, key=lambda name: min(blocks[name], last - blocks[name])):
        wider = {**choices, name: bench.grid.option(wide).key}
        if bench.bytes_of(wider) <= room:
            choices = wider
    return Made(choices=choices)


def static(bench: Bench, size: float) -> Made | None:
    rows = []
    for name, options in bench.table.items():
        for key, size_of in options.items():
            if key != "keep":
                rows.append(Row(layer=name, option=key, bytes=size_of, price=0.0, stderr=0.0))
    groups = [(name,) for name in bench.layers]
    found = controls(rows, bench.layers, groups, size=bench.room(size), plan=lambda rows, size: {})
    rule = [control for control in found if control.name.startswith("static rule")]
    return Made(choices=rule[0].choices, shipped=rule[0].name) if rule else None


def settings_of(prices: str) -> cp.Settings:
    return cp.Settings(prices=prices)


def compressed(prices: str) -> Callable[[Bench, float], Made]:
    def make(bench: Bench, size: float) -> Made:
        start = time.process_time()
        result = cp.compress(
            bench.model,
            bench.text.splits(0),
            options=[bench.grid.option(bits) for bits in bench.grid.bits],
            budget=cp.Budget("loss", max_bytes=bench.fixed + bench.room(size)),
            layers=LAYERS,
            settings=settings_of(prices),
        )
        seconds = time.process_time() - start
        same = [trial for trial in result.trials if trial.choices == result.plan.choices]
        return Made(
            choices=result.plan.choices,
            seconds=seconds,
            predicted=result.plan.predicted,
            predicted_stderr=result.plan.predicted_stderr,
            shipped=same[0].name if same else "",
            audits=[asdict(audit) for audit in result.ledger.audits],
            trials=[asdict(trial) for trial in result.trials],
        )

    return make


def modelopt(bench: Bench, size: float) -> Made:
    said = bench.child("MODELOPT_PYTHON", "modelopt")
    prices: dict[tuple[str, str], float] = {}
    for unit in said["units"]:
        first, *others = unit["layers"]
        for bits, score in unit["scores"].items():
            key = bench.grid.option(int(bits)).key
            prices[first, key] = score
            prices.update(dict.fromkeys(((name, key) for name in others), 0.0))
    groups = [unit["layers"] for unit in said["units"] if len(unit["layers"]) > 1]
    return Made(choices=bench.cheapest(prices, size, groups), seconds=said["seconds"])


def autoscheme(bench: Bench, size: float) -> Made:
    said = bench.child("AUTOROUND_PYTHON", "autoscheme")
    prices = {}
    for bits, scores in said["scores"].items():
        key = bench.grid.option(int(bits)).key
        prices.update({(name, key): score for name, score in scores.items()})
    return Made(choices=bench.cheapest(prices, size), seconds=said["seconds"])


def autoscheme_own(bench: Bench, size: float) -> Made | None:
    said = bench.child("AUTOROUND_PYTHON", "autoscheme")
    if f"{size:g}" not in said["plans"]:
        return None
    own = said["plans"][f"{size:g}"]
    choices = {name: bench.grid.option(own[name]).key for name in bench.layers}
    return Made(choices=choices, seconds=said["seconds"])


PLANS: dict[str, Callable[[Bench, float], Made | None]] = {
    "uniform": uniform,
    "edges": edges,
    "static": static,
    "additive": compressed("quadratic"),
    "shares": compressed("shares"),
    "modelopt": modelopt,
    "autoscheme": autoscheme,
    "autoscheme-own": autoscheme_own,
    "autoround": autoround,
}
NEEDS = {
    "modelopt": ("MODELOPT_PYTHON", "nvidia-modelopt"),
    "autoscheme": ("AUTOROUND_PYTHON", "auto-round"),
    "autoscheme-own": ("AUTOROUND_PYTHON", "auto-round"),
    "autoround": ("AUTOROUND_PYTHON", "auto-round"),
}


def plan_of(bench: Bench, name: str, size: float) -> Made | None:
    """A plan, made or read; ``None`` where there is none of this size."""
    kept = bench.folder / "plans" / f"{name} {size:g}.json"
    if kept.exists():
        return Made(**json.loads(kept.read_text()))
    made = PLANS[name](bench, size)
    if made is not None:
        kept.write_text(json.dumps(asdict(made)))
    return made


def plans_in(bench: Bench, path: Path, sizes: Sequence[float]) -> dict[tuple[str, float], Made]:
    """The plans of a file, each at the size nearest to its bytes."""
    found = {}
    for name, choices in json.loads(path.read_text()).items():
        if set(choices) != set(bench.layers):
            odd = sorted(set(choices) ^ set(bench.layers))
            raise SystemExit(f"{path}: plan {name!r}: expected every layer of {LAYERS}: {odd[:3]}")
        stored = bench.bytes_of(choices)
        size = min(sizes, key=lambda size: abs(bench.room(size) - stored))
        found[name, size] = Made(choices=choices)
    return found


# -------------------------------------------------------------------------------------- applying


def as_shipped(bench: Bench, choices: Choices, draw: int) -> nn.Module:
    """A plan solved in one sequential pass over a draw, saved and read again."""
    offered = [bench.grid.option(bits) for bits in bench.grid.bits]
    told = Arguments(layers=LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        splits = bench.text.splits(draw)
        task, space = task_from(bench.model, splits, offered, None, Path(folder), told)
        shipped = apply_and_measure(task, space, choices)
        return task.storage.read(shipped.folder)


def rounded_by_autoround(bench: Bench, bits: int, draw: int) -> tuple[nn.Module, float]:
    said = bench.child("AUTOROUND_PYTHON", "autoround", bits=bits, draw=draw)
    model = copy.deepcopy(bench.model)
    weights = load_file(said["weights"])
    for name, layer in find_layers(model, LAYERS).items():
        layer.write_(weights[name])
    return model, said["seconds"]


def applied(bench: Bench, made: Made, size: float, draw: int) -> tuple[nn.Module, float]:
    """The model that a plan becomes over a draw, and CPU seconds of making it."""
    if made.rounds == "autoround":
        return rounded_by_autoround(bench, int(size), draw)
    start = time.process_time()
    model = as_shipped(bench, made.choices, draw)
    return model, time.process_time() - start


def run(bench: Bench, name: str, size: float, made: Made, draw: int, plays: Sequence[str]) -> None:
    """Apply a plan over a draw and measure it, unless that has been done."""
    results = Results(bench.results)
    lacking = results.lacking(made, draw, plays)
    if not lacking:
        return
    model, seconds = applied(bench, made, size, draw)
    stored = bench.bytes_of(made.choices)
    found = Applied(plan=name, size=size, draw=draw, key=made.key, bytes=stored, seconds=seconds)
    for text in lacking:
        found.nats[text], found.kl[text] = bench.measure(model, text)
    results.add(found)
    said = [f"{t} {mean(found.nats[t]):.4f} (KL {mean(found.kl[t]):.4f})" for t in lacking]
    print(f"{name} {size:g}, draw {draw}: {', '.join(said)}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ main


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("plans", nargs="*", metavar="PLAN", help="all but autoround unless named")
    parser.add_argument("--grid", choices=sorted(GRIDS), default="groups")
    parser.add_argument("--sizes", nargs="+", type=float, metavar="BITS")
    parser.add_argument("--draws", nargs="*", type=int, default=[0, 1, 2], metavar="DRAW")
    parser.add_argument("--plays", nargs="+", default=["hamlet", "cymbeline"], metavar="PLAY")
    parser.add_argument("--file", type=Path, metavar="PLANS.json")
    told = parser.parse_args(arguments)
    if unknown := sorted(set(told.plans) - set(PLANS)):
        parser.error(f"unknown plan {unknown[0]!r}; plans: {', '.join(PLANS)}")
    return told


def available(names: Sequence[str]) -> list[str]:
    """The plans whose makers are here; what is left out is said."""
    found = []
    for name in names:
        variable, package = NEEDS.get(name, ("", ""))
        if variable and variable not in os.environ:
            print(f"{name} is left out: set {variable} to a Python with {package}")
        else:
            found.append(name)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    told = asked(arguments)
    for variable in ("BENCH_SMOLLM2", "BENCH_TEXTS"):
        if variable not in os.environ:
            raise SystemExit(f"{variable} is not set; see the head of {Path(__file__).name}")
    torch.set_num_threads(1)
    bench = Bench(told.grid)
    sizes = told.sizes or bench.grid.sizes
    names = told.plans or [name for name in PLANS if name != "autoround"]
    if told.file is not None and not told.plans:
        names = []
    names = available(names)
    plans: dict[tuple[str, float], Made] = {}
    for size in sizes:
        for name in names:
            if (made := plan_of(bench, name, size)) is not None:
                plans[name, size] = made
                for draw in told.draws[:1]:
                    run(bench, name, size, made, draw, told.plays)
    if told.file is not None:
        plans |= plans_in(bench, told.file, sizes)
    for draw in told.draws:
        for (name, size), made in plans.items():
            run(bench, name, size, made, draw, told.plays)
    dense = {text: bench.dense_nats(text) for text in told.plays}
    said = ", ".join(f"{text} {math.exp(nats):.2f}" for text, nats in dense.items())
    print(f"dense perplexity: {said}")
    results = Results(bench.results)
    print(means(results, plans, dense, bench.room))
    print(differences(results, plans, told.plays))
    print(sayings(plans))


if __name__ == "__main__":
    main()
