"""Measure the cost of each signal and of a sweep of all layers, compared with strength alone.

It measures whole shards, including their files.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from afn_ray import model
from afn_ray.bench import machine
from afn_ray.bench.contest import one_layer
from afn_ray.bench.rate import one_core
from afn_ray.bench.texts import Writer, save_bert
from afn_ray.config import RunConfig
from afn_ray.errors import ModelError
from afn_ray.mean_texts import to_text
from afn_ray.model.signals import DIMENSIONS, known
from afn_ray.runs import measurer, worker
from afn_ray.runs.plan import make_plan
from afn_ray.schema import STRENGTH
from afn_ray.store import plans

PROFILE = "mixed"
"""Profile of the texts' lengths."""
ALONE = "strength"
SWEEP = "strength, layers 0 to k"
WITHIN = 0.10
"""Largest cost of a sweep, as a share of the time of layer k alone."""


def measure(
    name: str | None,
    layer: str,
    num_tokens: int,
    device: str,
    repeat: int,
    on_note: Callable[[str], None],
) -> dict[str, Any]:
    """Tokens per second for each set of signals, as ``--json`` writes them.

    The sets take turns, ``repeat`` times. On a CPU the whole process uses one core, as a worker
    does beside others, so reading, tokenizing and writing take time from the model. A signal that
    the model cannot give is left out.
    """
    device = model.choose_device(device)
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as scratch, one_core(device):
        folder = str(save_bert(Path(scratch) / "model")) if name is None else name
        files = model.find_model(folder, None, trust_remote_code=False, allow_pickle=False)
        k = one_layer(layer, files.depth)
        dtype = "bfloat16" if model.has_fast_products("bfloat16", device) else "float32"
        asked = {ALONE: (str(k), STRENGTH), SWEEP: (",".join(map(str, range(k + 1))), STRENGTH)}
        asked |= {f"+ {signal}": (str(k), signal) for signal in known() if signal != STRENGTH}
        jobs: dict[str, _Job] = {}
        for variant, (layers, signals) in asked.items():
            config = RunConfig(
                corpus=(str(Path(scratch) / "corpus.jsonl"),),
                model=folder,
                store=str(Path(scratch) / "store"),
                layers=layers,
                signals=signals,
                dtype=dtype,
                device=device,
                executor="inline",
                scratch=scratch,
            )
            try:
                jobs[variant] = _Job(config, files)
            except ModelError as error:
                on_note(f"{variant} is left out: {error}")
        _write_corpus(Path(scratch) / "corpus.jsonl", files, jobs[ALONE], num_tokens)
        plan = make_plan(jobs[ALONE].config)
        taken: dict[str, list[float]] = {variant: [] for variant in jobs}
        n_tokens, sizes = 0, {}
        with machine.Watch([os.getpid()]) as watch:
            for turn in range(-1, repeat):  # the first warms up
                for variant, job in jobs.items():
                    seconds, n_tokens, sizes[variant] = job.run(plan)
                    if turn >= 0:
                        taken[variant].append(seconds)
                    on_note(
                        f"{variant}: {n_tokens / seconds:,.0f} tokens/s"
                        + (" (warm-up)" if turn < 0 else "")
                    )
        for job in jobs.values():
            job.close()
    return {
        **machine.facts(device),
        "model": name or "BERT-base shape, random weights",
        "device": device,
        "dtype": dtype,
        "layer": k,
        "depth": files.depth,
        "tokens": n_tokens,
        "repeat": repeat,
        "foreign": round(watch.foreign, 3),
        "variants": {
            variant: {
                "tokens_per_second": [n_tokens / s for s in seconds],
                "cost": [s / alone - 1 for s, alone in zip(seconds, taken[ALONE], strict=True)],
                "bytes_per_token": {
                    table: size / n_tokens for table, size in sizes[variant].items()
                },
            }
            for variant, seconds in taken.items()
        },
    }


class _Job:
    """A loaded worker that records one set of signals."""

    def __init__(self, config: RunConfig, files: model.ModelFiles) -> None:
        self.config = config
        task = worker.prepare(config, files, config.device, config.dtype)
        if worker.wants(task, "outliers"):  # the choice of dimensions does not change the cost
            outliers = (tuple(range(DIMENSIONS)),) * len(task.measure.layers)
            task = replace(task, measure=replace(task.measure, outliers=outliers))
        if worker.wants(task, "mean"):  # nor does the mean state
            mean = to_text(np.ones(files.hidden_size))
            means = (mean,) * len(task.measure.layers)
            task = replace(task, measure=replace(task.measure, means=means))
        self._task = task
        self.processor = worker.Processor(task)
        self._num_runs = 0

    def run(self, plan: plans.Plan) -> tuple[float, int, dict[str, int]]:
        """Measure and commit the shards of ``plan`` in a fresh store, which is then removed.

        Returns seconds, tokens, and bytes by table.
        """
        self._num_runs += 1
        store = f"{self.config.store}-{self._num_runs}"
        self.processor.task = replace(self._task, config=replace(self.config, store=store))
        began = time.monotonic()
        commits = [self.processor.process(shard) for shard in plan.shards]
        seconds = time.monotonic() - began
        shutil.rmtree(store)
        sizes = {table: sum(c.files[table]["bytes"] for c in commits) for table in commits[0].files}
        return seconds, sum(c.counts["tokens"] for c in commits), sizes

    def close(self) -> None:
        self.processor.close()


def _write_corpus(path: Path, files: model.ModelFiles, job: _Job, num_tokens: int) -> None:
    window = min(files.context_tokens, model.DEFAULT_WINDOW_TOKENS)
    writer = Writer(model.load_tokenizer(files), window)
    batch = measurer.BATCH_TOKENS[job.config.device]
    texts = writer.write(PROFILE, num_tokens, batch, causal=job.processor.measurer.model.causal)
    path.write_text("".join(json.dumps({"text": t.text}) + "\n" for t in texts), "utf-8")


def render(result: dict[str, Any], console: Console) -> None:
    """Print a table with a row for each set of signals, and whether the sweep meets its bar."""
    machine.print_facts(machine.facts(result["device"]), console)
    title = (
        f"\n{result['model']}: k is layer {result['layer']} of {result['depth']}, {result['dtype']}"
    )
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for heading in ("recorded", "tokens/s", "cost", "from", "to", "bytes a token"):
        table.add_column(
            heading, justify="left" if heading == "recorded" else "right", no_wrap=True
        )
    for variant, found in result["variants"].items():
        costs, sizes = found["cost"], found["bytes_per_token"]
        beside = sizes.get("neurons", 0) + sizes.get("pairs", 0)
        size = f"{sizes['tokens']:.1f}" + (f" + {beside:.0f}" if beside else "")
        figures = (
            ("", "", "")
            if variant == ALONE
            else (f"{statistics.median(costs):+.1%}", f"{min(costs):+.1%}", f"{max(costs):+.1%}")
        )
        table.add_row(
            variant, f"{statistics.median(found['tokens_per_second']):,.0f}", *figures, size
        )
    console.print(table)
    console.print(
        "\n"
        "cost: time beside strength at layer k alone, median, least and most of "
        f"{result['repeat']} turns over {result['tokens']:,} tokens, from JSONL to committed "
        "Parquet, one worker; bytes: of the tokens table, and of neurons with their counts. "
        f"Others took {result['foreign']:.0%} of the cores meanwhile.",
        markup=False,
    )
    sweep = statistics.median(result["variants"][SWEEP]["cost"])
    console.print(
        f"A sweep of all layers costs {sweep:+.1%}; the bar is {WITHIN:.0%}: "
        f"{'met' if sweep < WITHIN else 'not met'}.",
        markup=False,
    )
