"""The history of a series against pandas and scipy over the recorded rows,
and what an audit keeps.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import spatial, stats

import afn_ray
from afn_ray.analysis import learned, verify
from afn_ray.analysis.policy import read_policy
from afn_ray.cli import commands
from afn_ray.errors import ConfigError, StoreError
from afn_ray.query import database
from afn_ray.reduce import history
from afn_ray.runs import job
from afn_ray.schema import HISTORY_SCHEMA
from afn_ray.store import manifest, series_runs, verdicts
from afn_ray.store.manifest import RunFolder
from afn_ray.store.settings import config_from
from afn_ray.store.verdicts import Distance, StoredVerdict
from conftest import edit_checksummed, write_jsonl

VERSES = {1: (0, 14), 2: (300, 316), 3: (600, 612), 4: (900, 915), 5: (40, 52)}
"""Verses of each night's partition, of November."""
BROKEN, UNAUDITED = 3, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> str:
    """Five nights of a dated corpus in two languages; the third is broken, the fourth no audit."""
    folder = tmp_path_factory.mktemp("history")
    policy = folder / "policy.toml"
    policy.write_text('window = "new"\nempty_documents = 0\npsi = 9\n')
    for day, (begin, end) in VERSES.items():
        texts = verses[begin:end] + [""] * (day == BROKEN)
        rows = [{"text": t, "lang": ("de", "en", None)[i % 3]} for i, t in enumerate(texts)]
        (folder / f"dt=2026-11-{day:02d}").mkdir()
        write_jsonl(folder / f"dt=2026-11-{day:02d}" / "a.jsonl", rows)
        flags = {
            "corpus": [f"{folder}/dt=2026-11-{day:02d}/"],
            "model": str(tiny_bert),
            "layers": "0,2",
            "store": f"{folder}/store",
            "dtype": "float32",
            "executor": "inline",
            "keep_columns": "lang",
            "group_by": "lang",
        }
        config = config_from(flags)
        if day == UNAUDITED:
            with job.run(config, lambda event: None):
                pass
        else:
            night = afn_ray.Night(first_night=day == 1)
            afn_ray.run_audit(config, read_policy(policy), night)
    return f"{folder}/store"


def copy_of(store: str, folder: Path) -> str:
    shutil.copytree(store, folder / "store")
    return str(folder / "store")


def runs_of(store: str) -> list[RunFolder]:
    return [manifest.open_folder(store, name) for name in manifest.run_names(store)]


# --- the figures


def frame_of(run: RunFolder) -> pd.DataFrame:
    """The recorded rows of a run: strengths at both layers, class and language of every token."""
    with afn_ray.open_run(run.uri) as opened:
        return opened.sql(
            "SELECT strength_0, high_0, strength_2, high_2, v.class, lang "
            "FROM tokens t JOIN documents USING (doc) "
            "JOIN (SELECT * FROM vocabulary WHERE layer = 0 AND class <> 'special') v "
            "USING (token_id) WHERE NOT is_special"
        ).df()


def slow_psi(a: pd.Series[float], b: pd.Series[float]) -> float:
    ends = sorted({a.quantile(i / 10, "inverted_cdf") for i in range(1, 10)})
    counts = [np.bincount(np.searchsorted(ends, s), minlength=len(ends) + 1) for s in (a, b)]
    p, q = (np.maximum(c, 0.5) / c.sum() for c in counts)
    return float(((q - p) * np.log(q / p)).sum())


def slow_js(a: pd.Series[float], b: pd.Series[float]) -> float:
    """Over bins that end at the deciles of both, each value weighted so that both count alike."""
    values = np.concatenate([a, b])
    weights = np.concatenate([np.full(len(a), len(b)), np.full(len(b), len(a))])
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(weights[order])
    at = [np.searchsorted(upto * 10, i * upto[-1]) for i in range(1, 10)]
    ends = np.unique(values[order][at])
    counts = [np.bincount(np.searchsorted(ends, s), minlength=len(ends) + 1) for s in (a, b)]
    return float(spatial.distance.jensenshannon(*counts, base=2))


def slow_figures(of_b: pd.DataFrame, of_a: pd.DataFrame | None, layer: int) -> dict[str, Any]:
    strengths, high = of_b[f"strength_{layer}"], of_b[f"high_{layer}"]
    row: dict[str, Any] = {"n_tokens": len(of_b), "share_high": high.mean()}
    for i in (1, 2, 3):
        row[f"q{i}"] = np.quantile(strengths, i / 4, method="inverted_cdf")
    by_class = of_b.groupby("class")[f"high_{layer}"].agg(["size", "mean"])
    row["classes"] = {
        name: (size / len(of_b), mean) for name, size, mean in by_class.itertuples(name=None)
    }
    if of_a is not None:
        before = of_a[f"strength_{layer}"]
        row["psi"], row["js"] = slow_psi(before, strengths), slow_js(before, strengths)
        row["ks"] = stats.ks_2samp(before, strengths).statistic
    return row


def test_history_equals_pandas_and_scipy_over_the_recorded_rows(store: str) -> None:
    found = history.of_store(store)
    assert found.table.schema == HISTORY_SCHEMA and found.num_runs == 5 and not found.others
    rows = found.table.to_pylist()
    assert len(rows) == 5 * 2 * (1 + 3)
    frames = {run.id: frame_of(run) for run in runs_of(store)}
    days = dict(zip(frames, VERSES, strict=True))
    for row in rows:
        day, frame = days[row["run"]], frames[row["run"]]
        assert row["partition"] == date(2026, 11, day)
        before = frames.get(row["baseline"])
        num_documents = VERSES[day][1] - VERSES[day][0] + (day == BROKEN)
        if row["group_by"] is not None:
            of_group = [f if f is None else f[of_lang(f, row["group"])] for f in (before, frame)]
            before, frame = of_group
            num_documents = len(range(num_documents)[(("de", "en", None)).index(row["group"]) :: 3])
        expected = slow_figures(frame, before, row["layer"])
        classes = {c["class"]: (c["share"], c["share_high"]) for c in row["classes"]}
        assert classes.keys() == expected["classes"].keys()
        for name, shares in expected.pop("classes").items():
            assert classes[name] == pytest.approx(shares, rel=1e-12)
        assert row["n_documents"] == num_documents
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert (row["psi"] is None) == (day == 1)


def of_lang(frame: pd.DataFrame, group: str | None) -> pd.Series[bool]:
    return frame["lang"].isna() if group is None else frame["lang"] == group


def test_history_has_the_verdict_of_each_night_and_the_baseline_of_each(store: str) -> None:
    ids = [run.id for run in runs_of(store)]
    rows = history.of_store(store).table.to_pylist()
    of_night = {(r["run"], r["baseline"], r["state"], *r["broken"]) for r in rows}
    assert of_night == {
        (ids[0], None, "held"),
        (ids[1], ids[0], "held"),
        (ids[2], ids[1], "broken", "empty_documents"),
        (ids[3], ids[2], None),
        (ids[4], ids[1], "held"),  # the newest audited run that is not broken
    }


# --- what an audit keeps


def test_the_verdict_outlives_its_baseline_and_is_recomputed_without_it(
    store: str, tmp_path: Path
) -> None:
    copied = copy_of(store, tmp_path)
    kept = history.of_store(copied).table
    *_, third, fourth, fifth = runs_of(copied)
    Path(fifth.uri, "verdict.json").unlink()
    for run in (third, fourth):  # the night before is now the second, as in the audit
        Path(run.uri, "run.json").unlink()
    recomputed = history.of_run(fifth, last=1).table
    for name in ("psi", "ks", "js", "baseline"):
        assert recomputed[name].to_pylist() == kept[name].to_pylist()[-len(recomputed) :], name
    assert recomputed["state"].null_count == len(recomputed)

    shutil.rmtree(tmp_path / "store")
    copied = copy_of(store, tmp_path)
    for run in runs_of(copied)[:-1]:
        shutil.rmtree(run.uri)
    left = history.of_store(copied).table
    assert left.equals(kept.slice(len(kept) - len(left)))


def test_a_verdict_is_kept_as_it_is_and_replaced_as_a_whole(store: str, tmp_path: Path) -> None:
    run = runs_of(copy_of(store, tmp_path))[0]
    distance = Distance(2, "lang", None, 0.25, None, 0.5)
    for state in ("held", "broken"):
        figures = {"psi": 0.25, "lost_documents": None}
        given = StoredVerdict(
            state, "all", 2, None, ("psi",), ("ks",), ("js",), figures, (distance,)
        )
        verdicts.write_verdict(run, given)
        assert verdicts.read_verdict(run) == given
    assert verdicts.read_verdict(replace(run, id="another")) is None  # copied with its folder


def test_verify_and_gc_know_the_verdict(store: str, tmp_path: Path) -> None:
    copied = copy_of(store, tmp_path)
    run = runs_of(copied)[1]
    found = verify.verify_store(run.uri)
    assert not found.findings and not found.orphans and not found.foreign
    uri = f"{run.uri}/verdict.json"
    Path(uri).write_text("{}")
    (damage,) = verify.verify_store(run.uri).findings
    assert (damage.kind, damage.uri) == ("damaged", uri) and "delete it" in damage.message
    with pytest.raises(StoreError, match=r"verdict\.json"):
        history.of_store(copied)
    with pytest.raises(SystemExit):
        commands.main(["gc", copied, "--keep=1", "--min-age-h=0", "--delete"])
    assert [run.id for run in runs_of(copied) if run.info] == [runs_of(store)[-1].id]
    assert len(list(Path(copied).glob("runs/*/verdict.json"))) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", 3), ("layer", True), ("layer", 1 << 40), ("baseline", {}), ("broken", [1]),
        ("figures", {"psi": "x"}), ("figures", []), ("figures", {"psi": float("nan")}),
        ("distances", [{}]), ("distances", 7), ("window", None),
    ],
)  # fmt: skip
def test_a_verdict_with_other_content_is_damage(
    key: str, value: object, store: str, tmp_path: Path
) -> None:
    run = runs_of(store)[0]
    (tmp_path / "run").mkdir()
    copied = replace(run, uri=str(tmp_path / "run"))
    shutil.copy(f"{run.uri}/verdict.json", copied.uri)
    edit_checksummed(f"{copied.uri}/verdict.json", lambda body: body.update({key: value}))
    with pytest.raises(StoreError, match=r"verdict\.json is damaged"):
        verdicts.read_verdict(copied)


# --- limits that learn


def psi_of(a: RunFolder, b: RunFolder) -> float:
    rows = afn_ray.compare_runs(a, b).drift.to_pylist()
    return next(float(r["psi"]) for r in rows if (r["layer"], r["source"]) == (2, None))


def test_a_limit_learns_from_nights_that_may_be_baselines(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures come from those that kept it, and from the one without an audit, which is judged
    again.
    """
    copied = copy_of(store, tmp_path)
    first, second, third, fourth, last = runs_of(copied)
    policy = replace(read_policy(policy_of(tmp_path)), unjudged="fail")
    config = config_from({**last.info["config"], "store": copied})

    def check(tonight: float, *earlier: float) -> None:
        monkeypatch.setattr(learned, "LEAST_NIGHTS", len(earlier))
        (rule,) = afn_ray.run_audit(config, policy).rules
        middle, spread = np.median(earlier), 2 * stats.median_abs_deviation(earlier)
        ends = (max(0, middle - spread), middle + spread)
        assert rule.value == tonight and rule.usual is not None
        assert (rule.usual.low, rule.usual.high) == pytest.approx(ends, rel=1e-12)
        assert rule.usual.nights == len(earlier)
        assert rule.state == ("broken" if tonight > ends[1] else "held")

    check(psi_of(second, last), psi_of(first, second), psi_of(second, fourth))
    monkeypatch.setattr(learned, "LEAST_NIGHTS", 3)
    found = afn_ray.run_audit(config, policy)
    reason = 'psi: "2 mad" needs the figure of 3 earlier nights; there are 2'
    assert (found.state, found.reason) == ("broken", reason)
    verdicts.accept(third, "an empty document is harmless")
    earlier = psi_of(first, second), psi_of(second, third), psi_of(third, fourth)
    check(psi_of(third, last), *earlier)
    with monkeypatch.context() as patch:  # what was found again is kept
        patch.setattr(verdicts, "write_figures", None)
        check(psi_of(third, last), *earlier)
    assert len(runs_of(copied)) == 5
    assert not verify.verify_store(copied).orphans


def test_an_audit_reads_each_complete_run_once(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as earlier for its baseline, the nights that limits learn from, its standing, and
    its page.
    """
    copied = copy_of(store, tmp_path)
    runs = runs_of(copied)
    read: list[str] = []

    def open_folder(of: str, name: str) -> RunFolder:
        read.append(name)
        return manifest.open_folder(of, name)

    counted = SimpleNamespace(**vars(manifest) | {"open_folder": open_folder})
    monkeypatch.setattr(series_runs, "manifest", counted)
    config = config_from({**runs[-1].info["config"], "store": copied})
    policy = replace(read_policy(policy_of(tmp_path)), unjudged="fail")
    with series_runs.read_once():
        found = afn_ray.run_audit(config, policy)
        history.of_run(found.run)
        assert sorted(read) == [run.id for run in runs]
        # A run that is complete by now is found.
        shutil.copytree(f"{runs[1].uri}", f"{copied}/runs/29991111{runs[1].id[8:]}")
        edit_checksummed(
            f"{copied}/runs/29991111{runs[1].id[8:]}/run.json",
            lambda body: body.update(id=f"29991111{runs[1].id[8:]}"),
        )
        assert len([*series_runs.complete_runs(copied)]) == len(runs) + 1 == len(read)
    afn_ray.run_audit(config, policy)
    assert len(read) > len(runs) + 1  # and not for longer


def policy_of(folder: Path) -> Path:
    (folder / "policy.toml").write_text('window = "new"\npsi = "2 mad"\n')
    return folder / "policy.toml"


# --- where it is shown


def test_the_view_is_the_table_and_only_queries_that_name_it_read_other_runs(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = history.of_store(store).table
    with afn_ray.open_run(runs_of(store)[1].uri) as run:
        with monkeypatch.context() as patch:
            patch.setattr(history, "of_run", None)
            assert run.sql("SELECT count(*) FROM kwic('history')").fetchall() == [(0,)]
            assert run.tables()["history"] == HISTORY_SCHEMA.names
        assert run.sql("FROM History").to_arrow_table().to_pylist() == expected.to_pylist()
        query = (
            "SELECT partition, c.share_high FROM history, unnest(classes) AS u(c) "
            "WHERE layer = 2 AND group_by IS NULL AND c.class = 'content' ORDER BY partition"
        )
        assert [day for day, _ in run.sql(query).fetchall()] == [
            date(2026, 11, day) for day in VERSES
        ]
        assert isinstance(run, database.Run)


def history_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        commands.main(["history", *words])
    assert not end.value.code
    return capsys.readouterr().out


def test_the_command_has_a_line_for_each_night(
    store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = history_of(capsys, store).splitlines()
    assert max(map(len, lines)) <= 80
    nights = [line for line in lines if line.startswith("2026-11-")]
    assert [line.split()[0] for line in nights[:5]] == [f"2026-11-{day:02d}" for day in VERSES]
    states = [line.split(maxsplit=8 - (n == 0) * 2)[-1] for n, line in enumerate(nights[:5])]
    assert states == ["held", "held", "broken", "no audit", "held"]
    assert nights[5:] == ["2026-11-03 broke empty_documents"]
    psi = history.of_store(store).table.filter(pa.compute.field("layer") == 2)["psi"].to_pylist()
    assert nights[1].split()[6] == f"{psi[4]:.4f}"
    two = history_of(capsys, store, "--last=2", "--layer=0").splitlines()
    assert [line[:10] for line in two if line.startswith("2026")] == ["2026-11-04", "2026-11-05"]


def test_the_command_gives_all_rows_as_json(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    body = json.loads(history_of(capsys, store, "--json"))
    rows = history.of_store(store).table
    assert body["num_runs"] == 5 and body["series"].startswith("store: ")
    assert [r["psi"] for r in body["nights"]] == rows["psi"].to_pylist()
    assert body["nights"][0]["partition"] == "2026-11-01"


def test_a_series_or_a_layer_that_is_not_there_is_refused_with_those_that_are(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = copy_of(store, tmp_path)
    run_json = f"{runs_of(copied)[-1].uri}/run.json"
    edit_checksummed(run_json, lambda body: body["config"].update(series="mine"))
    assert "Series mine" in history_of(capsys, copied)
    theirs = history.of_store(copied).others
    assert history.of_store(copied, theirs[0]).num_runs == 4
    with pytest.raises(
        ConfigError, match=r"has no series 'min' \(did you mean mine\?\); it has 2: "
    ):
        history.of_store(copied, "min")
    with pytest.raises(SystemExit) as end:
        commands.main(["history", copied, "--layer=7"])
    assert end.value.code == 2 and "there are [0, 2]" in capsys.readouterr().err
