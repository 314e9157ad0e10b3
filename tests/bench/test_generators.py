"""Tests of the benchmarks that need a checkout: their command line and their figures."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from afn_ray import cgroup
from afn_ray.bench import machine, write_json
from afn_ray.errors import AfnError, ConfigError
from afn_ray.query.database import open_run
from bench import commands, demo, groups, reduce, sql
from bench import signals as bench_signals
from conftest import benchmark, printed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "benchmark.py"


def test_the_script_sends_here_what_is_measured_in_a_checkout_alone() -> None:
    (subcommands,) = (a.choices for a in commands.parser()._actions if a.choices)
    assert set(runpy.run_path(str(SCRIPT))["OF_A_CHECKOUT"]) == set(subcommands)
    done = subprocess.run(
        [sys.executable, SCRIPT, "sql", "--rows", "9999"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--rows is 9999; expected at least 10000" in done.stderr


def test_without_a_checkout_the_script_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    alone = shutil.copy(SCRIPT, tmp_path / "jobs")
    for what, says in {
        "simulate": "simulate is measured in a checkout of the repository alone: there is no",
        "simulat": "invalid choice: 'simulat'",
    }.items():
        done = subprocess.run([sys.executable, alone, what], capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("safety --shards 9", "--shards is 9; expected at least 10"),
        ("simulate --shards 0", "--shards is 0; expected at least 1"),
        ("signals --tokens 3", "--tokens is 3"),
        ("demo --json /nowhere/at/all", "no folder"),
    ],
)
def test_what_is_asked_wrongly_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        commands.call(commands.parser().parse_args(words.split()))


def test_what_signals_cost_is_measured_on_the_same_shards(
    tiny_bert: Path, tiny_mpnet: Path, tmp_path: Path
) -> None:
    words = ("signals", "--model", str(tiny_bert), "--tokens", "600", "--repeat", "2")
    result, table, _ = benchmark(commands.main, tmp_path, *words)
    found = result["variants"]
    assert list(found) == [
        "strength",
        "strength, layers 0 to k",
        "+ shift",
        "+ centred",
        "+ trimmed",
        "+ centred_mean",
        "+ attention",
        "+ neurons",
    ]
    assert all(
        len(v["tokens_per_second"]) == len(v["cost"]) == 2 and min(v["cost"]) > -1
        for v in found.values()
    )
    assert found["strength"]["cost"] == [0, 0] and result["tokens"] > 200
    assert found["+ neurons"]["bytes_per_token"].keys() - found["strength"][
        "bytes_per_token"
    ].keys() == {"neurons", "pairs"}
    assert "A sweep of all layers costs" in table
    notes: list[str] = []
    padded = bench_signals.measure(str(tiny_mpnet), "2/3", 200, "cpu", 1, notes.append)
    assert "+ attention" not in padded["variants"] and any(
        "+ attention is left out" in n for n in notes
    )


def test_a_demo_is_measured_with_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures a short command instead of a demo, and renders the rows of three demos."""
    work = "import time; x = bytes([1]) * (200 << 20); time.sleep(1.5)"
    seconds, peak = demo.timed([sys.executable, "-c", work])
    assert seconds > 1.5 and 200 << 20 < peak < 400 << 20
    with pytest.raises(AfnError, match="left with 3"):
        demo.timed([sys.executable, "-c", "raise SystemExit(3)"])
    rows = iter(
        [{"demo, s": 3.0, "x": 1.0}, {"demo, s": 1.0, "x": 5.0}, {"demo, s": 2.0, "x": 3.0}]
    )
    monkeypatch.setattr(demo, "_measured", lambda workers: next(rows))
    out = StringIO()
    demo.render(demo.measure(None, 3, lambda note: None), Console(file=out, width=200))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["demo,", "s", "2.000", "(1.000-3.000)"] in lines and [
        "x",
        "3.000",
        "(1.000-5.000)",
    ] in lines


# --- the reduce


@pytest.mark.ray
def test_the_reduce_is_measured_on_the_same_summaries_in_different_orders(tmp_path: Path) -> None:
    notes: list[str] = []
    result = reduce.measure(70, 40, 1, notes.append)
    assert result["identical"] and result["shards"] == 70 and 70 * 20 <= result["tokens"] <= 70 * 60
    assert [n.split(":")[0] for n in notes[1:]] == ["inline 1/1", "ray 1/1"]
    (inline,), (ray,) = result["rounds"]["inline"], result["rounds"]["ray"]
    assert inline["types"] == ray["types"] == result["types"] > 100
    for figures in (inline, ray):
        assert figures["driver_bytes"] >= figures["before_bytes"] > 10 << 20
        assert figures["seconds"] > 0 and figures["peak_bytes"] > 10 << 20
    assert "have the same bits" in printed(reduce.render, result)
    assert "DIFFER" in printed(reduce.render, {**result, "identical": False})
    write_json(tmp_path / "figures.json", result)


def test_generated_summaries_are_those_of_their_number_alone(tmp_path: Path) -> None:
    """The summaries do not depend on the number of shards, or on how processes share the work."""
    rows = reduce._write(str(tmp_path / "a"), range(4), 100)
    assert reduce._write(str(tmp_path / "b"), range(2, 4), 100) == rows[2:]
    assert len({row["sha256"] for row in rows}) == 4
    assert [row["documents"] for row in rows] == [
        -(-row["tokens"] // reduce.DOCUMENT_TOKENS) for row in rows
    ]


def test_a_reduce_that_fails_gives_no_figures(tmp_path: Path) -> None:
    with pytest.raises(AfnError, match=r"-m bench\.reduce .* left with 1"):
        reduce._watched(str(tmp_path), "inline", 0)


# --- queries


def test_questions_are_asked_of_a_true_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reduce and one query have processes of their own; the others are called here."""
    apart, was_apart = sql._apart, set()
    called: dict[str, Callable[..., dict[str, Any]]] = {"reduce": sql.finish, "ask": sql.ask}

    def call(command: str, *given: str) -> dict[str, Any]:
        if command not in was_apart:
            was_apart.add(command)
            return apart(command, *given)
        arguments: list[Any] = [int(each) if each.isdigit() else each for each in given]
        return {**called[command](*arguments), "foreign": 0.0}

    monkeypatch.setattr(sql, "_apart", call)
    monkeypatch.setattr(cgroup, "num_cores", lambda: 1)  # one process writes the shards
    notes: list[str] = []
    result = sql.measure(120_000, 2, notes.append)
    assert result["rows"] == 120_000 and [r["shards"] for r in result["reduces"]] == [1, 5, 5]
    assert list(result["questions"]) == list(sql.QUESTIONS)
    for question, figures in result["questions"].items():
        assert figures["rows"] > 0 or "rare" in question, question
        assert (
            len(figures["seconds"]) == 2
            and min(figures["seconds"]) > 0
            and figures["peak_bytes"] > 10 << 20
        )
    assert result["questions"]["100 occurrences of a frequent word"]["rows"] > 50
    assert "every word of the run" in printed(sql.render, result)


def test_generated_shards_hold_what_the_views_expect(tmp_path: Path) -> None:
    store = str(tmp_path)
    sql.write_shard(store, 0, 50)
    done = sql.finish(store, 0, 1)
    with open_run(done["run"]) as run:
        assert run.sql("SELECT count(*), count(DISTINCT doc) FROM tokens").fetchall() == [
            (10_000, 50)
        ]
        [(words, alone)] = run.sql(
            "SELECT count(*), count(*) FILTER (n_tokens = 1) FROM words"
        ).fetchall()
        assert 0.7 < words / (10_000 - 100) < 0.9 and 0.6 < alone / words < 0.95
        quartiles = (
            "SELECT quantile_disc(strength_8, [0.25, 0.5, 0.75]) FROM tokens WHERE NOT is_special"
        )
        [(found,)] = run.sql(quartiles).fetchall()
        assert [tuple(found)] == run.sql(
            "SELECT q1, q2, q3 FROM thresholds WHERE population = 'tokens'"
        ).fetchall()


def test_groups_are_reduced_without_and_with_them_in_turn(tmp_path: Path) -> None:
    sql.write_shard(str(tmp_path), 0, 6, num_groups=3)
    found = {name: groups._reduce(str(tmp_path), 1, by) for name, by in groups.CALLS.items()}
    assert [row["groups"] for row in found.values()] == [0, 3]
    rounds = {name: [row | {"peak_bytes": 1}] for name, row in found.items()}
    result = {**machine.facts("cpu"), "tokens": 1200, "groups": 3, "repeat": 1, "rounds": rounds}
    assert "1,200 tokens of 3 groups in turn" in printed(groups.render, result)
