"""Count the tokens and documents of slices, or estimate them with an interval.

Few slices are counted in full. For more, the estimate draws random places in the slices' bytes.
Consecutive slices form strata, and each stratum is sampled separately. Every byte of a stratum has
the same chance, however long files and documents are. The text around a place gives its tokens per
byte. Their mean times the bytes of the stratum estimates the stratum's tokens. The spread of the
places gives the variance, the degrees of freedom are those of Welch and Satterthwaite, and
Student's t gives the interval (Cochran, Sampling Techniques, 1977, 5.4 and 9A).

Documents that a condition does not select have no tokens. A sample by ids has its share of the
tokens, and its size adds to the variance.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from afn_ray import samples
from afn_ray.corpus import reading, selection
from afn_ray.corpus_values import Document, FileSlice, ReadOptions
from afn_ray.fingerprints import fingerprint
from afn_ray.store import readers
from afn_ray.tokens.encode import TextEncoder

EXACT_BYTES = 2 << 20
"""Total size of slices up to which all tokens are counted, in bytes: about 3 seconds."""
EXACT_TEXT_BYTES = 8 << 20
"""Text up to which all tokens are counted, in characters; compressed slices may have more."""
STRATA, PLACES, LEAST_PLACES = 16, 128, 6
"""Number of strata, approximately; number of places in all; least number in a stratum."""
BLOCK_BYTES = 16 << 10
"""Text around a place that is encoded, in bytes."""
READ_BYTES = 64 << 20
"""Text to read in all from slices that must be read from their beginning, in bytes."""
LEAST_READ_BYTES = 1 << 20
"""Least text to read from each of these slices, in bytes."""
SEEDED_BY = 1000
"""Number of slices whose identity seeds the random generator."""
CONFIDENCE = 0.95
"""Confidence level of the interval."""
MOST_NAMED = 5
"""Quarantined documents whose reasons are kept, and files with replaced characters."""


@dataclass(frozen=True, slots=True)
class Count:
    """Tokens and documents of slices; special tokens included.

    ``low`` and ``high`` bound the 95 % interval of ``tokens``; they are equal where all are
    counted.
    """

    tokens: int
    low: int
    high: int
    documents: int
    exact: bool
    num_documents_exact: bool
    num_beginnings: int = 0  # slices of which only the beginning was read
    # counts of the documents that were read for this, by their names in a commit
    read: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()  # files of quarantined documents, with the reasons
    replaced_in: tuple[str, ...] = ()  # files with replaced characters


NOTHING = Count(0, 0, 0, 0, True, True)


class _Tally:
    """Counts of documents that are read: selected, quarantined, replaced and left out."""

    def __init__(self, options: ReadOptions) -> None:
        """``options`` have the sample that the documents are for, if they are not marked by it."""
        self._options = replace(options, where="")
        self._counts: Counter[str] = Counter()
        self._unselected = selection.Unselected()
        self._reasons: list[str] = []
        self._replaced_in: dict[str, None] = {}

    def added_to(self, found: Count) -> Count:
        """``found`` with the documents counted so far."""
        return replace(
            found,
            read={**self._counts, **self._unselected.counts()},
            reasons=tuple(self._reasons),
            replaced_in=tuple(self._replaced_in),
        )

    def selected(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Count ``documents``; yield those that are selected."""
        return filter(self.add, documents)

    def add(self, document: Document) -> bool:
        """Count ``document``; True if it is selected before the sample is drawn."""
        if not document.selected:
            self._unselected.add(document)
            return False
        (drawn,) = selection.mark([document], self._options)
        if not drawn.selected:
            self._unselected.add(document)
            return True
        self._counts["documents"] += 1
        self._counts["replaced"] += document.num_replaced
        if document.num_replaced and len(self._replaced_in) < MOST_NAMED:
            self._replaced_in[document.source] = None
        if document.problem is not None:
            self._counts["quarantined"] += 1
            if len(self._reasons) < MOST_NAMED:
                self._reasons.append(f"{document.source}: {document.problem}")
        return True

    def add_empty(self, num_empty: int) -> None:
        """Count texts without a token."""
        self._counts["empty"] += num_empty


@dataclass(frozen=True, slots=True)
class _Density:
    """Tokens and documents at a place, per stored byte of its slice."""

    tokens: float
    documents: float


def count(slices: Sequence[FileSlice], options: ReadOptions, encoder: TextEncoder) -> Count:
    """Count or estimate the contents of ``slices``; the same slices give the same answer.

    Raises what ``reading.read`` raises for files that differ from the plan or cannot be read.
    """
    if sum(piece.num_bytes for piece in slices) <= EXACT_BYTES:
        found = _count_all(slices, options, encoder)
        if found is not None:
            return found
    found = _estimate(slices, options, encoder)
    return _sampled(found, samples.share_of(options.sample)) if options.sample else found


def _count_all(
    slices: Sequence[FileSlice], options: ReadOptions, encoder: TextEncoder
) -> Count | None:
    """Count all tokens; None where the text exceeds ``EXACT_TEXT_BYTES``."""
    num_tokens = num_documents = num_bytes = 0
    read = (d for piece in slices for d in reading.read(piece, options))
    tally = _Tally(options)
    documents = tally.selected(read)
    while batch := list(itertools.islice(documents, 256)):
        num_bytes += sum(len(d.text) for d in batch)
        if num_bytes > EXACT_TEXT_BYTES:
            return None
        counts = encoder.count([d.text for d in batch])
        num_tokens += int(counts.sum())
        num_documents += len(batch)
        num_empty = 0
        for num_here, document in zip(counts, batch, strict=True):
            if document.problem is None and not num_here:
                num_empty += 1
        tally.add_empty(num_empty)
    return tally.added_to(Count(num_tokens, num_tokens, num_tokens, num_documents, True, True))


# --- the estimate


def _estimate(slices: Sequence[FileSlice], options: ReadOptions, encoder: TextEncoder) -> Count:
    """Estimate the tokens and documents of ``slices`` from places in them, before a sample."""
    tally = _Tally(options)
    options = replace(options, sample="")
    seed = fingerprint([piece.identity for piece in slices[:SEEDED_BY]])
    chance = np.random.default_rng(int(seed, 16))
    ends = np.cumsum([piece.num_bytes for piece in slices])
    strata = _strata(ends)
    drawn: list[list[int]] = []
    at: list[list[int]] = []
    whole: set[int] = set()
    for begin, end in strata:
        num_places = max(LEAST_PLACES, round(PLACES * (end - begin) / ends[-1]))
        places = sorted(chance.integers(begin, end, num_places).tolist())
        group = np.searchsorted(ends, places, "right").tolist()
        drawn.append(places)
        at.append(group)
        whole.update(i for i in group if not _is_cut(slices[i], options))
    reader = _Reader(options, encoder, chance, len(whole), tally)
    tokens = unknown = 0.0
    variances: list[tuple[float, int]] = []
    for (begin, end), places, group in zip(strata, drawn, at, strict=True):
        found: list[_Density] = []
        for i, some in itertools.groupby(zip(group, places, strict=True), lambda pair: pair[0]):
            first = int(ends[i]) - slices[i].num_bytes
            found += reader.densities(slices[i], [place - first for _, place in some])
        size = end - begin
        tokens += size * statistics.fmean(d.tokens for d in found)
        unknown += size * statistics.fmean(
            d.documents if _is_unknown(slices[i], options) else 0.0
            for i, d in zip(group, found, strict=True)
        )
        spread = statistics.variance(density.tokens for density in found)
        variances.append((size**2 * spread / len(found), len(found) - 1))
    half = _student(variances) * math.sqrt(sum(v for v, _ in variances))
    known = [0 if _is_unknown(piece, options) else piece.num_documents for piece in slices]
    estimated = Count(
        tokens=round(tokens),
        low=max(0, round(tokens - half)),
        high=round(tokens + half),
        documents=sum(known) + round(unknown),
        exact=False,
        num_documents_exact=not any(_is_unknown(piece, options) for piece in slices),
        num_beginnings=reader.num_beginnings,
    )
    return tally.added_to(estimated)


def _is_unknown(piece: FileSlice, options: ReadOptions) -> bool:
    """True if the number of selected documents of ``piece`` is unknown."""
    return piece.num_documents < 0 or bool(options.where)


def _sampled(found: Count, share: Fraction) -> Count:
    """``found`` of all documents, for a sample of ``share`` of them.

    A document's tokens are taken to spread as widely as their mean, as those of web pages do.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    tokens = float(found.tokens * share)
    documents = float(found.documents * share)
    half = max(found.high - found.tokens, found.tokens - found.low) * float(share)
    of_sample = z * tokens * math.sqrt(2 * float(1 - share) / max(documents, 1))
    half = math.hypot(half, of_sample)
    return replace(
        found,
        tokens=round(tokens),
        low=max(0, round(tokens - half)),
        high=round(tokens + half),
        documents=round(documents),
        num_documents_exact=False,
    )


def _strata(ends: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Strata as byte ranges over slices that end at the bytes ``ends``.

    A stratum has as few slices as hold a ``STRATA``-th of all bytes. A large slice is a stratum of
    its own, so differences between large files add nothing to the variance.
    """
    strata: list[tuple[int, int]] = []
    begin = before = 0
    for end in map(int, ends):
        if end - before >= ends[-1] / STRATA and before > begin:
            strata.append((begin, before))
            begin = before
        if end - begin >= ends[-1] / STRATA:
            strata.append((begin, end))
            begin = end
        before = end
    if begin < before and strata and before - begin < ends[-1] / STRATA / 2:
        strata[-1] = (strata[-1][0], before)
    elif begin < before:
        strata.append((begin, before))
    return strata


def _student(variances: Sequence[tuple[float, int]]) -> float:
    """Quantile of Student's t for a sum of ``variances``, each with its degrees of freedom.

    The expansion is Abramowitz and Stegun 26.7.5.
    """
    squares = sum(v * v / n for v, n in variances)
    freedom = max(3.0, sum(v for v, _ in variances) ** 2 / squares) if squares else math.inf
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _is_cut(piece: FileSlice, options: ReadOptions) -> bool:
    """True if any part of ``piece`` can be read without the text before it."""
    # UTF-16 has no such parts; the number of its documents is -1, or that of a limit.
    return (
        reading.is_lines(piece.format, options)
        and not piece.compression
        and piece.num_documents >= 0
        and piece.limit < 0
    )


class _Reader:
    """Reads the text around places, and encodes a part of it."""

    def __init__(
        self,
        options: ReadOptions,
        encoder: TextEncoder,
        chance: np.random.Generator,
        num_whole: int,
        tally: _Tally,
    ) -> None:
        self._options = options
        self._encoder = encoder
        self._chance = chance
        self._most_bytes = max(LEAST_READ_BYTES, READ_BYTES // max(1, num_whole))
        self.num_beginnings = 0
        self._tally = tally

    def densities(self, piece: FileSlice, places: Sequence[int]) -> list[_Density]:
        """Density at each of ``places``, in bytes from the start of ``piece``."""
        if _is_cut(piece, self._options):
            return [self._of_lines(piece, place) for place in places]
        return self._of_whole(piece, len(places))

    def _of_lines(self, piece: FileSlice, place: int) -> _Density:
        """Density of the block around ``place``.

        A line on the edge of the block counts by the part of it that is inside.
        """
        begin = piece.start + place // BLOCK_BYTES * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, piece.end)
        first = _line_start(piece, begin)
        last = _line_end(piece, end)
        documents = list(reading.read(_part_of(piece, first, last), self._options))
        if not documents:
            return _Density(0.0, 0.0)
        starts = [first, *(d.offset for d in documents[1:]), last]
        counts = self._count(documents)
        tokens = num = 0.0
        places = itertools.pairwise(starts)
        for document, n, (here, after) in zip(documents, counts, places, strict=True):
            if not self._tally.add(document):
                continue
            in_block = max(0, min(after, end) - max(here, begin))
            share = in_block / (after - here)
            tokens += share * n
            num += share
        return _Density(tokens / (end - begin), num / (end - begin))

    def _count(self, documents: Sequence[Document]) -> list[float]:
        """Tokens of each of ``documents``; for a long one, an estimate from a random part of it."""
        parts = [self._part(d.text) for d in documents]
        template = self._encoder.template
        extra = len(template.prefix) + len(template.suffix)
        counts = self._encoder.count([text for text, _ in parts])
        return [
            extra + (n - extra) * factor if n else 0.0
            for n, (_, factor) in zip(counts, parts, strict=True)
        ]

    def _part(self, text: str) -> tuple[str, float]:
        """The text to encode, and the ratio of the whole text's length to its length."""
        if len(text) <= 2 * BLOCK_BYTES:
            return text, 1.0
        # the part wraps around the end of the text
        begin = int(self._chance.integers(len(text)))
        part = text[begin : begin + BLOCK_BYTES]
        part += text[: BLOCK_BYTES - len(part)]
        return part, len(text) / BLOCK_BYTES

    def _of_whole(self, piece: FileSlice, num_places: int) -> list[_Density]:
        """Density of ``piece`` or of its beginning, ``num_places`` times with random blocks."""
        texts: list[str] = []
        num_bytes = num_read = 0
        read, share = piece, 1.0
        is_stream = reading.is_stream(piece.format, self._options)
        if is_stream and piece.num_bytes > self._most_bytes:
            read = _part_of(piece, piece.start, piece.start + self._most_bytes)
            share = self._most_bytes / piece.num_bytes
        for num_read, document in enumerate(reading.read(read, self._options), 1):
            num_bytes += len(document.text)
            if self._tally.add(document):
                texts.append(document.text)
            if num_bytes > self._most_bytes and num_read < piece.num_documents:
                share = num_read / piece.num_documents
                break
        if share < 1.0 and piece.limit >= 0:  # its bytes may go on after its last document
            share = min(1.0, num_read / piece.limit)
        if share < 1.0:
            self.num_beginnings += 1
        stored = max(1.0, share * piece.num_bytes)
        with_text = [t for t in texts if t]
        if not with_text:
            return [_Density(0.0, len(texts) / stored)] * num_places
        ends = list(itertools.accumulate(len(t) for t in with_text))
        found = []
        template = self._encoder.template
        extra = (len(template.prefix) + len(template.suffix)) * len(with_text)
        for _ in range(num_places):
            begin = int(self._chance.integers(ends[-1]))
            parts = list(_window(with_text, ends, begin, BLOCK_BYTES))
            alone = len(template.prefix) + len(template.suffix)
            counts = [max(0, n - alone) for n in self._encoder.count(parts).tolist()]
            per_character = sum(counts) / sum(map(len, parts))
            num_tokens = extra + per_character * ends[-1]
            found.append(_Density(num_tokens / stored, len(texts) / stored))
        return found


def _window(texts: Sequence[str], ends: Sequence[int], begin: int, size: int) -> Iterator[str]:
    """Parts of ``texts`` from character ``begin`` on, ``size`` in all, wrapping around the end."""
    size = min(size, ends[-1])
    at = bisect.bisect_right(ends, begin)
    offset = begin - (ends[at] - len(texts[at]))
    while size > 0:
        part = texts[at][offset : offset + size]
        yield part
        size -= len(part)
        at = (at + 1) % len(texts)
        offset = 0


def _part_of(piece: FileSlice, begin: int, end: int) -> FileSlice:
    """The bytes ``begin`` to ``end`` of the file of ``piece``, as a slice with its limit."""
    sha256 = hashlib.sha256(readers.read_range(piece.uri, begin, end)).hexdigest()
    return replace(
        piece,
        start=begin,
        end=end,
        num_bytes=end - begin,
        num_documents=-1,
        sha256=sha256,
    )


def _line_start(piece: FileSlice, at: int) -> int:
    """Start of the line that contains the byte ``at``."""
    step = BLOCK_BYTES
    while at > piece.start:
        begin = max(piece.start, at - step)
        newline = readers.read_range(piece.uri, begin, at).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        at, step = begin, 2 * step
    return piece.start


def _line_end(piece: FileSlice, at: int) -> int:
    """End of the line that contains the byte before ``at``."""
    step, at = BLOCK_BYTES, at - 1
    while at < piece.end:
        end = min(piece.end, at + step)
        newline = readers.read_range(piece.uri, at, end).find(b"\n")
        if newline >= 0:
            return at + newline + 1
        at, step = end, 2 * step
    return piece.end
