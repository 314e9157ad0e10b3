"""A module of this package in a process of its own, so that its memory is its own."""

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
    """The line of JSON that ``module`` prints, called with ``arguments``, and what was seen of it
    and all that descend from it. Raises ``AfnError`` where it fails.
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
