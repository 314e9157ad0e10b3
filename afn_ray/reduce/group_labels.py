"""Labels by each group's own Q3: a second scan of a run's tokens counts them.

A group's Q3 is known only after the scan of ``reduce.screen``. What is HIGH by it is counted by
group and type, like what is HIGH by the Q3 of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from afn_ray.reduce.features import Histograms, ShardTables, add, normal_tokens, read_columns
from afn_ray.reduce.groups import Grouping, Q3s, TypeCounter
from afn_ray.reduce.histogram import BIN_BITS, Histogram, by_index, to_values
from afn_ray.reduce.tasks import Tasks, merged
from afn_ray.schema import FEATURES


def count_own(
    batches: Sequence[Sequence[ShardTables]],
    grouping: Grouping,
    layers: Sequence[int],
    sums: Any,
    tasks: Tasks,
) -> Any:
    """Handle of histograms, one for each layer: HIGH tokens by their group's own Q3.

    Their keys are those of a ``TypeCounter``. Each call reads one of ``batches``. ``sums`` is the
    handle of the sums of ``features.scan``.
    """
    (own,) = tasks.submit(_own_of_sums, grouping, len(layers), sums)
    counted = []
    for places in batches:
        counted += tasks.submit(_count, places, grouping, layers, own)
    return merged(tasks, add, counted)


def _own_of_sums(grouping: Grouping, num_layers: int, sums: Histograms) -> list[list[Q3s]]:
    """Q3 of each group, by layer."""
    of_groups = sums[num_layers + len(FEATURES) + 1 :]
    return [[_own_q3(strengths, len(grouping.names)) for strengths in of_groups[:num_layers]]]


def _own_q3(strengths: Histogram, num_groups: int) -> Q3s:
    """Q3 of each group at one layer."""
    found = np.full(num_groups, np.inf, np.float32)
    for index, of_group in enumerate(by_index(strengths, num_groups, BIN_BITS)):
        if of_group.n:
            found[index] = to_values(of_group.quartile_keys())[2]
    return found


def _count(
    places: Sequence[ShardTables], grouping: Grouping, layers: Sequence[int], own: Sequence[Q3s]
) -> list[Histograms]:
    """HIGH tokens of ``places`` by group and type at each layer."""
    counter = TypeCounter(grouping, own)
    for place in places:
        documents = read_columns(place.documents, ["n_tokens", *grouping.columns])
        group = grouping.index_of(documents)
        for tokens in normal_tokens(place, documents, layers):
            counter.add(group[tokens.docs], tokens.types, tokens.by_layer)
    _, *high = counter.sums()
    return [tuple(high)]
