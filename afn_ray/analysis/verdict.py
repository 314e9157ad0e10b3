"""Judge one run and its comparison with a baseline by a policy."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple, TypedDict

from afn_ray.analysis import learned, parts
from afn_ray.analysis.evidence import Evidence, Found, figures
from afn_ray.analysis.learned import Learned, UsualRange
from afn_ray.analysis.limits import Level, Limit
from afn_ray.analysis.policy import Policy
from afn_ray.errors import ConfigError
from afn_ray.reduce.compare import Comparison
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

HELD, WARNED, BROKEN, NOT_JUDGED = "held", "warned", "broken", "not judged"
"""States of a limit. A night has the same, except that one with a warning is held."""


class Culprit(NamedTuple):
    """Something that a broken limit names: it is to blame, or it is an example of what is."""

    kind: str  # "source", "group", "file", "shard", "id", "class", "type" or "document"
    name: str
    reason: str
    text: str | None = None  # of a document, or of a type in its context


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit and the value compared with it."""

    limit: Limit
    value: float | None  # None: infinite, or unknown because nothing could be compared
    state: str  # "held", "warned", "broken" or "not judged"
    where: str | None  # source, group, class or files that the value belongs to
    reason: str | None = None  # why it was not judged
    usual: UsualRange | None = None  # range that the limit learned; ``limit`` then has its numbers
    culprits: tuple[
        Culprit, ...
    ] = ()  # of a broken limit or a warning; the worst of each kind first
    num_beyond: int | None = None  # of sources or groups, if the limit is on them and not held
    num_within: int | None = None  # likewise

    @property
    def key(self) -> str:
        """Name in the verdict: psi, or source.psi for psi in ``[source]``."""
        return self.limit.name

    def is_beyond(self, value: float) -> bool:
        """True if ``value`` is beyond the level that the rule is beyond:
        broken, or of a warning.
        """
        level = self.limit.fail if self.state == BROKEN else self.limit.warn
        return self.limit.is_beyond(value, level)

    @property
    def passed(self) -> bool | None:
        """True if the limit is not broken; None: it was not judged."""
        return None if self.state == NOT_JUDGED else self.state != BROKEN


def judge(
    policy: Policy, evidence: Evidence, past: Mapping[str, Sequence[float]] | None = None
) -> Iterator[Rule]:
    """Compare ``evidence`` with each limit of ``policy``, in the policy's order.

    ``past`` are the values of earlier nights by name of the limit, for those that learn.
    What cannot be compared is not judged, with the reason. Raises ``ConfigError`` for limits that
    this run's tables can never be compared with.
    """
    parts.check(policy, evidence.run)
    of_run = figures(evidence)
    nothing = Found(None, reason=evidence.baseline.lacking)
    for limit in policy.limits:
        of_whole = of_run.get(limit.key, nothing)
        found = parts.worst(limit, policy, evidence) if limit.of else of_whole
        yield rule_of(limit, found, (past or {}).get(limit.name, ()))


def rule_of(limit: Limit, found: Found, past: Sequence[float]) -> Rule:
    """The result of ``limit`` for the value ``found``; ``past`` are those of earlier nights."""
    value, where, reason = found
    if value is None:
        return Rule(limit, None, NOT_JUDGED, where, reason)
    if math.isnan(value):
        return Rule(limit, None, NOT_JUDGED, where, "the figure is not a number (NaN)")
    finite = value if math.isfinite(value) else None
    usual = None
    if limit.learns:
        limit, usual, lacking = _taught(limit, past)
        if lacking is not None:
            return Rule(limit, finite if reason is None else None, NOT_JUDGED, where, lacking)
    state = HELD
    if limit.is_beyond(value, limit.warn):
        state = WARNED
    if limit.is_beyond(value, limit.fail):
        state = BROKEN
    if reason is not None and state != (WARNED if limit.fail is None else BROKEN):
        return Rule(limit, None, NOT_JUDGED, None, reason)
    return Rule(limit, finite, state, where, usual=usual)


def _taught(limit: Limit, past: Sequence[float]) -> tuple[Limit, UsualRange | None, str | None]:
    """``limit`` with numbers in place of what it learns; what is usual; why it cannot be judged.

    What is usual is the range of the warning, if that learns too. A warning that cannot be judged
    yet is left out beside a level that can.
    """
    fail, of_fail = _number_of(limit, limit.fail, past)
    warn, of_warn = _number_of(limit, limit.warn, past)
    level = limit.warn if limit.fail is None else limit.fail
    if isinstance(level, Learned) and (of_warn if limit.fail is None else of_fail) is None:
        return limit, None, learned.reason(level, past)
    return replace(limit, fail=fail, warn=warn), of_warn or of_fail, None


def _number_of(
    limit: Limit, level: Level | None, past: Sequence[float]
) -> tuple[float | None, UsualRange | None]:
    """The number of a ``level`` of ``limit``, and the range that it learned."""
    if not isinstance(level, Learned):
        return level, None
    found = learned.usual(level, past)
    if found is None or (limit.is_minimum and not found.low):
        return None, None
    return found.low if limit.is_minimum else found.high, found


def judged_layer(policy: Policy, run: RunFolder, comparison: Comparison | None) -> int:
    """The layer that ``policy`` judges; raises ``ConfigError`` for one that was not recorded."""
    layers = run.info["layers"]
    if comparison is not None:
        layers = comparison.drift["layer"].unique().to_pylist()
    if policy.layer is not None and policy.layer not in layers:
        raise ConfigError(
            f"the policy judges layer {policy.layer}, which was not recorded; there are {layers}"
        )
    return max(layers) if policy.layer is None else policy.layer


def few_nights(policy: Policy, past: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """The reasons for which limits of ``policy`` cannot learn from so few nights as in ``past``."""
    for limit in policy.limits:
        values = past.get(limit.name, ())
        for level in (limit.fail, limit.warn):
            if isinstance(level, Learned) and len(values) < learned.LEAST_NIGHTS:
                yield learned.reason(level, values)


def state_of(rules: Sequence[Rule], unjudged: str | None, excused: Collection[str]) -> str:
    """The state of a night with ``rules``; a limit that can only warn does not change it.

    ``unjudged`` is the policy's: what a limit counts as that was not judged. The limits named in
    ``excused`` do not count if they were not judged.
    """
    if any(rule.state == BROKEN for rule in rules):
        return BROKEN
    may_break = [rule for rule in rules if rule.limit.fail is not None]
    unexcused = [rule for rule in may_break if rule.key not in excused]
    open_rules = [rule for rule in unexcused if rule.state == NOT_JUDGED]
    if not open_rules:
        return HELD
    return {"pass": HELD, "fail": BROKEN, None: NOT_JUDGED}[unjudged]


def reasons(rules: Sequence[Rule]) -> Iterator[str]:
    """The limits that were not judged, as text: a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for rule in rules:
        if rule.reason is not None:
            by_reason.setdefault(rule.reason, []).append(rule.key)
    for reason, keys in by_reason.items():
        yield f"{', '.join(keys)}: {reason}"


# --- in words


def value_text(rule: Rule) -> str:
    """The value of ``rule``; empty if it was not judged."""
    if rule.state == NOT_JUDGED:
        return ""
    if rule.value is None:
        return "unknown" if rule.limit.key == "lost_documents" else "infinite"
    return f"{rule.value:,}" if rule.limit.is_whole else f"{rule.value:.5g}"


def limit_text(rule: Rule) -> str:
    """The limit of ``rule`` with its sign, and where a warning begins;
    what is usual comes first.
    """
    limit = rule.limit
    sign = ">=" if limit.is_minimum else "<="
    texts = []
    if limit.fail is not None:
        texts.append(f"{sign} {_number_text(limit, limit.fail)}")
    if limit.warn is not None:
        texts.append(f"warn {sign} {_number_text(limit, limit.warn)}")
    text = ", ".join(texts)
    return text if rule.usual is None else f"{usual_text(rule.usual)} ({text})"


def where_text(rule: Rule) -> str:
    """The place that the value of ``rule`` belongs to, and the number of
    others beyond the limit.
    """
    where = rule.where or ""
    if rule.num_beyond is None:
        return where
    parts = count(rule.num_beyond, rule.limit.of)
    return f"{where}; {parts} beyond it, {rule.num_within:,} within"


def usual_text(usual: UsualRange) -> str:
    """The range of ``usual`` as text."""
    return f"usual {usual.low:.3g}-{usual.high:.3g} over {usual.nights} nights"


def _number_text(limit: Limit, level: Level) -> str:
    if isinstance(level, Learned):
        return str(level)
    return f"{level:,}" if limit.is_whole else f"{level:g}"


class CulpritJson(TypedDict):
    """Something that a limit names in ``audit.json``, escaped and cut."""

    kind: Annotated[
        str,
        "what it is",
        ("source", "group", "file", "shard", "id", "class", "type", "document"),
    ]
    name: Annotated[str, "its name"]
    reason: Annotated[str, "what is the matter with it"]
    text: Annotated[str | None, "beginning of a document, or a type in its context"]


class RuleJson(TypedDict):
    """One limit in ``audit.json``."""

    key: Annotated[str, "name in the policy; source.psi for psi in [source]"]
    limit: Annotated[
        float | str | None,
        "value beyond which the night is broken, or what could not be learned; null: none",
    ]
    warn: Annotated[float | str | None, "value beyond which it is a warning; null: none"]
    value: Annotated[float | None, "what the limit was compared with; null: infinite or unknown"]
    passed: Annotated[bool | None, "whether the limit is not broken; null: it was not judged"]
    where: Annotated[str | None, "source, group, class or files that the value belongs to"]
    meaning: Annotated[str, "what the value is, in words"]
    reason: Annotated[str | None, "why the limit was not judged"]
    state: Annotated[str, "state of the limit", (HELD, WARNED, BROKEN, NOT_JUDGED)]
    usual_low: Annotated[float | None, "low end of the range that the limit learned"]
    usual_high: Annotated[float | None, "high end of the range that the limit learned"]
    nights: Annotated[int | None, "nights that the limit learned from"]
    n_beyond: Annotated[
        int | None, "sources or groups beyond the limit; null: it is held, or not on them"
    ]
    n_within: Annotated[int | None, "sources or groups within the limit; null likewise"]
    worst: Annotated[list[CulpritJson], "what broke it, by name, the worst of each kind first"]


def to_json(rule: Rule) -> RuleJson:
    """``rule`` as plain values."""
    limit = rule.limit
    return {
        "key": rule.key,
        "limit": _level_json(limit.fail),
        "warn": _level_json(limit.warn),
        "value": rule.value,
        "passed": rule.passed,
        "where": rule.where,
        "meaning": limit.meaning,
        "reason": rule.reason,
        "state": rule.state,
        "usual_low": None if rule.usual is None else rule.usual.low,
        "usual_high": None if rule.usual is None else rule.usual.high,
        "nights": None if rule.usual is None else rule.usual.nights,
        "n_beyond": rule.num_beyond,
        "n_within": rule.num_within,
        "worst": [_culprit_json(culprit) for culprit in rule.culprits],
    }


def _culprit_json(culprit: Culprit) -> CulpritJson:
    kind, name, reason, text = culprit
    return {"kind": kind, "name": name, "reason": reason, "text": text}


def _level_json(level: Level | None) -> float | str | None:
    """A level as plain values: one that could not be learned yet is its text."""
    return str(level) if isinstance(level, Learned) else level
