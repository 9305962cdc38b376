"""The Fisher pass against closed forms: exact expectations over labels, and the KL divergence
itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvprune.curvature import (
    Change,
    Checkpoint,
    Draws,
    FisherPass,
    fisher_pass,
    ratio_estimate,
)
from curvprune.model import Batch, CausalLM, Classification, find_layers

DRAWS = 1500


def exact_fisher(
    model: nn.Module,
    weight: nn.Parameter,
    batches: list[Batch],
    logits_of: Callable[[nn.Module, Batch], Tensor],
) -> Tensor:
    """Σ over positions of E_ŷ[∇log p ∇log pᵀ], every class enumerated, divided by the number of
    positions."""
    total, count = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64), 0
    for batch in batches:
        logits = logits_of(model, batch)
        for position in F.log_softmax(logits, -1).reshape(-1, logits.shape[-1]):
            for value in position:
                (g,) = torch.autograd.grad(value, weight, retain_graph=True)
                total += float(value.exp()) * torch.outer(g.flatten(), g.flatten()).double()
            count += 1
    return total / count


def classifier() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3, bias=False)
    ).double()
    items = [(torch.randn(1, 3, dtype=torch.float64), torch.tensor([i % 3])) for i in range(4)]
    return model, items


def price_of(passed: FisherPass, layer: str, number: int = 0) -> float:
    return ratio_estimate(passed.squares(layer)[:, number], passed.count).value


@dataclass(frozen=True)
class Converged:
    """A classifier after a pass of many draws, with some changes of its layers; of layer ``"3"``,
    the last is small."""

    model: nn.Module
    items: list[Batch]
    deltas: dict[str, list[Tensor]]
    passed: FisherPass


@pytest.fixture(scope="module")
def converged() -> Converged:
    model, items = classifier()
    layers = find_layers(model)
    deltas: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        deltas[name] = [torch.randn(layer.shape, dtype=torch.float64) for _ in range(2)]
    deltas["3"].append(1e-3 * torch.randn(layers["3"].shape, dtype=torch.float64))
    changes = {n: list(map(Change.of, ds)) for n, ds in deltas.items()}
    draws = Draws(labels=DRAWS)
    passed = fisher_pass(model, Classification(), items, layers, changes, draws=draws)
    return Converged(model.eval(), items, deltas, passed)


@pytest.mark.slow
def test_converges_to_the_exact_fisher_of_a_classifier(converged: Converged) -> None:
    model, passed = converged.model, converged.passed
    for name, layer in find_layers(model).items():
        fisher = exact_fisher(model, layer.weight, converged.items, lambda m, b: m(b[0]))
        assert passed.trace(name).value == pytest.approx(float(fisher.trace()), rel=0.05)
        diagonal = passed.diagonal[name].flatten()
        near = 0.03 * float(fisher.diagonal().max())
        torch.testing.assert_close(diagonal, fisher.diagonal(), rtol=0.25, atol=near)
        for k, delta in enumerate(converged.deltas[name]):
            exact = 0.5 * float(delta.flatten() @ fisher @ delta.flatten())
            assert price_of(passed, name, k) == pytest.approx(exact, rel=0.08)


@pytest.mark.slow
def test_the_price_predicts_the_kl_divergence_of_a_small_change(converged: Converged) -> None:
    model, delta = copy.deepcopy(converged.model), converged.deltas["3"][-1]
    x = torch.cat([item[0] for item in converged.items])
    before = F.log_softmax(model(x), -1)
    with torch.no_grad():
        model[3].weight.add_(delta)
    after = F.log_softmax(model(x), -1)
    kl = float((before.exp() * (before - after)).sum(1).mean())
    assert price_of(converged.passed, "3", 2) == pytest.approx(kl, rel=0.08)


@pytest.mark.slow
def test_tied_weights_and_padding_of_a_language_model() -> None:
    """Both uses of a tied weight count, padded and ignored positions do not: against the exact
    Fisher along δ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    items = []
    for length, padding in ((4, 0), (3, 2)):
        ids = torch.randint(0, 5, (1, length + padding))
        mask = torch.ones_like(ids)
        mask[:, length:] = 0
        items.append({"input_ids": ids, "attention_mask": mask})
    name = "model.embed_tokens"
    layers = find_layers(model, name)
    delta = torch.randn(layers[name].shape)
    changes = {name: [Change.of(delta)]}
    draws = Draws(labels=1500, seed=3)
    passed = fisher_pass(model, CausalLM(), items, layers, changes, draws=draws)
    assert passed.count.tolist() == [3, 2]

    def counting_logits(m: nn.Module, batch: Batch) -> Tensor:
        return m(**batch).logits[:, : int(batch["attention_mask"].sum()) - 1]

    fisher = exact_fisher(model, layers[name].weight, items, counting_logits)
    flat = delta.flatten().double()
    assert price_of(passed, name) == pytest.approx(0.5 * float(flat @ fisher @ flat), rel=0.08)
    assert passed.trace(name).value == pytest.approx(float(fisher.trace()), rel=0.08)


def test_slopes_are_those_of_the_loss_on_the_data_s_own_labels() -> None:
    model, items = classifier()
    layers = find_layers(model)
    deltas = {n: torch.randn(layer.shape, dtype=torch.float64) for n, layer in layers.items()}
    run = partial(
        fisher_pass,
        model,
        Classification(),
        items,
        layers,
        {n: [Change.of(d)] for n, d in deltas.items()},
    )
    passed, without = run(draws=Draws(slopes=True)), run()
    assert without.slopes == {}
    model.eval()
    for i, (x, y) in enumerate(items):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, layer in layers.items():
            slope = float((layer.weight.grad * deltas[name]).sum())
            assert float(passed.slopes[name][i, 0]) == pytest.approx(slope, rel=1e-9)
            # What is drawn for the Fisher does not depend on the slopes.
            assert torch.equal(passed.along[name], without.along[name])


def test_the_same_seed_gives_the_same_bits_and_a_resumed_pass_the_same_result() -> None:
    model, items = classifier()
    layers = find_layers(model)
    changes = {}
    for name, layer in layers.items():
        changes[name] = [Change.of(torch.ones(layer.shape, dtype=torch.float64))]
    saved: dict[str, Tensor] = {}

    def keep(done: int, totals: dict[str, Tensor]) -> None:
        if done == 2:
            saved.update({k: v.clone() for k, v in totals.items()})

    run = partial(fisher_pass, model, Classification(), items, layers, changes)
    draws = Draws(labels=2, seed=7)
    whole = run(draws=draws, checkpoint=Checkpoint(after_item=keep))
    again = run(draws=draws)
    resumed = run(draws=draws, checkpoint=Checkpoint(resume=saved))
    other = run(draws=Draws(labels=2, seed=8))
    for name in layers:
        assert torch.equal(whole.diagonal[name], again.diagonal[name])
        assert torch.equal(whole.diagonal[name], resumed.diagonal[name])
        assert torch.equal(whole.squares(name), resumed.squares(name))
        assert not torch.equal(whole.squares(name), other.squares(name))


def test_the_model_comes_back_as_it_was_also_after_an_error() -> None:
    model, items = classifier()
    model.train()
    layers = find_layers(model)
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 5.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    global_state = torch.get_rng_state()

    def interrupt(done: int, totals: dict[str, Tensor]) -> None:
        raise KeyboardInterrupt

    run = partial(fisher_pass, model, Classification(), items, layers, {}, draws=Draws(labels=1))
    run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=Checkpoint(after_item=interrupt))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 5.0))
    assert model[3].weight.grad is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), global_state)
    # A hook that stayed would take the next gradient away.
    F.cross_entropy(model(items[0][0]), items[0][1]).backward()
    assert model[3].weight.grad is not None


def test_a_layer_off_the_path_costs_nothing_and_a_broken_gradient_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x)
    items = [(torch.ones(1, 2), torch.tensor([0]))]
    layers = find_layers(model)
    passed = fisher_pass(model, Classification(), items, layers, {})
    assert passed.trace("unused").value == 0 and not passed.diagonal["unused"].any()
    assert passed.trace("used").value > 0
    # Prices of nothing but such layers would be all zero.
    changes = {"unused": [Change.of(torch.ones(2, 2))]}
    with pytest.raises(ValueError, match="layer unused received no gradient"):
        fisher_pass(model, Classification(), items, find_layers(model, "unused"), changes)
    items = [(torch.tensor([[float("inf"), 1.0]]), torch.tensor([0]))]
    with pytest.raises(FloatingPointError, match="layer used: the gradient of item 0"):
        fisher_pass(model, Classification(), items, find_layers(model, "used"), {})


def test_compact_changes_keep_eleven_bits_at_any_magnitude() -> None:
    for magnitude in (1e-12, 1.0, 1e12):
        delta = magnitude * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        change = Change.of(delta)
        assert change.values.dtype == torch.float16
        kept = change.values.float() * change.scale
        torch.testing.assert_close(kept, delta.flatten(), rtol=2**-10, atol=magnitude * 1e-6)
    assert float(Change.of(torch.zeros(2, 2)).dot(torch.ones(4))) == 0.0


def test_bfloat16_models_accumulate_in_float32() -> None:
    model, items = classifier()
    items = [(x.bfloat16(), y) for x, y in items]
    layers = find_layers(model.bfloat16())
    passed = fisher_pass(model, Classification(), items, layers, {}, draws=Draws(labels=50))
    assert all(d.dtype == torch.float32 for d in passed.diagonal.values())
    assert passed.trace("3").value > 0


def test_ratio_standard_error_is_that_of_repeated_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(2000):
        count = torch.randint(5, 20, (40,), generator=generator).double()
        sums = count * (1 + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64))
        estimate = ratio_estimate(sums, count)
        values.append(estimate.value)
        errors.append(estimate.stderr)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(values).std()), rel=0.08)
    assert ratio_estimate(torch.ones(1), torch.ones(1)).stderr == float("inf")
