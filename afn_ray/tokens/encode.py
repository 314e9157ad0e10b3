"""Encode texts as tokens: ids with character offsets, word starts and surfaces."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from afn_ray.corpus_values import Span
from afn_ray.errors import ModelError
from afn_ray.schema import REPLACED, SPECIAL, WORD_START
from afn_ray.tokens.characters import (
    FIRST_MARK,
    Bools,
    Characters,
    Integers,
    Ints,
    all_characters,
    is_letter,
    is_mark,
    is_space,
    ranges,
)
from afn_ray.tokens.culprits import find_culprits, first_line, is_of_input
from afn_ray.tokens.segments import Segments, TextTokens, find_cut

Int32 = npt.NDArray[np.int32]
MOST_IDS = 1 << 31
"""Number of token ids that the tables can hold."""
NAME_CHARS = 40
"""Longest token in a message, in characters."""
MOST_DISTINCT = 0.5
"""Largest share of distinct segments for which texts are encoded by segments."""


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
    same: Ints | None = None  # [n_text_tokens], equal numbers: equal words, at the same place

    @property
    def docs(self) -> Int32:
        """Document of every row, counted from 0: [n_tokens]."""
        num_documents = len(self.bounds) - 1
        documents = np.arange(num_documents, dtype=np.int32)
        return np.repeat(documents, np.diff(self.bounds))

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
        # A setting cannot be written while another thread encodes; a model's tokenizer is shared.
        if tokenizer.truncation is not None:  # tokenizer.json often sets it, and padding
            tokenizer.no_truncation()
        if tokenizer.padding is not None:
            tokenizer.no_padding()
        if not tokenizer.encode_special_tokens:
            tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text, no control token
        self._tokenizer = tokenizer
        self._cut = find_cut(tokenizer)
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
        first = text[0]
        last = text[-1]
        return Template(
            prefix=tuple(encoding.ids[:first]),
            suffix=tuple(encoding.ids[last + 1 :]),
        )

    def texts(self) -> tuple[list[str], list[str]]:
        """Every token type by id: in the tokenizer's notation, and as plain text."""
        pieces, readable = _texts(self._tokenizer)
        return list(pieces), list(readable)

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
        given = ["" if i in problems else text for i, text in enumerate(texts)]
        characters, origin = all_characters(given)
        tokens = self._by_segments(given, characters, origin)
        if tokens is None:
            tokens = self._by_texts(given, problems)
            if found := self._find_wrong(given, tokens):
                return self.encode(texts, replaced, problems | found)
        flags, word_end = _words(tokens, characters, origin)
        if replaced is not None and any(replaced):
            covers = _covers(tokens, ord("\ufffd"), characters, origin)
            flags[covers & np.repeat(replaced, tokens.lengths)] |= REPLACED
        return self._in_templates(tokens, flags, word_end, problems)

    def _in_templates(
        self,
        tokens: TextTokens,
        flags: npt.NDArray[np.uint8],
        word_end: Int32,
        problems: dict[int, str],
    ) -> Encoded:
        """Rows of ``tokens``, each text within its template;
        ``flags`` and ``word_end`` are theirs.
        """
        lengths, template = tokens.lengths, self.template
        before = len(template.prefix)
        after = len(template.suffix)
        bounds = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(np.where(lengths > 0, lengths + before + after, 0), out=bounds[1:])
        rows = ranges(bounds[:-1] + before, lengths)
        token_ids, start, end, word_ends = (np.zeros(bounds[-1], np.int32) for _ in range(4))
        every_flag = np.full(bounds[-1], SPECIAL, np.uint8)
        token_ids[rows] = tokens.ids
        start[rows] = tokens.start
        end[rows] = tokens.end
        every_flag[rows], word_ends[rows] = flags, word_end
        there = np.flatnonzero(lengths)
        last = bounds[there + 1] - after  # the first token of each suffix
        for nth, token in enumerate(template.prefix):
            token_ids[bounds[there] + nth] = token
        for nth, token in enumerate(template.suffix):
            token_ids[last + nth] = token
            start[last + nth] = end[last + nth] = end[last - 1]
        return Encoded(bounds, token_ids, start, end, every_flag, word_ends, problems, tokens.same)

    def _by_segments(
        self, texts: Sequence[str], characters: Characters, origin: Ints
    ) -> TextTokens | None:
        """Tokens of ``texts``, for which each distinct segment is encoded once.

        None where the texts cannot be cut, few segments are the same, or one has a problem.
        """
        if self._cut is None:
            return None
        try:
            segments = Segments.of(texts, characters, origin, self._cut)
            if len(segments.distinct) > MOST_DISTINCT * len(segments.which):
                return None
            tokens = segments.encode(self._batch)
        except BaseException as error:
            if not is_of_input(error):
                raise
            return None
        return None if self._find_wrong(segments.distinct, tokens) else segments.spread(tokens)

    def _by_texts(self, texts: Sequence[str], problems: dict[int, str]) -> TextTokens:
        """Tokens of the ``texts`` without a problem; adds texts that fail to ``problems``."""
        tokens = TextTokens.of(self._encodings(texts, problems))
        lengths = np.zeros(len(texts), np.int64)
        encoded = [i for i in range(len(texts)) if i not in problems]
        lengths[encoded] = tokens.lengths
        return replace(tokens, lengths=lengths)

    def _batch(self, texts: list[str]) -> list[Encoding]:
        """Encodings of ``texts``, without templates."""
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def _encodings(self, texts: Sequence[str], problems: dict[int, str]) -> list[Encoding]:
        """Encodings of the ``texts`` without a problem; adds texts that fail to ``problems``."""

        def encode(some: Sequence[int]) -> list[Encoding]:
            return self._batch([texts[i] for i in some])

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

    def _find_wrong(self, texts: Sequence[str], tokens: TextTokens) -> dict[int, str]:
        """Texts with a token that has no vector or has offsets outside the text; and why."""
        start, end = tokens.start, tokens.end
        num_characters = np.array([len(text) for text in texts], np.int64)
        beyond = tokens.ids >= self._num_ids
        outside = (start < 0) | (end < start) | (end > np.repeat(num_characters, tokens.lengths))
        problems: dict[int, str] = {}
        wrong = np.flatnonzero(beyond | outside)
        of_text = np.searchsorted(np.cumsum(tokens.lengths), wrong, side="right")
        for text, at in zip(of_text.tolist(), wrong.tolist(), strict=True):
            why = f"{self._name(int(tokens.ids[at]))}: {self._beyond}"
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


@lru_cache(1)  # a run asks several times, and one call decodes every token type
def _texts(tokenizer: Tokenizer) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """``TextEncoder.texts`` of ``tokenizer``, which nothing changes afterwards."""
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    pieces = [tokenizer.id_to_token(i) or "" for i in range(size)]
    continuing = getattr(tokenizer.model, "continuing_subword_prefix", None) or ""
    readable = []
    for i, piece in enumerate(pieces):
        text = tokenizer.decode([i], skip_special_tokens=False) or piece
        if continuing and text.startswith(continuing) and text != continuing:
            text = text.removeprefix(continuing)
        readable.append(text.strip() or text)
    return tuple(pieces), tuple(readable)


def _words(
    tokens: TextTokens, characters: Characters, origin: Ints
) -> tuple[npt.NDArray[np.uint8], Int32]:
    """Flags of the tokens that start words, and offsets of the words' ends: [n_tokens] each.

    The offset is 0 for a token that starts no word. ``characters`` and ``origin`` are those of the
    texts.
    """
    lengths = tokens.lengths
    base = np.repeat(origin[:-1], lengths)  # start of each token's text in ``characters``
    new_text = np.zeros(len(base), np.bool_)
    with_tokens = np.flatnonzero(lengths)
    first = (np.cumsum(lengths) - lengths)[with_tokens]  # the first token of each text
    new_text[first] = True
    starts = _word_starts(tokens, new_text, characters, base)
    heads = np.flatnonzero(starts)
    word_end = np.zeros(len(base), np.int32)
    tails = np.append(heads[1:], len(base))[: len(heads)] - 1  # the last token of each word
    word_end[heads] = tokens.end[tails]
    if _has_marks(characters):
        # The next token's start limits a word, or the text's end.
        limits = np.append((base + tokens.start)[1:], 0)
        last_rows = np.append(first[1:], len(base))[: len(first)] - 1
        limits[last_rows] = origin[1:][with_tokens]
        ends = (base + tokens.end)[tails]
        word_end[heads] += _num_marks(ends, limits[tails], characters)
    return starts * np.uint8(WORD_START), word_end


def _word_starts(tokens: TextTokens, new_text: Bools, characters: Characters, base: Ints) -> Bools:
    """Text tokens that start a word: [n_tokens].

    A word starts at the first token of a text, at a new word of the pre-tokenizer, and at a token
    with white space before or at its first character. The last rule is for tokenizers without a
    pre-tokenizer, for which a whole text is one word. A single space that is a token of its own, as
    before a rare word or a number, belongs to the word after it. No word starts within a character,
    even where a normalizer makes several words of one.
    """
    start, end = tokens.start, tokens.end
    at = base + start
    end_before, start_before = _shifted(end), _shifted(start)
    inside = is_space(characters, at) & (start < end)
    behind = is_space(characters, at - 1) & (start > 0)
    width = end_before - start_before  # 0 where the tokenizer leaves spaces out of offsets
    lone_space = np.flatnonzero((width <= 1) & (end_before == start) & behind)
    is_lone = (width[lone_space] == 0) | (characters[at[lone_space] - 1] == ord(" "))
    starts: Bools = tokens.new_word | behind
    starts[lone_space[is_lone]] = False
    starts |= inside
    starts &= start >= end_before  # else another piece of the same character
    starts |= new_text
    if _has_marks(characters):
        _join_at_marks(starts, new_text, tokens, characters, at)
    return starts


def _shifted(values: Integers) -> Integers:
    """Value before each of ``values``; 0 before the first."""
    before = np.zeros_like(values)
    before[1:] = values[:-1]
    return before


def _has_marks(characters: Characters) -> bool:
    """True if there may be a mark among ``characters``."""
    return int(characters.max(initial=0)) >= FIRST_MARK


def _join_at_marks(
    starts: Bools, new_text: Bools, tokens: TextTokens, characters: Characters, at_start: Ints
) -> None:
    """Join words that a pre-tokenizer like GPT-2's has split at accents, vowel signs and points.

    These marks are not letters to it: it ends a word before each mark, and makes another word of
    the mark and the punctuation after it. ``starts`` is changed in place.
    """
    start, end = tokens.start, tokens.end
    heads = np.flatnonzero(starts)
    glued = (
        is_mark(characters, at_start[heads]) & ~new_text[heads] & (start[heads] == end[heads - 1])
    )
    glued &= is_letter(characters, at_start[heads] - 1)
    if not glued.any():
        return
    head_of = np.cumsum(starts) - 1
    starts[heads[glued]] = False
    apart = np.flatnonzero(
        glued[head_of] & (start >= np.roll(end, 1)) & ~is_letter(characters, at_start)
    )
    of_heads, first = np.unique(head_of[apart], return_index=True)
    starts[apart[first]] = True
    glued[of_heads] = False
    after = heads[1:][glued[:-1]]
    goes_on = (
        ~new_text[after] & (start[after] == end[after - 1]) & is_letter(characters, at_start[after])
    )
    starts[after[goes_on]] = False


def _num_marks(ends: Ints, limits: Ints, characters: Characters) -> Int32:
    """Number of marks after each of the words that end at ``ends``, up to ``limits``.

    No token covers these marks where a tokenizer drops accents.
    """
    num_marks = np.zeros(len(ends), np.int32)
    open_ended = np.flatnonzero(ends < limits)
    for i in open_ended[characters[ends[open_ended]] >= FIRST_MARK].tolist():
        at = first = int(ends[i])
        while at < limits[i] and unicodedata.category(chr(characters[at]))[0] == "M":
            at += 1
        num_marks[i] = at - first
    return num_marks


def _covers(tokens: TextTokens, character: int, characters: Characters, origin: Ints) -> Bools:
    """True if each token covers ``character``, a code point: [n_tokens]."""
    at = np.flatnonzero(characters == character)
    base = np.repeat(origin[:-1], tokens.lengths)
    first, last = (np.searchsorted(at, base + edge) for edge in (tokens.start, tokens.end))
    return last > first


def find_tags(
    encoded: Encoded, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> list[str | None]:
    """Per row, the tag of the span that holds the token's first character; else None.

    ``spans`` are those of each document. White space before the text is skipped. Where the token
    starts a word, it is skipped up to the word's end: the first piece of a rare word may be a space
    alone.
    """
    result: list[str | None] = [None] * len(encoded.token_ids)
    starts = encoded.start.tolist()
    stops = np.maximum(encoded.end, encoded.word_end).tolist()
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
