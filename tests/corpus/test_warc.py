"""Responses of WARC become texts with their headers as columns; what cannot be read is counted."""

from __future__ import annotations

import bz2
import gzip
import importlib.metadata
import json
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import brotli
import pytest
from resiliparse.parse.html import DOMNode, HTMLTree, NodeType

import afn_ray
from afn_ray.corpus import first, html, http_body, listing, reading, streams, warc
from afn_ray.corpus_values import Document, ReadOptions, Shard
from afn_ray.errors import ConfigError, CorpusError
from afn_ray.kept import parse
from afn_ray.runs import plan
from conftest import config_of

PAGES = ReadOptions("auto", "text", "WARC-Record-ID", "file", 1 << 20)
HTML_HEAD = b"Content-Type: text/html; charset=utf-8\r\n"
TEXT = b"<p>A text of thirty-six letters.</p>"


def record(
    number: int,
    content: bytes,
    kind: str = "response",
    of: str = "application/http",
    length: int = -1,
) -> bytes:
    """A record of WARC."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:{number}>\r\nWARC-Date: "
        "2026-11-01T10:00:0"
        f"{number % 10}Z\r\nWARC-Target-URI: http://a.test/{number}\r\nContent-Type: "
        f"{of}\r\nContent-Length: "
        f"{length if length >= 0 else len(content)}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


def response(number: int, body: bytes, head: bytes = HTML_HEAD) -> bytes:
    return record(number, b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body)


def coded(body: bytes, header: bytes) -> bytes:
    return response(9, body, HTML_HEAD + header + b"\r\n")


def page(number: int) -> bytes:
    body = (
        f"<html><head><title>t</title></head><body><p>Page {number} é &amp; more.</p></body></html>"
    )
    return response(number, body.encode())


def read(
    folder: Path, data: bytes, options: ReadOptions = PAGES, name: str = "c.warc"
) -> list[Document]:
    (folder / name).write_bytes(data)
    files, _ = listing.list_files([str(folder / name)], options)
    listing.check_columns(files, options)
    (piece,) = listing.cut(files[0], options, 1)
    documents = list(reading.read(piece, options))
    assert sum(d.lost_bytes for d in documents) <= len(data)
    return documents


# --- records


@pytest.mark.parametrize(
    ("ending", "pack"),
    [
        ("warc", lambda data: data),
        ("warc.gz", gzip.compress),
        ("warc.bz2", bz2.compress),
        ("warc.wet.gz", gzip.compress),
    ],
)
def test_bodies_of_responses_are_texts_in_order(
    ending: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    records = [
        record(0, b"software: x\r\n", "warcinfo", "application/warc-fields"),
        page(1),
        record(2, b"GET / HTTP/1.1\r\n\r\n", "request", "application/http; msgtype=request"),
        response(
            3,
            "naïve <b>text</b>".encode("cp1252"),
            b"Content-Type: text/plain; charset=latin-1\r\n",
        ),
        record(4, b"already a text", "conversion", "text/plain"),
        page(5),
    ]
    documents = read(tmp_path, b"".join(map(pack, records)), name=f"c.{ending}")
    assert [(d.doc_id, d.text) for d in documents] == [
        ("<urn:1>", "Page 1 é & more."),
        ("<urn:3>", "naïve <b>text</b>"),
        ("<urn:4>", "already a text"),
        ("<urn:5>", "Page 5 é & more."),
    ]
    places = [len(b"".join(records[:at])) for at in (1, 3, 4, 5)]
    assert [d.offset for d in documents] == (places if ending == "warc" else [1, 3, 4, 5])


def test_headers_are_columns_in_any_case(tmp_path: Path) -> None:
    keep = "Content-Type,WARC-Date:timestamp,http-status:int64,warc-target-uri,x-twice"
    head = HTML_HEAD + b"X-Twice: a\r\nX-Twice: b\r\n"
    (document,) = read(tmp_path, response(1, b"<p>a</p>", head), replace(PAGES, keep=keep))
    names = [column.path for column in parse(keep)]
    kept = dict(zip(names, document.kept, strict=True))
    assert kept.pop("WARC-Date").isoformat() == "2026-11-01T10:00:01"  # type: ignore[attr-defined]
    assert kept == {
        "Content-Type": "text/html; charset=utf-8",
        "http-status": 200,
        "warc-target-uri": "http://a.test/1",
        "x-twice": "a, b",
    }
    for wrong in (replace(PAGES, keep="WARC-Dat"), replace(PAGES, id_column="WARC-Dat")):
        with pytest.raises(CorpusError, match=r"no column 'WARC-Dat'.*did you mean WARC-Date"):
            read(tmp_path, page(1), wrong)
    with pytest.raises(CorpusError, match="no column of tags"):
        read(tmp_path, page(1), replace(PAGES, labels="tags"))


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (b"xx garbage\r\n\r\n", "begins no record"),
        (b"WARC/1.0\r\nWARC-Type: response\r\n\r\nabc\r\n\r\n", "no header with Content-Length"),
        (record(9, b"HTTP/1.1 200 OK\r\n\r\nab", length=10), "has no empty line after them"),
        (record(9, b"HTTP/1.1 200 OK\r\n\r\nab", length=200), "has no empty line after them"),
        (record(9, b"x", length=10**16), "is over the limit of"),
        (record(9, b"no response"), "response is none of HTTP"),
        (response(9, b"\x89PNG", b"Content-Type: image/png\r\n"), "body is image/png, expected"),
        (response(9, b"<p>a</p>", b""), "body is of no stated type"),
        (coded(b"zz", b"Content-Encoding: gzip"), "body cannot be decoded"),
        (coded(b"zz", b"Transfer-Encoding: chunked"), "no chunk begins at byte 0"),
        (coded(b"zz", b"Transfer-Encoding: gzip"), "Transfer-Encoding 'gzip' is not read"),
        (coded(b"zz", b"Content-Encoding: x"), "Content-Encoding 'x' is not read"),
        (coded(b"zz", b"Content-Encoding: gzip, gzip, gzip"), "3 codings are over the limit of 2"),
        (coded(gzip.compress(TEXT)[:-9], b"Content-Encoding: gzip"), "the end is missing after 36"),
        (coded(brotli.compress(TEXT)[:-2], b"Content-Encoding: br"), "the end is missing after"),
        (coded(gzip.compress(TEXT) + b"x", b"Content-Encoding: gzip"), "body cannot be decoded"),
        (coded(b"24\r\n" + TEXT + b"\r\n", b"Transfer-Encoding: chunked"), "none was the last"),
        (coded(b"25\r\n" + TEXT + b"\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
         "does not end after"),
        (coded(TEXT, b"Content-Length: 99"),
         "body was cut: it has 36 bytes, but its header states 99"),
        (page(9).replace(b"WARC-Date", b"WARC-Truncated: time\r\nWARC-Date"),
         "WARC-Truncated: time"),
        (response(9, b"a", b"Content-Type: text/plain; charset=klingon\r\n"),
         "'klingon' is unknown"),
        (record(9, b"abc", "continuation"), "continues another one"),
        (b"WARC/1.0\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", "no header with Content-Length"),
    ],
)  # fmt: skip
def test_damage_costs_its_record_and_is_counted(
    damaged: bytes, reason: str, tmp_path: Path
) -> None:
    before, *lost, last = read(
        tmp_path, page(1) + damaged + page(2), replace(PAGES, id_column=None)
    )
    assert before.text.startswith("Page 1")
    if reason.startswith("is over"):  # the end of such a record is unknown
        lost, last = [last], before
    assert last.text.startswith("Page ") and len(lost) == 1
    assert reason in str(lost[0].problem)
    assert lost[0].lost_bytes in (len(damaged), len(damaged + page(2)))


def test_neighbouring_garbage_is_one_row_and_takes_no_longer_than_its_size_says(
    tmp_path: Path,
) -> None:
    begun = b"WARC/1.0\r\n"
    for garbage in (begun * 200_000 + b"\r\n", (begun * 6_000 + b"\r\n") * 30):
        began = time.process_time()
        lost, kept = read(tmp_path, garbage + page(1))
        assert time.process_time() - began < 5
        assert (lost.lost_bytes, lost.lost_documents) == (len(garbage), None)
        assert kept.text.startswith("Page 1")


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (gzip.compress(TEXT), b"Content-Encoding: gzip"),
        (gzip.compress(TEXT[:9]) + gzip.compress(TEXT[9:]), b"Content-Encoding: x-gzip"),
        (zlib.compress(TEXT), b"Content-Encoding: deflate"),
        (zlib.compress(TEXT)[2:-4], b"Content-Encoding: deflate"),
        (brotli.compress(TEXT), b"Content-Encoding: br"),
        (zlib.compress(gzip.compress(TEXT)), b"Content-Encoding: gzip, deflate"),
        (b"4;a=b\r\n<p>A\r\n20\r\n" + TEXT[4:] + b"\r\n0\r\n\r\n", b"Transfer-Encoding: Chunked"),
        (TEXT, b"Content-Encoding: identity\r\nTransfer-Encoding: identity\r\nContent-Length: 36"),
    ],
)
def test_codings_of_a_body_are_undone(body: bytes, header: bytes, tmp_path: Path) -> None:
    (document,) = read(tmp_path, coded(body, header))
    assert (document.text, document.problem) == ("A text of thirty-six letters.", None)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_a_body_is_decoded_in_bounded_memory(coding: str) -> None:
    fast = partial(brotli.compress, quality=1)
    packs: dict[str, Callable[[bytes], bytes]] = {
        "gzip": gzip.compress,
        "deflate": zlib.compress,
        "br": fast,
    }
    bomb = packs[coding](bytes(100 << 20))
    tracemalloc.start()
    for body, codings in ((bomb, [coding]), (gzip.compress(bomb), [coding, "gzip"])):
        with pytest.raises(ValueError, match="body is over the limit of 1048576 bytes"):
            http_body.decoded(body, [], codings, 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_page_that_cannot_be_decoded_keeps_its_id_and_columns(tmp_path: Path) -> None:
    options = replace(PAGES, keep="http-status:int64,WARC-Target-URI")
    (document,) = read(tmp_path, coded(b"zz", b"Content-Encoding: gzip"), options)
    assert document.problem and document.doc_id == "<urn:9>"
    assert document.kept == ("http://a.test/9", 200)


@pytest.mark.parametrize(
    ("status", "head"),
    [("301 Moved", b""), ("204 No Content", HTML_HEAD), ("304 Same", b"Content-Length: 99\r\n")],
)
def test_a_response_without_a_body_is_no_document(status: str, head: bytes, tmp_path: Path) -> None:
    empty = record(1, f"HTTP/1.1 {status}\r\n".encode() + head + b"\r\n")
    assert [d.doc_id for d in read(tmp_path, empty + page(2))] == ["<urn:2>"]


@pytest.mark.parametrize("cut", [1, 5, 60, 250, 300])
def test_a_file_that_was_cut_keeps_its_whole_records(cut: int, tmp_path: Path) -> None:
    data = page(1) + page(2)
    documents = read(tmp_path, data[:-cut])
    assert documents[0].text.startswith("Page 1")
    if cut <= 4:
        assert documents[1].text.startswith("Page 2") and len(documents) == 2
    elif cut < len(page(2)):
        assert documents[1].lost_bytes == len(page(2)) - cut and len(documents) == 2
    whole, second = gzip.compress(page(1)), gzip.compress(page(2))
    documents = read(tmp_path, (whole + second)[: -min(cut, 200)], name="c.warc.gz")
    assert documents[0].text.startswith("Page 1")
    assert "truncated or corrupt gz stream" in str(documents[-1].problem)
    if len(documents) == 2:  # else the text was whole, but not its checksum
        assert documents[1].lost_bytes == len(second) - min(cut, 200)


def test_a_damaged_archive_never_raises_and_never_loses_a_byte_uncounted(tmp_path: Path) -> None:
    chance = random.Random(7)
    good = [page(i) for i in range(6)] + [
        response(6, zlib.compress(b"<p>deflated</p>"), HTML_HEAD + b"Content-Encoding: deflate\r\n")
    ]
    data = b"".join(good)
    for _ in range(150):
        bad = bytearray(data)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(bad))
            bad[at : at + chance.randint(0, 40)] = chance.randbytes(chance.randint(0, 20))
        (tmp_path / "c.warc").write_bytes(bad)
        options = replace(PAGES, id_column=None)
        (file,) = listing.list_files([str(tmp_path / "c.warc")], options)[0]
        (piece,) = listing.cut(file, options, 1)
        assert len(list(reading.read(piece, options))) <= 20


@pytest.mark.parametrize("ending", ["warc", "warc.gz"])
def test_a_limit_takes_the_first_pages(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"c.{ending}"
    pages = [page(i) for i in range(9)]
    path.write_bytes(b"".join(map(gzip.compress, pages) if ending == "warc.gz" else pages))
    files, _ = listing.list_files([str(path)], PAGES)
    found = first.cut_first(files, 4, PAGES, lambda file: listing.parts(file, PAGES, 40))
    documents = [d for piece in found.slices for d in reading.read(piece, PAGES)]
    assert [d.doc_id for d in documents] == [f"<urn:{i}>" for i in range(4)]
    assert not any(d.problem for d in documents)


# --- pages


@pytest.mark.parametrize("charset", ["utf-8", "cp1251", "shift-jis", "utf-16"])
def test_a_page_states_its_charset_itself_or_it_is_detected(charset: str) -> None:
    text = "吾輩は猫である。" * 20 if charset == "shift-jis" else "Привет, прекрасный мир! " * 20
    body = f"<html><body><p>{text}</p></body></html>"
    assert html.html_text(body.encode(charset), charset) == text.strip()
    assert html.html_text(body.encode(charset), "") == text.strip()
    meta = f'<html><head><meta charset="{charset}"></head><body><p>{text}</p></body></html>'
    if charset != "utf-16":
        assert html.html_text(meta.encode(charset), "") == text.strip()


def test_invalid_bytes_of_a_page_are_replaced_and_counted(tmp_path: Path) -> None:
    (document,) = read(tmp_path, response(1, b"<p>caf\xe9 and a long text around it</p>"))
    assert (document.num_replaced, document.text) == (1, "caf\ufffd and a long text around it")


def test_the_main_content_is_the_text() -> None:
    body = (
        "<html><head><script>var a = '<p>no</p>'</script></head><body><nav><a href=/>Menu</a></nav>"
        "<main><h1>Title</h1><p>First.</p></main><footer>Imprint</footer></body>"
    )
    text = html.html_text(body.encode(), "utf-8")
    assert [line for line in text.split("\n") if line] == ["Title", "First."]


def test_pages_made_to_take_long_or_much_are_quarantined(tmp_path: Path) -> None:
    bomb = zlib.compressobj(9, wbits=31)
    packed = bomb.compress(bytes(streams.LINE_BYTES + 10)) + bomb.flush()
    bold = b"".join(b"<b a=%d>" % i for i in range(1900))
    attributes = b" ".join(b"a%d" % i for i in range(20_000))
    for body, head, reason in (
        (b"<div>" * 3000, b"", "page nests more than 2000 elements"),
        (b"<b><i><u>" * 1000 + b"</b>x" * 1000, b"", "with formatting opened anew"),
        (b"<div><table></div>" * 3000, b"", "page nests more than 2000 elements"),
        (b"<li><dd>" * 3000, b"", "page nests more than 2000 elements"),
        (b"<div>" + bold + b"</div>" + b"<p>x" * 3000, b"", "with formatting opened anew"),
        (b"<div>" * 1900 + b"<p>x" * 30_000, b"", "elements on the paths to its elements"),
        (b"<svg><script>" + b"<div>" * 3000, b"", "page has tags in a script in SVG"),
        (b"<svg><![CDATA[>]]>" + b"<div>" * 3000, b"", "page has a '>' in a CDATA section"),
        (b"<div><!--</div>-->" * 3000, b"", "page nests more than 2000 elements"),
        (b"<div><!-->--></div>" * 3000 + b"<div>" * 3000, b"", "page nests more than 2000"),
        (b"<div><textarea></div></textarea>" * 3000, b"", "page nests more than 2000 elements"),
        (b"<!--<script>-->" + b"<div>" * 3000, b"", "page nests more than 2000 elements"),
        (b"<a b='c'd='<script>'>" + b"<div>" * 3000, b"", "page nests more than 2000 elements"),
        (b"<svg/><script>a<b</script>" + b"<div>" * 3000, b"", "page nests more than 2000"),
        (
            b"<b>" + b"<div>" * 1900 + b"</b>" * 300_000,
            b"",
            "elements on the paths to its elements",
        ),
        (b"<select>" + b"<option>x" * 300_000, b"", "page has more than 10000 options"),
        (b"<p " + attributes + b">x", b"", "page has 20000 attributes in a tag"),
        (b"<p" + b" " * 3_000_000 + b"<p" + b"/" * 3_000_000, b"", "page of 6000004 bytes is over"),
        (b"<p>a</p>" * 600_000, b"", "page of 4800000 bytes is over the limit of 4194304"),
        (packed, b"Content-Encoding: gzip\r\n", "body is over the limit of 67108864 bytes"),
    ):
        (document,) = read(tmp_path, response(1, body, HTML_HEAD + head))
        assert reason in str(document.problem), body[:40]
        assert document.lost_bytes >= len(body) or head


def test_the_bounds_of_a_page_are_checked_in_a_time_that_its_size_says() -> None:
    began = time.process_time()
    html._check_bounds("<button>" * 900 + "<script></script>" * 10_000)
    assert time.process_time() - began < 4


def test_the_encoding_that_is_given_may_be_one_that_browsers_do_not_know() -> None:
    text = "Größe und Übermaß, über alle Maßen."
    assert html.html_text(f"<p>{text}</p>".encode("cp850"), "cp850") == text
    assert html.html_text(f"<p>{text}</p>".encode(), "klingon") == text


def test_pages_of_many_unclosed_elements_are_read() -> None:
    """HTML of the last century: nothing is closed that the next of its kind closes."""
    cell = "<tr><td><font size=2>a</font><p>b<li>c<td><b>d</b><dl><dt>e<dd>f</dl>"
    page = f"<body><table>{cell * 900}</table><script>{'if (i<b && n<a) d;' * 9000}</script>"
    assert html.html_text(page.encode(), "utf-8").count("f") >= 900


def test_the_bounds_of_a_page_are_never_under_what_a_parser_makes_of_it() -> None:
    chance = random.Random(5)
    names = [
        "div",
        "b",
        "a",
        "p",
        "li",
        "dd",
        "table",
        "tr",
        "td",
        "button",
        "template",
        "svg",
        "x-y",
    ]
    for _ in range(200):
        some = chance.sample(names, chance.randint(1, 6))
        kinds = ("<{} a={}>", "</{}>", "<{}>x")
        page = "".join(
            chance.choice(kinds).format(name, chance.randint(0, 99))
            for name in chance.choices(some, k=chance.randint(5, 80))
        )
        bound = html._OpenElements()
        for match in html.TAG.finditer(page):
            (bound.end if match[1] else bound.start)(match[2])
        parsed = HTMLTree.parse(page).document
        assert parsed is not None
        made = [node for node in parsed if node.type == NodeType.ELEMENT]
        assert len(made) <= bound.num_elements + 4  # html, head, body, tbody


def test_the_depth_of_a_page_is_never_far_over_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are parts repeated, so that whatever hides elements does so many times."""
    chance = random.Random(7)
    names = "div p b a li dd table td tr select option svg mi title style script textarea noscript"
    parts = ["<!--", "-->", "<!-->", "<![CDATA[", "]]>", "<?", ">", "</>", "<p a='", '<b c="', "'",
             '"', "<a =", "<i a/", "x", " ", "<svg/>", "<frameset>"]  # fmt: skip
    for name in names.split():
        parts += [f"<{name}>"] * 3 + [f"</{name}>"] * 2
    num_checked = 0
    for _ in range(800):
        page = "".join(chance.choices(parts, k=chance.randint(2, 8))) * 12
        parsed = HTMLTree.parse(page).document
        assert parsed is not None
        deepest = max(_depth(node) for node in parsed)
        monkeypatch.setattr(html, "NESTING", (deepest - 8) // 2)
        if deepest > 8:
            num_checked += 1
            with pytest.raises(ValueError, match=r"page (nests more|has tags|has a '>')"):
                html._check_bounds(page)
    assert num_checked > 100


def _depth(node: DOMNode | None) -> int:
    depth = 0
    while node is not None:
        node, depth = node.parent, depth + 1
    return depth


# --- plans and runs


def test_texts_of_another_extractor_are_other_shards_and_planned_anew(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.warc.gz").write_bytes(b"".join(gzip.compress(page(i)) for i in range(9)))
    config = config_of(
        tiny_bert,
        tmp_path / "c.warc.gz",
        tmp_path / "s",
        id_column="WARC-Target-URI",
        keep_columns="WARC-Date:timestamp",
    )
    with afn_ray.run(config) as run:
        found = run.sql('SELECT doc_id, "WARC-Date" FROM documents ORDER BY 1').fetchall()
        assert [doc_id for doc_id, _ in found] == [f"http://a.test/{i}" for i in range(9)]
        assert all(day is not None for _, day in found)
    assert not afn_ray.verify_store(str(tmp_path / "s")).findings
    before = plan.make_plan(config)
    names = {warc.format_name()}
    with monkeypatch.context() as patched:
        for what in ("fastwarc", "resiliparse"):
            installed = {"fastwarc": "2", "resiliparse": "2", "brotli": "1"} | {what: "9"}
            patched.setattr(importlib.metadata, "version", installed.get)
            names.add(warc.format_name.__wrapped__())
        patched.setattr(warc, "RULES", 0)
        names.add(warc.format_name.__wrapped__())
    assert len(names) == 4
    monkeypatch.setattr(warc, "format_name", lambda: "warc resiliparse 9.9.9")
    after = plan.make_plan(config)
    assert {shard.id for shard in before.shards}.isdisjoint(shard.id for shard in after.shards)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"planned with warc resiliparse 9\.9\.9, but here is"):
        list(reading.read(after.shards[0].slices[0], config.read_options))


def test_without_the_extra_the_message_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    warc.format_name.cache_clear()
    with pytest.raises(
        ConfigError, match=r'needs the package brotli; pip install "afn-ray\[warc\]"'
    ):
        read(tmp_path, page(1))


def test_the_text_column_is_none_of_the_identity_of_warc() -> None:
    kinds = [replace(PAGES, text_column=name) for name in ("text", "body")]
    assert len({json.dumps(kind.identity("warc x")) for kind in kinds}) == 1
    assert (
        len({json.dumps(o.identity("warc x")) for o in (PAGES, replace(PAGES, id_column=None))})
        == 2
    )
    assert Shard.of([], PAGES).options == PAGES
