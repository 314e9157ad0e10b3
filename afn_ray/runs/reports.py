"""Reports of a run: its work before it, its results and losses after it, and why it failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from afn_ray import token_rows
from afn_ray.config import RunConfig
from afn_ray.reduce import duplicates, kept_columns, losses, selected
from afn_ray.runs import composition, events
from afn_ray.runs.events import OnEvent
from afn_ray.runs.outcome import State
from afn_ray.runs.results import Results, given_up
from afn_ray.store import manifest, plans, series, shard_files
from afn_ray.store.commits import Commit
from afn_ray.text import count

MOST_DOCUMENTS = 5
"""Quarantined documents that the error lists for a corpus without tokens."""
MOST_SHARDS = 20
"""Shards that the end of a run lists one by one."""


def report_plan(
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
    if not num_todo and (same := _earlier(folder)):
        message += (
            f"; run {same} is the same, and another run is newer: the tables are computed again, "
            "so that this is the latest run"
        )
    on_event(events.Planned(message, run=folder.id))


def _earlier(folder: manifest.RunFolder) -> str:
    """Name of an earlier run with the plan of the run in ``folder``, and another run between;
    "" for none.
    """
    suffix = folder.id.rpartition("-")[2]
    earlier = [name for name in manifest.run_names(folder.store) if name < folder.id]
    # The last of them is another run, or there is none between.
    return max((name for name in earlier[:-1] if name.endswith(f"-{suffix}")), default="")


def report_complete(folder: manifest.RunFolder, results: Results, on_event: OnEvent) -> None:
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
    copies = duplicates.figures_of(folder.info)
    choice = duplicates.choice_of(folder.info)
    if copies is not None and copies.documents and choice != duplicates.KEEP:
        sentence, _ = duplicates.describe(copies, choice)
        on_event(events.Complete(f"of these tokens, {sentence}"))
    for shard in given_up(results.given_up[:MOST_SHARDS], results.failures):
        notice = f"missing shard {shard['shard']} ({shard['uri']}): {shard['reason']}"
        on_event(events.Warned(notice))


def report_losses(run: manifest.RunFolder, on_event: OnEvent) -> None:
    """Report what the complete ``run`` did not measure of its corpus; losses are warnings."""
    files = manifest.read_table(run, "files")
    found = losses.total(files)
    skipped = losses.describe_skipped(losses.skipped_files(files))
    if skipped:
        on_event(events.Complete(f"skipped: {skipped}"))
    record = token_rows.record_of(run.info["config"])
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
    encoding = run.info["config"].get("encoding")
    if question := losses.describe_encoding(found.replaced, found.most_replaced, encoding):
        on_event(events.Warned(f"encoding: {question}"))


def failed(state: State, plan: plans.Plan) -> str:
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


def no_tokens(config: RunConfig, counts: Mapping[str, int], reasons: Sequence[str]) -> str:
    """Message for a corpus without tokens.

    ``counts`` are those of its shards, ``reasons`` some of its quarantined documents'.
    """
    totals = Counter(counts)  # no shards: 0 of each
    none_of = ""
    if selection := series.selection_of(asdict(config)):
        if totals["unselected"] and not totals["documents"]:
            why = selected.describe_nothing(asdict(config), totals)
            return f"the corpus has no token to measure: {why}"
        left_out = totals["unselected"]
        none_of = f" of what is selected ({selection}; {count(left_out, 'document')} left out)"
    lines = "".join(f"\n  {reason}" for reason in reasons[:MOST_DOCUMENTS])
    return (
        f"the corpus has no token to measure{none_of}: {count(totals['documents'], 'document')}, "
        f"{totals['empty']:,} empty, {totals['quarantined']:,} quarantined"
        f"{':' if lines else ''}{lines}"
    )


def quarantine_reasons(store: str, measure_id: str, commits: Iterable[Commit]) -> list[str]:
    """Files of some quarantined documents of ``commits``, with the reasons."""
    reasons: list[str] = []
    for commit in commits:
        table = shard_files.read_shard_table(store, measure_id, commit, "documents")
        sources = table["source"].to_pylist()
        statuses = table["status"].to_pylist()
        for source, status in zip(sources, statuses, strict=True):
            if status != "empty":
                reasons.append(f"{source}: {status.removeprefix('quarantined: ')}")
        if len(reasons) >= MOST_DOCUMENTS:
            break
    return reasons[:MOST_DOCUMENTS]
