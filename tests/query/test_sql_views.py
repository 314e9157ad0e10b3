"""Words, keyword in context, documents and comparisons in SQL against Python; the catalog in a
client of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import test_query
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import AfnError, ConfigError, QueryError
from afn_ray.query import views
from afn_ray.query.catalog import write_catalog
from afn_ray.query.database import Run, open_run
from afn_ray.query.words import PIECES, SLICE_TOKENS
from afn_ray.reduce.compare import compare
from afn_ray.schema import (
    SPECIAL,
    WORD_START,
    documents_schema,
    strength_column,
    strengths,
    tokens_schema,
)
from afn_ray.store import manifest
from test_query import LAYERS, TEXTS, make_shard, viewed, write_run

Word = dict[str, Any]
SPELLINGS = ["ri", "river", "rivers", "bank", "banks", ".", "verri", "riverbankriverbanks"]


def cut(word: str) -> list[int]:
    """Token ids of ``word``, which is made of the vocabulary's pieces."""
    ids = []
    while word:
        at = max(
            (i for i, t in enumerate(TEXTS) if t and word.startswith(t)),
            key=lambda i: len(TEXTS[i]),
        )
        ids.append(at)
        word = word[len(TEXTS[at]) :]
    return ids


def worded_shard(
    seed: int, num_documents: int, special: bool
) -> tuple[pa.Table, pa.Table, list[list[Word]]]:
    """A shard of random words as a tokenizer leaves it, some capitalized, some without a space; and
    the words.
    """
    rng = np.random.default_rng(seed)
    tokens: list[dict[str, Any]] = []
    documents, written = [], []

    def add(
        doc: int, token_id: int, flags: int, surface: str | None, start: int, end: int
    ) -> float:
        position = tokens[-1]["position"] + 1 if tokens and tokens[-1]["doc"] == doc else 0
        value = float(np.float32(round(rng.lognormal(1, 1), 2)))
        tokens.append(
            {
                "doc": doc,
                "position": position,
                "token_id": token_id,
                "flags": flags,
                "surface": surface,
                "start": start,
                "end": end,
                **{strength_column(k): value for k in LAYERS},
            }
        )
        return value

    for doc in range(num_documents):
        words: list[Word] = []
        at = 0
        if special:
            add(doc, 0, SPECIAL, None, 0, 0)
        for _ in range(int(rng.integers(0, 30))):
            spelled = SPELLINGS[rng.integers(len(SPELLINGS))]
            text = spelled.upper() if rng.random() < 0.2 and spelled != "." else spelled
            gap = " " if words and rng.random() < 0.8 else ""
            at += len(gap)
            word: Word = {"gap": gap, "text": text, "start": at, "strengths": []}
            for nth, i in enumerate(cut(spelled)):
                value = add(
                    doc,
                    i,
                    0 if nth else WORD_START,
                    text if text != spelled and not nth else None,
                    at,
                    at + len(TEXTS[i]),
                )
                at += len(TEXTS[i])
                word["strengths"].append(value)
                word.setdefault("position", tokens[-1]["position"])
            words.append(word | {"end": at})
        if special:
            add(doc, 0, SPECIAL, None, at, at)
        n = sum(t["doc"] == doc for t in tokens)
        documents.append(
            {
                "doc": doc,
                "doc_id": f"{seed}-{doc}",
                "source": "a.txt",
                "offset": doc,
                "n_tokens": n,
                "n_windows": 1,
                "n_chars": at,
                "n_replaced": 0,
                "lost_bytes": 0,
                "lost_documents": 0,
                "text_sha256": hashlib.sha256(b"").digest(),
                "status": "ok",
                **{f"mean_{strength_column(k)}": 1.0 for k in LAYERS},
            }
        )
        written.append(words)
    return (
        pa.Table.from_pylist(tokens, viewed(tokens_schema(strengths(LAYERS), True))),
        pa.Table.from_pylist(documents, viewed(documents_schema(strengths(LAYERS)))),
        written,
    )


WORDED = [
    worded_shard(seed, n, special)
    for seed, n, special in ((1, 25, True), (2, 0, True), (3, 40, False), (4, 9, True))
]
WRITTEN = [words for *_, of_shard in WORDED for words in of_shard]


QUESTIONS = (
    "FROM tokens ORDER BY doc, position",
    "FROM documents ORDER BY doc",
    "FROM words ORDER BY doc, word",
    "SELECT count(*), sum(word), sum(n_tokens) FROM words WHERE doc = 30",
    "FROM kwic('river', 2)",
    "SELECT doc, position FROM kwic('bank', most := 3)",
    "SELECT list(document_text(doc) ORDER BY doc) FROM documents",
    "SELECT * EXCLUDE (mean) FROM classes ORDER BY ALL",
)


@pytest.mark.parametrize(
    ("versions", "as_file"), [((5, 5, 5, 5), False), ((6, 5, 6, 5), False), ((6, 5, 6, 5), True)]
)
def test_shards_of_an_older_version_give_the_same_answers(
    worded: str, tmp_path: Path, versions: tuple[int, ...], as_file: bool
) -> None:
    """A run of them alone, and one that has shards of today's version between them."""
    older = write_run(str(tmp_path), [(t, d) for t, d, _ in WORDED], LAYERS, versions=versions)

    def answers(uri: str, name: str) -> list[list[Any]]:
        if not as_file:
            with open_run(uri) as run:
                return [run.sql(query).fetchall() for query in QUESTIONS]
        write_catalog(uri, path := tmp_path / name)
        with duckdb.connect(path, read_only=True) as catalog:
            return [catalog.sql(query).fetchall() for query in QUESTIONS]

    assert answers(older, "older") == answers(worded, "todays")


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = str(tmp_path_factory.mktemp("worded"))
    return write_run(store, [(t, d) for t, d, _ in WORDED], LAYERS)


@pytest.fixture(params=[1, 4])
def run(request: pytest.FixtureRequest, worded: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The run, read in one part and in several."""
    monkeypatch.setattr(
        "afn_ray.query.words.SLICE_TOKENS", SLICE_TOKENS if request.param == 1 else 50
    )
    monkeypatch.setattr("afn_ray.query.words.SLICES", request.param)
    with open_run(worded, threads=4) as run:
        yield run


# --- words and documents
# ---------------------------------------------------------------------------------


def test_words_are_those_that_were_written(run: Run) -> None:
    expected = [
        {
            "doc": doc,
            "word": i,
            "text": w["text"],
            "n_tokens": len(w["strengths"]),
            "position": w["position"],
            "start": w["start"],
            "end": w["end"],
            "max": max(w["strengths"]),
            "first": w["strengths"][0],
            "mean": pytest.approx(np.mean(w["strengths"])),
        }
        for doc, words in enumerate(WRITTEN)
        for i, w in enumerate(words)
    ]
    got = run.sql(
        'SELECT doc, word, text, n_tokens, position, start, "end", max_strength_8 AS max, '
        "first_strength_8 AS first, "
        "mean_strength_8 AS mean FROM words ORDER BY doc, word"
    ).to_dicts()
    assert got == expected
    assert max(w["n_tokens"] for w in got) > 2 * PIECES - 2


def test_words_are_made_by_streaming_windows_alone(run: Run) -> None:
    """Windows that hold what they have seen would hold the whole run."""
    [(_, plan)] = run.sql("EXPLAIN SELECT text, max_strength_8 FROM words").fetchall()
    assert plan.count("Streaming Window") == plan.count("Window ") > 0


def test_a_document_is_put_together(run: Run) -> None:
    got = run.sql("SELECT doc, document_text(doc) FROM documents ORDER BY doc").fetchall()
    whole = ["".join(w["gap"] + w["text"] for w in words) or None for words in WRITTEN]
    assert got == list(enumerate(whole))
    assert run.sql("SELECT document_text($d)", {"d": 30}).fetchall() == [(whole[30],)]


@pytest.mark.parametrize("space", ["\u0120", "\u2581"])
def test_a_space_that_a_token_holds_stands_between_the_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    """GPT-2's, Qwen's and Llama's tokens begin with the space before a word; others may stand
    without one.
    """
    monkeypatch.setattr(test_query, "PIECES", [space + piece for piece in test_query.PIECES])
    shards = []
    for table, documents, _ in WORDED:
        rows = table.to_pylist()
        for before, row in itertools.pairwise(rows):
            if row["doc"] == before["doc"] and row["start"] > before["end"]:
                row["start"] = before["end"]
        shards.append((pa.Table.from_pylist(rows, table.schema), documents))
    write_run(str(tmp_path), shards, LAYERS)
    with open_run(str(tmp_path)) as run:
        got = run.sql("SELECT document_text(doc) FROM documents ORDER BY doc").fetchall()
        assert got == [("".join(w["gap"] + w["text"] for w in words) or None,) for words in WRITTEN]
        contexts = run.sql(
            "SELECT doc, position, left_context, text, right_context FROM kwic('river', 3)"
        ).fetchall()
        assert contexts == [(o[0], o[1], *o[4:7]) for o in occurrences("river", 3)] != []


# --- keyword in context
# ----------------------------------------------------------------------------------


def occurrences(word: str, n: int) -> list[tuple[Any, ...]]:
    found = []
    for doc, words in enumerate(WRITTEN):
        for i, w in enumerate(words):
            if w["text"].lower() == word.lower():
                left = "".join(x["gap"] + x["text"] for x in words[max(0, i - n) : i]).strip()
                right = "".join(x["gap"] + x["text"] for x in words[i + 1 : i + 1 + n]).strip()
                found.append(
                    (
                        doc,
                        w["position"],
                        w["start"],
                        w["end"],
                        left,
                        w["text"],
                        right,
                        max(w["strengths"]),
                    )
                )
    return found


KWIC = 'SELECT doc, position, start, "end", left_context, text, right_context, max_strength_8 '


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("word", [*SPELLINGS, "RIVER", "Banks"])
def test_every_occurrence_with_the_words_beside_it(run: Run, word: str, n: int) -> None:
    got = run.sql(f"{KWIC} FROM kwic($word, $n)", {"word": word, "n": n}).fetchall()
    assert got == occurrences(word, n) != []


def test_most_is_enough_for_a_look(run: Run) -> None:
    every = occurrences("river", 5)
    some = run.sql(f"{KWIC} FROM kwic('river', most := 7)").fetchall()
    assert len(some) == 7 and set(some) <= set(every)
    assert run.sql(f"{KWIC} FROM kwic('river', most := 100000)").fetchall() == every


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ("'river', -1", "n is -1, expected 0 or more words"),
        ("'river', n := NULL", "n is NULL, expected 0 or more words"),
        ("'river', $number", "n is -7, expected 0 or more words"),
        ("'river', 2, most := -1", "most is -1, expected 0 or more occurrences"),
    ],
)
def test_a_number_that_says_nothing_is_refused(run: Run, arguments: str, refused: str) -> None:
    parameters = {"number": -7} if "$" in arguments else None
    for columns in ("*", "count(*)"):
        with pytest.raises(QueryError, match=f"kwic: {refused}"):
            run.sql(f"SELECT {columns} FROM kwic({arguments})", parameters).fetchall()


def test_a_word_of_more_tokens_than_characters_is_found(tmp_path: Path) -> None:
    """A tokenizer of bytes takes up to four for one character, and the head alone says what they
    spell.
    """
    word, piece, bank = "\u65e5\u672c\u8a9e" * 9, cut("ri")[0], cut("bank")
    ids = [*bank, *[piece] * (4 * len(word)), *bank]
    flags = [WORD_START, *[0] * (len(bank) - 1), WORD_START, *[0] * (4 * len(word) - 1), WORD_START]
    flags += [0] * (len(ids) - len(flags))
    surfaces = [word if i == len(bank) else None for i in range(len(ids))]
    tokens = [
        {
            "doc": 0,
            "position": i,
            "token_id": t,
            "flags": f,
            "surface": s,
            "start": 2 * i,
            "end": 2 * i + 1,
            **{strength_column(k): 1.0 for k in LAYERS},
        }
        for i, (t, f, s) in enumerate(zip(ids, flags, surfaces, strict=True))
    ]
    _, documents, _ = WORDED[0]
    one = documents.slice(0, 1)
    write_run(
        str(tmp_path),
        [(pa.Table.from_pylist(tokens, viewed(tokens_schema(strengths(LAYERS), True))), one)],
        LAYERS,
    )
    with open_run(str(tmp_path)) as run:
        for n in (0, 1, 5):
            got = run.sql(
                "SELECT text, n_tokens, left_context, right_context FROM kwic($w, $n)",
                {"w": word, "n": n},
            )
            side = "bank" if n else ""
            assert got.fetchall() == [(word, 4 * len(word), side, side)]


@pytest.mark.parametrize("num_tokens", [60, 300])
def test_words_of_many_tokens_are_as_many_words_beside_it(tmp_path: Path, num_tokens: int) -> None:
    """Three words of many tokens on each side, and at last one that is too long to be shown
    whole.
    """
    (piece,), (bank,) = cut("ri"), cut("bank")
    long = [(piece, WORD_START), *[(piece, 0)] * (num_tokens - 1)]
    ids = [
        (bank, 0),
        *long * 3,
        (bank, WORD_START),
        *long * 3,
        (piece, WORD_START),
        *[(piece, 0)] * 30_000,
    ]
    tokens = [
        {
            "doc": 0,
            "position": i,
            "token_id": t,
            "flags": f,
            "surface": None,
            "start": 3 * i + (f == WORD_START),
            "end": 3 * i + 3,
            **{strength_column(k): 1.0 for k in LAYERS},
        }
        for i, (t, f) in enumerate(ids)
    ]
    one = WORDED[0][1].slice(0, 1)
    write_run(
        str(tmp_path),
        [(pa.Table.from_pylist(tokens, viewed(tokens_schema(strengths(LAYERS), True))), one)],
        LAYERS,
    )
    word = "ri" * num_tokens
    with open_run(str(tmp_path)) as run:
        for n in range(4):
            side = " ".join([word] * n)
            contexts = run.sql(
                "SELECT left_context, right_context FROM kwic('bank', $n) WHERE position > 0",
                {"n": n},
            )
            assert contexts.fetchall() == [(side, side)]
        ((left, right),) = run.sql(
            "SELECT left_context, right_context FROM kwic('bank', 5) WHERE position > 0"
        ).fetchall()
    assert left == f"bank {word} {word} {word}"  # the document begins there
    assert (
        right.startswith(f"{word} {word} {word} riri")
        and right.endswith("ri…")
        and len(right) < 10_001
    )


def scans_files(plan: dict[str, Any]) -> bool:
    """True if rows of files come out of ``plan``, in their number."""
    if plan["name"].endswith(("UNNEST", "GROUP_BY", "AGGREGATE")):
        return False
    return "PARQUET" in str(plan["extra_info"]) or any(map(scans_files, plan["children"]))


def tables_of_files(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Joins that would make a table, in memory, of the rows of files."""
    if "JOIN" in plan["name"] and len(plan["children"]) == 2 and scans_files(plan["children"][1]):
        yield plan["extra_info"]
    for child in plan["children"]:
        yield from tables_of_files(child)


@pytest.mark.parametrize("most", ["", ", most := 3"])
def test_no_join_makes_a_table_of_all_tokens(run: Run, most: str) -> None:
    """DuckDB cannot know how many occurrences there are; guessing many, it held 100 M tokens in 5
    GB.
    """
    ((_, text),) = run.sql(f"EXPLAIN (FORMAT JSON) FROM kwic('river', 5{most})").fetchall()
    assert [list(tables_of_files(plan)) for plan in json.loads(text)] == [[]]
    ((_, text),) = run.sql("EXPLAIN (FORMAT JSON) FROM words JOIN tokens USING (doc)").fetchall()
    assert any(list(tables_of_files(plan)) for plan in json.loads(text))  # it can be told


@pytest.mark.parametrize(
    "word",
    ["", " ", "nothing", "river bank", "'", "x' OR 1=1 --", "'); DROP TABLE vocabulary; --", "%"],
)
def test_a_word_is_text_whatever_it_spells(run: Run, word: str) -> None:
    assert run.sql("FROM kwic(?)", [word]).fetchall() == []
    assert run.sql("FROM kwic('" + word.replace("'", "''") + "')").fetchall() == []


def test_macros_live_without_offsets(tmp_path: Path) -> None:
    tokens, documents, written = WORDED[0]
    write_run(str(tmp_path), [(tokens.drop_columns(["start", "end"]), documents)], LAYERS)
    with open_run(str(tmp_path)) as run:
        [(text,)] = run.sql("SELECT document_text(1)").fetchall()
        assert text == " ".join(w["text"] for w in written[1])
        assert "start" not in run.sql("FROM kwic('river')").columns
        assert run.sql("FROM kwic('river')").fetchall()


# --- what the night compares
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nights(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> tuple[str, str]:
    """Two true runs of one store, the second over more verses."""
    import afn_ray

    folder = tmp_path_factory.mktemp("nights")
    (folder / "corpus").mkdir()
    uris = []
    for name, lines in (("a.txt", verses[:60]), ("b.txt", verses[5000:5040])):
        (folder / "corpus" / name).write_text("\n".join(lines))
        config = RunConfig(
            corpus=(str(folder / "corpus"),),
            model=str(tiny_bert),
            store=str(folder / "store"),
            executor="inline",
            dtype="float32",
            txt_documents="line",
            layers="0,2",
        )
        with afn_ray.run(config) as run:
            uris.append(run.uri)
    return uris[0], uris[1]


def test_a_baseline_fills_the_views_of_what_moved(nights: tuple[str, str]) -> None:
    before, after = nights
    expected = compare(before, after)
    with open_run(after, baseline=before) as run:
        for view, table in (
            ("movers", expected.movers),
            ("drift", expected.drift),
            ("class_drift", expected.classes),
        ):
            assert run.sql(f"FROM {view}").to_arrow_table().to_pylist() == table.to_pylist() != []
        assert run.sql("FROM movers WHERE status = 'new' AND n_a = 0").fetchall()
    with open_run(after) as run:
        assert [run.sql(f"FROM {v}").fetchall() for v in ("movers", "drift", "class_drift")] == [
            [],
            [],
            [],
        ]


def test_the_histogram_counts_every_token(nights: tuple[str, str]) -> None:
    with open_run(nights[1]) as run:
        sql = "SELECT layer, sum(n) FROM histogram GROUP BY ALL ORDER BY ALL"
        [(n,)] = run.sql("SELECT count(*) FROM tokens").fetchall()
        assert run.sql(sql).fetchall() == [(0, n), (2, n)]


# --- the catalog
# -----------------------------------------------------------------------------------------

CLIENT = """
import json, sys, duckdb
answers = []
with duckdb.connect(sys.argv[1], read_only=True) as connection:
    for sql in sys.argv[2:]:
        try:
            answers.append(connection.execute(sql).fetchall())
        except duckdb.Error as error:
            answers.append(str(error))
print("ANSWERS", json.dumps(answers, default=str))
"""


def client(catalog: Path, *sql: str, packages: Path | None = None) -> list[Any]:
    """Rows of each of ``sql``, or its error as text, asked in one fresh process from an unrelated
    folder.

    ``packages``: where another version of DuckDB is.
    """
    path = {} if packages is None else {"PYTHONPATH": str(packages)}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(catalog), *sql],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **path},
        check=True,
    )
    answers: list[Any] = json.loads(
        done.stdout.rpartition("ANSWERS ")[2]
    )  # some versions draw their progress before
    return answers


EVERYTHING = [f"FROM {view} ORDER BY ALL" for view in views.VIEWS if view != "run"]
EVERYTHING += [
    "FROM kwic('lord')",
    "FROM kwic('lord', n := 2, most := 3)",
    "SELECT document_text(3)",
]


def answers_here(run_uri: str, baseline: str) -> list[Any]:
    """Rows of ``EVERYTHING`` without a catalog."""
    with open_run(run_uri, baseline=baseline) as run:
        return [json.loads(json.dumps(run.sql(sql).fetchall(), default=str)) for sql in EVERYTHING]


def test_a_catalog_opens_anywhere_and_follows_a_moved_store(
    nights: tuple[str, str], tmp_path: Path
) -> None:
    before, after = nights
    store = tmp_path / "the store's"
    shutil.copytree(after.rpartition("/runs/")[0], store)
    run_uri = f"{store}/runs/{after.rpartition('/')[2]}"
    catalog = tmp_path / "catalog.duckdb"
    write_catalog(run_uri, catalog, baseline=before)
    expected = answers_here(run_uri, before)
    assert client(catalog, *EVERYTHING) == expected
    moved = store.rename(tmp_path / "elsewhere")
    comment = "SELECT comment FROM duckdb_views() WHERE view_name = 'tokens'"
    small, lost, comments = client(catalog, EVERYTHING[2], EVERYTHING[0], comment)
    assert small == expected[2]  # the small tables are inside
    assert "No files found" in lost
    assert "SET VARIABLE afn_store" in str(comments)
    here = f"SET VARIABLE afn_store = '{str(moved).replace(chr(39), chr(39) * 2)}'"
    assert client(catalog, here, *EVERYTHING)[1:] == expected


@pytest.fixture(scope="module")
def catalog(
    nights: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Any]]:
    """A catalog of a true run, and what ``EVERYTHING`` gives without it."""
    before, after = nights
    path = tmp_path_factory.mktemp("catalog") / "catalog.duckdb"
    write_catalog(after, path, baseline=before)
    return path, answers_here(after, before)


@pytest.mark.parametrize("version", ["1.1.3", "1.5.6", "2.0.1"])
def test_a_catalog_gives_other_versions_of_duckdb_the_same_rows(
    catalog: tuple[Path, list[Any]], tmp_path: Path, version: str
) -> None:
    """The oldest client that it is for, the last of 1.x, and the newest there was when this was
    written.
    """
    packages = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
    done = subprocess.run([*command, f"duckdb=={version}"], capture_output=True, text=True)
    if done.returncode != 0 and "CI" not in os.environ:
        pytest.skip(f"DuckDB {version} cannot be installed here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    path, expected = catalog
    asked, *answers = client(path, "SELECT version()", *EVERYTHING, packages=packages)
    assert asked == [[f"v{version}"]]
    assert answers == expected


def test_a_catalog_replaces_nothing_and_is_whole_or_not_there(worded: str, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.duckdb"
    catalog.write_text("mine")
    with pytest.raises(ConfigError, match="exists and stays"):
        write_catalog(worded, catalog)
    assert catalog.read_text() == "mine"
    catalog.unlink()
    with pytest.raises(AfnError):
        write_catalog(str(tmp_path / "nothing"), catalog)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_catalog(worded, tmp_path / "no folder" / "catalog.duckdb")
    broken = tmp_path / "broken"
    folder = manifest.find_run(write_run(str(broken), [make_shard(1, 5)], LAYERS))
    (broken / "shards/m/s0/a-tokens.parquet").unlink()
    with pytest.raises(AfnError):
        write_catalog(folder.uri, catalog)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_the_command_writes_a_catalog_or_asks(
    nights: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = nights
    catalog = tmp_path / "night.duckdb"

    def afn(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            commands.main(["sql", after, "--baseline", before, *arguments])
        return int(left.value.code or 0), "".join(capsys.readouterr())

    assert afn("--open", str(catalog), "FROM movers") == (2, AnyText("asks nothing"))
    assert not catalog.exists()
    assert afn("--open", str(catalog)) == (0, AnyText(f"{catalog} is written"))
    assert afn("--open", str(catalog)) == (2, AnyText("exists and stays"))
    code, text = afn("SELECT count(*) > 0 AS filled FROM movers", "--format", "csv")
    assert (code, text.split()) == (0, ['"filled"', "true"])
    assert client(catalog, "SELECT count(*) > 0 FROM movers") == [[[True]]]


class AnyText(str):
    """Equal to every text that holds it."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) in " ".join(other.split())
