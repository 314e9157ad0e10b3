"""Groups against pandas, numpy and scipy over the recorded rows: thresholds, classes and drift."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.stats

import afn_ray
from afn_ray import kept
from afn_ray.analysis import verify
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError
from afn_ray.query import own_labels
from afn_ray.reduce import compare, groups, screen
from afn_ray.reduce.groups import OTHERS, partition_of
from afn_ray.reduce.histogram import BIN_BITS, Histogram, round_strengths, to_bins
from afn_ray.reduce.sources import Sources
from afn_ray.reduce.strangest import STRANGE_SCORE
from afn_ray.store import manifest
from afn_ray.store.checksums import entry_of
from conftest import config_of, write_jsonl

LANGUAGES = [f"g{i:02}" for i in range(30)]
DRIFTED = "g07"
LAYERS = (1, 2)


def rows_of(verses: list[str], drifted: bool) -> list[dict[str, Any]]:
    """Ten verses of each group, and three documents of none; one group shouts where it drifted."""
    rows: list[dict[str, Any]] = []
    for at, text in enumerate(verses[:300]):
        lang = LANGUAGES[at % 30]
        is_other = drifted and lang == DRIFTED
        rows.append({"text": "0 0 7 1 9 " * 12 if is_other else text, "lang": lang})
    return [
        *rows,
        {"text": verses[400]},
        {"text": verses[401], "lang": None},
        {"text": "", "lang": "g00"},
    ]


@pytest.fixture(scope="module")
def nights(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> tuple[RunConfig, str, str]:
    """The config of two runs of 30 groups, one of which drifts, and both runs."""
    folder = tmp_path_factory.mktemp("groups")
    (folder / "dt=2026-11-01").mkdir()
    uris = []
    for drifted in (False, True):
        rows = rows_of(verses, drifted)
        for part in range(3):
            write_jsonl(folder / "dt=2026-11-01" / f"{part}.jsonl", rows[part::3])
        config = config_of(
            tiny_bert,
            folder / "dt=2026-11-01",
            folder / "store",
            layers="1,2",
            shard_bytes=4096,
            keep_columns="lang",
            group_by="lang",
        )
        with afn_ray.run(config) as run:
            uris.append(run.uri)
    return config, uris[0], uris[1]


def tokens_of(uri: str) -> pd.DataFrame:
    """The recorded normal tokens with the group of their document and the class of their type."""
    with afn_ray.open_run(uri) as run:
        return run.sql(
            "SELECT t.doc, t.token_id, t.strength_1, t.strength_2, t.high_1, t.high_2, d.lang "
            'AS "group", '
            "c.class FROM tokens t JOIN documents d USING (doc) JOIN (SELECT token_id, class "
            "FROM vocabulary "
            "WHERE layer = 1 AND class <> 'special') c USING (token_id) WHERE NOT is_special"
        ).df()


def table(uri: str, query: str, baseline: str | None = None) -> list[dict[str, Any]]:
    with afn_ray.open_run(uri, baseline=baseline) as run:
        rows: list[dict[str, Any]] = run.sql(query).to_arrow_table().to_pylist()
    return rows


def by_group(frame: pd.DataFrame) -> dict[str | None, pd.DataFrame]:
    found = frame.groupby("group", dropna=False)
    return {None if pd.isna(name) else name: part for name, part in found}


def test_thresholds_of_each_group_are_those_of_its_recorded_rows(
    nights: tuple[RunConfig, str, str],
) -> None:
    frames = by_group(tokens_of(nights[2]))
    rows = table(nights[2], "FROM groups ORDER BY layer")
    assert len(rows) == 31 * len(LAYERS)
    for row in rows:
        frame, k = frames[row["group"]], row["layer"]
        strengths = frame[f"strength_{k}"].to_numpy()
        quartiles = np.quantile(strengths, [0.25, 0.5, 0.75], method="inverted_cdf")
        assert [row["q1"], row["q2"], row["q3"]] == quartiles.tolist()
        assert (row["n"], row["n_high"]) == (len(frame), int(frame[f"high_{k}"].sum()))
        assert row["n_docs"] == frame["doc"].nunique()
        assert row["n_documents"] == row["n_docs"] + (row["group"] == "g00")  # the empty one


def test_groups_add_up_to_the_run_whose_thresholds_stay_beside_them(
    nights: tuple[RunConfig, str, str],
) -> None:
    (found,) = table(
        nights[1],
        "SELECT sum(n)::BIGINT AS n, sum(n_high)::BIGINT AS n_high, "
        "sum(n_documents)::BIGINT AS docs "
        "FROM groups WHERE layer = 2",
    )
    (whole,) = table(nights[1], "FROM labels WHERE layer = 2 AND population = 'tokens'")
    (documents,) = table(nights[1], "SELECT count(*) AS n FROM documents")
    assert found == {"n": whole["n"], "n_high": whole["n_high"], "docs": documents["n"]}


def test_classes_of_each_group_are_those_of_its_tokens(nights: tuple[RunConfig, str, str]) -> None:
    frames = by_group(tokens_of(nights[2]))
    rows = table(nights[2], "FROM group_classes")
    for group, frame in frames.items():
        for k in LAYERS:
            here = [r for r in rows if (r["group"], r["layer"]) == (group, k)]
            expected = frame.groupby("class")[f"high_{k}"].agg(["size", "sum", "mean"])
            assert {r["class"]: (r["n"], r["n_high"]) for r in here} == {
                name: (row["size"], row["sum"]) for name, row in expected.iterrows()
            }
            for row in here:
                assert row["share"] == pytest.approx(row["n"] / len(frame))
                assert row["share_high_low"] <= row["share_high"] <= row["share_high_high"]


def psi_of(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The index by pandas: bins that end at the deciles of ``a``."""
    ends = np.unique(np.quantile(a, np.arange(1, 10) / 10, method="inverted_cdf"))
    edges = [-np.inf, *ends, np.inf]
    shares = []
    for values in (a, b):
        counts = pd.cut(pd.Series(values), edges).value_counts(sort=False).to_numpy()
        shares.append((counts, len(values)))
    used = (shares[0][0] > 0) | (shares[1][0] > 0)
    p, q = (np.maximum(counts[used], 0.5) / n for counts, n in shares)
    return float(((q - p) * np.log(q / p)).sum())


def test_one_group_of_thirty_drifts_and_is_found_while_the_corpus_holds(
    nights: tuple[RunConfig, str, str],
) -> None:
    _, before, now = nights
    frames = by_group(tokens_of(before)), by_group(tokens_of(now))
    rows = table(now, "FROM group_drift", before)
    assert len(rows) == 31 * len(LAYERS)
    for row in rows:
        k = row["layer"]
        a, b = (frame[row["group"]][f"strength_{k}"].to_numpy() for frame in frames)
        assert row["ks"] == pytest.approx(scipy.stats.ks_2samp(a, b).statistic)
        assert row["psi"] == pytest.approx(psi_of(a, b))
        assert (row["n_a"], row["n_b"]) == (len(a), len(b))
    moved = {row["group"] for row in rows if row["psi"] > 0}
    assert moved == {DRIFTED}
    assert min(row["psi"] for row in rows if row["group"] == DRIFTED) > 0.25
    whole = table(now, "SELECT psi FROM drift WHERE source IS NULL", before)
    assert all(0 < row["psi"] < 0.1 for row in whole)


def test_movers_of_a_group_are_its_types(nights: tuple[RunConfig, str, str]) -> None:
    _, before, now = nights
    frames = [by_group(tokens_of(uri))[DRIFTED] for uri in (before, now)]
    counts = [Counter(frame["token_id"].tolist()) for frame in frames]
    rows = table(now, f"FROM group_movers WHERE \"group\" = '{DRIFTED}' AND layer = 2", before)
    assert {row["status"] for row in rows} == {"new", "vanished", "both"} or len(rows) > 50
    for row in rows:
        in_a, in_b = (of_night[row["token_id"]] for of_night in counts)
        assert (row["n_a"], row["n_b"]) == (in_a, in_b)
        status = "both" if in_a and in_b else "new" if in_b else "vanished"
        assert row["status"] == status
        if in_b:
            high = frames[1].loc[frames[1]["token_id"] == row["token_id"], "high_2"]
            assert row["share_high_b"] == pytest.approx(high.mean())
    assert all(row["median_a"] is None for row in rows)


def test_the_comparison_says_how_it_is_grouped_and_bounds_the_movers(
    nights: tuple[RunConfig, str, str],
) -> None:
    found = compare.compare(nights[1], nights[2])
    assert found.groups.by == "lang"
    body: Any = compare.to_json(found)
    assert body["group_by"] == "lang" and len(body["groups"]) == 31 * len(LAYERS)
    sizes = found.groups.movers.group_by(["layer", "group", "status"]).aggregate([("n_a", "count")])
    assert max(sizes["n_a_count"].to_pylist()) <= 50


def test_small_groups_beyond_the_limit_are_one_group_of_a_name_that_says_so(
    nights: tuple[RunConfig, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, _ = nights
    monkeypatch.setattr(groups, "MAX_GROUPS", 5)
    all_rows = table(nights[2], "FROM groups WHERE layer = 2")
    with afn_ray.run(replace(config, screen=7)) as run:
        assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"]
        rows = run.sql("FROM groups WHERE layer = 2").to_arrow_table().to_pylist()
        sizes = run.sql(
            "SELECT lang, sum(n_tokens) FROM documents WHERE lang IS NOT NULL GROUP BY ALL ORDER "
            "BY 2 DESC, 1"
        ).fetchall()
    largest = sorted(name for name, _ in sizes[:5])
    assert [row["group"] for row in rows] == [*largest, OTHERS, None]
    n = {row["group"]: row["n"] for row in all_rows}
    found = {row["group"]: row["n"] for row in rows}
    assert found == {
        **{name: n[name] for name in largest},
        OTHERS: sum(of for name, of in n.items() if name not in largest and name is not None),
        None: n[None],
    }


def test_strange_documents_are_counted_by_source_and_group(
    nights: tuple[RunConfig, str, str],
) -> None:
    """Against the scores of ``screened``, which lists every text of this corpus."""
    rows = table(nights[2], 'SELECT source, "group", n_docs, n FROM strange')
    scored = table(
        nights[2],
        "SELECT s.score, d.source, d.lang, d.n_tokens - 2 AS n FROM documents d JOIN documents f "
        "USING (text_sha256) JOIN screened s ON s.doc = f.doc",
    )
    expected = Counter[tuple[str, str]]()
    for row in scored:
        if row["score"] >= STRANGE_SCORE:
            expected[row["source"], row["lang"]] += row["n"]
    assert {(row["source"], row["group"]): row["n"] for row in rows} == expected
    assert sum(row["n_docs"] for row in rows if row["group"] == DRIFTED) == 10


def test_verify_proves_groups_however_the_scan_is_cut(
    nights: tuple[RunConfig, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 2)
    monkeypatch.setattr(screen, "READ_BYTES", 1)
    for uri in nights[1:]:
        found = verify.verify_store(uri)
        assert not found.findings and not found.unproved and found.num_runs == 1


def test_groups_by_source_are_the_sources(nights: tuple[RunConfig, str, str]) -> None:
    config, _, now = nights
    with afn_ray.run(replace(config, group_by="source")) as run:
        assert run.uri != now
        assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"]
        ask = 'SELECT layer, {} AS "name", n_documents, n_docs, n, n_high FROM {} ORDER BY ALL'
        of_groups = run.sql(ask.format('"group"', "groups")).fetchall()
        assert len(of_groups) == 3 * len(LAYERS)
        assert of_groups == run.sql(ask.format("source", "sources")).fetchall()
        with afn_ray.open_run(run.uri, baseline=now) as both:
            assert not both.sql("FROM group_drift").fetchall()
        notes = compare.compare(now, run.uri).notes
    assert "Groups were not compared: A is grouped by lang, B by source." in notes


@pytest.mark.parametrize(
    ("uri", "value"),
    [
        ("s3://b/dt=1/lang=de/a.jsonl", "de"),
        ("/c/lang=pt%2FBR/x.txt", "pt/BR"),
        ("/c/lang=/x.txt", ""),
        ("/lang=de/lang=en/x.txt", "en"),
        ("/c/language=de/x.txt", None),
        ("/c/lang=de.txt", None),
        ("/c/lang=__HIVE_DEFAULT_PARTITION__/x.txt", None),
    ],
)
def test_a_partition_key_is_read_off_the_folders(uri: str, value: str | None) -> None:
    assert partition_of(uri, "lang") == value


def test_groups_by_a_partition_key_of_the_path(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    for lang, some in (("de", verses[:20]), ("en", verses[20:50])):
        folder = tmp_path / "corpus" / "dt=2026-11-01" / f"lang={lang}"
        folder.mkdir(parents=True)
        write_jsonl(folder / "a.jsonl", [{"text": text} for text in some])
    write_jsonl(tmp_path / "corpus" / "rest.jsonl", [{"text": verses[60]}])
    config = config_of(
        tiny_bert, tmp_path / "corpus", tmp_path / "store", layers="1", group_by="lang"
    )
    with afn_ray.run(config) as run:
        found = run.sql('SELECT "group", n_docs FROM groups').fetchall()
    assert found == [("de", 20), ("en", 30), (None, 1)]
    with pytest.raises(ConfigError, match=r"group_by is 'land'.*no file of the corpus has"):
        afn_ray.run(replace(config, group_by="land"))
    with pytest.raises(ConfigError, match="screen is 0"):
        replace(config, screen=0)
    for name in ("", "a b", "[red]x", "1st"):
        with pytest.raises(ConfigError, match=r"group_by is .*; expected source"):
            replace(config, group_by=name)


def test_a_run_that_is_not_grouped_has_empty_views(nights: tuple[RunConfig, str, str]) -> None:
    config, _, now = nights
    with afn_ray.run(replace(config, group_by=None)) as run:
        assert "groups" not in manifest.find_run(run.uri).info["tables"]
        for view in ("groups", "group_classes", "group_drift", "group_movers"):
            assert run.sql(f"FROM {view}").fetchall() == []
        same = run.sql("FROM sources ORDER BY ALL").fetchall()
    assert same == [tuple(row.values()) for row in table(now, "FROM sources ORDER BY ALL")]


def test_the_page_has_the_groups_and_those_that_drifted(
    nights: tuple[RunConfig, str, str], tmp_path: Path
) -> None:
    page = afn_ray.write_report(
        nights[2], tmp_path / "r.html", baseline=nights[1], with_claims=False
    ).read_text()
    assert "Groups by lang at layer 2, the largest 20 of 31" in page
    begin = page.index("Groups by lang at layer 2, the furthest by KS first")
    assert page.index(DRIFTED, begin) < page.index("g00", begin)


def test_every_group_has_a_name_for_people() -> None:
    assert [groups.group_name(group) for group in (None, "", "de")] == [
        "(no value)",
        "(empty)",
        "de",
    ]


def test_a_value_of_each_type_is_its_text() -> None:
    from afn_ray.reduce.groups import Grouping
    from afn_ray.reduce.sources import Sources

    for values, texts in (
        (pa.array([True, None]), ["true", None]),
        (pa.array([5, None]), ["5", None]),
        (pa.array([0, None], pa.date32()), ["1970-01-01", None]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
    ):
        documents = pa.table({"c": values})
        grouping = Grouping("c", True, Sources((), None))
        assert grouping.values(documents).to_pylist() == texts
        named = grouping._replace(names=(texts[0], None))
        assert named.index_of(documents).tolist() == [0, 1]


# --- labels by the group's own Q3


@pytest.fixture(scope="module")
def by_own(nights: tuple[RunConfig, str, str]) -> str:
    """The second night, labelled by the groups' own Q3 too."""
    config, _, now = nights
    with afn_ray.run(replace(config, thresholds_by="group")) as run:
        assert run.info["counts"]["shards_reused"] == run.info["counts"]["shards"]
        assert run.uri != now
        return run.uri


def test_tokens_and_group_tables_are_labelled_by_the_groups_own_q3(by_own: str) -> None:
    with afn_ray.open_run(by_own) as run:
        frame = run.sql(
            'SELECT t.token_id, strength_1, strength_2, high_own_1, high_own_2, d.lang AS "group" '
            "FROM tokens t JOIN documents d USING (doc) WHERE NOT is_special"
        ).df()
        ((special,),) = run.sql("SELECT count(high_own_2) FROM tokens WHERE is_special").fetchall()
    assert special == 0
    classes = {
        r["token_id"]: r["class"] for r in table(by_own, "FROM vocabulary WHERE class <> 'special'")
    }
    frame["class"] = frame["token_id"].map(classes)
    frames = by_group(frame)
    rows = table(by_own, "FROM groups")
    of_classes = table(by_own, "FROM group_classes")
    assert len(rows) == len(frames) * len(LAYERS)
    for row in rows:
        part, k = frames[row["group"]], row["layer"]
        strengths = part[f"strength_{k}"]
        high = strengths >= np.quantile(strengths, 0.75, method="inverted_cdf")
        assert part[f"high_own_{k}"].tolist() == high.tolist()
        assert row["n_high_own"] == high.sum()
        here = {r["class"]: r for r in of_classes if (r["group"], r["layer"]) == (row["group"], k)}
        for name, n_high in high.groupby(part["class"]).sum().items():
            found = here.pop(name)
            assert found["n_high_own"] == n_high
            assert found["share_high_own"] == n_high / found["n"]
            assert (
                found["share_high_own_low"] <= n_high / found["n"] <= found["share_high_own_high"]
            )
        assert not here
    types = manifest.read_table(manifest.find_run(by_own), "group_types").to_pylist()
    counts = {(r["layer"], r["group"], r["token_id"]): r["n_high_own"] for r in types}
    expected = frame.groupby(["group", "token_id"], dropna=False)["high_own_1"].sum()
    assert {key[1:]: n for key, n in counts.items() if key[0] == 1} == {
        (None if pd.isna(group) else group, token_id): n
        for (group, token_id), n in expected.items()
    }


def test_all_else_stays_corpus_wide_and_the_same(
    nights: tuple[RunConfig, str, str], by_own: str
) -> None:
    whole, own = (manifest.find_run(uri) for uri in (nights[2], by_own))
    for name in whole.info["tables"]:
        if name in ("plan", "shards"):
            continue
        before, now = (manifest.read_table(run, name) for run in (whole, own))
        added = [column for column in now.column_names if column not in before.column_names]
        assert now.drop_columns(added).equals(before), name
        assert all("_own" in column for column in added)
    ask = "SELECT high_1, high_2, quartile_1, strength_2 FROM tokens ORDER BY doc, position"
    assert table(by_own, ask) == table(nights[2], ask)


def test_verify_proves_labels_by_group_however_the_scan_is_cut(
    by_own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 2)
    monkeypatch.setattr(screen, "READ_BYTES", 1)
    monkeypatch.setattr("afn_ray.reduce.counters.DENSE_COUNTS", 1)
    found = verify.verify_store(by_own)
    assert not found.findings and not found.unproved and found.num_runs == 1


def test_drift_of_groups_goes_by_their_own_q3_if_both_runs_have_it(
    nights: tuple[RunConfig, str, str], by_own: str
) -> None:
    note = "In groups, HIGH goes by the corpus-wide Q3: A has no labels by the groups' own"
    mixed = compare.compare(nights[1], by_own)
    assert any(text.startswith(note) for text in mixed.notes)
    assert mixed.groups.movers.equals(compare.compare(nights[1], nights[2]).groups.movers)
    same = compare.compare(by_own, by_own)
    assert any("each labels by its own Q3" in text for text in same.notes)
    of_classes = {
        (r["layer"], r["group"], r["class"]): r for r in table(by_own, "FROM group_classes")
    }
    for row in same.groups.classes.to_pylist():
        expected = of_classes[row["layer"], row["group"], row["class"]]
        assert row["n_high_a"] == row["n_high_b"] == expected["n_high_own"]
    of_groups = {(r["layer"], r["group"]): r for r in table(by_own, "FROM groups")}
    for row in same.groups.drift.to_pylist():
        expected = of_groups[row["layer"], row["group"]]
        assert row["share_high_a"] == expected["n_high_own"] / expected["n"]


def test_labels_by_group_need_groups(nights: tuple[RunConfig, str, str]) -> None:
    with pytest.raises(ConfigError, match="thresholds_by is 'group', but group_by is not given"):
        replace(nights[0], group_by=None, thresholds_by="group")


VALUES: dict[str, pa.Array] = {
    "string": pa.array(["a", "b", None, OTHERS, "it's", ""]),
    "int64": pa.array([1, -2, None, 3]),
    "double": pa.array([0.0, -0.0, None, 1e20, 0.1]),
    "bool": pa.array([True, False, None]),
    "date": pa.array([date(2026, 11, 2), None, date.min]),
    "timestamp": pa.array(
        [datetime(2026, 11, 2, 3, 4, 5, 7), None, datetime.max], kept.KINDS["timestamp"]
    ),
}
FILES = pa.array(["s/lang=de/a", "s/lang=en/a", "s/lang=en/b", "s/rest/a"]).dictionary_encode()


@pytest.mark.parametrize("most", [100, 1])
@pytest.mark.parametrize("by", [*VALUES, "lang", "source"])
def test_sql_finds_the_group_that_the_reduce_counted_a_document_in(by: str, most: int) -> None:
    """Values of each type, keys of the path and files; with more groups than may have names."""
    column = VALUES.get(by, FILES)
    name = by if by not in VALUES else "c"
    documents = pa.table(
        {"doc": range(len(column)), "source": FILES.take(pa.array([0] * len(column)))}
        if by in VALUES
        else {"doc": range(len(column)), "source": FILES}
    )
    if by in VALUES:
        documents = documents.append_column("c", column)
    uris = FILES.to_pylist()
    grouping = groups.Grouping(name, by in VALUES, Sources.of(uris))
    distinct = [n for n in grouping.values(documents).unique().to_pylist() if n is not None]
    names = [*distinct[:most], *([OTHERS] if len(distinct) > most else []), None]
    grouping = grouping._replace(names=tuple(dict.fromkeys(names)))
    expected = [grouping.names[at] for at in grouping.index_of(documents)]
    folder = manifest.RunFolder(
        "s/runs/r",
        "s",
        "r",
        {
            "config": {"group_by": name, "keep_columns": f"c:{by}" if by in VALUES else None},
            "layers": [1],
            "tables": {"groups": entry_of("groups.parquet", b"")},
        },
    )
    numbers = [float(at) for at in range(len(grouping.names))]
    small = {
        "groups": pa.table({"layer": [1] * len(numbers), "group": grouping.names, "q3": numbers}),
        "files": pa.table({"source": uris, "is_skipped": [False] * len(uris)}),
    }
    with duckdb.connect() as connection:
        connection.execute("CREATE SCHEMA internal")
        for title, made in own_labels.own_tables(folder, small).items():
            connection.register("made", made)
            connection.execute(f"CREATE TABLE {title} AS FROM made")
        connection.register("rows", documents)
        found = connection.sql(
            f"FROM {own_labels.own_q3(folder, 'rows', [1])} ORDER BY doc"
        ).fetchall()
    assert [grouping.names[int(q3)] for _, q3 in found] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("width", [300, 1 << 40])
def test_sums_of_histograms_are_those_of_a_counter_whether_their_keys_are_dense_or_not(
    width: int,
) -> None:
    random = np.random.default_rng(width)
    parts = []
    for _ in range(5):
        keys = np.unique(random.integers(10, 10 + width, 200))
        parts.append(Histogram(keys, random.integers(0, 9, len(keys))))
    expected: Counter[int] = Counter()
    for part in parts:
        for key, n in zip(part.keys.tolist(), part.counts.tolist(), strict=True):
            expected[key] += n
    found = Histogram.merge(parts)
    assert dict(zip(found.keys.tolist(), found.counts.tolist(), strict=True)) == expected
    assert (np.diff(found.keys) > 0).all()


@pytest.mark.parametrize("dense_counts", [1, 1 << 24])
@pytest.mark.parametrize("q3", [8.0, 1e-30, np.inf])
def test_strengths_are_counted_by_group_near_q3_and_far_from_it(
    q3: float, dense_counts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afn_ray.reduce.counters.DENSE_COUNTS", dense_counts)
    draw = np.random.default_rng(0)
    values = round_strengths(np.exp2(draw.uniform(-6, 12, 3000)).astype(np.float32))
    values[:3] = 0, 2, np.finfo(np.float32).max  # below, the window's lowest for 8, above
    of_tokens = draw.integers(0, 3, len(values))
    grouping = groups.Grouping("lang", True, Sources.of([]), ("a", "b", None), (q3,), 10)
    counter = groups.StrengthCounter(grouping)
    for some in np.array_split(np.arange(len(values)), 4):
        counter.add(of_tokens[some], [values[some]])
    (found,) = counter.sums()
    expected = Histogram.of((of_tokens << BIN_BITS) + to_bins(values))
    np.testing.assert_array_equal(found.keys, expected.keys)
    np.testing.assert_array_equal(found.counts, expected.counts)
