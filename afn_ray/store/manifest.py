"""Plan a run, commit its shards, and say what is done: the store's one mechanism.

Layout of a store::

    shards/<measure>/<shard>/commit.json              the commit; its existence is the truth
    shards/<measure>/<shard>/commit-<n>.json          the same, of a shard that a gc had given up
    before (``epochs``) shards/<measure>/<shard>/<attempt>-<table>.parquet runs/<run>/plan.parquet
    written when the run begins; also what it remembers of files runs/<run>/run.json
    written once, last; its existence means complete runs/<run>/audited.json
    an audit has given its verdict on the run
    runs/<run>/{shards,thresholds,histogram,vocabulary}.parquet runs/<run>/lease-<id>.json
    a process has taken up a run that was there; it ends without runs/<run>/status.json
    how far it is, for people; replaced while it is under way planning.json
    the same of a run that has no name yet .rayignore                                        keeps a
    store on a disk out of what Ray ships with a job gc/<epoch>.parquet
    what gc has given up so far (``epochs``)

Nothing relies on the two that tell how far a run is. Of the others each says itself whether it is
whole: a JSON file carries a checksum of all its other bytes (``sealed``), and what is in Parquet is
listed with size and checksum in the commit.json or run.json that names it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

import pyarrow as pa

from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, Interrupted, StoreError
from afn_ray.schema import (
    PLAN_SCHEMA,
    SCHEMA_VERSION,
    FileInfo,
    FileSlice,
    Shard,
    fingerprint,
    fingerprint_of_rows,
)
from afn_ray.store import epochs, parquet, storage
from afn_ray.store.blocks import Blocks
from afn_ray.store.checksums import (
    AHEAD,
    ASK_VERIFY,
    DAMAGES,
    entry_of,
    parse_json,
    parse_table,
    read_json,
    sealed,
    short,
)
from afn_ray.store.layout import (
    HEX,
    LATEST,
    PLANNING,
    RAY_IGNORE,
    STAMP,
    StoreFiles,
    is_run_name,
)
from afn_ray.store.shard_files import blocks_by_name, shard_uri

RUN_KEYS: dict[str, type] = {
    "id": str, "measure": dict, "model": dict, "layers": list, "config": dict, "corpus": dict, "counts": dict,
    "precision": dict, "tables": dict, "created_at": str, "finished_at": str,
}  # fmt: skip


# --- what lies in a store
# --------------------------------------------------------------------------------


def keep_from_jobs(store: str) -> None:
    """Write the file for which Ray leaves a ``store`` on a disk out of a job that is submitted from
    a folder above it.

    A store soon has more than the 512 MiB that Ray ships, and no job needs it.
    """
    if storage.is_local(store):
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(storage.join(store, RAY_IGNORE), b"*\n")


def run_names(store: str) -> list[str]:
    """Names of the runs in ``store``, in the order in which they were begun; copies under such
    names among them.
    """
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


# --- plan
# ------------------------------------------------------------------------------------------------


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
        found = (
            shard.options.labels_in(piece.format) for shard in self.shards for piece in shard.slices
        )
        return next(filter(None, found), None)


def proved_rows(uri: str, table: pa.Table, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the plan at ``uri``. Raises ``StoreError`` where they and ``header`` are not what
    was written.
    """
    asked = {key: value for key, value in header.items() if key != "sha256"}
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        digest = fingerprint_of_rows(asked, [rows] if rows else [])
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise StoreError(f"{uri} is damaged: {error!r}{ASK_VERIFY}") from error
    if header.get("sha256") != digest:
        raise StoreError(
            f"{uri} is damaged: its rows and header do not have the checksum that it carries{ASK_VERIFY}"
        )
    return rows


def cuts_id(config: RunConfig, shard_bytes: int) -> str:
    """Fingerprint of what decides where files are cut."""
    return fingerprint([SCHEMA_VERSION, asdict(config.read_options), shard_bytes])


def read_plan(store: str, run: str) -> tuple[pa.Table, dict[str, Any]] | None:
    """The plan of the run named ``run`` and its header; None when a crash came before it was
    written.
    """
    uri = storage.join(store, "runs", run, "plan.parquet")
    data = storage.read_if_there(uri)
    if data is None:
        return None
    table = parse_table(data, uri)
    try:
        header = json.loads((table.schema.metadata or {})[b"afn"])
    except (KeyError, ValueError, RecursionError) as error:
        raise StoreError(f"{uri} is damaged: its header is none: {error!r}{ASK_VERIFY}") from error
    if not isinstance(header, dict):
        raise StoreError(f"{uri} is damaged: its header is {short(header)}{ASK_VERIFY}")
    return table, header


# --- runs
# ------------------------------------------------------------------------------------------------


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
    """The store's newest run where it is that of ``plan``, complete or not; and the newest one's
    name, or "".

    Writes nothing. Raises ``StoreError`` when the store holds another measure and the config does
    not allow a second one.
    """
    measure_id = fingerprint(measure)
    held = [
        name
        for name in storage.list_names(storage.join(config.store, "shards"))
        if HEX.fullmatch(name)
    ]
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
            return (
                same,
                newest,
            )  # one that lacks shards is complete, and asked again it is tried again
    if frozen and newest.endswith(_suffix(measure_id, plan.shards, config, ())):
        same = open_folder(config.store, newest)
        if same.info and not same.info.get("quarantined") and frozen_rows(same) == list(frozen):
            return same, newest  # it labels by these thresholds, which are its own
    return None, newest


def begin_run(
    config: RunConfig,
    measure: dict[str, Any],
    plan: Plan,
    begun_ns: int,
    frozen: Sequence[dict[str, Any]] = (),
) -> Claim:
    """The run of ``plan``: the store's newest one when it is the same, complete or not, else a new
    one.

    ``begun_ns`` is the time before the first file was looked at; ``frozen`` as of ``find_frozen``.
    The claim is written before the newest epoch is read; ``epochs`` says why. A run that a gc gave
    up in between is begun anew. Raises ``StoreError`` as ``find_begun`` does.
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
        run, lease = (
            _new_run(config, measure, plan, begun_ns, frozen, max(newest, *epoch.condemned)),
            None,
        )
    return Claim(run, epoch.marked(fingerprint(measure), plan.shards), lease)


def _new_run(
    config: RunConfig,
    measure: dict[str, Any],
    plan: Plan,
    begun_ns: int,
    frozen: Sequence[dict[str, Any]],
    newest: str,
) -> RunFolder:
    """A run whose name comes after that of ``newest``, or is of this millisecond."""
    suffix = _suffix(fingerprint(measure), plan.shards, config, frozen)
    created = min(datetime.now(UTC), LATEST)
    name = f"{_stamp(created)}-{suffix}"
    if name <= newest:  # the clock went back, and the newest run is found by its name
        created = datetime.strptime(newest.partition("-")[0], STAMP).replace(
            tzinfo=UTC
        ) + timedelta(milliseconds=1)
        name = f"{_stamp(created)}-{suffix}"
    header = {
        "cuts": cuts_id(config, plan.shard_bytes),
        "shard_bytes": plan.shard_bytes,
        "begun_ns": begun_ns,
        "created_at": created.isoformat(timespec="seconds"),
        "config": asdict(config),
        "measure": measure,
        "frozen": list(frozen),
    }
    table, header["sha256"] = _plan_table(plan.shards, header)
    table = table.replace_schema_metadata({"afn": json.dumps(header)})
    uri = storage.join(config.store, "runs", name)
    with contextlib.suppress(
        storage.AlreadyWritten
    ):  # the same call in the same millisecond: the same plan
        storage.write_once(storage.join(uri, "plan.parquet"), parquet.encode(table))
    return RunFolder(uri, config.store, name, {})


def _is_begun(store: str, name: str) -> bool:
    """Whether the folder ``name`` is a run that has its plan, and no copy."""
    return storage.exists(storage.join(store, "runs", name, "plan.parquet")) and not is_copied(
        store, name
    )


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
    measure_id: str,
    shards: Iterable[Shard],
    config: RunConfig,
    frozen: Sequence[dict[str, Any]] | None,
) -> str:
    """Last part of a run's name: what it was asked for; ``frozen`` is None in plans of before there
    was any.
    """
    ask: dict[str, Any] = {
        "measure": measure_id,
        "shards": [s.id for s in shards],
        "language": config.language,
        "sink_factor": config.sink_factor,
    }
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
    """The thresholds that ``config`` says to label by, as rows of ``FROZEN``; none for the run's
    own.

    Those that the run named goes by itself, so that a run every night may name the night before.
    Raises ``StoreError`` when there is no such run, ``ConfigError`` when it has another measure.
    """
    if config.thresholds is None:
        return []
    run = find_run(config.thresholds)
    theirs, ours = (
        {k: v for k, v in m.items() if k not in BESIDE_STRENGTH}
        for m in (run.info["measure"], measure)
    )
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
    """The thresholds that the complete run's labels go by, as in ``THRESHOLDS_SCHEMA``: frozen
    ones, or its own.
    """
    return read_table(run, labels_name(run))


def read_shards(run: RunFolder) -> tuple[list[Shard], dict[str, Any]]:
    """The shards that ``run`` planned, in order, and its plan's header, once both are proved to be
    what was written.

    Raises ``StoreError`` for a plan that is missing, damaged, edited or another run's.
    """
    uri = storage.join(run.uri, "plan.parquet")
    table = read_table(run, "plan")
    try:
        header = json.loads(table.schema.metadata[b"afn"])
        rows = table.to_pylist()
        digest = header.pop("sha256")
        if digest != fingerprint([header, rows]):
            raise StoreError(
                f"{uri} is damaged: its rows and header do not have the checksum that it carries"
            )
        config = RunConfig(**header["config"] | {"corpus": tuple(header["config"]["corpus"])})
        shards = []
        for (_, name), group in itertools.groupby(
            rows, lambda row: (row.pop("ordinal"), row.pop("shard"))
        ):
            shards.append(Shard.of([FileSlice(**row) for row in group], config.read_options))
            if name != shards[-1].id:
                raise StoreError(
                    f"{uri} is damaged: it calls {name} what by its slices is shard {shards[-1].id}"
                )
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
        f"{k}: {who} has {short(theirs.get(k))}, this run asks for {short(ours.get(k))}"
        for k in sorted({*theirs, *ours} - {"id"})
        if theirs.get(k) != ours.get(k)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_time(value: Any) -> bool:
    return value == "" or bool(datetime.fromisoformat(value))


_INFO_IS: dict[str, Callable[[Any], bool]] = {
    "layers": lambda x: all(type(layer) is int for layer in x),
    "counts": lambda x: all(map(_is_count, x.values())),
    "corpus": lambda x: all(map(_is_count, x.values())),
    "config": lambda x: (
        isinstance(x.get("model", ""), str) and all(isinstance(c, str) for c in x.get("corpus", []))
    ),
    "model": lambda x: isinstance(x.get("name", ""), str),
    "measure": lambda x: isinstance(x.get("id", ""), str),
    "created_at": _is_time,
    "finished_at": _is_time,
    "seconds": lambda x: type(x) in (int, float) and 0 <= x < 1e12,
    "quarantined": lambda x: all(
        isinstance(q[k], str) for q in x for k in ("shard", "uri", "reason")
    ),
}
"""What is shown or added up of a run.json that anyone may have written."""


def _is_info(key: str, value: Any) -> bool:
    try:
        return _INFO_IS[key](value)
    except DAMAGES:
        return False


def open_folder(store: str, name: str) -> RunFolder:
    """The run ``name`` in ``store``, complete, not yet, or condemned. Raises ``StoreError`` for a
    damaged run.json.
    """
    uri = storage.join(store, "runs", name)
    info = read_json(storage.join(uri, "run.json"))
    if info is None:
        return RunFolder(uri, store, name, {})
    if "condemned" in info:
        return RunFolder(uri, store, name, {}, condemned=True)
    for key, kind in RUN_KEYS.items():
        if not isinstance(info.get(key), kind):
            raise StoreError(f"{uri}/run.json is damaged: {key} is {short(info.get(key))}")
    for key in _INFO_IS.keys() & info.keys():
        if not _is_info(key, info[key]):
            raise StoreError(f"{uri}/run.json is damaged: {key} is {short(info[key])}")
    return RunFolder(uri, store, name, info)


def find_run(uri: str) -> RunFolder:
    """The run at ``uri``: a run's own URI, or a store's for its latest complete run.

    Raises ``StoreError`` when there is none, or when the run named is not complete.
    """
    uri = storage.absolute(uri).rstrip("/")
    store, _, name = uri.rpartition("/runs/")
    if name and "/" not in name and storage.exists(storage.join(uri, "plan.parquet")):
        run = open_folder(store, name)
        if run.condemned:
            raise StoreError(
                f"run {uri} was removed by 'afn gc'; 'afn status {store}' lists those that are there"
            )
        if not run.info:
            raise StoreError(
                f"run {uri} is not complete; give its 'afn run' command again to finish it"
            )
        return run
    names = run_names(uri)
    for name in reversed(names):
        run = open_folder(uri, name)
        if run.info and not is_copy(run):
            return run
    if names:
        raise StoreError(
            f"{uri} holds no complete run; give the 'afn run' command again to finish the one begun"
        )
    if storage.exists(storage.join(uri, PLANNING)):
        raise StoreError(
            f"{uri} has no run yet: its last call ended, or is at work, before there was one; 'afn status "
            f"{uri}' tells more"
        )
    raise StoreError(
        f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'"
    )


def read_pilot(store: str, key: str) -> dict[str, Any] | None:
    """What an earlier run in ``store`` decided under ``key``, if one did."""
    return read_json(storage.join(store, "pilots", f"{key}.json"))


def write_pilot(store: str, key: str, value: dict[str, Any]) -> dict[str, Any]:
    """Keep ``value`` for all later runs under ``key``; returns what is kept, ours or a rival's."""
    uri = storage.join(store, "pilots", f"{key}.json")
    with contextlib.suppress(storage.AlreadyWritten):
        storage.write_once(uri, sealed({"schema_version": SCHEMA_VERSION, **value}))
    return parse_json(storage.read_bytes(uri), uri)


def finish_run(run: RunFolder, info: dict[str, Any]) -> RunFolder:
    """Write run.json, which makes the run complete; ``info["tables"]`` has what ``write_table``
    gave.
    """
    plan = storage.read_bytes(storage.join(run.uri, "plan.parquet"))
    tables = {"plan": entry_of("plan.parquet", plan), **info["tables"]}
    body = {"schema_version": SCHEMA_VERSION, "id": run.id, **info, "tables": tables}
    try:
        storage.write_once(storage.join(run.uri, "run.json"), sealed(body))
    except storage.AlreadyWritten:
        theirs = open_folder(
            run.store, run.id
        )  # another process finished the same run with the same tables
        if theirs.condemned:
            raise Interrupted(
                f"'afn gc' has given up run {run.uri}, which had stood still; the same command begins a new one"
            ) from None
        return theirs
    return RunFolder(run.uri, run.store, run.id, body)


def condemn_run(run: RunFolder, epoch: int, *, complete: bool) -> bool:
    """Make sure that ``run`` is never complete (again); False where it has been completed
    meanwhile.

    Its run.json says so in place of what would make it complete: one name, so that only one of the
    two can be written. ``complete``: it was, and no process is about to take it up.
    """
    uri, body = (
        storage.join(run.uri, "run.json"),
        {"schema_version": SCHEMA_VERSION, "id": run.id, "condemned": epoch},
    )
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
        body = {
            "schema_version": SCHEMA_VERSION,
            "run": run.id,
            "audited_at": datetime.now(UTC).isoformat(),
        }
        storage.write_once(storage.join(run.uri, "audited.json"), sealed(body))


def is_audited(run: RunFolder) -> bool:
    """Whether ``mark_audited`` was called for ``run``. Raises ``StoreError`` for a mark that is
    damaged.
    """
    uri = storage.join(run.uri, "audited.json")
    body = read_json(uri)
    return body is not None and body.get("run") == run.id


def created_at(run: RunFolder) -> str:
    """When the run began, ISO 8601, UTC."""
    plan = read_plan(run.store, run.id)
    if plan is None:
        raise StoreError(
            f"{run.uri} has lost its plan.parquet; give the 'afn run' command again to begin a new run"
        )
    return str(plan[1].get("created_at", ""))


def write_table(run: RunFolder, name: str, table: pa.Table) -> dict[str, Any]:
    """Write the run's table ``name`` and return its file's name, size and checksum, for
    ``run.json`` to list.

    Nothing is replaced: a rival's file, or one that an unfinished reduce left behind, is kept where
    it holds the same, and stands beside ours where it does not.
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
    return entry_of(file, data)


def read_table(run: RunFolder, name: str) -> pa.Table:
    """The run's table ``name``: shards, thresholds, histogram, vocabulary or plan; unproved while
    it is not complete.

    Raises ``StoreError`` when it is missing or not what run.json lists.
    """
    if not run.info:
        uri = storage.join(run.uri, f"{name}.parquet")
        return parse_table(storage.read_bytes(uri), uri)
    entry = run.info["tables"].get(name)
    file = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(file, str) or "/" in file:
        raise StoreError(f"{run.uri}/run.json is damaged: its table {name} is {short(entry)}")
    uri = storage.join(run.uri, file)
    data = storage.read_bytes(uri)
    if entry_of(file, data) != entry:
        raise StoreError(
            f"{uri} is damaged: {short(entry_of(file, data))}, expected {short(entry)}; delete {run.uri}/run.json and "
            "give the 'afn run' command again"
        )
    return parse_table(data, uri)


# --- commits
# ---------------------------------------------------------------------------------------------


def find_blocks(run: RunFolder, name: str) -> Blocks:
    """The blocks of the file ``name``, below the store, which is a shard's of the complete ``run``
    or its own.
    """
    uri, (*folders, file) = storage.join(run.store, name), name.split("/")
    try:
        if folders[0] == "shards":
            return blocks_by_name(run.store, folders[1], folders[2], file)
        (entry,) = (entry for entry in run.info["tables"].values() if entry.get("name") == file)
        return Blocks.of(entry["bytes"], entry["crc32"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{uri} is not the file that was committed{ASK_VERIFY}") from error


def lost_shards(store: str, measure_id: str, shards: Iterable[Shard], run: RunFolder) -> list[str]:
    """Shards of the complete ``run`` that have no folder any more; one listing accuses, a look at
    each convicts.
    """
    there = set(storage.list_names(storage.join(store, "shards", measure_id)))
    missing = {q["shard"] for q in run.info.get("quarantined", [])}
    return [
        s.id
        for s in shards
        if s.id not in there
        and s.id not in missing
        and not storage.list_names(shard_uri(store, measure_id, s.id))
    ]
