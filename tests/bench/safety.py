"""Measure the fixed cost of a shard, and the time to find that a run is finished."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from afn_ray.bench import machine, texts
from afn_ray.errors import AfnError
from afn_ray.store import uris

EXECUTORS = {"inline": 1, "ray": 2}
"""Number of workers, by executor."""
LINE_BYTES = 1100
"""Size of one document's line, in bytes: just over the smallest shard.

Most of the line is a column that is not read.
"""


def measure(
    num_shards: int, store: str | None, repeat: int, on_note: Callable[[str], None]
) -> dict[str, Any]:
    """Times of whole commands over ``num_shards`` shards of one word, and over a tenth of them.

    The commands take turns, ``repeat`` times; the result is as ``--json`` writes it. The model is
    minimal: one layer of width 32. Stores are created under the URI ``store`` and kept; without
    one, they are in a temporary folder and removed.
    """
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as name:
        folder = Path(name)
        stores = uris.join(
            uris.absolute(store) if store else name, f"safety-{uuid.uuid4().hex[:8]}"
        )
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        model = texts.save_bert(folder / "model", **shape)
        line = json.dumps({"text": "a", "pad": ""})
        line = json.dumps({"text": "a", "pad": "-" * (LINE_BYTES - len(line) - 1)}) + "\n"
        sizes = {"many": num_shards, "few": num_shards // 10}
        for kind, size in sizes.items():
            (folder / f"{kind}.jsonl").write_text(line * size, "ascii")
        found: dict[str, list[dict[str, float]]] = {executor: [] for executor in EXECUTORS}
        for at in range(repeat):
            for executor, rounds in found.items():

                def run(kind: str, at: int = at, executor: str = executor) -> float:
                    return _run(
                        folder / f"{kind}.jsonl",
                        model,
                        f"{stores}/{executor}-{at}-{kind}",
                        executor,
                    )

                many, few, again = run("many"), run("few"), run("many")
                ms = (many - few) * EXECUTORS[executor] / (sizes["many"] - sizes["few"]) * 1000
                rounds.append({"many_s": many, "few_s": few, "again_s": again, "overhead_ms": ms})
                on_note(
                    f"{executor} {at + 1}/{repeat}: {many:.1f} s for {sizes['many']:,} shards, "
                    f"{few:.1f} s for {sizes['few']:,}, {again:.1f} s again"
                )
    place = "local disk" if uris.is_local(stores) else stores.partition("://")[0]
    return {
        **machine.facts("cpu"),
        "shards": num_shards,
        "store": place,
        "repeat": repeat,
        "rounds": found,
    }


def _run(corpus: Path, model: Path, store: str, executor: str) -> float:
    """Seconds of one ``afn run``. Raises ``AfnError`` when it fails."""
    command = [
        sys.executable,
        "-m",
        "afn_ray",
        "run",
        str(corpus),
        "--model",
        str(model),
        "--store",
        store,
        "--layers",
        "1",
        "--dtype",
        "float32",
        "--batch-tokens",
        "16",
        "--shard-bytes",
        "1024",
        "--executor",
        executor,
        "--quiet",
        *(["--workers", str(EXECUTORS[executor])] if executor == "ray" else []),
    ]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise AfnError(
            f"{' '.join(command)} left with {done.returncode}: {done.stderr.strip()[-1000:]}"
        )
    return time.monotonic() - began


def render(result: dict[str, Any], console: Console) -> None:
    """Print a table with a column for each executor."""
    machine.print_facts(machine.facts("cpu"), console)
    console.print(
        "\n"
        f"{result['shards']:,} shards of one word each, store on {result['store']}; n = "
        f"{result['repeat']}, median (lowest-highest)",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in (
        "",
        *(f"{name}, {n} worker{'s' if n > 1 else ''}" for name, n in EXECUTORS.items()),
    ):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for key, what in (
        ("many_s", f"a run of {result['shards']:,} shards, s"),
        ("few_s", f"a run of {result['shards'] // 10:,}, s"),
        ("overhead_ms", "each further shard, ms of a worker"),
        ("again_s", "the finished run again, s"),
    ):
        values = [[r[key] for r in rounds] for rounds in result["rounds"].values()]
        table.add_row(
            what, *(f"{statistics.median(v):,.1f} ({min(v):,.1f}-{max(v):,.1f})" for v in values)
        )
    console.print(table)
    console.print(
        "\n"
        "Whole commands, start of Python included; each further shard: the difference of the first "
        "two."
    )
