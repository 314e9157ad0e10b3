"""The nightly audit: what breaks a policy, what it is held against, its exit codes, and kills at
every step.
"""

from __future__ import annotations

import gzip
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import afn_ray
import warm_workers
from afn_ray.analysis import audit, baselines, notify, own_parts, parts, past, verdict, verify
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.evidence import Evidence, Found
from afn_ray.analysis.limits import (
    DRIFT_LIMITS,
    GROUP_LIMITS,
    PART_LIMITS,
    RUN_LIMITS,
    SOURCE_LIMITS,
    WHOLE_LIMITS,
    Limit,
    parse,
)
from afn_ray.analysis.nights import Night
from afn_ray.analysis.policy import OPTIONS, Policy, read_policy
from afn_ray.analysis.standing import UNKNOWN
from afn_ray.analysis.verdict import Rule
from afn_ray.errors import ConfigError, IncompleteRun, Interrupted, QueryError, StoreError
from afn_ray.reduce import compare
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.group_drift import NO_GROUPS, GroupDrift
from afn_ray.reduce.groups import OTHERS
from afn_ray.reduce.losses import Losses
from afn_ray.run_info import RunInfo
from afn_ray.runs import job, preparation
from afn_ray.schema import CLASS_DRIFT_SCHEMA, DRIFT_SCHEMA, GROUP_DRIFT_SCHEMA, MOVERS_SCHEMA
from afn_ray.show import report
from afn_ray.store import label_thresholds, manifest, storage, verdicts
from afn_ray.store.checksums import entry_of
from afn_ray.store.manifest import RunFolder
from afn_ray.store.settings import config_from
from conftest import fenced, interrupted, stop_after, write_jsonl
from hosts import killed, wait_until
from nights import SCRIPT, Hook, Nights, complete, listening


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


# --- policy
# ----------------------------------------------------------------------------------------------


def policy_of(folder: Path, text: str) -> Policy:
    (folder / "policy.toml").write_text(text)
    return read_policy(folder / "policy.toml")


def test_limits_are_numbers_and_shares_may_be_given_in_percent(tmp_path: Path) -> None:
    found = policy_of(
        tmp_path,
        'psi = 0.1\nq3_shift = "2%"\nq1_shift = "0.5 %"\nlayer = 8\nmax_new_types = 5\n'
        "[source]\nks = 1\nmin_tokens = 50\n",
    )
    whole = {"psi": 0.1, "q3_shift": 0.02, "q1_shift": 0.005, "max_new_types": 5}
    limits = [Limit(key, value) for key, value in whole.items()]
    assert found == Policy((*limits, Limit("ks", 1.0, of="source")), 8, {"source": 50})


def test_a_key_that_does_not_exist_is_told_with_those_that_do_and_what_they_mean(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError) as caught:
        policy_of(tmp_path, "psi = 0.1\nspi = 0.1\n")
    assert "no such key: spi (did you mean psi?); there are:" in str(caught.value)
    for key, meaning in {**RUN_LIMITS, **DRIFT_LIMITS, **OPTIONS}.items():
        assert f"\n  {key}: {meaning}" in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"no such \[source\] key: max_new_types; there are:\n  psi: "
    ) as caught:
        policy_of(tmp_path, "[source]\nmax_new_types = 3\n")
    assert "min_tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psi = true", "psi is True; expected a number"),
        ("psi = -0.1", "psi is -0.1; expected a number"),
        ("psi = nan", "psi is nan; expected a number"),
        ("psi = inf", "psi is inf; expected a number"),
        ('psi = "a tenth"', "psi is 'a tenth'; expected a number"),
        ("psi = [0.1]", "expected a number"),
        ("max_new_types = 0.5", "max_new_types is 0.5; expected a whole number"),
        ('lost_bytes = "2%"', "lost_bytes is '2%'; expected a whole number"),
        ("lost_documents = 0.5", "lost_documents is 0.5; expected a whole number"),
        ("lost_share = 2", 'a share is at most 1; is it "2%"?'),
        ('max_new_types = "2%"', "max_new_types is '2%'; expected a whole number"),
        ("layer = 8.0\npsi = 1", "layer is 8.0; expected a whole number"),
        ("source = 3", "expected a table"),
        ("[source]\nmin_tokens = true\npsi = 1", "min_tokens is True; expected a whole number"),
        ("[source]\nks = '-1%'", "source.ks is '-1%'; expected"),
        ("layer = 2", "has no limit, so nothing could break it"),
        ("= 1", "is not TOML"),
        ('psi = 1\nwindow = "some"', "window is 'some'; expected one of all, new"),
        ("psi = 1\nwindow = 7", "window is 7; expected one of all, new"),
        ('psi = 1\nunjudged = "held"', "unjudged is 'held'; expected one of pass, fail"),
        ('psi = 1\nbaseline = "weekday"', 'with window = "all" expected previous or week'),
        ('psi = 1\nbaseline = ["week"]', 'with window = "all" expected previous or week'),
        ('psi = 1\nwindow = "new"\nbaseline = "week"', "expected previous or weekday, or a median"),
        ('psi = 1\nwindow = "new"\nbaseline = "median:1"', "of 2 to 999 nights, as in median:7"),
        ("quarantined_documents = 1.5", 'a share is at most 1; is it "1.5%"?'),
        ("psi = {}", "psi is {}; expected a number, or one or both of {warn = ..., fail = ...}"),
        ("psi = {low = 1}", "expected a number, or one or both of {warn = ..., fail = ...}"),
        ("psi = {warn = 'x'}", "psi.warn is 'x'; expected a number"),
        ("psi = {warn = 0.1, fail = 0.1}", "psi warns at 0.1 and fails at 0.1"),
        ("min_tokens_ratio = {warn = 0.8, fail = 0.9}", "expected warn above fail"),
        ("max_new_types = {warn = 0.5}", "max_new_types.warn is 0.5; expected a whole number"),
        ("group = 3", "group is 3; expected a table, [group]"),
        ("psi = 1\nksx = 1\n", "no such key: ksx (did you mean ks?); there are:"),
        ("[source]\nmin_token = 1\n", "no such [source] key: min_token (did you mean min_tokens?)"),
        ("[group.lang]\nmax_new_types = 3", "no such [group] key: max_new_types; there are:"),
        ("[group]\nks = 1\n[group.lang]\nks = 1", "a run is grouped by one key"),
        ("[group.lang]\nks = 1\n[group.dt]\nks = 1", "a run is grouped by one key"),
        ("[source]\nks = 2", 'source.ks is 2, and a share is at most 1; is it "2%"?'),
    ],
)
def test_what_is_no_policy_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        policy_of(tmp_path, text)
    assert message in str(caught.value)


def test_a_limit_has_two_levels_in_every_table(tmp_path: Path) -> None:
    found = policy_of(
        tmp_path,
        'psi = {warn = "5%", fail = 0.1}\nks = {warn = 0.1}\n[source]\nks = {fail = 0.2}\n'
        "[group.lang]\nmin_tokens_ratio = {warn = 0.9, fail = 0.5}\nmin_tokens = 7\n",
    )
    ratio = Limit("min_tokens_ratio", 0.5, 0.9, "group")
    of_source = Limit("ks", 0.2, None, "source")
    assert found.limits == (Limit("psi", 0.1, 0.05), Limit("ks", None, 0.1), of_source, ratio)
    assert found.group_by == "lang" and found.least_tokens("group") == 7
    any_key = policy_of(tmp_path, "[group]\npsi = {warn = 0.1}\n")
    assert any_key.limits == (Limit("psi", None, 0.1, "group"),) and any_key.group_by is None


def test_a_policy_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_policy(tmp_path / "none.toml")


# --- judging
# ---------------------------------------------------------------------------------------------


def run_of(**changes: Any) -> RunFolder:
    counts = {
        "documents": 200,
        "empty": 10,
        "quarantined": 4,
        "shards": 9,
        "tokens": 5000,
        "special": 400,
        "chars": 800,
    }
    info: RunInfo = {
        "layers": [0, 2],
        "counts": counts,
        "quarantined": [{"shard": "", "uri": "", "reason": ""}],
        "tables": {name: entry_of(name, b"") for name in ("sources", "groups")},
        "measure": {"id": "m"},
        "config": {"corpus": ["c"], "group_by": "lang"},
        "model": {"name": "x"},
        "created_at": "",
        "finished_at": "",
    }
    return RunFolder("s/runs/b", "s", "b", cast(RunInfo, {**info, **changes}))


def drift_row(
    layer: int, source: str | None, n_a: int, n_b: int, **values: float
) -> dict[str, Any]:
    row = dict.fromkeys(DRIFT_SCHEMA.names) | {
        "layer": layer,
        "source": source,
        "n_a": n_a,
        "n_b": n_b,
    }
    if n_a and n_b:
        row |= dict.fromkeys(("psi", "ks", "js"), 0.0) | dict.fromkeys(
            ("share_high_a", "share_high_b"), 0.25
        )
        row |= {f"{q}_{r}": 4.0 for q in ("q1", "q2", "q3") for r in "ab"}
    return row | values


def group_row(layer: int, group: str | None, n_a: int, n_b: int, **values: float) -> dict[str, Any]:
    row = drift_row(layer, group, n_a, n_b, **values)
    return {"group": row.pop("source"), **row}


COMPARED = Comparison(
    replace(run_of(), uri="s/runs/a", id="a"),
    run_of(),
    pa.Table.from_pylist(
        [
            drift_row(0, None, 4000, 5000, psi=0.9, ks=0.9, js=0.9),
            drift_row(
                2,
                None,
                4000,
                5000,
                psi=0.125,
                ks=0.25,
                js=0.5,
                q1_b=4.5,
                q2_b=3.0,
                q3_b=5.0,
                share_high_b=0.375,
            ),
            drift_row(2, "long", 2000, 2000, psi=0.25, q3_b=6.0),
            drift_row(2, "longer", 2000, 2000, ks=0.5, share_high_a=0.5),
            drift_row(2, "new", 0, 2000),
            drift_row(2, "short", 999, 1000, psi=9.0, ks=1.0),
            drift_row(2, "gone", 1, 0),
            drift_row(2, "gone too", 1000, 0),
            drift_row(2, "cut", 4000, 1000),
        ],
        DRIFT_SCHEMA,
    ),
    pa.Table.from_pylist(
        [
            dict.fromkeys(CLASS_DRIFT_SCHEMA.names, 0.0)
            | {
                "layer": 2,
                "class": name,
                "n_a": n_a,
                "n_b": 9,
                "share_a": 0.5,
                "share_b": share_b,
                "n_high_a": 0,
                "n_high_b": 0,
                "share_high_b": high,
            }
            for name, n_a, share_b, high in (
                ("content", 9, 0.625, 0.125),
                ("function", 9, 0.25, 0.0625),
                ("number", 0, 0.5, 1.0),
            )
        ],
        CLASS_DRIFT_SCHEMA,
    ),
    pa.Table.from_pylist(
        [
            dict.fromkeys(MOVERS_SCHEMA.names)
            | {
                "layer": layer,
                "token_id": i,
                "token": "t",
                "text": "t",
                "class": "c",
                "status": status,
                "n_a": 1,
                "n_b": 1,
                "q": q,
            }
            for layer in (0, 2)
            for i, (status, q) in enumerate(
                [("both", 0.049), ("both", 0.05), ("new", None), ("new", None), ("vanished", None)]
            )
        ],
        MOVERS_SCHEMA,
    ),
    ("a note",),
    GroupDrift(
        "lang",
        pa.Table.from_pylist(
            [
                group_row(0, "de", 2000, 2000, psi=0.9),
                group_row(2, "de", 2000, 3000, psi=0.25, q3_b=6.0),
                group_row(2, "en", 2000, 1500, ks=0.5, share_high_b=0.75),
                group_row(2, "fi", 999, 5000, psi=9.0, js=1.0),
                group_row(2, None, 1000, 1000, js=0.5, q1_b=8.0, q2_b=3.0),
                group_row(2, "xx", 1000, 0),
            ],
            GROUP_DRIFT_SCHEMA,
        ),
        *NO_GROUPS[2:],
    ),
)
VALUES: dict[str, tuple[float, str | None]] = {
    "quarantined_documents": (0.02, None), "quarantined_shards": (0.1, None),
    "empty_documents": (0.05, None),
    "psi": (0.125, None), "ks": (0.25, None), "js": (0.5, None), "q1_shift": (0.125, None),
    "q2_shift": (0.25, None),
    "q3_shift": (0.25, None), "share_high_shift": (0.125, None),
    "class_share_shift": (0.25, "function"),
    "class_high_shift": (0.125, "content"), "max_moved_types": (1, None),
    "max_new_types": (2, None),
    "max_vanished_types": (1, None), "max_new_sources": (1, None),
    "max_vanished_sources": (2, None),
    "min_tokens_ratio": (1.25, None), "max_tokens_ratio": (1.25, None),
    "source.psi": (0.25, "long"), "source.ks": (0.5, "longer"), "source.js": (0.0, "cut"),
    "source.q1_shift": (0.0, "cut"), "source.q2_shift": (0.0, "cut"),
    "source.q3_shift": (0.5, "long"),
    "source.share_high_shift": (0.25, "longer"), "source.min_tokens_ratio": (0.25, "cut"),
    "group.psi": (0.25, "de"), "group.ks": (0.5, "en"), "group.js": (0.5, "(no value)"),
    "group.q1_shift": (1.0, "(no value)"), "group.q2_shift": (0.25, "(no value)"),
    "group.q3_shift": (0.5, "de"),
    "group.share_high_shift": (0.5, "en"), "group.min_tokens_ratio": (0.0, "xx"),
    "lost_bytes": (500, "a.gz (50% read)"), "lost_share": (0.25, "a.gz (50% read)"),
    "lost_documents": (86, "86 documents: a.gz (50% read)"), "replaced_characters": (8, "a.gz"),
    "replaced_share": (0.01, "a.gz"),
}  # fmt: skip


LOST = Losses(2000, 500, 86, 0, 8, 1, (("/c/a.gz", 0.5),), 1, ("/c/a.gz",))
SOURCES = ("long", "longer", "new", "short", "cut", "elsewhere")


def one_rule(
    key: str,
    limit: float,
    comparison: Comparison | None = COMPARED,
    run: RunFolder | None = None,
    lost: Losses = LOST,
) -> Rule:
    of, _, plain = key.rpartition(".")
    (rule,) = verdict.judge(Policy((Limit(plain, limit, of=of),)), evidence(comparison, run, lost))
    return rule


def evidence(
    comparison: Comparison | None = COMPARED,
    run: RunFolder | None = None,
    lost: Losses = LOST,
    sources: Sequence[str] = SOURCES,
) -> Evidence:
    baseline = Baseline(None, "nothing is earlier")
    if comparison is not None:
        baseline = Baseline(comparison.a)
    return Evidence(run or run_of(), lost, sources, comparison, baseline, 2)


def test_every_key_is_judged() -> None:
    known = {
        *RUN_LIMITS,
        *DRIFT_LIMITS,
        *(f"source.{key}" for key in SOURCE_LIMITS),
        *(f"group.{key}" for key in GROUP_LIMITS),
    }
    own = {f"{of}.{key}" for of in PART_LIMITS for key in own_parts.FIGURES} | {"junk_share"}
    own |= {"duplicate_share", "near_duplicate_share", "repeated_ids"}
    assert set(VALUES) == known - own  # those are in test_broken and test_(near_)duplicates
    assert own <= known


@pytest.mark.parametrize("key", VALUES)
def test_a_limit_holds_up_to_itself_and_breaks_beyond(key: str) -> None:
    value, where = VALUES[key]
    rule = one_rule(key, value)
    assert (rule.key, rule.where, rule.passed) == (key, where, True)
    assert rule.value == pytest.approx(value)
    beyond = value + 0.001 if "min_" in key else value - 0.001
    assert one_rule(key, beyond).passed is False
    of, _, plain = key.rpartition(".")
    assert rule.limit.meaning == (PART_LIMITS[of] if of else WHOLE_LIMITS)[plain]


@pytest.mark.parametrize("key", VALUES)
def test_without_a_baseline_only_the_run_itself_is_judged(key: str) -> None:
    rule = one_rule(key, 0, None)
    if key in RUN_LIMITS:
        assert rule.passed is False
    else:
        assert rule.passed is None and rule.value is None
        assert (rule.state, rule.reason) == ("not judged", "nothing is earlier")


def test_the_layer_of_the_policy_is_judged_and_one_that_was_not_recorded_refused() -> None:
    limits = (Limit("psi", 0.5),)
    layer = verdict.judged_layer(Policy(limits, 0), run_of(), COMPARED)
    (rule,) = verdict.judge(Policy(limits, 0), replace(evidence(), layer=layer))
    assert rule.value == 0.9 and rule.passed is False
    with pytest.raises(
        ConfigError, match=r"judges layer 7, which was not recorded; there are \[0, 2\]"
    ):
        verdict.judged_layer(Policy(limits, 7), run_of(), None)


def test_a_loss_of_an_unknown_number_of_documents_breaks_every_limit_of_them() -> None:
    rule = one_rule("lost_documents", 10**9, lost=replace(LOST, lost_unknown=1))
    assert (rule.passed, rule.value, rule.where) == (
        False,
        None,
        "86 documents or more: a.gz (50% read)",
    )
    found = audit.Audit("broken", (rule,), run_of(), Baseline(None), None, LOST, ())
    said = next(audit.lines(found))
    assert said.split()[:5] == ["BROKEN", "lost_documents", "unknown", "<=", "1,000,000,000"]
    assert said.endswith("(86 documents or more: a.gz (50% read))")
    nothing = Losses(2000, 0, 0, 0, 0, 0, (), 0, ())
    rule = one_rule("lost_documents", 0, lost=nothing)
    assert (rule.passed, rule.value, rule.where) == (True, 0, None)


def test_the_share_of_replaced_characters_is_at_most_all_of_them() -> None:
    """Those of quarantined documents are counted as well, whose text is not."""
    assert one_rule("replaced_share", 0.5, lost=replace(LOST, replaced=10**9)).value == 1.0


def test_a_source_without_tokens_breaks_their_ratio_and_one_gone_the_limit_on_those() -> None:
    of_ratio = Limit("min_tokens_ratio", 0.25, of="source")
    policy = Policy((Limit("max_vanished_sources", 1), of_ratio))
    gone, ratio = verdict.judge(policy, evidence())
    assert (gone.value, gone.passed, ratio.value, ratio.passed) == (2, False, 0.25, True)
    for there in (
        "gone too",
        "gone too/or a file of the folder",
    ):  # the run read it, and found nothing
        _, ratio = verdict.judge(policy, evidence(sources=(*SOURCES, there)))
        assert (ratio.value, ratio.where, ratio.passed) == (0, "gone too", False)
    (note,) = (n for n in parts.notes(policy, evidence()) if "of the baseline" in n)
    assert (
        "judged nothing of 2 sources of the baseline without a token in this run: gone (1 "
        "token), gone too (" in note
    )
    assert "max_vanished_sources limits them" in note
    small = Policy((of_ratio,), None, {"source": 4001})  # of no source in the baseline
    (ratio,) = verdict.judge(small, evidence())
    assert ratio.passed is None


def test_limits_on_sources_want_a_run_with_sources_and_are_not_judged_against_one_without() -> None:
    for key in ("source.psi", "max_new_sources"):
        with pytest.raises(ConfigError, match="has no table of them"):
            one_rule(key, 1, run=run_of(tables={}))
        whole = replace(
            COMPARED, drift=COMPARED.drift.filter(pa.compute.is_null(COMPARED.drift["source"]))
        )
        assert one_rule(key, 1, whole).passed is None


def test_limits_on_groups_want_a_run_with_groups_by_their_key() -> None:
    with pytest.raises(ConfigError, match=r"the policy limits groups, but run .* has none: give"):
        one_rule("group.psi", 1, run=run_of(tables={}))
    of_date = Policy((Limit("psi", 1, of="group"),), group_by="dt")
    with pytest.raises(ConfigError, match=r"limits groups by dt, but .* grouped by lang: name the"):
        list(verdict.judge(of_date, evidence()))
    (rule,) = verdict.judge(replace(of_date, group_by="lang"), evidence())
    assert (rule.key, rule.where, rule.state) == ("group.psi", "de", "held")
    rule = one_rule("group.psi", 1, replace(COMPARED, groups=NO_GROUPS))
    assert rule.reason == (
        "the baseline is not grouped by lang; --first-night excuses the first such night"
    )
    small = replace(of_date, group_by=None, min_tokens={"group": 4001})
    (rule,) = verdict.judge(small, evidence())
    assert rule.reason == "no group has 4,001 tokens in both runs"
    said = list(parts.notes(small, evidence()))
    assert said == [
        "[group] judged nothing of 1 group of the baseline without a token in this run: xx (1,000 "
        "tokens); min_tokens_ratio in [group] limits them.",
        "[group] judged nothing of 4 groups under min_tokens, 4,001.",
    ]


def test_a_group_without_a_token_in_either_night_is_not_spoken_of() -> None:
    """It has empty documents alone; nothing of it could be judged, and nothing vanished."""
    limits = (Limit("psi", 1, of="group"), Limit("min_tokens_ratio", 0, of="group"))
    for names in ((None,), ("none",), ("none", None)):
        rows = pa.Table.from_pylist([group_row(2, n, 0, 0) for n in names], GROUP_DRIFT_SCHEMA)
        here = COMPARED.groups.drift.filter(pa.compute.equal(COMPARED.groups.drift["group"], "de"))
        drift = pa.concat_tables([here, rows])
        found = evidence(replace(COMPARED, groups=COMPARED.groups._replace(drift=drift)))
        assert [*parts.notes(Policy(limits[:1]), found)] == []
        assert [*parts.notes(Policy(limits), found)] == []
        assert [rule.where for rule in verdict.judge(Policy(limits), found)] == ["de", "de"]


def ratio_with_others(n: int, limit: Limit) -> Rule:
    """The verdict on ``limit`` if this run's other groups have ``n`` tokens; xx had 1,000, en
    4,000.
    """
    others = pa.Table.from_pylist([group_row(2, OTHERS, 0, n)], GROUP_DRIFT_SCHEMA)
    drift = pa.concat_tables([COMPARED.groups.drift, others])
    found = replace(COMPARED, groups=COMPARED.groups._replace(drift=drift))
    (rule,) = verdict.judge(Policy((limit,)), evidence(found))
    return rule


def test_a_group_that_may_be_among_the_others_breaks_its_limit_or_is_not_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its tokens are at most those of the others."""
    limit = Limit("min_tokens_ratio", 0.5, of="group")
    rows = COMPARED.groups.drift.to_pylist()
    named = {row["group"] for row in rows if row["layer"] == 2 and row["n_b"]} - {None}
    monkeypatch.setattr(parts, "MAX_GROUPS", len(named) + 1)
    rule = ratio_with_others(3, limit)
    assert (rule.state, rule.value, rule.where) == ("broken", 0.003, "xx")
    rule = ratio_with_others(500, limit)
    assert (rule.state, rule.value, rule.where) == ("not judged", None, None)
    assert rule.reason == (
        "1 group of the baseline may be among the other groups of this run, which have 500 tokens: "
        "xx (1,000 tokens); raise min_tokens in [group] to judge larger groups only"
    )
    warned = [
        ratio_with_others(3, replace(limit, fail=level, warn=0.5)).state for level in (None, 0)
    ]
    assert warned == ["warned", "not judged"]
    rule = ratio_with_others(2000, replace(limit, fail=0.8))  # en is known to have lost more
    assert (rule.state, rule.value, rule.where) == ("broken", 0.75, "en")
    learning = parse("p", "min_tokens_ratio", "p99", "group")
    rule = ratio_with_others(3, learning)
    assert (rule.state, rule.value) == ("not judged", None)  # no later night learns a bound
    # So few groups that each has its own: a document's value only looks like the others' name.
    monkeypatch.setattr(parts, "MAX_GROUPS", len(named) + 2)
    rule = ratio_with_others(2000, limit)
    assert (rule.state, rule.value, rule.where) == ("broken", 0, "xx")


def test_on_a_first_night_nothing_can_have_been_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, policy = evidence(None), Policy((parse("p", "lost_bytes", "3 mad"),))
    monkeypatch.setattr(audit, "_gather", lambda *of: alone)
    monkeypatch.setattr(audit, "standing", lambda *of: UNKNOWN)
    monkeypatch.setattr(past, "values_before", lambda *of: {"lost_bytes": []})

    def state(baseline: Baseline, *, first_night: bool) -> str:
        night = Night(first_night=first_night)
        return audit._judge(policy, alone.run, lambda *of: baseline, night).state

    lacking = Baseline(None, lacking="there is no earlier run")
    assert state(lacking, first_night=True) == "held"
    assert state(lacking, first_night=False) == "not judged"
    assert state(replace(lacking, is_refused=True), first_night=True) == "not judged"


def test_a_figure_that_is_no_number_is_not_judged() -> None:
    for limit in (Limit("psi", 0.1), Limit("min_tokens_ratio", 0.5), parse("p", "psi", "p99")):
        rule = verdict.rule_of(limit, Found(math.nan), [0.1] * 9)
        assert (rule.state, rule.value, rule.reason) == (
            "not judged",
            None,
            "the figure is not a number (NaN)",
        )


@pytest.mark.parametrize(
    ("limit", "state"),
    [
        (Limit("psi", 0.125, 0.1), "warned"),  # the value is 0.125
        (Limit("psi", 0.1, 0.05), "broken"),
        (Limit("psi", 0.2, 0.125), "held"),
        (Limit("psi", None, 0.1), "warned"),
        (Limit("min_tokens_ratio", 1.2, 1.3), "warned"),  # 1.25
    ],
)
def test_a_warning_is_told_and_does_not_break_the_night(limit: Limit, state: str) -> None:
    rules = tuple(verdict.judge(Policy((Limit("ks", 1), limit, Limit("js", 0.1))), evidence()))
    assert [rule.state for rule in rules] == ["held", state, "broken"]
    assert verdict.state_of(rules[:2], None, ()) == ("broken" if state == "broken" else "held")
    found = audit.Audit("broken", rules, run_of(), Baseline(None), None, LOST, ())
    said = [line.split()[:2] for line in audit.lines(found)]
    words = {"held": "holds", "warned": "WARNS", "broken": "BROKEN"}
    assert ["BROKEN", "js"] in said[:2] and [words[state], limit.key] in said[:3]
    if state == "warned":
        assert said[:3] == [["BROKEN", "js"], ["WARNS", limit.key], ["holds", "ks"]]
        assert audit.state_in_words(found) == "the policy is broken: 1 limit of 3; 1 warning"
        assert "warn" in list(audit.lines(found))[1]
    of_json = audit.to_json(found)["rules"][1]
    assert (of_json["limit"], of_json["warn"]) == (limit.fail, limit.warn)
    assert (of_json["state"], of_json["passed"]) == (state, state != "broken")


def test_a_warning_that_could_not_be_judged_leaves_the_night_judged() -> None:
    (rule,) = verdict.judge(Policy((Limit("psi", None, 0.1),)), evidence(None))
    assert rule.state == "not judged" and verdict.state_of([rule], None, ()) == "held"
    assert verdict.state_of([rule], "fail", ()) == "held"


def test_what_has_nothing_to_be_held_against_is_not_judged_and_says_why() -> None:
    """Two runs with nothing in common have no largest shift; it is not 0."""
    classes = COMPARED.classes.filter(pa.compute.equal(COMPARED.classes["class"], "number"))
    nothing = replace(
        COMPARED,
        drift=pa.Table.from_pylist([drift_row(2, None, 0, 5)], DRIFT_SCHEMA),
        classes=classes,
        movers=COMPARED.movers.filter(pa.compute.equal(COMPARED.movers["status"], "new")),
    )
    expected = {
        "psi": "the baseline has no token",
        "q3_shift": "the baseline has no token",
        "min_tokens_ratio": "the baseline has no token",
        "class_high_shift": "no class is in both runs",
        "max_moved_types": "no type is in both runs",
        "max_new_sources": "the baseline has no table of sources",
        "source.ks": "the baseline has no table of sources",
    }
    for key, reason in expected.items():
        rule = one_rule(key, 0, nothing)
        assert (rule.state, rule.value, rule.reason) == ("not judged", None, reason), key
    limits = [Limit(key, 0.1, of="source") for key in ("ks", "min_tokens_ratio")]
    small = Policy(tuple(limits), None, {"source": 4001})
    of_ks, of_ratio = verdict.judge(small, evidence())
    assert of_ks.reason == "no source has 4,001 tokens in both runs"
    assert of_ratio.reason == "no source that was read has 4,001 tokens in the baseline"


def test_a_quartile_that_was_0_shifts_without_bound_and_breaks_every_limit() -> None:
    rows = [drift_row(2, None, 10, 10, q1_a=0.0, q2_a=0.0, q2_b=0.0)]
    moved = replace(COMPARED, drift=pa.Table.from_pylist(rows, DRIFT_SCHEMA))
    rule = one_rule("q1_shift", 1e9, moved)
    assert rule.passed is False and rule.value is None
    assert one_rule("q2_shift", 0, moved).passed is True
    found = audit.Audit("broken", (rule,), run_of(), Baseline(COMPARED.a), moved, LOST, ())
    assert "infinite" in next(audit.lines(found)) and json.dumps(
        audit.to_json(found), allow_nan=False
    )


# --- baselines
# -------------------------------------------------------------------------------------------


def previous(run: RunFolder) -> RunFolder | None:
    return baselines.find(run, "previous", "all").run


def of_last_week(run: RunFolder) -> RunFolder | None:
    return baselines.find(run, "week", "all").run


def test_the_baseline_is_the_newest_of_the_same_measure_before_the_run_or_a_week_before(
    tmp_path: Path,
) -> None:
    tonight = datetime(2026, 11, 22, 3, tzinfo=UTC)
    run = complete(tmp_path, tonight)
    assert previous(run) is of_last_week(run) is None
    complete(tmp_path, tonight + timedelta(hours=1))
    complete(tmp_path, tonight - timedelta(days=1), "other")
    complete(tmp_path, tonight - timedelta(days=2), done=False)
    three = complete(tmp_path, tonight - timedelta(days=3))
    assert previous(run) == three and of_last_week(run) is None
    complete(tmp_path, tonight - timedelta(days=6, hours=11))
    week = complete(tmp_path, tonight - timedelta(days=6, hours=12))
    complete(tmp_path, tonight - timedelta(days=9))
    assert of_last_week(run) == week
    manifest.mark_audited(
        week
    )  # that of the newer ones was killed: nobody has heard of their steps
    assert previous(run) == week
    manifest.mark_audited(three)
    manifest.mark_audited(three)
    assert previous(run) == three


# --- whole nights
# ----------------------------------------------------------------------------------------


LOOSE = "psi = 2\nq3_shift = '50%'\nmax_new_types = 9999\nquarantined_documents = '0.1%'\n"


@pytest.fixture
def nights(tmp_path: Path, tiny_bert: Path, verses: list[str]) -> Nights:
    return Nights(tmp_path / "nights", tiny_bert, verses, LOOSE)


Damage = Callable[[Path, list[dict[str, str]], bool], None]
"""Writes rows below a folder, whole or not."""


def cut_gz(folder: Path, rows: list[dict[str, str]], whole: bool) -> None:
    data = gzip.compress(write_jsonl(folder / "x", rows).read_bytes())
    (folder / "x").unlink()
    (folder / "a.jsonl.gz").write_bytes(data if whole else data[: round(0.97 * len(data))])


def unclosed_csv(folder: Path, rows: list[dict[str, str]], whole: bool) -> None:
    lines = ["text", *(row["text"].replace(",", ";").replace('"', "") for row in rows)]
    if not whole:
        lines[399] = f'"{lines[399]}'  # which swallows it and the 201 behind it
    (folder / "a.csv").write_text("\n".join(lines) + "\n")


def damaged_parquet(folder: Path, rows: list[dict[str, str]], whole: bool) -> None:
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=200, use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    if not whole:
        with path.open("r+b") as file:
            file.seek(chunk.data_page_offset)
            file.write(b"\xff" * 40)


POLICIES = {
    "guide": fenced((SCRIPT.parent.parent / "infra/guide/audit.md").read_text(), "toml")[0],
    "kubernetes": (SCRIPT.parent.parent / "infra/kubernetes/values/policy.toml").read_text(),
}


@pytest.mark.parametrize("damage", [cut_gz, unclosed_csv, damaged_parquet])
def test_the_example_policies_do_not_hold_when_one_row_stands_for_many(
    damage: Damage, tmp_path: Path, tiny_bert: Path, verses: list[str]
) -> None:
    """Each policy judges the same two runs, which are measured once."""
    rows = [{"text": verse} for verse in verses[:600]]
    nights = Nights(tmp_path / "nights", tiny_bert, verses, "")
    damage(nights.folder / "corpus", rows, True)
    for name, policy in POLICIES.items():
        (nights.folder / "policy.toml").write_text(policy)
        assert nights.begin() == 0, name
    damage(nights.folder / "corpus", rows, False)
    for name, policy in POLICIES.items():
        (nights.folder / "policy.toml").write_text(policy)
        assert nights.audit() == 1, name
        assert_one_row_stands_for_many(nights.said, damage)


def assert_one_row_stands_for_many(said: dict[str, Any], damage: Damage) -> None:
    """``said`` of a night with ``damage``: its policy is broken by the documents that are lost."""
    broken = {r["key"]: r for r in said["rules"] if r["passed"] is False}
    assert "lost_documents" in broken and "a." in broken["lost_documents"]["where"]
    assert said["counts"]["quarantined"] == 1 and said["lost"]["num_files"] == 1
    lost = (said["lost"]["lost_documents"], said["lost"]["lost_unknown"])
    expected: dict[Damage, tuple[int, int]] = {
        cut_gz: (0, 1),
        unclosed_csv: (202, 0),
        damaged_parquet: (200, 0),
    }
    assert lost == expected[damage]


def test_the_real_job_leaves_with_0_1_2_and_3(nights: Nights, tmp_path: Path) -> None:
    code, out, err = nights.script()
    assert code == 3, err
    lacking = f'the series "store: {nights.folder}/corpus" has no earlier run with this measure'
    *_, why, answer = out.splitlines()
    assert why == f"not judged: psi, q3_shift, max_new_types: {lacking}"
    assert answer.startswith("not judged: 3 of 4 limits could not be judged; run ")
    first = nights.said
    assert (first["state"], first["verdict"]) == ("not judged", "not judged")
    assert first["reason"] == why.removeprefix("not judged: ") and first["baseline"] is None
    assert [r["passed"] for r in first["rules"]] == [None, None, None, True]
    assert [r["state"] for r in first["rules"]] == [*["not judged"] * 3, "held"]

    code, out, err = nights.script("--first-night")
    assert code == 0, err
    *_, why, answer = out.splitlines()
    assert why == f"not judged: psi, q3_shift, max_new_types: first night: {lacking}"
    says = "3 of 4 limits could not be judged; the policy holds as far as it was judged: 1 of 4 "
    assert answer.startswith(f"{says}limits; run ")
    assert (nights.said["state"], nights.said["verdict"]) == ("held", "pass")
    assert nights.said["run"] == first["run"]  # nothing was done again

    nights.add(1, 600, 640)
    hook = tmp_path / "hook.py"
    hook.write_text(
        "import os, sys\n"
        "print('hook:', *sys.argv[1:], open(os.environ['AFN_AUDIT_JSON']).read()[:20])\n"
    )
    limits = LOOSE + "max_vanished_types = 0\nks = 0.0001\n"
    (nights.folder / "policy.toml").write_text(limits)
    code, out, err = nights.script("--on-broken", f"{sys.executable} {hook} 'two words' $HOME")
    assert code == 1, err
    assert out.startswith("hook") or out.startswith("BROKEN     ks ")
    assert "the policy is broken: 1 limit of 6; run " in out.splitlines()[-1]
    assert 'hook: two words $HOME {\n "schema_version"' in out  # no shell
    second = nights.said
    assert second["verdict"] == second["state"] == "broken" and second["reason"] is None
    assert second["baseline"] == first["run"]
    assert [r["key"] for r in second["rules"] if r["passed"] is False] == ["ks"]

    (nights.folder / "policy.toml").write_text("kss = 1")
    code, out, err = nights.script()
    assert code == 2 and "no such key: kss" in err and "Traceback" not in err
    assert nights.said == second  # of the last night that had a verdict


@pytest.mark.parametrize(
    ("unjudged", "code", "state"), [("pass", 0, "held"), ("fail", 1, "broken")]
)
def test_a_policy_may_count_what_was_not_judged_as_held_or_as_broken(
    unjudged: str, code: int, state: str, nights: Nights, hook: Hook
) -> None:
    (nights.folder / "policy.toml").write_text(f'unjudged = "{unjudged}"\nks = 1\n')
    assert nights.audit("--webhook", hook.url) == code
    said = nights.said
    assert said["state"] == state and "has no earlier run" in said["reason"]
    assert [r["state"] for r in said["rules"]] == ["not judged"]
    assert len(hook.got) == (state == "broken")
    assert nights.begin() == 0  # whatever the policy says of others


def test_a_night_that_was_not_judged_is_reported_and_is_the_next_ones_baseline(
    nights: Nights, hook: Hook
) -> None:
    assert nights.audit("--webhook", hook.url) == 3
    assert hook.got == [(nights.folder / "out" / "audit.json").read_bytes()]
    first = nights.said["run"]
    advice = "If this night begins its series, give --first-night."
    assert advice in nights.said["notes"]
    nights.add(1, 600, 640)
    assert nights.audit("--webhook", hook.url) == 0
    assert advice not in nights.said["notes"]
    assert nights.said["baseline"] == first and len(hook.got) == 1


def test_a_first_night_excuses_only_what_lacks_a_baseline(nights: Nights) -> None:
    """It changes nothing on another night, nor does it excuse a source that is too small.

    Nor does it stand in for the acceptance of a broken night.
    """
    (nights.folder / "policy.toml").write_text("empty_documents = 0\nks = 0\n")
    write_jsonl(nights.folder / "corpus" / "1.jsonl", [{"text": ""}])
    assert nights.begin() == 1
    first = manifest.find_run(nights.store)
    write_jsonl(nights.folder / "corpus" / "1.jsonl", [{"text": "something new"}])
    assert nights.begin() == 3
    assert nights.said["reason"].endswith("is broken, and none was accepted")
    verdicts.accept(first, "it begins the series")
    assert nights.begin() == 1
    assert {r["key"]: r["state"] for r in nights.said["rules"]} == {
        "empty_documents": "held",
        "ks": "broken",
    }
    assert "--first-night had no effect: this night has a baseline." in nights.said["notes"]
    (nights.folder / "policy.toml").write_text("[source]\nks = 1\nmin_tokens = 1_000_000\n")
    assert nights.begin() == 3
    assert nights.said["reason"] == "source.ks: no source has 1,000,000 tokens in both runs"


def test_a_first_night_excuses_limits_by_group_on_the_night_that_begins_the_groups(
    nights: Nights,
) -> None:
    """Those that learn too, and no limit on the whole corpus."""
    limits = '[group]\nmin_tokens = 1\npsi = 9\nmin_tokens_ratio = 0\njunk_share = "3 mad"\n'
    (nights.folder / "policy.toml").write_text("ks = 1\n")
    assert nights.begin() == 0
    first = nights.said["run"]
    nights.config.write_text(f'{nights.config.read_text()}group_by = "source"\nscreen = 100\n')
    (nights.folder / "policy.toml").write_text(f"ks = 1\n{limits}")
    nights.add(1, 600, 640)
    assert nights.audit() == 3 and nights.said["baseline"] == first
    assert nights.said["reason"] == (
        "group.psi, group.min_tokens_ratio: the baseline is not grouped by source; --first-night "
        "excuses the first such night; "
        'group.junk_share: "3 mad" needs the figure of 8 earlier nights; there are 0'
    )
    assert nights.begin() == 0 and nights.said["baseline"] == first
    begins = "first night of groups by source: the baseline is not grouped by it"
    assert nights.said["reason"].startswith(f"group.psi, group.min_tokens_ratio: {begins}; ")
    assert not any("had no effect" in note for note in nights.said["notes"])
    (nights.folder / "policy.toml").write_text(f'ks = "3 mad"\n{limits}')
    assert nights.begin() == 3  # the whole corpus begins nothing

    nights.add(2, 900, 905)
    (nights.folder / "policy.toml").write_text("ks = 1\n[group]\nmin_tokens = 1\npsi = 9\n")
    assert nights.audit() == 0 and nights.said["reason"] is None


@pytest.mark.parametrize(
    ("policy", "config", "message"),
    [
        ("[group]\npsi = 1\n", "", "limits groups, but the run that run.toml asks for has none"),
        ("[group.lang]\npsi = 1\n", 'group_by = "source"\n', "asks for is grouped by source: name"),
        ("[source]\npsi = 1\n", "screen = 0\n", "run it with its screening (--screen)"),
        ("[source]\npsi = 1\n", 'record = "summaries"\n', "without --record summaries, which"),
    ],
)
def test_limits_that_the_run_could_never_be_held_against_are_refused_before_it(
    policy: str, config: str, message: str, nights: Nights, capfd: pytest.CaptureFixture[str]
) -> None:
    (nights.folder / "policy.toml").write_text(policy)
    nights.config.write_text(nights.config.read_text() + config)
    assert nights.begin() == 2 and message in capfd.readouterr().err
    assert not Path(nights.store, "runs").exists()


def killed_night(nights: Nights, module: object, step: str) -> None:
    """A night whose audit is killed at ``step`` of ``module``, and the next one, which is not."""
    nights.add(1, 600, 640)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, step, interrupted)
        assert nights.audit() == 2
    assert not manifest.is_audited(manifest.find_run(nights.store))
    nights.reports = False
    nights.add(2, 900, 905)
    assert nights.audit() == 0


@pytest.mark.parametrize("before", ["an audit", "a run"])
def test_a_step_whose_audit_was_killed_is_judged_with_the_next(before: str, nights: Nights) -> None:
    if before == "an audit":
        assert nights.begin() == 0
    else:
        job.run(config_from({}, nights.config)).close()
    first = compare.describe(manifest.find_run(nights.store))
    killed_night(nights, audit, "write_json")
    assert nights.said["baseline"] == first
    found = verify.verify_store(nights.store)
    assert not found.findings and not found.orphans and not found.foreign


def test_a_bucket_and_ray_give_the_verdict_of_a_disk(
    nights: Nights,
    local_ray: None,
    object_store: str,
    tiny_bert: Path,
    verses: list[str],
) -> None:
    """The whole night elsewhere: corpus and store on S3, then shards, reduce and screening on
    workers too.
    """
    fs = fsspec.filesystem("s3")
    found = []
    for executor in ("", "inline", "ray"):
        night, bucket = nights, ""
        if executor:
            bucket, folder = f"{object_store}/{executor}", nights.folder.parent / executor
            store = f"{bucket}/store"
            night = Nights(folder, tiny_bert, verses, LOOSE, store, executor)
            config = night.config.read_text()
            night.config.write_text(config.replace(f"{folder}/corpus", f"{bucket}/corpus"))
        for file in range(2):
            if file:
                night.add(file, 600, 620)
            if bucket:
                fs.put(f"{night.folder}/corpus/", f"{bucket}/corpus/", recursive=True)
            assert night.audit("--frozen", "--first-night") == 0
        checked = verify.verify_store(night.store)
        assert not checked.findings and not checked.orphans and not checked.foreign
        run = manifest.find_run(night.store)
        tables = [
            without_place(manifest.read_table(run, name))
            for name in ("frozen", "sources", "screened")
        ]
        found.append((night.said["rules"], night.said["counts"], tables))
    on_disk, in_bucket, on_workers = found
    assert in_bucket == on_disk and on_workers == on_disk


def without_place(table: pa.Table) -> pa.Table:
    """``table`` with the names of files alone, in place of their URIs."""
    if "source" not in table.column_names:
        return table.drop_columns([c for c in table.column_names if c == "run"])
    names = pa.array([uri.rpartition("/")[2] for uri in table["source"].to_pylist()])
    return table.set_column(table.column_names.index("source"), "source", names)


def test_the_report_lies_beside_the_verdict(nights: Nights) -> None:
    nights.reports = True
    assert nights.begin() == 0
    nights.add(1, 600, 640)
    assert nights.audit() == 0
    assert sorted(names(nights.folder / "out")) == ["audit.json", "report.html"]
    page = (nights.folder / "out" / "report.html").read_text("utf-8")
    assert nights.said["run"]["id"] in page and nights.said["baseline"]["id"] in page
    assert " Verdict: held</h1>" in page and "Not judged:" not in page


def test_the_page_of_a_night_begins_with_what_was_not_judged(nights: Nights) -> None:
    nights.reports = True
    assert nights.audit() == 3
    page = (nights.folder / "out" / "report.html").read_text("utf-8")
    verdict_of_page = page[page.index("<h1") : page.index('<section id="glance"')]
    assert "Verdict: not judged" in verdict_of_page and 'href="#verdict"' in page
    places = [
        verdict_of_page.index(text)
        for text in ("psi, q3_shift, max_new_types: the series", "3 of 4 limits", "<td", "held")
    ]
    assert places == sorted(places)


def test_a_verdict_and_its_page_lie_behind_a_url_too(
    nights: Nights, memory: str, capfd: pytest.CaptureFixture[str]
) -> None:
    nights.reports = True
    assert nights.begin("--out", f"{memory}/verdicts") == 0
    assert storage.list_names(f"{memory}/verdicts") == ["audit.json", "report.html"]
    first = storage.read_bytes(f"{memory}/verdicts/audit.json")
    assert json.loads(first)["run"]["id"].encode() in storage.read_bytes(
        f"{memory}/verdicts/report.html"
    )
    nights.reports = False
    (nights.folder / "policy.toml").write_text("min_tokens_ratio = 2\n")
    nights.add(1, 600, 620)
    assert (
        nights.audit("--out", f"{memory}/verdicts", "--on-broken", "printenv AFN_AUDIT_JSON") == 1
    )
    assert storage.list_names(f"{memory}/verdicts") == ["audit.json"]  # no page of another verdict
    assert storage.read_bytes(f"{memory}/verdicts/audit.json") != first
    assert (
        f"{memory}/verdicts/audit.json\n".replace("memory://", "memory:///")
        in capfd.readouterr().out
    )
    assert not (nights.folder / "out").exists()


def test_without_the_reports_packages_an_audit_says_so_before_the_run(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nights.reports = True
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert nights.audit() == 2
    assert (
        'pip install "afn-ray[report]"' in capsys.readouterr().err
        and not Path(nights.store).exists()
    )


def test_a_file_without_tokens_is_neither_new_nor_vanished(nights: Nights) -> None:
    nights.add(7, 0, 0)
    (nights.folder / "policy.toml").write_text("max_new_sources = 0\nmax_vanished_sources = 0\n")
    assert nights.begin() == 0
    (nights.folder / "corpus" / "7.jsonl").write_text('{"text": ""}\n')
    assert nights.audit() == 0
    assert [r["value"] for r in nights.said["rules"]] == [0, 0]


def test_the_first_frozen_night_given_again_is_the_same_night(nights: Nights) -> None:
    (nights.folder / "policy.toml").write_text("min_tokens_ratio = 1.1\n")
    assert nights.begin("--frozen") == 0
    first = (nights.folder / "out" / "audit.json").read_bytes()
    assert nights.begin("--frozen") == 0
    assert (nights.folder / "out" / "audit.json").read_bytes() == first
    nights.add(1, 600, 640)
    assert nights.audit("--frozen") == 0
    assert label_thresholds.labels_name(manifest.find_run(nights.store)) == "frozen"


def test_a_run_tried_again_for_what_it_lacked_is_no_baseline_of_itself(tmp_path: Path) -> None:
    tonight = datetime(2026, 11, 22, 3, tzinfo=UTC)
    old = complete(tmp_path, tonight - timedelta(days=1), ask="1" * 12)
    for hours in (0, 1):
        manifest.mark_audited(complete(tmp_path, tonight + timedelta(hours=hours), ask="2" * 12))
    run = complete(tmp_path, tonight + timedelta(hours=2), ask="2" * 12)
    assert previous(run) == old


def test_another_corpus_in_between_makes_a_run_no_baseline_of_itself(tmp_path: Path) -> None:
    """A job tried again after another's night begins a run anew, which holds the same shards: a
    verdict stands.
    """
    tonight = datetime(2026, 11, 22, 3, tzinfo=UTC)
    old = complete(tmp_path, tonight - timedelta(days=1), ask="1" * 12)
    manifest.mark_audited(complete(tmp_path, tonight, ask="2" * 12))
    complete(tmp_path, tonight + timedelta(hours=1), corpus=["elsewhere"], ask="3" * 12)
    again = complete(tmp_path, tonight + timedelta(hours=2), ask="2" * 12)
    assert previous(again) == old
    for hours, of in (
        (5, "these"),
        (6, "others"),
        (7, "others"),
    ):  # the last two differ in what they were asked for
        run = complete(tmp_path, tonight + timedelta(hours=hours), ask=f"{hours}" * 12, shards=of)
        manifest.mark_audited(run)
    assert previous(run) == complete_before(run, 2)


def complete_before(run: RunFolder, n: int) -> RunFolder:
    """The store's ``n``-th run before ``run``, whatever it is."""
    names = sorted(p.name for p in Path(run.store, "runs").iterdir())
    return manifest.open_folder(run.store, names[names.index(run.id) - n])


def test_a_run_whose_audit_was_killed_is_not_told_of_by_the_next_ones_beginning(
    nights: Nights,
) -> None:
    """The config is worded anew for the same measure, and that night is killed."""
    assert nights.begin() == 0
    first = nights.said["run"]
    nights.config.write_text(
        nights.config.read_text().replace('layers = "0,2"', 'layers = "0,2/3"')
    )
    killed_night(nights, audit, "write_json")
    assert nights.said["baseline"] == first


def test_killed_at_the_report_the_step_is_judged_with_the_next(nights: Nights) -> None:
    assert nights.begin() == 0
    first = nights.said["run"]
    nights.reports = True
    killed_night(nights, report, "render")
    assert nights.said["baseline"] == first


def test_another_corpus_in_the_store_is_no_baseline(tmp_path: Path) -> None:
    tonight = datetime(2026, 11, 22, 3, tzinfo=UTC)
    complete(tmp_path, tonight - timedelta(days=1), corpus=["elsewhere"], ask="1" * 12)
    assert previous(complete(tmp_path, tonight)) is None


def test_a_report_that_fails_costs_no_verdict(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nights.reports = True

    def fail(*args: Any, **options: Any) -> None:
        raise QueryError("too slow")

    monkeypatch.setattr(report, "render", fail)
    assert nights.begin() == 0 and nights.said["verdict"] == "pass"
    assert "report.html could not be written: too slow" in capsys.readouterr().err
    assert manifest.is_audited(manifest.find_run(nights.store))


def test_the_same_command_again_gives_the_same_verdict_to_the_byte(nights: Nights) -> None:
    assert nights.begin() == 0
    nights.add(1, 600, 620)
    assert nights.audit() == 0
    before = (nights.folder / "out" / "audit.json").read_bytes()
    assert nights.audit() == 0
    assert (nights.folder / "out" / "audit.json").read_bytes() == before
    assert names(nights.folder / "out") == ["audit.json"]


STEPS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "planning": lambda patch: patch.setattr(preparation, "make_plan", interrupted),
    "a shard": lambda patch: stop_after(patch, 1),
    "reducing": lambda patch: patch.setattr(job, "reduce_run", interrupted),
    "the run's end": lambda patch: patch.setattr(manifest, "finish_run", interrupted),
    "the baseline": lambda patch: patch.setattr(baselines, "find", interrupted),
    "comparing": lambda patch: patch.setattr(compare, "compare", interrupted),
    "judging": lambda patch: patch.setattr(verdict, "judge", interrupted),
    "writing": lambda patch: patch.setattr(Path, "replace", interrupted),
    "telling": lambda patch: patch.setattr(notify, "call_command", interrupted),
    "the mark": lambda patch: patch.setattr(manifest, "mark_audited", interrupted),
    "the report": lambda patch: patch.setattr(report, "render", interrupted),
}
TOLD = ("telling", "the mark", "the report")
"""Steps before which audit.json was written."""


def test_stopped_at_every_step_and_given_again_nothing_is_lost_and_the_verdict_is_the_same(
    tmp_path: Path, tiny_bert: Path, verses: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    broken = LOOSE + "ks = 0.0001\n"
    command = ["--on-broken", "true"]
    verdicts = []
    for steps in ({}, STEPS):
        nights = Nights(tmp_path / f"{len(steps)}", tiny_bert, verses, broken)
        assert nights.begin(*command) == 0
        nights.add(1, 600, 630)
        for step, stop in steps.items():
            nights.reports = step == "the report"
            with pytest.MonkeyPatch.context() as patch:
                stop(patch)
                assert nights.audit(*command) == 2, step
            assert "the same command resumes" in capfd.readouterr().err
            assert nights.said["verdict"] == ("broken" if step in TOLD else "pass")
        nights.reports = False
        assert nights.audit(*command) == 1
        found = verify.verify_store(nights.store)
        assert not found.findings and not found.unproved
        assert len(names(Path(nights.store, "runs"))) == 2
        with afn_ray.open_run(nights.store) as run:
            rows = run.sql(
                "SELECT token_id, strength_2 FROM tokens ORDER BY doc, position"
            ).fetchall()
        rules = json.dumps(nights.said["rules"]).replace(str(nights.folder), "")
        verdicts.append((rules, nights.said["verdict"], rows))
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Interrupted("no capacity"), "no capacity"),
        (IncompleteRun("3 shards are quarantined"), "3 shards"),
        (StoreError("damaged"), "damaged"),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug"),
    ],
)
def test_whatever_else_goes_wrong_is_2(
    error: Exception,
    said: str,
    nights: Nights,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(job, "run", fail)
    assert nights.audit() == 2
    assert said in capfd.readouterr().err
    assert not (nights.folder / "out").exists()


def test_a_mistake_in_what_was_typed_is_2_before_any_work(
    nights: Nights, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "run", None)
    for more, said in (
        (
            ["--baseline", "prevous"],
            "baseline is 'prevous'; expected previous, week, weekday, median:N or a run's URI",
        ),
        (["--baseline", "no/such/run"], "neither a store nor a run"),
        (["--baseline", "weekday"], 'with window = "all" expected previous or week'),
        (["--baseline", "median:7"], 'with window = "all" expected previous or week'),
        (["--partition", "latest"], "the policy's window is all, the whole corpus"),
        (["--series", "a series"], "series is 'a series'; expected 1 to 100 letters"),
        (
            ["--on-broken", "no-such-command x"],
            "'no-such-command' is no command that can be found here",
        ),
        (["--on-broken", "'"], "is no command"),
        (["--on-broken", " "], "--on-broken is empty"),
        (["--webhook", "http://example.org/secret"], "http, which anybody on the way reads"),
        (["--webhook", "ftp://example.org/secret"], "expected https"),
        (["--webhook", "example.org/secret"], "expected https"),
        (["--out", "nowhere://bucket/x"], "cannot be opened"),
    ):
        assert nights.audit(*more) == 2
        err = capfd.readouterr().err
        assert said in err and "secret" not in err, more
    nights.config.write_text(nights.config.read_text() + 'thresholds = "x"\n')
    assert nights.audit("--frozen") == 2
    assert "leave it out of the config, or --frozen" in capfd.readouterr().err


def test_a_named_baseline_is_a_run_and_frozen_nights_label_by_the_first(
    nights: Nights, capfd: pytest.CaptureFixture[str]
) -> None:
    def q3(run: RunFolder) -> list[float]:
        return [r["q3"] for r in label_thresholds.labels(run).to_pylist()]

    assert nights.begin("--frozen") == 0
    first = manifest.find_run(nights.store)
    for night in (1, 2):
        nights.add(night, 600 * night, 600 * night + 20)
        assert nights.audit("--frozen") == 0
        run = manifest.find_run(nights.store)
        assert nights.audit("--frozen") == 0
        assert manifest.find_run(nights.store) == run  # again, and nothing is done
        assert q3(run) == q3(first) and run.id != first.id
        assert any("HIGH means the same" in n for n in nights.said["notes"])
    assert nights.audit("--baseline", first.uri) == 0
    assert nights.said["baseline"]["uri"] == first.uri
    capfd.readouterr()
    assert nights.audit("--baseline", nights.store) == 2
    assert "is a store, whose latest run is another one every night" in capfd.readouterr().err


def test_sources_are_judged_one_by_one_and_a_run_without_them_cannot_be(
    nights: Nights, capfd: pytest.CaptureFixture[str]
) -> None:
    assert nights.begin() == 0
    (nights.folder / "policy.toml").write_text(
        "max_new_sources = 0\n[source]\nks = 0\nmin_tokens = 1\n"
    )
    nights.add(1, 600, 620)
    assert nights.audit() == 1
    new, ks = nights.said["rules"]
    assert (new["value"], new["passed"]) == (1, False)
    assert (ks["value"], ks["passed"], ks["where"]) == (
        0.0,
        True,
        f"{nights.folder}/corpus/0.jsonl",
    )  # untouched
    (note,) = (n for n in nights.said["notes"] if n.startswith("[source]"))
    assert (
        "nothing of 1 new source, which have nothing to be held against: "
        f"{nights.folder}/corpus/1.jsonl (" in note
    )
    nights.config.write_text(nights.config.read_text() + "screen = 0\n")
    nights.add(1, 600, 630)
    capfd.readouterr()
    assert nights.audit() == 2
    assert (
        "the policy limits sources or strange documents, but the run that run.toml"
        in capfd.readouterr().err
    )


def test_a_killed_job_given_again_finishes_the_night(nights: Nights) -> None:
    assert nights.begin() == 0
    first = nights.said
    for file in range(1, 30):
        nights.add(file, 100 * file, 100 * file + 10)

    def num_committed() -> int:
        return len(list(Path(nights.store, "shards").glob("*/*/commit.json")))

    before = num_committed()
    with killed(nights.start(python=warm_workers.choose(has_faults=False))) as process:
        done = "2 shards are committed"
        wait_until(done, lambda: num_committed() >= before + 2, process, every_s=0.005)
    assert process.returncode == -signal.SIGKILL and nights.said == first
    assert nights.audit() == 0
    said = nights.said
    assert said["baseline"] == first["run"] and said["counts"]["documents"] == 30 + 29 * 10
    assert said["counts"]["shards_reused"] >= before + 2
    found = verify.verify_store(nights.store)
    assert not found.findings


# --- to be told
# ------------------------------------------------------------------------------------------


@pytest.fixture
def hook() -> Iterator[Hook]:
    with listening() as found:
        yield found


@pytest.mark.parametrize(
    ("statuses", "tries", "said"),
    [
        ([], 1, None),
        ([503, 429], 3, None),
        ([500, 502, 503], 3, "did not take the verdict: status 503"),
        ([404], 1, "status 404"),
        ([302], 1, "status 302"),
    ],
)
def test_a_webhook_is_tried_again_where_that_may_help(
    hook: Hook, statuses: list[int], tries: int, said: str | None
) -> None:
    hook.statuses = list(statuses)
    why = notify.post(notify.check_webhook(hook.url, False), b"{}", pause_s=0.001)
    assert hook.got == [b"{}"] * tries
    assert why is None if said is None else why is not None and said in why and "secret" not in why


def test_a_webhook_that_nobody_answers_is_told_of() -> None:
    why = notify.post("http://127.0.0.1:1/secret", b"{}", pause_s=0.001)
    assert why is not None and "127.0.0.1 did not take the verdict" in why and "secret" not in why


@pytest.mark.parametrize(
    "url", ["http://localhost:9/x", "http://[::1]/x", "http://127.1.2.3/x", "https://example.org/x"]
)
def test_webhooks_that_may_be_called(url: str) -> None:
    assert notify.check_webhook(url, False) == url
    assert notify.check_webhook("http://example.org/x", True)


@pytest.mark.parametrize(
    "url", ["https://", "https://[::1", "https://host:port/", "file:///etc/passwd", ""]
)
def test_webhooks_that_are_no_addresses(url: str) -> None:
    with pytest.raises(ConfigError, match="webhook"):
        notify.check_webhook(url, True)


def test_a_broken_policy_is_told_and_stays_broken_where_nobody_listens(
    nights: Nights, hook: Hook, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AFN_WEBHOOK", f"{hook.url}\n")  # as a Secret made of a file has it
    assert nights.begin() == 0 and not hook.got  # nothing to tell
    (nights.folder / "policy.toml").write_text("empty_documents = 0\n")
    write_jsonl(nights.folder / "corpus" / "1.jsonl", [{"text": ""}, {"text": "word"}])
    broken = nights.folder / "no-program"
    broken.touch(0o755)
    assert nights.audit("--on-broken", str(broken)) == 1
    assert hook.got == [(nights.folder / "out" / "audit.json").read_bytes()]
    hook.statuses = [404]
    assert nights.audit("--on-broken", "false") == 1
    err = capfd.readouterr().err
    for said in ("no-program could not be run", "status 404", "--on-broken false left with 1"):
        assert said in err
    assert "secret" not in err
