"""Sparse storage: bytes against a reader of our own, every kind of layer in a fresh process, in
memory, damage."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import curvprune as cp
from curvprune import artifact
from curvprune.artifact import SparseWeight, write_model
from curvprune.cli import app
from curvprune.compression import Moments, Solved, solve, solve_layer
from curvprune.model import find_layers
from curvprune.options import kept_weights
from tests import tiny
from tests.fresh import in_fresh_process, logits_of_saved
from tests.test_artifact import batches, bytes_held, compress_every_way

HALF = cp.Prune(sparsity=0.5)
OURS = cp.Settings(portable=False)
SPARSE = [
    HALF,
    cp.Prune(sparsity=1 / 3),
    cp.Prune(pattern="1:3"),
    cp.PruneCast(prune=cp.Prune(sparsity=0.9), cast=cp.Cast(dtype="float16")),
    cp.PruneCast(prune=cp.Prune(pattern="2:4"), cast=cp.Cast(dtype="bfloat16")),
    cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=4, group_size=7)),
    cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=5, symmetric=False)),
    cp.PruneQuantize(
        prune=cp.Prune(pattern="1:4"), quantize=cp.Quantize(bits=2, group_size=16, symmetric=False)
    ),
    cp.PruneQuantize(prune=cp.Prune(sparsity=0.8), quantize=cp.Quantize(bits=8)),
]


def expand(tensors: dict, name: str, bits: int | None, group_size: int | None) -> np.ndarray:
    """A sparse layer, read bit by bit with code that shares nothing with the package's."""
    out, width = tensors[f"{name}.weight_shape"].tolist()
    mask = tensors[f"{name}.weight_bitmask"].tolist()
    kept = [(mask[i // 8] >> (i % 8)) & 1 for i in range(out * width)]
    weight = np.zeros((out, width))
    if bits is None:
        values = iter(tensors[f"{name}.weight_values"].double().tolist())
    else:
        words = [w & 0xFFFFFFFF for w in tensors[f"{name}.weight_packed"].tolist()]
        stream = sum(word << (32 * i) for i, word in enumerate(words))
        values = iter(
            [
                ((stream >> (bits * i)) & ((1 << bits) - 1)) - (1 << (bits - 1))
                for i in range(sum(kept))
            ]
        )
    for place in np.flatnonzero(kept):
        row, column = divmod(int(place), width)
        value = next(values)
        if bits is not None:
            group = 0 if group_size is None else column // group_size
            if f"{name}.weight_zero_point" in tensors:
                words = [
                    w & 0xFFFFFFFF for w in tensors[f"{name}.weight_zero_point"][:, group].tolist()
                ]
                stream = sum(word << (32 * i) for i, word in enumerate(words))
                value -= ((stream >> (bits * row)) & ((1 << bits) - 1)) - (1 << (bits - 1))
            value *= float(tensors[f"{name}.weight_scale"][row, group])
        weight[row, column] = value
    assert next(values, None) is None
    return weight


@pytest.mark.parametrize("option", SPARSE, ids=lambda o: o.key)
@pytest.mark.parametrize("shape", [(5, 24), (6, 36), (1, 12)])
def test_another_reader_finds_the_solved_weights_in_the_bytes_that_were_promised(option, shape):
    torch.manual_seed(0)
    layer = find_layers(nn.Sequential(nn.Linear(shape[1], shape[0])))["0"]
    x = torch.randn(100, shape[1])
    solved = solve(layer.weight.detach(), [option], x.t() @ x, layer="0")[0]
    tensors = artifact.stored_tensors(layer, solved, form="sparse")
    quantize = getattr(option, "quantize", None)
    found = expand(tensors, "0", quantize and quantize.bits, quantize and quantize.group_size)
    assert np.array_equal(found, solved.weight.double().numpy())
    assert (found == 0).sum() >= layer.numel - kept_weights(getattr(option, "prune", option), shape)


def test_how_many_weights_are_kept_is_known_before_anything_is_solved():
    """Of each group of a grouped convolution or each expert its own share, by the rounding of
    Python's ``round``."""
    assert kept_weights(HALF, (5, 5)) == 25 - 12
    assert kept_weights(HALF, (10, 5), groups=2) == 2 * (25 - 12)
    assert kept_weights(cp.Prune(pattern="3:8"), (7, 16)) == 42
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(6, 9, 3, groups=3))
    layer = find_layers(conv)["0"]
    x = torch.randn(3, 60, 18)
    for sparsity in (0.5, 0.17, 1 / 3, 0.99):
        solved = solve_layer(layer, [cp.Prune(sparsity=sparsity)], Moments(x.transpose(1, 2) @ x))[
            0
        ]
        assert int((solved.weight != 0).sum()) == kept_weights(solved.option, layer.shape, groups=3)


def models() -> dict[str, tuple[nn.Module, dict]]:
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(0, 64, (2, 8))}
    mixtral = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    gpt2 = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    convnext = ConvNextConfig(
        hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, num_labels=5, image_size=32
    )
    return {
        "tied llama": (tiny.llama(), {"input_ids": torch.randint(0, 256, (2, 8))}),
        "gpt2": (GPT2LMHeadModel(gpt2), ids),
        "mixtral": (MixtralForCausalLM(mixtral), ids),
        "convnext": (
            ConvNextForImageClassification(convnext),
            {"pixel_values": torch.randn(2, 3, 32, 32)},
        ),
    }


def test_every_kind_of_layer_comes_back_in_a_fresh_process(tmp_path):
    """Linear, tied embeddings, Conv1D, stacked experts, grouped and depthwise convolutions; every
    kind of option."""
    options = [
        HALF,
        cp.PruneCast(prune=HALF, cast=cp.Cast(dtype="float16")),
        cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=4, group_size=16, symmetric=False)),
        cp.PruneQuantize(prune=cp.Prune(sparsity=0.7), quantize=cp.Quantize(bits=6)),
    ]
    expected = {}
    for name, (model, batch) in models().items():
        layers = find_layers(model.eval())
        solved = compress_every_way(model, list(layers), options)
        folder = tmp_path / name
        write_model(folder, model, solved, {}, portable=False)
        on_disk = artifact.tensor_names(folder)
        stored = sum(size for _, size in on_disk.values())
        promised = artifact.other_bytes(model, layers)
        for key, one in solved.items():
            promised += artifact.layer_bytes(model, layers[key], one.option, portable=False)
        assert stored == promised, name
        assert sum(n.endswith(".weight_bitmask") for n in on_disk) > 0.8 * len(layers), name
        header = artifact.weights_file(folder).stat().st_size - stored
        assert header <= artifact.header_bytes(model, layers), name
        save_file({k: v.contiguous() for k, v in batch.items()}, f"{folder}.batch")
        with torch.no_grad():
            expected[str(folder)] = model(**batch).logits
    cases = list(product(expected, (False, True)))
    for case, logits in zip(cases, in_fresh_process(logits_of_saved, cases), strict=True):
        assert torch.equal(torch.from_numpy(logits), expected[case[0]]), case


@pytest.mark.parametrize(
    ("option", "share"),
    [
        (
            cp.PruneCast(prune=HALF, cast=cp.Cast(dtype="float16")),
            0.35,
        ),  # (1 + 8) / 32 bits, and what is not pruned
        (cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=4)), 0.15),  # (1 + 2) / 32 bits
    ],
    ids=lambda x: getattr(x, "key", ""),
)
def test_sparse_weights_stay_sparse_in_memory(option, share, tmp_path):
    model = tiny.llama(hidden=64)
    (batch,) = batches(1)
    cp.compress(model, [batch], options=[option], settings=OURS).save(tmp_path)
    dense, packed = cp.load(tmp_path), cp.load(tmp_path, packed=True)
    assert bytes_held(packed) < share * bytes_held(dense)
    with torch.no_grad():
        assert torch.equal(packed(**batch).logits, dense(**batch).logits)
    made = [
        m.generate(batch["input_ids"][:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        for m in (dense, packed)
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("option", SPARSE, ids=lambda o: o.key)
def test_rows_of_a_weight_in_memory(option):
    torch.manual_seed(0)
    weight = torch.randn(7, 12)
    weight[3] = 0
    solved = solve(weight, [option], layer="a")[0]
    layer = find_layers(nn.Sequential(nn.Linear(12, 7)))["0"]
    mask = artifact.stored_tensors(layer, solved, form="sparse")["0.weight_bitmask"].numpy()
    bits = np.unpackbits(mask, bitorder="little")[: layer.numel]
    kept = torch.from_numpy(bits.astype(bool)).view(layer.shape)
    quantize = getattr(option, "quantize", None)
    matrix = solved.weight if solved.codes is None else solved.codes
    one = SparseWeight(matrix, kept, solved.scale, solved.zero, quantize, torch.float32)
    assert torch.equal(one.rows(), solved.weight)
    some = torch.tensor([6, 3, 0, 6])
    assert torch.equal(one.rows(some), solved.weight[some])


def test_the_smaller_form_is_taken_and_known_beforehand():
    model = tiny.llama()
    layer = find_layers(model)["model.layers.0.mlp.up_proj"]
    form = lambda o: artifact.form_of(model, layer, o, portable=False)  # noqa: E731
    # One bit a weight and two int64 of shape, against what the pruned weights would take.
    assert form(cp.Prune(sparsity=0.02)) == "dense" and form(cp.Prune(sparsity=0.05)) == "sparse"
    assert (
        form(cp.PruneCast(prune=cp.Prune(sparsity=0.05), cast=cp.Cast(dtype="float16"))) == "dense"
    )
    assert form(cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=2))) == "packed"
    assert form(cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=3))) == "sparse"
    assert artifact.form_of(model, layer, HALF) == "dense"
    assert (
        artifact.form_of(model, layer, cp.PruneQuantize(prune=HALF, quantize=cp.Quantize(bits=4)))
        == "packed"
    )
    assert (
        artifact.form_of(nn.Sequential(nn.Linear(2, 2)), layer, HALF) == "sparse"
    )  # no other reader to think of


def test_zeros_that_were_there_before_are_stored_as_if_they_were_not(tmp_path):
    """A weight of zeros, and values that a narrower type rounds to zero: the size stays what the
    ledger said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1)
        model[2].weight.mul_(1e-9)
    batch = (torch.randn(5, 16), torch.zeros(5, dtype=torch.long))
    option = cp.PruneCast(prune=HALF, cast=cp.Cast(dtype="float16"))
    result = cp.compress(model, [batch], options=[option])
    result.save(tmp_path)
    assert sum(size for _, size in artifact.tensor_names(tmp_path).values()) == result.plan.bytes
    assert "2.weight_bitmask" in artifact.tensor_names(tmp_path)
    loaded = cp.load(tmp_path, model=nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    assert not loaded[0].weight.any() and not loaded[2].weight.any()


def test_a_budget_chooses_among_sparse_and_packed_layers_by_bytes_on_disk(tmp_path):
    model = tiny.llama(tied=False)
    data = batches(10)
    options = [
        HALF,
        cp.PruneCast(prune=HALF, cast=cp.Cast(dtype="float16")),
        cp.PruneQuantize(prune=cp.Prune(pattern="2:4"), quantize=cp.Quantize(bits=4)),
        cp.Quantize(bits=2),
    ]
    result = cp.compress(
        model, data, options=options, budget=cp.Budget(max_bytes=42_000), settings=OURS
    )
    result.save(tmp_path)
    layers = artifact.read_manifest(tmp_path).layers.values()
    assert {"sparse", "packed"} <= {layer.form for layer in layers}
    on_disk = artifact.tensor_names(tmp_path)
    assert sum(size for _, size in on_disk.values()) == result.plan.bytes
    assert (artifact.weights_file(tmp_path)).stat().st_size <= 42_000
    for name, key in result.plan.choices.items():
        mine = sum(size for n, (_, size) in on_disk.items() if n.startswith(f"{name}.weight"))
        assert mine == result.ledger.layer_rows(name)[key].bytes, (name, key)
    with torch.no_grad():
        assert torch.equal(
            cp.load(tmp_path)(**data[0]).logits, result.model.eval()(**data[0]).logits
        )


def test_a_portable_artifact_says_what_its_zeros_cost(tmp_path):
    model = tiny.llama(tied=False)
    (batch,) = batches(1)
    portable = cp.prune(model, [batch], sparsity=0.5)
    numel = sum(layer.numel for layer in find_layers(model).values())
    assert len(portable.plan.notes) == 1
    assert (
        f"zeros of {len(find_layers(model))} pruned layer(s) are stored" in portable.plan.notes[0]
    )
    assert (
        f"{4 * numel / 1e6:.1f} MB" in portable.plan.notes[0]
        and "target: curvprune" in portable.plan.notes[0]
    )
    portable.save(tmp_path / "portable")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "portable").eval()
    assert torch.equal(theirs(**batch).logits, portable.model.eval()(**batch).logits)
    assert cp.prune(model, [batch], sparsity=0.5, settings=OURS).plan.notes == ()
    assert cp.quantize(model, [batch], bits=4).plan.notes == ()


def test_what_is_kept_may_be_cast_in_a_portable_artifact_too(tmp_path):
    model = tiny.llama(tied=False)
    (batch,) = batches(1)
    result = cp.prune(model, [batch], pattern="2:4", dtype="float16", layers="model.layers.*")
    assert set(result.plan.choices.values()) == {"prune2:4+float16"}
    result.save(tmp_path)
    assert sum(size for _, size in artifact.tensor_names(tmp_path).values()) == result.plan.bytes
    weight = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float16 and int((weight.reshape(-1, 4) != 0).sum(1).max()) == 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(theirs(**batch).logits, result.model.eval()(**batch).logits)
    with pytest.raises(
        ValueError,
        match=r"layer 0: option prune0\.5\+float16: weights overflow float16; cast to bfl",
    ):
        cp.prune(
            nn.Sequential(huge()),
            [(torch.randn(4, 4), torch.zeros(4).long())],
            sparsity=0.5,
            dtype="float16",
        )
    with pytest.raises(ValueError, match="unknown dtype 'int8'; choose float16 or bfloat16"):
        cp.prune(model, [batch], sparsity=0.5, dtype="int8")
    with pytest.raises(ValueError, match="structured goes without"):
        cp.prune(model, [batch], structured=0.5, dtype="float16")


def huge() -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight.data.mul_(1e6)
    return linear


@pytest.mark.parametrize("option", [SPARSE[0], SPARSE[5]], ids=lambda o: o.key)
def test_damage_is_found_and_named(option, tmp_path):
    batch = (torch.randn(5, 12), torch.zeros(5, dtype=torch.long))
    cp.compress(nn.Sequential(nn.Linear(12, 5)), [batch], options=[option]).save(tmp_path)
    path = tmp_path / artifact.WEIGHTS
    whole = load_file(path)

    def broken(message: str, **changes: torch.Tensor | None) -> None:
        tensors = {**whole, **{f"0.weight_{k}": v for k, v in changes.items()}}
        save_file({k: v for k, v in tensors.items() if v is not None}, path)
        with pytest.raises(ValueError, match=rf"model\.safetensors: layer 0{message}"):
            cp.load(tmp_path, model=nn.Sequential(nn.Linear(12, 5)), verify=False)

    mask = whole["0.weight_bitmask"]
    flipped = mask.clone()
    flipped[2] ^= 4
    broken(
        r": its bitmask keeps (29|31) weights, not what prune0\.5.* keeps; the file is damaged",
        bitmask=flipped,
    )
    spare = mask.clone()
    lowest = int(mask[2]) & -int(mask[2])
    spare[2] ^= lowest
    spare[-1] |= 128  # 60 weights leave four bits of the last byte unused
    broken(": its bitmask keeps 30 weights, not what", bitmask=spare)
    broken(r": its weight_bitmask is uint8 \[7\], expected uint8 \[8\]", bitmask=mask[:7].clone())
    broken(" lacks its weight_bitmask", bitmask=None)
    broken(r" is \[5, 13\], the model has \(5, 12\)", shape=torch.tensor([5, 13]))
    values = "packed" if "0.weight_packed" in whole else "values"
    broken(
        rf": its weight_{values} is \w+ \[\d+\], expected .*\[\d+\]",
        **{values: whole[f"0.weight_{values}"][:-1].clone()},
    )
    broken(f" lacks its weight_{values}", **{values: None})


def test_a_solution_with_too_few_zeros_is_not_written():
    layer = find_layers(nn.Sequential(nn.Linear(4, 4)))["0"]
    solved = Solved(option=HALF, weight=torch.ones(4, 4))
    with pytest.raises(
        ValueError, match=r"layer 0: 16 of 16 weights are not zero, but option prune0\.5 keeps 8"
    ):
        artifact.stored_tensors(layer, solved, form="sparse")


@pytest.mark.parametrize("portable", [True, False])
def test_dense_export_is_an_ordinary_model(portable, tmp_path):
    from typer.testing import CliRunner

    model = tiny.llama()
    (batch,) = batches(1)
    result = cp.prune(model, [batch], sparsity=0.5, settings=cp.Settings(portable=portable))
    result.save(tmp_path / "sparse", tokenizer=tiny.byte_tokenizer())
    ended = CliRunner().invoke(
        app, ["export", str(tmp_path / "sparse"), str(tmp_path / "dense"), "--format", "dense"]
    )
    assert ended.exit_code == 0, ended.output
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        assert torch.equal(theirs(**batch).logits, result.model.eval()(**batch).logits)
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    assert not (tmp_path / "dense" / artifact.MANIFEST).exists()
    with pytest.raises(ValueError, match="is not empty"):
        cp.export_dense(tmp_path / "sparse", tmp_path / "dense")
    with pytest.raises(ValueError, match="lacks a manifest"):
        cp.export_dense(tmp_path / "dense", tmp_path / "again")


def test_shapes_that_no_config_describes_are_not_exported(tmp_path):
    pytest.importorskip("torch_pruning")
    model = tiny.llama()
    data = batches(3)
    result = cp.prune(model, data, structured=0.2)
    assert not result.portable
    with pytest.raises(ValueError, match=r"no config describes its shapes.*uniform=True"):
        cp.export_dense(result.save(tmp_path / "pruned"), tmp_path / "dense")


def test_gptq_export_reads_a_sparse_artifact(tmp_path):
    """The same checkpoint from a sparse and from a packed artifact."""
    model = tiny.llama(tied=False, hidden=64)
    (batch,) = batches(1)
    option = cp.PruneQuantize(
        prune=HALF, quantize=cp.Quantize(bits=4, group_size=16, symmetric=False)
    )
    written = []
    for portable in (True, False):
        result = cp.compress(
            model,
            [batch],
            options=[option],
            layers="model.layers.*",
            settings=cp.Settings(portable=portable),
        )
        folder = result.save(tmp_path / f"{portable}")
        written.append(
            load_file(cp.export_gptq(folder, tmp_path / f"gptq {portable}") / "model.safetensors")
        )
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])
