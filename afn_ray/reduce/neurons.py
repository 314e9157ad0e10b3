"""Counts of neurons and types that occur together, and the neuron tables made from them.

For each token the run records a few neurons with the largest absolute values. A pair is one of
these neurons and the token's type; special tokens are left out. Values are summed as integers in
units of 2^-20, so neither order nor grouping changes a bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.histogram import COMPACT_KEYS, TYPE_BITS, TYPE_MASK, starts
from afn_ray.schema import (
    NEURON_LIST,
    NEURON_TYPES_SCHEMA,
    NEURONS_SCHEMA,
    PAIRS_SCHEMA,
    SPECIAL,
    neurons_column,
)

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SCALE = 1 << 20
"""Units per 1.0 in which values are summed."""
LIMIT = float(1 << 24)
"""Largest absolute value of a neuron.

Sums of half a million such values fit into 64 bits, and no model comes near the limit.
"""
TOP_TYPES = 10
"""Number of types that the table of neurons names for each neuron."""
MIN_N = 5
"""Smallest number of tokens for a pair to have a row in ``neuron_types``.

Rarer pairs count in the statistics of their neuron.
"""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Distinct pairs of a neuron and a type at one layer, in order of their keys; all [n_pairs]."""

    keys: Ints  # neuron << TYPE_BITS, plus the token id
    n: Ints  # number of tokens
    totals: Ints  # sum of the values, in units of 1 / SCALE
    largest: Float32s  # largest value

    @classmethod
    def of(cls, keys: Ints, n: Ints, totals: Ints, largest: Float32s) -> Pairs:
        """The sum of pairs that come in any order and may repeat."""
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        n = n[order]
        totals = totals[order]
        largest = largest[order]
        first = starts(keys)
        if not len(first):
            return cls(keys, n, totals, largest)
        return cls(
            keys[first],
            np.add.reduceat(n, first),
            np.add.reduceat(totals, first),
            np.maximum.reduceat(largest, first),
        )

    @classmethod
    def merge(cls, parts: Iterable[Pairs]) -> Pairs:
        """The sum of ``parts``."""
        found = [p for p in parts if len(p.keys)] or [EMPTY]
        if len(found) == 1:
            return found[0]
        return cls.of(
            np.concatenate([p.keys for p in found]),
            np.concatenate([p.n for p in found]),
            np.concatenate([p.totals for p in found]),
            np.concatenate([p.largest for p in found]),
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Pairs:
        """Read from rows of ``PAIRS_SCHEMA`` of one layer."""
        neurons = table["neuron"].to_numpy().astype(np.int64)
        token_ids = table["token_id"].to_numpy()
        return cls(
            (neurons << TYPE_BITS) + token_ids,
            table["n"].to_numpy(),
            table["total"].to_numpy(),
            table["largest"].to_numpy(),
        )

    def to_table(self, layer: int) -> pa.Table:
        """Rows of ``PAIRS_SCHEMA``; the inverse of ``from_table``."""
        columns = {
            "layer": np.full(len(self.keys), layer, np.int16),
            "neuron": self.neurons,
            "token_id": self.token_ids,
            "n": self.n,
            "total": self.totals,
            "largest": self.largest,
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in PAIRS_SCHEMA]
        return pa.Table.from_arrays(arrays, schema=PAIRS_SCHEMA)

    @property
    def neurons(self) -> Ints:
        return self.keys >> TYPE_BITS

    @property
    def token_ids(self) -> Ints:
        return self.keys & TYPE_MASK


_NONE = np.empty(0, np.int64)
EMPTY = Pairs(_NONE, _NONE, _NONE, np.empty(0, np.float32))
"""Pairs of a shard without tokens."""


class PairSummary:
    """The pairs of one shard, collected chunk by chunk in memory bounded by the distinct pairs.

    Several threads may add chunks.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._adding = threading.Lock()
        self._parts: dict[int, list[Pairs]] = {k: [] for k in layers}

    def add(
        self, token_ids: npt.NDArray[np.int32], flags: npt.NDArray[np.uint8], lists: pa.Table
    ) -> None:
        """Add tokens; ``lists`` has their neurons in the same order (``token_neurons_schema``)."""
        is_normal = (flags & SPECIAL) == 0
        most_unmerged = COMPACT_KEYS // len(self._parts)
        for layer, parts in self._parts.items():
            column = lists[neurons_column(layer)].combine_chunks()
            lengths = np.diff(column.offsets.to_numpy())
            items = column.flatten()  # nulls have no elements
            counted = np.repeat(is_normal, lengths)
            types = np.repeat(token_ids.astype(np.int64), lengths)[counted]
            neurons = items.field("neuron").to_numpy().astype(np.int64)[counted]
            values = items.field("value").to_numpy()[counted]
            keys = (neurons << TYPE_BITS) + types
            once = np.ones(len(keys), np.int64)
            totals = np.rint(values.astype(np.float64) * SCALE).astype(np.int64)
            pairs = Pairs.of(keys, once, totals, values)
            with self._adding:
                parts.append(pairs)
                unmerged = sum(len(part.keys) for part in parts[1:])
                if unmerged > most_unmerged:
                    parts[:] = [Pairs.merge(parts)]

    def tables(self) -> Iterable[pa.Table]:
        """One table per layer, as in ``PAIRS_SCHEMA``."""
        for layer, parts in self._parts.items():
            yield Pairs.merge(parts).to_table(layer)


def lists_of(
    which: npt.NDArray[np.int32], values: Float32s, kept: npt.NDArray[np.bool_] | None = None
) -> pa.Array:
    """The neurons that a model measured at one layer, as a column of ``token_neurons_schema``.

    ``which`` [top, n_tokens] has the numbers of neurons, and ``values`` [top, n_tokens] their
    values, the largest absolute value first. Values of 0 are left out. Tokens that are not ``kept``
    [n_tokens] have null.
    """
    which, values = which.T, values.T  # both [n_tokens, top]
    is_listed = values != 0
    is_null = None
    if kept is not None:
        is_listed &= kept[:, None]
        is_null = np.append(~kept, False)  # one for each offset
    neurons = which[is_listed].astype(np.uint16)
    items = pa.StructArray.from_arrays(
        [pa.array(neurons), pa.array(values[is_listed])], fields=list(NEURON_LIST.value_type)
    )
    offsets = pa.array(_offsets(is_listed.sum(axis=1)), mask=is_null)
    return pa.ListArray.from_arrays(offsets, items, type=NEURON_LIST)


def _offsets(lengths: Ints) -> npt.NDArray[np.int32]:
    """Offsets of lists of the given ``lengths`` [n]; int32 [n + 1]."""
    return np.append(0, np.cumsum(lengths)).astype(np.int32)


def neuron_tables(pairs: Pairs, layer: int, types: Mapping[str, Ints]) -> tuple[pa.Table, pa.Table]:
    """Rows of ``NEURONS_SCHEMA`` without texts, and rows of ``NEURON_TYPES_SCHEMA``.

    ``pairs`` must hold all pairs of each neuron in it. ``types`` has ``token_id``, ascending, and
    ``n``, the number of tokens with recorded neurons.
    """
    if not len(pairs.keys):
        return NEURONS_SCHEMA.empty_table(), NEURON_TYPES_SCHEMA.empty_table()
    shares = _Shares.of(pairs, types)
    return _neurons_table(pairs, layer, shares), _neuron_types_table(pairs, layer, shares)


class _Shares(NamedTuple):
    """Frequency of each pair and each neuron, in tokens with recorded neurons."""

    neurons: Ints  # of the pairs, [n_pairs]
    token_ids: Ints  # of the pairs, [n_pairs]
    n_tokens: int  # all these tokens
    of_type: Ints  # those of the pair's type, [n_pairs]
    first: Ints  # index of the first pair of each neuron, [n_neurons]
    n_pairs: Ints  # number of pairs of each neuron, [n_neurons]
    of_neuron: Ints  # tokens with the neuron, [n_neurons]
    share: Float64s  # of the neuron's tokens that are of the pair's type, [n_pairs]
    lift: Float64s  # that share over the type's share of all tokens, [n_pairs]

    @classmethod
    def of(cls, pairs: Pairs, types: Mapping[str, Ints]) -> _Shares:
        neurons, token_ids = pairs.neurons, pairs.token_ids
        n_tokens = int(types["n"].sum())
        of_type = types["n"][np.searchsorted(types["token_id"], token_ids)]
        first = starts(neurons)
        n_pairs = np.diff(np.append(first, len(neurons)))
        of_neuron = np.add.reduceat(pairs.n, first)
        share = pairs.n / np.repeat(of_neuron, n_pairs)
        lift = share / (of_type / n_tokens)
        return cls(neurons, token_ids, n_tokens, of_type, first, n_pairs, of_neuron, share, lift)


def _neurons_table(pairs: Pairs, layer: int, shares: _Shares) -> pa.Table:
    """Rows of ``NEURONS_SCHEMA`` without texts."""
    first, n = shares.first, shares.of_neuron
    information = shares.share * np.log2(shares.lift)
    columns = {
        "layer": np.full(len(first), layer),
        "neuron": shares.neurons[first],
        "n": n,
        "share": n / shares.n_tokens,
        "mean": np.add.reduceat(pairs.totals, first) / SCALE / n,
        "largest": np.maximum.reduceat(pairs.largest, first),
        "n_types": shares.n_pairs,
        "selectivity": np.add.reduceat(information, first),
        "types": _top_types(pairs, shares, information),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in NEURONS_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=NEURONS_SCHEMA)


def _top_types(pairs: Pairs, shares: _Shares, information: Float64s) -> pa.ListArray:
    """Column ``types``: of each neuron, the types with most ``information`` [n_pairs]."""
    order = np.lexsort((shares.token_ids, -information, shares.neurons))
    place = np.arange(len(order)) - np.repeat(shares.first, shares.n_pairs)
    top = order[place < TOP_TYPES]
    kind = NEURONS_SCHEMA.field("types").type
    items = pa.StructArray.from_arrays(
        [
            pa.array(shares.token_ids[top].astype(np.int32)),
            pa.array([""] * len(top), pa.string()),
            pa.array(pairs.n[top]),
            pa.array(shares.lift[top]),
        ],
        fields=list(kind.value_type),
    )
    offsets = pa.array(_offsets(np.minimum(shares.n_pairs, TOP_TYPES)))
    return pa.ListArray.from_arrays(offsets, items, type=kind)


def _neuron_types_table(pairs: Pairs, layer: int, shares: _Shares) -> pa.Table:
    """Rows of ``NEURON_TYPES_SCHEMA``: the pairs of at least ``MIN_N`` tokens."""
    often = pairs.n >= MIN_N
    n = pairs.n[often]
    columns = {
        "layer": np.full(len(n), layer),
        "neuron": shares.neurons[often],
        "token_id": shares.token_ids[often],
        "n": n,
        "share": n / shares.of_type[often],
        "mean": pairs.totals[often] / SCALE / n,
        "largest": pairs.largest[often],
        "lift": shares.lift[often],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in NEURON_TYPES_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=NEURON_TYPES_SCHEMA)


def with_texts(table: pa.Table, readable: Sequence[str]) -> pa.Table:
    """``table`` of ``NEURONS_SCHEMA`` with the texts of its types; ``readable`` is by token id."""
    field = NEURONS_SCHEMA.field("types")
    types = table["types"].combine_chunks()
    types = types.chunk(0) if isinstance(types, pa.ChunkedArray) else types
    items = types.flatten()
    texts = [readable[token_id] for token_id in items.field("token_id").to_pylist()]
    members = list(field.type.value_type)
    columns = {member.name: items.field(member.name) for member in members}
    columns["text"] = pa.array(texts, pa.string())
    named = pa.StructArray.from_arrays(list(columns.values()), fields=members)
    lengths = pc.list_value_length(types).to_numpy()
    offsets = pa.array(_offsets(lengths))
    lists = pa.ListArray.from_arrays(offsets, named, type=field.type)
    return table.set_column(table.column_names.index("types"), field, lists)
