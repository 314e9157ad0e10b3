"""Tests of ``afn bench``: equal results of all variants, planned texts, and skipped variants."""

from __future__ import annotations

import copy
import importlib.util
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

import simulated
import warm_workers
from afn_ray import bench, model
from afn_ray.bench import (
    contest,
    feed,
    figures,
    machine,
    monitor,
    ours,
    peers,
    rate,
    results,
    team,
    texts,
)
from afn_ray.bench import worker as bench_worker
from afn_ray.bench.figures import TOLERANCE, compare_strengths
from afn_ray.cli import commands as cli
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, ModelError
from afn_ray.model.signals import Received
from afn_ray.runs import worker
from afn_ray.runs.cluster import connection
from afn_ray.runs.measurer import Measurer
from bench import commands as bench_commands
from conftest import (
    benchmark,
    command_parsers,
    config_of,
    find_model,
    printed,
    subcommands_of,
    write_jsonl,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny_result(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of one repetition over the tiny BERT, with one process per variant."""
    words = "bench engine --profiles short,mixed --variants loop,tuned,engine,job --workers 1"
    with mock.patch.object(sys, "executable", warm_workers.choose(has_faults=False)):
        result, printed_table, notes = benchmark(
            cli.main,
            tmp_path_factory.mktemp("bench"),
            *words.split(),
            *("--model", str(tiny_bert), "--tokens", "2000", "--repeat", "1"),
        )
    assert "layer 2 of 3" in printed_table
    # The variants take turns.
    turns = [line.split(":")[0] for line in notes.splitlines()]
    assert turns[1:3] == ["short 1/1 loop", "short 1/1 tuned"]
    return result


def test_the_figures_have_their_keys_and_hang_together(tiny_result: dict[str, Any]) -> None:
    result = tiny_result
    assert result["gemm_peak_tflops"] > 0 and result["skipped"] == {} and result["layer"] == 2
    assert list(result["profiles"]) == ["short", "mixed"]
    for profile, variants in result["profiles"].items():
        assert list(variants) == ["loop", "tuned", "engine", "job"]
        assert result["ratios"][profile]["engine/loop"] == variants["engine"]["ratio_loop"]
        assert variants["loop"]["ratio_loop"] == variants["tuned"]["ratio_tuned"] == 1
        assert (
            variants["loop"]["tokens"]
            < variants["engine"]["tokens"]
            == variants["job"]["tokens"]
            <= 2000
        )
        for f in variants.values():
            assert f["tokens_per_s"] == pytest.approx(f["tokens"] / f["seconds"][0])
            assert f["low"] <= f["tokens_per_s"] <= f["high"]
            assert f["mfu"] > 0 and 0 <= f["padding"] < 1 and f["peak_bytes"] > 0
            # The stages of each thread; the threads run at the same time.
            for of_thread in (("read_s",), ("tokenize_s",), ("wait_s", "model_s"), ("write_s",)):
                assert (
                    0
                    <= sum(f["stages"].get(name, 0) for name in of_thread)
                    <= f["seconds"][0] + 0.1
                )
        for name in ("loop", "tuned"):  # all stages are in one thread
            assert sum(variants[name]["stages"].values()) <= variants[name]["seconds"][0] + 0.1
        assert {"read_s", "tokenize_s", "wait_s", "model_s", "write_s"} == set(
            variants["job"]["stages"]
        )
        assert variants["job"]["stages"]["write_s"] > 0


def test_every_variant_gives_the_same_strengths(tiny_result: dict[str, Any]) -> None:
    for variants in tiny_result["profiles"].values():
        assert variants["job"]["difference"] == 0  # equal batches give equal bits
        assert all(f["difference"] <= TOLERANCE[tiny_result["dtype"]] for f in variants.values())


def test_the_table_fits_and_names_what_it_shows(tiny_result: dict[str, Any]) -> None:
    text = printed(results.render, tiny_result)
    for expected in (
        "layer 2 of 3",
        "GEMM peak",
        "mixed",
        "job/engine",
        "write",
        bench.VARIANTS["loop"].split(":")[0],
    ):
        assert expected in text
    assert "bars" not in text  # only the built-in model has bars
    assert "times," not in text  # one pass is enough on a CPU
    longer = copy.deepcopy(tiny_result)
    longer["profiles"]["mixed"]["engine"]["passes"] = 40
    assert "texts 40 times," in printed(results.render, longer)


def spec_of(folder: Path, own: Path, **changes: Any) -> peers.Spec:
    """The spec of one process on the CPU that measures the model in ``folder``."""
    spec = peers.Spec(
        variant="",
        model=str(folder),
        layer=2,
        depth=3,
        device="cpu",
        dtype="float32",
        batch_tokens=256,
        tokenizer_workers=0,
        window_tokens=64,
        workers=1,
        folder=str(own),
        texts={},
    )
    return replace(spec, **changes)


def written_texts(folder: Path, causal: bool = False) -> list[texts.Text]:
    """Mixed texts for the model in ``folder``, about 800 tokens."""
    files = find_model(folder)
    writer = texts.Writer(model.load_tokenizer(files), files.context_tokens)
    return writer.write("mixed", 800, 400, causal=causal)


def in_this_process(
    folder: Path, own: Path, variants: dict[str, Any], causal: bool = False
) -> dict[str, Any]:
    """Run ``variants`` on mixed texts in float32; return their outcomes and differences."""
    files, written = find_model(folder), written_texts(folder, causal)
    spec = spec_of(folder, own, depth=files.depth, window_tokens=files.context_tokens)
    loaded = {name: variant(spec) for name, variant in variants.items()}
    found = {name: variant.run(written) for name, variant in loaded.items()}
    last = getattr(loaded.get("loop"), "last", None) or [None] * len(written)
    strengths = {n: dict(enumerate(zip(o.strengths, last, strict=True))) for n, o in found.items()}
    assert all(
        sum(map(len, o.strengths)) == sum(t.num_tokens for t in written) for o in found.values()
    )
    return {"outcomes": found, "differences": compare_strengths(strengths, "float32")}


def test_a_decoder_is_measured_too(tiny_gpt: Path, tmp_path: Path) -> None:
    variants = {"loop": peers.Loop, "tuned": peers.Tuned, "engine": ours.Engine}
    assert (
        max(in_this_process(tiny_gpt, tmp_path, variants, causal=True)["differences"].values())
        < 1e-4
    )


@pytest.mark.skipif(
    not importlib.util.find_spec("sentence_transformers"), reason="comes with the extra bench"
)
def test_sentence_transformers_is_checked_against_the_last_hidden_states(
    tiny_bert: Path, tmp_path: Path
) -> None:
    variants = {"loop": peers.Loop, "sentence_transformers": peers.SentenceTransformers}
    found = in_this_process(tiny_bert, tmp_path, variants)
    assert found["differences"]["sentence_transformers"] < 1e-5
    loop, sorted_ones = (found["outcomes"][name].forward_tokens for name in variants)
    assert sorted_ones <= loop


# --- on a GPU
# -----------------------------------------------------------------------------------------------


def test_the_defaults_on_a_gpu_are_those_of_a_run(tiny_bert: Path, tmp_path: Path) -> None:
    options = contest.Options(str(tiny_bert), device="cuda")
    for gpu in (simulated.H200, simulated.T4):  # neither bfloat16 alone nor its lack decides
        with simulated.device(gpu):
            spec, _, _ = contest._plan(options, tmp_path)
        assert (spec.device, spec.dtype) == ("cuda", "float16")
        assert spec.batch_tokens == 32_768 and spec.least_s == bench.LEAST_S["cuda"] > 20
    given = replace(options, dtype="bfloat16", tokenizer_workers=3)
    with simulated.device():
        spec, _, _ = contest._plan(given, tmp_path)
    assert (spec.dtype, spec.tokenizer_workers) == ("bfloat16", 3)
    spec, _, _ = contest._plan(replace(options, device="cpu"), tmp_path)
    assert spec.least_s == 0 and spec.dtype in ("float32", "bfloat16")


def test_the_monitor_measures_in_the_dtype_that_a_run_would_take(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "likely_dtype", lambda device: "bfloat16")
    assert monitor._Candidate(str(tiny_bert), "2", "cpu", str(tmp_path)).dtype == "bfloat16"
    with simulated.device():
        assert contest.likely_dtype("cuda") == "float16"


@pytest.mark.parametrize("variant", [*bench.VARIANTS, "gemm"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_our_variants_tokenize_as_a_runs_workers_do(variant: str, device: str) -> None:
    environment = team.environment_of(spec_of(Path(), Path(), variant=variant, device=device))
    one_core = variant in ("engine", "job", "tuned", "gemm")
    if variant in ("engine", "job") or (device == "cpu" and one_core):
        assert environment == connection.WORKER_ENV
        assert environment["TOKENIZERS_PARALLELISM"] == "false"
    else:
        assert environment == {"TOKENIZERS_PARALLELISM": "true"}


@pytest.mark.parametrize("kind", [ours.Engine, ours.Job])
def test_several_passes_measure_the_texts_so_often(
    kind: Any, tiny_bert: Path, tmp_path: Path
) -> None:
    written = written_texts(tiny_bert)
    bench_worker.dump_texts(written, tmp_path / "texts.json")
    spec = spec_of(tiny_bert, tmp_path, texts={"mixed": str(tmp_path / "texts.json")})
    variant, found = kind(spec), {}
    for passes in (1, 3):
        if kind is ours.Job:
            outcome = variant.run_profile("mixed", passes)
            outcome.strengths = variant.read_back(len(written))
        else:
            outcome = variant.run(written, passes)
        found[passes] = outcome
    variant.close()
    num_tokens = sum(text.num_tokens for text in written)
    counted = variant._processor.counters.tokens
    assert counted == (1 + 3) * num_tokens
    assert 2 < found[3].forward_tokens / found[1].forward_tokens <= 3  # with less filler
    for once, thrice in zip(found[1].strengths, found[3].strengths, strict=True):
        np.testing.assert_allclose(thrice, once, rtol=1e-5)
    assert len(found[3].strengths) == len(written)


class Clocked:
    """A variant with a clock of its own: 1 s to fill its pipeline, 0.1 s for each pass."""

    def __init__(self, spec: peers.Spec) -> None:
        self.passes: list[int] = []

    def run(self, texts: list[texts.Text], passes: int = 1) -> peers.Outcome:
        self.passes.append(passes)
        strengths = [np.ones(text.num_tokens, np.float32) for text in texts]
        return peers.Outcome(strengths, 10 * passes, {}, 1 + 0.1 * passes)


def test_what_has_a_pipeline_is_measured_until_filling_it_is_noise(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_worker, "_load", Clocked)
    bench_worker.dump_texts(written_texts(tiny_bert), tmp_path / "texts.json")
    ran = {}
    for variant in ("engine", "tuned"):
        given = {"variant": variant, "texts": {"mixed": str(tmp_path / "texts.json")}}
        loaded = bench_worker.Worker(spec_of(tiny_bert, tmp_path, **given, least_s=30.0))
        answer = loaded.run("mixed")
        ran[variant] = answer["passes"], answer["seconds"], loaded._variant.passes
    _, seconds, warm_ups = ran["engine"]
    assert seconds >= 30 and warm_ups == [1, 20, 220, 316, 316]
    assert 1 / seconds < 0.04  # so much of the time fills the pipeline
    assert ran["tuned"] == (1, 1.1, [1, 1])


def test_figures_count_every_pass() -> None:
    both: Any = SimpleNamespace(parts={"short": [[0, 1]]}, at_work=1)
    piece = texts.Piece("", 0, 10, 12)
    written = [texts.Text("", (piece,)), texts.Text("", (piece,))]
    takes = {
        "engine": [team.Take(2.0, 0.0, 0, 0, 4 * 25, {"model_s": 1.5}, passes=4)],
        "loop": [team.Take(8.0, 0.0, 0, 0, 30, {"model_s": 7.5})],
    }
    one = figures.ProfileTimes("short", written, dict.fromkeys(takes, both), takes, {})
    found = figures.profile_figures(one, "engine", figures.Counted(1.0, 0.0), 1e3)
    assert found["tokens_per_s"] == 4 * 20 / 2.0 and found["passes"] == 4
    assert found["ratio_loop"] == (8.0 / 1) / (2.0 / 4)
    assert found["padding"] == pytest.approx(1 - 24 / 25)


def test_a_rate_on_a_gpu_comes_from_texts_that_take_long_enough(
    tiny_bert: Path, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    right = rate.process_all

    def process_all(*given: Any) -> tuple[float, int]:
        _, num_tokens = right(*given)
        counted.append(num_tokens)
        return 1 + num_tokens / 1000, num_tokens  # 1 s to fill the pipeline

    monkeypatch.setattr(rate, "process_all", process_all)
    monkeypatch.setattr(rate, "LEAST_S", {"cpu": 10.0})
    monkeypatch.setattr(rate, "TOKENS_PER_WORKER", {"cpu": 500})
    config = config_of(tiny_bert, corpus, tmp_path, layers="1")
    result = rate.measure(config, None, 2, lambda note: None)
    *warm_ups, first, second = counted
    assert len(warm_ups) > 1 and first == second == warm_ups[-1] == result["tokens"] >= 9000
    assert result["tokens_per_second"] == [first / (1 + first / 1000)] * 2
    counted.clear()
    rate.measure(config, 800, 1, lambda note: None)  # so many were asked for
    assert len(counted) == 2


def test_variants_that_disagree_give_no_figures() -> None:
    whole = {0: (np.ones(200, np.float32), None), 1: (np.full(9, 2, np.float32), None)}
    off = {0: (np.full(200, 1.2, np.float32), None)}
    short = {0: (np.ones(199, np.float32), None)}
    assert compare_strengths({"loop": {0: whole[0]}, "engine": whole}, "float32") == {
        "loop": 0,
        "engine": 0,
    }
    for wrong in (off, short):
        with pytest.raises(ModelError, match=r"tuned .*no figures"):
            compare_strengths({"tuned": wrong, "engine": whole}, "bfloat16")
    last = {0: (np.ones(4, np.float32), np.full(4, 3, np.float32))}
    deep = {0: (np.full(4, 3, np.float32), None)}
    assert (
        compare_strengths({"loop": last, "sentence_transformers": deep}, "float32")[
            "sentence_transformers"
        ]
        == 0
    )
    assert "sentence_transformers" not in compare_strengths(
        {"sentence_transformers": deep}, "float32"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--variants", "loop,fastest"], "'loop,fastest'.*loop, tuned, ray_data"),
        (["--profiles", ""], "short, mixed, full"),
        (["--repeat", "0"], "--repeat is 0; expected at least 1"),
        (["--tokens", "3"], "--tokens is 3"),
        (["--layer", "4"], "layer 4 does not exist"),
        (["--layer", "0"], "one layer from 1 to 3"),
        (["--layer", "1,2"], "one layer from 1 to 3"),
        (["--tokens", "40", "--workers", "9"], "too few for 9 workers"),
        (["--json", "/nowhere/at/all"], "no folder"),
        (["--model", "/nowhere"], "no model at /nowhere"),
    ],
)
def test_what_is_asked_wrongly_is_refused(
    changes: list[str], message: str, tiny_bert: Path
) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    bench.add_commands(parser)
    with pytest.raises(ConfigError, match=message):
        bench.call(parser.parse_args(["engine", "--model", str(tiny_bert), *changes]))


def test_a_peer_that_is_not_installed_is_skipped_with_a_note(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    missing = {"sentence_transformers", "pandas"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else there(name)
    )
    notes: list[str] = []
    with pytest.raises(ConfigError, match="nothing to measure"):
        contest.measure(
            contest.Options(str(tiny_bert), workers=1, tokens=400),
            ["full"],
            ["ray_data"],
            notes.append,
        )
    assert notes == ["ray_data is skipped: pandas is not installed; pip install 'afn-ray[bench]'"]


@pytest.mark.ray
def test_ray_data_runs_the_tuned_pipeline_in_its_actors(tiny_bert: Path) -> None:
    options = contest.Options(str(tiny_bert), workers=2, tokens=1200, repeat=1)
    with mock.patch.object(sys, "executable", warm_workers.choose(has_faults=False)):
        result = contest.measure(options, ["short"], ["tuned", "ray_data"], lambda note: None)
    figures = result["profiles"]["short"]
    difference = figures["ray_data"]["difference"]
    assert difference is not None and difference < 1e-3
    assert figures["ray_data"]["padding"] == figures["tuned"]["padding"]
    assert 0 < figures["ray_data"]["stages"]["model_s"] <= figures["ray_data"]["seconds"][0]


@pytest.mark.parametrize(("profile", "mean"), [("short", 40), ("mixed", 150), ("full", 512)])
@pytest.mark.parametrize("workers", [1, 4])
def test_lengths_are_as_planned(profile: str, mean: int, workers: int) -> None:
    total = bench.TOKENS_PER_WORKER["cpu"] * workers
    lengths = texts.plan_lengths(profile, total, 512, 2048 * workers)
    assert 0.95 * total <= sum(lengths) <= total
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.15)
    assert min(lengths) >= texts.SHORTEST and (max(lengths) > 512) == (profile == "mixed")
    # The lengths vary, except for full windows.
    assert len({round(np.log2(n)) for n in lengths}) >= (1 if profile == "full" else 5)
    written = [texts.Text("", (texts.Piece("", 0, n, n),)) for n in lengths]
    parts = texts.share(written, workers)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)
    assert len(texts.sample(written, 10)) == pytest.approx(len(lengths) / 10, abs=1)
    padded = [
        len(group) * max(lengths[i] for i in group) for group in texts.budgeted(lengths, 2048)
    ]
    if profile == "short":
        assert sum(padded) < 1.15 * sum(lengths)  # as in a long sorted corpus


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt"])
def test_texts_have_the_tokens_that_were_planned(name: str, request: pytest.FixtureRequest) -> None:
    files = find_model(request.getfixturevalue(name))
    window = files.context_tokens
    writer = texts.Writer(model.load_tokenizer(files), window)
    for profile in bench.PROFILES:
        written = writer.write(profile, 1500, 500, causal=name == "tiny_gpt")
        assert [t.num_tokens for t in written] == texts.plan_lengths(profile, 1500, window, 500)
        assert written == writer.write(profile, 1500, 500, causal=name == "tiny_gpt")
        assert all(p.length <= window and p.text in t.text for t in written for p in t.pieces)
    assert any(len(t.pieces) > 1 for t in writer.write("mixed", 1500, 500, causal=False))


def test_the_made_up_model_is_one_that_transformers_knows(tmp_path: Path) -> None:
    import transformers

    texts.save_bert(
        tmp_path, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == texts.VOCABULARY and tokenizer.pad_token == "[PAD]"
    text = (
        texts.Writer(model.load_tokenizer(find_model(tmp_path)), 64)
        .write("full", 64, 64, causal=False)[0]
        .text
    )
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 64 and tokenizer.unk_token_id not in ids and ids[0] == tokenizer.cls_token_id


def test_the_monitor_measures_every_length_that_fits(tiny_bert: Path, tmp_path: Path) -> None:
    words = ("bench", "monitor", "--texts", "3", "--model", str(tiny_bert))
    result, table, _ = benchmark(cli.main, tmp_path, *words)
    lengths = result["models"][str(tiny_bert)]["lengths"]
    assert list(lengths) == ["16", "64"] and "distilled_speedup" not in result
    for found in lengths.values():
        assert list(found["ways"]) == list(monitor.WAYS)
        assert all(0 < way["median_ms"] <= way["p95_ms"] for way in found["ways"].values())
        assert (
            found["overheads"].keys() == monitor.PLAIN.keys()
            and min(found["overheads"].values()) > -1
        )
    assert "strength, shift, attention" in table


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_llama", "tiny_mpnet"])
def test_every_way_of_the_monitor_records_what_the_engine_does(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = str(request.getfixturevalue(name))
    candidate = monitor._Candidate(folder, "2", "cpu", str(tmp_path))
    (text,) = candidate.texts(30, 1)
    config = RunConfig(
        corpus=("-",),
        model=folder,
        store=str(tmp_path),
        layers="2",
        executor="inline",
        dtype="float32",
        signals="shift" if candidate.without else "shift,attention",
    )
    measurer = Measurer(worker.prepare(config, candidate.files, "cpu", "float32"))
    expected = dict(
        zip(
            (s.signal for s in measurer.task.measure.series),
            measurer.measure([text], [False]).values,
            strict=True,
        )
    )
    for way, columns in (
        ("strength", ["strength"]),
        ("strength to the layer", ["strength"]),
        ("strength, shift", ["strength", "shift"]),
        ("strength, shift, attention", ["strength", "shift", *Received.columns]),
    ):
        if way in candidate.ways:
            np.testing.assert_allclose(
                candidate.ways[way](text), [expected[c] for c in columns], rtol=1e-4, atol=1e-6
            )
    assert ("gives no attention weights" in candidate.without) == (name == "tiny_mpnet")


def test_the_feed_is_measured_stage_by_stage_and_whole(tiny_bert: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "the lord is my shepherd"}] * 40)
    words = ["bench", "feed", "--model", str(tiny_bert), "--corpus", str(corpus)]
    words += ["--processes", "0,1", "--tokens", "2000", "--repeat", "1"]
    result, table, said = benchmark(cli.main, tmp_path, *words)
    notes = said.splitlines()
    assert list(result["stages"]) == list(feed.STAGES)
    assert all(len(values) == 1 and values[0] > 0 for values in result["stages"].values())
    assert list(result["workers"]) == ["0", "1"] and result["tokens"] > 1000
    for found in result["workers"].values():
        assert found["tokens_per_s"][0] > 0 and found["own_us"][0] > 0
    assert "stages 1/1" in notes[0] and len(notes) == 1 + 2 * 2  # with a warm-up of each worker
    assert all(stage in table for stage in feed.STAGES) and "tokenizer processes" in table


def test_the_feed_of_made_up_texts_has_about_the_tokens_that_were_asked_for() -> None:
    result = feed.measure(None, [], [0], 5000, 1, lambda note: None)
    assert 2500 < result["tokens"] < 10_000 and result["model"] == bench.BUILT_IN_TOKENIZER


def test_numbers_of_processes_are_whole() -> None:
    import argparse

    assert bench._counts("2,0, 1,2") == [0, 1, 2]
    with pytest.raises(argparse.ArgumentTypeError, match="expected whole numbers"):
        bench._counts("1,-2")


def test_the_watch_tells_whose_work_it_is() -> None:
    burn = (
        "import time\nx = b'1' * (32 << 20)\nend = time.monotonic() + 1.5\nwhile "
        "time.monotonic() < end: pass"
    )
    with subprocess.Popen([sys.executable, "-c", burn]) as own, machine.Watch([own.pid]) as watch:
        own.wait()
    assert watch.peak_bytes > 32 << 20
    with subprocess.Popen([sys.executable, "-c", burn]) as other, machine.Watch([]) as stranger:
        other.wait()
    # Other processes may run on this machine, so this is a lower bound.
    assert stranger.peak_bytes == 0 and stranger.foreign > 0.5 / len(stranger._cores)


def test_the_cluster_job_is_the_same_command() -> None:
    command = [sys.executable, "jobs/benchmark.py", "engine", "--variants", "fastest"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "variants are 'fastest'" in done.stderr


def test_the_help_and_the_page_on_jobs_name_every_benchmark() -> None:
    in_a_checkout = set(runpy.run_path(str(ROOT / "jobs" / "benchmark.py"))["OF_A_CHECKOUT"])
    assert in_a_checkout == subcommands_of(bench_commands.parser()).keys()
    anywhere = command_parsers()["bench"]
    page = (ROOT / "infra" / "guide" / "jobs.md").read_text("utf-8")
    listed = page.partition("`WHAT` is ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z]+)`", listed)) == in_a_checkout | subcommands_of(anywhere).keys()
    offered = (anywhere.description or "").partition("jobs/benchmark.py ")[2]
    assert set(re.findall(r"[a-z]+", offered)) - {"or"} == in_a_checkout
