"""Iceberg catalogs of an export: whose table is refused, and what is for later."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import afn_ray
from afn_ray.errors import ConfigError, Interrupted
from afn_ray.query.database import Run

STORE = Path(__file__).parents[1] / "data" / "store"


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with afn_ray.open_run(str(STORE)) as run:
        yield run


def test_an_iceberg_table_of_others_and_wrong_catalogs_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(target: str, words: str, name: str = "a.b", catalog: str | None = None) -> None:
        table = afn_ray.IcebergTable(name, catalog)
        with pytest.raises(ConfigError, match=words):
            afn_ray.export(run, target, "thresholds", format="iceberg", iceberg=table)

    catalog = f"sqlite:///{tmp_path}/c.db"
    table = afn_ray.IcebergTable("a.b", catalog)
    afn_ray.export(run, str(tmp_path / "1"), "classes", format="iceberg", iceberg=table)
    refused(str(tmp_path / "2"), "is there and not of this export", catalog=catalog)
    refused(str(tmp_path / "3"), "expected a namespace and a name", name="b")
    refused(str(tmp_path / "4"), "holds credentials", catalog="postgresql://me:secret@host/db")
    refused(str(tmp_path / "1"), "holds credentials", catalog="postgresql://me:secret@host/db")
    refused(
        str(tmp_path / "5"), "catalog sqlite:////no/such/c.db", catalog="sqlite:////no/such/c.db"
    )
    refused("memory://bucket/6", "needs a catalog")
    refused(str(tmp_path / "a#b"), "has a '#' in its path")
    monkeypatch.setitem(sys.modules, "pyiceberg.catalog", None)
    refused(str(tmp_path / "7"), r'pip install "afn-ray\[iceberg\]"')
    for number in range(2, 8):
        assert not (tmp_path / str(number)).exists()


def test_a_table_of_a_catalog_is_of_one_target(run: Run, tmp_path: Path) -> None:
    table = afn_ray.IcebergTable("a.b", f"sqlite:///{tmp_path}/c.db")
    options: dict[str, Any] = {"format": "iceberg", "iceberg": table}
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    afn_ray.export(run, one, "thresholds", **options)
    with pytest.raises(
        ConfigError, match=r"and not of this export to .*/other; name another table"
    ):
        afn_ray.export(run, other, "thresholds", **options)
    assert not Path(other).exists()


class Away(BaseHTTPRequestHandler):
    """A catalog whose service is away."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_catalog_that_is_away_is_for_later(run: Run, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), Away) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        table = afn_ray.IcebergTable("a.b", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(Interrupted, match="run the same command again") as error:
            afn_ray.export(run, str(tmp_path / "t"), format="iceberg", iceberg=table)
        server.shutdown()
    assert error.value.exit_code == 75 and not (tmp_path / "t").exists()
