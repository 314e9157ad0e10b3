"""Encode every word of many texts once, however often it occurs.

A text is cut at spaces into segments, for tokenizers that encode a segment alone exactly as within
the text. Each distinct segment is encoded once, and its tokens are copied to where it occurs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tokenizers import AddedToken, Encoding, Tokenizer, models

from afn_ray.tokens.characters import Bools, Characters, Integers, Ints, is_space, ranges

PATTERNS = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}", r"\p{N}{1,3}")
]
"""Patterns of words of Qwen and Llama 3."""


@dataclass(frozen=True, slots=True)
class TextTokens:
    """Tokens of several texts, one text after the other, without a template."""

    lengths: Ints  # [n_texts], tokens of each text
    ids: Integers  # [n_tokens], as all arrays below
    start: Integers  # character offsets into the text
    end: Integers
    new_word: Bools  # the pre-tokenizer or the text begins a word here
    same: Ints | None = None  # equal numbers: tokens of equal segments at the same place in them

    @classmethod
    def of(cls, encodings: Sequence[Encoding]) -> TextTokens:
        """The tokens of ``encodings``."""
        lengths = np.array([len(e) for e in encodings], np.int64)
        n = int(lengths.sum())
        ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int64, n)
        pairs = chain.from_iterable(e.offsets for e in encodings)
        spans = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * n)
        new_word = np.diff(word_ids(encodings, n), prepend=-2) != 0
        new_word[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return cls(lengths, ids, spans[::2].copy(), spans[1::2].copy(), new_word)

    def first_cut_at(self, origin: Ints) -> TextTokens:
        """The same tokens, where the first text is several texts, which
        begin in it at ``origin``.
        """
        num_tokens = int(self.lengths[0])
        of_text = np.searchsorted(origin, self.start[:num_tokens], side="right") - 1
        begins = np.zeros(len(self.ids), np.int64)
        begins[:num_tokens] = origin[of_text]
        lengths = np.append(np.bincount(of_text, minlength=len(origin)), self.lengths[1:])
        return replace(self, lengths=lengths, start=self.start - begins, end=self.end - begins)


def word_ids(encodings: Sequence[Encoding], num_tokens: int) -> npt.NDArray[np.int32]:
    """The pre-tokenizer's number of each token's word: [num_tokens]; -1 for a token without one."""
    try:
        return np.fromiter(chain.from_iterable(e.word_ids for e in encodings), np.int32, num_tokens)
    except TypeError:  # None is no number
        every = chain.from_iterable(e.word_ids for e in encodings)
        return np.fromiter((-1 if w is None else w for w in every), np.int32, num_tokens)


@dataclass(frozen=True, slots=True)
class Cut:
    """A rule where texts are cut into segments."""

    begins: Callable[[Characters], Bools]  # characters that begin one, beside a text's first
    joins: Callable[[str], bool]  # whether a segment may be in one text with others, in any order
    joint: str  # what stands between them there


@dataclass(frozen=True, slots=True)
class Segments:
    """Texts as sequences of segments, of which many are the same."""

    cut: Cut
    distinct: list[str]  # those that ``cut.joins`` come first
    num_joined: int
    which: Integers  # [n_segments], index in ``distinct`` of each segment of the texts, in order
    begins: Ints  # [n_segments], character offsets into the segment's text
    of_text: Ints  # [n_texts + 1], first segment of each text, and the number of segments

    @classmethod
    def of(cls, texts: Sequence[str], characters: Characters, origin: Ints, cut: Cut) -> Segments:
        """The segments of ``texts``, whose ``characters`` and ``origin`` these are.

        Raises ``UnicodeEncodeError`` for lone surrogates.
        """
        begins_segment = cut.begins(characters)
        begins_segment[origin[:-1][np.diff(origin) > 0]] = True
        cuts = np.append(np.flatnonzero(begins_segment), len(characters))
        of_text = np.searchsorted(cuts[:-1], origin)
        begins = cuts[:-1] - np.repeat(origin[:-1], np.diff(of_text))
        encoded = _strings(texts, cuts).dictionary_encode()
        distinct = encoded.dictionary.to_pylist()
        joins = np.array([cut.joins(segment) for segment in distinct], np.bool_)
        order = np.argsort(~joins, kind="stable")
        which = np.argsort(order)[encoded.indices.to_numpy()]
        return cls(cut, [distinct[i] for i in order], int(joins.sum()), which, begins, of_text)

    def encode(self, batch: Callable[[list[str]], list[Encoding]]) -> TextTokens:
        """Tokens of ``distinct``, from ``batch``, which encodes texts.

        Most are encoded as one long text, since a text costs as much as several of its tokens.
        """
        joined = self.distinct[: self.num_joined]
        alone = self.distinct[self.num_joined :]
        joint = self.cut.joint
        sizes = np.array([len(segment) + len(joint) for segment in joined], np.int64)
        tokens = TextTokens.of(batch([joint.join(joined), *alone]))
        return tokens.first_cut_at(np.cumsum(sizes) - sizes)

    def spread(self, tokens: TextTokens) -> TextTokens:
        """The tokens of the texts, as int32; ``tokens`` are those of ``distinct``."""
        first = np.cumsum(tokens.lengths) - tokens.lengths
        lengths = tokens.lengths[self.which]
        at = ranges(first[self.which], lengths)
        begins = np.repeat(self.begins.astype(np.int32), lengths)
        num_before = np.append(0, np.cumsum(lengths))  # tokens before each segment
        return TextTokens(
            np.diff(num_before[self.of_text]),
            tokens.ids.astype(np.int32)[at],
            tokens.start.astype(np.int32)[at] + begins,
            tokens.end.astype(np.int32)[at] + begins,
            tokens.new_word[at],
            at,
        )


def _strings(texts: Sequence[str], cuts: Ints) -> pa.LargeStringArray:
    """The strings between ``cuts``, which are indexes into the characters of all ``texts``."""
    data = "".join(texts).encode()
    if len(data) > cuts[-1]:  # characters of several bytes
        is_first = np.frombuffer(data, np.uint8) & 0xC0 != 0x80
        cuts = np.append(np.flatnonzero(is_first), len(data))[cuts]
    return pa.LargeStringArray.from_buffers(len(cuts) - 1, pa.py_buffer(cuts), pa.py_buffer(data))


def find_cut(tokenizer: Tokenizer) -> Cut | None:
    """Places at which texts for ``tokenizer`` can be cut without changing a token; None if unknown.

    ``tokenizer`` takes control tokens in a text for text. Two kinds are known:

    - BERT's. Its normalizer changes a character alone, or with the marks after it. Its
      pre-tokenizer ends a word at white space, which is part of no token.
    - Bytes, as of GPT-2, Llama 3 and Qwen. A match of their patterns does not depend on the
      characters before it, and never goes on from a character that is not white space to a space.

    A token that was added to a vocabulary is found anywhere in a text, so it may not have spaces.
    """
    added = tokenizer.get_added_tokens_decoder()
    if not all(map(_is_local, added.values())):
        return None
    try:
        normalizer = _settings(tokenizer.normalizer)
        splitter = _settings(tokenizer.pre_tokenizer)
        after = _settings(tokenizer.post_processor)
    except Exception:  # noqa: BLE001 - a part that is written in Python has no settings
        return None
    if (
        isinstance(tokenizer.model, models.WordPiece)
        and normalizer["type"] in (None, "BertNormalizer")
        and splitter["type"] == "BertPreTokenizer"
        and after["type"] in (None, "TemplateProcessing", "BertProcessing")
    ):
        return Cut(_after_spaces, joins=bool, joint=" ")
    if (
        isinstance(tokenizer.model, models.BPE)
        and tokenizer.model.dropout is None
        and normalizer["type"] in (None, "NFC")
        and _splits_before_spaces(splitter)
        and all(map(_treats_all_alike, after.get("processors", [after])))
    ):
        return Cut(_before_spaces, joins=_is_between_words, joint="")
    return None


def _settings(part: Any) -> dict[str, Any]:
    """Type and settings of a part of a tokenizer, as in tokenizer.json.

    The part's pickled state is their JSON. The whole tokenizer's JSON would have its vocabulary.
    """
    if part is None:
        return {"type": None}
    settings: dict[str, Any] = json.loads(part.__getstate__())
    return settings


def _is_local(token: AddedToken) -> bool:
    """True if ``token`` in a text is text, or is found by its own characters, none a space."""
    reaches_out = token.lstrip or token.rstrip or token.single_word
    has_space = any(character.isspace() for character in token.content)
    return token.special or not (reaches_out or has_space)


def _splits_before_spaces(splitter: Mapping[str, Any]) -> bool:
    """True if a pre-tokenizer of bytes is known to split before every space after a word."""
    *first, last = splitter.get("pretokenizers", [splitter])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if last["use_regex"]:  # GPT-2's pattern
        return all(step["type"] == "Digits" for step in first)
    return first in [
        [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
        for pattern in PATTERNS
    ]


def _treats_all_alike(processor: Mapping[str, Any]) -> bool:
    """True if a post-processor of bytes treats the first token of a text like the others.

    Their offsets may leave out spaces; the first one's may leave out all spaces but one.
    """
    if processor["type"] in ("ByteLevel", "RobertaProcessing"):
        return not (processor["trim_offsets"] and processor["add_prefix_space"])
    return processor["type"] in (None, "TemplateProcessing")


def _after_spaces(characters: Characters) -> Bools:
    """Characters after a space or a line's end, unless they are one themselves."""
    vanishes = (characters == ord(" ")) | (characters == ord("\n"))
    begins: Bools = ~vanishes
    begins[1:] &= vanishes[:-1]
    return begins


def _before_spaces(characters: Characters) -> Bools:
    """Spaces after a character that is not white space."""
    begins: Bools = characters == ord(" ")
    at = np.flatnonzero(begins)
    begins[at[is_space(characters, at - 1)]] = False
    return begins


def _is_between_words(segment: str) -> bool:
    """True if ``segment`` begins with a space and does not end with white space."""
    return segment[0] == " " and not segment[-1].isspace()
