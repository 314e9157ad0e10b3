"""Which dimensions of the hidden state are outliers: the largest ones of each layer, on a pilot
sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from afn_ray.model.signals import DIMENSIONS
from afn_ray.runs import worker

PILOT_CHARS = 16_384
"""Of text that the pilot measures: dimensions that stick out do so in any text."""


def find_outliers(task: worker.Task, texts: Sequence[str]) -> list[list[int]]:
    """For each of the task's layers the ``DIMENSIONS`` with the largest mean square over the tokens
    of ``texts``, special ones apart, the largest first.
    """
    sample, size = [], 0
    for text in texts:
        sample.append(text[: PILOT_CHARS - size])
        size += len(sample[-1])
        if size >= PILOT_CHARS:
            break
    with contextlib.closing(
        worker.Processor(replace(worker.with_signals(task), dtype="float32"))
    ) as processor:
        squares = processor.mean_squares(sample)
    return [np.argsort(-row, kind="stable")[:DIMENSIONS].tolist() for row in squares]
