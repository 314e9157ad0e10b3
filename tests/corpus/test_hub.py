"""Datasets of the Hugging Face Hub are a corpus; a token reaches the Hub and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

import afn_ray
from afn_ray.corpus import listing, reading
from afn_ray.corpus_values import ReadOptions
from afn_ray.errors import ConfigError, CorpusChanged, CorpusError
from afn_ray.store import corpus_files
from conftest import config_of
from hub import REPO, Hub, serve
from test_corpus import jsonl

OPTIONS = ReadOptions("auto", "text", None, "line", 1 << 20)
TEXTS = [f"in the beginning {i}" for i in range(12)]
TOKEN = "hf_secretsecretsecret"


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=2)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {
        "README.md": b"a card",
        "data/train-00000-of-00002.parquet": parquet(TEXTS[:6]),
        "data/train-00001-of-00002.parquet": parquet(TEXTS[6:]),
        "data/test.jsonl": jsonl({"text": "test"}),
    }
    with serve(Hub(files)) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield served
    huggingface_hub.HfFileSystem.clear_instance_cache()


def read(place: str) -> list[str]:
    files, _ = listing.list_files([place], OPTIONS)
    listing.check_columns(files, OPTIONS)
    slices = [piece for file in files for piece in listing.cut(file, OPTIONS, 1)]
    return [document.text for piece in slices for document in reading.read(piece, OPTIONS)]


def test_a_split_is_read_by_its_glob_and_a_dataset_whole(hub: Hub) -> None:
    assert read(f"hf://datasets/{REPO}/data/train-*.parquet") == TEXTS
    assert read(f"hf://datasets/{REPO}/data/train-*") == TEXTS
    assert read(f"hf://datasets/{REPO}/**/*.parquet") == TEXTS
    assert sorted(read(f"hf://datasets/{REPO}")) == sorted([*TEXTS, "test"])
    assert read(f"hf://datasets/{REPO}@main/data/test.jsonl") == ["test"]


def test_a_file_that_was_replaced_is_seen_as_the_hub_has_it(hub: Hub) -> None:
    place = f"hf://datasets/{REPO}/data/test.jsonl"
    (file,) = listing.list_files([place], OPTIONS)[0]
    assert file.version.startswith("etag:")
    (piece,) = listing.cut(file, OPTIONS, 1 << 20)
    hub.files["data/test.jsonl"] = jsonl({"text": "tost"})
    assert corpus_files.stat(place) != file
    with pytest.raises(CorpusChanged):
        list(reading.read(piece, OPTIONS))
    assert read(place) == ["tost"]
    del hub.files["data/test.jsonl"]
    with pytest.raises(CorpusChanged, match="is gone since it was planned"):
        list(reading.read(piece, OPTIONS))


def test_an_answer_that_fails_in_passing_is_asked_for_again(hub: Hub) -> None:
    hub.failures = 2
    assert read(f"hf://datasets/{REPO}/data/test.jsonl") == ["test"]


def test_a_run_over_a_private_dataset_leaves_no_token_anywhere(
    hub: Hub,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hub.token = TOKEN
    place = f"hf://datasets/{REPO}/data/train-*.parquet"
    caplog.set_level(logging.DEBUG)
    with pytest.raises(CorpusError, match=r"private or gated \(status 401\).*set HF_TOKEN"):
        read(place)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with afn_ray.run(config_of(tiny_bert, place, tmp_path / "s")) as run:
        assert run.sql("SELECT count(*) FROM documents").fetchall() == [(12,)]
    assert not afn_ray.verify_store(str(tmp_path / "s")).findings
    written = [path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()]
    said = capfd.readouterr()
    assert not any(TOKEN.encode() in data for data in written)
    assert TOKEN not in caplog.text + said.out + said.err


def test_wrong_names_and_an_offline_hub_are_said_at_once(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, message in (
        ("hf://datasets/someone/other", "no such dataset, revision or file"),
        (f"hf://datasets/{REPO}/data/tst.jsonl", "no such file or folder"),
        (f"hf://datasets/{REPO}/data/*.csv", "no files match"),
    ):
        with pytest.raises(CorpusError, match=message):
            read(place)
    with pytest.raises(ConfigError, match="holds credentials"):
        read(f"hf://user:{TOKEN}@datasets/{REPO}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="HF_HUB_OFFLINE is set"):
        read(f"hf://datasets/{REPO}")
