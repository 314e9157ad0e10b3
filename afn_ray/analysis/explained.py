"""Share of HIGH that simple variables explain: the deviance of a smooth model, next to that of
none.

The models are those of ``reduce.smooth``, fitted to all tokens of the sample, each with weight 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.analysis.bootstrap import Sample, by_number
from afn_ray.query.expressions import is_high
from afn_ray.reduce.controls import (
    LONGEST,
    NUM_PLACES,
    bins_of_places,
    frequency_bins,
    places_of,
)
from afn_ray.reduce.smooth import deviance, fit
from afn_ray.reduce.stats import Float64s

MODELS: Mapping[str, tuple[int, ...]] = {
    "frequency, position and length": (0, 1, 2),
    "frequency alone": (0,),
    "position and length alone": (1, 2),
}
"""Models by what they know of a token; numbers are those of the controls."""


def null_deviance(n: Float64s, n_high: Float64s) -> Float64s:
    """Deviance of ``n`` tokens, ``n_high`` of them HIGH, that all have the same probability."""
    share = n_high / n
    return np.asarray(-2 * (n_high * np.log(share) + (n - n_high) * np.log1p(-share)))


def explained(n: Float64s, n_high: Float64s, of_model: Float64s) -> Float64s:
    """Share of the null deviance that a model explains (McFadden 1974)."""
    return np.asarray(1 - of_model / null_deviance(n, n_high))


class ControlModels:
    """Chance of each token to be HIGH by the ``MODELS``, at every layer of a sample."""

    def __init__(
        self,
        sample: Sample,
        n_of: npt.NDArray[Any],
        q3: Mapping[int, float | None],
    ) -> None:
        """``n_of`` are tokens of each type in the run, by id. ``q3`` is that of each layer."""
        self._bins = frequency_bins(n_of)
        docs, lengths = sample.ask("SELECT doc, n_tokens FROM documents WHERE n_tokens > 0")
        self._lengths = by_number(docs, lengths.astype(np.int64))
        cells, n, *high = self._cells(sample, n_of, q3)
        bin_of, place = np.divmod(cells, NUM_PLACES)
        in_bin = np.bincount(self._bins, n_of, len(self._bins))
        log_n = n_of * np.log2(np.maximum(n_of, 1))
        frequency = np.bincount(self._bins, log_n, len(self._bins))[bin_of] / in_bin[bin_of]
        position, length = bins_of_places()
        controls = np.stack([frequency, position[place], length[place]], axis=1)
        size = int(cells.max()) + 1
        self._log_odds: dict[int, dict[str, Float64s]] = {}
        for layer, n_high in zip(q3, high, strict=True):
            of_layer = self._log_odds.setdefault(layer, {})
            for name, which in MODELS.items():
                some = controls[:, which]
                of_layer[name] = np.zeros(size)
                of_layer[name][cells] = fit(some, n, n_high).log_odds(some)

    def _cells(
        self, sample: Sample, n_of: npt.NDArray[Any], q3: Mapping[int, float | None]
    ) -> list[npt.NDArray[Any]]:
        """Each cell with tokens in the sample, their number, and of HIGH ones at each layer."""
        long = np.arange(1, LONGEST + 1)
        first = places_of(np.zeros_like(long), long)
        all_equal = places_of(long - 1, long)
        bins = pa.table({"token_id": np.arange(len(n_of)), "bin": self._bins})
        lengths = pa.table({"up_to": long, "at_length": first, "at_position": all_equal - first})
        high = ", ".join(
            f"count(*) FILTER ({is_high(f'strength_{k}', f'$q3_{k}')})::DOUBLE" for k in q3
        )
        query = f"""
            SELECT bin * {NUM_PLACES} + l.at_length + p.at_position AS cell, count(*)::DOUBLE,
              {high}
            FROM (SELECT * FROM {sample.tokens})
            JOIN (SELECT doc, least(n_tokens, {LONGEST}) AS n FROM documents) USING (doc)
            JOIN bins USING (token_id)
            JOIN lengths AS l ON l.up_to = n
            JOIN lengths AS p ON p.up_to = least(position + 1, {LONGEST})
            GROUP BY 1 ORDER BY 1
        """  # noqa: S608 - names and numbers of this package
        sample.check_time()
        parameters = {f"q3_{k}": limit for k, limit in q3.items()}
        found = sample.run.sql(query, parameters, bins=bins, lengths=lengths).to_arrow_table()
        return [column.to_numpy() for column in found.columns]

    def terms(
        self, layer: int, columns: Mapping[str, npt.NDArray[Any]], high: npt.NDArray[np.bool_]
    ) -> dict[str, Float64s]:
        """Deviance of each token at ``layer`` by each model, from ``columns`` of tokens [n]."""
        places = places_of(columns["position"], self._lengths[columns["doc"]])
        cells = self._bins[columns["token_id"]] * NUM_PLACES + places
        return {
            f"deviance by {name}": deviance(
                log_odds[cells], np.ones(len(cells)), high.astype(np.float64)
            )
            for name, log_odds in self._log_odds[layer].items()
        }


def deviance_by_rank(n: Float64s, n_high: Float64s) -> Float64s:
    """Deviance of each group by a model whose one control is the rank of another variable.

    ``n`` and ``n_high`` are tokens and HIGH ones of each group and bin of ranks, [groups, bins].
    """
    there = np.flatnonzero(n.sum(axis=0))
    ranks = there[:, None].astype(np.float64)
    model = fit(ranks, n.sum(axis=0)[there], n_high.sum(axis=0)[there])
    of_cells = deviance(model.log_odds(ranks), n[:, there], n_high[:, there])
    return np.asarray(of_cells.sum(axis=1))
