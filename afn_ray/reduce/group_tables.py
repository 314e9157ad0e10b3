"""The tables of a run's groups: thresholds, types and classes of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.groups import Grouping
from afn_ray.reduce.histogram import BIN_BITS, TYPE_BITS, Histogram, by_index, of_cells, to_values
from afn_ray.reduce.stats import Ints, is_high, wilson
from afn_ray.schema import (
    FEATURES,
    GROUP_CLASSES_SCHEMA,
    GROUP_TYPES_SCHEMA,
    GROUPS_SCHEMA,
    in_order,
)


def group_tables(
    grouping: Grouping, layers: Sequence[int], sums: Sequence[Histogram], vocabulary: pa.Table
) -> list[dict[str, pa.Table]]:
    """The tables ``groups``, ``group_types`` and ``group_classes``, from sums of ``features.scan``."""
    num = len(grouping.names)

    def group_of(cells: Ints) -> Ints:
        return cells % num

    strengths = [of_cells(histogram, group_of) for histogram in sums[: len(layers)]]
    documents, with_tokens, types, *high = sums[len(layers) + len(FEATURES) + 1 :]
    n_documents, n_docs = (h.counts_of(np.arange(num)) for h in (documents, with_tokens))
    rows: list[dict[str, Any]] = []
    of_types: list[pa.Table] = [GROUP_TYPES_SCHEMA.empty_table()]
    for at, layer in enumerate(layers):
        for index, of_group in enumerate(by_index(strengths[at], num, BIN_BITS)):
            is_high_here = is_high(to_values(of_group.keys), grouping.q3[at])
            q1, q2, q3 = (None,) * 3
            if of_group.n:
                q1, q2, q3 = to_values(of_group.quartile_keys()).tolist()
            rows.append(
                {
                    "layer": layer,
                    "group": grouping.names[index],
                    "n_documents": int(n_documents[index]),
                    "n_docs": int(n_docs[index]),
                    "n": of_group.n,
                    "n_high": int(of_group.counts[is_high_here].sum()),
                    "q1": q1,
                    "q2": q2,
                    "q3": q3,
                    "bins": of_group.keys,
                    "counts": of_group.counts,
                }
            )
        of_types.append(_types_table(grouping.names, layer, types, high[at]))
    table = pa.concat_tables(of_types).unify_dictionaries().combine_chunks()
    return [
        {
            "groups": pa.Table.from_pylist(rows, GROUPS_SCHEMA),
            "group_types": table,
            "group_classes": _classes_table(table, vocabulary),
        }
    ]


def _types_table(
    names: Sequence[str | None], layer: int, types: Histogram, high: Histogram
) -> pa.Table:
    """Rows of ``GROUP_TYPES_SCHEMA`` at ``layer``, by group and type."""
    index = (types.keys >> TYPE_BITS).astype(np.int32)
    of_names = pa.array(names, pa.string())
    columns = [
        pa.array(np.full(len(index), layer, np.int16)),
        of_names.take(pa.array(index)).dictionary_encode(),
        pa.array((types.keys & ((1 << TYPE_BITS) - 1)).astype(np.int32)),
        pa.array(types.counts),
        pa.array(high.counts_of(types.keys)),
    ]
    return pa.Table.from_arrays(columns, schema=GROUP_TYPES_SCHEMA)


def classes_of(types: pa.Table, vocabulary: pa.Table) -> pa.Table:
    """``types`` of one layer with ``token``, ``text`` and ``class`` of the layer's ``vocabulary``."""
    normal = vocabulary.filter(pc.not_equal(vocabulary["class"], "special"))
    rows = pc.index_in(types["token_id"], value_set=normal["token_id"].combine_chunks())
    for name in ("token", "text", "class"):
        types = types.append_column(name, normal[name].take(rows))
    return types.combine_chunks()


def _classes_table(types: pa.Table, vocabulary: pa.Table) -> pa.Table:
    """Rows of ``GROUP_CLASSES_SCHEMA``: the classes of each group, in the order of the tables."""
    rows: list[dict[str, Any]] = []
    for layer in types["layer"].unique().to_pylist():
        here = classes_of(
            types.filter(pc.equal(types["layer"], layer)),
            vocabulary.filter(pc.equal(vocabulary["layer"], layer)),
        )
        sums = here.group_by(["group", "class"]).aggregate([("n", "sum"), ("n_high", "sum")])
        found: dict[str | None, dict[str, tuple[int, int]]] = {}
        for row in sums.to_pylist():
            of_group = found.setdefault(row["group"], {})
            of_group[row["class"]] = (row["n_sum"], row["n_high_sum"])
        for group in sorted(found, key=lambda name: (name is None, name or "")):
            rows += _class_rows(layer, group, found[group])
    return pa.Table.from_pylist(rows, GROUP_CLASSES_SCHEMA)


def _class_rows(
    layer: int, group: str | None, counts: Mapping[str, tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Rows of one group; ``counts`` are the tokens and the HIGH tokens of each class."""
    total = sum(n for n, _ in counts.values())
    for name in in_order(counts):
        n, n_high = counts[name]
        low, upper = wilson(n_high, n)
        yield {
            "layer": layer,
            "group": group,
            "class": name,
            "n": n,
            "share": n / total,
            "n_high": n_high,
            "share_high": n_high / n,
            "share_high_low": float(low),
            "share_high_high": float(upper),
        }
