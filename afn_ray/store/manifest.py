"""Runs in a store: plan and begin them, write and read their tables, complete them.

Layout of a store::

    shards/<measure>/<shard>/commit.json        the commit; its existence is the truth
    shards/<measure>/<shard>/commit-<n>.json    the same, after a gc condemned the last (``epochs``)
    shards/<measure>/<shard>/<attempt>-<table>.parquet
    runs/<run>/plan.parquet                     written first; also remembers the hashes of files
    runs/<run>/run.json                         written once, last; its existence means complete
    runs/<run>/audited.json                     an audit has given its verdict on the run
    runs/<run>/{shards,thresholds,histogram,vocabulary}.parquet
    runs/<run>/lease-<id>.json                  a process has resumed the run; deleted on completion
    runs/<run>/status.json                      progress, for people; replaced during the run
    planning.json                               progress of a run that has no name yet
    pilots/<key>.json                           decision of a calibration, for later runs
    .rayignore                                  keeps a store on a disk out of Ray jobs
    gc/<epoch>.parquet                          what garbage collections condemned (``epochs``)

Nothing depends on the two progress files. Each other file can be verified: a JSON file carries a
checksum of all its other bytes (``sealed``), and the size and checksum of a Parquet file are listed
in the commit.json or run.json that names it.
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
from afn_ray.store import epochs, parquet, storage, uris
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
"""Required keys of run.json, and the types of their values."""


# --- what a store holds


def keep_from_jobs(store: str) -> None:
    """Write the file that makes Ray leave a local ``store`` out of jobs submitted from above it.

    A store soon exceeds the 512 MiB that Ray uploads, and no job needs it.
    """
    if uris.is_local(store):
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(uris.join(store, RAY_IGNORE), b"*\n")


def run_names(store: str) -> list[str]:
    """Names of the runs in ``store``, oldest first, including copies under such names."""
    return [name for name in storage.list_names(uris.join(store, "runs")) if is_run_name(name)]


def is_copy(run: RunFolder) -> bool:
    """Whether ``run`` is a copy of a complete run under another name. A copy counts as foreign."""
    return bool(run.info) and run.info["id"] != run.id


def is_copied(store: str, name: str) -> bool:
    """Whether the run ``name`` is a copy of another run; False if its run.json is damaged."""
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


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards of a run, in order, and the files that they come from."""

    shards: tuple[Shard, ...]
    files: tuple[FileInfo, ...]
    skipped: tuple[FileInfo, ...]
    """Files with an unknown ending, or of a store."""
    num_hashed: int
    """Number of files read for the plan; the hashes of the others were remembered."""
    shard_bytes: int = 0
    """Target size of a shard, in bytes, at which the files were cut."""

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in self.shards)

    @property
    def labels(self) -> str | None:
        """The source of the documents' tags; None if they have none."""
        found = (
            shard.options.labels_in(piece.format) for shard in self.shards for piece in shard.slices
        )
        return next(filter(None, found), None)


def proved_rows(uri: str, table: pa.Table, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the plan at ``uri``, verified against the checksum in ``header``.

    Raises ``StoreError`` if the rows or the header are damaged.
    """
    asked = {key: value for key, value in header.items() if key != "sha256"}
    try:
        rows: list[dict[str, Any]] = table.to_pylist()
        digest = fingerprint_of_rows(asked, [rows] if rows else [])
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise StoreError(f"{uri} is damaged: {error!r}{ASK_VERIFY}") from error
    if header.get("sha256") != digest:
        raise StoreError(
            f"{uri} is damaged: its rows and header do not have the checksum that it "
            f"carries{ASK_VERIFY}"
        )
    return rows


def cuts_id(config: RunConfig, shard_bytes: int) -> str:
    """Fingerprint of everything that decides where files are cut."""
    return fingerprint([SCHEMA_VERSION, asdict(config.read_options), shard_bytes])


def read_plan(store: str, run: str) -> tuple[pa.Table, dict[str, Any]] | None:
    """The plan of the run named ``run`` and its header; None if the run crashed before writing it.

    Raises ``StoreError`` if the plan is damaged. The checksum is not verified; see ``proved_rows``.
    """
    uri = uris.join(store, "runs", run, "plan.parquet")
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


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run in a store. ``info`` is its run.json, empty until the run is complete."""

    uri: str
    store: str
    id: str
    info: dict[str, Any]
    condemned: bool = False
    """A gc has condemned the run: it can never be complete."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that no gc removes while its process is at work, and the shards that it may use."""

    run: RunFolder
    shards: tuple[Shard, ...]
    """The shards of the plan, in their valid generations."""
    lease: str | None
    """URI of the lease; None for a new run, whose plan is its claim."""


def find_begun(
    config: RunConfig, measure: dict[str, Any], plan: Plan, frozen: Sequence[dict[str, Any]] = ()
) -> tuple[RunFolder | None, str]:
    """The store's newest run if it has this ``plan``, else None; and the newest run's name or "".

    The run may be complete or not. A condemned run, or a complete run with quarantined shards, is
    not returned. Writes nothing. Raises ``StoreError`` if the store holds another measure and the
    config does not allow a second one, or if the plan of an incomplete run is damaged.
    """
    measure_id = fingerprint(measure)
    held = [
        name
        for name in storage.list_names(uris.join(config.store, "shards"))
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
        # A complete run with quarantined shards is not reused: a new run tries them again.
        if not same.condemned and not same.info.get("quarantined"):
            if not same.info and (begun_plan := read_plan(config.store, newest)) is not None:
                proved_rows(uris.join(same.uri, "plan.parquet"), *begun_plan)
            return same, newest
    if frozen and newest.endswith(_suffix(measure_id, plan.shards, config, ())):
        same = open_folder(config.store, newest)
        if same.info and not same.info.get("quarantined") and frozen_rows(same) == list(frozen):
            return same, newest  # its own thresholds are the frozen ones
    return None, newest


def begin_run(
    config: RunConfig,
    measure: dict[str, Any],
    plan: Plan,
    begun_ns: int,
    frozen: Sequence[dict[str, Any]] = (),
) -> Claim:
    """Resume the store's newest run if it has this ``plan``, complete or not, or begin a new one.

    ``begun_ns`` is the Unix time in ns before the first file was examined. ``frozen`` are the rows
    returned by ``find_frozen``. The claim is written before the newest epoch is read; ``epochs``
    explains why. If a gc condemned the run in between, a new run is begun. Raises ``StoreError`` as
    ``find_begun`` does.
    """
    run, newest = find_begun(config, measure, plan, frozen)
    lease = None
    if run is not None:
        lease = uris.join(run.uri, f"lease-{uuid.uuid4().hex}.json")
        # The name is unique, so AlreadyWritten means that the answer to our own first try was lost.
        with contextlib.suppress(storage.AlreadyWritten):
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
    """Write the plan of a new run, whose name sorts after ``newest``."""
    suffix = _suffix(fingerprint(measure), plan.shards, config, frozen)
    created = min(datetime.now(UTC), LATEST)
    name = f"{_stamp(created)}-{suffix}"
    if name <= newest:  # the clock went back; the newest run must have the last name
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
    uri = uris.join(config.store, "runs", name)
    # The same name means the same request in the same millisecond, and so the same plan.
    with contextlib.suppress(storage.AlreadyWritten):
        storage.write_once(uris.join(uri, "plan.parquet"), parquet.encode(table))
    return RunFolder(uri, config.store, name, {})


def _is_begun(store: str, name: str) -> bool:
    """Whether the folder ``name`` is a run with a plan, and not a copy."""
    return storage.exists(uris.join(store, "runs", name, "plan.parquet")) and not is_copied(
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
    """Last part of a run's name: a fingerprint of the request.

    ``frozen`` is None for a plan that was written before frozen thresholds existed.
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
"""Keys of a measure that change no strength, so that thresholds stay comparable."""
FROZEN = ("layer", "population", "q1", "q2", "q3", "sink_factor")
"""Columns that a run takes from the thresholds of another run."""


def find_frozen(config: RunConfig, measure: dict[str, Any]) -> list[dict[str, Any]]:
    """The thresholds that ``config`` names for labels, as rows of ``FROZEN``.

    The list is empty if the run labels by its own thresholds. They are the thresholds that the
    named run itself labels by, so that each nightly run can name the previous one. Raises
    ``StoreError`` if there is no such run, ``ConfigError`` if it has another measure.
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
            f"thresholds of {run.uri} are of another measure, and mean nothing here: "
            f"{_differences(theirs, ours, 'it')}"
        )
    return frozen_rows(run)


def frozen_rows(run: RunFolder) -> list[dict[str, Any]]:
    """The thresholds that the complete ``run`` labels by, as rows of ``FROZEN``."""
    return [{name: row[name] for name in FROZEN} for row in labels(run).to_pylist()]


def labels_name(run: RunFolder) -> str:
    """Name of the table with the thresholds that the complete ``run`` labels by."""
    return "frozen" if "frozen" in run.info["tables"] else "thresholds"


def labels(run: RunFolder) -> pa.Table:
    """The thresholds that the complete ``run`` labels by, as in ``THRESHOLDS_SCHEMA``.

    They are frozen ones or the run's own.
    """
    return read_table(run, labels_name(run))


def read_shards(run: RunFolder) -> tuple[list[Shard], dict[str, Any]]:
    """The shards that ``run`` planned, in order, and the header of its plan, both verified.

    Raises ``StoreError`` for a plan that is missing, damaged, edited or another run's.
    """
    uri = uris.join(run.uri, "plan.parquet")
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
        suffix = _suffix(fingerprint(header["measure"]), shards, config, header.get("frozen"))
    except DAMAGES as error:
        raise StoreError(f"{uri} is damaged: {error!r}") from error
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
    """The differences of two measures as text; ``who`` is the owner of ``theirs``."""
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
    "measure": lambda x: isinstance(x.get("id", ""), str) and isinstance(x.get("model", {}), dict),
    "created_at": _is_time,
    "finished_at": _is_time,
    "seconds": lambda x: type(x) in (int, float) and 0 <= x < 1e12,
    "quarantined": lambda x: all(
        isinstance(q[k], str) for q in x for k in ("shard", "uri", "reason")
    ),
}
"""Checks of the values in run.json that are shown or added up; the file may have been edited."""


def _is_info(key: str, value: Any) -> bool:
    try:
        return _INFO_IS[key](value)
    except DAMAGES:
        return False


def open_folder(store: str, name: str) -> RunFolder:
    """The run ``name`` in ``store``: complete, incomplete or condemned.

    Raises ``StoreError`` if run.json is damaged.
    """
    uri = uris.join(store, "runs", name)
    info = read_json(uris.join(uri, "run.json"))
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


def split_uri(uri: str) -> tuple[str, str]:
    """The store and the name of the run at ``uri``; for any other URI, itself and no name."""
    store, _, name = uri.rpartition("/runs/")
    return (store, name) if name and "/" not in name else (uri, "")


def find_run(uri: str) -> RunFolder:
    """The run at ``uri``, which is a run's own URI, or a store's for its latest complete run.

    Raises ``StoreError`` if there is none, or if the named run is not complete.
    """
    uri = uris.absolute(uri).rstrip("/")
    store, name = split_uri(uri)
    if name and storage.exists(uris.join(uri, "plan.parquet")):
        run = open_folder(store, name)
        if run.condemned:
            raise StoreError(
                f"run {uri} was removed by 'afn gc'; 'afn status {store}' lists those that are "
                "there"
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
    if storage.exists(uris.join(uri, PLANNING)):
        raise StoreError(
            f"{uri} has no run yet: its last call ended, or is at work, before there was one; 'afn "
            "status "
            f"{uri}' tells more"
        )
    raise StoreError(
        f"{uri} is neither a store nor a run; a store is what was given to 'afn run --store'"
    )


def read_pilot(store: str, key: str) -> dict[str, Any] | None:
    """The calibration that an earlier run stored under ``key``; None if there is none."""
    return read_json(uris.join(store, "pilots", f"{key}.json"))


def write_pilot(store: str, key: str, value: dict[str, Any]) -> dict[str, Any]:
    """Store the calibration ``value`` under ``key``; return the stored one, ours or a rival's."""
    uri = uris.join(store, "pilots", f"{key}.json")
    with contextlib.suppress(storage.AlreadyWritten):
        storage.write_once(uri, sealed({"schema_version": SCHEMA_VERSION, **value}))
    return parse_json(storage.read_bytes(uri), uri)


def finish_run(run: RunFolder, info: dict[str, Any]) -> RunFolder:
    """Write run.json, which makes the run complete.

    ``info["tables"]`` holds the entries returned by ``write_table``. If another process has
    completed the run, its run.json is returned. Raises ``Interrupted`` if a gc condemned the run.
    """
    plan = storage.read_bytes(uris.join(run.uri, "plan.parquet"))
    tables = {"plan": entry_of("plan.parquet", plan), **info["tables"]}
    body = {"schema_version": SCHEMA_VERSION, "id": run.id, **info, "tables": tables}
    try:
        storage.write_once(uris.join(run.uri, "run.json"), sealed(body))
    except storage.AlreadyWritten:
        # Another process finished the same run with the same tables, or a gc condemned it.
        theirs = open_folder(run.store, run.id)
        if theirs.condemned:
            raise Interrupted(
                f"'afn gc' has given up run {run.uri}, which had stood still; the same command "
                "begins a new one"
            ) from None
        return theirs
    return RunFolder(run.uri, run.store, run.id, body)


def condemn_run(run: RunFolder, epoch: int, *, complete: bool) -> bool:
    """Make sure that ``run`` is never complete (again); False if it was completed in the meantime.

    Its run.json then says "condemned" instead of "complete". Both use the same name, so only one of
    the two can be written. ``complete`` is true if the run was complete and no process is resuming
    it; run.json is then replaced.
    """
    uri, body = (
        uris.join(run.uri, "run.json"),
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
    """Record that the complete ``run`` was audited, whatever the verdict."""
    with contextlib.suppress(storage.AlreadyWritten):
        body = {
            "schema_version": SCHEMA_VERSION,
            "run": run.id,
            "audited_at": datetime.now(UTC).isoformat(),
        }
        storage.write_once(uris.join(run.uri, "audited.json"), sealed(body))


def is_audited(run: RunFolder) -> bool:
    """Whether ``mark_audited`` was called for ``run``. A damaged mark raises ``StoreError``."""
    uri = uris.join(run.uri, "audited.json")
    body = read_json(uri)
    return body is not None and body.get("run") == run.id


def created_at(run: RunFolder) -> str:
    """When the run began, in ISO 8601, UTC. Raises ``StoreError`` if its plan is gone."""
    plan = read_plan(run.store, run.id)
    if plan is None:
        raise StoreError(
            f"{run.uri} has lost its plan.parquet; give the 'afn run' command again to begin a new "
            "run"
        )
    return str(plan[1].get("created_at", ""))


def write_table(run: RunFolder, name: str, table: pa.Table) -> dict[str, Any]:
    """Write the run's table ``name`` and return its entry for run.json.

    The entry has the file's name, size and checksums. No file is replaced: if a rival or an
    unfinished reduce left a file of that name, it is used if it has the same bytes; else ours gets
    another name.
    """
    data = parquet.encode(table)
    file = f"{name}.parquet"
    try:
        storage.write_once(uris.join(run.uri, file), data)
    except storage.AlreadyWritten:
        if storage.read_bytes(uris.join(run.uri, file)) != data:
            file = f"{name}-{sha256(data).hexdigest()[:16]}.parquet"
            with contextlib.suppress(storage.AlreadyWritten):  # the name is the hash of the content
                storage.write_once(uris.join(run.uri, file), data)
    return entry_of(file, data)


def read_table(run: RunFolder, name: str) -> pa.Table:
    """The run's table ``name``, such as thresholds or plan; unverified until the run is complete.

    Raises ``StoreError`` if it is missing or does not match run.json.
    """
    if not run.info:
        uri = uris.join(run.uri, f"{name}.parquet")
        return parse_table(storage.read_bytes(uri), uri)
    entry = run.info["tables"].get(name)
    file = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(file, str) or "/" in file:
        raise StoreError(f"{run.uri}/run.json is damaged: its table {name} is {short(entry)}")
    uri = uris.join(run.uri, file)
    data = storage.read_bytes(uri)
    if entry_of(file, data) != entry:
        raise StoreError(
            f"{uri} is damaged: {short(entry_of(file, data))}, expected {short(entry)}; delete "
            f"{run.uri}/run.json and "
            "give the 'afn run' command again"
        )
    return parse_table(data, uri)


# --- files and shards of a complete run


def find_blocks(run: RunFolder, name: str) -> Blocks:
    """The blocks of the file ``name``, relative to the store.

    It is a file of the complete ``run`` or of one of its shards. Raises ``StoreError`` if no commit
    and no run.json lists it.
    """
    uri, (*folders, file) = uris.join(run.store, name), name.split("/")
    try:
        if folders[0] == "shards":
            return blocks_by_name(run.store, folders[1], folders[2], file)
        (entry,) = (entry for entry in run.info["tables"].values() if entry.get("name") == file)
        return Blocks.of(entry["bytes"], entry["crc32"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{uri} is not the file that was committed{ASK_VERIFY}") from error


def lost_shards(store: str, measure_id: str, shards: Iterable[Shard], run: RunFolder) -> list[str]:
    """Ids of the shards of the complete ``run`` whose folders are gone.

    One listing of all folders finds the suspects; a listing of each suspect's folder confirms it.
    """
    there = set(storage.list_names(uris.join(store, "shards", measure_id)))
    missing = {q["shard"] for q in run.info.get("quarantined", [])}
    return [
        s.id
        for s in shards
        if s.id not in there
        and s.id not in missing
        and not storage.list_names(shard_uri(store, measure_id, s.id))
    ]
