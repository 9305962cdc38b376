"""Objectives against torch's and transformers' own losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import curvprune as cp
from curvprune.model import (
    CausalLM,
    Classification,
    LabelFree,
    evaluate,
    evaluating,
    make_loss,
)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


def test_causal_lm_is_the_loss_of_transformers(llama):
    ids = tokens(3, 7)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[2, 5] = -100
    total, count = CausalLM().loss(llama, {"input_ids": ids, "labels": labels})
    theirs = llama(input_ids=ids, labels=labels).loss
    assert count == int((labels[:, 1:] != -100).sum())
    assert float(total) / count == pytest.approx(float(theirs), rel=1e-6)


def test_padding_on_either_side_changes_nothing(llama):
    ids = tokens(1, 6)
    plain = evaluate(llama, [{"input_ids": ids}], CausalLM())
    for left in (0, 3):
        padded = F.pad(ids, (left, 3 - left))
        mask = F.pad(torch.ones_like(ids), (left, 3 - left))
        places = (mask.cumsum(1) - 1).clamp(min=0)
        batch = {"input_ids": padded, "attention_mask": mask, "position_ids": places}
        result = evaluate(llama, [batch], CausalLM())
        assert result.count.tolist() == plain.count.tolist() == [5.0]
        assert result.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)


def test_ragged_batches_give_the_mean_over_tokens_not_over_batches(llama):
    ids = tokens(5, 8)
    whole = evaluate(llama, [{"input_ids": ids}], CausalLM())
    parts = evaluate(llama, [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}], CausalLM())
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=1e-6)
    assert parts.mean_loss == pytest.approx(whole.mean_loss, rel=1e-6)


def test_evaluation_uses_eval_mode_and_restores_each_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 3))
    model.train()
    model[2].eval()
    batch = (torch.ones(2, 4), torch.tensor([0, 1]))
    first, second = (evaluate(model, [batch], Classification()).loss for _ in range(2))
    assert torch.equal(first, second)
    assert [m.training for m in model.modules()] == [True, True, True, False]
    with pytest.raises(RuntimeError, match="boom"), evaluating(model):
        raise RuntimeError("boom")
    assert [m.training for m in model.modules()] == [True, True, True, False]


def test_classification_counts_hits_and_skips_ignored_labels():
    model = nn.Identity()
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    labels = torch.tensor([0, 0, -100])
    result = evaluate_identity(model, logits, labels)
    assert result.count.tolist() == [1, 1, 0]
    assert result.correct.tolist() == [1, 0, 0]
    expected = F.cross_entropy(logits[:2], labels[:2], reduction="none")
    torch.testing.assert_close(result.loss[:2], expected.double())


def evaluate_identity(model, logits, labels):
    return Classification().item_results(model, (logits, labels))


def test_sequence_classification_of_transformers():
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).eval()
    batch = {
        "input_ids": tokens(3, 5),
        "attention_mask": torch.ones(3, 5, dtype=torch.long),
        "labels": torch.tensor([0, 1, 1]),
    }
    objective = make_loss("auto", model, batch)
    assert isinstance(objective, Classification) and objective.measure == "nats/example"
    total, count = objective.loss(model, batch)
    assert float(total) / count == pytest.approx(float(model(**batch).loss), rel=1e-6)


def test_label_free_is_the_kl_divergence_and_zero_at_the_reference(llama):
    torch.manual_seed(1)
    other = LlamaForCausalLM(llama.config).eval()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    objective = make_loss("label-free", llama, batch)
    assert objective.measure == "nats/token"
    assert evaluate(llama, [batch], objective).loss.abs().max() < 1e-9
    result = evaluate(other, [batch], objective)
    p, q = (F.log_softmax(m(**batch).logits.double(), -1) for m in (llama, other))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1) * mask
    torch.testing.assert_close(result.loss, kl.sum(1).detach(), rtol=1e-5, atol=1e-7)
    assert result.count.tolist() == [6, 4]
    agree = (p.argmax(-1) == q.argmax(-1)) & mask.bool()
    assert result.correct.tolist() == agree.sum(1).tolist()


def test_label_free_of_sentence_embeddings(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.5,
    )
    encoder, batch = (
        BertModel(config).eval(),
        {"input_ids": tokens(3, 5), "attention_mask": torch.ones(3, 5)},
    )
    batch["attention_mask"][1, 3:] = 0
    anchors = F.normalize(torch.randn(7, 16), dim=-1)

    def similarities(output, batch):
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((output.last_hidden_state * mask).sum(1), dim=-1) @ anchors.T / 0.1

    with pytest.raises(ValueError, match=r"BertModel returned .*objective=LabelFree"):
        make_loss("label-free", encoder, batch)
    objective = LabelFree(encoder, of=similarities)
    result = cp.quantize(encoder, [batch], bits=3, objective=objective)
    result.save(tmp_path)
    measured = evaluate(cp.load(tmp_path), [batch], objective)

    def embedded(model):  # one sentence at a time, without padding
        rows = (
            ids[keep.bool()][None]
            for ids, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )
        return torch.cat([model(input_ids=row).last_hidden_state.sum(1) for row in rows]).double()

    p, q = (
        F.log_softmax(F.cosine_similarity(embedded(m)[:, None], anchors.double(), dim=-1) / 0.1, -1)
        for m in (encoder, result.model)
    )
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).detach()
    assert kl.min() > 1e-5
    torch.testing.assert_close(measured.loss, kl, rtol=1e-3, atol=1e-6)
    assert measured.count.tolist() == [1, 1, 1]
    assert measured.correct.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    recovered = cp.recover(result, encoder, [batch] * 4, objective=objective, steps=8, batch_size=1)
    assert evaluate(recovered.model, [batch], objective).mean_loss < measured.mean_loss


def test_sampled_labels_follow_the_model_and_the_seed():
    logits = torch.tensor([0.0, 1.0, 2.0, -30.0]).repeat(20_000, 1)
    logits = logits.double().requires_grad_()
    batch = (logits, torch.zeros(len(logits), dtype=torch.long))
    scores = []
    for seed in (0, 0, 1):
        drawn = Classification().scores(logits, batch, torch.Generator().manual_seed(seed))
        scores.append(torch.autograd.grad(drawn.sum(), logits)[0])
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    # The gradient of −log p(ŷ) is p − e_ŷ: it says which label was drawn, and how often.
    p = logits[0].detach().softmax(0)
    drawn = (p - scores[0]).round()
    torch.testing.assert_close(p - scores[0], drawn, rtol=0, atol=1e-9)
    assert drawn.sum(1).eq(1).all() and drawn.ge(0).all()
    spread = (p * (1 - p) / len(logits)).sqrt()
    assert bool(((drawn.mean(0) - p).abs() <= 5 * spread).all())


def test_half_precision_logits_are_compared_in_float32():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([1, 2, 3, 4])
    result = evaluate_identity(nn.Identity(), logits, labels)
    torch.testing.assert_close(
        result.loss, F.cross_entropy(logits.float(), labels, reduction="none").double()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("perplexity", "expected auto, causal-lm"),
        ("causal-lm", None),
        ("auto", "cannot tell what its loss is"),
    ],
)
def test_objectives_that_cannot_be_told(name, message):
    class TokenModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

        def forward(self, input_ids):
            return self.linear(torch.nn.functional.one_hot(input_ids, 3).float())

    batch = {"input_ids": torch.tensor([[0, 1, 2]]), "labels": torch.tensor([[0, 1, 2]])}
    if message is None:
        assert isinstance(make_loss(name, TokenModel(), batch), CausalLM)
    else:
        with pytest.raises(ValueError, match=message):
            make_loss(name, TokenModel(), batch)


def test_bad_batches_say_what_is_wrong(llama):
    with pytest.raises(ValueError, match=r"labels \(3,\) do not match logits \(2, 4\)"):
        Classification().positions(
            torch.zeros(2, 4), (torch.zeros(2, 4), torch.zeros(3, dtype=torch.long))
        )
    with pytest.raises(ValueError, match="no labels"):
        Classification().loss(nn.Linear(3, 2), {"input": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="data is empty"):
        evaluate(llama, [], CausalLM())
    assert LabelFree(llama).measure == "nats/example"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_whole_type_count(dtype):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum")
    total, count = Classification().loss_of(logits, (torch.zeros(4, 1), labels.to(dtype)))
    assert count == 4 and float(total) == pytest.approx(float(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_no_classes_are_refused(dtype):
    batch = (torch.zeros(4, 1), torch.tensor([0, 1, 1, 0]).to(dtype))
    with pytest.raises(ValueError, match="expected whole numbers, the index of a class"):
        Classification().loss_of(torch.randn(4, 3), batch)


def test_a_class_that_is_minus_a_hundred_in_eight_bits_counts():
    logits, labels = torch.randn(2, 200), torch.tensor([156, 3])
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum")
    total, count = Classification().loss_of(logits, (torch.zeros(2, 1), labels.to(torch.uint8)))
    assert count == 2 and float(total) == pytest.approx(float(expected))
