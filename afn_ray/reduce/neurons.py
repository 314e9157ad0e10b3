"""Counts of neurons and types that occur together, and the neuron tables made from them.

For each token the run records a few neurons with the largest absolute values. A pair is one of
these neurons and the token's type; special tokens are left out. Values are summed as integers in
units of 2^-20, so neither order nor grouping changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.histogram import COMPACT_KEYS, TYPE_BITS, starts
from afn_ray.schema import (
    NEURON_LIST,
    NEURON_TYPES_SCHEMA,
    NEURONS_SCHEMA,
    PAIRS_SCHEMA,
    SPECIAL,
    neurons_column,
)

Floats = npt.NDArray[np.float32]
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
    largest: Floats  # largest value

    @classmethod
    def of(cls, keys: Ints, n: Ints, totals: Ints, largest: Floats) -> Pairs:
        """The sum of pairs that come in any order and may repeat."""
        order = np.argsort(keys, kind="stable")
        keys, n, totals, largest = keys[order], n[order], totals[order], largest[order]
        first = starts(keys)
        if not len(first):
            return cls(keys, n, totals, largest)
        sums = (
            np.add.reduceat(n, first),
            np.add.reduceat(totals, first),
            np.maximum.reduceat(largest, first),
        )
        return cls(keys[first], *sums)

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
        """From rows of ``PAIRS_SCHEMA`` of one layer."""
        keys = (table["neuron"].to_numpy().astype(np.int64) << TYPE_BITS) + table[
            "token_id"
        ].to_numpy()
        return cls(keys, *(table[name].to_numpy() for name in ("n", "total", "largest")))

    def to_table(self, layer: int) -> pa.Table:
        """As rows of ``PAIRS_SCHEMA``; the inverse of ``from_table``."""
        columns = (
            np.full(len(self.keys), layer, np.int16),
            self.keys >> TYPE_BITS,
            self.keys & ((1 << TYPE_BITS) - 1),
            self.n,
            self.totals,
            self.largest,
        )
        arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, PAIRS_SCHEMA, strict=True)]
        return pa.Table.from_arrays(arrays, schema=PAIRS_SCHEMA)


_NONE = np.empty(0, np.int64)
EMPTY = Pairs(_NONE, _NONE, _NONE, np.empty(0, np.float32))
"""Pairs of a shard without tokens."""


class PairSummary:
    """The pairs of one shard, collected chunk by chunk in memory bounded by the distinct pairs."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._parts: dict[int, list[Pairs]] = {k: [] for k in layers}

    def add(
        self, token_ids: npt.NDArray[np.int32], flags: npt.NDArray[np.uint8], lists: pa.Table
    ) -> None:
        """Add tokens; ``lists`` has their neurons in the same order (``token_neurons_schema``)."""
        normal = (flags & SPECIAL) == 0
        for layer, parts in self._parts.items():
            column = lists[neurons_column(layer)].combine_chunks()
            lengths = np.diff(column.offsets.to_numpy())
            here = column.flatten()  # nulls have no elements
            counted = np.repeat(normal, lengths)
            neurons = here.field("neuron").to_numpy().astype(np.int64)[counted]
            values = here.field("value").to_numpy()[counted]
            keys = (neurons << TYPE_BITS) + np.repeat(token_ids.astype(np.int64), lengths)[counted]
            totals = np.rint(values.astype(np.float64) * SCALE).astype(np.int64)
            parts.append(Pairs.of(keys, np.ones(len(keys), np.int64), totals, values))
            if sum(len(p.keys) for p in parts[1:]) > COMPACT_KEYS // len(self._parts):
                parts[:] = [Pairs.merge(parts)]

    def tables(self) -> Iterable[pa.Table]:
        """One table per layer, as in ``PAIRS_SCHEMA``."""
        for layer, parts in self._parts.items():
            yield Pairs.merge(parts).to_table(layer)


def lists_of(
    which: npt.NDArray[np.int32], values: Floats, kept: npt.NDArray[np.bool_] | None = None
) -> pa.Array:
    """The neurons that a model measured at one layer, as a column of ``token_neurons_schema``.

    ``which`` [top, n_tokens] has the numbers of neurons, and ``values`` [top, n_tokens] their
    values, the largest absolute value first. Values of 0 are left out. Tokens that are not ``kept``
    [n_tokens] have null.
    """
    which, values = which.T, values.T
    there = values != 0
    if kept is not None:
        there &= kept[:, None]
    offsets = pa.array(
        np.append(0, np.cumsum(there.sum(axis=1))).astype(np.int32),
        mask=None if kept is None else np.append(~kept, False),
    )
    items = pa.StructArray.from_arrays(
        [pa.array(which[there].astype(np.uint16)), pa.array(values[there])],
        fields=list(NEURON_LIST.value_type),
    )
    return pa.ListArray.from_arrays(offsets, items, type=NEURON_LIST)


def neuron_tables(pairs: Pairs, layer: int, types: Mapping[str, Ints]) -> tuple[pa.Table, pa.Table]:
    """Rows of ``NEURONS_SCHEMA`` without texts, and rows of ``NEURON_TYPES_SCHEMA``.

    ``pairs`` must hold all pairs of each neuron in it. ``types`` has ``token_id``, ascending, and
    ``n``, the number of tokens with recorded neurons.
    """
    if not len(pairs.keys):
        return NEURONS_SCHEMA.empty_table(), NEURON_TYPES_SCHEMA.empty_table()
    neurons, ids = pairs.keys >> TYPE_BITS, pairs.keys & ((1 << TYPE_BITS) - 1)
    n_tokens = int(types["n"].sum())
    of_type = types["n"][np.searchsorted(types["token_id"], ids)]
    first = starts(neurons)
    rows = np.diff(np.append(first, len(neurons)))
    n = np.add.reduceat(pairs.n, first)
    of_neuron = np.repeat(n, rows)
    lift = (pairs.n / of_neuron) / (of_type / n_tokens)
    information = pairs.n / of_neuron * np.log2(lift)
    order = np.lexsort((ids, -information, neurons))
    place = np.arange(len(neurons)) - np.repeat(first, rows)
    top = order[place < TOP_TYPES]
    listed = np.minimum(rows, TOP_TYPES)
    named = NEURONS_SCHEMA.field("types").type
    items = pa.StructArray.from_arrays(
        [
            pa.array(ids[top].astype(np.int32)),
            pa.array([""] * len(top), pa.string()),
            pa.array(pairs.n[top]),
            pa.array(lift[top]),
        ],
        fields=list(named.value_type),
    )
    by_neuron = {
        "layer": np.full(len(first), layer),
        "neuron": neurons[first],
        "n": n,
        "share": n / n_tokens,
        "mean": np.add.reduceat(pairs.totals, first) / SCALE / n,
        "largest": np.maximum.reduceat(pairs.largest, first),
        "n_types": rows,
        "selectivity": np.add.reduceat(information, first),
    }
    columns = [pa.array(by_neuron[f.name], f.type) for f in NEURONS_SCHEMA if f.name in by_neuron]
    offsets = pa.array(np.append(0, np.cumsum(listed)).astype(np.int32))
    columns.append(pa.ListArray.from_arrays(offsets, items, type=named))
    often = pairs.n >= MIN_N
    by_pair = {
        "layer": np.full(int(often.sum()), layer),
        "neuron": neurons[often],
        "token_id": ids[often],
        "n": pairs.n[often],
        "share": (pairs.n / of_type)[often],
        "mean": (pairs.totals / SCALE / pairs.n)[often],
        "largest": pairs.largest[often],
        "lift": lift[often],
    }
    return (
        pa.Table.from_arrays(columns, schema=NEURONS_SCHEMA),
        pa.Table.from_arrays(
            [pa.array(by_pair[f.name], f.type) for f in NEURON_TYPES_SCHEMA],
            schema=NEURON_TYPES_SCHEMA,
        ),
    )


def with_texts(table: pa.Table, readable: Sequence[str]) -> pa.Table:
    """``table`` of ``NEURONS_SCHEMA`` with the texts of its types; ``readable`` is by token id."""
    types = table["types"].combine_chunks()
    types = types.chunk(0) if isinstance(types, pa.ChunkedArray) else types
    items = types.flatten()
    texts = pa.array([readable[i] for i in items.field("token_id").to_pylist()], pa.string())
    kind = NEURONS_SCHEMA.field("types").type
    fields = [texts if f.name == "text" else items.field(f.name) for f in kind.value_type]
    named = pa.StructArray.from_arrays(fields, fields=list(kind.value_type))
    offsets = pa.array(
        np.append(0, np.cumsum(pc.list_value_length(types).to_numpy())).astype(np.int32)
    )
    at = table.column_names.index("types")
    return table.set_column(
        at, NEURONS_SCHEMA.field("types"), pa.ListArray.from_arrays(offsets, named, type=kind)
    )
