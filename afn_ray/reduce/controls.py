"""Counts by what strength is controlled for: how frequent a type is, its position, the document's
length.

The scan of ``reduce.screen`` counts the normal tokens in *cells*, and how often a type occurs twice
in one document. All counts are whole numbers, so sums of shards are exact in any order. Whoever
counts other units than types, such as words, gives their numbers as types.

Positions and lengths are cut at powers of two: a position p (from 0) is in the bin floor(log2(p +
1)), a document of n tokens in floor(log2(n)), and what is ``LONGEST`` or more in the last bin. A
position is never in a higher bin than its document, so there are ``NUM_PLACES`` pairs of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from afn_ray.reduce.counters import KeyCounter
from afn_ray.reduce.histogram import Histogram, starts
from afn_ray.reduce.stats import Int32s, Ints, is_high

LONGEST = 512
"""Smallest position (counted from 1) and length that share a bin with all larger ones."""
NUM_BINS = LONGEST.bit_length()
"""Number of bins of positions, and of lengths."""
NUM_PLACES = NUM_BINS * (NUM_BINS + 1) // 2
"""Number of pairs of a position and a length; pair (p, l) has the index l (l + 1) / 2 + p."""
STEPS = 8
"""Bins of frequencies for each doubling."""
OCTAVES = 50
"""Doublings that have bins of frequencies; more tokens than 2^50 share the last one."""
_LIMITS = np.unique([round(2 ** (step / STEPS)) for step in range(OCTAVES * STEPS)])
"""Smallest frequency of each bin; whole numbers, so that the bins are the same on any machine."""
_BIN_OF = np.array([min(n, LONGEST).bit_length() - 1 for n in range(1, LONGEST + 1)])
"""Bin of each position from 0 to ``LONGEST`` - 1, and of each length less 1."""
KEY_BITS = 62
"""Bits of a key that sorts tokens by document and type and says where each is HIGH."""


class Controls(NamedTuple):
    """Rule by which a scan counts tokens by their controls."""

    q3: tuple[float, ...]  # of the thresholds that label, by layer; infinite without tokens
    bins: Ints  # of the frequency of each type, by token id


def frequency_bins(n: Ints) -> Ints:
    """Bin of each frequency in ``n`` [n_types], which is 0 or more; 0 is in the bin of 1."""
    return np.maximum(np.searchsorted(_LIMITS, n, side="right") - 1, 0)


def bins_of_places() -> tuple[Ints, Ints]:
    """Bin of the position and of the length of each place, both [NUM_PLACES]."""
    length, position = np.tril_indices(NUM_BINS)
    return position, length


def places_of(positions: Ints, lengths: Ints) -> Ints:
    """Place of each token, from its position from 0 and the tokens of its document, both [n]."""
    length = _BIN_OF[np.minimum(lengths, LONGEST) - 1]
    position = _BIN_OF[np.minimum(positions, LONGEST - 1)]
    return np.asarray(length * (length + 1) // 2 + position)


class ControlSums(NamedTuple):
    """Counts of normal tokens, as histograms that add up.

    n is the number of tokens of a type in a document, and h the number of these that are HIGH.
    """

    tokens: Histogram  # keys: type * NUM_PLACES + place
    pairs: Histogram  # n (n - 1) by type, over all documents
    high: tuple[Histogram, ...]  # by layer; keys: bin of the frequency * NUM_PLACES + place
    mixed_pairs: tuple[Histogram, ...]  # h (n - 1) by type, for each layer
    high_pairs: tuple[Histogram, ...]  # h (h - 1) by type, for each layer

    def flat(self) -> tuple[Histogram, ...]:
        """All histograms, in one order, to be added one by one."""
        return (self.tokens, self.pairs, *self.high, *self.mixed_pairs, *self.high_pairs)

    @classmethod
    def of_flat(cls, sums: Sequence[Histogram]) -> ControlSums:
        """The inverse of ``flat``."""
        tokens, pairs, *of_layers = sums
        num = len(of_layers) // 3
        by_kind = (tuple(of_layers[at * num : (at + 1) * num]) for at in range(3))
        return cls(tokens, pairs, *by_kind)


class Repeated(NamedTuple):
    """Units that occur twice or more in a document, a row for each document, [n_rows]."""

    units: Ints
    n: Ints  # occurrences in the document
    high: list[Ints]  # HIGH ones of these, by layer


def repeated(docs: Int32s, units: Ints | Int32s, high: Sequence[npt.NDArray[np.bool_]]) -> Repeated:
    """Units that occur again, in whole documents; ``high`` says by layer which are HIGH, all [n].

    There must be one. A sort does for several layers, since a key ends in their bits.
    """
    num_units = int(units.max()) + 1
    pairs = (docs - int(docs[0])).astype(np.int64) * num_units + units
    largest = int(pairs.max())
    num_bits = max(1, KEY_BITS - largest.bit_length())
    found: list[Ints] = []
    for begin in range(0, len(high), num_bits):
        some = high[begin : begin + num_bits]
        keys = pairs
        for which in some:
            keys = keys << 1 | which
        keys = np.sort(keys, kind="stable")  # nearly in order already
        groups = keys >> len(some)
        first = starts(groups)
        n = np.diff(first, append=len(keys))
        again = np.flatnonzero(n > 1)
        for at in reversed(range(len(some))):
            found.append(np.add.reduceat(keys >> at & 1, first)[again])
    return Repeated(groups[first[again]] % num_units, n[again], found)


class ControlCounter:
    """Counts of ``ControlSums``, added batch by batch."""

    def __init__(self, controls: Controls) -> None:
        num_types = len(controls.bins)
        layers = range(len(controls.q3))
        self._controls, self._num_types = controls, num_types
        num_bins = int(controls.bins.max(initial=0)) + 1
        self._tokens = KeyCounter(num_types * NUM_PLACES)
        self._pairs = KeyCounter(num_types)
        self._high = [KeyCounter(num_bins * NUM_PLACES) for _ in layers]
        self._mixed_pairs = [KeyCounter(num_types) for _ in layers]
        self._high_pairs = [KeyCounter(num_types) for _ in layers]

    def add(
        self,
        docs: Int32s,
        types: Int32s,
        places: Ints,
        strengths: Sequence[npt.NDArray[np.float32]],
    ) -> None:
        """Count normal tokens of whole documents: all arrays are [n], ``strengths`` by layer."""
        if not len(docs):
            return
        self._tokens.add(types.astype(np.int64) * NUM_PLACES + places)
        high = [is_high(s, q3) for s, q3 in zip(strengths, self._controls.q3, strict=True)]
        cells = self._controls.bins[types] * NUM_PLACES + places
        for counts, which in zip(self._high, high, strict=True):
            counts.add(cells[which])
        again = repeated(docs, types, high)
        self._pairs.add(again.units, again.n * (again.n - 1))
        for at, h in enumerate(again.high):
            self._mixed_pairs[at].add(again.units, h * (again.n - 1))
            self._high_pairs[at].add(again.units, h * (h - 1))

    def sums(self) -> ControlSums:
        """The counts so far."""
        return ControlSums(
            self._tokens.sums(),
            self._pairs.sums(),
            tuple(counts.sums() for counts in self._high),
            tuple(counts.sums() for counts in self._mixed_pairs),
            tuple(counts.sums() for counts in self._high_pairs),
        )
