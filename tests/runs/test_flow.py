"""Batches flow through the model across the borders of chunks and shards: the device always has
one, and each row is what its shard alone gives.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import simulated
from afn_ray import model
from afn_ray.corpus_values import Shard
from afn_ray.errors import CorpusError, DeviceFault, Interrupted, OutOfMemory
from afn_ray.model.pending import Read
from afn_ray.runs import flow, measurer, worker
from afn_ray.runs.deadlines import SLOTS
from afn_ray.runs.flow import SUBMITTED
from afn_ray.runs.plan import make_plan
from afn_ray.runs.progress import Counters
from afn_ray.runs.worker import Processor
from afn_ray.store import shard_files
from afn_ray.store.commits import Commit
from afn_ray.tokens import feed
from afn_ray.tokens.windows import TokenBatch
from conftest import MakeConfig, write_jsonl

NUM_SHARDS = 3
NUM_DOCUMENTS = 40
"""Documents of each shard."""
CULPRIT = "Abraham"
"""A word that is one token and occurs in one document, which is in the middle of shard 1."""
DRY_S = 10.0
"""Time after which a device whose next batch does not come has run dry, in seconds."""


class LatePending(model.Pending):
    """The values of a batch that ``wait`` waits for."""

    def __init__(self, pending: model.Pending, wait: Callable[[], None]) -> None:
        self._pending, self._wait = pending, wait

    def result(self) -> Read:
        self._wait()
        return self._pending.result()


class LateDevice:
    """A device that is done with a batch only when it has the next one, or when none will come.

    A worker that waits for a batch before it submits the next one finds it dry.
    """

    def __init__(self, processor: Processor, num_batches: int | None = None) -> None:
        """``num_batches`` that will come in all; None: it is done with each at once."""
        turns = processor.measurer.turns
        self._submit = turns.submit
        turns.submit, turns.num_queued = self.submit, SUBMITTED
        self._num_batches = num_batches
        self._changed = threading.Condition()
        self.num_submitted = self.num_collected = self.most_queued = 0
        self.dry: list[int] = []  # batches after which there was no other
        self.fail_at_submit: Callable[[TokenBatch], None] = lambda batch: None
        self.fail_at_result: Callable[[TokenBatch], None] = lambda batch: None

    def submit(self, batch: TokenBatch) -> model.Pending:
        self.fail_at_submit(batch)
        pending = self._submit(batch)
        with self._changed:
            number = self.num_submitted
            self.num_submitted += 1
            queued = self.num_submitted - self.num_collected
            self.most_queued = max(self.most_queued, queued)
            self._changed.notify_all()
        return LatePending(pending, lambda: self._wait(number, batch))

    def _wait(self, number: int, batch: TokenBatch) -> None:
        with self._changed:
            if self._num_batches is not None and not self._changed.wait_for(
                lambda: self.num_submitted > number + 1 or self.num_submitted == self._num_batches,
                DRY_S,
            ):
                self.dry.append(number)
            self.num_collected += 1
        self.fail_at_result(batch)


class Ground:
    """A corpus of ``NUM_SHARDS`` shards, and workers that process it, each into a new store."""

    def __init__(self, folder: Path, make_config: MakeConfig, verses: list[str]) -> None:
        self._folder, self._make_config = folder, make_config
        (folder / "corpus").mkdir()
        for i in range(NUM_SHARDS):
            texts = [f"{v} {i}" for v in verses[i * NUM_DOCUMENTS : (i + 1) * NUM_DOCUMENTS]]
            if i == 1:
                texts[NUM_DOCUMENTS // 2] += f" {CULPRIT} went."
            write_jsonl(folder / "corpus" / f"{i}.jsonl", [{"text": text} for text in texts])
        files = (folder / "corpus").iterdir()
        self._shard_bytes = max(file.stat().st_size for file in files)  # a file is a shard
        self._stores = 0
        self._workers: list[Processor] = []

    def worker(self, device: str = "cpu", dtype: str = "float32") -> tuple[Processor, list[Shard]]:
        self._stores += 1
        store = str(self._folder / f"store-{self._stores}")
        config = self._make_config(
            store=store, batch_tokens=64, shard_bytes=self._shard_bytes, layers="all"
        )
        task = worker.prepare(config, measurer.find_model_files(config), device, dtype)
        self._workers.append(Processor(task))
        shards = sorted(make_plan(config).shards, key=lambda shard: shard.slices[0].uri)
        assert [len(shard.slices) for shard in shards] == [1] * NUM_SHARDS
        return self._workers[-1], shards

    def close(self) -> None:
        for processor in self._workers:
            processor.close()


@pytest.fixture
def ground(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Ground]:
    monkeypatch.setattr(feed, "CHUNK_BYTES", 2000)  # several chunks in a shard
    attempt = SimpleNamespace(hex="a" * 32)  # files name theirs
    monkeypatch.setattr(worker, "uuid", SimpleNamespace(uuid4=lambda: attempt))
    made = Ground(tmp_path, make_config, verses)
    yield made
    made.close()


def contents(commit: Commit) -> list[str]:
    """A hash of every byte of every table."""
    return [str(commit.files[name]["sha256"]) for name in sorted(commit.files)]


def one_after_the_other(ground: Ground) -> tuple[list[list[str]], list[int]]:
    """Contents of the shards, and their numbers of batches, where nothing overlaps."""
    processor, shards = ground.worker()
    submit = processor.measurer.turns.submit
    num_batches: list[int] = []

    def count(batch: TokenBatch) -> model.Pending:
        num_batches[-1] += 1
        return submit(batch)

    processor.measurer.turns.submit = count
    found = []
    for shard in shards:
        num_batches.append(0)
        found.append(contents(processor.process(shard)))
    return found, num_batches


def together(processor: Processor, shards: list[Shard]) -> list[Future[Commit]]:
    """The ended attempts at ``shards``, ``SLOTS`` at a time as on a worker."""
    with ThreadPoolExecutor(SLOTS) as pool:
        return [pool.submit(processor.process, shard) for shard in shards]


def culprit_in(processor: Processor) -> Callable[[TokenBatch], bool]:
    """True if a batch has the culprit."""
    pieces = processor.measurer.preparer.pieces
    number = pieces.index(CULPRIT.lower())
    return lambda batch: number in batch.ids[: sum(batch.lengths)]


def test_the_device_always_has_a_batch_across_chunks_and_shards(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, num_batches = one_after_the_other(ground)
    assert min(num_batches) > SLOTS * (SUBMITTED + 1)
    is_ready = feed.Chunks.is_ready

    def wait_until_ready(self: feed.Chunks) -> bool:
        while not is_ready(self):
            time.sleep(0.001)
        return True

    monkeypatch.setattr(feed.Chunks, "is_ready", wait_until_ready)  # text is always there
    processor, shards = ground.worker()
    late = LateDevice(processor, sum(num_batches))
    assert [contents(f.result()) for f in together(processor, shards)] == expected
    assert late.dry == []
    assert late.num_submitted == late.num_collected == sum(num_batches)
    assert SUBMITTED + 1 <= late.most_queued <= SLOTS * (SUBMITTED + 1)
    counters = processor.counters
    assert counters.measured == pytest.approx(NUM_SHARDS * NUM_DOCUMENTS)
    assert counters.documents == NUM_SHARDS * NUM_DOCUMENTS


def test_one_shard_queues_a_bounded_number_of_batches(ground: Ground) -> None:
    processor, shards = ground.worker()
    late = LateDevice(processor)
    processor.process(shards[0])
    assert late.num_submitted > late.most_queued == SUBMITTED + 1


def test_a_worker_on_a_gpu_queues_batches_and_never_makes_the_host_wait(ground: Ground) -> None:
    _, shards = ground.worker()
    with simulated.device() as log:
        processor, _ = ground.worker("cuda", "float16")
        turns = processor.measurer.turns
        submit, collect = turns.submit, flow.Queue.collect
        queued: list[int] = []

        def look(batch: TokenBatch) -> model.Pending:
            pending = submit(batch)
            queued.append(queued[-1] + 1 if queued else 1)
            return pending

        def count(self: flow.Queue) -> None:
            queued.append(queued[-1] - 1)
            collect(self)

        turns.submit = look
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow.Queue, "collect", count)
            log.clear()
            commit = processor.process(shards[0])
    assert log.waits == {} and max(queued) == SUBMITTED + 1 and queued[-1] == 0
    assert commit.counts["documents"] == NUM_DOCUMENTS and not commit.counts["quarantined"]


def test_nothing_stays_uncollected_while_there_is_no_text(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed.Chunks, "is_ready", lambda self: False)
    processor, shards = ground.worker()
    late = LateDevice(processor)
    next_chunk = feed.Chunks.__next__
    queued: list[int] = []

    def look(self: feed.Chunks) -> feed.Chunk:
        queued.append(late.num_submitted - late.num_collected)
        return next_chunk(self)

    monkeypatch.setattr(feed.Chunks, "__next__", look)
    processor.process(shards[0])
    assert len(queued) > 3 and set(queued) == {0}


@pytest.mark.parametrize("where", ["fail_at_submit", "fail_at_result"])
def test_a_document_at_fault_is_quarantined_and_leaves_its_neighbours_alone(
    where: str, ground: Ground
) -> None:
    expected, _ = one_after_the_other(ground)
    processor, shards = ground.worker()
    late, has_culprit = LateDevice(processor), culprit_in(processor)

    def fail(batch: TokenBatch) -> None:
        if has_culprit(batch):
            raise ValueError("no such place")

    setattr(late, where, fail)
    before, commit, after = (f.result() for f in together(processor, shards))
    assert [contents(before), contents(after)] == [expected[0], expected[2]]
    store, measure = processor.task.config.store, processor.task.measure
    rows = shard_files.read_shard_table(store, measure.id, commit, "documents").to_pylist()
    why = "quarantined: the model cannot take it: ValueError: no such place"
    assert [row["status"] for row in rows] == [
        why if i == NUM_DOCUMENTS // 2 else "ok" for i in range(NUM_DOCUMENTS)
    ]
    assert processor.counters.measured == pytest.approx(NUM_SHARDS * NUM_DOCUMENTS)


@pytest.mark.parametrize("where", ["fail_at_submit", "fail_at_result"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(5, "input/output error"), OSError),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceFault),
    ],
)
def test_an_error_fails_its_own_shard(
    where: str, error: Exception, raised: type[Exception], ground: Ground
) -> None:
    expected, _ = one_after_the_other(ground)
    processor, shards = ground.worker()
    late, has_culprit = LateDevice(processor), culprit_in(processor)

    def fail(batch: TokenBatch) -> None:
        if has_culprit(batch):
            raise error

    setattr(late, where, fail)
    before, failed, after = together(processor, shards)
    with pytest.raises(raised, match=str(error.args[-1])):
        failed.result()
    assert [contents(before.result()), contents(after.result())] == [expected[0], expected[2]]
    setattr(late, where, lambda batch: None)
    oom_retries = 1 if raised is OutOfMemory else 0
    commit = processor.process(shards[1], oom_retries)
    if not oom_retries:
        assert contents(commit) == expected[1]
    else:  # half the budget, as where nothing else is in flight
        alone, same_shards = ground.worker()
        assert contents(alone.process(same_shards[1], 1)) == contents(commit)


class Activation:
    """Memory that a forward pass holds on the device."""


@pytest.fixture
def uncollected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Collect no garbage in this context: what refers to itself stays."""
    gc.collect()
    monkeypatch.setattr(gc, "collect", lambda *args: 0)
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("where", ["fail_at_submit", "fail_at_result"])
def test_a_batch_that_does_not_fit_leaves_nothing_for_the_next_one_to_meet(
    where: str, ground: Ground, uncollected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, shards = ground.worker()
    late = LateDevice(processor)
    made: list[weakref.ref[Activation]] = []
    freed: list[int] = []  # batches submitted before each call
    alive: list[int] = []  # activations, as each batch after the failed one finds them

    def forward(batch: TokenBatch) -> None:
        activation = Activation()
        made.append(weakref.ref(activation))
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    def fail(batch: TokenBatch) -> None:
        if not made:
            forward(batch)
        alive.append(sum(ref() is not None for ref in made))

    setattr(late, where, fail)
    monkeypatch.setattr(model, "free_memory", lambda: freed.append(len(alive)))
    errors = [error for f in together(processor, shards) if (error := f.exception())]
    assert [type(error) for error in errors] == [OutOfMemory]
    assert "memory of cpu: CUDA out of memory" in str(errors[0])
    assert len(made) == 1 and made[0]() is None
    assert freed == [0] and len(alive) > SUBMITTED and set(alive) == {0}


def test_a_gpu_is_empty_again_after_a_batch_that_does_not_fit(
    ground: Ground, uncollected: None
) -> None:
    _, shards = ground.worker()
    with simulated.device() as log:
        processor, _ = ground.worker("cuda", "float16")
        processor.process(shards[1])
        loaded, held = log.memory.live_bytes, 0

        def run_out(module: torch.nn.Module, args: Any, output: Any) -> None:
            nonlocal held
            held = log.memory.live_bytes - loaded
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        handle = processor.measurer.model.blocks[0].register_forward_hook(run_out)
        with pytest.raises(OutOfMemory, match="memory of cuda") as raised:
            processor.process(shards[0])
        assert held > 0 and log.memory.live_bytes == loaded
        assert raised.value.__traceback__ is not None
        handle.remove()
        assert processor.process(shards[0], 1).counts["documents"] == NUM_DOCUMENTS


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError, OSError), (MemoryError, OutOfMemory)],
)
def test_nothing_of_a_failed_shard_outlives_its_attempt(
    error: type[Exception],
    raised: type[Exception],
    ground: Ground,
    uncollected: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor, shards = ground.worker()
    begin, made = flow.Turns.begin, list[weakref.ref[Any]]()

    def look(self: flow.Turns, chunk: feed.Chunk, **options: Any) -> flow.PendingChunk:
        pending = begin(self, chunk, **options)
        made.append(weakref.ref(pending))
        return pending

    def fail(batch: TokenBatch) -> None:
        raise error("no")

    monkeypatch.setattr(flow.Turns, "begin", look)
    LateDevice(processor).fail_at_submit = fail
    with pytest.raises(raised):
        processor.process(shards[0])
    assert made and [ref() for ref in made] == [None] * len(made)


def test_a_chunk_whose_values_do_not_fit_is_an_error_of_memory(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, shards = ground.worker()

    def run_out(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(flow.PendingChunk, "__init__", run_out)
    with pytest.raises(OutOfMemory, match="memory of cpu: MemoryError"):
        processor.process(shards[0])


def test_a_worker_remembers_the_token_budget_that_fitted(ground: Ground) -> None:
    processor, shards = ground.worker()
    late = LateDevice(processor)
    budgets: list[int] = []  # of the batches, in tokens

    def look(batch: TokenBatch) -> None:
        budgets.append(len(batch.ids))

    def run_out(batch: TokenBatch) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    def process(shard: Shard) -> int:
        budgets.clear()
        processor.process(shard)
        return min(budgets)  # only a batch of one window is larger

    def fail(shard: Shard, oom_retries: int) -> None:
        late.fail_at_submit = run_out
        with pytest.raises(OutOfMemory):
            processor.process(shard, oom_retries)
        late.fail_at_submit = look

    late.fail_at_submit = look
    assert process(shards[0]) == 64
    fail(shards[1], 0)
    assert process(shards[1]) == 32  # another one begins with half
    fail(shards[2], 5)
    assert worker.LASTING_HALVINGS == 2
    assert process(shards[2]) == 16  # however small the budget of the shard that failed


def second_passes_first(
    processor: Processor,
    shards: list[Shard],
    expected: list[list[str]],
    waits: threading.Event,
    release: threading.Event,
) -> None:
    """The second shard is complete while the first one waits; both have the ``expected`` rows."""
    with ThreadPoolExecutor(SLOTS) as pool:
        try:
            slow = pool.submit(processor.process, shards[0])
            assert waits.wait(60)
            other = pool.submit(processor.process, shards[1])
            assert contents(other.result(60)) == expected[1]
            assert not slow.done()
        finally:
            release.set()
        assert contents(slow.result()) == expected[0]


def test_a_shard_without_text_lets_another_one_have_the_model(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = one_after_the_other(ground)
    processor, shards = ground.worker()
    late = LateDevice(processor)
    began, text = threading.Event(), threading.Event()
    in_chunks = feed.in_chunks

    def delay(documents: Any) -> Iterator[Any]:
        for i, chunk in enumerate(in_chunks(documents)):
            if i and chunk[0].source == shards[0].slices[0].uri:
                text.wait()
            yield chunk

    monkeypatch.setattr(feed, "in_chunks", delay)
    late.fail_at_submit = lambda batch: began.set()
    second_passes_first(processor, shards, expected, began, text)


def test_a_shard_that_waits_for_its_writer_lets_another_one_have_the_model(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = one_after_the_other(ground)
    processor, shards = ground.worker()
    LateDevice(processor)
    monkeypatch.setattr(worker, "WAITING_BYTES", 0)
    waits, room = threading.Event(), threading.Event()
    write = Processor._write
    recorders: list[object] = []

    def write_late(self: Processor, recorder: Any, made: Any) -> None:
        recorders.append(recorder)
        if recorder is recorders[0]:
            room.wait()
        write(self, recorder, made)

    def look(futures: Any) -> Any:
        waits.set()
        return wait(futures)

    monkeypatch.setattr(Processor, "_write", write_late)
    monkeypatch.setattr("afn_ray.runs.worker.wait", look)
    second_passes_first(processor, shards, expected, waits, room)


def test_the_seconds_of_a_shard_count_chunks_that_are_measured_again(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, shards = ground.worker()
    late, has_culprit = LateDevice(processor), culprit_in(processor)
    now, tried = [0.0], list[TokenBatch]()
    monkeypatch.setattr(flow, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def fail(batch: TokenBatch) -> None:
        tried.append(batch)
        now[0] += 1.0  # each batch takes a second
        if has_culprit(batch):
            raise ValueError("no such place")

    late.fail_at_submit = fail
    commit = processor.process(shards[1])
    assert commit.counts["quarantined"] == 1
    assert commit.seconds == len(tried) > late.num_submitted


def test_an_error_of_the_corpus_fails_its_own_shard(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = one_after_the_other(ground)
    processor, shards = ground.worker()
    LateDevice(processor)
    in_chunks = feed.in_chunks

    def fail(documents: Any) -> Iterator[Any]:
        for i, chunk in enumerate(in_chunks(documents)):
            if i and shards[1].slices[0].uri == chunk[0].source:
                raise CorpusError("the file is damaged")
            yield chunk

    monkeypatch.setattr(feed, "in_chunks", fail)
    before, failed, after = together(processor, shards)
    with pytest.raises(CorpusError, match="damaged"):
        failed.result()
    assert [contents(before.result()), contents(after.result())] == [expected[0], expected[2]]


def test_a_worker_that_is_stopped_ends_all_of_its_shards(ground: Ground) -> None:
    processor, shards = ground.worker()
    late = LateDevice(processor)

    def stop(batch: TokenBatch) -> None:
        if late.num_collected > 3:
            processor.stop()

    late.fail_at_result = stop
    for ended in together(processor, shards):
        with pytest.raises(Interrupted):
            ended.result()


def test_time_counts_once_however_many_shards_share_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(flow, "time", SimpleNamespace(monotonic=lambda: now[0]))
    counters = Counters()

    def submit(batch: TokenBatch) -> model.Pending:
        raise AssertionError("nothing is submitted")

    turns = flow.Turns(submit, (1, 0), "cuda", counters, lambda: None)

    def work(seconds: float) -> tuple[float, float]:
        """Seconds of work and of waits so far, after some more."""
        now[0] += seconds
        turns._change()
        return counters.model_s, counters.wait_s

    assert work(1.0) == (0, 0)  # nobody wants anything
    with turns.waiting():
        assert work(2.0) == (0, 2)
        turns.take()
        assert work(4.0) == (0, 2)  # a shard has the turn and text: it prepares a batch
        turns.add_batch()
        turns.add_batch()
        assert work(8.0) == (8, 2)
        turns.remove_batch()
        assert work(16.0) == (24, 2)
        turns.remove_batch()
        turns.pass_on()
        with turns.waiting():
            assert work(32.0) == (24, 34)
            turns.add_batch()  # the last batch of the shard before
            assert work(64.0) == (88, 34)
            turns.remove_batch()
