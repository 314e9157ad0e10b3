"""Values in a notebook: every text is escaped, and no table is longer than its bound."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from afn_ray import notebook
from afn_ray.cells import MAX_CELL

HOSTILE = "<script>alert(1)</script> & \"q\" 'r' \u202egnp.exe \x1b[31m</td></table><img src=x>"


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "page",
    [
        notebook.table(HOSTILE, pa.table({HOSTILE: [HOSTILE, None]})),
        notebook.table("", pa.table({"a": [[{"b": HOSTILE}]]})),
        notebook.facts(HOSTILE, {HOSTILE: HOSTILE}),
        notebook.text([HOSTILE]),
        notebook.marked_text([("before ", False), (HOSTILE, True)]),
    ],
)
def test_text_of_a_corpus_stays_text(page: str) -> None:
    found = Tags(page)
    assert found.tags <= {"table", "caption", "tr", "th", "td", "bdi", "i", "p", "mark"}
    assert "<script>alert(1)</script>" in found.text
    assert not re.search("[\x1b\u202e]", page) and "\\u202egnp.exe" in page


def test_a_table_is_bounded_and_says_what_it_leaves_out() -> None:
    wide = {f"c{i}": list(range(50)) for i in range(40)}
    page = notebook.table("", pa.table(wide))
    assert page.count("<tr>") == 1 + notebook.MAX_ROWS
    assert page.count("<th ") == notebook.MAX_COLUMNS
    assert f"{notebook.MAX_ROWS} of 50 rows; {notebook.MAX_COLUMNS} of 40 columns" in page
    (cell,) = re.findall("<td [^>]*>(.*)</td>", notebook.table("", pa.table({"a": ["x" * 1000]})))
    assert f"{'x' * MAX_CELL}… (+{1000 - MAX_CELL:,} characters)" in cell
    long = notebook.marked_text([("ab", True)] * notebook.MAX_CHARS)
    assert long.count("ab") == notebook.MAX_CHARS // 2 and long.endswith("…</p>\n")
    assert "no rows" in notebook.table("", pa.table({"a": pa.array([], pa.int32())}))


def test_a_missing_value_is_not_an_empty_text() -> None:
    page = notebook.table("", pa.table({"a": [None, ""]}))
    assert re.findall("<td [^>]*>(.*?)</td>", page) == ["<i>NULL</i>", "<bdi></bdi>"]
