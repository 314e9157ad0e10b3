"""The contents of a run for DuckDB: its small tables, its files and the SQL of its views."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from afn_ray import kept, token_rows
from afn_ray.config import SIGNAL
from afn_ray.errors import ConfigError, QueryError, StoreError
from afn_ray.query.expressions import RecordedColumns, ShardFile, rows_of
from afn_ray.query.files import ReadOnlyFiles
from afn_ray.query.filling import Statements
from afn_ray.query.own_labels import own_q3, own_tables
from afn_ray.query.shard_views import ShardViews
from afn_ray.query.views import NeuronFiles, statements
from afn_ray.query.word_classes import class_tables
from afn_ray.reduce.compare import compare
from afn_ray.reduce.group_drift import labels_by_group
from afn_ray.schema import (
    ADDED,
    CLASS_DRIFT_SCHEMA,
    COPIED_SCHEMA,
    DRIFT_SCHEMA,
    FILES_SCHEMA,
    GROUP_CLASS_DRIFT_SCHEMA,
    GROUP_CLASSES_SCHEMA,
    GROUP_DRIFT_SCHEMA,
    GROUP_MOVERS_SCHEMA,
    GROUPS_SCHEMA,
    HISTOGRAM_SCHEMA,
    HISTORY_SCHEMA,
    KEPT_SCHEMA,
    LANGUAGES_SCHEMA,
    MEAN_VECTORS_SCHEMA,
    MOMENTS_SCHEMA,
    MOVERS_SCHEMA,
    NEURON_TYPES_SCHEMA,
    NEURONS_SCHEMA,
    OWN_LABELS,
    READABLE_VERSIONS,
    SALIENCE_SCHEMA,
    SCHEMA_VERSION,
    SCREENED_SCHEMA,
    SHARDS_SCHEMA,
    SIGNAL_VOCABULARY_SCHEMA,
    SIGNALS_SCHEMA,
    SOURCES_SCHEMA,
    STRANGE_SCHEMA,
    THRESHOLDS_SCHEMA,
    VOCABULARY_SCHEMA,
    WORD_MOVERS_SCHEMA,
    WORD_VOCABULARY_SCHEMA,
    Series,
)
from afn_ray.store import checksums, label_thresholds, manifest, uris

FILE_NAME = re.compile(r"shards(/\w[\w.-]*){3}\.parquet", re.ASCII)
RUN_FILE_NAME = re.compile(r"runs(/\w[\w.-]*){2}\.parquet", re.ASCII)
"""Safe names of files below a store: the names come from the store and are inserted into SQL."""
SMALL = {
    "vocabulary": VOCABULARY_SCHEMA,
    "thresholds": THRESHOLDS_SCHEMA,
    "shards": SHARDS_SCHEMA,
    "histogram": HISTOGRAM_SCHEMA,
    "files": FILES_SCHEMA,
    "sources": SOURCES_SCHEMA,
    "screened": SCREENED_SCHEMA,
    "strange": STRANGE_SCHEMA,
    "copied": COPIED_SCHEMA,
    "languages": LANGUAGES_SCHEMA,
    "signals": SIGNALS_SCHEMA,
    "signal_vocabulary": SIGNAL_VOCABULARY_SCHEMA,
    "neurons": NEURONS_SCHEMA,
    "moments": MOMENTS_SCHEMA,
    "salience": SALIENCE_SCHEMA,
    "kept": KEPT_SCHEMA,
    "groups": GROUPS_SCHEMA,
    "group_classes": GROUP_CLASSES_SCHEMA,
}
"""Schemas of a run's small tables, by the names of their views."""
MAY_LACK = (
    "histogram",
    "sources",
    "screened",
    "signals",
    "signal_vocabulary",
    "neurons",
    "kept",
    "groups",
    "group_classes",
    "strange",
    "copied",
    "salience",
    "languages",
    "moments",
)
"""Tables that a run may not have, because it is older or did not record them; they are empty."""


@dataclass(frozen=True)
class Contents:
    """The contents of a run for DuckDB."""

    tables: dict[str, pa.Table]
    """Small tables, by the names of their views; ``history`` is empty, see ``database``."""
    files: ReadOnlyFiles
    """The files that the views read."""
    sizes: Mapping[str, int]
    """Sizes of these files in bytes, by their path below the store."""
    statements: Statements
    """SQL that creates the views and macros over the tables and files."""
    shard_views: ShardViews
    """The views that grow with the corpus, shard by shard."""


def read_contents(
    folder: manifest.RunFolder, baseline: manifest.RunFolder | None, before: str
) -> Contents:
    """The contents of a run; ``before`` is the SQL that precedes a file's name.

    ``baseline`` fills ``movers``, ``drift`` and ``class_drift``. Raises ``StoreError`` for a
    damaged run, and ``ConfigError`` for a baseline of another measure.
    """
    with checksums.named_damage(folder.uri):
        tables = _small_tables(folder, baseline)
        files = _shard_files(folder, tables["shards"])
        named: dict[str, tuple[str, int]] = {}
        for of_table in files.values():
            named |= {file.name: (file.uri, file.size) for file in of_table}
        read = ReadOnlyFiles(folder.store, named, partial(manifest.find_blocks, folder))
        made = _shard_views(folder, tables, files, before, read)
    sizes = {name: num_bytes for name, (_, num_bytes) in named.items()}
    tokens = made.files["tokens"]
    documents = made.files["documents"]
    created = statements(tokens, documents, made.neurons, made.recorded)
    return Contents(tables, read, sizes, created, made)


def _small_tables(
    folder: manifest.RunFolder, baseline: manifest.RunFolder | None
) -> dict[str, pa.Table]:
    """All small tables, by the names of their views."""
    tables = {}
    schemas = dict(SMALL)
    if labels_by_group(folder):
        for name in ("groups", "group_classes"):
            schemas[name] = pa.schema([*SMALL[name], *OWN_LABELS[name]])
    screened = SCREENED_SCHEMA
    for field in _kept_fields(folder):
        screened = screened.append(field.with_name(kept.beside(field.name, SCREENED_SCHEMA.names)))
    for name, schema in (schemas | {"screened": screened}).items():
        if name in MAY_LACK and name not in folder.info["tables"]:
            tables[name] = schema.empty_table()
        else:
            tables[name] = _small_table(folder, name, schema)
    # Histograms of many sources are too large for DuckDB.
    for name in ("sources", "groups"):
        tables[name] = tables[name].drop_columns(["bins", "counts"])
    if labels_by_group(folder):
        tables |= own_tables(folder, tables)
    tables |= class_tables(folder.info["config"].get("language", "en"), tables)
    tables["internal.salience"] = tables.pop("salience")
    tables["labels"] = _small_table(folder, label_thresholds.labels_name(folder), THRESHOLDS_SCHEMA)
    tables["run"] = _run_row(folder)
    tables["history"] = HISTORY_SCHEMA.empty_table()
    if baseline is None:
        tables["movers"] = MOVERS_SCHEMA.empty_table()
        tables["drift"] = DRIFT_SCHEMA.empty_table()
        tables["class_drift"] = CLASS_DRIFT_SCHEMA.empty_table()
        tables["group_drift"] = GROUP_DRIFT_SCHEMA.empty_table()
        tables["group_class_drift"] = GROUP_CLASS_DRIFT_SCHEMA.empty_table()
        tables["group_movers"] = GROUP_MOVERS_SCHEMA.empty_table()
        tables["word_movers"] = WORD_MOVERS_SCHEMA.empty_table()
    else:
        found = compare(baseline, folder)
        tables["movers"] = found.movers
        tables["drift"] = found.drift
        tables["class_drift"] = found.classes
        tables["group_drift"] = found.groups.drift
        tables["group_class_drift"] = found.groups.classes
        tables["group_movers"] = found.groups.movers
        tables["word_movers"] = found.word_movers
    tables["internal.no_neuron_types"] = NEURON_TYPES_SCHEMA.empty_table()
    tables["internal.no_words"] = WORD_VOCABULARY_SCHEMA.empty_table()
    tables["internal.no_mean_vectors"] = MEAN_VECTORS_SCHEMA.empty_table()
    return tables


def _kept_fields(folder: manifest.RunFolder) -> list[pa.Field]:
    """The fields of the run's kept columns. Raises ``StoreError`` for names that no run has."""
    spec = folder.info["config"].get("keep_columns")
    try:
        fields = kept.fields_of(spec or "")
    except (ConfigError, AttributeError, TypeError) as error:
        raise StoreError(f"{folder.uri}/run.json is damaged: {error}") from error
    return [pa.field(f.name, _without_dictionary(f.type)) for f in fields]


def _without_dictionary(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _shard_views(
    folder: manifest.RunFolder,
    tables: Mapping[str, pa.Table],
    files: Mapping[str, Sequence[_TableFile]],
    before: str,
    read: ReadOnlyFiles,
) -> ShardViews:
    """The run's views over its ``files``, which its ``tables`` describe.

    ``before`` is the SQL that precedes a file's name. ``read`` opens files to find their columns.
    Raises ``StoreError`` for a damaged run.
    """
    thresholds = {
        row["layer"]: row for row in tables["labels"].to_pylist() if row["population"] == "tokens"
    }
    layers = folder.info["layers"]
    if not all(isinstance(layer, int) and layer in thresholds for layer in layers):
        raise StoreError(
            f"{folder.uri}/run.json is damaged: layers is {layers}, thresholds are of "
            f"{list(thresholds)}"
        )
    others = [Series(row["signal"], row["layer"]) for row in tables["signals"].to_pylist()]
    for series in others:
        if not SIGNAL.fullmatch(series.signal):
            raise StoreError(
                f"{folder.uri}/signals.parquet is damaged: {series.name!r} is no signal"
            )
    paths = {table: _paths(of_table, before) for table, of_table in files.items()}
    columns = _columns(read, files["tokens"][0].name)
    of_corpus = [field.name for field in _kept_fields(folder)]
    own = None
    if labels_by_group(folder):
        own = partial(own_q3, folder, layers=layers)
    copies, near_copies, word_table, mean_vectors = (
        paths[table][0].path if table in paths else None for table in WHOLE_RUN_FILES
    )
    has_offsets = not {"start", "start_ahead"}.isdisjoint(columns)
    is_tagged = "tag" in columns
    recorded = RecordedColumns(
        layers,
        thresholds,
        others,
        has_offsets,
        is_tagged,
        of_corpus,
        own_q3=None if own is None else own(rows_of(paths["documents"])),
        copies=copies,
        near_copies=near_copies,
        word_table=word_table,
        detected=folder.info["measure"].get("languages") is not None,
        mean_vectors=mean_vectors,
        record=token_rows.record_of(folder.info["config"]),
    )
    neurons = None
    if "neurons" in paths:
        neuron_layers = _neuron_layers(_columns(read, files["neurons"][0].name))
        neurons = NeuronFiles(neuron_layers, paths["neurons"], paths["neuron_types"][0].path)
    return ShardViews(paths, recorded, neurons, own)


def _neuron_layers(columns: Sequence[str]) -> list[int]:
    """Layers whose neurons the table with ``columns`` has."""
    found = [re.fullmatch(r"neurons_(\d+)", column) for column in columns]
    return [int(match[1]) for match in found if match]


def _columns(files: ReadOnlyFiles, name: str) -> list[str]:
    """Column names of a Parquet file. Raises ``StoreError`` if it is damaged."""
    try:
        names: list[str] = pq.read_schema(files.open(name)).names
    except PermissionError as error:
        raise QueryError(str(error)) from error
    except (OSError, pa.ArrowException) as error:
        failed, files.failed = files.failed, None
        if failed is not None:
            raise failed from error
        raise StoreError(f"{name} of the store is damaged: {error}") from error
    return names


def _small_table(folder: manifest.RunFolder, name: str, schema: pa.Schema) -> pa.Table:
    """The run's table ``name`` as ``schema``. Raises ``StoreError`` if it is damaged."""
    try:
        table = manifest.read_table(folder, name)
        for added in ADDED.get(name, ()):
            if added not in table.column_names:
                table = table.append_column(added, pa.nulls(len(table)))
        return table.select(schema.names).cast(schema)
    except checksums.DAMAGES as error:
        raise StoreError(f"{folder.uri}/{name}.parquet is damaged: {error}") from error


class _TableFile(NamedTuple):
    """A file of a shard's table, or a file of the run."""

    name: str  # path below the store
    uri: str
    size: int  # bytes
    shard: Mapping[str, Any]  # row of ``shards``


AFN = "'afn://' || "
"""SQL before a file's name that reads it through ``files.ReadOnlyFiles``."""


def _shard_files(folder: manifest.RunFolder, shards: pa.Table) -> dict[str, list[_TableFile]]:
    """The files that the views read, by table, in the order of the run's shards.

    Raises ``StoreError`` for names that are missing or not safe.
    """
    files: dict[str, list[_TableFile]] = {"tokens": [], "documents": [], "neurons": []}
    for shard in shards.to_pylist():
        for table, of_table in files.items():
            name = shard[f"{table}_file"]
            if name is None and table == "neurons":
                continue
            if not FILE_NAME.fullmatch(name or ""):
                raise StoreError(
                    f"{folder.uri}/shards.parquet is damaged: {name!r} is not the name of a "
                    "shard's file"
                )
            of_table.append(
                _TableFile(name, uris.join(folder.store, name), shard[SIZES[table]], shard)
            )
    if not files["tokens"] or len(files["neurons"]) not in (0, len(files["tokens"])):
        raise StoreError(
            f"{folder.uri}/shards.parquet is damaged: it does not name its shards' files"
        )
    found = {name: of_table for name, of_table in files.items() if of_table}
    if files["neurons"]:
        found["neuron_types"] = [_run_file(folder, "neuron_types")]
    for table in WHOLE_RUN_FILES:
        if table in folder.info["tables"]:
            found[table] = [_run_file(folder, table)]
    return found


def _run_file(folder: manifest.RunFolder, table: str) -> _TableFile:
    """The file of the run's ``table``. Raises ``StoreError`` for a name that is not safe."""
    entry = folder.info["tables"].get(table)
    path = f"runs/{folder.id}/{entry.get('name') if entry else None}"
    if entry is None or not RUN_FILE_NAME.fullmatch(path):
        raise StoreError(
            f"{folder.uri}/run.json is damaged: {path!r} is not the name of a run's table"
        )
    return _TableFile(path, uris.join(folder.store, path), entry["bytes"], NO_SHARD)


WHOLE_RUN_FILES = ("duplicates", "near_duplicates", "word_vocabulary", "mean_vectors")
"""Tables of a run, beside its small ones, that a run may have."""
SIZES = {"tokens": "token_bytes", "documents": "document_bytes", "neurons": "neurons_bytes"}
"""Column of ``shards`` with the size of each table's file, in bytes."""
NO_SHARD = {"doc_offset": 0, "n_documents": 0, "n_tokens": 0, "schema_version": SCHEMA_VERSION}
"""Row of ``shards`` for a file that belongs to no shard."""


def _paths(files: Sequence[_TableFile], before: str) -> list[ShardFile]:
    """``files`` as the views read them; ``before`` is the SQL that precedes a name.

    Names have neither quotes nor spaces (``FILE_NAME``, ``RUN_FILE_NAME``).
    """
    return [
        ShardFile(
            f"{before}'{f.name}'",
            f.shard["doc_offset"],
            f.shard["n_documents"],
            f.shard["n_tokens"],
            None if before == AFN else f.name.split("/")[-2],
            schema_version=f.shard["schema_version"] or READABLE_VERSIONS[0],
        )
        for f in files
    ]


def _run_row(folder: manifest.RunFolder) -> pa.Table:
    """run.json as one row: the important values as columns, the rest as JSON."""
    info = folder.info
    config = info.get("config", {})
    measure = info.get("measure", {})
    row = {
        "id": folder.id,
        "uri": folder.uri,
        "model": info.get("model", {}).get("name"),
        "layers": info["layers"],
        "corpus": list(config.get("corpus", ())),
        "created_at": _utc(info.get("created_at")),
        "finished_at": _utc(info.get("finished_at")),
        "seconds": info.get("seconds"),
        **{f"n_{name}": n for name, n in info.get("counts", {}).items()},
        "measure": measure.get("id"),
        "config": json.dumps(config),
        "info": json.dumps(info),
    }
    return pa.Table.from_pylist([row])


def _utc(iso: str | None) -> datetime | None:
    return None if iso is None else datetime.fromisoformat(iso).astimezone(UTC).replace(tzinfo=None)
