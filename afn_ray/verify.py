"""Prove that a store still holds what was committed: every file, every row, every threshold."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afn_ray import manifest, neurons, query, records, reduce, screen, storage
from afn_ray.errors import ConfigError, StoreError, count
from afn_ray.manifest import Place
from afn_ray.schema import (
    PAIRS_SCHEMA,
    SPECIAL,
    SUMMARY_SCHEMA,
    TAGGED_SUMMARY_SCHEMA,
    Series,
    Shard,
    documents_schema,
    fingerprint,
    neurons_column,
    token_neurons_schema,
    tokens_schema,
)
from afn_ray.thresholds import Summary, round_strengths

SHARDS_AT_ONCE = 4
"""Each holds its files in memory, one shard's worth."""
RELATIVE = 1e-9
"""Between two computations of a mean; the order of a sum may differ. All else is equal or wrong."""

OnProgress = Callable[[str], None]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it was committed.

    ``kind``: "missing" (a file), "damaged" (bytes that are not those written), "misplaced" (another measure's,
    shard's, attempt's or run's), "plan" (reads a part of the corpus twice or never), "rows" (of a shard), "tables" (of
    a run, against its shards).
    """

    kind: str
    uri: str
    message: str  # got against expected, and what to do


@dataclass(frozen=True, slots=True)
class Orphan:
    """A file of an attempt or a reduce that lost or died: no commit and no run names it."""

    uri: str
    num_bytes: int
    age_s: float
    removable: bool  # its shard or run is complete, or it is old enough that nobody is at work on it
    removed: bool = False


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and what was found."""

    uri: str
    findings: tuple[Finding, ...]  # in the order of their URIs; none: all is as it was committed
    orphans: tuple[Orphan, ...]
    foreign: tuple[str, ...]  # URIs of files in the store that afn-ray never writes there; they are left alone
    incomplete: tuple[str, ...]  # URIs of runs that have not ended; no damage
    unproved: tuple[str, ...]  # URIs of complete runs whose tables could not be shown to be right, for what was found
    num_shards: int  # committed
    num_files: int  # of shards and runs
    num_bytes: int
    num_rows: int  # of tokens
    num_runs: int  # whose tables were recomputed
    seconds: float


@dataclass(slots=True)
class _Checked:
    """One committed shard as it was found."""

    commit: manifest.Commit | None = None
    findings: list[Finding] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0
    num_rows: int = 0


def verify_store(
    uri: str, *, clean: bool = False, min_age_h: float = 24.0, memory_limit: str = "2GB",
    on_progress: OnProgress = lambda message: None,
) -> Verification:  # fmt: skip
    """Check all committed shards and complete runs of the store at ``uri``, or one run and its shards.

    Every file is read once, a few shards at a time. ``clean`` removes orphans; those of a shard without a commit
    only when they are older than ``min_age_h`` hours. ``memory_limit`` is DuckDB's. Damage is returned, not raised.
    Raises ``StoreError`` when there is neither a store nor a run, ``Interrupted`` when it does not answer.
    """
    if not min_age_h >= 0:
        raise ConfigError(f"min_age_h is {min_age_h}; expected 0 or more hours")
    began = time.monotonic()
    uri = storage.absolute(uri).rstrip("/")
    store, _, name = uri.rpartition("/runs/")
    if not name or "/" in name or not {"plan.parquet", "run.json"} & {*storage.list_names(uri)}:
        store = uri
    if store == uri and not {"runs", "shards"} & {*storage.list_names(uri)}:
        raise StoreError(f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'")
    if store == uri:
        there = manifest.sort_files(store, storage.list_below(store))
        runs = [_Run(store, name) for name in sorted(there.runs)]
    else:
        runs = [run := _Run(store, name)]
        planned = {(run.measure_id, shard.id) for shard in run.shards}
        there = manifest.sort_files(store, storage.list_below(uri))
        if planned:
            shards = manifest.sort_files(
                store, storage.list_below(storage.join(store, "shards", run.measure_id))
            ).shards
            there.shards = {place: files for place, files in shards.items() if place in planned}
    files = there.shards
    age = _Age(storage.clock_s(store) if clean else time.time(), min_age_h)
    measures = {run.measure_id: run.measure for run in runs if run.measure}
    lists: dict[Place, list[str]] = {}  # complete runs by what they list
    for run in runs:
        for shard in run.shards if run.complete else ():
            lists.setdefault((run.measure_id, shard.id), []).append(storage.join(run.folder.uri, "run.json"))

    def check(place: Place) -> _Checked:
        redo = _redo_shard(manifest.shard_uri(store, *place), lists.get(place, []))
        return _check_shard(store, place, files[place], measures.get(place[0]), age, redo)

    checked: dict[Place, _Checked] = {}
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for place, one in zip(files, pool.map(check, files), strict=True):
            checked[place] = one
            on_progress(f"{len(checked):,} of {len(files):,} shards checked")
    findings = [f for one in checked.values() for f in one.findings]
    for pilot in there.pilots:
        findings += _check_pilot(store, pilot)
    for run in runs:
        on_progress(f"recomputing {run.folder.uri}")
        run.check(checked, memory_limit)
        findings += run.findings
    orphans = [_orphan(file, age, done=False) for file in there.probes]
    orphans += [o for one in checked.values() for o in one.orphans]
    for run in runs:
        orphans += run.orphans(there.runs.get(run.folder.id, []), age)
    if clean:
        orphans = _cleaned(store, orphans)
    done = [one for one in checked.values() if one.commit is not None]
    return Verification(
        uri, tuple(sorted(findings, key=lambda f: f.uri)), tuple(orphans), tuple(there.foreign),
        tuple(r.folder.uri for r in runs if not r.complete),
        tuple(r.folder.uri for r in runs if r.complete and not r.proved), len(done),
        sum(one.num_files for one in done) + sum(r.num_files for r in runs),
        sum(one.num_bytes for one in done) + sum(r.num_bytes for r in runs),
        sum(one.num_rows for one in done), sum(r.proved for r in runs), time.monotonic() - began,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Age:
    """How old a file must be before nobody can be at work on it."""

    now_s: float  # by the store's clock, if anything is to be removed
    min_age_h: float


def _orphan(file: storage.StoredFile, age: _Age, *, done: bool) -> Orphan:
    """``done``: what it was written for is complete, so nobody is at work on it."""
    age_s = max(0.0, age.now_s - file.modified_s)
    return Orphan(file.uri, file.size, age_s, done or age_s >= 3600 * age.min_age_h)


def _redo_shard(folder: str, runs: Sequence[str]) -> str:
    """What to do about a shard that is not as it was committed; ``runs`` are the run.json that list it."""
    others = f" and {len(runs) - 3} more that list the shard" if len(runs) > 3 else ""
    return f"delete {' and '.join([folder, *runs[:3]])}{others}, then give 'afn run' again: it is done anew"


def _check_pilot(store: str, name: str) -> Iterator[Finding]:
    uri = storage.join(store, "pilots", name)
    try:
        manifest.read_pilot(store, name.removesuffix(".json"))
    except StoreError as error:
        yield Finding("damaged", uri, f"{_without(error, uri)}; delete it, and the next run decides anew")


def _without(error: StoreError, uri: str) -> str:
    """The message of ``error``, which a finding prints behind ``uri``; and this is 'afn verify'."""
    return str(error).removeprefix(f"{uri} ").removeprefix("is damaged: ").removesuffix(manifest.ASK_VERIFY)


def _read(uri: str, entry: Mapping[str, Any], advice: str) -> tuple[bytes, Finding | None]:
    """The file at ``uri``, and what is wrong with it by ``entry``: its size and checksum."""
    try:
        data = storage.read_if_there(uri)
    except StoreError as error:
        return b"", Finding("damaged", uri, f"{error}; {advice}")
    if data is None:
        return b"", Finding("missing", uri, f"there is no such file; {advice}")
    if len(data) != entry.get("bytes"):
        return data, Finding("damaged", uri, f"it has {len(data)} bytes, expected {entry.get('bytes')}; {advice}")
    if (got := hashlib.sha256(data).hexdigest()) != entry.get("sha256"):
        return data, Finding("damaged", uri, f"its SHA-256 is {got}, expected {entry.get('sha256')}; {advice}")
    return data, None


# --- shards ----------------------------------------------------------------------------------------------


def _check_shard(
    store: str, place: Place, files: Sequence[storage.StoredFile], measure: Mapping[str, Any] | None, age: _Age,
    redo: str,
) -> _Checked:  # fmt: skip
    """The shard at ``place``, in whose folder ``files`` were listed; ``measure`` is None where no run knows it.

    ``redo``: what to do about it when it is not as it was committed.
    """
    checked = _Checked()
    folder = manifest.shard_uri(store, *place)
    uri = storage.join(folder, "commit.json")
    try:
        found = manifest.read_committed(store, *place)
    except StoreError as error:  # nobody can say which files it named, so none of them is an orphan
        checked.findings.append(Finding("damaged", uri, f"{_without(error, uri)}; {redo}"))
        return checked
    named = set() if found is None else {"commit.json", *(f["name"] for f in found[0].files.values())}
    checked.orphans += [
        _orphan(file, age, done=found is not None) for file in files if file.uri.rpartition("/")[2] not in named
    ]
    if found is None:
        return checked
    checked.commit, read = found
    identity = Shard.of(read.slices, read.options).id
    if identity != place[1]:
        message = f"it is the commit of shard {place[1]}, but its slices are those of shard {identity}; {redo}"
        checked.findings.append(Finding("misplaced", uri, message))
    tables: dict[str, pq.ParquetFile] = {}
    for table, entry in checked.commit.files.items():
        file_uri = storage.join(folder, str(entry["name"]))
        origin = {"measure": place[0], "shard": place[1], "attempt": checked.commit.attempt, "table": table}
        data, finding = _read(file_uri, entry, redo)
        checked.num_files, checked.num_bytes = checked.num_files + 1, checked.num_bytes + len(data)
        if finding is None:
            try:
                tables[table] = pq.ParquetFile(pa.BufferReader(data))
            except (pa.ArrowException, OSError) as error:
                finding = Finding("damaged", file_uri, f"it is no Parquet file: {error}; {redo}")
            else:
                got = records.read_origin(tables[table])
                if got != origin:
                    message = f"it was written as {got}, expected {origin}; {redo}"
                    finding = Finding("misplaced", file_uri, message)
        if finding is not None:
            checked.findings.append(finding)
    if checked.findings:
        return checked  # what its rows are is no question any more
    checked.num_rows = tables["tokens"].metadata.num_rows
    try:
        _check_rows(tables, checked.commit, read, measure)
    except _Wrong as wrong:
        table, message = wrong.args
        file_uri = storage.join(folder, str(checked.commit.files[table]["name"])) if table else uri
        checked.findings.append(Finding("rows", file_uri, f"{message}; {redo}"))
    except (pa.ArrowException, OSError) as error:
        checked.findings.append(Finding("damaged", folder, f"its files cannot be decoded: {error}; {redo}"))
    return checked


class _Wrong(Exception):
    """What is wrong with a shard's rows: the table (empty: the commit itself) and the message."""


def _check_rows(
    tables: Mapping[str, pq.ParquetFile], commit: manifest.Commit, read: Shard, measure: Mapping[str, Any] | None
) -> None:
    """Raises ``_Wrong`` at the first promise that the rows of a shard break."""
    series, tagged = _check_schemas(tables, commit, measure)
    documents = tables["documents"].read(
        ["doc", "n_tokens", "n_windows", "n_chars", "status", *(f"mean_{s.name}" for s in series)]
    )
    counts = _check_documents(documents, tables["tokens"].metadata.num_rows)
    counts["special"], summary = _check_tokens(tables["tokens"], documents, series, tagged)
    if wrong := {k: commit.counts.get(k) for k, n in counts.items() if commit.counts.get(k) != n}:
        raise _Wrong("", f"its counts are {wrong}, but the rows give {_only(counts, wrong)}")
    planned = [piece.num_documents for piece in read.slices]
    if min(planned) >= 0 and not counts["quarantined"] and sum(planned) != counts["documents"]:
        raise _Wrong("documents", f"it has {counts['documents']} documents, but the slices read hold {sum(planned)}")
    expected = list(summary.tables())
    if not tables["summary"].read().equals(pa.concat_tables(expected)):
        raise _Wrong("summary", "it is not the summary of the tokens beside it")
    groups = [part for part in expected if len(part)]
    if tables["summary"].num_row_groups != len(groups):
        raise _Wrong("summary", f"it has {tables['summary'].num_row_groups} row groups, expected {len(groups)}")
    if "neurons" in tables:
        pairs = _check_neurons(tables["tokens"], tables["neurons"], measure or {})
        if not tables["pairs"].read().equals(pa.concat_tables([PAIRS_SCHEMA.empty_table(), *pairs.tables()])):
            raise _Wrong("pairs", "it is not the sum of the neurons beside it")


def _check_schemas(
    tables: Mapping[str, pq.ParquetFile], commit: manifest.Commit, measure: Mapping[str, Any] | None
) -> tuple[tuple[Series, ...], bool]:
    """What was recorded, and whether with tags: by ``measure``, or where no run knows it as the tokens have it."""
    names = tables["tokens"].schema_arrow.names
    parts = [name.rpartition("_") for name in names]
    series = tuple(Series(signal, int(layer)) for signal, _, layer in parts if layer.isdecimal())
    offsets, tagged = "start" in names, "tag" in names
    layers = _neuron_layers(tables["neurons"]) if "neurons" in tables else []
    if measure is not None:
        series, offsets, layers = _series(measure), measure["offsets"], measure.get("neuron_layers", [])
        tagged = "labels" in measure
    schemas = {
        "tokens": tokens_schema(series, offsets, tagged), "documents": documents_schema(series),
        "summary": TAGGED_SUMMARY_SCHEMA if tagged else SUMMARY_SCHEMA,
    }  # fmt: skip
    if layers:
        schemas |= {"neurons": token_neurons_schema(layers), "pairs": PAIRS_SCHEMA}
    if wrong := sorted(schemas.keys() ^ tables.keys()):
        raise _Wrong("", f"its tables are not its measure's: {', '.join(wrong)}")
    for table, file in tables.items():
        if not file.schema_arrow.equals(schemas[table]):
            differs = sorted({*map(str, file.schema_arrow)} ^ {*map(str, schemas[table])})
            raise _Wrong(table, f"its schema is not its measure's: {', '.join(differs) or 'the order of columns'}")
        if file.metadata.num_rows != (rows := commit.files[table].get("rows")):
            raise _Wrong(table, f"it has {file.metadata.num_rows} rows, but its commit says {rows}")
    return series, tagged


def _neuron_layers(file: pq.ParquetFile) -> list[int]:
    parts = [name.rpartition("_") for name in file.schema_arrow.names]
    return [int(layer) for _, _, layer in parts if layer.isdecimal()]


def _series(measure: Mapping[str, Any]) -> tuple[Series, ...]:
    return tuple(Series(signal, layer) for signal, layer in measure["series"])


def _check_documents(documents: pa.Table, num_tokens: int) -> dict[str, int]:
    """The counts that ``documents`` give."""
    n_tokens = documents["n_tokens"].to_numpy()
    status = documents["status"].cast(pa.string())
    quarantined = pc.starts_with(status, "quarantined").to_numpy()
    empty = pc.equal(status, "empty").to_numpy()
    if not np.array_equal(documents["doc"].to_numpy(), np.arange(len(documents))):
        raise _Wrong("documents", f"doc is not 0 to {len(documents) - 1}, each once and in order")
    if (wrong := (n_tokens > 0) == (empty | quarantined)).any():
        doc = int(np.argmax(wrong))
        raise _Wrong("documents", f"doc {doc} has {n_tokens[doc]} tokens and status {status[doc].as_py()!r}")
    if (total := int(n_tokens.sum())) != num_tokens:
        raise _Wrong("tokens", f"it has {num_tokens} rows, but the documents have {total} tokens together")
    return {
        "documents": len(documents), "empty": int(empty.sum()), "quarantined": int(quarantined.sum()),
        "tokens": total, "windows": int(documents["n_windows"].to_numpy().sum()),
        "chars": int(documents["n_chars"].to_numpy().sum()),
    }  # fmt: skip


def _check_tokens(
    file: pq.ParquetFile, documents: pa.Table, series: Sequence[Series], tagged: bool
) -> tuple[int, Summary]:  # fmt: skip
    """The number of special tokens in ``file``, and the summary of all."""
    n_tokens = documents["n_tokens"].to_numpy().astype(np.int64)
    ends = np.cumsum(n_tokens)
    num_special, summary = 0, Summary(series, tagged)
    columns = ["position", "token_id", "flags", *(["tag"] if tagged else []), *(s.name for s in series)]
    for first, part in records.whole_documents(file, ends, columns):
        rows = np.arange(first, first + len(part))
        docs = np.searchsorted(ends, rows, side="right")
        for column, expected in (("doc", docs), ("position", rows - (ends - n_tokens)[docs])):
            got = part[column].to_numpy()
            if (wrong := got != expected).any():
                row = int(np.argmax(wrong))
                raise _Wrong(
                    "tokens", f"row {first + row}: {column} is {got[row]}, expected {expected[row]}; a token is lost, "
                    "doubled or out of place",
                )  # fmt: skip
        flags = part["flags"].to_numpy()
        normal = (flags & SPECIAL) == 0
        num_special += int((~normal).sum())
        docs_here, last = docs[normal] - docs[0], int(docs[-1]) + 1
        by_series = {s: part[s.name].to_numpy() for s in series}
        for one, values in by_series.items():
            unchanged = round_strengths(values).view(np.uint32) == values.view(np.uint32)
            if (wrong := ~(np.isfinite(values) & (values >= 0) & unchanged)).any():
                row = int(np.argmax(wrong))
                raise _Wrong("tokens", f"row {first + row}: {one.name} is {values[row]}, which is never recorded")
            sums = np.bincount(docs_here, values[normal].astype(np.float64), last - docs[0])
            with np.errstate(invalid="ignore"):  # a document of special tokens alone has no mean
                expected = sums / np.bincount(docs_here, minlength=last - docs[0])
            means = documents[f"mean_{one.name}"][int(docs[0]) : last].to_numpy()
            if (wrong := ~np.isclose(means, expected, rtol=1e-6, atol=0, equal_nan=True)).any():
                doc = int(np.argmax(wrong))
                raise _Wrong(
                    "documents",
                    f"doc {docs[0] + doc}: mean_{one.name} is {means[doc]}, its tokens give {expected[doc]}",
                )
        tags = part["tag"].cast(pa.string()) if tagged else None
        summary.add(docs.astype(np.int32), part["token_id"].to_numpy(), flags, by_series, tags)
    return num_special, summary


def _check_neurons(
    tokens: pq.ParquetFile, lists: pq.ParquetFile, measure: Mapping[str, Any]
) -> neurons.PairSummary:  # fmt: skip
    """The pairs of ``lists``, once these are shown to be of the tokens of which they should be, and in order."""
    layers = _neuron_layers(lists)
    above = dict(zip(layers, measure.get("neurons_above", []), strict=False))
    pairs, rows, at = neurons.PairSummary(layers), _Rows(lists), 0
    for batch in tokens.iter_batches(
        records.BATCH_ROWS, columns=["doc", "position", "token_id", "flags", *(f"strength_{k}" for k in above)]
    ):
        flags = batch["flags"].to_numpy()
        high = {k: ((flags & SPECIAL) == 0) & (batch[f"strength_{k}"].to_numpy() >= q3) for k, q3 in above.items()}
        which = np.flatnonzero(np.any(list(high.values()), axis=0)) if above else np.arange(len(batch))
        part = rows.take(len(which))
        for column in ("doc", "position"):
            expected = batch[column].to_numpy()[which]
            if len(part) < len(which) or (part[column].to_numpy() != expected).any():
                raise _Wrong("neurons", f"its rows from {at} on are not of the tokens that should have neurons")
        for k in layers:
            column = part[neurons_column(k)].combine_chunks()
            items, lengths = column.flatten(), pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            if k in above and not np.array_equal(column.is_valid().to_numpy(zero_copy_only=False), high[k][which]):
                raise _Wrong("neurons", f"rows from {at} on: not the tokens HIGH at layer {k} have its neurons")
            values = np.abs(items.field("value").to_numpy())
            rises = np.diff(values, prepend=np.inf) > 0
            rises[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
            wrong = ~(values < neurons.LIMIT) | (values == 0) | rises
            if wrong.any() or lengths.max(initial=0) > measure.get("top_neurons", lengths.max(initial=0)):
                raise _Wrong("neurons", f"rows from {at} on: values at layer {k} that are never recorded")
        pairs.add(batch["token_id"].to_numpy()[which], flags[which], part)
        at += len(which)
    if len(rows.take(1)):
        raise _Wrong("neurons", f"it has more than the {at} rows that its tokens should have")
    return pairs


class _Rows:
    """The rows of a Parquet file in order, as many at a time as are asked for."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._batches = file.iter_batches(records.BATCH_ROWS)
        self._held = file.schema_arrow.empty_table()

    def take(self, n: int) -> pa.Table:
        """The next ``n`` rows; fewer where the file ends."""
        while len(self._held) < n and (batch := next(self._batches, None)) is not None:
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])
        taken, self._held = self._held.slice(0, n), self._held.slice(n)
        return taken.combine_chunks()


# --- runs ------------------------------------------------------------------------------------------------


class _Run:
    """One run: what it planned, and whether its tables are what its shards give."""

    def __init__(self, store: str, name: str) -> None:
        self.folder = manifest.RunFolder(storage.join(store, "runs", name), store, name, {})
        self.findings: list[Finding] = []
        self.shards: list[Shard] = []
        self.measure: dict[str, Any] = {}
        self.measure_id = ""
        self.num_files = self.num_bytes = 0
        self.proved = False
        uri = self.folder.uri
        self._redo = f"delete {uri}/run.json and give its 'afn run' command again: it reduces anew"
        self._begin_again = f"delete {uri} and give 'afn run' again"
        self._run_json, self._plan = (storage.join(uri, file) for file in ("run.json", "plan.parquet"))
        self.complete = storage.exists(self._run_json)
        if not storage.exists(self._plan):
            if self.complete:
                self._find("missing", self._plan, "there is no such file", self._begin_again)
            return  # without either, a crash came before the run began
        if self.complete:
            try:
                self.folder = manifest.find_run(uri)
            except StoreError as error:
                self._find("damaged", self._run_json, _without(error, self._run_json))
        try:
            manifest.is_audited(self.folder)
        except StoreError as error:
            mark = storage.join(uri, "audited.json")
            self._find("damaged", mark, _without(error, mark), "delete it: the next audit judges the run's step again")
        for name, entry in self.folder.info.get("tables", {}).items():
            if not isinstance(entry, dict) or "name" not in entry:
                self._find("damaged", self._run_json, f"its table {name} is {entry!r}")
                continue
            advice = self._begin_again if name == "plan" else self._redo
            data, finding = _read(self._table_uri(name), entry, advice)
            self.num_files, self.num_bytes = self.num_files + 1, self.num_bytes + len(data)
            if finding is not None:
                self.findings.append(finding)
                if name == "plan":
                    return
        try:
            self.shards, header = manifest.read_shards(self.folder)
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
                self._find("plan", self._plan, f"it lists shard {shard} {times} times", self._begin_again)
        if self.findings:
            return
        slices = sorted((p for s in self.shards for p in s.slices), key=lambda p: (p.uri, p.start))
        for uri, pieces in itertools.groupby(slices, key=lambda p: p.uri):
            end = 0
            for piece in pieces:
                if piece.start != end:
                    what = "twice" if piece.start < end else "never"
                    message = f"it reads part of {uri} {what}: a slice starts at {piece.start}, expected {end}"
                    self._find("plan", self._plan, message, self._begin_again)
                end = piece.end
            if piece.format != "parquet" and end != piece.size:
                message = f"it reads part of {uri} never: its last slice ends at {end}, the file at {piece.size}"
                self._find("plan", self._plan, message, self._begin_again)

    def orphans(self, files: Iterable[storage.StoredFile], age: _Age) -> Iterator[Orphan]:
        """Those of ``files``, which lie in the run's folder, that it does not name; none before it is complete."""
        if not self.folder.info:
            return
        named = _names_of(self.folder)
        for file in files:
            if file.uri.rpartition("/")[2] not in named:
                yield _orphan(file, age, done=True)

    def check(self, checked: Mapping[Place, _Checked], memory_limit: str) -> None:
        """Compare the complete run with its shards. Damage of a shard is told there, and leaves the run unproved."""
        info = self.folder.info
        if not info or not self.shards:
            return
        given_up = {entry["shard"] for entry in info.get("quarantined", [])}
        if info["id"] != self.folder.id:
            self._find("misplaced", self._run_json, f"it is the run.json of run {info['id']}")
        measure = {k: v for k, v in info["measure"].items() if k != "id"}
        if given_up - {s.id for s in self.shards}:
            self._find("tables", self._run_json, "it names quarantined shards that its plan does not have")
        if measure != self.measure or info["measure"].get("id") != self.measure_id:
            self._find("misplaced", self._run_json, f"its measure is not {self.measure_id} of its plan")
        if info["layers"] != self.measure["layers"]:
            self._find("tables", self._run_json, f"layers are {info['layers']}, not those of its measure")
        kept = [s for s in self.shards if s.id not in given_up]
        found = [checked.get((self.measure_id, s.id)) for s in kept]
        commits = []
        for shard, one in zip(kept, found, strict=True):
            if one is not None and one.commit is not None:
                commits.append(one.commit)
            elif one is None or not one.findings:
                uri = storage.join(manifest.shard_uri(self.folder.store, self.measure_id, shard.id), "commit.json")
                self._find("missing", uri, f"run {self.folder.uri} has a shard without a commit")
        if self.findings or any(one is None or one.findings for one in found):
            return
        if totals := _wrong_totals(info["counts"], commits):
            self._find("tables", self._run_json, totals)
        num_bytes = [s.num_bytes for s in kept]
        try:
            stored = {name: manifest.read_table(self.folder, name) for name in info["tables"]}
            shards = reduce.shards_table(self.measure_id, commits, num_bytes)
            self._compare({"shards": shards}, stored)
            if not self.findings:
                self._ask_duckdb(memory_limit, sum(c.counts["tokens"] for c in commits))
            if not self.findings:
                self._compare(self._reduced(commits, num_bytes, stored["vocabulary"]), stored)
        except StoreError as error:
            self._find("tables", self.folder.uri, str(error))
        self.proved = not self.findings

    def _table_uri(self, name: str) -> str:
        return storage.join(self.folder.uri, str(self.folder.info["tables"][name]["name"]))

    def _compare(self, expected: Mapping[str, pa.Table], stored: Mapping[str, pa.Table]) -> None:
        for name, table in expected.items():
            if name not in stored:
                self._find("missing", self._run_json, f"it lists no table {name}")
            elif differs := _difference(stored[name], table):
                self._find("tables", self._table_uri(name), differs)

    def _reduced(
        self, commits: Sequence[manifest.Commit], num_bytes: Sequence[int], vocabulary: pa.Table
    ) -> dict[str, pa.Table]:
        """The run's tables anew: reduced from the summaries, which were proved to be those of the rows, and screened.

        The tokenizer and the word lists that name and sort types may not be here, or be newer: ``token``, ``text``
        and ``class`` are taken from the stored vocabulary, and have only its checksum to speak for them; classes that
        are tags are recomputed.
        """
        ids = vocabulary["token_id"].to_pylist()
        pieces, readable = ([""] * (max(ids, default=0) + 1) for _ in range(2))
        for at, token, text in zip(ids, vocabulary["token"].to_pylist(), vocabulary["text"].to_pylist(), strict=True):
            pieces[at], readable[at] = token, text
        tables = reduce.reduce_run(
            self.folder.store, self.measure_id, commits, _series(self.measure), pieces=pieces, readable=readable,
            language=self._config["language"], sink_factor=self._config["sink_factor"], num_bytes=num_bytes,
            frozen=self._frozen, neuron_layers=self.measure.get("neuron_layers", []),
            high_neurons="neurons_above" in self.measure, tagged=(tagged := "labels" in self.measure),
        )  # fmt: skip
        at = tables["vocabulary"].column_names.index("class")
        if not tagged:
            tables["vocabulary"] = tables["vocabulary"].set_column(at, "class", vocabulary["class"])
        if (others := tables.get("signal_vocabulary")) is not None and not tagged:
            ids, classes = (vocabulary[name].to_pylist() for name in ("token_id", "class"))
            known = {(i, c == "special"): c for i, c in zip(ids, classes, strict=True)}
            ids, classes = (others[name].to_pylist() for name in ("token_id", "class"))
            column = [known[i, c == "special"] for i, c in zip(ids, classes, strict=True)]
            at = others.column_names.index("class")
            tables["signal_vocabulary"] = others.set_column(at, "class", pa.array(column, pa.string()))
        if self._config.get("screen"):
            tables |= screen.scan_run(
                self.folder.store, self.measure_id, commits, self.measure["layers"], shards=self.shards,
                labels=tables["frozen" if self._frozen else "thresholds"], vocabulary=tables["vocabulary"],
                readable=readable, worst=self._config["screen"],
            )  # fmt: skip
        return tables

    def _ask_duckdb(self, memory_limit: str, n_tokens: int) -> None:
        """Thresholds and counts once more, from the rows, in SQL that shares nothing with ``reduce``."""
        with query.open_run(
            self.folder.uri, memory_limit=memory_limit, timeout_s=query.MAX_TIMEOUT_S
        ) as run:  # fmt: skip
            ((got,),) = run.sql("SELECT count(*) FROM tokens").fetchall()
            if got != n_tokens:
                self._find("tables", self._table_uri("shards"), f"DuckDB reads {got} tokens of {n_tokens}")
                return
            for layer in self.measure["layers"]:
                recomputed = run.sql(_thresholds_sql(layer), [float(self._config["sink_factor"])]).to_arrow_table()
                names = ", ".join(recomputed.column_names)
                stored = run.sql(f"SELECT {names} FROM thresholds WHERE layer = {layer} ORDER BY population")  # noqa: S608
                if differs := _difference(stored.to_arrow_table(), recomputed):
                    self._find("tables", self._table_uri("thresholds"), f"layer {layer}: {differs}")
                elif wrong := run.sql(_vocabulary_sql(layer)).fetchall():
                    self._find(
                        "tables", self._table_uri("vocabulary"),
                        f"layer {layer}: {len(wrong)} rows are here or in DuckDB's count of the tokens, not in both; "
                        f"the first is of token_id {wrong[0][0]}",
                    )  # fmt: skip
            for layer in self.measure.get("neuron_layers", []):
                high_only = "neurons_above" in self.measure
                if wrong := run.sql(_neurons_sql(layer, high_only)).fetchall():
                    self._find(
                        "tables", self._table_uri("neurons"),
                        f"layer {layer}: {len(wrong)} rows are here or in DuckDB's count of the neurons, not in both; "
                        f"the first is of neuron {wrong[0][0]}",
                    )  # fmt: skip


def _thresholds_sql(layer: int) -> str:
    """SQL of a layer's thresholds from the rows; its parameter is the sink factor.

    Quartiles are those of DuckDB's quantile_disc, which holds every row in memory: equal values are counted first.
    """
    return f"""
        WITH counted AS MATERIALIZED (
            SELECT is_special, strength_{layer} AS value, count(*) AS n FROM tokens GROUP BY ALL
        ), ranked AS (
            SELECT value, sum(n) OVER (ORDER BY value) AS upto, sum(n) OVER () AS total
            FROM counted WHERE NOT is_special
        ), sinks AS (
            SELECT $1 * min(value) FILTER (2 * upto >= total)::DOUBLE AS above FROM ranked
        ), members AS (
            SELECT 'tokens' AS population, value, n FROM counted WHERE NOT is_special
            UNION ALL
            SELECT 'tokens_without_sinks', value, n FROM counted, sinks WHERE NOT is_special AND value::DOUBLE <= above
        ), places AS (
            SELECT *, sum(n) OVER (PARTITION BY population ORDER BY value) AS upto,
                sum(n) OVER (PARTITION BY population) AS total FROM members
        ), quartiles AS (
            SELECT population, any_value(total) AS n, min(value) AS min, min(value) FILTER (4 * upto >= total) AS q1,
                min(value) FILTER (2 * upto >= total) AS q2, min(value) FILTER (4 * upto >= 3 * total) AS q3,
                max(value) AS max, sum(value::DOUBLE * n) / any_value(total) AS mean FROM places GROUP BY population
        )
        SELECT population, coalesce(q.n, 0)::BIGINT AS n, mean, q.min, q1, q2, q3, q.max,
            coalesce((SELECT sum(p.n) FROM places p WHERE p.population = all_of.population AND p.value >= q.q3), 0)
                ::BIGINT AS n_high,
            coalesce((SELECT sum(n) FROM counted, sinks WHERE NOT is_special AND value::DOUBLE > above), 0)
                ::BIGINT AS n_sinks,
            coalesce((SELECT sum(n) FROM counted WHERE is_special), 0)::BIGINT AS n_special
        FROM (VALUES ('tokens'), ('tokens_without_sinks')) all_of(population) LEFT JOIN quartiles q USING (population)
        ORDER BY population
    """  # noqa: S608


def _vocabulary_sql(layer: int) -> str:
    """SQL of the types of a layer whose counts or extremes differ between the vocabulary and the rows."""
    strength = f"strength_{layer}"
    return f"""
        WITH q AS (SELECT q3 FROM labels WHERE layer = {layer} AND population = 'tokens'),
        counted AS (
            SELECT token_id, is_special, count(*) AS n, count(*) FILTER ({strength} >= q3) AS n_high,
                min({strength}) AS min, max({strength}) AS max
            FROM tokens, q GROUP BY token_id, is_special
        ), stored AS (
            SELECT token_id, class = 'special' AS is_special, n, n_high, min, max FROM vocabulary WHERE layer = {layer}
        )
        (FROM counted EXCEPT ALL FROM stored) UNION ALL (FROM stored EXCEPT ALL FROM counted) ORDER BY ALL
    """  # noqa: S608


def _neurons_sql(layer: int, high_only: bool) -> str:
    """SQL of the neurons of a layer whose counts or extremes differ between ``neurons`` and the rows.

    Where all tokens have a row these are beside each other; of HIGH tokens alone none is special.
    """
    rows = "FROM token_neurons" if high_only else "FROM token_neurons POSITIONAL JOIN tokens WHERE NOT is_special"
    return f"""
        WITH stored AS (SELECT neuron, n, largest FROM neurons WHERE layer = {layer}),
        counted AS (
            SELECT item.neuron::INTEGER AS neuron, count(*) AS n, max(item.value) AS largest FROM (
                SELECT unnest(neurons_{layer}) AS item {rows}
            ) GROUP BY ALL
        )
        (FROM counted EXCEPT ALL FROM stored) UNION ALL (FROM stored EXCEPT ALL FROM counted) ORDER BY ALL
    """  # noqa: S608


def _wrong_totals(stored: Mapping[str, Any], commits: Sequence[manifest.Commit]) -> str:
    """How the counts of a run.json differ from the sums over its commits; empty where they do not."""
    totals = {k: sum(c.counts[k] for c in commits) for k in commits[0].counts} if commits else {}
    expected = {**totals, "shards": len(commits)}
    wrong = {k: stored.get(k) for k, n in expected.items() if stored.get(k) != n}
    return f"its counts are {wrong}, but its commits give {_only(expected, wrong)}" if wrong else ""


def _only(values: Mapping[str, int], keys: Iterable[str]) -> dict[str, int]:
    return {k: values[k] for k in keys}


def _difference(stored: pa.Table, expected: pa.Table) -> str:
    """Where two tables differ first, floats by more than rounding; empty where they do not."""
    if stored.column_names != expected.column_names:
        return f"its columns are {stored.column_names}, expected {expected.column_names}"
    if len(stored) != len(expected):
        return f"it has {len(stored)} rows, expected {len(expected)}"
    for name in expected.column_names:
        ours, theirs = expected[name], stored[name]
        if pa.types.is_floating(ours.type) and ours.null_count == theirs.null_count:
            wrong = ~np.isclose(theirs.to_numpy(), ours.to_numpy(), rtol=RELATIVE, atol=1e-12, equal_nan=True)
        elif theirs.equals(ours):
            continue
        else:
            wrong = np.array([a != b for a, b in zip(theirs.to_pylist(), ours.to_pylist(), strict=True)])
        if wrong.any():
            row = int(np.argmax(wrong))
            return f"row {row}: {name} is {theirs[row]}, but its shards give {ours[row]}"
    return ""


# --- orphans ---------------------------------------------------------------------------------------------


def _names_of(folder: manifest.RunFolder) -> set[str]:
    """Files in a run's folder that are its own."""
    tables = folder.info.get("tables", {}).values()
    return {
        "plan.parquet",
        "run.json",
        "audited.json",
        *(str(t["name"]) for t in tables if isinstance(t, dict) and "name" in t),
    }


def _cleaned(store: str, orphans: Sequence[Orphan]) -> list[Orphan]:
    """``orphans`` once the removable ones are removed; one that was named in the meantime stays."""
    done: list[Orphan] = []
    for folder, group in itertools.groupby(orphans, key=lambda o: o.uri.rpartition("/")[0]):
        mine = list(group)
        named: set[str] = set()
        if folder.rpartition("/")[0].endswith("/runs"):
            named = _names_of(manifest.open_folder(store, folder.rpartition("/")[2]))
        elif folder != storage.absolute(store):
            commit = manifest.read_commit(store, *folder.split("/")[-2:])
            named = set() if commit is None else {str(f["name"]) for f in commit.files.values()}
        storage.delete([o.uri for o in mine if o.removable and o.uri.rpartition("/")[2] not in named])
        left = {file.uri for file in storage.list_below(folder)}
        done += [replace(o, removed=o.uri not in left) for o in mine]
    return done


# --- what is shown ---------------------------------------------------------------------------------------


def lines(v: Verification) -> Iterator[str]:
    """One line per finding, orphan and run that could not be checked, and a last one that says what was."""
    for finding in v.findings:
        yield f"{finding.kind:<10}  {finding.uri}: {finding.message}"
    for orphan in v.orphans:
        state = (
            "removed" if orphan.removed
            else "nothing names it; --clean removes it" if orphan.removable
            else "somebody may be at work on it"
        )  # fmt: skip
        yield f"orphan      {orphan.uri}: {orphan.num_bytes:,} bytes, {orphan.age_s / 3600:.1f} h old; {state}"
    for uri in v.foreign:
        yield f"foreign     {uri}: afn-ray does not write such a file; it is left alone"
    for uri in v.incomplete:
        yield f"incomplete  {uri}: give its 'afn run' command again to finish it"
    for uri in v.unproved:
        yield f"unproved    {uri}: its tables are not shown to be right, for what is said above"
    yield (
        f"checked {count(v.num_shards, 'shard')}, {count(v.num_files, 'file')}, {count(v.num_bytes, 'byte')}, "
        f"{count(v.num_rows, 'token')}; recomputed {count(v.num_runs, 'run')}; {v.seconds:.1f} s: "
        + (count(len(v.findings), "finding") if v.findings else "all is as it was committed")
    )
