"""Shards in a store: upload their tables, commit them once, find and read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa

from afn_ray.corpus_values import FileSlice, ReadOptions, Shard
from afn_ray.errors import Interrupted, StoreError, Unavailable
from afn_ray.store import blocks, storage, uris
from afn_ray.store.blocks import Blocks
from afn_ray.store.checksums import (
    AHEAD,
    ASK_VERIFY,
    IO_THREADS,
    checksummed,
    parse_table,
    read_json,
    short,
)
from afn_ray.store.commits import Commit, CommitEntry, Commits
from afn_ray.store.layout import NEURON_TABLES, TABLES, VECTORS, commit_name, generation_of
from afn_ray.store.readers import RangeFile
from afn_ray.store.shard_tables import ShardTable


def shard_uri(store: str, measure_id: str, shard: str) -> str:
    """The folder of a shard's files in ``store``."""
    return uris.join(store, "shards", measure_id, shard)


def _are_counts(value: Any) -> bool:
    """True if ``value`` is a dict of counts that can be added up."""
    if not isinstance(value, dict):
        return False
    return all(type(count) is int and 0 <= count < 1 << 62 for count in value.values())


def _is_duration(value: Any) -> bool:
    """True if ``value`` is a number of seconds that can be added up."""
    return type(value) in (int, float) and 0 <= value < 1e12


def _are_texts(value: Any) -> bool:
    """True if ``value`` is a dict of strings."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


_IS: dict[str, Callable[[Any], bool]] = {
    "counts": _are_counts,
    "seconds": _is_duration,
    "made_by": _are_texts,
}
"""Checks of the values in a commit that are added up or kept; the file may have been edited."""


def read_commit(store: str, measure_id: str, shard: str, generation: int = 0) -> Commit | None:
    """The commit of ``shard``; None if there is none. Raises ``StoreError`` if it is damaged."""
    found = read_committed(store, measure_id, shard, generation)
    return None if found is None else found[0]


def read_committed(
    store: str, measure_id: str, shard: str, generation: int = 0
) -> tuple[Commit, Shard] | None:
    """Like ``read_commit``, with the shard that was read: its slices and read options."""
    uri = uris.join(shard_uri(store, measure_id, shard), commit_name(generation))
    value = read_json(uri)
    if value is None:
        return None
    try:
        fields = {name: value[name] for name in Commit.__dataclass_fields__}
        commit = Commit(**fields)
        slices = tuple(FileSlice(**piece) for piece in value["slices"])
        options = ReadOptions(**value["options"])
        read = Shard(commit.shard, slices, options, generation)
    except (KeyError, TypeError) as error:
        raise StoreError(f"{uri} is damaged: {error!r}") from error
    _check_commit(commit, uri)
    if (value.get("measure"), commit.shard) != (measure_id, shard):
        raise StoreError(
            f"{uri} is damaged: it is the commit of shard {commit.shard} of measure "
            f"{value.get('measure')}"
        )
    return commit, read


def _check_commit(commit: Commit, uri: str) -> None:
    """Raise ``StoreError`` if the ``commit`` in ``uri`` has values that no run writes."""
    files = commit.files if isinstance(commit.files, dict) else {}
    names = [_file_name(entry) for entry in files.values()]
    are_known = set(files) - {VECTORS} in (set(TABLES), set(TABLES + NEURON_TABLES))
    if not are_known or not all(_stays_in_folder(name) for name in names):
        raise StoreError(f"{uri} is damaged: it names the files {names}")
    for what, is_valid in _IS.items():
        value = getattr(commit, what)
        if not is_valid(value):
            raise StoreError(f"{uri} is damaged: {what} is {short(value)}")


def _file_name(entry: Any) -> str:
    """The name of a file in a commit; empty if the ``entry`` is damaged."""
    return str(entry.get("name")) if isinstance(entry, dict) else ""


def _stays_in_folder(name: str) -> bool:
    """True if ``name`` is a file in the shard's own folder."""
    return "/" not in name and name not in ("", ".", "..")


def committed_blocks(
    store: str, measure_id: str, shard: str, generation: int = 0
) -> dict[str, Blocks]:
    """The blocks of each file of a committed shard, by file name.

    Raises ``StoreError`` if the commit is gone or damaged.
    """
    uri = uris.join(shard_uri(store, measure_id, shard), commit_name(generation))
    value = read_json(uri)
    if value is None:
        raise StoreError(f"{uri} is gone from the store{ASK_VERIFY}")
    try:
        files, crc32 = value["files"], value["crc32"]
        found: dict[str, Blocks] = {}
        for table in files:
            entry = files[table]
            found[str(entry["name"])] = Blocks.of(entry["bytes"], crc32[table])
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{uri} is damaged: {error!r}") from error


def blocks_by_name(store: str, measure_id: str, shard: str, file: str) -> Blocks:
    """The blocks of ``file`` from the commit that names it, of any generation.

    Raises ``StoreError`` if a commit is gone or damaged, and ``KeyError`` if none names ``file``.
    """
    refused: Exception = KeyError(file)
    for generation in _generations(store, measure_id, shard):
        try:
            found = committed_blocks(store, measure_id, shard, generation)
        except StoreError as error:
            refused = error
        else:
            if file in found:
                return found[file]
    raise refused


def _generations(store: str, measure_id: str, shard: str) -> Iterator[int]:
    """Yield the generations of which ``shard`` may have a commit."""
    yield 0  # the only generation of most shards, so that most need no listing
    names = storage.list_names(shard_uri(store, measure_id, shard))
    later = [generation_of(name) for name in names]
    yield from sorted(generation for generation in later if generation)


def read_file(store: str, measure_id: str, shard: str, name: str, expected_sha256: str) -> bytes:
    """The content of the file ``name`` of a committed shard.

    Raises ``StoreError`` if its checksum is not ``expected_sha256``, the one in the commit.
    """
    folder = shard_uri(store, measure_id, shard)
    data = storage.read_bytes(uris.join(folder, name))
    if sha256(data).hexdigest() != expected_sha256:
        raise StoreError(
            f"{folder}/{name} is damaged: its checksum is not the one in commit.json; "
            f"delete {folder} and give 'afn run' again"
        )
    return data


class StoredShard:
    """A committed shard whose tables are read in part; what is read is checked block by block."""

    def __init__(
        self, store: str, measure_id: str, commit: Commit, blocks_of: Mapping[str, Blocks]
    ) -> None:
        self.measure_id, self.commit = measure_id, commit
        self._folder = shard_uri(store, measure_id, commit.shard)
        self._blocks = blocks_of

    @classmethod
    def find(cls, store: str, measure_id: str, shard: str, generation: int) -> StoredShard:
        """The result of ``shard`` under the measure, of its ``generation``.

        Raises ``StoreError`` if there is none that can be read.
        """
        commit = read_commit(store, measure_id, shard, generation)
        if commit is None:
            raise StoreError(f"{shard_uri(store, measure_id, shard)} has no commit any more")
        found = committed_blocks(store, measure_id, shard, generation)
        return cls(store, measure_id, commit, found)

    def open(self, table: str) -> ShardTable:
        """The file of ``table``; to read a damaged block of it raises ``StoreError``."""
        name = str(self.commit.files[table]["name"])
        uri = uris.join(self._folder, name)
        of_file = self._blocks[name]

        def read_raw(start: int, end: int) -> bytes:
            return storage.read_bytes(uri, start, end)

        def read(start: int, end: int) -> bytes:
            data = of_file.read(start, end, read_raw)
            if data is None:
                raise StoreError(
                    f"{uri} is damaged: a checksum is not the one in commit.json; delete "
                    f"{self._folder} and give 'afn run' again"
                )
            return data

        return ShardTable(RangeFile(read, of_file.num_bytes, SimpleNamespace()))


def read_shard_table(store: str, measure_id: str, commit: Commit, table: str) -> pa.Table:
    """One table of a committed shard. Raises ``StoreError`` if it does not match the commit."""
    entry = commit.files[table]
    data = read_file(store, measure_id, commit.shard, entry["name"], entry["sha256"])
    return parse_table(data, entry["name"])


def find_commits(store: str, measure_id: str, shards: Iterable[Shard]) -> Commits:
    """The commits of those ``shards``, in their generations, that the store has, by shard id."""
    there = set(storage.list_names(uris.join(store, "shards", measure_id)))
    held = [shard for shard in shards if shard.id in there]
    commits = Commits()

    def read(shard: Shard) -> Commit | None:
        return read_commit(store, measure_id, shard.id, shard.generation)

    with ThreadPoolExecutor(IO_THREADS) as pool:
        for begin in range(0, len(held), AHEAD):  # a pool queues all its input at once
            for found in pool.map(read, held[begin : begin + AHEAD]):
                if found is not None:
                    commits[found.shard] = found
    return commits


@dataclass(frozen=True, slots=True)
class Attempt:
    """A finished attempt at a shard: its files on scratch, which are not uploaded yet."""

    id: str
    tables: Mapping[str, tuple[Path, int]]
    """The local file and the number of rows of each table, by the table's name."""
    counts: dict[str, int]
    """Number of documents, tokens and so on, as in ``commits.COUNTS``."""
    seconds: float
    """Time of the measurement."""
    made_by: dict[str, str]
    """Device and versions."""
    composed_of: tuple[Mapping[str, str], ...] = ()
    """Measure and attempt of each stored result whose columns were copied; empty: none were."""


def publish(store: str, measure_id: str, shard: Shard, attempt: Attempt) -> Commit:
    """Upload the files of ``attempt`` and commit them.

    The first commit of a shard wins. Returns the winner's commit, ours or not. Raises
    ``StoreError`` if a rival's counts differ from ours: the same shard under the same measure must
    have the same rows. After ``Unavailable`` it is unknown whether the shard is committed; read the
    store again to find out.
    """
    folder = shard_uri(store, measure_id, shard.id)
    files: dict[str, CommitEntry] = {}
    crc32: dict[str, str] = {}
    for table, (path, rows) in attempt.tables.items():
        digest, crc32[table] = blocks.file_checksums(path)
        name = f"{attempt.id}-{table}.parquet"
        files[table] = {"name": name, "rows": rows, "bytes": path.stat().st_size, "sha256": digest}
    uploaded = [uris.join(folder, str(entry["name"])) for entry in files.values()]
    paths = [path for path, _ in attempt.tables.values()]
    try:
        for path, uri in zip(paths, uploaded, strict=True):
            storage.upload(path, uri)
    except BaseException:  # no commit names the files yet, and a full disk needs the space
        storage.delete(uploaded)
        raise
    commit = Commit(shard.id, attempt.id, files, attempt.counts, attempt.seconds, attempt.made_by)
    more: dict[str, object] = {"crc32": crc32}
    if attempt.composed_of:
        more["composed_of"] = list(attempt.composed_of)
    winner = _commit_once(store, measure_id, shard, commit, more)
    if winner.attempt != attempt.id:
        storage.delete(uploaded)
        # The forward tokens include padding, which depends on the batches.
        if {**winner.counts, "forward_tokens": 0} != {**attempt.counts, "forward_tokens": 0}:
            raise StoreError(
                f"two attempts at shard {shard.id} disagree: {winner.counts} against "
                f"{attempt.counts}; is one worker's model or library different?"
            )
    return winner


def _commit_once(
    store: str, measure_id: str, shard: Shard, commit: Commit, more: Mapping[str, object]
) -> Commit:
    """Write ``commit``, unless the shard has one; return the commit that the shard has then.

    ``more`` stands in commit.json beside it: ``crc32``, the checksums of the blocks of each table's
    file, and where its columns were copied from. The files stay after an error,
    because the commit may exist nevertheless; only a full disk without a commit loses them.
    """
    folder = shard_uri(store, measure_id, shard.id)
    uri = uris.join(folder, commit_name(shard.generation))
    body = {
        "measure": measure_id,
        **asdict(commit),
        **more,
        "slices": [asdict(s) for s in shard.slices],
        "options": shard.options.as_dict(),
        "committed_at": datetime.now(UTC).isoformat(),
    }
    try:
        storage.write_once(uri, checksummed(body))
        return commit
    except storage.AlreadyWritten:  # by a rival, or by our own request whose answer was lost
        winner = read_commit(store, measure_id, shard.id, shard.generation)
    except Unavailable:  # the commit may exist now or later: the files that it names must stay
        raise
    except (StoreError, Interrupted) as error:  # the commit may exist nevertheless
        winner = read_commit(store, measure_id, shard.id, shard.generation)
        if winner is None:
            if isinstance(error, Interrupted):  # a full disk needs the space
                storage.delete([uris.join(folder, name) for name in commit.file_names])
            raise
    if winner is None:
        raise StoreError(
            f"{uri} exists but cannot be read back; is something deleting from the store?"
        )
    return winner
