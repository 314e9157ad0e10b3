"""Number of workers that have a place on the nodes of a Ray, with how many tokenizers, and what is
said where a node has too few CPUs for its GPUs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from rich.console import Console

import afn_ray
import simulated
import warm_workers
from afn_ray import model
from afn_ray.bench import contest
from afn_ray.cli import estimates
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ModelError
from afn_ray.measure import StoredMeasure
from afn_ray.model import memory
from afn_ray.runs import cluster, measurer, rates, worker
from afn_ray.runs.cluster import connection, placement, pool
from afn_ray.runs.cluster.placement import MOST_TOKENIZERS, Node, place
from afn_ray.runs.events import Event, Working
from afn_ray.runs.task import Task
from afn_ray.show import ray_check
from conftest import MakeConfig, write_jsonl


def asked(**values: Any) -> RunConfig:
    return RunConfig(corpus=("c",), model="m", store="s", **values)


CASES: dict[str, tuple[list[Node], dict[str, Any], int, int, str]] = {
    # nodes, options -> workers, tokenizer processes of each, what is said of each notice
    "enough": ([Node(16, 8)], {}, 8, 1, ""),
    "few": (
        [Node(4, 8)],
        {},
        4,
        0,
        "each node with 8 GPUs and 4 CPUs has room for 4 of 8 workers, with 1 CPU each",
    ),
    "one each": ([Node(8, 8)], {}, 8, 0, "8 CPUs has room for 8 of 8 workers, with 1 CPU each"),
    "one each, asked for": ([Node(8, 8)], {"tokenizer_workers": 0}, 8, 0, ""),
    "none": ([Node(0, 2)], {}, 1, 0, "2 GPUs and 0 CPUs has room for 0 of 2 workers"),
    "no gpu": ([Node(64, 0)], {}, 1, 0, "no node with a GPU is up yet"),
    "no gpu, asked for": ([Node(64, 0)], {"tokenizer_workers": 3, "workers": 8}, 8, 3, ""),
    "beside CPUs alone": ([Node(64, 0), Node(16, 8), Node(64, 0)], {}, 8, 1, ""),
    "of two kinds": ([Node(64, 0), Node(16, 8), Node(96, 4)], {}, 12, 1, ""),
    "many CPUs": ([Node(256, 2)], {}, 2, MOST_TOKENIZERS, ""),
    "too many asked for": (
        [Node(16, 8)] * 2,
        {"tokenizer_workers": 6},
        4,
        6,
        "each node with 8 GPUs and 16 CPUs has room for 2 of 8 workers, since a worker takes 7 "
        "CPUs: give fewer --tokenizer-workers",
    ),
    "as many as asked for": ([Node(16, 8)], {"tokenizer_workers": 6, "workers": 2}, 2, 6, ""),
    "fewer workers": ([Node(16, 8)], {"workers": 2}, 2, 7, ""),
    "more workers than places": ([Node(16, 8)], {"workers": 20}, 20, 1, ""),
    "two on a GPU": ([Node(16, 4)], {"workers_per_gpu": 2}, 8, 1, ""),
    "three on a GPU": ([Node(64, 0), Node(24, 4)], {"workers_per_gpu": 3}, 12, 1, ""),
    "GPUs that stay idle": (
        [Node(16, 4)],
        {"workers_per_gpu": 2, "workers": 3},
        3,
        4,
        "3 workers with --workers-per-gpu 2 may take only 2 GPUs, and the others stay idle",
    ),
    "no GPU stays idle": ([Node(16, 4)], {"workers_per_gpu": 2, "workers": 7}, 7, 1, ""),
    "fewer workers than GPUs": ([Node(16, 4)], {"workers": 1}, 1, 15, ""),
    "too many on a GPU": (
        [Node(16, 8)],
        {"workers_per_gpu": 4},
        16,
        0,
        "each node with 8 GPUs and 16 CPUs has room for 16 of 32 workers, with 1 CPU each",
    ),
    "one short and one not": (
        [Node(4, 8), Node(64, 8)],
        {},
        12,
        0,
        "each node with 8 GPUs and 4 CPUs has room for 4 of 8 workers, with 1 CPU each",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_workers_go_where_gpus_and_cpus_are(case: str) -> None:
    nodes, options, num_workers, tokenizers, said = CASES[case]
    placed = place(asked(**options), nodes, "cuda")
    assert (placed.num_workers, placed.tokenizer_workers) == (num_workers, tokenizers)
    assert len(placed.notices) == bool(said)
    for notice in placed.notices:
        assert said in notice


def test_a_worker_on_cpus_needs_one_node_for_all_of_its_processes() -> None:
    nodes = [Node(3, 0), Node(3, 1), Node(0, 0)]
    assert place(asked(), nodes, "cpu") == placement.Placement(6, 0)
    assert place(asked(tokenizer_workers=1), nodes, "cpu") == placement.Placement(2, 1)
    assert place(asked(workers=5), nodes, "cpu") == placement.Placement(5, 0)
    assert place(asked(tokenizer_workers=3), nodes, "cpu").num_workers == 1  # it waits


@pytest.mark.parametrize("num", range(1, 49))
def test_the_shares_of_a_gpu_fit_on_it(num: int) -> None:
    config = asked(workers_per_gpu=num)
    parts = round(connection.needs(config, "cuda")["num_gpus"] * placement.GPU_PARTS)
    assert parts * num <= placement.GPU_PARTS < parts * (num + 1)
    assert connection.needs(config, "cpu")["num_gpus"] == 0


@pytest.mark.parametrize("num", [0, 49])
def test_a_number_of_workers_that_no_gpu_takes_is_refused(num: int) -> None:
    with pytest.raises(ConfigError, match=f"workers_per_gpu is {num}; expected at"):
        asked(workers_per_gpu=num)


class FakeRay:
    """Parts of Ray that a pool asks: nodes, and actors that it only counts."""

    exceptions = ray.exceptions

    def __init__(self, nodes: list[Node]) -> None:
        self.at = nodes
        self.options: dict[str, Any] = {}
        self.started: list[Any] = []

    def nodes(self) -> list[dict[str, Any]]:
        found = []
        for node in self.at:
            has = {"CPU": float(node.num_cpus), "GPU": float(node.num_gpus)}
            has = {name: amount for name, amount in has.items() if amount}
            found.append({"Alive": True, "NodeID": "n", "Resources": has})
        return [*found, {"Alive": False, "NodeID": "dead", "Resources": {"CPU": 99.0, "GPU": 99.0}}]

    def cluster_resources(self) -> dict[str, float]:
        return {
            "CPU": float(sum(n.num_cpus for n in self.at)),
            "GPU": float(sum(n.num_gpus for n in self.at)),
        }

    def remote(self, **options: Any) -> Any:
        self.options = options
        poll = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: object()))

        def start(task: Any) -> Any:
            self.started.append(task)
            return SimpleNamespace(poll=poll)

        return lambda kind: SimpleNamespace(remote=start)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay([])
    for name in ("nodes", "cluster_resources", "remote"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    monkeypatch.setattr(ray, "available_resources", fake.cluster_resources)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


def pool_of(fake: FakeRay, nodes: list[Node], **options: Any) -> pool.RayPool:
    """A pool on a Ray with ``nodes``, for a run on GPUs."""
    fake.at = nodes
    config = asked(**options)
    measure: Any = None  # a pool does not read it
    return pool.RayPool(Task(config, measure, "cuda"), config)


@pytest.mark.parametrize(
    ("nodes", "options", "num_started", "resources", "notices"),
    [
        ([Node(16, 8)], {}, 8, (2, 1.0), 0),
        ([Node(4, 8)], {}, 4, (1, 1.0), 1),
        ([Node(64, 0), Node(16, 8)], {}, 8, (2, 1.0), 0),
        ([Node(16, 4), Node(64, 0)], {"workers_per_gpu": 2}, 8, (2, 0.5), 0),
        ([Node(16, 8)], {"tokenizer_workers": 6}, 2, (7, 1.0), 1),
        ([Node(16, 8)], {"workers": 3}, 3, (5, 1.0), 0),
    ],
)
def test_a_pool_starts_the_workers_that_have_a_place(
    nodes: list[Node],
    options: dict[str, Any],
    num_started: int,
    resources: tuple[int, float],
    notices: int,
    fake_ray: FakeRay,
) -> None:
    made = pool_of(fake_ray, nodes, **options)
    assert made.grow(100) == len(fake_ray.started) == num_started
    assert (fake_ray.options["num_cpus"], fake_ray.options["num_gpus"]) == resources
    tokenizers = {task.config.tokenizer_workers for task in fake_ray.started}
    assert tokenizers == {resources[0] - 1}  # each worker starts what its CPUs are for
    assert len(made.notices) == notices


def test_nodes_that_come_later_get_workers_and_are_looked_at_too(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "UNITS_S", 0.0)
    made = pool_of(fake_ray, [Node(16, 8)])
    assert made.grow(100) == 8 and made.grow(100) == 8 and not made.notices
    fake_ray.at = [*fake_ray.at, Node(4, 8), Node(64, 0)]
    assert made.grow(100) == 10  # of two CPUs each
    assert made.grow(100) == 10
    assert made.notices == [
        "each node with 8 GPUs and 4 CPUs has room for 2 of 8 workers, since a worker takes 2 "
        "CPUs, as many as fit on the nodes that were up first: set a smaller number for all with "
        "--tokenizer-workers"
    ]


@pytest.mark.parametrize(
    ("first", "more", "options", "num_notices"),
    [
        ([Node(16, 8)], [Node(4, 8)], {}, 1),
        ([Node(4, 8)], [Node(4, 8)], {}, 1),
        ([Node(4, 8)], [Node(4, 8), Node(8, 8)], {}, 2),
        ([Node(16, 8)], [Node(16, 8)], {"tokenizer_workers": 6}, 1),
    ],
)
def test_a_growing_cluster_has_one_notice_for_each_kind_of_node(
    first: list[Node],
    more: list[Node],
    options: dict[str, Any],
    num_notices: int,
    fake_ray: FakeRay,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "UNITS_S", 0.0)
    made = pool_of(fake_ray, first, **options)
    num_workers = made.grow(10_000)
    for _ in range(100):
        fake_ray.at = [*fake_ray.at, *more]
        assert made.grow(10_000) > num_workers
        num_workers = made.grow(10_000)
    assert len(made.notices) == num_notices


def test_only_a_user_who_gave_tokenizers_is_asked_to_give_fewer(fake_ray: FakeRay) -> None:
    """The two calls differ in who chose the same number of tokenizer processes."""
    for options, is_given in (({}, False), ({"tokenizer_workers": 1}, True)):
        made = pool_of(fake_ray, [Node(16, 8)], **options)
        fake_ray.at = [Node(4, 8)]
        made.grow(100)
        (notice,) = made.notices
        assert notice.endswith("CPUs: give fewer --tokenizer-workers") is is_given
        assert ("the nodes that were up first" in notice) is not is_given


def test_a_local_ray_without_a_place_is_refused(fake_ray: FakeRay) -> None:
    with pytest.raises(ConfigError, match="needs one GPU, and this Ray has none"):
        pool_of(fake_ray, [Node(64, 0)])
    with pytest.raises(ConfigError, match="needs 4 CPUs, one and its --tokenizer-workers"):
        pool_of(fake_ray, [Node(64, 0), Node(3, 1)], tokenizer_workers=3)


def test_what_waits_for_a_place_asks_for_a_share_of_a_gpu(fake_ray: FakeRay) -> None:
    fake_ray.at = [Node(16, 8)]
    text = connection.lack(3, asked(workers_per_gpu=4), "cuda")
    assert text.startswith("asked for 3 more workers of 1 CPU and 0.25 GPU each")


# --- a worker that shares its GPU


def test_a_worker_that_shares_a_gpu_takes_its_share_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch counts only the memory of its own allocator, so the others' contexts are left out."""
    at_load: list[float] = []  # share of each worker before its model takes any
    logs: list[simulated.Log] = []  # the last one is of the device in use
    monkeypatch.setattr(pool, "Processor", lambda task: at_load.append(logs[-1].memory_share))
    total_bytes = simulated.T4.total_bytes
    measure: Any = None
    for num in (1, 2, 4, 14):
        with simulated.device(simulated.T4) as log:
            logs.append(log)
            worker_of = Task(asked(workers_per_gpu=num), measure, "cuda")
            assert pool._Worker(worker_of)._error is None
        taken = num * (at_load[-1] * total_bytes + (num > 1) * (1 << 30))
        assert taken == pytest.approx(total_bytes)
    assert pool._Worker(Task(asked(workers_per_gpu=2), measure, "cpu"))._error is None
    assert at_load[0] == 1 and len(at_load) == 5


def test_more_workers_than_a_gpu_has_memory_for_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "Processor", lambda task: pytest.fail("it loads a model"))
    measure: Any = None
    with simulated.device(simulated.T4):
        started = pool._Worker(Task(asked(workers_per_gpu=15), measure, "cuda"))
    with pytest.raises(ModelError, match=r"workers_per_gpu is 15, but .* has 16\.1 GB.*fewer"):
        started.poll()


def test_a_model_that_does_not_fit_into_its_share_of_a_gpu_says_how_much_that_is() -> None:
    device = torch.device("cuda")
    for num, said in (
        (1, r"16\.1 of its 16\.1 GB are free \("),
        (3, r"free, and .* 4\.3 GB in all"),
    ):
        with simulated.device(simulated.T4):
            if num > 1:
                model.limit_memory(num)
            with pytest.raises(ModelError, match=said), memory.needed("m", device, lambda: 1):
                raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("num", [1, 2])
def test_workers_per_gpu_without_a_gpu_to_share_is_noted(num: int) -> None:
    on_cpus = place(asked(workers_per_gpu=num), [Node(4, 0)], "cpu")
    inline = cluster.place_workers(asked(workers_per_gpu=num, executor="inline"), "cuda")
    for placed in (on_cpus, inline):
        found = [notice.partition(":")[0] for notice in placed.notices]
        assert found == ["--workers-per-gpu has no effect"] * (num - 1)


@pytest.mark.parametrize(("device", "is_inline"), [("cpu", True), ("cuda", False), ("auto", False)])
def test_workers_per_gpu_starts_ray_where_a_gpu_may_be_shared(
    device: str, is_inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert cluster.runs_inline(asked(workers_per_gpu=2, device=device), []) is is_inline


def test_a_run_in_this_process_notes_that_no_workers_share_its_gpu(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "hello there"}])
    notices: set[str] = set()

    def look(event: Event) -> None:
        if isinstance(event, Working):
            notices.update(event.progress.notices)

    config = make_config(corpus=(str(corpus),), device="cpu", workers_per_gpu=2)
    with afn_ray.run(config, look):
        assert notices == {placement.NOT_SHARED.format("a run in one process")}


def test_how_many_workers_share_a_gpu_is_no_input_of_a_measure(make_config: MakeConfig) -> None:
    def measure_of(**options: Any) -> tuple[str, StoredMeasure]:
        config = make_config(**options)
        task = worker.prepare(config, measurer.find_model_files(config), "cuda", "float16")
        return task.measure.id, task.measure.as_dict()

    assert measure_of() == measure_of(workers_per_gpu=4, tokenizer_workers=5)


SCRIPT = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path

import ray
import afn_ray
from afn_ray import model
from afn_ray.runs.cluster import access, pool
from afn_ray.runs.events import Working

corpus, folder, store = sys.argv[1:]
seen = Path(store + "-seen")
seen.mkdir()

class OnCpu(pool._Worker):  # it has its share of a GPU and measures on a CPU
    def __init__(self, task):
        here = ray.get_runtime_context()
        known = {"gpus": ray.get_gpu_ids(), "resources": here.get_assigned_resources(),
                 "tokenizers": task.config.tokenizer_workers}
        (seen / f"{os.getpid()}.json").write_text(json.dumps(known))
        super().__init__(replace(task, device="cpu"))

    def process(self, shard, oom_retries):
        end = time.monotonic() + 120
        while len(list(seen.glob("*.json"))) < 4 and time.monotonic() < end:
            time.sleep(0.1)
        return super().process(shard, oom_retries)

notices = {}
def look(event):
    if isinstance(event, Working):
        notices.update(dict.fromkeys(event.progress.notices))

pool._Worker = OnCpu
model.choose_device = lambda device: "cuda"
access.start_local(num_cpus=4, num_gpus=2, object_store_memory=128 << 20)
config = afn_ray.RunConfig(corpus=(corpus,), model=folder, store=store, dtype="float32",
                           executor="ray", workers_per_gpu=2, shard_bytes=1024)
with afn_ray.run(config, look) as run:
    workers = [json.loads(file.read_text()) for file in seen.glob("*.json")]
    print(json.dumps([workers, list(notices), run.info["counts"]["documents"]]))
"""


@pytest.mark.ray
def test_two_workers_share_each_gpu_of_a_real_ray(
    tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": verse} for verse in verses[:100]])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    python = warm_workers.choose(has_faults=False)  # its Ray's workers are forks too
    command = [python, script, corpus, tiny_bert, tmp_path / "store"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    workers, notices, num_documents = json.loads(done.stdout.splitlines()[-1])
    assert num_documents == 100
    assert [w["resources"] for w in workers] == [{"CPU": 1.0, "GPU": 0.5}] * 4
    assert Counter(str(gpu) for w in workers for gpu in w["gpus"]) == {"0": 2, "1": 2}
    assert {w["tokenizers"] for w in workers} == {0}
    assert notices[0].startswith("each node with 2 GPUs and 4 CPUs has room for 4 of 4 workers")


# --- what the doctor, a dry run and a benchmark say


def test_the_doctor_says_how_many_workers_a_run_has(
    fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "joined", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(ray, "get", lambda task, timeout: "3.12")
    task = SimpleNamespace(remote=lambda: None)
    monkeypatch.setattr(ray, "remote", lambda **_: lambda function: task)

    def probe(address: str | None) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "\n".join(connection.probe(address)) + "\n", "")

    monkeypatch.setattr(ray_check, "_probe", probe)
    for nodes, ok, said in (
        ([Node(64, 0)], True, "a run has 64 workers;"),
        ([Node(64, 0), Node(16, 8)], True, "a run has 8 workers, each on a GPU, each with 1 token"),
        (
            [Node(4, 8)],
            None,
            "a run has 4 workers, each on a GPU; each node with 8 GPUs and 4 CPUs",
        ),
    ):
        fake_ray.at = nodes
        found = ray_check.check(None)
        assert found.ok is ok and said in found.found
        assert ("more CPUs" in found.advice) == (ok is None)


def test_a_dry_run_says_how_many_workers_a_run_has(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "hello there"}] * 300)
    monkeypatch.setattr(cluster, "find_device", lambda config: "cuda")
    monkeypatch.setattr(cluster, "local_device", lambda device: "cpu")
    monkeypatch.setattr(placement, "this_machine", lambda: Node(4, 4))
    config = make_config(
        corpus=(str(corpus),), executor="ray", shard_bytes=1024, workers_per_gpu=2, dtype="float32"
    )
    found = afn_ray.dry_run(config)
    out = io.StringIO()
    estimates.print_estimate(found, Console(file=out, width=200))
    assert (found.num_workers, found.workers_per_gpu) == (4, 2)
    assert "workers  4 workers, 2 on a GPU" in out.getvalue()
    assert "workers  each node with 4 GPUs and 4 CPUs has room for 4 of 8" in out.getvalue()
    assert "corpus   300 documents, 7,200 bytes in 1 file\n" in out.getvalue()


def test_a_benchmark_on_a_gpu_has_the_tokenizers_of_a_real_worker(
    monkeypatch: pytest.MonkeyPatch, tiny_bert: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(placement, "this_machine", lambda: Node(40, 4))
    monkeypatch.setattr(model, "choose_device", lambda device: device)
    for device, given, expected in (("cuda", None, 9), ("cuda", 2, 2), ("cpu", None, 0)):
        options = contest.Options(str(tiny_bert), device=device, tokenizer_workers=given)
        spec, _, _ = contest._plan(options, tmp_path)
        assert spec.tokenizer_workers == expected


@pytest.mark.parametrize(
    ("device", "given", "fits", "others"),
    [
        ("cuda", None, {0, 9, 15}, set()),
        ("cuda", 9, {9}, {0, 15}),
        ("cpu", None, {0}, {9}),
        ("cpu", 3, {3}, {0, 9}),
    ],
)
def test_a_rate_is_of_the_number_of_tokenizers_with_which_it_was_measured(
    make_config: MakeConfig,
    tmp_path: Path,
    device: str,
    given: int | None,
    fits: set[int],
    others: set[int],
) -> None:
    """A GPU's node decides their number by default, so a run then takes a rate with any and says
    with how many it was measured.
    """

    def speed(tokenizers: int | None) -> rates.Speed:
        config = make_config(tokenizer_workers=tokenizers)
        task = worker.prepare(config, measurer.find_model_files(config), device, "float32")
        return rates.speed_of(task)

    asked = speed(given)
    for measured in sorted(fits | others):
        rate = rates.Rate(9, 0, "here", speed(measured))
        if measured in fits:
            rate.check(asked, tmp_path)
        else:
            with pytest.raises(ConfigError, match=f"tokenizer_workers: it has {measured}, this"):
                rate.check(asked, tmp_path)
