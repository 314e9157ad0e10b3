"""Every figure of the claims against scipy and numpy on the raw tokens, its interval against a slow
bootstrap, and what masking changes against plain Hugging Face.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import SplineTransformer

import afn_ray
from afn_ray.analysis import bootstrap, claims, claims_text, explained, masking, token_pass
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, QueryError
from afn_ray.reduce.smooth import RIDGE, SEGMENTS
from afn_ray.show import claim_charts
from conftest import config_of, write_jsonl

By = dict[tuple[str, str, int | None], bootstrap.Figure]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> str:
    folder = tmp_path_factory.mktemp("claims")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": t} for t in verses[:120]])
    config = config_of(
        tiny_bert,
        corpus,
        folder / "store",
        layers="0,1,3",
        signals="attention,shift,trimmed",
        sink_factor=1.04,
    )
    afn_ray.run(config).close()
    return config.store


@pytest.fixture(scope="module")
def rows(store: str) -> dict[str, Any]:
    """Every token that is not special, its class and idf, by column."""
    with afn_ray.open_run(store) as run:
        table = run.sql(
            "SELECT t.*, class, idf, v.n AS n_type, d.n_tokens AS length FROM tokens t JOIN "
            "vocabulary v "
            "ON t.token_id = v.token_id AND v.layer = 3 AND v.class <> 'special' JOIN documents d "
            "USING (doc) "
            "WHERE NOT is_special ORDER BY doc, position"
        ).to_arrow_table()
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def by_name(figures: Sequence[bootstrap.Figure]) -> By:
    found = {(f.what, f.of, f.layer): f for f in figures}
    assert len(found) == len(figures)
    return found


@pytest.fixture(scope="module")
def found(store: str) -> claims.Claims:
    with afn_ray.open_run(store) as run:
        return claims.claims(run)


@pytest.fixture(scope="module")
def figures(found: claims.Claims) -> By:
    assert claims.NO_ATTENTION not in found.notes
    assert {f.claim for f in found.figures} == claims.CLAIMS.keys() - {"masking", "tags"}
    return by_name(found.figures)


VARIABLES = {
    "strength": "strength_3",
    "attention received": "attention_3",
    "norm-weighted attention": "attention_norm_3",
    "rarity (idf)": "idf",
}


def auc(values: Any, rows: dict[str, Any]) -> float:
    content, others = (
        rows["class"] == "content",
        np.isin(rows["class"], ["function", "punctuation"]),
    )
    wins = stats.mannwhitneyu(values[content], values[others]).statistic
    return float(wins / (content.sum() * others.sum()))


@pytest.mark.parametrize("name", VARIABLES)
def test_the_auc_of_classes_equals_the_slow_one(
    name: str, figures: By, rows: dict[str, Any]
) -> None:
    values = rows[VARIABLES[name]].astype(np.float64)
    layer = None if name == "rarity (idf)" else 3
    expected = auc(values, rows)
    got = figures[claims.AUC, name, layer]
    assert got.value == pytest.approx(expected, rel=1e-12) and got.low < expected < got.high
    assert got.n == np.isin(rows["class"], token_pass.KINDS).sum() and got.n_docs == len(
        set(rows["doc"].tolist())
    )
    assert got.is_control == (name != "strength")
    high = values >= np.quantile(values, 0.75, method="inverted_cdf")
    for kind in token_pass.KINDS:
        share = figures[f"share of {kind} that is HIGH", name, layer]
        of_kind = rows["class"] == kind
        assert share.value == pytest.approx(high[of_kind].mean(), rel=1e-12)
        assert share.n == of_kind.sum()
        assert share.low <= share.value <= share.high and share.is_control == got.is_control
    assert figures[claims.AUC, "strength", 0].is_control


def test_shift_and_what_layers_have_in_common(figures: By, rows: dict[str, Any]) -> None:
    high = {k: rows[f"high_{k}"].astype(bool) for k in (0, 1, 3)}
    shift = rows["shift_3"].astype(np.float64)
    what = "share that HIGH tokens hold"
    of_shift, of_tokens = shift[high[3]].sum() / shift.sum(), high[3].mean()
    assert figures[what, "of the shift", 3].value == pytest.approx(of_shift)
    assert figures[what, "of the tokens", 3].value == pytest.approx(of_tokens)
    assert figures[what, "the difference", 3].value == pytest.approx(of_shift - of_tokens)
    what = "HIGH tokens in common (Jaccard)"
    assert figures[what, "with layer 1", 3].value == pytest.approx(
        (high[1] & high[3]).sum() / (high[1] | high[3]).sum()
    )
    chance = figures[what, "with layer 1, by chance", 3]
    a, b = high[1].mean(), high[3].mean()
    assert (
        chance.is_control
        and chance.value == pytest.approx(a * b / (a + b - a * b))
        and math.isnan(chance.low)
    )


def paired_auc_differences(rows: dict[str, Any], k: int) -> list[float]:
    """Differences of the AUC at layer ``k`` from that at layer 0, over 1,000 slow samples of the
    same documents.
    """
    dice, documents = (
        np.random.default_rng(1),
        [np.flatnonzero(rows["doc"] == d) for d in np.unique(rows["doc"])],
    )
    found = []
    for _ in range(1000):
        at = np.concatenate(
            [documents[i] for i in dice.integers(0, len(documents), len(documents))]
        )
        drawn = {name: rows[name][at] for name in ("class", f"strength_{k}", "strength_0")}
        found.append(auc(drawn[f"strength_{k}"], drawn) - auc(drawn["strength_0"], drawn))
    return found


def test_which_layer_separates_best(
    found: claims.Claims, figures: By, rows: dict[str, Any]
) -> None:
    aucs = {k: auc(rows[f"strength_{k}"], rows) for k in (0, 1, 3)}
    what = f"{claims.AUC}, less that of layer 0"
    for k in (1, 3):
        got = figures[what, "strength", k]
        assert got.value == pytest.approx(aucs[k] - aucs[0]) and got.low < got.value < got.high
    slow = np.quantile(
        paired_auc_differences(rows, 3), [0.025, 0.975]
    )  # unpaired it would be a quarter wider
    assert got.high - got.low == pytest.approx(slow[1] - slow[0], rel=0.12)
    ordered = [f.layer for f in found.figures if f.what.startswith("share of bootstrap samples")]
    assert ordered == sorted(aucs, key=lambda k: -aucs[k])
    shares = [f.value for f in found.figures if f.what.startswith("share of bootstrap samples")]
    assert sum(shares) == pytest.approx(1) and shares[0] == max(shares)


def test_types_ranks_dimensions_and_sinks(figures: By, rows: dict[str, Any]) -> None:
    ours = np.isin(rows["class"], token_pass.KINDS)
    content = (rows["class"] == "content")[ours]
    for k in (0, 1, 3):
        strength = rows[f"strength_{k}"].astype(np.float64)
        means = {t: strength[rows["token_id"] == t].mean() for t in set(rows["token_id"].tolist())}
        of_type = np.array([means[t] for t in rows["token_id"].tolist()])
        what = "share of the variance that is between groups (eta squared)"
        assert figures[what, "a group for each type", k].value == pytest.approx(
            of_type.var() / strength.var(), rel=1e-9
        )
        chance = figures[what, "as many groups by chance", k]
        assert (
            chance.value == pytest.approx((len(means) - 1) / (len(strength) - 1))
            and chance.is_control
        )
        for name, column in (
            ("log frequency", "n_type"),
            ("position", "position"),
            ("document length", "length"),
        ):
            rho = figures["Spearman's rho with strength", name, k]
            other = rows[column].astype(np.float64)
            assert rho.value == pytest.approx(stats.spearmanr(strength, other).statistic, abs=1e-9)
            assert rho.low < rho.value < rho.high
        x, f = (stats.rankdata(v)[ours] for v in (strength, rows["n_type"]))
        what = "rank correlation of strength with being content, not function or punctuation"
        assert figures[what, "as it is", k].value == pytest.approx(
            np.corrcoef(x, content)[0, 1], abs=1e-9
        )
        of_x, of_c = (
            v - np.polyval(np.polyfit(f, v, 1), f) for v in (x, content)
        )  # what frequency leaves
        at_one = figures[what, "at one frequency (partial)", k]
        assert at_one.value == pytest.approx(np.corrcoef(of_x, of_c)[0, 1], abs=1e-9)
        trimmed = rows[f"strength_trimmed_{k}"].astype(np.float64)
        share = figures["share of the squared norm in 3 dimensions", "the largest", k]
        assert share.value == pytest.approx(1 - (trimmed**2).sum() / (strength**2).sum(), rel=1e-9)
        still = trimmed >= np.quantile(trimmed, 0.75, method="inverted_cdf")
        high = rows[f"high_{k}"].astype(bool)
        common = figures["HIGH tokens in common (Jaccard)", "with and without these", k]
        assert common.value == pytest.approx((still & high).sum() / (still | high).sum())
        sinks = rows[f"sink_{k}"].astype(bool)
        assert figures["share of the tokens", "sinks", k].value == pytest.approx(sinks.mean())
        over = figures["strength with sinks over strength without", "mean", k]
        assert over.value == pytest.approx(strength.mean() / strength[~sinks].mean())
        medians = [np.quantile(v, 0.5, method="inverted_cdf") for v in (strength, strength[~sinks])]
        over = figures["strength with sinks over strength without", "median, of the whole run", k]
        assert over.value == pytest.approx(medians[0] / medians[1])
    assert max(figures["share of the tokens", "sinks", k].value for k in (0, 1, 3)) > 0


def deviance_explained(x: Any, high: Any) -> float:
    """McFadden's share for scikit-learn's splines and optimiser, over single tokens."""
    design = SplineTransformer(n_knots=SEGMENTS + 1).fit_transform(x)
    model = LogisticRegression(C=1 / RIDGE, max_iter=5000, tol=1e-8).fit(design, high)
    of_model = metrics.log_loss(high, model.predict_proba(design)[:, 1])
    return float(1 - of_model / metrics.log_loss(high, np.full(len(high), high.mean())))


def test_what_the_controls_explain_is_what_scikit_learn_says(
    figures: By, rows: dict[str, Any]
) -> None:
    place = np.minimum(9, np.log2(rows["position"] + 1).astype(int))
    length = np.minimum(9, np.log2(rows["length"]).astype(int))
    x = np.stack([np.log2(rows["n_type"]), place, length], axis=1).astype(np.float64)
    for name, which in explained.MODELS.items():
        for k in (0, 3):
            high = rows[f"high_{k}"].astype(bool)
            got = figures[claims.EXPLAINED, name, k]
            assert got.value == pytest.approx(deviance_explained(x[:, which], high), abs=0.003)
            assert got.low < got.value < got.high and got.n == len(high)


@pytest.mark.parametrize("name", ["attention received", "norm-weighted attention"])
def test_agreement_with_attention_at_every_layer(
    name: str, figures: By, rows: dict[str, Any]
) -> None:
    signal = VARIABLES[name].removesuffix("_3")
    for k in (0, 1, 3):
        if (rival := rows.get(f"{signal}_{k}")) is None:
            assert k == 0  # the embeddings have no attention
            continue
        strength, high = rows[f"strength_{k}"], rows[f"high_{k}"].astype(bool)
        rho = figures["rank correlation with strength (Spearman)", name, k]
        assert rho.value == pytest.approx(stats.spearmanr(strength, rival).statistic, abs=1e-9)
        of_rival = rival >= np.quantile(rival, 0.75, method="inverted_cdf")
        what = "HIGH tokens in common with strength (Jaccard)"
        common = figures[what, name, k]
        assert common.value == pytest.approx((of_rival & high).sum() / (of_rival | high).sum())
        assert common.low < common.value < common.high and not common.is_control
        a, b = of_rival.mean(), high.mean()
        chance = figures[what, f"{name}, by chance", k]
        assert chance.is_control and chance.value == pytest.approx(a * b / (a + b - a * b))
        ranks = (stats.rankdata(rival) - 0.5) / len(rival)
        bins = np.minimum(token_pass.BINS - 1, (ranks * token_pass.BINS).astype(int))
        share = figures[claims.EXPLAINED, name, k]
        assert share.value == pytest.approx(
            deviance_explained(bins[:, None].astype(float), high), abs=0.003
        )


def test_without_attention_the_flag_is_named(tmp_path: Path, tiny_bert: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "in the beginning was the word"}] * 3)
    with afn_ray.run(config_of(tiny_bert, corpus, tmp_path / "store", screen=0)) as run:
        found = claims.claims(run)
    assert claims.NO_ATTENTION in found.notes and "--signals attention" in claims.NO_ATTENTION
    assert not [f for f in found.figures if f.claim == "attention"]


def test_intervals_are_those_of_drawing_documents(figures: By, rows: dict[str, Any]) -> None:
    """A slow bootstrap, with draws of its own, gives nearly the same interval; one over tokens
    would be narrower.
    """
    dice = np.random.default_rng(7)
    docs = np.unique(rows["doc"])
    high, content = rows["high_3"].astype(bool), rows["class"] == "content"
    by_doc = [
        (high[(rows["doc"] == d) & content].sum(), ((rows["doc"] == d) & content).sum())
        for d in docs
    ]
    sums = np.array(by_doc, np.float64)
    drawn = [sums[dice.integers(0, len(docs), len(docs))].sum(axis=0) for _ in range(2000)]
    low, high_end = np.quantile([s[0] / s[1] for s in drawn], [0.025, 0.975])
    got = figures["share of content that is HIGH", "strength", 3]
    width = high_end - low
    assert abs(got.low - low) < 0.15 * width and abs(got.high - high_end) < 0.15 * width


def test_the_same_run_has_the_same_figures(store: str, found: claims.Claims) -> None:
    with afn_ray.open_run(store) as run:
        again = claims.claims(run)
    pairs = zip(found.figures, again.figures, strict=True)
    assert all(repr(a) == repr(b) for a, b in pairs) and found.notes == again.notes


def test_a_large_run_is_read_by_a_sample(
    store: str, rows: dict[str, Any], figures: By, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "GROUPS", 20)
    with afn_ray.open_run(store) as run:
        few = claims.claims(run, max_tokens=len(rows["doc"]) // 3)
        ((docs,),) = run.sql("SELECT list(doc) FROM documents WHERE hash(doc) % 4 = 0").fetchall()
        with pytest.raises(QueryError, match="more than 0 s"):
            claims.claims(run, max_s=0)
    there = np.isin(rows["doc"], docs)
    got = by_name(few.figures)["share of content that is HIGH", "strength", 3]
    of_kind = there & (rows["class"] == "content")
    assert (got.n, got.n_docs) == (of_kind.sum(), len(docs)) and 20 < len(docs) < 60
    assert got.value == pytest.approx(rows["high_3"][of_kind].mean())
    whole = figures["share of content that is HIGH", "strength", 3]
    assert got.high - got.low > whole.high - whole.low
    assert few.notes[0].startswith(
        f"{there.sum():,} tokens of {len(docs)} documents, one in 4 of 120"
    ) and ("in 20 groups" in few.notes[0])


def test_one_document_has_no_intervals_and_few_are_told(
    tmp_path: Path, tiny_bert: Path, verses: list[str], store: str
) -> None:
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n".join(verses[:20]))
    config = RunConfig(
        corpus=(str(corpus),),
        model=str(tiny_bert),
        store=str(tmp_path / "store"),
        executor="inline",
        layers="0,2",
        dtype="float32",
        screen=0,
    )
    with afn_ray.run(config) as run:
        one = claims.claims(run, max_tokens=100)
    assert one.figures and all(math.isnan(f.low) for f in one.figures)
    assert not any(
        "rarity" in f.of or "bootstrap samples" in f.what for f in one.figures
    )  # every idf is the same
    assert (
        "Intervals want 500 documents" in one.notes[1] and "there are no intervals" in one.notes[2]
    )
    with afn_ray.open_run(store) as run:
        assert not [n for n in claims.claims(run).notes if "few documents" in n or "want 500" in n]


def test_frozen_labels_change_no_claim(
    store: str, figures: By, tmp_path: Path, tiny_bert: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "of the and in of the"}\n')
    config = config_of(
        tiny_bert, other, tmp_path / "other", layers="0,1,3", sink_factor=1.04, screen=0
    )
    base = afn_ray.run(config).uri
    corpus = (str(Path(store).parent / "c.jsonl"),)
    frozen = replace(config, corpus=corpus, store=str(tmp_path / "frozen"), thresholds=base)
    with afn_ray.run(frozen) as run:
        ((by_labels,),) = run.sql("SELECT avg(high_3::INT) FROM tokens").fetchall()
        found = by_name(claims.claims(run).figures)
    assert abs(by_labels - 0.25) > 0.01
    what = "share of content that is HIGH"
    assert found[what, "strength", 3].value == figures[what, "strength", 3].value


def test_a_page_draws_every_figure_of_the_layer_and_lists_those_of_all(
    found: claims.Claims,
) -> None:
    drawn = claim_charts.claims_charts(found, 3)
    assert [question for question, *_ in drawn] == [
        said for claim, said in claims.CLAIMS.items() if claim not in ("masking", "tags")
    ]
    every = [chart for *_, group in drawn for chart in group]
    assert (
        len({chart.name for chart in every})
        == len(every)
        == len({(f.claim, f.what) for f in found.figures})
    )
    assert sum(len(chart.table.rows) for chart in every) == len(found.figures)
    (auc_chart,) = (c for c in every if c.title == claims.AUC)
    rows = {v["row"]: v for v in auc_chart.spec["data"]["values"]}
    assert rows.keys() == {
        "strength, layer 0",
        "strength, layer 3",
        "rarity (idf)",
        "attention received, layer 3",
        "norm-weighted attention, layer 3",
    }
    assert (
        rows["strength, layer 3"]["kind"] == "figure"
        and rows["strength, layer 0"]["kind"] == "control"
    )


def test_a_run_of_strength_alone_has_the_claims_that_need_no_more(
    tmp_path: Path, tiny_bert: Path, verses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:9]])
    config = RunConfig(
        corpus=(str(corpus),),
        model=str(tiny_bert),
        store=str(tmp_path / "store"),
        executor="inline",
        layers="2",
        dtype="float32",
    )
    afn_ray.run(config).close()
    corpus.unlink()  # what is masked was recorded
    with pytest.raises(SystemExit) as left:
        commands.main(["claims", config.store, "--json", "--masking", "--sample", "5"])
    assert left.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    found = answer["figures"]
    assert (
        {f["claim"] for f in found}
        == {"classes", "types", "frequency", "sinks", "masking"}
        < answer["claims"].keys()
    )
    assert all(f["low"] is None or f["low"] <= f["high"] for f in found)
    assert {f["n_docs"] for f in found if f["of"] == "HIGH tokens masked"} == {5}
    assert "became [MASK]" in answer["notes"][-1]
    with pytest.raises(SystemExit):
        commands.main(["claims", config.store])
    said = capsys.readouterr().out
    assert "Are content words HIGH more often than function words and punctuation?" in said
    assert "(control)" in said and "95 % interval" in said and ", layer 2, " in said


def _figure(
    of: str, layer: int | None, value: float, half: float = math.nan, control: bool = False
) -> bootstrap.Figure:
    return bootstrap.Figure(
        "classes", claims.AUC, of, layer, value, value - half, value + half, 99, 9, control
    )


def test_the_line_under_a_question_names_the_controls_that_equal_or_beat_its_figure() -> None:
    main = [_figure("strength", 2, 0.4, 0.01), _figure("strength", 4, 0.8, 0.01)]
    controls = [
        _figure("strength", 0, 0.9, 0.01, True),
        _figure("rarity (idf)", None, 0.81, 0.005, True),
        _figure("attention received", 4, 0.5, 0.01, True),
        _figure("attention received", 2, 0.99, 0.001, True),
    ]
    assert claims_text.against_controls([*main, *controls]) == (
        "AUC of content against function words and punctuation: strength, layer 4, 0.800. Beaten "
        "by: strength, layer 0, 0.900. Equalled by: rarity (idf), 0.810."
    )
    assert claims_text.against_controls([*main, *controls[2:]]).endswith(
        "0.800. No control reaches it; the nearest: attention received, layer 4, 0.500."
    )
    assert claims_text.against_controls(main) == claims_text.against_controls(controls) == ""
    nan = _figure("strength", 4, math.nan)
    assert claims_text.against_controls([nan, *controls]) == claims_text.against_controls([]) == ""


def _correlation(of: str, value: float, half: float, control: bool = False) -> bootstrap.Figure:
    what = "rank correlation of strength with being content, not function or punctuation"
    low, high = value - half, value + half
    return bootstrap.Figure("frequency", what, of, 4, value, low, high, 99, 9, control)


def test_a_reversed_correlation_is_beaten_by_what_is_further_below_0() -> None:
    """Less negative is weaker, and the other sign is no support at all."""
    main = _correlation("as it is", -0.3, 0.02)
    said = {
        name: claims_text.against_controls([main, _correlation(name, value, 0.02, True)])
        for name, value in (("weaker", -0.1), ("stronger", -0.5), ("equal", -0.29), ("other", 0.6))
    }
    begin = (
        "Rank correlation of strength with being content, not function or punctuation: as it is, "
        "layer 4, -0.300. It is reversed, below the 0 of chance. "
    )
    assert said == {
        "weaker": f"{begin}No control reaches it; the nearest: weaker, layer 4, -0.100.",
        "stronger": f"{begin}Beaten by: stronger, layer 4, -0.500.",
        "equal": f"{begin}Equalled by: equal, layer 4, -0.290.",
        "other": f"{begin}No control reaches it; the nearest: other, layer 4, 0.600.",
    }


def test_a_correlation_that_may_be_0_is_not_called_reversed() -> None:
    figures = [_correlation("as it is", -0.01, 0.02), _correlation("partial", 0.3, 0.02, True)]
    found = claims_text.against_controls(figures)
    assert "reversed" not in found and "Its interval contains the 0 of chance." in found


def test_an_auc_below_chance_is_beaten_by_a_lower_one() -> None:
    main = _figure("strength", 4, 0.3, 0.01)
    weaker, stronger = (
        _figure("strength", 0, 0.45, 0.01, True),
        _figure("rarity (idf)", None, 0.1, 0.01, True),
    )
    found = claims_text.against_controls([main, weaker, stronger])
    assert found.endswith(
        "strength, layer 4, 0.300. It is reversed, below the 0.5 of chance. Beaten by: rarity "
        "(idf), 0.100."
    )


def test_what_rounding_leaves_of_0_has_no_sign() -> None:
    assert [claims_text.shown(x) for x in (-2e-16, 3e-15, -0.0, -0.0004, -0.25)] == [
        "0.000",
        "0.000",
        "0.000",
        "-4.0e-04",
        "-0.250",
    ]


def test_a_tag_is_held_against_itself_at_layer_0() -> None:
    figures = [
        bootstrap.Figure(
            "tags", "share that is HIGH", name, layer, value, value, value, 9, 9, layer == 0
        )
        for name, layer, value in (
            ("DET", 0, 0.1),
            ("NOUN", 0, 0.6),
            ("DET", 4, 0.2),
            ("NOUN", 4, 0.5),
        )
    ]
    assert (
        claims_text.against_controls(figures)
        == "Share that is HIGH: NOUN, layer 4, 0.500. Beaten by: NOUN, layer 0, 0.600."
    )


def test_claims_fit_80_columns(found: claims.Claims) -> None:
    out = io.StringIO()
    claims_text.render(found, Console(file=out, width=80, highlight=False))
    said = out.getvalue()
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said
    for figure in found.figures:  # no figure is split over two lines
        if not math.isnan(figure.low):
            assert f"{claims_text.shown(figure.low)} to {claims_text.shown(figure.high)}" in said


# --- masking
# ---------------------------------------------------------------------------------------------


def test_masking_equals_plain_hugging_face(store: str, tiny_bert: Path) -> None:
    """Every document, those that need windows by their first one."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(tiny_bert, attn_implementation="eager").eval()
    mask, sep = (
        transformers.AutoTokenizer.from_pretrained(tiny_bert).convert_tokens_to_ids(t)
        for t in ("[MASK]", "[SEP]")
    )

    def outputs(variants: list[Any]) -> Any:
        with torch.inference_mode():
            return (
                model(torch.tensor(np.stack(variants)), output_hidden_states=True)
                .hidden_states[3]
                .double()
                .numpy()
            )

    with afn_ray.open_run(store) as run:
        figures, note = masking.check(run, num_documents=120)
        table = run.sql(
            "SELECT doc, token_id, is_special, coalesce(high_3, false), coalesce(sink_3, false), "
            "class FROM tokens "
            "LEFT JOIN (FROM vocabulary WHERE layer = 3 AND class <> 'special') USING (token_id) "
            "ORDER BY doc, position"
        ).fetchall()
    changes: dict[str, list[Any]] = {kind: [] for kind in masking.KINDS}
    num_cut = 0
    for doc in sorted({r[0] for r in table}):
        ids, special, high, sinks, classes = (
            np.array([r[i] for r in table if r[0] == doc]) for i in range(1, 6)
        )
        if len(ids) > 64:
            num_cut += 1
            ids, special, high, sinks, classes = (
                c[:64].copy() for c in (ids, special, high, sinks, classes)
            )
            ids[-1], special[-1] = sep, True
        free, content = ~special & ~sinks, classes == "content"
        chosen = masking.choose(masking.MaskedText(doc, ids, free, high, content))
        masked = [ids.copy() for _ in chosen]
        for variant, at in zip(masked, chosen.values(), strict=True):
            variant[at] = mask
        before, *after = outputs([ids, *masked])
        for (kind, at), state in zip(chosen.items(), after, strict=True):
            assert (
                len(set(at.tolist()))
                == len(at)
                == len(chosen[kind.replace("LOW", "HIGH").replace("random", "HIGH")])
            )
            assert free[at].all() and len(at) <= max(1, 0.15 * free.sum())
            assert kind == "random" or (high[at] == kind.startswith("HIGH")).all()
            assert "content" not in kind or content[at].all()
            rest = free.copy()
            rest[at] = False
            a, b = before[rest], state[rest]
            cosine = a.mean(0) @ b.mean(0) / np.linalg.norm(a.mean(0)) / np.linalg.norm(b.mean(0))
            changes[kind].append((1 - cosine, np.linalg.norm(b - a) / np.linalg.norm(a), len(at)))
    assert num_cut > 1 and all(len(c) > 20 for c in changes.values())
    found = by_name(figures)
    for place, what in enumerate(masking.CHANGES):
        means = {kind: np.mean([c[place] for c in of_kind]) for kind, of_kind in changes.items()}
        for kind, of_kind in changes.items():
            got = found[what, f"{kind} tokens masked", 3]
            assert (
                got.value == pytest.approx(means[kind], rel=2e-5, abs=1e-7)
                and got.low < got.value < got.high
            )
            assert (got.n, got.n_docs) == (sum(c[2] for c in of_kind), len(of_kind))
            assert got.is_control == (not kind.startswith("HIGH"))
        for a, b in masking.DIFFERENCES:
            assert found[what, f"{a} less {b}", 3].value == pytest.approx(
                means[a] - means[b], abs=2e-6
            )
    assert f"{len(changes['HIGH'])} documents of the run" in note and "output of block 3" in note


def test_a_decoder_has_no_mask_and_something_stands_in(
    tmp_path: Path, tiny_gpt: Path, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:6]])
    config = RunConfig(
        corpus=(str(corpus),),
        model=str(tiny_gpt),
        store=str(tmp_path / "store"),
        executor="inline",
        layers="2",
        dtype="float32",
        sink_factor=2.0,
    )
    with afn_ray.run(config) as run:
        figures, note = masking.check(run, num_documents=6)
        assert "became <|endoftext|>" in note and all(
            f.value > 0 for f in figures if f.of.endswith("masked")
        )
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(ConfigError, match="nothing to put for a token"),
        ):
            patch.setattr(masking, "STAND_INS", ("[MASK]",))
            masking.check(run, num_documents=6)
