"""Check of sums of hidden states: of a shard against its tokens, of a run against its shards.

States are not recorded, so the sums themselves cannot be counted again. Their tokens can, and no
mean is longer than the strengths allow. Sums of a run are made anew in floats, shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.mean_texts import from_text
from afn_ray.measure import Measure
from afn_ray.query.database import Run
from afn_ray.reduce.mean_vectors import flat
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.stats import Float64s, Ints
from afn_ray.schema import SPECIAL, STATE_UNITS, strength_column
from afn_ray.store import parquet, records
from afn_ray.store.layout import VECTORS
from afn_ray.store.shard_tables import ShardTable

ROUNDING = 2.0**-14
"""Relative difference of a mean square of strengths, which are rounded, and one of states."""
DISTANCE = "strength_centred_mean"
"""Column of the signal ``centred_mean``."""
RELATIVE = 1e-6
"""Relative difference of means in float32 and float64, against the length of the mean."""


def wrong_sums(tables: Mapping[str, ShardTable], measure: Measure | None) -> str:
    """Description of a fault in a shard's sums of states; empty if there is none."""
    file = tables[VECTORS]
    seen = {file.read_row_group(at)["layer"][0].as_py() for at in range(file.num_row_groups)}
    layers = list(measure.layers) if measure is not None else sorted(seen)
    if file.num_row_groups and file.num_row_groups != len(layers):
        return f"it has {file.num_row_groups} row groups, expected one for each of {layers}"
    recorded = None if measure is None else np.array(measure.mean_types, np.int64)
    n, squares = _of_tokens(tables["tokens"], layers)
    types = np.flatnonzero(n)
    if recorded is not None:
        known = recorded[recorded < len(n)]
        types = known[n[known] > 0]
    for at, layer in enumerate(layers[: file.num_row_groups]):
        table = file.read_row_group(at)
        ids = table["token_id"].to_numpy()
        if table["layer"].unique().to_pylist() != [layer]:
            return f"row group {at} is not of layer {layer} alone"
        if recorded is not None and not np.array_equal(ids, types):
            return f"layer {layer}: its types are not those of its tokens that the measure names"
        if not np.array_equal(table["n"].to_numpy(), n[ids]):
            return f"layer {layer}: n is not the number of tokens of each type"
        longest = squares[at][ids] / n[ids]
        if message := _too_long(table, longest):
            return f"layer {layer}: {message}"
    if len(types) and recorded is not None and not file.num_row_groups:
        return "it has no row, but its tokens are of types that the measure names"
    return ""


def _of_tokens(file: ShardTable, layers: list[int]) -> tuple[Ints, Float64s]:
    """Number of normal tokens of each type, and their squared strengths, [n_layers, n_types]."""
    n = np.zeros(1, np.int64)
    squares = np.zeros((len(layers), 1))
    columns = ["token_id", "flags", *map(strength_column, layers)]
    for batch in file.batches(records.BATCH_ROWS, columns):
        is_normal = (batch["flags"].to_numpy() & SPECIAL) == 0
        ids = batch["token_id"].to_numpy()[is_normal]
        size = max(len(n), int(ids.max(initial=0)) + 1)
        n = np.pad(n, (0, size - len(n))) + np.bincount(ids, minlength=size)
        squares = np.pad(squares, ((0, 0), (0, size - squares.shape[1])))
        for at, layer in enumerate(layers):
            values = batch[strength_column(layer)].to_numpy()[is_normal].astype(np.float64)
            squares[at] += np.bincount(ids, values**2, size)
    return n, squares


def _too_long(table: pa.Table, longest: Float64s) -> str:
    """The first mean whose squared length is over ``longest`` [n_types]; empty if none is."""
    lengths = pc.list_value_length(table["totals"]).unique().to_pylist()
    if len(lengths) != 1:
        return f"its totals have {lengths} numbers"
    means = _means(table)
    squared = (means**2).sum(axis=1)
    # Rounding to whole units adds up to half a unit to each dimension.
    slack = np.sqrt(longest) + np.sqrt(means.shape[1]) / STATE_UNITS
    is_long = squared > slack**2 * (1 + ROUNDING)
    if not is_long.any():
        return ""
    at = int(np.argmax(is_long))
    return (
        f"the mean state of token_id {table['token_id'][at]} has squared length {squared[at]:g}, "
        f"but its strengths allow at most {longest[at]:g}"
    )


def _means(table: pa.Table) -> Float64s:
    """The mean state of each row of ``table``, in the schema of a shard's sums."""
    totals: npt.NDArray[Any] = flat(table["totals"]).reshape(len(table), -1)
    return np.asarray(totals / STATE_UNITS / table["n"].to_numpy()[:, None])


def impossible(tokens: ShardTable, measure: Measure) -> str:
    """The first distance from a mean state that no state can have; empty if there is none.

    A token's state of strength s is between abs(s - m) and s + m away from a mean of length m.
    """
    series = [s for s in measure.series if s.signal == DISTANCE]
    if not series or not measure.means:
        return ""
    lengths = {}
    for layer, text in zip(measure.layers, measure.means, strict=True):
        mean = from_text(text).astype(np.float64)
        lengths[layer] = float(np.linalg.norm(mean))
    first = 0
    names: list[str] = []
    for one in series:
        names += [strength_column(one.layer), one.name]
    for batch in tokens.batches(records.BATCH_ROWS, names):
        for one in series:
            m = lengths[one.layer]
            strength, distance = (
                batch[name].to_numpy().astype(np.float64)
                for name in (strength_column(one.layer), one.name)
            )
            slack = ROUNDING * (strength + m)
            is_far = (distance > strength + m + slack) | (distance < np.abs(strength - m) - slack)
            if is_far.any():
                row = int(np.argmax(is_far))
                return (
                    f"row {first + row}: {one.name} is {distance[row]:g}, which a strength of "
                    f"{strength[row]:g} and a mean of length {m:g} exclude"
                )
        first += len(batch)
    return ""


def wrong_means(
    run: Run, shards: CommittedShards, measure: Measure, stored: Mapping[str, pa.Table]
) -> Iterator[tuple[str, str]]:
    """Names of the run's ``stored`` tables of moments that are wrong, and what is wrong."""
    for layer in measure.layers:
        wrong = run.sql(moments_sql(layer)).fetchall()
        if wrong:
            message = f"layer {layer}: {len(wrong)} rows are not what DuckDB makes of the tokens"
            yield "moments", f"{message}; the first is of token_id {wrong[0][0]}"
        at_layer = {
            name: stored[name].filter(pc.equal(stored[name]["layer"], layer))
            for name in ("moments", "mean_vectors")
        }
        means, ids = _summed(shards, layer)
        lengths = (means**2).sum(axis=1)
        vectors = at_layer["mean_vectors"]
        if not np.array_equal(vectors["token_id"].to_numpy(), ids):
            yield "mean_vectors", f"layer {layer}: its types are not those of its shards"
            continue
        found = flat(vectors["mean"]).reshape(means.shape).astype(np.float64)
        off = np.abs(found - means).max(axis=1, initial=0) > RELATIVE * np.sqrt(lengths)
        if off.any():
            first = ids[int(np.argmax(off))]
            yield "mean_vectors", f"layer {layer}: token_id {first} has not the mean of its shards"
        squared = at_layer["moments"]["squared_mean"].to_numpy()
        if len(squared) != len(lengths) or not np.allclose(squared, lengths, RELATIVE, 0):
            yield "moments", f"layer {layer}: squared_mean is not that of its shards' sums"


def _summed(shards: CommittedShards, layer: int) -> tuple[Float64s, Ints]:
    """Means of the types at ``layer`` over all shards, added as floats, and the types' ids."""
    totals: dict[int, Any] = {}
    n: dict[int, int] = {}
    for file in shards.files(VECTORS):
        table = parquet.read(file.read(), filters=[("layer", "=", layer)], use_threads=False)
        if not len(table):
            continue
        sums = _means(table) * table["n"].to_numpy()[:, None]
        ids_here = table["token_id"].to_pylist()
        n_here = table["n"].to_pylist()
        for token_id, num, total in zip(ids_here, n_here, sums, strict=True):
            totals[token_id] = totals.get(token_id, 0) + total
            n[token_id] = n.get(token_id, 0) + num
    ids = sorted(totals)
    means = np.array([totals[i] / n[i] for i in ids]).reshape(len(ids), -1 if ids else 0)
    return means, np.array(ids, np.int64)


def moments_sql(layer: int) -> str:
    """SQL of the rows of ``moments`` at a layer that differ from what the tokens give."""
    strength = strength_column(layer)
    return f"""
        WITH counted AS (
            SELECT token_id, count(*) AS n, avg({strength}::DOUBLE * {strength}::DOUBLE) AS q
            FROM tokens WHERE NOT is_special GROUP BY token_id
        )
        SELECT token_id FROM moments m LEFT JOIN counted c USING (token_id)
        WHERE layer = {layer} AND (
            c.n IS DISTINCT FROM m.n OR abs(second_moment - q) > 1e-9 * q
            OR abs(greatest(0, second_moment - squared_mean) - variance) > 1e-12 * q
            OR abs(least(1, squared_mean / second_moment) - share_mean) > 1e-12
        ) ORDER BY token_id
    """  # noqa: S608
