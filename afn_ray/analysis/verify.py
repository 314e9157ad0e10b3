"""Verify that a store still holds what was committed: every file, every row, every threshold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from afn_ray.analysis.findings import Finding, without_uri
from afn_ray.analysis.run_check import RunCheck
from afn_ray.analysis.shard_check import CheckedShard, check_shard
from afn_ray.errors import ConfigError, StoreError
from afn_ray.store import (
    calibrations,
    epochs,
    layout,
    manifest,
    orphans,
    probes,
    shard_files,
    storage,
    uris,
)
from afn_ray.store.layout import Place
from afn_ray.store.orphans import Age, Orphan, Plans
from afn_ray.text import count

SHARDS_AT_ONCE = 4
"""Number of shards checked in parallel; each holds the files of one shard in memory."""

OnProgress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """The extent and the findings of one verification."""

    uri: str
    findings: tuple[Finding, ...]  # by URI; empty: everything is as committed
    orphans: tuple[Orphan, ...]
    foreign: tuple[str, ...]  # URIs of files that afn-ray never writes to a store; left alone
    incomplete: tuple[str, ...]  # URIs of runs that have not ended; no damage
    condemned: tuple[str, ...]  # URIs of runs that a gc condemned but has not removed; no damage
    unproved: tuple[
        str, ...
    ]  # URIs of complete runs whose tables could not be verified because of the findings
    num_shards: int  # committed shards
    num_files: int  # files of shards and runs
    num_bytes: int
    num_rows: int  # rows of tokens
    num_runs: int  # runs whose tables were recomputed
    seconds: float


def verify_store(
    uri: str,
    *,
    clean: bool = False,
    min_age_h: float = 24.0,
    memory_limit: str = "2GB",
    on_progress: OnProgress = lambda message: None,
) -> Verification:
    """Check all committed shards and complete runs of the store, or one run and its shards.

    ``uri`` is that of the store or the run. Every file is read once, a few shards at a time.
    ``memory_limit`` is DuckDB's.

    ``clean`` removes orphans. An orphan goes at once where a commit or a run.json rules out its
    use. An orphan of a shard that no run plans goes when it is older than ``min_age_h`` hours.
    Orphans of a shard that a run is about to process stay.

    Damage is returned, not raised. Raises ``StoreError`` when there is neither a store nor a run,
    and ``Interrupted`` when the store does not answer.
    """
    if not min_age_h >= 0:
        raise ConfigError(f"min_age_h is {min_age_h}; expected 0 or more hours")
    began = time.monotonic()
    uri = uris.absolute(uri).rstrip("/")
    store, name = manifest.split_uri(uri)
    if name and not {"plan.parquet", "run.json"} & {*storage.list_names(uri)}:
        store = uri
    if store == uri and not {"runs", "shards"} & {*storage.list_names(uri)}:
        raise StoreError(
            f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'"
        )
    findings: list[Finding] = []
    dead: list[str] = []
    if store == uri:
        there = layout.sort_files(store, storage.list_below(store))
        epoch = _newest_epoch(store, findings)
        for name in sorted(there.runs):
            if _is_condemned(store, name):
                left = there.runs.pop(name)
                dead += [uris.join(store, "runs", name)] if len(left) > 1 else []
        manifest.set_copies_apart(store, there)
        runs = [RunCheck(store, name) for name in sorted(there.runs)]
    else:
        if _is_condemned(store, name):
            manifest.find_run(uri)  # raises the error that says so
        runs = [run := RunCheck(store, name)]
        planned = {(run.measure_id, shard.id) for shard in run.shards}
        there = layout.sort_files(store, storage.list_below(uri))
        if planned:
            shards = layout.sort_files(
                store, storage.list_below(uris.join(store, "shards", run.measure_id))
            ).shards
            there.shards = {place: files for place, files in shards.items() if place in planned}
        epoch = _newest_epoch(store, findings)
    files = there.shards
    age = Age(probes.clock_s(store) if clean else time.time(), min_age_h)
    measures = {run.measure_id: run.measure for run in runs if run.measure}
    lists: dict[Place, list[str]] = {}  # run.json URIs of complete runs, by shard
    for run in runs:
        for shard in run.shards if run.complete else ():
            lists.setdefault((run.measure_id, shard.id), []).append(
                uris.join(run.folder.uri, "run.json")
            )

    generations = epoch.generations()

    def check(place: Place) -> CheckedShard:
        redo = _redo_shard(shard_files.shard_uri(store, *place), lists.get(place, []))
        return check_shard(
            store,
            place,
            files[place],
            measures.get(place[0]),
            generations.get(place, epoch.number),
            redo,
        )

    checked: dict[Place, CheckedShard] = {}
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for place, one in zip(files, pool.map(check, files), strict=True):
            checked[place] = one
            on_progress(f"{len(checked):,} of {len(files):,} shards checked")
    findings += [f for one in checked.values() for f in one.findings]
    for pilot in there.pilots:
        findings += _check_pilot(store, pilot)
    for run in runs:
        on_progress(f"recomputing {run.folder.uri}")
        run.check(checked, memory_limit)
        findings += run.findings
    plans = Plans()
    for run in runs:
        if run.shards:
            plans.add(
                run.folder.id, {(run.measure_id, s.id) for s in run.shards}, complete=run.complete
            )
    loose = [age.orphan(file) for file in there.probes]
    loose += _of_shards(store, checked, epoch, plans, age)
    for run in runs:
        loose += run.orphans(there.runs.get(run.folder.id, []), age)
    if clean and epoch.number >= 0:
        loose = orphans.cleaned(store, loose, plans, age)
    done = [one for one in checked.values() if one.commits]
    return Verification(
        uri,
        tuple(sorted(findings, key=lambda f: f.uri)),
        tuple(loose),
        tuple(there.foreign),
        tuple(r.folder.uri for r in runs if not r.complete),
        tuple(sorted(dead)),
        tuple(r.folder.uri for r in runs if r.complete and not r.proved),
        len(done),
        sum(one.num_files for one in done) + sum(r.num_files for r in runs),
        sum(one.num_bytes for one in done) + sum(r.num_bytes for r in runs),
        sum(one.num_rows for one in done),
        sum(r.proved for r in runs),
        time.monotonic() - began,
    )


def _is_condemned(store: str, name: str) -> bool:
    try:
        return manifest.open_folder(store, name).condemned
    except StoreError:  # damaged; reported when the run is checked
        return False


def _newest_epoch(store: str, findings: list[Finding]) -> epochs.Epoch:
    try:
        return epochs.newest(store)
    except StoreError as error:
        uri, _, what = str(error).partition(" ")
        findings.append(Finding("damaged", uri, what.removeprefix("is damaged: ")))
        return epochs.Epoch(-1)


def _of_shards(
    store: str, checked: Mapping[Place, CheckedShard], epoch: epochs.Epoch, plans: Plans, age: Age
) -> Iterator[Orphan]:
    """Files in shard folders that no commit of their shard names."""
    if any(one.unnamed for one in checked.values()):
        plans.add_new(store)
        plans.unreadable |= epoch.number < 0
    generations = epoch.generations()
    for place, one in checked.items():
        generation = generations.get(place, epoch.number)
        may = orphans.may_remove(
            place, generation, committed=generation in one.commits, plans=plans
        )
        yield from (age.orphan(file, may) for file in one.unnamed)


def _redo_shard(folder: str, runs: Sequence[str]) -> str:
    """Advice on a damaged shard; ``runs`` are URIs of the run.json files that list it."""
    others = f" and {len(runs) - 3} more that list the shard" if len(runs) > 3 else ""
    return (
        f"delete {' and '.join([folder, *runs[:3]])}{others}, then give 'afn run' again: it is "
        "done anew"
    )


def _check_pilot(store: str, name: str) -> Iterator[Finding]:
    uri = uris.join(store, "pilots", name)
    try:
        calibrations.read_pilot(store, name.removesuffix(".json"))
    except StoreError as error:
        yield Finding(
            "damaged", uri, f"{without_uri(error, uri)}; delete it, and the next run decides anew"
        )


# --- shards


# --- runs


# --- output


def lines(v: Verification) -> Iterator[str]:
    """One line per finding, orphan and run with a problem, and a last line with the totals."""
    for finding in v.findings:
        yield f"{finding.kind:<10}  {finding.uri}: {finding.message}"
    for orphan in v.orphans:
        state = (
            "removed"
            if orphan.removed
            else "nothing names it; --clean removes it"
            if orphan.removable
            else "somebody may be at work on it"
        )
        yield (
            f"orphan      {orphan.uri}: {orphan.num_bytes:,} bytes, {orphan.age_s / 3600:.1f} h "
            f"old; {state}"
        )
    for uri in v.foreign:
        yield f"foreign     {uri}: afn-ray does not write such a file; it is left alone"
    for uri in v.incomplete:
        yield f"incomplete  {uri}: give its 'afn run' command again to finish it"
    for uri in v.condemned:
        yield (
            f"condemned   {uri}: 'afn gc' gave it up; 'afn gc --delete' removes what is left of it"
        )
    for uri in v.unproved:
        yield f"unproved    {uri}: its tables are not shown to be right, for what is said above"
    yield (
        f"checked {count(v.num_shards, 'shard')}, {count(v.num_files, 'file')}, "
        f"{count(v.num_bytes, 'byte')}, "
        f"{count(v.num_rows, 'token')}; recomputed {count(v.num_runs, 'run')}; {v.seconds:.1f} s: "
        + (count(len(v.findings), "finding") if v.findings else "all is as it was committed")
    )
