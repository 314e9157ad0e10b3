"""Measure layouts and encodings of the tokens table: bytes, and the time to write and to read.

    PYTHONPATH=tests python -m bench.encodings RESULTS/shards/*/*/*-tokens.parquet

``RESULTS`` is a store of a run with offsets. The first table has whole layouts of the offsets, the
second has one column at a time. Times are medians of the processor time of one thread, in
nanoseconds a token; all variants take turns.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afn_ray.schema import TOKEN_CHARS
from afn_ray.store import parquet
from afn_ray.store.records import PAGE_ROWS, ROW_GROUP_ROWS
from afn_ray.store.shard_tables import ShardTable

Ints = npt.NDArray[np.int32]
DELTA, SPLIT, PLAIN, DICTIONARY = "DELTA_BINARY_PACKED", "BYTE_STREAM_SPLIT", "PLAIN", ""
REPEAT = 7
WINDOW = "sum(gap + length) OVER (PARTITION BY doc ORDER BY position)"


@dataclass(frozen=True)
class Layout:
    """Columns in the place of ``start`` and ``end``, with their encodings."""

    columns: Callable[[Ints, Ints, Ints], Mapping[str, Ints]]
    """Columns made of ``doc``, ``start`` and ``end``."""
    encodings: Mapping[str, str]
    start: str = "start"
    """SQL of the first character of a token."""
    end: str = '"end"'
    """SQL of the character after its last."""
    token_id: tuple[str, int] = (DICTIONARY, 3)
    """Encoding and level of zstd of the column ``token_id``."""
    level: int = 1
    """Level of zstd of the other columns."""
    page_rows: int = PAGE_ROWS
    """Largest number of rows in a page."""


def in_texts(doc: Ints, start: Ints, end: Ints) -> dict[str, Ints]:
    """Places in the shard's texts, one after the other, and where each text begins."""
    first = np.r_[True, doc[1:] != doc[:-1]]
    lengths = np.maximum.reduceat(end, np.flatnonzero(first))
    begins = np.r_[0, np.cumsum(lengths)[:-1]][np.cumsum(first) - 1].astype(np.int32)
    return {"text_start": begins, "start_in_shard": start + begins, "length": end - start}


def gaps(doc: Ints, start: Ints, end: Ints) -> dict[str, Ints]:
    """Characters between a token and the one before."""
    previous = np.where(np.r_[True, doc[1:] != doc[:-1]], 0, np.r_[0, end[:-1]])
    return {"gap": (start - previous).astype(np.int32), "length": end - start}


def ahead(doc: Ints, start: Ints, end: Ints) -> dict[str, Ints]:
    """Starts without what positions foretell."""
    rows = np.arange(len(doc))
    first = np.r_[True, doc[1:] != doc[:-1]]
    position = rows - np.maximum.accumulate(np.where(first, rows, 0))
    return {
        "start_ahead": (start - TOKEN_CHARS * position).astype(np.int32),
        "length": end - start,
    }


BOTH = Layout(lambda _, s, e: {"start": s, "end": e}, dict.fromkeys(("start", "end"), DELTA))
WITH_LENGTH = Layout(
    lambda _, s, e: {"start": s, "length": e - s},
    {"start": DELTA, "length": DICTIONARY},
    end="start + length",
)
IN_TEXTS = Layout(
    in_texts,
    {"text_start": DELTA, "start_in_shard": DELTA, "length": DICTIONARY},
    "start_in_shard - text_start",
    "start_in_shard - text_start + length",
)
AHEAD = Layout(
    ahead,
    {"start_ahead": DELTA, "length": DICTIONARY},
    f"{TOKEN_CHARS} * position + start_ahead",
    f"{TOKEN_CHARS} * position + start_ahead + length",
)
LAYOUTS = {
    "start, end, small pages": replace(BOTH, level=3, page_rows=20_000),
    "start, end": BOTH,
    "start, end, split": replace(BOTH, encodings=dict.fromkeys(("start", "end"), SPLIT)),
    "start, length": WITH_LENGTH,
    "start, split, length": replace(WITH_LENGTH, encodings={"start": SPLIT, "length": DICTIONARY}),
    "start ahead, length (today)": AHEAD,
    "the same, token_id plain": replace(AHEAD, token_id=(PLAIN, 3)),
    "those of today, all zstd 3": replace(AHEAD, level=3),
    "start in shard, text, length": IN_TEXTS,
    "gap, length": Layout(
        gaps,
        {"gap": DICTIONARY, "length": DICTIONARY},
        f"{WINDOW} - length",
        WINDOW,
    ),
}


@dataclass
class Figures:
    """Bytes, and times in seconds by what was done."""

    num_bytes: int = 0
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def timed(self, what: str, call: Callable[[], object]) -> None:
        """Call ``call()`` and keep its processor time."""
        began = time.process_time()
        call()
        self.times[what].append(time.process_time() - began)


def laid_out(tokens: pa.Table, layout: Layout) -> pa.Table:
    """``tokens`` with the columns of ``layout`` in the place of its offsets."""
    doc, start, end = (tokens[name].to_numpy() for name in ("doc", "start", "end"))
    table = tokens.drop_columns(["start", "end"])
    for name, values in layout.columns(doc, start, end).items():
        table = table.append_column(pa.field(name, pa.int32(), nullable=False), pa.array(values))
    return table


def write(path: Path, table: pa.Table, encodings: Mapping[str, str], layout: Layout) -> None:
    """``table`` as a shard has it, but for ``encodings`` of its columns and for ``layout``."""
    chosen = {"doc": DELTA, "position": DELTA}
    for name in table.column_names:
        if pa.types.is_floating(table.schema.field(name).type):
            chosen[name] = SPLIT
    chosen |= encodings
    plain = {name: how for name, how in chosen.items() if how != DICTIONARY}
    levels = dict.fromkeys(table.column_names, layout.level)
    if "token_id" in levels:
        levels["token_id"] = layout.token_id[1]
    with parquet.writer(
        path,
        table.schema,
        compression_level=levels,
        max_rows_per_page=layout.page_rows,
        write_batch_size=layout.page_rows,
        use_dictionary=[name for name in table.column_names if name not in plain],
        column_encoding={name: how for name, how in plain.items() if name in table.column_names},
    ) as writer:
        writer.write_table(table, ROW_GROUP_ROWS)


def offsets_sql(path: Path, layout: Layout) -> str:
    """A query with ``doc``, ``position``, ``start`` and ``end`` of each token in ``path``."""
    return (
        f"SELECT doc, position, token_id, ({layout.start})::INTEGER AS start, "
        f"({layout.end})::INTEGER AS \"end\" FROM read_parquet('{path}')"
    )


def measure_layouts(tokens: pa.Table, folder: Path, repeat: int) -> dict[str, Figures]:
    """Figures of each of ``LAYOUTS``."""
    path, found = folder / "layout.parquet", {name: Figures() for name in LAYOUTS}
    tables = {name: laid_out(tokens, layout) for name, layout in LAYOUTS.items()}
    with duckdb.connect(config={"threads": 1}) as connection:
        for _ in range(repeat):
            for name, layout in LAYOUTS.items():
                encodings = {**layout.encodings, "token_id": layout.token_id[0]}
                offsets = f'sum(start), sum("end") FROM ({offsets_sql(path, layout)})'
                rows = f"sum(doc), sum(position), sum(token_id), {offsets}"
                figures = found[name]
                figures.timed("write", partial(write, path, tables[name], encodings, layout))
                figures.num_bytes = path.stat().st_size
                figures.timed("Arrow", partial(pq.read_table, path, use_threads=False))
                figures.timed("offsets", partial(_ask, connection, f"SELECT {offsets}"))
                figures.timed("rows", partial(_ask, connection, f"SELECT {rows}"))
    return found


def _ask(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    connection.execute(query).fetchall()


def measure_columns(tokens: pa.Table, folder: Path, repeat: int) -> dict[str, Figures]:
    """Figures of ``token_id`` and the first strength alone, by encoding."""
    strength = next(name for name in tokens.column_names if name.startswith("strength_"))
    bins = (tokens[strength].to_numpy().view(np.uint32) >> 8).astype(np.int32)
    ids = tokens["token_id"]
    variants = {
        "token_id, dictionary": (ids, DICTIONARY, 3),
        "token_id, dictionary, zstd 9": (ids, DICTIONARY, 9),
        "token_id, plain": (ids, PLAIN, 3),
        "token_id, plain, zstd 9": (ids, PLAIN, 9),
        "token_id, split": (ids, SPLIT, 3),
        "token_id, delta": (ids, DELTA, 3),
        "strength, split": (tokens[strength], SPLIT, 3),
        "strength, split, zstd 9": (tokens[strength], SPLIT, 9),
        "strength, plain": (tokens[strength], PLAIN, 3),
        "strength, dictionary": (tokens[strength], DICTIONARY, 3),
        "bins of strength, delta": (pa.chunked_array([bins]), DELTA, 3),
        "bins of strength, split": (pa.chunked_array([bins]), SPLIT, 3),
    }
    path, found = folder / "column.parquet", {name: Figures() for name in variants}
    for _ in range(repeat):
        for name, (values, how, level) in variants.items():
            table = pa.table({"token_id": values})
            encodings, layout = {"token_id": how}, replace(BOTH, token_id=(how, level))
            figures = found[name]
            figures.timed("write", partial(write, path, table, encodings, layout))
            figures.num_bytes = path.stat().st_size
            figures.timed("Arrow", partial(pq.read_table, path, use_threads=False))
    return found


def viewed(tokens: pa.Table) -> pa.Table:
    """``tokens`` as today's version stores them, with ``doc``, ``start`` and ``end``."""
    start = pc.add(
        pc.multiply(tokens["position"], pa.scalar(TOKEN_CHARS, pa.int32())), tokens["start_ahead"]
    )
    columns = {"start": start, "end": pc.add(start, tokens["length"])}
    rest = tokens.drop_columns(["start_ahead", "length"]).rename_columns({"doc_in_shard": "doc"})
    for name, values in columns.items():
        rest = rest.append_column(pa.field(name, pa.int32(), nullable=False), values)
    return rest.unify_dictionaries()


def main(paths: Sequence[str]) -> None:
    """Print the figures of the tokens tables at ``paths``."""
    tokens = viewed(pa.concat_tables([ShardTable(path).read() for path in paths]))
    with tempfile.TemporaryDirectory() as folder:
        for measured in (measure_layouts, measure_columns):
            for name, figures in measured(tokens, Path(folder), REPEAT).items():
                times = (
                    f"{what} {statistics.median(t) / tokens.num_rows * 1e9:6.1f} ns"
                    for what, t in figures.times.items()
                )
                print(f"{name:36} {figures.num_bytes / tokens.num_rows:6.3f} B ", *times)


if __name__ == "__main__":
    main(sys.argv[1:])
