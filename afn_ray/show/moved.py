"""Words or types that moved between two runs, each in its context before and now, coloured by
quartile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import token_rows
from afn_ray.errors import QueryError, StoreError
from afn_ray.query import database
from afn_ray.query.expressions import WORD
from afn_ray.reduce import compare
from afn_ray.reduce.compare import Comparison
from afn_ray.show.figures import cut
from afn_ray.show.screened import pieces_by_offset, pieces_by_word
from afn_ray.store.manifest import RunFolder

MOST_OF = {"both": 4, "new": 2, "vanished": 2}
"""Largest number of types that moved, are new, or vanished."""
MOST_EXAMPLES = 2
"""Largest number of examples of a type in each run."""
CONTEXT_TOKENS = 10
"""Number of tokens on each side of a type."""
MAX_PIECE_CHARS = 60
"""Longest piece of an example, in characters; one token may be a whole document."""
IS_IT = 8
"""Number that is added to the quartile of the token which an example is of."""
TokenPlace = tuple[int, int]
"""Document and position of a token."""


class TextPiece(NamedTuple):
    """Text of one token, or between tokens."""

    text: str
    quartile: int  # 0: it has none
    is_it: bool  # whether the example is of this token


@dataclass(frozen=True, slots=True)
class Example:
    """One occurrence of a type with the tokens around it."""

    source: str
    doc: int
    pieces: tuple[TextPiece, ...]
    is_cut_before: bool
    is_cut_after: bool


@dataclass(frozen=True, slots=True)
class MovedType:
    """A type, how it moved, and its examples in each run."""

    text: str
    status: str  # "both", "new" or "vanished"
    what: str
    before: tuple[Example, ...]
    now: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """The types that moved most at a layer."""

    layer: int
    types: tuple[MovedType, ...]
    unknown: str | None  # why examples are lacking; None: nothing failed


def moved_types(comparison: Comparison, layer: int, timeout_s: float) -> Moved:
    """The types of ``comparison`` that moved most at ``layer``, in their contexts.

    Those in both runs come first, the surest first, then the most frequent new and vanished ones.
    Examples are the occurrences whose strength is closest to the type's median in their run. Each
    run's tokens are read twice. A run that cannot be read, or not within ``timeout_s`` seconds a
    query, leaves its examples out.
    """
    rows = _most_moved(comparison.movers_to_read, layer)
    key = "word" if comparison.kind == "word" else "token"
    examples: dict[str, Mapping[str, Sequence[Example]]] = {}
    failures = []
    for side, run in (("a", comparison.a), ("b", comparison.b)):
        names = [row[key] for row in rows if row[f"n_{side}"]]
        try:
            examples[side] = _examples(run, key, names, layer, timeout_s) if names else {}
        except (QueryError, StoreError) as error:
            examples[side] = {}
            failures.append(str(error))
    types = []
    for row in rows:
        text = cut(row["text"].strip())
        of_a, of_b = (tuple(examples[side].get(row[key], ())) for side in "ab")
        types.append(MovedType(text, row["status"], _what(row), of_a, of_b))
    return Moved(layer, tuple(types), "; ".join(failures) or None)


def _most_moved(movers: pa.Table, layer: int) -> list[dict[str, Any]]:
    """The whole words of ``MOVERS_SCHEMA`` rows that moved most at ``layer``."""
    here = compare.whole_words(movers.filter(pc.equal(movers["layer"], layer)))
    rows: list[dict[str, Any]] = []
    for status, most in MOST_OF.items():
        some = here.filter(pc.equal(here["status"], status))
        some = compare.moved(some) if status == "both" else some
        rows += some.slice(0, most).to_pylist()
    return rows


def _what(row: Mapping[str, Any]) -> str:
    """Move of a type in words, from its row of ``MOVERS_SCHEMA``."""
    before, now = (
        f"{row[f'share_high_{run}']:.1%} of {row[f'n_{run}']:,}" if row[f"n_{run}"] else ""
        for run in "ab"
    )
    if row["status"] == "both":
        return f"HIGH {before} before, {now} now"
    return f"new: HIGH {now}" if now else f"vanished: HIGH {before} before"


# --- examples


def _examples(
    run: RunFolder, key: str, names: Sequence[str], layer: int, timeout_s: float
) -> dict[str, list[Example]]:
    """Examples of each of ``names``: words, or pieces of the vocabulary if ``key`` is token.

    A run that does not keep the rows of all tokens has none.
    """
    if not token_rows.is_complete(token_rows.record_of(run.info["config"])):
        return {}
    with database.open_run(run.uri, timeout_s=timeout_s) as tables:
        find = _places_of_words if key == "word" else _places_of_types
        places = find(tables, names, int(layer))
        return _read(tables, places, layer) if places else {}


def _places_of_words(
    tables: database.Run, words: Sequence[str], layer: int
) -> dict[TokenPlace, _Found]:
    """The first tokens of the examples of ``words``."""
    query = f"""
        SELECT here.word, min({{
            'far': abs(max_strength_{layer} - q2), 'doc': doc, 'position': position,
              'size': n_tokens
        }}, {MOST_EXAMPLES})
        FROM (SELECT * REPLACE ({WORD} AS word) FROM words) here JOIN (
            SELECT word, q2 FROM word_vocabulary WHERE layer = {layer}
              AND word IN (SELECT unnest($names))
        ) USING (word) GROUP BY here.word"""  # noqa: S608
    return _found(tables, query, words)


def _places_of_types(
    tables: database.Run, pieces: Sequence[str], layer: int
) -> dict[TokenPlace, _Found]:
    """The tokens of the examples of ``pieces``."""
    query = f"""
        SELECT stored.token, min({{
            'far': abs(strength_{layer} - q2), 'doc': doc, 'position': position, 'size': 1
        }}, {MOST_EXAMPLES})
        FROM tokens JOIN vocabulary stored USING (token_id)
        WHERE NOT is_special AND stored.layer = {layer} AND stored.class <> 'special'
            AND stored.token IN (SELECT unnest($names)) GROUP BY stored.token"""  # noqa: S608
    return _found(tables, query, pieces)


class _Found(NamedTuple):
    """Word or type that begins at a place."""

    name: str
    size: int  # tokens


def _found(tables: database.Run, query: str, names: Sequence[str]) -> dict[TokenPlace, _Found]:
    """The places that ``query`` finds for ``names``."""
    found = {}
    for name, nearest in tables.sql(query, {"names": list(names)}).fetchall():
        for one in nearest:
            size = min(one["size"], CONTEXT_TOKENS)  # a word may be a whole document
            found[one["doc"], one["position"]] = _Found(name, size)
    return found


def _read(
    tables: database.Run, places: Mapping[TokenPlace, _Found], layer: int
) -> dict[str, list[Example]]:
    """The examples at ``places``, by name, with the tokens around them."""
    has_offsets = "start" in tables.tokens().columns
    offsets = 'start, "end"' if has_offsets else "NULL, NULL"
    far = CONTEXT_TOKENS + 1  # one more, to see whether the document goes on
    near = " OR ".join(
        f"doc = {int(doc)} AND position BETWEEN {int(at) - far} AND {int(at) + size - 1 + far}"
        for (doc, at), (_, size) in places.items()
    )
    docs = sorted({doc for doc, _ in places})
    query = f"""
        SELECT doc, position, text, surface, is_word_start, {offsets},
            coalesce(quartile_{int(layer)}, 0)
        FROM tokens WHERE doc IN (SELECT unnest($docs)) AND ({near}) AND NOT is_special
        ORDER BY doc, position"""  # noqa: S608 - numbers of ours
    rows = tables.sql(query, {"docs": docs}).fetchall()
    query = "SELECT doc, source FROM documents WHERE doc IN (SELECT unnest($docs))"
    sources = dict(tables.sql(query, {"docs": docs}).fetchall())
    found: dict[str, list[Example]] = {}
    for (doc, at), (name, size) in sorted(places.items()):
        around = [
            (max(at - position, position - (at + size - 1), 0), position < at, token)
            for of_doc, position, *token in rows
            if of_doc == doc and at - far <= position < at + size + far
        ]
        tokens = [
            (*token[:-1], token[-1] + IS_IT * (distance == 0))
            for distance, _, token in around
            if distance < far
        ]
        pieces = (pieces_by_offset if has_offsets else pieces_by_word)(tokens)
        is_cut_before = around[0][:2] == (far, True)
        is_cut_after = around[-1][:2] == (far, False)
        example = Example(
            sources.get(doc, ""), doc, tuple(_marked(pieces)), is_cut_before, is_cut_after
        )
        found.setdefault(name, []).append(example)
    return found


def _marked(pieces: Iterator[tuple[str, int]]) -> Iterator[TextPiece]:
    """``pieces`` of bounded length, with the token of the example marked."""
    for text, number in pieces:
        shown = text if len(text) <= MAX_PIECE_CHARS else text[: MAX_PIECE_CHARS - 1] + "…"
        is_it, quartile = divmod(number, IS_IT)
        yield TextPiece(shown, quartile, bool(is_it))
