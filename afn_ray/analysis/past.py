"""The figures of earlier nights of a series, which limits learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from afn_ray.analysis import parts, verdict
from afn_ray.analysis.evidence import Evidence
from afn_ray.analysis.policy import Policy
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
    was accepted, and so is a night without the value, such as one without groups, or with others
    than ``run``. Values are those that the audit of the night kept. A night without them is judged
    again.
    """
    learning = tuple(limit for limit in policy.limits if limit.learns)
    values: dict[str, list[float]] = {limit.name: [] for limit in learning}
    if not learning:
        return values
    as_numbers = tuple(replace(limit, fail=0.0, warn=None) for limit in learning)
    again = replace(policy, layer=layer, group_by=grouped_by(run))
    nights = filter(verdicts.may_be_baseline, _nights_before(run, policy.window))
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
    kept = _kept(night, [limit.name for limit in policy.limits], policy.layer)
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


def _kept(night: RunFolder, names: Iterable[str], layer: int) -> Mapping[str, float | None] | None:
    """The figures that the audit of ``night`` kept; None unless it has all ``names``."""
    kept = verdicts.read_verdict(night)
    if kept is None or kept.layer != layer or not set(names) <= kept.figures.keys():
        return None
    return kept.figures
