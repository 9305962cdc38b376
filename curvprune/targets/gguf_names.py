"""What llama.cpp calls the tensors of a model, in which order it keeps their rows, and what it must
know of the model's config: facts of the families that are exported.

transformers turns the two halves of a head's inputs against each other (rotary embedding), and so
does llama.cpp's ``qwen2`` and ``qwen3``. Its ``llama`` turns neighbours: rows ``i`` and ``i +
dim/2`` of a head of q and k become ``2 i`` and ``2 i + 1``.

Source: ``gguf-py/gguf/constants.py``, ``src/llama-model.cpp`` and ``conversion`` of ggml-org/
llama.cpp, gguf 0.19.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["UINT32", "INT32", "FLOAT32", "BOOL", "STRING"]
Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One entry of a file's metadata; an ``array`` has a sequence of ``kind`` as its value."""

    key: str
    kind: str
    value: Scalar | list[Scalar]
    array: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How llama.cpp keeps a family of models.

    Attributes:
        architecture: its name there.
        interleaved: rows of q and k are neighbours that are turned.
        biases: parts of a block that may have a bias.
        norms: further parts of a block's attention.
    """

    architecture: str
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


_QKV = ("q_proj", "k_proj", "v_proj")
FAMILIES = {
    "llama": Family(
        architecture="llama",
        interleaved=True,
        biases=(*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "mistral": Family(architecture="llama", interleaved=True),
    "qwen2": Family(architecture="qwen2", biases=_QKV),
    "qwen3": Family(architecture="qwen3", norms=("q_norm", "k_norm")),
}
FAMILY_WORDS = "Llama (SmolLM, SmolLM2), Mistral, Qwen2 (Qwen2.5) and Qwen3"
_HEADS = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

_AROUND = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The numbers of a model's config, whichever way it says them."""

    family: Family
    blocks: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_width: int
    context: int
    vocabulary: int
    epsilon: float
    theta: float
    scaling: Mapping[str, object]


def family_of(config: Any) -> Family:
    """The family of a config of transformers. Raises ``ValueError`` with those that there are."""
    kinds = list(getattr(config, "architectures", None) or [])
    name = _HEADS.get(kinds[0]) if kinds else None
    if name is None or config.model_type != name:
        found = kinds[0] if kinds else config.model_type
        raise ValueError(
            f"{found}: no GGUF is written of this family; there are {FAMILY_WORDS}, as causal "
            "language models. Of others export_dense writes a folder for llama.cpp's own converter"
        )
    return FAMILIES[name]


def shape_of(config: Any) -> Shape:
    """The numbers that llama.cpp must know. Raises ``ValueError`` for a config that asks for what
    it does not compute."""
    family = family_of(config)
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"config.hidden_act is {config.hidden_act!r}; llama.cpp's {family.architecture} "
            "computes silu"
        )
    # 1. The rotary embedding; older configs say its base beside it.
    rope = dict(getattr(config, "rope_parameters", None) or {})
    theta = rope.pop("rope_theta", getattr(config, "rope_theta", 10000.0))
    partial = rope.pop("partial_rotary_factor", 1.0) or 1.0
    if partial != 1.0:
        raise ValueError(
            f"config: partial_rotary_factor is {partial}; llama.cpp's {family.architecture} turns "
            "whole heads"
        )
    # 2. Beyond a sliding window llama.cpp would attend to more than the model does.
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        context = min(context, int(window))
    heads = int(config.num_attention_heads)
    return Shape(
        family=family,
        blocks=int(config.num_hidden_layers),
        width=int(config.hidden_size),
        inner=int(config.intermediate_size),
        heads=heads,
        key_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        context=context,
        vocabulary=int(config.vocab_size),
        epsilon=float(config.rms_norm_eps),
        theta=float(theta),
        scaling=rope,
    )


def model_fields(shape: Shape) -> list[Field]:
    """The entries that describe the model; ``general.architecture`` is written by itself."""
    a = shape.family.architecture
    whole = {
        "block_count": shape.blocks,
        "context_length": shape.context,
        "embedding_length": shape.width,
        "feed_forward_length": shape.inner,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.key_heads,
        "attention.key_length": shape.head_width,
        "attention.value_length": shape.head_width,
        "rope.dimension_count": shape.head_width,
        "vocab_size": shape.vocabulary,
    }
    fields = [Field(key=f"{a}.{key}", kind="UINT32", value=v) for key, v in whole.items()]
    epsilon = f"{a}.attention.layer_norm_rms_epsilon"
    fields.append(Field(key=epsilon, kind="FLOAT32", value=shape.epsilon))
    fields.append(Field(key=f"{a}.rope.freq_base", kind="FLOAT32", value=shape.theta))
    return fields + _scaling_fields(shape)


def _scaling_fields(shape: Shape) -> list[Field]:
    """How positions beyond those of the training are reached; llama3's way is a tensor."""
    scaling, a = dict(shape.scaling), shape.family.architecture
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if kind in ("default", "llama3"):
        return []
    if kind == "linear" and set(scaling) <= {"factor"}:
        return [
            Field(key=f"{a}.rope.scaling.type", kind="STRING", value="linear"),
            Field(key=f"{a}.rope.scaling.factor", kind="FLOAT32", value=_number(scaling, "factor")),
        ]
    plain = {"factor", "original_max_position_embeddings"}
    if kind == "yarn" and set(scaling) == plain:
        before = int(_number(scaling, "original_max_position_embeddings"))
        key = f"{a}.rope.scaling.original_context_length"
        return [
            Field(key=f"{a}.rope.scaling.type", kind="STRING", value="yarn"),
            Field(key=f"{a}.rope.scaling.factor", kind="FLOAT32", value=_number(scaling, "factor")),
            Field(key=key, kind="UINT32", value=before),
        ]
    raise ValueError(
        f"config.rope_parameters: {kind!r} with {sorted(scaling)} is not written into a GGUF; "
        "there are default, linear (factor), llama3, and yarn (factor and "
        "original_max_position_embeddings)"
    )


def _number(entries: Mapping[str, object], key: str) -> float:
    value = entries.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"config.rope_parameters: {key} is {value!r}, expected a number")
    return float(value)


def rope_factors(shape: Shape) -> Tensor | None:
    """llama3's scaling: what the wavelength of each pair of rows is multiplied by.

    Long wavelengths (more than ``original / low_freq_factor`` positions) are stretched by
    ``factor``, short ones (less than ``original / high_freq_factor``) are left, and between them
    the frequencies are mixed linearly.
    """
    scaling = shape.scaling
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    before = _number(scaling, "original_max_position_embeddings")
    found = []
    for i in range(0, shape.head_width, 2):
        wavelength = 2 * math.pi * shape.theta ** (i / shape.head_width)
        if wavelength < before / high:
            found.append(1.0)
        elif wavelength > before / low:
            found.append(factor)
        else:
            share = (before / wavelength - low) / (high - low)
            found.append(1 / ((1 - share) / factor + share))
    return torch.tensor(found, dtype=torch.float32)


def gguf_name(key: str, shape: Shape) -> str:
    """llama.cpp's name of a tensor. Raises ``ValueError`` naming one that it has no place for."""
    if key in _AROUND:
        return _AROUND[key]
    family, found = shape.family, _BLOCK.fullmatch(key)
    if found is not None:
        block, part, kind = found.groups()
        word = part.rpartition(".")[2]
        known = part in _IN_BLOCK and (word not in ("q_norm", "k_norm") or word in family.norms)
        if known and (kind == "weight" or word in family.biases):
            return f"blk.{block}.{_IN_BLOCK[part]}.{kind}"
    raise ValueError(f"tensor {key}: llama.cpp's {family.architecture} has no place for it")


def row_order(key: str, shape: Shape) -> Tensor | None:
    """Which row of a weight or bias comes where in the file; ``None``: they stay as they are."""
    found = _BLOCK.fullmatch(key)
    if not shape.family.interleaved or found is None:
        return None
    heads = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.key_heads}.get(found[2])
    if heads is None:
        return None
    rows = torch.arange(heads * shape.head_width)
    return rows.reshape(heads, 2, shape.head_width // 2).transpose(1, 2).reshape(-1)
