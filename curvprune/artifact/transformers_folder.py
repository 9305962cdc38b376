"""What makes an artifact a folder of transformers: the config that plain ``from_pretrained`` reads,
and loading a model of the class that it names."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvprune.compat import (
    config_of,
    copy_code,
    import_transformers,
    model_from_config,
    quiet_libraries,
)
from curvprune.failures import is_machine, one_line
from curvprune.options import Quantize

GENERATION = "generation_config.json"


def quantization_config(
    model: nn.Module, choices: Mapping[str, Quantize], *, packed_zeros: bool = False
) -> dict[str, object]:
    """The ``quantization_config`` entry of ``config.json`` for packed layers: one group per kind of
    grid.

    Linear layers that are not packed are named under ``ignore``: vLLM refuses a model with one that
    no entry covers.

    Args:
        packed_zeros: zero points are packed, as engines expect them, and not a byte each.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    groups: dict[str, dict[str, object]] = {}
    targets: dict[str, list[str]] = {}
    for layer, grid in choices.items():
        key, weights = grid.key, _weights_args(grid)
        if not grid.symmetric and not packed_zeros:
            # One row, and the width of a group: a block of each layer's own width without groups.
            width = grid.group_size or linear[layer].in_features
            key = f"{grid.key}-{width}"
            weights |= {"strategy": "block", "group_size": None, "block_structure": [1, width]}
        targets.setdefault(key, []).append(layer)
        groups[key] = _group_config(targets[key], weights)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [name for name in linear if name not in choices],
        "config_groups": groups,
    }


def _group_config(layers: list[str], weights: dict[str, object]) -> dict[str, object]:
    """The layers that share a grid, and the grid."""
    return {
        "targets": layers,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }


def _weights_args(quantize: Quantize) -> dict[str, object]:
    return {
        "num_bits": quantize.bits,
        "type": "int",
        "symmetric": quantize.symmetric,
        "strategy": "channel" if quantize.group_size is None else "group",
        "group_size": quantize.group_size,
        "dynamic": False,
    }


def config_entries(
    model: Any, architecture: Mapping[str, int | list[str]] | None = None
) -> dict[str, object]:
    """The entries of ``config.json``, those of ``architecture`` instead of the model's own; nothing
    is called packed."""
    said = copy.deepcopy(model.config)
    for key, value in (architecture or {}).items():
        setattr(said, key, value)
    config: dict[str, object] = json.loads(said.to_json_string(use_diff=True))
    config.pop("quantization_config", None)  # of a folder that the model was read from
    # What `from_pretrained` and `load_foreign` need to know, whether the model was read or built.
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(main_dtype(model)).removeprefix("torch.")
    _tie_as_memory_(model, said, config)
    return config


def main_dtype(model: nn.Module) -> torch.dtype:
    """The float type that most of a model's parameters have."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0]


def _tie_as_memory_(model: Any, said: Any, config: dict[str, object]) -> None:
    """Let a config say whether embedding and output head are one weight, as they are in memory."""
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return  # no class that knows the two
    one, other = getattr(embedding, "weight", None), getattr(head, "weight", None)
    if one is None or other is None or one.shape != other.shape:
        return
    tied = one.data_ptr() == other.data_ptr()
    text = said.get_text_config()
    # Some configs say nothing of it themselves, and their language model's does.
    words = [getattr(part, "tie_word_embeddings", tied) for part in (said, text)]
    if words == [tied, tied]:
        return
    config["tie_word_embeddings"] = tied
    for key, part in config.items():
        if isinstance(part, dict) and getattr(said, key, None) is text:
            part["tie_word_embeddings"] = tied


def save_config(
    folder: Path, model: Any, entries: Mapping[str, object], tokenizer: Any = None
) -> None:
    """Write config, generation config and tokenizer beside the weights, as ``from_pretrained``
    expects them."""
    (folder / "config.json").write_text(
        json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        # As it is: its own `save_pretrained` refuses settings that contradict each other.
        generation.to_json_file(folder / GENERATION)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    copy_code(model, folder)


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


def load_foreign(
    folder: Path, dtypes: Mapping[str, str] | None = None, kind: type[nn.Module] | None = None
) -> nn.Module:
    """The uncompressed architecture that a folder's config describes, its weights not yet filled
    in.

    Args:
        dtypes: of the tensors that do not have the config's own type.
        kind: the class; else the one of transformers that the config names.

    Raises ``ValueError`` naming a config that describes none.
    """
    try:
        return _foreign(folder, dtypes or {}, kind)
    except Exception as error:  # of any type: a config that was edited may say anything
        if is_machine(error) or isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{folder / 'config.json'} describes no model ({type(error).__name__}: "
            f"{one_line(str(error), most=200)}); save the model again, or fetch another copy"
        ) from error


def _foreign(folder: Path, dtypes: Mapping[str, str], known: Any) -> nn.Module:
    transformers = import_transformers()
    record = _read_config(folder)
    kind = known or _class_of(folder, record)
    record.pop("quantization_config", None)  # the weights are ours to unpack
    # Of the class itself: an Auto class could take another one for the same config.
    config = config_of(kind, record)
    main: torch.dtype = getattr(torch, record["dtype"])
    with quiet_libraries():
        model = model_from_config(kind, config, main)
        if (folder / GENERATION).is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    # A class may keep some of its tensors wide; those that were saved need not have been.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(getattr(torch, dtypes.get(name, record["dtype"])))
    return model


def _read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _class_of(folder: Path, config: Any) -> Any:
    """The class of transformers that a config names."""
    transformers, name = import_transformers(), config["architectures"][0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"{folder}: architecture {name!r} is not part of transformers; pass model=, an "
            "instance of it, such as AutoModel.from_pretrained(..., trust_remote_code=True) gives "
            "of the uncompressed folder"
        )
    return getattr(transformers, name)
