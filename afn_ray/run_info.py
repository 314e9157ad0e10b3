"""The content of a run.json, by key. A run of an older version lacks some keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from afn_ray.measure import StoredMeasure


class TableEntry(TypedDict):
    """A table of a run, as run.json lists it."""

    name: str
    bytes: int
    sha256: str
    crc32: str


class ModelInfo(TypedDict, total=False):
    """The model of a run."""

    name: str
    type: str
    depth: int  # blocks
    hidden_size: int


class Maker(TypedDict):
    """A device and software, and the number of shards that it measured."""

    shards: int
    made_by: dict[str, str]


class Quarantined(TypedDict):
    """A shard that was given up; of many, the later ones have no file and no reason."""

    shard: str
    uri: str
    reason: str


class NearCopies(TypedDict):
    """Near-copies among the documents of a run, which count like the others."""

    threshold: float
    documents: int


class UnknownTokens(TypedDict):
    """Tokens of text that the tokenizer does not know."""

    token: str | None
    tokens: int


class RunInfo(TypedDict, total=False):
    """The content of a run.json; empty while its run is not complete."""

    schema_version: int
    id: str
    measure: StoredMeasure
    model: ModelInfo
    layers: list[int]
    tables: dict[str, TableEntry]
    config: dict[str, Any]  # fields of the ``RunConfig`` of any version
    function_words: str
    corpus: dict[str, int]
    unread_from: str
    precision: Mapping[str, Any]  # read by ``runs.precision``
    counts: dict[str, int]
    unknown: UnknownTokens
    quarantined: list[Quarantined]
    created_at: str
    finished_at: str
    seconds: float
    made_by: dict[str, str]
    makers: dict[str, int]
    provenance: list[Maker]
    duplicates: Mapping[str, Any]  # read by ``reduce.duplicates``
    near_duplicates: NearCopies
