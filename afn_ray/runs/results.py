"""Inputs and results of a run before its reduce, and what run.json says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from afn_ray.corpus_values import Shard
from afn_ray.errors import IncompleteRun
from afn_ray.reduce import lexicon, losses
from afn_ray.run_info import Quarantined, RunInfo, TableEntry
from afn_ray.runs.preparation import Preparation
from afn_ray.store import (
    plans,
)
from afn_ray.store.commits import Commit, Commits, total_counts
from afn_ray.text import count

MOST_REASONS = 1000
"""Quarantined shards whose file and reason run.json keeps; further ones have only their id.

The limit keeps run.json small enough to read.
"""
MOST_CHARS = 1000
"""Longest reason of a missing shard in run.json, in characters."""


@dataclass(frozen=True, slots=True)
class Results:
    """Shards of a run before its reduce: each is committed or given up."""

    plan: plans.Plan
    done: Sequence[Shard]
    commits: Sequence[Commit]  # of ``done``
    given_up: Sequence[Shard]
    failures: Mapping[str, str]  # shard id -> why it is given up
    counts: Mapping[str, int]  # sums of the commits' counts


def collect(plan: plans.Plan, commits: Commits, failures: Mapping[str, str]) -> Results:
    """Results of ``plan``. Raises ``IncompleteRun`` for a shard without commit and reason."""
    done = [s for s in plan.shards if s.id in commits]
    quarantined = [s for s in plan.shards if s.id in failures]
    lost = [s.id for s in plan.shards if s.id not in commits and s.id not in failures]
    if lost:
        raise IncompleteRun(
            f"no commit and no reason for {len(lost)} of {count(len(plan.shards), 'shard')}: "
            f"{', '.join(lost[:9])}"
        )
    ordered = commits.in_order(s.id for s in done)
    return Results(plan, done, ordered, quarantined, failures, total_counts(ordered))


def facts_of(
    asked: Preparation, results: Results, tables: dict[str, TableEntry], num_reused: int
) -> RunInfo:
    """Entries of run.json on the inputs and the shards of a run."""
    config = asked.config
    measure = asked.task.measure
    files = asked.files
    plan = results.plan
    return {
        "measure": {"id": measure.id, **measure.as_dict()},
        "model": {
            "name": config.model,
            "type": files.model_type,
            "depth": files.depth,
            "hidden_size": files.hidden_size,
        },
        "layers": list(measure.layers),
        "tables": tables,
        "config": asdict(config),
        "function_words": lexicon.SOURCE,
        "corpus": {
            "files": plan.num_files,
            "bytes": plan.num_bytes,
            "skipped": len(plan.skipped),
            "skipped_bytes": sum(file.size for file in plan.skipped),
            "unread": plan.unread.num_files,
            "unread_bytes": plan.unread.num_bytes,
        },
        **({"unread_from": plan.unread.first} if plan.unread.first else {}),
        "precision": asked.decided.to_json(),
        "counts": {
            "shards": len(results.commits),
            "shards_reused": num_reused,
            "shards_quarantined": len(results.given_up),
            **losses.with_given_up(results.counts, results.given_up),
        },
    }


def given_up(shards: Sequence[Shard], failures: Mapping[str, str]) -> list[Quarantined]:
    """``shards`` that were quarantined, as run.json lists them.

    The first ``MOST_REASONS`` have file and reason, the others only their id.
    """
    listed: list[Quarantined] = [
        {"shard": s.id, "uri": s.slices[0].uri, "reason": failures[s.id][:MOST_CHARS]}
        for s in shards[:MOST_REASONS]
    ]
    return listed + [{"shard": s.id, "uri": "", "reason": ""} for s in shards[MOST_REASONS:]]
