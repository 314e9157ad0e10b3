"""Measure everything in a worker but the model: a whole worker whose model answers at once.

Its tokens per second bound what a worker can do on any device. The figures are microseconds of CPU
time per token, which other processes on the machine disturb little.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler  # as a pool of processes sends things
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from afn_ray import kept, model
from afn_ray.bench import BUILT_IN_TOKENIZER, TOKENS_PER_WORKER, machine, rate
from afn_ray.bench.texts import Writer, save_bert, save_bert_with
from afn_ray.config import RunConfig
from afn_ray.corpus import reading
from afn_ray.corpus_values import Shard
from afn_ray.model.engine import STRENGTH
from afn_ray.model.signals import Signal, measured
from afn_ray.model.type_sums import Chosen
from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.runs import measurer, plan, worker
from afn_ray.runs.recorder import Recorder
from afn_ray.store import plans, records
from afn_ray.tokens import feed, languages

STAGES = {
    "read": "JSONL files -> documents, in the worker",
    "rust": "the tokenizers library on whole texts, only to compare: no part of a worker",
    "prepare": "texts -> tokens, words as written and batches, in a tokenizer process if "
    "there is one",
    "send": "texts pickled for a tokenizer process, in the worker",
    "answer": "what is prepared pickled for the worker, in a tokenizer process",
    "receive": "what is prepared unpickled, in the worker",
    "collect": "the model's values -> the order of the tokens, rounded, in the worker",
    "record": "values -> rows and summaries, in the worker",
    "write": "rows and summaries -> Parquet on local scratch, in the worker",
}
"""Description of each stage around the model, by name."""
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
"""Sizes of the model that is loaded; it answers at once, so they do not matter."""
MEAN_PROFILE = "mixed"
"""Profile of the made-up texts."""


class InstantModel(model.Model):
    """A loaded model that gives numbers drawn before in place of what it would measure."""

    def __init__(self, loaded: model.Model) -> None:
        vars(self).update(vars(loaded))
        self._answers: dict[int, model.Pending] = {}

    def submit(
        self,
        ids: npt.NDArray[np.int64],
        lengths: Sequence[int],
        signals: Sequence[Signal] = (STRENGTH,),
        layers: Sequence[int] | None = None,
        chosen: Chosen | None = None,
    ) -> model.Pending:
        """Random positive values of the right shape; the same for all batches of one size.

        There are no states to add, so a config without ``mean_vectors`` is expected.
        """
        assert chosen is None
        answer = self._answers.get(len(ids))
        if answer is None:
            num_rows = len(measured(self.layers if layers is None else layers, signals))
            chance = torch.Generator().manual_seed(len(ids))
            values = 5 + torch.randn((num_rows, len(ids)), generator=chance).abs()
            answer = self._answers[len(ids)] = model.Pending(values, None, lambda read: read)
        return answer


@dataclass(frozen=True, slots=True)
class _Turn:
    """One pass of a whole worker over the corpus."""

    tokens: int
    seconds: float
    own_s: float  # CPU time of the worker's process
    tokenizer_s: float  # CPU time of its tokenizer processes


class WorkerFigures(TypedDict):
    """Figures of a whole worker, one for each turn."""

    tokens_per_s: list[float]
    own_us: list[float]  # CPU time of the worker's process, per token
    tokenizer_us: list[float]  # CPU time of its tokenizer processes, per token


class FeedResult(machine.MachineFacts):
    """Tokens per second and CPU time per token, as ``--json`` writes them."""

    model: str
    corpus: list[str]
    times: float  # how often the texts were measured
    tokens: int
    repeat: int
    foreign: float
    stages: dict[str, list[float]]
    workers: dict[str, WorkerFigures]  # by the number of tokenizer processes


def measure(
    model_name: str | None,
    corpus: Sequence[str],
    num_processes: Sequence[int],
    num_tokens: int | None,
    repeat: int,
    on_note: Callable[[str], None],
) -> FeedResult:
    """Tokens per second and CPU time per token.

    ``model_name`` is the model whose tokenizer and context are used; its weights are not read.
    ``corpus`` are files whose texts are used; without any, texts are made up. ``num_processes``:
    numbers of tokenizer processes to measure, in turns, ``repeat`` times. Raises ``CorpusError``
    when no document has text.
    """
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as name:
        folder = Path(name)
        _save_model(folder / "model", model_name)
        config = RunConfig(
            corpus=(str(folder / "corpus.jsonl"),),
            model=str(folder / "model"),
            store=str(folder / "store"),
            layers="1",
            device="cpu",
            dtype="float32",
            batch_tokens=measurer.BATCH_TOKENS["cuda"],
            executor="inline",
            scratch=name,
        )
        num_tokens = num_tokens or TOKENS_PER_WORKER["cuda"]
        texts = _texts(config, corpus, num_tokens)
        once_bytes = sum(len(json.dumps({"text": text})) + 1 for text in texts)
        num_bytes = rate.write_corpus(
            folder / "corpus.jsonl", texts, num_tokens * rate.CHARS_A_TOKEN
        )
        config = replace(config, shard_bytes=max(1024, num_bytes // rate.NUM_SHARDS))
        planned = plan.make_plan(config)
        stages = _measure_stages(config, planned.shards, repeat, on_note)
        turns, foreign = _measure_workers(config, planned, num_processes, repeat, on_note)
    return {
        **machine.facts("cpu"),
        "model": model_name or BUILT_IN_TOKENIZER,
        "corpus": list(corpus),
        "times": round(num_bytes / once_bytes, 1),
        "tokens": turns[num_processes[0]][0].tokens,
        "repeat": repeat,
        "foreign": round(foreign, 3),
        "stages": stages,
        "workers": {str(n): _figures(turns[n]) for n in num_processes},
    }


def _save_model(folder: Path, name: str | None) -> None:
    """Save a small model with the tokenizer and the context of the model ``name`` in ``folder``."""
    if name is None:
        save_bert(folder, **SMALL)
        return
    files = model.find_model(name, None, trust_remote_code=False, allow_pickle=False)
    tokenizer = model.load_tokenizer(files)
    size = files.num_embeddings or tokenizer.get_vocab_size()
    context = files.context_tokens
    save_bert_with(tokenizer, folder, vocab_size=size, max_position_embeddings=context, **SMALL)


def _texts(config: RunConfig, corpus: Sequence[str], num_tokens: int) -> list[str]:
    """Texts of ``corpus``; without any, about ``num_tokens`` tokens of made-up words."""
    if not corpus:
        files = measurer.find_model_files(config)
        window = measurer.window_tokens(config, files)
        writer = Writer(model.load_tokenizer(files), window)
        written = writer.write(MEAN_PROFILE, num_tokens, num_tokens, causal=False)
        return [text.text for text in written]
    return rate.sample_texts(config, corpus)


# --- each stage alone, on one thread


class _Clock:
    """CPU seconds of this thread by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's CPU time to ``stage``."""
        began = time.thread_time()
        yield
        self.seconds[stage] += time.thread_time() - began


def _measure_stages(
    config: RunConfig, shards: Sequence[Shard], repeat: int, on_note: Callable[[str], None]
) -> dict[str, list[float]]:
    """CPU microseconds per token of each of ``STAGES``, in every repetition."""
    processor = _load(config, 0)
    found: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for turn in range(-1, repeat):  # the first warms up
        clock = _Clock()
        num_tokens = sum(_stages_of(processor, shard, clock) for shard in shards)
        if turn >= 0:
            for stage in STAGES:
                found[stage].append(clock.seconds[stage] / num_tokens * 1e6)
            on_note(f"stages {turn + 1}/{repeat}: prepare {found['prepare'][-1]:.2f} us/token")
    processor.close()
    return found


def _stages_of(processor: worker.Processor, shard: Shard, clock: _Clock) -> int:
    """Process ``shard`` stage by stage without committing it; return its number of tokens."""
    measuring, measure = processor.measurer, processor.task.measure
    tokenizer = Tokenizer.from_str(measuring.preparer.recipe.tokenizer)
    options = processor.task.config.read_options
    with clock("read"):
        read = (d for piece in shard.slices for d in reading.read(piece, options))
        documents = [document for document in read if document.selected]
    of_corpus = records.CorpusColumns(
        measure.tagged, kept.fields_of(options.keep), measure.detected
    )
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as folder:
        with records.ShardFiles(
            Path(folder), measure.series, measure.neuron_layers, measure.offsets, {}, of_corpus
        ) as files:
            recorder = Recorder(measure, files)
            for some in feed.in_chunks(documents):
                texts = [d.text for d in some]
                replaced = [d.num_replaced > 0 for d in some]
                with clock("rust"):
                    tokenizer.encode_batch(texts, add_special_tokens=False)
                with clock("prepare"):
                    prepared = measuring.preparer.prepare(texts, replaced)
                with clock("send"):
                    ForkingPickler.dumps((texts, replaced))
                with clock("answer"):
                    answer = ForkingPickler.dumps(prepared)
                with clock("receive"):
                    prepared = ForkingPickler.loads(answer)
                with clock("collect"):
                    values = measuring.values(prepared)
                with clock("record"):
                    chunk = feed.Chunk(some, prepared, 0.0)
                    part = recorder.make(chunk, values, recorder.counts["documents"])
                with clock("write"):
                    recorder.write(part)
            with clock("write"):
                recorder.finish()
                files.close()
        return recorder.counts["tokens"]


# --- whole workers


def _load(config: RunConfig, num_processes: int) -> worker.Processor:
    """A worker with ``num_processes`` tokenizer processes, whose model answers at once."""
    config = replace(config, tokenizer_workers=num_processes)
    files = measurer.find_model_files(config)
    task = worker.prepare(config, files, "cpu", "float32")
    if config.language == AUTO_LANGUAGE:  # as a run does
        task = replace(task, measure=replace(task.measure, languages=languages.identity()))
    processor = worker.Processor(task)
    processor.measurer.model = InstantModel(processor.measurer.model)
    return processor


def _measure_workers(
    config: RunConfig,
    planned: plans.Plan,
    num_processes: Sequence[int],
    repeat: int,
    on_note: Callable[[str], None],
) -> tuple[dict[int, list[_Turn]], float]:
    """Passes of whole workers, by number of tokenizer processes, interleaved.

    Also returns the share of the cores' time that third-party processes used.
    """
    turns: dict[int, list[_Turn]] = {n: [] for n in num_processes}
    with contextlib.ExitStack() as loaded:
        workers = {n: _load(config, n) for n in num_processes}
        for processor in workers.values():
            loaded.callback(processor.close)
        with machine.Watch([os.getpid()]) as watch:
            for turn in range(-1, repeat):  # the first warms up, and starts the processes
                for n, processor in workers.items():
                    done = _one_turn(processor, planned, f"{config.store}-{n}-{turn}")
                    if turn >= 0:
                        turns[n].append(done)
                    what = "warm-up" if turn < 0 else f"{turn + 1}/{repeat}"
                    on_note(
                        f"{n} tokenizer processes, {what}: {done.tokens / done.seconds:,.0f} "
                        "tokens/s"
                    )
    return turns, watch.foreign


def _one_turn(processor: worker.Processor, planned: plans.Plan, store: str) -> _Turn:
    """Process all shards into a fresh ``store``."""
    own_s = time.process_time()
    all_s = machine.cpu_s([os.getpid()])
    seconds, tokens = rate.process_all(processor, planned.shards, store)
    own_s = time.process_time() - own_s
    all_s = machine.cpu_s([os.getpid()]) - all_s
    return _Turn(tokens, seconds, own_s, max(0.0, all_s - own_s))


def _figures(turns: Sequence[_Turn]) -> WorkerFigures:
    """The figures of ``turns``: one number each."""
    return {
        "tokens_per_s": [t.tokens / t.seconds for t in turns],
        "own_us": [t.own_s / t.tokens * 1e6 for t in turns],
        "tokenizer_us": [t.tokenizer_s / t.tokens * 1e6 for t in turns],
    }


def render(result: FeedResult, console: Console) -> None:
    """Print the stages and the whole workers: medians, lowest and highest."""
    machine.print_facts(result, console)
    console.print(
        f"Tokenizer of {result['model']}; {result['tokens']:,} tokens, n = {result['repeat']}; "
        f"others took {result['foreign']:.0%} of the cores",
        markup=False,
    )
    if result["times"] > 1:
        console.print(
            f"The texts are measured {result['times']:g} times over: words that a chunk has "
            "already cost less, so give --corpus more texts or a smaller --tokens"
        )
    table = Table("stage", "CPU us/token", "what", title="Each stage alone, on one thread")
    for stage, values in result["stages"].items():
        table.add_row(stage, _spread(values, ".3f"), STAGES[stage])
    console.print(table)
    table = Table(
        "tokenizer processes",
        "tokens/s",
        "CPU us/token of the worker",
        "of its tokenizers",
        title="A whole worker, from files to committed Parquet; its model answers at once",
    )
    for n, found in result["workers"].items():
        spreads = [_spread(found["tokens_per_s"], ",.0f")]
        spreads += [_spread(values, ".2f") for values in (found["own_us"], found["tokenizer_us"])]
        table.add_row(n, *spreads)
    console.print(table)


def _spread(values: Sequence[float], form: str) -> str:
    """Median of ``values``, then the lowest and the highest."""
    median = statistics.median(values)
    low = min(values)
    high = max(values)
    return f"{median:{form}} ({low:{form}}-{high:{form}})"
