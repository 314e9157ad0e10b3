"""The two rankings of words side by side: their order, which words they have, and how they are
shown.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from rich.console import Console

import afn_ray
from afn_ray import text
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.show import beyond, report, salient
from afn_ray.store import manifest
from conftest import config_of, write_jsonl


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> manifest.RunFolder:
    folder = tmp_path_factory.mktemp("beyond")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": text} for text in verses[:400]])
    config: RunConfig = config_of(tiny_bert, corpus, folder / "store", layers="0,2")
    with afn_ray.run(config) as done:
        return manifest.find_run(done.uri)


def by_sql(run: manifest.RunFolder, rank: str) -> list[tuple[Any, ...]]:
    query = f"""
        SELECT word, n, share_high, expected, beyond, beyond_low, beyond_high FROM word_salience
        WHERE layer = 2 AND n >= 20 AND class = 'content' AND regexp_full_match(word, '[a-z]{{2,}}')
        ORDER BY {rank} LIMIT 10
    """
    with afn_ray.open_run(run.uri) as opened:
        found: list[tuple[Any, ...]] = opened.sql(query).fetchall()
    return found


def test_rankings_are_those_of_the_view(run: manifest.RunFolder) -> None:
    found = beyond.rankings(run, 2)
    assert found is not None
    assert [tuple(word) for word in found.salient] == by_sql(run, "rank_high")
    assert [tuple(word) for word in found.beyond] == by_sql(run, "rank")
    assert len(found.beyond) == 10 and found.salient != found.beyond


def test_a_word_in_bursts_is_ranked_below_one_spread_over_documents(
    run: manifest.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both as often HIGH; the tokens of the first say less of it, as they share few documents."""
    table = manifest.read_table(run, "word_vocabulary")
    here = table.filter((pc.field("layer") == 2) & (pc.field("class") == "content")).slice(0, 2)
    planted = {
        "word": ["burst", "spread"],
        "n": [200, 100],
        "share_high": [0.75, 0.75],
        "share_high_low": [0.686, 0.657],
        "n_effective": [30.0, 95.0],
    }
    for name, values in planted.items():
        at = here.column_names.index(name)
        field = here.schema.field(name)
        here = here.set_column(at, field, pa.chunked_array([values], field.type))
    monkeypatch.setattr(manifest, "read_table", lambda *_: here.select(beyond.COLUMNS))
    found = beyond.rankings(run, 2)
    assert found is not None
    assert [word.text for word in found.salient] == ["spread", "burst"]


def test_a_word_less_often_high_than_expected_is_not_beyond_its_frequency(
    run: manifest.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = manifest.read_table(run, "word_vocabulary")
    here = table.filter((pc.field("layer") == 2) & (pc.field("n") >= 20)).select(beyond.COLUMNS)
    at, least = here.column_names.index("beyond"), pc.quantile(here["beyond"], 0.9)[0].as_py()
    lower = here.set_column(at, "beyond", pc.subtract(here["beyond"], least))
    monkeypatch.setattr(manifest, "read_table", lambda *_: lower)
    found = beyond.rankings(run, 2)
    assert found is not None
    assert 0 < len(found.beyond) < len(found.salient) == 10
    assert all(word.beyond > 0 for word in found.beyond)
    out = io.StringIO()
    beyond.render_rankings(run, 2, Console(file=out, width=80))
    assert all(word.text in out.getvalue() for word in (*found.salient, *found.beyond))


def test_a_terminal_of_80_columns_shows_both_side_by_side(
    run: manifest.RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    found = beyond.rankings(run, 2)
    assert found is not None
    out = io.StringIO()
    beyond.render_rankings(run, 2, Console(file=out, width=80))
    title, *lines = out.getvalue().splitlines()
    assert "salient beyond their frequency" in title
    table = [line for line in lines[: lines.index(beyond.MEANING)] if line.strip()]
    assert max(map(len, table)) <= 80 and len(table) == 12
    first = table[2].split()
    left, right = found.salient[0], found.beyond[0]
    assert first[:4] == [left.text, str(left.n), f"{left.share_high:.0%}", f"{left.expected:.0%}"]
    assert first[4] == right.text and first[-1] == f"{right.beyond:+.0%}"
    with pytest.raises(SystemExit):
        commands.main(["show", run.uri])
    assert beyond.MEANING in capsys.readouterr().out


def test_the_page_shows_both_and_says_what_the_difference_means(run: manifest.RunFolder) -> None:
    page = report.render(run, with_claims=False)
    assert beyond.MEANING in page
    assert page.index("Salient beyond frequency") > page.index("Salient, and salient beyond")
    found = beyond.rankings(run, 2)
    assert found is not None
    for word in (*found.salient, *found.beyond):
        assert f"{word.low:.2f}–{word.high:.2f}" in page
        assert f"{word.share_high:.0%} ({word.expected:.0%})" in page


def test_a_run_without_screening_shows_nothing(
    run: manifest.RunFolder, tmp_path: Path, tiny_bert: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "in the beginning"}])
    with afn_ray.run(config_of(tiny_bert, corpus, tmp_path / "store", screen=0)) as done:
        folder = manifest.find_run(done.uri)
    out = io.StringIO()
    beyond.render_rankings(folder, folder.info["layers"][-1], Console(file=out))
    assert out.getvalue() == ""
    assert "Salient beyond frequency" not in report.render(folder, with_claims=False)


def test_a_run_too_small_for_rankings_says_so(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "in the beginning was the word"}] * 3)
    with afn_ray.run(config_of(tiny_bert, corpus, tmp_path / "store")) as done:
        folder = manifest.find_run(done.uri)
    out = io.StringIO()
    beyond.render_rankings(folder, folder.info["layers"][-1], Console(file=out))
    assert out.getvalue().endswith("no open-class word occurs 20 times or more.\n")
    page = report.render(folder, with_claims=False)
    assert f"Not known: {beyond.NONE}" in page and beyond.MEANING not in page


@pytest.mark.parametrize(
    ("classes", "kept"),
    [
        (["content", "function", "piece", "fragment", "number", "punctuation"], {"content"}),
        (["word", "punctuation"], {"word"}),
        (["NOUN", "DET", "PUNCT", "X", "untagged"], {"NOUN"}),
        (["B-PER", "O"], {"B-PER", "O"}),
    ],
)
def test_only_open_classes_are_ranked(classes: list[str], kept: set[str]) -> None:
    assert beyond._open_classes(classes) & set(classes) == kept


@pytest.mark.parametrize(
    "word",
    [
        "of", "na\u00efve", "jusqu'\u00e0", "don\u2019t", "o'er", "beer-sheba", "mother-in-law",
        "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
        "\u0e44\u0e21\u0e48",
        "\u0634\u064f\u0643\u0652\u0631", "\u7684", "\u6211", "\u6211\u4eec", "\U00020000",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\ubb3c", "\ub9d0", "\ua000",
        "\U00017000",
    ],
)  # fmt: skip
def test_words_of_every_script_are_ranked(word: str) -> None:
    assert shown(word) == [True, True]


@pytest.mark.parametrize(
    "word",
    ["", "a", "\u00e9", "\u0e01", "\u064f\u0652", "\u0301a", "'tis", "cats'", "-", "''", "a-",
     "a--b", "3d",
     "abc1", "a.b", "ab\n", "ab\u202e", "\u2e80", "\u3002", "\u3042",
     "\u30a2", "\u3131", "\u1112", "\ua490", "\u03ae"],
)  # fmt: skip
def test_letters_alone_numbers_and_signs_are_not_ranked(word: str) -> None:
    assert shown(word) == [False, False]


def shown(word: str) -> list[bool]:
    """True if Arrow, as for one ranking, and DuckDB, as for the other, let ``word`` be shown."""
    by_arrow = pc.match_substring_regex(pa.array([word]), text.WORD_FORM)[0].as_py()
    asked = duckdb.execute("SELECT regexp_matches($1, $2)", [word, text.WORD_FORM])
    [(by_duckdb,)] = asked.fetchall()
    return [by_arrow, by_duckdb]


def test_rankings_have_words_of_other_scripts(
    run: manifest.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most frequent words, by other names: a mark or one ideograph excludes none."""
    names = ["\u0e44\u0e21\u0e48", "\u7684", "don't", "a", "1st"]
    table = manifest.read_table(run, "word_vocabulary")
    here = table.filter((pc.field("layer") == 2) & (pc.field("class") == "content"))
    five = here.sort_by([("n", "descending")]).slice(0, len(names))
    at = five.column_names.index("word")
    renamed = five.set_column(at, five.schema.field("word"), pa.chunked_array([names], pa.string()))
    monkeypatch.setattr(manifest, "read_table", lambda *_: renamed.select(beyond.COLUMNS))
    found = beyond.rankings(run, 2)
    assert found is not None
    assert {word.text for word in found.salient} == {*names[:3]}


def test_salient_words_are_of_every_script() -> None:
    tables = duckdb.connect()
    tables.execute("CREATE TABLE labels AS SELECT 1 AS layer, 'tokens' AS population, 0.5 AS q3")
    names = ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u6c34", "o'er", "a", "1st"]
    tables.execute(
        """CREATE TABLE words AS SELECT unnest($1) AS text, 1.0::FLOAT AS mean_strength_1
            FROM range($2)""",
        [names, salient.SALIENT_MIN_N],
    )
    made: Any = SimpleNamespace(info={"config": {"language": "xx"}}, sql=tables.execute)
    for ranking in salient.salient_words(made, 1):
        assert {word.text for word in ranking} == {*names[:3]}


def test_control_characters_of_a_word_do_not_reach_a_terminal(
    run: manifest.RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = beyond.RankedWord("a\x1b[31m\u202eb", 20, 0.5, 0.25, 0.25, 0.1, 0.4)
    monkeypatch.setattr(beyond, "rankings", lambda *_: beyond.Rankings([word], [word]))
    out = io.StringIO()
    beyond.render_rankings(run, 2, Console(file=out))
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()
