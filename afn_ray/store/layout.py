"""Names of the files in a store, and which files below a folder belong to a store.

Layout of a store::

    shards/<measure>/<shard>/commit.json        the commit; its existence is the truth
    shards/<measure>/<shard>/commit-<n>.json    the same, after a gc condemned the last (``epochs``)
    shards/<measure>/<shard>/<attempt>-<table>.parquet
    runs/<run>/plan.parquet                     written first; also remembers the hashes of files
    runs/<run>/run.json                         written once, last; its existence means complete
    runs/<run>/audited.json                     an audit has given its verdict on the run
    runs/<run>/verdict.json                     the last such verdict; replaced as a whole
    runs/<run>/figures-<hash>.json              figures that a later audit found; written once
    runs/<run>/accepted.json                    somebody accepted a broken night as a baseline
    runs/<run>/{shards,thresholds,histogram,vocabulary}.parquet
    runs/<run>/lease-<id>.json                  a process has resumed the run; deleted on completion
    runs/<run>/status.json                      progress, for people; replaced during the run
    planning.json                               progress of a run that has no name yet
    pilots/<key>.json                           decision of a calibration, for later runs
    .rayignore                                  keeps a store on a disk out of Ray jobs
    gc/<epoch>.parquet                          what garbage collections condemned (``epochs``)

Nothing depends on the two progress files. Each other file can be verified: a JSON file carries a
checksum of all its other bytes (``checksummed``), and the size and checksum of a Parquet file are
listed in the commit.json or run.json that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from afn_ray.store import storage, uris

EPOCHS = "gc"
"""Folder of the epochs that garbage collections publish."""
EPOCH_FILE = re.compile(r"[0-9]{8}\.parquet")
ShardKey = tuple[str, str]
"""A shard in a store: the fingerprint of its measure, and the shard's id."""
HEX = re.compile("[0-9a-f]{32}")
"""A fingerprint or id: 128 bits in hex."""
STAMP = "%Y%m%dT%H%M%S.%fZ"
"""Time format of a run's start, the first part of its name."""
RUN_NAME = re.compile(r"([1-3][0-9]{7}T[0-9]{6}\.[0-9]{3}Z)-[0-9a-f]{12}")
"""Name of a run's folder. Names from the year 4000 on do not match and count as foreign."""
LATEST = datetime(3000, 1, 1, tzinfo=UTC)
"""Latest start time used in a run's name, UTC.

A clock beyond it is wrong, and later runs need names that sort after it.
"""
SCRATCH_PREFIX = "afn-scratch-"
"""Prefix of the folder that holds an attempt's unfinished files."""
PLANNING = "planning.json"
"""Status file of a run that has no name yet."""
RAY_IGNORE = ".rayignore"
"""File that makes Ray leave a folder out of the files that it uploads with a job."""

STORE_FILE = re.compile(
    rf"/(?:shards/{HEX.pattern}/{HEX.pattern}/[^/]+|"
    rf"runs/{RUN_NAME.pattern}/[^/]+|pilots/{HEX.pattern}\.json|"
    rf"gc/[0-9]{{8}}\.parquet|{re.escape(RAY_IGNORE)}|"
    rf"probe-{HEX.pattern}|{SCRATCH_PREFIX}[^/]+/[^/]+)$"
)
"""End of the path of any file in a store or in an attempt's scratch folder."""


def is_run_name(name: str) -> bool:
    """True if ``name`` is a valid name of a run."""
    match = RUN_NAME.fullmatch(name)
    try:
        return match is not None and bool(datetime.strptime(match[1], STAMP))
    except ValueError:
        return False


def is_store_file(uri: str) -> bool:
    """True if the path of ``uri`` is that of a file in any store or scratch folder."""
    return STORE_FILE.search(uri) is not None


TABLES = ("tokens", "documents", "summary")
NEURON_TABLES = ("neurons", "pairs")
"""Further tables of a shard whose neurons are recorded."""
VECTORS = "vectors"
"""Further table of a shard whose hidden states are added up by type."""
RUN_TABLES = (
    "plan", "shards", "thresholds", "histogram", "vocabulary", "frozen", "files", "kept", "sources",
    "screened", "strange", "signals", "signal_vocabulary", "neurons", "neuron_types", "groups",
    "group_types", "group_classes", "duplicates", "near_duplicates", "copied", "salience",
    "word_vocabulary", "languages", "moments", "mean_vectors",
)  # fmt: skip
PROBE = re.compile("probe-[0-9a-f]{32}")
COMMIT = re.compile(r"commit(?:-([1-9][0-9]{0,8}))?\.json")
LEASE = re.compile(r"lease-[0-9a-f]{32}\.json")
SHARD_FILE = re.compile(
    rf"{COMMIT.pattern}|[0-9a-f]{{16}}-({'|'.join((*TABLES, *NEURON_TABLES, VECTORS))})\.parquet"
)
STATUS = "status.json"
RUN_FILE = re.compile(
    rf"(run|audited|verdict|accepted|status)\.json|{LEASE.pattern}|"
    rf"({'|'.join(RUN_TABLES)})(-[0-9a-f]{{16}})?\.parquet"
)


@dataclass(slots=True)
class StoreFiles:
    """The files of a store, grouped by owner, including those of killed attempts and reduces."""

    shards: dict[ShardKey, list[storage.StoredFile]] = field(default_factory=dict)
    runs: dict[str, list[storage.StoredFile]] = field(default_factory=dict)
    pilots: list[str] = field(default_factory=list)
    """Names of the calibration files."""
    probes: list[storage.StoredFile] = field(default_factory=list)
    """Probe files, and temporary copies of epochs and of ``PLANNING``, left by killed processes."""
    planning: list[storage.StoredFile] = field(default_factory=list)
    """Status of a run that has no name yet."""
    ignore: list[storage.StoredFile] = field(default_factory=list)
    """The files that keep the store out of Ray jobs."""
    foreign: list[str] = field(default_factory=list)
    """URIs of files that afn-ray never writes."""


def sort_files(store: str, files: Iterable[storage.StoredFile]) -> StoreFiles:
    """Group ``files``, listed below ``store``, by name alone.

    Each file is in exactly one group. Only complete epoch files are in none.
    """
    root = f"{uris.absolute(store)}/"
    there = StoreFiles()
    for file in files:
        match file.uri.removeprefix(root).split("/"):
            case ["shards", measure, shard, name] if _is_shard_file(measure, shard, name):
                there.shards.setdefault((measure, shard), []).append(file)
            case ["runs", run, name] if is_run_name(run) and RUN_FILE.fullmatch(_final(name)):
                there.runs.setdefault(run, []).append(file)
            case ["pilots", name] if name.endswith(".json"):
                there.pilots.append(name)
            case [folder, name] if folder == EPOCHS and EPOCH_FILE.fullmatch(_final(name)):
                if name != _final(name):
                    there.probes.append(file)
            case [name] if _is_probe(name):
                there.probes.append(file)
            case [name] if name == PLANNING:
                there.planning.append(file)
            case [name] if _final(name) == RAY_IGNORE:
                there.ignore.append(file)
            case _:
                there.foreign.append(file.uri)
    return there


def _is_probe(name: str) -> bool:
    """True if ``name`` is a probe file, or a temporary copy of ``PLANNING``."""
    final = _final(name)
    if final == PLANNING:
        return name != PLANNING
    return PROBE.fullmatch(final) is not None


def _is_shard_file(measure: str, shard: str, name: str) -> bool:
    is_folder = HEX.fullmatch(measure) is not None and HEX.fullmatch(shard) is not None
    return is_folder and SHARD_FILE.fullmatch(_final(name)) is not None


def _final(name: str) -> str:
    """The intended name of a temporary file that a killed local write left; else ``name``."""
    unfinished = re.fullmatch(r"\.(.+)-[0-9a-f]{32}", name)
    return unfinished[1] if unfinished else name


def commit_name(generation: int) -> str:
    """Name of the commit of a shard with that generation."""
    return f"commit-{generation}.json" if generation else "commit.json"


def generation_of(name: str) -> int | None:
    """The generation of the commit called ``name``; None for any other file."""
    found = COMMIT.fullmatch(name)
    if found is None:
        return None
    return int(found[1] or 0)
