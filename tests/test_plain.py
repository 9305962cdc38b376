"""Models as users hand them over: wrapped, compiled, checkpointed, sharded, offloaded, adapted."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import curvprune as cp


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(48, 8, generator=draw), torch.randint(3, (48,), generator=draw))]


def compiled_within(model: nn.Sequential) -> nn.Sequential:
    model.compile(backend="eager")
    model[2].compile(backend="eager")
    return model


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "compile in place": compiled_within,
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled DDP": lambda m: torch.compile(
        nn.parallel.DistributedDataParallel(m), backend="eager"
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_is_wrapped_gives_the_figures_and_weights_of_what_is_inside(wrap, data, one_process):
    plain, wrapped = network(), wrap(network())
    budget = cp.Budget("loss", max_drop=0.5)

    expected = cp.quantize(plain, data, bits=(3, 8), budget=budget)
    found = cp.quantize(wrapped, data, bits=(3, 8), budget=budget)
    curvature = cp.analyze(wrapped, data, quantities=["trace"])

    assert type(found.model) is nn.Sequential
    assert found.plan.choices == expected.plan.choices
    assert found.verdict.status == expected.verdict.status
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], weight)
    for name, layer in cp.analyze(plain, data, quantities=["trace"]).layers.items():
        assert curvature.layers[name].trace.value == layer.trace.value


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(self.inner[:3], x, use_reentrant=self.reentrant)
        return self.inner[3:](hidden)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_change_no_figure(reentrant, data):
    found = cp.analyze(Checkpointed(reentrant=reentrant), data, quantities=["trace", "diagonal"])
    prices = cp.price(Checkpointed(reentrant=reentrant), data, options=[cp.Quantize(bits=3)])

    plain = cp.analyze(network(), data, quantities=["trace", "diagonal"])
    for name, layer in plain.layers.items():
        assert found.layers[f"inner.{name}"].trace.value == layer.trace.value > 0
    expected = cp.price(network(), data, options=[cp.Quantize(bits=3)])
    for row, plain_row in zip(prices.rows, expected.rows, strict=True):
        assert row.price == plain_row.price > 0


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_context_without_gradients_changes_nothing(without_gradients, data):
    model = network()
    with without_gradients():
        found = cp.analyze(model, data, quantities=["trace"])
        result = cp.quantize(model, data, bits=4, budget=cp.Budget("loss", max_drop=1.0))

    assert result.verdict.status == "CERTIFIED"
    for name, layer in cp.analyze(network(), data, quantities=["trace"]).layers.items():
        assert found.layers[name].trace.value == layer.trace.value


def two_on_one_memory() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model[2].weight = nn.Parameter(model[0].weight.data)
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_two_parameters_on_one_memory_are_one_layer(inplace, data, tmp_path):
    model = two_on_one_memory()
    before = model[0].weight, model[2].weight

    result = cp.quantize(model, data, bits=4, inplace=inplace)
    result.save(tmp_path / "artifact")
    read = cp.load(tmp_path / "artifact", model=two_on_one_memory())

    assert (model[0].weight, model[2].weight) == before  # the same two objects as before
    assert set(result.plan.choices) == {"0", "4"}
    assert torch.equal(result.model[0].weight, result.model[2].weight)
    assert torch.equal(read(data[0][0]), result.model(data[0][0]))
    assert len(result.model[0].weight[0].unique()) <= 16


def overlapping() -> nn.Sequential:
    model, flat = network(), torch.randn(200)
    model[0].weight = nn.Parameter(flat[:128].view(16, 8))
    model[2].weight = nn.Parameter(flat[72:].view(8, 16))
    return model


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return network()


def with_weight(weight: torch.Tensor) -> nn.Sequential:
    model = network()
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def made_in_inference() -> nn.Sequential:
    with torch.inference_mode():
        return network()


REFUSED = {
    "share a part of their memory": overlapping,
    "0.weight is on the meta device": on_meta,
    "TorchScript": lambda: torch.jit.trace(network(), torch.randn(1, 8)),
    "has no shape yet": lambda: nn.Sequential(nn.LazyLinear(3)),
    "has no parameters": lambda: nn.Sequential(nn.Tanh()),
    r"is sparse \(torch.sparse_coo\)": lambda: with_weight(torch.eye(16)[:, :8].to_sparse()),
    "expected float16, bfloat16": lambda: with_weight(torch.ones(16, 8).to(torch.float8_e4m3fn)),
    "it was quantized before": lambda: with_weight(torch.ones(16, 8, dtype=torch.int8)),
    "made in torch.inference_mode": made_in_inference,
}


@pytest.mark.parametrize(("said", "make"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_at_once(said, make, data):
    verbs = [
        lambda model: cp.quantize(model, data, bits=4),
        lambda model: cp.prune(model, data, structured=0.2),
        lambda model: cp.price(model, data, options=[cp.Quantize(bits=4)]),
        lambda model: cp.analyze(model, data),
        lambda model: cp.certify(model, model, data, cp.Budget("loss", max_drop=1.0)),
    ]
    for verb in verbs:
        with pytest.raises(ValueError, match=said):
            verb(make())


def test_a_sharded_model_is_refused(data, one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="sharded by FSDP"):
        cp.quantize(model, data, bits=4)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40}
    parts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **parts)).eval()


def test_an_offloaded_model_is_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(llama(), execution_device="cpu")
    with pytest.raises(ValueError, match="offloaded by accelerate"):
        cp.quantize(model, [{"input_ids": torch.arange(20)[None]}], bits=4)


def test_an_adapter_is_analysed_as_it_is_and_compressed_merged():
    peft = pytest.importorskip("peft")
    targets = {"target_modules": ["q_proj"], "init_lora_weights": False}
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=4, **targets))
    data = [{"input_ids": torch.randint(40, (4, 12))}]

    found = cp.analyze(adapted, data, quantities=["trace"])
    assert any("lora_A" in name for name in found.layers)
    with pytest.raises(ValueError, match="merge_and_unload"):
        cp.quantize(adapted, data, bits=8)

    merged = copy.deepcopy(adapted).merge_and_unload()
    result = cp.quantize(merged, data, bits=8)
    with torch.no_grad():
        gap = result.model(**data[0]).logits - adapted(**data[0]).logits
    assert float(gap.abs().max()) < 0.02


def test_a_batch_that_the_model_cannot_read_is_named(data):
    wrong = [(data[0][0].double(), data[0][1])]
    with pytest.raises(ValueError, match=r"inputs: torch.float64 \(.*parameters torch.float32"):
        cp.quantize(network(), wrong, bits=4)
    with pytest.raises(ValueError, match="Sequential fails on the first batch"):
        cp.analyze(network(), [(torch.randn(4, 9), torch.zeros(4, dtype=torch.long))])


def test_a_monitor_looks_inside_a_wrapper(data):
    inside = network()
    plain = cp.CurvatureMonitor(inside, data[0]).look(0)
    seen = cp.CurvatureMonitor(nn.DataParallel(network()), data[0]).look(0)
    assert seen.lambda_max == pytest.approx(plain.lambda_max, rel=1e-6)
