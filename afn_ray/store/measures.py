"""Measures of the runs in a store, read from their run.json or plan."""

from __future__ import annotations

from afn_ray.errors import StoreError
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import Measure, StoredMeasure, without_id
from afn_ray.store import manifest, plans, storage, uris
from afn_ray.store.checksums import DAMAGES
from afn_ray.store.layout import HEX


def ids(store: str) -> set[str]:
    """Ids of the measures of which ``store`` has a shard, or had one."""
    names = storage.list_names(uris.join(store, "shards"))
    return {name for name in names if HEX.fullmatch(name)}


def known(store: str, but: str = "") -> list[Measure]:
    """The measures of which ``store`` has shards, that of the newest run first.

    The measure with the id ``but`` is left out. So is one that no run describes any more, one of
    another version of afn-ray, and that of a run whose files are damaged.
    """
    sought = ids(store) - {but}
    found: list[Measure] = []
    for name in reversed(manifest.run_names(store)):
        if not sought:
            break
        try:
            stored = _stored(store, name)
            measure = Measure.of_dict(stored)
        except (StoreError, *DAMAGES):
            continue
        if measure.id in sought and measure.id == fingerprint(stored):
            sought.remove(measure.id)
            found.append(measure)
    return found


def _stored(store: str, name: str) -> StoredMeasure:
    """The measure of the run ``name`` as it is stored, without its id."""
    run = manifest.open_folder(store, name)
    if run.info:
        return without_id(run.info["measure"])
    plan = plans.read_plan(store, name)
    if plan is None:
        raise StoreError(f"{run.uri} has no plan")
    return plan[1]["measure"]
