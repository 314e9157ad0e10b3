"""Colours of quartiles and of ranks, with enough contrast on light and on dark."""

from __future__ import annotations

LIGHT = {
    0: ("#1c2024", "#ffffff"),
    2: ("#10202c", "#cfe3f1"),
    3: ("#241a00", "#f8ce7c"),
    4: ("#ffffff", "#b23a0e"),
}
DARK = {
    0: ("#e4e7ea", "#15181c"),
    2: ("#eaf3fa", "#27485f"),
    3: ("#fff8e8", "#7a5200"),
    4: ("#2a0c00", "#ff9d66"),
}
"""Text and background colours of the page (0) and of quartiles 2 to 4.

The first quartile has the page's colours.
"""


def _ramp(low: str, high: str) -> list[tuple[str, str]]:
    """Text and background colours of the ten deciles of a heat map.

    The background is a mixture of ``low`` and ``high``; the text is black or white, whichever has
    more contrast.
    """
    colours = []
    for tenth in range(10):
        parts = []
        for i in (1, 3, 5):
            of_low = int(low[i : i + 2], 16)
            of_high = int(high[i : i + 2], 16)
            parts.append(round(of_low * (9 - tenth) / 9 + of_high * tenth / 9))
        linear = [p / 3294.6 if p <= 10 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in parts]
        luminance = sum(
            weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
        )
        colours.append(
            (
                "#000000" if luminance > 0.179 else "#ffffff",
                "#" + "".join(f"{p:02x}" for p in parts),
            )
        )
    return colours


LIGHT_HEAT = _ramp("#fdf3e7", LIGHT[4][1])
DARK_HEAT = _ramp("#20262c", DARK[4][1])
