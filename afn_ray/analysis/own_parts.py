"""Figures of each source and each group of one run alone, which need no baseline.

``FIGURES`` has the function of each such limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import kept
from afn_ray.errors import QueryError
from afn_ray.query import database
from afn_ray.query.expressions import quoted
from afn_ray.reduce import near_duplicates
from afn_ray.reduce.group_drift import grouped_by, grouping_column
from afn_ray.reduce.groups import OTHERS, Grouping, group_name
from afn_ray.reduce.sources import Sources
from afn_ray.store import manifest
from afn_ray.store.manifest import RunFolder


class OwnPart(NamedTuple):
    """A source or a group, with a figure of its own."""

    name: str
    value: float
    n: int  # its tokens, special ones apart except for copies


def worst_first(part: OwnPart) -> tuple[float, str]:
    """Key by which the parts with the largest values come first, and equal ones by name."""
    return -part.value, part.name


def junk(run: RunFolder, kind: str) -> Iterator[OwnPart]:
    """The share of the tokens of each part that are in strange documents;
    parts with tokens only.
    """
    table = manifest.read_table(run, "strange")
    strange: Counter[str | None] = Counter()
    for name, n in zip(table[kind].to_pylist(), table["n"].to_pylist(), strict=True):
        strange[name] += n
    for name, n in _tokens(run, kind).items():
        if n:
            yield OwnPart(_shown(kind, name), strange[name] / n, n)


def lost(run: RunFolder, kind: str) -> Iterator[OwnPart]:
    """The lost bytes of each part; those of unknown groups count for "(no value)"."""
    lost_bytes = _lost_by_source(run) if kind == "source" else _lost_by_group(run)
    tokens = _tokens(run, kind)
    for name in dict.fromkeys([*tokens, *lost_bytes]):
        yield OwnPart(_shown(kind, name), lost_bytes[name], tokens[name])


def near_copies(run: RunFolder, kind: str, documents: pa.Table | None = None) -> Iterator[OwnPart]:
    """The share of near-copies among the counted documents of each part that have tokens.

    ``documents`` are those of ``near_documents``, by default read anew.
    """
    rows = near_documents(run) if documents is None else documents
    n = Counter[str | None]()
    n_near = Counter[str | None]()
    counts = (rows[name].to_pylist() for name in ("n", "n_near"))
    for name, of_rows, near in zip(parts_of(run, kind, rows), *counts, strict=True):
        n[name] += of_rows
        n_near[name] += near
    tokens = _tokens(run, kind)
    for name in n:
        yield OwnPart(_shown(kind, name), n_near[name] / n[name], tokens[name])


def near_documents(run: RunFolder) -> pa.Table:
    """The numbers of counted documents, and of near-copies, by ``source`` and by the kept column.

    Scans ``documents`` once. The column is there if one makes the groups.
    """
    column = grouping_column(run)
    value = "NULL" if column is None else quoted(column.name)
    query = (
        f"SELECT source, {value} AS value, count(*) AS n, "  # noqa: S608
        "count(near_duplicate_of) AS n_near "
        "FROM documents WHERE n_tokens > 0 AND duplicate_of IS NULL GROUP BY ALL"
    )
    with database.open_run(run.uri, timeout_s=database.MAX_TIMEOUT_S) as opened:
        rows = opened.sql(query).to_arrow_table()
    found = rows.select(["source", "n", "n_near"])
    if column is None:
        return found
    return found.append_column(column.name, as_kept(rows["value"], column))


def copies(run: RunFolder, kind: str) -> Iterator[OwnPart]:
    """The share of copies among the documents of each part that have tokens, counted or not.

    A copy has the text of an earlier document of the run, in any part. Special tokens count.
    """
    table = manifest.read_table(run, "copied")
    columns = ("n_docs", "n_copies", "n")
    added = table.group_by(kind).aggregate([(name, "sum") for name in columns])
    for row in added.to_pylist():
        n_docs, n_copies, n = (row[f"{name}_sum"] for name in columns)
        yield OwnPart(_shown(kind, row[kind]), n_copies / n_docs, n)


def most_junk(run: RunFolder) -> str | None:
    """The source with most tokens in strange documents; None if there is no such document."""
    most = max(junk(run, "source"), key=lambda part: part.value * part.n, default=None)
    return most.name if most is not None and most.value else None


FIGURES: dict[str, Callable[[RunFolder, str], Iterator[OwnPart]]] = {
    "junk_share": junk,
    "lost_bytes": lost,
    "duplicate_share": copies,
    "near_duplicate_share": near_copies,
}
"""Figures by the key of their limit; each is given a run and the kind of the parts."""
NEAR = "near_duplicate_share"
"""Key of the limit on near-copies, whose figures need a scan of the documents."""
TABLES = {"junk_share": "strange", "duplicate_share": "copied"}
"""Tables of a run's screening that figures need and that an older run lacks."""


class OwnParts:
    """Figures of the parts of one run, each found once, at the first question for it."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._near_documents: pa.Table | QueryError | None = None
        self._found: dict[tuple[str, str], list[OwnPart]] = {}

    def of(self, key: str, kind: str) -> list[OwnPart]:
        """The figure of the limit ``key`` for each part of the ``kind``, the largest first.

        Raises ``QueryError`` if the documents cannot be asked, again without another try.
        """
        if (key, kind) not in self._found:
            found = self._near_copies(kind) if key == NEAR else FIGURES[key](self._run, kind)
            self._found[key, kind] = sorted(found, key=worst_first)
        return self._found[key, kind]

    def _near_copies(self, kind: str) -> Iterator[OwnPart]:
        if self._near_documents is None:
            try:
                self._near_documents = near_documents(self._run)
            except QueryError as error:
                self._near_documents = error
        if isinstance(self._near_documents, QueryError):
            raise self._near_documents
        return near_copies(self._run, kind, self._near_documents)


def lacking(run: RunFolder, key: str) -> str | None:
    """Reason why ``run`` has no figure for the limit ``key``; None if it has."""
    if key == NEAR and "near_duplicates" not in run.info["tables"]:
        return near_duplicates.NOT_LOOKED_FOR
    if key not in TABLES or TABLES[key] in run.info["tables"]:
        return None
    return f"the run is older than its table of {TABLES[key]} documents"


def junk_of_run(run: RunFolder) -> float:
    """The share of all tokens of ``run`` that are in strange documents."""
    strange = pc.sum(manifest.read_table(run, "strange")["n"]).as_py() or 0
    total = sum(_tokens(run, "source").values())
    return float(strange / max(1, total))


def _shown(kind: str, name: str | None) -> str:
    return group_name(name) if kind == "group" else str(name)


def _tokens(run: RunFolder, kind: str) -> Counter[str | None]:
    """The tokens of each part of ``run``."""
    return _column_by(kind, "n", _at_deepest(run, f"{kind}s"))


def _lost_by_source(run: RunFolder) -> Counter[str | None]:
    return _column_by("source", "lost_bytes", _at_deepest(run, "sources"))


def _at_deepest(run: RunFolder, name: str) -> pa.Table:
    """The rows of the table ``name`` of ``run`` at its deepest layer."""
    table = manifest.read_table(run, name)
    return table.filter(pc.equal(table["layer"], max(run.info["layers"])))


def _column_by(part: str, column: str, rows: pa.Table) -> Counter[str | None]:
    """``column`` of ``rows`` by the name in their column ``part``, which is in one row each."""
    names = rows[part].to_pylist()
    values = rows[column].to_pylist()
    return Counter(dict(zip(names, values, strict=True)))


def _lost_by_group(run: RunFolder) -> Counter[str | None]:
    """The lost bytes of each group: of its files, or of its documents if a column makes it."""
    files = manifest.read_table(run, "files")
    rows = files.filter(pc.invert(files["is_skipped"])).select(["source", "lost_bytes"])
    sources = Sources.of(rows["source"].to_pylist())
    column = grouping_column(run)
    found = Counter[str | None]()
    total = pc.sum(rows["lost_bytes"]).as_py() or 0
    if column is not None and total:
        rows = _lossy_documents(run, column)
        # A shard that was given up has no documents.
        found[None] = total - (pc.sum(rows["lost_bytes"]).as_py() or 0)
    if not total:
        return found
    names = _groups_of(run, rows, sources)
    for name, n in zip(names, rows["lost_bytes"].to_pylist(), strict=True):
        found[name] += n
    return found


def parts_of(run: RunFolder, kind: str, rows: pa.Table) -> list[str | None]:
    """The source or the group of each of ``rows``, with ``source`` and the kept column."""
    files = manifest.read_table(run, "files")
    read = files.filter(pc.invert(files["is_skipped"]))
    sources = Sources.of(read["source"].to_pylist())
    if kind == "source":
        return [sources.name_of(uri) for uri in rows["source"].to_pylist()]
    return _groups_of(run, rows, sources)


def _groups_of(run: RunFolder, rows: pa.Table, sources: Sources) -> list[str | None]:
    """The group of each of ``rows``, with ``source`` and the kept column if one makes the groups.

    A group of which no document counts is not among those of the run. It has its own name too,
    unless the run joins groups.
    """
    by = str(grouped_by(run))
    groups = manifest.read_table(run, "groups")["group"]
    names = {*groups.unique().to_pylist()}
    uris = rows["source"].cast(pa.string()).combine_chunks()
    at = rows.column_names.index("source")
    documents = rows.set_column(at, "source", uris.dictionary_encode())
    grouping = Grouping(by, grouping_column(run) is not None, sources)
    values = grouping.values(documents).to_pylist()
    if OTHERS not in names:
        return list(values)
    return [value if value in names else OTHERS for value in values]


def as_kept(values: pa.ChunkedArray, column: kept.KeptColumn) -> pa.ChunkedArray:
    """``values`` of the kept ``column`` in the type by which groups are found."""
    return values.cast(pa.string() if column.kind == "string" else kept.KINDS[column.kind])


def _lossy_documents(run: RunFolder, column: kept.KeptColumn) -> pa.Table:
    """``source``, ``lost_bytes`` and the kept ``column`` of each document that lost something."""
    name = quoted(column.name)
    with database.open_run(run.uri, timeout_s=database.MAX_TIMEOUT_S) as opened:
        query = (
            f"SELECT source, lost_bytes, {name} FROM documents WHERE "  # noqa: S608
            "lost_bytes > 0"
        )
        rows = opened.sql(query).to_arrow_table()
    rows = rows.set_column(0, "source", rows["source"].cast(pa.string()))
    return rows.set_column(2, column.name, as_kept(rows[column.name], column))
