"""The Triton kernel against torch, in triton's interpreter: ``test_kernel`` runs this file.

triton reads at its import whether it interprets, so these tests have a process of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton

import simulated
from afn_ray.model import fused
from afn_ray.model.fused_kernel import add_norm_cast
from test_gpu import assert_near, family_folders, load, measured

HALF = (torch.float16, torch.bfloat16)
WIDTHS = (32, 80, 384, 768, 1000)

folder = pytest.fixture(family_folders, scope="module", name="folder")


def test_the_kernel_is_interpreted() -> None:
    assert triton.knobs.runtime.interpret


def inputs(
    rows: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.nn.LayerNorm]:
    """A product, a residual stream with an outlier, and a norm with gain and bias."""
    torch.manual_seed(rows * width)
    added, residual = torch.randn(1, rows, width).to(dtype), torch.randn(1, rows, width) * 3
    residual[..., 1] += 400  # as in real models
    norm = torch.nn.LayerNorm(width, eps=1e-12)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(width).exp())
        norm.bias.copy_(torch.randn(width))
    return added, residual, norm


def cast(full: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``full`` in ``dtype``; the interpreter cuts bfloat16 off, where a GPU rounds."""
    if dtype == torch.bfloat16:
        full = full.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
    return full.to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_the_kernel_gives_what_torch_gives(dtype: torch.dtype, width: int) -> None:
    added, residual, norm = inputs(7, width, dtype)
    low_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
    with torch.inference_mode():
        full, low = add_norm_cast(added, residual, norm, low_dtype)
        expected, _ = fused.eager(added, residual, norm, low_dtype)
        exact = norm.double()(added.double() + residual.double())
    assert (full.dtype, low.dtype) == (torch.float32, low_dtype)
    assert full.shape == low.shape == residual.shape
    assert torch.equal(low, cast(full, low_dtype))
    largest = exact.abs().amax(-1, keepdim=True)
    for other in (expected, exact):
        assert float(((full - other).abs() / largest).max()) < fused.PARITY / 5


def test_a_row_does_not_depend_on_the_others() -> None:
    added, residual, norm = inputs(9, 384, torch.float16)
    with torch.inference_mode():
        together, _ = add_norm_cast(added, residual, norm, torch.float16)
        for at in range(added.shape[1]):
            row = slice(at, at + 1)
            alone, _ = add_norm_cast(added[:, row], residual[:, row], norm, torch.float16)
            assert torch.equal(alone, together[:, row])
        # Rows of a batch of padded sequences are rows like any other; and no row is no error.
        padded, _ = add_norm_cast(
            added.view(3, 3, -1), residual.view(3, 3, -1), norm, torch.float16
        )
        assert torch.equal(padded.view_as(together), together)
        nothing, low = add_norm_cast(added[:, :0], residual[:, :0], norm, torch.float16)
        assert nothing.shape == low.shape == (1, 0, 384)


def test_inputs_of_two_shapes_are_our_own_fault() -> None:
    added, residual, norm = inputs(4, 32, torch.float16)
    with pytest.raises(AssertionError):
        add_norm_cast(added[:, :1], residual, norm, torch.float16)


def held_by(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor on the simulated device, on the CPU."""
    assert isinstance(tensor, simulated.OnDevice)
    return tensor.held


def test_a_model_measures_the_same_with_the_kernel(folder: Callable[[str], Path]) -> None:
    """The whole path on the simulated GPU, in one block: found, compared, checked and in use."""

    def make(log: simulated.Log) -> fused.Kernel:
        def kernel(
            added: torch.Tensor, residual: torch.Tensor, norm: torch.nn.LayerNorm, d: torch.dtype
        ) -> tuple[torch.Tensor, torch.Tensor]:
            log.kernels["add_norm_cast"] += 1
            held = torch.nn.LayerNorm(norm.normalized_shape, norm.eps)
            held.weight.data, held.bias.data = held_by(norm.weight), held_by(norm.bias)
            full, low = add_norm_cast(held_by(added), held_by(residual), held, d)
            return simulated.OnDevice(full), simulated.OnDevice(low)

        return kernel

    with simulated.device():
        eager = measured(load(folder("bert"), "float16", "cuda", layers=[0, 1]))
    with simulated.device(kernel=make) as log:
        loaded = load(folder("bert"), "float16", "cuda", layers=[0, 1])
        log.clear()
        got = measured(loaded)
    assert (loaded.norm, loaded.why_eager) == (fused.FUSED, "")
    assert log.kernels["add_norm_cast"] == 2
    assert not np.array_equal(got, eager)  # so the kernel was in use
    np.testing.assert_allclose(got, eager, rtol=2e-3)
    assert_near(got, measured(load(folder("bert"), "float32", "cpu", layers=[0, 1])), "float16")
