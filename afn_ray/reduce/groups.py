"""Groups of a run's documents: by a kept column, language, source, or partition key of the path.

The scan of ``reduce.screen`` counts the strengths and the types of each group in arrays, so groups
cost no sort of the tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.errors import ConfigError
from afn_ray.kept import Kept
from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.reduce.counters import KeyCounter
from afn_ray.reduce.histogram import BIN_BITS, Histogram, to_bins
from afn_ray.reduce.shards import CommittedFile, CommittedShards
from afn_ray.reduce.sources import Sources
from afn_ray.reduce.stats import Int32s, Ints, is_high
from afn_ray.reduce.tasks import Tasks, batches, merged
from afn_ray.schema import LANGUAGE
from afn_ray.store import parquet

Q3s = npt.NDArray[np.float32]
"""Thresholds by group or by document; infinite for one without tokens."""
MAX_GROUPS = 100
"""Largest number of groups; the documents of all smaller ones are the group ``OTHERS``."""
OTHERS = "(other groups)"
"""Name of the group of all documents whose own group is not among the ``MAX_GROUPS`` largest."""
MOST_VALUES = 1_000_000
"""Largest number of values of the column that makes the groups."""
BY_SOURCE = "source"
"""Name of the grouping by source."""
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
"""Value of a partition key that stands for none."""


class Grouping(NamedTuple):
    """Rule that groups the documents of a run."""

    by: str  # ``BY_SOURCE``, a kept column or a partition key
    is_column: bool  # ``by`` is a kept column, or ``LANGUAGE``
    sources: Sources
    names: tuple[str | None, ...] = ()  # by index; None: documents without a value
    q3: tuple[float, ...] = ()  # of the thresholds that label, by layer
    num_types: int = 0  # token ids are below it
    by_language: bool = False  # words have the classes that the language of the group gives them

    def index_of(self, documents: pa.Table) -> Ints:
        """Index of the group of each of ``documents``, with ``source`` and the kept column."""
        index = {name: at for at, name in enumerate(self.names)}
        others = index.get(OTHERS, 0)
        values = self.values(documents)
        of_value = [index.get(value, others) for value in values.dictionary.to_pylist()]
        found = np.array([*of_value, index.get(None, others)], np.int64)
        at = pc.fill_null(values.indices, len(of_value)).to_numpy(zero_copy_only=False)
        return np.asarray(found[at])

    @property
    def columns(self) -> list[str]:
        """Columns of ``documents`` that the groups need."""
        return ["source", self.by] if self.is_column else ["source"]

    def values(self, documents: pa.Table) -> pa.DictionaryArray:
        """The group of each of ``documents`` before small ones are joined; null without a value."""
        if self.is_column:
            column = documents[self.by]
            if pa.types.is_floating(column.type):
                column = pc.add(column, 0.0)  # -0 is 0, as in SQL
            texts = column.cast(pa.string()).combine_chunks()
            return texts.dictionary_encode()
        uris = documents["source"].combine_chunks()
        names = [self.of_uri(uri) for uri in uris.dictionary.to_pylist()]
        of_uri = pa.array(names, pa.string()).dictionary_encode()
        return pa.DictionaryArray.from_arrays(of_uri.indices.take(uris.indices), of_uri.dictionary)

    def of_uri(self, uri: str) -> str | None:
        """The group of the documents of the file ``uri``."""
        return self.sources.name_of(uri) if self.by == BY_SOURCE else partition_of(uri, self.by)


def group_name(group: str | None) -> str:
    """Name of a group for people."""
    return "(no value)" if group is None else group or "(empty)"


def partition_of(uri: str, key: str) -> str | None:
    """Value of the partition ``key`` in the folders of ``uri``, as in ``lang=de``; None without."""
    found = re.findall(rf"(?<=/){re.escape(key)}=([^/]*)(?=/)", uri)
    return None if not found or found[-1] == HIVE_NULL else unquote(found[-1])


def check_group_by(
    group_by: str | None, kept: Kept, uris: Sequence[str], language: str = AUTO_LANGUAGE
) -> None:
    """Raise ``ConfigError`` if ``group_by`` is no way to group documents of the files ``uris``.

    ``language`` is the config's.
    """
    if group_by is None or group_by in (BY_SOURCE, *(column.name for column in kept)):
        return
    if group_by == LANGUAGE:
        if language == AUTO_LANGUAGE:
            return
        raise ConfigError(
            f"group_by is {LANGUAGE}, but language is {language!r}, so none is detected; leave "
            "--language out, or group by another key"
        )
    if not any(partition_of(uri, group_by) is not None for uri in uris):
        raise ConfigError(
            f"group_by is {group_by!r}; expected source, {LANGUAGE}, one of keep_columns "
            f"({', '.join(column.name for column in kept) or 'none'}), or a key of the path as in "
            f"/{group_by}=VALUE/, which no file of the corpus has"
        )


def find_groups(
    shards: CommittedShards, grouping: Grouping, q3: Sequence[float], tasks: Tasks
) -> Grouping:
    """``grouping`` with the names of its groups, and the ``q3`` of each layer.

    The largest groups by tokens have names of their own; of equally large ones, the first by name.
    Raises ``ConfigError`` for more than ``MOST_VALUES`` values.
    """
    places = [
        (shards.file(commit, "documents"), left_out) for commit, _, left_out in shards.places()
    ]
    handles = [tasks.submit(_count_tokens, some, grouping)[0] for some in batches(places)]
    counts: Counter[str | None] = tasks.result(merged(tasks, _add_counts, handles))
    named = [name for name in counts if name is not None]
    if len(named) > MOST_VALUES:
        raise ConfigError(
            f"group_by is {grouping.by!r}, which has over {MOST_VALUES:,} values; group by another "
            "column: 'afn run' computes the tables anew, and measures nothing again"
        )
    largest = sorted(named, key=lambda name: (-counts[name], name))[:MAX_GROUPS]
    names: list[str | None] = [*sorted({*largest} - {OTHERS})]
    if len(names) < len(named):
        names.append(OTHERS)
    if None in counts:
        names.append(None)
    return grouping._replace(names=tuple(names), q3=tuple(q3))


def _count_tokens(
    places: Sequence[tuple[CommittedFile, Ints]], grouping: Grouping
) -> list[Counter[str | None]]:
    """Number of tokens of each group in the documents of ``places``, without those left out."""
    counts: Counter[str | None] = Counter()
    for file, left_out in places:
        columns = [*grouping.columns, "n_tokens"]
        documents = parquet.read(file.read(), columns, use_threads=False)
        if len(left_out):
            counted = np.delete(np.arange(len(documents)), left_out)
            documents = documents.take(counted)
        sums = pa.table({"group": grouping.values(documents), "n": documents["n_tokens"]})
        sums = sums.group_by("group").aggregate([("n", "sum")])
        names = sums["group"].cast(pa.string()).to_pylist()
        for name, n in zip(names, sums["n_sum"].to_pylist(), strict=True):
            counts[name] += n
    return [counts]


def _add_counts(*parts: Counter[str | None]) -> list[Counter[str | None]]:
    """The sum of ``parts``; of far too many values, only so many that they are still too many."""
    total: Counter[str | None] = Counter()
    for part in parts:
        for name, n in part.items():
            total[name] += n  # a Counter's own sum drops groups without tokens
        if len(total) > 2 * MOST_VALUES:
            return [total]
    return [total]


# --- sums


class Cells(NamedTuple):
    """Cell and group of each document of a shard, both [n_docs]."""

    cell: Ints  # index of its source times the number of groups, plus that of its group
    group: Ints

    @classmethod
    def of(cls, source: Ints, documents: pa.Table, grouping: Grouping | None) -> Cells:
        """Cells of ``documents``, whose sources have the indices ``source``."""
        if grouping is None:
            return cls(source, np.zeros_like(source))
        group = grouping.index_of(documents)
        return cls(source * len(grouping.names) + group, group)


WINDOW = 3 << 15
"""Number of bins that are counted in an array for each group: three octaves of strength."""


class TypeCounter:
    """Counts of each type in each group: of all its tokens, and of the HIGH ones at each layer."""

    def __init__(self, grouping: Grouping, q3: Sequence[float | Q3s]) -> None:
        """Begin with nothing; ``q3`` are those of each layer, of the run or of each group."""
        self._q3, self._num_types = q3, grouping.num_types
        size = len(grouping.names) * grouping.num_types
        num = 1 + len(q3)
        self._counters = [KeyCounter(size, num) for _ in range(num)]

    def add(
        self, groups: Ints, types: Int32s, strengths: Sequence[npt.NDArray[np.float32]]
    ) -> None:
        """Count normal tokens: their groups, types, and strengths at each layer, all [n]."""
        keys = groups * self._num_types + types
        limits = (q3 if isinstance(q3, float) else q3[groups] for q3 in self._q3)
        high = (keys[is_high(s, limit)] for s, limit in zip(strengths, limits, strict=True))
        for counter, some in zip(self._counters, (keys, *high), strict=True):
            counter.add(some)

    def sums(self) -> tuple[Histogram, ...]:
        """Counts of all tokens, then of the HIGH ones at each layer.

        A key is the index of the group times the number of types, plus the type.
        """
        return tuple(counter.sums() for counter in self._counters)


class StrengthCounter:
    """Counts of each strength in each group, at each layer.

    Nearly all strengths lie within two octaves below Q3 and one above it. Those are counted in an
    array, which costs less than to sort them; others are sorted.
    """

    def __init__(self, grouping: Grouping) -> None:
        size = len(grouping.names) * WINDOW
        self._lows = [_low(q3) for q3 in grouping.q3]
        self._counters = [KeyCounter(size, len(self._lows)) for _ in self._lows]

    def add(self, groups: Ints, strengths: Sequence[npt.NDArray[np.float32]]) -> None:
        """Count normal tokens: their groups, and their strengths at each layer, all [n]."""
        for counter, low, values in zip(self._counters, self._lows, strengths, strict=True):
            of_tokens, at = groups, to_bins(values) - low
            window = WINDOW if counter.is_dense else 0
            is_far = at.view(np.uint64) >= window  # below the window it wraps to a large one
            if is_far.any():
                counter.add_others((groups[is_far] << BIN_BITS) + low + at[is_far])
                of_tokens = groups[~is_far]
                at = at[~is_far]
            counter.add(of_tokens * WINDOW + at)

    def sums(self) -> tuple[Histogram, ...]:
        """Counts at each layer; a key holds the index of the group above the bin."""
        return tuple(
            counter.sums(partial(_with_bins, low))
            for counter, low in zip(self._counters, self._lows, strict=True)
        )


def _low(q3: float) -> int:
    """The lowest bin of the window around ``q3``, which is infinite if there are no tokens."""
    return int(to_bins(np.array([q3 / 4], np.float32))[0])


def _with_bins(low: int, at: Ints) -> Ints:
    """Keys with the group above the bin, of the indices ``at`` of counters from the bin ``low``."""
    group, offset = np.divmod(at, WINDOW)
    return (group << BIN_BITS) + low + offset
