"""The figures of a benchmark: speeds, ratios, and the differences of strengths."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from afn_ray.bench.team import Take, Team
from afn_ray.bench.texts import Text
from afn_ray.errors import ModelError

FOREIGN = 0.1
"""Largest share of the cores' time that other processes may use in a clean repetition."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative difference between two variants' strengths, by dtype.

One token in a hundred may differ more: ``compare_strengths`` uses the 99th percentile.
"""
REFERENCES = ("engine", "loop", "tuned", "job", "ray_data")
"""Variants with which the others are compared: the first one that was measured."""
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
        flops = 0.0
        for text in texts:
            for piece in text.pieces:
                flops_per_token = self.linear + self.attention * piece.length
                flops += piece.length * flops_per_token
        return flops


def compare_strengths(
    strengths: dict[str, dict[int, tuple[Any, Any]]], dtype: str
) -> dict[str, float]:
    """Relative difference of each variant's strengths from the reference, by variant.

    It is the 99th percentile over tokens. The reference is the first variant of ``REFERENCES`` that
    is present. ``sentence_transformers`` has the last layer only, so its
    reference is the loop's last layer. Raises ``ModelError`` when the shapes differ, or when a
    difference exceeds ``TOLERANCE``: figures of variants with different results cannot be compared.
    """
    order = [variant for variant in REFERENCES if variant in strengths]
    reference: dict[int, Any] = {}
    if order:
        reference = {i: own for i, (own, _) in strengths[order[0]].items()}
    last_layer = {i: last for i, (_, last) in strengths.get("loop", {}).items()}
    found = {}
    for variant, by_text in strengths.items():
        own = {i: norms for i, (norms, _) in by_text.items()}
        expected = last_layer if variant == "sentence_transformers" else reference
        difference = _difference(variant, own, expected)
        if difference is None:
            continue
        if not difference <= TOLERANCE[dtype]:
            raise ModelError(
                f"{variant} differs from {order[0]} by {difference:.1e} relative, more than "
                f"rounding in {dtype} ({TOLERANCE[dtype]:.0e}): the variants do not measure the "
                "same; no figures"
            )
        found[variant] = difference
    return found


def _difference(variant: str, own: dict[int, Any], expected: dict[int, Any]) -> float | None:
    """99th percentile of the relative differences between strengths of the same texts.

    None if no text is in both. Raises ``ModelError`` for a text with another number of tokens.
    """
    common = sorted(own.keys() & expected.keys())
    if not common:
        return None
    for i in common:
        if own[i].shape != expected[i].shape:
            raise ModelError(
                f"{variant} has {len(own[i])} tokens of text {i}, expected {len(expected[i])}: the "
                "variants do not measure the same; no figures"
            )
    got = np.concatenate([own[i] for i in common])
    want = np.concatenate([expected[i] for i in common])
    relative = np.abs(got - want) / np.abs(want)
    return float(np.quantile(relative, 0.99))


@dataclass(slots=True)
class ProfileTimes:
    """Measurements of one profile."""

    profile: str
    texts: Sequence[Text]
    teams: dict[str, Team]
    takes: dict[str, list[Take]]  # variant -> repetitions
    differences: dict[str, float]  # variant -> what ``compare_strengths`` returns

    def texts_of(self, variant: str) -> list[Text]:
        """The texts that the variant measures."""
        texts: list[Text] = []
        for part in self.teams[variant].parts[self.profile]:
            texts += [self.texts[i] for i in part]
        return texts

    def num_tokens(self, variant: str) -> int:
        """Number of tokens that the variant measures."""
        return sum(text.num_tokens for text in self.texts_of(variant))

    def clean(self, variant: str) -> list[int]:
        """Indices of the variant's clean repetitions; of all repetitions when none is clean."""
        takes = self.takes[variant]
        clean = [i for i, take in enumerate(takes) if take.foreign <= FOREIGN]
        return clean or list(range(len(takes)))

    def ratio(self, of: str, to: str) -> float | None:
        """Median over repetitions of the speed of ``of`` divided by that of ``to``.

        Both speeds come from the same repetition. The result is None when a variant was not
        measured.
        """
        if of not in self.takes or to not in self.takes:
            return None
        tokens = self.num_tokens(of) / self.num_tokens(to)  # of one pass
        clean = set(self.clean(of)) & set(self.clean(to))
        repetitions = clean or set(range(len(self.takes[of])))
        takes = self.takes[of]
        reference = self.takes[to]
        found = [
            tokens * _seconds_a_pass(reference[i]) / _seconds_a_pass(takes[i]) for i in repetitions
        ]
        return statistics.median(found)


def _seconds_a_pass(take: Take) -> float:
    return take.seconds / take.passes


def ratios(measured: ProfileTimes) -> dict[str, float]:
    """The ratios that have a bar in ``BARS``, where both variants were measured."""
    found = {}
    for name in BARS:
        of, slash, to = name.partition("/")
        ratio = measured.ratio(of, to) if slash else None
        if ratio is not None:
            found[name] = ratio
    return found


def _stages(takes: Sequence[Take], processes: int) -> dict[str, float]:
    """Seconds of each stage in one process, on average over ``takes``."""
    stages = {}
    for name in takes[0].stages:
        total = sum(take.stages.get(name, 0.0) for take in takes)
        stages[name] = total / len(takes) / processes
    return stages


class VariantFigures(TypedDict):
    """The figures of one variant on one profile, as ``--json`` writes them."""

    tokens_per_s: float
    low: float
    high: float
    seconds: list[float]
    foreign: list[float]
    n_clean: int
    ratio_loop: float | None
    ratio_tuned: float | None
    mfu: float
    padding: float
    tokens: int
    passes: int
    texts: int
    stages: dict[str, float]
    peak_bytes: int
    device_bytes: int
    difference: float | None


def profile_figures(
    measured: ProfileTimes, variant: str, counted: Counted, peak_flops_per_s: float
) -> VariantFigures:
    """The figures of one variant."""
    takes = measured.takes[variant]
    texts = measured.texts_of(variant)
    tokens = measured.num_tokens(variant)
    tokens_in_windows = sum(piece.length for text in texts for piece in text.pieces)
    clean = [takes[i] for i in measured.clean(variant)]
    rates = [tokens / _seconds_a_pass(take) for take in clean]
    rate = statistics.median(rates)
    processes = measured.teams[variant].at_work
    return {
        "tokens_per_s": rate,
        "low": min(rates),
        "high": max(rates),
        "seconds": [take.seconds for take in takes],
        "foreign": [round(take.foreign, 3) for take in takes],
        "n_clean": sum(take.foreign <= FOREIGN for take in takes),
        "ratio_loop": measured.ratio(variant, "loop"),
        "ratio_tuned": measured.ratio(variant, "tuned"),
        "mfu": counted.flops(texts) / tokens * rate / peak_flops_per_s,
        "padding": max(0.0, 1 - clean[0].passes * tokens_in_windows / clean[0].forward_tokens),
        "tokens": tokens,
        "passes": clean[0].passes,
        "texts": len(texts),
        "stages": _stages(clean, processes),
        "peak_bytes": max(take.peak_bytes for take in takes),
        "device_bytes": max(take.device_bytes for take in takes),
        "difference": measured.differences.get(variant),
    }
