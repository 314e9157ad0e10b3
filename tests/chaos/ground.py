"""Ground of a chaos test: a corpus of small shards, a model, and the rows that an undisturbed
run records.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

import afn_ray
from afn_ray.analysis import verify
from afn_ray.config import RunConfig
from conftest import recorded, write_jsonl

NUM_SHARDS = 12
SHARD_BYTES = 2048


@dataclass(frozen=True)
class Ground:
    """A corpus of small shards on one kind of filesystem, and the rows that an undisturbed run
    recorded.
    """

    kind: str
    corpus: str
    model: str
    expected: tuple[pa.Table, ...]
    folder: Path

    def store(self) -> str:
        """A place for a fresh store."""
        name = uuid.uuid4().hex[:8]
        return (
            str(self.folder / name)
            if self.kind == "local"
            else f"{self.corpus.rsplit('/', 1)[0]}/{name}"
        )

    def config(self, store: str, **changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "corpus": (self.corpus,),
            "model": self.model,
            "store": store,
            "layers": "2",
            "dtype": "float32",
            "shard_bytes": SHARD_BYTES,
            "executor": "inline",
            "batch_tokens": 256,
        }
        return RunConfig(**(values | changes))

    def arguments(self, store: str, **changes: str) -> list[str]:
        """The same as flags of ``afn run``."""
        options = {
            "model": self.model,
            "store": store,
            "layers": "2",
            "dtype": "float32",
            "executor": "inline",
            "shard-bytes": str(SHARD_BYTES),
            "batch-tokens": "256",
        } | changes
        return ["run", self.corpus, *(f"--{k}={v}" for k, v in options.items())]

    def check(self, store: str) -> None:
        """The store is whole and has every token of the corpus once."""
        self.check_whole(store)
        with afn_ray.open_run(store) as run:
            for mine, theirs in zip(recorded(run), self.expected, strict=True):
                assert mine.equals(theirs)

    def check_whole(self, store: str) -> None:
        found = verify.verify_store(store)
        assert not found.findings and not found.unproved, list(verify.lines(found))


def make_ground(kind: str, folder: Path, model: Path, verses: list[str]) -> Ground:
    """A corpus on ``kind`` ("local", below ``folder``, or "s3", a new bucket), and what a run over
    it records.
    """
    local = folder / "corpus"
    local.mkdir()
    for i in range(NUM_SHARDS):
        write_jsonl(local / f"{i:02}.jsonl", [{"text": t} for t in verses[12 * i : 12 * i + 12]])
    corpus = str(local)
    if kind == "s3":
        bucket = uuid.uuid4().hex
        s3 = fsspec.filesystem("s3")
        s3.mkdir(bucket)
        s3.put(f"{local}/", f"{bucket}/corpus/", recursive=True)
        corpus = f"s3://{bucket}/corpus"
    ground = Ground(kind, corpus, str(model), (), folder)
    with afn_ray.run(ground.config(ground.store())) as run:
        assert run.info["counts"]["shards"] == NUM_SHARDS
        return replace(ground, expected=recorded(run))
