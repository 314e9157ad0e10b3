"""The GPU of this machine: whether torch can use it, how it rounds, and what commits say of it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from afn_ray.errors import ModelError

DRIVERS = {12: 525, 13: 580}
"""Oldest NVIDIA driver for each major version of CUDA.

torch's wheels bring CUDA along; the driver is the node's.
"""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""File of NVIDIA's kernel module that has its version."""


def check_device(device: str) -> None:
    """Raise ``ModelError``, in one line, if ``device`` is a GPU that torch cannot use here."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"this run measures on GPUs, and on {platform.node()} {why_no_gpu()}; or give "
            "--device cpu"
        )


def why_no_gpu() -> str:
    """Why torch sees no GPU on this machine, and what to do."""
    version, driver = torch.__version__, driver_version()
    if torch.version.cuda is None:
        return f"torch {version} is built without CUDA: install a CUDA build (pytorch.org)"
    built = f"torch {version} is built for CUDA {torch.version.cuda}"
    oldest = DRIVERS.get(int(torch.version.cuda.partition(".")[0]))
    wants = "" if oldest is None else f", which needs NVIDIA's driver {oldest} or newer"
    if driver is None:
        return f"{built}{wants}, and there is no driver: install one, or choose nodes with a GPU"
    if oldest is not None and int(driver.partition(".")[0]) < oldest:
        return f"{built}{wants}, and the driver is {driver}: update it, or install an older torch"
    return f"{built}{wants}, and sees no GPU with driver {driver}: check CUDA_VISIBLE_DEVICES"


def driver_version() -> str | None:
    """Version of NVIDIA's driver on this machine; None if there is none."""
    try:
        found = re.search(r"Module.*?\s(\d+\.[\d.]+)", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def pin_rounding(device: str) -> None:
    """Make products on a GPU exact in their dtype: no TF32, and sums in float32.

    These are settings of the process. cuDNN's TF32 and sums in half precision are on by default.
    """
    if torch.device(device).type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def describe_gpu(device: str) -> dict[str, str]:
    """What a commit says of the GPU ``device``: name, compute capability, rounding; {} of a CPU."""
    if torch.device(device).type != "cuda":
        return {}
    matmul = torch.backends.cuda.matmul
    halves = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    reduced = []
    if matmul.allow_tf32 or torch.backends.cudnn.allow_tf32:
        reduced.append("tf32")
    if any(halves):
        reduced.append("sums")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "reduced": "+".join(reduced) or "none",
    }
