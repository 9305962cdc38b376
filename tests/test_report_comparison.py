"""Two runs side by side: differences and paired errors worked out by hand, and what must not be
compared."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from curvprune.cli import app
from curvprune.report import build, comparison, sections
from curvprune.run import pipeline as pipeline

from .test_report import (
    HOSTILE,
    WRONG,
    Page,
    hostile,
    parsed,
    paths,
    replaced,
    synthetic_record,
    visible,
)

NOT_A_NUMBER = re.compile(r"(?<![\w-])(nan|inf|-inf|None|Undefined)(?![\w-])")


def column(table: sections.Table, label: str) -> list[Any]:
    at = [c.label for c in table.columns].index(label)
    return [row[at] for row in table.rows]


def a_run(after: list[float], right: list[int], documents: list[int]) -> dict[str, Any]:
    """A classifier's record with four items on the certify split."""
    record = synthetic_record(blocks=1) | {"objective": "classification", "measure": "nats/example"}
    record["items"] = {
        "documents": ["a", "b", "c", "d"],
        "document": documents,
        "index": [0, 1, 2, 3],
        "count": [1] * 4,
        "before": [1.0] * 4,
        "after": after,
        "right_before": [1] * 4,
        "right_after": right,
    }
    return record


def two_runs(documents: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first one's losses are 1, 2, 3 and 6 higher; it is wrong on the first two items, the
    second on the last."""
    there = a_run([1.0, 0.5, 2.0, 0.25], [1, 1, 1, 0], documents)
    return a_run([2.0, 2.5, 5.0, 6.25], [0, 0, 1, 1], documents), there


def written(folder: Path, record: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(record))
    return folder


def compared(tmp_path: Path, here: dict[str, Any], there: dict[str, Any]) -> Page:
    ours, theirs = written(tmp_path / "ours", here), written(tmp_path / "theirs", there)
    page = Page(pipeline.rebuild_report(ours, against=theirs).read_text())
    assert page.errors == []
    return page


def section(page: Page) -> str:
    return page.words[page.words.rindex("Compared with") :]


def sorted_by(path: Path, table: str) -> list[float]:
    """The raw numbers behind the cells of a table."""
    text = path.read_text()
    return [
        float(v)
        for v in re.findall(
            r'data-v="([^"]+)"', text[text.index(f'id="t-{table}"') :].split("</table>")[0]
        )
    ]


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
    page = compared(tmp_path, *two_runs(documents))
    loss, accuracy = (3.0, loss_error), (0.25, accuracy_error)
    numbers = sorted_by(tmp_path / "ours" / "report.html", "paired")
    clusters = [3.0] if documents[1] == 0 else []
    expected = [
        3.9375,
        0.9375,
        loss[0],
        loss[0] / loss[1],
        4,
        *clusters,
    ]  # means of the losses, difference, z, items
    expected += [50, 75, accuracy[0], accuracy[0] / accuracy[1], 4, *clusters]
    assert numbers == pytest.approx(expected, abs=1e-9)
    words = section(page)
    assert "right there only" in words and words.count("right here only") == 1
    # Largest change first: losses 0.5 to 2.5 and 1.0 to 2.0.
    text = (tmp_path / "ours" / "report.html").read_text()
    flips = text[text.index('id="t-right-in-one"') :].split("</table>")[0]
    assert re.findall(r'<td class="n" data-v="(\d)\.0">\1</td><td class="mono">', flips) == [
        "1",
        "0",
        "3",
    ]
    losses = re.findall(r'data-v="([^"]+)"', flips.split("</tr>")[1])
    assert losses == ["1.0", "0.5", "2.5", "2.0"]  # item, there, here, rise


def test_figures_stand_side_by_side() -> None:
    here, there = synthetic_record(blocks=1), synthetic_record(blocks=1)
    there["verdict"] |= {"drop": 0.010713, "status": "INCONCLUSIVE", "max_drop": 0.01}
    there["size"] |= {"after_bytes": here["size"]["after_bytes"] + 2500}
    there["trials"][-1] |= {"predicted": 0.00312, "predicted_stderr": 0.0005}
    there["stages"][0]["seconds"] += 30
    here["structured"] = {"predicted": 0.004, "predicted_stderr": 0.001}
    table = comparison.figures(here | {"against": {"name": "b", "record": there}})
    rows = {str(row[0].text): row for row in table.rows}
    assert [str(c.text) for c in rows["verdict"][1:]] == ["CERTIFIED", "INCONCLUSIVE", ""]
    differences = {label: row[3].sort for label, row in rows.items()}
    assert differences["drop (loss, nats/token)"] == pytest.approx(0.004)
    assert differences["budget (loss, nats/token)"] == pytest.approx(0.01)
    assert differences["weights"] == -2500 and differences["time"] == pytest.approx(-30)
    assert differences["predicted loss (nats/token)"] == pytest.approx(0.01)
    assert str(rows["weights"][3].text) == "\N{MINUS SIGN}2.500\N{NO-BREAK SPACE}kB"
    assert (
        str(rows["items"][3].text) == "0"
        and str(rows["drop (loss, nats/token)"][3].text) == "+0.00400"
    )
    units = rows["predicted cost of the removed units (nats/token)"]
    assert str(units[2].text) == "n/a" and units[3].sort is None
    # Another metric is another quantity: no difference is formed.
    there["verdict"] |= {"metric": "accuracy", "measure": "fraction"}
    labels = {
        str(r[0].text): r[3].sort
        for r in comparison.figures(here | {"against": {"record": there}}).rows
    }
    assert labels["drop (loss, nats/token)"] is labels["drop (accuracy, percentage points)"] is None


def test_layers_recipes_and_provenance_that_differ() -> None:
    here, there = synthetic_record(blocks=1), synthetic_record(blocks=1)
    first, second, third, gone = (x["name"] for x in there["layers"][:4])
    there["layers"][0] |= {"option": "int2-g64-asym", "bytes": 1234, "price": 0.5, "stderr": 0.25}
    there["layers"][1]["shape"] = [1, 2]
    there["layers"][2]["name"] = "only.there"
    del there["layers"][3]
    there["recipe"] = here["recipe"].replace("max_drop: 0.02", "max_drop: <i>0.03</i>")
    there["provenance"]["torch"] = "2.6.0"
    record = here | {"against": {"name": "b", "record": there, "unpaired": "the moon is full"}}
    found = comparison.layers(record)
    assert [str(c.text) for c in column(found["table"], "layer")] == [
        first,
        third,
        gone,
        "only.there",
    ]
    assert [str(c.text) for c in column(found["table"], "option there")] == [
        "int2-g64-asym", "no such layer", "no such layer", there["layers"][2]["option"],
    ]  # fmt: skip
    assert column(found["table"], "bytes there")[0].sort == 1234
    assert [c.sort for c in column(found["table"], "bytes here")] == [
        *(here["layers"][k]["bytes"] for k in (0, 2, 3)), None,
    ]  # fmt: skip
    assert (
        found["only"] == (2, 1)
        and found["same"] == 5
        and found["reshaped"] == 1
        and second not in str(found)
    )
    page = parsed(record)
    words = section(page)
    same = "5 layers got the same option in both runs, 1 of them with another shape; 2 exist here only; 1 exists there"
    assert same in words
    assert "no paired difference: the moon is full" in words
    assert "- max_drop: <i>0.03</i> + max_drop: 0.02" in words
    assert [[str(c.text) for c in row] for row in comparison.provenance(record).rows] == [
        ["torch", "2.13.0", "2.6.0"]
    ]
    assert "11 Compared with b" in page.words and "#against" in page.attributes("a", "href")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("items",), None, "the other run has no results of single items on record"),
        (
            ("provenance", "data_sha256", "certify"),
            "00" * 32,
            "not measured on the same certify split",
        ),
        (("provenance",), None, "not measured on the same certify split"),
        (("items", "index"), [0, 1, 2, 4], "other items or positions of the certify split counted"),
        (
            ("objective",),
            "label-free",
            "the losses differ in kind: classification here, label-free there",
        ),
    ],
)
def test_without_the_same_items_there_is_no_paired_number(
    tmp_path: Path, path: Any, value: Any, reason: str
) -> None:
    here, there = two_runs([0, 1, 2, 3])
    words = section(compared(tmp_path, here, replaced(there, path, value)))
    assert reason in words and "how much worse here" not in words and "right here only" not in words


def test_divergences_from_two_models_are_not_compared(tmp_path: Path) -> None:
    here, there = ({**run, "objective": "label-free"} for run in two_runs([0, 1, 2, 3]))
    there["provenance"]["model_sha256"] = "00" * 32
    words = section(compared(tmp_path, here, there))
    assert "the divergence from the run's own uncompressed model, and those differ" in words


def test_a_comparison_is_not_stored(tmp_path: Path) -> None:
    here, there = two_runs([0, 1, 2, 3])
    ours, theirs = written(tmp_path / "ours", here), written(tmp_path / "theirs", there)
    before = (ours / "report.json").read_bytes(), (theirs / "report.json").read_bytes()
    plain = pipeline.rebuild_report(ours).read_text()
    runner = CliRunner()
    assert runner.invoke(app, ["report", str(ours), "--against", str(theirs)]).exit_code == 0
    assert (
        "Compared with" in (ours / "report.html").read_text()
        and not (theirs / "report.html").exists()
    )
    assert before == ((ours / "report.json").read_bytes(), (theirs / "report.json").read_bytes())
    assert runner.invoke(app, ["report", str(ours)]).exit_code == 0
    assert (ours / "report.html").read_text() == plain and "Compared with" not in plain


def test_a_run_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", two_runs([0, 0, 1, 2])[0])
    page = Page(pipeline.rebuild_report(ours, against=ours).read_text())
    words = section(page)
    assert "Every item that is right in one run is right in the other." in words
    assert "8 layers got the same option in both runs." in words and "The same." in words
    assert sorted_by(ours / "report.html", "paired")[2] == 0


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", two_runs([0, 1, 2, 3])[0])
    with pytest.raises(
        ValueError, match=r"nowhere has no report\.json: run `curvprune run RECIPE --out .*nowhere`"
    ):
        pipeline.rebuild_report(ours, against=tmp_path / "nowhere")
    result = CliRunner().invoke(app, ["report", str(ours), "--against", str(tmp_path / "nowhere")])
    assert result.exit_code == 2 and "nowhere has no report.json" in " ".join(result.output.split())
    assert not (ours / "report.html").exists()


@pytest.fixture(scope="module")
def both() -> dict[str, Any]:
    here, there = two_runs([0, 1, 2, 3])
    paired = {
        "loss": {
            "metric": "loss",
            "measure": "nats",
            "drop": 1.0,
            "stderr": 0.5,
            "items": 4,
            "compressed": 2.0,
        }
    }
    keep = (
        "layers",
        "verdict",
        "size",
        "items",
        "recipe",
        "provenance",
        "trials",
        "objective",
        "measure",
        "stages",
    )
    here, there = ({k: run[k] for k in keep} for run in (here, there))
    for run in (here, there):
        run["layers"], run["trials"], run["stages"] = (
            run["layers"][:2],
            run["trials"][-1:],
            run["stages"][:1],
        )
    return here | {"against": {"name": "b", "record": there, "paired": paired}}


def test_wrong_values_render_anywhere(both: dict[str, Any]) -> None:
    for k, path in enumerate(p for p in paths(both) if p[0] == "against"):
        for value in WRONG if len(path) < 3 else [WRONG[(5 * k) % len(WRONG)]]:
            text = visible(build(replaced(both, path, value)))
            assert not NOT_A_NUMBER.search(text.replace("None on record", "")), (path, value)
        if isinstance(path[-1], str):
            build(replaced(both, path, None, delete=True))
    for key in both:
        build(replaced(both, (key,), None, delete=True))


def test_the_other_run_is_escaped(both: dict[str, Any]) -> None:
    poisoned = copy.deepcopy(both)
    other = synthetic_record(blocks=1)
    poisoned["against"] |= {
        "name": HOSTILE,
        "record": hostile(other),
        "unpaired": HOSTILE,
        "paired": {},
    }
    page = parsed(poisoned)
    assert [t for t, _ in page.tags].count("script") == 1
    assert {t for t, _ in page.tags}.isdisjoint({"img", "iframe"}) and "alert" not in "".join(
        page.script
    )
    assert section(page).count("http://evil.example") > 5
