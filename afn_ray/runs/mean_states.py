"""Find the mean hidden state of each layer, on a sample of the corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from afn_ray import model
from afn_ray.mean_texts import to_text
from afn_ray.runs.frequent import bounded
from afn_ray.runs.measurer import Measurer
from afn_ray.runs.task import Task
from afn_ray.runs.worker import with_signals

SAMPLE_CHARS = 1 << 15
"""Text whose states are averaged, in characters.

A norm depends on an error of the mean by its square alone: 8,000 tokens change norms by about 1e-4.
"""
MOST_CHARS = 1 << 12
"""Part of one document that counts, in characters."""


def find_means(task: Task, texts: Sequence[str]) -> list[str]:
    """The mean state of each of the task's layers over tokens of ``texts``, in float32, as text.

    Special tokens and sinks are left out.
    """
    task = with_signals(task)
    measurer = Measurer(replace(task, measure=replace(task.measure, dtype="float32")))
    means = measurer.mean_states(bounded(texts, SAMPLE_CHARS, MOST_CHARS))
    del measurer
    model.free_memory()  # for the next model, here or in a worker
    return [to_text(mean) for mean in means]
