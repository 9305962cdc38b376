"""Every per-layer quantity, and the whole model's spectrum, against dense matrices by torch.func in
float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import curvprune as cp
from curvprune.curvature import (
    AnalysisSettings,
    Draws,
    analyze_curvature,
    ekfac,
    exact_gauss_newton,
    find_structure,
    fisher,
    fisher_moments,
    hessian,
    kfac,
    probe_layers,
)
from curvprune.model import CausalLM, Classification, find_layers
from curvprune.schema import decode, encode
from tests.dense_curvature import CASES, block, dense, reference
from tests.networks import convnet, seeded, together, vectors

# -------------------------------------------------------------------------- exact blocks and Fisher


def test_piecewise_linear_layers_get_their_exact_hessian_block():
    model, batches, _ = CASES["conv"]()
    analysis = cp.analyze(model, batches, quantities=["trace", "diagonal", "eigenvalues"])
    for name, c in analysis.layers.items():
        expected = block(reference("conv", "hessian"), model, f"{name}.weight")
        assert c.exact and c.method == "exact" and c.trace.stderr == 0
        assert c.trace.value == pytest.approx(float(expected.trace()), rel=1e-9)
        torch.testing.assert_close(
            c.diagonal.reshape(-1), expected.diagonal(), rtol=1e-8, atol=1e-12
        )
        values = torch.linalg.eigvalsh(expected)
        assert float(c.eigenpairs.values.max()) == pytest.approx(float(values[-1]), rel=1e-6)
        assert abs(float(c.eigenpairs.values.min()) - float(values[0])) < 1e-7


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus])
def test_smooth_activations_leave_only_the_last_layer_exact(activation):
    model, batch = convnet(activation), vectors(shape=(1, 6, 6))[1]
    found = find_structure(model, Classification(), batch, find_layers(model))
    assert found.piecewise_linear == ("8",) and set(found.factored) == {"0", "4", "8"}


class Square(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 3), nn.Linear(4, 3), how

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return {
            "self": a * a,
            "other": a * b,
            "over": a / (b.detach() ** 2 + 1),
            "under": a / (b.abs() + 1),
        }[self.how]


@pytest.mark.parametrize(
    ("how", "straight"), [("self", set()), ("other", {"a", "b"}), ("over", {"a"}), ("under", {"a"})]
)
def test_products_are_linear_in_each_factor_only(how, straight):
    """``a·b`` is linear in either layer alone, ``a·a`` is not."""
    model = seeded(lambda: Square(how).double())
    batches = vectors()
    layers = {n: layer for n, layer in find_layers(model).items() if how != "self" or n == "a"}
    if how == "over":
        layers = {"a": layers["a"]}
    found = find_structure(model, Classification(), batches[1], layers)
    assert set(found.piecewise_linear) == straight
    for name in found.piecewise_linear:
        exact = cp.analyze(model, batches, layers=[name], quantities=["trace"]).layers[name]
        matrix = dense(model, batches, Classification(), "hessian", [f"{name}.weight"]).detach()
        assert exact.exact
        assert exact.trace.value == pytest.approx(float(matrix.trace()), rel=1e-9)


def test_a_shared_weight_is_not_taken_for_a_simple_layer():
    model, batches, objective = CASES["shared"]()
    layers = {n: layer for n, layer in find_layers(model).items() if n != "idle"}
    found = find_structure(model, objective, batches[1], layers)
    assert "shared" in found.reasons and "first" in found.factored
    analysis = cp.analyze(
        model,
        together(batches),
        layers=["shared", "first"],
        quantities=["trace"],
        rtol=0.02,
        max_products=400,
    )
    matrix = dense(model, batches, objective, "hessian", ["shared.weight"]).detach()
    trace = analysis.layers["shared"].trace
    assert abs(trace.value - float(matrix.trace())) < 4 * trace.stderr + 1e-12


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher", "empirical-fisher"])
@pytest.mark.parametrize("layers", ["*", "idle"])
def test_a_layer_off_the_way_to_the_loss_is_named_and_has_no_curvature(matrix, layers):
    model, batches, _ = CASES["shared"]()
    found = cp.analyze(
        model, batches, matrix=matrix, layers=layers, quantities=["trace", "diagonal"]
    )
    assert any("not on the way to the loss" in note and "idle" in note for note in found.notes)
    assert (found.layers["idle"].trace.value, found.layers["idle"].trace.stderr) == (0, 0)
    assert not found.layers["idle"].diagonal.any()
    assert list(found.layers) == list(find_layers(model, layers))


@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_exact_gauss_newton_blocks_of_any_network(case):
    model, batches, _ = CASES[case]()
    analysis = cp.analyze(
        model, batches, matrix="ggn", quantities=["trace", "diagonal", "eigenvalues"]
    )
    for name, c in analysis.layers.items():
        expected = block(reference(case, "ggn"), model, f"{name}.weight")
        torch.testing.assert_close(
            c.diagonal.reshape(-1), expected.diagonal(), rtol=1e-8, atol=1e-12
        )
        assert float(c.eigenpairs.values.max()) == pytest.approx(
            float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-6
        )


TIED = pytest.param("tied", marks=pytest.mark.slow)


@pytest.mark.parametrize("case", ["conv", "attention", TIED])
def test_the_fisher_of_every_layer_is_unbiased(case):
    """Sampled labels: mean over many draws against the Gauss–Newton matrix; tied and embedding
    layers included."""
    model, batches, _ = CASES[case]()
    analysis = cp.analyze(
        model, together(batches), matrix="fisher", quantities=["trace", "diagonal"], labels=300
    )
    for name, c in analysis.layers.items():
        expected = block(reference(case, "ggn"), model, f"{name}.weight").diagonal()
        error = torch.linalg.norm(c.diagonal.reshape(-1) - expected)
        assert float(error) < 0.12 * float(torch.linalg.norm(expected))
        assert c.trace.value == pytest.approx(float(expected.sum()), rel=0.1)


def test_the_batched_fisher_equals_the_pass_over_single_items():
    """Nothing is random in an empirical Fisher: contractions of whole batches against the items'
    own gradients."""
    model, batches, _ = CASES["conv"]()
    analysis = cp.analyze(
        model, batches, matrix="empirical-fisher", quantities=["trace", "diagonal"]
    )
    for name, c in analysis.layers.items():
        names = [f"{name}.weight"]
        expected = dense(model, batches, Classification(), "empirical", names).detach()
        torch.testing.assert_close(
            c.diagonal.reshape(-1), expected.diagonal(), rtol=1e-8, atol=1e-12
        )
        assert c.trace.value == pytest.approx(float(expected.trace()), rel=1e-9)


def test_token_labels_are_never_taken_for_one_prediction_per_item():
    """The first items have one label that counts, the last has several: their scores add up before
    they are squared."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3)).double())
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[0, -100], [1, -100], [2, 0]])
    data = [(x, y)]
    layers = find_layers(model)
    assert not find_structure(model, Classification(), data[0], layers).exact
    with pytest.raises(ValueError, match="use the Fisher"):
        exact_gauss_newton(model, Classification(), data, layers)
    analysis = cp.analyze(
        model, data, objective="classification", quantities=["trace"], rtol=0.05, max_products=400
    )
    matrix = dense(model, data, Classification(), "hessian", ["0.weight"]).detach()
    trace = analysis.layers["0"].trace
    assert abs(trace.value - float(matrix.trace())) < 4 * trace.stderr + 1e-12


def test_kronecker_factors_are_exact_for_one_item():
    model, batches, objective = CASES["mlp"]()
    one = [(batches[0][0][:1], batches[0][1][:1])]
    layers = find_layers(model)
    for approximate in (kfac, ekfac):
        operator = approximate(model, objective, one, layers, seed=3)
        exact = fisher(model, one, objective, seed=3, parameters=list(operator.space.shapes))
        for name in operator.space.shapes:
            torch.testing.assert_close(
                operator.restrict([name]).to_dense(),
                exact.restrict([name]).to_dense(),
                rtol=1e-8,
                atol=1e-12,
            )


def test_ekfac_has_the_trace_of_the_fisher_for_the_same_labels():
    model, batches, objective = CASES["conv"]()
    layers, draws = find_layers(model), Draws(labels=1, seed=3)
    operator = ekfac(model, objective, batches, layers, seed=3)
    moments = fisher_moments(model, objective, batches, layers, draws=draws)
    total = sum(float(t.sum()) for t in moments.traces.values()) / float(moments.count.sum())
    assert operator.trace() == pytest.approx(total, rel=1e-9)


# ------------------------------------------------------------------------------------------- probes


@pytest.fixture(scope="module")
def probed():
    """A Hessian of all layers of a network, the layers' parameters, and their true diagonals."""
    model, batches, objective = CASES["mlp"]()
    names = {n: f"{n}.weight" for n in find_layers(model)}
    operator = hessian(model, together(batches), objective, parameters=list(names.values()))
    expected = reference("mlp", "hessian")
    return operator, names, {n: block(expected, model, p).diagonal() for n, p in names.items()}


def test_probed_traces_of_all_layers_are_unbiased(probed):
    operator, names, diagonals = probed
    within = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        found = probe_layers(operator, names, rtol=0.1, max_products=60, generator=generator)
        for layer, t in found.items():
            truth = float(diagonals[layer].sum())
            within += abs(t.trace.value - truth) <= 2 * t.trace.stderr + 1e-12
            assert t.trace.num_products == t.joint + t.restricted <= 60
            assert not t.trace.converged or t.trace.stderr <= 0.1 * abs(t.trace.value)
    assert within >= 53  # of 60; 95 % would be 57, and the spread of few probes is itself uncertain


def test_probed_diagonals_of_all_layers_are_unbiased(probed):
    operator, names, diagonals = probed
    generator = torch.Generator().manual_seed(1)
    found = probe_layers(
        operator, names, rtol=1e-3, max_products=500, diagonal=True, generator=generator
    )
    for layer, t in found.items():
        truth = diagonals[layer]
        error = float(torch.linalg.norm(t.diagonal - truth) / torch.linalg.norm(truth))
        assert error < 5 * t.diagonal_error + 1e-9 and t.diagonal_error < 0.2


@pytest.mark.parametrize(("most", "kinds"), [(9, (9, 0)), (15, (15, 0)), (16, (8, 8))])
def test_a_kind_of_probe_gets_eight_or_none(most, kinds, probed):
    """The spread of two or three probes can be small by chance, and would take all the weight."""
    operator, names, _ = probed
    generator = torch.Generator().manual_seed(0)
    found = probe_layers(operator, names, rtol=1e-9, max_products=most, generator=generator)
    assert [(t.joint, t.restricted) for t in found.values()] == [kinds] * len(names)


def test_the_same_seed_gives_the_same_bits():
    model, batches, _ = CASES["attention"]()
    first, second, other = (
        cp.analyze(model, batches, quantities=["trace", "diagonal"], seed=s, max_products=12)
        for s in (1, 1, 2)
    )
    for name, c in first.layers.items():
        assert c.trace == second.layers[name].trace and torch.equal(
            c.diagonal, second.layers[name].diagonal
        )
    assert any(c.trace != other.layers[n].trace for n, c in first.layers.items())


@pytest.mark.parametrize("case", ["conv", "mlp"])
def test_the_spectral_density_of_a_layer_has_the_block_s_moments(case):
    model, batches, _ = CASES[case]()
    analysis = cp.analyze(model, batches, quantities=["layer-densities"])
    for name, c in analysis.layers.items():
        values = torch.linalg.eigvalsh(block(reference(case, "hessian"), model, f"{name}.weight"))
        assert float(c.density.nodes.max()) <= float(values[-1]) + 1e-9
        assert float(c.density.nodes.min()) >= float(values[0]) - 1e-9
        trace = c.density.trace(len(values))
        assert abs(trace.value - float(values.sum())) < 6 * trace.stderr + 1e-9


def test_too_few_products_are_not_called_converged():
    model, batches, _ = CASES["attention"]()
    analysis = cp.analyze(model, batches, quantities=["trace"], rtol=1e-6, max_products=9)
    assert not any(c.trace.converged for c in analysis.layers.values() if c.trace.stderr > 0)
    assert any("raise max_products" in note for note in analysis.notes)


def test_eigenvalues_of_layers_have_both_ends_and_the_right_sign():
    model, batches, _ = CASES["attention"]()
    analysis = cp.analyze(model, batches, quantities=["eigenvalues"], max_products=200)
    for name, c in analysis.layers.items():
        values = torch.linalg.eigvalsh(
            block(reference("attention", "hessian"), model, f"{name}.weight")
        )
        assert c.eigenpairs.converged
        ends = float(c.eigenpairs.values.max()), float(c.eigenpairs.values.min())
        for found, truth in zip(ends, (values[-1], values[0]), strict=True):
            # An eigenvalue to the tolerance; the last one itself unless a neighbour is closer to it
            # than a few percent.
            floor = 1e-5 * float(values.abs().max())
            assert float((values - found).abs().min()) <= 0.012 * abs(found) + floor
            assert found == pytest.approx(float(truth), rel=0.05, abs=floor)


# --------------------------------------------------------------------------------- whole and report


def test_the_diagnosis_says_what_the_spectrum_is():
    model, batches, _ = CASES["mlp"]()
    analysis = cp.analyze(model, batches, max_products=200)
    values = torch.linalg.eigvalsh(reference("mlp", "hessian"))
    d, whole = analysis.diagnosis, analysis.model
    assert d.lambda_max == pytest.approx(float(values[-1]), rel=0.02)
    assert d.lambda_min == pytest.approx(float(values[0]), rel=0.02)
    assert d.max_learning_rate == pytest.approx(2 / float(values[-1]), rel=0.02)
    assert whole.parameters == len(values)
    # So few parameters: every eigenvalue is computed.
    assert whole.trace.stderr == 0 and whole.density.exact
    assert whole.trace.value == pytest.approx(float(values.sum()), rel=1e-9)
    below = float((values < -d.near_zero_below).double().mean())
    assert d.negative_share.value == pytest.approx(below) and d.negative_share.stderr == 0
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    ((x, y),) = together(batches)
    own = dict(zip(names, parameters, strict=True))
    loss = F.cross_entropy(torch.func.functional_call(model.eval(), own, (x,)), y)
    gradient = torch.autograd.grad(loss, parameters)
    length = math.sqrt(sum(float(g.square().sum()) for g in gradient))
    assert whole.loss == pytest.approx(loss.item(), rel=1e-9)
    assert whole.gradient_norm == pytest.approx(length, rel=1e-9)
    # Seven items: the gradient may be noise, and so may the lowest curvature.
    assert d.kind == "flat" and "cannot be told from zero" in " ".join(d.text)
    assert d.lambda_min + 2 * d.lambda_min_over_items > 0
    assert whole.gradient_noise.chance > 0.05 and d.gradient_noise > 0.5 * length
    written = analysis.to_dict()["diagnosis"]
    assert {"lambda_max", "max_learning_rate", "disagreements"} <= written.keys()


def test_a_minimum_is_called_one_and_a_saddle_is_not():
    """A quadratic bowl of logits: at the optimum of a linear softmax model the Hessian is positive
    semidefinite."""
    x = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 1, 2, 0, 1, 2, 0])
    model = nn.Linear(3, 3, bias=False).double()
    shares = torch.zeros(3, 3, dtype=torch.float64)
    for row, label in zip(x, y, strict=True):
        shares[label] += row
    with torch.no_grad():
        model.weight.copy_((shares.clamp_min(1e-9) / shares.sum(0)).log().clamp_min(-8))
    analysis = cp.analyze(nn.Sequential(model), [(x, y)], max_products=60)
    assert analysis.diagnosis.kind == "minimum" and analysis.diagnosis.lambda_min > -1e-9
    saddle = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)).double()
    with torch.no_grad():
        for p in saddle.parameters():
            p.mul_(1e-3)
    analysis = cp.analyze(saddle, [(x, y)], max_products=60)
    assert analysis.diagnosis.lambda_min < 0 and analysis.diagnosis.kind in (
        "saddle",
        "not stationary",
    )


def test_exact_blocks_give_their_whole_spectrum():
    """All but the null space's zeros, against the dense Hessian block; and what an interrupted
    analysis has kept is the same."""
    model, batches, objective = CASES["conv"]()
    kept = {}

    def remember(key, kind, compute):
        """As the workspace of a run does it: JSON text for each key."""
        if key not in kept:
            kept[key] = json.dumps(encode(compute(), kind))
        return decode(kind, json.loads(kept[key]), source=key)

    asked = AnalysisSettings(quantities=["eigenvalues"])
    parts = model, objective, batches, find_layers(model), asked
    layers = analyze_curvature(*parts).layers
    first = analyze_curvature(*parts, remember=remember).layers
    assert kept
    again = analyze_curvature(*parts, remember=remember).layers
    exact = {n: c for n, c in layers.items() if c.exact}
    assert exact and all(c.spectrum is None for n, c in layers.items() if n not in exact)
    for name, c in exact.items():
        matrix = block(reference("conv", "hessian"), model, f"{name}.weight")
        truth = torch.linalg.eigvalsh(matrix).flip(0)
        padded = torch.zeros_like(truth)
        padded[: len(c.spectrum)] = c.spectrum
        torch.testing.assert_close(padded, truth, rtol=1e-8, atol=1e-10)
        for other in (first, again):
            assert torch.equal(other[name].spectrum, c.spectrum)


@pytest.mark.slow
def test_bert_and_llama_give_every_quantity():
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=2,
        max_position_embeddings=8,
    )
    model = seeded(lambda: BertForSequenceClassification(config))
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    data = [
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.tensor([0, 1, 1]),
        }
    ]
    analysis = cp.analyze(model, data, max_products=16)
    assert analysis.layers["classifier"].exact and not analysis.layers["bert.pooler.dense"].exact
    assert all(c.trace is not None and c.eigenpairs is not None for c in analysis.layers.values())
    assert analysis.layers["bert.pooler.dense"].gauss_newton_trace.stderr == 0


@pytest.mark.parametrize("tied", [False, True])
def test_an_output_layer_is_exact_for_every_position(tied):
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        tie_word_embeddings=tied,
    )
    model = seeded(lambda: LlamaForCausalLM(config)).eval()
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :2] = 0
    labels[2, 3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    data = [
        {k: v[:2] for k, v in batch.items()},
        {k: v[2:] for k, v in batch.items()},  # ragged
    ]
    found = cp.analyze(model, data, quantities=["trace", "diagonal"])
    if tied:  # the embedding is the same weight: it is not linear on the way to the logits
        assert not any(c.method == "exact" for c in found.layers.values())
        return
    objective = CausalLM()

    def loss(weight):
        function = torch.func.functional_call
        logits = function(
            model, {"lm_head.weight": weight}, kwargs={"input_ids": ids, "attention_mask": mask}
        ).logits
        total, count = objective.loss_of(logits, batch)
        return total / count

    truth = torch.func.hessian(loss)(model.lm_head.weight.detach()).reshape(88, 88)
    for analysis in (
        found,
        cp.analyze(model, data, quantities=["trace", "diagonal"], layers="lm_head"),
    ):
        head = analysis.layers["lm_head"]
        assert head.method == "exact" and head.exact
        assert head.trace.stderr == 0 and head.diagonal_error == 0
        # transformers computes its norms in float32, whatever the model's type
        assert head.trace.value == pytest.approx(float(truth.trace()), rel=1e-6)
        torch.testing.assert_close(
            head.diagonal.reshape(-1), truth.diagonal(), rtol=1e-5, atol=1e-9
        )


def test_groups_of_layers_bound_the_vectors():
    model, batches, _ = CASES["mlp"]()
    whole = cp.analyze(model, batches, quantities=["trace", "eigenvalues"], max_products=64)
    split = cp.analyze(
        model, batches, quantities=["trace", "eigenvalues"], max_products=64, vector_bytes=1
    )
    assert any("groups" in note for note in split.notes) and not any(
        "groups" in note for note in whole.notes
    )
    assert list(split.layers) == list(whole.layers)
    for name, c in split.layers.items():
        other = whole.layers[name]
        spread = math.hypot(c.trace.stderr, other.trace.stderr)
        assert abs(c.trace.value - other.trace.value) <= 4 * spread + 1e-12
        assert float(c.eigenpairs.values[0]) == pytest.approx(
            float(other.eigenpairs.values[0]), rel=1e-2
        )
    spectrum = cp.analyze(model, batches, quantities=["density"], vector_bytes=1)
    assert spectrum.model.density is None and any("left out" in note for note in spectrum.notes)
