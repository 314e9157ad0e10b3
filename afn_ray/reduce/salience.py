"""Salience beyond frequency: the HIGH share of a type against that of others like it.

``expected`` is the HIGH share that a type would have if its tokens were as often HIGH as the model
of ``smooth`` says for its frequency, and their positions and document lengths. The model is fitted
at each layer to the cells of ``controls``. A type counts there as at most ``MOST_TOKENS`` tokens,
so that a few frequent ones do not make the curve, and what is expected of a type is without its own
tokens.

The interval is clustered by document: Wilson's, with as many tokens as independent draws would be
as sure (Korn and Graubard 1998). That number is n / d, where d is the ratio of two variances of the
share: that of sums by document, and that of independent tokens. A type in few documents says little
of its own d. So its variance is averaged with the one that it has if tokens of one type and
document are correlated as they are in the whole run; the latter counts as ``PRIOR_DOCS`` documents.
The interval of the difference has the error of what is expected too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.arithmetic import exp, gram, log2, multiplied, quadratic, total
from afn_ray.reduce.controls import NUM_PLACES, ControlSums, bins_of_places, frequency_bins
from afn_ray.reduce.histogram import Histogram, starts
from afn_ray.reduce.smooth import Fit, fit
from afn_ray.reduce.stats import Z_95, Float64s, Ints, wilson
from afn_ray.schema import SALIENCE_SCHEMA

MOST_TOKENS = 20
"""Largest weight of a type in the fit, in tokens."""
PRIOR_DOCS = 20
"""Weight of the correlation in the whole run against that of a type, in documents."""
LEAST_LEFT = 0.05
"""Smallest divisor of the step that takes a type out; a type that is nearly all text has less."""
MOST_ODDS = 350.0
"""Largest log-odds, in absolute value, of a type and of a place; the product of two is finite."""
SLICE_KEYS = 1 << 18
"""Number of pairs of a type and a place that are computed at a time."""


class ControlCells(NamedTuple):
    """Counts that a model is fitted to; they add up over units."""

    sizes: Histogram  # units by their number of tokens
    tokens: Histogram  # keys: bin of the frequency * NUM_PLACES + place
    high: tuple[Histogram, ...]  # of HIGH tokens, by layer


def salience_table(
    layers: Sequence[int], vocabulary: pa.Table, bins: Ints, sums: Sequence[Histogram]
) -> pa.Table:
    """The ``salience`` table: every type of ``vocabulary`` but special ones, layer by layer.

    ``bins`` are those of ``Controls``; ``sums`` are a ``ControlSums``, flat.
    """
    counted = ControlSums.of_flat(sums)
    tables = [SALIENCE_SCHEMA.empty_table()]
    if not len(counted.tokens.keys):
        return tables[0]
    types, places = np.divmod(counted.tokens.keys, NUM_PLACES)
    tokens = Histogram.of(bins[types] * NUM_PLACES + places, counted.tokens.counts)
    for at, layer in enumerate(layers):
        is_normal = (pc.field("layer") == layer) & (pc.field("class") != "special")
        here = vocabulary.filter(is_normal).sort_by("token_id")
        units = {name: here[name].to_numpy() for name in ("n", "n_docs", "n_high")}
        units["number"] = here["token_id"].to_numpy()
        cells = ControlCells(Histogram.of(units["n"].astype(np.int64)), tokens, counted.high)
        columns = {
            "layer": np.full(len(here), layer),
            "token_id": units["number"],
            **salience_columns(units, cells, counted, at),
        }
        arrays = [pa.array(columns[field.name], field.type) for field in SALIENCE_SCHEMA]
        tables.append(pa.Table.from_arrays(arrays, schema=SALIENCE_SCHEMA))
    return pa.concat_tables(tables).combine_chunks()


def salience_columns(
    units: Mapping[str, Ints], cells: ControlCells, counted: ControlSums, at: int
) -> dict[str, Float64s]:
    """Columns of ``SALIENCE_SCHEMA`` on each of ``units``, types or words, at layer number ``at``.

    ``units`` has their ``number`` in the keys of ``counted``, ascending, ``n``, ``n_docs`` and
    ``n_high``, all [n_units]. ``cells`` may count more units.
    """
    n_effective = effective_tokens(units, counted, at)
    expected = expected_shares(fit_cells(cells, at), units, n_effective, counted.tokens)
    share = units["n_high"] / units["n"]
    return {
        "n_effective": n_effective,
        "expected": expected.share,
        **beyond(share, n_effective, expected),
    }


def beyond(share: Float64s, n_effective: Float64s, expected: Expected) -> dict[str, Float64s]:
    """Distance of each HIGH share from what is expected, with its interval.

    The intervals of the two are combined as by Zou and Donner (2008).
    """
    low, high = wilson(share * n_effective, n_effective)
    difference = share - expected.share
    of_expected = Z_95 * expected.sd
    return {
        "beyond": difference,
        "beyond_low": difference - _root_of_squares(share - low, of_expected),
        "beyond_high": difference + _root_of_squares(high - share, of_expected),
    }


def _root_of_squares(a: Float64s, b: Float64s) -> Float64s:
    """Root of a^2 + b^2; unlike ``hypot``, the same bits on any machine."""
    return np.asarray(np.sqrt(a * a + b * b))


def fit_cells(cells: ControlCells, at: int) -> Fit:
    """The model of layer number ``at`` of ``cells``, in which each unit has ``MOST_TOKENS`` at
    most.
    """
    n = cells.sizes.keys
    num_units = cells.sizes.counts
    bins = frequency_bins(n)
    capped = np.minimum(n, MOST_TOKENS) * num_units
    of_bins = np.bincount(bins, capped)
    with np.errstate(invalid="ignore"):  # of bins without a unit
        frequency = np.bincount(bins, capped * log2(n.astype(np.float64))) / of_bins
        weight = of_bins / np.bincount(bins, n * num_units)
    bin_of, place = np.divmod(cells.tokens.keys, NUM_PLACES)
    position, length = bins_of_places()
    controls = np.stack([frequency[bin_of], position[place], length[place]], axis=1)
    n_high = cells.high[at].counts_of(cells.tokens.keys)
    return fit(controls, cells.tokens.counts * weight[bin_of], n_high * weight[bin_of])


class Expected(NamedTuple):
    """HIGH share that the model of all other types expects of each type, [n_types]."""

    share: Float64s
    sd: Float64s  # standard error of the share, over documents


def expected_shares(
    model: Fit, types: Mapping[str, Ints], n_effective: Float64s, tokens: Histogram
) -> Expected:
    """The HIGH share expected of each of ``types``, by ascending id, without its own tokens.

    ``tokens`` are those of types by place. The log-odds without a type are those of ``model`` moved
    by one Newton step (Pregibon 1981), in which the type stands at the mean of its places. The
    error comes from the errors of the shares of all other types, as if these were independent.
    """
    n = types["n"]
    observed = types["n_high"] / types["n"]
    design = _design(model, n, tokens)
    share, spread = _shares(model, n, tokens, np.zeros(len(n)))
    reach = quadratic(design, model.inverse)
    weight = np.minimum(n, MOST_TOKENS)
    left = np.maximum(1 - weight * spread * reach, LEAST_LEFT)  # 1 less the leverage of the type
    without, spread = _shares(model, n, tokens, -weight * (observed - share) * reach / left)
    score = weight * weight * observed * (1 - observed) / n_effective  # variance of a type's pull
    scores = multiplied(multiplied(model.inverse, gram(design, score)), model.inverse)
    of_all = quadratic(design, scores)
    of_others = np.maximum(of_all - score * reach * reach, 0) / (left * left)
    return Expected(without, spread * np.sqrt(of_others))


def _design(model: Fit, n: Ints, tokens: Histogram) -> Float64s:
    """Column of each type in the model, the mean over its tokens: [n_coefficients, n_types]."""
    places = [
        model.curves[at].basis(bins.astype(np.float64))
        for at, bins in enumerate(bins_of_places(), 1)
    ]
    rows = np.concatenate(places)
    of_frequency = model.curves[0].basis(log2(n.astype(np.float64)))
    found = np.concatenate([np.ones((1, len(n))), of_frequency, np.empty((len(rows), len(n)))])
    means = found[-len(rows) :]
    for some, keys, types in _slices(tokens):
        place = keys.keys % NUM_PLACES
        for mean, row in zip(means, rows, strict=True):
            mean[some] = np.bincount(types, row[place] * keys.counts)
    means /= n
    return found


def _shares(model: Fit, n: Ints, tokens: Histogram, moved: Float64s) -> tuple[Float64s, Float64s]:
    """Share of HIGH tokens of each type by ``model``, with its log-odds ``moved``, [n_types].

    Also the mean over tokens of p (1 - p), which is how far the share moves with the log-odds.
    """
    position, length = (bins.astype(np.float64) for bins in bins_of_places())
    of_place = model.curve(1, position) + model.curve(2, length)
    of_type = model.constant + model.curve(0, log2(n.astype(np.float64))) + moved
    against = [exp(np.clip(-log_odds, -MOST_ODDS, MOST_ODDS)) for log_odds in (of_type, of_place)]
    share = np.empty(len(n))
    spread = np.empty(len(n))
    for some, keys, types in _slices(tokens):
        p = 1 / (1 + against[0][some][types] * against[1][keys.keys % NUM_PLACES])
        of_keys = keys.counts * p
        share[some] = np.bincount(types, of_keys)
        spread[some] = np.bincount(types, of_keys * (1 - p))
    return share / n, spread / n


def _slices(tokens: Histogram) -> Iterator[tuple[slice, Histogram, Ints]]:
    """Types of ``tokens``, some at a time, with their keys, and the place
    in it of each key's type.
    """
    first = starts(tokens.keys // NUM_PLACES)
    begin = 0
    while begin < len(first):
        end = int(np.searchsorted(first, first[begin] + SLICE_KEYS))
        last = int(first[end]) if end < len(first) else len(tokens.keys)
        size = np.diff(first[begin:end], append=last)
        types = np.repeat(np.arange(end - begin), size)
        yield slice(begin, end), tokens.slice(int(first[begin]), last), types
        begin = end


def effective_tokens(types: Mapping[str, Ints], counted: ControlSums, at: int) -> Float64s:
    """Number of independent tokens that say as much of each type's HIGH share as its tokens do.

    ``types`` are as ``units`` in ``salience_columns``.
    """
    ids = types["number"].astype(np.int64)
    n = types["n"]
    n_docs = types["n_docs"]
    pairs = counted.pairs.counts_of(ids)
    mixed = counted.mixed_pairs[at].counts_of(ids)
    high = counted.high_pairs[at].counts_of(ids)
    p = types["n_high"] / n
    of_one = p * (1 - p)  # variance of a token
    # Sum over documents of the square of (HIGH tokens - p tokens), less that of independent tokens.
    excess = high - 2 * p * mixed + p * p * pairs
    of_pairs = float(total(of_one * pairs))
    correlation = 0.0
    if of_pairs:
        correlation = min(1.0, max(0.0, float(total(excess)) / of_pairs))
    usual = of_one / n * (1 + correlation * pairs / n)
    own = (excess + n * of_one) / n**2.0 * n_docs / np.maximum(n_docs - 1, 1)
    known = n**2.0 / (n + pairs) - 1  # 0 in one document, n - 1 in n
    variance = (known * own + PRIOR_DOCS * usual) / (known + PRIOR_DOCS)
    if_constant = n / (1 + correlation * pairs / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(of_one > 0, np.minimum(n, of_one / variance), if_constant)
    of_t = 1 + (Z_95**2 + 1) / (4 * (known + PRIOR_DOCS))  # t over z, to first order
    return np.asarray(found / of_t**2)
