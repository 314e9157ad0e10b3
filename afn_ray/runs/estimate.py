"""Estimate what a run would do, how long it would take and what it would cost, before it starts."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from afn_ray.config import RunConfig
from afn_ray.corpus import listing
from afn_ray.errors import ConfigError, CorpusError
from afn_ray.reduce import lexicon
from afn_ray.runs import cluster
from afn_ray.runs.events import OnEvent
from afn_ray.runs.job import normalised, prepare, take_stock
from afn_ray.runs.measurer import Measurer, text_encoder
from afn_ray.runs.task import Task
from afn_ray.schema import Document, FileInfo, Shard, fingerprint
from afn_ray.store import probes, readers, settings
from afn_ray.store.commits import Commits
from afn_ray.text import nearest
from afn_ray.tokens import counting

SAMPLE_DOCUMENTS = 200
"""Largest number of documents in the sample that is measured here."""
TIMED_S = 2.0
"""Time after which the measurement of the sample ends, in seconds."""
BYTES_PER_TOKEN = 6.0
"""Upper estimate of the store's size for a token of one series with offsets, in bytes."""
BYTES_PER_SERIES, OFFSET_BYTES = 3.0, 2.0
"""Upper estimates for each further series and for the offsets of a token, in bytes."""
BYTES_PER_NEURON = 6.5
"""Upper estimate for one neuron of a token, counts by type included, in bytes."""
REDUCE_TOKENS_PER_S = 2.5e6
"""Speed of the reduce of one series on one core, in tokens per second.

It is between the measured speeds of 10,000 small shards and of 50 large ones.
"""
SCREEN_TOKENS_PER_S = 3.5e6
"""Speed of the screening of all layers on one core, in tokens per second."""
READ_BYTES = readers.READ_AHEAD_BYTES
"""Size of one read of the corpus, in bytes.

A new file is read twice: once to plan and once to measure.
"""
PUTS_A_SHARD, GETS_A_SHARD = 4, 12
"""Requests to object stores for a shard: PUT and LIST, which cost the same, then GET and HEAD.

They were counted on small shards. The GET requests for the corpus's bytes come on top. Each table
of neurons is one more PUT. Writes of the status depend on time and are not counted.
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """Speed of one worker, as ``afn bench rate`` measured it."""

    tokens_per_second: float
    load_s: float  # seconds until a process has loaded the model
    where: str  # machine, versions, n and spread
    # what it was measured for, from ``speed_of``
    speed: dict[str, Any] = field(default_factory=dict)

    def check(self, speed: dict[str, Any], file: Path) -> None:
        """Raise ``ConfigError`` unless the rate was measured for ``speed``."""
        differing = [
            f"{key}: it has {self.speed.get(key)}, this run asks for {speed[key]}"
            for key in speed
            if self.speed.get(key) != speed[key]
        ]
        if differing:
            raise ConfigError(
                f"--rate {file} was measured for something else: {'; '.join(differing)}; measure "
                "this run's: 'afn bench rate RUN_TOML --json FILE'"
            )


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in one ``currency``; a price of None is unknown and left out of every sum."""

    currency: str
    as_of: str  # whose prices, and their date
    worker_hour: float | None = None
    worker_hour_on_demand: float | None = None
    head_hour: float | None = None
    storage_gb_month: float | None = None
    put_million: float | None = None
    get_million: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """A line of a bill: ``amount`` of ``unit`` at ``price`` each; None: the price is unknown."""

    what: str
    amount: float
    unit: str
    price: float | None

    @property
    def total(self) -> float | None:
        """Price of the amount; None: unknown."""
        return None if self.price is None else self.amount * self.price


@dataclass(frozen=True, slots=True)
class Estimate:
    """Result of a dry run: the work of a run, its time and its costs."""

    num_files: int
    skipped: tuple[FileInfo, ...]  # files with an unknown suffix
    num_documents: int
    documents_exact: bool
    num_bytes: int
    num_shards: int
    num_shards_done: int  # already in the store
    tokens: int  # special tokens included, as a run counts them
    tokens_low: int  # bound of the 95 % interval; ``tokens`` where all are counted
    tokens_high: int
    tokens_exact: bool  # all tokens are counted, here or in commits
    tokens_there: int  # tokens already in the store
    num_beginnings: int  # large slices that could be sampled only at their beginning
    store_bytes: int  # exact for shards in the store, else estimated
    # from the first worker's start to the reduced tables; None: no rate is known
    seconds: float | None
    load_s: float | None  # part of ``seconds`` until models are loaded
    reduce_s: float  # part of ``seconds`` for the reduce and the screening
    num_workers: int
    worker_hours: float | None  # hours of all workers together; GPU-hours where they have GPUs
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
    config = normalised(config)
    lexicon.function_words(config.language)
    probes.try_writable(config.store)
    asked = prepare(config, on_event, keep=False, reduce_only=reduce_only)
    task, plan, device = asked.task, asked.plan, asked.device
    measure = task.measure
    num_series = len(measure.series)
    if known is not None and rate is not None:
        known.check(speed_of(task), rate)
    stock = take_stock(asked, on_event, reduce_only=reduce_only)
    todo: list[Shard] = []
    if not reduce_only:
        todo = [shard for shard in plan.shards if shard.id not in stock.commits]
    there = _what_is_there(stock.commits)
    lacking = counting.NOTHING
    if todo:
        slices = [piece for shard in todo for piece in shard.slices]
        lacking = counting.count(slices, config.read_options, text_encoder(asked.files))
    tokens = there.tokens + lacking.tokens
    if lacking.exact and not tokens:
        raise CorpusError(
            "the corpus has no token to measure: all of its documents are empty or quarantined"
        )
    sample: list[Document] = []
    if todo:
        sample = listing.sample(plan.files, config.read_options, SAMPLE_DOCUMENTS)
    timed = _time_sample(task, [document.text for document in sample])
    workers = min(cluster.count_workers(config, device), max(1, len(todo)))
    here = cluster.local_device(device)
    if known is None and here == device and todo:
        known = timed.rate()
    reduce_s = 0.0
    if not stock.complete:
        reduce_s = reduce_core_s(tokens, num_series, screened=config.screen > 0) / workers
    token_bytes = bytes_per_token(config, num_series, len(measure.neuron_layers))
    store_bytes = there.num_bytes + lacking.tokens * token_bytes
    load_s: float | None = 0.0
    if todo:
        load_s = None if known is None else known.load_s
    seconds = None if load_s is None else load_s + reduce_s
    if known and seconds is not None and known.tokens_per_second:
        seconds += lacking.tokens / known.tokens_per_second / workers
    where = _no_rate(device, here) if todo else "nothing is left to measure"
    if known is not None:
        where = known.where
    puts, gets = _num_requests(todo, records_neurons=bool(measure.neuron_layers))
    hours = None if seconds is None else seconds / 3600
    worker_hours = None if hours is None else workers * hours
    costs, monthly = bill(money, worker_hours, hours, puts, gets, store_bytes)
    return Estimate(
        num_files=len(plan.files),
        skipped=plan.skipped,
        num_documents=there.documents + lacking.documents,
        documents_exact=lacking.num_documents_exact,
        num_bytes=plan.num_bytes,
        num_shards=len(plan.shards),
        num_shards_done=len(plan.shards) - len(todo),
        tokens=tokens,
        tokens_low=there.tokens + lacking.low,
        tokens_high=there.tokens + lacking.high,
        tokens_exact=lacking.exact,
        tokens_there=there.tokens,
        num_beginnings=lacking.num_beginnings,
        store_bytes=round(store_bytes),
        seconds=seconds,
        load_s=load_s,
        reduce_s=reduce_s,
        num_workers=workers,
        worker_hours=worker_hours,
        num_puts=puts,
        num_gets=gets,
        tokens_per_second=known.tokens_per_second if known else None,
        rate=where,
        model=config.model,
        layers=measure.layers,
        depth=asked.files.depth,
        dtype=measure.dtype,
        device=device,
        window_tokens=measure.window_tokens,
        overlap_tokens=measure.overlap_tokens,
        measure=measure.id,
        signal_costs=timed.signal_costs if here == device else {},
        prices=money,
        costs=costs,
        monthly=monthly,
    )


@dataclass(frozen=True, slots=True)
class _There:
    """Data of a run that the store already has."""

    tokens: int
    documents: int
    num_bytes: int


def _num_requests(shards: Sequence[Shard], *, records_neurons: bool) -> tuple[int, int]:
    """Numbers of PUT and GET requests that measure ``shards``."""
    puts = PUTS_A_SHARD + (2 if records_neurons else 0)
    gets = sum(GETS_A_SHARD + gets_of_corpus(shard.num_bytes) for shard in shards)
    return len(shards) * puts, gets


def _what_is_there(commits: Commits) -> _There:
    tokens = documents = num_bytes = 0
    for commit in commits.values():
        tokens += commit.counts["tokens"]
        documents += commit.counts["documents"]
        num_bytes += sum(file["bytes"] for file in commit.files.values())
    return _There(tokens, documents, num_bytes)


# --- arithmetic


def bytes_per_token(config: RunConfig, num_series: int, num_neuron_layers: int) -> float:
    """Upper estimate of the store's size per token, in bytes."""
    size = BYTES_PER_TOKEN + BYTES_PER_SERIES * (num_series - 1)
    if not config.offsets:
        size -= OFFSET_BYTES
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


def bill(
    prices: Prices | None,
    worker_hours: float | None,
    hours: float | None,
    num_puts: int,
    num_gets: int,
    store_bytes: float,
) -> tuple[tuple[Cost, ...], Cost | None]:
    """Costs of a run line by line, and the monthly cost of its data; empty without ``prices``.

    Without hours the run has no lines: its requests alone would look like its price.
    """
    if prices is None:
        return (), None
    monthly = Cost("store", store_bytes / 1e9, "GB", prices.storage_gb_month)
    if worker_hours is None or hours is None:
        return (), monthly
    return (
        Cost("workers", worker_hours, "worker-hours", prices.worker_hour),
        Cost("head", hours, "hours", prices.head_hour),
        Cost("PUT", num_puts / 1e6, "million", prices.put_million),
        Cost("GET", num_gets / 1e6, "million", prices.get_million),
    ), monthly


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
            turns = [[measurer.seconds(prepared, signals) for signals in sets] for _ in range(2)]
            # The faster of two turns counts: the other one was disturbed.
            for name, seconds in zip(taken, map(min, *turns), strict=True):
                taken[name] += seconds
    # A signal cannot save time: a negative cost is noise and counts as 0.
    timed.signal_costs = {
        s.name: max(0.0, taken[s.name] / taken[alone.name] - 1) for s in others if taken[alone.name]
    }
    return timed


# --- files of rates and prices


def speed_of(task: Task) -> dict[str, Any]:
    """The inputs of a worker's tokens per second, except the machine and the texts."""
    measure = task.measure
    return {
        "model": fingerprint(dict(measure.model)),
        "layers": list(measure.layers),
        "signals": list(measure.signals),
        "top_neurons": measure.top_neurons,
        "dtype": measure.dtype,
        "device": task.device,
        "window_tokens": measure.window_tokens,
        "overlap_tokens": measure.overlap_tokens,
        "batch_tokens": task.config.batch_tokens,
        "tokenizer_workers": task.config.tokenizer_workers,
    }


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a number of 0 or more that a float can hold."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= sys.float_info.max
    )


RATE_KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "speed": (lambda v: isinstance(v, dict), "an object"),
    "tokens_per_second": (lambda v: isinstance(v, list) and bool(v) and all(_is_number(n) and n for n in v),
                          "a list of numbers over 0"),
    "load_s": (_is_number, "a number, 0 or more"),
    "machine": (lambda v: isinstance(v, str), "a text"),
    "versions": (lambda v: isinstance(v, dict) and isinstance(v.get("torch"), str), "an object with that of torch"),
    "foreign": (_is_number, "a number, 0 or more"),
}  # fmt: skip
"""Keys that are read from a file by ``afn bench rate --json``: a check and the expected value."""


def read_rate(path: Path) -> Rate:
    """The rate in ``path``. Raises ``ConfigError`` unless ``afn bench rate --json`` wrote it."""
    try:
        value = json.loads(settings.decode(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"--rate {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--rate {path} is not what 'afn bench rate --json' writes: {error!r}"
        ) from error
    found: dict[str, Any] = value if isinstance(value, dict) else {}
    for key, (is_right, expected) in RATE_KEYS.items():
        if not is_right(found.get(key)):
            raise ConfigError(
                f"--rate {path} is not what 'afn bench rate --json' writes: {key} is "
                f"{found.get(key)!r}; expected {expected}"
            )
    rates = found["tokens_per_second"]
    where = (
        f"on {found['machine']}, torch {found['versions']['torch']}, n = {len(rates)}, "
        f"{min(rates):,.0f}-{max(rates):,.0f}, others took {found['foreign']:.0%} of its cores"
    )
    return Rate(statistics.median(rates), found["load_s"], where, found["speed"])


def read_prices(path: Path) -> Prices:
    """The prices in the TOML file ``path``. Raises ``ConfigError`` for wrong keys or values."""
    value = settings.read_toml(path, "--prices")
    known = [f.name for f in fields(Prices)]
    if unknown := sorted(value.keys() - set(known)):
        raise ConfigError(
            f"--prices {path} has {', '.join(unknown)}{nearest(unknown, known)}; expected "
            f"currency, as_of and some of {', '.join(known[2:])}"
        )
    for name, what in (
        ("currency", "of all prices"),
        ("as_of", "whose prices these are, and of when"),
    ):
        if name not in value:
            raise ConfigError(f"--prices {path} lacks {name}: a text, {what}")
        if not isinstance(value[name], str) or not value[name]:
            raise ConfigError(
                f"--prices {path}: {name} is {value[name]!r}; expected a text, {what}"
            )
    for name in known[2:]:
        price = value.get(name, 0)
        if not _is_number(price):
            raise ConfigError(f"--prices {path}: {name} is {price!r}; expected a number, 0 or more")
    return Prices(**value)
