"""A shard's commit, and a run's commits packed in the driver's memory: about 350 bytes each."""

from __future__ import annotations

import contextlib
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from afn_ray.run_info import Maker
from afn_ray.schema import SCHEMA_VERSION

COUNTS = (
    "documents",
    "empty",
    "quarantined",
    "tokens",
    "special",
    "windows",
    "forward_tokens",
    "chars",
    "replaced",
    "lost_bytes",
    "lost_documents",
    "lost_unknown",
)
"""Names of the counts in a commit.

``replaced`` counts characters. ``lost_unknown`` counts losses of an unknown number of documents.
"""
UNSELECTED = ("unselected", "unselected_bytes", "unselected_unknown")
"""Names of further counts where a run selects documents: what it leaves out of the files that it
reads.

They are documents, bytes of text, and documents whose condition a null makes unknown.
"""

COMPOSED = "composed"
"""Entry of ``made_by`` of a shard that was composed: the measures whose columns were copied."""

SHA256_BYTES = 32
"""Size of a file's SHA-256, in bytes."""


def num_measured(counts: Mapping[str, int]) -> int:
    """Number of documents in ``counts`` that are neither empty nor quarantined."""
    return counts["documents"] - counts["empty"] - counts["quarantined"]


class CommitEntry(TypedDict):
    """A file of a committed shard, as commit.json lists it."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One shard's result: the winner's files, row counts, checksums and timings."""

    shard: str
    attempt: str
    files: dict[str, CommitEntry]  # by table
    counts: dict[str, int]
    seconds: float
    # Device and versions, attention and dtype; of a GPU also its name, its compute capability, its
    # norms and where it reduces precision. Older commits have only device and versions.
    made_by: dict[str, str]
    schema_version: int = SCHEMA_VERSION
    """Version of its files."""

    @property
    def file_names(self) -> list[str]:
        """Names of its files, in the shard's folder."""
        return [str(entry["name"]) for entry in self.files.values()]


class _Shared(NamedTuple):
    """Facts that many commits share, so that they are stored once."""

    tables: tuple[str, ...]
    counts: tuple[str, ...]
    """Names of the counts."""
    made_by: tuple[tuple[str, str], ...]
    schema_version: int

    @property
    def layout(self) -> struct.Struct:
        """Layout of a packed commit before the digests of its files.

        Place of the kind, seconds, attempt, the counts, and rows and bytes of each file.
        """
        return struct.Struct(f"<Id8s{len(self.counts) + 2 * len(self.tables)}q")


class Commits(MutableMapping[str, Commit]):
    """Commits by shard id, packed: a run may have a million, and as objects each takes 3 kB.

    Values that commits share (names of tables and counts, versions) are stored once. A commit that
    cannot be packed without loss is kept as an object. ``update`` with another ``Commits`` unpacks
    nothing.
    """

    # Both are shared by all instances, so that packed commits move between them.
    _kinds: list[_Shared] = []  # noqa: RUF012 - of all
    _places: dict[_Shared, int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        self._packed: dict[str, bytes | Commit] = {}

    def __setitem__(self, shard: str, commit: Commit) -> None:
        self._packed[shard] = commit
        with contextlib.suppress(
            struct.error, ValueError, TypeError, KeyError, AttributeError, OverflowError
        ):
            packed = self._pack(commit)
            if self._unpack(shard, packed) == commit:
                self._packed[shard] = packed

    def __getitem__(self, shard: str) -> Commit:
        packed = self._packed[shard]
        return self._unpack(shard, packed) if isinstance(packed, bytes) else packed

    def __delitem__(self, shard: str) -> None:
        del self._packed[shard]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, shard: object) -> bool:
        return shard in self._packed

    def __ior__(self, others: Commits) -> Commits:
        self._packed |= others._packed
        return self

    def in_order(self, shards: Iterable[str]) -> Sequence[Commit]:
        """The commits of ``shards`` in that order, each unpacked when it is accessed."""
        return _InOrder(self, list(shards))

    def _pack(self, commit: Commit) -> bytes:
        made_by = tuple(commit.made_by.items())
        kind = _Shared(tuple(commit.files), tuple(commit.counts), made_by, commit.schema_version)
        place = self._places.setdefault(kind, len(self._kinds))
        if place == len(self._kinds):
            self._kinds.append(kind)
        files = commit.files.values()
        numbers = list(commit.counts.values())
        numbers += [file["rows"] for file in files]
        numbers += [file["bytes"] for file in files]
        attempt = bytes.fromhex(commit.attempt)
        head = kind.layout.pack(place, commit.seconds, attempt, *numbers)
        digests = [bytes.fromhex(file["sha256"]) for file in files]
        return head + b"".join(digests)

    def _unpack(self, shard: str, packed: bytes) -> Commit:
        (place,) = struct.unpack_from("<I", packed)
        kind = self._kinds[place]
        layout = kind.layout
        _, seconds, attempt_bytes, *numbers = layout.unpack_from(packed)
        attempt = attempt_bytes.hex()
        num_counts = len(kind.counts)
        num_tables = len(kind.tables)
        counts = dict(zip(kind.counts, numbers[:num_counts], strict=True))
        rows = numbers[num_counts : num_counts + num_tables]
        sizes = numbers[num_counts + num_tables :]
        files: dict[str, CommitEntry] = {}
        for i, table in enumerate(kind.tables):
            digest_at = layout.size + SHA256_BYTES * i
            files[table] = {
                "name": f"{attempt}-{table}.parquet",
                "rows": rows[i],
                "bytes": sizes[i],
                "sha256": packed[digest_at : digest_at + SHA256_BYTES].hex(),
            }
        made_by = dict(kind.made_by)
        return Commit(shard, attempt, files, counts, seconds, made_by, kind.schema_version)


class _InOrder(Sequence[Commit]):
    def __init__(self, commits: Commits, shards: list[str]) -> None:
        self._commits, self._shards = commits, shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return _InOrder(self._commits, self._shards[at])
        return self._commits[self._shards[at]]


def provenance_of(commits: Iterable[Commit]) -> list[Maker]:
    """Each distinct ``made_by`` of ``commits`` with its number of ``shards``, the largest first."""
    numbers: Counter[tuple[tuple[str, str], ...]] = Counter()
    for commit in commits:
        made_by = sorted(commit.made_by.items())
        numbers[tuple(made_by)] += 1
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    return [{"shards": n, "made_by": dict(items)} for items, n in ordered]


def describe_makers(provenance: Iterable[Maker]) -> dict[str, int]:
    """Number of shards by what measured them, in words, the most frequent first.

    ``provenance`` is that of ``provenance_of``. A GPU differs from another by its name, its compute
    capability, its attention and its norms, a CPU by its name and its instructions, and mixture
    models by the dtype of their experts.
    """
    numbers: Counter[str] = Counter()
    for kind in provenance:
        numbers[_describe_maker(kind["made_by"])] += kind["shards"]
    return dict(sorted(numbers.items(), key=lambda item: (-item[1], item[0])))


def _describe_maker(made_by: Mapping[str, str]) -> str:
    """Device and kernels that measured a shard, in words. On a CPU, the dtype of the run decides
    the attention.

    Older commits lack ``norm`` and ``experts``: no norm was fused, and experts ran in float32. They
    name no CPU either.
    """
    words = device = made_by.get("device", "an unknown device")
    if "cpu" in made_by:
        words = f"{made_by['cpu']} ({made_by.get('instructions', '?')})"
    if device == "cuda":
        gpu = made_by.get("gpu", "an unknown GPU")
        capability = made_by.get("capability", "?")
        attention = made_by.get("attention", "?")
        words = f"{gpu} (compute capability {capability}), attention {attention}"
        if made_by.get("norm") == "fused":
            words += ", norms fused"
    if (experts := made_by.get("experts", "float32")) != "float32":
        words += f", experts in {experts}"
    reduced = made_by.get("reduced", "none")
    if device == "cuda" and reduced != "none":
        words += f", reduced precision in {reduced}"
    if COMPOSED in made_by:
        words += ", composed of stored columns"
    return words


def total_counts(commits: Iterable[Commit]) -> dict[str, int]:
    """Sum of each count over ``commits``."""
    totals: Counter[str] = Counter()
    for commit in commits:
        totals.update(commit.counts)
    return dict(totals)
