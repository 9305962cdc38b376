"""Optional libraries, imported on first use, and every private name of torch, transformers and
compressed-tensors that curvprune uses.

A private name may change with any release. Each stands here behind a function that says what we
take it to do, and `tests/test_compat.py` fails where a release takes that away.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
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


INT4_GROUPS = (256, 128, 64, 32)  # inputs a group, of torch's 4-bit kernel
INT4_ROWS = 16  # outputs come in multiples of it


def int4_packed(codes: Int8[Tensor, "out in"]) -> Tensor:
    """Codes from −8 to 7, two a byte, in the order that the processor's 4-bit kernel reads.

    Blocks of rows, of which each holds column after column.
    """
    unsigned = codes.to(torch.int32) + 8
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned.contiguous(), 1)


def int4_linear(
    x: Float[Tensor, "rows in"],
    packed: Tensor,
    group_size: int,
    scale_and_zero: Float[Tensor, "groups out 2"],
) -> Float[Tensor, "rows out"]:
    """``x (codes · scale + zero)ᵀ`` in bfloat16 on the CPU, from the codes; it has no gradient."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scale_and_zero)


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


# ------------------------------------------------------------------------- torch: float32 products


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 are float32's, not TensorFloat-32's or bfloat16's; the settings come
    back, also after an exception.

    TensorFloat-32 keeps 11 bits, which moves curvature products by 2 to 3 thousandths. torch has
    two kinds of settings for it and refuses to read the older one where both were set to different
    things: then the newer one alone is used.
    """
    older, newer = _older_precisions(), _newer_precisions()
    # 1. Both off, as far as they can be read: what a module reads then is the truth.
    off: dict[str, bool | str] = {"cudnn": False, "cublas": False, "matmul": "highest"}
    _set_older({name: off[name] for name in older})
    _set_newer(["ieee"] * len(newer))
    try:
        yield
    finally:
        # 2. The older one first: setting it writes to the newer one.
        _set_older(older)
        _set_newer(newer)


def float32_is_coarse() -> bool:
    """Whether settings let float32 be multiplied in less than float32."""
    found = _older_precisions()
    if "matmul" in found:
        return found["matmul"] != "highest"
    return any(value not in ("ieee", "none") for value in _newer_precisions())


def _older_precisions() -> dict[str, bool | str]:
    """What can be read of the settings that torch has had since 1.7."""
    readers: dict[str, Callable[[], bool | str]] = {
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
        "cublas": lambda: torch.backends.cuda.matmul.allow_tf32,
        "matmul": torch.get_float32_matmul_precision,
    }
    found: dict[str, bool | str] = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except RuntimeError:  # it was set in both ways
            continue
    return found


def _set_older(values: dict[str, bool | str]) -> None:
    if "cudnn" in values:
        torch.backends.cudnn.allow_tf32 = bool(values["cudnn"])
    if "cublas" in values:
        torch.backends.cuda.matmul.allow_tf32 = bool(values["cublas"])
    if "matmul" in values:
        torch.set_float32_matmul_precision(str(values["matmul"]))


def _float32_products() -> list[Any]:
    """What has a setting ``fp32_precision`` of its own, since torch 2.9."""
    backends: Any = torch.backends
    parts = [
        backends.cuda.matmul,
        getattr(backends.cudnn, "conv", None),
        getattr(backends.cudnn, "rnn", None),
        getattr(backends.mkldnn, "matmul", None),
        getattr(backends.mkldnn, "conv", None),
        getattr(backends.mkldnn, "rnn", None),
    ]
    found = []
    for part in parts:
        try:
            if hasattr(part, "fp32_precision"):
                found.append(part)
        except AssertionError:  # how torch 2.6 says that a name of cuda.matmul is unknown
            continue
    return found


def _newer_precisions() -> list[str]:
    return [part.fp32_precision for part in _float32_products()]


def _set_newer(values: list[str]) -> None:
    for part, value in zip(_float32_products(), values, strict=True):
        part.fp32_precision = value


# ------------------------------------------------------------- torch: compiling and checkpointing


def inside_of_compiled(module: nn.Module) -> nn.Module | None:
    """What ``torch.compile`` made a module of; ``None`` for any other."""
    if type(module).__name__ != "OptimizedModule":
        return None
    inner: Any = module._orig_mod
    return inner


@contextmanager
def running_eagerly() -> Iterator[None]:
    """Compiled modules run as they are written, where hooks see every layer.

    Checkpointed parts keep their activations: hooks would see the second forward pass, which comes
    in the middle of a backward one, as well.
    """
    with without_checkpointing():
        # Nothing is compiled where the compiler was never imported, which takes seconds.
        if "torch._dynamo" not in sys.modules:
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """``torch.utils.checkpoint.checkpoint`` calls its function and does nothing else. All callers
    come through that module, whatever they have imported of it."""
    from torch.utils import checkpoint as module

    names = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    before = [(name, getattr(module, name)) for name in names]
    try:
        for (name, _), plain in zip(before, (_Called, _nothing_around), strict=True):
            setattr(module, name, plain)
        yield
    finally:
        for name, original in before:
            setattr(module, name, original)


class _Called:
    """In the place of the autograd function of a reentrant checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *arguments: Any) -> Any:
        return function(*arguments)


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    """In the place of what is done before and after the function of a checkpoint."""
    yield


# ------------------------------------------------------------------------ torch: recurrent modules


def keep_unflattened_(module: nn.RNNBase) -> None:
    """Some of the module's weights are to be empty: cuDNN must not lay them out in one piece, which
    moving the module to a GPU would do."""
    module.flatten_parameters = _leave  # type: ignore[method-assign]


def _leave() -> None:
    pass


def forget_weights_(module: nn.RNNBase) -> None:
    """Let go of weights that the module ran with in place of its own, which it would keep in memory
    until it runs again."""
    module._init_flat_weights()


# -------------------------------------------------------------------------- torch: autograd's graph


def operation_of(node: Any) -> str:
    """What a node of autograd's graph is the backward pass of, such as ``"Addmm"``."""
    return node.name().split("::")[-1].rstrip("0123456789").removesuffix("Backward")


def normalises_by_batch(node: Any) -> bool:
    """Whether a BatchNorm's node took mean and variance from its batch, as in training."""
    return bool(node._saved_training)


def is_custom_function(node: Any) -> bool:
    """Whether a node is the backward pass of a `torch.autograd.Function` written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


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


def config_of(kind: Any, entries: Mapping[str, object]) -> Any:
    """The config that a class makes of the entries of its ``config.json``."""
    return kind.config_class.from_dict(_with_numbers(entries))


def _with_numbers(value: Any) -> Any:
    """JSON's values with the numbers that JSON does not have, as transformers writes them:
    ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_numbers(one) for key, one in value.items()}
    return [_with_numbers(one) for one in value] if isinstance(value, list) else value


def read_by_transformers(
    kind: Any, config: Mapping[str, object], tensors: Mapping[str, Tensor], *, empty: bool
) -> tuple[Any, list[str]]:
    """The model that ``from_pretrained`` makes of a folder with this config and these tensors, and
    what does not fit: one line for each kind, naming a tensor.

    Args:
        kind: the class.
        config: the entries of ``config.json``.
        tensors: what lies in the weights file, on the meta device if ``empty``.
        empty: read no numbers: names, shapes and types alone, without memory.
    """
    read = config_of(kind, config)
    placed: dict[str, object] = {"device_map": {"": "meta"}} if empty else {}
    # What a file lacks is drawn at random, which shall not move anybody's generator.
    with quiet_libraries(), _quiet_logs(), torch.random.fork_rng(devices=[]):
        model, told = kind.from_pretrained(
            None,
            config=read,
            state_dict=dict(tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told with their names, and not raised without
            local_files_only=True,
            **placed,
        )
    found = []
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        names = []
        for entry in told.get(problem) or ():
            names.append(entry[0] if isinstance(entry, tuple) else str(entry))
        names.sort()
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{problem.replace('_', ' ')}: {names[0]}{more}")
    return model, found


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """transformers says nothing below an error for a while: of a trial that may fail."""
    logging = import_transformers().utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def initialized_by(model: nn.Module) -> dict[str, type]:
    """Module name → the class whose rules initialise it: that of the nearest part that is a model
    of transformers itself."""
    base: type = import_transformers().PreTrainedModel
    found: dict[str, type] = {}
    for name, module in model.named_modules():
        parent = found.get(name.rpartition(".")[0], type(model))
        found[name] = type(module) if isinstance(module, base) else parent
    return found


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


def is_own_code(model: Any) -> bool:
    """Whether a model's class is not transformers' own but came with its weights, as
    ``trust_remote_code=True`` loads it."""
    return getattr(type(model), "_auto_class", None) is not None


def copy_code(model: Any, folder: Path) -> None:
    """The Python files of a class that came with its weights, for a folder that is to be loaded in
    the same way. Files alone: nothing of them is run."""
    if is_own_code(model):
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=copy.deepcopy(model.config))


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


# --------------------------------------------------------------------------- transformers: caches


def plain_cache(keys_and_values: Sequence[Tensor]) -> Any:
    """A cache of transformers that grows with every token: keys and values of each block in turn,
    ``(batch, heads, tokens, width)``."""
    pairs = zip(keys_and_values[::2], keys_and_values[1::2], strict=True)
    return import_transformers().DynamicCache(list(pairs))


def cached_tensors(cache: Any) -> list[Tensor] | None:
    """The inverse of `plain_cache`; ``None`` for any other kind of cache, such as one that forgets
    what leaves a window."""
    if type(cache) is not import_transformers().DynamicCache:
        return None
    found: list[Tensor] = []
    for layer in cache.layers:
        if type(layer).__name__ != "DynamicLayer":
            return None
        found += [layer.keys, layer.values]
    return found


# ------------------------------------------------------------------------------------ torch: ONNX


@contextmanager
def quiet_onnx() -> Iterator[None]:
    """The exporter of torch says what it does on standard output, and warns of packages that are
    not there."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
