"""Files of a store that nothing names, and which of them nobody can name any more: those may be
removed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from afn_ray.errors import StoreError
from afn_ray.schema import fingerprint
from afn_ray.store import epochs, layout, manifest, shard_files, storage
from afn_ray.store.commits import Commit
from afn_ray.store.layout import Place


@dataclass(frozen=True, slots=True)
class Orphan:
    """A file of an attempt or a reduce that lost or died: no commit and no run names it."""

    uri: str
    num_bytes: int
    age_s: float
    removable: bool  # nobody can come to name it
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Age:
    """How old a file must be before nobody can be at work on it."""

    now_s: float  # by the store's clock, if anything is to be removed
    min_age_h: float

    def orphan(self, file: storage.StoredFile, removable: bool | None = None) -> Orphan:
        """``file`` as an orphan; ``removable`` None: once it is old."""
        age_s = max(0.0, self.now_s - file.modified_s)
        return Orphan(
            file.uri,
            file.size,
            age_s,
            age_s >= 3600 * self.min_age_h if removable is None else removable,
        )


@dataclass(slots=True)
class Plans:
    """Shards that the runs of a store plan: whose attempts may still commit."""

    runs: set[str] = field(default_factory=set)  # names, of those that were read
    under_way: set[Place] = field(default_factory=set)  # of runs that are not complete
    all: set[Place] = field(default_factory=set)
    unreadable: bool = False  # a plan cannot be read: it may list any shard

    def add(self, name: str, places: Collection[Place], *, complete: bool) -> None:
        self.runs.add(name)
        self.all.update(places)
        if not complete:
            self.under_way.update(places)

    def add_new(self, store: str) -> None:
        """Read the plans of the runs in ``store`` that are not in here yet."""
        for name in manifest.run_names(store):
            uri = storage.join(store, "runs", name)
            if name in self.runs or not storage.exists(storage.join(uri, "plan.parquet")):
                continue
            try:
                run = manifest.open_folder(store, name)
                shards, header = manifest.read_shards(run)
            except StoreError:
                self.unreadable = True
                continue
            measure_id = fingerprint(header["measure"])
            self.add(name, {(measure_id, shard.id) for shard in shards}, complete=bool(run.info))


def may_remove(place: Place, generation: int, *, committed: bool, plans: Plans) -> bool | None:
    """Whether no attempt can come to name a file in the folder of the shard at ``place`` that no
    commit names.

    ``generation``: the one that counts, read after the file was listed; ``committed``: it has a
    commit, so that every other attempt at it loses. A commit of an older generation is found by no
    run but those that are under way. None: an old file can be removed, since the run of its attempt
    is gone or was complete. ``plans`` were read after the file was listed.
    """
    if committed and generation == 0:
        return True
    if plans.unreadable or place in plans.under_way:
        return False
    if committed:
        return True
    return False if generation and place in plans.all else None


def cleaned(store: str, orphans: Sequence[Orphan], plans: Plans, age: Age) -> list[Orphan]:
    """``orphans`` once the removable ones are removed; one that was or may be named in the meantime
    stays.

    ``plans`` has the runs that were read; those of others are added.
    """
    plans.add_new(store)
    epoch = epochs.newest(store)
    generations = epoch.generations()
    done: list[Orphan] = []
    for folder, group in itertools.groupby(orphans, key=lambda o: o.uri.rpartition("/")[0]):
        mine = list(group)
        named: set[str] = set()
        if folder.rpartition("/")[0].endswith("/runs"):
            named = names_of(manifest.open_folder(store, folder.rpartition("/")[2]))
        elif folder != storage.absolute(store):
            measure_id, shard = folder.split("/")[-2:]
            generation = generations.get((measure_id, shard), epoch.number)
            commits = commits_of(store, (measure_id, shard))
            named = {str(f["name"]) for commit in commits.values() for f in commit.files.values()}
            may = may_remove(
                (measure_id, shard), generation, committed=generation in commits, plans=plans
            )
            mine = [
                replace(o, removable=o.age_s >= 3600 * age.min_age_h if may is None else may)
                if o.removable
                else o
                for o in mine
            ]
        storage.delete(
            [o.uri for o in mine if o.removable and o.uri.rpartition("/")[2] not in named]
        )
        left = {file.uri for file in storage.list_below(folder)}
        done += [replace(o, removed=o.uri not in left) for o in mine]
    return done


def commits_of(store: str, place: Place) -> Mapping[int, Commit]:
    """All commits in the folder of the shard at ``place``, by generation."""
    found = {}
    for name in storage.list_names(shard_files.shard_uri(store, *place)):
        if (generation := layout.generation_of(name)) is not None:
            commit = shard_files.read_commit(store, *place, generation)
            if commit is not None:
                found[generation] = commit
    return found


def names_of(folder: manifest.RunFolder) -> set[str]:
    """Files in a run's folder that are its own."""
    tables = folder.info.get("tables", {}).values()
    return {
        "plan.parquet",
        "run.json",
        "audited.json",
        layout.STATUS,
        *(str(t["name"]) for t in tables if isinstance(t, dict) and "name" in t),
    }
