"""How a model is run where it is differentiated: the same function, in a form that autograd takes,
once or twice. Settings of the user's come back.

    off the way     compilation, checkpoints, TensorFloat-32, recurrent kernels of cuDNN
    flags           of embeddings that change the gradient or its layout, not the function
    instead         a hard sigmoid, a bag of embeddings: the same in other functions
    twice           attention as products, experts in a loop
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvprune.compat import (
    experts_one_by_one,
    full_float32,
    is_custom_function,
    operation_of,
    running_eagerly,
)
from curvprune.curvature.determinism import first_items
from curvprune.model import Batch, Loss, evaluating


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Runs the model so that autograd gives the gradients of its function, for any parameter."""
    with ExitStack() as stack:
        stack.enter_context(full_float32())
        stack.enter_context(running_eagerly())
        # cuDNN has a backward pass of recurrent layers in training mode only.
        if torch.backends.cudnn.enabled and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_Instead())
        yield


@contextmanager
def double_backward(model: nn.Module) -> Iterator[None]:
    """Runs the model in the form that can be differentiated twice.

    Fused attention has no double backward: takes the math path. Nor have transformers' grouped
    products of experts one for several vectors or in float64: takes the loop over experts.
    """
    with differentiable(model), experts_one_by_one(model), sdpa_kernel(SDPBackend.MATH):
        yield


SAME = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative; 5e-2 in half precision


@torch.no_grad()
def check_same_twice(model: nn.Module, objective: Loss, batch: Batch) -> None:
    """Raises ``ValueError`` for a model that gives other outputs where it can be differentiated
    twice: products would be of another function. Two forward passes of one item."""
    item = first_items(batch, 1)
    with evaluating(model):
        usual = objective.outputs(model, item)
        with double_backward(model):
            ours = objective.outputs(model, item)
    largest = float(usual.abs().nan_to_num().max()) if usual.numel() else 0.0
    apart = torch.zeros(1)
    if usual.shape == ours.shape:
        apart = (usual - ours).abs().nan_to_num()
    allowed = SAME.get(usual.dtype, 5e-2) * largest
    if usual.shape == ours.shape and not bool((apart > allowed).any()):
        return
    share = float(apart.max()) / max(largest, 1e-30) if usual.shape == ours.shape else 1.0
    raise ValueError(
        f"{type(model).__name__} gives other outputs (by {share:.1%})"
        " with attention as plain products and experts in a loop, which is what can be "
        "differentiated twice; pass matrix='fisher', which takes the model as it runs"
    )


class _Instead(TorchFunctionMode):
    """Functions whose derivatives are missing or are not those of the function, by others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.hardtanh(input + 3, 0, 6) / 6


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    **flags: bool,
) -> Tensor:
    """Without ``sparse`` and ``scale_grad_by_freq``, which are about steps of training, and without
    a write to the weight."""
    rows = F.embedding(input, weight, padding_idx)
    if max_norm is None:
        return rows
    with torch.no_grad():
        # Rows that are too long are cut; their derivative is that of the rows cut before.
        length = torch.linalg.vector_norm(rows, norm_type, dim=-1, keepdim=True)
        factor = torch.where(length > max_norm, max_norm / (length + 1e-7), torch.ones_like(length))
        shift = rows * (factor - 1)
    return rows + shift


def _embedding_bag(input: Tensor, weight: Tensor, *others: Any, **named: Any) -> Tensor:
    """A bag for each row of ``input``; other forms as they are."""
    names = ["offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"]
    names += ["per_sample_weights", "include_last_offset", "padding_idx"]
    given = dict(zip(names, others, strict=False)) | named
    mode, shares, pad = (given.get(n) for n in ("mode", "per_sample_weights", "padding_idx"))
    # torch itself has the two tensors in either order.
    plain = not input.is_floating_point() and input.ndim == 2 and given.get("offsets") is None
    if not plain or (mode == "max" and pad is not None):
        return F.embedding_bag(input, weight, *others, **named)
    rows = _embedding(input, weight, pad, given.get("max_norm"), given.get("norm_type", 2.0))
    if mode == "max":
        return rows.max(1).values
    kept = torch.ones_like(rows[..., :1])
    if pad is not None:
        kept = (input != pad).unsqueeze(-1).to(rows.dtype)
    if shares is not None:
        kept = kept * shares.unsqueeze(-1)
    total = (rows * kept).sum(1)
    if mode == "sum":
        return total
    return total / kept.sum(1).clamp_min(1)


_INSTEAD: dict[Any, Any] = {
    F.hardsigmoid: _hardsigmoid,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}


# ------------------------------------------------------------------- what has no second derivative


_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")
_ONCE = "once_differentiable"


def why_not_twice(
    error: RuntimeError, model: nn.Module, objective: Loss, batch: Batch
) -> str | None:
    """What to tell of an error of a second derivative: which function of which module has none.
    ``None`` for any other error. Cost: a forward pass of one item."""
    text = str(error)
    missing = _MISSING.search(text)
    if missing is None and _ONCE not in text:
        return None
    name = None if missing is None else missing.group(1).removesuffix("_backward").strip("_")
    where = _module_with(name, model, objective, batch)
    what = f"{name or 'a torch.autograd.Function'}{where}"
    return (
        f"{what} cannot be differentiated twice; take matrix='fisher' (or curvprune.fisher), which "
        "needs first derivatives only, or write the function in others that torch can "
        "differentiate twice"
    )


def _module_with(name: str | None, model: nn.Module, objective: Loss, batch: Batch) -> str:
    """Which module's part of autograd's graph has the function, in words."""
    seen: set[Any] = set()
    found: list[str] = []
    names = {module: n for n, module in model.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        # What is new in the graph came from this module: modules inside it have ended before.
        left = [t.grad_fn for t in _tensors(output)]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            left += [n for n, _ in node.next_functions]
            if _is_called(node, name) and not found:
                found.append(f" in module {names[module] or type(module).__name__}")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        with evaluating(model), torch.enable_grad(), double_backward(model):
            objective.outputs(model, first_items(batch, 1))
    except Exception:  # what is told is another error
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _is_called(node: Any, name: str | None) -> bool:
    if name is None:
        return is_custom_function(node)
    return operation_of(node).lower() == name.replace("_", "").lower()


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of what a module returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        return []
    found = []
    for part in output:
        found += _tensors(part)
    return found
