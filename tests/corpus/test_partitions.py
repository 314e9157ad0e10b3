"""Dated partitions: which day a glob stands for, and the patterns of that day alone."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

import pytest

from afn_ray.corpus import listing, partitions
from afn_ray.corpus.partitions import Partition
from afn_ray.corpus_values import ReadOptions
from afn_ray.errors import ConfigError, CorpusError
from afn_ray.store import storage, uris

OPTIONS = ReadOptions("auto", "text", None, "file", 1 << 20)


def fill(place: str, names: Iterable[str]) -> None:
    for name in names:
        storage.write_over(f"{place}/{name}", b'{"text": "word"}\n')


def choose(place: str, *patterns: str, day: str = "latest") -> tuple[str, list[str]]:
    """The chosen day, and the patterns that it left, without ``place``."""
    found = partitions.choose([f"{place}/{pattern}" for pattern in patterns], day)
    root = uris.absolute(place)
    return found.day.isoformat(), [path.removeprefix(f"{root}/") for path in found.corpus]


LAYOUTS = [
    # files, the pattern, what it is narrowed to, and the files of that day
    (["dt=2026-11-01/a.jsonl", "dt=2026-11-02/a.jsonl", "dt=2026-11-02/b/c.jsonl",
      "dt=none/a.jsonl"],
     "dt=*/", "dt=2026-11-02", 2),
    (["dt=2026-11-02/lang=de/a.jsonl", "dt=2026-11-02/lang=en/a.jsonl",
      "dt=2026-11-01/lang=de/a.jsonl"],
     "dt=*/lang=*/*.jsonl", "dt=2026-11-02/lang=*/*.jsonl", 2),
    (["lang=de/dt=2026-11-01/a.jsonl", "lang=de/dt=2026-11-02/a.jsonl",
      "lang=en/dt=2026-11-02/a.jsonl"],
     "lang=*/dt=*/*.jsonl", "lang=*/dt=2026-11-02/*.jsonl", 2),
    (["20261101/a.jsonl", "20261102/a.jsonl", "_20261103/a.jsonl", ".20261103/a.jsonl"], "*/",
     "20261102", 1),
    (["news-20261101.jsonl", "news-20261102.jsonl", "other-20261103.jsonl"],
     "news-*.jsonl", "news-20261102.jsonl", 1),
    (["news-20261101-0.jsonl", "news-20261102-0.jsonl", "news-20261102-1.jsonl"],
     "news-*.jsonl", "news-20261102*.jsonl", 2),
    (["2026-11-01-part-0.jsonl", "2026-11-02-part-0.jsonl", "2026-11-02-part-1.jsonl"],
     "*-part-*.jsonl", "2026-11-02-part-*.jsonl", 2),
    (["dt=2026-11-02T00/a.jsonl", "dt=2026-11-02T12/a.jsonl", "dt=2026-11-01T12/a.jsonl"],
     "dt=*/*.jsonl", "dt=2026-11-02*/*.jsonl", 2),
    (["2026-10-31/a.jsonl", "2026-11-01/a.jsonl", "2026-11-02/a.jsonl"], "2026-1?-[0-3]*/",
     "2026-11-02", 1),
]  # fmt: skip


@pytest.mark.parametrize(("names", "pattern", "narrowed", "num_files"), LAYOUTS)
def test_a_glob_stands_for_its_newest_day(
    names: list[str], pattern: str, narrowed: str, num_files: int, quiet_place: str
) -> None:
    fill(quiet_place, names)
    day, corpus = choose(quiet_place, pattern)
    assert (day, corpus) == ("2026-11-02", [narrowed])
    files, _ = listing.list_files([f"{quiet_place}/{path}" for path in corpus], OPTIONS)
    assert len(files) == num_files


def test_a_bucket_has_the_partitions_of_a_disk(object_store: str) -> None:
    fill(object_store, LAYOUTS[0][0])
    assert choose(object_store, "dt=*/") == ("2026-11-02", ["dt=2026-11-02"])


def test_a_day_may_be_named_and_must_be_there(quiet_place: str) -> None:
    fill(quiet_place, [f"dt=2026-11-{day:02d}/a.jsonl" for day in range(1, 10)])
    for day in ("2026-11-03", "20261103"):
        assert choose(quiet_place, "dt=*/", day=day) == ("2026-11-03", ["dt=2026-11-03"])
    with pytest.raises(CorpusError) as caught:
        choose(quiet_place, "dt=*/", day="2026-11-10")
    assert str(caught.value).startswith("there is no partition 2026-11-10:\n  ")
    newest = "2026-11-09, 2026-11-08, 2026-11-07, 2026-11-06, 2026-11-05 and 4 older ones"
    assert str(caught.value).endswith(f"dt=* has {newest}")
    with pytest.raises(ConfigError, match="partition is 'yesterday'; expected latest, or a date"):
        choose(quiet_place, "dt=*/", day="yesterday")


def test_a_day_counts_only_if_every_dated_glob_has_it(quiet_place: str) -> None:
    fill(quiet_place, ["de/dt=2026-11-01/a.jsonl", "de/dt=2026-11-02/a.jsonl", "fixed.jsonl"])
    fill(quiet_place, ["en/dt=2026-11-01/a.jsonl"])
    patterns = [f"{quiet_place}/{name}" for name in ("de/dt=*", "en/dt=*", "fixed.jsonl")]
    found = partitions.choose(patterns)
    root = uris.absolute(quiet_place)
    corpus = (f"{root}/de/dt=2026-11-01", f"{root}/en/dt=2026-11-01", f"{root}/fixed.jsonl")
    assert found == Partition(date(2026, 11, 1), corpus, date(2026, 11, 2))
    assert partitions.choose(patterns, "2026-11-01").incomplete is None
    with pytest.raises(CorpusError, match="there is no partition 2026-11-02:"):
        partitions.choose(patterns, "2026-11-02")
    fill(quiet_place, ["en/dt=2026-11-02/a.jsonl"])
    assert partitions.choose(patterns).day == date(2026, 11, 2)


def test_globs_without_a_common_day_have_no_partition(quiet_place: str) -> None:
    fill(quiet_place, ["de/dt=2026-11-01/a.jsonl", "en/dt=2026-11-02/a.jsonl"])
    with pytest.raises(CorpusError, match="no date is in all of them:"):
        choose(quiet_place, "de/dt=*", "en/dt=*")


def test_paths_with_a_date_are_that_partition_and_paths_without_are_none(quiet_place: str) -> None:
    fill(quiet_place, ["2026-11-02/a.jsonl", "plain/a.jsonl"])
    for day in ("latest", "2026-11-02"):
        found = partitions.choose([f"{quiet_place}/2026-11-02/"], day)
        assert found == Partition(date(2026, 11, 2), (f"{quiet_place}/2026-11-02/",))
    with pytest.raises(ConfigError, match="partition is 2026-11-03, but the corpus names"):
        choose(quiet_place, "2026-11-02/", day="2026-11-03")
    for pattern in ("plain/", "plain/*.jsonl", "nothing-*"):
        with pytest.raises(ConfigError, match='window = "new" needs a dated corpus'):
            choose(quiet_place, pattern)


def test_a_path_with_another_newer_date_is_refused(quiet_place: str) -> None:
    """The day of a run is read off its paths, so it must be that of the partition."""
    fill(quiet_place, ["to-2030-01-01/2026-11-02/a.jsonl"])
    with pytest.raises(ConfigError, match="is the partition 2026-11-02, but its paths have"):
        choose(quiet_place, "to-2030-01-01/*/")


def test_a_glob_that_is_none_is_refused(quiet_place: str) -> None:
    fill(quiet_place, ["2026-11-02/a.jsonl"])
    with pytest.raises(CorpusError, match="which is no glob"):
        choose(quiet_place, "[z-a]*/")
