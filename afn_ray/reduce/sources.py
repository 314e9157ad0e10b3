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
        return cls(tuple(sorted({source_of(uri, depth) for uri in uris})), depth)

    def index_of(self, uris: pa.DictionaryArray) -> Ints:
        """Index of the source of each file in ``uris``."""
        index = {name: at for at, name in enumerate(self.names)}
        names = [source_of(uri, self.depth) for uri in uris.dictionary.to_pylist()]
        of_uri = np.array([index[name] for name in names], np.int64)
        return of_uri[uris.indices.to_numpy()] if len(of_uri) else np.empty(0, np.int64)


def source_depth(uris: Collection[str]) -> int | None:
    """Number of URI parts that name a source; None if each file is a source."""
    if len(uris) <= MAX_SOURCES:
        return None
    parts = [uri.split("/")[:-1] for uri in uris]
    for depth in range(max(map(len, parts)), 0, -1):
        if len({tuple(p[:depth]) for p in parts}) <= MAX_SOURCES:
            return depth
    return 1


def source_of(uri: str, depth: int | None) -> str:
    """The source of the file ``uri``: the file itself, or the folder of its first parts."""
    return uri if depth is None else "/".join(uri.split("/")[:-1][:depth])


def sums_by_source(files: pa.Table, sources: Sources) -> dict[str, dict[str, Any]]:
    """Sums over ``files`` for each source, as columns of ``SOURCES_SCHEMA``."""
    names = [source_of(uri, sources.depth) for uri in files["source"].to_pylist()]
    named = files.set_column(0, "source", pa.array(names, pa.string()))
    return {row.pop("source"): row for row in losses.add_files(named).to_pylist()}
