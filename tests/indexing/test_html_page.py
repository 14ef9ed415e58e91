import base64
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

from matplotlib.figure import Figure

from indexing.html_page import Section, html_page, percent

SCRIPT = "<script>alert('x')</script>"


class Reader(HTMLParser):
    """Tags, their attributes, and the text of cells."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.cells, self._is_cell = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._is_cell = tag in ("td", "th")
        if self._is_cell:
            self.cells.append("")

    def handle_endtag(self, tag):
        self._is_cell = False

    def handle_data(self, data):
        if self._is_cell:
            self.cells[-1] += data


def a_figure():
    figure = Figure((3, 2))
    figure.subplots().plot([1, 3, 2])
    return figure


def test_text_in_every_place_is_escaped():
    section = Section(SCRIPT, f"{SCRIPT}\n\n{SCRIPT}", [SCRIPT], [[SCRIPT]], a_figure())
    page = html_page(SCRIPT, [section])
    assert "<script" not in page
    found = Reader(page)
    assert found.cells == [SCRIPT, SCRIPT]
    assert [attrs["alt"] for tag, attrs in found.tags if tag == "img"] == [SCRIPT]


def test_the_page_needs_nothing_outside_itself():
    page = html_page("t", [Section("s", "", None, None, a_figure())])
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "url(" not in page
    [image] = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert ElementTree.fromstring(base64.b64decode(image)).tag.endswith("svg")


def test_the_same_sections_give_the_same_page():
    pages = {html_page("t", [Section("s", "a", None, None, a_figure())]) for _ in range(2)}
    assert len(pages) == 1


def test_cells_are_readable_and_numbers_stand_to_the_right():
    rows = [["a", 1234567, 0.123456, None, True], ["b", None, 12.0, "x", False]]
    found = Reader(html_page("t", [Section("s", "", ["n", "i", "f", "m", "b"], rows)]))
    assert found.cells[5:10] == ["a", "1,234,567", "0.1235", "–", "True"]
    assert found.cells[10:] == ["b", "–", "12", "x", "False"]
    classes = [attrs.get("class") for tag, attrs in found.tags if tag == "td"]
    assert classes == [None, "number", "number", None, None] * 2


def test_paragraphs_and_tables_appear_only_where_there_is_something():
    found = Reader(html_page("t", [Section("one", "a\n\nb"), Section("two", "")]))
    names = [tag for tag, _ in found.tags]
    assert (names.count("p"), names.count("h2"), names.count("table")) == (2, 2, 0)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        found.tags
    )


def test_shares_near_none_and_all_keep_their_digits():
    assert [percent(share) for share in (0, 1, 0.5, 0.00001234, 0.9999996)] == [
        "0.00 %",
        "100.00 %",
        "50.00 %",
        "0.001234 %",
        "99.99996 %",
    ]
