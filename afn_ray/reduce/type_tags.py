"""Counts of each tag of each type of a labelled corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.schema import TAGGED_SUMMARY_SCHEMA

ALL_TYPES = -1
"""Token id of rows that count the words of all types, whole or not, by language."""


class TagShare(NamedTuple):
    """The most frequent tag of a type."""

    tag: str
    share: float  # of the type's tagged tokens


@dataclass(frozen=True, slots=True)
class TypeTags:
    """Counts of the tags of each type in a labelled corpus; their sums are exact in any order."""

    table: pa.Table  # token_id, tag, n; distinct pairs in order

    @classmethod
    def empty(cls) -> TypeTags:
        """Counts of no tokens."""
        return cls.of(np.empty(0, np.int32), pa.array([], pa.string()))

    @classmethod
    def of(cls, token_ids: npt.NDArray[np.int32], tags: pa.Array | None) -> TypeTags:
        """Counts of tokens; tokens whose tag is null are left out."""
        return cls.of_counts(token_ids, tags, np.ones(len(token_ids), np.int64))

    @classmethod
    def of_counts(
        cls, token_ids: npt.NDArray[np.int32], tags: pa.Array, n: npt.NDArray[np.int64]
    ) -> TypeTags:
        """``n`` tokens of each type and tag, which may come more than once and in any order."""
        return cls._sum(pa.table({"token_id": token_ids, "tag": tags, "n": n}))

    @classmethod
    def merge(cls, parts: Iterable[TypeTags]) -> TypeTags:
        """The sum of ``parts``; at least one is required."""
        return cls._sum(pa.concat_tables([part.table for part in parts]))

    @classmethod
    def _sum(cls, table: pa.Table) -> TypeTags:
        tagged = table.filter(pc.is_valid(table["tag"]))
        groups = tagged.group_by(["token_id", "tag"]).aggregate([("n", "sum")])
        sums = groups.select(["token_id", "tag", "n_sum"])
        named = sums.rename_columns(["token_id", "tag", "n"])
        return cls(named.sort_by([("token_id", "ascending"), ("tag", "ascending")]))

    def negative(self) -> TypeTags:
        """The counts below zero: added, they take these tokens out of a sum."""
        negative = pc.negate(self.table["n"])
        return TypeTags(self.table.set_column(2, "n", negative))

    @classmethod
    def from_table(cls, table: pa.Table) -> TypeTags:
        """Read from the tag rows of ``TAGGED_SUMMARY_SCHEMA``."""
        n = table["counts"].combine_chunks().flatten()
        return cls(pa.table({"token_id": table["token_id"], "tag": table["tag"], "n": n}))

    def to_table(self) -> pa.Table:
        """Rows of ``TAGGED_SUMMARY_SCHEMA`` for this summary; the inverse of ``from_table``.

        Beside the type and the tag, only ``counts`` has a meaning; the other numbers are 0.
        """
        num_rows = len(self.table)
        zeros = np.zeros(num_rows, np.int64)
        ends = np.arange(num_rows + 1, dtype=np.int32)  # each list has one element
        n = self.table["n"].combine_chunks()
        columns = {
            "signal": pa.array(["tag"] * num_rows, pa.string()),
            "layer": zeros,
            "special": zeros,
            "n_docs": zeros,
            "n_word_start": zeros,
            "n_whole": zeros,
            "bins": pa.ListArray.from_arrays(ends, zeros),
            "counts": pa.ListArray.from_arrays(ends, n),
            "token_id": self.table["token_id"],
            "tag": self.table["tag"],
        }
        names = TAGGED_SUMMARY_SCHEMA.names
        in_order = [columns[name] for name in names]
        return pa.table(in_order, names).cast(TAGGED_SUMMARY_SCHEMA)

    def most_frequent(self) -> dict[int, TagShare]:
        """The most frequent tag of each type; for equal counts, the first by name."""
        best: dict[int, tuple[int, str]] = {}
        totals: Counter[int] = Counter()
        token_ids, tags, counts = (
            self.table[name].to_pylist() for name in ("token_id", "tag", "n")
        )
        for token_id, tag, n in zip(token_ids, tags, counts, strict=True):
            totals[token_id] += n
            best_n, _ = best.get(token_id, (0, ""))
            if n > best_n:
                best[token_id] = (n, tag)
        return {
            token_id: TagShare(tag, n / totals[token_id]) for token_id, (n, tag) in best.items()
        }
