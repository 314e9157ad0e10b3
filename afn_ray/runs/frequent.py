"""Find the most frequent types of a corpus, on a sample of its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from afn_ray.runs.measurer import find_model_files, text_encoder
from afn_ray.runs.task import Task

SAMPLE_CHARS = 1 << 20
"""Text whose types are counted, in characters."""
MOST_CHARS = 1 << 14
"""Part of one document that counts, in characters, so that no document decides."""


def find_types(task: Task, texts: Sequence[str]) -> list[int]:
    """The most frequent types of ``texts``, ascending; as many as the task's config asks for.

    Types that the tokenizer's template adds are left out. Of types that are equally frequent, the
    smaller id is taken first.
    """
    encoder = text_encoder(find_model_files(task.config))
    encoded = encoder.encode(bounded(texts, SAMPLE_CHARS, MOST_CHARS))
    n = np.bincount(encoded.token_ids)
    of_template = [*encoder.template.prefix, *encoder.template.suffix]
    n[np.isin(np.arange(len(n)), of_template)] = 0
    order = np.argsort(-n, kind="stable")[: task.config.mean_vectors]
    return sorted(order[n[order] > 0].tolist())


def bounded(texts: Sequence[str], most_chars: int, most_of_one: int) -> list[str]:
    """The beginnings of ``texts``, each of at most ``most_of_one`` characters, ``most_chars`` in
    all.
    """
    sample, left = [], most_chars
    for text in texts:
        sample.append(text[: min(most_of_one, left)])
        left -= len(sample[-1])
        if not left:
            break
    return sample
