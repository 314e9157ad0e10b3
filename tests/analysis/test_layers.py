"""Any two layers compared: figures against pandas and scipy over the recorded words, what is
refused, and what is shown.
"""

from __future__ import annotations

import io
import json
import shutil
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.stats
from rich.console import Console

import afn_ray
from afn_ray.analysis import layers, matched_words
from afn_ray.analysis.layers import LayerComparison, compare_layers
from afn_ray.analysis.matched_words import Overlap
from afn_ray.cli import commands
from afn_ray.errors import ConfigError
from afn_ray.query import database, expressions, word_counts
from afn_ray.query.database import Run
from afn_ray.query.word_counts import LEAST_N
from afn_ray.reduce import compare, distances
from afn_ray.schema import LAYER_CLASSES_SCHEMA, LAYER_WORDS_SCHEMA
from afn_ray.show import layer_tables
from conftest import config_of, edit_table, save_model, write_jsonl

ACCENTS = "Cafe\u0301 CAF\u00c9 caf\u00e9 Caf\u00e9 cafe\u0301."
"""One word, written in five ways."""


@pytest.fixture(scope="module")
def shallow_gpt(tmp_path_factory: pytest.TempPathFactory, byte_bpe: Path) -> Path:
    """A GPT-2 of 2 layers, with a tokenizer of bytes."""
    import transformers

    config = transformers.GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2, n_positions=48)
    return save_model(tmp_path_factory.mktemp("shallow"), config, tokenizer=byte_bpe)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, verses: list[str]) -> Path:
    """Two corpora with 80 texts in common, of which two have copies, more of them in B."""
    folder = tmp_path_factory.mktemp("layers")
    shared = [ACCENTS, *verses[20:99]]
    for name, texts in {
        "a": [*verses[:20], *shared, verses[50], verses[51]],
        "b": [*reversed(shared), verses[50], verses[50], verses[51], *verses[300:330]],
    }.items():
        write_jsonl(folder / f"{name}.jsonl", [{"text": text} for text in texts])
    return folder


@pytest.fixture(scope="module")
def uris(folder: Path, tiny_bert: Path, shallow_gpt: Path) -> tuple[str, str]:
    """A run of the BERT of 3 layers and one of the GPT of 2, over different corpora."""
    asked = (
        config_of(
            tiny_bert, folder / "a.jsonl", folder / "store-a", layers="1,2", shard_bytes=4096
        ),
        config_of(shallow_gpt, folder / "b.jsonl", folder / "store-b", layers="1,2"),
    )
    found = []
    for config in asked:
        with afn_ray.run(config) as run:
            found.append(run.uri)
    return found[0], found[1]


@pytest.fixture(scope="module")
def opened(uris: tuple[str, str]) -> Iterator[tuple[Run, Run]]:
    with database.open_run(uris[0]) as a, database.open_run(uris[1]) as b:
        yield a, b


@pytest.fixture(scope="module")
def of_models(uris: tuple[str, str]) -> LayerComparison:
    return compare_layers(*uris, "2/3:1/2")


@pytest.fixture(scope="module")
def of_one_run(uris: tuple[str, str]) -> LayerComparison:
    return compare_layers(uris[0], uris[0], "1:2")


@pytest.fixture(params=["of_models", "of_one_run"])
def found(request: pytest.FixtureRequest) -> LayerComparison:
    comparison: LayerComparison = request.getfixturevalue(request.param)
    return comparison


@pytest.fixture
def frames(found: LayerComparison, opened: tuple[Run, Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The words of both sides as they were recorded."""
    a, b = opened
    sides = (found.a, a), (found.b, a if found.b.run.uri == a.uri else b)
    frames = [frame(run, side.layer) for side, run in sides]
    return frames[0], frames[1]


def frame(run: Run, layer: int) -> pd.DataFrame:
    """A row for each word of ``run``, with its rank at ``layer``."""
    words: pd.DataFrame = run.sql(
        'SELECT doc, word, text, class, w.n_tokens AS pieces, "end", text_sha256, '
        f"max_strength_{layer} AS strength, high_{layer} AS high FROM words w JOIN "
        "documents USING (doc)"
    ).df()
    ((q3,),) = run.sql(
        "SELECT q3 FROM thresholds WHERE population = 'tokens' AND layer = $k", {"k": layer}
    ).fetchall()
    assert (words["high"] == (words["strength"] >= np.float32(q3))).all()
    words["name"] = [unicodedata.normalize("NFC", text.lower()) for text in words["text"]]
    words["rank"] = (words["strength"].rank(method="average") - 0.5) / len(words)
    return words


def by(words: pd.DataFrame, key: str) -> pd.DataFrame:
    return words.groupby(key).agg(
        n=("high", "size"),
        pieces=("pieces", "sum"),
        n_high=("high", "sum"),
        share_high=("high", "mean"),
        rank=("rank", "mean"),
    )


def frequent(words: pd.DataFrame) -> pd.DataFrame:
    named = by(words, "name")
    return named[named["n"] >= LEAST_N]


# --- figures against pandas and scipy


def test_words_are_those_of_pandas(
    found: LayerComparison, frames: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    assert found.words.schema == LAYER_WORDS_SCHEMA
    a, b = map(frequent, frames)
    expected = a.join(b, how="outer", suffixes=("_a", "_b"))
    rows = {row["word"]: row for row in found.words.to_pylist()}
    assert rows.keys() == set(expected.index) and {"the", "café"} <= rows.keys()
    assert len(found.words) == len(rows)
    for word, wanted in expected.iterrows():
        row = rows[str(word)]
        for name, value in wanted.drop(["n_high_a", "n_high_b", "pieces_a", "pieces_b"]).items():
            assert row[str(name)] == (None if np.isnan(value) else pytest.approx(value, rel=1e-12))
        n_a, n_b = wanted["n_a"], wanted["n_b"]
        assert row["status"] == (
            "only_a" if np.isnan(n_b) else "only_b" if np.isnan(n_a) else "both"
        )
    for side, words in zip((found.a, found.b), frames, strict=True):
        every = by(words, "name")
        rare = every[every["n"] < LEAST_N]
        assert (side.words.num_folded, side.words.n_folded) == (len(rare), rare["n"].sum())
        assert side.words.n == len(words) and side.words.n_tokens == words["pieces"].sum()
        assert side.words.n_high == words["high"].sum()


def test_words_of_both_sides_are_tested_and_sorted_as_scipy_says(found: LayerComparison) -> None:
    rows = found.in_both.to_pylist()
    tested = 0
    for row in rows:
        counts = np.array(
            [[round(row[f"n_{s}"] * row[f"share_high_{s}"]), row[f"n_{s}"]] for s in "ab"]
        )
        counts[:, 1] -= counts[:, 0]
        if not counts.sum(axis=0).all():
            assert (row["z"], row["p"]) == (0, 1)
        elif scipy.stats.contingency.expected_freq(counts).min() >= distances.LEAST_EXPECTED:
            chi2 = scipy.stats.chi2_contingency(counts, correction=False)
            assert row["z"] ** 2 == pytest.approx(chi2.statistic, rel=1e-9, abs=1e-12)
            assert row["p"] == pytest.approx(chi2.pvalue, rel=1e-9)
            tested += 1
    assert tested > 5
    assert [row["q"] for row in rows] == pytest.approx(
        scipy.stats.false_discovery_control([row["p"] for row in rows])
    )
    order = [(row["q"], -abs(row["z"]), -row["n_a"] - row["n_b"], row["word"]) for row in rows]
    assert order == sorted(order)
    others = [row for row in found.words.to_pylist() if row["status"] != "both"]
    assert all(row["z"] is row["p"] is row["q"] is None for row in others)


def test_classes_are_those_of_pandas(
    found: LayerComparison, frames: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    assert found.classes.schema == LAYER_CLASSES_SCHEMA
    rows = {row["class"]: row for row in found.classes.to_pylist()}
    assert len(rows) > 3
    for side, words in zip("ab", frames, strict=True):
        expected = by(words, "class")
        for name, row in rows.items():
            if name not in expected.index:
                assert row[f"n_{side}"] == 0 and row[f"rank_{side}"] is None
                continue
            wanted = expected.loc[name]
            assert row[f"n_{side}"] == wanted["n"] and row[f"n_high_{side}"] == wanted["n_high"]
            assert row[f"share_{side}"] == pytest.approx(wanted["n"] / len(words))
            assert row[f"share_high_{side}"] == pytest.approx(wanted["share_high"])
            assert row[f"rank_{side}"] == pytest.approx(wanted["rank"], rel=1e-12)


def test_a_word_has_the_class_of_most_of_its_occurrences(
    found: LayerComparison, frames: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    counts = [words.groupby(["name", "class"]).size() for words in frames]
    for row in found.words.to_pylist():
        of_word = counts[0 if row["status"] == "only_a" else 1][row["word"]]
        most = of_word[of_word == of_word.max()]
        assert row["class"] == min(most.index)


def test_ranks_and_words_that_are_mostly_high_agree_as_scipy_says(
    found: LayerComparison, frames: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    a, b = map(frequent, frames)
    both = a.join(b, how="inner", suffixes=("_a", "_b"))
    assert found.spearman == pytest.approx(
        scipy.stats.spearmanr(both["rank_a"], both["rank_b"]).statistic
    )
    high_a, high_b = (set(both.index[both[f"share_high_{s}"] >= 0.5]) for s in "ab")
    assert high_a and high_b
    assert found.mostly_high.jaccard == pytest.approx(len(high_a & high_b) / len(high_a | high_b))
    assert found.mostly_high.n == len(both)


def placed(words: pd.DataFrame, *, by_number: bool) -> dict[Any, tuple[float, bool]]:
    """Strength and label of each word by its text, the copy of the text, and its place."""
    documents = words.drop_duplicates("doc").sort_values("doc")
    copy = dict(zip(documents["doc"], documents.groupby("text_sha256").cumcount(), strict=True))
    found: dict[Any, tuple[float, bool]] = {}
    for row in words.itertuples():
        place = row.word if by_number else (row.end, row.text)
        found[row.text_sha256, copy[row.doc], place] = (row.strength, row.high)
    return found


def test_words_match_at_their_places_in_the_same_texts(
    found: LayerComparison, frames: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    is_one_run = found.a.run.uri == found.b.run.uri
    a, b = (placed(words, by_number=is_one_run) for words in frames)
    both = sorted(a.keys() & b.keys(), key=str)
    assert found.matched is not None
    assert found.matched.high.n == len(both) > 1000
    high_a, high_b = ({key for key in both if side[key][1]} for side in (a, b))
    assert found.matched.high == Overlap(
        len(both), len(high_a & high_b), len(high_a - high_b), len(high_b - high_a)
    )
    assert found.matched.high.jaccard == len(high_a & high_b) / len(high_a | high_b)
    strengths = [[side[key][0] for key in both] for side in (a, b)]
    assert found.matched.spearman == pytest.approx(scipy.stats.spearmanr(*strengths).statistic)
    texts = [{key[:2] for key in side} for side in (a, b)]
    shared = texts[0] & texts[1]
    assert found.matched.num_documents == found.texts.n_both == len(shared)
    assert (found.texts.n_a, found.texts.n_b) == tuple(map(len, texts))
    words = [sum(key[:2] in shared for key in side) for side in (a, b)]
    assert [found.matched.n_a, found.matched.n_b] == words


def test_copies_of_a_text_are_matched_as_often_as_both_have_them(
    of_models: LayerComparison, of_one_run: LayerComparison
) -> None:
    """The 80 texts, one copy more of both verses in A, and of one two more in B."""
    assert (of_models.texts.n_a, of_models.texts.n_b, of_models.texts.n_both) == (102, 113, 82)
    assert of_one_run.texts.n_both == of_one_run.texts.n_a == 102


def test_jaccard_by_chance_is_that_of_independent_sets() -> None:
    dice = np.random.default_rng(0)
    a, b = dice.random(200_000) < 0.3, dice.random(200_000) < 0.2
    found = Overlap.of(a, b)
    assert found.jaccard == (a & b).sum() / (a | b).sum()
    assert found.by_chance == pytest.approx(found.jaccard, rel=0.02)
    nothing = Overlap.of(~a & a, ~b & b)
    assert nothing.jaccard is nothing.by_chance is None


# --- what must not matter, and limits


def test_backwards_is_the_mirror_image(uris: tuple[str, str], of_one_run: LayerComparison) -> None:
    mirror = compare_layers(uris[0], uris[0], "2:1")
    there = {row["word"]: row for row in of_one_run.words.to_pylist()}
    for row in mirror.words.to_pylist():
        other = there.pop(row["word"])
        assert (row["z"], row["n_a"], row["rank_b"]) == (-other["z"], other["n_b"], other["rank_a"])
    assert not there
    assert mirror.matched is not None and of_one_run.matched is not None
    high, other_high = mirror.matched.high, of_one_run.matched.high
    assert (high.n_only_a, high.n_only_b) == (other_high.n_only_b, other_high.n_only_a)


def test_many_words_are_counted_in_parts(
    opened: tuple[Run, Run], of_models: LayerComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    sql = Run.sql

    def noted(run: Run, query: str, *args: Any, **tables: Any) -> Any:
        asked.append(query)
        return sql(run, query, *args, **tables)

    monkeypatch.setattr(Run, "sql", noted)
    monkeypatch.setattr(word_counts, "MAX_GROUPS", 100)
    whole = of_models.a.words
    found = word_counts.word_counts(opened[0], of_models.a.layer)
    assert sum("ranked" in query for query in asked) >= 4
    assert found.words == whole.words
    assert found.classes.sort_by("class") == whole.classes.sort_by("class")
    assert (found.num_folded, found.n_folded) == (whole.num_folded, whole.n_folded)


def test_a_long_word_is_cut(opened: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    cut = expressions.WORD.replace(str(expressions.WORD_CHARS), "3")
    monkeypatch.setattr(word_counts, "WORD", cut)
    words = word_counts.word_counts(opened[0], 1).words["word"].to_pylist()
    assert max(map(len, words)) == 3 and len(words) == len(set(words))


def test_only_what_fits_is_matched_and_the_rest_is_said(
    opened: tuple[Run, Run],
    uris: tuple[str, str],
    of_models: LayerComparison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The documents with the lowest hashes are read, on both sides up to the same hash."""
    hashes = [
        [row[0] for row in run.sql("SELECT text_sha256 FROM documents ORDER BY 1").fetchall()]
        for run in opened
    ]
    monkeypatch.setattr(matched_words, "MAX_DOCUMENTS", 40)
    monkeypatch.setattr(matched_words, "MAX_TOKENS", 500)
    texts, of_a, of_b = matched_words.match_texts(*opened)
    last = min(of_run[39] for of_run in hashes)
    in_a, in_b = ([text for text in of_run if text < last] for of_run in hashes)
    assert texts.is_cut and (texts.n_a, texts.n_b) == (len(in_a), len(in_b))
    both = [
        text for text in sorted(set(in_a)) for _ in range(min(in_a.count(text), in_b.count(text)))
    ]
    assert texts.n_both == len(both)
    sizes = [
        dict(
            run.sql("SELECT text_sha256, any_value(n_tokens) FROM documents GROUP BY 1").fetchall()
        )
        for run in opened
    ]
    fitting = np.cumsum([max(of_run[text] for of_run in sizes) for text in both]) <= 500
    assert 0 < len(of_a) == len(of_b) == fitting.sum() < len(both)
    found = compare_layers(*uris, "2:1")
    said = " ".join(found.notes)
    assert f"Only the {len(in_a)} and {len(in_b)} documents with the lowest hashes" in said
    assert f"in {len(of_a)} of the {len(both)} documents that both have" in said
    assert found.words == of_models.words and found.classes == of_models.classes


def test_a_run_without_offsets_is_matched_with_itself_alone(
    folder: Path, tiny_bert: Path, uris: tuple[str, str], of_one_run: LayerComparison
) -> None:
    config = config_of(
        tiny_bert, folder / "a.jsonl", folder / "store-c", layers="1,2", offsets=False
    )
    with afn_ray.run(config) as run:
        uri = run.uri
    alone = compare_layers(uri, uri, "1:2")
    assert alone.words == of_one_run.words and alone.matched == of_one_run.matched
    apart = compare_layers(uri, uris[0], "1:2")
    assert apart.matched is None and layers.to_json(apart)["matched"] is None
    assert any("not matched at their places: a run has no offsets" in n for n in apart.notes)
    assert apart.words == of_one_run.words
    assert not any("corpora differ" in note for note in apart.notes)
    assert "same places" not in shown(apart)


# --- what is refused, before a query starts


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("2", "--layers is '2'; expected a layer of each run with a colon between, as in 8:4"),
        ("1:2:1", "--layers is '1:2:1'; expected a layer of each run"),
        (":2", "--layers for A, run .*: layers is ''; expected numbers, fractions"),
        ("x:2", "--layers for A, run .*: layers is 'x'; expected numbers"),
        ("1:-1", "--layers for B, run .*: layer -1 does not exist"),
        ("9:1", r"--layers for A, run .*: layer 9 does not exist; the model has .* to 3"),
        ("1,2:1", "--layers names 2 layers of A, '1,2'; expected one"),
        ("all:1", "--layers names 4 layers of A"),
        ("3:1", r"layer 3 of A, run .*, was not recorded; expected .* 1, 2 \(of 3\).*--layers"),
        ("2:0.0", r"layer 0 of B, run .*, was not recorded; expected .* 1, 2 \(of 2\)"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_at_once(
    spec: str, said: str, uris: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "open_run", None)
    with pytest.raises(ConfigError, match=said) as caught:
        compare_layers(*uris, spec)
    assert caught.value.exit_code == 2


def test_a_layer_is_not_compared_with_itself(
    uris: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "open_run", None)
    with pytest.raises(ConfigError, match=r"compares layer 2 of run .* with itself; .* 1, 2, or"):
        compare_layers(uris[0], uris[0], "2:2/3")


def test_a_run_without_words_is_refused(
    folder: Path, uris: tuple[str, str], of_models: LayerComparison
) -> None:
    """A layer of special tokens alone has no Q3."""
    copy = folder / "special"
    shutil.copytree(of_models.b.run.store, copy)
    uri = f"{copy}/runs/{of_models.b.run.id}"
    edit_table(uri, "thresholds", without_q3)
    with pytest.raises(ConfigError, match=r"B, run .*, has no words, only special tokens"):
        compare_layers(uris[0], uri, "1:1")


def without_q3(thresholds: pa.Table) -> pa.Table:
    at = thresholds.schema.get_field_index("q3")
    nothing = pa.nulls(len(thresholds), pa.float32())
    return thresholds.set_column(at, thresholds.field(at), nothing)


# --- what is said and shown


def shown(found: LayerComparison, width: int = 80) -> str:
    file = io.StringIO()
    layer_tables.render(found, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def test_the_reader_is_told_what_differs(
    of_models: LayerComparison, of_one_run: LayerComparison
) -> None:
    assert of_models.notes[0] == of_one_run.notes[0] == layers.ONE_SCALE
    said = " ".join(of_models.notes)
    assert "model: " in said and "shallow" in said and "window_tokens: 64 against 48" in said
    assert "layers:" not in said
    assert "The corpora differ: 82 of 102 documents of A and 113 of B have the same text" in said
    pieces = [side.words.n_tokens / side.words.n for side in (of_models.a, of_models.b)]
    assert f"A word has {pieces[0]:.2f} tokens in A and {pieces[1]:.2f} in B" in said
    words = of_models.a.words
    folded = f"{words.num_folded:,} words ({words.n_folded:,} in all) of A"
    assert f"Words that occur fewer than {LEAST_N} times have no rows" in said and folded in said
    alone = " ".join(of_one_run.notes)
    assert "A and B are two layers of one run." in alone
    for absent in ("measures differ", "corpora differ", "tokens in A and", "frozen"):
        assert absent not in alone
    assert "Only in A, or too rare in B: " in shown(of_models)
    assert "Only in" not in shown(of_one_run)


def test_frozen_thresholds_are_said(of_models: LayerComparison) -> None:
    run = of_models.a.run
    tables = run.info["tables"] | {"frozen": run.info["tables"]["thresholds"]}
    side = replace(of_models.a, run=replace(run, info=run.info | {"tables": tables}))
    found = " ".join(layers._notes(side, of_models.b, of_models.texts, of_models.matched))
    assert "HIGH in A is decided by frozen thresholds, not by its own Q3." in found
    assert "frozen thresholds in B" not in found


def test_the_terminal_shows_every_figure_in_80_columns(found: LayerComparison) -> None:
    text = shown(found)
    uris = {side.run.uri for side in (found.a, found.b)}
    lines = [line for line in text.splitlines() if line.strip() not in uris]
    assert max(map(len, lines)) <= 80
    assert shown(found, 200).split() == text.split()
    assert found.matched is not None
    for rho, overlap in (
        (found.matched.spearman, found.matched.high),
        (found.spearman, found.mostly_high),
    ):
        for value in (rho, overlap.jaccard, overlap.by_chance):
            assert f"{value:.3f}" in text
        assert f"{overlap.n_both:,}" in text and f"{overlap.n_only_b:,}" in text
    for row in compare.moved(found.words).slice(0, layer_tables.WORDS).to_pylist():
        assert f"{row['z']:+.1f}" in text and f"{row['rank_a']:.2f}" in text
    assert " ".join(text.split()).endswith(" ".join(" ".join(found.notes).split()))


def test_a_word_cannot_act_on_the_terminal(of_one_run: LayerComparison) -> None:
    hostile = "\x1b[31m[b]" + "x" * 100
    words = of_one_run.words
    for name, values in (
        ("word", [hostile] * len(words)),
        ("q", [0.0] * len(words)),
        ("status", ["both", "only_a"] * (len(words) // 2) + ["both"] * (len(words) % 2)),
    ):
        at = words.schema.get_field_index(name)
        words = words.set_column(at, words.field(name), pa.array(values))
    text = shown(replace(of_one_run, words=words))
    assert "\x1b" not in text and text.count("\\x1b[31m[b]xx") > layer_tables.WORDS
    assert "x" * layer_tables.WORD_CHARS not in text


def test_json_is_plain_versioned_and_bounded(
    of_models: LayerComparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: Any = layers.to_json(of_models)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["schema_version"] == 1
    assert (body["a"]["layer"], body["a"]["depth"], body["b"]["layer"], body["b"]["depth"]) == (
        2,
        3,
        1,
        2,
    )
    assert body["a"]["words"] == of_models.a.words.n and body["b"]["id"] == of_models.b.run.id
    assert of_models.matched is not None
    assert body["matched"]["high"]["jaccard"] == of_models.matched.high.jaccard
    assert body["movers"] == of_models.in_both.to_pylist() and body["n_words"] == len(
        body["movers"]
    )
    assert body["n_moved"] == sum(row["q"] < compare.SIGNIFICANT for row in body["movers"])
    assert body["n_only_b"] == len(body["only_b"]) > 3
    n = [row["n_b"] for row in body["only_b"]]
    assert n == sorted(n, reverse=True)
    monkeypatch.setattr(compare, "JSON_ROWS", 3)
    short: Any = layers.to_json(of_models)
    for name in ("movers", "only_a", "only_b"):
        assert short[name] == body[name][:3]
    assert short["n_words"] == body["n_words"] and short["n_only_b"] == body["n_only_b"]


def test_the_command_prints_and_writes(
    uris: tuple[str, str],
    of_one_run: LayerComparison,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "found.json"
    with pytest.raises(SystemExit) as end:
        commands.main(["compare", uris[0], uris[0], "--layers", "1:2", "--json", str(file)])
    printed = capsys.readouterr()
    assert end.value.code == 0, printed.err
    assert json.loads(file.read_text("utf-8")) == layers.to_json(of_one_run)
    assert printed.out.split() == shown(of_one_run).split()
    with pytest.raises(SystemExit) as end:
        commands.main(["compare", *uris, "--layers", "3:1"])
    assert end.value.code == 2 and "was not recorded" in capsys.readouterr().err
