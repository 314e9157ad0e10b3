"""The figures of earlier nights of a series, which limits learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from afn_ray.analysis import verdict
from afn_ray.analysis.evidence import Evidence
from afn_ray.analysis.policy import Policy
from afn_ray.store import series_runs, verdicts
from afn_ray.store.manifest import RunFolder

Gather = Callable[[RunFolder], Evidence]
"""Function that gives the evidence on an earlier night, against its own baseline."""


def values_before(
    policy: Policy, run: RunFolder, layer: int, gather: Gather
) -> dict[str, list[float]]:
    """The values of each limit that learns on the last ``policy.nights`` nights before ``run``.

    They are by name of the limit, newest first, at ``layer``. A broken night is left out unless it
    was accepted, and so is a night without the value. Values are those that the audit of the night
    kept. A night without them is judged again.
    """
    learning = tuple(limit for limit in policy.limits if limit.learns)
    values: dict[str, list[float]] = {limit.name: [] for limit in learning}
    if not learning:
        return values
    as_numbers = tuple(replace(limit, fail=0.0, warn=None) for limit in learning)
    again = replace(policy, limits=as_numbers, layer=layer)
    nights = filter(verdicts.may_be_baseline, _nights_before(run, policy.window))
    for night in islice(nights, policy.nights):
        figures = _kept(night, values, layer)
        if figures is None:
            figures = {rule.key: rule.value for rule in verdict.judge(again, gather(night))}
        for name, of_name in values.items():
            if (value := figures[name]) is not None:
                of_name.append(value)
    return values


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
