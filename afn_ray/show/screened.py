"""The strangest documents of a run, for the report page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from afn_ray.query import database
from afn_ray.schema import SCREENED_SCHEMA
from afn_ray.store import manifest

MAX_SCREENED = 20
MAX_SCREENED_TOKENS = 240
MAX_SCREENED_CHARS = 2_000
"""Largest length of one screened document, in characters; one token may be that long."""


@dataclass(frozen=True, slots=True)
class ScreenedDocument:
    """A screened document and its beginning, in pieces of one quartile.

    Quartile 0 is a special token or text between tokens.
    """

    row: dict[str, Any]  # of the screened table
    pieces: tuple[tuple[str, int], ...]
    is_cut: bool

    @property
    def kept(self) -> list[tuple[str, str]]:
        """Kept columns of the document that have a value, as text."""
        values = [(name, self.row[name]) for name in self.row if name not in SCREENED_SCHEMA.names]
        return [(name, str(value)) for name, value in values if value is not None]


def screened_documents(
    run: manifest.RunFolder, tables: database.Run
) -> list[ScreenedDocument] | None:
    """The strangest documents, their tokens by quartile; None for a run that was not screened."""
    if "screened" not in run.info["tables"]:
        return None
    screened = manifest.read_table(run, "screened").sort_by("rank")
    rows = screened.slice(0, MAX_SCREENED).to_pylist()
    has_offsets = "start" in tables.tokens().columns
    places = 'start, "end"' if has_offsets else "NULL, NULL"
    tokens: dict[int, list[tuple[Any, ...]]] = {r["doc"]: [] for r in rows}
    for layer in {r["layer"] for r in rows}:  # one layer, or none
        ask = f"""
            SELECT doc, text, surface, is_word_start, {places},
          coalesce(quartile_{int(layer)}, 0) FROM tokens
            WHERE doc IN (SELECT unnest($docs)) AND position <= $last AND NOT is_special
        ORDER BY doc, position
        """  # noqa: S608 - our own text and a number
        for doc, *token in tables.sql(
            ask, {"docs": list(tokens), "last": MAX_SCREENED_TOKENS}
        ).fetchall():
            tokens[doc].append(tuple(token))
    return [
        bounded(r, (pieces_by_offset if has_offsets else pieces_by_word)(tokens[r["doc"]]))
        for r in rows
    ]


def pieces_by_offset(tokens: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, int]]:
    """Tokens by their offsets, as written in the text where the surface of their word is known.

    Characters that tokens share appear once.
    """
    words: list[list[tuple[Any, ...]]] = []
    for token in tokens:
        if token[2] or not words:
            words.append([])
        words[-1].append(token)
    cursor = 0
    for word in words:
        surface = word[0][1]
        first = word[0][3]
        origin = (
            first if surface is None else max(first, word[-1][4] - len(surface))
        )  # the surface has no leading space
        if cursor and first > cursor:
            yield " ", 0
        for text, _, _, start, end, quartile in word:
            if (
                body := text
                if surface is None
                else surface[max(cursor, start, origin) - origin : end - origin]
            ):
                yield body, quartile
            cursor = end


def pieces_by_word(tokens: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, int]]:
    """Tokens without offsets, as in the vocabulary, with a space before each word."""
    for at, (text, _, is_word_start, _, _, quartile) in enumerate(tokens):
        if at and is_word_start:
            yield " ", 0
        yield text, quartile


def bounded(row: dict[str, Any], pieces: Iterable[tuple[str, int]]) -> ScreenedDocument:
    """``row`` with its ``pieces``, cut to ``MAX_SCREENED_CHARS``."""
    left, shown = MAX_SCREENED_CHARS, []
    for text, quartile in pieces:
        shown.append((text[:left], quartile))
        left -= len(text)
        if left <= 0:
            break
    return ScreenedDocument(row, tuple(shown), left <= 0 or row["n_tokens"] > MAX_SCREENED_TOKENS)
