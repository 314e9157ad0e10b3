"""The tables of a run's groups: thresholds, types and classes of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.classes import WORD_CLASSES, in_order
from afn_ray.reduce import lexicon
from afn_ray.reduce.groups import OTHERS, Grouping
from afn_ray.reduce.histogram import BIN_BITS, Histogram, by_index, to_values
from afn_ray.reduce.stats import is_high, wilson
from afn_ray.schema import (
    FEATURES,
    GROUP_CLASSES_SCHEMA,
    GROUP_TYPES_SCHEMA,
    GROUPS_SCHEMA,
    OWN_LABELS,
)


def group_tables(
    grouping: Grouping,
    layers: Sequence[int],
    vocabulary: pa.Table,
    sums: Sequence[Histogram],
    own: Sequence[Histogram] | None = None,
) -> list[dict[str, pa.Table]]:
    """The tables ``groups``, ``group_types`` and ``group_classes``, from sums of ``features.scan``.

    With ``own``, of ``group_labels.count_own``, they have the columns of ``OWN_LABELS`` too.
    """
    num = len(grouping.names)
    of_groups = sums[len(layers) + len(FEATURES) + 1 :]
    strengths = of_groups[: len(layers)]
    documents, with_tokens, types, *high = of_groups[len(layers) :]
    n_documents, n_docs = (h.counts_of(np.arange(num)) for h in (documents, with_tokens))
    rows: list[dict[str, object]] = []
    of_types: list[pa.Table] = []
    for at, layer in enumerate(layers):
        for index, of_group in enumerate(by_index(strengths[at], num, BIN_BITS)):
            row = {
                "layer": layer,
                "group": grouping.names[index],
                "n_documents": int(n_documents[index]),
                "n_docs": int(n_docs[index]),
            }
            rows.append(row | _strengths_row(of_group, grouping.q3[at]))
        high_here = [high[at]] if own is None else [high[at], own[at]]
        of_types.append(_types_table(grouping, layer, types, high_here))
    empty = _with_own(GROUP_TYPES_SCHEMA, "group_types", own).empty_table()
    table = pa.concat_tables([empty, *of_types]).unify_dictionaries().combine_chunks()
    classes = _classes_rows(table, vocabulary, by_language=grouping.by_language)
    return [
        {
            "groups": pa.Table.from_pylist(rows, _with_own(GROUPS_SCHEMA, "groups", own)),
            "group_types": table,
            "group_classes": pa.Table.from_pylist(
                classes, _with_own(GROUP_CLASSES_SCHEMA, "group_classes", own)
            ),
        }
    ]


def _with_own(schema: pa.Schema, name: str, own: object) -> pa.Schema:
    """``schema`` of the table ``name``, with labels by the groups' own Q3 if there are ``own``."""
    return schema if own is None else pa.schema([*schema, *OWN_LABELS[name]])


def _strengths_row(strengths: Histogram, q3: float) -> dict[str, object]:
    """Columns of one row of ``GROUPS_SCHEMA``; ``q3`` is that of the run."""
    values = to_values(strengths.keys)
    own = to_values(strengths.quartile_keys()).tolist() if strengths.n else (None,) * 3
    return {
        "n": strengths.n,
        "n_high": int(strengths.counts[is_high(values, q3)].sum()),
        **dict(zip(("q1", "q2", "q3"), own, strict=True)),
        "bins": strengths.keys,
        "counts": strengths.counts,
        "n_high_own": int(strengths.counts[is_high(values, own[2])].sum()),
    }


def _types_table(
    grouping: Grouping, layer: int, types: Histogram, high: Sequence[Histogram]
) -> pa.Table:
    """Rows of ``GROUP_TYPES_SCHEMA`` at ``layer``, by group and type.

    ``high`` are the HIGH tokens by the run's Q3 and perhaps those by the groups' own.
    """
    index, token_ids = np.divmod(types.keys, max(1, grouping.num_types))
    of_names = pa.array(grouping.names, pa.string())
    columns = [
        pa.array(np.full(len(index), layer, np.int16)),
        of_names.take(pa.array(index)).dictionary_encode(),
        pa.array(token_ids.astype(np.int32)),
        pa.array(types.counts),
        *(pa.array(counts.counts_of(types.keys)) for counts in high),
    ]
    schema = _with_own(GROUP_TYPES_SCHEMA, "group_types", None if len(high) == 1 else high)
    return pa.Table.from_arrays(columns, schema=schema)


def classes_of(types: pa.Table, vocabulary: pa.Table, *, by_language: bool) -> pa.Table:
    """``types`` of one layer with ``token``, ``text`` and ``class`` of the layer's ``vocabulary``.

    ``by_language``: the groups are languages, so words have the classes that the group's gives
    them.
    """
    normal = vocabulary.filter(pc.not_equal(vocabulary["class"], "special"))
    rows = pc.index_in(types["token_id"], value_set=normal["token_id"].combine_chunks())
    for name in ("token", "text", "class"):
        types = types.append_column(name, normal[name].take(rows))
    return _in_languages(types.combine_chunks()) if by_language else types.combine_chunks()


def _in_languages(types: pa.Table) -> pa.Table:
    """``types`` whose words have the classes that the language of their group gives them.

    Words of ``OTHERS`` keep the class that they have.
    """
    columns = (types[name].to_pylist() for name in ("group", "text", "class"))
    classes = []
    for group, text, name in zip(*columns, strict=True):
        if name in WORD_CLASSES and group != OTHERS:
            words = None if group is None else lexicon.find(group)
            name = "word" if words is None else words.guess(text).name
        classes.append(name)
    at = types.column_names.index("class")
    return types.set_column(at, "class", pa.array(classes, pa.string()))


def _classes_rows(
    types: pa.Table, vocabulary: pa.Table, *, by_language: bool
) -> list[dict[str, object]]:
    """Rows of ``GROUP_CLASSES_SCHEMA``: the classes of each group, in the order of the tables."""
    counted = [name for name in types.column_names if name.startswith("n")]
    rows: list[dict[str, object]] = []
    for layer in types["layer"].unique().to_pylist():
        here = classes_of(
            types.filter(pc.equal(types["layer"], layer)),
            vocabulary.filter(pc.equal(vocabulary["layer"], layer)),
            by_language=by_language,
        )
        sums = here.group_by(["group", "class"]).aggregate([(name, "sum") for name in counted])
        found: dict[str | None, dict[str, dict[str, int]]] = {}
        for row in sums.to_pylist():
            of_group = found.setdefault(row["group"], {})
            of_group[row["class"]] = {name: row[f"{name}_sum"] for name in counted}
        for group in sorted(found, key=lambda name: (name is None, name or "")):
            rows += _class_rows(layer, group, found[group])
    return rows


def _class_rows(
    layer: int, group: str | None, counts: Mapping[str, Mapping[str, int]]
) -> Iterator[dict[str, object]]:
    """Rows of one group; ``counts`` are the numbers of tokens of each class, by column."""
    total = sum(of_class["n"] for of_class in counts.values())
    for name in in_order(counts):
        n = counts[name]["n"]
        row: dict[str, object] = {"layer": layer, "group": group, "class": name}
        row |= {**counts[name], "share": n / total}
        for column in sorted(counts[name].keys() - {"n"}):
            share = column.replace("n_high", "share_high")
            low, upper = wilson(counts[name][column], n)
            row |= {
                share: counts[name][column] / n,
                f"{share}_low": float(low),
                f"{share}_high": float(upper),
            }
        yield row
