"""The figures of a benchmark: speeds, ratios, and the differences of strengths."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from afn_ray.bench.team import Take, Team
from afn_ray.bench.texts import Text
from afn_ray.errors import ModelError

FOREIGN = 0.1
"""Largest share of the cores' time that other processes may use in a clean repetition."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative difference between two variants' strengths, by dtype.

One token in a hundred may differ more: ``compare`` uses the 99th percentile.
"""
BARS: dict[str, dict[str, float]] = {
    "engine/loop": {"short": 30, "full": 8},
    "engine/tuned": {"short": 1.25, "full": 1.05},
    "engine/ray_data": {"short": 1.4, "full": 1.15},
    "job/engine": {"short": 0.90, "full": 0.92},
    "engine mfu": {"short": 0.50, "full": 0.52},
}
"""Required ratio or MFU of BERT-base's shape on two cores with AMX, by figure and profile."""


@dataclass(frozen=True, slots=True)
class Counted:
    """Cost of one token in the blocks up to the layer, in floating-point operations."""

    linear: float  # per token
    attention: float  # per token and token of its window

    def flops(self, texts: Sequence[Text]) -> float:
        """Floating-point operations of the model on ``texts``, without padding.

        Tokens that two windows share count in both, because every variant computes them twice.
        """
        return sum(
            p.length * (self.linear + self.attention * p.length) for t in texts for p in t.pieces
        )


def compare(strengths: dict[str, dict[int, tuple[Any, Any]]], dtype: str) -> dict[str, float]:
    """Relative difference of each variant's strengths from the reference, by variant.

    It is the 99th percentile over tokens. The reference is the first variant present of engine,
    loop, tuned, job and ray_data. ``sentence_transformers`` has the last layer only, so its
    reference is the loop's last layer. Raises ``ModelError`` when the shapes differ, or when a
    difference exceeds ``TOLERANCE``: figures of variants with different results cannot be compared.
    """
    order = [v for v in ("engine", "loop", "tuned", "job", "ray_data") if v in strengths]
    reference = {i: own for i, (own, _) in strengths[order[0]].items()} if order else {}
    last = {i: last for i, (_, last) in strengths.get("loop", {}).items()}
    found = {}
    for variant, by_text in strengths.items():
        expected = last if variant == "sentence_transformers" else reference
        common = sorted(by_text.keys() & expected.keys())
        if not common:
            continue
        for i in common:
            if by_text[i][0].shape != expected[i].shape:
                raise ModelError(
                    f"{variant} has {len(by_text[i][0])} tokens of text {i}, expected "
                    f"{len(expected[i])}: "
                    "the variants do not measure the same; no figures"
                )
        got, want = (
            np.concatenate([v[i] for i in common])
            for v in ({i: by_text[i][0] for i in common}, expected)
        )
        difference = float(np.quantile(np.abs(got - want) / np.abs(want), 0.99))
        if not difference <= TOLERANCE[dtype]:
            raise ModelError(
                f"{variant} differs from {order[0]} by {difference:.1e} relative, more than "
                f"rounding in {dtype} "
                f"({TOLERANCE[dtype]:.0e}): the variants do not measure the same; no figures"
            )
        found[variant] = difference
    return found


def num_tokens(texts: Sequence[Text], parts: Sequence[Sequence[int]]) -> int:
    return sum(texts[i].num_tokens for part in parts for i in part)


def _clean(takes: Sequence[Take]) -> list[int]:
    """Indices of the clean repetitions; of all repetitions when none is clean."""
    return [i for i, take in enumerate(takes) if take.foreign <= FOREIGN] or list(range(len(takes)))


def _ratio(
    of: str,
    to: str,
    takes: dict[str, list[Take]],
    texts: Sequence[Text],
    teams: dict[str, Team],
    profile: str,
) -> float | None:
    """Median over repetitions of the speed of ``of`` divided by that of ``to``.

    Both speeds come from the same repetition. The result is None when a variant was not measured.
    """
    if of not in takes or to not in takes:
        return None
    tokens = num_tokens(texts, teams[of].parts[profile]) / num_tokens(
        texts, teams[to].parts[profile]
    )
    both = set(_clean(takes[of])) & set(_clean(takes[to])) or set(range(len(takes[of])))
    return statistics.median(tokens * takes[to][i].seconds / takes[of][i].seconds for i in both)


def ratios(
    takes: dict[str, list[Take]], texts: Sequence[Text], teams: dict[str, Team], profile: str
) -> dict[str, float]:
    pairs = [name.split("/") for name in BARS if "/" in name]
    found = {f"{of}/{to}": _ratio(of, to, takes, texts, teams, profile) for of, to in pairs}
    return {name: value for name, value in found.items() if value is not None}


def figures(
    variant: str,
    taken: Sequence[Take],
    takes: dict[str, list[Take]],
    teams: dict[str, Team],
    texts: Sequence[Text],
    profile: str,
    counted: Counted,
    peak: float,
    difference: float | None,
) -> dict[str, Any]:
    parts = teams[variant].parts[profile]
    own = [texts[i] for part in parts for i in part]
    tokens, in_windows = (
        sum(t.num_tokens for t in own),
        sum(p.length for t in own for p in t.pieces),
    )
    clean = [taken[i] for i in _clean(taken)]
    rates = [tokens / take.seconds for take in clean]
    rate = statistics.median(rates)
    forward = clean[0].forward_tokens
    total = {name: sum(t.stages.get(name, 0.0) for t in clean) for name in clean[0].stages}
    return {
        "tokens_per_s": rate,
        "low": min(rates),
        "high": max(rates),
        "seconds": [t.seconds for t in taken],
        "foreign": [round(t.foreign, 3) for t in taken],
        "n_clean": sum(t.foreign <= FOREIGN for t in taken),
        "ratio_loop": _ratio(variant, "loop", takes, texts, teams, profile),
        "ratio_tuned": _ratio(variant, "tuned", takes, texts, teams, profile),
        "mfu": counted.flops(own) / tokens * rate / peak,
        "padding": max(0.0, 1 - in_windows / forward),
        "tokens": tokens,
        "texts": len(own),
        "stages": {
            name: value / len(clean) / teams[variant].at_work for name, value in total.items()
        },
        "peak_bytes": max(t.peak_bytes for t in taken),
        "device_bytes": max(t.device_bytes for t in taken),
        "difference": difference,
    }
