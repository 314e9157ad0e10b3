"""Vega-Lite charts of a run's figures, each with a table of the same figures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis import bootstrap, claims, claims_text
from afn_ray.reduce import compare
from afn_ray.reduce.stats import midranks
from afn_ray.schema import CLASSES, in_order
from afn_ray.show import overview
from afn_ray.text import printable

MAX_POINTS = 6000
"""Number of types in the scatter, the most frequent ones; a browser can animate about as many."""
MAX_SCATTER_LAYERS = 12
MAX_ROWS = 20
"""Largest number of rows of a table with one row for each type or source."""
MAX_CHARS = 40
"""Largest length of a token in a table cell, in characters."""
NUM_BARS = 80
TAIL = 0.0005
"""Share of the tokens that a histogram leaves out at each end.

One sink would flatten all other bars.
"""
NUM_RARITY_BINS = 20

Floats = npt.NDArray[np.float64]
Spec = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """A table with ``heads``; its first ``left`` columns are text, the others figures."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


@dataclass(frozen=True, slots=True)
class Chart:
    """A Vega-Lite ``spec`` with the name that the page uses for it, and its figures as a table."""

    name: str
    title: str
    spec: Spec
    table: Table


# --- figures and words


def number(value: float | None, digits: int | None = None) -> str:
    """Format with five digits, or with ``digits`` decimals; a dash for None."""
    if value is None:
        return "–"
    return overview.figure(value) if digits is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Format as a percentage with one decimal; a dash for None."""
    return "–" if value is None else f"{value:.1%}"


def cut(text: str) -> str:
    """A token as a table cell: visible white space, no control characters, limited length."""
    text = printable(text, keep="\n\t").replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


# --- building blocks
# Colours are CSS variables of the page, so one chart works on light, on dark and on paper.

INK, FAINT, RULE, NOW, BEFORE = (
    f"var(--{name})" for name in ("ink", "faint", "rule", "now", "before")
)
SHARE_AXIS = {"format": ".0%", "tickCount": 5}
ROW_AXIS = {"labelColor": INK, "labelFontSize": 13, "grid": True}
ALL_OF_IT = {"domain": [0, 1]}
DASHED = {"type": "rule", "strokeDash": [3, 2]}
DOT = {"type": "point", "filled": True, "size": 80, "opacity": 1}
LINE = {"type": "line", "strokeWidth": 2}
CONFIG: Spec = {
    "font": "system-ui, sans-serif", "background": None, "view": {"stroke": None},
    "axis": {
        "labelColor": FAINT, "titleColor": FAINT, "gridColor": RULE, "domainColor": RULE, "tickColor": RULE,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 240,
    },
    "legend": {"labelColor": INK, "labelFontSize": 12, "orient": "top", "columns": 3, "symbolOpacity": 1},
    "text": {"fill": FAINT, "fontSize": 11},
    "rule": {"stroke": FAINT},
}  # fmt: skip


def _spec(
    title: str, height: int, layers: list[Spec], values: list[Spec] | None = None, **more: Any
) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": title,
        "config": CONFIG,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        **({} if values is None else {"data": {"values": values}}),
        "layer": layers,
        **more,
    }


def _of(field: str, title: str | None = None, **more: Any) -> Spec:
    """Encoding of a quantity."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def _by(field: str, title: str | None = None, **more: Any) -> Spec:
    """Encoding of a name or another category."""
    return {"field": field, "type": "nominal", "title": title, **more}


def _colours(field: str, names: Sequence[str], colours: Sequence[str]) -> Spec:
    return _by(field, sort=list(names), scale={"domain": list(names), "range": list(colours)})


def _class_colours(names: Sequence[str]) -> Spec:
    if set(names) <= set(CLASSES):
        return _colours("class", names, [f"var(--{name})" for name in names])
    return _by(
        "class", sort=list(names), scale={"domain": list(names), "scheme": "tableau20"}
    )  # class names are tags


# --- strengths


def _bars(histogram: pa.Table, layer: int, edges: Floats | None = None) -> tuple[Floats, Floats]:
    """Edges [NUM_BARS + 1] of the bars, and the share of the layer's tokens in each [NUM_BARS].

    Special tokens are left out.
    """
    here = histogram.filter((pc.field("layer") == layer) & ~pc.field("special"))
    strengths, n = (here[name].to_numpy().astype(np.float64) for name in ("strength", "n"))
    if edges is None:
        below = np.cumsum(n) / n.sum()
        low, high = (strengths[np.searchsorted(below, q)] for q in (TAIL, 1 - TAIL))
        edges = np.linspace(low, high if high > low else low + 1, NUM_BARS + 1)
    counts, _ = np.histogram(strengths, edges, weights=n)
    return edges, counts / n.sum()


def histogram_chart(
    layer: int, now: pa.Table, limits: Sequence[float], before: pa.Table | None
) -> Chart:
    """Histogram of strengths at ``layer``, coloured by quartile, with a line for the baseline.

    ``limits`` [3] are the thresholds Q1 to Q3. ``now`` and ``before`` are histogram tables;
    ``before`` is None without a baseline that has the layer.
    """
    edges, shares = _bars(now, layer)
    quartiles = 1 + np.searchsorted(limits, (edges[:-1] + edges[1:]) / 2, side="right")
    values = [
        {
            "from": round(float(a), 5),
            "to": round(float(b), 5),
            "share": round(float(s), 7),
            "quartile": int(q),
        }
        for a, b, s, q in zip(edges[:-1], edges[1:], shares, quartiles, strict=True)
    ]
    x = _of(
        "from",
        "strength",
        scale={"zero": False, "nice": False},
        axis={"grid": False, "tickCount": 6},
    )
    y = _of("share", axis={"format": ".1%", "tickCount": 4})
    tooltip = [
        _of("from", "from", format=".5~g"),
        _of("to", "to", format=".5~g"),
        _of("share", "of the tokens", format=".2%"),
        _of("quartile", "quartile"),
    ]
    colour = {"domain": [1, 2, 3, 4], "range": [f"var(--quartile-{i})" for i in (1, 2, 3, 4)]}
    layers: list[Spec] = [
        {
            "data": {"values": values},
            "mark": "rect",
            "encoding": {
                "x": x,
                "x2": {"field": "to"},
                "y": y,
                "y2": {"datum": 0},
                "tooltip": tooltip,
                "color": _by("quartile", scale=colour, legend=None),
            },
        }
    ]
    if before is not None:
        _, was = _bars(before, layer, edges)
        line = [
            {"from": v["from"], "share": round(float(s), 7)}
            for v, s in zip(values, was, strict=True)
        ]
        mark = {"type": "line", "interpolate": "step-after", "stroke": BEFORE, "strokeWidth": 1.5}
        layers.append({"data": {"values": line}, "mark": mark, "encoding": {"x": x, "y": y}})
    for i, (limit, align) in enumerate(zip(limits, ("right", "center", "left"), strict=True), 1):
        data = {"values": [{"from": float(limit), "name": f"Q{i}", "exact": number(limit)}]}
        mark = {"type": "text", "align": align, "baseline": "bottom", "y": -2}
        layers += [
            {
                "data": data,
                "mark": DASHED,
                "encoding": {"x": x, "tooltip": [_by("exact", f"Q{i}")]},
            },
            {"data": data, "mark": mark, "encoding": {"x": x, "text": {"field": "name"}}},
        ]
    name = f"Layer {layer}" + (" (embeddings, the control)" if layer == 0 else "")
    left_out = 1 - float(shares.sum())
    drawn = (
        "all tokens are drawn"
        if left_out < 1e-9
        else f"{left_out:.2%} of the tokens lie outside of what is drawn"
    )
    here = now.filter((pc.field("layer") == layer) & ~pc.field("special"))
    strengths, n = here["strength"].to_numpy(), here["n"].to_numpy()
    below = [float(n[strengths < limit].sum() / n.sum()) for limit in limits]
    rows = tuple(
        (f"Q{i}", number(q), percent(b))
        for i, (q, b) in enumerate(zip(limits, below, strict=True), 1)
    )
    return Chart(
        f"histogram-{layer}",
        name,
        _spec(f"Histogram of strengths, {name}, with its quartiles", 170, layers),
        Table(f"{name}: {drawn}", ("quartile", "strength", "of the tokens below"), rows),
    )


# --- classes and layers


def share_by_rarity(words: pa.Table) -> Floats:
    """HIGH share of each type if only its rarity mattered, [types].

    Types are ordered by idf and cut into at most ``NUM_RARITY_BINS`` bins of about the same number
    of tokens; types of one idf share a bin. A type gets the HIGH share of all tokens of its bin,
    its own tokens included.
    """
    n, n_high = (words[name].to_numpy().astype(np.float64) for name in ("n", "n_high"))
    middle = midranks(words["idf"].to_numpy(), n) / n.sum()
    bins = np.minimum((middle * NUM_RARITY_BINS).astype(np.int64), NUM_RARITY_BINS - 1)
    shares: Floats = (np.bincount(bins, n_high) / np.maximum(1, np.bincount(bins, n)))[bins]
    return shares


def classes_chart(summary: overview.Summary, words: pa.Table) -> Chart:
    """HIGH share of each class at the deepest layer, beside layer 0 and beside rarity alone.

    ``words``: rows of the vocabulary at the deepest layer, without special tokens.
    """
    main, first = summary.layers[-1], summary.layers[0]
    label = main.labels["tokens"]
    kinds = {f"layer {main.layer}": main} | (
        {"layer 0, the control": first} if first.layer == 0 != main.layer else {}
    )
    names = np.array(words["class"].to_pylist())
    n, rarity = words["n"].to_numpy(), share_by_rarity(words)
    values: list[Spec] = []
    rows = []
    drawn = [
        (at, main.classes[at].name, main.classes[at].n) for at in overview.frequent_classes(main)
    ]
    for at, name, total in drawn:
        shares = [facts.classes[at] for facts in kinds.values()]
        alone = float(n[names == name] @ rarity[names == name]) / total
        values += [
            {
                "class": name,
                "kind": kind,
                "share": c.share,
                "low": c.low,
                "high": c.high,
                "n": total,
            }
            for kind, c in zip(kinds, shares, strict=True)
        ]
        values.append({"class": name, "kind": "rarity alone", "share": alone, "n": total})
        rows.append(
            (
                name,
                f"{total:,}",
                *(f"{c.share:.3f} ({c.low:.3f}–{c.high:.3f})" for c in shares),
                f"{alone:.3f}",
            )
        )
    order = [*kinds, "rarity alone"]
    shapes = {"domain": order, "range": ["circle", "diamond", "cross"][-len(order) :]}
    place = {
        "y": _by("class", sort=[name for _, name, _ in drawn], axis=ROW_AXIS),
        "yOffset": _by("kind", sort=order),
        "color": _colours("kind", order, [NOW, BEFORE, FAINT][-len(order) :]),
    }
    x = _of("share", "share of the class's tokens that is HIGH", scale=ALL_OF_IT, axis=SHARE_AXIS)
    tooltip = [
        _by("class", "class"),
        _by("kind", "by"),
        _of("share", "share HIGH", format=".3f"),
        _of("low", "from", format=".3f"),
        _of("high", "to", format=".3f"),
        _of("n", "tokens", format=","),
    ]
    layers: list[Spec] = [
        {
            "data": {"values": [{"share": label["n_high"] / label["n"]}]},
            "mark": DASHED,
            "encoding": {"x": _of("share")},
        },
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {**place, "x": _of("low"), "x2": {"field": "high"}},
        },
        {
            "mark": DOT,
            "encoding": {
                **place,
                "shape": _by("kind", sort=order, scale=shapes),
                "x": x,
                "tooltip": tooltip,
            },
        },
    ]
    title = f"Share of each class that is HIGH at layer {main.layer}, beside its controls"
    heads = ("class", "tokens", *(f"{kind} (95 % interval)" for kind in kinds), "rarity alone")
    spec = _spec(title, 66 * len(drawn), layers, values)
    return Chart("classes", title, spec, Table(title, heads, tuple(rows)))


def layers_charts(summary: overview.Summary) -> list[Chart]:
    """Charts of figures comparable across layers: HIGH shares and ratios, not strengths."""
    x = _by("layer", "layer (0 = embeddings)", axis={"labelAngle": 0})
    drawn = overview.frequent_classes(summary.layers[0])
    names = [summary.layers[0].classes[at].name for at in drawn]
    values = [
        asdict(c) | {"class": c.name}
        for facts in summary.layers
        for c in (facts.classes[at] for at in drawn)
    ]
    place = {
        "x": x,
        "y": _of("share", "share HIGH", scale=ALL_OF_IT, axis=SHARE_AXIS),
        "color": _class_colours(names),
    }
    tooltip = [
        _by("class", "class"),
        _by("layer", "layer"),
        _of("share", "share HIGH", format=".3f"),
        _of("low", "from", format=".3f"),
        _of("high", "to", format=".3f"),
    ]
    title = "HIGH share of each class by layer"
    layers: list[Spec] = [
        {"mark": LINE, "encoding": place},
        {"mark": DOT, "encoding": {**place, "tooltip": tooltip}},
    ]
    rows = [
        (f"{facts.layer}", *(f"{facts.classes[at].share:.3f}" for at in drawn))
        for facts in summary.layers
    ]
    shares = Chart(
        "layers-classes",
        title,
        _spec(title, 260, layers, values),
        Table(title, ("layer", *names), tuple(rows)),
    )

    kinds = ("Q3 above the median", "CV (sd / mean)")
    values = [
        {"layer": facts.layer, "kind": kind, "value": value}
        for facts in summary.layers
        for kind, value in zip(kinds, (facts.q3_over_q2 - 1, facts.cv), strict=True)
    ]
    place = {
        "x": x,
        "y": _of("value", "ratio", axis=SHARE_AXIS),
        "color": _colours("kind", kinds, [NOW, BEFORE]),
    }
    tooltip = [_by("kind", "ratio"), _by("layer", "layer"), _of("value", "value", format=".2%")]
    title = "How far strengths spread, by layer"
    layers = [
        {"mark": LINE, "encoding": place},
        {"mark": DOT, "encoding": {**place, "tooltip": tooltip}},
    ]
    cells = tuple(
        (str(f.layer), percent(f.q3_over_q2 - 1), number(f.cv, 3), number(f.idf_auc, 2))
        for f in summary.layers
    )
    heads = ("layer", "Q3 above the median", "CV", "AUC of rarity alone")
    return [
        shares,
        Chart(
            "layers-spread", title, _spec(title, 260, layers, values), Table(title, heads, cells)
        ),
    ]


# --- claims


def claims_charts(found: claims.Claims, layer: int) -> list[tuple[str, str, list[Chart]]]:
    """For each claim its question, the sentence on its controls, and one chart per quantity.

    Charts show figures of ``layer``, of layer 0 and without a layer; for the claim about layers,
    those of all layers. The tables have every layer.
    """
    return [
        (
            question,
            claims_text.against_controls(mine),
            [
                _claim_chart(claim, what, [f for f in mine if f.what == what], layer)
                for what in dict.fromkeys(f.what for f in mine)
            ],
        )
        for claim, question in claims.CLAIMS.items()
        if (mine := [f for f in found.figures if f.claim == claim])
    ]


def _claim_chart(claim: str, what: str, figures: Sequence[bootstrap.Figure], layer: int) -> Chart:
    drawn = [f for f in figures if claim == "layers" or f.layer in (None, 0, layer)]
    values = [
        {
            "row": f.of if f.layer is None else f"{f.of}, layer {f.layer}",
            "value": f.value,
            "n": f.n,
            "kind": "control" if f.is_control else "figure",
            **({} if math.isnan(f.low) else {"low": f.low, "high": f.high}),
        }
        for f in drawn
    ]
    rows = [v["row"] for v in values]
    kinds = [k for k in ("figure", "control") if any(v["kind"] == k for v in values)]
    colours = [{"figure": NOW, "control": BEFORE}[k] for k in kinds]
    shapes = [{"figure": "circle", "control": "diamond"}[k] for k in kinds]
    place = {
        "y": _by("row", sort=rows, axis=ROW_AXIS),
        "color": _colours("kind", kinds, colours) | {"legend": None},
    }
    x = _of("value", axis={"tickCount": 5})
    tooltip = [
        _by("row", "of"),
        _by("kind", "is"),
        _of("value", "value", format=".3~r"),
        _of("low", "from", format=".3~r"),
        _of("high", "to", format=".3~r"),
        _of("n", "tokens", format=","),
    ]
    mark = {
        **place,
        "x": x,
        "tooltip": tooltip,
        "shape": _by("kind", scale={"domain": kinds, "range": shapes}, legend=None),
    }
    layers: list[Spec] = [{"mark": DOT, "encoding": mark}]
    if any("low" in v for v in values):  # Vega warns about a field that no row has
        layers.insert(
            0,
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {**place, "x": _of("low"), "x2": {"field": "high"}},
            },
        )
    cells = tuple(
        (
            f.of,
            "" if f.layer is None else str(f.layer),
            "control" if f.is_control else "",
            claims_text.shown(f.value),
            ""
            if math.isnan(f.low)
            else f"{claims_text.shown(f.low)} to {claims_text.shown(f.high)}",
            f"{f.n:,}",
            f"{f.n_docs:,}",
        )
        for f in figures
    )
    title = what[0].upper() + what[1:]
    heads = ("of", "layer", "", "value", "95 % interval", "tokens", "documents")
    name = "claim-" + "-".join(re.findall("[a-z0-9]+", f"{claim} {what}".lower()))
    spec = _spec(f"{claims.CLAIMS[claim]} {what}", 26 * len(values), layers, values)
    return Chart(name, title, spec, Table(title, heads, cells, left=3))


# --- vocabulary


def points(vocabulary: Mapping[int, pa.Table]) -> Spec:
    """Data of the scatter, in columns: the most frequent types and their HIGH counts by layer."""
    layers = list(vocabulary)
    deepest = vocabulary[layers[-1]]
    if len(layers) > MAX_SCATTER_LAYERS:
        layers = [
            layers[i]
            for i in np.linspace(0, len(layers) - 1, MAX_SCATTER_LAYERS).round().astype(int)
        ]
    types = deepest.sort_by([("n", "descending"), ("token_id", "ascending")]).slice(0, MAX_POINTS)
    n, ids = types["n"].to_numpy(), types["token_id"].to_numpy()
    n_high, classes = {}, in_order(types["class"].to_pylist())
    for layer in layers:
        by_id = vocabulary[layer].sort_by("token_id")
        at = np.searchsorted(by_id["token_id"].to_numpy(), ids)  # every layer has the same types
        n_high[str(layer)] = by_id["n_high"].to_numpy()[at].tolist()
    return {
        "text": [cut(text) for text in types["text"].to_pylist()],
        "n": n.tolist(),
        "n_high": n_high,
        "class": [classes.index(name) for name in types["class"].to_pylist()],
        "classes": classes,
        "layers": layers,
        "layer": layers[-1],
        "num_types": len(deepest),
        "share_of_tokens": float(n.sum() / deepest["n"].to_numpy().sum()),
    }


def vocabulary_chart(words: pa.Table) -> Chart:
    """Frequency against HIGH share, a point for each type.

    The page's script fills it from ``points`` and marks the types that match a search.
    """
    names = in_order(words["class"].to_pylist())
    most = int(words["n"].to_numpy().max())
    scale = {"type": "log", "domain": [0.9, max(2, most) * 1.3], "nice": False}
    place = {
        "x": _of(
            "n",
            "occurrences (log)",
            scale=scale,
            axis={"format": "~s", "tickCount": 6, "grid": False},
        ),
        "y": _of(
            "share", "share HIGH", scale={"domain": [-0.02, 1.02], "nice": False}, axis=SHARE_AXIS
        ),
    }
    tooltip = [
        _by("text", "type"),
        _by("class", "class"),
        _of("n", "n", format=","),
        _of("share", "share HIGH", format=".3f"),
    ]
    shown = place | {"color": _class_colours(names), "tooltip": tooltip}
    zoom = {
        "type": "interval",
        "zoom": "wheel![event.ctrlKey || event.metaKey]",
    }  # the wheel alone scrolls the page
    faded = {"condition": {"test": "query != ''", "value": 0.12}, "value": 0.5}
    curve = {"type": "line", "stroke": INK, "strokeWidth": 2, "strokeDash": [5, 3]}
    label = {"type": "text", "dy": -12, "fontSize": 13, "fontWeight": "bold", "fill": INK}
    layers: list[Spec] = [
        {
            "params": [{"name": "zoom", "bind": "scales", "select": zoom}],
            "mark": {"type": "point", "filled": True, "size": 22},
            "encoding": shown | {"opacity": faded},
        },
        {"data": {"name": "curve"}, "mark": curve, "encoding": place},
        {
            "transform": [{"filter": "query != '' && indexof(datum.key, query) >= 0"}],
            "mark": DOT | {"stroke": INK, "strokeWidth": 1.5},
            "encoding": shown,
        },
        {
            "transform": [{"filter": "query != '' && datum.key == query"}],
            "mark": label,
            "encoding": place | {"text": {"field": "text"}},
        },
    ]
    title = "Frequency against HIGH share, a point for each type"
    spec = _spec(
        title, 420, layers, data={"name": "types"}, params=[{"name": "query", "value": ""}]
    )
    frequent = compare.whole_words(words).sort_by([("n", "descending"), ("token_id", "ascending")])
    rows = frequent.slice(0, MAX_ROWS).to_pylist()
    cells = tuple(
        (cut(r["text"]), r["class"], f"{r['n']:,}", f"{r['share_high']:.3f}") for r in rows
    )
    return Chart(
        "vocabulary",
        title,
        spec,
        Table("The most frequent words", ("word", "class", "n", "HIGH"), cells, 2),
    )


def movers_chart(movers: pa.Table, layer: int) -> Chart | None:
    """Words with the most significant changes of HIGH share, before and now; None without any."""
    words = compare.whole_words(compare.moved(movers.filter(pc.field("layer") == layer)))
    rows = sorted(words.to_pylist(), key=lambda r: (r["q"], -abs(r["z"])))[:MAX_ROWS]
    if not rows:
        return None
    texts = [cut(r["text"]) for r in rows]
    names = [
        t if texts.count(t) == 1 else f"{t} ({r['token_id']})"
        for t, r in zip(texts, rows, strict=True)
    ]
    values = [
        {
            "type": name,
            "before": r["share_high_a"],
            "now": r["share_high_b"],
            "n_a": r["n_a"],
            "n_b": r["n_b"],
            "z": r["z"],
            "q": r["q"],
        }
        for name, r in zip(names, rows, strict=True)
    ]
    y = _by("type", sort=names, axis=ROW_AXIS)
    tooltip = [
        _by("type", "type"),
        _of("before", "HIGH before", format=".3f"),
        _of("now", "HIGH now", format=".3f"),
        _of("n_a", "n before", format=","),
        _of("n_b", "n now", format=","),
        _of("z", "z", format=".1f"),
        _of("q", "q", format=".2g"),
    ]
    colours = {"domain": ["before", "now"], "range": [BEFORE, NOW]}
    x = {"title": "share HIGH", "scale": ALL_OF_IT, "axis": SHARE_AXIS}
    layers: list[Spec] = [
        {
            "mark": {"type": "rule", "strokeWidth": 2},
            "encoding": {"y": y, "x": _of("before") | x, "x2": {"field": "now"}},
        },
        *(
            {
                "mark": DOT,
                "encoding": {
                    "y": y,
                    "x": _of(run) | x,
                    "tooltip": tooltip,
                    "color": {"datum": run, "scale": colours, "legend": {"title": None}},
                },
            }
            for run in ("before", "now")
        ),
    ]
    title = f"Words that moved most surely at layer {layer}"
    cells = tuple(
        (
            name,
            r["class"],
            f"{r['n_a']:,}",
            f"{r['n_b']:,}",
            number(r["share_high_a"], 3),
            number(r["share_high_b"], 3),
            number(r["median_a"]),
            number(r["median_b"]),
            number(r["z"], 1),
            f"{r['q']:.2g}",
        )
        for name, r in zip(names, rows, strict=True)
    )
    heads = (
        "word",
        "class",
        "n before",
        "now",
        "HIGH before",
        "now",
        "median before",
        "now",
        "z",
        "q",
    )
    return Chart(
        "movers", title, _spec(title, 24 * len(rows), layers, values), Table(title, heads, cells, 2)
    )
