"""Two runs side by side: differences and paired errors worked out by hand, and what must not be
compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from curvprune.cli import app
from curvprune.record import OtherRun, PairedLoss, RunRecord
from curvprune.report import build

from .page import Page, parsed, plain
from .records import PROVENANCE, REMOVED, language_model, two_classifiers

HEADS = "how much worse here \N{PLUS-MINUS SIGN} se"


def written(folder: Path, record: RunRecord) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(record.to_json()))
    return folder


def report(*arguments: str | Path) -> tuple[int, str]:
    """Run ``curvprune report``: its exit code and what it says."""
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def compared(folder: Path, here: RunRecord, there: RunRecord) -> Page:
    """The page of a run in a folder beside another's."""
    ours, theirs = written(folder / "ours", here), written(folder / "theirs", there)
    assert report(ours, "--against", theirs)[0] == 0
    page = Page((ours / "report.html").read_text())
    assert page.errors == []
    return page


def section(page: Page) -> str:
    return page.section("Compared with")


@pytest.fixture(scope="module")
def small() -> RunRecord:
    return language_model(blocks=1)


@pytest.mark.parametrize(
    ("documents", "loss_error", "accuracy_error"),
    [
        # Independent: sqrt(sum((d - 3)^2) / (3 * 4)), d = 1, 2, 3, 6; accuracy: sqrt((3/4 - 1/16) /
        # 4).
        ([0, 1, 2, 3], math.sqrt(14 / 12), math.sqrt(0.6875 / 4)),
        # The first two items of one document, leave one out: 2/3 ((-3/2)^2 + 0 + (3/3)^2).
        # Accuracy: the differences 1 + 1, 0 and -1 around 1/4 leave 3/2, -1/4 and -5/4: 2/3
        # ((3/4)^2 + (1/12)^2 + (5/12)^2).
        ([0, 0, 2, 3], math.sqrt(2 / 3 * 3.25), math.sqrt(2 / 3 * (9 / 16 + 1 / 144 + 25 / 144))),
    ],
    ids=["independent", "clustered"],
)
def test_the_difference_on_the_same_items_is_paired(
    tmp_path: Path, documents: list[int], loss_error: float, accuracy_error: float
) -> None:
    page = compared(tmp_path, *two_classifiers(documents))
    table = page.tables["paired"]
    assert table.texts("mean") == ["loss (nats/example)", "accuracy (%)"]
    assert table.sorts("here") == pytest.approx([3.9375, 50], abs=1e-9)
    assert table.sorts("there") == pytest.approx([0.9375, 75], abs=1e-9)
    assert table.sorts(HEADS) == pytest.approx([3.0, 0.25], abs=1e-9)
    assert table.sorts("z") == pytest.approx([3.0 / loss_error, 0.25 / accuracy_error], abs=1e-9)
    assert table.sorts("items") == [4, 4]
    assert table.sorts("clusters") == ([3, 3] if documents[1] == 0 else [None, None])
    words = section(page)
    assert "right there only" in words and words.count("right here only") == 1
    # Largest change first: losses 0.5 to 2.5 and 1.0 to 2.0.
    flips = page.tables["right-in-one"]
    assert flips.texts("item") == ["1", "0", "3"]
    first = [column[0] for column in map(flips.sorts, ("item", "there", "here", "rise"))]
    assert first == [1.0, 0.5, 2.5, 2.0]


def test_paired_results_are_shown_as_they_are() -> None:
    here, there = two_classifiers([0, 0, 2, 3])
    loss = PairedLoss(
        metric="loss",
        measure="nats/example",
        baseline=0.9375,
        compressed=3.9375,
        drop=3.0,
        stderr=1.5,
        items=4,
        clusters=3,
    )
    accuracy = PairedLoss(
        metric="accuracy",
        measure="fraction",
        baseline=0.75,
        compressed=0.5,
        drop=0.25,
        stderr=0.05,
        items=4,
        clusters=3,
    )
    page = parsed(here, OtherRun(name="b", record=there, paired=(loss, accuracy)))
    table = page.tables["paired"]
    assert table.sorts("here") == [3.9375, 50] and table.sorts("there") == [0.9375, 75]
    assert table.sorts("z") == pytest.approx([2, 5]) and table.sorts("clusters") == [3, 3]
    texts = [plain(text) for text in table.texts(HEADS)]
    assert texts == [
        "3.0 \N{PLUS-MINUS SIGN} 1.5 nats/example",
        "25.0 \N{PLUS-MINUS SIGN} 5.0 percentage points",
    ]
    assert page.tables["right-in-one"].texts("item") == ["1", "0", "3"]
    endless = replace(loss, stderr=math.nan)
    page = parsed(here, OtherRun(name="b", record=there, paired=(endless,)))
    assert page.tables["paired"].sorts("z") == [None]


def test_figures_stand_side_by_side(small: RunRecord) -> None:
    assert small.verdict is not None and small.size.after_bytes is not None
    undecided = replace(small.verdict, drop=0.010713, status="INCONCLUSIVE", max_drop=0.01)
    last = replace(small.trials[-1], predicted=0.00312, predicted_stderr=0.0005)
    first = replace(small.stages[0], seconds=small.stages[0].seconds + 30)
    there = replace(
        small,
        verdict=undecided,
        size=replace(small.size, after_bytes=small.size.after_bytes + 2500),
        trials=(*small.trials[:-1], last),
        stages=(first, *small.stages[1:]),
    )
    here = replace(small, structured=replace(REMOVED, predicted=0.004, predicted_stderr=0.001))
    table = parsed(here, OtherRun(name="b", record=there)).tables["against"]
    rows = dict(zip(table.texts("figure"), table.rows, strict=True))
    assert [cell.text for cell in rows["verdict"][1:]] == ["CERTIFIED", "INCONCLUSIVE", ""]
    differences = {label: row[3].sort for label, row in rows.items()}
    assert differences["drop (loss, nats/token)"] == pytest.approx(0.004)
    assert differences["budget (loss, nats/token)"] == pytest.approx(0.01)
    assert differences["weights"] == -2500 and differences["time"] == pytest.approx(-30)
    assert differences["predicted loss (nats/token)"] == pytest.approx(0.01)
    assert plain(rows["weights"][3].text) == "-2.500 kB" and rows["items"][3].text == "0"
    assert rows["drop (loss, nats/token)"][3].text == "+0.00400"
    units = rows["predicted cost of the removed units (nats/token)"]
    assert units[2].text == "n/a" and units[3].sort is None
    # Another metric is another quantity: no difference is formed.
    other = replace(there, verdict=replace(undecided, metric="accuracy", measure="fraction"))
    table = parsed(here, OtherRun(name="b", record=other)).tables["against"]
    found = dict(zip(table.texts("figure"), table.sorts("difference"), strict=True))
    assert found["drop (loss, nats/token)"] is None
    assert found["drop (accuracy, percentage points)"] is None


def test_layers_recipes_and_provenance_that_differ(small: RunRecord) -> None:
    first, second, third, gone, *others = small.layers
    there = replace(
        small,
        layers=(
            replace(first, option="int2-g64-asym", bytes=1234, price=0.5, stderr=0.25),
            replace(second, shape=(1, 2)),
            replace(third, name="only.there"),
            *others,
        ),
        recipe=small.recipe.replace("max_drop: 0.02", "max_drop: <i>0.03</i>"),
        provenance=replace(PROVENANCE, torch="2.6.0"),
    )
    page = parsed(small, OtherRun(name="b", record=there, unpaired="the moon is full"))
    table = page.tables["differing"]
    assert table.texts("layer") == [first.name, third.name, gone.name, "only.there"]
    none = "no such layer"
    assert table.texts("option there") == ["int2-g64-asym", none, none, third.option]
    assert table.sorts("bytes there") == [1234, None, None, third.bytes]
    assert table.sorts("bytes here") == [first.bytes, third.bytes, gone.bytes, None]
    words = section(page)
    assert (
        "5 layers got the same option in both runs, 1 of them with another shape; 2 exist here "
        "only; 1 exists there only." in words
    )
    assert "no paired difference: the moon is full" in words
    assert "- max_drop: <i>0.03</i> + max_drop: 0.02" in words
    origins = [[cell.text for cell in row] for row in page.tables["origins"].rows]
    assert origins == [["torch", "2.13.0", "2.6.0"]]
    assert "11 Compared with b" in page.words and "#against" in page.attributes("a", "href")
    unplanned = OtherRun(name="b", record=replace(there, layers=()))
    assert "one of the two runs chose no plan" in section(parsed(small, unplanned))


def test_without_the_same_items_there_is_no_paired_number(tmp_path: Path) -> None:
    here, there = two_classifiers([0, 1, 2, 3])
    assert there.items is not None
    hashes = {**PROVENANCE.data_sha256, "certify": "00" * 32}
    cases = (
        (replace(there, items=None), "the other run has no results of single items on record"),
        (
            replace(there, provenance=replace(PROVENANCE, data_sha256=hashes)),
            "not measured on the same certify split",
        ),
        (
            replace(there, items=replace(there.items, index=(0, 1, 2, 4))),
            "other items or positions of the certify split counted",
        ),
        (
            replace(there, objective="label-free"),
            "the losses differ in kind: classification here, label-free there",
        ),
    )
    for k, (other, reason) in enumerate(cases):
        folder = tmp_path / str(k)
        folder.mkdir()
        words = section(compared(folder, here, other))
        assert reason in words, reason
        assert "how much worse here" not in words and "right here only" not in words


def test_divergences_from_two_models_are_not_compared(tmp_path: Path) -> None:
    here, there = (replace(r, objective="label-free") for r in two_classifiers([0, 1, 2, 3]))
    there = replace(there, provenance=replace(PROVENANCE, model_sha256="00" * 32))
    words = section(compared(tmp_path, here, there))
    assert "the divergence from the run's own uncompressed model, and those differ" in words


def test_a_comparison_is_not_stored(tmp_path: Path) -> None:
    here, there = two_classifiers([0, 1, 2, 3])
    ours, theirs = written(tmp_path / "ours", here), written(tmp_path / "theirs", there)
    records = [folder / "report.json" for folder in (ours, theirs)]
    before = [path.read_bytes() for path in records]
    assert report(ours)[0] == 0
    alone = (ours / "report.html").read_text()
    assert alone == build(here)
    assert report(ours, "--against", theirs)[0] == 0
    assert "Compared with" in (ours / "report.html").read_text()
    assert not (theirs / "report.html").exists()
    assert before == [path.read_bytes() for path in records]
    assert report(ours)[0] == 0
    assert (ours / "report.html").read_text() == alone and "Compared with" not in alone


def test_a_run_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", two_classifiers([0, 0, 1, 2])[0])
    assert report(ours, "--against", ours)[0] == 0
    page = Page((ours / "report.html").read_text())
    words = section(page)
    assert "Every item that is right in one run is right in the other." in words
    assert "8 layers got the same option in both runs." in words and "The same." in words
    assert page.tables["paired"].sorts(HEADS)[0] == 0


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", two_classifiers([0, 1, 2, 3])[0])
    code, said = report(ours, "--against", tmp_path / "nowhere")
    assert code == 2 and "nowhere has no report.json" in said
    assert "run `curvprune run RECIPE --out" in said
    assert not (ours / "report.html").exists()


def test_a_record_of_another_version_is_named(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", two_classifiers([0, 1, 2, 3])[0])
    (ours / "report.json").write_text('{"format": 1}')
    code, said = report(ours)
    assert code == 2 and "was written by another version of curvprune" in said
