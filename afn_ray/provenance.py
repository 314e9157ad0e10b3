"""Software and processor of this process, as commits record them: parts of a run's provenance."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
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
    """Versions of Python and of ``PACKAGES``, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
