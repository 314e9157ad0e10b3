"""The model of the store's protocol: every order of the calls of one gc, one run and one
``verify --clean`` leaves every complete run whole.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import protocol
import test_gc_interleavings as real
from afn_ray.store import epochs, layout, manifest, plans, shard_files
from interleavings import STORE, World, sample
from protocol import Body, Files, GivenUp, Live, Protocol, Wrong, alone, explore

OLD_RUN = {
    "runs/1/plan": ("a",),
    "runs/1/run": ("complete", ("shards/a/old",)),
    "shards/a/commit-0": "shards/a/old",
    "shards/a/old": "rows",
}
"""A complete run of shard a."""
NEW_RUN = {
    "runs/2/plan": ("b",),
    "runs/2/run": ("complete", ("shards/b/new",)),
    "shards/b/commit-0": "shards/b/new",
    "shards/b/new": "rows",
}
"""The newest complete run, of shard b: the one before, and shard a, are garbage."""
LEFT = {"shards/a/left": "rows"}
"""A file of an attempt that died."""


Make = Callable[[Protocol], Body]
WHOLE = Protocol()


@dataclass(frozen=True)
class Scenario:
    """A store, and the processes that go through it."""

    files: Files
    processes: tuple[Make, ...]
    protocol: Protocol = WHOLE
    may_give_up: frozenset[int] = frozenset()
    """Processes whose work another one may give up."""
    echo: bool = False
    """Each DELETE of a file of a shard may act once more at any later time."""


def check(scenario: Scenario, files: Files, processes: list[Live]) -> None:
    """Invariants of every state, and tomorrow if all processes die in it."""
    whole(files)
    for i, process in enumerate(processes):
        allowed = isinstance(process.error, GivenUp) and i in scenario.may_give_up
        if process.error is not None and not allowed:
            raise Wrong(f"process {i}: {process.error}")
        if isinstance(process.result, str) and f"runs/{process.result}/run" not in files:
            raise Wrong(f"run {process.result} was said to be complete")
    tomorrow(frozenset(files.items()))


def whole(files: Files) -> None:
    """Every complete run has its plan and the files that it names."""
    for name, state in files.items():
        if name.endswith("/run") and state[0] == "complete":
            for needed in (*state[1], f"{name.removesuffix('run')}plan"):
                if needed not in files:
                    raise Wrong(f"{name} says complete and {needed} is not there")


@functools.cache
def tomorrow(files: frozenset[tuple[str, Any]]) -> None:
    """The same run again, then a run of another shard, each with a gc and a ``verify --clean``.

    Both runs are complete, and nothing is left of the first.
    """
    now, how = dict(files), Protocol()
    for day, shard in (("8", "a"), ("9", "z")):
        try:
            name = alone(now, protocol.run(how, (shard,), day, f"day {day}"))
            whole(now)
            alone(now, protocol.gc(how))
            alone(now, protocol.clean(how))
        except GivenUp as error:
            raise Wrong(f"day {day}: {error}") from error
        whole(now)
        if now.get(f"runs/{name}/run", ("",))[0] != "complete":
            raise Wrong(f"run {name} of day {day} is not complete")
    left = {file for file in now if file.startswith("shards/")}
    if left != {"shards/z/day 9", *protocol.commits_in(now, "z")}:
        raise Wrong(f"only files of run {name} should be left, not {left}")


GC, CLEAN = protocol.gc, protocol.clean
GARBAGE = OLD_RUN | NEW_RUN
HALF_RUN = {name: value for name, value in OLD_RUN.items() if not name.endswith("/run")}
"""A run of shard a that was killed between its commit and its end."""
PATIENT = Protocol(old=frozenset(GARBAGE | LEFT))
"""A minimum age: what was in the store is old enough, what the processes write is not."""


def run_of(*shards: str) -> Make:
    return lambda how: protocol.run(how, shards)


def taken_up(how: Protocol) -> Body:
    """A process has found run 1 the newest, and goes on only now."""
    return protocol.go_on(how, ("a",), "1")


def zombie(how: Protocol) -> Body:
    """A process that has looked at the epochs days ago goes on with run 1."""
    yield from protocol.complete(how, "1", ("a",), (0,), "x")
    return "1"


SCENARIOS = {
    "gc, verify and run": Scenario(GARBAGE | LEFT, (GC, CLEAN, run_of("a"))),
    "gc, verify and a run of more": Scenario(GARBAGE | LEFT, (GC, CLEAN, run_of("a", "c"))),
    "gc, verify and a run of what is kept": Scenario(GARBAGE | LEFT, (GC, CLEAN, run_of("b"))),
    "gc, verify and a run of a new shard": Scenario(GARBAGE | LEFT, (GC, CLEAN, run_of("c"))),
    "gc, verify and a half run": Scenario(HALF_RUN | LEFT, (GC, CLEAN, run_of("a"))),
    "gc, verify and a run taken up": Scenario(GARBAGE | LEFT, (GC, CLEAN, taken_up), PATIENT),
    "gc, verify and a half run taken up": Scenario(
        HALF_RUN | NEW_RUN | LEFT, (GC, CLEAN, taken_up), PATIENT
    ),
    "gc, verify and a zombie": Scenario(
        HALF_RUN | NEW_RUN | LEFT, (GC, CLEAN, zombie), may_give_up=frozenset({2})
    ),
    "gc, verify and run, and DELETEs that act again": Scenario(
        GARBAGE | LEFT, (GC, CLEAN, run_of("a")), echo=True
    ),
    "two gcs and run": Scenario(GARBAGE, (GC, GC, run_of("a")), may_give_up=frozenset({0, 1})),
}
LONG = (
    "gc, verify and a run of more",
    "gc, verify and a run of a new shard",
    "gc, verify and run, and DELETEs that act again",
    "two gcs and run",
)
"""Scenarios that only the long run has: each takes from 20 to 60 seconds."""


def explored(scenario: Scenario) -> tuple[int, set[frozenset[tuple[str, Any]]]]:
    bodies = tuple(functools.partial(make, scenario.protocol) for make in scenario.processes)
    return explore(scenario.files, bodies, functools.partial(check, scenario), echo=scenario.echo)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_of_calls_loses_a_file(name: str, fuzz_length: str) -> None:
    if fuzz_length == "short" and name in LONG:
        pytest.skip("this scenario is in the long run")
    states, ends = explored(SCENARIOS[name])
    print(f"{name}: {states:,} states, {len(ends)} ends")
    assert ends


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "gc looks once": ("gc, verify and run", {"look_again": False}),
    "a run looks before its claim": ("gc, verify and run", {"claim_first": False}),
    "a name is used again": (
        "gc, verify and run, and DELETEs that act again",
        {"generations": False},
    ),
    "verify removes what no commit names": ("gc, verify and run", {"plans": False}),
    "a run that was given up can end": ("gc, verify and a zombie", {"condemn": False}),
    "a lease counts for nothing": ("gc, verify and a half run taken up", {"leases": False}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_protocol_that_lacks_a_step_is_found_out(name: str) -> None:
    scenario, without = BROKEN[name]
    found = SCENARIOS[scenario]
    with pytest.raises(Wrong):
        explored(replace(found, protocol=replace(found.protocol, **without)))


def model_of(files: dict[str, bytes]) -> frozenset[tuple[str, Any]]:
    """Content of a store in memory, in the names of the model."""
    names = {real.shard(name).id: name for name in "abc"}
    attempts = {f"{1:016x}": "old", real.LEFT: "left"}
    folders = sorted({name.split("/")[-2] for name in files if "/runs/" in name})
    runs = dict(zip(folders, ("1", "2", "5"), strict=False))
    found: dict[str, Any] = {}

    def in_shard(uri: str) -> str:
        *_, shard, file = uri.split("/")
        if names[shard] == "b":
            return "shards/b/new"
        return f"shards/{names[shard]}/{attempts.get(file.partition('-')[0], 'x')}"

    for uri in sorted(name for name in files if "/runs/" in name):
        *_, run, file = uri.split("/")
        number = runs[run]
        if file == "plan.parquet":
            shards = plans.read_shards(manifest.RunFolder(uri[: -len(file) - 1], "", run, {}))[0]
            found[f"runs/{number}/plan"] = tuple(names[shard.id] for shard in shards)
        elif file == "run.json":
            info = manifest.open_folder(STORE, run)
            if info.condemned:
                found[f"runs/{number}/run"] = ("condemned",)
                continue
            rows = manifest.read_table(info, "shards").to_pylist()
            found[f"runs/{number}/run"] = (
                "complete",
                tuple(in_shard(row["tokens_file"]) for row in rows),
            )
        elif layout.LEASE.fullmatch(file):
            found[f"runs/{number}/lease-x"] = ()
    for uri in (name for name in files if "/shards/" in name):
        *_, measure, shard, file = uri.split("/")
        generation = layout.generation_of(file)
        if generation is None:
            found[in_shard(uri)] = "rows"
            continue
        commit = shard_files.read_commit(STORE, measure, shard, generation)
        assert commit is not None
        tokens = in_shard(f"{shard}/{commit.files['tokens']['name']}")
        found[f"shards/{names[shard]}/commit-{generation}"] = tokens
    for uri in (name for name in files if "/gc/" in name):
        epoch = epochs.newest(STORE)
        assert uri.endswith(f"/{epoch.number:08d}.parquet")
        found[f"gc/{epoch.number}"] = (
            epoch.number,
            frozenset((names[shard], n) for (_, shard), n in epoch.generations().items()),
            frozenset(runs[run] for run in epoch.condemned),
        )
    return frozenset(found.items())


AS_THE_CODE = {
    "gc and run": Scenario(GARBAGE, (GC, run_of("a"))),
    "gc and a half run taken up": Scenario(HALF_RUN | NEW_RUN, (taken_up, GC), PATIENT),
    "gc and a run taken up": Scenario(GARBAGE, (taken_up, GC), PATIENT),
    "verify and a resumed run": Scenario(HALF_RUN, (CLEAN, run_of("a"))),
    "gc, verify and run": SCENARIOS["gc, verify and run"],
}
"""Scenarios of the model by their name in ``test_gc_interleavings``."""


@pytest.mark.parametrize("name", AS_THE_CODE)
def test_what_the_code_leaves_is_an_end_of_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuzz_length: str
) -> None:
    """The product's own code runs in random orders."""
    _, ends = explored(AS_THE_CODE[name])
    make, _ = real.Explorer(tmp_path, monkeypatch).scenario(name)
    found = set()

    def judge(world: World) -> None:
        end = model_of(world.files)
        found.add(end)
        assert end in ends, dict(end)

    sample(make, judge, range(20 if fuzz_length == "short" else 2000))
    print(f"{name}: {len(found)} of the model's {len(ends)} ends seen")


def test_the_state_of_a_process_is_what_its_variables_show() -> None:
    """No ``for`` loop holds a call: its iterator would be a part of the state that is not seen."""
    for node in ast.walk(ast.parse(inspect.getsource(protocol))):
        if not isinstance(node, ast.FunctionDef) or ast.unparse(node.returns or node) != "Body":
            continue
        for loop in ast.walk(node):
            if isinstance(loop, ast.For):
                held = {type(inner) for inner in ast.walk(loop)}
                assert not held & {ast.Yield, ast.YieldFrom}, ast.unparse(loop)
