"""The report: true to the record, safe against what the record contains, readable when half of it
is missing."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from curvprune.report import build, charts, curvature, figures, sections, summary

VOID = {
    "meta",
    "link",
    "input",
    "br",
    "hr",
    "img",
    "base",
    "col",
    "area",
    "source",
    "track",
    "wbr",
    "embed",
}
KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
BITS = {
    "keep": 16.0,
    "int8-g64-sym": 8.25,
    "int4-g64-asym": 4.31,
    "int3-g64-asym": 3.3,
    "prune0.5+int4-g64-sym": 4.25,
    "int2-g64-asym": 2.28,
}
ERROR = {
    "keep": 0.0,
    "int8-g64-sym": 3e-8,
    "int4-g64-asym": 9e-6,
    "int3-g64-asym": 4.5e-5,
    "prune0.5+int4-g64-sym": 7e-5,
    "int2-g64-asym": 4e-4,
}
RECIPE = """model: HuggingFaceTB/SmolLM2-135M
budget:
  metric: loss
  max_drop: 0.02
options:
  - keep
  - quantize: {bits: 4, group_size: 64}
# source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M
"""
HOSTILE = (
    "\"'></pre></title></style><script>alert(1)</script><img src=http://evil.example/x "
    "onerror=alert(2)>\x00\x1b[31m\ud800{{ 7*7 }}"
)


def synthetic_record(*, blocks: int = 30, seed: int = 0) -> dict[str, Any]:
    """A run like a 135 M parameter causal language model's: ``7 blocks + 1`` layers, six options
    each."""
    rng = random.Random(seed)
    names = {
        f"model.layers.{b}.{kind}": shape for b in range(blocks) for kind, shape in KINDS.items()
    } | {"lm_head": (49152, 576)}
    layers: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    analysis: dict[str, Any] = {}
    for k, (name, (out, width)) in enumerate(names.items()):
        parameters = out * width
        depth = k / len(names)
        weight = (
            math.exp(rng.gauss(0, 0.6))
            * (1 + 3 * (depth - 0.5) ** 2)
            * (6 if "down" in name else 2 if "v_proj" in name else 1)
        )
        trace = 40 * weight * math.exp(rng.gauss(0, 0.3))
        analysis[name] = {
            "trace": {"value": trace, "stderr": trace * rng.uniform(0.02, 0.15)},
            "parameters": parameters,
            "diagonal": {
                "mean": trace / parameters,
                "max": 900 * trace / parameters,
                "q50": 0.2 * trace / parameters,
                "q99": 11 * trace / parameters,
            },
        }
        prices = {}
        for option, bits in BITS.items():
            price = ERROR[option] * weight * math.exp(rng.gauss(0, 0.2))
            stderr = price * rng.uniform(0.04, 0.2)
            if option == "int8-g64-sym":
                price, stderr = price + rng.gauss(0, 2e-8), 2e-8
            prices[option] = (price, stderr)
            rows.append(
                {
                    "layer": name,
                    "option": option,
                    "bytes": round(parameters * bits / 8),
                    "price": price,
                    "stderr": stderr,
                }
            )
        choice = (
            "int8-g64-sym"
            if name == "lm_head" or weight > 6
            else "int4-g64-asym"
            if weight > 1.4
            else rng.choice(
                ["int3-g64-asym", "int4-g64-asym", "int3-g64-asym", "prune0.5+int4-g64-sym"]
            )
        )
        layers.append(
            {
                "name": name,
                "kind": "Linear",
                "shape": [out, width],
                "parameters": parameters,
                "option": choice,
                "bytes": round(parameters * BITS[choice] / 8),
                "price": prices[choice][0],
                "stderr": prices[choice][1],
                "bits": BITS[choice],
                "reason": f"int2-g64-asym saves {parameters // 4} B more for {prices['int2-g64-asym'][0]:.2g} nats",
                "notes": ["damping raised to 0.05 after a failed Cholesky"] if k % 53 == 7 else [],
            }
        )
    priced = sum(x["bytes"] for x in layers)
    total = sum(x["parameters"] for x in layers)
    before, after = 2 * total + 250_000, priced + 250_000
    frontier = [
        {
            "bytes": round(after * (0.62 + 0.05 * k)),
            "predicted": 0.11 * math.exp(-0.31 * k),
            "predicted_stderr": 0.009 * math.exp(-0.28 * k),
        }
        for k in range(18)
    ]

    def verdict(drop: float, stderr: float, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "metric": "loss",
            "measure": "nats/token",
            "baseline": 2.91374,
            "compressed": 2.91374 + drop,
            "drop": drop,
            "stderr": stderr,
            "bound": drop + 1.6449 * stderr,
            "max_drop": 0.02,
            "confidence": 0.95,
            "items": 65408,
            "clusters": 511,
            "needed": None,
            "method": "paired, one-sided t over clusters (documents)",
        }

    def trial(
        name: str, kind: str, share: float, predicted: float, measured: float, note: str = ""
    ) -> dict[str, Any]:
        return {
            "name": name,
            "kind": kind,
            "bytes": round(after * share),
            "predicted": predicted,
            "predicted_stderr": 0.06 * abs(predicted) + 3e-4,
            "measured": measured,
            "measured_stderr": 0.0011 + 0.05 * abs(measured),
            "accepted": kind != "control" and measured < 0.02,
            "items": 32704,
            "note": note,
        }

    seconds = {
        "load": 4.2,
        "layers": 0.06,
        "curvature": 611.4,
        "price": 288.3,
        "plan": 3.9,
        "apply": 402.8,
        "certify": 96.1,
    }
    certified = verdict(0.014713, 0.001876, "CERTIFIED")
    return {
        "title": "SmolLM2-135M, budget 0.02 nats/token",
        "objective": "causal-lm",
        "measure": "nats/token",
        "verdict": certified,
        "attempts": [
            verdict(0.008112, 0.00143, "CERTIFIED") | {"plan": "plan-2"},
            certified | {"plan": "plan-3"},
        ],
        "items": {
            "documents": [f"topic {k}" for k in range(9)],
            "document": [k % 9 for k in range(48)],
            "index": list(range(48)),
            "count": [127] * 48,
            "before": [rng.gauss(2.9, 0.5) for _ in range(48)],
            "after": [rng.gauss(2.92, 0.5) for _ in range(48)],
        },
        "size": {
            "before_bytes": before,
            "after_bytes": after,
            "folder_bytes": after + 2_412_118,
            "ratio": before / after,
            "parameters": total + 125_000,
        },
        "layers": layers,
        "ledger": {
            "measure": "nats/token",
            "curvature": "Kronecker-factored Fisher, labels sampled from the model",
            "num_items": 512,
            "labels_per_item": 2,
            "rows": rows,
        },
        "trials": [
            trial(
                "plan-1",
                "plan",
                0.86,
                0.0271,
                0.0312,
                "over budget on select: re-planned with the measured loss",
            ),
            trial("plan-2", "plan", 1.12, 0.00795, 0.0083),
            trial("plan-3", "plan", 1.0, 0.01312, 0.0143),
            trial("uniform int4-g64-asym", "control", 1.07, 0.0214, 0.0231),
            trial("uniform int3-g64-asym", "control", 0.8, 0.147, 0.171),
            trial("reversed order", "control", 1.0, 0.2214, 0.296),
            trial("applied plan-3", "applied", 1.0, 0.01312, 0.01405),
        ],
        "frontier": frontier,
        "analysis": {"matrix": "Fisher (labels sampled from the model)", "layers": analysis},
        "stages": [{"name": n, "seconds": s, "resumed": n == "layers"} for n, s in seconds.items()],
        "peak_memory_bytes": 3_412_213_760,
        "provenance": {
            "curvprune": "0.1.0",
            "python": "3.12.4",
            "torch": "2.13.0",
            "transformers": "5.22.2",
            "platform": "Linux x86_64",
            "threads": 2,
            "seed": 0,
            "recipe_sha256": "9f" * 32,
            "model_sha256": "c4" * 32,
            "data_sha256": {"calibrate": "01" * 32, "select": "ab" * 32, "certify": "7e" * 32},
        },
        "recipe": RECIPE,
        "notes": [
            "layer lm_head is tied to model.embed_tokens and was untied",
            "2 calibration documents were shorter than 16 tokens and were left out",
        ],
    }


class Page(HTMLParser):
    """Parses strictly: every element closed in order, ids unique, attributes unique."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.errors: list[str] = []
        self.text: list[str] = []
        self.script: list[str] = []
        self.data: list[tuple[float, str]] = []
        self.feed(text)
        self.close()
        if self.open:
            self.errors.append(f"never closed: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) != len(names):
            self.errors.append(f"<{tag}> repeats an attribute: {names}")
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()} closes nothing or the wrong element")

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.script.append(data)
        elif inside != "style":
            self.text.append(data)
        if inside == "data":
            self.data.append((float(dict(self.tags[-1][1])["value"] or "nan"), data))

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def attributes(self, tag: str, name: str) -> list[str]:
        return [a[name] or "" for t, a in self.tags if t == tag and name in a]


def parsed(record: dict[str, Any]) -> Page:
    page = Page(build(record))
    assert page.errors == []
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    return page


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return synthetic_record()


@pytest.fixture(scope="module")
def page(record: dict[str, Any]) -> Page:
    return parsed(record)


@pytest.fixture
def small() -> dict[str, Any]:
    return synthetic_record(blocks=1)


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a nested record."""
    keys = (
        value.keys()
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        yield (*at, key)
        yield from paths(value[key], (*at, key))


def replaced(
    record: dict[str, Any], path: tuple[Any, ...], value: Any, *, delete: bool = False
) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    parent: Any = changed
    for key in path[:-1]:
        parent = parent[key]
    if delete:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return changed


def leaves(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {k: leaves(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [leaves(v, change) for v in value]
    return change(value)


def visible(text: str) -> str:
    """What a reader or a tooltip shows: no style, no script."""
    return re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)


# --- the page as a file
# ---------------------------------------------------------------------------------------------


def test_parses_with_every_section(page: Page) -> None:
    anchors = {a["href"] for t, a in page.tags if t == "a" and "href" in a}
    assert len(anchors) == 10
    assert {a.removeprefix("#") for a in anchors if a} <= {
        a["id"] for _, a in page.tags if "id" in a
    }
    assert "not available" not in page.words


def test_html5_parser_agrees(record: dict[str, Any]) -> None:
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(build(record))


def test_one_small_file_that_loads_nothing(record: dict[str, Any]) -> None:
    text = build(record)
    assert len(text.encode()) < 2_000_000
    assert len(record["ledger"]["rows"]) == 211 * 6
    assert not re.search(r"(src|href|action|poster|data|srcset)\s*=\s*[\"']?\s*(https?:)?//", text)
    assert not re.search(r"@import|url\(|<link|<img|<iframe|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_script_matches_the_hash_that_the_policy_allows(record: dict[str, Any]) -> None:
    import base64
    import hashlib

    page = parsed(record)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    script = "".join(page.script)
    assert len(script) > 100
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in (
        policy or ""
    )


def test_same_record_same_bytes_and_record_untouched(small: dict[str, Any]) -> None:
    before = json.dumps(small)
    assert build(small) == build(copy.deepcopy(small))
    summary(small)
    assert json.dumps(small) == before


def test_readable_in_dark_and_on_paper(record: dict[str, Any]) -> None:
    text = build(record)
    css = re.search(r"<style>(.*?)</style>", text, re.S)
    assert css is not None
    used = set(re.findall(r"var\((--[\w-]+)\)", css[1]))
    light, dark = css[1].split("@media (prefers-color-scheme: dark)", 1)
    dark = dark[: dark.index("* { box-sizing")]
    paper = css[1][css[1].index("@media print") :]
    for variable in used:
        assert f"{variable}:" in light and f"{variable}:" in dark and f"{variable}:" in paper, (
            variable
        )
    ink, ground = (re.search(rf"{v}: (#\w+)", dark) for v in ("--ink", "--page"))
    assert ink is not None and ground is not None and contrast(ink[1], ground[1]) > 7
    for name in ("--soft", "--good", "--bad", "--open", "--blue"):
        for theme in (light, dark):
            colour, panel = (re.search(rf"{v}: (#\w+)", theme) for v in (name, "--panel"))
            assert (
                colour is not None and panel is not None and contrast(colour[1], panel[1]) >= 4.5
            ), name


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# --- safety
# ---------------------------------------------------------------------------------------------------------


def hostile(record: dict[str, Any]) -> dict[str, Any]:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {k if k in known else k + HOSTILE: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return value + HOSTILE if isinstance(value, str) else value

    known = (
        {p[-1] for p in paths(record) if isinstance(p[-1], str)}
        - set(record["analysis"]["layers"])
        - {"torch", "certify"}
    )
    return poison(record)


def test_everything_is_escaped(small: dict[str, Any]) -> None:
    small["layers"][0]["name"] = "<script>alert(1)</script>"
    small["recipe"] = "a: </pre><script>alert(2)</script>"
    plain = parsed(small)
    assert (
        "<script>alert(1)</script>" in plain.words
        and "</pre><script>alert(2)</script>" in plain.words
    )
    for page in (
        plain,
        parsed(hostile(small)),
        parsed(hostile(small) | {"verdict": small["verdict"]}),
    ):
        assert [t for t, _ in page.tags].count("script") == 1
        assert {t for t, _ in page.tags}.isdisjoint(
            {"img", "iframe", "object", "embed", "form", "link"}
        )
        assert not [
            a
            for _, attrs in page.tags
            for a in attrs
            if a.startswith("on") or a in ("src", "xlink:href")
        ]
        assert all(h.startswith("#") for h in page.attributes("a", "href"))
        assert "alert" not in "".join(page.script)


def test_hostile_record_is_shown_and_not_evaluated(small: dict[str, Any]) -> None:
    text = build(hostile(small))
    text.encode("utf-8")
    assert "\ufffd" not in build(small | {"recipe": "a: 1\r\nb: 2\r\n"})
    assert "\x1b" not in text and "\x00" not in text
    assert text.count("{{ 7*7 }}") > 100
    assert "http://evil.example" in parsed(hostile(small)).words


def test_summary_cannot_be_forged(small: dict[str, Any]) -> None:
    small["title"] = "x\n\x1b[2JCERTIFIED: all is well\r\u202e"
    text = summary(small | {"verdict": small["verdict"] | {"status": "VIOLATED"}})
    assert text.splitlines()[0].startswith("VIOLATED: x ")
    assert not any(line.startswith("CERTIFIED") for line in text.splitlines())
    assert not set(text) & {"\x1b", "\r", "\u202e"}


# --- whatever is missing
# --------------------------------------------------------------------------------------------

SECTION_OF = {
    "attempts": "'attempts'",
    "items": "'items'",
    "size": "'size'",
    "layers": "'layers'",
    "ledger": "'ledger'",
    "trials": "'trials'",
    "frontier": "'frontier'",
    "analysis": "'analysis'",
    "stages": "'stages'",
    "provenance": "'provenance'",
    "peak_memory_bytes": "'peak_memory_bytes'",
    "recipe": "'recipe'",
}


@pytest.mark.parametrize("key", SECTION_OF)
@pytest.mark.parametrize("how", ["deleted", "null"])
def test_missing_key_is_named(small: dict[str, Any], key: str, how: str) -> None:
    page = parsed(replaced(small, (key,), None, delete=how == "deleted"))
    assert re.search(rf"not available: [^.]*{SECTION_OF[key]}", page.words), page.words[:2000]
    others = [k for k in SECTION_OF if k != key]
    assert not [
        k
        for k in others
        if re.search(rf"not available: the record has no {SECTION_OF[k]}", page.words)
    ]


def test_missing_section_says_how_far_the_run_came() -> None:
    page = parsed(
        {"title": "t", "stages": [{"name": "curvature", "seconds": 3.0, "resumed": False}]}
    )
    assert "the last stage on record is 'curvature'" in page.words


WRONG: list[Any] = [
    None,
    float("nan"),
    float("inf"),
    "words",
    -1,
    0,
    True,
    [],
    {},
    [1],
    10**400,
    5e-324,
    1e300,
]


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    """Two of everything, so that every place can be tried."""
    record = synthetic_record(blocks=1)
    for key in ("layers", "trials", "frontier", "attempts", "stages", "notes"):
        record[key] = record[key][-2:]
    record["ledger"]["rows"] = record["ledger"]["rows"][:2]
    record["items"] = {key: column[:2] for key, column in record["items"].items()}
    record["analysis"]["layers"] = dict(list(record["analysis"]["layers"].items())[:2])
    return record


@pytest.mark.parametrize("shift", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_wrong_values_render_anywhere(tiny: dict[str, Any], shift: int) -> None:
    for k, path in enumerate(paths(tiny)):
        # Whole sections get every wrong value over the three shifts, the places inside them one
        # each.
        values = WRONG[shift::3] if len(path) == 1 else [WRONG[(5 * k + shift) % len(WRONG)]]
        for value in values:
            changed = replaced(tiny, path, value)
            text = visible(build(changed))
            assert not re.search(
                r"(?<![\w-])(nan|inf|-inf|None|Undefined)(?![\w-])",
                text.replace("None on record", ""),
            ), (path, value)
            summary(changed)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")], ids=repr)
def test_all_numbers_missing_at_once(small: dict[str, Any], value: Any) -> None:
    bare = leaves(small, lambda v: value if isinstance(v, int | float) else v)
    page = parsed(bare)
    assert not re.search(r"(?<![\w-])(nan|inf|None)(?![\w-])", visible(build(bare)))
    assert "n/a" in page.words
    summary(bare)


def test_each_key_of_each_record_can_be_absent(tiny: dict[str, Any]) -> None:
    for path in [p for p in paths(tiny) if isinstance(p[-1], str)]:
        changed = replaced(tiny, path, None, delete=True)
        assert "not available" in build(changed) or path[0] not in SECTION_OF or len(path) > 1
        summary(changed)


def test_empty_record() -> None:
    page = parsed({})
    assert "NOT FINISHED" in page.words
    assert page.words.count("not available") >= 10
    assert summary({}).startswith("NOT FINISHED")


def test_no_budget_and_not_finished_are_told_apart(small: dict[str, Any]) -> None:
    small |= {"verdict": None, "attempts": []}
    assert "NO ACCURACY BUDGET ASKED" in parsed(small).words
    assert "NOT FINISHED" in parsed(small | {"budget": {"metric": "loss", "max_drop": 0.02}}).words
    assert "STATUS MISSING" in parsed(small | {"verdict": {"drop": 0.1}}).words
    for status in ("MAYBE", None):
        page = parsed(
            small
            | {
                "verdict": {
                    "status": status,
                    "drop": 0.1,
                    "bound": 0.2,
                    "max_drop": 0.3,
                    "confidence": 0.95,
                }
            }
        )
        assert "nothing is claimed" in page.words and "at most" not in page.words
    del small["verdict"]
    assert "NOT FINISHED" in parsed(small).words


# --- the verdict
# ----------------------------------------------------------------------------------------------------


def test_banner_shows_the_records_own_numbers(page: Page, record: dict[str, Any]) -> None:
    verdict = record["verdict"]
    shown = dict(page.data)
    for key in ("drop", "bound", "max_drop", "baseline", "compressed", "items", "clusters"):
        text = shown[float(verdict[key])]
        number = float(text.split("\N{NO-BREAK SPACE}")[0].replace(",", ""))
        decimals = len(text.split("\N{NO-BREAK SPACE}")[0].partition(".")[2])
        # A bound is rounded up, so it may be off by a whole last digit.
        assert (
            abs(number - verdict[key])
            <= (1.0 if key == "bound" else 0.5) * 10.0**-decimals * 1.0001
        ), key
    assert "0.0147 \N{PLUS-MINUS SIGN} 0.0019" in page.words
    assert "upper bound, 95 %" in page.words
    assert (
        "With 95 % confidence the compressed model's loss is at most 0.0178 nats/token above "
        "the uncompressed one's on data like the certify split, which no earlier step touched."
    ) in page.words


def test_accuracy_is_in_percentage_points(small: dict[str, Any]) -> None:
    small["verdict"] |= {
        "metric": "accuracy",
        "measure": "fraction",
        "baseline": 0.8123,
        "compressed": 0.8101,
        "drop": 0.0022,
        "stderr": 0.00171,
        "bound": 0.00501,
        "max_drop": 0.007,
    }
    page = parsed(small)
    shown = dict(page.data)
    assert shown[0.0022].replace("\N{NO-BREAK SPACE}", " ") == "0.22 \N{PLUS-MINUS SIGN} 0.17"
    assert (shown[0.00501], shown[0.007], shown[0.8123]) == ("0.51", "0.7", "81.23")
    assert "accuracy is at most 0.51 percentage points below the uncompressed one's" in page.words
    assert "the budget is one of accuracy" in page.words


def test_violated_and_inconclusive_say_what_to_do(small: dict[str, Any]) -> None:
    verdict = small["verdict"]
    bad = parsed(
        small | {"verdict": verdict | {"status": "VIOLATED", "drop": 0.041, "bound": 0.0441}}
    )
    assert (
        "loss is more than 0.02 nats/token above" in bad.words
        and "Offer milder options" in bad.words
    )
    open_ = small | {
        "verdict": verdict
        | {"status": "INCONCLUSIVE", "stderr": 0.0052, "bound": 0.023266, "needed": 203_456}
    }
    page = parsed(open_)
    assert "About 203,456 items, 138,048 more than the 65,408 used" in page.words
    assert dict(page.data)[203456.0] == "203,456"
    assert "INCONCLUSIVE" in summary(open_) and "203,456" in summary(open_)


def test_without_a_budget_the_measurement_is_shown_and_not_judged(small: dict[str, Any]) -> None:
    measured = small["verdict"] | {"status": "VIOLATED", "max_drop": 0.0, "needed": 77}
    page = parsed(small | {"verdict": None, "attempts": [], "budget": None, "measured": measured})
    banner = page.words[: page.words.index("Attempts on the certify split")]
    assert "NO ACCURACY BUDGET ASKED" in banner and "VIOLATED" not in banner
    assert (
        "a drop of 0.0147 \N{PLUS-MINUS SIGN} 0.0019 nats/token; the 95 % one-sided bound is 0.0178."
        in banner
    )
    assert dict(page.data)[measured["drop"]].startswith("0.0147") and 77.0 not in dict(page.data)
    assert 'class="budget"' not in str(
        sections.verdict_chart(small | {"verdict": None, "measured": measured})
    )


def test_ratio_is_read_either_way_round(small: dict[str, Any]) -> None:
    before, after = small["size"]["before_bytes"], small["size"]["after_bytes"]
    for ratio in (before / after, after / before):
        changed = small | {"size": small["size"] | {"ratio": ratio}}
        assert sections.inconsistencies(changed) == []
        assert dict(parsed(changed).data)[before / after].startswith(f"{before / after:.2f}")


def test_a_gain_is_not_called_a_loss(small: dict[str, Any]) -> None:
    page = parsed(
        small
        | {"verdict": small["verdict"] | {"drop": -0.0123, "stderr": 0.0011, "bound": -0.01049}}
    )
    assert "loss is at least 0.0104 nats/token below the uncompressed one's" in page.words


@pytest.mark.parametrize(
    ("bound", "budget", "decimals", "expected"),
    [
        (0.01781, None, 4, "0.0179"),
        (0.0178, None, 4, "0.0178"),
        (0.1 + 0.2, None, 1, "0.3"),
        (-0.01049, None, 4, "-0.0104"),
        (0.01996, 0.01997, 4, "0.01996"),
        (0.019996, 0.02, 4, "0.0200"),
        (0.020001, 0.02, 4, "0.0201"),
    ],
)
def test_bounds_round_away_from_the_claim(
    bound: float, budget: float | None, decimals: int, expected: str
) -> None:
    assert figures.at_most(bound, budget, decimals) == expected.replace("-", "\N{MINUS SIGN}")


def test_attempts_are_listed_in_order(page: Page) -> None:
    table = page.words[
        page.words.index("Attempts on the certify split") : page.words.index("weights before")
    ]
    assert table.index("plan-2") < table.index("plan-3")
    assert "0.0081 \N{PLUS-MINUS SIGN} 0.0014" in table


def test_limits_corrected_prices_and_a_control_that_won_are_shown(small: dict[str, Any]) -> None:
    limits = [
        {"name": "max_bits", "most": 4.25, "used": 4.2},
        {"name": "ms", "most": 1e6, "used": 987654.0},
    ]
    trials = [dict(trial) for trial in small["trials"]]
    assert "expected" not in [c.label for c in sections.trials_table(small).columns]
    trials[0]["expected"], trials[-1]["beats_plan"] = 0.0301, True
    record = small | {"limits": limits, "trials": trials, "corrections": {"int4-g64-sym": 1.1}}
    words = parsed(record).words
    for text in ("max_bits", "4.200 of 4.250", "987,654 of 1,000,000", "0.0301"):
        assert text in words, text
    assert f"A control, {trials[-1]['name']}, beats the plan and was used." in words
    assert "- within: max_bits 4.200 of 4.250; ms 987,654 of 1,000,000" in summary(record)
    assert "within:" not in summary(small) and "beats the plan" not in parsed(small).words


# --- notes
# ----------------------------------------------------------------------------------------------------------


def test_no_note_is_hidden(page: Page, record: dict[str, Any]) -> None:
    notes = page.words[page.words.rindex("Notes and warnings") :]
    for text in record["notes"]:
        assert text in notes
    for layer in record["layers"]:
        for text in layer["notes"]:
            assert text in notes and layer["name"] in notes
    assert "over budget on select" in notes
    assert "check of this report" not in notes


def test_contradictions_are_reported(small: dict[str, Any]) -> None:
    verdict, attempts = small["verdict"], small["attempts"]
    cases = {
        "not within its budget": {"verdict": verdict | {"bound": 0.0201}},
        "measured drop is within its budget": {"verdict": verdict | {"status": "VIOLATED"}},
        "upper bound is within its budget": {"verdict": verdict | {"status": "INCONCLUSIVE"}},
        "stops at the first failure, so the stated confidence": {
            "attempts": [attempts[0] | {"status": "INCONCLUSIVE"}, attempts[1]]
        },
        "more than the 1,000 B of all weights": {"size": {"after_bytes": 1000}},
        "fits neither before/after": {"size": small["size"] | {"ratio": 9.0}},
        "more of max_bits than the budget": {
            "limits": [{"name": "max_bits", "most": 4.0, "used": 4.5}]
        },
    }
    assert sections.inconsistencies(small) == []
    for text, change in cases.items():
        found = sections.inconsistencies(small | change)
        assert any(text in line for line in found)
        words = parsed(small | change).words
        banner, notes = (
            words[: words.index("Attempts on the certify split")],
            words[words.rindex("Notes and warnings") :],
        )
        assert all(line in banner and line in notes for line in found)


# --- numbers
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (0.0123456, 0.0021, "0.0123 ~ 0.0021"),
        (12345.678, 321.0, "12,350 ~ 320"),
        (3.14159, 0.0996, "3.14 ~ 0.10"),
        (1.2344e-6, 4.4e-8, "(1.234 ~ 0.044)x10^-6"),
        (-0.5, 0.25, "-0.50 ~ 0.25"),
        (-0.0001, 0.05, "0.000 ~ 0.050"),
        (0.0, 0.0, "0"),
        (0.5, None, "0.500 ~ n/a"),
        (None, 0.1, "n/a"),
        (float("nan"), 0.1, "n/a"),
        (9.9996, 0.0099, "9.9996 ~ 0.0099"),
    ],
)
def test_value_and_error_share_their_last_digit(value: Any, stderr: Any, expected: str) -> None:
    text = (
        figures.plus_minus(value, stderr)
        .replace("\N{NO-BREAK SPACE}", " ")
        .replace("\N{PLUS-MINUS SIGN}", "~")
    )
    text = text.replace(
        "\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT SIX}", "x10^-6"
    ).replace("\N{MINUS SIGN}", "-")
    assert text == expected


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (figures.size, 999, "999 B"),
        (figures.size, 999_999, "1.000 MB"),
        (figures.size, 98_234_567, "98.23 MB"),
        (figures.size, 1_234_567_890, "1.235 GB"),
        (figures.size, None, "n/a"),
        (figures.duration, 0.0634, "0.063 s"),
        (figures.duration, 59.96, "1 min 00 s"),
        (figures.duration, 611.4, "10 min 11 s"),
        (figures.duration, 3599.9, "1 h 00 min"),
        (figures.sig, 0.00099996, "0.00100"),
        (figures.sig, 1234567.0, "1.23\N{MULTIPLICATION SIGN}10\N{SUPERSCRIPT SIX}"),
        (figures.short, 0.02, "0.02"),
        (figures.short, 1e-5, "10\N{SUPERSCRIPT MINUS}\N{SUPERSCRIPT FIVE}"),
        (figures.short, 40000.0, "40,000"),
        (figures.percent, 0.95, "95 %"),
        (figures.percent, 0.999, "99.9 %"),
        (figures.count, 65408, "65,408"),
    ],
)
def test_units(function: Any, value: Any, expected: str) -> None:
    assert function(value).replace("\N{NO-BREAK SPACE}", " ") == expected


# --- charts
# ---------------------------------------------------------------------------------------------------------


def test_stacked_bar_adds_up_to_the_weights(record: dict[str, Any]) -> None:
    page = Page(str(sections.size_chart(record)))
    bars = [(float(a["y"] or 0), float(a["width"] or 0)) for t, a in page.tags if t == "rect"]
    first, second = sorted({y for y, _ in bars})
    before, after = sum(w for y, w in bars if y == first), sum(w for y, w in bars if y == second)
    assert before / after == pytest.approx(record["size"]["ratio"], rel=2e-3)
    titles = [
        m
        for m in re.findall(r"<title>(.*?)</title>", str(sections.size_chart(record)))
        if "everything else" in m
    ]
    assert titles == ["everything else: 250.0\N{NO-BREAK SPACE}kB"]


@pytest.mark.parametrize(
    "values", [(0.5, 2.0), (1e-6, 0.3), (-0.002, 5.0)], ids=["linear", "log", "asinh"]
)
def test_scatter_puts_equal_numbers_on_the_identity_line(values: tuple[float, float]) -> None:
    points = [
        charts.Point(
            number=k,
            name="p",
            shape="circle",
            class_="plan",
            bytes=1.0,
            predicted=v,
            predicted_stderr=1e-7,
            measured=v,
            measured_stderr=1e-7,
        )
        for k, v in enumerate(values)
    ]
    page = Page(str(charts.scatter(points, measure="nats")))
    line = next(a for t, a in page.tags if t == "line" and a.get("class") == "identity")
    x1, y1, x2, y2 = (float(line[k] or 0) for k in ("x1", "y1", "x2", "y2"))
    dots = [
        (float(a["cx"] or 0), float(a["cy"] or 0))
        for t, a in page.tags
        if t == "circle" and a.get("class") == "plan"
    ]
    assert len(dots) == 2
    for cx, cy in dots:
        assert (cx - x1) / (x2 - x1) == pytest.approx((cy - y1) / (y2 - y1), abs=1e-3)
        assert x1 < cx < x2 and y2 < cy < y1


def test_scales() -> None:
    log = charts.Scale(kind="log", low=1e-4, high=1.0, start=0, stop=100)
    assert [log(v) for v in (1e-4, 1e-3, 1e-2, 1.0, 50.0, -1.0)] == pytest.approx(
        [0, 25, 50, 100, 100, 0]
    )
    assert log.ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    linear = charts.Scale(kind="linear", low=-0.012, high=0.031, start=0, stop=43)
    assert linear.ticks(about=5) == pytest.approx([-0.01, 0, 0.01, 0.02, 0.03])
    assert linear(0.0) == pytest.approx(12)
    asinh = charts.Scale(kind="asinh", low=-10, high=10, start=0, stop=100, knee=0.1)
    assert asinh(0.05) == pytest.approx(50 + 50 * math.asinh(0.5) / math.asinh(100))
    assert asinh(0) == pytest.approx(50) and asinh(3) - 50 == pytest.approx(50 - asinh(-3))


def test_trials_are_told_apart_by_shape_and_colour(record: dict[str, Any]) -> None:
    points = sections.trial_points(record)
    families = {p.name.split("-")[0].split()[0]: (p.shape, p.class_) for p in points}
    looks = [families[n] for n in ("plan", "uniform", "reversed", "applied")]
    assert len({s for s, _ in looks}) == len({c for _, c in looks}) == 4
    for trials in (record["trials"], record["trials"][::-1]):
        assert [p.name for p in sections.trial_points({"trials": trials}) if p.chosen] == [
            "applied plan-3"
        ]
    assert [
        p.name for p in sections.trial_points({"trials": record["trials"][:-1]}) if p.chosen
    ] == ["plan-3"]
    assert str(charts.scatter(points, measure="nats")).count('class="ring"') == 1


def test_chosen_is_the_last_certified_attempt(small: dict[str, Any]) -> None:
    applied = [small["trials"][-1] | {"name": f"plan-{k}, applied"} for k in (2, 3)]
    first, second = small["attempts"]
    cases = [
        ([first, second], "plan-3, applied"),
        ([first, second | {"status": "INCONCLUSIVE"}], "plan-2, applied"),
        ([first | {"status": "VIOLATED"}, second], "plan-2, applied"),
    ]
    for attempts, expected in cases:
        points = sections.trial_points(
            {"trials": [*small["trials"][:-1], *applied], "attempts": attempts}
        )
        assert [p.name for p in points if p.chosen] == [expected]
    # One attempt, and a bolder applied model that select rejected: the attempt says which of the
    # two it was.
    only = first | {"plan": "plan-2, applied"}
    for trials in (applied, applied[::-1]):
        points = sections.trial_points({"trials": trials, "attempts": [only]})
        assert [p.name for p in points if p.chosen] == ["plan-2, applied"]


def test_trial_chance_and_accuracy_are_shown_where_recorded(small: dict[str, Any]) -> None:
    small["trials"][0] |= {"chance": 0.914, "metric_drop": 0.0123}
    heads = [c.label for c in sections.trials_table(small).columns]
    assert "chance" in heads and "accuracy drop" not in heads
    small["verdict"] |= {"metric": "accuracy"}
    table = sections.trials_table(small)
    shown = dict(
        zip([c.label for c in table.columns], [c.text for c in table.rows[0]], strict=True)
    )
    assert shown["chance"] == "0.91" and shown["accuracy drop"] == "1.23\N{NO-BREAK SPACE}pp"


def test_trial_arithmetic(small: dict[str, Any]) -> None:
    small["trials"] = [
        {
            "name": "p",
            "kind": "plan",
            "bytes": 10,
            "predicted": 0.010,
            "predicted_stderr": 0.003,
            "measured": 0.025,
            "measured_stderr": 0.004,
            "accepted": True,
            "items": 9,
            "note": "",
        }
    ]
    row = sections.trials_table(small).rows[0]
    gap, z, ratio = (row[k].sort for k in (6, 7, 8))
    assert gap == pytest.approx(0.015) and z == pytest.approx(3.0) and ratio == pytest.approx(2.5)
    assert row[6].text == figures.plus_minus(0.015, 0.005)
    assert sections.trials_reading(small).startswith("0 of 1 ")


def test_frontier_marks_budget_and_chosen_plan(record: dict[str, Any]) -> None:
    chart = str(sections.frontier_chart(record))
    assert chart.count('class="ring"') == 1 and chart.count('class="budget"') == 1
    assert chart.count('class="dot"') == len(record["frontier"])
    line = next(a for t, a in Page(chart).tags if t == "line" and a.get("class") == "budget")
    assert line["y1"] == line["y2"]
    sized = str(
        sections.frontier_chart(
            record | {"verdict": None, "budget": {"max_bytes": 40_000_000, "max_drop": None}}
        )
    )
    line = next(a for t, a in Page(sized).tags if t == "line" and a.get("class") == "budget")
    assert line["x1"] == line["x2"]


def test_heat_map_has_every_price_once(record: dict[str, Any]) -> None:
    chart, stem = sections.heat(record)
    titles = re.findall(r"<title>([^<]*nats/token[^<]*)</title>", str(chart))
    assert len(titles) == len(set(titles)) == len(record["ledger"]["rows"])
    assert sum(t.endswith(", chosen") for t in titles) == 211
    assert stem == "model.layers."
    row = record["ledger"]["rows"][4]
    assert (
        f"{row['layer']}, {row['option']}: {figures.plus_minus(row['price'], row['stderr'])} "
        "nats/token" in titles
    )
    assert str(chart).count('class="row"') == 211


def test_heat_map_colours_are_logarithmic_and_ordered() -> None:
    cells = {(f"l{k}", "o"): (10.0**-k, 1e-9) for k in range(5)} | {
        ("l5", "o"): (0.0, 0.0),
        ("l6", "o"): (-1e-3, 1e-3),
    }
    names = [f"l{k}" for k in range(7)]
    chart = charts.heat_map(
        charts.HeatMap(layers=names, labels=names, options=["o"], cells=cells), measure="nats"
    )
    rects = [
        a
        for t, a in Page(str(chart)).tags
        if t == "rect" and "cell" in (a.get("class") or "") and a["x"] != "498"
    ]
    fills = [a.get("fill") for a in rects][:7]
    assert fills[:5] == [charts.heat_colour(1 - k / 4) for k in range(5)]
    assert fills[5:] == [None, None]
    lightness = [contrast(charts.heat_colour(k / 50), "#000000") for k in range(51)]
    assert lightness == sorted(lightness) and lightness[-1] > 5 * lightness[0]


def test_every_price_is_also_plain_text(page: Page, record: dict[str, Any]) -> None:
    table = sections.ledger_table(record)
    texts = {str(c.text).removesuffix(" *") for r in table.rows for c in r}
    for row in record["ledger"]["rows"]:
        assert figures.plus_minus(row["price"], row["stderr"]) in texts
    assert page.attributes("table", "id").count("t-ledger") == 1
    assert sum(str(c.text).endswith(" *") for r in table.rows for c in r) == 211


def test_options_are_ordered_from_least_to_most_compressed(record: dict[str, Any]) -> None:
    assert sections.option_order(record) == sorted(BITS, key=lambda o: -BITS[o])
    colours = sections.option_colours(record)
    assert len(set(colours.values())) == 6


def test_options_table_sums(record: dict[str, Any]) -> None:
    foot = sections.options_table(record).foot
    assert foot[1].sort == 211
    assert foot[3].sort == sum(x["bytes"] for x in record["layers"])
    assert foot[6].sort == pytest.approx(sum(x["price"] for x in record["layers"]))


def test_curvature_chart_draws_each_layer_and_names_the_matrix(
    page: Page, small: dict[str, Any]
) -> None:
    assert "Matrix: Fisher (labels sampled from the model)." in page.words
    name, other = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    small["analysis"]["layers"][name]["trace"] = {"value": -0.2, "stderr": 0.3}
    small["analysis"]["layers"][other]["trace"] = {"value": None, "stderr": 0.3}
    shown = curvature.traces(small)
    assert str(shown["chart"]).count('class="point') == 7
    assert shown["hidden"] == [other]
    assert f"Not drawn (no trace on record): {other}." in parsed(small).words


def test_provenance_shows_every_hash(page: Page, record: dict[str, Any]) -> None:
    for value in (
        *record["provenance"]["data_sha256"].values(),
        record["provenance"]["model_sha256"],
        "2.13.0",
    ):
        assert value in page.words
    assert "https://huggingface.co/HuggingFaceTB/SmolLM2-135M" in page.words


def test_summary_has_the_numbers(record: dict[str, Any]) -> None:
    text = summary(record).replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith("CERTIFIED: SmolLM2-135M")
    for part in (
        "0.0147 \N{PLUS-MINUS SIGN} 0.0019 nats/token",
        "bound 0.0178",
        "budget 0.02",
        "511 clusters",
        "2.95 times smaller",
        "23 min 27 s",
    ):
        assert part in text, part
    assert len(text.splitlines()) < 20
