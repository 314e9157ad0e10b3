"""The charts of a series' nights: what they mark, and the tables that stand for them."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from afn_ray.schema import HISTORY_SCHEMA
from afn_ray.show.history_charts import DRAWN, history_charts

vl_convert = pytest.importorskip("vl_convert")


def night(n: int, **changes: Any) -> dict[str, Any]:
    row = {
        "run": f"r{n}",
        "measure": "m",
        "began_at": datetime(2026, 11, 1, 3) + timedelta(days=n),
        "partition": date(2026, 11, 1) + timedelta(days=n),
        "layer": 8,
        "n_tokens": 1000 + n,
        "n_documents": 10,
        "n_quarantined": None if n == 2 else n,
        "q3": 14.5,
        "share_high": 0.25,
        "classes": [],
        "psi": n / 100 if n else None,
        "ks": n / 200 if n else None,
        "state": "held",
        "broken": [],
        "warned": [],
    }
    return row | changes


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), HISTORY_SCHEMA)


NIGHTS = table(
    night(0),
    night(1, state="broken", broken=["psi", "<b>ks</b>"]),
    night(1, layer=0, psi=9.0),
    night(1, group_by="lang", group="de", psi=8.0),
    night(2, state=None),
    night(2, run="again", state="not judged"),
    night(3, warned=["ks"]),
)


def test_each_chart_has_each_night_of_the_whole_corpus_with_its_state() -> None:
    charts = history_charts(NIGHTS, 8)
    assert [chart.name for chart in charts] == [f"history-{name}" for name in DRAWN]
    names = ["2026-11-01", "2026-11-02", "2026-11-03", "2026-11-03 (2)", "2026-11-04"]
    for name, chart in zip(DRAWN, charts, strict=True):
        values = chart.spec["data"]["values"]
        assert [v["night"] for v in values] == names
        assert [v["state"] for v in values] == [
            "held",
            "broken",
            "no audit",
            "not judged",
            "warned",
        ]
        expected = [
            row[name] for row in NIGHTS.to_pylist() if row["layer"] == 8 and row["group_by"] is None
        ]
        assert [v["value"] for v in values] == expected
        assert [row[:2] for row in chart.table.rows] == list(
            zip(names, [v["state"] for v in values], strict=True)
        )
    marks = charts[0].spec["layer"][1]["encoding"]
    shapes = dict(zip(*(marks["shape"]["scale"][k] for k in ("domain", "range")), strict=True))
    assert shapes == {
        "warned": "triangle-up",
        "held": "circle",
        "broken": "cross",
        "not judged": "diamond",
        "no audit": "circle",
    }


def test_the_table_has_the_figures_of_a_night() -> None:
    rows = history_charts(NIGHTS, 8)[0].table.rows
    assert rows[1] == (
        "2026-11-02",
        "broken",
        "psi, <b>ks</b>",
        "1,001",
        "10",
        "1",
        "14.500",
        "25.0%",
        "0.0100",
        "0.0050",
    )
    assert rows[0][-2:] == ("–", "–") and rows[2][5] == "–"


def test_one_night_is_no_chart() -> None:
    assert history_charts(NIGHTS.slice(0, 1), 8) == [] and history_charts(NIGHTS, 0) == []


def test_vega_draws_a_mark_for_each_night_and_a_larger_cross_for_a_broken_one() -> None:
    spec = history_charts(
        table(*(night(n, state="broken" if n == 7 else "held") for n in range(30))), 8
    )[1].spec
    svg = vl_convert.vegalite_to_svg({**spec, "width": 600})
    marks = [line for line in svg.split("<path") if 'aria-roledescription="point"' in line]
    assert len(marks) == 30
    sizes = {len(mark.partition('d="')[2].partition('"')[0].split(",")) for mark in marks}
    assert len(sizes) == 2  # circles and one cross
