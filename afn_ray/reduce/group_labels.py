"""Labels by each group's own Q3: a second scan of a run's tokens counts them.

A group's Q3 is known only after the scan of ``reduce.screen``. What is HIGH by it is counted by
group and type, like what is HIGH by the Q3 of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from afn_ray.reduce.features import Histograms, ShardTables, add, normal_tokens, read_columns
from afn_ray.reduce.groups import Cells, Grouping, Q3s, TypeCounter
from afn_ray.reduce.histogram import BIN_BITS, Histogram, by_index, of_cells, to_values
from afn_ray.reduce.tasks import Tasks, merged


def count_own(
    batches: Sequence[Sequence[ShardTables]],
    grouping: Grouping,
    layers: Sequence[int],
    num_types: int,
    sums: Any,
    tasks: Tasks,
) -> Any:
    """Handle of histograms, one for each layer: HIGH tokens by their group's own Q3.

    Their keys are group and type; token ids are below ``num_types``. Each call reads one of
    ``batches``. ``sums`` is the handle of the sums of ``features.scan``.
    """
    (own,) = tasks.submit(_own_of_sums, grouping, len(layers), sums)
    counted = []
    for places in batches:
        counted += tasks.submit(_count, places, grouping, layers, num_types, own)
    return merged(tasks, add, counted)


def own_q3(grouping: Grouping, strengths: Histogram) -> Q3s:
    """Q3 of each group at one layer, from ``strengths``, whose keys hold the cell above the bin."""
    num = len(grouping.names)
    of_groups = of_cells(strengths, lambda cells: cells % num)
    found = np.full(num, np.inf, np.float32)
    for index, of_group in enumerate(by_index(of_groups, num, BIN_BITS)):
        if of_group.n:
            found[index] = to_values(of_group.quartile_keys())[2]
    return found


def _own_of_sums(grouping: Grouping, num_layers: int, sums: Histograms) -> list[list[Q3s]]:
    """Q3 of each group, by layer."""
    return [[own_q3(grouping, strengths) for strengths in sums[:num_layers]]]


def _count(
    places: Sequence[ShardTables],
    grouping: Grouping,
    layers: Sequence[int],
    num_types: int,
    own: Sequence[Q3s],
) -> list[Histograms]:
    """HIGH tokens of ``places`` by group and type at each layer."""
    sums: list[Histograms] = [tuple(Histogram.empty() for _ in layers)]
    for place in places:
        documents = read_columns(place.documents, ["n_tokens", *grouping.columns])
        no_sources = np.zeros(len(documents), np.int64)
        cells = Cells.of(no_sources, documents, grouping).by_own(own)
        counter = TypeCounter(cells, num_types)
        for tokens in normal_tokens(place, documents, layers):
            counter.add(tokens.docs, tokens.types, tokens.by_layer)
        _, *high = counter.sums()
        sums.append(tuple(high))
    return add(*sums)
