"""Plan a run: list the corpus and cut it into shards; read no file that an earlier run knows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

from afn_ray import kept
from afn_ray.config import RunConfig
from afn_ray.corpus import listing
from afn_ray.corpus.first import cut_first
from afn_ray.corpus_values import FileInfo, FileSlice, Shard
from afn_ray.reduce.groups import check_group_by
from afn_ray.store import uris
from afn_ray.store.checksums import IO_THREADS
from afn_ray.store.manifest import run_names
from afn_ray.store.plans import Plan, cuts_id, proved_slices, read_plan

MOST_SLICES = 10_000
"""Largest number of slices in one shard.

The shard's commit.json has a line of 0.5 kB and a name for each slice.
"""
MOST_NAMES_BYTES = 16 << 20
"""Largest total size of the names of one shard's slices as JSON, in bytes."""
LOOK_BACK = 100
"""Largest number of plans searched for the last one of a corpus, in a shared store."""
RACY_NS = 2_000_000_000
"""Shortest age of a file for its modification time to be trusted, in nanoseconds.

A younger file may have changed after it was hashed and keep the same time: it is hashed again.
"""


def make_plan(config: RunConfig, on_file: Callable[[int, int], None] | None = None) -> Plan:
    """List the corpus and cut it into shards; read no file that an earlier run hashed unchanged.

    ``on_file(done, total)`` is called after each hashed file; with a limit, before each file that
    is read for it. Raises ``CorpusError``.
    """
    options = config.read_options
    files, skipped = listing.list_files(config.corpus, options, config.store)
    listing.check_columns(files, options)
    uris = [file.uri for file in files]
    check_group_by(config.group_by, kept.parse(options.keep), uris, config.language)
    shard_bytes = config.shard_bytes or listing.choose_shard_bytes(files)
    known = _remembered(config, shard_bytes)
    missing = [
        file for file in files if file not in known or listing.is_outdated(known[file], options)
    ]
    if config.limit is not None:
        for file in known.keys() & {*missing}:
            del known[file]
        with listing.naming_others(files, options):
            return _first(config, (files, skipped), known, shard_bytes, on_file)
    with listing.naming_others(files, options), ThreadPoolExecutor(IO_THREADS) as pool:
        cuts = pool.map(lambda file: listing.cut(file, options, shard_bytes), missing)
        for done, (file, slices) in enumerate(zip(missing, cuts, strict=True), 1):
            known[file] = slices
            if on_file is not None:
                on_file(done, len(missing))
    slices = [piece for file in files for piece in known[file]]
    groups = group_slices(slices, shard_bytes)
    return Plan(
        shards=tuple(Shard.of(group, options) for group in groups),
        files=tuple(files),
        skipped=tuple(skipped),
        num_hashed=len(missing),
        shard_bytes=shard_bytes,
    )


def _first(
    config: RunConfig,
    listed: tuple[Sequence[FileInfo], Sequence[FileInfo]],
    known: Mapping[FileInfo, list[FileSlice]],
    shard_bytes: int,
    on_file: Callable[[int, int], None] | None,
) -> Plan:
    """The plan of the first documents of the files ``listed``, of which some slices are ``known``.

    Files are read one after another, as each decides whether the next is read.
    """
    options = config.read_options
    files, skipped = listed
    assert config.limit is not None
    number = itertools.count()

    def cut(file: FileInfo) -> Iterator[FileSlice]:
        if on_file is not None:
            on_file(next(number), len(files))
        return iter(known[file]) if file in known else listing.parts(file, options, shard_bytes)

    found = cut_first(files, config.limit, options, cut)
    groups = group_slices(found.slices, shard_bytes)
    return Plan(
        shards=tuple(Shard.of(group, options) for group in groups),
        files=tuple(files),
        skipped=tuple(skipped),
        num_hashed=sum(file not in known for file in found.files),
        shard_bytes=shard_bytes,
        unread=found.unread,
    )


def group_slices(slices: Sequence[FileSlice], shard_bytes: int) -> list[list[FileSlice]]:
    """Slices in order, small ones grouped up to the limits of a shard.

    The limits are ``shard_bytes``, ``MOST_SLICES`` and ``MOST_NAMES_BYTES``. A group also ends in
    two other places:

    - After every slice that is not the first of its file. Lines appended to a file of several
      slices then change only the last group.
    - Once a quarter full, after a slice chosen by the hash of its path. The chance grows with the
      slice's size, so this happens four times in ``shard_bytes`` on average, however large the
      files are.

    A change thus moves the end of its own group, and seldom the ends of more than the next two.
    After a slice at which an old and a new group both end, all groups are the same again.
    """
    groups: list[list[FileSlice]] = []
    current: list[FileSlice] = []
    size = names = 0
    for piece in slices:
        named = len(json.dumps(piece.uri))
        full = len(current) == MOST_SLICES or names + named > MOST_NAMES_BYTES
        if current and (full or size + piece.num_bytes > shard_bytes):
            groups.append(current)
            current, size, names = [], 0, 0
        current.append(piece)
        size += piece.num_bytes
        names += named
        is_quarter_full = size >= shard_bytes // 4
        is_chosen = _share(piece.uri) * shard_bytes < 4 * piece.num_bytes
        if piece.start or (is_quarter_full and is_chosen):
            groups.append(current)
            current, size, names = [], 0, 0
    if current:
        groups.append(current)
    return groups


def _share(text: str) -> float:
    """A number from 0 to 1 that depends on ``text`` alone."""
    digest = sha256(text.encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _remembered(config: RunConfig, shard_bytes: int) -> dict[FileInfo, list[FileSlice]]:
    """Slices of unchanged files, from the store's newest runs with the same way to cut files.

    These runs are the newest one of this corpus, and later ones of other corpora.
    """
    known: dict[FileInfo, list[FileSlice]] = {}
    cuts = cuts_id(config, shard_bytes)
    names = run_names(config.store)
    for name in itertools.islice(reversed(names), LOOK_BACK):
        plan = read_plan(config.store, name)
        if plan is None:
            continue
        table, begun = plan
        if begun.get("cuts") != cuts:
            continue
        uri = uris.join(config.store, "runs", name, "plan.parquet")
        of_plan: dict[FileInfo, list[FileSlice]] = {}
        for piece in proved_slices(uri, table, begun):
            if is_trusted(piece.version, begun["begun_ns"]):
                file = FileInfo(piece.uri, piece.size, piece.version)
                of_plan.setdefault(file, []).append(piece)
        known = of_plan | known
        if begun["config"]["corpus"] == list(config.corpus):
            break
    return known


def is_trusted(version: str, hashed_ns: int) -> bool:
    """True if a file's ``version`` proves that the file is the one hashed at ``hashed_ns``."""
    kind, _, value = version.partition(":")
    if kind == "etag":
        return True
    return kind == "time" and value.isdigit() and int(value) < hashed_ns - RACY_NS
