"""The processes of one variant of the benchmark, from their start to their end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from afn_ray.bench import machine
from afn_ray.bench.peers import Spec
from afn_ray.errors import AfnError, ModelError
from afn_ray.runs.cluster.connection import WORKER_ENV

ONE_PROCESS = ("loop", "sentence_transformers", "ray_data")
"""Variants that are one process.

The process uses torch's default threads, as users have them, or it is the driver of others.
"""
OURS = ("engine", "job")
"""Variants of afn-ray, whose processes have the environment of a run's workers."""


@dataclass(frozen=True, slots=True)
class Take:
    """One repetition of one variant."""

    seconds: float
    foreign: float  # share of the cores' time that other processes used
    peak_bytes: int
    device_bytes: int
    forward_tokens: int
    stages: dict[str, float]  # seconds, summed over the processes
    passes: int = 1  # how often the texts were measured


def environment_of(spec: Spec) -> dict[str, str]:
    """Environment of a process of the variant of ``spec``.

    A process that has a core or a worker of its own has that of a run's workers. A peer that has
    the machine tokenizes on all cores.
    """
    single = spec.device == "cpu" and spec.variant not in ONE_PROCESS
    if single or spec.variant in OURS:
        return WORKER_ENV
    return {"TOKENIZERS_PARALLELISM": "true"}


class WorkerAnswer(TypedDict, total=False):
    """An answer of a process, as JSON; what was asked decides which keys it has."""

    missing: str  # package that the variant needs
    error: str
    ready: bool
    saved: bool
    flops_per_s: float
    seconds: float
    own_clock: bool  # the variant measured ``seconds`` itself
    forward_tokens: int
    stages: dict[str, float]
    passes: int
    device_bytes: int


class Missing(Exception):
    """A package that the variant needs is not installed."""


class Team:
    """The processes of one variant, from their start to ``close``."""

    def __init__(
        self, specs: Sequence[Spec], folder: Path, parts: dict[str, list[list[int]]]
    ) -> None:
        self.name = specs[0].variant
        self.parts = parts  # profile -> indices of the texts of each process
        # The number of processes that compute.
        self.at_work = specs[0].workers if self.name == "ray_data" else len(specs)
        self._logs = [folder / f"{self.name}-{i}.log" for i in range(len(specs))]
        self._processes: list[subprocess.Popen[str]] = []
        environment = os.environ | environment_of(specs[0])
        for i, (spec, log) in enumerate(zip(specs, self._logs, strict=True)):
            path = folder / f"{self.name}-{i}.json"
            path.write_text(json.dumps(asdict(spec)), "utf-8")
            command = [sys.executable, "-m", "afn_ray.bench.worker", str(path)]
            with log.open("w") as errors:
                process = subprocess.Popen(  # noqa: S603 - this project's own module
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            self._processes.append(process)

    def answers(self) -> list[WorkerAnswer]:
        """Read one answer from each process.

        Raises ``Missing``, ``ModelError`` with the error that a process reports, or ``AfnError``
        with the last line of its log when the process ended.
        """
        found = []
        for process, log in zip(self._processes, self._logs, strict=True):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                last = log.read_text("utf-8", "replace").strip().splitlines()[-1:] or [
                    "it said nothing"
                ]
                raise AfnError(f"the process of {self.name} ended with {process.wait()}: {last[0]}")
            answer: WorkerAnswer = json.loads(line)
            if "missing" in answer:
                raise Missing(answer["missing"])
            if "error" in answer:
                raise ModelError(f"{self.name}: {answer['error']}")
            found.append(answer)
        return found

    def ask(self, requests: Sequence[Mapping[str, str | None]]) -> list[WorkerAnswer]:
        """Send one request to each process, and read the answers. Raises as ``answers`` does."""
        for process, request in zip(self._processes, requests, strict=True):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                break  # ``answers`` raises with the cause
        return self.answers()

    def multiply(self) -> tuple[float, float]:
        """GEMM FLOP/s summed over the processes, and the share of the cores that others used.

        The processes are those of the variant ``gemm``.
        """
        with machine.Watch(p.pid for p in self._processes) as watch:
            answers = self.ask([{}] * len(self._processes))
        return sum(a["flops_per_s"] for a in answers), watch.foreign

    def run(self, profile: str) -> Take:
        """Run the profile once, in all processes at the same time."""
        with machine.Watch(p.pid for p in self._processes) as watch:
            began = time.monotonic()
            answers = self.ask([{"run": profile}] * len(self._processes))
            seconds = time.monotonic() - began
        if answers[0]["own_clock"]:
            seconds = answers[0]["seconds"]
        stages: dict[str, float] = {}
        for answer in answers:
            for name, value in answer["stages"].items():
                stages[name] = stages.get(name, 0.0) + value
        return Take(
            seconds,
            watch.foreign,
            watch.peak_bytes,
            sum(a["device_bytes"] for a in answers),
            sum(a["forward_tokens"] for a in answers),
            stages,
            answers[0]["passes"],
        )

    def strengths(self, profile: str, folder: Path | None) -> dict[int, tuple[Any, Any]]:
        """Strengths of the last run by text: at the layer, and at the last layer or None.

        Only the loop has strengths of the last layer too. Without a ``folder`` for the files, the
        result is empty. Raises ``ModelError`` when a process returns the wrong number of texts.
        """
        files = [
            None if folder is None else folder / f"{self.name}-{i}.npz"
            for i in range(len(self._processes))
        ]
        self.ask([{"save": profile, "file": None if f is None else str(f)} for f in files])
        found: dict[int, tuple[Any, Any]] = {}
        for file, part in zip(files, self.parts[profile], strict=True):
            if file is None:
                continue
            with np.load(file) as arrays:
                bounds = np.cumsum(arrays["lengths"])[:-1]
                own = np.split(arrays["strengths"], bounds)
                last: list[Any] = [None] * len(own)
                if len(arrays["last"]):
                    last = np.split(arrays["last"], bounds)
            file.unlink()
            if len(own) != len(part):
                raise ModelError(
                    f"{self.name} gave strengths of {len(own)} texts, expected {len(part)}"
                )
            found |= dict(zip(part, zip(own, last, strict=True), strict=True))
        return found

    def close(self) -> None:
        """End the processes: close their input, and kill those that still run after 20 s."""
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            assert process.stdout is not None
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
