"""Building blocks of Vega-Lite charts; their colours are CSS variables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pyarrow as pa

from afn_ray import notebook
from afn_ray.classes import CLASSES
from afn_ray.show import pictures
from afn_ray.show.page_tables import Table
from afn_ray.text import printable

VegaSpec = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chart:
    """A Vega-Lite ``spec`` with the name that the page uses for it, and its figures as a table.

    Colours in ``spec`` are CSS variables of the page; ``png`` draws it without a page.
    """

    name: str
    title: str
    spec: VegaSpec
    table: Table

    def __repr__(self) -> str:
        return f"<Chart {self.name}: {printable(self.title)}>"

    def png(self, scale: float = 2.0) -> bytes:
        """The chart as a PNG picture, ``scale`` times its size.

        Raises ``ConfigError`` without the package ``vl-convert-python`` of ``afn-ray[report]``.
        """
        return pictures.png(self.spec, scale)

    def _repr_png_(self) -> bytes | None:
        """The picture for a notebook; None: ``_repr_html_`` shows the figures instead."""
        return self.png(scale=1) if find_spec("vl_convert") else None

    def _repr_html_(self) -> str | None:
        if find_spec("vl_convert"):
            return None
        columns = zip(*self.table.rows, strict=True)
        figures = dict(zip(self.table.heads, map(list, columns), strict=True))
        return notebook.table(self.table.caption, pa.table(figures))


INK = "var(--ink)"
FAINT = "var(--faint)"
RULE = "var(--rule)"
NOW = "var(--now)"
BEFORE = "var(--before)"
SHARE_AXIS = {"format": ".0%", "tickCount": 5}
ROW_AXIS = {"labelColor": INK, "labelFontSize": 13, "grid": True}
ALL_OF_IT = {"domain": [0, 1]}
DASHED = {"type": "rule", "strokeDash": [3, 2]}
DOT = {"type": "point", "filled": True, "size": 80, "opacity": 1}
LINE = {"type": "line", "strokeWidth": 2}
CONFIG: VegaSpec = {
    "font": "system-ui, sans-serif", "background": None, "view": {"stroke": None},
    "axis": {
        "labelColor": FAINT, "titleColor": FAINT, "gridColor": RULE, "domainColor": RULE,
        "tickColor": RULE,
        "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 240,
    },
    "legend": {"labelColor": INK, "labelFontSize": 12, "orient": "top", "columns": 3,
               "symbolOpacity": 1},
    "text": {"fill": FAINT, "fontSize": 11},
    "rule": {"stroke": FAINT},
}  # fmt: skip


def chart_spec(
    title: str,
    height: int,
    layers: list[VegaSpec],
    values: list[VegaSpec] | None = None,
    **more: Any,
) -> VegaSpec:
    spec: VegaSpec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": title,
        "config": CONFIG,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
    }
    if values is not None:
        spec["data"] = {"values": values}
    spec["layer"] = layers
    return spec | more


def quantity(field: str, title: str | None = None, **more: Any) -> VegaSpec:
    """Encoding of a quantity."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def category(field: str, title: str | None = None, **more: Any) -> VegaSpec:
    """Encoding of a name or another category."""
    return {"field": field, "type": "nominal", "title": title, **more}


def intervals(place: VegaSpec) -> VegaSpec:
    """Layer of a rule from ``low`` to ``high`` for each row that has them, at the rest of
    ``place``.
    """
    return {
        "transform": [{"filter": "isValid(datum.low)"}],
        "mark": {"type": "rule", "strokeWidth": 2},
        "encoding": {**place, "x": quantity("low"), "x2": {"field": "high"}},
    }


def colours_of(field: str, names: Sequence[str], colours: Sequence[str]) -> VegaSpec:
    """Encoding of a category by colour."""
    scale = {"domain": list(names), "range": list(colours)}
    return category(field, sort=list(names), scale=scale)


def class_colours(names: Sequence[str]) -> VegaSpec:
    """Encoding of the class ``names`` by colour; they are tags in a run with tags."""
    if set(names) <= set(CLASSES):
        return colours_of("class", names, [f"var(--{name})" for name in names])
    scale = {"domain": list(names), "scheme": "tableau20"}
    return category("class", sort=list(names), scale=scale)
