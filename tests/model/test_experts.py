"""Experts of mixtures multiply in the dtype that was asked for, or the run
says that they do not.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_moe import modeling_qwen2_moe

from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import attention, linear
from afn_ray.model.linear import experts_in
from conftest import find_model, save_model
from families import CONTEXT, FAMILIES
from test_families import documents

TOLERANCE = {"float32": 1e-6, "float16": 5e-3, "bfloat16": 3e-2}
"""Largest relative error of nine tokens of ten, against the plain model in float32."""
REFUSED = "grouped products are not implemented for 'Half'"
Experts = modeling_qwen2_moe.Qwen2MoeExperts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 mixture of four experts."""
    kind, options = FAMILIES["qwen2-moe"]
    return save_model(tmp_path_factory.mktemp("moe"), getattr(transformers, kind)(**options))


def load(folder: Path, dtype: str, layers: list[int]) -> model.Model:
    loaded = model.Model(find_model(folder), layers, dtype, "cpu", 64)
    model.prepare(loaded, [documents(3, [n])[0] for n in (4, 9, CONTEXT)])
    return loaded


def errors(loaded: model.Model, folder: Path) -> np.ndarray:
    """Relative errors of the strengths at layers 1 and 3 against the plain model's."""
    ids = documents(1, [30])[0]
    plain = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    expected = np.stack([states[k][0].norm(dim=-1).numpy() for k in (1, 3)])
    made: np.ndarray = np.abs(loaded.measure(np.array(ids), [len(ids)]) - expected) / expected
    return made


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> set[tuple[torch.dtype, ...]]:
    """Dtypes of the hidden states, routing weights and weights in calls of experts."""
    seen: set[tuple[torch.dtype, ...]] = set()
    right = Experts.forward

    def forward(self: Any, hidden: torch.Tensor, index: Any, shares: torch.Tensor) -> torch.Tensor:
        seen.add((hidden.dtype, shares.dtype, self.gate_up_proj.dtype, self.down_proj.dtype))
        result: torch.Tensor = right(self, hidden, index, shares)
        return result

    monkeypatch.setattr(Experts, "forward", forward)
    return seen


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_multiply_in_the_dtype_that_was_asked_for(
    dtype: str, implementation: str, folder: Path, inputs: set[Any]
) -> None:
    loaded = load(folder, dtype, [1, 3])
    loaded.module.set_experts_implementation(implementation)
    inputs.clear()
    assert np.quantile(errors(loaded, folder), 0.9) < TOLERANCE[dtype]
    full, given = torch.float32, getattr(torch, dtype)
    assert inputs - {(full,) * 4} == {(given, full, given, given)} - {(full,) * 4}
    ways = {"attention": attention.PADDED, "dtype": dtype, "experts": dtype}
    assert ways.items() <= loaded.maker.items()
    parts = [part for block in loaded.blocks for part in experts_in(block)]
    assert len(parts) == 3 and all(part.down_proj.dtype == given for part in parts)
    routers = [block.get_parameter("mlp.gate.weight") for block in loaded.blocks]
    assert {router.dtype for router in routers} == {full}
    stacked = sum(w.numel() for part in parts for w in part.parameters())
    products = 3 * 32 * (2 * 32 + 2 * 16 + 3 * 16 + 1)  # attention, the shared expert and its gate
    others = loaded.num_bytes - given.itemsize * (stacked + products)
    biases_and_norms = 3 * (32 + 16 + 16 + 2 * 32 + 4 * 32) + 32
    assert others == full.itemsize * (200 * 32 + biases_and_norms)


def refuse_half(
    monkeypatch: pytest.MonkeyPatch, error: Exception, calls: list[torch.dtype]
) -> None:
    right = Experts.forward

    def forward(self: Any, hidden: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(hidden.dtype)
        if hidden.dtype != torch.float32:
            raise error
        result: torch.Tensor = right(self, hidden, *others)
        return result

    monkeypatch.setattr(Experts, "forward", forward)


def test_experts_that_torch_refuses_stay_in_float32_and_the_run_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[torch.dtype] = []
    refuse_half(monkeypatch, RuntimeError(REFUSED), calls)
    with caplog.at_level(logging.WARNING, "afn_ray"):
        loaded = load(folder, "float16", [1, 3])
    assert loaded.why_slow.startswith(f"its experts run in float32: RuntimeError: {REFUSED}; its ")
    assert loaded.maker["experts"] == "float32" and loaded.maker["dtype"] == "float16"
    assert f"with experts in float32, since {loaded.why_slow}" in caplog.text
    calls.clear()
    assert np.quantile(errors(loaded, folder), 0.9) < TOLERANCE["float16"]
    assert set(calls) == {torch.float32}
    products = [m for b in loaded.blocks for m in b.modules() if isinstance(m, linear.Product)]
    assert products and all(m._weight.dtype == torch.float16 for m in products)
    asked = load(folder, "float32", [1, 3])
    assert loaded.num_bytes < asked.num_bytes and not asked.why_slow


def test_another_error_of_the_experts_refuses_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_half(monkeypatch, RuntimeError("no such luck"), [])
    with pytest.raises(ModelError, match=r"float16 \(RuntimeError: no such luck\); give --dtype"):
        load(folder, "float16", [1, 3])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma3-with-images", "qwen2-moe"])
def test_half_precision_passes_the_self_check(name: str, dtype: str, tmp_path: Path) -> None:
    kind, options = FAMILIES[name]
    saved = save_model(tmp_path, getattr(transformers, kind)(**options))
    loaded = load(saved, dtype, [1, 3])
    assert loaded.maker["dtype"] == dtype and "experts run" not in loaded.why_slow
    assert np.quantile(errors(loaded, saved), 0.9) < TOLERANCE[dtype]


def test_the_range_of_experts_is_watched(folder: Path) -> None:
    """Errors are compared as those of products: a precision is chosen by it."""
    loaded = load(folder, "bfloat16", [1, 3])
    ids = np.array(documents(1, [30])[0])
    with loaded.watched() as peak:
        loaded.measure(ids, [len(ids)])
    within = peak()
    (experts,) = experts_in(loaded.blocks[0])
    handle = experts.register_forward_hook(lambda part, args, output: output * 1e6, prepend=True)
    with loaded.watched() as peak:
        loaded.measure(ids, [len(ids)])
    handle.remove()
    assert peak() > 10 * within
