"""The nightly audit: run tonight's corpus, compare with earlier nights, judge by a policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import Annotated, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook
from afn_ray.analysis import baselines, copies, parts, past, verdict
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.copies import CopiesJson
from afn_ray.analysis.culprits import with_culprits
from afn_ray.analysis.evidence import Evidence
from afn_ray.analysis.nights import Night, choose_partition
from afn_ray.analysis.policy import BASELINES, Policy, check_kind
from afn_ray.analysis.standing import UNKNOWN, Standing, moment, standing
from afn_ray.analysis.verdict import BROKEN, HELD, NOT_JUDGED, WARNED, Rule, RuleJson
from afn_ray.config import RunConfig
from afn_ray.reduce import compare, duplicates, losses
from afn_ray.reduce.compare import Comparison, RunJson
from afn_ray.reduce.losses import Losses, LostJson
from afn_ray.runs import events
from afn_ray.runs.events import OnEvent
from afn_ray.store import checksums, manifest, series, series_runs, storage, uris, verdicts
from afn_ray.store.manifest import RunFolder
from afn_ray.store.verdicts import Distance, StoredVerdict
from afn_ray.text import count

PAGE = "report.html"
JSON_VERSION = 3
"""Version of audit.json's layout; raised when an entry goes or changes its meaning."""
ANSWERS = {HELD: "the policy holds", BROKEN: "the policy is broken", NOT_JUDGED: "not judged"}
"""Words for each state in the last line of the output."""


RULES = pa.schema(
    [
        ("limit", pa.string()),
        ("state", pa.string()),
        ("value", pa.float64()),
        ("where", pa.string()),
        ("reason", pa.string()),
    ]
)
"""Columns of ``Audit.table``; the fields of ``Rule`` say what they are."""


@dataclass(frozen=True, slots=True)
class Audit:
    """One night's verdict and the evidence for it."""

    state: str  # "held", "broken" or "not judged"
    rules: tuple[Rule, ...]
    run: RunFolder
    held_against: Baseline
    comparison: Comparison | None
    losses: Losses  # of ``run``
    notes: tuple[str, ...]
    window: str = "all"
    layer: int = 0  # that was judged
    terms: Mapping[str, str] = field(default_factory=dict)  # ``past.terms`` by name of the limit
    standing: Standing = UNKNOWN  # what earlier audits of the night left
    duplicates: CopiesJson | None = None  # None: the run is older than their count

    @property
    def passed(self) -> bool:
        """True if the policy holds."""
        return self.state == HELD

    @property
    def baseline(self) -> RunFolder | None:
        """The run compared with; None if there is none."""
        return self.held_against.run

    @property
    def series(self) -> str:
        """Name of the series that the run belongs to."""
        return series.name_of(self.run.store, self.run.info["config"])

    @property
    def partition(self) -> date | None:
        """Day of the partition that the run covers; None if it covers the whole corpus."""
        if self.window == "all":
            return None
        return series.day_of(self.run.info["config"]["corpus"])

    @property
    def num_unjudged(self) -> int:
        """Number of limits that were not judged."""
        return sum(rule.state == NOT_JUDGED for rule in self.rules)

    @property
    def reason(self) -> str | None:
        """Limits that were not judged, with the causes; None if all were judged."""
        return "; ".join(verdict.reasons(self.rules)) or None

    @property
    def table(self) -> pa.Table:
        """One row for each limit of the policy, with the columns of ``RULES``."""
        rows = [
            {"limit": rule.key, "state": rule.state, "value": rule.value, "where": rule.where}
            | {"reason": rule.reason}
            for rule in by_state(self.rules)
        ]
        return pa.Table.from_pylist(rows, RULES)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        return notebook.table(f"Audit: {self.state}", self.table) + notebook.text(self.notes)


@series_runs.read_once()
def run_audit(
    config: RunConfig,
    policy: Policy,
    night: Night = Night(),  # noqa: B008 - frozen
    *,
    mark: bool = True,
    on_event: OnEvent = lambda event: None,
) -> Audit:
    """Run ``config``, compare the run with its baseline and judge it by ``policy``.

    Writes the run and, with ``mark``, the verdict beside it; beside earlier nights the figures that
    limits learn from, where they were not kept. With ``mark`` false the caller calls
    ``keep_verdict`` once it has reported the verdict.

    The baseline is an earlier complete run of the same series (``series.name_of``) with a common
    layer, by kind one of:

    A broken night is none, unless it was accepted (``store.verdicts.accept``).

    - "previous": the newest that ``manifest.mark_audited`` marked; without any, the newest.
    - "week": the newest that began at least 6.5 days earlier.
    - "weekday": the one whose partition is seven days older.
    - "median:7": "previous", with the medians of the last 7 nights for scalar figures.

    With the window "new" the run covers one partition, and earlier runs are those of earlier
    partitions, whenever they were made. A limit that lacks what it needs is not judged. Then the
    state is "not judged", unless the policy or ``night.first_night`` says otherwise.

    ``night.frozen`` labels with the thresholds that the named run used, otherwise with those that
    the newest audited run of this series used. Every night passes its thresholds on, so HIGH keeps
    its meaning from the first night.

    The same call gives the same verdict while the corpus is the same, however the previous call
    ended. Raises what ``job.run`` and ``compare.compare`` raise.
    """
    policy = replace(policy, baseline=night.baseline or policy.baseline)
    named = _named_baseline(
        policy.baseline, policy.window
    )  # before the run: a wrong name fails early
    covered = choose_partition(config, policy, night)
    config = covered.config
    parts.check_asked(policy, config)
    if covered.message is not None:
        event = events.Warned if covered.is_late else events.Complete
        on_event(event(covered.message))
    if night.frozen:
        config = baselines.with_frozen_thresholds(config, named)
    baselines.begin_nights(config, policy.window)
    from afn_ray.runs import job  # loads torch, which readers of a verdict do not need

    with job.run(config, on_event) as opened:
        run = manifest.find_run(opened.uri)

    def baseline_of(run: RunFolder, layer: int | None) -> Baseline:
        if named is not None:
            return Baseline(named)
        return baselines.find(run, policy.baseline, policy.window, layer)

    found = _judge(policy, run, baseline_of, night)
    if mark:
        keep_verdict(found)
    return found


def _named_baseline(baseline: str, window: str) -> RunFolder | None:
    """The run whose URI is ``baseline``; None if it is a kind of baseline that ``window`` has."""
    if baselines.is_kind(baseline):
        check_kind(baseline, window)
        return None
    return baselines.named(baseline)


def _judge(
    policy: Policy,
    run: RunFolder,
    baseline_of: Callable[[RunFolder, int | None], Baseline],
    night: Night,
) -> Audit:
    """The verdict on the complete ``run``, held against the baseline that ``baseline_of`` gives.

    A layer that ``baseline_of`` is given is one that the baseline has.
    Earlier nights are judged again against their own, where limits learn from them.
    """
    baseline = baseline_of(run, policy.layer)
    begins = night.first_night and baseline.lacking is not None and not baseline.is_refused
    if begins:
        baseline = replace(baseline, lacking=f"first night: {baseline.lacking}")
    evidence = replace(_gather(policy, run, baseline), is_first=night.first_night)
    before = past.values_before(policy, run, evidence.layer, baseline_of, partial(_gather, policy))
    with checksums.named_damage(run.uri):
        rules = with_culprits(tuple(verdict.judge(policy, evidence, before)), policy, evidence)
    excused = set[str]()
    if night.first_night:
        few = set(verdict.few_nights(policy, before))
        excused = {rule.key for rule in rules if _is_excused(rule, evidence, few, begins=begins)}
    with checksums.named_damage(run.uri):
        notes = tuple(_notes(policy, evidence, night, rules, excused))
    state = verdict.state_of(rules, policy.unjudged, excused)
    return Audit(
        state=state,
        rules=rules,
        run=run,
        held_against=baseline,
        comparison=evidence.comparison,
        losses=evidence.lost,
        notes=notes,
        window=policy.window,
        layer=evidence.layer,
        terms={one.name: past.terms(policy, one, run, baseline.run) for one in policy.limits},
        standing=standing(run, state, rules),
        duplicates=copies.to_json(run, evidence.own),
    )


def _is_excused(rule: Rule, evidence: Evidence, few: Collection[str], *, begins: bool) -> bool:
    """True if ``rule`` lacks what no first night has: of a series that ``begins``, or of its
    groups.

    ``few`` are the reasons of limits that had too few nights to learn from.
    """
    if rule.reason is None:
        return False
    begins_groups = evidence.groups_lacking is not None and rule.limit.of == "group"
    if rule.reason in few:
        return begins or begins_groups
    lacking = evidence.baseline.lacking if begins else None
    return rule.reason in (lacking, evidence.groups_lacking)


def _gather(policy: Policy, run: RunFolder, baseline: Baseline) -> Evidence:
    """Evidence for ``policy`` on the complete ``run``, held against ``baseline``."""
    before = baseline.run
    comparison = None if before is None else compare.compare(before, run)
    with checksums.named_damage(run.uri):
        sources = _sources_of(run, before)
        layer = verdict.judged_layer(policy, run, comparison)
        return Evidence(run, losses.of_run(run), sources, comparison, baseline, layer)


def _notes(
    policy: Policy,
    evidence: Evidence,
    night: Night,
    rules: Sequence[Rule],
    excused: Collection[str],
) -> Iterator[str]:
    """Facts that a reader of the verdict needs, which is on ``rules``.

    ``excused`` names the limits that a first night need not judge.
    """
    baseline, comparison = evidence.baseline, evidence.comparison
    if (labels_of := evidence.run.info["config"].get("thresholds")) is not None:
        yield f"HIGH is decided by the thresholds of {labels_of}."
    elif night.frozen:
        yield (
            "HIGH is decided by this run's own thresholds: --frozen found no earlier night of the "
            "series that may be a baseline."
        )
    if baseline.median_of:
        yield (
            f"Quartiles, HIGH shares, classes and tokens are held against medians of "
            f"{count(len(baseline.median_of), 'night')}, all else against the previous one."
        )
    lacks_baseline = any(rule.reason == baseline.lacking for rule in rules if rule.reason)
    if lacks_baseline and not night.first_night and not baseline.is_refused:
        yield "If this night begins its series, give --first-night."
    if night.first_night and baseline.lacking is None and not excused:
        yield "--first-night had no effect: this night has a baseline."
    figures = duplicates.figures_of(evidence.run.info)
    if figures is not None and figures.repeated_ids:
        _, ids = duplicates.describe(figures, duplicates.choice_of(evidence.run.info))
        yield f"Ids are repeated: {ids}."
    if comparison is None:
        return
    yield from comparison.notes
    yield from parts.notes(policy, evidence)


def _sources_of(run: RunFolder, before: RunFolder | None) -> frozenset[str]:
    """Files that ``run`` read, with tokens or without; folders where there are many files.

    Their names are those in the comparison with ``before``.
    """
    if "sources" not in run.info["tables"]:
        return frozenset()
    names = manifest.read_table(run, "sources")["source"].to_pylist()
    if before is not None:
        _, renamed = compare.source_names(before, run)
        names = map(renamed, names)
    return frozenset(names)


# --- what stays in the store


def keep_verdict(found: Audit, *, told: bool = False) -> None:
    """Write the verdict beside its run, then the mark that the run was audited.

    ``told`` says that somebody was notified of it now. The mark comes last: without it, the next
    audit reports this run's drift again.
    """
    told = told or found.standing.was_told
    verdicts.write_verdict(found.run, replace(to_keep(found), told=told))
    manifest.mark_audited(found.run)


def to_keep(found: Audit) -> StoredVerdict:
    """The part of the verdict that the history of the series needs."""
    return StoredVerdict(
        state=found.state,
        window=found.window,
        layer=found.layer,
        baseline=None if found.baseline is None else found.baseline.uri,
        broken=tuple(rule.key for rule in found.rules if rule.state == BROKEN),
        warned=tuple(rule.key for rule in found.rules if rule.state == WARNED),
        unjudged=tuple(rule.key for rule in found.rules if rule.state == NOT_JUDGED),
        figures={rule.key: rule.value for rule in found.rules},
        distances=tuple(_distances(found.comparison)),
        terms=found.terms,
    )


def _distances(comparison: Comparison | None) -> Iterator[Distance]:
    """Distances of all tokens and of each group, at each layer."""
    if comparison is None:
        return
    for row in comparison.drift.filter(pc.is_null(comparison.drift["source"])).to_pylist():
        yield Distance(row["layer"], None, None, row["psi"], row["ks"], row["js"])
    by = comparison.groups.by
    for row in comparison.groups.drift.to_pylist():
        yield Distance(row["layer"], by, row["group"], row["psi"], row["ks"], row["js"])


# --- results


class AcceptanceJson(TypedDict):
    """Reason why a broken night may be a baseline."""

    why: Annotated[str, "the reason that was given"]
    accepted_at: Annotated[str, "when it was given, ISO 8601 in UTC"]


class AuditJson(TypedDict):
    """Layout of ``audit.json``."""

    schema_version: Annotated[int, "version of this layout", (JSON_VERSION,)]
    state: Annotated[str, "state of the night", (HELD, BROKEN, NOT_JUDGED)]
    reason: Annotated[str | None, "limits that were not judged, with the causes"]
    verdict: Annotated[str, "as state, with pass for held", ("pass", BROKEN, NOT_JUDGED)]
    broken_since: Annotated[str | None, "when the first run of the broken night was finished"]
    accepted: Annotated[AcceptanceJson | None, "whether it may be a baseline all the same"]
    series: Annotated[str, "name of the series that the night belongs to"]
    window: Annotated[str, "what the night covers", tuple(BASELINES)]
    partition: Annotated[str | None, "day of the partition that the run covers: 2026-11-02"]
    rules: Annotated[list[RuleJson], "the limits of the policy, in its order"]
    run: RunJson
    baseline: Annotated[RunJson | None, "the run that the night is held against"]
    median_of: Annotated[list[RunJson], "runs whose medians stand in for its scalar figures"]
    counts: Annotated[dict[str, int], "numbers of shards, documents, tokens and losses"]
    lost: LostJson
    duplicates: Annotated[CopiesJson | None, "copies of texts; null: the run is older than that"]
    notes: Annotated[list[str], "facts that a reader of the verdict needs"]


def to_json(found: Audit) -> AuditJson:
    """The verdict as plain values, the same for the same runs and policy."""
    median_of = [compare.describe(run) for run in found.held_against.median_of]
    accepted: AcceptanceJson | None = None
    if (given := found.standing.acceptance) is not None:
        accepted = {"why": given.why, "accepted_at": given.accepted_at}
    return {
        "schema_version": JSON_VERSION,
        "state": found.state,
        "reason": found.reason,
        "verdict": "pass" if found.passed else found.state,
        "broken_since": found.standing.since if found.state == BROKEN else None,
        "accepted": accepted,
        "series": found.series,
        "window": found.window,
        "partition": None if found.partition is None else found.partition.isoformat(),
        "rules": [verdict.to_json(rule) for rule in found.rules],
        "run": compare.describe(found.run),
        "baseline": None if found.baseline is None else compare.describe(found.baseline),
        "median_of": median_of,
        "counts": found.run.info["counts"],
        "lost": losses.to_json(found.losses),
        "duplicates": found.duplicates,
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
    """The verdict as lines of text: limits, notes, what was not judged and why, the answer.

    A source, group or document that several limits name is listed once, below the first of them.
    """
    named: set[verdict.Culprit] = set()
    for rule in by_state(found.rules):
        state = {HELD: "holds", WARNED: "WARNS", BROKEN: "BROKEN"}.get(rule.state, rule.state)
        where = f" ({text})" if (text := verdict.where_text(rule)) else ""
        value, limit = verdict.value_text(rule), verdict.limit_text(rule)
        comma = "" if rule.usual is None else ","
        yield f"{state:<11}{rule.key:<24}{value:>12}{comma} {limit}{where}"
        for one in rule.culprits:
            if one not in named:
                text = "" if one.text is None else f": {one.text}"
                yield f"{'':<11}{one.kind} {one.name}: {one.reason}{text}"
        if again := named.intersection(rule.culprits):
            yield f"{'':<11}and {len(again):,} of those above"
        named.update(rule.culprits)
    yield from found.notes
    for line in verdict.reasons(found.rules):
        yield f"not judged: {line}"
    partition = "" if found.partition is None else f"partition {found.partition}, "
    yield f"{state_in_words(found)}; {partition}run {found.run.uri}{_against(found)}"


def by_state(rules: tuple[Rule, ...]) -> list[Rule]:
    """``rules`` by state: those that were not judged, broken ones, warnings, then the others."""
    states = (NOT_JUDGED, BROKEN, WARNED, HELD)
    return sorted(rules, key=lambda rule: states.index(rule.state))


def state_in_words(found: Audit) -> str:
    """The state of the night in words, with the number of warnings and who accepted it."""
    num_warned = sum(rule.state == WARNED for rule in found.rules)
    warnings = f"; {count(num_warned, 'warning')}" if num_warned else ""
    accepted = found.standing.acceptance
    word = f"; accepted {moment(accepted.accepted_at)}: {accepted.why}" if accepted else ""
    return _state_text(found) + warnings + word


def _state_text(found: Audit) -> str:
    num_rules = count(len(found.rules), "limit")
    num_broken = sum(rule.state == BROKEN for rule in found.rules)
    num_judged = len(found.rules) - found.num_unjudged
    unjudged = f"{found.num_unjudged} of {num_rules} could not be judged"
    text = ANSWERS[found.state]
    if found.state == BROKEN and found.standing.is_repeated:
        text = f"the policy is still broken since {moment(found.standing.since)}"
    if found.state == NOT_JUDGED:
        return f"{text}: {unjudged}"
    if num_broken:
        text += f": {count(num_broken, 'limit')} of {len(found.rules)}"
        return f"{unjudged}; {text}" if found.num_unjudged else text
    if not found.num_unjudged:
        return text
    if found.state == BROKEN:
        return f"{unjudged}, which the policy counts as broken; {text}"
    return f"{unjudged}; {text} as far as it was judged: {num_judged} of {num_rules}"


def _against(found: Audit) -> str:
    """The run that the night is held against, for the end of the last line."""
    if found.baseline is None:
        return ""
    nights = len(found.held_against.median_of)
    medians = f" and medians of {count(nights, 'night')}" if nights else ""
    return f", against {found.baseline.uri}{medians}"
