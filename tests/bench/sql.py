"""Measure queries of a large generated run, and its reduce and screening.

    PYTHONPATH=tests python -m bench.sql reduce STORE FIRST SHARDS
    PYTHONPATH=tests python -m bench.sql ask RUN BASELINE QUESTION REPEAT

The first command reduces and screens one run. The second runs one query REPEAT times. Both print
one line of JSON. Each has a separate process, to measure its memory alone.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from afn_ray import cgroup, kept
from afn_ray.bench import machine
from afn_ray.bench.machine import own_memory_bytes
from afn_ray.config import RunConfig
from afn_ray.corpus_values import FileSlice, Shard
from afn_ray.measure import Measure
from afn_ray.query import database
from afn_ray.reduce import losses, screen, tree
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.shard_summary import Summary
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import TokenTexts
from afn_ray.run_info import RunInfo
from afn_ray.schema import NOT_KEPT, SPECIAL, TOKEN_CHARS, WORD_START, Series
from afn_ray.store import manifest, plans, run_claims, shard_files
from afn_ray.store.commits import COUNTS
from afn_ray.store.records import CorpusColumns, ShardFiles, make_table
from bench.apart import call_apart

NUM_TYPES = 30_522
"""Size of BERT's vocabulary, in types."""
LAYER = 8
SERIES = Series("strength", LAYER)
MEASURE = Measure(
    model=(("name", "generated"),),
    model_type="bert",
    layers=(LAYER,),
    signals=("strength",),
    series=(SERIES,),
    window_tokens=512,
    overlap_tokens=128,
    offsets=True,
    dtype="float32",
)
SHARD_TOKENS = 2_000_000
"""Largest size of a shard, in tokens."""
DOCUMENT_TOKENS = 200
GROUP = "lang"
"""Kept column of documents that belong to groups."""
CHUNK_TOKENS = 400_000
"""Tokens that are generated and written at once."""
CLS, SEP = 101, 102
"""Ids of the special tokens of BERT."""
CONTINUES_EVERY = 5
"""Interval of the types that continue a word; their share is as in English text with BERT."""
ENDINGS = 3
"""Number of ways in which the words that begin with one type go on."""
CAPITAL_SHARE = 0.1
"""Share of the one-token words that are capitalized."""
QUESTIONS = {
    "types that are HIGH most often": "FROM vocabulary WHERE n >= 100 ORDER BY share_high DESC "
    "LIMIT 20",
    "movers since a baseline": "FROM movers WHERE status = 'both' ORDER BY q, abs(z) DESC LIMIT 20",
    "class shares": "SELECT class, sum(n), sum(n_high) / sum(n) FROM vocabulary GROUP BY ALL",
    "drift since a baseline": "FROM drift",
    "strangest documents": "FROM screened ORDER BY rank LIMIT 20",
    "100 occurrences of a frequent word": "FROM kwic($word, 5, most := 100)",
    "every occurrence of a rare word": "FROM kwic($rare, 5)",
    "one document's words": "FROM words WHERE doc = 500",
    "one document's text": "SELECT document_text(500)",
    "every word of the run": "SELECT count(*), sum(length(text)), avg(max_strength_8) FROM words",
}
"""SQL of each query, by name; the first five read the reduced tables only."""
SYLLABLES = [c + v for c in "bdfghjklmnprst" for v in "aeiou"]


def pieces() -> tuple[list[str], list[str]]:
    """All types by id: as in a tokenizer's vocabulary, and as readable text."""
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


def _completed(ids: Any, head: Any, special: Any, random: np.random.Generator) -> Any:
    """``ids`` with the words that begin at ``head`` completed in one of ``ENDINGS`` ways each.

    Words then recur, as in text.
    """
    begins = np.maximum.accumulate(np.where(head | special, np.arange(len(ids)), 0))
    ending = random.integers(0, ENDINGS, len(ids))[begins]
    nth = np.arange(len(ids)) - begins
    mixed = (ids[begins].astype(np.int64) * ENDINGS + ending) * 8 + np.minimum(nth, 7)
    others = mixed * 2_654_435_761 % (NUM_TYPES // CONTINUES_EVERY) * CONTINUES_EVERY
    return np.where(nth > 0, others + CONTINUES_EVERY - 1, ids).astype(np.int32)


WORDS = {"word": 110, "rare": 20_000}
"""Types that queries search for, by parameter: about 1 token in 1,000, and 1 in 150,000."""


# --- the store


def _config(store: str) -> RunConfig:
    return RunConfig(corpus=("generated",), model="generated", store=store, layers=str(LAYER))


def shard_of(store: str, number: int) -> Shard:
    piece = FileSlice(
        f"generated/part-{number:05d}.jsonl",
        1,
        "etag:0",
        "jsonl",
        "",
        0,
        1,
        1,
        SHARD_TOKENS // DOCUMENT_TOKENS,
        sha256(b"%d" % number).hexdigest(),
    )
    return Shard.of([piece], _config(store).read_options)


def write_shard(store: str, number: int, num_documents: int, num_groups: int = 0) -> None:
    """Generate and commit the shard ``number``.

    With ``num_groups``, documents have the kept column ``GROUP``, whose values take turns. Types
    have Zipf frequencies, and strengths are lognormal around the mean of their type.
    """
    law = np.random.default_rng(0)
    means, shares = law.normal(2.3, 0.12, NUM_TYPES), 1 / np.arange(10, NUM_TYPES + 10)
    cumulative = np.cumsum(shares / shares.sum())
    _, readable = pieces()
    capitalized = pa.array([text.capitalize() for text in readable])
    random = np.random.default_rng([1, number])
    shard = shard_of(store, number)
    origin = {"measure": MEASURE.id, "shard": shard.id, "attempt": "0"}
    summary = Summary((SERIES,))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as scratch:
        of_corpus = CorpusColumns(kept=kept.fields_of(GROUP) if num_groups else ())
        files = ShardFiles(Path(scratch), (SERIES,), (), True, origin, of_corpus)
        with files:
            step = CHUNK_TOKENS // DOCUMENT_TOKENS
            for first in range(0, num_documents, step):
                docs = np.arange(first, min(first + step, num_documents), dtype=np.int32)
                n = len(docs) * DOCUMENT_TOKENS
                position = np.tile(np.arange(DOCUMENT_TOKENS, dtype=np.int32), len(docs))
                ids = np.minimum(
                    np.searchsorted(cumulative, random.random(n)), NUM_TYPES - 1
                ).astype(np.int32)
                ids[position == 0], ids[position == DOCUMENT_TOKENS - 1] = CLS, SEP
                special = (position == 0) | (position == DOCUMENT_TOKENS - 1)
                head = ~special & (~_continues(ids) | (position == 1))
                flags = np.where(special, SPECIAL, np.where(head, WORD_START, 0)).astype(np.uint8)
                alone = head & np.append(head[1:] | special[1:], True)
                ids = _completed(ids, head, special, random)
                no_surface = ~(alone & (random.random(n) < CAPITAL_SHARE))
                strengths = round_strengths(
                    np.exp(means[ids] + 0.1 * random.standard_normal(n)).astype(np.float32)
                )
                columns = {
                    "doc_in_shard": np.repeat(docs, DOCUMENT_TOKENS),
                    "position": position,
                    "token_id": ids,
                    "flags": flags,
                    "surface": pa.DictionaryArray.from_arrays(
                        pa.array(ids, mask=no_surface), capitalized
                    ),
                    "start_ahead": (6 - TOKEN_CHARS) * position,
                    "length": np.full(n, 5, np.int32),
                    SERIES.name: strengths,
                }
                schema = files.tokens.schema
                files.tokens.write(
                    pa.Table.from_arrays([pa.array(columns[f.name]) for f in schema], schema=schema)
                )
                summary.add(columns["doc_in_shard"], ids, flags, {SERIES: strengths})
                mean = strengths.reshape(-1, DOCUMENT_TOKENS)[:, 1:-1].mean(1)
                files.documents.write(
                    make_table(
                        {
                            "doc_in_shard": docs,
                            "doc_id": [f"{number}-{i}" for i in docs.tolist()],
                            "source": [shard.slices[0].uri] * len(docs),
                            "offset": docs.astype(np.int64),
                            "n_tokens": np.full(len(docs), DOCUMENT_TOKENS),
                            "n_windows": np.ones(len(docs), int),
                            "n_chars": np.full(len(docs), 6 * DOCUMENT_TOKENS),
                            **dict.fromkeys(
                                ("n_replaced", "lost_bytes", "lost_documents"),
                                np.zeros(len(docs), int),
                            ),
                            "text_sha256": [
                                sha256(b"%d %d" % (number, i)).digest() for i in docs.tolist()
                            ],
                            "status": ["ok"] * len(docs),
                            f"mean_{SERIES.name}": mean,
                            GROUP: [f"g{i % max(1, num_groups):02}" for i in docs.tolist()],
                            NOT_KEPT: [None] * len(docs),
                        },
                        files.documents.schema,
                    )
                )
            files.summary.write_each(summary.tables())
        tokens = num_documents * DOCUMENT_TOKENS
        counts = {
            **dict.fromkeys(COUNTS, 0),
            "documents": num_documents,
            "tokens": tokens,
            "special": 2 * num_documents,
            "windows": num_documents,
            "forward_tokens": tokens,
            "chars": 6 * tokens,
        }
        attempt = shard_files.Attempt(
            "0", files.tables(), counts, time.monotonic() - began, {"device": "-"}
        )
        shard_files.publish(store, MEASURE.id, shard, attempt)


def finish(store: str, first: int, num_shards: int) -> dict[str, Any]:
    """Plan, reduce and screen the run of ``num_shards`` shards from ``first``.

    Returns its URI, and the time and the peak memory of the reduce and of the screening. The peak
    memory of the screening is that of the process, so it includes the reduce.
    """
    config = _config(store)
    shards = [shard_of(store, number) for number in range(first, first + num_shards)]
    measure_id = MEASURE.id
    commits = shard_files.find_commits(store, measure_id, shards)
    ordered = [commits[shard.id] for shard in shards]
    folder = run_claims.begin_run(
        config, MEASURE, plans.Plan(tuple(shards), (), (), 0), time.time_ns()
    ).run
    texts = TokenTexts(*pieces())
    before, began = own_memory_bytes("VmRSS"), time.monotonic()
    committed = CommittedShards(store, measure_id, ordered, [1] * len(ordered))
    tables = tree.reduce_run(
        committed, tree.RecordedSeries((SERIES,)), texts, tree.LabelRules("en", 10.0)
    )
    seconds, peak = time.monotonic() - began, own_memory_bytes("VmHWM")
    began = time.monotonic()
    tables["files"] = losses.files_table(committed, shards, ())
    tables |= screen.scan_run(
        committed, (LAYER,), tables, texts.readable, screen.Asked(config.screen)
    )
    screening_s = time.monotonic() - began
    tokens = sum(c.counts["tokens"] for c in ordered)
    info: RunInfo = {
        "measure": {"id": measure_id, **MEASURE.as_dict()},
        "model": {"name": "generated"},
        "layers": [LAYER],
        "tables": {
            name: manifest.write_table(folder, name, table) for name, table in tables.items()
        },
        "config": asdict(config),
        "corpus": {"files": num_shards, "bytes": num_shards, "skipped": 0},
        "precision": {"dtype": "float32"},
        "quarantined": [],
        "seconds": 0.0,
        "counts": {
            "shards": num_shards,
            "documents": sum(c.counts["documents"] for c in ordered),
            "tokens": tokens,
        },
        "created_at": plans.created_at(folder),
        "finished_at": plans.created_at(folder),
    }
    run = manifest.finish_run(folder, info)
    return {
        "run": run.uri,
        "shards": num_shards,
        "seconds": seconds,
        "tokens": tokens,
        "before_bytes": before,
        "peak_bytes": peak,
        "screening_s": screening_s,
        "screening_peak_bytes": own_memory_bytes("VmHWM"),
    }


# --- the figures


def measure(num_rows: int, repeat: int, on_note: Callable[[str], None]) -> dict[str, Any]:
    """Measure three reduces, and each query ``repeat`` times; the result is as ``--json`` has it.

    The first reduce is of a fifth of the shards. The two others are the baseline and the run. The
    store has one shard more than each: the baseline lacks the last one, and the run the first.
    """
    num_documents = max(2, min(SHARD_TOKENS, num_rows // 5) // DOCUMENT_TOKENS)
    num_shards = max(1, num_rows // (num_documents * DOCUMENT_TOKENS))
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as store:
        began = time.monotonic()
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
        with ProcessPoolExecutor(cgroup.num_cores(), mp_context=spawn) as pool:
            for _ in pool.map(
                partial(write_shard, store, num_documents=num_documents), range(num_shards + 1)
            ):
                pass
        size = sum(f.stat().st_size for f in Path(store).rglob("*-tokens.parquet"))
        on_note(
            f"{num_shards + 1:,} shards, {size / 1e6:,.0f} MB of tokens, written in "
            f"{time.monotonic() - began:.0f} s"
        )
        reduces = []
        for first, count in ((0, max(1, num_shards // 5)), (0, num_shards), (1, num_shards)):
            reduces.append(_apart("reduce", store, str(first), str(count)))
            on_note(
                f"{count:,} shards: reduce {reduces[-1]['seconds']:.1f} s, screening "
                f"{reduces[-1]['screening_s']:.1f} s"
            )
        *_, baseline, run = (r["run"] for r in reduces)
        asked = {}
        for question in QUESTIONS:
            asked[question] = _apart("ask", run, baseline, question, str(repeat))
            on_note(f"{question}: {statistics.median(asked[question]['seconds']):.2f} s")
    rows = num_shards * num_documents * DOCUMENT_TOKENS
    foreign = max(r["foreign"] for r in (*reduces, *asked.values()))
    return {
        **machine.facts("cpu"),
        "rows": rows,
        "token_bytes": size,
        "repeat": repeat,
        "reduces": reduces,
        "questions": asked,
        "foreign": foreign,
    }


def _apart(*arguments: str) -> dict[str, Any]:
    """Run this module with ``arguments`` in a separate process; return the JSON that it prints."""
    answer, watch = call_apart("bench.sql", *arguments)
    return {**answer, "foreign": round(watch.foreign, 3)}


def ask(run_uri: str, baseline: str, question: str, repeat: int) -> dict[str, Any]:
    """Open the run and execute the query ``question`` ``repeat`` times; return the times.

    The run has a baseline only when the query needs one.
    """
    sql = QUESTIONS[question]
    words = {name: _spell(number) for name, number in WORDS.items() if f"${name}" in sql}
    began = time.monotonic()
    with database.open_run(
        run_uri,
        baseline=baseline if "baseline" in question else None,
        timeout_s=database.MAX_TIMEOUT_S,
    ) as run:
        opening = time.monotonic() - began
        seconds, rows = [], 0
        for _ in range(repeat):
            began = time.monotonic()
            rows = len(run.sql(sql, words or None).fetchall())
            seconds.append(time.monotonic() - began)
    return {
        "opening_s": opening,
        "seconds": seconds,
        "rows": rows,
        "peak_bytes": own_memory_bytes("VmHWM"),
    }


def render(result: dict[str, Any], console: Console) -> None:
    """Print a row for each reduce and screening, and for each query."""
    machine.print_facts(machine.facts("cpu"), console)
    console.print(
        "\n"
        f"{result['rows']:,} rows, {result['token_bytes'] / 1e6:,.0f} MB of tokens; questions n = "
        f"{result['repeat']}, median (lowest-highest)",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("in one process", "s", "tokens/s", "peak MB"):
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    for r in result["reduces"]:
        for what, seconds, peak in (
            ("reduce", "seconds", "peak_bytes"),
            ("screening", "screening_s", "screening_peak_bytes"),
        ):
            table.add_row(
                f"{what} of {r['shards']:,} shards, {r['tokens']:,} tokens",
                f"{r[seconds]:,.1f}",
                f"{r['tokens'] / r[seconds]:,.0f}",
                f"{r[peak] / 1e6:,.0f}",
            )
    console.print(table)
    console.print()
    table = Table(box=None, pad_edge=False)
    for heading in ("question", "rows", "opening s", "s", "peak MB"):
        table.add_column(
            heading, justify="left" if heading == "question" else "right", no_wrap=True
        )
    for question, r in result["questions"].items():
        s = r["seconds"]
        figures = f"{statistics.median(s):.3f} ({min(s):.3f}-{max(s):.3f})"
        table.add_row(
            question,
            f"{r['rows']:,}",
            f"{r['opening_s']:.2f}",
            figures,
            f"{r['peak_bytes'] / 1e6:,.0f}",
        )
    console.print(table)
    console.print(
        f"\nOthers took up to {result['foreign']:.0%} of the cores meanwhile.", markup=False
    )


if __name__ == "__main__":
    if sys.argv[1] == "reduce":
        print(json.dumps(finish(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        print(json.dumps(ask(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))))
