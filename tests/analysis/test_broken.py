"""Names of what broke: junk and lost bytes by source and group; and what is done about it."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest

import afn_ray
from afn_ray.analysis import audit, baselines, culprits, own_parts, verify
from afn_ray.analysis.audit import Audit
from afn_ray.analysis.baselines import Baseline
from afn_ray.analysis.evidence import Evidence
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.nights import Night
from afn_ray.analysis.policy import Policy, read_policy
from afn_ray.analysis.standing import Standing, standing
from afn_ray.analysis.verdict import Culprit, Rule
from afn_ray.cli import commands
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, StoreError
from afn_ray.reduce import compare, losses
from afn_ray.reduce.strangest import STRANGE_SCORE
from afn_ray.show.verdict_facts import verdict_facts
from afn_ray.store import checksums, manifest, verdicts
from afn_ray.store.manifest import RunFolder
from afn_ray.store.verdicts import StoredVerdict
from afn_ray.text import visible
from bench import screen as bench
from conftest import RUN_INFO, config_of, fenced, write_jsonl
from nights import Nights, complete

GUIDE = Path(__file__).parents[2] / "infra/guide/audit.md"


def junk_of(verses: Sequence[str]) -> list[str]:
    """The junk of issue 17: 30 texts of mojibake and 60 copies of a banner."""
    dice = random.Random(5)
    mojibake = [bench.KINDS["mojibake"](verses[at] * 2, dice) for at in range(30)]
    return [*mojibake, *[bench.BOILERPLATE] * 60]


class Caught(NamedTuple):
    """Two nights of 1,040 and 1,130 documents; the second has 90 of junk in one of two files."""

    config: RunConfig
    policy: Policy  # the guide's example
    clean: Audit
    broken: Audit


@pytest.fixture(scope="module")
def caught(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]) -> Caught:
    folder = tmp_path_factory.mktemp("junk")
    (folder / "policy.toml").write_text(fenced(GUIDE.read_text(), "toml")[0])
    policy = read_policy(folder / "policy.toml")
    corpus = folder / "corpus"
    corpus.mkdir()
    first = [{"text": text, "lang": "en"} for text in verses[8000:8700]]
    second = [{"text": text, "lang": "old"} for text in verses[8700:9040]]
    junk = [{"text": text, "lang": "xx"} for text in junk_of(verses[9100:])]
    write_jsonl(corpus / "a.jsonl", first)
    write_jsonl(corpus / "b.jsonl", second)
    options = {"keep_columns": "lang", "group_by": "lang", "layers": "2", "batch_tokens": 4096}
    config = config_of(tiny_bert, corpus, folder / "store", screen=2000, **options)
    clean = audit.run_audit(config, policy, Night(first_night=True))
    write_jsonl(corpus / "b.jsonl", [*second, *junk])
    return Caught(config, policy, clean, audit.run_audit(config, policy))


def test_the_guides_policy_catches_junk_that_every_other_limit_lets_pass(caught: Caught) -> None:
    assert caught.clean.state == "held"
    counts = caught.broken.run.info["counts"]
    assert counts["documents"] == 1130 and caught.broken.baseline == caught.clean.run
    states = {rule.key: rule.state for rule in caught.broken.rules if rule.state != "held"}
    of_junk = ("junk_share", "duplicate_share")  # mojibake, and copied banners
    assert states == dict.fromkeys((*of_junk, *(f"source.{key}" for key in of_junk)), "broken")
    rule = next(rule for rule in caught.broken.rules if rule.key == "source.junk_share")
    assert rule.where == f"{caught.config.corpus[0]}/b.jsonl"
    assert rule.value == pytest.approx(0.22, abs=0.04)


def test_shares_of_junk_are_those_of_the_scored_documents(caught: Caught) -> None:
    """``screened`` lists every text of the clean night."""
    run = caught.clean.run
    with afn_ray.open_run(run.uri) as opened:
        rows = opened.sql(
            "SELECT source, lang, n, score FROM (SELECT doc, count(*) AS n FROM tokens WHERE NOT "
            "is_special GROUP BY doc) JOIN documents d USING (doc) JOIN (SELECT text_sha256, score "
            "FROM screened JOIN documents USING (doc)) USING (text_sha256)"
        ).fetchall()
    assert len(rows) == 1040
    for kind, at in (("source", 0), ("group", 1)):
        tokens, strange = Counter[str](), Counter[str]()
        for row in rows:
            tokens[row[at]] += row[2]
            strange[row[at]] += row[2] * (row[3] >= STRANGE_SCORE)
        found = {part.name: (part.value, part.n) for part in own_parts.junk(run, kind)}
        assert found == {name: (strange[name] / n, n) for name, n in tokens.items()}
        assert own_parts.junk_of_run(run) == strange.total() / tokens.total() > 0


def test_junk_is_limited_by_group_with_enough_tokens(caught: Caught) -> None:
    limit = Limit("junk_share", 0.05, of="group")
    found = audit.run_audit(caught.config, Policy((limit,)), mark=False)
    (rule,) = found.rules
    assert (rule.key, rule.where, rule.state) == ("group.junk_share", "xx", "broken")
    assert rule.value is not None and rule.value > 0.8
    many = Policy((limit,), None, {"group": 10_000})
    (rule,) = audit.run_audit(caught.config, many, mark=False).rules
    assert rule.where in ("en", "old") and rule.state == "held"
    none = Policy((limit,), None, {"group": 10**9})
    (rule,) = audit.run_audit(caught.config, none, mark=False).rules
    assert rule.reason == "no group has 1,000,000,000 tokens"


def test_lost_bytes_of_groups_are_those_of_their_documents(tmp_path: Path, tiny_bert: Path) -> None:
    """Groups are by a kept column, by a key of the path, and by source."""
    texts = [("en", "x" * 90), ("de", "y" * 700), ("de", "z"), ("de", "y" * 800), (None, "w" * 900)]
    for lang in ("en", "de"):
        (tmp_path / "c" / f"dt={lang}").mkdir(parents=True)
        rows = [{"text": text, "lang": of} for of, text in texts if (of or "en") == lang]
        write_jsonl(tmp_path / "c" / f"dt={lang}" / "0.jsonl", rows)
    more = {"max_document_bytes": 600, "keep_columns": "lang", "layers": "2"}
    config = config_of(tiny_bert, tmp_path / "c", tmp_path / "s", group_by="lang", **more)
    found: dict[str, dict[str, float]] = {}
    lost: list[tuple[str | None, int]] = []
    for by in ("lang", "dt", "source"):
        with afn_ray.run(replace(config, group_by=by)) as opened:
            lost = opened.sql("SELECT lang, lost_bytes FROM documents").fetchall()
            run = manifest.find_run(opened.uri)
        found[by] = {part.name: part.value for part in own_parts.lost(run, "group")}
        of_source = {part.name: part.value for part in own_parts.lost(run, "source")}
    expected = Counter[str]()
    for group, lost_bytes in lost:
        expected[group or "(no value)"] += lost_bytes
    assert found["lang"] == expected and expected.total() > 2400
    assert sorted(found["dt"].values()) == sorted(of_source.values())
    assert found["source"] == of_source
    limit = Limit("lost_bytes", 10, of="group")
    policy = Policy((limit, Limit("lost_documents", 0), Limit("quarantined_documents", 0)))
    rule, documents, quarantined = audit.run_audit(config, policy, mark=False).rules
    assert (rule.state, rule.value) == ("broken", max(expected.values()))
    for one in (rule, documents, quarantined):
        by_kind = {culprit.kind: culprit for culprit in reversed(one.culprits)}
        assert by_kind.keys() >= {"file", "document"}
        assert by_kind["document"].reason.startswith("quarantined: ")
        assert "lost byte" in by_kind["document"].reason
    assert {"source", "group"} <= {culprit.kind for culprit in rule.culprits}


def test_a_limit_on_junk_wants_a_screening_and_is_not_judged_of_an_older_run(
    tmp_path: Path, tiny_bert: Path, caught: Caught
) -> None:
    policy = Policy((Limit("junk_share", 0.1), Limit("junk_share", 0.1, of="source")))
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "In the beginning was the Word."}])
    with pytest.raises(ConfigError, match=r"has no table of them: run it with its screening"):
        audit.run_audit(config_of(tiny_bert, corpus, tmp_path / "s", layers="2", screen=0), policy)
    run = caught.clean.run
    tables = {name: entry for name, entry in run.info["tables"].items() if name != "strange"}
    older = replace(run, info=run.info | {"tables": tables})
    assert own_parts.lacking(run, "junk_share") is None
    assert own_parts.lacking(older, "junk_share") == (
        "the run is older than its table of strange documents"
    )


# --- names


def test_a_broken_limit_names_sources_groups_and_documents_with_reasons_and_texts(
    caught: Caught,
) -> None:
    """The place is named in audit.json, in the output and on the page."""
    rules = {rule.key: rule for rule in caught.broken.rules}
    rule, whole = rules["source.junk_share"], rules["junk_share"]
    sources, groups, documents = (
        [one for one in of.culprits if one.kind == kind]
        for of, kind in ((rule, "source"), (whole, "group"), (rule, "document"))
    )
    assert [*sources, *documents] == [*rule.culprits]
    assert not any(one.kind == "source" for one in whole.culprits)
    source, group = sources[0], groups[0]
    assert (source.kind, source.name) == ("source", f"{caught.config.corpus[0]}/b.jsonl")
    assert source.reason.startswith(f"junk_share {rule.value:.4g}, ")
    assert (group.kind, group.name) == ("group", "xx")
    assert len(sources) == 1 and len(groups) <= 3 and len(documents) == culprits.MOST
    assert (rule.num_beyond, rule.num_within, whole.num_beyond) == (1, 1, None)
    screened = manifest.read_table(caught.broken.run, "screened").sort_by("rank").to_pylist()
    first = [row for row in screened if row["source"] == source.name][: culprits.MOST]
    assert [one.reason for one in documents] == [row["reason"] for row in first]
    assert any("60 documents have this text" in one.reason for one in documents)
    assert any(str(one.text).startswith("We use cookies") for one in documents)
    (of_json,) = (r for r in audit.to_json(caught.broken)["rules"] if r["key"] == rule.key)
    assert [tuple(one.values()) for one in of_json["worst"]] == [*rule.culprits]
    assert (of_json["n_beyond"], of_json["n_within"]) == (1, 1)
    said = "\n".join(audit.lines(caught.broken))
    assert f"document {documents[0].name.split()[0]} of {source.name}: {first[0]['reason']}" in said
    named = [line for line in said.splitlines() if line.startswith(f"{'':<11}")]
    of_rules = [one for rule in caught.broken.rules for one in rule.culprits]
    told = [line for line in named if not line.endswith(" of those above")]
    assert len(told) == len({*told}) == len({*of_rules}) < len(of_rules)
    on_page = verdict_facts(caught.broken).culprits
    assert on_page is not None
    names = {row[0] for row in on_page.rows if rule.key in row[-1].split(", ")}
    assert names == {one.name for one in rule.culprits}
    assert all(not rule.culprits for rule in caught.broken.rules if rule.state == "held")
    assert verdict_facts(caught.clean).culprits is None
    texts = [part for one in rule.culprits for part in one if part is not None]
    assert all(visible(text) == text and len(text) <= 300 for text in texts)


def test_a_limit_on_parts_names_those_beyond_it_and_says_how_many_are_within(
    caught: Caught,
) -> None:
    """Each part once, by the limit on its kind, whatever else is broken by the same figure."""
    limits = tuple(
        Limit("duplicate_share", fail, warn, of)
        for fail, warn, of in ((0.05, None, ""), (0.1, None, "source"), (0.6, 0.02, "group"))
    )
    policy = Policy((*limits, Limit("junk_share", 1e-4, of="group")), min_tokens={"group": 100})
    found = audit.run_audit(caught.config, policy, mark=False)
    rules = {rule.key: rule for rule in found.rules}
    shares = {
        kind: {part.name: part.value for part in own_parts.copies(found.run, kind)}
        for kind in ("source", "group")
    }
    for kind, level in (("source", 0.1), ("group", 0.6)):
        beyond = [name for name, value in shares[kind].items() if value > level]
        rule = rules[f"{kind}.duplicate_share"]
        assert rule.state == "broken" and 1 == len(beyond) < len(shares[kind])
        assert [one.name for one in rule.culprits if one.kind == kind] == beyond
        within = len(shares[kind]) - 1
        assert (rule.num_beyond, rule.num_within) == (1, within)
        assert f"{beyond[0]}; 1 {kind} beyond it, {within} within)" in "".join(audit.lines(found))
    named = Counter((one.kind, one.reason) for rule in found.rules for one in rule.culprits)
    assert all(n == 1 for (kind, _), n in named.items() if kind in ("source", "group"))
    junk = {part.name: part.value for part in own_parts.junk(found.run, "group")}
    worst_first = sorted((name for name in junk if junk[name] > 1e-4), key=lambda name: -junk[name])
    named_first = [one.name for one in rules["group.junk_share"].culprits if one.kind == "group"]
    assert named_first == worst_first and len(worst_first) > 1
    (only,) = audit.run_audit(caught.config, Policy(limits[1:2]), mark=False).rules
    assert [one.name for one in only.culprits if one.kind == "group"] == ["xx"]


def test_the_documents_of_a_group_are_of_that_group(caught: Caught) -> None:
    limit = Limit("junk_share", 0.05, of="group")
    (junk,) = audit.run_audit(caught.config, Policy((limit,)), mark=False).rules
    with afn_ray.open_run(caught.broken.run.uri) as run:
        langs = dict(run.sql("SELECT doc, lang FROM documents").fetchall())
    docs = [int(one.name.split()[0]) for one in junk.culprits if one.kind == "document"]
    assert {langs[doc] for doc in docs} == {junk.where} == {"xx"} and len(docs) == culprits.MOST


def test_what_moved_is_named_with_types_in_their_context(caught: Caught) -> None:
    new, vanished, psi, classes = audit.run_audit(
        caught.config,
        Policy(
            (
                Limit("max_new_types", 0),
                Limit("max_vanished_types", None, 0, ""),
                Limit("psi", 0),
                Limit("class_share_shift", None, 0),
            )
        ),
        mark=False,
    ).rules
    types = [one for one in new.culprits if one.kind == "type"]
    assert {one.kind for one in new.culprits} == {"type"} and len(types) == culprits.MOST
    for one in types:
        assert one.reason.startswith("new, ") and one.text is not None
        assert one.name in one.text.lower()
    assert any(one.text != str(one.text).lower() for one in types)  # as it is written
    assert vanished.state == "held" and not vanished.culprits  # nothing was taken away
    kinds = [one.kind for one in psi.culprits]
    assert kinds == sorted(kinds, key=["source", "group", "type", "document"].index)
    assert {"source", "type", "document"} <= {*kinds}
    assert classes.state == "warned" and {"class", "type"} == {one.kind for one in classes.culprits}


def test_a_baseline_that_lost_a_file_leaves_out_texts_and_no_verdict(
    caught: Caught, tmp_path: Path
) -> None:
    """The night of junk is the baseline of the clean one, so that types vanish."""
    store = shutil.copytree(manifest.find_run(caught.broken.run.uri).store, tmp_path / "store")
    before = manifest.find_run(str(store / "runs" / caught.broken.run.id))
    drift = compare.compare(before, caught.clean.run)
    found = Evidence(
        caught.clean.run, losses.of_run(caught.clean.run), (), drift, Baseline(before), 2
    )
    rule = Rule(Limit("max_vanished_types", 0), 9, "broken", None)

    def named() -> tuple[Culprit, ...]:
        return culprits.with_culprits([rule], Policy((rule.limit,)), found)[0].culprits

    whole = named()
    assert whole and all(one.text for one in whole)
    for shard in store.rglob("*-tokens.parquet"):
        shard.unlink()
    assert named() == tuple(one._replace(text=None) for one in whole)


def test_names_are_cut_and_cannot_act() -> None:
    assert culprits.shown("a\n\tb\x1b[2J\u202e") == "a b\\x1b[2J\\u202e"
    assert culprits.shown("x" * 400) == "x" * 299 + "…"


# --- broken nights as baselines


def put(run: RunFolder, state: str, told: bool = False, *broken: str) -> RunFolder:
    """Keep a verdict on ``run``."""
    kept = StoredVerdict(state, "all", 8, None, broken, (), (), {}, told=told)
    verdicts.write_verdict(run, kept)
    manifest.mark_audited(run)
    return run


def test_a_broken_night_is_no_baseline_until_it_is_accepted(tmp_path: Path) -> None:
    start = datetime(2026, 11, 1, 3, tzinfo=UTC)
    texts = [f"c/dt=2026-11-{day:02}" for day in range(1, 23)]
    runs = [
        complete(tmp_path, start + timedelta(days=at), corpus=[text])
        for at, text in enumerate(texts)
    ]
    tonight = runs[21]
    for run in runs[:21]:
        put(run, "held")
    for at in (20, 14, 19, 13, 18):
        put(runs[at], "broken", False, "psi")

    def found(kind: str, window: str) -> list[RunFolder | None]:
        baseline = baselines.find(tonight, kind, window)
        return [baseline.run, *baseline.median_of]

    assert found("previous", "all") == [runs[17]] == found("previous", "new")
    assert found("week", "all") == [runs[12]]
    assert found("weekday", "new") == [runs[7]]  # the 15th is broken: the 8th
    assert found("median:3", "new") == [runs[17], runs[17], runs[16], runs[15]]
    verdicts.accept(runs[19], "the new source is meant to be there")
    assert found("previous", "all") == [runs[19]] == found("previous", "new")
    assert found("median:3", "new") == [runs[19], runs[19], runs[17], runs[16]]
    verdicts.accept(runs[14], "so is this")
    assert found("weekday", "new") == [runs[14]]
    for at in (0, 7):
        put(runs[at], "broken", False, "psi")
    put(runs[14], "broken", False, "psi")
    (tmp_path / f"runs/{runs[14].id}/accepted.json").unlink()
    lacking = baselines.find(tonight, "weekday", "new").lacking
    assert lacking is not None and "no run of 2026-10-25" in lacking and "01 is broken" in lacking
    for run in runs[:21]:
        put(run, "broken", False, "psi")
    (tmp_path / f"runs/{runs[19].id}/accepted.json").unlink()
    none = baselines.find(tonight, "previous", "all")
    assert none.run is None and none.lacking is not None
    assert none.lacking.endswith("is broken, and none was accepted")


def test_a_baseline_that_only_broken_nights_could_be_is_refused_and_says_so(
    tmp_path: Path,
) -> None:
    """So ``--first-night`` does not excuse its lack."""
    start = datetime(2026, 11, 1, 3, tzinfo=UTC)
    runs = [
        complete(tmp_path, start + timedelta(days=at), corpus=[f"c/dt=2026-11-{at + 1:02}"])
        for at in range(9)
    ]
    for run in runs[:8]:
        put(run, "broken", False, "psi")

    def found(tonight: RunFolder, kind: str, window: str) -> tuple[str | None, bool]:
        baseline = baselines.find(tonight, kind, window)
        assert baseline.run is None
        return baseline.lacking, baseline.is_refused

    of_week = "every run of the series that is 6.5 days old is broken, and none was accepted"
    assert found(runs[8], "week", "all") == (of_week, True)
    assert found(runs[5], "week", "all") == ("no run of the series is 6.5 days old yet", False)
    needed = "the median needs 3 earlier nights; there are 0, and {} broken that nobody accepted"
    assert found(runs[8], "median:3", "new") == (needed.format(8), True)
    assert found(runs[2], "median:3", "new") == (needed.format(2), True)
    put(runs[0], "held")
    few = [baselines.find(runs[at], "median:3", "new") for at in (2, 3)]
    assert [one.run for one in few] == [runs[0], runs[0]]
    assert [one.is_refused for one in few] == [False, True]  # two nights are too few anyway


def test_a_median_is_of_the_nights_with_the_layer_and_others_are_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, runs = datetime(2026, 11, 1, 3, tzinfo=UTC), []
    for at in range(9):
        monkeypatch.setitem(RUN_INFO, "layers", [4, 8] if at > 6 else [4])
        began, corpus = start + timedelta(days=at), [f"c/dt=2026-11-{at + 1:02}"]
        runs.append(put(complete(tmp_path, began, corpus=corpus), "held"))
    found = baselines.find(runs[8], "median:3", "new")
    assert found.run == runs[7] and not found.is_refused
    assert found.lacking == (
        "the median needs 3 earlier nights; there are 1, and 7 without layer 8"
    )
    assert baselines.find(runs[8], "median:3", "new", 4).median_of == (runs[7], runs[6], runs[5])


def test_only_a_broken_night_is_accepted_and_with_a_reason(tmp_path: Path) -> None:
    run = complete(tmp_path, datetime(2026, 11, 1, tzinfo=UTC))
    with pytest.raises(ConfigError, match=r"needs no acceptance: it was never audited"):
        verdicts.accept(run, "why not")
    put(run, "held")
    with pytest.raises(ConfigError, match=r"its last audit found nothing broken"):
        verdicts.accept(run, "why not")
    put(run, "broken")  # as a policy counts limits that were not judged
    assert verdicts.may_be_baseline(run)
    put(run, "broken", False, "psi")
    assert not verdicts.may_be_baseline(run)
    for why in (" ", "x" * 1001):
        with pytest.raises(ConfigError, match=r"expected 1 to 1,000"):
            verdicts.accept(run, why)
    verdicts.accept(run, " first ")
    with pytest.raises(ConfigError, match=r"was accepted before"):
        verdicts.accept(run, "second")
    acceptance = verdicts.read_acceptance(run)
    assert acceptance is not None and acceptance.why == "first"
    copied = tmp_path / "runs" / run.id / "accepted.json"
    other = put(complete(tmp_path, datetime(2026, 11, 2, tzinfo=UTC)), "broken", False, "psi")
    (tmp_path / "runs" / other.id / "accepted.json").write_bytes(copied.read_bytes())
    assert verdicts.read_acceptance(other) is None and not verdicts.may_be_baseline(other)
    copied.write_bytes(copied.read_bytes().replace(b"first", b"furst"))
    with pytest.raises(StoreError, match=r"accepted.json"):
        verdicts.may_be_baseline(run)


def test_an_acceptance_covers_the_limits_that_were_broken(tmp_path: Path) -> None:
    """An audit by a tighter policy must be accepted anew; what it says is what baselines follow."""
    run = put(complete(tmp_path, datetime(2026, 11, 1, tzinfo=UTC)), "broken", False, "psi", "ks")
    rules = {key: Rule(Limit(key, 0.1), 0.2, "broken", None) for key in ("psi", "ks", "js")}

    def why_of(*broken: str) -> str | None:
        """The reason that the audit gives, which may be a baseline just when it gives one."""
        put(run, "broken", True, *broken)
        found = standing(run, "broken", [rules[key] for key in broken]).acceptance
        assert verdicts.may_be_baseline(run) is (found is not None)
        return None if found is None else found.why

    verdicts.accept(run, "both")
    assert [why_of("psi", "ks"), why_of("ks"), why_of("ks", "js")] == ["both", "both", None]
    verdicts.accept(run, "js too")
    assert [why_of("js"), why_of("psi", "ks")] == ["js too", None]
    path = tmp_path / "runs" / run.id / "accepted.json"
    body = checksums.read_json(str(path))
    assert body is not None
    old = {key: body[key] for key in ("schema_version", "run", "why", "accepted_at")}
    path.write_bytes(checksums.checksummed(old))  # as before limits were kept
    assert why_of("psi") == "js too"


def test_an_accepted_night_that_is_measured_again_stays_accepted(tmp_path: Path) -> None:
    """Its later run is the baseline that partitions are held against and learned from."""
    night = datetime(2026, 11, 1, 3, tzinfo=UTC)
    runs = (
        complete(tmp_path, night + timedelta(hours=at), corpus=["c/dt=2026-11-01"], shards="5")
        for at in (0, 1)
    )
    first, again = (put(run, "broken", False, "psi") for run in runs)
    next_night = complete(tmp_path, night + timedelta(days=1), corpus=["c/dt=2026-11-02"])
    rules = (Rule(Limit("psi", 0.1), 0.2, "broken", None),)
    assert baselines.find(next_night, "previous", "new").run is None
    verdicts.accept(first, "meant")
    acceptance = standing(again, "broken", rules).acceptance
    assert acceptance is not None and acceptance == verdicts.read_acceptance(first)
    assert baselines.find(next_night, "previous", "new").run == again
    assert baselines.find(next_night, "previous", "all").run == again
    with pytest.raises(ConfigError, match=r"was accepted before"):
        verdicts.accept(again, "twice")
    put(again, "broken", False, "ks")
    assert not verdicts.may_be_baseline(again)  # the word was on psi


def test_a_night_is_known_where_the_same_text_had_the_same_verdict(tmp_path: Path) -> None:
    """However the store came to hold a second run of it."""
    night = datetime(2026, 11, 1, 3, tzinfo=UTC)
    first, again = (
        complete(tmp_path, night + timedelta(hours=at), ask="a" * 12, shards="5") for at in (0, 1)
    )
    rules = tuple(Rule(Limit(key, 0.1), 0.2, "broken", None) for key in ("psi", "ks"))
    assert standing(again, "broken", rules) == Standing(again.info["finished_at"])
    put(first, "broken", False, "ks", "psi")
    found = standing(again, "broken", rules)
    assert found.is_repeated and not found.is_known and found.since == first.info["finished_at"]
    put(first, "broken", True, "ks", "psi")
    assert standing(again, "broken", rules).is_known
    assert not standing(again, "broken", rules[:1]).is_repeated
    assert not standing(again, "not judged", rules).is_repeated
    put(again, "broken", False, "ks")  # by another policy
    assert not standing(again, "broken", rules).is_repeated
    assert standing(again, "broken", rules[1:]).is_repeated
    put(again, "broken", False, "ks", "psi")
    assert standing(again, "broken", rules).is_known  # the first told
    other = complete(tmp_path, night + timedelta(hours=2), ask="b" * 12, shards="6")
    assert not standing(other, "broken", rules).is_repeated


def test_a_verdict_from_before_notifications_were_kept_told_nobody(tmp_path: Path) -> None:
    run = put(complete(tmp_path, datetime(2026, 11, 1, tzinfo=UTC)), "broken", True, "psi")
    path = tmp_path / "runs" / run.id / "verdict.json"
    body = checksums.read_json(str(path))
    assert body is not None and body.pop("told") is True
    path.write_bytes(checksums.checksummed(body))
    found = verdicts.read_verdict(run)
    assert found is not None and not found.told and found.broken == ("psi",)


def test_a_broken_night_is_told_once_and_accepted_by_hand(
    tmp_path: Path, tiny_bert: Path, verses: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    nights = Nights(tmp_path / "nights", tiny_bert, verses, "psi = 9\nempty_documents = 0\n")
    told = tmp_path / "told"
    (tmp_path / "tell").write_text(f'#!/bin/sh\necho "$AFN_AUDIT_JSON" >> {told}\n')
    (tmp_path / "tell").chmod(0o755)

    def audited(*flags: str) -> tuple[int, int, str]:
        """Exit code, number of notifications so far, and the last line of the output."""
        code = nights.audit("--on-broken", str(tmp_path / "tell"), *flags)
        num_told = len(told.read_text().splitlines()) if told.exists() else 0
        return code, num_told, capfd.readouterr().out.splitlines()[-1]

    assert nights.begin() == 0
    first = nights.said["run"]["uri"]
    write_jsonl(nights.folder / "corpus" / "1.jsonl", [{"text": ""}, {"text": "In the beginning"}])
    assert nights.audit("--on-broken", "false") == 1  # a notification that fails tells nobody
    capfd.readouterr()
    code, num_told, said = audited()
    since = f"{nights.said['run']['finished_at'][:16].replace('T', ' ')} UTC"
    assert (code, num_told) == (1, 1) and f"still broken since {since}: 1 limit of 2" in said
    assert nights.said["broken_since"] == nights.said["run"]["finished_at"]
    written = (nights.folder / "out" / "audit.json").read_bytes()
    assert audited()[:2] == (1, 1)
    assert (nights.folder / "out" / "audit.json").read_bytes() == written
    assert audited("--notify-again")[:2] == (1, 2)

    # The next night is held against the one before it, which is not broken.
    broken = nights.said["run"]["uri"]
    write_jsonl(nights.folder / "corpus" / "2.jsonl", [{"text": "God created the heaven"}])
    code, num_told, said = audited()
    assert (code, num_told) == (1, 3) and "the policy is broken: 1 limit of 2" in said
    assert nights.said["baseline"]["uri"] == first

    def accept(*words: str) -> int:
        with pytest.raises(SystemExit) as left:
            commands.main(["audit", *words])
        assert isinstance(left.value.code, int)
        return left.value.code

    why = "the source delivers empty rows \x1b[1m"
    assert accept("--accept", first, "--why", why) == 2
    capfd.readouterr()
    assert accept("--accept", nights.store, "--why", why) == 2
    said = f"{nights.store} is a store; name one of its runs, {broken[:9]}"
    assert said in capfd.readouterr().err
    assert accept("--accept", broken) == 2 == accept("--accept", broken, "x.toml", "--why", why)
    assert accept() == 2
    assert "expected afn audit RUN_TOML --policy FILE" in capfd.readouterr().err
    assert accept("--accept", broken, "--why", why) == 0
    assert audited()[:2] == (1, 3)
    assert nights.said["baseline"]["uri"] == broken
    assert not verify.verify_store(nights.store).findings
    with afn_ray.open_run(nights.store) as run:
        rows = run.sql("SELECT DISTINCT run, accepted FROM history ORDER BY run").fetchall()
    assert [accepted for _, accepted in rows] == [None, why, None]
    with pytest.raises(SystemExit):
        commands.main(["history", nights.store])
    assert r"was accepted: the source delivers empty rows \x1b" in capfd.readouterr().out

    # The night itself, once accepted, is told no more.
    tonight = nights.said["run"]["uri"]
    assert accept("--accept", tonight, "--why", "known") == 0
    code, num_told, said = audited()
    assert (code, num_told) == (1, 3) and "; accepted " in said and " UTC: known; run" in said
    assert nights.said["accepted"]["why"] == "known"
