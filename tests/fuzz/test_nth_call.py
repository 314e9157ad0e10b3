"""A run whose n-th call to a filesystem fails ends with all rows or an error, and the next one
completes it.
"""

from __future__ import annotations

import errno
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import fsspec
import pytest

import afn_ray
import faults
from afn_ray.analysis import verify
from afn_ray.config import RunConfig
from afn_ray.errors import AfnError
from conftest import recorded

NUM_DOCUMENTS = 40
NUM_FAULTS = {"short": 8, "long": 500}
ERRORS: dict[str, Callable[[], BaseException]] = {
    "full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "denied": lambda: PermissionError(errno.EACCES, "Permission denied"),
    "gone": lambda: OSError(errno.ENXIO, "No such device or address"),
    "throttled": lambda: faults.s3_error("SlowDown", 503),
}
"""Errors that a call raises, by name."""


@dataclass
class NthCall:
    """Call number ``n``, from 1, of any method fails; 0: none does, and calls are counted.

    ``acts``: the call does what it was asked for, and its answer is lost. ``stays``: all later
    calls fail too, as on a machine that was cut off.
    """

    n: int = 0
    error: str = "gone"
    acts: bool = False
    stays: bool = False
    calls: int = 0
    hit: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fate(self, method: str, path: str, *, has_older: bool) -> tuple[str, NthCall]:
        with self._lock:
            self.calls += 1
            fails = self.n > 0 and (self.calls == self.n or (self.stays and self.calls > self.n))
            if fails and not self.hit:
                self.hit = f"{method} {path}"
        return ("" if not fails else "lie" if self.acts else "fail"), self

    def choice(self, _: object) -> Callable[[], BaseException]:
        return ERRORS[self.error]

    def count(self, kind: str, method: str) -> None:
        """Nothing: ``hit`` says what failed."""


@contextmanager
def scheduled(schedule: NthCall) -> Iterator[NthCall]:
    """Calls go by ``schedule``; a store that goes on failing is given up soon."""
    with faults.injected(0, 0.0), pytest.MonkeyPatch.context() as patch:
        patch.setattr("afn_ray.store.retry.RETRY_FOR_S", 0.05)
        patch.setattr(faults.FaultyFileSystem, "schedule", schedule)
        yield schedule


@pytest.fixture(scope="module")
def memory_corpus(verses: list[str]) -> Iterator[str]:
    """A folder in memory with documents in four shards, one file compressed."""
    uri = f"memory://{uuid.uuid4().hex}"
    fs = fsspec.filesystem("memory")
    for name, texts in (
        ("a.jsonl", verses[:NUM_DOCUMENTS]),
        ("b.txt", verses[50:52]),
        ("c.csv", verses[60:70]),
    ):
        if name.endswith("jsonl"):
            data = "".join(f'{{"id": "v{i}", "text": "{text}"}}\n' for i, text in enumerate(texts))
        elif name.endswith("csv"):
            data = "id,text\n" + "".join(f'c{i},"{text}"\n' for i, text in enumerate(texts))
        else:
            data = "\n".join(texts)
        fs.pipe_file(f"{uri}/corpus/{name}", data.encode())
    yield f"{uri}/corpus"
    fs.rm(uri, recursive=True)


def test_a_run_whose_nth_call_fails_loses_nothing_without_a_word(
    memory_corpus: str, make_config: Callable[..., RunConfig], fuzz_length: str
) -> None:
    def config_at(store: str) -> RunConfig:
        return make_config(
            corpus=(faults.wrap(f"{memory_corpus}/*.jsonl"), faults.wrap(f"{memory_corpus}/*.csv")),
            store=faults.wrap(store),
            id_column="id",
            shard_bytes=2048,
            layers="0,2/3",
            screen=0,
        )

    root = memory_corpus.removesuffix("/corpus")
    with scheduled(NthCall()) as undisturbed, afn_ray.run(config_at(f"{root}/clean")) as run:
        expected = recorded(run)
    assert undisturbed.calls > 40
    dice = random.Random(7)
    ended: dict[str, int] = {"complete": 0, "error": 0}
    for number in range(NUM_FAULTS[fuzz_length]):
        store = f"{root}/store-{number}"
        config = config_at(store)
        fault = NthCall(
            dice.randint(1, undisturbed.calls),
            dice.choice(list(ERRORS)),
            dice.random() < 0.3,
            dice.random() < 0.3,
        )
        with scheduled(fault):
            try:
                with afn_ray.run(config) as run:
                    name = run.id
            except AfnError:
                ended["error"] += 1
                name = ""
            else:
                ended["complete"] += 1
        with scheduled(NthCall()), afn_ray.run(config) as again:
            got = recorded(again)
            findings = [] if number % 8 else verify.verify_store(config.store).findings
        assert all(a.equals(b) for a, b in zip(got, expected, strict=True)), fault
        assert not findings, (fault, findings[0])
        assert name in ("", again.id), fault  # a run that said that it is complete is
        fsspec.filesystem("memory").rm(store, recursive=True)
    assert min(ended.values()) > 0
