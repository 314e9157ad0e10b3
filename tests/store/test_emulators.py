"""A store in Azure, in Google's cloud and on a second server of S3: what a disk's does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import afn_ray
import emulators
from afn_ray.cli import commands
from afn_ray.corpus_values import ReadOptions
from afn_ray.errors import StoreError
from afn_ray.store import probes, storage, uris
from conftest import MakeConfig, race_attempts, recorded, write_jsonl

Serve = Callable[[Path], AbstractContextManager[str]]
PART_BYTES = 68_000_000
"""Size of an object that clients send in parts."""
LARGE_BODIES = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp


AZURE = pytest.param(emulators.serve_azure, id="az")
GOOGLE = pytest.param(emulators.serve_google, id="gs")
SEAWEED = pytest.param(emulators.serve_seaweed, id="s3")


@pytest.fixture(scope="module", params=[AZURE, GOOGLE, SEAWEED])
def bucket(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A bucket of each server."""
    serve: Serve = request.param
    with serve(tmp_path_factory.mktemp("server")) as uri:
        yield uri


def _afn(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Output of ``afn`` with ``words``, once it has succeeded."""
    with pytest.raises(SystemExit) as left:
        commands.main(list(words))
    out, err = capsys.readouterr()
    assert left.value.code == 0, (words, out, err)
    return out


def test_a_store_lives_as_one_on_a_disk_does(
    bucket: str,
    tiny_bert: Path,
    make_config: MakeConfig,
    tmp_path: Path,
    verses: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run, sql, status, verify; a file more, and run again; gc, and verify."""
    folder, corpus, store = tmp_path / "corpus", f"{bucket}/corpus", f"{bucket}/store"
    folder.mkdir()
    what = ("run", corpus, "--store", store, "--model", str(tiny_bert), "--layers", "2")
    how = ("--dtype", "float32", "--shard-bytes", "4096", "--executor", "inline", "--quiet")
    for night, name in enumerate(("a.jsonl", "b.jsonl")):
        texts = [{"text": text} for text in verses[40 * night :][:40]]
        storage.upload(write_jsonl(folder / name, texts), f"{corpus}/{name}")
        _afn(capsys, *what, *how)
    with afn_ray.run(make_config(corpus=(str(folder),), layers="2")) as on_disk:
        expected = recorded(on_disk)
    with afn_ray.open_run(store) as of_bucket:
        found, info = recorded(of_bucket), of_bucket.info
    assert info["counts"]["shards_reused"] > 0
    source = expected[1].column_names.index("source")
    assert found[0] == expected[0] and found[2:] == expected[2:]
    assert found[1].remove_column(source) == expected[1].remove_column(source)

    n_tokens = expected[0].num_rows
    columns = "count(*), count(DISTINCT doc), count(DISTINCT source)"
    query = f"SELECT {columns} FROM tokens JOIN documents USING (doc)"
    out = _afn(capsys, "sql", store, query, "--format", "csv")
    assert out.splitlines()[1] == f"{n_tokens},80,2"
    assert f"{n_tokens:,}" in _afn(capsys, "status", store)
    assert "all is as it was committed" in _afn(capsys, "verify", store)
    first, second = storage.list_names(f"{store}/runs")
    deleted = _afn(capsys, "gc", store, "--keep", "1", "--min-age-h", "0", "--delete")
    assert f"/runs/{first}: " in deleted and f"/runs/{second}: " not in deleted
    assert storage.list_names(f"{store}/runs/{first}") == ["run.json"]  # says that it was deleted
    assert "all is as it was committed" in _afn(capsys, "verify", store)


def test_of_two_attempts_at_once_one_commits_and_the_other_reads_its_commit(
    bucket: str, tmp_path: Path
) -> None:
    options = ReadOptions("auto", "text", None, "file", 100)
    race_attempts(f"{bucket}/race", tmp_path, options, rounds=10)


@LARGE_BODIES
@pytest.mark.parametrize("bucket", [AZURE, SEAWEED], indirect=True)
def test_of_two_writers_of_a_large_object_one_wins(bucket: str) -> None:
    barrier, uri = threading.Barrier(2), f"{bucket}/large"

    def write(first: bytes) -> bytes:
        barrier.wait()
        try:
            storage.write_once(uri, first * PART_BYTES)
        except storage.AlreadyWritten:
            return b""
        return first

    with ThreadPoolExecutor(2) as pool:
        winner = b"".join(pool.map(write, (b"a", b"b")))
    content = storage.read_bytes(uri)
    assert content in (b"a" * PART_BYTES, b"b" * PART_BYTES)
    assert winner in (content[:1], b"")  # a winner whose answer is lost does not know it
    storage.delete([uri])


@LARGE_BODIES
@pytest.mark.parametrize("bucket", [GOOGLE], indirect=True)
def test_google_is_asked_that_a_large_object_be_new(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fake-gcs-server ignores this precondition, unlike that of a small object."""
    asked: list[str | None] = []
    filesystem = type(uris.open_filesystem(bucket)[0])
    call = filesystem._call

    async def spy(self: Any, *args: Any, **parameters: Any) -> Any:
        if parameters.get("uploadType") == "resumable":
            asked.append(parameters.get("ifGenerationMatch"))
        return await call(self, *args, **parameters)

    monkeypatch.setattr(filesystem, "_call", spy)
    storage.write_once(f"{bucket}/large", bytes(PART_BYTES))
    assert asked == ["0"]
    storage.delete([f"{bucket}/large"])


def test_a_missing_bucket_is_named(bucket: str) -> None:
    missing = f"{bucket.partition('://')[0]}://no-such-bucket"
    with pytest.raises(StoreError, match=r"probe-\w+: (no such bucket|.* does not exist\.$)") as e:
        probes.check_writable(missing)
    assert "\n" not in str(e.value)
