"""Estimate what a run would do, how long it would take and what it would cost, before it starts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from afn_ray import notebook, samples, token_rows
from afn_ray.config import RunConfig
from afn_ray.corpus import listing
from afn_ray.corpus_values import Document, FileInfo, Shard, Unread
from afn_ray.errors import CorpusError
from afn_ray.measure import Measure
from afn_ray.runs import cluster, composition, precheck, preparation, reports
from afn_ray.runs.cluster import placement
from afn_ray.runs.cluster.placement import Placement
from afn_ray.runs.events import OnEvent
from afn_ray.runs.measurer import Measurer, text_encoder
from afn_ray.runs.preparation import Preparation
from afn_ray.runs.prices import Cost, Prices, bill, read_prices
from afn_ray.runs.rates import Rate, read_rate, speed_of
from afn_ray.runs.task import Task
from afn_ray.store import probes, readers, series
from afn_ray.store.commits import Commit
from afn_ray.tokens import counting

SAMPLE_DOCUMENTS = 200
"""Largest number of documents in the sample that is measured here."""
TIMED_S = 2.0
"""Time after which the measurement of the sample ends, in seconds."""
BYTES_PER_TOKEN = 6.0
"""Upper estimate of the store's size for a token of one series with offsets, in bytes."""
BYTES_PER_SERIES, OFFSET_BYTES = 3.0, 2.0
"""Upper estimates for each further series and for the offsets of a token, in bytes."""
BYTES_PER_SUMMARY = 1.5
"""Part of the above that is not in rows of tokens but in summaries and documents, in bytes."""
BYTES_PER_NEURON = 6.5
"""Upper estimate for one neuron of a token, counts by type included, in bytes."""
REDUCE_TOKENS_PER_S = 2.5e6
"""Speed of the reduce of one series on one core, in tokens per second.

It is between the measured speeds of 10,000 small shards and of 50 large ones.
"""
COMPOSED_TOKENS_PER_S = 1.5e6
"""Speed at which one core copies the columns of a series from one shard, in tokens per second."""
SCREEN_TOKENS_PER_S = 1.2e6
"""Speed of the screening of all layers on one core, words counted, in tokens per second."""
READ_BYTES = readers.READ_AHEAD_BYTES
"""Size of one read of the corpus, in bytes.

A new file is read twice: once to plan and once to measure.
"""
PUTS_A_SHARD, GETS_A_SHARD = 4, 14
"""Requests to object stores for a shard: PUT and LIST, which cost the same, then GET and HEAD.

They were counted on small shards. The GET requests for the corpus's bytes come on top. Each table
of neurons is one more PUT, and the sums of states are one more PUT and GET. Writes of the status
depend on time and are not counted.
"""
BYTES_PER_SUM = 8.0
"""Upper estimate for a shard's sum of one type's states in one dimension, in bytes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Result of a dry run: the work of a run, its time and its costs."""

    num_files: int
    skipped: tuple[FileInfo, ...]  # files with an unknown suffix
    num_documents: int
    documents_exact: bool
    num_bytes: int
    # counts of the documents in the store's shards and of those read here, as in a commit;
    # where not all tokens are counted, those read here are a sample
    counts: Mapping[str, int]
    reasons: tuple[str, ...]  # files of some documents quarantined here, with the reasons
    replaced_in: tuple[str, ...]  # some of the files that were read with replaced characters
    encoding: str | None  # the config's
    thresholds: str | None  # URI of the run whose thresholds label; None: the run's own
    record: str  # rows of tokens that are kept, as the config has it
    selection: str  # what the config selects, in words; empty: all
    unread: Unread  # the end of the corpus, beyond a limit
    num_shards: int
    num_shards_done: int  # already in the store
    num_shards_composed: int  # of columns that the store has; some of others that are measured
    composed: str  # how these come about, for people; empty if there are none
    tokens: int  # special tokens included, as a run counts them
    tokens_low: int  # bound of the 95 % interval; ``tokens`` where all are counted
    tokens_high: int
    tokens_exact: bool  # all tokens are counted, here or in commits
    tokens_there: int  # tokens already in the store
    tokens_composed: int  # tokens of the shards that are composed
    num_beginnings: int  # large slices that could be sampled only at their beginning
    store_bytes: int  # exact for shards in the store, else estimated
    # from the first worker's start to the reduced tables; None: no rate is known
    seconds: float | None
    load_s: float | None  # part of ``seconds`` until models are loaded
    reduce_s: float  # part of ``seconds`` for the reduce and the screening
    num_workers: int
    workers_per_gpu: int  # 1 where workers have no GPU
    workers: str  # the workers and their resources, for people
    notices: tuple[str, ...]  # about nodes with too few CPUs for their GPUs, for people
    worker_hours: float | None  # hours of all workers together
    num_puts: int  # requests to an object store
    num_gets: int
    tokens_per_second: float | None  # one worker's; None: not measured on the workers' device
    rate: str  # where the speed was measured, or why it was not
    model: str
    layers: tuple[int, ...]
    depth: int
    dtype: str
    device: str
    window_tokens: int
    overlap_tokens: int
    measure: str
    # time of a forward pass with each signal over one with strength alone, minus 1;
    # empty where the sample was measured on another device than the workers'
    signal_costs: dict[str, float]
    prices: Prices | None
    costs: tuple[Cost, ...]  # costs of the run; empty without prices or hours
    monthly: Cost | None  # monthly cost of the run's data in the store

    def _repr_html_(self) -> str:
        hours = None if self.worker_hours is None else f"{self.worker_hours:,.2f}"
        seconds = None if self.seconds is None else f"{self.seconds:,.0f}"
        named = {
            "documents": f"{self.num_documents:,}",
            "shards": f"{self.num_shards:,}, of them {self.num_shards_done:,} in the store",
            "tokens": f"{self.tokens:,} ({self.tokens_low:,} to {self.tokens_high:,})",
            "workers": self.num_workers,
            "seconds": seconds,
            "hours of all workers": hours,
            "bytes in the store": f"{self.store_bytes:,}",
        }
        return notebook.facts("Estimate of a run", named)


def dry_run(
    config: RunConfig,
    on_event: OnEvent = lambda event: None,
    *,
    rate: Path | None = None,
    prices: Path | None = None,
    reduce_only: bool = False,
) -> Estimate:
    """Estimate ``job.run(config)`` with that call's own preparation.

    Reads the corpus once to plan, counts or samples what the store lacks, runs the model on a small
    sample, and leaves nothing behind. ``rate``: a file by ``afn bench rate``, maybe from another
    machine. Without it the sample is measured here; where this machine lacks the workers' device,
    time, hours and costs are None. ``prices``: a TOML file with the keys of ``Prices``. Raises the
    errors that ``job.run`` raises before its work begins, and ``ConfigError`` for a rate that was
    measured for something else.
    """
    money = None if prices is None else read_prices(prices)
    # before the corpus is read, which may take hours
    known = None if rate is None else read_rate(rate)
    config = precheck.normalised(config)
    probes.try_writable(config.store)
    asked = preparation.prepare(config, on_event, keep=False, reduce_only=reduce_only)
    if known is not None and rate is not None:
        known.check(speed_of(asked.task), rate)
    work = _find_work(asked, on_event, reduce_only=reduce_only)
    sample: list[Document] = []
    if work.planned.needs_model:
        sample = listing.sample(asked.plan.files, config.read_options, SAMPLE_DOCUMENTS)
    timed = _time_sample(asked.task, [document.text for document in sample])
    here = cluster.local_device(asked.device)
    if known is None and here == asked.device and work.planned.needs_model:
        known = timed.rate()
    times = _times(asked, work, known)
    measure = asked.task.measure
    store_bytes = _store_bytes(asked, work)
    puts, gets = _num_requests(work.todo, measure)
    costs, monthly = bill(money, times.worker_hours, times.hours, puts, gets, store_bytes)
    return Estimate(
        num_files=asked.plan.num_files,
        skipped=asked.plan.skipped,
        num_documents=work.there.documents + work.composed.documents + work.lacking.documents,
        documents_exact=work.lacking.num_documents_exact,
        num_bytes=asked.plan.num_bytes,
        counts=work.counts,
        reasons=work.lacking.reasons,
        replaced_in=work.lacking.replaced_in,
        encoding=config.encoding,
        thresholds=asked.config.thresholds,
        record=config.record,
        selection=series.selection_of(asdict(config)),
        unread=asked.plan.unread,
        num_shards=len(asked.plan.shards),
        num_shards_done=len(asked.plan.shards) - len(work.todo),
        num_shards_composed=len(work.todo) - len(work.planned.measured),
        composed=composition.describe(work.planned),
        tokens=work.tokens,
        tokens_low=work.tokens - work.lacking.tokens + work.lacking.low,
        tokens_high=work.tokens - work.lacking.tokens + work.lacking.high,
        tokens_exact=work.lacking.exact,
        tokens_there=work.there.tokens,
        tokens_composed=work.composed.tokens,
        num_beginnings=work.lacking.num_beginnings,
        store_bytes=round(store_bytes),
        seconds=times.seconds,
        load_s=times.load_s,
        reduce_s=times.reduce_s,
        num_workers=times.placed.num_workers,
        workers_per_gpu=times.per_gpu,
        workers=placement.describe(config, times.placed, asked.device),
        notices=times.placed.notices,
        worker_hours=times.worker_hours,
        num_puts=puts,
        num_gets=gets,
        tokens_per_second=known.tokens_per_second if known else None,
        rate=_source_of_rate(asked, work, known, here),
        model=config.model,
        layers=measure.layers,
        depth=asked.files.depth,
        dtype=measure.dtype,
        device=asked.device,
        window_tokens=measure.window_tokens,
        overlap_tokens=measure.overlap_tokens,
        measure=measure.id,
        signal_costs=timed.signal_costs if here == asked.device else {},
        prices=money,
        costs=costs,
        monthly=monthly,
    )


def _source_of_rate(asked: Preparation, work: _Work, known: Rate | None, here: str) -> str:
    """Place where the rate was measured, or the reason why there is none."""
    if known is not None:
        return known.where
    if work.planned.needs_model:
        return _no_rate(asked.device, here)
    return "nothing is left to measure"


def _store_bytes(asked: Preparation, work: _Work) -> float:
    """Bytes in the store once the run is complete."""
    measure = asked.task.measure
    of_token = bytes_per_token(
        asked.config, len(measure.series), len(measure.neuron_layers), len(measure.layers)
    )
    num_sums = len(measure.layers) * len(measure.mean_types) * asked.files.hidden_size
    of_tokens = (work.tokens - work.there.tokens) * of_token
    return work.there.num_bytes + of_tokens + len(work.todo) * BYTES_PER_SUM * num_sums


# --- the work, and its time


@dataclass(frozen=True, slots=True)
class _There:
    """Data of a run that the store already has."""

    tokens: int
    documents: int
    num_bytes: int
    counts: Mapping[str, int]  # sums over its commits


@dataclass(frozen=True, slots=True)
class _Work:
    """Work of a run, and the part of it that the store has already."""

    todo: list[Shard]
    planned: composition.Work  # how ``todo`` comes about
    there: _There
    composed: _There  # of the shards that are composed, as their donors have them
    lacking: counting.Count  # tokens and documents of the shards that are measured as a whole
    reduced: bool  # whether the run is complete

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.there.tokens + self.composed.tokens + self.lacking.tokens

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the documents in the store's shards and of those that were read."""
        counts: Counter[str] = Counter()
        for some in (self.there.counts, self.composed.counts, self.lacking.read):
            counts.update(some)
        return dict(counts)


@dataclass(frozen=True, slots=True)
class _Times:
    """Time of a run; None: no rate is known."""

    placed: Placement  # the workers
    per_gpu: int  # workers that share a GPU; 1 where they have none
    load_s: float | None
    reduce_s: float
    seconds: float | None  # with loading and reduce

    @property
    def hours(self) -> float | None:
        """``seconds`` in hours."""
        return None if self.seconds is None else self.seconds / 3600

    @property
    def worker_hours(self) -> float | None:
        """Hours of all workers together."""
        return None if self.hours is None else self.placed.num_workers * self.hours


def _find_work(asked: Preparation, on_event: OnEvent, *, reduce_only: bool) -> _Work:
    """The work of the run ``asked``. Raises ``CorpusError`` if the corpus has no token."""
    stock = preparation.take_stock(asked, on_event, reduce_only=reduce_only)
    todo: list[Shard] = []
    if not reduce_only:
        todo = [shard for shard in asked.plan.shards if shard.id not in stock.commits]
    planned = composition.plan(asked.task, todo)
    lacking = counting.NOTHING
    if planned.measured:
        slices = [piece for shard in planned.measured for piece in shard.slices]
        lacking = counting.count(slices, asked.config.read_options, text_encoder(asked.files))
    donated = [commit for group in planned.composed for commit in group.donated]
    there = _what_is_there(stock.commits.values())
    work = _Work(todo, planned, there, _what_is_there(donated), lacking, stock.complete)
    if lacking.exact and not work.tokens:
        raise CorpusError(reports.no_tokens(asked.config, work.counts, lacking.reasons))
    return work


def _times(asked: Preparation, work: _Work, known: Rate | None) -> _Times:
    """Time of the run ``asked`` at the rate ``known``."""
    config = asked.task.config
    placed = cluster.place_workers(config, asked.device)
    workers = min(placed.num_workers, max(1, len(work.todo)))
    per_gpu = config.workers_per_gpu if asked.device == "cuda" else 1
    reduce_s = 0.0
    if not work.reduced:
        num_series = len(asked.task.measure.series)
        reduce_s = reduce_core_s(work.tokens, num_series, screened=config.screen > 0) / workers
    load_s: float | None = 0.0
    if work.planned.needs_model:
        load_s = None if known is None else known.load_s
    seconds = None if load_s is None else load_s + reduce_s
    if seconds is not None:
        seconds += work.composed.tokens / COMPOSED_TOKENS_PER_S / workers
    if known and seconds is not None and known.tokens_per_second:
        # The rate is of one worker that has its GPU alone. That several are faster is not assumed.
        tokens = work.lacking.tokens + _in_part(asked, work.planned)
        seconds += tokens / known.tokens_per_second / max(1.0, workers / per_gpu)
    return _Times(replace(placed, num_workers=workers), per_gpu, load_s, reduce_s, seconds)


def _in_part(asked: Preparation, planned: composition.Work) -> float:
    """Tokens of shards that are measured in part, each as the share of the blocks that run."""
    deepest = max(1, *asked.task.measure.layers)
    tokens = 0.0
    for group in planned.composed:
        rest = None if group.task.composition is None else group.task.composition.rest
        if rest is not None:
            share = max(rest.measure.layers) / deepest
            tokens += share * sum(commit.counts["tokens"] for commit in group.donated)
    return tokens


def _num_requests(shards: Sequence[Shard], measure: Measure) -> tuple[int, int]:
    """Numbers of PUT and GET requests that measure ``shards``."""
    num_sums = 1 if measure.mean_types else 0
    puts = PUTS_A_SHARD + (2 if measure.neuron_layers else 0) + num_sums
    gets = sum(GETS_A_SHARD + num_sums + gets_of_corpus(shard.num_bytes) for shard in shards)
    return len(shards) * puts, gets


def _what_is_there(commits: Iterable[Commit]) -> _There:
    counts: Counter[str] = Counter()
    num_bytes = 0
    for commit in commits:
        counts.update(commit.counts)
        num_bytes += sum(file["bytes"] for file in commit.files.values())
    return _There(counts["tokens"], counts["documents"], num_bytes, counts)


# --- arithmetic


def share_kept(config: RunConfig, num_layers: int) -> float:
    """Share of the tokens whose rows a run keeps, at most."""
    kind, _, share = config.record.partition(":")
    if kind == token_rows.SAMPLE:
        return float(samples.share_of(share))
    of_layers = min(1.0, 0.25 * num_layers)  # if the thresholds of the other run fit
    return {token_rows.ALL: 1.0, token_rows.HIGH: of_layers, token_rows.SUMMARIES: 0.0}[kind]


def bytes_per_token(
    config: RunConfig, num_series: int, num_neuron_layers: int, num_layers: int = 1
) -> float:
    """Upper estimate of the store's size per token, in bytes."""
    size = BYTES_PER_TOKEN + BYTES_PER_SERIES * (num_series - 1)
    if not config.offsets:
        size -= OFFSET_BYTES
    size = BYTES_PER_SUMMARY + (size - BYTES_PER_SUMMARY) * share_kept(config, num_layers)
    # share of tokens with neurons, if the thresholds of the other run fit
    high = 0.25 if config.neurons_of == "high" else 1.0
    num_neurons = config.top_neurons * num_neuron_layers
    return size + BYTES_PER_NEURON * num_neurons * high


def reduce_core_s(tokens: float, num_series: int, *, screened: bool) -> float:
    """Seconds of one core to reduce ``tokens``.

    Most of this work is in the leaves of the reduce, which run on all cores.
    """
    return tokens * num_series / REDUCE_TOKENS_PER_S + (
        tokens / SCREEN_TOKENS_PER_S if screened else 0.0
    )


def gets_of_corpus(num_bytes: int) -> int:
    """Number of requests that read a shard's bytes, to plan and to measure."""
    return 2 * -(-num_bytes // READ_BYTES)


def _no_rate(device: str, here: str) -> str:
    return (
        f"the workers' device is {device} and this machine's is {here}: measure on one of theirs "
        "with 'afn bench rate RUN_TOML --json FILE' and give --rate FILE"
    )


# --- a sample, measured here


@dataclass(slots=True)
class _TimedSample:
    """Measurements of a sample in this process."""

    load_s: float
    num_tokens: int = 0
    seconds: float = 0.0
    signal_costs: dict[str, float] = field(default_factory=dict)

    def rate(self) -> Rate:
        """The speed of this process."""
        tokens_per_second = self.num_tokens / self.seconds if self.seconds else 0.0
        return Rate(tokens_per_second, self.load_s, "measured here")


def _time_sample(task: Task, texts: Sequence[str]) -> _TimedSample:
    if not texts:
        return _TimedSample(0.0)
    began = time.monotonic()
    measurer = Measurer(replace(task, device=cluster.local_device(task.device)))
    timed = _TimedSample(time.monotonic() - began)
    alone, *others = measurer.signals
    taken: dict[str, float] = dict.fromkeys((s.name for s in (alone, *others)), 0.0)
    num_read = 0
    while num_read < len(texts) and timed.seconds <= TIMED_S:
        some = list(texts[num_read : num_read + 32])
        num_read += len(some)
        began = time.monotonic()
        measured = measurer.measure(some, [False] * len(some))
        timed.seconds += time.monotonic() - began
        timed.num_tokens += len(measured.encoded.token_ids)
        if others:
            prepared = measurer.preparer.prepare(
                some, [False] * len(some), refused=measured.encoded.problems
            )
            sets = [[alone], *([alone, other] for other in others)]
            first = [measurer.seconds(prepared, signals) for signals in sets]
            second = [measurer.seconds(prepared, signals) for signals in sets]
            # The faster of two turns counts: the other one was disturbed.
            for name, seconds in zip(taken, map(min, first, second), strict=True):
                taken[name] += seconds
    alone_s = taken[alone.name]
    if alone_s:
        # A signal cannot save time: a negative cost is noise and counts as 0.
        timed.signal_costs = {s.name: max(0.0, taken[s.name] / alone_s - 1) for s in others}
    return timed


# --- files of rates and prices
