"""Check of one shard's rows against its commit and its measure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import kept
from afn_ray.analysis import some_rows, vector_check
from afn_ray.corpus_values import ReadOptions, Shard
from afn_ray.measure import Measure
from afn_ray.reduce import neurons
from afn_ray.reduce.histogram import round_strengths
from afn_ray.reduce.shard_summary import Spoken, Summary
from afn_ray.reduce.stats import is_high
from afn_ray.schema import (
    LANGUAGE,
    MOST_NEURONS,
    PAIRS_SCHEMA,
    SPECIAL,
    VECTORS_SCHEMA,
    Series,
    documents_schema,
    neurons_column,
    summary_schema,
    token_neurons_schema,
    tokens_schema,
)
from afn_ray.store import layout, records
from afn_ray.store.commits import Commit
from afn_ray.store.shard_tables import DOC, ShardTable
from afn_ray.text import count

Ints = npt.NDArray[np.int64]


class Wrong(Exception):
    """An error in a shard's rows: the table (empty: the commit itself) and the message."""


def check_rows(
    tables: Mapping[str, ShardTable],
    commit: Commit,
    read: Shard,
    measure: Measure | None,
) -> None:
    """Check the rows of a shard; raise ``Wrong`` at the first error.

    ``measure`` is None where no run has it.
    """
    series, tagged, detected = _check_schemas(tables, commit, measure, read.options)
    columns = [
        DOC,
        "n_tokens",
        "n_windows",
        "n_chars",
        "n_replaced",
        "lost_bytes",
        "lost_documents",
        "status",
        *([LANGUAGE] if detected else []),
        *(some_rows.OF_DOCUMENTS if read.options.record else ()),
    ]
    documents = tables["documents"].read([*columns, *(f"mean_{s.name}" for s in series)])
    counts = _check_documents(documents)
    if record := read.options.record:
        # Summaries of all tokens cannot be computed again from the rows of some.
        if message := some_rows.wrong_rows(tables["tokens"], documents, series, record):
            raise Wrong("tokens", message)
        _check_counts(counts, commit, read)
        return
    if (num_rows := tables["tokens"].metadata.num_rows) != counts["tokens"]:
        message = (
            f"it has {count(num_rows, 'row')}, but the documents have "
            f"{count(counts['tokens'], 'token')} together"
        )
        raise Wrong("tokens", message)
    counts["special"], summary = _check_tokens(tables["tokens"], documents, series, tagged)
    if measure is not None and (message := vector_check.impossible(tables["tokens"], measure)):
        raise Wrong("tokens", message)
    _check_counts(counts, commit, read)
    _check_summary(tables["summary"], summary)
    if "neurons" in tables:
        pairs = _check_neurons(tables["tokens"], tables["neurons"], measure)
        expected = pa.concat_tables([PAIRS_SCHEMA.empty_table(), *pairs.tables()])
        if not tables["pairs"].read().equals(expected):
            raise Wrong("pairs", "it is not the sum of the neurons beside it")
    if layout.VECTORS in tables and (message := vector_check.wrong_sums(tables, measure)):
        raise Wrong(layout.VECTORS, message)


def _check_counts(counts: Mapping[str, int], commit: Commit, read: Shard) -> None:
    """Check the ``counts`` of the rows against the commit and against the slices read."""
    wrong = differing(commit.counts, counts)
    if wrong:
        raise Wrong("", f"its counts are {wrong}, but the rows give {only(counts, wrong)}")
    planned = [piece.num_documents for piece in read.slices]
    is_known = min(planned) >= 0 and not counts["quarantined"]
    num_read = counts["documents"] + commit.counts.get("unselected", 0)
    if is_known and sum(planned) != num_read:
        raise Wrong(
            "documents",
            f"it has {count(num_read, 'document')}, but the slices read hold {sum(planned)}",
        )


def _check_summary(file: ShardTable, summary: Summary) -> None:
    """Check that ``file`` holds ``summary``, with a row group for each table that has rows."""
    expected = list(summary.tables())
    if not file.read().equals(pa.concat_tables(expected)):
        raise Wrong("summary", "it is not the summary of the tokens beside it")
    num_groups = sum(len(table) > 0 for table in expected)
    if file.num_row_groups != num_groups:
        raise Wrong(
            "summary", f"it has {count(file.num_row_groups, 'row group')}, expected {num_groups}"
        )


def _check_schemas(
    tables: Mapping[str, ShardTable],
    commit: Commit,
    measure: Measure | None,
    options: ReadOptions,
) -> tuple[tuple[Series, ...], bool, bool]:
    """Check the schemas; return the recorded series, and whether there are tags and languages.

    The expected schema is that of ``measure``, with the columns that ``options`` keep. Without a
    measure, because no run has it, the columns of the tokens and documents decide.
    """
    names = tables["tokens"].schema.names
    if measure is not None:
        series = measure.series
        tagged = measure.tagged
        offsets = measure.offsets
        detected = measure.detected
        layers = list(measure.neuron_layers)
    else:
        series = tuple(Series(signal, layer) for signal, layer in _by_layer(names))
        tagged, offsets = "tag" in names, "length" in names
        of_corpus = [column.name for column in kept.parse(options.keep)]
        of_documents = {*tables["documents"].schema.names} - {*of_corpus}
        detected = LANGUAGE in of_documents
        layers = _neuron_layers(tables["neurons"]) if "neurons" in tables else []
    schemas = {
        "tokens": tokens_schema(series, offsets, tagged),
        "documents": documents_schema(series, kept.fields_of(options.keep), detected),
        "summary": summary_schema(tagged=tagged, detected=detected),
    }
    if layers:
        schemas |= {"neurons": token_neurons_schema(layers), "pairs": PAIRS_SCHEMA}
    has_vectors = layout.VECTORS in tables if measure is None else bool(measure.mean_types)
    if has_vectors:
        schemas[layout.VECTORS] = VECTORS_SCHEMA
    if wrong := sorted(schemas.keys() ^ tables.keys()):
        raise Wrong("", f"its tables are not its measure's: {', '.join(wrong)}")
    for table, file in tables.items():
        _check_schema(table, file, schemas[table])
        if file.has_documents and file.schema_version != commit.schema_version:
            found, of_commit = file.schema_version, commit.schema_version
            raise Wrong(table, f"it has schema version {found}, but its commit says {of_commit}")
        num_rows = commit.files[table].get("rows")
        if file.metadata.num_rows != num_rows:
            message = (
                f"it has {count(file.metadata.num_rows, 'row')}, but its commit says {num_rows}"
            )
            raise Wrong(table, message)
    return series, tagged, detected


def _check_schema(table: str, file: ShardTable, expected: pa.Schema) -> None:
    found = file.schema
    if not found.equals(expected):
        fields = sorted({*map(str, found)} ^ {*map(str, expected)})
        differs = ", ".join(fields) or "the order of columns"
        raise Wrong(table, f"its schema is not its measure's: {differs}")


def _by_layer(columns: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Signal and layer of each of ``columns`` that has a layer."""
    for column in columns:
        signal, _, layer = column.rpartition("_")
        if layer.isdecimal():
            yield signal, int(layer)


def _neuron_layers(file: ShardTable) -> list[int]:
    return [layer for _, layer in _by_layer(file.schema.names)]


def _check_documents(documents: pa.Table) -> dict[str, int]:
    """Check ``documents`` and return the counts that they give."""
    docs = documents[DOC].to_numpy()
    n_tokens = documents["n_tokens"].to_numpy()
    status = documents["status"].cast(pa.string())
    is_quarantined = pc.starts_with(status, "quarantined").to_numpy()
    is_empty = pc.equal(status, "empty").to_numpy()
    if not np.array_equal(docs, np.arange(len(docs))):
        raise Wrong("documents", f"{DOC} is not 0 to {len(docs) - 1}, each once and in order")
    wrong = (n_tokens > 0) == (is_empty | is_quarantined)
    if wrong.any():
        doc = int(np.argmax(wrong))
        message = (
            f"doc {doc} has {count(n_tokens[doc], 'token')} and status {status[doc].as_py()!r}"
        )
        raise Wrong("documents", message)
    total = int(n_tokens.sum())
    return {
        "documents": len(docs),
        "empty": int(is_empty.sum()),
        "quarantined": int(is_quarantined.sum()),
        "tokens": total,
        "windows": int(documents["n_windows"].to_numpy().sum()),
        "chars": int(documents["n_chars"].to_numpy().sum()),
        **_check_losses(documents),
    }


def _check_losses(documents: pa.Table) -> dict[str, int]:
    """Check and count what was replaced and lost in ``documents``."""
    replaced = documents["n_replaced"].to_numpy()
    lost_bytes = documents["lost_bytes"].to_numpy()
    is_unknown = pc.is_null(documents["lost_documents"]).to_numpy()
    lost_documents = pc.fill_null(documents["lost_documents"], 0).to_numpy()
    status = documents["status"].cast(pa.string())
    is_quarantined = pc.starts_with(status, "quarantined").to_numpy()
    is_whole = ~is_quarantined & (lost_bytes == 0)
    is_negative = (replaced < 0) | (lost_bytes < 0) | (lost_documents < 0)
    lost_without_bytes = is_whole & (is_unknown | (lost_documents > 0))
    wrong = is_negative | lost_without_bytes
    if wrong.any():
        doc = int(np.argmax(wrong))
        names = ("status", "n_replaced", "lost_bytes", "lost_documents")
        (row,) = documents.slice(doc, 1).select(names).to_pylist()
        raise Wrong("documents", f"doc {doc} has {row}")
    return {
        "replaced": int(replaced.sum()),
        "lost_bytes": int(lost_bytes.sum()),
        "lost_documents": int(lost_documents.sum()),
        "lost_unknown": int(is_unknown.sum()),
    }


def _check_tokens(
    file: ShardTable, documents: pa.Table, series: Sequence[Series], tagged: bool
) -> tuple[int, Summary]:
    """Check ``file``; return its number of special tokens and the summary of all tokens."""
    n_tokens = documents["n_tokens"].to_numpy().astype(np.int64)
    ends = np.cumsum(n_tokens)
    begins = ends - n_tokens
    detected = not tagged and LANGUAGE in documents.column_names
    num_special = 0
    summary = Summary(series, tagged=tagged, spoken=detected)
    columns = ["position", "token_id", "flags", *(s.name for s in series)]
    if tagged:
        columns.append("tag")
    for first, part in records.whole_documents(file, ends, columns):
        rows = np.arange(first, first + len(part))
        docs = np.searchsorted(ends, rows, side="right")
        _check_places(part, first, docs, rows - begins[docs])
        flags = part["flags"].to_numpy()
        is_special = (flags & SPECIAL) > 0
        num_special += int(is_special.sum())
        by_series = {s: part[s.name].to_numpy() for s in series}
        for one, values in by_series.items():
            _check_values(one, values, first)
            _check_means(one, values[~is_special], docs, ~is_special, documents)
        token_ids = part["token_id"].to_numpy()
        tags = part["tag"].cast(pa.string()) if tagged else None
        spoken = None
        if detected:
            languages = documents[LANGUAGE].cast(pa.string()).combine_chunks()
            spoken = Spoken.of(docs.astype(np.int32), languages)
        summary.add(docs.astype(np.int32), token_ids, flags, by_series, tags, spoken)
    return num_special, summary


def _check_places(part: pa.Table, first: int, docs: Ints, positions: Ints) -> None:
    """Check that the rows from ``first`` on are the tokens at ``positions`` of ``docs``."""
    for column, expected in ((DOC, docs), ("position", positions)):
        got = part[column].to_numpy()
        wrong = got != expected
        if wrong.any():
            row = int(np.argmax(wrong))
            raise Wrong(
                "tokens",
                f"row {first + row}: {column} is {got[row]}, expected {expected[row]}; a token is "
                "lost, doubled or out of place",
            )


def _check_values(series: Series, values: npt.NDArray[np.float32], first: int) -> None:
    """Check that the values of the rows from ``first`` on are finite, 0 or more, and rounded."""
    rounded = round_strengths(values)
    is_rounded = rounded.view(np.uint32) == values.view(np.uint32)
    is_recordable = np.isfinite(values) & (values >= 0) & is_rounded
    if not is_recordable.all():
        row = int(np.argmin(is_recordable))
        message = f"row {first + row}: {series.name} is {values[row]}, which is never recorded"
        raise Wrong("tokens", message)


def _check_means(
    series: Series,
    values: npt.NDArray[np.float32],
    docs: Ints,
    is_normal: npt.NDArray[np.bool_],
    documents: pa.Table,
) -> None:
    """Check the means of ``documents`` against the ``values`` of their normal tokens.

    ``docs`` and ``is_normal`` are of all tokens.
    """
    begin = int(docs[0])
    end = int(docs[-1]) + 1
    docs_here = docs[is_normal] - begin
    num_docs = end - begin
    sums = np.bincount(docs_here, values.astype(np.float64), num_docs)
    n_tokens = np.bincount(docs_here, minlength=num_docs)
    with np.errstate(invalid="ignore"):  # a document of special tokens alone has no mean
        expected = sums / n_tokens
    column = f"mean_{series.name}"
    means = documents[column][begin:end].to_numpy()
    is_mean = np.isclose(means, expected, rtol=1e-6, atol=0, equal_nan=True)
    if not is_mean.all():
        doc = int(np.argmin(is_mean))
        message = f"doc {begin + doc}: {column} is {means[doc]}, its tokens give {expected[doc]}"
        raise Wrong("documents", message)


def _check_neurons(
    tokens: ShardTable, lists: ShardTable, measure: Measure | None
) -> neurons.PairSummary:
    """Check that ``lists`` has rows for the right tokens, in order; return its pair sums."""
    layers = _neuron_layers(lists)
    above: dict[int, float] = {}
    most = MOST_NEURONS
    if measure is not None:
        above = dict(zip(layers, measure.neurons_above, strict=False))
        most = measure.top_neurons
    pairs = neurons.PairSummary(layers)
    rows = _Rows(lists)
    at = 0
    columns = [DOC, "position", "token_id", "flags", *(f"strength_{k}" for k in above)]
    for batch in tokens.batches(records.BATCH_ROWS, columns):
        flags = batch["flags"].to_numpy()
        is_normal = (flags & SPECIAL) == 0
        high = {}  # by layer, where only HIGH tokens have neurons
        for k, q3 in above.items():
            high[k] = is_normal & is_high(batch[f"strength_{k}"].to_numpy(), q3)
        which = np.arange(len(batch))
        if above:
            is_high_somewhere = np.any(list(high.values()), axis=0)
            which = np.flatnonzero(is_high_somewhere)
        part = rows.take(len(which))
        _check_tokens_of_lists(part, batch, which, at)
        for k in layers:
            lists_here = part[neurons_column(k)].combine_chunks()
            if k in above:
                has_neurons = lists_here.is_valid().to_numpy(zero_copy_only=False)
                if not np.array_equal(has_neurons, high[k][which]):
                    message = (
                        f"rows from {at} on: not the tokens HIGH at layer {k} have its neurons"
                    )
                    raise Wrong("neurons", message)
            if not _are_recordable(lists_here, most):
                message = f"rows from {at} on: values at layer {k} that are never recorded"
                raise Wrong("neurons", message)
        pairs.add(batch["token_id"].to_numpy()[which], flags[which], part)
        at += len(which)
    if len(rows.take(1)):
        raise Wrong("neurons", f"it has more than the {at} rows that its tokens should have")
    return pairs


def _check_tokens_of_lists(part: pa.Table, batch: pa.RecordBatch, which: Ints, at: int) -> None:
    """Check that ``part``, the rows from ``at`` on, has the tokens ``which`` of ``batch``."""
    for column in (DOC, "position"):
        expected = batch[column].to_numpy()[which]
        if not np.array_equal(part[column].to_numpy(), expected):
            message = f"its rows from {at} on are not of the tokens that should have neurons"
            raise Wrong("neurons", message)


def _are_recordable(lists: pa.ListArray, most: int) -> bool:
    """True if each list has at most ``most`` values, finite, not 0, in descending order."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    if lengths.max(initial=0) > most:
        return False
    items = lists.flatten()
    values = np.abs(items.field("value").to_numpy())
    is_value = (values > 0) & (values < neurons.LIMIT)
    rises = np.diff(values, prepend=np.inf) > 0
    begins = np.cumsum(lengths) - lengths
    rises[begins[lengths > 0]] = False
    return bool((is_value & ~rises).all())


class _Rows:
    """Rows of a Parquet file in order, in chunks of any size."""

    def __init__(self, file: ShardTable) -> None:
        self._batches = file.batches(records.BATCH_ROWS)
        self._held = file.schema.empty_table()

    def take(self, n: int) -> pa.Table:
        """The next ``n`` rows; fewer at the end of the file."""
        while len(self._held) < n:
            batch = next(self._batches, None)
            if batch is None:
                break
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])
        taken = self._held.slice(0, n)
        self._held = self._held.slice(n)
        return taken.combine_chunks()


def differing(stored: Mapping[str, Any], expected: Mapping[str, int]) -> dict[str, object]:
    """The ``stored`` values that are not as ``expected``; None for a missing one."""
    return {key: stored.get(key) for key, n in expected.items() if stored.get(key) != n}


def only(values: Mapping[str, int], keys: Iterable[str]) -> dict[str, int]:
    """The entries of ``values`` whose keys are in ``keys``."""
    return {k: values[k] for k in keys}
