"""A report as a reader meets it: strictly parsed, with its words, figures, tables and charts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from xml.etree import ElementTree

from curvprune.record import OtherRun, RunRecord
from curvprune.report import build

VOID = {"meta", "link", "input", "br", "hr", "img", "base", "col", "area", "source", "embed"}
LOADING = {"img", "iframe", "object", "embed", "form", "link"}
NOT_A_NUMBER = re.compile(r"(?<![\w-])(nan|inf|-inf|None|Undefined)(?![\w-])")
Attributes = dict[str, str | None]


@dataclass
class Cell:
    """A cell of a table: what it says, the number it sorts by, its classes."""

    attributes: Attributes
    text: str = ""

    @property
    def sort(self) -> float | None:
        value = self.attributes.get("data-v")
        return None if value is None else float(value)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


@dataclass
class Table:
    """A table: heads, rows, and the last row that stays in place."""

    columns: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    foot: list[Cell] = field(default_factory=list)

    def column(self, label: str) -> list[Cell]:
        at = self.columns.index(label)
        return [row[at] for row in self.rows]

    def texts(self, label: str) -> list[str]:
        return [cell.text for cell in self.column(label)]

    def sorts(self, label: str) -> list[float | None]:
        return [cell.sort for cell in self.column(label)]


class Page(HTMLParser):
    """Parses strictly: every element closed in order, ids unique, attributes unique."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.open: list[str] = []
        self.tags: list[tuple[str, Attributes]] = []
        self.errors: list[str] = []
        self.text: list[str] = []
        self.script: list[str] = []
        self.data: list[tuple[float, str]] = []
        self.tables: dict[str, Table] = {}
        self.facts: dict[str, str] = {}
        self._table = Table()
        self._cell: Cell | None = None
        self._label = ""
        self.feed(html)
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
        if tag == "table":
            self._table = self.tables[(dict(attrs)["id"] or "").removeprefix("t-")] = Table()
        elif tag == "tr" and "tbody" in self.open:
            self._table.rows.append([])
        elif tag in ("th", "td"):
            self._cell = Cell(dict(attrs))
        elif tag == "dt":
            self._label = ""

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"</{tag}> at {self.getpos()} closes nothing or the wrong element")
        if tag in ("th", "td") and self._cell is not None:
            if tag == "th":
                self._table.columns.append(self._cell.text)
            else:
                (self._table.rows[-1] if "tbody" in self.open else self._table.foot).append(
                    self._cell
                )
            self._cell = None
        if tag == "dd":
            self._label = ""

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.script.append(data)
        elif inside != "style":
            self.text.append(data)
        if inside == "data":
            self.data.append((float(self.tags[-1][1]["value"] or "nan"), data))
        if self._cell is not None:
            self._cell.text += data
        elif inside == "dt":
            self._label += data
        elif "dd" in self.open and self._label:
            self.facts[self._label] = self.facts.get(self._label, "") + data

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def section(self, start: str, end: str = "") -> str:
        """The words from a head's last occurrence up to another's."""
        words = self.words[self.words.rindex(start) :]
        return words[: words.index(end)] if end else words

    def attributes(self, tag: str, name: str) -> list[str]:
        return [a[name] or "" for t, a in self.tags if t == tag and name in a]

    def chart(self, label: str) -> Chart:
        """The chart whose label starts so."""
        return next(chart for chart in self.charts() if chart.label.startswith(label))

    def charts(self) -> Iterator[Chart]:
        for text in re.findall(r'<svg class="chart.*?</svg>', self.html, re.S):
            yield Chart(ElementTree.fromstring(text))


@dataclass
class Chart:
    """An SVG chart; positions are pixels."""

    root: ElementTree.Element

    @property
    def label(self) -> str:
        return self.root.get("aria-label") or ""

    def elements(self, tag: str = "*", class_: str = "") -> list[ElementTree.Element]:
        """Elements that have all classes of ``class_``."""
        wanted = set(class_.split())
        found = self.root.iter(None if tag == "*" else tag)
        return [e for e in found if wanted <= set((e.get("class") or "").split())]

    def titles(self, tag: str = "*", class_: str = "") -> list[str]:
        return [e.findtext("title") or "" for e in self.elements(tag, class_)]

    def marks(self, class_: str) -> list[tuple[float, float]]:
        """Centres of circles and polygons, in drawing order."""
        found = []
        for element in self.elements("*", class_):
            if element.tag == "circle":
                found.append((number(element, "cx"), number(element, "cy")))
            elif element.tag == "polygon":
                xs, ys = zip(*corners(element), strict=True)
                found.append(((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2))
        return found

    def ticks(self, anchor: str) -> dict[str, float]:
        """Label → place of the ticks across (``middle``) or up (``end``)."""
        texts = [e for e in self.elements("text", "tick") if e.get("text-anchor") == anchor]
        key = "x" if anchor == "middle" else "y"
        return {e.text or "": number(e, key) for e in texts}


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.attrib[name])


def corners(element: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of a polygon or polyline."""
    places = [place.split(",") for place in element.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in places]


def parsed(record: RunRecord, against: OtherRun | None = None) -> Page:
    page = Page(build(record, against))
    assert page.errors == []
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    return page


def assert_harmless(page: Page) -> None:
    """One script, our own, and nothing that loads or runs."""
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and set(tags).isdisjoint(LOADING)
    names = set()
    for _, attributes in page.tags:
        names |= set(attributes)
    assert not [name for name in names if name.startswith("on") or name in ("src", "xlink:href")]
    assert all(href.startswith("#") for href in page.attributes("a", "href"))
    assert "alert" not in "".join(page.script)
    assert not {"\x00", "\x1b"} & set(page.html)
    page.html.encode("utf-8")


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


def visible(text: str) -> str:
    """What a reader or a tooltip shows: no style, no script."""
    shown = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.S)
    return shown.replace("None on record", "")


def luminance(colour: str) -> float:
    """WCAG 2 relative luminance."""
    channels = []
    for k in (1, 3, 5):
        c = int(colour[k : k + 2], 16) / 255
        channels.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    red, green, blue = channels
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
