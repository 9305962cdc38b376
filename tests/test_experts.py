"""Stacked experts: their inputs against what transformers' own forward multiplies, and every stage
on top of them."""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AriaTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
)
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import curvprune as cp
from curvprune import artifact
from curvprune.compression import Moments, solve_layer, visit_layers
from curvprune.curvature import (
    Change,
    Draws,
    exact_gauss_newton,
    find_structure,
    fisher_pass,
    kfac,
    ratio_estimate,
)
from curvprune.model import CausalLM, Classification, find_layers, left_over
from tests.test_fisher import exact_fisher

# In models this small the router's weight is more than 1 % of the parameters.
pytestmark = pytest.mark.filterwarnings("ignore:.*belong to no Linear")

GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{n}_proj" for n in ("gate_up", "down"))


def mixtral(
    *, hidden: int = 8, inner: int = 12, experts: int = 3, vocabulary: int = 20, seed: int = 0
) -> Any:
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=experts,
        num_experts_per_tok=2,
        initializer_range=0.4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(config).eval()


def gpt_oss() -> Any:
    config = GptOssConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GptOssForCausalLM(config).eval()


def padded(vocabulary: int = 20, items: int = 4, length: int = 16) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (items, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    mask[2, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Multiplied(TorchFunctionMode):
    """Records what is multiplied with a slice of a stacked parameter: (parameter, expert) →
    rows."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.rows: dict[tuple[str, int], Tensor] = {}
        self.slices: dict[int, tuple[str, int]] = {}
        for name in names:
            for expert, weight in enumerate(module.get_parameter(name).detach()):
                self.slices[weight.data_ptr()] = name, expert

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, Tensor.matmul, Tensor.__matmul__, torch.matmul):
            with torch._C.DisableTorchFunction():
                self.rows[self.slices[args[1].data_ptr()]] = args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def experts_of(kind: str) -> nn.Module:
    sizes = {"hidden_size": 6, "num_local_experts": 4}
    module: nn.Module = {
        "mixtral": lambda: MixtralExperts(MixtralConfig(**sizes, intermediate_size=5)),
        "gpt-oss: transposed, biases, gate and up interleaved": lambda: GptOssExperts(
            GptOssConfig(**sizes, intermediate_size=5)
        ),
        "aria: transposed": lambda: AriaExperts(
            AriaTextConfig(
                hidden_size=6, moe_num_experts=4, intermediate_size=5, num_attention_heads=2
            )
        ),
        "nemotron: no gate": lambda: NemotronHExperts(
            NemotronHConfig(hidden_size=6, n_routed_experts=4, moe_intermediate_size=5)
        ),
    }[kind]()
    module.config._experts_implementation = "eager"
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


KINDS = [
    "mixtral",
    "gpt-oss: transposed, biases, gate and up interleaved",
    "aria: transposed",
    "nemotron: no gate",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_an_expert_are_what_the_eager_forward_multiplies(kind):
    torch.manual_seed(0)
    module = experts_of(kind)
    layers = find_layers(module)
    first = "up_proj" if "no gate" in kind else "gate_up_proj"
    assert [(n, layer.kind, layer.groups) for n, layer in layers.items()] == [
        (first, "experts", 4),
        ("down_proj", "experts", 4),
    ]
    hidden, chosen = (
        torch.randn(9, 6),
        torch.stack([torch.randperm(3)[:2] for _ in range(9)]),
    )  # expert 3 gets none
    with torch.no_grad(), Multiplied(module, list(layers)) as seen:
        module(hidden, chosen, torch.rand(9, 2))
    assert len(seen.rows) == 2 * 3
    for name, layer in layers.items():
        matrix = layer.as_matrix(layer.weight.detach()).reshape(4, -1, layer.shape[1])
        assert torch.equal(layer.from_matrix(matrix.reshape(layer.shape)), layer.weight)
        for expert, rows in enumerate(layer.expert_rows(hidden, chosen)):
            rows = rows.detach()
            if expert == 3:
                assert rows.shape == (0, layer.shape[1])
                continue
            theirs = seen.rows[name, expert]
            torch.testing.assert_close(rows.t() @ rows, theirs.t() @ theirs)  # in any order
            stored = layer.weight.detach()[expert]
            torch.testing.assert_close(
                matrix[expert], stored.t() if module.is_transposed else stored
            )


def moments_of(
    model: nn.Module,
    batch: Any,
    objective: Any = None,
    change: Callable | None = None,
    **named: Any,
):
    found = {}

    def visit(layer, moments):
        found[layer.name] = moments()
        if change is not None:
            change(layer)

    visit_layers(model, objective or CausalLM(), batch, find_layers(model), visit, **named)
    return found


def borrowing(parts: list[Tensor]) -> Tensor:
    """The experts' moments, each with half as many tokens of the average expert as it has
    inputs."""
    every = torch.cat(parts)
    average, borrowed = every.t() @ every / len(every), every.shape[1] / 2
    return torch.stack([(p.t() @ p + borrowed * average) / (len(p) + borrowed) for p in parts])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_moment_of_an_expert_is_that_of_the_tokens_sent_to_it(implementation):
    """By hand from the routed tokens, padding left out, whichever implementation is in force; it
    stays in force."""
    model, batch = mixtral(), padded()
    model.set_experts_implementation(implementation)
    seen = {}
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda m, a: seen.update(x=a[0], chosen=a[1])
    )
    with torch.no_grad():
        before = model(**batch).logits
    handle.remove()
    moments = moments_of(model, batch)
    assert model.config._experts_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    kept = batch["attention_mask"].flatten().bool()
    experts = model.model.layers[0].mlp.experts
    inputs: dict[str, list[Tensor]] = {GATE_UP: [], DOWN: []}
    for e in range(3):
        tokens = [t for t in range(len(kept)) if kept[t] and e in seen["chosen"][t].tolist()]
        x = seen["x"][tokens].double()
        gate, up = (x @ experts.gate_up_proj[e].double().t()).detach().chunk(2, 1)
        inputs[GATE_UP].append(x)
        inputs[DOWN].append(F.silu(gate) * up)
    for name, parts in inputs.items():
        expected = borrowing(parts)
        torch.testing.assert_close(moments[name].second.double(), expected, rtol=1e-5, atol=1e-6)
    assert not moments[GATE_UP].notes and not moments[DOWN].notes


def test_the_second_matrix_sees_what_the_first_became_and_experts_have_no_drift():
    model, batch = (
        mixtral().double(),
        padded(),
    )  # beside a reference, float32 is multiplied as bfloat16
    model.set_experts_implementation("eager")  # the others have no float64
    reference = copy.deepcopy(model)

    def change(layer):
        if layer.kind != "embedding":  # visited last
            layer.write_(0.5 * layer.as_matrix(layer.weight.detach()))

    moments = moments_of(model, batch, change=change, reference=(reference, find_layers(reference)))
    again = moments_of(model, batch)  # every layer is what it became: nothing changes on the way
    for name, moment in moments.items():
        if moment is not None:
            torch.testing.assert_close(moment.second, again[name].second)
    assert moments[GATE_UP].drift is None and moments[DOWN].drift is None
    assert (
        moments["model.layers.0.self_attn.o_proj"].drift is not None
        and moments["lm_head"].drift is not None
    )


class Fixed(nn.Module):
    """Experts whose tokens are given, and classes on top."""

    def __init__(self, chosen: Tensor) -> None:
        super().__init__()
        self.experts, self.chosen = experts_of("mixtral"), chosen
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x, self.chosen[: len(x)], torch.ones(len(x), 1)))


def test_experts_with_few_tokens_borrow_from_the_average_expert_and_say_so():
    torch.manual_seed(0)
    counts = [0, 1, 7, 40]
    chosen = torch.cat([torch.full((n, 1), e) for e, n in enumerate(counts)])
    model, x = Fixed(chosen), torch.randn(48, 6)
    batch = (x, torch.zeros(48, dtype=torch.long))
    moment = moments_of(model, batch, Classification())["experts.gate_up_proj"]
    torch.testing.assert_close(moment.second, borrowing(list(x.split(counts))))
    # Without tokens of its own, the average.
    torch.testing.assert_close(moment.second[0], x.t() @ x / 48)
    assert moment.notes == (
        "layer experts.gate_up_proj: 2 of 4 experts saw fewer calibration tokens than their 6 "
        "inputs (the fewest 0) and were solved for those of all experts in part",
    )
    result = cp.quantize(model, [batch], bits=3)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert any("2 of 4 experts" in note for note in result.solved[name].notes)
    assert all(bool(s.weight.isfinite().all()) for s in result.solved.values())
    assert not result.solved["head"].notes
    cast = cp.compress(model, [batch], options=[cp.Cast(dtype="bfloat16")])
    assert not any(s.notes for s in cast.solved.values())


def test_each_expert_is_rounded_for_its_own_tokens():
    """Rounding them apart fits each expert's tokens better than with the moment of all."""
    torch.manual_seed(0)
    scales = torch.exp(2 * torch.randn(4, 6))  # every expert's tokens have their own large inputs
    chosen = torch.arange(400).remainder(4)[:, None]
    x = torch.randn(400, 6) * scales[chosen[:, 0]]
    model = Fixed(chosen)
    layer = find_layers(model)["experts.gate_up_proj"]
    batch = (x, torch.zeros(400, dtype=torch.long))
    rounded = (
        cp.quantize(model, [batch], bits=2, layers="experts.gate_up_proj")
        .solved["experts.gate_up_proj"]
        .weight
    )

    def error(matrix: Tensor) -> float:
        change = (matrix - layer.as_matrix(layer.weight.detach())).reshape(4, 10, 6)
        return sum(
            float((r @ d.t()).square().sum())
            for r, d in zip(layer.expert_rows(x, chosen), change, strict=True)
        )

    second = (x.t() @ x / 400)[None].repeat(4, 1, 1)
    together = solve_layer(layer, [cp.Quantize(bits=2)], Moments(second))[0].weight
    nearest = solve_layer(layer, [cp.Quantize(bits=2)], None)[0].weight
    assert error(rounded) < 0.9 * min(error(together), error(nearest))


def float64_model() -> tuple[Any, list[dict[str, Tensor]]]:
    model = mixtral(hidden=4, inner=4, vocabulary=5).double()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    ids = torch.randint(0, 5, (2, 5), generator=torch.Generator().manual_seed(3))
    return model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :4]}]


@pytest.mark.slow
def test_the_fisher_of_experts_is_the_enumerated_one():
    model, items = float64_model()
    layers = {n: layer for n, layer in find_layers(model).items() if layer.kind == "experts"}
    assert list(layers) == [GATE_UP, DOWN]
    generator = torch.Generator().manual_seed(0)
    deltas = {
        n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in layers.items()
    }
    measured = fisher_pass(
        model,
        CausalLM(),
        items,
        layers,
        {n: [Change.of(d)] for n, d in deltas.items()},
        draws=Draws(labels=2000),
    )
    for name, layer in layers.items():
        fisher = exact_fisher(model, layer.weight, items, lambda m, b: m(**b).logits[:, :-1])
        assert measured.trace(name).value == pytest.approx(float(fisher.trace()), rel=0.05)
        exact = layer.as_matrix(fisher.diagonal().reshape(layer.weight.shape))
        torch.testing.assert_close(
            measured.diagonal[name], exact, rtol=0.2, atol=0.03 * float(exact.max())
        )
        delta = layer.from_matrix(deltas[name]).flatten()
        price = ratio_estimate(measured.squares(name)[:, 0], measured.count).value
        assert price == pytest.approx(0.5 * float(delta @ fisher @ delta), rel=0.08)


def dense_hessian(model: nn.Module, batches: list, name: str) -> Tensor:
    """Of the mean loss over positions, by reverse over reverse through the whole model."""
    weight = dict(model.named_parameters())[name].detach()

    def mean_loss(flat: Tensor) -> Tensor:
        total, count = flat.new_zeros(()), 0
        for b in batches:
            out = torch.func.functional_call(model, {name: flat.view(weight.shape)}, (), b).logits
            targets = b["input_ids"][:, 1:]
            total = total + F.cross_entropy(
                out[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
            )
            count += targets.numel()
        return total / count

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(mean_loss, weight.flatten())


@pytest.mark.parametrize(
    "experts", [3, 2]
)  # of two, both see every token: the weight's use looks like a plain one
def test_the_hessian_of_experts_is_probed_and_right(experts):
    model = mixtral(hidden=4, inner=4, vocabulary=5, experts=experts).double()
    model.set_experts_implementation("eager")
    _, items = float64_model()
    found = cp.analyze(
        model, items, layers=[GATE_UP, DOWN], quantities=["trace", "diagonal"], max_products=100
    )
    for name in (GATE_UP, DOWN):
        dense = dense_hessian(model, items, name)
        curvature, layer = found.layers[name], find_layers(model)[name]
        assert not curvature.exact and "probes" in curvature.method
        assert abs(curvature.trace.value - float(dense.trace())) < 4 * curvature.trace.stderr + 1e-9
        exact = layer.as_matrix(dense.diagonal().reshape(layer.weight.shape))
        assert (
            float((curvature.diagonal - exact).norm() / exact.norm()) < 4 * curvature.diagonal_error
        )
        eye = torch.eye(len(dense), dtype=torch.float64)
        torch.testing.assert_close(cp.hessian(model, items, parameters=[name]) @ eye, dense)
        grouped = copy.deepcopy(model).float()
        grouped.set_experts_implementation("grouped_mm")
        operator = cp.hessian(grouped, items, parameters=[name])
        torch.testing.assert_close(operator @ eye.float(), dense.float(), rtol=1e-3, atol=1e-5)
        assert grouped.config._experts_implementation == "grouped_mm"


def test_experts_are_never_taken_for_layers_with_factors():
    """With one expert hit, or the grouped implementation, the weight is used once, like a
    Linear's."""
    chosen = torch.zeros(8, 1, dtype=torch.long)
    model, batch = Fixed(chosen), (torch.randn(8, 6), torch.tensor([0, 1] * 4))
    layers = find_layers(model)
    assert find_structure(model, Classification(), batch, layers).factored == ("head",)
    for matrix, methods in (("ggn", {"joint probes", "layer probes"}), ("fisher", {"items"})):
        found = cp.analyze(model, [batch], matrix=matrix, quantities=["trace"]).layers
        assert found["experts.gate_up_proj"].method in methods
    own = cp.analyze(model, [batch], matrix="empirical-fisher", quantities=["trace"]).layers
    squares = 0.0
    for x, y in zip(*batch, strict=True):
        loss = torch.nn.functional.cross_entropy(model(x[None]), y[None])
        gradient = torch.autograd.grad(loss, model.experts.gate_up_proj)[0]
        squares += float(gradient.square().sum()) / 8
    assert own["experts.gate_up_proj"].trace.value == pytest.approx(squares, rel=1e-4)
    with pytest.raises(
        ValueError, match=r"layer experts\.gate_up_proj: how often it is called depends"
    ):
        exact_gauss_newton(model, Classification(), [batch], layers)
    with pytest.raises(ValueError, match=r"layer experts\.gate_up_proj: .* no Kronecker factors"):
        kfac(model, Classification(), [batch], layers)


OPTIONS = [
    cp.Quantize(bits=3, group_size=4, symmetric=False),
    cp.Quantize(bits=8),
    cp.Cast(dtype="bfloat16"),
    cp.Prune(pattern="2:4"),
    cp.Prune(sparsity=0.5),
]


@pytest.mark.parametrize("build", [mixtral, gpt_oss])
@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.key)
def test_every_option_comes_back_in_the_bytes_that_were_promised(build, portable, option, tmp_path):
    model = build()
    batch = padded(model.config.vocab_size)
    result = cp.compress(
        model,
        [batch],
        options=[option],
        layers="*experts*",
        settings=cp.Settings(portable=portable),
    )
    result.save(tmp_path)
    stored = artifact.tensor_names(tmp_path)
    assert result.plan.bytes == sum(size for _, size in stored.values())
    layers = find_layers(result.model)
    packs = not portable and isinstance(option, (cp.Quantize, cp.Prune))
    for name in (GATE_UP, DOWN):
        names = [n for n in stored if n.startswith(name) and "bias" not in n]
        assert (name in names) != packs
        assert sum(stored[n][1] for n in names) == artifact.layer_bytes(
            model, layers[name], option, portable=portable
        )
        matrix = layers[name].as_matrix(layers[name].weight.detach())
        if isinstance(option, cp.Prune):
            assert float((matrix == 0).float().mean()) == 0.5
        torch.testing.assert_close(matrix, result.solved[name].weight)
    dense, packed = cp.load(tmp_path), cp.load(tmp_path, packed=True)
    with torch.no_grad():
        expected = result.model(**batch).logits
        assert not torch.equal(expected, model(**batch).logits)
        torch.testing.assert_close(dense(**batch).logits, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(packed(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    if packs:
        experts = packed.model.layers[0].mlp.experts
        assert experts.num_experts == 3 and not experts.module.gate_up_proj.numel()
        with pytest.raises(ValueError, match=r"layer .*experts.*: its weight is not a parameter"):
            find_layers(packed, "*.experts*")
        assert not [n for n in find_layers(packed) if "experts" in n]


def test_experts_take_part_in_a_plan():
    model = mixtral(hidden=16, inner=32)
    data = [padded() | {"input_ids": padded()["input_ids"].roll(i, 0)} for i in range(5)]
    ledger = cp.price(model, data, options=[cp.Quantize(bits=b) for b in (2, 4)])
    prices = {k: r.price for k, r in ledger.layer_rows(GATE_UP).items()}
    assert prices["int2-pc-sym"] > prices["int4-pc-sym"] > 0
    settings = cp.Settings(portable=False)
    small = cp.quantize(model, data, bits=4, settings=settings).plan.bytes
    result = cp.quantize(
        model, data, bits=[2, 4, 8], budget=cp.Budget(max_bytes=small + 12_000), settings=settings
    )
    assert {GATE_UP, DOWN} <= set(result.plan.choices) and math.isfinite(result.plan.predicted)
    assert result.plan.choices[GATE_UP] != "keep"
    own = copy.deepcopy(model)
    changed = cp.quantize(own, data, bits=4, layers="*experts*", inplace=True)
    assert changed.model is own and not torch.equal(
        *(m.get_parameter(GATE_UP) for m in (own, model))
    )


def test_what_does_not_fit_names_the_experts():
    model, batch = mixtral(), padded()
    with pytest.raises(
        ValueError, match=r"experts\.gate_up_proj: pattern 2:3 needs a multiple of 3 inputs"
    ):
        cp.prune(model, [batch], pattern="2:3", layers="*experts*")
    with pytest.raises(
        ValueError, match=r"nearest layer is 'model.layers.0.mlp.experts.gate_up_proj'"
    ):
        find_layers(model, "model.layers.0.mlp.experts.gate_proj")
    with torch.no_grad():
        model.get_parameter(DOWN)[1, 0, 0] = math.nan
    with pytest.raises(
        ValueError,
        match=r"tensor 'model\.layers\.0\.mlp\.experts\.down_proj' of the model holds NaN",
    ):
        cp.quantize(model, [batch], bits=4, layers="*experts*")


def test_experts_of_another_layout_are_not_left_out_in_silence():
    config = Llama4TextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
    )
    model = Llama4ForCausalLM(config)
    assert not any("experts" in n for n in find_layers(model))
    assert "experts" in (left_over(model) or "") and left_over(mixtral(hidden=32, inner=64)) is None
    with pytest.warns(
        UserWarning, match=r"% of the parameters are in .*experts.* stay as they are"
    ):
        cp.quantize(model, [{"input_ids": torch.randint(0, 20, (2, 8))}], bits=4)


class AnyConfig:
    """Small sizes under whatever names a class of experts reads them."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if "expert" in name and name.startswith(("num", "n_", "moe_num")):
            return 4
        known = {
            "act": "silu",
            "limit": 7.0,
            "alpha": 1.7,
            "eps": 1e-6,
            "latent": None,
            "intermediate": 5,
        }
        return next((value for part, value in known.items() if part in name), 6)


@pytest.mark.slow
def test_the_rows_of_every_class_of_experts_give_its_own_output():
    """The formula that the second matrix's inputs come from is that of all classes that
    transformers has."""
    classes = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if found := re.findall(
            r"^@use_experts_implementation.*\nclass (\w+)", path.read_text("utf-8"), re.MULTILINE
        ):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            classes += [getattr(module, name) for name in found]
    assert len(classes) > 40
    hidden, shares = torch.randn(9, 6), torch.rand(9, 2)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    for kind in classes:
        experts = kind(AnyConfig())
        with torch.no_grad():
            for p in experts.parameters():
                p.normal_()
            layers, output = find_layers(experts), torch.zeros(9, 6)
            second = layers["down_proj"]
            matrices = second.as_matrix(second.weight).reshape(4, 6, 5)
            for e, rows in enumerate(second.expert_rows(hidden, chosen)):
                token, place = torch.where(chosen == e)
                y = F.linear(
                    rows, matrices[e], experts.down_proj_bias[e] if experts.has_bias else None
                )
                y = (
                    experts.post_expert_norm(y)
                    if getattr(experts, "has_post_expert_norm", False)
                    else y
                )
                output.index_add_(0, token, y * shares[token, place, None])
            own = experts(hidden, chosen, shares)
        scale = float(own.abs().max())
        torch.testing.assert_close(
            output, own, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, k=kind: f"{k}: {m}"
        )
