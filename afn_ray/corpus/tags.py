"""Tags of a document's words, from the cells of a labelled corpus or the lines of CoNLL-U."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from afn_ray.classes import RESERVED
from afn_ray.corpus_values import UPOS, XPOS, Span
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
        if not labels:  # an empty list of tags or spans: the document has none
            return text, ()
        if all(isinstance(span, dict | list | tuple) for span in labels):
            return text, _spans(labels, len(text), labels_column)
        places = [match.span() for match in WORD.finditer(text)]
    elif isinstance(text, list | tuple):
        text, places = _joined(text, text_column)
    else:
        raise ValueError(f"{text_column} is {_kind(text)}, expected a string or a list of words")
    if len(labels) != len(places):
        raise ValueError(
            f"{labels_column} has {count(len(labels), 'tag')}, expected {len(places)}: one for "
            "each word"
        )
    names = [_tag(value, f"{labels_column}: tag {i}") for i, value in enumerate(labels)]
    spans = []
    for (start, end), name in zip(places, names, strict=True):
        if name and start < end:
            spans.append(Span(start, end, name))
    return text, tuple(spans)


def _joined(words: Sequence[object], column: str) -> tuple[str, list[tuple[int, int]]]:
    """``words`` joined by a space, and the place of each. ``column`` names them in errors."""
    texts: list[str] = []
    places: list[tuple[int, int]] = []
    at = 0
    for i, word in enumerate(words):
        if not isinstance(word, str):
            raise ValueError(f"{column}: word {i} is {_kind(word)}, expected a string")
        texts.append(word)
        places.append((at, at + len(word)))
        at += len(word) + 1
    return " ".join(texts), places


def from_conllu(
    sentences: Iterable[Sequence[tuple[int, str]]], labels: str
) -> tuple[str, tuple[Span, ...], str]:
    """Text, tags and id of a document, from the numbered lines of its sentences.

    The id is empty if there is none. The text consists of the forms, each followed by a space
    unless ``SpaceAfter=No`` is set. A multiword token (1-2) has the tags of its words, joined by +.
    Empty nodes (1.1) are left out. Raises ``ValueError`` for a line that is not CoNLL-U or is out
    of order.
    """
    tokens: list[_ConlluToken] = []
    comments: dict[str, str] = {}
    for nth, sentence in enumerate(sentences):
        if not nth:
            comments = _comments(line for _, line in sentence)
        tokens += _tokens_of(sentence, labels)
    spans: list[Span] = []
    pieces: list[str] = []
    at = 0
    for token in tokens:
        parts = [tag for tag in token.tags if tag != "_"]
        if name := _tag("+".join(parts), f"the tag of {token.form[:20]!r}"):
            spans.append(Span(at, at + len(token.form), name))
        pieces.append(token.form + " " * token.space_after)
        at += len(pieces[-1])
    text = "".join(pieces).removesuffix(" ")
    doc_id = comments.get("newdoc id", "" if "newdoc" in comments else comments.get("sent_id", ""))
    return text, tuple(spans), doc_id


class _ConlluToken(NamedTuple):
    """A word or a multiword token of CoNLL-U, as it stands in the text."""

    form: str
    space_after: bool
    tags: list[str]
    """The tags of its words."""


def _comments(lines: Iterable[str]) -> dict[str, str]:
    """Keys and values of the comments in ``lines``; of a repeated key, the first value."""
    comments: dict[str, str] = {}
    for line in lines:
        if line.startswith("#"):
            key, _, value = line[1:].partition("=")
            comments.setdefault(key.strip(), value.strip())
    return comments


def _tokens_of(sentence: Sequence[tuple[int, str]], labels: str) -> list[_ConlluToken]:
    """The tokens in the numbered lines of a sentence."""
    tokens: list[_ConlluToken] = []
    last = until = 0  # number of the last word, and of the last word of its multiword token
    for number, line in sentence:
        if line.startswith("#"):
            continue
        cells = line.split("\t")
        if len(cells) != NUM_COLUMNS:
            raise ValueError(f"line {number} has {len(cells)} columns, expected {NUM_COLUMNS}")
        if EMPTY_NODE.fullmatch(cells[0]):
            continue
        found = WORD_ID.fullmatch(cells[0])
        in_order = found is not None and int(found[1]) == last + 1
        if found is None or not in_order or (found[2] and not until <= last < int(found[2])):
            raise ValueError(f"line {number} is word {cells[0][:20]!r}, expected {last + 1}")
        tags = []
        if found[2]:
            until = int(found[2])
        else:
            last += 1
            tags.append(cells[COLUMN[labels]])
            if last <= until:
                tokens[-1].tags.extend(tags)
                continue
        if not cells[1].strip():
            raise ValueError(f"line {number} has no form")
        tokens.append(_ConlluToken(cells[1], "SpaceAfter=No" not in cells[9].split("|"), tags))
    if last < until:
        raise ValueError(
            f"line {sentence[-1][0]} ends the sentence at word {last}, expected {until}"
        )
    return tokens


def begins_document(line: str) -> bool:
    """True if ``line`` of CoNLL-U is the comment that begins a document of several sentences."""
    if not line.startswith("#"):
        return False
    key, _, _ = line[1:].partition("=")
    return key.strip() in ("newdoc", "newdoc id")


def _spans(values: Sequence[object], num_chars: int, column: str) -> tuple[Span, ...]:
    spans = []
    for i, value in enumerate(values):
        what = f"{column}: span {i}"
        parts = value
        if isinstance(value, dict):
            parts = [value.get(key) for key in ("start", "end", "label")]
        malformed = f"{what} is not start, end (numbers of characters) and label"
        if not isinstance(parts, list | tuple) or len(parts) != 3:
            raise ValueError(malformed)
        start, end, label = parts
        if type(start) is not int or type(end) is not int:
            raise ValueError(malformed)
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
                "overlap, expected one tag for a character"
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
            f"{what} is {name!r}, the name for tokens without a tag; expected another name"
        )
    return name


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
