"""Check of one shard's rows against its commit and its measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from afn_ray.measure import Measure
from afn_ray.reduce import neurons
from afn_ray.reduce.histogram import Summary, round_strengths
from afn_ray.reduce.stats import is_high
from afn_ray.schema import (
    MOST_NEURONS,
    PAIRS_SCHEMA,
    SPECIAL,
    SUMMARY_SCHEMA,
    TAGGED_SUMMARY_SCHEMA,
    Series,
    Shard,
    documents_schema,
    neurons_column,
    token_neurons_schema,
    tokens_schema,
)
from afn_ray.store import records
from afn_ray.store.commits import Commit

Ints = npt.NDArray[np.int64]


class Wrong(Exception):
    """An error in a shard's rows: the table (empty: the commit itself) and the message."""


def check_rows(
    tables: Mapping[str, pq.ParquetFile],
    commit: Commit,
    read: Shard,
    measure: Mapping[str, Any] | None,
) -> None:
    """Check the rows of a shard; raise ``Wrong`` at the first error.

    ``measure`` is the stored measure; None where no run has it.
    """
    known = None if measure is None else Measure.of_dict(measure)
    series, tagged = _check_schemas(tables, commit, known)
    columns = [
        "doc",
        "n_tokens",
        "n_windows",
        "n_chars",
        "n_replaced",
        "lost_bytes",
        "lost_documents",
        "status",
    ]
    documents = tables["documents"].read([*columns, *(f"mean_{s.name}" for s in series)])
    counts = _check_documents(documents, tables["tokens"].metadata.num_rows)
    counts["special"], summary = _check_tokens(tables["tokens"], documents, series, tagged)
    if wrong := {k: commit.counts.get(k) for k, n in counts.items() if commit.counts.get(k) != n}:
        raise Wrong("", f"its counts are {wrong}, but the rows give {only(counts, wrong)}")
    planned = [piece.num_documents for piece in read.slices]
    if min(planned) >= 0 and not counts["quarantined"] and sum(planned) != counts["documents"]:
        raise Wrong(
            "documents",
            f"it has {counts['documents']} documents, but the slices read hold {sum(planned)}",
        )
    expected = list(summary.tables())
    if not tables["summary"].read().equals(pa.concat_tables(expected)):
        raise Wrong("summary", "it is not the summary of the tokens beside it")
    groups = [part for part in expected if len(part)]
    if tables["summary"].num_row_groups != len(groups):
        raise Wrong(
            "summary",
            f"it has {tables['summary'].num_row_groups} row groups, expected {len(groups)}",
        )
    if "neurons" in tables:
        pairs = _check_neurons(tables["tokens"], tables["neurons"], known)
        if (
            not tables["pairs"]
            .read()
            .equals(pa.concat_tables([PAIRS_SCHEMA.empty_table(), *pairs.tables()]))
        ):
            raise Wrong("pairs", "it is not the sum of the neurons beside it")


def _check_schemas(
    tables: Mapping[str, pq.ParquetFile], commit: Commit, measure: Measure | None
) -> tuple[tuple[Series, ...], bool]:
    """Check the schemas; return the recorded series, and whether there are tags.

    The expected schema is that of ``measure``. Without it, because no run has that measure, the
    columns of the tokens decide.
    """
    names = tables["tokens"].schema_arrow.names
    parts = [name.rpartition("_") for name in names]
    series = tuple(Series(signal, int(layer)) for signal, _, layer in parts if layer.isdecimal())
    offsets, tagged = "start" in names, "tag" in names
    layers = _neuron_layers(tables["neurons"]) if "neurons" in tables else []
    if measure is not None:
        series, tagged = measure.series, measure.tagged
        offsets, layers = measure.offsets, list(measure.neuron_layers)
    schemas = {
        "tokens": tokens_schema(series, offsets, tagged),
        "documents": documents_schema(series),
        "summary": TAGGED_SUMMARY_SCHEMA if tagged else SUMMARY_SCHEMA,
    }
    if layers:
        schemas |= {"neurons": token_neurons_schema(layers), "pairs": PAIRS_SCHEMA}
    if wrong := sorted(schemas.keys() ^ tables.keys()):
        raise Wrong("", f"its tables are not its measure's: {', '.join(wrong)}")
    for table, file in tables.items():
        if not file.schema_arrow.equals(schemas[table]):
            differs = sorted({*map(str, file.schema_arrow)} ^ {*map(str, schemas[table])})
            raise Wrong(
                table,
                f"its schema is not its measure's: {', '.join(differs) or 'the order of columns'}",
            )
        if file.metadata.num_rows != (rows := commit.files[table].get("rows")):
            raise Wrong(table, f"it has {file.metadata.num_rows} rows, but its commit says {rows}")
    return series, tagged


def _neuron_layers(file: pq.ParquetFile) -> list[int]:
    parts = [name.rpartition("_") for name in file.schema_arrow.names]
    return [int(layer) for _, _, layer in parts if layer.isdecimal()]


def _check_documents(documents: pa.Table, num_tokens: int) -> dict[str, int]:
    """Check ``documents`` and return the counts that they give."""
    n_tokens = documents["n_tokens"].to_numpy()
    status = documents["status"].cast(pa.string())
    quarantined = pc.starts_with(status, "quarantined").to_numpy()
    empty = pc.equal(status, "empty").to_numpy()
    if not np.array_equal(documents["doc"].to_numpy(), np.arange(len(documents))):
        raise Wrong("documents", f"doc is not 0 to {len(documents) - 1}, each once and in order")
    if (wrong := (n_tokens > 0) == (empty | quarantined)).any():
        doc = int(np.argmax(wrong))
        raise Wrong(
            "documents", f"doc {doc} has {n_tokens[doc]} tokens and status {status[doc].as_py()!r}"
        )
    if (total := int(n_tokens.sum())) != num_tokens:
        raise Wrong(
            "tokens", f"it has {num_tokens} rows, but the documents have {total} tokens together"
        )
    return {
        "documents": len(documents),
        "empty": int(empty.sum()),
        "quarantined": int(quarantined.sum()),
        "tokens": total,
        "windows": int(documents["n_windows"].to_numpy().sum()),
        "chars": int(documents["n_chars"].to_numpy().sum()),
        **_check_losses(documents),
    }


def _check_losses(documents: pa.Table) -> dict[str, int]:
    """Check and count what was replaced and lost in ``documents``."""
    replaced, lost_bytes = (documents[name].to_numpy() for name in ("n_replaced", "lost_bytes"))
    unknown = pc.is_null(documents["lost_documents"]).to_numpy()
    known = pc.fill_null(documents["lost_documents"], 0).to_numpy()
    status = documents["status"].cast(pa.string())
    whole = ~pc.starts_with(status, "quarantined").to_numpy() & (lost_bytes == 0)
    wrong = (np.minimum(np.minimum(replaced, lost_bytes), known) < 0) | (
        whole & (unknown | (known > 0))
    )
    if wrong.any():
        doc = int(np.argmax(wrong))
        names = ("status", "n_replaced", "lost_bytes", "lost_documents")
        raise Wrong(
            "documents", f"doc {doc} has {documents.slice(doc, 1).select(names).to_pylist()[0]}"
        )
    return {
        "replaced": int(replaced.sum()),
        "lost_bytes": int(lost_bytes.sum()),
        "lost_documents": int(known.sum()),
        "lost_unknown": int(unknown.sum()),
    }


def _check_tokens(
    file: pq.ParquetFile, documents: pa.Table, series: Sequence[Series], tagged: bool
) -> tuple[int, Summary]:
    """Check ``file``; return its number of special tokens and the summary of all tokens."""
    n_tokens = documents["n_tokens"].to_numpy().astype(np.int64)
    ends = np.cumsum(n_tokens)
    num_special, summary = 0, Summary(series, tagged)
    columns = [
        "position",
        "token_id",
        "flags",
        *(["tag"] if tagged else []),
        *(s.name for s in series),
    ]
    for first, part in records.whole_documents(file, ends, columns):
        rows = np.arange(first, first + len(part))
        docs = np.searchsorted(ends, rows, side="right")
        _check_places(part, first, docs, rows - (ends - n_tokens)[docs])
        flags = part["flags"].to_numpy()
        is_special = (flags & SPECIAL) > 0
        num_special += int(is_special.sum())
        by_series = {s: part[s.name].to_numpy() for s in series}
        for one, values in by_series.items():
            _check_values(one, values, first)
            _check_means(one, values[~is_special], docs, ~is_special, documents)
        tags = part["tag"].cast(pa.string()) if tagged else None
        summary.add(docs.astype(np.int32), part["token_id"].to_numpy(), flags, by_series, tags)
    return num_special, summary


def _check_places(part: pa.Table, first: int, docs: Ints, positions: Ints) -> None:
    """Check that the rows from ``first`` on are the tokens at ``positions`` of ``docs``."""
    for column, expected in (("doc", docs), ("position", positions)):
        got = part[column].to_numpy()
        if (wrong := got != expected).any():
            row = int(np.argmax(wrong))
            raise Wrong(
                "tokens",
                f"row {first + row}: {column} is {got[row]}, expected {expected[row]}; a token is "
                "lost, doubled or out of place",
            )


def _check_values(series: Series, values: npt.NDArray[np.float32], first: int) -> None:
    """Check that the values of the rows from ``first`` on are finite, positive and rounded."""
    is_rounded = round_strengths(values).view(np.uint32) == values.view(np.uint32)
    wrong = ~(np.isfinite(values) & (values >= 0) & is_rounded)
    if wrong.any():
        row = int(np.argmax(wrong))
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
    begin, end = int(docs[0]), int(docs[-1]) + 1
    docs_here, num_docs = docs[is_normal] - begin, end - begin
    sums = np.bincount(docs_here, values.astype(np.float64), num_docs)
    with np.errstate(invalid="ignore"):  # a document of special tokens alone has no mean
        expected = sums / np.bincount(docs_here, minlength=num_docs)
    means = documents[f"mean_{series.name}"][begin:end].to_numpy()
    wrong = ~np.isclose(means, expected, rtol=1e-6, atol=0, equal_nan=True)
    if wrong.any():
        doc = int(np.argmax(wrong))
        raise Wrong(
            "documents",
            f"doc {begin + doc}: mean_{series.name} is {means[doc]}, its tokens give "
            f"{expected[doc]}",
        )


def _check_neurons(
    tokens: pq.ParquetFile, lists: pq.ParquetFile, measure: Measure | None
) -> neurons.PairSummary:
    """Check that ``lists`` has rows for the right tokens, in order; return its pair sums."""
    layers = _neuron_layers(lists)
    above, most = {}, MOST_NEURONS
    if measure is not None:
        above = dict(zip(layers, measure.neurons_above, strict=False))
        most = measure.top_neurons
    pairs, rows, at = neurons.PairSummary(layers), _Rows(lists), 0
    columns = ["doc", "position", "token_id", "flags", *(f"strength_{k}" for k in above)]
    for batch in tokens.iter_batches(records.BATCH_ROWS, columns=columns):
        flags = batch["flags"].to_numpy()
        is_normal = (flags & SPECIAL) == 0
        high = {
            k: is_normal & is_high(batch[f"strength_{k}"].to_numpy(), q3) for k, q3 in above.items()
        }
        which = np.arange(len(batch))
        if above:
            which = np.flatnonzero(np.any(list(high.values()), axis=0))
        part = rows.take(len(which))
        for column in ("doc", "position"):
            expected = batch[column].to_numpy()[which]
            if len(part) < len(which) or (part[column].to_numpy() != expected).any():
                message = f"its rows from {at} on are not of the tokens that should have neurons"
                raise Wrong("neurons", message)
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


def _are_recordable(lists: pa.ListArray, most: int) -> bool:
    """Whether each list has at most ``most`` values, finite, not 0, in descending order."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    if lengths.max(initial=0) > most:
        return False
    values = np.abs(lists.flatten().field("value").to_numpy())
    rises = np.diff(values, prepend=np.inf) > 0
    begins = np.cumsum(lengths) - lengths
    rises[begins[lengths > 0]] = False
    wrong = ~(values < neurons.LIMIT) | (values == 0) | rises
    return not wrong.any()


class _Rows:
    """Rows of a Parquet file in order, in chunks of any size."""

    def __init__(self, file: pq.ParquetFile) -> None:
        self._batches = file.iter_batches(records.BATCH_ROWS)
        self._held = file.schema_arrow.empty_table()

    def take(self, n: int) -> pa.Table:
        """The next ``n`` rows; fewer at the end of the file."""
        while len(self._held) < n and (batch := next(self._batches, None)) is not None:
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])
        taken, self._held = self._held.slice(0, n), self._held.slice(n)
        return taken.combine_chunks()


def only(values: Mapping[str, int], keys: Iterable[str]) -> dict[str, int]:
    """The entries of ``values`` whose keys are in ``keys``."""
    return {k: values[k] for k in keys}
