"""Epochs: what a gc publishes before it deletes (valid generations of shards, condemned runs).

A gc and a run exclude each other without a lock. Each first writes its intent, then reads what the
other wrote:

* A run writes its claim (a new run writes its plan, a resumed run a lease), then reads the newest
  epoch.
* A gc writes the next epoch, then lists the runs and their leases. It spares everything that a
  claim covers.

For each pair, at least one sees the other: either the run does without the condemned shards, or the
gc spares them.

An epoch also ensures that no name is used twice. A DELETE that is repeated, or arrives an hour
late, can only remove what was condemned. Data files are named by their attempt. A commit is named
by its generation: ``commit.json`` is generation 0, later ones are ``commit-<generation>.json``.
Epoch n lists the generation of every shard whose result may be used as it is; every other shard has
generation n. Generations only grow, so a condemned commit is never found again.

Layout: ``gc/<epoch>.parquet``, written once. Only the newest epoch counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.corpus_values import Shard
from afn_ray.errors import Interrupted, StoreError
from afn_ray.schema import READABLE_VERSIONS, SCHEMA_VERSION
from afn_ray.store import parquet, storage, uris
from afn_ray.store.checksums import READABLE
from afn_ray.store.layout import EPOCH_FILE, EPOCHS, ShardKey

TRIES = 20
"""Most tries to read the newest epoch while other processes publish newer ones."""
SCHEMA = pa.schema(
    [
        pa.field("measure", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Epoch:
    """Record of one gc. Number 0 stands for the time before the first gc."""

    number: int = 0
    rows: pa.Table = field(default_factory=SCHEMA.empty_table)
    """Shards whose generation is lower than ``number``, in the columns of ``SCHEMA``."""
    condemned: frozenset[str] = frozenset()
    """Names of the runs that must not be resumed."""

    def generations(self) -> dict[ShardKey, int]:
        """Generation of every shard in ``rows``; all other shards have generation ``number``."""
        measures = self.rows["measure"].to_pylist()
        shards = self.rows["shard"].to_pylist()
        generations = self.rows["generation"].to_pylist()
        places = zip(measures, shards, strict=True)
        return dict(zip(places, generations, strict=True))

    def marked(self, measure_id: str, shards: Sequence[Shard]) -> tuple[Shard, ...]:
        """``shards``, each with its valid generation."""
        if not self.number:
            return tuple(shards)
        known = self.rows.filter(pc.field("measure") == measure_id)
        ids = pa.array([shard.id for shard in shards], pa.string())
        rows = pc.index_in(ids, value_set=known["shard"].combine_chunks())
        generations = known["generation"].combine_chunks().take(rows)
        found = pc.fill_null(generations, self.number).to_pylist()
        marked: list[Shard] = []
        for shard, generation in zip(shards, found, strict=True):
            is_valid = shard.generation == generation
            marked.append(shard if is_valid else replace(shard, generation=generation))
        return tuple(marked)

    def after(self, generations: Mapping[ShardKey, int], condemned: frozenset[str]) -> Epoch:
        """The next epoch: only the shards in ``generations`` keep their generation."""
        places = sorted(generations)
        columns = [
            [measure for measure, _ in places],
            [shard for _, shard in places],
            [generations[place] for place in places],
        ]
        return Epoch(self.number + 1, pa.table(columns, SCHEMA), condemned)


def newest(store: str) -> Epoch:
    """The newest epoch of ``store``. Raises ``StoreError`` if it is damaged.

    Raises ``Interrupted`` if other processes publish faster than it can be read.
    """
    for _ in range(TRIES):
        names = _names(store)
        if not names:
            return Epoch()
        uri = uris.join(store, EPOCHS, names[-1])
        data = storage.read_if_there(uri)
        if data is not None:  # else another process has published a newer one and deleted this one
            return _parse(data, uri)
    raise Interrupted(
        f"{store}: other 'afn gc' calls replace the newest epoch faster than it can be read; try "
        "again later"
    )


def publish(store: str, epoch: Epoch) -> bool:
    """Make ``epoch`` the newest of ``store``; False if another process published in the meantime.

    After False, ``epoch`` was computed from an outdated one. Older epochs are deleted, because
    nothing reads them.
    """
    name = _name(epoch.number)
    try:
        storage.write_once(uris.join(store, EPOCHS, name), _bytes(epoch))
    except storage.AlreadyWritten:  # maybe our own, its answer lost; the next epoch repeats it
        return False
    names = _names(store)
    if names[-1:] != [name]:  # a newer epoch exists; its writer had deleted this name
        return False
    storage.delete([uris.join(store, EPOCHS, old) for old in names[:-1]])
    return True


def _names(store: str) -> list[str]:
    names = storage.list_names(uris.join(store, EPOCHS))
    return [name for name in names if EPOCH_FILE.fullmatch(name)]


def _name(number: int) -> str:
    return f"{number:08d}.parquet"


def _digest(table: pa.Table, header: Mapping[str, Any]) -> str:
    digest = sha256(json.dumps(header, sort_keys=True).encode())
    for batch in table.to_batches(max_chunksize=1 << 16):
        columns = [column.to_pylist() for column in batch.columns]
        lines = []
        for measure, shard, generation in zip(*columns, strict=True):
            lines.append(f"{measure}/{shard}/{generation}\n")
        digest.update("".join(lines).encode())
    return digest.hexdigest()


def _bytes(epoch: Epoch) -> bytes:
    header = {
        "schema_version": SCHEMA_VERSION,
        "epoch": epoch.number,
        "condemned": sorted(epoch.condemned),
    }
    metadata = json.dumps({**header, "sha256": _digest(epoch.rows, header)})
    return parquet.encode(epoch.rows.replace_schema_metadata({"afn": metadata}))


def _parse(data: bytes, uri: str) -> Epoch:
    advice = (
        "restore it from a backup; or, when no gc has run for a day, delete its folder: runs stay "
        "as they are, and what was deleted is measured again"
    )
    try:
        table = parquet.read(data)
        header = json.loads(table.schema.metadata[b"afn"])
        digest = header.pop("sha256")
        rows = table.select(SCHEMA.names).cast(SCHEMA)
        number = int(header["epoch"])
        condemned = frozenset(map(str, header["condemned"]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{uri} is damaged: {error!r}; {advice}") from error
    if digest != _digest(rows, header) or not uri.endswith(f"/{_name(number)}"):
        raise StoreError(
            f"{uri} is damaged: its rows and name do not have the checksum that it carries; "
            f"{advice}"
        )
    if header["schema_version"] not in READABLE_VERSIONS:
        got = header["schema_version"]
        raise StoreError(
            f"{uri} has schema version {got}, expected {READABLE}; use the afn-ray that wrote it"
        )
    return Epoch(number, rows, condemned)
