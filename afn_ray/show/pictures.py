"""Charts as PNG pictures, for notebooks and files: drawn in this process, in the page's light
colours.
"""

from __future__ import annotations

import re
import struct
import zlib
from functools import cache
from importlib import import_module, resources
from typing import Any

from afn_ray.errors import ConfigError

COLOUR = re.compile(r"var\(--([\w-]+)\)")
"""Form of a colour in a spec: a CSS variable of the page."""
WIDTH = 640
"""Width of a chart in a picture, without its axis, in pixels at scale 1."""


def png(spec: dict[str, Any], scale: float) -> bytes:
    """The picture of a Vega-Lite ``spec`` of ``vega.chart_spec``; it reads nothing from a network.

    Raises ``ConfigError`` without the package ``vl-convert-python`` of ``afn-ray[report]``.
    """
    try:
        vl_convert = import_module("vl_convert")
    except ImportError as error:
        raise ConfigError(
            'a picture needs the package vl-convert-python; pip install "afn-ray[report]"'
        ) from error
    drawn: dict[str, Any] = _coloured(spec)
    drawn["config"] |= {"background": _colours()["card"]}
    drawn["title"] = {"text": drawn["description"], "anchor": "start", "offset": 12}
    picture: bytes = vl_convert.vegalite_to_png(
        drawn | {"width": WIDTH, "autosize": "pad"}, scale=scale, allowed_base_urls=[]
    )
    return _compressed(picture)


def _coloured(part: Any) -> Any:
    """``part`` of a spec with the page's colours in place of their names; data stay as they are."""
    if isinstance(part, dict):
        return {key: v if key == "data" else _coloured(v) for key, v in part.items()}
    if isinstance(part, list | tuple):
        return [_coloured(element) for element in part]
    if isinstance(part, str) and (name := COLOUR.fullmatch(part)):
        return _colours().get(name[1], part)
    return part


def _compressed(picture: bytes) -> bytes:
    """The same PNG picture in about a quarter of the bytes: Vega's is hardly compressed."""
    start = picture[:8]
    chunks = b""
    pixels = b""
    at = 8
    while at < len(picture):
        (length,) = struct.unpack(">I", picture[at : at + 4])
        chunk = picture[at : at + 12 + length]  # length, kind, data, checksum
        if chunk[4:8] == b"IDAT":
            pixels += chunk[8:-4]
        elif chunk[4:8] != b"IEND":
            chunks += chunk
        at += len(chunk)
    packed = zlib.compress(zlib.decompress(pixels), 9)
    return start + chunks + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


@cache
def _colours() -> dict[str, str]:
    """The page's colours by name, as on a light screen."""
    css = resources.files("afn_ray.show").joinpath("report.css").read_text("utf-8")
    light = css.partition("@media")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
