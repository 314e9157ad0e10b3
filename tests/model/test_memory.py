"""Memory of a model: errors of memory are named as such, and a model takes what it needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import linear
from conftest import save_model
from families import SMALL
from test_signals import load

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
ASYNCHRONOUS = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
OF_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 96 bytes."
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB."),
    torch.AcceleratorError(ASYNCHRONOUS),
    RuntimeError(CUBLAS),
    RuntimeError(OF_CPU),
    MemoryError(),
]
"""Errors of memory, as CUDA, cuBLAS, torch and Python raise them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of four small blocks."""
    return save_model(tmp_path_factory.mktemp("bert"), transformers.BertConfig(**SMALL))


def fails_at(call: int, error: Exception, right: Callable[..., Any]) -> Callable[..., Any]:
    """``right``, but its call number ``call`` raises ``error``."""
    calls = 0

    def function(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return right(*args, **options)

    return function


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_memory_is_known(error: Exception) -> None:
    assert model.is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("memory")],
)
def test_another_error_is_none_of_memory(error: Exception) -> None:
    assert not model.is_out_of_memory(error)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_want_of_memory_in_the_self_check_is_no_reason_for_padded_batches(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.Model, "measure", fails_at(1, error, model.Model.measure))
    with pytest.raises(ModelError, match=r"does not fit into the memory of cpu: .* take 0\.0 GB"):
        load(folder, frozenset(), [3])


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_want_of_memory_of_the_products_is_no_reason_for_others(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear.Product, "forward", fails_at(2, error, linear.Product.forward))
    with pytest.raises(ModelError, match="does not fit into the memory of cpu"):
        load(folder, frozenset(), [3], "bfloat16")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_model_that_does_not_fit_while_loading_says_its_size(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = fails_at(1, error, transformers.AutoModel.from_pretrained)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", failing)
    with pytest.raises(ModelError, match=r"does not fit .*: its weights take .* GB, and .* GB"):
        load(folder, frozenset(), [3])
