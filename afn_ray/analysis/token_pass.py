"""One pass over the tokens of a run: the sums that the figures of claims are computed from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis.bootstrap import Figure, Sample, by_number, ranks
from afn_ray.reduce.stats import Floats, Ints, quantile_index
from afn_ray.schema import UNTAGGED, in_order, upos_classes
from afn_ray.text import count

BINS = 256
"""Bins of a variable's ranks, for intervals of an AUC; the AUC itself uses every distinct value."""
MOST_TAGS = 24
"""Number of tags with figures of their own; the rarer ones share one figure."""
KINDS = ("content", "function", "punctuation")
"""Word classes that the claims compare."""
Sums = dict[str, Floats]
"""Sums over the tokens by group: [num_groups]."""


class Variable:
    """A variable that may separate classes, and the distribution of its values in each class."""

    def __init__(
        self,
        name: str,
        layer: int | None,
        column: str,
        values: npt.NDArray[Any],
        counts: npt.NDArray[Any],
        groups: int,
    ) -> None:
        """``values`` [n_values] are distinct and ascending; ``counts`` are their token counts."""
        self.name, self.layer, self.column = name, layer, column
        self.q3 = values[quantile_index(counts, 3, 4)]
        self._values, self._ranks = values, ranks(values, counts)
        self._bins = np.minimum(BINS - 1, (self._ranks + 0.5) * BINS).astype(np.int64)
        self.by_value = np.zeros((len(KINDS) + 1, len(values)))  # the last kind is everything else
        self.by_bin = np.zeros((groups, len(KINDS) + 1, BINS))
        self.high = np.zeros((groups, len(KINDS) + 1))
        self.separates = len(values) > 1  # False: all values are equal and separate nothing

    def add(self, values: npt.NDArray[Any], g: Ints, kind: Ints) -> Floats:
        """Count tokens, all arrays [n_tokens]; return their ranks."""
        at = np.searchsorted(self._values, values)
        row = g * (len(KINDS) + 1) + kind
        np.add.at(
            self.by_value.ravel(), kind * len(self._values) + at, 1.0
        )  # on a flat view: tens of times faster
        np.add.at(self.by_bin.ravel(), row * BINS + self._bins[at], 1.0)
        self.high += np.bincount(row, values >= self.q3, self.high.size).reshape(self.high.shape)
        return self._ranks[at]


class TagCounts:
    """Tags of a labelled corpus, and how many tokens of each are HIGH."""

    def __init__(self, sample: Sample, layers: Sequence[int]) -> None:
        tag = f"coalesce(tag, '{UNTAGGED}')"
        tags = sample.ask(
            f"SELECT {tag} FROM {sample.tokens} GROUP BY 1 ORDER BY count(*) DESC, 1"  # noqa: S608
        )[0]
        self._tags, kinds = pa.array(tags, pa.string()), upos_classes(tags)
        self._kinds = np.array([KINDS.index(kinds[t]) if t in kinds else len(KINDS) for t in tags])
        self._names = in_order(tags[:MOST_TAGS])
        self._columns = np.full(len(tags), len(self._names))
        self._columns[: len(self._names)] = [self._names.index(t) for t in tags[:MOST_TAGS]]
        if rest := len(tags) - len(self._names):
            self._names.append(f"{count(rest, 'rarer tag')} together")
        shape = (len(layers), 2, sample.num_groups, len(self._names))
        self._high, self._n = (
            dict(zip(layers, part, strict=True)) for part in np.zeros(shape).swapaxes(0, 1)
        )

    def read(self, tags: pa.Array) -> tuple[Ints, Ints]:
        """Index of the name under which each token's tag is counted, and its index in ``KINDS``."""
        found = pc.index_in(pc.fill_null(tags.cast(pa.string()), UNTAGGED), self._tags).to_numpy()
        return self._columns[found], self._kinds[found]

    def add(self, layer: int, g: Ints, tags: Ints, high: npt.NDArray[np.bool_]) -> None:
        """Count tokens of groups ``g``; all arrays are [n_tokens]."""
        row = g * len(self._names) + tags
        for counts, weights in ((self._n[layer], None), (self._high[layer], high)):
            counts += np.bincount(row, weights, counts.size).reshape(counts.shape)

    def figures(self, sample: Sample, layer: int) -> Iterator[Figure]:
        """The share of each tag that is HIGH."""
        for at, name in enumerate(self._names):
            n = self._n[layer][:, at]
            share = sample.draw(np.divide, self._high[layer][:, at], n)
            yield sample.figure(
                "tags", "share that is HIGH", name, layer, share, n.sum(), is_control=layer == 0
            )


def read_sums(
    sample: Sample, layers: Sequence[int], recorded: set[str], tags: TagCounts | None
) -> tuple[list[Variable], dict[int, Sums], int]:
    """Read the inputs of all figures: variables, sums by layer, and the number of types.

    Strength comes first among the variables, layer by layer. A token's class, one of ``KINDS``, is
    that of its type, or with ``tags`` that of its own tag.
    """
    run, groups = sample.run, sample.num_groups
    mean_columns = ", ".join(f"avg(strength_{k}::DOUBLE)" for k in layers)
    types, n_of, *means = sample.ask(
        f"SELECT token_id, count(*), {mean_columns} FROM {sample.tokens} GROUP BY 1"  # noqa: S608
    )
    mean_of = {k: by_number(types, mean) for k, mean in zip(layers, means, strict=True)}
    centre = {k: float(mean @ n_of) / sample.n for k, mean in zip(layers, means, strict=True)}
    known = sample.ask(
        f"SELECT token_id, coalesce(list_position({list(KINDS)}, class) - 1, {len(KINDS)}), n, idf "  # noqa: S608
        f"FROM vocabulary WHERE layer = {layers[-1]} AND class <> 'special'"
    )
    kind_of, run_n_of, idf_of = (by_number(known[0], column) for column in known[1:])
    frequency_of = by_number(types, ranks(run_n_of[types], n_of))
    places, num_there = sample.ask(f"SELECT position, count(*) FROM {sample.tokens} GROUP BY 1")  # noqa: S608
    place_of = by_number(places, ranks(places, num_there))

    def variable(name: str, layer: int | None, column: str) -> Variable:
        if column == "idf":
            values, level = np.unique(idf_of[types], return_inverse=True)
            counts = np.bincount(level, n_of)
        else:
            values, counts = sample.ask(
                f"SELECT {column}, count(*) FROM {sample.tokens} GROUP BY 1 ORDER BY 1"  # noqa: S608
            )
        return Variable(name, layer, column, values, counts, groups)

    variables = [variable("strength", k, f"strength_{k}") for k in layers]
    rarity = variable("rarity (idf)", None, "idf")
    variables += [rarity] if rarity.separates else []
    for signal, name in (
        ("attention", "attention received"),
        ("attention_norm", "norm-weighted attention"),
    ):
        variables += [
            variable(name, k, f"{signal}_{k}") for k in layers if f"{signal}_{k}" in recorded
        ]
    trimmed_q3 = dict(
        run.sql("SELECT layer, q3 FROM signals WHERE signal = 'strength_trimmed'").fetchall()
    )
    q3 = dict(run.sql("SELECT layer, q3 FROM thresholds WHERE population = 'tokens'").fetchall())
    columns = ["doc", "position", "token_id", *(v.column for v in variables if v.column != "idf")]
    columns += [
        f"{name}_{k}"
        for name in ("sink", "shift", "strength_trimmed")
        for k in layers
        if f"{name}_{k}" in recorded
    ]
    columns += ["tag"] if tags is not None else []
    sums: dict[int, Sums] = {k: {} for k in layers}
    sample.check_time()
    for batch in run.sql(f"SELECT {', '.join(columns)} FROM {sample.tokens}").to_arrow_reader():  # noqa: S608
        sample.check_time()
        row = {
            name: batch.column(name).to_numpy(zero_copy_only=False)
            for name in columns
            if name != "tag"
        }
        row["idf"] = idf_of[row["token_id"]]
        row |= {f"high_{k}": row[f"strength_{k}"] >= np.float32(q3[k]) for k in layers}
        g, kind = sample.group_of[row["doc"]], kind_of[row["token_id"]]
        if tags is not None:
            tag, kind = tags.read(batch.column("tag"))
            for k in layers:
                tags.add(k, g, tag, row[f"high_{k}"])
        rank = {v.column: v.add(row[v.column], g, kind) for v in variables}
        for before, k in zip([None, *layers], layers, strict=False):
            s, x, high = (
                row[f"strength_{k}"].astype(np.float64),
                rank[f"strength_{k}"],
                row[f"high_{k}"],
            )
            off = s - centre[k]
            adding = {
                "high": high,
                "sinks": row[f"sink_{k}"],
                "sum": s,
                "sum_without": s * ~row[f"sink_{k}"],
                "within": (s - mean_of[k][row["token_id"]]) ** 2,
                "off": off,
                "off_2": off**2,
                "x": x,
                "xx": x * x,
                "n": np.ones(len(x)),
            }
            frequency = frequency_of[row["token_id"]]
            for name, y in (
                ("frequency", frequency),
                ("place", place_of[row["position"]]),
                ("length", sample.length_of[row["doc"]]),
            ):
                adding |= {name: y, f"{name}_2": y * y, f"{name}_x": x * y}
            adding |= {f"high_{name}": high & (kind == at) for at, name in enumerate(KINDS)}
            adding |= {name: kind == at for at, name in enumerate(KINDS)}
            ours, content = kind < len(KINDS), kind == KINDS.index("content")
            adding |= {
                "k_n": ours,
                "k_c": content,
                "k_x": x * ours,
                "k_xx": x * x * ours,
                "k_cx": x * content,
                "k_f": frequency * ours,
                "k_ff": frequency**2 * ours,
                "k_fx": x * frequency * ours,
                "k_cf": frequency * content,
            }
            if before is not None:
                adding |= {
                    "both": row[f"high_{before}"] & high,
                    "any": row[f"high_{before}"] | high,
                }
            if (shift := row.get(f"shift_{k}")) is not None:
                adding |= {"shift": shift, "high_shift": shift * high}
            if (trimmed := row.get(f"strength_trimmed_{k}")) is not None:
                still = trimmed >= trimmed_q3[k]
                adding |= {
                    "squares": s**2,
                    "cut": s**2 - trimmed.astype(np.float64) ** 2,
                    "trimmed_both": still & high,
                    "trimmed_any": still | high,
                }
            for name, values in adding.items():
                sums[k].setdefault(name, np.zeros(groups))[:] += np.bincount(g, values, groups)
    return variables, sums, len(types)
