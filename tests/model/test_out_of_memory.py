"""Memory of a model: errors of memory are named as such, and a model takes what it needs."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import warm_workers
from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import linear
from conftest import save_model
from families import SMALL
from test_signals import load

CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
ASYNCHRONOUS = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
OF_MAPPING = (
    "unable to mmap 280655904 bytes from file <model.safetensors>: Cannot allocate memory (12)"
)
OF_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 96 bytes."
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB."),
    torch.AcceleratorError(ASYNCHRONOUS),
    RuntimeError(CUBLAS),
    RuntimeError(OF_CPU),
    RuntimeError(OF_MAPPING),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
"""Errors of memory, as CUDA, cuBLAS, torch, Python and the system raise them."""

PEAK = """
import json, os, re, sys
from pathlib import Path
from afn_ray import model

def resident(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+) kB", text)[1]) * 1024

def load(folder, layer, dtype):
    files = model.find_model(folder, None, trust_remote_code=False, allow_pickle=False)
    loaded = model.Model(files, [layer], dtype, "cpu", 512)
    model.prepare(loaded, [list(range(5, 5 + n)) for n in (4, 9, 40)])
    return loaded

def measure(large, dtype):
    load(small, 1, dtype)  # what a process needs once, whatever the model
    model.free_memory()
    begin = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    loaded = load(large, 4, dtype)
    return [resident("VmHWM") - begin, resident("VmRSS") - begin, loaded.num_bytes]

small, *cases = sys.argv[1:]
for large, dtype in zip(cases[::2], cases[1::2]):
    if os.fork() == 0:
        print(json.dumps(measure(large, dtype)), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
"""Script that loads and proves a small model and a large one, for each large one in a fork.

It prints the peak and the last resident memory of the large one, and the size of the weights that
run, in bytes.
"""
OVERHEAD_BYTES = 24 << 20
"""Memory of the self-check's passes, and of freed memory that the allocator keeps."""
WHOLE_BLOCK_BYTES = 4 * 12 * 768**2
"""Size of one block of the large model in float32."""


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
    failing = fails_at(1, error, transformers.BertModel.from_pretrained)
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", failing)
    with pytest.raises(ModelError, match=r"does not fit .*: its weights take .* GB, and .* GB"):
        load(folder, frozenset(), [3])


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [4]])
def test_blocks_after_the_last_layer_are_freed_and_change_nothing(
    layers: list[int], folder: Path
) -> None:
    loaded = load(folder, frozenset({"neurons"}), layers)
    assert len(loaded.blocks) == max(*layers, 1)
    assert set(loaded.blocks) == loaded.places.keys()
    whole = load(folder, frozenset(), [0, 1, 2, 3, 4])
    ids = np.arange(5, 30)
    np.testing.assert_array_equal(
        loaded.measure(ids, [25]), whole.measure(ids, [25])[np.array(layers)]
    )


STORED = (torch.float32, torch.bfloat16)
CASES = [(stored, dtype) for stored in STORED for dtype in STORED]
"""Dtypes in which the weights are stored, and in which the model runs."""


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, folder: Path
) -> dict[tuple[torch.dtype, torch.dtype], list[int]]:
    """Answers of ``PEAK``, by case, for a BERT of twelve blocks of 7.1 M weights."""
    config = transformers.BertConfig(vocab_size=2000, max_position_embeddings=64)
    large = transformers.BertModel(config)
    folders = {}
    for stored in STORED:
        folders[stored] = tmp_path_factory.mktemp("twelve")
        large.to(stored).save_pretrained(folders[stored])
        file = folders[stored] / "model.safetensors"
        assert file.stat().st_size > 12 * WHOLE_BLOCK_BYTES * stored.itemsize // 4
    script = tmp_path_factory.mktemp("peak") / "script.py"
    script.write_text(PEAK)
    names = [str(folder)]
    for stored, dtype in CASES:
        names += [str(folders[stored]), str(dtype).removeprefix("torch.")]
    command = [warm_workers.choose(has_faults=False), str(script), *names]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    printed = [json.loads(line) for line in process.stdout.splitlines()]
    return dict(zip(CASES, printed, strict=True))


@pytest.mark.parametrize(("stored", "dtype"), CASES)
def test_a_model_takes_memory_for_the_weights_that_run_and_for_one_block(
    stored: torch.dtype,
    dtype: torch.dtype,
    measured: dict[tuple[torch.dtype, torch.dtype], list[int]],
) -> None:
    """Four of twelve blocks run. The reference in float32 and the weights as they are stored take
    no memory of their own.
    """
    peak, after, num_bytes = measured[stored, dtype]
    others = 4 * 768 * (2000 + 64 + 2 + 768)  # embeddings, pooler
    of_blocks = 4 * WHOLE_BLOCK_BYTES * dtype.itemsize // 4
    assert num_bytes == pytest.approx(of_blocks + others, rel=0.02)
    assert after < num_bytes + OVERHEAD_BYTES
    assert peak < num_bytes + WHOLE_BLOCK_BYTES + OVERHEAD_BYTES
