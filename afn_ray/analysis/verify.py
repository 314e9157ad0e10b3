"""Verify that a store still holds what was committed: every file, every row, every threshold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields

import pyarrow as pa

from afn_ray import notebook, token_rows
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
from afn_ray.store.layout import ShardKey
from afn_ray.store.orphans import Age, Orphan, Plans
from afn_ray.text import count

SHARDS_AT_ONCE = 4
"""Number of shards checked in parallel; each holds the files of one shard in memory."""

OnMessage = Callable[[str], None]


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
    # What measured the shards of a run, by its URI; only runs whose shards differ in it. No damage.
    mixed: Mapping[str, Mapping[str, int]]
    # Rows that a run keeps, by its URI; only complete runs that do not keep all. No damage.
    without_rows: Mapping[str, str]

    @property
    def table(self) -> pa.Table:
        """One row for each finding; ``kind``, ``uri`` and ``message`` are those of ``Finding``."""
        names = pa.schema([(field.name, pa.string()) for field in fields(Finding)])
        return pa.Table.from_pylist([asdict(finding) for finding in self.findings], names)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        checked = f"{count(self.num_files, 'file')}, {count(self.num_shards, 'shard')}"
        state = "damaged" if self.findings else "as it was committed"
        return notebook.table(f"{checked}: {state}", self.table)


def verify_store(
    uri: str,
    *,
    clean: bool = False,
    min_age_h: float = 24.0,
    memory_limit: str = "2GB",
    on_progress: OnMessage = lambda message: None,
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
    contents = _read_contents(uri)
    store, runs = contents.store, contents.runs
    age = Age(probes.clock_s(store) if clean else time.time(), min_age_h)
    checked = _check_shards(contents, on_progress)
    for run in runs:
        on_progress(f"recomputing {run.folder.uri}")
        run.check(checked, memory_limit)
    findings = _all_findings(contents, checked)
    found = _find_orphans(contents, checked, age, clean=clean)
    committed = [one for one in checked.values() if one.commits]
    complete = [run for run in runs if run.complete]
    lean = [run for run in complete if not token_rows.is_complete(run.record)]
    return Verification(
        uri=uri,
        findings=tuple(sorted(findings, key=lambda finding: finding.uri)),
        orphans=tuple(found),
        foreign=tuple(contents.files.foreign),
        incomplete=tuple(run.folder.uri for run in runs if not run.complete),
        condemned=tuple(sorted(contents.condemned)),
        unproved=tuple(run.folder.uri for run in complete if not run.proved),
        num_shards=len(committed),
        num_files=sum(one.num_files for one in committed) + sum(run.num_files for run in runs),
        num_bytes=sum(one.num_bytes for one in committed) + sum(run.num_bytes for run in runs),
        num_rows=sum(one.num_rows for one in committed),
        num_runs=sum(run.proved for run in runs),
        seconds=time.monotonic() - began,
        mixed={run.folder.uri: run.makers for run in runs if len(run.makers) > 1},
        without_rows={run.folder.uri: token_rows.describe(run.record) for run in lean},
    )


def _read_contents(uri: str) -> _Scope:
    """The contents of the store or the run at ``uri``; raises ``StoreError`` if it is neither."""
    store, name = manifest.split_uri(uri)
    names = {*storage.list_names(uri)}
    if name and names & {"plan.parquet", "run.json"}:
        return _read_run(store, name)
    if not names & {"runs", "shards"}:
        raise StoreError(
            f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'"
        )
    return _read_store(uri)


def _all_findings(contents: _Scope, checked: Mapping[ShardKey, CheckedShard]) -> list[Finding]:
    """Findings of the store, its shards, its calibrations and its runs."""
    findings = list(contents.findings)
    for one in checked.values():
        findings += one.findings
    for name in contents.files.pilots:
        findings += _check_calibration(contents.store, name)
    for run in contents.runs:
        findings += run.findings
    return findings


@dataclass(slots=True)
class _Scope:
    """The part of a store that is verified: the whole store, or one run and its shards."""

    store: str
    files: layout.StoreFiles
    epoch: epochs.Epoch
    runs: list[RunCheck]
    condemned: list[str]  # URIs of runs that a gc condemned but has not removed
    findings: list[Finding]


def _read_store(store: str) -> _Scope:
    findings: list[Finding] = []
    condemned: list[str] = []
    files = layout.sort_files(store, storage.list_below(store))
    epoch = _newest_epoch(store, findings)
    for name in sorted(files.runs):
        if _is_condemned(store, name):
            left = files.runs.pop(name)
            if len(left) > 1:
                condemned.append(uris.join(store, "runs", name))
    manifest.set_copies_apart(store, files)
    runs = [RunCheck(store, name) for name in sorted(files.runs)]
    return _Scope(store, files, epoch, runs, condemned, findings)


def _read_run(store: str, name: str) -> _Scope:
    uri = uris.join(store, "runs", name)
    if _is_condemned(store, name):
        manifest.find_run(uri)  # raises the error that says so
    findings: list[Finding] = []
    run = RunCheck(store, name)
    planned = {(run.measure_id, shard.id) for shard in run.shards}
    files = layout.sort_files(store, storage.list_below(uri))
    if planned:
        of_measure = storage.list_below(uris.join(store, "shards", run.measure_id))
        shards = layout.sort_files(store, of_measure).shards
        files.shards = {place: shards[place] for place in shards if place in planned}
    epoch = _newest_epoch(store, findings)
    return _Scope(store, files, epoch, [run], [], findings)


def _check_shards(contents: _Scope, on_progress: OnMessage) -> dict[ShardKey, CheckedShard]:
    """Check all shards, a few at a time."""
    store = contents.store
    files = contents.files.shards
    epoch = contents.epoch
    measures = {run.measure_id: run.measure for run in contents.runs if run.measure}
    listed_in: dict[ShardKey, list[str]] = {}  # run.json URIs of complete runs, by shard
    for run in contents.runs:
        for shard in run.shards if run.complete else ():
            run_json = uris.join(run.folder.uri, "run.json")
            listed_in.setdefault((run.measure_id, shard.id), []).append(run_json)
    generations = epoch.generations()

    def check(place: ShardKey) -> CheckedShard:
        redo = _redo_shard(shard_files.shard_uri(store, *place), listed_in.get(place, []))
        generation = generations.get(place, epoch.number)
        return check_shard(store, place, files[place], measures.get(place[0]), generation, redo)

    checked: dict[ShardKey, CheckedShard] = {}
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for place, one in zip(files, pool.map(check, files), strict=True):
            checked[place] = one
            on_progress(f"{len(checked):,} of {count(len(files), 'shard')} checked")
    return checked


def _find_orphans(
    contents: _Scope, checked: Mapping[ShardKey, CheckedShard], age: Age, *, clean: bool
) -> list[Orphan]:
    """Files that nothing names; ``clean`` removes those that nothing can need."""
    store, epoch = contents.store, contents.epoch
    plans = Plans()
    for run in contents.runs:
        if run.shards:
            planned = {(run.measure_id, shard.id) for shard in run.shards}
            plans.add(run.folder.id, planned, complete=run.complete)
    found = [age.orphan(file) for file in contents.files.probes]
    found += _of_shards(store, checked, epoch, plans, age)
    for run in contents.runs:
        found += run.orphans(contents.files.runs.get(run.folder.id, []), age)
    if clean and epoch.number >= 0:
        found = orphans.cleaned(store, found, plans, age)
    return found


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
    store: str,
    checked: Mapping[ShardKey, CheckedShard],
    epoch: epochs.Epoch,
    plans: Plans,
    age: Age,
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


def _check_calibration(store: str, name: str) -> Iterator[Finding]:
    uri = uris.join(store, "pilots", name)
    try:
        calibrations.read_calibration(store, name.removesuffix(".json"))
    except StoreError as error:
        yield Finding(
            "damaged", uri, f"{without_uri(error, uri)}; delete it, and the next run decides anew"
        )


# --- output


def lines(v: Verification) -> Iterator[str]:
    """One line per finding, orphan and run with a problem, and a last line with the totals."""
    for finding in v.findings:
        yield f"{finding.kind:<10}  {finding.uri}: {finding.message}"
    for orphan in v.orphans:
        yield (
            f"orphan      {orphan.uri}: {orphan.num_bytes:,} bytes, {orphan.age_s / 3600:.1f} h "
            f"old; {_state_of(orphan)}"
        )
    for uri in v.foreign:
        yield f"foreign     {uri}: afn-ray does not write such a file; it is left alone"
    for uri in v.incomplete:
        yield f"incomplete  {uri}: {manifest.why_incomplete(uri)}"
    for uri in v.condemned:
        yield (
            f"condemned   {uri}: 'afn gc' gave it up; 'afn gc --delete' removes what is left of it"
        )
    for uri, makers in v.mixed.items():
        ways = "; ".join(f"{count(n, 'shard')} on {maker}" for maker, n in makers.items())
        yield f"mixed       {uri}: last digits of strengths may differ between {ways}"
    for uri, kept_rows in v.without_rows.items():
        yield (
            f"summaries   {uri}: it recorded {kept_rows}; its tables were computed again from its "
            "summaries, and of these only the checksums were checked"
        )
    for uri in v.unproved:
        yield f"unproved    {uri}: its tables are not shown to be right, for what is said above"
    result = count(len(v.findings), "finding") if v.findings else "all is as it was committed"
    yield (
        f"checked {count(v.num_shards, 'shard')}, {count(v.num_files, 'file')}, "
        f"{count(v.num_bytes, 'byte')}, {count(v.num_rows, 'token')}; recomputed "
        f"{count(v.num_runs, 'run')}; {v.seconds:.1f} s: {result}"
    )


def _state_of(orphan: Orphan) -> str:
    if orphan.removed:
        return "removed"
    if orphan.removable:
        return "nothing names it; --clean removes it"
    return "another process may be working on it"
