"""One pass over the tokens of a run: the sums that the figures of claims are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis.bootstrap import Figure, Quantity, Sample, by_number, ranks
from afn_ray.analysis.explained import ControlModels
from afn_ray.classes import UNTAGGED, in_order, upos_classes
from afn_ray.query.database import Run
from afn_ray.reduce.stats import Float64s, Ints, is_high, quantile_index
from afn_ray.text import count

BINS = 256
"""Bins of a variable's ranks, for intervals of an AUC; the AUC itself uses every distinct value."""
MOST_TAGS = 24
"""Number of tags with figures of their own; the rarer ones share one figure."""
KINDS = ("content", "function", "punctuation")
"""Word classes that the claims compare."""
RIVALS = {"attention": "attention received", "attention_norm": "norm-weighted attention"}
"""Signals of a layer that strength is compared with, and their names in figures."""
SumsByName = dict[str, Float64s]
"""Sums over the tokens by group: [num_groups]."""


class Variable:
    """A variable that may separate classes, and the distribution of its values in each class."""

    def __init__(
        self,
        name: str,
        layer: int | None,
        column: str,
        values: npt.NDArray[Any],
        counts: npt.NDArray[Any],
        groups: int,
    ) -> None:
        """``values`` [n_values] are distinct and ascending; ``counts`` are their token counts."""
        self.name = name
        self.layer = layer
        self.column = column
        self.q3 = values[quantile_index(counts, 3, 4)]
        self._values = values
        self._ranks = ranks(values, counts)
        bins = (self._ranks + 0.5) * BINS
        self._bins = np.minimum(BINS - 1, bins).astype(np.int64)
        num_kinds = len(KINDS) + 1  # the last kind is everything else
        self.by_value = np.zeros((num_kinds, len(values)))
        self.by_bin = np.zeros((groups, num_kinds, BINS))
        self.high = np.zeros((groups, num_kinds))
        # Of tokens that are HIGH by strength at the same layer; filled for rivals only.
        self.strong_by_bin = np.zeros((groups, BINS))
        self.separates = len(values) > 1  # False: all values are equal and separate nothing

    def add(self, values: npt.NDArray[Any], g: Ints, kind: Ints) -> Float64s:
        """Count tokens, all arrays [n_tokens]; return their ranks."""
        at = np.searchsorted(self._values, values)
        row = g * (len(KINDS) + 1) + kind
        cell_by_value = kind * len(self._values) + at
        cell_by_bin = row * BINS + self._bins[at]
        # On a flat view: tens of times faster.
        np.add.at(self.by_value.ravel(), cell_by_value, 1.0)
        np.add.at(self.by_bin.ravel(), cell_by_bin, 1.0)
        high = np.bincount(row, values >= self.q3, self.high.size)
        self.high += high.reshape(self.high.shape)
        return self._ranks[at]

    def terms_with_strength(
        self,
        token_ranks: Mapping[str, Float64s],
        columns: Mapping[str, npt.NDArray[Any]],
        g: Ints,
    ) -> dict[str, npt.NDArray[Any]]:
        """Values to sum, [n_tokens], on how far this variable agrees with strength at its layer.

        Also counts tokens that are HIGH by strength by their bin; ``g`` are their groups.
        """
        strong = columns[f"high_{self.layer}"]
        x = token_ranks[f"strength_{self.layer}"]
        y = token_ranks[self.column]
        high = columns[self.column] >= self.q3
        bins = self._bins[np.searchsorted(self._values, columns[self.column][strong])]
        np.add.at(self.strong_by_bin, (g[strong], bins), 1.0)
        values = {"y": y, "yy": y * y, "xy": x * y, "high": high}
        values |= {"both": high & strong, "any": high | strong}
        return {f"{self.name} {name}": value for name, value in values.items()}


class TagCounts:
    """Tags of a labelled corpus, and how many tokens of each are HIGH."""

    def __init__(self, sample: Sample, layers: Sequence[int]) -> None:
        tag = f"coalesce(tag, '{UNTAGGED}')"
        (tags,) = sample.ask(
            f"SELECT {tag} FROM {sample.tokens} GROUP BY 1 ORDER BY count(*) DESC, 1"  # noqa: S608
        )
        self._tags = pa.array(tags, pa.string())
        classes = upos_classes(tags)
        kind_of = {kind: at for at, kind in enumerate(KINDS)}
        kinds = [kind_of[classes[tag]] if tag in classes else len(KINDS) for tag in tags]
        self._kinds = np.array(kinds)
        frequent = tags[:MOST_TAGS]
        self._names = in_order(frequent)
        rarer = len(self._names)  # column of the tags that share a figure
        self._columns = np.full(len(tags), rarer)
        self._columns[:rarer] = [self._names.index(tag) for tag in frequent]
        if len(tags) > rarer:
            self._names.append(f"{count(len(tags) - rarer, 'rarer tag')} together")
        shape = (sample.num_groups, len(self._names))
        self._high = {layer: np.zeros(shape) for layer in layers}
        self._n = {layer: np.zeros(shape) for layer in layers}

    def read(self, tags: pa.Array) -> tuple[Ints, Ints]:
        """Index of the name under which each token's tag is counted, and its index in ``KINDS``."""
        known = pc.fill_null(tags.cast(pa.string()), UNTAGGED)
        found = pc.index_in(known, self._tags).to_numpy()
        return self._columns[found], self._kinds[found]

    def add(self, layer: int, g: Ints, tags: Ints, high: npt.NDArray[np.bool_]) -> None:
        """Count tokens of groups ``g``; all arrays are [n_tokens]."""
        row = g * len(self._names) + tags
        for counts, weights in ((self._n[layer], None), (self._high[layer], high)):
            counts += np.bincount(row, weights, counts.size).reshape(counts.shape)

    def figures(self, sample: Sample, layer: int) -> Iterator[Figure]:
        """The share of each tag that is HIGH."""
        for at, name in enumerate(self._names):
            n = self._n[layer][:, at]
            share = sample.draw(np.divide, self._high[layer][:, at], n)
            quantity = Quantity("tags", "share that is HIGH", name, layer)
            yield sample.figure(quantity, share, n.sum(), is_control=layer == 0)


@dataclass(frozen=True, slots=True)
class _Types:
    """Facts of each type, by token id, and of each position."""

    ids: Ints  # of the types in the sample
    n_of: Ints  # tokens in the sample, in the order of ``ids``
    n_in_run: Ints  # tokens of each type in the run, by id
    kind: Ints  # index in ``KINDS``, or their number for other types
    idf: Float64s
    frequency: Float64s  # rank of the type's frequency in the run
    place: Float64s  # rank of each position
    mean: Mapping[int, Float64s]  # mean strength in the sample, by layer
    centre: Mapping[int, float]  # mean strength of all tokens in the sample, by layer


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some tokens; all arrays are [n_tokens]."""

    columns: dict[str, npt.NDArray[Any]]
    group: Ints
    kind: Ints
    ranks: Mapping[str, Float64s]  # by column


def read_sums(
    sample: Sample, layers: Sequence[int], recorded: set[str], tags: TagCounts | None
) -> tuple[list[Variable], dict[int, SumsByName], int]:
    """Read the inputs of all figures: variables, sums by layer, and the number of types.

    Strength comes first among the variables, layer by layer. A token's class, one of ``KINDS``, is
    that of its type, or with ``tags`` that of its own tag.
    """
    run = sample.run
    types = _read_types(sample, layers)
    variables = _read_variables(sample, layers, recorded, types)
    limits = _high_limits(run)
    models = ControlModels(sample, types.n_in_run, {k: limits[f"{k}"] for k in layers})
    names = _columns(layers, recorded, variables)
    selected = ", ".join(names if tags is None else [*names, "tag"])
    sums: dict[int, SumsByName] = {k: {} for k in layers}
    sample.check_time()
    for read in run.sql(f"SELECT {selected} FROM {sample.tokens}").to_arrow_reader():  # noqa: S608
        sample.check_time()
        columns = {name: read.column(name).to_numpy(zero_copy_only=False) for name in names}
        columns["idf"] = types.idf[columns["token_id"]]
        for name, q3 in limits.items():
            columns[f"high_{name}"] = is_high(columns[f"strength_{name}"], q3)
        group = sample.group_of[columns["doc"]]
        kind = types.kind[columns["token_id"]]
        if tags is not None:
            tag, kind = tags.read(read.column("tag"))
            for k in layers:
                tags.add(k, group, tag, columns[f"high_{k}"])
        ranked = {v.column: v.add(columns[v.column], group, kind) for v in variables}
        batch = _Batch(columns, group, kind, ranked)
        for before, k in zip([None, *layers], layers, strict=False):
            terms = _strength_terms(batch, k, types)
            terms |= _rank_terms(batch, k, types, sample.length_of)
            terms |= _high_terms(batch, k, before)
            terms |= _signal_terms(batch, k)
            terms |= models.terms(k, columns, columns[f"high_{k}"])
            for v in variables:
                if v.layer == k and v.name in RIVALS.values():
                    terms |= v.terms_with_strength(batch.ranks, columns, group)
            for name, values in terms.items():
                total = sums[k].setdefault(name, np.zeros(sample.num_groups))
                total += np.bincount(group, values, sample.num_groups)
    return variables, sums, len(types.ids)


def _high_limits(run: Run) -> dict[str, float | None]:
    """Q3 of each column ``strength_*``, by the rest of its name."""
    of_strength = run.sql("SELECT layer, q3 FROM thresholds WHERE population = 'tokens'")
    limits = {f"{layer}": q3 for layer, q3 in of_strength.fetchall()}
    of_trimmed = run.sql("SELECT layer, q3 FROM signals WHERE signal = 'strength_trimmed'")
    return limits | {f"trimmed_{layer}": q3 for layer, q3 in of_trimmed.fetchall()}


def _read_types(sample: Sample, layers: Sequence[int]) -> _Types:
    mean_columns = ", ".join(f"avg(strength_{k}::DOUBLE)" for k in layers)
    ids, n_of, *means = sample.ask(
        f"SELECT token_id, count(*), {mean_columns} FROM {sample.tokens} GROUP BY 1"  # noqa: S608
    )
    known_ids, *known = sample.ask(
        f"SELECT token_id, coalesce(list_position({list(KINDS)}, class) - 1, "  # noqa: S608
        f"{len(KINDS)}), n, idf "
        f"FROM vocabulary WHERE layer = {layers[-1]} AND class <> 'special'"
    )
    kind, n_in_run, idf = (by_number(known_ids, column) for column in known)
    places, num_there = sample.ask(
        "SELECT position, count(*) FROM "  # noqa: S608
        f"{sample.tokens} GROUP BY 1"
    )
    mean, centre = {}, {}
    for k, mean_of_type in zip(layers, means, strict=True):
        mean[k] = by_number(ids, mean_of_type)
        centre[k] = float(mean_of_type @ n_of) / sample.n
    return _Types(
        ids=ids,
        n_of=n_of,
        n_in_run=n_in_run,
        kind=kind,
        idf=idf,
        frequency=by_number(ids, ranks(n_in_run[ids], n_of)),
        place=by_number(places, ranks(places, num_there)),
        mean=mean,
        centre=centre,
    )


def _read_variables(
    sample: Sample, layers: Sequence[int], recorded: set[str], types: _Types
) -> list[Variable]:
    """Strength at every layer, then its rivals."""

    def variable(name: str, layer: int, column: str) -> Variable:
        values, counts = sample.ask(
            f"SELECT {column}, count(*) FROM {sample.tokens} GROUP BY 1 ORDER BY 1"  # noqa: S608
        )
        return Variable(name, layer, column, values, counts, sample.num_groups)

    variables = [variable("strength", k, f"strength_{k}") for k in layers]
    values, level = np.unique(types.idf[types.ids], return_inverse=True)
    counts = np.bincount(level, types.n_of)
    rarity = Variable("rarity (idf)", None, "idf", values, counts, sample.num_groups)
    if rarity.separates:
        variables.append(rarity)
    for signal, name in RIVALS.items():
        for k in layers:
            column = f"{signal}_{k}"
            if column in recorded:
                variables.append(variable(name, k, column))
    return variables


def _columns(layers: Sequence[int], recorded: set[str], variables: Sequence[Variable]) -> list[str]:
    """Columns of the tokens that the sums need."""
    columns = ["doc", "position", "token_id"]
    columns += [v.column for v in variables if v.column != "idf"]
    for name in ("sink", "shift", "strength_trimmed"):
        wanted = [f"{name}_{k}" for k in layers]
        columns += [column for column in wanted if column in recorded]
    return columns


Terms = dict[str, npt.NDArray[Any]]
"""Values to sum, [n_tokens] each; booleans count as 0 and 1."""


def _strength_terms(batch: _Batch, k: int, types: _Types) -> Terms:
    strength = batch.columns[f"strength_{k}"].astype(np.float64)
    is_sink = batch.columns[f"sink_{k}"]
    mean_of_type = types.mean[k][batch.columns["token_id"]]
    off = strength - types.centre[k]
    return {
        "n": np.ones(len(strength)),
        "sinks": is_sink,
        "sum": strength,
        "sum_without": strength * ~is_sink,
        "within": (strength - mean_of_type) ** 2,
        "off": off,
        "off_2": off**2,
    }


def _rank_terms(batch: _Batch, k: int, types: _Types, length_of: Float64s) -> Terms:
    """Products of ranks: x of strength, c 1 for content, f of frequency; k_ for ``KINDS`` only."""
    x = batch.ranks[f"strength_{k}"]
    frequency = types.frequency[batch.columns["token_id"]]
    place = types.place[batch.columns["position"]]
    length = length_of[batch.columns["doc"]]
    terms = {"x": x, "xx": x * x}
    for name, y in (("frequency", frequency), ("place", place), ("length", length)):
        terms |= {name: y, f"{name}_2": y * y, f"{name}_x": x * y}
    is_compared = batch.kind < len(KINDS)
    is_content = batch.kind == KINDS.index("content")
    return terms | {
        "k_n": is_compared,
        "k_c": is_content,
        "k_x": x * is_compared,
        "k_xx": x * x * is_compared,
        "k_cx": x * is_content,
        "k_f": frequency * is_compared,
        "k_ff": frequency**2 * is_compared,
        "k_fx": x * frequency * is_compared,
        "k_cf": frequency * is_content,
    }


def _high_terms(batch: _Batch, k: int, before: int | None) -> Terms:
    high = batch.columns[f"high_{k}"]
    terms = {"high": high}
    for at, kind in enumerate(KINDS):
        is_kind = batch.kind == at
        terms |= {kind: is_kind, f"high_{kind}": high & is_kind}
    if before is not None:
        high_before = batch.columns[f"high_{before}"]
        terms |= {"both": high_before & high, "any": high_before | high}
    return terms


def _signal_terms(batch: _Batch, k: int) -> Terms:
    """Terms of the signals that the layer has: shift and trimmed strength."""
    high = batch.columns[f"high_{k}"]
    shift = batch.columns.get(f"shift_{k}")
    trimmed = batch.columns.get(f"strength_trimmed_{k}")
    terms: Terms = {}
    if shift is not None:
        terms |= {"shift": shift, "high_shift": shift * high}
    if trimmed is not None:
        high_trimmed = batch.columns[f"high_trimmed_{k}"]
        squares = batch.columns[f"strength_{k}"].astype(np.float64) ** 2
        terms |= {
            "squares": squares,
            "cut": squares - trimmed.astype(np.float64) ** 2,
            "trimmed_both": high_trimmed & high,
            "trimmed_any": high_trimmed | high,
        }
    return terms
