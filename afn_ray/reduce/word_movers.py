"""Words that moved between two runs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.drift import MoverSide, tests_of_shares
from afn_ray.reduce.word_tables import LEAST_N
from afn_ray.schema import WORD_MOVERS_SCHEMA

NO_WORDS = WORD_MOVERS_SCHEMA.empty_table()
"""The words of runs of which one has no table of them."""


TIMES_LEAST = 2
"""Multiple of ``rare_below`` that the n of a new or vanished word reaches.

A rarer word may occur nearly as often in the run that has no row of it.
"""


def rare_below(*words: pa.Table) -> int:
    """Number of occurrences below which a word has no row in one of these ``word_vocabulary``."""
    return max((pc.max(table["least_n"]).as_py() or LEAST_N for table in words), default=LEAST_N)


def word_movers_table(
    layer: int, words_a: pa.Table, words_b: pa.Table, *, ranks_only: bool
) -> pa.Table:
    """The layer's rows of ``WORD_MOVERS_SCHEMA``, from two runs' rows of ``word_vocabulary``."""
    least_n = TIMES_LEAST * rare_below(words_a, words_b)
    named = [words.filter(pc.is_valid(words["word"])) for words in (words_a, words_b)]
    chunks = [*named[0]["word"].chunks, *named[1]["word"].chunks]
    words = pc.unique(pa.chunked_array(chunks, pa.string()))
    words = words.take(pc.sort_indices(words))
    keys = np.arange(len(words))
    sides = []
    for of_run in named:
        number = pc.index_in(of_run["word"], words).to_numpy()
        sides.append(MoverSide.of(of_run, number.astype(np.int64), keys))
    a, b = sides
    both = a.has_type & b.has_type
    status = np.where(both, "both", np.where(b.has_type, "new", "vanished"))
    z, p, q = tests_of_shares(a, b, both)
    # Texts and classes are those of B, or of A for a word that only A has.
    row_of_word = np.where(b.has_type, b.row, len(named[1]) + a.row)
    described = pa.concat_tables([named[1], named[0]]).take(pa.array(row_of_word))
    columns = {
        "layer": np.full(len(keys), layer),
        "word": words,
        "text": described["text"].combine_chunks(),
        "class": described["class"].combine_chunks(),
        "status": status,
        **a.columns("a", ranks_only=ranks_only),
        **b.columns("b", ranks_only=ranks_only),
        "z": pa.array(z, mask=~both),
        "p": pa.array(p, mask=~both),
        "q": pa.array(q, mask=~both),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in WORD_MOVERS_SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=WORD_MOVERS_SCHEMA)
    order = np.lexsort((keys, -(a.n + b.n), -np.abs(z), q, status))
    is_sure = both | (a.n + b.n >= least_n)
    return table.take(pa.array(order[is_sure[order]]))
