"""Delete what no kept run refers to, in an order that leaves the store whole wherever it ends."""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from afn_ray import manifest, storage
from afn_ray.errors import ConfigError, StoreError, count
from afn_ray.manifest import Place
from afn_ray.schema import fingerprint

KEEP = 30
MIN_AGE_H = 24.0
MAX_LINES = 20
"""Shards that are listed one by one for a person."""

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Folder:
    """A run's or a shard's folder, and those of its files that go."""

    uri: str
    num_files: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """What no kept run of a store refers to: deleted, or what a call with ``delete`` would delete."""

    store: str
    kept: tuple[str, ...]  # names of runs, in the order in which they were begun
    runs: tuple[Folder, ...]
    shards: tuple[Folder, ...]
    num_young: int  # shards that no kept run lists and that stay for their age
    deleted: bool

    @property
    def num_files(self) -> int:
        return sum(folder.num_files for folder in (*self.runs, *self.shards))

    @property
    def num_bytes(self) -> int:
        return sum(folder.num_bytes for folder in (*self.runs, *self.shards))


def collect_garbage(
    store: str, *, keep: int = KEEP, keep_runs: Sequence[str] = (), min_age_h: float = MIN_AGE_H, delete: bool = False,
    on_progress: OnProgress = lambda message: None,
) -> Garbage:  # fmt: skip
    """Find, and with ``delete`` remove, the runs of ``store`` that are not kept and the shards that only they list.

    Kept are the ``keep`` newest complete runs, ``keep_runs`` (names or URIs), of each measure and corpus the newest
    audited run (the next audit is held against it), every run begun after the newest complete one, copies of runs
    under other names, and any other that is not complete while a file of it, or of a shard that it plans, is younger
    than ``min_age_h`` hours: it may be under way. A shard that no kept run lists stays while it is younger than that: a
    run that is just beginning may have found it. Files that afn-ray does not write are left alone.

    Can be killed, repeated and run beside others and beside runs. Raises ``ConfigError`` for what makes no sense,
    ``StoreError`` where a plan cannot be read, for then nobody knows what it refers to (nothing is deleted), or where
    a file may not be deleted, ``Interrupted`` when the store does not answer.
    """
    if keep < 1:
        raise ConfigError(f"keep is {keep}; expected at least 1 run")
    if not min_age_h >= 0:
        raise ConfigError(f"min_age_h is {min_age_h}; expected 0 or more hours")
    store = storage.absolute(store).rstrip("/")
    there = manifest.sort_files(store, storage.list_below(store))
    if not there.runs and not there.shards:
        raise StoreError(f"{store} is no store; give what was given to 'afn run --store'")
    old_s = (storage.clock_s(store) if delete else time.time()) - 3600 * min_age_h
    kept = _kept(store, there, keep, keep_runs, old_s)
    planned = {name: _planned(store, name) for name in kept}
    needed = {place for places in planned.values() for place in places}
    unlisted = sorted(place for place in there.shards if place not in needed)
    doomed = [place for place in unlisted if _is_old(there.shards[place], old_s)]
    num_young = len(unlisted) - len(doomed)
    runs = [_folder(storage.join(store, "runs", name), there.runs[name]) for name in there.runs if name not in kept]
    shards = [_folder(manifest.shard_uri(store, *place), there.shards[place]) for place in doomed]
    if delete:
        for run in runs:
            on_progress(f"deleting run {run.uri}")
            _remove(run.uri, there.runs[run.uri.rpartition("/")[2]], first="run.json")
        shards = []
        known = {name for name in there.runs if planned.get(name) != set()}  # a plan under way is read again
        for folders in _shards_removed(store, doomed, known, old_s):
            shards += folders
            on_progress(f"{len(shards):,} of {len(doomed):,} shards deleted")
    return Garbage(store, tuple(kept), tuple(runs), tuple(shards), num_young, delete)


def _kept(store: str, there: manifest.StoreFiles, keep: int, named: Sequence[str], old_s: float) -> list[str]:
    """Names of the runs that stay, sorted."""
    names = sorted(there.runs)
    complete = [n for n in names if any(f.uri.endswith("/run.json") for f in there.runs[n])]
    copies = [n for n in complete if manifest.is_copied(store, n)]
    complete = [n for n in complete if n not in copies]
    kept = {_named(store, run, names) for run in named} | set(complete[-keep:]) | set(copies)
    kept |= _last_audited(store, [n for n in complete if any(f.uri.endswith("/audited.json") for f in there.runs[n])])
    for name in names:
        if name in kept or name in complete:
            continue
        shards = (there.shards.get(place, []) for place in _planned(store, name))
        files = itertools.chain(there.runs[name], *shards)
        if name > max(complete, default="") or not _is_old(files, old_s):
            kept.add(name)
    return sorted(kept)


def _last_audited(store: str, audited: Sequence[str]) -> set[str]:
    """Of each measure and corpus the newest of the ``audited`` runs: the next audit is held against it."""
    newest = {}
    for name in audited:
        info = manifest.open_folder(store, name).info
        newest[json.dumps([info["measure"]["id"], info["config"]["corpus"]])] = name
    return set(newest.values())


def _named(store: str, run: str, names: Sequence[str]) -> str:
    """The name of ``run``, given as that or as a URI."""
    name = run.rstrip("/").rpartition("/")[2]
    if name not in names or ("/" in run and storage.absolute(run).rstrip("/") != storage.join(store, "runs", name)):
        raise StoreError(f"{store} has no run {run} to keep; 'afn gc' without --keep-run lists those that it has")
    return name


def _planned(store: str, name: str) -> set[Place]:
    """Shards that the run ``name`` lists; none where a crash, or a collection like this, came before its plan."""
    run = manifest.RunFolder(storage.join(store, "runs", name), store, name, {})
    try:
        shards, header = manifest.read_shards(run)
    except StoreError as error:
        plan, end = (storage.join(run.uri, file) for file in ("plan.parquet", "run.json"))
        if not storage.exists(plan) and not storage.exists(end):
            return set()
        raise StoreError(
            f"{error}; which shards the run refers to is not known, so no shard can be deleted. Restore its plan, or "
            f"delete {run.uri} to give the run up, then give this command again"
        ) from error
    measure_id = fingerprint(header["measure"])
    return {(measure_id, shard.id) for shard in shards}


def _is_old(files: Iterable[storage.StoredFile], old_s: float) -> bool:
    return max((file.modified_s for file in files), default=0.0) <= old_s


def _folder(uri: str, files: Sequence[storage.StoredFile]) -> Folder:
    return Folder(uri, len(files), sum(file.size for file in files))


def _shards_removed(store: str, doomed: Sequence[Place], known: set[str], old_s: float) -> Iterator[list[Folder]]:
    """Remove the shards ``doomed``, a few at a time; gives those that are gone.

    Right before each few, runs that are not among the ``known`` are read: what they list stays. They write their plan
    before they look for commits, so that one which is read here loses nothing.
    """
    needed: set[Place] = set()

    def listed(place: Place) -> list[storage.StoredFile]:
        return manifest.sort_files(store, storage.list_below(manifest.shard_uri(store, *place))).shards.get(place, [])

    def removed(place: Place, files: Sequence[storage.StoredFile]) -> Folder:
        folder = manifest.shard_uri(store, *place)
        _remove(folder, files, first="commit.json")
        return _folder(folder, files)

    with ThreadPoolExecutor(manifest.IO_THREADS) as pool:
        for begin in range(0, len(doomed), manifest.IO_THREADS):
            few = doomed[begin : begin + manifest.IO_THREADS]
            files = dict(zip(few, pool.map(listed, few), strict=True))
            for name in set(manifest.run_names(store)) - known:
                if places := _planned(store, name):
                    known.add(name)
                    needed |= places
            gone = [place for place in few if place not in needed and files[place] and _is_old(files[place], old_s)]
            yield list(pool.map(removed, gone, [files[place] for place in gone]))
    for measure_id in {measure_id for measure_id, _ in doomed}:
        storage.remove_if_empty(storage.join(store, "shards", measure_id))


def _remove(folder: str, files: Sequence[storage.StoredFile], first: str) -> None:
    """Remove ``files`` of ``folder``, the one called ``first`` before all that it names."""
    for file in sorted(files, key=lambda f: (not f.uri.endswith(f"/{first}"), f.uri)):
        storage.remove(file.uri)
    storage.remove_if_empty(folder)


def lines(g: Garbage, flags: Sequence[str]) -> Iterator[str]:
    """One line per run and shard that goes or is gone, the first twenty of these, and a last one with the sums.

    ``flags``: what the command was given beside the store, for the one that deletes.
    """
    for run in g.runs:
        yield f"run    {run.uri}: {count(run.num_files, 'file')}, {count(run.num_bytes, 'byte')}"
    for shard in g.shards[:MAX_LINES]:
        yield f"shard  {shard.uri}: {count(shard.num_files, 'file')}, {count(shard.num_bytes, 'byte')}"
    if len(g.shards) > MAX_LINES:
        yield f"shard  ... and {count(len(g.shards) - MAX_LINES, 'more shard')}; --json lists all"
    if g.num_young:
        yield f"{count(g.num_young, 'shard')} that no kept run lists stay: they are younger than --min-age-h"
    sums = (
        f"{count(len(g.runs), 'run')} and {count(len(g.shards), 'shard')}, {count(g.num_files, 'file')}, "
        f"{count(g.num_bytes, 'byte')}"
    )
    kept = f"{count(len(g.kept), 'run')} kept"
    if len(g.kept) > 1:
        kept += f", from {g.kept[0]} to {g.kept[-1]}"
    if g.deleted:
        yield f"deleted: {sums}; {kept}"
    elif g.runs or g.shards:
        command = shlex.join(["afn", "gc", g.store, *flags, "--delete"])
        yield f"to delete: {sums}; {kept}"
        yield f"nothing was deleted; this does it: {command}"
    else:
        yield f"nothing to delete; {kept}"
