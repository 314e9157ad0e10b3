"""Measure what groups add to the reduce of a generated run with its scan.

    PYTHONPATH=tests python -m bench.groups STORE SHARDS GROUP_BY

reduces the shards in STORE once, grouped by the kept column GROUP_BY (empty: not at all), and
prints one line of JSON. Each reduce has a separate process.
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
from functools import partial
from typing import Any

from rich.console import Console

from afn_ray import cgroup, kept
from afn_ray.bench import machine
from afn_ray.reduce import losses, screen, tree
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import TokenTexts
from afn_ray.store import shard_files
from bench import sql
from bench.apart import call_apart

CALLS = {"without": "", "with": sql.GROUP}
"""Groupings that take turns, by name."""


def measure(
    num_tokens: int, num_groups: int, repeat: int, on_note: Callable[[str], None]
) -> dict[str, Any]:
    """CPU seconds of ``repeat`` reduces without and with groups, in turn, as ``--json`` has them.

    The documents belong to ``num_groups`` groups in turn.
    """
    num_shards = -(-num_tokens // sql.SHARD_TOKENS)
    num_documents = max(1, num_tokens // num_shards // sql.DOCUMENT_TOKENS)
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CALLS}
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as store:
        with ProcessPoolExecutor(cgroup.num_cores(), mp_context=spawn) as pool:
            write = partial(
                sql.write_shard, store, num_documents=num_documents, num_groups=num_groups
            )
            list(pool.map(write, range(num_shards)))
        on_note(f"{num_shards:,} shards are written")
        for at in range(repeat):
            for name, group_by in CALLS.items():
                answer, watch = call_apart("bench.groups", store, num_shards, group_by)
                found[name].append({**answer, "peak_bytes": watch.peak_bytes})
                on_note(f"{name} groups {at + 1}/{repeat}: {answer['cpu_s']:.1f} s")
    return {
        **machine.facts("cpu"),
        "tokens": num_shards * num_documents * sql.DOCUMENT_TOKENS,
        "groups": num_groups,
        "repeat": repeat,
        "rounds": found,
    }


def _reduce(store: str, num_shards: int, group_by: str) -> dict[str, Any]:
    """Reduce and scan the first ``num_shards`` shards in this process."""
    shards = [sql.shard_of(store, number) for number in range(num_shards)]
    commits = shard_files.find_commits(store, sql.MEASURE.id, shards)
    ordered = [commits[shard.id] for shard in shards]
    committed = CommittedShards(
        store, sql.MEASURE.id, ordered, [1] * num_shards, kept.parse(sql.GROUP)
    )
    texts = TokenTexts(*sql.pieces())
    began = time.process_time()
    tables = tree.reduce_run(
        committed, tree.RecordedSeries((sql.SERIES,)), texts, tree.LabelRules("en", 10.0)
    )
    reduced = time.process_time()
    tables["files"] = losses.files_table(committed, shards, ())
    asked = screen.Asked(1000, group_by or None)
    tables |= screen.scan_run(committed, (sql.LAYER,), tables, texts.readable, asked)
    ended = time.process_time()
    groups = tables["groups"].num_rows if group_by else 0
    return {"cpu_s": ended - began, "scan_cpu_s": ended - reduced, "groups": groups}


def render(result: dict[str, Any], console: Console) -> None:
    """Print the seconds without and with groups, and the share that they add."""
    machine.print_facts(machine.facts("cpu"), console)
    console.print(
        f"\n{result['tokens']:,} tokens of {result['groups']} groups in turn; CPU seconds of the "
        f"reduce with its scan, n = {result['repeat']} in turn, median (lowest-highest)"
    )
    medians = {}
    for name, rounds in result["rounds"].items():
        seconds = [r["cpu_s"] for r in rounds]
        medians[name] = statistics.median(seconds)
        peak = max(r["peak_bytes"] for r in rounds) / 1e6
        console.print(
            f"{name} groups: {medians[name]:.1f} ({min(seconds):.1f}-{max(seconds):.1f}), "
            f"at most {peak:,.0f} MB"
        )
    console.print(f"Groups add {medians['with'] / medians['without'] - 1:.1%}.")


if __name__ == "__main__":
    print(json.dumps(_reduce(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
