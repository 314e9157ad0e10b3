"""Run a module of this package in a separate process, to measure its memory alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from afn_ray.bench import machine
from afn_ray.errors import AfnError

TESTS = Path(__file__).parents[1]


def call_apart(module: str, *arguments: object) -> tuple[dict[str, Any], machine.Watch]:
    """Run ``module`` with ``arguments``; return the JSON that it prints, and its ``Watch``.

    The watch includes the descendants of the process. Raises ``AfnError`` when the process fails.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(TESTS), *([inherited] if inherited else [])])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    with machine.Watch([process.pid]) as watch:
        answer, _ = process.communicate()
    if process.returncode:
        raise AfnError(f"{' '.join(command)} left with {process.returncode}")
    return json.loads(answer), watch
