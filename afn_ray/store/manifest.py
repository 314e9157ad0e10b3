"""Runs in a store: find, read, complete and condemn them; write and read their tables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.corpus_values import Shard
from afn_ray.errors import Interrupted, StoreError
from afn_ray.run_info import RunInfo, TableEntry
from afn_ray.schema import SCHEMA_VERSION
from afn_ray.store import parquet, storage, uris
from afn_ray.store.blocks import Blocks
from afn_ray.store.checksums import (
    ASK_VERIFY,
    DAMAGES,
    checksummed,
    entry_of,
    parse_table,
    read_json,
    short,
)
from afn_ray.store.layout import PLANNING, RAY_IGNORE, STATUS, StoreFiles, is_run_name
from afn_ray.store.shard_files import blocks_by_name, shard_uri
from afn_ray.text import printable

MOST_STATUS_BYTES = 1 << 20
"""Largest status of a run that is read, in bytes."""
MOST_REASON_CHARS = 400
"""Longest reason of a failed run in a message, in characters."""
RUN_KEYS: dict[str, type] = {
    "id": str,
    "measure": dict,
    "model": dict,
    "layers": list,
    "config": dict,
    "corpus": dict,
    "counts": dict,
    "precision": dict,
    "tables": dict,
    "created_at": str,
    "finished_at": str,
}
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
    names = storage.list_names(uris.join(store, "runs"))
    return [name for name in names if is_run_name(name)]


def is_copy(run: RunFolder) -> bool:
    """True if ``run`` is a copy of a complete run under another name. A copy counts as foreign."""
    return bool(run.info) and run.info["id"] != run.id


def is_copied(store: str, name: str) -> bool:
    """True if the run ``name`` is a copy of another run; False if its run.json is damaged."""
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


# --- run.json


@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run in a store. ``info`` is its run.json, empty until the run is complete."""

    uri: str
    store: str
    id: str
    info: RunInfo
    condemned: bool = False
    """A gc has condemned the run: it can never be complete."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_time(value: Any) -> bool:
    return value == "" or bool(datetime.fromisoformat(value))


def _is_config(value: Any) -> bool:
    if not isinstance(value.get("model", ""), str):
        return False
    if not all(isinstance(value.get(key), str | None) for key in ("series", "sample", "where")):
        return False
    if not isinstance(value.get("limit"), int | None):
        return False
    return all(isinstance(pattern, str) for pattern in value.get("corpus", []))


def _are_quarantined(value: Any) -> bool:
    for shard in value:
        if not all(isinstance(shard[key], str) for key in ("shard", "uri", "reason")):
            return False
    return True


def _is_provenance(value: Any) -> bool:
    def are_texts(entries: dict[str, Any]) -> bool:
        return all(isinstance(text, str) for text in entries.values())

    return all(_is_count(kind["shards"]) and are_texts(kind["made_by"]) for kind in value)


def _are_integers(value: Any) -> bool:
    return all(type(element) is int for element in value)


def _are_counts(value: Any) -> bool:
    return all(map(_is_count, value.values()))


def _is_model(value: Any) -> bool:
    return isinstance(value.get("name", ""), str)


def _is_measure(value: Any) -> bool:
    return isinstance(value.get("id", ""), str) and isinstance(value.get("model", {}), dict)


def _is_duration(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12


_INFO_IS: dict[str, Callable[[Any], bool]] = {
    "layers": _are_integers,
    "counts": _are_counts,
    "corpus": _are_counts,
    "config": _is_config,
    "model": _is_model,
    "measure": _is_measure,
    "created_at": _is_time,
    "finished_at": _is_time,
    "seconds": _is_duration,
    "quarantined": _are_quarantined,
    "provenance": _is_provenance,
    "unread_from": lambda value: isinstance(value, str),
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
    return RunFolder(uri, store, name, cast(RunInfo, info))


def split_uri(uri: str) -> tuple[str, str]:
    """The store and the name of the run at ``uri``; for any other URI, itself and no name."""
    store, _, name = uri.rpartition("/runs/")
    if name and "/" not in name:
        return store, name
    return uri, ""


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
                f"run {uri} was removed by 'afn gc'; 'afn status {store}' lists the runs that the "
                "store has"
            )
        if not run.info:
            raise StoreError(f"run {uri} is not complete: {why_incomplete(uri)}")
        return run
    names = run_names(uri)
    for name in reversed(names):
        run = open_folder(uri, name)
        if run.info and not is_copy(run):
            return run
    if names:
        why = why_incomplete(uris.join(uri, "runs", names[-1]))
        raise StoreError(f"{uri} holds no complete run; of the one that was begun last: {why}")
    if storage.exists(uris.join(uri, PLANNING)):
        raise StoreError(
            f"{uri} has no run yet: 'afn run' ended, or still works, before it planned one; 'afn "
            f"status {uri}' says more"
        )
    raise StoreError(
        f"{uri} is neither a store nor a run; give the store of an 'afn run --store' command"
    )


def why_incomplete(uri: str) -> str:
    """Reason why the run at ``uri`` failed by its status, else how to finish it."""
    body: Any = None
    with contextlib.suppress(StoreError, ValueError, RecursionError):  # best effort
        body = json.loads(storage.read_if_there(uris.join(uri, STATUS), MOST_STATUS_BYTES) or b"{}")
    if isinstance(body, dict) and body.get("phase") == "failed":
        first, _, more = str(body.get("reason", "")).partition("\n")
        reason = first.rstrip(":") if more else first
        return f"it failed: {printable(reason)[:MOST_REASON_CHARS]}; 'afn status {uri}' says more"
    return "give its 'afn run' command again to finish it"


def is_named_by(run: RunFolder, uri: str) -> bool:
    """True if ``uri``, at which ``run`` was found, names the run itself and not its store."""
    return run.uri == uris.absolute(uri).rstrip("/")


def finish_run(run: RunFolder, info: RunInfo) -> RunFolder:
    """Write run.json, which makes the run complete.

    ``info["tables"]`` holds the entries returned by ``write_table``. If another process has
    completed the run, its run.json is returned. Raises ``Interrupted`` if a gc condemned the run.
    """
    plan = storage.read_bytes(uris.join(run.uri, "plan.parquet"))
    tables = {"plan": entry_of("plan.parquet", plan), **info["tables"]}
    body: RunInfo = {"schema_version": SCHEMA_VERSION, "id": run.id, **info, "tables": tables}
    try:
        storage.write_once(uris.join(run.uri, "run.json"), checksummed(body))
    except storage.AlreadyWritten:
        # Another process finished the same run with the same tables, or a gc condemned it.
        theirs = open_folder(run.store, run.id)
        if theirs.condemned:
            raise Interrupted(
                f"'afn gc' has given up run {run.uri}, because its process made no progress; the "
                "same command begins a new one"
            ) from None
        return theirs
    return RunFolder(run.uri, run.store, run.id, body)


def condemn_run(run: RunFolder, epoch: int, *, complete: bool) -> bool:
    """Make sure that ``run`` is never complete (again); False if it was completed in the meantime.

    Its run.json then says "condemned" instead of "complete". Both use the same name, so only one of
    the two can be written. ``complete`` is true if the run was complete and no process is resuming
    it; run.json is then replaced.
    """
    uri = uris.join(run.uri, "run.json")
    body = {"schema_version": SCHEMA_VERSION, "id": run.id, "condemned": epoch}
    if complete:
        storage.write_over(uri, checksummed(body), retry_for_s=None)
        return True
    try:
        storage.write_once(uri, checksummed(body))
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
        storage.write_once(uris.join(run.uri, "audited.json"), checksummed(body))


def is_audited(run: RunFolder) -> bool:
    """True if ``mark_audited`` was called for ``run``. A damaged mark raises ``StoreError``."""
    uri = uris.join(run.uri, "audited.json")
    body = read_json(uri)
    return body is not None and body.get("run") == run.id


def write_table(run: RunFolder, name: str, table: pa.Table) -> TableEntry:
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


def read_table(
    run: RunFolder,
    name: str,
    columns: Sequence[str] | None = None,
    filters: pc.Expression | None = None,
) -> pa.Table:
    """The run's table ``name``, such as thresholds or plan; unverified until the run is complete.

    A large table takes less memory if only some ``columns``, or the rows that ``filters`` keep, are
    read; of the columns, those that an older run lacks are left out. Raises ``StoreError`` if the
    table is missing or does not match run.json.
    """
    if not run.info:
        uri = uris.join(run.uri, f"{name}.parquet")
        return parse_table(storage.read_bytes(uri), uri, columns, filters)
    entry = run.info["tables"].get(name)
    file = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(file, str) or "/" in file:
        raise StoreError(f"{run.uri}/run.json is damaged: its table {name} is {short(entry)}")
    uri = uris.join(run.uri, file)
    data = storage.read_bytes(uri)
    if entry_of(file, data) != entry:
        raise StoreError(
            f"{uri} is damaged: {short(entry_of(file, data))}, expected {short(entry)}; delete "
            f"{run.uri}/run.json and give the 'afn run' command again"
        )
    return parse_table(data, uri, columns, filters)


# --- files and shards of a complete run


def find_blocks(run: RunFolder, name: str) -> Blocks:
    """The blocks of the file ``name``, relative to the store.

    It is a file of the complete ``run`` or of one of its shards. Raises ``StoreError`` if no commit
    and no run.json lists it.
    """
    uri = uris.join(run.store, name)
    *folders, file = name.split("/")
    try:
        if folders[0] == "shards":
            return blocks_by_name(run.store, folders[1], folders[2], file)
        tables = run.info["tables"].values()
        (entry,) = [entry for entry in tables if entry.get("name") == file]
        return Blocks.of(entry["bytes"], entry["crc32"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(f"{uri} is not the file that was committed{ASK_VERIFY}") from error


def lost_shards(store: str, measure_id: str, shards: Iterable[Shard], run: RunFolder) -> list[str]:
    """Ids of the shards of the complete ``run`` whose folders are gone.

    One listing of all folders finds the suspects; a listing of each suspect's folder confirms it.
    """
    listed = set(storage.list_names(uris.join(store, "shards", measure_id)))
    quarantined = {q["shard"] for q in run.info.get("quarantined", [])}
    lost = []
    for shard in shards:
        if shard.id in listed or shard.id in quarantined:
            continue
        if not storage.list_names(shard_uri(store, measure_id, shard.id)):
            lost.append(shard.id)
    return lost
