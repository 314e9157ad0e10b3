"""Mean hidden states of frequent types, and how the second moment of a type's states splits.

For the states x of one type at one layer, Q = mean |x|^2 is the sum of M = |mean x|^2 and V = mean
|x - mean x|^2 (Yamagiwa and Shimodaira 2025). Q comes from the recorded strengths, M from sums of
states in whole units, and V is their difference. Strengths are rounded by at most 2^-16, so V is
exact to 2^-15 of Q; where the difference is negative, V is 0.

Sums are integers, so shards add up to the same in any order. A shard's file is read once, and a sum
takes 16 bytes of memory for each layer, type and dimension, whatever the corpus.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.errors import ShardError
from afn_ray.reduce.encoded import decode_table, encode_table
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.stats import Float64s, Ints
from afn_ray.reduce.tasks import Tasks, in_groups, merge_parts
from afn_ray.schema import MEAN_VECTORS_SCHEMA, MOMENTS_SCHEMA, STATE_UNITS, VECTORS_SCHEMA
from afn_ray.store import parquet
from afn_ray.store.layout import VECTORS

READ_BYTES = 64 << 20
"""Bytes of sums that one call reads, all layers together, as stored."""
MOST_TOTAL = 1 << 62
"""Largest magnitude of a shard's total before another chunk is added.

A chunk has about 2^18 tokens with states under ``STATE_LIMIT``, so its total fits beside it.
"""
LOW_BITS = 32
"""Bits of a total that the sum of shards adds apart from the others, so that nothing overflows."""
LOW_MASK = (1 << LOW_BITS) - 1


class StateSums:
    """Sums of hidden states by type and layer, of a chunk or a shard.

    Several threads may add. Memory is 8 bytes for each layer, type and dimension.
    """

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._n: Ints = np.empty(0, np.int64)
        self._totals: Ints = np.empty((0, 0, 0), np.int64)

    @property
    def nbytes(self) -> int:
        """Memory of the sums, in bytes."""
        return self._totals.nbytes

    def add(self, num_types: int, slots: Ints, n: Ints, totals: Ints) -> None:
        """Add the tokens of the types ``slots``, of ``num_types`` recorded ones.

        ``n`` [n_slots] counts them, and ``totals`` [n_layers, n_slots, hidden_size] has their sums.
        Raises ``ShardError`` where a total does not fit.
        """
        with self._adding:
            if not len(self._n):
                self._n = np.zeros(num_types, np.int64)
                self._totals = np.zeros((len(totals), num_types, totals.shape[2]), np.int64)
            before = self._totals[:, slots]  # those of other types do not change
            if max(before.max(initial=0), -before.min(initial=0)) > MOST_TOTAL:
                raise ShardError(
                    "the hidden states of a type add up to more than "
                    f"{MOST_TOTAL // STATE_UNITS:,} in one shard; give a smaller --shard-bytes, or "
                    "leave --mean-vectors out"
                )
            self._n[slots] += n
            self._totals[:, slots] = before + totals

    def add_all(self, other: StateSums) -> None:
        """Add the sums of ``other``."""
        if len(other._n):
            slots = np.flatnonzero(other._n)
            self.add(len(other._n), slots, other._n[slots], other._totals[:, slots])

    def tables(self, layers: Sequence[int], types: Sequence[int]) -> Iterator[pa.Table]:
        """One table per layer, as in ``VECTORS_SCHEMA``, of the ``types`` that occur."""
        slots = np.flatnonzero(self._n)
        ids = np.array(types, np.int32)[slots]
        for layer, totals in zip(layers, self._totals, strict=False):
            columns = {
                "layer": pa.array(np.full(len(slots), layer, np.int16)),
                "token_id": pa.array(ids),
                "n": pa.array(self._n[slots]),
                "totals": _lists(totals[slots], VECTORS_SCHEMA.field("totals").type),
            }
            yield pa.table(columns, schema=VECTORS_SCHEMA)


def _lists(rows: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """The ``rows`` [n, length] as lists."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    values = pa.array(np.ascontiguousarray(rows).ravel())
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


@dataclass(frozen=True, slots=True)
class StateTotals:
    """Sums of the hidden states of each recorded type at one layer, over shards.

    A total is ``high`` times 2^32 plus ``low``, in units of 1 / ``STATE_UNITS``.
    """

    n: Ints  # [n_types]
    high: Ints  # [n_types, hidden_size]
    low: Ints  # same shape, not negative

    @classmethod
    def of_table(cls, table: pa.Table, types: Sequence[int], hidden_size: int) -> StateTotals:
        """Read from rows of ``VECTORS_SCHEMA`` of one layer and one shard."""
        n = np.zeros(len(types), np.int64)
        totals = np.zeros((len(types), hidden_size), np.int64)
        slots = np.searchsorted(types, table["token_id"].to_numpy())
        n[slots] = table["n"].to_numpy()
        totals[slots] = flat(table["totals"]).reshape(-1, hidden_size)
        return cls(n, totals >> LOW_BITS, totals & LOW_MASK)

    def plus(self, other: StateTotals) -> StateTotals:
        """The sum of both; one without a token has no dimensions."""
        if not other.high.size:
            return self
        if not self.high.size:
            return other
        return StateTotals(self.n + other.n, self.high + other.high, self.low + other.low)

    def means(self) -> Float64s:
        """The mean state of each type that occurs, [n_found, hidden_size]."""
        found = self.n > 0
        high = self.high[found] + (self.low[found] >> LOW_BITS)
        low = self.low[found] & LOW_MASK
        totals = high.astype(np.float64) * (1 << LOW_BITS) + low
        return np.asarray(totals / STATE_UNITS / self.n[found][:, None])

    def encoded(self) -> bytes:
        """Form for transfer between processes."""
        return encode_table(
            pa.table({"n": self.n, "high": _cells(self.high), "low": _cells(self.low)})
        )

    @classmethod
    def decoded(cls, data: bytes) -> StateTotals:
        """The inverse of ``encoded``."""
        table = decode_table(data)
        n = table["n"].to_numpy()
        high, low = (flat(table[name]).reshape(len(n), -1) for name in ("high", "low"))
        return cls(n, high, low)


def _cells(rows: Ints) -> pa.Array:
    return _lists(rows, pa.list_(pa.int64()))


def flat(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """The values of all lists of a column without nulls, one after the other."""
    values: npt.NDArray[Any] = column.combine_chunks().flatten().to_numpy()
    return values


def vector_tables(
    tasks: Tasks,
    shards: CommittedShards,
    layers: Sequence[int],
    types: Sequence[int],
    vocabulary: pa.Table,
) -> dict[str, pa.Table]:
    """The tables ``moments`` and ``mean_vectors`` of the recorded ``types``, ascending."""
    moments = [MOMENTS_SCHEMA.empty_table()]
    vectors = [MEAN_VECTORS_SCHEMA.empty_table()]
    groups = in_groups(shards.files(VECTORS), lambda f: f.num_bytes, READ_BYTES)
    leaves = (
        tasks.submit(_read, some, layers, types, num_results=len(layers))
        for some in filter(None, groups)
    )
    totals = merge_parts(tasks, leaves, _merge, None)
    for layer, total in zip(layers, totals, strict=True):
        here = vocabulary.filter(pc.equal(vocabulary["layer"], layer))
        states = StateTotals.decoded(tasks.result(total))
        of_moments, of_vectors = _of_layer(states, layer, np.array(types), here)
        moments.append(of_moments)
        vectors.append(of_vectors)
    return {"moments": pa.concat_tables(moments), "mean_vectors": pa.concat_tables(vectors)}


def _read(
    files: Sequence[CommittedFile], layers: Sequence[int], types: Sequence[int]
) -> list[bytes]:
    """The encoded sum of ``files`` at each of ``layers``, one file in memory at a time."""
    none = np.empty((len(types), 0), np.int64)
    totals = [StateTotals(np.zeros(len(types), np.int64), none, none) for _ in layers]
    for file in files:
        of_shard = parquet.open_file(file.read())
        for at in range(of_shard.num_row_groups):  # none without a token of the types
            table = of_shard.read_row_group(at, use_threads=False)
            sums = StateTotals.of_table(table, types, len(table["totals"][0]))
            place = layers.index(table["layer"][0].as_py())
            totals[place] = totals[place].plus(sums)
    return [total.encoded() for total in totals]


def _merge(_: None, *parts: bytes) -> list[bytes]:
    """The sum of ``parts``, decoded one at a time."""
    total = StateTotals.decoded(parts[0])
    for part in parts[1:]:
        total = total.plus(StateTotals.decoded(part))
    return [total.encoded()]


def _of_layer(
    sums: StateTotals, layer: int, types: Ints, vocabulary: pa.Table
) -> tuple[pa.Table, pa.Table]:
    """Rows of both tables at ``layer``, of the ``types`` that occur."""
    found = np.flatnonzero(sums.n)
    means = sums.means()
    ids = types[found]
    is_normal = pc.not_equal(vocabulary["class"], "special")
    normal = vocabulary.filter(is_normal)
    rows = normal.take(np.searchsorted(normal["token_id"].to_numpy(), ids))
    mean = rows["mean"].to_numpy()
    sd = rows["sd"].to_numpy()
    n = pa.array(sums.n[found])
    columns: dict[str, object] = {
        "layer": pa.array(np.full(len(ids), layer, np.int16)),
        **{name: rows[name] for name in ("token_id", "token", "text", "class")},
        "n": n,
        **split(mean**2 + sd**2, (means**2).sum(axis=1)),
    }
    moments = pa.table({name: columns[name] for name in MOMENTS_SCHEMA.names}, MOMENTS_SCHEMA)
    kind = MEAN_VECTORS_SCHEMA.field("mean").type
    lists = _lists(means.astype(np.float32), kind)
    arrays = {"layer": columns["layer"], "token_id": rows["token_id"], "n": n, "mean": lists}
    return moments, pa.table(arrays, MEAN_VECTORS_SCHEMA)


def split(second_moment: Float64s, squared_mean: Float64s) -> Mapping[str, pa.Array]:
    """The columns of ``MOMENTS_SCHEMA`` that split ``second_moment``, both [n_types]."""
    variance = np.maximum(second_moment - squared_mean, 0)
    has_length = second_moment > 0
    share = np.divide(squared_mean, second_moment, where=has_length, out=np.zeros(len(has_length)))
    return {
        "second_moment": pa.array(second_moment),
        "squared_mean": pa.array(squared_mean),
        "variance": pa.array(variance),
        "share_mean": pa.array(np.minimum(share, 1), mask=~has_length),
    }
