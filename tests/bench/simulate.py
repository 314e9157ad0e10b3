"""Measure the driver of a huge run: real plan, dispatcher, status and reduce, simulated workers.

    PYTHONPATH=tests python -m bench.simulate SHARDS WORKERS SEED

runs one simulation and prints one line of JSON. Each simulation has a separate process, to measure
its memory alone. It asserts that every shard ends exactly once, whatever fails. Ray, the metrics
and the merges of the reduce do not run; the time in Ray is estimated.
"""

from __future__ import annotations

import json
import logging
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from afn_ray import logs
from afn_ray.bench import machine
from afn_ray.config import RunConfig
from afn_ray.corpus_values import FileSlice, Shard
from afn_ray.measure import Measure
from afn_ray.reduce import tasks
from afn_ray.reduce import tree as reduce
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import STATISTICS_SCHEMA, TokenTexts
from afn_ray.runs import dispatch
from afn_ray.runs.dispatch import ATTEMPTS
from afn_ray.runs.outcome import State
from afn_ray.runs.plan import group_slices
from afn_ray.runs.progress import Progress
from afn_ray.runs.reporter import reported
from afn_ray.schema import HISTOGRAM_SCHEMA, SCHEMA_VERSION, Series
from afn_ray.store import checksums, layout, plans, run_claims, shard_files, storage, uris
from afn_ray.store.commits import Commits
from bench.apart import call_apart
from bench.crowd import FILE_SHARDS, SHARD_BYTES, SHARD_S, SHARD_TOKENS, Crowd, arrived

COMMITS_READ = 2_000
"""Number of commits that are written to the local disk and found again."""
SERIES = Series("strength", 8)
MEASURE = Measure((), "simulated", (8,), ("strength",), (SERIES,), 512, 128, True, "float32")
MEASURE_ID = "0" * 32
RAY_WAIT_MS, RAY_CALL_MS = 1.5, 0.14
"""CPU time of the driver in Ray, in milliseconds, measured with a local Ray 2.60 on an AMD EPYC.

The first is two ``ray.wait`` over 3,000 running tasks (n = 60). The second is a call of an actor,
with its result (n = 1,000).
"""


def measure(
    num_shards: int, num_workers: int, repeat: int, on_note: Callable[[str], None]
) -> dict[str, Any]:
    """Run ``simulate`` with the seeds from 0, each in a separate process.

    The result is as ``--json`` writes it.
    """
    rounds = []
    for seed in range(repeat):
        answer, watch = call_apart("bench.simulate", num_shards, num_workers, seed)
        rounds.append({**answer, "foreign": round(watch.foreign, 3)})
        on_note(f"{seed + 1}/{repeat}: {rounds[-1]['cpu_s']:.0f} s of CPU of the driver")
    return {
        **machine.facts("cpu"),
        "shards": num_shards,
        "workers": num_workers,
        "repeat": repeat,
        "rounds": rounds,
    }


class Meter:
    """Measures CPU seconds of this thread by part; a part excludes the parts inside it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._at = time.thread_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._switch()
        self._parts.append(name)
        try:
            yield
        finally:
            self._switch()
            self._parts.pop()

    def _switch(self) -> None:
        now = time.thread_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._at
        self._at = now

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            with self.part(name):
                return call(*args)

        return measured


class Tree:
    """``reduce.Tasks`` that does no work, but counts the summaries in each part's sum.

    It asserts that all parts have the same number. ``calls`` counts the tasks by function.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.most_args = 0

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        name = function.__name__.strip("_")
        self.calls[name] += 1
        self.most_args = max(self.most_args, len(args))
        if name == "read":
            assert len(args[0]) <= tasks.FAN_IN
            return [len(args[0])] * num_results
        if name == "merge":
            return [sum(args[1:])]
        if name == "count":
            return [args[0]]
        if name == "total":
            (num_shards,) = set(args[3:])  # all parts have the same shards
            row = {"n": num_shards * SHARD_TOKENS, "n_special": 0, "layer": SERIES.layer, "q3": 1.0}
            return [[row], [row], HISTOGRAM_SCHEMA.empty_table()]
        return [STATISTICS_SCHEMA.empty_table()]

    def result(self, handle: Any) -> Any:
        return handle


def plan_of(num_shards: int) -> plans.Plan:
    """The plan of a corpus of large files with ``num_shards`` shards in all."""
    config = RunConfig(corpus=("-",), model="-", store="-")
    slices: list[FileSlice] = []
    for file in range(-(-num_shards // FILE_SHARDS)):
        uri, version = f"s3://bucket/corpus/part-{file:06d}.jsonl", f"etag:{file:032x}"
        for at in range(min(FILE_SHARDS, num_shards - len(slices))):
            start = at * SHARD_BYTES
            slices.append(
                FileSlice(
                    uri,
                    FILE_SHARDS * SHARD_BYTES,
                    version,
                    "jsonl",
                    "",
                    start,
                    start + SHARD_BYTES,
                    SHARD_BYTES,
                    SHARD_TOKENS // 200,
                    f"{len(slices):064x}",
                )
            )
    groups = group_slices(slices, SHARD_BYTES)
    shards = tuple(Shard.of(group, config.read_options) for group in groups)
    assert len(shards) == num_shards
    return plans.Plan(shards, (), (), 0)


def simulate(num_shards: int, num_workers: int, seed: int) -> dict[str, Any]:
    """Simulate one run from its plan to its reduced tables; return its figures.

    Asserts that every shard ends exactly once.
    """
    meter = Meter()
    resident = [("at the start", machine.own_memory_bytes("VmRSS"))]

    def remember(name: str) -> None:
        resident.append((name, machine.own_memory_bytes("VmRSS")))

    with meter.part("plan"):
        plan = plan_of(num_shards)
    remember("with the plan")
    crowd = Crowd(plan.shards, num_workers, seed)
    for name in ("grow", "assign", "wait", "replace", "release"):
        setattr(crowd, name, meter.wrap("(the crowd)", getattr(crowd, name)))
    looks = Counter[str]()
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as store:
        config = RunConfig(corpus=("-",), model="-", store=store)
        with meter.part("begin the run"):
            folder = run_claims.begin_run(config, MEASURE, plan, time.time_ns()).run
        remember("with the run begun")
        commit_us = _find_some(store, plan.shards[:COMMITS_READ])
        with reported(config) as reporter:
            report = meter.wrap("status", reporter.working)
            meter.wrap("status", reporter.begin)(folder, plan.shards, Commits())

            def on_progress(progress: Progress) -> None:
                looks["looks"] += 1
                report(progress)

            dispatcher = dispatch.Dispatcher(
                crowd,
                plan.shards,
                on_progress,
                dispatch.Tolerance(wait_s=1e9, allow_quarantined=num_shards),
                clock=crowd.clock,
            )
            for method, name in (
                ("_assign_shards", "assign"),
                ("_handle", "events"),
                ("_check_workers", "check workers"),
            ):
                setattr(dispatcher, method, meter.wrap(name, getattr(dispatcher, method)))
            with meter.part("loop"):
                state = dispatcher.run()
        told = json.loads(storage.read_bytes(uris.join(folder.uri, layout.STATUS)))
    remember("with all commits")
    _check(plan, crowd, state)
    shards = told["shards"]
    assert (shards["done"], shards["quarantined"]) == (len(state.commits), len(state.failures)), (
        "a status that lags"
    )
    done = [s for s in plan.shards if s.id in state.commits]
    ordered = state.commits.in_order(s.id for s in done)
    tree = Tree()
    with meter.part("reduce"):
        tables = reduce.reduce_run(
            CommittedShards("-", MEASURE_ID, ordered, [s.num_bytes for s in done]),
            reduce.RecordedSeries((SERIES,)),
            TokenTexts((), ()),
            reduce.LabelRules("en", 10.0),
            tree,
        )
    assert tables["shards"].num_rows == len(done)
    remember("with the reduce planned")
    crowd_s = meter.seconds.pop("(the crowd)")
    return {
        "shards": num_shards,
        "workers": num_workers,
        "seed": seed,
        "hours": crowd.now / 3600,
        "cpu_s": sum(meter.seconds.values()),
        "crowd_s": crowd_s,
        "parts_s": dict(meter.seconds),
        "find_commits_us": commit_us,
        "resident_bytes": dict(resident),
        "peak_bytes": machine.own_memory_bytes("VmHWM"),
        "attempts": crowd.num_attempts,
        "retries": state.retries,
        "quarantined": len(state.failures),
        "happened": dict(crowd.happened),
        "looks": looks["looks"],
        "calls": dict(tree.calls),
        "most_args": tree.most_args,
    }


def _check(plan: plans.Plan, crowd: Crowd, state: State) -> None:
    """Assert that each shard ended once: committed, or quarantined through its own fault."""
    assert not state.stopped, state.stopped
    planned = {s.id for s in plan.shards}
    assert len(state.commits) + len(state.failures) == len(planned) == len(plan.shards)
    assert set(state.commits) | state.failures.keys() == planned
    assert set(state.commits) <= crowd.committed, "a commit that the store does not have"
    assert all(crowd.faults[shard] >= ATTEMPTS for shard in state.failures), (
        "quarantined without its own fault"
    )
    assert crowd.poison.keys() <= state.failures.keys(), "a poison was committed"


def _find_some(store: str, shards: Sequence[Shard]) -> float:
    """Write commits of ``shards`` to ``store``; return the CPU time to find one, in us."""
    for shard in shards:
        commit = arrived(shard.id)
        body = {
            "schema_version": SCHEMA_VERSION,
            "measure": MEASURE_ID,
            **asdict(commit),
            "slices": [asdict(s) for s in shard.slices],
            "options": asdict(shard.options),
        }
        folder = shard_files.shard_uri(store, MEASURE_ID, shard.id)
        storage.write_once(uris.join(folder, "commit.json"), checksums.checksummed(body))
    began = time.process_time()
    assert len(shard_files.find_commits(store, MEASURE_ID, shards)) == len(shards)
    return (time.process_time() - began) / len(shards) * 1e6


def render(result: dict[str, Any], console: Console) -> None:
    """Print the driver's CPU and memory by part, its bottleneck, and the faults of the run."""
    machine.print_facts(machine.facts("cpu"), console)
    rounds, n = result["rounds"], result["shards"]
    hours = statistics.median(r["hours"] for r in rounds)
    console.print(
        "\n"
        f"{n:,} shards of {SHARD_S:g} s on {result['workers']:,} workers, {hours:,.1f} simulated "
        f"hours; n = {result['repeat']}, median (lowest-highest)",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("the driver", "", ""):
        table.add_column(heading, justify="right" if not heading else "left", no_wrap=True)

    def row(name: str, unit: str, of: Callable[[dict[str, Any]], float]) -> None:
        values = [of(r) for r in rounds]
        table.add_row(
            name,
            f"{statistics.median(values):,.1f}",
            f"({min(values):,.1f}-{max(values):,.1f}) {unit}",
        )

    row("CPU in all", "s", lambda r: r["cpu_s"])
    row("CPU for a shard", "us", lambda r: r["cpu_s"] / n * 1e6)
    parts = sorted(rounds[0]["parts_s"], key=lambda part: -rounds[0]["parts_s"][part])
    for part in parts:
        row(f"  {part}", "us a shard", lambda r, part=part: r["parts_s"][part] / n * 1e6)  # type: ignore[misc]
    row("to find a commit again", "us", lambda r: r["find_commits_us"])
    row("inside Ray beside that, reckoned", "ms a shard", lambda r: ray_ms(r))
    row("memory at its peak", "MB", lambda r: r["peak_bytes"] / 1e6)
    for name in list(rounds[0]["resident_bytes"])[1:]:
        row(
            f"  {name}",
            "bytes a shard more than at the start",
            lambda r, name=name: grown(r, name),  # type: ignore[misc]
        )
    console.print(table)
    one = rounds[0]
    told = ", ".join(f"{number:,} {what}" for what, number in sorted(one["happened"].items()))
    console.print(
        "\n"
        f"Of seed 0: {told}; {one['attempts']:,} attempts, {one['attempts'] / n - 1:.2%} more "
        f"than shards; {one['quarantined']:,} quarantined, each by its own fault; every other "
        "committed once. Calls of the reduce: "
        f"{', '.join(f'{number:,} {name}' for name, number in one['calls'].items())}. Most of the "
        f"driver's own time goes into: {parts[0]}. Others took up to "
        f"{max(r['foreign'] for r in rounds):.0%} of the cores meanwhile.",
        markup=False,
    )


def grown(run: dict[str, Any], name: str) -> float:
    """Growth of the driver's memory from its start to ``name``, in bytes per shard."""
    resident = run["resident_bytes"]
    return float(resident[name] - resident["at the start"]) / int(run["shards"])


def ray_ms(run: dict[str, Any]) -> float:
    """Estimated CPU time of the driver in Ray, in milliseconds per shard.

    It covers assigning the shard, its event, and its share of the heartbeats and of the reduce.
    """
    looks = run["looks"] * run["workers"] / run["shards"]
    calls = sum(run["calls"].values()) / run["shards"]
    return float(RAY_WAIT_MS + RAY_CALL_MS * (run["attempts"] / run["shards"] + looks + calls))


if __name__ == "__main__":
    # Without this handler, thousands of simulated losses are printed.
    logging.getLogger(logs.ROOT).addHandler(logging.NullHandler())
    print(json.dumps(simulate(*map(int, sys.argv[1:4]))))
