"""A file of plain text becomes one document."""

from __future__ import annotations

from collections.abc import Iterator

from afn_ray.corpus.documents import (
    Origin,
    decode,
    document,
    problem,
)
from afn_ray.corpus.streams import BOM, Stream
from afn_ray.corpus_values import Document, FileSlice, ReadOptions


def whole_document(stream: Stream, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Yield the one document of ``slice``; quarantined if it exceeds ``max_document_bytes``."""
    limit = options.max_document_bytes
    most_bytes = limit + len(BOM)
    origin = Origin(slice.uri, 0, max(slice.num_bytes, 1))
    data = bytearray()
    for block in stream:
        data += block
        size = f"{slice.size}" if stream.is_plain else f"at least {len(data)}"
        if len(data) > most_bytes or (stream.is_plain and slice.size > most_bytes):
            yield problem(origin, f"document of {size} bytes is over max_document_bytes = {limit}")
            return
    yield document(origin, decode(data.removeprefix(BOM)), None, options)
