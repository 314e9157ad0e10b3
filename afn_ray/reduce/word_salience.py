"""Salience of words beyond their frequency: that of types, with words in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.controls import NUM_PLACES, ControlSums, frequency_bins
from afn_ray.reduce.histogram import Histogram
from afn_ray.reduce.salience import ControlCells, salience_columns
from afn_ray.reduce.stats import Ints
from afn_ray.reduce.word_sums import PLACE_BITS, WordSums

COLUMNS = ("expected", "beyond", "beyond_low", "beyond_high", "n_effective")
"""Columns of ``WORD_VOCABULARY_SCHEMA`` that are computed here."""


class CountedWords(NamedTuple):
    """Counts from which the salience of the words of one part is computed."""

    words: pa.StringArray  # those with rows, ascending
    sums: ControlSums  # of these, by their index in ``words``, without ``high``
    cells: ControlCells  # of all words, those without rows too


def counted_words(sums: WordSums, named: WordSums) -> CountedWords:
    """Built from the ``sums`` of all words of a part, and those of the words with rows."""
    bins = frequency_bins(sums.n)
    cells = ControlCells(
        Histogram.of(sums.n),
        _by_bin(sums.places, bins),
        tuple(_by_bin(layer.high_places, bins) for layer in sums.by_layer),
    )
    words, places = np.divmod(named.places.keys, 1 << PLACE_BITS)
    of_named = ControlSums(
        Histogram(words * NUM_PLACES + places, named.places.counts),
        named.pairs,
        (),
        tuple(layer.mixed_pairs for layer in named.by_layer),
        tuple(layer.high_pairs for layer in named.by_layer),
    )
    return CountedWords(named.words, of_named, cells)


def _by_bin(places: Histogram, bins: Ints) -> Histogram:
    """``places`` of words by the bin of their frequency instead, as keys of ``ControlCells``."""
    words, place = np.divmod(places.keys, 1 << PLACE_BITS)
    return Histogram.of(bins[words] * NUM_PLACES + place, places.counts)


def with_salience(layers: Sequence[int], rows: pa.Table, *parts: CountedWords) -> list[pa.Table]:
    """``rows`` of ``WORD_VOCABULARY_SCHEMA`` with the ``COLUMNS`` of the words in ``parts``.

    The rows of every layer have the same words, in one order; their numbers are places in it.
    """
    found = {name: np.full(len(rows), np.nan) for name in COLUMNS}
    is_word = pc.is_valid(rows["word"]).to_numpy()
    of_layer = rows["layer"].to_numpy()
    sums, cells = None, None
    for at, layer in enumerate(layers):
        places = np.flatnonzero(is_word & (of_layer == layer))
        here = rows.take(pa.array(places))
        if not len(here):
            break
        if sums is None or cells is None:
            sums, cells = _joined(parts, here["word"].combine_chunks())
        units = {name: here[name].to_numpy() for name in ("n", "n_docs", "n_high")}
        units["number"] = np.arange(len(here))
        for name, values in salience_columns(units, cells, sums, at).items():
            found[name][places] = values
    for name, values in found.items():
        index = rows.schema.get_field_index(name)
        column = pa.array(values, mask=np.isnan(values))
        rows = rows.set_column(index, rows.schema.field(index), column)
    return [rows]


def _joined(
    parts: Sequence[CountedWords], words: pa.StringArray
) -> tuple[ControlSums, ControlCells]:
    """The sums of all words with rows, by their index in ``words``, and the cells of all words."""
    moved: list[list[Histogram]] = []
    for part in parts:
        index = pc.index_in(part.words, value_set=words).to_numpy().astype(np.int64)
        tokens, *others = part.sums.flat()
        of_words, places = np.divmod(tokens.keys, NUM_PLACES)
        numbered = Histogram.of(index[of_words] * NUM_PLACES + places, tokens.counts)
        moved.append([numbered])
        for other in others:
            moved[-1].append(Histogram.of(index[other.keys], other.counts))
    tokens, pairs, *of_layers = (Histogram.merge(one) for one in zip(*moved, strict=True))
    half = len(of_layers) // 2
    sums = ControlSums(tokens, pairs, (), tuple(of_layers[:half]), tuple(of_layers[half:]))
    by_layer = zip(*(part.cells.high for part in parts), strict=True)
    cells = ControlCells(
        Histogram.merge(part.cells.sizes for part in parts),
        Histogram.merge(part.cells.tokens for part in parts),
        tuple(Histogram.merge(high) for high in by_layer),
    )
    return sums, cells
