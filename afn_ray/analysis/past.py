"""The figures of earlier nights of a series, which limits learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from afn_ray.analysis import parts, verdict
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.evidence import Evidence
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.policy import Policy
from afn_ray.reduce import duplicates
from afn_ray.reduce.group_drift import grouped_by
from afn_ray.store import series_runs, verdicts
from afn_ray.store.manifest import RunFolder

BaselineOf = Callable[[RunFolder, int | None], Baseline]
"""Function that gives the baseline of an earlier night, which has a layer."""
Gather = Callable[[RunFolder, Baseline], Evidence]
"""Function that gives the evidence on an earlier night, held against its baseline."""


OF_HIGH = ("share_high_shift", "class_high_shift", "max_moved_types")
"""Limits whose figures depend on the thresholds that label."""


def terms(policy: Policy, limit: Limit, run: RunFolder, baseline: RunFolder | None) -> str:
    """Settings under which the figure of ``limit`` on ``run`` is found, against ``baseline``.

    Figures under equal terms can be compared.
    """
    found = [policy.terms(limit), *_settings(limit, run)]
    if limit.needs_baseline:
        found += ["against", *_settings(limit, run if baseline is None else baseline)]
    return ", ".join(found)


def _settings(limit: Limit, run: RunFolder) -> list[str]:
    """Settings of ``run`` that the figure of ``limit`` depends on."""
    if not limit.needs_baseline and limit.key not in ("junk_share", "near_duplicate_share"):
        return []
    config = run.info["config"]
    found = [f"copies {duplicates.choice_of(run.info)}"]
    if limit.key == "near_duplicate_share":
        found.append(f"near-copies from {config.get('near_duplicates')}")
    if limit.key in OF_HIGH:
        found.append("own thresholds" if config.get("thresholds") is None else "frozen thresholds")
    return found


def values_before(
    policy: Policy, run: RunFolder, layer: int, baseline_of: BaselineOf, gather: Gather
) -> dict[str, list[float]]:
    """The values of each limit that learns on the last ``policy.nights`` nights before ``run``.

    They are by name of the limit, newest first, at ``layer``. A broken night is left out unless it
    was accepted. So is a night without the value, such as one with other groups than ``run``, and
    one whose value depends on other settings, such as another treatment of copies. Values are those
    that the audit of the night kept, if it was on the same terms. Otherwise the night is judged
    again, and these values are kept beside it.
    """
    learning = tuple(limit for limit in policy.limits if limit.learns)
    values: dict[str, list[float]] = {limit.name: [] for limit in learning}
    if not learning:
        return values
    again = replace(policy, layer=layer, group_by=grouped_by(run))
    as_numbers = [replace(limit, fail=0.0, warn=None) for limit in learning]
    asked = {limit: terms(policy, limit, run, run) for limit in as_numbers}
    nights = filter(verdicts.may_be_baseline, _nights_before(run, policy.window, layer))
    for night in islice(nights, policy.nights):
        found, unknown = _kept(again, asked, night)
        if unknown:
            found |= _found_again(again, unknown, night, baseline_of(night, layer), gather)
        for name, value in found.items():
            if value is not None:
                values[name].append(value)
    return values


def _kept(
    policy: Policy, asked: Mapping[Limit, str], night: RunFolder
) -> tuple[dict[str, float | None], dict[Limit, str]]:
    """The figures that the audit of ``night`` kept on the terms ``asked`` for, by name of the
    limit.

    Then the limits with their terms that it may have an unknown figure for.
    """
    kept = verdicts.read_verdict(night)
    found = dict[str, float | None]()
    unknown = {}
    for limit, on_terms in asked.items():
        of_limit = replace(policy, limits=(limit,))
        if parts.lacking(of_limit, night) is not None:
            continue
        is_kept = kept is not None and kept.layer == policy.layer
        if kept is not None and is_kept and kept.terms.get(limit.name) == on_terms:
            found[limit.name] = kept.figures.get(limit.name)
        elif terms(policy, limit, night, night) == on_terms:
            unknown[limit] = on_terms
    return found, unknown


def _found_again(
    policy: Policy,
    asked: Mapping[Limit, str],
    night: RunFolder,
    baseline: Baseline,
    gather: Gather,
) -> dict[str, float | None]:
    """The figures of ``night`` held against ``baseline``: of an earlier such audit, or found now.

    They are on the terms ``asked`` for, by name of the limit. What is found now is kept, unless
    something could not be asked this time.
    """
    assert policy.layer is not None
    runs = (run for run in (baseline.run, *baseline.median_of) if run is not None)
    of_terms = {limit.name: on_terms for limit, on_terms in asked.items()}
    request = verdicts.AskedFigures(policy.layer, tuple(run.id for run in runs), of_terms)
    if (kept := verdicts.read_figures(night, request)) is not None:
        return kept
    of_night = replace(policy, limits=tuple(asked))
    rules = list(verdict.judge(of_night, gather(night, baseline)))
    found = {}
    for rule in rules:
        if terms(policy, rule.limit, night, baseline.run) == asked[rule.limit]:
            found[rule.key] = rule.value
    if not any((rule.reason or "").startswith(parts.NOT_ASKED) for rule in rules):
        verdicts.write_figures(night, request, found)
    return found


def _nights_before(run: RunFolder, window: str, layer: int) -> Iterator[RunFolder]:
    """The nights of the series with ``layer`` before ``run``, audited or not, newest first."""
    if window == "new":
        yield from series_runs.partitions_before(run, series_runs.alike(run, layer=layer))
        return
    runs = list(series_runs.alike(run, run.id, layer))
    night = next(series_runs.nights_before(run, runs), None)
    while night is not None:
        yield night
        night = next(series_runs.nights_before(night, runs), None)
