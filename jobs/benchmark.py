"""Measures the demo end to end: wall time, tokens per second, bytes per token, peak memory, and the second run.

    python jobs/benchmark.py --repeat 3

Every repetition starts a fresh store in a temporary folder. Prints one table: the median and the spread
(lowest to highest) of each figure, with the machine and the versions. Reads /proc, so it needs Linux.

    python jobs/benchmark.py engine --json figures.json
    python jobs/benchmark.py monitor
    python jobs/benchmark.py reduce --shards 10000
    python jobs/benchmark.py safety --store s3://bucket/prefix
    python jobs/benchmark.py screen
    python jobs/benchmark.py sql --rows 100000000

are ``afn bench``, for a node of a cluster: ``ray job submit --working-dir . -- python jobs/benchmark.py engine``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import afn_ray
from afn_ray import cli, manifest, show
from afn_ray.bench.machine import Watch, cpu_name


def main() -> None:
    if sys.argv[1:2] in ([name] for name in ("engine", "monitor", "reduce", "safety", "screen", "sql")):
        cli.main(["bench", *sys.argv[1:]])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="fresh runs of the demo (default: 3)")
    parser.add_argument("--workers", type=int, help="workers (default: one per core)")
    args = parser.parse_args()
    rows = [measure(args.workers) for _ in range(args.repeat)]
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, "
          f"torch {version('torch')}, ray {version('ray')}; n = {args.repeat}, median (lowest-highest)")  # fmt: skip
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:<44} {statistics.median(values):>12,.3f} ({min(values):,.3f}-{max(values):,.3f})")


def measure(workers: int | None) -> dict[str, float]:
    """One fresh demo, one that finds it done, and one question, with their figures."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        command = [sys.executable, "-m", "afn_ray", "demo", "--store", store]
        command += ["--workers", str(workers)] if workers else []
        seconds, peak = timed(command)
        again, _ = timed(command)
        run = manifest.find_run(store)
        summary = show.summarise(run)
        began = time.monotonic()
        with afn_ray.open_run(store) as opened:
            opening = time.monotonic() - began
            began = time.monotonic()
            opened.sql("SELECT class, sum(n_high) / sum(n) FROM vocabulary GROUP BY ALL ORDER BY ALL").fetchall()
            asking = time.monotonic() - began
        size = manifest.read_table(run, "shards").to_pylist()
        tokens = summary.info["counts"]["tokens"]
        work = sum(s["seconds"] for s in size)
        return {
            "demo, s": seconds,
            "tokens/s, whole demo": tokens / seconds,
            "tokens/s of one worker": tokens / work,
            "peak memory of all processes, MB": peak / 1e6,
            "the demo again, s": again,
            "bytes/token, tokens table (2 layers, offsets)": summary.bytes_per_token["tokens"],
            "bytes/token, whole store": summary.bytes_per_token["all"],
            "opening the run, s": opening,
            "a question to the vocabulary, s": asking,
        }


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds that ``command`` took and the highest sum of its processes' proportional memory, in bytes."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Watch([process.pid]) as watch:
        code = process.wait()
    seconds = time.monotonic() - began
    if code != 0:
        sys.exit(f"{' '.join(command)} left with {code}")
    return seconds, watch.peak_bytes


if __name__ == "__main__":
    main()
