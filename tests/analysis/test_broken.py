"""What broke, by name: junk and lost bytes of a run, its sources and its groups."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

import afn_ray
from afn_ray.analysis import audit, own_parts
from afn_ray.analysis.audit import Audit
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.nights import Night
from afn_ray.analysis.policy import Policy, read_policy
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError
from afn_ray.reduce.strangest import STRANGE_SCORE
from afn_ray.store import manifest
from bench import screen as bench
from conftest import config_of, fenced, write_jsonl

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
    assert states == {"junk_share": "broken", "source.junk_share": "broken"}
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
    """By a kept column from the documents, by a key of the path and by source from the files."""
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
    (rule,) = audit.run_audit(config, Policy((limit,)), mark=False).rules
    assert (rule.state, rule.value) == ("broken", max(expected.values()))


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
