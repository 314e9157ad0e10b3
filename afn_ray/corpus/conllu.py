"""CoNLL-U: tagged sentences become documents with their tags."""

from __future__ import annotations

from collections.abc import Iterator

from afn_ray.corpus import streams, tags
from afn_ray.corpus.documents import (
    Origin,
    clean_id,
    decode,
    document,
    origin_in,
    problem,
)
from afn_ray.corpus.streams import Line, Stream
from afn_ray.corpus_values import Document, FileSlice, ReadOptions

CONLLU_LINES = 1 << 20
"""Most lines of one document. As objects, one-letter lines take 200 times their bytes."""


def conllu_documents(stream: Stream, slice: FileSlice, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of ``slice``.

    A ``newdoc`` comment begins a document. Before the first one, each sentence is a document.
    """
    limit = streams.line_limit(options)
    document: list[list[Line]] = []
    size, num_lines, together = 0, 0, False
    for sentence in _sentences(streams.lines(stream, limit), limit):
        begins = any(map(_begins_document, sentence))
        if not begins and all(map(_is_comment, sentence)):
            continue
        if document and (begins or not together):
            stream.done = sentence[0].offset  # the new sentence is read, but not yet yielded
            yield _conllu_document(
                origin_in(stream, slice, document[0][0], size), document, options
            )
            document, size, num_lines = [], 0, 0
        together = together or begins
        document.append(sentence)
        size += sum(line.length + 1 for line in sentence)
        num_lines += len(sentence)
        if size > limit or num_lines > CONLLU_LINES:
            document = [[document[0][0]._replace(data=None)]]
    if document:
        yield _conllu_document(origin_in(stream, slice, document[0][0], size), document, options)


def _sentences(lines: Iterator[Line], limit: int) -> Iterator[list[Line]]:
    """Yield the lines of each sentence; sentences are separated by blank lines.

    A sentence over ``limit`` bytes or ``CONLLU_LINES`` lines becomes its ``newdoc`` line, if it has
    one, and a line without data that stands for the rest.
    """
    sentence: list[Line] = []
    size = 0
    for line in lines:
        if line.blank:
            if sentence:
                yield sentence
            sentence, size = [], 0
            continue
        sentence.append(line)
        size += line.length + 1
        if size > limit or len(sentence) > CONLLU_LINES:
            kept = [line for line in sentence if _begins_document(line)][:1]
            rest = size - sum(line.length + 1 for line in kept)
            sentence = [*kept, sentence[0]._replace(data=None, length=rest - 1)]
    if sentence:
        yield sentence


def _is_comment(line: Line) -> bool:
    return line.data is not None and line.data.startswith(b"#")


def _begins_document(line: Line) -> bool:
    return _is_comment(line) and tags.begins_document(decode(line.data or b""))


def _numbered(sentence: list[Line]) -> list[tuple[int, str]]:
    """The lines of ``sentence``, each with its number from 1 on."""
    numbered = []
    for line in sentence:
        text = decode(line.data or b"")
        numbered.append((line.number + 1, text.removesuffix("\r")))
    return numbered


def _conllu_document(origin: Origin, sentences: list[list[Line]], options: ReadOptions) -> Document:
    labels = options.labels_in("conllu")
    assert labels is not None
    if any(line.data is None for sentence in sentences for line in sentence):
        limit = streams.line_limit(options)
        return problem(
            origin,
            f"document of CoNLL-U, or a line of it, is over the limit of {limit} bytes or "
            f"{CONLLU_LINES} lines",
        )
    try:
        text, spans, doc_id = tags.from_conllu(map(_numbered, sentences), labels)
        doc_id = clean_id(doc_id)
    except ValueError as error:
        return problem(origin, f"not CoNLL-U: {error}")
    return document(origin, text, doc_id or None, options, spans)
