"""Memory stays flat, and a worker keeps to its core: what it takes is not a matter of the file or
of its neighbours.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import warm_workers
from afn_ray.runs import demo
from afn_ray.runs.cluster import connection

MODULES = " ".join(warm_workers.IMPORTS)
"""Modules that a process imports before it forks."""
PEAK = """
import gc, importlib, os, re, sys
from pathlib import Path
modules, words, *corpora = sys.argv[1:]
for module in modules.split():
    importlib.import_module(module)
from afn_ray.cli.commands import main
gc.collect()
gc.freeze()
for corpus in corpora:
    if os.fork() == 0:
        try:
            main(["run", corpus, "--store", corpus + ".store", *words.split()])
        finally:
            # Not getrusage: its maximum counts what the tests' process was before exec.
            status = Path("/proc/self/status").read_text()
            print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
    if os.wait()[1]:
        sys.exit(f"the run over {corpus} failed")
"""
"""Run over each corpus in a fork of one process, one after another; print each one's peak resident
memory, in bytes.
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, int]:
    """Peak resident memory, in bytes, of runs that do all their work in one process, in one
    shard, by corpus: a gigabyte, and the verses once and four times.

    Pages of libraries that only their import touches, about 0.1 GB, are not in it.
    """
    folder = tmp_path_factory.mktemp("peaks")
    junk = "x" * 100_000
    with (folder / "big.jsonl").open("w") as out:
        for i in range(10_800):
            out.write(f'{{"noise": "{junk}", "text": "And it came to pass, number {i}."}}\n')
    assert (folder / "big.jsonl").stat().st_size > 1 << 30
    verses = demo.corpus_file().read_bytes()
    (folder / "once.jsonl").write_bytes(verses)
    (folder / "four.jsonl").write_bytes(verses * 4)
    corpora = [folder / f"{name}.jsonl" for name in ("big", "once", "four")]
    words = f"--model {tiny_bert} --executor inline --layers 0 --shard-bytes {2 << 30} --quiet"
    command = [sys.executable, "-c", PEAK, MODULES, words, *map(str, corpora)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    printed = [
        int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")
    ]
    return {corpus.stem: peak for corpus, peak in zip(corpora, printed, strict=True)}


def test_a_file_of_one_gigabyte_in_one_shard_stays_under_two(peaks: dict[str, int]) -> None:
    assert peaks["big"] < 1 << 30


def test_memory_does_not_grow_with_the_text(peaks: dict[str, int]) -> None:
    assert peaks["four"] - peaks["once"] < 100 << 20, peaks


WORKERS = """
import gc, importlib, json, os, re, sys, time
from pathlib import Path
import pyarrow, torch
from afn_ray.runs import measurer, plan, worker
from afn_ray.config import RunConfig

def work(corpus, model, store, shard_bytes):
    config = RunConfig(corpus=(corpus,), model=model, store=store, executor="inline", layers="2",
                       shard_bytes=int(shard_bytes), batch_tokens=1024)
    task = worker.prepare(config, measurer.find_model_files(config), "cpu", "float32")
    processor, shards = worker.Processor(task), plan.make_plan(config).shards
    resident = []
    print("ready", flush=True)
    os.read(0, 1)
    wall, cpu = time.monotonic(), time.process_time()
    for shard in shards:
        processor.process(shard)
        status = Path("/proc/self/status").read_text()
        resident.append(int(re.search(r"VmRSS:\\s+(\\d+) kB", status)[1]) * 1024)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    processor.close()
    print(json.dumps({
        "corpus": corpus,
        "resident": resident, "torch": torch.get_num_threads(), "arrow": pyarrow.cpu_count(),
        "cores": cpu / wall,
        "tokens": processor.counters.tokens,
    }), flush=True)

modules, cores, *cases = sys.argv[1:]
for module in modules.split():
    importlib.import_module(module)
gc.collect()
gc.freeze()
os.sched_setaffinity(0, list(map(int, cores.split(","))))
for case in zip(*[iter(cases)] * 4):
    if os.fork() == 0:
        work(*case)
        sys.exit()
codes = [os.wait()[1] for _ in cases[::4]]
sys.exit(any(codes))
"""
"""One worker for each case, in forks of one process. They begin at once, when each can read a byte
of the input.
"""


@pytest.fixture(scope="module")
def workers(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, minilm: Path
) -> dict[str, dict[str, Any]]:
    """Reports of two workers at once and on two cores, in a worker's environment, by corpus:
    real weights over a few shards, and a small model over fifty.
    """
    folder = tmp_path_factory.mktemp("workers")
    few = first_verses(folder / "few.jsonl", 160 << 10)
    fifty = first_verses(folder / "fifty.jsonl", 51 * 64 << 10)
    cases: list[object] = [few, minilm, folder / "store-few", 80 << 10]
    cases += [fifty, tiny_bert, folder / "store-fifty", 64 << 10]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WORKERS, MODULES, cores, *map(str, cases)],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env={**os.environ, **connection.WORKER_ENV},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline() == "ready\n", process.communicate(timeout=60)
        out, err = process.communicate("gg", timeout=400)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert process.returncode == 0, err
    reports = [json.loads(line) for line in out.splitlines()]
    return {Path(report["corpus"]).stem: report for report in reports}


def first_verses(path: Path, num_bytes: int) -> Path:
    data = demo.corpus_file().read_bytes()[:num_bytes]
    path.write_bytes(data[: data.rindex(b"\n") + 1])
    return path


def test_memory_is_flat_over_fifty_shards(workers: dict[str, dict[str, Any]]) -> None:
    worker = workers["fifty"]
    resident = worker["resident"]
    assert len(resident) >= 50 and worker["tokens"] > 500_000
    after_10, after_50 = resident[9], resident[49]
    assert after_50 < 1.02 * after_10, (
        f"{after_10 >> 10} KiB after shard 10, {after_50 >> 10} KiB after shard 50"
    )


def test_two_workers_on_two_cores_take_one_each(workers: dict[str, dict[str, Any]]) -> None:
    """One measures with real weights, whose products would use every core that they may."""
    assert sorted(workers) == ["few", "fifty"]
    for worker in workers.values():
        assert (worker["torch"], worker["arrow"]) == (1, 1)
        assert worker["tokens"] > 20_000
        assert worker["cores"] <= 1.3, worker
