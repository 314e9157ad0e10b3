"""Every figure of the claims against scipy and numpy on the raw tokens, and its interval against a slow bootstrap."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl
from scipy import stats

import afn_ray
from afn_ray import claims, cli
from afn_ray.config import RunConfig


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> str:
    folder = tmp_path_factory.mktemp("claims")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": t} for t in verses[:120]])
    config = RunConfig(
        corpus=(str(corpus),), model=str(tiny_bert), store=str(folder / "store"), executor="inline", layers="0,1,3",
        signals="attention,shift,trimmed", dtype="float32", batch_tokens=256, sink_factor=1.1,
    )  # fmt: skip
    afn_ray.run(config).close()
    return config.store


@pytest.fixture(scope="module")
def rows(store: str) -> dict[str, Any]:
    """Every token that is not special, its class and idf, by column."""
    with afn_ray.open_run(store) as run:
        table = run.sql(
            "SELECT t.*, class, idf, v.n AS n_type, d.n_tokens AS length FROM tokens t JOIN vocabulary v "
            "ON t.token_id = v.token_id AND v.layer = 3 AND v.class <> 'special' JOIN documents d USING (doc) "
            "WHERE NOT is_special ORDER BY doc, position"
        ).to_arrow_table()
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


@pytest.fixture(scope="module")
def figures(store: str) -> dict[tuple[str, int | None], claims.Figure]:
    with afn_ray.open_run(store) as run:
        found = claims.claims(run)
    assert {f.claim for f in found} == claims.CLAIMS.keys()
    by_name = {(f.what, f.layer): f for f in found}
    assert len(by_name) == len(found)
    return by_name


VARIABLES = {
    "strength": "strength_3", "attention received": "attention_3", "norm-weighted attention": "attention_norm_3",
    "rarity (idf)": "idf",
}  # fmt: skip


@pytest.mark.parametrize("name", VARIABLES)
def test_classes(name: str, figures: dict[Any, claims.Figure], rows: dict[str, Any]) -> None:
    values = rows[VARIABLES[name]].astype(np.float64)
    content, others = rows["class"] == "content", np.isin(rows["class"], ["function", "punctuation"])
    layer = None if name == "rarity (idf)" else 3
    auc = stats.mannwhitneyu(values[content], values[others]).statistic / (content.sum() * others.sum())
    got = figures[f"{name}: AUC of content against function words and punctuation", layer]
    assert got.value == pytest.approx(auc, rel=1e-12) and got.low < auc < got.high and got.n == (content | others).sum()
    assert got.is_control == (name != "strength")
    high = values >= np.quantile(values, 0.75, method="inverted_cdf")
    for kind in ("content", "function", "punctuation"):
        share = figures[f"{name}: {kind} at or above its Q3", layer]
        of_kind = rows["class"] == kind
        assert (share.value, share.n) == (pytest.approx(high[of_kind].mean(), rel=1e-12), of_kind.sum())
        assert share.low <= share.value <= share.high


def test_shift_and_what_layers_have_in_common(figures: dict[Any, claims.Figure], rows: dict[str, Any]) -> None:
    high = {k: rows[f"high_{k}"].astype(bool) for k in (0, 1, 3)}
    shift = rows["shift_3"].astype(np.float64)
    assert figures["HIGH tokens' share of the shift", 3].value == pytest.approx(shift[high[3]].sum() / shift.sum())
    assert figures["HIGH tokens' share of the tokens", 3].value == pytest.approx(high[3].mean())
    common = figures["HIGH tokens in common with layer 1 (Jaccard)", 3]
    assert common.value == pytest.approx((high[1] & high[3]).sum() / (high[1] | high[3]).sum())
    chance = figures["the same of layer 1, if drawn by chance", 3]
    assert chance.is_control and chance.value == pytest.approx(1 / 7, abs=2e-3) and math.isnan(chance.low)


def test_types_ranks_dimensions_and_sinks(figures: dict[Any, claims.Figure], rows: dict[str, Any]) -> None:
    for k in (0, 1, 3):
        strength = rows[f"strength_{k}"].astype(np.float64)
        means = {t: strength[rows["token_id"] == t].mean() for t in set(rows["token_id"].tolist())}
        of_type = np.array([means[t] for t in rows["token_id"].tolist()])
        eta = figures["variance of strength between types (eta squared)", k]
        assert eta.value == pytest.approx(of_type.var() / strength.var(), rel=1e-9)
        for name, column in claims.RANKED.items():
            other = rows["n_type" if column == "n" else column].astype(np.float64)
            rho = figures[f"Spearman's rho of strength and {name}", k]
            assert rho.value == pytest.approx(stats.spearmanr(strength, other).statistic, abs=1e-9)
            assert rho.low < rho.value < rho.high
        trimmed = rows[f"strength_trimmed_{k}"].astype(np.float64)
        share = figures["share of the squared norm in the 3 largest dimensions", k]
        assert share.value == pytest.approx(1 - (trimmed**2).sum() / (strength**2).sum(), rel=1e-9)
        sinks = rows[f"sink_{k}"].astype(bool)
        assert figures["tokens that are sinks", k].value == pytest.approx(sinks.mean())
        over = figures["mean strength over the mean without sinks", k]
        assert over.value == pytest.approx(strength.mean() / strength[~sinks].mean())


def test_intervals_are_those_of_drawing_documents(figures: dict[Any, claims.Figure], rows: dict[str, Any]) -> None:
    """A slow bootstrap, with draws of its own, gives nearly the same interval; one over tokens would be narrower."""
    dice = np.random.default_rng(7)
    docs = np.unique(rows["doc"])
    high, content = rows["high_3"].astype(bool), rows["class"] == "content"
    by_doc = [(high[(rows["doc"] == d) & content].sum(), ((rows["doc"] == d) & content).sum()) for d in docs]
    sums = np.array(by_doc, np.float64)
    drawn = [sums[dice.integers(0, len(docs), len(docs))].sum(axis=0) for _ in range(2000)]
    low, high_end = np.quantile([s[0] / s[1] for s in drawn], [0.025, 0.975])
    got = figures["strength: content at or above its Q3", 3]
    width = high_end - low
    assert abs(got.low - low) < 0.15 * width and abs(got.high - high_end) < 0.15 * width


def test_a_run_of_strength_alone_has_the_claims_that_need_no_more(
    tmp_path: Path, tiny_bert: Path, verses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:9]])
    config = RunConfig(
        corpus=(str(corpus),), model=str(tiny_bert), store=str(tmp_path / "store"), executor="inline", layers="2",
        dtype="float32",
    )  # fmt: skip
    afn_ray.run(config).close()
    with pytest.raises(SystemExit) as left:
        cli.main(["claims", config.store, "--json"])
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert {f["claim"] for f in found} == {"classes", "types", "frequency", "sinks"}
    assert all(f["low"] is None or f["low"] <= f["high"] for f in found)
    with pytest.raises(SystemExit):
        cli.main(["claims", config.store])
    said = capsys.readouterr().out
    assert "Content words are HIGH more often" in said and "control" in said and "95 % interval" in said
