"""Measure the demo end to end: time, tokens per second, bytes per token and peak memory.

It measures the same command a second time too, when the run is already finished.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from afn_ray.bench.machine import Watch, facts, print_facts
from afn_ray.errors import AfnError
from afn_ray.query import database
from afn_ray.runs import demo
from afn_ray.store import manifest


def measure(workers: int | None, repeat: int, on_note: Callable[[str], None]) -> dict[str, Any]:
    """The figures of ``repeat`` fresh demos with ``workers``, each in a temporary folder.

    Raises ``AfnError``, also when the packages of the demo are not installed.
    """
    demo.corpus_file()  # raises here, not in another process, when the extra is not installed
    rows = []
    for number in range(repeat):
        rows.append(_measured(workers))
        on_note(f"{number + 1} of {repeat}: {rows[-1]['demo, s']:.1f} s")
    return {
        **facts("cpu"),
        "repeat": repeat,
        "figures": {name: [row[name] for row in rows] for name in rows[0]},
    }


def render(result: dict[str, Any], console: Console) -> None:
    """Print the median and the range of each figure."""
    print_facts(facts("cpu"), console)
    console.print(f"n = {result['repeat']}, median (lowest-highest)", markup=False)
    for name, values in result["figures"].items():
        line = (
            f"{name:<44} {statistics.median(values):>12,.3f} "
            f"({min(values):,.3f}-{max(values):,.3f})"
        )
        console.print(line, markup=False)


def _measured(workers: int | None) -> dict[str, float]:
    """The figures of one fresh demo, of the same command again, and of one query."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        command = [sys.executable, "-m", "afn_ray", "demo", "--store", store]
        command += ["--workers", str(workers)] if workers else []
        seconds, peak = timed(command)
        again, _ = timed(command)
        run = manifest.find_run(store)
        asked = [*command[:3], "show", store, "--json"]
        summary = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
        began = time.monotonic()
        with database.open_run(store) as opened:
            opening = time.monotonic() - began
            began = time.monotonic()
            opened.sql(
                "SELECT class, sum(n_high) / sum(n) FROM vocabulary GROUP BY ALL ORDER BY ALL"
            ).fetchall()
            asking = time.monotonic() - began
        size = manifest.read_table(run, "shards").to_pylist()
        tokens = run.info["counts"]["tokens"]
        work = sum(s["seconds"] for s in size)
        return {
            "demo, s": seconds,
            "tokens/s, whole demo": tokens / seconds,
            "tokens/s of one worker": tokens / work,
            "peak memory of all processes, MB": peak / 1e6,
            "the demo again, s": again,
            "bytes/token, tokens table (2 layers, offsets)": summary["bytes_per_token"]["tokens"],
            "bytes/token, whole store": summary["bytes_per_token"]["all"],
            "opening the run, s": opening,
            "a question to the vocabulary, s": asking,
        }


def timed(command: list[str]) -> tuple[float, int]:
    """Run ``command``; return its seconds and its peak memory in bytes.

    The memory is the highest sum of the proportional set sizes of its processes. Raises
    ``AfnError`` when the command fails.
    """
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with Watch([process.pid]) as watch:
        code = process.wait()
    seconds = time.monotonic() - began
    if code != 0:
        raise AfnError(f"{' '.join(command)} left with {code}")
    return seconds, watch.peak_bytes
