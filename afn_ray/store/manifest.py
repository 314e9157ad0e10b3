"""Plan a run, commit its shards, and say what is done: the store's one mechanism.

Layout of a store::

    shards/<measure>/<shard>/commit.json              the commit; its existence is the truth
    shards/<measure>/<shard>/commit-<n>.json          the same, of a shard that a gc had given up before (``epochs``)
    shards/<measure>/<shard>/<attempt>-<table>.parquet
    runs/<run>/plan.parquet                           written when the run begins; also what it remembers of files
    runs/<run>/run.json                               written once, last; its existence means complete
    runs/<run>/audited.json                           an audit has given its verdict on the run
    runs/<run>/{shards,thresholds,histogram,vocabulary}.parquet
    runs/<run>/lease-<id>.json                        a process has taken up a run that was there; it ends without
    runs/<run>/status.json                            how far it is, for people; replaced while it is under way
    planning.json                                     the same of a run that has no name yet
    .rayignore                                        keeps a store on a disk out of what Ray ships with a job
    gc/<epoch>.parquet                                what gc has given up so far (``epochs``)

Nothing relies on the two that tell how far a run is. Of the others each says itself whether it is whole: a JSON file
carries a checksum of all its other bytes (``sealed``), and what is in Parquet is listed with size and checksum in the
commit.json or run.json that names it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa

from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, Interrupted, StoreError, Unavailable
from afn_ray.schema import (
    PLAN_SCHEMA,
    SCHEMA_VERSION,
    FileInfo,
    FileSlice,
    ReadOptions,
    Shard,
    fingerprint,
    fingerprint_of_rows,
)
from afn_ray.store import blocks, epochs, parquet, storage
from afn_ray.store.blocks import Blocks
from afn_ray.store.commits import Commit as Commit
from afn_ray.store.commits import Commits
from afn_ray.store.epochs import Place as Place
from afn_ray.store.layout import HEX, LATEST, RAY_IGNORE, STAMP, is_run_name
from afn_ray.store.layout import PLANNING as PLANNING

IO_THREADS = 16
JSON_BYTES = 64 << 20
"""Of run.json, commit.json and what pilots decided, which have a line for each file of a shard at most."""
AHEAD = 4096
"""Rows, or reads, that are prepared together: none of what a driver does at once grows with its run."""
TABLES = ("tokens", "documents", "summary")
NEURON_TABLES = ("neurons", "pairs")
"""Of a shard whose neurons are recorded as well."""
RUN_KEYS: dict[str, type] = {
    "id": str, "measure": dict, "model": dict, "layers": list, "config": dict, "corpus": dict, "counts": dict,
    "precision": dict, "tables": dict, "created_at": str, "finished_at": str,
}  # fmt: skip
RUN_TABLES = ("plan", "shards", "thresholds", "histogram", "vocabulary", "frozen", "files", "sources", "screened",
              "signals", "signal_vocabulary", "neurons", "neuron_types")  # fmt: skip
PROBE = re.compile("probe-[0-9a-f]{32}")
COMMIT = re.compile(r"commit(?:-([1-9][0-9]{0,8}))?\.json")
LEASE = re.compile(r"lease-[0-9a-f]{32}\.json")
SHARD_FILE = re.compile(rf"{COMMIT.pattern}|[0-9a-f]{{16}}-({'|'.join(TABLES + NEURON_TABLES)})\.parquet")
STATUS = "status.json"
RUN_FILE = re.compile(
    rf"(run|audited|status)\.json|{LEASE.pattern}|({'|'.join(RUN_TABLES)})(-[0-9a-f]{{16}})?\.parquet"
)
ASK_VERIFY = "; 'afn verify' on its store says what else is, and what to do"


# --- what lies in a store --------------------------------------------------------------------------------


@dataclass(slots=True)
class StoreFiles:
    """The files of a store by what they belong to, those of killed attempts and reduces among them."""

    shards: dict[Place, list[storage.StoredFile]] = field(default_factory=dict)
    runs: dict[str, list[storage.StoredFile]] = field(default_factory=dict)
    pilots: list[str] = field(default_factory=list)  # names
    probes: list[storage.StoredFile] = field(default_factory=list)  # of processes killed as they tried to write
    planning: list[storage.StoredFile] = field(default_factory=list)  # how far a run is that has no name yet
    ignore: list[storage.StoredFile] = field(default_factory=list)  # what keeps the store out of a job
    foreign: list[str] = field(default_factory=list)  # URIs of what afn-ray never writes


def sort_files(store: str, files: Iterable[storage.StoredFile]) -> StoreFiles:
    """Sort ``files``, listed below ``store``, by their names alone; every one of them is in one place of the result."""
    root, there = f"{storage.absolute(store)}/", StoreFiles()
    for file in files:
        match file.uri.removeprefix(root).split("/"):
            case ["shards", measure, shard, name] if (
                HEX.fullmatch(measure) and HEX.fullmatch(shard) and SHARD_FILE.fullmatch(_final(name))
            ):
                there.shards.setdefault((measure, shard), []).append(file)
            case ["runs", run, name] if is_run_name(run) and RUN_FILE.fullmatch(_final(name)):
                there.runs.setdefault(run, []).append(file)
            case ["pilots", name] if name.endswith(".json"):
                there.pilots.append(name)
            case [epochs.FOLDER, name] if epochs.FILE.fullmatch(_final(name)):
                if name != _final(name):
                    there.probes.append(file)
            case [name] if PROBE.fullmatch(_final(name)) or (_final(name) == PLANNING != name):
                there.probes.append(file)
            case [name] if name == PLANNING:
                there.planning.append(file)
            case [name] if _final(name) == RAY_IGNORE:
                there.ignore.append(file)
            case _:
                there.foreign.append(file.uri)
    return there


def _final(name: str) -> str:
    """The name that a file was to get, where a local write was killed before it had it."""
    unfinished = re.fullmatch(r"\.(.+)-[0-9a-f]{32}", name)
    return unfinished[1] if unfinished else name


def keep_from_jobs(store: str) -> None:
    """Write the file for which Ray leaves a ``store`` on a disk out of a job that is submitted from a folder above it.

    A store soon has more than the 512 MiB that Ray ships, and no job needs it.
    """
    if storage.is_local(store):
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(storage.join(store, RAY_IGNORE), b"*\n")


def run_names(store: str) -> list[str]:
    """Names of the runs in ``store``, in the order in which they were begun; copies under such names among them."""
    return [name for name in storage.list_names(storage.join(store, "runs")) if is_run_name(name)]


def is_copy(run: RunFolder) -> bool:
    """Whether ``run`` is a copy of a complete run under another name, which is foreign."""
    return bool(run.info) and run.info["id"] != run.id


def is_copied(store: str, name: str) -> bool:
    """Whether the run ``name`` is a copy of another; one whose run.json is damaged is not."""
    try:
        return is_copy(open_folder(store, name))
    except StoreError:
        return False


def set_copies_apart(store: str, there: StoreFiles) -> None:
    """Move complete runs in ``there`` that are copies of others in it to its foreign files."""
    for name in sorted(there.runs):
        try:
            run = open_folder(store, name)
        except StoreError:  # damaged, which is not foreign
            continue
        if is_copy(run) and run.info["id"] in there.runs:
            there.foreign += [file.uri for file in there.runs[name]]
            del there.runs[name]


# --- plan ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards of a run, in order, and the files they come from."""

    shards: tuple[Shard, ...]
    files: tuple[FileInfo, ...]
    skipped: tuple[FileInfo, ...]  # with an ending that is no known format, or of a store
    num_hashed: int  # files read to plan; the others were remembered
    shard_bytes: int = 0  # by which the files were cut

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in self.shards)

    @property
    def labels(self) -> str | None:
        """Where the documents' tags come from; None: they have none."""
        found = (shard.options.labels_in(piece.format) for shard in self.shards for piece in shard.slices)
        return next(filter(None, found), None)


def proved_rows(uri: str, table: pa.Table, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the plan at ``uri``. Raises ``StoreError`` where they and ``header`` are not what was written."""
    asked = {key: value for key, value in header.items() if key != "sha256"}
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        digest = fingerprint_of_rows(asked, [rows] if rows else [])
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise StoreError(f"{uri} is damaged: {error!r}{ASK_VERIFY}") from error
    if header.get("sha256") != digest:
        raise StoreError(f"{uri} is damaged: its rows and header do not have the checksum that it carries{ASK_VERIFY}")
    return rows


def cuts_id(config: RunConfig, shard_bytes: int) -> str:
    """Fingerprint of what decides where files are cut."""
    return fingerprint([SCHEMA_VERSION, asdict(config.read_options), shard_bytes])


def read_plan(store: str, run: str) -> tuple[pa.Table, dict[str, Any]] | None:
    """The plan of the run named ``run`` and its header; None when a crash came before it was written."""
    uri = storage.join(store, "runs", run, "plan.parquet")
    data = storage.read_if_there(uri)
    if data is None:
        return None
    table = _table(data, uri)
    try:
        header = json.loads((table.schema.metadata or {})[b"afn"])
    except (KeyError, ValueError, RecursionError) as error:
        raise StoreError(f"{uri} is damaged: its header is none: {error!r}{ASK_VERIFY}") from error
    if not isinstance(header, dict):
        raise StoreError(f"{uri} is damaged: its header is {_short(header)}{ASK_VERIFY}")
    return table, header


def _table(data: bytes, uri: str) -> pa.Table:
    try:
        return parquet.read(data)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{uri} is damaged: {error}") from error


# --- runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run in a store; ``info`` is its run.json, empty while it is not complete."""

    uri: str
    store: str
    id: str
    info: dict[str, Any]
    condemned: bool = False  # a gc has given it up: it can never be complete


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that no gc removes while its process is at work, and the shards that it may use."""

    run: RunFolder
    shards: tuple[Shard, ...]  # of the plan, in the generations that count
    lease: str | None  # URI; None: the run is new, and its plan is the claim


def find_begun(
    config: RunConfig, measure: dict[str, Any], plan: Plan, frozen: Sequence[dict[str, Any]] = ()
) -> tuple[RunFolder | None, str]:
    """The store's newest run where it is that of ``plan``, complete or not; and the newest one's name, or "".

    Writes nothing. Raises ``StoreError`` when the store holds another measure and the config does not allow a second
    one.
    """
    measure_id = fingerprint(measure)
    held = [name for name in storage.list_names(storage.join(config.store, "shards")) if HEX.fullmatch(name)]
    names = run_names(config.store)
    if held and measure_id not in held and not config.allow_another_measure:
        raise StoreError(_other_measure(config.store, names, measure))
    suffix = _suffix(measure_id, plan.shards, config, frozen)
    begun = (n for n in reversed(names) if _is_begun(config.store, n))
    newest = next(begun, "")
    if newest.endswith(suffix):
        same = open_folder(config.store, newest)
        if not same.condemned and not same.info.get("quarantined"):
            if not same.info and (begun_plan := read_plan(config.store, newest)) is not None:
                proved_rows(storage.join(same.uri, "plan.parquet"), *begun_plan)
            return same, newest  # one that lacks shards is complete, and asked again it is tried again
    if frozen and newest.endswith(_suffix(measure_id, plan.shards, config, ())):
        same = open_folder(config.store, newest)
        if same.info and not same.info.get("quarantined") and frozen_rows(same) == list(frozen):
            return same, newest  # it labels by these thresholds, which are its own
    return None, newest


def begin_run(
    config: RunConfig, measure: dict[str, Any], plan: Plan, begun_ns: int, frozen: Sequence[dict[str, Any]] = ()
) -> Claim:
    """The run of ``plan``: the store's newest one when it is the same, complete or not, else a new one.

    ``begun_ns`` is the time before the first file was looked at; ``frozen`` as of ``find_frozen``. The claim is written
    before the newest epoch is read; ``epochs`` says why. A run that a gc gave up in between is begun anew. Raises
    ``StoreError`` as ``find_begun`` does.
    """
    run, newest = find_begun(config, measure, plan, frozen)
    lease = None
    if run is not None:
        lease = storage.join(run.uri, f"lease-{uuid.uuid4().hex}.json")
        with contextlib.suppress(storage.AlreadyWritten):  # our own, its first answer lost
            storage.write_once(lease, sealed({"schema_version": SCHEMA_VERSION, "run": run.id}))
    else:
        run = _new_run(config, measure, plan, begun_ns, frozen, newest)
    while run.id in (epoch := epochs.newest(config.store)).condemned:
        run, lease = _new_run(config, measure, plan, begun_ns, frozen, max(newest, *epoch.condemned)), None
    return Claim(run, epoch.marked(fingerprint(measure), plan.shards), lease)


def _new_run(
    config: RunConfig, measure: dict[str, Any], plan: Plan, begun_ns: int, frozen: Sequence[dict[str, Any]],
    newest: str,
) -> RunFolder:  # fmt: skip
    """A run whose name comes after that of ``newest``, or is of this millisecond."""
    suffix = _suffix(fingerprint(measure), plan.shards, config, frozen)
    created = min(datetime.now(UTC), LATEST)
    name = f"{_stamp(created)}-{suffix}"
    if name <= newest:  # the clock went back, and the newest run is found by its name
        created = datetime.strptime(newest.partition("-")[0], STAMP).replace(tzinfo=UTC) + timedelta(milliseconds=1)
        name = f"{_stamp(created)}-{suffix}"
    header = {"cuts": cuts_id(config, plan.shard_bytes), "shard_bytes": plan.shard_bytes,
              "begun_ns": begun_ns, "created_at": created.isoformat(timespec="seconds"),
              "config": asdict(config), "measure": measure, "frozen": list(frozen)}  # fmt: skip
    table, header["sha256"] = _plan_table(plan.shards, header)
    table = table.replace_schema_metadata({"afn": json.dumps(header)})
    uri = storage.join(config.store, "runs", name)
    with contextlib.suppress(storage.AlreadyWritten):  # the same call in the same millisecond: the same plan
        storage.write_once(storage.join(uri, "plan.parquet"), parquet.encode(table))
    return RunFolder(uri, config.store, name, {})


def _is_begun(store: str, name: str) -> bool:
    """Whether the folder ``name`` is a run that has its plan, and no copy."""
    return storage.exists(storage.join(store, "runs", name, "plan.parquet")) and not is_copied(store, name)


def _plan_table(shards: Sequence[Shard], header: dict[str, Any]) -> tuple[pa.Table, str]:
    """The rows of a plan, and the ``fingerprint`` of ``[header, rows]``."""
    pieces = ((i, shard.id, piece) for i, shard in enumerate(shards) for piece in shard.slices)
    names = [f.name for f in fields(FileSlice)]

    def groups() -> Iterator[list[dict[str, Any]]]:
        while rows := [
            {"ordinal": i, "shard": shard, **{name: getattr(piece, name) for name in names}}
            for i, shard, piece in itertools.islice(pieces, AHEAD)
        ]:
            tables.append(pa.Table.from_pylist(rows, PLAN_SCHEMA))
            yield rows

    tables = [PLAN_SCHEMA.empty_table()]
    digest = fingerprint_of_rows(header, groups())
    return pa.concat_tables(tables).combine_chunks(), digest


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y%m%dT%H%M%S.") + f"{moment.microsecond // 1000:03d}Z"


def _suffix(
    measure_id: str, shards: Iterable[Shard], config: RunConfig, frozen: Sequence[dict[str, Any]] | None
) -> str:
    """Last part of a run's name: what it was asked for; ``frozen`` is None in plans of before there was any."""
    ask: dict[str, Any] = {"measure": measure_id, "shards": [s.id for s in shards], "language": config.language,
                           "sink_factor": config.sink_factor}  # fmt: skip
    if frozen is not None:
        ask |= {"screen": config.screen, "frozen": list(frozen)}
    return fingerprint(ask)[:12]


BESIDE_STRENGTH = frozenset({
    "id", "signals", "series", "offsets", "outliers", "neuron_layers", "top_neurons", "neurons_above",
    "labels",
})  # fmt: skip
"""Of a measure: what changes no strength, so that thresholds mean the same."""
FROZEN = ("layer", "population", "q1", "q2", "q3", "sink_factor")
"""What a run takes from the thresholds of another, by column."""


def find_frozen(config: RunConfig, measure: dict[str, Any]) -> list[dict[str, Any]]:
    """The thresholds that ``config`` says to label by, as rows of ``FROZEN``; none for the run's own.

    Those that the run named goes by itself, so that a run every night may name the night before. Raises
    ``StoreError`` when there is no such run, ``ConfigError`` when it has another measure.
    """
    if config.thresholds is None:
        return []
    run = find_run(config.thresholds)
    theirs, ours = ({k: v for k, v in m.items() if k not in BESIDE_STRENGTH} for m in (run.info["measure"], measure))
    if theirs != ours:
        raise ConfigError(
            f"thresholds of {run.uri} are of another measure, and mean nothing here: {_differences(theirs, ours, 'it')}"
        )
    return frozen_rows(run)


def frozen_rows(run: RunFolder) -> list[dict[str, Any]]:
    """What the complete ``run`` labels by, as rows of ``FROZEN``."""
    return [{name: row[name] for name in FROZEN} for row in labels(run).to_pylist()]


def labels_name(run: RunFolder) -> str:
    """Name of the table of the thresholds that the complete run's labels go by."""
    return "frozen" if "frozen" in run.info["tables"] else "thresholds"


def labels(run: RunFolder) -> pa.Table:
    """The thresholds that the complete run's labels go by, as in ``THRESHOLDS_SCHEMA``: frozen ones, or its own."""
    return read_table(run, labels_name(run))


def read_shards(run: RunFolder) -> tuple[list[Shard], dict[str, Any]]:
    """The shards that ``run`` planned, in order, and its plan's header, once both are proved to be what was written.

    Raises ``StoreError`` for a plan that is missing, damaged, edited or another run's.
    """
    uri = storage.join(run.uri, "plan.parquet")
    table = read_table(run, "plan")
    try:
        header = json.loads(table.schema.metadata[b"afn"])
        rows = table.to_pylist()
        digest = header.pop("sha256")
        if digest != fingerprint([header, rows]):
            raise StoreError(f"{uri} is damaged: its rows and header do not have the checksum that it carries")
        config = RunConfig(**header["config"] | {"corpus": tuple(header["config"]["corpus"])})
        shards = []
        for (_, name), group in itertools.groupby(rows, lambda row: (row.pop("ordinal"), row.pop("shard"))):
            shards.append(Shard.of([FileSlice(**row) for row in group], config.read_options))
            if name != shards[-1].id:
                raise StoreError(f"{uri} is damaged: it calls {name} what by its slices is shard {shards[-1].id}")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{uri} is damaged: {error!r}") from error
    suffix = _suffix(fingerprint(header["measure"]), shards, config, header.get("frozen"))
    if not run.id.endswith(f"-{suffix}"):
        raise StoreError(f"{uri} is of another run: what it asks for has the name ...-{suffix}")
    return shards, header


def _other_measure(store: str, runs: Sequence[str], measure: dict[str, Any]) -> str:
    message = f"store {store} holds another measure; results of two measures cannot be compared. "
    for name in reversed(runs):
        plan = read_plan(store, name)
        if plan is not None:
            theirs = plan[1].get("measure", {})
            message += _differences(theirs, measure) + ". "
            break
    return message + "Use another --store, or --allow-another-measure to keep both in this one"


def _differences(theirs: dict[str, Any], ours: dict[str, Any], who: str = "the store") -> str:
    """What two measures differ in; ``who`` has theirs."""
    return "; ".join(
        f"{k}: {who} has {_short(theirs.get(k))}, this run asks for {_short(ours.get(k))}"
        for k in sorted({*theirs, *ours} - {"id"}) if theirs.get(k) != ours.get(k)
    )  # fmt: skip


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


DAMAGES = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, pa.ArrowException)
"""What work on a JSON file or a table raises that has its checksum and is not what afn-ray writes."""


@contextlib.contextmanager
def named_damage(uri: str) -> Iterator[None]:
    """Raises ``StoreError`` for what is read below ``uri`` and is not what afn-ray writes."""
    try:
        yield
    except DAMAGES as error:
        raise StoreError(f"{uri} is damaged: it is not what afn-ray writes: {error!r}{ASK_VERIFY}") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_time(value: Any) -> bool:
    return value == "" or bool(datetime.fromisoformat(value))


_INFO_IS: dict[str, Callable[[Any], bool]] = {
    "layers": lambda x: all(type(layer) is int for layer in x),
    "counts": lambda x: all(map(_is_count, x.values())),
    "corpus": lambda x: all(map(_is_count, x.values())),
    "config": lambda x: isinstance(x.get("model", ""), str) and all(isinstance(c, str) for c in x.get("corpus", [])),
    "model": lambda x: isinstance(x.get("name", ""), str),
    "measure": lambda x: isinstance(x.get("id", ""), str),
    "created_at": _is_time,
    "finished_at": _is_time,
    "seconds": lambda x: type(x) in (int, float) and 0 <= x < 1e12,
    "quarantined": lambda x: all(isinstance(q[k], str) for q in x for k in ("shard", "uri", "reason")),
}
"""What is shown or added up of a run.json that anyone may have written."""


def _is_info(key: str, value: Any) -> bool:
    try:
        return _INFO_IS[key](value)
    except DAMAGES:
        return False


def open_folder(store: str, name: str) -> RunFolder:
    """The run ``name`` in ``store``, complete, not yet, or condemned. Raises ``StoreError`` for a damaged run.json."""
    uri = storage.join(store, "runs", name)
    info = _read_json(storage.join(uri, "run.json"))
    if info is None:
        return RunFolder(uri, store, name, {})
    if "condemned" in info:
        return RunFolder(uri, store, name, {}, condemned=True)
    for key, kind in RUN_KEYS.items():
        if not isinstance(info.get(key), kind):
            raise StoreError(f"{uri}/run.json is damaged: {key} is {_short(info.get(key))}")
    for key in _INFO_IS.keys() & info.keys():
        if not _is_info(key, info[key]):
            raise StoreError(f"{uri}/run.json is damaged: {key} is {_short(info[key])}")
    return RunFolder(uri, store, name, info)


def _read_json(uri: str) -> dict[str, Any] | None:
    """What the sealed file ``uri`` holds, or None when there is no such file. Raises ``StoreError`` for any other."""
    data = storage.read_if_there(uri, JSON_BYTES)
    return None if data is None else _json(data, uri)


class Part(dict[str, Any]):
    """One object of a JSON file of the store; asking for a key that it lacks raises ``StoreError``."""

    def __init__(self, uri: str, value: dict[str, Any]) -> None:
        """``uri`` names the file."""
        super().__init__(value)
        self.uri = uri

    def __missing__(self, key: str) -> Any:
        raise StoreError(f"{self.uri} is damaged: it has no {key!r} where afn-ray writes one{ASK_VERIFY}")


def _json(data: bytes, uri: str) -> dict[str, Any]:
    try:
        value = json.loads(data, object_hook=partial(Part, uri))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{uri} is damaged: {error}") from error
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        got = value.get("schema_version") if isinstance(value, dict) else type(value).__name__
        raise StoreError(
            f"{uri} has schema version {got}, expected {SCHEMA_VERSION}; use the afn-ray that wrote it, or measure the "
            "corpus anew in another --store"
        )
    value.pop("sha256", None)
    if data != sealed(value):
        raise StoreError(f"{uri} is damaged: its bytes do not have the checksum that it carries{ASK_VERIFY}")
    return value


def sealed(body: dict[str, Any]) -> bytes:
    """``body`` as a JSON file whose last entry is the SHA-256 of the same file without it: no byte changes unseen.

    Raises ``StoreError`` for what no reader would take.
    """
    data = _json_bytes({**body, "sha256": sha256(_json_bytes(body)).hexdigest()})
    if len(data) > JSON_BYTES:
        longest = max(body, key=lambda key: len(_json_bytes({key: body[key]})))
        raise StoreError(
            f"a JSON file of {len(data):,} bytes was not written: at most {JSON_BYTES:,} are read, and most of it is "
            f"its entry {longest}"
        )
    return data


def find_run(uri: str) -> RunFolder:
    """The run at ``uri``: a run's own URI, or a store's for its latest complete run.

    Raises ``StoreError`` when there is none, or when the run named is not complete.
    """
    uri = storage.absolute(uri).rstrip("/")
    store, _, name = uri.rpartition("/runs/")
    if name and "/" not in name and storage.exists(storage.join(uri, "plan.parquet")):
        run = open_folder(store, name)
        if run.condemned:
            raise StoreError(f"run {uri} was removed by 'afn gc'; 'afn status {store}' lists those that are there")
        if not run.info:
            raise StoreError(f"run {uri} is not complete; give its 'afn run' command again to finish it")
        return run
    names = run_names(uri)
    for name in reversed(names):
        run = open_folder(uri, name)
        if run.info and not is_copy(run):
            return run
    if names:
        raise StoreError(f"{uri} holds no complete run; give the 'afn run' command again to finish the one begun")
    if storage.exists(storage.join(uri, PLANNING)):
        raise StoreError(f"{uri} has no run yet: its last call ended, or is at work, before there was one; 'afn status "
                         f"{uri}' tells more")  # fmt: skip
    raise StoreError(f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'")


def read_pilot(store: str, key: str) -> dict[str, Any] | None:
    """What an earlier run in ``store`` decided under ``key``, if one did."""
    return _read_json(storage.join(store, "pilots", f"{key}.json"))


def write_pilot(store: str, key: str, value: dict[str, Any]) -> dict[str, Any]:
    """Keep ``value`` for all later runs under ``key``; returns what is kept, ours or a rival's."""
    uri = storage.join(store, "pilots", f"{key}.json")
    with contextlib.suppress(storage.AlreadyWritten):
        storage.write_once(uri, sealed({"schema_version": SCHEMA_VERSION, **value}))
    return _json(storage.read_bytes(uri), uri)


def finish_run(run: RunFolder, info: dict[str, Any]) -> RunFolder:
    """Write run.json, which makes the run complete; ``info["tables"]`` has what ``write_table`` gave."""
    plan = storage.read_bytes(storage.join(run.uri, "plan.parquet"))
    tables = {"plan": _entry("plan.parquet", plan), **info["tables"]}
    body = {"schema_version": SCHEMA_VERSION, "id": run.id, **info, "tables": tables}
    try:
        storage.write_once(storage.join(run.uri, "run.json"), sealed(body))
    except storage.AlreadyWritten:
        theirs = open_folder(run.store, run.id)  # another process finished the same run with the same tables
        if theirs.condemned:
            raise Interrupted(
                f"'afn gc' has given up run {run.uri}, which had stood still; the same command begins a new one"
            ) from None
        return theirs
    return RunFolder(run.uri, run.store, run.id, body)


def condemn_run(run: RunFolder, epoch: int, *, complete: bool) -> bool:
    """Make sure that ``run`` is never complete (again); False where it has been completed meanwhile.

    Its run.json says so in place of what would make it complete: one name, so that only one of the two can be written.
    ``complete``: it was, and no process is about to take it up.
    """
    uri, body = storage.join(run.uri, "run.json"), {"schema_version": SCHEMA_VERSION, "id": run.id, "condemned": epoch}
    if complete:
        storage.write_over(uri, sealed(body), retry_for_s=None)
        return True
    try:
        storage.write_once(uri, sealed(body))
    except storage.AlreadyWritten:
        return open_folder(run.store, run.id).condemned
    return True


def mark_audited(run: RunFolder) -> None:
    """Keep with the complete ``run`` that a verdict on it was given, whatever it was."""
    with contextlib.suppress(storage.AlreadyWritten):
        body = {"schema_version": SCHEMA_VERSION, "run": run.id, "audited_at": datetime.now(UTC).isoformat()}
        storage.write_once(storage.join(run.uri, "audited.json"), sealed(body))


def is_audited(run: RunFolder) -> bool:
    """Whether ``mark_audited`` was called for ``run``. Raises ``StoreError`` for a mark that is damaged."""
    uri = storage.join(run.uri, "audited.json")
    body = _read_json(uri)
    return body is not None and body.get("run") == run.id


def created_at(run: RunFolder) -> str:
    """When the run began, ISO 8601, UTC."""
    plan = read_plan(run.store, run.id)
    if plan is None:
        raise StoreError(f"{run.uri} has lost its plan.parquet; give the 'afn run' command again to begin a new run")
    return str(plan[1].get("created_at", ""))


def write_table(run: RunFolder, name: str, table: pa.Table) -> dict[str, Any]:
    """Write the run's table ``name`` and return its file's name, size and checksum, for ``run.json`` to list.

    Nothing is replaced: a rival's file, or one that an unfinished reduce left behind, is kept where it holds the
    same, and stands beside ours where it does not.
    """
    data = parquet.encode(table)
    file = f"{name}.parquet"
    try:
        storage.write_once(storage.join(run.uri, file), data)
    except storage.AlreadyWritten:
        if storage.read_bytes(storage.join(run.uri, file)) != data:
            file = f"{name}-{sha256(data).hexdigest()[:16]}.parquet"
            with contextlib.suppress(storage.AlreadyWritten):  # named by its content
                storage.write_once(storage.join(run.uri, file), data)
    return _entry(file, data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """What run.json says of a table's file."""
    return {"name": name, "bytes": len(data), "sha256": sha256(data).hexdigest(), "crc32": blocks.checksums(data)}


def read_table(run: RunFolder, name: str) -> pa.Table:
    """The run's table ``name``: shards, thresholds, histogram, vocabulary or plan; unproved while it is not complete.

    Raises ``StoreError`` when it is missing or not what run.json lists.
    """
    if not run.info:
        uri = storage.join(run.uri, f"{name}.parquet")
        return _table(storage.read_bytes(uri), uri)
    entry = run.info["tables"].get(name)
    file = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(file, str) or "/" in file:
        raise StoreError(f"{run.uri}/run.json is damaged: its table {name} is {_short(entry)}")
    uri = storage.join(run.uri, file)
    data = storage.read_bytes(uri)
    if _entry(file, data) != entry:
        raise StoreError(
            f"{uri} is damaged: {_short(_entry(file, data))}, expected {_short(entry)}; delete {run.uri}/run.json and "
            "give the 'afn run' command again"
        )
    return _table(data, uri)


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


# --- commits ---------------------------------------------------------------------------------------------


def shard_uri(store: str, measure_id: str, shard: str) -> str:
    return storage.join(store, "shards", measure_id, shard)


_IS: dict[str, Callable[[Any], bool]] = {
    "counts": lambda x: isinstance(x, dict) and all(type(n) is int and 0 <= n < 1 << 62 for n in x.values()),
    "seconds": lambda x: type(x) in (int, float) and 0 <= x < 1e12,
    "made_by": lambda x: isinstance(x, dict) and all(isinstance(v, str) for v in x.values()),
}
"""What is added up or kept of a commit that anyone may have written."""


def commit_name(generation: int) -> str:
    """Name of the commit of that generation of a shard."""
    return f"commit-{generation}.json" if generation else "commit.json"


def generation_of(name: str) -> int | None:
    """The generation of the commit called ``name``; None for any other file."""
    found = COMMIT.fullmatch(name)
    return int(found[1] or 0) if found else None


def read_commit(store: str, measure_id: str, shard: str, generation: int = 0) -> Commit | None:
    """The commit of ``shard``, or None while there is none. Raises ``StoreError`` when it is damaged."""
    found = read_committed(store, measure_id, shard, generation)
    return None if found is None else found[0]


def read_committed(store: str, measure_id: str, shard: str, generation: int = 0) -> tuple[Commit, Shard] | None:
    """As ``read_commit``, with the slices that were read and how."""
    uri = storage.join(shard_uri(store, measure_id, shard), commit_name(generation))
    value = _read_json(uri)
    if value is None:
        return None
    try:
        commit = Commit(**{k: value[k] for k in Commit.__dataclass_fields__})
        slices = tuple(FileSlice(**piece) for piece in value["slices"])
        read = Shard(commit.shard, slices, ReadOptions(**value["options"]), generation)
    except (KeyError, TypeError) as error:
        raise StoreError(f"{uri} is damaged: {error!r}") from error
    files = commit.files if isinstance(commit.files, dict) else {}
    names = [str(f.get("name")) if isinstance(f, dict) else "" for f in files.values()]
    escapes = any("/" in n or n in ("", ".", "..") for n in names)
    if set(files) not in (set(TABLES), set(TABLES + NEURON_TABLES)) or escapes:
        raise StoreError(f"{uri} is damaged: it names the files {names}")
    for what in ("counts", "seconds", "made_by"):
        if not _IS[what](got := getattr(commit, what)):
            raise StoreError(f"{uri} is damaged: {what} is {_short(got)}")
    if (value.get("measure"), commit.shard) != (measure_id, shard):
        raise StoreError(
            f"{uri} is damaged: it is the commit of shard {commit.shard} of measure {value.get('measure')}"
        )
    return commit, read


def committed_blocks(store: str, measure_id: str, shard: str, generation: int = 0) -> dict[str, Blocks]:
    """The blocks of the files of a committed shard, by the names of the files."""
    uri = storage.join(shard_uri(store, measure_id, shard), commit_name(generation))
    value = _read_json(uri)
    if value is None:
        raise StoreError(f"{uri} is gone from the store{ASK_VERIFY}")
    try:
        files, crc32 = value["files"], value["crc32"]
        return {str(files[table]["name"]): Blocks.of(files[table]["bytes"], crc32[table]) for table in files}
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{uri} is damaged: {error!r}") from error


def find_blocks(run: RunFolder, name: str) -> Blocks:
    """The blocks of the file ``name``, below the store, which is a shard's of the complete ``run`` or its own."""
    uri, (*folders, file) = storage.join(run.store, name), name.split("/")
    try:
        if folders[0] == "shards":
            return _blocks_by_name(run.store, folders[1], folders[2], file)
        (entry,) = (entry for entry in run.info["tables"].values() if entry.get("name") == file)
        return Blocks.of(entry["bytes"], entry["crc32"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{uri} is not the file that was committed{ASK_VERIFY}") from error


def _blocks_by_name(store: str, measure_id: str, shard: str, file: str) -> Blocks:
    """The blocks of ``file`` from the commit that names it, of whichever generation."""
    refused: Exception = KeyError(file)

    def generations() -> Iterator[int]:
        yield 0  # most shards have this one alone
        names = storage.list_names(shard_uri(store, measure_id, shard))
        yield from sorted(n for name in names if (n := generation_of(name)))

    for generation in generations():
        try:
            found = committed_blocks(store, measure_id, shard, generation)
        except StoreError as error:
            refused = error
        else:
            if file in found:
                return found[file]
    raise refused


def read_file(store: str, measure_id: str, shard: str, entry: dict[str, Any]) -> bytes:
    """One file of a committed shard. Raises ``StoreError`` when it is not what ``entry`` of the commit says."""
    folder = shard_uri(store, measure_id, shard)
    data = storage.read_bytes(storage.join(folder, entry["name"]))
    if sha256(data).hexdigest() != entry["sha256"]:
        raise StoreError(
            f"{folder}/{entry['name']} is damaged: its checksum is not the one in commit.json; delete {folder} and "
            "give 'afn run' again"
        )
    return data


def read_shard_table(store: str, measure_id: str, commit: Commit, table: str) -> pa.Table:
    """One table of a committed shard. Raises ``StoreError`` when it is not what the commit says."""
    entry = commit.files[table]
    return _table(read_file(store, measure_id, commit.shard, entry), str(entry["name"]))


def find_commits(store: str, measure_id: str, shards: Iterable[Shard]) -> Commits:
    """Commits that the store has of ``shards``, in their generations, by shard id."""
    there = set(storage.list_names(storage.join(store, "shards", measure_id)))
    held = [shard for shard in shards if shard.id in there]
    commits = Commits()

    def read(shard: Shard) -> Commit | None:
        return read_commit(store, measure_id, shard.id, shard.generation)

    with ThreadPoolExecutor(IO_THREADS) as pool:
        for begin in range(0, len(held), AHEAD):  # a pool takes all that it is given at once
            for found in pool.map(read, held[begin : begin + AHEAD]):
                if found is not None:
                    commits[found.shard] = found
    return commits


def lost_shards(store: str, measure_id: str, shards: Iterable[Shard], run: RunFolder) -> list[str]:
    """Shards of the complete ``run`` that have no folder any more; one listing accuses, a look at each convicts."""
    there = set(storage.list_names(storage.join(store, "shards", measure_id)))
    missing = {q["shard"] for q in run.info.get("quarantined", [])}
    return [
        s.id for s in shards
        if s.id not in there and s.id not in missing and not storage.list_names(shard_uri(store, measure_id, s.id))
    ]  # fmt: skip


def publish(
    store: str, measure_id: str, shard: Shard, attempt: str, tables: dict[str, tuple[Path, int]],
    counts: dict[str, int], seconds: float, made_by: dict[str, str],
) -> Commit:  # fmt: skip
    """Upload ``tables`` (name -> local file, rows) and commit them; the first commit of a shard wins.

    Returns the winner's commit, ours or not. Raises ``StoreError`` when a rival's counts differ from ours:
    the same shard under the same measure must have the same rows. After ``Unavailable`` nobody knows whether it is
    committed; the next look at the store tells.
    """
    folder = shard_uri(store, measure_id, shard.id)
    files: dict[str, dict[str, Any]] = {}
    crc32: dict[str, str] = {}
    for table, (path, rows) in tables.items():
        digest, crc32[table] = blocks.file_checksums(path)
        name = f"{attempt}-{table}.parquet"
        files[table] = {"name": name, "rows": rows, "bytes": path.stat().st_size, "sha256": digest}
    uris = [storage.join(folder, str(file["name"])) for file in files.values()]
    try:
        for uri, (path, _) in zip(uris, tables.values(), strict=True):
            storage.upload(path, uri)
    except BaseException:  # nobody refers to them yet, and a full disk needs the room
        storage.delete(uris)
        raise
    commit = Commit(shard.id, attempt, files, counts, seconds, made_by)
    body = {"schema_version": SCHEMA_VERSION, "measure": measure_id, **asdict(commit), "crc32": crc32,
            "slices": [asdict(s) for s in shard.slices], "options": asdict(shard.options),
            "committed_at": datetime.now(UTC).isoformat()}  # fmt: skip
    try:
        storage.write_once(storage.join(folder, commit_name(shard.generation)), sealed(body))
        return commit
    except storage.AlreadyWritten:  # by a rival, or by ourselves where a first answer was lost
        winner = read_commit(store, measure_id, shard.id, shard.generation)
    except Unavailable:  # the store may have the commit, or get it yet: what it names must stay
        raise
    except (StoreError, Interrupted) as error:  # it may have the commit all the same
        winner = read_commit(store, measure_id, shard.id, shard.generation)
        if winner is None:
            if isinstance(error, Interrupted):  # a full disk needs the room
                storage.delete(uris)
            raise
    if winner is None:
        name = commit_name(shard.generation)
        raise StoreError(f"{folder}/{name} exists but cannot be read back; is something deleting from the store?")
    if winner.attempt != attempt:
        storage.delete(uris)
        if {**winner.counts, "forward_tokens": 0} != {**counts, "forward_tokens": 0}:  # padding depends on the batches
            raise StoreError(f"two attempts at shard {shard.id} disagree: {winner.counts} against {counts}; "
                             "is one worker's model or library different?")  # fmt: skip
    return winner
