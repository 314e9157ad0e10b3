"""Encode texts as tokens: ids with character offsets, word starts and surfaces."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from afn_ray.errors import ModelError
from afn_ray.schema import REPLACED, SPECIAL, WORD_START, Span
from afn_ray.tokens.culprits import find_culprits, first_line, is_of_input

Int32 = npt.NDArray[np.int32]
MOST_IDS = 1 << 31
"""Number of token ids that the tables can hold."""
NAME_CHARS = 40
"""Longest token in a message, in characters."""


@dataclass(frozen=True, slots=True)
class Template:
    """Tokens that the tokenizer adds to every text: [CLS] and [SEP], a BOS, or none."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def num_special(self) -> int:
        return len(self.prefix) + len(self.suffix)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of several documents, one after the other, each within its template.

    Document i has the rows ``bounds[i]`` to ``bounds[i + 1]``. It has none when its text has no
    token or cannot be encoded; ``problems`` then holds the reason.
    """

    bounds: npt.NDArray[np.int64]  # [n_docs + 1]
    token_ids: Int32  # [n_tokens], as all arrays below
    start: Int32  # character offsets into the document's text; special tokens have no width
    end: Int32
    flags: npt.NDArray[np.uint8]
    word_end: Int32  # where the token starts a word: character offset of the word's end; else 0
    problems: dict[int, str] = field(default_factory=dict)  # document -> why it has no rows

    @property
    def docs(self) -> Int32:
        """Document of every row, counted from 0: [n_tokens]."""
        return np.repeat(np.arange(len(self.bounds) - 1, dtype=np.int32), np.diff(self.bounds))

    @property
    def positions(self) -> Int32:
        """Position of every row in its document: [n_tokens]."""
        return (np.arange(len(self.token_ids)) - self.bounds[self.docs]).astype(np.int32)


UNIGRAM_UNKNOWN = "<unk>"
"""Unknown token of Unigram models, which do not name it: SentencePiece's."""


class TextEncoder:
    """A fast tokenizer that encodes untrusted texts of any length, without truncation or padding.

    ``num_embeddings``: number of token ids that the model has a vector for; None: unknown. Raises
    ``ModelError`` for a tokenizer that cannot encode "a", or whose template has ids that the model
    does not have.
    """

    def __init__(self, tokenizer: Tokenizer, num_embeddings: int | None = None) -> None:
        tokenizer.no_truncation()  # tokenizer.json often sets truncation and padding
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text, not a control token
        self._tokenizer = tokenizer
        self._num_ids = MOST_IDS if num_embeddings is None else num_embeddings
        self.template = self._find_template()
        if beyond := [
            i for i in (*self.template.prefix, *self.template.suffix) if i >= self._num_ids
        ]:
            raise ModelError(
                f"the tokenizer puts {self._name(beyond[0])} around every text, and {self._beyond}"
            )

    def _find_template(self) -> Template:
        """Template of the tokenizer, from its encoding of "a"."""
        try:
            encoding = self._tokenizer.encode("a", add_special_tokens=True)
        except BaseException as error:
            if not is_of_input(error):
                raise
            raise ModelError(f"the tokenizer cannot encode 'a': {first_line(error)}") from error
        text = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
        if not text or text != list(range(text[0], text[-1] + 1)):
            raise ModelError(
                f"the tokenizer makes {encoding.tokens} of 'a': no text between its special tokens"
            )
        return Template(tuple(encoding.ids[: text[0]]), tuple(encoding.ids[text[-1] + 1 :]))

    def texts(self) -> tuple[list[str], list[str]]:
        """Every token type by id: in the tokenizer's notation, and as plain text."""
        size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        pieces = [self._tokenizer.id_to_token(i) or "" for i in range(size)]
        continuing = getattr(self._tokenizer.model, "continuing_subword_prefix", None) or ""
        readable = []
        for i, piece in enumerate(pieces):
            text = self._tokenizer.decode([i], skip_special_tokens=False) or piece
            if continuing and text.startswith(continuing) and text != continuing:
                text = text.removeprefix(continuing)
            readable.append(text.strip() or text)
        return pieces, readable

    @property
    def unknown(self) -> int | None:
        """Id of the token for unknown text; None where there is none, as in byte vocabularies."""
        model = self._tokenizer.model
        token = (
            UNIGRAM_UNKNOWN
            if type(model).__name__ == "Unigram"
            else getattr(model, "unk_token", None)
        )
        return None if token is None else self._tokenizer.token_to_id(token)

    def count(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Number of tokens of each of ``texts``, the template included."""
        return np.diff(self.encode(texts).bounds)

    def encode(
        self,
        texts: Sequence[str],
        replaced: Sequence[bool] | None = None,
        refused: Mapping[int, str] | None = None,
    ) -> Encoded:
        """Tokens of ``texts``; ``replaced`` marks those in which U+FFFD stands for invalid UTF-8.

        A text has no rows, as if it were empty, and a reason in ``problems`` where the tokenizer
        fails, or where a token has no vector in the model or offsets outside the text. ``refused``:
        texts with known problems, and why. Raises ``ModelError`` where the tokenizer fails for
        every text.
        """
        problems = dict(refused or {})
        encodings = self._encodings(texts, problems)
        kept = [i for i in range(len(texts)) if i not in problems]
        lengths = np.zeros(len(texts), np.int64)
        lengths[kept] = [len(e) for e in encodings]
        before, after = len(self.template.prefix), len(self.template.suffix)
        bounds = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(np.where(lengths > 0, lengths + before + after, 0), out=bounds[1:])
        token_ids, start, end, word_end = (np.zeros(bounds[-1], np.int32) for _ in range(4))
        flags = np.full(bounds[-1], SPECIAL, np.uint8)

        # All text tokens of all texts at once; ``rows`` are their rows, between the templates.
        n = int(lengths.sum())
        first = np.cumsum(lengths) - lengths  # index of each text's first text token
        text_of = np.repeat(np.arange(len(texts)), lengths)
        rows = np.arange(n) + (bounds[:-1] + before - first)[text_of]
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, n)
        spans = np.fromiter(
            chain.from_iterable(chain.from_iterable(e.offsets for e in encodings)), np.int64, 2 * n
        )
        if found := self._find_wrong(texts, text_of, ids, spans):
            return self.encode(texts, replaced, problems | found)
        token_ids[rows], inside = ids, spans.astype(np.int32)
        start[rows], end[rows] = inside[::2], inside[1::2]
        words = _word_ids(encodings, n)
        characters, origin = all_characters(texts)
        at = origin[text_of]  # start of each token's text in ``characters``
        starts = _word_starts(text_of, words, inside[::2], inside[1::2], characters, at)
        flags[rows] = starts * np.uint8(WORD_START)
        heads = np.flatnonzero(starts)
        tails = np.append(heads, n)[1:] - 1  # the last token of each word
        word_end[rows[heads]] = _with_marks(
            tails, text_of, inside[::2], inside[1::2], characters, at, origin
        )
        for i in np.flatnonzero(replaced if replaced is not None else []).tolist():
            for row in range(bounds[i] + before, bounds[i] + before + lengths[i]):
                if "\ufffd" in texts[i][start[row] : end[row]]:
                    flags[row] |= REPLACED
        there = np.flatnonzero(lengths)
        last = bounds[there + 1] - after  # the first token of each suffix
        for nth, token in enumerate(self.template.prefix):
            token_ids[bounds[there] + nth] = token
        for nth, token in enumerate(self.template.suffix):
            token_ids[last + nth] = token
            start[last + nth] = end[last + nth] = end[last - 1]
        return Encoded(bounds, token_ids, start, end, flags, word_end, problems)

    def _encodings(self, texts: Sequence[str], problems: dict[int, str]) -> list[Encoding]:
        """Encodings of the ``texts`` without a problem; adds texts that fail to ``problems``."""

        def encode(some: Sequence[int]) -> list[Encoding]:
            return self._tokenizer.encode_batch([texts[i] for i in some], add_special_tokens=False)

        kept = [i for i in range(len(texts)) if i not in problems]
        try:
            return encode(kept)
        except BaseException as error:
            if not is_of_input(error):
                raise
            found = find_culprits(encode, kept, is_of_input)
        self._find_template()  # raises where the tokenizer itself is broken
        problems |= {
            i: f"the tokenizer cannot take it: {first_line(why)}" for i, why in found.items()
        }
        return encode([i for i in kept if i not in problems])

    def _find_wrong(
        self,
        texts: Sequence[str],
        text_of: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        spans: npt.NDArray[np.int64],
    ) -> dict[int, str]:
        """Texts with a token that has no vector or has offsets outside the text; and why."""
        start, end = spans[::2], spans[1::2]
        beyond = ids >= self._num_ids
        outside = (
            (start < 0)
            | (end < start)
            | (end > np.array([len(t) for t in texts], np.int64)[text_of])
        )
        problems: dict[int, str] = {}
        for at in np.flatnonzero(beyond | outside).tolist():
            text = int(text_of[at])
            why = f"{self._name(int(ids[at]))}: {self._beyond}"
            if not beyond[at]:
                why = (
                    f"the tokenizer gives characters {start[at]} to {end[at]} of {len(texts[text])}"
                )
            problems.setdefault(text, why)
        return problems

    def _name(self, token_id: int) -> str:
        """A token for messages: its id and its text."""
        return (
            f"token id {token_id} ({(self._tokenizer.id_to_token(token_id) or '')[:NAME_CHARS]!r})"
        )

    @property
    def _beyond(self) -> str:
        """Range of the model's token ids, for messages."""
        return f"the model has embeddings for the ids 0 to {self._num_ids - 1}"


def _word_ids(encodings: Sequence[Encoding], num_tokens: int) -> Int32:
    """The pre-tokenizer's number of each token's word: [num_tokens]; -1 for a token without one."""
    try:
        return np.fromiter(chain.from_iterable(e.word_ids for e in encodings), np.int32, num_tokens)
    except TypeError:  # None is no number
        every = chain.from_iterable(e.word_ids for e in encodings)
        return np.fromiter((-1 if w is None else w for w in every), np.int32, num_tokens)


def all_characters(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Code points of all ``texts``, and the index at which each text begins.

    The last index is the end of the last text.
    """
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    return characters, np.cumsum([0, *map(len, texts)], dtype=np.int64)


def _word_starts(
    text_of: npt.NDArray[np.int64],
    words: Int32,
    start: Int32,
    end: Int32,
    characters: npt.NDArray[np.uint32],
    origin: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Which text tokens start a word: [n_text_tokens].

    A word starts at the first token of a text, at a new word of the pre-tokenizer, and at a token
    with white space before or at its first character. The last rule is for tokenizers without a
    pre-tokenizer, for which a whole text is one word. A single space that is a token of its own, as
    before a rare word or a number, belongs to the word after it. No word starts within a character,
    even where a normalizer makes several words of one.
    """
    new_text = np.diff(text_of, prepend=-1) != 0
    new_word = np.diff(words, prepend=-2) != 0
    starts: npt.NDArray[np.bool_] = new_text.copy()
    rest = np.flatnonzero(~new_text)
    at: npt.NDArray[np.int64] = origin[rest] + start[rest].astype(np.int64)
    new_character = start[rest] >= end[rest - 1]  # else another piece of the same character
    inside = (start[rest] < end[rest]) & is_space(characters, at)
    behind = (start[rest] > 0) & is_space(characters, at - 1)
    width = end[rest - 1] - start[rest - 1]  # 0 where the tokenizer leaves spaces out of offsets
    lone_space = (width <= 1) & (end[rest - 1] == start[rest]) & behind
    lone_space[lone_space] = (width[lone_space] == 0) | (characters[at[lone_space] - 1] == ord(" "))
    starts[rest] = new_character & (inside | ((new_word[rest] | behind) & ~lone_space))
    _join_at_marks(starts, new_text, start, end, characters, origin + start)
    return starts


def _join_at_marks(
    starts: npt.NDArray[np.bool_],
    new_text: npt.NDArray[np.bool_],
    start: Int32,
    end: Int32,
    characters: npt.NDArray[np.uint32],
    at_start: npt.NDArray[np.int64],
) -> None:
    """Join words that a pre-tokenizer like GPT-2's has split at accents, vowel signs and points.

    These marks are not letters to it: it ends a word before each mark, and makes another word of
    the mark and the punctuation after it. ``starts`` is changed in place.
    """
    if not len(characters) or characters.max() < 0x300:  # no marks
        return
    heads = np.flatnonzero(starts)
    glued = (
        _MARK[_low(characters, at_start[heads])]
        & ~new_text[heads]
        & (start[heads] == end[heads - 1])
    )
    glued &= _LETTER[_low(characters, at_start[heads] - 1)]
    if not glued.any():
        return
    head_of = np.cumsum(starts) - 1
    starts[heads[glued]] = False
    apart = np.flatnonzero(
        glued[head_of] & (start >= np.roll(end, 1)) & ~_LETTER[_low(characters, at_start)]
    )
    of_heads, first = np.unique(head_of[apart], return_index=True)
    starts[apart[first]] = True
    glued[of_heads] = False
    after = heads[1:][glued[:-1]]
    goes_on = (
        ~new_text[after]
        & (start[after] == end[after - 1])
        & _LETTER[_low(characters, at_start[after])]
    )
    starts[after[goes_on]] = False


def _with_marks(
    tails: npt.NDArray[np.int64],
    text_of: npt.NDArray[np.int64],
    start: Int32,
    end: Int32,
    characters: npt.NDArray[np.uint32],
    at: npt.NDArray[np.int64],
    origin: npt.NDArray[np.int64],
) -> Int32:
    """Ends of the words whose last tokens are ``tails``, the marks after them included.

    No token covers these marks where a tokenizer drops accents.
    """
    ends = end[tails]
    following = np.minimum(tails + 1, len(text_of) - 1)
    text_end = np.diff(origin)[text_of[tails]]
    limits = np.where(
        (following > tails) & (text_of[following] == text_of[tails]), start[following], text_end
    )
    open_ended = np.flatnonzero(ends < limits)
    for i in open_ended[characters[at[tails[open_ended]] + ends[open_ended]] >= 0x300].tolist():
        first = int(at[tails[i]])
        while (
            ends[i] < limits[i] and unicodedata.category(chr(characters[first + ends[i]]))[0] == "M"
        ):
            ends[i] += 1
    return ends


def _low(characters: npt.NDArray[np.uint32], at: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
    """Characters ``at``; those above ``_CATEGORIES`` become its last one, which is unassigned."""
    if not len(characters):
        return np.zeros(len(at), np.uint32)
    return np.minimum(characters[np.clip(at, 0, len(characters) - 1)], len(_CATEGORIES) - 1)


# CJK and emoji, which need no joining, start at U+2E80.
_CATEGORIES = [unicodedata.category(chr(c))[0] for c in range(0x2E80)]
"""Major category of each character below U+2E80."""
_MARK = np.array([c == "M" for c in _CATEGORIES])
_LETTER = np.array([c in "LM" for c in _CATEGORIES])
_IS_SPACE = np.array([chr(c).isspace() for c in range(0x3002)])
"""Whether each character up to U+3001 is white space; none above is."""


def is_space(
    characters: npt.NDArray[np.uint32], at: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Whether the characters ``at`` are white space, bool [n_at].

    Indices outside ``characters`` mean its first or last one.
    """
    if not len(characters):
        return np.zeros(len(at), np.bool_)
    here = characters[np.clip(at, 0, len(characters) - 1)]
    return _IS_SPACE[np.minimum(here, len(_IS_SPACE) - 1)]


def find_tags(
    encoded: Encoded, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[str | None]:
    """Per row, the tag of the span that holds the token's first character; else None.

    ``spans`` are those of each document. White space before the text is skipped. Where the token
    starts a word, it is skipped up to the word's end: the first piece of a rare word may be a space
    alone.
    """
    result: list[str | None] = [None] * len(encoded.token_ids)
    starts, stops = encoded.start.tolist(), np.maximum(encoded.end, encoded.word_end).tolist()
    special = (encoded.flags & SPECIAL).tolist()
    for (first, last), text, tagged in zip(
        pairwise(encoded.bounds.tolist()), texts, spans, strict=True
    ):
        begins = [span.start for span in tagged]
        for row in range(first, last) if tagged else ():
            at, stop = starts[row], stops[row]
            while at < stop and text[at].isspace():
                at += 1
            nth = bisect.bisect_right(begins, at) - 1
            if nth >= 0 and at < min(stop, tagged[nth].end) and not special[row]:
                result[row] = tagged[nth].tag
    return result
