"""Choose the rows of tokens that a shard keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from afn_ray import samples, token_rows
from afn_ray.corpus.selection import id_of
from afn_ray.corpus_values import Document
from afn_ray.reduce.stats import is_high
from afn_ray.runs.values import Float32s
from afn_ray.schema import SPECIAL, STRENGTH, Series
from afn_ray.tokens.encode import Encoded

Bools = npt.NDArray[np.bool_]
RowFilter = Callable[[Sequence[Document], Encoded, Mapping[Series, Float32s]], Bools]
"""True if the row of each token of some documents is kept, [n_tokens]."""


def row_filter(record: str) -> RowFilter | None:
    """The filter of a shard's ``record``; None: all rows are kept."""
    if not record:
        return None
    if least := token_rows.thresholds_of(record):
        return lambda documents, encoded, by_series: _are_high(least, encoded, by_series)
    kind, _, share_text = record.partition(":")
    if kind == token_rows.SAMPLE:
        share = samples.share_of(share_text)

        def of_sample(
            documents: Sequence[Document], encoded: Encoded, by_series: Mapping[Series, Float32s]
        ) -> Bools:
            drawn = [samples.is_drawn(id_of(d), share, token_rows.SALT) for d in documents]
            return np.asarray(np.array(drawn, bool)[encoded.docs])

        return of_sample
    return lambda documents, encoded, by_series: np.zeros(len(encoded.docs), bool)


def _are_high(
    least: Mapping[int, float], encoded: Encoded, by_series: Mapping[Series, Float32s]
) -> Bools:
    """True if each token is HIGH at one of the layers of ``least``; special ones are not."""
    found = np.zeros(len(encoded.docs), bool)
    for layer, q3 in least.items():
        found |= is_high(by_series[Series(STRENGTH, layer)], q3)
    return np.asarray(found & (encoded.flags & SPECIAL == 0))
