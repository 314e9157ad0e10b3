"""Files that are not UTF-8 are read by the encoding that is given, and nothing else changes."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import afn_ray
from afn_ray.cli import estimates
from afn_ray.config import RunConfig
from afn_ray.corpus import listing, reading
from afn_ray.corpus_values import Document, ReadOptions, Shard
from afn_ray.errors import ConfigError
from afn_ray.runs.events import Event
from conftest import config_of

TEXTS = {
    "latin-1": ["Müller aß süße Äpfel.", "Où est le café ?", "plain"],
    "cp1251": ["Привет, мир!", "Ещё одна строка"],
    "shift-jis": ["吾輩は猫である。", "ソ表能"],  # second bytes of these characters are ASCII
    "gb18030": ["道可道，非常道。", "𠀀€"],
    "euc-kr": ["나랏말싸미 듕귁에 달아"],
}
LINES = ReadOptions("auto", "text", None, "line", 1 << 20)


def read(path: Path, options: ReadOptions, shard_bytes: int = 1 << 20) -> list[Document]:
    (file,) = listing.list_files([str(path)], options)[0]
    slices = listing.cut(file, options, shard_bytes)
    return [document for one in slices for document in reading.read(one, options)]


def write(folder: Path, format: str, texts: list[str]) -> tuple[Path, str]:
    """A place for a file of ``format``, and its content."""
    content = {
        "txt": "".join(f"{text}\r\n" for text in texts),
        "jsonl": "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts),
        "csv": "text\n" + "".join(f'"{text}"\n' for text in texts),
        "conllu": "".join(
            "".join(f"{i}\t{word}\t_\tX\t_\t_\t0\t_\t_\t_\n" for i, word in enumerate(t.split(), 1))
            + "\n"
            for t in texts
        ),
    }
    return folder / f"c.{format}", content[format]


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("format", ["txt", "jsonl", "csv", "conllu"])
@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_a_file_in_its_encoding_gives_the_texts_of_the_same_file_in_utf8(
    encoding: str, format: str, shard_bytes: int, tmp_path: Path
) -> None:
    path, content = write(tmp_path, format, TEXTS[encoding] * 20)
    path.write_bytes(content.encode())
    expected = read(path, LINES, shard_bytes)
    assert all(document.problem is None for document in expected)
    path.write_bytes(content.encode(encoding))
    options = replace(LINES, encoding=encoding)
    found = read(path, options, shard_bytes)
    assert [(d.text, d.tags, d.num_replaced) for d in found] == [
        (d.text, d.tags, 0) for d in expected
    ]
    packed = path.with_suffix(f".{format}.gz")
    packed.write_bytes(gzip.compress(content.encode(encoding)))
    assert [d.text for d in read(packed, options)] == [d.text for d in expected]


def test_what_the_encoding_does_not_know_is_replaced_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("Привет, мир".encode("cp1251") + b"\x98\n" + b"abc\n")
    options = replace(LINES, encoding="cp1251")  # which has no character 98
    first, second = read(path, options)
    assert first.text == "Привет, мир\ufffd" and first.num_replaced == 1
    assert (second.text, second.num_replaced) == ("abc", 0)


def test_text_in_another_encoding_than_given_is_quarantined_with_the_question(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(("道可道非常道" * 9).encode("gb18030"))
    (document,) = read(path, replace(LINES, encoding="ascii"))
    assert document.problem is not None and "are invalid ascii" in document.problem
    assert "is its encoding another than ascii" in document.problem
    (document,) = read(path, LINES)
    assert document.problem is not None and "give its --encoding" in document.problem


def test_a_byte_order_mark_of_utf16_says_more_than_the_option(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("eins\nzwei\n".encode("utf-16"))
    documents = read(path, replace(LINES, encoding="latin-1"), 1)
    assert [d.text for d in documents] == ["eins", "zwei"]


@pytest.mark.parametrize("format", ["txt", "jsonl"])
def test_places_are_bytes_of_the_file_however_it_is_cut(format: str, tmp_path: Path) -> None:
    texts = [f"строка {'ё' * (i % 7)} {i}" for i in range(40)]
    path, content = write(tmp_path, format, texts)
    data = content.encode("cp1251")
    path.write_bytes(data)
    options = replace(LINES, encoding="cp1251")
    starts = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)][:-1]
    for shard_bytes in (1, 100, 1 << 20):
        found = read(path, options, shard_bytes)
        assert [d.offset for d in found] == starts
        assert [d.text for d in found] == texts
    assert [d.offset for d in read(path, replace(options, sample="0.5"), 1)] == starts


@pytest.mark.parametrize("format", ["txt", "jsonl", "csv", "conllu"])
def test_a_byte_order_mark_of_utf8_says_more_than_the_option(format: str, tmp_path: Path) -> None:
    path, content = write(tmp_path, format, ["Äpfel und Öl", "Straße"])
    path.write_bytes(content.encode("utf-8-sig"))
    for options in (LINES, replace(LINES, encoding="latin-1")):
        assert [d.text for d in read(path, options, 1)] == ["Äpfel und Öl", "Straße"]


@pytest.mark.parametrize("format", ["txt", "jsonl", "csv", "conllu", "parquet"])
def test_another_encoding_is_another_shard_except_of_parquet(format: str) -> None:
    given = [replace(LINES, encoding=name).identity(format) for name in ("", "cp1251", "koi8-r")]
    assert len({json.dumps(identity) for identity in given}) == (1 if format == "parquet" else 3)
    assert "encoding" not in LINES.as_dict()
    stored = replace(LINES, encoding="cp1251").as_dict()
    assert ReadOptions(**stored).encoding == "cp1251"  # type: ignore[arg-type]
    assert Shard.of([], LINES).options == LINES


@pytest.mark.parametrize(
    ("given", "read_as"),
    [("latin-1", "iso8859-1"), ("L1", "iso8859-1"), ("UTF8", None), ("utf-8-sig", None)],
)
def test_one_encoding_has_one_name(given: str, read_as: str | None) -> None:
    assert RunConfig(corpus=("c",), model="m", store="s", encoding=given).encoding == read_as


@pytest.mark.parametrize(
    "encoding",
    ["nosuch", "utf-16", "utf-7", "cp037", "rot13", "hex", "iso2022-jp", "hz", "punycode",
     "idna", "unicode_escape", "raw_unicode_escape", "utf-8\0"],
)  # fmt: skip
def test_an_encoding_that_cannot_be_read_is_refused(encoding: str) -> None:
    with pytest.raises(ConfigError, match=r"^encoding is .*; expected one that Python knows"):
        RunConfig(corpus=("c",), model="m", store="s", encoding=encoding)


def test_a_run_measures_the_words_of_a_corpus_in_another_encoding(
    tiny_bert: Path, tmp_path: Path
) -> None:
    texts = ["in the beginning was the café"] * 30
    (tmp_path / "c.txt").write_bytes("\n".join(texts).encode("cp1252"))
    config = config_of(
        tiny_bert, tmp_path / "c.txt", tmp_path / "s", txt_documents="line", encoding="cp1252"
    )
    with afn_ray.run(config) as run:
        found = run.sql("SELECT DISTINCT document_text(doc) FROM documents").fetchall()
        assert run.info["counts"]["replaced"] == 0
        assert found == [("in the beginning was the café",)]
    assert not afn_ray.verify_store(str(tmp_path / "s")).findings


def test_a_corpus_in_an_encoding_that_was_not_given_ends_with_that_question(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["the café is in the other street near the old stone house"] * 20
    rows = ["text", *texts, "éé éé is garbled"]
    (tmp_path / "old.csv").write_bytes("\n".join(rows).encode("latin-1"))
    config = config_of(tiny_bert, tmp_path / "old.csv", tmp_path / "s")
    question = (
        "24 characters could not be read as UTF-8: if old.csv is in latin-1 or another encoding, "
        "give --encoding latin-1"
    )

    estimate = afn_ray.dry_run(config)
    assert estimate.counts["replaced"] == 24
    estimates.print_estimate(estimate, Console(highlight=False, soft_wrap=True, width=1000))
    text = capsys.readouterr().out
    assert question in text and "1 document quarantined, as in /" in text

    reported: list[Event] = []
    afn_ray.run(config, reported.append).close()
    assert question in reported[-1].message

    given = replace(config, encoding="latin-1", store=str(tmp_path / "s2"))
    afn_ray.run(given, reported.append).close()
    assert not reported[-1].message.startswith("encoding")
