"""What is written is what is read: against compressed-tensors, plain transformers in a new process,
our loader."""

from __future__ import annotations

import hashlib
import json
import os
import stat

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import curvprune as cp
from curvprune import artifact
from curvprune.compression import Moments, solve_layer
from curvprune.model import find_layers
from curvprune.options import BITS, Cast, Prune, PruneQuantize, Quantize
from tests import tiny
from tests.fresh import in_fresh_process, logits_by_transformers


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 32), (5, 33), (7, 1), (1, 100)])
def test_packing_is_that_of_compressed_tensors(bits, shape):
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    for dim, length in ((1, shape[1]), (0, shape[0])):
        words = artifact.pack(codes, bits, dim=dim)
        assert torch.equal(words, pack_to_int32(codes, bits, packed_dim=dim))
        assert torch.equal(artifact.unpack(words, bits, length, dim=dim), codes)
        assert torch.equal(unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dim), codes)


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of two short sequences for `tests.tiny.llama`."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        found.append({"input_ids": torch.randint(0, 256, (2, 8), generator=generator)})
    return found


def bytes_held(model: nn.Module) -> int:
    """Memory of a model's tensors, each counted once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def compress_every_way(model: nn.Module, names: list[str], options: list) -> dict:
    """Give the layers the options in turn, each solved with a random second moment; the model holds
    the result."""
    layers, solved = find_layers(model), {}
    for i, name in enumerate(names):
        layer = layers[name]
        x = torch.randn(layer.groups, 4 * layer.shape[1], layer.shape[1])
        solved[name] = solve_layer(
            layer, [options[i % len(options)]], Moments(x.transpose(1, 2) @ x)
        )[0]
        layer.write_(solved[name].weight)
    return solved


MIXED = [
    *[Quantize(bits=b, group_size=16, symmetric=b % 2 == 0) for b in BITS],
    Quantize(bits=4),
    Quantize(bits=8, symmetric=False),
    Prune(sparsity=0.5),
    PruneQuantize(prune=Prune(pattern="2:4"), quantize=Quantize(bits=3, group_size=16)),
]


@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_in_a_fresh_process_gives_the_same_logits(tmp_path, tied):
    from curvprune.artifact import write_model

    torch.manual_seed(0)
    original = tiny.llama(tied=tied)
    model = tiny.llama(tied=tied)
    names = [n for n in find_layers(model) if n.startswith("model.layers")]
    if not tied:
        names.append("lm_head")
    solved = compress_every_way(model, names, MIXED)
    solved |= compress_every_way(model, ["model.embed_tokens"], [Cast(dtype="float16")])
    write_model(tmp_path, original, solved, {}, tokenizer=tiny.byte_tokenizer())
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    theirs = in_fresh_process(logits_by_transformers, str(tmp_path), ids.tolist())
    torch.testing.assert_close(torch.from_numpy(theirs), expected, rtol=1e-5, atol=1e-5)
    ours = cp.load(tmp_path)
    torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert next(ours.parameters()).shape == next(model.parameters()).shape, (
        "unpacked before the first forward pass"
    )
    moved = ours.to("meta")(input_ids=ids.to("meta")).logits
    assert moved.device.type == "meta", "it runs where it is moved to, not where it was read"


UNEVEN = [  # what compressed-tensors does not have: shorter last groups, and zero points of one bit
    Quantize(bits=4, group_size=24),
    Quantize(bits=3, group_size=20, symmetric=False),
    Quantize(bits=1),
    Quantize(bits=1, group_size=20, symmetric=False),
    Quantize(bits=8, group_size=100),
    PruneQuantize(prune=Prune(sparsity=0.5), quantize=Quantize(bits=4, group_size=20)),
]


@pytest.mark.parametrize(
    ("portable", "options"),
    [(True, MIXED), (False, [*MIXED, *UNEVEN]), ("engines", [Quantize(bits=4), *UNEVEN[2:4]])],
)
def test_bytes_promised_are_bytes_on_disk(tmp_path, portable, options):
    model = tiny.llama()
    layers = find_layers(model)
    names = [n for n in layers if n.startswith("model.layers")]
    solved = compress_every_way(model, names, options)
    artifact.save(tmp_path, model, layers, solved, {}, portable=portable)
    promised = artifact.other_bytes(model, {n: layers[n] for n in names}) + sum(
        artifact.layer_bytes(model, layers[n], solved[n].option, portable=portable) for n in names
    )
    assert sum(size for _, size in artifact.tensor_names(tmp_path).values()) == promised
    header = artifact.weights_file(tmp_path).stat().st_size - promised
    assert 0 < header <= artifact.header_bytes(model, {n: layers[n] for n in names})


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.flat = nn.Conv1d(8, 4, 3)
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.grouped(torch.relu(self.norm(self.first(x))))).flatten(2)
        x = self.flat(x).mean(2) + self.table.weight.sum(0)
        return self.head(x)


def test_any_module_round_trips_packed(tmp_path):
    torch.manual_seed(0)
    model = Convolutional().eval()
    model.norm.running_mean.normal_()
    original = Convolutional().eval()
    original.load_state_dict(model.state_dict())
    options = [
        Quantize(bits=3, symmetric=False),
        Quantize(bits=5, group_size=16),
        Quantize(bits=1),
        Quantize(bits=8),
        Quantize(bits=1, group_size=3, symmetric=False),
    ]
    solved = compress_every_way(model, list(find_layers(model)), options)
    artifact.save(tmp_path, original, find_layers(original), solved, {})
    loaded = cp.load(tmp_path, model=Convolutional())
    for (name, ours), theirs in zip(
        loaded.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert not any(
        k.endswith(".weight") and k.startswith(("first", "grouped"))
        for k in artifact.tensor_names(tmp_path)
    )


def test_layers_that_transformers_cannot_unpack_are_stored_dense(tmp_path):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    from curvprune.artifact import write_model

    layers = find_layers(model)
    original_option = Quantize(bits=4)
    assert artifact.form_of(model, layers["transformer.h.0.mlp.c_fc"], original_option) == "dense"
    assert (
        artifact.layer_bytes(model, layers["transformer.h.0.mlp.c_fc"], original_option)
        == 64 * 16 * 4
    )
    solved = compress_every_way(model, [n for n in layers if ".h." in n], [original_option])
    write_model(tmp_path, model, solved, {})
    ids = torch.arange(10)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_artifacts_and_exports_have_the_mode_that_the_umask_says(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        result = cp.quantize(tiny.llama(hidden=64, layers=1), batches(1), bits=4, group_size=16)
        result.save(tmp_path / "saved", tokenizer=tiny.byte_tokenizer())
        cp.export_dense(tmp_path / "saved", tmp_path / "dense")
        cp.export_gptq(tmp_path / "saved", tmp_path / "gptq")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 12
    assert {path.name for path in written if stat.S_IMODE(path.stat().st_mode) != mode} == set()


def test_the_manifest_is_what_it_was(tmp_path):
    """Its text, the hashes of the files beside it among it, and its own."""
    model = Convolutional()
    options = [Quantize(bits=4), Prune(sparsity=0.5)]
    solved = compress_every_way(model, ["head", "flat"], options)
    plan = {"bytes": 7, "predicted": 1e-05, "choices": {"head": "int4-pc-sym"}, "notes": ["é"]}
    artifact.save(tmp_path, model, find_layers(model), solved, plan)
    path = tmp_path / artifact.MANIFEST
    expected = {
        "format": "pack-quantized",
        "version": 2,
        "portable": True,
        "layers": {
            "head": {"option": "int4-pc-sym", "form": "packed"},
            "flat": {"option": "prune0.5", "form": "sparse"},
        },
        "plan": plan,
        "files": {
            artifact.WEIGHTS: hashlib.sha256((tmp_path / artifact.WEIGHTS).read_bytes()).hexdigest()
        },
    }
    canonical = json.dumps(expected, sort_keys=True).encode()
    expected["sha256"] = hashlib.sha256(canonical).hexdigest()
    assert path.read_text() == json.dumps(expected, indent=1) + "\n"
    whole = cp.load(tmp_path, model=Convolutional()).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"curvprune\.json is damaged"),
        ("[]", r"curvprune\.json was written by another version"),
        ('{"version": 1, "layers": {}}', r"another version of curvprune \(manifest 1, this one"),
        ('{"version": 2, "layers": 1, "plan": {}}', r"curvprune\.json does not hold a Manifest"),
        (
            '{"version": 2, "layers": {"a": {"option": "keep", "form": "woven"}}, "plan": {}}',
            r"layers\.a\.form",
        ),
    ],
)
def test_a_manifest_that_does_not_fit_is_named(text, message, tmp_path):
    model = Convolutional()
    artifact.save(tmp_path, model, find_layers(model), {}, {})
    (tmp_path / artifact.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        cp.load(tmp_path, model=Convolutional())
    assert str(tmp_path / "curvprune.json") in str(raised.value)


def test_damaged_or_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no curvprune\.json"):
        cp.load(tmp_path)
    model = Convolutional()
    solved = compress_every_way(model, ["head"], [Quantize(bits=4)])
    artifact.save(tmp_path, model, find_layers(model), solved, {})
    with pytest.raises(ValueError, match="pass model="):
        cp.load(tmp_path)

    class Other(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

    with pytest.raises(ValueError, match=r"layer head is \[3, 4\], the model has \(5, 4\)"):
        cp.load(tmp_path, model=Other())

    class More(Convolutional):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"no tensor for 'extra\.weight'"):
        cp.load(tmp_path, model=More())
    del model.table
    with pytest.raises(ValueError, match=r"'table\.weight' has no place"):
        cp.load(tmp_path, model=model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_load_with_the_very_weights_that_were_solved(tmp_path, dtype):
    model = tiny.llama(layers=1).to(dtype)
    data = batches(3)
    options = [
        Quantize(bits=4, group_size=16),
        Quantize(bits=8, symmetric=False),
        Quantize(bits=3, symmetric=False),
    ]
    for i, option in enumerate(options):
        result = cp.compress(model, data, options=[option], layers="model.layers.*")
        result.save(tmp_path / str(i))
        loaded = cp.load(tmp_path / str(i)).state_dict()
        for name, tensor in result.model.state_dict().items():
            assert loaded[name].dtype == tensor.dtype == dtype
            assert torch.equal(loaded[name], tensor), name


def test_a_folder_that_is_not_portable_packs_embeddings_and_says_so_to_transformers(tmp_path):
    """A tied 8-bit embedding lies packed on disk, comes back in a fresh process, and transformers
    refuses the folder instead of starting the missing weights at random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, 64, (2, 8))} for _ in range(4)]
    result = cp.quantize(model, data, bits=8, settings=cp.Settings(portable=False))
    result.save(tmp_path / "packed")
    names = artifact.tensor_names(tmp_path / "packed")
    assert "model.embed_tokens.weight_packed" in names and "model.embed_tokens.weight" not in names
    assert (
        sum(size for _, size in names.values())
        == result.plan.bytes
        < 0.3 * 4 * sum(p.numel() for p in model.parameters())
    )
    loaded = cp.load(tmp_path / "packed")
    assert (
        type(loaded) is LlamaForCausalLM
        and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    )
    with torch.no_grad():
        assert torch.equal(loaded(**data[0]).logits, result.model.eval()(**data[0]).logits)
    with pytest.raises(OSError, match="no file named"):
        LlamaForCausalLM.from_pretrained(tmp_path / "packed")


def test_a_t5_that_transformers_cannot_unpack_loads_from_a_folder_that_is_not_portable(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    ids = lambda: torch.randint(1, 50, (2, 6))  # noqa: E731
    data = [{"input_ids": ids(), "decoder_input_ids": ids()} for _ in range(4)]
    result = cp.quantize(
        model, data, bits=4, objective="label-free", settings=cp.Settings(portable=False)
    )
    loaded = cp.load(result.save(tmp_path / "packed"))
    with torch.no_grad():
        assert torch.equal(loaded(**data[0]).logits, result.model.eval()(**data[0]).logits)


@pytest.mark.parametrize("portable", [True, False])
def test_what_is_loaded_can_be_saved_as_an_ordinary_dense_model(portable, tmp_path):
    torch.manual_seed(0)
    model = tiny.llama()
    (batch,) = batches(1)
    result = cp.quantize(model, [batch], bits=4, settings=cp.Settings(portable=portable))
    result.save(tmp_path / "packed")
    cp.load(tmp_path / "packed").save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not hasattr(dense.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(dense(**batch).logits, result.model.eval()(**batch).logits)


@pytest.mark.parametrize("option", UNEVEN, ids=lambda option: option.key)
def test_what_compressed_tensors_lacks_comes_back_from_a_folder_that_is_not_portable(
    option, tmp_path
):
    model = tiny.llama(tied=False)
    (batch,) = batches(1)
    result = cp.compress(model, [batch], options=[option], settings=cp.Settings(portable=False))
    result.save(tmp_path)
    assert sum(size for _, size in artifact.tensor_names(tmp_path).values()) == result.plan.bytes
    names = artifact.tensor_names(tmp_path)
    assert all(f"{n}.weight_packed" in names for n in find_layers(model))
    dense, packed = cp.load(tmp_path), cp.load(tmp_path, packed=True)
    with torch.no_grad():
        expected = result.model.eval()(**batch).logits
        assert torch.equal(dense(**batch).logits, expected)
        torch.testing.assert_close(packed(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_prices_come_with_the_bytes_of_the_artifact_that_is_asked_for():
    model, option = tiny.llama(tied=False), Quantize(bits=1, group_size=20)
    data = batches(3)
    for portable, size in ((True, 256 * 32 * 4), (False, 256 * (4 + 2 * 2) + 16)):
        ledger = cp.price(model, data, options=[option], layers="lm_head", portable=portable)
        assert ledger.rows[0].bytes == size


def test_a_budget_is_spent_on_what_compressed_tensors_lacks(tmp_path):
    model = tiny.llama(tied=False)
    data = batches(10)
    result = cp.compress(
        model,
        data,
        options=UNEVEN[:4],
        budget=cp.Budget(max_bytes=25_000),
        settings=cp.Settings(portable=False),
        # any change may lower the loss of an untrained model, and one option for all win
        objective="label-free",
    )
    result.save(tmp_path)
    assert len(set(result.plan.choices.values())) > 1
    assert (
        sum(size for _, size in artifact.tensor_names(tmp_path).values())
        == result.plan.bytes
        <= 25_000
    )
    with torch.no_grad():
        assert torch.equal(
            cp.load(tmp_path)(**data[0]).logits, result.model.eval()(**data[0]).logits
        )


def test_compressed_tensors_has_no_shorter_last_group(tmp_path):
    """Why a portable artifact refuses one: plain transformers cannot unpack it."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=20)
    with pytest.raises(ValueError, match=r"divisble.*20.*32"):
        dequantize(torch.zeros(3, 32, dtype=torch.int8), torch.ones(3, 2), None, args)
    model = tiny.llama()
    (batch,) = batches(1)
    with pytest.raises(
        ValueError,
        match=r"q_proj: group_size=20 .* 32 inputs.*nearest that does: 16.*target: curvprune",
    ):
        cp.quantize(model, [batch], bits=4, group_size=20, layers="model.layers.*")
    # An embedding is stored dense in such an artifact, and no group needs to be whole.
    cp.quantize(model, [batch], bits=4, group_size=20, layers="model.embed_tokens").save(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_bit_is_dense_where_transformers_must_read_it(symmetric, tmp_path):
    model = tiny.llama(tied=False)
    (batch,) = batches(1)
    result = cp.quantize(model, [batch], bits=1, group_size=16, symmetric=symmetric)
    result.save(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(theirs(**batch).logits, result.model.eval()(**batch).logits)
        for packed in (False, True):
            assert torch.equal(
                cp.load(tmp_path, packed=packed)(**batch).logits, result.model(**batch).logits
            )
    weight = theirs.model.layers[0].mlp.up_proj.weight
    assert all(len(group.unique()) == 2 for group in weight.detach().reshape(-1, 16))


def test_an_artifact_for_vllm_holds_only_what_it_has_kernels_for(tmp_path):
    model = tiny.llama(tied=False)
    (batch,) = batches(1)
    settings = cp.Settings(portable="engines")
    with pytest.raises(
        (ValueError, TypeError), match="portable"
    ):  # these tests check types at run time as well
        cp.Settings(portable="engine")
    with pytest.raises(
        ValueError, match=r"q_proj: option int3-pc-sym: vLLM .* runs 3 bits .*nearest: 4"
    ):
        cp.quantize(model, [batch], bits=3, settings=settings)
    with pytest.raises(ValueError, match=r"down_proj: option int4-pc-sym: .*32 inputs, not 48"):
        cp.quantize(model, [batch], settings=settings)
    budget = cp.Budget(max_bytes=100_000)
    told = {"layers": "model.layers.*", "exclude": "*.down_proj"}
    result = cp.quantize(model, batches(10), budget=budget, settings=settings, **told)
    offered = {row.option for row in result.ledger.rows}
    assert offered == {"keep", "int4-pc-sym"}
    choices = result.plan.choices
    for block in ("model.layers.0", "model.layers.1"):
        assert len({choices[f"{block}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert choices[f"{block}.mlp.gate_proj"] == choices[f"{block}.mlp.up_proj"]
    result.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4}
    # vLLM wants every Linear layer to be a target or ignored.
    targets: set[str] = set()
    for group in config["config_groups"].values():
        targets.update(group["targets"])
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert targets | set(config["ignore"]) == linear and "lm_head" in config["ignore"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, result.model.eval()(**batch).logits)


@pytest.mark.parametrize("labels", [2, 8, 9])
def test_zero_points_of_few_outputs_are_readable_by_transformers(tmp_path, labels):
    """compressed-tensors cannot unpack a single row of packed zero points: each has a byte."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
        num_labels=labels,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    data = [
        {"input_ids": torch.randint(0, 50, (2, 12)), "labels": torch.randint(0, labels, (2,))}
        for _ in range(4)
    ]
    result = cp.quantize(model, data, bits=4, group_size=16, symmetric=False)
    folder = result.save(tmp_path / "out")
    assert artifact.read_manifest(folder).layers["classifier"].form == "blocks"
    layers = find_layers(model)
    promised = artifact.other_bytes(model, layers)
    for name, layer in layers.items():
        option = result.solved[name].option if name in result.solved else cp.Keep()
        promised += artifact.layer_bytes(model, layer, option)
    on_disk = sum(size for _, size in artifact.tensor_names(folder).values())
    assert on_disk == promised
    with torch.no_grad():
        ours = result.model(**data[0]).logits
        for again in (
            cp.load(folder),
            AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        ):
            assert torch.allclose(again(**data[0]).logits, ours, atol=1e-5)
