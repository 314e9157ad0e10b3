"""The summary of a run as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook
from afn_ray.classes import in_order
from afn_ray.query.database import Run, folder_of
from afn_ray.reduce import language_uses, losses
from afn_ray.reduce.drift import table_by_layer
from afn_ray.reduce.losses import Losses
from afn_ray.reduce.stats import auc, wilson
from afn_ray.reduce.tables import ThresholdRow
from afn_ray.run_info import RunInfo
from afn_ray.show import provenance
from afn_ray.store import checksums, label_thresholds, manifest

MAX_CLASSES = 24
"""Number of classes that a table or chart shows, the most frequent; a corpus may have more tags."""

LAYERS = pa.schema(
    [
        ("layer", pa.int16()),
        ("n", pa.int64()),
        ("q1", pa.float32()),
        ("q2", pa.float32()),
        ("q3", pa.float32()),
        ("max", pa.float32()),
        ("mean", pa.float64()),
        ("n_sinks", pa.int64()),
        ("cv", pa.float64()),
        ("q3_over_q2", pa.float64()),
        ("idf_auc", pa.float64()),
    ]
)
"""Columns of ``RunSummary.table``, over all tokens except special ones.

``q1`` to ``q3``, ``max`` and ``mean`` are strengths; ``LayerFacts`` says what the last three are.
"""
CLASS_SHARES = pa.schema(
    [
        ("layer", pa.int16()),
        ("name", pa.string()),
        ("n", pa.int64()),
        ("n_high", pa.int64()),
        ("share", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
"""Columns of ``RunSummary.classes``, the fields of ``ClassShare``."""


@dataclass(frozen=True, slots=True)
class ClassShare:
    """Share of a class's tokens or words that is HIGH at a layer, with Wilson's 95 % interval."""

    layer: int
    name: str
    n: int
    n_high: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The thresholds of one layer, and figures to judge them by."""

    layer: int
    thresholds: dict[str, ThresholdRow]  # by population
    labels: dict[str, ThresholdRow]  # those that decide HIGH: frozen ones, or the run's own
    cv: float  # sd / mean of all tokens except special ones
    q3_over_q2: float
    special_mean: float | None  # mean strength of the special tokens
    special_max: float | None  # their largest
    idf_auc: float | None  # AUC of rarity alone for HIGH; 0.5 is chance
    classes: tuple[ClassShare, ...]  # of tokens, by their types
    word_classes: tuple[ClassShare, ...] = ()  # of words; empty: the run has no table of words

    @property
    def shown_classes(self) -> tuple[ClassShare, ...]:
        """The classes that people read: of words if the run has them, else of tokens.

        A word is HIGH if its strongest token is.
        """
        return self.word_classes or self.classes

    @property
    def unit(self) -> str:
        """Unit that ``shown_classes`` count: word or token."""
        return "word" if self.word_classes else "token"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run's summary."""

    uri: str
    info: RunInfo
    bytes_per_token: dict[
        str, float
    ]  # keys: tokens, documents, summary, neurons, pairs, vectors, all
    padding_share: float
    losses: Losses
    skipped: str  # files left out of the corpus, in words
    layers: tuple[LayerFacts, ...]
    languages: str  # detected ones and their shares, in words; empty: they were not detected

    @property
    def table(self) -> pa.Table:
        """One row for each layer, with the columns of ``LAYERS``."""
        rows = []
        for facts in self.layers:
            beside = {"cv": facts.cv, "q3_over_q2": facts.q3_over_q2, "idf_auc": facts.idf_auc}
            rows.append({**facts.thresholds["tokens"], **beside})
        return pa.Table.from_pylist(rows, LAYERS)

    @property
    def classes(self) -> pa.Table:
        """One row for each class at each layer, with the columns of ``CLASS_SHARES``.

        They are classes of words if the run counted words, else of tokens.
        """
        rows = [asdict(share) for facts in self.layers for share in facts.shown_classes]
        return pa.Table.from_pylist(rows, CLASS_SHARES)

    @property
    def is_frozen(self) -> bool:
        """True if frozen thresholds decide HIGH, and not the run's own."""
        return any(facts.labels != facts.thresholds for facts in self.layers)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        if self.is_frozen:
            thresholds = notebook.table(
                "Thresholds of the run, which do not decide HIGH", self.table
            )
            labels = [facts.labels["tokens"] for facts in self.layers]
            thresholds += notebook.table(
                f"Frozen thresholds, of {self.info['config']['thresholds']} (a token at or above "
                "Q3 is HIGH)",
                pa.Table.from_pylist(labels, LAYERS).select(["layer", "q1", "q2", "q3"]),
            )
        else:
            caption = "Thresholds (a token at or above Q3 is HIGH)"
            thresholds = notebook.table(caption, self.table)
        title = f"Which classes of {self.layers[-1].unit}s are HIGH (share, 95 % interval)"
        return thresholds + notebook.table(title, self.classes)


def summarise(run: str | manifest.RunFolder | Run) -> RunSummary:
    """The summary of a complete run; reads only its small tables.

    ``run`` is a run's URI, a store's URI for its latest complete run, or a run. Raises
    ``StoreError`` if there is no such run, or if it is damaged.
    """
    folder = folder_of(run)
    with checksums.named_damage(folder.uri):
        return _summarise(folder)


def _summarise(run: manifest.RunFolder) -> RunSummary:
    thresholds = manifest.read_table(run, "thresholds").to_pylist()
    labels = label_thresholds.labels(run).to_pylist()
    vocabulary = table_by_layer(run, "vocabulary", ("class", "n", "n_high", "idf"))
    of_words = table_by_layer(run, "word_vocabulary", ("class", "n", "n_high"))
    histogram = manifest.read_table(run, "histogram")
    shards = manifest.read_table(run, "shards")
    files = manifest.read_table(run, "files")
    n = max(1, sum(shards["n_tokens"].to_pylist()))
    size = {
        t: sum(shards[f"{c}_bytes"].to_pylist()) / n
        for t, c in (
            ("tokens", "token"),
            ("documents", "document"),
            ("summary", "summary"),
            ("neurons", "neurons"),
            ("pairs", "pairs"),
        )
    }
    if "vectors_bytes" in shards.column_names:
        size["vectors"] = (pc.sum(shards["vectors_bytes"]).as_py() or 0) / n
    counts = run.info["counts"]
    layers = []
    for layer in run.info["layers"]:
        rows = {r["population"]: r for r in thresholds if r["layer"] == layer}
        main = rows["tokens"]
        strengths = histogram.filter(pc.equal(histogram["layer"], layer))
        special = strengths.filter(strengths["special"])
        layers.append(
            LayerFacts(
                layer=layer,
                thresholds=rows,
                labels={r["population"]: r for r in labels if r["layer"] == layer},
                cv=ratio(main["sd"], main["mean"]),
                q3_over_q2=ratio(main["q3"], main["q2"]),
                special_mean=_mean(special),
                special_max=pc.max(special["strength"]).as_py(),
                idf_auc=_idf_auc(vocabulary[layer]),
                classes=_class_shares(layer, vocabulary[layer]),
                word_classes=_class_shares(layer, of_words[layer]) if of_words else (),
            )
        )
    languages = ""
    if "languages" in run.info["tables"]:
        languages = language_uses.describe(manifest.read_table(run, "languages"))
    padding = 1 - n / max(1, counts["forward_tokens"])
    return RunSummary(
        uri=run.uri,
        info=run.info,
        bytes_per_token={**size, "all": sum(size.values())},
        padding_share=max(0.0, padding),
        losses=losses.total(files),
        skipped=losses.describe_skipped(losses.skipped_files(files)),
        layers=tuple(layers),
        languages=languages,
    )


def ratio(a: float | None, b: float | None) -> float:
    """``a`` over ``b``; 0 where ``b`` is 0 or null. Raises ``TypeError`` for a null ``a``."""
    if not b:
        return 0.0
    if a is None:
        raise TypeError("a figure is null beside one that is not")
    return a / b


def _mean(rows: Any) -> float | None:
    if not len(rows):
        return None
    n = rows["n"].to_numpy()
    strengths = rows["strength"].to_numpy().astype(np.float64)
    return float(strengths @ n / n.sum())


def _class_shares(layer: int, vocabulary: pa.Table) -> tuple[ClassShare, ...]:
    sums = vocabulary.group_by("class").aggregate([("n", "sum"), ("n_high", "sum")])
    of_class = {row["class"]: row for row in sums.to_pylist()}
    shares = []
    for name in in_order(of_class):
        total = of_class[name]["n_sum"]
        high = of_class[name]["n_high_sum"]
        if total and name != "special":
            low, upper = wilson(high, total)
            shares.append(
                ClassShare(layer, name, total, high, high / total, float(low), float(upper))
            )
    return tuple(shares)


def by_frequency(classes: Sequence[ClassShare]) -> list[int]:
    """Indices of ``classes``, the most frequent first; they are valid at every layer."""
    return sorted(range(len(classes)), key=lambda at: -classes[at].n)


def frequent_classes(facts: LayerFacts) -> list[int]:
    """Indices of the ``MAX_CLASSES`` most frequent of ``facts.shown_classes``, ascending."""
    return sorted(by_frequency(facts.shown_classes)[:MAX_CLASSES])


def _idf_auc(vocabulary: pa.Table) -> float | None:
    """Probability that a HIGH token's type is rarer than a LOW token's; ties count half.

    Exact, from the counts.
    """
    normal = pc.not_equal(vocabulary["class"], "special").to_numpy()
    idf = vocabulary["idf"].to_numpy()[normal]
    high = vocabulary["n_high"].to_numpy()[normal].astype(np.float64)
    low = vocabulary["n"].to_numpy()[normal] - high
    if not high.sum() or not low.sum():
        return None
    _, at = np.unique(idf, return_inverse=True)
    return float(auc(np.bincount(at, high), np.bincount(at, low)))


def to_json(summary: RunSummary) -> dict[str, object]:
    """The summary as plain values: class shares with their interval, and the command to repeat."""
    return asdict(summary) | {"command": provenance.command_line(summary.info["config"])}
