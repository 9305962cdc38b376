"""Curvature over several processes, each with its share of the data, is that of one."""

from __future__ import annotations

import pytest
import torch

import curvprune as cp
from curvprune import distributed
from tests.networks import convnet, mlp, together, vectors

ASKED = {
    "hessian": ["trace", "diagonal", "eigenvalues", "density"],
    "fisher": ["trace", "diagonal"],
}


def run_as(rank: int, world: int, address: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    results.put((figures(), list(distributed.my_share(range(5)))))
    torch.distributed.destroy_process_group()


def figures() -> dict[str, float]:
    model = convnet().float()
    ((x, y),) = together(vectors(shape=(1, 6, 6)))
    data = [(x[i : i + 3].float(), y[i : i + 3]) for i in range(0, 7, 3)]
    found: dict[str, float] = {}
    for matrix, quantities in ASKED.items():
        analysis = cp.analyze(model, data, matrix=matrix, quantities=quantities)
        for name, c in analysis.layers.items():
            found[f"{matrix} trace {name}"] = c.trace.value
            found[f"{matrix} diagonal {name}"] = float(c.diagonal.norm())
            if c.eigenpairs is not None:
                found[f"{matrix} top {name}"] = float(c.eigenpairs.values[0])
        if analysis.diagnosis is not None:
            found["top"] = analysis.diagnosis.lambda_max
            found["trace"] = analysis.model.trace.value
            found["gradient"] = analysis.model.gradient_norm
    smooth = mlp().float()
    probed = cp.analyze(smooth, [(x.float(), y) for x, y in vectors()], quantities=["trace"])
    return found | {f"probed {n}": c.trace.value for n, c in probed.layers.items()}


def test_two_processes_give_the_numbers_of_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path}/rendezvous"
    both = [context.Process(target=run_as, args=(rank, 2, address, results)) for rank in range(2)]
    for process in both:
        process.start()
    alone = figures()  # while they run
    found = [results.get(timeout=120) for _ in both]
    for process in both:
        process.join()
    (_, share), (_, rest) = found
    assert sorted(share + rest) == list(range(5))  # split, not repeated
    for of_two, _ in found:
        assert of_two == pytest.approx(alone, rel=1e-6, abs=1e-9)
