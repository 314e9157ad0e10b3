"""Which runs a garbage collection keeps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from afn_ray.errors import StoreError
from afn_ray.schema import fingerprint
from afn_ray.store import (
    layout,
    manifest,
    plans,
    storage,
    uris,
)
from afn_ray.store.layout import Place


@dataclass(frozen=True, slots=True)
class Rules:
    """What is kept, as in ``collect_garbage``."""

    keep: int
    keep_runs: tuple[str, ...]
    min_age_h: float


def kept_runs(
    store: str, there: layout.StoreFiles, names: Sequence[str], rules: Rules, old_s: float
) -> list[str]:
    """Names of the runs that are kept, sorted."""
    complete = [n for n in names if any(f.uri.endswith("/run.json") for f in there.runs[n])]
    copies = [n for n in complete if manifest.is_copied(store, n)]
    complete = [n for n in complete if n not in copies]
    kept = (
        {_name_of(store, run, names) for run in rules.keep_runs}
        | set(complete[-rules.keep :])
        | set(copies)
    )
    kept |= _last_audited(
        store, [n for n in complete if any(f.uri.endswith("/audited.json") for f in there.runs[n])]
    )
    for name in names:
        if name in kept:
            continue
        if name in complete:
            leases = (
                f for f in there.runs[name] if layout.LEASE.fullmatch(f.uri.rpartition("/")[2])
            )
            if not is_old(leases, old_s):
                kept.add(name)
            continue
        shards = (there.shards.get(place, []) for place in planned_shards(store, name))
        files = itertools.chain(there.runs[name], *shards)
        if name > max(complete, default="") or not is_old(files, old_s):
            kept.add(name)
    return sorted(kept)


def _last_audited(store: str, audited: Sequence[str]) -> set[str]:
    """The newest of the ``audited`` runs of each measure and corpus.

    The next audit is compared with it.
    """
    newest = {}
    for name in audited:
        info = manifest.open_folder(store, name).info
        newest[json.dumps([info["measure"]["id"], info["config"]["corpus"]])] = name
    return set(newest.values())


def _name_of(store: str, run: str, names: Sequence[str]) -> str:
    """The name of ``run``, which is a name or a URI."""
    place, name = store, run
    if "/" in run:
        place, name = manifest.split_uri(uris.absolute(run).rstrip("/"))
    if name not in names or place != store:
        raise StoreError(
            f"{store} has no run {run} to keep; 'afn gc' without --keep-run lists those that it has"
        )
    return name


def planned_shards(store: str, name: str) -> set[Place]:
    """The shards that the run ``name`` lists; empty if it has no plan.

    It has none if it crashed before it wrote one, or if a gc deleted it. Raises ``StoreError`` if
    the plan is damaged or missing from a complete run.
    """
    run = manifest.RunFolder(uris.join(store, "runs", name), store, name, {})
    try:
        shards, header = plans.read_shards(run)
    except StoreError as error:
        plan, end = (uris.join(run.uri, file) for file in ("plan.parquet", "run.json"))
        if not storage.exists(plan) and (
            not storage.exists(end) or manifest.open_folder(store, name).condemned
        ):
            return set()
        raise StoreError(
            f"{error}; which shards the run refers to is not known, so no shard can be deleted. "
            "Restore its plan, or "
            f"delete {run.uri} to give the run up, then give this command again"
        ) from error
    measure_id = fingerprint(header["measure"])
    return {(measure_id, shard.id) for shard in shards}


def is_old(files: Iterable[storage.StoredFile], old_s: float) -> bool:
    return max((file.modified_s for file in files), default=0.0) <= old_s
