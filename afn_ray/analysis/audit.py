"""The nightly audit: run today's corpus, compare with an earlier run, judge by a policy."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from afn_ray.analysis import baselines, verdict
from afn_ray.analysis.policy import WHOLE, Policy
from afn_ray.analysis.verdict import Rule
from afn_ray.config import RunConfig
from afn_ray.reduce import compare, losses
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.losses import Losses
from afn_ray.runs import job
from afn_ray.runs.events import OnEvent
from afn_ray.store import checksums, manifest, storage, uris
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

PAGE = "report.html"
JSON_VERSION = 1
"""Version of audit.json's layout; raised when an entry goes or changes its meaning."""


@dataclass(frozen=True, slots=True)
class Audit:
    """One night's verdict and the evidence for it."""

    passed: bool
    rules: tuple[Rule, ...]
    run: RunFolder
    baseline: RunFolder | None  # None: the first night
    comparison: Comparison | None
    losses: Losses  # of ``run``
    notes: tuple[str, ...]


def run_audit(
    config: RunConfig,
    policy: Policy,
    *,
    baseline: str = "previous",
    frozen: bool = False,
    mark: bool = True,
    on_event: OnEvent = lambda event: None,
) -> Audit:
    """Run ``config``, compare the run with ``baseline`` and judge it by ``policy``.

    Writes the run and, with ``mark``, the mark that it was audited. With ``mark`` false the caller
    calls ``manifest.mark_audited`` once it has reported the verdict.

    ``baseline`` is one of:

    - "previous": the store's newest earlier run of the same measure and corpus that
      ``manifest.mark_audited`` marked; without any, the newest complete one.
    - "week": the newest complete one that began at least 6.5 days earlier.
    - the URI of a run.

    Without a baseline this is the first night, and rules that need one are not judged. ``frozen``
    labels with the thresholds that the named run used, otherwise with those that the newest audited
    run of this corpus used. Every night passes its thresholds on, so HIGH keeps its meaning from
    the first night.

    The same call gives the same verdict while the corpus is the same, however the previous call
    ended. Raises what ``job.run`` and ``compare.compare`` raise.
    """
    # Find a named baseline before the run, so that a wrong name fails early.
    named = None if baseline in baselines.BASELINES else baselines.named(baseline)
    if frozen:
        config = baselines.with_frozen_thresholds(config, named)
    baselines.begin_nights(config)
    with job.run(config, on_event) as opened:
        run = manifest.find_run(opened.uri)
    before = named or baselines.BASELINES[baseline](run)
    comparison = None if before is None else compare.compare(before, run)
    with checksums.named_damage(run.uri):
        lost = losses.of_run(run)
        sources = _sources_of(run)
        rules = tuple(verdict.judge(policy, run, comparison, lost, sources))
        notes = tuple(_notes(policy, run, comparison, baseline, sources))
    if mark:
        manifest.mark_audited(run)
    passed = all(rule.passed is not False for rule in rules)
    return Audit(passed, rules, run, before, comparison, lost, notes)


def _notes(
    policy: Policy,
    run: RunFolder,
    comparison: Comparison | None,
    baseline: str,
    sources: Collection[str],
) -> Iterator[str]:
    """Facts that a reader of the verdict needs."""
    if (labels_of := run.info["config"].get("thresholds")) is not None:
        yield f"HIGH is decided by the thresholds of {labels_of}."
    if comparison is None:
        if next(baselines.comparable_runs(run), None) is None:
            yield (
                "First night: no earlier run of this corpus and measure is here, and what needs "
                "one was not judged."
            )
        else:
            days = baselines.WEEK.total_seconds() / 86_400
            yield (
                f"No earlier run is {days:g} days old yet (--baseline {baseline}); what needs one "
                "was not judged."
            )
        return
    yield from comparison.notes
    if policy.source_limits:
        yield from verdict.unjudged_sources(policy, run, comparison, sources)


def _sources_of(run: RunFolder) -> frozenset[str]:
    """Files that ``run`` read, with tokens or without; folders where there are many files."""
    if "sources" not in run.info["tables"]:
        return frozenset()
    return frozenset(manifest.read_table(run, "sources")["source"].to_pylist())


# --- results


def to_json(found: Audit) -> dict[str, Any]:
    """The verdict as plain values, the same for the same runs and policy."""
    return {
        "schema_version": JSON_VERSION,
        "verdict": "pass" if found.passed else "broken",
        "rules": [asdict(rule) for rule in found.rules],
        "run": compare.describe(found.run),
        "baseline": None if found.baseline is None else compare.describe(found.baseline),
        "counts": found.run.info["counts"],
        "lost": losses.to_json(found.losses),
        "notes": list(found.notes),
    }


def to_bytes(found: Audit) -> bytes:
    """Content of audit.json, UTF-8."""
    return (
        json.dumps(to_json(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def write_json(found: Audit, folder: str) -> str:
    """Write audit.json to ``folder``, a path or any fsspec URL, and return its URI.

    Replaces an older one atomically and deletes that one's page. Raises ``StoreError`` or
    ``Unavailable``.
    """
    target = uris.join(folder, "audit.json")
    storage.write_over(target, to_bytes(found), retry_for_s=None)
    storage.remove(uris.join(folder, PAGE))
    return target


def lines(found: Audit) -> Iterator[str]:
    """The verdict as lines of text: rules, broken ones first; then notes; then the answer."""
    for rule in sorted(found.rules, key=lambda r: (r.passed is not False, r.passed is not None)):
        state = {True: "holds", False: "BROKEN", None: "not judged"}[rule.passed]
        value = "" if rule.passed is None else _value_in_words(rule)
        where = f" ({rule.where})" if rule.where is not None else ""
        sign = ">=" if verdict.is_minimum(rule.key) else "<="
        limit = f"{rule.limit:,}" if rule.key in WHOLE else f"{rule.limit:g}"
        yield f"{state:<11}{rule.key:<24}{value:>12} {sign} {limit}{where}"
    yield from found.notes
    broken = sum(rule.passed is False for rule in found.rules)
    against = "" if found.baseline is None else f", against {found.baseline.uri}"
    judged = sum(rule.passed is not None for rule in found.rules)
    answer = "the policy holds"
    if broken:
        answer = f"the policy is broken: {count(broken, 'limit')} of {len(found.rules)}"
    elif judged < len(found.rules):
        answer += f" as far as it was judged: {judged} of {count(len(found.rules), 'limit')}"
    yield f"{answer}; run {found.run.uri}{against}"


def _value_in_words(rule: Rule) -> str:
    if rule.value is None:
        return "unknown" if rule.key == "lost_documents" else "infinite"
    return f"{rule.value:,}" if rule.key in WHOLE else f"{rule.value:.5g}"
