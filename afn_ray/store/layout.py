"""Names in a store, and which of the files below any folder are a store's own."""

from __future__ import annotations

import re
from datetime import UTC, datetime

HEX = re.compile("[0-9a-f]{32}")
STAMP = "%Y%m%dT%H%M%S.%fZ"
"""Beginning of a run, the first part of its name."""
RUN_NAME = re.compile(r"([1-3][0-9]{7}T[0-9]{6}\.[0-9]{3}Z)-[0-9a-f]{12}")
"""Name of a run's folder; names from the year 4000 on, and all others, are foreign."""
LATEST = datetime(3000, 1, 1, tzinfo=UTC)
"""Latest beginning that a run is named by: a clock beyond it is wrong, and later runs need names behind."""
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
    """Whether ``uri`` has the path of a file of a store, this one or another, or of an attempt's scratch."""
    return STORE_FILE.search(uri) is not None
