"""Check one committed shard: its commits, its files and their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from afn_ray.analysis import rows
from afn_ray.analysis.findings import Finding, read_listed, without_uri
from afn_ray.corpus_values import Shard
from afn_ray.errors import StoreError
from afn_ray.measure import Measure
from afn_ray.store import (
    blocks,
    checksums,
    layout,
    records,
    shard_files,
    storage,
    uris,
)
from afn_ray.store.blocks import Blocks
from afn_ray.store.commits import Commit
from afn_ray.store.layout import ShardKey
from afn_ray.store.shard_tables import ShardTable


@dataclass(slots=True)
class CheckedShard:
    """Result of checking one committed shard."""

    commits: dict[int, Commit] = field(default_factory=dict)  # by generation
    findings: list[Finding] = field(default_factory=list)
    unnamed: list[storage.StoredFile] = field(default_factory=list)  # named by none of its commits
    num_files: int = 0
    num_bytes: int = 0
    num_rows: int = 0


@dataclass(frozen=True, slots=True)
class _Committed:
    """A commit of a shard, with what it says of the shard and its files."""

    uri: str  # of the commit
    commit: Commit
    read: Shard  # with the hashes of the bytes read
    blocks: Mapping[str, Blocks]  # by file name


def check_shard(
    store: str,
    place: ShardKey,
    files: Sequence[storage.StoredFile],
    measure: Measure | None,
    generation: int,
    redo: str,
) -> CheckedShard:
    """Check the shard at ``place``, whose folder listing gave ``files``.

    ``measure`` is None where no run has it. ``generation`` is the valid generation; its commit may
    be newer than the listing. ``redo`` is the advice on a damaged shard.
    """
    checked = CheckedShard()
    folder = shard_files.shard_uri(store, *place)
    try:
        names = {file.uri.rpartition("/")[2]: file for file in files}
        generations = {layout.generation_of(name) for name in names}
        listed = {number for number in generations if number is not None}
        found: dict[int, _Committed] = {}
        for number in sorted({*listed, max(0, generation)}):
            uri = uris.join(folder, layout.commit_name(number))
            try:
                committed = _read_commit(store, place, number, uri)
            except StoreError as error:
                # Without the names in the commit, no file can be called an orphan.
                message = f"{without_uri(error, uri)}; {redo}"
                checked.findings.append(Finding("damaged", uri, message))
                return checked
            if committed is not None:
                found[number] = committed
        named = {layout.commit_name(number) for number in listed}
        for number, committed in found.items():
            checked.commits[number] = committed.commit
            named |= {str(file["name"]) for file in committed.commit.files.values()}
            _check_commit(checked, committed, (place[0], measure), redo)
        checked.unnamed = [file for name, file in names.items() if name not in named]
    except checksums.DAMAGES as error:
        checked.findings.append(
            Finding("damaged", folder, f"it is not what afn-ray writes: {error!r}; {redo}")
        )
    return checked


def _read_commit(store: str, place: ShardKey, number: int, uri: str) -> _Committed | None:
    """The commit of generation ``number``; None if there is none."""
    committed = shard_files.read_committed(store, *place, number)
    if committed is None:
        return None
    return _Committed(uri, *committed, shard_files.committed_blocks(store, *place, number))


def _check_commit(
    checked: CheckedShard,
    committed: _Committed,
    of: tuple[str, Measure | None],
    redo: str,
) -> None:
    """Check one commit and its files; add findings to ``checked``.

    ``of`` is the measure's id and the measure, None where no run has it.
    """
    uri = committed.uri
    commit = committed.commit
    read = committed.read
    folder = uri.rpartition("/")[0]
    findings: list[Finding] = []
    identity = Shard.of(read.slices, read.options).id
    if identity != commit.shard:
        message = (
            f"it is the commit of shard {commit.shard}, but its slices are those of shard "
            f"{identity}; {redo}"
        )
        findings.append(Finding("misplaced", uri, message))
    tables: dict[str, ShardTable] = {}
    for table in commit.files:
        data, found = _check_file(committed, table, of[0], redo)
        checked.num_files += 1
        checked.num_bytes += len(data)
        if isinstance(found, Finding):
            findings.append(found)
        else:
            tables[table] = found
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
        message = f"its files cannot be decoded: {error}; {redo}"
        checked.findings.append(Finding("damaged", folder, message))


def _check_file(
    committed: _Committed, table: str, measure_id: str, redo: str
) -> tuple[bytes, ShardTable | Finding]:
    """The bytes of the file of ``table``, and the file opened or what is wrong with it."""
    commit = committed.commit
    entry = committed.commit.files[table]
    name = str(entry["name"])
    uri = uris.join(committed.uri.rpartition("/")[0], name)
    data, finding = read_listed(uri, entry, redo)
    if finding is not None:
        return data, finding
    if committed.blocks.get(name) != Blocks(len(data), blocks.checksums(data)):
        message = f"its blocks do not have the CRC-32 that {committed.uri} lists; {redo}"
        return data, Finding("damaged", uri, message)
    try:
        file = ShardTable(data)
    except (pa.ArrowException, OSError) as error:
        return data, Finding("damaged", uri, f"it is no Parquet file: {error}; {redo}")
    expected = {
        "measure": measure_id,
        "shard": commit.shard,
        "attempt": commit.attempt,
        "table": table,
    }
    if (origin := records.read_origin(file)) != expected:
        message = f"it was written as {origin}, expected {expected}; {redo}"
        return data, Finding("misplaced", uri, message)
    return data, file
