"""Half precision is taken where a calibration finds it safe, is refused where it is not, and the
store remembers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import afn_ray
import simulated
from afn_ray import model
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Document
from afn_ray.errors import ModelError, OutOfMemory, StoreError
from afn_ray.runs import calibrator, measurer, outliers, precision, worker
from afn_ray.runs.events import Event, Warned
from afn_ray.runs.task import Task
from afn_ray.store import calibrations, manifest
from conftest import MakeConfig, write_jsonl


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies fast in bfloat16."""
    monkeypatch.setattr(
        model, "has_fast_products", lambda dtype, device: dtype == "bfloat16" or device == "cuda"
    )


@pytest.fixture
def small_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "CALIBRATION_TOKENS", 3000)


def task_of(config: RunConfig) -> Task:
    return worker.prepare(config, measurer.find_model_files(config), "cpu", "float32")


def test_bfloat16_products_are_safe_on_real_weights_and_the_figures_are_true(
    minilm: Path, verses: list[str], make_config: MakeConfig, half: None
) -> None:
    config = make_config(model=str(minilm), layers="4", dtype="auto", batch_tokens=2048)
    task, texts = task_of(config), verses[:120]
    decided = precision.decide(task, texts)
    assert (decided.asked, decided.trials[0].dtype) == ("auto", "bfloat16")
    reference = [strengths(task, dtype, texts) for dtype in ("float32", "bfloat16")]
    highs = [v >= np.quantile(v, 0.75, method="inverted_cdf") for v in reference]
    trial = decided.trials[0]
    assert decided.n_tokens == len(reference[0]) > precision.LEAST_TOKENS
    assert trial.flips == {"4": pytest.approx(np.mean(highs[0] != highs[1]))}
    errors = np.abs(reference[1] - reference[0]) / reference[0]
    assert trial.median_error == {"4": pytest.approx(np.median(errors), rel=1e-3)}
    assert 0 < trial.median_error["4"] < precision.MAX_MEDIAN_ERROR
    assert trial.safe == (trial.flips["4"] < precision.MAX_FLIPS)
    assert decided.dtype == ("bfloat16" if trial.safe else "float32")
    assert trial.flips["4"] < 0.005


def strengths(task: Task, dtype: str, texts: list[str]) -> np.ndarray:
    task = replace(task, measure=replace(task.measure, dtype=dtype))
    measured = measurer.Measurer(task).measure(texts, [False] * len(texts))
    found: np.ndarray = measured.strengths[0, (measured.encoded.flags & 1) == 0]
    return found


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (
            lambda x: x * np.where(np.arange(x.shape[1]) % 100 == 0, 2, 1).astype(np.float32),
            "of the labels change",
        ),
        (lambda x: x * np.float32(1.001), "the median relative error is 1.0e-03, 5e-04 may be"),
        (lambda x: x + np.float32(np.nan), "not finite"),
    ],
)
def test_what_is_not_safe_is_refused_and_says_why(
    damage: Any,
    why: str,
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    small_calibration: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = measurer.Measurer.values

    def damaged(self: Any, prepared: Any, counts: bool = True) -> Any:
        exact = right(self, prepared, counts)
        if self.task.measure.dtype == "float32":
            return exact
        return replace(exact, series=damage(exact.series))

    monkeypatch.setattr(measurer.Measurer, "values", damaged)
    task = task_of(make_config(dtype="auto"))
    decided = precision.decide(task, verses[:200])
    assert decided.dtype == "float32"
    assert decided.why.startswith("bfloat16 is not safe: ") and why in decided.why
    assert not decided.trials[0].safe


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ModelError("tiny does not run in bfloat16"), "tiny does not run in bfloat16"),
        (RuntimeError("not implemented for 'Half'\nat"), "not implemented for 'Half'"),
    ],
)
def test_a_model_that_does_not_run_in_half_precision_runs_in_float32(
    error: Exception,
    why: str,
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    small_calibration: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = model.prepare

    def refuse(loaded: model.Model, *args: Any) -> None:
        if str(loaded.dtype) != "torch.float32":
            raise error
        right(loaded, *args)

    monkeypatch.setattr(model, "prepare", refuse)
    decided = precision.decide(task_of(make_config(dtype="auto")), verses[:200])
    assert (decided.dtype, decided.trials[0].why) == ("float32", why)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("error", "raised", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            OutOfMemory,
            "the calibration in {} stopped: .*CUDA out of memory.*Give a smaller --batch-tokens",
        ),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), RuntimeError, "illegal"),
    ],
)
def test_an_error_of_memory_or_of_the_device_says_nothing_of_a_precision(
    error: Exception,
    raised: type[Exception],
    says: str,
    dtype: str,
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    small_calibration: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = model.Model.submit

    def fail(loaded: model.Model, ids: Any, lengths: Any, *args: Any) -> Any:
        if loaded.attention and str(loaded.dtype) == f"torch.{dtype}" and len(ids) > 200:
            raise error
        return right(loaded, ids, lengths, *args)

    monkeypatch.setattr(model.Model, "submit", fail)
    with pytest.raises(raised, match=says.format(dtype)):
        precision.decide(task_of(make_config(dtype="auto")), verses[:200])


def test_a_model_that_does_not_fit_says_nothing_of_a_precision(
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    small_calibration: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = model.Model.build

    def build(loaded: model.Model, **options: Any) -> None:
        if str(loaded.dtype) != "torch.float32":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        right(loaded, **options)

    monkeypatch.setattr(model.Model, "build", build)
    with pytest.raises(ModelError, match="does not fit into the memory of cpu"):
        precision.decide(task_of(make_config(dtype="auto")), verses[:200])


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Nothing is freed by chance."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("way", ["unsafe", "refused"])
def test_each_model_of_a_calibration_finds_the_memory_free(
    way: str,
    make_config: MakeConfig,
    verses: list[str],
    small_calibration: None,
    no_collector: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So does the model of the worker, which the same process may load next."""
    load, prepare = model.Model.load, model.prepare
    found: list[tuple[str, int]] = []

    def count(loaded: model.Model) -> None:
        found.append((str(loaded.dtype), log.memory.live_bytes))
        load(loaded)

    def refuse(loaded: model.Model, *args: Any) -> None:
        prepare(loaded, *args)
        if way == "refused" and str(loaded.dtype) != "torch.float32":
            raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(model.Model, "load", count)
    monkeypatch.setattr(model, "prepare", refuse)
    monkeypatch.setattr(precision, "MAX_MEDIAN_ERROR", 0.0)
    config = make_config(dtype="auto", batch_tokens=512)
    with simulated.device() as log:
        task = worker.prepare(config, measurer.find_model_files(config), "cuda", "float32")
        decided = precision.decide(task, verses[:60])
        found.append(("the worker's", log.memory.live_bytes))
        outliers.find_dimensions(task, verses[:5])
        found.append(("the worker's", log.memory.live_bytes))
    assert [t.dtype for t in decided.trials] == ["float16", "bfloat16"]
    names = ["torch.float32", "torch.float16", "torch.bfloat16", "the worker's"]
    assert found == [(name, 0) for name in (*names, "torch.float32", "the worker's")]


def test_a_sample_that_is_too_small_tells_nothing(make_config: MakeConfig, half: None) -> None:
    decided = precision.decide(task_of(make_config(dtype="auto")), ["a short text"])
    assert (decided.dtype, decided.why) == ("float32", "the sample has 3 tokens, too few to decide")


def test_nothing_is_tried_where_half_precision_is_no_faster(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "has_fast_products", lambda dtype, device: False)
    decided = precision.decide(task_of(make_config(dtype="auto")), ["text"])
    assert (decided.dtype, decided.trials) == ("float32", ())
    assert (
        precision.describe(decided)
        == "matrix products in float32 on cpu: half-precision products are no faster"
    )


def test_gpus_try_float16_first_and_a_wide_range_rules_it_out(
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    small_calibration: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert precision.candidates("auto", "cuda") == ("float16", "bfloat16")
    assert precision.candidates("auto", "cpu") == ("bfloat16",)
    assert precision.candidates("float32", "cuda") == ()
    task = task_of(make_config(dtype="float16"))
    near = precision.decide(task, verses[:200])
    assert near.dtype == "float16" and near.trials[0].safe and 0 < near.trials[0].peak < 100
    monkeypatch.setattr(precision, "FLOAT16_RANGE", near.trials[0].peak / 2)
    wide = precision.decide(task, verses[:200])
    assert wide.dtype == "float16"  # it was asked for
    assert "too near its range" in wide.trials[0].why


def test_the_store_remembers_and_the_run_records_what_was_decided(
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    small_calibration: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:150]])
    config = make_config(corpus=(str(corpus),), dtype="auto", shard_bytes=1 << 20)
    events: list[str] = []
    with afn_ray.run(config, lambda e: events.append(e.message)) as run:
        info = manifest.find_run(run.uri).info
    decided = precision.from_json(info["precision"])
    assert info["measure"]["dtype"] == decided.dtype
    assert decided.trials[0].flips.keys() == {str(k) for k in info["layers"]}
    assert precision.describe(decided) in events
    assert "a calibration compares half precision with float32" in events

    def never(*args: Any) -> Any:
        raise AssertionError(
            "a second calibration could decide otherwise, and all would be measured again"
        )

    monkeypatch.setattr(precision, "decide", never)
    events.clear()
    write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:100]])
    with afn_ray.run(config, lambda e: events.append(e.message)) as run:
        assert manifest.find_run(run.uri).info["precision"] == info["precision"]
    assert "a calibration compares half precision with float32" not in events
    assert any("decided by the first run of this store" in e for e in events)


@pytest.mark.parametrize(
    "damage", [{}, {"trials": [{}]}, {"trials": [], "dtype": "float32"}, {"trials": 1}]
)
def test_a_damaged_record_is_named(damage: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="record of its precision is damaged"):
        precision.from_json(damage)


def test_two_first_runs_measure_in_the_dtype_that_the_store_keeps(
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The calibration that ends second may have decided otherwise."""
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:10]])
    config = make_config(corpus=(str(corpus),), dtype="auto")
    ours = precision.Precision("bfloat16", "auto", "cpu", "safe on the sample", 9999, ())
    rivals = replace(ours, dtype="float32", why="bfloat16 is not safe")
    write = calibrations.write_calibration

    def second(store: str, key: str, value: dict[str, Any]) -> dict[str, Any]:
        assert value["dtype"] == "bfloat16"
        write(store, key, rivals.to_json())
        return write(store, key, value)

    monkeypatch.setattr(precision, "decide", lambda task, texts: ours)
    monkeypatch.setattr(calibrations, "write_calibration", second)
    events: list[str] = []
    with afn_ray.run(config, lambda e: events.append(e.message)) as run:
        info = manifest.find_run(run.uri).info
    assert info["measure"]["dtype"] == info["precision"]["dtype"] == "float32"
    assert any("another run of this store decided it meanwhile" in e for e in events)


@pytest.mark.parametrize("is_safe", [True, False])
def test_half_precision_is_taken_over_only_where_it_was_found_safe(
    is_safe: bool,
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    half: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:5]])
    trial = precision.Trial(
        "bfloat16", is_safe, "" if is_safe else "labels change", {"2": 0.0}, {"2": 0.0}
    )
    asked: list[str] = []

    def decide(task: Task, texts: object) -> precision.Precision:
        asked.append(task.config.dtype)
        return precision.Precision("bfloat16", asked[-1], "cuda", "it is", 9999, (trial,))

    monkeypatch.setattr(precision, "decide", decide)
    config = make_config(corpus=(str(corpus),), dtype="bfloat16", layers="2")
    afn_ray.run(config).close()
    with afn_ray.run(replace(config, dtype="auto", signals="strength,shift")) as run:
        decided = precision.from_json(run.info["precision"])
    assert asked == (["bfloat16"] if is_safe else ["bfloat16", "auto"])
    assert (decided.asked, decided.device, decided.trials) == ("auto", "cuda", (trial,))


def test_a_calibration_sees_the_beginning_of_every_file() -> None:
    documents = [Document("s", i, f"{file}{i}") for file in "ab" for i in range(3)]
    documents = [replace(d, source=d.text[0]) for d in documents]
    assert calibrator.in_turns(documents[:5]) == ["a0", "b0", "a1", "b1", "a2"]
    assert [len(t) for g in precision._groups(["x" * 10**6, "y"]) for t in g] == [
        precision.CALIBRATION_TOKENS,
        1,
    ]


def test_a_precision_that_is_asked_for_and_not_safe_is_warned_of(
    tmp_path: Path,
    make_config: MakeConfig,
    verses: list[str],
    small_calibration: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "MAX_MEDIAN_ERROR", 0.0)
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:150]])
    events: list[Event] = []
    with afn_ray.run(
        make_config(corpus=(str(corpus),), dtype="bfloat16", shard_bytes=1 << 20), events.append
    ) as run:
        assert manifest.find_run(run.uri).info["measure"]["dtype"] == "bfloat16"
    assert [e.message[:39] for e in events if isinstance(e, Warned)] == [
        "warning: bfloat16 is not safe here: the"
    ]


def test_a_dry_run_decides_and_writes_nothing(
    tmp_path: Path, make_config: MakeConfig, verses: list[str], half: None, small_calibration: None
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in verses[:150]])
    estimate = afn_ray.dry_run(make_config(corpus=(str(corpus),), dtype="auto"))
    assert estimate.dtype in ("float32", "bfloat16")
    assert not (tmp_path / "store").exists()


def test_a_padded_model_warns_once(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise ValueError("its attention is its own")

    monkeypatch.setattr("afn_ray.model.attention.Layout", refuse)
    corpus = write_jsonl(
        tmp_path / "c.jsonl", [{"text": f"Text number {i} of a few words."} for i in range(300)]
    )
    events: list[Event] = []
    with afn_ray.run(make_config(corpus=(str(corpus),)), events.append):
        pass
    warnings = [e.message for e in events if isinstance(e, Warned)]
    assert len(warnings) == 1
    assert (
        "sequences are padded, not packed" in warnings[0]
        and "its attention is its own" in warnings[0]
    )
