"""ONNX files against the operators' own specification, unpacked here bit by bit, and run in ONNX
Runtime against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

import curvprune as cp
from curvprune import artifact
from curvprune.cli import app
from curvprune.compression import Moments, solve_layer
from curvprune.model import find_layers
from curvprune.options import Cast, Option, Prune, PruneQuantize, Quantize
from curvprune.targets import target_named
from tests import tiny

onnx = pytest.importorskip("onnx", reason="needs the extra: pip install 'curvprune[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'curvprune[onnx]'")
pytest.importorskip("onnxscript", reason="needs the extra: pip install 'curvprune[onnx]'")


def saved(folder: Path, model: nn.Module, options: dict[str, Option], **how) -> Path:
    """An artifact of a model whose layers have these options; the model holds the result."""
    layers, solved = find_layers(model), {}
    draws = torch.Generator().manual_seed(0)
    for name, option in options.items():
        layer = layers[name]
        x = torch.randn(layer.groups, 4 * layer.shape[1], layer.shape[1], generator=draws)
        solved[name] = solve_layer(layer, [option], Moments(x.transpose(1, 2) @ x))[0]
        layer.write_(solved[name].weight)
    artifact.write_model(folder, model, solved, {}, portable=how.pop("portable", False))
    return folder


def linear_layers(model: nn.Module, option: Option) -> dict[str, Option]:
    return {n: option for n, layer in find_layers(model).items() if layer.kind == "linear"}


def tensors_of(graph) -> dict[str, np.ndarray]:
    return {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}


def bits_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers of ``bits`` bits, the first in the lowest bits of a byte."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")
    parts = stream.reshape(*packed.shape[:-1], -1, bits).astype(np.int64)
    return (parts << np.arange(bits)).sum(axis=-1)


def weight_of(node, tensors: dict[str, np.ndarray], casts: dict[str, str]) -> np.ndarray:
    """``(code - zero) * scale`` of a MatMulNBits node, by its specification."""
    numbers = {one.name: one.i for one in node.attribute}
    out, width, bits = numbers["N"], numbers["K"], numbers["bits"]
    codes, scale = tensors[node.input[1]], tensors[casts[node.input[2]]]
    blocks = -(-width // numbers["block_size"])
    assert codes.shape == (out, blocks, numbers["block_size"] * bits // 8)
    assert scale.shape == (out, blocks)
    zero = np.full((out, blocks), 1 << (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        packed = tensors[node.input[3]]
        assert packed.shape == (out, -(-blocks * bits // 8))
        zero = bits_of(packed, bits)[:, :blocks]
    values = (bits_of(codes, bits) - zero[..., None]) * scale.astype(np.float64)[..., None]
    return values.reshape(out, -1)[:, :width]


def weights_of(path: Path) -> tuple[list[np.ndarray], list[int]]:
    """All weights that a file multiplies as codes, in order, and the widths of their codes."""
    graph = onnx.load(path).graph
    tensors = tensors_of(graph)
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    bits = [one.i for node in nodes for one in node.attribute if one.name == "bits"]
    return [weight_of(node, tensors, casts) for node in nodes], bits


def count(path: Path, kind: str) -> int:
    return sum(node.op_type == kind for node in onnx.load(path).graph.node)


def run(path: Path, **inputs: torch.Tensor) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip(names, found, strict=True))


GRIDS = [
    Quantize(bits=1, group_size=16),
    Quantize(bits=2, group_size=16),
    Quantize(bits=2, group_size=32, symmetric=False),
    Quantize(bits=3, group_size=48, symmetric=False),
    Quantize(bits=4),
    Quantize(bits=4, symmetric=False),
    Quantize(bits=4, group_size=512),
    Quantize(bits=5, group_size=80),
    Quantize(bits=7, group_size=64, symmetric=False),
    Quantize(bits=8, group_size=128),
    Quantize(bits=8, symmetric=False),
    PruneQuantize(prune=Prune(sparsity=0.9), quantize=Quantize(bits=4, group_size=16)),
    PruneQuantize(
        prune=Prune(sparsity=0.9), quantize=Quantize(bits=4, group_size=16, symmetric=False)
    ),
]


def test_every_grid_is_held_exactly_and_takes_the_bytes_that_plans_count(tmp_path):
    """One model with a layer for each grid; 72 inputs fill no block of more than 8."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(72, 72, bias=i % 2 == 0) for i in range(len(GRIDS))])
    options = {str(i): grid for i, grid in enumerate(GRIDS)}
    folder = saved(tmp_path / "model", model, options)
    out = cp.export_onnx(folder, tmp_path / "it.onnx", model=model, inputs=torch.randn(5, 72))
    weights, bits = weights_of(out)
    assert bits == [2, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 4, 4]
    for layer, weight in zip(model, weights, strict=True):
        assert np.array_equal(weight, layer.weight.detach().double().numpy())
    x = torch.randn(3, 72)
    got, want = run(out, input=x)["output"], model(x).detach().numpy()
    assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    # The ledger's bytes are those of the tensors.
    target, layers = target_named("onnx"), find_layers(model)
    counted = sum(target.layer_bytes(model, layers[n], options[n]) for n in layers)
    biases = target.other_bytes(model, layers)
    held = sum(tensor.nbytes for tensor in tensors_of(onnx.load(out).graph).values())
    assert held == counted + biases
    assert held < out.stat().st_size <= counted + biases + target.header_bytes(model, layers)


def small(kind: type[nn.Module], config: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def check_bytes(path: Path, model: nn.Module, options: dict[str, Option]) -> None:
    """What the planner counts is at least the file, and not far above its tensors."""
    target, layers = target_named("onnx"), find_layers(model)
    keep = {name: options.get(name, cp.Keep()) for name in layers}
    counted = sum(target.layer_bytes(model, layers[n], option) for n, option in keep.items())
    counted += target.other_bytes(model, layers)
    assert path.stat().st_size <= counted + target.header_bytes(model, layers)
    held = sum(tensor.nbytes for tensor in tensors_of(onnx.load(path).graph).values())
    assert held < counted + 8000


def one_by_one(path: Path, tokens: torch.Tensor, blocks: int, width: int) -> np.ndarray:
    """Logits of a text, one token at a time, each with the keys and values of those before."""
    places = [f"{block}.{part}" for block in range(blocks) for part in ("key", "value")]
    past = {f"past_key_values.{place}": torch.zeros(1, 1, 0, width) for place in places}
    found = []
    for t in range(tokens.shape[1]):
        given = run(
            path,
            input_ids=tokens[:, t : t + 1],
            attention_mask=torch.ones(1, t + 1, dtype=torch.long),
            position_ids=torch.tensor([[t]]),
            **past,
        )
        found.append(given["logits"])
        past = {f"past_key_values.{p}": torch.from_numpy(given[f"present.{p}"]) for p in places}
    return np.concatenate(found, axis=1)


def far(got: np.ndarray, want: torch.Tensor) -> float:
    return float(np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy()))


@torch.no_grad()
def test_a_decoder_gives_token_by_token_what_it_gives_at_once(tmp_path):
    """Its head is its embedding, whose rows do not fill their blocks."""
    model = tiny.llama(hidden=40, layers=1)
    options = linear_layers(model, Quantize(bits=4, group_size=32))
    options["model.embed_tokens"] = Quantize(bits=8, group_size=32, symmetric=False)
    folder = saved(tmp_path / "model", model, options)
    out = cp.export_onnx(folder, tmp_path / "it.onnx")
    assert (count(out, "GatherBlockQuantized"), count(out, "MatMulNBits")) == (1, 8)
    check_bytes(out, model, options)
    tokens = torch.randint(0, 256, (1, 6), generator=torch.Generator().manual_seed(0))
    want = cp.load(folder)(input_ids=tokens).logits
    assert far(one_by_one(out, tokens, 1, 20), want) < 1e-4
    loss = nn.functional.cross_entropy(want[0, :-1], tokens[0, 1:])
    found = torch.from_numpy(one_by_one(out, tokens, 1, 20))
    assert abs(nn.functional.cross_entropy(found[0, :-1], tokens[0, 1:]) - loss) < 1e-4


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_16_bits_keeps_them_beside_its_codes(tmp_path, dtype):
    model = tiny.llama(tied=False).to(dtype)
    options = linear_layers(model, Quantize(bits=2, group_size=16))
    options["model.layers.0.mlp.up_proj"] = Cast(dtype="bfloat16")
    folder = saved(tmp_path / "model", model, options)
    out = cp.export_onnx(folder, tmp_path / "it.onnx", cache=False)
    check_bytes(out, model, options)
    tokens = torch.arange(8)[None]
    got = run(out, input_ids=tokens, attention_mask=torch.ones_like(tokens))["logits"]
    # What is loaded has been rounded to 16 bits once more.
    assert far(got, cp.load(folder).float()(input_ids=tokens).logits) < 2e-2


@pytest.mark.slow
@torch.no_grad()
def test_an_encoder_takes_batches_and_sequences_of_any_length(tmp_path):
    """A portable folder, whose zero points have a byte each, with the embedding dense."""
    config = BertConfig(
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 48, "vocab_size": 100},
    )
    model = small(BertModel, config)
    options = linear_layers(model, Quantize(bits=4, group_size=16, symmetric=False))
    folder = saved(tmp_path / "model", model, options, portable=True)
    out = cp.export_onnx(folder, tmp_path / "it.onnx")
    assert count(out, "MatMulNBits") == 13
    check_bytes(out, model, options)
    for items, length in ((1, 1), (5, 9)):
        inputs = {"input_ids": torch.randint(0, 100, (items, length))}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][-1, 1:] = 0
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        got = run(out, **inputs)["last_hidden_state"]
        assert far(got, cp.load(folder)(**inputs).last_hidden_state) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_weights_of_inputs_by_outputs_are_held_turned(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    model = small(GPT2LMHeadModel, config)
    grid = Quantize(bits=4, group_size=16)
    options = {n: grid for n, one in find_layers(model).items() if one.kind == "conv1d"}
    folder = saved(tmp_path / "model", model, options)
    out = cp.export_onnx(folder, tmp_path / "it.onnx", cache=False)
    assert count(out, "MatMulNBits") == 4
    tokens = torch.arange(7)[None]
    got = run(out, input_ids=tokens, attention_mask=torch.ones_like(tokens))["logits"]
    assert far(got, cp.load(folder)(input_ids=tokens).logits) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_a_vision_model_needs_no_inputs(tmp_path):
    config = ViTConfig(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 48, "image_size": 32, "patch_size": 8},
    )
    model = small(ViTForImageClassification, config)
    options = {name: Quantize(bits=8, group_size=32) for name in find_layers(model)}
    folder = saved(tmp_path / "model", model, options)
    out = cp.export_onnx(folder, tmp_path / "it.onnx")
    assert count(out, "MatMulNBits") == 7
    images = torch.randn(3, 3, 32, 32)
    assert far(run(out, pixel_values=images)["logits"], cp.load(folder)(images).logits) < 1e-5


class Net(nn.Module):
    """A convolution, attention whose projection is read without its module, two uses of one
    weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 32, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.one = nn.Linear(32, 32)
        self.two = nn.Linear(32, 32, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.conv(x).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.two(torch.relu(self.one(h))), h.mean(dim=1)


@pytest.mark.slow
@torch.no_grad()
def test_a_portable_folder_with_its_head_as_floats_gives_the_same_codes(tmp_path):
    """The head is the embedding, which such a folder holds dense."""
    for symmetric in (True, False):
        model = tiny.llama(layers=1)
        grid = Quantize(bits=8, group_size=16, symmetric=symmetric)
        options = {"model.embed_tokens": grid}
        folder = saved(tmp_path / f"{symmetric}", model, options, portable=True)
        out = cp.export_onnx(folder, tmp_path / f"{symmetric}.onnx", cache=False)
        (head,), bits = weights_of(out)
        assert bits == [8] and count(out, "GatherBlockQuantized") == 1
        assert np.array_equal(head, model.lm_head.weight.detach().double().numpy())


@torch.no_grad()
def test_a_module_of_ones_own_keeps_its_other_layers_dense(tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 3, 10)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    compressed = Net().eval()
    compressed.load_state_dict(before)
    options = {name: Quantize(bits=4, group_size=16) for name in find_layers(model)}
    folder = saved(tmp_path / "model", compressed, options)
    out = cp.export_onnx(folder, tmp_path / "it.onnx", model=model, inputs=x)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert count(out, "MatMulNBits") == 3
    x = torch.randn(4, 3, 10)
    for got, want in zip(run(out, input=x).values(), compressed(x), strict=True):
        assert far(got, want) < 1e-5
    # The same with inputs rounded to eight bits: near, and not the same.
    level = cp.export_onnx(folder, tmp_path / "level.onnx", model=model, inputs=x, accuracy_level=4)
    assert 1e-4 < far(run(level, input=x)["output.0"], compressed(x)[0]) < 5e-2


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.rand(16)


def test_a_file_that_gives_something_else_is_not_left(tmp_path):
    folder = saved(tmp_path / "model", Noise(), {"linear": Quantize(bits=4, group_size=16)})
    with pytest.raises(ValueError, match=r"Noise: output output differs by .* no file is left"):
        cp.export_onnx(
            folder, tmp_path / "files" / "it.onnx", model=Noise(), inputs=torch.ones(2, 16)
        )
    assert list((tmp_path / "files").iterdir()) == []


def test_groups_that_no_block_divides_are_written_dense_with_a_warning(tmp_path):
    model = nn.Sequential(nn.Linear(48, 8))
    folder = saved(tmp_path / "model", model, {"0": Quantize(bits=4, group_size=24)})
    with pytest.warns(UserWarning, match=r"layer 0: written dense, .* groups of 16, 32"):
        out = cp.export_onnx(folder, tmp_path / "it.onnx", model=model, inputs=torch.ones(2, 48))
    assert count(out, "MatMulNBits") == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (Quantize(bits=3), r"layer 0: option int3-pc-sym: .* bytes of 4; nearest: 4"),
        (Quantize(bits=5, group_size=32), r"nearest: 8 \(or target: curvprune\)"),
        (Quantize(bits=4, group_size=24), r"multiples of 16, .* not 24; nearest: 32"),
        (Quantize(bits=4, group_size=8), r"not 8; nearest: 16"),
    ],
)
def test_options_that_no_file_holds_are_refused_before_anything_runs(option, message):
    model = nn.Sequential(nn.Linear(48, 8))
    with pytest.raises(ValueError, match=message):
        cp.compress(
            model,
            [(torch.ones(2, 48), torch.zeros(2, dtype=torch.long))],
            options=[option],
            settings=cp.Settings(target="onnx"),
        )


def test_what_cannot_be_exported_is_refused_with_a_way_on(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8))
    folder = saved(tmp_path / "own", model, {"0": Quantize(bits=4)})
    out, x = tmp_path / "it.onnx", torch.ones(2, 16)
    with pytest.raises(ValueError, match=r"expected the name of a new file that ends in .onnx"):
        cp.export_onnx(folder, tmp_path / "it", model=model, inputs=x)
    with pytest.raises(ValueError, match=r"is of a module of your own; pass model="):
        cp.export_onnx(folder, out)
    with pytest.raises(ValueError, match=r"accuracy_level=2: expected 0 \(exact\) or 4"):
        cp.export_onnx(folder, out, model=model, inputs=x, accuracy_level=2)
    with pytest.raises(ValueError, match=r"axes: no input is called 'y'"):
        cp.export_onnx(folder, out, model=model, inputs={"x": x}, axes={"y": {0: "batch"}})
    with pytest.raises(ValueError, match=r"is not an artifact: it lacks curvprune.json"):
        cp.export_onnx(tmp_path, out, model=model, inputs=x)
    with pytest.raises(ValueError, match=r"inputs: expected inputs of Sequential"):
        cp.export_onnx(folder, out, model=model)
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"is there already; export into a new file"):
        cp.export_onnx(folder, out, model=model, inputs=x)
    assert out.read_text() == "mine"


def test_models_of_unknown_inputs_and_caches_that_forget_are_refused(tmp_path):
    size = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(
        **size, intermediate_size=32, num_hidden_layers=1, vocab_size=64, sliding_window=4
    )
    model = small(MistralForCausalLM, config)
    grid = Quantize(bits=4, group_size=16)
    folder = saved(tmp_path / "mistral", model, {"model.layers.0.mlp.up_proj": grid})
    with pytest.raises(ValueError, match=r"cache of MistralForCausalLM .* pass cache=False"):
        cp.export_onnx(folder, tmp_path / "it.onnx")
    config = T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    t5 = small(T5ForConditionalGeneration, config)
    folder = saved(tmp_path / "t5", t5, {"shared": grid})
    with pytest.raises(ValueError, match=r"it has an encoder and a decoder\); pass inputs="):
        cp.export_onnx(folder, tmp_path / "it.onnx")


@pytest.mark.slow
def test_the_command_writes_a_file(tmp_path):
    model = tiny.llama(tied=False, layers=1)
    folder = saved(tmp_path / "model", model, linear_layers(model, Quantize(bits=4)))
    out = tmp_path / "it.onnx"
    told = CliRunner().invoke(app, ["export", str(folder), str(out), "--target", "onnx"])
    assert told.exit_code == 0, told.output
    assert count(out, "MatMulNBits") == 8
