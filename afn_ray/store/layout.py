"""Names in a store, and which of the files below any folder are a store's own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from afn_ray.store import storage

EPOCHS = "gc"
"""Folder of what collections have given up."""
EPOCH_FILE = re.compile(r"[0-9]{8}\.parquet")
Place = tuple[str, str]
"""A shard in a store: fingerprint of its measure, and its id."""
HEX = re.compile("[0-9a-f]{32}")
STAMP = "%Y%m%dT%H%M%S.%fZ"
"""Beginning of a run, the first part of its name."""
RUN_NAME = re.compile(r"([1-3][0-9]{7}T[0-9]{6}\.[0-9]{3}Z)-[0-9a-f]{12}")
"""Name of a run's folder; names from the year 4000 on, and all others, are foreign."""
LATEST = datetime(3000, 1, 1, tzinfo=UTC)
"""Latest beginning that a run is named by: a clock beyond it is wrong, and later runs need names
behind.
"""
SCRATCH_PREFIX = "afn-scratch-"
"""Beginning of the name of an attempt's folder for unfinished files."""
PLANNING = "planning.json"
RAY_IGNORE = ".rayignore"
"""File for which Ray leaves a folder out of what it ships with a job."""

STORE_FILE = re.compile(
    rf"/(?:shards/{HEX.pattern}/{HEX.pattern}/[^/]+|runs/{RUN_NAME.pattern}/[^/]+|pilots/{HEX.pattern}\.json|"
    rf"gc/[0-9]{{8}}\.parquet|{re.escape(RAY_IGNORE)}|"
    rf"probe-{HEX.pattern}|{SCRATCH_PREFIX}[^/]+/[^/]+)$"
)
"""End of the path of a file that a run leaves in a store, or an attempt on scratch."""


def is_run_name(name: str) -> bool:
    """Whether afn-ray may have called a run ``name``."""
    match = RUN_NAME.fullmatch(name)
    try:
        return match is not None and bool(datetime.strptime(match[1], STAMP))
    except ValueError:
        return False


def is_store_file(uri: str) -> bool:
    """Whether ``uri`` has the path of a file of a store, this one or another, or of an attempt's
    scratch.
    """
    return STORE_FILE.search(uri) is not None


TABLES = ("tokens", "documents", "summary")
NEURON_TABLES = ("neurons", "pairs")
"""Of a shard whose neurons are recorded as well."""
RUN_TABLES = ("plan", "shards", "thresholds", "histogram", "vocabulary", "frozen", "files", "sources", "screened",
              "signals", "signal_vocabulary", "neurons", "neuron_types")  # fmt: skip
PROBE = re.compile("probe-[0-9a-f]{32}")
COMMIT = re.compile(r"commit(?:-([1-9][0-9]{0,8}))?\.json")
LEASE = re.compile(r"lease-[0-9a-f]{32}\.json")
SHARD_FILE = re.compile(
    rf"{COMMIT.pattern}|[0-9a-f]{{16}}-({'|'.join(TABLES + NEURON_TABLES)})\.parquet"
)
STATUS = "status.json"
RUN_FILE = re.compile(
    rf"(run|audited|status)\.json|{LEASE.pattern}|({'|'.join(RUN_TABLES)})(-[0-9a-f]{{16}})?\.parquet"
)


@dataclass(slots=True)
class StoreFiles:
    """The files of a store by what they belong to, those of killed attempts and reduces among
    them.
    """

    shards: dict[Place, list[storage.StoredFile]] = field(default_factory=dict)
    runs: dict[str, list[storage.StoredFile]] = field(default_factory=dict)
    pilots: list[str] = field(default_factory=list)  # names
    probes: list[storage.StoredFile] = field(
        default_factory=list
    )  # of processes killed as they tried to write
    planning: list[storage.StoredFile] = field(
        default_factory=list
    )  # how far a run is that has no name yet
    ignore: list[storage.StoredFile] = field(
        default_factory=list
    )  # what keeps the store out of a job
    foreign: list[str] = field(default_factory=list)  # URIs of what afn-ray never writes


def sort_files(store: str, files: Iterable[storage.StoredFile]) -> StoreFiles:
    """Sort ``files``, listed below ``store``, by their names alone; every one of them is in one
    place of the result.
    """
    root, there = f"{storage.absolute(store)}/", StoreFiles()
    for file in files:
        match file.uri.removeprefix(root).split("/"):
            case ["shards", measure, shard, name] if (
                HEX.fullmatch(measure)
                and HEX.fullmatch(shard)
                and SHARD_FILE.fullmatch(_final(name))
            ):
                there.shards.setdefault((measure, shard), []).append(file)
            case ["runs", run, name] if is_run_name(run) and RUN_FILE.fullmatch(_final(name)):
                there.runs.setdefault(run, []).append(file)
            case ["pilots", name] if name.endswith(".json"):
                there.pilots.append(name)
            case [folder, name] if folder == EPOCHS and EPOCH_FILE.fullmatch(_final(name)):
                if name != _final(name):
                    there.probes.append(file)
            case [name] if PROBE.fullmatch(_final(name)) or (_final(name) == PLANNING != name):
                there.probes.append(file)
            case [name] if name == PLANNING:
                there.planning.append(file)
            case [name] if _final(name) == RAY_IGNORE:
                there.ignore.append(file)
            case _:
                there.foreign.append(file.uri)
    return there


def _final(name: str) -> str:
    """The name that a file was to get, where a local write was killed before it had it."""
    unfinished = re.fullmatch(r"\.(.+)-[0-9a-f]{32}", name)
    return unfinished[1] if unfinished else name


def commit_name(generation: int) -> str:
    """Name of the commit of that generation of a shard."""
    return f"commit-{generation}.json" if generation else "commit.json"


def generation_of(name: str) -> int | None:
    """The generation of the commit called ``name``; None for any other file."""
    found = COMMIT.fullmatch(name)
    return int(found[1] or 0) if found else None
