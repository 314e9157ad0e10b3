"""The earlier runs of a series that an audit compares with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta

from afn_ray.analysis.policy import BASELINES, MEDIAN
from afn_ray.config import RunConfig, resolve_layers
from afn_ray.errors import ConfigError
from afn_ray.runs import precheck
from afn_ray.store import manifest, series, series_runs, storage, verdicts
from afn_ray.store.layout import STAMP
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

WEEK = timedelta(days=6.5)
"""Least age of a baseline of last week; under 7 days, as nights do not begin on the minute."""
OF_BASE = ("model", "revision", "dtype", "window_tokens", "overlap_tokens")
"""Config keys that two comparable runs share; the model's files may still differ."""
KNOWN = "previous, week, weekday, median:N"
"""Kinds of baseline, for errors."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The earlier run, or several, that a night is compared with."""

    run: RunFolder | None
    """The run to compare with; None if there is none."""
    lacking: str | None = None
    """Reason for no run, or for too few of them for the median."""
    median_of: tuple[RunFolder, ...] = ()
    """Runs whose medians stand in for the scalar figures of ``run``, newest first."""
    is_median: bool = False
    """True if scalar figures are held against medians."""
    is_refused: bool = False
    """True if a night would be the baseline if it were not broken."""


def is_kind(baseline: str) -> bool:
    """True if ``baseline`` is a kind of baseline, not a run's URI."""
    return any(baseline in kinds for kinds in BASELINES.values()) or baseline.startswith("median:")


def named(uri: str) -> RunFolder:
    """The run at ``uri``; raises ``ConfigError`` for the URI of a store."""
    if "/" not in uri and not storage.exists(uri):
        raise ConfigError(
            f"baseline is {uri!r}; expected {KNOWN} or a run's URI, as in store/runs/..."
        )
    run = manifest.find_run(uri)
    if not manifest.is_named_by(run, uri):
        raise ConfigError(
            f"baseline {uri} is a store, whose latest run is another one every night; name one of "
            f"its runs, {run.uri} say, or give {KNOWN}"
        )
    return run


def find(run: RunFolder, kind: str, window: str, layer: int | None = None) -> Baseline:
    """The baseline of ``kind`` of the complete ``run``, as ``policy.check_kind`` allows it.

    It has ``layer``; None: any layer of ``run``. A broken night is none unless it was accepted.
    """
    if window == "new":
        nights = series_runs.partitions_before(run, series_runs.alike(run, layer=layer))
    else:
        nights = series_runs.nights_before(run, series_runs.alike(run, run.id, layer))
    newest = next(nights, None)
    name = series_runs.series_of(run)
    if newest is None:
        return Baseline(None, f'the series "{name}" has no earlier run with this measure')
    nights = itertools.chain([newest], nights)
    if kind == "weekday":
        return _same_weekday(run, nights)
    if kind == "week":
        return _last_week(run, nights)
    if (median := MEDIAN.fullmatch(kind)) is not None:
        return _median(run, list(nights), int(median[1]), layer)
    previous = series_runs.newest_audited(filter(verdicts.may_be_baseline, nights))
    lacking = f'every earlier night of the series "{name}" is broken, and none was accepted'
    return Baseline(previous, None if previous else lacking, is_refused=previous is None)


def with_frozen_thresholds(config: RunConfig, source: RunFolder | None) -> RunConfig:
    """``config`` with the thresholds of ``source``; None: of the newest audited run, if any."""
    precheck.check_frozen(config)
    nights = filter(verdicts.may_be_baseline, _asked_alike(config))
    source = source or series_runs.newest_audited(nights)
    return config if source is None else replace(config, thresholds=source.uri)


def begin_nights(config: RunConfig, window: str) -> None:
    """Mark the newest run as audited where no run of its measure was audited yet.

    The first audit is compared with that run. So are the next ones until an audit completes,
    because the verdicts on their runs were never reported. With the ``window`` "new" it is the
    newest run of an earlier partition.
    """
    runs = _asked_alike(config)
    if window == "new":
        tonight = series.day_of(config.corpus)
        runs = (run for run in runs if series_runs.is_before(run, tonight))
    run = next(runs, None)
    if run is None:
        return
    if not any(manifest.is_audited(other) for other in series_runs.alike(run)):
        manifest.mark_audited(run)


def _asked_alike(config: RunConfig) -> Iterator[RunFolder]:
    """Complete runs of this series that are comparable by the config's keys; newest first.

    They have all layers that ``config`` asks for.
    """
    asked = asdict(precheck.normalised(config))
    name = series.name_of(asked["store"], asked)
    for run in series_runs.complete_runs(asked["store"]):
        same_base = all(run.info["config"].get(key) == asked[key] for key in OF_BASE)
        is_night = same_base and series_runs.series_of(run) == name
        if is_night and series_runs.selects_alike(run, asked) and _has_layers(run, config):
            yield run


def _has_layers(run: RunFolder, config: RunConfig) -> bool:
    """True if ``run`` has the layers that ``config`` asks for of the same model."""
    recorded = run.info["config"].get("layers")
    if recorded == config.layers:
        return True
    try:
        layers = resolve_layers(config.layers, run.info["model"]["depth"])
    except ConfigError:  # the model of this name had fewer layers then
        return False
    return {*layers} <= {*run.info["layers"]}


def _last_week(run: RunFolder, nights: Iterator[RunFolder]) -> Baseline:
    """The newest of ``nights`` that is old enough and may be a baseline, audited or not."""
    latest = _began(run) - WEEK
    days = f"{WEEK.total_seconds() / 86_400:g} days old"
    lacking, is_refused = f"no run of the series is {days} yet", False
    for night in nights:
        if _began(night) > latest:
            continue
        if verdicts.may_be_baseline(night):
            return Baseline(night)
        lacking = f"every run of the series that is {days} is broken, and none was accepted"
        is_refused = True
    return Baseline(None, lacking, is_refused=is_refused)


def _same_weekday(run: RunFolder, nights: Iterator[RunFolder]) -> Baseline:
    """The one of ``nights`` whose partition is a week older, audited or not.

    If that one may be no baseline, the one of the same weekday before it.
    """
    tonight = series_runs.day_of(run)
    assert tonight is not None
    asked = tonight - timedelta(days=7)
    broken = ""
    for night in nights:
        if series_runs.day_of(night) != asked:
            continue
        if verdicts.may_be_baseline(night):
            return Baseline(night)
        broken = f"; that of {asked} is broken, and was not accepted"
        asked -= timedelta(days=7)
    lacking = f"the series has no run of {asked}, the same weekday a week before{broken}"
    return Baseline(None, lacking, is_refused=bool(broken))


def _median(
    run: RunFolder, nights: list[RunFolder], num_nights: int, layer: int | None
) -> Baseline:
    """The newest audited one of ``nights``, and the ``num_nights`` newest for the medians.

    Broken nights that were not accepted are neither. Medians are of nights with ``layer``; None:
    with the deepest layer of ``run`` that the newest audited one has.
    """
    able = [night for night in nights if verdicts.may_be_baseline(night)]
    previous = series_runs.newest_audited(able)
    others = ""
    if previous is not None:
        judged = layer
        if judged is None:
            judged = max({*run.info["layers"]} & {*previous.info["layers"]})
        num_all = len(nights)
        nights = [night for night in nights if judged in night.info["layers"]]
        able = [night for night in able if judged in night.info["layers"]]
        if num_others := num_all - len(nights):
            others = f", and {num_others} without layer {judged}"
    if len(able) >= num_nights:
        return Baseline(previous, median_of=tuple(able[:num_nights]), is_median=True)
    broken = len(nights) - len(able)
    lacking = f"the median needs {count(num_nights, 'earlier night')}; there are {len(able)}"
    if broken:
        lacking += f", and {broken} broken that nobody accepted"
    lacking += others
    is_refused = previous is None or len(nights) >= num_nights
    return Baseline(previous, lacking, is_median=True, is_refused=is_refused)


def _began(run: RunFolder) -> datetime:
    return datetime.strptime(run.id.partition("-")[0], STAMP).replace(tzinfo=UTC)
