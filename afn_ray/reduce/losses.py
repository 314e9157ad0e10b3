"""Losses of a run, file by file: bytes and documents not measured, and characters replaced.

Each row of a ``documents`` table counts its losses. Only the tables of shards whose commit counts
a loss are read again, by pure functions under ``reduce.tree.Tasks``. All other files are whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.corpus_values import FileInfo, FileSlice, Shard
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.tasks import Inline, Tasks, batches, merged
from afn_ray.run_info import RunInfo
from afn_ray.schema import FILES_SCHEMA
from afn_ray.store import manifest, parquet
from afn_ray.store.layout import is_store_file
from afn_ray.text import count

NAMED_FILES = 5
"""Largest number of files that a sentence names; those with the largest losses come first."""
READ = ("source", "status", "n_replaced", "lost_bytes", "lost_documents")
"""Columns of the documents table that are read."""
SUMS = ("n_quarantined", "lost_bytes", "lost_documents", "lost_unknown", "n_replaced")
"""Columns of ``FILES_SCHEMA`` that are sums over the documents of a file."""
COUNTED = ("quarantined", "lost_bytes", "lost_documents", "lost_unknown", "replaced")
"""Counts of a commit that correspond to ``SUMS``."""

OWN_ENCODING = (".parquet", ".warc", ".wet")
"""Parts of the names of files whose encoding no option decides."""
LOST = ("lost_bytes", "lost_documents", "lost_unknown")
"""Members of ``SUMS`` that a quarantined shard also adds to."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Total losses of some files, and the files with the largest losses."""

    num_bytes: int  # bytes that the plan reads
    lost_bytes: int
    lost_documents: int  # lost documents whose number is known
    lost_unknown: int  # losses with an unknown number of documents
    replaced: int  # replaced characters
    num_files: int  # files with a loss
    worst: tuple[tuple[str, float], ...]  # URI and share read of the files that lost most bytes
    num_replaced_files: int  # files with replaced characters
    most_replaced: tuple[str, ...]  # URIs of the files with most replaced characters

    @property
    def any(self) -> bool:
        """True if a file lost something; replaced characters do not count."""
        return self.num_files > 0

    @property
    def share(self) -> float:
        """Share of the planned bytes that were lost, 0 to 1."""
        if not self.num_bytes:
            return float(self.any)
        return min(1.0, self.lost_bytes / self.num_bytes)


# --- the table ---


def files_table(
    committed: CommittedShards,
    planned: Sequence[Shard],
    skipped: Iterable[FileInfo],
    tasks: Tasks | None = None,
) -> pa.Table:
    """One row of ``FILES_SCHEMA`` for each file of the corpus, ordered by URI.

    A ``planned`` shard that is not ``committed`` is lost as a whole. ``skipped`` are files that
    were left out of the corpus. Raises ``StoreError`` for a file that differs from its commit.
    """
    tasks = tasks or Inline()
    done: set[str] = set()
    files: list[CommittedFile] = []
    for commit in committed.commits:
        done.add(commit.shard)
        if any(commit.counts[name] for name in COUNTED):
            files.append(committed.file(commit, "documents"))
    parts = [_planned(planned, done)]
    if files:
        handles = [tasks.submit(_losses, some)[0] for some in batches(files)]
        parts.append(tasks.result(merged(tasks, _add, handles)))
    read = add_files(pa.concat_tables(parts))
    is_skipped = np.zeros(len(read), bool)
    read = read.append_column("is_skipped", pa.array(is_skipped))
    read = read.select(FILES_SCHEMA.names).cast(FILES_SCHEMA)
    files_of_corpus = pa.concat_tables([read, _not_read(skipped)])
    return files_of_corpus.sort_by("source").combine_chunks()


def with_given_up(counts: Mapping[str, int], shards: Iterable[Shard]) -> dict[str, int]:
    """``counts``, the sums over commits, plus the losses of quarantined ``shards``."""
    planned = _planned(list(shards), set())
    total = dict(counts)
    for name in counts.keys() & set(LOST):
        total[name] += _sum(planned[name])
    return total


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def add_files(files: pa.Table) -> pa.Table:
    """Sums of the rows with equal ``source``, and the share of their bytes that was read."""
    (added,) = _add(files)
    num_bytes = added["num_bytes"].to_numpy().astype(np.float64)
    lost_bytes = added["lost_bytes"].to_numpy().astype(np.float64)
    # A document that the model refused counts with the bytes of its text, and these may exceed
    # the compressed bytes of the file.
    share = np.clip(1 - lost_bytes / np.maximum(num_bytes, 1), 0, 1)
    share_of_empty = np.where(added["n_quarantined"].to_numpy() > 0, 0.0, 1.0)
    share_read = np.where(num_bytes > 0, share, share_of_empty)
    return added.append_column("share_read", pa.array(share_read))


def _planned(shards: Sequence[Shard], done: set[str]) -> pa.Table:
    """One row for each slice; a slice is lost as a whole if its shard is not in ``done``."""
    slices: list[FileSlice] = []
    is_lost: list[bool] = []
    for shard in shards:
        slices += shard.slices
        is_lost += [shard.id not in done] * len(shard.slices)
    num_bytes = np.array([piece.num_bytes for piece in slices], np.int64)
    num_documents = np.array([piece.num_documents for piece in slices], np.int64)
    rows = {
        "source": [piece.uri for piece in slices],
        "bytes": [piece.size if piece.start == 0 else 0 for piece in slices],
        "num_bytes": num_bytes,
        "lost_bytes": np.where(is_lost, num_bytes, 0),
        "lost_documents": np.where(is_lost, np.maximum(0, num_documents), 0),
        "lost_unknown": np.where(is_lost, num_documents < 0, 0),
    }
    return _table(rows, len(slices))


def _losses(files: Sequence[CommittedFile]) -> list[pa.Table]:
    """Losses of each file in some shards' documents; files without losses are left out."""
    tables = []
    for file in files:
        documents = parquet.read(file.read(), list(READ), use_threads=False)
        status = documents["status"].cast(pa.string())
        rows = {
            "source": documents["source"].cast(pa.string()).combine_chunks(),
            "n_quarantined": pc.starts_with(status, "quarantined").to_numpy(),
            "lost_bytes": documents["lost_bytes"].to_numpy(),
            "lost_documents": pc.fill_null(documents["lost_documents"], 0).to_numpy(),
            "lost_unknown": pc.is_null(documents["lost_documents"]).to_numpy(),
            "n_replaced": documents["n_replaced"].to_numpy(),
        }
        has_loss = np.any([rows[name] for name in SUMS], axis=0)
        table = _table(rows, len(documents))
        tables.append(table.filter(pa.array(has_loss, pa.bool_())))
    return _add(*tables)


def _table(rows: Mapping[str, Any], num_rows: int) -> pa.Table:
    """``rows`` as a table of sums; missing columns are 0."""
    zeros = np.zeros(num_rows, np.int64)
    columns = {"source": pa.array(rows["source"], pa.string())}
    for name in ("bytes", "num_bytes", *SUMS):
        values = np.asarray(rows.get(name, zeros), np.int64)
        columns[name] = pa.array(values)
    return pa.table(columns)


def _add(*tables: pa.Table) -> list[pa.Table]:
    """The sum of ``tables``, one row for each file."""
    groups = pa.concat_tables(tables).group_by("source", use_threads=False)
    added = groups.aggregate([(name, "sum") for name in ("bytes", "num_bytes", *SUMS)])
    names = [name.removesuffix("_sum") for name in added.column_names]
    return [added.rename_columns(names)]


def _not_read(files: Iterable[FileInfo]) -> pa.Table:
    """Rows of ``FILES_SCHEMA`` for skipped files."""
    zeros = dict.fromkeys(FILES_SCHEMA.names, 0) | {"is_skipped": True, "share_read": 0.0}
    rows = [zeros | {"source": file.uri, "bytes": file.size} for file in files]
    return pa.Table.from_pylist(rows, FILES_SCHEMA)


def skipped_files(table: pa.Table) -> list[FileInfo]:
    """Files in a run's ``files`` table that were left out of its corpus."""
    rows = table.filter(table["is_skipped"]).select(["source", "bytes"]).to_pylist()
    return [FileInfo(row["source"], row["bytes"], "") for row in rows]


# --- the totals ---


def total(files: pa.Table) -> Losses:
    """Total losses of ``files``, a table of ``FILES_SCHEMA``."""
    read = files.filter(pc.invert(files["is_skipped"]))
    with_loss = read.filter(lost_something(read))
    worst = _largest(with_loss, "lost_bytes")
    with_replaced = read.filter(pc.greater(read["n_replaced"], 0))
    most_replaced = _largest(with_replaced, "n_replaced")
    return Losses(
        num_bytes=_sum(read["num_bytes"]),
        lost_bytes=_sum(read["lost_bytes"]),
        lost_documents=_sum(read["lost_documents"]),
        lost_unknown=_sum(read["lost_unknown"]),
        replaced=_sum(read["n_replaced"]),
        num_files=len(with_loss),
        worst=tuple((row["source"], row["share_read"]) for row in worst),
        num_replaced_files=len(with_replaced),
        most_replaced=tuple(row["source"] for row in most_replaced),
    )


def _largest(files: pa.Table, column: str) -> list[dict[str, Any]]:
    """The ``NAMED_FILES`` rows with the largest values of ``column``, the largest first."""
    ordered = files.sort_by([(column, "descending"), ("source", "ascending")])
    rows: list[dict[str, Any]] = ordered.slice(0, NAMED_FILES).to_pylist()
    return rows


def lost_something(files: pa.Table) -> pa.Array:
    """True if each row has a loss."""
    has_loss = [files[name].to_numpy() > 0 for name in LOST]
    return pa.array(np.any(has_loss, axis=0), pa.bool_())


def of_run(run: manifest.RunFolder) -> Losses:
    """Total losses of the complete ``run``."""
    return total(manifest.read_table(run, "files"))


class WorstJson(TypedDict):
    """A file that lost something."""

    source: Annotated[str, "URI of the file"]
    share_read: Annotated[float, "share of its bytes that was measured"]


class LostJson(TypedDict):
    """Losses in ``audit.json``."""

    num_bytes: Annotated[int, "bytes that the plan reads"]
    lost_bytes: Annotated[int, "bytes that were not measured"]
    lost_documents: Annotated[int, "lost documents whose number is known"]
    lost_unknown: Annotated[int, "losses with an unknown number of documents"]
    replaced: Annotated[int, "characters that were replaced, because their bytes are no text"]
    num_files: Annotated[int, "files that lost something"]
    worst: Annotated[list[WorstJson], "the files that lost most bytes"]
    num_replaced_files: Annotated[int, "files with replaced characters"]
    most_replaced: Annotated[list[str], "URIs of the files with most replaced characters"]
    lost_share: Annotated[float, "share of the bytes of the plan that was lost, 0 to 1"]


def to_json(found: Losses) -> LostJson:
    """``found`` as plain values."""
    return {
        "num_bytes": found.num_bytes,
        "lost_bytes": found.lost_bytes,
        "lost_documents": found.lost_documents,
        "lost_unknown": found.lost_unknown,
        "replaced": found.replaced,
        "num_files": found.num_files,
        "worst": [{"source": uri, "share_read": share} for uri, share in found.worst],
        "num_replaced_files": found.num_replaced_files,
        "most_replaced": list(found.most_replaced),
        "lost_share": found.share,
    }


# --- unknown tokens ---

UNKNOWN_SHARE = 0.05
"""Share of unknown tokens among text tokens above which the run warns, 0 to 1.

Text in the model's own language has about 0.001.
"""


def count_unknown(vocabulary: pa.Table, unknown: int | None) -> int:
    """Number of text tokens in a run's ``vocabulary`` with the id ``unknown``."""
    if unknown is None or not len(vocabulary):
        return 0
    first_layer = pc.min(vocabulary["layer"]).as_py()
    is_unknown = (pc.field("layer") == first_layer) & (pc.field("token_id") == unknown)
    found = vocabulary.filter(is_unknown)
    of_text = pc.not_equal(found["class"].cast(pa.string()), "special")
    return _sum(found.filter(of_text)["n"])


def describe_unknown(info: RunInfo) -> str:
    """Sentence about the share of unknown tokens in a run's text.

    It is empty unless the share is above ``UNKNOWN_SHARE``.
    """
    found = info.get("unknown")
    counts = info["counts"]
    num_tokens = counts["tokens"] - counts["special"]
    if not isinstance(found, dict):
        return ""
    num = found.get("tokens")
    if not isinstance(num, int):
        return ""
    if not UNKNOWN_SHARE * num_tokens < num <= num_tokens:
        return ""
    return (
        f"{num:,} of {count(num_tokens, 'token')} of text ({rounded_up(num / num_tokens)}) are "
        f"{found.get('token')}, which stands for whatever the tokenizer does not know: their "
        "strengths say nothing of words. Is the model one of the corpus's language, and the "
        "tokenizer the model's own?"
    )


# --- in words ---


def describe(found: Losses) -> str:
    """The losses as "43 kB of 1.2 MB (3.6%) in 2 files: a.gz (52.1% read), ..."; empty if none."""
    if not found.any:
        return ""
    return (
        f"{bytes_text(found.lost_bytes)} of {bytes_text(found.num_bytes)} "
        f"({rounded_up(found.share)}) in {count(found.num_files, 'file')}: {worst_files(found)}; "
        f"{documents_text(found)}"
    )


def worst_files(found: Losses) -> str:
    """Names of the files with the largest losses, with the share of each that was read."""
    uris = [uri for uri, _ in found.worst]
    shares = [share for _, share in found.worst]
    files = []
    for name, share in zip(_names(uris), shares, strict=True):
        files.append(f"{name} ({rounded_down(share)} read)")
    return _listed(files, found.num_files)


def describe_replaced(found: Losses) -> str:
    """Sentence about replaced characters and their files; empty if there are none."""
    if not found.replaced:
        return ""
    files = count(found.num_replaced_files, "file")
    return f"{count(found.replaced, 'character')} in {files}: {replaced_files(found)}"


def replaced_files(found: Losses) -> str:
    """Names of the files with most replaced characters."""
    return _listed(_names(found.most_replaced), found.num_replaced_files)


def _has_own_encoding(uri: str) -> bool:
    """True if the format of the file at ``uri`` says its encoding."""
    lowered = uri.lower()
    return any(mark in lowered for mark in OWN_ENCODING)


def describe_encoding(replaced: int, uris: Sequence[str], encoding: str | None) -> str:
    """Question whether files with ``replaced`` characters have another encoding; empty without.

    ``uris`` are some of the files, ``encoding`` the one that was given.
    """
    of_text = [uri for uri in uris if not _has_own_encoding(uri)]
    if not replaced or not of_text:
        return ""
    name = _names(of_text[:1])[0]
    if encoding:
        return (
            f"{count(replaced, 'character')} could not be read as {encoding}: if {name} is in "
            "another encoding, measure it alone, with its --encoding"
        )
    return (
        f"{count(replaced, 'character')} could not be read as UTF-8: if {name} is in latin-1 or "
        "another encoding, give --encoding latin-1, or its own"
    )


def describe_skipped(files: Sequence[FileInfo]) -> str:
    """Sentence about files left out of the corpus, with reasons; empty if there are none."""
    of_store = [file for file in files if is_store_file(file.uri)]
    others = [file for file in files if not is_store_file(file.uri)]
    parts = []
    if others:
        uris = [file.uri for file in others[:NAMED_FILES]]
        names = _listed(_names(uris), len(others))
        parts.append(f"{_sized(others)} with an ending that is no known format: {names}")
    if of_store:
        parts.append(f"{_sized(of_store)} of a store")
    return "; ".join(parts)


def _sized(files: Sequence[FileInfo]) -> str:
    num_bytes = sum(file.size for file in files)
    return f"{count(len(files), 'file')} ({bytes_text(num_bytes)})"


def documents_text(found: Losses) -> str:
    """Phrase for the number of lost documents, as far as it is known."""
    if not found.lost_unknown:
        return count(found.lost_documents, "document")
    if not found.lost_documents:
        return "nobody can tell how many documents"
    return f"{count(found.lost_documents, 'document')} or more"


def bytes_text(n: int) -> str:
    """``n`` bytes in decimal units with two or three digits: "43 kB"."""
    if n < 1000:
        return count(n, "byte")
    power = min(5, int(math.log10(n)) // 3)
    value = n / 1000**power
    unit = ("", "kB", "MB", "GB", "TB", "PB")[power]
    digits = f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"
    return f"{digits} {unit}"


def rounded_down(share: float) -> str:
    """``share`` in percent, rounded down: a share below 1 is never 100%."""
    return f"{math.floor(share * 1000) / 10:g}%"


def rounded_up(share: float) -> str:
    """``share`` in percent, rounded up: a share above 0 is never 0%."""
    return f"{math.ceil(share * 1000) / 10:g}%"


def _names(uris: Sequence[str]) -> list[str]:
    """Names of the files, or their whole URIs if two names are equal."""
    names = [uri.rpartition("/")[2] for uri in uris]
    are_distinct = len(set(names)) == len(names)
    return names if are_distinct else list(uris)


def _listed(names: Sequence[str], num_files: int) -> str:
    parts = list(names)
    if num_files > len(names):
        parts.append(f"and {num_files - len(names):,} more")
    return ", ".join(parts)
