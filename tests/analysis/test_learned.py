"""Limits that learn: their form, their arithmetic against scipy, and the nights that they learn
from.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from afn_ray.analysis import audit, learned, message, parts, past, verdict, verify
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.evidence import Evidence, Found
from afn_ray.analysis.limits import Limit, parse
from afn_ray.analysis.policy import Policy, read_policy
from afn_ray.analysis.verdict import BROKEN, HELD, NOT_JUDGED, WARNED, Rule
from afn_ray.errors import ConfigError, StoreError
from afn_ray.reduce.losses import Losses
from afn_ray.store import manifest, verdicts
from afn_ray.store.checksums import entry_of
from afn_ray.store.manifest import RunFolder
from afn_ray.store.verdicts import StoredVerdict
from nights import complete

SECRETS = np.random.default_rng(17)
VALUES = SECRETS.chisquare(9, 27).tolist()


def learns(text: str) -> learned.Learned:
    found = learned.parse(text)
    assert found is not None
    return found


# --- parsing


@pytest.mark.parametrize("text", ["3 mad", "2.5 mad", "p99", "p50", "p99.9", "p100"])
def test_a_limit_that_learns_reads_as_it_is_written(text: str) -> None:
    assert str(learns(text)) == str(learns(f" {text.upper()} ")) == text


@pytest.mark.parametrize(
    "value", ["3mads", "0 mad", "-1 mad", "p49", "p101", "p9", "mad", "", 3, None, "1e9 mad"]
)
def test_what_is_no_such_limit_is_none(value: object) -> None:
    assert learned.parse(value) is None


def test_a_policy_takes_it_at_either_level_for_every_part(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        'nights = 20\npsi = "3 mad"\nlost_bytes = {warn = "p90", fail = 10}\n[source]\nks = "p99"\n'
    )
    policy = read_policy(tmp_path / "p.toml")
    assert policy.nights == 20
    assert policy.limits == (
        Limit("psi", learns("3 mad")),
        Limit("lost_bytes", 10, learns("p90")),
        Limit("ks", learns("p99"), None, "source"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('psi = "p10"', 'expected a number from 0, a share as in "2%", or what is usual'),
        ('nights = 7\npsi = "3 mad"', "nights is 7; a limit learns from 8 or more"),
        ('psi = {warn = "6 mad", fail = "3 mad"}', "psi warns at 6 mad and fails at 3 mad"),
        ('psi = {warn = "p99", fail = "p99"}', "no value is a warning alone"),
    ],
)
def test_a_policy_that_cannot_learn_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_policy(tmp_path / "p.toml")
    assert message in str(error.value)


# --- arithmetic


@pytest.mark.parametrize("n", [8, 9, 26, 27])
def test_what_is_usual_equals_scipy_and_numpy(n: int) -> None:
    values = VALUES[:n]
    spread = 3 * stats.median_abs_deviation(values)
    found = learned.usual(learns("3 mad"), values)
    assert found is not None
    low = max(0.0, np.median(values) - spread)
    assert (found.low, found.high) == pytest.approx((low, np.median(values) + spread), rel=1e-12)
    for share in (0.5, 0.75, 0.9, 0.99, 1):
        found = learned.usual(learns(f"p{100 * share:g}"), values)
        ends = np.quantile(values, [1 - share, share], method="inverted_cdf")
        assert found == learned.UsualRange(ends[0], ends[1], n)
    assert learned.usual(learns("p99"), values[:7]) is None


def test_nights_that_are_mostly_equal_make_all_that_they_had_usual() -> None:
    values = [0.0] * 15 + [0.02] * 13
    assert learned.usual(learns("3 mad"), values) == learned.UsualRange(0.0, 0.02, 28)
    assert [rule_of(x, "3 mad", values).state for x in (1e-6, 0.02, 0.021)] == [HELD, HELD, BROKEN]


# --- judging


def rule_of(value: float, limit: object, past_values: list[float], key: str = "psi") -> Rule:
    """The verdict on ``value`` by ``limit`` after nights with ``past_values``."""
    return verdict.rule_of(parse("p", key, limit), Found(value), past_values)


def test_a_value_at_the_end_of_what_is_usual_holds_and_beyond_it_breaks() -> None:
    usual = learned.usual(learns("3 mad"), VALUES)
    assert usual is not None
    assert rule_of(usual.high, "3 mad", VALUES).state == HELD
    beyond = rule_of(usual.high * 1.001, "3 mad", VALUES)
    assert (beyond.state, beyond.usual, beyond.limit.fail) == (BROKEN, usual, usual.high)
    at_least = rule_of(usual.low, "3 mad", VALUES, "min_tokens_ratio")
    assert at_least.state == HELD and at_least.limit.fail == usual.low
    assert rule_of(usual.low * 0.999, "3 mad", VALUES, "min_tokens_ratio").state == BROKEN
    assert rule_of(float("inf"), "p99", VALUES).state == BROKEN


def test_too_few_nights_are_said_and_the_value_is_kept_for_later_nights() -> None:
    few = rule_of(0.25, "3 mad", VALUES[:7])
    assert (few.state, few.value) == (NOT_JUDGED, 0.25)
    assert few.reason == '"3 mad" needs the figure of 8 earlier nights; there are 7'
    assert verdict.limit_text(few) == "<= 3 mad"
    assert verdict.to_json(few)["limit"] == "3 mad" and verdict.to_json(few)["nights"] is None


def test_two_levels_may_learn_or_one_of_them() -> None:
    both = {"warn": "p75", "fail": "p99"}
    values = [float(i) for i in range(1, 21)]
    states = [rule_of(x, both, values).state for x in (15, 15.5, 20, 20.5)]
    assert states == [HELD, WARNED, WARNED, BROKEN]
    assert rule_of(1, both, values[:7]).state == NOT_JUDGED
    fixed = {"warn": "p75", "fail": 30}
    assert [rule_of(x, fixed, values).state for x in (16, 31)] == [WARNED, BROKEN]
    assert [rule_of(x, fixed, values[:7]).state for x in (16, 31)] == [HELD, BROKEN]
    learning = {"warn": 3, "fail": "p99"}
    assert rule_of(4, learning, values[:7]).state == NOT_JUDGED
    alone = {"warn": "p75"}
    assert [rule_of(16, alone, v).state for v in (values, values[:7])] == [WARNED, NOT_JUDGED]


def test_a_minimum_that_reaches_down_to_zero_is_not_judged() -> None:
    ratios = [1, 0.5, 1.5, 0.4, 1.6, 1, 0.3, 1.7]
    rule = rule_of(0, "3 mad", ratios, "min_tokens_ratio")
    assert (rule.state, rule.value) == (NOT_JUDGED, 0)
    assert rule.reason == (
        '"3 mad" of 8 earlier nights reaches down to 0, and nothing is below that; give a number'
    )
    assert rule_of(0, "1 mad", ratios, "min_tokens_ratio").state == BROKEN
    beside = {"warn": "3 mad", "fail": 0.1}
    assert rule_of(0, beside, ratios, "min_tokens_ratio").state == BROKEN
    assert rule_of(0, "3 mad", ratios, "max_tokens_ratio").state == HELD


def test_a_first_night_excuses_that_there_are_too_few_nights_to_learn_from() -> None:
    policy = Policy((parse("p", "junk_share", {"warn": "p90", "fail": "3 mad"}),))
    few = rule_of(0.01, "3 mad", VALUES[:2], "junk_share")
    reasons = verdict.few_nights(policy, {"junk_share": VALUES[:2]})
    assert next(reasons) == few.reason
    assert verdict.state_of([few], None, ["junk_share"]) == HELD
    assert verdict.state_of([few], None, ()) == NOT_JUDGED
    assert [*verdict.few_nights(policy, {"junk_share": VALUES})] == []


def test_what_is_usual_is_said_in_numbers() -> None:
    values = [0.004, 0.004, *[0.007] * 17, 0.011, 0.011]
    rule = rule_of(0.031, "p99", values)
    assert verdict.limit_text(rule) == "usual 0.004-0.011 over 21 nights (<= 0.011)"
    json = verdict.to_json(rule)
    assert (json["usual_low"], json["usual_high"], json["nights"]) == (0.004, 0.011, 21)
    run = RunFolder("s/runs/b", "s", "b", {"config": {"corpus": ["c"]}})
    lost = Losses(0, 0, 0, 0, 0, 0, (), 0, ())
    found = audit.Audit(BROKEN, (rule,), run, Baseline(None), None, lost, ())
    assert next(audit.lines(found)) == (
        "BROKEN     psi                            0.031, usual 0.004-0.011 over 21 "
        "nights (<= 0.011)"
    )
    assert message._against(rule) == "usual 0.004-0.011 over 21 nights"


# --- the nights


TONIGHT = datetime(2026, 11, 22, 3, tzinfo=UTC)
POLICY = Policy((parse("p", "psi", "3 mad"), parse("p", "ks", 0.1)), window="new", nights=9)


def night_of(store: Path, day: int, **changes: Any) -> RunFolder:
    began, ask = TONIGHT + timedelta(hours=day), f"{day:06x}" + "0" * 6
    if changes:
        began += timedelta(minutes=1)
    return complete(store, began, corpus=[f"/t/dt=2026-11-{day:02d}"], ask=ask, **changes)


def keep(
    run: RunFolder,
    psi: float | None,
    layer: int = 8,
    key: str = "psi",
    policy: Policy = POLICY,
    terms: str | None = None,
) -> None:
    """The verdict of an audit of ``run``, which was held against a run like itself."""
    if terms is None:
        terms = past.terms(policy, Limit(key, 0), run, run)
    kept = StoredVerdict("held", "new", layer, None, (), (), (), {key: psi}, terms={key: terms})
    verdicts.write_verdict(run, kept)
    manifest.mark_audited(run)


def no_evidence(run: RunFolder, baseline: Baseline) -> Evidence:
    raise AssertionError(f"{run.uri} is judged again")


def values_before(
    policy: Policy,
    run: RunFolder,
    gather: past.Gather = no_evidence,
    baseline: RunFolder | None = None,
) -> dict[str, list[float]]:
    """The values at layer 8; each earlier night is held against ``baseline``."""
    return past.values_before(policy, run, 8, lambda *of: Baseline(baseline), gather)


def test_values_are_those_that_the_last_nights_kept_newest_first(tmp_path: Path) -> None:
    for day in range(1, 13):
        keep(night_of(tmp_path, day), None if day == 9 else day / 100)
    keep(night_of(tmp_path, 14), 9.0)  # later than tonight
    keep(night_of(tmp_path, 10, measure="other"), 7.0)
    tonight = night_of(tmp_path, 13)
    values = values_before(POLICY, tonight)
    assert values == {"psi": [day / 100 for day in (12, 11, 10, 8, 7, 6, 5, 4)]}
    fixed = replace(POLICY, limits=POLICY.limits[1:])
    assert values_before(fixed, tonight) == {}


def test_a_corpus_that_is_measured_whole_has_a_night_for_each_run(tmp_path: Path) -> None:
    policy = replace(POLICY, window="all")
    for day in range(1, 13):
        run = complete(tmp_path, TONIGHT + timedelta(hours=day), ask=f"{day // 2:012x}")
        keep(run, day / 100, policy=policy)
    tonight = complete(tmp_path, TONIGHT + timedelta(hours=20), ask="f" * 12)
    # Two runs with one request are one night, tried again: the later one counts.
    values = values_before(policy, tonight)
    assert values == {"psi": [day / 100 for day in (12, 11, 9, 7, 5, 3, 1)]}


@pytest.mark.parametrize(
    "kept",
    [
        None,
        {"key": "ks"},
        {"layer": 0},
        {"policy": replace(POLICY, baseline="median:7")},
        {"policy": replace(POLICY, window="all")},
        {"terms": ""},
    ],
)
def test_a_night_that_kept_no_such_figure_is_judged_again(
    kept: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, tonight = night_of(tmp_path, 1), night_of(tmp_path, 2)
    if kept is not None:
        keep(earlier, 0.5, **kept)
    judged = []

    def judge(policy: Policy, evidence: Any) -> list[Rule]:
        assert policy.layer == 8 and [limit.fail for limit in policy.limits] == [0.0]
        judged.append(evidence)
        return [Rule(policy.limits[0], 0.125, BROKEN, None)]

    monkeypatch.setattr(verdict, "judge", judge)
    evidence: Any = object()
    values = [values_before(POLICY, tonight, lambda *of: evidence, earlier) for _ in range(2)]
    assert values == [{"psi": [0.125]}] * 2 and judged == [evidence]  # once
    other = night_of(tmp_path, 3)  # another baseline, as if a night was accepted
    values_before(POLICY, tonight, lambda *of: evidence, other)
    assert judged == [evidence] * 2


def test_a_figure_on_other_settings_is_none_to_learn_from(tmp_path: Path) -> None:
    """Settings of copies, near-copies and thresholds count where the figure depends on them."""
    changes: list[dict[str, Any]] = [
        {},
        {"duplicates": "once"},
        {"duplicates": "keep", "near_duplicates": 0.5},
        {"near_duplicates": 0.5, "thresholds": "/t"},
    ]
    keys = ("psi", "lost_bytes", "near_duplicate_share", "share_high_shift")
    policy = replace(POLICY, limits=tuple(parse("p", key, "3 mad") for key in keys))
    nights = [night_of(tmp_path, day, **one) for day, one in enumerate(changes, 1)]
    for day, night in enumerate(nights, 1):
        terms = {one.name: past.terms(policy, one, night, night) for one in policy.limits}
        figures = dict.fromkeys(keys, float(day))
        kept = StoredVerdict("held", "new", 8, None, (), (), (), figures, terms=terms)
        verdicts.write_verdict(night, kept)
    tonight = night_of(tmp_path, 9, near_duplicates=0.5)
    assert values_before(policy, tonight) == {
        "psi": [4, 3, 1],
        "lost_bytes": [4, 3, 2, 1],
        "near_duplicate_share": [4, 3],
        "share_high_shift": [3, 1],
    }
    # The night of a switch, held against a run with other settings.
    psi = Limit("psi", 0)
    keep(nights[0], 0.9, terms=past.terms(POLICY, psi, nights[0], nights[1]))
    evidence: Any = object()
    rule = Rule(replace(psi, fail=0.0), 0.9, BROKEN, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict, "judge", lambda policy, evidence: [rule])
        values = values_before(POLICY, night_of(tmp_path, 10), lambda *of: evidence, nights[1])
    assert values["psi"] == [4, 3]
    assert values_before(POLICY, night_of(tmp_path, 10), baseline=nights[1])["psi"] == [4, 3]


def test_a_figure_that_could_not_be_asked_this_time_is_asked_again(tmp_path: Path) -> None:
    earlier, tonight = night_of(tmp_path, 1), night_of(tmp_path, 2)
    reasons = [f"{parts.NOT_ASKED}: too slow", "no source has 1,000 tokens"]
    evidence: Any = object()
    for reason in reasons:
        rule = Rule(replace(POLICY.limits[0], fail=0.0), None, NOT_JUDGED, None, reason)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verdict, "judge", lambda policy, evidence, rule=rule: [rule])
            assert values_before(POLICY, tonight, lambda *of: evidence, earlier) == {"psi": []}
    assert values_before(POLICY, tonight, baseline=earlier) == {"psi": []}  # as the second


def test_kept_figures_are_checked_and_no_orphans(tmp_path: Path) -> None:
    run = night_of(tmp_path, 1)
    asked = verdicts.AskedFigures(8, ("b",), {"psi": "t"})
    for figure in (0.25, 0.5):  # the first one's stay
        verdicts.write_figures(run, asked, {"psi": figure, "ks": None})
    assert verdicts.read_figures(run, asked) == {"psi": 0.25, "ks": None}
    others = (replace(asked, layer=7), replace(asked, baseline=()), replace(asked, terms={}))
    assert [verdicts.read_figures(run, one) for one in others] == [None] * 3
    assert verdicts.FIGURES.fullmatch(asked.file)
    other = night_of(tmp_path, 2)
    path = tmp_path / "runs" / run.id / asked.file
    shutil.copy(path, tmp_path / "runs" / other.id)
    assert verdicts.read_figures(other, asked) is None  # copied
    found = verify.verify_store(run.uri)
    assert not any(asked.file in orphan.uri for orphan in found.orphans)
    assert not any(asked.file in finding.uri for finding in found.findings)
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.26"))
    damage = [one for one in verify.verify_store(run.uri).findings if asked.file in one.uri]
    assert [one.kind for one in damage] == ["damaged"] and "delete it" in damage[0].message
    with pytest.raises(StoreError, match="is damaged"):
        verdicts.read_figures(run, asked)


def test_a_night_without_the_groups_or_the_table_of_tonight_has_no_figure(tmp_path: Path) -> None:
    """Nor does it stop the audit, even if an audit kept a figure of other groups."""

    limits = (parse("p", "psi", "3 mad", "group"), parse("p", "junk_share", "3 mad"))

    def grouped(day: int, by: str | None, *tables: str) -> RunFolder:
        run = night_of(tmp_path, day)
        terms = {one.name: past.terms(POLICY, one, run, run) for one in limits}
        figures = {"group.psi": day, "junk_share": day}
        kept = StoredVerdict("held", "new", 8, None, (), (), (), figures, terms=terms)
        verdicts.write_verdict(run, kept)
        info = run.info.copy()
        info["config"] = info["config"] | {"group_by": by}
        info["tables"] = info["tables"] | {name: entry_of(name, b"") for name in tables}
        return replace(run, info=info)

    of_both = ("sources", "groups", "strange")
    nights = [
        grouped(1, "lang", *of_both),
        grouped(2, "kind", *of_both),
        grouped(3, None, "sources", "strange"),
        grouped(4, "lang"),
    ]
    tonight = grouped(5, "lang", *of_both)
    policy = replace(POLICY, limits=limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(past, "_nights_before", lambda *of: iter(nights))
        values = values_before(policy, tonight)
    assert values == {"group.psi": [1], "junk_share": [1, 2, 3]}
