"""The nightly audit: run today's corpus, compare with an earlier run, judge by a policy."""

from __future__ import annotations

import ipaddress
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError
from afn_ray.reduce import compare, losses
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.losses import Losses
from afn_ray.runs import job, precheck
from afn_ray.runs.events import OnEvent
from afn_ray.store import checksums, manifest, settings, storage
from afn_ray.store.layout import STAMP
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

PAGE = "report.html"
JSON_VERSION = 1
"""Version of audit.json's layout; raised when an entry goes or changes its meaning."""
WEEK = timedelta(days=6.5)
"""Least age of a baseline of last week; under 7 days, as nights do not begin on the minute."""
LEAST_TOKENS = 1000
"""Default of ``min_tokens``: tokens that a source needs in both runs to be judged.

Distances between fewer tokens are mostly chance: chance alone gives a PSI of 9/n_a + 9/n_b.
"""
TOLD_SOURCES = 5
WEBHOOK_TRIES = 3
WEBHOOK_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 300.0

RUN_LIMITS = {
    "quarantined_documents": "share of the rows of documents that may be quarantined; the rest of "
                             "a damaged file is "
                             "one row, so limit what is lost too",
    "quarantined_shards": "share of the shards that may be missing (of those that "
                          "allow_quarantined lets pass)",
    "empty_documents": "share of the documents read that may be empty",
    "lost_bytes": "bytes of the corpus that may be lost: damaged, cut off, quarantined",
    "lost_share": "share of the bytes to be read that may be lost",
    "lost_documents": "documents that may be lost; a loss of a number that nobody can tell breaks "
                      "every limit",
    "replaced_characters": "characters that may be replaced (U+FFFD), for bytes that are no text",
    "replaced_share": "share of the characters that may be replaced",
}  # fmt: skip
"""Limits on the run alone; each key with its meaning."""
DISTANCE_LIMITS = {
    "psi": "population stability index of the strengths, at most",
    "ks": "Kolmogorov-Smirnov distance of the strengths, at most",
    "js": "Jensen-Shannon distance of the strengths, at most",
    "q1_shift": "change of Q1 relative to the baseline's, up or down, at most",
    "q2_shift": "change of the median relative to the baseline's, up or down, at most",
    "q3_shift": "change of Q3 relative to the baseline's, up or down, at most",
    "share_high_shift": "change of the share of HIGH tokens, at most (says something where "
    "thresholds are frozen)",
}
"""Limits on two runs and, in ``[source]``, on each source in both; each key with its meaning."""
DRIFT_LIMITS = {
    **DISTANCE_LIMITS,
    "class_share_shift": "change of any class's share of the tokens, at most",
    "class_high_shift": "change of the HIGH share of any class in both runs, at most",
    "max_moved_types": "types whose HIGH share moved (q < 0.05), at most",
    "max_new_types": "types that the baseline has not, at most",
    "max_vanished_types": "types that only the baseline has, at most",
    "max_new_sources": "sources that the baseline has not, at most",
    "max_vanished_sources": "sources that only the baseline has, at most",
    "min_tokens_ratio": "tokens of this run over the baseline's, at least",
    "max_tokens_ratio": "tokens of this run over the baseline's, at most",
}
SOURCE_LIMITS = {
    **DISTANCE_LIMITS,
    "min_tokens_ratio": "tokens of a source in this run over those in the baseline, at least",
}
"""Limits in ``[source]`` on the worst source; ``max_vanished_sources`` limits vanished ones."""
WHOLE = ("lost_bytes", "lost_documents", "replaced_characters")
"""Limits on the run alone that are counts, not shares."""
OPTIONS = {"layer": "layer that is judged; default: the deepest that both runs recorded"}
SOURCE_OPTIONS = {
    "min_tokens": "tokens that a source needs in both runs (for min_tokens_ratio: in the "
                  "baseline) to be judged; "
                  f"default: {LEAST_TOKENS}"
}  # fmt: skip
IN_SOURCE = "\n  [source]: limits for the worst source"
SHARES = (
    *(key for key in RUN_LIMITS if key not in WHOLE),
    "ks",
    "js",
    "share_high_shift",
    "class_share_shift",
    "class_high_shift",
)
"""Limits that are shares: a value above 1 is an error."""
OF_MEASURE = ("model", "revision", "layers", "dtype", "window_tokens", "overlap_tokens")
"""Config keys that two runs of one measure share; the model's files may still differ."""
OF_SOURCES = ("max_new_sources", "max_vanished_sources")
PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits on a run and on its drift, by key; shares are numbers from 0 to 1."""

    limits: Mapping[str, float]
    source_limits: Mapping[str, float]
    layer: int | None
    min_tokens: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit and the value compared with it."""

    key: str  # name in the policy; source.psi for psi in [source]
    limit: float
    value: float | None  # None: infinite, or unknown because nothing could be compared
    passed: bool | None  # None: not judged
    where: str | None  # source, class, files or layer that the value belongs to
    meaning: str


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
    named = (
        None if baseline in BASELINES else _named(baseline)
    )  # before the run, so that a wrong name fails early
    if frozen:
        config = _frozen(config, named)
    _begin_nights(config)
    with job.run(config, on_event) as opened:
        run = manifest.find_run(opened.uri)
    before = named or BASELINES[baseline](run)
    comparison = None if before is None else compare.compare(before, run)
    with checksums.named_damage(run.uri):
        lost = losses.of_run(run)
        rules = tuple(judge(policy, run, comparison, lost, _sources_of(run)))
        notes = tuple(_notes(policy, run, comparison, baseline))
    if mark:
        manifest.mark_audited(run)
    return Audit(
        all(r.passed is not False for r in rules), rules, run, before, comparison, lost, notes
    )


def _notes(
    policy: Policy, run: RunFolder, comparison: Comparison | None, baseline: str
) -> Iterator[str]:
    """Facts that a reader of the verdict needs."""
    if (labels_of := run.info["config"].get("thresholds")) is not None:
        yield f"HIGH is decided by the thresholds of {labels_of}."
    if comparison is None:
        if next(_comparable(run), None) is None:
            yield (
                "First night: no earlier run of this corpus and measure is here, and what needs "
                "one was not judged."
            )
        else:
            days = WEEK.total_seconds() / 86_400
            yield (
                f"No earlier run is {days:g} days old yet (--baseline {baseline}); what needs one "
                "was not judged."
            )
        return
    yield from comparison.notes
    if policy.source_limits:
        layer = _judged_layer(policy, run, comparison)
        rows = _judged_sources(comparison, layer, policy.min_tokens)
        if "min_tokens_ratio" in policy.source_limits:
            rows += _shrinkable(comparison, layer, policy.min_tokens, _sources_of(run))
        judged = {row["source"] for row in rows} | {None}
        left = [r for r in _at(comparison.drift, layer).to_pylist() if r["source"] not in judged]
        there = [row for row in left if row["n_b"]]
        new = [f"{r['source']} ({count(r['n_b'], 'token')})" for r in there if not r["n_a"]]
        if new:
            yield (
                f"[source] judged nothing of {count(len(new), 'new source')}, which have nothing "
                "to be held against: "
                f"{_first(new)}; max_new_sources limits them."
            )
        if gone := [f"{r['source']} ({count(r['n_a'], 'token')})" for r in left if not r["n_b"]]:
            yield (
                f"[source] judged nothing of {count(len(gone), 'source')} of the baseline without "
                "a token in this run: "
                f"{_first(gone)}; max_vanished_sources limits them."
            )
        if small := len(there) - len(new):
            yield (
                f"[source] judged nothing of {count(small, 'source')} under min_tokens, "
                f"{policy.min_tokens:,}."
            )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - TOLD_SOURCES:,} more" if len(names) > TOLD_SOURCES else ""
    return f"{', '.join(names[:TOLD_SOURCES])}{more}"


def _named(uri: str) -> RunFolder:
    if "/" not in uri and not storage.exists(uri):
        raise ConfigError(
            f"baseline is {uri!r}; expected {', '.join(BASELINES)} or a run's URI, as in "
            "store/runs/..."
        )
    run = manifest.find_run(uri)
    if run.uri != storage.absolute(uri).rstrip("/"):
        raise ConfigError(
            f"baseline {uri} is a store, whose latest run is another one every night; name one of "
            f"its runs, {run.uri} "
            f"say, or give {' or '.join(BASELINES)}"
        )
    return run


def _frozen(config: RunConfig, named: RunFolder | None) -> RunConfig:
    precheck.check_frozen(config)
    source = named or _last_told(_asked_alike(config))
    return config if source is None else replace(config, thresholds=source.uri)


def _begin_nights(config: RunConfig) -> None:
    """Mark the newest run as audited where no run of its measure was audited yet.

    The first audit is compared with that run. So are the next ones until an audit completes,
    because the verdicts on their runs were never reported.
    """
    run = next(_asked_alike(config), None)
    if run is not None and not any(
        map(manifest.is_audited, itertools.chain([run], _comparable(run)))
    ):
        manifest.mark_audited(run)


def _asked_alike(config: RunConfig) -> Iterator[RunFolder]:
    """Complete runs of this corpus and, by the config's keys, of its measure; newest first."""
    asked = asdict(job.normalised(config))
    for run in _complete_runs(asked["store"]):
        if _corpus(run) == list(asked["corpus"]) and all(
            run.info["config"].get(k) == asked[k] for k in OF_MEASURE
        ):
            yield run


def _last_told(runs: Iterator[RunFolder]) -> RunFolder | None:
    """The newest audited run of ``runs``, which are newest first; without any the newest run."""
    newest = None
    for run in runs:
        if manifest.is_audited(run):
            return run
        newest = newest or run
    return newest


def _complete_runs(store: str, before: str | None = None) -> Iterator[RunFolder]:
    """The store's complete runs that began before the run named ``before``, newest first."""
    for name in reversed(manifest.run_names(store)):
        if before is None or name < before:
            run = manifest.open_folder(store, name)
            if run.info and not manifest.is_copy(run):
                yield run


def _previous(run: RunFolder) -> RunFolder | None:
    """The newest audited run; the newest of all where none was audited.

    A run whose audit was killed is not a baseline: its verdict was never reported, so its drift
    counts again.
    """
    return _last_told(_comparable(run))


def _last_week(run: RunFolder) -> RunFolder | None:
    latest = _began(run) - WEEK
    return next((r for r in _comparable(run) if _began(r) <= latest), None)


def _comparable(run: RunFolder) -> Iterator[RunFolder]:
    """Complete runs of the same measure and corpus that began before ``run``, newest first.

    Runs directly before it with the same request, or with the same shards, count as ``run`` itself
    and are left out. They are retries for missing shards, or repeats after another corpus of the
    store had a run in between.
    """
    asked, shards = (
        run.id.rpartition("-")[2],
        run.info["tables"].get("shards", {}).get("sha256", ""),
    )
    same = (
        r
        for r in _complete_runs(run.store, run.id)
        if r.info["measure"]["id"] == run.info["measure"]["id"] and _corpus(r) == _corpus(run)
    )
    return itertools.dropwhile(
        lambda r: (
            r.id.endswith(f"-{asked}") or r.info["tables"].get("shards", {}).get("sha256") == shards
        ),
        same,
    )


def _corpus(run: RunFolder) -> list[str]:
    return list(run.info["config"]["corpus"])


def _began(run: RunFolder) -> datetime:
    return datetime.strptime(run.id.partition("-")[0], STAMP).replace(tzinfo=UTC)


BASELINES: dict[str, Callable[[RunFolder], RunFolder | None]] = {
    "previous": _previous,
    "week": _last_week,
}


# --- policy


def read_policy(file: str | Path) -> Policy:
    """Read the policy from the TOML ``file``, a path or any fsspec URL.

    Raises ``ConfigError`` for an unknown key, with the known ones, and for an invalid value.
    """
    values = settings.read_toml(file, "policy")
    source = values.pop("source", {})
    if not isinstance(source, dict):
        raise ConfigError(f"policy {file}: source is {source!r}; expected a table, [source]")
    _check_keys(file, "", values, RUN_LIMITS | DRIFT_LIMITS | OPTIONS)
    _check_keys(file, "[source] ", source, SOURCE_LIMITS | SOURCE_OPTIONS)
    layer = _whole(file, "layer", values.pop("layer")) if "layer" in values else None
    min_tokens = _whole(file, "min_tokens", source.pop("min_tokens", LEAST_TOKENS))
    limits = {key: _limit(file, key, value) for key, value in values.items()}
    source_limits = {key: _limit(file, f"source.{key}", value) for key, value in source.items()}
    if not limits and not source_limits:
        known = _listed(RUN_LIMITS | DRIFT_LIMITS | OPTIONS)
        raise ConfigError(
            f"policy {file} has no limit, so nothing could break it; it may "
            f"have:\n{known}{IN_SOURCE}"
        )
    return Policy(limits, source_limits, layer, min_tokens)


def _check_keys(
    file: str | Path, table: str, values: Mapping[str, Any], known: Mapping[str, str]
) -> None:
    if unknown := sorted(values.keys() - known.keys()):
        tables = "" if table else IN_SOURCE
        raise ConfigError(
            f"policy {file}: no such {table}key: {', '.join(unknown)}; there "
            f"are:\n{_listed(known)}{tables}"
        )


def _listed(known: Mapping[str, str]) -> str:
    return "\n".join(f"  {key}: {meaning}" for key, meaning in known.items())


def _limit(file: str | Path, key: str, value: object) -> float:
    """Parse a limit; 0.02 and "2%" are the same."""
    if key in WHOLE or (key.startswith("max_") and not key.endswith("_ratio")):
        return _whole(file, key, value)
    if isinstance(value, int | float) and value > 1 and key.removeprefix("source.") in SHARES:
        raise ConfigError(
            f'policy {file}: {key} is {value!r}, and a share is at most 1; is it "{value:g}%"?'
        )
    if isinstance(value, str) and (percent := PERCENT.fullmatch(value.strip())):
        return float(percent[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ConfigError(
        f'policy {file}: {key} is {value!r}; expected a number from 0, or a share as in "2%"'
    )


def _whole(file: str | Path, key: str, value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ConfigError(f"policy {file}: {key} is {value!r}; expected a whole number from 0")


def judge(
    policy: Policy,
    run: RunFolder,
    comparison: Comparison | None,
    lost: Losses,
    sources: Collection[str],
) -> Iterator[Rule]:
    """Compare ``run`` and ``comparison`` with each limit of ``policy``, in the policy's order.

    ``lost`` is what the run lost. ``sources`` are the sources that it read, with tokens or
    without. Rules that need a comparison are not judged without one, nor rules on sources where the
    baseline has no table of sources. Raises ``ConfigError`` for limits that this run's layers or
    tables can never be compared with.
    """
    layer = _judged_layer(policy, run, comparison)
    if (
        policy.source_limits or policy.limits.keys() & set(OF_SOURCES)
    ) and "sources" not in run.info["tables"]:
        raise ConfigError(
            f"the policy limits sources, but run {run.uri} has no table of them: run it with its "
            "screening (--screen)"
        )
    alone = dict(_of_run(run, lost))
    moved = {} if comparison is None else dict(_of_comparison(comparison, layer))
    for key, limit in policy.limits.items():
        value, where = alone[key] if key in alone else moved.get(key, (None, None))
        yield _rule(key, limit, value, where, (RUN_LIMITS | DRIFT_LIMITS)[key])
    for key, limit in policy.source_limits.items():
        value, where = None, None
        if comparison is not None and key == "min_tokens_ratio":
            rows = _shrinkable(comparison, layer, policy.min_tokens, sources)
            value, where = min(
                ((row["n_b"] / row["n_a"], row["source"]) for row in rows), default=(None, None)
            )
        elif comparison is not None:
            rows = _judged_sources(comparison, layer, policy.min_tokens)
            value, where = max(
                ((_distance(row, key), row["source"]) for row in rows), default=(None, None)
            )
        yield _rule(f"source.{key}", limit, value, where, SOURCE_LIMITS[key])


def _judged_layer(policy: Policy, run: RunFolder, comparison: Comparison | None) -> int:
    layers = (
        run.info["layers"] if comparison is None else comparison.drift["layer"].unique().to_pylist()
    )
    if policy.layer is not None and policy.layer not in layers:
        raise ConfigError(
            f"the policy judges layer {policy.layer}, which was not recorded; there are {layers}"
        )
    return max(layers) if policy.layer is None else policy.layer


def _rule(key: str, limit: float, value: float | None, where: str | None, meaning: str) -> Rule:
    if value is None:
        return Rule(key, limit, None, None, where, meaning)
    passed = value >= limit if _is_minimum(key) else value <= limit
    return Rule(key, limit, value if math.isfinite(value) else None, passed, where, meaning)


def _is_minimum(key: str) -> bool:
    return key.removeprefix("source.").startswith("min_")


Measured = tuple[str, tuple[float | None, str | None]]


def _of_run(run: RunFolder, lost: Losses) -> Iterator[Measured]:
    """Values of ``RUN_LIMITS``; losses come with the worst files."""
    counts = run.info["counts"]
    missing = len(run.info["quarantined"])
    yield "quarantined_documents", (counts["quarantined"] / max(1, counts["documents"]), None)
    yield "quarantined_shards", (missing / max(1, counts["shards"] + missing), None)
    yield "empty_documents", (counts["empty"] / max(1, counts["documents"]), None)
    files, replaced = losses.worst_files(lost) or None, losses.replaced_files(lost) or None
    yield "lost_bytes", (lost.lost_bytes, files)
    yield "lost_share", (lost.share, files)
    unknown = None if files is None else f"{losses.said_documents(lost)}: {files}"
    yield "lost_documents", (math.inf if lost.lost_unknown else lost.lost_documents, unknown)
    yield "replaced_characters", (lost.replaced, replaced)
    yield "replaced_share", (min(1.0, lost.replaced / max(1, counts["chars"])), replaced)


def _of_comparison(comparison: Comparison, layer: int) -> Iterator[Measured]:
    """Values of ``DRIFT_LIMITS`` at ``layer``; of sources only where both runs have their table."""
    drift = _at(comparison.drift, layer).to_pylist()
    whole = next(row for row in drift if row["source"] is None)
    for key in DISTANCE_LIMITS if whole["n_a"] and whole["n_b"] else ():
        yield key, (_distance(whole, key), None)
    yield from (
        ("min_tokens_ratio", (ratio := _ratio(whole["n_b"], whole["n_a"]), None)),
        ("max_tokens_ratio", (ratio, None)),
    )
    classes = _at(comparison.classes, layer).to_pylist()
    shares = [(abs(c["share_b"] - c["share_a"]), c["class"]) for c in classes]
    highs = [
        (abs(c["share_high_b"] - c["share_high_a"]), c["class"])
        for c in classes
        if c["n_a"] and c["n_b"]
    ]
    yield "class_share_shift", max(shares, default=(0.0, None))
    yield "class_high_shift", max(highs, default=(0.0, None))
    movers = _at(comparison.movers, layer)
    yield "max_moved_types", (compare.num_moved(movers), None)
    for status in ("new", "vanished"):
        yield (
            f"max_{status}_types",
            (int(pc.sum(pc.equal(movers["status"], status)).as_py() or 0), None),
        )
    if sources := [row for row in drift if row["source"] is not None]:
        yield "max_new_sources", (sum(not row["n_a"] for row in sources), None)
        yield "max_vanished_sources", (sum(not row["n_b"] for row in sources), None)


def _at(table: pa.Table, layer: int) -> pa.Table:
    return table.filter(pc.equal(table["layer"], layer))


def _judged_sources(comparison: Comparison, layer: int, min_tokens: int) -> list[dict[str, Any]]:
    rows = _at(comparison.drift, layer).to_pylist()
    return [
        r for r in rows if r["source"] is not None and min(r["n_a"], r["n_b"]) >= max(1, min_tokens)
    ]


def _shrinkable(
    comparison: Comparison, layer: int, min_tokens: int, sources: Collection[str]
) -> list[dict[str, Any]]:
    """Sources with ``min_tokens`` in the baseline that this run read, even without a token."""
    there = [f"{name}/" for name in sources]
    return [
        row
        for row in _at(comparison.drift, layer).to_pylist()
        if row["source"] is not None
        and row["n_a"] >= max(1, min_tokens)
        and (row["n_b"] or any(name.startswith(f"{row['source']}/") for name in there))
    ]


def _sources_of(run: RunFolder) -> frozenset[str]:
    """Files that ``run`` read, with tokens or without; folders where there are many files."""
    if "sources" not in run.info["tables"]:
        return frozenset()
    return frozenset(manifest.read_table(run, "sources")["source"].to_pylist())


def _distance(row: dict[str, Any], key: str) -> float:
    """Value of a ``DISTANCE_LIMITS`` key in a ``DRIFT_SCHEMA`` row with tokens in both runs."""
    if key == "share_high_shift":
        return float(abs(row["share_high_b"] - row["share_high_a"]))
    if key in row:
        return float(row[key])
    quartile = key.removesuffix("_shift")
    return abs(_ratio(row[f"{quartile}_b"], row[f"{quartile}_a"]) - 1)


def _ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return math.inf if a else 1.0


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
    target = storage.join(folder, "audit.json")
    storage.write_over(target, to_bytes(found), retry_for_s=None)
    storage.remove(storage.join(folder, PAGE))
    return target


def lines(found: Audit) -> Iterator[str]:
    """The verdict as lines of text: rules, broken ones first; then notes; then the answer."""
    for rule in sorted(found.rules, key=lambda r: (r.passed is not False, r.passed is not None)):
        said = {True: "holds", False: "BROKEN", None: "not judged"}[rule.passed]
        value = "" if rule.passed is None else _said_value(rule)
        where = f" ({rule.where})" if rule.where is not None else ""
        sign = ">=" if _is_minimum(rule.key) else "<="
        limit = f"{rule.limit:,}" if rule.key in WHOLE else f"{rule.limit:g}"
        yield f"{said:<11}{rule.key:<24}{value:>12} {sign} {limit}{where}"
    yield from found.notes
    broken = sum(rule.passed is False for rule in found.rules)
    against = "" if found.baseline is None else f", against {found.baseline.uri}"
    judged = sum(rule.passed is not None for rule in found.rules)
    verdict = "the policy holds"
    if broken:
        verdict = f"the policy is broken: {count(broken, 'limit')} of {len(found.rules)}"
    elif judged < len(found.rules):
        verdict += f" as far as it was judged: {judged} of {count(len(found.rules), 'limit')}"
    yield f"{verdict}; run {found.run.uri}{against}"


def _said_value(rule: Rule) -> str:
    if rule.value is None:
        return "unknown" if rule.key == "lost_documents" else "infinite"
    return f"{rule.value:,}" if rule.key in WHOLE else f"{rule.value:.5g}"


# --- notification


def check_webhook(url: str, allow_http: bool) -> str:
    """Return ``url`` if a verdict may be sent there.

    Allowed are https, http to this machine, and with ``allow_http`` any http. Raises
    ``ConfigError``, which names only the URL's host: the rest is often a secret.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("the webhook is no URL; expected https://host/...") from None
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(
            "the webhook's URL has spaces or letters outside ASCII; escape them with %"
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"the webhook's URL has a user's name before {host}; put a secret into its path, or "
            "leave it out"
        )
    if parts.scheme not in ("https", "http") or not host or (port is not None and not port):
        raise ConfigError(
            f"the webhook is a {parts.scheme or 'plain'} address; expected https://host/..."
        )
    if parts.scheme == "http" and not allow_http and not _is_this_machine(host):
        raise ConfigError(
            f"the webhook at {host} is http, which anybody on the way reads; use https, or "
            "--allow-http"
        )
    return url


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an answer like 404: it could lead a checked URL anywhere."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        return None


def post(url: str, body: bytes, pause_s: float = 1.0) -> str | None:
    """POST the JSON ``body``; return None on success, else the reason of the failure.

    Tries up to ``WEBHOOK_TRIES`` times: again after no answer, 429 or 5xx.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 - checked before
    local = urlsplit(url).scheme == "http" and _is_this_machine(urlsplit(url).hostname or "")
    proxies = (
        [urllib.request.ProxyHandler({})] if local else []
    )  # requests to this machine bypass every proxy
    opener = urllib.request.build_opener(_NoRedirects, *proxies)
    why = ""
    for attempt in range(WEBHOOK_TRIES):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            with opener.open(request, timeout=WEBHOOK_TIMEOUT_S):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            why = f"status {error.code}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, HTTPException) as error:
            why = str(getattr(error, "reason", error))
    return f"the webhook at {urlsplit(url).hostname} did not take the verdict: {why}"


def call_command(command: list[str], audit_json: str) -> str | None:
    """Run ``command`` without a shell; return None if it exits with 0, else the reason.

    The environment variable AFN_AUDIT_JSON holds the URI of audit.json.
    """
    try:
        done = subprocess.run(  # noqa: S603 - it is what the user asked for
            command,
            env={**os.environ, "AFN_AUDIT_JSON": audit_json},
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"--on-broken {command[0]} was stopped after {COMMAND_TIMEOUT_S:g} s"
    except OSError as error:
        return f"--on-broken {command[0]} could not be run: {error}"
    return None if done.returncode == 0 else f"--on-broken {command[0]} left with {done.returncode}"


def parse_command(text: str) -> list[str]:
    """Split ``text`` into words as a shell does.

    Raises ``ConfigError`` where a shell would fail, where there is no word, and for an unknown
    command.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--on-broken {text!r} is no command: {error}") from error
    if not words:
        raise ConfigError("--on-broken is empty; give a command, or leave it out")
    if shutil.which(words[0]) is None:
        raise ConfigError(f"--on-broken {words[0]!r} is no command that can be found here")
    return words
