"""Whether a model is a function of its parameters: deterministic in evaluation mode; in training
mode with one mask of dropout for each mini-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvprune.model import Batch, Loss, evaluating, take

MODES = ("eval", "train")


def first_items(batch: Batch, count: int) -> Batch:
    """The first items of a batch."""
    return take(batch, slice(count))


@contextmanager
def training(model: nn.Module, seed: int) -> Iterator[None]:
    """Training mode, in which every random number follows from the seed.

    Dropout knows no generator but the global one: it is seeded here and given back as it was, like
    the modules' modes, also after an error. Statistics that layers would keep of the batch are the
    caller's to protect.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            model.train()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers, which a pass in training mode may overwrite."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def is_random(model: nn.Module, objective: Loss, batch: Batch) -> bool:
    """Whether the model's outputs in training mode depend on the seed. Two forward passes."""
    found = []
    for seed in (0, 1):
        with torch.no_grad(), training(model, seed):
            forward = _Outputs(model, objective)
            own = {f"model.{name}": buffer for name, buffer in buffers_of(model).items()}
            found.append(torch.func.functional_call(forward, own, (batch,)))
    return not _close(*found)


class _Outputs(nn.Module):
    """A model's outputs as a module, for ``torch.func.functional_call``."""

    def __init__(self, model: nn.Module, objective: Loss) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.outputs(self.model, batch)


def check_deterministic(model: nn.Module, objective: Loss, batch: Batch) -> None:
    """Two forward passes of one item must agree. Raises ``ValueError`` naming the module that makes
    them differ."""
    item = first_items(batch, 1)
    first, ours = _outputs_of_modules(model, objective, item)
    second, theirs = _outputs_of_modules(model, objective, item)
    if _close(first, second):
        return
    where = "no module by itself, so a function between"
    for name, output in ours.items():  # in the order of the calls
        if name in theirs and not _close(output, theirs[name]):
            where = f"module {name!r} is the first that differs"
            break
    raise ValueError(
        f"{type(model).__name__} gives two different outputs for the same item in evaluation "
        f"mode ({where}): curvature of a random function means nothing; switch it off "
        "(functional dropout needs training=self.training)"
    )


def _outputs_of_modules(
    model: nn.Module, objective: Loss, item: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's output, and the first one of every module without children."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and name:
                seen.setdefault(name, output.detach().clone())

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [m.register_forward_hook(see(n)) for n, m in leaves]
    try:
        # Evaluation mode: dropout and batch statistics are no reason to refuse a model.
        with torch.no_grad(), evaluating(model):
            return objective.outputs(model, item), seen
    finally:
        for handle in handles:
            handle.remove()


def _close(a: Tensor, b: Tensor) -> bool:
    # Looser than rounding: kernels may add up in another order from one call to the next.
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-5, equal_nan=True
    )
