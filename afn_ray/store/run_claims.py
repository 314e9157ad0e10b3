"""Begin a run or resume one: its plan or lease is a claim that keeps a gc from removing it."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from afn_ray.classes import CLASSES_VERSION
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.errors import StoreError
from afn_ray.measure import Measure, base_of
from afn_ray.schema import SCHEMA_VERSION
from afn_ray.store import epochs, manifest, measures, parquet, plans, storage, uris
from afn_ray.store.checksums import checksummed
from afn_ray.store.label_thresholds import frozen_rows, measure_differences
from afn_ray.store.layout import LATEST, STAMP
from afn_ray.store.plans import Plan
from afn_ray.token_rows import LabelThresholds


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that no gc removes while its process is at work, and the shards that it may use."""

    run: manifest.RunFolder
    shards: tuple[Shard, ...]
    """The shards of the plan, in their valid generations."""
    lease: str | None
    """URI of the lease; None for a new run, whose plan is its claim."""


def find_begun(
    config: RunConfig, measure: Measure, plan: Plan, frozen: Sequence[LabelThresholds] = ()
) -> tuple[manifest.RunFolder | None, str]:
    """The store's newest run if it has this ``plan``, else None; and the newest run's name or "".

    The run may be complete or not. A condemned run, or a complete run with quarantined shards, is
    not returned. Writes nothing. Raises ``StoreError`` if the store holds other tokens than those
    of ``measure`` and the config does not allow it, or if the plan of an incomplete run is damaged.
    """
    store = config.store
    names = manifest.run_names(store)
    stored = measures.ids(store)
    is_new = stored and measure.id not in stored and not config.allow_another_measure
    if is_new and all(other.base != measure.base for other in measures.known(store)):
        raise StoreError(_other_measure(config, names, measure))
    newest = next((name for name in reversed(names) if _is_begun(store, name)), "")
    if newest.endswith(plans.request_id(measure.id, plan.shards, config, frozen)):
        same = manifest.open_folder(store, newest)
        # A complete run with quarantined shards is not reused: a new run tries them again.
        if not same.condemned and not same.info.get("quarantined"):
            if not same.info:
                _check_plan(same)
            return same, newest
    if frozen and newest.endswith(plans.request_id(measure.id, plan.shards, config, ())):
        same = manifest.open_folder(store, newest)
        is_whole = same.info and not same.info.get("quarantined")
        if is_whole and frozen_rows(same) == list(frozen):
            return same, newest  # its own thresholds are the frozen ones
    return None, newest


def _check_plan(run: manifest.RunFolder) -> None:
    """Raise ``StoreError`` if the plan of the incomplete ``run`` is damaged."""
    plan = plans.read_plan(run.store, run.id)
    if plan is not None:
        table, header = plan
        plans.proved_slices(uris.join(run.uri, "plan.parquet"), table, header)


def begin_run(
    config: RunConfig,
    measure: Measure,
    plan: Plan,
    begun_ns: int,
    frozen: Sequence[LabelThresholds] = (),
) -> Claim:
    """Resume the store's newest run if it has this ``plan``, complete or not, or begin a new one.

    ``begun_ns`` is the Unix time in ns before the first file was examined. ``frozen`` are the rows
    returned by ``find_frozen``. The claim is written before the newest epoch is read; ``epochs``
    explains why. If a gc condemned the run in between, a new run is begun. Raises ``StoreError`` as
    ``find_begun`` does.
    """
    run, newest = find_begun(config, measure, plan, frozen)
    lease = None
    if run is not None:
        lease = uris.join(run.uri, f"lease-{uuid.uuid4().hex}.json")
        # The name is unique, so AlreadyWritten means that the answer to our own first try was lost.
        body = {"schema_version": SCHEMA_VERSION, "run": run.id}
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(lease, checksummed(body))
    else:
        run = _new_run(config, measure, plan, begun_ns, frozen, newest)
    epoch = epochs.newest(config.store)
    while run.id in epoch.condemned:
        newest = max(newest, *epoch.condemned)
        run = _new_run(config, measure, plan, begun_ns, frozen, newest)
        lease = None
        epoch = epochs.newest(config.store)
    return Claim(run, epoch.marked(measure.id, plan.shards), lease)


def _new_run(
    config: RunConfig,
    measure: Measure,
    plan: Plan,
    begun_ns: int,
    frozen: Sequence[LabelThresholds],
    newest: str,
) -> manifest.RunFolder:
    """Write the plan of a new run, whose name sorts after ``newest``."""
    suffix = plans.request_id(measure.id, plan.shards, config, frozen)
    created = min(datetime.now(UTC), LATEST)
    name = f"{_stamp(created)}-{suffix}"
    if name <= newest:  # the clock went back; the newest run must have the last name
        stamp = newest.partition("-")[0]
        begun = datetime.strptime(stamp, STAMP).replace(tzinfo=UTC)
        created = begun + timedelta(milliseconds=1)
        name = f"{_stamp(created)}-{suffix}"
    header: plans.PlanHeader = {
        # A limited plan does not have all of its files' slices for later plans.
        "cuts": plans.cuts_id(config, plan.shard_bytes) if config.limit is None else None,
        "shard_bytes": plan.shard_bytes,
        "begun_ns": begun_ns,
        "created_at": created.isoformat(timespec="seconds"),
        "config": asdict(config),
        "measure": measure.as_dict(),
        "frozen": list(frozen),
        "classes": CLASSES_VERSION,
    }
    table, header["sha256"] = plans.plan_table(plan.shards, header)
    table = table.replace_schema_metadata({"afn": json.dumps(header)})
    uri = uris.join(config.store, "runs", name)
    # The same name means the same request in the same millisecond, and so the same plan.
    with contextlib.suppress(storage.AlreadyWritten):
        storage.write_once(uris.join(uri, "plan.parquet"), parquet.encode(table))
    return manifest.RunFolder(uri, config.store, name, {})


def _is_begun(store: str, name: str) -> bool:
    """True if the folder ``name`` is a run with a plan, and not a copy."""
    if not storage.exists(uris.join(store, "runs", name, "plan.parquet")):
        return False
    return not manifest.is_copied(store, name)


def _stamp(moment: datetime) -> str:
    seconds = moment.strftime("%Y%m%dT%H%M%S")
    milliseconds = moment.microsecond // 1000
    return f"{seconds}.{milliseconds:03d}Z"


def _other_measure(config: RunConfig, runs: Sequence[str], measure: Measure) -> str:
    """The error of a store without the tokens of ``measure``: what differs, and what to do."""
    store = config.store
    message = f"store {store} holds another measure; results of two measures cannot be compared. "
    for name in reversed(runs):
        plan = plans.read_plan(store, name)
        if plan is not None:
            theirs = base_of(plan[1].get("measure", {}))
            ours = measure.base
            goes_on = ""
            if theirs | {"dtype": measure.dtype} == ours:  # as where new layers are no safe ones
                goes_on = f"--dtype {theirs.get('dtype')} goes on with that measure. "
            of_one_kind = theirs.get("labels") == measure.labels  # else no --language goes on
            if of_one_kind and measure.detected != (theirs.get("languages") is not None):
                flag = f"--language {plan[1].get('config', {}).get('language', 'en')}"
                theirs = theirs | {"languages": flag}
                ours["languages"] = f"--language {config.language}"
                goes_on = f"{flag} goes on with that measure. "
            message += f"{measure_differences(theirs, ours)}. {goes_on}"
            break
    return message + "Use another --store, or --allow-another-measure to keep both in this one"
