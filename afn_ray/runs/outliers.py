"""Find outlier dimensions of the hidden state: the largest of each layer, on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from afn_ray import model
from afn_ray.model.signals import DIMENSIONS
from afn_ray.runs.measurer import Measurer
from afn_ray.runs.task import Task
from afn_ray.runs.worker import with_signals

CALIBRATION_CHARS = 16_384
"""Text that the calibration measures, in characters: outlier dimensions
are the same in any text.
"""


def find_dimensions(task: Task, texts: Sequence[str]) -> list[list[int]]:
    """The ``DIMENSIONS`` largest dimensions of each of the task's layers, the largest first.

    The size of a dimension is its mean square over the tokens of ``texts``, special tokens apart.
    """
    sample, size = [], 0
    for text in texts:
        sample.append(text[: CALIBRATION_CHARS - size])
        size += len(sample[-1])
        if size >= CALIBRATION_CHARS:
            break
    task = with_signals(task)
    in_float32 = replace(task, measure=replace(task.measure, dtype="float32"))
    squares = Measurer(in_float32).mean_squares(sample)
    model.free_memory()  # for the next model, here or in a worker
    return [np.argsort(-row, kind="stable")[:DIMENSIONS].tolist() for row in squares]
