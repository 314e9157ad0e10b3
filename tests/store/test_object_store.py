"""Corpus and store in a bucket: the same rows as on a disk, through every fault that a bucket has;
SQL over it.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.registry import _registry as fsspec_registry
from s3fs import S3FileSystem

import afn_ray
import faults
from afn_ray.cli import commands
from afn_ray.corpus import listing as corpus
from afn_ray.corpus import reading
from afn_ray.corpus_values import FileInfo, ReadOptions
from afn_ray.errors import ConfigError, CorpusError, StoreError, Unavailable
from afn_ray.query.files import ReadOnlyFiles
from afn_ray.store import blocks, corpus_files, manifest, probes, readers, retry, storage, uris
from afn_ray.store.readers import RangeFile
from conftest import S3_SECRET, MakeConfig, stop_after, write_jsonl

# --- a run
# -----------------------------------------------------------------------------------------------


def make_corpus(folder: Path, verses: list[str]) -> Path:
    """Files of several formats, each larger than a shard: then no shard depends on what its files
    are called.
    """
    folder.mkdir()
    (folder / "deep").mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": t} for t in verses[:75]])
    (folder / "b.txt").write_text("\n".join(verses[150:200]))
    (folder / "deep" / "c.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in verses[250:400]).encode())
    )
    pq.write_table(
        pa.table({"text": verses[450:530]}), folder / "deep" / "d.parquet", row_group_size=45
    )
    assert all(f.stat().st_size > 4096 for f in folder.rglob("*.*"))
    return folder


def copy(folder: Path, uri: str) -> str:
    """The files below ``folder`` at ``uri``."""
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        storage.upload(file, uris.join(uri, file.relative_to(folder).as_posix()))
    return uri


def recorded(run: afn_ray.Run) -> dict[str, list[dict[str, Any]]]:
    """All rows of a run, those of its shards with a run-wide ``doc`` and without where their files
    lie.
    """
    store, _, name = run.uri.rpartition("/runs/")
    folder = manifest.RunFolder(run.uri, store, name, run.info)
    rows: dict[str, list[dict[str, Any]]] = {"tokens": [], "documents": []}
    first = 0
    for shard in manifest.read_table(folder, "shards").to_pylist():
        tables = {
            t: pq.read_table(pa.BufferReader(storage.read_bytes(f"{store}/{shard[f'{t}_file']}")))
            for t in rows
        }
        for name, table in tables.items():
            dropped = [c for c in ("source",) if c in table.column_names]
            rows[name] += [
                {**row, "doc": row.pop("doc_in_shard") + first}
                for row in table.drop_columns(dropped).to_pylist()
            ]
        first += tables["documents"].num_rows
    return rows | {
        t: manifest.read_table(folder, t).to_pylist() for t in ("thresholds", "vocabulary")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, verses: list[str]) -> Path:
    return make_corpus(tmp_path_factory.mktemp("source") / "corpus", verses)


def test_a_bucket_gives_the_rows_of_a_disk(
    source: Path, object_store: str, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        corpus=(copy(source, f"{object_store}/corpus"),),
        store=f"{object_store}/store",
        layers="0,2",
    )
    with afn_ray.run(make_config(corpus=(str(source),), layers="0,2")) as run:
        expected = recorded(run)
    with afn_ray.run(config) as run:
        assert recorded(run) == expected
        assert run.info["counts"]["documents"] == 306 and run.uri.startswith(
            config.store + "/runs/"
        )
        (answer,) = run.sql(
            "SELECT count(*), count(DISTINCT doc), sum(token_id) FROM tokens"
        ).fetchall()
        ids = [row["token_id"] for row in expected["tokens"]]
        assert answer == (len(ids), 306, sum(ids))
        ((worst,),) = run.sql("SELECT max(source) FROM documents").fetchall()
        assert worst == f"{object_store}/corpus/deep/d.parquet"

    writes = Counter(_keys(object_store))
    events: list[str] = []
    with afn_ray.run(config, lambda event: events.append(event.message)) as again:
        assert again.uri == run.uri and "nothing to do" in events[-1]
    assert Counter(_keys(object_store)) == writes

    for words in (
        ["show", config.store],
        ["explain", config.store, "In the beginning"],
        ["sql", config.store, "SELECT count(*) AS n FROM documents"],
    ):
        with pytest.raises(SystemExit) as left:
            commands.main(words)
        out, err = capsys.readouterr()
        assert left.value.code == 0 and out and not err, (words, err)
    assert "306" in out
    for key in _keys(object_store):
        assert S3_SECRET.encode() not in storage.read_bytes(f"{object_store}/{key}")


def _keys(bucket_uri: str) -> list[str]:
    pages = (
        boto3.client("s3")
        .get_paginator("list_objects_v2")
        .paginate(Bucket=bucket_uri.removeprefix("s3://"))
    )
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def test_a_run_that_was_stopped_goes_on_in_the_bucket(
    source: Path, object_store: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        corpus=(copy(source, f"{object_store}/corpus"),), store=f"{object_store}/store"
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            afn_ray.run(config)
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards_reused"] == 3 and run.info["counts"]["documents"] == 306


@pytest.mark.ray
def test_workers_on_ray_write_to_the_bucket_what_this_process_writes(
    local_ray: None, source: Path, object_store: str, make_config: MakeConfig
) -> None:
    place = copy(source, f"{object_store}/corpus")
    with afn_ray.run(make_config(corpus=(place,), store=f"{object_store}/here")) as run:
        expected = recorded(run)
    config = make_config(corpus=(place,), store=f"{object_store}/there", executor="ray", workers=2)
    with afn_ray.run(config) as run:
        assert recorded(run) == expected


def test_a_run_through_faults_has_the_rows_of_an_undisturbed_one(
    source: Path, memory: str, make_config: MakeConfig
) -> None:
    """Every call may fail, be slow, act and say that it failed; listings may be old."""
    calm = f"{memory}/calm"
    place = faults.wrap(copy(source, f"{calm}/corpus"))
    with afn_ray.run(make_config(corpus=(place,), store=f"{calm}/store")) as run:
        expected = recorded(run)
    seen: Counter[tuple[str, str]] = Counter()
    for seed in range(5):
        with faults.injected(seed, rate=0.3) as schedule:
            config = make_config(corpus=(place,), store=faults.wrap(f"{memory}/{seed}"))
            afn_ray.run(config).close()
            with afn_ray.run(config) as run:  # from what is in the store, old listings and all
                assert recorded(run) == expected
        seen += schedule.injected
        names = storage.list_names(uris.join(config.store, "shards"))
        assert len(names) == 1
        for shard in storage.list_names(uris.join(config.store, "shards", names[0])):
            files = storage.list_names(uris.join(config.store, "shards", names[0], shard))
            assert len(files) == 4 and "commit.json" in files  # nothing half done, nothing twice
    for kind, method in itertools.product(
        ("fail", "slow", "lie"), ("info", "ls", "cat_file", "pipe_file", "put_file")
    ):
        assert seen[kind, method], f"no {kind} in {method}: the schedule proves nothing"
    assert seen["stale", "ls"]


def test_old_listings_do_not_make_a_complete_run_incomplete(
    source: Path, memory: str, make_config: MakeConfig
) -> None:
    place = copy(source, f"{memory}/corpus")
    for seed in range(8):
        with faults.injected(seed, rate=0.5, kinds=("stale",)):
            config = make_config(corpus=(place,), store=faults.wrap(f"{memory}/{seed}"))
            runs = [afn_ray.run(config).uri for _ in range(3)]
        assert (
            len({uri.rpartition("-")[2] for uri in runs}) == 1
        )  # one run, or the same begun again


# --- reading
# ---------------------------------------------------------------------------------------------


def test_a_remote_reader_reads_as_a_local_file_does(place: str, tmp_path: Path) -> None:
    body = np.random.default_rng(0).bytes(9 << 20)
    (tmp_path / "x").write_bytes(body)
    storage.upload(tmp_path / "x", uris.join(place, "x"))
    dice = np.random.default_rng(1)
    with (
        readers.open_read(uris.join(place, "x")) as remote,
        (tmp_path / "x").open("rb") as local,
    ):
        for _ in range(200):
            if dice.random() < 0.3:
                at = int(dice.integers(0, len(body) + 100))
                assert remote.seek(at) == local.seek(at)
            n = int(dice.choice([0, 1, 100, 65536, 1 << 20, 5 << 20]))
            assert remote.read(n) == local.read(n) and remote.tell() == local.tell()
        assert remote.seek(-7, os.SEEK_END) == len(body) - 7 and remote.read() == body[-7:]


def test_reading_on_asks_for_few_large_ranges(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = faults.wrap(f"{memory}/x")
    storage.write_once(uri, bytes(10 << 20))
    asked: list[tuple[int, int]] = []
    cat_file = faults.FaultyFileSystem.cat_file

    def counted(self: Any, path: str, start: int, end: int) -> Any:
        asked.append((start, end))
        return cat_file(self, path, start, end)

    monkeypatch.setattr(faults.FaultyFileSystem, "cat_file", counted)
    with readers.open_read(uri) as reader:
        while reader.read(10_000):
            pass
    size = readers.READ_AHEAD_BYTES
    assert asked == [(0, size), (size, 2 * size), (2 * size, 10 << 20)]


def test_a_file_may_be_read_by_another_thread_than_opened_it(object_store: str) -> None:
    uri = f"{object_store}/x"
    storage.write_once(uri, bytes(range(200)))
    with readers.open_read(uri) as reader:
        reader.seek(100)
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(reader.read(3)))
        thread.start()
        thread.join()
    assert got == [bytes([100, 101, 102])]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("opens", [True, False])
def test_a_corpus_that_does_not_answer_is_unavailable_and_not_bad_content(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, opens: bool
) -> None:
    """Bad content would be quarantined, a failed shard given up: nothing of it is lost."""
    uri = faults.wrap(f"{memory}/x.{ending}")
    body = b'{"text": "a"}\n' * 9
    if ending == "parquet":
        pq.write_table(pa.table({"text": ["a"] * 9}), tmp_path / "x")
        body = (tmp_path / "x").read_bytes()
    storage.write_once(uri, gzip.compress(body) if ending == "jsonl.gz" else body)
    options = ReadOptions("auto", "text", None, "file", 100)
    (slice,) = corpus.cut(corpus_files.stat(uri), options, 1 << 20)
    assert len(list(reading.read(slice, options))) == 9
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.01)
    with faults.injected(
        0, rate=1, kinds=("fail",), methods=("cat_file",) if opens else ("info", "cat_file")
    ):
        with pytest.raises(Unavailable, match=rf"x\.{ending}: no answer"):
            list(reading.read(slice, options))
        with pytest.raises(Unavailable, match=rf"x\.{ending}: no answer"):
            corpus.cut(FileInfo(uri, slice.size, slice.version), options, 1 << 20)


def test_a_listing_that_fails_is_no_empty_one(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/3.txt"):
        storage.write_once(f"{memory}/{name}", b"x")
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.01)
    for seed, pattern in itertools.product(range(20), ("", "/*/*.txt", "/a/*", "/**/?.txt")):
        with faults.injected(seed, rate=0.7, kinds=("fail",)):
            try:
                found = corpus_files.find_files(faults.wrap(memory) + pattern)
            except Unavailable:
                continue
            assert len(found) == (2 if pattern == "/a/*" else 3)
    with faults.injected(0, rate=1, kinds=("fail",)):
        for ask in (storage.exists, storage.list_names, storage.read_if_there, corpus_files.stat):
            with pytest.raises(Unavailable):
                ask(faults.wrap(memory))


# --- a server that misbehaves
# ----------------------------------------------------------------------------


class Gate:
    """A way to the S3 server that can be shut: ``mode`` is what happens to the next ``left``
    connections.
    """

    def __init__(self, server_url: str) -> None:
        host, _, port = server_url.removeprefix("http://").partition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.mode, self.left = "open", 0
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self, mode: str, for_connections: int) -> None:
        self.mode, self.left = mode, for_connections

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request on each connection."""
        mode = self.mode if self.left > 0 else "open"
        self.left -= 1
        with client:
            request = _request(client)
            if mode == "busy":
                body = (
                    b"<Error><Code>SlowDown</Code><Message>Reduce your request "
                    b"rate.</Message></Error>"
                )
                head = (
                    b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                    % len(body)
                )
                client.sendall(head if request.startswith(b"HEAD") else head + body)
            elif mode == "deaf":
                time.sleep(2)
            elif mode in ("open", "mute"):
                with socket.create_connection(self._server) as server:
                    server.sendall(request)
                    answer = b"".join(iter(lambda: server.recv(1 << 16), b""))
                if mode == "open":
                    client.sendall(answer)


def _request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and (block := client.recv(1 << 16)):
        data += block
    head, _, body = data.partition(b"\r\n\r\n")
    fields = {
        k.lower(): v.strip()
        for k, _, v in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if fields.get(b"expect"):
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    while len(body) < int(fields.get(b"content-length", 0)) and (block := client.recv(1 << 16)):
        body += block
    lines = [
        line
        for line in head.split(b"\r\n")
        if not line.lower().startswith((b"connection:", b"expect:"))
    ]
    return b"\r\n".join([*lines, b"Connection: close", b"", body])


@pytest.fixture
def gate(s3_server: str, object_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate between this process and the bucket ``object_store``."""
    gate = Gate(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", gate.url)
    settings = uris.OPTIONS["s3"]["config_kwargs"] | {"retries": {"total_max_attempts": 1}}
    monkeypatch.setitem(uris.OPTIONS, "s3", {"config_kwargs": settings})
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.2)
    yield gate
    gate.close()
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("mode", ["shut", "busy", "deaf", "mute"])
def test_a_bucket_that_comes_back_is_waited_for(
    gate: Gate, object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Connections are reset; 503 is said; nothing is said; what was asked is done, and nothing is
    said.
    """
    storage.write_once(f"{object_store}/before", b"1")
    (tmp_path / "x").write_bytes(b"3")
    if mode == "deaf":
        monkeypatch.setitem(uris.OPTIONS["s3"]["config_kwargs"], "read_timeout", 0.3)
    gate.shut(mode, for_connections=4)
    with (
        pytest.raises(storage.AlreadyWritten) if mode == "mute" else contextlib.nullcontext()
    ):  # by ourselves
        storage.write_once(f"{object_store}/x", b"2")
    assert gate.left < 0
    for call in (
        lambda: storage.upload(tmp_path / "x", f"{object_store}/y"),
        lambda: corpus_files.stat(f"{object_store}/y"),
        lambda: storage.read_bytes(f"{object_store}/y"),
    ):
        gate.shut(mode, for_connections=2)
        call()
        assert gate.left < 0
    gate.shut(mode, for_connections=2)
    assert storage.list_names(object_store) == ["before", "x", "y"]
    assert (
        storage.read_bytes(f"{object_store}/x") == b"2"
        and storage.read_bytes(f"{object_store}/y") == b"3"
    )


def test_a_bucket_that_does_not_come_back_is_unavailable(
    gate: Gate, object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.3)
    monkeypatch.setattr(storage, "DELETE_FOR_S", 0.3)
    gate.shut("busy", for_connections=10**6)
    with pytest.raises(
        Unavailable, match=r"writing s3://.*/x: no answer in \d+ tries .*Reduce your request rate"
    ) as e:
        storage.write_once(f"{object_store}/x", b"2")
    assert S3_SECRET not in str(e.value)
    storage.delete(
        [f"{object_store}/x", f"{object_store}/y"]
    )  # garbage stays; no error, no long wait


def test_an_endpoint_that_cannot_be_is_said_at_once(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(ConfigError, match=r"AWS_ENDPOINT_URL must have the form http://host:port"):
        storage.read_bytes(f"{object_store}/x")
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_query_of_a_bucket_that_is_gone_says_so_and_is_no_wrong_query(
    gate: Gate,
    object_store: str,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("afn_ray.query.files.HELD_BYTES", 0)  # a query reads the bucket
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning"}])
    with afn_ray.run(make_config(corpus=(str(corpus),), store=f"{object_store}/store")) as run:
        monkeypatch.setattr(retry, "RETRY_FOR_S", 0.3)
        gate.shut("busy", for_connections=10**6)
        with pytest.raises(Unavailable, match=r"no answer in \d+ tries") as e:
            run.sql("SELECT count(position) FROM tokens").fetchall()
        assert e.value.exit_code == 75
        gate.shut("busy", for_connections=0)
        assert run.sql("SELECT count(position) FROM tokens").fetchall() == [(5,)]


# --- objects in parts
# ------------------------------------------------------------------------------------


def test_an_object_of_many_parts_is_written_once(
    object_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = 5 << 20  # the least that S3 takes; s3fs sends 100 MiB and more in parts of 50
    monkeypatch.setattr(S3FileSystem._pipe_file, "__defaults__", (part, None, "overwrite"))
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: part)
    body = np.random.default_rng(0).bytes(11 << 20)
    storage.write_once(f"{object_store}/x", body)
    with pytest.raises(storage.AlreadyWritten):
        storage.write_once(f"{object_store}/x", body[::-1])
    assert storage.read_bytes(f"{object_store}/x") == body
    (tmp_path / "y").write_bytes(body)
    storage.upload(tmp_path / "y", f"{object_store}/y")
    client, bucket = boto3.client("s3"), object_store.removeprefix("s3://")
    assert corpus_files.stat(f"{object_store}/y").size == len(body)
    for key in "xy":
        assert client.head_object(Bucket=bucket, Key=key)["ETag"].endswith('-3"')  # of three parts
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")  # and none left behind


# --- credentials and packages
# ----------------------------------------------------------------------------

SECRET = "wJalrXUtnFEMIbPxRfiCY"  # as AWS's manuals have it


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIAIOSFODNN7:{SECRET}@bucket/x",
        f"s3://AKIAIOSFODNN7:a/{SECRET}+b/c@bucket/x",
        f"s3://{SECRET}@bucket/x",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"s3://bucket/x?a=b&AWSAccessKeyId={SECRET}",
        f"https://host:8080/x?sig={SECRET}",
        f"https://user:{SECRET}@host:8080/x",
        f"az://container/x?sv=2026&sig={SECRET}",
        f"abfs://container:{SECRET}@account.dfs.core.windows.net/x",
        f"gs://bucket/x?access_token={SECRET}",
        f"simplecache::s3://user:{SECRET}@bucket/x",
        f"s3:/user:{SECRET}@bucket/x",
    ],
)
def test_a_url_with_credentials_is_refused_without_echo(uri: str) -> None:
    with pytest.raises(ConfigError, match="URL holds credentials") as caught:
        uris.open_filesystem(uri)
    assert SECRET not in str(caught.value) and "environment" in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a@b.txt",
        "s3://bucket/a:b@c/x",
        "memory://bucket/what?.txt",
        "s3://bucket/monkey=1?.txt",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/a@b",
        "memory://a/x?a=b",
    ],
)
def test_other_urls_are_not_taken_for_one(s3_server: str, uri: str) -> None:
    uris.open_filesystem(uri)


@pytest.mark.parametrize("uri", ["s3:/bucket/x", "gs:bucket/x", "AZ:/x", "hf:/datasets/x", "s3a:x"])
def test_a_url_that_lacks_slashes_is_no_folder_unless_there_is_one(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    protocol = uri.partition(":")[0]
    with pytest.raises(ConfigError, match=rf"lacks slashes.*; give {protocol}://\w.*, or \./{uri}"):
        uris.open_filesystem(uri)
    assert uris.absolute(f"./{uri}") == str(tmp_path / uri)
    (tmp_path / uri).mkdir(parents=True)
    assert uris.absolute(uri) == str(tmp_path / uri)


@pytest.mark.parametrize(
    "uri", ["abfs://container@account.dfs.core.windows.net/x", "gs://bucket/x", "s3://bucket/x"]
)
def test_a_missing_package_is_named(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("s3fs", "gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    for protocol in ("s3", "s3a", "gs", "abfs"):
        monkeypatch.delitem(fsspec_registry, protocol, raising=False)
    extra = {"abfs": "az", "gs": "gs", "s3": "s3"}[uri.partition(":")[0]]
    with pytest.raises(ConfigError, match=rf'pip install "afn-ray\[{extra}\]"'):
        uris.open_filesystem(uri)


def test_no_credentials_and_wrong_ones_say_what_to_do(
    object_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(
            StoreError, match=r"writing .*: Unable to locate credentials; give cred"
        ):
            storage.write_once(f"{object_store}/x", b"")
        with pytest.raises(
            CorpusError, match="Unable to locate credentials; give credentials in the environment"
        ):
            corpus_files.find_files(object_store)
    finally:
        S3FileSystem.clear_instance_cache()


def test_a_bucket_that_is_not_there_is_named(s3_server: str) -> None:
    with pytest.raises(CorpusError, match="s3://no-such-bucket/x: no such file or folder"):
        corpus_files.find_files("s3://no-such-bucket/x")
    with pytest.raises(StoreError, match=r"s3://no-such-bucket/x/probe-.*: no such bucket"):
        probes.check_writable("s3://no-such-bucket/x")
    with pytest.raises(CorpusError, match="Invalid bucket name"):
        corpus_files.find_files("s3://No!Bucket/x")


# --- SQL
# -------------------------------------------------------------------------------------------------

SQL_ROWS = 5_600_000
SQL_BYTES = 60_000_000


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One Parquet file of more than 60 MB for each compression."""
    dice = np.random.default_rng(0)
    table = pa.table(
        {
            "doc": np.arange(SQL_ROWS, dtype=np.int32) // 300,
            "token_id": dice.integers(0, 1 << 30, SQL_ROWS, dtype=np.int32),
            "strength_2": dice.random(SQL_ROWS, dtype=np.float32),
            "strength_8": dice.random(SQL_ROWS, dtype=np.float32),
        }
    )
    folder = tmp_path_factory.mktemp("tables")
    for compression in ("none", "zstd"):
        pq.write_table(
            table,
            folder / compression,
            compression=compression,
            use_dictionary=False,
            row_group_size=1 << 19,
        )
        assert (folder / compression).stat().st_size > SQL_BYTES
    return {name: folder / name for name in ("none", "zstd")}


CHECKSUM = "SELECT count(*), sum(hash(doc, token_id, strength_2, strength_8)::HUGEINT) FROM "


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_sql_over_large_files_is_right_on_many_threads(
    kind: str,
    tables: dict[str, Path],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DuckDB 2.0 calls seek and read on one file from many threads; a position they shared would
    mix rows up.
    """
    seek = RangeFile.seek

    def overtaken(self: RangeFile, *args: int) -> int:
        at = seek(self, *args)
        time.sleep(0.002)  # now another thread seeks, and this one has yet to read
        return at

    monkeypatch.setattr(RangeFile, "seek", overtaken)
    sizes = {name: path.stat().st_size for name, path in tables.items()}
    root = str(tables["none"].parent)
    if kind == "s3":
        root = request.getfixturevalue("object_store")
        for path in tables.values():
            storage.upload(path, f"{root}/{path.name}")
    with duckdb.connect() as plain:
        plain.register("rows_by_arrow", pq.read_table(tables["zstd"]))
        expected = plain.sql(CHECKSUM + "rows_by_arrow").fetchall()
    assert expected[0][0] == SQL_ROWS
    of_file = {
        name: blocks.Blocks(sizes[name], blocks.checksums(path.read_bytes()))
        for name, path in tables.items()
    }
    files = ReadOnlyFiles(
        root, {name: (f"{root}/{name}", size) for name, size in sizes.items()}, of_file.__getitem__
    )
    for name, threads in itertools.product(tables, (2, 8, 2, 8) if kind == "local" else (2, 8, 8)):
        with duckdb.connect(config={"threads": threads}) as connection:
            connection.register_filesystem(files)
            assert (
                connection.sql(f"{CHECKSUM} read_parquet('afn://{name}')").fetchall() == expected
            ), (name, threads)
