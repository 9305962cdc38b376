"""Layers whose module computes more than the product of their weight and their input: curvature
against dense matrices by torch.func in float64, and what compression does with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import curvprune as cp
from curvprune.curvature import find_structure, kfac
from curvprune.model import CausalLM, Classification, deviations, find_layers
from tests.dense_curvature import dense
from tests.networks import seeded, vectors

# --------------------------------------------------------------------------- what others compute

TEXT = {
    "vocab_size": 6,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**TEXT, "num_key_value_heads": 1, "head_dim": 2, "tie_word_embeddings": False}
BIOGPT = {**TEXT, "max_position_embeddings": 8, "tie_word_embeddings": False}
OPT = {**BIOGPT, "ffn_dim": 4, "word_embed_proj_dim": 4}
MODELS = {
    "Gemma": (GEMMA, {"model.embed_tokens"}),
    "Gemma2": (GEMMA, {"model.embed_tokens"}),
    "Gemma3": (GEMMA, {"model.embed_tokens"}),
    "BioGpt": (BIOGPT, {"biogpt.embed_tokens", "biogpt.embed_positions"}),
    "OPT": (OPT, {"model.decoder.embed_positions"}),
    "Llama": ({**GEMMA, "num_key_value_heads": 2}, set()),
}


def language_model(family):
    config = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    made = getattr(transformers, config)(**MODELS[family][0], attn_implementation="eager")
    return seeded(lambda: getattr(transformers, f"{family}ForCausalLM")(made)).double().eval()


def sequences():
    ids = torch.randint(3, 6, (4, 5), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]


@pytest.mark.parametrize("family", MODELS)
def test_scaled_and_shifted_embeddings_have_the_trace_of_the_dense_matrix(family):
    model, batches, altered = language_model(family), sequences(), MODELS[family][1]
    layers = find_layers(model, "*embed_*")
    found = deviations(model, CausalLM(), batches[0], find_layers(model))
    assert set(found) == altered and all(one.used for one in found.values())

    names = [f"{name}.weight" for name in layers]
    for matrix, kind in (("ggn", "ggn"), ("empirical-fisher", "empirical")):
        diagonal = dense(model, batches, CausalLM(), kind, names).detach().diagonal()
        truths = diagonal.split([layer.numel for layer in layers.values()])
        for name, truth in zip(layers, truths, strict=True):
            analysis = cp.analyze(
                model,
                batches,
                matrix=matrix,
                layers=[name],
                quantities=["trace"],
                max_products=100,
            )
            curvature = analysis.layers[name]
            told = [note for note in analysis.notes if "compute more" in note and name in note]
            assert bool(told) == (name in altered)
            if name in altered:
                assert not curvature.exact
            # A factor of 4, or half of the rows, is far outside of four standard errors.
            trace, expected = curvature.trace, float(truth.sum())
            allowed = 4 * trace.stderr if matrix == "ggn" else 0
            assert allowed < 0.8 * expected
            assert trace.value == pytest.approx(expected, rel=1e-6, abs=allowed)


class Standardised(nn.Conv2d):
    """As in BiT and NFNet."""

    def forward(self, x):
        w = self.weight
        mean = w.mean((1, 2, 3), keepdim=True)
        w = (w - mean) / (w.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-6).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Normed(nn.Linear):
    """A classifier by cosines."""

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Ternary(nn.Linear):
    """Rounds its weight in every pass, as BitLinear does."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        rounded = (self.weight / scale).clamp(-1, 1).round() * scale
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Scaled(nn.Linear):
    """As the output layers of maximal-update parametrizations."""

    def forward(self, x):
        return super().forward(x) * 0.5


class Adapted(nn.Linear):
    """With an adapter of low rank beside it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down = nn.Parameter(torch.randn(2, self.in_features))
        self.up = nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class Squashed(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


class Pair(nn.Linear):
    """Returns its bias beside the product, as Megatron's layers do."""

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class First(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return sum(self.inner(x))


def hooked():
    """A plain class whose output a hook doubles."""
    layer = nn.Linear(4, 5)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


def small(first):
    return seeded(lambda: nn.Sequential(first(), nn.ReLU(), nn.Linear(5, 3)).double())


ALTERED = {
    "normed": lambda: Normed(4, 5),
    "ternary": lambda: Ternary(4, 5),
    "scaled": lambda: Scaled(4, 5),
    "adapted": lambda: Adapted(4, 5),
    "squashed": lambda: Squashed(4, 5),
    "hooked": hooked,
    "pair": lambda: First(Pair(4, 5)),
    "standardised": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), Standardised(1, 5, 2), nn.Flatten()
    ),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_a_layer_that_computes_more_is_never_called_exact(kind):
    model, batches = small(ALTERED[kind]), vectors()
    layers = find_layers(model)
    name = next(iter(layers))
    found = find_structure(model, Classification(), batches[1], layers)
    assert found.altered == (name,) and name not in found.factored and "2" in found.heads
    for matrix, kind_of in (
        ("hessian", "hessian"),
        ("ggn", "ggn"),
        ("empirical-fisher", "empirical"),
    ):
        truth = dense(model, batches, Classification(), kind_of, [f"{name}.weight"]).detach()
        analysis = cp.analyze(
            model,
            batches,
            matrix=matrix,
            quantities=["trace", "diagonal"],
            layers=[name],
            max_products=100,
        )
        curvature = analysis.layers[name]
        assert not curvature.exact and any(name in note for note in analysis.notes)
        trace = float(truth.trace())
        allowed = 5 * curvature.trace.stderr if matrix != "empirical-fisher" else 0
        assert curvature.trace.value == pytest.approx(trace, rel=1e-6, abs=allowed + 1e-9)
    with pytest.raises(ValueError, match=f"layer {name}: .*no Kronecker factors"):
        kfac(model, Classification(), batches, layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_layers_are_matrices_in_every_type(dtype):
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, padding_mode="reflect", stride=2),
        nn.Conv2d(32, 32, 3, groups=32, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 300, bias=False),
        nn.Linear(300, 1),
    )
    model = seeded(lambda: net).to(dtype)
    x = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert not deviations(model, Classification(), (x, torch.zeros(1)), find_layers(model))


def test_a_deviation_is_seen_in_half_precision_too():
    model = seeded(lambda: nn.Sequential(Scaled(64, 32))).bfloat16()
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    found = deviations(model, Classification(), (x, torch.zeros(2)), find_layers(model))
    assert "its output is 0." in found["0"].what and not found["0"].used


# ------------------------------------------------------------------------------------- compression


def bit():
    config = transformers.BitConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4, num_labels=3
    )
    return seeded(lambda: transformers.BitForImageClassification(config)).eval()


def images(n=6):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return [{"pixel_values": torch.randn(n, 3, 32, 32, generator=generator), "labels": labels}]


VERBS = {
    "quantize": lambda model, data, **more: cp.quantize(model, data, bits=3, **more).plan.choices,
    "prune": lambda model, data, **more: cp.prune(model, data, sparsity=0.5, **more).plan.choices,
    "price": lambda model, data, **more: {
        row.layer: row.option
        for row in cp.price(model, data, options=[cp.Prune(sparsity=0.5)], **more).rows
    },
}


@pytest.mark.parametrize("verb", VERBS)
def test_standardised_convolutions_stay_as_they_are(verb):
    model = bit()
    before = copy.deepcopy(model.state_dict())
    convolutions = [n for n, layer in find_layers(model).items() if layer.kind == "conv"]
    with pytest.warns(UserWarning, match="stay as they are") as told:
        choices = VERBS[verb](model, images())
    assert set(choices) == {"classifier.1"}
    text = next(str(one.message) for one in told if "stay as they are" in str(one.message))
    assert f"{len(convolutions)} layer(s)" in text
    assert all(name in text for name in convolutions[:4])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match=r"layer bit\.embedder\.convolution: its output differs"):
        VERBS[verb](model, images(), layers="bit.embedder.convolution")
    with pytest.raises(ValueError, match=r"layer bit\.embedder\.convolution: its output differs"):
        VERBS[verb](model, images(), layers="bit.*")


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.head = Normed(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.q(x) + self.k(x))


def test_layers_that_share_an_option_with_one_that_stays_stay_too():
    data = [(x, y.clamp_min(0)) for x, y in vectors(32)]
    with pytest.warns(UserWarning, match=r"of q: .*: q, k"):
        plan = cp.quantize(
            seeded(lambda: Both().double()),
            data,
            budget=cp.Budget("loss", max_bytes=10**6),
            same_option=[["q", "k"]],
        ).plan
    assert set(plan.choices) == {"head"} and any("q, k" in note for note in plan.notes)


@pytest.mark.parametrize("family", ["Gemma", "OPT", "BioGpt"])
def test_rows_of_scaled_and_shifted_embeddings_are_rounded_to_nearest(family):
    model = language_model(family)
    names = list(find_layers(model, "*embed_*"))
    result = cp.quantize(model, sequences(), bits=3, layers="*embed_*")
    assert set(result.plan.choices) == set(names)
    own, rounded = find_layers(model), find_layers(result.model)
    for name in names:
        before, after = own[name].weight.detach(), rounded[name].weight.detach()
        assert max(len(set(row.tolist())) for row in after) <= 8
        # To nearest: no entry is further away than half a step of its row's grid.
        step = before.abs().amax(1, keepdim=True) / 3
        assert bool(((after - before).abs() <= step * 0.51).all())


def test_products_that_a_module_returns_in_a_tuple_are_compressed():
    model = small(lambda: First(Pair(4, 5)))
    data = [(x, y.clamp_min(0)) for x, y in vectors(12)]
    result = cp.quantize(model, data, bits=2)
    assert set(result.plan.choices) == {"0.inner", "2"}
    assert len(set(find_layers(result.model)["0.inner"].weight[0].tolist())) <= 4
