"""The Fisher pass against closed forms: exact expectations over labels, and the KL divergence
itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from curvprune.curvature import Change, FisherPass, fisher_pass, ratio_estimate
from curvprune.model import CausalLM, Classification, find_layers


def exact_fisher(model: nn.Module, weight: nn.Parameter, batches, logits_of) -> torch.Tensor:
    """Σ over positions of E_ŷ[∇log p ∇log pᵀ], every class enumerated, divided by the number of
    positions."""
    total, count = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64), 0
    for batch in batches:
        log_p = F.log_softmax(logits_of(model, batch), -1).reshape(
            -1, logits_of(model, batch).shape[-1]
        )
        for position in log_p:
            for value in position:
                (g,) = torch.autograd.grad(value, weight, retain_graph=True)
                total += float(value.exp()) * torch.outer(g.flatten(), g.flatten()).double()
            count += 1
    return total / count


def classifier() -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3, bias=False)
    ).double()
    items = [(torch.randn(1, 3, dtype=torch.float64), torch.tensor([i % 3])) for i in range(4)]
    return model, items


def test_converges_to_the_exact_fisher_of_a_classifier():
    model, items = classifier()
    layers = find_layers(model)
    deltas = {
        n: [torch.randn(layer.shape, dtype=torch.float64) for _ in range(2)]
        for n, layer in layers.items()
    }
    draws = 3000
    measured = fisher_pass(
        model,
        Classification(),
        items,
        layers,
        {n: [Change.of(d) for d in ds] for n, ds in deltas.items()},
        labels=draws,
    )
    model.eval()
    for name, layer in layers.items():
        fisher = exact_fisher(model, layer.weight, items, lambda m, b: m(b[0]))
        assert measured.trace(name).value == pytest.approx(float(fisher.trace()), rel=0.05)
        diagonal = measured.diagonal[name].flatten()
        torch.testing.assert_close(
            diagonal, fisher.diagonal(), rtol=0.25, atol=0.03 * float(fisher.diagonal().max())
        )
        for k, delta in enumerate(deltas[name]):
            price = ratio_estimate(measured.squares(name)[:, k], measured.count).value
            exact = 0.5 * float(delta.flatten() @ fisher @ delta.flatten())
            assert price == pytest.approx(exact, rel=0.08)


def test_tied_weights_and_padding_of_a_language_model():
    """Both uses of a tied weight count, padded and ignored positions do not: against the exact
    Fisher along δ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    items = []
    for length, padding in ((4, 0), (3, 2)):
        ids = torch.randint(0, 5, (1, length + padding))
        mask = torch.ones_like(ids)
        mask[:, length:] = 0
        items.append({"input_ids": ids, "attention_mask": mask})
    layers = find_layers(model, "model.embed_tokens")
    layer = layers["model.embed_tokens"]
    delta = torch.randn(layer.shape)
    measured = fisher_pass(
        model,
        CausalLM(),
        items,
        layers,
        {"model.embed_tokens": [Change.of(delta)]},
        labels=4000,
        seed=3,
    )
    assert measured.count.tolist() == [3, 2]
    fisher = exact_fisher(
        model,
        layer.weight,
        items,
        lambda m, b: m(**b).logits[:, : int(b["attention_mask"].sum()) - 1],
    )
    price = ratio_estimate(measured.squares("model.embed_tokens")[:, 0], measured.count).value
    assert price == pytest.approx(
        0.5 * float(delta.flatten().double() @ fisher @ delta.flatten().double()), rel=0.08
    )
    assert measured.trace("model.embed_tokens").value == pytest.approx(
        float(fisher.trace()), rel=0.08
    )


def test_the_price_predicts_the_kl_divergence_of_a_small_change():
    model, items = classifier()
    model.eval()
    layers = find_layers(model)
    name = "3"
    delta = 1e-3 * torch.randn(layers[name].shape, dtype=torch.float64)
    measured = fisher_pass(
        model, Classification(), items, layers, {name: [Change.of(delta)]}, labels=3000
    )
    x = torch.cat([item[0] for item in items])
    before = F.log_softmax(model(x), -1)
    with torch.no_grad():
        layers[name].weight.add_(delta)
    after = F.log_softmax(model(x), -1)
    kl = float((before.exp() * (before - after)).sum(1).mean())
    price = ratio_estimate(measured.squares(name)[:, 0], measured.count)
    assert price.value == pytest.approx(kl, rel=0.08)


def test_the_same_seed_gives_the_same_bits_and_a_resumed_pass_the_same_result():
    model, items = classifier()
    layers = find_layers(model)
    changes = {
        n: [Change.of(torch.ones(layer.shape, dtype=torch.float64))] for n, layer in layers.items()
    }
    saved: dict = {}

    def keep(done: int, totals: dict) -> None:
        if done == 2:
            saved.update({k: v.clone() for k, v in totals.items()})

    def run(**arguments) -> FisherPass:
        return fisher_pass(
            model, Classification(), items, layers, changes, labels=2, seed=7, **arguments
        )

    whole, again = run(after_item=keep), run()
    resumed = run(resume=saved)
    other = fisher_pass(model, Classification(), items, layers, changes, labels=2, seed=8)
    for name in layers:
        assert torch.equal(whole.diagonal[name], again.diagonal[name])
        assert torch.equal(whole.diagonal[name], resumed.diagonal[name])
        assert torch.equal(whole.squares(name), resumed.squares(name))
        assert not torch.equal(whole.squares(name), other.squares(name))


def test_the_model_comes_back_as_it_was_also_after_an_error():
    model, items = classifier()
    model.train()
    layers = find_layers(model)
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 5.0)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    global_state = torch.get_rng_state()

    def boom(done: int, totals: dict) -> None:
        raise KeyboardInterrupt

    fisher_pass(model, Classification(), items, layers, {}, labels=1)
    with pytest.raises(KeyboardInterrupt):
        fisher_pass(model, Classification(), items, layers, {}, labels=1, after_item=boom)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(m.training for m in model.modules())
    assert (
        torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 5.0))
        and model[3].weight.grad is None
    )
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), global_state)


def test_a_layer_off_the_path_and_a_broken_gradient_are_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x)
    items = [(torch.ones(1, 2), torch.tensor([0]))]
    with pytest.raises(ValueError, match="layer unused received no gradient"):
        fisher_pass(model, Classification(), items, find_layers(model), {})
    items = [(torch.tensor([[float("inf"), 1.0]]), torch.tensor([0]))]
    with pytest.raises(FloatingPointError, match="layer used: the gradient of item 0"):
        fisher_pass(model, Classification(), items, find_layers(model, "used"), {})


def test_compact_changes_keep_eleven_bits_at_any_magnitude():
    for magnitude in (1e-12, 1.0, 1e12):
        delta = magnitude * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
        change = Change.of(delta)
        assert change.values.dtype == torch.float16
        torch.testing.assert_close(
            change.values.float() * change.scale,
            delta.flatten(),
            rtol=2**-10,
            atol=magnitude * 1e-6,
        )
    assert float(Change.of(torch.zeros(2, 2)).dot(torch.ones(4))) == 0.0


def test_bfloat16_models_accumulate_in_float32():
    model, items = classifier()
    items = [(x.bfloat16(), y) for x, y in items]
    measured = fisher_pass(
        model.bfloat16(), Classification(), items, find_layers(model), {}, labels=50
    )
    assert all(d.dtype == torch.float32 for d in measured.diagonal.values())
    assert measured.trace("3").value > 0


def test_ratio_standard_error_is_that_of_repeated_sampling():
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
