"""Plans of runs: which shards a run has, and the request that it answers; written first, verified
on reading.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, TypedDict, cast

import pyarrow as pa

from afn_ray import token_rows
from afn_ray.classes import CLASSES_VERSION
from afn_ray.config import RunConfig
from afn_ray.corpus_values import (
    NOTHING_UNREAD,
    FileInfo,
    FileSlice,
    ReadOptions,
    Shard,
    Unread,
)
from afn_ray.errors import StoreError
from afn_ray.fingerprints import fingerprint, fingerprint_of_rows
from afn_ray.measure import StoredMeasure
from afn_ray.schema import PLAN_SCHEMA, VALUES_VERSION
from afn_ray.store import manifest, storage, uris
from afn_ray.store.checksums import AHEAD, ASK_VERIFY, DAMAGES, parse_table, short
from afn_ray.token_rows import LabelThresholds


class PlanHeader(TypedDict, total=False):
    """The header of a plan; that of an older version lacks some keys."""

    cuts: str | None  # ``cuts_id``; None: later plans cannot take over its slices
    shard_bytes: int
    begun_ns: int
    created_at: str
    config: dict[str, Any]  # fields of the ``RunConfig`` of any version
    measure: StoredMeasure
    frozen: list[LabelThresholds]
    classes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The shards of a run, in order, and the files that they come from."""

    shards: tuple[Shard, ...]
    files: tuple[FileInfo, ...]
    skipped: tuple[FileInfo, ...]
    """Files with an unknown ending, or of a store."""
    num_hashed: int
    """Number of files read for the plan; the hashes of the others were remembered."""
    shard_bytes: int = 0
    """Target size of a shard, in bytes, at which the files were cut."""
    unread: Unread = NOTHING_UNREAD
    """Files of the corpus that are beyond the limit of documents; ``files`` has them, too."""

    @property
    def num_bytes(self) -> int:
        return sum(s.num_bytes for s in self.shards)

    @property
    def num_files(self) -> int:
        """Number of files that are read."""
        return len(self.files) - self.unread.num_files

    @property
    def labels(self) -> str | None:
        """The source of the documents' tags; None if they have none."""
        for shard in self.shards:
            for piece in shard.slices:
                if labels := shard.options.labels_in(piece.format):
                    return labels
        return None


def proved_slices(uri: str, table: pa.Table, header: PlanHeader) -> list[FileSlice]:
    """The slices of the plan at ``uri``, verified against the checksum in ``header``.

    Raises ``StoreError`` if the rows or the header are damaged.
    """
    asked = {key: value for key, value in header.items() if key != "sha256"}
    try:
        rows = table.to_pylist()
        digest = fingerprint_of_rows(asked, [rows] if rows else [])
        slices = [slice_of(row) for row in rows]
    except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
        raise StoreError(f"{uri} is damaged: {error!r}{ASK_VERIFY}") from error
    if header.get("sha256") != digest:
        raise StoreError(
            f"{uri} is damaged: its rows and header do not have the checksum that it "
            f"carries{ASK_VERIFY}"
        )
    return slices


def cuts_id(config: RunConfig, shard_bytes: int) -> str:
    """Fingerprint of everything that decides where files are cut; a
    limit ends the cutting early.
    """
    return fingerprint([VALUES_VERSION, config.read_options.of_all().as_dict(), shard_bytes])


def read_plan(store: str, run: str) -> tuple[pa.Table, PlanHeader] | None:
    """The plan of the run named ``run`` and its header; None if the run crashed before writing it.

    Raises ``StoreError`` if the plan is damaged. ``proved_slices`` verifies its checksum.
    """
    uri = uris.join(store, "runs", run, "plan.parquet")
    data = storage.read_if_there(uri)
    if data is None:
        return None
    table = parse_table(data, uri)
    try:
        header = json.loads((table.schema.metadata or {})[b"afn"])
    except (KeyError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{uri} is damaged: its header cannot be read: {error!r}{ASK_VERIFY}"
        ) from error
    if not isinstance(header, dict):
        raise StoreError(f"{uri} is damaged: its header is {short(header)}{ASK_VERIFY}")
    return table, cast(PlanHeader, header)


def plan_table(shards: Sequence[Shard], header: PlanHeader) -> tuple[pa.Table, str]:
    """The rows of a plan, and the ``fingerprint`` of ``[header, rows]``."""
    pieces = ((i, shard.id, piece) for i, shard in enumerate(shards) for piece in shard.slices)
    names = [f.name for f in fields(FileSlice)]

    def groups() -> Iterator[list[dict[str, object]]]:
        while group := list(itertools.islice(pieces, AHEAD)):
            rows: list[dict[str, object]] = []
            for ordinal, shard, piece in group:
                values = {name: getattr(piece, name) for name in names}
                rows.append({"ordinal": ordinal, "shard": shard, **values})
            tables.append(pa.Table.from_pylist(rows, PLAN_SCHEMA))
            yield rows

    tables = [PLAN_SCHEMA.empty_table()]
    digest = fingerprint_of_rows(header, groups())
    return pa.concat_tables(tables).combine_chunks(), digest


def request_id(
    measure_id: str,
    shards: Iterable[Shard],
    config: RunConfig,
    frozen: Sequence[LabelThresholds] | None,
    classes: int | None = CLASSES_VERSION,
) -> str:
    """Last part of a run's name: a fingerprint of the request.

    A run of a named series is another request than the same run of another series. ``frozen`` is
    None for a plan that was written before frozen thresholds existed, and ``classes`` for one
    from before words had shares.
    """
    ask: dict[str, object] = {
        "measure": measure_id,
        "shards": [s.id for s in shards],
        "language": config.language,
        "sink_factor": config.sink_factor,
    }
    if classes is not None:
        ask["classes"] = classes
    if frozen is not None:
        ask |= {"screen": config.screen, "frozen": list(frozen)}
    if config.group_by is not None:
        ask["group_by"] = config.group_by
    if config.thresholds_by != "run":
        ask["thresholds_by"] = config.thresholds_by
    if config.duplicates != "keep":
        ask["duplicates"] = config.duplicates
    if config.limit is not None:
        ask["limit"] = config.limit
    if not token_rows.is_complete(config.record):
        ask["record"] = config.record
    if config.near_duplicates is not None:
        ask["near_duplicates"] = float(config.near_duplicates)
    if config.series is not None:
        ask["series"] = config.series
    return fingerprint(ask)[:12]


def read_shards(run: manifest.RunFolder) -> tuple[list[Shard], PlanHeader]:
    """The shards that ``run`` planned, in order, and the header of its plan, both verified.

    Raises ``StoreError`` for a plan that is missing, damaged, edited or another run's.
    """
    uri = uris.join(run.uri, "plan.parquet")
    table = manifest.read_table(run, "plan")
    try:
        header: PlanHeader = json.loads(table.schema.metadata[b"afn"])
        rows = table.to_pylist()
        digest = header.pop("sha256")
        if digest != fingerprint([header, rows]):
            raise StoreError(
                f"{uri} is damaged: its rows and header do not have the checksum that it carries"
            )
        config = RunConfig.of_stored(header["config"])
        layers = header["measure"]["layers"]
        record = token_rows.of_shards(config.record, header.get("frozen") or [], layers)
        shards = _shards_of(rows, config.read_options, record, uri)
        suffix = request_id(
            fingerprint(header["measure"]),
            shards,
            config,
            header.get("frozen"),
            header.get("classes"),
        )
    except DAMAGES as error:
        raise StoreError(f"{uri} is damaged: {error!r}") from error
    if not run.id.endswith(f"-{suffix}"):
        raise StoreError(
            f"{uri} is the plan of another run: the name of its run ends with -{suffix}"
        )
    return shards, header


def slice_of(row: Mapping[str, Any]) -> FileSlice:
    """The slice in a ``row`` of a plan, whose other columns say to which shard it belongs."""
    values = {key: value for key, value in row.items() if key not in ("ordinal", "shard")}
    return FileSlice(**values)


def _shards_of(
    rows: Iterable[Mapping[str, Any]], options: ReadOptions, record: str, uri: str
) -> list[Shard]:
    """The shards in the ``rows`` of the plan at ``uri``, whose files are read with ``options``.

    They keep the rows ``record``, or all where a run of summaries uses a shard with rows. Raises
    ``StoreError`` if the id of a shard is not that of its slices.
    """
    shards = []
    for (_, name), group in itertools.groupby(rows, itemgetter("ordinal", "shard")):
        slices = [slice_of(row) for row in group]
        whole = Shard.of(slices, options)
        shard = whole.recording(record)
        if record == token_rows.SUMMARIES and name == whole.id:
            shard = whole
        if name != shard.id:
            raise StoreError(
                f"{uri} is damaged: the slices of its shard {name} are those of shard {shard.id}"
            )
        shards.append(shard)
    return shards


def created_at(run: manifest.RunFolder) -> str:
    """Time at which the run began, in ISO 8601, UTC. Raises ``StoreError`` if its plan is gone."""
    plan = read_plan(run.store, run.id)
    if plan is None:
        raise StoreError(
            f"{run.uri} has lost its plan.parquet; give the 'afn run' command again to begin a new "
            "run"
        )
    return str(plan[1].get("created_at", ""))
