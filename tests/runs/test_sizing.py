"""Estimate of a run: rates that are its own, money with its arithmetic, and a crowd that
loses no shard.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tokenizers import Tokenizer

import afn_ray
from afn_ray.bench import machine, rate
from afn_ray.cli import commands, estimates
from afn_ray.config import RunConfig
from afn_ray.corpus import listing as corpora
from afn_ray.errors import AfnError, ConfigError, StoreError
from afn_ray.reduce import tree
from afn_ray.runs import cluster, estimate, job, measurer, precheck, preparation, rates
from afn_ray.runs.plan import make_plan
from afn_ray.runs.prices import Prices, bill, read_prices
from afn_ray.runs.rates import Rate
from afn_ray.store import storage
from afn_ray.tokens import counting, encode
from bench import commands as bench_commands
from bench import crowd, simulate
from bench.reduce import NUM_TYPES
from conftest import MakeConfig, config_of, printed, write_jsonl

NUM_SEEDS = 30
PRICES = """
currency = "EUR"
as_of = "an example of 2026-11-22"
worker_hour = 2.0
worker_hour_on_demand = 5
head_hour = 0.5
put_million = 10.0
storage_gb_month = 0.25
"""


def printed_estimate(found: estimate.Estimate, capsys: pytest.CaptureFixture[str]) -> str:
    estimates.print_estimate(found, Console(highlight=False, soft_wrap=True, width=1000))
    return capsys.readouterr().out


# --- rates
# -----------------------------------------------------------------------------------------------


def test_a_dry_run_goes_by_a_measured_rate_and_refuses_that_of_another_run(
    tmp_path: Path, make_config: MakeConfig, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file = make_config(corpus=(corpus,), layers="1,2"), tmp_path / "rate.json"
    result: Any = rate.measure(config, 1500, 3, lambda note: None)
    assert not Path(config.store).exists()  # it measures elsewhere
    assert "layers 1, 2, strength, float32 on cpu" in printed(rate.render, result)
    result |= {"tokens_per_second": [300.0, 100.0, 150.0, 250], "load_s": 7.0}
    file.write_text(json.dumps(result))

    found = afn_ray.dry_run(config, rate=file)
    assert found.tokens_per_second == 200.0 and found.load_s == 7.0  # the median
    work_s = found.tokens / 200.0
    reduce_s = (
        2 * found.tokens / estimate.REDUCE_TOKENS_PER_S
        + found.tokens / estimate.SCREEN_TOKENS_PER_S
    )
    assert found.reduce_s == pytest.approx(reduce_s)
    assert found.seconds is not None
    assert found.seconds == pytest.approx(7.0 + work_s + reduce_s, rel=1e-3)
    assert found.worker_hours == pytest.approx(found.seconds / 3600)
    text = printed_estimate(found, capsys)
    assert "200 tokens/s of one worker (on" in text and "n = 4, 100-300" in text

    others: dict[str, Any] = {"layers": "2", "signals": "shift", "window_tokens": 32}
    with pytest.raises(ConfigError) as refused:
        afn_ray.dry_run(replace(config, **others), rate=file)
    assert all(
        f"{key}: it has {result['speed'][key]}, this run asks for" in str(refused.value)
        for key in others
    )
    assert "dtype" not in str(refused.value) and "model" not in str(refused.value)
    for key in result["speed"]:  # whatever changes the speed
        other = result | {"speed": result["speed"] | {key: "other"}}
        file.write_text(json.dumps(other))
        with pytest.raises(ConfigError, match=f"something else: {key}: it has other"):
            rates.read_rate(file).check(result["speed"], file)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"speed": {}}', "speed", pytest.param("[" * 100_000, id="deep")]
)
def test_a_file_that_holds_no_rate_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rate.json").write_text(text)
    with pytest.raises(ConfigError, match="is not what 'afn bench rate --json' writes"):
        rates.read_rate(tmp_path / "rate.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        rates.read_rate(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("speed", []),
        ("tokens_per_second", []),
        ("tokens_per_second", 9.0),
        ("tokens_per_second", ["200"]),
        ("tokens_per_second", [200.0, 0.0]),
        ("tokens_per_second", [10**400]),
        ("load_s", "7"),
        ("load_s", True),
        ("load_s", math.nan),
        ("machine", None),
        ("versions", {}),
        ("versions", "2.13"),
        ("foreign", "x"),
        ("foreign", -1),
    ],
)
def test_a_rate_with_a_wrong_value_is_refused_by_its_name(
    tmp_path: Path, key: str, wrong: Any
) -> None:
    right = {
        "speed": {"dtype": "float32"},
        "tokens_per_second": [9],
        "load_s": 0,
        "machine": "m",
        "versions": {"torch": "2"},
        "foreign": 0.25,
    }
    file = tmp_path / "rate.json"
    file.write_text(json.dumps(right))
    assert rates.read_rate(file) == Rate(
        9, 0, "on m, torch 2, n = 1, 9-9, others took 25% of its cores", {"dtype": "float32"}
    )
    fed = right | {"speed": {"tokenizer_workers": 15}}
    file.write_text(json.dumps(fed))
    assert rates.read_rate(file).where.startswith("on m, torch 2, 15 tokenizer processes, n = 1")
    file.write_text(json.dumps(right | {key: wrong}))
    with pytest.raises(
        ConfigError, match=f"rate.json is not what .* writes: {key} is .*; expected "
    ):
        rates.read_rate(file)


def test_without_a_rate_no_time_and_no_money_is_told_of_a_device_that_is_not_here(
    tmp_path: Path,
    make_config: MakeConfig,
    corpus: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "find_device", lambda config: "cuda")
    monkeypatch.setattr(cluster, "local_device", lambda device: "cpu")
    (tmp_path / "prices.toml").write_text(PRICES)
    config = make_config(corpus=(corpus,), executor="ray", workers=4, signals="shift")
    found = afn_ray.dry_run(config, prices=tmp_path / "prices.toml")
    assert (found.seconds, found.load_s, found.worker_hours, found.tokens_per_second) == (
        None,
        None,
        None,
        None,
    )
    assert not found.costs and not found.signal_costs  # of a CPU, and of no worker
    assert (
        found.device == "cuda"
        and found.tokens > 0
        and found.num_puts > 0
        and found.monthly is not None
    )
    text = printed_estimate(found, capsys)
    assert re.search(
        r"rate     not known: the workers' device is cuda and this machine's is cpu: "
        r".*'afn bench rate ",
        text,
    )
    assert (
        "time     not known" in text
        and "give --rate FILE" in text
        and "money    the run: not known" in text
    )
    assert "money    store: " in text
    assert not re.search(r"hours|tokens/s|worker_hour|workers:|the run: [0-9]", text)

    asked = preparation.prepare(precheck.normalised(config), lambda event: None, keep=False)
    rate = {
        "speed": rates.speed_of(asked.task),
        "tokens_per_second": [50.0],
        "load_s": 1.0,
        "machine": "H",
        "versions": {"torch": "2"},
        "foreign": 0.0,
    }
    (tmp_path / "rate.json").write_text(json.dumps(rate))
    known = afn_ray.dry_run(config, rate=tmp_path / "rate.json", prices=tmp_path / "prices.toml")
    assert known.seconds is not None and known.seconds > known.tokens / 50.0 / known.num_workers
    assert len(known.costs) == 4 and "GPU-hours" in printed_estimate(known, capsys)

    config = replace(config, workers_per_gpu=2)  # together as fast as the one that was measured
    shared = afn_ray.dry_run(config, rate=tmp_path / "rate.json")
    measuring = []
    for e in (known, shared):
        assert e.seconds is not None and e.load_s is not None and e.num_workers == 3
        measuring.append(e.seconds - e.load_s - e.reduce_s)
    assert measuring[1] == pytest.approx(2 * measuring[0])
    assert re.search(r"GPU-hours = 3 x [0-9.]+ / 2\n", printed_estimate(shared, capsys))


def test_what_a_signal_costs_is_the_lesser_of_two_turns_and_never_less_than_nothing(
    make_config: MakeConfig, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = {
        ("strength",): [2.0, 1.0],
        ("strength", "shift"): [0.9, 0.8],
        ("strength", "attention"): [1.5, 9.0],
    }
    taken = {names: itertools.cycle(seconds) for names, seconds in turns.items()}
    monkeypatch.setattr(
        measurer.Measurer,
        "seconds",
        lambda self, prepared, signals: next(taken[tuple(s.name for s in signals)]),
    )
    found = afn_ray.dry_run(make_config(corpus=(corpus,), signals="shift,attention"))
    assert found.signal_costs == {"shift": 0.0, "attention": 0.5}


# --- money
# -----------------------------------------------------------------------------------------------


def test_money_is_shown_with_its_arithmetic_and_a_price_that_is_missing_is_said(
    tmp_path: Path, make_config: MakeConfig, corpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prices.toml").write_text(PRICES)
    found = afn_ray.dry_run(make_config(corpus=(corpus,)), prices=tmp_path / "prices.toml")
    text = printed_estimate(found, capsys)
    assert "prices   in EUR, of an example of 2026-11-22" in text
    total = 0.0
    for amount, price, product in re.findall(
        r"money    \w+: ([\d.e-]+) [\w-]+ x ([\d.]+) = ([\d.e-]+) EUR\n", text
    ):
        assert float(product) == pytest.approx(float(amount) * float(price), rel=1e-3)
        total += float(product)
    ((said,),) = [re.findall(r"the run: ([\d.e-]+) EUR without GET\n", text)]
    assert float(said) == pytest.approx(total, rel=1e-3) and total > 0
    assert (
        "all on demand instead" in text
        and "million, for which there is no price" in text
        and "a month" in text
    )
    assert "money" not in printed_estimate(afn_ray.dry_run(make_config(corpus=(corpus,))), capsys)


def test_a_bill_is_the_sum_of_its_lines() -> None:
    prices = Prices(
        "EUR", "today", worker_hour=2.0, head_hour=0.5, put_million=10.0, storage_gb_month=0.25
    )
    lines, monthly = bill(prices, 1000.0, 10.0, 3_000_000, 5_000_000, 8e9)
    assert [(c.what, c.total) for c in lines] == [
        ("workers", 2000.0),
        ("head", 5.0),
        ("PUT", 30.0),
        ("GET", None),
    ]
    assert monthly is not None and monthly.total == 2.0
    assert bill(None, 1.0, 1.0, 1, 1, 1.0) == ((), None)
    assert bill(prices, None, None, 3_000_000, 5_000_000, 8e9) == ((), monthly)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("worker_hour = -1", "worker_hour is -1; expected a number, 0 or more"),
        ("worker_hour = nan", "worker_hour is nan"),
        ("worker_hour = true", "worker_hour is True"),
        ('worker_hour = "2"', "worker_hour is '2'"),
        ("gpu_hour = 2", "has gpu_hour; expected currency, as_of and some of worker_hour"),
        ('currency = ""', "currency is ''; expected a text"),
        ("worker_hour", "is not TOML"),
    ],
)
def test_prices_that_cannot_be_are_refused(tmp_path: Path, line: str, message: str) -> None:
    name = line.partition(" ")[0]
    kept = [row for row in PRICES.splitlines() if not row.startswith(f"{name} ")]
    (tmp_path / "prices.toml").write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_prices(tmp_path / "prices.toml")


def test_rates_and_prices_are_of_a_dry_run(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(SystemExit) as end:
        commands.main(
            ["run", corpus, "--model", "m", "--store", str(tmp_path / "s"), "--rate", "rate.json"]
        )
    assert end.value.code == ConfigError.exit_code


# --- requests
# --------------------------------------------------------------------------------------------


def test_the_requests_of_a_shard_are_those_that_a_bucket_saw(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_config: MakeConfig,
    object_store: str,
    verses: list[str],
) -> None:
    (log,) = {
        (p / "log").resolve()
        for p in tmp_path_factory.getbasetemp().glob("s3*")
        if (p / "log").exists()
    }
    bucket = object_store.removeprefix("s3://")

    def counted() -> Counter[str]:
        lines = [
            re.sub(r"\x1b\[\d+m", "", line)
            for line in log.read_text().splitlines()
            if f"/{bucket}" in line
        ]
        lines = [
            line for line in lines if not re.search(r"/(status|planning)\.json", line)
        ]  # by the clock
        kinds = (
            "LIST" if "list-type=2" in line else re.findall(r'"([A-Z]+) /', line)[0]
            for line in lines
        )
        return Counter("GET" if kind in ("GET", "HEAD") else "PUT" for kind in kinds)

    seen = []
    for num_shards in (2, 6):
        for at in range(num_shards):
            rows = (
                {"text": t, "pad": "-" * 500} for t in verses[at * 5 : at * 5 + 5]
            )  # two do not fit into a shard
            body = "".join(json.dumps(row) + "\n" for row in rows).encode()
            storage.write_once(f"{object_store}/{num_shards}/corpus-{at}.jsonl", body)
        config = make_config(
            corpus=(f"{object_store}/{num_shards}/",),
            store=f"{object_store}/{num_shards}-store",
            shard_bytes=4096,
        )
        before = counted()
        with afn_ray.run(config) as run:
            assert run.info["counts"]["shards"] == num_shards
            after = counted()
        after.subtract(before)
        seen.append(after)
    more = {kind: (seen[1][kind] - seen[0][kind]) / 4 for kind in ("PUT", "GET")}
    assert more == {
        "PUT": estimate.PUTS_A_SHARD,
        "GET": estimate.GETS_A_SHARD + estimate.gets_of_corpus(4096),
    }


# --- the crowd
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_a_crowd_that_fails_all_the_time_ends_every_shard_once(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in crowd.RATES:
        monkeypatch.setitem(crowd.RATES, name, 0.004)
    monkeypatch.setattr(crowd, "POISON", dict.fromkeys(crowd.POISON, 0.002))
    monkeypatch.setattr(crowd, "NODE_LOST_H", 2.0)
    monkeypatch.setattr(crowd, "OUTAGE_EVERY_H", 2.0)
    monkeypatch.setattr(simulate, "COMMITS_READ", 20)
    result: dict[str, Any] = simulate.simulate(
        1500, 60, seed
    )  # it asserts that none is lost, none done twice
    assert result["quarantined"] >= 4 * 3 and result["attempts"] > 1500 + result["quarantined"]
    assert {"crash", "hang", "memory", "node", "raise", "unavailable", "nodes lost"} <= result[
        "happened"
    ].keys()
    assert result["calls"]["total"] == 1 and result["calls"]["read"] >= 1500 / 64
    assert result["most_args"] <= 64 + 1
    assert result["parts_s"]["status"] > 0  # which has told of every shard in the end

    text = printed(
        simulate.render,
        {
            **machine.facts("cpu"),
            "shards": 1500,
            "workers": 60,
            "repeat": 1,
            "rounds": [result | {"foreign": 0.1}],
        },
    )
    for expected in (
        "1,500 shards",
        "check workers",
        "bytes a shard more than at the start",
        "quarantined",
    ):
        assert expected in text


# --- the page
# --------------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "infra" / "guide" / "sizing.md"
TEXT_BYTES = 4
"""Bytes of a token, in English text and a vocabulary of 30,522; and what one worker does in a
second, as the page says.
"""
CPU_RATE, WORKERS = 2_250.0, 100
SUMMARY_BYTES = 1.15
DRIVER_BYTES = 2_400
PAIR_BYTES = 64
"""Bytes of memory while sums merge: ``SeriesSummary.merge``."""


def distinct_pairs(tokens: float) -> float:
    """Pairs of a type and a strength that differ, in the mean, under the law of
    ``jobs/benchmark.py reduce``.
    """
    shares = 1 / np.arange(10, NUM_TYPES + 10)
    shares /= shares.sum()
    bins_a_sd = (
        0.1 * 2**15 / math.log(2)
    )  # 15 bits of mantissa, strengths whose logarithms have a deviation of 0.1
    at = np.arange(-6, 6, 1 / 100)
    chance = np.exp(-(at**2) / 2) / math.sqrt(2 * math.pi) / bins_a_sd
    parts = np.array_split(tokens * shares, 50)
    return float(sum(-np.expm1(-part[:, None] * chance).sum() for part in parts) * bins_a_sd / 100)


def table(tokens: float) -> dict[str, str]:
    """A column of the page's table."""
    config = RunConfig(corpus=("-",), model="-", store="-")
    num_bytes = tokens * TEXT_BYTES
    shard_bytes = corpora.MOST_SHARD_BYTES  # of any corpus over 256 MiB
    shards = math.ceil(num_bytes / shard_bytes)
    puts, gets = (
        shards * estimate.PUTS_A_SHARD,
        shards * (estimate.GETS_A_SHARD + estimate.gets_of_corpus(shard_bytes)),
    )
    store = tokens * estimate.bytes_per_token(config, 1, 0)
    parts = min(tree.MAX_PARTS, 1 + int(tokens * SUMMARY_BYTES) // tree.PART_BYTES)
    hours, reduce_hours = (
        tokens / CPU_RATE / 3600,
        estimate.reduce_core_s(tokens, 1, screened=True) / 3600,
    )
    in_all = hours + reduce_hours
    lines, monthly = bill(
        read_prices(ROOT / "infra" / "prices.toml"), in_all, in_all / WORKERS, puts, gets, store
    )
    totals = [
        cost.total for cost in (*lines, monthly) if cost is not None and cost.total is not None
    ]
    assert len(totals) == 5
    merge_gb = distinct_pairs(tokens) * PAIR_BYTES / parts / 1e9
    return {
        "corpus, GB": f"{num_bytes / 1e9:,.0f}",
        "shards of 16 MiB": f"{shards:,}",
        "store, GB": f"{store / 1e9:,.0f}",
        "summaries in it, GB": f"{tokens * SUMMARY_BYTES / 1e9:,.1f}",
        "PUT and LIST": f"{puts:,}",
        "GET and HEAD": f"{gets:,}",
        "worker-hours": f"{hours:,.0f}",
        "reduce and screening, core-hours": f"{reduce_hours:,.1f}",
        "memory of a merge of the reduce, GB": f"{merge_gb:.1f}",
        "memory of the driver for its shards, GB": f"{shards * DRIVER_BYTES / 1e9:,.2f}",
        "workers, USD": f"{lines[0].total:,.0f}",
        "head, USD": f"{lines[1].total:,.0f}",
        "requests, USD": f"{(lines[2].total or 0) + (lines[3].total or 0):,.2f}",
        "the run, USD": f"{sum(totals[:4]):,.0f}",
        "the store, USD a month": f"{totals[4]:,.2f}",
    }


def test_the_table_of_the_page_is_what_its_arithmetic_gives() -> None:
    columns = [table(tokens) for tokens in (1e9, 1e11, 1e13)]
    rows = [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
    text = PAGE.read_text("utf-8")
    missing = [row for row in rows if row not in text]
    assert not missing, "\n".join(rows)


def test_the_law_of_the_page_is_that_of_what_was_reduced() -> None:
    """Sums of 66,929,845 generated tokens in 16 summaries: 77 MB, of which each pair takes 1 to 2
    bytes.
    """
    assert 1.0 < 77e6 / (16 * distinct_pairs(66_929_845 / 16)) < 2.0


@pytest.mark.parametrize("kind", ["sh", "toml"])
def test_what_the_page_tells_to_do_works(
    kind: str,
    tmp_path: Path,
    corpus: str,
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert blocks
    if kind == "toml":
        for block in blocks:
            (tmp_path / "prices.toml").write_text(block)
            read_prices(tmp_path / "prices.toml")
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "infra" / "gpu"))
    gpu_check = importlib.import_module("check")
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    lines = (
        f'corpus = ["{corpus}"]',
        f'model = "{tiny_bert}"',
        'store = "results"',
        'dtype = "float32"',
        'executor = "inline"',
    )
    (tmp_path / "run.toml").write_text("\n".join(lines))
    smaller = {
        "rate": ["--tokens", "600", "--repeat", "1"],
        "simulate": ["--shards", "300", "--workers", "10"],
    }
    told = ""
    for command in [line for block in blocks for line in block.splitlines()]:
        words = shlex.split(command)
        main: Callable[[list[str]], object]
        if words[0] == "afn":
            main, given = commands.main, words[1:]
        else:
            if words[1] == "infra/gpu/check.py":  # tests/gpu runs it
                gpu_check.parse(words[2:])
                continue
            assert words[:2] == ["python", "jobs/benchmark.py"], command
            main, given = bench_commands.main, words[2:]
        for what, flags in smaller.items():
            given += flags if what in given else []
        with pytest.raises(SystemExit) as end:
            main(given)
        told += capsys.readouterr().out
        assert end.value.code == 0, (command, told)
    assert "the run: " in told and "USD" in told and "most of the driver" in told.lower()


# --- a dry run is the run's own preparation
# --------------------------------------------------------------


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another measure": ({"window_tokens": 32}, "holds another measure"),
    "no such layer": ({"layers": "9"}, "layer 9 does not exist"),
    "no such signal": ({"signals": "shfit"}, "shfit"),
    "no such column": ({"text_column": "body"}, "no column 'body'"),
    "a long window": ({"window_tokens": 65}, "window_tokens is 65"),
    "thresholds of another measure": (
        {"thresholds": "{store}", "layers": "1", "store": "{new}"},
        "another measure",
    ),
    "no such thresholds": ({"thresholds": "{new}"}, "neither a store nor a run"),
    "a store below a file": ({"store": "{corpus}/s"}, "c.jsonl/s"),
    "a store of one process": ({"store": "memory://s", "executor": "ray"}, "lives in one process"),
    "a Ray that is open": ({"executor": "ray", "store": "{new}"}, "asks for no token"),
    "a cluster that is not there": (
        {"executor": "ray", "store": "{new}", "address": "127.0.0.1:1"},
        "nothing answers",
    ),
    "a reduce of nothing": ({"store": "{new}", "reduce_only": True}, " lacks "),
}


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> RunConfig:
    """A store with a complete run of a small corpus."""
    folder = tmp_path_factory.mktemp("measured")
    corpus = write_jsonl(folder / "c.jsonl", [{"text": t} for t in verses[:60]])
    config = config_of(tiny_bert, corpus, folder / "store", shard_bytes=2048)
    afn_ray.run(config).close()
    return config


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_run_refuses(
    case: str, measured: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, expected = REFUSED[case]
    if case == "a Ray that is open":
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    places = {"corpus": measured.corpus[0], "store": measured.store, "new": str(tmp_path / "new")}
    changes = {k: v.format(**places) if isinstance(v, str) else v for k, v in changes.items()}
    reduce_only = changes.pop("reduce_only", False)
    said = []
    for call in (afn_ray.dry_run, job.run):
        with pytest.raises(AfnError) as refused:
            call(replace(measured, **changes), reduce_only=reduce_only)
        said.append(
            (
                type(refused.value),
                refused.value.exit_code,
                re.sub("probe-[0-9a-f]+", "", str(refused.value)),
            )
        )
        if call is afn_ray.dry_run:
            assert not (tmp_path / "new").exists()
    assert said[0] == said[1] and expected in said[0][2]


def test_what_the_store_has_is_told_exactly_and_the_rest_beside_it(
    measured: RunConfig, tmp_path: Path, verses: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with afn_ray.open_run(measured.store) as run:
        counts = run.info["counts"]
    found = afn_ray.dry_run(measured)
    assert (found.tokens, found.tokens_low, found.tokens_high) == (counts["tokens"],) * 3
    assert (
        found.tokens_exact
        and found.num_documents == 60
        and found.num_shards_done == found.num_shards
    )
    assert found.store_bytes == sum(
        p.stat().st_size for p in Path(measured.store).glob("shards/*/*/*.parquet")
    )
    text = printed_estimate(found, capsys)
    assert f"tokens   {counts['tokens']:,}: {counts['tokens']:,} in the store" in text
    assert "nothing is left to measure" in text

    rows = [{"text": t} for t in verses[1000:1100]]
    more = write_jsonl(tmp_path / "more.jsonl", rows)
    grown = replace(measured, corpus=(*measured.corpus, str(more)))
    part = afn_ray.dry_run(grown)
    assert 0 < part.num_shards_done < part.num_shards and part.tokens_exact
    assert 0 < part.tokens_there <= counts["tokens"] < part.tokens
    with afn_ray.run(replace(grown, store=str(tmp_path / "fresh"))) as run:
        assert part.tokens == run.info["counts"]["tokens"]


def test_a_run_that_lost_shards_is_refused_by_its_dry_run_too(
    measured: RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(measured.store, tmp_path / "store")
    config = replace(measured, store=str(tmp_path / "store"))
    shutil.rmtree(next((tmp_path / "store" / "shards").glob("*/*")))
    with pytest.raises(StoreError, match="are gone from the store"):
        afn_ray.dry_run(config)


# --- what is not counted is estimated with an interval
# --------------------------------------------------


def write_unlike_files(folder: Path, kind: str) -> Path:
    """Files whose texts differ in tokens a byte, in length and in what is beside the text; four are
    of one kind.
    """
    chance = np.random.default_rng(7)
    folder.mkdir()
    words = {
        "en": ["the", "lord", "spake", "unto", "moses", "saying"],
        "rare": [f"zq{i}x" for i in range(90)],
        "long": ["antidisestablishmentarianism", "incomprehensible"],
        "zh": list("天地玄黄宇宙洪荒"),
    }
    for at in range(12):
        name = list(words)[at % 4]
        rows = []
        for _ in range(int(chance.integers(20, 90))):
            n = int(chance.lognormal(3.5, 1.2)) + 1
            text = " ".join(chance.choice(words[name], n).tolist())
            rows.append({"text": text, "noise": "-" * int(chance.integers(0, 60))})
        data = "".join(json.dumps(row, ensure_ascii=at % 3 == 0) + "\n" for row in rows).encode()
        if kind == "jsonl.gz":
            data = gzip.compress(data)
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{at}.parquet", row_group_size=16)
        else:
            (folder / f"{at}.{kind}").write_bytes(data)
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_the_interval_holds_the_true_count_as_often_as_it_says(
    kind: str, tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encode.TextEncoder(Tokenizer.from_file(str(minilm / "tokenizer.json")))
    config = RunConfig(
        corpus=(str(write_unlike_files(tmp_path / "c", kind)),),
        model="m",
        store=str(tmp_path / "s"),
        shard_bytes=32 << 10,
    )
    plan = make_plan(config)
    slices = [piece for shard in plan.shards for piece in shard.slices]
    truth = counting.count(slices, config.read_options, encoder)
    assert truth.exact and truth.low == truth.tokens == truth.high
    for name, value in {"EXACT_BYTES": 0, "STRATA": 8, "PLACES": 96, "BLOCK_BYTES": 1000}.items():
        monkeypatch.setattr(counting, name, value)
    found = []
    for seed in range(NUM_SEEDS):
        monkeypatch.setattr(counting, "fingerprint", lambda value, seed=seed: f"{seed:x}")
        found.append(counting.count(slices, config.read_options, encoder))
    held = sum(c.low <= truth.tokens <= c.high for c in found)
    bias = sum(c.tokens for c in found) / NUM_SEEDS / truth.tokens - 1
    width = sum(c.high - c.low for c in found) / NUM_SEEDS / truth.tokens
    print(kind, truth.tokens, held / NUM_SEEDS, bias, width)
    assert not any(c.exact for c in found) and held >= 0.9 * NUM_SEEDS
    assert abs(bias) < 0.01 + 2 * width / 4 / math.sqrt(NUM_SEEDS) and width < 0.5
    assert max(abs(c.documents / truth.documents - 1) for c in found) < 0.2


@pytest.mark.parametrize(
    ("ending", "encoding"), [("txt", "utf-16"), ("txt.gz", "utf-8"), ("jsonl", "utf-16")]
)
def test_lines_that_are_read_from_the_beginning_alone_are_counted_from_it(
    ending: str, encoding: str, tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"the lord spake unto moses {os.urandom(8).hex()}" for _ in range(3000)]
    rows = [json.dumps({"text": line}) if "json" in ending else line for line in lines]
    data = "".join(row + "\n" for row in rows).encode(encoding)
    (tmp_path / f"c.{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    config = RunConfig(
        corpus=(str(tmp_path / f"c.{ending}"),),
        model="m",
        store=str(tmp_path / "s"),
        txt_documents="line",
    )
    encoder = encode.TextEncoder(Tokenizer.from_file(str(minilm / "tokenizer.json")))
    slices = [piece for shard in make_plan(config).shards for piece in shard.slices]
    truth = counting.count(slices, config.read_options, encoder)
    sizes = {
        "EXACT_BYTES": 0,
        "READ_BYTES": 20_000,
        "LEAST_READ_BYTES": 20_000,
        "BLOCK_BYTES": 1000,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(counting, name, value)
    texts: list[int] = []
    real = encode.TextEncoder.count

    def count(encoder: encode.TextEncoder, some: Sequence[str]) -> object:
        texts.append(sum(map(len, some)))
        return real(encoder, some)

    monkeypatch.setattr(encode.TextEncoder, "count", count)
    found = counting.count(slices, config.read_options, encoder)
    assert truth.exact and truth.documents == 3000 and not found.exact and found.num_beginnings == 1
    assert found.tokens == pytest.approx(truth.tokens, rel=0.1) and max(texts) <= 1000
    assert found.documents == pytest.approx(3000, rel=0.1)
