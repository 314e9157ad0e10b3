"""The page says what the tables hold, takes no text for markup, loads nothing, and works in a real
browser.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import afn_ray
from afn_ray.analysis import claims
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, QueryError
from afn_ray.reduce import compare
from afn_ray.schema import FEATURES, FILES_SCHEMA, SCREENED_SCHEMA, SOURCES_SCHEMA
from afn_ray.show import charts, figures, report, run_facts, vocabulary_charts
from afn_ray.show.screened import MAX_SCREENED_CHARS, bounded, pieces_by_offset, pieces_by_word
from afn_ray.show.summary import summarise
from afn_ray.store import manifest
from afn_ray.store.settings import config_from
from conftest import edit_checksummed, write_jsonl

MAX_PAGE_BYTES = 3_000_000
EVIL = "<script>window.ran = 1</script>"
HOSTILE = [
    EVIL,
    "</script><script>window.ran = 2</script>",
    "<img src=x onerror='window.ran = 3'>",
    "{{ 7 * 7 }} {% raw %}",
    "</style><style>body { display: none }",
    "a\u2028b\u202eevil\u202c",
    "<!-- <script>",
    "\"'><svg onload=window.ran=4>",
]
FILE = "<img src=x onerror='window.ran = 5'>\u202e.jsonl"


def _add_tables(run: manifest.RunFolder, **tables: pa.Table) -> manifest.RunFolder:
    """The run with more tables, as those that make them do."""
    entries = {name: manifest.write_table(run, name, table) for name, table in tables.items()}
    edit_checksummed(f"{run.uri}/run.json", lambda info: info["tables"].update(entries))
    return manifest.find_run(run.uri)


def _screened(run: manifest.RunFolder, docs: dict[int, tuple[str, int]]) -> pa.Table:
    """``docs``: run-wide number -> source and number of tokens."""
    rows = [
        {
            "rank": rank,
            "doc": doc,
            "source": source,
            "layer": 3,
            "n_tokens": n,
            "n_copies": rank,
            "score": 9.5,
            "reason": f"{EVIL} is strange",
            "text": EVIL,
            **dict.fromkeys(FEATURES, 0.25),
        }
        for rank, (doc, (source, n)) in enumerate(docs.items(), 1)
    ]
    return pa.Table.from_pylist(rows, SCREENED_SCHEMA)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> list[manifest.RunFolder]:
    """A plain run without screening, and one a day later of other verses and of what would do harm
    if not escaped.
    """
    folder = tmp_path_factory.mktemp("report")
    (folder / "corpus").mkdir()
    config = RunConfig(
        corpus=(str(folder / "corpus"),),
        model=str(tiny_bert),
        store=str(folder / "store"),
        executor="inline",
        layers="all",
        shard_bytes=8192,
        dtype="float32",
        id_column="id",
    )
    found = []
    for texts, screen in ((verses[:600], 0), (verses[5000:5650] + HOSTILE, 1000)):
        write_jsonl(
            folder / "corpus" / FILE, [{"id": f"v{i}", "text": t} for i, t in enumerate(texts)]
        )
        with afn_ray.run(replace(config, screen=screen)) as run:
            found.append(manifest.find_run(run.uri))
            rows = run.sql(
                "SELECT doc, source, n_tokens FROM documents WHERE doc >= $1 ORDER BY doc", [650]
            ).fetchall()
    screened = _screened(found[1], {doc: (source, n) for doc, source, n in rows})
    assert len(screened) == len(HOSTILE)
    nothing = dict.fromkeys(SOURCES_SCHEMA.names, 0)
    sources = [
        nothing
        | {
            "layer": k,
            "source": f"{EVIL}/{i}",
            "n_docs": 2,
            "n": 8,
            "n_high": i,
            "bins": [5],
            "counts": [8],
        }
        for k in range(4)
        for i in range(3)
    ]
    found[1] = _add_tables(
        found[1], screened=screened, sources=pa.Table.from_pylist(sources, SOURCES_SCHEMA)
    )
    return found


@pytest.fixture(scope="module")
def plain(runs: list[manifest.RunFolder]) -> str:
    return report.render(runs[0], with_claims=False)


@pytest.fixture(scope="module")
def page(runs: list[manifest.RunFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole page, of the hostile run against the plain one."""
    out = tmp_path_factory.mktemp("pages") / "page.html"
    return afn_ray.write_report(runs[1].uri, out, baseline=runs[0].uri)


# --- figures
# ---------------------------------------------------------------------------------------------


def _words(run: manifest.RunFolder, layer: int) -> pa.Table:
    return report.by_layer(manifest.read_table(run, "vocabulary"), run.info["layers"])[layer]


def test_rarity_alone_gives_each_type_the_share_of_its_bin(runs: list[manifest.RunFolder]) -> None:
    words = _words(runs[0], 3)
    shares = charts.share_by_rarity(words)
    rows = words.to_pylist()
    total, below = sum(r["n"] for r in rows), 0
    bins: dict[int, list[Any]] = {}
    for idf in sorted({r["idf"] for r in rows}):
        group = [i for i, r in enumerate(rows) if r["idf"] == idf]
        n = sum(rows[i]["n"] for i in group)
        bins.setdefault(min(19, (20 * (2 * below + n)) // (2 * total)), []).extend(group)
        below += n
    assert len(bins) > 5
    for group in bins.values():
        expected = sum(rows[i]["n_high"] for i in group) / sum(rows[i]["n"] for i in group)
        assert shares[group] == pytest.approx(expected)
    assert words["n"].to_numpy() @ shares == pytest.approx(sum(r["n_high"] for r in rows))


def test_a_histogram_has_every_token_that_it_does_not_say_it_leaves_out(
    runs: list[manifest.RunFolder],
) -> None:
    table = manifest.read_table(runs[0], "histogram")
    limits = [
        r
        for r in manifest.read_table(runs[0], "thresholds").to_pylist()
        if r["population"] == "tokens"
    ][3]
    chart = charts.histogram_chart(3, table, [limits[q] for q in ("q1", "q2", "q3")], None)
    bars = chart.spec["layer"][0]["data"]["values"]
    rows = [r for r in table.to_pylist() if r["layer"] == 3 and not r["special"]]
    low, high = bars[0]["from"], bars[-1]["to"]
    total = sum(r["n"] for r in rows)
    inside = sum(r["n"] for r in rows if low - 1e-4 <= r["strength"] <= high + 1e-4)
    assert 0.998 < inside / total < 1
    assert sum(b["share"] for b in bars) == pytest.approx(inside / total, abs=1e-5)
    assert f"{1 - inside / total:.2%} of the tokens lie outside" in chart.table.caption
    assert [b["quartile"] for b in bars] == sorted(b["quartile"] for b in bars)
    assert {b["quartile"] for b in bars} == {1, 2, 3, 4}
    for share, row in zip((0.25, 0.5, 0.75), chart.table.rows, strict=True):
        assert float(row[2].rstrip("%")) / 100 == pytest.approx(share, abs=0.01)


def test_a_layer_of_one_strength_is_drawn() -> None:
    table = pa.table(
        {"layer": [8], "special": [False], "strength": pa.array([4.0], pa.float32()), "n": [7]}
    )
    bars = charts.histogram_chart(8, table, [4.0, 4.0, 4.0], table).spec["layer"][0]["data"][
        "values"
    ]
    assert sum(b["share"] for b in bars) == 1


def test_without_thresholds_no_bar_is_high() -> None:
    """Those of another run label, and its layer had no normal tokens."""
    table = pa.table(
        {"layer": [8], "special": [False], "strength": pa.array([4.0], pa.float32()), "n": [7]}
    )
    chart = charts.histogram_chart(8, table, [], None)
    (bars,) = chart.spec["layer"]
    assert {bar["quartile"] for bar in bars["data"]["values"]} == {1} and not chart.table.rows


def test_points_are_the_most_frequent_types_with_their_counts_at_every_layer(
    runs: list[manifest.RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary_charts, "MAX_POINTS", 50)
    words = {k: _words(runs[0], k) for k in runs[0].info["layers"]}
    points = vocabulary_charts.points(words)
    expected = sorted(words[3].to_pylist(), key=lambda r: (-r["n"], r["token_id"]))[:50]
    assert points["n"] == [r["n"] for r in expected] and points["text"] == [
        r["text"] for r in expected
    ]
    assert [points["classes"][c] for c in points["class"]] == [r["class"] for r in expected]
    for layer in words:
        by_id = {r["token_id"]: r["n_high"] for r in words[layer].to_pylist()}
        assert points["n_high"][str(layer)] == [by_id[r["token_id"]] for r in expected]
    assert points["num_types"] == len(words[3]) > 50
    assert points["share_of_tokens"] == pytest.approx(
        sum(points["n"]) / pc.sum(words[3]["n"]).as_py()
    )


def test_of_many_layers_some_are_offered_the_first_and_the_last_among_them(
    runs: list[manifest.RunFolder],
) -> None:
    points = vocabulary_charts.points(dict.fromkeys(range(40), _words(runs[0], 3)))
    assert len(points["layers"]) == vocabulary_charts.MAX_SCATTER_LAYERS
    assert (points["layers"][0], points["layers"][-1], points["layer"]) == (0, 39, 39)


def test_the_figures_of_the_page_are_those_of_the_run(
    runs: list[manifest.RunFolder], page: Path
) -> None:
    text = _Page.of(page.read_text("utf-8")).text
    summary = summarise(runs[1])
    for facts in summary.layers:
        for share in facts.shown_classes:
            assert f"{share.share:.3f}" in text
        assert figures.number(facts.thresholds["tokens"]["q3"]) in text
    assert f"{summary.info['counts']['tokens'] - summary.info['counts']['special']:,}" in text
    for line in run_facts.cautions(summary):
        assert line.strip() in text


# --- what is not there
# -----------------------------------------------------------------------------------


def test_what_a_run_lacks_is_told_with_what_to_do(plain: str) -> None:
    text = _Page.of(plain).text
    assert "afn report RUN --baseline RUN" in text
    assert "made without screening" in text and "no table of its sources" in text


def test_what_was_lost_is_said_first_and_listed_by_file(
    runs: list[manifest.RunFolder], plain: str, tmp_path: Path
) -> None:
    assert "Files that were not read as a whole" not in _Page.of(plain).text
    whole = dict.fromkeys(FILES_SCHEMA.names, 0) | {
        "source": "/c/whole",
        "is_skipped": False,
        "share_read": 1.0,
    }
    cut = whole | {
        "source": f"{EVIL}/a.gz",
        "num_bytes": 100_000,
        "lost_bytes": 48_100,
        "share_read": 0.519,
        "lost_documents": 7,
        "lost_unknown": 1,
    }
    odd = whole | {"source": "/c/odd.txt", "num_bytes": 100_000, "n_replaced": 37}
    shutil.copytree(runs[0].store, tmp_path / "store")
    run = manifest.find_run(f"{tmp_path}/store/runs/{runs[0].id}")
    run = _add_tables(run, files=pa.Table.from_pylist([whole, odd, cut], FILES_SCHEMA))
    text = _Page.of(report.render(run, with_claims=False)).text
    assert "48 kBlost24.1% of the corpus: 7 documents or more" in text
    assert (
        "Lost, and in no figure: 48 kB of 200 kB (24.1%) in 1 file: a.gz (51.9% read); 7 "
        "documents or more." in text
    )
    caption = "Files that were not read as a whole"
    listed = text[text.index(caption) :]
    assert f"{EVIL}/a.gz100 kB48 kB51.9%7 or more0 /c/odd.txt100 kB0 bytes100%037" in listed
    assert "/c/whole" not in listed


def test_without_a_package_the_extra_is_named(
    runs: list[manifest.RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ConfigError, match=r'vl-convert-python; pip install "afn-ray\[report\]"'):
        report.write_report(runs[0], tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_words_that_take_too_long_are_left_out_and_the_page_says_why(
    runs: list[manifest.RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*args: object, **options: object) -> None:
        raise QueryError("stopped after 300 s")

    monkeypatch.setattr(report, "salient_words", late)
    monkeypatch.setattr(claims, "claims", late)
    text = _Page.of(report.render(runs[0])).text
    assert "Not known: stopped after 300 s" in text and "Left out: stopped after 300 s." in text


def test_labels_go_by_frozen_thresholds_where_there_are_any(runs: list[manifest.RunFolder]) -> None:
    config = config_from(runs[1].info["config"] | {"thresholds": runs[0].uri})
    with afn_ray.run(config) as run:
        page = _Page.of(report.render(manifest.find_run(run.uri), with_claims=False))
    assert f"Labels go by frozen thresholds, those of {runs[0].uri}" in page.text
    (theirs,) = (
        figures.number(f.thresholds["tokens"]["q3"]) for f in summarise(runs[0]).layers[-1:]
    )
    drawn = page.data["charts"]["histogram-3"]["layer"][-2]["data"]["values"][0]
    assert (drawn["name"], drawn["exact"]) == ("Q3", theirs)
    assert "all, frozen" in page.text and "25.0% of all tokens" not in page.text


def test_changes_are_those_at_the_deepest_layer_that_both_runs_have(
    runs: list[manifest.RunFolder],
) -> None:
    config = config_from(runs[0].info["config"] | {"layers": "0,1"})
    with afn_ray.run(config) as run:
        comparison = compare.compare(run.uri, runs[0])
    text = _Page.of(report.render(runs[0], comparison, with_claims=False)).text
    assert "moved in their HIGH share at layer 1" in text
    assert "0 of 0 words" not in text


def test_the_file_is_written_whole_or_not_at_all(
    runs: list[manifest.RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = report.write_report(runs[0], with_claims=False)
    assert written == Path(f"report-{runs[0].id}.html") and written.is_file()
    with pytest.raises(ConfigError, match="cannot be written"):
        report.write_report(runs[0], tmp_path / "nowhere" / "page.html", with_claims=False)
    assert [p.name for p in tmp_path.iterdir()] == [written.name]


# --- hostile text
# ----------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """A page as a parser sees it: its elements and attributes, its text, its styles and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self._in = ""

    @classmethod
    def of(cls, html: str) -> _Page:
        page = cls()
        page.feed(html)
        page.close()
        page.text = " ".join(page.text.split())
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag if tag in self.inside else ""
        if self._in:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in:
            self.inside[self._in][-1] += data
        else:
            self.text += data

    @property
    def data(self) -> Any:
        return json.loads(self.inside["script"][0])


def test_text_from_outside_makes_no_element_and_no_attribute(page: Path) -> None:
    found = _Page.of(page.read_text("utf-8"))
    assert len(found.inside["script"]) == 3 and len(found.inside["style"]) == 1
    assert {tag for tag, _ in found.tags}.isdisjoint(
        {"img", "svg", "iframe", "link", "object", "embed", "form", "base"}
    )
    for tag, attributes in found.tags:
        assert not any(
            name.startswith("on") or name in ("src", "style", "srcset") for name in attributes
        ), tag
        assert str(attributes.get("href", "#")).startswith("#")
    assert found.text.count(f"{EVIL} is strange") == len(HOSTILE)
    assert f"{EVIL}/2" in found.text and "onerror='window.ran = 5'" in found.text
    assert "\u202e" not in page.read_text("utf-8") and "\\u202e.jsonl" in found.text


def test_the_policy_lets_through_the_pages_own_style_and_scripts_alone(page: Path) -> None:
    found = _Page.of(page.read_text("utf-8"))
    (policy,) = [a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a]
    hashes = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (*found.inside["script"][1:], *found.inside["style"])
    ]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; style-src "
        f"'sha256-{hashes[2]}'; base-uri 'none'; form-action 'none'"
    )


def test_every_text_is_bounded_and_so_is_the_page(
    runs: list[manifest.RunFolder], page: Path
) -> None:
    assert page.stat().st_size < MAX_PAGE_BYTES
    run = manifest.RunFolder(
        runs[0].uri, runs[0].store, runs[0].id, json.loads(json.dumps(runs[0].info))
    )
    run.info["config"]["corpus"] = [f"/data/{i}.txt" for i in range(1_000_000)]
    assert len(report.render(run, with_claims=False)) < MAX_PAGE_BYTES
    n = 30_000
    types = pa.table(
        {
            "token_id": np.arange(n),
            "n": np.full(n, 10**6),
            "n_high": np.full(n, 10**5),
            "text": ["语语语语"] * n,
            "class": ["content"] * n,
        }
    )
    points = vocabulary_charts.points(dict.fromkeys(range(100), types))
    assert len(json.dumps(points)) < MAX_PAGE_BYTES / 2  # the charts' library takes 0.9 MB


def test_a_document_of_one_endless_token_is_cut() -> None:
    cut = bounded({"n_tokens": 2}, [("a" * 10**6, 4), ("b", 1)])
    assert [len(text) for text, _ in cut.pieces] == [MAX_SCREENED_CHARS] and cut.is_cut
    assert not bounded({"n_tokens": 2}, [("a", 4), (" ", 0), ("b", 1)]).is_cut


def test_a_documents_tokens_are_shown_as_they_are_written() -> None:
    tokens = [  # text, surface of its word, starts a word, start, end, quartile
        ("in", "In", True, 0, 2, 1),
        ("the", None, True, 3, 6, 2),
        ("egypt", "Egyptians", True, 7, 12, 4),
        ("ians", None, False, 12, 16, 3),
        ("!", None, True, 16, 17, 1),
        ("[UNK]", "☃☃", True, 18, 20, 4),
        ("a", "é", True, 20, 21, 4),
        ("b", None, False, 20, 21, 2),
        ("x", "Xy", True, 21, 23, 3),
        ("y", None, False, 23, 24, 1),
    ]
    assert list(pieces_by_offset(tokens)) == [
        ("In", 1),
        (" ", 0),
        ("the", 2),
        (" ", 0),
        ("Egypt", 4),
        ("ians", 3),
        ("!", 1),
        (" ", 0),
        ("☃☃", 4),
        ("é", 4),
        ("X", 3),
        ("y", 1),
    ]
    assert "".join(text for text, _ in pieces_by_word(tokens)) == "in the egyptians ! [UNK] ab xy"


# --- contrast
# --------------------------------------------------------------------------------------------


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_words_and_marks_stand_out_from_what_is_behind_them() -> None:
    style = (Path(report.__file__).parent / "report.css").read_text("utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in style.split("@media screen")[:2]
    )
    assert set(dark) == set(light)
    texts = [(c, b) for c in ("ink", "faint", "accent") for b in ("page", "card")]
    texts += [(f"text-{i}", f"back-{i}") for i in (2, 3, 4)] + [("page", "ink")]
    marks = [
        (c, "page")
        for c in (
            "now",
            "before",
            "content",
            "function",
            "piece",
            "fragment",
            "number",
            "punctuation",
        )
    ]
    for colours in (light, dark):
        for least, pairs in ((4.5, texts), (3.0, marks)):  # WCAG 2.2: text, and graphics
            for a, b in pairs:
                low, high = sorted((_luminance(colours[a]), _luminance(colours[b])))
                assert (high + 0.05) / (low + 0.05) >= least, (a, b)


# --- in a browser
# ----------------------------------------------------------------------------------------


Opener = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[Opener]:
    """Opens the page and waits for its charts. At the end: it said nothing, asked for nothing,
    broke no rule.
    """
    said: list[str] = []
    contexts = []

    def dismiss(dialog: Any) -> None:
        said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def open_page(**options: Any) -> Any:
        context = browser.new_context(
            offline=True, viewport={"width": 1280, "height": 900}, **options
        )
        contexts.append(context)
        context.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => "
            "console.error(e.violatedDirective))"
        )
        tab = context.new_page()
        tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: said.append(f"error: {error}"))
        tab.on("dialog", dismiss)
        tab.on(
            "request",
            lambda ask: said.append(f"request: {ask.url}") if ask.url != page.as_uri() else None,
        )
        tab.goto(page.as_uri())
        tab.wait_for_function(
            "document.querySelectorAll('[data-chart]:not([data-drawn])').length === 0"
        )
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def test_the_page_is_drawn_without_a_word_or_a_request(
    opened: Opener, runs: list[manifest.RunFolder]
) -> None:
    tab = opened()
    drawn = tab.eval_on_selector_all(
        "[data-chart]", "all => all.map(e => [e.dataset.chart, !!e.querySelector('svg path')])"
    )
    claimed = {name for name, _ in drawn if name.startswith("claim-")}
    assert {name.split("-")[1] for name in claimed} == {
        "classes",
        "layers",
        "types",
        "frequency",
        "sinks",
    }
    assert {name for name, _ in drawn} - claimed == {
        *(f"histogram-{k}" for k in range(4)),
        "classes",
        "layers-classes",
        "layers-spread",
        "vocabulary",
        "movers",
        *(f"history-{name}" for name in ("psi", "n_tokens", "q3")),
    }
    assert all(has_marks for _, has_marks in drawn)
    names = tab.eval_on_selector_all(
        "[role=graphics-document]", "all => all.map(e => e.getAttribute('aria-label'))"
    )
    assert all(names) and len(set(names)) == len(
        drawn
    )  # each says what it is to those who do not see it


def test_scripts_in_documents_are_text_and_do_not_run(opened: Opener) -> None:
    tab = opened()
    assert tab.evaluate("typeof window.ran") == "undefined"
    texts = tab.eval_on_selector_all("#screened .text", "all => all.map(e => e.textContent)")
    assert texts[0] == EVIL and len(texts) == len(HOSTILE)
    assert (
        tab.eval_on_selector_all("#screened .text script, #screened .text img", "all => all.length")
        == 0
    )
    quartiles = tab.eval_on_selector_all(
        "#screened .text span", "all => [...new Set(all.map(e => e.className))]"
    )
    assert len(quartiles) > 1 and set(quartiles) <= {"q1", "q2", "q3", "q4"}
    tab.fill("#search", "script")
    tab.wait_for_function("document.querySelectorAll('#matches tbody tr').length > 0")
    assert tab.evaluate("typeof window.ran") == "undefined"


def test_hover_tells_what_a_mark_is(opened: Opener) -> None:
    tab = opened()
    assert tab.is_hidden("#tooltip")
    tab.locator("[data-chart=histogram-3] svg path[aria-roledescription]").nth(30).hover()
    assert re.search(r"of the tokens\s*\d+\.\d\d%", tab.inner_text("#tooltip"))
    tab.mouse.move(2, 2)
    tab.wait_for_function("document.getElementById('tooltip').hidden")


@pytest.mark.parametrize("layer", [3, 0])
def test_search_marks_the_points_and_counts_them(
    opened: Opener, runs: list[manifest.RunFolder], layer: int
) -> None:
    tab = opened()
    table = manifest.read_table(runs[1], "word_vocabulary").to_pylist()
    named = [r for r in table if r["layer"] == layer and r["word"] is not None]
    rows = [r for r in named if "th" in r["text"].lower()]
    tab.select_option("#layer", str(layer))
    tab.fill("#search", "TH")
    tab.wait_for_function("document.getElementById('found').textContent !== ''")
    assert tab.inner_text("#found").startswith(f"{len(rows)} words")
    marks = "[data-chart=vocabulary] svg .mark-symbol.role-mark"
    tab.wait_for_function(
        f"document.querySelectorAll('{marks}')[1].querySelectorAll('path').length === {len(rows)}"
    )
    tab.fill("#search", "the")
    tab.wait_for_function("document.querySelector('#matches tbody th')?.textContent === 'the'")
    (the,) = [r for r in rows if r["text"] == "the" and r["class"] == "function"]
    cells = tab.eval_on_selector_all(
        "#matches tbody tr:first-child td", "all => all.map(e => e.textContent)"
    )
    assert cells == ["function", f"{the['n']:,}", f"{the['share_high']:.3f}"]
    tab.fill("#search", "nothing-has-this")
    tab.wait_for_function("document.getElementById('found').textContent.startsWith('0 words')")
    assert tab.is_hidden("#matches")


def test_light_and_dark_are_two_colourings_of_the_same_drawing(
    opened: Opener, tmp_path: Path
) -> None:
    tab = opened(color_scheme="light")
    look = """() => [getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector(
            '[data-chart=histogram-3] svg path[aria-roledescription]')).fill,
        getComputedStyle(document.querySelector('[data-chart=classes] svg text')).fill]"""
    light, pictures = tab.evaluate(look), [tab.screenshot(full_page=True)]
    assert light[0] == "rgb(251, 250, 248)"
    tab.emulate_media(color_scheme="dark")
    dark = tab.evaluate(look)
    pictures.append(tab.screenshot(full_page=True))
    assert dark[0] == "rgb(21, 24, 28)" and all(a != b for a, b in zip(light, dark, strict=True))
    assert pictures[0] != pictures[1]
    tab.emulate_media(media="print", color_scheme="dark")  # paper is white
    assert tab.evaluate(look)[1:] == light[1:]
    assert tab.is_hidden("nav")
    printed = tab.pdf(path=tmp_path / "page.pdf")
    assert printed.startswith(b"%PDF") and len(printed) > 50_000


OUTSIDE = """() => [...document.querySelectorAll('main *:not(svg *)')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.left < 0 || box.right > document.documentElement.clientWidth + 0.5);
}).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 40))"""
"""Elements that a reader would have to scroll sideways for, within a table too."""


@pytest.mark.parametrize("width", [360, 600, 1024, 1600])
def test_tables_captions_and_all_else_fit_the_screen(opened: Opener, width: int) -> None:
    tab = opened()
    tab.set_viewport_size({"width": width, "height": 800})
    tab.wait_for_function(
        f"document.querySelector('[data-chart=vocabulary] svg').clientWidth <= {width}"
    )
    tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert tab.evaluate(OUTSIDE) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_a_list_of_words_has_whole_words_alone(runs: list[manifest.RunFolder], page: Path) -> None:
    words = _words(runs[1], 3)
    parts = {r["text"] for r in words.to_pylist() if r["class"] in ("piece", "fragment")}
    whole = {r["text"] for r in words.to_pylist() if r["class"] not in ("piece", "fragment")}
    frequent = vocabulary_charts.vocabulary_chart(words).table
    assert parts and frequent.heads[0] == "word"
    assert {row[0] for row in frequent.rows} <= {figures.cut(text) for text in whole}
    assert not [row for row in frequent.rows if row[1] in ("piece", "fragment")]


def test_the_keyboard_reaches_what_can_be_used(opened: Opener) -> None:
    tab = opened()
    seen = []
    for _ in range(60):
        tab.keyboard.press("Tab")
        seen.append(tab.evaluate("(e => e.id || e.className || e.tagName)(document.activeElement)"))
    assert seen[0] == "skip" and {"search", "layer", "SUMMARY"} <= set(seen)
    links = tab.eval_on_selector_all("nav a", "all => all.map(e => e.hash.slice(1))")
    sections = tab.eval_on_selector_all("main section", "all => all.map(e => e.id)")
    assert links == sections


def test_without_scripts_the_tables_have_the_figures(browser: Any, page: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.locator("noscript").inner_text().startswith("Without scripts")
    assert tab.locator("figure table").count() == tab.locator("[data-chart]").count() > 5
    context.close()
