"""Sum, norm and cast are one kernel where it gives what torch gives; else it is said why."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simulated
from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import fused
from afn_ray.model.signals import Centred
from simulated import Log, fused_norm
from test_gpu import LAYERS, assert_near, family_folders, load, measured, on_cpu

LIKE_BERT = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "deberta-v3"]
Folder = Callable[[str], Path]

folder = pytest.fixture(family_folders, scope="module", name="folder")


def launches(log: Log) -> int:
    return log.kernels["add_norm_cast"]


def altered(change: Callable[..., Any], extra: int = 0) -> Callable[[Log], fused.Kernel]:
    """The kernel with its two results changed, and ``extra`` launches, of a millisecond each."""

    def make(log: Log) -> fused.Kernel:
        right = fused_norm(log)

        def kernel(*args: Any) -> Any:
            log.kernels["more"] += extra
            return change(*right(*args))

        return kernel

    return make


@cache
def by_torch(folder: Path, dtype: str) -> tuple[np.ndarray, Counter[str]]:
    """The values with torch's kernels, and the kernels that ran."""
    with simulated.device() as log:
        eager = load(folder, dtype, "cuda")
        log.clear()
        values = measured(eager)
        assert eager.maker["norm"] == "eager"
    return values, log.kernels


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float16") for name in LIKE_BERT), ("bert", "bfloat16")]
)
def test_families_like_bert_add_and_normalise_by_one_kernel(
    name: str, dtype: str, folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    expected, before = by_torch(folder(name), dtype)
    with simulated.device(kernel=fused_norm) as log, caplog.at_level("INFO", "afn_ray"):
        loaded = load(folder(name), dtype, "cuda")
        log.clear()
        got = measured(loaded)
        assert loaded.maker["norm"] == "fused"
    assert (loaded.norm, loaded.why_eager) == (fused.FUSED, "")
    assert "adds and normalises fused" in caplog.text
    np.testing.assert_array_equal(got, expected)  # the simulated kernel computes what torch does
    n = 2 * LAYERS[-1]  # each block has two halves
    assert launches(log) == n and log.waits == {}
    assert before["native_layer_norm"] - log.kernels["native_layer_norm"] == n
    assert before["add"] - log.kernels["add"] == n
    assert before["_to_copy"] - log.kernels["_to_copy"] == n - 1  # no product reads the last one


def test_of_a_block_that_is_partly_like_bert_that_part_is_fused(folder: Folder) -> None:
    expected = on_cpu(folder("mpnet"))
    with simulated.device(kernel=fused_norm) as log:
        loaded = load(folder("mpnet"), "float16", "cuda")
        log.clear()
        assert_near(measured(loaded), expected, "float16")
    assert loaded.norm == fused.FUSED and launches(log) == LAYERS[-1]


@pytest.mark.parametrize("name", ["albert", "distilbert", "nomic-bert", "modernbert", "llama"])
def test_other_families_keep_torchs_kernels(name: str, folder: Folder) -> None:
    with simulated.device(kernel=fused_norm) as log:
        loaded = load(folder(name), "float16", "cuda")
    assert launches(log) == 0
    assert loaded.norm == fused.EAGER
    assert loaded.why_eager.startswith("its blocks do not add and normalise as BERT's do, in rows")


def fail(*results: torch.Tensor) -> Any:
    raise RuntimeError("ptxas fatal: no such target\nand more")


def run_out(*results: torch.Tensor) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB.")


def shift(full: torch.Tensor, low: torch.Tensor) -> Any:
    return full + 1e-3, (full + 1e-3).to(low.dtype)


def shift_the_cast(full: torch.Tensor, low: torch.Tensor) -> Any:
    return full, low + 1


def same(full: torch.Tensor, low: torch.Tensor) -> Any:
    return full, low


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        (altered(fail), "the fused kernel failed: RuntimeError: ptxas fatal: no such target"),
        (altered(shift), "the fused kernel differs by "),
        (altered(shift_the_cast), "the fused kernel differs by inf"),
    ],
    ids=["fails", "values", "cast"],
)
def test_a_kernel_that_is_wrong_is_left_out_with_a_warning(
    kernel: Callable[[Log], fused.Kernel],
    why: str,
    folder: Folder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, _ = by_torch(folder("bert"), "float16")
    with simulated.device(kernel=kernel) as log, caplog.at_level("INFO", "afn_ray"):
        loaded = load(folder("bert"), "float16", "cuda")
        log.clear()
        np.testing.assert_array_equal(measured(loaded), expected)
    assert loaded.norm == fused.EAGER and loaded.why_eager.startswith(why)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any("adds and normalises eager, since " + why in message for message in warned)
    assert launches(log) == 0
    assert not any(isinstance(m, fused.Tail) for m in loaded.module.modules())


def test_a_failed_self_check_with_the_kernel_puts_torchs_back(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is right while it is compared, and wrong once it is in use."""

    def later(full: torch.Tensor, low: torch.Tensor) -> Any:
        return ((full * 1.1), (full * 1.1).to(low.dtype)) if replaced else (full, low)

    replaced, compared = False, fused._compared

    def compare(*args: Any) -> Any:
        nonlocal replaced
        tails = compared(*args)
        replaced = True
        return tails

    monkeypatch.setattr(fused, "_compared", compare)
    with simulated.device(kernel=altered(later)):
        loaded = load(folder("bert"), "float16", "cuda")
    assert loaded.norm == fused.EAGER
    assert "ModelError: self-check failed: layer 2 against the plain model" in loaded.why_eager
    assert not any(isinstance(m, fused.Tail) for m in loaded.module.modules())


def test_the_time_of_the_kernel_has_no_part_in_the_choice(folder: Folder) -> None:
    """A worker with a busy GPU would choose otherwise than its neighbours,
    and measure otherwise.
    """
    with simulated.device(kernel=altered(same, extra=9)):
        loaded = load(folder("bert"), "float16", "cuda")
        assert loaded.norm == fused.FUSED
        assert model.time_norms(loaded) == fused.Times(3.0, 10.0)


def test_torchs_kernels_alone_are_not_timed(folder: Folder) -> None:
    with simulated.device():
        assert model.time_norms(load(folder("bert"), "float16", "cuda")) is None


@pytest.mark.parametrize(("narrowest", "norm"), [(32, "fused"), (33, "eager")])
def test_rows_too_narrow_for_the_kernel_keep_torchs(
    narrowest: int, norm: str, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with simulated.device(kernel=fused_norm):
        monkeypatch.setattr(fused, "NARROWEST", narrowest)
        loaded = load(folder("bert"), "float16", "cuda")
    assert loaded.norm == norm
    assert ("in rows of 33 to 16,384 numbers" in loaded.why_eager) == (norm == "eager")


def test_want_of_memory_is_no_reason_for_torchs_kernels(folder: Folder) -> None:
    refused = pytest.raises(ModelError, match="does not fit into the memory of cuda")
    with simulated.device(kernel=altered(run_out)), refused:
        load(folder("bert"), "float16", "cuda")


def test_a_kernel_that_spoils_the_gpu_is_an_error_of_the_device(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")

    def refuse(index: object = None) -> None:
        raise fault

    with simulated.device(kernel=altered(fail)):
        monkeypatch.setattr(torch.cuda, "synchronize", refuse)
        with pytest.raises(RuntimeError) as raised:
            load(folder("bert"), "float16", "cuda")
    assert raised.value is fault and model.is_device_fault(fault)


def test_products_in_float32_and_a_signal_that_reads_the_norms_input_keep_torchs_kernels(
    folder: Folder,
) -> None:
    with simulated.device(kernel=fused_norm) as log:
        loaded = load(folder("bert"), "float32", "cuda")
        assert (loaded.norm, loaded.why_eager) == ("eager", "its products are in float32")
        loaded = load(folder("bert"), "float16", "cuda", frozenset(Centred.needs))
        assert loaded.why_eager == "the signal centred reads what a norm normalises"
        values = measured(loaded, (Centred(),), LAYERS)
    assert launches(log) == 0
    np.testing.assert_allclose(values, 32**0.5, rtol=2e-2)


def test_a_model_on_a_cpu_says_nothing_of_its_norms(folder: Folder) -> None:
    loaded = load(folder("bert"), "bfloat16", "cpu")
    assert (loaded.norm, loaded.why_eager) == ("", "") and "norm" not in loaded.maker


@pytest.mark.parametrize(
    ("capability", "spec", "compiler", "why"),
    [
        ((7, 5), True, "gcc", "this GPU has compute capability 7.5, expected 8.0 or higher"),
        ((9, 0), False, "gcc", "triton is not installed"),
        ((9, 0), True, "", "triton needs a C compiler, and there is no gcc or clang"),
    ],
)
def test_what_the_kernel_needs_is_named(
    capability: tuple[int, int],
    spec: bool,
    compiler: str,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec or None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(fused.Unfused) as raised:
        fused.find_kernel()
    assert str(raised.value) == why
