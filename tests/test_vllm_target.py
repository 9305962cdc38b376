"""The target vllm against what vLLM itself builds and takes: tests/samples/vllm_layers.json, which
scripts/vllm_table.py reads from an installed vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM
from typer.testing import CliRunner

import curvprune as cp
from curvprune.cli import app
from curvprune.model import GroupError, find_layers
from curvprune.options import Cast, Keep, Quantize
from curvprune.targets import target_named, vllm_bits
from tests import tiny

TRUTH = json.loads((Path(__file__).parent / "samples" / "vllm_layers.json").read_text())
MODELS: dict[str, Any] = TRUTH["models"]
VLLM = target_named("vllm")
FOUR = Quantize(bits=4, group_size=32)
# transformers itself does not read their Linear layers packed.
NOT_READ = {"falcon"}
# What vLLM asks for packed and then fails to load, seen in benchmarks/engines.py: it sorts the rows
# of query_key_value with those of its shape, and looks for Mixtral's experts under their old names.
NOT_LOADED = {"bloom": "query_key_value", "mixtral": ""}


def build(family: str) -> nn.Module:
    """The model of a tiny config, without memory for its weights where that is enough."""
    entries = dict(MODELS[family]["config"])
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def llama(**sizes: int) -> nn.Module:
    entries = MODELS["llama"]["config"] | sizes
    entries.pop("model_type")
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **entries))


def offered(model: nn.Module, option: str = FOUR.key) -> dict[str, list[str]]:
    return {name: ["keep", option] for name in find_layers(model)}


@pytest.mark.parametrize("family", MODELS)
def test_layers_are_packed_fused_and_refused_as_the_engine_has_them(family: str) -> None:
    model, truth = build(family), MODELS[family]
    layers = find_layers(model)
    # 1. Packed: what a module of the engine reads packed, and nothing else. A head that shares the
    # embedding's weight is stored with it.
    packed, refused = set(), set()
    for name, layer in layers.items():
        try:
            VLLM.check(model, layer, FOUR)
        except ValueError as error:
            assert f"layer {name}: option int4-g32-sym: vLLM 0.32.0 " in str(error)
            refused.add(name)
            continue
        if VLLM.form_of(model, layer, FOUR) == "packed":
            packed.add(name)
    theirs = {name for module in truth["modules"].values() for name in module["layers"]}
    if family in NOT_LOADED:
        theirs = {name for name in theirs if not name.endswith(NOT_LOADED[family])}
        truth = truth | {"dense": set(layers) - theirs}
    assert packed <= theirs and refused <= {*truth["dense"]}
    if family not in NOT_READ:
        alone = {name for name in theirs if name in layers}
        assert packed == alone and theirs - alone <= {"lm_head"}
    if not theirs:
        return
    # 2. Fused: what one module of the engine is made of.
    groups = {frozenset(group) for group in VLLM.groups(model, (), offered(model)).layers}
    fused = set()
    for module in truth["modules"].values():
        if len(module["layers"]) > 1:
            fused.add(frozenset(module["layers"]))
    assert groups == fused


def test_kernels_are_those_that_the_engine_chooses() -> None:
    assert vllm_bits() == tuple(sorted({row["bits"] for row in TRUTH["kernels"] if row["kernel"]}))
    layers: dict[tuple[int, int], Any] = {}
    for row in TRUTH["kernels"]:
        shape = row["outputs"], row["inputs"]
        if shape not in layers:
            model = llama(hidden_size=shape[0], head_dim=shape[1] // 4)
            layers[shape] = model, find_layers(model)["model.layers.0.self_attn.o_proj"]
        option = Quantize(
            bits=row["bits"], group_size=row["group_size"], symmetric=row["symmetric"]
        )
        # On a CPU groups of 16 run as well; on a GPU they do not.
        if row["kernel"] is not None and row["group_size"] != 16:
            VLLM.check(*layers[shape], option)
            continue
        with pytest.raises(ValueError, match=f"self_attn.o_proj: option {option.key}: vLLM"):
            VLLM.check(*layers[shape], option)


class Wide(nn.Module):
    """Stands for nothing: a module that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            Quantize(bits=8, group_size=32),
            "8 bits only on NVIDIA GPUs .Marlin.*: 4, or target: ",
        ),
        (Quantize(bits=3), "3 bits only on NVIDIA GPUs .Humming.*: 4 bits; nearest: 4, or"),
        (Quantize(bits=1), "has no kernel for 1 bits; .*: 4 bits; nearest: 4$"),
        (Quantize(bits=8, symmetric=False), "8 bits with zero points only on .*9.0.*nearest: 4$"),
        (Quantize(bits=4, group_size=16), "groups of 32, 64 or 128 .*not 16.*128 inputs: 32$"),
        (Quantize(bits=4, group_size=256), "not 256; nearest that divides its 128 inputs: 128$"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_nearest_it_can(option: Quantize, said: str) -> None:
    model = llama()
    layer = find_layers(model)["model.layers.0.self_attn.o_proj"]
    with pytest.raises(ValueError, match=rf"layer model.layers.0.self_attn.o_proj: .*{said}"):
        VLLM.check(model, layer, option)
    for fine in (Keep(), Cast(dtype="bfloat16"), FOUR, Quantize(bits=4, symmetric=False)):
        VLLM.check(model, layer, fine)


@pytest.mark.parametrize(
    ("sizes", "name", "said"),
    [
        ({"intermediate_size": 80}, "mlp.down_proj", "multiples of 32 inputs, not 80"),
        ({"intermediate_size": 80}, "mlp.gate_proj", None),  # 160 with up_proj
        ({"intermediate_size": 88}, "mlp.up_proj", "multiples of 32 outputs, not 176 .*gate_proj"),
        ({"head_dim": 20}, "self_attn.q_proj", None),  # 80 + 40 + 40
        ({"head_dim": 12}, "self_attn.k_proj", None),  # 48 + 24 + 24
        ({"head_dim": 36}, "self_attn.v_proj", None),
        ({"head_dim": 20}, "self_attn.o_proj", "multiples of 32 inputs, not 80"),
    ],
)
def test_shapes_are_those_of_what_runs_as_one(
    sizes: dict[str, int], name: str, said: str | None
) -> None:
    model = llama(**sizes)
    layer = find_layers(model)[f"model.layers.1.{name}"]
    option = Quantize(bits=4)
    if said is None:
        VLLM.check(model, layer, option)
        return
    with pytest.raises(ValueError, match=rf"layers.1.{name}: option int4-pc-sym: .*{said}"):
        VLLM.check(model, layer, option)


def test_zero_points_of_a_part_fill_whole_words() -> None:
    model = llama(num_attention_heads=8, num_key_value_heads=1, head_dim=12)
    layer = find_layers(model)["model.layers.0.self_attn.k_proj"]
    with pytest.raises(ValueError, match=r"multiples of 32 outputs, not 120"):
        VLLM.check(model, layer, Quantize(bits=4))
    model = llama(num_attention_heads=6, num_key_value_heads=1, head_dim=4, hidden_size=96)
    layer = find_layers(model)["model.layers.0.self_attn.k_proj"]
    VLLM.check(model, layer, Quantize(bits=4))
    with pytest.raises(ValueError, match=r"zero points are packed by 8 outputs, not 4"):
        VLLM.check(model, layer, Quantize(bits=4, symmetric=False))


def test_classes_that_were_not_loaded_there_are_refused() -> None:
    bert = BertForMaskedLM(
        BertConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
        )
    )
    for model, said in ((bert, "BertForMaskedLM is none of the"), (Wide(), "Wide is no model of")):
        layer = next(la for la in find_layers(model).values() if la.kind == "linear")
        with pytest.raises(ValueError, match=f"{said}.*target: transformers or curvprune"):
            VLLM.check(model, layer, FOUR)


def test_groups_of_the_users_own_are_joined_with_those_that_run_as_one() -> None:
    model = build("llama")
    block = "model.layers.0"
    own = ("*.q_proj", "*.k_proj", "*.v_proj")
    fused = VLLM.groups(model, (), offered(model))
    for request in (("fused",), (own,), (own, ("*.up_proj", "*.gate_proj")), (own[:2],)):
        assert VLLM.groups(model, request, offered(model)).layers == fused.layers
    assert fused.notes == ()
    wider = VLLM.groups(model, (("*.gate_proj", "*.down_proj"),), offered(model)).layers
    names = {f"{block}.mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    assert names in [set(group) for group in wider]
    # What is one layer already needs no note.
    for family in ("phi3", "gpt2", "bloom"):
        alone = build(family)
        assert VLLM.groups(alone, (), offered(alone)) == cp.model.Groups(layers=(), notes=())


def test_layers_that_run_as_one_must_be_offered_the_same() -> None:
    model = build("qwen3")
    name = "model.layers.0.self_attn.q_proj"
    keys = offered(model) | {name: ["keep"]}
    said = (
        "target: vLLM runs layers model.layers.0.self_attn.q_proj and "
        "model.layers.0.self_attn.k_proj and model.layers.0.self_attn.v_proj as one in "
        "Qwen3ForCausalLM, but only model.layers.0.self_attn.k_proj is offered int4-g32-sym; offer "
        "all of them the same options, or leave all out"
    )
    with pytest.raises(GroupError) as caught:
        VLLM.groups(model, (), keys)
    assert str(caught.value) == said
    # Floats of different types are put together as floats.
    VLLM.groups(model, (), {key: ["keep"] for key in keys} | {name: ["bfloat16"]})


def test_a_recipe_hears_it_at_its_target(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("llama").save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    files = ", ".join(map(str, tiny.write_texts(tmp_path / "texts")))
    text = tiny.RECIPE.format(model=folder, files=files, budget="")
    entries = text[text.index("compress:") : text.index("search:")]
    wanted = 'compress:\n  - layers: "*.q_proj"\n    options: [{quantize: {bits: 4}}]\n'
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(entries, wanted) + "target: vllm\n")
    result = CliRunner().invoke(app, ["check", str(path)])
    output = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "vLLM runs layers model.layers.0.self_attn.q_proj and" in output
    line = path.read_text().splitlines().index("target: vllm") + 1
    assert f"{path}:{line}" in output.replace(" ", "") or f"line {line}" in output
