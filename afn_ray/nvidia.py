"""NVIDIA's driver on this machine, and why torch may see no GPU through it."""

from __future__ import annotations

import re
from pathlib import Path

DRIVERS = {12: 525, 13: 580}
"""Oldest driver for each major version of CUDA.

torch's wheels bring CUDA along; the driver is the machine's.
"""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""File of NVIDIA's kernel module that has its version."""


def driver_version() -> str | None:
    """Version of the driver; None if there is none."""
    try:
        found = re.search(r"Module.*?\s(\d+\.[\d.]+)", DRIVER_FILE.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def why_no_gpu(torch: str, cuda: str | None) -> str:
    """Reason why torch sees no GPU on this machine, and what to do.

    ``torch`` is its version; ``cuda`` is the version of CUDA that it is built for, if any.
    """
    if cuda is None:
        return f"torch {torch} is built without CUDA: install a CUDA build (pytorch.org)"
    driver = driver_version()
    oldest = DRIVERS.get(int(cuda.partition(".")[0]))
    built = f"torch {torch} is built for CUDA {cuda}"
    if oldest is not None:
        built += f", which needs NVIDIA's driver {oldest} or newer"
    if driver is None:
        return f"{built}, and there is no driver: install one, or choose a machine with a GPU"
    if oldest is not None and int(driver.partition(".")[0]) < oldest:
        return f"{built}, and the driver is {driver}: update it, or install an older torch"
    return f"{built}, and sees no GPU with driver {driver}: check CUDA_VISIBLE_DEVICES"
