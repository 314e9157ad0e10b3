"""Memory stays flat, and a worker keeps to its core: what it takes is not a matter of the file or
of its neighbours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from afn_ray.runs import demo
from afn_ray.runs.cluster import connection

PEAK = """
import re, sys
from pathlib import Path
from afn_ray.cli.commands import main
try:
    main(sys.argv[1:])
finally:
    # Not getrusage: its maximum counts what this process was before exec, a copy of the one that
    # runs the tests.
    status = Path("/proc/self/status").read_text()
    print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""


def peak_bytes(corpus: Path, store: Path, model: Path, *flags: str) -> int:
    """Peak resident memory of a run that does all its work in one process, in one shard."""
    command = [
        sys.executable,
        "-c",
        PEAK,
        "run",
        str(corpus),
        "--model",
        str(model),
        "--store",
        str(store),
        "--executor",
        "inline",
        "--layers",
        "0",
        "--shard-bytes",
        str(2 << 30),
        "--quiet",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1])


def test_a_file_of_one_gigabyte_in_one_shard_stays_under_two(
    tmp_path: Path, tiny_bert: Path
) -> None:
    corpus = tmp_path / "big.jsonl"
    junk = "x" * 100_000
    with corpus.open("w") as out:
        for i in range(10_800):
            out.write(f'{{"noise": "{junk}", "text": "And it came to pass, number {i}."}}\n')
    assert corpus.stat().st_size > 1 << 30
    assert peak_bytes(corpus, tmp_path / "store", tiny_bert) < 1 << 30


def test_memory_does_not_grow_with_the_text(tmp_path: Path, tiny_bert: Path) -> None:
    verses = demo.corpus_file().read_bytes()
    peaks = []
    for copies in (1, 4):
        corpus = tmp_path / f"{copies}.jsonl"
        corpus.write_bytes(verses * copies)
        peaks.append(peak_bytes(corpus, tmp_path / f"store-{copies}", tiny_bert))
        corpus.unlink()
    assert peaks[1] - peaks[0] < 100 << 20, peaks


WORKER = """
import json, os, re, sys, time
from pathlib import Path
import pyarrow, torch
from afn_ray.runs import measurer, plan, worker
from afn_ray.config import RunConfig
corpus, model, store, shard_bytes, cores = sys.argv[1:]
os.sched_setaffinity(0, list(map(int, cores.split(","))))
config = RunConfig(corpus=(corpus,), model=model, store=store, executor="inline", layers="2",
                   shard_bytes=int(shard_bytes), batch_tokens=1024)
task = worker.prepare(config, measurer.find_model_files(config), "cpu", "float32")
processor, shards = worker.Processor(task), plan.make_plan(config).shards
resident = []
print("ready", flush=True)
sys.stdin.readline()
wall, cpu = time.monotonic(), time.process_time()
for shard in shards:
    processor.process(shard)
    status = Path("/proc/self/status").read_text()
    resident.append(int(re.search(r"VmRSS:\\s+(\\d+) kB", status)[1]) * 1024)
wall, cpu = time.monotonic() - wall, time.process_time() - cpu
processor.close()
print(json.dumps({
    "resident": resident, "torch": torch.get_num_threads(), "arrow": pyarrow.cpu_count(),
    "cores": cpu / wall,
    "tokens": processor.counters.tokens,
}))
"""


def work(
    corpora: list[Path], store: Path, model: Path, shard_bytes: int, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """Reports of one worker for each of ``corpora``: each processes one, all at once and on two
    cores.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    workers = []
    for at, corpus in enumerate(corpora):
        command = [
            sys.executable,
            "-c",
            WORKER,
            str(corpus),
            str(model),
            str(store / str(at)),
            str(shard_bytes),
            cores,
        ]
        pipe: Any = subprocess.PIPE
        env = {**os.environ, **environment}
        workers.append(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)
        )
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", worker.communicate(timeout=60)
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        said = [worker.communicate(timeout=400) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert [worker.returncode for worker in workers] == [0] * len(workers), said
    return [json.loads(out) for out, _ in said]


def first_verses(path: Path, num_bytes: int) -> Path:
    data = demo.corpus_file().read_bytes()[:num_bytes]
    path.write_bytes(data[: data.rindex(b"\n") + 1])
    return path


def test_memory_is_flat_over_fifty_shards(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = first_verses(tmp_path / "c.jsonl", 51 * 64 << 10)
    (worker,) = work([corpus], tmp_path / "store", tiny_bert, 64 << 10, connection.WORKER_ENV)
    resident = worker["resident"]
    assert len(resident) >= 50 and worker["tokens"] > 500_000
    after_10, after_50 = resident[9], resident[49]
    assert after_50 < 1.02 * after_10, (
        f"{after_10 >> 10} KiB after shard 10, {after_50 >> 10} KiB after shard 50"
    )


def test_two_workers_on_two_cores_take_one_each(tmp_path: Path, minilm: Path) -> None:
    corpora = [first_verses(tmp_path / f"{i}.jsonl", 160 << 10) for i in range(2)]
    for worker in work(corpora, tmp_path / "store", minilm, 80 << 10, connection.WORKER_ENV):
        assert (worker["torch"], worker["arrow"]) == (1, 1)
        assert worker["tokens"] > 20_000
        assert worker["cores"] <= 1.3, worker
