"""The model card says what the rows of a run give, in 80 columns."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

import afn_ray
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import StoreError
from afn_ray.show import card_tables
from afn_ray.show.card import Card, card_of, to_json
from afn_ray.store import manifest
from conftest import config_of, edit_table, write_jsonl

LAYERS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> RunConfig:
    """A run of every layer with the figures that a card has."""
    folder = tmp_path_factory.mktemp("card")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": text} for text in verses[:40]])
    config = config_of(
        tiny_bert,
        corpus,
        folder / "store",
        layers="all",
        signals="trimmed,centred_mean",
        mean_vectors=20,
        sink_factor=1.05,
        shard_bytes=2048,
    )
    afn_ray.run(config).close()
    return config


@pytest.fixture(scope="module")
def card(made: RunConfig) -> Card:
    return card_of(manifest.find_run(made.store))


@pytest.mark.parametrize(
    ("table", "column"), [("thresholds", "sd"), ("thresholds", "mean"), ("signals", "sd")]
)
def test_a_figure_that_is_null_beside_tokens_is_damage(
    made: RunConfig, tmp_path: Path, table: str, column: str
) -> None:
    """A zero in its place would be a figure that nobody measured."""
    shutil.copytree(made.store, tmp_path / "store")
    run = manifest.find_run(str(tmp_path / "store"))

    def without(rows: pa.Table) -> pa.Table:
        at = rows.schema.get_field_index(column)
        nulls = pa.nulls(len(rows), rows.schema.field(at).type)
        return rows.set_column(at, column, nulls)

    edit_table(run.uri, table, without)
    with pytest.raises(StoreError, match="damaged"):
        card_of(manifest.find_run(str(tmp_path / "store")))


def _shown(card: Card, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    card_tables.render(card, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_figures_of_each_layer_are_those_of_the_rows(made: RunConfig, card: Card) -> None:
    assert tuple(layer.layer for layer in card.layers) == LAYERS
    with afn_ray.open_run(made.store) as run:
        for layer in card.layers:
            k = layer.layer
            rows = run.sql(
                f"SELECT strength_{k} AS s, strength_trimmed_{k} AS t, is_special FROM tokens"
            ).to_arrow_table()
            is_special = rows["is_special"].to_numpy()
            s, t = (rows[name].to_numpy().astype(np.float64)[~is_special] for name in ("s", "t"))
            median = np.quantile(s, 0.5, method="inverted_cdf")
            assert (layer.n, layer.median, layer.max) == (len(s), median, s.max())
            assert layer.special_max == rows["s"].to_numpy()[is_special].max()
            assert layer.n_sinks == (s > 1.05 * median).sum()
            assert layer.cv == pytest.approx(s.std() / s.mean(), rel=1e-9)
            share = 1 - (t**2).sum() / (s**2).sum()
            assert layer.outlier_share == pytest.approx(share, rel=1e-6) and share > 3 / 32
            assert list(layer.outlier_dimensions) == run.info["measure"]["outliers"][k]
            distances = run.sql(
                f"SELECT quantile_disc(x, 0.5), stddev_pop(x) / avg(x), max(x) "
                f"FROM (SELECT strength_centred_mean_{k}::DOUBLE AS x FROM tokens WHERE "
                "NOT is_special)"
            ).fetchall()
            assert layer.centred == pytest.approx(distances[0], rel=1e-9)
            (row,) = run.sql(
                "SELECT sum(n * squared_mean) / sum(n * second_moment), "
                "sum(n * variance) / sum(n * second_moment), sum(n * second_moment) "
                f"FROM moments WHERE layer = {k}"
            ).fetchall()
            vectors = run.sql(f"SELECT n, mean FROM mean_vectors WHERE layer = {k}").fetchall()
            total = sum(n * np.array(mean) for n, mean in vectors)
            common = total @ total / sum(n for n, _ in vectors) / row[2]
            assert layer.moment_shares is not None
            wanted = (common, row[0] - common, row[1])
            assert layer.moment_shares == pytest.approx(wanted, rel=1e-6, abs=1e-6)
            assert sum(layer.moment_shares) == pytest.approx(1, abs=1e-4)
            high = run.sql(
                f"SELECT class, n_high / n FROM classes WHERE layer = {k} AND class <> 'special'"
            ).fetchall()
            assert {c.name: c.share for c in layer.classes} == pytest.approx(dict(high))
        assert any(layer.n_sinks for layer in card.layers)
        assert card.tokens == run.sql("SELECT count(*) FROM tokens").fetchall()[0][0]


def test_the_card_fits_into_80_columns_with_a_row_for_each_layer(card: Card) -> None:
    shown = _shown(card)
    shown_run = replace(card, run="s3://bucket/run", corpus=("s3://bucket/texts",))
    assert max(map(len, _shown(shown_run).splitlines())) <= 80
    for table in (
        "Strength by layer",
        "Strength without",
        "Second moment of",
        "Share that is HIGH, by class",
    ):
        rows = shown.partition(table)[2]
        assert all(re.search(rf"^ *{layer} +[0-9–]", rows, re.M) for layer in LAYERS), table
    assert "the 3 largest dimensions" in shown and "over 1.05 medians" in " ".join(shown.split())
    layers = [replace(x, outlier_share=None, moment_shares=None) for x in card.layers]
    without = _shown(replace(card, layers=tuple(layers)))
    assert "--signals trimmed" in without and "--mean-vectors" in without


def test_a_card_of_many_hostile_tags_shows_the_frequent_ones_and_no_control_character(
    card: Card,
) -> None:
    layers = []
    for layer in card.layers:
        (first, *_) = layer.classes
        tags = [replace(first, name=f"\x1b[31m[/b]TAG{i:02}", n=100 + i) for i in range(40)]
        layers.append(replace(layer, classes=tuple(tags)))
    shown = _shown(replace(card, layers=tuple(layers), corpus=("/data/[b]\x1b]0;x",)))
    assert "\x1b" not in shown and "rarer ones: --json" in shown
    table = shown.partition("Share that is HIGH")[2].partition("rarer ones")[0]
    assert max(map(len, table.splitlines())) <= 80


def test_the_command_prints_the_card_or_its_json(
    made: RunConfig, card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["show", made.store, "--card", "--json"], ["show", made.store, "--card"]):
        with pytest.raises(SystemExit, match="0"):
            commands.main(words)
    found, end = json.JSONDecoder().raw_decode(shown := capsys.readouterr().out)
    assert found == json.loads(json.dumps(to_json(card)))
    assert "Model card of" in shown[end:]
