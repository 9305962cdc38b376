"""What makes an artifact a folder of transformers: the config that plain ``from_pretrained`` reads,
and loading a model of the class that it names."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvprune.compat import (
    decompress_,
    import_transformers,
    loads_without_linear_weights,
    model_from_config,
    quiet_libraries,
)
from curvprune.failures import is_machine, one_line
from curvprune.options import Quantize


def quantization_config(model: nn.Module, choices: Mapping[str, Quantize]) -> dict[str, object]:
    """The ``quantization_config`` entry of ``config.json`` for packed layers: one group per kind of
    grid.

    Linear layers that are not packed are named under ``ignore``: vLLM refuses a model with one that
    no entry covers.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    groups: dict[Quantize, list[str]] = {}
    for layer, quantize in choices.items():
        groups.setdefault(quantize, []).append(layer)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [name for name in linear if name not in choices],
        "config_groups": {grid.key: _group_config(grid, names) for grid, names in groups.items()},
    }


def _group_config(quantize: Quantize, layers: list[str]) -> dict[str, object]:
    """The layers that share a grid, and the grid."""
    return {
        "targets": [*layers],
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": quantize.bits,
            "type": "int",
            "symmetric": quantize.symmetric,
            "strategy": "channel" if quantize.group_size is None else "group",
            "group_size": quantize.group_size,
            "dynamic": False,
        },
    }


def save_config(
    folder: Path,
    model: Any,
    choices: Mapping[str, Quantize],
    tokenizer: Any = None,
    architecture: Mapping[str, int | list[str]] | None = None,
) -> None:
    """Write config, generation config and tokenizer beside the weights, as ``from_pretrained``
    expects them; with the entries of ``architecture`` instead of the model's own."""
    said = copy.deepcopy(model.config)
    for key, value in (architecture or {}).items():
        setattr(said, key, value)
    config = json.loads(said.to_json_string(use_diff=True))
    # What `from_pretrained` and `load_foreign` need to know, whether the model was read or built.
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if choices:
        config["quantization_config"] = quantization_config(model, choices)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


# The names that configs have for the width of an MLP.
_MLP_WIDTH = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "hidden_dim",
    "d_ff",
    "n_inner",
)


def describe_(model: Any, widths: Mapping[str, tuple[int, int]]) -> bool:
    """Write new widths into a pruned model's config, if a config can describe them; otherwise it
    stays as it is.

    Whether it can is tried. The class is built from the new config, on the meta device. All shapes
    must be those of the model, and where blocks are gone, so must numbers that depend on a block's
    place.

    Args:
        widths: kind of cut (`curvprune.structured`) → (units before, after).
    """
    config = copy.deepcopy(model.config)
    try:
        # 1. The entries that say the widths; a composite config may have none of its own.
        if "mlp" in widths:
            _describe_mlp_(config, *widths["mlp"])
        if "heads" in widths:
            _describe_heads_(config, *widths["heads"])
        # 2. A model of that config, without memory.
        with torch.device("meta"):
            empty = type(model)(copy.deepcopy(config))
        shapes = _shapes(empty)
    except (ValueError, RuntimeError, AttributeError, TypeError):
        return False
    # 3. It must be this one.
    if shapes != _shapes(model):
        return False
    if not widths and _factors(empty) != _factors(model):
        return False
    model.config.update(config.to_diff_dict())
    return True


def _describe_mlp_(config: Any, before: int, after: int) -> None:
    keys = [key for key in _MLP_WIDTH if hasattr(config, key)]
    said = [key for key in keys if getattr(config, key) == before]
    # GPT-2's n_inner is None where the width is four times the hidden size.
    unsaid = [key for key in keys if getattr(config, key) is None]
    for key in said or unsaid:
        setattr(config, key, after)


def _describe_heads_(config: Any, before: int, after: int) -> None:
    heads = config.num_attention_heads
    # Without a head_dim, the class divides the hidden size by the number of heads.
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    config.num_attention_heads = heads // before * after
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = after


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _factors(model: nn.Module) -> dict[tuple[str, str], float]:
    """Numbers that modules hold, such as a scale of the attention; rates of dropout do nothing in
    evaluation mode."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            continue
        for key, value in vars(module).items():
            if type(value) is float and "drop" not in key:
                found[name, key] = value
    return found


def load_foreign(folder: Path) -> nn.Module:
    """The uncompressed architecture that a folder's config describes, its weights not yet filled
    in. Raises ``ValueError`` naming a config that describes none."""
    try:
        return _foreign(folder)
    except Exception as error:  # of any type: a config that was edited may say anything
        if is_machine(error) or isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{folder / 'config.json'} describes no model ({type(error).__name__}: "
            f"{one_line(str(error), most=200)}); save the model again, or fetch another copy"
        ) from error


def _foreign(folder: Path) -> nn.Module:
    transformers = import_transformers()
    record = _read_config(folder)
    kind = _class_of(folder, record)
    record.pop("quantization_config", None)  # the weights are ours to unpack
    # Of the class itself: an Auto class could take another one for the same config.
    config = kind.config_class.from_dict(record)
    with quiet_libraries():
        model = model_from_config(kind, config, getattr(torch, record["dtype"]))
        if (folder / "generation_config.json").is_file():
            generation = transformers.GenerationConfig.from_pretrained(folder)
            model.generation_config = generation
    return model


def _read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _class_of(folder: Path, config: Any) -> Any:
    """The class of transformers that a config names."""
    transformers, name = import_transformers(), config["architectures"][0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"{folder}: architecture {name!r} is not part of transformers; load it by its own class"
        )
    return getattr(transformers, name)


def loads_packed(model: Any) -> bool:
    """Whether transformers can load this class with packed Linear layers: some classes (T5, SigLIP)
    need the weights that packing has removed. Tried without memory or a forward pass."""
    return loads_without_linear_weights(type(model), model.config)


def load_portable(folder: Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a saved transformers model by the class that its config names, in evaluation mode,
    weights unpacked."""
    kind = _class_of(folder, _read_config(folder))
    with quiet_libraries():
        try:
            model = kind.from_pretrained(str(folder))
        except RuntimeError as error:
            raise ValueError(
                f"{folder}: transformers {import_transformers().__version__} cannot read it "
                f"({str(error).splitlines()[0]}); versions from 5.23 on refuse packed zero points: "
                "use transformers>=5.18,<5.23 or symmetric options"
            ) from error
        decompress_(model)
    return model.to(device).eval()
