"""Artifacts as ONNX files in ONNX Runtime: how far from torch, and how fast beside float32.

    python benchmarks/engine_onnx.py --models mlp vit resnet
    python benchmarks/engine_onnx.py --models smol --smol FOLDER --text FILE
    python benchmarks/engine_onnx.py --models minilm --minilm FOLDER

Every model is rounded to 4 bits in groups of 32 (to nearest: neither the difference to torch nor
speed depends on the codes), written with its codes, and once more with dense float32 weights. The
files run in turn, one thread each; the best of all turns counts. ``difference`` is the norm of what
ONNX Runtime gives less what torch gives, over the latter's norm; of SmolLM2 the difference of the
loss in nats. int8 is ``accuracy_level=4``: inputs rounded to eight bits, no longer exact.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import curvprune as cp
from curvprune.artifact import write_model
from curvprune.compression import Moments, solve_layer
from curvprune.model import find_layers
from curvprune.options import Quantize

GRID = Quantize(bits=4, group_size=32)
TURNS = 12
Feeds = dict[str, np.ndarray]


def rounded(model: nn.Module, folder: Path) -> Path:
    """An artifact of the model with its Linear layers and its embeddings to nearest in 4 bits."""
    solved = {}
    for name, layer in find_layers(model).items():
        tied = layer.kind == "embedding" and len(layer.aliases) > 0
        if layer.kind == "linear" or tied:
            eye = torch.eye(layer.shape[1])[None]
            solved[name] = solve_layer(layer, [GRID], Moments(eye))[0]
    write_model(folder, model, solved, {}, portable=False)
    return folder


def files(net: nn.Module, scratch: Path, **own: Any) -> dict[str, Path]:
    """The same model dense, with codes, and with codes and inputs of eight bits. ``own``: the
    arguments of `export_onnx` for a module of one's own."""
    folder, dense = rounded(net, scratch / "rounded"), scratch / "dense"
    write_model(dense, reloaded(folder, **own), {}, {}, portable=False)
    return {
        "float32": cp.export_onnx(dense, scratch / "float32.onnx", **own),
        "codes": cp.export_onnx(folder, scratch / "codes.onnx", **own),
        "int8": cp.export_onnx(folder, scratch / "int8.onnx", accuracy_level=4, **own),
    }


def reloaded(folder: Path, *, model: nn.Module | None = None, **_: Any) -> nn.Module:
    return cp.load(folder, model=copy.deepcopy(model))


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of the fastest of some turns, in each of which all run once."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(TURNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def far(got: np.ndarray, want: torch.Tensor) -> float:
    expected = want.numpy()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def row(name: str, work: str, size: str, differences: str, seconds: dict[str, float]) -> str:
    ratios = [f"{seconds['float32'] / seconds[one]:.2f}" for one in ("codes", "int8")]
    return f"| {name} | {work} | {size} | {differences} | {ratios[0]} × | {ratios[1]} × |"


def sizes(found: dict[str, Path]) -> str:
    return " of ".join(f"{found[one].stat().st_size / 1e6:.1f}" for one in ("codes", "float32"))


@torch.no_grad()
def plain_rows(
    name: str, net: nn.Module, works: dict[str, Feeds], scratch: Path, **own: Any
) -> list[str]:
    """Rows of a model that gives the same for the same inputs."""
    found = files(net, scratch, **own)
    loaded = reloaded(scratch / "rounded", **own)
    running = {k: session(path) for k, path in found.items()}
    rows = []
    for work, feeds in works.items():
        tensors = {k: torch.from_numpy(v) for k, v in feeds.items()}
        want = loaded(tensors.pop("input")) if "input" in feeds else loaded(**tensors)[0]
        off = {k: far(running[k].run(None, feeds)[0], want) for k in ("codes", "int8")}
        calls = {k: partial(s.run, None, feeds) for k, s in running.items()}
        told = f"{off['codes']:.0e} / {off['int8']:.0e}"
        rows.append(row(name, work, sizes(found), told, interleaved(calls)))
    return rows


def mlp(scratch: Path) -> list[str]:
    """Nothing but Linear layers, more than a cache holds."""
    torch.manual_seed(0)
    parts = [part for _ in range(6) for part in (nn.Linear(2048, 2048), nn.ReLU())]
    model = nn.Sequential(*parts).eval()
    works = {}
    for rows in (1, 16):
        x = np.random.default_rng(0).standard_normal((rows, 2048), dtype=np.float32)
        works[f"{rows} × 2048"] = {"input": x}
    own = {"model": copy.deepcopy(model), "inputs": torch.zeros(2, 2048)}
    return plain_rows("MLP", model, works, scratch, **own)


def vit(scratch: Path) -> list[str]:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536
    )
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    model = ViTForImageClassification(config).eval()
    return plain_rows("ViT", model, {"an image": {"pixel_values": images}}, scratch)


def resnet(scratch: Path) -> list[str]:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    model = ResNetForImageClassification(config).eval()
    return plain_rows("ResNet-18", model, {"an image": {"pixel_values": images}}, scratch)


def minilm(scratch: Path, folder: Path) -> list[str]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    works = {}
    for items, length in ((1, 1), (1, 16), (8, 64)):
        tokens = np.random.default_rng(0).integers(1000, 20_000, (items, length))
        works[f"{items} × {length} tokens"] = {
            "input_ids": tokens,
            "attention_mask": np.ones_like(tokens),
            "token_type_ids": np.zeros_like(tokens),
        }
    return plain_rows("MiniLM", model, works, scratch)


# ------------------------------------------------------------------------------------ with a cache


class Decoder:
    """A causal language model in ONNX Runtime, and the keys and values of what it has read."""

    def __init__(self, path: Path) -> None:
        self.session = session(path)
        self.outputs = [one.name for one in self.session.get_outputs()]
        self.past: Feeds = {}
        for one in self.session.get_inputs():
            if one.name.startswith("past_key_values."):
                shape = (1, one.shape[1], 0, one.shape[3])
                self.past[one.name] = np.zeros(shape, dtype=np.float32)
        self.length = 0

    def __call__(self, tokens: np.ndarray, *, keep: bool = True) -> np.ndarray:
        """Logits ``(1, tokens, vocabulary)`` of the next tokens."""
        length = self.length + tokens.shape[1]
        feeds = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, length), dtype=np.int64),
            "position_ids": np.arange(self.length, length)[None],
            **self.past,
        }
        given = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        if keep:
            for name in self.past:
                self.past[name] = given[name.replace("past_key_values", "present")]
            self.length = length
        return given["logits"]


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[0, :-1].double(), tokens[0, 1:]))


@torch.no_grad()
def smol(scratch: Path, folder: Path, text: Path) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = text.read_text(errors="replace")[20_000:24_000]
    tokens = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt")["input_ids"]
    tokens = tokens[:, :512]
    found = files(model, scratch)
    want = loss_of(cp.load(scratch / "rounded")(tokens).logits, tokens)
    # 1. The loss, the first half at once and the others one by one.
    off = {}
    for name in ("codes", "int8"):
        decoder, half = Decoder(found[name]), tokens.shape[1] // 2
        logits = [decoder(tokens[:, :half].numpy())]
        logits += [decoder(tokens[:, t : t + 1].numpy()) for t in range(half, tokens.shape[1])]
        got = loss_of(torch.from_numpy(np.concatenate(logits, axis=1)), tokens)
        off[name] = f"{got - want:+.1e}"
    told = f"{off['codes']} / {off['int8']} nats"
    # 2. Speed, of a prompt and of a token after it.
    decoders = {name: Decoder(path) for name, path in found.items()}
    prompt, token = tokens[:, :128].numpy(), tokens[:, 128:129].numpy()
    first = interleaved({k: partial(d, prompt, keep=False) for k, d in decoders.items()})
    for decoder in decoders.values():
        decoder(prompt)
    later = interleaved({k: partial(d, token, keep=False) for k, d in decoders.items()})
    name, size = "SmolLM2-135M", sizes(found)
    speed = f"a token after 128 ({1 / later['codes']:.0f} a second)"
    return [
        row(name, "128 tokens at once", size, told, first),
        row(name, speed, size, told, later),
    ]


def table(models: list[str], places: dict[str, Path]) -> list[str]:
    """Lines of a Markdown table. ``places``: ``smol``, ``text`` and ``minilm``."""
    torch.set_num_threads(1)
    lines = [
        "| model | work | MB, of float32 | difference, exact / int8 | speed, exact | int8 |",
        "|---|---|---|---|---|---|",
    ]
    for name in models:
        with tempfile.TemporaryDirectory() as scratch:
            if name == "smol":
                lines += smol(Path(scratch), places["smol"], places["text"])
            elif name == "minilm":
                lines += minilm(Path(scratch), places["minilm"])
            else:
                lines += {"mlp": mlp, "vit": vit, "resnet": resnet}[name](Path(scratch))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mlp", "vit", "resnet"])
    for place in ("smol", "text", "minilm"):
        parser.add_argument(f"--{place}", type=Path)
    told = parser.parse_args()
    places = {k: getattr(told, k) for k in ("smol", "text", "minilm")}
    print("\n".join(table(told.models, places)))


if __name__ == "__main__":
    main()
