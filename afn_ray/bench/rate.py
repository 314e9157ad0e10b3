"""Measure the tokens per second of one worker on a run's own corpus, on this machine.

``afn run --dry-run --rate`` reads the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from afn_ray import model
from afn_ray.bench import LEAST_S, TOKENS_PER_WORKER, machine, more_passes
from afn_ray.bench.machine import MachineFacts
from afn_ray.config import RunConfig
from afn_ray.corpus import listing
from afn_ray.corpus_values import Shard
from afn_ray.errors import CorpusError
from afn_ray.runs import plan, precheck, preparation, worker
from afn_ray.runs.cluster import placement
from afn_ray.runs.deadlines import SLOTS
from afn_ray.runs.events import Event
from afn_ray.runs.rates import Speed, speed_of

SAMPLE_DOCUMENTS = 2000
"""Largest number of documents that are measured."""
NUM_SHARDS = 3
"""Number of shards of the texts.

As in a run, one shard is read while another is measured and a third is written.
"""
CHARS_A_TOKEN = 4
"""Assumed length of a token, in characters."""


class RateResult(MachineFacts):
    """The tokens per second of one worker, as ``--json`` writes them."""

    model: str
    tokens: int
    repeat: int
    foreign: float
    load_s: float
    tokens_per_second: list[float]
    speed: Speed


def measure(
    config: RunConfig, num_tokens: int | None, repeat: int, on_note: Callable[[str], None]
) -> RateResult:
    """Tokens per second on the config's own corpus.

    It measures about ``num_tokens`` tokens from the documents of ``listing.sample``, and repeats
    the documents when they are too few; without ``num_tokens``, as many as take ``LEAST_S``. It
    does so ``repeat`` times, each in a fresh store. On a CPU the whole process uses one core, as a
    worker does beside others. Raises ``CorpusError`` when no document has text.
    """
    config = precheck.normalised(config)
    texts = sample_texts(config, config.corpus)
    with tempfile.TemporaryDirectory(prefix="afn-bench-", dir=config.scratch) as name:
        folder = Path(name)
        asked = _in_folder(config, folder)
        device = model.choose_device(config.device)
        least_s = 0.0 if num_tokens else LEAST_S[device]
        num_tokens = num_tokens or TOKENS_PER_WORKER[device] * NUM_SHARDS
        num_bytes = write_corpus(folder / "corpus.jsonl", texts, num_tokens * CHARS_A_TOKEN)
        asked = replace(asked, shard_bytes=max(1024, num_bytes // NUM_SHARDS))

        def note(event: Event) -> None:
            if event.message:
                on_note(event.message)

        with one_core(device):
            prepared = preparation.prepare(asked, note, keep=False)
            task = prepared.task
            placed = placement.place(task.config, [placement.this_machine()], device)
            config = replace(task.config, tokenizer_workers=placed.tokenizer_workers)
            task = replace(task, config=config)
            began = time.monotonic()
            processor = worker.Processor(task)
            load_s = time.monotonic() - began
            rates, counted = [], 0
            with machine.Watch([os.getpid()]) as watch:
                shards = _warm_up(processor, prepared.plan.shards, asked, texts, least_s, on_note)
                for turn in range(repeat):
                    seconds, counted = process_all(processor, shards, f"{asked.store}-{turn}")
                    rates.append(counted / seconds)
                    on_note(f"{rates[-1]:,.0f} tokens/s")
            processor.close()
    return {
        **machine.facts(device),
        "model": config.model,
        "tokens": counted,
        "repeat": repeat,
        "foreign": round(watch.foreign, 3),
        "load_s": load_s,
        "tokens_per_second": rates,
        "speed": speed_of(task),
    }


def _in_folder(config: RunConfig, folder: Path) -> RunConfig:
    """``config`` with a JSONL corpus and a store in ``folder``, in this process."""
    return replace(
        config,
        corpus=(str(folder / "corpus.jsonl"),),
        store=str(folder / "store"),
        scratch=str(folder),
        format="auto",
        text_column="text",
        id_column=None,
        labels=None,
        executor="inline",
    )


def sample_texts(config: RunConfig, corpus: Sequence[str]) -> list[str]:
    """Texts of a sample of ``corpus``, read as ``config`` says. Raises ``CorpusError``."""
    files, _ = listing.list_files(corpus, config.read_options)
    texts = [d.text for d in listing.sample(files, config.read_options, SAMPLE_DOCUMENTS) if d.text]
    if not texts:
        raise CorpusError(f"no document to measure in {', '.join(corpus)}")
    return texts


def _warm_up(
    processor: worker.Processor,
    shards: Sequence[Shard],
    config: RunConfig,
    texts: Sequence[str],
    least_s: float,
    on_note: Callable[[str], None],
) -> Sequence[Shard]:
    """Process ``shards`` of ``config``, or more of their kind if they take less than ``least_s``.

    Returns the shards that took long enough. More come from ``texts``, written once more.
    """
    (first,) = map(Path, config.corpus)
    num_bytes, passes = first.stat().st_size, 1
    while True:
        seconds, counted = process_all(processor, shards, f"{config.store}-warm-up")
        on_note(f"{counted / seconds:,.0f} tokens/s (warm-up)")
        if seconds >= least_s:
            return shards
        passes = more_passes(passes, seconds, least_s)
        corpus = first.with_name(f"corpus-{passes}.jsonl")
        write_corpus(corpus, texts, passes * num_bytes)
        shards = plan.make_plan(replace(config, corpus=(str(corpus),))).shards


@contextlib.contextmanager
def one_core(device: str) -> Iterator[None]:
    """Restrict this process to one core while the block runs."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    if device == "cpu":
        os.sched_setaffinity(0, {min(before)})
        torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def write_corpus(path: Path, texts: Sequence[str], least_bytes: int) -> int:
    """Write ``texts``, repeated, as JSONL to ``path``; return the size, ``least_bytes`` or more."""
    size, at = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < least_bytes:
            size += file.write(json.dumps({"text": texts[at % len(texts)]}) + "\n")
            at += 1
    return size


def process_all(
    processor: worker.Processor, shards: Sequence[Shard], store: str
) -> tuple[float, int]:
    """Process ``shards`` in a fresh store, ``SLOTS`` at a time; return seconds and tokens."""
    task = processor.task
    processor.task = replace(task, config=replace(task.config, store=store))
    began = time.monotonic()
    with ThreadPoolExecutor(SLOTS) as pool:
        commits = list(pool.map(processor.process, shards))
    seconds = time.monotonic() - began
    shutil.rmtree(store)
    return seconds, sum(c.counts["tokens"] for c in commits)


def render(result: RateResult, console: Console) -> None:
    """Print what was measured, the rate with its spread, and the CPU use of other processes."""
    machine.print_facts(result, console)
    speed, rates = result["speed"], result["tokens_per_second"]
    console.print(
        f"{result['model']}: layers {', '.join(map(str, speed['layers']))}, "
        f"{', '.join(speed['signals'])}, {speed['dtype']} on {speed['device']}, windows of "
        f"{speed['window_tokens']}",
        markup=False,
    )
    console.print(
        f"{statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f}-{max(rates):,.0f}) of one "
        f"worker, from files to committed Parquet; n = {result['repeat']}, {result['tokens']:,} "
        f"tokens; loaded in {result['load_s']:.1f} s; others took {result['foreign']:.0%} of the "
        "cores",
        markup=False,
    )
