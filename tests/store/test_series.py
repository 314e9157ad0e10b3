"""Series: which runs belong together, and what the dates in their paths are."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.errors import ConfigError
from afn_ray.store import layout, manifest, plans, retention, series, storage
from conftest import config_of
from nights import complete


def name(*corpus: str, given: str | None = None, store: str = "s3://b/afn") -> str:
    return series.name_of(store, {"corpus": list(corpus), "series": given})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("s3://b/texts/2026-11-02/", "s3://b/texts/<date>/"),
        ("s3://b/texts/20261102/", "s3://b/texts/<date>/"),
        ("/t/news-2026-11-02.jsonl", "/t/news-<date>.jsonl"),
        ("/t/20261102T000000.csv", "/t/<date>T000000.csv"),
        ("/t/dt=2026-11-02/a", "/t/dt=<date>/a"),
        ("/t/dt=2026-11-02T13/lang=de", "/t/dt=<date>/lang=de"),
        ("/t/date=today", "/t/date=<date>"),
        ("/t/dt=2026-11-02*", "/t/dt=<date>*"),
        ("/t/dt=*/", "/t/dt=*/"),  # every night covers all of them: another series
        ("/t/update=5", "/t/update=5"),
        ("/t/2026-13-02", "/t/2026-13-02"),  # no date
        ("/t/99999999", "/t/99999999"),
        ("/t/120261102", "/t/120261102"),
        ("/t/2026-11", "/t/2026-11"),
    ],
)
def test_dates_in_a_path_are_replaced_and_nothing_else(path: str, expected: str) -> None:
    assert series.undated(path) == expected


@pytest.mark.parametrize(
    ("corpus", "day"),
    [
        (["/t/2026-11-02/"], "2026-11-02"),
        (["/t/20261102/a-20261101.csv"], "2026-11-02"),
        (["/t/dt=2026-11-02/a-20261103.csv"], "2026-11-02"),  # a key says which one counts
        (["/t/dt=2026-11-02T13/"], "2026-11-02"),
        (["/t/2026-11-01/", "/u/2026-11-02/", "/v/"], "2026-11-02"),
        (["/t/dt=*/"], None),
        (["/t/"], None),
    ],
)
def test_the_day_of_a_corpus(corpus: list[str], day: str | None) -> None:
    assert series.day_of(corpus) == (None if day is None else date.fromisoformat(day))


def test_nights_of_one_dated_corpus_are_one_series_and_other_corpora_are_others() -> None:
    first = name("s3://b/texts/2026-11-01")
    assert first == "afn: s3://b/texts/<date>" == name("s3://b/texts/2026-11-02")
    others = [
        name("s3://b/texts"),
        name("s3://b/more/2026-11-01"),
        name("s3://b/texts/2026-11-01", store="s3://b/else"),
        name("s3://b/texts/2026-11-01", "s3://b/x"),
        name("s3://b/texts/2026-11-01", "s3://b/y"),
        name("s3://b/x", "s3://b/texts/2026-11-01"),
        name("s3://b/" + "x" * 300),
        name("s3://c/" + "x" * 300),
        name("s3://b/texts/2026-11-01", given="mine"),
    ]
    assert len({first, *others}) == len(others) + 1
    assert name("a/2026-11-01", given="mine") == name("b", given="mine", store="s") == "mine"
    both = [name(f"/a/dt={day}", f"/b/dt={day}") for day in ("2026-11-01", "2026-11-02")]
    assert both[0] == both[1] and both[0].startswith("afn: /a/dt=<date> and 1 more (")
    assert all(len(other) < 300 for other in others)


def test_a_list_of_folders_that_grows_is_one_series_only_by_a_given_name() -> None:
    lists = [[f"/t/2026-11-{day:02d}" for day in range(1, last)] for last in (2, 3, 4)]
    assert len({name(*corpus) for corpus in lists}) == 3
    assert {name(*corpus, given="mine") for corpus in lists} == {"mine"}


@pytest.mark.parametrize("given", ["", "two words", "a: b", "-x", "x" * 101, "ä"])
def test_a_name_that_might_be_a_derived_one_is_refused(given: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="series is"):
        config_of(tmp_path, tmp_path, tmp_path, series=given)


def test_the_id_of_a_run_depends_on_its_series_only_if_one_is_given(tmp_path: Path) -> None:
    """Runs in stores that exist keep their ids."""

    def request(classes: int | None = None, **changes: str) -> str:
        config: RunConfig = config_of(tmp_path, tmp_path, tmp_path, **changes)
        shards: list[Shard] = []
        return plans.request_id("0" * 32, shards, config, [], classes)

    # Of a plan that has no version of the classes and detects no language.
    assert request(language="en") == "05683f4ff534"
    assert len({request(), request(series="a"), request(series="b")}) == 3
    assert len({request(), request(1), request(2), request(2, language="de")}) == 4


def test_sources_of_two_nights_match_without_their_own_dates() -> None:
    ours, theirs = series.matched_names(["/t/dt=2026-11-01"], ["/t/dt=2026-11-02"])
    assert ours("/t/dt=2026-11-01/a-20261101.csv") == "/t/dt=<date>/a-<date>.csv"
    assert theirs("/t/dt=2026-11-02/a-20261102.csv") == "/t/dt=<date>/a-<date>.csv"
    assert ours("/t/dt=2026-11-01/2020-01-01.csv") == "/t/dt=<date>/2020-01-01.csv"
    assert theirs("/t/dt=2026-11-01/a.csv") == "/t/dt=2026-11-01/a.csv"


def test_a_collection_keeps_what_the_next_night_of_a_dated_series_is_held_against(
    tmp_path: Path,
) -> None:
    """Not a run for every night, though the corpus of each is another."""
    store = str(tmp_path)
    runs = []
    for hour, day in enumerate((1, 3, 2, 4)):  # the 2nd is late
        began = datetime(2026, 11, 22, hour, tzinfo=UTC)
        runs.append(complete(tmp_path, began, corpus=[f"/t/dt=2026-11-0{day}"], ask=f"{day:012}"))
    for run in runs[:3]:
        manifest.mark_audited(run)
    there = layout.sort_files(store, storage.list_below(store))
    rules = retention.RetentionRules(keep=1, keep_runs=(), min_age_h=0)
    names = manifest.run_names(store)
    kept = retention.kept_runs(store, there, names, rules, old_s=time.time() + 1)
    assert kept == [run.id for run in runs[1:]]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("/t", "/t"), ("/t/2026-11-01", "/t/2026-11-01"), ("/t", "/t/2026-11-01"), ("/t/dt=*", "/t")],
)
def test_sources_of_runs_of_one_date_or_none_keep_their_names(ours: str, theirs: str) -> None:
    for rename in series.matched_names([ours], [theirs]):
        assert rename("/t/2026-11-01/a.csv") == "/t/2026-11-01/a.csv"
