"""Every family on a simulated GPU measures what the CPU does; packed ones use flash attention
without making the host wait. Where it is refused, the next best way is used and named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import simulated
from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import attention, linear
from afn_ray.model.signals import Received
from conftest import find_model, save_model
from families import CONTEXT, FAMILIES, GROUPED, PACKED, SMALL
from test_families import documents

LAYERS = [0, 2]
PROBES = [documents(3, [n])[0] for n in (4, 9, CONTEXT)]
TEXTS = documents(1, [1, CONTEXT, 7, 7, 7, 30, 2])
LENGTHS = [len(text) for text in TEXTS]
TOLERANCE = {"float16": 5e-3, "bfloat16": 3e-2}
"""Largest relative error of nine tokens of ten, against float32 on the CPU."""
AMPERE_ONLY = "FlashAttention only supports Ampere GPUs or newer."


def family_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function that returns the folder of a family's model, which it makes once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind, options = FAMILIES[name]
            config = getattr(transformers, kind)(**options)
            made[name] = save_model(tmp_path_factory.mktemp(name), config)
        return made[name]

    return make


folder = pytest.fixture(family_folders, scope="module", name="folder")


def load(
    folder: Path,
    dtype: str,
    device: str,
    needs: frozenset[str] = frozenset(),
    layers: Sequence[int] = LAYERS,
) -> model.Model:
    loaded = model.Model(find_model(folder), layers, dtype, device, 64)
    model.prepare(loaded, PROBES, needs)
    return loaded


def batch(packed: bool) -> np.ndarray:
    """The ids of ``TEXTS``, and filler in a packed batch."""
    return np.concatenate([*map(np.array, TEXTS), np.full(11 * packed, 7)])


def measured(loaded: model.Model, *signals: Any) -> np.ndarray:
    pending = loaded.submit(batch(loaded.packed), LENGTHS, *signals)
    return pending.result().values[:, : sum(LENGTHS)]


def assert_near(got: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    errors = np.abs(got - expected) / expected
    assert np.quantile(errors, 0.9) < TOLERANCE[dtype]


@cache
def on_cpu(folder: Path) -> np.ndarray:
    """The values in float32 on the CPU."""
    return measured(load(folder, "float32", "cpu"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_proved_on_the_device(name: str, folder: Callable[[str], Path]) -> None:
    """Packed ones use flash attention and never make the host wait."""
    expected = on_cpu(folder(name))
    packed = name in PACKED or name == "gemma3-with-images"
    for dtype in ("float32", "float16", "bfloat16"):
        with simulated.device() as log:
            loaded = load(folder(name), dtype, "cuda")
            assert loaded.packed == packed
            log.clear()
            got = measured(loaded)
        if dtype == "float32":
            np.testing.assert_allclose(got, expected, rtol=2e-5)
        else:
            assert_near(got, expected, dtype)
        if packed:
            assert_never_waits(loaded, log)


def assert_never_waits(loaded: model.Model, log: simulated.Log) -> None:
    """One packed batch was measured by the right attention, and the host only slept."""
    scored = {kernel for kernel in log.kernels if "sdpa" in kernel}
    if loaded.dtype == torch.float32:
        assert (loaded.attention, loaded.why_slow) == (attention.FLOAT32, "")
        assert scored == {"sdpa: efficient"}  # no scores in memory
    else:
        assert (loaded.attention, loaded.why_slow) == (attention.FLASH, "")
        assert log.kernels["flash"] == LAYERS[-1] and not scored
    assert log.waits == {}
    # Ids, positions and bounds of the sequences; the values.
    assert log.copies == {"copy to the device": 3, "copy to the host": 1}
    assert log.events == [True]  # the host sleeps while it waits for the values


def test_filler_that_is_the_longest_sequence_is_attended_as_one(
    folder: Callable[[str], Path],
) -> None:
    expected = on_cpu(folder("bert"))
    ids = np.concatenate([batch(packed=False), np.full(CONTEXT + 1, 7)])
    with simulated.device() as log:
        loaded = load(folder("bert"), "float16", "cuda")
        log.clear()
        got = loaded.measure(ids, LENGTHS)[:, : sum(LENGTHS)]
    assert log.kernels["flash"] == LAYERS[-1]
    assert_near(got, expected, "float16")


def test_each_batch_waits_for_its_own_values(folder: Callable[[str], Path]) -> None:
    """Its host memory has them only once an event that follows its copy is waited for."""
    with simulated.device() as log:
        loaded = load(folder("bert"), "float16", "cuda")
        one, other = (loaded.submit(batch(packed=True), LENGTHS) for _ in range(2))
        expected = one.result().values
        assert log.arrivals.begun > 1 and np.isfinite(expected).all()
        assert torch.isnan(other._values).all()
        np.testing.assert_array_equal(other.result().values, expected)


def refused(folder: Path, **torch_here: Any) -> tuple[model.Model, simulated.Log]:
    """The model on a GPU that refuses flash attention, checked against the CPU."""
    expected = on_cpu(folder)
    with simulated.device(**torch_here) as log:
        loaded = load(folder, "float16", "cuda")
        log.clear()
        assert_near(measured(loaded), expected, "float16")
    assert loaded.attention == attention.SDPA and log.kernels["flash"] == 0
    assert log.waits == {}
    return loaded, log


@pytest.mark.parametrize("name", ["bert", "llama", "minicpm3", "mistral"])
def test_an_older_gpu_attends_in_half_precision_without_flash(
    name: str, folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "afn_ray"):
        loaded, log = refused(folder(name), gpu=simulated.T4)
    assert loaded.why_slow == f"flash attention is refused: {AMPERE_ONLY}"
    assert "attends by sdpa in float16 on cuda, since flash attention is refused" in caplog.text
    assert {k for k in log.kernels if "sdpa" in k} == {"sdpa: efficient"}  # no scores in memory


def test_a_torch_whose_flash_attention_has_no_windows_is_named(
    folder: Callable[[str], Path],
) -> None:
    loaded, _ = refused(folder("mistral"), varlen_attn=simulated.varlen_of_2_10)
    assert "has no scale and window_size for it" in loaded.why_slow


def test_heads_too_large_for_flash_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, transformers.LlamaConfig(**GROUPED | {"head_dim": 264}))
    loaded, _ = refused(tmp_path)
    assert "its heads have 264 dimensions, expected at most 256" in loaded.why_slow


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "minicpm3"])
def test_torch_2_11_uses_flash_with_the_options_that_it_has(
    name: str, folder: Callable[[str], Path]
) -> None:
    expected = on_cpu(folder(name))
    with simulated.device(varlen_attn=simulated.varlen_of_2_11) as log:
        loaded = load(folder(name), "float16", "cuda")
        log.clear()
        assert_near(measured(loaded), expected, "float16")
    assert (loaded.attention, loaded.why_slow) == (attention.FLASH, "")
    assert log.kernels["flash"] == LAYERS[-1] and log.waits == {}


def test_heads_of_any_size_use_flash(tmp_path: Path) -> None:
    save_model(tmp_path, transformers.BertConfig(**SMALL | {"hidden_size": 80}))  # 20 a head
    expected = measured(load(tmp_path, "float32", "cpu"))
    with simulated.device():
        loaded = load(tmp_path, "float16", "cuda")
        assert_near(measured(loaded), expected, "float16")
    assert (loaded.attention, loaded.why_slow) == (attention.FLASH, "")


def test_only_a_fault_of_dtype_leads_to_float32(
    tmp_path: Path, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, transformers.PhiConfig(**SMALL | {"qk_layernorm": True}))
    with simulated.device():
        loaded = load(tmp_path, "float16", "cuda")
    assert loaded.attention == attention.FLOAT32
    assert "expected scalar type Half but found Float" in loaded.why_slow

    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(linear.Product, "forward", fail)
    with simulated.device(), pytest.raises(ModelError, match=r"float16 \(RuntimeError: no such"):
        load(folder("bert"), "float16", "cuda")


MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
FAULT = RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("error", [MEMORY, FAULT], ids=["memory", "device"])
@pytest.mark.parametrize("place", ["_attend_by_flash", "attend_by_group"])
def test_an_error_of_memory_or_of_the_device_is_not_taken_for_the_models(
    place: str,
    error: Exception,
    folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first check, in float32, attends by group, and the second by flash attention."""
    right, calls = getattr(attention, place), 0

    def fail_once(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise error
        return right(*args)  # type: ignore[no-any-return]

    monkeypatch.setattr(attention, place, fail_once)
    with simulated.device(), pytest.raises((ModelError, RuntimeError)) as raised:
        load(folder("bert"), "float16", "cuda")
    assert error in (raised.value, raised.value.__cause__)
    assert ("does not fit into the memory of cuda" in str(raised.value)) == (error is MEMORY)


def test_out_of_memory_inside_flash_is_no_refusal(folder: Callable[[str], Path]) -> None:
    def full(*args: Any, scale: float, window_size: tuple[int, int]) -> torch.Tensor:
        raise MEMORY

    with (
        simulated.device(varlen_attn=full),
        pytest.raises(ModelError, match="does not fit into the memory of cuda"),
    ):
        load(folder("bert"), "float16", "cuda")


def test_the_attention_signal_takes_few_launches_on_a_gpu(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = (Received(),)
    needs = frozenset(Received.needs)
    on_cpu = load(folder("bert"), "float32", "cpu", needs)
    expected = measured(on_cpu, signals, [1])
    assert attention.SCORES_ON_GPU > 100 * attention.SCORES
    monkeypatch.setattr(attention, "SCORES", 1)  # a CPU's, one row at a time
    with simulated.device() as log:
        loaded = load(folder("bert"), "float16", "cuda", needs)
        log.clear()
        got = measured(loaded, signals, [1])
    np.testing.assert_allclose(got, expected, atol=5e-3)
    assert log.waits == {}
    # One softmax for each group of equally long sequences: a GPU takes them at once.
    assert log.kernels["_softmax"] == len(attention.Layout(LENGTHS, 0, torch.device("cpu")).groups)
