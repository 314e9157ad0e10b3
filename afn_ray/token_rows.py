"""Rows of tokens that a run keeps beside its summaries: all, those of HIGH tokens, of a sample,
none.

A shard's ``ReadOptions.record`` says it: empty for all rows, ``summaries``, ``sample:1%``, or
``high:4=9.5,8=12.25`` with the least strength of a HIGH token by layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from afn_ray import samples
from afn_ray.errors import ConfigError

ALL = "all"
SUMMARIES = "summaries"
HIGH = "high"
SAMPLE = "sample"
FORM = re.compile(rf"{ALL}|{SUMMARIES}|{HIGH}|{SAMPLE}:{samples.SHARE.pattern}")
"""Form of the config's ``record``."""
NO_TOKENS = (SUMMARIES,)
NO_WORDS = (SUMMARIES, HIGH)
"""Kinds of runs whose tokens cannot be listed, and whose words and texts cannot be put together."""
SALT = "rows:"
"""Salt of the sample, so that it is independent of the documents that a run selects."""
NEVER = 3.4e38
"""A strength above that of any token."""


class LabelThresholds(TypedDict):
    """Thresholds that label tokens at one layer; null where the population has no token."""

    layer: int
    population: str
    q1: float | None
    q2: float | None
    q3: float | None
    sink_factor: float


def canonical(record: str) -> str:
    """``record``, which has the ``FORM``, with its share in percent."""
    kind, _, share = record.partition(":")
    return f"{kind}:{samples.canonical(share)}" if share else kind


def of_shards(record: str, frozen: Sequence[LabelThresholds], layers: Sequence[int]) -> str:
    """The rows that shards keep of a run whose config has ``record``.

    ``frozen`` are the thresholds that say which tokens of ``layers`` are HIGH.
    """
    if record != HIGH:
        return "" if record == ALL else record
    least = high_from(frozen, layers)
    return f"{HIGH}:{','.join(f'{k}={q3!r}' for k, q3 in zip(layers, least, strict=True))}"


def high_from(frozen: Sequence[LabelThresholds], layers: Sequence[int]) -> tuple[float, ...]:
    """Q3 of each of ``layers`` in ``frozen``; ``NEVER`` where that run had no tokens."""
    q3 = {row["layer"]: row["q3"] for row in frozen if row["population"] == "tokens"}
    at_layers = (q3[layer] for layer in layers)
    return tuple(NEVER if least is None else least for least in at_layers)


def thresholds_of(record: str) -> dict[int, float]:
    """Least strength of a HIGH token by layer, of a shard's ``record``; empty for another kind."""
    kind, _, listed = record.partition(":")
    if kind != HIGH:
        return {}
    pairs = (pair.split("=") for pair in listed.split(","))
    return {int(layer): float(q3) for layer, q3 in pairs}


def record_of(config: Mapping[str, Any]) -> str:
    """The ``record`` of a stored ``config``; an older one has all rows, one of no form none."""
    found = config.get("record", ALL)
    return found if isinstance(found, str) and FORM.fullmatch(found) else SUMMARIES


def is_complete(record: str) -> bool:
    """True if a run whose config has ``record`` keeps all rows."""
    return record == ALL


def check_complete(config: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` unless a run of the stored ``config`` keeps the rows of all tokens."""
    record = record_of(config)
    if not is_complete(record):
        raise ConfigError(why_refused(record))


def describe(record: str) -> str:
    """The rows that a run keeps whose config has ``record``, in words."""
    kind, _, share = record.partition(":")
    if kind == SAMPLE:
        return f"only the rows of tokens of a sample of {share} of the documents"
    return {
        ALL: "the rows of all tokens",
        HIGH: "only the rows of HIGH tokens",
        SUMMARIES: "only summaries and documents, and no row of a token",
    }[kind]


def why_refused(record: str) -> str:
    """Answer to a question for rows of tokens that a run has not kept."""
    kind, _, _ = record.partition(":")
    there = {HIGH: "tokens, ", SAMPLE: "tokens, words, classes, "}.get(kind, "")
    return (
        f"the run recorded {describe(record)} (--record {record}): ask its {there}vocabulary, "
        "thresholds and documents, or give its afn run command without --record to measure the "
        "rows too"
    )
