"""The earlier runs of a series that an audit compares with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta

from afn_ray.analysis.policy import BASELINES, MEDIAN
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError
from afn_ray.runs import precheck
from afn_ray.store import manifest, series, storage, uris
from afn_ray.store.layout import STAMP
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

WEEK = timedelta(days=6.5)
"""Least age of a baseline of last week; under 7 days, as nights do not begin on the minute."""
OF_MEASURE = ("model", "revision", "layers", "dtype", "window_tokens", "overlap_tokens")
"""Config keys that two runs of one measure share; the model's files may still differ."""
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
    """Whether scalar figures are held against medians."""


def is_kind(baseline: str) -> bool:
    """Whether ``baseline`` is a kind of baseline, not a run's URI."""
    return any(baseline in kinds for kinds in BASELINES.values()) or baseline.startswith("median:")


def named(uri: str) -> RunFolder:
    """The run at ``uri``; raises ``ConfigError`` for the URI of a store."""
    if "/" not in uri and not storage.exists(uri):
        raise ConfigError(
            f"baseline is {uri!r}; expected {KNOWN} or a run's URI, as in store/runs/..."
        )
    run = manifest.find_run(uri)
    if run.uri != uris.absolute(uri).rstrip("/"):
        raise ConfigError(
            f"baseline {uri} is a store, whose latest run is another one every night; name one of "
            f"its runs, {run.uri} say, or give {KNOWN}"
        )
    return run


def find(run: RunFolder, kind: str, window: str) -> Baseline:
    """The baseline of ``kind`` of the complete ``run``, as ``policy.check_kind`` allows it."""
    nights = partitions_before(run) if window == "new" else comparable_runs(run)
    newest = next(nights, None)
    if newest is None:
        name = series.name_of(run.store, run.info["config"])
        return Baseline(None, f'the series "{name}" has no earlier run with this measure')
    nights = itertools.chain([newest], nights)
    if kind == "week":
        return _last_week(run, nights)
    if kind == "weekday":
        return _same_weekday(run, nights)
    if (median := MEDIAN.fullmatch(kind)) is not None:
        return _median(list(nights), int(median[1]))
    return Baseline(_newest_audited(nights))


def with_frozen_thresholds(config: RunConfig, source: RunFolder | None) -> RunConfig:
    """``config`` with the thresholds of ``source``; None: of the newest audited run, if any."""
    precheck.check_frozen(config)
    source = source or _newest_audited(_asked_alike(config))
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
        runs = (run for run in runs if _is_before(run, tonight))
    run = next(runs, None)
    if run is None:
        return
    if not any(manifest.is_audited(other) for other in _alike(run)):
        manifest.mark_audited(run)


def _asked_alike(config: RunConfig) -> Iterator[RunFolder]:
    """Complete runs of this series and, by the config's keys, of its measure; newest first."""
    asked = asdict(precheck.normalised(config))
    name = series.name_of(asked["store"], asked)
    for run in _complete_runs(asked["store"]):
        same_measure = all(run.info["config"].get(key) == asked[key] for key in OF_MEASURE)
        if same_measure and series.name_of(run.store, run.info["config"]) == name:
            yield run


def _newest_audited(runs: Iterator[RunFolder]) -> RunFolder | None:
    """The newest audited run of ``runs``, which are newest first; without any the newest run."""
    newest = None
    for run in runs:
        if manifest.is_audited(run):
            return run
        newest = newest or run
    return newest


def _complete_runs(store: str, before: str | None = None) -> Iterator[RunFolder]:
    """The store's complete runs that began before the run named ``before``, newest first."""
    for name in reversed(manifest.run_names(store)):
        if before is None or name < before:
            run = manifest.open_folder(store, name)
            if run.info and not manifest.is_copy(run):
                yield run


def _last_week(run: RunFolder, nights: Iterator[RunFolder]) -> Baseline:
    """The newest of ``nights`` that is old enough, audited or not."""
    latest = _began(run) - WEEK
    found = next((night for night in nights if _began(night) <= latest), None)
    days = WEEK.total_seconds() / 86_400
    return Baseline(found, None if found else f"no run of the series is {days:g} days old yet")


def _same_weekday(run: RunFolder, nights: Iterator[RunFolder]) -> Baseline:
    """The one of ``nights`` whose partition is a week older, audited or not."""
    tonight = _day(run)
    assert tonight is not None
    asked = tonight - timedelta(days=7)
    found = next((night for night in nights if _day(night) == asked), None)
    lacking = f"the series has no run of {asked}, the same weekday a week before"
    return Baseline(found, None if found else lacking)


def _median(nights: list[RunFolder], num_nights: int) -> Baseline:
    """The newest audited one of ``nights``, and the ``num_nights`` newest for the medians."""
    previous = _newest_audited(iter(nights))
    if len(nights) < num_nights:
        lacking = f"the median needs {count(num_nights, 'earlier night')}; there are {len(nights)}"
        return Baseline(previous, lacking, is_median=True)
    return Baseline(previous, median_of=tuple(nights[:num_nights]), is_median=True)


def comparable_runs(run: RunFolder) -> Iterator[RunFolder]:
    """Complete runs of the same measure and series that began before ``run``, newest first.

    Runs directly before it with the same request, or with the same shards, count as ``run`` itself
    and are left out. They are retries for missing shards, or repeats after another corpus of the
    store had a run in between.
    """
    request, shards = run.id.rpartition("-")[2], _shards_sha256(run)

    def is_same_night(earlier: RunFolder) -> bool:
        same_request = earlier.id.endswith(f"-{request}")
        return same_request or (shards is not None and _shards_sha256(earlier) == shards)

    return itertools.dropwhile(is_same_night, _alike(run, before=run.id))


def partitions_before(run: RunFolder) -> Iterator[RunFolder]:
    """A complete run of each partition before that of ``run``; newest partition first.

    They have the measure and the series of ``run``. When they began does not matter, because a
    partition may be late or replaced. Of several runs of one partition it is the newest audited
    one, or the newest if none was audited: the verdict on a run whose audit was killed was never
    reported.
    """
    tonight = _day(run)
    of_day: dict[date, list[RunFolder]] = {}
    for other in _alike(run):
        day = _day(other)
        if day is not None and _is_before(other, tonight):
            of_day.setdefault(day, []).append(other)
    for day in sorted(of_day, reverse=True):
        newest = _newest_audited(iter(of_day[day]))
        assert newest is not None
        yield newest


def _alike(run: RunFolder, before: str | None = None) -> Iterator[RunFolder]:
    """Complete runs of the measure and the series of ``run``, newest first.

    ``before`` leaves out the run of that name and those that began after it.
    """
    name = series.name_of(run.store, run.info["config"])
    for other in _complete_runs(run.store, before):
        same_measure = other.info["measure"]["id"] == run.info["measure"]["id"]
        if same_measure and series.name_of(other.store, other.info["config"]) == name:
            yield other


def _shards_sha256(run: RunFolder) -> str | None:
    """SHA-256 of the run's table of shards; None for a run without one."""
    digest: str | None = run.info["tables"].get("shards", {}).get("sha256")
    return digest


def _day(run: RunFolder) -> date | None:
    """The day of the partition that ``run`` covers."""
    return series.day_of(run.info["config"]["corpus"])


def _is_before(run: RunFolder, tonight: date | None) -> bool:
    """Whether ``run`` covers a partition before that of ``tonight``."""
    day = _day(run)
    return day is not None and tonight is not None and day < tonight


def _began(run: RunFolder) -> datetime:
    return datetime.strptime(run.id.partition("-")[0], STAMP).replace(tzinfo=UTC)
