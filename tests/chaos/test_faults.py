"""Whatever dies, lies, hangs or fills up on one machine: the store holds every token once, or the
run says what lacks.

Each fault is met on a local disk and on S3; each test ends with a store that ``afn verify`` finds
whole and, where the run is complete, with the rows of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import afn_ray
import faults
from afn_ray.analysis import verify
from afn_ray.errors import IncompleteRun, Interrupted
from afn_ray.runs.cluster import connection
from afn_ray.runs.events import Event, Planned, Starting
from afn_ray.store import manifest, shard_files, uris
from conftest import race_attempts, recorded
from drivers import Drivers
from ground import NUM_SHARDS, Ground
from hosts import Chaos, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@pytest.fixture
def workers(chaos: Chaos, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> Chaos:
    """Faults in the workers of this process's Ray."""
    own = {k: chaos.environment[k] for k in ("AFN_CHAOS", "PYTHONPATH")}
    monkeypatch.setattr(connection, "WORKER_ENV", connection.WORKER_ENV | own)
    return chaos


# --- workers
# ---------------------------------------------------------------------------------------------


def test_workers_killed_mid_shard_and_between_upload_and_reply(
    ground: Ground, workers: Chaos
) -> None:
    points = ("process", "measured", "uploaded", "committed")
    workers.plan(
        *(
            {"point": point, "shard": f"/0{2 * i + 1}.jsonl", "do": "sigkill"}
            for i, point in enumerate(points)
        )
    )
    store = ground.store()
    with afn_ray.run(ground.config(store, executor="ray", workers=2)):
        hit = {e["point"] for point in points for e in workers.events(point) if "fault" in e}
    assert hit == set(points)
    ground.check(store)


def test_poison_that_raises_exits_and_hangs_is_quarantined_and_nothing_else_is(
    ground: Ground, workers: Chaos
) -> None:
    workers.plan(
        {"point": "process", "shard": "/02.jsonl", "times": 99, "do": "raise"},
        {"point": "measured", "shard": "/05.jsonl", "times": 99, "do": "exit"},
        {"point": "process", "shard": "/08.jsonl", "times": 99, "do": "hang"},
    )
    store = ground.store()
    config = ground.config(
        store, executor="ray", workers=2, shard_deadline_s=15.0, allow_quarantined=3
    )
    with afn_ray.run(config) as run:
        assert run.info["counts"]["shards"] == NUM_SHARDS - 3
        why = {q["uri"][-8:]: q["reason"] for q in run.info["quarantined"]}
        documents = ground.expected[1]
        keep = pc.invert(
            pc.match_substring_regex(documents["source"].cast(pa.string()), "0(2|5|8).jsonl$")
        )
        assert (
            recorded(run)[1]["text_sha256"].to_pylist()
            == documents.filter(keep)["text_sha256"].to_pylist()
        )
    assert why.keys() == {"02.jsonl", "05.jsonl", "08.jsonl"}
    assert why["02.jsonl"].startswith("RuntimeError: a fault on purpose")
    assert why["05.jsonl"] == "its worker's process died, with this shard alone on it"
    assert why["08.jsonl"].startswith("it hung: not done after")
    ground.check_whole(store)
    with afn_ray.run(
        ground.config(store)
    ) as run:  # the faults are mended, and asked again the run is whole
        assert (
            run.info["counts"]["shards_reused"] == NUM_SHARDS - 3 and run.info["quarantined"] == []
        )
    ground.check(store)


def test_a_corpus_that_changes_between_plan_and_read_fails_its_shards_with_that_reason(
    ground: Ground, workers: Chaos
) -> None:
    workers.plan()  # none, but so the workers are forks: those of this Ray load the faults
    corpus = f"{ground.corpus}-{uuid.uuid4().hex[:8]}"
    fs, path = uris.open_filesystem(corpus)
    fs.copy(uris.open_filesystem(ground.corpus)[1], path, recursive=True)
    store = ground.store()
    config = ground.config(store, corpus=(corpus,), executor="ray", workers=2)

    def change(event: Event) -> None:
        if isinstance(event, Planned):
            fs.rm_file(f"{path}/03.jsonl")
            fs.pipe_file(f"{path}/07.jsonl", b'{"text": "In the end."}\n')
            same_size = fs.cat_file(f"{path}/09.jsonl").replace(b"the", b"THE")
            fs.pipe_file(f"{path}/09.jsonl", same_size)

    with pytest.raises(IncompleteRun, match="3 of 12 shards are quarantined") as e:
        afn_ray.run(config, change)
    lines = [line for line in str(e.value).splitlines() if "CorpusChanged" in line]
    assert ["03" in str(lines), "07" in str(lines), "09" in str(lines), len(lines)] == [
        True,
        True,
        True,
        3,
    ]
    ground.check_whole(store)
    with afn_ray.run(config) as run:  # planned anew
        assert (
            run.info["counts"]["documents"] == 12 * (NUM_SHARDS - 2) + 1
            and run.info["quarantined"] == []
        )
        (n,) = run.sql(
            "SELECT count(DISTINCT doc) FROM tokens WHERE text = 'THE' OR surface = 'THE'"
        ).fetchall()[0]
        assert n > 0
    ground.check_whole(store)


# --- drivers
# ---------------------------------------------------------------------------------------------


def test_a_driver_killed_at_ten_random_points(
    ground: Ground, chaos: Chaos, drivers: Drivers
) -> None:
    dice = random.Random(20261122)
    points = [
        "uploaded",
        "committed",
        *dice.choices(["process", "measured", "uploaded", "committed"], k=8),
    ]
    dice.shuffle(points)
    store = ground.store()
    for point in points:
        chaos.plan({"point": point, "do": "sigkill"})
        with drivers.start(*ground.arguments(store)) as driver:
            code, said = driver.finish()
            assert code == -signal.SIGKILL, said
    chaos.plan()
    with drivers.start(*ground.arguments(store)) as driver:
        assert driver.finish()[0] == 0
    ground.check(store)


def test_everything_killed_at_once(ground: Ground, chaos: Chaos, drivers: Drivers) -> None:
    chaos.plan(slow_s=0.3)
    store = ground.store()
    with drivers.start(*ground.arguments(store, executor="ray", workers="2")) as driver:
        wait_until("some shards are committed", lambda: len(chaos.events("committed")) >= 3)
        driver.kill_all()  # the driver, Ray and its workers
        assert driver.finish()[0] == -signal.SIGKILL
    chaos.plan()
    with afn_ray.run(ground.config(store)) as run:
        assert run.info["counts"]["shards_reused"] >= 3
    ground.check(store)


@pytest.mark.only("local", "nothing is asked of the store meanwhile")
def test_the_head_of_ray_killed_alone_ends_the_run_resumable(
    ground: Ground, chaos: Chaos, drivers: Drivers
) -> None:
    chaos.plan({"point": "process", "skip": 6, "times": NUM_SHARDS, "do": "hang"})
    store = ground.store()
    with drivers.start(*ground.arguments(store, executor="ray", workers="2")) as driver:
        wait_until("some shards are committed", lambda: len(chaos.events("committed")) >= 3)
        heads = [
            p
            for p in driver.family()
            if Path("/proc", str(p), "comm").read_text().strip() == "gcs_server"
        ]
        assert len(heads) == 1
        os.kill(heads[0], signal.SIGKILL)
        code, said = driver.finish()
        assert code == 75 and "has not answered" in said and "the same command resumes" in said
    ground.check_whole(store)
    chaos.plan()
    with afn_ray.run(ground.config(store)) as run:
        assert run.info["counts"]["shards_reused"] >= 3
    ground.check(store)


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_stopped_driver_exits_resumable_with_nothing_half_visible(
    ground: Ground, chaos: Chaos, drivers: Drivers, executor: str
) -> None:
    chaos.plan(slow_s=0.3)
    store = ground.store()
    with drivers.start(*ground.arguments(store, executor=executor)) as driver:
        wait_until("some shards are committed", lambda: len(chaos.events("committed")) >= 2)
        stopped = time.monotonic()
        driver.signal(signal.SIGTERM)
        code, said = driver.finish()
        print(f"exit {time.monotonic() - stopped:.1f} s after SIGTERM")
        assert code == 75 and "the same command resumes" in said
    ground.check_whole(store)
    chaos.plan()
    with afn_ray.run(ground.config(store)) as run:
        assert run.info["counts"]["shards_reused"] >= 2
    ground.check(store)


def test_two_drivers_on_the_same_run_at_once(
    ground: Ground, chaos: Chaos, drivers: Drivers
) -> None:
    chaos.plan(slow_s=0.02)
    store = ground.store()
    with (
        drivers.start(*ground.arguments(store)) as one,
        drivers.start(*ground.arguments(store)) as other,
    ):
        assert one.finish()[0] == 0 and other.finish()[0] == 0
    attempts = len(chaos.events("measured"))
    assert attempts >= NUM_SHARDS  # those they both did were committed once
    ground.check(store)


# --- the store
# -------------------------------------------------------------------------------------------


def test_two_attempts_at_one_shard_race_a_hundred_times(ground: Ground, tmp_path: Path) -> None:
    store = ground.store()
    race_attempts(store, tmp_path, ground.config(store).read_options, rounds=100)


def test_collections_runs_and_cleaning_beside_each_other_are_killed(
    ground: Ground, drivers: Drivers, chaos: Chaos
) -> None:
    """Each night's shards are the garbage of the next, and the night behind that needs them
    again.
    """
    store, dice = ground.store(), random.Random(14)
    nights = (ground.arguments(store), ground.arguments(store, **{"shard-bytes": "4096"}))
    chaos.plan(slow_s=0.05)
    for arguments in nights:
        with drivers.start(*arguments) as driver:
            assert driver.finish()[0] == 0
    tidy = (
        ["gc", store, "--keep", "1", "--min-age-h", "0", "--delete"],
        ["gc", store, "--keep", "1", "--delete"],
        ["verify", store, "--clean", "--min-age-h", "0"],
    )
    struck = 0
    for night in range(4):
        commands = [nights[night % 2], *tidy]
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(drivers.start(*arguments)) for arguments in commands]
            for _ in range(6):
                time.sleep(dice.uniform(0.05, 0.4))
                alive = [at for at, driver in enumerate(running) if driver.is_alive]
                at = dice.choice(alive or range(len(running)))  # else all have ended, so early
                struck += bool(alive)
                running[at].kill_all()
                running[at].finish()
                running[at] = stack.enter_context(drivers.start(*commands[at]))
            ended = [driver.finish() for driver in running]
        assert ended[0][0] == 0, ended[0][1]
        assert all(code == 0 for code, _ in ended[1:3]), ended
        with afn_ray.open_run(store) as run:
            ((tokens,),) = run.sql("SELECT count(*) FROM tokens").fetchall()
            assert tokens == len(ground.expected[0])
        ground.check_whole(store)
    assert struck > 5
    with drivers.start(*nights[0]) as driver:
        assert driver.finish()[0] == 0
    ground.check(store)


@pytest.mark.only(
    "s3", "a local disk gives no unknown answers; its faults are those of the other tests"
)
@pytest.mark.parametrize("kind", ["lie", "fail", "stale"])
def test_calls_that_lie_fail_or_tell_of_the_past(ground: Ground, kind: str) -> None:
    store = ground.store()
    rate = 1.0 if kind == "stale" else 0.4  # few folders are listed twice
    with faults.injected(seed=7, rate=rate, kinds=(kind,)) as schedule:
        afn_ray.run(ground.config(faults.wrap(store))).close()
        afn_ray.run(ground.config(faults.wrap(store))).close()
        assert schedule.total(kind) > 20 or (kind == "stale" and schedule.total(kind) > 0)
    ground.check(store)


def patch_bucket(
    monkeypatch: pytest.MonkeyPatch, methods: tuple[str, ...], wrong: Callable[..., Any]
) -> None:
    """Calls of ``methods`` of S3's filesystem go to ``wrong(call, path, *args, **options)``."""
    open_filesystem = uris.open_filesystem

    def open_patched(uri: str) -> tuple[Any, str]:
        fs, path = open_filesystem(uri)
        if not uri.startswith("s3://"):
            return fs, path
        patched = object.__new__(type(fs))  # each thread has an instance of its own, made once
        patched.__dict__.update(
            fs.__dict__, **{name: partial(wrong, getattr(fs, name)) for name in methods}
        )
        return patched, path

    monkeypatch.setattr(uris, "open_filesystem", open_patched)


@pytest.mark.only("s3", "a local disk gives no unknown answers")
def test_a_commit_that_times_out_after_it_was_written_is_our_own(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[str] = []

    def time_out(call: Callable[..., Any], path: str, *args: Any, **options: Any) -> Any:
        answer = call(path, *args, **options)
        if path.endswith("commit.json") and len(late) < NUM_SHARDS // 2:
            late.append(path)
            raise TimeoutError("timed out")
        return answer

    store = ground.store()
    with monkeypatch.context() as patch:
        patch_bucket(patch, ("pipe_file",), time_out)
        afn_ray.run(ground.config(store)).close()
    assert len(late) == NUM_SHARDS // 2
    ground.check(store)
    assert not verify.verify_store(store).orphans


@pytest.mark.only("s3", "a local disk that refuses is full: the next test")
def test_a_bucket_that_refuses_writes_for_twenty_seconds(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[float] = []
    until: list[float] = []

    def refuse(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if until and time.monotonic() < until[0]:
            refused.append(time.monotonic())
            raise faults.s3_error("SlowDown", 503)
        return call(*args, **options)

    def begin(event: Event) -> None:
        if isinstance(event, Starting):
            until.append(time.monotonic() + 20)

    store = ground.store()
    with monkeypatch.context() as patch:
        patch_bucket(patch, ("pipe_file", "put_file"), refuse)
        with afn_ray.run(ground.config(store), begin) as run:
            assert run.info["quarantined"] == []
    assert refused[-1] - refused[0] > 10 and len(refused) < 400  # with pauses
    ground.check(store)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"mounting a small disk is not permitted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("where", ["store", "scratch"])
def test_a_full_disk_stops_the_run_resumable(ground: Ground, where: str, small_disk: Path) -> None:
    if ground.kind == "s3" and where == "store":
        pytest.skip("a bucket is never full")
    scratch = str(small_disk / "scratch") if where == "scratch" else None
    ballast = small_disk / "ballast"
    size = (1200 << 10) if where == "store" else (1484 << 10)
    with pytest.raises(Interrupted, match="no space left") as e:
        while size < 1500 << 10:  # until it is too full
            store = str(small_disk / f"store-{size}") if where == "store" else ground.store()
            ballast.write_bytes(b"x" * size)
            afn_ray.run(ground.config(store, scratch=scratch)).close()
            shutil.rmtree(store, ignore_errors=True)
            size += 32 << 10 if where == "store" else 4 << 10
    assert e.value.exit_code == 75
    ground.check_whole(store)
    ballast.unlink()
    afn_ray.run(ground.config(store, scratch=scratch)).close()
    ground.check(store)


def test_a_clock_that_jumps_back_and_forth(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ground.store()
    now = time.time

    class Clock(datetime):
        jump = timedelta()

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + cls.jump

    for module in (manifest, shard_files):
        monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(time, "time", lambda: now() + Clock.jump.total_seconds())
    monkeypatch.setattr(time, "time_ns", lambda: int((now() + Clock.jump.total_seconds()) * 1e9))
    names = []
    for days, sink in ((0, 10.0), (400, 11.0), (-400, 12.0), (1, 13.0)):
        Clock.jump = timedelta(days=days)
        with afn_ray.run(ground.config(store, sink_factor=sink)) as run:
            names.append(run.uri)
        with afn_ray.open_run(store) as latest:
            assert latest.uri == names[-1]  # the one that was begun last, whatever the clock says
    assert names == sorted(names) and len(set(names)) == 4
    assert datetime.now(UTC).year < 2100
    ground.check_whole(store)
