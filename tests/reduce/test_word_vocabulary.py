"""The table of words against pandas over the view ``words``, for any order, cut and tokenizer."""

from __future__ import annotations

import io
import random
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console

import afn_ray
from afn_ray.analysis import verify
from afn_ray.query.word_counts import word_counts
from afn_ray.reduce import lexicon, screen, tasks, word_sums, word_tables
from afn_ray.reduce.controls import places_of
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.tasks import Inline
from afn_ray.schema import WORD_START, WORD_VOCABULARY_SCHEMA
from afn_ray.show.overview import render_classes
from afn_ray.show.summary import summarise
from afn_ray.store import manifest
from conftest import config_of, edit_checksummed, edit_table, write_jsonl

LAYERS = (1, 2)
ODD = [
    "\u0130stanbul \u0130STANBUL",
    "na\u00efve nai\u0308ve NA\u00cfVE",
    "x" * 450,
    "\U0001f600\U0001f600 ok",
]
"""Texts whose words are hard to compare: case, accents, a long word,
characters that no type has.
"""


@pytest.fixture(scope="module", params=["bert", "gpt"])
def run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_bert: Path,
    tiny_gpt: Path,
    verses: list[str],
) -> Iterator[afn_ray.Run]:
    """A run over a few verses, some in capitals, with copies that it leaves out."""
    folder = tmp_path_factory.mktemp("words")
    texts = [*verses[:90], *(v.upper() for v in verses[:20]), *ODD, *verses[:15], ""]
    corpus = write_jsonl(folder / "c.jsonl", [{"text": text} for text in texts])
    model = {"bert": tiny_bert, "gpt": tiny_gpt}[request.param]
    config = config_of(
        model, corpus, folder / "store", layers="1,2", shard_bytes=4000, duplicates="once"
    )
    with afn_ray.run(config) as made:
        yield made


def occurrences(run: afn_ray.Run) -> pd.DataFrame:
    """Every word of the run, with ``word``, its spelling as the table compares it."""
    found: pd.DataFrame = run.sql("FROM words").df()
    forms = [text.strip(" ")[:200] for text in found["text"]]
    lower = [form.lower().replace("i\u0307", "i") for form in forms]
    return found.assign(form=forms, word=[unicodedata.normalize("NFC", word) for word in lower])


def quartile(values: pd.Series[float], at: int) -> float:
    return float(np.quantile(values, at / 4, method="inverted_cdf"))


def reference(words: pd.DataFrame, layer: int, q3: float, n_docs: int) -> dict[str, Any]:
    """One row of the table, of occurrences ``words``, by pandas."""
    strongest, mean = words[f"max_strength_{layer}"], words[f"mean_strength_{layer}"]
    first, last = words[f"first_strength_{layer}"], words[f"last_strength_{layer}"]
    return {
        "n": len(words),
        "n_docs": words["doc"].nunique(),
        "n_tokens": words["n_tokens"].sum(),
        "pieces": words["n_tokens"].mean(),
        "mean": strongest.astype(float).mean(),
        "sd": strongest.astype(float).std(ddof=0),
        "min": strongest.min(),
        "q1": quartile(strongest, 1),
        "q2": quartile(strongest, 2),
        "q3": quartile(strongest, 3),
        "max": strongest.max(),
        "mean_strength": mean.mean(),
        "first_strength": first.astype(float).mean(),
        "last_strength": last.astype(float).mean(),
        "n_high": (strongest >= q3).sum(),
        "n_high_mean": (mean >= q3).sum(),
        "n_high_first": (first >= q3).sum(),
        "n_high_last": (last >= q3).sum(),
        "idf": np.log(n_docs / words["doc"].nunique()),
    }


def test_every_word_has_the_statistics_that_pandas_gives_over_words(run: afn_ray.Run) -> None:
    rows = occurrences(run)
    ((n_docs,),) = run.sql("SELECT count(DISTINCT doc) FROM words").fetchall()
    assert (rows["n_tokens"] > 1).sum() > 100 and rows["n_tokens"].max() >= 4
    for layer in LAYERS:
        ((q3,),) = run.sql(
            "SELECT q3 FROM labels WHERE layer = ? AND population = 'tokens'", [layer]
        ).fetchall()
        table = run.sql(
            "FROM word_vocabulary WHERE layer = ? AND word IS NOT NULL", [layer]
        ).to_arrow_table()
        stored = {row["word"]: row for row in table.to_pylist()}
        frequent = rows.groupby("word").filter(lambda of: len(of) >= word_tables.LEAST_N)
        assert set(stored) == set(frequent["word"]) and len(stored) > 60
        for word, of_word in frequent.groupby("word"):
            row, expected = stored[str(word)], reference(of_word, layer, q3, n_docs)
            counts = {k: row[k] for k in expected if isinstance(row[k], int)}
            assert counts == {k: expected[k] for k in counts}, word
            for name in ("min", "q1", "q2", "q3", "max", "mean", "first_strength", "last_strength"):
                assert row[name] == expected[name], (word, name)  # sums of strengths are exact
            for name in ("sd", "mean_strength", "pieces", "idf"):
                assert row[name] == pytest.approx(expected[name], rel=1e-12, abs=1e-12), word
            forms = Counter(unicodedata.normalize("NFC", form) for form in of_word["form"])
            listed = sorted(forms, key=lambda form: (-forms[form], form.encode()))[:3]
            assert (row["forms"], row["text"]) == (listed, listed[0])


def test_rare_words_are_folded_by_their_first_piece_and_nothing_is_lost(run: afn_ray.Run) -> None:
    rows = occurrences(run)
    tokens = run.sql("SELECT doc, position, token_id FROM tokens").df()
    rows = rows.merge(tokens, on=["doc", "position"])
    rare = rows.groupby("word").filter(lambda of: len(of) < word_tables.LEAST_N)
    by_form = rare.groupby(["word", "form"]).agg(n=("doc", "size"), piece=("token_id", "min"))
    by_form = by_form.reset_index().sort_values(
        ["word", "n", "form"], ascending=[True, False, True]
    )
    piece_of = by_form.drop_duplicates("word").set_index("word")["piece"]
    rare = rare.assign(piece=rare["word"].map(piece_of))
    expected = rare.groupby("piece").agg(
        n_folded=("word", "nunique"),
        n=("doc", "size"),
        n_tokens=("n_tokens", "sum"),
        n_high=("high_2", "sum"),
        min=("max_strength_2", "min"),
    )
    folded = run.sql("FROM word_vocabulary WHERE layer = 2 AND word IS NULL").df()
    sums = dict.fromkeys(expected.columns, "sum") | {"min": "min"}
    pd.testing.assert_frame_equal(
        folded.groupby("token_id").agg(sums), expected, check_dtype=False, check_names=False
    )
    assert (folded["least_n"] == word_tables.LEAST_N).all() and len(expected) > 50
    whole = run.sql(
        "SELECT sum(n), sum(n_tokens), sum(n_high), sum(n_folded) + count(word) FROM "
        "word_vocabulary WHERE layer = 2"
    ).fetchall()
    high = rows["high_2"].sum()
    assert whole == [(len(rows), rows["n_tokens"].sum(), high, rows["word"].nunique())]


def test_verify_proves_the_words_however_the_scan_and_the_sums_are_cut(
    run: afn_ray.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call for each shard, many parts and calls that add two sums, against one of each."""
    monkeypatch.setattr(screen, "READ_BYTES", 1)
    monkeypatch.setattr(word_tables, "PART_STRENGTHS", 500)
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 2)
    assert verify.verify_store(run.uri).findings == ()


def test_a_word_has_the_class_of_its_row_and_a_rarer_one_that_of_its_own_use(
    run: afn_ray.Run,
) -> None:
    rows = occurrences(run)
    named = run.sql("SELECT word, class FROM word_vocabulary WHERE layer = 1 AND word IS NOT NULL")
    class_of = dict(named.fetchall())
    documents = run.sql("SELECT doc, detected_language FROM documents").fetchall()
    words_of = {doc: lexicon.find(language or "-") for doc, language in documents}
    seen = Counter[str]()
    for doc, word, name in zip(rows["doc"], rows["word"], rows["class"], strict=True):
        guess = lexicon.classify(word, special=False, starts=1, whole=1, words=words_of[doc])
        assert name == class_of.get(word, guess.name), word
        seen[name if word in class_of else f"rare {name}"] += 1
    assert {"function", "content", "punctuation"} <= set(seen)
    assert {"rare function", "rare content", "rare word"} <= set(seen)
    pieces = rows[rows["n_tokens"] > 1]
    assert {"function", "content"} <= set(pieces["class"])


def test_classes_of_words_in_one_language_add_up_as_their_table_does(
    tmp_path: Path, tiny_gpt: Path, verses: list[str]
) -> None:
    texts = [*verses[:40], "It\u2019s 7 don\u2019t ...", *(v.upper() for v in verses[:9])]
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in texts])
    for language in ("en", "sw"):
        config = config_of(tiny_gpt, corpus, tmp_path / language, layers="1", language=language)
        with afn_ray.run(config) as made:
            by_word = made.sql("SELECT class, count(*) FROM words GROUP BY ALL ORDER BY ALL")
            by_row = "SELECT class, sum(n)::BIGINT FROM word_vocabulary GROUP BY ALL ORDER BY ALL"
            assert by_word.fetchall() == made.sql(by_row).fetchall()
            counted = word_counts(made, 1).classes.sort_by("class")
            assert by_word.fetchall() == list(
                zip(counted["class"].to_pylist(), counted["n"].to_pylist(), strict=True)
            )


OLDER = {
    "no table of words": lambda info: info["tables"].pop("word_vocabulary"),
    "other classes": lambda info: info.update(function_words="closed-class words 1"),
}
"""Edits that make a run.json as an older version wrote it."""


@pytest.mark.parametrize("edit", OLDER)
def test_words_of_an_older_run_are_not_counted_again_to_prove_it(
    edit: str, run: afn_ray.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _, name = run.uri.rpartition("/runs/")
    shutil.copytree(store, tmp_path / "store")
    edit_checksummed(str(tmp_path / "store" / "runs" / name / "run.json"), OLDER[edit])
    counted = []
    monkeypatch.setattr(word_sums.WordCounter, "add", lambda _, tokens: counted.append(tokens))
    found = verify.verify_store(str(tmp_path / "store"))
    assert found.findings == () and found.num_runs == 1 and not counted


def test_forms_of_an_older_run_with_decomposed_letters_are_not_compared(
    run: afn_ray.Run, tmp_path: Path
) -> None:
    store, _, name = run.uri.rpartition("/runs/")
    shutil.copytree(store, tmp_path / "store")

    def decompose(table: pa.Table) -> pa.Table:
        forms = table["forms"].to_pylist()
        forms[0] = ["e\u0301", *forms[0]]
        at, field = table.column_names.index("forms"), table.schema.field("forms")
        return table.set_column(at, field, pa.array(forms, field.type))

    edit_table(str(tmp_path / "store" / "runs" / name), "word_vocabulary", decompose)
    assert verify.verify_store(str(tmp_path / "store")).findings == ()


def test_class_tables_count_words(run: afn_ray.Run) -> None:
    rows = occurrences(run)
    summary = summarise(manifest.find_run(run.uri))
    console = Console(file=io.StringIO(), width=100)
    render_classes(summary, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Which classes of words are HIGH" in shown and " words " in shown
    for facts in summary.layers:
        assert facts.unit == "word" and facts.shown_classes == facts.word_classes
        of_class = {share.name: share for share in facts.word_classes}
        assert sum(share.n for share in facts.word_classes) == len(rows)
        is_plain = [not any(c.isalnum() for c in form) for form in rows["form"]]
        plain = rows[is_plain]
        found = of_class["punctuation"]
        assert (found.n, found.n_high) == (len(plain), plain[f"high_{facts.layer}"].sum())
        the = rows[rows["word"].isin(["the", "and", "of", "unto"])]
        assert len(the) < of_class["function"].n < len(rows)
        assert f"{found.share:.3f} ({found.low:.3f}-{found.high:.3f})" in shown


# --- sums of generated tokens

TEXTS = ["the", "The", "sea", "##son", "will", "may", "7", ",", "##s", "\u0130", "i", "deep"]


def corpus_of(seed: int, num_docs: int) -> list[word_sums.WordTokens]:
    """Documents of random tokens, some with surfaces and tags."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num_docs):
        n = int(rng.integers(1, 40))
        types = rng.integers(0, len(TEXTS), n).astype(np.int32)
        starts = np.array([not TEXTS[i].startswith("##") for i in types])
        surface = [
            rng.choice(["Ahab", "ahab", "\u00e9t\u00e9"])
            if is_start and rng.random() < 0.2
            else None
            for is_start in starts
        ]
        tags = [str(rng.choice(["NOUN", "VERB"])) if rng.random() < 0.9 else None for _ in types]
        strengths = [
            round_strengths(np.exp(rng.normal(scale, 2, n)).astype(np.float32)) for scale in (0, 3)
        ]
        made.append(
            word_sums.WordTokens(
                np.zeros(n, np.int32),
                types,
                np.where(starts, WORD_START, 0).astype(np.uint8),
                strengths,
                pa.array(surface, pa.string()).dictionary_encode(),
                pa.array(tags, pa.string()).dictionary_encode(),
                places_of(np.arange(n), np.full(n, n)),
            )
        )
    return made


def joined(documents: list[word_sums.WordTokens]) -> word_sums.WordTokens:
    """``documents`` as one chunk."""
    docs = [np.full(len(d.docs), at, np.int32) for at, d in enumerate(documents)]
    layers = zip(*(d.by_layer for d in documents), strict=True)
    written = [
        pa.concat_arrays([getattr(d, name).cast(pa.string()) for d in documents])
        for name in ("surface", "tag")
    ]
    surface, tag = (column.dictionary_encode() for column in written)
    return word_sums.WordTokens(
        np.concatenate(docs),
        np.concatenate([d.types for d in documents]),
        np.concatenate([d.flags for d in documents]),
        [np.concatenate(of_layer) for of_layer in layers],
        surface,
        tag,
        np.concatenate([d.places for d in documents]),
    )


def table_of(shards: list[list[word_sums.WordTokens]], num_parts: int, tagged: bool) -> pa.Table:
    """The table of the words of ``shards``, each a list of chunks."""
    readable = [text.removeprefix("##") for text in TEXTS]
    cuts = tasks.Cuts.of(num_parts, len(shards), 2)
    rules = word_sums.WordRules(readable, (1.5, 30.0), tagged, cuts.first)
    leaves = []
    for chunks in shards:
        counter = word_sums.WordCounter(rules)
        for chunk in chunks:
            counter.add(chunk)
        leaves.append(counter.sums())
    described = word_tables.Described(LAYERS, rules.q3, 300, "en", tagged, readable)
    parts = word_tables.merge_words(map(list, leaves), cuts, Inline())
    assert len(parts) == cuts.last
    return word_tables.word_vocabulary(parts, described, Inline())


@pytest.mark.parametrize("tagged", [False, True])
def test_rows_are_the_same_for_any_cut_order_and_number_of_parts(
    tagged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_sums, "COMPACT_KEYS", 100)
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 3)
    documents = corpus_of(1, 300)
    expected = table_of([[joined(documents)]], 1, tagged)
    assert set(expected["word"].to_pylist()) >= {
        "the",
        "season",
        "ahab",
        "i",
        "\u00e9t\u00e9",
        None,
    }
    for seed, num_parts, size in ((2, 1, 7), (3, 5, 40), (4, 3, 100), (5, 40, 3), (6, 2, 150)):
        shuffled = random.Random(seed).sample(documents, len(documents))
        chunks = [joined(shuffled[at : at + size]) for at in range(0, len(shuffled), size)]
        shards = [chunks[at : at + 2] for at in range(0, len(chunks), 2)]
        found = table_of(shards, num_parts, tagged)
        assert found.equals(expected)  # to the last bit


def test_a_part_of_the_sums_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpora of new words each: 16 times the corpus has 16 times the
    parts, at no height larger.
    """
    monkeypatch.setattr(word_tables, "PART_STRENGTHS", 2000)
    merge, most = word_sums.merge, {}
    for num_leaves in (4, 16, 64):
        sizes: list[int] = []

        def spied(
            cut: tuple[int, int], *parts: word_sums.WordSums, into: list[int] = sizes
        ) -> list[word_sums.WordSums]:
            found = merge(cut, *parts)
            into += [sum(len(of.values.keys) for of in part.by_layer) for part in found]
            return found

        monkeypatch.setattr(word_tables, "merge", spied)
        cuts = word_tables.cuts(num_leaves * 1000 * 2, num_leaves)
        rules = word_sums.WordRules([], (1.0, 1.0), False, cuts.first)
        leaves = [words_of_their_own(rules, number, 1000) for number in range(num_leaves)]
        parts = word_tables.merge_words(leaves, cuts, Inline())
        assert sum(len(part.words) for part in parts) == num_leaves * 1000
        most[num_leaves] = max(sizes)
    assert max(most.values()) <= 1.3 * word_tables.PART_STRENGTHS, most
    assert len(parts) == cuts.last >= 64


def words_of_their_own(
    rules: word_sums.WordRules, number: int, num_words: int
) -> list[word_sums.WordSums]:
    """Sums of a document of ``num_words`` words that occur once, in no other document."""
    written = pa.array([f"w{number}x{i}" for i in range(num_words)]).dictionary_encode()
    strengths = np.random.default_rng(number).gamma(3, 0.4, (2, num_words)).astype(np.float32)
    counter = word_sums.WordCounter(rules._replace(readable=["w"]))
    tokens = word_sums.WordTokens(
        np.full(num_words, number, np.int32),
        np.zeros(num_words, np.int32),
        np.full(num_words, WORD_START, np.uint8),
        list(strengths),
        written,
        None,
        np.zeros(num_words, np.int64),
    )
    counter.add(tokens)
    return counter.sums()


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 5, 64, 1000])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 500])
def test_sums_have_parts_in_proportion_to_the_scans_they_cover(
    num_leaves: int, num_parts: int
) -> None:
    for fan_in in (2, 4):
        cuts = tasks.Cuts.of(num_parts, num_leaves, fan_in)
        height = 0
        while fan_in**height < num_leaves:
            covered = fan_in**height / num_leaves
            assert cuts.at(height) >= min(num_parts, covered * num_parts)
            assert cuts.at(height + 1) % cuts.at(height) == 0
            height += 1
        assert num_parts <= cuts.at(height) == cuts.last < 2 * num_parts


def test_classes_are_those_of_the_word_or_of_its_tags() -> None:
    documents = [joined(corpus_of(5, 200))]
    plain = {row["word"]: row for row in table_of([documents], 2, False).to_pylist() if row["word"]}
    found = {word: plain[word]["class"] for word in ("the", "season", "sea", "7", ",", "ahab")}
    assert found == {
        "the": "function",
        "season": "content",
        "sea": "content",
        "7": "number",
        ",": "punctuation",
        "ahab": "content",
    }
    the = lexicon.find("en").guess("the")  # type: ignore[union-attr]
    assert plain["the"]["class_confidence"] == pytest.approx(the.confidence, abs=0.02)
    assert plain["will"]["is_ambiguous"] and not plain["sea"]["is_ambiguous"]
    assert {row["language"] for row in plain.values()} == {"en"}
    tokens = documents[0]
    assert tokens.tag is not None
    tags: Counter[str] = Counter()
    for at in np.flatnonzero(tokens.types == TEXTS.index("sea")).tolist():
        same_doc = tokens.docs[at + 1 : at + 2] == tokens.docs[at]
        goes_on = same_doc.any() and (tokens.flags[at + 1 : at + 2] == 0).all()
        if not goes_on and tokens.surface[at].as_py() is None and tokens.tag[at].is_valid:
            tags[tokens.tag[at].as_py()] += 1
    tagged = {row["word"]: row for row in table_of([documents], 2, True).to_pylist() if row["word"]}
    best = max(tags, key=lambda tag: tags[tag])
    assert tagged["sea"]["class"] == best
    assert tagged["sea"]["class_confidence"] == pytest.approx(tags[best] / sum(tags.values()))


def row_of(uses: list[tuple[str, str | None, int]]) -> dict[str, Any]:
    """The row of one word with these forms, in documents of these languages, so many times each."""
    rows = [(form, spoken) for form, spoken, n in uses for _ in range(n)]
    forms, languages = (pa.array(column, pa.string()) for column in zip(*rows, strict=True))
    n = len(rows)
    tokens = word_sums.WordTokens(
        np.arange(n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.full(n, WORD_START, np.uint8),
        [np.ones(n, np.float32)],
        forms.dictionary_encode(),
        languages.dictionary_encode(),
        places_of(np.zeros(n, np.int64), np.ones(n, np.int64)),
    )
    counter = word_sums.WordCounter(word_sums.WordRules(["x"], (1.5,), False, 1, by_language=True))
    counter.add(tokens)
    described = word_tables.Described((1,), (1.5,), n, "auto", False, ["x"])
    (row,) = word_tables.word_vocabulary(counter.sums(), described, Inline()).to_pylist()
    return dict(row)


ACCENTED = "\u00e9cole"


@pytest.mark.parametrize(
    ("uses", "language", "name"),
    [
        ([("window", "en", 8), ("WINDOW", "unknown", 12)], "en", "content"),
        ([("with", "en", 6), ("WITH", "unknown", 9), ("With", None, 9)], "en", "function"),
        (
            [(ACCENTED, "fr", 5), (unicodedata.normalize("NFD", ACCENTED), "unknown", 50)],
            "fr",
            "content",
        ),
        ([("window", "unknown", 5), ("WINDOW", None, 5)], None, "word"),  # there are no others
        ([("window", "en", 5), ("WINDOW", "sw", 9), ("Window", "unknown", 9)], "sw", "word"),
    ],
)
def test_uses_in_unknown_languages_do_not_count_in_any_spelling_unless_there_are_no_others(
    uses: list[tuple[str, str | None, int]], language: str | None, name: str
) -> None:
    row = row_of(uses)
    n = sum(n for *_, n in uses)
    assert (row["language"], row["class"], row["n"]) == (language, name, n)


@pytest.mark.parametrize("n_decomposed", [1, 9])
def test_forms_that_look_the_same_are_one_in_composed_letters(n_decomposed: int) -> None:
    decomposed = unicodedata.normalize("NFD", ACCENTED)
    capital = ACCENTED.capitalize()
    uses: list[tuple[str, str | None, int]] = [
        (ACCENTED, "fr", 4),
        (decomposed, "fr", n_decomposed),
        (capital, "fr", 3),
        (decomposed.capitalize(), "fr", 1),
        (ACCENTED.upper(), "fr", 1),
    ]
    for order in (uses, uses[::-1]):
        row = row_of(order)
        assert row["forms"] == [ACCENTED, capital, ACCENTED.upper()]
        assert (row["text"], row["n"]) == (ACCENTED, 9 + n_decomposed)


def test_more_words_than_rows_raise_the_number_of_occurrences_that_a_row_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = corpus_of(6, 300)
    every = table_of([[joined(documents)]], 2, False)
    sizes = sorted({row["n"] for row in every.to_pylist() if row["word"]})
    monkeypatch.setattr(word_tables, "MOST_ROWS", 2 * 4)  # four words at each of two layers
    some = table_of([[joined(documents)]], 2, False)
    named = [row for row in some.to_pylist() if row["word"] is not None]
    assert len(named) in range(2, 9, 2)
    (least,) = {row["least_n"] for row in some.to_pylist() if row["word"] is None}
    assert all(row["n"] >= least for row in named)
    ranked = sorted(row["n"] for row in every.to_pylist() if row["word"] and row["layer"] == 1)
    assert sum(n >= least - 1 for n in ranked) > 4 and least - 1 in sizes
    for name in ("n", "n_tokens", "n_high"):
        assert sum(some[name].to_pylist()) == sum(every[name].to_pylist())


def test_words_of_the_same_tokens_are_one_sequence_and_long_ones_end_at_the_limit() -> None:
    types = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0] + [1] * 500 + [0] + [1] * 600, np.int32)
    heads = np.array([0, 3, 6, 8, 509])
    sizes = np.diff(heads, append=len(types))
    which, examples, used = word_sums.sequences(types, heads, sizes, np.array([1, 1, 1]))
    assert which.tolist() == [which[0], which[0], which[2], which[3], which[3]]
    assert len(set(which.tolist())) == 3 == len(examples)
    assert used[which].tolist() == [3, 3, 2, word_sums.WORD_CHARS, word_sums.WORD_CHARS]


def test_the_schema_is_that_of_an_empty_table() -> None:
    nothing = table_of([[], []], 2, False)
    assert nothing.schema == WORD_VOCABULARY_SCHEMA and not len(nothing)
