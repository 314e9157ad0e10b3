"""One run from start to finish: plan, process the shards that the store lacks, reduce."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa

from afn_ray import kept
from afn_ray.config import RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.errors import CorpusError, IncompleteRun
from afn_ray.query.database import Run, open_run
from afn_ray.reduce import (
    duplicates,
    kept_columns,
    language_uses,
    losses,
    near_duplicates,
    screen,
)
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import TokenTexts
from afn_ray.reduce.tree import LabelRules, RecordedSeries, reduce_run
from afn_ray.run_info import RunInfo, UnknownTokens
from afn_ray.runs import cluster, composition, events, measurer, precheck, preparation, reports
from afn_ray.runs.dispatch import OnProgress
from afn_ray.runs.events import Event, OnEvent, on_warning
from afn_ray.runs.outcome import State
from afn_ray.runs.preparation import Preparation
from afn_ray.runs.progress import Progress
from afn_ray.runs.reporter import Reporter, reported
from afn_ray.runs.results import Results, collect, facts_of, given_up
from afn_ray.store import (
    manifest,
    plans,
    probes,
    run_claims,
    shard_files,
    storage,
)
from afn_ray.store.commits import describe_makers, provenance_of, total_counts
from afn_ray.text import count

LACKING = "not in the store when the run was reduced alone"
"""Reason of a missing shard in a run that was only reduced."""


def run(
    config: RunConfig, on_event: OnEvent = lambda event: None, *, reduce_only: bool = False
) -> Run:
    """Measure every token of ``config.corpus`` and return the complete run, ready for queries.

    A shard that the store has is not processed again. The same call thus resumes after a crash and
    does nothing after success. With ``reduce_only`` no shard is processed and no calibration runs;
    the store must have the measure, and all shards except ``allow_quarantined``. Raises
    ``ConfigError`` before any work, ``IncompleteRun`` when shards are quarantined or missing (the
    others are committed), and ``Interrupted`` when the same call resumes the run.
    """
    config = precheck.normalised(config)
    if config.near_duplicates is not None:
        near_duplicates.check_package()
    probes.check_writable(config.store)
    manifest.keep_from_jobs(config.store)
    # With ``reduce_only`` the run may turn out to be impossible: no status before it has a name.
    with reported(config, planning=not reduce_only) as reporter:
        return _run(config, _reporting(reporter, on_event), reporter, reduce_only=reduce_only)


def _run(config: RunConfig, on_event: OnEvent, reporter: Reporter, *, reduce_only: bool) -> Run:
    began = time.monotonic()
    asked = preparation.prepare(config, on_event, keep=True, reduce_only=reduce_only)
    config, plan = asked.config, asked.plan
    measure, frozen = asked.task.measure, asked.frozen
    if reduce_only:
        preparation.commits_to_reduce(asked)  # before anything is written
    claim = run_claims.begin_run(config, measure, plan, asked.begun_ns, frozen)
    plan = replace(plan, shards=claim.shards)
    folder = claim.run
    if folder.info:
        preparation.report_nothing_to_do(asked, folder, on_event)
        reports.report_losses(folder, on_event)
        return _opened(claim)
    # after the claim, from which on gc keeps these commits
    commits = shard_files.find_commits(config.store, measure.id, plan.shards)
    todo = [shard for shard in plan.shards if shard.id not in commits]
    work = composition.Work((), tuple(todo))
    if not reduce_only:
        work = composition.plan(replace(asked.task, run=folder.id), todo)
    reporter.begin(folder, plan.shards, commits)
    reports.report_plan(plan, len(todo), work, folder, on_event)
    if reduce_only:
        state = State(0, failures={shard.id: LACKING for shard in todo})
    else:
        state = _process(asked, todo, work, folder, on_event)
    if state.stopped or len(state.failures) > config.allow_quarantined:
        raise IncompleteRun(reports.failed(state, plan))
    commits |= state.commits
    results = collect(plan, commits, state.failures)
    if not results.counts.get("tokens"):
        reasons = reports.quarantine_reasons(config.store, measure.id, results.commits)
        raise CorpusError(reports.no_tokens(config, total_counts(results.commits), reasons))
    _finish(asked, results, folder, len(plan.shards) - len(todo), began, on_event)
    return _opened(claim)


def _finish(
    asked: Preparation,
    results: Results,
    folder: manifest.RunFolder,
    num_reused: int,
    began: float,
    on_event: OnEvent,
) -> None:
    """Reduce ``results`` and complete the run in ``folder``; ``began``: its monotonic time."""
    config = asked.config
    on_event(events.Reducing())
    encoder = measurer.text_encoder(asked.files)
    texts = TokenTexts(*encoder.texts())
    tables, found = _reduce(asked, results, texts, on_event)
    names = {name: manifest.write_table(folder, name, table) for name, table in tables.items()}
    unknown: UnknownTokens = {
        "token": None if encoder.unknown is None else texts.pieces[encoder.unknown],
        "tokens": losses.count_unknown(tables["vocabulary"], encoder.unknown),
    }
    facts = facts_of(asked, results, names, num_reused)
    facts["counts"] |= duplicates.counted(facts["counts"], found, tables["thresholds"])
    facts["duplicates"] = found.figures.to_json()
    if config.near_duplicates is not None:
        facts["near_duplicates"] = {
            "threshold": config.near_duplicates,
            "documents": len(tables["near_duplicates"]),
        }
    provenance = provenance_of(results.commits)
    info: RunInfo = {
        **facts,
        "unknown": unknown,
        "quarantined": given_up(results.given_up, results.failures),
        "created_at": plans.created_at(folder),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "made_by": results.commits[0].made_by,
        "makers": describe_makers(provenance),
        "provenance": provenance,
    }
    folder = manifest.finish_run(folder, info)
    num_missing = len(folder.info["quarantined"])
    if num_missing > config.allow_quarantined:
        raise IncompleteRun(
            f"another process has completed run {folder.uri} without "
            f"{count(num_missing, 'shard')}, more than --allow-quarantined "
            f"{config.allow_quarantined} "
            "permits here; the same command tries them again"
        )
    reports.report_complete(folder, results, on_event)
    reports.report_losses(folder, on_event)
    if "languages" in tables and (lacking := language_uses.without_list(tables["languages"])):
        on_event(events.Warned(lacking))


def _process(
    asked: Preparation,
    todo: Sequence[Shard],
    work: composition.Work,
    folder: manifest.RunFolder,
    on_event: OnEvent,
) -> State:
    """Process ``todo``, the shards that the store lacks, as planned in ``work``."""
    if not todo:
        return State(0)
    where = "in this process" if cluster.runs_inline(asked.config, todo) else "on Ray"
    device = asked.device if work.needs_model else "cpu, without the model"
    on_event(events.Starting(f"starting workers on {device}, {where}"))
    task = replace(asked.task, run=folder.id)
    return cluster.process_shards(
        asked.config, task, work.measured, _working(on_event), work.composed
    )


def _reduce(
    asked: Preparation, results: Results, texts: TokenTexts, on_event: OnEvent
) -> tuple[dict[str, pa.Table], duplicates.Duplicates]:
    """Tables of the run, and its copies."""
    config = asked.config
    measure = asked.task.measure
    plan = results.plan
    sizes = [shard.num_bytes for shard in results.done]
    columns = kept.parse(config.keep_columns or "")
    shards = CommittedShards(config.store, measure.id, results.commits, sizes, columns)
    recorded = RecordedSeries.of(measure)
    rules = LabelRules(config.language, config.sink_factor, asked.frozen)
    with cluster.tasks(config, results.done, on_warning(on_event)) as tasks:
        found = duplicates.find(shards, config.duplicates, tasks)
        shards = replace(shards, left_out=found.left_out, copies=found.copies)
        tables = reduce_run(shards, recorded, texts, rules, tasks)
        if config.duplicates != duplicates.KEEP:
            tables["duplicates"] = found.table
        tables["files"] = losses.files_table(shards, plan.shards, plan.skipped, tasks)
        if columns:
            tables["kept"] = kept_columns.kept_table(shards, tasks)
        if config.near_duplicates is not None:
            near = near_duplicates.find(shards, config.near_duplicates, texts.readable, tasks)
            tables["near_duplicates"] = near
        if config.screen:
            on_event(events.Screening())
            asked_scan = screen.Asked(
                config.screen,
                config.group_by,
                config.thresholds_by == "group",
                config.language,
                measure.tagged,
            )
            tables |= screen.scan_run(
                shards, measure.layers, tables, texts.readable, asked_scan, tasks
            )
    return tables, found


def _opened(claim: run_claims.Claim) -> Run:
    """The complete run of ``claim``, whose lease is deleted."""
    run = open_run(claim.run.uri)
    if claim.lease is not None:
        storage.delete([claim.lease])
    return run


def _reporting(reporter: Reporter, on_event: OnEvent) -> OnEvent:
    """``on_event`` that also updates the run's status."""

    def both(event: Event) -> None:
        match event:
            case events.Working(progress):
                reporter.working(progress)
            case events.Warned(notice):
                reporter.notice(notice)
            case events.Hashing(num_read, num_files):
                reporter.phase("planning", f"read {num_read:,} of {count(num_files, 'file')}")
            case events.Calibrating() | events.Starting() | events.Reducing() | events.Screening():
                reporter.phase(event.name, event.message)
        on_event(event)

    return both


def _working(on_event: OnEvent) -> OnProgress:
    """Callback that passes progress on as events.

    It reports each notice once, and warns once if the model needs padding or is slow.
    """
    warned: set[str] = set()
    num_reported = 0

    def on_progress(progress: Progress) -> None:
        nonlocal num_reported
        work = progress.work
        for what, reason in (
            ("sequences are padded, not packed, which is slower", work.why_padded),
            ("the model is slower than the device allows", work.why_slow),
        ):
            if reason and what not in warned:
                warned.add(what)
                on_event(events.Warned(f"{what}: {reason}"))
        for notice in progress.notices[num_reported:]:
            on_event(events.Warned(notice))
        num_reported = len(progress.notices)
        on_event(events.Working(progress))

    return on_progress
