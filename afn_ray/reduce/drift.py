"""Tables of a comparison: drift of strengths, of classes and of types."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.distances import (
    benjamini_hochberg,
    jensen_shannon,
    kolmogorov_smirnov,
    psi,
    two_proportions,
)
from afn_ray.reduce.histogram import Histogram, to_bins, to_values
from afn_ray.reduce.stats import Ints, wilson
from afn_ray.schema import MOVERS_SCHEMA, in_order
from afn_ray.store import manifest
from afn_ray.store.manifest import RunFolder

Sources = dict[str, tuple[Histogram, int]]
"""Histogram and number of HIGH tokens by source."""


def table_by_layer(run: RunFolder, name: str) -> dict[int, pa.Table]:
    """The run's table ``name`` by layer; empty if the run has no such table.

    Older runs have no table of sources.
    """
    if name not in run.info["tables"]:
        return {}
    table = manifest.read_table(run, name)
    return {
        layer: table.filter(pc.equal(table["layer"], layer)).combine_chunks()
        for layer in run.info["layers"]
    }


def without_special(words: pa.Table) -> pa.Table:
    return words.filter(pc.not_equal(words["class"], "special")).combine_chunks()


def histogram_of(table: pa.Table) -> Histogram:
    """Histogram of all tokens except special ones, from rows of ``HISTOGRAM_SCHEMA``."""
    normal = table.filter(pc.invert(table["special"]))
    return Histogram.of(to_bins(normal["strength"].to_numpy()), normal["n"].to_numpy())


def histograms_by_source(table: pa.Table) -> Sources:
    """Histogram and number of HIGH tokens of every source, from rows of ``SOURCES_SCHEMA``."""
    columns = (table[name] for name in ("source", "bins", "counts", "n_high"))
    return {
        name.as_py(): (
            Histogram(
                bins.values.to_numpy().astype(np.int64), counts.values.to_numpy().astype(np.int64)
            ),
            n_high.as_py(),
        )
        for name, bins, counts, n_high in zip(*columns, strict=True)
    }


def matched_sources(*sides: Sources) -> Iterator[Sources]:
    """The sources of both sides that have tokens, matched by name.

    A run with many files has folders as sources. Files of one side are added up into the folders
    that the other side has for them.
    """
    names = [{name for name, (histogram, _) in side.items() if histogram.n} for side in sides]
    for side, own, others in zip(sides, names, reversed(names), strict=True):
        groups: dict[str, list[str]] = {}
        for name in sorted(own):
            above = (name.rsplit("/", depth)[0] for depth in range(1, name.count("/") + 1))
            known = (
                name
                if name in others
                else next((folder for folder in above if folder in others), name)
            )
            groups.setdefault(known, []).append(name)
        yield {
            known: (
                Histogram.merge(side[name][0] for name in group),
                sum(side[name][1] for name in group),
            )
            for known, group in groups.items()
        }


def drift_row(
    layer: int,
    source: str | None,
    of_a: tuple[Histogram, int],
    of_b: tuple[Histogram, int],
    *,
    ranks_only: bool,
) -> dict[str, Any]:
    """A row of ``DRIFT_SCHEMA``; each side is a histogram and its number of HIGH tokens."""
    row: dict[str, Any] = {"layer": layer, "source": source}
    for run, (histogram, n_high) in (("a", of_a), ("b", of_b)):
        row[f"n_{run}"] = histogram.n
        if histogram.n:
            row[f"share_high_{run}"] = n_high / histogram.n
            if not ranks_only:
                keys = np.array([histogram.quantile_key(i, 4) for i in (1, 2, 3)])
                row |= {f"q{i}_{run}": float(value) for i, value in enumerate(to_values(keys), 1)}
    a, b = of_a[0], of_b[0]
    if a.n and b.n and not ranks_only:
        row |= {"psi": psi(a, b), "ks": kolmogorov_smirnov(a, b), "js": jensen_shannon(a, b)}
    return row


def class_rows(layer: int, *types: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows of ``CLASS_DRIFT_SCHEMA``.

    A class without tokens in a run has a HIGH share of 0 there, with the interval 0 to 1.
    """
    of_run = {}
    for run, words in zip("ab", types, strict=True):
        sums = pa.TableGroupBy(words, "class").aggregate([("n", "sum"), ("n_high", "sum")])
        of_run[run] = {
            name: (n, high)
            for n, high, name in zip(
                *(sums[c].to_pylist() for c in ("n_sum", "n_high_sum", "class")), strict=True
            )
        }
    for name in in_order(itertools.chain(*of_run.values())):
        row: dict[str, Any] = {"layer": layer, "class": name}
        for run, sums_of in of_run.items():
            n, high = sums_of.get(name, (0, 0))
            low, upper = wilson(high, n) if n else (0.0, 1.0)
            total = sum(n for n, _ in sums_of.values())
            row |= {
                f"n_{run}": n,
                f"share_{run}": n / total if total else 0.0,
                f"n_high_{run}": high,
                f"share_high_{run}": high / n if n else 0.0,
                f"share_high_low_{run}": float(low),
                f"share_high_high_{run}": float(upper),
            }
        yield row


def movers_table(
    layer: int, types_a: pa.Table, types_b: pa.Table, *, by_id: bool, ranks_only: bool
) -> pa.Table:
    """The layer's rows of ``MOVERS_SCHEMA``.

    Types are matched by their ids with ``by_id``, otherwise by their pieces.
    """
    keys_a, keys_b = (
        (t["token_id"].to_numpy() for t in (types_a, types_b))
        if by_id
        else _pieces(types_a, types_b)
    )
    keys = np.union1d(keys_a, keys_b)
    at_a, at_b = np.full(len(keys), -1), np.full(len(keys), -1)
    at_a[np.searchsorted(keys, keys_a)] = np.arange(len(keys_a))
    at_b[np.searchsorted(keys, keys_b)] = np.arange(len(keys_b))
    in_a, in_b = at_a >= 0, at_b >= 0
    both = in_a & in_b
    named = pa.concat_tables([types_b, types_a]).take(
        pa.array(np.where(in_b, at_b, len(types_b) + at_a))
    )
    columns: dict[str, Any] = {
        n: named[n].combine_chunks() for n in ("token_id", "token", "text", "class")
    }
    columns["layer"] = np.full(len(keys), layer)
    columns["status"] = np.where(both, "both", np.where(in_b, "new", "vanished"))
    number: dict[tuple[str, str], Any] = {}
    for run, types, at, there in (("a", types_a, at_a, in_a), ("b", types_b, at_b, in_b)):
        for name in ("n", "n_high", "q2"):
            number[name, run] = np.zeros(len(keys), types[name].to_numpy().dtype)
            number[name, run][there] = types[name].to_numpy()[at[there]]
        columns[f"n_{run}"] = number["n", run]
        share = number["n_high", run] / np.maximum(1, number["n", run])
        columns[f"share_high_{run}"] = pa.array(share, mask=~there)
        columns[f"median_{run}"] = pa.array(number["q2", run], mask=~there | ranks_only)
    z, p, q = np.zeros(len(keys)), np.ones(len(keys)), np.ones(len(keys))
    z[both], p[both] = two_proportions(
        *(number[name, run][both] for run in "ab" for name in ("n_high", "n"))
    )
    q[both] = benjamini_hochberg(p[both])
    columns |= {
        name: pa.array(values, mask=~both) for name, values in (("z", z), ("p", p), ("q", q))
    }
    table = pa.Table.from_arrays(
        [pa.array(columns[f.name], f.type) for f in MOVERS_SCHEMA], schema=MOVERS_SCHEMA
    )
    tokens = number["n", "a"] + number["n", "b"]
    ids = table["token_id"].to_numpy()
    return table.take(pa.array(np.lexsort((ids, -tokens, -np.abs(z), q, columns["status"]))))


def _pieces(*types: pa.Table) -> Iterator[Ints]:
    """A number for each type of each table; types with equal pieces have equal numbers."""
    numbers: dict[tuple[str, int], int] = {}
    for table in types:
        seen: Counter[str] = Counter()
        found = []
        for piece in table["token"].to_pylist():
            # A vocabulary may hold a piece twice: match the first with the first of the other.
            seen[piece] += 1
            found.append(numbers.setdefault((piece, seen[piece]), len(numbers)))
        yield np.array(found, np.int64)
