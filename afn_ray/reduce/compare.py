"""Compare two runs: how far strengths, classes, types and sources moved between them.

Only the small tables of the runs are read. Special tokens are left out. Distances are computed
from the lossless histograms: they cover all recorded values and are exactly 0 for two runs over
the same corpus. ``psi``, ``kolmogorov_smirnov`` and ``jensen_shannon`` define them.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.errors import ConfigError, StoreError
from afn_ray.reduce import losses
from afn_ray.reduce.histogram import Histogram, starts, to_bins, to_values
from afn_ray.reduce.stats import wilson
from afn_ray.schema import CLASS_DRIFT_SCHEMA, DRIFT_SCHEMA, MOVERS_SCHEMA, PARTS_OF_WORDS, in_order
from afn_ray.store import checksums, label_thresholds, manifest
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

JSON_VERSION = 2
"""Version of the result of ``to_json``; it grows if an entry disappears or changes its meaning."""
JSON_ROWS = 1000
"""Largest number of movers, new types, vanished types and sources each in ``to_json``."""
SIGNIFICANT = 0.05
"""Value of q below which a type counts as moved.

It is the expected share of types among the moved ones that moved only by chance.
"""
NUM_BINS = 10
"""Number of bins for ``psi`` and ``jensen_shannon``."""
LEAST_EXPECTED = 5
"""Smallest expected number of tokens for which a share is approximately normal."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between run ``a``, the baseline, and run ``b``.

    ``drift`` (``DRIFT_SCHEMA``) has, for each layer, one row for the whole run (``source`` is null)
    and one for each source of either run. ``classes`` (``CLASS_DRIFT_SCHEMA``) has one row for each
    class of either run. ``movers`` (``MOVERS_SCHEMA``) has one row for each type of either run.
    Within a layer, movers in both runs come first, in ascending order of q.
    """

    a: RunFolder
    b: RunFolder
    drift: pa.Table
    classes: pa.Table
    movers: pa.Table
    notes: tuple[str, ...]  # sentences that a reader must know


def compare(
    run_a: str | RunFolder, run_b: str | RunFolder, *, ranks_only: bool = False
) -> Comparison:
    """Compare ``run_b`` with its baseline ``run_a``.

    Each is a run, a run's URI, or a store's URI for its latest complete run. ``two_proportions``
    defines z and the two-sided p; q is computed from p after Benjamini and Hochberg, over the
    layer's types in both runs. Tokens of one document are not independent draws. So z shows which
    types moved most, but not how certain that is. A type in both runs has its class of ``run_b``.

    Runs of different measures have strengths that cannot be compared. For them this function
    raises ``ConfigError`` unless ``ranks_only`` is set. With ``ranks_only``, quartiles, medians and
    distances are null and shares remain; types of different measures are matched by their piece.
    Also raises ``ConfigError`` for runs without a common layer, and ``StoreError`` for a run that
    is missing, incomplete or damaged.
    """
    a, b = (_complete(run) for run in (run_a, run_b))
    same_measure = a.info["measure"]["id"] == b.info["measure"]["id"]
    if not same_measure and not ranks_only:
        raise ConfigError(
            f"runs {a.uri} and {b.uri} are of different measures, so their strengths cannot be "
            "compared: "
            f"{'; '.join(_differences(a.info['measure'], b.info['measure']))}. 'afn compare A B "
            "--ranks-only' compares "
            "shares alone"
        )
    layers = [k for k in a.info["layers"] if k in b.info["layers"]]
    if not layers:
        raise ConfigError(
            f"runs {a.uri} and {b.uri} have no layer in common: {_listed(a.info['layers'])} "
            "against "
            f"{_listed(b.info['layers'])}"
        )
    with checksums.named_damage(f"{a.uri} or {b.uri}"):
        return _compared(a, b, layers, ranks_only=ranks_only, same_measure=same_measure)


def _compared(
    a: RunFolder, b: RunFolder, layers: list[int], *, ranks_only: bool, same_measure: bool
) -> Comparison:
    histograms, vocabularies, sources = (
        [_by_layer(run, name) for run in (a, b)] for name in ("histogram", "vocabulary", "sources")
    )
    drift: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    movers = []
    for layer in layers:
        types = [_without_special(by_layer[layer]) for by_layer in vocabularies]
        whole = [
            (_of_layer(by_layer[layer]), int(pc.sum(words["n_high"]).as_py() or 0))
            for by_layer, words in zip(histograms, types, strict=True)
        ]
        drift.append(_drift_row(layer, None, *whole, ranks_only=ranks_only))
        if all(sources):
            of_a, of_b = _alike(*(_of_sources(by_layer[layer]) for by_layer in sources))
            nothing = (Histogram.of(np.empty(0, np.int64)), 0)
            drift += [
                _drift_row(
                    layer,
                    name,
                    of_a.get(name, nothing),
                    of_b.get(name, nothing),
                    ranks_only=ranks_only,
                )
                for name in sorted({*of_a, *of_b})
            ]
        classes += _class_rows(layer, *types)
        movers.append(_movers(layer, *types, by_id=same_measure, ranks_only=ranks_only))
    return Comparison(
        a,
        b,
        pa.Table.from_pylist(drift, DRIFT_SCHEMA),
        pa.Table.from_pylist(classes, CLASS_DRIFT_SCHEMA),
        pa.concat_tables(movers),
        tuple(_notes(a, b, layers, ranks_only)),
    )


Sources = dict[str, tuple[Histogram, int]]
"""Histogram and number of HIGH tokens by source."""


# --- distances ---


def psi(a: Histogram, b: Histogram) -> float:
    """Population stability index: the sum over bins of (q - p) ln(q / p).

    p and q are the bin's shares of ``a`` and ``b``. Bins end at the deciles of ``a`` (inverse CDF,
    the end included); the last bin has no upper end. Equal deciles end one bin. A bin that is empty
    in one of the two counts there as half a token. A bin that is empty in both is left out. The
    index is not symmetric, because the bins are those of ``a``. Neither histogram may be empty.
    """
    ends = np.unique([a.quantile_key(i, NUM_BINS) for i in range(1, NUM_BINS)])
    in_a, in_b = _binned(a, ends), _binned(b, ends)
    some = (in_a > 0) | (in_b > 0)
    p, q = np.maximum(in_a[some], 0.5) / a.n, np.maximum(in_b[some], 0.5) / b.n
    return math.fsum((q - p) * np.log(q / p))


def kolmogorov_smirnov(a: Histogram, b: Histogram) -> float:
    """Largest difference of the two empirical CDFs over all recorded values, 0 to 1.

    Neither histogram may be empty.
    """
    keys = _keys_of(a, b)
    return float(np.abs(_at_or_below(a, keys) / a.n - _at_or_below(b, keys) / b.n).max())


def jensen_shannon(a: Histogram, b: Histogram) -> float:
    """Jensen-Shannon distance to base 2, 0 to 1: the square root of the divergence.

    It is symmetric and a metric. It uses ten bins that end at the deciles of the even mixture of
    the two, whatever their sizes. Without bins it would be near 1 for any two small samples,
    because small samples share hardly any value. Neither histogram may be empty.
    """
    keys, n_a, n_b = _keys_of(a, b), a.n, b.n
    below_a, below_b = _at_or_below(a, keys), _at_or_below(b, keys)

    def mixture(at: int) -> int:
        # Python integers: the product may exceed 64 bits.
        return NUM_BINS * (int(below_a[at]) * n_b + int(below_b[at]) * n_a)

    deciles = [
        bisect_left(range(len(keys)), 2 * i * n_a * n_b, key=mixture) for i in range(1, NUM_BINS)
    ]
    ends = keys[np.unique(deciles)]
    p, q = _binned(a, ends) / n_a, _binned(b, ends) / n_b
    middle = (p + q) / 2
    bits = (math.fsum(s[s > 0] * np.log2(s[s > 0] / middle[s > 0])) for s in (p, q))
    return math.sqrt(min(1.0, max(0.0, sum(bits) / 2)))


def _keys_of(a: Histogram, b: Histogram) -> Ints:
    """The distinct keys of both, ascending."""
    keys = np.sort(np.concatenate([a.keys, b.keys]), kind="stable")  # two ascending runs: a merge
    return keys[starts(keys)]


def _at_or_below(histogram: Histogram, keys: Ints) -> Ints:
    """Number of values of ``histogram`` at or below each of ``keys``."""
    cumulative = np.append(0, np.cumsum(histogram.counts))
    return cumulative[np.searchsorted(histogram.keys, keys, side="right")]


def _binned(histogram: Histogram, ends: Ints) -> Ints:
    """Number of values in each bin; ``ends`` are the inclusive ends of all bins but the last."""
    return np.diff(_at_or_below(histogram, ends), prepend=0, append=histogram.n)


def two_proportions(high_a: Ints, n_a: Ints, high_b: Ints, n_b: Ints) -> tuple[Floats, Floats]:
    """z of the share ``high_b / n_b`` against ``high_a / n_a``, and its two-sided p.

    z uses the variance of the pooled share. With fewer than ``LEAST_EXPECTED`` expected tokens of
    either kind in either run, that z is not normal. Then z is that of the log-odds ratio, with one
    token of the pooled share added to each run as a prior (Monroe, Colaresi and Quinn, 2008). If no
    token or every token of both runs is HIGH, there is no difference: z is 0 and p is 1.
    """
    pooled = (high_a + high_b) / (n_a + n_b)
    sd = np.sqrt(pooled * (1 - pooled) * (1 / n_a + 1 / n_b))
    z = np.divide(high_b / n_b - high_a / n_a, sd, out=np.zeros(len(sd)), where=sd > 0)
    few = (sd > 0) & (np.minimum(pooled, 1 - pooled) * np.minimum(n_a, n_b) < LEAST_EXPECTED)
    p, runs = pooled[few], ((high_a[few], n_a[few]), (high_b[few], n_b[few]))
    odds = [np.log(high + p) - np.log(n - high + 1 - p) for high, n in runs]
    variance = sum(1 / (high + p) + 1 / (n - high + 1 - p) for high, n in runs)
    z[few] = (odds[1] - odds[0]) / np.sqrt(variance)
    return z, np.array([math.erfc(abs(value) / math.sqrt(2)) for value in z.tolist()])


def benjamini_hochberg(p: Floats) -> Floats:
    """q of each test with the given ``p``: the lowest false discovery rate that selects it."""
    order = np.argsort(p, kind="stable")[::-1]
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(np.minimum(1.0, p[order] * len(p) / np.arange(len(p), 0, -1)))
    return q


# --- tables ---


def _complete(run: str | RunFolder) -> RunFolder:
    """The run's folder. Raises ``StoreError`` if the run is not complete."""
    folder = manifest.find_run(run) if isinstance(run, str) else run
    if not folder.info:
        raise StoreError(
            f"run {folder.uri} is not complete; give its 'afn run' command again to finish it"
        )
    return folder


def _by_layer(run: RunFolder, name: str) -> dict[int, pa.Table]:
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


def _without_special(words: pa.Table) -> pa.Table:
    return words.filter(pc.not_equal(words["class"], "special")).combine_chunks()


def _of_layer(table: pa.Table) -> Histogram:
    """Histogram of all tokens except special ones, from rows of ``HISTOGRAM_SCHEMA``."""
    normal = table.filter(pc.invert(table["special"]))
    return Histogram.of(to_bins(normal["strength"].to_numpy()), normal["n"].to_numpy())


def _of_sources(table: pa.Table) -> Sources:
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


def _alike(*sides: Sources) -> Iterator[Sources]:
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


def _drift_row(
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


def _class_rows(layer: int, *types: pa.Table) -> Iterator[dict[str, Any]]:
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


def _movers(
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


# --- notes for the reader ---


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys of two measures with different values, with both values."""
    return [
        f"{key}: {_short(a.get(key))} against {_short(b.get(key))}"
        for key in sorted({*a, *b} - {"id"})
        if a.get(key) != b.get(key)
    ]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _listed(layers: list[int]) -> str:
    return "layers " + ", ".join(map(str, layers))


def _notes(a: RunFolder, b: RunFolder, layers: list[int], ranks_only: bool) -> Iterator[str]:
    """Sentences that a reader of the comparison must know."""
    runs = (("A", a), ("B", b))
    if a.uri == b.uri:
        yield "A and B are one run."
    if ranks_only:
        yield "Ranks only: quartiles, medians and distances are left out; shares remain."
        if differing := _differences(a.info["measure"], b.info["measure"]):
            yield (
                "The measures differ, and types are matched by their piece: "
                f"{'; '.join(differing)}."
            )
    q3_a, q3_b = (
        {
            r["layer"]: r["q3"]
            for r in label_thresholds.labels(run).to_pylist()
            if r["population"] == "tokens" and r["layer"] in layers
        }
        for run in (a, b)
    )
    if q3_a == q3_b:
        yield "HIGH means the same in A and B: both label by the same Q3."
    else:
        yield (
            "HIGH is a rank within each run: A and B label by different Q3, so a HIGH share says "
            "nothing of raw "
            "strengths."
        )
    for name, run in runs:
        other = b if run is a else a
        if left_out := [k for k in run.info["layers"] if k not in layers]:
            yield f"Of {name} {_listed(left_out)} were not compared: {other.uri} has them not."
        if lost := losses.describe(losses.of_run(run)):
            yield f"{name} lost {lost}."
        if missing := run.info.get("quarantined"):
            yield f"{name} lacks {count(len(missing), 'shard')} of its corpus, quarantined."
        if "sources" not in run.info["tables"]:
            yield f"Sources were not compared: {name} was made without a table of them."
    if (language := a.info["config"].get("language")) != (
        theirs := b.info["config"].get("language")
    ):
        yield (
            f"Function words are those of {language!r} in A and of {theirs!r} in B, so classes "
            "differ by that too."
        )
    labels = [info["measure"].get("labels") for info in (a.info, b.info)]
    if labels[0] != labels[1]:
        of_a, of_b = (
            "guessed" if column is None else f"the tags in {column!r}" for column in labels
        )
        yield f"Classes are {of_a} in A and {of_b} in B, so they differ by that too."
    words = [info.get("function_words") for info in (a.info, b.info)]
    if words[0] != words[1]:
        yield (
            f"Function words are from {words[0]} in A and from {words[1]} in B, so classes may "
            "differ by that too."
        )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values of bounded size.

    It lists the movers with the lowest q, the most frequent new and vanished types, and the sources
    with the largest KS distance: at most ``JSON_ROWS`` of each. The total numbers are those at the
    deepest layer.
    """
    drift, movers = comparison.drift, comparison.movers
    whole = pc.is_null(drift["source"])
    sources = drift.filter(pc.invert(whole)).sort_by(
        [("ks", "descending"), ("layer", "descending")]
    )
    unknown = pc.is_null(sources["ks"])  # new and vanished sources come first
    sources = pa.concat_tables([sources.filter(unknown), sources.filter(pc.invert(unknown))])
    of_status = {
        s: movers.filter(pc.equal(movers["status"], s)) for s in ("both", "new", "vanished")
    }
    both = of_status["both"].append_column("size", pc.abs(of_status["both"]["z"]))
    surest = both.sort_by([("q", "ascending"), ("size", "descending")]).drop_columns("size")
    deepest = max(drift["layer"].to_pylist())
    body: dict[str, Any] = {
        "schema_version": JSON_VERSION,
        **{name: describe(run) for name, run in (("a", comparison.a), ("b", comparison.b))},
        "notes": list(comparison.notes),
        "drift": drift.filter(whole).to_pylist(),
        "sources": sources.slice(0, JSON_ROWS).to_pylist(),
        "classes": comparison.classes.to_pylist(),
        "movers": surest.slice(0, JSON_ROWS).to_pylist(),
        "n_sources": len(_at(sources, deepest)),
        "n_types": len(_at(surest, deepest)),
        "n_moved": num_moved(_at(movers, deepest)),
    }
    for status in ("new", "vanished"):  # the same types in every layer
        rows = of_status[status].filter(pc.equal(of_status[status]["layer"], deepest))
        body[status] = [
            {k: r[k] for k in ("token_id", "token", "text", "class", "n_a", "n_b")}
            for r in rows.slice(0, JSON_ROWS).to_pylist()
        ]
        body[f"n_{status}"] = len(rows)
    return body


def _at(table: pa.Table, layer: int) -> pa.Table:
    return table.filter(pc.equal(table["layer"], layer))


def describe(run: RunFolder) -> dict[str, Any]:
    """The facts that identify a run, as plain values."""
    info = run.info
    return {
        "uri": run.uri,
        "id": run.id,
        "corpus": list(info["config"]["corpus"]),
        "model": info["model"]["name"],
        "measure": info["measure"]["id"],
        "tokens": info["counts"]["tokens"] - info["counts"]["special"],
        "documents": info["counts"]["documents"],
        "created_at": info["created_at"],
        "finished_at": info["finished_at"],
    }


def whole_words(types: pa.Table) -> pa.Table:
    """Rows of ``types`` that may stand in a list of words: their ``class`` is no part of a word."""
    return types.filter(pc.invert(pc.is_in(types["class"], pa.array(PARTS_OF_WORDS))))


def moved(movers: pa.Table) -> pa.Table:
    """Rows of ``movers`` whose HIGH share moved: their q is below ``SIGNIFICANT``."""
    return movers.filter(pc.fill_null(pc.less(movers["q"], SIGNIFICANT), False))


def num_moved(movers: pa.Table) -> int:
    """Number of rows of ``movers`` with a q below ``SIGNIFICANT``."""
    return len(moved(movers))
