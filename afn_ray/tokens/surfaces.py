"""Find the words that are not spelled by the texts of their tokens, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray.schema import SPECIAL, WORD_START
from afn_ray.tokens.encode import Encoded, all_characters, is_space

Ints = npt.NDArray[np.int64]
Characters = npt.NDArray[np.uint32]


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
        head_rows = rows[heads]
        docs = encoded.docs[head_rows]
        characters, origin = all_characters(texts)
        begin = origin[docs] + encoded.start[head_rows]
        end = np.maximum(begin, origin[docs] + encoded.word_end[head_rows])
        begin, end = _strip(characters, begin, end)
        differs = self._differs(encoded.token_ids[rows], heads, characters, begin, end)
        which = np.flatnonzero(differs)
        first = (begin - origin[docs])[which].tolist()
        last = (end - origin[docs])[which].tolist()
        words = [
            texts[doc][a:b] for doc, a, b in zip(docs[which].tolist(), first, last, strict=True)
        ]
        return _at_rows(words, head_rows[which], len(encoded.token_ids))

    def _differs(
        self,
        token_ids: npt.NDArray[np.int32],
        heads: Ints,
        characters: Characters,
        begin: Ints,
        end: Ints,
    ) -> npt.NDArray[np.bool_]:
        """Whether each word differs from the texts of its tokens, bool [n_words].

        ``heads``: index of each word's first token in ``token_ids``. A word is written in
        ``characters`` from ``begin`` to ``end``.
        """
        if not len(heads):
            return np.zeros(0, np.bool_)
        type_begin = self._begins[token_ids]
        lengths = self._begins[token_ids + 1] - type_begin
        differs: npt.NDArray[np.bool_] = np.add.reduceat(lengths, heads) != end - begin
        # The others have as many characters as their tokens, so these are compared one by one.
        same = ~differs
        num_tokens = np.diff(heads, append=len(token_ids))
        tokens = np.flatnonzero(np.repeat(same, num_tokens))
        spelled = self._characters[_ranges(type_begin[tokens], lengths[tokens])]
        written = characters[_ranges(begin[same], (end - begin)[same])]
        unequal = np.flatnonzero(spelled != written)
        word_ends = np.cumsum((end - begin)[same])
        differs[np.flatnonzero(same)[np.searchsorted(word_ends, unequal, side="right")]] = True
        return differs


def _ranges(begins: Ints, lengths: Ints) -> Ints:
    """The numbers from each of ``begins`` on, as many as its length, one range after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(total)


def _strip(characters: Characters, begin: Ints, end: Ints) -> tuple[Ints, Ints]:
    """The parts of ``characters`` from ``begin`` to ``end``, without white space at both ends."""
    if not (is_space(characters, begin).any() or is_space(characters, end - 1).any()):
        return begin, end
    solid = np.flatnonzero(~is_space(characters, np.arange(len(characters))))
    next_solid = np.append(solid, len(characters))[np.searchsorted(solid, begin)]
    begin = np.minimum(next_solid, end)
    after_solid = np.append(0, solid + 1)[np.searchsorted(solid, end)]
    return begin, np.maximum(begin, after_solid)


def _at_rows(words: Sequence[str], rows: Ints, num_rows: int) -> pa.DictionaryArray:
    """``words`` in their ``rows`` of a column; null in the others."""
    encoded = pa.array(words, pa.string()).dictionary_encode()
    indices, is_null = np.zeros(num_rows, np.int32), np.ones(num_rows, np.bool_)
    indices[rows] = encoded.indices.to_numpy()
    is_null[rows] = False
    return pa.DictionaryArray.from_arrays(pa.array(indices, mask=is_null), encoded.dictionary)
