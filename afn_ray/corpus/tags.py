"""Tags of a document's words, from the cells of a labelled corpus or the lines of CoNLL-U."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from afn_ray.schema import RESERVED, UPOS, XPOS, Span
from afn_ray.text import count

MAX_TAG_CHARS = 100
"""Longest tag, in characters."""
NUM_COLUMNS = 10
"""Columns of a CoNLL-U line."""
COLUMN = {UPOS: 3, XPOS: 4}
"""Indices of the tag columns in a CoNLL-U line."""
WORD = re.compile(r"\S+")
WORD_ID = re.compile("([1-9][0-9]{0,8})(?:-([1-9][0-9]{0,8}))?")
EMPTY_NODE = re.compile(r"[0-9]+\.[0-9]+")

Tagged = tuple[str, tuple[Span, ...]]
"""A text and its tags."""


def from_cells(text: object, labels: object, text_column: str, labels_column: str) -> Tagged:
    """Text and tags of a document, from the two cells that hold them.

    ``labels`` has one tag per word, or spans of characters: each an object or a list of start, end
    and label. If ``text`` is a list, its items are the words, and they are joined by a space; else
    words are separated by white space. A null or empty tag means no tag. Raises ``ValueError`` for
    anything else, with got against expected.
    """
    if not isinstance(labels, list | tuple):
        raise ValueError(f"{labels_column} is {_kind(labels)}, expected a list of tags or of spans")
    if isinstance(text, str):
        if labels and all(isinstance(span, dict | list | tuple) for span in labels):
            return text, _spans(labels, len(text), labels_column)
        places = [match.span() for match in WORD.finditer(text)]
        if not labels:  # an empty list of tags or spans: the document has none
            return text, ()
    elif isinstance(text, list | tuple):
        if (
            bad := next((i for i, word in enumerate(text) if not isinstance(word, str)), None)
        ) is not None:
            raise ValueError(f"{text_column}: word {bad} is {_kind(text[bad])}, expected a string")
        places, at = [], 0
        for word in text:
            places.append((at, at + len(word)))
            at += len(word) + 1
        text = " ".join(text)
    else:
        raise ValueError(f"{text_column} is {_kind(text)}, expected a string or a list of words")
    if len(labels) != len(places):
        raise ValueError(
            f"{labels_column} has {count(len(labels), 'tag')}, expected {len(places)}: one for "
            "each word"
        )
    names = [_tag(value, f"{labels_column}: tag {i}") for i, value in enumerate(labels)]
    return text, tuple(
        Span(start, end, name)
        for (start, end), name in zip(places, names, strict=True)
        if name and start < end
    )


def from_conllu(
    sentences: Iterable[Sequence[tuple[int, str]]], labels: str
) -> tuple[str, tuple[Span, ...], str]:
    """Text, tags and id of a document, from the numbered lines of its sentences.

    The id is empty if there is none. The text consists of the forms, each followed by a space
    unless ``SpaceAfter=No`` is set. A multiword token (1-2) has the tags of its words, joined by +.
    Empty nodes (1.1) are left out. Raises ``ValueError`` for a line that is not CoNLL-U or is out
    of order.
    """
    tokens: list[tuple[str, bool, list[str]]] = []  # form, whether a space follows, tags
    comments: dict[str, str] = {}
    for nth, sentence in enumerate(sentences):
        last = until = 0  # number of the last word, and of the last word of its multiword token
        for number, line in sentence:
            if line.startswith("#"):
                if not nth:
                    key, _, value = line[1:].partition("=")
                    comments.setdefault(key.strip(), value.strip())
                continue
            cells = line.split("\t")
            if len(cells) != NUM_COLUMNS:
                raise ValueError(f"line {number} has {len(cells)} columns, expected {NUM_COLUMNS}")
            if EMPTY_NODE.fullmatch(cells[0]):
                continue
            found = WORD_ID.fullmatch(cells[0])
            if (
                found is None
                or int(found[1]) != last + 1
                or (found[2] and not until <= last < int(found[2]))
            ):
                raise ValueError(f"line {number} is word {cells[0][:20]!r}, expected {last + 1}")
            if found[2]:
                until = int(found[2])
            else:
                last += 1
                if last <= until:
                    tokens[-1][2].append(cells[COLUMN[labels]])
                    continue
            if not cells[1].strip():
                raise ValueError(f"line {number} has no form")
            tag = [] if found[2] else [cells[COLUMN[labels]]]
            tokens.append((cells[1], "SpaceAfter=No" not in cells[9].split("|"), tag))
        if last < until:
            raise ValueError(
                f"line {sentence[-1][0]} ends the sentence at word {last}, expected {until}"
            )
    spans, at = [], 0
    for form, space, parts in tokens:
        if name := _tag(
            "+".join(part for part in parts if part != "_"), f"the tag of {form[:20]!r}"
        ):
            spans.append(Span(at, at + len(form), name))
        at += len(form) + space
    text = "".join(form + " " * space for form, space, _ in tokens).removesuffix(" ")
    doc_id = comments.get("newdoc id", "" if "newdoc" in comments else comments.get("sent_id", ""))
    return text, tuple(spans), doc_id


def begins_document(line: str) -> bool:
    """Whether ``line`` of CoNLL-U is the comment that begins a document of several sentences."""
    return line.startswith("#") and line[1:].split("=")[0].strip() in ("newdoc", "newdoc id")


def _spans(values: Sequence[object], num_chars: int, column: str) -> tuple[Span, ...]:
    spans = []
    for i, value in enumerate(values):
        what = f"{column}: span {i}"
        parts = (
            [value.get(key) for key in ("start", "end", "label")]
            if isinstance(value, dict)
            else value
        )
        if (
            not isinstance(parts, list | tuple)
            or len(parts) != 3
            or not all(type(at) is int for at in parts[:2])
        ):
            raise ValueError(f"{what} is not start, end (numbers of characters) and label")
        start, end, label = parts
        if not 0 <= start <= end <= num_chars:
            raise ValueError(
                f"{what} is {start} to {end}, expected 0 to {num_chars}, the characters of the text"
            )
        if (name := _tag(label, what)) and start < end:
            spans.append(Span(start, end, name))
    spans.sort()
    for one, other in pairwise(spans):
        if other.start < one.end:
            raise ValueError(
                f"{column}: spans {one.start} to {one.end} and {other.start} to {other.end} "
                "overlap, expected one tag "
                "for a character"
            )
    return tuple(spans)


def _tag(value: object, what: str) -> str:
    """``value`` as a tag; empty if there is none."""
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"{what} is {_kind(value)}, expected a string or a whole number")
    name = str(value)
    if len(name) > MAX_TAG_CHARS:
        raise ValueError(f"{what} has {len(name)} characters, expected at most {MAX_TAG_CHARS}")
    if not name.isprintable():
        raise ValueError(f"{what} is {name!r}, expected characters that can be printed")
    if name in RESERVED:
        raise ValueError(
            f"{what} is {name!r}, which is what tokens without a tag are called; expected another "
            "name"
        )
    return name


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
