"""The sources of a run: its files, or their folders where there are too many."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from afn_ray.reduce import losses
from afn_ray.reduce.stats import Ints

MAX_SOURCES = 1000
"""Largest number of sources.

If a run has more files, its sources are folders, as deep as this limit allows.
"""


class Sources(NamedTuple):
    """The sources of a run: its files, or their folders where there are too many."""

    names: tuple[str, ...]  # in ascending order
    depth: int | None  # number of URI parts that name a source; None if each file is one

    @classmethod
    def of(cls, uris: Collection[str]) -> Sources:
        """The sources of the files ``uris``."""
        depth = source_depth(uris)
        names = {source_of(uri, depth) for uri in uris}
        return cls(tuple(sorted(names)), depth)

    def name_of(self, uri: str) -> str:
        """The source of the file ``uri``."""
        return source_of(uri, self.depth)

    def index_of(self, uris: pa.DictionaryArray) -> Ints:
        """Index of the source of each file in ``uris``."""
        index = {name: at for at, name in enumerate(self.names)}
        names = [self.name_of(uri) for uri in uris.dictionary.to_pylist()]
        of_uri = np.array([index[name] for name in names], np.int64)
        if not len(of_uri):
            return np.empty(0, np.int64)
        return np.asarray(of_uri[uris.indices.to_numpy()])


def source_depth(uris: Collection[str]) -> int | None:
    """Number of URI parts that name a source; None if each file is a source."""
    if len(uris) <= MAX_SOURCES:
        return None
    folders = [uri.split("/")[:-1] for uri in uris]
    deepest = max(map(len, folders))
    for depth in range(deepest, 0, -1):
        distinct = {tuple(parts[:depth]) for parts in folders}
        if len(distinct) <= MAX_SOURCES:
            return depth
    return 1


def source_of(uri: str, depth: int | None) -> str:
    """The source of the file ``uri``: the file itself, or the folder of its first parts."""
    if depth is None:
        return uri
    folders = uri.split("/")[:-1]
    return "/".join(folders[:depth])


def sums_by_source(files: pa.Table, sources: Sources) -> dict[str, dict[str, Any]]:
    """Sums over ``files`` for each source, as columns of ``SOURCES_SCHEMA``."""
    names = [source_of(uri, sources.depth) for uri in files["source"].to_pylist()]
    named = files.set_column(0, "source", pa.array(names, pa.string()))
    rows = losses.add_files(named).to_pylist()
    return {row.pop("source"): row for row in rows}
