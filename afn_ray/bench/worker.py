"""Run one process of a variant: load it, then answer requests from standard input.

    python -m afn_ray.bench.worker SPEC.json

Answers are JSON lines on standard output, in order: {"ready": true}, then one for each request.
Output of libraries is redirected to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from afn_ray.bench import more_passes, peers
from afn_ray.bench.team import OURS, WorkerAnswer
from afn_ray.bench.texts import Piece, Text
from afn_ray.errors import AfnError

GEMM_S = 0.5
"""Duration of one GEMM measurement, in seconds."""
GEMM_SHAPES = ((2048, 768, 3072), (2048, 2048, 2048), (2048, 4096, 1024))
"""Shapes (m, k, n) of the matrix products that are tried on a CPU."""
GEMM_SHAPE_CUDA = (8192, 8192, 8192)
"""Shape (m, k, n) of the matrix product on a GPU."""


def load_texts(file: str) -> list[Text]:
    """Read the texts that ``dump_texts`` wrote."""
    texts = []
    for text, windows in json.loads(Path(file).read_text("utf-8")):
        pieces = tuple(Piece(*window) for window in windows)
        texts.append(Text(text, pieces))
    return texts


def dump_texts(texts: list[Text], file: Path) -> None:
    """Write ``texts`` with their windows to ``file`` as JSON."""
    rows = []
    for text in texts:
        pieces = [astuple(piece) for piece in text.pieces]
        rows.append([text.text, pieces])
    file.write_text(json.dumps(rows), "utf-8")


class Gemm:
    """The fastest matrix product of torch on this machine: the speed limit of an engine."""

    def __init__(self, spec: peers.Spec) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(spec.device)
        dtype = getattr(torch, spec.dtype)
        shapes = (GEMM_SHAPE_CUDA,) if spec.device == "cuda" else GEMM_SHAPES
        self._products: list[tuple[float, Any]] = []
        for m, k, n in shapes:
            x = torch.randn(m, k, device=spec.device).to(dtype)
            weight = torch.randn(n, k, device=spec.device).to(dtype)
            self._products += self._ways(x, weight)
        self.flops_per_s()
        self._products = [max(self._products, key=lambda p: self._rate(p, GEMM_S / 4))]

    def _ways(self, x: Any, weight: Any) -> list[tuple[float, Any]]:
        torch = self._torch
        flops = 2.0 * x.shape[0] * x.shape[1] * weight.shape[0]
        ways = [(flops, lambda: torch.nn.functional.linear(x, weight))]
        if x.device.type == "cpu":
            try:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
                pointwise = torch.ops.mkldnn._linear_pointwise
                pointwise(x, packed, None, "none", [], "")
            except (AttributeError, RuntimeError, NotImplementedError):  # private operators
                return ways
            ways.append((flops, lambda: pointwise(x, packed, None, "none", [], "")))
        return ways

    def _rate(self, product: tuple[float, Any], seconds: float) -> float:
        flops, multiply = product
        is_cuda = self._device.type == "cuda"
        n = 0
        began = time.monotonic()
        with self._torch.inference_mode():
            while time.monotonic() - began < seconds:
                for _ in range(10 if is_cuda else 1):
                    multiply()
                    n += 1
                if is_cuda:
                    self._torch.cuda.synchronize()
        return flops * n / (time.monotonic() - began)

    def flops_per_s(self) -> float:
        """Rate of the fastest product, in floating-point operations per second."""
        seconds = GEMM_S / len(self._products)
        return max(self._rate(product, seconds) for product in self._products)


def _load(spec: peers.Spec) -> Any:
    from afn_ray.bench import ours  # heavy, so not imported with the module

    kinds = {
        "gemm": Gemm,
        "loop": peers.Loop,
        "tuned": peers.Tuned,
        "ray_data": peers.RayData,
        "sentence_transformers": peers.SentenceTransformers,
        "engine": ours.Engine,
        "job": ours.Job,
    }
    return kinds[spec.variant](spec)


class Worker:
    """One loaded variant and its texts, by profile."""

    def __init__(self, spec: peers.Spec) -> None:
        self._spec = spec
        self._variant = _load(spec)
        self._texts = {profile: load_texts(file) for profile, file in spec.texts.items()}
        self._passes = dict.fromkeys(self._texts, 1)  # of each profile's texts in one run
        self._strengths: list[peers.Norms] = []
        for profile in self._texts:
            self._warm_up(profile)

    def _warm_up(self, profile: str) -> None:
        """Run the timed texts, so that all shapes are known; then more passes, if it was too short.

        Ray Data is left out: its actors exist for one run, and warm up when they start. Peers
        have no pipeline to fill, so one pass is enough.
        """
        if self._spec.variant == "ray_data":
            return
        least_s = self._spec.least_s if self._spec.variant in OURS else 0.0
        while (seconds := self._warm_up_s(profile)) < least_s:
            self._passes[profile] = more_passes(self._passes[profile], seconds, least_s)

    def _warm_up_s(self, profile: str) -> float:
        """Seconds of one run that does not count."""
        seconds = self.run(profile)["seconds"]
        self.save(profile, None)
        return seconds

    def run(self, profile: str) -> WorkerAnswer:
        """Run the profile once and return its figures; keep the strengths for ``save``."""
        passes = self._passes[profile]
        began = time.monotonic()
        if self._spec.variant == "job":
            outcome = self._variant.run_profile(profile, passes)
        elif self._spec.variant == "engine":
            outcome = self._variant.run(self._texts[profile], passes)
        else:
            outcome = self._variant.run(self._texts[profile])
        self._strengths = outcome.strengths
        seconds = outcome.seconds
        if seconds is None:
            seconds = time.monotonic() - began
        return {
            "seconds": seconds,
            "own_clock": outcome.seconds is not None,
            "forward_tokens": outcome.forward_tokens,
            "stages": outcome.stages,
            "passes": passes,
            "device_bytes": self._device_bytes(),
        }

    def _device_bytes(self) -> int:
        if self._spec.device != "cuda":
            return 0
        import torch

        return int(torch.cuda.max_memory_allocated())  # without Ray's actors

    def save(self, profile: str, file: str | None) -> WorkerAnswer:
        """Write the last run's strengths to ``file``, so that they can be compared; not timed.

        Without a file, it writes nothing; the variant ``job`` still removes the store of the run.
        """
        if self._spec.variant == "job":
            self._strengths = self._variant.read_back(len(self._texts[profile]))
        if file is not None:
            last = getattr(self._variant, "last", None) or [np.empty(0, np.float32)]
            lengths = np.array([len(s) for s in self._strengths], np.int64)
            np.savez(
                file,
                strengths=np.concatenate(self._strengths),
                lengths=lengths,
                last=np.concatenate(last),
            )
        return {"saved": True}


def serve(spec: peers.Spec, answers: Any) -> None:
    """Load the variant, then answer requests until standard input ends."""

    def answer(value: WorkerAnswer) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        if spec.variant == "gemm":
            gemm = Gemm(spec)
            answer({"ready": True})
            for _ in sys.stdin:
                answer({"flops_per_s": gemm.flops_per_s()})
            return
        worker = Worker(spec)
        answer({"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            if "run" in request:
                answer(worker.run(request["run"]))
            else:
                answer(worker.save(request["save"], request["file"]))
    except ImportError as error:
        answer({"missing": f"{error}"})
    except AfnError as error:
        answer({"error": f"{error}"})


if __name__ == "__main__":
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to standard error
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    serve(peers.Spec(**spec), real)
