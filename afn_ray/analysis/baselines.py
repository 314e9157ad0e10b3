"""The earlier run that an audit compares with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError
from afn_ray.runs import job, precheck
from afn_ray.store import manifest, storage, uris
from afn_ray.store.layout import STAMP
from afn_ray.store.manifest import RunFolder

WEEK = timedelta(days=6.5)
"""Least age of a baseline of last week; under 7 days, as nights do not begin on the minute."""
OF_MEASURE = ("model", "revision", "layers", "dtype", "window_tokens", "overlap_tokens")
"""Config keys that two runs of one measure share; the model's files may still differ."""


def named(uri: str) -> RunFolder:
    """The run at ``uri``; raises ``ConfigError`` for the URI of a store."""
    if "/" not in uri and not storage.exists(uri):
        raise ConfigError(
            f"baseline is {uri!r}; expected {', '.join(BASELINES)} or a run's URI, as in "
            "store/runs/..."
        )
    run = manifest.find_run(uri)
    if run.uri != uris.absolute(uri).rstrip("/"):
        raise ConfigError(
            f"baseline {uri} is a store, whose latest run is another one every night; name one of "
            f"its runs, {run.uri} say, or give {' or '.join(BASELINES)}"
        )
    return run


def with_frozen_thresholds(config: RunConfig, source: RunFolder | None) -> RunConfig:
    """``config`` with the thresholds of ``source``; None: of the newest audited run, if any."""
    precheck.check_frozen(config)
    source = source or _newest_audited(_asked_alike(config))
    return config if source is None else replace(config, thresholds=source.uri)


def begin_nights(config: RunConfig) -> None:
    """Mark the newest run as audited where no run of its measure was audited yet.

    The first audit is compared with that run. So are the next ones until an audit completes,
    because the verdicts on their runs were never reported.
    """
    run = next(_asked_alike(config), None)
    if run is None:
        return
    candidates = itertools.chain([run], comparable_runs(run))
    if not any(manifest.is_audited(candidate) for candidate in candidates):
        manifest.mark_audited(run)


def _asked_alike(config: RunConfig) -> Iterator[RunFolder]:
    """Complete runs of this corpus and, by the config's keys, of its measure; newest first."""
    asked = asdict(job.normalised(config))
    for run in _complete_runs(asked["store"]):
        same_measure = all(run.info["config"].get(key) == asked[key] for key in OF_MEASURE)
        if same_measure and _corpus(run) == list(asked["corpus"]):
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


def _previous(run: RunFolder) -> RunFolder | None:
    """The newest audited run; the newest of all where none was audited.

    A run whose audit was killed is not a baseline: its verdict was never reported, so its drift
    counts again.
    """
    return _newest_audited(comparable_runs(run))


def _last_week(run: RunFolder) -> RunFolder | None:
    latest = _began(run) - WEEK
    return next((r for r in comparable_runs(run) if _began(r) <= latest), None)


def comparable_runs(run: RunFolder) -> Iterator[RunFolder]:
    """Complete runs of the same measure and corpus that began before ``run``, newest first.

    Runs directly before it with the same request, or with the same shards, count as ``run`` itself
    and are left out. They are retries for missing shards, or repeats after another corpus of the
    store had a run in between.
    """
    request, shards = run.id.rpartition("-")[2], _shards_sha256(run)

    def is_same_night(earlier: RunFolder) -> bool:
        same_request = earlier.id.endswith(f"-{request}")
        return same_request or (shards is not None and _shards_sha256(earlier) == shards)

    same_measure_and_corpus = (
        earlier
        for earlier in _complete_runs(run.store, run.id)
        if earlier.info["measure"]["id"] == run.info["measure"]["id"]
        and _corpus(earlier) == _corpus(run)
    )
    return itertools.dropwhile(is_same_night, same_measure_and_corpus)


def _shards_sha256(run: RunFolder) -> str | None:
    """SHA-256 of the run's table of shards; None for a run without one."""
    digest: str | None = run.info["tables"].get("shards", {}).get("sha256")
    return digest


def _corpus(run: RunFolder) -> list[str]:
    return list(run.info["config"]["corpus"])


def _began(run: RunFolder) -> datetime:
    return datetime.strptime(run.id.partition("-")[0], STAMP).replace(tzinfo=UTC)


BASELINES: dict[str, Callable[[RunFolder], RunFolder | None]] = {
    "previous": _previous,
    "week": _last_week,
}
