"""Preparation of a run: its plan, what it measures, and what the store has of it already."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from afn_ray import model, token_rows
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.errors import IncompleteRun, StoreError
from afn_ray.measure import Measure
from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.reduce import lexicon
from afn_ray.runs import cluster, events, measurer, precision, worker
from afn_ray.runs.calibrator import Calibrator
from afn_ray.runs.events import OnEvent
from afn_ray.runs.plan import make_plan
from afn_ray.runs.task import Task
from afn_ray.store import epochs, label_thresholds, manifest, plans, run_claims, shard_files
from afn_ray.store.commits import Commits
from afn_ray.text import count
from afn_ray.token_rows import LabelThresholds
from afn_ray.tokens import languages


@dataclass(frozen=True, slots=True)
class Preparation:
    """The work of a run, before the store's shards are known."""

    config: RunConfig  # its ``thresholds`` name a run
    device: str  # device of the workers
    files: model.ModelFiles
    plan: plans.Plan
    begun_ns: int  # time before the first file was listed, in nanoseconds
    decided: precision.Precision
    task: Task
    frozen: list[LabelThresholds]  # of ``label_thresholds.find_frozen``


def prepare(
    config: RunConfig, on_event: OnEvent, *, keep: bool, reduce_only: bool = False
) -> Preparation:
    """Plan the corpus of a normalised config and decide what to measure.

    ``keep`` writes the results of calibrations into the store for later runs. With ``reduce_only``
    no calibration runs.
    """
    device = "cpu" if reduce_only else cluster.find_device(config)
    files = measurer.find_model_files(config)
    detector = languages.identity() if config.language == AUTO_LANGUAGE else None
    task = worker.prepare(config, files, device, "float32")
    begun_ns = time.time_ns()
    plan = make_plan(config, _hashing(on_event))
    measure = replace(task.measure, labels=plan.labels)
    calibrator = Calibrator(plan, on_event, keep, reduce_only, detector)
    decided = calibrator.decide_precision(replace(task, measure=measure))
    measure = replace(measure, dtype=decided.dtype)
    outliers = calibrator.find_outliers(replace(task, measure=measure))
    measure = replace(measure, outliers=outliers)
    measure = replace(measure, means=calibrator.find_means(replace(task, measure=measure)))
    mean_types = calibrator.find_mean_types(replace(task, measure=measure))
    measure = replace(measure, mean_types=mean_types, languages=detector)
    config = label_thresholds.resolved(config)
    frozen = label_thresholds.find_frozen(config, measure)
    if config.neurons_of == "high":
        measure = replace(
            measure, neurons_above=token_rows.high_from(frozen, measure.neuron_layers)
        )
    task = replace(task, config=config, measure=measure)
    plan = _recording(plan, config, measure, frozen)
    if not measure.tagged and detector is None and lexicon.find(config.language) is None:
        on_event(events.Warned(lexicon.why_none(config.language)))
    return Preparation(config, device, files, plan, begun_ns, decided, task, frozen)


def _recording(
    plan: plans.Plan, config: RunConfig, measure: Measure, frozen: Sequence[LabelThresholds]
) -> plans.Plan:
    """``plan`` with shards that keep the rows that ``config`` asks for.

    A run of summaries alone uses a shard with rows if the store has it.
    """
    record = token_rows.of_shards(config.record, frozen, measure.layers)
    if not record:
        return plan
    there = Commits()
    if record == token_rows.SUMMARIES:
        whole = epochs.newest(config.store).marked(measure.id, plan.shards)
        there = shard_files.find_commits(config.store, measure.id, whole)
    shards = [s if s.id in there else s.recording(record) for s in plan.shards]
    return replace(plan, shards=tuple(shards))


@dataclass(frozen=True, slots=True)
class Stock:
    """The results of a run that the store already has."""

    commits: Commits
    complete: bool  # a run with the same plan is complete


def take_stock(asked: Preparation, on_event: OnEvent, *, reduce_only: bool = False) -> Stock:
    """Find what the store has of ``asked``; write nothing.

    Raises the errors that ``run`` raises before its work begins.
    """
    config = asked.config
    plan = asked.plan
    measure = asked.task.measure
    commits = commits_to_reduce(asked) if reduce_only else Commits()
    same, _ = run_claims.find_begun(config, measure, plan, asked.frozen)
    if not reduce_only:
        commits = _find_commits(asked)
    if same is not None and same.info:
        report_nothing_to_do(asked, same, on_event)
        return Stock(commits, True)
    todo: list[Shard] = []
    if not reduce_only:
        todo = [shard for shard in plan.shards if shard.id not in commits]
    cluster.check(config, todo, plan.shards)
    return Stock(commits, False)


def _find_commits(asked: Preparation) -> Commits:
    """The commits of the plan that the store has, in their valid generations."""
    store = asked.config.store
    measure_id = asked.task.measure.id
    shards = epochs.newest(store).marked(measure_id, asked.plan.shards)
    return shard_files.find_commits(store, measure_id, shards)


def commits_to_reduce(asked: Preparation) -> Commits:
    """Commits of the plan, for a reduce alone.

    Raises ``IncompleteRun`` where more than ``allow_quarantined`` are missing.
    """
    config = asked.config
    plan = asked.plan
    measure_id = asked.task.measure.id
    commits = _find_commits(asked)
    if len(plan.shards) - len(commits) > config.allow_quarantined:
        raise IncompleteRun(_lacking(config, measure_id, plan, len(commits)))
    return commits


def report_nothing_to_do(
    asked: Preparation, complete: manifest.RunFolder, on_event: OnEvent
) -> None:
    """Report that the run of ``asked`` is ``complete``.

    Raises ``StoreError`` where the store has lost shards of that run.
    """
    store = asked.config.store
    measure_id = asked.task.measure.id
    gone = manifest.lost_shards(store, measure_id, asked.plan.shards, complete)
    if gone:
        raise StoreError(
            f"run {complete.uri} is complete, but {len(gone)} of its shards are gone from the "
            f"store, as {gone[0]}: delete {complete.uri}/run.json and give this command again to "
            "do them anew"
        )
    message = f"nothing to do: run {complete.uri} is complete and the corpus has not changed"
    on_event(events.Complete(message))


def _lacking(config: RunConfig, measure_id: str, plan: plans.Plan, num_there: int) -> str:
    """Message for a reduce alone with too few commits."""
    num_shards = len(plan.shards)
    none = ""
    if not num_there:
        none = f"; of measure {measure_id} it has none: is the config the one that measured?"
    return (
        f"{config.store} lacks {num_shards - num_there:,} of {count(num_shards, 'shard')}, and "
        f"--reduce-only measures none{none}; the same command without it does "
        "(--allow-quarantined N: a run that lacks up to N counts as complete)"
    )


def _hashing(on_event: OnEvent) -> Callable[[int, int], None]:
    """Callback that reports the number of files hashed."""
    return lambda done, total: on_event(events.Hashing(done, total))
