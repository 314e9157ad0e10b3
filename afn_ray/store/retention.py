"""Runs that a garbage collection keeps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date

from afn_ray.errors import StoreError
from afn_ray.fingerprints import fingerprint
from afn_ray.store import (
    layout,
    manifest,
    plans,
    series_runs,
    storage,
    uris,
    verdicts,
)
from afn_ray.store.layout import ShardKey
from afn_ray.store.manifest import RunFolder


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """Rule of which runs are kept, as in ``collect_garbage``."""

    keep: int
    keep_runs: tuple[str, ...]
    min_age_h: float


def kept_runs(
    store: str, there: layout.StoreFiles, names: Sequence[str], rules: RetentionRules, old_s: float
) -> list[str]:
    """Names of the runs that are kept, sorted: those of ``names`` that ``rules`` keep.

    ``old_s`` is the Unix time before which a file counts as old.
    """
    finished = [name for name in names if has_file(there.runs[name], "run.json")]
    copies = [name for name in finished if manifest.is_copied(store, name)]
    complete = [name for name in finished if name not in copies]
    audited = [name for name in complete if has_file(there.runs[name], "audited.json")]
    kept = {_name_of(store, run, names) for run in rules.keep_runs}
    kept.update(complete[-rules.keep :])
    kept.update(copies)
    kept.update(_last_audited(store, audited))
    newest = max(complete, default="")
    for name in names:
        if name in kept:
            continue
        if name in complete:
            in_use = _is_leased(there.runs[name], old_s)
        else:
            in_use = _is_under_way(store, there, name, old_s) or name > newest
        if in_use:
            kept.add(name)
    return sorted(kept)


def _is_leased(files: Iterable[storage.StoredFile], old_s: float) -> bool:
    """True if one of the ``files`` of a complete run is the recent lease of a reader."""
    leases = [file for file in files if layout.LEASE.fullmatch(file.name)]
    return not is_old(leases, old_s)


def _is_under_way(store: str, there: layout.StoreFiles, name: str, old_s: float) -> bool:
    """True if a file of the incomplete run ``name``, or of a shard that it lists, is recent."""
    files = list(there.runs[name])
    for place in planned_shards(store, name):
        files += there.shards.get(place, [])
    return not is_old(files, old_s)


def _last_audited(store: str, audited: Sequence[str]) -> set[str]:
    """The newest of the ``audited`` runs of each measure and series, and that of the newest day.

    Of each also the newest that may be a baseline. The next audit is compared with one of them; a
    late partition, or broken nights, make them several.
    """
    by_series: dict[tuple[str, str], list[RunFolder]] = {}
    for name in reversed(audited):
        run = manifest.open_folder(store, name)
        key = run.info["measure"]["id"], series_runs.series_of(run)
        by_series.setdefault(key, []).append(run)
    kept: set[str] = set()
    for newest in by_series.values():
        dated: list[tuple[date, RunFolder]] = []
        for run in newest:
            day = series_runs.day_of(run)
            if day is not None:
                dated.append((day, run))
        dated.sort(key=lambda day_and_run: day_and_run[0], reverse=True)
        of_day = [run for _, run in dated]
        for runs in (newest, of_day):
            able = filter(verdicts.may_be_baseline, runs)
            kept.update(run.id for run in runs[:1])
            kept.update(run.id for run in itertools.islice(able, 1))
    return kept


def threshold_runs(store: str, kept: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Complete runs that are not kept, but whose thresholds a run that is kept labels by.

    Each has the newest such run. ``kept`` and ``names``, those of the complete runs, are sorted.
    """
    users = {}
    for name in kept:
        if name not in names:
            continue
        with contextlib.suppress(StoreError):  # 'afn verify' names what is damaged
            asked = manifest.open_folder(store, name).info["config"].get("thresholds") or ""
            place, used = manifest.split_uri(uris.absolute(asked).rstrip("/"))
            if place == store and used in names and used not in kept:
                users[used] = name
    return users


def _name_of(store: str, run: str, names: Sequence[str]) -> str:
    """The name of ``run``, which is a name or a URI."""
    place, name = store, run
    if "/" in run:
        place, name = manifest.split_uri(uris.absolute(run).rstrip("/"))
    if name not in names or place != store:
        raise StoreError(
            f"{store} has no run {run} to keep; 'afn gc' without --keep-run lists those that it has"
        )
    return name


def planned_shards(store: str, name: str) -> set[ShardKey]:
    """The shards that the run ``name`` lists; empty if it has no plan.

    It has none if it crashed before it wrote one, or if a gc deleted it. Raises ``StoreError`` if
    the plan is damaged or missing from a complete run.
    """
    run = RunFolder(uris.join(store, "runs", name), store, name, {})
    try:
        shards, header = plans.read_shards(run)
    except StoreError as error:
        if not storage.exists(uris.join(run.uri, "plan.parquet")):
            is_finished = storage.exists(uris.join(run.uri, "run.json"))
            if not is_finished or manifest.open_folder(store, name).condemned:
                return set()
        raise StoreError(
            f"{error}; which shards the run refers to is not known, so no shard can be deleted. "
            f"Restore its plan, or delete {run.uri} to give the run up, then give this "
            "command again"
        ) from error
    measure_id = fingerprint(header["measure"])
    return {(measure_id, shard.id) for shard in shards}


def is_old(files: Iterable[storage.StoredFile], old_s: float) -> bool:
    """True if the last change of every one of ``files`` is at or before ``old_s``, a Unix time."""
    return max((file.modified_s for file in files), default=0.0) <= old_s


def has_file(files: Iterable[storage.StoredFile], name: str) -> bool:
    """True if one of ``files`` is called ``name``."""
    return any(file.name == name for file in files)
