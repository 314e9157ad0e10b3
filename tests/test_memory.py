"""Memory stays flat: it is bounded by a chunk of text and by the vocabulary, not by the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from afn_ray import demo

PEAK = """
import re, sys
from pathlib import Path
from afn_ray.cli import main
try:
    main(sys.argv[1:])
finally:
    # Not getrusage: its maximum counts what this process was before exec, a copy of the one that runs the tests.
    status = Path("/proc/self/status").read_text()
    print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""


def peak_bytes(corpus: Path, store: Path, model: Path, *flags: str) -> int:
    """Peak resident memory of a run that does all its work in one process, in one shard."""
    command = [
        sys.executable, "-c", PEAK, "run", str(corpus), "--model", str(model), "--store", str(store),
        "--executor", "inline", "--layers", "0", "--shard-bytes", str(2 << 30), "--quiet", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1])


def test_a_file_of_one_gigabyte_in_one_shard_stays_under_two(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = tmp_path / "big.jsonl"
    junk = "x" * 100_000
    with corpus.open("w") as out:
        for i in range(10_800):
            out.write(f'{{"noise": "{junk}", "text": "And it came to pass, number {i}."}}\n')
    assert corpus.stat().st_size > 1 << 30
    assert peak_bytes(corpus, tmp_path / "store", tiny_bert) < 1 << 30


def test_memory_does_not_grow_with_the_text(tmp_path: Path, minilm: Path) -> None:
    verses = demo.corpus_file().read_bytes()
    peaks = []
    for copies in (1, 4):
        corpus = tmp_path / f"{copies}.jsonl"
        corpus.write_bytes(verses * copies)
        peaks.append(peak_bytes(corpus, tmp_path / f"store-{copies}", minilm))
        corpus.unlink()
    assert peaks[1] < 2 << 30
    assert peaks[1] - peaks[0] < 150 << 20, peaks
