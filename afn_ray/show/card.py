"""The model card of the measure as data: figures by layer, to hold against those of papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook
from afn_ray.query.database import Run, folder_of
from afn_ray.reduce.mean_vectors import flat
from afn_ray.reduce.tables import Moments, SignalRow
from afn_ray.show.summary import ClassShare, LayerFacts, RunSummary, ratio, summarise
from afn_ray.store import checksums, manifest

TRIMMED = "strength_trimmed"
"""Column with the strength without the layer's outlier dimensions."""
CENTRED = "strength_centred_mean"
"""Column with the distance from the layer's mean state."""
LAYER_FIGURES = pa.schema(
    [
        ("layer", pa.int16()),
        ("n", pa.int64()),
        ("median", pa.float32()),
        ("cv", pa.float64()),
        ("max", pa.float32()),
        ("special_max", pa.float32()),
        ("n_sinks", pa.int64()),
        ("outlier_dimensions", pa.list_(pa.int32())),
        ("outlier_share", pa.float64()),
        ("centred", pa.float32()),
    ]
)
"""Columns of ``Card.table``, fields of ``LayerCard``; ``centred`` is the median distance."""


class Distances(NamedTuple):
    """Distances of the tokens from the layer's mean state; None: no tokens."""

    median: float | None
    cv: float | None
    max: float | None


class MomentShares(NamedTuple):
    """Shares of the second moment Q of the tokens of frequent types, which add up to 1.

    As in Yamagiwa and Shimodaira 2025: Q is the squared norm of the mean of all these tokens, plus
    the variance of the types' means, weighted by their tokens, plus the mean variance within types.
    """

    mean: float
    between: float
    within: float


@dataclass(frozen=True, slots=True)
class LayerCard:
    """Figures of one layer over the tokens of the sample, special ones apart; None: no tokens."""

    layer: int
    n: int
    median: float | None
    cv: float | None  # standard deviation over mean
    max: float | None
    special_max: float | None  # largest strength of a special token
    n_sinks: int
    outlier_dimensions: tuple[int, ...]  # the largest first; empty: not recorded
    outlier_share: float | None  # their share of the squared norms; None: not recorded
    centred: Distances | None  # None: not recorded
    moment_shares: MomentShares | None  # None: not recorded
    classes: tuple[ClassShare, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A model card of the measure: the model, the sample of text, and figures by layer."""

    run: str  # URI
    model: str
    model_type: str
    depth: int  # blocks
    hidden_size: int
    dtype: str
    corpus: tuple[str, ...]
    documents: int
    tokens: int  # special ones included
    special: int
    window_tokens: int
    sink_factor: float  # a sink is stronger than this many medians
    thresholds: str | None  # where the thresholds that decide HIGH come from; None: this run's own
    layers: tuple[LayerCard, ...]

    @property
    def table(self) -> pa.Table:
        """One row for each layer, with the columns of ``LAYER_FIGURES``."""
        rows = []
        for layer in self.layers:
            centred = layer.centred
            row = asdict(layer) | {"centred": None if centred is None else centred.median}
            rows.append({name: row[name] for name in LAYER_FIGURES.names})
        return pa.Table.from_pylist(rows, LAYER_FIGURES)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        return notebook.table("Model card of the measure", self.table)


def card_of(run: str | manifest.RunFolder | Run) -> Card:
    """The card of a complete run; reads only its small tables.

    ``run`` is a run's URI, a store's URI for its latest complete run, or a run. Raises
    ``StoreError`` if there is no such run, or if it is damaged.
    """
    folder = folder_of(run)
    summary = summarise(folder)
    with checksums.named_damage(folder.uri):
        return _card(folder, summary)


def _card(run: manifest.RunFolder, summary: RunSummary) -> Card:
    info = run.info
    measure, model, counts = info["measure"], info["model"], info["counts"]
    signals: dict[tuple[str, int], SignalRow] = {}
    if "signals" in info["tables"]:
        rows = manifest.read_table(run, "signals").to_pylist()
        signals = {(row["signal"], row["layer"]): row for row in rows}
    moments: dict[int, MomentShares] = {}
    if "moments" in info["tables"]:
        moments = _moment_shares(run)
    dimensions = dict(zip(measure["layers"], measure.get("outliers", ()), strict=False))
    layers = []
    for facts in summary.layers:
        k = facts.layer
        layer = _layer(facts, signals.get((TRIMMED, k)), dimensions.get(k, ()))
        centred = _distances(signals.get((CENTRED, k)))
        layers.append(replace(layer, centred=centred, moment_shares=moments.get(k)))
    return Card(
        run=run.uri,
        model=model["name"],
        model_type=model["type"],
        depth=model["depth"],
        hidden_size=model["hidden_size"],
        dtype=measure["dtype"],
        corpus=tuple(info["config"]["corpus"]),
        documents=counts["documents"],
        tokens=counts["tokens"],
        special=counts["special"],
        window_tokens=measure["window_tokens"],
        sink_factor=summary.layers[0].thresholds["tokens"]["sink_factor"],
        thresholds=info["config"].get("thresholds"),
        layers=tuple(layers),
    )


def _layer(facts: LayerFacts, trimmed: SignalRow | None, dimensions: Sequence[int]) -> LayerCard:
    main = facts.thresholds["tokens"]
    return LayerCard(
        layer=facts.layer,
        n=main["n"],
        median=main["q2"],
        cv=facts.cv if main["mean"] else None,
        max=main["max"],
        special_max=facts.special_max,
        n_sinks=main["n_sinks"],
        outlier_dimensions=tuple(dimensions),
        outlier_share=None if trimmed is None else _share_left_out(main, trimmed),
        centred=None,
        moment_shares=None,
        classes=facts.classes,
    )


def _share_left_out(strength: Moments, trimmed: Moments) -> float | None:
    """Share of the sum of squared norms that the trimmed norms lack; None without tokens."""
    whole, rest = _mean_square(strength), _mean_square(trimmed)
    return max(0.0, 1 - rest / whole) if whole else None


def _distances(row: SignalRow | None) -> Distances | None:
    """The distribution in ``row``; None without it."""
    if row is None:
        return None
    cv = ratio(row["sd"], row["mean"]) if row["mean"] else None
    return Distances(row["q2"], cv, row["max"])


def _moment_shares(run: manifest.RunFolder) -> dict[int, MomentShares]:
    """The shares at each layer with tokens of frequent types, from the run's mean vectors."""
    moments, vectors = (manifest.read_table(run, name) for name in ("moments", "mean_vectors"))
    shares = {}
    for layer in run.info["layers"]:
        here = moments.filter(pc.equal(moments["layer"], layer))
        means = vectors.filter(pc.equal(vectors["layer"], layer))
        if not len(here):
            continue
        n, q, m, v = (
            here[name].to_numpy().astype(np.float64)
            for name in ("n", "second_moment", "squared_mean", "variance")
        )
        of_types = flat(means["mean"]).reshape(len(n), -1).astype(np.float64)
        mean = n @ of_types / n.sum()
        common, whole = float(mean @ mean), float(n @ q / n.sum())
        if whole:
            between = max(0.0, float(n @ m / n.sum()) - common)
            within = float(n @ v / n.sum())
            shares[layer] = MomentShares(common / whole, between / whole, within / whole)
    return shares


def _mean_square(row: Moments) -> float:
    """Mean square of the values that ``row`` describes; 0 without any."""
    if not row["n"]:
        return 0.0
    mean, sd = row["mean"], row["sd"]
    if mean is None or sd is None:
        raise ValueError(f"{row['n']:,} values have no mean or no sd")
    return mean**2 + sd**2


def to_json(card: Card) -> dict[str, object]:
    """The card as plain values; class shares include their interval."""
    value = asdict(card)
    for layer in value["layers"]:
        for name in ("centred", "moment_shares"):
            if (figures := layer[name]) is not None:
                layer[name] = figures._asdict()
    return value
