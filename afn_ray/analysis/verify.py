"""Verify that a store still holds what was committed: every file, every row, every threshold."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray.analysis import recount, rows
from afn_ray.errors import ConfigError, StoreError
from afn_ray.query import database
from afn_ray.reduce import losses, screen, tree
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import Texts, shards_table
from afn_ray.schema import Shard, fingerprint
from afn_ray.store import (
    blocks,
    calibrations,
    checksums,
    epochs,
    layout,
    manifest,
    orphans,
    parquet,
    probes,
    records,
    shard_files,
    storage,
    uris,
)
from afn_ray.store.blocks import Blocks
from afn_ray.store.commits import Commit
from afn_ray.store.layout import Place
from afn_ray.store.orphans import Age, Orphan, Plans
from afn_ray.store.plans import read_shards
from afn_ray.text import count

SHARDS_AT_ONCE = 4
"""Number of shards checked in parallel; each holds the files of one shard in memory."""
RELATIVE = 1e-9
"""Relative tolerance between two computations of a mean, as the order of a sum may differ.

Everything else must be equal.
"""

OnProgress = Callable[[str], None]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between the store and what was committed.

    ``kind`` is one of:

    - "missing": a file is missing.
    - "damaged": bytes differ from those written.
    - "misplaced": a file of another measure, shard, attempt or run.
    - "plan": a plan reads part of the corpus twice or never.
    - "rows": an error in the rows of a shard.
    - "tables": tables of a run that do not match its shards.
    """

    kind: str
    uri: str
    message: str  # got against expected, and what to do


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


@dataclass(slots=True)
class _Checked:
    """Result of checking one committed shard."""

    commits: dict[int, Commit] = field(default_factory=dict)  # by generation
    findings: list[Finding] = field(default_factory=list)
    unnamed: list[storage.StoredFile] = field(default_factory=list)  # named by none of its commits
    num_files: int = 0
    num_bytes: int = 0
    num_rows: int = 0


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
        runs = [_Run(store, name) for name in sorted(there.runs)]
    else:
        if _is_condemned(store, name):
            manifest.find_run(uri)  # raises the error that says so
        runs = [run := _Run(store, name)]
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

    def check(place: Place) -> _Checked:
        redo = _redo_shard(shard_files.shard_uri(store, *place), lists.get(place, []))
        return _check_shard(
            store,
            place,
            files[place],
            measures.get(place[0]),
            generations.get(place, epoch.number),
            redo,
        )

    checked: dict[Place, _Checked] = {}
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
    store: str, checked: Mapping[Place, _Checked], epoch: epochs.Epoch, plans: Plans, age: Age
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
            "damaged", uri, f"{_without(error, uri)}; delete it, and the next run decides anew"
        )


def _without(error: StoreError, uri: str) -> str:
    """The message of ``error`` without its URI and its advice to verify.

    A finding prints the URI first, and this is already 'afn verify'.
    """
    return (
        str(error)
        .removeprefix(f"{uri} ")
        .removeprefix("is damaged: ")
        .removesuffix(checksums.ASK_VERIFY)
    )


def _read(uri: str, entry: Mapping[str, Any], advice: str) -> tuple[bytes, Finding | None]:
    """Read the file at ``uri``; compare its size and checksum with ``entry``."""
    try:
        data = storage.read_if_there(uri)
    except StoreError as error:
        return b"", Finding("damaged", uri, f"{error}; {advice}")
    if data is None:
        return b"", Finding("missing", uri, f"there is no such file; {advice}")
    if len(data) != entry.get("bytes"):
        return data, Finding(
            "damaged", uri, f"it has {len(data)} bytes, expected {entry.get('bytes')}; {advice}"
        )
    if (got := hashlib.sha256(data).hexdigest()) != entry.get("sha256"):
        return data, Finding(
            "damaged", uri, f"its SHA-256 is {got}, expected {entry.get('sha256')}; {advice}"
        )
    return data, None


# --- shards


def _check_shard(
    store: str,
    place: Place,
    files: Sequence[storage.StoredFile],
    measure: Mapping[str, Any] | None,
    generation: int,
    redo: str,
) -> _Checked:
    """Check the shard at ``place``, whose folder listing gave ``files``.

    ``measure`` is None where no run has it. ``generation`` is the valid generation; its commit may
    be newer than the listing. ``redo`` is the advice on a damaged shard.
    """
    checked = _Checked()
    folder = shard_files.shard_uri(store, *place)
    try:
        names = {file.uri.rpartition("/")[2]: file for file in files}
        generations = {n for name in names if (n := layout.generation_of(name)) is not None}
        found = {}
        for number in sorted(
            {*generations, max(0, generation)}
        ):  # the valid one may be newer than the listing
            name = layout.commit_name(number)
            try:
                committed = shard_files.read_committed(store, *place, number)
                blocks_of = (
                    {} if committed is None else shard_files.committed_blocks(store, *place, number)
                )
            except (
                StoreError
            ) as error:  # without the names in the commit, no file can be called an orphan
                uri = uris.join(folder, name)
                checked.findings.append(Finding("damaged", uri, f"{_without(error, uri)}; {redo}"))
                return checked
            if committed is not None:
                found[number] = (*committed, blocks_of)
        named = {layout.commit_name(number) for number in generations}
        for number, one in found.items():
            checked.commits[number] = one[0]
            named |= {str(file["name"]) for file in one[0].files.values()}
            uri = uris.join(folder, layout.commit_name(number))
            _check_commit(checked, uri, one, (place[0], measure), redo)
        checked.unnamed = [file for name, file in names.items() if name not in named]
    except checksums.DAMAGES as error:
        checked.findings.append(
            Finding("damaged", folder, f"it is not what afn-ray writes: {error!r}; {redo}")
        )
    return checked


def _check_commit(
    checked: _Checked,
    uri: str,
    committed: tuple[Commit, Shard, Mapping[str, Blocks]],
    of: tuple[str, Mapping[str, Any] | None],
    redo: str,
) -> None:
    """Check the commit at ``uri`` and its files; add findings to ``checked``.

    ``of`` is the measure's id and the measure, None where no run has it.
    """
    commit, read, listed = committed
    folder = uri.rpartition("/")[0]
    findings: list[Finding] = []
    identity = Shard.of(read.slices, read.options).id
    if identity != commit.shard:
        message = (
            f"it is the commit of shard {commit.shard}, but its slices are those of shard "
            f"{identity}; {redo}"
        )
        findings.append(Finding("misplaced", uri, message))
    tables: dict[str, pq.ParquetFile] = {}
    for table, entry in commit.files.items():
        file_uri = uris.join(folder, str(entry["name"]))
        origin = {
            "measure": of[0],
            "shard": commit.shard,
            "attempt": commit.attempt,
            "table": table,
        }
        data, finding = _read(file_uri, entry, redo)
        if finding is None and listed.get(str(entry["name"])) != Blocks(
            len(data), blocks.checksums(data)
        ):
            finding = Finding(
                "damaged", file_uri, f"its blocks do not have the CRC-32 that {uri} lists; {redo}"
            )
        checked.num_files, checked.num_bytes = checked.num_files + 1, checked.num_bytes + len(data)
        if finding is None:
            try:
                tables[table] = parquet.open_file(data)
            except (pa.ArrowException, OSError) as error:
                finding = Finding("damaged", file_uri, f"it is no Parquet file: {error}; {redo}")
            else:
                got = records.read_origin(tables[table])
                if got != origin:
                    message = f"it was written as {got}, expected {origin}; {redo}"
                    finding = Finding("misplaced", file_uri, message)
        if finding is not None:
            findings.append(finding)
    checked.findings += findings
    if findings:
        return  # damaged files: their rows are not checked
    checked.num_rows += tables["tokens"].metadata.num_rows
    try:
        rows.check_rows(tables, commit, read, of[1])
    except rows.Wrong as wrong:
        table, message = wrong.args
        file_uri = uris.join(folder, str(commit.files[table]["name"])) if table else uri
        checked.findings.append(Finding("rows", file_uri, f"{message}; {redo}"))
    except (pa.ArrowException, OSError) as error:
        checked.findings.append(
            Finding("damaged", folder, f"its files cannot be decoded: {error}; {redo}")
        )


# --- runs


class _Run:
    """One run: its plan, and the check of its tables against its shards."""

    def __init__(self, store: str, name: str) -> None:
        self.folder = manifest.RunFolder(uris.join(store, "runs", name), store, name, {})
        self.findings: list[Finding] = []
        self.shards: list[Shard] = []
        self.measure: dict[str, Any] = {}
        self.measure_id = ""
        self.num_files = self.num_bytes = 0
        self.proved = False
        uri = self.folder.uri
        self._redo = f"delete {uri}/run.json and give its 'afn run' command again: it reduces anew"
        self._begin_again = f"delete {uri} and give 'afn run' again"
        self._run_json, self._plan = (uris.join(uri, file) for file in ("run.json", "plan.parquet"))
        self.complete = storage.exists(self._run_json)
        if not storage.exists(self._plan):
            if self.complete:
                self._find("missing", self._plan, "there is no such file", self._begin_again)
            return  # without either file, the run crashed before it began
        if self.complete:
            try:
                self.folder = manifest.find_run(uri)
            except StoreError as error:
                self._find("damaged", self._run_json, _without(error, self._run_json))
        try:
            manifest.is_audited(self.folder)
        except StoreError as error:
            mark = uris.join(uri, "audited.json")
            self._find(
                "damaged",
                mark,
                _without(error, mark),
                "delete it: the next audit judges the run's step again",
            )
        for name, entry in self.folder.info.get("tables", {}).items():
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("name"), str)
                or "/" in entry["name"]
            ):
                self._find("damaged", self._run_json, f"its table {name} is {entry!r}")
                continue
            advice = self._begin_again if name == "plan" else self._redo
            data, finding = _read(self._table_uri(name), entry, advice)
            if finding is None and blocks.checksums(data) != entry.get("crc32"):
                message = f"its blocks do not have the CRC-32 that {self._run_json} lists; {advice}"
                finding = Finding("damaged", self._table_uri(name), message)
            self.num_files, self.num_bytes = self.num_files + 1, self.num_bytes + len(data)
            if finding is not None:
                self.findings.append(finding)
                if name == "plan":
                    return
        try:
            self.shards, header = read_shards(self.folder)
        except StoreError as error:
            self._find("damaged", self._plan, _without(error, self._plan), self._begin_again)
            return
        self.measure, self.measure_id = header["measure"], fingerprint(header["measure"])
        self._config, self._frozen = header["config"], header.get("frozen", [])
        self._check_plan()

    def _find(self, kind: str, uri: str, message: str, advice: str | None = None) -> None:
        self.findings.append(Finding(kind, uri, f"{message}; {advice or self._redo}"))

    def _check_plan(self) -> None:
        for shard, times in Counter(s.id for s in self.shards).items():
            if times > 1:
                self._find(
                    "plan", self._plan, f"it lists shard {shard} {times} times", self._begin_again
                )
        if self.findings:
            return
        slices = sorted((p for s in self.shards for p in s.slices), key=lambda p: (p.uri, p.start))
        for uri, pieces in itertools.groupby(slices, key=lambda p: p.uri):
            end = 0
            for piece in pieces:
                if piece.start != end:
                    what = "twice" if piece.start < end else "never"
                    message = (
                        f"it reads part of {uri} {what}: a slice starts at {piece.start}, expected "
                        f"{end}"
                    )
                    self._find("plan", self._plan, message, self._begin_again)
                end = piece.end
            if piece.format != "parquet" and end != piece.size:
                message = (
                    f"it reads part of {uri} never: its last slice ends at {end}, the file at "
                    f"{piece.size}"
                )
                self._find("plan", self._plan, message, self._begin_again)

    def orphans(self, files: Iterable[storage.StoredFile], age: Age) -> Iterator[Orphan]:
        """The files of ``files``, the run's folder, that the run does not name.

        Yields nothing for an incomplete run.
        """
        if not self.folder.info:
            return
        named = orphans.names_of(self.folder)
        for file in files:
            name = file.uri.rpartition("/")[2]
            if name not in named and not layout.LEASE.fullmatch(name):
                yield age.orphan(file, True)

    def check(self, checked: Mapping[Place, _Checked], memory_limit: str) -> None:
        """Compare the complete run with its shards.

        Damage of a shard is reported with the shard, and leaves the run unproved.
        """
        try:
            self._check(checked, memory_limit)
        except (StoreError, *checksums.DAMAGES) as error:
            told = (
                str(error)
                if isinstance(error, StoreError)
                else f"it is not what afn-ray writes: {error!r}"
            )
            self._find("tables", self.folder.uri, told)
            self.proved = False

    def _check(self, checked: Mapping[Place, _Checked], memory_limit: str) -> None:
        info = self.folder.info
        if not info or not self.shards:
            return
        given_up = {entry["shard"] for entry in info.get("quarantined", [])}
        if info["id"] != self.folder.id:
            self._find("misplaced", self._run_json, f"it is the run.json of run {info['id']}")
        measure = {k: v for k, v in info["measure"].items() if k != "id"}
        if given_up - {s.id for s in self.shards}:
            self._find(
                "tables", self._run_json, "it names quarantined shards that its plan does not have"
            )
        if measure != self.measure or info["measure"].get("id") != self.measure_id:
            self._find(
                "misplaced", self._run_json, f"its measure is not {self.measure_id} of its plan"
            )
        if info["layers"] != self.measure["layers"]:
            self._find(
                "tables", self._run_json, f"layers are {info['layers']}, not those of its measure"
            )
        kept = [s for s in self.shards if s.id not in given_up]
        found = [checked.get((self.measure_id, s.id)) for s in kept]
        commits = []
        named = self._named_files()
        for shard, one in zip(kept, found, strict=True):
            if one is not None and one.commits:
                folder = f"shards/{self.measure_id}/{shard.id}"
                theirs = [
                    c
                    for c in one.commits.values()
                    if f"{folder}/{c.files['tokens']['name']}" in named
                ]
                commits.append(theirs[0] if theirs else one.commits[max(one.commits)])
            elif one is None or not one.findings:
                uri = uris.join(
                    shard_files.shard_uri(self.folder.store, self.measure_id, shard.id),
                    "commit.json",
                )
                self._find("missing", uri, f"run {self.folder.uri} has a shard without a commit")
        if self.findings or any(one is None or one.findings for one in found):
            return
        if totals := _wrong_totals(
            info["counts"], commits, [s for s in self.shards if s.id in given_up]
        ):
            self._find("tables", self._run_json, totals)
        num_bytes = [s.num_bytes for s in kept]
        try:
            stored = {name: manifest.read_table(self.folder, name) for name in info["tables"]}
            shards = shards_table(self.measure_id, commits, num_bytes)
            self._compare({"shards": shards}, stored)
            if not self.findings:
                self._ask_duckdb(memory_limit, sum(c.counts["tokens"] for c in commits))
            if not self.findings:
                self._compare(
                    self._reduced(commits, num_bytes, stored["vocabulary"], stored["files"]), stored
                )
        except StoreError as error:
            self._find("tables", self.folder.uri, str(error))
        self.proved = not self.findings

    def _named_files(self) -> set[str]:
        """Token files that the run names; empty where its table is damaged."""
        try:
            return set(manifest.read_table(self.folder, "shards")["tokens_file"].to_pylist())
        except (StoreError, *checksums.DAMAGES):
            return set()

    def _table_uri(self, name: str) -> str:
        return uris.join(self.folder.uri, str(self.folder.info["tables"][name]["name"]))

    def _compare(self, expected: Mapping[str, pa.Table], stored: Mapping[str, pa.Table]) -> None:
        for name, table in expected.items():
            if name not in stored:
                self._find("missing", self._run_json, f"it lists no table {name}")
            elif differs := _difference(stored[name], table):
                self._find("tables", self._table_uri(name), differs)

    def _reduced(
        self,
        commits: Sequence[Commit],
        num_bytes: Sequence[int],
        vocabulary: pa.Table,
        files: pa.Table,
    ) -> dict[str, pa.Table]:
        """Recompute the run's tables: reduce the summaries, which match the rows, and screen.

        The tokenizer and word lists that name and classify types may be missing here, or newer. So
        ``token``, ``text`` and ``class`` come from the stored ``vocabulary``, and only its checksum
        vouches for them; classes that are tags are recomputed. The list of files left out of the
        corpus comes from the stored ``files``.
        """
        ids = vocabulary["token_id"].to_pylist()
        pieces, readable = ([""] * (max(ids, default=0) + 1) for _ in range(2))
        for at, token, text in zip(
            ids, vocabulary["token"].to_pylist(), vocabulary["text"].to_pylist(), strict=True
        ):
            pieces[at], readable[at] = token, text
        shards = CommittedShards(self.folder.store, self.measure_id, commits, num_bytes)
        recorded = tree.Recorded(
            rows.series_of(self.measure),
            self.measure.get("neuron_layers", []),
            "neurons_above" in self.measure,
            tagged := "labels" in self.measure,
        )
        rules = tree.Rules(self._config["language"], self._config["sink_factor"], self._frozen)
        tables = tree.reduce_run(shards, recorded, Texts(pieces, readable), rules)
        at = tables["vocabulary"].column_names.index("class")
        if not tagged:
            tables["vocabulary"] = tables["vocabulary"].set_column(at, "class", vocabulary["class"])
        if (others := tables.get("signal_vocabulary")) is not None and not tagged:
            ids, classes = (vocabulary[name].to_pylist() for name in ("token_id", "class"))
            known = {(i, c == "special"): c for i, c in zip(ids, classes, strict=True)}
            ids, classes = (others[name].to_pylist() for name in ("token_id", "class"))
            column = [known[i, c == "special"] for i, c in zip(ids, classes, strict=True)]
            at = others.column_names.index("class")
            tables["signal_vocabulary"] = others.set_column(
                at, "class", pa.array(column, pa.string())
            )
        tables["files"] = losses.files_table(shards, self.shards, losses.skipped_files(files))
        if worst := self._config.get("screen"):
            tables |= screen.scan_run(shards, self.measure["layers"], tables, readable, worst)
        return tables

    def _ask_duckdb(self, memory_limit: str, n_tokens: int) -> None:
        """Recompute thresholds and counts from the rows, in SQL independent of ``reduce``."""
        with database.open_run(
            self.folder.uri, memory_limit=memory_limit, timeout_s=database.MAX_TIMEOUT_S
        ) as run:
            ((got,),) = run.sql("SELECT count(*) FROM tokens").fetchall()
            if got != n_tokens:
                self._find(
                    "tables", self._table_uri("shards"), f"DuckDB reads {got} tokens of {n_tokens}"
                )
                return
            for layer in self.measure["layers"]:
                recomputed = run.sql(
                    recount.thresholds_sql(layer), [float(self._config["sink_factor"])]
                ).to_arrow_table()
                names = ", ".join(recomputed.column_names)
                stored = run.sql(
                    f"SELECT {names} FROM thresholds WHERE layer = {layer} ORDER BY population"  # noqa: S608
                )
                if differs := _difference(stored.to_arrow_table(), recomputed):
                    self._find("tables", self._table_uri("thresholds"), f"layer {layer}: {differs}")
                elif wrong := run.sql(recount.vocabulary_sql(layer)).fetchall():
                    self._find(
                        "tables",
                        self._table_uri("vocabulary"),
                        f"layer {layer}: {len(wrong)} rows are here or in DuckDB's count of the "
                        "tokens, not in both; "
                        f"the first is of token_id {wrong[0][0]}",
                    )
            for layer in self.measure.get("neuron_layers", []):
                high_only = "neurons_above" in self.measure
                if wrong := run.sql(recount.neurons_sql(layer, high_only)).fetchall():
                    self._find(
                        "tables",
                        self._table_uri("neurons"),
                        f"layer {layer}: {len(wrong)} rows are here or in DuckDB's count of the "
                        "neurons, not in both; "
                        f"the first is of neuron {wrong[0][0]}",
                    )


def _wrong_totals(
    stored: Mapping[str, Any], commits: Sequence[Commit], given_up: Sequence[Shard]
) -> str:
    """Difference between a run.json's counts and the sums over its commits and given-up shards.

    Empty where there is none.
    """
    totals = {k: sum(c.counts[k] for c in commits) for k in commits[0].counts} if commits else {}
    expected = {**losses.with_given_up(totals, given_up), "shards": len(commits)}
    wrong = {k: stored.get(k) for k, n in expected.items() if stored.get(k) != n}
    return (
        f"its counts are {wrong}, but its commits give {rows.only(expected, wrong)}"
        if wrong
        else ""
    )


def _difference(stored: pa.Table, expected: pa.Table) -> str:
    """The first difference between two tables, beyond rounding of floats; empty without one."""
    if stored.column_names != expected.column_names:
        return f"its columns are {stored.column_names}, expected {expected.column_names}"
    if len(stored) != len(expected):
        return f"it has {len(stored)} rows, expected {len(expected)}"
    for name in expected.column_names:
        ours, theirs = expected[name], stored[name]
        if pa.types.is_floating(ours.type) and ours.null_count == theirs.null_count:
            wrong = ~np.isclose(
                theirs.to_numpy(), ours.to_numpy(), rtol=RELATIVE, atol=1e-12, equal_nan=True
            )
        elif theirs.equals(ours):
            continue
        else:
            wrong = np.array(
                [a != b for a, b in zip(theirs.to_pylist(), ours.to_pylist(), strict=True)]
            )
        if wrong.any():
            row = int(np.argmax(wrong))
            return f"row {row}: {name} is {theirs[row]}, but its shards give {ours[row]}"
    return ""


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
