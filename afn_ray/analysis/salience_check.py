"""Recount of the salience of types and words from the rows.

It shares no code with the reduce step but the spelling of a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.query.database import Run
from afn_ray.query.expressions import is_high
from afn_ray.reduce.word_sums import WORD_CHARS, normalised

TOKENS_AT_ONCE = 1 << 20
"""Number of tokens whose pairs of a document and a type a query counts."""
RELATIVE = 1e-6
"""Relative tolerance: here sums of squares are subtracted that the reduce never forms."""
Sums = npt.NDArray[np.float64]
"""Documents by type or word, then sums over them of n, h, n n, n h and h h, [6, n].

In a document, n tokens are of the type or word, and h of them are HIGH.
"""


COLUMNS = "n_effective, expected, beyond, beyond_low, beyond_high"


def wrong_type(run: Run, layer: int) -> str:
    """A sentence on the first type whose salience at ``layer`` differs from that of the rows.

    Empty where there is none. What is expected of a type comes from the table.
    """
    ids, *stored = (
        run.sql(
            f"SELECT token_id, {COLUMNS} FROM salience WHERE layer = ? "  # noqa: S608
            "ORDER BY token_id",
            [layer],
        )
        .to_arrow_table()
        .columns
    )
    sums = _sums(run, layer)
    found = np.flatnonzero(sums[0])
    if not np.array_equal(found, ids.to_numpy()):
        return f"it has {len(ids)} types, DuckDB counts {len(found)} in the tokens"
    return _wrong_row(_Rows("token_id", ids.to_pylist(), *_arrays(stored)), sums[:, found])


def wrong_word(run: Run, layer: int) -> str:
    """Description of a wrong word of ``word_vocabulary``; empty if there is none, as in
    ``wrong_type``.
    """
    words, *stored = (
        run.sql(
            f"SELECT word, {COLUMNS} FROM word_vocabulary "  # noqa: S608
            "WHERE layer = ? AND word IS NOT NULL ORDER BY word",
            [layer],
        )
        .to_arrow_table()
        .columns
    )
    names = words.to_pylist()
    sums = _sums_of_words(run, layer, {name: at for at, name in enumerate(names)})
    return _wrong_row(_Rows("word", names, *_arrays(stored)), sums)


class _Rows(NamedTuple):
    """Rows of a table of salience at one layer, [n_rows]."""

    key: str
    names: list[Any]
    n_effective: Sums
    expected: Sums
    beyond: Sums
    low: Sums
    high: Sums


def _arrays(columns: Sequence[pa.ChunkedArray]) -> Iterator[Sums]:
    return (column.to_numpy() for column in columns)


def _wrong_row(stored: _Rows, sums: Sums) -> str:
    """A sentence on the first row that differs from ``sums``, [6, n_rows]; empty without one."""
    if not len(stored.names):
        return ""
    if not sums[0].all():
        missing = stored.names[int(np.argmin(sums[0]))]
        return f"{stored.key} {missing} is in no row of the tokens"
    share = sums[2] / sums[1]
    recounted = {"n_effective": _n_effective(sums), "beyond": share - stored.expected}
    for name, expected in recounted.items():
        got = getattr(stored, name)
        is_close = np.isclose(got, expected, rtol=RELATIVE, atol=1e-12)
        if not is_close.all():
            at = int(np.argmin(is_close))
            return (
                f"{name} of {stored.key} {stored.names[at]} is {got[at]}, its tokens give "
                f"{expected[at]}"
            )
    is_inside = (stored.low <= stored.beyond) & (stored.beyond <= stored.high)
    is_inside &= (stored.expected >= 0) & (stored.expected <= 1)
    if not is_inside.all():
        return f"the interval of {stored.key} {stored.names[int(np.argmin(is_inside))]} is none"
    return ""


def _n_effective(sums: Sums) -> npt.NDArray[np.float64]:
    """Independent tokens, as ``reduce.salience`` defines them, from sums over documents."""
    docs, n, h, nn, nh, hh = sums
    p = h / n
    q = p * (1 - p)
    squares = hh - 2 * p * nh + p * p * nn
    of_pairs = (q * (nn - n)).sum()
    correlation = 0.0
    if of_pairs:
        correlation = min(1.0, max(0.0, (squares - n * q).sum() / of_pairs))
    design = 1 + correlation * (nn - n) / n
    degrees = n * n / nn - 1
    cluster = squares / n**2 * docs / np.maximum(docs - 1, 1)
    variance = (degrees * cluster + 20 * q / n * design) / (degrees + 20)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(q > 0, np.minimum(n, q / variance), n / design)
    of_t = 1 + (1.959963984540054**2 + 1) / (4 * (degrees + 20))  # t over z, to first order
    return np.asarray(found / of_t**2)


def _sums(run: Run, layer: int) -> Sums:
    """``Sums`` of the run's tokens at ``layer``, some documents at a time."""
    ((num_ids,),) = run.sql("SELECT coalesce(max(token_id), 0) + 1 FROM vocabulary").fetchall()
    ((q3,),) = run.sql(
        "SELECT q3 FROM labels WHERE layer = ? AND population = 'tokens'", [layer]
    ).fetchall()
    high = is_high(f"strength_{int(layer)}", "$q3")
    query = f"""
        SELECT token_id, count(*), sum(n), sum(h), sum(n * n), sum(n * h), sum(h * h) FROM (
            SELECT token_id, count(*) AS n, count(*) FILTER ({high}) AS h FROM tokens
            WHERE NOT is_special AND doc >= $first AND doc < $last GROUP BY doc, token_id
        ) GROUP BY token_id
    """  # noqa: S608 - the layer is a number
    found = np.zeros((6, num_ids))
    for first, last in _ranges(run):
        rows = run.sql(query, {"q3": q3, "first": first, "last": last}).to_arrow_table()
        ids, *columns = (column.to_numpy().astype(np.int64) for column in rows.columns)
        for total, column in zip(found, columns, strict=True):
            total[ids] += column
    return found


def _sums_of_words(run: Run, layer: int, index: Mapping[str, int]) -> Sums:
    """``Sums`` of the words in ``index`` at ``layer``, [6, n_words], some documents at a time."""
    ((q3,),) = run.sql(
        "SELECT q3 FROM labels WHERE layer = ? AND population = 'tokens'", [layer]
    ).fetchall()
    high = is_high(f"max_strength_{int(layer)}", "$q3")
    query = f"""
        SELECT doc, left(trim(text, ' '), {WORD_CHARS}) AS form, count(*) AS n,
            count(*) FILTER ({high}) AS h
        FROM words WHERE doc >= $first AND doc < $last GROUP BY ALL
    """  # noqa: S608 - numbers of this package
    found = np.zeros((6, len(index)))
    for first, last in _ranges(run):
        rows = run.sql(query, {"q3": q3, "first": first, "last": last}).to_arrow_table()
        forms = rows["form"].combine_chunks().dictionary_encode()
        number_of = [index.get(normalised(form), -1) for form in forms.dictionary.to_pylist()]
        words = np.array(number_of, np.int64)[forms.indices.to_numpy()]
        pairs = rows["doc"].to_numpy() * len(index) + words  # forms of a word in a document
        is_known = words >= 0
        pairs, at = np.unique(pairs[is_known], return_inverse=True)
        n = np.bincount(at, rows["n"].to_numpy()[is_known], len(pairs))
        h = np.bincount(at, rows["h"].to_numpy()[is_known], len(pairs))
        terms = (np.ones(len(pairs)), n, h, n * n, n * h, h * h)
        for total, term in zip(found, terms, strict=True):
            total += np.bincount(pairs % len(index), term, len(index))
    return found


def _ranges(run: Run) -> Iterator[tuple[int, int]]:
    """First and last document, the latter not included, of shards with about so many tokens."""
    begin = end = size = 0
    shards = run.sql("SELECT doc_offset, n_documents, n_tokens FROM shards ORDER BY ordinal")
    for doc_offset, n_documents, n_tokens in shards.fetchall():
        end = doc_offset + n_documents
        size += n_tokens
        if size >= TOKENS_AT_ONCE:
            yield begin, end
            begin, size = end, 0
    if end > begin:
        yield begin, end
