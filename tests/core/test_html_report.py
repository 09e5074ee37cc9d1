"""Pages are well-formed, escape everything and ask nobody for anything."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from microlm.core.report import Page, charts, escape, shown

EVIL = "<script>alert('x')</script>&\"\x00\ud800"
VOID = {"meta", "br", "link"}


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def full_page() -> Page:
    page = Page(f"Report {EVIL}", f"sub {EVIL}")
    for i in range(3):
        page.heading(f"Section {i} {EVIL}")
    page.heading("Sub", 3)
    page.paragraph(f"One {EVIL}\n\nTwo")
    page.paragraph("quiet", note=True)
    page.code(EVIL)
    page.facts({"loss": 1.23456, EVIL: EVIL})
    page.table(["name", EVIL, "n"], [["a", 0.5, 12345], [EVIL, None, 7]], caption=EVIL)
    page.line_chart(EVIL, {EVIL: [(0, 1.0), (1, 2.0)], "b": [(0, float("nan")), (1, 3.0)]}, EVIL, EVIL)
    page.bar_chart(EVIL, [(EVIL, 0.5, (0.4, 0.6)), ("none", None, None)], unit=EVIL)
    page.details(EVIL, EVIL)
    inner = Page("inner")
    inner.paragraph("inside")
    page.details("more", inner)
    page.conversation([("user", EVIL), ("assistant", "你好")], note=EVIL)
    return page


def test_the_page_is_balanced_and_escapes_everything() -> None:
    text = full_page().html()
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    assert "script" not in parser.tags and "alert('x')" not in text
    assert "\x00" not in text
    text.encode("utf-8")
    assert "inside" in text and "你好" in text


def test_the_page_asks_nobody_for_anything() -> None:
    text = full_page().html().replace('xmlns="http://www.w3.org/2000/svg"', "")
    parser = Balance()
    parser.feed(text)
    assert not re.search(r"https?://|url\(|@import|//[a-z]", text)
    assert not {"script", "img", "link", "iframe", "object"} & parser.tags
    assert all(v.startswith("#") for k, v in parser.attributes if k in ("href", "src"))
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text


def test_contents_link_to_headings() -> None:
    text = full_page().html()
    targets = re.findall(r'<a href="#(\w+)"', text)
    assert len(targets) == 3 and all(f'id="{t}"' in text for t in targets)


def test_numbers_are_right_aligned_and_missing_ones_are_dashes() -> None:
    page = Page("t")
    page.table(
        ["model", "f1", "interval", "note"], [["a", 0.25, "0.6 [0.5, 0.7]", "x"], ["b", None, "–", "1st"]]
    )
    text = page.html()
    assert re.findall(r'<th scope="col"( class="number")?>', text) == [
        "",
        ' class="number"',
        ' class="number"',
        "",
    ]
    assert '<td class="number">–</td>' in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (True, "True"), (1234567, "1,234,567"), (0.123456, "0.1235"),
     (123456.7, "123,457"), ("x", "x"), (0.0, "0")],
)  # fmt: skip
def test_cells(value: object, text: str) -> None:
    assert shown(value) == text  # type: ignore[arg-type]


def test_escape() -> None:
    assert escape("<a b='c'>&") == "&lt;a b=&#x27;c&#x27;&gt;&amp;"
    assert escape("\x00\ud800ok\n") == "��ok\n"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.1, 0.9, [0.2, 0.4, 0.6, 0.8]), (-5, 5, [-4, -2, 0, 2, 4]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "points",
    [[(0, 5.0), (10, 1.0)], [(0, 5.0)], [], [(0, 1.0), (1, 1.0)], [(0, float("inf"))],
     [(i, i * i) for i in range(5000)], [(0, -1e9), (1, 1e9)], [(1, 1e-12), (2, 2e-12)]],
)  # fmt: skip
@pytest.mark.parametrize("log_y", [False, True])
def test_line_charts_are_xml_inside_their_frame(points: list[tuple[float, float]], log_y: bool) -> None:
    svg = charts.lines("t & u", {"a": points, "b": points}, "x", "y", log_y=log_y)
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img" and "t & u" in (root.get("aria-label") or "")
    for path in root.iter("{http://www.w3.org/2000/svg}path"):
        if path.get("class", "").startswith("line") and "h18" not in path.get("d", ""):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))]
            assert all(charts.LEFT <= x <= charts.WIDTH for x in numbers[::2])
            assert all(0 <= y <= charts.HEIGHT for y in numbers[1::2])
    assert len(svg) < 60_000


def test_long_series_keep_first_and_last() -> None:
    thin = charts.thin([(i, 0.0) for i in range(12345)])
    assert len(thin) == charts.MAX_POINTS and thin[0] == (0, 0.0) and thin[-1] == (12344, 0.0)


def test_bars_stay_in_their_box() -> None:
    svg = charts.bars(
        "f1", [("很长的名字" * 20, 3.0, (2.0, 9.0)), ("b", -1.0, None), ("c", None, None)], "", 1.0
    )
    root = ElementTree.fromstring(svg)
    for bar in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert (
            float(bar.get("width", "")) >= 0 and float(bar.get("x", "")) + float(bar.get("width", "")) <= 720
        )
    assert "not measured" in svg and "…" in svg
    assert "nothing was measured" in charts.bars("t", [], "", None)
