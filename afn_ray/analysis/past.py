"""The figures of earlier nights of a series, which limits learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from afn_ray.analysis import parts, verdict
from afn_ray.analysis.evidence import Evidence
from afn_ray.analysis.policy import Policy
from afn_ray.reduce import duplicates
from afn_ray.reduce.group_drift import grouped_by
from afn_ray.store import series_runs, verdicts
from afn_ray.store.manifest import RunFolder

Gather = Callable[[RunFolder], Evidence]
"""Function that gives the evidence on an earlier night, against its own baseline."""


def values_before(
    policy: Policy, run: RunFolder, layer: int, gather: Gather
) -> dict[str, list[float]]:
    """The values of each limit that learns on the last ``policy.nights`` nights before ``run``.

    They are by name of the limit, newest first, at ``layer``. A broken night is left out unless it
    was accepted, and so is one whose copies count otherwise than those of ``run``, and a night
    without the value, such as one without groups, or with others than ``run``. Values are those
    that the audit of the night kept, if it was on the same terms. Otherwise the night is judged
    again.
    """
    learning = tuple(limit for limit in policy.limits if limit.learns)
    values: dict[str, list[float]] = {limit.name: [] for limit in learning}
    if not learning:
        return values
    as_numbers = tuple(replace(limit, fail=0.0, warn=None) for limit in learning)
    again = replace(policy, layer=layer, group_by=grouped_by(run))
    choice = duplicates.choice_of(run.info)
    before = _nights_before(run, policy.window)
    alike = (night for night in before if duplicates.choice_of(night.info) == choice)
    nights = filter(verdicts.may_be_baseline, alike)
    for night in islice(nights, policy.nights):
        of_each = (replace(again, limits=(limit,)) for limit in as_numbers)
        can_be = [one.limits[0] for one in of_each if parts.lacking(one, night) is None]
        figures = _figures(replace(again, limits=tuple(can_be)), night, gather)
        for limit in can_be:
            if (value := figures[limit.name]) is not None:
                values[limit.name].append(value)
    return values


def _figures(policy: Policy, night: RunFolder, gather: Gather) -> Mapping[str, float | None]:
    """The figures of ``night`` by name of the limits of ``policy``, kept or found again."""
    assert policy.layer is not None
    kept = _kept(night, policy)
    if kept is not None:
        return kept
    return {rule.key: rule.value for rule in verdict.judge(policy, gather(night))}


def _nights_before(run: RunFolder, window: str) -> Iterator[RunFolder]:
    """The nights of the series before ``run``, audited or not, newest first."""
    if window == "new":
        yield from series_runs.partitions_before(run, series_runs.alike(run))
        return
    runs = list(series_runs.alike(run, before=run.id))
    night = next(series_runs.nights_before(run, runs), None)
    while night is not None:
        yield night
        night = next(series_runs.nights_before(night, runs), None)


def _kept(night: RunFolder, policy: Policy) -> Mapping[str, float | None] | None:
    """The figures that the audit of ``night`` kept; None unless it has all that ``policy`` asks for."""
    kept = verdicts.read_verdict(night)
    if kept is None or (kept.layer, kept.terms) != (policy.layer, policy.terms):
        return None
    if any(limit.name not in kept.figures for limit in policy.limits):
        return None
    return kept.figures
