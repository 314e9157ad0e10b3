"""Selection: mark the documents of a corpus that a run measures, by their ids and kept columns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from afn_ray import conditions, kept, samples
from afn_ray.corpus_values import Document, ReadOptions
from afn_ray.schema import HASH_ID_CHARS
from afn_ray.store.commits import UNSELECTED

Judge = Callable[[Document], bool | None]
"""True if a document is selected; None: a null makes the condition unknown."""


@dataclass(slots=True)
class Unselected:
    """Documents and bytes that a selection leaves out."""

    documents: int = 0
    num_bytes: int = 0  # of their texts, as UTF-8
    unknown: int = 0  # documents whose condition a null makes unknown

    def add(self, document: Document) -> None:
        """Add ``document``, which is not selected."""
        self.documents += 1
        self.num_bytes += document.lost_bytes or len(document.text.encode())
        self.unknown += document.selected is None

    def counts(self) -> dict[str, int]:
        """The counts of a commit, as in ``commits.UNSELECTED``."""
        return dict(zip(UNSELECTED, (self.documents, self.num_bytes, self.unknown), strict=True))


def mark(documents: Iterable[Document], options: ReadOptions) -> Iterator[Document]:
    """``documents``, with those marked that ``options`` do not select.

    What was not read is lost, and stays: a row that cannot be parsed meets every condition, and
    what stands for an unknown number of documents is in every sample.
    """
    if not options.selects:
        yield from documents
        return
    judges = _judges(options)
    for document in documents:
        found: bool | None = True
        for judge in judges:
            if found:
                found = judge(document)
        yield document if found else replace(document, selected=found)


def selected(documents: Iterable[Document], unselected: Unselected) -> Iterator[Document]:
    """Those of ``documents`` that are selected; the others are added to ``unselected``."""
    for document in documents:
        if document.selected:
            yield document
            continue
        unselected.add(document)


class Beginning(NamedTuple):
    """The first documents of a slice."""

    documents: int  # read, up to the last one selected, or all of the slice
    selected: int
    following: Document | None  # the next one; None: the slice has no more


def first_of(documents: Iterable[Document], limit: int) -> Beginning:
    """The first ``limit`` of marked ``documents`` that are selected."""
    found = num_selected = 0
    each = iter(documents)
    for document in each:
        found += 1
        num_selected += bool(document.selected)
        if num_selected == limit:
            return Beginning(found, num_selected, next(each, None))
    return Beginning(found, num_selected, None)


def id_of(document: Document) -> str:
    """The id of ``document`` as SQL shows it; of one without id and text, its place."""
    if document.doc_id is not None:
        return document.doc_id
    if document.problem is not None:
        return place_of(document.source, document.offset)
    return hashlib.sha256(document.text.encode()).hexdigest()[:HASH_ID_CHARS]


def place_of(source: str, offset: object) -> str:
    """Stand-in for the id of a document without an id and without a text."""
    return f"{source}:{offset}"


def _judges(options: ReadOptions) -> list[Judge]:
    """The sample before the condition, so that what it leaves out is never unknown."""
    judges: list[Judge] = []
    if options.sample:
        share = samples.share_of(options.sample)

        def is_drawn(document: Document) -> bool:
            is_one = document.problem is None or document.lost_documents == 1
            return not is_one or samples.is_drawn(id_of(document), share)

        judges.append(is_drawn)
    if options.where:
        columns = kept.parse(options.keep)
        condition = conditions.parse(options.where, columns)
        nulls = (None,) * len(columns)

        def holds(document: Document) -> bool | None:
            if document.problem is not None and not document.kept:
                return True
            return condition.holds(document.kept or nulls)

        judges.append(holds)
    return judges
