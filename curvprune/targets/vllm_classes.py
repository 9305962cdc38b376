"""The classes of vLLM whose folders were loaded, and the layers that each of them runs as one.

Facts of vLLM 0.32.0: ``packed_modules_mapping`` of the classes in model_executor/models, for those
that it takes from transformers what its fusers found, and what each class asks to be read packed.
`scripts/vllm_table.py` writes them into tests/samples/vllm_layers.json, which the tests hold this
table against; `benchmarks/engine_vllm.py` loads a folder of every class.
"""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "0.32.0"

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What vLLM makes of the layers of a class, told by the last part of their names.

    Attributes:
        fused: layers of one parent module that it runs as one.
        dense: layers that it cannot read packed: it puts them together without saying of which
            layers, sorts their rows as if they were floats, or never asks how they are stored.
    """

    fused: tuple[tuple[str, ...], ...] = ()
    dense: tuple[str, ...] = ()


_BOTH = Known(fused=(QKV, GATE_UP))
_QKV_ALONE = Known(fused=(QKV,))
_NOTHING = Known()
_HEAD = ("lm_head",)
# By the name of transformers' class.
CLASSES: dict[str, Known] = {
    "ApertusForCausalLM": _QKV_ALONE,
    "ArceeForCausalLM": _QKV_ALONE,
    "BloomForCausalLM": Known(dense=("query_key_value", *_HEAD)),
    "Cohere2ForCausalLM": Known(fused=(QKV, GATE_UP), dense=_HEAD),
    "CohereForCausalLM": Known(fused=(QKV, GATE_UP), dense=_HEAD),
    "Ernie4_5ForCausalLM": _BOTH,
    "Exaone4ForCausalLM": _BOTH,
    "FalconForCausalLM": _NOTHING,
    "GPT2LMHeadModel": Known(dense=_HEAD),
    "GPTJForCausalLM": Known(dense=QKV),
    "GPTNeoXForCausalLM": _NOTHING,
    "Gemma2ForCausalLM": Known(fused=(QKV, GATE_UP), dense=_HEAD),
    "Gemma3ForCausalLM": _BOTH,
    "GemmaForCausalLM": _BOTH,
    "Glm4ForCausalLM": _BOTH,
    "GlmForCausalLM": _QKV_ALONE,
    "GraniteForCausalLM": _BOTH,
    "HunYuanDenseV1ForCausalLM": _BOTH,
    "LlamaForCausalLM": _BOTH,
    "Ministral3ForCausalLM": _BOTH,
    "MistralForCausalLM": _BOTH,
    "NemotronForCausalLM": _QKV_ALONE,
    "OPTForCausalLM": Known(fused=(QKV,), dense=_HEAD),
    "Olmo2ForCausalLM": _BOTH,
    "Olmo3ForCausalLM": _BOTH,
    "OlmoForCausalLM": _BOTH,
    "OlmoeForCausalLM": _QKV_ALONE,
    "Phi3ForCausalLM": _NOTHING,
    "PhiForCausalLM": _QKV_ALONE,
    "Qwen2ForCausalLM": _BOTH,
    "Qwen2MoeForCausalLM": Known(fused=(QKV, GATE_UP), dense=("shared_expert_gate",)),
    "Qwen3ForCausalLM": _BOTH,
    "Qwen3MoeForCausalLM": _QKV_ALONE,
    "SeedOssForCausalLM": _BOTH,
    "SmolLM3ForCausalLM": _BOTH,
    "StableLmForCausalLM": Known(dense=(*QKV, *GATE_UP, *_HEAD)),
    "Starcoder2ForCausalLM": _QKV_ALONE,
}


def known(kind: str) -> Known | None:
    """What is known of a class of transformers, if its folders were loaded."""
    return CLASSES.get(kind)
