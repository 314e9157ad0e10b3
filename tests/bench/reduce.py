"""Measure the reduce of many generated shards, in different orders and by both executors.

    PYTHONPATH=tests python -m bench.reduce STORE EXECUTOR SEED

runs one reduce of the summaries in STORE, in the order that SEED gives, and prints one line of
JSON. Each reduce has a separate process, to measure its memory alone.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from afn_ray import cgroup
from afn_ray.bench import machine
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.reduce import tree
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.shard_summary import Summary
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import TokenTexts
from afn_ray.schema import SPECIAL, SUMMARY_SCHEMA, WORD_START, Series
from afn_ray.store import blocks, layout, shard_files
from afn_ray.store.commits import COUNTS, Commit, CommitEntry
from afn_ray.store.records import TableFile
from bench.apart import call_apart

NUM_TYPES = 30_522
"""Size of BERT's vocabulary, in types."""
SERIES = Series("strength", 8)
DOCUMENT_TOKENS = 200
MEASURE_ID = "generated"
EXECUTORS = {"inline": "all in one process", "ray": "tasks of a local Ray"}
WRITE_AT_ONCE = 50
"""Shards that one task writes."""


def measure(
    num_shards: int, num_tokens: int, repeat: int, on_note: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds and memory of ``repeat`` reduces by each executor, as ``--json`` writes them.

    Each reduce has its own order of the shards. ``num_tokens`` is the mean size of a shard, in
    tokens; sizes are uniform between 0.5 and 1.5 times the mean.
    """
    cores = cgroup.num_cores()
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as store:
        began = time.monotonic()
        index: list[dict[str, Any]] = []
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        with ProcessPoolExecutor(cores, mp_context=spawn) as pool:
            starts = range(0, num_shards, WRITE_AT_ONCE)
            groups = [
                (store, range(a, min(a + WRITE_AT_ONCE, num_shards)), num_tokens) for a in starts
            ]
            for rows in pool.map(_write, *zip(*groups, strict=True)):
                index += rows
        (Path(store) / "index.json").write_text(json.dumps(index), "utf-8")
        total = {name: sum(row[name] for row in index) for name in ("tokens", "bytes")}
        on_note(
            f"{num_shards:,} summaries of {total['tokens']:,} tokens, {total['bytes'] / 1e6:,.0f} "
            f"MB, written in {time.monotonic() - began:.0f} s"
        )
        found: dict[str, list[dict[str, Any]]] = {executor: [] for executor in EXECUTORS}
        for at in range(repeat):
            for place, (executor, rounds) in enumerate(found.items()):
                rounds.append(_watched(store, executor, seed=len(found) * at + place))
                on_note(f"{executor} {at + 1}/{repeat}: {rounds[-1]['seconds']:.1f} s")
    rounds = [r for of in found.values() for r in of]
    return {
        **machine.facts("cpu"),
        "shards": num_shards,
        **total,
        "repeat": repeat,
        "identical": len({r["sha256"] for r in rounds}) == 1,
        "types": rounds[0]["types"],
        "strengths": rounds[0]["strengths"],
        "foreign": max(r["foreign"] for r in rounds),
        "rounds": found,
    }


def _write(store: str, numbers: range, mean_tokens: int) -> list[dict[str, Any]]:
    """Write the summaries of the shards ``numbers``; return a row about each.

    Types have Zipf frequencies, and strengths are lognormal around the mean of their type.
    """
    law = np.random.default_rng(0)
    means, shares = law.normal(2.3, 0.12, NUM_TYPES), 1 / np.arange(10, NUM_TYPES + 10)
    cumulative = np.cumsum(shares / shares.sum())
    rows = []
    for number in numbers:
        random = np.random.default_rng([1, number])
        n = int(random.integers(mean_tokens // 2, mean_tokens + mean_tokens // 2 + 1))
        ids = np.minimum(np.searchsorted(cumulative, random.random(n)), NUM_TYPES - 1).astype(
            np.int32
        )
        flags = np.full(n, WORD_START, np.uint8)
        flags[::DOCUMENT_TOKENS], ids[::DOCUMENT_TOKENS] = SPECIAL, 101  # [CLS]
        strengths = round_strengths(
            np.exp(means[ids] + 0.1 * random.standard_normal(n)).astype(np.float32)
        )
        summary = Summary((SERIES,))
        summary.add(
            (np.arange(n) // DOCUMENT_TOKENS).astype(np.int32), ids, flags, {SERIES: strengths}
        )
        shard = f"{number:032x}"
        path = Path(shard_files.shard_uri(store, MEASURE_ID, shard)) / "0-summary.parquet"
        path.parent.mkdir(parents=True)
        file = TableFile(path, SUMMARY_SCHEMA)
        for table in summary.tables():
            file.write(table)
        file.close()
        rows.append(
            {
                "shard": shard,
                "tokens": n,
                "documents": -(-n // DOCUMENT_TOKENS),
                "rows": file.num_rows,
                "bytes": path.stat().st_size,
                "sha256": blocks.file_checksums(path)[0],
            }
        )
    return rows


def _watched(store: str, executor: str, seed: int) -> dict[str, Any]:
    """Run one reduce in a separate process; return its figures and its peak memory.

    The memory includes the descendants of the process.
    """
    answer, watch = call_apart("bench.reduce", store, executor, seed)
    return {
        **answer,
        "peak_bytes": watch.peak_bytes,
        "foreign": round(watch.foreign, 3),
    }


def _reduce(store: str, executor: str, seed: int) -> dict[str, Any]:
    """Reduce the summaries in ``store``, in the order that ``seed`` gives."""
    index = json.loads((Path(store) / "index.json").read_text("utf-8"))
    from afn_ray.runs import cluster  # and with it torch, which takes seconds

    commits = [_commit(index[i]) for i in np.random.default_rng(seed).permutation(len(index))]
    texts = [f"type {i}" for i in range(NUM_TYPES)]
    config = RunConfig(corpus=("-",), model="-", store=store, executor=executor)
    shards = [Shard(commit.shard, (), config.read_options) for commit in commits]
    with cluster.tasks(config, shards, lambda notice: print(notice, file=sys.stderr)) as tasks:
        before, began = machine.own_memory_bytes("VmRSS"), time.monotonic()
        tables = tree.reduce_run(
            CommittedShards(store, MEASURE_ID, commits, [1] * len(commits)),
            tree.RecordedSeries((SERIES,)),
            TokenTexts(texts, texts),
            tree.LabelRules("en", 10.0),
            tasks,
        )
        seconds = time.monotonic() - began
    return {
        "seconds": seconds,
        "before_bytes": before,
        "driver_bytes": machine.own_memory_bytes("VmHWM"),
        "types": tables["vocabulary"].num_rows,
        "strengths": tables["histogram"].num_rows,
        "sha256": _digest([tables[name] for name in ("thresholds", "histogram", "vocabulary")]),
    }


def _commit(row: dict[str, Any]) -> Commit:
    """The commit of one shard, from its row in the index of ``_write``."""
    counts = {
        **dict.fromkeys(COUNTS, 0),
        "documents": row["documents"],
        "tokens": row["tokens"],
        "windows": row["documents"],
        "forward_tokens": row["tokens"],
    }
    files = {
        table: CommitEntry(
            name=f"0-{table}.parquet",
            rows=row["rows"],
            bytes=row["bytes"],
            sha256=row["sha256"],
        )
        for table in layout.TABLES
    }
    return Commit(row["shard"], "0", files, counts, 1.0, {})


def _digest(tables: list[pa.Table]) -> str:
    """SHA-256 of the content of ``tables``, in hexadecimal."""
    digest = sha256()
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


def render(result: dict[str, Any], console: Console) -> None:
    """Print a table with a column for each executor."""
    machine.print_facts(machine.facts("cpu"), console)
    console.print(
        "\n"
        f"{result['shards']:,} shards, {result['tokens']:,} tokens, {result['bytes'] / 1e6:,.0f} "
        f"MB of summaries; n = {result['repeat']}, median (lowest-highest)",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("", *EXECUTORS):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "seconds": lambda r: r["seconds"],
        "summaries/s": lambda r: result["shards"] / r["seconds"],
        "tokens/s": lambda r: result["tokens"] / r["seconds"],
        "driver before the reduce, MB": lambda r: r["before_bytes"] / 1e6,
        "driver at its peak, MB": lambda r: r["driver_bytes"] / 1e6,
        "all processes at their peak, MB": lambda r: r["peak_bytes"] / 1e6,
    }
    for name, of in figures.items():
        values = [list(map(of, rounds)) for rounds in result["rounds"].values()]
        table.add_row(
            name, *(f"{statistics.median(v):,.0f} ({min(v):,.0f}-{max(v):,.0f})" for v in values)
        )
    console.print(table)
    console.print()
    for executor, what in EXECUTORS.items():
        console.print(f"{executor}: {what}", markup=False)
    same = "have the same bits" if result["identical"] else "DIFFER"
    console.print(
        f"Tables of all {len(EXECUTORS) * result['repeat']} reduces, each in an order of its own, "
        f"{same}: {result['types']:,} types, {result['strengths']:,} distinct strengths. Others "
        f"took up to {result['foreign']:.0%} of the cores meanwhile.",
        markup=False,
    )


if __name__ == "__main__":
    print(json.dumps(_reduce(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
