"""Optional libraries, imported on first use, and every private name of torch, transformers and
compressed-tensors that curvprune uses.

A private name may change with any release. Each stands here behind a function that says what we
take it to do, and `tests/test_compat.py` fails where a release takes that away.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

# ------------------------------------------------------------------------------- Optional libraries


def import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "Hugging Face models need the extra: pip install 'curvprune[hf]'"
        ) from error
    return transformers


def import_pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ValueError("plots need the extra: pip install 'curvprune[plot]'") from error
    return matplotlib.pyplot


def versions() -> dict[str, str]:
    """Versions of the optional libraries that shape an artifact, where installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("transformers", "compressed-tensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars of libraries, which would break into ours; afterwards they show again.

    transformers, huggingface_hub, compressed-tensors and datasets all draw theirs with tqdm, some
    without a switch of their own: while this is on, every new tqdm of the process is disabled.
    """
    try:
        from tqdm import tqdm
    except ImportError:  # nor do the libraries have it, then
        yield
        return
    begin = tqdm.__init__

    def begin_disabled(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **{**named, "disable": True})

    tqdm.__init__ = begin_disabled
    try:
        yield
    finally:
        tqdm.__init__ = begin


# ---------------------------------------------------------------------------------- torch: products


def int8_linear(
    x: Float[Tensor, "rows in"], codes: Int8[Tensor, "out in"], scale: Float[Tensor, " out"]
) -> Float[Tensor, "rows out"]:
    """``x (codes · scale)ᵀ`` on the CPU without unpacking the codes."""
    return torch._weight_int8pack_mm(x, codes, scale)


def int8_product(a: Int8[Tensor, "n k"], b: Int8[Tensor, "k m"]) -> Int32[Tensor, "n m"]:
    """``a b`` of bytes, summed in 32-bit whole numbers."""
    return torch._int_mm(a, b)


def multiplies_bytes_fast() -> bool:
    """Whether the CPU has instructions that multiply bytes (VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


def multiplies_bfloat16_fast(device: str) -> bool:
    """Whether a kind of device (``"cpu"``, ``"cuda"``) has instructions that multiply bfloat16."""
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return device == "cuda" and torch.cuda.is_bf16_supported()


def times_written(tensor: Tensor) -> int:
    """How often a tensor was changed in place: the same tensor with the same number holds the same
    values."""
    return tensor._version


# -------------------------------------------------------------------------- torch: autograd's graph


def operation_of(node: Any) -> str:
    """What a node of autograd's graph is the backward pass of, such as ``"Addmm"``."""
    return node.name().split("::")[-1].rstrip("0123456789").removesuffix("Backward")


def normalises_by_batch(node: Any) -> bool:
    """Whether a BatchNorm's node took mean and variance from its batch, as in training."""
    return bool(node._saved_training)


@contextmanager
def hooks_kept(model: nn.Module) -> Iterator[None]:
    """Forward hooks that others put on modules and leave there, after an exception too, are taken
    off again."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, names in before.items():
            for name in [n for n in module._forward_hooks if n not in names]:
                del module._forward_hooks[name]


# -------------------------------------------------------------------- transformers: stacked experts


def is_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as stacked parameters, as transformers'
    ``use_experts_implementation`` marks them. Those names and layouts are what it relies on."""
    marks = ("_apply_gate", "has_gate", "has_bias", "is_transposed")
    return all(hasattr(module, mark) for mark in marks)


def activate_experts(module: Any, rows: Float[Tensor, "n wide"]) -> Float[Tensor, "n inner"]:
    """What an expert's second matrix multiplies, from the products of its first one."""
    return module._apply_gate(rows) if module.has_gate else module.act_fn(rows)


@contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Stacked experts run in a loop over experts (``"eager"``), which every dtype and derivative
    passes; the user's setting comes back."""
    owners = [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "config")]
    name = "_experts_implementation_internal"  # the public name would set nested configs as well
    configs: list[Any] = [owner.config for owner in owners]
    before = [(config, getattr(config, name)) for config in configs if hasattr(config, name)]
    try:
        for config, _ in before:
            setattr(config, name, "eager")
        yield
    finally:
        for config, implementation in reversed(before):
            setattr(config, name, implementation)


# ------------------------------------------------------------------ transformers: building, loading


def model_from_config(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model of a given class, all parameters of ``dtype``, its weights not read from anywhere."""
    model: nn.Module = kind._from_config(config, dtype=dtype)
    return model


def plain_config(config: Any) -> Any:
    """A config's copy that names neither a quantization nor where it was read from."""
    entries = copy.deepcopy(config).to_dict()
    for key in ("quantization_config", "_name_or_path"):
        entries.pop(key, None)
    return type(config).from_dict(entries)


def loads_without_linear_weights(kind: Any, config: Any) -> bool:
    """Whether a class initialises its modules where its Linear layers have no ``weight``.

    Packing takes it from them before transformers initialises what a file lacks. Some classes (T5,
    SigLIP) initialise the weights of their children by name, and fail. Tried on the meta device: no
    memory, no forward pass.
    """
    try:
        with torch.device("meta"):
            empty = kind(copy.deepcopy(config))
        for module in empty.modules():
            if isinstance(module, nn.Linear):
                del module.weight
        for module in empty.modules():
            empty._init_weights(module)
    except AttributeError:
        return False
    return True


def decompress_(model: Any) -> None:
    """Unpack a model that transformers read by compressed-tensors, and make it an ordinary one:
    dense weights, a config that calls nothing packed, no quantizer."""
    if hasattr(model, "ct_decompress_hook"):
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.offload import remove_dispatch

        ModelCompressor().decompress_model(model)
        # It leaves modules that send their inputs back to the device on which the file was read.
        remove_dispatch(model, onload_tensors=True)
    # The weights are dense from here on: a config that called them packed would be saved with them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None


# --------------------------------------------------------------------- transformers: the Trainer


def step_callback(on_step: Callable[[int, Any], None], on_end: Callable[[], None]) -> Any:
    """A ``TrainerCallback`` that calls ``on_step(step, optimizer)`` before the first and after
    every step, and ``on_end()`` on the main process when training ends."""
    base: Any = import_transformers().TrainerCallback

    class StepCallback(base):
        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            on_step(state.global_step, rest.get("optimizer"))

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            on_step(state.global_step, rest.get("optimizer"))

        def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.is_world_process_zero:
                on_end()

    return StepCallback()
