"""The plain module in what a user hands over: out of its wrappers, with weights that can be read,
differentiated and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import signature
from itertools import chain, pairwise
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from curvprune.compat import inside_of_compiled, running_eagerly

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Modules whose weight may be a layer of ours.
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.EmbeddingBag)
P = ParamSpec("P")
R = TypeVar("R")


def takes_models(
    *names: str, rewritten: bool = False, lasting: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A verb that sees plain modules where the user passes wrapped ones.

    Args:
        names: the verb's arguments that are models.
        rewritten: the verb changes weights and stores the model.
        lasting: what the verb returns goes on using the model.

    While it runs, compiled modules run as they are written, activations are kept where they would
    be computed again, and gradients can be had under ``torch.no_grad`` and
    ``torch.inference_mode``. Raises ``ValueError`` as `plain_model` does.
    """

    def decorated(verb: Callable[P, R]) -> Callable[P, R]:
        order = list(signature(verb).parameters)

        @wraps(verb)
        def called(*args: P.args, **named: P.kwargs) -> R:
            # 1. The arguments by name, as far as their names are known.
            given: dict[str, object] = dict(zip(order, args, strict=False))
            rest, told = args[len(given) :], {**named}
            with ExitStack() as stack:
                for context in (
                    running_eagerly(),
                    torch.inference_mode(False),
                    torch.enable_grad(),
                ):
                    stack.enter_context(context)
                # 2. What is no model is for the verb to refuse.
                for held in (given, told):
                    for name in names:
                        wrapped = held.get(name)
                        if isinstance(wrapped, nn.Module):
                            model = plain_model(wrapped, name=name, rewritten=rewritten)
                            if not lasting:
                                stack.enter_context(tied_by_memory(model))
                            held[name] = model
                # 3. The verb itself.
                whole: Callable[..., R] = verb
                return whole(*given.values(), *rest, **told)

        return called

    return decorated


def plain_model(model: nn.Module, *, name: str = "model", rewritten: bool = False) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Args:
        name: what the caller calls it.
        rewritten: its weights are to be changed, and the model to be stored.

    Cost: no tensor is read. Raises ``ValueError`` saying what to pass instead for models that are
    sharded, offloaded, scripted, already quantized or not initialised, and, where it is to be
    rewritten, for one with adapters.
    """
    model = _unwrapped(model)
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{name} is TorchScript ({kind}), which has no layers that can be changed; pass the "
            "Python module that it was made of"
        )
    _check_kinds(model, name, rewritten=rewritten)
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(
            f"{name}: {kind} has no parameters; a model that was quantized before, or one that is "
            "a function, has none: pass the float model"
        )
    for key, tensor in chain(parameters.items(), model.named_buffers()):
        _check_readable(model, key, tensor, name)
    for key, tensor in parameters.items():
        _check_parameter(key, tensor, name)
    for prefix, module in model.named_modules():
        if isinstance(module, WEIGHTED) and isinstance(module.weight, nn.Parameter):
            _check_weight(f"{prefix}.weight" if prefix else "weight", module.weight, name)
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Wrappers may stand in one another."""
    while True:
        inner = inside_of_compiled(model)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _check_kinds(model: nn.Module, name: str, *, rewritten: bool) -> None:
    """Modules that hold their weights in a way of their own."""
    for key, module in model.named_modules():
        kind = type(module)
        bases = [base.__name__ for base in kind.__mro__]
        where = f"{name}.{key}" if key else name
        if "FullyShardedDataParallel" in bases or "FSDPModule" in bases:
            raise ValueError(
                f"{where} is sharded by FSDP ({kind.__name__}); gather its full state dict and "
                "load that into the plain module"
            )
        if rewritten and kind.__module__.startswith("peft.tuners"):
            raise ValueError(
                f"{where} is an adapter ({kind.__name__}), which would be stored apart from the "
                "weight that it changes; merge it first: model = model.merge_and_unload()"
            )


def _check_readable(model: nn.Module, key: str, tensor: Tensor, name: str) -> None:
    """Whether a parameter or buffer holds numbers at all."""
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise ValueError(
            f"{name}: {key} has no shape yet (a lazy module); run the model on one batch first"
        )
    if tensor.device.type != "meta":
        return
    remedy = "fill it first, for example by load_state_dict(..., assign=True)"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        remedy = (
            "its weights are offloaded by accelerate; load the model whole, without device_map or "
            "offloading"
        )
    raise ValueError(f"{name}: {key} is on the meta device and holds no numbers; {remedy}")


def _check_parameter(key: str, tensor: Tensor, name: str) -> None:
    """Whether a parameter is all there, and can have a gradient."""
    if type(tensor.data).__name__ == "DTensor":
        raise ValueError(
            f"{name}: {key} is distributed (a DTensor); gather it (.full_tensor()) into a plain "
            "module first"
        )
    if tensor.is_inference():
        raise ValueError(
            f"{name}: {key} was made in torch.inference_mode and has no gradient; pass "
            "copy.deepcopy(model), or build the model outside of it"
        )


def _check_weight(key: str, tensor: Tensor, name: str) -> None:
    """Whether a layer's weight is an ordinary matrix of numbers."""
    kind = type(tensor.data)
    if kind is not Tensor or not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            f"{name}: {key} is a {kind.__name__} of {tensor.dtype}: it was quantized before; pass "
            "the model as it was then"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: {key} is sparse ({tensor.layout}); pass it dense: .to_dense()")
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name}: {key} is {tensor.dtype}; expected float16, bfloat16, float32 or float64: "
            "convert the model, for example by model.float()"
        )


# ----------------------------------------------------------------------- two names of one memory


@contextmanager
def tied_by_memory(model: nn.Module) -> Iterator[None]:
    """Parameters that are the same memory are one Parameter here; afterwards they are two again.

    Written in place, both change; as two they would be compressed one after the other, and a copy
    of the model would have them apart. Raises ``ValueError`` for those that overlap in part.
    """
    owners: dict[int, list[tuple[nn.Module, str, nn.Parameter, str]]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{leaf}" if prefix else leaf
            place = (module, leaf, parameter, full)
            owners.setdefault(parameter.untyped_storage().data_ptr(), []).append(place)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for places in owners.values():
            first: dict[object, nn.Parameter] = {}
            for module, leaf, parameter, _ in places:
                same = (parameter.storage_offset(), parameter.shape, parameter.stride())
                kept = first.setdefault(same, parameter)
                if kept is not parameter and parameter.numel():
                    replaced.append((module, leaf, parameter))
                    setattr(module, leaf, kept)
            if len(first) > 1:
                _check_apart({id(p): (full, p) for _, _, p, full in places})
        yield
    finally:
        for module, leaf, parameter in reversed(replaced):
            setattr(module, leaf, parameter)


def _check_apart(places: dict[int, tuple[str, nn.Parameter]]) -> None:
    """Parameters in one storage must not reach into each other."""
    spans = []
    for full, parameter in places.values():
        if parameter.numel():
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            last = sum((size - 1) * step for size, step in steps)
            start = parameter.storage_offset()
            spans.append((start, start + last, full, parameter))
    spans.sort(key=lambda span: span[:2])
    for (start, end, full, one), (later, stop, other, two) in pairwise(spans):
        same = (start, end) == (later, stop) and one.shape == two.shape
        if later <= end and not same:
            raise ValueError(
                f"parameters {full} and {other} share a part of their memory, so that a change of "
                "one changes the other; give each its own: nn.Parameter(weight.clone())"
            )
