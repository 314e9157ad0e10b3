"""SQL of the class of each word: that of ``word_vocabulary``, or of its own use if it is rare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pyarrow as pa

from afn_ray.classes import UNTAGGED
from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.query.expressions import WORD, RecordedColumns, ShardFile, rows_of
from afn_ray.reduce import lexicon
from afn_ray.schema import LANGUAGE

CLOSED = "internal.closed_words"
"""Table of closed-class words: ``word``, in lower case, and the run's
``languages`` that have it.
"""
LISTED = "internal.listed"
"""Table of the run's languages that have such words: ``language``."""
_APOSTROPHES = "'\u2019"
"""Apostrophes in a closed-class word, or at an end of it:
``lexicon.normalised`` leaves them out.
"""


def class_tables(language: str, small: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables ``CLOSED`` and ``LISTED`` of a run of ``language``, from its ``small`` tables."""
    names = [language]
    if language == AUTO_LANGUAGE:
        names = small["languages"]["language"].to_pylist()
    listed = list[str]()
    closed = defaultdict[str, list[str]](list)
    for name in names:
        if (words := lexicon.find(name)) is None:
            continue
        listed.append(name)
        for word, entry in words.words.items():
            if not entry.is_closed:
                continue
            for mark in _APOSTROPHES:
                spelled = word.replace("'", mark)
                for form in (spelled, mark + spelled, spelled + mark):
                    if name not in closed[form]:
                        closed[form].append(name)
    languages = pa.list_(pa.string())
    columns = {
        "word": pa.array(list(closed), pa.string()),
        "languages": pa.array(list(closed.values()), languages),
    }
    return {
        CLOSED: pa.table(columns),
        LISTED: pa.table({"language": pa.array(listed, pa.string())}),
    }


def classified(words: str, documents: Sequence[ShardFile], recorded: RecordedColumns) -> str:
    """SQL of the rows of ``words`` with their ``class`` after their ``text``.

    ``documents`` are the files of the run's documents. The column ``of_type`` of ``words`` is the
    spelling of a word that is one type, or NULL. A word that has a row in ``word_vocabulary`` has
    its class. A rarer one has the class of its own use: its tag, or what ``lexicon.classify`` gives
    its lower case by the language of its document.
    """
    spelled = f"SELECT *, coalesce(of_type, {WORD}) AS spelling FROM ({words})"  # noqa: S608
    joins = ""
    name = f"coalesce(w.tag, '{UNTAGGED}')"
    if not recorded.tagged:
        is_listed = f"(SELECT count(*) > 0 FROM {LISTED})"  # noqa: S608
        is_closed = "k.languages IS NOT NULL"
        if recorded.detected:
            joins = f"LEFT JOIN {rows_of(documents)} d ON d.doc = w.doc"
            is_listed = f"d.{LANGUAGE} IN (FROM {LISTED})"
            is_closed = f"list_contains(k.languages, d.{LANGUAGE})"
        name = f"""
            CASE WHEN contains(w.text, '\ufffd') THEN 'fragment'
            WHEN NOT regexp_matches(w.text, '[\\p{{L}}\\p{{N}}]') THEN 'punctuation'
            WHEN NOT regexp_matches(w.text, '\\p{{L}}') THEN 'number'
            WHEN {is_closed} THEN 'function' WHEN {is_listed} THEN 'content' ELSE 'word' END"""
    return f"""
        SELECT w.doc, w.word, w.text, coalesce(k.class, {name}) AS class,
            w.* EXCLUDE (doc, word, text, of_type, spelling)
        FROM ({spelled}) w {joins}
        LEFT JOIN ({_known_words(recorded)}) k ON k.word = w.spelling"""  # noqa: S608


def _known_words(recorded: RecordedColumns) -> str:
    """SQL of the words that have a row and their classes, and of closed-class words.

    Each word is once: a query without classes then has no join, as DuckDB leaves it out.
    """
    closed = f"SELECT word, NULL AS class, languages FROM {CLOSED}"  # noqa: S608
    if recorded.word_table is None:
        return closed
    # The class of a word is the same at all layers.
    rows = (
        "SELECT word, class, NULL AS languages FROM "  # noqa: S608
        f"read_parquet({recorded.word_table}) WHERE layer = {recorded.layers[0]} AND word IS NOT "
        "NULL"
    )
    return (
        f"SELECT word, any_value(class) AS class, any_value(languages) AS languages "  # noqa: S608
        f"FROM ({rows} UNION ALL {closed}) GROUP BY word"
    )
