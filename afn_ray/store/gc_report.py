"""Findings and deletions of a garbage collection, as lines for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from afn_ray.store import uris
from afn_ray.store.garbage import Garbage
from afn_ray.text import count

MAX_LINES = 20
"""Most shards listed one by one in the output for people."""


def lines(g: Garbage, flags: Sequence[str]) -> Iterator[str]:
    """Yield one line per run and shard, at most ``MAX_LINES`` shards, and lines with the sums.

    ``flags`` are the flags that the command was called with; they are repeated in the command that
    deletes.
    """
    for run in g.runs:
        yield f"run    {run.uri}: {count(run.num_files, 'file')}, {count(run.num_bytes, 'byte')}"
        name = run.uri.rpartition("/")[2]
        if user := g.threshold_users.get(name):
            yield (
                f"       its thresholds label the kept run {user}, whose command needs it: "
                f"--keep-run {name} keeps it"
            )
    for shard in g.shards[:MAX_LINES]:
        yield (
            f"shard  {shard.uri}: {count(shard.num_files, 'file')}, "
            f"{count(shard.num_bytes, 'byte')}"
        )
    if len(g.shards) > MAX_LINES:
        yield f"shard  ... and {count(len(g.shards) - MAX_LINES, 'more shard')}; --json lists all"
    for name in g.spared:
        yield (
            f"spared {uris.join(g.store, 'runs', name)}: a process has taken it up or completed it "
            "meanwhile"
        )
    if g.num_spared:
        yield (f"spared {count(g.num_spared, 'shard')} of a run that began or was spared meanwhile")
    if g.num_young:
        yield (
            f"spared {count(g.num_young, 'shard')} younger than --min-age-h, of no run that is kept"
        )
    sums = (
        f"{count(len(g.runs), 'run')} and {count(len(g.shards), 'shard')}, "
        f"{count(g.num_files, 'file')}, {count(g.num_bytes, 'byte')}"
    )
    kept = f"{count(len(g.kept), 'run')} kept"
    if len(g.kept) > 1:
        kept += f", from {g.kept[0]} to {g.kept[-1]}"
    if g.deleted:
        yield f"deleted: {sums}; {kept}"
    elif g.runs or g.shards:
        command = shlex.join(["afn", "gc", g.store, *flags, "--delete"])
        yield f"to delete: {sums}; {kept}"
        yield f"nothing was deleted; this does it: {command}"
    else:
        yield f"nothing to delete; {kept}"
