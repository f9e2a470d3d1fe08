"""The page of a report holds every site, worst first, in well-formed HTML that reaches for nothing outside itself."""

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxquant.page import CELLS, COLUMNS, DECADES, LEVELS, OUTLIER, TITLED, Channels, Row, lines, page, worst_first
from fxquant.page_frame import SCRIPT, STYLE

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style></script></table><h1>",
    "&lt;b&gt; &amp; &#60;",
    "<!-- -->",
    "]]>",
    "{title} {0} %s",
    "a\x00b\x1b[31mc\u202ed\ud800e",
    "größe.\u6f22\u5b57.weight",
    "",
]
numbers = st.none() | st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-300, 1e308])
texts = st.sampled_from(HOSTILE) | st.text(max_size=10)
magnitude = st.floats(0) | st.sampled_from([1.0, math.nan, math.inf])
magnitudes = st.lists(magnitude, max_size=9)
rows = st.builds(
    Row, name=texts, op=texts, spec=texts, kernel=texts, status=st.sampled_from(["quantized", "skipped"]) | texts, reason=texts,
    low=numbers, high=numbers, sqnr_weight=numbers, sqnr_activation=numbers, sqnr_output=numbers, sensitivity=numbers,
    before=magnitudes, after=magnitudes, elements=st.integers(0, 2**40), counted=st.booleans(),
)  # fmt: skip


TAGS = {
    *("html", "head", "meta", "title", "style", "script", "body", "header", "main", "h1", "p", "b", "i", "em", "small", "code"),
    *("dl", "dt", "dd", "div", "span", "input", "button", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("wbr", "svg", "g", "path", "rect"),
}
REACHING = {"src", "href", "xlink:href", "srcset", "action", "data", "style"}


class Page(HTMLParser):
    """Reads a page strictly: what is opened is closed, in order. Keeps tags, attributes, and text by the tags around it."""

    VOID = frozenset({"meta", "input", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def shown(text: str) -> str:
    """A text as a reader sees it, without a regular expression: no control characters, one space between words."""
    def safe(letter: str) -> bool:
        control = ord(letter) < 32 or 127 <= ord(letter) < 160
        return not control and letter not in "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" and not (
            "\ud800" <= letter <= "\udfff"
        )

    return "".join(letter if safe(letter) else "\ufffd" for letter in " ".join(text.split()))


def some(count: int, **changes) -> list[Row]:
    return [Row(name=f"layers.{i}.up.weight", sensitivity=(i * 7 % count) / 100, **changes) for i in range(count)]


# The page


@given(texts, st.lists(rows, max_size=4), texts, st.lists(texts, max_size=2))
def test_a_page_is_well_formed_shows_every_site_and_runs_no_script_but_its_own(title, given_rows, recipe, notes):
    text = page(title, given_rows, recipe=recipe, notes=notes)
    text.encode("utf-8")
    read = Page(text)
    assert [*read.texts.get("code", [])] == [shown(row.name) for row in worst_first(given_rows)]
    assert read.texts["h1"] == [shown(title)] and read.texts["title"][0] == shown(title)
    assert read.texts["script"] == [SCRIPT] and read.texts["style"] == [STYLE]
    for tag, attributes in read.tags:
        assert tag in TAGS and not REACHING & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)


def test_the_style_and_the_script_name_no_address():
    for text in (STYLE, SCRIPT):
        assert not re.search(r"//|url\(|@import|import\(|fetch|XMLHttp|http", text)


def test_the_policy_of_the_page_allows_its_own_script_and_style_alone():
    text = page("title", some(2))
    policy = next(a["content"] for a in Page(text).attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    for content, kind in ((STYLE, "style-src"), (SCRIPT, "script-src")):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_equal_rows_make_equal_pages():
    assert page("title", some(9)) == page("title", some(9))


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_every_row_has_a_cell_for_every_column(count):
    read = Page(page("title", some(count)))
    assert len(read.texts.get("code", [])) == count
    assert len(read.attributes("tr")) == (count + 1 if count else 0)
    assert len(read.attributes("td")) == count * (len(COLUMNS) - 1)
    assert len(read.attributes("button")) == (len(COLUMNS) if count else 0)
    assert ("There is no site to show" in page("title", [])) and read.texts["h1"] == ["title"]


def test_what_is_clicked_is_a_button_and_what_is_typed_into_has_a_name():
    read = Page(page("title", some(3)))
    assert all(a["type"] == "button" and a["title"] for a in read.attributes("button"))
    assert read.attributes("input")[0]["aria-label"] and {a.get("role") for a in read.attributes("span")} >= {"status"}
    assert [a for a in read.attributes("th") if "aria-sort" in a] == [{"scope": "col", "aria-sort": "descending"}]


def test_the_page_follows_light_and_dark_and_narrow_screens():
    assert "prefers-color-scheme: dark" in STYLE and "max-width: 900px" in STYLE
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(page("t", [])).attributes("meta")


def test_five_hundred_sites_of_a_thousand_spiky_channels_stay_below_five_megabytes():
    before = [float(1 + 40 * (i * i % 35 == 4) + i % 13 / 3 + (i % 11) ** 2 / 20) for i in range(1024)]
    after = [m / (1 + i % 3) for i, m in enumerate(before)]
    assert len(Channels.of(before).outliers) > 100
    same = dict(
        op="linear", spec="uint6 per tensor static x int6 per channel", kernel="cpu: int8 gemm", low=-3.0, high=4.0,
        elements=10**6, sqnr_weight=31.4, sqnr_activation=20.1, sqnr_output=25.2, before=before, after=after,
    )  # fmt: skip
    many = [Row(name=f"model.decoder.layers.{i}.self_attn.query.weight", sensitivity=i / 1e4, **same) for i in range(500)]
    text = page("title", many)
    assert len(text.encode()) < 5e6 and text.count("<code>") == 500


def summary(text: str) -> dict[str, str]:
    read = Page(text)
    return dict(zip(read.texts.get("dt", []), read.texts.get("dd", []), strict=True))


def test_the_summary_counts_what_the_table_shows():
    spiky, flat = [1.0] * 9 + [50.0], [1.0] * 10
    table = [
        Row(name="a.weight", elements=6, sensitivity=0.031, before=spiky, after=flat),
        Row(name="b.weight", elements=3, sensitivity=0.2, before=spiky, after=spiky),
        Row(name="c.weight", elements=1, status="skipped", reason="ignored"),
        Row(name="d.weight", elements=90, counted=False),
    ]
    assert summary(page("title", table, recipe="W6A6")) == {
        "recipe": "W6A6",
        "products quantized": "2 of 3",
        "weight elements quantized": "90.0%",
        "largest output error of one site": "20.0% b.weight",
        "outlier channels, all sites": "2 to 1",
    }
    assert summary(page("title", [])) == {"products quantized": "0 of 0"}


def test_a_share_is_not_rounded_up_to_all():
    table = [Row(name="a", elements=10**6), Row(name="b", elements=1, status="skipped")]
    assert summary(page("title", table))["weight elements quantized"] == "99.9%"
    assert summary(page("title", table[:1]))["weight elements quantized"] == "100.0%"


def test_notes_and_reasons_can_be_read():
    read = Page(page("title", [Row(name="head", status="skipped", reason="its inner size is 3")], notes=["2 weights < 3"]))
    assert read.texts["p"] == ["2 weights < 3", "skipped: its inner size is 3"]


def test_numbers_are_sorted_as_the_script_reads_them():
    worst = Row(name="w", sensitivity=math.nan, sqnr_weight=math.nan, sqnr_output=math.inf, sqnr_activation=-math.inf)
    values = [a.get("data-v") for a in Page(page("title", [worst])).attributes("td")]
    assert values == [None, "Infinity", "-Infinity", "-Infinity", "Infinity", None, None]


def rectangle(text: str, kind: str) -> dict[str, float]:
    found = re.search(rf"<svg class={kind} .*?<rect (.*?)/?>", text)
    return {name: float(value) for name, value in re.findall(r'(\w+)="?([-\d.]+)', found[1])} if found else {}


def test_ranges_share_one_axis_with_zero_in_the_middle():
    def span(low, high, *others):
        return rectangle(page("title", [Row(name="a", low=low, high=high), *others]), "span")

    assert span(-2.0, 2.0) == {"x": -100, "y": 2, "width": 200, "height": 4}
    assert span(0.0, 2.0)["x"] == 0 and span(0.0, 2.0)["width"] == 100
    narrow = span(-2.0, 2.0, Row(name="b", low=-200.0, high=200.0))
    assert abs(narrow["x"] + narrow["width"] / 2) <= 0.1  # both are written with one digit
    assert 10 < narrow["width"] < 60
    assert span(None, 2.0) == span(math.nan, 2.0) == span(0.0, math.inf) == {}


def test_bars_of_the_output_error_are_shares_of_the_largest():
    text = page("title", [Row(name="a", sensitivity=0.4), Row(name="b", sensitivity=0.1)])
    assert re.findall(r'<svg class=bar .*?<rect width="(\d+)"', text) == ["100", "25"]


# The heat maps


def stroked(path: str) -> list[int]:
    """The cells that a path paints."""
    at, cells = 0, []
    for skip, run in re.findall(r"m(\d+) 0h(\d+)", path):
        at += int(skip) + int(run)
        cells += range(at - int(run), at)
    return cells


def levels(strip: str, count: int) -> list[int]:
    """The colour of every cell, read back from the strokes; -1 for none."""
    found = [-1] * count
    for level, path in re.findall(r'<path class=h(\d+) d="(.*?)"', strip):
        for cell in stroked(path):
            assert found[cell] == -1
            found[cell] = int(level)
    return found


def strips(row: Row) -> list[str]:
    return re.findall(r"<svg class=heat .*?</svg>", page("title", [row]))


positive = st.floats(1e-6, 1e6)
channels = st.builds(list.__mul__, st.lists(positive | st.just(0.0), min_size=1, max_size=60), st.integers(1, 12))


@given(channels, channels)
def test_a_cell_has_the_colour_of_its_largest_channel_on_the_scale_of_the_site(before, after):
    found = strips(Row(name="a", before=before, after=after))
    assert len(found) == (1 if before == after else 2)
    top = max(before + after)
    for strip, side in zip(found, (before, after), strict=False):
        count = min(CELLS, len(side))
        colours = levels(strip, count)
        for cell, colour in enumerate(colours):
            inside = [m for i, m in enumerate(side) if cell * len(side) // count <= i < (cell + 1) * len(side) // count]
            largest = max(inside)
            if largest == 0:
                assert colour == -1
            else:
                share = LEVELS * (1 + math.log10(largest / top) / DECADES)
                assert abs(min(LEVELS - 1, max(0, share)) - colour - 0.5) <= 0.5 + 1e-6


@given(channels)
def test_exactly_the_cells_with_outliers_are_marked(side):
    (strip,) = strips(Row(name="a", before=side, after=side))
    count = min(CELLS, len(side))
    marks = [cell for path in re.findall(r'<path d="M0 2(.*?)"', strip) for cell in stroked(path)]
    middle = sorted(side)[(len(side) - 1) // 2]
    meant = {i for i, m in enumerate(side) if middle > 0 and m > OUTLIER * middle}
    cells = {next(c for c in range(count) if i < (c + 1) * len(side) // count) for i in meant}
    assert marks == sorted(cells)
    told = [int(c) for c in re.findall(r"channel (\d+):", strip)]
    assert len(told) == min(TITLED, len(meant)) and set(told) <= meant


def test_an_outlier_says_on_hover_which_channel_it_is():
    side = [1.0] * 768
    side[308], side[381] = 31.0, 12.4
    text = page("title", [Row(name="a", before=side, after=[1.0] * 768)])
    assert "channel 308: 31, 31 times the median" in Page(text).texts["title"] and "2 outliers: 308, 381" in text
    assert len(strips(Row(name="a", before=side))) == 1


@given(st.lists(magnitude, max_size=20))
def test_what_is_not_finite_is_an_outlier_and_the_median_is_of_the_rest(values):
    found = Channels.of(values)
    wild = {i for i, m in enumerate(values) if not math.isfinite(m)}
    assert list(found.outliers.values()) == sorted(found.outliers.values(), reverse=True)
    assert math.isfinite(found.median) and (not found.median or wild <= set(found.outliers))


# The order, and the terminal


@given(st.lists(rows, max_size=8))
def test_the_worst_is_first_and_what_was_not_measured_last(given_rows):
    ordered = worst_first(given_rows)
    assert sorted(map(id, ordered)) == sorted(map(id, given_rows))
    done = [row for row in ordered if row.status == "quantized"]
    assert ordered[: len(done)] == done
    errors = [math.inf if row.sensitivity is not None and math.isnan(row.sensitivity) else row.sensitivity for row in done]
    measured = [e for e in errors if e is not None]
    assert measured == sorted(measured, reverse=True)
    tail = errors.index(None) if None in errors and -math.inf not in measured else len(errors)
    assert all(e is None for e in errors[tail:])


def test_sites_of_one_output_error_are_sorted_by_the_noise_of_their_output():
    table = [Row(name=str(noise), sqnr_output=noise) for noise in (None, 30.0, math.inf, 10.0, math.nan)]
    assert [row.name for row in worst_first(table)] == ["nan", "10.0", "30.0", "None", "inf"]


def test_the_table_of_the_terminal_is_for_reading():
    table = [
        Row(name="a.weight", op="linear", spec="int8 x int8", sensitivity=0.004, sqnr_weight=40.0, sqnr_activation=math.inf,
            sqnr_output=38.25, low=-1.0, high=2.5, before=[1.0, 1.0, 9.0], after=[1.0, 1.0, 1.0], elements=6),
        Row(name="bb.weight", op="linear", spec="int8 x int8", sensitivity=0.31),
        Row(name="head", op="linear", status="skipped", reason="ignored"),
    ]  # fmt: skip
    assert lines(table).split("\n") == [
        "site       spec                output error  weight dB  input dB  output dB  input range  outliers",
        "bb.weight  int8 x int8 linear         31.0%",
        "a.weight   int8 x int8 linear          0.4%       40.0     exact       38.2  -1 to 2.5    1 -> 0 of 3 channels",
        "",
        "in floating point",
        "  head  linear  ignored",
    ]
    assert lines([]) == "" and lines(table[2:]) == "in floating point\n  head  linear  ignored"


@given(st.lists(rows, max_size=4))
def test_every_site_has_its_line_and_nothing_commands_the_terminal(given_rows):
    text = lines(given_rows)
    assert all(shown(row.name) in text for row in given_rows)
    assert shown(text) == " ".join(text.split())
    done = sum(row.status == "quantized" for row in given_rows)
    rest = len(given_rows) - done
    assert text.count("\n") + 1 == max(1, done + bool(done) + rest + bool(rest) + bool(done and rest))
