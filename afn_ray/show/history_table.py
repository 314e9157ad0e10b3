"""The history of a series for a terminal of 80 columns, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date, datetime
from typing import Any

import pyarrow.compute as pc

from afn_ray.errors import ConfigError
from afn_ray.reduce.history import History
from afn_ray.text import count

MAX_LINE = 80
"""Width of a line, in characters; longer names are cut."""
MAX_SERIES = 20
"""Number of other series that are named."""
HEADS = ("night", "tokens", "docs", "quar.", "Q3", "HIGH", "PSI", "KS", "verdict")
WIDTHS = (16, 6, 6, 5, 8, 6, 7, 6, 10)
UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
"""Units of large numbers, the largest first."""


def lines(found: History, layer: int | None = None) -> Iterator[str]:
    """The nights of ``found`` as a table, one line a night, then what was broken.

    ``layer`` None is the deepest. Raises ``ConfigError`` for a layer that no night has.
    """
    rows = found.table.filter(pc.is_null(found.table["group_by"])).to_pylist()
    layers = sorted({row["layer"] for row in rows})
    shown = max(layers, default=None) if layer is None else layer
    if shown not in layers:
        raise ConfigError(f"layer {shown} was not recorded; there are {layers}")
    nights = [row for row in rows if row["layer"] == shown]
    yield _cut(f"Series {found.series}")
    yield f"Layer {shown}, {len(nights):,} of {count(found.num_runs, 'run')}, the newest last"
    yield ""
    yield _line(HEADS)
    for row in nights:
        yield _line(_cells(row))
    for row in nights:
        if row["broken"]:
            yield _cut(f"{night_name(row)} broke {', '.join(row['broken'])}")
        if row["accepted"] is not None:
            yield _cut(f"{night_name(row)} was accepted: {row['accepted']}")
        if row["warned"]:
            yield _cut(f"{night_name(row)} warned of {', '.join(row['warned'])}")
    num_other = sum(row["base"] != nights[-1]["base"] for row in nights)
    if num_other:
        yield f"{count(num_other, 'run')} of another measure: their strengths are no comparison"
    if found.others:
        yield "Other series of this store, for --series:"
        yield from (_cut(f"  {name}") for name in found.others[:MAX_SERIES])
        if (num_more := len(found.others) - MAX_SERIES) > 0:
            yield f"  and {num_more:,} more"


def night_name(row: Mapping[str, Any]) -> str:
    """The date of a row's partition; when its run began, in UTC, if it has none."""
    day: date | None = row["partition"]
    began: datetime = row["began_at"]
    return began.isoformat(" ", "minutes") if day is None else day.isoformat()


def verdict_name(row: Mapping[str, Any]) -> str:
    """The state of a night for people; a night that holds with a warning is "warned"."""
    if row["state"] == "held" and row["warned"]:
        return "warned"
    return row["state"] or "no audit"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    quarantined = row["n_quarantined"]
    return (
        night_name(row),
        _short(row["n_tokens"]),
        _short(row["n_documents"]),
        "" if quarantined is None else _short(quarantined),
        _float(row["q3"], ".5g"),
        _float(row["share_high"], ".1%"),
        _float(row["psi"], ".4f"),
        _float(row["ks"], ".4f"),
        verdict_name(row),
    )


def _line(cells: tuple[str, ...]) -> str:
    """``cells`` in columns: the first and the last are text, the others figures."""
    (night, width_of_night), *figures, (verdict, _) = zip(cells, WIDTHS, strict=True)
    padded = [night.ljust(width_of_night)]
    for figure, width in figures:
        padded.append(figure.rjust(width))
    return _cut(" ".join([*padded, verdict]))


def _short(n: int) -> str:
    """``n`` in at most six characters: 9,999, then 10.0k, 12.3M."""
    for unit, name in UNITS:
        if n >= unit and n >= 10_000:
            return f"{n / unit:.3g}{name}" if n < 999.5 * unit else f"{n / unit:.0f}{name}"
    return f"{n:,}"


def _float(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LINE else text[: MAX_LINE - 1] + "…"


def to_json(found: History) -> dict[str, object]:
    """All rows of ``found`` as plain values; times and dates are ISO 8601, in UTC."""
    rows = found.table.to_pylist()
    for row in rows:
        row["began_at"] = row["began_at"].isoformat(timespec="milliseconds") + "Z"
        if row["partition"] is not None:
            row["partition"] = row["partition"].isoformat()
    return {
        "series": found.series,
        "num_runs": found.num_runs,
        "other_series": list(found.others),
        "nights": rows,
    }
