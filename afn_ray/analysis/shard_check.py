"""Check one committed shard: its commits, its files and their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray.analysis import rows
from afn_ray.analysis.findings import Finding, read_listed, without_uri
from afn_ray.errors import StoreError
from afn_ray.schema import Shard
from afn_ray.store import (
    blocks,
    checksums,
    layout,
    parquet,
    records,
    shard_files,
    storage,
    uris,
)
from afn_ray.store.blocks import Blocks
from afn_ray.store.commits import Commit
from afn_ray.store.layout import Place


@dataclass(slots=True)
class CheckedShard:
    """Result of checking one committed shard."""

    commits: dict[int, Commit] = field(default_factory=dict)  # by generation
    findings: list[Finding] = field(default_factory=list)
    unnamed: list[storage.StoredFile] = field(default_factory=list)  # named by none of its commits
    num_files: int = 0
    num_bytes: int = 0
    num_rows: int = 0


def check_shard(
    store: str,
    place: Place,
    files: Sequence[storage.StoredFile],
    measure: Mapping[str, Any] | None,
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
                checked.findings.append(
                    Finding("damaged", uri, f"{without_uri(error, uri)}; {redo}")
                )
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
    checked: CheckedShard,
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
        data, finding = read_listed(file_uri, entry, redo)
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
