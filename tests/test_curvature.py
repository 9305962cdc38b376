"""Every matrix-free operator and every per-layer quantity against dense matrices from torch.func in
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
from curvprune import distributed as processes
from curvprune.curvature import factors, probe_layers, products
from curvprune.curvature.analysis import _layer_records, _layers_of
from curvprune.curvature.probes import _combined, _Kind
from curvprune.model import CausalLM, Classification, LabelFree, find_layers


class Unused(nn.Module):
    """An MLP with a parameter that nothing uses and one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.idle = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def mlp(activation=nn.Tanh):
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            activation(),
            nn.Dropout(0.5),
            nn.Linear(5, 4),
            activation(),
            nn.Linear(4, 3),
        ).double()
    )


def convnet(activation=nn.ReLU):
    def build():
        net = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), activation(), nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3, groups=1, bias=False), nn.BatchNorm2d(4), activation(), nn.Flatten(), nn.Linear(4, 3),
        ).double()  # fmt: skip
        for module in net:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.weight, 0.5, 2.0)
        return net

    return seeded(build)


def vectors(n=7, classes=3, shape=(4,)):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (n,), generator=generator)
    y[2] = -100  # ignored
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def small_llama(tied):
    config = LlamaConfig(
        vocab_size=6, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, initializer_range=0.5,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config)).double()


def tokens():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 6, (5, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    mask[4, 2:] = 0
    full = {"input_ids": ids, "attention_mask": mask}
    return [{k: v[:2] for k, v in full.items()}, {k: v[2:] for k, v in full.items()}]


CASES = {
    "mlp": lambda: (mlp(), vectors(), Classification()),
    "conv": lambda: (convnet(), vectors(shape=(1, 6, 6)), Classification()),
    "shared": lambda: (seeded(lambda: Unused().double()), vectors(), Classification()),
    "attention": lambda: (small_llama(False), tokens(), CausalLM()),
    "tied": lambda: (small_llama(True), tokens(), CausalLM()),
}


def dense(model, batches, objective, kind, names):
    """The matrix over the named parameters by torch.func, from one batch of everything."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    free = torch.cat([parameters[n].reshape(-1) for n in names])
    sizes = [parameters[n].numel() for n in names]

    def parts(v):
        return {n: x.view_as(parameters[n]) for n, x in zip(names, v.split(sizes), strict=True)}

    model = model.eval()
    total = 0
    matrix = torch.zeros(len(free), len(free), dtype=torch.float64)
    for batch in batches:
        positions = lambda z, batch=batch: objective.positions(z, batch)  # noqa: E731

        def logits(v, batch=batch):
            if isinstance(batch, tuple):
                return torch.func.functional_call(model, parts(v), (batch[0],))
            return torch.func.functional_call(
                model, parts(v), (), {**batch, "use_cache": False}
            ).logits

        with torch.no_grad():
            kept = positions(logits(free))
        total += len(kept.item)

        def losses(v, logits=logits, positions=positions):
            p = positions(logits(v))
            return F.cross_entropy(p.logits, p.labels, reduction="none")

        if kind == "hessian":
            matrix += torch.func.hessian(lambda v, losses=losses: losses(v).sum())(free)
        elif kind == "empirical":
            jacobian = torch.func.jacrev(losses)(free)
            by_item = torch.zeros(kept.items, len(free), dtype=torch.float64).index_add(
                0, kept.item, jacobian
            )
            matrix += by_item.T @ by_item
        else:
            jacobian = torch.func.jacrev(
                lambda v, positions=positions, logits=logits: positions(logits(v)).logits
            )(free)
            p = kept.logits.softmax(-1)
            inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            matrix += torch.einsum("nci,ncd,ndj->ij", jacobian, inner, jacobian)
    return matrix / total


BUILD = {
    "hessian": products.hessian,
    "ggn": products.gauss_newton,
    "empirical": products.empirical_fisher,
}


@pytest.fixture(scope="module")
def references():
    known: dict[tuple[str, str], torch.Tensor] = {}

    def get(case, kind):
        if (case, kind) not in known:
            model, batches, objective = CASES[case]()
            if case in ("attention", "tied"):
                model.set_attn_implementation("eager")
            known[case, kind] = dense(
                model, batches, objective, kind, [n for n, _ in model.named_parameters()]
            )
        return known[case, kind]

    return get


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("case", CASES)
def test_operators_equal_the_dense_matrix(case, kind, references):
    model, batches, objective = CASES[case]()
    model.train()
    operator = BUILD[kind](model, batches, objective)
    expected = references(case, kind)
    # Llama's RMSNorm rounds to float32 inside a float64 model.
    close = 3e-6 if case in ("attention", "tied") else 1e-9
    close = {"rtol": close, "atol": close * float(expected.abs().max())}
    torch.testing.assert_close(operator.to_dense(), expected, **close)
    # a block of vectors, a quadratic form, and a restriction that prunes the backward passes
    v = torch.randn(
        len(expected), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    close["atol"] *= len(v)
    torch.testing.assert_close(operator @ v, expected @ v, **close)
    torch.testing.assert_close(operator.quad(v), ((expected @ v) * v).sum(0), **close)
    name = list(operator.space.shapes)[1]
    part = operator.space.slices[name]
    torch.testing.assert_close(operator.restrict([name]).to_dense(), expected[part, part], **close)
    assert operator.to_scipy().matvec(v[:, 0].numpy()).shape == (len(expected),)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("retain", [0, 1, 2])
def test_graphs_that_are_built_again_give_the_same(retain, references):
    model, batches, objective = CASES["mlp"]()
    operator = products.hessian(model, batches, objective, retain=retain)
    for _ in range(2):
        torch.testing.assert_close(
            operator.to_dense(), references("mlp", "hessian"), rtol=1e-9, atol=1e-12
        )
    assert len(operator.source.kept) == retain


def test_the_sampled_fisher_is_unbiased_for_the_gauss_newton_matrix(references):
    model, batches, objective = CASES["mlp"]()
    expected = references("mlp", "ggn")
    many = products.fisher(model, batches, objective, labels=400).to_dense()
    assert torch.linalg.norm(many - expected) < 0.05 * torch.linalg.norm(expected)
    again = products.fisher(model, batches, objective, labels=2, seed=5)
    other = products.fisher(model, batches, objective, labels=2, seed=6)
    assert torch.equal(
        again.to_dense(), products.fisher(model, batches, objective, labels=2, seed=5).to_dense()
    )
    assert not torch.equal(again.to_dense(), other.to_dense())


def test_label_free_curvature_is_the_classifier_s_gauss_newton(references):
    """KL to itself: the gradient vanishes, and Hessian and Gauss–Newton matrix are the same."""
    model, batches, _ = CASES["mlp"]()
    x = [(x, y.clamp_min(0)) for x, y in batches]
    matrix = products.hessian(model, x, LabelFree(model)).to_dense()
    torch.testing.assert_close(
        matrix, products.gauss_newton(model, x, LabelFree(model)).to_dense(), atol=1e-10, rtol=1e-8
    )
    names = [n for n, _ in model.named_parameters()]
    torch.testing.assert_close(
        matrix, dense(model, x, Classification(), "ggn", names), atol=1e-10, rtol=1e-8
    )


# ------------------------------------------------------------------------------- traps of the peers


def test_a_second_operator_does_not_disturb_the_first(references):
    model, batches, objective = CASES["mlp"]()
    first = products.hessian(model, batches, objective)
    second = products.hessian(model, batches, objective)
    v = torch.ones(first.space.dim, dtype=torch.float64)
    expected = references("mlp", "hessian") @ v
    torch.testing.assert_close(second @ v, expected)
    torch.testing.assert_close(first @ v, expected)


def test_curvature_of_a_tiny_loss_keeps_its_digits(references):
    """A constant added to a denominator would drown it."""
    model, batches, _ = CASES["mlp"]()

    class Tiny(Classification):
        def _compare(self, positions, batch):
            losses, truth = super()._compare(positions, batch)
            return losses * 1e-9, truth

    pairs = cp.eigenpairs(
        products.hessian(model, batches, Tiny()),
        1,
        tol=1e-8,
        generator=torch.Generator().manual_seed(0),
    )
    expected = torch.linalg.eigvalsh(references("mlp", "hessian"))
    assert float(pairs.values[0]) == pytest.approx(
        1e-9 * float(expected[expected.abs().argmax()]), rel=1e-6
    )


def test_what_random_modules_do_is_named():
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    model = nn.Sequential(nn.Linear(4, 5), Noisy(), nn.Linear(5, 3)).double()
    for call in (lambda: cp.hessian(model, vectors()), lambda: cp.analyze(model, vectors())):
        with pytest.raises(ValueError, match="module '1' is the first that differs"):
            call()


def test_parameters_changed_under_an_operator_are_noticed():
    model, batches, objective = CASES["mlp"]()
    operator = products.hessian(model, batches, objective)
    v = torch.ones(operator.space.dim, dtype=torch.float64)
    operator @ v
    with torch.no_grad():
        model[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match="build a new one"):
        operator @ v


def test_the_model_comes_back_as_it_was():
    model, batches, objective = CASES["attention"]()
    model.set_attn_implementation("sdpa")
    model.train()
    model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    flash = torch.backends.cuda.flash_sdp_enabled()
    operator = products.hessian(model, batches, objective)
    operator @ torch.ones(operator.space.dim, dtype=torch.float64)
    cp.analyze(model, batches, quantities=["trace"], max_products=8)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1]
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert torch.backends.cuda.flash_sdp_enabled() == flash
    assert model.config._attn_implementation == "sdpa"


def test_frozen_parameters_have_curvature_too(references):
    model, batches, objective = CASES["mlp"]()
    model.requires_grad_(False)
    operator = products.hessian(model, batches, objective)
    torch.testing.assert_close(
        operator.to_dense(), references("mlp", "hessian"), rtol=1e-9, atol=1e-12
    )
    assert cp.analyze(model, batches, quantities=["trace"]).layers["0"].trace is not None


def test_bfloat16_and_mixed_models_add_up_in_float32():
    model, batches, objective = CASES["mlp"]()
    exact = products.gauss_newton(model, batches, objective)
    v = torch.ones(exact.space.dim, dtype=torch.float64)
    half = mlp().to(torch.bfloat16)
    typed = [(x.to(torch.bfloat16), y) for x, y in batches]
    operator = products.gauss_newton(half, typed, objective)
    assert operator.dtype == torch.float32
    torch.testing.assert_close((operator @ v.float()).double(), exact @ v, rtol=0.1, atol=0.02)
    mixed = mlp().float()
    mixed[3].to(torch.bfloat16)

    class Cast(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.to(torch.bfloat16)).float()

    mixed[3] = Cast(mixed[3])
    operator = products.hessian(mixed, [(x.float(), y) for x, y in batches], objective)
    assert torch.isfinite(operator @ v.float()).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: cp.hessian(m, []), "empty"),
        (lambda m, d: cp.hessian(m, d, parameters="nope*"), "matches none"),
        (
            lambda m, d: (
                cp.hessian(m, [(d[0][0], torch.full((3,), -100))]) @ torch.zeros(64).double()
            ),
            "no position",
        ),
        (lambda m, d: cp.analyze(m, d, matrix="hess"), "expected one of hessian"),
        (lambda m, d: cp.analyze(m, d, quantities=["spectrum"]), "expected some of trace"),
        (lambda m, d: cp.analyze(m, d, rtol=0.0), "must be positive"),
        (lambda m, d: cp.analyze(m, d, matrix="fisher", quantities=["density"]), "matrix='ggn'"),
        (lambda m, d: cp.analyze(m, []), "empty"),
    ],
)
def test_bad_input_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(mlp(), vectors())


# -------------------------------------------------------------------------- exact blocks and Fisher


def block(matrix, model, name):
    start = 0
    for n, p in model.named_parameters():
        if n == name:
            return matrix[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
    raise KeyError(name)


def test_piecewise_linear_layers_get_their_exact_hessian_block(references):
    model, batches, _ = CASES["conv"]()
    analysis = cp.analyze(model, batches, quantities=["trace", "diagonal", "eigenvalues"])
    for name, c in analysis.layers.items():
        expected = block(references("conv", "hessian"), model, f"{name}.weight")
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
    model = convnet(activation)
    found = factors.structure(
        model, Classification(), vectors(shape=(1, 6, 6))[1], find_layers(model)
    )
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
    found = factors.structure(model, Classification(), batches[1], layers)
    assert set(found.piecewise_linear) == straight
    for name in found.piecewise_linear:
        exact = cp.analyze(model, batches, layers=[name], quantities=["trace"]).layers[name]
        matrix = dense(model, batches, Classification(), "hessian", [f"{name}.weight"])
        assert exact.exact and exact.trace.value == pytest.approx(
            float(matrix.detach().trace()), rel=1e-9
        )


def test_a_shared_weight_is_not_taken_for_a_simple_layer():
    model, batches, objective = CASES["shared"]()
    layers = {n: layer for n, layer in find_layers(model).items() if n != "idle"}
    found = factors.structure(model, objective, batches[1], layers)
    assert "shared" in found.reasons and "first" in found.factored
    analysis = cp.analyze(
        model,
        batches,
        layers=["shared", "first"],
        quantities=["trace"],
        rtol=0.02,
        max_products=400,
    )
    matrix = dense(model, batches, objective, "hessian", ["shared.weight"])
    trace = analysis.layers["shared"].trace
    assert abs(trace.value - float(matrix.trace())) < 4 * trace.stderr + 1e-12


def test_a_layer_off_the_way_to_the_loss_is_named():
    model, batches, _ = CASES["shared"]()
    with pytest.raises(ValueError, match="idle"):
        cp.analyze(model, batches, matrix="fisher", quantities=["trace"])


@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_exact_gauss_newton_blocks_of_any_network(case, references):
    model, batches, _ = CASES[case]()
    analysis = cp.analyze(
        model, batches, matrix="ggn", quantities=["trace", "diagonal", "eigenvalues"]
    )
    for name, c in analysis.layers.items():
        expected = block(references(case, "ggn"), model, f"{name}.weight")
        torch.testing.assert_close(
            c.diagonal.reshape(-1), expected.diagonal(), rtol=1e-8, atol=1e-12
        )
        assert float(c.eigenpairs.values.max()) == pytest.approx(
            float(torch.linalg.eigvalsh(expected)[-1]), rel=1e-6
        )


@pytest.mark.parametrize("case", ["conv", "attention", "tied"])
def test_the_fisher_of_every_layer_is_unbiased(case, references):
    """Sampled labels: mean over many draws against the Gauss–Newton matrix; tied and embedding
    layers included."""
    model, batches, _ = CASES[case]()
    analysis = cp.analyze(
        model, batches, matrix="fisher", quantities=["trace", "diagonal"], labels=600
    )
    for name, c in analysis.layers.items():
        expected = block(references(case, "ggn"), model, f"{name}.weight").diagonal()
        assert float(torch.linalg.norm(c.diagonal.reshape(-1) - expected)) < 0.15 * float(
            torch.linalg.norm(expected)
        )
        assert c.trace.value == pytest.approx(float(expected.sum()), rel=0.12)


def test_the_batched_fisher_equals_the_pass_over_single_items():
    """Nothing is random in an empirical Fisher: contractions of whole batches against the items'
    own gradients."""
    model, batches, _ = CASES["conv"]()
    analysis = cp.analyze(
        model, batches, matrix="empirical-fisher", quantities=["trace", "diagonal"]
    )
    for name, c in analysis.layers.items():
        expected = dense(model, batches, Classification(), "empirical", [f"{name}.weight"])
        torch.testing.assert_close(
            c.diagonal.reshape(-1), expected.diagonal(), rtol=1e-8, atol=1e-12
        )
        assert c.trace.value == pytest.approx(float(expected.trace()), rel=1e-9)


def test_token_labels_are_never_taken_for_one_prediction_per_item():
    """The first items have one label that counts, the last has several: their scores add up before
    they are squared."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x)

    model = seeded(lambda: Tokens().double())
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[0, -100], [1, -100], [2, 0]])
    data = [(x, y)]
    layers = find_layers(model)
    assert not factors.structure(model, Classification(), data[0], layers).exact
    with pytest.raises(ValueError, match="use the Fisher"):
        factors.exact_gauss_newton(model, Classification(), data, layers)
    analysis = cp.analyze(
        model, data, objective="classification", quantities=["trace"], rtol=0.05, max_products=400
    )
    truth = float(dense(model, data, Classification(), "hessian", ["head.weight"]).detach().trace())
    trace = analysis.layers["head"].trace
    assert abs(trace.value - truth) < 4 * trace.stderr + 1e-12


def test_kronecker_factors_are_exact_for_one_item():
    model, batches, objective = CASES["mlp"]()
    one = [(batches[0][0][:1], batches[0][1][:1])]
    layers = find_layers(model)
    for approximate in (factors.kfac, factors.ekfac):
        operator = approximate(model, objective, one, layers, seed=3)
        exact = products.fisher(
            model, one, objective, seed=3, parameters=list(operator.space.shapes)
        )
        for name in operator.space.shapes:
            torch.testing.assert_close(
                operator.restrict([name]).to_dense(),
                exact.restrict([name]).to_dense(),
                rtol=1e-8,
                atol=1e-12,
            )


def test_ekfac_has_the_trace_of_the_fisher_for_the_same_labels():
    model, batches, objective = CASES["conv"]()
    operator = factors.ekfac(model, objective, batches, find_layers(model), seed=3)
    moments = factors.fisher_moments(model, objective, batches, find_layers(model), seed=3)
    total = sum(float(t.sum()) for t in moments.traces.values()) / float(moments.count.sum())
    assert operator.trace() == pytest.approx(total, rel=1e-9)


# ------------------------------------------------------------------------------------------- probes


def test_probed_traces_and_diagonals_of_all_layers_are_unbiased(references):
    model, batches, objective = CASES["mlp"]()
    expected = references("mlp", "hessian")
    names = {n: f"{n}.weight" for n in find_layers(model)}
    operator = products.hessian(
        model, batches, objective, parameters=list(names.values()), retain=2
    )
    within = 0
    for seed in range(20):
        found = probe_layers(
            operator,
            names,
            rtol=0.1,
            max_products=60,
            diagonal=True,
            generator=torch.Generator().manual_seed(seed),
        )
        for layer, t in found.items():
            truth = block(expected, model, names[layer]).diagonal()
            within += abs(t.trace.value - float(truth.sum())) <= 2 * t.trace.stderr + 1e-12
            assert t.trace.num_products == t.joint + t.restricted <= 60
            assert not t.trace.converged or t.trace.stderr <= 0.1 * abs(t.trace.value)
    assert within >= 53  # of 60; 95 % would be 57, and the spread of few probes is itself uncertain
    found = probe_layers(
        operator,
        names,
        rtol=1e-3,
        max_products=800,
        diagonal=True,
        generator=torch.Generator().manual_seed(1),
    )
    for layer, t in found.items():
        truth = block(expected, model, names[layer]).diagonal()
        error = float(torch.linalg.norm(t.diagonal - truth) / torch.linalg.norm(truth))
        assert error < 5 * t.diagonal_error + 1e-9 and t.diagonal_error < 0.2


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
def test_the_spectral_density_of_a_layer_has_the_block_s_moments(case, references):
    model, batches, _ = CASES[case]()
    analysis = cp.analyze(model, batches, quantities=["layer-densities"])
    for name, c in analysis.layers.items():
        values = torch.linalg.eigvalsh(block(references(case, "hessian"), model, f"{name}.weight"))
        assert float(c.density.nodes.max()) <= float(values[-1]) + 1e-9
        assert float(c.density.nodes.min()) >= float(values[0]) - 1e-9
        trace = c.density.trace(len(values))
        assert abs(trace.value - float(values.sum())) < 6 * trace.stderr + 1e-9


def test_two_probes_that_agree_by_chance_do_not_outweigh_eight():
    joint, alone = (
        _Kind(samples=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
        _Kind(samples=[100.0, 100.001]),
    )
    assert _combined(joint, alone)[0] == 4.5


def test_too_few_products_are_not_called_converged():
    model, batches, _ = CASES["attention"]()
    analysis = cp.analyze(model, batches, quantities=["trace"], rtol=1e-6, max_products=9)
    assert not any(c.trace.converged for c in analysis.layers.values() if c.trace.stderr > 0)
    assert any("raise max_products" in note for note in analysis.notes)


def test_eigenvalues_of_layers_have_both_ends_and_the_right_sign(references):
    model, batches, _ = CASES["attention"]()
    analysis = cp.analyze(model, batches, quantities=["eigenvalues"], max_products=200)
    for name, c in analysis.layers.items():
        values = torch.linalg.eigvalsh(
            block(references("attention", "hessian"), model, f"{name}.weight")
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


def test_the_diagnosis_says_what_the_spectrum_is(references):
    model, batches, _ = CASES["mlp"]()
    analysis = cp.analyze(model, batches, max_products=200)
    values = torch.linalg.eigvalsh(references("mlp", "hessian"))
    d, whole = analysis.diagnosis, analysis.model
    assert d.lambda_max == pytest.approx(float(values[-1]), rel=0.02)
    assert d.lambda_min == pytest.approx(float(values[0]), rel=0.02)
    assert d.max_learning_rate == pytest.approx(2 / float(values[-1]), rel=0.02)
    assert whole.parameters == len(values)
    assert abs(whole.trace.value - float(values.sum())) < 4 * whole.trace.stderr
    below = float((values < -d.near_zero_below).double().mean())
    assert abs(d.negative_share.value - below) < 4 * d.negative_share.stderr + 0.05
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names = [n for n, _ in model.named_parameters()]
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    loss = F.cross_entropy(
        torch.func.functional_call(model.eval(), dict(zip(names, parameters, strict=True)), (x,)), y
    )
    gradient = torch.autograd.grad(loss, parameters)
    assert whole.loss == pytest.approx(float(loss), rel=1e-9)
    assert whole.gradient_norm == pytest.approx(
        math.sqrt(sum(float(g.square().sum()) for g in gradient)), rel=1e-9
    )
    assert d.kind in ("minimum", "saddle", "not stationary") and d.text
    assert {"lambda_max", "max_learning_rate", "disagreements"} <= analysis.to_dict()[
        "diagnosis"
    ].keys()


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


def test_exact_blocks_give_their_whole_spectrum(references):
    """All but the null space's zeros, against the dense Hessian block; and what lies on disk is the
    same."""
    model, batches, _ = CASES["conv"]()
    layers = cp.analyze(model, batches, quantities=["eigenvalues"]).layers
    exact = {n: c for n, c in layers.items() if c.exact}
    assert exact and all(c.spectrum is None for n, c in layers.items() if n not in exact)
    for name, c in exact.items():
        truth = torch.linalg.eigvalsh(
            block(references("conv", "hessian"), model, f"{name}.weight")
        ).flip(0)
        padded = torch.zeros_like(truth)
        padded[: len(c.spectrum)] = c.spectrum
        torch.testing.assert_close(padded, truth, rtol=1e-8, atol=1e-10)
        again = _layers_of(json.loads(json.dumps(_layer_records({name: c}))))[name]
        assert torch.equal(again.spectrum, c.spectrum)


def test_bert_and_llama_give_every_quantity():
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2,
        max_position_embeddings=8,
    )  # fmt: skip
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
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=8, tie_word_embeddings=tied,
    )  # fmt: skip
    model = seeded(lambda: LlamaForCausalLM(config)).eval()
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :2] = 0
    labels[2, 3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    data = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]  # ragged
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
        assert (
            head.method == "exact"
            and head.exact
            and head.trace.stderr == 0
            and head.diagonal_error == 0
        )
        # transformers computes its norms in float32, whatever the model's type
        assert head.trace.value == pytest.approx(float(truth.trace()), rel=1e-6)
        torch.testing.assert_close(
            head.diagonal.reshape(-1), truth.diagonal(), rtol=1e-5, atol=1e-9
        )


def test_groups_of_layers_bound_the_vectors(references):
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


def test_curvlinops_agrees():
    curvlinops = pytest.importorskip("curvlinops")
    model, batches, objective = CASES["mlp"]()
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    batches = [(x[y >= 0], y[y >= 0])]  # it divides by samples, ignored or not
    model.eval()
    parameters = dict(model.named_parameters())
    v = torch.randn(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for theirs, ours in (
        ("HessianLinearOperator", products.hessian),
        ("GGNLinearOperator", products.gauss_newton),
    ):
        reference = getattr(curvlinops, theirs)(
            model, nn.CrossEntropyLoss(), list(parameters.values()), batches
        )
        torch.testing.assert_close(
            ours(model, batches, objective) @ v, reference @ v, rtol=1e-8, atol=1e-12
        )


def _process(rank: int, world: int, address: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    results.put((rank, (_figures(), list(processes.my_share(range(5))))))
    torch.distributed.destroy_process_group()


def _figures() -> dict[str, float]:
    model, batches, _ = CASES["conv"]()
    x, y = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    data = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 7, 2)]
    figures: dict[str, float] = {}
    for matrix, quantities in (
        ("hessian", ["trace", "diagonal", "eigenvalues", "density"]),
        ("fisher", ["trace", "diagonal"]),
    ):
        analysis = cp.analyze(
            model.float(), [(x.float(), y) for x, y in data], matrix=matrix, quantities=quantities
        )
        for name, c in analysis.layers.items():
            figures[f"{matrix} trace {name}"] = c.trace.value
            figures[f"{matrix} diagonal {name}"] = float(c.diagonal.norm())
            if c.eigenpairs is not None:
                figures[f"{matrix} top {name}"] = float(c.eigenpairs.values[0])
        if analysis.diagnosis is not None:
            figures["top"] = analysis.diagnosis.lambda_max
            figures["trace"] = analysis.model.trace.value
            figures["gradient"] = analysis.model.gradient_norm
    smooth = mlp().float()
    probed = cp.analyze(smooth, [(x.float(), y) for x, y in vectors()], quantities=["trace"])
    figures |= {f"probed {n}": c.trace.value for n, c in probed.layers.items()}
    return figures


def test_two_processes_give_the_numbers_of_one(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path}/rendezvous"
    both = [context.Process(target=_process, args=(rank, 2, address, results)) for rank in range(2)]
    for process in both:
        process.start()
    found = dict(results.get(timeout=120) for _ in both)
    for process in both:
        process.join()
    alone = _figures()
    assert sorted(i for _, share in found.values() for i in share) == list(
        range(5)
    )  # split, not repeated
    for figures, _ in found.values():
        assert figures == pytest.approx(alone, rel=1e-6, abs=1e-9)
