"""Copies, near-copies and repeated ids of a run, as ``audit.json`` has them."""

from __future__ import annotations

from typing import Annotated, TypedDict

from afn_ray.analysis.own_parts import NEAR, OwnParts
from afn_ray.errors import QueryError, StoreError
from afn_ray.option_rules import CHOICES
from afn_ray.reduce import duplicates, near_duplicates
from afn_ray.reduce.group_drift import grouped_by
from afn_ray.store.manifest import RunFolder


class RepeatedIdJson(TypedDict):
    """Layout of an id in ``CopiesJson``."""

    id: Annotated[str, "the id, printable; a long one is cut"]
    n: Annotated[int, "documents that have it"]
    doc: Annotated[int, "number of the first of them, in the run"]


class NearGroupJson(TypedDict):
    """Layout of a group in ``CopiesJson``."""

    group: str
    share: Annotated[float, "near-copies among its documents with tokens"]


class CopiesJson(TypedDict):
    """Layout of ``duplicates`` in ``audit.json``."""

    choice: Annotated[str, "documents of one text that count", CHOICES["duplicates"]]
    documents: Annotated[int, "copies: documents beside the one of each text"]
    tokens: Annotated[int, "tokens of the copies"]
    texts: Annotated[int, "texts that have copies"]
    share: Annotated[float, "copies among the documents with tokens"]
    repeated_ids: Annotated[int, "ids that several documents have"]
    id_documents: Annotated[int, "documents with such an id"]
    examples: Annotated[list[RepeatedIdJson], "the first of these ids"]
    near_share: Annotated[float | None, "near-copies; null: they were not looked for"]
    near_groups: Annotated[
        list[NearGroupJson] | None,
        "the groups with near-copies, most first; null: the documents could not be read",
    ]


def to_json(run: RunFolder, own: OwnParts) -> CopiesJson | None:
    """The copies of ``run`` as plain values; None if it is older than their count.

    ``own`` are the figures of its parts.
    """
    found = duplicates.figures_of(run.info)
    if found is None:
        return None
    examples = found.examples
    near_share = near_duplicates.share_of(run.info)
    return {
        "choice": duplicates.choice_of(run.info),
        "documents": found.documents,
        "tokens": found.tokens,
        "texts": found.texts,
        "share": duplicates.duplicate_share(run.info, found),
        "repeated_ids": found.repeated_ids,
        "id_documents": found.id_documents,
        "examples": [{"id": one.id, "n": one.n, "doc": one.doc} for one in examples],
        "near_share": near_share,
        "near_groups": _near_groups(run, own) if near_share else [],
    }


def _near_groups(run: RunFolder, own: OwnParts) -> list[NearGroupJson] | None:
    """The groups of ``run`` with near-copies, most first; None if its documents cannot be read."""
    if grouped_by(run) is None:
        return []
    try:
        parts = own.of(NEAR, "group")
    except (QueryError, StoreError):
        return None
    return [{"group": part.name, "share": part.value} for part in parts if part.value]
