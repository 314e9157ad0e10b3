"""Damaged files of every format lose no document without a word: what is not read is a row with
lost bytes.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afn_ray.corpus import listing, reading
from afn_ray.corpus_values import Document, ReadOptions
from afn_ray.errors import AfnError
from afn_ray.store import corpus_files

NUM_FILES = {"short": 200, "long": 2000}
FORMATS = ("jsonl", "txt", "csv", "parquet")
WORDS = [
    "lord",
    "said",
    "unto",
    "him",
    "king",
    "day",
    "naïve",
    "Ärger",
    "год",
    "日本",
    "😀",
    ",",
    ".",
    "42",
    "(x)",
]


def zstd(data: bytes) -> bytes:
    """One frame; Arrow's own has no checksum, so that a flip within it may not show."""
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}
CHECKSUMMED = ("gz", "bz2", "xz")

Rows = list[tuple[str, str]]


def make_rows(dice: random.Random) -> Rows:
    """Documents, the id of each in its text too."""
    return [
        (f"d{i}", " ".join([f"d{i}", *dice.choices(WORDS, k=dice.randint(1, 12))]))
        for i in range(dice.randint(1, 40))
    ]


def encode(rows: Rows, format: str, dice: random.Random) -> bytes:
    """``rows`` as one part of a file; a CSV part has no header."""
    if format == "jsonl":
        return "".join(
            json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in rows
        ).encode()
    if format == "txt":
        return "".join(f"{t}\n" for _, t in rows).encode()
    if format == "csv":
        out = io.StringIO()
        csv.writer(
            out, quoting=dice.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL)), lineterminator="\n"
        ).writerows(rows)
        return out.getvalue().encode()
    sink = io.BytesIO()
    table = pa.table({"id": [i for i, _ in rows], "text": [t for _, t in rows]})
    pq.write_table(
        table,
        sink,
        row_group_size=dice.choice((3, 10, 100)),
        compression=dice.choice(("none", "snappy", "zstd", "gzip")),
        data_page_version=dice.choice(("1.0", "2.0")),
        use_dictionary=dice.random() < 0.5,
        write_page_checksum=dice.random() < 0.5,
    )
    return sink.getvalue()


def make_file(rows: Rows, format: str, compression: str, dice: random.Random) -> bytes:
    """``rows`` as a file; a compressed one may have several streams."""
    if format == "parquet":
        return encode(rows, format, dice)
    cuts = (
        sorted(dice.sample(range(len(rows) + 1), min(len(rows), dice.randint(0, 3))))
        if compression
        else []
    )
    parts = [rows[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    data = [encode(part, format, dice) for part in parts]
    if format == "csv":
        data[0] = b"id,text\n" + data[0]
    return b"".join(COMPRESSORS[compression](part) for part in data)


def flip(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice((1, 1, 1, 5))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def truncate(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(1, len(data)) :]  # a file of no bytes is an empty one


def delete(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data))
    del data[at : at + dice.randint(1, 64)]


def zero(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data))
    end = min(len(data), at + dice.randint(1, 64))
    data[at:end] = bytes(end - at)


def insert(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data) + 1)
    data[at:at] = dice.randbytes(dice.randint(1, 64))


def repeat(data: bytearray, dice: random.Random) -> None:
    at = dice.randrange(len(data))
    data[at:at] = data[at : at + dice.randint(1, 64)]


def append(data: bytearray, dice: random.Random) -> None:
    data += dice.randbytes(dice.randint(1, 64))


DAMAGES = (flip, truncate, delete, zero, insert, repeat, append)


def read(path: Path, options: ReadOptions, shard_bytes: int) -> list[Document]:
    file = corpus_files.stat(str(path))
    slices = listing.cut(file, options, shard_bytes)
    return [document for piece in slices for document in reading.read(piece, options)]


def silent_loss(
    rows: Rows, found: list[Document], data: bytes, format: str, compression: str
) -> str:
    """Parts of ``rows`` that are lost and said nowhere; empty where nothing is. ``data``: the
    damaged file.
    """
    good = [d for d in found if d.problem is None]
    problems = [d for d in found if d.problem is not None]
    if bad := [d for d in problems if not 0 < d.lost_bytes <= len(data)]:
        return f"a problem without its lost bytes, or with more than the file: {bad[0]}"
    if (total := sum(d.lost_bytes for d in problems)) > len(data) + len(
        problems
    ):  # each has one at least
        return f"{total} bytes are lost of {len(data)}"
    if problems:
        return ""
    if format == "parquet" or compression:
        want, got = Counter(text for _, text in rows), Counter(d.text for d in good if d.text)
        if compression in CHECKSUMMED and want != got:
            return f"documents differ and nothing says so: {list((want - got) + (got - want))[:3]}"
        return f"{len(good)} documents of {len(rows)}" if len(good) < len(rows) else ""
    if format == "csv":  # what was cut off at the end of a row cannot show
        return ""
    lines = sum(bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    return f"{len(good)} documents of {lines} lines" if len(good) < lines else ""


def test_what_a_damaged_file_loses_is_said(tmp_path: Path, fuzz_length: str) -> None:
    ended: Counter[str] = Counter()
    for seed in range(NUM_FILES[fuzz_length]):
        dice = random.Random(seed)
        format = FORMATS[seed % len(FORMATS)]
        compression = "" if format == "parquet" else dice.choice(list(COMPRESSORS))
        rows = make_rows(dice)
        data = bytearray(make_file(rows, format, compression, dice))
        damage = dice.choice(DAMAGES)
        damage(data, dice)
        path = tmp_path / f"{seed}.{format}{'.' * bool(compression)}{compression}"
        path.write_bytes(data)
        id_column = None if format == "txt" else "id"
        options = ReadOptions("auto", "text", id_column, "line", 1 << 20)
        try:
            found = read(path, options, dice.choice((256, 1 << 20)))
        except AfnError:
            ended["refused"] += 1
        else:
            ended["told" if any(d.problem is not None for d in found) else "all there"] += 1
            lost = silent_loss(rows, found, bytes(data), format, compression)
            assert not lost, (seed, damage.__name__, path.name, lost)
        path.unlink()
    assert min(ended[name] for name in ("told", "all there")) > 0, ended


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz", "zst"])
def test_an_undamaged_file_of_several_streams_is_all_there(
    tmp_path: Path, compression: str
) -> None:
    dice = random.Random(3)
    for number in range(10):
        rows = make_rows(dice)
        path = tmp_path / f"{number}.jsonl.{compression}"
        path.write_bytes(make_file(rows, "jsonl", compression, dice))
        found = read(path, ReadOptions("auto", "text", "id", "line", 1 << 20), 256)
        assert [(d.doc_id, d.text) for d in found] == rows
