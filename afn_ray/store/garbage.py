"""Garbage collection: delete what no kept run refers to, so that a crash leaves the store whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import pyarrow as pa

from afn_ray import notebook
from afn_ray.errors import ConfigError, Interrupted, StoreError
from afn_ray.store import checksums, epochs, layout, manifest, probes, shard_files, storage, uris
from afn_ray.store.layout import ShardKey
from afn_ray.store.leftovers import Leftover, find_leftovers
from afn_ray.store.retention import (
    RetentionRules,
    has_file,
    is_old,
    kept_runs,
    planned_shards,
    threshold_runs,
)
from afn_ray.text import count

KEEP = 30
"""Default number of newest complete runs that are kept."""
MIN_AGE_H = 24.0
"""Default age from which unused shards and incomplete runs are removed, in hours."""
GRAVE_DAYS = 30.0
"""Days that the run.json of a condemned run is kept, by the store's clock.

A process of that run that was suspended for longer does not learn that the run was condemned.
"""

OnMessage = Callable[[str], None]

TRIES = 20
"""Most tries while other garbage collections change the store."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A run's or a shard's folder, and the number and bytes of its files that are deleted."""

    uri: str
    num_files: int
    num_bytes: int

    @classmethod
    def of(cls, uri: str, files: Sequence[storage.StoredFile]) -> Folder:
        """The folder ``uri`` of which ``files`` are deleted."""
        return cls(uri, len(files), sum(file.size for file in files))


FOLDERS = pa.schema(
    [
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("num_files", pa.int64()),
        ("num_bytes", pa.int64()),
    ]
)
"""Columns of ``Garbage.table``."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """Objects that no kept run of a store refers to: deleted, or those that ``delete`` would
    delete.
    """

    store: str
    kept: tuple[str, ...]
    """Names of the kept runs, oldest first."""
    runs: tuple[Folder, ...]
    shards: tuple[Folder, ...]
    num_young: int
    """Shards that no kept run lists, but that are too young to be deleted."""
    deleted: bool
    spared: tuple[str, ...] = ()
    """Names of doomed runs that a process has resumed or completed in the meantime."""
    num_spared: int = 0
    """Doomed shards listed by a run that began or was spared in the meantime."""
    threshold_users: Mapping[str, str] = field(default_factory=dict)
    """Doomed runs whose thresholds a kept run labels by, and the newest such run, by name."""

    @property
    def num_files(self) -> int:
        return sum(folder.num_files for folder in (*self.runs, *self.shards))

    @property
    def num_bytes(self) -> int:
        return sum(folder.num_bytes for folder in (*self.runs, *self.shards))

    @property
    def table(self) -> pa.Table:
        """One row for each folder: ``kind`` ("run" or "shard"), ``uri``, ``num_files``,
        ``num_bytes``.
        """
        rows = [{"kind": "run"} | asdict(folder) for folder in self.runs]
        rows += [{"kind": "shard"} | asdict(folder) for folder in self.shards]
        return pa.Table.from_pylist(rows, FOLDERS)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        state = "deleted" if self.deleted else "not needed by a kept run"
        return notebook.table(f"{self.num_bytes:,} bytes {state}", self.table)


def collect_garbage(
    store: str,
    *,
    keep: int = KEEP,
    keep_runs: Sequence[str] = (),
    min_age_h: float = MIN_AGE_H,
    delete: bool = False,
    on_progress: OnMessage = lambda message: None,
) -> Garbage:
    """Find, and with ``delete`` remove, unkept runs of ``store`` and shards that only they list.

    These runs are kept:

    * the ``keep`` newest complete runs;
    * ``keep_runs`` (names or URIs);
    * the newest audited run of each measure and series, because the next audit is compared with it;
    * every run begun after the newest complete one;
    * copies of runs under other names;
    * any other incomplete run that may be under way: a file of it, or of a shard that it plans, is
      younger than ``min_age_h`` hours;
    * a complete run that a process has resumed within ``min_age_h`` hours.

    A shard that no kept run lists stays while it is younger than ``min_age_h`` hours. Files that
    afn-ray does not write are left alone.

    The result is first published as an epoch. Then the runs are listed again, and everything is
    spared that a new or resumed run claims (``epochs``). The call can be killed, repeated, and run
    at the same time as others and as runs.

    Raises ``ConfigError`` for invalid arguments. Raises ``StoreError`` if ``store`` is no store or
    has no such run to keep, if a plan cannot be read (it is then unknown what it refers to, and
    nothing is deleted), or if a file must not be deleted. Raises ``Interrupted`` if the store does
    not answer or other collections change it too often.
    """
    if keep < 1:
        raise ConfigError(f"keep is {keep}; expected at least 1 run")
    if not min_age_h >= 0:
        raise ConfigError(f"min_age_h is {min_age_h}; expected 0 or more hours")
    store = uris.absolute(store).rstrip("/")
    rules = RetentionRules(keep, tuple(keep_runs), min_age_h)
    for _ in range(TRIES):
        snapshot = _take_snapshot(store, rules, delete=delete)
        if not delete:
            return _result(snapshot, deleted=False)
        if not snapshot.found or epochs.publish(store, snapshot.next_epoch):
            return _delete(snapshot, on_progress)
    raise Interrupted(f"{store}: other 'afn gc' calls change it; try again later")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The state of a store at one time, and what of it is deleted."""

    store: str
    there: layout.StoreFiles
    now_s: float
    next_epoch: epochs.Epoch
    planned: dict[str, set[ShardKey]]
    """Shards of each kept run."""
    doomed_runs: tuple[str, ...]
    dead_runs: tuple[str, ...]
    """Runs condemned by an earlier gc."""
    doomed: tuple[ShardKey, ...]
    leftovers: tuple[Leftover, ...]
    num_young: int
    threshold_users: Mapping[str, str]
    """Doomed runs by whose thresholds a kept run labels, and the newest such run, by name."""

    @property
    def found(self) -> bool:
        """True if there is anything to delete."""
        if self.doomed_runs or self.doomed or self.leftovers:
            return True
        return any(self.files_of(name) for name in self.dead_runs)

    def files_of(self, run: str) -> list[storage.StoredFile]:
        """The files of a condemned run that are deleted.

        Its run.json, which marks it as condemned, stays for ``GRAVE_DAYS``.
        """
        files = self.there.runs[run]
        if run in self.dead_runs and not is_old(files, self.now_s - 86400 * GRAVE_DAYS):
            return [file for file in files if file.name != "run.json"]
        return files

    def shard_folders(
        self, claimed: Collection[ShardKey]
    ) -> list[tuple[str, Sequence[storage.StoredFile]]]:
        """The folder of each shard that has garbage, and the files that are deleted.

        ``claimed`` are the shards that a run may use; nothing of them is deleted.
        """
        found: list[tuple[ShardKey, Sequence[storage.StoredFile]]] = []
        found += [(place, self.there.shards[place]) for place in self.doomed]
        found += [(leftover.place, leftover.files) for leftover in self.leftovers]
        folders = []
        for place, files in found:
            if place not in claimed:
                folder = shard_files.shard_uri(self.store, *place)
                folders.append((folder, files))
        return folders


def _take_snapshot(store: str, rules: RetentionRules, *, delete: bool) -> _Snapshot:
    """The state of ``store``, and what of it is deleted by ``rules``."""
    # Read the epoch first: a run that the listing below misses reads this epoch or a newer one.
    before = epochs.newest(store)
    there = layout.sort_files(store, storage.list_below(store))
    if not there.runs and not there.shards:
        raise StoreError(f"{store} is no store; give what was given to 'afn run --store'")
    now_s = probes.clock_s(store) if delete else time.time()
    old_s = now_s - 3600 * rules.min_age_h
    condemned = frozenset(name for name in there.runs if name in before.condemned)
    dead = [name for name in sorted(condemned) if manifest.open_folder(store, name).condemned]
    names = sorted(there.runs.keys() - set(dead))
    kept = kept_runs(store, there, names, rules, old_s)
    planned = {name: planned_shards(store, name) for name in kept}
    needed: set[ShardKey] = set().union(*planned.values())
    known = before.generations()
    generations = {place: known.get(place, before.number) for place in needed}
    doomed: list[ShardKey] = []
    num_young = 0
    for place in sorted(there.shards.keys() - needed):
        files = there.shards[place]
        if is_old(files, old_s):
            doomed.append(place)
            continue
        num_young += 1
        generation = known.get(place, before.number)
        if has_file(files, layout.commit_name(generation)):
            generations[place] = generation
    doomed_runs = [name for name in names if name not in kept]
    complete = [name for name in names if has_file(there.runs[name], "run.json")]
    return _Snapshot(
        store=store,
        there=there,
        now_s=now_s,
        next_epoch=before.after(generations, condemned.union(doomed_runs)),
        planned=planned,
        doomed_runs=tuple(doomed_runs),
        dead_runs=tuple(dead),
        doomed=tuple(doomed),
        leftovers=tuple(find_leftovers(store, there, planned, generations)),
        num_young=num_young,
        threshold_users=threshold_runs(store, kept, complete) if doomed_runs else {},
    )


def _delete(snapshot: _Snapshot, on_progress: OnMessage) -> Garbage:
    """Delete the garbage in ``snapshot``, except what a run claims by now.

    The snapshot's epoch has been published.
    """
    store = snapshot.store
    spared: list[str] = []
    claimed: set[ShardKey] = set()
    if snapshot.found:
        spared, claimed = _claimed(snapshot)
    for name in (*snapshot.doomed_runs, *snapshot.dead_runs):
        if name in spared:
            continue
        folder = uris.join(store, "runs", name)
        on_progress(f"deleting run {folder}")
        files = snapshot.files_of(name)
        if name not in snapshot.dead_runs:  # it was condemned just now, and its run.json says so
            files = [file for file in files if file.name != "run.json"]
        _remove(folder, files)
    folders = snapshot.shard_folders(claimed)
    with ThreadPoolExecutor(checksums.IO_THREADS) as pool:
        for begin in range(0, len(folders), checksums.IO_THREADS):
            few = folders[begin : begin + checksums.IO_THREADS]
            list(pool.map(lambda folder: _remove(*folder), few))
            num_deleted = begin + len(few)
            on_progress(f"{num_deleted:,} of {count(len(folders), 'shard')} deleted")
    deleted = set(snapshot.doomed) - claimed
    for measure_id in {measure_id for measure_id, _ in deleted}:
        storage.remove_if_empty(uris.join(store, "shards", measure_id))
    return _result(snapshot, deleted=True, spared=spared, claimed=claimed)


def _claimed(snapshot: _Snapshot) -> tuple[list[str], set[ShardKey]]:
    """The doomed runs that are spared, and the shards that spared or new runs list.

    All other doomed runs are condemned here: they can never be complete (again).
    """
    folder = uris.join(snapshot.store, "runs")
    now = layout.sort_files(snapshot.store, storage.list_below(folder)).runs
    epoch = snapshot.next_epoch.number
    spared = []
    for name in snapshot.doomed_runs:
        known = snapshot.there.runs[name]
        if _leases(now.get(name, ())) - _leases(known):  # a process has resumed the run
            spared.append(name)
            continue
        run = manifest.RunFolder(uris.join(folder, name), snapshot.store, name, {})
        is_complete = has_file(known, "run.json")
        if not manifest.condemn_run(run, epoch, complete=is_complete):
            spared.append(name)
    gone = {*snapshot.doomed_runs, *snapshot.dead_runs} - set(spared)
    shards: set[ShardKey] = set()
    for name in now.keys() - gone:
        if not snapshot.planned.get(name):  # it is new, was spared, or has written its plan since
            shards |= planned_shards(snapshot.store, name)
    return spared, shards


def _leases(files: Iterable[storage.StoredFile]) -> set[str]:
    """URIs of the leases among ``files``."""
    return {file.uri for file in files if layout.LEASE.fullmatch(file.name)}


def _result(
    snapshot: _Snapshot,
    *,
    deleted: bool,
    spared: Collection[str] = (),
    claimed: Collection[ShardKey] = (),
) -> Garbage:
    runs = [name for name in snapshot.doomed_runs if name not in spared]
    runs += [name for name in snapshot.dead_runs if snapshot.files_of(name)]
    run_folders = []
    for name in runs:
        uri = uris.join(snapshot.store, "runs", name)
        run_folders.append(Folder.of(uri, snapshot.files_of(name)))
    shard_folders = []
    for uri, files in snapshot.shard_folders(claimed):
        shard_folders.append(Folder.of(uri, files))
    return Garbage(
        store=snapshot.store,
        kept=tuple(sorted({*snapshot.planned, *spared})),
        runs=tuple(run_folders),
        shards=tuple(shard_folders),
        num_young=snapshot.num_young,
        deleted=deleted,
        spared=tuple(spared),
        num_spared=sum(place in claimed for place in snapshot.doomed),
        threshold_users={k: v for k, v in snapshot.threshold_users.items() if k not in spared},
    )


def _remove(folder: str, files: Sequence[storage.StoredFile]) -> None:
    """Remove ``files`` of ``folder``, commits before the files that they name."""

    def order(file: storage.StoredFile) -> tuple[bool, str]:
        is_commit = layout.generation_of(file.name) is not None
        return not is_commit, file.uri

    for file in sorted(files, key=order):
        storage.remove(file.uri)
    storage.remove_if_empty(folder)
