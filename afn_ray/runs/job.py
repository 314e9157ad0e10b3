"""One run from start to finish: plan, process the shards that the store lacks, reduce."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from afn_ray import kept, token_rows
from afn_ray.config import AUTO_LANGUAGE, RunConfig
from afn_ray.corpus_values import Shard
from afn_ray.errors import CorpusError, IncompleteRun, StoreError
from afn_ray.measure import Measure
from afn_ray.query.database import Run, open_run
from afn_ray.reduce import (
    duplicates,
    kept_columns,
    language_uses,
    lexicon,
    losses,
    near_duplicates,
    screen,
    selected,
)
from afn_ray.reduce.shards import CommittedShards
from afn_ray.reduce.tables import TokenTexts
from afn_ray.reduce.tree import LabelRules, RecordedSeries, reduce_run
from afn_ray.runs import cluster, composition, dispatch, events, measurer, precheck, worker
from afn_ray.runs.calibrator import Calibrator
from afn_ray.runs.events import Event, OnEvent, on_warning
from afn_ray.runs.plan import make_plan
from afn_ray.runs.progress import Progress
from afn_ray.runs.reporter import Reporter, reported
from afn_ray.runs.results import Preparation, Results, collect, facts_of, given_up
from afn_ray.store import (
    epochs,
    label_thresholds,
    manifest,
    plans,
    probes,
    run_claims,
    series,
    shard_files,
    storage,
)
from afn_ray.store.commits import Commit, Commits, describe_makers, provenance_of, total_counts
from afn_ray.text import count
from afn_ray.tokens import languages

LACKING = "not in the store when the run was reduced alone"
"""Reason of a missing shard in a run that was only reduced."""
MOST_DOCUMENTS = 5
"""Quarantined documents that the error lists for a corpus without tokens."""
MOST_SHARDS = 20
"""Shards that the end of a run lists one by one."""


def prepare(
    config: RunConfig, on_event: OnEvent, *, keep: bool, reduce_only: bool = False
) -> Preparation:
    """Plan the corpus of a normalised config and decide what to measure.

    ``keep`` writes the results of calibrations into the store for later runs. With ``reduce_only``
    no calibration runs.
    """
    device = "cpu" if reduce_only else cluster.find_device(config)
    files = measurer.find_model(config)
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
    frozen = label_thresholds.find_frozen(config, measure)
    if config.neurons_of == "high":
        measure = replace(
            measure, neurons_above=token_rows.high_from(frozen, measure.neuron_layers)
        )
    task = replace(task, measure=measure)
    plan = _recording(plan, config, measure, frozen)
    if not measure.tagged and detector is None and lexicon.find(config.language) is None:
        on_event(events.Warned(lexicon.why_none(config.language)))
    return Preparation(config, device, files, plan, begun_ns, decided, task, frozen)


def _recording(
    plan: plans.Plan, config: RunConfig, measure: Measure, frozen: Sequence[dict[str, Any]]
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
    config, plan, measure = asked.config, asked.plan, asked.task.measure
    commits = _commits_to_reduce(asked) if reduce_only else Commits()
    same, _ = run_claims.find_begun(config, measure, plan, asked.frozen)
    if not reduce_only:
        commits = _find_commits(asked)
    if same is not None and same.info:
        _say_nothing_to_do(asked, same, on_event)
        return Stock(commits, True)
    todo: list[Shard] = []
    if not reduce_only:
        todo = [shard for shard in plan.shards if shard.id not in commits]
    cluster.check(config, todo, plan.shards)
    return Stock(commits, False)


def _find_commits(asked: Preparation) -> Commits:
    """The commits of the plan that the store has, in their valid generations."""
    store, measure_id = asked.config.store, asked.task.measure.id
    shards = epochs.newest(store).marked(measure_id, asked.plan.shards)
    return shard_files.find_commits(store, measure_id, shards)


def _commits_to_reduce(asked: Preparation) -> Commits:
    """Commits of the plan, for a reduce alone.

    Raises ``IncompleteRun`` where more than ``allow_quarantined`` are missing.
    """
    config, plan, measure_id = asked.config, asked.plan, asked.task.measure.id
    commits = _find_commits(asked)
    if len(plan.shards) - len(commits) > config.allow_quarantined:
        raise IncompleteRun(_lacking(config, measure_id, plan, len(commits)))
    return commits


def _say_nothing_to_do(asked: Preparation, complete: manifest.RunFolder, on_event: OnEvent) -> None:
    """Report that the run of ``asked`` is ``complete``.

    Raises ``StoreError`` where the store has lost shards of that run.
    """
    store, measure_id = asked.config.store, asked.task.measure.id
    gone = manifest.lost_shards(store, measure_id, asked.plan.shards, complete)
    if gone:
        raise StoreError(
            f"run {complete.uri} is complete, but {len(gone)} of its shards are gone from the "
            f"store, as {gone[0]}: delete {complete.uri}/run.json and give this command again to "
            "do them anew"
        )
    message = f"nothing to do: run {complete.uri} is complete and the corpus has not changed"
    on_event(events.Complete(message))


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
    asked = prepare(config, on_event, keep=True, reduce_only=reduce_only)
    plan, measure, frozen = asked.plan, asked.task.measure, asked.frozen
    if reduce_only:
        _commits_to_reduce(asked)  # before anything is written
    claim = run_claims.begin_run(config, measure, plan, asked.begun_ns, frozen)
    plan, folder = replace(plan, shards=claim.shards), claim.run
    if folder.info:
        _say_nothing_to_do(asked, folder, on_event)
        _report_losses(folder, on_event)
        return _opened(claim)
    # after the claim, from which on gc keeps these commits
    commits = shard_files.find_commits(config.store, measure.id, plan.shards)
    todo = [shard for shard in plan.shards if shard.id not in commits]
    work = composition.Work((), tuple(todo))
    if not reduce_only:
        work = composition.plan(replace(asked.task, run=folder.id), todo)
    reporter.begin(folder, plan.shards, commits)
    _report_plan(plan, len(todo), work, folder, on_event)
    if reduce_only:
        state = dispatch.State(0, failures={shard.id: LACKING for shard in todo})
    else:
        state = _process(asked, todo, work, folder, on_event)
    if state.stopped or len(state.failures) > config.allow_quarantined:
        raise IncompleteRun(_failed(state, plan))
    commits |= state.commits
    results = collect(plan, commits, state.failures)
    if not results.counts.get("tokens"):
        raise CorpusError(_no_tokens(config, measure.id, results.commits))
    on_event(events.Reducing())
    encoder = measurer.text_encoder(asked.files)
    texts = TokenTexts(*encoder.texts())
    tables, found = _reduce(asked, results, texts, on_event)
    names = {name: manifest.write_table(folder, name, table) for name, table in tables.items()}
    unknown = {
        "token": None if encoder.unknown is None else texts.pieces[encoder.unknown],
        "tokens": losses.count_unknown(tables["vocabulary"], encoder.unknown),
    }
    facts = facts_of(asked, results, names, len(plan.shards) - len(todo))
    facts["counts"] |= duplicates.counted(facts["counts"], found, tables["thresholds"])
    facts["duplicates"] = found.figures.to_json()
    if config.near_duplicates is not None:
        near = {"threshold": config.near_duplicates, "documents": len(tables["near_duplicates"])}
        facts["near_duplicates"] = near
    times = {
        "created_at": plans.created_at(folder),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
    }
    provenance = provenance_of(results.commits)
    info = {
        **facts,
        "unknown": unknown,
        "quarantined": given_up(results.given_up, results.failures),
        **times,
        "made_by": results.commits[0].made_by,
        "makers": describe_makers(provenance),
        "provenance": provenance,
    }
    folder = manifest.finish_run(folder, info)
    num_missing = len(folder.info["quarantined"])
    if num_missing > config.allow_quarantined:
        raise IncompleteRun(
            f"another process has completed run {folder.uri} without {num_missing} shards, more "
            f"than --allow-quarantined {config.allow_quarantined} permits here; the same command "
            "tries them again"
        )
    _report_complete(folder, results, on_event)
    _report_losses(folder, on_event)
    if "languages" in tables and (lacking := language_uses.without_list(tables["languages"])):
        on_event(events.Warned(lacking))
    return _opened(claim)


def _report_plan(
    plan: plans.Plan,
    num_todo: int,
    work: composition.Work,
    folder: manifest.RunFolder,
    on_event: OnEvent,
) -> None:
    """Report the run's name and its work."""
    num_shards = len(plan.shards)
    num_stored = num_shards - num_todo
    message = (
        f"{count(plan.num_files, 'file')}, {count(plan.num_bytes, 'byte')}, "
        f"{count(num_shards, 'shard')}: {num_stored:,} in the store, {num_todo:,} to do"
    )
    if work.composed:
        message += f"; {composition.describe(work)}"
    on_event(events.Planned(message, run=folder.id))


def _process(
    asked: Preparation,
    todo: Sequence[Shard],
    work: composition.Work,
    folder: manifest.RunFolder,
    on_event: OnEvent,
) -> dispatch.State:
    """Process ``todo``, the shards that the store lacks, as planned in ``work``."""
    if not todo:
        return dispatch.State(0)
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
    config, measure, plan = asked.config, asked.task.measure, results.plan
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


def _report_complete(folder: manifest.RunFolder, results: Results, on_event: OnEvent) -> None:
    """Report that a run is complete, and its missing shards."""
    totals = results.counts
    measured = totals["documents"] - totals["empty"] - totals["quarantined"]
    why = "; their status in the documents view says why" if totals["quarantined"] else ""
    message = (
        f"run {folder.uri} is complete: {count(totals['tokens'], 'token')} of "
        f"{count(measured, 'document')}, {totals['empty']:,} empty, {totals['quarantined']:,} "
        f"quarantined{why}"
    )
    on_event(events.Complete(message))
    copies, choice = duplicates.figures_of(folder.info), duplicates.choice_of(folder.info)
    if copies is not None and copies.documents and choice != duplicates.KEEP:
        sentence, _ = duplicates.describe(copies, choice)
        on_event(events.Complete(f"of these tokens, {sentence}"))
    for shard in given_up(results.given_up[:MOST_SHARDS], results.failures):
        notice = f"missing shard {shard['shard']} ({shard['uri']}): {shard['reason']}"
        on_event(events.Warned(notice))


def _opened(claim: run_claims.Claim) -> Run:
    """The complete run of ``claim``, whose lease is deleted."""
    run = open_run(claim.run.uri)
    if claim.lease is not None:
        storage.delete([claim.lease])
    return run


def _report_losses(run: manifest.RunFolder, on_event: OnEvent) -> None:
    """Report what the complete ``run`` did not measure of its corpus; losses are warnings."""
    files = manifest.read_table(run, "files")
    found = losses.total(files)
    skipped = losses.describe_skipped(losses.skipped_files(files))
    if skipped:
        on_event(events.Complete(f"skipped: {skipped}"))
    record = token_rows.record_of(run.info)
    if not token_rows.is_complete(record):
        on_event(events.Complete(f"recorded: {token_rows.describe(record)}"))
    if selection := selected.describe(run.info):
        on_event(events.Complete(f"selected: {selection}"))
    replaced = losses.describe_replaced(found)
    if replaced:
        on_event(events.Complete(f"replaced: {replaced}"))
    unknown = losses.describe_unknown(run.info)
    if unknown:
        on_event(events.Warned(f"unknown: {unknown}"))
    lost = losses.describe(found)
    if lost:
        on_event(events.Warned(f"lost: {lost}"))
    if "kept" in run.info["tables"]:
        for refused in kept_columns.describe(manifest.read_table(run, "kept")):
            on_event(events.Warned(f"not kept: {refused}"))


def _reporting(reporter: Reporter, on_event: OnEvent) -> OnEvent:
    """``on_event`` that also updates the run's status."""

    def both(event: Event) -> None:
        match event:
            case events.Working(progress):
                reporter.working(progress)
            case events.Warned(notice):
                reporter.notice(notice)
            case events.Hashing(num_read, num_files):
                reporter.phase("planning", f"read {num_read:,} of {num_files:,} files")
            case events.Calibrating() | events.Starting() | events.Reducing() | events.Screening():
                reporter.phase(event.name, event.message)
        on_event(event)

    return both


def _working(on_event: OnEvent) -> dispatch.OnProgress:
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


def _hashing(on_event: OnEvent) -> Callable[[int, int], None]:
    """Callback that reports the number of files hashed."""
    return lambda done, total: on_event(events.Hashing(done, total))


def _failed(state: dispatch.State, plan: plans.Plan) -> str:
    """Message for a run with too many quarantined shards."""
    where = {shard.id: shard.slices[0].uri for shard in plan.shards}
    listed = sorted(state.failures.items())[:MOST_SHARDS]
    lines = [f"  shard {shard} ({where[shard]}): {why}" for shard, why in listed]
    num_more = len(state.failures) - MOST_SHARDS
    if num_more > 0:
        lines.append(f"  and {count(num_more, 'more shard')}")
    stopped = ""
    if state.stopped:
        stopped = f"the run was stopped, since {state.stopped}: is it one fault of all? "
    return (
        f"{stopped}{len(state.failures)} of {count(len(plan.shards), 'shard')} "
        "are quarantined; what is done is committed, and the same command tries "
        "the others again (--allow-quarantined N: a run that lacks up to N "
        "counts as complete):\n" + "\n".join(lines)
    )


def _lacking(config: RunConfig, measure_id: str, plan: plans.Plan, num_there: int) -> str:
    """Message for a reduce alone with too few commits."""
    num_shards = len(plan.shards)
    none = ""
    if not num_there:
        none = f"; of measure {measure_id} it has none: is the config the one that measured?"
    return (
        f"{num_shards - num_there:,} of {count(num_shards, 'shard')} are not in {config.store}, "
        f"and --reduce-only does none{none}; the same command without it does them "
        "(--allow-quarantined N: a run that lacks up to N counts as complete)"
    )


def _no_tokens(config: RunConfig, measure_id: str, commits: Sequence[Commit]) -> str:
    """Message for a corpus without tokens, with reasons of quarantined documents."""
    reasons: list[str] = []
    for commit in commits:
        table = shard_files.read_shard_table(config.store, measure_id, commit, "documents")
        sources = table["source"].to_pylist()
        statuses = table["status"].to_pylist()
        for source, status in zip(sources, statuses, strict=True):
            if status != "empty":
                reasons.append(f"{source}: {status.removeprefix('quarantined: ')}")
        if len(reasons) >= MOST_DOCUMENTS:
            break
    lines = "".join(f"\n  {reason}" for reason in reasons[:MOST_DOCUMENTS])
    totals = Counter(total_counts(commits))  # no commits: 0 of each
    none_of = ""
    if selection := series.selection_of(asdict(config)):
        none_of = f" of what is selected ({selection}; {totals['unselected']:,} documents are not)"
    return (
        f"the corpus has no token to measure{none_of}: {totals['documents']} documents, "
        f"{totals['empty']} empty, {totals['quarantined']} quarantined{':' if lines else ''}{lines}"
    )
