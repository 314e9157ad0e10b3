"""The committed shards that a run reduces, and their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from afn_ray.kept import Kept
from afn_ray.reduce.stats import Ints
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
        return shard_files.read_file(
            self.store, self.measure_id, self.shard, self.name, self.sha256
        )


class LeftOut(NamedTuple):
    """Documents with tokens that a run counts nowhere, because they are copies."""

    docs: Ints = np.empty(0, np.int64)  # run-wide, ascending
    n_tokens: int = 0  # special ones included

    def of_shard(self, doc_offset: int, n_documents: int) -> Ints:
        """Those of a shard, as numbers in the shard."""
        begin, end = np.searchsorted(self.docs, [doc_offset, doc_offset + n_documents])
        return self.docs[begin:end] - doc_offset


NOTHING = LeftOut()
"""No document."""


@dataclass(frozen=True, slots=True)
class CommittedShards:
    """The shards of a run that were not quarantined, in plan order."""

    store: str
    measure_id: str
    commits: Sequence[Commit]
    num_bytes: Sequence[int]  # bytes of the corpus that each shard reads
    kept: Kept = ()  # columns of the corpus that every shard keeps
    left_out: LeftOut = NOTHING  # documents that count nowhere
    copies: Ints | None = None  # documents, run-wide and ascending, with the text of an earlier one

    @property
    def n_docs(self) -> int:
        """Number of measured documents that count."""
        measured = sum(
            c.counts["documents"] - c.counts["empty"] - c.counts["quarantined"]
            for c in self.commits
        )
        return measured - len(self.left_out.docs)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that count, special ones included."""
        return sum(c.counts["tokens"] for c in self.commits) - self.left_out.n_tokens

    def places(self) -> Iterator[tuple[Commit, int, Ints]]:
        """Each commit, run-wide number of its first document, and numbers
        in it of those left out.
        """
        doc_offset = 0
        for commit in self.commits:
            n_documents = commit.counts["documents"]
            yield commit, doc_offset, self.left_out.of_shard(doc_offset, n_documents)
            doc_offset += n_documents

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
