"""The page of a night: the verdict first, each limit with its past, what moved in context."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

import afn_ray
from afn_ray.analysis.audit import Audit
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.learned import UsualRange
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.verdict import Rule
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import base_of
from afn_ray.reduce import compare, losses
from afn_ray.schema import FILES_SCHEMA, HISTORY_SCHEMA
from afn_ray.show import moved, report, sparklines
from afn_ray.show.moved import moved_types
from afn_ray.show.sparklines import NightFigures, earlier_nights, sparkline, usual_of
from afn_ray.store import manifest, verdicts
from afn_ray.store.verdicts import StoredVerdict
from nights import Nights, complete

EVIL = "<script>window.ran = 1</script> <img src=x onerror='window.ran = 2'> \u202eevil"
POLICY = """
psi = 0
ks = {warn = 0, fail = 1}
js = "3 mad"
empty_documents = 0
[source]
min_tokens = 1
min_tokens_ratio = 0.5
"""
KEYS = ("psi", "ks", "js", "empty_documents", "source.min_tokens_ratio")
NIGHTS = [
    NightFigures(f"2026-10-{n:02}", {"psi": n / 1000, "ks": n / 100}, frozenset(), True)
    for n in range(1, 10)
]


class Written(NamedTuple):
    """The page of the second night of a series, and what it is of."""

    page: Path
    before: manifest.RunFolder
    run: manifest.RunFolder
    state: str


@pytest.fixture(scope="module")
def written(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> Written:
    """Two nights, the second with hostile text, as ``afn audit`` writes
    them; the past is made up.
    """
    nights = Nights(tmp_path_factory.mktemp("night") / "nights", tiny_bert, verses, POLICY)
    nights.add(0, 0, 300)
    assert nights.begin() == 0
    before = manifest.find_run(nights.store)
    nights.add(0, 24000, 24300)
    nights.verses = [f"{verse} {EVIL}" for verse in verses]
    nights.add(1, 24300, 24330)
    nights.reports = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SIGNIFICANT", 2.0)  # so small a corpus moves nothing surely
        patch.setattr(
            report, "earlier_nights", lambda found, rows: NIGHTS + earlier_nights(found, rows)
        )
        assert nights.audit() == 1
    page = nights.folder / "out" / "report.html"
    return Written(page, before, manifest.find_run(nights.store), nights.said["state"])


# --- sparklines
# ------------------------------------------------------------------------------------------


def rule(value: float | None, state: str = "held", **changes: Any) -> Rule:
    limit = Limit("psi", **{"fail": 0.1, **changes})
    return Rule(limit, value, state, None)


def test_a_sparkline_has_a_place_for_each_night_and_a_cross_where_the_limit_was_broken() -> None:
    nights = [
        NightFigures("a", {"psi": 0.0}, frozenset(), True),
        NightFigures("b", {"psi": None}, frozenset(), True),
        NightFigures("c", {"psi": 0.2}, frozenset({"psi"}), False),
        NightFigures("d", {"psi": 0.1}, frozenset({"ks"}), False),
    ]
    drawn = sparkline(rule(0.4, "broken"), nights)
    assert drawn is not None
    lines = [[tuple(map(float, xy.split(","))) for xy in line.split()] for line in drawn.lines]
    assert [len(line) for line in lines] == [1, 3]  # the second night has no value
    (first,), (third, fourth, last) = lines
    assert first[0] == 5 and last[0] == sparklines.WIDTH - 5
    assert third[0] - first[0] == 2 * (fourth[0] - third[0])
    bottom, top = sparklines.HEIGHT - 5, 5
    for (_, y), value in zip([first, third, fourth, last], [0, 0.2, 0.1, 0.4], strict=True):
        assert y == pytest.approx(bottom - (bottom - top) * value / 0.4)
    assert drawn.broken == (third, last) and drawn.tonight == last
    assert drawn.limit == fourth[1] and drawn.usual is None
    assert drawn.text == "psi on 4 nights: 0 to 0.4, tonight 0.4; broken on c"


def test_a_limit_far_from_all_values_does_not_flatten_the_line() -> None:
    drawn = sparkline(rule(0.004, fail=9.0), NIGHTS[:3])
    assert drawn is not None and drawn.limit is None
    assert drawn.text == "psi on 4 nights: 0.001 to 0.004, tonight 0.004; never broken before"
    assert sparkline(rule(0.5), []) is None and sparkline(rule(None), NIGHTS[:1]) is None
    flat = sparkline(rule(0.001), NIGHTS[:1])
    assert flat is not None and flat.tonight == (sparklines.WIDTH - 5, sparklines.HEIGHT / 2)


def test_the_usual_range_is_the_learned_one_or_that_of_the_nights_that_may_be_baselines() -> None:
    odd = NightFigures("odd", {"psi": 7.0}, frozenset({"psi"}), False)
    assert usual_of(rule(0.5), [*NIGHTS, odd]) == UsualRange(0.001, 0.009, 9)
    assert usual_of(rule(0.5), [*NIGHTS[:7], odd]) is None
    of_rule = replace(rule(0.5), usual=UsualRange(0.2, 0.3, 11))
    assert usual_of(of_rule, NIGHTS) == of_rule.usual
    drawn = sparkline(of_rule, NIGHTS)
    assert drawn is not None and drawn.usual is not None
    top, height = drawn.usual
    assert 0 < top < top + height < sparklines.HEIGHT


def test_earlier_nights_are_the_audited_ones_of_the_same_measure_layer_and_window(
    tmp_path: Path,
) -> None:
    began = [datetime(2026, 11, day, 3) for day in range(1, 8)]
    runs = [complete(tmp_path, at, "other" if at.day == 3 else "m") for at in began]
    kept = StoredVerdict("held", "all", 8, None, (), (), (), {"psi": 0.25})
    changes = {
        1: {"state": "broken", "broken": ("psi",)},
        2: {},
        3: {},
        4: {"layer": 0},
        5: {"window": "new"},
    }
    for day, change in changes.items():
        verdicts.write_verdict(runs[day - 1], replace(kept, **change))  # type: ignore[arg-type]
    verdicts.accept(runs[0], "meant")
    rows = []
    for run, at in zip(runs, began, strict=True):
        row: dict[str, Any] = dict.fromkeys(HISTORY_SCHEMA.names)
        row |= {"run": run.id, "measure": run.info["measure"]["id"], "began_at": at, "layer": 8}
        row |= {"base": fingerprint(base_of(run.info["measure"]))}
        row |= {"accepted": "meant" if at.day == 1 else None, "classes": []}
        rows += [row, row | {"group_by": "lang", "group": "de"}]
    schema = pa.schema([field.with_nullable(True) for field in HISTORY_SCHEMA])
    lost = losses.total(FILES_SCHEMA.empty_table())
    found = Audit("held", (), runs[6], Baseline(None), None, lost, (), "all", 8)
    nights = earlier_nights(found, pa.Table.from_pylist(rows, schema))
    assert [night.name for night in nights] == ["2026-11-01 03:00", "2026-11-02 03:00"]
    assert [night.broken for night in nights] == [{"psi"}, set()]
    assert all(night.is_usual and night.values == {"psi": 0.25} for night in nights)


# --- what moved
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(written: Written) -> moved.Moved:
    comparison = compare.compare(written.before, written.run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "SIGNIFICANT", 2.0)
        return moved_types(comparison, 2, 60.0)


def test_examples_are_the_occurrences_closest_to_the_median(
    written: Written, found: moved.Moved
) -> None:
    """Against a slow reference over all tokens."""
    assert found.unknown is None and {one.status for one in found.types} == {*moved.MOST_OF}
    for side, run in (("before", written.before), ("now", written.run)):
        with afn_ray.open_run(run.uri) as tables:
            words = tables.sql(
                "SELECT lower(text), doc, position, max_strength_2, n_tokens FROM words"
            ).fetchall()
            tokens = tables.sql("SELECT doc, position FROM tokens WHERE NOT is_special").fetchall()
            medians = dict(
                tables.sql("SELECT word, q2 FROM word_vocabulary WHERE layer = 2").fetchall()
            )
        for one in found.types:
            is_listed = one.text.lower() in medians  # else it is too rare in this run
            places = [word for word in words if is_listed and word[0] == one.text.lower()]
            places.sort(key=lambda at: (abs(at[3] - medians[at[0]]), *at[1:3]))
            nearest = sorted(places[: moved.MOST_EXAMPLES], key=lambda at: at[1:3])
            examples = getattr(one, side)
            assert [example.doc for example in examples] == [at[1] for at in nearest]
            for example, (_, doc, position, _, size) in zip(examples, nearest, strict=True):
                of_doc = [at for of, at in tokens if of == doc]
                last = position + size - 1
                assert example.is_cut_before == (min(of_doc) < position - moved.CONTEXT_TOKENS)
                assert example.is_cut_after == (max(of_doc) > last + moved.CONTEXT_TOKENS)


def test_an_example_marks_its_word_once_and_is_bounded(found: moved.Moved) -> None:
    num_of = Counter(one.status for one in found.types)
    assert num_of == moved.MOST_OF
    for one in found.types:
        assert one.before or one.now
        for example in (*one.before, *one.now):
            marked = [piece for piece in example.pieces if piece.is_it]
            assert "".join(piece.text for piece in marked).lower() == one.text.lower()
            assert all(1 <= piece.quartile <= 4 for piece in marked)
            assert len(example.pieces) <= 2 * (2 * moved.CONTEXT_TOKENS + 1)
            assert example.source.endswith(".jsonl")
    cut = list(moved._marked(iter([("x" * 10**6, 8 + 3)])))
    assert cut == [("x" * 59 + "…", 3, True)]


def test_a_baseline_that_is_gone_leaves_out_its_examples(written: Written, tmp_path: Path) -> None:
    comparison = compare.compare(written.before, written.run)
    gone = replace(comparison, a=replace(comparison.a, uri=f"{tmp_path}/runs/gone"))
    found = moved_types(gone, 2, 60.0)
    assert found.unknown is not None and str(tmp_path) in found.unknown
    assert not any(one.before for one in found.types) and any(one.now for one in found.types)


# --- the page
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab(browser: Any, written: Written) -> Iterator[Any]:
    """The page in a browser, with all its charts; at the end it has asked for nothing."""
    asked: list[str] = []
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.on("request", lambda ask: asked.append(ask.url))
    opened.goto(written.page.as_uri())
    drawn = "document.querySelectorAll('[data-chart]:not([data-drawn])').length === 0"
    opened.wait_for_function(drawn)
    yield opened
    context.close()
    assert asked == [written.page.as_uri()]


def test_the_page_begins_with_the_verdict_then_the_limits_then_what_moved(tab: Any) -> None:
    heads = tab.eval_on_selector_all("h1, h2, caption", "all => all.map(e => e.innerText.trim())")
    assert heads[0].endswith("Verdict: broken")
    assert heads[1:5] == ["Limits", "What moved", "What broke", "What broke, by name"]
    ids = tab.eval_on_selector_all("nav a", "all => all.map(e => e.hash.slice(1))")
    assert ids[:4] == ["verdict", "moved", "broke", "glance"]
    assert tab.eval_on_selector_all("main section", "all => all.map(e => e.id)") == ids


def test_each_limit_has_a_row_with_value_limit_usual_range_and_a_drawing_with_its_text(
    tab: Any, written: Written
) -> None:
    rows = {}
    for cells in tab.eval_on_selector_all(
        ".limits tbody tr",
        "all => all.map(e => [e.querySelector('b').innerText, ...[...e.querySelectorAll('td')]"
        ".map(td => td.querySelector('svg')?.getAttribute('aria-label') ?? td.innerText.trim())])",
    ):
        rows[cells[0]] = cells[1:]
    assert sorted(rows) == sorted(KEYS) and next(iter(rows)) == "js"  # not judged comes first
    assert [rows[key][0] for key in KEYS] == [
        "✖ broken",
        "▲ warned",
        "◆ not judged",
        "● held",
        "● held",
    ]
    kept = verdicts.read_verdict(written.run)
    assert kept is not None and kept.figures["psi"] is not None
    psi = f"{kept.figures['psi']:.5g}"
    assert rows["psi"][1:4] == [psi, "<= 0", "0.001–0.009 over 9 nights"]
    assert rows["ks"][2] == "<= 1, warn <= 0"
    assert rows["js"][1:4] == ["", "<= 3 mad", "not known: 0 nights of 8"]
    assert rows["psi"][4].startswith("psi on 10 nights: 0.001 to ")
    assert rows["empty_documents"][4].startswith("empty_documents on 2 nights: 0 to 0")
    assert tab.eval_on_selector_all("svg.spark:not([role=img])", "all => all.length") == 0


def test_examples_of_before_and_now_are_text(tab: Any, found: moved.Moved) -> None:
    shown = tab.eval_on_selector_all("#moved h3", "all => all.map(e => e.innerText)")
    assert shown == [one.text for one in found.types]
    texts = tab.eval_on_selector_all("#moved .text", "all => all.map(e => e.textContent)")
    assert len(texts) == sum(len(one.before) + len(one.now) for one in found.types)
    assert any("<img" in text or "script>" in text for text in texts)
    assert tab.eval_on_selector_all("#moved :is(script, img)", "all => all.length") == 0
    assert tab.eval_on_selector_all("#moved mark", "all => all.length") >= len(texts)
    assert tab.evaluate("typeof window.ran") == "undefined"
    assert "\u202e" not in tab.content()


OUTSIDE = """() => [...document.querySelectorAll('header *, main *:not(svg *)')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.left < 0 || box.right > document.documentElement.clientWidth + 0.5);
}).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 40))"""
"""Elements that a reader would have to scroll sideways for."""
COVERED = """() => [...document.querySelectorAll('.limits')].flatMap(table => {
    const boxes = [...table.querySelectorAll('small, b, td span.state, svg')]
        .map(e => [e, e.getBoundingClientRect()]).filter(([, box]) => box.width);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        p.left < q.right - 1 && q.left < p.right - 1 &&
            p.top < q.bottom - 1 && q.top < p.bottom - 1)
        .map(([b]) => a.textContent + ' / ' + b.textContent));
})"""
"""Parts of the limits that overlap."""


def test_nothing_overflows_or_overlaps_from_320_to_1600_pixels_and_on_paper(tab: Any) -> None:
    tab.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    for width, media in itertools.product((320, 768, 1600), ("screen", "print")):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(media=media)
        if media == "screen":
            tab.wait_for_function(
                f"document.querySelector('[data-chart=vocabulary] svg').clientWidth <= {width}"
            )
            assert tab.evaluate(OUTSIDE) == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(COVERED) == []
    tab.emulate_media(media="screen")


CONTRAST = """() => {
    const rgb = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        const colour = rgb(getComputedStyle(e).backgroundColor);
        return colour.length < 4 || colour[3] ? colour : behind(e.parentElement);
    };
    return [...document.querySelectorAll('header *, #verdict *:not(svg *), #moved *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
        .map(e => {
            const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort();
            return [e.className + ' ' + e.textContent.slice(0, 30),
            (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
        }).filter(([, ratio]) => ratio < 4.5);
}"""
"""Texts with less contrast than WCAG 2.2 AA asks for."""


def test_text_has_contrast_on_light_and_on_dark(tab: Any) -> None:
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate(CONTRAST) == []
    tab.emulate_media(media="print")  # paper is white, whatever the reader's system prefers
    assert tab.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    tab.emulate_media(media="screen", color_scheme="light")


def test_without_scripts_and_without_a_mouse_the_verdict_is_all_there(
    browser: Any, written: Written
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written.page.as_uri())
    assert page.locator(".limits tbody tr").count() == len(KEYS)
    assert page.locator("#verdict svg.spark").first.is_visible()
    assert page.locator("#moved mark").first.is_visible()
    page.keyboard.press("Tab")
    skip = page.locator(".skip:focus")
    assert skip.get_attribute("href") == "#verdict" and skip.bounding_box()["x"] >= 0
    assert page.locator("#verdict [title], #moved [title]").count() == 0  # nothing waits for hover
    context.close()
