"""One rule says which spellings are the same word: in Python, in SQL and in every question."""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

import test_query
from afn_ray.query.database import Run, open_run
from afn_ray.query.expressions import lower_word
from afn_ray.reduce.word_sums import normalised
from afn_ray.schema import WORD_START, documents_schema, strength_column, strengths, tokens_schema
from test_query import LAYERS, viewed, write_run

CHARACTERS = (
    "\u03a3\u03a3\u03a3\u03c3\u03c2\u0391\u03b1\u03ac.'\u2019\u2018:\u00b7 -aI1\u0130\u0307"
)
CHARACTERS += "\u0301\u0327\u00e9\u200d\u02b0\ud55c\u1112\u1161\u11ab"
"""Letters whose lower case or composition depends on their neighbours, and such neighbours."""


def test_sql_spells_a_word_as_python_does() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices(CHARACTERS, k=rng.randint(0, 8))) for _ in range(50_000)]
    texts += [chr(point) for point in range(1, 0x110000) if not 0xD800 <= point < 0xE000]
    given = pa.table({"text": texts})
    with duckdb.connect() as connection:
        connection.register("given", given)
        rows = connection.sql(f"SELECT text, {lower_word('text')} FROM given").fetchall()
    assert len(rows) == len(texts)
    assert [row for row in rows if row[1] != normalised(row[0])] == []


NFD = {word: unicodedata.normalize("NFD", word) for word in ("caf\u00e9", "\ud55c\uad6d", "\u1ec7")}
SPELLINGS = {
    "caf\u00e9": ["caf\u00e9", "CAF\u00c9", NFD["caf\u00e9"], NFD["caf\u00e9"].upper()],
    "cafe": ["cafe", "Cafe"],
    "\u1ec7": ["\u1ec7", NFD["\u1ec7"], "\u00ea\u0323"],
    "\ud55c\uad6d": ["\ud55c\uad6d", NFD["\ud55c\uad6d"]],
    "\ud55c": ["\ud55c"],
    "\u03bf\u03b4\u03cc\u03c2": ["\u03bf\u03b4\u03cc\u03c2", "\u039f\u0394\u038c\u03a3"],
    "\u03bf\u03b4\u03cc\u03c3\u03b1": ["\u039f\u0394\u038c\u03a3\u0391"],
    "istanbul": ["\u0130stanbul", "istanbul", "ISTANBUL"],
}
"""Spellings of some words."""
PIECES = [
    "[CLS]",
    "caf",
    "CAF",
    "\u0130",
    "stanbul",
    "\ud55c",
    "\u03bf\u03b4\u03cc",
    "\u039f\u0394\u038c\u03a3",
]
PIECES += sorted({c for forms in SPELLINGS.values() for form in forms for c in form} - {*PIECES})
"""Types; those of a letter make a token of each mark and of each letter of a Hangul syllable."""


def _cut(form: str) -> list[int]:
    ids = []
    while form:
        piece = max((p for p in PIECES if form.startswith(p)), key=len)
        ids.append(PIECES.index(piece))
        form = form[len(piece) :]
    return ids


@pytest.fixture(params=["pieces", "surfaces"])
def run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """A document of all spellings, which tokens spell, or surfaces."""
    monkeypatch.setattr(test_query, "PIECES", PIECES)
    monkeypatch.setattr(test_query, "TEXTS", ["", *PIECES[1:]])
    tokens: list[dict[str, Any]] = []
    for form in (form for forms in SPELLINGS.values() for form in forms):
        ids = _cut(form) if request.param == "pieces" else [1, 2]
        for nth, token_id in enumerate(ids):
            tokens.append(
                {
                    "doc": 0,
                    "position": len(tokens),
                    "token_id": token_id,
                    "flags": 0 if nth else WORD_START,
                    "surface": form if request.param == "surfaces" and not nth else None,
                    "start": 0,
                    "end": 0,
                    **{strength_column(k): 1.0 for k in LAYERS},
                }
            )
    document: dict[str, Any] = dict.fromkeys(viewed(documents_schema(strengths(LAYERS))).names, 0)
    document |= {"doc_id": "0", "source": "a.txt", "n_tokens": len(tokens), "status": "ok"}
    document |= {"text_sha256": hashlib.sha256(b"").digest()}
    documents = pa.Table.from_pylist([document], viewed(documents_schema(strengths(LAYERS))))
    table = pa.Table.from_pylist(tokens, viewed(tokens_schema(strengths(LAYERS), True)))
    write_run(str(tmp_path), [(table, documents)], LAYERS)
    with open_run(str(tmp_path)) as opened:
        yield opened


@pytest.mark.parametrize("word", SPELLINGS)
def test_kwic_finds_a_word_in_all_its_spellings_and_no_other(run: Run, word: str) -> None:
    for asked in SPELLINGS[word]:
        found = run.sql("SELECT text FROM kwic($word, 1) ORDER BY position", {"word": asked})
        assert [text for (text,) in found.fetchall()] == SPELLINGS[word], ascii(asked)
