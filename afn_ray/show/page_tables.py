"""Tables of the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce import compare, losses
from afn_ray.reduce.group_drift import GroupDrift
from afn_ray.reduce.groups import group_name
from afn_ray.show.figures import cut, number, percent
from afn_ray.show.summary import RunSummary
from afn_ray.store import manifest

MAX_ROWS = 20
"""Largest number of rows of a table with one row for each type or source."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with ``heads``; its first ``left`` columns are text, the others figures."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def glance(
    summary: RunSummary, comparison: compare.Comparison | None
) -> list[tuple[str, str, str]]:
    """Cards at the top of the page: a figure, its name, and the value to compare it with."""
    counts = summary.info["counts"]
    main = summary.layers[-1]
    first = summary.layers[0]
    cards = [
        (
            f"{counts['tokens'] - counts['special']:,}",
            "tokens",
            f"and {counts['special']:,} special ones, apart",
        ),
        (
            f"{counts['documents']:,}",
            "documents",
            f"{counts['quarantined']:,} quarantined, {counts['empty']:,} empty",
        ),
    ]
    if (lost := summary.losses).any:
        against = f"{losses.rounded_up(lost.share)} of the corpus: {losses.documents_text(lost)}"
        cards.append((losses.bytes_text(lost.lost_bytes), "lost", against))
    for share, control in list(zip(main.shown_classes, first.shown_classes, strict=True))[
        :1
    ]:  # content, where there are content words
        against = (
            f"at layer 0, the control: {percent(control.share)}"
            if first.layer == 0
            else "layer 0 not recorded"
        )
        cards.append(
            (
                percent(share.share),
                f"of {share.name} {main.unit}s are HIGH at layer {main.layer}",
                against,
            )
        )
    if main.idf_auc is not None:
        cards.append(
            (
                number(main.idf_auc, 2),
                "AUC of rarity alone for HIGH",
                "0.5 tells nothing, 1 tells all",
            )
        )
    drift = [] if comparison is None else drift_of_all_tokens(comparison)
    for row in drift:
        if row["layer"] == main.layer:
            cards.append(
                (
                    number(row["psi"], 4),
                    f"PSI since the baseline, layer {main.layer}",
                    _reading(row["psi"]),
                )
            )
    return cards


def _reading(psi: float | None) -> str:
    """Conventional reading of a population stability index."""
    if psi is None:
        return "not known: ranks only"
    if psi == 0:
        return "exactly the same"
    if psi < 0.1:
        return "little"
    return "some" if psi < 0.25 else "much"


def thresholds_table(summary: RunSummary) -> Table:
    rows = []
    for facts in summary.layers:
        own, frozen = facts.thresholds, facts.labels["tokens"]
        of = {"all": own["tokens"]}
        if own["tokens"]["n_sinks"]:
            of["without sinks"] = own["tokens_without_sinks"]
        if frozen != own["tokens"]:
            of["all, frozen"] = frozen
        for name, row in of.items():
            rows.append(
                (
                    str(facts.layer),
                    name,
                    f"{row['n']:,}",
                    *(number(row[q]) for q in ("q1", "q2", "q3", "max")),
                    number(_ratio(row["sd"], row["mean"]), 3),
                    number(_ratio(row["q3"], row["q2"]), 3),
                    percent(_ratio(row["n_high"], row["n"])),
                    "" if name == "without sinks" else f"{row['n_sinks']:,}",
                )
            )
    heads = ("layer", "of", "tokens", "Q1", "Q2", "Q3", "max", "CV", "Q3/Q2", "HIGH", "sinks")
    return Table(
        "Quartiles of the strengths; a token at or above Q3 is HIGH", heads, tuple(rows), left=2
    )


def _ratio(value: float | None, of: float | None) -> float | None:
    """``value`` over ``of``; None where there is no value, or ``of`` is 0."""
    return value / of if value is not None and of else None


def sources_table(run: manifest.RunFolder, layer: int) -> Table | None:
    """The largest sources; None for a run without a table of sources."""
    if "sources" not in run.info["tables"]:
        return None
    table = manifest.read_table(run, "sources")
    here = table.filter(pc.equal(table["layer"], layer)).drop_columns(["bins", "counts"])
    rows = here.sort_by([("n", "descending")])
    some = f", the largest {MAX_ROWS} of {len(rows):,}" if len(rows) > MAX_ROWS else ""
    cells = []
    for row in rows.slice(0, MAX_ROWS).to_pylist():
        high = percent(_ratio(row["n_high"], row["n"]))
        cells.append((row["source"], f"{row['n_docs']:,}", f"{row['n']:,}", high))
    caption = f"Sources at layer {layer}{some}"
    return Table(caption, ("source", "documents", "tokens", "HIGH"), tuple(cells))


def groups_table(run: manifest.RunFolder, layer: int) -> Table | None:
    """The largest groups with their own thresholds; None for a run without groups."""
    if "groups" not in run.info["tables"]:
        return None
    table = manifest.read_table(run, "groups").drop_columns(["bins", "counts"])
    rows = table.filter(pc.equal(table["layer"], layer)).sort_by([("n", "descending")])
    some = f", the largest {MAX_ROWS} of {len(rows):,}" if len(rows) > MAX_ROWS else ""
    cells = []
    for row in rows.slice(0, MAX_ROWS).to_pylist():
        name = group_name(row["group"])
        quartiles = [number(row[q]) for q in ("q1", "q2", "q3")]
        high = percent(_ratio(row["n_high"], row["n"]))
        cells.append((name, f"{row['n_docs']:,}", f"{row['n']:,}", *quartiles, high))
    heads = ("group", "documents", "tokens", "Q1", "Q2", "Q3", "HIGH")
    caption = f"Groups by {run.info['config']['group_by']} at layer {layer}{some}"
    return Table(caption, heads, tuple(cells))


def kept_table(run: manifest.RunFolder) -> Table | None:
    """The kept columns; None for a run without them."""
    if "kept" not in run.info["tables"]:
        return None
    rows = manifest.read_table(run, "kept").to_pylist()
    cells = []
    for row in rows:
        counts = [f"{row[name]:,}" for name in ("n", "n_lacking", "n_refused")]
        cells.append((row["name"], row["type"], row["example"] or "", *counts))
    heads = ("column", "type", "first value left out", "documents", "without it", "left out")
    return Table("Columns of the corpus that documents carry", heads, tuple(cells), left=3)


def files_table(run: manifest.RunFolder) -> Table | None:
    """The files with most bytes lost or characters replaced; None without any."""
    table = manifest.read_table(run, "files")
    lossy = pc.or_(losses.lost_something(table), pc.greater(table["n_replaced"], 0))
    order = [("lost_bytes", "descending"), ("n_replaced", "descending"), ("source", "ascending")]
    rows = table.filter(lossy).sort_by(order)
    if not len(rows):
        return None
    caption = "Files that were not read as a whole" + (
        f", the worst {MAX_ROWS} of {len(rows):,}" if len(rows) > MAX_ROWS else ""
    )
    cells = (
        (
            row["source"],
            losses.bytes_text(row["num_bytes"]),
            losses.bytes_text(row["lost_bytes"]),
            losses.rounded_down(row["share_read"]),
            _lost_documents_text(row),
            f"{row['n_replaced']:,}",
        )
        for row in rows.slice(0, MAX_ROWS).to_pylist()
    )
    heads = ("file", "size", "lost", "read", "documents lost", "characters replaced")
    return Table(caption, heads, tuple(cells))


def _lost_documents_text(row: Mapping[str, Any]) -> str:
    known = f"{row['lost_documents']:,}"
    if not row["lost_unknown"]:
        return known
    return f"{known} or more" if row["lost_documents"] else "unknown"


def drift_of_all_tokens(comparison: compare.Comparison) -> list[dict[str, Any]]:
    """The rows of all tokens, one for each layer."""
    return [r for r in comparison.drift.to_pylist() if r["source"] is None]


@dataclass(frozen=True, slots=True)
class DriftTables:
    """The tables of changes; those with many rows for each layer are of ``layer`` only."""

    layer: int
    layers: Table
    sources: Table
    num_sources: int
    groups: Table | None
    classes: Table
    num_both: int  # words or types in both runs
    kind: str
    num_moved: int
    new: Table
    vanished: Table


def drift_tables(comparison: compare.Comparison, layer: int) -> DriftTables:
    """The tables of changes at ``layer``."""
    rows = comparison.drift.to_pylist()
    of_layers = [row for row in rows if row["source"] is None]
    of_sources = [row for row in rows if row["source"] is not None and row["layer"] == layer]
    table, kind = comparison.movers_to_read, comparison.kind
    movers = table.filter(pc.equal(table["layer"], layer))
    of_status = {}
    for status in ("both", "new", "vanished"):
        of_status[status] = movers.filter(pc.equal(movers["status"], status))
    return DriftTables(
        layer=layer,
        layers=_layers_table(of_layers),
        sources=_drift_of_sources(of_sources, layer),
        num_sources=len(of_sources),
        groups=_drift_of_groups(comparison.groups, layer),
        classes=_classes_table(comparison.classes_to_read, layer, kind),
        num_both=len(of_status["both"]),
        kind=kind,
        num_moved=len(compare.moved(movers)),
        new=_types_table(of_status["new"], "n_b", f"New {kind}s", kind),
        vanished=_types_table(of_status["vanished"], "n_a", f"Vanished {kind}s", kind),
    )


DRIFT_HEADS = (
    "tokens before",
    "now",
    "Q1 before",
    "now",
    "Q2 before",
    "now",
    "Q3 before",
    "now",
    "HIGH before",
    "now",
    "PSI",
    "KS",
    "JS",
)
"""Heads of the columns of ``_drift_cells``."""


def _drift_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Tokens, thresholds, HIGH shares and distances of one row of the drift."""
    cells = [f"{row['n_a']:,}", f"{row['n_b']:,}"]
    for quartile in ("q1", "q2", "q3"):
        cells.append(number(row[f"{quartile}_a"]))
        cells.append(number(row[f"{quartile}_b"]))
    cells.append(percent(row["share_high_a"]))
    cells.append(percent(row["share_high_b"]))
    for distance in ("psi", "ks", "js"):
        cells.append(number(row[distance], 4))
    return tuple(cells)


def _layers_table(drift: Sequence[Mapping[str, Any]]) -> Table:
    rows = tuple((str(row["layer"]), *_drift_cells(row)) for row in drift)
    return Table("Strengths, all tokens", ("layer", *DRIFT_HEADS), rows)


def _furthest(drift: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows whose strengths changed most; new and vanished ones, which have no KS, first."""

    def order(row: Mapping[str, Any]) -> tuple[bool, float, int]:
        distance = row["ks"]
        num_tokens = row["n_a"] + row["n_b"]
        return distance is not None, -(distance or 0.0), -num_tokens

    return sorted(drift, key=order)[:MAX_ROWS]


def _drift_of_groups(found: GroupDrift, layer: int) -> Table | None:
    """The groups whose strengths changed most; None without groups in both runs."""
    if found.by is None:
        return None
    here = found.drift.filter(pc.equal(found.drift["layer"], layer)).to_pylist()
    rows = tuple((group_name(row["group"]), *_drift_cells(row)) for row in _furthest(here))
    caption = f"Groups by {found.by} at layer {layer}, the furthest by KS first"
    return Table(caption, ("group", *DRIFT_HEADS), rows)


def _drift_of_sources(drift: Sequence[Mapping[str, Any]], layer: int) -> Table:
    """The sources whose strengths changed most."""
    furthest = _furthest(drift)
    rows = tuple((row["source"], *_drift_cells(row)) for row in furthest)
    caption = f"Sources at layer {layer}, the furthest by KS first"
    return Table(caption, ("source", *DRIFT_HEADS), rows)


def _classes_table(classes: pa.Table, layer: int, kind: str) -> Table:
    unit = "words" if kind == "word" else "tokens"
    rows = []
    for row in classes.to_pylist():
        if row["layer"] != layer:
            continue
        cells = [row["class"], f"{row['n_a']:,}", f"{row['n_b']:,}"]
        cells += [percent(row["share_a"]), percent(row["share_b"])]
        for run in "ab":
            share = row[f"share_high_{run}"]
            low, high = row[f"share_high_low_{run}"], row[f"share_high_high_{run}"]
            cells.append(f"{share:.3f} ({low:.3f}–{high:.3f})")
        rows.append(tuple(cells))
    caption = (
        f"Classes at layer {layer}: their part of the {unit}, and the share of theirs that is HIGH "
        "(95 % interval)"
    )
    heads = ("class", f"{unit} before", "now", "part before", "now", "HIGH before", "now")
    return Table(caption, heads, tuple(rows))


def _types_table(types: pa.Table, n: str, caption: str, kind: str) -> Table:
    key = "word" if kind == "word" else "token_id"
    words = compare.whole_words(types).sort_by([(n, "descending"), (key, "ascending")])
    rows = words.slice(0, MAX_ROWS).to_pylist()
    ab = n[-1]
    some = (
        f"{caption}, the most frequent {len(rows)} words of {len(types):,} {kind}s"
        if len(types) > len(rows)
        else caption
    )
    cells = (
        (cut(r["text"]), r["class"], f"{r[n]:,}", percent(r[f"share_high_{ab}"])) for r in rows
    )
    return Table(some, ("word", "class", "n", "HIGH"), tuple(cells), left=2)
