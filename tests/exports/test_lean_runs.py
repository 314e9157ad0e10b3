"""Exports of runs that keep some rows, count copies once, or label by frozen thresholds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import afn_ray
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.exports import parts
from afn_ray.query.database import Run
from afn_ray.query.views import described
from conftest import config_of, write_jsonl


@pytest.fixture(scope="module")
def before(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> RunConfig:
    """The config of a run that counts copies once: of 10 documents and 10 copies, which is made."""
    folder = tmp_path_factory.mktemp("lean")
    rows = [
        {"id": f"v{i}", "text": text, "tag": "x", "strength_9": 0.5}
        for i, text in enumerate([*verses[:10], *verses[:80]])
    ]
    config = config_of(
        tiny_bert,
        write_jsonl(folder / "c.jsonl", rows),
        folder / "before",
        layers="0,2",
        id_column="id",
        shard_bytes=2048,
        screen=0,
        limit=20,
        duplicates="once",
    )
    afn_ray.run(config).close()
    return config


@pytest.fixture(scope="module")
def lean(before: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with the thresholds of ``before``, and rows of a sample of all documents.

    Its kept columns have names that columns of tokens could have.
    """
    with afn_ray.open_run(before.store) as run:
        thresholds = run.uri
    config = replace(
        before,
        store=str(tmp_path_factory.mktemp("lean")),
        limit=None,
        duplicates="keep",
        thresholds=thresholds,
        record="sample:20%",
        keep_columns="tag,strength_9:double",
    )
    with afn_ray.run(config) as run:
        yield run


@pytest.mark.parametrize("sample_rows", [parts.SAMPLE_ROWS, 200])
def test_files_of_a_sample_have_the_size_asked_for(
    lean: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_rows: int
) -> None:
    monkeypatch.setattr(parts, "SAMPLE_ROWS", sample_rows)
    monkeypatch.setattr(parts, "FEWEST_ROWS", sample_rows // 4)
    (whole,) = afn_ray.export(lean, str(tmp_path / "whole"), format="csv").files
    assert 0 < whole.rows < lean.info["counts"]["tokens"] // 2
    for times, most in ((0.25, 8), (2, 1)):
        size = int(whole.bytes * times)
        done = afn_ray.export(lean, str(tmp_path / str(times)), format="csv", file_bytes=size)
        assert len(done.files) <= most and done.num_rows == whole.rows


def test_the_card_and_the_command_say_which_rows_are_there_and_what_is_high(
    before: RunConfig, lean: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = "tokens: the run recorded only the rows of tokens of a sample of 20% of the documents"
    once = "tokens: without those of copies; 10 documents"
    frozen = "at or above Q3 of frozen thresholds, those of "
    for uri, words, other in ((lean.uri, sampled, once), (before.store, once, sampled)):
        target = tmp_path / Path(uri).name
        with pytest.raises(SystemExit):
            commands.main(["export", uri, str(target)])
        said = capsys.readouterr().err
        card = (target / "README.md").read_text("utf-8")
        assert f"note: {words}" in said and words in card
        assert ("A row is: one row per token of the corpus" in card) == (uri != lean.uri)
        assert other not in said + card
        assert (frozen in card) == (uri == lean.uri)
    assert "of the corpus" not in described("tokens", "high") + described("tokens", "sample:1%")
    afn_ray.export(lean, str(tmp_path / "d"), "documents")
    assert "tokens: " not in (tmp_path / "d" / "README.md").read_text("utf-8")


def test_a_notebook_shows_the_thresholds_that_decide_high(lean: Run) -> None:
    page = afn_ray.summarise(lean)._repr_html_()
    _, _, frozen = page.partition("Frozen thresholds, of ")
    shown = frozen.partition("</table>")[0]
    for (q3,) in lean.sql("SELECT q3 FROM labels WHERE population = 'tokens'").fetchall():
        assert f"{q3:.6g}" in shown
    (own,) = lean.sql(
        "SELECT q3 FROM thresholds WHERE layer = 2 AND population = 'tokens'"
    ).fetchall()
    assert f"{own[0]:.6g}" not in shown and "Thresholds (a token" not in page


def test_no_kept_column_has_the_comment_of_another(lean: Run, tmp_path: Path) -> None:
    for table in ("tokens", "documents"):
        target = tmp_path / table
        done = afn_ray.export(lean, str(target), table)
        schema = pq.read_schema(target / "data" / done.files[0].name)
        comments = json.loads(schema.metadata[b"afn.columns"])
        assert {"tag", "strength_9"} <= {*schema.names} - {*comments}, table
        assert "doc_id" in comments
