"""The committed shards that a run reduces, and their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from afn_ray.kept import Kept
from afn_ray.store import shard_files
from afn_ray.store.commits import Commit


class CommittedFile(NamedTuple):
    """Location, size and checksum of one table file of a shard."""

    store: str
    measure_id: str
    shard: str
    name: str
    num_bytes: int
    sha256: str

    def read(self) -> bytes:
        """The content. Raises ``StoreError`` if the checksum differs."""
        entry = {"name": self.name, "sha256": self.sha256}
        return shard_files.read_file(self.store, self.measure_id, self.shard, entry)


@dataclass(frozen=True, slots=True)
class CommittedShards:
    """The shards of a run that were not quarantined, in plan order."""

    store: str
    measure_id: str
    commits: Sequence[Commit]
    num_bytes: Sequence[int]  # bytes of the corpus that each shard reads
    kept: Kept = ()  # columns of the corpus that every shard keeps

    @property
    def n_docs(self) -> int:
        """Number of measured documents."""
        return sum(
            c.counts["documents"] - c.counts["empty"] - c.counts["quarantined"]
            for c in self.commits
        )

    @property
    def n_tokens(self) -> int:
        """Number of tokens, special ones included."""
        return sum(c.counts["tokens"] for c in self.commits)

    def file(self, commit: Commit, table: str) -> CommittedFile:
        """The file of ``table`` that ``commit`` names."""
        entry = commit.files[table]
        return CommittedFile(
            self.store,
            self.measure_id,
            commit.shard,
            entry["name"],
            entry["bytes"],
            entry["sha256"],
        )

    def files(self, table: str) -> Iterator[CommittedFile]:
        """The files of ``table``, made one by one, because a run may have a million shards."""
        return (self.file(commit, table) for commit in self.commits)
