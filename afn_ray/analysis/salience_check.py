"""Recount of the ``salience`` table from the rows; shares no code with the reduce step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from afn_ray.query.database import Run
from afn_ray.query.expressions import is_high

TOKENS_AT_ONCE = 1 << 20
"""Number of tokens whose pairs of a document and a type a query counts."""
RELATIVE = 1e-6
"""Relative tolerance: here sums of squares are subtracted that the reduce never forms."""
Sums = npt.NDArray[np.float64]
"""By token id: documents, then sums over them of n, h, n n, n h and h h, [6, n_ids].

In a document, n tokens are of the type and h of them are HIGH.
"""


def wrong_type(run: Run, layer: int) -> str:
    """A sentence on the first type whose salience at ``layer`` differs from that of the rows.

    Empty where there is none. What is expected of a type comes from the table.
    """
    stored = run.sql(
        "SELECT token_id, n_effective, expected, beyond, beyond_low, beyond_high FROM salience "
        "WHERE layer = ? ORDER BY token_id",
        [layer],
    ).to_arrow_table()
    ids, n_effective, expected, beyond, low, high = (c.to_numpy() for c in stored.columns)
    sums = _sums(run, layer)
    found = np.flatnonzero(sums[0])
    if not np.array_equal(found, ids):
        return f"it has {len(ids)} types, DuckDB counts {len(found)} in the tokens"
    if not len(ids):
        return ""
    share = sums[2, ids] / sums[1, ids]
    recounted = {"n_effective": _n_effective(sums[:, ids]), "beyond": share - expected}
    for name, got in (("n_effective", n_effective), ("beyond", beyond)):
        is_close = np.isclose(got, recounted[name], rtol=RELATIVE, atol=1e-12)
        if not is_close.all():
            at = int(np.argmin(is_close))
            return (
                f"{name} of token_id {ids[at]} is {got[at]}, its tokens give {recounted[name][at]}"
            )
    is_inside = (low <= beyond) & (beyond <= high) & (expected > 0) & (expected < 1)
    if not is_inside.all():
        return f"the interval of token_id {ids[int(np.argmin(is_inside))]} is none"
    return ""


def _n_effective(sums: Sums) -> npt.NDArray[np.float64]:
    """Independent tokens, as ``reduce.salience`` defines them, from sums over documents."""
    docs, n, h, nn, nh, hh = sums
    p = h / n
    q = p * (1 - p)
    squares = hh - 2 * p * nh + p * p * nn
    of_pairs = (q * (nn - n)).sum()
    correlation = min(1, max(0, (squares - n * q).sum() / of_pairs)) if of_pairs else 0
    design = 1 + correlation * (nn - n) / n
    degrees = n * n / nn - 1
    cluster = squares / n**2 * docs / np.maximum(docs - 1, 1)
    variance = (degrees * cluster + 20 * q / n * design) / (degrees + 20)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(q > 0, np.minimum(n, q / variance), n / design)
    return np.asarray(found / (1 + (1.959963984540054**2 + 1) / (4 * (degrees + 20))) ** 2)


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
