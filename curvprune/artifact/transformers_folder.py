"""The only file that imports transformers: load models from a hub, a folder or an installed
package, and save artifacts that plain ``from_pretrained`` reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvprune.compat import import_transformers
from curvprune.options import Quantize


def quantization_config(model: nn.Module, choices: Mapping[str, Quantize]) -> dict[str, Any]:
    """The ``quantization_config`` entry of ``config.json`` for packed layers: one group per kind of
    grid. Linear layers
    that are not packed are named under ``ignore``: vLLM refuses a model with one that no entry
    covers."""
    groups: dict[Quantize, list[str]] = {}
    for layer, quantize in choices.items():
        groups.setdefault(quantize, []).append(layer)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [
            n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in choices
        ],
        "config_groups": {
            quantize.key: {
                "targets": names,
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
            for quantize, names in groups.items()
        },
    }


def save_config(
    folder: Path,
    model: Any,
    choices: Mapping[str, Quantize],
    tokenizer: Any = None,
    architecture: Mapping[str, Any] | None = None,
) -> None:
    """Write config, generation config and tokenizer beside the weights, as ``from_pretrained``
    expects them; with the entries of ``architecture`` instead of the model's own."""
    said = copy.deepcopy(model.config)
    for key, value in (architecture or {}).items():
        setattr(said, key, value)
    config = json.loads(said.to_json_string(use_diff=True))
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
    """Write new widths into a pruned model's config if a config can describe them: kind → (units
    before, after) of
    `curvprune.cuts`. Whether it can is tried: the class is built from the new config, on the meta
    device, and all shapes must be those of the model, and so must numbers that depend on a block's
    place, where blocks are gone. Otherwise the config stays as it is."""
    config = copy.deepcopy(model.config)
    if "mlp" in widths:
        before, after = widths["mlp"]
        keys = [key for key in _MLP_WIDTH if hasattr(config, key)]
        # GPT-2's n_inner is None where the width is four times the hidden size.
        for key in [k for k in keys if getattr(config, k) == before] or [
            k for k in keys if getattr(config, k) is None
        ]:
            setattr(config, key, after)
    if "heads" in widths:
        before, after = widths["heads"]
        heads = config.num_attention_heads
        # Without a head_dim, the class divides the hidden size by the number of heads.
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.num_attention_heads = heads // before * after
        if getattr(config, "num_key_value_heads", None) is not None:
            config.num_key_value_heads = after
    try:
        with torch.device("meta"):
            empty = type(model)(copy.deepcopy(config))
        shapes = {n: t.shape for n, t in empty.state_dict().items()}
    except (ValueError, RuntimeError, AttributeError, TypeError):
        return False
    if shapes != {n: t.shape for n, t in model.state_dict().items()}:
        return False
    if not widths and _factors(empty) != _factors(model):
        return False
    model.config.update(config.to_diff_dict())
    return True


def _factors(model: nn.Module) -> dict[tuple[str, str], float]:
    """Numbers that modules hold, such as a scale of the attention; rates of dropout do nothing in
    evaluation mode."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is float and "drop" not in key and not isinstance(module, nn.Dropout)
    }


def load_foreign(folder: Path) -> nn.Module:
    """The uncompressed architecture that a folder's config describes, its weights not yet filled
    in."""
    transformers = import_transformers()
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = record["architectures"][0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"{folder}: architecture {name!r} is not part of transformers; load it by its own class"
        )
    kind = getattr(transformers, name)
    record.pop("quantization_config", None)  # the weights are ours to unpack
    config = kind.config_class.from_dict(record)
    model: nn.Module = kind._from_config(config, dtype=getattr(torch, record["dtype"]))
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def loads_packed(model: Any) -> bool:
    """Whether transformers can load this class with packed Linear layers. Some classes (T5, SigLIP)
    initialise the weights of their children by name while loading, which fails once packing has
    removed them. Tried on the meta device: no memory, no forward pass."""
    try:
        with torch.device("meta"):
            empty = type(model)(copy.deepcopy(model.config))
        for module in empty.modules():
            if isinstance(module, nn.Linear):
                del module.weight
        for module in empty.modules():
            empty._init_weights(module)
    except AttributeError:
        return False
    return True


def load_portable(folder: Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a saved transformers model by the class that its config names, in evaluation mode,
    weights unpacked."""
    transformers = import_transformers()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config["architectures"][0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"{folder}: architecture {name!r} is not part of transformers; load it by its own class"
        )
    try:
        model = getattr(transformers, name).from_pretrained(str(folder))
    except RuntimeError as error:
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} cannot read it "
            f"({str(error).splitlines()[0]}); versions from 5.23 on refuse packed zero points: "
            "use transformers>=5.18,<5.23 or symmetric options"
        ) from error
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
    return model.to(device).eval()
