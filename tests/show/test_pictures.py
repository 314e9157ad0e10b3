"""Charts as pictures: the same pixels in fewer bytes, in colours, and a table where none can be
drawn.
"""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import pytest

import afn_ray
from afn_ray.errors import ConfigError
from afn_ray.show import pictures, vega

STORE = str(Path(__file__).parents[1] / "data" / "store")
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def charts() -> dict[str, afn_ray.Chart]:
    return afn_ray.run_charts(STORE)


def chunks_of(picture: bytes) -> dict[bytes, bytes]:
    """Data by kind of each chunk of a PNG picture; its checksums are right."""
    assert picture.startswith(SIGNATURE)
    found: dict[bytes, bytes] = {}
    at = len(SIGNATURE)
    while at < len(picture):
        (length,) = struct.unpack(">I", picture[at : at + 4])
        kind, data = picture[at + 4 : at + 8], picture[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", picture[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(kind + data)
        found[kind] = found.get(kind, b"") + data
        at += 12 + length
    return found


def test_every_chart_of_a_run_is_a_picture(charts: dict[str, afn_ray.Chart]) -> None:
    layers = {"layers-classes", "layers-spread"}
    assert charts.keys() == {"histogram-0", "histogram-2", "classes"} | layers
    for name, chart in charts.items():
        width, height = struct.unpack(">II", chunks_of(chart.png(1))[b"IHDR"][:8])
        assert width > pictures.WIDTH and height > 100, name
        assert chart._repr_html_() is None and chart._repr_png_() == chart.png(1)
        assert repr(chart) == f"<Chart {name}: {chart.title}>"


def test_a_picture_is_smaller_and_has_the_same_pixels(
    charts: dict[str, afn_ray.Chart], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = charts["classes"].png()
    monkeypatch.setattr(pictures, "_compressed", lambda picture: picture)
    large = charts["classes"].png()
    assert len(small) < len(large) / 2
    ours, theirs = chunks_of(small), chunks_of(large)
    assert ours.keys() == theirs.keys() and ours[b"IHDR"] == theirs[b"IHDR"]
    assert zlib.decompress(ours[b"IDAT"]) == zlib.decompress(theirs[b"IDAT"])


def test_text_that_looks_like_a_colour_is_no_colour(charts: dict[str, afn_ray.Chart]) -> None:
    chart = charts["classes"]
    named = {**chart.spec, "description": "var(--main-color)"}
    assert chunks_of(pictures.png(named, 1))[b"IDAT"]
    values = [{"class": "var(--ink)"}, {"class": "var(--main-color)"}]
    spec = {"data": {"values": values}, "mark": {"fill": "var(--ink)"}, "title": "a var(--ink)"}
    coloured = pictures._coloured(spec)
    assert coloured == {**spec, "mark": {"fill": coloured["mark"]["fill"]}}
    assert coloured["mark"]["fill"].startswith("#")


def test_a_chart_is_a_table_where_no_picture_can_be_drawn(
    charts: dict[str, afn_ray.Chart], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vega, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    chart = charts["classes"]
    assert chart._repr_png_() is None
    page = chart._repr_html_()
    assert page is not None and "rarity alone" in page
    assert page.count("<tr>") == 1 + len(chart.table.rows)
    with pytest.raises(ConfigError, match=r"vl-convert-python; pip install .*\[report\]"):
        chart.png()
