"""vLLM: does every folder that ``target: vllm`` accepts load, with the loss that transformers has?

Small random models, one for each class of `curvprune.targets.vllm_classes`, under every option that
the target offers. vLLM's interpreter is named by ``CURVPRUNE_VLLM_PYTHON``. See
benchmarks/engines.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import curvprune as cp
from curvprune.model import find_layers
from curvprune.targets import target_named

SAMPLES = Path(__file__).parent.parent / "tests" / "samples" / "vllm_layers.json"
SCRIPT = Path(__file__).with_name("vllm_losses.py")
OPTIONS = [
    cp.Quantize(bits=4, group_size=size, symmetric=symmetric)
    for size in (32, 64, 128, None)
    for symmetric in (True, False)
]
MOST = 0.002  # nats between the two
AT_ONCE = 12  # folders that one process of the engine loads


@dataclass(frozen=True, kw_only=True)
class Case:
    """A folder, and the loss that it has in transformers."""

    family: str
    option: str
    folder: Path
    loss: float
    packed: int = 0


def tiny(config: dict[str, object]) -> nn.Module:
    """A random model whose logits differ."""
    entries = dict(config)
    kind = str(entries.pop("model_type"))
    config_object = AutoConfig.for_model(kind, **entries)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_object, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


def items(count: int = 24, length: int = 48) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 256, (1, length), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, texts: Sequence[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(model(input_ids=t, labels=t).loss.item() for t in texts) / len(texts)


def accepted(model: nn.Module, option: cp.Quantize) -> list[str]:
    """The layers of a model that the target packs under an option, with those fused to them."""
    target = target_named("vllm")
    found = []
    for name, layer in find_layers(model).items():
        with suppress(ValueError):
            target.check(model, layer, option)
            found.append(name)
    return found


def write(family: str, model: nn.Module, option: cp.Quantize | None, out: Path) -> Case:
    """A compressed folder, or the dense one."""
    texts = items()
    folder = out / f"{family}-{option.key if option else 'dense'}"
    if option is None:
        model.save_pretrained(folder)
        return Case(family=family, option="dense", folder=folder, loss=loss_of(model, texts))
    names = accepted(model, option)
    data = [{"input_ids": t, "labels": t} for t in texts]
    settings = cp.Settings(target="vllm")
    result = cp.compress(model, data, options=[option], layers=names, settings=settings)
    result.save(folder)
    loss = loss_of(result.model, texts)
    packed = 0
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    for group in config.get("config_groups", {}).values():
        packed += len(group["targets"])
    return Case(family=family, option=option.key, folder=folder, loss=loss, packed=packed)


def losses(folders: Sequence[Path], texts: Sequence[torch.Tensor], dtype: str) -> Iterator[dict]:
    """What the engine says of each folder."""
    python = os.environ["CURVPRUNE_VLLM_PYTHON"]
    request = {"items": [t[0].tolist() for t in texts], "dtype": dtype}
    for start in range(0, len(folders), AT_ONCE):
        part = [str(folder) for folder in folders[start : start + AT_ONCE]]
        told = json.dumps({**request, "folders": part})
        done = subprocess.run(
            [python, str(SCRIPT)], input=told, capture_output=True, text=True, check=False
        )
        for line in done.stdout.splitlines():
            yield json.loads(line)
        if done.returncode:
            yield {"folder": "", "error": done.stderr[-2000:]}


def families(names: Sequence[str], out: Path, options: Sequence[cp.Quantize | None]) -> list[Case]:
    models = json.loads(SAMPLES.read_text())["models"]
    cases = []
    for name in names or list(models):
        for option in options:
            model = tiny(models[name]["config"])
            cases.append(write(name, model, option, out))
    return cases


def dtype_of(family: str) -> str:
    """The type with the least noise that vLLM's CPU kernels and the class have."""
    return "bfloat16" if family.startswith("gemma") else "float16"


def table(cases: Sequence[Case]) -> list[str]:
    """A Markdown table of both losses."""
    found = {}
    for dtype in ("float16", "bfloat16"):
        folders = [case.folder for case in cases if dtype_of(case.family) == dtype]
        for answer in losses(folders, items(), dtype):
            found[answer["folder"]] = answer
    lines = ["| family | option | layers packed | transformers | vLLM | difference |"]
    lines.append("|---|---|---|---|---|---|")
    for case in cases:
        answer = found.get(str(case.folder), {"error": "no answer"})
        row = f"| {case.family} | {case.option} | {case.packed} | {case.loss:.4f} |"
        if "error" in answer:
            lines.append(f"{row} refused: {answer['error'][:300]!r} | |")
            continue
        parts = [value for item in answer["logprobs"] for value in item]
        loss = -sum(parts) / len(parts)
        mark = "" if abs(loss - case.loss) <= MOST else " **too far**"
        lines.append(f"{row} {loss:.4f} | {loss - case.loss:+.4f}{mark} |")
    return lines


def run(names: Sequence[str], out: Path, options: Sequence[str]) -> list[str]:
    """The section of the report."""
    warnings.simplefilter("ignore")
    wanted: list[cp.Quantize | None] = [None, *OPTIONS]
    if options:
        wanted = [o for o in wanted if (o.key if o else "dense") in options]
    return table(families(names, out, wanted))
