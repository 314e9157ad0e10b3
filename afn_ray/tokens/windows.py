"""Cut tokens into windows, and pack windows into batches."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from afn_ray.errors import ConfigError
from afn_ray.tokens.encode import Encoded, Template, TextEncoder


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass over part of a document: rows ``row`` to ``row + length`` of an ``Encoded``.

    The inputs are the tokens of these rows, with the template at both ends. Rows ``row +
    keep_start`` to ``row + keep_end`` are recorded.
    """

    row: int
    length: int
    keep_start: int
    keep_end: int


def window_sizes(
    window_tokens: int, overlap_tokens: int | None, template: Template
) -> tuple[int, int]:
    """Text tokens in a window, and tokens that neighbouring windows share.

    Raises ``ConfigError`` when the window has no room for new text.
    """
    width = window_tokens - template.num_special
    overlap = width // 4 if overlap_tokens is None else overlap_tokens
    if width < 1 or overlap >= width:
        raise ConfigError(
            f"window of {window_tokens} tokens with {template.num_special} special tokens and an "
            f"overlap of {overlap} has no room to move; give a larger window_tokens or a smaller "
            "overlap_tokens"
        )
    return width, overlap


def make_windows(
    encoded: Encoded, template: Template, width: int, overlap: int, causal: bool
) -> list[Window]:
    """Windows of at most ``width`` text tokens that record every row exactly once.

    A token is recorded where it has most context. Windows of encoders meet in the middle of their
    overlap. In decoders (``causal``) only context to the left counts, so the earlier window records
    the whole overlap. The last window of a document is moved left until it is full.
    """
    before = len(template.prefix)
    after = len(template.suffix)
    windows: list[Window] = []
    for first_row, next_row in zip(
        encoded.bounds[:-1].tolist(), encoded.bounds[1:].tolist(), strict=True
    ):
        n = next_row - first_row - before - after
        if n <= 0:
            continue
        kept = 0  # text tokens of this document recorded so far
        begin = 0
        while True:
            end = min(begin + width, n)
            last = end == n
            next_begin = max(0, min(begin + width - overlap, n - width))
            if last:
                keep_end = n
            elif causal:
                keep_end = end
            else:
                keep_end = (next_begin + end + 1) // 2
            windows.append(
                Window(
                    row=first_row + begin,
                    length=before + (end - begin) + after,
                    keep_start=0 if kept == 0 else before + kept - begin,
                    keep_end=before + keep_end - begin + (after if last else 0),
                )
            )
            kept, begin = keep_end, next_begin
            if last:
                break
    return windows


FILLED_TO = 2048
"""Number of rows to whose multiples batches are filled.

A matrix product with such a number of rows computes each row alike, whatever the others hold.
"""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Windows that go through the model together, one after the other."""

    ids: npt.NDArray[np.int64]  # [n_tokens]; filler may follow the windows
    lengths: list[int]  # tokens of each window
    kept: npt.NDArray[np.int64]  # [n_kept], indexes into ``ids`` of recorded tokens
    rows: npt.NDArray[np.int64]  # [n_kept], their rows in the ``Encoded``
    forward_tokens: int  # tokens that the model computes, with padding or filler


def make_batches(
    windows: Sequence[Window],
    encoded: Encoded,
    encoder: TextEncoder,
    batch_tokens: int,
    *,
    packed: bool,
) -> Iterator[TokenBatch]:
    """``windows`` in batches of ``batch_tokens``; they depend on the windows and the budget alone.

    ``packed``: without padding, for models that keep sequences apart. Batches are filled to exactly
    the budget, or to a multiple of ``FILLED_TO``, so that the bits of a window's results do not
    depend on its neighbours. Only a single batch may be smaller. Without ``packed``, a batch has
    windows of similar length and at most the budget with their padding. A window over the budget is
    a batch of its own.
    """
    groups = _packs(windows, batch_tokens) if packed else _sorted_groups(windows, batch_tokens)
    for group in groups:
        lengths = [w.length for w in group]
        total = sum(lengths)
        size = total
        if packed and len(groups) == 1:  # a power of two: few different shapes
            size = max(total, min(batch_tokens, 1 << (total - 1).bit_length()))
        elif packed:  # the last batch of a large budget may be smaller than the budget
            size = max(total, min(batch_tokens, -(-total // FILLED_TO) * FILLED_TO))
        ids = np.empty(size, np.int64)
        first = np.cumsum(lengths) - lengths
        row = np.array([w.row for w in group])
        ids[:total] = encoded.token_ids[np.repeat(row - first, lengths) + np.arange(total)]
        for at, token in enumerate(encoder.template.prefix):
            ids[first + at] = token
        for at, token in enumerate(reversed(encoder.template.suffix)):
            ids[first + lengths - 1 - at] = token
        ids[total:] = ids[0]  # filler: any token
        start = np.array([w.keep_start for w in group])
        n_kept = np.array([w.keep_end for w in group]) - start
        within = np.arange(n_kept.sum()) - np.repeat(np.cumsum(n_kept) - n_kept, n_kept)
        kept = np.repeat(first + start, n_kept) + within
        rows = np.repeat(row + start, n_kept) + within
        yield TokenBatch(ids, lengths, kept, rows, size if packed else len(group) * max(lengths))


def _packs(windows: Sequence[Window], batch_tokens: int) -> list[list[Window]]:
    """Packs of windows; each takes the longest window that still fits until none does.

    Little room is left over. Windows of one length are next to each other, where attention computes
    them together.
    """
    by_length: dict[int, list[Window]] = {}
    for window in sorted(windows, key=lambda w: w.row, reverse=True):
        by_length.setdefault(window.length, []).append(window)
    lengths = sorted(by_length)
    packs = []
    while lengths:
        pack = []
        room = max(batch_tokens, lengths[-1])
        while at := bisect.bisect_right(lengths, room):
            same = by_length[lengths[at - 1]]
            n = min(len(same), room // lengths[at - 1])
            room -= n * lengths[at - 1]
            pack += [same.pop() for _ in range(n)]
            if not same:
                del lengths[at - 1]
        packs.append(pack)
    return packs


def _sorted_groups(windows: Sequence[Window], batch_tokens: int) -> list[list[Window]]:
    """Groups of windows of similar length, each within ``batch_tokens`` with its padding."""
    groups: list[list[Window]] = []
    current: list[Window] = []
    for window in sorted(windows, key=lambda w: (w.length, w.row)):
        if current and window.length * (len(current) + 1) > batch_tokens:
            groups.append(current)
            current = []
        current.append(window)
    return [*groups, current] if current else groups
