"""Tables of a comparison: drift of strengths, of classes and of types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.classes import in_order
from afn_ray.reduce.distances import (
    benjamini_hochberg,
    jensen_shannon,
    kolmogorov_smirnov,
    psi,
    two_proportions,
)
from afn_ray.reduce.histogram import Histogram, to_bins, to_values
from afn_ray.reduce.stats import Float64s, Ints, wilson
from afn_ray.schema import MOVERS_SCHEMA
from afn_ray.store import manifest
from afn_ray.store.manifest import RunFolder


def table_by_layer(
    run: RunFolder, name: str, columns: Sequence[str] | None = None
) -> dict[int, pa.Table]:
    """The run's table ``name`` by layer; empty if the run has no such table.

    It has ``layer`` and ``columns``, or all. Older runs have no table of sources.
    """
    if name not in run.info["tables"]:
        return {}
    if columns is not None:
        columns = ("layer", *columns)
    table = manifest.read_table(run, name, columns)
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


class SourceStrengths(NamedTuple):
    """Strengths of the tokens of one source or of a whole run, special tokens left out."""

    histogram: Histogram
    n_high: int  # tokens that are HIGH


StrengthsBySource = dict[str, SourceStrengths]
"""Strengths by source."""


def histograms_by_source(table: pa.Table, key: str = "source") -> dict[Any, SourceStrengths]:
    """Histogram and number of HIGH tokens of every source, from rows of ``SOURCES_SCHEMA``.

    With ``key`` "group": of every group, from rows of ``GROUPS_SCHEMA``.
    """
    by_source = {}
    columns = (table[name] for name in (key, "bins", "counts", "n_high"))
    for name, bins, counts, n_high in zip(*columns, strict=True):
        keys = bins.values.to_numpy().astype(np.int64)
        n = counts.values.to_numpy().astype(np.int64)
        by_source[name.as_py()] = SourceStrengths(Histogram(keys, n), n_high.as_py())
    return by_source


def matched_sources(
    a: StrengthsBySource, b: StrengthsBySource
) -> tuple[StrengthsBySource, StrengthsBySource]:
    """The sources of both sides that have tokens, matched by name.

    A run with many files has folders as sources. Files of one side are added up into the folders
    that the other side has for them.
    """
    with_tokens_a = {name: source for name, source in a.items() if source.histogram.n}
    with_tokens_b = {name: source for name, source in b.items() if source.histogram.n}
    return _grouped_as(with_tokens_b, with_tokens_a), _grouped_as(with_tokens_a, with_tokens_b)


def _grouped_as(others: Collection[str], sources: StrengthsBySource) -> StrengthsBySource:
    """``sources`` added up into the folders that are among ``others``."""
    return renamed(sources, lambda name: _name_among(others, name))


def renamed(sources: StrengthsBySource, new_name: Callable[[str], str]) -> StrengthsBySource:
    """``sources`` under the names that ``new_name`` gives, added up where names become equal."""
    groups: dict[str, list[SourceStrengths]] = {}
    for name in sorted(sources):
        groups.setdefault(new_name(name), []).append(sources[name])
    found = {}
    for name, group in groups.items():
        histogram = Histogram.merge(source.histogram for source in group)
        n_high = sum(source.n_high for source in group)
        found[name] = SourceStrengths(histogram, n_high)
    return found


def _name_among(others: Collection[str], name: str) -> str:
    """``name`` or its nearest folder that is among ``others``; ``name`` itself if none is."""
    folder = name
    while folder not in others:
        if "/" not in folder:
            return name
        folder, _, _ = folder.rpartition("/")
    return folder


class DriftRow(TypedDict, total=False):
    """A row of ``DRIFT_SCHEMA``; what has no value is null there."""

    layer: int
    source: str | None
    n_a: int
    n_b: int
    share_high_a: float
    share_high_b: float
    q1_a: float
    q2_a: float
    q3_a: float
    q1_b: float
    q2_b: float
    q3_b: float
    psi: float
    ks: float
    js: float


def drift_row(
    layer: int, name: str | None, a: SourceStrengths, b: SourceStrengths, *, ranks_only: bool
) -> DriftRow:
    """The row for the source ``name``; None is the whole run."""
    n_a, n_b = a.histogram.n, b.histogram.n
    row: DriftRow = {"layer": layer, "source": name, "n_a": n_a, "n_b": n_b}
    if n_a:
        row["share_high_a"] = a.n_high / n_a
    if n_b:
        row["share_high_b"] = b.n_high / n_b
    if n_a and not ranks_only:
        row["q1_a"], row["q2_a"], row["q3_a"] = _quartiles(a.histogram)
    if n_b and not ranks_only:
        row["q1_b"], row["q2_b"], row["q3_b"] = _quartiles(b.histogram)
    if n_a and n_b and not ranks_only:
        row["psi"] = psi(a.histogram, b.histogram)
        row["ks"] = kolmogorov_smirnov(a.histogram, b.histogram)
        row["js"] = jensen_shannon(a.histogram, b.histogram)
    return row


def _quartiles(histogram: Histogram) -> tuple[float, float, float]:
    q1, q2, q3 = to_values(histogram.quartile_keys()).tolist()
    return q1, q2, q3


def class_rows(layer: int, types_a: pa.Table, types_b: pa.Table) -> Iterator[dict[str, object]]:
    """Rows of ``CLASS_DRIFT_SCHEMA``.

    A class without tokens in a run has a HIGH share of 0 there, with the interval 0 to 1.
    """
    counts_a, counts_b = _counts_by_class(types_a), _counts_by_class(types_b)
    for name in in_order([*counts_a, *counts_b]):
        row: dict[str, object] = {"layer": layer, "class": name}
        for run, counts in (("a", counts_a), ("b", counts_b)):
            n, n_high = counts.get(name, (0, 0))
            total = sum(n for n, _ in counts.values())
            low, upper = wilson(n_high, n) if n else (0.0, 1.0)
            row |= {
                f"n_{run}": n,
                f"share_{run}": n / total if total else 0.0,
                f"n_high_{run}": n_high,
                f"share_high_{run}": n_high / n if n else 0.0,
                f"share_high_low_{run}": float(low),
                f"share_high_high_{run}": float(upper),
            }
        yield row


def _counts_by_class(types: pa.Table) -> dict[str, tuple[int, int]]:
    """Number of tokens and of HIGH tokens of each class."""
    sums = types.group_by("class").aggregate([("n", "sum"), ("n_high", "sum")])
    rows = sums.to_pylist()
    return {row["class"]: (row["n_sum"], row["n_high_sum"]) for row in rows}


def movers_table(
    layer: int, types_a: pa.Table, types_b: pa.Table, *, by_id: bool, ranks_only: bool
) -> pa.Table:
    """The layer's rows of ``MOVERS_SCHEMA``.

    Types are matched by their ids with ``by_id``, otherwise by their pieces.
    """
    if by_id:
        keys_a = types_a["token_id"].to_numpy()
        keys_b = types_b["token_id"].to_numpy()
    else:
        keys_a, keys_b = _pieces(types_a, types_b)
    keys = np.union1d(keys_a, keys_b)
    a = MoverSide.of(types_a, keys_a, keys)
    b = MoverSide.of(types_b, keys_b, keys)
    both = a.has_type & b.has_type
    status = np.where(both, "both", np.where(b.has_type, "new", "vanished"))
    z, p, q = tests_of_shares(a, b, both)
    # Texts and classes are those of B, or of A for a type that only A has.
    row_of_type = np.where(b.has_type, b.row, len(types_b) + a.row)
    named = pa.concat_tables([types_b, types_a]).take(pa.array(row_of_type))
    token_ids = named["token_id"].combine_chunks()
    columns = {
        "layer": np.full(len(keys), layer),
        "token_id": token_ids,
        "token": named["token"].combine_chunks(),
        "text": named["text"].combine_chunks(),
        "class": named["class"].combine_chunks(),
        "status": status,
        **a.columns("a", ranks_only=ranks_only),
        **b.columns("b", ranks_only=ranks_only),
        "z": pa.array(z, mask=~both),
        "p": pa.array(p, mask=~both),
        "q": pa.array(q, mask=~both),
    }
    arrays = [pa.array(columns[field.name], field.type) for field in MOVERS_SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=MOVERS_SCHEMA)
    num_tokens = a.n + b.n
    order = np.lexsort((token_ids.to_numpy(), -num_tokens, -np.abs(z), q, status))
    return table.take(pa.array(order))


def tests_of_shares(
    a: MoverSide, b: MoverSide, both: npt.NDArray[np.bool_]
) -> tuple[Float64s, Float64s, Float64s]:
    """z, p and q of each type's HIGH share; 0, 1 and 1 for a type that is not in ``both``."""
    z = np.zeros(len(both))
    p = np.ones(len(both))
    q = np.ones(len(both))
    of_a = (a.n_high[both], a.n[both])
    of_b = (b.n_high[both], b.n[both])
    z[both], p[both] = two_proportions(*of_a, *of_b)
    q[both] = benjamini_hochberg(p[both])
    return z, p, q


class MoverSide(NamedTuple):
    """The types of one run, at the places of the types of both runs; all [n_types]."""

    row: Ints  # row in the run's table of types; -1 if the run does not have the type
    has_type: npt.NDArray[np.bool_]
    n: Ints  # this and the following are 0 where the run does not have the type
    n_high: Ints
    median: npt.NDArray[np.float32]

    @classmethod
    def of(cls, types: pa.Table, keys: Ints, all_keys: Ints) -> MoverSide:
        """``types`` with the given ``keys`` [len(types)]; ``all_keys`` [n_types] are ascending."""
        row = np.full(len(all_keys), -1)
        row[np.searchsorted(all_keys, keys)] = np.arange(len(keys))
        has_type = row >= 0

        def placed(name: str) -> npt.NDArray[Any]:
            values = types[name].to_numpy()
            column = np.zeros(len(all_keys), values.dtype)
            column[has_type] = values[row[has_type]]
            return column

        return cls(row, has_type, placed("n"), placed("n_high"), placed("q2"))

    def columns(self, run: str, *, ranks_only: bool) -> dict[str, object]:
        """The columns of ``MOVERS_SCHEMA`` that describe ``run``."""
        share_high = self.n_high / np.maximum(1, self.n)
        return {
            f"n_{run}": self.n,
            f"share_high_{run}": pa.array(share_high, mask=~self.has_type),
            f"median_{run}": pa.array(self.median, mask=~self.has_type | ranks_only),
        }


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
