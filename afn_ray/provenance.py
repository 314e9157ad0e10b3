"""Software and processor of this process, as commits record them: parts of a run's provenance."""

from __future__ import annotations

import contextlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("afn-ray", "torch", "transformers", "tokenizers", "ray", "pyarrow", "numpy")
"""Packages that take part in a shard's measurement and in writing its files."""


def cpu_name() -> str:
    """The processor's model name, or its architecture when it has none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


@cache
def software() -> dict[str, str]:
    """Versions of Python and of the ``PACKAGES`` that are installed here, by name."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        # infra/gpu/check.py runs from a checkout, and without Ray.
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
