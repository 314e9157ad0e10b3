"""A soak of 90 seconds; ``soak.py`` asks for longer ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from drivers import Drivers
from ground import make_ground
from hosts import Chaos
from monkey import Soak

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_no_row_is_lost_or_doubled_whatever_the_monkey_does(
    tmp_path: Path, tiny_bert: Path, verses: list[str], s3_server: str
) -> None:
    seconds = 60 * float(os.environ.get("AFN_SOAK_MINUTES", "1.5"))
    grounds = []
    for kind in ("local", "s3"):
        (tmp_path / kind).mkdir()
        grounds.append(make_ground(kind, tmp_path / kind, tiny_bert, verses))
    chaos = Chaos.of(tmp_path)
    drivers = Drivers(tmp_path / "drivers", chaos.environment)
    soak = Soak(grounds, chaos, drivers, int(os.environ.get("AFN_SOAK_SEED", "0")))
    soak.run(seconds)
    print(f"{soak.rounds} rounds, {soak.faults.total()} faults: {dict(soak.faults)}")
    assert soak.rounds >= 1 and soak.faults.total() >= seconds / 9  # 200 in half an hour
    assert soak.faults["kill at a point"]  # of drivers, and in a round on Ray of workers
