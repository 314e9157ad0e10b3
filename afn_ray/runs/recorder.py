"""Record one shard: write the rows of measured documents, and add them to the summaries."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from afn_ray import kept
from afn_ray.corpus_values import Document
from afn_ray.measure import Measure
from afn_ray.reduce import neurons
from afn_ray.reduce.mean_vectors import StateSums
from afn_ray.reduce.shard_summary import Spoken, Summary
from afn_ray.reduce.stats import is_high
from afn_ray.runs import token_filter
from afn_ray.runs.values import Float32s, Numbers, Values
from afn_ray.schema import (
    LANGUAGE,
    SPECIAL,
    STRENGTH,
    TOKEN_CHARS,
    Series,
    neurons_column,
    token_neurons_schema,
)
from afn_ray.store import records
from afn_ray.store.commits import COUNTS
from afn_ray.store.shard_tables import DOC
from afn_ray.tokens import encode
from afn_ray.tokens.feed import Chunk


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens of a chunk with their values."""

    encoded: encode.Encoded
    docs: npt.NDArray[np.int32]  # [n_tokens], ordinals in the shard
    tags: pa.Array  # [n_tokens]
    by_series: Mapping[Series, Float32s]  # [n_tokens] each
    neurons: Numbers  # [n_neuron_layers * top_neurons, n_tokens]
    neuron_values: Float32s  # same shape
    keep: npt.NDArray[np.bool_]  # [n_tokens], tokens of documents that were measured


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """Fates of the documents of a chunk."""

    n_tokens: npt.NDArray[np.int64]  # recorded tokens
    status: Sequence[str]
    losses: Sequence[tuple[int, int | None]]  # from ``_loss``


@dataclass(frozen=True, slots=True)
class Part:
    """The rows and the counts of one chunk, not written yet."""

    tokens: pa.Table
    neurons: pa.Table | None  # None: neurons are not recorded
    documents: pa.Table
    counts: Mapping[str, int]  # as in ``commits.COUNTS``
    num_refused: int  # documents that were read and could not be measured
    first_refusal: str  # reason of the first of them


class Recorder:
    """The record of one shard: rows in its files, summaries and counts.

    ``rows`` says which rows of tokens are kept; None: all. Summaries and counts are of all tokens.

    Threads may ``make`` parts of several chunks at a time. Parts are written one by one, in the
    order of their documents.
    """

    def __init__(
        self,
        measure: Measure,
        files: records.ShardFiles,
        rows: token_filter.RowFilter | None = None,
    ) -> None:
        self._measure = measure
        self._files = files
        self._rows = rows
        self._summary = Summary(
            measure.series,
            tagged=measure.tagged,
            spoken=measure.detected and not measure.tagged,
        )
        self._pairs = neurons.PairSummary(measure.neuron_layers)
        self._sums = StateSums()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.num_refused = 0  # documents that were read and could not be measured
        self.first_refusal = ""  # reason of the first of them

    def make(self, chunk: Chunk, values: Values, first: int) -> Part:
        """The rows of ``chunk``, whose first document has the number ``first`` in the shard.

        Its tokens are added to the summaries here, since those are the same in any order.
        """
        encoded = chunk.prepared.encoded
        docs = encoded.docs
        bad = _bad_documents(docs, values, len(chunk.documents))
        self._sums.add_all(values.sums)
        problems = dict(encoded.problems)
        for i in np.flatnonzero(bad).tolist():
            problems[i] = self._why_bad(values.series[:, docs == i])
        tokens = _Tokens(
            encoded,
            docs=docs + np.int32(first),
            tags=self._tags(chunk),
            by_series=dict(zip(self._measure.series, values.series, strict=True)),
            neurons=values.neurons,
            neuron_values=values.neuron_values,
            keep=~bad[docs] if bad.any() else np.ones(len(docs), np.bool_),
        )
        outcomes = _outcomes(chunk.documents, np.diff(encoded.bounds), bad, problems)
        reasons = list(problems.values())
        return Part(
            tokens=self._add_tokens(chunk, tokens),
            neurons=None if self._files.neurons is None else self._add_neurons(tokens),
            documents=self._document_rows(chunk, tokens, outcomes, first),
            counts=_counts(chunk, tokens, outcomes),
            num_refused=len(reasons),
            first_refusal=reasons[0] if reasons else "",
        )

    def write(self, part: Part) -> None:
        """Append ``part`` to the files, after the parts of the documents before it."""
        self._files.tokens.write(part.tokens)
        if self._files.neurons is not None:
            self._files.neurons.write(part.neurons)
        self._files.documents.write(part.documents)
        for name, value in part.counts.items():
            self.counts[name] += value
        self.num_refused += part.num_refused
        self.first_refusal = self.first_refusal or part.first_refusal

    def finish(self) -> None:
        """Write the summaries."""
        self._files.summary.write_each(self._summary.tables())
        if self._files.pairs is not None:
            self._files.pairs.write_each(self._pairs.tables())
        if self._files.vectors is not None:
            measure = self._measure
            tables = self._sums.tables(measure.layers, measure.mean_types)
            self._files.vectors.write_each(tables)

    def _tags(self, chunk: Chunk) -> pa.Array:
        """Tags of the tokens; nulls for a corpus without tags."""
        encoded, documents = chunk.prepared.encoded, chunk.documents
        if not self._measure.tagged:
            return pa.nulls(len(encoded.flags), pa.string())
        texts = [d.text for d in documents]
        tags = [d.tags for d in documents]
        return pa.array(encode.find_tags(encoded, texts, tags), pa.string())

    def _add_tokens(self, chunk: Chunk, tokens: _Tokens) -> pa.Table:
        """Add the tokens to the summary; return their rows."""
        encoded, keep = tokens.encoded, tokens.keep
        columns = {
            DOC: tokens.docs,
            "position": encoded.positions,
            "token_id": encoded.token_ids,
            "flags": encoded.flags,
            "surface": chunk.prepared.surfaces,
            "tag": tokens.tags,
            "start_ahead": encoded.start - TOKEN_CHARS * encoded.positions,
            "length": encoded.end - encoded.start,
            **{s.name: values for s, values in tokens.by_series.items()},
        }
        table = records.make_table(columns, self._files.tokens.schema)
        tags, spoken = tokens.tags, None
        if self._measure.detected:
            spoken = Spoken.of(encoded.docs, pa.array(chunk.prepared.languages, pa.string()))
        which: slice | npt.NDArray[np.bool_] = slice(None)  # without a copy, as nearly always
        if not keep.all():
            table = table.filter(pa.array(keep))
            tags = tags.filter(pa.array(keep))
            which = keep
            spoken = None if spoken is None else spoken.filter(keep)
        self._summary.add(
            tokens.docs[which],
            encoded.token_ids[which],
            encoded.flags[which],
            {s: values[which] for s, values in tokens.by_series.items()},
            tags,
            spoken,
        )
        if self._rows is not None:
            is_kept = self._rows(chunk.documents, tokens.encoded, tokens.by_series)
            table = table.filter(pa.array(is_kept[which]))
        return table

    def _add_neurons(self, tokens: _Tokens) -> pa.Table:
        """Add the tokens' neurons to their summary; return their rows.

        With ``neurons_above``, only tokens that are HIGH at a layer have neurons.
        """
        encoded = tokens.encoded
        layers = self._measure.neuron_layers
        above = self._measure.neurons_above
        which = tokens.keep
        high: list[npt.NDArray[np.bool_]] = []
        if above:
            for k, q3 in zip(layers, above, strict=True):
                high.append(is_high(tokens.by_series[Series(STRENGTH, k)], q3))
            which = which & (encoded.flags & SPECIAL == 0) & np.any(high, axis=0)
        rows = np.flatnonzero(which)
        lists: dict[str, pa.Array] = {}
        which_neurons = np.split(tokens.neurons, len(layers))
        their_values = np.split(tokens.neuron_values, len(layers))
        for at, k in enumerate(layers):
            recorded = high[at][rows] if above else None
            lists[neurons_column(k)] = neurons.lists_of(
                which_neurons[at][:, rows], their_values[at][:, rows], recorded
            )
        columns = {DOC: tokens.docs[rows], "position": encoded.positions[rows], **lists}
        table = records.make_table(columns, token_neurons_schema(layers))
        self._pairs.add(encoded.token_ids[rows], encoded.flags[rows], table)
        return table

    def _document_rows(
        self, chunk: Chunk, tokens: _Tokens, outcomes: _Outcomes, first: int
    ) -> pa.Table:
        """Rows of the documents, which are numbered from ``first`` on."""
        documents = chunk.documents
        means = _document_means(tokens, outcomes.n_tokens)
        columns = {
            DOC: np.arange(first, first + len(documents)),
            "doc_id": [d.doc_id for d in documents],
            "source": [d.source for d in documents],
            "offset": [d.offset for d in documents],
            "n_tokens": outcomes.n_tokens,
            "n_windows": chunk.prepared.n_windows,
            "n_chars": [len(d.text) for d in documents],
            "n_replaced": [d.num_replaced for d in documents],
            "lost_bytes": [num_bytes for num_bytes, _ in outcomes.losses],
            "lost_documents": [num_documents for _, num_documents in outcomes.losses],
            "text_sha256": [_digest(d) for d in documents],
            "status": outcomes.status,
            LANGUAGE: chunk.prepared.languages or [None] * len(documents),
            **means,
            **kept.columns_of(documents, self._files.kept_names),
        }
        return records.make_table(columns, self._files.documents.schema)

    def _why_bad(self, values: Float32s) -> str:
        """Reason why the values of a document, [n_series, n_tokens], are refused."""
        is_wrong = ~(values >= 0) | np.isinf(values)
        wrong = np.flatnonzero(is_wrong.any(axis=1))
        if not len(wrong):
            return (
                f"the model gave a neuron of {neurons.LIMIT:,.0f} or more, or one that is not "
                "finite"
            )
        at = wrong[0]
        what = "negative" if (values[at] < 0).any() else f"not finite in {self._measure.dtype}"
        return f"the model gave a {self._measure.series[at].signal} that is {what}"


def _counts(chunk: Chunk, tokens: _Tokens, outcomes: _Outcomes) -> dict[str, int]:
    """The counts of a chunk, as in ``commits.COUNTS``."""
    status, losses = outcomes.status, outcomes.losses
    is_special = tokens.encoded.flags & SPECIAL > 0
    return {
        "documents": len(chunk.documents),
        "empty": status.count("empty"),
        "tokens": int(outcomes.n_tokens.sum()),
        "quarantined": sum(s.startswith("quarantined") for s in status),
        "special": int(np.count_nonzero(is_special & tokens.keep)),
        "windows": int(chunk.prepared.n_windows.sum()),
        "forward_tokens": sum(b.forward_tokens for b in chunk.prepared.batches),
        "chars": sum(len(d.text) for d in chunk.documents),
        "replaced": sum(d.num_replaced for d in chunk.documents),
        "lost_bytes": sum(num_bytes for num_bytes, _ in losses),
        "lost_documents": sum(num_documents or 0 for _, num_documents in losses),
        "lost_unknown": sum(num_documents is None for _, num_documents in losses),
    }


def _bad_documents(
    docs: npt.NDArray[np.int32], values: Values, num_documents: int
) -> npt.NDArray[np.bool_]:
    """True if a document has a value that is negative, not finite or too large, [n_documents].

    ``docs`` are the documents of the values, counted from 0.
    """
    bad = np.zeros(num_documents, bool)
    series = values.series
    is_wrong = ~(series >= 0).all(axis=0) | np.isinf(series).any(axis=0)
    bad[docs[is_wrong]] = True
    is_within = (np.abs(values.neuron_values) < neurons.LIMIT).all(axis=0)
    bad[docs[~is_within]] = True
    return bad


def _outcomes(
    documents: Sequence[Document],
    n_tokens: npt.NDArray[np.int64],
    bad: npt.NDArray[np.bool_],
    problems: Mapping[int, str],
) -> _Outcomes:
    """Fates of ``documents``, of which those in ``problems`` could not be measured."""
    status: list[str] = []
    losses: list[tuple[int, int | None]] = []
    for i, document in enumerate(documents):
        problem = problems.get(i) if document.problem is None else document.problem
        if problem is not None:
            status.append(f"quarantined: {problem}")
        else:
            status.append("ok" if n_tokens[i] else "empty")
        losses.append(_loss(document, rejected=i in problems))
    return _Outcomes(np.where(bad, 0, n_tokens), status, losses)


def _loss(document: Document, *, rejected: bool) -> tuple[int, int | None]:
    """Bytes and documents of the file that are lost with ``document``.

    ``rejected``: the text was read but not measured. None documents: their number is unknown.
    """
    if rejected:
        return max(1, len(document.text.encode())), 1
    if document.problem is None and not document.lost_bytes:
        return 0, 0
    return document.lost_bytes, document.lost_documents


def _digest(document: Document) -> bytes | None:
    """SHA-256 of the text; None for a document that could not be read."""
    if document.problem is not None:
        return None
    return hashlib.sha256(document.text.encode()).digest()


def _document_means(tokens: _Tokens, n_tokens: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
    """Mean values of each document's tokens, special tokens apart; null where there are none.

    They are named like their columns. ``n_tokens`` are recorded tokens, [n_documents].
    """
    encoded, bounds = tokens.encoded, tokens.encoded.bounds
    special = np.flatnonzero((encoded.flags & SPECIAL) > 0)
    n = np.diff(bounds) - np.bincount(encoded.docs[special], minlength=len(n_tokens))
    none = (n == 0) | (n_tokens == 0)
    filled = np.flatnonzero(np.diff(bounds))  # ``reduceat`` knows no empty ones
    means = {}
    for series, values in tokens.by_series.items():
        counted = values.astype(np.float64)
        counted[special] = 0
        total = np.zeros(len(n_tokens))
        with np.errstate(invalid="ignore"):  # infinities of documents that are refused
            total[filled] = np.add.reduceat(counted, bounds[filled])
        mean = (total / np.where(none, 1, n)).astype(np.float32)
        means[f"mean_{series.name}"] = pa.array(mean, mask=none)
    return means
