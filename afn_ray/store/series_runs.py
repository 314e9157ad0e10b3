"""The complete runs of a series, and the nights before one of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import date
from typing import Any

import pyarrow as pa

from afn_ray import token_rows
from afn_ray.config import RunConfig
from afn_ray.measure import base_of
from afn_ray.store import manifest, series
from afn_ray.store.manifest import RunFolder

_read: ContextVar[dict[tuple[str, str], RunFolder] | None] = ContextVar("_read", default=None)
"""Complete runs that were read inside ``read_once``, by store and name; None outside of it."""

PIECE = ("uri", "format", "compression", "start", "end", "sha256", "limit")
"""Columns of a plan that say which documents a run read."""


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Read no run.json twice for ``complete_runs`` inside the block, however often it is asked.

    A complete run never changes. Runs are listed anew each time, so new ones are found.
    """
    if _read.get() is not None:
        yield
        return
    token = _read.set({})
    try:
        yield
    finally:
        _read.reset(token)


def complete_runs(store: str, before: str | None = None) -> Iterator[RunFolder]:
    """The store's complete runs that began before the run named ``before``, newest first."""
    for name in reversed(manifest.run_names(store)):
        if before is None or name < before:
            run = _open(store, name)
            if run.info and not manifest.is_copy(run):
                yield run


def _open(store: str, name: str) -> RunFolder:
    """The run ``name`` of ``store``, as it was read before if it was complete then."""
    known = _read.get()
    if known is not None and (store, name) in known:
        return known[store, name]
    run = manifest.open_folder(store, name)
    if known is not None and run.info:
        known[store, name] = run
    return run


def series_of(run: RunFolder) -> str:
    """Name of the series that the complete ``run`` belongs to."""
    return series.name_of(run.store, run.info["config"])


def day_of(run: RunFolder) -> date | None:
    """The day of the partition that the complete ``run`` covers; None for an undated corpus."""
    return series.day_of(run.info["config"]["corpus"])


def is_comparable(run: RunFolder, other: RunFolder, layer: int | None = None) -> bool:
    """True if the strengths of two complete runs can be compared, at ``layer`` or at any.

    Their measures have one base: they may differ in layers and signals.
    """
    if base_of(run.info["measure"]) != base_of(other.info["measure"]):
        return False
    shared = {*run.info["layers"]} & {*other.info["layers"]}
    return bool(shared) if layer is None else layer in shared


def alike(
    run: RunFolder, before: str | None = None, layer: int | None = None
) -> Iterator[RunFolder]:
    """Complete runs of the series of ``run`` that are comparable at ``layer``, newest first.

    They select documents as ``run`` does. ``before`` leaves out the run of that name and those that
    began after it.
    """
    name = series_of(run)
    for other in complete_runs(run.store, before):
        is_night = is_comparable(run, other, layer) and series_of(other) == name
        if is_night and selects_alike(run, other.info["config"]):
            yield other


def selects_alike(run: RunFolder, config: Mapping[str, Any]) -> bool:
    """True if a run with ``config`` selects documents as the complete ``run``.

    A first look is no night of whole corpora, even under the same name of a series. The dates in a
    condition may differ.
    """
    ours, theirs = (series.selection_of(one) for one in (run.info["config"], config))
    return ours == theirs or series.undated(ours) == series.undated(theirs)


def newest_audited(runs: Iterable[RunFolder]) -> RunFolder | None:
    """The newest audited run of ``runs``, which are newest first; without any the newest run."""
    newest = None
    for run in runs:
        if manifest.is_audited(run):
            return run
        newest = newest or run
    return newest


def same_night(run: RunFolder, runs: Iterable[RunFolder]) -> Iterator[RunFolder]:
    """The runs directly before ``run`` that ``nights_before`` leaves out, newest first."""
    is_same = _same_as(run)
    earlier = (other for other in runs if other.id < run.id)
    return itertools.takewhile(is_same, earlier)


def nights_before(run: RunFolder, runs: Iterable[RunFolder]) -> Iterator[RunFolder]:
    """The runs among ``runs`` that began before ``run``, newest first.

    ``runs`` are those that ``alike`` gives. Runs directly before ``run`` with the same request, or
    with the same text, count as ``run`` itself and are left out. They are retries for missing
    shards, repeats after another corpus of the store had a run in between, or runs that kept other
    rows.
    """
    earlier = (other for other in runs if other.id < run.id)
    return itertools.dropwhile(_same_as(run), earlier)


def _same_as(run: RunFolder) -> Callable[[RunFolder], bool]:
    """True if a run before ``run`` is of the same night, by its request or its text."""
    request = run.id.rpartition("-")[2]
    shards = _shards_sha256(run)

    def is_same_night(earlier: RunFolder) -> bool:
        if earlier.id.endswith(f"-{request}"):
            return True
        if shards is None or _shards_sha256(earlier) is None:
            return False
        if token_rows.record_of(earlier.info["config"]) != token_rows.record_of(run.info["config"]):
            return _has_same_text(earlier, run)  # the kept rows are part of a shard's id
        if earlier.info["measure"]["id"] == run.info["measure"]["id"]:
            return _shards_sha256(earlier) == shards
        return bool(_shards(earlier).equals(_shards(run)))  # in other files

    return is_same_night


def partitions_before(run: RunFolder, runs: Iterable[RunFolder]) -> Iterator[RunFolder]:
    """A run of each partition among ``runs`` before that of ``run``; newest partition first.

    ``runs`` are those that ``alike`` gives. When they began does not matter, because a partition
    may be late or replaced. Of several runs of one partition it is the newest audited one, or the
    newest if none was audited: the verdict on a run whose audit was killed was never reported.
    """
    tonight = day_of(run)
    of_day: dict[date, list[RunFolder]] = {}
    for other in runs:
        day = day_of(other)
        if day is not None and is_before(other, tonight):
            of_day.setdefault(day, []).append(other)
    for day in sorted(of_day, reverse=True):
        newest = newest_audited(of_day[day])
        assert newest is not None
        yield newest


def is_before(run: RunFolder, tonight: date | None) -> bool:
    """True if ``run`` covers a partition before that of ``tonight``."""
    day = day_of(run)
    return day is not None and tonight is not None and day < tonight


def _shards(run: RunFolder) -> pa.Table:
    """The ids of the shards of ``run``, in order."""
    return manifest.read_table(run, "shards", ["shard"])


def _has_same_text(run: RunFolder, other: RunFolder) -> bool:
    """True if both complete runs read the same documents, whatever rows they keep of them."""
    options, their_options = (
        RunConfig.of_stored(one.info["config"]).read_options for one in (run, other)
    )
    if options != their_options:
        return False
    pieces, their_pieces = (manifest.read_table(one, "plan", PIECE) for one in (run, other))
    return bool(pieces.equals(their_pieces))


def _shards_sha256(run: RunFolder) -> str | None:
    """SHA-256 of the run's table of shards; None for a run without one."""
    entry = run.info["tables"].get("shards")
    return None if entry is None else entry.get("sha256")
