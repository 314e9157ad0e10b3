"""Collections, runs and verify --clean in every order of their calls: no complete run loses a file
it names.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from afn_ray.analysis import shard_check, verify
from afn_ray.config import RunConfig
from afn_ray.corpus_values import FileSlice, Shard
from afn_ray.errors import Interrupted, StoreError
from afn_ray.run_info import RunInfo
from afn_ray.store import (
    checksums,
    epochs,
    garbage,
    layout,
    manifest,
    orphans,
    parquet,
    run_claims,
    shard_files,
    storage,
)
from afn_ray.store.commits import Commit
from afn_ray.store.layout import ShardKey
from afn_ray.store.plans import Plan
from conftest import RUN_INFO, make_measure
from interleavings import NOW_S, STORE, Inline, Process, World, explore, explore_switches, sample

CONFIG = RunConfig(corpus=("/c",), model="m", store=STORE, allow_another_measure=True)
MEASURE = make_measure([1])
ID = MEASURE.id
COUNTS = {"documents": 1, "tokens": 1, "forward_tokens": 1}
SHORT = 20
"""Random orders of a scenario in the short run."""
LONG, LONG_AT_RANDOM = 20_000, 2_000
"""Most tries of the long run at all orders of a scenario, and its number of random orders."""


LEFT = "e" * 16
"""An attempt that died. Its files stay in a shard that was spared, for as long as a run lists
that.
"""


class Wrong(AssertionError):
    """The protocol is broken: something that is needed was deleted."""


@functools.cache
def shard(name: str) -> Shard:
    piece = FileSlice(
        f"/c/{name}", 1, "v", "jsonl", "", 0, 1, 1, 1, sha256(name.encode()).hexdigest()
    )
    return Shard.of([piece], CONFIG.read_options)


def plan_of(*names: str) -> Plan:
    return Plan(tuple(map(shard, names)), (), (), 0)


# --- the processes, of the product's own code
# --------------------------------------------------------------


def begin(*names: str) -> run_claims.Claim:
    return run_claims.begin_run(CONFIG, MEASURE, plan_of(*names), 0)


def measure(tables: dict[str, tuple[Path, int]], attempt: Iterator[str], one: Shard) -> Commit:
    """Does what a worker does."""
    found = shard_files.read_commit(STORE, ID, one.id, one.generation)
    if found is not None:
        return found
    finished = shard_files.Attempt(next(attempt), tables, COUNTS, 1.0, {})
    return shard_files.publish(STORE, ID, one, finished)


@dataclass(frozen=True)
class Driver:
    """Does what ``job.run`` does with a store."""

    tables: dict[str, tuple[Path, int]]
    attempt: Iterator[str]

    def run(self, *names: str) -> str:
        """The name of the run, which is complete."""
        return self.go_on(begin(*names))

    def go_on(self, claim: run_claims.Claim) -> str:
        if not claim.run.info:
            commits = shard_files.find_commits(STORE, ID, claim.shards)
            for one in claim.shards:
                if one.id not in commits:
                    commits[one.id] = measure(self.tables, self.attempt, one)
            self.end(claim.run, [commits[one.id] for one in claim.shards])
        if claim.lease is not None:
            storage.delete([claim.lease])
        return claim.run.id

    def end(self, run: manifest.RunFolder, commits: list[Commit]) -> None:
        for commit in commits:  # the reduce
            file = commit.files["summary"]
            shard_files.read_file(STORE, ID, commit.shard, file["name"], file["sha256"])
        rows = [
            {f"{t}_file": f"shards/{ID}/{c.shard}/{c.files[t]['name']}" for t in c.files}
            for c in commits
        ]
        tables = {"shards": manifest.write_table(run, "shards", pa.Table.from_pylist(rows))}
        info: RunInfo = {"measure": MEASURE.as_dict(), "layers": [1], "tables": tables}
        manifest.finish_run(run, {**RUN_INFO, **info})


def collect(min_age_h: float = 0) -> garbage.Garbage:
    return garbage.collect_garbage(STORE, keep=1, min_age_h=min_age_h, delete=True)


def clean() -> None:
    """Does what ``verify --clean`` does after its checks, without any patience."""
    there = layout.sort_files(STORE, storage.list_below(STORE))
    epoch = epochs.newest(STORE)
    checked = {}
    for place, files in there.shards.items():
        commits = dict(orphans.commits_of(STORE, place))
        named = {str(file["name"]) for commit in commits.values() for file in commit.files.values()}
        names = {file.uri.rpartition("/")[2]: file for file in files}
        unnamed = [
            f for n, f in names.items() if n not in named and layout.generation_of(n) is None
        ]
        checked[place] = shard_check.CheckedShard(commits, [], unnamed)
    plans, age = orphans.Plans(), orphans.Age(NOW_S, 0.0)
    loose = list(verify._of_shards(STORE, checked, epoch, plans, age))
    orphans.cleaned(STORE, loose, plans, age)


# --- what must hold
# ----------------------------------------------------------------------------------------


@functools.cache
def json_of(data: bytes) -> dict[str, Any]:
    return checksums.parse_json(data, "run.json")


def complete_runs(world: World) -> dict[str, dict[str, Any]]:
    found = {}
    for name in list(world.files):
        if name.endswith("/run.json"):
            body = json_of(world.files[name])
            if "condemned" not in body:
                found[name.split("/")[-2]] = body
    return found


def named_by(world: World, run: str, info: dict[str, Any]) -> Iterator[str]:
    """Files that the complete run needs, read without the product's readers."""
    for table in info["tables"].values():
        yield f"{STORE}/runs/{run}/{table['name']}"
    data = world.files.get(f"{STORE}/runs/{run}/{info['tables']['shards']['name']}")
    for row in [] if data is None else parquet.read(data).to_pylist():
        yield from (f"{STORE}/{name}" for name in row.values())


def check_whole(world: World) -> None:
    for run, info in complete_runs(world).items():
        for name in named_by(world, run, info):
            if name not in world.files:
                raise Wrong(f"run {run} is complete and lacks {name}")


def check_delete(world: World) -> Callable[[str], None]:
    def check(name: str) -> None:
        for run, info in complete_runs(world).items():
            if name in named_by(world, run, info):
                raise Wrong(f"{name} is deleted, and the complete run {run} names it")

    return check


# --- stores and scenarios
# ----------------------------------------------------------------------------------


@dataclass
class Scenario:
    """A store, and the processes that go through it."""

    make: Callable[[Driver, World], list[Process]]
    before: Callable[[Driver], Any]
    may_fail: tuple[str, ...] = ()  # processes whose run another may have given up
    lost: str = ""  # "late" or "twice": what becomes of a DELETE of a shard's file
    at: int = 0  # of which
    # all orders of steps: a step is the listing of a store, or the tables that are written or
    # deleted in a row; else a step is one call
    coarse: bool = False
    switches: int | None = None  # only orders with at most so many interruptions of a process


def revived(driver: Driver) -> None:
    """A run of shard a that is old, and the newest one, of shard b: a is garbage."""
    driver.run("a")
    driver.run("b")


def two_garbage(driver: Driver) -> None:
    driver.run("a", "b")
    driver.run("b")


def in_the_way(driver: Driver) -> None:
    """The same, with files that an attempt at a has left behind."""
    revived(driver)
    for table in layout.TABLES:
        storage.upload(
            driver.tables[table][0],
            f"{shard_files.shard_uri(STORE, ID, shard('a').id)}/{LEFT}-{table}.parquet",
        )


def run_of(driver: Driver, *names: str) -> Process:
    return Process("run", lambda: driver.run(*names))


def two_gcs() -> list[Process]:
    return [Process("gc", collect), Process("gc 2", collect)]


def overtaken(driver: Driver, world: World) -> list[Process]:
    """A process has found the run of a the newest, and stood still; meanwhile that of b came, and a
    gc begins.
    """
    same, newest = run_claims.find_begun(CONFIG, MEASURE, plan_of("a"))
    assert same is not None
    driver.run("b")

    def run() -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_claims, "find_begun", lambda *args: (same, newest))
            claim = begin("a")
        return driver.go_on(claim)

    return [Process("run", run), Process("gc", lambda: collect(min_age_h=24))]


def half(driver: Driver) -> None:
    """A run of a that was killed between the commit and its reduce."""
    claim = begin("a")
    measure(driver.tables, driver.attempt, claim.shards[0])


def zombie(driver: Driver, world: World) -> list[Process]:
    """A driver has begun a run of a, and stood still for days; the run of b came, and a gc gives
    a's up.
    """
    claim = begin("a")
    driver.run("b")
    return [Process("run", lambda: driver.go_on(claim)), Process("gc", collect)]


SWITCHES = 2
"""Interruptions of processes in the orders that are all tried where there are three processes."""
EACH_OTHER = ("gc", "gc 2")
"""Collections that may give up because of each other."""
SCENARIOS = {
    "gc and run": Scenario(lambda d, w: [Process("gc", collect), run_of(d, "a")], revived),
    "gc and a run of more": Scenario(lambda d, w: [Process("gc", collect), run_of(d, "a", "b")],
                                     two_garbage),
    "gc and a run of what is kept": Scenario(lambda d, w: [Process("gc", collect), run_of(d, "b")],
                                             revived),
    "verify and run": Scenario(lambda d, w: [Process("verify", clean), run_of(d, "a", "c")],
                               revived),
    "verify and a resumed run": Scenario(lambda d, w: [Process("verify", clean), run_of(d, "a")],
                                         half),
    "gc and a run taken up": Scenario(overtaken, lambda d: d.run("a")),
    "gc and a half run taken up": Scenario(overtaken, half),
    "gc and a zombie": Scenario(zombie, lambda d: None, may_fail=("run",)),
    "two gcs": Scenario(lambda d, w: two_gcs(), revived, EACH_OTHER, coarse=True),
    "gc, verify and run": Scenario(
        lambda d, w: [Process("gc", collect), Process("verify", clean), run_of(d, "a")], in_the_way,
        switches=SWITCHES
    ),
    "two gcs and run": Scenario(
        lambda d, w: [*two_gcs(), run_of(d, "a")], revived, EACH_OTHER, switches=SWITCHES
    ),
    **{
        f"gc whose DELETE {at} acts {how}, and run": Scenario(
            lambda d, w: [Process("gc", collect), run_of(d, "a"), Process("echo", w.echo)], revived,
            lost=how, at=at
        )
        for how in ("late", "twice") for at in (0, 1)
    },
}  # fmt: skip
KILLS = range(0, 40)
"""Before which of its calls a gc is killed; it makes fewer."""


class Explorer:
    """Tries a scenario."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.tables = {}
        for table in layout.TABLES:
            path = folder / table
            path.write_bytes(table.encode())
            self.tables[table] = (path, 1)
        patch.setattr(garbage, "ThreadPoolExecutor", Inline)
        patch.setattr(shard_files, "ThreadPoolExecutor", Inline)
        patch.setattr(parquet, "read", functools.cache(parquet.read))

    def explore(self, name: str, most: int) -> tuple[int, bool]:
        # Two collections may make each other look again without an end.
        self.patch.setattr(garbage, "TRIES", 2)
        make, judge = self.scenario(name, coarse=True)
        if (switches := SCENARIOS[name].switches) is not None:
            return explore_switches(make, judge, switches), False
        return explore(make, judge, most)

    def sample(self, name: str, num: int, kill_at: int | None = None) -> int:
        return sample(*self.scenario(name, kill_at), range(num))

    def scenario(
        self, name: str, kill_at: int | None = None, *, coarse: bool = False
    ) -> tuple[Callable[[], World], Callable[[World], None]]:
        scenario, first = SCENARIOS[name], World()
        first.put_in_place(self.patch)
        scenario.before(Driver(self.tables, (f"{n:016x}" for n in itertools.count(1))))

        def make() -> World:
            world = World(coarse=scenario.coarse and coarse)
            world.put_in_place(self.patch)
            world.files.update(first.files)
            world.old = frozenset(first.files)
            driver = Driver(self.tables, (f"{n:016x}" for n in itertools.count(100)))
            processes = scenario.make(driver, world)
            world.on_delete.append(check_delete(world))
            world.lose(scenario.lost, scenario.at)
            for process in processes:
                process.killed_at = kill_at if process.name == "gc" else None
            world.start(*processes)
            return world

        def judge(world: World) -> None:
            self.judge(world, scenario, kill_at)

        return make, judge

    def judge(self, world: World, scenario: Scenario, kill_at: int | None) -> None:
        for process in world.processes:
            allowed = process.name in scenario.may_fail and isinstance(
                process.error, StoreError | Interrupted
            )
            if process.error is not None and not allowed:
                raise process.error
        check_whole(world)
        gone = {
            f.uri.rpartition("/")[2]
            for p in world.processes
            if isinstance(p.result, garbage.Garbage)
            for f in p.result.runs
        }
        gone |= {
            n.split("/")[-2]
            for n, data in world.files.items()
            if n.endswith("/run.json") and b"condemned" in data
        }
        for process in world.processes:
            if (
                isinstance(process.result, str)
                and process.result not in complete_runs(world).keys() | gone
            ):
                raise Wrong(f"run {process.result} was said to be complete")
        # Tomorrow: the same corpus, a collection that ends what one may have left, and a DELETE
        # that took a day.
        driver = Driver(self.tables, (f"{n:016x}" for n in itertools.count(1000)))
        name = driver.run("a")
        check_whole(world)
        collect()
        world.echo()
        clean()
        check_whole(world)
        assert list(complete_runs(world)) == [name]
        files = [n for n in world.files if "/shards/" in n]
        info = complete_runs(world)[name]
        commits = sum(layout.generation_of(n.rpartition("/")[2]) is not None for n in files)
        needed = set(named_by(world, name, info))
        if (
            commits != 1
            or not {n for n in files if n.endswith(".parquet") and LEFT not in n} <= needed
        ):
            raise Wrong(f"the store should hold one commit and its files, not {files}")


@pytest.fixture
def explorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Explorer:
    return Explorer(tmp_path, monkeypatch)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_of_calls_loses_a_file(explorer: Explorer, fuzz_length: str, name: str) -> None:
    if fuzz_length == "long":
        judged, all_of_them = explorer.explore(name, LONG)
        switches = SCENARIOS[name].switches
        which = "all that differ" if all_of_them else f"all with at most {switches} switches"
        print(f"{name}: {judged} orders, {which if all_of_them or switches else 'not all'}")
    assert explorer.sample(name, SHORT if fuzz_length == "short" else LONG_AT_RANDOM)


@pytest.mark.parametrize("name", ["gc and run", "gc and a half run taken up", "gc, verify and run"])
def test_a_collection_killed_at_any_call_loses_nothing(
    explorer: Explorer, fuzz_length: str, name: str
) -> None:
    for at in KILLS if fuzz_length == "long" else KILLS[::3]:
        assert explorer.sample(name, 1 if fuzz_length == "short" else 200, kill_at=at)


# --- the check finds what was wrong
# ------------------------------------------------------------------------


def nothing_claimed(look: Any) -> tuple[list[str], set[ShardKey]]:
    return [], set()


def reused_name(patch: pytest.MonkeyPatch) -> None:
    """Commits of all generations have one name."""
    for module in (layout, shard_files):
        patch.setattr(module, "commit_name", lambda generation: "commit.json")


def epoch_first(patch: pytest.MonkeyPatch) -> None:
    """A run reads the epoch ahead of its claim."""
    begun, newest = run_claims.find_begun, epochs.newest
    read: dict[int, epochs.Epoch] = {}

    def find(*args: Any) -> Any:
        read[threading.get_ident()] = newest(STORE)
        return begun(*args)

    patch.setattr(run_claims, "find_begun", find)
    patch.setattr(
        epochs,
        "newest",
        lambda store: read.pop(threading.get_ident(), None) or newest(store),
    )


BROKEN: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "gc looks once": ("gc and run", lambda p: p.setattr(garbage, "_claimed", nothing_claimed)),
    "a run looks before its claim": ("gc and run", epoch_first),
    "a name is used again": ("gc whose DELETE 0 acts twice, and run", reused_name),
    "a name is used again beside two gcs": ("two gcs and run", reused_name),
    "verify removes what no commit names": (
        "verify and run",
        lambda p: p.setattr(orphans, "may_remove", lambda *a, **k: True),
    ),
    "a run that was given up can end": (
        "gc and a zombie",
        lambda p: p.setattr(manifest, "condemn_run", lambda *a, **k: True),
    ),
    "a lease counts for nothing": (
        "gc and a half run taken up",
        lambda p: p.setattr(layout, "LEASE", re.compile("no-file")),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_protocol_that_lacks_a_step_is_found_out(explorer: Explorer, name: str) -> None:
    scenario, breaks = BROKEN[name]
    breaks(explorer.patch)
    with pytest.raises((Wrong, StoreError, Interrupted)):
        explorer.sample(scenario, 3000)


def two_processes(
    body: Callable[[World, str], None], names: tuple[str, str]
) -> Callable[[], World]:
    def make() -> World:
        world = World()
        world.start(
            *(Process(str(i), functools.partial(body, world, name)) for i, name in enumerate(names))
        )
        return world

    return make


@pytest.mark.parametrize(("names", "expected"), [(("x", "x"), 20), (("x", "y"), 1)])
def test_orders_are_tried_once_each(names: tuple[str, str], expected: int) -> None:
    """Two processes of three writes: 6 over 3 orders of the same name, and one where no order can
    be told.
    """
    seen = set()

    def body(world: World, name: str) -> None:
        for _ in range(3):
            who = threading.current_thread().name  # no two moments are equal
            world.write_over(f"{STORE}/{name}", f"{who} {len(world.history)}".encode())

    judged, all_of_them = explore(
        two_processes(body, names), lambda world: seen.add(tuple(world.history))
    )
    assert all_of_them and judged == len(seen) == expected


def test_orders_that_meet_in_an_equal_moment_lose_no_end() -> None:
    """Two processes add 1 and 2 to a number, twice each: every number that one of the 70 orders
    gives is found.
    """
    steps = {0: 1, 1: 2}
    expected = set()
    for order in itertools.permutations((0, 0, 0, 0, 1, 1, 1, 1)):
        number, read = 0, {}
        for at, process in enumerate(order):
            if order[:at].count(process) % 2 == 0:
                read[process] = number
            else:
                number = read[process] + steps[process]
        expected.add(number)
    found: list[int] = []

    def body(world: World, name: str) -> None:
        for _ in range(2):
            number = int(world.read_if_there(f"{STORE}/x") or b"0")
            world.write_over(f"{STORE}/x", str(number + int(name)).encode())

    judged, all_of_them = explore(
        two_processes(body, ("1", "2")), lambda world: found.append(int(world.files[f"{STORE}/x"]))
    )
    assert all_of_them and set(found) == expected and judged < 70
