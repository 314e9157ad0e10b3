"""Building blocks of Vega-Lite charts; their colours are CSS variables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from afn_ray.schema import CLASSES
from afn_ray.show.page_tables import Table

Spec = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chart:
    """A Vega-Lite ``spec`` with the name that the page uses for it, and its figures as a table."""

    name: str
    title: str
    spec: Spec
    table: Table


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


def chart_spec(
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


def quantity(field: str, title: str | None = None, **more: Any) -> Spec:
    """Encoding of a quantity."""
    return {"field": field, "type": "quantitative", "title": title, **more}


def category(field: str, title: str | None = None, **more: Any) -> Spec:
    """Encoding of a name or another category."""
    return {"field": field, "type": "nominal", "title": title, **more}


def colours_of(field: str, names: Sequence[str], colours: Sequence[str]) -> Spec:
    return category(field, sort=list(names), scale={"domain": list(names), "range": list(colours)})


def class_colours(names: Sequence[str]) -> Spec:
    if set(names) <= set(CLASSES):
        return colours_of("class", names, [f"var(--{name})" for name in names])
    return category(
        "class", sort=list(names), scale={"domain": list(names), "scheme": "tableau20"}
    )  # class names are tags
