"""`compare`: its figures beside the same by hand in float64, its errors, the command, what it
refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import curvprune as cp
from curvprune.certificate import quantiles_of, ratio_of
from curvprune.cli import app
from tests import tiny

QUANTILES = {"kl_median": 0.5, "kl_99": 0.99, "kl_999": 0.999}


def texts(lengths: list[int], *, ignored: int = 0) -> list[dict[str, torch.Tensor]]:
    """Sequences of bytes, the first ``ignored`` labels of each ignored."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for length in lengths:
        tokens = torch.randint(0, 256, (1, length), generator=generator)
        item = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if ignored:
            item["labels"] = tokens.clone()
            item["labels"][:, :ignored] = -100
        items.append(item)
    return items


class ByHand:
    """The figures of a language model, item by item without padding, in float64."""

    def __init__(self, a: nn.Module, b: nn.Module, items, documents) -> None:
        self.documents = documents
        kls, self.rows = [], {}
        for item, document in zip(items, documents, strict=True):
            with torch.no_grad():
                p = a.double()(input_ids=item["input_ids"]).logits[0, :-1].log_softmax(-1)
                q = b.double()(input_ids=item["input_ids"]).logits[0, :-1].log_softmax(-1)
            labels = item.get("labels", item["input_ids"])[0, 1:]
            keep = labels != -100
            p, q, labels = p[keep], q[keep], labels[keep]
            kl = (p.exp() * (p - q)).sum(-1)
            right_a, right_b = p.argmax(-1) == labels, q.argmax(-1) == labels
            row = torch.stack(
                [
                    torch.ones_like(kl),
                    kl,
                    (p.argmax(-1) == q.argmax(-1)).double(),
                    -p.gather(1, labels[:, None])[:, 0],
                    -q.gather(1, labels[:, None])[:, 0],
                    (right_a & ~right_b).double(),
                    (right_b & ~right_a).double(),
                ]
            ).sum(1)
            self.rows[document] = self.rows.get(document, 0) + row.numpy()
            kls.append(kl.numpy())
        a.float(), b.float()
        self.kl = np.concatenate(kls)
        self.table = np.stack(list(self.rows.values()))

    def figures(self, table: np.ndarray) -> dict[str, float]:
        n, kl, same, before, after, lost, won = table.sum(0)
        return {
            "kl": kl / n,
            "top1_agreement": same / n,
            "loss_before": before / n,
            "loss_after": after / n,
            "loss_change": (after - before) / n,
            "perplexity_before": math.exp(before / n),
            "perplexity_after": math.exp(after / n),
            "perplexity_ratio": math.exp((after - before) / n),
            "perplexity_change": math.exp(after / n) - math.exp(before / n),
            "right_to_wrong": lost / n,
            "wrong_to_right": won / n,
        }

    def errors(self) -> dict[str, float]:
        """The jackknife, one document left out after the other."""
        whole, m = self.figures(self.table), len(self.table)
        without = [self.figures(np.delete(self.table, c, 0)) for c in range(m)]
        found = {}
        for name, value in whole.items():
            apart = [one[name] - value for one in without]
            found[name] = math.sqrt((m - 1) / m * sum(x * x for x in apart))
        return found


def nearby(model: nn.Module, scale: float = 0.02) -> nn.Module:
    """A copy with noise on its weights."""
    other = tiny.llama()
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)
    return other


@pytest.mark.parametrize("ignored", [0, 5])
def test_the_figures_of_language_models_are_those_by_hand(ignored: int) -> None:
    a = tiny.llama()
    b = nearby(a)
    # Lengths that need padding, and documents of several items of unequal length.
    items = texts([12, 31, 20, 17, 40, 9, 25, 33], ignored=ignored)
    documents = ("x", "y", "x", "z", "z", "w", "v", "w")
    split = cp.Split(items=tuple(items), documents=documents)
    found = cp.compare(a, b, split, batch_size=3)
    hand = ByHand(a, b, items, documents)
    assert (found.items, found.documents, found.positions) == (8, 5, len(hand.kl))
    values, errors = hand.figures(hand.table), hand.errors()
    for name, value in values.items():
        figure = getattr(found, name)
        scale = max(1.0, abs(value))
        assert figure.value == pytest.approx(value, abs=1e-5 * scale), name
        assert figure.stderr == pytest.approx(errors[name], abs=1e-5 * scale), name
    for name, level in QUANTILES.items():
        assert getattr(found, name).value == pytest.approx(np.quantile(hand.kl, level), abs=1e-5)
        assert getattr(found, name).stderr > 0
    # The reference comes first.
    assert cp.compare(b, a, split).kl.value != pytest.approx(found.kl.value, rel=1e-4)
    assert any("99.9 %" in note or "99 %" in note for note in found.notes)


def test_the_error_of_the_change_is_that_of_the_certificate() -> None:
    a = tiny.llama()
    b, items = nearby(a), texts([20] * 12)
    found = cp.compare(a, b, items)
    verdict = cp.certify(a, b, items, cp.Budget("loss", max_drop=0.1))
    assert found.loss_change.value == pytest.approx(verdict.drop, abs=1e-9)
    assert found.loss_change.stderr == pytest.approx(verdict.stderr, rel=1e-6)
    divergence = cp.certify(a, b, items, cp.Budget("kl", max_drop=0.1))
    assert (divergence.metric, divergence.measure) == ("kl", "nats/token")
    assert found.kl.value == pytest.approx(divergence.drop, rel=1e-5)
    agreement = cp.certify(a, b, items, cp.Budget("top1", max_drop=0.9))
    assert agreement.metric == "top1" and agreement.items == 12
    assert found.top1_agreement.value == pytest.approx(1 - agreement.drop, abs=1e-9)


def test_the_quantile_of_a_budget_is_over_means_of_documents() -> None:
    a = tiny.llama()
    b, items = nearby(a), texts([12, 31, 20, 17, 40, 9, 25, 33])
    documents = ("x", "y", "x", "z", "z", "w", "v", "w")
    hand = ByHand(a, b, items, documents)
    split = cp.Split(items=tuple(items), documents=documents)
    found = cp.certify(a, b, split, cp.Budget("kl", max_drop=5, quantile=0.5))
    means = np.sort(hand.table[:, 1] / hand.table[:, 0])
    assert found.drop == pytest.approx(means[2], abs=1e-5)
    # 0.5^5 is below 5 %: the largest of five is a bound of the median.
    assert found.bound == pytest.approx(means[4], abs=1e-5)
    assert (found.items, found.clusters, found.status) == (8, 5, "CERTIFIED")


def classifiers() -> tuple[nn.Module, nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    b = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b[2].weight += 0.1 * torch.randn(4, 12)
    data = [(torch.randn(10, 6), torch.randint(0, 4, (10,))) for _ in range(12)]
    return a, b, data


def test_the_figures_of_classifiers_are_those_by_hand() -> None:
    a, b, data = classifiers()
    data[3][1][:4] = -100  # labels that do not count
    found = cp.compare(a, b, data, batch_size=16)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    x, y = x[y != -100].double(), y[y != -100]
    with torch.no_grad():
        p, q = a.double()(x).log_softmax(1), b.double()(x).log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).numpy()
    first, second = p.argmax(1), q.argmax(1)
    assert found.positions == len(y) == 116
    assert found.kl.value == pytest.approx(kl.mean(), abs=1e-6)
    # Every item is a document: the usual standard error of a mean.
    assert found.kl.stderr == pytest.approx(kl.std(ddof=1) / math.sqrt(116), rel=1e-3)
    assert found.kl_99.value == pytest.approx(np.quantile(kl, 0.99), abs=1e-6)
    assert found.top1_agreement.value == pytest.approx(float((first == second).double().mean()))
    lost = ((first == y) & (second != y)).double().mean()
    won = ((first != y) & (second == y)).double().mean()
    assert found.right_to_wrong.value == pytest.approx(float(lost))
    assert found.wrong_to_right.value == pytest.approx(float(won))
    assert found.right_after.value - found.right_before.value == pytest.approx(float(won - lost))
    change = -(q.gather(1, y[:, None]) - p.gather(1, y[:, None])).mean()
    assert found.loss_change.value == pytest.approx(float(change), abs=1e-6)
    assert found.perplexity_ratio is None


def test_independent_labels_and_numbers_with_a_scale_have_divergences() -> None:
    a, b, data = classifiers()
    x = torch.cat([x for x, _ in data])
    labels = (torch.rand(120, 4) < 0.5).float()
    found = cp.compare(a, b, [(x, labels)], loss="multi-label")
    with torch.no_grad():
        p, q = a(x).double().sigmoid(), b(x).double().sigmoid()
    # Of all labels of an item together: the sum over independent ones.
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
    assert found.kl.value == pytest.approx(float(kl.mean()), abs=1e-6)
    assert found.top1_agreement.value == pytest.approx(
        float(((p > 0.5) == (q > 0.5)).all(1).double().mean())
    )

    numbers = cp.compare(a, b, [(x, torch.randn(120, 4))], loss=cp.Regression(sigma=0.5))
    with torch.no_grad():
        squares = ((a(x) - b(x)).double() ** 2).sum(1) / (2 * 0.25)
    assert numbers.kl.value == pytest.approx(float(squares.mean()), abs=1e-5)
    assert numbers.top1_agreement is None and numbers.right_to_wrong is None
    assert any("top-1" in note for note in numbers.notes)


def test_a_later_verdict_tells_of_the_comparison() -> None:
    before, after, data = classifiers()
    cp.compare(before, after, data, names=("dense", "small"))
    verdict = cp.certify(before, after, data, cp.Budget("loss", max_drop=0.5))
    assert "dense compared with small" in verdict.earlier


def test_without_labels_there_are_divergences_only() -> None:
    a, b, data = classifiers()
    x = torch.cat([x for x, _ in data])

    class Named(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    told = cp.LabelFree(Named(a), of=cp.Classification())
    found = cp.compare(Named(a), Named(b), [{"x": x}], loss=told)
    assert found.kl.value == pytest.approx(cp.compare(a, b, data).kl.value, abs=1e-7)
    assert found.loss_change is None and found.right_to_wrong is None
    assert any("no labels" in note for note in found.notes)
    with pytest.raises(ValueError, match="is a guess"):
        cp.certify(Named(a), Named(b), [{"x": x}], cp.Budget("kl", max_drop=0.1))


def test_a_loss_without_distribution_has_losses_and_a_sentence() -> None:
    a, b, data = classifiers()
    numbers = [(x, torch.randn(len(x), 4)) for x, _ in data]
    for loss in ("regression", cp.Loss.of(squares, outputs="model"), cp.Loss.of(of_model)):
        found = cp.compare(a, b, numbers, loss=loss)
        assert found.kl is None and found.kl_99 is None and found.right_to_wrong is None
        assert any("no KL divergence" in note for note in found.notes)
        verdict = cp.certify(a, b, numbers, cp.Budget("loss", max_drop=0.1), loss=loss)
        assert found.loss_change.value == pytest.approx(verdict.drop, rel=1e-6)
        for metric in ("kl", "top1"):
            with pytest.raises(ValueError, match=f"metric '{metric}' compares distributions"):
                cp.certify(a, b, numbers, cp.Budget(metric, max_drop=0.1), loss=loss)
    scaled = cp.Regression(sigma=1.0)
    with pytest.raises(ValueError, match="same best guess"):
        cp.certify(a, b, numbers, cp.Budget("top1", max_drop=0.1), loss=scaled)


def squares(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (outputs - batch[1]).square().sum(1)


def of_model(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return squares(model(batch[0]), batch)


def test_sample_weights_and_a_class_that_cannot_be() -> None:
    a, b, data = classifiers()
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])

    class Named(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.inside(x)
            logits[:, 3] = -math.inf
            return logits

    weight = torch.ones(120)
    weight[:60] = 0
    batch = {"x": x, "labels": y % 3, "sample_weight": weight}
    found = cp.compare(Named(a), Named(b), [batch], loss="classification")
    with torch.no_grad():
        p, q = a(x[60:])[:, :3].log_softmax(1), b(x[60:])[:, :3].log_softmax(1)
    assert found.positions == found.items == 60
    assert found.kl.value == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), abs=1e-6)


# -------------------------------------------------------------------------------- standard errors


def test_errors_of_ratios_cover_what_they_should() -> None:
    """Over many samples of documents the spread of a figure is its standard error."""
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        count = rng.integers(5, 30, 40).astype(float)
        total = count * rng.normal(0.3, 0.1, 40)
        found = ratio_of(total, count, np.exp)
        values.append(found.value)
        errors.append(found.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_errors_of_quantiles_count_documents_not_positions() -> None:
    rng = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(60):
        level = np.repeat(rng.exponential(1.0, 40), 50)  # documents differ, their positions little
        kl = (level * rng.uniform(0.9, 1.1, 2000)).astype(np.float32)
        owner = np.repeat(np.arange(40, dtype=np.int32), 50)
        found = quantiles_of(kl, owner, [0.5])[0]
        values.append(found.value)
        errors.append(found.stderr)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)
    # As if positions were independent it would be seven times smaller.
    assert np.mean(errors) > 3 * 1.25 * np.std(kl) / math.sqrt(2000)


def test_one_document_has_no_error() -> None:
    a, items = tiny.llama(), texts([20, 20])
    found = cp.compare(a, nearby(a), cp.Split(items=tuple(items), documents=("x", "x")))
    assert math.isnan(found.kl.stderr) and math.isnan(found.kl_99.stderr)
    assert any("one document" in note for note in found.notes)


def test_a_record_is_json_and_says_itself() -> None:
    a, b, data = classifiers()
    found = cp.compare(a, b, data, names=("dense", "small"))
    written = json.loads(json.dumps(found.to_dict()))
    assert cp.ModelComparison.from_dict(written) == found
    assert "small against dense" in str(found) and "kl_99" in str(found)
    with pytest.raises(ValueError, match="does not hold a ModelComparison"):
        cp.ModelComparison.from_dict({"kl": 1})


# --------------------------------------------------------------------------------------- refusals


def test_other_vocabularies_are_refused() -> None:
    a = tiny.llama()
    b = tiny.llama()
    b.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"\(1, 20, 256\).*\(1, 20, 300\).*one vocabulary"):
        cp.compare(a, b, texts([20]))
    b.resize_token_embeddings(64)
    with pytest.raises(ValueError, match="compare item 0: token"):
        cp.compare(a, b, texts([20]))


def test_nothing_to_compare_is_refused() -> None:
    a, b, data = classifiers()
    with pytest.raises(ValueError, match="data is empty"):
        cp.compare(a, b, [])
    ignored = [(x, torch.full_like(y, -100)) for x, y in data]
    with pytest.raises(ValueError, match="no position counts"):
        cp.compare(a, b, ignored, loss="classification")
    with torch.no_grad():
        b[2].bias[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        cp.compare(a, b, data)


# ---------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its model, and an artifact of that model."""
    root = tmp_path_factory.mktemp("compare")
    recipe = tiny.write_recipe(root, budget="budget: null")
    text = recipe.read_text()
    start, end = text.index("      - quantize"), text.index("  - layers: model.embed_tokens")
    recipe.write_text(text[:start] + "      - quantize: {bits: 4, group_size: 16}\n" + text[end:])
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(root / "run"), "--quiet"])
    assert done.exit_code == 0, done.output
    return root


def test_the_command_prints_a_table_and_writes_a_page(folder: Path) -> None:
    dense, small, out = folder / "tiny", folder / "run/model", folder / "out"
    arguments = [str(dense), str(small), str(folder / "recipe.yaml"), "--quiet"]
    done = CliRunner().invoke(app, ["compare", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    for text in ("KL divergence, 99.9 %", "top-1 agreement", "perplexity ratio", "right to wrong"):
        assert text in done.output
    found = cp.ModelComparison.from_dict(json.loads((out / "comparison.json").read_text()))
    assert found.items == 16 and found.kl.value > 0 and found.before == str(dense)
    page = (out / "comparison.html").read_text()
    assert "<script" not in page and "KL divergence, mean" in page
    # It counts as a use of the certify split; the same comparison again is no other use.
    again = CliRunner().invoke(app, ["compare", *arguments, "--out", str(out)])
    assert again.exit_code == 0
    kept = [json.loads(path.read_text()) for path in folder.glob(".curvprune-certified/*/*.json")]
    told = [use["content"]["text"] for use in kept]
    assert told.count(f"{dense} compared with {small}") == 1
    # The same figures as in Python, on the same split.
    own = CliRunner().invoke(app, ["compare", str(dense), *arguments[:1], *arguments[2:]])
    assert own.exit_code == 0 and "against" in own.output


def test_text_on_the_page_is_escaped(folder: Path) -> None:
    from curvprune.report import comparison_page

    a, b, data = classifiers()
    found = cp.compare(a, b, data, names=("<b>one</b>", "<script>two</script>"))
    page = comparison_page(found)
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;two" in page


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("texts", "is no model"),
        ("run", "is a run folder; its model is"),
        ("nothing", "is no folder"),
    ],
)
def test_what_is_no_model_is_named(folder: Path, other: str, message: str) -> None:
    recipe = str(folder / "recipe.yaml")
    for pair in ((folder / "tiny", folder / other), (folder / other, folder / "tiny")):
        done = CliRunner().invoke(app, ["compare", *map(str, pair), recipe, "--quiet"])
        assert done.exit_code == 2 and "error:" in done.output
        assert message in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["compare", str(folder), str(folder), str(folder / "no.yaml")])
    assert done.exit_code == 2 and "no such file" in done.output
