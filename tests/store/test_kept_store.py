"""A store that an earlier commit wrote reads as it did.

``tests/data/store`` was written by the last commit before the modules moved into rooms, over 40
verses and a line that is no JSON, with neurons and a second signal. ``answers.json`` holds what
that commit answered to the queries in it, without the columns that came later.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import afn_ray
from afn_ray.fingerprints import fingerprint
from afn_ray.store import manifest

DATA = Path(__file__).parents[1] / "data"
ANSWERS: dict[str, tuple[str, list[list[Any]]]] = json.loads((DATA / "answers.json").read_text())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(DATA / "store", tmp_path_factory.mktemp("kept") / "store")


@pytest.mark.parametrize("name", ANSWERS)
def test_an_earlier_store_gives_the_answers_of_its_time(store: Path, name: str) -> None:
    query, expected = ANSWERS[name]
    with afn_ray.open_run(str(store)) as run:
        rows = [list(row) for row in run.sql(query).fetchall()]
    assert json.loads(json.dumps(rows, default=str)) == expected


def test_an_earlier_store_is_whole_and_nothing_of_it_is_garbage(store: Path) -> None:
    assert not afn_ray.verify_store(str(store)).findings
    found = afn_ray.collect_garbage(str(store), keep=1, min_age_h=0)
    assert not found.runs and not found.shards


def test_the_measure_of_an_earlier_store_has_the_fingerprint_that_it_had(store: Path) -> None:
    run = manifest.find_run(str(store))
    recorded = dict(run.info["measure"])
    assert fingerprint({k: v for k, v in recorded.items() if k != "id"}) == recorded["id"]
    assert (store / "shards" / recorded["id"]).is_dir()


def test_an_earlier_vocabulary_does_not_say_how_sure_its_classes_are(store: Path) -> None:
    with afn_ray.open_run(str(store)) as run:
        counts = run.sql(
            "SELECT count(*) > 0, count(class_confidence), count(is_ambiguous) FROM vocabulary"
        ).fetchall()
    assert counts == [(True, 0, 0)]
