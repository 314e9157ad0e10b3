"""Find the words that are not spelled by the texts of their tokens, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.schema import SPECIAL, WORD_START
from afn_ray.tokens.characters import Bools, Characters, Ints, all_characters, is_space, ranges
from afn_ray.tokens.encode import Encoded


class Speller:
    """Compares words as written with the plain texts of their tokens.

    ``readable`` has the plain text of every token type, from ``TextEncoder.texts``.
    """

    def __init__(self, readable: Sequence[str]) -> None:
        # code points of all types, one after the other, and where each type begins
        self._characters, self._begins = all_characters(readable)

    def surfaces(self, encoded: Encoded, texts: Sequence[str]) -> pa.DictionaryArray:
        """Per row, the word as written where a word starts; strings, [n_tokens].

        Null where the texts of the word's tokens spell it, and in rows that start no word. With a
        lower-casing tokenizer "LORD" has a surface and "lord" has none. White space around a word
        is no part of it.
        """
        rows = np.flatnonzero((encoded.flags & SPECIAL) == 0)  # text tokens
        heads = np.flatnonzero(encoded.flags[rows] & WORD_START)  # the first token of each word
        num_tokens = np.diff(heads, append=len(rows))
        which, chosen = _distinct(heads if encoded.same is None else encoded.same[heads])
        head_rows = rows[heads[chosen]]
        docs = np.searchsorted(encoded.bounds, head_rows, side="right") - 1
        characters, origin = all_characters(texts)
        of_text = origin[docs]
        begin = of_text + encoded.start[head_rows]
        end = np.maximum(begin, of_text + encoded.word_end[head_rows])
        begin, end = _strip(characters, begin, end)
        tokens = rows[ranges(heads[chosen], num_tokens[chosen])]
        differs = self._differs(
            encoded.token_ids[tokens], num_tokens[chosen], characters, begin, end
        )
        shown = np.flatnonzero(differs)
        which_doc = docs[shown].tolist()
        first = (begin - of_text)[shown].tolist()
        last = (end - of_text)[shown].tolist()
        words = [texts[doc][a:b] for doc, a, b in zip(which_doc, first, last, strict=True)]
        strings = pa.array(words, pa.string()).dictionary_encode()
        number = np.full(len(chosen), -1, np.int32)  # of each word's string
        number[shown] = strings.indices.to_numpy()
        number = number[which]
        shown = np.flatnonzero(number >= 0)
        return _at_rows(
            strings.dictionary, number[shown], rows[heads[shown]], len(encoded.token_ids)
        )

    def _differs(
        self,
        token_ids: npt.NDArray[np.int32],
        num_tokens: Ints,
        characters: Characters,
        begin: Ints,
        end: Ints,
    ) -> Bools:
        """True if each word differs from the texts of its tokens, bool [n_words].

        ``token_ids`` are those of the words, one after the other, and ``num_tokens`` how many each
        has, at least 1. A word is written in ``characters`` from ``begin`` to ``end``.
        """
        if not len(num_tokens):
            return np.zeros(0, np.bool_)
        type_begin = self._begins[token_ids]
        lengths = self._begins[token_ids + 1] - type_begin
        first = np.cumsum(num_tokens) - num_tokens
        differs: Bools = np.add.reduceat(lengths, first) != end - begin
        # The others have as many characters as their tokens, so these are compared one by one.
        same = ~differs
        tokens = np.flatnonzero(np.repeat(same, num_tokens))
        spelled = self._characters[ranges(type_begin[tokens], lengths[tokens])]
        written = characters[ranges(begin[same], (end - begin)[same])]
        unequal = np.flatnonzero(spelled != written)
        word_ends = np.cumsum((end - begin)[same])
        differs[np.flatnonzero(same)[np.searchsorted(word_ends, unequal, side="right")]] = True
        return differs


def _distinct(numbers: Ints) -> tuple[Ints, Ints]:
    """Index of each of ``numbers`` among its distinct ones, and where one of each of these is."""
    size = int(numbers.max(initial=-1)) + 1
    at = np.zeros(size, np.int64)
    at[numbers] = np.arange(len(numbers))
    occurs = np.zeros(size, np.bool_)
    occurs[numbers] = True
    return (np.cumsum(occurs) - 1)[numbers], at[occurs]


def _strip(characters: Characters, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """The parts of ``characters`` from ``begin`` to ``end``, without white space at both ends."""
    if not (is_space(characters, begin).any() or is_space(characters, end - 1).any()):
        return begin, end
    is_solid = ~is_space(characters, np.arange(len(characters)))
    solid = np.flatnonzero(is_solid)
    next_solid = np.append(solid, len(characters))[np.searchsorted(solid, begin)]
    begin = np.minimum(next_solid, end)
    after_solid = np.append(0, solid + 1)[np.searchsorted(solid, end)]
    return begin, np.maximum(begin, after_solid)


def _at_rows(
    strings: pa.StringArray, numbers: npt.NDArray[np.int32], rows: Ints, num_rows: int
) -> pa.DictionaryArray:
    """The ``strings`` with these ``numbers`` in these ``rows`` of a column; null in the others."""
    encoded = pa.array(numbers).dictionary_encode()  # in the order of the rows
    indices = np.zeros(num_rows, np.int32)
    is_null = np.ones(num_rows, np.bool_)
    indices[rows] = encoded.indices.to_numpy()
    is_null[rows] = False
    column = pa.array(indices, mask=is_null)
    return pa.DictionaryArray.from_arrays(column, strings.take(encoded.dictionary))
