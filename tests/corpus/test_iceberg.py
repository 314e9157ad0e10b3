"""The files of one version of an Iceberg table are a corpus;
rows that differ from it are refused.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.config import RunConfig
from afn_ray.corpus import avro, iceberg, listing, reading
from afn_ray.corpus_values import ReadOptions
from afn_ray.errors import ConfigError, CorpusError
from afn_ray.runs import plan
from afn_ray.store import readers
from conftest import config_of

OPTIONS = ReadOptions("auto", "text", None, "file", 1 << 20)
KEPT = ReadOptions("auto", "text", None, "file", 1 << 20, keep="lang")


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Any]:
    from pyiceberg.catalog.sql import SqlCatalog

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = SqlCatalog("c", uri="sqlite:///:memory:", warehouse=f"file://{tmp_path}/lake")
        found.create_namespace("ns")
        yield found
        found.close()


def rows(*texts: str, lang: str = "en") -> pa.Table:
    return pa.table({"text": [*texts], "lang": [lang] * len(texts)})


def made(catalog: Any) -> Any:
    table = catalog.create_table("ns.texts", rows("a").schema)
    table.append(rows("a", "b"))
    table.append(rows("c", lang="de"))
    return table


def place(table: Any) -> str:
    return str(table.metadata_location).removeprefix("file://")


def read(where: str, options: ReadOptions = OPTIONS) -> list[tuple[str, Any]]:
    files, _ = listing.list_files([where], options)
    listing.check_columns(files, options)
    slices = [piece for file in files for piece in listing.cut(file, options, 1 << 20)]
    documents = [document for piece in slices for document in reading.read(piece, options)]
    return sorted(
        (document.text, document.kept[0] if document.kept else None) for document in documents
    )


def test_a_metadata_file_names_the_rows_of_its_version_for_ever(catalog: Any) -> None:
    table = made(catalog)
    first = place(table)
    assert read(first, KEPT) == [("a", "en"), ("b", "en"), ("c", "de")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.delete("text == 'a'")  # the file is written anew without the row
    table.append(rows("d"))
    assert [text for text, _ in read(place(table))] == ["b", "c", "d"]
    assert [text for text, _ in read(first)] == ["a", "b", "c"]


def test_a_table_without_a_catalog_is_named_by_its_folder(catalog: Any) -> None:
    table = made(catalog)
    folder = Path(place(table)).parent
    with pytest.raises(CorpusError, match=r"is an Iceberg table.*name its current metadata file"):
        read(str(folder.parent))
    (folder / "v7.metadata.json").write_bytes(Path(place(table)).read_bytes())
    (folder / "version-hint.text").write_text("7\n")
    assert [text for text, _ in read(str(folder.parent))] == ["a", "b", "c"]
    (folder / "version-hint.text").write_text("../../../etc/passwd")
    with pytest.raises(CorpusError, match="expected a number"):
        read(str(folder.parent))
    with pytest.raises(CorpusError, match="is an Iceberg table"):
        read(f"{folder.parent}/data/*.parquet")


def test_renamed_columns_and_partitions_outside_the_files_are_refused(catalog: Any) -> None:
    table = made(catalog)
    from pyiceberg.types import StringType

    with table.update_schema() as update:
        update.rename_column("lang", "language")
        update.add_column("more", StringType())
    table.append(pa.table({"text": ["d"], "language": ["fr"], "more": ["m"]}))
    assert len(read(place(table))) == 4  # the column is not read
    options = ReadOptions("auto", "text", None, "file", 1 << 20, keep="language")
    with pytest.raises(CorpusError, match=r"lacks column 'language' of its table \(field 2\)"):
        read(place(table), options)
    options = ReadOptions("auto", "text", None, "file", 1 << 20, keep="more")
    assert [value for _, value in read(place(table), options)] == [None, None, None, "m"]


def test_a_path_is_that_of_the_table_at_every_step(catalog: Any, tmp_path: Path) -> None:
    struct = pa.struct([("text", pa.string()), ("lang", pa.string())])
    row = {"id": 1, "meta": {"text": "a", "lang": "en"}, "turns": [{"text": "t"}]}
    kind = pa.schema(
        [
            ("id", pa.int64()),
            ("meta", struct),
            ("turns", pa.list_(pa.struct([("text", pa.string())]))),
        ]
    )
    table = catalog.create_table("ns.nested", kind)
    table.append(pa.Table.from_pylist([row], kind))
    of_meta = replace(OPTIONS, text_column="meta.text")
    of_turns = replace(OPTIONS, text_column="turns.0.text")
    assert read(place(table), of_meta) == [("a", None)]
    assert read(place(table), of_turns) == [("t", None)]
    with table.update_schema() as update:
        update.rename_column("meta.text", "old")
        update.rename_column("meta.lang", "text")
    with pytest.raises(CorpusError, match=r"lacks column 'meta\.text' .*\(field 2\.5\)"):
        read(place(table), of_meta)
    assert read(place(table), of_turns) == [("t", None)]  # nothing on this way has changed
    from pyiceberg.types import StringType

    with table.update_schema() as update:
        update.add_column(("meta", "more"), StringType())
    more = replace(of_turns, keep="meta.more")
    row = {"id": 2, "meta": {"old": "b", "text": "de", "more": "m"}, "turns": [{"text": "u"}]}
    table.append(pa.Table.from_pylist([row], table.schema().as_arrow()))
    assert read(place(table), more) == [("t", None), ("u", "m")]
    # A column of a file that no schema knows, and whose name is the path.
    data = next(Path(place(table)).parent.parent.rglob("*.parquet"))
    planted = pq.read_table(data).append_column("turns.0.text", [["evil"]])
    pq.write_table(planted, data)
    with pytest.raises(CorpusError, match=r"lacks column 'turns\.0\.text'"):
        read(place(table), of_turns)


@pytest.mark.parametrize("named", ["metadata", "folder"])
def test_files_that_the_version_does_not_name_are_not_read(catalog: Any, named: str) -> None:
    path = Path(place(made(catalog)))
    folder = path.parent.parent
    (path.parent / "v1.metadata.json").write_bytes(path.read_bytes())
    (path.parent / "version-hint.text").write_text("1")
    data = next(folder.rglob("*.parquet")).parent
    pq.write_table(rows("evil"), data / "planted.parquet")
    pq.write_table(rows("evil"), folder / "data" / "00000-0-planted.parquet")
    (data / "deep").mkdir()
    pq.write_table(rows("evil"), data / "deep" / "planted.parquet")
    where = str(path) if named == "metadata" else str(folder)
    assert [text for text, _ in read(where)] == ["a", "b", "c"]


def packed_avro(data: bytes, codec: str) -> bytes:
    """The Avro file ``data``, which is not compressed, with its blocks packed by ``codec``."""
    packers: dict[str, Callable[[bytes], bytes]] = {
        "deflate": lambda block: zlib.compress(block, wbits=-15),
        "bzip2": lambda block: bz2.compress(block),
        "zstandard": lambda block: pa.compress(block, "zstd", asbytes=True),
    }
    file = io.BytesIO(data)
    file.read(len(avro.MAGIC))
    header = dict(avro._pairs(file)) | {avro.CODEC: codec.encode()}
    texts = [avro._long(len(text)) + text for pair in header.items() for text in pair]
    mark = file.read(avro.SYNC_BYTES)
    parts = [avro.MAGIC, avro._long(len(header)), *texts, avro._long(0), mark]
    while file.tell() < len(data):
        num_records, block = avro._read_long(file), packers[codec](avro._read_bytes(file))
        parts += [avro._long(num_records), avro._long(len(block)), block, file.read(16)]
    return b"".join(parts)


@pytest.mark.parametrize("codec", ["null", "deflate", "bzip2", "zstandard"])
def test_manifests_are_read_in_any_codec_and_bounded(
    codec: str, catalog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = made(catalog)
    manifests = sorted(Path(place(table)).parent.glob("*.avro"))
    for path in manifests:
        plain = avro.unpacked(path.read_bytes(), 1 << 20)
        path.write_bytes(plain if codec == "null" else packed_avro(plain, codec))
    assert [text for text, _ in read(place(table))] == ["a", "b", "c"]
    largest = max(len(avro.unpacked(path.read_bytes(), 1 << 20)) for path in manifests)
    assert largest > Path(place(table)).stat().st_size
    monkeypatch.setattr(iceberg, "MOST_BYTES", largest - 1)
    with pytest.raises(
        CorpusError, match=r"\.avro (has|cannot be read as a manifest).*over the limit"
    ):
        read(place(table))


def test_files_of_a_table_that_unpack_to_fill_memory_are_refused_by_name(catalog: Any) -> None:
    table = made(catalog)
    path = Path(place(table))
    packed = path.with_name("x.gz.metadata.json")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert len(read(str(packed))) == 3
    packer = zlib.compressobj(wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()
    packed.write_bytes(bomb)
    with pytest.raises(CorpusError, match=rf"x\.gz\.metadata\.json.*over the limit of {256 << 20}"):
        read(str(packed))
    (manifest,) = [Path(each.manifest_list).name for each in table.snapshots()][-1:]
    listed = path.parent / manifest
    plain = avro.unpacked(listed.read_bytes(), 1 << 20)
    mark = plain[-avro.SYNC_BYTES :]
    header = packed_avro(plain[: plain.index(mark) + len(mark)], "deflate")
    packer = zlib.compressobj(wbits=-15)
    block = b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()
    for num_records, data, why in (
        (1, block, "over the limit once they are unpacked"),
        (1 << 60, zlib.compress(bytes(100), wbits=-15), "records are in a block of 100 bytes"),
    ):
        bad = header + avro._long(num_records) + avro._long(len(data)) + data + mark
        listed.write_bytes(bad)
        with pytest.raises(CorpusError, match=rf"{manifest} cannot be read as a manifest.*{why}"):
            read(str(path))


def test_deleted_rows_are_refused(catalog: Any, tmp_path: Path) -> None:
    table = made(catalog)
    with_deletes = tmp_path / "deletes.metadata.json"
    with_deletes.write_text(json.dumps(_with_deletes(table, tmp_path)))
    with pytest.raises(
        CorpusError, match=r"rows of .*\.parquet are deleted in other files; rewrite"
    ):
        read(str(with_deletes))


def _with_deletes(table: Any, folder: Path) -> dict[str, Any]:
    """The metadata of ``table`` with a file of deleted positions, as Spark's merge-on-read writes
    it.
    """
    from pyiceberg import manifest
    from pyiceberg.manifest import (
        DataFile,
        DataFileContent,
        FileFormat,
        ManifestContent,
        ManifestEntry,
        ManifestEntryStatus,
        ManifestWriterV2,
    )
    from pyiceberg.typedef import Record

    class Deletes(ManifestWriterV2):
        def content(self) -> ManifestContent:
            return ManifestContent.DELETES

    snapshot = table.current_snapshot()
    data = str(folder / "deletes.parquet")
    file = DataFile.from_args(
        content=DataFileContent.POSITION_DELETES,
        file_path=data,
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=1,
        file_size_in_bytes=1,
        column_sizes={},
        value_counts={},
        null_value_counts={},
        nan_value_counts={},
        lower_bounds={},
        upper_bounds={},
        split_offsets=[],
        equality_ids=None,
        sort_order_id=None,
        spec_id=0,
    )
    io = table.io
    output = io.new_output(str(folder / "deletes.avro"))
    with Deletes(table.spec(), table.schema(), output, snapshot.snapshot_id, "null") as writer:
        entry = ManifestEntry.from_args(
            status=ManifestEntryStatus.ADDED, snapshot_id=snapshot.snapshot_id, data_file=file
        )
        writer.add_entry(entry)
    manifests = [*snapshot.manifests(io), writer.to_manifest_file()]
    listed = io.new_output(str(folder / "list.avro"))
    with manifest.write_manifest_list(
        2, listed, snapshot.snapshot_id, None, snapshot.sequence_number, "null"
    ) as lists:
        lists.add_manifests(manifests)
    metadata: dict[str, Any] = json.loads(Path(place(table)).read_text())
    for each in metadata["snapshots"]:
        if each["snapshot-id"] == snapshot.snapshot_id:
            each["manifest-list"] = str(folder / "list.avro")
    return metadata


def test_metadata_of_strangers_imports_nothing_and_reads_no_other_filesystem(
    catalog: Any, tmp_path: Path
) -> None:
    table = made(catalog)
    metadata = json.loads(Path(place(table)).read_text())
    metadata["properties"]["py-io-impl"] = "no_such_module.Evil"
    (tmp_path / "evil.metadata.json").write_text(json.dumps(metadata))
    assert len(read(f"{tmp_path}/evil.metadata.json")) == 3
    for broken in (b"{}", b"\0", b"[" * 100_000, b'{"format-version": 2}'):
        (tmp_path / "x.metadata.json").write_bytes(broken)
        with pytest.raises(CorpusError, match="cannot be read as a table of Iceberg"):
            read(f"{tmp_path}/x.metadata.json")
    with pytest.raises(CorpusError, match="no such file"):
        read(f"{tmp_path}/y.metadata.json")
    with pytest.raises(CorpusError, match="is an Iceberg table"):
        read(place(table), ReadOptions("jsonl", "text", None, "file", 1 << 20))
    os.mkfifo(tmp_path / "z.metadata.json")
    with pytest.raises(CorpusError, match="is a pipe"):
        read(f"{tmp_path}/z.metadata.json")


@pytest.mark.parametrize(
    "location", ["http://127.0.0.1:9/x.avro", "/etc/passwd", "file:///dev/zero", "{}/../../x", "x"]
)
def test_a_file_outside_the_folder_of_the_table_is_never_opened(
    location: str, catalog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(place(made(catalog)))
    metadata = json.loads(path.read_text())
    for each in metadata["snapshots"]:
        each["manifest-list"] = location.format(path.parent.parent)
    path.write_text(json.dumps(metadata))
    opened: list[str] = []
    known = readers.open_read

    def noted(uri: str) -> IO[bytes]:
        opened.append(uri)
        return known(uri)

    monkeypatch.setattr(readers, "open_read", noted)
    with pytest.raises(CorpusError, match=r"names .*, which is not in the table's folder"):
        read(str(path))
    assert opened == [str(path)]


def test_data_files_outside_the_folder_of_the_metadata_are_refused(
    catalog: Any, tmp_path: Path
) -> None:
    path = Path(place(made(catalog)))
    table = path.parent.parent
    moved = tmp_path / "moved"
    shutil.copytree(table, moved)
    text = (moved / "metadata" / path.name).read_text()
    lists = text.replace(f"{table}/metadata/", f"{moved}/metadata/")
    (moved / "metadata" / path.name).write_text(lists)
    with pytest.raises(CorpusError, match=r"which is not in the table's folder .*/moved;"):
        read(f"{moved}/metadata/{path.name}")
    version = iceberg.Version("s3://a/t/metadata/x.metadata.json")
    assert version.folder == "s3://a/t"
    assert iceberg._in_folder(version)("s3a://a/t/data/x.parquet") == "s3://a/t/data/x.parquet"
    for outside in ("s3://b/t/data/x.parquet", "s3://a/tt/x.parquet", "/a/t/x.parquet"):
        with pytest.raises(CorpusError, match="is not in the table's folder"):
            iceberg._in_folder(version)(outside)


def test_a_planted_hint_takes_over_no_folder(catalog: Any, tmp_path: Path) -> None:
    path = Path(place(made(catalog)))
    folder = path.parent.parent
    (path.parent / "v1.metadata.json").write_bytes(path.read_bytes())
    (path.parent / "version-hint.text").write_text("1")
    assert len(read(str(folder))) == 3
    (folder / "mine.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(CorpusError, match=r"mine\.jsonl is none of its files; name both"):
        read(str(folder))
    planted = tmp_path / "texts"
    shutil.copytree(path.parent, planted / "metadata")
    with pytest.raises(
        CorpusError, match=r"texts has a .*version-hint\.text, but its metadata are"
    ):
        read(str(planted))
    (path.parent / "version-hint.text").write_text("1" * 100)
    with pytest.raises(CorpusError, match="is an Iceberg table"):
        read(str(folder))


def test_a_name_that_was_another_columns_is_refused_even_if_old_schemas_are_gone(
    catalog: Any,
) -> None:
    table = made(catalog)
    for old, new in (("text", "old"), ("lang", "text")):
        with table.update_schema() as update:
            update.rename_column(old, new)
    path = Path(place(table))
    metadata = json.loads(path.read_text())
    current = metadata["current-schema-id"]
    metadata["schemas"] = [s for s in metadata["schemas"] if s["schema-id"] == current]
    for each in metadata["snapshots"]:
        each["schema-id"] = current
    path.write_text(json.dumps(metadata))
    with pytest.raises(CorpusError, match=r"lacks column 'text' of its table \(field 2\)"):
        read(str(path))
    with pytest.raises(CorpusError, match=r"has a column 'lang', which its table has not"):
        read(str(path), ReadOptions("auto", "lang", None, "file", 1 << 20))


def test_a_run_over_a_table_resumes_with_the_files_of_its_version(
    catalog: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    table = made(catalog)
    config: RunConfig = config_of(tiny_bert, place(table), tmp_path / "s", keep_columns="lang")
    before = plan.make_plan(config)
    table.append(rows("more"))
    assert plan.make_plan(config).shards == before.shards
    with afn_ray.run(config) as run:
        found = run.sql("SELECT lang, count(*) FROM documents GROUP BY ALL ORDER BY 1").fetchall()
        assert found == [("de", 1), ("en", 2)]
    assert not afn_ray.verify_store(str(tmp_path / "s")).findings


def test_without_the_extra_the_message_names_it(
    catalog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> Any:
        raise ImportError

    table = made(catalog)
    monkeypatch.setattr(iceberg, "_load", missing)
    with pytest.raises(ConfigError, match=r'pip install "afn-ray\[iceberg\]"'):
        read(place(table))
