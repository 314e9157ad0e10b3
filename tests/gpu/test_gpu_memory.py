"""A model on a simulated GPU takes the memory of the weights that run and of one block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import simulated
from afn_ray import model
from conftest import find_model

WIDTH = 256
BLOCK_BYTES = 4 * 12 * WIDTH**2
"""Size of one block in float32, in bytes, without biases and norms."""
SLACK_BYTES = BLOCK_BYTES // 2
"""Memory for biases and norms, and for the hidden states of the self-check's texts."""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """Folder of a BERT of ten blocks, stored in a dtype."""

    def make(stored: torch.dtype) -> Path:
        config = transformers.BertConfig(
            vocab_size=200,
            hidden_size=WIDTH,
            num_hidden_layers=10,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=40,
        )
        folder = tmp_path_factory.mktemp("deep")
        torch.manual_seed(0)
        transformers.BertModel(config).to(stored).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_device_holds_the_weights_that_run_and_one_block(
    stored: torch.dtype, dtype: str, deep: Callable[[torch.dtype], Path]
) -> None:
    folder = deep(stored)
    with simulated.device() as log:
        loaded = model.Model(find_model(folder), [3, 6], dtype, "cuda", 64)
        assert log.memory.live_bytes == 0  # all is on the host
        model.prepare(loaded, [[5, 6, 7, 8, 9], [9, 8, 7]])
        running = 6 * BLOCK_BYTES * loaded.dtype.itemsize // 4
        assert loaded.num_bytes == pytest.approx(running, abs=SLACK_BYTES)
        assert log.memory.live_bytes == pytest.approx(loaded.num_bytes, rel=0.02)
        assert log.memory.peak_bytes < loaded.num_bytes + BLOCK_BYTES + SLACK_BYTES
    del loaded
    model.free_memory()
    assert log.memory.live_bytes < BLOCK_BYTES
