"""Files of a store that no commit and no run names, and which of them may be removed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from afn_ray.errors import StoreError
from afn_ray.fingerprints import fingerprint
from afn_ray.store import epochs, layout, manifest, shard_files, storage, uris, verdicts
from afn_ray.store.commits import Commit
from afn_ray.store.layout import ShardKey
from afn_ray.store.plans import read_shards


@dataclass(frozen=True, slots=True)
class Orphan:
    """A file that no commit or run names, left by an attempt or reduce that lost or was killed."""

    uri: str
    num_bytes: int
    age_s: float
    removable: bool
    """No process can name the file any more."""
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Age:
    """Minimum age of files that no process can still be working on."""

    now_s: float
    """Unix time by the store's clock, if files are to be removed."""
    min_age_h: float

    def orphan(self, file: storage.StoredFile, removable: bool | None = None) -> Orphan:
        """``file`` as an orphan; ``removable`` None means: once the file is old enough."""
        age_s = max(0.0, self.now_s - file.modified_s)
        if removable is None:
            removable = self.is_reached(age_s)
        return Orphan(file.uri, file.size, age_s, removable)

    def is_reached(self, age_s: float) -> bool:
        """True if a file that is ``age_s`` seconds old is old enough."""
        return age_s >= 3600 * self.min_age_h


@dataclass(slots=True)
class Plans:
    """The shards in the plans of a store's runs. Attempts at these shards may still commit."""

    runs: set[str] = field(default_factory=set)
    """Names of the runs whose plans were read."""
    under_way: set[ShardKey] = field(default_factory=set)
    """Shards of the runs that are not complete."""
    all: set[ShardKey] = field(default_factory=set)
    """Shards of all runs."""
    unreadable: bool = False
    """True if a plan could not be read. It may list any shard."""

    def add(self, name: str, places: Collection[ShardKey], *, complete: bool) -> None:
        """Add the planned ``places`` of the run ``name``."""
        self.runs.add(name)
        self.all.update(places)
        if not complete:
            self.under_way.update(places)

    def add_new(self, store: str) -> None:
        """Read the plans of the runs in ``store`` that were not read yet."""
        for name in manifest.run_names(store):
            uri = uris.join(store, "runs", name)
            if name in self.runs or not storage.exists(uris.join(uri, "plan.parquet")):
                continue
            try:
                run = manifest.open_folder(store, name)
                shards, header = read_shards(run)
            except StoreError:
                self.unreadable = True
                continue
            measure_id = fingerprint(header["measure"])
            places = {(measure_id, shard.id) for shard in shards}
            self.add(name, places, complete=bool(run.info))


def may_remove(place: ShardKey, generation: int, *, committed: bool, plans: Plans) -> bool | None:
    """True if a file that no commit names can be removed from the folder of the shard at ``place``.

    It can be removed if no attempt can name it any more. None means: only if it is old, because the
    run of its attempt is gone or was complete.

    ``generation`` is the valid generation, read after the file was listed. ``committed`` is true if
    that generation has a commit; every other attempt at it then loses. Only runs under way can find
    a commit of an older generation. ``plans`` were read after the file was listed.
    """
    if committed and generation == 0:
        return True
    if plans.unreadable or place in plans.under_way:
        return False
    if committed:
        return True
    if generation and place in plans.all:
        return False
    return None


def cleaned(store: str, orphans: Sequence[Orphan], plans: Plans, age: Age) -> list[Orphan]:
    """Remove the removable ``orphans`` and return all of them with their new state.

    A file that a commit or run names by now, or may name, stays. ``plans`` holds the plans that
    were read before; those of new runs are added.
    """
    plans.add_new(store)
    epoch = epochs.newest(store)
    generations = epoch.generations()
    done: list[Orphan] = []
    for folder, group in itertools.groupby(orphans, key=_folder_of):
        mine = list(group)
        named: set[str] = set()
        if name := manifest.split_uri(folder)[1]:
            named = names_of(manifest.open_folder(store, name))
        elif folder != uris.absolute(store):
            measure_id, shard = folder.split("/")[-2:]
            place = (measure_id, shard)
            generation = generations.get(place, epoch.number)
            commits = commits_of(store, place)
            named = _names_in(commits.values())
            may = may_remove(place, generation, committed=generation in commits, plans=plans)
            mine = [_checked_again(orphan, may, age) for orphan in mine]
        removable = [orphan.uri for orphan in mine if orphan.removable]
        storage.delete([uri for uri in removable if _name_of(uri) not in named])
        left = {file.uri for file in storage.list_below(folder)}
        done += [replace(orphan, removed=orphan.uri not in left) for orphan in mine]
    return done


def _folder_of(orphan: Orphan) -> str:
    return orphan.uri.rpartition("/")[0]


def _name_of(uri: str) -> str:
    return uri.rpartition("/")[2]


def _names_in(commits: Iterable[Commit]) -> set[str]:
    """Names of the files that ``commits`` name."""
    names: set[str] = set()
    for commit in commits:
        names.update(commit.file_names)
    return names


def _checked_again(orphan: Orphan, may: bool | None, age: Age) -> Orphan:
    """``orphan``, removable only if it was before and ``may_remove`` now gives ``may``."""
    if not orphan.removable:
        return orphan
    if may is None:
        may = age.is_reached(orphan.age_s)
    return replace(orphan, removable=may)


def commits_of(store: str, place: ShardKey) -> Mapping[int, Commit]:
    """All commits in the folder of the shard at ``place``, by generation."""
    found = {}
    for name in storage.list_names(shard_files.shard_uri(store, *place)):
        if (generation := layout.generation_of(name)) is not None:
            commit = shard_files.read_commit(store, *place, generation)
            if commit is not None:
                found[generation] = commit
    return found


def names_of(folder: manifest.RunFolder) -> set[str]:
    """Names of the files in a run's folder that belong to the run."""
    names = {"plan.parquet", "run.json", "audited.json", *verdicts.NAMES, layout.STATUS}
    for table in folder.info.get("tables", {}).values():
        if isinstance(table, dict) and "name" in table:
            names.add(str(table["name"]))
    return names
