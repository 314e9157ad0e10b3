"""The model card of the measure as data: figures by layer, to hold against those of papers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from afn_ray.show.summary import ClassShare, LayerFacts, RunSummary, summarise
from afn_ray.store import checksums, manifest

TRIMMED = "strength_trimmed"
"""Column of ``signals`` with the strength without the layer's outlier dimensions."""


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
    share_mean: float | None  # M / Q over the tokens of frequent types; None: not recorded
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


def card_of(run: manifest.RunFolder) -> Card:
    """The card of a complete run; reads only its small tables.

    Raises ``StoreError`` for a damaged run.
    """
    summary = summarise(run)
    with checksums.named_damage(run.uri):
        return _card(run, summary)


def _card(run: manifest.RunFolder, summary: RunSummary) -> Card:
    info = run.info
    measure, model, counts = info["measure"], info["model"], info["counts"]
    trimmed = {}
    if "signals" in info["tables"]:
        rows = manifest.read_table(run, "signals").to_pylist()
        trimmed = {row["layer"]: row for row in rows if row["signal"] == TRIMMED}
    moments: list[dict[str, Any]] = []
    if "moments" in info["tables"]:
        moments = manifest.read_table(run, "moments").to_pylist()
    dimensions = dict(zip(measure["layers"], measure.get("outliers", ()), strict=False))
    layers = tuple(
        replace(
            _layer(facts, trimmed.get(facts.layer), dimensions.get(facts.layer, ())),
            share_mean=_share_mean([row for row in moments if row["layer"] == facts.layer]),
        )
        for facts in summary.layers
    )
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
        layers=layers,
    )


def _layer(facts: LayerFacts, trimmed: dict[str, Any] | None, dimensions: Any) -> LayerCard:
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
        share_mean=None,
        classes=facts.classes,
    )


def _share_left_out(strength: dict[str, Any], trimmed: dict[str, Any]) -> float | None:
    """Share of the sum of squared norms that the trimmed norms lack; None without tokens."""
    whole, rest = _mean_square(strength), _mean_square(trimmed)
    return max(0.0, 1 - rest / whole) if whole else None


def _share_mean(rows: list[dict[str, Any]]) -> float | None:
    """M / Q over the tokens of the types in ``rows``, of ``MOMENTS_SCHEMA``; None without any."""
    whole = sum(row["n"] * row["second_moment"] for row in rows)
    return sum(row["n"] * row["squared_mean"] for row in rows) / whole if whole else None


def _mean_square(row: dict[str, Any]) -> float:
    """Mean square of the values that ``row``, of thresholds or of signals, describes."""
    return float(row["mean"] ** 2 + row["sd"] ** 2) if row["n"] else 0.0


def to_json(card: Card) -> dict[str, Any]:
    """The card as plain values; class shares include their interval."""
    return asdict(card)
