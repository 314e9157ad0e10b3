"""afn doctor runs the real path on each GPU that torch sees, and says what attention it gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import simulated
from afn_ray import nvidia
from afn_ray.show import doctor, ray_check
from afn_ray.show.diagnosis import Check


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to measure, and no Ray."""
    monkeypatch.setattr(doctor, "RATE_TOKENS", 200)
    monkeypatch.setattr(doctor, "RATE_S", 0.01)
    monkeypatch.setattr(ray_check, "check", lambda address: Check("Ray", True, "not tried here"))
    monkeypatch.setattr(nvidia, "driver_version", lambda: "580.65.06")


def gpu_check(model: Path, gpu: simulated.Gpu, **options: Any) -> Check:
    with simulated.device(gpu, **options):
        checks = doctor.check(str(model)).checks
    (found,) = [c for c in checks if c.name.startswith("GPU")]
    assert [c.name for c in checks].index("GPU 0") == 5  # after the model's
    return found


def test_a_gpu_passes_with_flash_attention(tiny_bert: Path) -> None:
    found = gpu_check(tiny_bert, simulated.H200)
    assert (found.ok, found.advice) == (True, "")
    assert re.match(
        r"NVIDIA H200, compute capability 9\.0, driver 580\.65\.06: passed its self-check in "
        r"float16, attention flash, norms eager \(triton is not installed\), [\d,]+ tokens/s with ",
        found.found,
    )


def test_the_time_of_the_fused_kernel_is_beside_that_of_torchs(tiny_bert: Path) -> None:
    found = gpu_check(tiny_bert, simulated.H200, kernel=simulated.fused_norm)
    assert ", norms fused (1.000 ms a batch, 3.000 by torch's kernels), " in found.found


def test_an_older_gpu_warns_and_says_why(tiny_bert: Path) -> None:
    found = gpu_check(tiny_bert, simulated.T4)
    assert found.ok is None and "compute capability 8.0 or higher" in found.advice
    assert "attention sdpa" in found.found
    assert "slower than it could be: flash attention is refused: FlashAttention only" in found.found


def test_a_model_that_needs_padding_warns(tiny_mpnet: Path) -> None:
    found = gpu_check(tiny_mpnet, simulated.H200)
    assert found.ok is None and "attention padded" in found.found


def test_a_gpu_that_fails_is_a_failed_check(tiny_bert: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("afn_ray.model.prove._check", fail)
        found = gpu_check(tiny_bert, simulated.H200)
    assert found.ok is False and "device-side assert" in found.found


def fail(*args: object) -> None:
    raise RuntimeError("CUDA error: device-side assert triggered")


def test_a_driver_that_torch_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "driver_version", lambda: "550.54.15")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = doctor._torch()
    assert found.ok is None and "an NVIDIA driver (550.54.15)" in found.found
    assert "which needs NVIDIA's driver 580 or newer" in found.advice
