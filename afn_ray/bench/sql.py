"""What questions to a large run take: a generated store of as many rows as asked for, reduced and asked in SQL.

    python -m afn_ray.bench.sql reduce STORE FIRST
    python -m afn_ray.bench.sql ask STORE QUESTION

are one reduce of a run and one question in a process of its own, so that its memory is its own; each prints a line of
JSON.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from afn_ray import manifest, reduce
from afn_ray.config import RunConfig
from afn_ray.records import ShardFiles, make_table
from afn_ray.schema import SPECIAL, WORD_START, FileSlice, Shard, fingerprint
from afn_ray.thresholds import Summary, round_strengths

NUM_TYPES = 30_522
"""Of BERT's vocabulary."""
LAYER = 8
MEASURE = {"model": "generated"}
SHARD_TOKENS = 2_000_000
DOCUMENT_TOKENS = 200
CHUNK_TOKENS = 400_000
CLS, SEP = 101, 102
CONTINUES_EVERY = 5
"""One type in so many continues a word, as in English text under BERT's vocabulary."""
CAPITAL_SHARE = 0.1
SYLLABLES = [c + v for c in "bdfghjklmnprst" for v in "aeiou"]


def pieces() -> tuple[list[str], list[str]]:
    """Every type by id: as a tokenizer would write it, and as a reader does."""
    readable = [_spell(i) for i in range(NUM_TYPES)]
    written = [f"##{t}" if _continues(i) else t for i, t in enumerate(readable)]
    for at, name in ((CLS, "[CLS]"), (SEP, "[SEP]")):
        written[at] = readable[at] = name
    return written, readable


def _spell(number: int) -> str:
    first, rest = SYLLABLES[number % len(SYLLABLES)], number // len(SYLLABLES)
    return first + (_spell(rest - 1) if rest else "")


def _continues(ids: Any) -> Any:
    return ids % CONTINUES_EVERY == CONTINUES_EVERY - 1


def frequent_word() -> str:
    """A word that is one in a thousand of the tokens."""
    return _spell(110)


# --- the store -------------------------------------------------------------------------------------------


def _config(store: str) -> RunConfig:
    return RunConfig(corpus=("generated",), model="generated", store=store, layers=str(LAYER))


def _shard(store: str, number: int) -> Shard:
    piece = FileSlice(
        f"generated/part-{number:05d}.jsonl", 1, "etag:0", "jsonl", "", 0, 1, 1, SHARD_TOKENS // DOCUMENT_TOKENS,
        sha256(b"%d" % number).hexdigest(),
    )  # fmt: skip
    return Shard.of([piece], _config(store).read_options)


def write_shard(store: str, number: int, num_documents: int) -> None:
    """Commit shard ``number``: Zipf's law over types, lognormal strengths around a mean of each type."""
    law = np.random.default_rng(0)
    means, shares = law.normal(2.3, 0.12, NUM_TYPES), 1 / np.arange(10, NUM_TYPES + 10)
    cumulative = np.cumsum(shares / shares.sum())
    _, readable = pieces()
    capitalized = pa.array([text.capitalize() for text in readable])
    random = np.random.default_rng([1, number])
    shard = _shard(store, number)
    origin = {"measure": fingerprint(MEASURE), "shard": shard.id, "attempt": "0"}
    summary = Summary((LAYER,))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as scratch:
        files = ShardFiles(Path(scratch), (LAYER,), offsets=True, origin=origin)
        with files:
            step = CHUNK_TOKENS // DOCUMENT_TOKENS
            for first in range(0, num_documents, step):
                docs = np.arange(first, min(first + step, num_documents), dtype=np.int32)
                n = len(docs) * DOCUMENT_TOKENS
                position = np.tile(np.arange(DOCUMENT_TOKENS, dtype=np.int32), len(docs))
                ids = np.minimum(np.searchsorted(cumulative, random.random(n)), NUM_TYPES - 1).astype(np.int32)
                ids[position == 0], ids[position == DOCUMENT_TOKENS - 1] = CLS, SEP
                special = (position == 0) | (position == DOCUMENT_TOKENS - 1)
                head = ~special & (~_continues(ids) | (position == 1))
                flags = np.where(special, SPECIAL, np.where(head, WORD_START, 0)).astype(np.uint8)
                alone = head & np.append(head[1:] | special[1:], True)
                no_surface = ~(alone & (random.random(n) < CAPITAL_SHARE))
                strengths = round_strengths(np.exp(means[ids] + 0.1 * random.standard_normal(n)).astype(np.float32))
                columns = {
                    "doc": np.repeat(docs, DOCUMENT_TOKENS), "position": position, "token_id": ids, "flags": flags,
                    "surface": pa.DictionaryArray.from_arrays(pa.array(ids, mask=no_surface), capitalized),
                    "start": 6 * position, "end": 6 * position + 5, f"strength_{LAYER}": strengths,
                }  # fmt: skip
                schema = files.tokens.schema
                files.tokens.write(pa.Table.from_arrays([pa.array(columns[f.name]) for f in schema], schema=schema))
                summary.add(columns["doc"], ids, flags, {LAYER: strengths})
                mean = strengths.reshape(-1, DOCUMENT_TOKENS)[:, 1:-1].mean(1)
                files.documents.write(
                    make_table(
                        {
                            "doc": docs, "doc_id": [f"{number}-{i}" for i in docs.tolist()],
                            "source": [shard.slices[0].uri] * len(docs), "offset": docs.astype(np.int64),
                            "n_tokens": np.full(len(docs), DOCUMENT_TOKENS), "n_windows": np.ones(len(docs), int),
                            "n_chars": np.full(len(docs), 6 * DOCUMENT_TOKENS),
                            "n_replaced": np.zeros(len(docs), int),
                            "text_sha256": [sha256(b"%d %d" % (number, i)).digest() for i in docs.tolist()],
                            "status": ["ok"] * len(docs), f"mean_strength_{LAYER}": mean,
                        },
                        files.documents.schema,
                    )
                )  # fmt: skip
            files.write_summary(summary.tables())
        tokens = num_documents * DOCUMENT_TOKENS
        counts = {"documents": num_documents, "empty": 0, "quarantined": 0, "tokens": tokens,
                  "special": 2 * num_documents, "windows": num_documents, "forward_tokens": tokens,
                  "chars": 6 * tokens}  # fmt: skip
        manifest.publish(
            store, fingerprint(MEASURE), shard, "0", files.tables(), counts, time.monotonic() - began, {"device": "-"}
        )


def finish(store: str, first: int, num_shards: int) -> dict[str, Any]:
    """Plan and reduce the run of the shards from ``first`` on, and make it complete; what the reduce took."""
    config = _config(store)
    shards = [_shard(store, number) for number in range(first, first + num_shards)]
    measure_id = fingerprint(MEASURE)
    commits = manifest.find_commits(store, measure_id, shards)
    ordered = [commits[shard.id] for shard in shards]
    folder = manifest.begin_run(config, MEASURE, manifest.Plan(tuple(shards), (), (), 0), time.time_ns())
    written, readable = pieces()
    before, began = _memory_bytes("VmRSS"), time.monotonic()
    tables = reduce.reduce_run(
        store, measure_id, ordered, (LAYER,), pieces=written, readable=readable, language="en", sink_factor=10.0,
        num_bytes=[1] * len(ordered),
    )  # fmt: skip
    seconds = time.monotonic() - began
    tokens = sum(c.counts["tokens"] for c in ordered)
    info = {
        "measure": {"id": measure_id, **MEASURE}, "model": {"name": "generated"}, "layers": [LAYER],
        "tables": {name: manifest.write_table(folder, name, table) for name, table in tables.items()},
        "config": asdict(config), "corpus": {"files": num_shards, "skipped": [], "bytes": num_shards},
        "precision": {"dtype": "float32"}, "quarantined": [], "seconds": 0.0,
        "counts": {"shards": num_shards, "documents": sum(c.counts["documents"] for c in ordered), "tokens": tokens},
        "created_at": manifest.created_at(folder), "finished_at": manifest.created_at(folder),
    }  # fmt: skip
    run = manifest.finish_run(folder, info)
    return {"run": run.uri, "seconds": seconds, "tokens": tokens, "before_bytes": before,
            "peak_bytes": _memory_bytes("VmHWM")}  # fmt: skip


def _memory_bytes(name: str) -> int:
    """``VmRSS`` (resident now) or ``VmHWM`` (its peak) of this process."""
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(kilobytes) * 1024
