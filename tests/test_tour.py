"""The notebook of the guide runs as it is, and its outputs are those of the code.

After a change on purpose: ``AFN_FREEZE=1 python -m pytest -n 0 tests/test_tour.py`` writes the
outputs anew; look at the difference.
"""

from __future__ import annotations

import copy
import html
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import nbclient
import nbformat
import pytest

import warm_workers

TOUR = Path(__file__).parents[1] / "infra" / "guide" / "tour.ipynb"
PNG = "iVBORw0KGgo"
"""Beginning of a PNG picture in base64."""


def tour() -> Any:
    return nbformat.reads(TOUR.read_text("utf-8"), as_version=4)


def executed(notebook: Any, folder: Path) -> Any:
    """``notebook`` after a run of all its cells in a process, a warm fork, and a folder of its
    own.
    """
    found = copy.deepcopy(notebook)
    where = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        found, timeout=300, kernel_name="python3", resources=where, record_timing=False
    )
    with mock.patch.object(sys, "executable", warm_workers.choose(has_faults=False)):
        client.execute()
    found.metadata = notebook.metadata
    for cell in found.cells:
        for output in cell.get("outputs", ()):
            if len(output.get("data", {})) > 1:  # a table or a picture says the same
                output.data.pop("text/plain", None)
    return found


def values(output: Any) -> list[str | float]:
    """Values that ``output`` shows, in order: texts, and numbers as
    numbers; a picture is one word.
    """
    if output.output_type == "stream":
        return [output.text]
    shown = output.data
    if "image/png" in shown:
        return ["a picture" if shown["image/png"].startswith(PNG) else "no picture"]
    text = shown.get("text/html", shown.get("text/plain"))
    found: list[str | float] = []
    for part in re.split(r"<[^>]*>|\s+", text):
        word = html.unescape(part).strip(",")
        if word:
            try:
                found.append(float(word.replace(",", "")))
            except ValueError:
                found.append(word)
    return found


def test_the_tour_runs_and_shows_what_it_showed(tmp_path: Path) -> None:
    """Figures may differ in their last digits on another processor."""
    before = tour()
    after = executed(before, tmp_path)
    if os.environ.get("AFN_FREEZE"):
        TOUR.write_text(nbformat.writes(after) + "\n", "utf-8")
        before = tour()
    num_tables = num_pictures = 0
    for cell, now in zip(before.cells, after.cells, strict=True):
        if cell.cell_type != "code":
            continue
        assert [o.output_type for o in cell.outputs] == [o.output_type for o in now.outputs]
        for old, new in zip(cell.outputs, now.outputs, strict=True):
            shown, again = values(old), values(new)
            assert len(shown) == len(again), cell.source
            for a, b in zip(shown, again, strict=True):
                same = pytest.approx(a, rel=0.02, abs=0.02) if isinstance(a, float) else a
                assert b == same, cell.source
            num_tables += "<table>" in new.get("data", {}).get("text/html", "")
            num_pictures += shown == ["a picture"]
    assert num_tables >= 7 and num_pictures == 2
    assert not list(tmp_path.iterdir())  # the tour removes what it makes


def test_the_tour_names_nothing_of_the_machine_that_ran_it() -> None:
    text = TOUR.read_text("utf-8")
    assert len(text) < 300_000
    for place in ("/tmp/", "/home/", "/root", "/work/", "site-packages", "file://"):
        assert place not in text
    assert socket.gethostname() not in re.sub(r'"image/png": "[^"]*"', "", text)
