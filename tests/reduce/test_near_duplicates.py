"""Near-copies against exact Jaccard similarities of word 5-grams."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import afn_ray
from afn_ray.analysis import audit, verify
from afn_ray.analysis.limits import Limit
from afn_ray.analysis.policy import Policy
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, QueryError
from afn_ray.query import database
from afn_ray.reduce import near_duplicates
from afn_ray.show import run_facts, summary
from afn_ray.store import manifest
from conftest import config_of, write_jsonl

THRESHOLD = 0.7


@pytest.fixture(scope="module")
def near_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, verses: list[str]
) -> tuple[RunConfig, str]:
    """A run over 40 texts, of which some are again with a word or most words changed."""
    folder = tmp_path_factory.mktemp("near")
    texts = [" ".join(verses[at : at + 2]) for at in range(0, 80, 2)]
    rows = [{"text": text, "lang": "en"} for text in texts]
    for at in (3, 8, 11):
        rows.append({"text": f"{texts[at]} Amen", "lang": "de"})  # the end
        words = texts[at].split()
        half = len(words) // 2  # the other half backwards shares nothing
        rows.append({"text": " ".join([*words[:half], *words[:half:-1]]), "lang": "de"})
    rows += [{"text": texts[5].upper(), "lang": "de"}, {"text": texts[6], "lang": "de"}]
    rows += [{"text": "", "lang": "en"}, {"text": "Lord", "lang": "en"}]
    write_jsonl(folder / "corpus.jsonl", rows)
    config = config_of(
        tiny_bert,
        folder / "corpus.jsonl",
        folder / "store",
        layers="1",
        shard_bytes=4096,
        keep_columns="lang",
        group_by="lang",
        duplicates="once",
        near_duplicates=THRESHOLD,
    )
    with afn_ray.run(config) as run:
        return config, run.uri


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def test_near_copies_are_those_by_exact_similarity(near_run: tuple[RunConfig, str]) -> None:
    with afn_ray.open_run(near_run[1]) as run:
        rows = run.sql("FROM documents ORDER BY doc").to_arrow_table().to_pylist()
        texts = run.sql(
            "SELECT doc, lower(string_agg(text, ' ' ORDER BY word)) FROM words GROUP BY 1"
        )
        of_doc = dict(texts.fetchall())
        found = {row["doc"]: row["near_duplicate_of"] for row in rows}
    expected: dict[int, int] = {}
    for doc in sorted(of_doc):
        for other in sorted(of_doc):
            a, b = shingles(of_doc[doc]), shingles(of_doc[other])
            if other < doc and len(a & b) / len(a | b) >= THRESHOLD:
                expected.setdefault(doc, other)
    assert len(expected) == 4  # "Amen" thrice, and a text in capitals
    assert {doc: other for doc, other in found.items() if other is not None} == expected
    (copy,) = (row for row in rows if row["duplicate_of"] is not None)
    assert copy["near_duplicate_of"] is None, "what counts nowhere is no near-copy"
    table = manifest.read_table(manifest.find_run(near_run[1]), "near_duplicates")
    for row in table.to_pylist():
        a, b = shingles(of_doc[row["doc"]]), shingles(of_doc[row["near_duplicate_of"]])
        exact = len(a & b) / len(a | b)
        assert abs(row["similarity"] - exact) < 5 * math.sqrt(0.25 / near_duplicates.NUM_HASHES)


def test_any_cut_finds_the_same_near_copies(
    near_run: tuple[RunConfig, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, uri = near_run
    stored = manifest.read_table(manifest.find_run(uri), "near_duplicates")
    monkeypatch.setattr(near_duplicates, "PART_ROWS", 100)
    monkeypatch.setattr(near_duplicates, "READ_BYTES", 1)
    monkeypatch.setattr("afn_ray.reduce.tasks.FAN_IN", 2)
    other = replace(config, store=f"{config.store}-2", shard_bytes=2048, screen=0, group_by=None)
    with afn_ray.run(other) as run:
        assert manifest.read_table(manifest.find_run(run.uri), "near_duplicates").equals(stored)


def test_bands_compare_pairs_at_the_threshold_with_99_percent() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        size = near_duplicates.band_size(threshold)
        assert (1 - threshold**size) ** (128 // size) <= 0.01
        assert threshold == 1.0 or (1 - threshold ** (size + 1)) ** (128 // (size + 1)) > 0.01


def test_estimates_are_those_of_the_whole_signature() -> None:
    random = np.random.default_rng(0)
    marks = np.repeat(random.integers(0, 256, (1, 128), np.uint8), 3, axis=0)
    marks[1, :20] += 1  # 108 of 128 equal
    marks[2, :60] += 1  # 68 of 128
    rows = near_duplicates._Rows(np.full(3, 7, np.uint64), np.array([5, 9, 6]), marks)
    (found,) = near_duplicates._near(rows, 0.8)
    expected = (108 / 128 - 1 / 256) / (1 - 1 / 256)
    assert found.to_pylist() == [
        {"doc": 9, "near_duplicate_of": 5, "similarity": pytest.approx(expected)}
    ]
    earlier = pa.table([[9], [2], [0.9]], schema=found.schema)
    twice = pa.concat_tables([found, earlier])
    assert near_duplicates._first_of_each(twice)["near_duplicate_of"].to_pylist() == [2]


def test_a_policy_limits_near_copies_and_names_the_worst_group(
    near_run: tuple[RunConfig, str], tmp_path: Path
) -> None:
    config, uri = near_run
    policy = tmp_path / "policy.toml"
    policy.write_text(
        "near_duplicate_share = 0.05\n[group]\nnear_duplicate_share = 0.2\nmin_tokens = 1\n"
        "[source]\nnear_duplicate_share = 0.2\nmin_tokens = 1\n"
    )
    scans: list[str] = []
    real = database.open_run

    def open_run(uri: str, **options: Any) -> Any:
        scans.extend([uri] if options.get("timeout_s") == database.MAX_TIMEOUT_S else [])
        return real(uri, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "open_run", open_run)
        found = audit.run_audit(config, afn_ray.read_policy(str(policy)))
        assert audit.to_bytes(found) == audit.to_bytes(found)
    assert scans == [uri]  # for all limits, evidence and audit.json
    values: dict[str, Any] = {rule.key: rule for rule in found.rules}
    whole, group = values["near_duplicate_share"], values["group.near_duplicate_share"]
    assert (whole.value, whole.passed) == (4 / 48, False) and "4 documents" in str(whole.where)
    assert (group.value, group.where, group.passed) == (4 / 7, "de", False)
    assert values["source.near_duplicate_share"].value == 4 / 48
    near = manifest.read_table(found.run, "near_duplicates")
    expected = [f"a near-copy of document {doc}" for doc in near["near_duplicate_of"].to_pylist()]
    for rule in (whole, group):
        named = [one for one in rule.culprits if one.kind == "document"]
        assert [one.reason for one in named] == expected and all(one.text for one in named)
    body = audit.to_json(found)["duplicates"]
    assert body is not None and body["near_share"] == 4 / 48
    assert body["near_groups"] == [{"group": "de", "share": 4 / 7}]
    facts = dict(run_facts.facts(summary.summarise(manifest.find_run(uri))))
    assert facts["near-copies"].startswith("4 documents (8.3%)")
    with afn_ray.run(replace(config, near_duplicates=None)) as run:
        assert near_duplicates.share_of(manifest.find_run(run.uri).info) is None
    lacking = audit.run_audit(
        replace(config, near_duplicates=None), afn_ray.read_policy(str(policy))
    )
    assert all("were not looked for" in str(rule.reason) for rule in lacking.rules)


def test_documents_that_cannot_be_read_cost_names_and_no_verdict(
    near_run: tuple[RunConfig, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures of parts are asked for without a time limit of a user's query."""
    config, _ = near_run
    limit = Limit("near_duplicate_share", 0.05)
    limits_s: list[float] = []

    def fail(*_: object, timeout_s: float = 60.0, **__: object) -> None:
        limits_s.append(timeout_s)
        raise QueryError("stopped")

    monkeypatch.setattr(database, "open_run", fail)
    found = audit.run_audit(config, Policy((limit,)), mark=False)
    assert found.state == "broken" and not found.rules[0].culprits
    body = audit.to_json(found)["duplicates"]
    assert body is not None and body["near_groups"] is None and body["near_share"] == 4 / 48
    assert limits_s.count(database.MAX_TIMEOUT_S) == 1

    # A limit on parts needs them: it is not judged, and says why.
    by_part = [replace(limit, of=part) for part in ("source", "group")]
    found = audit.run_audit(config, Policy(tuple(by_part), min_tokens={"group": 1}), mark=False)
    assert found.state == "not judged"
    assert [(rule.state, rule.reason) for rule in found.rules] == [
        ("not judged", "its documents could not be asked: stopped")
    ] * 2
    assert limits_s.count(database.MAX_TIMEOUT_S) == 2  # one more for both


def test_verify_proves_near_copies(near_run: tuple[RunConfig, str], monkeypatch: Any) -> None:
    assert not verify.verify_store(near_run[1]).findings
    monkeypatch.setattr(near_duplicates, "SEED", 43)
    messages = [one.message for one in verify.verify_store(near_run[1]).findings]
    assert any("similarity" in message or "rows" in message for message in messages), messages


def test_a_run_without_the_package_is_refused_before_any_work(
    near_run: tuple[RunConfig, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"afn-ray\[dedup\]"):
        afn_ray.run(near_run[0])
    for wrong in (0.4, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="near_duplicates is"):
            replace(near_run[0], near_duplicates=wrong)
